// Stands in for <metal_stdlib>, so that Metal source compiles as C++17: the part of MSL 3.1 that our kernels and the
// code around them (torch's, MLX's) use. Address spaces vanish; host.py rewrites what macros cannot. Includes nothing
// of the C++ library: reading that would take longer than compiling a kernel.
#pragma once

#include "runtime.h"

#define device
#define thread
#define threadgroup
#define constant const
#define kernel
#define METAL_FUNC inline
#define INFINITY __builtin_inff()

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
struct uint3 {
  uint x, y, z;
};
struct ulong2 {
  ulong x, y;
  ulong2(ulong a, ulong b) : x(a), y(b) {}
};

// Conversions only: arithmetic is in float. A kernel that wants half arithmetic does not belong to what we run.
struct half {
  ushort bits;
  half() = default;
  half(float f) {
    uint u;
    __builtin_memcpy(&u, &f, 4);
    const uint sign = u >> 16 & 0x8000, rest = u & 0x7FFFFFFF;
    if (rest > 0x7F800000) {
      bits = ushort(sign | 0x7E00);
    } else if (rest >= 0x477FF000) {  // rounds to infinity
      bits = ushort(sign | 0x7C00);
    } else if (rest >= 0x38800000) {
      bits = ushort(sign | ((rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13));
    } else {
      float scaled;  // subnormal: let float addition round to nearest even
      __builtin_memcpy(&scaled, &rest, 4);
      scaled += 0.5f;
      __builtin_memcpy(&u, &scaled, 4);
      bits = ushort(sign | (u - 0x3F000000));
    }
  }
  operator float() const {
    const uint sign = uint(bits & 0x8000) << 16, rest = bits & 0x7FFF;
    uint u = rest << 13;
    float f;
    if (rest >= 0x7C00) {
      u |= 0x7F800000;
      __builtin_memcpy(&f, &u, 4);
    } else {
      __builtin_memcpy(&f, &u, 4);
      f *= 0x1p112f;
    }
    __builtin_memcpy(&u, &f, 4);
    u |= sign;
    __builtin_memcpy(&f, &u, 4);
    return f;
  }
};
struct bfloat {
  ushort bits;
  bfloat() = default;
  bfloat(float f) {
    uint u;
    __builtin_memcpy(&u, &f, 4);
    bits = f != f ? 0x7FC0 : ushort((u + 0x7FFF + (u >> 16 & 1)) >> 16);
  }
  operator float() const {
    const uint u = uint(bits) << 16;
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
  }
};
using float16_t = half;
using bfloat16_t = bfloat;

namespace metal {

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline void synchronise(bool simdgroup, mem_flags f) { metal_host::barrier(simdgroup, uint(f) & 2, uint(f) & 1); }
inline void threadgroup_barrier(mem_flags f) { synchronise(false, f); }
inline void simdgroup_barrier(mem_flags f) { synchronise(true, f); }

template <typename To, typename From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

namespace precise {
inline float exp(float x) { return __builtin_expf(x); }
inline float log(float x) { return __builtin_logf(x); }
inline float tanh(float x) { return __builtin_tanhf(x); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
}  // namespace precise
inline float abs(float x) { return __builtin_fabsf(x); }
inline float floor(float x) { return __builtin_floorf(x); }
inline float trunc(float x) { return __builtin_truncf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isnan(float x) { return __builtin_isnan(x); }
template <typename T, typename U, typename C = decltype(true ? T() : U())>
inline C min(T a, U b) {
  return C(b) < C(a) ? C(b) : C(a);
}
template <typename T, typename U, typename C = decltype(true ? T() : U())>
inline C max(T a, U b) {
  return C(a) < C(b) ? C(b) : C(a);
}
inline float clamp(float x, float low, float high) { return min(max(x, low), high); }

// -- SIMD-group operations: every lane must take part

template <typename T>
T shuffle(T x, uint lane, const char* operation) {
  const unsigned char* all = metal_host::exchange(&x, sizeof x, operation);
  if (lane >= metal_host::kLanes) metal_host::fail("a shuffle from a lane that is none of 0 to 31");
  __builtin_memcpy(static_cast<void*>(&x), all + 16 * lane, sizeof x);
  return x;
}
template <typename T>
T simd_broadcast(T x, ushort lane) {
  return shuffle(x, lane, "simd_broadcast");
}
template <typename T>
T simd_shuffle_xor(T x, ushort mask) {
  return shuffle(x, metal_host::lane() ^ mask, "simd_shuffle_xor");
}
inline float simd_sum(float x) { return metal_host::reduce(x, metal_host::kSum); }
inline float simd_max(float x) { return metal_host::reduce(x, metal_host::kMax); }
inline bool simd_any(bool x) {
  const unsigned char* all = metal_host::exchange(&x, 1, "simd_any");
  for (uint i = 0; i < metal_host::kLanes; ++i)
    if (all[16 * i]) return true;
  return false;
}
inline bool simd_all(bool x) { return !simd_any(!x); }

// -- 8 x 8 matrices: (row, column) and (row, column + 1) in each lane

template <typename T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8 && sizeof(T) == 4);
  T element[2];
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;

template <typename T, int R, int C>
simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  return {{value, value}};
}
inline size_t place(ulong stride, ulong2 origin, bool turned, const char* operation) {
  const bool here = true;
  metal_host::exchange(&here, 1, operation);
  const uint lane = metal_host::lane(), row = metal_host::row_of(lane), column = metal_host::column_of(lane);
  return turned ? (origin.y + column) * stride + origin.x + row : (origin.y + row) * stride + origin.x + column;
}
inline void simdgroup_load(simdgroup_float8x8& m, const float* from, ulong stride = 8, ulong2 origin = ulong2(0, 0),
                           bool turned = false) {
  const size_t at = place(stride, origin, turned, "simdgroup_load");
  m.element[0] = from[at];
  m.element[1] = from[at + (turned ? stride : 1)];
}
inline void simdgroup_store(const simdgroup_float8x8& m, float* to, ulong stride = 8, ulong2 origin = ulong2(0, 0),
                            bool turned = false) {
  const size_t at = place(stride, origin, turned, "simdgroup_store");
  to[at] = m.element[0];
  to[at + (turned ? stride : 1)] = m.element[1];
}
inline void simdgroup_multiply_accumulate(simdgroup_float8x8& d, const simdgroup_float8x8& a, const simdgroup_float8x8& b,
                                          const simdgroup_float8x8& c) {
  metal_host::multiply(a.element, b.element, c.element, d.element);
}
inline void simdgroup_multiply(simdgroup_float8x8& d, const simdgroup_float8x8& a, const simdgroup_float8x8& b) {
  simdgroup_multiply_accumulate(d, a, b, {{0.0f, 0.0f}});
}

}  // namespace metal
