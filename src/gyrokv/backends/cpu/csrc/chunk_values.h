// Sums of weighted values where there is one sum of a line and a row: 64 bytes of four tokens become four lines by
// unpacking alone.
//
// Such a chunk is 32 words: code s of them is of values from 32 c + s * words on in the even bytes, of those half a head behind in the
// odd ones, so each side has one scale. Unpacked, dword 4 L + d of line i is byte 16 L + 4 i + d of the four tokens: a column of the
// first side if it is even. So a qword has the weights of both sides, and serves four lines.
#pragma once
#include "quad_weights.h"

namespace gyrokv {
namespace GYROKV_ISA {

// Weights of a chunk's sides: words [row][2 * sides * QUAD_TOKENS], or bytes [row][sides * QUAD_TOKENS] of one term; the rest [side] as in
// QuadWeights.
struct ChunkWeights {
    const char* weights;
    int32_t zero[2][MOST_RUNS * 8];
    float factor[2][MOST_RUNS * 8];
};

// Whether Quads::chunks is heeded.
template <class C, int terms>
constexpr bool TAKES_CHUNKS = C::lines == WORDS || (terms == 1 && (C::bits == 4 || C::look_up == VALUES));

// Codes of a chunk's 64 bytes of a token. period: words of the next field until it begins again, or 32, or 0 if there is no such field.
template <class C, int code, int period>
struct ChunkCodes {
    using F = Fields<C::bits>;
    const int wide_at;
    int next_at;    // bytes from the beginning of a row
    __m512i shift;  // of the next field: up for the first code, else down
    ChunkCodes(const Format& f, int chunk) : wide_at(chunk * LINE) {
        if constexpr (period > 0) {
            const int words = f.dim * F::wide / 16, count = f.dim * F::next / 16;  // the latter a power of two, see Quads::make
            next_at = 2 * words + 32 * chunk % count / period * period * 2;
            const __m512i pairs = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
            const __m512i at = _mm512_add_epi32(_mm512_add_epi32(pairs, pairs), _mm512_set1_epi32(32 * chunk + code * words));
            const __m512i place = _mm512_srl_epi32(at, _mm_cvtsi32_si128(std::countr_zero(unsigned(count))));
            shift = _mm512_abs_epi32(_mm512_sub_epi32(_mm512_mullo_epi32(place, _mm512_set1_epi32(F::next)), _mm512_set1_epi32(F::wide)));
        }
    }
    inline __attribute__((always_inline)) __m512i operator()(const char* row) const {
        __m512i x = _mm512_loadu_si512(row + wide_at);
        asm("" : "+v"(x));  // else it is loaded twice
        if constexpr (code > 0) x = _mm512_srli_epi16(x, code * F::wide);
        if constexpr (period > 0) {
            __m512i next;
            if constexpr (period == 8) next = every_part(row + next_at);
            else if constexpr (period == 16) next = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)(row + next_at)));
            else next = _mm512_loadu_si512(row + next_at);
            next = code == 0 ? _mm512_sllv_epi32(next, shift) : _mm512_srlv_epi32(next, shift);
            x = _mm512_ternarylogic_epi32(_mm512_set1_epi8((1 << F::wide) - 1), x, next, 0xca);
        }
        return x;
    }
    // Of four rows, as lines.
    inline __attribute__((always_inline)) void four(const char* at, int64_t stride, __m512i* to) const {
        const __m512i x[4] = {(*this)(at), (*this)(at + stride), (*this)(at + 2 * stride), (*this)(at + 3 * stride)};
        const __m512i low[2] = {_mm512_unpacklo_epi8(x[0], x[1]), _mm512_unpacklo_epi8(x[2], x[3])};
        const __m512i high[2] = {_mm512_unpackhi_epi8(x[0], x[1]), _mm512_unpackhi_epi8(x[2], x[3])};
        to[0] = _mm512_unpacklo_epi16(low[0], low[1]), to[1] = _mm512_unpackhi_epi16(low[0], low[1]);
        to[2] = _mm512_unpacklo_epi16(high[0], high[1]), to[3] = _mm512_unpackhi_epi16(high[0], high[1]);
    }
};

