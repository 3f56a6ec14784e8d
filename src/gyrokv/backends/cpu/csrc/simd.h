// One vector layer for all instruction sets: GCC vector extensions for arithmetic, a few primitives where they differ.
//
// A vector holds LANES 32-bit values. `line` is the same register seen as bytes: 4 int8, 2 bfloat16 or 1 float per
// lane, which is what one dot step of a lane consumes.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define GYROKV_LANES 16
#elif defined(__AVX2__)
#define GYROKV_LANES 8
#else
#define GYROKV_LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

namespace gyrokv {
namespace GYROKV_ISA {

constexpr int LANES = GYROKV_LANES;
constexpr int LINE = 4 * LANES;  // bytes

template <class T, int bytes>
struct VectorOf {
    typedef T type __attribute__((vector_size(bytes)));
};
template <class T, int bytes = LINE>
using vec = typename VectorOf<T, bytes>::type;
using vf = vec<float>;
using vi = vec<int32_t>;
using vu = vec<uint32_t>;
using line = vec<uint8_t>;
using vh = vec<uint16_t, 2 * LANES>;

template <class V>
INLINE V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}
template <class V>
INLINE void store(void* p, V v) {
    std::memcpy(p, &v, sizeof(V));
}
INLINE vf splat(float x) { return x - vf{}; }
INLINE vi splat(int32_t x) { return x - vi{}; }
INLINE vi broadcast4(const void* p) {  // four bytes to every lane
    int32_t x;
    std::memcpy(&x, p, 4);
    return splat(x);
}

// A constant whose lanes are f(0), f(1), ...
template <auto f>
INLINE vu lanes() {
    return []<size_t... i>(std::index_sequence<i...>) { return vu{uint32_t(f(int(i)))...}; }(std::make_index_sequence<LANES>{});
}

// The same value in every lane. A parameter of the lane's own type, because a scalar expression is an int, and that is
// a truncation to compilers that do not fold it.
template <class V>
INLINE V splat_of(std::remove_cvref_t<decltype(V{}[0])> x) {
    return V{} + x;
}
template <class V>
INLINE V shift_right(V x, int n) {
    return x >> splat_of<V>(n);
}
template <class V>
INLINE V shift_left(V x, int n) {
    return x << splat_of<V>(n);
}

// Permutations whose index is a constexpr function of the lane.
template <auto index, class V, size_t... i>
INLINE V shuffle_(V a, V b, std::index_sequence<i...>) {
    return __builtin_shufflevector(a, b, index(int(i))...);
}
template <auto index, class V>
INLINE V shuffle(V a, V b) {
    return shuffle_<index>(a, b, std::make_index_sequence<sizeof(V) / sizeof(a[0])>{});
}
template <class V>
constexpr int count_of = sizeof(V) / sizeof(std::declval<V>()[0]);

// The low (0) or high half of a vector.
template <int which, class T, int bytes>
INLINE vec<T, bytes / 2> half(vec<T, bytes> a) {
#if defined(__AVX512F__)
    if constexpr (bytes == 64 && which == 1) return (vec<T, 32>)_mm512_extracti64x4_epi64((__m512i)a, 1);
#endif
    return [&]<size_t... i>(std::index_sequence<i...>) {
        return (vec<T, bytes / 2>)__builtin_shufflevector(a, a, int(i + which * sizeof...(i))...);
    }(std::make_index_sequence<bytes / 2 / sizeof(T)>{});
}

// Interleave the low (half = 0) or high elements of each 128-bit part.
template <int half, class V>
INLINE V zip(V a, V b) {
    constexpr auto index = [](int i) constexpr {
        constexpr int n = count_of<V>, part = 16 / int(sizeof(V) / n);
        return i / part * part + half * part / 2 + i % part / 2 + (i & 1) * n;
    };
    return shuffle<index>(a, b);
}
// Elements 0, 2, 4, ... (odd = 1: 1, 3, 5, ...) of a, then of b.
template <int odd, class V>
INLINE V unzip(V a, V b) {
    constexpr auto index = [](int i) constexpr { return 2 * i + odd; };
    return shuffle<index>(a, b);
}

#if defined(__AVX512F__)
INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vi round_int(vf a) { return (vi)_mm512_cvtps_epi32((__m512)a); }
INLINE float reduce_max(vf a) { return _mm512_reduce_max_ps((__m512)a); }
INLINE float reduce_add(vf a) { return _mm512_reduce_add_ps((__m512)a); }
INLINE int32_t reduce_add(vi a) { return _mm512_reduce_add_epi32((__m512i)a); }
INLINE vf half_to_float(vh a) { return (vf)_mm512_cvtph_ps((__m256i)a); }
INLINE void store_bytes(void* p, vi a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)a)); }
INLINE void store_words(void* p, vi a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)a)); }
#elif defined(__AVX2__)
INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vi round_int(vf a) { return (vi)_mm256_cvtps_epi32((__m256)a); }
INLINE vf half_to_float(vh a) { return (vf)_mm256_cvtph_ps((__m128i)a); }
#else
#if defined(__aarch64__)
INLINE vf fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
#endif
INLINE vf max(vf a, vf b) { return a > b ? a : b; }
INLINE vi round_int(vf a) {  // |a| < 2^22
    return __builtin_convertvector((a + 12582912.0f) - 12582912.0f, vi);
}
INLINE vf half_to_float(vh a) {  // finite values; the multiplication renormalises denormals
    vi wide = __builtin_convertvector(a, vi);
    vf size = (vf)((wide & 0x7fff) << 13) * 0x1p112f;
    return (vf)((vi)size | ((wide & 0x8000) << 16));
}
#endif

