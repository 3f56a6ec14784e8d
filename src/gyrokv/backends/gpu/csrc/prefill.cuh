// What the prefill kernels share: arguments, the order of tiles, which keys a row sees, the running softmax.
// They define ROWS (query rows of a tile), BLOCKS (that share one) and SPAN (keys of a block that one warp scores).
#pragma once
#include "ptx.cuh"

struct Prefill {
  char* out;
  i64 out_batch, out_head, out_token;  // elements
  float* lse;                          // [B, Hq, Tq], contiguous in Tq
  i64 lse_batch, lse_head;
  const float* sinks;                  // [Hq] or null
  const float* slopes;                 // [Hq], with ALIBI
  const char* mask;
  i64 mask_batch, mask_head, mask_token, mask_key;  // elements
  const u8* map;                    // of the mask, per tile of rows and KEYS keys: 0 skip, 1 all visible, 2 look; or null
  i64 map_batch, map_head, map_row;
  const i64* starts;   // RAGGED: [B], the first position of each sequence; or null
  const i64* lengths;  // RAGGED: [B or 1], tokens of each sequence, in place of length; or null
  i64 lengths_batch;
  const int* pages;    // K_PAGED, V_PAGED: [B, pages_batch], the page of each so many slots, or null
  i64 pages_batch;
  int slot, last_page;  // slot of key 0, a multiple of 128; no table has more pages
  int length, oldest, keep, origin, relative;  // RAGGED: live are positions from oldest on, the last keep; see own_keys
  int q_heads, groups, q_len, kv_len, tiles;  // groups: query heads per KV head; tiles: of a head
  int section, pairs;                         // KV heads at a time, for L2: some 24 MB; all (batch, KV head)
  int causal, window, first;                  // window 0: none; first: position of query 0 among the keys
  int joined;                                 // results over other keys are in out (f32) and lse: these are added
  int dv;                                     // true columns
  float scale, softcap, v_scale;              // v_scale: of the output
};

#define INFINITE __int_as_float(0x7F800000)
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float SLACK = 8.0f;  // log2 by which scores may pass the reference before the output is rescaled
constexpr bool BF16 = Q_TYPE == 1, V_BF16 = V_TYPE == 1;
constexpr bool PLAIN = !SOFTCAP && MASK == 0 && !ANY_SCALE;

constexpr int SCORES = SPAN / 2, UNITS = SPAN / 16;  // scores: of a thread for 16 rows; a unit: 16 keys

constexpr bool JOINS = OUT_TYPE == 2;

struct Tile {
  int batch, head, kv_head, row, block;  // row: first of the tile; block: last that is seen, or -1
  int stop;
  int own_first, own_begin, own_end;  // RAGGED
  const u8* map;

  INLINE Tile(const Prefill& p) {
    int index = blockIdx.x / BLOCKS, per_section = p.section * p.tiles * p.groups, section = index / per_section;
    int rest = index - section * per_section, heads = min(p.section, p.pairs - section * p.section) * p.groups;
    int order = rest / heads, inner = rest - order * heads, pair = section * p.section + inner / p.groups;
    int kv_heads = p.q_heads / p.groups;
    batch = pair / kv_heads, kv_head = pair - batch * kv_heads, head = kv_head * p.groups + inner % p.groups;
    int tile = p.tiles - 1 - order;  // the longest rows of a causal problem first
    row = tile * ROWS;
    if (RAGGED) own_keys(p);
    int last = end(p) - 1, low = begin();
    if (p.causal || p.window) last = min(last, min(row + ROWS, p.q_len) - 1 + first(p));
    if (p.window) low = max(low, row + first(p) - p.window + 1);
    stop = low / KEYS;
    map = MASK && p.map ? p.map + batch * p.map_batch + head * p.map_head + tile * p.map_row : nullptr;
    block = seen(last < low ? -1 : last / KEYS);
  }
  // Key 0 has position origin. In a sequence that is shorter than length by `missing`, queries lie that much earlier, and so do
  // keys that are relative to the end: what a window sees is then in the same keys for all sequences.
  INLINE void own_keys(const Prefill& p) {
    int tokens = p.lengths ? (int)p.lengths[batch * p.lengths_batch] : p.length, missing = p.length - tokens;
    int origin = p.relative ? p.origin - missing : p.origin, start = max(p.oldest, tokens - p.keep);
    if (p.starts) start = max(start, (int)p.starts[batch]);
    own_first = p.relative ? p.first : p.first - missing;
    own_begin = max(0, start - origin), own_end = min(p.kv_len, tokens - origin);
  }
  INLINE int first(const Prefill& p) const { return RAGGED ? own_first : p.first; }  // position of query 0 among the keys
  INLINE int begin() const { return RAGGED ? own_begin : 0; }                        // keys of the sequence: from here
  INLINE int end(const Prefill& p) const { return RAGGED ? own_end : p.kv_len; }     // to before here
  INLINE bool leaves_results(const Prefill& p) const { return JOINS && p.joined && block < 0; }
  INLINE int seen(int at) const {  // the next block, downwards, that is not skipped
    if (MASK && map)
      while (at >= stop && map[at] == 0) --at;
    return at >= stop ? at : -1;
  }
};

