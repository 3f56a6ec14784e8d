// The running softmax of a warp, and values times weights.
//
// Lane 4 g + t has word 8 u + g of the u-th eight words of a row. Floats: an operand's two halves of 8 dims (rows g and
// g + 8) are two planes of a unit, or units of two eights. Bytes: an operand's register has one plane of four tokens, so
// nibbles change places between two registers of two tokens before they are looked up (codec.cuh); its halves are the two
// planes that come to stand side by side.
#pragma once
#include "score.cuh"

constexpr int V_FOLD = V_INT ? 1 : fold_of<V>();
constexpr int V_TERMS = V::IS_BF16 ? 2 : 1;
constexpr float WEIGHT = 256.0f;       // weights are kept away from the denormals of half precision
constexpr float V_LARGEST = 65280.0f;  // of weights as integers: 255 * 256
constexpr float V_TINY = 562949953421312.0f;  // 2**49: outputs that are summed up from integers are smaller by this
constexpr int EIGHTS = (V::MINE + 7) / 8;
// do planes k and k + 1 of every eight have the same scales?
constexpr bool planes_agree() {
  for (int u = 0; u < EIGHTS; ++u)
    for (int k = 0; k + 1 < V::PLANES; k += 2)
      if (V::dim(8 * u, k) / V::SPAN != V::dim(8 * u, k + 1) / V::SPAN) return false;
  return true;
}
// are halves of two eights?
constexpr bool V_BY_EIGHTS = !V_INT && (V::PLANES == 1 || V::SPLIT || (EIGHTS > 1 && !planes_agree()));
constexpr int KINDS = V::SPLIT ? 1 : V::PLANES / V_FOLD;           // planes of an eight, of a lane
constexpr int PER_STEP = V_BY_EIGHTS ? KINDS : up(KINDS, 2) / 2;   // tiles of one or two eights
constexpr int STEP = V_BY_EIGHTS ? 2 : 1;
constexpr int V_TILES = (EIGHTS + STEP - 1) / STEP * PER_STEP;  // of 16 dims

// half `half` of a tile: its eight and plane, and lane g's dim, if there is one
INLINE constexpr int eight_of(int tile, int half) { return tile / PER_STEP * STEP + (V_BY_EIGHTS ? half : 0); }
INLINE constexpr int kind_of(int tile, int half) {
  int at = tile % PER_STEP;  // bytes: [two registers of nibbles, one per half][planes 2, 3 of four][1, 3]: of one scale
  return V_INT ? at / 4 * 2 + half + V::NIBBLES * (at / 2 % 2 * 2 + at % 2) : V_BY_EIGHTS ? at : 2 * at + half;
}
INLINE constexpr int word_of(int tile, int half, int g) { return 8 * eight_of(tile, half) + (V_FOLD > 1 ? g % 4 : g); }
INLINE constexpr int dim_of(int tile, int half, int g) {
  return V::dim(word_of(tile, half, g), kind_of(tile, half) + (V_FOLD > 1 ? g / 4 * KINDS : 0));
}
INLINE constexpr bool exists(int tile, int half, int g) { return kind_of(tile, half) < KINDS && word_of(tile, half, g) < V::MINE; }
// does one of a part's dims, those of lanes from `from` on, belong to this group? Plain arithmetic: a loop would not fold
INLINE constexpr int last_of(int tile, int half) {
  int rest = V::MINE - 8 * eight_of(tile, half), most = 8 / V_FOLD;
  return (rest < most ? rest : most) - 1;
}
INLINE constexpr bool within(int tile, int half, int group, int from) {
  return dim_of(tile, half, from) / V::SPAN <= group && group <= dim_of(tile, half, from + last_of(tile, half)) / V::SPAN;
}
INLINE constexpr bool touches(int tile, int half, int group) {
  return exists(tile, half, 0) && (within(tile, half, group, 0) || (V_FOLD > 1 && within(tile, half, group, 4)));
}
// is lane g's dim of this group?
INLINE bool of_group(int tile, int half, int group, int g) {
  if (!touches(tile, half, group)) return false;
  int low = dim_of(tile, half, 0) / V::SPAN, high = dim_of(tile, half, (V_FOLD > 1 ? 4 : 0) + last_of(tile, half)) / V::SPAN;
  return low == high || dim_of(tile, half, g) / V::SPAN == group;
}

