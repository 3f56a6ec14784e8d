// Sums of weighted values for few query rows from rows of codes side by side (see quads.h): a line is a byte of each of four tokens
// for 16 columns, and products of bytes add up the four.
#pragma once
#include "chunk_values.h"

namespace gyrokv {
namespace GYROKV_ISA {

#if !defined(GYROKV_QUADS)

INLINE int64_t quad_weight_bytes(int) { return 0; }
INLINE int value_ticks(const Quads&, int, int) { return 0; }

#else

INLINE int64_t quad_weight_bytes(int dim) { return dim / 32 * QUAD_ROWS * 2 * QUAD_TOKENS; }

constexpr int MOST_GROUPS = 640 / 32;
alignas(64) constexpr auto COLUMN_BYTES = [] {
    struct { uint8_t at[LINE]; } made = {};
    for (int i = 0; i < LINE; ++i) made.at[i] = uint8_t(i % 4 * PART_BYTES + SORTED[i / 4]);
    return made;
}();

// Weights of up to four rows times the scales of each group: bytes [group][row][term][QUAD_TOKENS], 64 tokens as write_weights lays
// them; what sums begin with, because of ZERO, [group][half][2][4 rows], and what integers stand for [group][half][4 rows].
struct QuadWeights {
    const char* bytes;
    const int32_t* zero;
    const float* factor;
};

// The dword of(0) in all lanes, or of(1) in the last half of them, which are columns of odd bytes.
template <int sides, class Of>
INLINE __m512i spread_sides(Of of) {
    const __m512i x = _mm512_set1_epi32(of(0));
    return sides == 1 ? x : _mm512_mask_set1_epi32(x, 0xff00, of(1));
}

// Parts of four consecutive rows to lines of 16 columns: first those of the even bytes. `shifted`: of codes at the part's shift.
template <class C, bool plain, bool shifted>
struct PartColumns {
    using F = Fields<C::bits>;
    struct Loaded {
        __m512i wide, next;
        template <int s>
        inline __attribute__((always_inline)) line codes() const {
            return codes_of<C::bits, s>(wide, next);
        }
    };
    const Part& part;
    const __m128i shift;
    __m512i gather, turn;
    inline __attribute__((always_inline)) explicit PartColumns(const Part& p) : part(p), shift(_mm_cvtsi32_si128(p.shift)) {
        if constexpr (F::next > 0) gather = _mm512_loadu_si512(p.column_gather), turn = _mm512_loadu_si512(p.column_turn);
    }
    inline __attribute__((always_inline)) Loaded operator()(const char* rows, int64_t step) const {
        Loaded x;
        x.wide = (__m512i)load_parts(rows + part.wide, step);
        x.wide = _mm512_permutexvar_epi8(_mm512_load_si512(COLUMN_BYTES.at), x.wide);
        if constexpr (shifted) x.wide = _mm512_srl_epi16(x.wide, shift);
        if constexpr (F::next > 0) {
            x.next = _mm512_rorv_epi32(_mm512_permutexvar_epi8(gather, load_next<plain>(part, rows, step)), turn);
        }
        return x;
    }
};

// Two lines of columns: of one part, or of two with the same scales.
struct TwoLines {
    int from, other;
};

// What they add to the output of `rows` query rows. code: of the first line, if they are of one part; the other is the next; or -1.
template <class C, int code, bool plain, int sides, int rows, int terms>
__attribute__((noinline)) void add_lines(const QuadValues& a, const TwoLines& two, const QuadWeights& w, float* out, const float* rescale) {
    constexpr bool words = C::lines == WORDS;
    constexpr int run = RUN_TOKENS<C>, sums = C::sums(terms);
    const Part &part = a.order.part[two.from], &other = a.order.part[two.other];
    const Levels<C> levels(a.tables);
    constexpr bool apart = code < 0;
    constexpr bool shifted = apart && Fields<C::bits>::steps > 1;
    const PartColumns<C, plain, shifted> columns[2] = {PartColumns<C, plain, shifted>(part), PartColumns<C, plain, shifted>(other)};
    vf total[2][rows] = {};
    const char* weights[sides];
    for (int side = 0; side < sides; ++side) weights[side] = w.bytes + part.group[side] * (rows * terms * QUAD_TOKENS);
    for (int begin = a.first / run * run; begin < a.stop; begin += run) {
        const int number = begin / run;
        vi sum[2][rows][sums];
        for (int r = 0; r < rows; ++r)
            for (int i = 0; i < sums; ++i) {
                auto zero = [&](int side) { return w.zero[(part.group[side] * MOST_RUNS + number) * 8 + i * 4 + r]; };
                sum[0][r][i] = sum[1][r][i] = words ? vi{} : (vi)spread_sides<sides>(zero);
            }
        for (int step = std::max(begin, a.first / 64 * 64); step < std::min(begin + run, a.stop); step += 64) {
            const bool rest = step + 64 > a.count;
            const char* from = rest ? a.rest : a.rows + step * a.stride;
            const int64_t stride = rest ? a.bytes : a.stride;
            for (int i = 0; i < 4; ++i, from += 4 * stride) {
                a.ahead.tick_inside(4);
#pragma GCC unroll 4
                for (int m = 0; m < 4; ++m) {
                    const char* at = from + m * 16 * stride;
                    const int place = words ? 2 * step + word_place<1>(i, m) : step + 16 * i + 4 * m;
                    line v[2][Levels<C>::lines];
                    const auto x = columns[0](at, stride);
                    levels.of(x.template codes<apart ? 0 : code>(), v[0]);
                    if constexpr (apart)
                        levels.of(columns[1](at, stride).template codes<0>(), v[1]);
                    else
                        levels.of(x.template codes<code + 1>(), v[1]);
                    auto weight = [&](int r, int term) __attribute__((always_inline)) {
                        return spread_sides<sides>([&](int side) __attribute__((always_inline)) {
                            int32_t four;
                            const int64_t own = words ? 2 * r * QUAD_TOKENS + 4 * term : (r * terms + term) * QUAD_TOKENS;
                            std::memcpy(&four, weights[side] + place + own, 4);
                            return four;
                        });
                    };
                    for (int r = 0; r < rows; ++r)
                        for (int i = 0; i < terms; ++i) {
                            const __m512i by = weight(r, i);
                            for (int c = 0; c < 2; ++c) {
                                if constexpr (words) sum[c][r][0] = dot_words(sum[c][r][0], v[c][i], by);
                                else sum[c][r][i] = dot_parts(sum[c][r][i], v[c][0], by);
                            }
                        }
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
            const vf factor = (vf)spread_sides<sides>([&](int side) {
                int32_t bits;
                std::memcpy(&bits, w.factor + (part.group[side] * MOST_RUNS + number) * 4 + r, 4);
                return bits;
            });
            for (int c = 0; c < 2; ++c) {
                vi made = sum[c][r][0];
                if constexpr (sums == 2) made = (made << 8) + sum[c][r][1];
                total[c][r] = fma(to_float(made), factor, total[c][r]);
            }
        }
    }
    const float by = a.format.factor * (words ? a.tables.word_factor : 1.0f);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r, out += a.out_stride) {
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
            if (apart && c && two.other == two.from) continue;  // there was one part only
            const __m512 made = (__m512)(total[c][r] * by);
            const __mmask8* words = apart && c ? other.words : part.words;
            float* to = out + a.order.first[apart ? (c ? two.other : two.from) : two.from * a.order.lines + code + c];
            auto add = [&](float* at, __mmask8 mask, __m256 x) {
                _mm256_mask_storeu_ps(at, mask, _mm256_fmadd_ps(_mm256_maskz_loadu_ps(mask, at), _mm256_set1_ps(rescale[r]), x));
            };
            add(to, words[0], _mm512_castps512_ps256(made));
            add(to + a.format.dim / 2, words[1], _mm512_extractf32x8_ps(made, 1));
        }
    }
}

// out [row] = out * rescale + weights * values for `rows` (1, 2 or 4) query rows.
template <class C, int rows, int terms>
INLINE void add_quads_of(const QuadValues& a, const float* weights, float* out, const float* rescale) {
    const Format& f = a.format;
    if constexpr (TAKES_CHUNKS<C, terms>)
        if (a.order.chunks) return add_chunks_of<C, rows, terms>(a, weights, out, rescale);
    const int groups = f.dim / f.group;
    alignas(16) int32_t zero[MOST_GROUPS * MOST_RUNS * 8];
    alignas(16) float factor[MOST_GROUPS * MOST_RUNS * 4];
    constexpr int length = RUN_TOKENS<C>;
    for (int g = 0; g < groups; ++g)
        for (int t = a.first / length * length; t < a.stop; t += length) {
            const int at = MOST_RUNS * g + t / length;
            spread<C, terms, 1>(a, rows, std::min(length, a.tokens - t), weights + t,
                                {{a.scales + int64_t(g) * a.tokens + t}, a.spread + g * (rows * terms * QUAD_TOKENS) +
                                 (C::lines == WORDS ? 2 : 1) * t, {zero + 8 * at}, {factor + 4 * at}});
        }
    const QuadWeights w = {a.spread, zero, factor};
    const Quads& order = a.order;
    auto run = [&]<int code>(std::integral_constant<int, code>, const TwoLines& two) __attribute__((always_inline)) {
        const int* g = order.part[two.from].group;
        auto lines = [&]<bool plain>(std::bool_constant<plain>) __attribute__((always_inline)) {
            if (g[0] == g[1]) return add_lines<C, code, plain, 1, rows, terms>(a, two, w, out, rescale);
            add_lines<C, code, plain, 2, rows, terms>(a, two, w, out, rescale);
        };
        if constexpr (Fields<C::bits>::next > 0)
            if (!order.plain) return lines(std::false_type{});
        lines(std::true_type{});
    };
    constexpr int steps = Fields<C::bits>::steps;
    for (int p = 0; p < order.parts; ++p) {
        if constexpr (steps > 1)
            if (order.lines > 1) {
                run(std::integral_constant<int, 0>{}, {p, p});
                if constexpr (steps > 2) run(std::integral_constant<int, 2>{}, {p, p});
                continue;
            }
        const bool both = p + 1 < order.parts && !order.part[p].last;
        run(std::integral_constant<int, -1>{}, {p, p + both});
        p += both;
    }
}

inline void add_quads(const QuadValues& a, int rows) {
    as_coded<true>(a.format, a.order, [&]<class C>(C) {
        const float *weights = a.weights, *rescale = a.rescale;
        float* out = a.out;
        while (rows) {
            const int pass = quad_pass(rows);
            as_pass(pass, [&]<int n>(std::integral_constant<int, n>) {
                as_terms<C>(a.terms, [&]<int terms>(std::integral_constant<int, terms>) {
                    add_quads_of<C, n, terms>(a, weights, out, rescale);
                });
            });
            rows -= pass, weights += pass * a.weight_stride, out += pass * a.out_stride, rescale += pass;
        }
    });
}
INLINE int value_ticks(const Quads& order, int rows, int tokens) {
    int passes = 0;
    for (; rows; ++passes) rows -= quad_pass(rows);
    if (order.chunks) return passes * order.chunks * order.steps * tokens / 4;
    return passes * tokens / 4 * (order.lines > 1 ? order.parts * order.lines / 2 : (order.parts + 1) / 2);
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
