// Encoder: rotate, quantise, pack. The same bits as encode() in quant.py, which says what the steps mean.
//
// Sums run in index order with one float32 rounding per operation, so nothing is vectorised along a head. Instead
// LANES rows are encoded at once: x[d] holds value d of each, and every step is elementwise. Rows are transposed on the
// way in (values) and out (pairs of words).
//
// Builds need -ffp-contract=off; a fused multiply-add would round once where the definition rounds twice.
#pragma once
#include "core.h"
#include "simd.h"

namespace gyrokv {
namespace GYROKV_ISA {
namespace encoding {

constexpr float TINY = 1e-10f;  // a group whose norm is no larger is stored as zeros
constexpr float HALF_MAX = 65504.0f;

INLINE vf root(vf x) {
    float a[LANES];
    std::memcpy(a, &x, sizeof a);
    for (int l = 0; l < LANES; ++l) a[l] = __builtin_sqrtf(a[l]);
    return load<vf>(a);
}

INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

INLINE int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// LANES vectors, in place: perfect shuffles of all their elements, log2(LANES) times.
INLINE void transpose(vf (&v)[LANES]) {
    for (int stage = 1; stage < LANES; stage *= 2) {
        vf w[LANES];
        for (int i = 0; i < LANES / 2; ++i) {
            const vf a = v[i], b = v[i + LANES / 2];
            w[2 * i] = shuffle<[](int k) constexpr { return k / 2 + k % 2 * LANES; }>(a, b);
            w[2 * i + 1] = shuffle<[](int k) constexpr { return (k + LANES) / 2 + k % 2 * LANES; }>(a, b);
        }
        for (int i = 0; i < LANES; ++i) v[i] = w[i];
    }
}

// table[i % N], where N >= LANES is a power of two: permutations of registers where there are any.
template <int N>
INLINE vf pick(const float* table, vi i) {
#if defined(__AVX512F__)
    if constexpr (N == 16) return (vf)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)i, (__m512)load<vf>(table));
    if constexpr (N == 32) {
        return (vf)_mm512_permutex2var_ps((__m512)load<vf>(table), (__m512i)i, (__m512)load<vf>(table + 16));
    }
    if constexpr (N > 32) return (i & N / 2) != 0 ? pick<N / 2>(table + N / 2, i) : pick<N / 2>(table, i);
#elif defined(__AVX2__)
    if constexpr (N == 8) return (vf)_mm256_permutevar8x32_ps((__m256)load<vf>(table), (__m256i)i);
    if constexpr (N > 8 && N <= 32) return (i & N / 2) != 0 ? pick<N / 2>(table + N / 2, i) : pick<N / 2>(table, i);
    if constexpr (N > 32) return (vf)_mm256_i32gather_ps(table, (__m256i)(i & (N - 1)), 4);
#else
    vf v;
    for (int l = 0; l < LANES; ++l) v[l] = table[i[l] & (N - 1)];
    return v;
#endif
}

// What a call looks up. tree: the boundaries as a perfect search tree, node k above nodes 2k and 2k + 1, root 1.
struct Tables {
    float tree[256];
    float squares[256];  // of the levels
};

INLINE void fill(const Encode& e, Tables& t) {
    if (e.rule == RULE_FLOAT8) return;
    const int n = 1 << e.bits;
    if (!e.linear) {
        for (int node = 1, width = n; width > 1; width /= 2)
            for (int k = width / 2 - 1; k < n - 1; k += width) t.tree[node++] = e.boundaries[k];
    }
    if (e.corrected)
        for (int k = 0; k < n; ++k) t.squares[k] = e.levels[k] * e.levels[k];
}

INLINE vi add_unless(vi mask, vi x) {  // x + 1, or x where the mask is set (-1)
#if defined(__AVX512F__)
    return mask ? x : x + 1;
#else
    return x + 1 + mask;
#endif
}

// From node (of the level with WIDTH nodes) down to the leaves, N .. 2N - 1.
template <int WIDTH, int N, bool DOWN>
INLINE vi descend(const Tables& t, vf z, vi node) {
    if constexpr (WIDTH == N) {
        return node;
    } else {
        const vf boundary = pick<(WIDTH < LANES ? LANES : WIDTH)>(WIDTH < LANES ? t.tree : t.tree + WIDTH, node);
        return descend<2 * WIDTH, N, DOWN>(t, z, add_unless(DOWN ? boundary >= z : boundary > z, node + node));
    }
}

// The number of boundaries below z (DOWN) or not above z, as torch.bucketize counts them: all of them for NaN.
template <int BITS, bool DOWN>
INLINE vi bucket(const Tables& t, vf z) {
    return descend<1, 1 << BITS, DOWN>(t, z, splat(1)) - (1 << BITS);
}

// Normalised values z[n] become codes in place. Returns the sum of the squares of their levels, if it is wanted.
template <int BITS, bool DOWN>
static vf assign(const Encode& e, const Tables& t, vf* z, int n) {
    constexpr int size = 1 << BITS, half = size / 2;
    const bool corrected = e.corrected, sign_magnitude = e.sign_magnitude;
    vf total = {};
    for (int j = 0; j < n; ++j) {
        vi code = bucket<BITS, DOWN>(t, z[j]);
        if (corrected) total += pick<(size < LANES ? LANES : size)>(t.squares, code);
        if (sign_magnitude) {
            code -= half;
            code ^= code >> 31 & ~half;
        }
        z[j] = (vf)code;
    }
    return total;
}

// The same for levels that are the integers low .. high.
template <bool AWAY>
static vf assign_linear(const Encode& e, const Tables& t, vf* z, int n) {
    const float low = e.low, high = e.high;
    const bool corrected = e.corrected;
    vf total = {};
    for (int j = 0; j < n; ++j) {
        vf code;
        if constexpr (AWAY) {
            // beyond high + 1 nothing changes, and what is left converts to int
            vf v = magnitude(z[j]);
            v = v < high + 1.0f ? v : splat(high + 1.0f);
            const vf whole = __builtin_convertvector(__builtin_convertvector(v, vi), vf);
            vf rounded = v - whole >= 0.5f ? whole + 1.0f : whole;
            rounded = rounded < high ? rounded : splat(high);
            code = (z[j] < 0.0f ? -rounded : rounded) - low;
        } else {
            code = z[j] + (0.5f - low);
            code = code > 0.0f ? code : vf{};
            code = code < high - low ? code : splat(high - low);
        }
        const vi index = __builtin_convertvector(code, vi);
        if (corrected) total += pick<256>(t.squares, index);
        z[j] = (vf)index;
    }
    return total;
}

typedef vf (*Assign)(const Encode&, const Tables&, vf*, int);

INLINE Assign assign_of(const Encode& e) {
    static constexpr Assign up[] = {assign<1, false>, assign<2, false>, assign<3, false>, assign<4, false>,
                                    assign<5, false>, assign<6, false>, assign<7, false>, assign<8, false>};
    static constexpr Assign down[] = {assign<1, true>, assign<2, true>, assign<3, true>, assign<4, true>,
                                      assign<5, true>, assign<6, true>, assign<7, true>, assign<8, true>};
    if (e.linear) return e.ties == 0 ? assign_linear<false> : assign_linear<true>;
    return (e.ties == 1 ? down : up)[e.bits - 1];
}

// Strides s, 2s, .. Rs / 2 of the transform; the values stay in registers between them.
template <int R>
INLINE void butterflies(vf* x, int n, int stride) {
    for (int start = 0; start < n; start += R * stride) {
        for (int j = start; j < start + stride; ++j) {
            vf v[R];
            for (int r = 0; r < R; ++r) v[r] = x[j + r * stride];
            for (int h = 1; h < R; h *= 2) {
                for (int r = 0; r < R; ++r) {
                    if (r & h) continue;
                    const vf a = v[r], b = v[r + h];
                    v[r] = a + b;
                    v[r + h] = a - b;
                }
            }
            for (int r = 0; r < R; ++r) x[j + r * stride] = v[r];
        }
    }
}

// One group of `scale * x`.
INLINE void turn(const Encode& e, vf* x, vf scale) {
    const int n = e.group;
    for (int j = 0; j < n; ++j) x[j] = x[j] * scale * e.before[j];
    int stride = 1;
    for (; n / stride >= 8; stride *= 8) butterflies<8>(x, n, stride);
    if (n / stride == 4) butterflies<4>(x, n, stride);
    if (n / stride == 2) butterflies<2>(x, n, stride);
    for (int j = 0; j < n; ++j) x[j] = x[j] * e.rotation_factor * e.after[j];
}

INLINE vf length(const vf* x, int n, float divisor) {
    vf total = x[0] * x[0];
    for (int j = 1; j < n; ++j) total += x[j] * x[j];
    return root(total / divisor);
}

// One span in place, by every rule but l2, which normalises before the rotation. Returns its norm.
INLINE vf normalise(const Encode& e, vf* x) {
    const int n = e.span;
    vf norm;
    if (e.rule == RULE_RMS) {
        const bool one_span = n == e.group;
        norm = length(x, n, one_span ? 1.0f : (float)n);
        const vi keep = norm > TINY;
        const vf inverse = 1.0f / norm;
        const float size = (float)__builtin_sqrt((double)n);
        for (int j = 0; j < n; ++j) {
            const vf z = one_span ? x[j] * inverse * size : x[j] / norm * e.scale_factor;
            x[j] = keep ? z : vf{};
        }
        return norm;
    }
    vf extreme = x[0];  // the first of the largest magnitudes
    for (int j = 1; j < n; ++j) extreme = magnitude(x[j]) > magnitude(extreme) ? x[j] : extreme;
    if (e.rule == RULE_ABSMAX) {
        norm = magnitude(extreme) / e.high;
        const vf inverse = 1.0f / norm;
        const vf factor = inverse <= __FLT_MAX__ ? inverse : vf{};
        for (int j = 0; j < n; ++j) x[j] *= factor;
        return norm;
    }
    norm = extreme / e.low;
    const vi keep = norm != 0.0f;
    for (int j = 0; j < n; ++j) x[j] = keep ? x[j] / norm : vf{};
    return norm;
}

INLINE uint16_t to_half(float x) {  // |x| <= HALF_MAX
    uint32_t u;
    std::memcpy(&u, &x, 4);
    const uint32_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u >= 0x38800000) return (uint16_t)(sign | (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
    std::memcpy(&x, &u, 4);
    x += 0.5f;  // below 2^-14: 0.5 has the unit in the last place of a subnormal half
    std::memcpy(&u, &x, 4);
    return (uint16_t)(sign | (u - 0x3f000000));
}

INLINE vi to_float8(vf x) {
    x = x > 448.0f ? splat(448.0f) : x < -448.0f ? splat(-448.0f) : x;
    const vi sign = (vi)((vu)x >> 24) & 0x80;
    const vi u = (vi)magnitude(x);
    const vi normal = (u - (120 << 23) + 0x7ffff + (u >> 20 & 1)) >> 20;
    const vi subnormal = (vi)((vf)u + 0x1p14f) - (vi)splat(0x1p14f);  // as in to_half
    return sign | (u > 0x7f800000 ? splat(0x7f) : u >= 121 << 23 ? normal : subnormal);
}

INLINE vf half_to_float(vu u) {  // the low 16 bits; independent of how the CPU treats denormals
    const vu m = u & 0x7fff;
    const vu normal = (m << 13) + (m < 0x7c00 ? vu{} + (112u << 23) : vu{} + (224u << 23));
    const vf subnormal = __builtin_convertvector((vi)m, vf) * 0x1p-24f;
    return (vf)((m < 0x400 ? (vu)subnormal : normal) | (u & 0x8000) << 16);
}

// LANES rows of `dim` values to x[padded], zeros after the values. 16-bit values travel in pairs.
template <int KIND>
static void read(const Encode& e, const char* const (&rows)[LANES], vf* x) {
    constexpr int size = KIND == F32 ? 4 : 2, step = 4 / size;
    int d = 0;
    for (; d < e.dim; d += LANES * step) {
        const int left = (e.dim - d) * size;  // bytes
        vf block[LANES];
        for (int l = 0; l < LANES; ++l) {
            block[l] = vf{};
            if (left >= 4 * LANES) {
                std::memcpy(&block[l], rows[l] + d * size, 4 * LANES);
            } else {
                std::memcpy(&block[l], rows[l] + d * size, left);
            }
        }
        transpose(block);
        for (int i = 0; i < LANES; ++i) {
            const vu u = (vu)block[i];
            vf* to = x + d + i * step;
            if constexpr (KIND == F32) to[0] = block[i];
            if constexpr (KIND == BF16) to[0] = (vf)(u << 16), to[1] = (vf)(u & 0xffff0000);
            if constexpr (KIND == F16) to[0] = half_to_float(u), to[1] = half_to_float(u >> 16);
        }
    }
    for (; d < e.padded; ++d) x[d] = vf{};
}

INLINE int words_of(const Encode& e) { return e.padded * e.bits / 16; }

// The field of WIDTH bits from bit `low` of n * 16 / WIDTH codes, if there is one; it moves `low` and `words` past it.
template <int WIDTH>
INLINE void pack_field(const Encode& e, const vf* codes, int& low, vf*& words) {
    if (!(e.bits & WIDTH)) return;
    const int n = e.padded * WIDTH / 16;
    for (int i = 0; i < n; ++i) {
        vu word = {};
        for (int p = 0; p < 16 / WIDTH; ++p) word |= ((vu)codes[i + p * n] >> low & ((1u << WIDTH) - 1)) << (p * WIDTH);
        words[i] = (vf)word;
    }
    low += WIDTH;
    words += n;
}

INLINE void pack(const Encode& e, const vf* codes, vf* words) {
    int low = 0;
    pack_field<8>(e, codes, low, words);
    pack_field<4>(e, codes, low, words);
    pack_field<2>(e, codes, low, words);
    pack_field<1>(e, codes, low, words);
}

INLINE void write(const vf* words, int n, char* const (&out)[LANES], int lanes) {
    for (int first = 0; first < n; first += 2 * LANES) {
        vf block[LANES];
        for (int i = 0; i < LANES; ++i) {
            const vf* pair = words + first + 2 * i;
            block[i] = (vf)((vu)pair[0] | (vu)pair[1] << 16);
        }
        transpose(block);
        const int left = n - first;
        for (int l = 0; l < lanes; ++l) {
            if (left >= 2 * LANES) {
                std::memcpy(out[l] + 2 * first, &block[l], 4 * LANES);
            } else {
                std::memcpy(out[l] + 2 * first, &block[l], 2 * left);
            }
        }
    }
}

INLINE void write_scale(const Encode& e, vf norm, int at, char* const (&out)[LANES], int lanes) {
    if (e.scale_type == SCALE_F32) {
        for (int l = 0; l < lanes; ++l) std::memcpy(out[l] + 4 * at, (const char*)&norm + 4 * l, 4);
        return;
    }
    norm = norm == norm ? norm : splat(HALF_MAX);  // NaN: float32 overflowed in the rotation
    norm = norm > HALF_MAX ? splat(HALF_MAX) : norm < -HALF_MAX ? splat(-HALF_MAX) : norm;
    for (int l = 0; l < lanes; ++l) {
        const uint16_t half = to_half(norm[l]);
        std::memcpy(out[l] + 2 * at, &half, 2);
    }
}

// x[padded] becomes codes, and the scales are written.
INLINE void quantise(const Encode& e, const Tables& t, Assign assign, vf* x, char* const (&out)[LANES], int lanes) {
    for (int d = 0; d < e.padded; d += e.group) {
        vf norm = {}, inverse = splat(1.0f);
        if (e.rule == RULE_L2) {
            norm = length(x + d, e.group, 1.0f);
            inverse = norm > TINY ? 1.0f / norm : vf{};
        }
        if (e.rotate) {
            turn(e, x + d, inverse);
        } else if (e.rule == RULE_L2) {
            for (int j = 0; j < e.group; ++j) x[d + j] = x[d + j] * inverse * e.unscaled_factor;
        }
        if (e.rule == RULE_FLOAT8) {
            for (int j = 0; j < e.group; ++j) x[d + j] = (vf)to_float8(x[d + j]);
            continue;
        }
        for (int s = d; s < d + e.group; s += e.span) {
            if (e.rule != RULE_L2) norm = normalise(e, x + s);
            const vf squares = assign(e, t, x + s, e.span);
            if (e.corrected) {
                const vf decoded = root(squares);
                norm = decoded > TINY ? norm / decoded : norm;
            }
            write_scale(e, norm, s / e.span, out, lanes);
        }
    }
}

// Scratch: Tables, x [padded][LANES], words [W][LANES]; rounded up to what is read and written at once.
INLINE size_t scratch_bytes(const Encode& e) {
    return sizeof(Tables) + (size_t)(round_up(e.padded, 2 * LANES) + round_up(words_of(e), 2 * LANES)) * sizeof(vf);
}

INLINE void run(const Encode& e, int64_t row_first, int64_t rows, char* scratch) {
    if (rows <= 0) return;
    Tables& tables = *(Tables*)scratch;
    vf* x = (vf*)(scratch + sizeof(Tables));
    vf* words = x + round_up(e.padded, 2 * LANES);
    fill(e, tables);
    const Assign assign = e.rule == RULE_FLOAT8 ? nullptr : assign_of(e);
    int64_t token = row_first % e.tokens, head = row_first / e.tokens % e.heads;
    int64_t batch = row_first / e.tokens / e.heads;
    while (rows > 0) {
        const int lanes = rows < LANES ? (int)rows : LANES;
        const char* in[LANES];
        char *words_out[LANES], *scale_out[LANES];
        for (int l = 0; l < LANES; ++l) {  // lanes beyond the rows repeat the last row and are not written
            const auto at = [&](const int64_t* s) { return batch * s[0] + head * s[1] + token * s[2]; };
            in[l] = e.x + at(e.x_strides);
            words_out[l] = e.words + at(e.word_strides);
            scale_out[l] = e.scale_type == SCALE_NONE ? nullptr : e.scale + at(e.scale_strides);
            if (l + 1 < rows && ++token == e.tokens) {
                token = 0;
                if (++head == e.heads) head = 0, ++batch;
            }
        }
        if (e.x_kind == F32) read<F32>(e, in, x);
        if (e.x_kind == F16) read<F16>(e, in, x);
        if (e.x_kind == BF16) read<BF16>(e, in, x);
        quantise(e, tables, assign, x, scale_out, lanes);
        pack(e, x, words);
        write(words, words_of(e), words_out, lanes);
        rows -= lanes;
    }
}

}  // namespace encoding

static size_t encode_scratch(const Encode& e) { return encoding::scratch_bytes(e); }

static void encode(const Encode& e, int64_t row_first, int64_t rows, char* scratch) {
    encoding::run(e, row_first, rows, scratch);
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