constexpr float UNSEEN = -3e38f;  // the reference of a row that has seen no key: any score has grown beyond it

struct Running {  // of a warp: the softmax so far
  float top[COLUMNS][PER_LANE], total[COLUMNS][PER_LANE];
  float unit, inverse;  // power of two that V's scales are relative to; WEIGHT / unit. Not of bytes
  float offset[COLUMNS][PER_LANE][V::GROUPS];  // of bytes: a lane's weights times V's scales, 128 of which are in each output
  // floats: as products are laid out. Bytes: [..][half] of row i in column 2 * half + i
  float out[V_TILES][COLUMNS][V_INT ? 2 * PER_LANE : 4];
};

INLINE void scale_out(Running& r, int column, const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < V_TILES; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < (V_INT ? PER_LANE : 2); ++e) r.out[i][column][(V_INT ? PER_LANE : 2) * half + e] *= factor[e];
}

INLINE float over_tokens(float x) {  // the largest of the lanes that share columns
#pragma unroll
  for (int i = 4; i < 32; i *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}

INLINE float sum_over_tokens(float x) {
#pragma unroll
  for (int i = 4; i < 32; i *= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

// New references for the scores and for V's scales; rare, because both may pass them by a factor.
// as_is: scores have not been multiplied yet
INLINE void rescale(Running& r, const float (&s)[TILES][COLUMNS][4], bool as_is, const float (&multiply)[COLUMNS][PER_LANE], float widest) {
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j) {
    float factor[2] = {1.0f, 1.0f};
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      float most = r.top[j][i], scale = as_is ? multiply[j][i] : 1.0f;
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) most = fmaxf(most, fmaxf(s[tile][j][i] * scale, s[tile][j][2 + i] * scale));
      most = over_tokens(most);
      factor[i] = exp2_fast(r.top[j][i] - most);
      r.total[j][i] *= factor[i];
      if constexpr (V_INT)
#pragma unroll
        for (float& x : r.offset[j][i]) x *= factor[i];
      r.top[j][i] = most;
    }
    scale_out(r, j, factor);
  }
  if constexpr (V::SCALED && !V_INT) {
    widest = over_tokens(widest);
    if (widest > r.unit) {
      float unit = __uint_as_float(min(__float_as_uint(widest) + 0x7FFFFFu & 0x7F800000u, 0x7E000000u));  // up to a power of two
      float factor[2] = {r.unit / unit, r.unit / unit};
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) scale_out(r, j, factor);
      r.unit = unit, r.inverse = WEIGHT / unit;
    }
  }
}

// z[i]: word 8 u + g of tokens 2 t, 2 t + 1 of the i-th eight of TILE tokens, side by side
INLINE void load_words(u32 tile_at, int block, int u, int lane, u32 (&z)[TILES * 2]) {
  u32 at = tile_at + (block * V::MINE + 8 * u) * 2;
  if constexpr (V::MINE % 8 == 0) {
    if constexpr (TILES == 1) load_transposed(at + lane % 16 * V_PITCH, *(u32(*)[2])z);
    else
#pragma unroll
      for (int i = 0; i < TILES * 2; i += 4) load_transposed(at + (8 * i + lane) * V_PITCH, *(u32(*)[4])(z + i));
  } else {
    int word = min(V_FOLD > 1 ? lane / 4 % 4 : lane / 4, V::MINE - 1 - 8 * u);
#pragma unroll
    for (int i = 0; i < TILES * 2; ++i) {
      u32 from = at + (8 * i + 2 * (lane % 4)) * V_PITCH + word * 2;
      z[i] = prmt(load_shared_u16(from), load_shared_u16(from + V_PITCH), 0x5410) >> (V_FOLD > 1 ? lane / 16 * 8 : 0);
    }
  }
}

