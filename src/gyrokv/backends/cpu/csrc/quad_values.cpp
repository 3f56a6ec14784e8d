// Sums of weighted values from rows of codes side by side: see quad_values.h.
#include "chunk_values.h"

namespace gyrokv {
namespace GYROKV_ISA {

constexpr int MOST_GROUPS = 640 / 32;
alignas(64) constexpr auto COLUMN_BYTES = [] {
    struct { uint8_t at[LINE]; } made = {};
    for (int i = 0; i < LINE; ++i) made.at[i] = uint8_t(i % 4 * PART_BYTES + SORTED[i / 4]);
    return made;
}();

// Weights of up to four rows times the scales of each group: bytes [group][row][term][QUAD_TOKENS], 64 tokens as weight_bytes lays
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

// Two lines of columns, and where they are added: of a part, codes `code` and the next one. First columns of the even bytes. Of four codes
// of a byte, columns for the first two are kept for the others.
template <class C, int code, bool plain>
struct PartColumns {
    using F = Fields<C::bits>;
    const QuadValues& a;
    const Levels<C> levels;
    const Part& part;
    const int number;
    static constexpr int fields = F::next > 0 ? 2 : 1, count = 2;
    char* const kept;  // [four tokens][field]
    __m512i gather, shift;
    PartColumns(const QuadValues& a, int p, char* kept) : a(a), levels(a.tables), part(a.order.part[p]), number(p), kept(kept) {
        if constexpr (F::next > 0) gather = _mm512_load_si512(part.column_gather), shift = _mm512_loadu_si512(part.column_shift);
    }
    int group(int side) const { return part.group[side]; }
    // Of four tokens from `token` on.
    inline __attribute__((always_inline)) void codes(const char* rows, int64_t stride, int token, line* made) const {
        __m512i wide, next = {};
        char* at = kept + token / 4 * fields * LINE;
        if constexpr (code == 0) {
            wide = _mm512_permutexvar_epi8(_mm512_load_si512(COLUMN_BYTES.at), (__m512i)load_parts(rows + part.wide, stride));
            if constexpr (F::next > 0) {
                const __m512i x = (__m512i)load_parts(rows + part.next, stride);
                next = _mm512_srlv_epi32(_mm512_permutexvar_epi8(gather, x), shift);
            }
            if constexpr (F::steps > 2) _mm512_store_si512(at, wide);
            if constexpr (F::steps > 2 && F::next > 0) _mm512_store_si512(at + LINE, next);
        } else {
            wide = _mm512_load_si512(at);
            if constexpr (F::next > 0) next = _mm512_load_si512(at + LINE);
        }
        made[0] = codes_of<C::bits, code>(wide, next);
        made[1] = codes_of<C::bits, code + 1>(wide, next);
    }
    // out = out * rescale + sums of line c
    void add(int c, float* out, float rescale, __m512 sums) const {
        float* to = out + a.order.first(number, code + c);
        auto one = [&](float* at, __m256 x) {
            _mm256_storeu_ps(at, _mm256_fmadd_ps(_mm256_loadu_ps(at), _mm256_set1_ps(rescale), x));
        };
        one(to, _mm512_castps512_ps256(sums)), one(to + a.format.dim / 2, _mm512_extractf32x8_ps(sums, 1));
    }
};

// How windows are read (see GroupColumns): of rows that are shorter; one for both lines; one for each of the wide field, or of both; one
// for each, and the next field as a whole.
enum Windows : int { SHORT, TOGETHER, WIDE_APART, APART, NEXT_WHOLE };

// The same of `count` lines of a group from number p on, two by two.
template <class C, int windows, int count_>
struct WindowColumns {
    static constexpr int count = count_;
    using F = Fields<C::bits>;
    using Two = GroupColumns::Lines;
    const QuadValues& a;
    const Levels<C> levels;
    const Two* const all;
    const __mmask32 here;  // bytes of a window within a row
    WindowColumns(const QuadValues& a, int p, char*)
        : a(a), levels(a.tables), all(a.order.columns.line + p), here(uint32_t((uint64_t(1) << std::min<int64_t>(a.bytes, 32)) - 1)) {}
    int group(int) const { return all[0].group; }
    struct Window {
        __m512i x[2];  // of two rows each
    };
    inline __attribute__((always_inline)) Window window(const char* rows, int64_t stride) const {
        auto pair = [&](const char* at) __attribute__((always_inline)) {
            auto one = [&](const char* row) __attribute__((always_inline)) {
                return windows == SHORT ? _mm256_maskz_loadu_epi8(here, row) : _mm256_loadu_si256((const __m256i*)row);
            };
            return _mm512_inserti64x4(_mm512_castsi256_si512(one(at)), one(at + stride), 1);
        };
        return {{pair(rows), pair(rows + 2 * stride)}};
    }
    static inline __attribute__((always_inline)) __m512i ordered(const Window& from, const uint8_t* order) {
        return _mm512_permutex2var_epi8(from.x[0], _mm512_load_si512(order), from.x[1]);
    }
    // The other field's bits above codes of the wide one.
    static inline __attribute__((always_inline)) __m512i join(__m512i wide, __m512i next, const int32_t* turn) {
        const __m512i low = _mm512_set1_epi8((1 << F::wide) - 1);
        return _mm512_ternarylogic_epi32(low, wide, _mm512_rorv_epi32(next, _mm512_loadu_si512(turn)), 0xca);
    }
    inline __attribute__((always_inline)) void codes(const char* rows, int64_t stride, int, line* made) const {
#pragma GCC unroll 2
        for (int i = 0; i < count; i += 2) two_of(all + i, rows, stride, made + i);
    }
    inline __attribute__((always_inline)) void two_of(const Two* two, const char* rows, int64_t stride, line* made) const {
        const Window first = window(rows + two[0].at, stride);
        const Window other = windows >= WIDE_APART ? window(rows + two[1].at, stride) : first;
        __m512i x[2] = {_mm512_srlv_epi32(ordered(first, two[0].order), _mm512_loadu_si512(two[0].shift)),
                        _mm512_srlv_epi32(ordered(other, two[1].order), _mm512_loadu_si512(two[1].shift))};
        if constexpr (F::next > 0 && windows == NEXT_WHOLE) {
            __m512i row[4];
            for (int t = 0; t < 4; ++t) row[t] = _mm512_loadu_si512(rows + t * stride + two[0].next_at);
            for (int c = 0; c < 2; ++c) {
                const __m512i order = _mm512_load_si512(two[c].next_order);
                const __m512i low = _mm512_permutex2var_epi8(row[0], order, row[1]), high = _mm512_permutex2var_epi8(row[2], order, row[3]);
                x[c] = join(x[c], _mm512_mask_blend_epi16(0xaaaaaaaa, low, high), two[c].next_turn);
            }
        } else if constexpr (F::next > 0) {
            const Window first_next = windows == SHORT ? first : window(rows + two[0].next_at, stride);
            const Window other_next = windows == APART ? window(rows + two[1].next_at, stride) : first_next;
            x[0] = join(x[0], ordered(first_next, two[0].next_order), two[0].next_turn);
            x[1] = join(x[1], ordered(other_next, two[1].next_order), two[1].next_turn);
        }
        for (int c = 0; c < 2; ++c) made[c] = (line)x[c];
    }
    void add(int c, float* out, float rescale, __m512 sums) const {
        auto one = [&](int first, __m128 x) {
            if (first >= 0) _mm_storeu_ps(out + first, _mm_fmadd_ps(_mm_loadu_ps(out + first), _mm_set1_ps(rescale), x));
        };
        one(all[c].first[0], _mm512_castps512_ps128(sums)), one(all[c].first[1], _mm512_extractf32x4_ps(sums, 1));
        one(all[c].first[2], _mm512_extractf32x4_ps(sums, 2)), one(all[c].first[3], _mm512_extractf32x4_ps(sums, 3));
    }
};

// What lines of columns, two or four, add to the output of `rows` query rows; sides: groups of a line. p: number of the part, or of the
// first line, as Columns has them; kept: room for what Columns keeps.
template <class C, class Columns, int sides, int rows, int terms>
__attribute__((noinline)) void add_lines(const QuadValues& a, int p, const QuadWeights& w, char* kept, float* out, const float* rescale) {
    constexpr bool words = C::lines == WORDS;
    constexpr int run = RUN_TOKENS<C>, sums = C::sums(terms), count = Columns::count;
    constexpr bool one_by_one = count > 2 && ONE_BY_ONE<C>;  // else four lines more than registers hold
    const Columns columns(a, p, kept);
    vf total[count][rows] = {};
    const char* weights[sides];
    for (int side = 0; side < sides; ++side) weights[side] = w.bytes + columns.group(side) * (rows * terms * QUAD_TOKENS);
    for (int begin = a.first / run * run; begin < a.stop; begin += run) {
        const int number = begin / run;
        vi sum[count][rows][sums];
        for (int r = 0; r < rows; ++r)
            for (int i = 0; i < sums; ++i) {
                auto zero = [&](int side) { return w.zero[(columns.group(side) * MOST_RUNS + number) * 8 + i * 4 + r]; };
                for (int c = 0; c < count; ++c) sum[c][r][i] = words && C::look_up != VALUES ? vi{} : (vi)spread_sides<sides>(zero);
            }
        for (int step = std::max(begin, a.first / 64 * 64); step < std::min(begin + run, a.stop); step += 64) {
            const bool rest = step + 64 > a.count;
            const char* from = rest ? a.rest : a.rows + step * a.stride;
            const int64_t stride = rest ? a.bytes : a.stride;
            for (int i = 0; i < 4; ++i, from += 4 * stride) {
#pragma GCC unroll 4
                for (int m = 0; m < 4; ++m) {
                    if (m % (8 / count) == 0) a.ahead.tick_inside(4);  // so often for each two lines
                    const int place = words ? 2 * step + word_place<1>(i, m) : step + 16 * i + 4 * m;
                    line code[count], v[count][Levels<C>::lines];
                    columns.codes(from + m * 16 * stride, stride, step + 16 * i + 4 * m, code);
                    for (int c = 0; c < count && !one_by_one; ++c) columns.levels.of(code[c], v[c]);
                    auto weight = [&](int r, int term) __attribute__((always_inline)) {
                        return spread_sides<sides>([&](int side) __attribute__((always_inline)) {
                            int32_t four;
                            const int64_t own = words ? 2 * r * QUAD_TOKENS + 4 * term : (r * terms + term) * QUAD_TOKENS;
                            std::memcpy(&four, weights[side] + place + own, 4);
                            return four;
                        });
                    };
                    auto add = [&]<int i>(std::integral_constant<int, i>) __attribute__((always_inline)) {
                        if constexpr (one_by_one)
                            for (int c = 0; c < count; ++c) v[c][i] = columns.levels.template one<i>(code[c]);
                        for (int r = 0; r < rows; ++r) {
                            const __m512i by = weight(r, i);
                            for (int c = 0; c < count; ++c) {
                                if constexpr (words) sum[c][r][0] = dot_words(sum[c][r][0], v[c][i], by);
                                else sum[c][r][i] = dot_parts(sum[c][r][i], v[c][0], by);
                            }
                        }
                    };
                    add(std::integral_constant<int, 0>{});
                    if constexpr (terms > 1) add(std::integral_constant<int, 1>{});
                }
            }
        }
        if (count > 2) asm volatile("" ::"r"(total) : "memory");  // until here in memory: registers are for sums
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
            const vf factor = (vf)spread_sides<sides>([&](int side) {
                int32_t bits;
                std::memcpy(&bits, w.factor + (columns.group(side) * MOST_RUNS + number) * 4 + r, 4);
                return bits;
            });
            for (int c = 0; c < count; ++c) {
                vi made = sum[c][r][0];
                if constexpr (sums == 2) made = (made << 8) + sum[c][r][1];
                total[c][r] = fma(to_float(made), factor, total[c][r]);
            }
        }
    }
    const float by = a.format.factor * (words ? a.tables.word_factor : 1.0f);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r, out += a.out_stride)
        for (int c = 0; c < count; ++c) columns.add(c, out, rescale[r], (__m512)(total[c][r] * by));
}

