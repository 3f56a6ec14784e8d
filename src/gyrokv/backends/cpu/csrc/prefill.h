// Many query rows of bfloat16 with rows of bfloat16 or fp8 on a matrix unit.
//
// 32 rows pass over a block of tokens together. Their products with 32 tokens go to a buffer that stays in the first
// cache, and become weights while the unit multiplies the next 32 tokens; the weights of all tokens of the block are then
// multiplied with the values. No maxima are taken while every score is at most SLACK above the row's largest so far (the
// lazy rescaling of FlashAttention-4, 2025). Weights are single bfloat16, and their sum is that of the rounded ones.
#pragma once
#include "block.h"
#include "finish.h"

namespace gyrokv {
namespace GYROKV_ISA {

// Whether `rows` of q pass over rows of bfloat16 in this way.
INLINE bool squares_rows(const Attend& call, int rows) {
#if defined(__AMX_BF16__)
    return bfloat_query(call) && rows > 16;
#else
    return false;
#endif
}

#if defined(__AMX_BF16__)

constexpr int SQUARE = 32;                  // rows or tokens of two tiles
constexpr int STEPS = MOST_TOKENS / SQUARE;  // of a block

// Sums of a window of a unit's rows, and what 32 of them need while they pass over a block.
struct Tiles {
    int first, rows; // the window
    float* out;      // [rows / 16][panels of V][16][LANES]
    float* sums;     // [rows][LANES] of the weights
    float* top;      // [rows]: largest score so far but for SLACK, -INFINITE before there is one
    float* shift;    // [rows]: -top, or 0 before there is one
    float* scores;   // [2][32][32]
    char* weights;   // [STEPS][2] tiles of 16 rows and 32 tokens
    int panels;
};

constexpr int64_t SQUARE_BYTES = 2 * SQUARE * SQUARE * 4 + 2 * STEPS * TILE;
INLINE int64_t tiles_bytes(const Attend& call, int window) {
    return SQUARE_BYTES + round_up(window, SQUARE) * (round_up(call.v_dim, SQUARE) + LANES + 2) * 4;
}

inline Tiles tiles_at(const Format& f, int window, char* memory) {
    Tiles made;
    const int64_t all = round_up(window, SQUARE);
    made.first = made.rows = 0;
    made.panels = int(v_panels(f));
    made.scores = (float*)memory;
    made.weights = memory + 2 * SQUARE * SQUARE * 4;
    made.out = (float*)(memory + SQUARE_BYTES);
    made.sums = made.out + all * made.panels * LANES;
    made.top = made.sums + all * LANES;
    made.shift = made.top + all;
    return made;
}

INLINE float* tile_row(const Tiles& tiles, int row, int panel) {
    return tiles.out + (int64_t(row / 16 * tiles.panels + panel) * 16 + row % 16) * LANES;
}

// A row's values from tiles, or to them.
INLINE void gather_row(const Attend& call, const Tiles& tiles, int row, float* to) {
    for (int c = 0; c < call.v_dim; c += LANES) std::memcpy(to + c, tile_row(tiles, row, c / LANES), 4 * std::min(LANES, call.v_dim - c));
}
INLINE void scatter_row(const Attend& call, const Tiles& tiles, int row, const float* from) {
    for (int c = 0; c < call.v_dim; c += LANES) std::memcpy(tile_row(tiles, row, c / LANES), from + c, 4 * std::min(LANES, call.v_dim - c));
}

// `rows` of a unit from `first` on become the window.
inline void enter_tiles(const Attend& call, const Unit& unit, Tiles& tiles, int first, int rows) {
    tiles.first = first, tiles.rows = rows;
    const int64_t all = round_up(rows, SQUARE);
    std::memset(tiles.out, 0, all * tiles.panels * LANES * 4);
    std::memset(tiles.sums, 0, all * LANES * 4);
    for (int r = 0; r < all; ++r) {
        tiles.top[r] = r < rows ? unit.top[first + r] : 0.0f;
        tiles.shift[r] = tiles.top[r] == -INFINITE ? 0.0f : -tiles.top[r];
        if (r >= rows || tiles.top[r] == -INFINITE) continue;
        tiles.sums[r * LANES] = unit.total[first + r];
        scatter_row(call, tiles, r, unit.out + int64_t(first + r) * call.v_dim);
    }
}
// The window back to the unit, or, when it is done, to the output.
inline void leave_tiles(const Attend& call, const Unit& unit, const Tiles& tiles, bool done) {
    for (int r = 0; r < tiles.rows; ++r) {
        const int row = tiles.first + r;
        const float total = reduce_add(load<vf>(tiles.sums + r * LANES));
        if (done) {
            alignas(64) float sums[640];
            gather_row(call, tiles, r, sums);
            sums[call.v_dim] = tiles.top[r] * LN2, sums[call.v_dim + 1] = total;
            Unit one = unit;
            one.row_first += row, one.rows = 1;
            finish(call, one, sums, 0, 1);
        } else {
            unit.top[row] = tiles.top[r], unit.total[row] = total;
            gather_row(call, tiles, r, unit.out + int64_t(row) * call.v_dim);
        }
    }
}

// Products of 32 rows of q and two panels of K, to [32][32]; side() runs 4 * steps times while the unit is busy.
template <class Side>
INLINE void multiply_square(const char* q, int64_t stride, const char* k, int64_t panel, int steps, float* to, Side side) {
    const int64_t below = 16 * stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i < steps; ++i, q += LINE, k += TILE) {
        _tile_loadd(4, q, stride);
        _tile_loadd(6, k, LINE);
        _tile_dpbf16ps(0, 4, 6);
        side();
        _tile_loadd(5, q + below, stride);
        _tile_dpbf16ps(2, 5, 6);
        side();
        _tile_loadd(7, k + panel, LINE);
        _tile_dpbf16ps(1, 4, 7);
        side();
        _tile_dpbf16ps(3, 5, 7);
        side();
    }
    _tile_stored(0, to, 2 * LINE);
    _tile_stored(2, to + 16 * SQUARE, 2 * LINE);
    _tile_stored(1, to + LANES, 2 * LINE);
    _tile_stored(3, to + 16 * SQUARE + LANES, 2 * LINE);
    memory_barrier();
}

// Weights of 32 tokens of a row. Returns the larger of each two scores beyond the row's top.
INLINE vf soften_square(const float* scores, float scale, float shift, char* to) {
    const vf a = fma(load<vf>(scores), splat(scale), splat(shift)), b = fma(load<vf>(scores + LANES), splat(scale), splat(shift));
    store(to, to_bfloat(exp2<true>(a), exp2<true>(b)));
    return max(a, b);
}

// Rows `row` .. + 31 of a unit over a block.
class Square {
   public:
    Square(const Attend& call, const Unit& unit, Tiles& tiles, const Query& query, const Block& block, int row)
        : call_(call), unit_(unit), tiles_(tiles), query_(query), block_(block), row_(row), at_(row - tiles.first),
          rows_(std::min(SQUARE, tiles.rows - at_)) {}

