// Few query rows on the matrix unit, from rows as they are stored (see lines.h).
//
// Scores take lines of 16 tokens as A and q as B. Values take lines of 16 tokens as B, so that the bytes of a column belong
// to one token; A therefore holds each weight once per byte (or bfloat16) of a column, with zeros in place of the others.
// That wastes 3/4 (1/2) of the products, which costs less than to interleave the tokens. q and weights have two parts, as
// everywhere.
#pragma once
#include "lines.h"

namespace gyrokv {
namespace GYROKV_ISA {

constexpr int STORED_ROWS = 4;  // query rows of a product

#if !defined(__AMX_INT8__)

INLINE int64_t stored_query_bytes(int, int) { return 0; }

#else

// -- q as B of the scores

// Columns of B and of the products are [even or odd bytes][high or low part][query row]; with one scale for both kinds of
// bytes the second half is empty. Of two planes the high one takes both parts of q, the low one the high part where the
// high plane takes the low one; with one scale the product of both low parts is in columns 8 to 11, with more it is left out
// (2**-16 of the largest product), as it is for values.
struct QueryTiles {
    char* tiles;         // [plane][line][16 dwords][16 columns]
    int32_t* start;      // [unit][16]: what the offset of the codes adds, negative
    float* scale;        // [unit][16]
};
INLINE int64_t query_tiles_stride(int dim) { return round_up(dim, 32) / 32 * (2 * TILE + 2 * LINE); }
INLINE QueryTiles query_tiles(const Stored& s, char* memory, int dim, int rows_before) {
    char* at = memory + rows_before / STORED_ROWS * query_tiles_stride(dim);
    char* numbers = at + int64_t(s.planes) * s.lines * TILE;
    return {at, (int32_t*)numbers, (float*)(numbers + s.units * LINE)};
}
INLINE int64_t stored_query_bytes(int dim, int rows) {
    return rows > MOST_STORED ? 0 : round_up(rows, STORED_ROWS) / STORED_ROWS * query_tiles_stride(dim);
}

// a: q as query.h packs it, `terms` rows `stride` bytes apart for each query row; scale: [row][group].
inline void pack_tiles(const Format& f, const Stored& s, const char* a, int64_t stride, int rows, int terms, const float* scale,
                       int groups, char* memory) {
    alignas(64) char columns[16 * MOST_LINES * LINE];
    const int64_t bytes = s.lines * LINE;
    const bool low = s.planes == 2 && !s.split;
    Ahead none;
    for (int row = 0; row < rows; row += STORED_ROWS) {
        const QueryTiles made = query_tiles(s, memory, f.dim, row);
        std::memset(made.start, 0, s.units * 2 * LINE);
        for (int plane = 0; plane < s.planes; ++plane) {
            std::memset(columns, 0, 16 * bytes);
            for (int column = 0; column < (s.split ? 16 : low ? 12 : 8); ++column) {
                const bool own_low = low && column >= 8;
                const int r = row + column % 4, odd = s.split ? column / 8 : 0;
                const int part = own_low ? (plane ? -1 : 1) : column / 4 % 2 - (s.planes == 2 && plane == 0);
                if (r >= rows) continue;
                const int bytes_below = s.element == INT8 && !own_low ? terms + s.planes - 2 - column / 4 % 2 : 0;
                for (int u = 0; u < s.units; ++u) {
                    const float own = scale[r * groups + (odd ? s.odd : s.even)[u]];
                    made.scale[16 * u + column] = own * (bytes_below == 2 ? 65536.0f : bytes_below == 1 ? 256.0f : 1.0f);
                    if (!s.split && !low) made.scale[16 * u + column + 8] = made.scale[16 * u + column];
                }
                if (part < 0 || part >= terms) continue;
                const char* q = a + (int64_t(r) * terms + part) * stride;
                char* to = columns + column * bytes;
                if (s.element != INT8) {
                    std::memcpy(to, q, 2 * f.dim);
                    continue;
                }
                const __mmask32 mask = s.lanes == 32 ? ~0u : 0xffffu;
                const __mmask32 even = s.split && odd ? 0 : mask, odds = s.split && !odd ? 0 : mask;
                for (int u = 0; u < s.units; ++u) {
                    vi sum = {};
                    for (int j = s.first[u]; j < s.first[u + 1]; ++j) {
                        const __m256i x = _mm256_maskz_loadu_epi8(even, q + s.lanes * j);
                        const __m256i y = _mm256_maskz_loadu_epi8(odds, q + s.lanes * j + f.dim / 2);
                        const __m512i both = _mm512_slli_epi16(_mm512_cvtepu8_epi16(y), 8);
                        _mm512_storeu_si512(to + j * LINE, _mm512_or_si512(both, _mm512_cvtepu8_epi16(x)));
                        const __m512i added = _mm512_add_epi16(_mm512_cvtepi8_epi16(x), _mm512_cvtepi8_epi16(y));
                        sum += (vi)_mm512_madd_epi16(added, _mm512_set1_epi16(1));
                    }
                    made.start[16 * u + column] -= ZERO * reduce_add(sum);
                }
            }
            transpose_tokens(columns, bytes, bytes, made.tiles + plane * s.lines * TILE, none);
        }
    }
}

// -- scores

#define GYROKV_K_DOT(c, a)           \
    if constexpr (integer)           \
        _tile_dpbusd(c, a, 6);       \
    else                             \
        _tile_dpbf16ps(c, a, 6)

// Products of 64 tokens from group g on with q, for the lines of a unit: c [64][16].
template <bool integer>
INLINE void score_unit(const Stored& s, const StoredRows& rows, int g, const QueryTiles& q, int unit, char* c, Ahead& ahead) {
    if constexpr (integer) {
        const int32_t* start = q.start + 16 * unit;
        _tile_loadd(0, start, 0);
        _tile_loadd(1, start, 0);
        _tile_loadd(2, start, 0);
        _tile_loadd(3, start, 0);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    const char* at[4] = {rows.at(g), rows.at(g + 1), rows.at(g + 2), rows.at(g + 3)};
    const int64_t step[4] = {rows.step(g), rows.step(g + 1), rows.step(g + 2), rows.step(g + 3)};
    for (int plane = 0; plane < s.planes; ++plane)
        for (int j = s.first[unit]; j < s.first[unit + 1]; ++j) {
            const int64_t line = j * rows.line + plane * rows.plane;
            _tile_loadd(6, q.tiles + (plane * s.lines + j) * int64_t(TILE), LINE);
            _tile_loadd(4, at[0] + line, step[0]);
            GYROKV_K_DOT(0, 4);
            ahead.step(LINE_TICKS);
            _tile_loadd(5, at[1] + line, step[1]);
            GYROKV_K_DOT(1, 5);
            ahead.step(LINE_TICKS);
            _tile_loadd(4, at[2] + line, step[2]);
            GYROKV_K_DOT(2, 4);
            ahead.step(LINE_TICKS);
            _tile_loadd(5, at[3] + line, step[3]);
            GYROKV_K_DOT(3, 5);
            ahead.step(LINE_TICKS);
        }
    _tile_stored(0, c, LINE);
    _tile_stored(1, c + TILE, LINE);
    _tile_stored(2, c + 2 * TILE, LINE);
    _tile_stored(3, c + 3 * TILE, LINE);
}
#undef GYROKV_K_DOT

INLINE vf shuffle_parts(vf a, vf b, std::integral_constant<int, 0>) { return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88); }
INLINE vf shuffle_parts(vf a, vf b, std::integral_constant<int, 1>) { return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd); }
INLINE vf shuffle_parts(vf a, vf b, std::integral_constant<int, 2>) { return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44); }
INLINE vf shuffle_parts(vf a, vf b, std::integral_constant<int, 3>) { return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xee); }
template <int which>
INLINE vf parts_of(vf a, vf b) {
    return shuffle_parts(a, b, std::integral_constant<int, which>{});
}

