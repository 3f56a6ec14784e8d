// Attention of a tile of 8 * RF query rows that read one KV head, by 8x8 SIMD-group matrices in float32.
//
// The rows of q lie in threadgroup memory. Blocks of 8 * NSG keys: K is decoded 32 dimensions at a time into `stage`,
// SIMD-group s multiplies the rows with keys 8 s to 8 s + 7; scores pass through threadgroup memory, where each row's
// softmax is computed by 4 NSG / RF neighbouring lanes; V is decoded 32 keys by 8 NSG dimensions at a time, and
// SIMD-group s owns columns 8 s to 8 s + 7 of each such piece of the output, in registers. A row is rescaled by a
// product with a diagonal matrix, because MSL does not say which lane holds which element. Tiling: FlashAttention-2
// (Dao 2023).

// Grid: splits x tiles of rows x (batch * KV heads); out, lse, heads as in decode.h. Threadgroup memory:
// rows [8 RF, max(DK, DV)], stage [8 NSG, 32], scores [8 RF, 8 NSG], diagonal [RF, 8, 8], slots [8 NSG],
// flags [NSG], inverse [8 RF], both tables.
template <int RF, int NSG, typename K, typename V, int MASK, int MAP, typename Q, typename KWords, typename KScale,
          typename VWords, typename VScale, typename Levels, typename Starts, typename Bias, typename States>
