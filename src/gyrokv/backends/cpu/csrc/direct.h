// Sums of weighted rows of V as they are stored, for few query rows: float16, float32, linear bytes and, where they have no products,
// bfloat16 and fp8 become floats in registers, each token's are multiplied with a weight of every row, and no panels are made. Weights stay
// float32.
//
// Columns are taken two vectors at a time, a chunk. In rows of words (see packing.py) lane i of a chunk holds columns 2 i and
// 2 i + 1 in its two words, so a chunk becomes a vector of its even columns and one of its odd ones, and so lie the sums
// while a run is passed over.
#pragma once
#include <bit>

#include "float_scores.h"
#include "mma.h"
#include "quads.h"

namespace gyrokv {
namespace GYROKV_ISA {

constexpr int MOST_DIRECT_CODES = 8;                // query rows: more are cheaper with panels
constexpr int MOST_DIRECT = MOST_DENSE_ROWS;        // of rows that are no codes
constexpr int COLUMNS_PER_CHUNK = 2 * LANES;
constexpr int DIRECT_PACE = 6;  // ticks per token and pass

enum Decoding : int { HALVES, BFLOATS, FLOATS, FLOAT8S, LINEAR };

#if defined(__AVX512F__)
// Where the codes of a chunk are: lane i loads a dword from one of two places, then takes that of lane index[i] and
// shifts it. PLAIN: they are 64 consecutive bytes. HALF, QUARTER: 32 or 16, repeated. WHOLE: one load has all of the field.
// PARTS: neither.
enum Loading : int { PARTS, PLAIN, WHOLE, HALF, QUARTER };
struct Piece {
    int32_t offset[2];
    __mmask16 mask[2];
    Loading loading;
    alignas(64) uint32_t index[LANES], even[LANES], odd[LANES];
};

// The piece of a field of `width` bits that begins at byte `base` of a row, for 32 columns from `start` on, whose codes go
// to bit `to` of a lane.
INLINE Piece piece_of(int dim, int width, int base, int start, int to) {
    Piece made = {};
    const int words = dim * width / 16, first = start % words;
    const int before = std::min(LANES, (words - first) / 2);  // lanes until the field begins again
    const bool plain = words % COLUMNS_PER_CHUNK == 0 && start % COLUMNS_PER_CHUNK == 0;
    made.offset[0] = base + 2 * first, made.offset[1] = base - 4 * before;
    made.mask[0] = __mmask16((1u << before) - 1), made.mask[1] = __mmask16(~made.mask[0]);
    const bool whole = words <= COLUMNS_PER_CHUNK && !plain;
    if (whole) made.offset[0] = base, made.mask[0] = __mmask16((1u << words / 2) - 1), made.mask[1] = 0;
    const bool aligned = whole && start % words == 0;
    made.loading = plain ? PLAIN : aligned && words == 16 ? HALF : aligned && words == 8 ? QUARTER : whole ? WHOLE : PARTS;
    for (int i = 0; i < LANES; ++i) {
        const int column = start + 2 * i, at = column / words * width - to;
        made.index[i] = uint32_t(whole ? column % words / 2 : i);
        made.even[i] = uint32_t(at & 31), made.odd[i] = uint32_t((at + 16) & 31);
    }
    return made;
}

// A piece in registers. (Everything is a vu, because GCC spills vectors that it sees as lanes of different sizes.)
template <Loading loading>
struct Loader {
    int64_t offset[2];
    __mmask16 mask[2];
    vu index, even, odd;
    inline __attribute__((always_inline)) explicit Loader(const Piece& p)
        : offset{p.offset[0], p.offset[1]}, mask{p.mask[0], p.mask[1]}, index(load<vu>(p.index)), even(load<vu>(p.even)),
          odd(load<vu>(p.odd)) {}
    inline __attribute__((always_inline)) vu operator()(const char* row) const {
        if constexpr (loading == PLAIN) return load<vu>(row + offset[0]);
        if constexpr (loading == HALF) return (vu)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)(row + offset[0])));
        if constexpr (loading == QUARTER) return (vu)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(row + offset[0])));
        __m512i x = _mm512_maskz_loadu_epi32(mask[0], row + offset[0]);
        if constexpr (loading == PARTS) x = _mm512_mask_loadu_epi32(x, mask[1], row + offset[1]);
        return (vu)_mm512_permutexvar_epi32((__m512i)index, x);
    }
};

