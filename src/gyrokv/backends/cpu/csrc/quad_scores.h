// Scores of few query rows from rows of codes side by side (see quads.h).
#pragma once
#include "quads.h"

namespace gyrokv {
namespace GYROKV_ISA {

constexpr int QUAD_ROWS = 4;  // query rows of a pass, at most

#if !defined(GYROKV_QUADS)

struct QuadQuery {};
INLINE int64_t quad_query_bytes(int, int) { return 0; }
INLINE int quad_ticks(const Quads&, int, int) { return 0; }

#else

// q of up to four rows: parts [line][row][term] of 16 bytes, then per run of parts with the same scales what sums begin with
// [row][term] and the scales of q [row], of each four values of a line.
struct QuadQuery {
    const char *parts, *begin, *scale;
};
INLINE int64_t quad_query_bytes(int dim, int rows) {
    if (rows > MOST_QUAD_ROWS) return 0;
    const int64_t lines = round_up(int64_t(dim), 64) / 16 * 2;
    return (rows + QUAD_ROWS - 1) / QUAD_ROWS * lines * QUAD_ROWS * 5 * PART_BYTES;
}

// Rows of a block of K, and where their scores go.
struct QuadScores {
    const Quads& order;
    const Tables& tables;
    const char* rows;
    int64_t stride;      // bytes
    int bytes, count;    // of a row; rows
    const float* k_scale;
    int64_t scale_stride;
    int tokens;          // a multiple of 16; those from count on have any score
    QuadQuery q;
    float* scores;       // [row][score_stride]
    int64_t score_stride;
    float* most;         // [row][LANES], the largest
    char* padded;        // room for 16 rows
    Ahead& ahead;
};

// Factors of a vector's sums: the scales of the tokens 4 i + j in part i, each for the values in its lane of a line.
template <bool quarters, int j>
INLINE vf scales_of(const Part& part, const float* scale, int64_t stride) {
    constexpr auto token = [](int i) constexpr { return i / 4 * 4 + j; };
    auto of = [&](int lane) {
        const vf all = load<vf>(scale + part.group[lane] * stride);
        return (__m512)shuffle<token>(all, all);
    };
    const __m512 x = _mm512_mask_blend_ps(0xcccc, of(0), of(2));
    if constexpr (!quarters) return (vf)x;
    return (vf)_mm512_mask_blend_ps(0xaaaa, x, _mm512_mask_blend_ps(0xcccc, of(1), of(3)));
}

// Four sums per part and row, to [part][row].
template <int rows, class V>
INLINE V add_parts(const V* x) {
    using vq = vec<uint64_t>;
    auto row = [&](int r) { return r < rows ? x[r] : V{}; };
    const V a = zip<0>(row(0), row(1)) + zip<1>(row(0), row(1)), b = zip<0>(row(2), row(3)) + zip<1>(row(2), row(3));
    return (V)zip<0>((vq)a, (vq)b) + (V)zip<1>((vq)a, (vq)b);
}

INLINE vi dot_parts(vi sum, line k, __m512i q) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)k, q); }

