// Scores of few query rows from rows of K that are no codes, as they are, where there is no matrix unit: a vector holds values
// of one token. 4 tokens take up to 5 query rows at a time, and the sums of four rows are added up together.
#pragma once
#include "float8.h"
#include "float_scores.h"
#include "quad_scores.h"
#include "turned_scores.h"

namespace gyrokv {
namespace GYROKV_ISA {

#if defined(GYROKV_QUADS)
#define GYROKV_DENSE 1

INLINE bool takes_dense(const Format& f, int rows) { return f.kind != CODES && rows <= MOST_DENSE_ROWS; }

// Bytes of K to lines of the kind that q has.
template <int kind>
struct DenseLines {
    static constexpr int bytes = kind == F16 ? LINE / 2 : LINE, lines = kind == FP8_E4M3 ? 2 : 1;
    inline __attribute__((always_inline)) void operator()(__m512i x, line* to) const {
        to[0] = kind == F16 ? (line)_mm512_cvtph_ps(_mm512_castsi512_si256(x)) : (line)x;
    }
    inline __attribute__((always_inline)) line half(__m512i x) const { return (line)x; }
};
template <>
struct DenseLines<FP8_E4M3> : Float8 {
    static constexpr int bytes = LINE, lines = 2;
};

// Four sums per part and row, to [part][row].
template <int rows>
INLINE vf add_parts(const vf* x) {
    using vq = vec<uint64_t>;
    auto row = [&](int r) { return r < rows ? x[r] : vf{}; };
    const vf a = zip<0>(row(0), row(1)) + zip<1>(row(0), row(1)), b = zip<0>(row(2), row(3)) + zip<1>(row(2), row(3));
    return (vf)zip<0>((vq)a, (vq)b) + (vf)zip<1>((vq)a, (vq)b);
}

// Products of 4 tokens with q, summed up: [token][row], four rows in a vector.
template <int kind, int rows, int terms>
INLINE void score_four(const DenseScores& a, const DenseLines<kind>& lines, const char* at, int64_t step, const char* q, vf* to) {
    using Lines = DenseLines<kind>;
    constexpr bool bfloat = kind == BF16 || kind == FP8_E4M3;
    vf sum[4][rows] = {};
    auto multiply = [&]<int count>(std::integral_constant<int, count>, auto load_bytes) __attribute__((always_inline)) {
        line k[4][Lines::lines];
        for (int i = 0; i < 4; ++i) {
            if constexpr (count < Lines::lines)
                k[i][0] = lines.half(load_bytes(at + i * step));
            else
                lines(load_bytes(at + i * step), k[i]);
        }
        for (int l = 0; l < count; ++l, q += LINE)
            for (int r = 0; r < rows; ++r)
                for (int term = 0; term < terms; ++term) {
                    const line x = load<line>(q + (r * terms + term) * a.q_stride);
                    for (int i = 0; i < 4; ++i) {
                        if constexpr (bfloat)
                            sum[i][r] = (vf)_mm512_dpbf16_ps((__m512)sum[i][r], (__m512bh)k[i][l], (__m512bh)x);
                        else
                            sum[i][r] = fma((vf)k[i][l], (vf)x, sum[i][r]);
                    }
                }
    };
    constexpr std::integral_constant<int, Lines::lines> all;
    constexpr std::integral_constant<int, 1> one;
    int left = a.keys.bytes;
    for (; left >= Lines::bytes; left -= Lines::bytes, at += Lines::bytes) {
        a.ahead.tick_inside(4);
        multiply(all, [](const char* from) {
            if constexpr (Lines::bytes == LINE) return _mm512_loadu_si512(from);
            return _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from));
        });
    }
    auto some = [mask = (__mmask64(1) << left) - 1](const char* from) { return _mm512_maskz_loadu_epi8(mask, from); };
    if (left > LINE / 2)
        multiply(all, some);
    else if (left)
        multiply(one, some);
    auto parts = [](vf x, vf y, auto low, auto high) __attribute__((always_inline)) {
        return (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)y, low()) + (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)y, high());
    };
    auto of_rows = [&](auto first) __attribute__((always_inline)) {
        constexpr int here = std::min(rows - first(), 4);
        auto two = [&](int i) __attribute__((always_inline)) {
            return parts(add_parts<here>(sum[i] + first()), add_parts<here>(sum[i + 1] + first()), std::integral_constant<int, 0x44>{},
                         std::integral_constant<int, 0xee>{});
        };
        return parts(two(0), two(2), std::integral_constant<int, 0x88>{}, std::integral_constant<int, 0xdd>{});
    };
    to[0] = of_rows(std::integral_constant<int, 0>{});
    if constexpr (rows > 4) to[1] = of_rows(std::integral_constant<int, 4>{});
}

