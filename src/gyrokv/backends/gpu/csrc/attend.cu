// Flash decoding over packed rows (Dao et al. 2022 and 2023: running softmax, keys split over blocks).
//
// A block serves up to ROWS query rows of one KV head over one range of slots; its warps take tiles of TILE slots in
// turn, each with its own ring of STAGES tiles in shared memory, and never wait for each other until the end.
// Scores are computed transposed, k [16 tokens x 16 dims] times q [16 dims x 8 rows], so that 8 rows fill the tensor
// cores, and so is the output, v^T [16 dims x 16 tokens] times weights [16 tokens x 8 rows]. Rows expand from shared
// memory straight into operands (codec.cuh): the order of dims in a product is free, so no value moves between lanes.
// Scales never touch elements: K's multiplies scores, V's the weights.
//
// The host defines K_KIND, K_BITS, K_SPAN, K_SCALE32 (and V_), DK, DV, ROWS, TERMS, Q_TYPE, SOFTCAP, MASK, ALIBI, TILE, STAGES,
// WARPS, K_PITCH, K_COPY, K_STRIDE, K_SCALE_STRIDE (and V_), SAME_TABLE, PAGED,
// SHARED (bytes).
#include "rows.cuh"

using K = Row<K_KIND, K_BITS, DK, K_SPAN>;
using V = Row<V_KIND, V_BITS, DV, V_SPAN>;
using KShare = Share<K, 4, 2>;
using VShare = Share<V, 8, 1>;

constexpr int COLUMNS = (ROWS + 7) / 8;                                      // products of 8 rows each
constexpr int K_COLUMNS = TERMS == 1 ? COLUMNS : ROWS <= 4 ? 1 : 2 * COLUMNS;  // q may be the sum of two terms
constexpr int TILES = TILE / 16;
constexpr bool K_KEPT = K::GROUPS <= 9;  // one accumulator per scale; else each product is scaled at once
constexpr int K_SUMS = K::GROUPS == 1 ? (TILES == 1 ? 2 : 1) : K_KEPT ? K::GROUPS : 1;
constexpr bool PLAIN = !SOFTCAP && MASK == 0;
constexpr int V_TERMS = V::IS_BF16 ? 2 : 1;
constexpr int STAGE_BYTES = TILE * (K_PITCH + V_PITCH);
constexpr bool SHARED_TABLE = K_KIND == TABLE && V_KIND == TABLE && SAME_TABLE;
constexpr int Q_BYTES = KShare::PAIRS * KShare::MOST * K_COLUMNS * 32 * 8;
constexpr int K_LUT = 0, V_LUT = SHARED_TABLE ? 0 : K::LUT_BYTES;
constexpr int Q_AT = K::LUT_BYTES + (SHARED_TABLE ? 0 : V::LUT_BYTES);
constexpr int SUMS_AT = Q_AT + Q_BYTES;                                     // sums of q by scale: [K_COLUMNS * 8][GROUPS]
constexpr int RING_AT = up(SUMS_AT + K_COLUMNS * 8 * K::GROUPS * 4, 128);
constexpr float LOG2E = 1.4426950408889634f;
constexpr float SLACK = 3.0f;        // log2 by which scores may pass the reference before everything is rescaled
constexpr float WEIGHT = 256.0f;     // weights are kept away from the denormals of half precision
static_assert(RING_AT + WARPS * STAGES * STAGE_BYTES <= SHARED && WARPS * 8 * COLUMNS * DV * 4 <= SHARED, "shared memory");
static_assert(!K::OFFSET || K_KEPT, "offsets of K need one sum per scale");

// query row of a lane's i-th column in the j-th product
INLINE int row_of(int j, int i, int t) { return TERMS == 1 ? 8 * j + 2 * t + i : 8 * j + t + 4 * i; }

INLINE float load_q(const char* q, i64 at) {
  if (Q_TYPE == F32) return ((const float*)q)[at];
  u32 x = ((const u16*)q)[at];
  return Q_TYPE == F16 ? f32_of_f16(x) : f32_of_bf16(x);
}

