// Rows as they are stored -> operands of the tensor cores. One description of a row serves K and V.
//
// A row is NREG blocks of WORDS words; unit j is word j of each block and holds PLANES values: j, j + WORDS, ...
// (packing.py: with fields of different widths, the narrowest sets WORDS). Two units side by side in 32-bit registers
// expand to PLANES pairs of 16-bit floats. For K the two are words of one token, so a pair is two dims; for V they are
// the same word of two tokens, so a pair is two tokens.
#pragma once
#include "ptx.cuh"

enum Kind { F16 = 0, BF16 = 1, F32 = 2, FP8 = 3, LINEAR = 4, BYTES = 5, TABLE = 6 };

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
  // codes of 2 and 3 bits become bytes of value + 128, times 2**-24
  static constexpr bool OFFSET = KIND == BYTES && BITS < 4;
  static constexpr float OFFSET_VALUE = 128.0f / 16777216.0f;
  static constexpr int LUT_BYTES = KIND == TABLE ? 128 << BITS : 0;  // one copy of the table per bank

  // first dim of plane k when the unit is j
  static constexpr INLINE int dim(int j, int k) { return SPLIT ? j : j + k * WORDS; }
};

// Widest vector of 1, 2 or 4 units per lane that LANES lanes read side by side without a remainder.
constexpr int vector_of(int units, int lanes) { return units % (4 * lanes) == 0 ? 4 : units % (2 * lanes) == 0 ? 2 : 1; }

// How lanes share the units of a row: chunks of LANES * VEC units of WIDTH words; operands in pairs.
template <class R, int LANES, int WIDTH>
struct Share {
  static constexpr int UNITS = R::WORDS / WIDTH;
  static constexpr int VEC = vector_of(UNITS, LANES);
  static constexpr int SIZE = LANES * VEC * WIDTH;  // words
  static constexpr int CHUNKS = (R::WORDS + SIZE - 1) / SIZE;
  static constexpr bool WHOLE = R::WORDS % SIZE == 0;
  // are planes k and k + 1 of every chunk of one scale?
  static constexpr bool planes_agree() {
    if (R::PLANES == 1) return false;
    if (R::SPLIT) return VEC == 1;
    for (int i = 0; i < CHUNKS; ++i)
      for (int k = 0; k < R::PLANES; k += 2) {
        int last = (i + 1) * SIZE < R::WORDS ? (i + 1) * SIZE - 1 : R::WORDS - 1;
        if (R::dim(i * SIZE, k) / R::SPAN != R::dim(last, k + 1) / R::SPAN) return false;
      }
    return true;
  }
  // a pair is two planes of a unit, or one plane of two units of the vector, or a plane alone
  static constexpr bool BY_PLANE = R::PLANES > 1 && (VEC == 1 || planes_agree());
  static constexpr bool BY_UNIT = !BY_PLANE && VEC > 1;
  static constexpr int UNITS_TOGETHER = BY_UNIT ? 2 : 1;
  static constexpr int PAIRS_PER_STEP = BY_PLANE ? R::PLANES / 2 : R::PLANES;  // of one or two units
  static constexpr int STEPS = VEC / UNITS_TOGETHER;                           // of a chunk
  static constexpr int PAIRS = CHUNKS * STEPS * PAIRS_PER_STEP;