// Scores of 16 tokens: to[row].
template <int kind, int rows, int terms>
__attribute__((noinline)) void score_sixteen(const DenseScores& a, const char* at, int64_t stride, const char* q, vf* to) {
    const DenseLines<kind> lines;
    vf x[4][2];
    for (int j = 0; j < 4; ++j)
        score_four<kind, rows, terms>(a, lines, at + 4 * j * stride, stride, q, x[j]);
    for (int i = 0; 4 * i < rows; ++i, to += 4) {
        const vf even[2] = {unzip<0>(x[0][i], x[1][i]), unzip<0>(x[2][i], x[3][i])};
        const vf odd[2] = {unzip<1>(x[0][i], x[1][i]), unzip<1>(x[2][i], x[3][i])};
        to[0] = unzip<0>(even[0], even[1]), to[1] = unzip<0>(odd[0], odd[1]);
        to[2] = unzip<1>(even[0], even[1]), to[3] = unzip<1>(odd[0], odd[1]);
    }
}

// Scores of `rows` rows whose q has `terms` parts.
template <int kind, int terms>
inline void score_dense_of(const DenseScores& a, int rows) {
    constexpr int soon = kind == FP8_E4M3 ? 2 : DENSE_ROWS;  // query rows; of more, products take longer than rows
    for (int r = 0; r < rows; ++r) store(a.most + r * LANES, splat(-__builtin_inff()));
    for (int t = 0; t < a.tokens; t += 16) {
        const auto place = a.keys.place(t);
        if (rows <= soon) Soon(a.keys, t + 32, 16, 16 * a.keys.stride).ask();
        for (int r = 0, n; r < rows; r += n) {
            n = dense_pass(rows - r, DENSE_ROWS);
            vf score[8];
            as_dense_pass<DENSE_ROWS>(n, [&]<int n>(std::integral_constant<int, n>) {
                score_sixteen<kind, n, terms>(a, place.at, place.stride, a.q + r * terms * a.q_stride, score);
            });
            for (int i = 0; i < n; ++i) {
                float* most = a.most + (r + i) * LANES;
                store(a.scores + (r + i) * a.score_stride + t, score[i]);
                store(most, max(load<vf>(most), score[i]));
            }
        }
    }
}

// Ticks of `ahead` while `rows` query rows are multiplied with `tokens` tokens.
INLINE int dense_ticks(const Format& f, int rows, int tokens) {
    if (turns_rows(f, rows)) return turned_ticks(f, rows, tokens);
    return dense_passes(rows, DENSE_ROWS) * tokens * int(row_bytes(f) / (f.kind == F16 ? LINE / 2 : LINE));
}

inline void score_dense(const Format& f, int rows, int terms, const DenseScores& a) {
    if (a.turned) {
        if (f.kind == BF16) return terms == 2 ? score_turned_of<BF16, 2>(a, rows) : score_turned_of<BF16, 1>(a, rows);
        return terms == 2 ? score_turned_of<FP8_E4M3, 2>(a, rows) : score_turned_of<FP8_E4M3, 1>(a, rows);
    }
    if (f.kind == BF16) return terms == 2 ? score_dense_of<BF16, 2>(a, rows) : score_dense_of<BF16, 1>(a, rows);
    if (f.kind == FP8_E4M3) return terms == 2 ? score_dense_of<FP8_E4M3, 2>(a, rows) : score_dense_of<FP8_E4M3, 1>(a, rows);
    f.kind == F16 ? score_dense_of<F16, 1>(a, rows) : score_dense_of<F32, 1>(a, rows);
}

#elif !defined(GYROKV_DENSE)

INLINE bool takes_dense(const Format&, int) { return false; }
INLINE int dense_ticks(const Format&, int, int) { return 0; }

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
