// Rows as they are stored -> operands of the tensor cores. One description of a row serves K and V.
//
// A row is NREG blocks of WORDS words; unit j is word j of each block and holds PLANES values: j, j + WORDS, ...
// (packing.py: with fields of different widths, the narrowest sets WORDS). Two units side by side in 32-bit registers
// expand to PLANES pairs of 16-bit floats. For K the two are words of one token, so a pair is two dims; for V they are
// the same word of two tokens, so a pair is two tokens. Rows of integer levels (BYTES) become bytes instead, four
// planes of a unit in a register: see `bytes_of`.
#pragma once
#include "ptx.cuh"

enum Kind { F16 = 0, BF16 = 1, F32 = 2, FP8 = 3, LINEAR = 4, BYTES = 5, TABLE = 6 };

#ifndef LUT_PAIRS  // does a lookup yield two values? Tables of 5 bits, or of 6 with a sign, and not two different ones
#define LUT_PAIRS 0
#endif

#ifndef TEAM  // warps that share the words of each row
#define TEAM 1
#endif

constexpr int lowest_bit(int x) { return x & -x; }
constexpr int up(int x, int to) { return (x + to - 1) / to * to; }

// KIND: how codes become values. BITS: per value. DIM: values per row. SPAN: values per scale, 0 without scales.
template <int KIND_, int BITS_, int DIM_, int SPAN_>
struct Row {
  static constexpr int KIND = KIND_, BITS = BITS_, DIM = DIM_;
  static constexpr bool SCALED = SPAN_ > 0;
  static constexpr int SPAN = SCALED ? SPAN_ : DIM, GROUPS = DIM / SPAN;
  static constexpr bool IS_BF16 = KIND == BF16 || KIND == F32;  // of the operands
  static constexpr bool SPLIT = KIND == F32;                    // a value is the sum of two bfloat16: two planes of one dim
  static constexpr int FIELD = KIND <= BF16 ? 16 : KIND == F32 ? 8 : lowest_bit(BITS);
  static constexpr int WORD = KIND == F32 ? 4 : 2;              // bytes
  static constexpr int WORDS = KIND <= F32 ? DIM : DIM * FIELD / 16;
  static constexpr int PLANES = 16 / FIELD, NREG = KIND <= BF16 ? 1 : KIND == F32 ? 2 : BITS / FIELD;
  static constexpr int BYTES_ROW = KIND <= F32 ? DIM * WORD : DIM * BITS / 8;
  static constexpr int MINE = WORDS / TEAM, MINE_BYTES = BYTES_ROW / TEAM;  // words of a block, and bytes of a row, that a warp has
  static constexpr int NIBBLES = KIND == BYTES ? PLANES / 4 : 1;     // registers of nibbles per pair of units
  static constexpr int PASSES = BITS == 4 ? 2 : 1;                   // lookups of bytes per nibble: both signs
  static constexpr bool SIGNED = KIND == TABLE && BITS == 6 && LUT_PAIRS;  // the table holds magnitudes
  static constexpr int LEVELS = KIND == TABLE ? 1 << (BITS - SIGNED) : 1;   // of the table
  static constexpr int LUT_BYTES = KIND != TABLE ? 0 : LUT_PAIRS ? 128 * LEVELS * LEVELS : 256 * LEVELS;  // one copy of the table per bank
  static constexpr float FACTOR = KIND == BYTES && BITS == 4 ? 16777216.0f : 1.0f;  // values over what `expand` makes: denormals

  // first dim of plane k when the unit is j
  static constexpr INLINE int dim(int j, int k) { return SPLIT ? j : j + k * WORDS; }
};

// Widest vector of 1, 2 or 4 units per lane that LANES lanes read side by side without a remainder.
constexpr int vector_of(int units, int lanes) { return units % (4 * lanes) == 0 ? 4 : units % (2 * lanes) == 0 ? 2 : 1; }

// Rows of four words or fewer leave half of the lanes without one: these take the planes of the upper byte of a word,
// the others those of the lower. Parts of the lanes; not for bytes.
template <class R>
constexpr int fold_of() {
  return R::WORDS <= 4 && R::PLANES >= 4 && !R::SPLIT ? 2 : 1;
}

