// What the prefill kernels for any GPU from compute capability 8.0 on share: rows in shared memory, and their operands.
// Rows of COLUMNS 16-bit values lie side by side, COLUMNS a multiple of 16. 16-byte pieces trade places within a line of 128
// bytes, or of 64 or 32 where lines of 128 do not fill a row, so that eight rows of one column meet in no bank.
#pragma once
constexpr int PACK = 1;
constexpr bool SHIFTS = false, MAPPED = MASK > 0, BEHIND = false;
#include "prefill.cuh"

constexpr bool PLAIN = !SOFTCAP && MASK == 0 && !ANY_SCALE;

struct Operands {
  const char *q, *k, *v;
  i64 q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token;  // bytes
  int dk, dv;                                                                        // true columns
};

INLINE Rows rows_of(const Tile& tile, int row) { return {{tile.head, tile.head}, {row, row + 8}}; }

template <int COLUMNS>
INLINE int turn(int row) {
  return (COLUMNS % 64 == 0 ? row % 8 : COLUMNS % 32 == 0 ? row / 2 % 4 : row / 4 % 2) << 4;
}

// A lane's place in rows: `at` is the address of a column, in bytes from the lane's own.
template <int COLUMNS>
struct Place {
  static_assert(COLUMNS % 16 == 0, "columns");
  static constexpr int LINE = COLUMNS % 64 == 0 ? 128 : COLUMNS % 32 == 0 ? 64 : 32;
  u32 row, turned;

  INLINE Place(u32 base, int row, int piece = 0) : row(base + row * 2 * COLUMNS), turned(turn<COLUMNS>(row) ^ piece << 4) {}
  INLINE u32 at(int bytes) const { return row + (bytes & ~(LINE - 1)) + ((bytes & (LINE - 1)) ^ turned); }
};

// Matrices of a product from a lane's place: a [16 x 16], rows of memory are rows; b [16 x 16], rows of memory are columns of b,
// or, loaded transposed, rows of b. `piece`: of a lane.
INLINE int a_row(int lane) { return lane % 16; }
INLINE int a_piece(int lane) { return lane / 16; }
INLINE int b_row(int lane) { return lane / 16 * 8 + lane % 8; }
INLINE int b_piece(int lane) { return lane / 8 % 2; }

// Copies rows [first, first + MANY) of `count`, `step` bytes apart, and `columns` of their values; zeros around. Threads side by
// side copy SIDE lines side by side; a thread's place in a row is the same in all of its rows.
template <int MANY, int COLUMNS, int THREADS>
INLINE void load_rows(u32 to, const char* from, i64 step, int first, int count, int columns) {
  constexpr int LINE = Place<COLUMNS>::LINE, LINES = COLUMNS * 2 / LINE, SIDE = LINE == 128 ? LINES & -LINES : 1;
  constexpr int PIECES = SIDE * LINE / 16, ROUND = THREADS / PIECES;
  static_assert(ROUND % 8 == 0 || (LINE == 128 && (ROUND & (ROUND - 1)) == 0), "rows of a thread are turned in a known way");
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));  // addresses are made anew: there are no registers to keep them
  int row = thread / PIECES, piece = thread % PIECES;
  u32 line = to + row * 2 * COLUMNS + (piece / (LINE / 16)) * LINE, turned = turn<COLUMNS>(row) ^ piece % (LINE / 16) << 4;
  bool last = (LINES - SIDE) * LINE / 2 + 8 * piece < columns;
  from += (first + row) * step + 16 * piece;
#pragma unroll
  for (int n = 0; n < MANY; n += ROUND, from += ROUND * step) {
    if (MANY % ROUND && row + n >= MANY) break;
    bool here = first + row + n < count;
    u32 place = line + n * 2 * COLUMNS + (ROUND % 8 ? turned ^ n % 8 << 4 : turned);
#pragma unroll
    for (int c = 0; c < LINES; c += SIDE)
      copy_async<16>(place + c * LINE, from + c * LINE, here && (c < LINES - SIDE || last));
  }
}

// A thread's part of the mask of a block, as stored: two keys of a row in WORDS registers.
struct RegisterMask {
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

struct Softmax : Sums {
  // scores of a block -> what the exponential takes
  INLINE void adjust(float (&s)[SCORES], const Prefill& p, const Range& range, RegisterMask& mask, float slope) {
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

  // weights of 16 keys: two of a row in each of 4 registers
  INLINE void weights(const float (&s)[SCORES], int unit, float scale, u32 (&w)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float y = s[8 * unit + 2 * i + e];
        x[e] = exp2_fast(PLAIN ? __fmaf_rn(y, scale, -top[i % 2]) : y - top[i % 2]);
      }
      w[i] = add(i % 2, x[0], x[1]);
    }
  }
};

// Asks for the mask of a block, so that it is near when the scores are there.
template <int THREADS>
INLINE void prefetch_mask(const Prefill& p, const Tile& tile, int block) {
  int thread = threadIdx.x, row = min(tile.row + thread % ROWS, p.q_len - 1), key = block * KEYS;
  if (block < 0 || p.mask_key != 1 || (tile.map && tile.map[block] == 1)) return;
  const char* at = p.mask + (tile.batch * p.mask_batch + tile.head * p.mask_head + row * p.mask_token + key) * RegisterMask::SIZE;
#pragma unroll
  for (int i = 0; i < KEYS * RegisterMask::SIZE; i += 128 * (THREADS / ROWS)) {
    int byte = i + thread / ROWS * 128;
    if (byte < min(KEYS, p.kv_len - key) * RegisterMask::SIZE) prefetch(at + byte);
  }
}

// four accumulators of a product
INLINE float (&quad(float* x))[4] { return *(float(*)[4])x; }
