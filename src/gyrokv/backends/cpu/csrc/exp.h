// Powers of two and the hyperbolic tangent.
#pragma once
#include "simd.h"

namespace gyrokv {
namespace GYROKV_ISA {

// 2^x for x <= 126; 0 far below. Minimax polynomials, exact at whole x; relative error below 2e-7, of degree 4 below 4e-6,
// which is enough for what becomes an integer of 16 bits, of degree 3 below 9e-5, for a bfloat16.
template <int degree = 5>
INLINE vf exp2(vf x) {
#if defined(__AVX512F__)  // on [0, 1]; the scaling takes the integer below x
    const vf f = (vf)_mm512_reduce_ps((__m512)x, 1);
    vf y;
    if constexpr (degree == 3) {
        y = fma(f, splat(7.70670399e-2f), splat(2.27644995e-1f));
        y = fma(y, f, splat(6.95116758e-1f));
    } else if constexpr (degree == 4) {
        y = fma(f, splat(1.35557465e-2f), splat(5.20323701e-2f));
        y = fma(y, f, splat(2.41379768e-1f));
        y = fma(y, f, splat(6.93032146e-1f));
    } else {
        y = fma(f, splat(1.86713005e-3f), splat(9.01703071e-3f));
        y = fma(y, f, splat(5.57999127e-2f));
        y = fma(y, f, splat(2.40164444e-1f));
        y = fma(y, f, splat(6.93151295e-1f));
    }
    y = fma(y, f, splat(1.0f));
    return (vf)_mm512_scalef_ps((__m512)y, (__m512)x);
#else  // on [-0.5, 0.5]
    const vf kept = max(x, splat(-126.0f));
    const vi n = round_int(kept);
    const vf f = kept - to_float(n);
    vf y = fma(f, splat(1.32647e-3f), splat(9.67151e-3f));
    y = fma(y, f, splat(5.550734e-2f));
    y = fma(y, f, splat(2.4022242e-1f));
    y = fma(y, f, splat(6.9314698e-1f));
    y = fma(y, f, splat(1.0f));
    return x < -126.0f ? vf{} : (vf)((vi)y + (n << 23));
#endif
}

INLINE vf tanh(vf x) {  // absolute error below 3e-7
    vf kept = x > 40.0f ? splat(40.0f) : x;
    return 1.0f - 2.0f / (exp2(kept * 2.88539008f) + 1.0f);
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
