// Flash attention, forward, for many query rows on Hopper (Dao et al. 2022; Shah et al. 2024: warpgroups with roles).
//
// A block owns 64 query rows; at DV 512 their output is half of the register file. So roles are split by what they hold:
//   load    warp 0: q once, then k in chunks [KEYS keys, 64 dims]; warp 1: v in parts [32 keys, the columns of a warpgroup]
//   score   s = q k^T of a block of keys, the running softmax; weights go to shared memory, 16 bits, in slots of 64 keys
//   value   o += p v: two warpgroups, each with its columns of the output
// The tensor cores are never idle if there are values to multiply while a softmax runs; so weights are held back until
// the next scores have been asked for. Maxima grow lazily, by 2^8 or not at all: the output is rarely rescaled, and
// a slot says by which factor, and whether.
//
// A key costs 2 (DK + DV) bytes of L2 per block of 64 rows, and that is what limits long contexts.
//
// The host defines DK, DV (multiples of 64, at most 576), KEYS (128; 64 for DV > 512), K_STAGES, V_STAGES (even), PACK, Q_TYPE
// (0 f16, 1 bf16: of q and k), V_TYPE, OUT_TYPE (0 f16, 1 bf16, 2 f32), MASK (0 none, 1 boolean, 2 f32, 3 f16, 4 bf16),
// MASK_STAGES (1 or more with a mask), MASK_BOXES (1: a tensor map describes the mask, of which a block of keys has 128 bytes or
// more), MAPPED (1: it has a map), HEAD_MASK (the heads of a KV head have masks of their own), SOFTCAP (2: at most 60, V of
// bfloat16, no additive mask), ALIBI, ANY_SCALE (0: scale > 2^-60), RAGGED (1: sequences have starts or lengths of their own),
// BEHIND (1, with RAGGED: sequences lie behind each other in q, and in k and v or not), CLEARS (1: values that a sequence does
// not have are read too), K_PAGED, V_PAGED (slots of a page, a multiple of 16, where the
// rows of tensor maps are [page, head, slot, dim]; or 0). Head sizes between multiples of 64 are padded by the tensor maps.
//
// Launch: grid at most the number of tiles, batches * q_heads / PACK * ceil(q_len * PACK / 64); block 512, shared memory BYTES:
//   128 DK + 32768 + K_STAGES * 128 KEYS + V_STAGES * 64 up(DV / 2, 64) + those of a mask + 1280 + 8 * barriers
// Tensor maps of q, k, v: 16 bits, dims (dim, token, head, batch), true sizes and strides, swizzle of 128 bytes, zeros out of
// bounds, boxes q (64, 8, PACK, 1) or, with PACK 1, (64, 64, 1, 1), k (64, KEYS, 1, 1), v (64, 32, 1, 1); in pages at most as
// many tokens as divide these and a page. Of a mask with MASK_BOXES: dims (key, query, head, batch), 1 where it broadcasts, boxes
// of 128 bytes (of f32 32, not swizzled) and all positions of a tile, or, with HEAD_MASK or PACK 1, 64 / PACK positions of PACK
// heads; any map without.
constexpr int ROWS = 64, SPAN = KEYS;
constexpr bool ROUNDED = true;
constexpr bool GUESSES = false;
constexpr bool SEEDED = false;
#include "hopper_prefill.cuh"

constexpr int CHUNKS = DK / 64;
constexpr int COLUMNS_A = (DV / 64 + 1) / 2 * 64, COLUMNS_B = DV - COLUMNS_A, VALUE_GROUPS = COLUMNS_B ? 2 : 1;
constexpr int SLOTS = 4;

