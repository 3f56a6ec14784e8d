// What the prefill kernels share: arguments, the order of tiles, which keys a row sees, the running softmax.
// They define ROWS (of a tile), SPAN (keys of a block that one warp scores), ROUNDED (normalise by the sum of the weights that
// values are multiplied by: a weight that stands alone need not be 1, and rounding it would count), SHIFTS (the blocks of a tile
// begin with the first key that it sees, not with a multiple of KEYS), MAPPED (a mask may have a map), BEHIND (RAGGED: queries of
// sequences lie behind each other) and PACK (1, 2 or 4 heads of one KV head): a tile holds the queries of POSITIONS positions in
// each of PACK heads.
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
  const int *bounds, *key_bounds;  // BEHIND: [B + 1], tokens of each sequence in q; in k and v, or null where they have a batch
  i64 tokens;                      // BEHIND: of q
  const int* pages;    // K_PAGED, V_PAGED: [B, pages_batch], the page of each so many slots, or null
  i64 pages_batch;
  int slot, last_page;  // slot of key 0, a multiple of 128; no table has more pages
  int length, oldest, keep, origin, relative;  // RAGGED: live are positions from oldest on, the last keep; see own_keys
  int kv_heads, groups, q_len, kv_len, tiles;  // groups: query heads per KV head; tiles: of a head
  int section, pairs;                         // KV heads at a time, for L2: some 24 MB; all (batch, KV head)
  int causal, window, first;                  // window 0: none; first: position of query 0 among the keys
  int joined;                                 // results over other keys are in out (f32) and lse: these are added
  int dv;                                     // true columns
  float scale, softcap, v_scale;              // v_scale: of the output
};

#define INFINITE __int_as_float(0x7F800000)
#define NO_NUMBER __int_as_float(0x7FFFFFFF)  // its halves are no numbers either
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float SLACK = 8.0f;  // log2 by which scores may pass the reference before the output is rescaled
constexpr float NOTHING = -3e38f;  // reference of a row that has seen no key: less than any, and -inf - NOTHING is -inf
constexpr bool BF16 = Q_TYPE == 1, V_BF16 = V_TYPE == 1;

constexpr int SCORES = SPAN / 2, UNITS = SPAN / 16;  // scores: of a thread for 16 rows; a unit: 16 keys
constexpr int POSITIONS = ROWS / PACK;

constexpr bool JOINS = OUT_TYPE == 2;

// a / b of numbers that are not negative: an estimate, which is mostly right, and half of the time of a division
INLINE int quotient(int a, int b) {
  if (a < b) return 0;
  int q = (int)((float)a * inverse_fast((float)b)), rest = a - q * b;
  while (rest < 0) --q, rest += b;
  while (rest >= b) ++q, rest -= b;
  return q;
}

struct Tile {
  int batch, head, kv_head, row, block;  // head, row: first of the tile; block: last that is seen, or -1
  int stop, shift;                       // the first block, key 0 of block 0
  int own_first, own_begin, own_end;     // RAGGED
  int begin_row, q_shift, k_shift;       // BEHIND: the first row that there is; from rows and keys to tokens
  bool fits;                             // BEHIND: in q_len rows and kv_len keys; else results are NaN
  const u8* map;
  i64 map_head;

