// Rotated rows of 16-bit values, whose levels are symmetric: by tensor cores, 8 rows of a head per team of warps and step.
//
// A row is pieces of up to 128 values, one per warp of the team, and a piece chunks of 32; lane 4 g + t holds the 8 values
// from 8 t on of row g. A product with the Hadamard matrix of 16 turns the bits 4, 3, 2 and 0 of a value's index, the sum of
// two products bit 1, what is left of the piece is added and subtracted in registers. Of the result the lane holds the 4
// values from 4 g on of rows 2 t and 2 t + 1. Where a group is several pieces, its warps exchange chunks: then each has some
// chunks of all pieces, and turns what is left. With many tokens a warp has all of a row, and adds in the same order. +1 and -1 times 16 bits are exact, sums are float32. They are not in index
// order: a code next to a boundary may differ from the definition's by one level, and a scale by one unit in its last place.
// A row's bytes depend on nothing else.
//
// The nearest level: |z| as a fixed-point number is M = 1 + |z| * scale, a float32 whose bits are an integer. For each cell
// of a uniform grid over |z| a table has what to add, so that byte 3 of the sum is the index of the level's magnitude. A
// boundary alone needs no table: it lies at M = 2, where bit 6 of byte 3 changes. Nor do three: a parabola through them has
// whole numbers there.
#pragma once
#include "append.cuh"

template <class C>
struct Tile {
  static constexpr int ROWS = 8, TEAMS = C::ROWS / ROWS, TEAM = C::PADDED / C::PIECE, WARPS = TEAM * TEAMS;
  static constexpr int SLICES = C::GROUP > C::PIECE ? C::GROUP / C::PIECE : 1;  // pieces of a group
  static constexpr int CHUNKS = C::PIECE / 32, GROUPS = C::PIECE / C::GROUP + (SLICES > 1);  // of a piece
  static constexpr int GROUP_CHUNKS = CHUNKS / GROUPS;                                       // of what of a group is in it
  static constexpr int FOLDS = C::GROUP > 128 ? C::GROUP / 128 : 1;  // 128 values each: those of a warp, or all of one
  static constexpr bool AFTER = C::RULE == L2;
  static constexpr bool BYTES = C::BYTES && GROUP_CHUNKS > 1 && FOLDS == 1;  // levels are 8-bit integers, 8 magnitudes at most
  static constexpr bool CURVED = C::CURVED && BYTES, ALONE = C::STEPS == 0 && BYTES && !CURVED;  // bit 6 of byte 3 is the magnitude's index
  static constexpr int MAGNITUDES = 1 << (C::BITS - 1), SQUARES_BYTES = BYTES ? 0 : MAGNITUDES * 256;
  static constexpr int PITCH = C::PADDED + 16;
  // Shared memory: signs before, as bits 15, and after, as float32; steps; squares of levels by magnitude, a copy per lane
  static constexpr int AFTER_AT = C::GROUP * 2, STEPS_AT = AFTER_AT + (AFTER ? C::GROUP * 4 : 0);
  static constexpr int SQUARES_AT = (STEPS_AT + C::STEPS * 4 + 15) / 16 * 16, TEAMS_AT = SQUARES_AT + SQUARES_BYTES;
};

// How many lanes, 1, 2 or 4, have all codes of a word; 0 if they are spread otherwise, or among warps, or if registers do not
// suffice for all codes.
template <class C, int WIDTH>
constexpr int lanes_of_word() {
  constexpr int SIZE = C::PADDED * WIDTH;
  if (Tile<C>::TEAM > 1 || Tile<C>::GROUPS > 1 && !Tile<C>::BYTES) return 0;
  return SIZE % 512 == 0 ? 1 : SIZE == 256 && WIDTH <= 4 ? 2 : SIZE == 128 && WIDTH <= 2 ? 4 : 0;
}

// Whether some field of a code is packed from registers, and some from bytes in shared memory.
template <class C>
struct Fields {
  template <int WIDTH>
  static constexpr bool has(bool own) { return (C::BITS & WIDTH) && (lanes_of_word<C, WIDTH>() > 0) == own; }
  static constexpr bool OWN = has<8>(true) || has<4>(true) || has<2>(true) || has<1>(true);
  static constexpr bool BYTES = has<8>(false) || has<4>(false) || has<2>(false) || has<1>(false);
};

