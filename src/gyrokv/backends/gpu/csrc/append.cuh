// What kernels that append have in common: the description of a side, where rows lie, codes to words.
//
// The host defines THREADS, BLOCKS, SAME, APPEND_BYTES and the members of a side's description, after K_ and V_.
#pragma once
#include "params.cuh"

static_assert(sizeof(Append) == APPEND_BYTES, "the structure of encode.py");

enum Kind { DENSE = 0, FLOAT8 = 1, LINEAR = 2, TABLE = 3 };
enum Element { F16 = 0, BF16 = 1, F32 = 2 };
enum Rule { L2 = 0, RMS = 1, ABSMAX = 2, SIGNED_ABSMAX = 3 };
enum Ties { UP = 0, DOWN = 1, AWAY = 2 };

constexpr float TINY = 1e-10f;  // a group whose norm is no larger is stored as zeros
constexpr float LARGEST = 3.402823466e38f, HALF_LARGEST = 65504.0f, BF16_LARGEST = 3.389531390e38f;
constexpr u32 WHOLE = 0x4B000000;  // bits of 2^23: adding it makes the low bits of a float an integer

constexpr int size_of(int element) { return element == F32 ? 4 : 2; }

// DIM, PADDED: values of a head as given and as stored. GROUP is rotated as one, SPAN shares a scale. ALIGN: of stored
// rows in bytes. Numbers that are no integers are given by their bits. BEFORE, AFTER: signs of a group as bits.
#define DESCRIBE(NAME, P)                                                                                              \
  struct NAME {                                                                                                        \
    static constexpr int KIND = P##_KIND, IN = P##_IN, OUT = P##_OUT, DIM = P##_DIM, PADDED = P##_PADDED;              \
    static constexpr int GROUP = P##_GROUP, SPAN = P##_SPAN, BITS = P##_BITS, RULE = P##_RULE, TIES = P##_TIES;        \
    static constexpr int CORRECTED = P##_CORRECTED, ROTATE = P##_ROTATE, WIDE_SCALE = P##_WIDE_SCALE;                  \
    static constexpr int LOW = P##_LOW, HIGH = P##_HIGH, CELLS = P##_CELLS, COPIES = P##_COPIES, ALIGN = P##_ALIGN;    \
    static constexpr int VALUES = P##_VALUES, ROWS = P##_ROWS, TURNED = P##_TURNED, NEAR = P##_NEAR;                   \
    static constexpr int STEPS = P##_STEPS, INDEX = P##_INDEX, BYTES = P##_BYTES, PIECE = P##_PIECE;                   \
    static constexpr int SHARED = P##_SHARED, CLAMPED = P##_CLAMPED;                                                   \
    static INLINE float begin() { return __uint_as_float(P##_BEGIN); }                                                 \
    static constexpr u32 LEVELS_LOW = P##_LEVELS_LOW, LEVELS_HIGH = P##_LEVELS_HIGH;                                   \
    static INLINE float reach() { return __uint_as_float(P##_REACH); }                                                 \
    static INLINE float factor() { return __uint_as_float(P##_FACTOR); }                                               \
    static INLINE float last() { return __uint_as_float(P##_LAST); }                                                   \
    static INLINE float step() { return __uint_as_float(P##_STEP); }                                                   \
    static INLINE float top() { return __uint_as_float(P##_TOP); }                                                     \
    static INLINE float bottom() { return __uint_as_float(P##_BOTTOM); }                                               \
    static INLINE float cell_scale() { return __uint_as_float(P##_CELL_SCALE); }                                       \
    static INLINE u32 before(int i) { const u32 words[] = {P##_BEFORE}; return words[i]; }                             \
    static INLINE u32 after(int i) { const u32 words[] = {P##_AFTER}; return words[i]; }                               \
  }
DESCRIBE(K, K);
DESCRIBE(V, V);

struct Target {
  char* words;
  char* scale;
};

// What COUNT threads share: EACH items of each of ROWS rows. f(row, item of the row, how many the thread had before)
template <int COUNT, int ROWS, int EACH, int UNROLL, class F>
INLINE void share(int thread, int rows, F f) {
  constexpr bool EVEN = COUNT % EACH == 0;  // then a thread's items are the same of every row
  int own_row = thread / EACH, own_item = thread % EACH;
#pragma unroll UNROLL
  for (int i = 0; i < (ROWS * EACH + COUNT - 1) / COUNT; ++i) {
    int item = i * COUNT + thread;
    int row = EVEN ? i * (COUNT / EACH) + own_row : item / EACH;
    if (row < rows) f(row, EVEN ? own_item : item % EACH, i);
  }
}

template <int IN>
INLINE void widen(uint4 u, float* x) {  // 16 bytes
  const u32 w[] = {u.x, u.y, u.z, u.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (IN == F32) x[i] = __uint_as_float(w[i]);
    if (IN == BF16) x[2 * i] = f32_of_bf16(w[i]), x[2 * i + 1] = __uint_as_float(w[i] & 0xFFFF0000u);
    if (IN == F16) x[2 * i] = f32_of_f16(w[i]), x[2 * i + 1] = f32_of_f16(w[i] >> 16);
  }
}

INLINE float within(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

// N words of 32 bits in pieces of ALIGN bytes
template <int ALIGN, int N>
INLINE void store(char* to, const u32 (&x)[N]) {
  if constexpr (ALIGN >= 16 && N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) *(uint4*)(to + 4 * i) = make_uint4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  } else if constexpr (ALIGN >= 8 && N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) *(uint2*)(to + 4 * i) = make_uint2(x[i], x[i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (ALIGN >= 4) *(u32*)(to + 4 * i) = x[i];
      else ((u16*)to)[2 * i] = (u16)x[i], ((u16*)to)[2 * i + 1] = (u16)(x[i] >> 16);
    }
  }
}
template <class C>
INLINE void store_scale(char* to, int span, float norm) {
  if (C::WIDE_SCALE) {
    ((float*)to)[span] = norm;
  } else {
    norm = norm == norm ? within(norm, HALF_LARGEST) : HALF_LARGEST;  // NaN: float32 overflowed in the rotation
    ((u16*)to)[span] = (u16)f16x2(norm, 0.0f);
  }
}
// The fields of WIDTH bits: word i holds those of values i, i + N, i + 2 N, .. P says who shares the work and where the
// byte with the code of a value lies, of which at least P::RUN follow each other.
template <class C, int WIDTH, class P>
INLINE void pack(const char* codes, const Target* targets, int rows) {
  if constexpr ((C::BITS & WIDTH) != 0) {
    constexpr int N = C::PADDED * WIDTH / 16, PLANES = 16 / WIDTH;
    constexpr int LOW = C::BITS & ~(2 * WIDTH - 1);  // wider fields lie below
    constexpr int STEP = N % 8 == 0 ? 8 : N % 4 == 0 ? 4 : 2, PARTS = (STEP + 3) / 4;
    constexpr int START = C::PADDED * LOW / 8, ALIGN = (C::ALIGN | START) & -(C::ALIGN | START);
    static_assert(N % 2 == 0 && P::RUN % STEP == 0, "pairs of words");
    P::template share<N / STEP>(rows, [&](int row, int item) {
      u32 half[2][PARTS] = {};  // low and high bytes of words
#pragma unroll
      for (int p = 0; p < PLANES; ++p) {
        const char* from = codes + P::at(row, item * STEP + p * N);
        u32 x[PARTS];
        if constexpr (STEP == 8) x[0] = ((const uint2*)from)->x, x[1] = ((const uint2*)from)->y;
        else if constexpr (STEP == 4) x[0] = *(const u32*)from;
        else x[0] = *(const u16*)from;
#pragma unroll
        for (int i = 0; i < PARTS; ++i)
          half[p / (PLANES / 2)][i] |= ((x[i] >> LOW) & (0x01010101u * ((1 << WIDTH) - 1))) << WIDTH * (p % (PLANES / 2));
      }
      u32 words[STEP / 2];
#pragma unroll
      for (int i = 0; i < STEP / 2; ++i) words[i] = prmt(half[0][i / 2], half[1][i / 2], i % 2 ? 0x7362 : 0x5140);
      store<ALIGN>(targets[row].words + START + 2 * STEP * item, words);
    });
  }
}

template <class C, class P>
INLINE void pack(const char* codes, const Target* targets, int rows) {
  pack<C, 8, P>(codes, targets, rows);
  pack<C, 4, P>(codes, targets, rows);
  pack<C, 2, P>(codes, targets, rows);
  pack<C, 1, P>(codes, targets, rows);
}

// Sums over the lanes 4 g + t with the same t: of a in lanes with an even g, of b in the others.
template <class X>
INLINE X sum_of_rows(X a, X b) {
  bool odd = threadIdx.x & 4;
  X x = (odd ? b : a) + __shfl_xor_sync(~0u, odd ? a : b, 4);
  x += __shfl_xor_sync(~0u, x, 8);
  return x + __shfl_xor_sync(~0u, x, 16);
}

template <int N>
INLINE float sum_of(const float* x) {
  if constexpr (N == 1) return x[0];
  else return sum_of<N / 2>(x) + sum_of<N / 2>(x + N / 2);
}

// Where row `index` of the call comes from and goes to.
struct Address {
  u32 batch, head, token, slot;  // slot: of those of the sequence, once `to` has found it
  INLINE void find(const Append& p, u32 index) {
    u32 heads = p.tokens.quotient(index);
    token = index - heads * p.tokens.by;
    batch = p.heads.quotient(heads);
    head = heads - batch * p.heads.by;
  }
  INLINE const char* from(const Source& s) const { return s.values + batch * s.batch + head * s.head + token * s.token; }
  INLINE void to(const Append& p, const Store& s, Target& row) {
    i64 start = p.lengths ? p.lengths[batch * p.lengths_batch] : p.slot;
    slot = (u32)(start + token - p.base);
    slot -= p.capacity.quotient(slot) * p.capacity.by;
    u32 page = batch, at = slot;
    if (p.pages) {
      u32 index = p.page_slots.quotient(slot);
      page = p.pages[batch * p.pages_batch + index];
      at -= index * p.page_slots.by;
    }
    row.scale = s.scale + page * s.scale_batch + head * s.scale_head + at * s.scale_slot;
    row.words = s.words + page * s.words_batch + head * s.words_head + at * s.words_slot;
  }
};