#endif

struct Direct {
    Decoding decoding;
    bool turned;        // chunks are even and odd columns
#if defined(__AVX512F__)
    Piece wide[640 / COLUMNS_PER_CHUNK];
#endif
};

INLINE bool adds_direct(const Format& f, int rows) {
    if (rows > (f.kind == CODES ? MOST_DIRECT_CODES : MOST_DIRECT) || f.dim % COLUMNS_PER_CHUNK || f.group % COLUMNS_PER_CHUNK) return false;
    if (f.kind == CODES) return f.linear && LANES == 16;
    if (f.kind == FP8_E4M3 && rows > MOST_FLOAT8_ROWS) return false;
    return !BFLOAT_DOT || (f.kind != BF16 && f.kind != FP8_E4M3);
}

inline Direct direct_of(const Format& f) {
    Direct made;
    made.decoding = f.kind == F16 ? HALVES : f.kind == BF16 ? BFLOATS : f.kind == F32 ? FLOATS : f.kind == FP8_E4M3 ? FLOAT8S : LINEAR;
    made.turned = f.kind == CODES;
#if defined(__AVX512F__)
    for (int c = 0; made.decoding == LINEAR && c * COLUMNS_PER_CHUNK < f.dim; ++c)
        made.wide[c] = piece_of(f.dim, 8, 0, COLUMNS_PER_CHUNK * c, 0);
#endif
    return made;
}

// Rows that are no codes to the two vectors of each chunk.
template <int decoding, bool, int chunks>
struct Decoded {
    static constexpr int bytes = LANES * (decoding == FLOATS ? 4 : 2);  // of a vector
    int64_t at;
    inline __attribute__((always_inline)) Decoded(const Direct&, int chunk) : at(chunk * 2 * bytes) {}
    inline __attribute__((always_inline)) void operator()(const char* row, vf* to) const {
        for (int i = 0; i < 2 * chunks; ++i) {
            const char* from = row + at + i * bytes;
            to[i] = decoding == HALVES ? half_to_float(from) : decoding == BFLOATS ? bfloat_to_float(from) : load<vf>(from);
        }
    }
};
#if !defined(__AVX512F__)
template <int chunks>
struct Decoded<FLOAT8S, true, chunks> {
    int64_t at;
    inline __attribute__((always_inline)) Decoded(const Direct&, int chunk) : at(chunk * 2 * LANES) {}
    inline __attribute__((always_inline)) void operator()(const char* row, vf* to) const {
        for (int c = 0; c < chunks; ++c) fp8_to_floats(row + at + c * 2 * LANES, to + 2 * c);
    }
};
#else
template <bool plain, int chunks>
struct Decoded<LINEAR, plain, chunks> {
    const Loader<plain ? PLAIN : PARTS> wide[2];
    inline __attribute__((always_inline)) Decoded(const Direct& d, int first)
        : wide{Loader<plain ? PLAIN : PARTS>(d.wide[first]), Loader<plain ? PLAIN : PARTS>(d.wide[first + chunks - 1])} {}
    inline __attribute__((always_inline)) void operator()(const char* row, vf* to) const {
        for (int c = 0; c < chunks; ++c, to += 2) {
            const vu x = wide[c](row);
            to[0] = to_float((vi)(x >> wide[c].even & 255)), to[1] = to_float((vi)(x >> wide[c].odd & 255));
        }
    }
};
#endif

