// What a block works on, its queries as operands, and the scores of a tile of keys.
#pragma once
#include "rows.cuh"
#include "turn.cuh"

using K = Row<K_KIND, K_BITS, DK, K_SPAN>;
using V = Row<V_KIND, V_BITS, DV, V_SPAN>;
constexpr int K_FOLD = K_INT ? 1 : fold_of<K>();
using KShare = Share<K, K_FOLD>;

constexpr int COLUMNS = (ROWS + 7) / 8;                                        // products of 8 rows each
constexpr int K_COLUMNS = TERMS == 1 ? COLUMNS : ROWS <= 4 ? 1 : 2 * COLUMNS;  // q may be the sum of two terms
constexpr int PER_LANE = TERMS == 2 && ROWS <= 4 ? 1 : 2;                      // rows of 8 that a lane has scores of
constexpr int ALL_ROWS = PER_LANE == 1 ? 4 : 8 * COLUMNS;
constexpr int TILES = TILE / 16;
constexpr bool PLAIN = !SOFTCAP && MASK == 0;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float Q_LARGEST = 32512.0f;  // of q as integers: 127 * 256

// Bytes of rows of two or four scales: codes change places within a unit, or two units, so that a product meets one scale
constexpr bool K_BY_TWO = K::GROUPS == 4 || K::NIBBLES == 1;
constexpr bool K_GATHERED = K_INT && (K::GROUPS == 2 || (K::GROUPS == 4 && K::NIBBLES > 1)) && (!K_BY_TWO || KShare::VEC % 2 == 0) && K::SPAN % K::WORDS == 0 && KShare::WHOLE;
constexpr int K_STEP = K_GATHERED && K_BY_TWO ? 2 : 1;

// operands of q: integers take four planes of a unit at once, floats pairs of dims
struct KBytes {
  static constexpr int PAIRS = KShare::CHUNKS * KShare::VEC * K::NIBBLES;
  static constexpr INLINE int low(int chunk, int n) { return K::dim(chunk * KShare::SIZE, n) / K::SPAN; }
  static constexpr INLINE int high(int chunk, int n) {
    int last = (chunk + 1) * KShare::SIZE < K::MINE ? (chunk + 1) * KShare::SIZE - 1 : K::MINE - 1;
    return K::dim(last, n + 3 * K::NIBBLES) / K::SPAN;
  }
  static constexpr int most_scales() {
    int most = 1;
    for (int i = 0; i < (K_GATHERED ? 0 : KShare::CHUNKS); ++i)
      for (int n = 0; n < K::NIBBLES; ++n)
        if (high(i, n) - low(i, n) + 1 > most) most = high(i, n) - low(i, n) + 1;
    return most;
  }
};
constexpr int K_PAIRS = K_INT ? KBytes::PAIRS : KShare::PAIRS;
constexpr int K_MOST = K_INT ? KBytes::most_scales() : KShare::MOST;
constexpr bool K_KEPT = K::GROUPS <= 9;  // one accumulator per scale; else each product is scaled at once
constexpr int K_SUMS = K::GROUPS == 1 ? (TILES == 1 && !K_INT ? 2 : 1) : K_KEPT ? K::GROUPS : 1;
constexpr int Q_SHARE = K_PAIRS * K_MOST * K_COLUMNS * 256;  // bytes of q that a warp of a team has
constexpr int Q_BYTES = TEAM * Q_SHARE;
static_assert(TEAM == 1 || (!K::SPLIT && !V::SPLIT && K::SPAN % K::WORDS == 0 && V::SPAN % V::WORDS == 0), "shares have the same scales");
constexpr bool TWO_TABLES = K_KIND == TABLE && V_KIND == TABLE && !SAME_TABLE;
static_assert(!TWO_TABLES || !LUT_PAIRS, "pairs are of one table");
constexpr int V_LUT = TWO_TABLES ? 128 : 0;  // entries of two tables alternate
constexpr int Q_AT = K::LUT_BYTES > V::LUT_BYTES ? K::LUT_BYTES : V::LUT_BYTES;
constexpr int RING_AT = up(Q_AT + Q_BYTES, 128);
static_assert(!K_INT || (K_KIND == BYTES && TERMS == 2 && K_KEPT), "integers are of two terms");

