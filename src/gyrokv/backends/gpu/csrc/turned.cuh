// Rotated rows of 16-bit values, whose levels are symmetric: by tensor cores, 8 rows of a head per team of warps and step.
//
// A row is pieces of up to 128 values, one per warp of the team, and a piece chunks of 32; lane 4 g + t holds the 8 values
// 2 t, 2 t + 8, 2 t + 16, 2 t + 24 and one on of row g. A product with the Hadamard matrix of 16 turns the low four bits of a
// value's index, the sum of two products bit 4, what is left of the piece is added and subtracted in registers. Of the result
// the lane holds the values 2 g, 2 g + 1, 2 g + 16 and 2 g + 17 of rows 2 t and 2 t + 1. Where a group is several pieces, its
// warps exchange chunks: then each has some chunks of all pieces, and turns what is left. With many tokens a warp has all of a
// row, and adds in the same order; halves of the longest rows are turned like rows, and rows 2 t and 2 t + 1 joined then. +1
// and -1 times 16 bits are exact, sums are float32. They are not in index order: a code next to a boundary may differ from the
// definition's by one level, and a scale by one unit in its last place. A row's bytes depend on nothing else.
//
// The nearest level: M = z * scale + begin is a fixed-point number between 1/2 and 1, where all floats have one exponent. For
// each of its cells a table has what to add to its bits, so that byte 3 of the sum is the index of the level. The cell is byte
// 2 of M, or a rounded product where levels lie closer. turned.py says what happens outside. Boundaries of four levels are
// even, and need no table. A sign after the transform makes index i of n the index n - 1 - i, by an exclusive or of four or
// eight of them; where it is -, M begins a unit lower, so that 0 stays what it is.
#pragma once
#include "append.cuh"

template <class C>
struct Tile {
  static constexpr int SLICES = C::GROUP > C::PIECE ? C::GROUP / C::PIECE : 1;  // pieces of a group
  static constexpr int HALVES = C::PIECE > 256 && C::GROUP == C::PIECE ? 2 : 1;  // of a row, which are turned as rows are
  static constexpr int ROWS = 8 / HALVES, BATCH = 32 / ROWS;                     // of a tile; tiles of 32 rows
  static constexpr int TEAMS = C::ROWS / ROWS, TEAM = C::PADDED / C::PIECE, WARPS = TEAM * TEAMS;
  static constexpr int CHUNKS = C::PIECE / HALVES / 32, GROUPS = C::PIECE / C::GROUP + (SLICES > 1);  // of a piece or half
  static constexpr int GROUP_CHUNKS = CHUNKS / GROUPS;               // of what of a group is in it
  static constexpr int FOLDS = C::GROUP > 128 ? C::GROUP / 128 : 1;  // 128 values each: those of a warp, or all of one
  static constexpr bool AFTER = C::RULE == L2;
  static constexpr bool EVEN = C::BITS == 2;   // boundaries lie evenly
  static constexpr bool BYTES = C::BYTES;      // levels are 8-bit integers, 8 magnitudes at most
  static constexpr bool PAIRED = BYTES && C::GROUP == 128 && C::PIECE == C::PADDED && C::PADDED <= 256;
  static constexpr int APART = PAIRED ? C::PADDED / 128 : 1;    // chunks from the first of a pair of chunks to the second
  static constexpr int WORDS = PAIRED ? CHUNKS / 2 : CHUNKS;    // of four or eight codes
  static constexpr int LEVELS = 1 << C::BITS, HALF = LEVELS / 2, PITCH = C::PADDED + 16;
  // Shared memory: signs before, as bits 15; where M begins, what flips indices of words of codes; what is added, by cell;
  // squares of levels by index. Lanes that look up other entries would wait for each other: with few tokens there are eight
  // copies of each entry, with many one per lane, and those of an entry for cells and of one for squares share 256 bytes.
  static constexpr int BEGIN_AT = C::GROUP * 2, FLIPS_AT = BEGIN_AT + (AFTER ? C::GROUP * 4 : 0);
  static constexpr int FLIPS = AFTER ? C::GROUP / (BYTES ? 8 : 4) : 0;  // words of 32 bits
  static constexpr int CELLS = C::STEPS, SQUARES = BYTES ? 0 : LEVELS;
  static constexpr int CELLS_AT = (FLIPS_AT + 4 * FLIPS + 15) / 16 * 16;
  static constexpr bool SPREAD = C::COPIES == 32;
  static constexpr int ENTRY = SPREAD ? 256 : C::COPIES * 4, SQUARES_AT = CELLS_AT + (SPREAD ? 128 : CELLS * ENTRY);
  static constexpr int END = CELLS_AT + ENTRY * (!SPREAD ? CELLS + SQUARES : CELLS > SQUARES ? CELLS : SQUARES);
  static constexpr int TEAMS_AT = (END + 15) / 16 * 16;
};

