// Rotate, quantise, pack, store: new tokens of K and V in one launch. The same bits as encode() in quant.py, which says
// what the steps mean: one float32 rounding per operation (the intrinsics keep the compiler from contracting), sums in
// index order. Rotated rows of 16-bit values are for turned.cuh.
//
// A block takes ROWS heads of one side to shared memory. A head is UNITS pieces of VALUES consecutive values, one per
// thread, in registers. With a group per thread (many tokens) sums in order and the transform need no other thread; with
// few tokens LANES neighbours share a group: sums go from lane to lane, large strides of the transform are shuffles.
// Codes go back to shared memory as bytes, since a word holds values from all over the head.
//
// The nearest level of a table: a uniform grid of cells so fine that none holds two boundaries, and one comparison.
// Where the last step before it is a product with a constant, boundaries of the factor stand in for those of the product.
#include "append.cuh"
#include "turned.cuh"

// Where things lie in shared memory.
template <class C>
struct Layout {
  static constexpr int SIZE = size_of(C::IN), UNITS = C::PADDED / C::VALUES;
  static constexpr int LANES = C::GROUP / C::VALUES, SPAN_LANES = C::SPAN / C::VALUES;
  static constexpr int PITCH = 16 * (C::VALUES * SIZE / 16 | 1);  // from unit to unit: 8 lanes meet all banks
  static constexpr int ENTRY = C::CORRECTED ? 16 : 8;
  static constexpr int TABLE_AT = C::KIND == DENSE ? 0 : C::ROWS * UNITS * PITCH;
  static constexpr int ROWS_AT = TABLE_AT + (C::KIND == TABLE ? ((C::CELLS + 1) * C::COPIES * ENTRY + 15) / 16 * 16 : 0);
  // Quotients of 16-bit values by the largest of them, times a power of two, are 2^-13 or more from what lies between two
  // codes, or there: code + 2^BITS, the quotient plus a little, is found by one product, and its first bits are the code.
  static constexpr bool NEAR_CODES = C::KIND == LINEAR && C::RULE == SIGNED_ABSMAX && C::IN != F32 && C::BITS <= 4 &&
                                     C::LOW == -(1 << C::BITS) / 2 && C::TIES != AWAY && !C::CORRECTED;
  static_assert(C::KIND == DENSE || C::ROWS * UNITS <= THREADS, "a thread per unit");
  static_assert(C::ROWS <= THREADS && (C::DIM * SIZE) % 16 == 0 && ROWS_AT % 16 == 0, "whole copies");
};

// -- one group, or LANES threads' share of it

enum Terms { VALUES, SQUARES, EXACT_SQUARES };  // exact: squares of 16-bit floats have at most 22 bits

// The sum, in index order, over LANES threads; all of them get it.
template <int LANES, Terms TERMS, int N>
INLINE float sum_in_order(const float (&x)[N]) {
  float total = 0.0f;
#pragma unroll 1
  for (int turn = 0; turn < LANES; ++turn) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (TERMS == EXACT_SQUARES) total = __fmaf_rn(x[i], x[i], total);
      else total = __fadd_rn(total, TERMS == SQUARES ? __fmul_rn(x[i], x[i]) : x[i]);
    }
    if (LANES > 1) total = __shfl_sync(~0u, total, turn, LANES);
  }
  return total;
}

template <int LANES, Terms TERMS, int N>
INLINE float length(const float (&x)[N], float divisor) {
  float total = sum_in_order<LANES, TERMS>(x);
  return __fsqrt_rn(divisor == 1.0f ? total : __fdiv_rn(total, divisor));
}

// The value of largest magnitude, the first of several; without SIGNED its magnitude.
template <int LANES, bool SIGNED, int N>
INLINE float extreme(const float (&x)[N], int lane) {
  float found = x[0];
#pragma unroll
  for (int i = 1; i < N; ++i) {
    if (SIGNED) found = fabsf(x[i]) > fabsf(found) ? x[i] : found;
    else found = fmaxf(fabsf(found), fabsf(x[i]));
  }
#pragma unroll
  for (int h = 1; h < LANES; h *= 2) {
    float other = __shfl_xor_sync(~0u, found, h);
    bool take = lane & h ? fabsf(other) >= fabsf(found) : fabsf(other) > fabsf(found);
    found = take ? other : found;
  }
  return found;
}

