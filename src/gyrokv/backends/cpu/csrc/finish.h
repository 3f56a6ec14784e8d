// Sums of weighted values to outputs.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "expand.h"
#include "turn.h"

namespace gyrokv {
namespace GYROKV_ISA {

// Output `place` of [B, Hq, Tq] from a row of weighted means out [v_dim], which is overwritten.
inline void store_output(const Attend& a, int64_t place, float* out) {
    if (a.out_turn) turn_row(*a.out_turn, out, a.v_dim);
    char* to = a.out + place * a.out_dim * (a.out_kind == BF16 ? 2 : 4);
    if (a.out_kind == BF16)  // in place: a value lies before those that are still to be read
        for (int d = 0; d < a.out_dim; d += LANES) store((char*)out + 2 * d, to_bfloat(load<vf>(out + d)));
    std::memcpy(to, out, a.out_dim * (a.out_kind == BF16 ? 2 : 4));
}

// Joins `splits` sums of the rows of a unit in their order with the learned sinks, divides by the sum of weights and
// stores. A split is out [rows][v_dim], top [rows] and total [rows], as in Unit; they are `stride` floats apart.
inline void finish(const Attend& a, const Unit& unit, const float* data, int64_t stride, int64_t splits) {
    constexpr float none = -std::numeric_limits<float>::infinity();
    const int64_t per_kv = a.q_heads / a.kv_heads;
    for (int64_t r = 0; r < unit.rows; ++r) {
        const int64_t row = unit.row_first + r, q_head = unit.kv_head * per_kv + row % per_kv;
        const int64_t place = (unit.batch * a.q_heads + q_head) * a.q_len + row / per_kv;
        const float *top = data + int64_t(unit.rows) * a.v_dim + r, *total = top + unit.rows;
        float most = a.sinks != nullptr ? a.sinks[q_head] : none;
        for (int64_t s = 0; s < splits; ++s)
            if (!(top[s * stride] <= most)) most = top[s * stride];  // also when it is NaN
        alignas(64) float out[MOST_VALUES];
        bool filled = false;
        if (most != none) {
            auto share = [&](float score) { return score == most ? 1.0 : std::exp(double(score) - most); };
            double sum = a.sinks != nullptr ? share(a.sinks[q_head]) : 0.0;
            for (int64_t s = 0; s < splits; ++s) sum += share(top[s * stride]) * total[s * stride];
            for (int64_t s = 0; s < splits; ++s) {
                if (top[s * stride] == none) continue;
                const float weight = float(share(top[s * stride]) / sum);
                const float* from = data + s * stride + r * a.v_dim;
                if (filled)
                    for (int64_t d = 0; d < a.v_dim; ++d) out[d] += weight * from[d];
                else
                    for (int64_t d = 0; d < a.v_dim; ++d) out[d] = weight * from[d];
                filled = true;
            }
            a.lse[place] = float(most + std::log(sum));
        } else {
            a.lse[place] = none;
        }
        if (!filled) std::fill_n(out, a.v_dim, 0.0f);
        store_output(a, place, out);
    }
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