// query row of a lane's i-th column in the j-th product
INLINE int row_of(int j, int i, int t) { return TERMS == 1 ? 8 * j + 2 * t + i : 8 * j + t + 4 * i; }

// x / n, where over = ceil(2**32 / n), 0 for n = 1: the product is too large by one at most
INLINE int quotient(u32 x, int n, u32 over) {
  int q = over ? __umulhi(x, over) : x;
  return q - ((int)(x - q * n) < 0);
}

struct Unit {  // what a block works on; its first row: query token, query head of the group
  int batch, head, rows, token, member;
};
struct At {  // a row's query token and query head
  int token, head;
};
INLINE At row_at(const Attend& p, const Unit& unit, int row) {
  int r = unit.member + row, tokens = quotient(r, p.groups, p.over_groups);
  return {unit.token + tokens, unit.head * p.groups + r - tokens * p.groups};
}

INLINE float value_of_q(u32 x) { return Q_TYPE == F32 ? __uint_as_float(x) : Q_TYPE == F16 ? f32_of_f16(x) : f32_of_bf16(x); }

INLINE float load_mask(const char* mask, i64 at) {  // a boolean mask: 0 or -inf
  if (MASK == 1) return mask[at] ? 0.0f : -INFINITY;
  float x = MASK == 2 ? ((const float*)mask)[at] : MASK == 3 ? f32_of_f16(((const u16*)mask)[at]) : f32_of_bf16(((const u16*)mask)[at]);
  return x <= -65504.0f ? -INFINITY : x;
}

using KScales = Scales<K, K_SCALE32>;
using VScales = Scales<V, V_SCALE32>;

// A lookup table as half precision, once per bank: its values are asked for at once, and stored when they have arrived.
// Eight lanes store 16 bytes each of an entry
template <class R, bool WANTED>
struct TableCopy {
  static constexpr int CODES = WANTED && R::KIND == TABLE ? LUT_PAIRS ? R::LEVELS * R::LEVELS : R::LEVELS : 0;
  static constexpr int N = (CODES / 4 + WARPS - 1) / WARPS, KEPT = LUT_PAIRS || N == 0 ? 1 : N, UNROLLED = LUT_PAIRS ? 4 : 64;
  u32 x[KEPT];  // of pairs: level lane % LEVELS

  static INLINE int code(int n) { return 4 * (threadIdx.x / 32 + n * WARPS) + threadIdx.x % 32 / 8; }
  INLINE explicit TableCopy(const float* table) {
    if constexpr (CODES > 0)
#pragma unroll
      for (int n = 0; n < KEPT; ++n) {
        int at = LUT_PAIRS ? threadIdx.x % R::LEVELS : code(n);
        x[n] = at < CODES ? load_now<4>((const char*)table, at) : 0;
      }
  }
  INLINE void store(u32 to) const {
    u32 level = CODES > 0 && LUT_PAIRS ? f16x2(__uint_as_float(x[0]), 0.0f) : 0;
#pragma unroll UNROLLED
    for (int n = 0; n < N; ++n)
      if (code(n) < CODES) {  // all of a warp's
        u32 y;
        if (LUT_PAIRS) y = __shfl_sync(~0u, level, code(n) % R::LEVELS) | __shfl_sync(~0u, level, code(n) / R::LEVELS) << 16;
        else y = f16x2(__uint_as_float(x[n % KEPT]), 0.0f);
        store_shared(to + code(n) * (LUT_PAIRS ? 128 : 256) + threadIdx.x % 8 * 16, {y, y, y, y});
      }
  }
};

