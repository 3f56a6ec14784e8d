// Attention of a few query rows over a part of the keys (split-KV), and the join of such parts.
//
// A threadgroup holds R rows that read the same KV head in registers: lane l has the values l, l + 32, ... of each. Its
// NSG SIMD-groups take blocks of 32 keys in turn. Products are summed over lanes in a butterfly that leaves the score
// of key t in lane t, so masks and exponentials are computed once per key, not once per lane, and the output is
// rescaled once per block. Online softmax: Milakov and Gimelshein 2018; split-KV: Flash-Decoding (Dao et al. 2023).

// part[t], t = 0..7, summed over all lanes: lane l returns the sum of part[l % 8].
METAL_FUNC float sum_eight(thread const float* part, uint lane) {
  float four[4], two[2];
  UNROLL for (int i = 0; i < 4; ++i) {
    const bool odd = lane & 1;
    four[i] = (odd ? part[2 * i + 1] : part[2 * i]) + simd_shuffle_xor(odd ? part[2 * i] : part[2 * i + 1], 1);
  }
  UNROLL for (int i = 0; i < 2; ++i) {
    const bool odd = lane & 2;
    two[i] = (odd ? four[2 * i + 1] : four[2 * i]) + simd_shuffle_xor(odd ? four[2 * i] : four[2 * i + 1], 2);
  }
  const bool odd = lane & 4;
  float one = (odd ? two[1] : two[0]) + simd_shuffle_xor(odd ? two[0] : two[1], 4);
  one += simd_shuffle_xor(one, 8);
  return one + simd_shuffle_xor(one, 16);
}

// slot % capacity without a division for every key: slots lie at most a block beyond the end.
METAL_FUNC int wrapped(int slot, int capacity) {
  while (slot >= capacity) slot -= capacity;
  return slot;
}

// Grid: splits x tiles of R rows x (batch * KV heads). out [splits, B, Hq, Tq, DV] normalised, lse [splits, B, Hq, Tq].
// heads [2, Hq]: sinks, slopes. Threadgroup memory: parts [NSG, DV up to 32s], tops and totals [NSG, R], both tables.
template <int R, int NSG, typename K, typename V, int MASK, int MAP, typename Q, typename KWords, typename KScale,
          typename VWords, typename VScale, typename Levels, typename Starts, typename Bias, typename States>
