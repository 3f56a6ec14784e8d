// Rows in any format, ring or pages -> 16-bit values side by side, for kernels that multiply plain tensors. A thread takes eight
// values of a row at a time, and asks for the next eight before it writes them.
//
// The host defines ROW_KIND (codec.cuh: F16, BF16, F32, FP8, or TABLE for all rows with levels), ROW_BITS, ROW_DIM, ROW_SPAN, WIDE_SCALE,
// ALIGNED (bytes that the words of every row are aligned to: 16, 4 or 2), OUT_BF16. Source: packing.py, a field of w bits over ROW_DIM values is ROW_DIM * w / 16 words; value d is in word d % words.
#include "codec.cuh"
#include "params.cuh"

struct Unpack {
  Side from;              // of batch 0, head 0, slot 0
  const float* table;     // values by code
  u16* to;                // [batch, head, count, ROW_DIM]: positions origin on
  i64 to_batch, to_head;  // elements
  const int* pages;       // [B, pages_batch]: the page of each page_slots slots, or null
  const i64* starts;      // [B] or null
  const i64* lengths;     // [B or 1]: tokens of each sequence, in place of length; or null
  i64 pages_batch, lengths_batch;
  // Live are max(first, start, tokens - keep) <= p < min(stop, tokens - trail); position p lies in slot (p - base) % capacity
  int first, stop, keep, trail, base, capacity, page_slots;
  int length, origin, count;
  int relative;  // origin lies as much earlier as the sequence is shorter than length
  int fill;      // zeros for rows that are not live, up to a multiple of 128 after the last token
  float factor;  // on values that no table gives
};

constexpr bool CODES = ROW_KIND == TABLE;
constexpr int EIGHTS = ROW_DIM / 8, SPAN = ROW_SPAN ? ROW_SPAN : ROW_DIM;  // spans are multiples of eight

// eight words that lie at a multiple of eight words from the begin of their row, two in each register
INLINE void load_words(const u16* from, u32 (&w)[4]) {
  if constexpr (ALIGNED == 16) {
    uint4 x = *(const uint4*)from;
    w[0] = x.x, w[1] = x.y, w[2] = x.z, w[3] = x.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = ALIGNED >= 4 ? ((const u32*)from)[i] : from[2 * i] | (u32)from[2 * i + 1] << 16;
  }
}
INLINE u32 word_of(const u32 (&w)[4], int i) { return w[i / 2] >> 16 * (i % 2) & 0xFFFF; }

// A field of WIDTH bits: value d is in word d % WORDS, bits d / WORDS * WIDTH on. Where eight values lie in eight words these are
// taken as they are, else the codes are.
template <int WIDTH>
struct Field {
  static constexpr int WORDS = ROW_DIM * WIDTH / 16;
  static constexpr bool WHOLE = WORDS % 8 == 0;

  INLINE static void load(const u16* from, int first, u32 (&w)[4]) {
    if constexpr (WHOLE) {
      load_words(from + first % WORDS, w);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        u32 code = code_in(from[(first + i) % WORDS], first + i);
        w[i / 2] = i % 2 ? w[i / 2] | code << 16 : code;
      }
    }
  }
  INLINE static u32 code(const u32 (&w)[4], int first, int i) { return WHOLE ? code_in(word_of(w, i), first) : word_of(w, i); }

 private:
  INLINE static u32 code_in(u32 word, int d) { return word >> d / WORDS * WIDTH & ((1 << WIDTH) - 1); }
};

// Eight values of a row on their way.
struct Eight {
  static constexpr int FIELDS = CODES ? (ROW_BITS >> 3 & 1) + (ROW_BITS >> 2 & 1) + (ROW_BITS >> 1 & 1) + (ROW_BITS & 1)
                                      : ROW_KIND == F32 ? 2 : 1;
  u32 w[FIELDS][4];
  float scale;
  bool live;

  template <class F>
  INLINE static void each_field(F f) {  // f(field, words before it, index, bits before it)
    constexpr int A = ROW_BITS & 8, B = ROW_BITS & 4, C = ROW_BITS & 2, D = ROW_BITS & 1, UNIT = ROW_DIM / 16;
    if constexpr (A) f(Field<8>(), 0, 0, 0);
    if constexpr (B) f(Field<4>(), A * UNIT, A / 8, A);
    if constexpr (C) f(Field<2>(), (A + B) * UNIT, A / 8 + B / 4, A + B);
    if constexpr (D) f(Field<1>(), (A + B + C) * UNIT, A / 8 + B / 4 + C / 2, A + B + C);
  }