INLINE i64 q_offset(const Attend& p, const Unit& unit, int row) {
  At at = row_at(p, unit, row);
  return unit.batch * p.q_batch + at.head * p.q_head + at.token * p.q_token;
}

// what a row of q is multiplied by, from its largest magnitude
INLINE float norm_of(float most) {
  if (K_INT) return most > 0.0f ? __fdividef(Q_LARGEST, fmaxf(most, 1e-30f)) : 1.0f;
  // largest value to 2**13 .. 2**14: half precision overflows at 2**16; bfloat16 needs none of it
  int exponent = (int)((__float_as_uint(most) >> 23) & 255) - 127;
  int up_by = K::IS_BF16 || most == 0.0f ? 0 : max(-120, min(120, 13 - exponent));
  return __uint_as_float((u32)(127 + up_by) << 23);
}

// two terms of x as one operand's bits (low half: integers have a byte each)
INLINE u32 term_of(float x, int term) {
  if (K_INT) {
    int whole = __float2int_rn(x), high = (whole + 128) >> 8;
    return (term ? whole - 256 * high : high) & 255;
  }
  u32 high = K::IS_BF16 ? bf16x2(x, 0.0f) : f16x2(x, 0.0f);
  if (!term) return high;
  float rest = x - (K::IS_BF16 ? f32_of_bf16(high) : f32_of_f16(high));
  return K::IS_BF16 ? bf16x2(rest, 0.0f) : f16x2(rest, 0.0f);
}

// The rows of q that a warp makes operands of: asked for before rows of K and V, which would delay them.
struct Early {
  static constexpr int MINE = (ALL_ROWS + WARPS - 1) / WARPS, N = (DK + 31) / 32, SIZE = Q_TYPE == F32 ? 4 : 2;
  const char* from[MINE];
  int many[MINE];  // values from a lane's first on
  u32 x[MINE][N];

  INLINE Early(const Attend& p, const Unit& unit) {
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      int row = threadIdx.x / 32 + i * WARPS, lane = threadIdx.x % 32;
      from[i] = p.q + (q_offset(p, unit, row) + lane) * SIZE;
      many[i] = row < unit.rows ? p.q_dim - lane : 0;
    }
  }
  INLINE void load() {
#pragma unroll
    for (int i = 0; i < MINE; ++i)
#pragma unroll
      for (int j = 0; j < N; ++j) {
        x[i][j] = 0;
        if (32 * j < many[i]) x[i][j] = load_now<SIZE>(from[i], 32 * j);
      }
  }
};

// Where value d of q goes among the operands, for plane `copy` of a dim that K has two of: bytes from those of row 0 on;
// the first scale that its pair meets.
struct Place {
  int at, low;

  INLINE Place(int d, int copy) {
    int word = d % K::WORDS % K::MINE, plane = K::SPLIT ? copy : d / K::WORDS;
    int chunk = word / KShare::SIZE, unit = word % KShare::SIZE / 2, t = unit / KShare::VEC, vec = unit % KShare::VEC, pair;
    if constexpr (K_GATHERED) {  // as `codes_of` has them
      int n = plane % K::NIBBLES, nibble = plane / K::NIBBLES;
      int from = (K::GROUPS == 4 ? nibble % 2 : vec % K_STEP) * K::NIBBLES + n;
      pair = (chunk * KShare::VEC + vec / K_STEP * K_STEP) * K::NIBBLES + from / 2 * 2 + nibble / 2, low = 0;
      at = from % 2 * 4 + word % 2 * 2 + (K::GROUPS == 4 ? vec : nibble) % 2;
    } else if constexpr (K_INT) {
      int n = plane % K::NIBBLES;
      pair = (chunk * KShare::VEC + vec) * K::NIBBLES + n, low = KBytes::low(chunk, n);
      at = word % 2 * 4 + plane / K::NIBBLES;
    } else {
      t += plane / KShare::PLANES * KShare::LANES, plane %= KShare::PLANES;
      int step = KShare::BY_UNIT ? vec / 2 : vec, half = KShare::BY_UNIT ? vec % 2 : KShare::BY_PLANE ? plane % 2 : 0;
      int which = KShare::BY_PLANE ? plane / 2 : plane;
      pair = KShare::pair(chunk, step, which), low = KShare::low(chunk, which);
      at = half * 4 + word % 2 * 2;
    }
    at += pair * (K_MOST * K_COLUMNS * 256) + t * 8 + (TEAM > 1 ? d % K::WORDS / K::MINE * Q_SHARE : 0);
  }
};