constexpr int common(int a, int b) { return b ? common(b, a % b) : a; }

// TOKENS keys from key on in boxes: load(keys before a box, its token, its batch: with PAGED slots to a page, that page).
template <int TOKENS, int PAGED, class F>
INLINE void each_box(const Prefill& p, const Tile& tile, int key, F load) {
  if constexpr (PAGED == 0) {
    load(0, key, tile.batch);
  } else {
    const int* pages = p.pages + tile.batch * p.pages_batch;
#pragma unroll
    for (int i = 0; i < TOKENS; i += common(TOKENS, PAGED)) {
      u32 slot = p.slot + key + i;
      load(i, slot % PAGED, pages[min(slot / PAGED, (u32)p.last_page)]);
    }
  }
}

// What a sequence does not have among KEYS_ values from key on, in chunks of 64 columns, becomes zeros: its weights are 0, but
// 0 * NaN is not. For the 128 threads of a warpgroup, which share a barrier of the block.
template <int KEYS_, int COLUMNS_>
INLINE void clear_values(const Prefill& p, const Tile& tile, u32 values, int key, int barrier) {
  int begin = tile.begin() - key, end = tile.end(p) - key;
  if (begin <= 0 && end >= KEYS_) return;
  for (int i = threadIdx.x % 128; i < KEYS_ * COLUMNS_ / 8; i += 128) {
    int row = i / 8 % KEYS_;
    if (row < begin || row >= end) store_zeros(values + 16 * i);
  }
  fence_async();
  asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory");
}

// registers that products wrote are read, or that they will write are written, on this side of here
template <int N>
INLINE void settle(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// Which keys a thread's two rows see, g and g + 8 of its warp's 16: those from low to high, relative to its first of a block.
struct Range {
  int low[2], high[2];

  INLINE Range(const Prefill& p, const Tile& tile, int block, int row, int t) {
    int key = block * KEYS + 2 * t, end = tile.end(p) - 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int position = row + 8 * r + tile.first(p);
      high[r] = (p.causal || p.window ? min(end, position) : end) - key;
      low[r] = p.window ? position - p.window + 1 - key : tile.begin() - key;
      if (RAGGED) low[r] = max(low[r], tile.begin() - key);
    }
  }
  INLINE bool whole() const { return min(high[0], high[1]) >= SPAN - 1 && max(low[0], low[1]) <= 0; }
  INLINE bool sees(int r, int k) const { return k <= high[r] && k >= low[r]; }
};

// A thread's part of the mask of a block, as stored: two keys of a row in WORDS registers.
struct Mask {
  static constexpr int SIZE = MASK == 1 ? 1 : MASK == 2 ? 4 : 2, WORDS = MASK == 2 ? 2 : 1;
  static constexpr u32 NOTHING = MASK == 1 ? 0x0101 : 0;  // two keys that it leaves alone
  u32 raw[MASK ? SPAN / 8 : 1][2][WORDS];