INLINE float load_mask(const char* mask, i64 at) {  // a boolean mask: 0 or -inf
  if (MASK == 1) return mask[at] ? 0.0f : -INFINITY;
  float x = MASK == 2 ? ((const float*)mask)[at] : MASK == 3 ? f32_of_f16(((const u16*)mask)[at]) : f32_of_bf16(((const u16*)mask)[at]);
  return x <= -65504.0f ? -INFINITY : x;
}

using KScales = Scales<K, K_SCALE32>;
using VScales = Scales<V, V_SCALE32>;

// a lookup table, as half precision, once per bank
INLINE void fill_table(u32 to, const float* table, int codes) {
  for (int i = threadIdx.x; i < codes * 32; i += WARPS * 32) {
    u32 x = f16x2(table[i / 32], 0.0f);
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to + i * 4), "r"(x));
  }
}

struct Unit {  // what a block works on
  int batch, head, row_base, rows;
};

INLINE i64 q_offset(const Attend& p, const Unit& unit, int row) {
  int r = unit.row_base + row;
  return unit.batch * p.q_batch + (unit.head * p.groups + r % p.groups) * p.q_head + (r / p.groups) * p.q_token;
}

// q as operands: [pair][scale][column][lane] of two registers. norms[row]: the power of two that a row was multiplied by
INLINE void fill_queries(char* shared, const Attend& p, const Unit& unit, float* norms) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int row = warp; row < 8 * COLUMNS; row += WARPS) {
    float most = 0.0f;
    if (row < unit.rows)
      for (int d = lane; d < DK; d += 32) most = fmaxf(most, fabsf(load_q(p.q, q_offset(p, unit, row) + d)));
#pragma unroll
    for (int i = 16; i; i /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
    // largest value to 2**13 .. 2**14: half precision overflows at 2**16; bfloat16 needs none of it
    int exponent = (int)((__float_as_uint(most) >> 23) & 255) - 127;
    int up_by = K::IS_BF16 || most == 0.0f ? 0 : max(-120, min(120, 13 - exponent));
    if (lane == 0) norms[row] = __uint_as_float((u32)(127 + up_by) << 23);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < Q_BYTES / 8; e += WARPS * 32) {
    int l = e % 32, g = l / 4, t = l % 4, rest = e / 32;
    int column = rest % K_COLUMNS, slot = rest / K_COLUMNS % KShare::MOST, pair = rest / K_COLUMNS / KShare::MOST;
    int which = pair % KShare::PAIRS_PER_STEP, step = pair / KShare::PAIRS_PER_STEP % KShare::STEPS;
    int chunk = pair / KShare::PAIRS_PER_STEP / KShare::STEPS, group = KShare::low(chunk, which) + slot;
    int row = TERMS == 1 ? 8 * column + g : 8 * (column / 2) + 4 * (column % 2) + g / 2;
    u32 x[2] = {0, 0};
    for (int half = 0; half < 2; ++half) {
      if (half && !KShare::BY_PLANE && !KShare::BY_UNIT) break;
      int j = chunk * KShare::SIZE + (t * KShare::VEC + KShare::unit(step, half)) * 2;
      if (row >= unit.rows || j >= K::WORDS) continue;
      float value[2];
      for (int i = 0; i < 2; ++i) {
        int d = K::dim(j + i, KShare::plane(which, half));
        value[i] = d / K::SPAN == group ? load_q(p.q, q_offset(p, unit, row) + d) * norms[row] : 0.0f;
      }
      if (K::IS_BF16) {
        u32 low;
        split_bf16(value[0], value[1], x[half], low);
        if (TERMS == 2 && g % 2) x[half] = low;
      } else {
        x[half] = f16x2(value[0], value[1]);
        if (TERMS == 2 && g % 2) x[half] = f16x2(value[0] - f32_of_f16(x[half]), value[1] - f32_of_f16(x[half] >> 16));
      }
    }
    ((uint2*)(shared + Q_AT))[e] = make_uint2(x[0], x[1]);
  }
  if constexpr (K::OFFSET) {
    __syncthreads();
    float* sums = (float*)(shared + SUMS_AT);
    for (int e = threadIdx.x; e < K_COLUMNS * 8 * K::GROUPS; e += WARPS * 32) {
      int group = e % K::GROUPS, g = e / K::GROUPS % 8, column = e / K::GROUPS / 8;
      float sum = 0.0f;
      for (int pair = 0; pair < KShare::PAIRS; ++pair) {
        int slot = group - KShare::low(pair / KShare::PAIRS_PER_STEP / KShare::STEPS, pair % KShare::PAIRS_PER_STEP);
        if (slot < 0 || slot >= KShare::MOST) continue;
        for (int t = 0; t < 4; ++t) {
          uint2 x = ((uint2*)(shared + Q_AT))[((pair * KShare::MOST + slot) * K_COLUMNS + column) * 32 + 4 * g + t];
          sum += f32_of_f16(x.x) + f32_of_f16(x.x >> 16) + f32_of_f16(x.y) + f32_of_f16(x.y >> 16);
        }
      }
      sums[e] = -K::OFFSET_VALUE * sum;
    }
  }
}