constexpr int SLOT_BYTES = 64 * 128, FACTOR_BYTES = 80;  // factors: of a warp's 16 rows, whether any is not 1
constexpr int K_BYTES = KEYS * 128, V_BYTES = 32 * COLUMNS_A * 2;
constexpr int P_AT = 64 * DK * 2, K_AT = P_AT + SLOTS * SLOT_BYTES, V_AT = K_AT + K_STAGES * K_BYTES;
constexpr int MASK_AT = V_AT + V_STAGES * V_BYTES;
constexpr int FACTORS_AT = MASK_AT + MASK_STAGES * MaskTile::BYTES, BARRIERS_AT = FACTORS_AT + SLOTS * 4 * FACTOR_BYTES;
constexpr int Q_FULL = 0, Q_EMPTY = 1, K_FULL = 2, K_EMPTY = K_FULL + K_STAGES, V_FULL = K_EMPTY + K_STAGES;
constexpr int V_EMPTY = V_FULL + V_STAGES;
constexpr int P_FULL = V_EMPTY + V_STAGES, P_EMPTY = P_FULL + SLOTS, MASK_FULL = P_EMPTY + SLOTS;
constexpr int MASK_EMPTY = MASK_FULL + MASK_STAGES, BARRIERS = MASK_EMPTY + MASK_STAGES;
constexpr int BYTES = BARRIERS_AT + 8 * BARRIERS;
constexpr int LOADERS = 15;  // a barrier of two warps
static_assert(BYTES <= 232448, "shared memory of a block");
static_assert(K_STAGES >= 2, "a product runs while the next operand arrives");
static_assert(V_STAGES % 2 == 0, "a stage always serves the same warpgroup: it may be two rounds ahead of the other");
static_assert(V_STAGES >= 2 * VALUE_GROUPS, "a warpgroup waits for a stage before it releases the one before");
static_assert(!MASK || MASK_STAGES >= 1, "a mask has a stage");
static_assert(!SHIFTS, "block b of keys begins with key b * KEYS");

// registers of a thread, by role: all that is left goes to the scores
constexpr int LOAD_REGISTERS = MASK ? 40 : 24;
__device__ constexpr int value_registers(int columns) { return columns ? columns / 2 + 32 : LOAD_REGISTERS; }
constexpr int A_REGISTERS = value_registers(COLUMNS_A), B_REGISTERS = value_registers(COLUMNS_B);
constexpr int REST = 512 - LOAD_REGISTERS - A_REGISTERS - B_REGISTERS, SCORE_REGISTERS = REST < 240 ? REST : 240;

extern __shared__ __align__(1024) char memory[];

INLINE u32 barrier(u32 shared, int index) { return shared + BARRIERS_AT + 8 * index; }

