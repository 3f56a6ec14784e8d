// Sums of weighted values where 64 bytes of four tokens become four lines by unpacking alone (see column_sums.h).
//
// Such a chunk is 32 words: code s of them is of values from 32 c + s * words on in the even bytes, of those half a head behind in the
// odd ones, so each side has one scale. Unpacked, dword 4 L + d of line i is byte 16 L + 4 i + d of the four tokens: a column of the
// first side if it is even. So a qword has the weights of both sides, and serves four lines.
#pragma once
#include "column_sums.h"

namespace gyrokv {
namespace GYROKV_ISA {

// Whether a format may have chunks: see ColumnQuads.
template <class C>
constexpr bool HAS_CHUNKS = C::bits >= 4 && (C::lines == WORDS || C::bits == 4 || C::look_up == VALUES);

// Codes number `code` of a chunk's bytes. period: words of the next field until it begins again, or 32, or 0 if there is no such field.
template <class C, int code, int period, int sides>
struct ChunkLines {
    using F = Fields<C::bits>;
    static constexpr int count = 4, shared = 4;
    const LineWeights<C, sides> weights[1];
    const int half;  // of a head
    const int wide_at;
    int next_at;    // bytes from the beginning of a row
    __m512i shift;  // of the next field: up for the first code, else down
    ChunkLines(const Format& f, int chunk, const LineWeights<C, sides>& weights)
        : weights{weights}, half(f.dim / 2), wide_at(chunk * LINE) {
        if constexpr (period > 0) {
            const int words = f.dim * F::wide / 16, count = f.dim * F::next / 16;  // the latter a power of two, see ColumnQuads
            next_at = 2 * words + 32 * chunk % count / period * period * 2;
            const __m512i pairs = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
            const __m512i at = _mm512_add_epi32(_mm512_add_epi32(pairs, pairs), _mm512_set1_epi32(32 * chunk + code * words));
            const __m512i place = _mm512_srl_epi32(at, _mm_cvtsi32_si128(std::countr_zero(unsigned(count))));
            shift = _mm512_abs_epi32(_mm512_sub_epi32(_mm512_mullo_epi32(place, _mm512_set1_epi32(F::next)), _mm512_set1_epi32(F::wide)));
        }
    }
    inline __attribute__((always_inline)) __m512i columns(const char* row) const {
        __m512i x = _mm512_loadu_si512(row + wide_at);
        asm("" : "+v"(x));  // else it is loaded twice
        if constexpr (code > 0) x = _mm512_srli_epi16(x, code * F::wide);
        if constexpr (period > 0) {
            __m512i next;
            if constexpr (period == 8) next = every_part(row + next_at);
            else if constexpr (period == 16) next = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)(row + next_at)));
            else next = _mm512_loadu_si512(row + next_at);
            next = code == 0 ? _mm512_sllv_epi32(next, shift) : _mm512_srlv_epi32(next, shift);
            x = _mm512_ternarylogic_epi32(x, _mm512_set1_epi8((1 << F::wide) - 1), next, 0xe2);
        }
        return x;
    }
    static int spans() { return 2; }  // of 32 values
    void add(const vf* sums, float* out, float rescale) const {
        auto side = [&]<int pick>(std::integral_constant<int, pick>, float* to) __attribute__((always_inline)) {
            const __m512 x = _mm512_shuffle_ps((__m512)sums[0], (__m512)sums[1], pick);
            const __m512 y = _mm512_shuffle_ps((__m512)sums[2], (__m512)sums[3], pick);
            const __m512i order = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
            const __m512i later = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
            rescale_and_add(to, rescale, (vf)_mm512_permutex2var_pd((__m512d)x, order, (__m512d)y));
            rescale_and_add(to + LANES, rescale, (vf)_mm512_permutex2var_pd((__m512d)x, later, (__m512d)y));
        };
        side(std::integral_constant<int, 0x88>{}, out);
        side(std::integral_constant<int, 0xdd>{}, out + half);
    }
};

template <class C, int rows>
INLINE void add_chunks_of(const QuadValues& a, const float* weights, float* out, const float* rescale) {
    constexpr int run = RUN_TOKENS<C>, terms = C::lines == WORDS ? 2 : 1;
    const Format& f = a.format;
    alignas(16) int32_t zero[2][MOST_RUNS * UNIT];
    alignas(16) float factor[2][MOST_RUNS * UNIT];
    const int next_words = f.dim * Fields<C::bits>::next / 16;
    int group[2] = {-1, -1};  // whose weights are there
    auto add = [&]<int code>(std::integral_constant<int, code>, int chunk) __attribute__((always_inline)) {
        const int from = 32 * (chunk + code * a.order.chunks), here[2] = {from / f.group, (from + f.dim / 2) / f.group};
        auto with = [&]<int sides>(std::integral_constant<int, sides>) __attribute__((always_inline)) {
            const bool known = here[0] == group[0] && here[1] == group[1];
            for (int t = a.first / run * run; t < a.stop && !known; t += run) {
                const float *first = a.scales + int64_t(here[0]) * a.tokens + t, *other = a.scales + int64_t(here[1]) * a.tokens + t;
                const int at = t / run * UNIT;
                const Spread to = {{first, other}, a.spread + sides * terms * t, {zero[0] + at, zero[1] + at}, {factor[0] + at, factor[1] + at}};
                spread<C, terms, sides>(a, rows, std::min(run, a.tokens - t), weights + t, to);
            }
            LineWeights<C, sides> own = {a.spread, {}, {}};
            for (int side = 0; side < sides; ++side) own.zero[side] = zero[side], own.factor[side] = factor[side];
            auto with_period = [&]<int period>() __attribute__((always_inline)) {
                using Lines = ChunkLines<C, code, period, sides>;
                add_lines<C, Lines, rows>(a, Lines(f, chunk, own), out + from, rescale);
            };
            if constexpr (Fields<C::bits>::next == 0) with_period.template operator()<0>();
            else if (next_words == 8) with_period.template operator()<8>();
            else if (next_words == 16) with_period.template operator()<16>();
            else with_period.template operator()<32>();
        };
        if (here[0] == here[1]) with(std::integral_constant<int, 1>{});
        else with(std::integral_constant<int, 2>{});
        group[0] = here[0], group[1] = here[1];
    };
    for (int chunk = 0; chunk < a.order.chunks; ++chunk) add(std::integral_constant<int, 0>{}, chunk);
    if constexpr (Fields<C::bits>::steps == 2)
        for (int chunk = 0; chunk < a.order.chunks; ++chunk) add(std::integral_constant<int, 1>{}, chunk);
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