INLINE vf half_to_float(const void* p) { return half_to_float(load<vh>(p)); }

// 16 bytes from each of LANES / 4 places, `step` bytes apart.
INLINE vu load_parts(const char* p, int64_t step) {
#if defined(__AVX2__)
    auto part = [&](int i) { return _mm_loadu_si128((const __m128i*)(p + i * step)); };
#endif
#if defined(__AVX512F__)
    __m512i x = _mm512_castsi128_si512(part(0));
    x = _mm512_inserti32x4(x, part(1), 1);
    x = _mm512_inserti32x4(x, part(2), 2);
    return (vu)_mm512_inserti32x4(x, part(3), 3);
#elif defined(__AVX2__)
    return (vu)_mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(1), 1);
#else
    (void)step;
    return load<vu>(p);
#endif
}

#if !defined(__AVX512F__)
INLINE float reduce_max(vf a) {
    float best = a[0];
    for (int i = 1; i < LANES; ++i) best = a[i] > best ? a[i] : best;
    return best;
}
INLINE float reduce_add(vf a) {
    float sum = a[0];
    for (int i = 1; i < LANES; ++i) sum += a[i];
    return sum;
}
INLINE int32_t reduce_add(vi a) {
    int32_t sum = a[0];
    for (int i = 1; i < LANES; ++i) sum += a[i];
    return sum;
}
INLINE void store_bytes(void* p, vi a) { store(p, __builtin_convertvector(a, vec<int8_t, LANES>)); }
INLINE void store_words(void* p, vi a) { store(p, __builtin_convertvector(a, vec<int16_t, 2 * LANES>)); }
#endif

// Words of each four lanes, the second and the third of which change places.
INLINE void store_crossed_words(void* p, vi a) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // two instructions, where compilers take four
    const __m128i order = _mm_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i x = _mm256_shuffle_epi8((__m256i)a, _mm256_broadcastsi128_si256(order));
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(x, 0x08)));
#else
    constexpr auto index = [](int i) constexpr { return i / 4 * 4 + (i % 4 == 1 ? 2 : i % 4 == 2 ? 1 : i % 4); };
    store_words(p, shuffle<index>(a, a));
#endif
}

INLINE vf to_float(vi a) { return __builtin_convertvector(a, vf); }
// Nearest even. Finite input.
INLINE vh to_bfloat(vf a) {
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)a);
#else
    vu u = (vu)a;
    return __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, vh);
#endif
}
INLINE vu widen(vh a) {  // (compilers split the generic conversion)
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu16_epi32((__m256i)a);
#elif defined(__AVX2__)
    return (vu)_mm256_cvtepu16_epi32((__m128i)a);
#else
    return __builtin_convertvector(a, vu);
#endif
}
INLINE vf to_float(vh a) { return (vf)(widen(a) << 16); }

INLINE vf bfloat_to_float(const void* p) { return to_float(load<vh>(p)); }