// One warp each; one of its lanes asks for copies.
INLINE void load_keys(const Prefill& p, const TensorMap* q_map, const TensorMap* k_map, u32 shared) {
  Ring<K_STAGES> ring;
  Ring<1> q_ring;
  bool first = true;
  each_tile(p, [&](const Tile& tile) {
    for (int block = tile.block; block >= 0; block = tile.seen(block - 1))
      for (int c = 0; c < CHUNKS; ++c, ring.advance()) {
        u32 full = barrier(shared, K_FULL + ring.stage), to = shared + K_AT + ring.stage * K_BYTES;
        wait(barrier(shared, K_EMPTY + ring.stage), ring.parity ^ 1);
        if (elected()) {
          arrive_expect(full, K_BYTES);
          each_box<KEYS, K_PAGED>(p, tile, block * KEYS, [&](int before, int token, int batch) {
            load_box(to + before * 128, k_map, c * 64, token, tile.kv_head, batch, full);
          });
        }
        if (c || block != tile.block) continue;
        wait(barrier(shared, Q_EMPTY), q_ring.parity ^ 1);
        q_ring.advance();
        if (elected()) {
          arrive_expect(barrier(shared, Q_FULL), 64 * DK * 2);
          load_queries(shared, q_map, tile, 0, barrier(shared, Q_FULL));
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
    for (int block = tile.block; block >= 0; block = tile.seen(block - 1))
      for (int part = 0; part < KEYS / 32; ++part)
        for (int which = 0; which < VALUE_GROUPS; ++which, ring.advance()) {
          u32 full = barrier(shared, V_FULL + ring.stage), to = shared + V_AT + ring.stage * V_BYTES;
          int columns = which ? COLUMNS_B : COLUMNS_A, from = which * COLUMNS_A, key = block * KEYS + part * 32;
          if (first) wait_for_first_copies(LOADERS);
          first = false;
          wait(barrier(shared, V_EMPTY + ring.stage), ring.parity ^ 1);
          if (elected()) {
            arrive_expect(full, columns * 64);
            for (int c = 0; c < columns; c += 64)
              each_box<32, V_PAGED>(p, tile, key, [&](int before, int token, int batch) {
                load_box(to + c * 64 + before * 128, v_map, from + c, token, tile.kv_head, batch, full);
              });
          }
        }
  });
}

// A warp's share of a slot: 16 rows of weights, their factors.
struct Sender {
  Ring<SLOTS> ring;
  u32 shared;
  int warp, lane;

  INLINE u32 weights() const { return shared + P_AT + ring.stage * SLOT_BYTES + warp * 2048; }
  INLINE u32 factors() const { return shared + FACTORS_AT + (ring.stage * 4 + warp) * FACTOR_BYTES; }
  INLINE void open(float a, float b, bool any) {
    wait(barrier(shared, P_EMPTY + ring.stage), ring.parity ^ 1);
    if (lane % 4 == 0) {
      store_shared(factors() + lane, a);
      store_shared(factors() + 32 + lane, b);
    }
    if (lane == 0) store_shared(factors() + 64, any ? 1.0f : 0.0f);
  }
  INLINE void close() {
    fence_async();
    __syncwarp();
    if (lane == 0) arrive(barrier(shared, P_FULL + ring.stage));
    ring.advance();
  }
};

// the weights of a block, to shared memory
INLINE void send(Sender& to, const Softmax& softmax, const u32 (&w)[UNITS][4]) {
  int row = to.lane % 16;
#pragma unroll
  for (int unit = 0; unit < UNITS; ++unit) {
    bool first = unit == 0;
    if (unit % 4 == 0) to.open(first ? softmax.factor[0] : 1.0f, first ? softmax.factor[1] : 1.0f, first && softmax.grown);
    int column = 2 * (unit % 4) + to.lane / 16;
    store_matrices(to.weights() + row * 128 + ((column ^ (row % 8)) << 4), w[unit][0], w[unit][1], w[unit][2], w[unit][3]);
    if (unit % 4 == 3) to.close();
  }
}

INLINE void score_role(const Prefill& p, u32 shared) {
  int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const float scale = Softmax::unit(p);
  Mask mask(shared + MASK_AT, barrier(shared, MASK_FULL), barrier(shared, MASK_EMPTY), 0, warp, lane);
  Sender to{{}, shared, warp, lane};
  Ring<1> q_ring;
  Ring<K_STAGES> ring;
  auto multiply = [&](float (&s)[SCORES], int c) {
    wait(barrier(shared, K_FULL + ring.stage), ring.parity);
    Operand a(shared + c * 8192), b(shared + K_AT + ring.stage * K_BYTES);
    products_begin();
#pragma unroll
    for (int i = 0; i < 4; ++i) product<KEYS, BF16, 0>(s, a.at(32 * i), b.at(32 * i), c + i > 0);
    products_commit();
    ring.advance();
  };
  auto release = [&](u32 stage) {
    if (lane == 0) arrive(barrier(shared, K_EMPTY + stage));
  };
  each_tile(p, [&](const Tile& tile) {
    const Rows rows = rows_of(tile, 0, warp, lane);
    Softmax softmax;
    if constexpr (MASK > 0) mask.start(p, rows);
    float s[SCORES];
    u32 w[UNITS][4];
    if (tile.block >= 0) wait(barrier(shared, Q_FULL), q_ring.parity);
    for (int block = tile.block, next; block >= 0; block = next) {
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        multiply(s, c);
        if (c) {
          products_wait<1>();
          release((ring.stage + 2 * K_STAGES - 2) % K_STAGES);
        }
      }
      if (block != tile.block) send(to, softmax, w);
      const bool masked = tile.masked(block);
      if (MASK && masked) mask.fetch();
      products_wait<0>();
      settle(s);
      release((ring.stage + K_STAGES - 1) % K_STAGES);
      next = tile.seen(block - 1);
      if (next < 0 && lane == 0) arrive(barrier(shared, Q_EMPTY));  // the next tile's is loaded meanwhile
      softmax.take(s, p, mask, masked, [&] { Range(p, tile, block, rows, lane % 4).hide(s); });
      softmax.refer(s, p, mask, masked);
      if (MASK && masked) mask.release();
#pragma unroll
      for (int unit = 0; unit < UNITS; ++unit) softmax.weights(s, unit, scale, w[unit]);
    }
    if (tile.block >= 0) {
      q_ring.advance();
      send(to, softmax, w);
    }
    float last[2], before[2];
    softmax.finish(last, before, p, tile, rows, lane % 4);
    to.open(last[0], last[1], true);
    if (JOINS && p.joined && lane % 4 == 0) {  // in place of weights
      store_shared(to.weights() + lane, before[0]);
      store_shared(to.weights() + 32 + lane, before[1]);
    }
    to.close();
  });
}

// 64 rows and COLUMNS columns of the output, in products of at most 128: the assembler has 128 registers to place one in
template <int COLUMNS>
struct Output {
  static constexpr int A = COLUMNS < 128 ? COLUMNS : 128, B = COLUMNS - A < 128 ? COLUMNS - A : 128, C = COLUMNS - A - B;
  float a[A / 2], b[B ? B / 2 : 1], c[C ? C / 2 : 1];

  template <class F>
  INLINE void each(F f) {
#pragma unroll
    for (int i = 0; i < A / 2; ++i) f(a[i], i);
#pragma unroll
    for (int i = 0; i < B / 2; ++i) f(b[i], i);
#pragma unroll
    for (int i = 0; i < C / 2; ++i) f(c[i], i);
  }
  INLINE float at(int i) const { return i < A / 2 ? a[i] : i < (A + B) / 2 ? b[i - A / 2] : c[i - (A + B) / 2]; }
  INLINE void settle() {
    each([](float& x, int) { asm volatile("" : "+f"(x)::"memory"); });
  }
  INLINE void multiply(u64 weights, Operand v, int at) {  // 16 keys, chunks of 64 columns 4096 bytes apart
    product<A, V_BF16, 1>(a, weights, v.at(at), 1);
    if constexpr (B > 0) product<B, V_BF16, 1>(b, weights, v.at(at + A * 64), 1);
    if constexpr (C > 0) product<C, V_BF16, 1>(c, weights, v.at(at + (A + B) * 64), 1);
  }
};

template <int COLUMNS>
INLINE void value_role(const Prefill& p, u32 shared, int which) {
  int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  Output<COLUMNS> o;
  Ring<SLOTS> slots;
  Ring<V_STAGES> ring;
  if (which) ring.advance();
  auto rescale = [&](bool always) {
    u32 factors = shared + FACTORS_AT + (slots.stage * 4 + warp) * FACTOR_BYTES;
    if (always || load_shared_f32(factors + 64) != 0.0f) {
      float f[2] = {load_shared_f32(factors + lane / 4 * 4), load_shared_f32(factors + 32 + lane / 4 * 4)};
      o.each([&](float& x, int i) { x *= f[i / 2 % 2]; });
    }
  };
  auto release = [&](u32 stage) {
    if (lane == 0) arrive(barrier(shared, V_EMPTY + stage));
  };
  auto release_slot = [&] {
    __syncwarp();  // all lanes have read their factors
    if (lane == 0) arrive(barrier(shared, P_EMPTY + slots.stage));
    slots.advance();
  };
  each_tile(p, [&](const Tile& tile) {
    o.each([](float& x, int) { x = 0.0f; });
    for (int block = tile.block; block >= 0; block = tile.seen(block - 1)) {
#pragma unroll 1
      for (int slot = 0; slot < KEYS / 64; ++slot) {
        wait(barrier(shared, P_FULL + slots.stage), slots.parity);
        rescale(false);
        o.settle();
        Operand a(shared + P_AT + slots.stage * SLOT_BYTES);
        u32 before = 0;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          wait(barrier(shared, V_FULL + ring.stage), ring.parity);
          const u32 values = shared + V_AT + ring.stage * V_BYTES;
          if (CLEARS) clear_values<32, COLUMNS>(p, tile, values, block * KEYS + slot * 64 + part * 32, 1 + which);
          Operand v(values, 4096);
          products_begin();
#pragma unroll
          for (int i = 0; i < 2; ++i) o.multiply(a.at(64 * part + 32 * i), v, 2048 * i);
          products_commit();
          if (part) {
            products_wait<1>();
            release(before);
          }
          before = ring.stage;
          ring.advance(VALUE_GROUPS);
        }
        products_wait<0>();
        o.settle();
        release(before);
        release_slot();
      }
    }
    wait(barrier(shared, P_FULL + slots.stage), slots.parity);
    rescale(true);
    float share[2] = {0.0f, 0.0f};  // of the result before
    if (JOINS && p.joined) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        share[r] = load_shared_f32(shared + P_AT + slots.stage * SLOT_BYTES + warp * 2048 + 32 * r + lane / 4 * 4);
    }
    release_slot();
    const Rows rows = rows_of(tile, 0, warp, lane);
#pragma unroll
    for (int r = 0; r < 2; ++r)
      write_row<COLUMNS>(p, tile, rows, r, which * COLUMNS_A, lane % 4, share[r], [&](int i) { return o.at(i); });
    if (BEHIND && which == 0) spoil(p, tile);
  });
}

