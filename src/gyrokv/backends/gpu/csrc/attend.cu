// Flash decoding over packed rows (Dao et al. 2022 and 2023: running softmax, keys split over blocks).
//
// A block serves up to ROWS query rows of one KV head over one range of slots; its warps take tiles of TILE slots in
// turn, each with its own place for a tile in shared memory, and never wait for each other until the end.
// Scores are computed transposed, k [16 tokens x 16 dims] times q [16 dims x 8 rows], so that 8 rows fill the tensor
// cores, and so is the output, v^T [16 dims x 16 tokens] times weights [16 tokens x 8 rows]. Rows expand from shared
// memory straight into operands (codec.cuh): the order of dims in a product is free, so no value moves between lanes.
// Scales never touch elements: K's multiplies scores, V's the weights.
//
// The host defines K_KIND, K_BITS, K_SPAN, K_SCALE32, K_INT (and V_), DK, DV, ROWS, TERMS, Q_TYPE, SOFTCAP, MASK, ALIBI, TILE,
// WARPS, K_TURN and V_TURN (the blocks of rotations that q and the output go through, or 0), OUT_TYPE (finish.cuh), K_PITCH, K_COPY, K_STRIDE, K_SCALE_COPY, K_SCALE_STRIDE (and V_),
// SAME_TABLE, LUT_PAIRS, PAGED, TEAM (warps that share the words of each row), SHARED (bytes).
#include "finish.cuh"
#include "values.cuh"