// units u of a tile's tokens, as NREG registers for each eight of tokens
INLINE void load_units(u32 tile_at, int u, int lane, u32 (&z)[TILES * 2][V::NREG]) {
  if constexpr (V::SPLIT) {
    int word = min(8 * u + lane / 4, V::MINE - 1);
#pragma unroll
    for (int i = 0; i < TILES * 2; ++i) {
      u32 from = tile_at + (8 * i + 2 * (lane % 4)) * V_PITCH + word * 4, x, y;
      load_shared<1>(from, &x);
      load_shared<1>(from + V_PITCH, &y);
      split_bf16(__uint_as_float(x), __uint_as_float(y), z[i][0], z[i][1]);
    }
  } else {
#pragma unroll
    for (int r = 0; r < V::NREG; ++r) {
      u32 x[TILES * 2];
      load_words(tile_at, r, u, lane, x);
#pragma unroll
      for (int i = 0; i < TILES * 2; ++i) z[i][r] = x[i];
    }
  }
}

// out += v^T times weights, in floats
template <class R>
INLINE void add_values_floats(R& r, const float (&s)[TILES][COLUMNS][4], u32 tile_at, const char* memory,
                              const VScales (&scales)[TILES][2], Table table, int lane) {
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
          float x = s[tile][j][2 * i] * scale, y = PER_LANE == 2 ? s[tile][j][2 * i + 1] * scale : 0.0f;
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
#pragma unroll
  for (int u = 0; u < EIGHTS; u += STEP) {
    u32 z[STEP][TILES * 2][V::NREG];
#pragma unroll
    for (int i = 0; i < STEP; ++i)
      if (u + i < EIGHTS) load_units(tile_at, u + i, lane, z[i]);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      u32 h[STEP][2][V::PLANES];
#pragma unroll
      for (int i = 0; i < STEP; ++i)
#pragma unroll
        for (int k = 0; k < 2; ++k)
          if (u + i < EIGHTS) expand<V>(z[i][2 * tile + k], h[i][k], table, memory + V_LUT, lane * 4);
#pragma unroll
      for (int m = 0; m < PER_STEP; ++m) {
        int at = u / STEP * PER_STEP + m;
#pragma unroll
        for (int part = 0; part < (V::SPLIT ? 2 : 1); ++part) {
          u32 a[2][2];
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int k = 0; k < 2; ++k)
              a[half][k] = kind_of(at, half) < KINDS && eight_of(at, half) < EIGHTS ? h[V_BY_EIGHTS ? half : 0][k][V::SPLIT ? part : kind_of(at, half)] : 0;
#pragma unroll
          for (int group = 0; group < V::GROUPS; ++group) {
            if (!touches(at, 0, group) && !touches(at, 1, group)) continue;
            bool first = of_group(at, 0, group, lane / 4), second = of_group(at, 1, group, lane / 4);
#pragma unroll
            for (int term = 0; term < V_TERMS; ++term)
#pragma unroll
              for (int j = 0; j < COLUMNS; ++j)
                mma<V::IS_BF16>(r.out[at][j], first ? a[0][0] : 0, second ? a[1][0] : 0, first ? a[0][1] : 0,
                                second ? a[1][1] : 0, b[tile][group][term][j][0], b[tile][group][term][j][1]);
          }
        }
      }
    }
  }
}

