// Flash attention, forward, for many query rows on Hopper, for heads whose output fits beside the scores: DV <= 256.
//
// Each of GROUPS warpgroups owns 64 rows of a tile: scores, weights and output stay in its registers (Shah et al. 2024). It
// asks for the scores of the next block before it multiplies the values of this one, so that the softmax of one warpgroup
// runs while the tensor cores have work of its own and of the others. One more warpgroup loads.
//
// The host defines what prefill.cu asks for; DV at most 256, KEYS 128 (64 for DV > 128, or where 128 do not fit), K_STAGES,
// V_STAGES (blocks of keys), GROUPS (2; for DV 64 also 3), STAGED (1: there is room for the 16-bit output of a tile, and no mask),
// SEEDS (1: a mask, no cap, ANY_SCALE 0; if it is additive, no slopes, and the scale is a power of 2, at most 1).
// Launch: grid at most the number of tiles, block 128 * (GROUPS + 1), shared memory BYTES. Tensor maps as there, with boxes of KEYS
// keys for k and v; with STAGED of the output too: dims (dim, token, head, batch), true sizes and strides, swizzle of 128 bytes, boxes
// (64, 8, 2, 1) or, with PACK 1, (64, 16, 1, 1); any map without.
constexpr int ROWS = 64 * GROUPS, SPAN = KEYS;
constexpr bool ROUNDED = SOFTCAP && MASK > 0;  // elsewhere issue slots are what limits
// EARLY: what a block needs is asked for while its products run; plain attention takes longer that way. SEEDED: products of scores
// begin with a mask's values, not with zeros. GUESSES: weights come before maxima, which are then seldom needed.
constexpr bool EARLY = MASK > 0 || SOFTCAP > 0, SEEDED = SEEDS;
constexpr bool GUESSES = !SOFTCAP && (MASK > 0 || DV > 64);  // plain attention at 64 dims: see CONTRIBUTING.md
#include "hopper_prefill.cuh"

constexpr int CHUNKS = DK / 64, COLUMNS = DV / 64;
constexpr int CHUNK_BYTES = KEYS * 128, K_BYTES = CHUNKS * CHUNK_BYTES, V_BYTES = COLUMNS * CHUNK_BYTES;
constexpr int Q_BYTES = CHUNKS * 8192;  // of a warpgroup
constexpr int K_AT = GROUPS * Q_BYTES, V_AT = K_AT + K_STAGES * K_BYTES, O_AT = V_AT + V_STAGES * V_BYTES;
constexpr int MASK_AT = O_AT + (STAGED ? ROWS * DV * 2 : 0), BARRIERS_AT = MASK_AT + MASK_STAGES * MaskTile::BYTES;
constexpr int Q_FULL = 0, Q_EMPTY = 1, K_FULL = 2, K_EMPTY = K_FULL + K_STAGES, V_FULL = K_EMPTY + K_STAGES;
constexpr int V_EMPTY = V_FULL + V_STAGES, MASK_FULL = V_EMPTY + V_STAGES;
constexpr int MASK_EMPTY = MASK_FULL + MASK_STAGES, BARRIERS = MASK_EMPTY + MASK_STAGES;
constexpr int BYTES = BARRIERS_AT + 8 * BARRIERS;
constexpr int LOADERS = 15;  // a barrier of two warps
constexpr int THREADS = 128 * (GROUPS + 1), ENTRY = GROUPS == 3 ? 128 : 168;  // registers of a thread
constexpr int LOAD_REGISTERS = GROUPS == 3 ? 32 : MASK ? 40 : 24, REGISTERS = GROUPS == 3 ? 160 : MASK ? 232 : 240;
static_assert(BYTES <= 232448, "shared memory of a block");
static_assert(!(BEHIND && STAGED), "a box of results may hold rows of the sequence before");
static_assert(DV % 64 == 0 && DV <= 256, "columns of the output");

extern __shared__ __align__(1024) char memory[];

INLINE u32 barrier(u32 shared, int index) { return shared + BARRIERS_AT + 8 * index; }