// x times its sign. Signs are constants where a thread has a whole group.
template <class C, bool BEFORE>
struct Signs {
  static constexpr int WORDS = (C::VALUES + 31) / 32;
  u32 words[WORDS];

  INLINE Signs(int lane) {
    int first = lane * C::VALUES;
#pragma unroll
    for (int w = 0; w < WORDS; ++w) words[w] = word<(C::GROUP + 31) / 32>(0, first / 32 + w) >> first % 32;
  }
  // word `index` of the COUNT words from `from` on
  template <int COUNT>
  static INLINE u32 word(int from, int index) {
    if constexpr (COUNT == 1) return BEFORE ? C::before(from) : C::after(from);
    else return index & COUNT / 2 ? word<COUNT / 2>(from + COUNT / 2, index) : word<COUNT / 2>(from, index);
  }
  INLINE float apply(float x, int i) const {
    return __uint_as_float(__float_as_uint(x) ^ ((words[i / 32] << (31 - i % 32)) & 0x80000000u));
  }
};

// The last product of the normalisation; a table's boundaries are those of x.
template <class C>
INLINE float last(float x) { return C::KIND == TABLE ? x : __fmul_rn(x, C::last()); }

template <class C>
INLINE void turn(float (&x)[C::VALUES], float inverse, int lane) {
  constexpr int N = C::VALUES, LANES = Layout<C>::LANES;
  const Signs<C, true> before(lane);
  const Signs<C, false> after(lane);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = before.apply(C::RULE == L2 ? __fmul_rn(x[i], inverse) : x[i], i);
#pragma unroll
  for (int h = 1; h < N; h *= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i & h) continue;
      float a = x[i], b = x[i + h];
      x[i] = __fadd_rn(a, b);
      x[i + h] = __fsub_rn(a, b);
    }
  }
#pragma unroll
  for (int h = 1; h < LANES; h *= 2) {
    float sign = lane & h ? -1.0f : 1.0f;  // its product with x is exact
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = __fmaf_rn(x[i], sign, __shfl_xor_sync(~0u, x[i], h));
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = after.apply(C::RULE == L2 ? last<C>(x[i]) : __fmul_rn(x[i], C::factor()), i);
}

// Every rule but L2, which normalises before the rotation. Returns the norm.
template <class C>
INLINE float normalise(float (&x)[C::VALUES], int lane) {
  constexpr int N = C::VALUES, LANES = Layout<C>::SPAN_LANES;
  float norm;
  if constexpr (C::RULE == RMS) {
    constexpr bool ONE_SPAN = C::SPAN == C::GROUP;
    norm = length<LANES, SQUARES>(x, ONE_SPAN ? 1.0f : (float)C::SPAN);
    float divisor = norm;
    if (!(norm > TINY)) {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = 0.0f;
      divisor = 1.0f;
    }
    float inverse = __fdiv_rn(1.0f, divisor);
#pragma unroll
    for (int i = 0; i < N; ++i)
      x[i] = last<C>(ONE_SPAN ? __fmul_rn(x[i], inverse) : __fdiv_rn(x[i], divisor));
  } else if constexpr (C::RULE == ABSMAX) {
    norm = __fdiv_rn(extreme<LANES, false>(x, lane), C::top());
    float inverse = __fdiv_rn(1.0f, norm);
    inverse = inverse <= LARGEST ? inverse : 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = __fmul_rn(x[i], inverse);
  } else {
    norm = __fdiv_rn(extreme<LANES, true>(x, lane), C::bottom());
    if constexpr (Layout<C>::NEAR_CODES) {
      constexpr float FIRST = 1 << C::BITS, MIDDLE = 0.5f - C::LOW;
      if (fabsf(norm) > 1e-20f && fabsf(norm) < 1e20f) {
        float inverse = __fdiv_rn(1.0f, norm);
#pragma unroll
        for (int i = 0; i < N; ++i)
          x[i] = fminf(__fmaf_rn(x[i], inverse, FIRST + MIDDLE + 1.0f / 65536), 2 * FIRST - 1.0f / 65536);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          float code = __fadd_rn(norm != 0.0f ? __fdiv_rn(x[i], norm) : 0.0f, MIDDLE);
          x[i] = FIRST + floorf(fminf(fmaxf(code, 0.0f), FIRST - 1.0f));
        }
      }
    } else if (fabsf(norm) > 1e-20f && fabsf(norm) < 1e20f) {  // quotients by a product and its remainder (Markstein 1990)
      float inverse = __fdiv_rn(1.0f, norm);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float near = __fmul_rn(x[i], inverse);
        x[i] = __fmaf_rn(__fmaf_rn(-near, norm, x[i]), inverse, near);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = norm != 0.0f ? __fdiv_rn(x[i], norm) : 0.0f;
    }
  }
  return norm;
}

