// What kernels for rows that are no codes, as they are, have in common.
#pragma once
#include "rows.h"

namespace gyrokv {
namespace GYROKV_ISA {

// Query rows that take rows as they are: more are cheaper with panels.
constexpr int MOST_DENSE_ROWS = MATRIX_UNIT ? 8 : LANES == 16 ? 32 : LANES == 8 ? 16 : 8, MOST_FLOAT8_ROWS = MOST_DENSE_ROWS / 2;

// Rows of a block of K that are no codes, and where their scores go (float_scores.h, or dense_scores.h).
struct DenseScores {
    KeyRows keys;
    const char* q;       // as query.h packs it: float [row] or bfloat16 [row][term]
    int64_t q_stride;    // bytes; whole lines, zeros after the last value
    int tokens;          // a multiple of LANES; those from count on have any score
    bool turned;         // as turned_scores.h takes them
    float* scores;       // [row][score_stride]
    int64_t score_stride;
    float* most;         // [row][LANES], the largest
    char* room;          // for lines that are made of LANES rows
    Ahead& ahead;
};

constexpr int DENSE_ROWS = 5;  // of a pass where there are 32 registers

// Passes over `rows` query rows, and those of the next one: all are about as long.
INLINE int dense_passes(int rows, int most) { return (rows + most - 1) / most; }
INLINE int dense_pass(int rows, int most) { return (rows - 1) / dense_passes(rows, most) + 1; }

// body(rows) of a pass of `most` rows at most.
template <int most, class Body>
INLINE void as_dense_pass(int rows, Body body) {
    if constexpr (most > 1)
        if (rows < most) return as_dense_pass<most - 1>(rows, body);
    body(std::integral_constant<int, most>{});
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
