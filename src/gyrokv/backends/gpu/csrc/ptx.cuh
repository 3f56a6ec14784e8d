// Instructions that C++ has no word for, and the integer types of this backend.
#pragma once

typedef unsigned u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
typedef unsigned long long u64;

#define INLINE __device__ __forceinline__
#ifndef INFINITY
#define INFINITY __int_as_float(0x7F800000)
#endif

template <bool FIRST, class A, class B>
struct Choose {
  using type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using type = B;
};

template <bool VALUE>
struct Bool {
  static constexpr bool value = VALUE;
};

INLINE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

INLINE u32 prmt(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// bits of a where the mask is set, else of b
INLINE u32 select(u32 mask, u32 a, u32 b) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
  return d;
}

// c + a0 b0 + a1 b1 of the halves of a and the lower two, or the upper two, bytes of b
INLINE u32 dot_low(u32 a, u32 b, u32 c) {
  u32 d;
  asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
INLINE u32 dot_high(u32 a, u32 b, u32 c) {
  u32 d;
  asm("dp2a.hi.u32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

INLINE u32 add_f16x2(u32 a, u32 b) {
  u32 d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

INLINE u32 product_f16x2(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
INLINE u32 product_bf16x2(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

INLINE u32 fma_f16x2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// These do a permute's and a shift's work in the pipe of products, which is wider and has less to do.
// Low halves of a and b, which are finite; the upper half of a is zero
INLINE u32 side_by_side(u32 a, u32 b) {
  u32 d;
  asm("{\n .reg .b16 l, h;\n .reg .b32 x;\n mov.b32 {l, h}, %2;\n mov.b32 x, {l, l};\n fma.rn.f16x2 %0, x, %3, %1;\n}"
      : "=r"(d) : "r"(a), "r"(b), "r"(0x3C000000));
  return d;
}
// the upper half of x, which is finite, twice
INLINE u32 upper_f16(u32 x) {
  u32 d;
  asm("{\n .reg .b16 l, h;\n .reg .b32 y;\n mov.b32 {l, h}, %1;\n mov.b32 y, {h, h};\n add.rn.f16x2 %0, y, %2;\n}"
      : "=r"(d) : "r"(x), "r"(0x80008000));
  return d;
}

// two float8 e4m3 in the low half of x
INLINE u32 f16x2_of_e4m3(u32 x) {
  u32 d;
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"((u16)x));
#else  // exponents are 8 less: times 256 is exact
  u32 bytes = prmt(x, 0, 0x1404);
  d = fma_f16x2((bytes & 0x80008000) | ((bytes & 0x7F007F00) >> 1), 0x5C005C00, 0x80008000);
#endif
  return d;
}

// low half: a, high half: b
INLINE u32 f16x2(float a, float b) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(b), "f"(a));
  return d;
}

INLINE u32 bf16x2(float a, float b) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(b), "f"(a));
  return d;
}

INLINE float f32_of_f16(u32 low) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"((u16)low));
  return d;
}

INLINE float f32_of_bf16(u32 low) { return __uint_as_float(low << 16); }

// a pair of floats as the sum of two pairs of bfloat16
INLINE void split_bf16(float a, float b, u32& high, u32& low) {
  high = bf16x2(a, b);
  low = bf16x2(a - __uint_as_float(high << 16), b - __uint_as_float(high & 0xFFFF0000u));
}

INLINE float exp2_fast(float x) {
  float d;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}

INLINE float log2_fast(float x) {
  float d;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}

INLINE float inverse_fast(float x) {
  float d;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}

// of normal numbers; computed where it is written, not where it is first needed
INLINE float rsqrt_always(float x) {
  float d;
  asm volatile("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}

// c[16 x 8] += a[16 x 16] b[16 x 8]; lane 4 g + t holds rows g, g + 8 and columns 2 t, 2 t + 1 of c
template <bool BF16>
INLINE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if (BF16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// the same with d = c + a b
template <bool BF16>
INLINE void mma(float (&d)[4], const float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if (BF16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// the same for integers: c[16 x 8] += a[16 x 32] b[32 x 8]; both signed or both not, four values per register
template <bool UNSIGNED>
INLINE void mma_8(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if (UNSIGNED)
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 8 x 8 matrices of 16-bit values, each transposed; lane 8 i + r gives the address of row r of matrix i
INLINE void load_transposed(u32 address, u32 (&x)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(address));
}
INLINE void load_transposed(u32 address, u32 (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address));
}

// the same, not transposed
INLINE void load_matrices(u32 address, u32 (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address));
}

// transposes an 8 x 8 matrix of 16-bit values that the warp holds, two of a row per lane
INLINE u32 transpose8(u32 x) {
  u32 d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(x));
  return d;
}

// N 32-bit words from shared memory in one load
template <int N>
INLINE void load_shared(u32 address, u32* x) {
  static_assert(N == 1 || N == 2 || N == 4, "1, 2 or 4 words");
  if (N == 4)
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address));
  else if (N == 2)
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(address));
  else
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x[0]) : "r"(address));
}

