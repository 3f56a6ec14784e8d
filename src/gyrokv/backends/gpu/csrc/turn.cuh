// Rotations of a row that a warp holds (rotation.py): y = after * (H(before * x) / sqrt(BLOCK)) on blocks of BLOCK values.
// Lane l has values l + 32 j in x[j]. H is the Walsh-Hadamard butterfly, any order of strides.
#pragma once
#include "ptx.cuh"

struct SignBits {  // of values 32 j to 32 j + 31 in word j, bit 1: -1
  u32 before[20], after[20];
};

INLINE float flip(float x, u32 signs, int lane) { return __uint_as_float(__float_as_uint(x) ^ (signs >> lane << 31)); }

template <int BLOCK, int N>
INLINE void turn_row(float (&x)[N], const SignBits& signs, int lane) {
  static_assert(BLOCK >= 32 && (BLOCK & (BLOCK - 1)) == 0 && N * 32 % BLOCK == 0, "whole blocks of a power of two");
  constexpr float FACTOR[] = {0.17677669f, 0.125f, 0.088388346f, 0.0625f, 0.044194173f};  // 1 / sqrt(32 .. 512)
  constexpr int AT = BLOCK / 64 >= 8 ? 4 : BLOCK / 64 >= 4 ? 3 : BLOCK / 64 >= 2 ? 2 : BLOCK / 64;
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = flip(x[j], signs.before[j], lane);
#pragma unroll
  for (int h = 1; h < BLOCK / 32; h *= 2)
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (!(j & h)) {
        float a = x[j], b = x[j + h];
        x[j] = a + b, x[j + h] = a - b;
      }
#pragma unroll
  for (int h = 1; h < 32; h *= 2)
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = __shfl_xor_sync(~0u, x[j], h) + (lane & h ? -x[j] : x[j]);
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = flip(x[j] * FACTOR[AT], signs.after[j], lane);
}