// a row of q, rotated: lane i has values i, i + 32, ...
INLINE void turned_row(float (&x)[Early::N], const u32 (&from)[Early::N], const Attend& p, int lane) {
#pragma unroll
  for (int j = 0; j < Early::N; ++j) x[j] = value_of_q(from[j]);
  if constexpr (K_TURN > 0) turn_row<K_TURN>(x, p.k_signs, lane);
}

INLINE float over_lanes(float x) {  // the largest of the warp
#pragma unroll
  for (int j = 16; j; j /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, j));
  return x;
}

// q as operands: [pair][scale][column][lane] of two registers. norms[row]: what a row was multiplied by
INLINE void fill_queries(char* shared, const Attend& p, const Early& early, float* norms) {
  constexpr bool GAPS = !KShare::WHOLE || (!K_INT && !KShare::BY_PLANE && !KShare::BY_UNIT);
  int lane = threadIdx.x % 32;
  if (GAPS) {
    for (int e = threadIdx.x; e < Q_BYTES / 8; e += WARPS * 32) ((uint2*)(shared + Q_AT))[e] = make_uint2(0, 0);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < Early::MINE; ++i) {
    int row = threadIdx.x / 32 + i * WARPS;
    if (row >= ALL_ROWS) break;
    float x[Early::N], most = 0.0f;
    turned_row(x, early.x[i], p, lane);
#pragma unroll
    for (float value : x) most = fmaxf(most, fabsf(value));
    float norm = norm_of(over_lanes(most));
    if (lane == 0) norms[row] = norm;
    // column and lane / 4 of the row's first term
    int column = TERMS == 1 ? row / 8 : row / 8 * 2 + row % 8 / 4, g = TERMS == 1 ? row % 8 : row % 4 * 2;
#pragma unroll
    for (int j = 0; j < Early::N; ++j) {
      int d = lane + 32 * j;
      if (DK % 32 && d >= DK) break;
#pragma unroll
      for (int copy = 0; copy < (K::SPLIT ? 2 : 1); ++copy) {
        Place place(d, copy);
        char* to = shared + Q_AT + place.at + column * 256 + g * 32;
#pragma unroll
        for (int term = 0; term < TERMS; ++term) {
          u32 bits = term_of(x[j] * norm, term);
#pragma unroll
          for (int slot = 0; slot < K_MOST; ++slot) {
            u32 here = K_MOST == 1 || d / K::SPAN == place.low + slot ? bits : 0;
            if (K_INT) *(u8*)(to + slot * (K_COLUMNS * 256) + term * 32) = here;
            else *(u16*)(to + slot * (K_COLUMNS * 256) + term * 32) = here;
          }
        }
      }
    }
  }
}

// what a product's sums mean for a lane's rows of one tile of 16 tokens
template <class C>
INLINE void add_scores(float (&s)[COLUMNS][4], const C (&c)[4], const KScales (&scales)[2], int group, int column) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float scale = scales[i].at(group);
    if (TERMS == 1) {
      s[column][2 * i] += c[2 * i] * scale;
      s[column][2 * i + 1] += c[2 * i + 1] * scale;
    } else {
      C both = K_INT ? c[2 * i] * 256 + c[2 * i + 1] : c[2 * i] + c[2 * i + 1];
      s[column / 2][2 * i + column % 2] += (float)both * scale;
    }
  }
}