INLINE u32 to_float8(float x) {
  x = within(x, 448.0f);
  u32 sign = __float_as_uint(x) >> 24 & 0x80, u = __float_as_uint(x) & 0x7FFFFFFF;
  if (u > 0x7F800000) return sign | 0x7F;
  u32 normal = (u - (120 << 23) + 0x7FFFF + (u >> 20 & 1)) >> 20;
  float shifted = __fadd_rn(__uint_as_float(u), 16384.0f);  // 2^14 has the unit in the last place of a subnormal
  return sign | (u >= 121 << 23 ? normal : __float_as_uint(shifted) - 0x46800000u);
}

// The index of the integer nearest to x, of LOW .. HIGH.
template <class C>
INLINE u32 nearest_integer(float x) {
  if (C::TIES == AWAY) {  // |x| + 1/2 without its fraction: 2^22 has the unit 1/2 in the last place
    u32 size = __float_as_uint(__fadd_rz(fminf(fabsf(x), (float)C::HIGH), 4194304.5f)) >> 1 & 0xFF;
    return x < 0.0f ? -C::LOW - size : -C::LOW + size;
  }
  float code = fminf(fmaxf(__fadd_rn(x, 0.5f - C::LOW), 0.0f), (float)(C::HIGH - C::LOW));
  return __float_as_uint(__fadd_rz(code, 8388608.0f)) & 0x7FFFFF;
}

// Value I of those whose codes share a word. Returns the square of its level if CORRECTED.
template <class C, int I>
INLINE float assign(float x, u32& word, u32 table) {
  if constexpr (C::KIND == TABLE) {
    u32 cell = __float_as_uint(__fmaf_rn(__saturatef(__fmaf_rn(x, C::cell_scale(), 0.5f)), C::CELLS, 8388608.0f));
    u32 entry[4] = {};  // the boundary; codes of the levels below and above it; squares of these levels
    load_shared<Layout<C>::ENTRY / 4>(table + cell * (C::COPIES * Layout<C>::ENTRY), entry);
    return decide<C::TIES != UP, I>(
        x, __uint_as_float(entry[0]), entry[1], __uint_as_float(entry[3]), __uint_as_float(entry[2]), word);
  } else {
    u32 code = C::KIND == FLOAT8 ? to_float8(x) : nearest_integer<C>(x);
    word = prmt(word, code, (0x3210 & ~(15 << 4 * I)) | 4 << 4 * I);
    float level = __fmul_rn((float)((int)code + C::LOW), C::step());
    return __fmul_rn(level, level);
  }
}

// x becomes codes, four in a word. Returns the sum of the squares of their levels if CORRECTED, and leaves these in x.
// table: where cell 2^23 begins for this thread, which has a copy of its own or shares one with few.
template <class C>
INLINE float assign(float (&x)[C::VALUES], u32 (&codes)[C::VALUES / 4], u32 table) {
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < C::VALUES / 4; ++i) {
    float* y = x + 4 * i;
#if __CUDA_ARCH__ >= 890
    if (C::KIND == FLOAT8) {
      codes[i] = e4m3x4(y[0], y[1], y[2], y[3]);
      continue;
    }
#endif
    if constexpr (Layout<C>::NEAR_CODES) {
      u32 first = prmt(__float_as_uint(y[0]), __float_as_uint(y[1]), 0x0062);
      u32 bytes = prmt(first, prmt(__float_as_uint(y[2]), __float_as_uint(y[3]), 0x0062), 0x5410);
      codes[i] = bytes >> (7 - C::BITS) & 0x01010101u * ((1 << C::BITS) - 1);
      continue;
    }
    codes[i] = 0;
    y[0] = assign<C, 0>(y[0], codes[i], table);
    y[1] = assign<C, 1>(y[1], codes[i], table);
    y[2] = assign<C, 2>(y[2], codes[i], table);
    y[3] = assign<C, 3>(y[3], codes[i], table);
    if (C::CORRECTED) total = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(total, y[0]), y[1]), y[2]), y[3]);
  }
  return total;
}