// Scores of 16 tokens, for 4 query rows, from the products of all units, `unit` bytes apart; k_scale: of the first token,
// [group][tokens].
template <bool integer, bool split>
INLINE void join_products(const Stored& s, const QueryTiles& q, const char* c, int64_t unit, const float* k_scale, int64_t tokens,
                          vf* scores) {
    vf sum[4];  // [4 tokens i, i + 4, i + 8, i + 12][4 query rows]
    if constexpr (split) {
        vf all[16];
#pragma GCC unroll 16
        for (int t = 0; t < 16; ++t) all[t] = vf{};
        for (int u = 0; u < s.units; ++u, c += unit) {
            const vf factor = load<vf>(q.scale + 16 * u);
            const float *even = k_scale + s.even[u] * tokens, *odd = k_scale + s.odd[u] * tokens;
#pragma GCC unroll 16
            for (int t = 0; t < 16; ++t) {
                const __m512 scale = _mm512_mask_broadcastss_ps(_mm512_set1_ps(even[t]), 0xff00, _mm_load_ss(odd + t));
                all[t] = fma(to_float(load<vi>(c + t * LINE)) * factor, (vf)scale, all[t]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const vf a = parts_of<2>(all[i], all[i + 4]) + parts_of<3>(all[i], all[i + 4]);
            const vf b = parts_of<2>(all[i + 8], all[i + 12]) + parts_of<3>(all[i + 8], all[i + 12]);
            sum[i] = parts_of<0>(a, b) + parts_of<1>(a, b);
        }
    } else {
        const vf factor = load<vf>(q.scale);
        auto two = [&](int t) {
            const __m512i x = _mm512_castsi256_si512(_mm256_load_si256((const __m256i*)(c + t * LINE)));
            const vi both = (vi)_mm512_inserti64x4(x, _mm256_load_si256((const __m256i*)(c + (t + 4) * LINE)), 1);
            if constexpr (integer) return to_float(both) * factor;
            return (vf)both * factor;
        };
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const vf a = two(i), b = two(i + 8);
            sum[i] = parts_of<0>(a, b) + parts_of<1>(a, b);
        }
    }
    using vq = vec<uint64_t>;
    const vq a = (vq)zip<0>(sum[0], sum[1]), b = (vq)zip<0>(sum[2], sum[3]), x = (vq)zip<1>(sum[0], sum[1]), y = (vq)zip<1>(sum[2], sum[3]);
    scores[0] = (vf)zip<0>(a, b), scores[1] = (vf)zip<1>(a, b), scores[2] = (vf)zip<0>(x, y), scores[3] = (vf)zip<1>(x, y);
}

// Scores of `rows` query rows for `tokens` tokens (a multiple of LANES): [row][stride], and the largest of each lane [row][LANES].
// k_scale: [group][scale_stride].
template <bool integer, bool split>
inline void score_rows_stored(MatrixUnit& unit, const Stored& s, const StoredRows& k, char* q_memory, int dim, int rows, int tokens,
                              const float* k_scale, int64_t scale_stride, bool scaled, char* products, float* scores, int64_t stride,
                              float* most, Ahead& ahead) {
    unit.configure(16, 16);
    for (int row = 0; row < rows; row += STORED_ROWS) {
        const QueryTiles q = query_tiles(s, q_memory, dim, row);
        const int own = std::min(STORED_ROWS, rows - row);
        const vf none = splat(-__builtin_inff());
        vf top[4] = {none, none, none, none};
        for (int t = 0; t < tokens; t += 64) {
            memory_barrier();
            for (int u = 0; u < s.units; ++u) score_unit<integer>(s, k, t / 16, q, u, products + 4 * u * TILE, ahead);
            memory_barrier();
            for (int i = 0; i < 64 && t + i < tokens; i += 16) {
                vf made[4];
                join_products<integer, split>(s, q, products + i * LINE, 4 * TILE, k_scale + t + i, scale_stride, made);
                for (int r = 0; r < own; ++r) {
                    if (!split && scaled) made[r] *= load<vf>(k_scale + t + i);
                    top[r] = max(top[r], made[r]);
                    store(scores + (row + r) * stride + t + i, made[r]);
                }
            }
        }
        for (int r = 0; r < own; ++r) store(most + (row + r) * LANES, top[r]);
        unit.nudge();
    }
}

// -- values

// What turns sums of bytes into sums of values: [even or odd bytes][query row].
struct Shares {
    float factor[2][STORED_ROWS];
    int32_t offset[2][STORED_ROWS];
};

// Weights [row][stride] times V's scales as A, for `groups` groups of 16 tokens: [group][high or low part][byte][query row].
INLINE void spread_integers(const float* weights, int64_t stride, int rows, const float* even, const float* odd, int groups,
                            int planes, char* to, Shares& made, MatrixUnit& unit) {
    for (int side = 0; side < (even == odd ? 1 : 2); ++side) {
        const float* scales = side ? odd : even;
        for (int r = 0; r < rows; ++r) {
            if (r % 2 == 0) unit.nudge();
            const float* w = weights + r * stride;
            vf most = {};
            for (int g = 0; g < groups; ++g) most = max(most, (vf)((vi)(load<vf>(w + 16 * g) * load<vf>(scales + 16 * g)) & 0x7fffffff));
            const float size = reduce_max(most), inverse = size > 1e-30f ? 32512.0f / size : 0.0f;
            vi sum = {}, high_sum = {};
            for (int g = 0; g < groups; ++g) {
                const vi x = round_int(load<vf>(w + 16 * g) * load<vf>(scales + 16 * g) * inverse), y = x + 128;
                sum += x, high_sum += y >> 8;
                char *high = to + g * 2 * TILE + r * LINE, *low = high + TILE;
                constexpr int BYTE = STORED_ROWS * LINE;
                if (side == 0) {
                    store(high, y >> 8 & 0xff), store(high + 2 * BYTE, y << 8 & 0xff0000);
                    store(low, x & 0xff), store(low + 2 * BYTE, x << 16 & 0xff0000);
                }
                if (side == 1 || even == odd) {
                    store(high + BYTE, y & 0xff00), store(high + 3 * BYTE, (y & 0xff00) << 16);
                    store(low + BYTE, x << 8 & 0xff00), store(low + 3 * BYTE, x << 24);
                }
            }
            made.factor[side][r] = size / 32512.0f;
            made.offset[side][r] = ZERO * (reduce_add(sum) + (planes == 2 ? reduce_add(high_sum) : 0));
            if (even == odd) made.factor[1][r] = made.factor[0][r], made.offset[1][r] = made.offset[0][r];
        }
    }
}

// Weights as two bfloat16, as A: [group][first or second of a column][high or low part][query row].
INLINE void spread_bfloats(const float* weights, int64_t stride, int rows, int groups, char* to) {
    for (int r = 0; r < rows; ++r)
        for (int g = 0; g < groups; ++g) {
            const vu x = load<vu>(weights + r * stride + 16 * g), high = x & 0xffff0000u;
            const vu low = (vu)((vf)x - (vf)high) + 0x8000;
            char* at = to + g * TILE + r * LINE;
            constexpr int PART = STORED_ROWS * LINE;
            store(at, high >> 16), store(at + PART, low >> 16);
            store(at + 2 * PART, high), store(at + 3 * PART, low & 0xffff0000u);
        }
}

// Sums of `groups` groups of tokens for one or two lines of bytes, [line][products with the high byte, the rest]: c.
// a: [group][part] tiles of each line.
template <int lines, int planes>
INLINE void sum_bytes(const StoredRows& v, int line, int first, int groups, const char* const* a, char* c, Ahead& ahead) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (lines > 1) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int g = 0; g < groups; ++g) {
        const char* at = v.at(first + g) + line * v.line;
        const int64_t step = v.step(first + g);
        _tile_loadd(4, a[0] + g * 2 * TILE, LINE);
        _tile_loadd(5, a[0] + g * 2 * TILE + TILE, LINE);
        _tile_loadd(6, at + (planes - 1) * v.plane, step);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 5, 6);
        ahead.step(LINE_TICKS);
        if constexpr (planes == 2) {
            _tile_loadd(7, at, step);
            _tile_dpbsud(1, 4, 7);
            ahead.step(LINE_TICKS);
        }
        if constexpr (lines > 1) {
            if (a[1] != a[0]) {
                _tile_loadd(4, a[1] + g * 2 * TILE, LINE);
                _tile_loadd(5, a[1] + g * 2 * TILE + TILE, LINE);
            }
            _tile_loadd(7, at + v.line + (planes - 1) * v.plane, step);
            _tile_dpbsud(2, 4, 7);
            _tile_dpbsud(3, 5, 7);
            ahead.step(LINE_TICKS);
            if constexpr (planes == 2) {
                _tile_loadd(6, at + v.line, step);
                _tile_dpbsud(3, 4, 6);
                ahead.step(LINE_TICKS);
            }
        }
    }
    _tile_stored(0, c, LINE);
    _tile_stored(1, c + TILE, LINE);
    if constexpr (lines > 1) {
        _tile_stored(2, c + 2 * TILE, LINE);
        _tile_stored(3, c + 3 * TILE, LINE);
    }
}

