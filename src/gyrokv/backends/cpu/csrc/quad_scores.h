// Scores from rows of codes side by side (see quads.h): four vectors become four of a dword of 16 tokens each.
#pragma once
#include "quad_query.h"
#include "rows.h"

namespace gyrokv {
namespace GYROKV_ISA {

#if !defined(GYROKV_QUADS)

INLINE int quad_ticks(const Quads&, int, int) { return 0; }

#else

// Rows of a block of K, and where their scores go.
struct QuadScores {
    const Quads& order;
    const Tables& tables;
    KeyRows keys;
    bool again;          // rows were read for other query rows already
    const float* k_scale;
    int64_t scale_stride;
    int tokens;          // a multiple of 16; those from count on have any score
    QuadQuery q;
    float* scores;       // [row][score_stride]
    int64_t score_stride;
    float* most;         // [row][LANES], the largest
    Ahead& ahead;
};

// Scores of the rows that a.q holds, with q of `terms` parts.
void score_quads(const Format& f, int terms, const QuadScores& a);

// Ticks of Ahead while `rows` of them pass over `tokens`.
INLINE int quad_ticks(const Quads& order, int rows, int tokens) {
    int passes = 0;
    for (int r = 0; r < rows; ++passes) r += key_pass(r, rows, order.most_rows);
    return passes * tokens / 16 * (order.by_group ? order.keys.dwords / 4 : 2 * order.parts);
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
