// Flash attention of some query rows of one KV head over a range of positions: decode and prefill are the same loop.
//
// Per block of tokens K and V become panels once; every few query rows then take scores, a running softmax and the
// weighted values from them. q and the weights of quantised rows are multiplied as integers of 16 bits relative to
// their largest value (as two int8 parts where the CPU has int8 dot products); bfloat16 rows take q and weights as two
// bfloat16 parts, or one where q is bfloat16 itself; other rows are float32. Online softmax: Milakov and Gimelshein
// 2018; tiling: FlashAttention (Dao et al. 2022); rescaling only when the maximum has grown by much:
// FlashAttention-4 (2025). Scores are in units of log 2 until the end.
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
    const Direct* direct = nullptr;                         // in place of v
    const Tables *k_tables, *v_tables;
    const float *k_scale, *v_scale;  // [scale][tokens]
    int64_t position;
    int count, tokens;               // tokens: count padded to whole steps
    const Rows *k_run = nullptr, *v_run;  // where rows of the next block are fetched while values are added, else null
    int64_t next, next_count;
    int ticks;                       // until then
};

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
    MatrixUnit unit;
    Ahead ahead;
    int pause;        // ticks of `ahead` after each step on a row
};

constexpr int64_t WEIGHT_STRIDE = MOST_TOKENS * 4 + 64;  // bytes

// 256 * high + low in wrapping arithmetic: the sum fits even where its parts' does not.
INLINE vi joined(const char* c, int64_t row, int64_t at, int64_t stride, int terms) {
    vi high = load<vi>(c + ((row * terms) * stride + at) * 4);
    if (terms == 1) return high;
    return (high << 8) + load<vi>(c + ((row * terms + 1) * stride + at) * 4);
}

// Scores from rows of K as they are stored.
inline void score_stored(Workspace& work, const Query& query, const Block& block, int rows, int tokens) {
#if defined(__AMX_INT8__)
    const Format& f = *block.k_format;
    const Stored& s = *block.k_stored;
    char* products = work.plain + 18 * ROW_BYTES;
    const StoredRows k = stored_rows(f, s, *block.k_tables, block.k_rows.words, block.k_rows.word_strides[2], block.count,
                                     block.tokens, work.panels[0], work.plain, work.unit, work.ahead);
    const auto score = s.element == BFLOAT ? score_rows_stored<false, false>
                       : s.split || s.planes == 2 ? score_rows_stored<true, true> : score_rows_stored<true, false>;
    score(work.unit, s, k, query.tiles, f.dim, rows, tokens, block.k_scale, block.tokens, f.scale_type != SCALE_NONE, products,
          work.scores, SCORE_STRIDE, work.most, work.ahead);
#endif
}

