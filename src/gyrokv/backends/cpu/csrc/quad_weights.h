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

// Tokens whose products are added up as integers.
template <class C>
constexpr int RUN_TOKENS = C::large ? WORD_RUN : QUAD_HALF;
constexpr int MOST_RUNS = QUAD_TOKENS / WORD_RUN;

alignas(16) constexpr uint8_t WORD_ORDER[PART_BYTES] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
alignas(64) constexpr auto EVERY_SECOND = [] {
    std::array<std::array<int32_t, LANES>, 2> made = {};
    for (int i = 0; i < LANES; ++i) made[0][i] = i / 2, made[1][i] = 8 + i / 2;
    return made;
}();

// Dwords, or every second one.
template <int sides>
INLINE void store_sides(char* to, __m512i w) {
    if constexpr (sides == 1) return _mm512_storeu_si512(to, w);
    for (int j = 0; j < 2; ++j)
        _mm512_mask_storeu_epi32(to + j * LINE, 0x5555, _mm512_permutexvar_epi32(_mm512_load_si512(EVERY_SECOND[j].data()), w));
}

// Weights as words: of each 64 tokens, of the first and the second half of each 32, four by four, those of tokens 0 and 2, then of 1 and 3;
// the bytes before those of tokens 16 m + 4 i.
INLINE int word_place(int i, int m) { return 16 * i + m % 2 * 8 + m / 2 * LINE; }

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
//
// As words (see word_place); large: such as large words of V are multiplied with, else the others are offset by ZERO.
template <bool large, int sides>
__attribute__((noinline)) void spread_words(const QuadValues& a, int rows, int tokens, const float* weights, const float* scales,
                                            char* words, int32_t* zero, float* factor) {
    const int vectors = tokens / LANES;
    vf scale[QUAD_HALF / LANES], most[4] = {}, total[4] = {};
    for (int i = 0; i < vectors; ++i) scale[i] = load<vf>(scales + LANES * i);
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < vectors; ++i) {
            const vf x = (vf)((vi)(load<vf>(weights + r * a.weight_stride + LANES * i) * scale[i]) & 0x7fffffff);
            most[r] = max(most[r], x);
            if (large) total[r] += x;
        }
    const vf largest = join_four(most, [](vf x, vf y) { return max(x, y); });
    vf unit = largest * (1.0f / 32767.0f);
    if (large) unit = max(unit, join_four(total, [](vf x, vf y) { return x + y; }) * (1.0f / WORD_SUM));
    alignas(64) float inverse[LANES];
    store(inverse, largest > 1e-30f ? 1.0f / unit : vf{});
    _mm_storeu_ps(factor, _mm512_castps512_ps128((__m512)unit));
    const __m512i order = every_part(WORD_ORDER);
    vi sum[4] = {};
    for (int r = 0; r < rows; ++r, words += sides * 2 * QUAD_TOKENS) {
        const float* from = weights + r * a.weight_stride;
        const vf by = splat(inverse[r]);
        for (int i = 0; i < vectors; i += 2) {
            auto whole = [&](int j) { return (__m512i)round_int(load<vf>(from + LANES * (i + j)) * scale[i + j] * by); };
            store_sides<sides>(words + sides * LINE / 2 * i, _mm512_shuffle_epi8(_mm512_packs_epi32(whole(0), whole(1)), order));
            if (!large) sum[r] += (vi)whole(0) + (vi)whole(1);
        }
    }
    if (large) return;
    const vi made = join_four(sum, [](vi x, vi y) { return x + y; }) * -ZERO;
    _mm_storeu_si128((__m128i*)zero, _mm512_castsi512_si128((__m512i)made));
}

// The same as bytes.
template <int terms, int sides>
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
                store_sides<sides>(to, w);
            }
        }
    }
    auto add = [](vi x, vi y) { return x + y; };
    vi made[terms];
    for (int i = 0; i < terms; ++i) made[i] = 0 - join_four(sum[i], add);
    if (terms == 2)
        made[1] += made[0] << 8, made[0] = vi{};
    for (int i = 0; i < terms; ++i) _mm_storeu_si128((__m128i*)(zero + 4 * i), _mm512_castsi512_si128((__m512i)made[i]));
}

// The way that lines of C want it.
template <class C, int terms, int sides>
INLINE void spread(const QuadValues& a, int rows, int tokens, const float* weights, const float* scales, char* to, int32_t* zero,
                   float* factor) {
    if constexpr (C::lines == WORDS) spread_words<C::large, sides>(a, rows, tokens, weights, scales, to, zero, factor);
    else spread_weights<terms, sides>(a, rows, tokens, weights, scales, to, zero, factor);
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