// Weights of 16 tokens and up to 4 rows, [token % 4][token / 4][row], so that one pointer reaches all.
constexpr int WEIGHTS = 4 * LANES;
INLINE uint32_t weight_at(uint32_t token) { return token / LANES * WEIGHTS + token % 4 * LANES + token % LANES / 4 * 4; }

// Rows of V and what they are multiplied with.
struct Weighted {
    const Direct& direct;
    const char* rows;
    int64_t row_stride;      // bytes
    int first, stop;         // tokens; the first is a multiple of LANES
    const float* weights;    // [group][4 rows at a time][tokens as above]
    int64_t stride;          // of each 4 rows; floats
    int count;               // rows
    int dim, group;          // columns
    float* out;
    int64_t out_stride;
    const float* rescale;    // out = out * rescale + factor * sums
    float factor;
    const float* totals;     // [group][row] sums of weights, for LINEAR
};

template <int decoding, bool plain, int rows, int chunks>
INLINE void add_chunks(const Weighted& w, int row, int chunk, Ahead& ahead) {
    constexpr bool codes = decoding == LINEAR;
    const Decoded<decoding, plain, chunks> decoded(w.direct, chunk);
    vf sum[rows][2 * chunks] = {};
    const float* weights[chunks];
    int group[chunks];
    for (int c = 0; c < chunks; ++c) {
        group[c] = codes ? (chunk + c) * COLUMNS_PER_CHUNK / w.group : 0;
        weights[c] = w.weights + (int64_t(group[c]) * ((w.count + 3) / 4) + row / 4) * w.stride + row % 4;
    }
    const int64_t row_stride = w.row_stride;
    const char* from = w.rows + w.first * row_stride;
    auto add = [&](int64_t at) __attribute__((always_inline)) {
        vf x[2 * chunks];
        decoded(from, x);
        for (int c = 0; c < chunks; ++c)
            for (int r = 0; r < rows; ++r) {
                const vf weight = splat(weights[codes ? c : 0][at + r]);
                sum[r][2 * c] = fma(weight, x[2 * c], sum[r][2 * c]);
                sum[r][2 * c + 1] = fma(weight, x[2 * c + 1], sum[r][2 * c + 1]);
            }
        from += row_stride;
    };
    int t = w.first;
    for (; t + 4 <= w.stop; t += 4) {
        ahead.tick(4 * DIRECT_PACE);
        const int64_t at = weight_at(uint32_t(t));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) add(at + i * LANES);
    }
    for (; t < w.stop; ++t) add(weight_at(uint32_t(t)));
    for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < 2 * chunks; ++i) {
            const int column = decoding == FLOAT8S ? (chunk + i / 2) * LANES + i % 2 * (w.dim / 2) : (2 * chunk + i) * LANES;
            float* to = w.out + (row + r) * w.out_stride + column;
            vf made = sum[r][i];
            if constexpr (decoding == LINEAR) made -= 128.0f * w.totals[group[i / 2] * w.count + row + r];
            store(to, fma(load<vf>(to), splat(w.rescale[row + r]), made * w.factor));
        }
    }
}

// Weights of `rows` (up to 4) rows of scores times V's scales (null: none) as above, and their sums.
INLINE void share_weights(const float* scores, int64_t stride, int rows, const float* scales, int first, int stop, float* to,
                          float* totals) {
    vf total[4] = {};
    for (int t = first; t < stop; t += LANES) {
        vf x[4] = {};
        for (int r = 0; r < rows; ++r) {
            x[r] = load<vf>(scores + r * stride + t);
            if (scales) x[r] *= load<vf>(scales + t);
            total[r] += x[r];
        }
        using vq = vec<uint64_t>;
        const vq a = (vq)zip<0>(x[0], x[1]), b = (vq)zip<0>(x[2], x[3]), c = (vq)zip<1>(x[0], x[1]), d = (vq)zip<1>(x[2], x[3]);
        float* at = to + t / LANES * WEIGHTS;
        store(at, zip<0>(a, b)), store(at + LANES, zip<1>(a, b));
        store(at + 2 * LANES, zip<0>(c, d)), store(at + 3 * LANES, zip<1>(c, d));
    }
    for (int r = 0; r < rows; ++r) totals[r] = reduce_add(total[r]);
}