  INLINE void load(const Unpack& p, int position, int first, int head, int batch, int tokens, int oldest) {
    live = position >= oldest && position < min(p.stop, tokens - p.trail);
    if (!live) return;
    u32 slot = (u32)(position - p.base) % (u32)p.capacity;
    i64 place = batch;
    if (p.pages) {
      place = p.pages[batch * p.pages_batch + slot / (u32)p.page_slots];
      slot %= (u32)p.page_slots;
    }
    const Side& from = p.from;
    const u16* row = (const u16*)(from.words + place * from.words_batch + head * from.words_head + slot * from.words_slot);
    if constexpr (CODES) {
      const char* scales = from.scale + place * from.scale_batch + head * from.scale_head + slot * from.scale_slot;
      scale = WIDE_SCALE ? ((const float*)scales)[first / SPAN] : f32_of_f16(((const u16*)scales)[first / SPAN]);
      each_field([&](auto field, int at, int n, int) { field.load(row + at, first, w[n]); });
    } else if constexpr (ROW_KIND == FP8) {
      Field<8>::load(row, first, w[0]);
    } else {
#pragma unroll
      for (int i = 0; i < FIELDS; ++i) load_words(row + first * FIELDS + 8 * i, w[i]);
    }
  }

  INLINE float value(const Unpack& p, const float* table, int first, int i) const {
    if constexpr (CODES) {
      u32 code = 0;
      each_field([&](auto field, int, int n, int low) { code |= field.code(w[n], first, i) << low; });
      return table[code] * scale;
    }
    if constexpr (ROW_KIND == FP8) return f32_of_f16(f16x2_of_e4m3(Field<8>::code(w[0], first, i)) & 0xFFFF) * p.factor;
    if constexpr (ROW_KIND == F32) return __uint_as_float(w[i / 4 % FIELDS][i % 4]) * p.factor;
    return (ROW_KIND == F16 ? f32_of_f16(word_of(w[0], i)) : f32_of_bf16(word_of(w[0], i))) * p.factor;
  }

  INLINE uint4 values(const Unpack& p, const float* table, int first) const {
    constexpr float LIMIT = OUT_BF16 ? 3.3895314e38f : 65504.0f;
    constexpr bool FITS = CODES && !WIDE_SCALE;  // the host divides by what the largest scale asks for
    u32 y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float a = value(p, table, first, 2 * i), b = value(p, table, first, 2 * i + 1);
      if (!FITS) a = fminf(fmaxf(a, -LIMIT), LIMIT), b = fminf(fmaxf(b, -LIMIT), LIMIT);
      y[i] = OUT_BF16 ? bf16x2(a, b) : f16x2(a, b);
    }
    return make_uint4(y[0], y[1], y[2], y[3]);
  }
};

// Launch: grid (any, heads, batches), block 256.
extern "C" __global__ void __launch_bounds__(256) unpack(const __grid_constant__ Unpack p) {
  __shared__ float table[CODES ? 1 << ROW_BITS : 1];
  wait_for_earlier_kernels();
  let_later_kernels_start();
  int head = blockIdx.y, batch = blockIdx.z, tokens = p.lengths ? (int)p.lengths[batch * p.lengths_batch] : p.length;
  int origin = p.origin - (p.relative ? p.length - tokens : 0);
  int oldest = max(max(p.first, tokens - p.keep), p.starts ? (int)p.starts[batch] : 0);
  // a tile of keys is read whole, and none beyond the last token
  int tiles = (tokens - origin + 127) / 128 * 128, all = min(p.count, tiles) * EIGHTS;
  int step = gridDim.x * blockDim.x, item = blockIdx.x * blockDim.x + threadIdx.x;
  uint4* to = (uint4*)(p.to + batch * p.to_batch + head * p.to_head);
  Eight now, next;
  auto load = [&](Eight& x, int item) {
    if (item < all) x.load(p, origin + item / EIGHTS, item % EIGHTS * 8, head, batch, tokens, oldest);
  };
  load(next, item);
  if (CODES) {
    for (int i = threadIdx.x; i < 1 << ROW_BITS; i += blockDim.x) table[i] = p.table[i];
    __syncthreads();
  }
  for (; item < all; item += step) {
    now = next;
    load(next, item + step);
    if (now.live) to[item] = now.values(p, table, item % EIGHTS * 8);
    else if (p.fill) to[item] = make_uint4(0, 0, 0, 0);
  }
}