// s[tile][column][2 * (token / 8) + i] of a tile of slots
INLINE void score(float (&s)[TILES][COLUMNS][4], u32 ring, u32 shared, const KScales (&scales)[TILES][2], Table table, int lane) {
  int g = lane / 4, t = lane % 4;
  u32 lut = shared + K_LUT + lane * 4;
  float sums[TILES][K_SUMS][K_COLUMNS][4];
  auto start = [&](float (&c)[4], int group, int column) {
    c[0] = c[1] = c[2] = c[3] = 0.0f;
    if constexpr (K::OFFSET) {
      u32 at = shared + SUMS_AT + ((column * 8 + 2 * t) * K::GROUPS + group) * 4, x, y;
      load_shared<1>(at, &x);
      load_shared<1>(at + K::GROUPS * 4, &y);
      c[0] = c[2] = __uint_as_float(x);
      c[1] = c[3] = __uint_as_float(y);
    }
  };
  auto finish = [&](const float (&c)[4], int tile, int group, int column) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float scale = scales[tile][i].at(group);
      if (TERMS == 1) {
        s[tile][column][2 * i] += c[2 * i] * scale;
        s[tile][column][2 * i + 1] += c[2 * i + 1] * scale;
      } else {
        s[tile][column / 2][2 * i + column % 2] += (c[2 * i] + c[2 * i + 1]) * scale;
      }
    }
  };
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) s[tile][j][0] = s[tile][j][1] = s[tile][j][2] = s[tile][j][3] = 0.0f;
#pragma unroll
    for (int i = 0; i < K_SUMS; ++i)
#pragma unroll
      for (int j = 0; j < K_COLUMNS; ++j)
        if (K::GROUPS > 1 || i == 0) start(sums[tile][i][j], i, j);
        else sums[tile][i][j][0] = sums[tile][i][j][1] = sums[tile][i][j][2] = sums[tile][i][j][3] = 0.0f;
  }
#pragma unroll
  for (int chunk = 0; chunk < KShare::CHUNKS; ++chunk) {
    int j = chunk * KShare::SIZE + t * 2 * KShare::VEC;
    if (!KShare::WHOLE) j = min(j, K::WORDS - 2 * KShare::VEC);
    u32 z[TILES][2][K::NREG][KShare::VEC];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int i = 0; i < 2; ++i) load_pairs<K, KShare::VEC>(ring + (tile * 16 + i * 8 + g) * K_PITCH, j, z[tile][i]);
#pragma unroll
    for (int step = 0; step < KShare::STEPS; ++step) {
      u32 h[TILES][2][KShare::UNITS_TOGETHER][K::PLANES];
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int u = 0; u < KShare::UNITS_TOGETHER; ++u) {
            u32 unit[K::NREG];
#pragma unroll
            for (int r = 0; r < K::NREG; ++r) unit[r] = z[tile][i][r][KShare::unit(step, u)];
            expand<K>(unit, h[tile][i][u], table, lut);
          }
