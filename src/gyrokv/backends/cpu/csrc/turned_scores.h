// Scores of more query rows from rows of bfloat16 or fp8: 16 tokens become vectors of a dword of each, two values, once for all query
// rows, and sums of 16 tokens need not be added up.
#pragma once
#include "float8.h"
#include "quads.h"

namespace gyrokv {
namespace GYROKV_ISA {

#if defined(GYROKV_QUADS)

constexpr int TURNED_ROWS = 13, SETS = 2;  // query rows of a pass; times 16 tokens at once

// fp8 is converted once so, bfloat16 gains less.
INLINE bool turns_rows(const Format& f, int rows) {
    if (row_bytes(f) % 16) return false;
    return f.kind == FP8_E4M3 ? rows >= 6 : f.kind == BF16 && rows >= (f.dim > 128 ? 13 : f.dim > 64 ? 11 : 8);
}

// Vectors of 16 rows, `SETS` lines apart.
template <int kind>
INLINE void turn_sixteen(const char* at, int64_t stride, int bytes, char* to) {
    constexpr int step = SETS * LINE;
    for (const char* end = at + bytes; at < end; at += 16) {
        __m512i x[4], made[4];
        for (int j = 0; j < 4; ++j) x[j] = (__m512i)load_parts(at + j * stride, 4 * stride);
        if constexpr (kind == BF16) {
            dwords_of(x, made);
            for (int i = 0; i < 4; ++i, to += step) _mm512_store_si512(to, made[i]);
        } else {
            const Float8 float8;
            const __m512i a = _mm512_unpacklo_epi16(x[0], x[1]), b = _mm512_unpacklo_epi16(x[2], x[3]);
            const __m512i c = _mm512_unpackhi_epi16(x[0], x[1]), d = _mm512_unpackhi_epi16(x[2], x[3]);
            made[0] = _mm512_unpacklo_epi32(a, b), made[1] = _mm512_unpackhi_epi32(a, b);
            made[2] = _mm512_unpacklo_epi32(c, d), made[3] = _mm512_unpackhi_epi32(c, d);
            for (int i = 0; i < 4; ++i, to += 2 * step) {
                line two[2];
                float8(made[i], two);
                store(to, two[0]), store(to + step, two[1]);
            }
        }
    }
}

// Products of the vectors at `from` with `rows` query rows, to [row][set].
template <int rows, int terms>
__attribute__((noinline)) void score_turned(const DenseScores& a, const char* from, int vectors, const char* q, vf (*to)[SETS]) {
    vf sum[rows][SETS] = {};
    for (const char* end = q + 4 * vectors; q < end; q += 4, from += SETS * LINE) {
        a.ahead.tick_inside(1);
        line k[SETS];
        for (int n = 0; n < SETS; ++n) k[n] = load<line>(from + n * LINE);
        for (int r = 0; r < rows; ++r)
            for (int term = 0; term < terms; ++term) {
                float x;
                std::memcpy(&x, q + (r * terms + term) * a.q_stride, 4);
                const vf every = splat(x);
                for (int n = 0; n < SETS; ++n) sum[r][n] = (vf)_mm512_dpbf16_ps((__m512)sum[r][n], (__m512bh)k[n], (__m512bh)every);
            }
    }
    for (int r = 0; r < rows; ++r)
        for (int n = 0; n < SETS; ++n) to[r][n] = sum[r][n];
}

template <int kind, int terms>
inline void score_turned_of(const DenseScores& a, int rows) {
    for (int r = 0; r < rows; ++r) store(a.most + r * LANES, splat(-__builtin_inff()));
    const int vectors = a.keys.bytes / (kind == BF16 ? 4 : 2);
    for (int t = 0; t < a.tokens; t += 16 * SETS) {
        const int sets = std::min(SETS, (a.tokens - t) / 16);
        for (int n = 0; n < sets; ++n) {
            const auto [from, stride] = a.keys.place(t + 16 * n);
            turn_sixteen<kind>(from, stride, a.keys.bytes, a.room + n * LINE);
        }
        for (int r = 0, n; r < rows; r += n) {
            n = dense_pass(rows - r, TURNED_ROWS);
            vf score[TURNED_ROWS][SETS];
            as_dense_pass<TURNED_ROWS>(n, [&]<int n>(std::integral_constant<int, n>) {
                score_turned<n, terms>(a, a.room, vectors, a.q + r * terms * a.q_stride, score);
            });
            for (int i = 0; i < n; ++i)
                for (int set = 0; set < sets; ++set) {
                    float* most = a.most + (r + i) * LANES;
                    store(a.scores + (r + i) * a.score_stride + t + 16 * set, score[i][set]);
                    store(most, max(load<vf>(most), score[i][set]));
                }
        }
    }
}

// Ticks of `ahead` meanwhile.
INLINE int turned_ticks(const Format& f, int rows, int tokens) {
    return dense_passes(rows, TURNED_ROWS) * ((tokens + 16 * SETS - 1) / (16 * SETS)) * (f.dim / 2);
}

#else

INLINE bool turns_rows(const Format&, int) { return false; }

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