// Two vectors of four tokens each, 4 i + j and 4 i + j + 1 in part i, to their scores [part][row]. `once`: all values of a row have
// the same scales, which are left out, and scores are integers.
template <class C, int lines, bool plain, bool once, int rows, int terms, int j>
INLINE void score_pair(const QuadScores& a, const Decoder<C::bits, C::look_up>& decoder, const char* at, int64_t stride,
                       const float* k_scale, std::conditional_t<once, vi, vf>* to) {
    constexpr int sums = C::planes == 2 ? 2 : terms;
    vi sum[2][rows][sums];
    std::conditional_t<once, vi, vf> score[2][rows] = {};
    const char *q = a.q.parts, *begin = a.q.begin, *q_scale = a.q.scale;
    auto start = [&]() __attribute__((always_inline)) {
        for (int r = 0; r < rows; ++r)
            for (int i = 0; i < sums; ++i, begin += PART_BYTES) sum[0][r][i] = sum[1][r][i] = (vi)every_part(begin);
    };
    auto joined = [&](int i, int r) __attribute__((always_inline)) {
        if constexpr (sums == 1) return sum[i][r][0];
        return (sum[i][r][0] << 8) + sum[i][r][sums - 1];
    };
    start();
    for (int p = 0; p < a.order.parts; ++p) {
        const Part& part = a.order.part[p];
        a.ahead.tick_inside(1);
        const PartLines<C, plain, lines == Fields<C::bits>::steps> tokens[2] = {{part, at + j * stride, 4 * stride}, {part, at + (j + 1) * stride, 4 * stride}};
        auto multiply = [&]<int s>(std::integral_constant<int, s>) __attribute__((always_inline)) {
            line k[2][C::planes];
            for (int i = 0; i < 2; ++i) decoder.template values<C::planes>(tokens[i].template codes<s>(), k[i]);
            for (int r = 0; r < rows; ++r, q += terms * PART_BYTES) {
                const __m512i high = every_part(q);
                for (int i = 0; i < 2; ++i) sum[i][r][0] = dot_parts(sum[i][r][0], k[i][C::planes - 1], high);
                if constexpr (C::planes == 2)
                    for (int i = 0; i < 2; ++i) sum[i][r][1] = dot_parts(sum[i][r][1], k[i][0], high);
                if constexpr (terms == 2) {
                    const __m512i low = every_part(q + PART_BYTES);
                    for (int i = 0; i < 2; ++i) sum[i][r][1] = dot_parts(sum[i][r][1], k[i][C::planes - 1], low);
                }
            }
        };
        [&]<int... s>(std::integer_sequence<int, s...>) __attribute__((always_inline)) {
            (multiply(std::integral_constant<int, s>{}), ...);
        }(std::make_integer_sequence<int, lines>{});
        if constexpr (!once) {
            if (!part.last) continue;
            constexpr bool quarters = QUARTERS<C::bits>;
            const vf scale[2] = {scales_of<quarters, j>(part, k_scale, a.scale_stride), scales_of<quarters, j + 1>(part, k_scale, a.scale_stride)};
            for (int r = 0; r < rows; ++r, q_scale += PART_BYTES) {
                const vf by = (vf)every_part(q_scale);
                for (int i = 0; i < 2; ++i) score[i][r] = fma(to_float(joined(i, r)) * by, scale[i], score[i][r]);
            }
            if (p + 1 < a.order.parts) start();
        }
    }
    if constexpr (once)
        for (int i = 0; i < 2; ++i)
            for (int r = 0; r < rows; ++r) score[i][r] = joined(i, r);
    for (int i = 0; i < 2; ++i) to[i] = add_parts<rows>(score[i]);
}

template <class C, int lines, bool plain, bool once, int rows, int terms>
__attribute__((noinline)) void score_quads_of(const QuadScores& a) {
    const Decoder<C::bits, C::look_up> decoder(a.tables);
    vf most[rows];
    for (int r = 0; r < rows; ++r) most[r] = splat(-__builtin_inff());
    const char* at = a.rows;
    for (int t = 0; t < a.tokens; t += 16, at += 16 * a.stride) {
        int64_t stride = a.stride;
        const char* from = at;
        if (a.count - t < 16) {
            for (int i = 0; i < a.count - t; ++i) std::memcpy(a.padded + i * a.bytes, at + i * stride, a.bytes);
            from = a.padded, stride = a.bytes;
        }
        std::conditional_t<once, vi, vf> x[4];
        score_pair<C, lines, plain, once, rows, terms, 0>(a, decoder, from, stride, a.k_scale + t, x);
        score_pair<C, lines, plain, once, rows, terms, 2>(a, decoder, from, stride, a.k_scale + t, x + 2);
        using vq = vec<uint64_t>;
        const vq b = (vq)zip<0>(x[0], x[1]), c = (vq)zip<0>(x[2], x[3]), d = (vq)zip<1>(x[0], x[1]), e = (vq)zip<1>(x[2], x[3]);
        const vq made[4] = {zip<0>(b, c), zip<1>(b, c), zip<0>(d, e), zip<1>(d, e)};
        for (int r = 0; r < rows; ++r) {
            vf score = (vf)made[r];
            if constexpr (once) score = to_float((vi)made[r]) * (load<vf>(a.k_scale + t) * *(const float*)(a.q.scale + r * PART_BYTES));
            store(a.scores + r * a.score_stride + t, score);
            most[r] = max(most[r], score);
        }
    }
    for (int r = 0; r < rows; ++r) store(a.most + r * LANES, most[r]);
}

