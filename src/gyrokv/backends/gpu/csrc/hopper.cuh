// Instructions of sm_90a: barriers in shared memory, bulk copies, products of a warpgroup.
#pragma once
#include "ptx.cuh"

struct alignas(64) TensorMap {  // CUtensorMap
  char opaque[128];
};

// one lane of a warp that is whole
INLINE bool elected() {
  u32 is;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(is));
  return is;
}

// registers of each thread of a warpgroup from here on; FROM: before
template <int N, int FROM>
INLINE void registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 240, "registers come in eights");
  if constexpr (N > FROM) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
  else if constexpr (N < FROM) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

INLINE void barrier_init(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

INLINE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

INLINE void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

INLINE void arrive_expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

INLINE bool passed(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}

INLINE void wait(u32 barrier, u32 parity) {
  while (!passed(barrier, parity)) {
  }
}

// Which stage of a ring is next, and the parity of its barriers.
template <int STAGES>
struct Ring {
  u32 stage = 0, parity = 0;
  INLINE void advance(u32 by = 1) {
    stage += by;
    if (stage >= STAGES) stage -= STAGES, parity ^= 1;
  }
};

INLINE void prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// a box of a tensor [batch, head, token, dim] to shared memory
INLINE void load_box(u32 to, const TensorMap* map, int dim, int token, int head, int batch, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
      "l"(map), "r"(dim), "r"(token), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
}

// A box from shared memory, which nobody waits for but its thread: until all that it committed has been read, and the memory
// may be written or given back.
INLINE void store_box(u32 from, const TensorMap* map, int dim, int token, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%1, {%2, %3, %4, %5}], [%0];" ::"r"(from), "l"(map), "r"(dim),
               "r"(token), "r"(head), "r"(batch)
               : "memory");
}
INLINE void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
INLINE void stores_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// four 8 x 8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8
INLINE void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// the first bytes of SIZE from global to shared memory, asynchronously; zeros for the rest
template <int SIZE>
INLINE void copy_async_first(u32 to, const void* from, int bytes) {
  if (SIZE == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(SIZE), "r"(bytes) : "memory");
}

// arrives once the thread's asynchronous copies so far have
INLINE void arrive_after_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// a becomes -inf where x is 0. (In C++, the compiler branches, and then has too few registers to let products run meanwhile.)
INLINE void hide_zero(u32 x, float& a) {
  asm("{\n.reg .pred p;\nsetp.eq.u32 p, %1, 0;\nselp.f32 %0, %2, %0, p;\n}" : "+f"(a) : "r"(x), "f"(-INFINITY));
}

// threads of two warpgroups: one goes on when the other has been here too
INLINE void meet(int barrier) { asm volatile("bar.sync %0, 256;" ::"r"(barrier) : "memory"); }
INLINE void go_by(int barrier) { asm volatile("bar.arrive %0, 256;" ::"r"(barrier) : "memory"); }

// The second of two warps asks for its first copies after those of the first, without which nobody can begin.
INLINE void copies_asked_for(int barrier) {
  __syncwarp();
  asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory");
}
INLINE void wait_for_first_copies(int barrier) { asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory"); }

INLINE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
INLINE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Operands in shared memory, rows of 128 bytes, swizzled as bulk copies do: 16-byte column c of row r lies at c ^ (r % 8).
// For a product over the contiguous axis, 8 rows lie 1024 bytes apart; chunk: distance of 64 columns, for the other axis.
struct Operand {
  u32 low;
  // A descriptor has 14 bits for an address. Volatile: made when needed, for else dozens are kept.
  INLINE Operand(u32 address, u32 chunk = 16) {
    asm volatile("mov.u32 %0, %1;" : "=r"(low) : "r"((address & 0x3FFFF) >> 4 | chunk >> 4 << 16));
  }
  INLINE u64 at(int bytes) const { return (u64)(low + (bytes >> 4)) | (u64)(1024 >> 4 | 1u << 30) << 32; }
};

#define R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define R16(i) R4(i), R4(i + 4), R4(i + 8), R4(i + 12)
#define R32(i) R16(i), R16(i + 16)
#define R64(i) R32(i), R32(i + 32)
#define T(t) ", %" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define T0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9"
#define T32 T0 T(1) T(2) ", %30, %31"
#define T64 T0 T(1) T(2) T(3) T(4) T(5) ", %60, %61, %62, %63"
#define T96 T0 T(1) T(2) T(3) T(4) T(5) T(6) T(7) T(8) ", %90, %91, %92, %93, %94, %95"
#define T128 T0 T(1) T(2) T(3) T(4) T(5) T(6) T(7) T(8) T(9) T(10) T(11) ", %120, %121, %122, %123, %124, %125, %126, %127"
#define PRODUCT(N, TYPE, REGISTERS, LIST, A, B, P, TRANS)                                                                        \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" LIST \
               "}, %" A ", %" B ", p, 1, 1, 0, %" TRANS ";\n}"                                                                  \
               : REGISTERS(0)                                                                                                   \
               : "l"(a), "l"(b), "r"(add), "n"(ACROSS))
