// What Hopper's prefill kernels share: which tiles a block takes, masks in shared memory, caps, the running softmax.
// Each 64 rows of a tile hold 64 / PACK positions, head by head, so that heads share a mask's tile too.
#pragma once
#include "hopper.cuh"
#include "prefill.cuh"

constexpr bool BOUNDED = SOFTCAP == 2;  // scores are so small that exponents need no reference
constexpr int TURN = 64 / PACK;         // rows of a head in each 64

// f(tile) of each tile of a block. The host starts as many blocks as run at a time: loads of a tile run beside the end of
// the one before. Every other round goes backwards: tiles get shorter.
template <class F>
INLINE void each_tile(const Prefill& p, F f) {
  int all = p.pairs * (p.groups / PACK) * p.tiles, many = gridDim.x / BLOCKS, mine = blockIdx.x / BLOCKS;
  for (int first = 0; first < all; first += many, mine = many - 1 - mine)
    if (first + mine < all) {
      const Tile tile(p, first + mine);
      if (!tile.leaves_results(p)) f(tile);
    }
}

// The head and the first row, g, of a thread of 64 rows; the other is g + 8.
struct Place {
  int head, row;

  INLINE Place(const Tile& tile, int sixtyfour, int warp, int lane) {
    head = tile.head + warp * 16 / TURN;
    row = tile.row + sixtyfour * TURN + warp * 16 % TURN + lane / 4;
  }
};

// A mask's tile in shared memory, as stored: rows of PITCH bytes, part c (16 bytes) of row r at c ^ (r % 8). Heads that share
// a mask share its rows.
struct MaskTile {
  static constexpr int SIZE = MASK == 1 ? 1 : MASK == 2 ? 4 : 2, PITCH = KEYS * SIZE > 128 ? KEYS * SIZE : 128;
  static constexpr int COUNT = HEAD_MASK ? ROWS : POSITIONS, BYTES = COUNT * PITCH;

  INLINE static u32 place(int row, int byte) { return row * PITCH + ((byte >> 4 ^ row % 8) << 4) + byte % 16; }
};

// Its ring of MASK_STAGES: 64 threads arrive at a barrier ``full`` of a stage, a lane of each warp that reads at ``empty``.
using MaskRing = Ring<MASK ? MASK_STAGES : 1>;

// 64 threads copy tiles of the mask to shared memory: asynchronously, 16 bytes at a time or 4, where all strides are such.
struct MaskLoader {
  static constexpr int SIZE = MaskTile::SIZE, ROW = KEYS * SIZE;  // row: bytes
  static constexpr int RUN = HEAD_MASK ? TURN : POSITIONS;        // rows of one head that follow each other
  const Prefill& p;
  const char* from;
  i64 token, key;  // bytes
  int rows, thread;
  bool by16, by4;

  INLINE MaskLoader(const Prefill& p, const Tile& tile, int thread)
      : p(p), token(p.mask_token * SIZE), key(p.mask_key * SIZE), rows(p.q_len - tile.row), thread(thread) {
    from = p.mask + (tile.batch * p.mask_batch + tile.head * p.mask_head) * SIZE + tile.row * token;
    i64 bits = (i64)p.mask | (p.mask_batch | p.mask_head | p.mask_token) * SIZE;
    by16 = key == SIZE && bits % 16 == 0, by4 = key == SIZE && bits % 4 == 0;
  }
  // f(where a part of a row comes from, from there to that of the thread's next row, where to, row, rows, step of rows, byte in
  // the row, bytes up to the last key)
  template <int PART, class F>
  INLINE void each(u32 to, int block, F f) const {
    constexpr int PARTS = ROW / PART, STEP = PARTS < 64 ? 64 / PARTS : 1;
    for (int byte = thread % PARTS * PART; byte < ROW; byte += 64 * PART) {
      int row = PARTS < 64 ? thread / PARTS : 0, left = (p.kv_len - block * KEYS) * SIZE - byte;
      for (int span = 0; span < MaskTile::COUNT; span += RUN) {
        int first = HEAD_MASK ? span / 64 * TURN : 0;
        const char* at = from + (first + row) * token + (block * KEYS + byte / SIZE) * key;
        if (HEAD_MASK) at += span / TURN % PACK * p.mask_head * SIZE;
        f(at, STEP * token, to + span * MaskTile::PITCH, row, min(RUN, rows - first), STEP, byte, left);
      }
    }
  }
  template <int PART>
  INLINE void copy(u32 to, int block) const {
    each<PART>(to, block, [&](const char* at, i64 next, u32 to, int row, int end, int step, int byte, int left) {
      int bytes = min(max(left, 0), PART);
#pragma unroll 4
      for (; row < end; row += step, at += next) copy_async_first<PART>(to + MaskTile::place(row, byte), at, bytes);
    });
  }
  // 4 bytes of a row, of which the first are to be read
  template <bool DENSE>
  INLINE u32 word(const char* at, int bytes) const {
    if (DENSE) {
      int shift = (int)(i64)at & 3;
      const u32* words = (const u32*)(at - shift);
      u32 low = bytes > 0 ? words[0] : 0, high = bytes > 0 && shift + bytes > 4 ? words[1] : 0;
      return __funnelshift_r(low, high, 8 * shift);
    }
    u32 x = 0;
#pragma unroll
    for (int i = 0; i < 4; i += SIZE, at += key)
      if (i < bytes) x |= (SIZE == 1 ? *(const u8*)at : SIZE == 2 ? *(const u16*)at : *(const u32*)at) << 8 * i;
    return x;
  }
  template <bool DENSE>
  INLINE void copy_words(u32 to, int block) const {
    constexpr int MANY = 8;  // loads under way
    each<4>(to, block, [&](const char* at, i64 next, u32 to, int row, int end, int step, int byte, int left) {
      for (; row < end; row += MANY * step) {
        u32 x[MANY];
#pragma unroll
        for (int i = 0; i < MANY; ++i, at += next) x[i] = word<DENSE>(at, row + i * step < end ? min(left, 4) : 0);
#pragma unroll
        for (int i = 0; i < MANY; ++i)
          if (row + i * step < end) store_shared(to + MaskTile::place(row + i * step, byte), x[i]);
      }
    });
  }
  INLINE void load(u32 to, int block, u32 full) const {
    if (by16) copy<16>(to, block);
    else if (by4) copy<4>(to, block);
    else if (SIZE < 4 && key == SIZE) copy_words<true>(to, block);
    else copy_words<false>(to, block);
    if (by4) arrive_after_copies(full);
    else arrive(full);
  }
};