// Scores [rows][SCORE_STRIDE] of `rows` query rows from `row` on, for `tokens` tokens (a multiple of LANES), and the
// largest of each lane.
inline void score_rows(Workspace& work, const Query& query, const Block& block, int row, int rows, int tokens) {
    if (block.k_stored) return score_stored(work, query, block, rows, tokens);
    const int terms = query.terms;
    Product p = {query.element, nullptr, query.stride, rows * terms, nullptr, block.k.panel, tokens / LANES, 0, work.products,
                 SCORE_STRIDE, false};
    const char* a = query.a + int64_t(row) * terms * query.stride;
    if (query.element != INT8) {
        p.a = a, p.b = block.k.data, p.lines = int(block.k.panel / LINE);
        multiply(work.unit, p);
        work.ahead.tick(work.pause);
        for (int r = 0; r < rows; ++r) {
            const float scale = query.scale[row + r];
            vf most = splat(-INFINITE);
            for (int t = 0; t < tokens; t += LANES) {
                vf s = load<vf>(work.products + ((int64_t)r * terms * SCORE_STRIDE + t) * 4);
                if (terms == 2) s += load<vf>(work.products + ((int64_t)(r * terms + 1) * SCORE_STRIDE + t) * 4);
                s *= scale;
                most = max(most, s);
                store(work.scores + r * SCORE_STRIDE + t, s);
            }
            store(work.most + r * LANES, most);
        }
        return;
    }
    p.lines = query.group / 4;
    for (int g = 0; g < query.groups; ++g)
        for (int plane = 0; plane < block.k_format->planes; ++plane) {
            p.a = a + int64_t(g) * query.group * FACTOR_BYTES;
            p.b = block.k.data + plane * block.k.plane + int64_t(g) * p.lines * LINE;
            multiply(work.unit, p);
            work.ahead.tick(work.pause);
            const float* scales = block.k_scale + int64_t(g) * block.tokens;
            const bool first = g == 0 && plane == 0;
            for (int r = 0; r < rows; ++r) {
                const int64_t at = int64_t(row + r) * query.groups + g;
                const float scale = query.scale[at] * (plane ? 256.0f : 1.0f);
                const int32_t offset = ZERO * query.sum[at];
                float* to = work.scores + r * SCORE_STRIDE;
                vf most = splat(-INFINITE);
                for (int t = 0; t < tokens; t += LANES) {
                    vf s = to_float(joined(work.products, r, t, SCORE_STRIDE, terms) - offset);
                    s *= load<vf>(scales + t) * scale;
                    if (!first) s += load<vf>(to + t);
                    most = max(most, s);
                    store(to + t, s);
                }
                store(work.most + r * LANES, most);
            }
        }
}

INLINE int mask_bytes(const Attend& call) { return call.mask_type == MASK_BOOL ? 1 : call.mask_type == MASK_F32 ? 4 : 2; }

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

