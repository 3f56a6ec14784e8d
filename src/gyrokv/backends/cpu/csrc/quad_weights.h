// Weights of few query rows as bytes, times the scales of V, for rows of codes side by side (see quads.h).
#pragma once
#include <array>

#include "quad_scores.h"
#include "weight_bytes.h"

namespace gyrokv {
namespace GYROKV_ISA {

#if defined(GYROKV_QUADS)

// Rows of a block of V, and what they are multiplied with.
struct QuadValues {
    const Quads& order;
    const Tables& tables;
    const Format& format;
    const char* rows;
    int64_t stride, bytes;   // from row to row; of a row
    int count, tokens;       // rows; the same in whole steps of 64
    const char* rest;        // 64 rows without gaps: the last ones, where they are fewer, and any others
    int first, stop;         // tokens with weights, multiples of 16
    const float* weights;    // [row][weight_stride]; zeros outside of those
    int64_t weight_stride;
    const float* scales;     // [group][tokens]
    int terms;               // of weights
    float* out;              // [row][out_stride]
    int64_t out_stride;
    const float* rescale;    // out = out * rescale + sums
    char* spread;            // room for weights as bytes
    Ahead& ahead;
};

alignas(64) constexpr auto EVERY_SECOND = [] {
    std::array<std::array<int32_t, LANES>, 2> made = {};
    for (int i = 0; i < LANES; ++i) made[0][i] = i / 2, made[1][i] = 8 + i / 2;
    return made;
}();

// op over the four dwords of each part and over parts: of four vectors, to each part's lanes.
template <class V, class Op>
INLINE V join_four(const V (&x)[4], Op op) {
    using vq = vec<uint64_t>;
    const V a = op(zip<0>(x[0], x[1]), zip<1>(x[0], x[1])), b = op(zip<0>(x[2], x[3]), zip<1>(x[2], x[3]));
    const V c = op((V)zip<0>((vq)a, (vq)b), (V)zip<1>((vq)a, (vq)b));
    constexpr auto half = [](int i) constexpr { return i ^ 8; };
    constexpr auto part = [](int i) constexpr { return i ^ 4; };
    const V d = op(c, shuffle<half>(c, c));
    return op(d, shuffle<part>(d, d));
}

// Those of `tokens`, up to QUAD_HALF, and one group. sides: 2 where every second dword is another group's.
template <int planes, int terms, int sides>
__attribute__((noinline)) void spread_weights(const QuadValues& a, int rows, int tokens, const float* weights, const float* scales,
                                              char* bytes, int32_t* zero, float* factor) {
    const int vectors = tokens / LANES;
    vf scale[QUAD_HALF / LANES], most[4] = {};
    for (int i = 0; i < vectors; ++i) scale[i] = load<vf>(scales + LANES * i);
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < vectors; ++i)
            most[r] = larger_size(most[r], load<vf>(weights + r * a.weight_stride + LANES * i) * scale[i]);
    const vf size = join_four(most, [](vf x, vf y) { return max(x, y); });
    alignas(64) float inverse[LANES];
    store(inverse, size > 1e-30f ? LARGEST_WEIGHT<terms> / size : vf{});
    _mm_storeu_ps(factor, _mm512_castps512_ps128((__m512)(size / LARGEST_WEIGHT<terms>)));
    vi sum[terms][4] = {};
    for (int r = 0; r < rows; ++r, bytes += sides * terms * QUAD_TOKENS) {
        const float* from = weights + r * a.weight_stride;
        const vf by = splat(inverse[r]);
        for (int step = 0; step < tokens / 64; ++step) {
            vf x[4];
            for (int i = 0; i < 4; ++i) x[i] = load<vf>(from + 64 * step + LANES * i) * scale[4 * step + i];
            alignas(64) char made[terms][LINE];
            write_weights<1, terms>(x, by, made[0], LINE);
            for (int i = 0; i < terms; ++i) {
                const __m512i w = (__m512i)load<line>(made[i]);
                char* to = bytes + sides * (i * QUAD_TOKENS + 64 * step);
                sum[i][r] = dot_parts(sum[i][r], splat_of<line>(ZERO), w);
                if constexpr (sides == 1) _mm512_storeu_si512(to, w);
                else for (int j = 0; j < 2; ++j)
                    _mm512_mask_storeu_epi32(to + j * LINE, 0x5555, _mm512_permutexvar_epi32(_mm512_load_si512(EVERY_SECOND[j].data()), w));
            }
        }
    }
    auto add = [](vi x, vi y) { return x + y; };
    vi made[terms];
    for (int i = 0; i < terms; ++i) made[i] = 0 - join_four(sum[i], add);
    if (planes == 2)
        made[1] += made[0];
    else if (terms == 2)
        made[1] += made[0] << 8, made[0] = vi{};
    for (int i = 0; i < terms; ++i) _mm_storeu_si128((__m128i*)(zero + 4 * i), _mm512_castsi512_si128((__m512i)made[i]));
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
