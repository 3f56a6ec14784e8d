// Many query rows on a matrix unit, with rows of any format as bfloat16: see panels of terms in terms.h.
//
// 32 rows pass over a block of tokens together. Their products with 32 tokens go to a buffer that stays in the first
// cache, and become weights while the unit multiplies the next 32 tokens; the weights of all tokens of the block are then
// multiplied with the values. No maxima are taken while every score is at most SLACK above the row's largest so far (the
// lazy rescaling of FlashAttention-4, 2025). The sum of the weights is that of the rounded ones.
#pragma once
#include "block.h"
#include "finish.h"
#include "terms.h"

namespace gyrokv {
namespace GYROKV_ISA {

#if defined(__AMX_BF16__)

struct SquareBlock : Block {
    Factor keys, values;
};

// Sums of a window of a unit's rows, and what 32 of them need while they pass over a block.
struct Tiles {
    int first, rows; // the window
    float* out;      // [rows / 32][v_dim / 32][4 tiles], the second two of the second 16 rows
    float* sums;     // [rows][LANES] of the weights
    float* top;      // [rows]: largest score so far but for SLACK, -INFINITE before there is one
    float* shift;    // [rows]: -top, or 0 before there is one
    float* scores;   // [2][32][32]
    char* weights;   // [terms][steps][2] tiles of 16 rows and 32 tokens
    int64_t square;  // floats of 32 rows of `out`
};

constexpr int64_t SQUARE_BYTES = 2 * SQUARE * SQUARE * 4 + WEIGHT_BYTES;
INLINE int64_t tiles_bytes(const Attend& call, int window) {
    return SQUARE_BYTES + round_up(window, SQUARE) * (round_up(call.v_dim, SQUARE) + LANES + 2) * 4;
}

inline Tiles tiles_at(const Attend& call, int window, char* memory) {
    Tiles made;
    const int64_t all = round_up(window, SQUARE), dim = round_up(call.v_dim, SQUARE);
    made.first = made.rows = 0;
    made.square = SQUARE * dim;
    made.scores = (float*)memory;
    made.weights = memory + 2 * SQUARE * SQUARE * 4;
    made.out = (float*)(memory + SQUARE_BYTES);
    made.sums = made.out + all * dim;
    made.top = made.sums + all * LANES;
    made.shift = made.top + all;
    return made;
}

// LANES values of a row's output from column `c` on.
INLINE float* tile_row(const Tiles& tiles, int row, int c) {
    return tiles.out + row / SQUARE * tiles.square + c / SQUARE * 4 * 16 * LANES + (row % SQUARE / 16 * 2 + c / LANES % 2) * 16 * LANES +
           row % 16 * LANES;
}

// A row's values from tiles, or to them.
INLINE void gather_row(const Attend& call, const Tiles& tiles, int row, float* to) {
    for (int c = 0; c < call.v_dim; c += LANES) std::memcpy(to + c, tile_row(tiles, row, c), 4 * std::min(LANES, call.v_dim - c));
}
INLINE void scatter_row(const Attend& call, const Tiles& tiles, int row, const float* from) {
    for (int c = 0; c < call.v_dim; c += LANES) std::memcpy(tile_row(tiles, row, c), from + c, 4 * std::min(LANES, call.v_dim - c));
}

// `rows` of a unit from `first` on become the window.
inline void enter_tiles(const Attend& call, const Unit& unit, Tiles& tiles, int first, int rows) {
    tiles.first = first, tiles.rows = rows;
    const int64_t all = round_up(rows, SQUARE);
    std::memset(tiles.out, 0, all / SQUARE * tiles.square * 4);
    std::memset(tiles.sums, 0, all * LANES * 4);
    for (int r = 0; r < all; ++r) {
        tiles.top[r] = r < rows ? unit.top[first + r] : 0.0f;
        tiles.shift[r] = tiles.top[r] == -INFINITE ? 0.0f : -tiles.top[r];
        if (r >= rows || tiles.top[r] == -INFINITE) continue;
        tiles.sums[r * LANES] = unit.total[first + r];
        scatter_row(call, tiles, r, unit.out + int64_t(first + r) * call.v_dim);
    }
}
// A row's output and log-sum-exp, as finish() makes them of one split.
inline void finish_row(const Attend& call, const Unit& unit, const Tiles& tiles, int r) {
    const int64_t per_kv = call.q_heads / call.kv_heads, row = unit.row_first + tiles.first + r;
    const int64_t head = unit.kv_head * per_kv + row % per_kv, place = (unit.batch * call.q_heads + head) * call.q_len + row / per_kv;
    const float total = reduce_add(load<vf>(tiles.sums + r * LANES)), top = tiles.top[r] * LN2;
    const float sink = call.sinks ? call.sinks[head] : -INFINITE;
    const bool none = top == -INFINITE;
    float weight = none ? 0.0f : 1.0f / total;
    if (sink == -INFINITE) {
        call.lse[place] = none ? -INFINITE : top + std::log(total);
    } else {
        const double most = std::max(double(sink), double(top)), own = std::exp(double(top) - most);
        const double sum = std::exp(sink - most) + own * total;
        weight = float(own / sum), call.lse[place] = float(most + std::log(sum));
    }
    alignas(64) float out[MOST_VALUES];
    for (int c = 0; c < call.v_dim; c += LANES) store(out + c, load<vf>(tile_row(tiles, r, c)) * weight);
    store_output(call, place, out);
}

// The window back to the unit, or, when it is done, to the output.
inline void leave_tiles(const Attend& call, const Unit& unit, const Tiles& tiles, bool done) {
    for (int r = 0; r < tiles.rows; ++r) {
        if (done) {
            finish_row(call, unit, tiles, r);
            continue;
        }
        unit.top[tiles.first + r] = tiles.top[r];
        unit.total[tiles.first + r] = reduce_add(load<vf>(tiles.sums + r * LANES));
        gather_row(call, tiles, r, unit.out + int64_t(tiles.first + r) * call.v_dim);
    }
}

// Weights of 32 tokens of a row. Returns the larger of each two scores beyond the row's top.
template <int terms>
INLINE vf soften_square(const float* scores, float scale, float shift, char* to) {
    const vf a = fma(load<vf>(scores), splat(scale), splat(shift)), b = fma(load<vf>(scores + LANES), splat(scale), splat(shift));
    store_terms<terms>(exp2<terms == 1 ? 3 : 5>(a), exp2<terms == 1 ? 3 : 5>(b), to, WEIGHT_BYTES / 2);
    return max(a, b);
}

// Rows `row` .. + 31 of a unit over a block.
template <int weight_terms>
class Square {
   public:
    Square(const Attend& call, const Unit& unit, Tiles& tiles, const Factor& query, float scale, const SquareBlock& block, int row)
        : call_(call), unit_(unit), tiles_(tiles), query_(query), scale_(scale), block_(block), row_(row), at_(row - tiles.first),
          rows_(std::min(SQUARE, tiles.rows - at_)) {}