// -- a block's rows

template <class C>
INLINE void load(const char* unit, int position, float (&x)[C::VALUES]) {
  constexpr int SIZE = Layout<C>::SIZE, N = 16 / SIZE;
#pragma unroll
  for (int i = 0; i < C::VALUES; i += N) {
    uint4 u = *(const uint4*)(unit + i * SIZE);
    if (C::DIM != C::PADDED && position + i >= C::DIM) u = make_uint4(0, 0, 0, 0);
    widen<C::IN>(u, x + i);
  }
}

// One thread's unit: values to codes, in place, and scales.
template <class C>
INLINE void encode_unit(char* unit, u32 table, const Target& row, int part, bool mine) {
  using L = Layout<C>;
  float x[C::VALUES];
  u32 codes[C::VALUES / 4];
  int lane = part % L::LANES;
  load<C>(unit, part * C::VALUES, x);
  float norm = 0.0f, inverse = 1.0f;
  if constexpr (C::RULE == L2 && C::KIND != FLOAT8) {
    norm = length<L::LANES, C::IN == F32 ? SQUARES : EXACT_SQUARES>(x, 1.0f);  // tiny squares: below TINY
    inverse = norm > TINY ? __fdiv_rn(1.0f, norm) : 0.0f;
  }
  if constexpr (C::ROTATE) {
    turn<C>(x, inverse, lane);
  } else if constexpr (C::RULE == L2 && C::KIND != FLOAT8) {
#pragma unroll
    for (int i = 0; i < C::VALUES; ++i) x[i] = last<C>(__fmul_rn(x[i], inverse));
  }
  if constexpr (C::RULE != L2 && C::KIND != FLOAT8) norm = normalise<C>(x, lane);
  if (C::KIND == TABLE && !(norm <= LARGEST)) {  // NaN is beyond all boundaries
#pragma unroll
    for (int i = 0; i < C::VALUES; ++i) x[i] = fminf(x[i], LARGEST);
  }
  float squares = assign<C>(x, codes, table);
  if constexpr (C::CORRECTED) {
    if constexpr (L::SPAN_LANES > 1) squares = sum_in_order<L::SPAN_LANES, VALUES>(x);
    float decoded = __fsqrt_rn(squares);
    norm = decoded > TINY ? __fdiv_rn(norm, decoded) : norm;
  }
  if (!mine) return;
  store<16>(unit, codes);
  if (C::KIND != FLOAT8 && part % L::SPAN_LANES == 0) store_scale<C>(row.scale, part / L::SPAN_LANES, norm);
}

template <class C>
INLINE void copy_table(u32 to, const char* cells) {
  constexpr int ENTRY = Layout<C>::ENTRY;
#pragma unroll 2
  for (int i = threadIdx.x; i < (C::CELLS + 1) * C::COPIES; i += THREADS)
    copy_async_cached<ENTRY>(to + i * ENTRY, cells + i / C::COPIES * ENTRY);
}

// VALUES values of a dense row, as they are read: so few that neither side of a copy takes more than 16 bytes per thread,
// and a warp's bytes follow each other.
template <class C>
using Item = typename Choose<C::VALUES * size_of(C::IN) == 8, uint2, uint4>::type;

INLINE uint4 filled(uint4 u) { return u; }
INLINE uint4 filled(uint2 u) { return make_uint4(u.x, u.y, 0, 0); }

template <class C>
INLINE void convert(Item<C> item, char* to) {
  uint4 from = filled(item);
  if constexpr (C::IN == C::OUT) {
    const u32 x[] = {from.x, from.y, from.z, from.w};
    store<C::ALIGN>(to, x);
  } else {
    float x[8];
    widen<C::IN>(from, x);
    u32 y[C::VALUES * size_of(C::OUT) / 4];
#pragma unroll
    for (int i = 0; i < C::VALUES; ++i) {
      if constexpr (C::OUT == F32) y[i] = __float_as_uint(x[i]);
      else if (i % 2 == 0 && C::OUT == F16) y[i / 2] = f16x2(within(x[i], HALF_LARGEST), within(x[i + 1], HALF_LARGEST));
      else if (i % 2 == 0) y[i / 2] = bf16x2(within(x[i], BF16_LARGEST), within(x[i + 1], BF16_LARGEST));
    }
    store<C::ALIGN>(to, y);
  }
}

