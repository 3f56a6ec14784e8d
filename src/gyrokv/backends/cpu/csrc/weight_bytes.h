// Softmax weights times V's scales as bytes, relative to the largest of a block.
#pragma once
#include "simd.h"

namespace gyrokv {
namespace GYROKV_ISA {

#if defined(__AVX512BW__)

template <int parts>
constexpr float LARGEST_WEIGHT = parts == 2 ? 32512.0f : 127.0f;

// The weights x of 64 tokens, times `inverse`, as bytes: the high part first.
template <int parts>
INLINE void weight_bytes(const vf* x, vf inverse, __m512i* made) {
    __m512i whole[2], high[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
        const vi a = round_int(x[2 * j] * inverse), b = round_int(x[2 * j + 1] * inverse);
        whole[j] = _mm512_packs_epi32((__m512i)a, (__m512i)b);
    }
    if constexpr (parts == 1) {
        made[0] = _mm512_packs_epi16(whole[0], whole[1]);
        return;
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
        high[j] = _mm512_srai_epi16(_mm512_add_epi16(whole[j], _mm512_set1_epi16(128)), 8);
        whole[j] = _mm512_and_si512(whole[j], _mm512_set1_epi16(255));
    }
    made[0] = _mm512_packs_epi16(high[0], high[1]), made[1] = _mm512_packus_epi16(whole[0], whole[1]);
}

// The same to a row; `below`: bytes from a part of it to the next.
template <int planes, int parts>
INLINE void write_weights(const vf* x, vf inverse, char* at, int64_t below) {
    __m512i made[parts];
    weight_bytes<parts>(x, inverse, made);
    if constexpr (planes == 2 && parts == 2) {
        store(at, line{}), store(at + 3 * below, line{});
        at += below;
    }
    for (int i = 0; i < parts; ++i) _mm512_storeu_si512(at + i * below, made[i]);
}

INLINE vf larger_size(vf a, vf b) { return (vf)_mm512_range_ps((__m512)a, (__m512)b, 0xb); }  // of larger magnitude, without sign

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
