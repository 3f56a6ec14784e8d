// Rows as the matrix unit multiplies them for few query rows: in the order in which they are stored.
//
// A line is 64 bytes of a row, as int8 or bfloat16. Codes become bytes in place: lane x of the 16-bit lanes of a row gets
// values x and x + dim / 2, whatever their width (see packing.py).
#pragma once
#include "direct.h"

namespace gyrokv {
namespace GYROKV_ISA {

constexpr int MOST_STORED = 16;   // query rows
constexpr int TILE = 16 * LINE;   // bytes
constexpr int LINE_TICKS = 4;     // of Ahead, per tile

#if !defined(__AMX_INT8__)

struct Stored {
    Stored(const Format&, bool) {}
};
INLINE bool multiplies_stored(const Format&, int) { return false; }
INLINE bool with_panels_too(const Format&) { return false; }
INLINE int stored_ticks(const Format&, const Stored&) { return 0; }
INLINE void turn_columns(const Stored&, float*, int, int64_t, int, bool) {}

#else

constexpr int MOST_LINES = 640 / 32;  // of a padded head

// Whether `rows` query rows cost less so than with panels, which are made once for all of them.
INLINE bool multiplies_stored(const Format& f, int rows) {
    if (f.dim % 32 || f.group % 32) return false;
    if (f.kind == BF16 || f.kind == FP8_E4M3) return rows <= MOST_STORED;
    if (f.kind != CODES || f.bits < 2 || f.bits == 7) return false;
    if (!packed_tokens(f) || !packed_values(f)) return rows <= MOST_STORED;  // panels would be made of unpacked rows
    return rows <= (f.planes == 2 || f.bits == 8 ? 8 : f.bits == 4 ? 4 : 0);
}

// Formats whose panels cost so little that changing between the two kinds of products would cost more.
INLINE bool with_panels_too(const Format& f) { return packed_tokens(f) && packed_values(f) && f.planes == 1 && f.bits == 4; }

// How rows of a format lie in lines. Unit u: lines first[u] .. first[u + 1] - 1, whose even bytes are in group even[u] of
// the scale and whose odd bytes in group odd[u].
struct Stored {
    Element element;
    int lines, planes, units;
    int lanes;       // 16-bit lanes of a line in use
    bool in_place;   // rows are lines
    bool split;      // even and odd bytes may have scales of their own
    int first[MOST_LINES + 1], even[MOST_LINES], odd[MOST_LINES];
    Piece wide[MOST_LINES], next[MOST_LINES];