template <int lines>
INLINE void sum_bfloats(const StoredRows& v, int line, int first, int groups, const char* a, char* c, Ahead& ahead) {
    _tile_zero(0);
    if constexpr (lines > 1) _tile_zero(1);
    if constexpr (lines > 2) _tile_zero(2);
    if constexpr (lines > 3) _tile_zero(3);
    for (int g = 0; g < groups; ++g) {
        const char* at = v.at(first + g) + line * LINE;
        const int64_t step = v.step(first + g);
        _tile_loadd(4, a + g * TILE, LINE);
        _tile_loadd(6, at, step);
        _tile_dpbf16ps(0, 4, 6);
        ahead.step(LINE_TICKS);
        if constexpr (lines > 1) {
            _tile_loadd(7, at + LINE, step);
            _tile_dpbf16ps(1, 4, 7);
            ahead.step(LINE_TICKS);
        }
        if constexpr (lines > 2) {
            _tile_loadd(6, at + 2 * LINE, step);
            _tile_dpbf16ps(2, 4, 6);
            ahead.step(LINE_TICKS);
        }
        if constexpr (lines > 3) {
            _tile_loadd(7, at + 3 * LINE, step);
            _tile_dpbf16ps(3, 4, 7);
            ahead.step(LINE_TICKS);
        }
    }
    _tile_stored(0, c, LINE);
    if constexpr (lines > 1) _tile_stored(1, c + TILE, LINE);
    if constexpr (lines > 2) _tile_stored(2, c + 2 * TILE, LINE);
    if constexpr (lines > 3) _tile_stored(3, c + 3 * TILE, LINE);
}

