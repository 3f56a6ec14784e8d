// Scores of more than four query rows on the matrix unit, from rows as they are stored (see stored.h).
//
// A product of 16 tokens is [token][16 columns]; its columns are [high, low part of q][8 query rows], or 16 query rows where
// q has one part. Vectors of one or two tokens become vectors of one query row.
#pragma once
#include "stored.h"

namespace gyrokv {
namespace GYROKV_ISA {

#if defined(__AMX_INT8__)

// -- q as B

// Even and odd bytes with scales of their own have a B and sums each; two planes have sums each, of the same B.
INLINE QueryTiles many_tiles(const Stored& s, char* memory, int dim, int rows_before) {
    char* at = memory + rows_before / STORED_ROWS * query_tiles_stride(dim);
    char* numbers = at + int64_t(s.split ? 2 : 1) * s.lines * TILE;
    return {at, (int32_t*)numbers, (float*)(numbers + s.units * s.sums * LINE)};  // [unit][sum][16]
}

// As pack_tiles.
inline void pack_many_tiles(const Format& f, const Stored& s, const char* a, int64_t stride, int rows, int terms, const float* scale,
                            int groups, char* memory) {
    alignas(64) char columns[16 * MOST_LINES * LINE];
    const int64_t bytes = s.lines * LINE;
    Ahead none;
    for (int row = 0; row < rows; row += s.rows) {
        const QueryTiles made = many_tiles(s, memory, f.dim, row);
        std::memset(made.start, 0, s.units * s.sums * 2 * LINE);
        for (int side = 0; side < 1 + s.split; ++side) {
            std::memset(columns, 0, 16 * bytes);
            for (int column = 0; column < 16; ++column) {
                const int r = row + column % s.rows, part = column / s.rows;
                if (r >= rows) continue;
                const char* q = a + (int64_t(r) * terms + part) * stride;
                char* to = columns + column * bytes;
                if (s.element != INT8) std::memcpy(to, q, 2 * f.dim);
                for (int u = 0; u < s.units; ++u) {
                    const int64_t at = 16 * (u * s.sums + side) + column;
                    made.scale[at] = scale[r * groups + (side ? s.odd : s.even)[u]];
                    if (s.element != INT8) continue;
                    made.start[at] = -ZERO * pack_bytes(s, q, f.dim, u, side == 0, side == 1 || !s.split, to);
                    if (s.planes == 2) made.start[at + 16] = made.start[at];
                }
            }
            transpose_tokens(columns, bytes, bytes, made.tiles + side * s.lines * TILE, none);
        }
    }
}

// -- products

// Products of 32 tokens with q in tiles c and d: at `to` + (unit * sums + sum) * 2 * TILE, [32][16].
#define GYROKV_SCORE_TILES(c, d)                                                       \
    if constexpr (integer) {                                                           \
        _tile_loadd(c, start, 0);                                                      \
        _tile_loadd(d, start, 0);                                                      \
    } else {                                                                           \
        _tile_zero(c);                                                                 \
        _tile_zero(d);                                                                 \
    }                                                                                  \
    for (int j = s.first[u]; j < s.first[u + 1]; ++j) {                                \
        _tile_loadd(6, b + j * TILE, LINE);                                            \
        _tile_loadd(4, k[0].at + j * k[0].line + plane * k[0].plane, k[0].step);       \
        GYROKV_K_DOT(c, 4);                                                            \
        _tile_loadd(5, k[1].at + j * k[1].line + plane * k[1].plane, k[1].step);       \
        GYROKV_K_DOT(d, 5);                                                            \
        ahead.tick(ticks);                                                             \
    }                                                                                  \
    _tile_stored(c, to, LINE);                                                         \
    _tile_stored(d, to + TILE, LINE);
template <bool integer, bool split>
INLINE void many_score_tiles(const Stored& s, const Lines* k, const QueryTiles& q, char* to, Ahead& ahead) {
    const int ticks = k_tile_ticks(s);
    memory_barrier();
    const int32_t* start = q.start;
    for (int u = 0; u < s.units; ++u)
        for (int sum = 0; sum < s.sums; ++sum, to += 2 * TILE, start += 16) {
            const char* b = q.tiles + (split ? sum * s.lines * TILE : 0);
            const int plane = split ? 0 : sum;
            if (sum) {
                GYROKV_SCORE_TILES(2, 3)
            } else {
                GYROKV_SCORE_TILES(0, 1)
            }
        }
    memory_barrier();
}
#undef GYROKV_SCORE_TILES
#undef GYROKV_K_DOT

// -- products to scores

// [4 tokens][4 values] in each of four vectors' parts to [value][4 tokens].
INLINE void turn_parts(const vf* x, vf* to) {
    using vq = vec<uint64_t>;
    const vq a = (vq)zip<0>(x[0], x[1]), b = (vq)zip<0>(x[2], x[3]), c = (vq)zip<1>(x[0], x[1]), d = (vq)zip<1>(x[2], x[3]);
    to[0] = (vf)zip<0>(a, b), to[1] = (vf)zip<1>(a, b), to[2] = (vf)zip<0>(c, d), to[3] = (vf)zip<1>(c, d);
}

// Vectors of tokens i and i + 4, for i = 0 to 3 and 8 to 11, and 8 query rows, to vectors of 16 tokens.
INLINE void turn_pairs(const vf* x, vf* to) {
    vf first[4], second[4];
    turn_parts(x, first);
    turn_parts(x + 4, second);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
        to[r] = (vf)_mm512_shuffle_f32x4((__m512)first[r], (__m512)second[r], 0x88);
        to[4 + r] = (vf)_mm512_shuffle_f32x4((__m512)first[r], (__m512)second[r], 0xdd);
    }
}
// Token i of such pairs; the other one is 4 behind.
constexpr int pair_token(int i) { return i % 4 + i / 4 * 8; }

// 32 bytes of a token's products and of those of the token 4 behind.
INLINE vi load_pair(const char* c) {
    const __m512i x = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)c));
    return (vi)_mm512_inserti64x4(x, _mm256_loadu_si256((const __m256i*)(c + 4 * LINE)), 1);
}
// 16 bytes of a token's products and of those of the tokens 4, 8 and 12 behind.
INLINE vi load_quad(const char* c) { return (vi)load_parts(c, 4 * LINE); }

