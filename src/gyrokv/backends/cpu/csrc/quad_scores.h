// Scores of few query rows from rows of codes side by side (see quads.h): four vectors become four of a dword of 16 tokens each.
#pragma once
#include "quad_query.h"

namespace gyrokv {
namespace GYROKV_ISA {

#if !defined(GYROKV_QUADS)

INLINE int quad_ticks(const Quads&, int, int) { return 0; }

#else

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

// Where each 16 of `times` 16 rows from t on are: the last ones, if they are fewer, in a.padded.
template <int times>
struct RowPlaces {
    const char* at[times];
    int64_t stride[times];
    inline __attribute__((always_inline)) void find(const QuadScores& a, int t) {
        for (int n = 0; n < times; ++n) {
            const int first = t + 16 * n, left = a.count - first;
            at[n] = a.rows + first * a.stride, stride[n] = a.stride;
            if (left >= 16) continue;
            for (int i = 0; i < left; ++i) std::memcpy(a.padded + i * a.bytes, at[n] + i * a.stride, a.bytes);
            at[n] = a.padded, stride[n] = a.bytes;
        }
    }
};

// Dwords of a part of `times` 16 rows, made four rows of each 16 at a time.
template <class C, bool plain, bool sorts, int times>
struct PartDwords {
    using F = Fields<C::bits>;
    static constexpr int fields = F::next > 0 ? 2 : 1, quads = times * fields * 4;
    alignas(64) __m512i made[times][fields][4];
    // Four rows, number i of `quads`; `rows`: those of the same 16 that came before.
    inline __attribute__((always_inline)) void make(int i, const Part& p, const RowPlaces<times>& places, __m512i* rows) {
        const int n = i / 4 / fields, field = i / 4 % fields, j = i % 4;
        const int64_t stride = places.stride[n];
        __m512i x = (__m512i)load_parts(places.at[n] + (field ? p.next : p.wide) + j * stride, 4 * stride);
        if (sorts || (field && !plain)) x = _mm512_shuffle_epi8(x, field && !plain ? every_part(p.gather) : every_part(SORTED));
        if (field && !plain) x = _mm512_mask_srli_epi16(x, p.further, x, F::next);
        if (field) x = _mm512_srlv_epi32(x, _mm512_set1_epi32(p.shift));
        asm("" : "+v"(x));  // here, and not where all four rows are wanted
        rows[j] = x;
        if (j == 3) dwords_of(rows, made[n][field]);
    }
    template <int s>
    inline __attribute__((always_inline)) line codes(int n, int dword) const {
        return codes_of<C::bits, s>(made[n][0][dword], made[n][fields - 1][dword]);
    }
};

// A dword in all lanes.
INLINE __m512i every_dword(const char* from) {
    int32_t x;
    std::memcpy(&x, from, 4);
    return _mm512_set1_epi32(x);
}

// Whether the dwords of a part are made while those of another one are multiplied, because shuffles in a row keep products waiting: this
// pays where products are most of what is done.
template <int rows, int terms, int times>
constexpr bool MAKES_AHEAD = rows == QUAD_ROWS && terms == 2 && times > 1;

// Scores of the `times` 16 tokens `here`; sets: of scales of a part, see Quads. made: where dwords are made ahead, those of the first part,
// and then those of the first part of `next`; later: room for as many.
template <class C, bool plain, int sets, int rows, int terms, int times, class Dwords>
INLINE void score_times(const QuadScores& a, const Levels<C>& levels, Dwords*& made, Dwords*& later, const RowPlaces<times>& here,
                        const RowPlaces<times>& next, const float* k_scale, vf (*score)[rows]) {
    constexpr int sums = C::sums(terms), steps = 4 * Fields<C::bits>::steps;
    constexpr bool begins = C::lines != WORDS || C::look_up == VALUES, ahead = MAKES_AHEAD<rows, terms, times>;
    vi sum[times][sets][rows][sums];
    const char *q = a.q.parts, *begin = a.q.begin, *q_scale = a.q.scale;
    auto start = [&]() __attribute__((always_inline)) {
        for (int set = 0; set < sets; ++set)
            for (int r = 0; r < rows; ++r)
                for (int i = 0; i < sums; ++i, begin += 4)
                    for (int n = 0; n < times; ++n) sum[n][set][r][i] = begins ? (vi)every_dword(begin) : vi{};
    };
    start();
    for (int p = 0; p < a.order.parts; ++p) {
        const Part& part = a.order.part[p];
        a.ahead.tick_inside(2 * times);
        const bool more = p + 1 < a.order.parts;
        const Part& next_part = a.order.part[more ? p + 1 : 0];
        const RowPlaces<times>& places = more ? here : next;
        Dwords at_once;
        Dwords& now = ahead ? *made : at_once;
        __m512i quad[4];
#pragma GCC unroll 16
        for (int i = 0; i < Dwords::quads && !ahead; ++i) at_once.make(i, part, here, quad);
        auto multiply = [&]<int d, int s>(std::integral_constant<int, d>, std::integral_constant<int, s>) __attribute__((always_inline)) {
            constexpr int sides = sets > 1, step = 4 * s + d;
            const int first = sets == 4 ? 2 * s : 0;
            line k[times][Levels<C>::lines];
            for (int n = 0; n < times; ++n) levels.of(now.template codes<s>(n, d), k[n]);
            for (int r = 0; r < rows; ++r, q += 4 * terms) {
                for (int i = 0; i < terms; ++i) {
                    const __m512i by = every_dword(q + 4 * i);
                    for (int n = 0; n < times; ++n) {
                        vi(&own)[sums] = sum[n][first + sides * (C::lines == WORDS ? i : d / 2)][r];
                        if constexpr (C::lines == WORDS) own[0] = dot_words(own[0], k[n][i], by);
                        if constexpr (C::lines == BYTES) own[i] = dot_parts(own[i], k[n][0], by);
                        if constexpr (C::lines == PLANES) {
                            own[i] = dot_parts(own[i], k[n][1], by);
                            if (i == 0) own[1] = dot_parts(own[1], k[n][0], by);
                        }
                    }
                }
            }
#pragma GCC unroll 8
            for (int i = Dwords::quads * step / steps; i < Dwords::quads * (step + 1) / steps && ahead; ++i)
                later->make(i, next_part, places, quad);
        };
        [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
            (multiply(std::integral_constant<int, i % 4>{}, std::integral_constant<int, i / 4>{}), ...);
        }(std::make_integer_sequence<int, steps>{});
        if (ahead) std::swap(made, later);
        if (!part.last) continue;
#pragma GCC unroll 4
        for (int set = 0; set < sets; ++set) {
            const float* scales = k_scale + part.group[set] * a.scale_stride;
            for (int r = 0; r < rows; ++r, q_scale += 4)
                for (int n = 0; n < times; ++n) {
                    vi made = sum[n][set][r][0];
                    if constexpr (sums == 2) made = (made << 8) + sum[n][set][r][1];
                    score[n][r] = fma(to_float(made), load<vf>(scales + 16 * n) * (vf)every_dword(q_scale), score[n][r]);
                }
        }
        if (p + 1 < a.order.parts) start();
    }
}

// Scores of all tokens, `times` 16 at a time: score(first token, where scores go).
template <int rows, int times, class Score>
INLINE void score_tokens(const QuadScores& a, Score score) {
    vf most[rows];
    for (int r = 0; r < rows; ++r) most[r] = splat(-__builtin_inff());
    for (int t = 0; t < a.tokens; t += 16 * times) {
        vf made[times][rows] = {};
        score(t, made);
        for (int n = 0; n < times && t + 16 * n < a.tokens; ++n)
            for (int r = 0; r < rows; ++r) {
                store(a.scores + r * a.score_stride + t + 16 * n, made[n][r]);
                most[r] = max(most[r], made[n][r]);
            }
    }
    for (int r = 0; r < rows; ++r) store(a.most + r * LANES, most[r]);
}

template <class C, bool plain, int sets, int rows, int terms>
__attribute__((noinline)) void score_quads_of(const QuadScores& a) {
    constexpr int sums = C::sums(terms), times = 2 * sets * rows * sums <= 16 ? 2 : 1;  // 16 sums in registers
    const Levels<C> levels(a.tables);
    using Dwords = PartDwords<C, plain, SORTS<C, plain, sets>, times>;
    Dwords dwords[2], *made = dwords, *later = dwords + 1;
    RowPlaces<times> here, next;
    here.find(a, 0);
    __m512i quad[4];
    for (int i = 0; i < Dwords::quads && MAKES_AHEAD<rows, terms, times>; ++i) made->make(i, a.order.part[0], here, quad);
    score_tokens<rows, times>(a, [&](int t, vf (*score)[rows]) __attribute__((always_inline)) {
        next = here;
        if (t + 16 * times < a.tokens) next.find(a, t + 16 * times);
        score_times<C, plain, sets, rows, terms, times>(a, levels, made, later, here, next, a.k_scale + t, score);
        here = next;
    });
}

// The same group by group (see GroupKeys): dwords of rows are made first, and then codes of them as they are wanted.
template <class C, int rows, int terms>
__attribute__((noinline)) void score_groups_of(const QuadScores& a) {
    using F = Fields<C::bits>;
    constexpr int sums = C::sums(terms), times = std::min(4, 16 / (rows * sums));
    const Levels<C> levels(a.tables);
    const GroupKeys& keys = a.order.keys;
    alignas(64) char dwords[GroupKeys::MOST_PARTS * 4 * times * LINE];  // [part][dword][16 tokens]
    auto make = [&](int n, const char* from, int64_t stride) __attribute__((always_inline)) {
        for (int p = 0; p < keys.parts; ++p) {
            const GroupKeys::Part& part = keys.part[p];
            a.ahead.tick_inside(2);
            __m512i x[4];
            for (int j = 0; j < 4; ++j) {
                x[j] = (__m512i)load_parts(from + part.at + j * stride, 4 * stride);
                if constexpr (C::lines != WORDS) x[j] = _mm512_shuffle_epi8(x[j], every_part(part.order));
                if constexpr (C::lines != WORDS && F::next > 0) x[j] = _mm512_mask_srli_epi16(x[j], part.further, x[j], F::next);
            }
            dwords_of(x, x);
            for (int d = 0; d < 4; ++d) _mm512_store_si512(dwords + ((4 * p + d) * times + n) * LINE, x[d]);
        }
    };
    RowPlaces<times> places;
    auto score = [&](int t, vf (*score)[rows]) __attribute__((always_inline)) {
        places.find(a, t);
        for (int n = 0; n < times; ++n) make(n, places.at[n], places.stride[n]);
        const char *q = a.q.parts, *begin = a.q.begin, *q_scale = a.q.scale;
        const GroupKeys::Dword* dword = keys.dword;
        for (int i = 0; i < keys.runs; ++i) {
            const GroupKeys::Run& run = keys.run[i];
            vi sum[times][rows][sums];
            for (int r = 0; r < rows; ++r)
                for (int j = 0; j < sums; ++j, begin += 4)
                    for (int n = 0; n < times; ++n) sum[n][r][j] = C::lines == WORDS ? vi{} : (vi)every_dword(begin);
            for (const auto* stop = dword + run.dwords; dword < stop; ++dword) {
                const char *wide = dwords + times * dword->wide, *above = dwords + times * dword->next;
                const __m512i shift = _mm512_set1_epi32(dword->shift), next_turn = _mm512_set1_epi32(dword->next_turn);
                line k[times];
                for (int n = 0; n < times; ++n) {
                    __m512i x = _mm512_srlv_epi32(_mm512_load_si512(wide + n * LINE), shift);
                    if constexpr (F::next > 0) {
                        const __m512i next = _mm512_rorv_epi32(_mm512_load_si512(above + n * LINE), next_turn);
                        x = _mm512_ternarylogic_epi32(_mm512_set1_epi8((1 << F::wide) - 1), x, next, 0xca);
                    }
                    if constexpr (C::lines == WORDS) k[n] = levels.word(x);
                    else levels.of((line)x, k + n);
                }
                for (int r = 0; r < rows; ++r)
                    for (int j = 0; j < sums; ++j, q += 4) {
                        const __m512i by = every_dword(q);
                        for (int n = 0; n < times; ++n) {
                            vi& own = sum[n][r][j];
                            own = C::lines == WORDS ? dot_words(own, k[n], by) : dot_parts(own, k[n], by);
                        }
                    }
            }
            const float* scales = a.k_scale + t + run.group * a.scale_stride;
            for (int r = 0; r < rows; ++r, q_scale += 4)
                for (int n = 0; n < times; ++n) {
                    vi whole = sum[n][r][0];
                    if constexpr (sums == 2) whole = (whole << 8) + sum[n][r][1];
                    score[n][r] = fma(to_float(whole), load<vf>(scales + 16 * n) * (vf)every_dword(q_scale), score[n][r]);
                }
        }
    };
    score_tokens<rows, times>(a, score);
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
        as_terms<C>(terms, [&]<int t>(std::integral_constant<int, t>) {
            as_pass(a.q.rows, [&]<int rows>(std::integral_constant<int, rows>) {
                if constexpr (C::bits < 8)
                    if (a.order.by_group) return score_groups_of<C, rows, t>(a);
                auto with_sets = [&]<bool plain>() {
                    if constexpr (C::bits == 4)
                        if (a.order.sets == 4) return score_quads_of<C, plain, 4, rows, t>(a);
                    if constexpr (C::lines != WORDS || C::large)
                        if (a.order.sets == 1) return score_quads_of<C, plain, 1, rows, t>(a);
                    score_quads_of<C, plain, 2, rows, t>(a);
                };
                if constexpr (Fields<C::bits>::next > 0)
                    if (!a.order.plain) return with_sets.template operator()<false>();
                with_sets.template operator()<true>();
            });
        });
    });
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