// one warp each; one of its lanes asks for copies
INLINE void load_keys(const Prefill& p, const TensorMap* q_map, const TensorMap* k_map, u32 shared) {
  Ring<K_STAGES> ring;
  Ring<1> q_ring;
  bool first = true;
  each_tile(p, [&](const Tile& tile) {
    for (int block = tile.block; block >= 0; block = tile.seen(block - 1), ring.advance()) {
      u32 full = barrier(shared, K_FULL + ring.stage), to = shared + K_AT + ring.stage * K_BYTES;
      wait(barrier(shared, K_EMPTY + ring.stage), ring.parity ^ 1);
      if (elected()) {
        arrive_expect(full, K_BYTES);
        for (int c = 0; c < CHUNKS; ++c)
          each_box<KEYS, K_PAGED>(p, tile, tile.key(block), [&](int before, int token, int batch) {
            load_box(to + c * CHUNK_BYTES + before * 128, k_map, c * 64, token, tile.kv_head, batch, full);
          });
      }
      if (block != tile.block) continue;
      wait(barrier(shared, Q_EMPTY), q_ring.parity ^ 1);
      q_ring.advance();
      if (elected()) {
        arrive_expect(barrier(shared, Q_FULL), GROUPS * Q_BYTES);
        for (int i = 0; i < GROUPS; ++i) load_queries(shared + i * Q_BYTES, q_map, tile, i, barrier(shared, Q_FULL));
      }
      if (first) copies_asked_for(LOADERS);
      first = false;
    }
  });
}

INLINE void load_values(const Prefill& p, const TensorMap* v_map, u32 shared) {
  Ring<V_STAGES> ring;
  bool first = true;
  each_tile(p, [&](const Tile& tile) {
    for (int block = tile.block; block >= 0; block = tile.seen(block - 1), ring.advance()) {
      u32 full = barrier(shared, V_FULL + ring.stage), to = shared + V_AT + ring.stage * V_BYTES;
      if (first) wait_for_first_copies(LOADERS);
      first = false;
      wait(barrier(shared, V_EMPTY + ring.stage), ring.parity ^ 1);
      if (elected()) {
        arrive_expect(full, V_BYTES);
        for (int c = 0; c < COLUMNS; ++c)
          each_box<KEYS, V_PAGED>(p, tile, tile.key(block), [&](int before, int token, int batch) {
            load_box(to + c * CHUNK_BYTES + before * 128, v_map, c * 64, token, tile.kv_head, batch, full);
          });
      }
    }
  });
}

// 16 rows of a warp: to shared memory once the rows before have left it, and from there without waiting.
template <class F>
INLINE void store_rows(const TensorMap* map, const Tile& tile, u32 shared, int group, int warp, int lane, F value) {
  u32 from = shared + O_AT + (4 * group + warp) * (COLUMNS * 2048);
  stores_wait();
  __syncwarp();
#pragma unroll
  for (int j = 0; j < DV / 16; ++j) {
    u32 x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float a = value(8 * j + 2 * i), b = value(8 * j + 2 * i + 1);
      x[i] = OUT_TYPE == 1 ? bf16x2(a, b) : f16x2(a, b);
    }
    int column = 2 * (j % 4) + lane / 16;
    store_matrices(from + j / 4 * 2048 + lane % 16 * 128 + ((column ^ lane % 8) << 4), x[0], x[1], x[2], x[3]);
  }
  fence_async();
  __syncwarp();
  if (lane == 0) {
    int row = tile.row + group * TURN + (PACK > 1 ? position_of(2 * warp) : 16 * warp), head = tile.head + head_of(2 * warp);
    for (int c = 0; c < COLUMNS; ++c) store_box(from + c * 2048, map, c * 64, row, head, tile.batch);
    stores_commit();
  }
}