// Chunks that `rows` query rows take at once, at most: 16 sums where there are 32 registers, else 8.
template <int decoding>
constexpr int chunks_at_once(int rows) {
    if (LANES < 16) return 4 / rows;
    return rows <= 2 && TAKES_QUADS && decoding < LINEAR ? 4 : 2;
}

template <int decoding, bool plain, int rows, int chunks>
INLINE void add_columns(const Weighted& w, int row, int chunk, MatrixUnit& unit, Ahead& ahead) {
    const int all = w.dim / COLUMNS_PER_CHUNK;
    for (; chunk + chunks <= all; chunk += chunks) {
        unit.keep_awake();
        add_chunks<decoding, plain, rows, chunks>(w, row, chunk, ahead);
    }
    if constexpr (chunks > 1) add_columns<decoding, plain, rows, chunks / 2>(w, row, chunk, unit, ahead);
}

template <int decoding, bool plain>
inline void add_direct_of(const Weighted& w, MatrixUnit& unit, Ahead& ahead) {
    auto some = [&]<int rows>(std::integral_constant<int, rows>, int row) {
        add_columns<decoding, plain, rows, chunks_at_once<decoding>(rows)>(w, row, 0, unit, ahead);
    };
    for (int row = 0; row < w.count; row += 4)  // as weights lie
        as_dense_pass<4>(std::min(w.count - row, 4), [&](auto rows) { some(rows, row); });
}

inline void add_direct(const Weighted& w, MatrixUnit& unit, Ahead& ahead) {
    if (w.direct.decoding == HALVES) return add_direct_of<HALVES, true>(w, unit, ahead);
    if (w.direct.decoding == FLOATS) return add_direct_of<FLOATS, true>(w, unit, ahead);
#if defined(__AVX512F__)
    if (w.direct.wide[0].loading == PLAIN) return add_direct_of<LINEAR, true>(w, unit, ahead);
    add_direct_of<LINEAR, false>(w, unit, ahead);
#else
    if (w.direct.decoding == FLOAT8S) return add_direct_of<FLOAT8S, true>(w, unit, ahead);
    add_direct_of<BFLOATS, true>(w, unit, ahead);
#endif
}

// Passes over the columns of a row of V for `rows` query rows.
INLINE int direct_passes(const Format& f, int rows) {
    auto passes = [&](int rows) {
        const int at_once = f.kind == CODES ? chunks_at_once<LINEAR>(rows) : chunks_at_once<FLOATS>(rows), all = f.dim / COLUMNS_PER_CHUNK;
        return all / at_once + std::popcount(unsigned(all % at_once));
    };
    return rows / 4 * passes(4) + (rows % 4 ? passes(rows % 4) : 0);
}

// Rows of the output to even and odd columns of chunks, or back.
inline void turn_columns(const Direct& d, float* out, int count, int64_t stride, int dim, bool back) {
    if (!d.turned) return;
    constexpr auto low = [](int i) constexpr { return i / 2 + i % 2 * LANES; };
    constexpr auto high = [](int i) constexpr { return LANES / 2 + i / 2 + i % 2 * LANES; };
    for (int r = 0; r < count; ++r)
        for (int c = 0; c < dim; c += COLUMNS_PER_CHUNK) {
            float* at = out + r * stride + c;
            const vf a = load<vf>(at), b = load<vf>(at + LANES);
            store(at, back ? shuffle<low>(a, b) : unzip<0>(a, b));
            store(at + LANES, back ? shuffle<high>(a, b) : unzip<1>(a, b));
        }
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