// out += v^T times weights, in integers. Weights are relative to the largest of the row in this tile, in two terms. Levels
// are 128 larger, so that sums are positive: their bits are those of tiny floats, which need no conversion
INLINE void add_values_bytes(Running& r, const float (&s)[TILES][COLUMNS][4], u32 tile_at, const VScales (&scales)[TILES][2],
                             Table table, int lane) {
  constexpr int PAIRS = (TILES + 1) / 2;  // of tiles: a product has 32 tokens
  static_assert(TILE * 255 * 255 < 1 << 23, "sums are tiny floats");
  ByteTables<V> tables(Table{table.low ^ 0x80808080, table.high ^ 0x80808080});
  float unit[COLUMNS][PER_LANE];           // of a weight
  u32 b[PAIRS][2][V::GROUPS][COLUMNS][PER_LANE];  // of a row's term (lane / 4) and four tokens
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
    for (int e = 0; e < PER_LANE; ++e) {
      float x[TILES][2][V::GROUPS], most = 0.0f;
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int group = 0; group < V::GROUPS; ++group) {
            x[tile][i][group] = s[tile][j][2 * i + e] * scales[tile][i].at(group);
            most = fmaxf(most, fabsf(x[tile][i][group]));
            r.offset[j][e][group] += x[tile][i][group];
          }
      most = over_tokens(most);
      float inverse = V_LARGEST * inverse_fast(fmaxf(most, 1e-30f));
      unit[j][e] = most * (1.26765060e30f / V_LARGEST);  // times 2**100: tiny floats are 2**-149 of integers
#pragma unroll
      for (int group = 0; group < V::GROUPS; ++group)
#pragma unroll
        for (int tile = 0; tile < 2 * PAIRS; ++tile) {
          u32 w[2];  // of two tokens, in the lower half: they change places with other rows' as one
#pragma unroll
          for (int i = 0; i < 2; ++i) w[i] = __float_as_uint(fmaf(x[tile % TILES][i][group], inverse, 8388608.0f));
          b[tile / 2][tile % 2][group][j][e] = tile < TILES ? transpose8(prmt(w[0], w[1], 0x4051)) : 0;
        }
    }
#pragma unroll
  for (int u = 0; u < EIGHTS; ++u) {
    u32 z[TILES * 2][V::NREG], codes[2][TILES][V::NIBBLES];  // [plane 0 or 1 of four][tile]
    load_units(tile_at, u, lane, z);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      u32 four[2][V::NREG];
#pragma unroll
      for (int i = 0; i < V::NREG; ++i) four_tokens(z[2 * tile][i], z[2 * tile + 1][i], four[0][i], four[1][i]);
#pragma unroll
      for (int i = 0; i < 2; ++i) nibbles_of<V>(four[i], codes[i][tile]);
    }
#pragma unroll
    for (int m = 0; m < PER_STEP; ++m) {
      int at = u * PER_STEP + m, sums[COLUMNS][PER_LANE][4];
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
        for (int e = 0; e < PER_LANE; ++e)
          sums[j][e][0] = sums[j][e][1] = sums[j][e][2] = sums[j][e][3] = 0;
#pragma unroll
      for (int pass = 0; pass < V::PASSES; ++pass) {
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
          u32 a[2][2];  // [half][tile]
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              int tile = 2 * pair + i;
              u32 x = of_pass(pass, codes[m % 2][tile % TILES][m / 4 * 2 + half]);
              a[half][i] = tile < TILES ? bytes_of(tables, pass, m / 2 % 2 ? upper<V>(x) : x) : 0;
            }
#pragma unroll
          for (int group = 0; group < V::GROUPS; ++group) {
            if (!touches(at, 0, group) && !touches(at, 1, group)) continue;
            bool first = of_group(at, 0, group, lane / 4), second = of_group(at, 1, group, lane / 4);
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
              for (int e = 0; e < PER_LANE; ++e)
                mma_8<true>(sums[j][e], first ? a[0][0] : 0, second ? a[1][0] : 0, first ? a[0][1] : 0, second ? a[1][1] : 0,
                            b[pair][0][group][j][e], b[pair][1][group][j][e]);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
        for (int e = 0; e < PER_LANE; ++e)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float high = __int_as_float(sums[j][e][2 * half]), low = __int_as_float(sums[j][e][2 * half + 1]);
            float& out = r.out[at][j][PER_LANE * half + e];
            out = fmaf(high, 256.0f * unit[j][e], fmaf(low, unit[j][e], out));
          }
    }
  }
}
