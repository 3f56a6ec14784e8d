// Sums of weighted rows of V of bfloat16 or fp8, as they are, for few query rows: products of pairs of tokens, whose values are
// brought together in registers. A weight has two parts of bfloat16.
#pragma once
#include "direct.h"
#include "float8.h"
#include "query.h"

namespace gyrokv {
namespace GYROKV_ISA {

#if !defined(GYROKV_QUADS)

INLINE bool adds_pairs(const Format&, int) { return false; }
INLINE int pair_ticks(const Format&, int, int) { return 0; }

#else

INLINE bool adds_pairs(const Format& f, int rows) {
    return (f.kind == BF16 || f.kind == FP8_E4M3) && rows <= MOST_DENSE_ROWS && f.dim % COLUMNS_PER_CHUNK == 0;
}

struct PairValues {
    const char* rows;        // of the first token
    int64_t row_stride;      // bytes
    int tokens, dim;
    const char* weights;     // [row][part], `stride` bytes apart; zero from `tokens` on
    int count;               // query rows
    float* out;              // out = out * rescale + sums
    int64_t out_stride;
    const float* rescale;
    char* kept;              // room for the lines of two chunks of all tokens
    Ahead& ahead;
};

// Parts of two vectors, of 16 bytes, in turns.
INLINE void join_parts(vf& a, vf& b) {
    constexpr auto low = [](int i) constexpr { return i / 8 * 4 + i % 4 + i % 8 / 4 * LANES; };
    constexpr auto high = [](int i) constexpr { return 8 + i / 8 * 4 + i % 4 + i % 8 / 4 * LANES; };
    const vf first = shuffle<low>(a, b);
    b = shuffle<high>(a, b), a = first;
}

// Chunks of two tokens: to vectors of dwords that hold a value of each.
template <bool float8, int chunks>
struct Pairs;
template <int chunks>
struct Pairs<false, chunks> {
    inline __attribute__((always_inline)) void operator()(const char* a, const char* b, line* to) const {
        using words = vec<uint16_t>;
        for (int c = 0; c < chunks; ++c, to += 2) {
            const words x = load<words>(a + c * LINE), y = load<words>(b + c * LINE);
            to[0] = (line)zip<0>(x, y), to[1] = (line)zip<1>(x, y);
        }
    }
    static inline __attribute__((always_inline)) void sort(vf* x) {
        for (int c = 0; c < 2 * chunks; c += 2) join_parts(x[c], x[c + 1]);
    }
};
template <int chunks>
struct Pairs<true, chunks> : Float8 {
    inline __attribute__((always_inline)) void operator()(const char* a, const char* b, line* to) const {
        if constexpr (chunks == 1) {
            const line x = spread(load<vec<uint8_t, LINE / 2>>(a)), y = spread(load<vec<uint8_t, LINE / 2>>(b));
            return Float8::operator()((__m512i)zip<0>(x, y), to);
        }
        for (int c = 0; c + 2 <= chunks; c += 2, a += LINE, b += LINE, to += 4) {
            const line x = load<line>(a), y = load<line>(b);
            Float8::operator()((__m512i)zip<0>(x, y), to);
            Float8::operator()((__m512i)zip<1>(x, y), to + 2);
        }
    }
    // To the order of bytes, and then those of the first half of the head before those of the second.
    static inline __attribute__((always_inline)) void sort(vf* x) {
        for (int c = 0; c < 2 * chunks; c += 2) join_parts(x[c], x[c + 1]);
        for (int c = 0; c + 4 <= 2 * chunks; c += 4) {
            constexpr auto low = [](int i) constexpr { return i % 8 + i / 8 * LANES; };
            constexpr auto high = [](int i) constexpr { return 8 + i % 8 + i / 8 * LANES; };
            const vf a = x[c], b = x[c + 1], p = x[c + 2], q = x[c + 3];
            x[c] = shuffle<low>(a, p), x[c + 1] = shuffle<high>(a, p);
            x[c + 2] = shuffle<low>(b, q), x[c + 3] = shuffle<high>(b, q);
        }
        for (int c = 0; c < 2 * chunks; c += 2) {
            const vf a = x[c], b = x[c + 1];
            x[c] = unzip<0>(a, b), x[c + 1] = unzip<1>(a, b);
        }
    }
};

// From three passes over rows of fp8 on the first one keeps their lines, and the others take these.
enum Keep { NOT_KEPT, KEEPS, KEPT };
INLINE bool keeps_float8(int rows) { return dense_passes(rows, DENSE_ROWS) > 2; }
constexpr int WIDE_ROWS = 2;  // so many take four chunks at once, more two

template <bool float8, int rows, int chunks, Keep keep>
void add_pairs_of(const PairValues& v, int row, int chunk) {
    constexpr int bytes = COLUMNS_PER_CHUNK * (float8 ? 1 : 2), vectors = 2 * chunks;
    const Pairs<float8, chunks> pairs;
    vf sum[rows][vectors] = {};
    const char* from = v.rows + chunk * bytes;
    const char* weights = v.weights + row * 2 * WEIGHT_STRIDE;
    char* kept = v.kept;
    auto add = [&](int64_t second) __attribute__((always_inline)) {
        line x[vectors];
        if constexpr (keep != KEPT) pairs(from, from + second, x);
        for (int i = 0; keep == KEPT && i < vectors; ++i) x[i] = load<line>(kept + i * LINE);
        for (int i = 0; keep == KEEPS && i < vectors; ++i) store(kept + i * LINE, x[i]);
        if constexpr (keep != NOT_KEPT) kept += vectors * LINE;
        for (int r = 0; r < rows; ++r)
            for (int part = 0; part < 2; ++part)
                for (int i = 0; i < vectors; ++i)
                    sum[r][i] = dot_bfloat(sum[r][i], x[i], weights + (2 * r + part) * WEIGHT_STRIDE);
        weights += 4, from += 2 * v.row_stride;
    };
    for (int t = 0; t + 2 <= v.tokens; t += 2) {
        v.ahead.tick_inside(2 * chunks);
        add(v.row_stride);
    }
    if (v.tokens % 2) add(0);
    for (int r = 0; r < rows; ++r) {
        pairs.sort(sum[r]);
        const vf old = splat(v.rescale[row + r]);
        for (int i = 0; i < vectors; ++i) {
            const int at = chunk + i / 2, column = float8 ? at * LANES + i % 2 * (v.dim / 2) : (2 * at + i % 2) * LANES;
            float* to = v.out + (row + r) * v.out_stride + column;
            store(to, fma(load<vf>(to), old, sum[r][i]));
        }
    }
}

template <bool float8, int chunks>
inline void add_pairs(const PairValues& v, int chunk) {
    const bool keeps = float8 && keeps_float8(v.count);
    for (int row = 0, n; row < v.count; row += n) {
        n = dense_pass(v.count - row, DENSE_ROWS);
        as_dense_pass<chunks == 4 ? WIDE_ROWS : DENSE_ROWS>(n, [&]<int rows>(std::integral_constant<int, rows>) {
            auto add = add_pairs_of<float8, rows, chunks, NOT_KEPT>;
            if constexpr (float8 && rows > WIDE_ROWS)
                if (keeps) add = row ? add_pairs_of<float8, rows, chunks, KEPT> : add_pairs_of<float8, rows, chunks, KEEPS>;
            add(v, row, chunk);
        });
    }
}

template <bool float8>
inline void add_pairs(const PairValues& v) {
    const int all = v.dim / COLUMNS_PER_CHUNK;
    int c = 0;
    for (; v.count <= WIDE_ROWS && c + 4 <= all; c += 4) add_pairs<float8, 4>(v, c);
    for (; c + 2 <= all; c += 2) add_pairs<float8, 2>(v, c);
    if (c < all) add_pairs<float8, 1>(v, c);
}

// Ticks of `ahead` while `rows` query rows take `tokens` tokens.
INLINE int pair_ticks(const Format& f, int rows, int tokens) {
    return dense_passes(rows, DENSE_ROWS) * tokens * (f.dim / COLUMNS_PER_CHUNK);
}

// Weights of a row to their parts, zeros up to whole vectors from `stop` on.
INLINE void split_weights(const float* weights, int first, int stop, char* to) {
    for (int t = first; t < stop; t += LANES) store_bfloats(load<vf>(weights + t), to, WEIGHT_STRIDE, t, 2);
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
