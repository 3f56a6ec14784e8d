// Scores from rows of codes side by side: see quad_scores.h.
#include "quad_scores.h"

namespace gyrokv {
namespace GYROKV_ISA {

// Whether bytes of even values come before those of odd ones in the dwords of a part. Else they stay as they are.
template <class C, bool plain, int sets>
constexpr bool SORTS = C::lines != WORDS && (!plain || sets > 1);

// Where each 16 of `times` 16 rows from t on are.
template <int times>
struct RowPlaces {
    const char* at[times];
    int64_t stride[times];
    inline __attribute__((always_inline)) void find(const QuadScores& a, int t, bool beyond = false) {
        for (int n = 0; n < times; ++n) {
            const auto place = a.keys.place(t + 16 * n, beyond);
            at[n] = place.at, stride[n] = place.stride;
        }
    }
};

// Dwords of 16 rows of a part: of its words, or of those of the next field that have its bits.
template <class C, bool plain, bool sorts, bool next, bool shifts = false>
INLINE void make_dwords(const Part& p, const char* rows, int64_t stride, __m512i* to) {
    constexpr bool gathers = next && !plain;
    __m512i x[4];
    for (int j = 0; j < 4; ++j) {
        x[j] = (__m512i)load_parts(rows + (next ? p.next : p.wide) + j * stride, 4 * stride);
        if (sorts || gathers) x[j] = _mm512_shuffle_epi8(x[j], every_part(gathers ? p.gather : SORTED));
        if (gathers) x[j] = _mm512_mask_srli_epi16(x[j], p.further, x[j], Fields<C::bits>::next);
        if (shifts) x[j] = _mm512_srlv_epi32(x[j], _mm512_set1_epi32(p.shift));
    }
    dwords_of(x, to);
}

// Room for dwords of `times` 16 rows of a part, and of the next field's parts, each made once: now and ahead.
template <class C, int times>
struct PartDwords {
    using Four = __m512i[4];
    static constexpr int nexts = std::max(1, Fields<C::bits>::next * MOST_PARTS / 8);
    alignas(64) Four wide[2][times], next[2][nexts][times];
    Four shifted[2][times];  // the latter, for parts that are not the first ones with them
    int part = 0, rows = 0;  // which of two are now's
};

// A dword in all lanes.
INLINE __m512i every_dword(const char* from) {
    int32_t x;
    std::memcpy(&x, from, 4);
    return _mm512_set1_epi32(x);
}

// Whether all even bytes of rows are multiplied before odd ones (see score_halves).
template <class C, int sets, int rows, int terms>
constexpr bool IN_HALVES = sets == 4 && rows >= 3 && terms == 1;

// How often 16 tokens share what is read of q, so that there are up to 16 sums, which is what registers hold. With two planes, or sets,
// and five or six rows, 20 or 24 took less time.
template <class C, int sets, int rows, int terms>
constexpr int TIMES = rows > 4 && rows < 8 && (C::lines == PLANES || sets == 2 || (sets == 4 && terms == 1)) ? 2
                      : std::clamp(16 / ((IN_HALVES<C, sets, rows, terms> ? 2 : sets) * rows * C::sums(terms)), 1,
                                   rows >= 3 && terms == 2 ? 4 : 2);

// Whether the dwords of a part are made while those of another one are multiplied, because shuffles in a row keep products waiting: this
// pays where products are most of what is done.
template <int rows, int terms, int times>
constexpr bool MAKES_AHEAD = rows >= 3 && terms == 2 && times > 1;

// Scores of the `times` 16 tokens `here`; sets: of scales of a part, see Quads. Where dwords are made ahead, `dwords` has those of the first
// part, and then those of the first part of `after`.
template <class C, bool plain, int sets, int rows, int terms, int times>
INLINE void score_times(const QuadScores& a, const Levels<C>& levels, PartDwords<C, times>& dwords, const RowPlaces<times>& here,
                        const RowPlaces<times>& after, Soon soon, const float* k_scale, vf (*score)[rows]) {
    using F = Fields<C::bits>;
    constexpr int sums = C::sums(terms), steps = 4 * F::steps;
    constexpr bool begins = C::lines != WORDS || C::look_up == VALUES, ahead = MAKES_AHEAD<rows, terms, times>;
    constexpr bool sorts = SORTS<C, plain, sets>;
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
        if (times < 4) a.ahead.tick_inside(2 * times);
        if (!ahead) soon.ask();
        const bool more = p + 1 < a.order.parts;
        const Part& later = a.order.part[more ? p + 1 : 0];
        const RowPlaces<times>& places = more ? here : after;
        __m512i wide_now[times][4], next_now[times][4];
        auto& wide = ahead ? dwords.wide[dwords.part] : wide_now;
        auto& next = !ahead ? next_now : part.begins ? dwords.next[dwords.rows][part.next_number] : dwords.shifted[dwords.part];
        auto& next_later = dwords.next[more ? dwords.rows : dwords.rows ^ 1][later.next_number];
#pragma GCC unroll 4
        for (int n = 0; n < times && !ahead; ++n) {
            make_dwords<C, plain, sorts, false>(part, here.at[n], here.stride[n], wide[n]);
            if (F::next > 0) make_dwords<C, plain, sorts, true, true>(part, here.at[n], here.stride[n], next[n]);
        }
        auto make_wide = [&](int n) __attribute__((always_inline)) {
            make_dwords<C, plain, sorts, false>(later, places.at[n], places.stride[n], dwords.wide[dwords.part ^ 1][n]);
        };
        auto make_next = [&](int n) __attribute__((always_inline)) {
            if (later.begins) return make_dwords<C, plain, sorts, true>(later, places.at[n], places.stride[n], next_later[n]);
            for (int d = 0; d < 4; ++d)
                dwords.shifted[dwords.part ^ 1][n][d] = _mm512_srlv_epi32(next_later[n][d], _mm512_set1_epi32(later.shift));
        };
        auto multiply = [&]<int d, int s>(std::integral_constant<int, d>, std::integral_constant<int, s>) __attribute__((always_inline)) {
            constexpr int sides = sets > 1, step = 4 * s + d;
            const int first = sets == 4 ? 2 * s : 0;
            line code[times], k[times][Levels<C>::lines];
            for (int n = 0; n < times; ++n) code[n] = codes_of<C::bits, s>(wide[n][d], F::next > 0 ? next[n][d] : __m512i{});
            auto add = [&](int r, int i) __attribute__((always_inline)) {
                const __m512i by = every_dword(q + 4 * (r * terms + i));
                for (int n = 0; n < times; ++n) {
                    vi(&own)[sums] = sum[n][first + sides * (C::lines == WORDS ? i : d / 2)][r];
                    if constexpr (C::lines == WORDS) own[0] = dot_words(own[0], k[n][i], by);
                    if constexpr (C::lines == BYTES) own[i] = dot_parts(own[i], k[n][0], by);
                    if constexpr (C::lines == PLANES) {
                        own[i] = dot_parts(own[i], k[n][1], by);
                        if (i == 0) own[1] = dot_parts(own[1], k[n][0], by);
                    }
                }
            };
            if constexpr (ONE_BY_ONE<C>) {  // else four lines more than registers hold
                for (int n = 0; n < times; ++n) k[n][0] = levels.template one<0>(code[n]);
                for (int r = 0; r < rows; ++r) add(r, 0);
                for (int n = 0; n < times; ++n) k[n][1] = levels.template one<1>(code[n]);
                for (int r = 0; r < rows; ++r) add(r, 1);
            } else {
                for (int n = 0; n < times; ++n) levels.of(code[n], k[n]);
                for (int r = 0; r < rows; ++r)
                    for (int i = 0; i < terms; ++i) add(r, i);
            }
            q += 4 * rows * terms;
            constexpr int every = steps / times;
            if constexpr (times == 4 && step % every == 0) a.ahead.tick_inside(2);  // eight at once ask for too many lines
            constexpr bool makes = ahead && step / every < times;
            if constexpr (makes && step % every == 0) make_wide(step / every);
            if constexpr (makes && F::next > 0 && step % every == every / 2) make_next(step / every);
        };
        [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
            (multiply(std::integral_constant<int, i % 4>{}, std::integral_constant<int, i / 4>{}), ...);
        }(std::make_integer_sequence<int, steps>{});
        dwords.part ^= ahead;
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
        if (more) start();
    }
    dwords.rows ^= ahead;
}

// The same with one term of q, where even bytes, odd ones, and both codes of each have scales of their own. Dwords of odd bytes wait in
// memory until even ones are done: registers hold the sums of half of the sets, and so of twice as many tokens that share what is read of q.
template <class C, int rows, int times>
INLINE void score_halves(const QuadScores& a, const Levels<C>& levels, const RowPlaces<times>& here, Soon soon, const float* k_scale,
                         vf (*score)[rows]) {
    constexpr int codes = 2, set_bytes = 4 * rows;
    __m512i odd[MOST_PARTS][times][2];
    const char *q = a.q.parts, *begin = a.q.begin, *q_scale = a.q.scale;
    for (int first = 0, stop = 0; first < a.order.parts; first = stop) {  // parts that have the same scales
        while (!a.order.part[stop++].last) {
        }
        for (int side = 0; side < 2; ++side) {
            vi sum[times][codes][rows];
            for (int s = 0; s < codes; ++s)
                for (int r = 0; r < rows; ++r)
                    for (int n = 0; n < times; ++n) sum[n][s][r] = (vi)every_dword(begin + (2 * s + side) * set_bytes + 4 * r);
            for (int p = first; p < stop; ++p) {
                const char* by = q + (4 * codes * p + 2 * side) * set_bytes;
                __m512i wide[times][4];
                for (int n = 0; n < times && side == 0; ++n) {
                    make_dwords<C, true, true, false>(a.order.part[p], here.at[n], here.stride[n], wide[n]);
                    odd[p][n][0] = wide[n][2], odd[p][n][1] = wide[n][3];
                }
                if (side == 0) a.ahead.tick_inside(2 * times), soon.ask();
                auto multiply = [&]<int d, int s>(std::integral_constant<int, d>, std::integral_constant<int, s>) __attribute__((always_inline)) {
                    line k[times];
                    for (int n = 0; n < times; ++n) levels.of(codes_of<C::bits, s>(side ? odd[p][n][d] : wide[n][d], __m512i{}), k + n);
                    for (int r = 0; r < rows; ++r) {
                        const __m512i own = every_dword(by + (4 * s + d) * set_bytes + 4 * r);
                        for (int n = 0; n < times; ++n) sum[n][s][r] = dot_parts(sum[n][s][r], k[n], own);
                    }
                };
                [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
                    (multiply(std::integral_constant<int, i / codes>{}, std::integral_constant<int, i % codes>{}), ...);
                }(std::make_integer_sequence<int, 2 * codes>{});
            }
            for (int s = 0; s < codes; ++s) {
                const int set = 2 * s + side;
                const float* scales = k_scale + a.order.part[first].group[set] * a.scale_stride;
                for (int r = 0; r < rows; ++r) {
                    const vf by = (vf)every_dword(q_scale + set * set_bytes + 4 * r);
                    for (int n = 0; n < times; ++n) score[n][r] = fma(to_float(sum[n][s][r]), load<vf>(scales + 16 * n) * by, score[n][r]);
                }
            }
        }
        begin += 4 * set_bytes, q_scale += 4 * set_bytes;
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
    constexpr int times = TIMES<C, sets, rows, terms>;
    constexpr bool ahead = MAKES_AHEAD<rows, terms, times>, sorts = SORTS<C, plain, sets>;
    const Levels<C> levels(a.tables);
    const int64_t share = round_up(16 * times * a.keys.stride / a.order.parts, CACHE_LINE);  // while a part is taken
    PartDwords<C, times> dwords;
    RowPlaces<times> here, after;
    here.find(a, 0);
    for (int n = 0; n < times && ahead; ++n) {
        make_dwords<C, plain, sorts, false>(a.order.part[0], here.at[n], here.stride[n], dwords.wide[0][n]);
        if (Fields<C::bits>::next > 0) make_dwords<C, plain, sorts, true>(a.order.part[0], here.at[n], here.stride[n], dwords.next[0][0][n]);
    }
    score_tokens<rows, times>(a, [&](int t, vf (*score)[rows]) __attribute__((always_inline)) {
        after = here;
        if (t + 16 * times < a.tokens) after.find(a, t + 16 * times);
        Soon soon;
        if (!ahead && !a.again) soon = Soon(a.keys, t + 2 * 16 * times, 16 * times, share);
        if constexpr (IN_HALVES<C, sets, rows, terms>) score_halves<C, rows, times>(a, levels, here, soon, a.k_scale + t, score);
        else score_times<C, plain, sets, rows, terms, times>(a, levels, dwords, here, after, soon, a.k_scale + t, score);
        here = after;
    });
}

// The same group by group (see GroupKeys): dwords of rows are made first, and then codes of them as they are wanted.
template <class C, int rows, int terms>
__attribute__((noinline)) void score_groups_of(const QuadScores& a) {
    using F = Fields<C::bits>;
    constexpr int sums = C::sums(terms), times = std::min(4, 16 / (rows * sums));
    const Levels<C> levels(a.tables);
    const GroupKeys& keys = a.order.keys;
    alignas(64) char dwords[GroupKeys::MOST_VECTORS * times * LINE];  // [vector][16 tokens]
    auto make = [&](int n, const char* from, int64_t stride) __attribute__((always_inline)) {
        auto put = [&](int vector, __m512i x) __attribute__((always_inline)) {
            _mm512_store_si512(dwords + (vector * times + n) * LINE, x);
        };
        for (int w = 0; w < keys.windows && C::lines == WORDS; ++w)
            all_dwords_of(from + keys.window[w], stride, [&](int d, __m512i x) __attribute__((always_inline)) { put(LANES * w + d, x); });
        for (int p = 0; p < keys.parts; ++p) {
            const GroupKeys::Part& part = keys.part[p];
            __m512i x[4];
            for (int j = 0; j < 4; ++j) {
                x[j] = (__m512i)load_parts(from + part.at + j * stride, 4 * stride);
                if constexpr (C::lines != WORDS) x[j] = _mm512_shuffle_epi8(x[j], every_part(part.order));
                if constexpr (C::lines != WORDS && F::next > 0) x[j] = _mm512_mask_srli_epi16(x[j], part.further, x[j], F::next);
            }
            dwords_of(x, x);
            for (int d = 0; d < 4; ++d) put(LANES * keys.windows + 4 * p + d, x[d]);
        }
    };
    const int64_t share = round_up(16 * times * a.keys.stride / (keys.dwords / 4), CACHE_LINE);  // while four dwords are taken
    RowPlaces<times> places;
    auto score = [&](int t, vf (*score)[rows]) __attribute__((always_inline)) {
        places.find(a, t, keys.beyond);
        for (int n = 0; n < times; ++n) make(n, places.at[n], places.stride[n]);
        Soon soon;
        if (!a.again) soon = Soon(a.keys, t + 16 * times, 16 * times, share);
        const char *q = a.q.parts, *begin = a.q.begin, *q_scale = a.q.scale;
        const GroupKeys::Dword *dword = keys.dword, *const end = dword + keys.dwords;
        auto lines_of = [&](const GroupKeys::Dword& d, line* k) __attribute__((always_inline)) {
            const char *wide = dwords + times * d.wide, *above = dwords + times * d.next;
            const __m512i shift = _mm512_set1_epi32(d.shift), next_turn = _mm512_set1_epi32(d.next_turn);
            for (int n = 0; n < times; ++n) {
                __m512i x = _mm512_srlv_epi32(_mm512_load_si512(wide + n * LINE), shift);
                if constexpr (F::next > 0) {
                    const __m512i next = _mm512_rorv_epi32(_mm512_load_si512(above + n * LINE), next_turn);
                    x = _mm512_ternarylogic_epi32(x, _mm512_set1_epi8((1 << F::wide) - 1), next, 0xe2);
                }
                if constexpr (C::lines == WORDS) k[n] = levels.word(x);
                else levels.of((line)x, k + n);
            }
        };
        line later[times];  // of the next dword, made before products of this one: a core takes the oldest that it can do
        lines_of(*dword, later);
        for (int i = 0; i < keys.runs; ++i) {
            const GroupKeys::Run& run = keys.run[i];
            vi sum[times][rows][sums];
            for (int r = 0; r < rows; ++r)
                for (int j = 0; j < sums; ++j, begin += 4)
                    for (int n = 0; n < times; ++n) sum[n][r][j] = C::lines == WORDS ? vi{} : (vi)every_dword(begin);
            auto multiply = [&](const line* k) __attribute__((always_inline)) {
                for (int r = 0; r < rows; ++r)
                    for (int j = 0; j < sums; ++j, q += 4) {
                        const __m512i by = every_dword(q);
                        for (int n = 0; n < times; ++n) {
                            vi& own = sum[n][r][j];
                            own = C::lines == WORDS ? dot_words(own, k[n], by) : dot_parts(own, k[n], by);
                        }
                    }
            };
            for (const auto* stop = dword + run.dwords; dword < stop;) {
                soon.ask();
                a.ahead.tick_inside(times);
                for (int pair = 0; pair < 2; ++pair, dword += 2) {
                    line other[times];
                    lines_of(dword[1], other);
                    multiply(later);
                    lines_of(dword[2 * (dword + 2 < end)], later);
                    multiply(other);
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

// Rows of the passes that take C: see Quads::make.
template <class C>
constexpr int LEAST_ROWS = C::lines == WORDS && C::bits < 4 ? 5 : 1;
template <class C, int terms>
constexpr int MOST_ROWS = C::lines == BYTES ? (terms == 1 ? QUAD_ROWS : 4) : C::large || C::look_up == VALUES ? QUAD_ROWS : 6;

void score_quads(const Format& f, int terms, const QuadScores& a) {
    as_coded<false>(f, a.order.words_for(a.q.rows), [&]<class C>(C) {
        as_terms<C>(terms, [&]<int t>(std::integral_constant<int, t>) {
            as_pass<MOST_ROWS<C, t>>(a.q.rows, [&]<int rows>(std::integral_constant<int, rows>) {
                if constexpr (rows >= LEAST_ROWS<C>) {
                    if constexpr (C::bits < 8 && (rows <= 4 || C::large || t == 1))
                        if (a.order.by_group) return score_groups_of<C, rows, t>(a);
                    auto with_sets = [&]<bool plain>() {
                        constexpr bool small_words = C::lines == WORDS && !C::large;
                        constexpr bool one = !small_words || (rows > 4 && C::look_up != VALUES);
                        constexpr bool more = rows <= 4 || t == 1 || (small_words && C::bits >= 4);
                        if constexpr (more && C::bits == 4 && rows <= 6)
                            if (a.order.sets == 4) return score_quads_of<C, plain, 4, rows, t>(a);
                        if constexpr (one)
                            if (!more || a.order.sets == 1) return score_quads_of<C, plain, 1, rows, t>(a);
                        if constexpr (more) score_quads_of<C, plain, 2, rows, t>(a);
                    };
                    if constexpr (Fields<C::bits>::next > 0)
                        if (!a.order.plain) return with_sets.template operator()<false>();
                    with_sets.template operator()<true>();
                }
            });
        });
    });
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
