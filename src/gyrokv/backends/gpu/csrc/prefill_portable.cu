// Flash attention, forward, for many query rows on any GPU from compute capability 8.0 on (Dao 2023: each warp owns query rows
// and all of their keys), for heads whose output fits beside the scores.
//
// A warp owns TALL tiles of 16 rows: scores, weights and output stay in its registers; weights are made of scores just before
// their values are multiplied. Two tiles halve what is read from shared memory for a product.
//
// The host defines DK, DV (multiples of 16), KEYS (32, 64, 128), TALL (1, 2), WARPS, STAGES (1: keys and values take turns to be
// loaded; 2: the next block is loaded while this one is used), and the types and features that prefill.cu asks for.
// Launch: grid batches * q_heads * ceil(q_len / ROWS), block 32 * WARPS, shared memory BYTES.
constexpr int ROWS = 16 * TALL * WARPS, SPAN = KEYS;
constexpr bool ROUNDED = true;
#include "portable.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int K_AT = ROWS * DK * 2, K_BYTES = KEYS * DK * 2, V_BYTES = KEYS * DV * 2, STAGE_BYTES = K_BYTES + V_BYTES;
constexpr int BYTES = K_AT + STAGES * STAGE_BYTES;
constexpr bool KEEP_Q = TALL * DK <= 128;  // in registers
static_assert(BYTES <= 232448, "shared memory of a block");

extern __shared__ __align__(1024) char memory[];

extern "C" __global__ void __launch_bounds__(THREADS)
    prefill_portable(const __grid_constant__ Prefill p, const __grid_constant__ Operands from) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const Tile tile(p, blockIdx.x);
  if (tile.leaves_results(p)) return;
  u32 shared = shared_address(memory);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = warp * 16 * TALL, row = tile.row + first + lane / 4;
  float slope = ALIBI ? p.slopes[tile.head] : 1.0f, scale = p.scale * LOG2E;
  const char* k = from.k + tile.batch * from.k_batch + tile.kv_head * from.k_head;
  const char* v = from.v + tile.batch * from.v_batch + tile.kv_head * from.v_head;
  auto load_k = [&](int block, int stage) {
    load_rows<KEYS, DK, THREADS>(shared + K_AT + stage * STAGE_BYTES, k, from.k_token, block * KEYS, p.kv_len, from.dk);
  };
  auto load_v = [&](int block, int stage) {
    load_rows<KEYS, DV, THREADS>(shared + K_AT + stage * STAGE_BYTES + K_BYTES, v, from.v_token, block * KEYS, p.kv_len, from.dv);
  };
  Softmax softmax[TALL];
  float s[TALL][SCORES], o[TALL][DV / 2];
#pragma unroll
  for (int m = 0; m < TALL; ++m)
