// q of a unit as operand A of the scores: integers of 16 bits per row and group of K's scale, bfloat16 or float32.
#pragma once
#include <limits>

#include "dense_scores.h"
#include "exp.h"
#include "scores.h"
#include "turn.h"

namespace gyrokv {
namespace GYROKV_ISA {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;
constexpr float LOWEST = -65504.0f;  // a mask value up to this means masked
constexpr float SLACK = 8.0f;        // a new maximum within 2^8 of the old one rescales nothing
constexpr int64_t RESIDENT = 768 << 10;  // bytes of q and of the output that stay in a core's own cache
constexpr int MOST_TOKENS = 256;     // per block; products of 16 and 8 bits of so many still fit 32
constexpr int COLUMNS = 128;         // of the output per product
// Rows of operands start a line apart from powers of two, so that they spread over the sets of a cache.
constexpr int SCORE_STRIDE = std::max(MOST_TOKENS, TAKES_QUADS ? QUAD_TOKENS : 0) + 16, VALUE_STRIDE = COLUMNS + 16;  // elements
constexpr int64_t WEIGHT_STRIDE = MOST_TOKENS * 4 + 64;                      // bytes

INLINE int terms_of(Element e, const Attend& call, bool exact) {
    if (e == INT8) return FACTOR_BYTES == 2 ? 1 : call.terms;
    return e == BFLOAT && !exact ? 2 : 1;
}
INLINE bool bfloat_query(const Attend& call) { return call.q_kind == BF16 && !call.q_turn; }
INLINE float largest_factor(int terms) { return FACTOR_BYTES == 2 || terms == 2 ? 32512.0f : 127.0f; }

// Integers to where A keeps them: `at` elements (a multiple of LANES) into rows `stride` bytes apart.
INLINE void store_factors(vi q, char* row, int64_t stride, int64_t at, int terms) {
    if constexpr (FACTOR_BYTES == 2) {
        store_crossed_words(row + 2 * at, q);
    } else if (terms == 1) {
        store_bytes(row + at, q);
    } else {
        store_bytes(row + at, (q + 128) >> 8);
        store_bytes(row + stride + at, q);  // its low byte is what the high part leaves
    }
}
INLINE void store_bfloats(vf x, char* row, int64_t stride, int64_t at, int terms) {
    const vh high = to_bfloat(x);
    store(row + 2 * at, high);
    if (terms == 2) store(row + stride + 2 * at, to_bfloat(x - to_float(high)));
}

// Query row `row` times `sign` as K is stored, rotated if K is: q [k_dim], and zeros up to MOST_VALUES if it has them.
inline void load_query(const Attend& call, const Unit& unit, int row, float sign, float* q) {
    const int per_kv = call.q_heads / call.kv_heads, head = unit.kv_head * per_kv + row % per_kv, token = row / per_kv;
    const char* from = call.q + unit.batch * call.q_strides[0] + head * call.q_strides[1] + token * call.q_strides[2];
    for (int i = 0; i < call.k_dim; i += LANES) store(q + i, load_values(call.q_kind, from, i, call.q_dim) * sign);
    if (call.q_turn) turn_row(*call.q_turn, q, call.k_dim);
}

// q of a unit as the operand A of scores with one kind of K.
struct Query {
    Element element;
    int group, groups, terms;
    bool sorted;      // each four values as 0, 2, 1, 3, like lines of packed rows
    bool bytes;       // of fp8 rows: as their lines are (see float8.h), or, if turned, in order
    bool turned;      // see turned_scores.h
    float factor, word_factor;  // of the format, which are in the scale
    char* a;
    int64_t stride;   // bytes; a row of q is `terms` rows of A
    float* scale;     // [rows][groups], with the scale of the scores in it
    int32_t* sum;     // [rows][groups]: sum of the integers, when panels have an offset
    int planes;
    char* tiles;      // see stored.h, where rows of K are multiplied as they are stored; else null
    int quads;        // see quad_scores.h: bits of a code where rows of K are taken so, else 0
    QuadQuery* passes;
};

INLINE int64_t query_stride(const Attend& call) { return round_up(call.k_dim, 64) * 4 + 64; }
#if defined(GYROKV_QUADS)
INLINE int64_t quad_passes_bytes(int rows) { return round_up((rows / 4 + 2) * int64_t(sizeof(QuadQuery)), 64); }
#endif
INLINE int64_t query_bytes(const Attend& call, int rows) {
    const int64_t groups = round_up(call.k_dim, 32) / 32;
    int64_t packed = stored_query_bytes(call.k_dim, rows);
#if defined(GYROKV_QUADS)
    for (int i = 0; i < call.n_runs && !packed; ++i)
        if (takes_quads(*call.runs[i].k_format, rows, call.terms)) packed = quad_passes_bytes(rows) + quad_query_bytes(call.k_dim, rows + 1);
#endif
    return round_up((rows + 1) * (2 * query_stride(call) + groups * 8), 64) + 64 + packed;
}

inline Query pack_query(const Attend& call, const Unit& unit, const Format& f, const Stored* stored, const Quads* quads, bool bytes,
                        bool turned, float word_factor, char* to) {
    Query made;
    made.element = element_of(f);
    made.group = made.element == INT8 ? f.group : f.dim;
    made.groups = f.dim / made.group;
    made.terms = terms_of(made.element, call, bfloat_query(call));
    made.factor = f.factor, made.word_factor = word_factor;
    made.planes = f.planes;
    made.sorted = packed_tokens(f) && !stored && !quads;
    made.bytes = bytes, made.turned = turned;
    made.a = to;
    made.stride = query_stride(call);
    made.scale = (float*)(to + (unit.rows + 1) * 2 * made.stride);
    made.sum = (int32_t*)(made.scale + (unit.rows + 1) * made.groups);
    const float factor = (call.softcap ? call.scale / call.softcap : call.scale * LOG2E) * f.factor;
    const float base = std::abs(factor), sign = factor < 0.0f ? -1.0f : 1.0f;  // the largest product is the largest score
    alignas(64) float q[MOST_VALUES] = {};
    int16_t places[MOST_VALUES];
    for (int i = 0; bytes && i < f.dim; ++i) places[i / 2 + i % 2 * (f.dim / 2)] = turned ? i : float8_place(i, f.dim);
    for (int r = 0; r < unit.rows; ++r) {
        load_query(call, unit, unit.row_first + r, sign, q);
        if (made.sorted)
            for (int i = 1; i < call.k_dim; i += 4) std::swap(q[i], q[i + 1]);
        if (bytes) {
            alignas(64) float own[MOST_VALUES];
            std::memcpy(own, q, sizeof q);
            for (int i = 0; i < f.dim; ++i) q[places[i]] = own[i];
        }
        char* a = made.a + int64_t(r) * made.terms * made.stride;
        for (int g = 0; g < made.groups; ++g) {
            const float* part = q + g * made.group;
            float scale = 1.0f;
            const int end = g + 1 == made.groups ? int(round_up(call.k_dim, 64)) - g * made.group : made.group;
            vi sum = {};
            if (made.element == INT8) {
                vf most = {};
                for (int i = 0; i < made.group; i += LANES) most = max(most, (vf)((vi)load<vf>(part + i) & 0x7fffffff));
                const float largest = largest_factor(made.terms), size = reduce_max(most);
                scale = size / largest;
                const float inverse = size > 1e-30f ? largest / size : 0.0f;
                for (int i = 0; i < made.group; i += LANES) {
                    vi x = round_int(load<vf>(part + i) * inverse);
                    sum += x;
                    store_factors(x, a, made.stride, g * made.group + i, made.terms);
                }
            } else if (made.element == BFLOAT) {
                for (int i = 0; i < end; i += LANES) store_bfloats(load<vf>(part + i), a, made.stride, i, made.terms);
            } else {
                std::memcpy(a, part, end * 4);
            }
            made.scale[r * made.groups + g] = scale * base;
            made.sum[r * made.groups + g] = reduce_add(sum);
        }
    }
    for (int r = unit.rows; r < round_up(unit.rows, 32) && r < 2 * unit.rows / made.terms; ++r)  // see prefill.h
        std::memset(made.a + int64_t(r) * made.stride, 0, made.stride);
    made.tiles = nullptr, made.quads = quads ? f.bits : 0;
    [[maybe_unused]] char* after = (char*)(made.sum + unit.rows * made.groups);
    after += -intptr_t(after) & 63;
#if defined(__AMX_INT8__)
    if (stored) {
        made.tiles = after;
        const auto pack = stored->rows > STORED_ROWS ? pack_many_tiles : pack_tiles;
        pack(f, *stored, made.a, made.stride, unit.rows, made.terms, made.scale, made.groups, made.tiles);
    }
#elif defined(GYROKV_QUADS)
    made.passes = (QuadQuery*)after;
    if (quads) {
        after += quad_passes_bytes(unit.rows);  // a row of zeros, where a pass has one more
        std::memset(made.a + int64_t(unit.rows) * made.terms * made.stride, 0, made.terms * made.stride);
        std::fill_n(made.scale + unit.rows * made.groups, made.groups, 0.0f);
    }
    for (int r = 0, i = 0; quads && r < unit.rows; ++i) {
        const int rows = key_pass(r, unit.rows, quads->most_rows);
        made.passes[i] = pack_quads(f, *quads, made.a + int64_t(r) * made.terms * made.stride, made.stride, rows, made.terms,
                                    made.scale + r * made.groups, word_factor, after);
        after += quad_query_bytes(call.k_dim, rows), r += rows;
    }
#endif
    return made;
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