constexpr int TEAMS = WARPS / TEAM;  // each takes tiles of its own; its warps share the words of rows
constexpr int K_SCALES = TILE * KScales::BYTES + (K_SCALE_COPY == 2 ? 16 : 0), V_SCALES = TILE * VScales::BYTES + (V_SCALE_COPY == 2 ? 16 : 0);  // bytes
constexpr int TILE_BYTES = TILE * (K_PITCH + V_PITCH) + K_SCALES + V_SCALES;
constexpr float MOST = 32.0f;  // of a lane's weights in a tile before everything is rescaled: times 4 WEIGHT they are half precision
constexpr int SUMS = TILES * COLUMNS * 2 * PER_LANE, SUMS_AT = RING_AT + WARPS * TILE_BYTES;  // of a team, by lane
static_assert(WARPS % TEAM == 0 && TEAM <= 2 && SUMS_AT + (TEAM > 1 ? 2 * WARPS * SUMS * 128 : 0) <= SHARED && TEAMS * ALL_ROWS * DV * 4 <= SHARED, "shared memory");

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) attend(const __grid_constant__ Attend p) {
  extern __shared__ __align__(128) char memory[];
  __shared__ float norms[ALL_ROWS];
  __shared__ float2 tops[TEAMS][ALL_ROWS], joined[ALL_ROWS];
  touch(p, shared_address(norms));
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int team = warp / TEAM, rank = warp % TEAM;
  Unit unit;
  unit.batch = quotient(blockIdx.z, p.splits, p.over_splits), unit.head = blockIdx.y;
  int split = blockIdx.z - unit.batch * p.splits, base = blockIdx.x * ROWS;  // base: first row of the block
  unit.token = quotient(base, p.groups, p.over_groups), unit.member = base - unit.token * p.groups;
  unit.rows = min(ROWS, p.groups * p.q_len - base);
  u32 shared = shared_address(memory);

  // tables, and positions that the host knows, do not wait
  TableCopy<K, true> k_levels(p.k_table);
  TableCopy<V, !(K_KIND == TABLE && SAME_TABLE)> v_levels(p.v_table);
  if (p.lengths || p.starts) wait_for_earlier_kernels();
  // positions: which are live, then all relative to the first of them
  int length = p.lengths ? (int)(p.lengths[unit.batch * p.lengths_batch] - p.origin) : p.length, q_first = length - p.q_len;
  int first = max(p.first, length - p.keep), stop = min(p.stop, length - p.trail);
  int low_row = q_first + unit.token, high_row = q_first + row_at(p, unit, unit.rows - 1).token;
  if (p.window) first = max(first, low_row - p.window + 1);
  if (p.starts) first = max(first, (int)max(p.starts[unit.batch] - p.origin, 0ll));
  if (p.causal || p.window) stop = min(stop, high_row + 1);
  Slots slots{first, max(0, stop - first), p.capacity};
  if (first >= p.capacity) slots.first_slot = first % p.capacity;
  int low = low_row - first, high = high_row - first, window = p.window;
  bool straight = slots.first_slot + slots.count <= slots.capacity;  // does not wrap around
  int tile_low = straight ? slots.first_slot / TILE : 0;
  int tiles = slots.count == 0 ? 0 : ((straight ? slots.first_slot + slots.count : slots.capacity) + TILE - 1) / TILE - tile_low;
  int share = quotient(tiles, p.splits, p.over_splits), rest = tiles - share * p.splits;  // the first `rest` splits take one more
  int begin = tile_low + split * share + min(split, rest), end = begin + share + (split < rest);
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
  u32 k_at = shared + RING_AT + warp * TILE_BYTES, v_at = k_at + TILE * K_PITCH, k_scales_at = v_at + TILE * V_PITCH, v_scales_at = k_scales_at + K_SCALES;
  u32 k_skew = K_SCALE_COPY == 2 ? (u32)(u64)k_scale_rows.base & 2 : 0, v_skew = V_SCALE_COPY == 2 ? (u32)(u64)v_scale_rows.base & 2 : 0;

  // a warp takes its next tile as soon as one has been used: groups of copies alternate between K and V
  auto copy_k = [&](auto whole, int tile) {
    if (decltype(whole)::value || tile < end) {
      copy_rows<K, TILE, K_PITCH, K_COPY, K_STRIDE, decltype(whole)::value>(k_at, k_rows, tile * TILE, slots, rank, lane);
      copy_scales<KScales, K_SCALE_STRIDE, K_SCALE_COPY, decltype(whole)::value>(k_scales_at, k_skew, k_scale_rows, tile * TILE, slots, lane);
    }
    commit_copies();
  };
  auto copy_v = [&](auto whole, int tile) {
    if (decltype(whole)::value || tile < end) {
      copy_rows<V, TILE, V_PITCH, V_COPY, V_STRIDE, decltype(whole)::value>(v_at, v_rows, tile * TILE, slots, rank, lane);
      copy_scales<VScales, V_SCALE_STRIDE, V_SCALE_COPY, decltype(whole)::value>(v_scales_at, v_skew, v_scale_rows, tile * TILE, slots, lane);
    }
    commit_copies();
  };

  Early early(p, unit);
  k_levels.store(shared), v_levels.store(shared + V_LUT);
  wait_for_earlier_kernels();
  early.load();
  int tile = begin + team;
  if (tile < end && slots.whole(tile * TILE, TILE)) copy_k(Bool<true>(), tile), copy_v(Bool<true>(), tile);
  else copy_k(Bool<false>(), tile), copy_v(Bool<false>(), tile);
  fill_queries(memory, p, early, norms);
  __syncthreads();

  Table k_table{p.k_low, p.k_high}, v_table{p.v_low, p.v_high};
  float multiply[COLUMNS][PER_LANE], slope[COLUMNS][PER_LANE];
  int q_position[COLUMNS][PER_LANE];
  i64 mask_row[COLUMNS][PER_LANE];
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      int row = row_of(j, i, t);
      At at = row_at(p, unit, min(row, unit.rows - 1));
      multiply[j][i] = __fdividef(p.scale * p.k_factor * (K_INT ? 1.0f : K::FACTOR) * (PLAIN ? LOG2E : 1.0f), norms[row]);
      q_position[j][i] = q_first - first + at.token;
      slope[j][i] = ALIBI ? p.slopes[at.head] : 1.0f;
      mask_row[j][i] = unit.batch * p.mask_batch + at.head * p.mask_head + at.token * p.mask_token;
    }

  Running run;
  run.unit = run.inverse = 0.0f;
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j) {
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      run.top[j][i] = UNSEEN, run.total[j][i] = 0.0f;
      for (float& x : run.offset[j][i]) x = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < V_TILES; ++i)
#pragma unroll
      for (float& x : run.out[i][j]) x = 0.0f;
  }

  int turn = 0;  // half of the sums' place: a warp may be a step ahead of the other
  // free: this tile and the one that is fetched meanwhile are whole, and all rows see all of this one
  auto step = [&](auto free, int tile) {
    constexpr bool SEEN = decltype(free)::value;
    int slot = tile * TILE, later = tile + TEAMS;
    wait_copies<1>();
    __syncwarp();
    KScales k_scales[TILES][2];
    load_scales(k_scales, k_scales_at + k_skew, g);
    float s[TILES][COLUMNS][4];
    // sums of a row's scales fill registers
    constexpr int PER_TILE = K_SUMS * K_COLUMNS, AT_ONCE = !K_INT || TILES * PER_TILE <= 8 ? TILES : TILES % 2 == 0 && 2 * PER_TILE <= 8 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < TILES; i += AT_ONCE)
      score<K_INT, AT_ONCE>((float(&)[AT_ONCE][COLUMNS][4])s[i], k_at + i * 16 * K_PITCH, memory, rank, (const KScales(&)[AT_ONCE][2])k_scales[i], k_table, lane);
    __syncwarp();
    copy_k(free, later);
    wait_copies<1>();
    __syncwarp();
    VScales v_scales[TILES][2];
    load_scales(v_scales, v_scales_at + v_skew, g);
    if constexpr (TEAM > 1) {
      u32 mine = shared + SUMS_AT + ((warp + turn * WARPS) * SUMS * 32 + lane) * 4, theirs = shared + SUMS_AT + (((warp ^ 1) + turn * WARPS) * SUMS * 32 + lane) * 4;
      turn ^= 1;
#pragma unroll
      for (int i = 0; i < SUMS; ++i) store_shared(mine + i * 128, s[i / (SUMS / TILES)][i / (2 * PER_LANE) % COLUMNS][i % (2 * PER_LANE) * (2 / PER_LANE)]);
      sync_pair(team);
#pragma unroll
      for (int i = 0; i < SUMS; ++i) s[i / (SUMS / TILES)][i / (2 * PER_LANE) % COLUMNS][i % (2 * PER_LANE) * (2 / PER_LANE)] += load_shared_f32(theirs + i * 128);
    }

    constexpr bool AS_IS = PLAIN && SEEN;  // scores are multiplied on their way to weights
