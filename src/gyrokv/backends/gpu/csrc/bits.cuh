// Scores of keys of 2 bits without looking codes up: products of bits with bits.
//
// A code is a sign and a magnitude, so with the lower bit flipped where the sign is set its level is a constant plus a
// multiple of each bit, and a score a sum of multiples of q where bits are set. These multiples are integers of PLANES_Q bits in
// two's complement. A product counts where bits of 16 keys meet one bit of these multiples, over all dims: its 8 columns
// are two bits of four query rows, or one bit of eight. A row's words are operands as they lie in memory; if it has several scales, bytes or nibbles change places.
#pragma once
#include "score.cuh"

constexpr int PLANES_Q = 14;                          // bits of a multiple of q
constexpr float BITS_LARGEST = 8191.0f;               // of a multiple
constexpr int BITS_REGISTERS = KShare::CHUNKS * KShare::VEC;  // of a row, per lane
constexpr int BITS_TAKEN = BITS_REGISTERS / K::GROUPS;        // of one scale: one or two, 32 bits each
constexpr int BITS_PRODUCTS = PLANES_Q * PER_LANE / 2;        // per scale
constexpr int STAGED_AT = RING_AT - ALL_ROWS * DK * 4;        // multiples of q [row][DK]: low half for bits 0, high half for bits 1
static_assert(K::BITS == 2 && (K::GROUPS == 1 || K::GROUPS == 2 || K::GROUPS == 4) && BITS_TAKEN >= 1 && BITS_TAKEN <= 2 &&
              (K::GROUPS == 1 || K::SPAN == 128) && BITS_TAKEN * K::GROUPS == BITS_REGISTERS && COLUMNS == 1 && TERMS == 2,
              "rows of bits");

// dim of bits 2 at, 2 at + 1 of a scale's i-th register in lane t of four
INLINE int dim_of_bits(int group, int i, int t, int at) {
  if (K::GROUPS == 1) return K::dim(2 * (t * KShare::VEC + i) + at / 8, at % 8);
  int half = at / 4 % 2;
  if (K::GROUPS == 2) return K::dim(2 * (t * 4 + 2 * i + at / 8) + half, 4 * group + at % 4);
  return K::dim(32 * i + 8 * t + 2 * (at / 8 * 2 + at / 2 % 2) + half, 2 * group + at % 2);
}

// A row's registers of one lane, by scale
INLINE void by_scale(const u32 (&x)[BITS_REGISTERS], u32 (&y)[K::GROUPS][BITS_TAKEN]) {
#pragma unroll
  for (int i = 0; i < BITS_TAKEN; ++i) {
    if constexpr (K::GROUPS == 1) {
      y[0][i] = x[i];
    } else if constexpr (K::GROUPS == 2) {
      y[0][i] = prmt(x[2 * i], x[2 * i + 1], 0x6420), y[1][i] = prmt(x[2 * i], x[2 * i + 1], 0x7531);
    } else {
      u32 even[2], odd[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) pair_nibbles(x[4 * i + 2 * m], x[4 * i + 2 * m + 1], even[m], odd[m]);
      y[0][i] = prmt(even[0], even[1], 0x6420), y[1][i] = prmt(odd[0], odd[1], 0x6420);
      y[2][i] = prmt(even[0], even[1], 0x7531), y[3][i] = prmt(odd[0], odd[1], 0x7531);
    }
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
    int row = row_of(0, PER_LANE == 2 ? column % 2 : 0, column / 2), plane = PER_LANE == 2 ? product : 2 * product + column % 2;
    u32 word = 0;
    if (i < BITS_TAKEN && 2 * (t * KShare::VEC + i) < K::WORDS)
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

// s[tile][0][2 * (token / 8) + i] of a tile of slots, times 2**-36
INLINE void score_bits(float (&s)[TILES][COLUMNS][4], u32 ring, const char* memory, const KScales (&scales)[TILES][2],
                       const float (&centres)[K::GROUPS][PER_LANE], int lane) {
  int g = lane / 4, t = lane % 4;
  u32 q_at = shared_address(memory + Q_AT) + lane * 8, a[TILES][2][K::GROUPS][BITS_TAKEN];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u32 x[BITS_REGISTERS];
#pragma unroll
      for (int chunk = 0; chunk < KShare::CHUNKS; ++chunk) {
        int j = min(chunk * KShare::SIZE + t * 2 * KShare::VEC, K::WORDS - 2 * KShare::VEC);
        u32 z[1][KShare::VEC];
        load_pairs<K, KShare::VEC>(ring + (tile * 16 + half * 8 + g) * K_PITCH, j, z);
#pragma unroll
        for (int i = 0; i < KShare::VEC; ++i) x[chunk * KShare::VEC + i] = z[0][i] ^ (z[0][i] >> 1 & 0x55555555);
      }
      by_scale(x, a[tile][half]);
      s[tile][0][2 * half] = s[tile][0][2 * half + 1] = 0.0f;
    }
#pragma unroll
  for (int group = 0; group < K::GROUPS; ++group) {
    float sum[TILES][2][PER_LANE];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) sum[tile][half][i] = centres[group][i];
#pragma unroll
    for (int product = 0; product < BITS_PRODUCTS; ++product) {
      u32 b[2];
      load_shared<2>(q_at + (group * BITS_PRODUCTS + product) * 256, b);
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        int c[4] = {0, 0, 0, 0};
        auto& x = a[tile][0][group];
        auto& y = a[tile][1][group];
        mma_b1(c, x[0], y[0], BITS_TAKEN > 1 ? x[BITS_TAKEN - 1] : 0, BITS_TAKEN > 1 ? y[BITS_TAKEN - 1] : 0, b[0], b[1]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& to = sum[tile][e / 2][PER_LANE == 2 ? e % 2 : 0];
          to = fmaf(__int_as_float(c[e]), worth(PER_LANE == 2 ? product : 2 * product + e % 2), to);
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) s[tile][0][2 * half + i] += sum[tile][half][i] * scales[tile][half].at(group);
  }
}
