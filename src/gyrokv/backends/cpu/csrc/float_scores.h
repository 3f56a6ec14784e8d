// Scores of few query rows from rows of K that are no codes, as they are, in float32, where vectors have 16 or 32 bytes: a vector holds
// values of one token. Two tokens take four query rows at a time, and the sums of LANES tokens are added up together.
#pragma once
#include "dense.h"

namespace gyrokv {
namespace GYROKV_ISA {

#if !defined(__AVX512F__)
#define GYROKV_DENSE 1

INLINE bool takes_dense(const Format& f, int rows) {
    if (f.kind == FP8_E4M3) return rows <= MOST_FLOAT8_ROWS && f.dim % (2 * LANES) == 0;
    return f.kind != CODES && rows <= MOST_DENSE_ROWS && f.dim % LANES == 0;
}

// Sums of neighbours: of each 16 bytes those of a, then those of b.
INLINE vf add_neighbours(vf a, vf b) {
#if defined(__AVX2__)
    return (vf)_mm256_hadd_ps((__m256)a, (__m256)b);
#else
    return unzip<0>(a, b) + unzip<1>(a, b);
#endif
}

// Scores of LANES tokens for `rows` query rows.
template <int kind, int rows>
INLINE void score_tokens(const DenseScores& a, const char* at, int64_t stride, int row, int token) {
    constexpr int size = kind == F32 ? 4 : 2, tokens = rows >= 3 ? 2 : 4;  // at most eight sums at once
    constexpr int parts = kind == FP8_E4M3 ? 2 : 1;  // of the head, whose values are in the same words
    vf two[LANES / 2][rows];
    for (int t = 0; t < LANES; t += tokens, at += tokens * stride) {
        a.ahead.tick(tokens);
        vf sum[rows][tokens] = {};
        const char* q = a.q + row * a.q_stride;
        for (int i = 0; i < a.keys.bytes; i += LANES * size, q += LINE) {
            vf k[tokens][parts];
            for (int j = 0; j < tokens; ++j) {
                const char* from = at + j * stride + i;
                if constexpr (kind == FP8_E4M3) fp8_to_floats(from, k[j]);
                else k[j][0] = kind == F16 ? half_to_float(from) : kind == BF16 ? bfloat_to_float(from) : load<vf>(from);
            }
            for (int part = 0; part < parts; ++part)
                for (int r = 0; r < rows; ++r) {
                    const vf x = load<vf>(q + r * a.q_stride + part * 2 * a.keys.bytes);
                    for (int j = 0; j < tokens; ++j) sum[r][j] = fma(k[j][part], x, sum[r][j]);
                }
        }
        for (int r = 0; r < rows; ++r)
            for (int j = 0; j < tokens; j += 2) two[(t + j) / 2][r] = add_neighbours(sum[r][j], sum[r][j + 1]);
    }
    for (int r = 0; r < rows; ++r) {
        vf made = add_neighbours(two[0][r], two[1][r]);
#if defined(__AVX2__)
        const __m256 x = (__m256)made, y = (__m256)add_neighbours(two[2][r], two[3][r]);
        made = (vf)_mm256_permute2f128_ps(x, y, 0x20) + (vf)_mm256_permute2f128_ps(x, y, 0x31);
#endif
        float* most = a.most + (row + r) * LANES;
        store(a.scores + (row + r) * a.score_stride + token, made);
        store(most, max(load<vf>(most), made));
    }
}

template <int kind>
inline void score_dense_of(const DenseScores& a, int rows) {
    for (int r = 0; r < rows; ++r) store(a.most + r * LANES, splat(-__builtin_inff()));
    for (int t = 0; t < a.tokens; t += LANES) {
        const auto [from, stride] = a.keys.place(t);
        for (int r = 0; r < rows; r += 4)
            as_dense_pass<4>(std::min(rows - r, 4), [&]<int n>(std::integral_constant<int, n>) {
                score_tokens<kind, n>(a, from, stride, r, t);
            });
    }
}

// Ticks of `ahead` while `rows` query rows are multiplied with `tokens` tokens.
INLINE int dense_ticks(const Format&, int rows, int tokens) { return tokens * dense_passes(rows, 4); }

// terms: of q, which has one.
inline void score_dense(const Format& f, int rows, int, const DenseScores& a) {
    if (f.kind == F16) return score_dense_of<F16>(a, rows);
    if (f.kind == FP8_E4M3) return score_dense_of<FP8_E4M3>(a, rows);
    f.kind == BF16 ? score_dense_of<BF16>(a, rows) : score_dense_of<F32>(a, rows);
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