// Codes of K_STEP units from the one at `vec` on, in halves of registers, four each. Gathered: of one scale each, of units
// side by side; two registers have the same ones
INLINE void codes_of(const u32 (&z)[K::NREG][KShare::VEC], int vec, u32 (&codes)[K_STEP * K::NIBBLES]) {
  if constexpr (K_GATHERED && K::GROUPS == 4) {
    u32 four[2][K::NREG];
#pragma unroll
    for (int r = 0; r < K::NREG; ++r) four_tokens(z[r][vec], z[r][vec + 1], four[0][r], four[1][r]);
    nibbles_of<K>(four[0], codes);
    nibbles_of<K>(four[1], codes + K::NIBBLES);
  } else {
#pragma unroll
    for (int i = 0; i < K_STEP; ++i) {
      u32 unit[K::NREG];
#pragma unroll
      for (int r = 0; r < K::NREG; ++r) unit[r] = K_GATHERED ? prmt(z[r][vec + i], 0, 0x3120) : z[r][vec + i];
      nibbles_of<K>(unit, codes + i * K::NIBBLES);
    }
  }
}

// s[tile][product][2 * (token / 8) + i] of COUNT tiles of slots. rank: of the warp in its team
template <bool INTEGERS, int COUNT>
INLINE void score(float (&s)[COUNT][COLUMNS][4], u32 tile_at, const char* memory, int rank, const KScales (&scales)[COUNT][2], Table table, int lane) {
  using Sum = typename Choose<INTEGERS, int, float>::type;
  int g = lane / 4, t = lane % 4;
  u32 q_at = shared_address(memory + Q_AT) + rank * Q_SHARE + lane * 8;
  Sum sums[COUNT][K_SUMS][K_COLUMNS][4];
#pragma unroll
  for (int tile = 0; tile < COUNT; ++tile) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) s[tile][j][0] = s[tile][j][1] = s[tile][j][2] = s[tile][j][3] = 0.0f;
#pragma unroll
    for (int i = 0; i < K_SUMS; ++i)
#pragma unroll
      for (int j = 0; j < K_COLUMNS; ++j) sums[tile][i][j][0] = sums[tile][i][j][1] = sums[tile][i][j][2] = sums[tile][i][j][3] = 0;
  }
  ByteTables<K> tables(table);