// Products summed over units, times the scales of the tokens, where even and odd bytes have their own: [token][16 columns].
INLINE void sum_units(const Stored& s, const float* factors, const char* c, int64_t step, const float* k_scale, int64_t tokens,
                      vf* all) {
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t) all[t] = vf{};
    for (int u = 0; u < 2 * s.units; ++u, c += step) {
        const vf factor = load<vf>(factors + 16 * u);
        const float* scale = k_scale + (u % 2 ? s.odd[u / 2] : s.even[u / 2]) * tokens;
#pragma GCC unroll 16
        for (int t = 0; t < 16; ++t) all[t] = fma(to_float(load<vi>(c + t * LINE)) * factor, splat(scale[t]), all[t]);
    }
}

// Scores of 16 tokens for 8 query rows, q in two parts. c: products, of two planes `step` bytes apart; factors: of their columns.
template <bool integer>
INLINE void join_eight(const Stored& s, const float* factors, const char* c, int64_t step, vf* scores) {
    vf x[8];
    const vf factor = (vf)_mm512_broadcast_f32x8(_mm256_loadu_ps(factors));
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const char* at = c + pair_token(i) * LINE;
        vi high = load_pair(at), low = load_pair(at + 32);
        if constexpr (!integer) {
            x[i] = ((vf)high + (vf)low) * factor;
        } else if (s.planes == 2) {  // the product with a value of 16 bits fits 32
            high += load_pair(at + step) << 8, low += load_pair(at + step + 32) << 8;
            x[i] = fma(to_float(high), splat(256.0f), to_float(low)) * factor;
        } else {  // so does that of q's 16 bits
            x[i] = to_float((high << 8) + low) * factor;
        }
    }
    turn_pairs(x, scores);
}

