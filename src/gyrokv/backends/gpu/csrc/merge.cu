// The results of splits, and learned sinks, as one softmax.
#include "params.cuh"

extern "C" __global__ void merge(const __grid_constant__ Merge p) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  i64 row = blockIdx.x;
  const float2* top = p.top + row * p.splits;
  int head = (int)(row / p.q_len % p.q_heads);
  float sink = p.sinks ? p.sinks[head] * 1.4426950408889634f : -INFINITY, most = sink;
  for (int i = 0; i < p.splits; ++i) most = fmaxf(most, top[i].x);
  float reference = most == -INFINITY ? 0.0f : most, total = exp2f(sink - reference);
  for (int i = 0; i < p.splits; ++i) total += top[i].y * exp2f(top[i].x - reference);
  for (int d = threadIdx.x; d < p.dim; d += blockDim.x) {
    float sum = 0.0f;
    for (int i = 0; i < p.splits; ++i) sum += p.part[(row * p.splits + i) * p.dim + d] * exp2f(top[i].x - reference);
    p.out[row * p.dim + d] = total > 0.0f ? sum / total : 0.0f;
  }
  if (threadIdx.x == 0) p.lse[row] = most == -INFINITY ? -INFINITY : (most + log2f(total)) * 0.6931471805599453f;
}
