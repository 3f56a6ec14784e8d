// The results of splits, and learned sinks, as one softmax. A block per row; the host defines SPLITS, the most there are.
#include "params.cuh"

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
  __shared__ float factors[SPLITS];
  wait_for_earlier_kernels();
  let_later_kernels_start();
  i64 row = blockIdx.x;
  const float* parts = p.part + row * p.splits * p.dim;
  const float2* tops = p.top + row * p.splits;
  float early[EARLY];  // parts of the first dim, on their way while the factors are made
#pragma unroll
  for (int i = 0; i < EARLY; ++i) early[i] = i < p.splits && threadIdx.x < p.dim ? parts[(i64)i * p.dim + threadIdx.x] : 0.0f;
  int head = (int)(row / p.q_len % p.q_heads), lane = threadIdx.x % 32;
  float sink = p.sinks ? p.sinks[head] * 1.4426950408889634f : -INFINITY, most = sink, total = 0.0f;
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
  total = over_warp(total, false) + exp2f(sink - reference);
  __syncthreads();
  for (int d = threadIdx.x; d < p.dim; d += blockDim.x) {
    float sum = 0.0f;
    if (d == threadIdx.x) {
#pragma unroll
      for (int i = 0; i < EARLY; ++i) sum += early[i] * factors[i];
    }
#pragma unroll 16
    for (int i = d == threadIdx.x ? EARLY : 0; i < p.splits; ++i) sum += parts[(i64)i * p.dim + d] * factors[i];
    p.out[row * p.dim + d] = total > 0.0f ? sum / total : 0.0f;
  }
  if (threadIdx.x == 0) p.lse[row] = most == -INFINITY ? -INFINITY : (most + log2f(total)) * 0.6931471805599453f;
}
