// Flash attention, forward, for many query rows on any GPU from compute capability 8.0 on, for heads whose output takes most of
// a block's registers.
//
// The two products are shared out differently. Scores: a warp takes 32 rows, half of a block's keys and, with PARTS 2, half of
// the head; warps of the two halves exchange sums through shared memory, and each goes on with 16 of the 32 rows. Values: a warp
// takes up to 64 rows and its own columns, so that values are read once; weights reach it through shared memory, in 16 bits.
// Both cost about as many cycles of shared memory as of products: what two warps read, each reads for itself.
//
// Weights are made with the reference that a row had before this block. Only if a maximum has passed it by 2^8, which the
// barrier after the weights tells all warps, weights are made again: maxima need no barrier of their own.
//
// The host defines DK, DV (multiples of 64), ROWS (32, 64, 128), KEYS (32, 64), ROUNDS (1, 2: of exchanging sums, each of which
// needs less memory), TURNS (1: keys and values take turns in one place, where memory is short), and the types and features
// that prefill.cu asks for. Launch: grid batches * q_heads * ceil(q_len / ROWS), block THREADS (128 for ROWS 32, else 256),
// shared memory BYTES.
constexpr int SPAN = KEYS / 2;
constexpr bool ROUNDED = false;
#include "portable.cuh"

constexpr int WARPS = ROWS == 32 ? 4 : 8, THREADS = 32 * WARPS;
constexpr int PARTS = ROWS == 128 ? 1 : 2, TALL = 2 / PARTS;  // tiles of 16 rows that a warp weighs
constexpr int BANDS = ROWS == 128 ? 2 : 1, TILES = ROWS / BANDS / 16, ACROSS = WARPS / BANDS;  // of the output; warps per band
constexpr int WIDE = DV / (16 * ACROSS), HALF = DV / (8 * ACROSS) % 2;  // 16 columns; 8 more
constexpr int K_AT = ROWS * DK * 2, K_BYTES = KEYS * DK * 2, V_BYTES = KEYS * DV * 2, V_AT = K_AT + (TURNS ? 0 : K_BYTES);
constexpr int P_AT = TURNS ? K_AT + (K_BYTES > V_BYTES ? K_BYTES : V_BYTES) : V_AT + V_BYTES, SUMS_AT = P_AT + ROWS * KEYS * 2;
constexpr int SUM_BYTES = PARTS == 2 ? 16 * SPAN * 4 / ROUNDS : 0;  // of a warp
constexpr int TOPS_AT = SUMS_AT + WARPS * SUM_BYTES, FACTORS_AT = TOPS_AT + 2 * ROWS * 4, BYTES = FACTORS_AT + ROWS * 4;
static_assert(BYTES <= 232448, "shared memory of a block");
static_assert(DK % 64 == 0 && DV % (8 * ACROSS) == 0, "columns");

extern __shared__ __align__(1024) char memory[];

