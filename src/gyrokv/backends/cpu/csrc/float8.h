// fp8 e4m3 to bfloat16, a line at a time: looked up, the high and the low bytes apart.
#pragma once
#include "dense.h"

namespace gyrokv {
namespace GYROKV_ISA {

struct Float8Bytes {  // of bfloat16, for codes without their sign; no code is a NaN here
    alignas(LINE) uint8_t low[128], high[128];
    constexpr Float8Bytes() : low{}, high{} {
        for (int code = 0; code < 128; ++code) {
            int exponent = code >> 3, rest = code & 7;
            if (!exponent && rest)  // a multiple of 2^-9
                for (exponent = 1; !(rest & 8); --exponent) rest *= 2;
            const int made = rest || exponent ? (exponent + 120) << 7 | (rest & 7) << 4 : 0;
            low[code] = uint8_t(made), high[code] = uint8_t(made >> 8);
        }
    }
};
alignas(LINE) constexpr Float8Bytes FLOAT8_BYTES;

// Where a line or half of one, as below, has byte i of a row of `bytes`.
INLINE int float8_place(int i, int bytes) {
    if (bytes - i / 64 * 64 <= 32) return i;
    return i / 64 * 64 + i % 16 / 8 * 32 + i % 64 / 16 * 8 + i % 8;
}

#if defined(__AVX512VBMI__)

// Eight bytes to the first half of each sixteen.
INLINE line spread(vec<uint8_t, LINE / 2> x) {
    return (line)_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), _mm512_castsi256_si512((__m256i)x));
}

struct Float8 {
    __m512i low[2], high[2];
    inline __attribute__((always_inline)) Float8()
        : low{_mm512_load_si512(FLOAT8_BYTES.low), _mm512_load_si512(FLOAT8_BYTES.low + LINE)},
          high{_mm512_load_si512(FLOAT8_BYTES.high), _mm512_load_si512(FLOAT8_BYTES.high + LINE)} {}
    // A line: of each 16 bytes the first 8 to to[0], the others to to[1].
    inline __attribute__((always_inline)) void operator()(__m512i x, line* to) const {
        const __m512i a = _mm512_permutex2var_epi8(low[0], x, low[1]);
        const __m512i size = _mm512_permutex2var_epi8(high[0], x, high[1]);
        const __m512i b = _mm512_ternarylogic_epi32(size, x, _mm512_set1_epi8(char(0x80)), 0xf8);  // size | (x & 0x80)
        to[0] = (line)_mm512_unpacklo_epi8(a, b), to[1] = (line)_mm512_unpackhi_epi8(a, b);
    }
    // Half a line, in its order.
    inline __attribute__((always_inline)) line half(__m512i x) const {
        line to[2];
        (*this)((__m512i)spread((vec<uint8_t, LINE / 2>)_mm512_castsi512_si256(x)), to);
        return to[0];
    }
};

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
