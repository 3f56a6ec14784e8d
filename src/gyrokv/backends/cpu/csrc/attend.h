// Flash attention of some query rows of one KV head over a range of positions: decode and prefill are the same loop, but
// for many rows on a matrix unit (see prefill.h).
//
// Per block of tokens K and V become panels once; every few query rows then take scores, a running softmax and the
// weighted values from them. q and the weights of quantised rows are multiplied as integers of 16 bits relative to
// their largest value (as two int8 parts where the CPU has int8 dot products); bfloat16 rows take q and weights as two
// bfloat16 parts, or one where q is bfloat16 itself; other rows are float32. Online softmax: Milakov and Gimelshein
// 2018; tiling: FlashAttention (Dao et al. 2022); rescaling only when the maximum has grown by much:
// FlashAttention-4 (2025). Scores are in units of log 2 until the end.
#pragma once
#include "weights.h"

namespace gyrokv {
namespace GYROKV_ISA {

// Scores from rows of K as they are stored.
inline void score_stored(Workspace& work, const Query& query, const Block& block, int rows, int tokens) {
#if defined(__AMX_INT8__)
    const Format& f = *block.k_format;
    const Stored& s = *block.k_stored;
    char* products = work.plain + 18 * ROW_BYTES;
    const StoredRows k = stored_rows(f, s, *block.k_tables, block.k_rows.words, block.k_rows.word_strides[2], block.count,
                                     block.tokens, work.plain);
    const bool many = s.rows > STORED_ROWS;
    const auto score = s.element == BFLOAT ? (many ? score_many_rows<false, false> : score_rows_stored<false, EIGHT>)
                       : many ? (s.split ? score_many_rows<true, true> : score_many_rows<true, false>)
                       : s.split ? score_rows_stored<true, SCALED>
                       : s.planes == 2 ? score_rows_stored<true, SIXTEEN> : score_rows_stored<true, EIGHT>;
    score(work.unit, k, query.tiles, rows, tokens, block.k_scale, block.tokens, f.scale_type != SCALE_NONE, work.panels[0],
          products, work.scores, SCORE_STRIDE, work.most, work.ahead);
#endif
}

// Scores [rows][SCORE_STRIDE] of `rows` query rows from `row` on, for `tokens` tokens (a multiple of LANES), and the
// largest of each lane. Returns what the scores, not their largest, have yet to be multiplied with.
inline float score_rows(Workspace& work, const Query& query, const Block& block, int row, int rows, int tokens) {
    if (block.k_stored) {
        score_stored(work, query, block, rows, tokens);
        return 1.0f;
    }
    const Format& f = *block.k_format;
    [[maybe_unused]] const KeyRows keys = {block.k_rows.words, block.k_rows.word_strides[2], int(row_bytes(f)), block.count, work.plain};
#if defined(GYROKV_QUADS)
    if (block.k_quads) {
        QuadScores k = {.order = *block.k_quads, .tables = *block.k_tables, .keys = keys, .again = row > 0, .k_scale = block.k_scale,
                        .scale_stride = block.tokens, .tokens = tokens, .q = {}, .scores = work.scores, .score_stride = SCORE_STRIDE,
                        .most = work.most, .ahead = work.ahead};
        const int first = row / quad_pass(KEY_ROWS, block.k_quads->most_rows);
        for (int i = first, n; rows > 0; ++i, rows -= n, k.scores += n * SCORE_STRIDE, k.most += n * LANES, k.again = true) {
            k.q = query.passes[i], n = k.q.rows;
            score_quads(f, query.terms, k);
        }
        return 1.0f;
    }
#endif
    const int terms = query.terms;
#if defined(GYROKV_DENSE)
    if (block.k_dense) {
        const char* q = query.a + int64_t(row) * terms * query.stride;
        score_dense(f, rows, terms,
                    {.keys = keys, .q = q, .q_stride = query.stride, .tokens = tokens, .turned = query.turned, .scores = work.scores,
                     .score_stride = SCORE_STRIDE, .most = work.most,
                     .room = work.plain + LANES * round_up(int64_t(keys.bytes), LINE), .ahead = work.ahead});
        const float scale = query.scale[row];  // of all rows
        for (int r = 0; r < rows; ++r) store(work.most + r * LANES, load<vf>(work.most + r * LANES) * scale);
        return scale;
    }
#endif
    Product p = {query.element, nullptr, query.stride, rows * terms, nullptr, block.k.panel, tokens / LANES, 0, work.products,
                 SCORE_STRIDE, false};
    const char* a = query.a + int64_t(row) * terms * query.stride;
    if (query.element != INT8) {
        if (terms == 1) p.c = (char*)work.scores;
        p.a = a, p.b = block.k.data, p.lines = int(block.k.panel / LINE);
        multiply(work.unit, p);
        work.ahead.tick(work.pause);
        const float scale = query.scale[row];  // of all rows
        for (int r = 0; r < rows; ++r) {
            const char* product = p.c + int64_t(r) * terms * SCORE_STRIDE * 4;
            float* score = work.scores + r * SCORE_STRIDE;
            vf most = splat(-INFINITE);
            for (int t = 0; t < tokens; t += LANES) {
                vf s = load<vf>(product + t * 4);
                if (terms == 2) s += load<vf>(product + (SCORE_STRIDE + t) * 4), store(score + t, s);
                most = max(most, s);
            }
            store(work.most + r * LANES, most * scale);
        }
        return scale;
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
    return 1.0f;
}

template <Element e>
inline void attend_rows(const Attend& call, const Unit& unit, Workspace& work, const Query& query, const Block& block, int row,
                        int rows) {
    const int per_kv = call.q_heads / call.kv_heads, terms = terms_of(e, call, bfloat_query(call));
    const Visible least = visible(call, unit, block, unit.row_first + row);
    const Visible most = visible(call, unit, block, unit.row_first + row + rows - 1);
    const bool whole = least.stop == block.count && most.stop == block.count && !most.first;  // for each of the rows
    Visible seen[ROWS_PER_MMA];
    int stop = 0;
    for (int r = 0; r < rows; ++r) {
        seen[r] = whole ? most : visible(call, unit, block, unit.row_first + row + r);
        stop = std::max(stop, seen[r].stop);
    }
    if (!stop || !mapped(call, unit, block, unit.row_first + row, rows)) return;
    float scale = score_rows(work, query, block, row, rows, int(round_up(stop, LANES)));
    work.ahead.next();

    float *top = unit.top + row, *total = unit.total + row;
    Row state[ROWS_PER_MMA];
    bool any = false;
    // a single bfloat16 holds the largest weight exactly if it is 1
    const float slack = e == BFLOAT && terms == 1 ? 0.0f : SLACK;
    const bool masked = call.mask || call.softcap || !whole || stop % LANES;
    for (int r = 0; r < rows; ++r) {
        vf most = load<vf>(work.most + r * LANES);
        if (masked) {
            const int at = unit.row_first + row + r, head = unit.kv_head * per_kv + at % per_kv;
            const char* mask = mask_row(call, unit, at);
            const float slope = (call.slopes ? call.slopes[head] : 1.0f) * LOG2E;
            most = mask_scores(call, work.scores + r * SCORE_STRIDE, scale, mask, block.position - call.kv_first, slope,
                               seen[r].first, seen[r].stop);
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
    if (masked) scale = 1.0f;

    const Format& f = *block.v_format;
    const int group = e == INT8 ? f.group : f.dim, tokens = int(round_up(stop, TOKENS_PER_STEP));
    const int lines = tokens * size_of(e) / 4;
    const bool one_group = group == f.dim, apart = e == INT8 || terms == 2;
    bool ready = false;  // the weights, for rows of V as they are stored
#if defined(__AMX_INT8__)
    if (block.v_stored && block.v_stored->element == INT8 && !block.v_stored->split) {
        ready = true;
        for (int r = 0; r < rows; ++r) ready &= state[r].begin == 0 && state[r].end == block.tokens;
        if (ready)
            soften_bytes(*block.v_stored, block.tokens, work.scores, SCORE_STRIDE, scale, rows, block.v_scale, top, total,
                         work.weights);
    }
#endif
    for (int r = 0; r < rows && !ready; ++r) {
        float* scores = work.scores + r * SCORE_STRIDE;
        if (e == BFLOAT && !apart) {
            soften_short(scores, scale, top[r], tokens, state[r], total[r]);
        } else {
            if (block.v_quads) soften<e, 4>(block, scores, scale, top[r], one_group, state[r], total[r]);
            else soften<e>(block, scores, scale, top[r], one_group, state[r], total[r]);
            if (!apart && !block.direct && !block.v_stored && !block.v_quads) {  // they are multiplied where they are
                std::memset(scores, 0, state[r].begin * 4);
                std::memset(scores + state[r].end, 0, (tokens - state[r].end) * 4);
            }
        }
        if (block.v_stored) work.unit.nudge();
        work.ahead.tick(work.pause);
    }
    if (block.v_stored) return add_rows_stored(call, work, block, unit.out + int64_t(row) * call.v_dim, rows, state, ready);
    if (block.v_quads) return add_rows_quads(call, work, block, unit.out + int64_t(row) * call.v_dim, rows, state);
    if (block.direct) return add_rows(call, work, block, unit.out + int64_t(row) * call.v_dim, rows, state);
    for (int g = 0; g * group < f.dim; ++g) {
        for (int r = 0; r < rows && apart; ++r) {
            if constexpr (e != FLOAT)
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
// quantised rows are rounded relative to the largest of a block, so these blocks stay short; codes side by side round them by halves, and
// are taken in longer blocks, but those of 8 bits, which take more time so.
// Rows that are read as they are stored take no more room than they do in memory.
INLINE int tokens_per_block(const Attend& call, int rows) {
    int64_t bytes = 1;
    bool integers = false, stored = false, short_blocks = false, whole_bytes = false, quads = true, packed = true;
    for (int i = 0; i < call.n_runs; ++i)
        for (const Format* f : {call.runs[i].k_format, call.runs[i].v_format}) {
            const bool takes = takes_quads(*f, rows, call.terms);
            quads &= takes, packed &= takes || takes_dense(*f, rows);
        }
    for (int i = 0; i < call.n_runs; ++i) {
        const Format& v = *call.runs[i].v_format;
        stored |= multiplies_stored(v, rows);
        short_blocks |= v.kind == CODES && v.bits == 8;  // their rows fill the first cache
        for (const Format* f : {call.runs[i].k_format, call.runs[i].v_format})
            whole_bytes |= f->bits == 8, bytes = std::max(bytes, packed ? row_bytes(*f) : plain_stride(*f) * f->planes);
        integers |= element_of(*call.runs[i].v_format) == INT8;
    }
    if (quads && whole_bytes) return int(std::clamp<int64_t>(QUAD_BLOCK * 5 / 8 / bytes / 64 * 64, 64, QUAD_TOKENS / 4));
    if (quads) return int(std::clamp<int64_t>(QUAD_BLOCK / bytes / 64 * 64, 64, QUAD_TOKENS));
    if (rows > 64) return integers ? 128 : MOST_TOKENS;
    if (stored) return short_blocks ? 64 : MOST_STORED_TOKENS;
    const int longest = packed && (rows > 1 || bytes < 128) ? MOST_TOKENS : 128;
    return int(std::clamp<int64_t>((packed ? 32768 : 16384) / bytes / 64 * 64, 64, longest));
}

// Rows that pass over a block before others do: what they need stays in a core's own cache, beside the panels. More rows
// share the panels of several blocks, which are made once.
constexpr int MOST_BLOCKS = 16;
INLINE int rows_at_once(const Attend& call) {
    return int(std::clamp<int64_t>(RESIDENT / (2 * call.k_dim + 4 * call.v_dim) / 32 * 32, 128, 512));
}
INLINE int blocks_at_once(const Attend& call, int rows) { return rows > rows_at_once(call) ? MOST_BLOCKS : 1; }

// Room for the panels of a block of K or V (`side` 0 or 1), or for lines of either (see lines.h).
INLINE int64_t panel_bytes(const Attend& call, int side, int rows, int64_t tokens) {
    if (rows <= MOST_STORED) return round_up(std::max(call.k_dim, call.v_dim), 64) * (tokens * 4 + 8);
    int64_t bytes = 0;  // of a value
    for (int i = 0; i < call.n_runs; ++i) {
        const Format& f = side ? *call.runs[i].v_format : *call.runs[i].k_format;
        if (takes_quads(f, rows, call.terms)) continue;
        bytes = std::max<int64_t>(bytes, size_of(element_of(f)) * f.planes);
    }
    const int64_t dim = round_up(side ? call.v_dim : call.k_dim, 64);
    return tokens * dim * bytes + dim / LANES * 2 * LINE;
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
#if defined(__AMX_BF16__)
    if (takes_squares(call, rows, false)) {
        const SquareMemory squares = square_memory(call, rows, [&](int64_t bytes) { return layout.take(bytes); });
        if (base) work->squares = squares;
        if (takes_squares(call, rows, true)) return layout.used;
    }
#endif
    const int64_t per_block = tokens_per_block(call, rows), dims[2] = {round_up(call.k_dim, 64), round_up(call.v_dim, 64)};
    char* products = layout.take(int64_t(ROWS_PER_MMA) * SCORE_STRIDE * 4);
    char* scores = layout.take(int64_t(ROWS_PER_MMA) * SCORE_STRIDE * 4);
    char* weights = layout.take(std::max(int64_t(WEIGHT_ROWS) * WEIGHT_STRIDE, quad_weight_bytes(call.v_dim)));
    char* most = layout.take(int64_t(ROWS_PER_MMA) * LINE);
    char* rescale = layout.take(ROWS_PER_MMA * 4);
    char* first_query = layout.take(3 * query_bytes(call, rows));
    char* shares = nullptr;
    if (rows <= MOST_DIRECT) shares = layout.take(dims[1] / 32 * round_up(rows, 4) * per_block * 4);
    char* sides[2][2];
    for (int i = 0; i < 2; ++i) {
        sides[i][0] = layout.take(blocks_at_once(call, rows) * panel_bytes(call, i, rows, per_block));
        sides[i][1] = layout.take(blocks_at_once(call, rows) * per_block * dims[i] / 32 * 4);
    }
    char* rows_scratch = layout.take(4 * ROWS_AT_ONCE * int64_t(ROW_BYTES));
    if (base) {
        work->products = products, work->weights = weights;
        work->scores = (float*)scores, work->most = (float*)most, work->rescale = (float*)rescale;
        work->shares = (float*)shares;
        *queries = first_query, work->plain = rows_scratch;
        for (int i = 0; i < 2; ++i) work->panels[i] = sides[i][0], scales[i] = (float*)sides[i][1];
    }
    return layout.used;
}

inline size_t attend_scratch(const Attend& call, int rows) {
    return attend_memory(call, rows, nullptr, nullptr, nullptr, nullptr);
}

INLINE Rows rows_of(Rows rows, int batch, int kv_head) {
    rows.words += batch * rows.word_strides[0] + kv_head * rows.word_strides[1];
    rows.scale += batch * rows.scale_strides[0] + kv_head * rows.scale_strides[1];
    return rows;
}

// Asks for the first block of the thread's next unit.
inline void ask_for_next_unit(const Attend& call, const Unit& unit, int per_block, Ahead::Wanted wanted, Ahead& ahead) {
    for (int i = 0; i < call.n_runs; ++i) {
        const Run& run = call.runs[i];
        const int64_t slot = std::max<int64_t>(unit.next_first - run.position, 0), count = std::min<int64_t>(per_block, run.count - slot);
        if (count <= 0) continue;
        return ahead.add(*run.k_format, rows_of(run.k, unit.next_batch, unit.next_head), *run.v_format,
                         rows_of(run.v, unit.next_batch, unit.next_head), slot, count, wanted);
    }
}

// Calls of Ahead::tick between the panels of one block and of the next, `pause` each.
INLINE int steps_between(const Format& kf, const Format& vf_, int rows) {
    auto groups = [](const Format& f) { return element_of(f) == INT8 ? f.dim / f.group : 1; };
    const int columns = vf_.dim / groups(vf_), products = (columns + COLUMNS - 1) / COLUMNS * vf_.planes;
    return groups(kf) * kf.planes + rows + groups(vf_) * (rows + products);
}

// True when the rows are finished, not only summed.
inline bool attend(const Attend& call, const Unit& unit, char* scratch) {
    Workspace work;
    char* next_query;
    float* scales[2];
    attend_memory(call, unit.rows, &work, &next_query, scales, scratch);
    std::fill(unit.top, unit.top + unit.rows, -INFINITE);
    std::fill(unit.total, unit.total + unit.rows, 0.0f);
    bool cleared = false;  // unit.out
    Query queries[3];
    int packed = 0;
    const int per_block = tokens_per_block(call, unit.rows);
    for (int i = 0; i < call.n_runs; ++i) {
        const Run& run = call.runs[i];
        const int64_t first = std::max(run.position, unit.first), stop = std::min(run.position + run.count, unit.stop);
        if (first >= stop) continue;
        const Format &kf = *run.k_format, &vf_ = *run.v_format;
        const Rows k = rows_of(run.k, unit.batch, unit.kv_head), v = rows_of(run.v, unit.batch, unit.kv_head);
#if defined(__AMX_BF16__)
        if (takes_squares(kf, vf_, unit.rows)) {
            if (attend_squares(call, unit, run, k, v, first, stop, work.squares, work.unit, work.ahead)) return true;
            cleared = true;
            continue;
        }
#endif
        const bool k_stored = multiplies_stored(kf, unit.rows), v_stored = multiplies_stored(vf_, unit.rows);
        const bool k_quads = !k_stored && takes_quads(kf, unit.rows, call.terms);
        const bool k_dense = !k_stored && takes_dense(kf, unit.rows);
        const bool v_quads = !v_stored && takes_quads(vf_, unit.rows, call.terms);
        const bool v_pairs = !v_stored && adds_pairs(vf_, unit.rows);
        const bool direct = v_pairs || (!v_stored && !v_quads && adds_direct(vf_, unit.rows));
        const Element ke = element_of(kf), ve = direct || v_stored || v_quads ? FLOAT : element_of(vf_);
        const bool k_bytes = k_dense && kf.kind == FP8_E4M3 && ke == BFLOAT, k_turned = k_dense && turns_rows(kf, unit.rows);
        const Tables &k_tables = tables_of(kf, 0), &v_tables = tables_of(vf_, 1);
        const Stored k_order(kf, k_stored ? unit.rows : 0, terms_of(ke, call, bfloat_query(call)));
        const Quads* k_parts = k_quads ? &quads_of<Quads>(kf, call.terms) : nullptr;
        const ColumnQuads* v_parts = v_quads ? &quads_of<ColumnQuads>(vf_, call.terms) : nullptr;
        const Stored v_order(vf_, v_stored ? unit.rows : 0, call.terms);
        const int group = ke == INT8 ? kf.group : kf.dim;
        int which = 0;
        auto fits = [&](const Query& q) {
            return q.element == ke && q.group == group && q.factor == kf.factor && q.word_factor == k_tables.word_factor &&
                   q.planes == kf.planes &&
                   q.sorted == (packed_tokens(kf) && !k_stored && !k_quads) && (q.tiles != nullptr) == k_stored &&
                   q.quads == (k_quads ? kf.bits : 0) && q.bytes == k_bytes && q.turned == k_turned;
        };
        while (which < packed && !fits(queries[which])) ++which;
        if (which == packed) {
            queries[packed++] = pack_query(call, unit, kf, k_stored ? &k_order : nullptr, k_parts, k_bytes, k_turned,
                                           k_tables.word_factor, next_query);
            next_query += query_bytes(call, unit.rows);
        }
        const Query& query = queries[which];
        const int most = ROWS_PER_MMA / std::max(k_quads || k_dense ? 1 : query.terms, terms_of(ve, call, bfloat_query(call)));
        const Direct direct_values = direct && !v_pairs ? direct_of(vf_) : Direct{};
        const bool fresh = !cleared;  // zeros are in any order
        if (fresh) std::fill_n(unit.out, int64_t(unit.rows) * call.v_dim, 0.0f);
        cleared = true;
        if (direct && !v_pairs && !fresh) turn_columns(direct_values, unit.out, unit.rows, call.v_dim, vf_.dim, false);
        if (v_stored && !fresh) turn_columns(v_order, unit.out, unit.rows, call.v_dim, vf_.dim, false);
        const int together = blocks_at_once(call, unit.rows), passing = std::min(unit.rows, rows_at_once(call));
        Block blocks[MOST_BLOCKS];
        for (int64_t at = first; at < stop;) {
            int made = 0;
            for (; made < together && at < stop; ++made) {
                Block& block = blocks[made];
                block.k_format = &kf, block.v_format = &vf_;
                block.position = at;
                block.count = int(std::min<int64_t>(per_block, stop - at));
                block.tokens = int(round_up(block.count, TOKENS_PER_STEP));
                const int64_t slot = at - run.position, next = std::min<int64_t>(per_block, stop - at - block.count);
                const bool apart = (k_quads || k_dense) && (v_quads || direct);  // values of a block are asked for after its keys
                const Ahead::Wanted wanted = {true, !apart};
                work.ahead.start();
                if (k_stored && v_stored) {
                    work.pause = row_ticks(k_order, v_order) * block.tokens / 64;
                    work.ahead.add(kf, k, vf_, v, slot + block.count, next, wanted);
                    work.ahead.until(stored_ticks(k_order, v_order, unit.rows, block.tokens));
                } else {
                    const int keys = k_stored ? block.tokens / 32 * k_score_ticks(k_order) : k_quads ? quad_ticks(*k_parts, unit.rows, block.tokens)
                                     : k_dense ? dense_ticks(kf, unit.rows, block.tokens)
                                     : panel_ticks(kf, block.tokens, true);
                    const int values = v_quads ? value_ticks(vf_.dim, unit.rows, block.tokens)
                                       : v_pairs ? pair_ticks(vf_, unit.rows, block.count)
                                       : direct ? block.count * DIRECT_PACE * direct_passes(vf_, unit.rows)
                                              : panel_ticks(vf_, block.tokens, false);
                    const bool mostly_products = ke == INT8 && !apart && !MATRIX_UNIT;  // and panels take less
                    const int pauses = together > 1 ? 0 : mostly_products ? keys + values : (keys + values) / 4;
                    const bool asks = together == 1 || !apart;  // else nothing is computed before the next block is here
                    if (apart && asks) work.ahead.add_words(vf_, v, slot, block.count), work.ahead.mark();
                    if (at + block.count == unit.stop && unit.next_first >= 0 && keys + values > 0)
                        ask_for_next_unit(call, unit, per_block, wanted, work.ahead);
                    else if (asks)
                        work.ahead.add(kf, k, vf_, v, slot + block.count, next, wanted);
                    work.pause = pauses / (apart ? 2 * unit.rows + 2 : steps_between(kf, vf_, unit.rows));
                    work.ahead.until(keys, values + (apart ? unit.rows * work.pause : pauses));
                }
                block.k_rows = k, block.k_tables = &k_tables, block.v_rows = v, block.v_tables = &v_tables;
                block.k_rows.words += slot * k.word_strides[2], block.v_rows.words += slot * v.word_strides[2];
                work.unit.keep_awake();
                if (k_stored)
                    block.k_stored = &k_order;
                else if (k_quads)
                    block.k_quads = k_parts;
                else if (k_dense)
                    block.k_dense = true;
                else
                    block.k = k_panels(kf, k_tables, k, slot, block.count, block.tokens,
                                       work.panels[0] + made * panel_bytes(call, 0, unit.rows, per_block), work.plain, work.unit,
                                       work.ahead);
                if (v_stored)
                    block.v_stored = &v_order;
                else if (v_quads)
                    block.v_quads = v_parts;
                else if (direct)
                    block.direct = &direct_values;
                else
                    block.v = v_panels(vf_, v_tables, v, slot, block.count, block.tokens,
                                       work.panels[1] + made * panel_bytes(call, 1, unit.rows, per_block), work.plain, work.unit,
                                       work.ahead);
                float* k_scale = scales[0] + made * (per_block * round_up(call.k_dim, 64) / 32);
                float* v_scale = scales[1] + made * (per_block * round_up(call.v_dim, 64) / 32);
                expand_scales(kf, k, slot, block.count, block.tokens, k_scale);
                expand_scales(vf_, v, slot, block.count, block.tokens, v_scale);
                block.k_scale = k_scale, block.v_scale = v_scale;
                at += block.count;
            }
            for (int begin = 0; begin < unit.rows; begin += passing)
                for (int i = 0; i < made; ++i)
                    for (int row = begin; row < std::min(unit.rows, begin + passing); row += most) {
                        const int rows = std::min(most, std::min(unit.rows, begin + passing) - row);
                        const Block& block = blocks[i];
                        if (ve == INT8)
                            attend_rows<INT8>(call, unit, work, query, block, row, rows);
                        else if (ve == BFLOAT)
                            attend_rows<BFLOAT>(call, unit, work, query, block, row, rows);
                        else
                            attend_rows<FLOAT>(call, unit, work, query, block, row, rows);
                    }
        }
        if (direct && !v_pairs) turn_columns(direct_values, unit.out, unit.rows, call.v_dim, vf_.dim, true);
        if (v_stored) turn_columns(v_order, unit.out, unit.rows, call.v_dim, vf_.dim, true);
    }
    if (!cleared) std::fill_n(unit.out, int64_t(unit.rows) * call.v_dim, 0.0f);
    for (int r = 0; r < unit.rows; ++r) unit.top[r] *= LN2;
    return false;
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
