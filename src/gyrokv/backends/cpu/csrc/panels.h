// Panels: the operand of the dot products, made once per block of tokens for all query rows.
//
// A panel holds LANES columns; each of its lines has, per column, 4 bytes of consecutive elements along the reduced axis
// (4 int8, 2 bfloat16 or 1 float). For K columns are tokens and the reduced axis is the head; for V columns are values
// of the head and tokens are reduced.
#pragma once
#include "packed.h"

namespace gyrokv {
namespace GYROKV_ISA {

// Panels of a block of tokens. `lines` of LINE bytes per panel; planes follow each other, `plane` bytes apart.
struct Panels {
    char* data;
    int64_t panel, plane;  // bytes
};

constexpr int TOKENS_PER_STEP = 64;  // blocks are padded to this many tokens, with zeros

INLINE int64_t k_lines(const Format& f) {  // padded to the 64 bytes that a matrix unit takes at once
    return round_up(int64_t(f.dim) * size_of(element_of(f)), f.kind == CODES ? 32 : 64) / 4;
}
INLINE int64_t v_panels(const Format& f) { return plain_stride(f) / size_of(element_of(f)) / LANES; }

// body(plain rows, first of their tokens) for all tokens of a block, ROWS_AT_ONCE at a time.
template <class Body>
INLINE void each_rows(const Format& f, const Tables& tables, const char* words, int64_t stride, int count, int tokens, char* scratch,
                      MatrixUnit& unit, Body body) {
    for (int t = 0; t < tokens; t += ROWS_AT_ONCE) {
        unit.keep_awake();
        body(plain_rows(f, tables, words + t * stride, stride, std::clamp(count - t, 0, ROWS_AT_ONCE), scratch), t);
    }
}

inline Panels k_panels(const Format& f, const Tables& tables, const Rows& rows, int64_t first, int count, int tokens, char* to,
                       char* scratch, MatrixUnit& unit, Ahead& ahead) {
    const int64_t panel = k_lines(f) * LINE, stride = rows.word_strides[2];
    const int64_t bytes = int64_t(f.dim) * size_of(element_of(f));
    const char* words = rows.words + first * stride;
    const Panels made = {to, panel, tokens / LANES * panel};
    if (packed_tokens(f)) {
        packed_panels(f, tables, true, words, stride, count, tokens, to, panel, made.plane, unit, ahead);
        return made;
    }
    each_rows(f, tables, words, stride, count, tokens, scratch, unit, [&](const PlainRows& plain, int t0) {
        for (int p = 0; p < f.planes; ++p)
            for (int t = 0; t < ROWS_AT_ONCE; t += LANES) {
                char* at = to + p * made.plane + (t0 + t) / LANES * panel;
                transpose_tokens(plain.first + p * plain.plane + t * plain.stride, plain.stride, bytes, at, ahead);
                if (panel > bytes * LANES) std::memset(at + bytes * LANES, 0, panel - bytes * LANES);
            }
    });
    return made;
}

template <Element e>
inline void v_panels_of(const PlainRows& plain, int p, int64_t bytes, char* to, int64_t panel, Ahead& ahead) {
    constexpr int depth = e == INT8 ? 4 : e == BFLOAT ? 2 : 1;
    for (int t = 0; t < ROWS_AT_ONCE; t += depth)
        for (int64_t at = 0; at < bytes; at += LINE) {
            ahead.tick();
            interleave_tokens<e>(plain.first + p * plain.plane + t * plain.stride + at, plain.stride,
                                 to + at / LINE * depth * panel + t / depth * LINE, panel);
        }
}

inline Panels v_panels(const Format& f, const Tables& tables, const Rows& rows, int64_t first, int count, int tokens, char* to,
                       char* scratch, MatrixUnit& unit, Ahead& ahead) {
    const Element e = element_of(f);
    const int64_t panel = int64_t(tokens) * size_of(e) / 4 * LINE + LINE;  // a line more: see query.h on strides
    const int64_t stride = rows.word_strides[2];
    const char* words = rows.words + first * stride;
    const Panels made = {to, panel, v_panels(f) * panel};
    if (packed_values(f)) {
        packed_panels(f, tables, false, words, stride, count, tokens, to, panel, made.plane, unit, ahead);
        return made;
    }
    each_rows(f, tables, words, stride, count, tokens, scratch, unit, [&](const PlainRows& plain, int t0) {
        for (int p = 0; p < f.planes; ++p) {
            char* at = to + p * made.plane + int64_t(t0) * size_of(e) / 4 * LINE;
            if (e == INT8)
                v_panels_of<INT8>(plain, p, plain_stride(f), at, panel, ahead);
            else if (e == BFLOAT)
                v_panels_of<BFLOAT>(plain, p, plain_stride(f), at, panel, ahead);
            else
                v_panels_of<FLOAT>(plain, p, plain_stride(f), at, panel, ahead);
        }
    });
    return made;
}

// How often making the panels of one side of a block calls Ahead::tick.
INLINE int panel_ticks(const Format& f, int tokens, bool keys) {
    const int64_t k_bytes = packed_tokens(f) ? row_bytes(f) : int64_t(f.dim) * size_of(element_of(f)) * f.planes;
    if (keys) return int(tokens / LANES * k_bytes / 16);
    if (packed_values(f)) return tokens / 16 * int(in_one_pass(f) ? 4 * row_bytes(f) / LINE : 8);
    return tokens / 16 * int(ROWS_AT_ONCE * size_of(element_of(f)) / 4 * (plain_stride(f) / LINE) * f.planes);
}

// Half precision scales of whole vectors of tokens, `n` per token, in rows without gaps.
template <int n>
INLINE int expand_halves(const char* from, int count, int tokens, float* to) {
    int t = 0;
    for (; t + LANES <= count; t += LANES, from += 2 * n * LANES) {
        vf x[n];
        for (int i = 0; i < n; ++i) x[i] = half_to_float(from + i * 2 * LANES);
#pragma GCC unroll 4
        for (int part = n / 2; part; part /= 2) {  // even places to the front, odd ones behind, log2(n) times
            vf y[n];
#pragma GCC unroll 8
            for (int i = 0; i < n / 2; ++i) {
                const int block = i / part * 2 * part, k = i % part;
                y[block + k] = unzip<0>(x[block + 2 * k], x[block + 2 * k + 1]);
                y[block + part + k] = unzip<1>(x[block + 2 * k], x[block + 2 * k + 1]);
            }
            for (int i = 0; i < n; ++i) x[i] = y[i];
        }
#pragma GCC unroll 16
        for (int g = 0; g < n; ++g) {  // x[i] holds the scale whose number is i with its bits reversed
            int source = 0;
            for (int bit = 1; bit < n; bit *= 2) source = source * 2 + (g & bit ? 1 : 0);
            store(to + int64_t(g) * tokens + t, x[source]);
        }
    }
    return t;
}

constexpr int MOST_SCALES = 640 / 32;  // of a row

#if defined(__AVX512F__)
// Where the i-th token's scale number g of `n` is among the first 16 tokens' scales, and which of these are in each vector of them.
template <int n>
struct ScalePlaces {
    alignas(64) int32_t place[n][LANES];
    uint16_t here[n][n] = {};
    constexpr ScalePlaces() {
        for (int g = 0; g < n; ++g)
            for (int i = 0; i < LANES; ++i) place[g][i] = i * n + g, here[g][place[g][i] / LANES] |= 1 << i;
    }
};

// The same for any `n` > 1: a permute takes what two vectors have of a scale, another one what each of the rest has.
template <int n>
inline int permute_halves(const char* from, int count, int tokens, float* to) {
    static constexpr ScalePlaces<n> places;
    int t = 0;
    for (; t + LANES <= count; t += LANES, from += 2 * n * LANES) {
        __m512 x[n];
        for (int i = 0; i < n; ++i) x[i] = (__m512)half_to_float(from + i * 2 * LANES);
        for (int g = 0; g < n; ++g) {
            const __m512i place = _mm512_load_si512(places.place[g]);
            __m512 y = _mm512_permutex2var_ps(x[0], place, x[1]);
            for (int i = 2; i < n; ++i) y = _mm512_mask_permutexvar_ps(y, places.here[g][i], place, x[i]);
            store(to + int64_t(g) * tokens + t, (vf)y);
        }
    }
    return t;
}
#endif

// Scales of a block as [scale][tokens] floats; zero from `count` on.
inline void expand_scales(const Format& f, const Rows& rows, int64_t first, int count, int tokens, float* to) {
    if (f.scale_type == SCALE_NONE) return;
    const int n = f.dim / f.group, size = f.scale_type == SCALE_F16 ? 2 : 4;
    const int64_t stride = rows.scale_strides[2];
    const char* from = rows.scale + first * stride;
    int t = 0;
    if (f.scale_type == SCALE_F16 && stride == 2 * n) {
        if (n == 1) t = expand_halves<1>(from, count, tokens, to);
        if (n == 2) t = expand_halves<2>(from, count, tokens, to);
        if (n == 4) t = expand_halves<4>(from, count, tokens, to);
        if (n == 8) t = expand_halves<8>(from, count, tokens, to);
        if (n == 16) t = expand_halves<16>(from, count, tokens, to);
#if defined(__AVX512F__)
        auto permute = [&]<int m>(std::integral_constant<int, m>) {
            if constexpr (m & (m - 1))
                if (n == m) t = permute_halves<m>(from, count, tokens, to);
        };
        [&]<int... m>(std::integer_sequence<int, m...>) {
            (permute(std::integral_constant<int, m + 1>{}), ...);
        }(std::make_integer_sequence<int, MOST_SCALES>{});
#else
        float wide[LANES * MOST_SCALES];
        for (; t + LANES <= count; t += LANES) {
            for (int i = 0; i < n; ++i) store(wide + i * LANES, half_to_float(from + t * stride + i * 2 * LANES));
            for (int g = 0; g < n; ++g)
                for (int i = 0; i < LANES; ++i) to[int64_t(g) * tokens + t + i] = wide[i * n + g];
        }
#endif
    }
    for (; t < count; ++t)
        for (int g = 0; g < n; ++g) {
            const char* at = from + t * stride + g * size;
            alignas(64) char one[2 * LANES] = {};
            std::memcpy(one, at, size);
            to[int64_t(g) * tokens + t] = size == 2 ? half_to_float(one)[0] : *(const float*)one;
        }
    for (int g = 0; g < n; ++g) std::fill(to + int64_t(g) * tokens + count, to + int64_t(g) * tokens + tokens, 0.0f);
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