// What a team has in shared memory: values of a tile, codes of a tile or of two that follow each other, turned chunks, sums
// of the squares of values and of levels by row and warp, 32 rows' targets twice.
template <class C>
struct Team {
  using T = Tile<C>;
  static constexpr int CODES = !Fields<C>::BYTES ? 0 : T::TEAM > 1 && T::SLICES == 1 ? 2 : 1;
  static constexpr int CODES_AT = C::PADDED * 16, CHUNKS_AT = CODES_AT + CODES * T::ROWS * T::PITCH;
  static constexpr int SUMS_AT = CHUNKS_AT + (T::SLICES > 1 ? C::PADDED * 32 : 0);
  static constexpr int TARGETS_AT = SUMS_AT + (T::SLICES > 1 ? 64 * T::TEAM : 0);
  static constexpr int SIZE = TARGETS_AT + 64 * (int)sizeof(Target);
};

// Waits for the other warps of a team.
template <class C>
INLINE void sync_team() {
  if constexpr (Tile<C>::TEAM == 1) __syncwarp();
  else sync_threads<32 * Tile<C>::TEAM>(threadIdx.x / (32 * Tile<C>::TEAM) + 1);
}

template <class C>
struct OfTeam {
  static constexpr int RUN = 8;
  static INLINE int at(int row, int value) { return row * Tile<C>::PITCH + value; }
  template <int EACH, class F>
  static INLINE void share(int rows, F f) {
    constexpr int COUNT = 32 * Tile<C>::TEAM;
    ::share<COUNT, Tile<C>::ROWS, EACH, 4>(threadIdx.x % COUNT, rows, [&](int row, int item, int) { f(row, item); });
  }
};

// Sums over the lanes with the same t: of a in lanes with an even g, of b in the others.
template <class X>
INLINE X sum_of_rows(X a, X b) {
  bool odd = threadIdx.x & 4;
  X x = (odd ? b : a) + __shfl_xor_sync(~0u, odd ? a : b, 4);
  x += __shfl_xor_sync(~0u, x, 8);
  return x + __shfl_xor_sync(~0u, x, 16);
}

template <int N>
INLINE float sum_of(const float* x) {
  if constexpr (N == 1) return x[0];
  else return sum_of<N / 2>(x) + sum_of<N / 2>(x + N / 2);
}

INLINE float rsqrt_near(float x) {
  float root = rsqrt_always(x);
  return __fmaf_rn(0.5f * root, __fmaf_rn(-x * root, root, 1.0f), root);
}

template <int BYTE>
INLINE u32 bytes_of(const u32 (&x)[4]) {
  constexpr u32 PAIR = 0x40 + 0x11 * BYTE;
  return prmt(prmt(x[0], x[1], PAIR), prmt(x[2], x[3], PAIR), 0x5410);
}

// Signs and magnitudes of four values to their codes, a byte each. Signs are bits 31 of x, magnitudes bytes 3 of x too, or
// with CURVED bits 21 and 22 of m.
template <class C>
INLINE u32 codes_of(const u32 (&x)[4], const u32 (&m)[4], u32 sign_bits) {
  constexpr u32 ONES = 0x01010101, HALF = 1 << (C::BITS - 1);
  u32 y = bytes_of<3>(x);
  if (Tile<C>::CURVED) {
    u32 size = bytes_of<2>(m) >> 5;
    y = (y & sign_bits) | (size & 3 * ONES);
  } else if (Tile<C>::ALONE) {
    if (!C::INDEX) return y >> 6 & 3 * ONES;
    y = (y & 0x80808080) | (y >> 6 & ONES);
  }
  if (C::INDEX) {
    u32 below = y >> 7 & ONES;
    return ((y & 0x7F7F7F7F) ^ below * (HALF - 1)) | (below ^ ONES) * HALF;
  }
  return C::BITS == 8 ? y : (y & 0x7F7F7F7F) | (y & 0x80808080) >> (8 - C::BITS);
}

