// Rows as the matrix unit multiplies them for few query rows: in the order in which they are stored.
//
// A line is 64 bytes of a row, as int8 or bfloat16. Codes become bytes in place: lane x of the 16-bit lanes of a row gets
// values x and x + dim / 2, whatever their width (see packing.py).
#pragma once
#include "direct.h"

namespace gyrokv {
namespace GYROKV_ISA {

constexpr int MOST_STORED = 16;   // query rows
constexpr int STORED_ROWS = 4;    // query rows of a product, at least
constexpr int MOST_STORED_TOKENS = 128;  // of a block
constexpr int TILE = 16 * LINE;   // bytes

#if !defined(__AMX_INT8__)

struct Stored {
    Stored(const Format&, int, int) {}
};
INLINE bool multiplies_stored(const Format&, int) { return false; }
INLINE int stored_ticks(const Stored&, const Stored&, int, int) { return 0; }
INLINE int k_score_ticks(const Stored&) { return 0; }
INLINE int row_ticks(const Stored&, const Stored&) { return 0; }
INLINE void turn_columns(const Stored&, float*, int, int64_t, int, bool) {}

#else

constexpr int MOST_LINES = 640 / 32;  // of a padded head

// Whether `rows` query rows take rows of a format so: few do, because panels cost more than they save. Fewer where scores
// leave out the products of both low parts (see QueryTiles). Lines of codes that are half empty cost more than panels that
// are made of one field.
INLINE bool multiplies_stored(const Format& f, int rows) {
    if (f.kind == CODES && f.dim % 64 && (f.bits == 4 || f.bits == 8)) return false;
    if (f.dim % 32 || f.group % 32 || rows > (f.planes == 2 && f.group < f.dim ? MOST_STORED / 2 : MOST_STORED)) return false;
    return f.kind == BF16 || f.kind == FP8_E4M3 || (f.kind == CODES && f.bits > 1 && f.bits != 7);
}

// How rows of a format lie in lines. Unit u: lines first[u] .. first[u + 1] - 1, whose even bytes are in group even[u] of
// the scale and whose odd bytes in group odd[u].
struct Stored;
using MakeLines = void (*)(const Stored&, const Tables&, int line, const char* from, int64_t stride, char* to);
struct Makers {  // of 16 tokens (see code_lines and code_quads)
    MakeLines keys, values;
    int key_lines;  // that are made at once, because they lie in the same words
};
inline Makers makers_of(const Format& f, const Stored& s);

struct Stored {
    Element element;
    Makers make;
    int lines, planes, units;
    int rows, sums;  // query rows of a product of scores; tiles of its sums per unit
    int parts;       // of weights
    int lanes;       // 16-bit lanes of a line in use
    bool in_place;   // rows are lines
    bool split;      // even and odd bytes may have scales of their own
    int first[MOST_LINES + 1], even[MOST_LINES], odd[MOST_LINES];
    Piece wide[MOST_LINES], next[MOST_LINES];

    // query_rows: 0 where rows of the format are not taken so; terms: of q and of weights of codes
    Stored(const Format& f, int query_rows, int terms) {
        if (!query_rows) return;
        element = element_of(f), planes = f.planes, units = 0, split = false;
        lines = f.dim / 32, lanes = 32, in_place = f.kind == BF16;
        if (element == INT8) {
            lanes = f.dim % 64 ? 16 : 32, lines = f.dim / 2 / lanes, split = f.group < f.dim;
            in_place = f.linear && f.dim % 64 == 0;
            const int width = f.bits & 8 ? 8 : f.bits & 4 ? 4 : 2;
            for (int j = 0; j < lines; ++j) {
                wide[j] = piece_of(f.dim, width, 0, j * lanes, 0);
                if (f.bits > width) next[j] = piece_of(f.dim, f.bits - width, f.dim * width / 8, j * lanes, width);
            }
        }
        for (int j = 0; j < lines; ++j) {
            const int a = split ? j * lanes / f.group : 0, b = split ? (j * lanes + f.dim / 2) / f.group : 0;
            if (units && even[units - 1] == a && odd[units - 1] == b) continue;
            first[units] = j, even[units] = a, odd[units] = b, ++units;
        }
        first[units] = lines;
        // more rows than four share a product, but for scales of their own, which make a second one necessary
        const bool few = query_rows <= STORED_ROWS || (split && (planes == 2 || terms == 2 || query_rows <= 8));
        rows = few ? STORED_ROWS : 16 / terms, sums = few ? 1 : split ? 2 : planes;
        parts = planes == 2 ? 2 : terms;
        if (element == INT8) make = makers_of(f, *this);
    }