#pragma unroll
  for (int chunk = 0; chunk < KShare::CHUNKS; ++chunk) {
    int j = chunk * KShare::SIZE + t % KShare::LANES * 2 * KShare::VEC;
    if (!KShare::WHOLE) j = min(j, K::MINE - 2 * KShare::VEC);
    u32 z[COUNT][2][K::NREG][KShare::VEC];
#pragma unroll
    for (int tile = 0; tile < COUNT; ++tile)
#pragma unroll
      for (int i = 0; i < 2; ++i) load_pairs<K, KShare::VEC>(tile_at + (tile * 16 + i * 8 + g) * K_PITCH, j, z[tile][i]);
    if constexpr (INTEGERS) {
#pragma unroll
      for (int vec = 0; vec < KShare::VEC; vec += K_STEP) {
        u32 codes[COUNT][2][K_STEP * K::NIBBLES];
#pragma unroll
        for (int tile = 0; tile < COUNT; ++tile)
#pragma unroll
          for (int i = 0; i < 2; ++i) codes_of(z[tile][i], vec, codes[tile][i]);
#pragma unroll
        for (int n = 0; n < K_STEP * K::NIBBLES; ++n) {
          int pair = (chunk * KShare::VEC + vec) * K::NIBBLES + n, low = KBytes::low(chunk, n), high = KBytes::high(chunk, n);
          if (K_GATHERED) low = high = K::GROUPS == 4 ? n / K::NIBBLES + n % 2 * 2 : n % 2;
#pragma unroll
          for (int pass = 0; pass < K::PASSES; ++pass) {
            u32 a[COUNT][4];
#pragma unroll
            for (int tile = 0; tile < COUNT; ++tile) {
#pragma unroll
              for (int i = 0; i < 4; ++i) {  // register i: row 8 (i % 2) + g; the second half of the dims from 2 on
                u32 x = of_pass(pass, codes[tile][i % 2][K_GATHERED ? n / 2 * 2 + i / 2 : n]);
                a[tile][i] = bytes_of(tables, pass, (K_GATHERED ? n % 2 : i / 2) ? upper<K>(x) : x);
              }
            }
#pragma unroll
            for (int group = low; group <= high; ++group)
#pragma unroll
              for (int column = 0; column < K_COLUMNS; ++column) {
                u32 b[2];
                load_shared<2>(q_at + ((pair * K_MOST + group - low) * K_COLUMNS + column) * 256, b);
#pragma unroll
                for (int tile = 0; tile < COUNT; ++tile)
                  mma_8<false>(sums[tile][K::GROUPS > 1 ? group : 0][column], a[tile][0], a[tile][1], a[tile][2], a[tile][3], b[0], b[1]);
              }
          }
        }
      }
    } else {
#pragma unroll
      for (int step = 0; step < KShare::STEPS; ++step) {
        constexpr int U = KShare::UNITS_TOGETHER - 1;
        constexpr bool BOTH = KShare::BY_PLANE || KShare::BY_UNIT;
        u32 h[COUNT][2][KShare::UNITS_TOGETHER][K::PLANES];
#pragma unroll
        for (int tile = 0; tile < COUNT; ++tile)
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int u = 0; u < KShare::UNITS_TOGETHER; ++u) {
              u32 unit[K::NREG];
#pragma unroll
              for (int r = 0; r < K::NREG; ++r) unit[r] = z[tile][i][r][KShare::unit(step, u)] >> (K_FOLD > 1 ? t / 2 * 8 : 0);
              expand<K>(unit, h[tile][i][u], table, memory, lane * 4);
            }
#pragma unroll
        for (int w = 0; w < KShare::PAIRS_PER_STEP; ++w) {
          int pair = KShare::pair(chunk, step, w), k0 = KShare::plane(w, 0), k1 = KShare::plane(w, KShare::BY_PLANE ? 1 : 0);
#pragma unroll
          for (int group = KShare::low(chunk, w); group <= KShare::high(chunk, w); ++group)
#pragma unroll
            for (int column = 0; column < K_COLUMNS; ++column) {
              u32 b[2];
              load_shared<2>(q_at + ((pair * K_MOST + group - KShare::low(chunk, w)) * K_COLUMNS + column) * 256, b);
#pragma unroll
              for (int tile = 0; tile < COUNT; ++tile) {
                auto& x = h[tile][0];
                auto& y = h[tile][1];
                auto& c = sums[tile][K::GROUPS > 1 ? (K_KEPT ? group : 0) : pair % K_SUMS][column];
                mma<K::IS_BF16>(c, x[0][k0], y[0][k0], BOTH ? x[U][k1] : 0, BOTH ? y[U][k1] : 0, b[0], b[1]);
                if (!K_KEPT) {
                  add_scores(s[tile], c, scales[tile], group, column);
                  c[0] = c[1] = c[2] = c[3] = 0;
                }
              }
            }
        }
      }
    }
  }
  if (K_KEPT)
#pragma unroll
    for (int tile = 0; tile < COUNT; ++tile)
#pragma unroll
      for (int i = 0; i < K_SUMS; ++i)
#pragma unroll
        for (int column = 0; column < K_COLUMNS; ++column) add_scores(s[tile], sums[tile][i][column], scales[tile], K::GROUPS > 1 ? i : 0, column);
}
