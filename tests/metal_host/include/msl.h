// Stands in for <metal_stdlib>, so that Metal source compiles as C++17: the part of MSL 3.1 that our kernels and the
// code around them (torch's, MLX's) use. Address spaces vanish; the driver (host.py) rewrites what macros cannot.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "runtime.h"

#define device
#define thread
#define threadgroup
#define constant const
#define kernel
#define METAL_FUNC inline
#define __METAL__ 1
#define __METAL_VERSION__ 310

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

template <typename T>
struct Vec2 {
  T x, y;
  Vec2() {}
  Vec2(T a) : x(a), y(a) {}
  Vec2(T a, T b) : x(a), y(b) {}
};
template <typename T>
struct Vec3 {
  T x, y, z;
  Vec3() {}
  Vec3(T a, T b, T c) : x(a), y(b), z(c) {}
};
using uint2 = Vec2<uint>;
using uint3 = Vec3<uint>;
using ushort2 = Vec2<ushort>;
using ushort3 = Vec3<ushort>;
using ulong2 = Vec2<ulong>;

// Conversions only: arithmetic is in float. A kernel that wants half arithmetic does not belong to what we run.
struct half {
  ushort bits;
  half() = default;
  half(float f) {
    uint u;
    memcpy(&u, &f, 4);
    const uint sign = u >> 16 & 0x8000, rest = u & 0x7FFFFFFF;
    if (rest > 0x7F800000) {
      bits = ushort(sign | 0x7E00);
    } else if (rest >= 0x477FF000) {  // rounds to infinity
      bits = ushort(sign | 0x7C00);
    } else if (rest >= 0x38800000) {
      bits = ushort(sign | ((rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13));
    } else {
      float scaled;  // subnormal: let float addition round to nearest even
      memcpy(&scaled, &rest, 4);
      scaled += 0.5f;
      memcpy(&u, &scaled, 4);
      bits = ushort(sign | (u - 0x3F000000));
    }
  }
  operator float() const {
    const uint sign = uint(bits & 0x8000) << 16, rest = bits & 0x7FFF;
    uint u = rest << 13;
    float f;
    if (rest >= 0x7C00) {
      u |= 0x7F800000;
      memcpy(&f, &u, 4);
    } else {
      memcpy(&f, &u, 4);
      f *= 0x1p112f;
    }
    memcpy(&u, &f, 4);
    u |= sign;
    memcpy(&f, &u, 4);
    return f;
  }
};
struct bfloat {
  ushort bits;
  bfloat() = default;
  bfloat(float f) {
    uint u;
    memcpy(&u, &f, 4);
    bits = f != f ? 0x7FC0 : ushort((u + 0x7FFF + (u >> 16 & 1)) >> 16);
  }
  operator float() const {
    const uint u = uint(bits) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
};
using float16_t = half;
using bfloat16_t = bfloat;

// Where the thread stands and what it hands in lies on its stack or in the runtime, which knows of both.
namespace metal {

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
inline bool has(mem_flags flags, mem_flags one) { return uint(flags) & uint(one); }
inline void threadgroup_barrier(mem_flags f) {
  metal_host::barrier(false, has(f, mem_flags::mem_threadgroup), has(f, mem_flags::mem_device));
}
inline void simdgroup_barrier(mem_flags f) {
  metal_host::barrier(true, has(f, mem_flags::mem_threadgroup), has(f, mem_flags::mem_device));
}

template <typename To, typename From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

#define MATHS                                                                  \
  inline float exp(float x) { return std::exp(x); }                            \
  inline float exp2(float x) { return std::exp2(x); }                          \
  inline float log(float x) { return std::log(x); }                            \
  inline float tanh(float x) { return std::tanh(x); }                          \
  inline float sqrt(float x) { return std::sqrt(x); }                          \
  inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }                  \
  inline float divide(float x, float y) { return x / y; }
MATHS
namespace precise {
MATHS
}
namespace fast {
MATHS
}
#undef MATHS
inline float abs(float x) { return std::fabs(x); }
inline float fabs(float x) { return std::fabs(x); }
inline float floor(float x) { return std::floor(x); }
inline float trunc(float x) { return std::trunc(x); }
inline float round(float x) { return std::round(x); }
inline float fma(float x, float y, float z) { return std::fma(x, y, z); }
inline bool isfinite(float x) { return std::isfinite(x); }
inline bool isnan(float x) { return std::isnan(x); }
template <typename T, typename U, typename C = std::common_type_t<T, U>>
inline C min(T a, U b) {
  return C(b) < C(a) ? C(b) : C(a);
}
template <typename T, typename U, typename C = std::common_type_t<T, U>>
inline C max(T a, U b) {
  return C(a) < C(b) ? C(b) : C(a);
}
template <typename T>
inline T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <typename T>
inline T select(T a, T b, bool c) {
  return c ? b : a;
}

// -- SIMD-group operations: every lane must take part

template <typename T>
struct Lanes {
  static_assert(sizeof(T) <= 16);
  const unsigned char* all;
  Lanes(T value, const char* operation) : all(metal_host::exchange(&value, sizeof value, operation)) {}
  T operator[](uint lane) const {
    if (lane >= metal_host::kLanes) metal_host::fail("a shuffle from a lane that is none of 0 to 31");
    T value;
    memcpy(static_cast<void*>(&value), all + 16 * lane, sizeof value);
    return value;
  }
};

template <typename T>
T simd_shuffle(T x, ushort lane) {
  return Lanes<T>(x, "simd_shuffle")[lane];
}
template <typename T>
T simd_broadcast(T x, ushort lane) {
  return Lanes<T>(x, "simd_broadcast")[lane];
}
template <typename T>
T simd_broadcast_first(T x) {
  return Lanes<T>(x, "simd_broadcast_first")[0];
}
template <typename T>
T simd_shuffle_xor(T x, ushort mask) {
  return Lanes<T>(x, "simd_shuffle_xor")[metal_host::lane() ^ mask];
}
template <typename T>
T simd_shuffle_down(T x, ushort delta) {
  const Lanes<T> all(x, "simd_shuffle_down");
  const uint from = metal_host::lane() + delta;
  return from < 32 ? all[from] : x;
}
template <typename T>
T simd_shuffle_up(T x, ushort delta) {
  const Lanes<T> all(x, "simd_shuffle_up");
  return metal_host::lane() >= delta ? all[metal_host::lane() - delta] : x;
}
inline float simd_sum(float x) { return metal_host::reduce(x, metal_host::kSum); }
inline float simd_max(float x) { return metal_host::reduce(x, metal_host::kMax); }
inline float simd_min(float x) { return metal_host::reduce(x, metal_host::kMin); }
inline bool simd_any(bool x) {
  const Lanes<bool> all(x, "simd_any");
  bool any = false;
  for (uint i = 0; i < 32; ++i) any |= all[i];
  return any;
}
inline bool simd_all(bool x) { return !simd_any(!x); }

// -- 8 x 8 matrices, two elements in each lane: (row, column) and (row, column + 1), where Apple's GPUs hold them

template <typename T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8);
  T element[2];
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    for (uint i = 0; i < 2; ++i) element[i] = row() == column() + i ? diagonal : T(0.0f);
  }
  static uint row() { return metal_host::row_of(metal_host::lane()); }
  static uint column() { return metal_host::column_of(metal_host::lane()); }
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <typename T, int R, int C>
simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> m;
  m.element[0] = m.element[1] = value;
  return m;
}
template <typename T, int R, int C>
void simdgroup_load(simdgroup_matrix<T, R, C>& m, const T* from, ulong stride = C, ulong2 origin = 0, bool turned = false) {
  const bool here = true;
  metal_host::exchange(&here, 1, "simdgroup_load");
  const uint r = m.row(), c = m.column();
  for (uint i = 0; i < 2; ++i) {
    const ulong y = origin.y + (turned ? c + i : r), x = origin.x + (turned ? r : c + i);
    m.element[i] = from[y * stride + x];
  }
}
template <typename T, int R, int C>
void simdgroup_store(const simdgroup_matrix<T, R, C>& m, T* to, ulong stride = C, ulong2 origin = 0, bool turned = false) {
  const bool here = true;
  metal_host::exchange(&here, 1, "simdgroup_store");
  const uint r = m.row(), c = m.column();
  for (uint i = 0; i < 2; ++i) {
    const ulong y = origin.y + (turned ? c + i : r), x = origin.x + (turned ? r : c + i);
    to[y * stride + x] = m.element[i];
  }
}
template <typename D, typename A, typename B, typename E, int R, int C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, R, C>& d, const simdgroup_matrix<A, R, C>& a,
                                   const simdgroup_matrix<B, R, C>& b, const simdgroup_matrix<E, R, C>& c) {
  const float left[2] = {float(a.element[0]), float(a.element[1])}, right[2] = {float(b.element[0]), float(b.element[1])};
  const float added[2] = {float(c.element[0]), float(c.element[1])};
  float sum[2];
  metal_host::multiply(left, right, added, sum);
  d.element[0] = D(sum[0]);
  d.element[1] = D(sum[1]);
}
template <typename D, typename A, typename B, int R, int C>
void simdgroup_multiply(simdgroup_matrix<D, R, C>& d, const simdgroup_matrix<A, R, C>& a,
                        const simdgroup_matrix<B, R, C>& b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, R, C>(D(0.0f)));
}

}  // namespace metal