    // body(place in the order of the sums, column) for all columns; sums lie as [line][bfloat16 of a dword][dword] or, of
    // bytes, as interleave_quads leaves them.
    template <class Body>
    void each_column(int dim, Body body) const {
        const int parts = element == INT8 ? 4 : 2, columns = element == INT8 ? lanes / 2 : 16;
        for (int j = 0, at = 0; j < lines; ++j)
            for (int b = 0; b < parts; ++b)
                for (int i = 0; i < columns; ++i, ++at)
                    body(at, element == INT8 ? lanes * j + i / 4 * 8 + b / 2 * 4 + i % 4 + b % 2 * (dim / 2) : 32 * j + 2 * i + b);
    }
};

// Rows of the output to the order of the sums, or back.
inline void turn_columns(const Stored& s, float* out, int rows, int64_t stride, int dim, bool back) {
    float turned[640];
    for (int r = 0; r < rows; ++r, out += stride) {
        s.each_column(dim, [&](int at, int column) {
            if (back)
                turned[column] = out[at];
            else
                turned[at] = out[column];
        });
        std::memcpy(out, turned, dim * sizeof(float));
    }
}

// 16 tokens: line j of token t is at `at` + t * step + j * line, its second plane `plane` behind. Distances in bytes.
struct Lines {
    const char* at;
    int64_t step, line, plane;
};

// Lines whose codes lie in the same words.
template <int bits, Loading load>
constexpr int SHARED = std::max(1, Fields<bits>::steps / (load == PLAIN ? 1 : load == HALF ? 2 : load == QUARTER ? 4 : 8));

// Codes of a token as bytes, of `lines` lines in the same words.
template <int bits, int lines, Loading wide_load, Loading next_load>
struct Codes {
    using F = Fields<bits>;
    const Loader<wide_load> wide;
    const Loader<next_load> next;
    vu even[lines], next_even[lines];
    inline __attribute__((always_inline)) Codes(const Stored& s, int line) : wide(s.wide[line]), next(s.next[line]) {
        for (int i = 0; i < lines; ++i) {
            const int at = line + i * (s.lines / lines);
            even[i] = load<vu>(s.wide[at].even), next_even[i] = load<vu>(s.next[at].even);
        }
    }
    inline __attribute__((always_inline)) vu above(const char* row) const {
        if constexpr (F::next == 0) return vu{};
        return next(row);
    }
    // Of line i, from what wide() and above() gave.
    inline __attribute__((always_inline)) vu operator()(int i, vu x, vu y) const {
        if constexpr (bits == 8 && wide_load == PLAIN) return x;
        const vu code = x >> even[i];  // tables repeat, so bits above the code do not matter
        if constexpr (F::next == 0) return code;
        const __m512i low = _mm512_set1_epi8((1 << F::wide) - 1), high = _mm512_rorv_epi32((__m512i)y, (__m512i)next_even[i]);
        return (vu)_mm512_ternarylogic_epi32(low, (__m512i)code, high, 0xca);
    }
};

// Line j of 16 tokens, and those in the same words, as operand A of scores: [plane][line][token].
template <int bits, int look_up, int planes, Loading wide_load, Loading next_load>
void code_lines(const Stored& s, const Tables& tables, int j, const char* row, int64_t stride, char* to) {
    constexpr int lines = SHARED<bits, wide_load>;
    const Decoder<bits, look_up> decoder(tables);
    const Codes<bits, lines, wide_load, next_load> codes(s, j);
    const int64_t plane = int64_t(s.lines) * TILE, apart = plane / lines;
#pragma GCC unroll 4
    for (int t = 0; t < 16; ++t, row += stride, to += LINE) {
        const vu x = codes.wide(row), y = codes.above(row);
#pragma GCC unroll 4
        for (int i = 0; i < lines; ++i) decoder.template write<planes>((line)codes(i, x, y), to + i * apart, plane);
    }
}

// Bytes of four tokens: vector b of the result holds, per dword, a byte of each of them. Byte 16 l + 2 i + b % 2 + 8 (b / 2)
// of a token goes to dword 4 l + i, for i < 4.
INLINE void interleave_quads(const vu* x, vu* to) {
    const vec<uint8_t> a = (line)x[0], b = (line)x[1], c = (line)x[2], d = (line)x[3];
    const vu low = (vu)splat(0xffff);
    const vu ab[2] = {(vu)zip<0>(a, b), (vu)zip<1>(a, b)}, cd[2] = {(vu)zip<0>(c, d), (vu)zip<1>(c, d)};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) to[2 * i] = (ab[i] & low) | cd[i] << 16, to[2 * i + 1] = ab[i] >> 16 | (cd[i] & ~low);
}

// A line of 16 tokens as operand B of values: [plane][byte, as above][row][16 dwords], of signed bytes. Tokens 4 i .. 4 i + 3
// go to row 4 i, where the weights have them (see weight_bytes). (One by one: several lines do not fit the first cache.)
constexpr int64_t QUADS = 4 * TILE;  // bytes of a plane of a line
template <int bits, int look_up, int planes, Loading wide_load, Loading next_load>
void code_quads(const Stored& s, const Tables& tables, int j, const char* row, int64_t stride, char* to) {
    const Decoder<bits, look_up, true> decoder(tables);
    const Codes<bits, 1, wide_load, next_load> codes(s, j);
#pragma GCC unroll 2
    for (int q = 0; q < 4; ++q, row += 4 * stride, to += 4 * LINE) {
        vu x[4], made[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) x[i] = codes(0, codes.wide(row + i * stride), codes.above(row + i * stride));
        interleave_quads(x, made);
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) decoder.template write<planes>((line)made[b], to + b * TILE, QUADS);
    }
}