// Of `rows` query rows, those of the next pass.
INLINE int quad_pass(int rows) { return rows >= 4 ? 4 : rows >= 2 ? 2 : 1; }
// Ticks of Ahead while `rows` of them pass over `tokens`.
INLINE int quad_ticks(const Quads& order, int rows, int tokens) {
    int passes = 0;
    for (; rows; ++passes) rows -= quad_pass(rows);
    return passes * tokens / 16 * 2 * order.parts;
}
template <class Body>
INLINE void as_pass(int rows, Body body) {
    if (rows == 4) return body(std::integral_constant<int, 4>{});
    if (rows == 2) return body(std::integral_constant<int, 2>{});
    body(std::integral_constant<int, 1>{});
}

// body(terms) for those that takes_quads allows.
template <class C, class Body>
INLINE void as_terms(int terms, Body body) {
    if constexpr (C::planes == 2) return body(std::integral_constant<int, 2>{});
    constexpr bool both = C::bits < 5 || C::look_up == VALUES;
    if constexpr (both)
        if (terms == 2) return body(std::integral_constant<int, 2>{});
    if constexpr (C::planes == 1) body(std::integral_constant<int, 1>{});
}

// Scores of `rows` (1, 2 or 4) rows whose q has `terms` parts.
inline void score_quads(const Format& f, int rows, int terms, const QuadScores& a) {
    as_coded(f, [&]<class C>(C) {
        constexpr int steps = Fields<C::bits>::steps;
        as_pass(rows, [&]<int n>(std::integral_constant<int, n>) {
            auto run = [&]<int lines>(std::integral_constant<int, lines>) {
                as_terms<C>(terms, [&]<int t>(std::integral_constant<int, t>) {
                    if constexpr (Fields<C::bits>::next > 0)
                        if (!a.order.plain) return score_quads_of<C, lines, false, false, n, t>(a);
                    if (a.order.once && lines == steps) return score_quads_of<C, lines, true, lines == steps, n, t>(a);
                    score_quads_of<C, lines, true, false, n, t>(a);
                });
            };
            if (steps > 1 && a.order.lines == steps)
                run(std::integral_constant<int, steps>{});
            else
                run(std::integral_constant<int, 1>{});
        });
    });
}

// q of up to four rows, of which a [row][term] is int8 and `stride` bytes apart and scale [row][group] its scales.
inline QuadQuery pack_quads(const Format& f, const Quads& order, const char* a, int64_t stride, int rows, int terms, const float* scale,
                            char* to) {
    const int lines = order.parts * order.lines, sums = f.planes == 2 ? 2 : terms;
    char *begin = to + int64_t(lines) * rows * terms * PART_BYTES, *scales = begin + int64_t(lines) * rows * sums * PART_BYTES;
    const QuadQuery made = {to, begin, scales};
    int32_t sum[QUAD_ROWS][2][4] = {};  // what ZERO adds
    for (int p = 0, l = 0; p < order.parts; ++p) {
        const Part& part = order.part[p];
        for (int s = 0; s < order.lines; ++s, ++l)
            for (int r = 0; r < rows; ++r)
                for (int term = 0; term < terms; ++term, to += PART_BYTES) {
                    const int8_t* from = (const int8_t*)a + (int64_t(r) * terms + term) * stride + order.first[l];
                    for (int i = 0; i < PART_BYTES; ++i) {
                        const int w = i % PART_WORDS, x = part.words >> w & 1 ? from[i / PART_WORDS * (f.dim / 2) + w] : 0;
                        to[i] = char(x);
                        if (f.planes == 2) {
                            if (!term) sum[r][0][i / 4] += x;
                            sum[r][1][i / 4] += x;
                        } else {
                            sum[r][terms - 1][i / 4] += term + 1 < terms ? 256 * x : x;
                        }
                    }
                }
        if (!part.last) continue;
        for (int r = 0; r < rows; ++r) {
            for (int i = 0; i < sums; ++i, begin += PART_BYTES)
                for (int lane = 0; lane < 4; ++lane) {
                    const int32_t x = -ZERO * sum[r][i][lane];
                    std::memcpy(begin + 4 * lane, &x, 4);
                    sum[r][i][lane] = 0;
                }
            for (int lane = 0; lane < 4; ++lane, scales += 4) {
                const float x = scale[int64_t(r) * (f.dim / f.group) + part.group[lane]] * (f.planes == 2 ? 256.0f : 1.0f);
                std::memcpy(scales, &x, 4);
            }
        }
    }
    return made;
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
