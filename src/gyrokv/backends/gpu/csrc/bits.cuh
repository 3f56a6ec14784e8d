// Scores of keys of 2 bits without looking codes up: products of bits with bits.
//
// A code is a sign and a magnitude, so with the lower bit flipped where the sign is set its level is a constant plus a
// multiple of each bit, and a score a sum of multiples of q where bits are set. These multiples are integers of PLANES_Q bits in
// two's complement. A product counts where bits of 16 keys meet one bit of these multiples, over 128 dims: its 8 columns
// are two bits of four query rows. Rows of 512 values have four scales, whose codes nibbles are gathered by; there this is
// faster than lookups by 11 %, in shorter rows it is not.
#pragma once
#include "score.cuh"

constexpr int PLANES_Q = 14;                      // bits of a multiple of q
constexpr float BITS_LARGEST = 8191.0f;           // of a multiple
constexpr int BITS_PRODUCTS = PLANES_Q / 2;       // per scale
constexpr int STAGED_AT = RING_AT - 4 * DK * 4;   // multiples of q [row][DK]: low half for bits 0, high half for bits 1
static_assert(K::BITS == 2 && DK == 512 && K::SPAN == 128 && KShare::CHUNKS == 2 && KShare::VEC == 4 && PER_LANE == 1, "rows of bits");

// dim of bits 2 at, 2 at + 1 of a scale's i-th register in lane t of four
INLINE int dim_of_bits(int group, int i, int t, int at) {
  return K::dim(32 * i + 8 * t + 2 * (at / 8 * 2 + at / 2 % 2) + at / 4 % 2, 2 * group + at % 2);
}

// A lane's registers of a row, by scale: a scale's codes are a nibble of each word
INLINE void by_scale(const u32 (&x)[2][4], u32 (&y)[4][2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    u32 even[2], odd[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) pair_nibbles(x[i][2 * m], x[i][2 * m + 1], even[m], odd[m]);
    y[0][i] = prmt(even[0], even[1], 0x6420), y[1][i] = prmt(odd[0], odd[1], 0x6420);
    y[2][i] = prmt(even[0], even[1], 0x7531), y[3][i] = prmt(odd[0], odd[1], 0x7531);
  }
}

// q as operands: [scale][product][lane] of two registers. centres[scale][row]: less half of all multiples
INLINE void fill_bits(char* shared, const Attend& p, const Early& early, float* norms, float (*centres)[ALL_ROWS]) {
  int lane = threadIdx.x % 32;
  int level[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) level[i] = (int)(p.k_low << (24 - 8 * i)) >> 24;
  int lower = level[1] - level[0], upper = level[3] - level[0];
  float largest = BITS_LARGEST / (float)max(abs(lower), abs(upper));
  u32* staged = (u32*)(shared + STAGED_AT);
#pragma unroll
  for (int i = 0; i < Early::MINE; ++i) {
    int row = threadIdx.x / 32 + i * WARPS;
    if (row >= ALL_ROWS) break;
    float x[Early::N], most = 0.0f;
    int sums[K::GROUPS] = {};
    turned_row(x, early.x[i], p, lane);
#pragma unroll
    for (float value : x) most = fmaxf(most, fabsf(value));
    most = over_lanes(most);
    float norm = most > 0.0f ? largest / fmaxf(most, 1e-30f) : 1.0f;
    if (lane == 0) norms[row] = norm;
#pragma unroll
    for (int j = 0; j < Early::N; ++j) {
      int low = __float2int_rn(x[j] * norm * lower), high = __float2int_rn(x[j] * norm * upper);
      staged[row * DK + lane + 32 * j] = (u32)(high << 16) | (low & 0xFFFF);
      sums[32 * j / K::SPAN] += low + high;
    }
#pragma unroll
    for (int group = 0; group < K::GROUPS; ++group) {
#pragma unroll
      for (int j = 16; j; j /= 2) sums[group] += __shfl_xor_sync(~0u, sums[group], j);
      if (lane == 0) centres[group][row] = (float)sums[group] * (-0.5f / 68719476736.0f);
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < K::GROUPS * BITS_PRODUCTS * 64; e += WARPS * 32) {
    int group = e / (BITS_PRODUCTS * 64), product = e / 64 % BITS_PRODUCTS, i = e % 2, t = e / 2 % 4, column = e / 8 % 8;
    int row = column / 2, plane = 2 * product + column % 2;
    u32 word = 0;
#pragma unroll
    for (int at = 0; at < 16; ++at) {
      u32 both = staged[row * DK + dim_of_bits(group, i, t, at)] >> plane & 0x00010001;
      word |= (both >> 15 | both & 1) << 2 * at;
    }
    ((u32*)(shared + Q_AT))[e] = word;
  }
}

// What a count of ones is multiplied by, as the tiny float that its bits are. The highest bit of a multiple is negative
INLINE float worth(int plane) { return __int_as_float((plane + 113 + 127) << 23) * (plane + 1 == PLANES_Q ? -1.0f : 1.0f); }

// s[tile][0][2 * (token / 8)] of a tile of slots, times 2**-36
INLINE void score_bits(float (&s)[TILES][COLUMNS][4], u32 tile_at, const char* memory, const KScales (&scales)[TILES][2],
                       const float (&centres)[4], int lane) {
  int g = lane / 4, t = lane % 4;
  u32 q_at = shared_address(memory + Q_AT) + lane * 8, a[TILES][2][4][2];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u32 x[2][4];
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
        u32 z[1][4];
        load_pairs<K, 4>(tile_at + (tile * 16 + half * 8 + g) * K_PITCH, 32 * chunk + 8 * t, z);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[chunk][i] = z[0][i] ^ (z[0][i] >> 1 & 0x55555555);
      }
      by_scale(x, a[tile][half]);
      s[tile][0][2 * half] = 0.0f;
    }
#pragma unroll
  for (int group = 0; group < 4; ++group) {
    float sum[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) sum[tile][0] = sum[tile][1] = centres[group];
#pragma unroll
    for (int product = 0; product < BITS_PRODUCTS; ++product) {
      u32 b[2];
      load_shared<2>(q_at + (group * BITS_PRODUCTS + product) * 256, b);
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        int c[4] = {0, 0, 0, 0};
        auto& x = a[tile][0][group];
        auto& y = a[tile][1][group];
        mma_b1(c, x[0], y[0], x[1], y[1], b[0], b[1]);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[tile][e / 2] = fmaf(__int_as_float(c[e]), worth(2 * product + e % 2), sum[tile][e / 2]);
      }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) s[tile][0][2 * half] += sum[tile][half] * scales[tile][half].at(group);
  }
}