// How 4 / FOLD lanes share the units of a row, pairs of words: chunks of VEC units each; operands in pairs.
template <class R, int FOLD>
struct Share {
  static constexpr int LANES = 4 / FOLD, WIDTH = 2, PLANES = R::PLANES / FOLD;  // planes: of a lane
  static constexpr int UNITS = R::MINE / WIDTH;
  static constexpr int VEC = vector_of(UNITS, LANES);
  static constexpr int SIZE = LANES * VEC * WIDTH;  // words
  static constexpr int CHUNKS = (R::MINE + SIZE - 1) / SIZE;
  static constexpr bool WHOLE = R::MINE % SIZE == 0;
  // are planes k and k + 1 of every chunk of one scale?
  static constexpr bool planes_agree() {
    for (int i = 0; i < (R::PLANES == 1 || R::SPLIT ? 0 : CHUNKS); ++i)
      for (int k = 0; k < R::PLANES; k += 2) {
        int last = (i + 1) * SIZE < R::MINE ? (i + 1) * SIZE - 1 : R::MINE - 1;
        if (R::dim(i * SIZE, k) / R::SPAN != R::dim(last, k + 1) / R::SPAN) return false;
      }
    return R::PLANES > 1 && (!R::SPLIT || VEC == 1);
  }
  // a pair is two planes of a unit, or one plane of two units of the vector, or a plane alone
  static constexpr bool BY_PLANE = R::PLANES > 1 && (VEC == 1 || planes_agree());
  static constexpr bool BY_UNIT = !BY_PLANE && VEC > 1;
  static constexpr int UNITS_TOGETHER = BY_UNIT ? 2 : 1;
  static constexpr int PAIRS_PER_STEP = BY_PLANE ? PLANES / 2 : PLANES;  // of one or two units
  static constexpr int STEPS = VEC / UNITS_TOGETHER;                     // of a chunk
  static constexpr int PAIRS = CHUNKS * STEPS * PAIRS_PER_STEP;

  static constexpr INLINE int pair(int chunk, int step, int p) { return (chunk * STEPS + step) * PAIRS_PER_STEP + p; }
  static constexpr INLINE int plane(int p, int which) { return BY_PLANE ? 2 * p + which : p; }
  static constexpr INLINE int unit(int step, int which) { return BY_UNIT ? 2 * step + which : step; }
  // scales that the operands of a pair meet: first and last
  static constexpr INLINE int low(int chunk, int p) { return R::dim(chunk * SIZE, plane(p, 0)) / R::SPAN; }
  static constexpr INLINE int high(int chunk, int p) {
    int last = (chunk + 1) * SIZE < R::MINE ? (chunk + 1) * SIZE - 1 : R::MINE - 1;
    return R::dim(last, plane(p, BY_PLANE ? 1 : 0) + (FOLD - 1) * PLANES) / R::SPAN;
  }
  static constexpr int most_scales() {
    int most = 1;
    for (int i = 0; i < CHUNKS; ++i)
      for (int p = 0; p < PAIRS_PER_STEP; ++p)
        if (high(i, p) - low(i, p) + 1 > most) most = high(i, p) - low(i, p) + 1;
    return most;
  }
  static constexpr int MOST = most_scales();
};

// Levels of BYTES rows by code: signed (bits 2, 3), or magnitudes 1 .. 126 by the low three bits (bits 4).
struct Table {
  u32 low, high;
};

// Tables that `bytes_of` looks up. A byte permute whose selector has its top bit set repeats the sign of the byte that
// it selects: with magnitudes plus one in one table and their negatives in the other, a code of the wrong sign yields
// 0 from the first and -1 from the second, so that the sum of both lookups is the level.
template <class R>
struct ByteTables {
  Table first, second;
  INLINE explicit ByteTables(Table t) : first(t), second(t) {
    if (R::BITS == 4) {
      first.low = t.low + 0x01010101, first.high = t.high + 0x01010101;
      second.low = (0x80808080u - t.low) ^ 0x80808080u, second.high = (0x80808080u - t.high) ^ 0x80808080u;
    }
  }
};

// nibbles[n]: codes of planes n, n + NIBBLES, ..; two units side by side
template <class R>
INLINE void nibbles_of(const u32* z, u32* nibbles) {
  if constexpr (R::BITS == 4) {
    nibbles[0] = z[0];
  } else if constexpr (R::BITS == 2) {
    nibbles[0] = z[0] & 0x33333333;
    nibbles[1] = (z[0] >> 2) & 0x33333333;
  } else {  // plane m + 2 p: 2-bit plane p of block m, bit m + 2 p of the last block
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      u32 top = m ? z[2] << 1 : z[2] << 2;
      nibbles[m] = (z[m] & 0x33333333) | (top & 0x44444444);
      nibbles[2 + m] = ((z[m] >> 2) & 0x33333333) | ((z[2] >> m) & 0x44444444);
    }
  }
}

// nibbles of x in the low places of bytes, of y in the high ones: the even ones of both, and the odd ones
INLINE void pair_nibbles(u32 x, u32 y, u32& even, u32& odd) {
  even = select(0x0F0F0F0F, x, y << 4), odd = select(0x0F0F0F0F, x >> 4, y);
}

