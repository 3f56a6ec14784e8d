// A format's rotation of single rows: of q before the scores, and of outputs after them.
#pragma once
#include "core.h"
#include "simd.h"

namespace gyrokv {
namespace GYROKV_ISA {

constexpr int MOST_VALUES = 640;  // of a row: 576 in whole blocks of 128

// Sums and differences of lanes `stride` apart.
template <int stride>
INLINE vf butterfly(vf x) {
    constexpr auto other = [](int i) constexpr { return i ^ stride; };
    constexpr auto sign = [](int i) constexpr { return i & stride ? 0x80000000u : 0u; };
    return shuffle<other>(x, x) + (vf)((vu)x ^ lanes<sign>());
}
template <int stride = 1>
INLINE vf butterflies(vf x) {
    if constexpr (stride == LANES)
        return x;
    else
        return butterflies<2 * stride>(butterfly<stride>(x));
}

// x [dim], in place: after * H(before * x) of each block; H: the Hadamard matrix, with its rows as they come from
// sums and differences at strides 1, 2, 4, ...
inline void turn_row(const Turn& turn, float* x, int dim) {
    const int block = turn.block;
    for (float* at = x; at < x + dim; at += block) {
        for (int i = 0; i < block; i += LANES) store(at + i, butterflies(load<vf>(at + i) * load<vf>(turn.before + i)));
        for (int stride = LANES; stride < block; stride *= 2)
            for (int i = 0; i < block; i += LANES) {
                if (i & stride) continue;
                const vf a = load<vf>(at + i), b = load<vf>(at + i + stride);
                store(at + i, a + b), store(at + i + stride, a - b);
            }
        for (int i = 0; i < block; i += LANES) store(at + i, load<vf>(at + i) * load<vf>(turn.after + i));
    }
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