extern "C" __global__ void __launch_bounds__(THREADS)
    prefill_portable_wide(const __grid_constant__ Prefill p, const __grid_constant__ Operands from) {
  wait_for_earlier_kernels();
  let_later_kernels_start();
  const Tile tile(p, blockIdx.x);
  if (tile.leaves_results(p)) return;
  const u32 shared = shared_address(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
  // of scores
  const int part = warp % PARTS, half = warp / PARTS % 2, rows = warp / (2 * PARTS) * 32;
  const int own = rows + (PARTS == 2 ? 16 * part : 0) + lane / 4, keys = half * SPAN;  // first row and keys that it weighs
  // of values
  const int band = warp / ACROSS * (ROWS / BANDS), column = warp % ACROSS;
  float slope = ALIBI ? p.slopes[tile.head] : 1.0f, scale = p.scale * LOG2E;
  const char* k = from.k + tile.batch * from.k_batch + tile.kv_head * from.k_head;
  const char* v = from.v + tile.batch * from.v_batch + tile.kv_head * from.v_head;
  auto load_k = [&](int block) {
    load_rows<KEYS, DK, THREADS>(shared + K_AT, k, from.k_token, block * KEYS, p.kv_len, from.dk);
    commit_copies();
  };
  auto load_v = [&](int block) {
    load_rows<KEYS, DV, THREADS>(shared + V_AT, v, from.v_token, block * KEYS, p.kv_len, from.dv);
    commit_copies();
  };
  const Place<DK> a(shared, rows + a_row(lane), a_piece(lane)), b(shared + K_AT, keys + b_row(lane), b_piece(lane));
  const Place<KEYS> to(shared + P_AT, own), w(shared + P_AT, band + a_row(lane), a_piece(lane));
  const Place<DV> c(shared + V_AT, a_row(lane), a_piece(lane)), narrow(shared + V_AT, a_row(lane), column);
  auto tops = [&](int side, int row) { return shared + TOPS_AT + (side * ROWS + row) * 4; };
  auto factors = [&](int row) { return shared + FACTORS_AT + row * 4; };

  Softmax softmax[TALL];
  float s[2][SCORES], o[TILES][WIDE * 8 + HALF * 4];
  auto scale_output = [&] {
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
      float f[2] = {load_shared_f32(factors(band + 16 * m + lane / 4)), load_shared_f32(factors(band + 16 * m + lane / 4 + 8))};
#pragma unroll
      for (int i = 0; i < WIDE * 8 + HALF * 4; ++i) o[m][i] *= f[i / 2 % 2];
    }
  };
#pragma unroll
  for (int m = 0; m < TILES; ++m)
#pragma unroll
    for (int i = 0; i < WIDE * 8 + HALF * 4; ++i) o[m][i] = 0.0f;

  int block = tile.block;
  if (block >= 0) {
    const char* q = from.q + tile.batch * from.q_batch + tile.head * from.q_head;
    load_rows<ROWS, DK, THREADS>(shared, q, from.q_token, tile.row, p.q_len, from.dk);
    load_k(block);
  }
  while (block >= 0) {
    wait_copies<0>();
    __syncthreads();  // keys are here; weights and values have been used
    if (!TURNS) load_v(block);
    RegisterMask mask[TALL];
    if constexpr (MASK > 0)
#pragma unroll
      for (int m = 0; m < TALL; ++m) mask[m].load(p, tile, block, tile.row + own + 16 * m, t + keys / 2);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < SCORES; ++i) s[m][i] = 0.0f;
#pragma unroll
    for (int i = 0; i < DK / 16 / PARTS; ++i) {
      int line = PARTS == 2 ? i / 2 * 128 : 32 * i, at = PARTS == 2 ? part * 64 + i % 2 * 32 : 0;  // every other 32 columns
      u32 x[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_matrices((PARTS == 2 ? a.at(at) + line : a.at(line)) + m * 32 * DK, x[m]);
#pragma unroll
      for (int n = 0; n < UNITS; ++n) {
        u32 y[4];
        load_matrices((PARTS == 2 ? b.at(at) + line : b.at(line)) + n * 32 * DK, y);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma<BF16>(quad(s[m] + 8 * n), x[m][0], x[m][1], x[m][2], x[m][3], y[0], y[1]);
          mma<BF16>(quad(s[m] + 8 * n + 4), x[m][0], x[m][1], x[m][2], x[m][3], y[2], y[3]);
        }
      }
    }
    if (TURNS) {
      __syncthreads();
      load_v(block);
    }
    if constexpr (PARTS == 2) {  // each keeps 16 rows and adds the other's sums
      u32 sums = shared + SUMS_AT + lane * 16;
#pragma unroll
      for (int round = 0; round < ROUNDS; ++round) {
        constexpr int MANY = SCORES / 4 / ROUNDS;
        if (round) sync_pair(warp / 2);
#pragma unroll
        for (int i = 0; i < MANY; ++i) {
          int at = 4 * (round * MANY + i);
          float x[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) x[e] = part ? s[0][at + e] : s[1][at + e];
          store_shared(sums + warp * SUM_BYTES + i * 512, x);
        }
        sync_pair(warp / 2);
#pragma unroll
        for (int i = 0; i < MANY; ++i) {
          int at = 4 * (round * MANY + i);
          float x[4];
          load_shared_f32(sums + (warp ^ 1) * SUM_BYTES + i * 512, x);
#pragma unroll
          for (int e = 0; e < 4; ++e) s[0][at + e] = (part ? s[1][at + e] : s[0][at + e]) + x[e];
        }
      }
    }
    float before[TALL][2];
    bool grows = false;
    auto weigh = [&](int m) {
#pragma unroll
      for (int unit = 0; unit < UNITS; ++unit) {
        u32 x[4];
        softmax[m].weights(s[m], unit, scale, x);
        u32 left = to.at(2 * keys + 32 * unit) + m * 32 * KEYS + 4 * t, right = to.at(2 * keys + 32 * unit + 16) + m * 32 * KEYS + 4 * t;
        store_shared(left, x[0]);
        store_shared(left + 16 * KEYS, x[1]);
        store_shared(right, x[2]);
        store_shared(right + 16 * KEYS, x[3]);
      }
    };
#pragma unroll
    for (int m = 0; m < TALL; ++m) {
      softmax[m].adjust(s[m], p, Range(p, tile, block, rows_of(tile, tile.row + own + 16 * m), t + keys / 2), mask[m], slope);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        grows |= softmax[m].passed(r, Softmax::most(s[m], p, r));
        before[m][r] = softmax[m].total[r];
      }
      weigh(m);
    }
    wait_copies<0>();
    grows = __syncthreads_or(grows);  // values and weights are here; keys have been used
    int next = tile.seen(block - 1);
    if (!TURNS && next >= 0) load_k(next);
    if (grows) {
      float most[2 * TALL];
#pragma unroll
      for (int i = 0; i < 2 * TALL; ++i) most[i] = Softmax::most(s[i / 2], p, i % 2);
      most_of_quads(most);
#pragma unroll
      for (int i = 0; i < 2 * TALL; ++i)
        if (t == 0) store_shared(tops(half, own + 8 * i), most[i]);
      __syncthreads();
#pragma unroll
      for (int m = 0; m < TALL; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          int row = own + 16 * m + 8 * r;
          softmax[m].total[r] = before[m][r];
          softmax[m].raise(r, fmaxf(load_shared_f32(tops(0, row)), load_shared_f32(tops(1, row))));
          if (half == 0 && t == 0) store_shared(factors(row), softmax[m].factor[r]);
        }
        weigh(m);
      }
      __syncthreads();
      scale_output();
    }
