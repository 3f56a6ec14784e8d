// Sums of weighted values from rows of codes side by side (see quads.h): a line is a byte of each of four tokens
// for 16 columns, and products of bytes add up the four.
#pragma once
#include "quads.h"

namespace gyrokv {
namespace GYROKV_ISA {

#if !defined(GYROKV_QUADS)

INLINE int64_t quad_weight_bytes(int) { return 0; }
INLINE int value_ticks(int, int, int) { return 0; }

#else

INLINE int64_t quad_weight_bytes(int dim) { return dim / 32 * VALUE_ROWS * 2 * QUAD_TOKENS; }

// Rows of a block of V, and what they are multiplied with.
struct QuadValues {
    const ColumnQuads& order;
    const Tables& tables;
    const Format& format;
    const char* rows;
    int64_t stride, bytes;   // from row to row; of a row
    int whole, tokens;       // rows that are there, and all in whole steps of 64
    const char* rest;        // 64 rows without gaps: those from `whole` on, and then any others
    int first, stop;         // tokens with weights, multiples of 16
    const float* weights;    // [row][weight_stride]; zeros outside of those
    int64_t weight_stride;
    const float* scales;     // [group][tokens]
    int terms;               // of weights
    float* out;              // [row][out_stride]
    int64_t out_stride;
    const float* rescale;    // out = out * rescale + sums
    char* spread;            // room for weights as bytes
    Ahead& ahead;
};

// out [row] = out * rescale + weights * values, of `rows` query rows.
void add_quads(const QuadValues& a, int rows);

// Ticks of Ahead meanwhile.
INLINE int value_ticks(int dim, int rows, int tokens) {
    int passes = 0;
    for (; rows > 0; ++passes) rows -= quad_pass(rows, VALUE_ROWS);
    return passes * (dim / 32) * (tokens / 8);
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