extern "C" __global__ void __launch_bounds__(512, 1)
    prefill(const __grid_constant__ Prefill p, const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
            const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap mask_map) {
  u32 shared = shared_address(memory);
  int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0);
  let_later_kernels_start();
  if (threadIdx.x == 64) {  // of a warp that may have nothing else to do
    auto init = [&](int from, int many, int count) {
      for (int i = 0; i < many; ++i) barrier_init(barrier(shared, from + i), count);
    };
    init(Q_FULL, 1, 1);
    init(Q_EMPTY, 1, 4);
    init(K_FULL, K_STAGES, 1);
    init(K_EMPTY, K_STAGES, 4);
    init(V_FULL, V_STAGES, 1);
    init(V_EMPTY, V_STAGES, 4);
    init(P_FULL, SLOTS, 4);
    init(P_EMPTY, SLOTS, 4 * VALUE_GROUPS);
    init(MASK_FULL, MASK_STAGES, MASK_BOXES ? 1 : 64);
    init(MASK_EMPTY, MASK_STAGES, 4);
    fence_barrier_init();
    prefetch(&q_map);
    prefetch(&k_map);
    prefetch(&v_map);
  }
  if (warp < 4) {
    registers<LOAD_REGISTERS, 128>();
    if (warp == 0) load_keys(p, &q_map, &k_map, shared);
    if (warp == 1) load_values(p, &v_map, shared);
    if (MASK && warp >= 2) load_mask(p, &mask_map, shared + MASK_AT, barrier(shared, MASK_FULL), barrier(shared, MASK_EMPTY));
    if (!MASK && warp >= 2) begin();
  } else if (warp < 8) {
    registers<SCORE_REGISTERS, 128>();
    score_role(p, shared);
  } else if (warp < 12 || COLUMNS_A == COLUMNS_B) {
    registers<A_REGISTERS, 128>();
    value_role<COLUMNS_A>(p, shared, warp >= 12);
  } else if constexpr (COLUMNS_B > 0) {
    registers<B_REGISTERS, 128>();
    value_role<COLUMNS_B>(p, shared, 1);
  } else {
    registers<LOAD_REGISTERS, 128>();
    begin();
  }
}
