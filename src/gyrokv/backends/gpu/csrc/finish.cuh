// The end of a row: sinks, the division by the sum of weights, the rotation back, and what callers see.
#pragma once
#include "params.cuh"

// x: lane i has values i, i + 32, ... of DIM, as sums relative to exp2(most); total: the sum of weights. row: of the output.
// TYPE: of the output (0 f16, 1 bf16, 2 f32). TURN: the block of the rotation, or 0
template <int TYPE, int TURN, int N>
INLINE void finish_row(const Finish& f, i64 row, int head, float (&x)[N], float most, float total, int lane) {
  float sink = f.sinks ? f.sinks[head] * 1.4426950408889634f : -INFINITY, top = fmaxf(most, sink);
  float reference = top == -INFINITY ? 0.0f : top, factor = exp2f(most - reference);
  total = total * factor + exp2f(sink - reference);
  factor = total > 0.0f ? factor / total : 0.0f;
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] *= factor;
  if (lane == 0) f.lse[row] = top == -INFINITY ? -INFINITY : (top + log2f(total)) * 0.6931471805599453f;
  if constexpr (TURN > 0) turn_row<TURN>(x, f.signs, lane);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    int d = lane + 32 * j;
    if (d >= f.out_dim) break;
    i64 at = row * f.out_dim + d;
    if (TYPE == 2) ((float*)f.out)[at] = x[j];
    else ((u16*)f.out)[at] = TYPE == 1 ? bf16x2(x[j], 0.0f) : f16x2(x[j], 0.0f);
  }
}