// The sum of the squares of 8 levels, whose codes are the bytes of a and b.
template <class C>
INLINE int squares_of(u32 a, u32 b, int total) {
  u32 pairs = (a | b << 4) & 0x11111111 * (Tile<C>::MAGNITUDES - 1);
  u32 x = prmt(C::LEVELS_LOW, C::LEVELS_HIGH, pairs), y = prmt(C::LEVELS_LOW, C::LEVELS_HIGH, pairs >> 16);
  return __dp4a((int)y, (int)y, __dp4a((int)x, (int)x, total));
}

// A warp's share of a tile.
template <class C>
struct Share {
  using T = Tile<C>;
  static constexpr int SLICES = T::SLICES, CHUNKS = T::GROUP_CHUNKS, LOCAL = T::FOLDS / SLICES;  // folds of the warp's own
  static constexpr int FOLD = CHUNKS / LOCAL, OWN = FOLD / T::FOLDS;  // chunks: of a fold, of each fold for one warp of several
  static constexpr u32 MINUS = 0x80008000;
  static_assert(OWN * T::FOLDS == FOLD, "a chunk of each fold for every warp");
  const char* tables;
  char* team;
  float* sums;  // [2, ROWS, TEAM]
  int part;     // which warp of the team
  // Matrices of the products of each chunk, whose signs before are those of columns here: H, H and -H
  static constexpr bool KEPT = T::CHUNKS == CHUNKS && CHUNKS <= 4;
  u32 hadamard[4], signed_[KEPT ? CHUNKS : 1][3][4];