  INLINE static u32 one(const char* at) { return SIZE == 1 ? *(const u8*)at : SIZE == 2 ? *(const u16*)at : *(const u32*)at; }
  INLINE void load(const Prefill& p, const Tile& tile, int block, int row, int t) {
    bool pairs = p.mask_key == 1 && (((i64)p.mask / SIZE | p.mask_batch | p.mask_head | p.mask_token | p.kv_len) & 1) == 0;
    int key = block * KEYS + 2 * t, keys = tile.map && tile.map[block] == 1 ? 0 : p.kv_len - key;  // those to look at
    i64 step = p.mask_key * SIZE;
    const char* at[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      i64 from = tile.batch * p.mask_batch + tile.head * p.mask_head + min(row + 8 * r, p.q_len - 1) * p.mask_token;
      at[r] = p.mask + (from + key * p.mask_key) * SIZE;
    }
    if (pairs) {
#pragma unroll
      for (int j = 0; j < SPAN / 8; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          u32(&x)[WORDS] = raw[j][r];
          const char* from = at[r] + 8 * j * SIZE;
          x[0] = x[WORDS - 1] = NOTHING;
          if (8 * j < keys) {
            if (SIZE == 1) x[0] = *(const u16*)from;
            else if (SIZE == 2) x[0] = *(const u32*)from;
            else x[0] = ((const uint2*)from)->x, x[WORDS - 1] = ((const uint2*)from)->y;
          }
        }
    } else {
#pragma unroll
      for (int j = 0; j < SPAN / 8; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          u32 a = 8 * j < keys ? one(at[r]) : NOTHING & 1, b = 8 * j + 1 < keys ? one(at[r] + step) : NOTHING & 1;
          if (SIZE == 4) raw[j][r][0] = a, raw[j][r][WORDS - 1] = b;
          else raw[j][r][0] = a | b << (8 * SIZE % 32);
          at[r] += 8 * step;
        }
        if (j % 4 == 3) asm volatile("" ::: "memory");  // so many at a time
      }
    }
  }
  INLINE void keep(int j) {  // as stored until here, for there are no registers for more
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int i = 0; i < WORDS; ++i) asm volatile("" : "+r"(raw[j][r][i]));
  }
  INLINE float apply(float x, int j, int r, int e, float slope) const {  // a value of -65504 or less means "masked"
    if (MASK == 1) return raw[j][r][0] & 0xFF << 8 * e ? x : -INFINITE;
    u32 half = raw[j][r][0] >> 16 * e;
    float bias = MASK == 2 ? __uint_as_float(raw[j][r][e % WORDS]) : MASK == 3 ? f32_of_f16(half) : f32_of_bf16(half);
    return bias <= -65504.0f ? -INFINITE : ALIBI ? x + slope * bias : x + bias;
  }
};

// maxima over the four threads that share a row
template <int N>
INLINE void most_of_quads(float (&x)[N]) {
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2)
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = fmaxf(x[i], __shfl_xor_sync(~0u, x[i], lanes));
}

// of a thread's two rows, g and g + 8 of its warp's 16
struct Softmax {
  float top[2] = {-INFINITE, -INFINITE}, total[2] = {0.0f, 0.0f};  // top: reference of the exponents, log2
  float base[2] = {0.0f, 0.0f}, factor[2];                         // of the block at hand
  bool grown;                                                      // any row of the warp

