// Sums of weighted values of four lines of columns, or two: what 64 bytes of four rows become by unpacking (see chunk_values.h,
// order_values.h).
#pragma once
#include "quad_weights.h"

namespace gyrokv {
namespace GYROKV_ISA {

// Weights that lines meet, of one group or of two, whose columns take turns: bytes [row][QUAD_TOKENS words or bytes of each], and [run][UNIT]
// what sums begin with, because of ZERO, and what integers stand for.
template <class C, int sides>
struct LineWeights {
    static constexpr int terms = C::lines == WORDS ? 2 : 1;
    const char* bytes;
    const int32_t* zero[sides];
    const float* factor[sides];

    static inline __attribute__((always_inline)) __m512i both(const void* x, const void* y) {
        int32_t own[2];
        std::memcpy(own, x, 4), std::memcpy(own + 1, y, 4);
        const __m512i first = _mm512_set1_epi32(own[0]);
        return sides == 1 ? first : _mm512_mask_set1_epi32(first, 0xaaaa, own[1]);
    }
    vi begin(int at) const { return (vi)both(zero[0] + at, zero[sides - 1] + at); }
    vf unit(int at) const { return (vf)both(factor[0] + at, factor[sides - 1] + at); }
    // Of tokens step + 16 m + 4 i and the three after it; of words, the first and third or the others.
    inline __attribute__((always_inline)) __m512i four(int row, int step, int i, int m, int term) const {
        typename std::conditional<sides == 1, int32_t, int64_t>::type of;
        const int place = C::lines == WORDS ? word_place<sides>(i, m) : sides * (16 * i + 4 * m);
        std::memcpy(&of, bytes + sides * (terms * (row * QUAD_TOKENS + step)) + place + term * sizeof of, sizeof of);
        if constexpr (sides == 1) return _mm512_set1_epi32(of);
        else return _mm512_set1_epi64(of);
    }
};

// Lines of the bytes of four rows: dword 4 p + i of each becomes part p of line i. count: 4, or 2, of the first ones.
template <int count>
INLINE void unpack_rows(const __m512i* x, __m512i* to) {
    const __m512i low[2] = {_mm512_unpacklo_epi8(x[0], x[1]), _mm512_unpacklo_epi8(x[2], x[3])};
    to[0] = _mm512_unpacklo_epi16(low[0], low[1]), to[1] = _mm512_unpackhi_epi16(low[0], low[1]);
    if constexpr (count == 4) {
        const __m512i high[2] = {_mm512_unpackhi_epi8(x[0], x[1]), _mm512_unpackhi_epi8(x[2], x[3])};
        to[2] = _mm512_unpacklo_epi16(high[0], high[1]), to[3] = _mm512_unpackhi_epi16(high[0], high[1]);
    }
}

// What `Lines` add to the output of `rows` query rows. Lines: `count` of them, of which each `shared` meet the same `weights`; columns(row),
// the 64 bytes of a row; spans(), how many 32 values they have; add(sums of each line, out, rescale), which puts these where they belong.
template <class C, class Lines, int rows>
__attribute__((noinline)) void add_lines(const QuadValues& a, const Lines& lines, float* out, const float* rescale) {
    constexpr bool words = C::lines == WORDS, begins = !words || C::look_up == VALUES;
    constexpr int count = Lines::count, shared = Lines::shared, run = RUN_TOKENS<C>;
    constexpr bool one_by_one = count * rows > 16 && ONE_BY_ONE<C>;  // else four lines more than registers hold
    const Levels<C> levels(a.tables);
    struct Rows {
        const char* at;
        int64_t stride;
    };
    auto rows_of = [&](int step) __attribute__((always_inline)) {
        const bool rest = step >= a.whole;
        return Rows{rest ? a.rest : a.rows + step * a.stride, rest ? a.bytes : a.stride};
    };
    auto take = [&](const char* at, int64_t stride, __m512i* to) __attribute__((always_inline)) {
        const char *second = at + stride, *third = second + stride;
        const __m512i x[4] = {lines.columns(at), lines.columns(second), lines.columns(third), lines.columns(third + stride)};
        unpack_rows<count>(x, to);
    };
    Rows here = rows_of(a.first / 64 * 64);
    __m512i four[count];  // of the next four rows
    take(here.at, here.stride, four);
    vf total[count][rows] = {};
    for (int begin = a.first / run * run; begin < a.stop; begin += run) {
        const int number = begin / run * UNIT;
        vi sum[count][rows];
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < count; ++c) sum[c][r] = begins ? lines.weights[c / shared].begin(number + r) : vi{};
        for (int step = std::max(begin, a.first / 64 * 64); step < std::min(begin + run, a.stop); step += 64) {
            const Rows after = step + 64 < a.stop ? rows_of(step + 64) : here;
            for (int i = 0; i < 4; ++i) {
                a.ahead.tick_inside(2 * lines.spans());
                const Rows next = i < 3 ? Rows{here.at + 4 * here.stride, here.stride} : after;
#pragma GCC unroll 4
                for (int m = 0; m < 4; ++m) {
                    line v[count][Levels<C>::lines];
                    for (int c = 0; c < count && !one_by_one; ++c) levels.of((line)four[c], v[c]);
                    auto add = [&]<int term>(std::integral_constant<int, term>) __attribute__((always_inline)) {
                        if constexpr (one_by_one)
                            for (int c = 0; c < count; ++c) v[c][term] = levels.template one<term>((line)four[c]);
                        for (int r = 0; r < rows; ++r) {
                            __m512i by[count / shared];
                            for (int k = 0; k < count / shared; ++k) by[k] = lines.weights[k].four(r, step, i, m, term);
                            for (int c = 0; c < count; ++c) {
                                const __m512i own = by[c / shared];
                                sum[c][r] = words ? dot_words(sum[c][r], v[c][term], own) : dot_parts(sum[c][r], v[c][term], own);
                            }
                        }
                    };
                    auto take_next = [&]() __attribute__((always_inline)) {
                        if (m < 3) take(here.at + (m + 1) * 16 * here.stride, here.stride, four);
                        else take(next.at, next.stride, four);
                    };
                    add(std::integral_constant<int, 0>{});
                    if (!one_by_one) take_next();  // a core takes the oldest that it can do, which should not be products only
                    if constexpr (Levels<C>::lines > 1) add(std::integral_constant<int, 1>{});
                    if (one_by_one) take_next();
                }
                here = next;
            }
        }
        asm volatile("" ::"r"(total) : "memory");  // until here in memory: registers are for sums
#pragma GCC unroll 5
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < count; ++c)
                total[c][r] = fma(to_float(sum[c][r]), lines.weights[c / shared].unit(number + r), total[c][r]);
    }
    const float by = a.format.factor * (words ? a.tables.word_factor : 1.0f);
#pragma GCC unroll 5
    for (int r = 0; r < rows; ++r, out += a.out_stride) {
        vf made[count];
        for (int c = 0; c < count; ++c) made[c] = total[c][r] * by;
        lines.add(made, out, rescale[r]);
    }
}

INLINE void rescale_and_add(float* to, float rescale, vf x) { store(to, fma(load<vf>(to), splat(rescale), x)); }

}  // namespace GYROKV_ISA
}  // namespace gyrokv