// stores to shared memory become visible to bulk copies and products
INLINE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

INLINE void store_zeros(u32 address) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

INLINE void store_shared(u32 address, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory"); }

INLINE void store_shared_u16(u32 address, u32 x) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"((u16)x) : "memory"); }
INLINE void store_shared(u32 address, u32 x) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory"); }
INLINE void store_shared(u32 address, const u32 (&x)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
INLINE void store_shared(u32 address, const float (&x)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}

INLINE float load_shared_f32(u32 address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}
INLINE void load_shared_f32(u32 address, float (&x)[4]) {
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "r"(address)
               : "memory");
}

INLINE u32 load_shared_u16(u32 address) {
  u16 x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address));
  return x;
}

// element `at` of SIZE bytes in global memory; the load stays where it is written
template <int SIZE>
INLINE u32 load_now(const char* from, i64 at) {
  if (SIZE == 4) {
    u32 x;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(x) : "l"(from + at * 4));
    return x;
  }
  u16 x;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(x) : "l"(from + at * 2));
  return x;
}

// a pointer that others are constants away from: the compiler would add up each of them
INLINE const char* as_one(const char* p) {
  asm("" : "+l"(p));
  return p;
}

// SIZE bytes from global to shared memory, asynchronously
template <int SIZE>
INLINE void copy_async(u32 to, const void* from) {
  if (SIZE == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(SIZE));
}

// the same; zeros instead unless valid
template <int SIZE>
INLINE void copy_async(u32 to, const void* from, bool valid) {
  int size = valid ? SIZE : 0;
  if (SIZE == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size));
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(SIZE), "r"(size));
}

INLINE void prefetch(const void* p) { asm volatile("prefetch.global.L1 [%0];" ::"l"(p)); }

// N values of 16 bits from memory, not kept in the cache of the processor
template <int N>
INLINE void load_global(const void* at, u32* x) {
  if constexpr (N == 8)
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "l"(at));
  else if constexpr (N == 4)
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "l"(at));
  else if constexpr (N == 2)
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(x[0]) : "l"(at));
  else
    x[0] = *(const u16*)at;
}

// waits for the other of two warps, which comes with the same pair
INLINE void sync_pair(int pair) { asm volatile("bar.sync %0, 64;" ::"r"(pair + 1) : "memory"); }

// waits for COUNT threads of the block, which come with the same id of 1 .. 15
template <int COUNT>
INLINE void sync_threads(int id) { asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(COUNT) : "memory"); }

// Programmatic dependent launch (compute capability 9.0): the kernel before this one has finished, its writes are seen.
INLINE void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// the next kernel may take its place on the processors as they become free
INLINE void let_later_kernels_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// copy_async through the processor's own cache: for what other blocks read too
template <int SIZE>
INLINE void copy_async_cached(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(SIZE));
}

INLINE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// all but the last N groups of copies have arrived
template <int N>
INLINE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// four floats as float8 e4m3, nearest even, within 448
INLINE u32 e4m3x4(float a, float b, float c, float d) {
  u16 low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return low | (u32)high << 16;
}

// above = x is not below the boundary (beyond it, with STRICT). Byte AT of word becomes byte 1 of pair if above, else
// byte 0. Returns a if above, else b.
template <bool STRICT, int AT>
INLINE float decide(float x, float boundary, u32 pair, float a, float b, u32& word) {
  constexpr u32 KEEP = 0x3210 & ~(15 << 4 * AT);
  float d;
  if (STRICT)
    asm("{\n .reg .pred p;\n setp.ltu.f32 p, %3, %2;\n selp.f32 %0, %5, %6, p;\n @p prmt.b32 %1, %1, %4, %7;\n"
        " @!p prmt.b32 %1, %1, %4, %8;\n}"
        : "=f"(d), "+r"(word) : "f"(x), "f"(boundary), "r"(pair), "f"(a), "f"(b), "n"(KEEP | 5 << 4 * AT), "n"(KEEP | 4 << 4 * AT));
  else
    asm("{\n .reg .pred p;\n setp.leu.f32 p, %3, %2;\n selp.f32 %0, %5, %6, p;\n @p prmt.b32 %1, %1, %4, %7;\n"
        " @!p prmt.b32 %1, %1, %4, %8;\n}"
        : "=f"(d), "+r"(word) : "f"(x), "f"(boundary), "r"(pair), "f"(a), "f"(b), "n"(KEEP | 5 << 4 * AT), "n"(KEEP | 4 << 4 * AT));
  return d;
}