#pragma unroll
      for (int w = 0; w < KShare::PAIRS_PER_STEP; ++w) {
        int pair = KShare::pair(chunk, step, w);
#pragma unroll
        for (int group = KShare::low(chunk, w); group <= KShare::high(chunk, w); ++group)
#pragma unroll
          for (int column = 0; column < K_COLUMNS; ++column) {
            u32 b[2];
            int at = ((pair * KShare::MOST + group - KShare::low(chunk, w)) * K_COLUMNS + column) * 256;
            load_shared<2>(shared + Q_AT + at + lane * 8, b);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
              const u32(&x)[KShare::UNITS_TOGETHER][K::PLANES] = h[tile][0];
              const u32(&y)[KShare::UNITS_TOGETHER][K::PLANES] = h[tile][1];
              constexpr int U = KShare::UNITS_TOGETHER - 1;
              int k0 = KShare::plane(w, 0), k1 = KShare::plane(w, KShare::BY_PLANE ? 1 : 0);
              bool both = KShare::BY_PLANE || KShare::BY_UNIT;
              float(&c)[4] = sums[tile][K::GROUPS > 1 ? (K_KEPT ? group : 0) : pair % K_SUMS][column];
              mma<K::IS_BF16>(c, x[0][k0], y[0][k0], both ? x[U][k1] : 0, both ? y[U][k1] : 0, b[0], b[1]);
              if (!K_KEPT) {
                finish(c, tile, group, column);
                c[0] = c[1] = c[2] = c[3] = 0.0f;
              }
            }
          }
      }
    }
  }
  if (K_KEPT)
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int i = 0; i < K_SUMS; ++i)
#pragma unroll
        for (int column = 0; column < K_COLUMNS; ++column) finish(sums[tile][i][column], tile, K::GROUPS > 1 ? i : 0, column);
}

constexpr int V_TILES = VShare::PAIRS / (V::SPLIT && VShare::BY_UNIT ? 2 : 1);  // of 16 dims

struct Running {  // of a warp: the softmax so far
  float top[COLUMNS][2], total[COLUMNS][2];
  float unit, inverse;                   // power of two that V's scales are relative to; WEIGHT / unit
  float out[V_TILES][COLUMNS][4];
  float offset[V::OFFSET ? V::GROUPS : 1][COLUMNS][4];  // what the offset of V's bytes adds to out
};

INLINE void scale_out(Running& r, int column, float a, float b) {
#pragma unroll
  for (int i = 0; i < V_TILES; ++i) {
    r.out[i][column][0] *= a, r.out[i][column][1] *= b;
    r.out[i][column][2] *= a, r.out[i][column][3] *= b;
  }
  if constexpr (V::OFFSET)
#pragma unroll
    for (int i = 0; i < V::GROUPS; ++i) {
      r.offset[i][column][0] *= a, r.offset[i][column][1] *= b;
      r.offset[i][column][2] *= a, r.offset[i][column][3] *= b;
    }
}

INLINE float over_tokens(float x) {  // the largest of the lanes that share columns
#pragma unroll
  for (int i = 4; i < 32; i *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}

// new references for the scores and for V's scales; rare, because both may pass them by a factor
INLINE void rescale(Running& r, const float (&s)[TILES][COLUMNS][4], float widest) {
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j) {
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = r.top[j][i];
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) most = fmaxf(most, fmaxf(s[tile][j][i], s[tile][j][2 + i]));
      most = over_tokens(most);
      factor[i] = r.top[j][i] == -INFINITY ? 0.0f : exp2_fast(r.top[j][i] - most);
      r.total[j][i] *= factor[i];
      r.top[j][i] = most;
    }
    scale_out(r, j, factor[0], factor[1]);
  }
  if constexpr (V::SCALED) {
    widest = over_tokens(widest);
    if (widest > r.unit) {
      float unit = __uint_as_float(min(__float_as_uint(widest) + 0x7FFFFFu & 0x7F800000u, 0x7E000000u));  // up to a power of two
      float factor = r.unit / unit;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) scale_out(r, j, factor, factor);
      r.unit = unit, r.inverse = WEIGHT / unit;
    }
  }
}

