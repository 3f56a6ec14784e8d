// Rows of any format as one or two bfloat16 terms, in tiles that a matrix unit multiplies one after the other.
//
// A value is its term rounded to bfloat16, or the sum of two, off by 2^-16 of it at most. A square is 32 rows of A, tokens
// or columns: two tiles per step of 32 along the reduced axis, so that products read memory in order.
#pragma once
#include "block.h"

namespace gyrokv {
namespace GYROKV_ISA {

struct Terms {  // of q, K, the weights and V
    int q, k, w, v;
};
INLINE bool one_term(const Format& f) { return f.kind == BF16 || f.kind == FP8_E4M3; }
INLINE Terms terms_of(const Attend& call, const Format& k, const Format& v) {
    auto of_rows = [&](const Format& f) { return one_term(f) ? 1 : f.kind == CODES ? call.terms : 2; };
    auto of_factor = [&](const Format& f, bool single) { return single ? 1 : f.kind == CODES ? call.terms : 2; };
    const bool single = bfloat_query(call);
    return {of_factor(k, single), of_rows(k), of_factor(v, single && one_term(v)), of_rows(v)};
}

#if defined(__AMX_BF16__)

constexpr int SQUARE = 32;                                  // rows, tokens or columns of two tiles
constexpr int SQUARE_TOKENS = 512;                          // of a block, with one term of the weights
constexpr int WEIGHT_BYTES = SQUARE * SQUARE_TOKENS * 2;    // of all their terms: most of the first cache
constexpr int FAR_STEPS = 4;                                // of A: more of them would not stay there beside B

// Tokens of a block: panels stay in a core's own cache, beside the rows that pass over them.
INLINE int square_tokens(const Attend& call, const Terms& t) {
    const int64_t bytes = 2 * (round_up(call.k_dim, SQUARE) * t.k + round_up(call.v_dim, SQUARE) * t.v);
    return int(std::clamp<int64_t>(RESIDENT / bytes / 64 * 64, 64, SQUARE_TOKENS / t.w));
}

// An operand: squares [.][terms][steps][2] of tiles.
struct Factor {
    char* data;
    int64_t square, term;  // bytes from one to the next
    int terms, steps;
    Factor at(int64_t i) const { return {data + i * square, square, term, terms, steps}; }
};
INLINE Factor factor_at(char* data, int terms, int64_t values) {
    const int64_t term = round_up(values, SQUARE) / SQUARE * 2 * TILE;
    return {data, terms * term, term, terms, int(term / (2 * TILE))};
}
INLINE int products(const Factor& a, const Factor& b) { return a.terms + b.terms - 1; }

// Tiles 0 .. 3 += A B over `steps`; side() runs 4 * steps times while the unit is busy. `far`: B is read past A, which it
// would push out of the first cache.
template <bool far, class Side>
INLINE void multiply_steps(const char* a, const char* b, int steps, Side side) {
    for (; steps; --steps, a += 2 * TILE, b += 2 * TILE) {
        _tile_loadd(4, a, LINE);
        if constexpr (far)
            _tile_stream_loadd(6, b, LINE);
        else
            _tile_loadd(6, b, LINE);
        _tile_dpbf16ps(0, 4, 6);
        side();
        _tile_loadd(5, a + TILE, LINE);
        _tile_dpbf16ps(2, 5, 6);
        side();
        if constexpr (far)
            _tile_stream_loadd(7, b + TILE, LINE);
        else
            _tile_loadd(7, b + TILE, LINE);
        _tile_dpbf16ps(1, 4, 7);
        side();
        _tile_dpbf16ps(3, 5, 7);
        side();
    }
}
// The same over all products of terms but that of two low ones.
template <bool far, class Side>
INLINE void multiply_terms(const Factor& a, const Factor& b, int steps, Side side) {
    for (int i = 0; i < products(a, b); ++i)
        multiply_steps<far>(a.data + (i && i < a.terms ? a.term : 0), b.data + (i >= a.terms ? b.term : 0), steps, side);
}

// 32 values to their terms, each `term` bytes after the one before.
template <int terms>
INLINE void store_terms(vf a, vf b, char* to, int64_t term) {
    if constexpr (terms == 1) {
        store(to, to_bfloat(a, b));
    } else {
        const vf high_a = (vf)((vi)a & int32_t(0xffff0000)), high_b = (vf)((vi)b & int32_t(0xffff0000));
        store(to, to_bfloat(high_a, high_b));
        store(to + term, to_bfloat(a - high_a, b - high_b));
    }
}

// q of a unit. Scores are the products times `scale`, which is not negative.
inline Factor pack_squares(const Attend& call, const Unit& unit, int terms, float& scale, char* to) {
    const Factor made = factor_at(to, terms, call.k_dim);
    const float factor = call.softcap ? call.scale / call.softcap : call.scale * LOG2E, sign = factor < 0.0f ? -1.0f : 1.0f;
    scale = std::abs(factor);
    alignas(64) float q[MOST_VALUES] = {};
    for (int r = 0; r < round_up(unit.rows, SQUARE); ++r) {
        char* at = made.data + r / SQUARE * made.square + r % SQUARE * LINE;
        if (r < unit.rows)
            load_query(call, unit, unit.row_first + r, sign, q);
        else
            std::fill_n(q, MOST_VALUES, 0.0f);
        for (int i = 0; i < made.steps; ++i, at += 2 * TILE) {
            const vf a = load<vf>(q + SQUARE * i), b = load<vf>(q + SQUARE * i + LANES);
            if (terms == 1)
                store_terms<1>(a, b, at, made.term);
            else
                store_terms<2>(a, b, at, made.term);
        }
    }
    return made;
}

// Two vectors as the low and high halves of dwords, in terms: `term` bytes apart.
template <int terms>
INLINE void store_pairs(vf low, vf high, char* to, int64_t term) {
    auto pack = [](vf a, vf b) { return ((vu)a >> 16) | ((vu)b & 0xffff0000u); };
    auto rounded = [](vf x) { return (vf)((vu)x + 0x8000u); };
    if constexpr (terms == 1) {
        store(to, pack(rounded(low), rounded(high)));
    } else {
        const vu made = pack(low, high);
        const vf rest_low = low - (vf)(made << 16), rest_high = high - (vf)(made & 0xffff0000u);
        store(to, made);
        store(to + term, pack(rounded(rest_low), rounded(rest_high)));
    }
}

// A line of four codes per lane to two lines of bfloat16 pairs: codes first[0] and first[1], then the others. scale(i): of
// the codes number i, with the format's factor.
template <int terms, int planes, bool sorted, class Scale>
INLINE void line_terms(const char* from, int64_t plane, Scale scale, char* to, int64_t term) {
    const vu low = load<vu>(from), high = planes == 2 ? load<vu>(from + plane) : vu{};
    constexpr float zero = ZERO * (planes == 2 ? 257 : 1);
    vf x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const int at = sorted ? (i % 2 * 2 + i / 2) * 8 : i * 8;
        vu code = (low >> at) & 0xff;
        if constexpr (planes == 2) code += ((high >> at) & 0xff) << 8;
        const vf s = scale(i);
        x[i] = fma(to_float((vi)code), s, s * -zero);
    }
    store_pairs<terms>(x[0], x[1], to, term);
    store_pairs<terms>(x[2], x[3], to + LINE, term);
}

// ROWS_AT_ONCE tokens of codes, of which `count` are there, as columns of a tile per step (keys) or as its lines.
template <bool keys, int terms, int planes>
inline void code_terms(const Format& f, const Tables& tables, const Rows& rows, int count, char* to, const Factor& made, char* scratch,
                       MatrixUnit& unit, Ahead& ahead) {
    alignas(64) float scales[640 / 32 * ROWS_AT_ONCE];
    expand_scales(f, rows, 0, count, ROWS_AT_ONCE, scales);
    for (int i = 0; i < f.dim / f.group * ROWS_AT_ONCE; i += LANES) store(scales + i, load<vf>(scales + i) * f.factor);
    char* lines = scratch + 2 * ROWS_AT_ONCE * ROW_BYTES;
    if constexpr (keys) {
        const Panels panels = k_panels(f, tables, rows, 0, count, ROWS_AT_ONCE, lines, scratch, unit, ahead);
        auto convert = [&](auto sorted) {
            for (int l = 0; l < f.dim / 4; ++l) {
                const vf s = load<vf>(scales + 4 * l / f.group * ROWS_AT_ONCE);
                line_terms<terms, planes, sorted>(panels.data + l * LINE, panels.plane, [&](int) { return s; },
                                                  to + l / 8 * 2 * TILE + l % 8 * 2 * LINE, made.term);
            }
        };
        if (packed_tokens(f))
            convert(std::true_type{});
        else
            convert(std::false_type{});
    } else {
        const Panels panels = v_panels(f, tables, rows, 0, count, ROWS_AT_ONCE, lines, scratch, unit, ahead);
        for (int c = 0; c < f.dim; c += LANES) {
            const float* s = scales + c / f.group * ROWS_AT_ONCE;
            for (int t = 0; t < ROWS_AT_ONCE; t += 4)
                line_terms<terms, planes, false>(panels.data + c / LANES * panels.panel + t / 4 * LINE, panels.plane,
                                                 [&](int i) { return splat(s[t + i]); },
                                                 to + c / SQUARE * made.square + c / LANES % 2 * TILE + t / 2 * LINE, made.term);
        }
    }
}

// ROWS_AT_ONCE tokens of a dense format as rows of bfloat16, a plane per term; those from `count` on are zeros.
template <int terms>
inline PlainRows term_rows(const Format& f, const Tables& tables, const Rows& rows, int count, char* scratch) {
    if (one_term(f)) return plain_rows(f, tables, rows.words, rows.word_strides[2], count, scratch);
    const int64_t stride = round_up(int64_t(f.dim), SQUARE) * 2, plane = ROWS_AT_ONCE * stride;
    for (int t = 0; t < count; ++t) {
        const char* from = rows.words + t * rows.word_strides[2];
        for (int i = 0; i < f.dim; i += SQUARE)
            store_terms<terms>(load_values(f.kind, from, i, f.dim), load_values(f.kind, from, i + LANES, f.dim),
                               scratch + t * stride + 2 * i, plane);
    }
    for (int p = 0; p < terms; ++p) std::memset(scratch + p * plane + count * stride, 0, (ROWS_AT_ONCE - count) * stride);
    return {scratch, stride, plane};
}

// The same of them as code_terms makes.
template <bool keys, int terms>
inline void dense_terms(const Format& f, const Tables& tables, const Rows& rows, int count, char* to, const Factor& made, char* scratch,
                        Ahead& ahead) {
    const int64_t bytes = round_up(int64_t(f.dim), SQUARE) * 2;
    const PlainRows plain = term_rows<terms>(f, tables, rows, count, scratch);
    for (int p = 0; p < terms; ++p, to += made.term) {
        const char* from = plain.first + p * plain.plane;
        if constexpr (keys) {
            transpose_tokens(from, plain.stride, bytes, ahead, [=](int64_t l, const line* lines) {
                for (int i = 0; i < 4; ++i) store(to + l / 16 * 2 * TILE + (l % 16 + i) * LINE, lines[i]);
            });
        } else {
            for (int t = 0; t < ROWS_AT_ONCE; t += 2)
                for (int64_t c = 0; c < bytes; c += LINE) {
                    ahead.tick();
                    interleave_tokens<BFLOAT>(from + t * plain.stride + c, plain.stride, to + c / LINE * made.square + t / 2 * LINE, TILE);
                }
        }
    }
}

// `count` tokens from slot `first` on as B of the scores (`keys`) or of the weights.
template <bool keys, int terms>
inline Factor make_factor(const Format& f, const Tables& tables, Rows rows, int64_t first, int count, char* to, char* scratch,
                          MatrixUnit& unit, Ahead& ahead) {
    const Factor made = factor_at(to, terms, keys ? f.dim : count);
    rows.words += first * rows.word_strides[2], rows.scale += first * rows.scale_strides[2];
    for (int t = 0; t < round_up(count, SQUARE); t += ROWS_AT_ONCE) {
        unit.keep_awake();
        const int here = std::clamp(count - t, 0, ROWS_AT_ONCE), half = t / ROWS_AT_ONCE % 2;
        char* at = to + (keys ? t / SQUARE * made.square + half * TILE : t / SQUARE * 2 * TILE + half * 8 * LINE);
        if (f.kind != CODES)
            dense_terms<keys, terms>(f, tables, rows, here, at, made, scratch, ahead);
        else if (f.planes == 1)
            code_terms<keys, terms, 1>(f, tables, rows, here, at, made, scratch, unit, ahead);
        else
            code_terms<keys, terms, 2>(f, tables, rows, here, at, made, scratch, unit, ahead);
        rows.words += ROWS_AT_ONCE * rows.word_strides[2], rows.scale += ROWS_AT_ONCE * rows.scale_strides[2];
    }
    return made;
}
template <bool keys>
inline Factor make_factor(const Format& f, const Tables& tables, const Rows& rows, int64_t first, int count, int terms, char* to,
                          char* scratch, MatrixUnit& unit, Ahead& ahead) {
    if (terms == 1) return make_factor<keys, 1>(f, tables, rows, first, count, to, scratch, unit, ahead);
    return make_factor<keys, 2>(f, tables, rows, first, count, to, scratch, unit, ahead);
}
// How often that calls Ahead::tick.
INLINE int factor_ticks(const Format& f, int count, int terms, bool keys) {
    const int tokens = int(round_up(count, SQUARE));
    return f.kind == CODES ? panel_ticks(f, tokens, keys) : int(tokens / 16 * (round_up(int64_t(f.dim), SQUARE) / 8) * terms);
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