METAL_FUNC void decode(Q q, KWords k_words, KScale k_scale, VWords v_words, VScale v_scale, Levels k_levels,
                       Levels v_levels, Levels heads, Starts starts, Bias mask, States map, device float* out,
                       device float* lse, thread const Call& c, threadgroup float* parts, threadgroup float* tops,
                       threadgroup float* totals, threadgroup float* k_table, threadgroup float* v_table, uint3 group,
                       uint simdgroup, uint lane) {
  constexpr int DK = K::dim, DV = V::dim, KL = (DK + 31) / 32, VL = (DV + 31) / 32, PART = 32 * VL;
  const uint index = simdgroup * 32 + lane;
  load_levels<K::levels>(k_table, k_levels, index, 32 * NSG);
  load_levels<V::levels>(v_table, v_levels, index, 32 * NSG);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int batch = int(group.z) / int(c.kv_heads), kv_head = int(group.z) % int(c.kv_heads);
  const int first_row = int(group.y) * R;
  QueryRow rows[R];
  float query[R][KL], acc[R][VL], top[R], total[R];
  UNROLL for (int r = 0; r < R; ++r) {
    rows[r] = row_of(c, kv_head, first_row + r);
    Q from = q + batch * c.q_b + rows[r].head * c.q_h + rows[r].i * c.q_t;
    UNROLL for (int j = 0; j < KL; ++j) {
      const uint d = lane + 32 * j;
      query[r][j] = d < uint(DK) ? float(from[d]) : 0.0f;
    }
    UNROLL for (int j = 0; j < VL; ++j) acc[r][j] = 0.0f;
    const float sink = c.sinks && group.x == 0 && simdgroup == 0 ? heads[rows[r].head] : NOTHING;
    top[r] = max(sink, NOTHING);
    total[r] = sink > NOTHING ? 1.0f : 0.0f;
  }
  k_words += batch * c.k_b + kv_head * c.k_h;
  k_scale += batch * c.ks_b + kv_head * c.ks_h;
  v_words += batch * c.v_b + kv_head * c.v_h;
  v_scale += batch * c.vs_b + kv_head * c.vs_h;

  const Range seen = range_of(c, int(c.q_first) + rows[0].i, int(c.q_first) + rows[R - 1].i, int(starts[batch]));
  const int from_block = int(c.first - c.kv_first) / 32 + int(group.x) * int(c.blocks);
  for (int n = int(simdgroup); n < int(c.blocks); n += NSG) {
    const int column = 32 * (from_block + n), position = int(c.kv_first) + column;
    const int t0 = max(0, seen.low - position), t1 = min(32, seen.high - position);
    if (t0 >= t1) continue;
    int any = 0;
    UNROLL for (int r = 0; r < R; ++r) any |= state_of<MAP>(c, map, batch, rows[r], column);
    if (any == SKIP) continue;
    const int slot = (position + t0 - int(c.base)) % int(c.capacity) - t0;  // of key t: wrapped(slot + t)

    float score[R];
    UNROLL for (int r = 0; r < R; ++r) score[r] = 0.0f;
    for (int sub = 0; sub < 4; ++sub) {
      if (8 * sub + 8 <= t0 || 8 * sub >= t1) continue;
      float part[R][8];
      UNROLL for (int u = 0; u < 8; ++u) {
        const int t = 8 * sub + u;
        UNROLL for (int r = 0; r < R; ++r) part[r][u] = 0.0f;
        if (t < t0 || t >= t1) continue;
        const long at = wrapped(slot + t, int(c.capacity));
        UNROLL for (int j = 0; j < KL; ++j) {
          const uint d = lane + 32 * j;
          if (DK % 32 && d >= uint(DK)) continue;
          const float k = K::value(k_words + at * c.k_t, k_scale + at * c.ks_t, k_table, d);
          UNROLL for (int r = 0; r < R; ++r) part[r][u] += query[r][j] * k;
        }
      }
      UNROLL for (int r = 0; r < R; ++r) {
        const float sum = sum_eight(part[r], lane);
        score[r] = int(lane) / 8 == sub ? sum : score[r];
      }
    }

    float weight[R];
    const int t = int(lane);
    UNROLL for (int r = 0; r < R; ++r) {
      float x = NOTHING;
      const int state = state_of<MAP>(c, map, batch, rows[r], column);
      if (t >= t0 && t < t1 && state != SKIP && sees(c, int(c.q_first) + rows[r].i, position + t)) {
        const float slope = heads[c.q_heads + rows[r].head];
        x = state == ALL ? score_of<0>(c, score[r], mask, batch, rows[r], column + t, slope)
                         : score_of<MASK>(c, score[r], mask, batch, rows[r], column + t, slope);
      }
      const float now = max(top[r], simd_max(x)), rescale = precise::exp(top[r] - now);
      weight[r] = x > NOTHING ? precise::exp(x - now) : 0.0f;
      total[r] = total[r] * rescale + simd_sum(weight[r]);
      UNROLL for (int j = 0; j < VL; ++j) acc[r][j] *= rescale;
      top[r] = now;
    }

    for (int u = t0; u < t1; ++u) {
      const long at = wrapped(slot + u, int(c.capacity));
      float w[R];
      UNROLL for (int r = 0; r < R; ++r) w[r] = simd_broadcast(weight[r], ushort(u));
      UNROLL for (int j = 0; j < VL; ++j) {
        const uint d = lane + 32 * j;
        if (DV % 32 && d >= uint(DV)) continue;
        const float v = V::value(v_words + at * c.v_t, v_scale + at * c.vs_t, v_table, d);
        UNROLL for (int r = 0; r < R; ++r) acc[r][j] += w[r] * v;
      }
    }
  }

  // join the SIMD-groups
  UNROLL for (int r = 0; r < R; ++r) {
    if (lane == 0) {
      tops[simdgroup * R + r] = top[r];
      totals[simdgroup * R + r] = total[r];
    }
    UNROLL for (int j = 0; j < VL; ++j) parts[simdgroup * PART + lane + 32 * j] = acc[r][j];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float most = NOTHING, sum = 0.0f, factor[NSG];
    for (int s = 0; s < NSG; ++s) most = max(most, tops[s * R + r]);
    for (int s = 0; s < NSG; ++s) {
      factor[s] = precise::exp(tops[s * R + r] - most);
      sum += totals[s * R + r] * factor[s];
    }
    if (rows[r].real) {
      const long at = (long(group.x) * c.batch + batch) * c.q_heads + rows[r].head;
      const long to = at * c.q_len + rows[r].i;
      for (uint d = index; d < uint(DV); d += 32 * NSG) {
        float value = 0.0f;
        for (int s = 0; s < NSG; ++s) value += factor[s] * parts[s * PART + d];
        out[to * DV + d] = sum > 0.0f ? value / sum : 0.0f;
      }
      if (index == 0) lse[to] = sum > 0.0f ? most + precise::log(sum) : -INFINITY;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// Joins parts [splits, rows, DV] that saw disjoint keys, lse [splits, rows]: a SIMD-group per row.
template <int DV, int NSG, typename Parts, typename Lses>
METAL_FUNC void merge(Parts parts, Lses lses, device float* out, device float* lse, thread const Call& c, uint3 group,
                      uint simdgroup, uint lane) {
  const long row = long(group.x) * NSG + simdgroup, rows = c.batch * c.q_heads * c.q_len;
  if (row >= rows) return;
  float most = NOTHING, sum = 0.0f;
  for (int s = 0; s < int(c.splits); ++s) most = max(most, lses[s * rows + row]);
  for (int s = 0; s < int(c.splits); ++s) {
    const float x = lses[s * rows + row];
    sum += x > NOTHING ? precise::exp(x - most) : 0.0f;
  }
  for (uint d = lane; d < uint(DV); d += 32) {
    float value = 0.0f;
    for (int s = 0; s < int(c.splits); ++s) {
      const float x = lses[s * rows + row];
      if (x > NOTHING) value += precise::exp(x - most) * parts[(s * rows + row) * DV + d];
    }
    out[row * DV + d] = sum > 0.0f ? value / sum : 0.0f;
  }
  if (lane == 0) lse[row] = sum > 0.0f ? most + precise::log(sum) : -INFINITY;
}