  INLINE Share(const char* tables, char* team, int part)
      : tables(tables), team(team), sums((float*)(team + Team<C>::SUMS_AT)), part(part) {
    u32 lane = threadIdx.x % 32;
    // rows g and g + 8, columns 2 t and 2 t + 8 on: bits 2, 1, 0, 3 of a row against 2, 1, 3, 0 of a column
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u32 minus = __popc(lane >> 3 & lane & 3 | (lane >> 2 & 1 & i / 2) << 2);
      hadamard[i] = (C::IN == BF16 ? 0x3F803F80 : 0x3C003C00) | (minus & 1) << 15 | (minus + i % 2 & 1) << 31;
    }
    if (KEPT) {
#pragma unroll
      for (int q = 0; q < CHUNKS; ++q) {
        uint4 sign = before(q);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          signed_[q][0][i] = hadamard[i] ^ (i < 2 ? sign.x : sign.z);
          signed_[q][1][i] = hadamard[i] ^ (i < 2 ? sign.y : sign.w);
          signed_[q][2][i] = signed_[q][1][i] ^ MINUS;
        }
      }
    }
  }

  // where the lane's values of chunk q of one group of the piece lie, which it copies itself
  INLINE char* values(int group, int q) const {
    return team + (part * T::CHUNKS + group * CHUNKS + q) * 512 + threadIdx.x % 32 * 16;
  }
  // which chunk of the row turned chunk q of the group is
  INLINE int chunk(int group, int q) const {
    if (SLICES == 1) return part * T::CHUNKS + group * CHUNKS + q;
    return (part / SLICES * SLICES + q / OWN) * CHUNKS + part % SLICES * OWN + q % OWN;
  }

  // signs of the lane's values of chunk q of the group, as bits 15 and 31
  INLINE uint4 before(int q) const { return ((const uint4*)tables)[(part % SLICES * CHUNKS + q) * 4 + threadIdx.x % 4]; }

  // Copies values of one group of the row at `from`, which may be null, in place of those that have been read.
  INLINE void fetch(const char* from, int group) {
    asm volatile("" ::: "memory");
    if (from) {
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i) {
        int q = part * T::CHUNKS + group * CHUNKS + i;
        bool valid = C::DIM == C::PADDED || 32 * q + threadIdx.x % 4 * 8 < C::DIM;
        if (C::DIM == C::PADDED) copy_async<16>(shared_address(values(group, i)), from + q * 64);
        else copy_async<16>(shared_address(values(group, i)), from + q * 64, valid);
      }
    }
    commit_copies();
  }

  template <int FIRST, int END>
  static INLINE void butterfly(float (&y)[CHUNKS][8]) {
#pragma unroll
    for (int h = FIRST; h < END; h *= 2) {
#pragma unroll
      for (int q = 0; q < CHUNKS; ++q) {
        if (q & h) continue;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float a = y[q][i], b = y[q + h][i];
          y[q][i] = a + b;
          y[q + h][i] = a - b;
        }
      }
    }
  }

  static INLINE void product(float (&d)[4], const float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    mma<C::IN == BF16>(d, c, a[0], a[1], a[2], a[3], b0, b1);
  }

  // y[2 * value + row] of each chunk of the group in this piece; turned in folds
  INLINE void turn(float (&y)[CHUNKS][8], int group) const {
    const float none[4] = {};
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q) {
      uint4 u = *(const uint4*)values(group, q);
      float half[4], even[4], odd[4];
      if constexpr (KEPT) {
        product(half, none, signed_[q][0], u.x, u.z);
        product(even, half, signed_[q][1], u.y, u.w);
        product(odd, half, signed_[q][2], u.y, u.w);
      } else {
        const u32 minus[] = {hadamard[0] ^ MINUS, hadamard[1] ^ MINUS, hadamard[2] ^ MINUS, hadamard[3] ^ MINUS};
        uint4 sign = before(q);
        product(half, none, hadamard, u.x ^ sign.x, u.z ^ sign.z);
        product(even, half, hadamard, u.y ^ sign.y, u.w ^ sign.w);
        product(odd, half, minus, u.y ^ sign.y, u.w ^ sign.w);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) y[q][i] = even[i], y[q][i + 4] = odd[i];
    }
    butterfly<1, FOLD>(y);
  }

  // Chunks of this piece for some of all pieces, turned.
  INLINE void exchange(float (&y)[CHUNKS][8]) const {
    char* chunks = team + Team<C>::CHUNKS_AT + threadIdx.x % 32 * 16;
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q)
#pragma unroll
      for (int i = 0; i < 8; i += 4)
        *(float4*)(chunks + ((part * CHUNKS + q) * 8 + i) * 128) = make_float4(y[q][i], y[q][i + 1], y[q][i + 2], y[q][i + 3]);
    sync_team<C>();
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q)
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        float4 x = *(const float4*)(chunks + (chunk(0, q) * 8 + i) * 128);
        y[q][i] = x.x, y[q][i + 1] = x.y, y[q][i + 2] = x.z, y[q][i + 3] = x.w;
      }
    butterfly<OWN, CHUNKS>(y);
  }

  // Sums of a row over the pieces of a group: `which` 0 of squares of values, 1 of levels. Lanes with g < 2 give them.
  INLINE void give(int which, int row, float sum) const {
    if (threadIdx.x % 32 < 8) sums[(which * T::ROWS + row) * T::TEAM + part] = sum;
  }
  INLINE float take(int which, int row) const {
    return sum_of<SLICES>(sums + (which * T::ROWS + row) * T::TEAM + part / SLICES * SLICES);
  }

  // One group of the piece to codes. Returns the norm of row 2 t + g % 2 of the tile and the square of that of its levels.
  INLINE float2 encode(const char* next, u32 (*codes)[2], int group) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, k = g & 1, row = 2 * t + k;
    float y[CHUNKS][8];
    turn(y, group);
    fetch(next, group);
    float squares[LOCAL];