    Stored(const Format& f, bool used) {
        if (!used) return;
        element = element_of(f), planes = f.planes, units = 0, split = false;
        lines = f.dim / 32, lanes = 32, in_place = f.kind == BF16;
        if (element == INT8) {
            lanes = f.dim % 64 ? 16 : 32, lines = f.dim / 2 / lanes, split = f.group < f.dim;
            in_place = f.linear && f.dim % 64 == 0;
            const int width = f.bits & 8 ? 8 : f.bits & 4 ? 4 : 2;
            for (int j = 0; j < lines && !in_place; ++j) {
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
    }

    // body(place in the order of the sums, column) for all columns; sums lie as [line][byte or bfloat16 of a column][column]
    template <class Body>
    void each_column(int dim, Body body) const {
        const int parts = element == INT8 ? 4 : 2, columns = element == INT8 ? lanes / 2 : 16;
        for (int j = 0, at = 0; j < lines; ++j)
            for (int b = 0; b < parts; ++b)
                for (int i = 0; i < columns; ++i, ++at)
                    body(at, element == INT8 ? lanes * j + 2 * i + b / 2 + b % 2 * (dim / 2) : 32 * j + 2 * i + b);
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

// Rows of a block in groups of 16 tokens; all distances in bytes.
struct StoredRows {
    const char* data;
    int64_t group, stride, line, plane;  // stride: from token to token
    int groups;                          // in `data`; the next is at `rest`, whatever follows is zeros
    const char *rest, *zeros;
    int64_t rest_stride;
    const char* at(int g) const { return g < groups ? data + g * group : g == groups ? rest : zeros; }
    int64_t step(int g) const { return g < groups ? stride : g == groups ? rest_stride : 0; }
};

template <int bits, bool look_up, int planes, Loading wide_load, Loading next_load>
inline void code_lines(const Stored& s, const Tables& tables, const char* from, int64_t stride, int groups, char* to,
                       MatrixUnit& unit, Ahead& ahead) {
    using F = Fields<bits>;
    const Decoder<bits, look_up> decoder(tables);
    const int64_t plane = s.lines * TILE;
    for (int g = 0; g < groups; ++g, from += 16 * stride, to += planes * plane)
        for (int j = 0; j < s.lines; ++j) {
            if (j % 2 == 0) unit.nudge();
            const Loader<wide_load> wide(s.wide[j]);
            const Loader<next_load> next(s.next[j]);
            const char* row = from;
            char* at = to + j * TILE;
            ahead.step(LINE_TICKS);
#pragma GCC unroll 4
            for (int i = 0; i < 16; ++i, row += stride, at += LINE) {
                vu code = wide(row) >> wide.even;  // tables repeat, so bits above the code do not matter
                if constexpr (F::next > 0) {
                    const vu low = (vu)splat(((1 << F::wide) - 1) * 0x01010101), y = next(row);
                    code = (code & low) | ((vu)_mm512_rorv_epi32((__m512i)y, (__m512i)next.even) & ~low);
                }
                decoder.template write<planes>((line)code, at, plane);
            }
        }
}

inline void code_lines(const Format& f, const Stored& s, const Tables& tables, const char* from, int64_t stride, int groups,
                       char* to, MatrixUnit& unit, Ahead& ahead) {
    auto load = [&]<int bits, int look_up, int planes>(std::integer_sequence<int, bits, look_up, planes>) {
        const Loading wide = s.wide[0].loading, next = s.next[0].loading;
        if (wide == PLAIN && (bits == Fields<bits>::wide || next == WHOLE))
            code_lines<bits, bool(look_up), planes, PLAIN, WHOLE>(s, tables, from, stride, groups, to, unit, ahead);
        else if (wide == WHOLE)  // and so is the next field, which has fewer words
            code_lines<bits, bool(look_up), planes, WHOLE, WHOLE>(s, tables, from, stride, groups, to, unit, ahead);
        else
            code_lines<bits, bool(look_up), planes, PARTS, PARTS>(s, tables, from, stride, groups, to, unit, ahead);
    };
    auto run = [&]<int bits>(std::integral_constant<int, bits>) {
        if (bits == 8 && f.linear)
            load(std::integer_sequence<int, bits, int(bits != 8), 1>{});
        else if (f.planes == 1)
            load(std::integer_sequence<int, bits, true, 1>{});
        else
            load(std::integer_sequence<int, bits, true, 2>{});
    };
    switch (f.bits) {
        case 2: return run(std::integral_constant<int, 2>{});
        case 3: return run(std::integral_constant<int, 3>{});
        case 4: return run(std::integral_constant<int, 4>{});
        case 5: return run(std::integral_constant<int, 5>{});
        case 6: return run(std::integral_constant<int, 6>{});
        case 8: return run(std::integral_constant<int, 8>{});
    }
}

// Rows of fp8 to rows of bfloat16.
inline void float8_lines(int dim, const char* from, int64_t stride, int count, char* to, MatrixUnit& unit, Ahead& ahead) {
    const int lanes = dim / 2;
    for (int t = 0; t < count; ++t, from += stride, to += 2 * dim) {
        if (t % 16 == 0) unit.nudge();
        for (int x = 0; x < lanes; x += 32) {
            ahead.step(1);
            const __mmask32 mask = lanes - x < 32 ? (1u << (lanes - x)) - 1 : ~0u;
            const auto code = (vec<uint16_t>)_mm512_maskz_loadu_epi16(mask, from + 2 * x);
            _mm512_mask_storeu_epi16(to + 2 * x, mask, (__m512i)fp8_to_bfloat(code & 0xff));
            _mm512_mask_storeu_epi16(to + 2 * (x + lanes), mask, (__m512i)fp8_to_bfloat(code >> 8));
        }
    }
}

// `count` rows, padded to `tokens` with zeros of the code, to `to` if they are not multiplied in place. `rest`: room for 17.
inline StoredRows stored_rows(const Format& f, const Stored& s, const Tables& tables, const char* from, int64_t stride, int count,
                              int tokens, char* to, char* rest, MatrixUnit& unit, Ahead& ahead) {
    const int64_t bytes = row_bytes(f);
    const int groups = count / 16;
    char* zeros = rest + 16 * bytes;
    if (count < tokens && f.kind != FP8_E4M3) {
        std::memset(rest, 0, 17 * bytes);
        for (int t = 16 * groups; t < count; ++t) std::memcpy(rest + (t - 16 * groups) * bytes, from + t * stride, bytes);
    }
    if (s.in_place) return {from, 16 * stride, stride, LINE, 0, groups, rest, zeros, bytes};
    if (f.kind == FP8_E4M3) {
        float8_lines(f.dim, from, stride, count, to, unit, ahead);
        std::memset(to + int64_t(count) * 2 * f.dim, 0, int64_t(tokens - count) * 2 * f.dim);
        return {to, 32 * int64_t(f.dim), 2 * int64_t(f.dim), LINE, 0, tokens / 16, nullptr, nullptr, 0};
    }
    const int64_t plane = s.lines * TILE, group = s.planes * plane;
    code_lines(f, s, tables, from, stride, groups, to, unit, ahead);
    for (int g = groups; 16 * g < tokens; ++g)
        code_lines(f, s, tables, 16 * g < count ? rest : zeros, 16 * g < count ? bytes : 0, 1, to + g * group, unit, ahead);
    return {to, group, LINE, TILE, plane, tokens / 16, nullptr, nullptr, 0};
}

// How often stored_rows and a pass over its lines call Ahead::tick, for 16 tokens.
INLINE int stored_ticks(const Format& f, const Stored& s) {
    const int made = s.in_place ? 0 : f.kind == FP8_E4M3 ? 16 * ((f.dim + 63) / 64) : LINE_TICKS * s.lines;
    return made + LINE_TICKS * s.lines * s.planes;
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