#pragma unroll
    for (int i = 0; i < DV / 2; ++i) o[m][i] = 0.0f;

  int block = tile.block, stage = 0;
  if (block >= 0) {
    const char* q = from.q + tile.batch * from.q_batch + tile.head * from.q_head;
    load_rows<ROWS, DK, THREADS>(shared, q, from.q_token, tile.row, p.q_len, from.dk);
    load_k(block, 0);
    if (STAGES == 2) load_v(block, 0);
    commit_copies();
    if constexpr (MASK > 0) prefetch_mask<THREADS>(p, tile, block);
  }
  const Place<DK> a(shared, first + a_row(lane), a_piece(lane));
  u32 kept[KEEP_Q ? DK / 16 : 1][TALL][4];
  if (KEEP_Q && block >= 0) {
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < DK / 16; ++i)
#pragma unroll
      for (int m = 0; m < TALL; ++m) load_matrices(a.at(32 * i) + m * 32 * DK, kept[KEEP_Q ? i : 0][m]);
  }
  while (block >= 0) {
    int next = tile.seen(block - 1);
    wait_copies<0>();
    __syncthreads();
    if constexpr (MASK > 0) prefetch_mask<THREADS>(p, tile, next);
    if (STAGES == 1) {
      load_v(block, 0);
    } else if (next >= 0) {
      load_k(next, stage ^ 1);
      load_v(next, stage ^ 1);
    }
    commit_copies();
    const u32 k_at = shared + K_AT + stage * STAGE_BYTES;
    const Place<DK> b(k_at, b_row(lane), b_piece(lane));
    const Place<DV> c(k_at + K_BYTES, a_row(lane), a_piece(lane));
#pragma unroll
    for (int m = 0; m < TALL; ++m)
#pragma unroll
      for (int i = 0; i < SCORES; ++i) s[m][i] = 0.0f;
#pragma unroll
    for (int i = 0; i < DK / 16; ++i) {
      u32 x[TALL][4];
#pragma unroll
      for (int m = 0; m < TALL; ++m) {
        if (!KEEP_Q) load_matrices(a.at(32 * i) + m * 32 * DK, x[m]);
        else
#pragma unroll
          for (int e = 0; e < 4; ++e) x[m][e] = kept[KEEP_Q ? i : 0][m][e];
      }
#pragma unroll
      for (int n = 0; n < UNITS; ++n) {
        u32 y[4];
        load_matrices(b.at(32 * i) + n * 32 * DK, y);
#pragma unroll
        for (int m = 0; m < TALL; ++m) {
          mma<BF16>(quad(s[m] + 8 * n), x[m][0], x[m][1], x[m][2], x[m][3], y[0], y[1]);
          mma<BF16>(quad(s[m] + 8 * n + 4), x[m][0], x[m][1], x[m][2], x[m][3], y[2], y[3]);
        }
      }
    }
    float most[2 * TALL];
    bool grows = false;
#pragma unroll
    for (int m = 0; m < TALL; ++m) {
      RegisterMask mask;
      if constexpr (MASK > 0) mask.load(p, tile, block, row + 16 * m, lane % 4);
      softmax[m].adjust(s[m], p, Range(p, tile, block, rows_of(tile, row + 16 * m), lane % 4), mask, slope);
      most[2 * m] = Softmax::most(s[m], p, 0), most[2 * m + 1] = Softmax::most(s[m], p, 1);
    }
#pragma unroll
    for (int i = 0; i < 2 * TALL; ++i) grows |= softmax[i / 2].passed(i % 2, most[i]);
    if (__any_sync(~0u, grows)) {
      most_of_quads(most);
#pragma unroll
      for (int i = 0; i < 2 * TALL; ++i) softmax[i / 2].raise(i % 2, most[i]);
#pragma unroll
      for (int m = 0; m < TALL; ++m)
#pragma unroll
        for (int i = 0; i < DV / 2; ++i) o[m][i] *= softmax[m].factor[i / 2 % 2];
    }
    if (STAGES == 1) {
      wait_copies<0>();
      __syncthreads();
      if (next >= 0) load_k(next, 0);
      commit_copies();
    }
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) {
      u32 w[TALL][4];
#pragma unroll
      for (int m = 0; m < TALL; ++m) softmax[m].weights(s[m], unit, scale, w[m]);
#pragma unroll
      for (int j = 0; j < DV / 16; ++j) {
        u32 y[4];
        load_transposed(c.at(32 * j) + unit * 32 * DV, y);
#pragma unroll
        for (int m = 0; m < TALL; ++m) {
          mma<V_BF16>(quad(o[m] + 8 * j), w[m][0], w[m][1], w[m][2], w[m][3], y[0], y[1]);
          mma<V_BF16>(quad(o[m] + 8 * j + 4), w[m][0], w[m][1], w[m][2], w[m][3], y[2], y[3]);
        }
      }
    }
    block = next;
    if (STAGES == 2) stage ^= 1;
  }
#pragma unroll
  for (int m = 0; m < TALL; ++m) {
    float last[2], before[2];
    softmax[m].finish(last, before, p, tile, rows_of(tile, row + 16 * m), lane % 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int at_row = row + 16 * m + 8 * r;
      i64 at = tile.batch * p.out_batch + tile.head * p.out_head + at_row * p.out_token + 2 * (lane % 4);
#pragma unroll
      for (int j = 0; j < DV / 8; ++j)
        if (at_row < p.q_len && 8 * j < p.dv)
          store(p, at + 8 * j, o[m][4 * j + 2 * r] * last[r], o[m][4 * j + 2 * r + 1] * last[r], before[r]);
    }
  }
}
