// A block of tokens, ready to be multiplied, and what query rows see of it.
#pragma once
#include "query.h"

namespace gyrokv {
namespace GYROKV_ISA {

// A block of tokens, ready to be multiplied.
struct Block {
    const Format *k_format, *v_format;
    Panels k = {}, v;
    Rows k_rows, v_rows;
    const Stored *k_stored = nullptr, *v_stored = nullptr;  // in place of k and v, where rows are multiplied as they are stored
    const Quads* k_quads = nullptr;                         // in place of k
    const ColumnQuads* v_quads = nullptr;                   // and v
    bool k_dense = false;                                   // in place of k
    const Direct* direct = nullptr;                         // in place of v
    const Tables *k_tables, *v_tables;
    const float *k_scale, *v_scale;  // [scale][tokens]
    int64_t position;
    int count, tokens;               // tokens: count padded to whole steps
};

INLINE int mask_bytes(const Attend& call) { return call.mask_type == MASK_BOOL ? 1 : call.mask_type == MASK_F32 ? 4 : 2; }

// The mask of one query row, or null.
INLINE const char* mask_row(const Attend& call, const Unit& unit, int row) {
    if (!call.mask) return nullptr;
    const int per_kv = call.q_heads / call.kv_heads, head = unit.kv_head * per_kv + row % per_kv;
    return call.mask + mask_bytes(call) * (unit.batch * call.mask_strides[0] + head * call.mask_strides[1] +
                                           row / per_kv * call.mask_strides[2]);
}

// `count` (up to LANES) mask values of one query from column `at` on.
INLINE vf load_mask(const Attend& call, const char* row, int64_t at, int count) {
    const int size = mask_bytes(call);
    const int64_t step = call.mask_strides[3] * size;
    alignas(64) char buffer[LANES * 4] = {};
    const char* from = row + at * step;
    if (step != size || count < LANES) {
        for (int i = 0; i < count; ++i) std::memcpy(buffer + i * size, from + i * step, size);
        from = buffer;
    }
    if (call.mask_type == MASK_F32) return load<vf>(from);
    if (call.mask_type == MASK_BF16) return bfloat_to_float(from);
    if (call.mask_type == MASK_BOOL) {
        vi seen = __builtin_convertvector(load<vec<uint8_t, LANES>>(from), vi);
        return seen != 0 ? vf{} : splat(-INFINITE);
    }
    alignas(64) float wide[LANES];  // -inf, which the fast conversion does not know
    vf x = half_to_float(from);
    store(wide, x);
    for (int i = 0; i < LANES; ++i) {
        uint16_t raw;
        std::memcpy(&raw, from + 2 * i, 2);
        if ((raw & 0x7fff) == 0x7c00) wide[i] = raw & 0x8000 ? -INFINITE : INFINITE;
    }
    return load<vf>(wide);
}

// Softcap, bias and visibility of one row of scores, times `scale`; tokens first .. stop - 1 are visible by position.
// Returns the maxima.
inline vf mask_scores(const Attend& call, float* scores, float scale, const char* mask, int64_t column, float slope, int first,
                      int stop) {
    vf top = splat(-INFINITE), lane;
    for (int i = 0; i < LANES; ++i) lane[i] = float(i);
    const float cap = call.softcap * LOG2E;
    for (int t = first / LANES * LANES; t < stop; t += LANES) {
        vf s = load<vf>(scores + t) * scale;
        if (call.softcap) s = tanh(s) * cap;
        if (mask) {
            vf bias = load_mask(call, mask, column + t, std::min(LANES, stop - t));
            s = bias <= LOWEST ? splat(-INFINITE) : fma(bias, splat(slope), s);
        }
        if (t < first || t + LANES > stop) {
            vf place = lane + float(t);
            s = (place < float(first)) | (place >= float(stop)) ? splat(-INFINITE) : s;
        }
        store(scores + t, s);
        top = max(top, s);
    }
    return top;
}

// Positions of a block that a query row may see by position alone.
struct Visible {
    int first, stop;
};
INLINE Visible visible(const Attend& call, const Unit& unit, const Block& block, int row) {
    const int64_t own = call.q_first + row / (call.q_heads / call.kv_heads);
    int64_t first = 0, stop = block.count;
    if (call.causal || call.window) stop = std::min(stop, own - block.position + 1);
    if (call.window) first = std::max(first, own - call.window + 1 - block.position);
    if (call.starts) first = std::max(first, call.starts[unit.batch] - block.position);
    return stop > first ? Visible{int(first), int(stop)} : Visible{0, 0};
}

// False when the block map says that no row sees a token of the block.
inline bool mapped(const Attend& call, const Unit& unit, const Block& block, int row, int rows) {
    if (!call.map) return true;
    const int per_kv = call.q_heads / call.kv_heads;
    const int64_t column = block.position - call.kv_first;
    for (int h = 0; h < per_kv; ++h)
        for (int64_t i = row / per_kv / call.map_rows; i <= (row + rows - 1) / per_kv / call.map_rows; ++i)
            for (int64_t j = column / call.map_keys; j <= (column + block.count - 1) / call.map_keys; ++j)
                if (call.map[unit.batch * call.map_strides[0] + (unit.kv_head * per_kv + h) * call.map_strides[1] +
                             i * call.map_strides[2] + j * call.map_strides[3]])
                    return true;
    return false;
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