  Tile() = default;
  INLINE Tile(const Prefill& p, int index) {
    int packs = p.groups / PACK, per_section = p.section * p.tiles * packs;  // packs: of a KV head
    int section = quotient(index, per_section), rest = index - section * per_section;
    int heads = min(p.section, p.pairs - section * p.section) * packs;
    int order = quotient(rest, heads), inner = rest - order * heads;
    int own = packs == 1 ? inner : quotient(inner, packs), pair = section * p.section + own;
    batch = quotient(pair, p.kv_heads), kv_head = pair - batch * p.kv_heads;
    head = kv_head * p.groups + (inner - own * packs) * PACK;
    int tile = p.tiles - 1 - order;  // the longest rows of a causal problem first
    row = tile * POSITIONS;
    if (RAGGED && !(BEHIND && p.key_bounds)) own_keys(p);
    if (BEHIND) own_tokens(p);
    int last = end(p) - 1, low = begin();
    if (p.causal || p.window) last = min(last, min(row + POSITIONS, p.q_len) - 1 + first(p));
    if (p.window) low = max(low, row + first(p) - p.window + 1);
    stop = SHIFTS ? 0 : low / KEYS, shift = SHIFTS ? low : 0;
    map = MAPPED && p.map ? p.map + batch * p.map_batch + head * p.map_head + tile * p.map_row : nullptr;
    map_head = p.map_head;
    block = seen(last < low || row + POSITIONS <= begin_of_rows() ? -1 : (last - shift) / KEYS);
  }
  // Sequences end in the same row, whatever their length.
  INLINE void own_tokens(const Prefill& p) {
    int end = p.bounds[batch + 1], rows = end - p.bounds[batch];
    begin_row = p.q_len - rows, q_shift = end - p.q_len, k_shift = 0;
    fits = rows >= 0 && rows <= p.q_len;
    if (!p.key_bounds) return;
    int keys = p.key_bounds[batch + 1] - p.key_bounds[batch];
    fits = fits && keys >= 0 && keys <= p.kv_len;
    k_shift = p.key_bounds[batch], own_begin = 0, own_end = max(0, min(keys, p.kv_len)), own_first = own_end - p.q_len;
  }
  INLINE int begin_of_rows() const { return BEHIND ? begin_row : 0; }
  INLINE bool has(const Prefill& p, int row) const {
    if (BEHIND && (row < begin_row || (u64)(i64)token(row) >= (u64)p.tokens)) return false;  // whatever bounds say
    return row < p.q_len;
  }
  INLINE int token(int row) const { return BEHIND ? row + q_shift : row; }  // of q and of results
  INLINE int batch_of_rows() const { return BEHIND ? 0 : batch; }
  // Key 0 has position origin. In a sequence that is shorter than length by `missing`, queries lie that much earlier, and so do
  // keys that are relative to the end: what a window sees is then in the same keys for all sequences.
  INLINE void own_keys(const Prefill& p) {
    int tokens = p.lengths ? (int)p.lengths[batch * p.lengths_batch] : p.length, missing = p.length - tokens;
    int origin = p.relative ? p.origin - missing : p.origin, start = max(p.oldest, tokens - p.keep);
    if (p.starts) start = max(start, (int)p.starts[batch]);
    own_first = p.relative ? p.first : p.first - missing;
    own_begin = max(0, start - origin), own_end = min(p.kv_len, tokens - origin);
  }
  INLINE int key(int block) const { return block * KEYS + shift; }
  INLINE int first(const Prefill& p) const { return RAGGED ? own_first : p.first; }  // position of query 0 among the keys
  INLINE int begin() const { return RAGGED ? own_begin : 0; }                        // keys of the sequence: from here
  INLINE int end(const Prefill& p) const { return RAGGED ? own_end : p.kv_len; }     // to before here
  INLINE bool leaves_results(const Prefill& p) const { return JOINS && p.joined && block < 0; }
  INLINE int seen(int at) const {  // the next block, downwards, that is not skipped
    if (MAPPED && map)
      while (at >= stop && state(at) == 0) --at;
    return at >= stop ? at : -1;
  }
  INLINE bool masked(int at) const { return MASK && !(MAPPED && map && state(at) == 1); }  // must one look at the mask of a block?

 private:
  INLINE int state(int at) const {  // of all heads
    int found = map[at];
    if (PACK > 1 && map_head)
      for (int i = 1; i < PACK; ++i) found = map[i * map_head + at] == found ? found : 2;
    return found;
  }
};

constexpr int common(int a, int b) { return b ? common(b, a % b) : a; }

// TOKENS keys from key on in boxes: load(keys before a box, its token, its batch: with PAGED slots to a page, that page).
template <int TOKENS, int PAGED, class F>
INLINE void each_box(const Prefill& p, const Tile& tile, int key, F load) {
  if constexpr (PAGED == 0) {
    if (BEHIND && p.key_bounds) load(0, key + tile.k_shift, 0);
    else load(0, key, tile.batch);
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

// A thread's two rows, g and g + 8 of its warp's 16: the heads and queries there.
struct Rows {
  int head[2], row[2];
};

// Which keys they see: those from low to high, relative to the thread's first of a block.
struct Range {
  int low[2], high[2];

  INLINE Range(const Prefill& p, const Tile& tile, int block, const Rows& rows, int t) {
    int key = tile.key(block) + 2 * t, end = tile.end(p) - 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int position = rows.row[r] + tile.first(p);
      high[r] = (p.causal || p.window ? min(end, position) : end) - key;
      low[r] = p.window ? position - p.window + 1 - key : tile.begin() - key;
      if (RAGGED) low[r] = max(low[r], tile.begin() - key);
    }
  }
  INLINE void hide(float (&s)[SCORES]) const {  // mostly one side
    if (__any_sync(~0u, min(high[0], high[1]) < SPAN - 1)) {
#pragma unroll
      for (int i = 0; i < SCORES; ++i) s[i] = i / 4 * 8 + i % 2 <= high[i / 2 % 2] ? s[i] : -INFINITE;
    }
    if (__any_sync(~0u, max(low[0], low[1]) > 0)) {
#pragma unroll
      for (int i = 0; i < SCORES; ++i) s[i] = i / 4 * 8 + i % 2 >= low[i / 2 % 2] ? s[i] : -INFINITE;
    }
  }
  INLINE bool whole() const { return min(high[0], high[1]) >= SPAN - 1 && max(low[0], low[1]) <= 0; }
  INLINE bool sees(int r, int k) const { return k <= high[r] && k >= low[r]; }
};

// maxima over the four threads that share a row
template <int N>
INLINE void most_of_quads(float (&x)[N]) {
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2)
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = fmaxf(x[i], __shfl_xor_sync(~0u, x[i], lanes));
}