#pragma unroll
    for (int f = 0; f < LOCAL; ++f) {
      float sum[4] = {};  // of row i % 2
#pragma unroll
      for (int i = 0; i < FOLD * 8; ++i) {
        float x = y[f * FOLD + i / 8][i % 8];
        sum[i % 4] = __fmaf_rn(x, x, sum[i % 4]);
      }
      squares[f] = sum_of_rows(sum[0] + sum[2], sum[1] + sum[3]);
    }
    float mine = sum_of<LOCAL>(squares);
    if constexpr (SLICES > 1) {
      give(0, row, mine);
      exchange(y);
      mine = take(0, row);
    } else {
      butterfly<FOLD, CHUNKS>(y);
    }
    mine *= (float)T::FOLDS / C::GROUP;  // what is turned after the sum makes squares that much larger
    float other = __shfl_xor_sync(~0u, mine, 4);
    // the square of the norm of row 2 t + k, what turns |y| into |z| * scale, and the bit of signs
    float norm[2] = {k ? other : mine, k ? mine : other};
    float root[2], factor[2], near[2];
    u32 sign_bit[2], sign_bits[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      bool live = norm[k] > TINY * TINY && norm[k] <= LARGEST;
      float inverse = rsqrt_near(norm[k]);
      root[k] = live ? inverse : 0.0f;
      factor[k] = root[k] * C::reach();
      near[k] = factor[k] * C::NEAR;
      sign_bit[k] = live ? 0x80000000 : 0;
      sign_bits[k] = live ? 0x80808080 : 0;
    }
    // infinity times 0 is no number, which becomes 0 where it is clamped
    if (!T::CURVED && __any_sync(~0u, !(norm[0] <= LARGEST) || !(norm[1] <= LARGEST))) {
#pragma unroll
      for (int i = 0; i < CHUNKS * 8; ++i)
        if (!(norm[i % 2] <= LARGEST)) y[i / 8][i % 8] = 0.0f;
    }
    u32 steps = shared_address(tables) + T::STEPS_AT - WHOLE * 4;
    const float4* after = (const float4*)(tables + T::AFTER_AT) + g;
    int first = SLICES > 1 ? part / SLICES * SLICES * CHUNKS : 0;  // chunk of the group, as the row counts them
    float total[LOCAL][2] = {};
    int whole[2] = {};
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q) {
      float4 signs = T::AFTER ? after[(SLICES > 1 ? chunk(0, q) - first : q) * 8] : make_float4(1, 1, 1, 1);
      const float s[] = {signs.x, signs.y, signs.z, signs.w};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        u32 code[4], size[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float x = y[q][2 * i + k];
          if constexpr (T::CURVED) {
            float a = __saturatef(__fmaf_rn(fabsf(x), factor[k], C::offset()));
            size[i] = __float_as_uint(__fmaf_rn(__fmaf_rn(C::square(), a, C::slope()), a, C::start()));
            code[i] = __float_as_uint(T::AFTER ? __fmaf_rn(x, s[i], 0.0f) : x);
            continue;
          }
          u32 m = __float_as_uint(__fmaf_rn(fabsf(x), factor[k], 1.0f)), add = 0;
          if (C::STEPS) load_shared<1>(__float_as_uint(__fmaf_rn(fabsf(x), near[k], 8388608.0f)) * 4 + steps, &add);
          m = C::STEPS || T::ALONE ? m + add : m >> 6 & 1 << 24;
          if (!T::BYTES) total[LOCAL > 1 ? q % FOLD / OWN : 0][k] += *(const float*)(tables + T::SQUARES_AT + prmt(m, lane * 4, 0x5534));
          if (T::AFTER) x = __fmaf_rn(x, s[i], 0.0f);  // 0, not -0
          code[i] = m | (__float_as_uint(x) & sign_bit[k]);
        }
        codes[q][k] = codes_of<C>(code, size, sign_bits[k]);
        if constexpr (T::BYTES)
          if (q % 2) whole[k] = squares_of<C>(codes[q - 1][k], codes[q][k], whole[k]);
      }
    }
    float levels;
    if constexpr (T::BYTES) {
      levels = (float)sum_of_rows(whole[0], whole[1]) * (C::step() * C::step());
    } else {
#pragma unroll
      for (int f = 0; f < LOCAL; ++f) squares[f] = sum_of_rows(total[f][0], total[f][1]);
      levels = sum_of<LOCAL>(squares);
    }
    float inverse = k ? root[1] : root[0];
    float scale = inverse > 0.0f ? mine * inverse : mine;  // nothing is left of a square that is too small
    if constexpr (SLICES > 1) give(1, row, levels);
    return make_float2(scale, levels);
  }

  // The codes of a group, or of all groups from it on, a byte each, to shared memory.
  template <int N>
  INLINE void put(char* bytes, int group, const u32 (&codes)[N][2]) const {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int q = 0; q < N; ++q)
#pragma unroll
      for (int k = 0; k < 2; ++k) *(u32*)(bytes + (2 * t + k) * T::PITCH + chunk(group, q) * 32 + 4 * g) = codes[q][k];
  }
  // Scales of one group, of TILES tiles that follow each other or of the `rows` that are left of them. Lanes 8 i to 8 i + 7
  // have what `encode` returned for tile i.
  template <int TILES>
  INLINE void store_scales(const Target* targets, int rows, int group, float2 norms) const {
    int lane = threadIdx.x % 32, row = lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2;
    if (row < rows && row < TILES * T::ROWS && part % SLICES == 0)
      store_scale<C>(targets[row].scale, part / SLICES * T::GROUPS + group, norms.x * rsqrt_near(norms.y));
  }
};

