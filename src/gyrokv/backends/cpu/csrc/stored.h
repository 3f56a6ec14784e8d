// Few query rows on the matrix unit, from rows as they are stored (see lines.h).
//
// Scores take lines of 16 tokens as A and q as B. Values of bytes take the bytes of four tokens at a time, interleaved, as B
// and weights as A. Values of bfloat16 take lines of 16 tokens as B, so that a column belongs to one token; A then holds each
// weight once per value of a column, with a zero beside it, which costs less than to interleave tokens. q and weights have
// two parts, as everywhere.
#pragma once
#include "lines.h"
#include "weight_bytes.h"

namespace gyrokv {
namespace GYROKV_ISA {

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

// Bytes of q that meet a unit's lines, to a column of B at `to`, zeros in place of even or odd ones that are left out. Returns
// their sum.
INLINE int pack_bytes(const Stored& s, const char* q, int dim, int unit, bool even, bool odd, char* to) {
    const __mmask32 mask = s.lanes == 32 ? ~0u : 0xffffu;
    vi sum = {};
    for (int j = s.first[unit]; j < s.first[unit + 1]; ++j) {
        const __m256i x = _mm256_maskz_loadu_epi8(even ? mask : 0, q + s.lanes * j);
        const __m256i y = _mm256_maskz_loadu_epi8(odd ? mask : 0, q + s.lanes * j + dim / 2);
        const __m512i both = _mm512_slli_epi16(_mm512_cvtepu8_epi16(y), 8);
        _mm512_storeu_si512(to + j * LINE, _mm512_or_si512(both, _mm512_cvtepu8_epi16(x)));
        const __m512i added = _mm512_add_epi16(_mm512_cvtepi8_epi16(x), _mm512_cvtepi8_epi16(y));
        sum += (vi)_mm512_madd_epi16(added, _mm512_set1_epi16(1));
    }
    return reduce_add(sum);
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
                for (int u = 0; u < s.units; ++u)
                    made.start[16 * u + column] -= ZERO * pack_bytes(s, q, f.dim, u, !s.split || !odd, !s.split || odd, to);
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

// Products of 32 tokens with q in tiles c and d: at `to` + unit * 2 * TILE, [32][16]. Two pairs of tiles take turns, so that
// a product waits for none of the 32 tokens before.
#define GYROKV_SCORE_TILES(c, d)                                                       \
    for (int u = 0; u < s.units; ++u, to += 2 * TILE) {                                \
        if constexpr (integer) {                                                       \
            _tile_loadd(c, q.start + 16 * u, 0);                                       \
            _tile_loadd(d, q.start + 16 * u, 0);                                       \
        } else {                                                                       \
            _tile_zero(c);                                                             \
            _tile_zero(d);                                                             \
        }                                                                              \
        for (int p = 0; p < s.planes; ++p)                                             \
            for (int j = s.first[u]; j < s.first[u + 1]; ++j) {                        \
                _tile_loadd(6, q.tiles + (p * s.lines + j) * int64_t(TILE), LINE);     \
                _tile_loadd(4, k[0].at + j * k[0].line + p * k[0].plane, k[0].step);   \
                GYROKV_K_DOT(c, 4);                                                    \
                _tile_loadd(5, k[1].at + j * k[1].line + p * k[1].plane, k[1].step);   \
                GYROKV_K_DOT(d, 5);                                                    \
                ahead.tick(ticks);                                                     \
            }                                                                          \
        _tile_stored(c, to, LINE);                                                     \
        _tile_stored(d, to + TILE, LINE);                                              \
    }
template <bool integer>
INLINE void score_tiles(const Stored& s, const Lines* k, const QueryTiles& q, bool second, char* to, Ahead& ahead) {
    const int ticks = k_tile_ticks(s);
    memory_barrier();
    if (second) {
        GYROKV_SCORE_TILES(2, 3)
    } else {
        GYROKV_SCORE_TILES(0, 1)
    }
    memory_barrier();
}
#undef GYROKV_SCORE_TILES

INLINE vf shuffle_parts(vf a, vf b, std::integral_constant<int, 0>) { return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88); }
INLINE vf shuffle_parts(vf a, vf b, std::integral_constant<int, 1>) { return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd); }
INLINE vf shuffle_parts(vf a, vf b, std::integral_constant<int, 2>) { return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44); }
INLINE vf shuffle_parts(vf a, vf b, std::integral_constant<int, 3>) { return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xee); }
template <int which>
INLINE vf parts_of(vf a, vf b) {
    return shuffle_parts(a, b, std::integral_constant<int, which>{});
}