// Words of tokens a, b in x and of c, d in y, each a half -> the nibbles of four tokens, in the order a, c, b, d, side by
// side: nibbles 0 and 2 in the halves of `even`, 1 and 3 in those of `odd`
INLINE void four_tokens(u32 x, u32 y, u32& even, u32& odd) {
  pair_nibbles(x, y, even, odd);
  even = prmt(even, 0, 0x3120), odd = prmt(odd, 0, 0x3120);
}

// What a pass looks up: codes, or codes of the other sign.
INLINE u32 of_pass(int pass, u32 nibbles) { return pass ? nibbles ^ 0x88888888 : nibbles; }

// four codes (the low half of nibbles, from `of_pass`) -> four signed bytes
template <class R>
INLINE u32 bytes_of(const ByteTables<R>& tables, int pass, u32 nibbles) {
  const Table& table = pass ? tables.second : tables.first;
  return prmt(table.low, table.high, nibbles);
}

// the upper four codes: of 2 or 3 bits, they are finite as half precision; others are multiplied by one
template <class R>
INLINE u32 upper(u32 nibbles) {
  return R::BITS == 4 ? dot_low(nibbles, 0x0100, 0) : upper_f16(nibbles);
}

// entry of a lookup table in shared memory: entries are 256 bytes apart, or 128 where they are pairs; one copy per lane
INLINE u32 look_up(const char* lut, u32 place) { return *(const u32*)(lut + place); }

// four codes, one per byte: planes a (bytes 0, 2) and b (bytes 1, 3), of pairs bytes 0, 1 and 2, 3. lane4: 4 * lane
template <class R>
INLINE void from_table(u32 codes, const char* lut, u32 lane4, u32& a, u32& b) {
  if constexpr (LUT_PAIRS) {
    constexpr u32 WORTH = 128 | 128 * R::LEVELS << 16;
    a = look_up(lut, dot_low(WORTH, codes, lane4));
    b = look_up(lut, dot_high(WORTH, codes, lane4));
  } else {
    u32 a0 = look_up(lut, prmt(codes, lane4, 0x7604)), b0 = look_up(lut, prmt(codes, lane4, 0x7614));
    u32 a1 = look_up(lut, prmt(codes, lane4, 0x7624)), b1 = look_up(lut, prmt(codes, lane4, 0x7634));
    a = side_by_side(a0, a1);
    b = side_by_side(b0, b1);
  }
}

template <class R>
INLINE void from_nibbles(u32 nibbles, const char* lut, u32 lane4, u32& a, u32& b, u32& c, u32& d) {
  from_table<R>(nibbles & 0x0F0F0F0F, lut, lane4, a, c);
  from_table<R>((nibbles >> 4) & 0x0F0F0F0F, lut, lane4, b, d);
}

// a pair with the signs that stand `up` bits below the tops of the halves of x
INLINE u32 signed_pair(u32 pair, u32 x, int up) { return pair ^ (x << up & 0x80008000); }

// z[NREG]: two units side by side, or with pairs bytes 0, 2, 1, 3 of them; h[PLANES]: their values. last: the last block's
// unit, as it is
template <class R>
INLINE void from_tables(const u32* z, u32 last, u32* h, const char* lut, u32 lane4) {
  if constexpr (R::BITS == 2) {
    from_nibbles<R>(z[0] & 0x33333333, lut, lane4, h[0], h[2], h[4], h[6]);
    from_nibbles<R>((z[0] >> 2) & 0x33333333, lut, lane4, h[1], h[3], h[5], h[7]);
  } else if constexpr (R::BITS == 3) {
    u32 nibbles[4];
    nibbles_of<R>(z, nibbles);
#pragma unroll
    for (int n = 0; n < 4; ++n) from_nibbles<R>(nibbles[n], lut, lane4, h[n], h[4 + n], h[8 + n], h[12 + n]);
  } else if constexpr (R::BITS == 4) {
    from_nibbles<R>(z[0], lut, lane4, h[0], h[1], h[2], h[3]);
  } else if constexpr (R::BITS == 5) {  // plane m + 4 p: nibble p of block m, bit m + 4 p of the last block
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      u32 top = z[4] >> m;
      from_table<R>((z[m] & 0x0F0F0F0F) | ((top << 4) & 0x10101010), lut, lane4, h[m], h[8 + m]);
      from_table<R>(((z[m] >> 4) & 0x0F0F0F0F) | (top & 0x10101010), lut, lane4, h[4 + m], h[12 + m]);
    }
  } else if constexpr (R::BITS == 6) {  // plane m + 2 p: nibble p of block m, bits 2 m + 4 p of the last block
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      constexpr u32 TOP = R::SIGNED ? 0x10101010 : 0x30303030;
      u32 top = z[2] >> (2 * m);
      from_table<R>((z[m] & 0x0F0F0F0F) | ((top << 4) & TOP), lut, lane4, h[m], h[4 + m]);
      from_table<R>(((z[m] >> 4) & 0x0F0F0F0F) | (top & TOP), lut, lane4, h[2 + m], h[6 + m]);
      if (R::SIGNED)
#pragma unroll
        for (int p = 0; p < 4; ++p) h[m + 2 * p] = signed_pair(h[m + 2 * p], last, 14 - 4 * p - 2 * m);
    }
  } else {
    from_table<R>(z[0], lut, lane4, h[0], h[1]);
  }
}