// The fields of WIDTH bits where LANES lanes, 1, 2 or 4, have all codes of a word.
template <class C, int WIDTH, int LANES>
INLINE void pack_own(const u32 (&codes)[Tile<C>::CHUNKS][2], const Target* targets, int rows) {
  constexpr int CHUNKS = Tile<C>::CHUNKS, PLANES = 16 / WIDTH, LOW = C::BITS & ~(2 * WIDTH - 1);
  constexpr int START = C::PADDED * LOW / 8, ALIGN = (C::ALIGN | START) & -(C::ALIGN | START);
  constexpr int EACH = LANES == 1 ? CHUNKS / PLANES : 1;  // pairs of pairs of words
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int c = 0; c < EACH; ++c) {
    u32 half[2][2] = {};  // row; low and high bytes of words
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int q = c; q < CHUNKS; q += EACH) {
        int plane = q / EACH * LANES;  // of lanes with the lowest g
        u32 x = codes[q][k] >> LOW;
        if (WIDTH != C::BITS) x &= 0x01010101u * ((1 << WIDTH) - 1);
        half[k][plane / (PLANES / 2)] |= x << WIDTH * (plane % (PLANES / 2));
      }
    if constexpr (LANES == 1) {
#pragma unroll
      for (int k = 0; k < 2; ++k)
        if (2 * t + k < rows)
          store<ALIGN>(targets[2 * t + k].words + START + 64 * c + 8 * g,
                       {prmt(half[k][0], half[k][1], 0x5140), prmt(half[k][0], half[k][1], 0x7362)});
    } else {
      int own = g / 4, row = 2 * t + own;
      u32 mine[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        u32 give = half[0][i], keep = half[1][i];
        if (!own) give = half[1][i], keep = half[0][i];
        int shift = WIDTH * (g * LANES / 8);
        mine[i] = keep << shift | __shfl_xor_sync(~0u, give << shift, 16);
        if (LANES == 4) mine[i] |= __shfl_xor_sync(~0u, mine[i], 8);
      }
      if (row < rows && (LANES == 2 || !(g & 2)))
        store<ALIGN>(targets[row].words + START + 8 * (g % (8 / LANES)),
                     {prmt(mine[0], mine[1], 0x5140), prmt(mine[0], mine[1], 0x7362)});
    }
  }
}

template <class C, int WIDTH>
INLINE void pack_field(const u32 (&codes)[Tile<C>::CHUNKS][2], const char* bytes, const Target* targets, int rows) {
  constexpr int LANES = lanes_of_word<C, WIDTH>();
  if constexpr ((C::BITS & WIDTH) == 0) return;
  else if constexpr (LANES) pack_own<C, WIDTH, LANES>(codes, targets, rows);
  else pack<C, WIDTH, OfTeam<C>>(bytes, targets, rows);
}

