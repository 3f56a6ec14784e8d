// The results of splits, and learned sinks, as one softmax; the output's rotation back.
// A block of a thread per dim for each row. The host defines SPLITS (the most there are), OUT_TYPE (0 f16, 1 bf16, 2 f32),
// DIM (of a row), V_TURN (the block of the rotation, or 0).
#include "finish.cuh"

constexpr int EARLY = 16;

INLINE float over_warp(float x, bool most) {
#pragma unroll
  for (int i = 16; i; i /= 2) {
    float y = __shfl_xor_sync(~0u, x, i);
    x = most ? fmaxf(x, y) : x + y;
  }
  return x;
}

extern "C" __global__ void merge(const __grid_constant__ Merge p) {
  __shared__ float factors[SPLITS], sums[DIM];
  let_later_kernels_start();  // they wait, in turn, for this one's end
  touch(p, shared_address(factors));
  wait_for_earlier_kernels();
  i64 row = blockIdx.x;
  int d = threadIdx.x;
  const float* parts = p.part + row * p.splits * DIM + d;
  const float2* tops = p.top + row * p.splits;
  float early[EARLY];  // parts on their way while the factors are made
#pragma unroll
  for (int i = 0; i < EARLY; ++i) early[i] = i < p.splits && d < DIM ? parts[(i64)i * DIM] : 0.0f;
  int lane = threadIdx.x % 32;
  float most = -INFINITY, total = 0.0f;
  float2 top[SPLITS / 32];
#pragma unroll
  for (int i = 0; i < SPLITS / 32; ++i) {  // in every warp alike
    top[i] = i * 32 + lane < p.splits ? tops[i * 32 + lane] : make_float2(-INFINITY, 0.0f);
    most = fmaxf(most, top[i].x);
  }
  most = over_warp(most, true);
  float reference = most == -INFINITY ? 0.0f : most;
#pragma unroll
  for (int i = 0; i < SPLITS / 32; ++i) {
    float factor = exp2f(top[i].x - reference);
    total += top[i].y * factor;
    if (threadIdx.x < 32) factors[i * 32 + lane] = factor;
  }
  total = over_warp(total, false);
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < EARLY; ++i) sum += early[i] * factors[i];
  if (d < DIM) {
#pragma unroll 16
    for (int i = EARLY; i < p.splits; ++i) sum += parts[(i64)i * DIM] * factors[i];
    sums[d] = sum;
  }
  __syncthreads();
  if (d >= 32) return;
  float x[(DIM + 31) / 32];
#pragma unroll
  for (int j = 0; j < (DIM + 31) / 32; ++j) x[j] = lane + 32 * j < DIM ? sums[lane + 32 * j] : 0.0f;
  finish_row<OUT_TYPE, V_TURN>(p.finish, row, (int)(row / p.q_len % p.q_heads), x, most, total, lane);
}