// All that are looked at. to: the first stage; full, empty: its barriers.
INLINE void load_mask(const Prefill& p, u32 to, u32 full, u32 empty) {
  MaskRing ring;
  each_tile(p, [&](const Tile& tile) {
    const MaskLoader loader(p, tile, threadIdx.x % 64);
    for (int block = tile.block; block >= 0; block = tile.seen(block - 1)) {
      if (!tile.masked(block)) continue;
      wait(empty + 8 * ring.stage, ring.parity ^ 1);
      loader.load(to + ring.stage * MaskTile::BYTES, block, full + 8 * ring.stage);
      ring.advance();
    }
  });
}

// What a thread reads of a mask's tile: for its two rows, two keys in WORDS registers.
struct Mask {
  static constexpr int WORDS = MASK == 2 ? 2 : 1;
  MaskRing ring;
  u32 at, full, empty;  // at: 16-bit values come by matrices: of a lane's row there; else of the thread's first row, g
  float factor;         // of values, to the unit of scores

  INLINE Mask(u32 to, u32 full, u32 empty, int sixtyfour, int warp, int lane) : full(full), empty(empty) {
    int first = HEAD_MASK ? sixtyfour * 64 + warp * 16 : sixtyfour * TURN + warp * 16 % TURN;
    if (MaskTile::SIZE == 2) at = to + MaskTile::place(first + lane % 16, lane / 16 * 16);
    else at = to + MaskTile::place(first + lane / 4, lane % 4 * 2 * MaskTile::SIZE);
  }
  INLINE void start(const Prefill& p, int head) { factor = (ALIBI ? p.slopes[head] : 1.0f) / (ANY_SCALE ? 1.0f : p.scale); }
  INLINE void look(float (&s)[SCORES]) {
    wait(full + 8 * ring.stage, ring.parity);
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) {
      u32 x[2][2][WORDS];
      read(ring.stage * MaskTile::BYTES, unit, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) apply(s[8 * unit + 2 * i], s[8 * unit + 2 * i + 1], x[i / 2][i % 2]);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(empty + 8 * ring.stage);
    ring.advance();
  }

 private:
  // keys 16 unit + 8 j + 2 t (+ 1) of rows g + 8 r: x[j][r]
  INLINE void read(u32 stage, int unit, u32 (&x)[2][2][WORDS]) const {
    if constexpr (MaskTile::SIZE == 2) {
      u32 y[4];
      load_matrices((at ^ unit << 5) + stage, y);
      x[0][0][0] = y[0], x[0][1][0] = y[1], x[1][0][0] = y[2], x[1][1][0] = y[3];
    } else {
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          u32 from = stage + r * 8 * MaskTile::PITCH;
          if (MASK == 1) x[j][r][0] = load_shared_u16((at ^ unit << 4) + from + 8 * j);
          else load_shared<WORDS>((at ^ (2 * unit + j) << 5) + from, x[j][r]);
        }
    }
  }
  // scores of two keys; a value of -65504 or less means "masked"
  INLINE void apply(float& a, float& b, const u32 (&x)[WORDS]) const {
    if constexpr (MASK == 1) {
      hide_zero(x[0] & 0xFF, a);
      hide_zero(x[0] & 0xFF00, b);
    } else if constexpr (MASK == 2) {
      float y[2] = {__uint_as_float(x[0]), __uint_as_float(x[WORDS - 1])};
      a = hide_least(y[0], __fmaf_rn(y[0], factor, a));
      b = hide_least(y[1], __fmaf_rn(y[1], factor, b));
    } else {
      u32 y = lowest_to_infinity<MASK == 4>(x[0]);
      a = __fmaf_rn(MASK == 4 ? f32_of_bf16(y) : f32_of_f16(y), factor, a);
      b = __fmaf_rn(MASK == 4 ? __uint_as_float(y & 0xFFFF0000u) : f32_of_f16(y >> 16), factor, b);
    }
  }
};