#pragma unroll
    for (int i = 0; i < (AS_IS ? 0 : TILES); ++i)
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (PER_LANE == 1 && e % 2) continue;
          float x = s[i][j][e] * multiply[j][e % PER_LANE];
          if (SOFTCAP) {
            float y = x / p.softcap, z = 1.0f - 2.0f / (exp2f(2.0f * LOG2E * fabsf(y)) + 1.0f);
            x = p.softcap * copysignf(z, y);
          }
          s[i][j][e] = PLAIN || MASK ? x : x * LOG2E;
        }
    if (!SEEN) {
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
            for (int e = 0; e < PER_LANE; ++e) {
              int back = q_position[j][e] - position;
              bool seen = live && (!(p.causal || window) || back >= 0) && (!window || back < window);
              float& x = s[i][j][2 * half + e];
              if (MASK) {
                float bias = seen ? load_mask(p.mask, mask_row[j][e] + (first + position - p.kv_first) * p.mask_key) : 0.0f;
                x = bias == -INFINITY ? bias : (x + (MASK == 1 ? 0.0f : slope[j][e] * bias)) * LOG2E;
              }
              if (!seen) x = -INFINITY;
            }
        }
    }
    auto relative = [&](float x, int j, int e) { return AS_IS ? fmaf(x, multiply[j][e], -run.top[j][e]) : x - run.top[j][e]; };
    float widest = 0.0f;
