// Weights as bytes, times the scales of V, for rows of codes side by side (see quads.h).
#pragma once
#include <array>

#include "quad_values.h"
#include "weight_bytes.h"

namespace gyrokv {
namespace GYROKV_ISA {

// Tokens whose products are added up as integers.
template <class C>
constexpr int RUN_TOKENS = C::large ? WORD_RUN : QUAD_HALF;
constexpr int MOST_RUNS = QUAD_TOKENS / WORD_RUN;
constexpr int UNIT = 8;  // room for what integers of VALUE_ROWS rows stand for, or a sum begins with
static_assert(UNIT >= VALUE_ROWS && UNIT % 4 == 0);

// Added to an integer of up to 22 bits, leaves it in the lowest bits of a float.
constexpr float ROUNDS = 12582912.0f;
// Words of 16 tokens and of the next 16, from the lower halves of two vectors' dwords.
alignas(64) constexpr auto WORD_ORDER = [] {
    std::array<int16_t, 2 * LANES> made = {};
    constexpr int own[8] = {0, 2, 1, 3, 0, 2, 1, 3};
    for (int i = 0; i < 2 * LANES; ++i) made[i] = int16_t(2 * (i / 8 * 4 + own[i % 8]) + i % 8 / 4 * 32);
    return made;
}();
// Dwords of two vectors in turn: of their first halves, and of the others.
alignas(64) constexpr auto IN_TURN = [] {
    std::array<std::array<int32_t, LANES>, 2> made = {};
    for (int i = 0; i < 2 * LANES; ++i) made[i / LANES][i % LANES] = i / 2 + i % 2 * LANES;
    return made;
}();

// Weights as words: of each four tokens a dword of 0 and 2 and one of 1 and 3; with two sides those of the other one after each of them.
// Bytes before those of tokens 16 m + 4 i, of 64.
template <int sides>
INLINE int word_place(int i, int m) { return 16 * i + m % 2 * (sides == 1 ? 8 : LINE) + m / 2 * sides * LINE; }

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

// What integers of four rows stand for, and 1 over it, or 0 where the largest of a row is nearly 0.
INLINE void store_units(vf largest, vf unit, float* inverse, float* factor) {
    const __m128 units = _mm512_castps512_ps128((__m512)unit);
    const __m128 some = _mm_cmp_ps(_mm512_castps512_ps128((__m512)largest), _mm_set1_ps(1e-30f), _CMP_GT_OQ);
    _mm_store_ps(inverse, _mm_and_ps(_mm_div_ps(_mm_set1_ps(1.0f), units), some));
    _mm_storeu_ps(factor, units);
}

// Where weights of up to QUAD_HALF tokens go, of one group or, in turn, of two; scales: of these tokens.
struct Spread {
    const float* scales[2];
    char* to;
    int32_t* zero[2];
    float* factor[2];
};

// 16 weights times V's scales.
INLINE vf scaled(const QuadValues& a, const float* weights, const Spread& s, int row, int side, int i) {
    return load<vf>(weights + row * a.weight_stride + LANES * i) * load<vf>(s.scales[side] + LANES * i);
}

// Weights of 16 * vectors tokens times V's scales as words (see word_place); large: such as large words of V are multiplied
// with; offset: by ZERO, of V.
template <bool large, bool offset, int sides, int vectors>
__attribute__((noinline)) void spread_words(const QuadValues& a, int rows, const float* weights, const Spread& s) {
    vf x[4][sides][vectors], most[sides][4] = {}, total[sides][4] = {};
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; ++i)
#pragma GCC unroll 2
            for (int side = 0; side < sides; ++side) {
                const vf own = scaled(a, weights, s, r, side, i);
                x[r][side][i] = own, most[side][r] = larger_size(most[side][r], own);
                if (large) total[side][r] += (vf)((vi)own & 0x7fffffff);
            }
    auto add = [](auto x, auto y) { return x + y; };
    alignas(16) float inverse[sides][4];
    for (int side = 0; side < sides; ++side) {
        const vf largest = join_four(most[side], [](vf x, vf y) { return max(x, y); });
        vf unit = largest * (1.0f / 32767.0f);
        if (large) unit = max(unit, join_four(total[side], add) * (1.0f / WORD_SUM));
        store_units(largest, unit, inverse[side], s.factor[side]);
    }
    const vf whole = splat(ROUNDS);
    const __m512i order = _mm512_load_si512(WORD_ORDER.data());
    vi sum[sides][4] = {};
    char* words = s.to;
    for (int r = 0; r < rows; ++r, words += sides * 2 * QUAD_TOKENS) {
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i += 2) {
            __m512i made[sides];
#pragma GCC unroll 2
            for (int side = 0; side < sides; ++side) {
                const vf by = splat(inverse[side][r]), *from = x[r][side] + i;
                made[side] = _mm512_permutex2var_epi16((__m512i)fma(from[0], by, whole), order, (__m512i)fma(from[1], by, whole));
                if (offset) sum[side][r] = dot_words(sum[side][r], (line)made[side], _mm512_set1_epi16(-ZERO));
            }
            char* to = words + sides * LINE / 2 * i;
            if constexpr (sides == 1) {
                _mm512_storeu_si512(to, made[0]);
            } else {
                _mm512_storeu_si512(to, _mm512_unpacklo_epi32(made[0], made[1]));
                _mm512_storeu_si512(to + LINE, _mm512_unpackhi_epi32(made[0], made[1]));
            }
        }
    }
    for (int side = 0; side < sides; ++side)
        _mm_storeu_si128((__m128i*)s.zero[side], offset ? _mm512_castsi512_si128((__m512i)join_four(sum[side], add)) : __m128i{});
}

