// Rows through a rotation, for the kernels of many queries: a warp per row.
// The host defines IN_TYPE and OUT_TYPE (0 f16, 1 bf16, 2 f32), DIM (of a row, whole blocks), TURN (the block). Launch: 8 warps a block.
#include "turn.cuh"

struct Turn {
  const char* from;         // [batch, head, token, from_dim]
  char* to;                 // [rows, to_dim]
  i64 batch, head, token;   // of from, elements
  u32 heads, tokens, rows;  // rows: batch * heads * tokens
  int from_dim, to_dim;     // values in memory: DIM or fewer
  SignBits signs;
};

INLINE float load(const char* from, i64 at) {
  if (IN_TYPE == 2) return ((const float*)from)[at];
  u32 x = ((const u16*)from)[at];
  return IN_TYPE == 1 ? f32_of_bf16(x) : f32_of_f16(x);
}

extern "C" __global__ void __launch_bounds__(256) turn(const __grid_constant__ Turn p) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  u32 row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= p.rows) return;
  u32 rest = row / p.tokens, batch = rest / p.heads;
  i64 from = batch * p.batch + (rest - batch * p.heads) * p.head + (row - rest * p.tokens) * p.token;
  float x[DIM / 32];
#pragma unroll
  for (int j = 0; j < DIM / 32; ++j) {
    int d = lane + 32 * j;
    x[j] = d < p.from_dim ? load(p.from, from + d) : 0.0f;
  }
  turn_row<TURN>(x, p.signs, lane);
#pragma unroll
  for (int j = 0; j < DIM / 32; ++j) {
    int d = lane + 32 * j;
    i64 at = (i64)row * p.to_dim + d;
    if (d >= p.to_dim) break;
    if (OUT_TYPE == 2) ((float*)p.to)[at] = x[j];
    else ((u16*)p.to)[at] = OUT_TYPE == 1 ? bf16x2(x[j], 0.0f) : f16x2(x[j], 0.0f);
  }
}