// out += v^T times weights
INLINE void add_values(Running& r, const float (&s)[TILES][COLUMNS][4], u32 ring, u32 shared, const VScales (&scales)[TILES][2],
                       Table table, int lane) {
  int g = lane / 4, t = lane % 4;
  u32 lut = shared + V_LUT + lane * 4;
  u32 b[TILES][V::GROUPS][V_TERMS][COLUMNS][2];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int group = 0; group < V::GROUPS; ++group)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float scale = V::SCALED ? scales[tile][i].at(group) * r.inverse : V::IS_BF16 ? 1.0f : WEIGHT;
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
          float x = s[tile][j][2 * i] * scale, y = s[tile][j][2 * i + 1] * scale;
          if constexpr (V::IS_BF16) {
            u32 high, low;
            split_bf16(x, y, high, low);
            b[tile][group][0][j][i] = transpose8(high);
            b[tile][group][V_TERMS - 1][j][i] = transpose8(low);
          } else {
            b[tile][group][0][j][i] = transpose8(f16x2(x, y));
          }
        }
      }
  if constexpr (V::OFFSET)
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int group = 0; group < V::GROUPS; ++group)
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j)
          mma<false>(r.offset[group][j], 0x00800080, 0x00800080, 0x00800080, 0x00800080, b[tile][group][0][j][0], b[tile][group][0][j][1]);
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int chunk = 0; chunk < VShare::CHUNKS; ++chunk) {
      int from = chunk * VShare::SIZE + g * VShare::VEC, word = VShare::WHOLE ? from : min(from, V::WORDS - VShare::VEC);
      u32 row = ring + (tile * 16 + 2 * t) * V_PITCH;
      Words<V, VShare::VEC> w[4];
      w[0].load(row, word);
      w[1].load(row + V_PITCH, word);
      w[2].load(row + 8 * V_PITCH, word);
      w[3].load(row + 9 * V_PITCH, word);
#pragma unroll
      for (int step = 0; step < VShare::STEPS; ++step) {
        u32 h[2][VShare::UNITS_TOGETHER][V::PLANES];
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int u = 0; u < VShare::UNITS_TOGETHER; ++u) {
            u32 z[V::NREG];
            join(w[2 * i], w[2 * i + 1], VShare::unit(step, u), z);
            expand<V>(z, h[i][u], table, lut);
          }
#pragma unroll
        for (int p = 0; p < VShare::PAIRS_PER_STEP; ++p) {
          constexpr int U = VShare::UNITS_TOGETHER - 1;
          int k0 = VShare::plane(p, 0), k1 = VShare::plane(p, VShare::BY_PLANE ? 1 : 0);
          bool both = VShare::BY_PLANE || VShare::BY_UNIT;
          int pair = VShare::pair(chunk, step, p);
          if (V::SPLIT && VShare::BY_UNIT) pair = pair / 2;
          int low = VShare::low(chunk, p), high = VShare::high(chunk, p);
#pragma unroll
          for (int group = low; group <= high; ++group) {
            u32 a[4] = {h[0][0][k0], both ? h[0][U][k1] : 0, h[1][0][k0], both ? h[1][U][k1] : 0};
            if (low != high) {  // dims of other scales contribute nothing here
              bool first = V::dim(from + VShare::unit(step, 0), k0) / V::SPAN == group;
              bool second = V::dim(from + VShare::unit(step, U), k1) / V::SPAN == group;
              a[0] = first ? a[0] : 0, a[2] = first ? a[2] : 0;
              a[1] = second ? a[1] : 0, a[3] = second ? a[3] : 0;
            }
#pragma unroll
            for (int term = 0; term < V_TERMS; ++term)
#pragma unroll
              for (int j = 0; j < COLUMNS; ++j)
                mma<V::IS_BF16>(r.out[pair][j], a[0], a[1], a[2], a[3], b[tile][group][term][j][0], b[tile][group][term][j][1]);
          }
        }
      }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) attend(const __grid_constant__ Attend p) {
  extern __shared__ __align__(128) char memory[];
  __shared__ float norms[8 * COLUMNS];
  __shared__ float2 tops[WARPS][8 * COLUMNS];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int split = blockIdx.x / p.row_tiles;
  Unit unit{(int)blockIdx.z, (int)blockIdx.y, (int)(blockIdx.x % p.row_tiles) * ROWS, 0};
  unit.rows = min(ROWS, p.groups * p.q_len - unit.row_base);
  u32 shared = shared_address(memory);

  // positions: which are live, then all relative to the first of them
  i64 length = p.lengths ? p.lengths[unit.batch * p.lengths_batch] : p.length, q_first = length - p.q_len;
  i64 first = max(p.first, length - p.keep), stop = min(p.stop, length - p.trail);
  i64 low_row = q_first + unit.row_base / p.groups, high_row = q_first + (unit.row_base + unit.rows - 1) / p.groups;
  i64 start = p.starts ? p.starts[unit.batch] : 0;
  if (p.window) first = max(first, low_row - p.window + 1);
  first = max(first, start);
  if (p.causal || p.window) stop = min(stop, high_row + 1);
  Slots slots{(int)((u64)(first - p.base) % (u32)p.capacity), (int)max(0ll, stop - first), p.capacity};
  int low = (int)(low_row - first), high = (int)(high_row - first), window = (int)min(p.window, (i64)0x40000000);
  bool straight = slots.first_slot + slots.count <= slots.capacity;  // does not wrap around
  int tile_low = straight ? slots.first_slot / TILE : 0;
  int tiles = slots.count == 0 ? 0 : ((straight ? slots.first_slot + slots.count : slots.capacity) + TILE - 1) / TILE - tile_low;
  int begin = tile_low + (int)((i64)tiles * split / p.splits), end = tile_low + (int)((i64)tiles * (split + 1) / p.splits);
  // a tile whose first position is in this range is seen by all rows
  int free_low = window ? high - window + 1 : 0, free_high = p.causal || window ? low - TILE + 1 : 0x7FFFFFFF;

#if PAGED
  int sequence = 0;  // sequences have no stride: their pages do
  const int* pages = p.pages + unit.batch * p.pages_batch;
#else
  int sequence = unit.batch;
  const int* pages = nullptr;
#endif
  int page_slots = (int)p.page_slots;
  auto rows_at = [&](const char* base, i64 batch, i64 head, i64 slot) {
    return Rows{base + sequence * batch + unit.head * head, slot, batch, pages, page_slots};
  };
  Rows k_rows = rows_at(p.k.words, p.k.words_batch, p.k.words_head, p.k.words_slot);
  Rows v_rows = rows_at(p.v.words, p.v.words_batch, p.v.words_head, p.v.words_slot);
  Rows k_scale_rows = rows_at(p.k.scale, p.k.scale_batch, p.k.scale_head, p.k.scale_slot);
  Rows v_scale_rows = rows_at(p.v.scale, p.v.scale_batch, p.v.scale_head, p.v.scale_slot);
  u32 k_ring = shared + RING_AT + warp * STAGES * STAGE_BYTES, v_ring = k_ring + STAGES * TILE * K_PITCH;

  // each ring takes its next tile as soon as one has been used: groups of copies alternate between K and V
  auto copy_k = [&](int tile, int stage) {
    if (tile < end) copy_rows<K, TILE, K_PITCH, K_COPY, K_STRIDE>(k_ring + stage * TILE * K_PITCH, k_rows, tile * TILE, slots, lane);
    commit_copies();
  };
  auto copy_v = [&](int tile, int stage) {
    if (tile < end) copy_rows<V, TILE, V_PITCH, V_COPY, V_STRIDE>(v_ring + stage * TILE * V_PITCH, v_rows, tile * TILE, slots, lane);
    commit_copies();
  };
  KScales k_scales[TILES][2], k_next[TILES][2];
  VScales v_scales[TILES][2], v_next[TILES][2];
  auto fetch_scales = [&](int tile) {
    if (!(K::SCALED || V::SCALED) || tile >= end) return;
    const char* k_from = k_scale_rows.at<K_SCALE_STRIDE>(tile * TILE);
    const char* v_from = v_scale_rows.at<V_SCALE_STRIDE>(tile * TILE);
    bool whole = slots.whole(tile * TILE, TILE);
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = i * 16 + half * 8 + g;
        bool live = whole || slots.live(tile * TILE + row);
        k_next[i][half].load(k_from + row * (K_SCALE_STRIDE ? K_SCALE_STRIDE : k_scale_rows.slot_stride), live);
        v_next[i][half].load(v_from + row * (V_SCALE_STRIDE ? V_SCALE_STRIDE : v_scale_rows.slot_stride), live);
      }
  };

