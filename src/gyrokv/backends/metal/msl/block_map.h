// What each tile of a mask holds, as masks.py defines it: nothing visible, everything visible and unbiased, a mixture.

// A SIMD-group per tile of map_rows x map_keys; the last tile of an axis may be short. Mask [heads / q_heads, q_heads,
// q_len, stop] of any strides; grid: key tiles / NSG x row tiles x heads; states [heads, row tiles, key tiles]. A tile is
// left as soon as it is known to be mixed.
template <int NSG, typename Bias>
METAL_FUNC void block_map(Bias mask, device uchar* states, thread const Call& c, uint3 group, uint simdgroup, uint lane) {
  const long tiles = (c.stop + c.map_keys - 1) / c.map_keys, row_tiles = (c.q_len + c.map_rows - 1) / c.map_rows;
  const long tile = long(group.x) * NSG + simdgroup, head = group.z;
  if (tile >= tiles) return;
  const long row_stop = min((group.y + 1) * c.map_rows, c.q_len), key_stop = min((tile + 1) * c.map_keys, c.stop);
  mask += head / c.q_heads * c.mask_b + head % c.q_heads * c.mask_h;
  bool some = false, whole = true;
  for (long i = group.y * c.map_rows; i < row_stop && (whole || !some); ++i) {
    for (long t = tile * c.map_keys + lane; t < key_stop; t += 32) {
      const float bias = bias_of(mask[i * c.mask_q + t * c.mask_k]);
      some = some || !(bias <= MASKED);
      whole = whole && bias == 0.0f;
    }
    some = simd_any(some);
    whole = simd_all(whole);
  }
  if (lane == 0) states[(head * row_tiles + group.y) * tiles + tile] = whole ? ALL : some ? MIXED : SKIP;
}