#define PRODUCTS(N, REGISTERS, LIST, A, B, P, TRANS)                     \
  if constexpr (BF16) PRODUCT(N, "bf16", REGISTERS, LIST, A, B, P, TRANS); \
  else PRODUCT(N, "f16", REGISTERS, LIST, A, B, P, TRANS)
#define R96(i) R64(i), R32(i + 64)
#define R128(i) R64(i), R64(i + 64)

// d[64 x N] (+)= a[64 x 16] b[16 x N]. Thread 4 g + t of warp w holds rows 16 w + g (+ 8) and columns 8 j + 2 t (+ 1) of d:
// d[4 j + 2 * (+ 8) + (+ 1)]. ACROSS 0: rows of b's memory are columns of b, 1: rows of b.
template <int N, bool BF16, int ACROSS>
INLINE void product(float (&d)[N / 2], u64 a, u64 b, int add) {
  static_assert(N == 64 || N == 128 || N == 192 || N == 256, "columns of a product");
  if constexpr (N == 64) {
    PRODUCTS("64", R32, T32, "32", "33", "34", "35");
  } else if constexpr (N == 128) {
    PRODUCTS("128", R64, T64, "64", "65", "66", "67");
  } else if constexpr (N == 192) {
    PRODUCTS("192", R96, T96, "96", "97", "98", "99");
  } else {
    PRODUCTS("256", R128, T128, "128", "129", "130", "131");
  }
}

// the same with a in registers: a[0], a[1]: rows g, g + 8, columns 2 t (+ 1); a[2], a[3]: columns 8 + 2 t (+ 1)
#define PRODUCT_R(N, TYPE, REGISTERS, LIST, A0, A1, A2, A3, B)                                                      \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" LIST "}, {%" A0 ", %" A1 ", %" A2 \
               ", %" A3 "}, %" B ", 1, 1, 1, 1;"                                                                     \
               : REGISTERS(0)                                                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
template <int N, bool BF16>
INLINE void product_across(float (&d)[N / 2], const u32 (&a)[4], u64 b) {
  static_assert(N == 64 || N == 128 || N == 192 || N == 256, "columns of a product");
  if constexpr (N == 192 && BF16) PRODUCT_R("192", "bf16", R96, T96, "96", "97", "98", "99", "100");
  else if constexpr (N == 192) PRODUCT_R("192", "f16", R96, T96, "96", "97", "98", "99", "100");
  else if constexpr (N == 256 && BF16) PRODUCT_R("256", "bf16", R128, T128, "128", "129", "130", "131", "132");
  else if constexpr (N == 256) PRODUCT_R("256", "f16", R128, T128, "128", "129", "130", "131", "132");
  else if constexpr (N == 64 && BF16) PRODUCT_R("64", "bf16", R32, T32, "32", "33", "34", "35", "36");
  else if constexpr (N == 64) PRODUCT_R("64", "f16", R32, T32, "32", "33", "34", "35", "36");
  else if constexpr (BF16) PRODUCT_R("128", "bf16", R64, T64, "64", "65", "66", "67", "68");
  else PRODUCT_R("128", "f16", R64, T64, "64", "65", "66", "67", "68");
}

#undef T