#pragma unroll
  for (int i = 0; i < STAGES; ++i) {
    copy_k(begin + warp + i * WARPS, i);
    copy_v(begin + warp + i * WARPS, i);
  }
  fetch_scales(begin + warp);
  if constexpr (K_KIND == TABLE) fill_table(shared + K_LUT, p.k_table, 1 << K_BITS);
  if constexpr (V_KIND == TABLE && !SHARED_TABLE) fill_table(shared + V_LUT, p.v_table, 1 << V_BITS);
  fill_queries(memory, p, unit, norms);
  __syncthreads();

  Table k_table{p.k_low, p.k_high}, v_table{p.v_low, p.v_high};
  float multiply[COLUMNS][2], slope[COLUMNS][2];
  int q_position[COLUMNS][2];
  i64 mask_row[COLUMNS][2];
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int row = row_of(j, i, t), r = unit.row_base + min(row, unit.rows - 1), head = unit.head * p.groups + r % p.groups;
      multiply[j][i] = p.scale * p.k_factor * (PLAIN ? LOG2E : 1.0f) / norms[min(row, 8 * COLUMNS - 1)];
      q_position[j][i] = (int)(q_first - first) + r / p.groups;
      slope[j][i] = ALIBI ? p.slopes[head] : 1.0f;
      mask_row[j][i] = unit.batch * p.mask_batch + head * p.mask_head + (r / p.groups) * p.mask_token;
    }

  Running run;
  run.unit = run.inverse = 0.0f;
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j) {
    run.top[j][0] = run.top[j][1] = -INFINITY;
    run.total[j][0] = run.total[j][1] = 0.0f;
#pragma unroll
    for (int i = 0; i < V_TILES; ++i) run.out[i][j][0] = run.out[i][j][1] = run.out[i][j][2] = run.out[i][j][3] = 0.0f;
#pragma unroll
    for (int i = 0; i < (V::OFFSET ? V::GROUPS : 1); ++i)
      run.offset[i][j][0] = run.offset[i][j][1] = run.offset[i][j][2] = run.offset[i][j][3] = 0.0f;
  }

  int stage = 0;
  for (int tile = begin + warp; tile < end; tile += WARPS) {
    int slot = tile * TILE, later = tile + STAGES * WARPS;
    wait_copies<2 * STAGES - 1>();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) k_scales[i][half] = k_next[i][half], v_scales[i][half] = v_next[i][half];
    fetch_scales(tile + WARPS);

    float s[TILES][COLUMNS][4];
    score(s, k_ring + stage * TILE * K_PITCH, shared, k_scales, k_table, lane);
    __syncwarp();
    copy_k(later, stage);