// How many lanes, 1 or 2, have all codes of a word; 0 if they are spread otherwise, or among warps, or if registers do not
// suffice for all codes.
template <class C, int WIDTH>
constexpr int lanes_of_word() {
  constexpr int SIZE = C::PADDED * WIDTH;
  if (Tile<C>::TEAM > 1 || Tile<C>::GROUPS > 1 && !Tile<C>::BYTES) return 0;
  return SIZE % 512 == 0 || SIZE == 256 && WIDTH <= 4 ? 1 : SIZE == 128 && WIDTH <= 2 ? 2 : 0;
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
  static constexpr int CODES_AT = C::PADDED * 2 * T::ROWS, CHUNKS_AT = CODES_AT + CODES * T::ROWS * T::PITCH;
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

INLINE float rsqrt_near(float x) {
  float root = rsqrt_always(x);
  return __fmaf_rn(0.5f * root, __fmaf_rn(-x * root, root, 1.0f), root);
}

template <int BYTE>
INLINE u32 bytes_of(const u32 (&x)[4]) {
  constexpr u32 PAIR = 0x40 + 0x11 * BYTE;
  return prmt(prmt(x[0], x[1], PAIR), prmt(x[2], x[3], PAIR), 0x5410);
}

// (HALF - 1) / HALF of x
template <class C>
INLINE u32 below(u32 x) {
  return C::BITS == 1 ? 0 : __umulhi(x, 0u - (1u << (33 - C::BITS) % 32));
}

// Indices of levels in fields of WIDTH bits to what is stored: as they are, or as signs (1 = -) and magnitudes. flips: what
// differs where signs after the transform are -.
template <class C, int WIDTH>
INLINE u32 codes_of(u32 x, u32 flips) {
  constexpr u32 ONES = 0xFFFFFFFFu / ((1u << WIDTH) - 1), HALF = Tile<C>::HALF;
  if (C::INDEX) return Tile<C>::AFTER ? x ^ flips : x;
  return x ^ below<C>(x & HALF * ONES) ^ (Tile<C>::AFTER ? flips : ONES * (2 * HALF - 1));
}

// The sum of the squares of 8 levels, whose indices are the fields of 4 bits of x, flipped or not.
template <class C>
INLINE int squares_of(u32 x, int total) {
  constexpr u32 ONES = 0x11111111, HALF = Tile<C>::HALF;
  if (C::INDEX) x = ~(x ^ below<C>(x & HALF * ONES));
  u32 sizes = x & ONES * (HALF - 1), low = prmt(C::LEVELS_LOW, C::LEVELS_HIGH, sizes), high = prmt(C::LEVELS_LOW, C::LEVELS_HIGH, sizes >> 16);
  return __dp4a((int)high, (int)high, __dp4a((int)low, (int)low, total));
}

// A warp's share of a tile.
template <class C>
struct Share {
  using T = Tile<C>;
  static constexpr int SLICES = T::SLICES, CHUNKS = T::GROUP_CHUNKS, HALVES = T::HALVES;
  static constexpr int SUMS = T::FOLDS / SLICES, LOCAL = SUMS / HALVES;  // folds of the warp's own, and of half of a row
  static constexpr int FOLD = CHUNKS / LOCAL, OWN = FOLD / T::FOLDS;  // chunks: of a fold, of each fold for one warp of several
  static constexpr u32 MINUSES = 0x80008000;
  static_assert(OWN * T::FOLDS == FOLD, "a chunk of each fold for every warp");
  const char* tables;
  char* team;
  float* sums;  // [2, ROWS, TEAM]
  int part;     // which warp of the team
  // Of each chunk of the piece, which has 512 bytes: 16 bytes from 8 i on of row g at 64 g, of all i in an order that lets eight
  // rows meet all banks. Where the lane copies those of row g, and reads those of row lane % 8 for the matrix lane / 8
  u32 to, from;
  // H; where KEPT, for each half of each chunk, with its signs before, which are those of columns here
  static constexpr bool KEPT = HALVES == 1 && CHUNKS <= 4 && T::CHUNKS <= 8;
  u32 hadamard[4], signed_[KEPT ? CHUNKS : 1][2][4];
  static constexpr bool AT_HAND = KEPT && T::AFTER && SLICES == 1;
  float4 begins[AT_HAND ? CHUNKS : 1];  // of the lane's four values of each chunk

  INLINE Share(const char* tables, char* team, int part)
      : tables(tables), team(team), sums((float*)(team + Team<C>::SUMS_AT)), part(part) {
    u32 lane = threadIdx.x % 32, at = shared_address(team) + part * T::CHUNKS * 512;
    to = at + (lane ^ lane / 8) * 16;
    from = at + lane % 8 * 64 + (lane / 8 ^ lane / 2 % 4) * 16;
  }

  INLINE void make_matrices() {
    u32 lane = threadIdx.x % 32;
    // rows g and g + 8, for values 2 g and 2 g + 1, columns 2 t and 2 t + 8 on
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u32 minus = __popc(lane >> 2 & (lane & 3 | i / 2 * 4));
      hadamard[i] = (C::IN == BF16 ? 0x3F803F80 : 0x3C003C00) | (minus & 1) << 15 | (minus + i % 2 & 1) << 31;
    }
    if (KEPT) {
#pragma unroll
      for (int q = 0; q < CHUNKS; ++q) {
        uint4 sign = before(q);
        if (AT_HAND) begins[q] = ((const float4*)(tables + T::BEGIN_AT))[q * 8 + lane / 4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          signed_[q][0][i] = hadamard[i] ^ (i < 2 ? sign.x : sign.y);
          signed_[q][1][i] = hadamard[i] ^ (i < 2 ? sign.z : sign.w);
        }
      }
    }
  }

  // which chunk of the row turned chunk q of the group is
  INLINE int chunk(int group, int q) const {
    if (SLICES == 1) return part * T::CHUNKS + group * CHUNKS + q;
    return (part / SLICES * SLICES + q / OWN) * CHUNKS + part % SLICES * OWN + q % OWN;
  }

  // signs of the lane's values of chunk q of the group, 2 t, 2 t + 8, .. and one on, as bits 15 and 31
  INLINE uint4 before(int q) const {
    return ((const uint4*)tables)[((part % SLICES + half()) * CHUNKS + q) * 4 + threadIdx.x % 4];
  }
  static INLINE int half() { return threadIdx.x / 4 % HALVES; }  // which one the lane has before the transform

  // Copies values of one group of `row`, which may be null, in place of those that have been read.
  INLINE void fetch(const char* row, int group) {
    asm volatile("" ::: "memory");
    if (row) {
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i) {
        int q = part * T::CHUNKS + group * CHUNKS + i;
        bool valid = C::DIM == C::PADDED || 32 * (q + half() * CHUNKS) + threadIdx.x % 4 * 8 < C::DIM;
        if (C::DIM == C::PADDED) copy_async<16>(to + (group * CHUNKS + i) * 512, row + q * 64);
        else copy_async<16>(to + (group * CHUNKS + i) * 512, row + q * 64, valid);
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

  // d = c + matrix `a` times 16 values of each row
  static INLINE void product(float (&d)[4], const float (&c)[4], const u32* a, u32 low, u32 high) {
    mma<C::IN == BF16>(d, c, a[0], a[1], a[2], a[3], low, high);
  }

  // y[2 * value + row] of each chunk of the group in this piece; turned in folds
  INLINE void turn(float (&y)[CHUNKS][8], int group) const {
    const float none[4] = {};
#pragma unroll
    for (int q = 0; q < CHUNKS; ++q) {
      u32 u[4];
      load_matrices(from + (group * CHUNKS + q) * 512, u);
      if (!KEPT) {
        uint4 sign = before(q);
        u[0] ^= sign.x, u[1] ^= sign.y, u[2] ^= sign.z, u[3] ^= sign.w;
      }
      float half[4], even[4], odd[4];
      const u32 *low = KEPT ? signed_[q][0] : hadamard, *high = KEPT ? signed_[q][1] : hadamard;
      product(half, none, low, u[0], u[1]);
      product(even, half, high, u[2], u[3]);
      product(odd, half, high, u[2] ^ MINUSES, u[3] ^ MINUSES);
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

  // Sums of a row over the pieces of a group: `which` 0 of squares of values, 1 of levels.
  INLINE void give(int which, int row, float sum) const { sums[(which * T::ROWS + row) * T::TEAM + part] = sum; }
  INLINE float take(int which, int row) const {
    return sum_of<SLICES>(sums + (which * T::ROWS + row) * T::TEAM + part / SLICES * SLICES);
  }

  // The index of x's level, in byte INDEX_AT of what is returned; M begins at `begin`
  static constexpr int INDEX_AT = T::EVEN ? 0 : 3;
  INLINE u32 index_of(float x, float factor, float begin) const {
    float m = __saturatef(__fmaf_rn(x, factor, begin));
    if (T::EVEN) return __float_as_uint(__fmaf_rz(m, 3.9999998f, 8388608.0f));
    if (C::CLAMPED) m = __fmaf_rn(m, 0.5f, 0.5f);
    u32 bits = __float_as_uint(m), own = threadIdx.x % C::COPIES * 4, at = (bits >> 16 & 0xFF) * T::ENTRY + own;
    if (T::SPREAD) at = prmt(bits, own, 0x5524);
    if (C::NEAR) {  // cells are finer than bytes
      u32 cell = __float_as_uint(__fmaf_rn(m, C::NEAR, 8388608.0f - C::NEAR / 2));
      at = cell * T::ENTRY + (own - WHOLE * T::ENTRY);
    }
    return bits + *(const u32*)(tables + T::CELLS_AT + at);
  }
  // the square of its level
  INLINE float square_of(u32 index) const {
    u32 own = threadIdx.x % C::COPIES * 4, at = (index >> 8 * INDEX_AT & 0xFF) * T::ENTRY + own;
    if (T::SPREAD) at = prmt(index, own, 0x5504 | INDEX_AT << 4);
    return *(const float*)(tables + T::SQUARES_AT + at);
  }

  // One group of the piece to codes. Returns the norm of row 2 t + g % 2 of the tile and the square of that of its levels.
  INLINE float2 encode(const char* next, u32 (*codes)[2], int group) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    bool second = g & 1;
    float y[CHUNKS][8], squares[LOCAL];
    turn(y, group);
    fetch(next, group);
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
    float own = sum_of<LOCAL>(squares);  // of row 2 t + g % 2, as `norm` is of rows 2 t and 2 t + 1
    if constexpr (SLICES > 1) {
      if (g < 2) give(0, 2 * t + g, own);
      exchange(y);
      own = take(0, 2 * t + second);
    } else {
      butterfly<FOLD, CHUNKS>(y);
    }
    own *= (float)T::FOLDS / C::GROUP;  // what is turned after the sum makes squares that much larger
    float other = __shfl_xor_sync(~0u, own, 4);
    if (HALVES == 2) {
      own = other = own + other;
#pragma unroll
      for (int i = 0; i < CHUNKS * 4; ++i) {
        float &a = y[i / 4][i % 4 * 2], &b = y[i / 4][i % 4 * 2 + 1], difference = a - b;
        a = a + b, b = difference;
      }
    }
    float norm[2] = {second ? other : own, second ? own : other};
    float root[2], factor[2];  // factor: what turns y into z * scale
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float inverse = rsqrt_near(norm[k]);
      root[k] = norm[k] > TINY * TINY && norm[k] <= LARGEST ? inverse : 0.0f;
      factor[k] = root[k] * C::reach();
    }
    // infinity times 0 is no number
    if (__any_sync(~0u, !(norm[0] <= LARGEST) || !(norm[1] <= LARGEST))) {
#pragma unroll
      for (int i = 0; i < CHUNKS * 8; ++i)
        if (!(norm[i % 2] <= LARGEST)) y[i / 8][i % 8] = 0.0f;
    }
    const float4* others = (const float4*)(tables + T::BEGIN_AT) + g;
    const u32* flips = (const u32*)(tables + T::FLIPS_AT) + g;
    int first = SLICES > 1 ? part / SLICES * SLICES * CHUNKS : 0;  // chunk of the group, as the row counts them
    auto of_group = [&](int q, int k) { return SLICES > 1 ? chunk(0, q) - first : HALVES == 2 ? k * CHUNKS + q : q; };
    float total[SUMS][2] = {};
    int whole[2] = {};
    auto indices = [&](int q, int k) {
      float4 begin = make_float4(C::begin(), C::begin(), C::begin(), C::begin());
      if (T::AFTER) begin = AT_HAND ? begins[q] : others[of_group(q, k) * 8];
      const float from[] = {begin.x, begin.y, begin.z, begin.w};
      u32 index[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        index[i] = index_of(y[q][2 * i + k], factor[k], from[i]);
        if (!T::BYTES) total[SUMS > 1 ? q % FOLD / OWN : 0][HALVES == 2 ? 0 : k] += square_of(index[i]);
      }
      return bytes_of<INDEX_AT>(index);
    };
    constexpr int WORDS = CHUNKS / (1 + T::BYTES);
#pragma unroll
    for (int j = 0; j < 2 * WORDS; ++j) {
      int i = HALVES == 2 ? j % WORDS : j / 2, k = HALVES == 2 ? j / WORDS : j % 2;
      if constexpr (T::BYTES) {
        int q = T::APART == 1 ? 2 * i : i;
        u32 pair = indices(q + T::APART, k) * 16 + indices(q, k);
        pair = codes_of<C, 4>(pair, T::AFTER ? flips[i * 8] : 0);
        whole[k] = squares_of<C>(pair, whole[k]);
        if (T::PAIRED) codes[i][k] = pair;
        else codes[q][k] = pair & 0x0F0F0F0F, codes[q + 1][k] = pair >> 4 & 0x0F0F0F0F;
      } else {
        codes[i][k] = codes_of<C, 8>(indices(i, k), T::AFTER ? flips[of_group(i, k) * 8] : 0);
      }
    }
    float levels;
    if constexpr (T::BYTES) {
      levels = (float)sum_of_rows(whole[0], whole[1]) * (C::step() * C::step());
    } else {
      float sums_of_levels[SUMS];
#pragma unroll
      for (int f = 0; f < SUMS; ++f) sums_of_levels[f] = sum_of_rows(total[f][0], total[f][HALVES == 2 ? 0 : 1]);
      levels = sum_of<SUMS>(sums_of_levels);
    }
    float inverse = second ? root[1] : root[0];
    if (SLICES > 1 && g < 2) give(1, 2 * t + g, levels);
    // nothing is left of a square that is too small
    return make_float2(inverse > 0.0f ? own * inverse : own, levels);
  }

  // The codes of a group, or of all groups from it on, a byte each, to shared memory.
  template <int N>
  INLINE void put(char* bytes, int group, const u32 (&codes)[N][2]) const {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int q = 0; q < N; ++q)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        char* at = bytes + (2 * t + k) * T::PITCH + chunk(group, q) * 32 + 2 * g;
        *(u16*)at = (u16)codes[q][k], *(u16*)(at + 16) = (u16)(codes[q][k] >> 16);
      }
  }
  // Scales of one group, of TILES tiles that follow each other or of the `rows` that are left of them. As many lanes as a tile
  // has rows have what `encode` returned for it.
  template <int TILES>
  INLINE void store_scales(const Target* targets, int rows, int group, float2 norms) const {
    int lane = threadIdx.x % 32, row = HALVES == 2 ? lane : lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2;
    if (row < rows && row < TILES * T::ROWS && part % SLICES == 0)
      store_scale<C>(targets[row].scale, part / SLICES * T::GROUPS + group, norms.x * rsqrt_near(norms.y));
  }
};