template <class C>
INLINE void append_tiles(const Append& p, const Append::One& side, u32 block) {
  using T = Tile<C>;
  extern __shared__ __align__(16) char shared[];
  if (threadIdx.x < 32 * T::WARPS) {
    for (int i = threadIdx.x; i < T::SQUARES_AT / 16; i += 32 * T::WARPS)
      copy_async_cached<16>(shared_address(shared) + 16 * i, side.table + 16 * i);
#pragma unroll 16
    for (int i = threadIdx.x; i < T::SQUARES_BYTES / 8; i += 32 * T::WARPS)
      *(float*)(shared + T::SQUARES_AT + i / 32 * 256 + i % 32 * 4) = ((const float*)(side.table + T::SQUARES_AT))[i / 32];
  }
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  wait_for_earlier_kernels();  // not for the table, which none of them writes
  static_assert(T::TEAMS_AT + T::TEAMS * Team<C>::SIZE == C::SHARED, "the bytes of turned.py");
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = warp / T::TEAM, part = warp % T::TEAM;
  u32 index = block * T::TEAMS + team, first = index * side.each + (index < side.rest ? index : side.rest);  // tile
  u32 end = first + side.each + (index < side.rest);
  if (warp >= T::WARPS || first >= end) return;
  char* own = shared + T::TEAMS_AT + team * Team<C>::SIZE;
  Target* targets = (Target*)(own + Team<C>::TARGETS_AT);
  Share<C> share(shared, own, part);
  const char* from = nullptr;
  int ahead = 0;  // tokens from the lane's on that follow it in memory
  // A row per lane, of four tiles, `after` the four before: mostly as many tokens further. The first warp writes targets, from
  // `at` on: of four tiles that come, while others may be one behind.
  auto locate = [&](u32 tile, u32 at, bool after) {
    ahead -= 32;
    if (after && __all_sync(~0u, ahead > 0)) {
      from += 32 * side.from.token;
      if (part == 0) {
        Target before = targets[(at ^ 32) + lane];
        targets[at + lane] = {before.words + 32 * side.to.words_slot, before.scale + 32 * side.to.scale_slot};
      }
    } else {
      u32 index = tile * T::ROWS + lane;
      Address address = {};
      address.find(p, index < p.rows ? index : p.rows - 1);
      from = address.from(side.from);
      if (part == 0) address.to(p, side.to, targets[at + lane]);
      ahead = p.pages ? 0 : min(p.tokens.by - address.token, p.capacity.by - address.slot);
    }
  };
  auto row_of = [&](u32 tile) {
    return (const char*)__shfl_sync(~0u, (u64)from, tile * T::ROWS + lane / 4) + lane % 4 * 16;
  };
  locate(first, 0, false);
  sync_team<C>();
#pragma unroll
  for (int group = 0; group < T::GROUPS; ++group) share.fetch(row_of(0), group);
  char* bytes = own + Team<C>::CODES_AT;
  for (u32 now = 0; first < end; first += 4, now ^= 32) {
    u32 tiles = end - first < 4 ? end - first : 4;
    float2 norms;
#pragma unroll 1
    for (u32 tile = 0; tile < tiles; ++tile) {
      const char* then = nullptr;
      if (tile + 1 < tiles) {
        then = row_of(tile + 1);
      } else if (first + 4 < end) {
        locate(first + 4, now ^ 32, true);
        then = row_of(0);
      }
      __syncwarp();
      const Target* to = targets + now + tile * T::ROWS;
      int left = p.rows - (first + tile) * T::ROWS, rows = left < T::ROWS ? left : T::ROWS;
      u32 codes[T::CHUNKS][2];
      auto keep = [&](int group, float2 found) {
        if (T::GROUPS > 1) share.template store_scales<1>(to, rows, group, found);
        else if (lane / 8 == tile) norms = found;
      };
      if constexpr (Fields<C>::OWN) {
#pragma unroll
        for (int group = 0; group < T::GROUPS; ++group) {
          wait_copies<T::GROUPS - 1>();
          keep(group, share.encode(then, codes + group * T::GROUP_CHUNKS, group));
        }
        if constexpr (Fields<C>::BYTES) share.put(bytes, 0, codes);
      } else {
#pragma unroll
        for (int group = 0; group < T::GROUPS; ++group) {
          u32 part_codes[T::GROUP_CHUNKS][2];
          wait_copies<T::GROUPS - 1>();
          keep(group, share.encode(then, part_codes, group));
          share.put(bytes, group, part_codes);
        }
      }
      if constexpr (Fields<C>::BYTES) sync_team<C>();
      if constexpr (T::SLICES > 1)
        if (lane / 8 == tile) norms.y = share.take(1, lane % 4 * 2 + lane / 4 % 2);
      pack_field<C, 8>(codes, bytes, to, rows);
      pack_field<C, 4>(codes, bytes, to, rows);
      pack_field<C, 2>(codes, bytes, to, rows);
      pack_field<C, 1>(codes, bytes, to, rows);
      if (Team<C>::CODES > 1) bytes = own + Team<C>::CODES_AT + (bytes == own + Team<C>::CODES_AT) * T::ROWS * T::PITCH;
      else __syncwarp();
    }
    u32 left = p.rows - first * T::ROWS;
    if (T::GROUPS == 1) share.template store_scales<4>(targets + now, left < tiles * T::ROWS ? left : tiles * T::ROWS, 0, norms);
  }
}