METAL_FUNC void prefill(Q q, KWords k_words, KScale k_scale, VWords v_words, VScale v_scale, Levels k_levels,
                        Levels v_levels, Levels heads, Starts starts, Bias mask, States map, device float* out,
                        device float* lse, thread const Call& c, threadgroup float* rows, threadgroup float* stage,
                        threadgroup float* scores, threadgroup float* diagonal, threadgroup int* slots,
                        threadgroup int* flags, threadgroup float* inverse, threadgroup float* k_table,
                        threadgroup float* v_table, uint3 group, uint simdgroup, uint lane) {
  constexpr int DK = K::dim, DV = V::dim, BQ = 8 * RF, BK = 8 * NSG, THREADS = 32 * NSG;
  constexpr int LANES = THREADS / BQ, OWN = BK / LANES;        // lanes of a row's softmax, keys of each
  constexpr int WIDTH = 8 * NSG, PIECES = (DV + WIDTH - 1) / WIDTH;
  const int index = int(simdgroup * 32 + lane), sg = int(simdgroup);
  const int batch = int(group.z) / int(c.kv_heads), kv_head = int(group.z) % int(c.kv_heads);
  const int first_row = int(group.y) * BQ;

  load_levels<K::levels>(k_table, k_levels, index, THREADS);
  load_levels<V::levels>(v_table, v_levels, index, THREADS);
  for (int e = index; e < BQ * DK; e += THREADS) {
    const QueryRow r = row_of(c, kv_head, first_row + e / DK);
    rows[e] = float(q[batch * c.q_b + r.head * c.q_h + r.i * c.q_t + e % DK]);
  }
  for (int e = index; e < 64 * RF; e += THREADS) diagonal[e] = 0.0f;

  const int own = index / LANES, part = index % LANES;  // the row whose softmax this thread shares
  const QueryRow row = row_of(c, kv_head, first_row + own);
  const float slope = heads[c.q_heads + row.head];
  const float sink = c.sinks && group.x == 0 ? heads[row.head] : NOTHING;
  float top = max(sink, NOTHING), total = sink > NOTHING ? 1.0f : 0.0f;
  simdgroup_float8x8 acc[RF][PIECES];
  UNROLL for (int f = 0; f < RF; ++f)
    UNROLL for (int n = 0; n < PIECES; ++n) acc[f][n] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);

  k_words += batch * c.k_b + kv_head * c.k_h;
  k_scale += batch * c.ks_b + kv_head * c.ks_h;
  v_words += batch * c.v_b + kv_head * c.v_h;
  v_scale += batch * c.vs_b + kv_head * c.vs_h;
  const int q_low = int(c.q_first) + row_of(c, kv_head, first_row).i;
  const int q_high = int(c.q_first) + row_of(c, kv_head, first_row + BQ - 1).i;
  const Range seen = range_of(c, q_low, q_high, int(starts[batch]));
  const int from = (int(c.first - c.kv_first) / BK + int(group.x) * int(c.blocks)) * BK;
  for (int n = 0; n < int(c.blocks); ++n) {
    const int column = from + n * BK, position = int(c.kv_first) + column;
    const int t0 = max(0, seen.low - position), t1 = min(BK, seen.high - position);
    if (t0 >= t1) continue;
    const int state = state_of<MAP>(c, map, batch, row, column);
    if (index < BK) slots[index] = index < t0 || index >= t1 ? -1 : (position + index - int(c.base)) % int(c.capacity);
    if (MAP) {
      const bool any = simd_any(state != SKIP);
      if (lane == 0) flags[sg] = any;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (MAP) {
      int any = 0;
      for (int s = 0; s < NSG; ++s) any |= flags[s];
      if (!any) {
        threadgroup_barrier(mem_flags::mem_threadgroup);  // flags have been read
        continue;
      }
    }

    // scores
    simdgroup_float8x8 product[RF];
    UNROLL for (int f = 0; f < RF; ++f) product[f] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (int d0 = 0; d0 < DK; d0 += 32) {
      if (d0) threadgroup_barrier(mem_flags::mem_threadgroup);  // stage has been read
      for (int e = index; e < BK * 32; e += THREADS) {
        const int d = d0 + e % 32;
        const long slot = slots[e / 32];
        stage[e] = slot < 0 || d >= DK ? 0.0f : K::value(k_words + slot * c.k_t, k_scale + slot * c.ks_t, k_table, d);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int d = 0; d < min(32, DK - d0); d += 8) {
        simdgroup_float8x8 left, right;
        simdgroup_load(right, stage + sg * 8 * 32 + d, 32, ulong2(0, 0), true);
        UNROLL for (int f = 0; f < RF; ++f) {
          simdgroup_load(left, rows + f * 8 * DK + d0 + d, DK);
          simdgroup_multiply_accumulate(product[f], left, right, product[f]);
        }
      }
    }
    UNROLL for (int f = 0; f < RF; ++f) simdgroup_store(product[f], scores + f * 8 * BK + sg * 8, BK);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // softmax
    float x[OWN], most = NOTHING, sum = 0.0f;
    UNROLL for (int i = 0; i < OWN; ++i) {
      const int t = part + LANES * i;
      x[i] = NOTHING;
      if (t >= t0 && t < t1 && state != SKIP && sees(c, int(c.q_first) + row.i, position + t)) {
        const float s = scores[own * BK + t];
        x[i] = state == ALL ? score_of<0>(c, s, mask, batch, row, column + t, slope)
                            : score_of<MASK>(c, s, mask, batch, row, column + t, slope);
      }
      most = max(most, x[i]);
    }
    for (ushort h = 1; h < LANES; h *= 2) most = max(most, simd_shuffle_xor(most, h));
    most = max(most, top);
    UNROLL for (int i = 0; i < OWN; ++i) {
      const float weight = x[i] > NOTHING ? precise::exp(x[i] - most) : 0.0f;
      scores[own * BK + part + LANES * i] = weight;
      sum += weight;
    }
    for (ushort h = 1; h < LANES; h *= 2) sum += simd_shuffle_xor(sum, h);
    const float rescale = precise::exp(top - most);
    total = total * rescale + sum;
    top = most;
    if (part == 0) diagonal[own / 8 * 64 + own % 8 * 9] = rescale;
    const bool changed = simd_any(rescale != 1.0f);
    if (lane == 0) flags[sg] = changed;
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // output
    int any = 0;
    for (int s = 0; s < NSG; ++s) any |= flags[s];
    if (any)
      UNROLL for (int f = 0; f < RF; ++f) {
        simdgroup_float8x8 factor, scaled;
        simdgroup_load(factor, diagonal + 64 * f, 8);
        UNROLL for (int p = 0; p < PIECES; ++p) {
          simdgroup_multiply(scaled, factor, acc[f][p]);
          acc[f][p] = scaled;
        }
      }
    UNROLL for (int p = 0; p < PIECES; ++p)
      for (int k0 = 0; k0 < BK; k0 += 32) {
        if (p || k0) threadgroup_barrier(mem_flags::mem_threadgroup);  // stage has been read
        for (int e = index; e < 32 * WIDTH; e += THREADS) {
          const int d = p * WIDTH + e % WIDTH;
          const long slot = slots[k0 + e / WIDTH];
          stage[e] = slot < 0 || d >= DV ? 0.0f : V::value(v_words + slot * c.v_t, v_scale + slot * c.vs_t, v_table, d);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (p * WIDTH + 8 * sg >= DV) continue;
        for (int k = 0; k < 32; k += 8) {
          simdgroup_float8x8 left, right;
          simdgroup_load(right, stage + k * WIDTH + 8 * sg, WIDTH);
          UNROLL for (int f = 0; f < RF; ++f) {
            simdgroup_load(left, scores + f * 8 * BK + k0 + k, BK);
            simdgroup_multiply_accumulate(acc[f][p], left, right, acc[f][p]);
          }
        }
      }
  }

  threadgroup_barrier(mem_flags::mem_threadgroup);  // rows are free, also where no block was read
  if (part == 0) inverse[own] = total > 0.0f ? 1.0f / total : 0.0f;
  UNROLL for (int p = 0; p < PIECES; ++p)
    if (p * WIDTH + 8 * sg < DV)
      UNROLL for (int f = 0; f < RF; ++f) simdgroup_store(acc[f][p], rows + f * 8 * DV + p * WIDTH + 8 * sg, DV);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const long to = (long(group.x) * c.batch + batch) * c.q_heads;
  for (int e = index; e < BQ * DV; e += THREADS) {
    const QueryRow r = row_of(c, kv_head, first_row + e / DV);
    if (r.real) out[((to + r.head) * c.q_len + r.i) * DV + e % DV] = rows[e] * inverse[e / DV];
  }
  if (part == 0 && row.real)
    lse[(to + row.head) * c.q_len + row.i] = total > 0.0f ? top + precise::log(total) : -INFINITY;
}
