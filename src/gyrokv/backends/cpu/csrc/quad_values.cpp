// Sums of weighted values from rows of codes side by side: see quad_values.h.
#include "chunk_values.h"
#include "order_values.h"
#include "part_values.h"

namespace gyrokv {
namespace GYROKV_ISA {

template <class C, int rows>
INLINE void add_quads_of(const QuadValues& a, const float* weights, float* out, const float* rescale) {
    if constexpr (HAS_CHUNKS<C>)
        if (a.order.chunks) return add_chunks_of<C, rows>(a, weights, out, rescale);
    if constexpr (C::lines == BYTES && C::bits < 4)
        if (a.order.parts && a.terms == 2) return add_parts_of<C, rows, 2>(a, weights, out, rescale);
    if constexpr (C::lines == BYTES && C::bits < 8)
        if (a.order.parts) return add_parts_of<C, rows, 1>(a, weights, out, rescale);
    add_ordered_of<C, rows>(a, weights, out, rescale);
}

void add_quads(const QuadValues& a, int rows) {
    as_coded<true>(a.format, a.order.words, [&]<class C>(C) {
        const float *weights = a.weights, *rescale = a.rescale;
        float* out = a.out;
        while (rows > 0) {
            const int pass = quad_pass(rows, VALUE_ROWS);
            as_pass<VALUE_ROWS>(pass, [&]<int n>(std::integral_constant<int, n>) {
                add_quads_of<C, n>(a, weights, out, rescale);
            });
            rows -= pass, weights += pass * a.weight_stride, out += pass * a.out_stride, rescale += pass;
        }
    });
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