    void attend(MatrixUnit& matrix) {
        if (!look()) return;
        matrix.configure(32, 16);
        memory_barrier();
        score(first_, [] {});
        const int steps = int(block_.k.panel / TILE);
        const float scale = query_.scale[0];
        for (int t = first_; t < stop_; ++t) {
            const bool plain = !masked_ && !fresh_;
            vf most = splat(-INFINITE);
            const float *from = scores(t), *shift = tiles_.shift + at_;
            char* to = weights(0, t);
            auto soften = [&] { most = max(most, soften_square(from, scale, *shift++, to)), from += SQUARE, to += LINE; };
            if (plain && t + 1 < stop_) {  // 32 rows in 4 * steps turns
                int due = 0;
                score(t + 1, [&]() __attribute__((always_inline)) {
                    for (due += SQUARE / 4; due >= steps; due -= steps) soften();
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
        multiply_square(query_.a + row_ * query_.stride, query_.stride, block_.k.data + 2 * t * block_.k.panel, block_.k.panel,
                        int(block_.k.panel / TILE), scores(t), side);
    }
    float* scores(int t) { return tiles_.scores + t % 2 * SQUARE * SQUARE; }
    char* weights(int r, int t) { return tiles_.weights + 2 * t * TILE + r * LINE; }

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
                highest = reduce_max(mask_scores(call_, s, query_.scale[0], mask, column, slope, first, stop));
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
            soften_square(s, 1.0f, tiles_.shift[at_ + r], weights(r, t));
        }
        for (int r = rows_; r < SQUARE; ++r) std::memset(weights(r, t), 0, LINE);
    }

    // Of a row: its output, its sum and its weights before token 32 t of the block.
    void rescale(int r, int t, float by) {
        float* sum = tiles_.sums + (at_ + r) * LANES;
        store(sum, load<vf>(sum) * by);
        for (int i = 0; i < tiles_.panels; ++i) {
            float* to = tile_row(tiles_, at_ + r, i);
            store(to, load<vf>(to) * by);
        }
        for (int i = first_; i < t; ++i)
            for (int j = 0; j < 2; ++j) {
                char* to = weights(r, i) + j * LINE / 2;
                store(to, to_bfloat(bfloat_to_float(to) * by));
            }
    }

    // out += weights * values, sums += weights
    void add_values() {
        float* out = tiles_.out + int64_t(at_ / 16) * tiles_.panels * 16 * LANES;
        const int64_t below = int64_t(tiles_.panels) * 16 * LANES, panel = block_.v.panel;
        const __m512bh ones = (__m512bh)splat_of<vec<uint16_t>>(0x3f80);
        for (int r = 0; r < SQUARE; ++r) {
            float* sum = tiles_.sums + (at_ + r) * LANES;
            __m512 added = (__m512)load<vf>(sum);
            for (int t = first_; t < stop_; ++t) added = _mm512_dpbf16_ps(added, (__m512bh)load<line>(weights(r, t)), ones);
            store(sum, (vf)added);
        }
        memory_barrier();
        for (int p = 0; p < tiles_.panels; p += 2, out += 32 * LANES) {
            _tile_loadd(0, out, LINE);
            _tile_loadd(1, out + 16 * LANES, LINE);
            _tile_loadd(2, out + below, LINE);
            _tile_loadd(3, out + below + 16 * LANES, LINE);
            const char *a = weights(0, first_), *b = block_.v.data + p * panel + first_ * TILE;
            for (int t = first_; t < stop_; ++t, a += 2 * TILE, b += TILE) {
                _tile_loadd(4, a, LINE);
                _tile_loadd(6, b, LINE);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, a + TILE, LINE);
                _tile_dpbf16ps(2, 5, 6);
                _tile_loadd(7, b + panel, LINE);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, out, LINE);
            _tile_stored(2, out + below, LINE);
            _tile_stored(1, out + 16 * LANES, LINE);
            _tile_stored(3, out + below + 16 * LANES, LINE);
        }
        memory_barrier();
    }

    const Attend& call_;
    const Unit& unit_;
    Tiles& tiles_;
    const Query& query_;
    const Block& block_;
    const int row_, at_, rows_;  // of the unit; of the window
    Visible seen_[SQUARE];
    int first_, stop_;  // in steps of 32 tokens
    bool masked_, fresh_, any_;
};

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