// What a code of a chunk adds to the output of `rows` query rows; out: of the first value.
template <class C, int code, int period, int sides, int rows, int terms>
__attribute__((noinline)) void add_chunk(const QuadValues& a, int chunk, const ChunkWeights& w, float* out, const float* rescale) {
    static_assert(C::sums(terms) == 1);
    constexpr bool words = C::lines == WORDS, begins = !words || C::look_up == VALUES;
    constexpr int row_bytes = terms * sides * QUAD_TOKENS, run = RUN_TOKENS<C>;
    constexpr bool one_by_one = rows > 4 && ONE_BY_ONE<C>;  // else four lines more than registers hold
    const Levels<C> levels(a.tables);
    const ChunkCodes<C, code, period> codes(a.format, chunk);
    auto both = [](int32_t x, int32_t y) __attribute__((always_inline)) {
        const __m512i first = _mm512_set1_epi32(x);
        return sides == 1 ? first : _mm512_mask_set1_epi32(first, 0xaaaa, y);
    };
    struct Rows {
        const char* at;
        int64_t stride;
    };
    auto rows_of = [&](int step) __attribute__((always_inline)) {
        const bool rest = step + 64 > a.count;
        return Rows{rest ? a.rest : a.rows + step * a.stride, rest ? a.bytes : a.stride};
    };
    Rows here = rows_of(a.first / 64 * 64);
    __m512i four[4];  // of the next four rows
    codes.four(here.at, here.stride, four);
    vf total[4][rows] = {};
    for (int begin = a.first / run * run; begin < a.stop; begin += run) {
        const int number = begin / run;
        vi sum[4][rows];
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < 4; ++c)
                sum[c][r] = begins ? (vi)both(w.zero[0][number * 8 + r], w.zero[1][number * 8 + r]) : vi{};
        for (int step = std::max(begin, a.first / 64 * 64); step < std::min(begin + run, a.stop); step += 64) {
            const Rows after = step + 64 < a.stop ? rows_of(step + 64) : here;
            for (int i = 0; i < 4; ++i) {
                a.ahead.tick_inside(4);
                const Rows next = i < 3 ? Rows{here.at + 4 * here.stride, here.stride} : after;
#pragma GCC unroll 4
                for (int m = 0; m < 4; ++m) {
                    const char* weights = w.weights + sides * terms * step + (words ? word_place<sides>(i, m) : sides * (16 * i + 4 * m));
                    line v[4][Levels<C>::lines];
                    for (int c = 0; c < 4 && !one_by_one; ++c) levels.of((line)four[c], v[c]);
                    auto weight = [&](int r, int i) __attribute__((always_inline)) {
                        typename std::conditional<sides == 1, int32_t, int64_t>::type of;
                        std::memcpy(&of, weights + r * row_bytes + i * sizeof of, sizeof of);
                        if constexpr (sides == 1) return _mm512_set1_epi32(of);
                        else return _mm512_set1_epi64(of);
                    };
                    auto add = [&]<int i>(std::integral_constant<int, i>) __attribute__((always_inline)) {
                        if constexpr (one_by_one)
                            for (int c = 0; c < 4; ++c) v[c][i] = levels.template one<i>((line)four[c]);
                        for (int r = 0; r < rows; ++r) {
                            const __m512i by = weight(r, i);
                            for (int c = 0; c < 4; ++c)
                                sum[c][r] = words ? dot_words(sum[c][r], v[c][i], by) : dot_parts(sum[c][r], v[c][i], by);
                        }
                    };
                    auto take_next = [&]() __attribute__((always_inline)) {
                        if (m < 3) codes.four(here.at + (m + 1) * 16 * here.stride, here.stride, four);
                        else codes.four(next.at, next.stride, four);
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
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
            const int at = number * 8 + r;
            int32_t bits[2];
            std::memcpy(bits, &w.factor[0][at], 4), std::memcpy(bits + 1, &w.factor[1][at], 4);
            const vf factor = (vf)both(bits[0], bits[1]);
            for (int c = 0; c < 4; ++c) total[c][r] = fma(to_float(sum[c][r]), factor, total[c][r]);
        }
    }
    const float by = a.format.factor * (words ? a.tables.word_factor : 1.0f);
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
    constexpr int run = RUN_TOKENS<C>;
    const int next_words = f.dim * Fields<C::bits>::next / 16;
    int group[2] = {-1, -1};
    auto add = [&]<int code>(std::integral_constant<int, code>, int chunk) __attribute__((always_inline)) {
        const int from = 32 * (chunk + code * a.order.chunks), here[2] = {from / f.group, (from + f.dim / 2) / f.group};
        auto with = [&]<int sides>(std::integral_constant<int, sides>) __attribute__((always_inline)) {
            const bool known = here[0] == group[0] && here[1] == group[1];
            for (int t = a.first / run * run; t < a.stop && !known; t += run) {
                const float *first = a.scales + int64_t(here[0]) * a.tokens + t, *other = a.scales + int64_t(here[1]) * a.tokens + t;
                int32_t* zero[2] = {w.zero[0] + t / run * 8, w.zero[1] + t / run * 8};
                float* factor[2] = {w.factor[0] + t / run * 8, w.factor[1] + t / run * 8};
                spread<C, terms, sides>(a, rows, std::min(run, a.tokens - t), weights + t,
                                        {{first, other}, a.spread + sides * terms * t, {zero[0], zero[1]}, {factor[0], factor[1]}});
            }
            auto with_period = [&]<int period>() __attribute__((always_inline)) {
                add_chunk<C, code, period, sides, rows, terms>(a, chunk, w, out + from, rescale);
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
