// Sums of weighted values whose bytes are put in order first (see columns.h), and then unpacked to lines of the same scale (see
// column_sums.h).
#pragma once
#include "column_sums.h"

namespace gyrokv {
namespace GYROKV_ISA {

// one_group: the scale is the same for all lines.
template <class C, int count_, bool one_group, int windows>
struct OrderedLines {
    using F = Fields<C::bits>;
    static constexpr int count = count_, shared = one_group ? count : 2;
    const LineWeights<C, 1> weights[count / shared];
    const Columns::Pass& pass;

    static inline __attribute__((always_inline)) __m512i window(const char* at) {
        __m512i x = _mm512_loadu_si512(at);
        asm("" : "+v"(x));  // else it is loaded for each look-up
        return x;
    }
    inline __attribute__((always_inline)) __m512i columns(const char* row) const {
        constexpr bool two = windows == TWO || windows == TWO_NEXT;
        const __m512i order = _mm512_load_si512(pass.order), first = window(row + pass.at[0]);
        const __m512i second = two ? window(row + pass.at[1]) : first;
        __m512i x = two ? _mm512_permutex2var_epi8(first, order, second) : _mm512_permutexvar_epi8(order, first);
        if constexpr (C::bits < 8) x = _mm512_srlv_epi32(x, _mm512_load_si512(pass.shift));
        if constexpr (F::next > 0) {
            const __m512i order = _mm512_load_si512(pass.next_order);
            const char* at = row + pass.next_at[0];
            __m512i next;
            if constexpr (windows == TOGETHER || windows == TWO) next = _mm512_permutexvar_epi8(order, second);
            if constexpr (windows == HALF_NEXT)
                next = _mm512_permutexvar_epi8(order, _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)at)));
            if constexpr (windows == NEXT) next = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(at));
            if constexpr (windows == TWO_NEXT) next = _mm512_permutex2var_epi8(window(at), order, window(row + pass.next_at[1]));
            const __m512i above = _mm512_multishift_epi64_epi8(_mm512_load_si512(pass.next_turn), next);
            x = _mm512_ternarylogic_epi32(x, _mm512_set1_epi8((1 << F::wide) - 1), above, 0xe2);
        }
        return x;
    }
    int spans() const { return pass.spans; }
    void add(const vf* sums, float* out, float rescale) const {
        for (int c = 0; c < 2 * pass.spans; ++c) rescale_and_add(out + pass.first[c / 2] + c % 2 * LANES, rescale, sums[c]);
    }
};

template <class C, int rows>
INLINE void add_ordered_of(const QuadValues& a, const float* weights, float* out, const float* rescale) {
    const Format& f = a.format;
    const GroupWeights<C, rows, LineWeights<C, 1>::terms> groups(a, weights);
    auto weights_of = [&](int g) {
        const GroupWeight own = groups.of(g);
        return LineWeights<C, 1>{own.bytes, {own.zero}, {own.factor}};
    };
    constexpr bool next = Fields<C::bits>::next > 0;
    for (const Columns::Pass *pass = a.order.columns.pass, *end = pass + a.order.columns.passes; pass < end; ++pass) {
        const int group[2] = {pass->first[0] / f.group, pass->first[1] / f.group};
        auto with = [&]<int count, bool one_group, int windows>() __attribute__((always_inline)) {
            using Lines = OrderedLines<C, count, one_group, windows>;
            if constexpr (one_group) add_lines<C, Lines, rows>(a, Lines{{weights_of(group[0])}, *pass}, out, rescale);
            else add_lines<C, Lines, rows>(a, Lines{{weights_of(group[0]), weights_of(group[1])}, *pass}, out, rescale);
        };
        auto read = [&]<int windows>() __attribute__((always_inline)) {
            if (pass->spans == 1) with.template operator()<2, true, windows>();
            else if (group[0] == group[1]) with.template operator()<4, true, windows>();
            else with.template operator()<4, false, windows>();
        };
        switch (pass->windows) {
            case TOGETHER: read.template operator()<TOGETHER>(); break;
            case HALF_NEXT: read.template operator()<next ? HALF_NEXT : TOGETHER>(); break;
            case NEXT: read.template operator()<next ? NEXT : TOGETHER>(); break;
            case TWO: with.template operator()<4, false, TWO>(); break;
            case TWO_NEXT: with.template operator()<4, false, next ? TWO_NEXT : TWO>();
        }
    }
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