// The fields of WIDTH bits where one lane or two have all codes of a word: of values 2 g and 2 g + 1, those 16 on are in other
// words, or in other planes of the same.
template <class C, int WIDTH, int LANES>
INLINE void pack_own(const u32 (&codes)[Tile<C>::WORDS][2], char* const (&to)[2], int rows) {
  using T = Tile<C>;
  constexpr int CHUNKS = T::CHUNKS, APART = T::APART, PLANES = 16 / WIDTH, LOW = C::BITS & ~(2 * WIDTH - 1);
  constexpr int START = C::PADDED * LOW / 8, ALIGN = (C::ALIGN | START) & -(C::ALIGN | START);
  constexpr int WORDS = C::PADDED * WIDTH / 16, EACH = WORDS < 32 ? 1 : WORDS / 32, STEP = WORDS < 32 ? 32 / WORDS : 1;  // planes of a chunk
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int c = 0; c < EACH; ++c) {
    constexpr int MINE = 2 / T::HALVES;  // rows of a lane
    u32 words[MINE][2];  // of values 2 g and 2 g + 1, and 16 on
#pragma unroll
    for (int k = 0; k < MINE; ++k) {
      u32 half[2] = {};  // low and high bytes of words
#pragma unroll
      for (int q = c; q < CHUNKS * T::HALVES; q += EACH) {
        int plane = q / EACH * STEP;
        if (T::PAIRED && (q & APART)) continue;  // it came with the other of its pair, four bits above it
        u32 x = codes[T::PAIRED ? (APART == 1 ? q / 2 : q / 4 * 2 + q % 2) : q % CHUNKS][k + q / CHUNKS] >> LOW;
        if (WIDTH != C::BITS) x &= (T::PAIRED ? 0x11111111u : 0x01010101u) * ((1 << WIDTH) - 1);
        half[plane / (PLANES / 2)] |= x << WIDTH * (plane % (PLANES / 2));
      }
#pragma unroll
      for (int i = 0; i < 2 && STEP > 1; ++i) half[i] |= half[i] >> (16 - WIDTH * STEP / 2);
      words[k][0] = prmt(half[0], half[1], 0x5140), words[k][1] = prmt(half[0], half[1], 0x7362);
    }
    if constexpr (LANES == 1) {
#pragma unroll
      for (int k = 0; k < MINE; ++k) {
        if (MINE * t + k >= rows) continue;
        char* at = to[k] + START + 64 * c + 4 * g;
        store<ALIGN>(at, {words[k][0]});
        if (STEP == 1) store<ALIGN>(at + 32, {words[k][1]});
      }
    } else {
      int own = g / 4, row = 2 * t + own;  // lanes g and g ^ 4 have a plane each
      u32 keep = (own ? words[1][0] : words[0][0]) << WIDTH * own, give = (own ? words[0][0] : words[1][0]) << WIDTH * own;
      keep |= __shfl_xor_sync(~0u, give, 16);
      if (row < rows) store<ALIGN>((own ? to[1] : to[0]) + START + 4 * (g % 4), {keep});
    }
  }
}