// Sums of a thread's two rows.
struct Sums {
  float top[2] = {NOTHING, NOTHING}, total[2] = {0.0f, 0.0f};  // top: reference of the exponents, log2
  float rounded[2] = {0.0f, 0.0f};                             // ROUNDED: total of the weights in their 16 bits
  float factor[2];                                             // of the block at hand
  bool grown;                                                  // any row of the warp

  INLINE bool passed(int r, float most, float slack = SLACK) const { return most > top[r] + slack; }
  INLINE void raise(int r, float most, float slack = SLACK) {  // the reference of a row, if its maximum passes it by that
    factor[r] = 1.0f;
    if (passed(r, most, slack)) {
      factor[r] = exp2_fast(top[r] - most);
      top[r] = most;
      total[r] *= factor[r];
      if (ROUNDED) rounded[r] *= factor[r];
    }
  }

  // adds two weights, of which these are the 16 bits that values are multiplied by
  INLINE u32 add(int r, float x, float y) {
    total[r] += x;
    total[r] += y;
    u32 w = V_BF16 ? bf16x2(x, y) : f16x2(x, y);
    if (ROUNDED) {
      rounded[r] += V_BF16 ? f32_of_bf16(w) : f32_of_f16(w);
      rounded[r] += V_BF16 ? __uint_as_float(w & 0xFFFF0000u) : f32_of_f16(w >> 16);
    }
    return w;
  }

  // after the last block: what the output is multiplied by, and the result that it joins; lse. A result over other keys is
  // a sink that has a value. Without branches, for nothing else may be left to do meanwhile.
  INLINE void finish(float (&last)[2], float (&before)[2], const Prefill& p, const Tile& tile, const Rows& rows, int t) {
    float *lse[2], old[2];
#pragma unroll
    for (int r = 0; r < 2; ++r)
      lse[r] = p.lse + tile.batch_of_rows() * p.lse_batch + rows.head[r] * p.lse_head + tile.token(rows.row[r]);
    bool joins = JOINS && p.joined;
    if (joins) {
#pragma unroll
      for (int r = 0; r < 2; ++r) old[r] = tile.has(p, rows.row[r]) ? *lse[r] * LOG2E : -INFINITE;
      __syncwarp();  // lanes that read a row's lse before one of them writes it
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = total[r], own = rounded[r], sink = joins ? old[r] : p.sinks ? p.sinks[rows.head[r]] * LOG2E : -INFINITE;
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        sum += __shfl_xor_sync(~0u, sum, lanes);
        if (ROUNDED) own += __shfl_xor_sync(~0u, own, lanes);
      }
      float reached = sum > 0.0f ? top[r] : -INFINITE, most = fmaxf(reached, sink);
      most = most == -INFINITE ? 0.0f : most;
      float here = exp2_fast(reached - most), there = exp2_fast(sink - most), all = __fmaf_rn(sum, here, there);
      float inverse = inverse_fast(ROUNDED ? __fmaf_rn(own, here, there) : all);
      last[r] = sum > 0.0f ? here * inverse * p.v_scale : 0.0f;
      before[r] = joins && all > 0.0f ? there * inverse : 0.0f;
      float result = all > 0.0f ? (most + log2_fast(all)) * LN2 : -INFINITE;
      if (BEHIND && !tile.fits) last[r] = result = NO_NUMBER;
      if (t == 0 && tile.has(p, rows.row[r])) *lse[r] = result;
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
