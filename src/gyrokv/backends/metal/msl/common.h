// Rows to values, and which keys a query sees: what decode.h and prefill.h share. MSL 3.1.
//
// A kernel is a function template here; an entry point with Metal's attributes, torch's or MLX's, declares the
// threadgroup arrays and calls it. Nothing relies on lanes of a SIMD-group running in step: whatever one thread writes
// and another reads has a barrier in between.

enum Kind { DENSE, TABLE, LINEAR, FLOAT8 };

constant float NOTHING = -1e30f;     // the maximum of no scores; any score is larger
constant float MASKED = -65504.0f;   // an additive mask of this or less hides the key

// Bits LOW, LOW + 1, ... of the code of value d: a field of W bits of a row of DIM values, the field's words from
// START on. Word i holds values i, i + n, i + 2 n, ..., the first in the low bits.
template <int W, int START, int LOW, int DIM, typename Row>
METAL_FUNC uint field_at(Row row, uint d) {
  constexpr uint n = DIM * W / 16;
  const uint word = uint(ushort(row[START + d % n]));
  return (word >> (W * (d / n)) & ((1u << W) - 1)) << LOW;
}

// The code of value d: fields of 8, 4, 2 and 1 bits, widest first, from the low bits up.
template <int BITS, int DIM, typename Row>
METAL_FUNC uint code_at(Row row, uint d) {
  uint code = 0;
  if (BITS & 8) code |= field_at<8, 0, 0, DIM>(row, d);
  if (BITS & 4) code |= field_at<4, (BITS & 8) * DIM / 16, BITS & 8, DIM>(row, d);
  if (BITS & 2) code |= field_at<2, (BITS & 12) * DIM / 16, BITS & 12, DIM>(row, d);
  if (BITS & 1) code |= field_at<1, (BITS & 14) * DIM / 16, BITS & 14, DIM>(row, d);
  return code;
}

// One side of a stored row of DIM values. TABLE: levels[code]; LINEAR: code + LOWEST; FLOAT8: e4m3, exact in half
// after a shift of the exponent; SPAN values share a scale (0: none).
template <int KIND, int BITS, int DIM, int SPAN, int LOWEST>
struct Codec {
  enum { dim = DIM, levels = KIND == TABLE ? 1 << BITS : 1 };

  template <typename Row, typename Scale>
  static METAL_FUNC float value(Row row, Scale scale, threadgroup const float* table, uint d) {
    const uint code = code_at<BITS, DIM>(row, d);
    if (KIND == FLOAT8) return 256.0f * float(as_type<half>(ushort((code & 0x80) << 8 | (code & 0x7F) << 7)));
    const float level = KIND == LINEAR ? float(int(code) + LOWEST) : table[code];
    return SPAN ? level * float(scale[d / (SPAN ? SPAN : 1)]) : level;
  }
};
template <int BITS, int DIM, int SPAN, int LOWEST>
struct Codec<DENSE, BITS, DIM, SPAN, LOWEST> {
  enum { dim = DIM, levels = 1 };

  template <typename Row, typename Scale>
  static METAL_FUNC float value(Row row, Scale, threadgroup const float*, uint d) {
    return float(row[d]);
  }
};

METAL_FUNC float bias_of(bool seen) { return seen ? 0.0f : MASKED; }
template <typename T>
METAL_FUNC float bias_of(T value) { return float(value); }

// The keys, low <= position < high, that some query from q_low to q_high (positions) may see.
struct Range {
  int low, high;
};
METAL_FUNC Range range_of(thread const Call& c, int q_low, int q_high, int start) {
  Range r = {max(int(c.first), start), int(c.stop)};
  if (c.window) r.low = max(r.low, q_low - int(c.window) + 1);
  if (c.window || c.causal) r.high = min(r.high, q_high + 1);
  return r;
}

METAL_FUNC bool sees(thread const Call& c, int q_position, int position) {
  const int distance = q_position - position;
  if ((c.causal || c.window) && distance < 0) return false;
  return !c.window || distance < c.window;
}

// One row of the tile: a query of one head.
struct QueryRow {
  int i, head;  // which query, which query head
  bool real;    // rows beyond the last repeat it
};
METAL_FUNC QueryRow row_of(thread const Call& c, int kv_head, int index) {
  const int last = int(c.groups * c.q_len) - 1, r = min(index, last);
  QueryRow row = {r / int(c.groups), kv_head * int(c.groups) + r % int(c.groups), index <= last};
  return row;
}

// What the block map says of a row and the tile that holds column: SKIP, ALL, MIXED.
enum { SKIP, ALL, MIXED };
template <int MAP, typename States>
METAL_FUNC int state_of(thread const Call& c, States map, int batch, QueryRow row, int column) {
  if (!MAP) return MIXED;
  const long at = batch * c.map_b + row.head * c.map_h + (row.i / c.map_rows) * c.map_q + (column / c.map_keys) * c.map_k;
  return int(map[at]);
}

// A product of q and k to a score; NOTHING when a mask hides the key.
template <int MASK, typename Bias>
METAL_FUNC float score_of(thread const Call& c, float product, Bias mask, int batch, QueryRow row, int column, float slope) {
  float x = product * c.scale;
  if (c.softcap != 0.0f) x = c.softcap * precise::tanh(x / c.softcap);
  if (MASK) {
    const float bias = bias_of(mask[batch * c.mask_b + row.head * c.mask_h + row.i * c.mask_q + column * c.mask_k]);
    x = bias <= MASKED ? NOTHING : x + slope * bias;
  }
  return x;
}

template <int N, typename From>
METAL_FUNC void load_levels(threadgroup float* table, From levels, uint thread_index, uint threads) {
  if (N > 1)
    for (uint i = thread_index; i < uint(N); i += threads) table[i] = levels[i];
}