    void attend() {
        if (!look()) return;
        memory_barrier();
        score(first_, [] {});
        const int turns = 4 * query_.steps * products(query_, block_.keys);
        for (int t = first_; t < stop_; ++t) {
            const bool plain = !masked_ && !fresh_;
            vf most = splat(-INFINITE);
            const float *from = scores(t), *shift = tiles_.shift + at_;
            char* to = weights(0, t);
            auto soften = [&]() __attribute__((always_inline)) {
                most = max(most, soften_square<weight_terms>(from, scale_, *shift++, to)), from += SQUARE, to += LINE;
            };
            if (plain && t + 1 < stop_) {  // 32 rows in so many turns
                int due = 0;
                score(t + 1, [&]() __attribute__((always_inline)) {
                    for (due += SQUARE; due >= turns; due -= turns) soften();
                });
            } else {
                if (t + 1 < stop_) score(t + 1, [] {});
                for (int r = 0; plain && r < SQUARE; ++r) soften();
            }
            if (!plain || reduce_max(most) > SLACK) mask(t);
        }
        if (any_) add_values();
    }

   private:
    // What the rows see of the block; false when it is nothing.
    bool look() {
        const Visible least = visible(call_, unit_, block_, unit_.row_first + row_);
        const Visible most = visible(call_, unit_, block_, unit_.row_first + row_ + rows_ - 1);
        const bool whole = least.stop == block_.count && most.stop == block_.count && !most.first;
        int first = block_.count, stop = 0;
        fresh_ = false;
        for (int r = 0; r < rows_; ++r) {
            seen_[r] = whole ? most : visible(call_, unit_, block_, unit_.row_first + row_ + r);
            if (seen_[r].stop) first = std::min(first, seen_[r].first), stop = std::max(stop, seen_[r].stop);
            fresh_ |= tiles_.top[at_ + r] == -INFINITE;
        }
        masked_ = !whole || call_.mask || call_.softcap || block_.count % SQUARE;
        any_ = !masked_;
        first_ = first / SQUARE, stop_ = (stop + SQUARE - 1) / SQUARE;
        return stop && mapped(call_, unit_, block_, unit_.row_first + row_, rows_);
    }