// A warpgroup's 64 rows of q times the scale, which is a power of 2.
INLINE void scale_queries(const Prefill& p, u32 q, int barrier) {
  const u32 scale = BF16 ? bf16x2(p.scale, p.scale) : f16x2(p.scale, p.scale);
  for (u32 at = q + threadIdx.x % 128 * 16; at < q + Q_BYTES; at += 128 * 16) {
    u32 x[4];
    load_shared<4>(at, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = BF16 ? product_bf16x2(x[i], scale) : product_f16x2(x[i], scale);
    store_shared(at, x);
  }
  fence_async();
  asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory");
}

INLINE void attend_role(const Prefill& p, const TensorMap* out_map, u32 shared, int group) {
  int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const float scale = Softmax::unit(p);
  Mask mask(shared + MASK_AT, barrier(shared, MASK_FULL), barrier(shared, MASK_EMPTY), group, warp, lane);
  Ring<1> q_ring;
  Ring<K_STAGES> k_ring;
  Ring<V_STAGES> v_ring;
  if (group == GROUPS - 1) go_by(1);
  each_tile_ahead(p, [&](const Tile& tile, auto look_ahead) {
    const Rows rows = rows_of(tile, group, warp, lane);
    Softmax softmax;
    float s[SCORES], o[DV / 2];
    u32 w[UNITS][4];
#pragma unroll
    for (int i = 0; i < DV / 2; ++i) o[i] = 0.0f;
    if constexpr (MASK > 0) mask.start(p, rows);

    int block = tile.block, next;
    bool whole, masked, held;  // whole: every row of the warp sees every key; held: the mask is still looked at
    auto seed = [&] {
      masked = tile.masked(block), held = masked && !softmax.settled;
      if (!masked || p.kv_len <= 0) return;  // there are keys; without a branch the assembler puts all this behind the next barrier
      mask.fetch();
      mask.seed(s);
      if (!held) mask.release();
    };
    auto scores = [&] {
      if (SEEDED) settle(s);
      wait(barrier(shared, K_FULL + k_ring.stage), k_ring.parity);
      Operand a(shared + group * Q_BYTES), b(shared + K_AT + k_ring.stage * K_BYTES);
      products_begin();
#pragma unroll
      for (int i = 0; i < DK / 16; ++i)
        product<KEYS, BF16, 0>(s, a.at(i / 4 * 8192 + i % 4 * 32), b.at(i / 4 * CHUNK_BYTES + i % 4 * 32), i > 0 || SEEDED && masked);
      products_commit();
    };
    auto values = [&](int block) {
      wait(barrier(shared, V_FULL + v_ring.stage), v_ring.parity);
      if (CLEARS) clear_values<KEYS, DV>(p, tile, shared + V_AT + v_ring.stage * V_BYTES, tile.key(block), 1 + GROUPS + group);
      Operand v(shared + V_AT + v_ring.stage * V_BYTES, CHUNK_BYTES);
      products_begin();
#pragma unroll
      for (int unit = 0; unit < UNITS; ++unit) product_across<DV, V_BF16>(o, w[unit], v.at(unit * 2048));
      products_commit();
    };
    auto release_k = [&] {  // and q, after the last block: the next tile's is loaded meanwhile
      if (lane == 0) arrive(barrier(shared, K_EMPTY + k_ring.stage));
      k_ring.advance();
      if (!EARLY) next = tile.seen(block - 1);
      if (next < 0 && lane == 0) arrive(barrier(shared, Q_EMPTY));
    };
    auto release_v = [&] {
      if (lane == 0) arrive(barrier(shared, V_EMPTY + v_ring.stage));
      v_ring.advance();
    };
    auto end_values = [&] {
      products_wait<0>();
      settle(o);
      release_v();
    };
    auto begin = [&](auto values_run) {  // scores, beside the products of values that may still run
      whole = EARLY && __all_sync(~0u, Range(p, tile, block, rows, lane % 4).whole());
      if constexpr (!SEEDED) {
        masked = held = tile.masked(block);
        if (MASK && masked) mask.fetch();
      }
      if (EARLY) next = tile.seen(block - 1);
      products_wait<decltype(values_run)::value>();
      settle(s);
      release_k();
      if (TRUSTS && whole) return;
      softmax.take(s, p, mask, !SEEDED && masked, [&] {
        if (!whole) Range(p, tile, block, rows, lane % 4).hide(s);
      });
    };
    auto weigh = [&] {
      if (TRUSTS && whole) softmax.weigh_small(s, p, w);
      else softmax.weigh(s, scale, w);
      softmax.count();
    };
    auto release_mask = [&] {
      if (MASK && held) mask.release();
    };
    if (block >= 0) {
      wait(barrier(shared, Q_FULL), q_ring.parity);
      q_ring.advance();
      if (SCALED) scale_queries(p, shared + group * Q_BYTES, 1 + GROUPS + group);
      if constexpr (SEEDED) seed();
      scores();
      begin(Bool<false>());
      softmax.refer(s, p, mask, held);
      release_mask();
      weigh();
      int before = block;
      while ((block = next) >= 0) {
        if constexpr (SEEDED) seed();
        meet(1 + group);  // products are asked for in turn, so that one's softmax has the others' products beside it
        scores();
        values(before);
        before = block;
        go_by(1 + (group + 1) % GROUPS);
        begin(Bool<true>());
        if constexpr (!GUESSES) {
          softmax.refer(s, p, mask, held);
          release_mask();
        }
        end_values();
        if constexpr (GUESSES) {
          const bool right = softmax.guess(s, scale, w);
          if (!right) softmax.refer(s, p, mask, held);
          release_mask();
          if (right) continue;
        }
        if (softmax.grown) {
#pragma unroll
          for (int i = 0; i < DV / 2; ++i) o[i] *= softmax.factor[i / 2 % 2];
        }
        weigh();
      }
      values(before);
    }
    look_ahead();
    float last[2], share[2];  // share: of the result before
    softmax.finish(last, share, p, tile, rows, lane % 4);
    products_wait<0>();
    settle(o);
    if (tile.block >= 0) release_v();
    if constexpr (STAGED) {
      store_rows(out_map, tile, shared, group, warp, lane, [&](int i) { return o[i] * last[i / 2 % 2]; });
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        write_row<DV>(p, tile, rows, r, 0, lane % 4, share[r], [&](int i) { return o[i] * last[r]; });
    }
    if (BEHIND && group == 0) spoil(p, tile);
  });
  if (STAGED) stores_wait();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prefill_narrow(const __grid_constant__ Prefill p, const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
            const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap mask_map,
            const __grid_constant__ TensorMap out_map) {
  u32 shared = shared_address(memory);
  int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0);
  let_later_kernels_start();
  if (threadIdx.x == 64) {  // of a warp that may have nothing else to do
    barrier_init(barrier(shared, Q_FULL), 1);
    barrier_init(barrier(shared, Q_EMPTY), 4 * GROUPS);
    for (int i = 0; i < K_STAGES; ++i) {
      barrier_init(barrier(shared, K_FULL + i), 1);
      barrier_init(barrier(shared, K_EMPTY + i), 4 * GROUPS);
    }
    for (int i = 0; i < V_STAGES; ++i) {
      barrier_init(barrier(shared, V_FULL + i), 1);
      barrier_init(barrier(shared, V_EMPTY + i), 4 * GROUPS);
    }
    for (int i = 0; i < MASK_STAGES; ++i) {
      barrier_init(barrier(shared, MASK_FULL + i), MASK_BOXES ? 1 : 64);
      barrier_init(barrier(shared, MASK_EMPTY + i), 4 * GROUPS / MaskTile::PARTS);
    }
    fence_barrier_init();
    prefetch(&q_map);
    prefetch(&k_map);
    prefetch(&v_map);
  }
  if (warp < 4) {
    registers<LOAD_REGISTERS, ENTRY>();
    if (warp == 0) load_keys(p, &q_map, &k_map, shared);
    if (warp == 1) load_values(p, &v_map, shared);
    if (MASK && warp >= 2) load_mask(p, &mask_map, shared + MASK_AT, barrier(shared, MASK_FULL), barrier(shared, MASK_EMPTY));
    if (!MASK && warp >= 2) begin();
  } else {
    registers<REGISTERS, ENTRY>();
    attend_role(p, &out_map, shared, warp / 4 - 1);
  }
}