#if defined(__AVX512BF16__)
INLINE vec<uint16_t> to_bfloat(vf a, vf b) { return (vec<uint16_t>)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }  // a, then b
#else
INLINE vec<uint16_t> to_bfloat(vf a, vf b) {
    const vh x = to_bfloat(a), y = to_bfloat(b);
    vec<uint16_t> made;
    std::memcpy(&made, &x, sizeof x);
    std::memcpy((char*)&made + sizeof x, &y, sizeof y);
    return made;
}
#endif

// -- int8 dot products
//
// ZERO: how panels store a signed byte (128: as an unsigned byte plus 128, which the caller corrects for).
// Factor: one part of q or of a weight. Where int8 parts are native, 16 bits are split in two (hi, lo); elsewhere a
// 16-bit factor is multiplied at once.
#if defined(__AVX512VNNI__)
constexpr int FACTOR_BITS = 8, ZERO = 128;
INLINE vi dot(vi sum, line b, const void* a) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, (__m512i)broadcast4(a));
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int FACTOR_BITS = 8, ZERO = 0;
INLINE vi dot(vi sum, line b, const void* a) {
    return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)b, (int8x16_t)broadcast4(a));
}
#else
#if defined(__AVX2__)
constexpr int FACTOR_BITS = 16, ZERO = 128;  // bytes become words by one instruction where they have no sign
#else
constexpr int FACTOR_BITS = 16, ZERO = 0;
#endif
// a: factors of bytes 0, 2 and then of bytes 1, 3
INLINE vi dot(vi sum, line b, const void* a) {
    using vs = std::conditional_t<ZERO == 0, vec<int16_t>, vec<uint16_t>>;
    vs even = (vs)((vec<uint16_t>)b << 8) >> 8, odd = (vs)b >> 8;
    vi first = broadcast4(a), second = broadcast4((const char*)a + 4);
#if defined(__AVXVNNI__)  // one of both products, because the next one with this sum would wait for two
    return sum + (vi)_mm256_dpwssd_avx_epi32(_mm256_madd_epi16((__m256i)even, (__m256i)first), (__m256i)odd, (__m256i)second);
#elif defined(__AVX2__)
    return sum + ((vi)_mm256_madd_epi16((__m256i)even, (__m256i)first) + (vi)_mm256_madd_epi16((__m256i)odd, (__m256i)second));
#elif defined(__SSE2__)
    return sum + ((vi)_mm_madd_epi16((__m128i)even, (__m128i)first) + (vi)_mm_madd_epi16((__m128i)odd, (__m128i)second));
#else
    auto low = [](vi x) { return (x << 16) >> 16; };
    auto high = [](vi x) { return x >> 16; };
    return sum + low((vi)even) * low(first) + high((vi)even) * high(first) + low((vi)odd) * low(second) +
           high((vi)odd) * high(second);
#endif
}
#endif
constexpr int FACTOR_BYTES = FACTOR_BITS / 8;

// -- bfloat16 dot products, where there are any
#if defined(__AVX512BF16__)
constexpr bool BFLOAT_DOT = true;
INLINE vf dot_bfloat(vf sum, line b, const void* a) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)broadcast4(a));
}
#else
constexpr bool BFLOAT_DOT = false;
INLINE vf dot_bfloat(vf sum, line, const void*) { return sum; }
#endif