inline Makers makers_of(const Format& f, const Stored& s) {
    auto load = []<int bits, int look_up, int planes, int wide, int next>(
                    std::integer_sequence<int, bits, look_up, planes, wide, next>) {
        return Makers{code_lines<bits, look_up, planes, Loading(wide), Loading(next)>,
                      code_quads<bits, look_up, planes, Loading(wide), Loading(next)>, SHARED<bits, Loading(wide)>};
    };
    auto run = [&]<int bits, int look_up, int planes>(std::integer_sequence<int, bits, look_up, planes>) {
        const Loading wide = s.wide[0].loading, next = s.next[0].loading;
        constexpr bool one = bits == Fields<bits>::wide;
        constexpr int none = HALF;  // of the next field where there is none
        if (wide == PLAIN && (one || next == HALF)) return load(std::integer_sequence<int, bits, look_up, planes, PLAIN, HALF>{});
        if (wide == PLAIN && next == QUARTER)
            return load(std::integer_sequence<int, bits, look_up, planes, PLAIN, one ? none : QUARTER>{});
        if (wide == PLAIN && next == PLAIN)
            return load(std::integer_sequence<int, bits, look_up, planes, PLAIN, one ? none : PLAIN>{});
        if (wide == HALF) return load(std::integer_sequence<int, bits, look_up, planes, HALF, one ? none : WHOLE>{});
        if (wide == WHOLE)  // and so is the next field, which has fewer words
            return load(std::integer_sequence<int, bits, look_up, planes, WHOLE, WHOLE>{});
        return load(std::integer_sequence<int, bits, look_up, planes, PARTS, PARTS>{});
    };
    auto table = [&]<int bits>(std::integral_constant<int, bits>) {
        if (bits == 8 && f.linear) return run(std::integer_sequence<int, bits, bits == 8 ? VALUES : INDICES, 1>{});
        if (bits == 8 && has_half_table(f)) {
            constexpr int half = bits == 8 ? SIGNED_INDICES : INDICES;
            if (f.planes == 1) return run(std::integer_sequence<int, bits, half, 1>{});
            return run(std::integer_sequence<int, bits, half, 2>{});
        }
        if (f.planes == 1) return run(std::integer_sequence<int, bits, INDICES, 1>{});
        return run(std::integer_sequence<int, bits, INDICES, 2>{});
    };
    switch (f.bits) {
        case 2: return table(std::integral_constant<int, 2>{});
        case 3: return table(std::integral_constant<int, 3>{});
        case 4: return table(std::integral_constant<int, 4>{});
        case 5: return table(std::integral_constant<int, 5>{});
        case 6: return table(std::integral_constant<int, 6>{});
        default: return table(std::integral_constant<int, 8>{});
    }
}

// 16 rows of fp8 to rows of bfloat16.
inline void float8_lines(int dim, const char* from, int64_t stride, char* to) {
    const int lanes = dim / 2;
    for (int t = 0; t < 16; ++t, from += stride, to += 2 * dim)
        for (int x = 0; x < lanes; x += 32) {
            const __mmask32 mask = lanes - x < 32 ? (1u << (lanes - x)) - 1 : ~0u;
            const auto code = (vec<uint16_t>)_mm512_maskz_loadu_epi16(mask, from + 2 * x);
            _mm512_mask_storeu_epi16(to + 2 * x, mask, (__m512i)fp8_to_bfloat(code & 0xff));
            _mm512_mask_storeu_epi16(to + 2 * (x + lanes), mask, (__m512i)fp8_to_bfloat(code >> 8));
        }
}