template <class C, int WIDTH>
INLINE void pack_field(
    const u32 (&codes)[Tile<C>::WORDS][2], const char* bytes, const Target* targets, char* const (&own)[2], int rows) {
  constexpr int LANES = lanes_of_word<C, WIDTH>();
  if constexpr ((C::BITS & WIDTH) == 0) return;
  else if constexpr (LANES) pack_own<C, WIDTH, LANES>(codes, own, rows);
  else pack<C, WIDTH, OfTeam<C>>(bytes, targets, rows);
}

// Copies of N entries of a table; reads of all before the first write.
template <class C, int N>
INLINE void copy_entries(char* to, const u32* entries) {
  constexpr int COUNT = 32 * Tile<C>::WARPS, COPIES = C::COPIES, EACH = (N * COPIES + COUNT - 1) / COUNT;
  u32 x[EACH + 1];
#pragma unroll
  for (int j = 0; j < EACH; ++j) x[j] = __ldg(entries + min((int)threadIdx.x + j * COUNT, N * COPIES - 1) / COPIES);
#pragma unroll
  for (int j = 0, i = threadIdx.x; j < EACH; ++j, i += COUNT)
    if (i < N * COPIES) *(u32*)(to + i / COPIES * Tile<C>::ENTRY + i % COPIES * 4) = x[j];
}

