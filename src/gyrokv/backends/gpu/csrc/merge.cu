// The results of splits, and learned sinks, as one softmax; the output's rotation back.
// A block of a thread per dim for each row. The host defines SPLITS (the most there are), OUT_TYPE (0 f16, 1 bf16, 2 f32),
// DIM (of a row), TURN (the block of the rotation, or 0).
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

INLINE void store(const Merge& p, i64 row, int d, float x) {
  i64 at = row * p.out_dim + d;
  if (OUT_TYPE == 2) ((float*)p.out)[at] = x;
  else ((u16*)p.out)[at] = OUT_TYPE == 1 ? bf16x2(x, 0.0f) : f16x2(x, 0.0f);
}

extern "C" __global__ void merge(const __grid_constant__ Merge p) {
  __shared__ float factors[SPLITS];
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
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < EARLY; ++i) sum += early[i] * factors[i];
  if (d < DIM)
#pragma unroll 16
    for (int i = EARLY; i < p.splits; ++i) sum += parts[(i64)i * DIM] * factors[i];
  sum = total > 0.0f ? sum / total : 0.0f;
  if (d == 0) p.lse[row] = most == -INFINITY ? -INFINITY : (most + log2f(total)) * 0.6931471805599453f;
  if constexpr (TURN > 0) {
    __shared__ float sums[DIM];
    if (d < DIM) sums[d] = sum;
    __syncthreads();
    if (d >= 32) return;
    float x[DIM / 32];
#pragma unroll
    for (int j = 0; j < DIM / 32; ++j) x[j] = sums[lane + 32 * j];
    turn_row<TURN>(x, p.signs, lane);
#pragma unroll
    for (int j = 0; j < DIM / 32; ++j)
      if (lane + 32 * j < p.out_dim) store(p, row, lane + 32 * j, x[j]);
  } else {
    if (d < p.out_dim) store(p, row, d, sum);
  }
}