    template <class Side>
    inline __attribute__((always_inline)) void score(int t, Side side) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        const Factor q = query_.at(row_ / SQUARE), k = block_.keys.at(t);
        if (q.steps * q.terms > FAR_STEPS)
            multiply_terms<true>(q, k, q.steps, side);
        else
            multiply_terms<false>(q, k, q.steps, side);
        float* to = scores(t);
        _tile_stored(0, to, 2 * LINE);
        _tile_stored(2, to + 16 * SQUARE, 2 * LINE);
        _tile_stored(1, to + LANES, 2 * LINE);
        _tile_stored(3, to + 16 * SQUARE + LANES, 2 * LINE);
        memory_barrier();
    }
    float* scores(int t) { return tiles_.scores + t % 2 * SQUARE * SQUARE; }
    char* weights(int r, int t, int term = 0) { return tiles_.weights + term * (WEIGHT_BYTES / 2) + 2 * t * TILE + r * LINE; }

    // Weights of 32 tokens of which not all are visible, or whose scores may be larger than any before.
    void mask(int t) {
        const int per_kv = call_.q_heads / call_.kv_heads, from = t * SQUARE;
        fresh_ = false;
        for (int r = 0; r < rows_; ++r) {
            const int at = unit_.row_first + row_ + r, head = unit_.kv_head * per_kv + at % per_kv;
            const int first = std::clamp(seen_[r].first - from, 0, SQUARE), stop = std::clamp(seen_[r].stop - from, 0, SQUARE);
            float* s = scores(t) + r * SQUARE;
            float highest = -INFINITE;
            if (first < stop) {
                const char* mask = mask_row(call_, unit_, at);
                const float slope = (call_.slopes ? call_.slopes[head] : 1.0f) * LOG2E;
                const int64_t column = block_.position - call_.kv_first + from;
                highest = reduce_max(mask_scores(call_, s, scale_, mask, column, slope, first, stop));
            }
            std::fill(s, s + (first < stop ? first / LANES * LANES : SQUARE), -INFINITE);
            std::fill(s + (first < stop ? round_up(stop, LANES) : SQUARE), s + SQUARE, -INFINITE);
            float& top = tiles_.top[at_ + r];
            if (highest > top + SLACK) {
                rescale(r, t, exp2(splat(top - highest))[0]);
                top = highest, tiles_.shift[at_ + r] = -highest;
            }
            fresh_ |= top == -INFINITE;
            any_ |= highest > -INFINITE;
            soften_square<weight_terms>(s, 1.0f, tiles_.shift[at_ + r], weights(r, t));
        }
        for (int r = rows_; r < SQUARE; ++r)
            for (int i = 0; i < weight_terms; ++i) std::memset(weights(r, t, i), 0, LINE);
    }

    // Of a row: its output, its sum and its weights before token 32 t of the block.
    void rescale(int r, int t, float by) {
        float* sum = tiles_.sums + (at_ + r) * LANES;
        store(sum, load<vf>(sum) * by);
        for (int c = 0; c < call_.v_dim; c += LANES) {
            float* to = tile_row(tiles_, at_ + r, c);
            store(to, load<vf>(to) * by);
        }
        for (int i = first_; i < t; ++i) {
            vf w[2] = {};
            for (int j = 0; j < 2 * weight_terms; ++j) w[j % 2] += bfloat_to_float(weights(r, i, j / 2) + j % 2 * LINE / 2);
            store_terms<weight_terms>(w[0] * by, w[1] * by, weights(r, i), WEIGHT_BYTES / 2);
        }
    }