// The tables of a block, of which `from` has one copy of each entry.
template <class C>
INLINE void fill_tables(char* tables, const char* from) {
  using T = Tile<C>;
  if (threadIdx.x >= 32 * T::WARPS) return;
  for (int i = threadIdx.x; i < T::CELLS_AT / 16; i += 32 * T::WARPS) copy_async_cached<16>(shared_address(tables) + 16 * i, from + 16 * i);
  commit_copies();
  copy_entries<C, T::CELLS>(tables + T::CELLS_AT, (const u32*)(from + T::CELLS_AT));
  copy_entries<C, T::SQUARES>(tables + T::SQUARES_AT, (const u32*)(from + T::CELLS_AT) + T::CELLS);
  wait_copies<0>();
}

template <class C>
INLINE void append_tiles(const Append& p, const Append::One& side, u32 block) {
  using T = Tile<C>;
  extern __shared__ __align__(16) char shared[];
  fill_tables<C>(shared, side.table);
  wait_for_earlier_kernels();  // not for the table, which none of them writes
  static_assert(T::TEAMS_AT + T::TEAMS * Team<C>::SIZE == C::SHARED, "the bytes of turned.py");
  static_assert(!T::PAIRED || !Fields<C>::BYTES, "pairs of codes are packed from registers");
  u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = warp / T::TEAM, part = warp % T::TEAM;
  u32 index = block * T::TEAMS + team, first = index * side.each + (index < side.rest ? index : side.rest);  // tile
  u32 end = first + side.each + (index < side.rest);
  bool works = warp < T::WARPS && first < end;
  char* own = shared + T::TEAMS_AT + team * Team<C>::SIZE;
  Target* targets = (Target*)(own + Team<C>::TARGETS_AT);
  Share<C> share(shared, own, part);
  const char* from = nullptr;
  int ahead = 0;  // tokens from the lane's on that follow it in memory
  // A row per lane, of a batch of tiles, `after` the one before: mostly as many tokens further. The first warp writes targets, from
  // `at` on: of a batch that comes, while others may be one tile behind.
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
    u64 row = __shfl_sync(~0u, (u64)from, tile * T::ROWS + lane / 4 / T::HALVES);
    return (const char*)row + lane / 4 % T::HALVES * C::PADDED + lane % 4 * 16;
  };
  if (works) {
    locate(first, 0, false);
    sync_team<C>();
#pragma unroll
    for (int group = 0; group < T::GROUPS; ++group) share.fetch(row_of(0), group);
  }
  __syncthreads();
  if (!works) return;
  share.make_matrices();
  char* bytes = own + Team<C>::CODES_AT;
  for (u32 now = 0; first < end; first += T::BATCH, now ^= 32) {
    u32 tiles = end - first < T::BATCH ? end - first : T::BATCH;
    float2 norms;
#pragma unroll 1
    for (u32 tile = 0; tile < tiles; ++tile) {
      const char* then = nullptr;
      if (tile + 1 < tiles) {
        then = row_of(tile + 1);
      } else if (first + T::BATCH < end) {
        locate(first + T::BATCH, now ^ 32, true);
        then = row_of(0);
      }
      __syncwarp();
      const Target* to = targets + now + tile * T::ROWS;
      int left = p.rows - (first + tile) * T::ROWS, rows = left < T::ROWS ? left : T::ROWS;
      u32 codes[T::WORDS][2];
      auto keep = [&](int group, float2 found) {
        if (T::GROUPS > 1) share.template store_scales<1>(to, rows, group, found);
        else if (lane / T::ROWS == tile) norms = found;
      };
      if constexpr (Fields<C>::OWN) {
#pragma unroll
        for (int group = 0; group < T::GROUPS; ++group) {
          wait_copies<T::GROUPS - 1>();
          __syncwarp();  // for what other lanes have copied
          keep(group, share.encode(then, codes + group * (T::WORDS / T::GROUPS), group));
        }
        if constexpr (Fields<C>::BYTES) share.put(bytes, 0, codes);
      } else {
#pragma unroll
        for (int group = 0; group < T::GROUPS; ++group) {
          u32 part_codes[T::GROUP_CHUNKS][2];
          wait_copies<T::GROUPS - 1>();
          __syncwarp();  // for what other lanes have copied
          keep(group, share.encode(then, part_codes, group));
          share.put(bytes, group, part_codes);
        }
      }
      if constexpr (Fields<C>::BYTES) sync_team<C>();
      if constexpr (T::SLICES > 1)
        if (lane / T::ROWS == tile) norms.y = share.take(1, lane % 4 * 2 + lane / 4 % 2);
      constexpr int MINE = 2 / T::HALVES;  // rows that the lane has
      char* const mine[] = {to[lane % 4 * MINE].words, to[lane % 4 * MINE + MINE - 1].words};
      pack_field<C, 8>(codes, bytes, to, mine, rows);
      pack_field<C, 4>(codes, bytes, to, mine, rows);
      pack_field<C, 2>(codes, bytes, to, mine, rows);
      pack_field<C, 1>(codes, bytes, to, mine, rows);
      if (Team<C>::CODES > 1) bytes = own + Team<C>::CODES_AT + (bytes == own + Team<C>::CODES_AT) * T::ROWS * T::PITCH;
      else __syncwarp();
    }
    u32 left = p.rows - first * T::ROWS;
    if (T::GROUPS == 1) share.template store_scales<T::BATCH>(targets + now, left < tiles * T::ROWS ? left : tiles * T::ROWS, 0, norms);
  }
}