// Rows of V and what they are multiplied with: weights [row][stride] of `groups` groups of 16 tokens from `first` on.
struct StoredValues {
    const Format& format;
    const Stored& stored;
    const StoredRows& rows;
    int first, groups;
    const float* weights;
    int64_t stride;
    int count;               // query rows
    const float* scales;     // [group of the scale][scale_stride], from the first token on
    int64_t scale_stride;
    float* out;              // [row][out_stride], in the order of the sums
    int64_t out_stride;
    const float* rescale;    // out = out * rescale + sums
    char *spread, *products; // room
};

inline void add_stored_bytes(const StoredValues& w, int row, MatrixUnit& matrix, Ahead& ahead) {
    const Stored& s = w.stored;
    const int rows = std::min(STORED_ROWS, w.count - row);
    const float* weights = w.weights + row * w.stride;
    Shares shares[2];
    int made[2] = {-1, -1}, unit = 0;  // units whose weights are spread
    const __mmask16 mask = s.lanes == 32 ? 0xffff : 0xff;
    for (int line = 0; line < s.lines; line += 2) {
        const int lines = std::min(2, s.lines - line);
        const char* a[2];
        int place[2];
        for (int l = 0; l < lines; ++l) {
            while (s.first[unit + 1] <= line + l) ++unit;
            int at = made[0] == unit ? 0 : made[1] == unit ? 1 : -1;
            if (at < 0) {
                at = l && place[0] == 0 ? 1 : 0;
                spread_integers(weights, w.stride, rows, w.scales + s.even[unit] * w.scale_stride, w.scales + s.odd[unit] * w.scale_stride,
                                w.groups, s.planes, w.spread + at * w.groups * 2 * TILE, shares[at], matrix);
                made[at] = unit;
            }
            place[l] = at, a[l] = w.spread + at * w.groups * 2 * TILE;
        }
        memory_barrier();
        if (lines == 2 && s.planes == 2)
            sum_bytes<2, 2>(w.rows, line, w.first, w.groups, a, w.products, ahead);
        else if (lines == 2)
            sum_bytes<2, 1>(w.rows, line, w.first, w.groups, a, w.products, ahead);
        else if (s.planes == 2)
            sum_bytes<1, 2>(w.rows, line, w.first, w.groups, a, w.products, ahead);
        else
            sum_bytes<1, 1>(w.rows, line, w.first, w.groups, a, w.products, ahead);
        memory_barrier();
        const float factor = w.format.factor * (s.planes == 2 ? 256.0f : 1.0f);
        for (int l = 0; l < lines; ++l)
            for (int b = 0; b < 4; ++b)
                for (int r = 0; r < rows; ++r) {
                    const Shares& own = shares[place[l]];
                    const char* c = w.products + l * 2 * TILE + (b * STORED_ROWS + r) * LINE;
                    const vf x = to_float((load<vi>(c) << 8) + load<vi>(c + TILE) - own.offset[b & 1][r]);
                    float* to = w.out + (row + r) * w.out_stride + ((line + l) * 4 + b) * (s.lanes / 2);
                    const vf old = (vf)_mm512_maskz_loadu_ps(mask, to);
                    _mm512_mask_storeu_ps(to, mask, (__m512)fma(old, splat(w.rescale[row + r]), x * (own.factor[b & 1][r] * factor)));
                }
    }
}

