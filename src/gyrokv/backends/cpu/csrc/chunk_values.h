// Sums of weighted values for few query rows where halves of a head have scales of their own: 64 bytes of four tokens become four lines
// by unpacking alone.
//
// Such a chunk is 32 words: code s of them is of values from 32 c + s * words on in the even bytes, of those half a head behind in the
// odd ones, so each side has one scale. Unpacked, dword 4 L + d of line i is byte 16 L + 4 i + d of the four tokens: a column of the
// first side if it is even. So a qword has the weights of both sides, and serves four lines.
#pragma once
#include "quad_weights.h"

namespace gyrokv {
namespace GYROKV_ISA {

#if defined(GYROKV_QUADS)

// Weights of a chunk's sides: words [row][2 * sides * QUAD_TOKENS], or bytes [row][sides * QUAD_TOKENS] of one term; the rest [side] as in
// QuadWeights.
struct ChunkWeights {
    const char* weights;
    int32_t zero[2][2 * 8];
    float factor[2][2 * 4];
};

// What a code of a chunk adds to the output of `rows` query rows; out: of the first value.
template <class C, int code, int sides, int rows, int terms>
__attribute__((noinline)) void add_chunk(const QuadValues& a, int chunk, const ChunkWeights& w, float* out, const float* rescale) {
    static_assert(C::sums(terms) == 1);
    constexpr bool words = C::lines == WORDS, begins = !words || C::look_up == VALUES;
    constexpr int row_bytes = terms * sides * QUAD_TOKENS;
    const Levels<C> levels(a.tables);
    auto both = [](int32_t x, int32_t y) __attribute__((always_inline)) {
        const __m512i first = _mm512_set1_epi32(x);
        return sides == 1 ? first : _mm512_mask_set1_epi32(first, 0xaaaa, y);
    };
    vf total[4][rows] = {};
    for (int begin = a.first / QUAD_HALF * QUAD_HALF; begin < a.stop; begin += QUAD_HALF) {
        const int half = begin / QUAD_HALF;
        vi sum[4][rows];
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < 4; ++c)
                sum[c][r] = begins ? (vi)both(w.zero[0][half * 8 + r], w.zero[1][half * 8 + r]) : vi{};
        for (int step = std::max(begin, a.first / 64 * 64); step < std::min(begin + QUAD_HALF, a.stop); step += 64) {
            const bool rest = step + 64 > a.count;
            const char* from = (rest ? a.rest : a.rows + step * a.stride) + chunk * LINE;
            const int64_t stride = rest ? a.bytes : a.stride;
            for (int i = 0; i < 4; ++i, from += 4 * stride) {
                a.ahead.tick_inside(4);
#pragma GCC unroll 4
                for (int m = 0; m < 4; ++m) {
                    const char* at = from + m * 16 * stride;
                    const char* weights = w.weights + sides * (words ? 2 * step + word_place(i, m) : step + 16 * i + 4 * m);
                    auto token = [&](int t) __attribute__((always_inline)) { return _mm512_loadu_si512(at + t * stride); };
                    __m512i x[4] = {token(0), token(1), token(2), token(3)};
                    asm("" : "+v"(x[0]), "+v"(x[1]), "+v"(x[2]), "+v"(x[3]));  // else they are loaded twice
                    const __m512i low[2] = {_mm512_unpacklo_epi8(x[0], x[1]), _mm512_unpacklo_epi8(x[2], x[3])};
                    const __m512i high[2] = {_mm512_unpackhi_epi8(x[0], x[1]), _mm512_unpackhi_epi8(x[2], x[3])};
                    const __m512i packed[4] = {_mm512_unpacklo_epi16(low[0], low[1]), _mm512_unpackhi_epi16(low[0], low[1]),
                                               _mm512_unpacklo_epi16(high[0], high[1]), _mm512_unpackhi_epi16(high[0], high[1])};
                    line v[4][Levels<C>::lines];
                    for (int c = 0; c < 4; ++c) levels.of(codes_of<C::bits, code>(packed[c], __m512i{}), v[c]);
                    auto weight = [&](int r, int i) __attribute__((always_inline)) {
                        typename std::conditional<sides == 1, int32_t, int64_t>::type of;
                        std::memcpy(&of, weights + r * row_bytes + i * sizeof of, sizeof of);
                        if constexpr (sides == 1) return _mm512_set1_epi32(of);
                        else return _mm512_set1_epi64(of);
                    };
                    for (int r = 0; r < rows; ++r)
                        for (int i = 0; i < Levels<C>::lines; ++i) {
                            const __m512i by = weight(r, i);
                            for (int c = 0; c < 4; ++c)
                                sum[c][r] = words ? dot_words(sum[c][r], v[c][i], by) : dot_parts(sum[c][r], v[c][i], by);
                        }
                }
            }
        }
        asm volatile("" ::"r"(total) : "memory");  // until here in memory: registers are for sums
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
            const int at = half * 4 + r;
            int32_t bits[2];
            std::memcpy(bits, &w.factor[0][at], 4), std::memcpy(bits + 1, &w.factor[1][at], 4);
            const vf factor = (vf)both(bits[0], bits[1]);
            for (int c = 0; c < 4; ++c) total[c][r] = fma(to_float(sum[c][r]), factor, total[c][r]);
        }
    }
    const float by = a.format.factor;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r, out += a.out_stride) {
        auto add = [&]<int pick>(std::integral_constant<int, pick>, float* to) __attribute__((always_inline)) {  // columns of a side
            const __m512 x = _mm512_shuffle_ps((__m512)total[0][r], (__m512)total[1][r], pick);
            const __m512 y = _mm512_shuffle_ps((__m512)total[2][r], (__m512)total[3][r], pick);
            const __m512i order = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
            const __m512i later = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
            const vf made[2] = {(vf)_mm512_permutex2var_pd((__m512d)x, order, (__m512d)y),
                                (vf)_mm512_permutex2var_pd((__m512d)x, later, (__m512d)y)};
            for (int i = 0; i < 2; ++i)
                store(to + LANES * i, fma(load<vf>(to + LANES * i), splat(rescale[r]), made[i] * by));
        };
        add(std::integral_constant<int, 0x88>{}, out);
        add(std::integral_constant<int, 0xdd>{}, out + a.format.dim / 2);
    }
}