// How the codes of a block's rows lie: in units.
template <class C>
struct OfBlock {
  static constexpr int RUN = C::VALUES;
  static INLINE int at(int row, int value) {
    return (row * Layout<C>::UNITS + value / C::VALUES) * Layout<C>::PITCH + value % C::VALUES;
  }
  template <int EACH, class F>
  static INLINE void share(int rows, F f) {
    ::share<THREADS, C::ROWS, EACH, 4>(threadIdx.x, rows, [&](int row, int item, int) { f(row, item); });
  }
};

// Dense rows: everything that a thread has is read before it writes.
template <class C>
INLINE void copy_rows(const Target* targets, const char* const* from, int rows) {
  constexpr int EACH = C::DIM / C::VALUES, ITEMS = (C::ROWS * EACH + THREADS - 1) / THREADS;
  Item<C> x[ITEMS];
  share<THREADS, C::ROWS, EACH, ITEMS>(
      threadIdx.x, rows, [&](int row, int item, int i) { x[i] = __ldg((const Item<C>*)from[row] + item); });
  share<THREADS, C::ROWS, EACH, ITEMS>(threadIdx.x, rows, [&](int row, int item, int i) {
    convert<C>(x[i], targets[row].words + item * C::VALUES * size_of(C::OUT));
  });
}

template <class C>
INLINE void append_rows(const Append& p, const Source& source, const Store& target, const char* cells, u32 block) {
  using L = Layout<C>;
  extern __shared__ __align__(16) char shared[];
  Target* targets = (Target*)(shared + L::ROWS_AT);
  const char** from = (const char**)(targets + C::ROWS);
  u32 first = block * C::ROWS, thread = threadIdx.x;
  int rows = p.rows - first < C::ROWS ? p.rows - first : C::ROWS;
  Address address;
  if (thread < rows) {
    address.find(p, first + thread);
    from[thread] = address.from(source);
  }
  if constexpr (C::KIND == DENSE) {
    if (thread < rows) address.to(p, target, targets[thread]);
    __syncthreads();
    copy_rows<C>(targets, from, rows);
  } else {
    constexpr int PER_UNIT = C::VALUES * L::SIZE / 16;
    u32 units = shared_address(shared);
    if constexpr (C::KIND == TABLE) copy_table<C>(units + L::TABLE_AT, cells);
    __syncthreads();
    share<THREADS, C::ROWS, C::DIM * L::SIZE / 16, 4>(thread, rows, [&](int row, int item, int) {
      u32 to = units + (row * L::UNITS + item / PER_UNIT) * L::PITCH + item % PER_UNIT * 16;
      copy_async<16>(to, from[row] + item * 16);
    });
    commit_copies();
    if (thread < rows) address.to(p, target, targets[thread]);
    wait_copies<0>();
    __syncthreads();
    u32 unit = thread < rows * L::UNITS ? thread : 0;
    u32 table = units + L::TABLE_AT + thread % C::COPIES * L::ENTRY - WHOLE * (C::COPIES * L::ENTRY);
    encode_unit<C>(shared + unit * L::PITCH, table, targets[unit / L::UNITS], unit % L::UNITS, unit == thread);
    __syncthreads();
    pack<C, OfBlock<C>>(shared, targets, rows);
  }
}

template <class C>
INLINE void append_side(const Append& p, const Append::One& side, u32 block) {
  if constexpr (C::TURNED) {
    append_tiles<C>(p, side, block);
  } else {
    wait_for_earlier_kernels();
    append_rows<C>(p, side.from, side.to, side.table, block);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) encode(const __grid_constant__ Append p) {
  let_later_kernels_start();
  bool second = blockIdx.x >= p.k_blocks;
  u32 block = blockIdx.x - (second ? p.k_blocks : 0);
  if (SAME || !second) append_side<K>(p, p.side[second], block);
  else append_side<V>(p, p.side[second], block);
}