  static constexpr INLINE int pair(int chunk, int step, int p) { return (chunk * STEPS + step) * PAIRS_PER_STEP + p; }
  static constexpr INLINE int plane(int p, int which) { return BY_PLANE ? 2 * p + which : p; }
  static constexpr INLINE int unit(int step, int which) { return BY_UNIT ? 2 * step + which : step; }
  // scales that the operands of a pair meet: first and last
  static constexpr INLINE int low(int chunk, int p) { return R::dim(chunk * SIZE, plane(p, 0)) / R::SPAN; }
  static constexpr INLINE int high(int chunk, int p) {
    int last = (chunk + 1) * SIZE < R::WORDS ? (chunk + 1) * SIZE - 1 : R::WORDS - 1;
    return R::dim(last, plane(p, BY_PLANE ? 1 : 0)) / R::SPAN;
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

// Levels of BYTES rows: bits 2, 3: level + 128 by code; bits 4: magnitude by the low three bits.
struct Table {
  u32 low, high;
};

INLINE u32 look_up(u32 lut, u32 bits) {  // bits: code * 128
  u32 x;
  asm("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(lut + bits));
  return x;
}

// four codes, one per byte: planes a (bytes 0, 2) and b (bytes 1, 3)
INLINE void from_table(u32 codes, u32 lut, u32& a, u32& b) {
  u32 a0 = look_up(lut, (codes << 7) & 0x7F80), b0 = look_up(lut, (codes >> 1) & 0x7F80);
  u32 a1 = look_up(lut, (codes >> 9) & 0x7F80), b1 = look_up(lut, (codes >> 17) & 0x7F80);
  a = prmt(a0, a1, 0x5410);
  b = prmt(b0, b1, 0x5410);
}

// the same from the bytes of BYTES rows with an offset: eight codes, one per nibble; planes in the order of nibbles
INLINE void from_bytes(u32 nibbles, Table table, u32& a, u32& b, u32& c, u32& d) {
  u32 x = prmt(table.low, table.high, prmt(nibbles, 0, 0x0020)), y = prmt(table.low, table.high, prmt(nibbles, 0, 0x0031));
  a = x & 0x00FF00FF;
  b = prmt(x, 0, 0x4341);
  c = y & 0x00FF00FF;
  d = prmt(y, 0, 0x4341);
}

INLINE void from_nibbles(u32 nibbles, u32 lut, u32& a, u32& b, u32& c, u32& d) {
  from_table(nibbles & 0x0F0F0F0F, lut, a, c);
  from_table((nibbles >> 4) & 0x0F0F0F0F, lut, b, d);
}

// z[NREG]: two units side by side; h[PLANES]: their values, first unit in the low halves
template <class R>
INLINE void expand(const u32* z, u32* h, Table table, u32 lut) {
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
    u32 m = z[0] & 0x77777777, odd = z[0] & 0x80808080, even = (z[0] << 4) & 0x80808080;
    u32 x = prmt(table.low, table.high, prmt(m, 0, 0x0020)), y = prmt(table.low, table.high, prmt(m, 0, 0x0031));
    h[0] = prmt(x, even, 0x6240);
    h[1] = prmt(x, odd, 0x6341);
    h[2] = prmt(y, even, 0x7250);
    h[3] = prmt(y, odd, 0x7351);
  } else if constexpr (R::BITS == 2) {
    u32 even = z[0] & 0x33333333, odd = (z[0] >> 2) & 0x33333333;
    if constexpr (R::KIND == BYTES) {
      from_bytes(even, table, h[0], h[2], h[4], h[6]);
      from_bytes(odd, table, h[1], h[3], h[5], h[7]);
    } else {
      from_nibbles(even, lut, h[0], h[2], h[4], h[6]);
      from_nibbles(odd, lut, h[1], h[3], h[5], h[7]);
    }
  } else if constexpr (R::BITS == 3) {  // plane m + 2 p: 2-bit plane p of block m, bit m + 2 p of the last block
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      u32 top = m ? z[2] << 1 : z[2] << 2;
      u32 even = (z[m] & 0x33333333) | (top & 0x44444444), odd = ((z[m] >> 2) & 0x33333333) | ((z[2] >> m) & 0x44444444);
      if constexpr (R::KIND == BYTES) {
        from_bytes(even, table, h[m], h[4 + m], h[8 + m], h[12 + m]);
        from_bytes(odd, table, h[2 + m], h[6 + m], h[10 + m], h[14 + m]);
      } else {
        from_nibbles(even, lut, h[m], h[4 + m], h[8 + m], h[12 + m]);
        from_nibbles(odd, lut, h[2 + m], h[6 + m], h[10 + m], h[14 + m]);
      }
    }
  } else if constexpr (R::BITS == 4) {
    from_nibbles(z[0], lut, h[0], h[1], h[2], h[3]);
  } else if constexpr (R::BITS == 5) {  // plane m + 4 p: nibble p of block m, bit m + 4 p of the last block
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      u32 top = z[4] >> m;
      from_table((z[m] & 0x0F0F0F0F) | ((top << 4) & 0x10101010), lut, h[m], h[8 + m]);
      from_table(((z[m] >> 4) & 0x0F0F0F0F) | (top & 0x10101010), lut, h[4 + m], h[12 + m]);
    }
  } else if constexpr (R::BITS == 6) {  // plane m + 2 p: nibble p of block m, bits 2 m + 4 p of the last block
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      u32 top = z[2] >> (2 * m);
      from_table((z[m] & 0x0F0F0F0F) | ((top << 4) & 0x30303030), lut, h[m], h[4 + m]);
      from_table(((z[m] >> 4) & 0x0F0F0F0F) | (top & 0x30303030), lut, h[2 + m], h[6 + m]);
    }
  } else {
    from_table(z[0], lut, h[0], h[1]);
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
    for (int r = 0; r < R::NREG; ++r) load_shared<VEC>(row + (r * R::WORDS + j) * 2, z[r]);
  }
}

// VEC words of one row: x[NREG][(VEC + 1) / 2], or VEC floats: x[VEC]
template <class R, int VEC>
struct Words {
  u32 x[R::SPLIT ? VEC : R::NREG * ((VEC + 1) / 2)];

  INLINE void load(u32 row, int j) {
    if constexpr (R::SPLIT) {
      load_shared<VEC>(row + j * 4, x);
    } else {
#pragma unroll
      for (int r = 0; r < R::NREG; ++r) {
        u32 from = row + (r * R::WORDS + j) * 2;
        if constexpr (VEC == 1) x[r] = load_shared_u16(from);
        else load_shared<VEC / 2>(from, x + r * (VEC / 2));
      }
    }
  }
};

// word c of two tokens side by side
template <class R, int VEC>
INLINE void join(const Words<R, VEC>& a, const Words<R, VEC>& b, int c, u32* z) {
  if constexpr (R::SPLIT) {
    split_bf16(__uint_as_float(a.x[c]), __uint_as_float(b.x[c]), z[0], z[1]);
  } else {
    constexpr int N = (VEC + 1) / 2;
#pragma unroll
    for (int r = 0; r < R::NREG; ++r) z[r] = prmt(a.x[r * N + c / 2], b.x[r * N + c / 2], c % 2 ? 0x7632 : 0x5410);
  }
}
