// Scores of a few rows to weights, and what these add to the output: see attend.h.
#pragma once
#include <array>
#include <bit>

#include "dense_values.h"
#include "prefill.h"
#include "quad_values.h"

namespace gyrokv {
namespace GYROKV_ISA {

// What a few rows need while they pass over a block.
struct Workspace {
    char* products;   // int32 or float [ROWS_PER_MMA][SCORE_STRIDE]
    float* scores;    // [rows][SCORE_STRIDE]; then the softmax weights
    float* most;      // [rows][LANES]: largest scores
    char* weights;    // A of the values
    char* plain;      // rows of a few tokens
    char* panels[2];  // of K and V
    float* rescale;   // [rows]
    float* shares;    // weights with V's scale (see direct.h)
#if defined(__AMX_BF16__)
    SquareMemory squares;
#endif
    MatrixUnit unit;
    Ahead ahead;
    int pause;        // ticks of `ahead` after each step on a row
};

constexpr int WEIGHT_ROWS = 32;  // of a product: query rows times parts

// 256 * high + low in wrapping arithmetic: the sum fits even where its parts' does not.
INLINE vi joined(const char* c, int64_t row, int64_t at, int64_t stride, int terms) {
    vi high = load<vi>(c + ((row * terms) * stride + at) * 4);
    if (terms == 1) return high;
    return (high << 8) + load<vi>(c + ((row * terms + 1) * stride + at) * 4);
}

// A row's share of a block: whole vectors that hold its visible tokens, and what they were multiplied with.
struct Row {
    int begin, end;
    float factor;  // of the integers
    int32_t sum;   // of the integers, when panels have an offset
    vf most;       // largest weights with V's scale
};

// Scores of a row to weights exp2(score * scale - top). With one group of V's scales they are multiplied at once.
template <Element e, int degree = 5>
INLINE void soften(const Block& block, float* scores, float scale, float top, bool one_group, Row& row, float& total) {
    vf added = {}, most = {};
    for (int t = row.begin; t < row.end; t += LANES) {
        vf w = exp2<degree>(fma(load<vf>(scores + t), splat(scale), splat(-top)));
        added += w;
        if (e == INT8 && one_group) {
            w *= load<vf>(block.v_scale + t);
            most = max(most, (vf)((vi)w & 0x7fffffff));
        }
        store(scores + t, w);
    }
    row.most = most;
    total += reduce_add(added);
}

// The same, to bfloat16 in the place of the scores, with zeros for those of `tokens` that the row does not see.
INLINE void soften_short(float* scores, float scale, float top, int tokens, const Row& row, float& total) {
    char* to = (char*)scores;
    vf added[2] = {};
    int t = row.begin;
    auto weight = [&](int at) { return exp2<3>(fma(load<vf>(scores + at), splat(scale), splat(-top))); };
    for (; t + 2 * LANES <= row.end; t += 2 * LANES) {
        const vf a = weight(t), b = weight(t + LANES);
        added[0] += a, added[1] += b;
        store(to + 2 * t, to_bfloat(a, b));
    }
    if (t < row.end) {
        const vf a = weight(t);
        added[0] += a;
        store(to + 2 * t, to_bfloat(a));
    }
    std::memset(to, 0, 2 * row.begin);
    std::memset(to + 2 * row.end, 0, 2 * (tokens - row.end));
    total += reduce_add(added[0] + added[1]);
}

// Weights of a row as A of the values, for group g of V's scales.
template <Element e>
INLINE void pack_weights(const Block& block, const float* weights, int g, bool one_group, int tokens, int terms, char* a, Row& row) {
    constexpr int bytes = e == INT8 ? FACTOR_BYTES : 2;
    for (int i = 0; i < terms; ++i) {
        char* to = a + i * WEIGHT_STRIDE;
        if (row.begin) std::memset(to, 0, row.begin * bytes);
        if (row.end < tokens) std::memset(to + row.end * bytes, 0, (tokens - row.end) * bytes);
    }
    if constexpr (e == BFLOAT) {
        for (int t = row.begin; t < row.end; t += LANES) store_bfloats(load<vf>(weights + t), a, WEIGHT_STRIDE, t, terms);
    } else {
        const float* scales = block.v_scale + int64_t(g) * block.tokens;
        auto weight = [&](int t) {
            vf w = load<vf>(weights + t);
            return one_group ? w : w * load<vf>(scales + t);
        };
        if (!one_group) {
            vf most = {};
            for (int t = row.begin; t < row.end; t += LANES) most = max(most, (vf)((vi)weight(t) & 0x7fffffff));
            row.most = most;
        }
        const float largest = largest_factor(terms), size = reduce_max(row.most);
        const float inverse = size > 1e-30f ? largest / size : 0.0f;
        vi added = {};
        for (int t = row.begin; t < row.end; t += LANES) {
            vi w = round_int(weight(t) * inverse);
            if (ZERO) added += w;
            store_factors(w, a, WEIGHT_STRIDE, t, terms);
        }
        if (ZERO) row.sum = reduce_add(added);
        row.factor = size / largest;
    }
}

// out [rows][dim] = out * rescale + weights * values, for columns first .. first + columns - 1
inline void add_values(const Attend& call, Workspace& work, const Block& block, Element e, int terms, float* out, int rows,
                       int first, int columns, int lines, const Row* weights) {
    const Format& f = *block.v_format;
    const bool apart = e == INT8 || terms == 2;  // from the scores
    const char* a = apart ? work.weights : (const char*)work.scores;
    const int64_t a_stride = apart ? WEIGHT_STRIDE : SCORE_STRIDE * 4;
    if (!apart && columns % LANES == 0) {  // sums stay where they are
        for (int r = 0; r < rows; ++r)
            if (work.rescale[r] != 1.0f)
                for (int c = 0; c < columns; c += LANES) {
                    float* to = out + int64_t(r) * call.v_dim + first + c;
                    store(to, load<vf>(to) * work.rescale[r]);
                }
        return multiply(work.unit, {e, a, a_stride, rows, block.v.data + first / LANES * block.v.panel,
                                    block.v.panel, columns / LANES, lines, (char*)(out + first), call.v_dim, true});
    }
    for (int plane = f.planes - 1; plane >= 0; --plane) {
        Product p = {e, a, a_stride, rows * terms,
                     block.v.data + plane * block.v.plane + first / LANES * block.v.panel, block.v.panel,
                     (columns + LANES - 1) / LANES, lines, work.products, VALUE_STRIDE, false};
        multiply(work.unit, p);
        work.ahead.tick(work.pause);
        for (int r = 0; r < rows; ++r) {
            float* to = out + int64_t(r) * call.v_dim + first;
            const float old = plane + 1 == f.planes ? work.rescale[r] : 1.0f;
            const float scale = e == INT8 ? weights[r].factor * f.factor * (plane ? 256.0f : 1.0f) : 1.0f;
            const int32_t offset = ZERO * weights[r].sum;
            for (int c = 0; c < columns; c += LANES) {
                vf value;
                if (e == INT8) {
                    value = to_float(joined(work.products, r, c, VALUE_STRIDE, terms) - offset);
                } else {
                    value = load<vf>(work.products + ((int64_t)r * terms * VALUE_STRIDE + c) * 4);
                    if (terms == 2) value += load<vf>(work.products + ((int64_t)(r * terms + 1) * VALUE_STRIDE + c) * 4);
                }
                if (c + LANES <= columns) {
                    store(to + c, fma(load<vf>(to + c), splat(old), value * scale));
                } else {
                    for (int i = 0; c + i < columns; ++i) to[c + i] = to[c + i] * old + value[i] * scale;
                }
            }
        }
    }
}

// Tokens that any row sees, from a multiple of LANES on; weights [rows][SCORE_STRIDE] of others among them become zero.
INLINE void clear_weights(Workspace& work, int rows, const Row* state, int& first, int& stop) {
    first = MOST_TOKENS, stop = 0;
    for (int r = 0; r < rows; ++r)
        if (state[r].end) first = std::min(first, state[r].begin), stop = std::max(stop, state[r].end);
    for (int r = 0; r < rows; ++r) {
        float* weights = work.scores + r * SCORE_STRIDE;
        std::fill(weights + first, weights + std::max(first, state[r].begin), 0.0f);
        std::fill(weights + std::max(first, state[r].end), weights + stop, 0.0f);
    }
}

// The same, and those of the `tokens` before and behind become zero too.
INLINE void clear_all_weights(Workspace& work, int rows, const Row* state, int tokens, int& first, int& stop) {
    clear_weights(work, rows, state, first, stop);
    for (int r = 0; r < rows; ++r) {
        float* weights = work.scores + r * SCORE_STRIDE;
        std::fill_n(weights, first, 0.0f);
        std::fill(weights + stop, weights + tokens, 0.0f);
    }
}

// out = out * rescale + weights * values, from rows of V as they are stored; `ready`: weights are what soften_bytes made
inline void add_rows_stored(const Attend& call, Workspace& work, const Block& block, float* out, int rows, const Row* state,
                            bool ready) {
#if defined(__AMX_INT8__)
    const Format& f = *block.v_format;
    int first = 0, stop = block.tokens;
    if (!ready) clear_all_weights(work, rows, state, block.tokens, first, stop);
    const StoredRows v = stored_rows(f, *block.v_stored, *block.v_tables, block.v_rows.words, block.v_rows.word_strides[2],
                                     block.count, block.tokens, work.plain);
    add_stored({v, block.tokens, first, stop, work.scores, SCORE_STRIDE, rows, block.v_scale, block.tokens, out, call.v_dim,
                work.rescale, work.panels[block.k_stored ? 0 : 1], work.weights, work.products, ready}, work.unit, work.ahead);
#endif
}

// The same in float32 (see direct.h).
inline void add_rows(const Attend& call, Workspace& work, const Block& block, float* out, int rows, const Row* state) {
    const Format& f = *block.v_format;
    int first, stop;
    clear_weights(work, rows, state, first, stop);
    stop = std::min(stop, block.count);
#if defined(GYROKV_QUADS)
    if (adds_pairs(f, rows)) {
        for (int r = 0; r < rows; ++r)
            split_weights(work.scores + r * SCORE_STRIDE, first, stop, work.weights + 2 * r * WEIGHT_STRIDE);
        const int64_t stride = block.v_rows.word_strides[2];
        const PairValues v = {block.v_rows.words + first * stride, stride, stop - first, f.dim, work.weights + 2 * first, rows, out,
                              call.v_dim, work.rescale, work.panels[1], work.ahead};
        return f.kind == BF16 ? add_pairs<false>(v) : add_pairs<true>(v);
    }
#endif
    const bool scaled = f.scale_type != SCALE_NONE;
    const int group = scaled ? f.group : f.dim;
    const int64_t stride = block.tokens / LANES * WEIGHTS;
    float totals[640 / 32 * MOST_DIRECT], *to = work.shares;
    for (int g = 0; g * group < f.dim; ++g)
        for (int r = 0; r < rows; r += 4, to += stride)
            share_weights(work.scores + r * SCORE_STRIDE, SCORE_STRIDE, std::min(4, rows - r),
                          scaled ? block.v_scale + g * int64_t(block.tokens) : nullptr, first, stop, to, totals + g * rows + r);
    const Weighted w = {*block.direct, block.v_rows.words, block.v_rows.word_strides[2], first, stop,
                  work.shares, stride, rows, f.dim, group, out, call.v_dim, work.rescale, f.factor, totals};
    add_direct(w, work.unit, work.ahead);
}

// The same from rows of codes side by side.
inline void add_rows_quads(const Attend& call, Workspace& work, const Block& block, float* out, int rows, const Row* state) {
#if defined(GYROKV_QUADS)
    const Format& f = *block.v_format;
    int first, stop;
    clear_all_weights(work, rows, state, block.tokens, first, stop);
    const int64_t bytes = row_bytes(f), stride = block.v_rows.word_strides[2];
    const int whole = (block.count - block.v_quads->beyond) / 64 * 64, left = block.count - whole;
    const char* last = block.v_rows.words + whole * stride;
    if (stride == bytes) std::memcpy(work.plain, last, left * bytes);
    for (int t = 0; t < left && stride != bytes; ++t) std::memcpy(work.plain + t * bytes, last + t * stride, bytes);
    add_quads({*block.v_quads, *block.v_tables, f, block.v_rows.words, stride, bytes, whole, block.tokens, work.plain, first,
               stop, work.scores, SCORE_STRIDE, block.v_scale, call.terms, out, call.v_dim, work.rescale, work.weights, work.ahead},
              rows);
#endif
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