// Those of 16 * vectors tokens as bytes; of two groups, whose dwords take turns, with one term.
template <int terms, int sides, int vectors>
__attribute__((noinline)) void spread_bytes(const QuadValues& a, int rows, const float* weights, const Spread& s) {
    static_assert(sides == 1 || terms == 1);
    alignas(16) float inverse[sides][4];
#pragma GCC unroll 2
    for (int side = 0; side < sides; ++side) {
        vf most[4] = {};
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
            for (int i = 0; i < vectors; ++i) most[r] = larger_size(most[r], scaled(a, weights, s, r, side, i));
        const vf largest = join_four(most, [](vf x, vf y) { return max(x, y); });
        store_units(largest, largest * (1.0f / LARGEST_WEIGHT<terms>), inverse[side], s.factor[side]);
    }
    vi sum[sides][terms][4] = {};
    char* bytes = s.to;
    for (int r = 0; r < rows; ++r, bytes += sides * terms * QUAD_TOKENS)
#pragma GCC unroll 2
        for (int step = 0; step < vectors / 4; ++step) {
            __m512i made[sides][terms];
#pragma GCC unroll 2
            for (int side = 0; side < sides; ++side) {
                vf x[4];  // made anew: to keep all of them until the largest is known took longer
                for (int i = 0; i < 4; ++i) x[i] = scaled(a, weights, s, r, side, 4 * step + i);
                weight_bytes<terms>(x, splat(inverse[side][r]), made[side]);
                for (int i = 0; i < terms; ++i) sum[side][i][r] = dot_parts(sum[side][i][r], splat_of<line>(ZERO), made[side][i]);
            }
            char* to = bytes + sides * 64 * step;
            for (int i = 0; i < terms && sides == 1; ++i) _mm512_storeu_si512(to + i * QUAD_TOKENS, made[0][i]);
            for (int i = 0; i < 2 && sides == 2; ++i)
                _mm512_storeu_si512(to + i * LINE,
                                    _mm512_permutex2var_epi32(made[0][0], _mm512_load_si512(IN_TURN[i].data()), made[sides - 1][0]));
        }
    auto add = [](vi x, vi y) { return x + y; };
    for (int side = 0; side < sides; ++side) {
        vi zero[terms];
        for (int i = 0; i < terms; ++i) zero[i] = 0 - join_four(sum[side][i], add);
        if (terms == 2) zero[1] += zero[0] << 8, zero[0] = vi{};
        for (int i = 0; i < terms; ++i) _mm_storeu_si128((__m128i*)(s.zero[side] + UNIT * i), _mm512_castsi512_si128((__m512i)zero[i]));
    }
}

// Those of `tokens`, 64 or QUAD_HALF, and up to VALUE_ROWS rows, the way that lines of C want them. sides: groups, in turn.
template <class C, int terms, int sides>
INLINE void spread(const QuadValues& a, int rows, int tokens, const float* weights, const Spread& s) {
    auto four = [&](int rows, const float* weights, const Spread& s) {
        constexpr bool offset = C::look_up == VALUES;
        if constexpr (C::lines == WORDS) {
            if (tokens > 64) return spread_words<C::large, offset, sides, QUAD_HALF / LANES>(a, rows, weights, s);
            spread_words<C::large, offset, sides, 64 / LANES>(a, rows, weights, s);
        } else {
            if (tokens > 64) return spread_bytes<terms, sides, QUAD_HALF / LANES>(a, rows, weights, s);
            spread_bytes<terms, sides, 64 / LANES>(a, rows, weights, s);
        }
    };
    four(std::min(rows, 4), weights, s);
    if (rows <= 4) return;
    Spread more = s;
    more.to += 4 * terms * sides * QUAD_TOKENS;
    for (int i = 0; i < sides; ++i) more.zero[i] += 4, more.factor[i] += 4;
    four(rows - 4, weights + 4 * a.weight_stride, more);
}

// Weights of rows times the scales of a group: [row][QUAD_TOKENS words, or as bytes of each term]; what sums begin with, because of ZERO,
// [run][sum][UNIT], and what integers stand for [run][UNIT].
struct GroupWeight {
    const char* bytes;
    const int32_t* zero;
    const float* factor;
};
// Those of every group.
template <class C, int rows, int terms>
struct GroupWeights {
    static constexpr int run = RUN_TOKENS<C>, sums = C::lines == WORDS ? 1 : terms, units = MOST_RUNS * UNIT, most = 640 / 32 * units;
    char* const bytes;
    alignas(16) int32_t zero[sums * most];
    alignas(16) float factor[most];

    GroupWeights(const QuadValues& a, const float* weights) : bytes(a.spread) {
        for (int g = 0; g < a.format.dim / a.format.group; ++g)
            for (int t = a.first / run * run; t < a.stop; t += run) {
                const int at = g * units + t / run * UNIT;
                char* to = row_bytes(g) + terms / sums * t;
                const Spread places = {{a.scales + int64_t(g) * a.tokens + t}, to, {zero + sums * at}, {factor + at}};
                spread<C, terms, 1>(a, rows, std::min(run, a.tokens - t), weights + t, places);
            }
    }
    GroupWeight of(int g) const { return {row_bytes(g), zero + sums * g * units, factor + g * units}; }

   private:
    char* row_bytes(int g) const { return bytes + g * (rows * terms * QUAD_TOKENS); }
};

}  // namespace GYROKV_ISA
}  // namespace gyrokv