// Ticks of Ahead, of some 8 cycles. K: to make a line of 16 tokens, to multiply a line of 32 tokens with the query rows of a
// product, and to join products of 16. V: to make a line of 16 tokens; of bfloat16 also to multiply it, and to spread the weights
// of 64 tokens. Where lines of codes are made there are few, all alike, because branches that nobody can foretell cost more
// than what is asked for.
INLINE bool made_codes(const Stored& s, bool keys) { return s.element == INT8 && !(keys && s.in_place); }
INLINE int k_make_ticks(const Stored& s) { return s.in_place ? 0 : 8 * s.planes; }
INLINE int k_tile_ticks(const Stored& s) { return s.in_place ? 16 : 8; }
INLINE int k_join_ticks(const Stored& s) {
    return made_codes(s, true) ? 4 * s.planes * s.lines : 2 + 2 * s.rows + (s.split ? 8 * s.sums : 0);
}
INLINE int k_score_ticks(const Stored& s) {
    return k_tile_ticks(s) * s.lines * std::max(s.planes, s.sums) + 2 * k_join_ticks(s);
}
INLINE int v_make_ticks(const Stored& s) { return s.element == INT8 ? 16 * s.planes : s.in_place ? 0 : 8; }
constexpr int V_TILE_TICKS = 5, V_SUM_TICKS = 4 * V_TILE_TICKS + 4, V_SPREAD_TICKS = 8;
INLINE int row_ticks(const Stored& k, const Stored& v) { return made_codes(k, true) || made_codes(v, false) ? 0 : 6; }
// From the beginning of a block to its end.
INLINE int stored_ticks(const Stored& k, const Stored& v, int rows, int tokens) {
    const int k_passes = (rows + k.rows - 1) / k.rows, v_passes = (rows + STORED_ROWS - 1) / STORED_ROWS, steps = tokens / 64;
    const int keys = 2 * steps * (2 * k.lines * k_make_ticks(k) + k_passes * k_score_ticks(k));
    const int sums = made_codes(v, false) ? 0 : v_passes * (v.lines * V_SUM_TICKS + V_SPREAD_TICKS);
    return keys + rows * steps * row_ticks(k, v) + steps * (4 * v.lines * v_make_ticks(v) + sums);
}

// Rows of a block in groups of 16 tokens.
struct StoredRows {
    const Format& format;
    const Stored& stored;
    const Tables& tables;
    const char* data;
    int64_t stride, bytes;       // from row to row; of a row
    int groups;                  // in `data`; the next is at `rest`, whatever follows is zeros
    const char *rest, *zeros;

    const char* at(int g) const { return g < groups ? data + g * 16 * stride : g == groups ? rest : zeros; }
    int64_t step(int g) const { return g < groups ? stride : g == groups ? bytes : 0; }

    // Group g as operand A of scores or, of bfloat16, B of values; made in `to` if rows are not lines.
    Lines lines(int g, char* to, int ticks, Ahead& ahead) const {
        if (stored.in_place) return {at(g), step(g), LINE, 0};
        if (stored.element != INT8) {
            float8_lines(format.dim, at(g), step(g), to);
            ahead.tick(ticks * stored.lines);
            return {to, 2 * int64_t(format.dim), LINE, 0};
        }
        for (int j = 0; j < stored.lines / stored.make.key_lines; ++j) {
            stored.make.keys(stored, tables, j, at(g), step(g), to + j * TILE);
            ahead.tick(ticks * stored.make.key_lines);
        }
        return {to, LINE, TILE, stored.lines * TILE};
    }
};
INLINE int64_t lines_bytes(const Stored& s) { return s.in_place ? 0 : s.lines * s.planes * TILE; }  // of 16 tokens

// `count` rows of a block of `tokens`; `rest`: room for 17.
inline StoredRows stored_rows(const Format& f, const Stored& s, const Tables& tables, const char* from, int64_t stride, int count,
                              int tokens, char* rest) {
    const int64_t bytes = row_bytes(f);
    const int groups = count / 16;
    if (count < tokens) {
        std::memset(rest, 0, 17 * bytes);
        for (int t = 16 * groups; t < count; ++t) std::memcpy(rest + (t - 16 * groups) * bytes, from + t * stride, bytes);
    }
    return {f, s, tables, from, stride, bytes, groups, rest, rest + 16 * bytes};
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