// The same for 16 query rows, q in one part; where even and odd bytes have their own scales, products of all units, `step` bytes
// apart, with k_scale: of the first token, [group][tokens].
template <bool integer, bool split>
INLINE void join_sixteen(const Stored& s, const float* factors, const char* c, int64_t step, const float* k_scale, int64_t tokens,
                         vf* scores) {
    alignas(64) char sums[TILE];
    if constexpr (split) {
        vf all[16];
        sum_units(s, factors, c, step, k_scale, tokens, all);
#pragma GCC unroll 16
        for (int t = 0; t < 16; ++t) store(sums + t * LINE, all[t]);
    }
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
        const vf factor = (vf)_mm512_broadcast_f32x4(_mm_loadu_ps(factors + 4 * part));
        vf x[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const int at = 16 * part + i * LINE;
            if constexpr (split) {
                x[i] = (vf)load_quad(sums + at);
            } else {
                vi sum = load_quad(c + at);
                if (s.planes == 2) sum += load_quad(c + step + at) << 8;
                x[i] = integer ? to_float(sum) * factor : (vf)sum * factor;
            }
        }
        turn_parts(x, scores + 4 * part);
    }
}

// Scores of the rows of a product and 16 tokens: to scores [row][stride] and the largest of each lane [row][LANES].
template <bool integer, bool split, int rows>
inline void join_rows(const Stored& s, const float* factors, const char* c, int64_t step, const float* k_scale, int64_t tokens,
                      bool scaled, float* scores, int64_t stride, float* most) {
    vf x[rows];
    if constexpr (rows == 8)
        join_eight<integer>(s, factors, c, step, x);
    else
        join_sixteen<integer, split>(s, factors, c, step, k_scale, tokens, x);
    const vf scale = !split && scaled ? load<vf>(k_scale) : splat(1.0f);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
        if (!split) x[r] *= scale;
        store(most + r * LANES, max(load<vf>(most + r * LANES), x[r]));
        store(scores + r * stride, x[r]);
    }
}

// As score_rows_stored. `products`: room for 4 TILE per sum.
template <bool integer, bool split>
inline void score_many_rows(MatrixUnit& unit, const StoredRows& k, char* q_memory, int rows, int tokens, const float* k_scale,
                            int64_t scale_stride, bool scaled, char* made, char* products, float* scores, int64_t stride,
                            float* most, Ahead& ahead) {
    unit.configure(16, 16);
    const Stored& s = k.stored;
    const int passes = (rows + s.rows - 1) / s.rows, items = (tokens + 31) / 32 * passes;
    const int64_t size = lines_bytes(s), products_size = s.units * s.sums * 2 * TILE;
    const auto join_tile = split || s.rows == 16 ? join_rows<integer, split, 16> : join_rows<integer, split, 8>;
    for (int r = 0; r < passes * s.rows; ++r) store(most + r * LANES, splat(-__builtin_inff()));
    Lines lines[2];
    auto make = [&](int step) {
        char* to = made + step % 2 * 2 * size;
        for (int i = 0; i < 2; ++i) lines[i] = k.lines(2 * step + i, to + i * size, k_make_ticks(s), ahead);
    };
    auto join = [&](int item) {
        const int row = item % passes * s.rows, first = item / passes * 32;
        const float* factors = many_tiles(s, q_memory, k.format.dim, row).scale;
        const char* from = products + item % 2 * products_size;
        for (int t = first; t < std::min(first + 32, tokens); t += 16, from += TILE) {
            join_tile(s, factors, from, 2 * TILE, k_scale + t, scale_stride, scaled, scores + row * stride + t, stride,
                      most + row * LANES);
            ahead.tick(k_join_ticks(s));
        }
    };
    make(0);
    for (int item = 0; item < items; ++item) {
        const QueryTiles q = many_tiles(s, q_memory, k.format.dim, item % passes * s.rows);
        many_score_tiles<integer, split>(s, lines, q, products + item % 2 * products_size, ahead);
        if ((item + 1) % passes == 0 && item + 1 < items) make((item + 1) / passes);
        if (item) join(item - 1);
    }
    join(items - 1);
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