// z[NREG]: two units side by side; h[PLANES]: their values, first unit in the low halves
template <class R>
INLINE void expand(const u32* z, u32* h, Table table, const char* lut, u32 lane4) {
  if constexpr (R::KIND <= BF16) {
    h[0] = z[0];
  } else if constexpr (R::KIND == F32) {
    h[0] = z[0];
    h[1] = z[1];
  } else if constexpr (R::KIND == FP8) {
    u32 x = prmt(z[0], 0, 0x3120);
    h[0] = f16x2_of_e4m3(x);
    h[1] = f16x2_of_e4m3(x >> 16);
  } else if constexpr (R::KIND == LINEAR && R::BITS == 8) {  // 1024 + code as bits, less 1152
    h[0] = add_f16x2(prmt(z[0], 0x64646464, 0x4240), 0xE480E480);
    h[1] = add_f16x2(prmt(z[0], 0x64646464, 0x4341), 0xE480E480);
  } else if constexpr (R::KIND == LINEAR) {  // 1024 + code less 1032, or 1024 + 16 code
    u32 x = z[0] >> 8;
    h[0] = add_f16x2((z[0] & 0x000F000F) | 0x64006400, 0xE408E408);
    h[1] = fma_f16x2((z[0] & 0x00F000F0) | 0x64006400, 0x2C002C00, 0xD480D480);
    h[2] = add_f16x2((x & 0x000F000F) | 0x64006400, 0xE408E408);
    h[3] = fma_f16x2((x & 0x00F000F0) | 0x64006400, 0x2C002C00, 0xD480D480);
  } else if constexpr (R::BITS == 4 && R::KIND == BYTES) {  // magnitudes as denormals, signs as their high bytes
    u32 m = prmt(z[0], 0, 0x3120) & 0x77777777, odd = z[0] & 0x80808080, even = (z[0] << 4) & 0x80808080;
    u32 x = prmt(table.low, table.high, m), y = prmt(table.low, table.high, upper_f16(m));
    h[0] = prmt(x, even, 0x6240);
    h[1] = prmt(x, odd, 0x6341);
    h[2] = prmt(y, even, 0x7250);
    h[3] = prmt(y, odd, 0x7351);
  } else if constexpr (R::KIND == BYTES) {  // 1024 + 128 + level as bits, less 1152
    u32 both[R::NREG], nibbles[R::NIBBLES], low = table.low ^ 0x80808080, high = table.high ^ 0x80808080;
#pragma unroll
    for (int r = 0; r < R::NREG; ++r) both[r] = prmt(z[r], 0, 0x3120);
    nibbles_of<R>(both, nibbles);
#pragma unroll
    for (int n = 0; n < R::NIBBLES; ++n) {
      u32 x = prmt(low, high, nibbles[n]), y = prmt(low, high, upper<R>(nibbles[n]));
      h[n] = add_f16x2(prmt(x, 0x64646464, 0x4240), 0xE480E480);
      h[n + R::NIBBLES] = add_f16x2(prmt(x, 0x64646464, 0x4341), 0xE480E480);
      h[n + 2 * R::NIBBLES] = add_f16x2(prmt(y, 0x64646464, 0x4240), 0xE480E480);
      h[n + 3 * R::NIBBLES] = add_f16x2(prmt(y, 0x64646464, 0x4341), 0xE480E480);
    }
  } else {
    u32 x[R::NREG];
#pragma unroll
    for (int r = 0; r < R::NREG; ++r) x[r] = LUT_PAIRS ? prmt(z[r], 0, 0x3120) : z[r];
    from_tables<R>(x, z[R::NREG - 1], h, lut, lane4);
  }
}

// VEC pairs of words of one row, from word j on: z[NREG][VEC]
template <class R, int VEC>
INLINE void load_pairs(u32 row, int j, u32 (&z)[R::NREG][VEC]) {
  if constexpr (R::SPLIT) {
    u32 x[2 * VEC];
#pragma unroll
    for (int i = 0; i < 2 * VEC; i += 2) load_shared<2>(row + (j + i) * 4, x + i);
#pragma unroll
    for (int i = 0; i < VEC; ++i) split_bf16(__uint_as_float(x[2 * i]), __uint_as_float(x[2 * i + 1]), z[0][i], z[1][i]);
  } else {
#pragma unroll
    for (int r = 0; r < R::NREG; ++r) load_shared<VEC>(row + (r * R::MINE + j) * 2, z[r]);
  }
}
