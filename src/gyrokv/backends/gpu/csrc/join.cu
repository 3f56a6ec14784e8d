// Two results of attention over different keys become one, in place: out and lse take in part and part_lse. A block per row.
#include "params.cuh"

struct Join {
  float* out;  // [B, Hq, Tq, dim], contiguous in dim
  float* lse;  // [B, Hq, Tq]
  const float* part;
  const float* part_lse;                      // of tokens tokens, contiguous
  i64 out_batch, out_head, out_token;         // elements
  i64 lse_batch, lse_head;
  int heads, tokens, dim;
};

extern "C" __global__ void join(const __grid_constant__ Join p) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  i64 row = blockIdx.x;
  int token = (int)(row % p.tokens), head = (int)(row / p.tokens % p.heads);
  i64 batch = row / p.tokens / p.heads;
  float* lse = p.lse + batch * p.lse_batch + head * p.lse_head + token;
  float a = *lse, b = p.part_lse[row], most = fmaxf(a, b);
  if (b == -INFINITY) return;
  float x = __expf(a - most), y = __expf(b - most), share = 1.0f / (x + y);
  x *= share, y *= share;
  float* out = p.out + batch * p.out_batch + head * p.out_head + token * p.out_token;
  const float* part = p.part + row * p.dim;
  for (int d = threadIdx.x * 4; d < p.dim; d += blockDim.x * 4) {
    float4 u = *(const float4*)(out + d), v = *(const float4*)(part + d);
    *(float4*)(out + d) = make_float4(u.x * x + v.x * y, u.y * x + v.y * y, u.z * x + v.z * y, u.w * x + v.w * y);
  }
  __syncthreads();
  if (threadIdx.x == 0) *lse = most + __logf(1.0f / share);
}
