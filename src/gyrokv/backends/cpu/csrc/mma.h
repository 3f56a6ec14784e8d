// C = A B for a few rows of A and panels of B (see panels.h), with the dot products or the matrix unit of the CPU.
//
// A: rows of consecutive elements along the reduced axis. int8 operands sum in int32, others in float.
#pragma once
#include "panels.h"

namespace gyrokv {
namespace GYROKV_ISA {

#if defined(__AVX512F__)
constexpr int MOST_ROWS = 8, MOST_PANELS = 2;  // accumulators: 16 of 32 registers
#elif defined(__aarch64__)
constexpr int MOST_ROWS = 8, MOST_PANELS = 2;
#else
constexpr int MOST_ROWS = 4, MOST_PANELS = 2;  // 8 of 16
#endif
#if defined(__AMX_INT8__)
constexpr int ROWS_PER_MMA = 32;
#else
constexpr int ROWS_PER_MMA = 16;
#endif

// Bytes of A per line of B.
INLINE int a_step(Element e) { return e == INT8 ? 4 * FACTOR_BYTES : 4; }

struct Product {
    Element element;
    const char* a;
    int64_t a_stride;  // bytes
    int rows;          // at most ROWS_PER_MMA
    const char* b;
    int64_t panel;     // bytes between panels
    int panels;
    int lines;         // of each panel, a multiple of 8
    char* c;           // int32 or float [rows][c_stride]
    int64_t c_stride;  // elements
    bool add;          // to C, instead of writing it
};

#if defined(__AMX_INT8__)

// Tile numbers are part of the instruction, so a macro.
#define GYROKV_TILE_DOT(c, a, b)      \
    if constexpr (integer)            \
        _tile_dpbsud(c, a, b);        \
    else                              \
        _tile_dpbf16ps(c, a, b)

template <bool integer, int count>  // up to 16 rows, up to 4 panels
INLINE void multiply_wide(const Product& p, int depth, int panel) {
    const char *a = p.a, *b = p.b + panel * p.panel;
    char* c = p.c + panel * LINE;
    const int64_t stride = p.c_stride * 4;
    if (p.add) {
        _tile_loadd(0, c, stride);
        if constexpr (count > 1) _tile_loadd(1, c + LINE, stride);
        if constexpr (count > 2) _tile_loadd(2, c + 2 * LINE, stride);
        if constexpr (count > 3) _tile_loadd(3, c + 3 * LINE, stride);
    } else {
        _tile_zero(0);
        if constexpr (count > 1) _tile_zero(1);
        if constexpr (count > 2) _tile_zero(2);
        if constexpr (count > 3) _tile_zero(3);
    }
    for (int l = 0; l < p.lines; l += depth, a += 4 * depth, b += depth * LINE) {
        _tile_loadd(4, a, p.a_stride);
        _tile_loadd(6, b, LINE);
        GYROKV_TILE_DOT(0, 4, 6);
        if constexpr (count > 1) {
            _tile_loadd(7, b + p.panel, LINE);
            GYROKV_TILE_DOT(1, 4, 7);
        }
        if constexpr (count > 2) {
            _tile_loadd(6, b + 2 * p.panel, LINE);
            GYROKV_TILE_DOT(2, 4, 6);
        }
        if constexpr (count > 3) {
            _tile_loadd(7, b + 3 * p.panel, LINE);
            GYROKV_TILE_DOT(3, 4, 7);
        }
    }
    _tile_stored(0, c, stride);
    if constexpr (count > 1) _tile_stored(1, c + LINE, stride);
    if constexpr (count > 2) _tile_stored(2, c + 2 * LINE, stride);
    if constexpr (count > 3) _tile_stored(3, c + 3 * LINE, stride);
}

template <bool integer, int count>  // 17 to 32 rows, up to 2 panels
INLINE void multiply_tall(const Product& p, int depth, int panel) {
    const char *a = p.a, *b = p.b + panel * p.panel;
    const int64_t below = 16 * p.a_stride;
    char* c = p.c + panel * LINE;
    const int64_t stride = p.c_stride * 4;
    if (p.add) {
        _tile_loadd(0, c, stride);
        _tile_loadd(2, c + 16 * stride, stride);
        if constexpr (count > 1) {
            _tile_loadd(1, c + LINE, stride);
            _tile_loadd(3, c + 16 * stride + LINE, stride);
        }
    } else {
        _tile_zero(0);
        _tile_zero(2);
        if constexpr (count > 1) {
            _tile_zero(1);
            _tile_zero(3);
        }
    }
    for (int l = 0; l < p.lines; l += depth, a += 4 * depth, b += depth * LINE) {
        _tile_loadd(4, a, p.a_stride);
        _tile_loadd(6, b, LINE);
        GYROKV_TILE_DOT(0, 4, 6);
        _tile_loadd(5, a + below, p.a_stride);
        GYROKV_TILE_DOT(2, 5, 6);
        if constexpr (count > 1) {
            _tile_loadd(7, b + p.panel, LINE);
            GYROKV_TILE_DOT(1, 4, 7);
            GYROKV_TILE_DOT(3, 5, 7);
        }
    }
    _tile_stored(0, c, stride);
    _tile_stored(2, c + 16 * stride, stride);
    if constexpr (count > 1) {
        _tile_stored(1, c + LINE, stride);
        _tile_stored(3, c + 16 * stride + LINE, stride);
    }
}

template <bool integer>
INLINE void multiply_tiles(MatrixUnit& unit, const Product& p) {
    const int depth = p.lines % 16 ? 8 : 16;
    memory_barrier();
    unit.configure(p.rows, depth);
    int i = 0;
    if (p.rows > 16) {
        for (; i + 2 <= p.panels; i += 2) multiply_tall<integer, 2>(p, depth, i);
        if (i < p.panels) multiply_tall<integer, 1>(p, depth, i);
        return;
    }
    for (; i + 4 <= p.panels; i += 4) multiply_wide<integer, 4>(p, depth, i);
    if (i + 2 <= p.panels) multiply_wide<integer, 2>(p, depth, i), i += 2;
    if (i < p.panels) multiply_wide<integer, 1>(p, depth, i);
}

#undef GYROKV_TILE_DOT

#endif

template <Element e, int rows, int panels>
INLINE void multiply_block(const Product& p, int row, int panel) {
    using V = std::conditional_t<e == INT8, vi, vf>;
    constexpr int step = e == INT8 ? 4 * FACTOR_BYTES : 4;
    V sum[rows][panels] = {};
    auto place = [&](int i, int j) { return p.c + ((row + i) * p.c_stride + (panel + j) * LANES) * 4; };
    if (p.add)
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < panels; ++j) sum[i][j] = load<V>(place(i, j));
    const char *a = p.a + row * p.a_stride, *b = p.b + panel * p.panel;
    for (int l = 0; l < p.lines; ++l, a += step, b += LINE) {
        line x[panels];
        for (int j = 0; j < panels; ++j) x[j] = load<line>(b + j * p.panel);
        for (int i = 0; i < rows; ++i)
            for (int j = 0; j < panels; ++j) {
                const char* at = a + i * p.a_stride;
                if constexpr (e == INT8)
                    sum[i][j] = dot(sum[i][j], x[j], at);
                else if constexpr (e == BFLOAT)
                    sum[i][j] = dot_bfloat(sum[i][j], x[j], at);
                else
                    sum[i][j] = fma((vf)broadcast4(at), (vf)x[j], sum[i][j]);
            }
    }
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < panels; ++j) store(place(i, j), sum[i][j]);
}