inline void add_stored_bfloats(const StoredValues& w, int row, Ahead& ahead) {
    const int rows = std::min(STORED_ROWS, w.count - row);
    spread_bfloats(w.weights + row * w.stride, w.stride, rows, w.groups, w.spread);
    for (int line = 0; line < w.stored.lines; line += 4) {
        const int lines = std::min(4, w.stored.lines - line);
        memory_barrier();
        if (lines == 4)
            sum_bfloats<4>(w.rows, line, w.first, w.groups, w.spread, w.products, ahead);
        else if (lines == 3)
            sum_bfloats<3>(w.rows, line, w.first, w.groups, w.spread, w.products, ahead);
        else if (lines == 2)
            sum_bfloats<2>(w.rows, line, w.first, w.groups, w.spread, w.products, ahead);
        else
            sum_bfloats<1>(w.rows, line, w.first, w.groups, w.spread, w.products, ahead);
        memory_barrier();
        for (int l = 0; l < lines; ++l)
            for (int b = 0; b < 2; ++b)
                for (int r = 0; r < rows; ++r) {
                    const char* c = w.products + l * TILE + (2 * b * STORED_ROWS + r) * LINE;
                    float* to = w.out + (row + r) * w.out_stride + ((line + l) * 2 + b) * 16;
                    store(to, fma(load<vf>(to), splat(w.rescale[row + r]), load<vf>(c) + load<vf>(c + STORED_ROWS * LINE)));
                }
    }
}

inline void add_stored(const StoredValues& w, MatrixUnit& unit, Ahead& ahead) {
    unit.configure(16, 16);
    for (int row = 0; row < w.count; row += STORED_ROWS)
        if (w.stored.element == INT8)
            add_stored_bytes(w, row, unit, ahead);
        else
            add_stored_bfloats(w, row, ahead);
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
