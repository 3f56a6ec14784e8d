// Scores of few query rows from rows of codes side by side (see quads.h): four vectors become four of a dword of 16 tokens each.
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

// q of 4, 2 or 1 rows: dwords [line][dword of a part][row][term], then per run of parts with the same scales [set of dwords][row] what
// sums begin with and the scales of q.
struct QuadQuery {
    const char *parts, *begin, *scale;
    int rows;
};
INLINE int64_t quad_query_bytes(int dim, int rows) {
    if (rows > MOST_QUAD_ROWS) return 0;
    const int64_t lines = round_up(int64_t(dim), 64) / 16 * 2;
    return rows * lines * 5 * PART_BYTES;
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

INLINE vi dot_parts(vi sum, line k, __m512i q) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)k, q); }

INLINE vi dot_words(vi sum, line k, __m512i q) { return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)k, q); }

// Parts of 16 rows to four vectors of a dword of each row.
INLINE void dwords_of(const __m512i* x, __m512i* to) {
    const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpacklo_epi32(x[2], x[3]);
    const __m512i c = _mm512_unpackhi_epi32(x[0], x[1]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    to[0] = _mm512_unpacklo_epi64(a, b), to[1] = _mm512_unpackhi_epi64(a, b);
    to[2] = _mm512_unpacklo_epi64(c, d), to[3] = _mm512_unpackhi_epi64(c, d);
}

// Whether bytes of even values come before those of odd ones in the dwords of a part. Else they stay as they are.
template <class C, bool plain, int sets>
constexpr bool SORTS = C::lines != WORDS && (!plain || sets > 1);

// Parts of 16 rows to dwords of codes. `all`: of all codes, else of those at the part's shift.
template <class C, bool plain, bool sorts, bool all>
struct PartDwords {
    using F = Fields<C::bits>;
    __m512i wide[4], next[4];
    inline __attribute__((always_inline)) PartDwords(const Part& p, const char* rows, int64_t stride) {
        const __m512i sorted = every_part(SORTED);
        __m512i x[4];
        for (int j = 0; j < 4; ++j) {
            x[j] = (__m512i)load_parts(rows + p.wide + j * stride, 4 * stride);
            if constexpr (sorts) x[j] = _mm512_shuffle_epi8(x[j], sorted);
            if constexpr (!all) x[j] = _mm512_srl_epi16(x[j], _mm_cvtsi32_si128(p.shift));
        }
        dwords_of(x, wide);
        if constexpr (F::next > 0) {
            for (int j = 0; j < 4; ++j) {
                x[j] = load_next<plain>(p, rows + j * stride, 4 * stride);
                if constexpr (sorts || !plain) x[j] = _mm512_shuffle_epi8(x[j], plain ? sorted : every_part(p.gather));
                if constexpr (!plain) x[j] = _mm512_mask_srli_epi16(x[j], p.further, x[j], F::next);
                x[j] = _mm512_rorv_epi32(x[j], _mm512_set1_epi32(p.turn));
            }
            dwords_of(x, next);
        }
    }
    template <int s>
    inline __attribute__((always_inline)) line codes(int dword) const {
        return codes_of<C::bits, s>(wide[dword], next[dword]);
    }
};

// Scores of `times` 16 tokens. sets: of scales of a part, see Quads.
template <class C, int lines, bool plain, int sets, int rows, int terms, int times>
INLINE void score_times(const QuadScores& a, const Levels<C>& levels, const char* const* at, const int64_t* stride,
                        const float* k_scale, vf (*score)[rows]) {
    constexpr int sums = C::sums(terms);
    constexpr bool begins = C::lines != WORDS || C::look_up == VALUES;
    vi sum[times][sets][rows][sums];
    const char *q = a.q.parts, *begin = a.q.begin, *q_scale = a.q.scale;
    auto dword = [](const char* from) __attribute__((always_inline)) {
        int32_t x;
        std::memcpy(&x, from, 4);
        return _mm512_set1_epi32(x);
    };
    auto start = [&]() __attribute__((always_inline)) {
        for (int set = 0; set < sets; ++set)
            for (int r = 0; r < rows; ++r)
                for (int i = 0; i < sums; ++i, begin += 4)
                    for (int n = 0; n < times; ++n) sum[n][set][r][i] = begins ? (vi)dword(begin) : vi{};
    };
    start();
    for (int p = 0; p < a.order.parts; ++p) {
        const Part& part = a.order.part[p];
        a.ahead.tick_inside(2 * times);
        using Dwords = PartDwords<C, plain, SORTS<C, plain, sets>, lines == Fields<C::bits>::steps>;
        const Dwords x[2] = {Dwords(part, at[0], stride[0]), Dwords(part, at[times - 1], stride[times - 1])};
        auto multiply = [&]<int s>(std::integral_constant<int, s>) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int d = 0; d < 4; ++d) {
                const int set = d * sets / 4;
                line k[times][Levels<C>::lines];
                for (int n = 0; n < times; ++n) levels.of(x[n].template codes<s>(d), k[n]);
                for (int r = 0; r < rows; ++r, q += 4 * terms) {
                    for (int i = 0; i < terms; ++i) {
                        const __m512i by = dword(q + 4 * i);
                        for (int n = 0; n < times; ++n) {
                            vi(&own)[sums] = sum[n][C::lines == WORDS ? i * (sets - 1) : set][r];
                            if constexpr (C::lines == WORDS) own[0] = dot_words(own[0], k[n][i], by);
                            if constexpr (C::lines == BYTES) own[i] = dot_parts(own[i], k[n][0], by);
                            if constexpr (C::lines == PLANES) {
                                own[i] = dot_parts(own[i], k[n][1], by);
                                if (i == 0) own[1] = dot_parts(own[1], k[n][0], by);
                            }
                        }
                    }
                }
            }
        };
        [&]<int... s>(std::integer_sequence<int, s...>) __attribute__((always_inline)) {
            (multiply(std::integral_constant<int, s>{}), ...);
        }(std::make_integer_sequence<int, lines>{});
        if (!part.last) continue;
#pragma GCC unroll 4
        for (int set = 0; set < sets; ++set) {
            const float* scales = k_scale + part.group[set] * a.scale_stride;
            for (int r = 0; r < rows; ++r, q_scale += 4)
                for (int n = 0; n < times; ++n) {
                    vi made = sum[n][set][r][0];
                    if constexpr (sums == 2) made = (made << 8) + sum[n][set][r][1];
                    score[n][r] = fma(to_float(made), load<vf>(scales + 16 * n) * (vf)dword(q_scale), score[n][r]);
                }
        }
        if (p + 1 < a.order.parts) start();
    }
}