  // scores of a block -> what the exponential takes
  INLINE void adjust(float (&s)[SCORES], const Prefill& p, const Range& range, Mask& mask, float slope) {
    if constexpr (!PLAIN) {
      constexpr float UNIT = MASK ? 1.0f : LOG2E;  // of scores from here on
      float unit = SOFTCAP ? 2.0f * LOG2E * p.scale / p.softcap : p.scale * UNIT, cap = p.softcap * UNIT;
#pragma unroll
      for (int i = 0; i < SCORES; ++i) {
        float x = s[i] * unit;  // tanh(x) = 1 - 2 / (exp(2 x) + 1)
        s[i] = SOFTCAP ? copysignf(__fmaf_rn(-2.0f * cap, inverse_fast(exp2_fast(fabsf(x)) + 1.0f), cap), x) : x;
      }
      if (MASK) {
#pragma unroll
        for (int i = 0; i < SCORES; ++i) {
          if (i % 4 == 0) mask.keep(i / 4);
          s[i] = mask.apply(s[i], i / 4, i / 2 % 2, i % 2, slope) * LOG2E;
        }
      }
    }
    if (!__all_sync(~0u, range.whole())) {
#pragma unroll
      for (int i = 0; i < SCORES; ++i) s[i] = range.sees(i / 2 % 2, i / 4 * 8 + i % 2) ? s[i] : -INFINITE;
    }
  }
  INLINE static float most(const float (&s)[SCORES], const Prefill& p, int r) {  // of a thread's keys of a row, log2
    float x = s[2 * r];
#pragma unroll
    for (int j = 0; j < SPAN / 8; ++j) x = fmaxf(x, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
    return PLAIN ? x * (p.scale * LOG2E) : x;
  }
  INLINE bool passed(int r, float most) const { return most > top[r] + SLACK; }
  INLINE void raise(int r, float most) {  // the reference of a row, if its maximum passes it by much
    factor[r] = 1.0f;
    if (passed(r, most)) {
      factor[r] = exp2_fast(top[r] - most);
      top[r] = most;
      total[r] *= factor[r];
    }
    base[r] = top[r] == -INFINITE ? 0.0f : top[r];
  }
  INLINE void begin(float (&s)[SCORES], const Prefill& p, const Range& range, Mask& mask, float slope) {
    adjust(s, p, range, mask, slope);
    float x[2] = {most(s, p, 0), most(s, p, 1)};
    grown = __any_sync(~0u, passed(0, x[0]) || passed(1, x[1]));
    if (grown) {
      most_of_quads(x);
      raise(0, x[0]);
      raise(1, x[1]);
    }
  }

  // weights of 16 keys: two of a row in each of 4 registers
  INLINE void weights(const float (&s)[SCORES], int unit, float scale, u32 (&w)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float y = s[8 * unit + 2 * i + e];
        x[e] = exp2_fast(PLAIN ? __fmaf_rn(y, scale, -base[i % 2]) : y - base[i % 2]);
        total[i % 2] += x[e];
      }
      w[i] = V_BF16 ? bf16x2(x[0], x[1]) : f16x2(x[0], x[1]);
    }
  }

  // after the last block: what the output is multiplied by, and the result that it joins; lse. A result over other keys is
  // a sink that has a value.
  INLINE void finish(float (&last)[2], float (&before)[2], const Prefill& p, const Tile& tile, int row, int t) {
    float* lse = p.lse + tile.batch * p.lse_batch + tile.head * p.lse_head + row;
    float old[2];
    bool joins = JOINS && p.joined;
    if (joins) {
#pragma unroll
      for (int r = 0; r < 2; ++r) old[r] = row + 8 * r < p.q_len ? lse[8 * r] * LOG2E : -INFINITE;
      __syncwarp();  // lanes that read a row's lse before one of them writes it
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = total[r], sink = joins ? old[r] : p.sinks ? p.sinks[tile.head] * LOG2E : -INFINITE;
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      float most = fmaxf(top[r], sink);
      float all = most == -INFINITE ? 0.0f : sum * exp2_fast(top[r] - most) + exp2_fast(sink - most);
      last[r] = sum > 0.0f ? exp2_fast(top[r] - most) / all * p.v_scale : 0.0f;
      before[r] = joins && all > 0.0f ? exp2_fast(sink - most) / all : 0.0f;
      if (t == 0 && row + 8 * r < p.q_len) lse[8 * r] = all > 0.0f ? (most + log2f(all)) * LN2 : -INFINITE;
    }
  }
};

// two values of the output, with the share that the result before has
INLINE void store(const Prefill& p, i64 at, float x, float y, float before) {
  if (JOINS && p.joined) {
    float2 old = *(const float2*)((const float*)p.out + at);
    x += before * old.x, y += before * old.y;
  }
  if (OUT_TYPE == 2) *(float2*)((float*)p.out + at) = make_float2(x, y);
  else *(u32*)((u16*)p.out + at) = OUT_TYPE == 1 ? bf16x2(x, y) : f16x2(x, y);
}