#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float x = s[i][j][e] * multiply[j][e % 2];
          if (SOFTCAP) {
            float y = x / p.softcap, z = 1.0f - 2.0f / (exp2f(2.0f * LOG2E * fabsf(y)) + 1.0f);
            x = p.softcap * copysignf(z, y);
          }
          s[i][j][e] = PLAIN || MASK ? x : x * LOG2E;
        }
    int offset = slots.offset(slot);
    bool free = MASK == 0 && slots.whole(slot, TILE) && offset >= free_low && offset <= free_high;
    if (!free) {
#pragma unroll
      for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int mine = slot + i * 16 + half * 8 + g;
          bool live = slots.live(mine);
          int position = slots.offset(mine);
#pragma unroll
          for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              int back = q_position[j][e] - position;
              bool seen = live && (!(p.causal || window) || back >= 0) && (!window || back < window);
              float& x = s[i][j][2 * half + e];
              if (MASK) {
                float bias = seen ? load_mask(p.mask, mask_row[j][e] + (first + position - p.kv_first) * p.mask_key) : 0.0f;
                x = bias == -INFINITY ? bias : (x + (MASK == 1 ? 0.0f : slope[j][e] * bias)) * LOG2E;
              }
              if (!seen) x = -INFINITY;
            }
          if (!live) v_scales[i][half].load(nullptr, false);
        }
    }
    float widest = 0.0f;
    bool grown = false;
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (V::SCALED)
#pragma unroll
          for (int group = 0; group < V::GROUPS; ++group) widest = fmaxf(widest, fabsf(v_scales[i][half].at(group)));
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) grown |= s[i][j][2 * half + e] > run.top[j][e] + SLACK;
      }
    if (__any_sync(~0u, grown || widest > 4.0f * run.unit)) rescale(run, s, widest);
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float top = run.top[j][e] == -INFINITY ? 0.0f : run.top[j][e];
#pragma unroll
        for (int i = 0; i < TILES; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& x = s[i][j][2 * half + e];
            x = exp2_fast(x - top);
            run.total[j][e] += x;
          }
      }
    wait_copies<2 * STAGES - 1>();
    __syncwarp();
    add_values(run, s, v_ring + stage * TILE * V_PITCH, shared, v_scales, v_table, lane);
    __syncwarp();
    copy_v(later, stage);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }

  // the warps of the block become one result
  wait_copies<0>();
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float total = run.total[j][e];
#pragma unroll
      for (int i = 4; i < 32; i *= 2) total += __shfl_xor_sync(~0u, total, i);
      if (g == 0) tops[warp][8 * j + 2 * t + e] = make_float2(run.top[j][e], total);
    }
  __syncthreads();
  float* parts = (float*)memory;  // [WARPS][DV][8 * COLUMNS]
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j) {
    float factor[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float most = -INFINITY;
      for (int w = 0; w < WARPS; ++w) most = fmaxf(most, tops[w][8 * j + 2 * t + e].x);
      factor[e] = run.top[j][e] == -INFINITY ? 0.0f : exp2_fast(run.top[j][e] - most);
      factor[e] *= V::SCALED ? run.unit / WEIGHT * p.v_factor : V::IS_BF16 ? p.v_factor : p.v_factor / WEIGHT;
    }
#pragma unroll
    for (int chunk = 0; chunk < VShare::CHUNKS; ++chunk)
#pragma unroll
      for (int step = 0; step < VShare::STEPS; ++step)
#pragma unroll
        for (int w = 0; w < VShare::PAIRS_PER_STEP; ++w) {
          if (V::SPLIT && VShare::BY_UNIT && w) continue;
          int pair = VShare::pair(chunk, step, w);
          if (V::SPLIT && VShare::BY_UNIT) pair = pair / 2;
          bool both = VShare::BY_PLANE || VShare::BY_UNIT;
          const float(&c)[4] = run.out[pair][j];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (half && (!both || (V::SPLIT && VShare::BY_PLANE))) continue;
            int word = chunk * VShare::SIZE + g * VShare::VEC + VShare::unit(step, half);
            int d = V::dim(word, VShare::plane(w, half));
            float2 x = make_float2(c[2 * half], c[2 * half + 1]);
            if (V::SPLIT && VShare::BY_PLANE) x.x += c[2], x.y += c[3];
            if constexpr (V::OFFSET) {  // which of the scales a dim has is known when it is compiled, but for odd sizes
              int low = VShare::low(chunk, w), high = VShare::high(chunk, w);
#pragma unroll
              for (int group = low; group <= high; ++group)
                if (low == high || d / V::SPAN == group) x.x -= run.offset[group][j][0], x.y -= run.offset[group][j][1];
            }
            x.x *= factor[0], x.y *= factor[1];
            if (VShare::WHOLE || word < V::WORDS) *(float2*)(parts + (warp * DV + d) * 8 * COLUMNS + 8 * j + 2 * t) = x;
          }
        }
  }
  __syncthreads();
  auto place = [&](int column) {  // of a row in the results
    int row = TERMS == 1 ? column : column / 8 * 8 + column % 8 / 2 + 4 * (column % 2), r = unit.row_base + row;
    if (row >= unit.rows) return (i64)-1;
    return (((i64)unit.batch * p.q_heads + unit.head * p.groups + r % p.groups) * p.q_len + r / p.groups) * p.splits_total + p.split_base + split;
  };
  for (int e = threadIdx.x; e < DV * 8 * COLUMNS; e += WARPS * 32) {
    i64 at = place(e % (8 * COLUMNS));
    if (at < 0) continue;
    float sum = 0.0f;
    for (int w = 0; w < WARPS; ++w) sum += parts[w * DV * 8 * COLUMNS + e];
    p.out[at * DV + e / (8 * COLUMNS)] = sum;
  }
  if (threadIdx.x < 8 * COLUMNS) {
    i64 at = place(threadIdx.x);
    float most = -INFINITY, total = 0.0f;
    for (int w = 0; w < WARPS; ++w) most = fmaxf(most, tops[w][threadIdx.x].x);
    for (int w = 0; w < WARPS; ++w)
      if (tops[w][threadIdx.x].y > 0.0f) total += tops[w][threadIdx.x].y * exp2_fast(tops[w][threadIdx.x].x - most);
    if (at >= 0) p.top[at] = make_float2(most, total);
  }
}