// Softcap, bias and visibility of one row; tokens first .. stop - 1 are visible by position. Returns the maxima.
inline vf mask_scores(const Attend& call, float* scores, const char* mask, int64_t column, float slope, int first, int stop) {
    vf top = splat(-INFINITE), lane;
    for (int i = 0; i < LANES; ++i) lane[i] = float(i);
    const float cap = call.softcap * LOG2E;
    for (int t = first / LANES * LANES; t < stop; t += LANES) {
        vf s = load<vf>(scores + t);
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

// A row's share of a block: whole vectors that hold its visible tokens, and what they were multiplied with.
struct Row {
    int begin, end;
    float factor;  // of the integers
    int32_t sum;   // of the integers, when panels have an offset
    vf most;       // largest weights with V's scale
};

// Scores of a row to weights exp2(score - top). With one group of V's scales they are multiplied at once.
template <Element e>
INLINE void soften(const Block& block, float* scores, float top, int terms, bool one_group, char* a, Row& row, float& total) {
    vf added = {}, most = {};
    for (int t = row.begin; t < row.end; t += LANES) {
        vf w = exp2(load<vf>(scores + t) - top);
        added += w;
        if (e == BFLOAT && terms == 1) {  // packed at once
            store(a + 2 * t, to_bfloat(w));
            continue;
        }
        if (e == INT8 && one_group) {
            w *= load<vf>(block.v_scale + t);
            most = max(most, (vf)((vi)w & 0x7fffffff));
        }
        store(scores + t, w);
    }
    row.most = most;
    total += reduce_add(added);
}

// Weights of a row as A of the values, for group g of V's scales.
template <Element e>
INLINE void pack_weights(const Block& block, const float* weights, int g, bool one_group, int tokens, int terms, char* a, Row& row) {
    constexpr int bytes = e == INT8 ? FACTOR_BYTES : e == BFLOAT ? 2 : 4;
    for (int i = 0; i < terms; ++i) {
        char* to = a + i * WEIGHT_STRIDE;
        if (row.begin) std::memset(to, 0, row.begin * bytes);
        if (row.end < tokens) std::memset(to + row.end * bytes, 0, (tokens - row.end) * bytes);
    }
    if constexpr (e == FLOAT) {
        for (int t = row.begin; t < row.end; t += LANES) store(a + t * 4, load<vf>(weights + t));
    } else if constexpr (e == BFLOAT) {
        if (terms == 2)
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
    if (e != INT8 && terms == 1 && columns % LANES == 0) {  // sums stay where they are
        for (int r = 0; r < rows; ++r)
            if (work.rescale[r] != 1.0f)
                for (int c = 0; c < columns; c += LANES) {
                    float* to = out + int64_t(r) * call.v_dim + first + c;
                    store(to, load<vf>(to) * work.rescale[r]);
                }
        return multiply(work.unit, {e, work.weights, WEIGHT_STRIDE, rows, block.v.data + first / LANES * block.v.panel,
                                    block.v.panel, columns / LANES, lines, (char*)(out + first), call.v_dim, true});
    }
    for (int plane = f.planes - 1; plane >= 0; --plane) {
        Product p = {e, work.weights, WEIGHT_STRIDE, rows * terms,
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

// out = out * rescale + weights * values, from rows of V as they are stored
inline void add_rows_stored(const Attend& call, Workspace& work, const Block& block, float* out, int rows, const Row* state) {
#if defined(__AMX_INT8__)
    const Format& f = *block.v_format;
    const Stored& s = *block.v_stored;
    int first, stop;
    clear_weights(work, rows, state, first, stop);
    const StoredRows v = stored_rows(f, s, *block.v_tables, block.v_rows.words, block.v_rows.word_strides[2], block.count,
                                     block.tokens, work.panels[block.k_stored ? 0 : 1], work.plain, work.unit, work.ahead);
    add_stored({f, s, v, first / 16, (stop - first) / 16, work.scores + first, SCORE_STRIDE, rows, block.v_scale + first, block.tokens,
                out, call.v_dim, work.rescale, work.weights, work.products}, work.unit, work.ahead);
#endif
}

// The same in float32 (see direct.h).
inline void add_rows(const Attend& call, Workspace& work, const Block& block, float* out, int rows, const Row* state) {
#if defined(__AVX512F__)
    const Format& f = *block.v_format;
    int first, stop;
    clear_weights(work, rows, state, first, stop);
    const bool scaled = f.scale_type != SCALE_NONE;
    const int group = scaled ? f.group : f.dim;
    const int64_t stride = block.tokens / LANES * WEIGHTS;
    float totals[576 / 32 * MOST_DIRECT], *to = work.shares;
    for (int g = 0; g * group < f.dim; ++g)
        for (int r = 0; r < rows; r += 4, to += stride)
            share_weights(work.scores + r * SCORE_STRIDE, SCORE_STRIDE, std::min(4, rows - r),
                          scaled ? block.v_scale + g * int64_t(block.tokens) : nullptr, first, stop, to, totals + g * rows + r);
    const float factor = f.factor * (block.direct->decoding == FLOAT8 ? 256.0f : 1.0f);
    const Weighted w = {*block.direct, block.v_rows.words, block.v_rows.word_strides[2], first, std::min(stop, block.count),
                        work.shares, stride, rows, group, out, call.v_dim, work.rescale, factor, totals};
    add_direct(w, f, work.unit, work.ahead);
#endif
}

template <Element e>
inline void attend_rows(const Attend& call, const Unit& unit, Workspace& work, const Query& query, const Block& block, int row,
                        int rows) {
    const int per_kv = call.q_heads / call.kv_heads, terms = terms_of(e, call, bfloat_query(call));
    Visible seen[ROWS_PER_MMA];
    int stop = 0;
    for (int r = 0; r < rows; ++r) {
        seen[r] = visible(call, unit, block, unit.row_first + row + r);
        stop = std::max(stop, seen[r].stop);
    }
    if (!stop || !mapped(call, unit, block, unit.row_first + row, rows)) return;
    score_rows(work, query, block, row, rows, int(round_up(stop, LANES)));

    float *top = unit.top + row, *total = unit.total + row;
    Row state[ROWS_PER_MMA];
    bool any = false;
    // a single bfloat16 holds the largest weight exactly if it is 1
    const float slack = e == BFLOAT && terms == 1 ? 0.0f : SLACK;
    for (int r = 0; r < rows; ++r) {
        vf most = load<vf>(work.most + r * LANES);
        if (call.mask || call.softcap || seen[r].first > 0 || seen[r].stop < stop || stop % LANES) {
            const int at = unit.row_first + row + r, head = unit.kv_head * per_kv + at % per_kv;
            const char* mask = nullptr;
            if (call.mask) {
                mask = call.mask + mask_bytes(call) * (unit.batch * call.mask_strides[0] + head * call.mask_strides[1] +
                                                       at / per_kv * call.mask_strides[2]);
            }
            const float slope = (call.slopes ? call.slopes[head] : 1.0f) * LOG2E;
            most = mask_scores(call, work.scores + r * SCORE_STRIDE, mask, block.position - call.kv_first, slope, seen[r].first,
                               seen[r].stop);
        }
        const float highest = reduce_max(most);
        state[r] = Row{seen[r].first / LANES * LANES, int(round_up(seen[r].stop, LANES)), 0.0f, 0, vf{}};
        work.rescale[r] = 1.0f;
        if (highest == -INFINITE) {
            state[r].begin = state[r].end = 0;
            continue;
        }
        any = true;
        if (highest > top[r] + slack) {
            work.rescale[r] = exp2(splat(top[r] - highest))[0];
            total[r] *= work.rescale[r];
            top[r] = highest;
        }
    }
    if (!any) return;

    const Format& f = *block.v_format;
    const int group = e == INT8 ? f.group : f.dim, tokens = int(round_up(stop, TOKENS_PER_STEP));
    const int lines = tokens * size_of(e) / 4;
    const bool one_group = group == f.dim;
    for (int r = 0; r < rows; ++r) {
        soften<e>(block, work.scores + r * SCORE_STRIDE, top[r], terms, one_group,
                  work.weights + int64_t(r) * terms * WEIGHT_STRIDE, state[r], total[r]);
        if (block.v_stored) work.unit.nudge();
        work.ahead.step(work.pause);
    }
    if (block.v_stored) {
        if (block.k_run)
            work.ahead.aim_keys(*block.k_format, *block.k_run, f, *block.v_run, block.next, block.next_count, block.ticks);
        return add_rows_stored(call, work, block, unit.out + int64_t(row) * call.v_dim, rows, state);
    }
    if (block.direct) return add_rows(call, work, block, unit.out + int64_t(row) * call.v_dim, rows, state);
    for (int g = 0; g * group < f.dim; ++g) {
        for (int r = 0; r < rows; ++r) {
            pack_weights<e>(block, work.scores + r * SCORE_STRIDE, g, one_group, tokens, terms,
                            work.weights + int64_t(r) * terms * WEIGHT_STRIDE, state[r]);
            work.ahead.tick(work.pause);
        }
        for (int c = 0; c < group; c += COLUMNS)
            add_values(call, work, block, e, terms, unit.out + int64_t(row) * call.v_dim, rows, g * group + c,
                       std::min(COLUMNS, group - c), lines, state);
    }
}

// Tokens per block: few rows keep the panels in the first cache, many rows spread the cost of making them. Weights of
// quantised rows are rounded relative to the largest of a block, so these blocks stay short.
INLINE int tokens_per_block(const Attend& call, int rows) {
    int64_t bytes = 1;
    bool integers = false, stored = false;
    for (int i = 0; i < call.n_runs; ++i) {
        stored |= multiplies_stored(*call.runs[i].v_format, rows);
        for (const Format* f : {call.runs[i].k_format, call.runs[i].v_format})
            bytes = std::max(bytes, plain_stride(*f) * f->planes);
        integers |= element_of(*call.runs[i].v_format) == INT8;
    }
    if (rows > 64) return integers ? 128 : MOST_TOKENS;
    if (stored) return 64;  // lines and spread weights stay in the first cache
    return int(std::clamp<int64_t>(16384 / bytes / 64 * 64, 64, 128));
}

struct Layout {  // of the scratch memory
    int64_t used = 0;
    char* base;
    explicit Layout(char* base) : base(base) {}
    char* take(int64_t bytes) {
        char* at = base + used;
        used += round_up(bytes, 64);
        return at;
    }
};

inline size_t attend_memory(const Attend& call, int rows, Workspace* work, char** queries, float** scales, char* base) {
    Layout layout(base);
    const int64_t tokens = tokens_per_block(call, rows), dims[2] = {round_up(call.k_dim, 64), round_up(call.v_dim, 64)};
    char* products = layout.take(int64_t(ROWS_PER_MMA) * SCORE_STRIDE * 4);
    char* scores = layout.take(int64_t(ROWS_PER_MMA) * SCORE_STRIDE * 4);
    char* weights = layout.take(int64_t(ROWS_PER_MMA) * WEIGHT_STRIDE);
    char* most = layout.take(int64_t(ROWS_PER_MMA) * LINE);
    char* rescale = layout.take(ROWS_PER_MMA * 4);
    char* first_query = layout.take(3 * query_bytes(call, rows));
    char* shares = nullptr;
    if (rows <= MOST_DIRECT) shares = layout.take(dims[1] / 32 * round_up(rows, 4) * tokens * 4);
    char* sides[2][2];
    for (int i = 0; i < 2; ++i) {
        sides[i][0] = layout.take(tokens * dims[i] * 4 + dims[i] / LANES * 2 * LINE);
        sides[i][1] = layout.take(tokens * dims[i] / 32 * 4);
    }
    char* rows_scratch = layout.take(4 * ROWS_AT_ONCE * int64_t(ROW_BYTES));
    if (base) {
        work->products = products, work->scores = (float*)scores, work->weights = weights, work->most = (float*)most, work->rescale = (float*)rescale;
        work->shares = (float*)shares;
        *queries = first_query, work->plain = rows_scratch;
        for (int i = 0; i < 2; ++i) work->panels[i] = sides[i][0], scales[i] = (float*)sides[i][1];
    }
    return layout.used;
}

inline size_t attend_scratch(const Attend& call, int rows) {
    return attend_memory(call, rows, nullptr, nullptr, nullptr, nullptr);
}

inline void attend(const Attend& call, const Unit& unit, char* scratch) {
    Workspace work;
    char* next_query;
    float* scales[2];
    attend_memory(call, unit.rows, &work, &next_query, scales, scratch);
    std::fill(unit.out, unit.out + int64_t(unit.rows) * call.v_dim, 0.0f);
    std::fill(unit.top, unit.top + unit.rows, -INFINITE);
    std::fill(unit.total, unit.total + unit.rows, 0.0f);
    Query queries[3];
    int packed = 0;
    bool fresh = true;  // zeros are in any order
    const int per_block = tokens_per_block(call, unit.rows);
    for (int i = 0; i < call.n_runs; ++i) {
        const Run& run = call.runs[i];
        const int64_t first = std::max(run.position, unit.first), stop = std::min(run.position + run.count, unit.stop);
        if (first >= stop) continue;
        const Format &kf = *run.k_format, &vf_ = *run.v_format;
        bool k_stored = multiplies_stored(kf, unit.rows), v_stored = multiplies_stored(vf_, unit.rows);
        if (with_panels_too(kf) && !v_stored && !adds_direct(vf_, unit.rows)) k_stored = false;
        if (with_panels_too(vf_) && !k_stored) v_stored = false;
        const bool direct = !v_stored && adds_direct(vf_, unit.rows);
        const Element ke = element_of(kf), ve = direct || v_stored ? FLOAT : element_of(vf_);
        const Tables k_tables(kf), v_tables(vf_);
        const Stored k_order(kf, k_stored), v_order(vf_, v_stored);
        const int group = ke == INT8 ? kf.group : kf.dim;
        int which = 0;
        auto fits = [&](const Query& q) { return q.element == ke && q.group == group && q.factor == kf.factor && q.planes == kf.planes && q.sorted == (packed_tokens(kf) && !k_stored) && (q.tiles != nullptr) == k_stored; };
        while (which < packed && !fits(queries[which])) ++which;
        if (which == packed) {
            queries[packed++] = pack_query(call, unit, kf, k_stored ? &k_order : nullptr, next_query);
            next_query += query_bytes(call, unit.rows);
        }
        const Query& query = queries[which];
        auto head = [&](Rows rows) {
            rows.words += unit.batch * rows.word_strides[0] + unit.kv_head * rows.word_strides[1];
            rows.scale += unit.batch * rows.scale_strides[0] + unit.kv_head * rows.scale_strides[1];
            return rows;
        };
        const Rows k = head(run.k), v = head(run.v);
        const int most = ROWS_PER_MMA / std::max(query.terms, terms_of(ve, call, bfloat_query(call)));
        const Direct values = direct ? direct_of(vf_) : Direct{};
        if (direct && !fresh) turn_columns(values, unit.out, unit.rows, call.v_dim, vf_.dim, false);
        if (v_stored && !fresh) turn_columns(v_order, unit.out, unit.rows, call.v_dim, vf_.dim, false);
        fresh = false;
        for (int64_t at = first; at < stop; at += per_block) {
            Block block;
            block.k_format = &kf, block.v_format = &vf_;
            block.position = at;
            block.count = int(std::min<int64_t>(per_block, stop - at));
            block.tokens = int(round_up(block.count, TOKENS_PER_STEP));
            const int64_t slot = at - run.position, next = std::min<int64_t>(per_block, stop - at - block.count);
            const int k_ticks = k_stored ? block.tokens / 16 * stored_ticks(kf, k_order) : panel_ticks(kf, block.tokens, true);
            const int v_ticks = v_stored ? block.tokens / 16 * stored_ticks(vf_, v_order)
                                : direct ? block.count * DIRECT_PACE * direct_passes(vf_, unit.rows) : panel_ticks(vf_, block.tokens, false);
            if (k_stored && v_stored) {
                const int pauses = 2 * k_ticks;
                work.ahead.aim_values(vf_, v, slot, block.count, k_ticks + pauses);
                work.pause = pauses / (unit.rows + 1);
                block.k_run = &k, block.v_run = &v, block.next = slot + block.count, block.next_count = next, block.ticks = v_ticks;
            } else {
                const int pauses = (k_ticks + v_ticks) / 4;
                work.ahead.aim(kf, k, vf_, v, slot + block.count, next, k_ticks + v_ticks + pauses);
                work.pause = pauses / (2 * unit.rows + 2);
            }
            block.k_rows = k, block.k_tables = &k_tables, block.v_rows = v, block.v_tables = &v_tables;
            block.k_rows.words += slot * k.word_strides[2], block.v_rows.words += slot * v.word_strides[2];
            work.unit.keep_awake();
            if (k_stored)
                block.k_stored = &k_order;
            else
                block.k = k_panels(kf, k_tables, k, slot, block.count, block.tokens, work.panels[0], work.plain, work.unit, work.ahead);
            if (v_stored)
                block.v_stored = &v_order;
            else if (direct)
                block.direct = &values;
            else
                block.v = v_panels(vf_, v_tables, v, slot, block.count, block.tokens, work.panels[1], work.plain, work.unit, work.ahead);
            expand_scales(kf, k, slot, block.count, block.tokens, scales[0]);
            expand_scales(vf_, v, slot, block.count, block.tokens, scales[1]);
            block.k_scale = scales[0], block.v_scale = scales[1];
            for (int row = 0; row < unit.rows; row += most) {
                const int rows = std::min(most, unit.rows - row);
                if (ve == INT8)
                    attend_rows<INT8>(call, unit, work, query, block, row, rows);
                else if (ve == BFLOAT)
                    attend_rows<BFLOAT>(call, unit, work, query, block, row, rows);
                else
                    attend_rows<FLOAT>(call, unit, work, query, block, row, rows);
            }
        }
        if (direct) turn_columns(values, unit.out, unit.rows, call.v_dim, vf_.dim, true);
        if (v_stored) turn_columns(v_order, unit.out, unit.rows, call.v_dim, vf_.dim, true);
    }
    for (int r = 0; r < unit.rows; ++r) unit.top[r] *= LN2;
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