// As many sums whatever the rows, because each waits for the product before.
template <Element e, int rows, int panels = std::min(8, MOST_ROWS * MOST_PANELS / rows)>
INLINE void multiply_rows(const Product& p, int row, int panel = 0) {
    for (; panel + panels <= p.panels; panel += panels) multiply_block<e, rows, panels>(p, row, panel);
    if constexpr (panels > 1) multiply_rows<e, rows, panels / 2>(p, row, panel);
}

template <Element e>
inline void multiply_dots(const Product& p) {
    int row = 0;
    for (; row + MOST_ROWS <= p.rows; row += MOST_ROWS) multiply_rows<e, MOST_ROWS>(p, row);
    if constexpr (MOST_ROWS > 4)
        if (row + 4 <= p.rows) multiply_rows<e, 4>(p, row), row += 4;
    if (row + 2 <= p.rows) multiply_rows<e, 2>(p, row), row += 2;
    if (row < p.rows) multiply_rows<e, 1>(p, row);
}

inline void multiply(MatrixUnit& unit, const Product& p) {
#if defined(__AMX_INT8__)
    if (p.element == INT8) {  // short sums of few rows do not fill tiles
        if (p.lines < 16 && p.rows <= 8) return multiply_dots<INT8>(p);
        return multiply_tiles<true>(unit, p);
    }
    if (p.element == BFLOAT) return multiply_tiles<false>(unit, p);
    return multiply_dots<FLOAT>(p);
#else
    (void)unit;
    if (p.element == INT8) return multiply_dots<INT8>(p);
    if (p.element == BFLOAT) return multiply_dots<BFLOAT>(p);
    multiply_dots<FLOAT>(p);
#endif
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
