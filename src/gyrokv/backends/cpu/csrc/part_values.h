// Sums of weighted values of bytes that have two sums: 16 bytes of each of four tokens become a line of columns for each of their codes.
#pragma once
#include "quad_weights.h"

namespace gyrokv {
namespace GYROKV_ISA {

alignas(64) constexpr auto COLUMN_BYTES = [] {
    struct { uint8_t at[LINE]; } made = {};
    for (int i = 0; i < LINE; ++i) made.at[i] = uint8_t(i % 4 * PART_BYTES + SORTED[i / 4]);
    return made;
}();

// The dword of(0) in all lanes, or of(1) in the last half of them, which are columns of odd bytes.
template <int sides, class Of>
INLINE __m512i spread_sides(Of of) {
    const __m512i x = _mm512_set1_epi32(of(0));
    return sides == 1 ? x : _mm512_mask_set1_epi32(x, 0xff00, of(1));
}

// Two lines of columns, of a part's codes `code` and the next one. First columns of the even bytes. Of four codes of a byte, columns for the
// first two are kept for the others.
template <class C, int code>
struct PartLines {
    using F = Fields<C::bits>;
    static constexpr int fields = F::next > 0 ? 2 : 1;
    const ColumnPart& part;
    char* const kept;  // [four tokens][field]
    __m512i gather, shift;
    PartLines(const ColumnPart& part, char* kept) : part(part), kept(kept) {
        if constexpr (F::next > 0) gather = _mm512_load_si512(part.gather), shift = _mm512_load_si512(part.shift);
    }
    // Of four tokens from `token` on.
    inline __attribute__((always_inline)) void codes(const char* rows, int64_t stride, int token, line* made) const {
        __m512i wide, next = {};
        char* at = kept + token / 4 * fields * LINE;
        if constexpr (code == 0) {
            wide = _mm512_permutexvar_epi8(_mm512_load_si512(COLUMN_BYTES.at), (__m512i)load_parts(rows + part.wide, stride));
            if constexpr (F::next > 0) {
                const __m512i x = (__m512i)load_parts(rows + part.next, stride);
                next = _mm512_srlv_epi32(_mm512_permutexvar_epi8(gather, x), shift);
            }
            if constexpr (F::steps > 2) _mm512_store_si512(at, wide);
            if constexpr (F::steps > 2 && F::next > 0) _mm512_store_si512(at + LINE, next);
        } else {
            wide = _mm512_load_si512(at);
            if constexpr (F::next > 0) next = _mm512_load_si512(at + LINE);
        }
        made[0] = codes_of<C::bits, code>(wide, next);
        made[1] = codes_of<C::bits, code + 1>(wide, next);
    }
};

// What two lines add to the output of `rows` query rows; sides: groups of a line, with weights `w` of each. kept: room for what PartLines keeps.
template <class C, int code, int sides, int rows, int terms>
__attribute__((noinline)) void add_part(const QuadValues& a, const ColumnPart& part, const GroupWeight* w, char* kept, float* out,
                                        const float* rescale) {
    constexpr int run = RUN_TOKENS<C>, count = 2;
    const Levels<C> levels(a.tables);
    const PartLines<C, code> lines(part, kept);
    vf total[count][rows] = {};
    for (int begin = a.first / run * run; begin < a.stop; begin += run) {
        const int number = begin / run;
        vi sum[count][rows][terms];
        for (int r = 0; r < rows; ++r)
            for (int i = 0; i < terms; ++i) {
                auto zero = [&](int side) { return w[side].zero[(number * terms + i) * UNIT + r]; };
                for (int c = 0; c < count; ++c) sum[c][r][i] = (vi)spread_sides<sides>(zero);
            }
        for (int step = std::max(begin, a.first / 64 * 64); step < std::min(begin + run, a.stop); step += 64) {
            const bool rest = step >= a.whole;
            const char* from = rest ? a.rest : a.rows + step * a.stride;
            const int64_t stride = rest ? a.bytes : a.stride;
            for (int i = 0; i < 4; ++i, from += 4 * stride) {
#pragma GCC unroll 4
                for (int m = 0; m < 4; ++m) {
                    if (m == 0) a.ahead.tick_inside(2);
                    const int place = step + 16 * i + 4 * m;
                    line code_of[count], v[count];
                    lines.codes(from + m * 16 * stride, stride, place, code_of);
                    for (int c = 0; c < count; ++c) levels.of(code_of[c], v + c);
                    for (int r = 0; r < rows; ++r)
                        for (int term = 0; term < terms; ++term) {
                            const __m512i by = spread_sides<sides>([&](int side) __attribute__((always_inline)) {
                                int32_t four;
                                std::memcpy(&four, w[side].bytes + place + (r * terms + term) * QUAD_TOKENS, 4);
                                return four;
                            });
                            for (int c = 0; c < count; ++c) sum[c][r][term] = dot_parts(sum[c][r][term], v[c], by);
                        }
                }
            }
        }
#pragma GCC unroll 5
        for (int r = 0; r < rows; ++r) {
            const vf factor = (vf)spread_sides<sides>([&](int side) {
                int32_t bits;
                std::memcpy(&bits, w[side].factor + number * UNIT + r, 4);
                return bits;
            });
            for (int c = 0; c < count; ++c) {
                vi made = sum[c][r][0];
                if constexpr (terms == 2) made = (made << 8) + sum[c][r][1];
                total[c][r] = fma(to_float(made), factor, total[c][r]);
            }
        }
    }
    const int half = a.format.dim / 2;
#pragma GCC unroll 5
    for (int r = 0; r < rows; ++r, out += a.out_stride)
        for (int c = 0; c < count; ++c) {
            float* to = out + part.first + (code + c) * part.step;
            const __m512 x = (__m512)(total[c][r] * a.format.factor);
            auto add = [&](float* at, __m256 x) {
                _mm256_storeu_ps(at, _mm256_fmadd_ps(_mm256_loadu_ps(at), _mm256_set1_ps(rescale[r]), x));
            };
            add(to, _mm512_castps512_ps256(x)), add(to + half, _mm512_extractf32x8_ps(x, 1));
        }
}

template <class C, int rows, int terms>
INLINE void add_parts_of(const QuadValues& a, const float* weights, float* out, const float* rescale) {
    const GroupWeights<C, rows, terms> groups(a, weights);
    alignas(LINE) char kept[QUAD_TOKENS / 4 * 2 * LINE];
    for (const ColumnPart *part = a.order.part, *end = part + a.order.parts; part < end; ++part) {
        const GroupWeight own[2] = {groups.of(part->group[0]), groups.of(part->group[1])};
        auto codes = [&]<int code>() __attribute__((always_inline)) {
            if (part->group[0] == part->group[1]) return add_part<C, code, 1, rows, terms>(a, *part, own, kept, out, rescale);
            add_part<C, code, 2, rows, terms>(a, *part, own, kept, out, rescale);
        };
        codes.template operator()<0>();
        if constexpr (Fields<C::bits>::steps > 2) codes.template operator()<2>();
    }
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