    // out += weights * values, sums += weights
    void add_values() {
        const __m512bh ones = (__m512bh)splat_of<vec<uint16_t>>(0x3f80);
        for (int r = 0; r < SQUARE; r += 4) {  // four sums at a time
            float* sum = tiles_.sums + (at_ + r) * LANES;
            __m512 added[4];
            for (int j = 0; j < 4; ++j) added[j] = (__m512)load<vf>(sum + j * LANES);
            for (int i = 0; i < weight_terms; ++i)
                for (int t = first_; t < stop_; ++t)
                    for (int j = 0; j < 4; ++j)
                        added[j] = _mm512_dpbf16_ps(added[j], (__m512bh)load<line>(weights(r + j, t, i)), ones);
            for (int j = 0; j < 4; ++j) store(sum + j * LANES, (vf)added[j]);
        }
        memory_barrier();
        const Factor w = {weights(0, first_), 0, WEIGHT_BYTES / 2, weight_terms, stop_ - first_};
        float* out = tiles_.out + at_ / SQUARE * tiles_.square;
        for (int p = 0; p * SQUARE < call_.v_dim; ++p, out += 4 * 16 * LANES) {
            Factor v = block_.values.at(p);
            v.data += 2 * first_ * TILE;
            if (w.steps * weight_terms > FAR_STEPS)
                add_columns<true>(out, w, v);
            else
                add_columns<false>(out, w, v);
        }
        memory_barrier();
    }

    template <bool far>
    static inline __attribute__((always_inline)) void add_columns(float* out, const Factor& w, const Factor& v) {
        constexpr int tile = 16 * LANES;
        _tile_loadd(0, out, LINE);
        _tile_loadd(1, out + tile, LINE);
        _tile_loadd(2, out + 2 * tile, LINE);
        _tile_loadd(3, out + 3 * tile, LINE);
        multiply_terms<far>(w, v, w.steps, [] {});
        _tile_stored(0, out, LINE);
        _tile_stored(2, out + 2 * tile, LINE);
        _tile_stored(1, out + tile, LINE);
        _tile_stored(3, out + 3 * tile, LINE);
    }