#pragma unroll
    for (int i = 0; i < (V::SCALED && !V_INT ? TILES : 0); ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int group = 0; group < V::GROUPS; ++group) widest = fmaxf(widest, fabsf(v_scales[i][half].at(group)));
    bool grown = widest > 4.0f * run.unit;
    float weights[TILES][COLUMNS][4], sums[COLUMNS][PER_LANE];
    auto weigh = [&] {
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
        for (int e = 0; e < PER_LANE; ++e) {
          sums[j][e] = 0.0f;
#pragma unroll
          for (int i = 0; i < TILES; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) sums[j][e] += weights[i][j][2 * half + e] = exp2_fast(relative(s[i][j][2 * half + e], j, e));
          grown |= sums[j][e] > MOST;
        }
    };
    weigh();
    if (__any_sync(~0u, grown)) {
      rescale(run, s, AS_IS, multiply, widest);
      weigh();
    }
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
      for (int e = 0; e < PER_LANE; ++e) run.total[j][e] += sums[j][e];
    if constexpr (V_INT) add_values_bytes(run, weights, v_at, v_scales, v_table, lane);
    else add_values_floats(run, weights, v_at, memory, v_scales, v_table, lane);
    __syncwarp();
    copy_v(free, later);
  };

  // Tiles that all rows see whole, and whose successor in the warp is whole: of slots from the first one on, of those before it
  struct Range {
    int low;
    u32 count;
    INLINE int stop(int tile) const { return (u32)(tile - low) < count ? low + count : 0; }  // if it holds this one
  };
  auto free_tiles = [&](int shift, int low, int high) {  // of offsets low .. high - 1, in slots that are `shift` further
    int from = (max(low, free_low) + shift + TILE - 1) / TILE, stop = min((high + shift) / TILE, end) - TEAMS;
    return Range{from, (u32)max(0, min(stop, (min(free_high, high) + shift + TILE) / TILE) - from)};
  };
  int ahead = slots.capacity - slots.first_slot;  // slots before the ring wraps
  Range free = free_tiles(slots.first_slot, 0, min(slots.count, ahead)), wrapped = free_tiles(-ahead, ahead, slots.count);

  // a loop of their own, or what the others keep in registers would go to memory and back here
  for (; tile < end; tile += TEAMS) {
    int stop = free.stop(tile) + wrapped.stop(tile);  // they hold no tile both
#pragma unroll 1
    for (; MASK == 0 && tile < stop; tile += TEAMS) step(Bool<true>(), tile);
    step(Bool<false>(), tile);
  }

  let_later_kernels_start();
  // the warps of the block become one result
  wait_copies<0>();
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
    for (int e = 0; e < PER_LANE; ++e) {
      float total = sum_over_tokens(run.total[j][e]);
      if (g == 0 && rank == 0) tops[team][row_of(j, e, t)] = make_float2(total > 0.0f ? run.top[j][e] : -INFINITY, total);
    }
  auto place = [&](int row) {  // of a row in the results
    if (row >= unit.rows) return (i64)-1;
    At at = row_at(p, unit, row);
    return (((i64)unit.batch * p.q_heads + at.head) * p.q_len + at.token) * p.splits_total + p.split_base + split;
  };
  __syncthreads();
  float* parts = (float*)memory;  // [TEAMS][DV][ALL_ROWS]
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
    for (int e = 0; e < PER_LANE; ++e) {
      int row = row_of(j, e, t);
      float2 all[(TEAMS + 7) / 8];  // of teams g, g + 8
      float most = -INFINITY, total = 0.0f;
#pragma unroll
      for (int i = 0; i < (TEAMS + 7) / 8; ++i) {
        all[i] = TEAMS % 8 == 0 || g + 8 * i < TEAMS ? tops[g + 8 * i][row] : make_float2(-INFINITY, 0.0f);
        most = fmaxf(most, all[i].x);
      }
      most = over_tokens(most);
      if (warp == 0) {
#pragma unroll
        for (int i = 0; i < (TEAMS + 7) / 8; ++i) total += all[i].y > 0.0f ? all[i].y * exp2_fast(all[i].x - most) : 0.0f;
        total = sum_over_tokens(total);
        i64 at = place(row);
        if (g == 0 && at >= 0) (p.finish.out ? &joined[row] : &p.top[at])[0] = make_float2(most, total);
      }
      float factor = most == -INFINITY ? 0.0f : exp2_fast(run.top[j][e] - most);
      factor *= p.v_factor;
      if (!V_INT) factor *= V::FACTOR * (V::SCALED ? run.unit / WEIGHT : V::IS_BF16 ? 1.0f : 1.0f / WEIGHT);
      float offset[V::GROUPS];
#pragma unroll
      for (int group = 0; group < V::GROUPS; ++group) offset[group] = V_INT ? 128.0f * sum_over_tokens(run.offset[j][e][group]) : 0.0f;
#pragma unroll
      for (int tile = 0; tile < V_TILES; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (exists(tile, half, g)) {
            float x = run.out[tile][j][(V_INT ? PER_LANE : 2) * half + e];
            if (V_INT)
#pragma unroll
              for (int group = 0; group < V::GROUPS; ++group)
                if (of_group(tile, half, group, g)) x = x * V_TINY - offset[group];
            parts[(team * DV + rank * V::MINE + dim_of(tile, half, g)) * ALL_ROWS + row] = x * factor;
          }
    }
  i64 at = place(threadIdx.x % ALL_ROWS);  // a thread's values are of one row
  static_assert(WARPS * 32 % ALL_ROWS == 0, "rows of threads");
  __syncthreads();
  auto sum_of = [&](int e) {
    float sum = 0.0f;
    for (int w = 0; w < TEAMS; ++w) sum += parts[w * DV * ALL_ROWS + e];
    return sum;
  };
  if (!p.finish.out) {
    if (at < 0) return;
#pragma unroll 1
    for (int e = threadIdx.x; e < DV * ALL_ROWS; e += WARPS * 32) p.out[at * DV + e / ALL_ROWS] = sum_of(e);
    return;
  }
#pragma unroll 1
  for (int e = threadIdx.x; e < DV * ALL_ROWS; e += WARPS * 32) parts[e] = sum_of(e);
  __syncthreads();
#pragma unroll 1
  for (int row = warp; row < unit.rows; row += WARPS) {  // the block has all keys of its rows
    float x[(DV + 31) / 32];
#pragma unroll
    for (int j = 0; j < (DV + 31) / 32; ++j) x[j] = lane + 32 * j < DV ? parts[(lane + 32 * j) * ALL_ROWS + row] : 0.0f;
    finish_row<OUT_TYPE, V_TURN>(p.finish, place(row), row_at(p, unit, row).head, x, joined[row].x, joined[row].y, lane);
  }
}