#pragma unroll
    for (int unit = 0; unit < KEYS / 16; ++unit) {
      u32 x[TILES][4];
#pragma unroll
      for (int m = 0; m < TILES; ++m) load_matrices(w.at(32 * unit) + m * 32 * KEYS, x[m]);
#pragma unroll
      for (int j = 0; j < WIDE; ++j) {
        u32 y[4];
        load_transposed(c.at(32 * column) + 32 * ACROSS * j + unit * 32 * DV, y);
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
          mma<V_BF16>(quad(o[m] + 8 * j), x[m][0], x[m][1], x[m][2], x[m][3], y[0], y[1]);
          mma<V_BF16>(quad(o[m] + 8 * j + 4), x[m][0], x[m][1], x[m][2], x[m][3], y[2], y[3]);
        }
      }
      if constexpr (HALF) {
        u32 y[2];
        load_transposed(narrow.at(32 * ACROSS * WIDE) + unit * 32 * DV, y);
#pragma unroll
        for (int m = 0; m < TILES; ++m) mma<V_BF16>(quad(o[m] + 8 * WIDE), x[m][0], x[m][1], x[m][2], x[m][3], y[0], y[1]);
      }
    }
    if (TURNS && next >= 0) {
      __syncthreads();
      load_k(next);
    }
    block = next;
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < TALL; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = softmax[m].total[r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (t == 0) store_shared(tops(half, own + 16 * m + 8 * r), sum);
    }
  __syncthreads();
  if (half == 0)
#pragma unroll
    for (int m = 0; m < TALL; ++m) {
      float last[2], before[2];
#pragma unroll
      for (int r = 0; r < 2; ++r)
        softmax[m].total[r] = t == 0 ? load_shared_f32(tops(0, own + 16 * m + 8 * r)) + load_shared_f32(tops(1, own + 16 * m + 8 * r)) : 0.0f;
      softmax[m].finish(last, before, p, tile, rows_of(tile, tile.row + own + 16 * m), t);
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (t == 0) store_shared(factors(own + 16 * m + 8 * r), last[r]), store_shared(tops(0, own + 16 * m + 8 * r), before[r]);
    }
  __syncthreads();
  scale_output();
#pragma unroll
  for (int m = 0; m < TILES; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int row = tile.row + band + 16 * m + 8 * r + lane / 4;
      float before = JOINS && p.joined ? load_shared_f32(tops(0, band + 16 * m + 8 * r + lane / 4)) : 0.0f;
      i64 at = tile.batch * p.out_batch + tile.head * p.out_head + row * p.out_token + 2 * t;
      auto put = [&](int from_column, int i) {
        if (row < p.q_len && from_column < p.dv) store(p, at + from_column, o[m][i + 2 * r], o[m][i + 2 * r + 1], before);
      };
#pragma unroll
      for (int j = 0; j < WIDE; ++j) {
        put(16 * (column + ACROSS * j), 8 * j);
        put(16 * (column + ACROSS * j) + 8, 8 * j + 4);
      }
      if constexpr (HALF) put(16 * ACROSS * WIDE + 8 * column, 8 * WIDE);
    }
}
