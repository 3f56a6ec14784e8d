// Declares what our kernels use of Metal for clang's C++ for OpenCL, whose address spaces are checked as Metal's are:
// nothing runs. Without generic pointers, so that a pointer that lacks its address space is a private one.
#define device __global
#define threadgroup __local
#define thread __private
#define constant __constant
#define METAL_FUNC inline
#define INFINITY __builtin_inff()
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef long int64_t;
typedef half float16_t;
struct bfloat {
  ushort bits;
  operator float() const __private;
  operator float() const __global;
};
typedef bfloat bfloat16_t;
struct uint3 {
  uint x, y, z;
};
struct ulong2 {
  ulong x, y;
  ulong2(ulong a, ulong b) __private : x(a), y(b) {}
};

namespace metal {

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
#define MATHS       \
  float exp(float); \
  float log(float); \
  float tanh(float);\
  float sqrt(float);
namespace precise {
MATHS
}
float abs(float);
float floor(float);
float trunc(float);
bool isfinite(float);
bool isnan(float);
float clamp(float, float, float);
float max(float, float);
int max(int, int);
int min(int, int);
long min(long, long);
float simd_sum(float);
float simd_max(float);
bool simd_any(bool);
bool simd_all(bool);
float simd_broadcast(float, ushort);
float simd_shuffle_xor(float, ushort);
template <typename To, typename From>
inline To as_type(From from) {
  return __builtin_astype(from, To);
}

template <typename T, int R, int C>
struct simdgroup_matrix {
  T element[2];
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
template <typename T, int R, int C>
simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value);
template <typename T>
void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& m, threadgroup const T* from, ulong stride = 8,
                    ulong2 origin = ulong2(0, 0), bool turned = false);
template <typename T>
void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& m, device const T* from, ulong stride = 8,
                    ulong2 origin = ulong2(0, 0), bool turned = false);
template <typename T>
void simdgroup_store(simdgroup_matrix<T, 8, 8> m, threadgroup T* to, ulong stride = 8);
template <typename T>
void simdgroup_multiply(thread simdgroup_matrix<T, 8, 8>& d, simdgroup_matrix<T, 8, 8> a, simdgroup_matrix<T, 8, 8> b);
template <typename T>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<T, 8, 8>& d, simdgroup_matrix<T, 8, 8> a,
                                   simdgroup_matrix<T, 8, 8> b, simdgroup_matrix<T, 8, 8> c);

}  // namespace metal