template <class C, int rows, int terms>
INLINE void add_chunks_of(const QuadValues& a, const float* weights, float* out, const float* rescale) {
    const Format& f = a.format;
    alignas(16) ChunkWeights w = {a.spread, {}, {}};
    int group[2] = {-1, -1};
    auto add = [&]<int code>(std::integral_constant<int, code>, int chunk) __attribute__((always_inline)) {
        const int from = 32 * (chunk + code * a.order.chunks), here[2] = {from / f.group, (from + f.dim / 2) / f.group};
        auto with = [&]<int sides>(std::integral_constant<int, sides>) __attribute__((always_inline)) {
            const bool known = here[0] == group[0] && here[1] == group[1];
            for (int side = 0; side < sides && !known; ++side)
                for (int t = a.first / QUAD_HALF * QUAD_HALF; t < a.stop; t += QUAD_HALF)
                    spread<C, terms, sides>(a, rows, std::min(QUAD_HALF, a.tokens - t), weights + t,
                                            a.scales + int64_t(here[side]) * a.tokens + t, a.spread + sides * terms * t + 4 * side,
                                            w.zero[side] + t / QUAD_HALF * 8, w.factor[side] + t / QUAD_HALF * 4);
            add_chunk<C, code, sides, rows, terms>(a, chunk, w, out + from, rescale);
        };
        if (here[0] == here[1]) with(std::integral_constant<int, 1>{});
        else with(std::integral_constant<int, 2>{});
        group[0] = here[0], group[1] = here[1];
    };
    for (int chunk = 0; chunk < a.order.chunks; ++chunk) add(std::integral_constant<int, 0>{}, chunk);
    if constexpr (Fields<C::bits>::steps == 2)
        for (int chunk = 0; chunk < a.order.chunks; ++chunk) add(std::integral_constant<int, 1>{}, chunk);
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
