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

constexpr int MOST_GROUPS = 640 / 32, MOST_RUNS = QUAD_TOKENS / WORD_RUN;
template <class C>
constexpr int RUN_TOKENS = C::large ? WORD_RUN : QUAD_HALF;
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

// What `count` parts with the same scales, from `from` on, add to the output of `rows` query rows. code: of the first of two lines of
// a part, the other is the next; or -1 where a part is one line. Where the count is odd, the last one is there twice.
template <class C, int code, bool plain, int sides, int rows, int terms, int count>
__attribute__((noinline)) void add_lines(const QuadValues& a, int from, int there, const QuadWeights& w, float* out, const float* rescale) {
    constexpr bool words = C::lines == WORDS;
    constexpr int run = RUN_TOKENS<C>, sums = C::sums(terms);
    const Part& part = a.order.part[from];
    const Levels<C> levels(a.tables);
    constexpr bool apart = code < 0;
    constexpr bool shifted = apart && Fields<C::bits>::steps > 1;
    constexpr int per_part = apart ? 1 : 2, lines = count * per_part;
    using Columns = PartColumns<C, plain, shifted>;
    const auto columns = [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
        return std::array<Columns, count>{Columns(a.order.part[from + std::min(i, there - 1)])...};
    }(std::make_integer_sequence<int, count>{});
    vf total[lines][rows] = {};
    const char* weights[sides];
    for (int side = 0; side < sides; ++side) weights[side] = w.bytes + part.group[side] * (rows * terms * QUAD_TOKENS);
    for (int begin = a.first / run * run; begin < a.stop; begin += run) {
        const int number = begin / run;
        vi sum[lines][rows][sums];
        for (int r = 0; r < rows; ++r)
            for (int i = 0; i < sums; ++i) {
                auto zero = [&](int side) { return w.zero[(part.group[side] * MOST_RUNS + number) * 8 + i * 4 + r]; };
                for (int c = 0; c < lines; ++c) sum[c][r][i] = words ? vi{} : (vi)spread_sides<sides>(zero);
            }
        for (int step = std::max(begin, a.first / 64 * 64); step < std::min(begin + run, a.stop); step += 64) {
            const bool rest = step + 64 > a.count;
            const char* row = rest ? a.rest : a.rows + step * a.stride;
            const int64_t stride = rest ? a.bytes : a.stride;
            for (int i = 0; i < 4; ++i, row += 4 * stride) {
                a.ahead.tick_inside(2 * lines);
#pragma GCC unroll 4
                for (int m = 0; m < 4; ++m) {
                    const char* at = row + m * 16 * stride;
                    const int place = words ? 2 * step + word_place(i, m) : step + 16 * i + 4 * m;
                    line v[lines][Levels<C>::lines];
#pragma GCC unroll 4
                    for (int c = 0; c < count; ++c) {
                        const auto x = columns[c](at, stride);
                        levels.of(x.template codes<apart ? 0 : code>(), v[c * per_part]);
                        if constexpr (!apart) levels.of(x.template codes<code + 1>(), v[2 * c + 1]);
                    }
                    auto weight = [&](int r, int term) __attribute__((always_inline)) {
                        return spread_sides<sides>([&](int side) __attribute__((always_inline)) {
                            int32_t four;
                            const int64_t from = words ? 2 * r * QUAD_TOKENS + 4 * term : (r * terms + term) * QUAD_TOKENS;
                            std::memcpy(&four, weights[side] + place + from, 4);
                            return four;
                        });
                    };
                    for (int r = 0; r < rows; ++r)
                        for (int i = 0; i < terms; ++i) {
                            const __m512i by = weight(r, i);
                            for (int c = 0; c < lines; ++c) {
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
            for (int c = 0; c < lines; ++c) {
                vi made = sum[c][r][0];
                if constexpr (sums == 2) made = (made << 8) + sum[c][r][1];
                total[c][r] = fma(to_float(made), factor, total[c][r]);
            }
        }
    }
    const float by = a.format.factor * (words ? a.tables.word_factor : 1.0f);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r, out += a.out_stride) {
#pragma GCC unroll 4
        for (int c = 0; c < lines; ++c) {
            const int place = c / per_part;
            if (place >= there) continue;
            const __m512 made = (__m512)(total[c][r] * by);
            const __mmask8* words = a.order.part[from + place].words;
            float* to = out + a.order.first[apart ? from + place : (from + place) * a.order.lines + code + c % per_part];
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
    if constexpr (C::sums(terms) == 1 && (C::look_up == VALUES || C::bits == 4))
        if (a.order.chunks) return add_chunks_of<C, rows, terms>(a, weights, out, rescale);
    const int groups = f.dim / f.group;
    alignas(16) int32_t zero[MOST_GROUPS * MOST_RUNS * 8];
    alignas(16) float factor[MOST_GROUPS * MOST_RUNS * 4];
    constexpr int length = RUN_TOKENS<C>;
    for (int g = 0; g < groups; ++g)
        for (int t = a.first / length * length; t < a.stop; t += length) {
            const int at = MOST_RUNS * g + t / length;
            spread<C, terms, 1>(a, rows, std::min(length, a.tokens - t), weights + t, a.scales + int64_t(g) * a.tokens + t,
                                a.spread + g * (rows * terms * QUAD_TOKENS) + (C::lines == WORDS ? 2 : 1) * t, zero + 8 * at, factor + 4 * at);
        }
    const QuadWeights w = {a.spread, zero, factor};
    const Quads& order = a.order;
    constexpr int most = C::sums(terms) == 1 ? 4 : 2;  // lines at once: as many sums as registers hold
    // those of up to `most` lines from part `from` on, and how many parts they are
    auto run = [&]<int code>(std::integral_constant<int, code>, int from) __attribute__((always_inline)) {
        constexpr int per_part = code < 0 ? 1 : 2;
        int there = 1;
        while (there < most / per_part && from + there < order.parts && !order.part[from + there - 1].last) ++there;
        const int* g = order.part[from].group;
        auto lines = [&]<bool plain>(std::bool_constant<plain>) __attribute__((always_inline)) {
            auto with = [&]<int count>(std::integral_constant<int, count>) __attribute__((always_inline)) {
                if (g[0] == g[1]) return add_lines<C, code, plain, 1, rows, terms, count>(a, from, there, w, out, rescale);
                add_lines<C, code, plain, 2, rows, terms, count>(a, from, there, w, out, rescale);
            };
            constexpr int few = 2 / per_part;
            if constexpr (most > 2)
                if (there > few) return with(std::integral_constant<int, 2 * few>{});
            with(std::integral_constant<int, few>{});
        };
        bool shuffled = false;
        if constexpr (Fields<C::bits>::next > 0)
            if (!order.plain) shuffled = true, lines(std::false_type{});
        if (!shuffled) lines(std::true_type{});
        return there;
    };
    constexpr int steps = Fields<C::bits>::steps;
    for (int p = 0; p < order.parts;) {
        int taken = 0;
        if constexpr (steps > 1)
            if (order.lines > 1) {
                taken = run(std::integral_constant<int, 0>{}, p);
                if constexpr (steps > 2) run(std::integral_constant<int, 2>{}, p);
            }
        if (!taken) taken = run(std::integral_constant<int, -1>{}, p);
        p += taken;
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