    const Attend& call_;
    const Unit& unit_;
    Tiles& tiles_;
    const Factor& query_;
    const float scale_;
    const SquareBlock& block_;
    const int row_, at_, rows_;  // of the unit; of the window
    Visible seen_[SQUARE];
    int first_, stop_;  // in steps of 32 tokens
    bool masked_, fresh_, any_;
};

// Whether `rows` of q pass over rows of these formats in squares. Fewer do not repay the panels of codes, which as integers
// are cheaper to make, most of all where a row has one scale. Rows of float32 keep all of their bits.
INLINE bool takes_squares(const Format& k, const Format& v, int rows) {
    if (k.kind == F32 || v.kind == F32) return false;
    auto least = [](const Format& f) { return one_term(f) ? 17 : f.kind == CODES && f.planes == 1 && f.group == f.dim ? 64 : 32; };
    return rows >= std::max(least(k), least(v));
}
INLINE bool takes_squares(const Attend& call, int rows, bool every) {  // some run, or every one
    bool some = false, all = true;
    for (int i = 0; i < call.n_runs; ++i) {
        const bool takes = takes_squares(*call.runs[i].k_format, *call.runs[i].v_format, rows);
        some |= takes, all &= takes;
    }
    return every ? all : some;
}

// Rows that pass over a block before others do: what they need stays in a core's own cache, beside the panels. More rows
// share the panels of several blocks, which are made once.
INLINE int square_window(const Attend& call, int rows) {
    const int terms = bfloat_query(call) ? 1 : 2;
    return int(std::min<int64_t>(rows, std::clamp<int64_t>(RESIDENT / (2 * terms * call.k_dim + 4 * call.v_dim) / 32 * 32, 128, 512)));
}
constexpr int MOST_SQUARE_BLOCKS = 32;
INLINE int64_t square_panel_bytes(const Attend& call, int rows) {
    const int64_t tokens = (rows > square_window(call, rows) ? 9 : 2) * SQUARE_TOKENS;  // of one term; a block is never more
    return tokens * (round_up(call.k_dim, SQUARE) + round_up(call.v_dim, SQUARE)) * 2;
}

struct SquareMemory {
    char *tiles, *query, *panels, *plain;
};
template <class Take>
INLINE SquareMemory square_memory(const Attend& call, int rows, Take take) {
    SquareMemory made;
    made.tiles = take(tiles_bytes(call, square_window(call, rows)));
    made.query = take(2 * round_up(rows, SQUARE) * round_up(call.k_dim, SQUARE) * 2);
    made.panels = take(square_panel_bytes(call, rows));
    made.plain = take(4 * ROWS_AT_ONCE * int64_t(ROW_BYTES));
    return made;
}

// Tokens first .. stop - 1 of a run, whose rows are those of the unit's head. True when the rows are finished, not only
// summed.
template <int weight_terms>
inline bool attend_squares(const Attend& call, const Unit& unit, const Run& run, const Rows& k, const Rows& v, int64_t first,
                           int64_t stop, const SquareMemory& memory, MatrixUnit& matrix, Ahead& ahead) {
    const Format &kf = *run.k_format, &vf_ = *run.v_format;
    const Tables &k_tables = tables_of(kf, 0), &v_tables = tables_of(vf_, 1);
    const Terms terms = terms_of(call, kf, vf_);
    float scale;
    const Factor query = pack_squares(call, unit, terms.q, scale, memory.query);
    const int most = square_tokens(call, terms), window = square_window(call, unit.rows);
    const int64_t token_bytes = 2 * (round_up(call.k_dim, SQUARE) * terms.k + round_up(call.v_dim, SQUARE) * terms.v);
    const int64_t room = square_panel_bytes(call, unit.rows) / token_bytes;
    Tiles tiles = tiles_at(call, window, memory.tiles);
    SquareBlock blocks[MOST_SQUARE_BLOCKS];
    for (int64_t at = first; at < stop;) {
        int made = 0;
        char* panels = memory.panels;
        for (; made < MOST_SQUARE_BLOCKS && (made + 1) * most <= room && at < stop; ++made) {
            SquareBlock& block = blocks[made];
            block.k_format = &kf, block.v_format = &vf_;
            block.position = at;
            block.count = int(std::min<int64_t>(most, stop - at));
            const int64_t slot = at - run.position, next = std::min<int64_t>(most, stop - at - block.count);
            ahead.start();
            ahead.add(kf, k, vf_, v, slot + block.count, next, {true, true});
            ahead.until(factor_ticks(kf, block.count, terms.k, true) + factor_ticks(vf_, block.count, terms.v, false));
            block.keys = make_factor<true>(kf, k_tables, k, slot, block.count, terms.k, panels, memory.plain, matrix, ahead);
            block.values = make_factor<false>(vf_, v_tables, v, slot, block.count, terms.v,
                                              panels + round_up(block.count, SQUARE) / SQUARE * block.keys.square, memory.plain,
                                              matrix, ahead);
            panels += round_up(block.count, SQUARE) * token_bytes;
            at += block.count;
        }
        matrix.configure(32, 16);
        const bool last = at == stop, done = unit.alone && last && stop == unit.stop, whole = window >= unit.rows;
        for (int begin = 0; begin < unit.rows; begin += window) {
            if (!whole || blocks[0].position == first) enter_tiles(call, unit, tiles, begin, std::min(window, unit.rows - begin));
            for (int i = 0; i < made; ++i)
                for (int row = begin; row < begin + tiles.rows; row += SQUARE)
                    Square<weight_terms>(call, unit, tiles, query, scale, blocks[i], row).attend();
            if (!whole || last) leave_tiles(call, unit, tiles, done);
        }
        if (done) return true;
    }
    return false;
}
inline bool attend_squares(const Attend& call, const Unit& unit, const Run& run, const Rows& k, const Rows& v, int64_t first,
                           int64_t stop, const SquareMemory& memory, MatrixUnit& matrix, Ahead& ahead) {
    if (terms_of(call, *run.k_format, *run.v_format).w == 1)
        return attend_squares<1>(call, unit, run, k, v, first, stop, memory, matrix, ahead);
    return attend_squares<2>(call, unit, run, k, v, first, stop, memory, matrix, ahead);
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