// c tanh(x / c) of scores. While those of a warp are within 0.7 c it is x times a polynomial of x^2 - (0.7 c)^2 (largest error
// 2e-6 c: the least there is), whose sign is the test; else it takes exponentials.
struct Cap {
  static constexpr int DEGREE = 3;
  static constexpr float TERMS[] = {0.863379568f, -0.233542314f, 0.0747803453f, -0.035721797f};
  float cap, square, limit, twice, terms[DEGREE + 1];

  INLINE Cap(const Prefill& p) {
    float inverse = (ANY_SCALE ? 1.0f : p.scale) / p.softcap, power = 1.0f;
    cap = 1.0f / inverse, twice = 2.0f * LOG2E * inverse;
    square = cap > 1e-4f && cap < 1e4f ? 0.49f * cap * cap : -1.0f;  // powers stay finite
    limit = square * 0.999f;  // another number, for there are no registers to keep the differences
#pragma unroll
    for (int i = 0; i <= DEGREE; ++i, power *= inverse * inverse) terms[i] = TERMS[i] * power;
  }
  INLINE void apply(float (&s)[SCORES]) const {
    u32 within[2] = {~0u, ~0u};
#pragma unroll
    for (int i = 0; i < SCORES; ++i) within[i / 2 % 2] &= __float_as_uint(__fmaf_rn(s[i], s[i], -limit));
    if (__all_sync(~0u, (int)(within[0] & within[1]) < 0)) {
#pragma unroll
      for (int i = 0; i < SCORES; ++i) {
        float w = __fmaf_rn(s[i], s[i], -square), y = terms[DEGREE];
#pragma unroll
        for (int n = DEGREE - 1; n >= 0; --n) y = __fmaf_rn(y, w, terms[n]);
        s[i] *= y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < SCORES; ++i) {  // tanh(x) = 1 - 2 / (exp(2 x) + 1)
        float x = s[i];
        s[i] = copysignf(__fmaf_rn(-2.0f * cap, inverse_fast(exp2_fast(fabsf(x * twice)) + 1.0f), cap), x);
      }
    }
  }
};

// of a thread's two rows, g and g + 8 of its warp's 16
struct Softmax : Sums {
  INLINE static float unit(const Prefill& p) { return (ANY_SCALE ? 1.0f : p.scale) * LOG2E; }  // log2 of e to a score

  // Scores of a block, of which unit(p) are a power of 2; maxima and factors. masked: is its mask to be looked at?
  INLINE void begin(float (&s)[SCORES], const Prefill& p, const Range& range, Mask& mask, bool masked) {
    if constexpr (ANY_SCALE) {
#pragma unroll
      for (int i = 0; i < SCORES; ++i) s[i] *= p.scale;
    }
    if constexpr (SOFTCAP) Cap(p).apply(s);
    if constexpr (MASK > 0)
      if (masked) mask.look(s);
    range.hide(s);
    if constexpr (BOUNDED) {
      top[0] = top[1] = base[0] = base[1] = 0.0f, factor[0] = factor[1] = 1.0f, grown = false;
      return;
    }
    float x[2] = {most(s, p, 0), most(s, p, 1)};
    grown = __any_sync(~0u, passed(0, x[0]) || passed(1, x[1]));
    if (grown) {
      most_of_quads(x);
      raise(0, x[0]);
      raise(1, x[1]);
    }
  }
  INLINE static float most(const float (&s)[SCORES], const Prefill& p, int r) {  // of a thread's keys of a row, log2
    float x = s[2 * r];
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j) x = fmaxf(x, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
    return MASK == 2 && x < LOWEST ? -INFINITE : x * unit(p);
  }

  // weights of 16 keys: two of a row in each of 4 registers
  INLINE void weights(const float (&s)[SCORES], int unit, float scale, u32 (&w)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float y = s[8 * unit + 2 * i + e];
        x[e] = exp2_fast(__fmaf_rn(y, scale, -base[i % 2]));
        total[i % 2] += x[e];
      }
      w[i] = V_BF16 ? bf16x2(x[0], x[1]) : f16x2(x[0], x[1]);
    }
  }
};