template <class C, int lines, bool plain, int sets, int rows, int terms>
__attribute__((noinline)) void score_quads_of(const QuadScores& a) {
    constexpr int sums = C::sums(terms), times = 2 * sets * rows * sums <= 16 ? 2 : 1;  // 16 sums in registers
    const Levels<C> levels(a.tables);
    vf most[rows];
    for (int r = 0; r < rows; ++r) most[r] = splat(-__builtin_inff());
    for (int t = 0; t < a.tokens; t += 16 * times) {
        const char* at[times];
        int64_t stride[times];
        for (int n = 0; n < times; ++n) {
            const int first = t + 16 * n, left = a.count - first;
            at[n] = a.rows + first * a.stride, stride[n] = a.stride;
            if (left >= 16) continue;
            for (int i = 0; i < left; ++i) std::memcpy(a.padded + i * a.bytes, at[n] + i * a.stride, a.bytes);
            at[n] = a.padded, stride[n] = a.bytes;
        }
        vf score[times][rows] = {};
        score_times<C, lines, plain, sets, rows, terms, times>(a, levels, at, stride, a.k_scale + t, score);
        for (int n = 0; n < times && t + 16 * n < a.tokens; ++n)
            for (int r = 0; r < rows; ++r) {
                store(a.scores + r * a.score_stride + t + 16 * n, score[n][r]);
                most[r] = max(most[r], score[n][r]);
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
// body(rows) of a pass.
template <class Body>
INLINE void as_pass(int rows, Body body) {
    if (rows == 4) return body(std::integral_constant<int, 4>{});
    if (rows == 2) return body(std::integral_constant<int, 2>{});
    body(std::integral_constant<int, 1>{});
}

// body(terms) for those that takes_quads allows.
template <class C, class Body>
INLINE void as_terms(int terms, Body body) {
    if constexpr (C::lines != BYTES) return body(std::integral_constant<int, 2>{});
    constexpr bool both = C::bits < 5 || C::look_up == VALUES;
    if constexpr (both)
        if (terms == 2) return body(std::integral_constant<int, 2>{});
    if constexpr (C::lines == BYTES) body(std::integral_constant<int, 1>{});
}

// Scores of the rows that `q` holds, with q of `terms` parts.
inline void score_quads(const Format& f, int terms, const QuadScores& a) {
    as_coded<false>(f, a.order, [&]<class C>(C) {
        constexpr int steps = Fields<C::bits>::steps;
        auto run = [&]<int lines, bool plain, int sets, int rows>() {
            as_terms<C>(terms, [&]<int t>(std::integral_constant<int, t>) { score_quads_of<C, lines, plain, sets, rows, t>(a); });
        };
        auto with_sets = [&]<int lines, bool plain>() {
            auto with_rows = [&]<int sets>() {
                if (a.q.rows == 4) return run.template operator()<lines, plain, sets, 4>();
                if (a.q.rows == 2) return run.template operator()<lines, plain, sets, 2>();
                run.template operator()<lines, plain, sets, 1>();
            };
            if constexpr (C::lines != WORDS || C::large)
                if (a.order.sets == 1) return with_rows.template operator()<1>();
            with_rows.template operator()<2>();
        };
        auto with_lines = [&]<bool plain>() {
            if constexpr (steps > 1)
                if (a.order.lines == steps) return with_sets.template operator()<steps, plain>();
            with_sets.template operator()<1, plain>();
        };
        if constexpr (Fields<C::bits>::next > 0)
            if (!a.order.plain) return with_lines.template operator()<false>();
        with_lines.template operator()<true>();
    });
}

// The same as words: of each dword of codes those that the even bytes meet, then those that the odd ones do. Where large words of K
// meet them, those of a run of parts are made smaller if their sizes add up to more than WORD_SUM.
inline QuadQuery pack_words(const Format& f, const Quads& order, const char* a, int64_t stride, int rows, const float* scale,
                            float factor, char* to) {
    char *start = to + 4 * 4 * order.parts * order.lines * rows * 2, *scales = start + 4 * 4 * order.parts * rows;
    const QuadQuery made = {to, start, scales, rows};
    for (int begin = 0, p = 0; begin < order.parts; begin = p) {
        while (!order.part[p++].last) {
        }
        float larger[QUAD_ROWS];
        int32_t zero[2][QUAD_ROWS] = {};  // [set]: what ZERO adds
        for (int r = 0; r < rows; ++r) {
            int64_t size = 0;
            for (int pass = 0; pass < 2; ++pass) {
                char* at = to + 8 * r;
                const vf smaller = splat(pass && f.planes == 2 && size > WORD_SUM ? float(WORD_SUM) / float(size) : 1.0f);
                larger[r] = 1.0f / smaller[0];
                for (int i = begin * order.lines; i < p * order.lines; ++i, at += 4 * 8 * rows) {
                    const Part& part = order.part[i / order.lines];
                    auto term = [&](int number) {
                        const char* from = a + (int64_t(r) * 2 + number) * stride + order.first[i];
                        const __m128i even = _mm_maskz_loadu_epi8(part.words[0], from);
                        const __m128i odd = _mm_maskz_loadu_epi8(part.words[1], from + f.dim / 2);
                        return _mm512_cvtepi8_epi32(_mm_unpacklo_epi8(even, odd));
                    };
                    const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(term(0), 8), term(1));
                    if (!pass) {
                        size += _mm512_reduce_add_epi32(_mm512_abs_epi32(whole));
                        for (int set = 0; set < order.sets; ++set)
                            zero[set][r] -= ZERO * _mm512_mask_reduce_add_epi32(order.sets == 1 ? 0xffff : 0x5555 << set, whole);
                        continue;
                    }
                    alignas(32) int16_t words[LANES];
                    _mm256_store_si256((__m256i*)words, _mm512_cvtepi32_epi16((__m512i)round_int(to_float((vi)whole) * smaller)));
                    for (int d = 0; d < 4; ++d) {
                        const int16_t four[4] = {words[4 * d], words[4 * d + 2], words[4 * d + 1], words[4 * d + 3]};
                        std::memcpy(at + d * 8 * rows, four, 8);
                    }
                }
            }
        }
        to += 4 * 8 * rows * (p - begin) * order.lines;
        for (int set = 0; set < order.sets; ++set)
            for (int r = 0; r < rows; ++r, scales += 4, start += 4) {
                const float x = scale[r * (f.dim / f.group) + order.part[begin].group[set]] * larger[r] * factor;
                std::memcpy(scales, &x, 4), std::memcpy(start, &zero[set][r], 4);
            }
    }
    return made;
}

// q of up to four rows, of which a [row][term] is int8 and `stride` bytes apart and scale [row][group] its scales.
inline QuadQuery pack_quads(const Format& f, const Quads& order, const char* a, int64_t stride, int rows, int terms, const float* scale,
                            float word_factor, char* to) {
    if (order.words) return pack_words(f, order, a, stride, rows, scale, word_factor, to);
    const int dwords = 4 * order.parts * order.lines, sums = f.planes == 2 ? 2 : terms, sets = order.sets;
    char *begin = to + 4 * dwords * rows * terms, *scales = begin + 4 * dwords * rows * sums;
    const QuadQuery made = {to, begin, scales, rows};
    const bool sorts = !order.plain || sets > 1;
    const __m128i ones = _mm_set1_epi8(1);
    __m128i sum[QUAD_ROWS][2] = {};  // [row][term]: of the bytes of each dword of a part
    for (int p = 0; p < order.parts; ++p) {
        const Part& part = order.part[p];
        for (int s = 0; s < order.lines; ++s, to += 4 * rows * terms * 4)
            for (int r = 0; r < rows; ++r)
                for (int term = 0; term < terms; ++term) {
                    const char* from = a + (int64_t(r) * terms + term) * stride + order.first[p * order.lines + s];
                    const __m128i even = _mm_maskz_loadu_epi8(part.words[0], from);
                    const __m128i odd = _mm_maskz_loadu_epi8(part.words[1], from + f.dim / 2);
                    const __m128i x = sorts ? _mm_unpacklo_epi64(even, odd) : _mm_unpacklo_epi8(even, odd);
                    sum[r][term] = _mm_dpbusd_epi32(sum[r][term], ones, x);
                    alignas(16) int32_t dword[4];
                    _mm_store_si128((__m128i*)dword, x);
                    for (int d = 0; d < 4; ++d) std::memcpy(to + 4 * ((d * rows + r) * terms + term), dword + d, 4);
                }
        if (!part.last) continue;
        for (int set = 0; set < sets; ++set)
            for (int r = 0; r < rows; ++r) {
                int32_t all[2] = {};  // [term]
                for (int term = 0; term < terms; ++term) {
                    alignas(16) int32_t of[4];
                    _mm_store_si128((__m128i*)of, sum[r][term]);
                    all[term] = sets == 2 ? of[2 * set] + of[2 * set + 1] : of[0] + of[1] + of[2] + of[3];
                }
                const int32_t high = f.planes == 2 || terms == 1 ? all[0] : 0, low = (f.planes == 2 ? 1 : 256) * all[0] + all[1];
                for (int i = 0; i < sums; ++i, begin += 4) {
                    const int32_t x = -ZERO * (i ? low : high);  // what ZERO adds
                    std::memcpy(begin, &x, 4);
                }
                const float x = scale[int64_t(r) * (f.dim / f.group) + part.group[set]] * (f.planes == 2 ? 256.0f : 1.0f);
                std::memcpy(scales, &x, 4), scales += 4;
            }
        std::fill_n(&sum[0][0], 2 * QUAD_ROWS, __m128i{});
    }
    return made;
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