// out [row] = out * rescale + weights * values for `rows` query rows.
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
    alignas(LINE) char kept[QUAD_TOKENS / 4 * 2 * LINE];
    const bool fours = C::lines == WORDS && order.columns.fours;
    for (int p = 0; order.by_group && p < order.columns.lines; p += fours ? 4 : 2) {
        auto run = [&]<int windows>() __attribute__((always_inline)) {
            if constexpr (C::lines == WORDS && windows != SHORT)  // which has fewer than 64 values
                if (fours) return add_lines<C, WindowColumns<C, windows, 4>, 1, rows, terms>(a, p, w, nullptr, out, rescale);
            add_lines<C, WindowColumns<C, windows, 2>, 1, rows, terms>(a, p, w, nullptr, out, rescale);
        };
        constexpr bool next = Fields<C::bits>::next > 0;
        if (C::bits < 8 && a.bytes < GroupColumns::WINDOW) run.template operator()<C::bits < 8 ? SHORT : TOGETHER>();
        else if (next && order.columns.next_whole) run.template operator()<next ? NEXT_WHOLE : TOGETHER>();
        else if (order.columns.together) run.template operator()<TOGETHER>();
        else if (next && order.columns.next_together) run.template operator()<next ? WIDE_APART : TOGETHER>();
        else run.template operator()<APART>();
    }
    if constexpr (Fields<C::bits>::steps > 1)
        for (int p = 0; !order.by_group && p < order.parts; ++p) {
            auto run = [&]<int code, bool plain>() __attribute__((always_inline)) {
                const int* g = order.part[p].group;
                using Columns = PartColumns<C, code, plain>;
                if (g[0] == g[1]) return add_lines<C, Columns, 1, rows, terms>(a, p, w, kept, out, rescale);
                add_lines<C, Columns, 2, rows, terms>(a, p, w, kept, out, rescale);
            };
            auto codes = [&]<bool plain>() __attribute__((always_inline)) {
                run.template operator()<0, plain>();
                if constexpr (Fields<C::bits>::steps > 2) run.template operator()<2, plain>();
            };
            if constexpr (Fields<C::bits>::next > 0)
                if (!order.plain) {
                    codes.template operator()<false>();
                    continue;
                }
            codes.template operator()<true>();
        }
}

void add_quads(const QuadValues& a, int rows) {
    as_coded<true>(a.format, a.order.words, [&]<class C>(C) {
        const float *weights = a.weights, *rescale = a.rescale;
        float* out = a.out;
        while (rows > 0) {
            const int pass = quad_pass(rows, a.order.most_rows);
            constexpr int most = C::lines == WORDS && C::look_up != VALUES ? VALUE_ROWS : 4;
            as_pass<most>(pass, [&]<int n>(std::integral_constant<int, n>) {
                as_terms<C>(a.terms, [&]<int terms>(std::integral_constant<int, terms>) {
                    if constexpr (n == VALUE_ROWS) add_chunks_of<C, n, terms>(a, weights, out, rescale);
                    else add_quads_of<C, n, terms>(a, weights, out, rescale);
                });
            });
            rows -= pass, weights += pass * a.weight_stride, out += pass * a.out_stride, rescale += pass;
        }
    });
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