// fp8 e4m3 in the low bytes of 16-bit lanes to bfloat16.
#if defined(__AVX512BF16__)
INLINE vec<uint16_t> fp8_to_bfloat(vec<uint16_t> code) {
    const vec<uint16_t> size = code & 0x7f, sign = (code & 0x80) << 8;
    const __m512i small = _mm512_broadcast_i32x4(  // multiples of 2^-9
        _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    const vec<uint16_t> tiny = (vec<uint16_t>)_mm512_permutexvar_epi16((__m512i)size, small);
    return sign | (size < 8 ? tiny : (size << 4) + (120 << 7));
}
#else
INLINE vec<uint16_t> fp8_to_bfloat(vec<uint16_t> code) { return code; }
#endif

// The low bytes of words, fp8 e4m3, to half precision, which has their range of exponents but for a factor of 2^8.
template <class V>
INLINE V fp8_to_half(V x) {
    return (x & 0x7f) << 7 | (x & 0x80) << 8;
}
// LANES words, of which both bytes are fp8, to floats: of the low bytes, then of the high ones.
INLINE void fp8_to_floats(const void* from, vf* to) {
    const vh x = load<vh>(from);
    to[0] = half_to_float(fp8_to_half(x)) * 256.0f;
    to[1] = half_to_float((vh)((x & 0x7f00) >> 1 | (x & 0x8000))) * 256.0f;
}

// -- look-up of bytes
//
// table: 256 bytes, of which 2^bits count, repeated up to 16, 64 or 256. Vectors of 8 to LINE bytes.
template <int bytes>
INLINE vec<uint8_t, bytes> lookup_scalar(vec<uint8_t, bytes> code, const uint8_t* table) {
    uint8_t in[bytes], out[bytes];
    std::memcpy(in, &code, bytes);
    for (int i = 0; i < bytes; ++i) out[i] = table[in[i]];
    return load<vec<uint8_t, bytes>>(out);
}
#if defined(__AVX512VBMI__)
template <int bytes>
INLINE __m512i widen(vec<uint8_t, bytes> x) {
    if constexpr (bytes == 64)
        return (__m512i)x;
    else if constexpr (bytes == 32)
        return _mm512_castsi256_si512((__m256i)x);
    else
        return _mm512_castsi128_si512((__m128i)x);
}
template <int bytes>
INLINE vec<uint8_t, bytes> narrow(__m512i x) {
    if constexpr (bytes == 64)
        return (vec<uint8_t, 64>)x;
    else if constexpr (bytes == 32)
        return (vec<uint8_t, 32>)_mm512_castsi512_si256(x);
    else
        return (vec<uint8_t, 16>)_mm512_castsi512_si128(x);
}
#elif defined(__AVX2__)
template <int bytes>
INLINE __m256i widen(vec<uint8_t, bytes> x) {
    if constexpr (bytes == 32)
        return (__m256i)x;
    else
        return _mm256_castsi128_si256((__m128i)x);
}
template <int bytes>
INLINE vec<uint8_t, bytes> narrow(__m256i x) {
    if constexpr (bytes == 32)
        return (vec<uint8_t, 32>)x;
    else
        return (vec<uint8_t, 16>)_mm256_castsi256_si128(x);
}
#endif
template <int entries, int bytes>
INLINE vec<uint8_t, bytes> lookup(vec<uint8_t, bytes> code, const uint8_t* table) {
#if defined(__AVX512VBMI__)
    const __m512i index = widen<bytes>(code);
    if constexpr (entries == 16) {
        return narrow<bytes>(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), index));
    } else if constexpr (entries == 64) {
        return narrow<bytes>(_mm512_permutexvar_epi8(index, _mm512_loadu_si512(table)));
    } else {
        __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), index, _mm512_loadu_si512(table + 64));
        __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), index, _mm512_loadu_si512(table + 192));
        return narrow<bytes>(_mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high));
    }
#elif defined(__AVX2__)
    const __m256i index = widen<bytes>(code);
    __m256i found = {};
    if constexpr (entries == 16) {
        found = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)), index);
    } else {
        // only indices of this sixteenth stay below 128 after the saturating addition; the shuffle gives 0 for others
        for (int i = 0; i < entries; i += 16) {
            __m256i own = _mm256_adds_epu8(_mm256_xor_si256(index, _mm256_set1_epi8(char(i))), _mm256_set1_epi8(0x70));
            __m256i part = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(table + i)));
            found = _mm256_or_si256(found, _mm256_shuffle_epi8(part, own));
        }
    }
    return narrow<bytes>(found);
#elif defined(__aarch64__)
    if constexpr (bytes == 16) {
        if constexpr (entries == 16) return (vec<uint8_t, bytes>)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)code);
        uint8x16_t found = vqtbl4q_u8(vld1q_u8_x4(table), (uint8x16_t)code);
        for (int i = 64; i < entries; i += 64)
            found = vqtbx4q_u8(found, vld1q_u8_x4(table + i), vsubq_u8((uint8x16_t)code, vdupq_n_u8(i)));
        return (vec<uint8_t, bytes>)found;
    }
    return lookup_scalar<bytes>(code, table);
#else
    return lookup_scalar<bytes>(code, table);
#endif
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