// Columns of products that are more than zeros; SCALED: all 16, and even and odd bytes may have scales of their own.
enum Columns : int { EIGHT, SIXTEEN, SCALED };

// Scores of 16 tokens, for 4 query rows, from the products of all units, `unit` bytes apart; k_scale: of the first token,
// [group][tokens], which are left out where there is one for all.
template <bool integer, Columns columns>
INLINE void join_products(const Stored& s, const QueryTiles& q, const char* c, int64_t unit, const float* k_scale, int64_t tokens,
                          vf* scores) {
    vf sum[4];  // [4 tokens i, i + 4, i + 8, i + 12][4 query rows]
    if constexpr (columns != EIGHT) {
        vf all[16];
#pragma GCC unroll 16
        for (int t = 0; t < 16; ++t) all[t] = columns == SCALED ? vf{} : to_float(load<vi>(c + t * LINE)) * load<vf>(q.scale);
        for (int u = 0; u < s.units && columns == SCALED; ++u, c += unit) {
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
// k_scale: [group][scale_stride]. `made`: room for lines of 64 tokens; `products`: for 4 TILE per unit.
//
// While the matrix unit multiplies 32 tokens, the vector units make lines of the next 32 and join products of those before.
template <bool integer, Columns columns>
inline void score_rows_stored(MatrixUnit& unit, const StoredRows& k, char* q_memory, int rows, int tokens, const float* k_scale,
                              int64_t scale_stride, bool scaled, char* made, char* products, float* scores, int64_t stride,
                              float* most, Ahead& ahead) {
    unit.configure(16, 16);
    const Stored& s = k.stored;
    const int passes = (rows + STORED_ROWS - 1) / STORED_ROWS, items = (tokens + 31) / 32 * passes;
    const int64_t size = lines_bytes(s), products_size = s.units * 2 * TILE;
    for (int r = 0; r < rows; ++r) store(most + r * LANES, splat(-__builtin_inff()));
    Lines lines[2];
    auto make = [&](int step) {
        char* to = made + step % 2 * 2 * size;
        for (int i = 0; i < 2; ++i) lines[i] = k.lines(2 * step + i, to + i * size, k_make_ticks(s), ahead);
    };
    auto join = [&](int item) {
        const int row = item % passes * STORED_ROWS, own = std::min(STORED_ROWS, rows - row);
        const QueryTiles q = query_tiles(s, q_memory, k.format.dim, row);
        const char* from = products + item % 2 * products_size;
        for (int t = item / passes * 32; t < std::min(item / passes * 32 + 32, tokens); t += 16, from += TILE) {
            vf x[4];
            join_products<integer, columns>(s, q, from, 2 * TILE, k_scale + t, scale_stride, x);
            for (int r = 0; r < own; ++r) {
                if (columns != SCALED && scaled) x[r] *= load<vf>(k_scale + t);
                float* top = most + (row + r) * LANES;
                store(top, max(load<vf>(top), x[r]));
                store(scores + (row + r) * stride + t, x[r]);
            }
            ahead.tick(k_join_ticks(s));
        }
    };
    make(0);
    for (int item = 0; item < items; ++item) {
        const QueryTiles q = query_tiles(s, q_memory, k.format.dim, item % passes * STORED_ROWS);
        score_tiles<integer>(s, lines, q, item % 2, products + item % 2 * products_size, ahead);
        if ((item + 1) % passes == 0 && item + 1 < items) make((item + 1) / passes);
        if (item) join(item - 1);
    }
    join(items - 1);
}

// -- values

// Weights times V's scales as A for bytes: [64 tokens][zeros, high part, low part, zeros][row][64 bytes], the tokens in the
// order of code_quads; without zeros where V has one plane, and one part where `parts` is 1.
template <int planes, int parts>
constexpr int64_t weight_bytes_size(int rows) { return int64_t(planes == 2 ? 4 : parts) * rows * LINE; }  // of 64 tokens
template <int parts>
constexpr int MOST_WEIGHT_ROWS = 16 / parts;  // query rows of a product

// One side of the columns of some query rows, [64 tokens] as above; `factors` [row]: of the integers.
struct WeightBytes {
    char* at;
    float* factors;
};
// side: of even or odd bytes; row: the first one of a product.
template <int planes, int steps, int parts>
INLINE WeightBytes weight_room(char* room, int row, int side) {
    constexpr int most = MOST_WEIGHT_ROWS<parts>;
    constexpr int64_t size = steps * weight_bytes_size<planes, parts>(most);
    return {room + (2 * (row / most) + side) * size, (float*)(room + 2 * MOST_STORED / most * size) + 2 * row + side * most};
}

// Tokens before `first` and from `stop` on are not seen: their scales need not be numbers. (Apart from its caller, because
// compilers otherwise keep its addresses in vector registers.)
template <int planes, int steps, int parts>
__attribute__((noinline)) void weight_bytes(const float* weights, int64_t stride, int rows, const float* scales, int first, int stop,
                                            char* at, float* factors) {
    vf scale[4 * steps];
    for (int i = 0; i < 4 * steps; ++i) scale[i] = 16 * i >= first && 16 * i < stop ? load<vf>(scales + 16 * i) : vf{};
    alignas(64) float inverse[LANES] = {};
    for (int r = 0; r < rows; ++r) {
        vf most = {};
#pragma GCC unroll 8
        for (int i = 0; i < 4 * steps; ++i) most = larger_size(most, load<vf>(weights + r * stride + 16 * i) * scale[i]);
        inverse[r] = reduce_max(most);
    }
    const vf size = load<vf>(inverse);
    store(inverse, size > 1e-30f ? LARGEST_WEIGHT<parts> / size : vf{});
    _mm512_mask_storeu_ps(factors, __mmask16((1u << rows) - 1), (__m512)(size / LARGEST_WEIGHT<parts>));
    const int64_t below = rows * LINE;
    for (int r = 0; r < rows; ++r, weights += stride, at += LINE) {
        const vf by = splat(inverse[r]);
#pragma GCC unroll 2
        for (int i = 0; i < steps; ++i) {
            vf x[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) x[j] = load<vf>(weights + 16 * (4 * i + j)) * scale[4 * i + j];
            write_weights<planes, parts>(x, by, at + i * weight_bytes_size<planes, parts>(rows), below);
        }
    }
}

// body.operator()<planes, 64 tokens, parts>() as V and the block of `tokens` want it.
template <class Body>
INLINE void as_bytes(const Stored& s, int tokens, Body body) {
    const bool whole = tokens == 128;
    if (s.planes == 2) return whole ? body.template operator()<2, 2, 2>() : body.template operator()<2, 1, 2>();
    if (s.parts == 2) return whole ? body.template operator()<1, 2, 2>() : body.template operator()<1, 1, 2>();
    whole ? body.template operator()<1, 2, 1>() : body.template operator()<1, 1, 1>();
}

// Scores [row][stride] of all tokens of a block to weights exp2(score * scale - top) times V's only scale, as bytes in `room`, and
// their sums, without the scale, to `total`.
inline void soften_bytes(const Stored& s, int tokens, const float* scores, int64_t stride, float scale, int rows,
                         const float* scales, const float* top, float* total, char* room) {
    as_bytes(s, tokens, [&]<int planes, int steps, int parts>() __attribute__((always_inline)) {
        constexpr int most_rows = MOST_WEIGHT_ROWS<parts>;
        for (int row = 0; row < rows; ++row, scores += stride) {
            vf x[4 * steps], added = {}, most = {};
#pragma GCC unroll 8
            for (int i = 0; i < 4 * steps; ++i) {
                const vf w = exp2<4>(fma(load<vf>(scores + 16 * i), splat(scale), splat(-top[row])));
                added += w;
                x[i] = w * load<vf>(scales + 16 * i);
                most = larger_size(most, x[i]);
            }
            const int first = row / most_rows * most_rows, own = std::min(most_rows, rows - first);
            const WeightBytes to = weight_room<planes, steps, parts>(room, first, 0);
            const float size = reduce_max(most), inverse = size > 1e-30f ? LARGEST_WEIGHT<parts> / size : 0.0f;
            to.factors[row - first] = size / LARGEST_WEIGHT<parts>;
#pragma GCC unroll 2
            for (int i = 0; i < steps; ++i)
                write_weights<planes, parts>(x + 4 * i, splat(inverse),
                                             to.at + i * weight_bytes_size<planes, parts>(own) + (row - first) * LINE, own * LINE);
            total[row] += reduce_add(added);
        }
    });
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

// Sums of a line of bytes over `steps` times 64 tokens: [byte][high, low part][row]. `a`: weights of even and of odd bytes;
// from: [64 tokens][plane] as code_quads makes them. Of two planes the low one is multiplied with weights that lie `rows` lower:
// [byte][high plane with high part, high with low and low with high, low with low][row]; the last ones are left out where
// more than five rows fill the 16 before.
#define GYROKV_V_DOT(c, byte)                                                        \
    _tile_loadd(6, from + (planes - 1) * QUADS + byte * TILE, LINE);                 \
    _tile_dpbssd(c, 4, 6);                                                           \
    if constexpr (planes == 2) {                                                     \
        _tile_loadd(7, from + byte * TILE, LINE);                                    \
        _tile_dpbssd(c, 5, 7);                                                       \
    }
#define GYROKV_V_WEIGHTS(side)                                                       \
    _tile_loadd(4, a[side] + step * size + (planes - 1) * rows * LINE, LINE);        \
    if constexpr (planes == 2) _tile_loadd(5, a[side] + step * size, LINE);
template <int planes, int parts>
INLINE void sum_bytes(const char* const* a, int rows, const char* from, int steps, char* c) {
    const int64_t size = weight_bytes_size<planes, parts>(rows);
    memory_barrier();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int step = 0; step < steps; ++step, from += planes * QUADS) {
        GYROKV_V_WEIGHTS(0)
        GYROKV_V_DOT(0, 0)
        GYROKV_V_DOT(2, 2)
        if (a[1] != a[0]) {
            GYROKV_V_WEIGHTS(1)
        }
        GYROKV_V_DOT(1, 1)
        GYROKV_V_DOT(3, 3)
    }
    _tile_stored(0, c, LINE);
    _tile_stored(1, c + TILE, LINE);
    _tile_stored(2, c + 2 * TILE, LINE);
    _tile_stored(3, c + 3 * TILE, LINE);
    memory_barrier();
}
#undef GYROKV_V_DOT
#undef GYROKV_V_WEIGHTS

template <int lines>
INLINE void sum_bfloats(const Lines* v, int line, int groups, const char* a, char* c, Ahead& ahead) {
    _tile_zero(0);
    if constexpr (lines > 1) _tile_zero(1);
    if constexpr (lines > 2) _tile_zero(2);
    if constexpr (lines > 3) _tile_zero(3);
    for (int g = 0; g < groups; ++g) {
        const char* at = v[g].at + line * LINE;
        const int64_t step = v[g].step;
        _tile_loadd(4, a + g * TILE, LINE);
        _tile_loadd(6, at, step);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (lines > 1) {
            _tile_loadd(7, at + LINE, step);
            _tile_dpbf16ps(1, 4, 7);
        }
        ahead.tick(std::min(lines, 2) * V_TILE_TICKS);
        if constexpr (lines > 2) {
            _tile_loadd(6, at + 2 * LINE, step);
            _tile_dpbf16ps(2, 4, 6);
        }
        if constexpr (lines > 3) {
            _tile_loadd(7, at + 3 * LINE, step);
            _tile_dpbf16ps(3, 4, 7);
        }
        if constexpr (lines > 2) ahead.tick((lines - 2) * V_TILE_TICKS);
    }
    _tile_stored(0, c, LINE);
    if constexpr (lines > 1) _tile_stored(1, c + TILE, LINE);
    if constexpr (lines > 2) _tile_stored(2, c + 2 * TILE, LINE);
    if constexpr (lines > 3) _tile_stored(3, c + 3 * TILE, LINE);
}

// Rows of V and what they are multiplied with: weights [row][stride] of all `tokens` of the block, 64 or 128. Those before
// `first` and from `stop` on, multiples of 16, are zeros.
struct StoredValues {
    const StoredRows& rows;
    int tokens, first, stop;
    const float* weights;
    int64_t stride;
    int count;               // query rows
    const float* scales;     // [group of the scale][scale_stride]
    int64_t scale_stride;
    float* out;              // [row][out_stride], in the order of the sums
    int64_t out_stride;
    const float* rescale;    // out = out * rescale + sums
    char *made, *spread, *products; // room
    bool ready;              // the weights are in `spread` (see soften_bytes)
};

// out [row][stride] = out * rescale + sums of a line of bytes * factor * by, for 4 * `columns` columns.
template <int planes, int parts>
__attribute__((noinline)) void add_sums(const char* sums, int rows, const float* even, const float* odd, float by,
                                        const float* rescale, int columns, float* out, int64_t stride) {
    const __mmask16 mask = columns == 16 ? 0xffff : 0xff;
    const bool last = planes == 2 && 3 * rows <= 16;  // the product of both low parts
    const int64_t low = rows * LINE;
    for (int r = 0; r < rows; ++r, sums += LINE, out += stride) {
        const vf factors[2] = {splat(even[r] * by), splat(odd[r] * by)}, old = splat(rescale[r]);
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) {
            const char* c = sums + b * TILE;
            vi sum = load<vi>(c);
            if constexpr (parts == 2) sum = (sum << 8) + load<vi>(c + low);
            vf x = to_float(sum);
            if (last) x = fma(to_float(load<vi>(c + 2 * low)), splat(1.0f / 256.0f), x);
            float* to = out + b * columns;
            const vf before = (vf)_mm512_maskz_loadu_ps(mask, to) * old;
            _mm512_mask_storeu_ps(to, mask, (__m512)fma(x, factors[b % 2], before));
        }
    }
}

template <int planes, int steps, int parts>
inline void add_stored_bytes(const StoredValues& w, MatrixUnit& unit, Ahead& ahead) {
    constexpr int most = MOST_WEIGHT_ROWS<parts>;  // query rows of a product
    const Stored& s = w.rows.stored;
    const float by = w.rows.format.factor * (planes == 2 ? 256.0f : 1.0f);
    for (int j = 0, u = -1; j < s.lines; ++j) {
        const bool fresh = j == s.first[u + 1] && !w.ready;  // scales differ from those of the line before
        u += j == s.first[u + 1];
        for (int i = 0; i < 4 * steps; ++i) {
            s.make.values(s, w.rows.tables, j, w.rows.at(i), w.rows.step(i), w.made + i / 4 * planes * QUADS + i % 4 * LINE);
            ahead.tick(v_make_ticks(s));
        }
        for (int row = 0; row < w.count; row += most) {
            const int rows = std::min(most, w.count - row);
            const bool apart = s.odd[u] != s.even[u];
            const WeightBytes sides[2] = {weight_room<planes, steps, parts>(w.spread, row, 0),
                                          weight_room<planes, steps, parts>(w.spread, row, apart)};
            const char* a[2] = {sides[0].at, sides[1].at};
            for (int side = 0; side < 1 + apart && fresh; ++side) {
                const int group = side ? s.odd[u] : s.even[u];
                weight_bytes<planes, steps, parts>(w.weights + row * w.stride, w.stride, rows, w.scales + group * w.scale_stride,
                                                   w.first, w.stop, sides[side].at, sides[side].factors);
            }
            sum_bytes<planes, parts>(a, rows, w.made, steps, w.products);
            add_sums<planes, parts>(w.products, rows, sides[0].factors, sides[1].factors, by, w.rescale + row, s.lanes / 2,
                                    w.out + row * w.out_stride + j * 2 * s.lanes, w.out_stride);
        }
    }
}

inline void add_stored_bfloats(const StoredValues& w, MatrixUnit& unit, Ahead& ahead) {
    const Stored& s = w.rows.stored;
    const int groups = (w.stop - w.first) / 16;
    Lines v[MOST_STORED_TOKENS / 16];
    for (int g = 0; g < groups; ++g) {
        v[g] = w.rows.lines(w.first / 16 + g, w.made + g * lines_bytes(s), v_make_ticks(s), ahead);
    }
    for (int row = 0; row < w.count; row += STORED_ROWS) {
        const int rows = std::min(STORED_ROWS, w.count - row);
        spread_bfloats(w.weights + row * w.stride + w.first, w.stride, rows, groups, w.spread);
        ahead.tick(V_SPREAD_TICKS * groups / 4);
        for (int line = 0; line < s.lines; line += 4) {
            const int lines = std::min(4, s.lines - line);
            memory_barrier();
            if (lines == 4)
                sum_bfloats<4>(v, line, groups, w.spread, w.products, ahead);
            else if (lines == 3)
                sum_bfloats<3>(v, line, groups, w.spread, w.products, ahead);
            else if (lines == 2)
                sum_bfloats<2>(v, line, groups, w.spread, w.products, ahead);
            else
                sum_bfloats<1>(v, line, groups, w.spread, w.products, ahead);
            memory_barrier();
            for (int l = 0; l < lines; ++l) {
                ahead.tick(groups);
                for (int b = 0; b < 2; ++b)
                    for (int r = 0; r < rows; ++r) {
                        const char* c = w.products + l * TILE + (2 * b * STORED_ROWS + r) * LINE;
                        float* to = w.out + (row + r) * w.out_stride + ((line + l) * 2 + b) * 16;
                        store(to, fma(load<vf>(to), splat(w.rescale[row + r]), load<vf>(c) + load<vf>(c + STORED_ROWS * LINE)));
                    }
            }
        }
    }
}

inline void add_stored(const StoredValues& w, MatrixUnit& unit, Ahead& ahead) {
    unit.configure(16, 16);
    if (w.rows.stored.element != INT8) return add_stored_bfloats(w, unit, ahead);
    as_bytes(w.rows.stored, w.tokens, [&]<int planes, int steps, int parts>() {
        add_stored_bytes<planes, steps, parts>(w, unit, ahead);
    });
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
