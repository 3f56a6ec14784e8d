// Rows in any format, ring or pages -> 16-bit values side by side, for kernels that multiply plain tensors: a thread takes eight
// values of a row.
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
  int fill;      // zeros for rows that are not live
  float factor;  // on values that no table gives
};

constexpr bool CODES = ROW_KIND == TABLE;
constexpr int EIGHTS = ROW_DIM / 8, GROUPS = ROW_SPAN ? ROW_DIM / ROW_SPAN : 1;

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

// adds a field of WIDTH bits, whose words begin at `at`, to the codes of eight values
template <int WIDTH>
INLINE void add_field(const u16* row, int& at, int& low, int first, u32 (&codes)[8]) {
  if constexpr ((ROW_BITS & WIDTH) != 0) {
    constexpr int WORDS = ROW_DIM * WIDTH / 16;
    if constexpr (WORDS % 8 == 0) {
      int shift = first / WORDS * WIDTH;
      u32 w[4];
      load_words(row + at + first % WORDS, w);
#pragma unroll
      for (int i = 0; i < 8; ++i) codes[i] |= (word_of(w, i) >> shift & ((1 << WIDTH) - 1)) << low;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        int d = first + i;
        codes[i] |= (row[at + d % WORDS] >> (d / WORDS * WIDTH) & ((1 << WIDTH) - 1)) << low;
      }
    }
    at += WORDS;
    low += WIDTH;
  }
}

extern "C" __global__ void __launch_bounds__(256) unpack(const __grid_constant__ Unpack p) {
  __shared__ float table[CODES ? 1 << ROW_BITS : 1];
  wait_for_earlier_kernels();
  let_later_kernels_start();
  if (CODES) {
    for (int i = threadIdx.x; i < 1 << ROW_BITS; i += blockDim.x) table[i] = p.table[i];
    __syncthreads();
  }
  i64 item = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  int first = (int)(item % EIGHTS) * 8, head = blockIdx.y, batch = blockIdx.z;
  i64 token = item / EIGHTS;
  if (token >= p.count) return;
  int tokens = p.lengths ? (int)p.lengths[batch * p.lengths_batch] : p.length;
  int position = p.origin + (int)token - (p.relative ? p.length - tokens : 0);
  int oldest = max(max(p.first, tokens - p.keep), p.starts ? (int)p.starts[batch] : 0);
  uint4* to = (uint4*)(p.to + batch * p.to_batch + head * p.to_head + token * ROW_DIM + first);
  if (position < oldest || position >= min(p.stop, tokens - p.trail)) {
    if (p.fill) *to = make_uint4(0, 0, 0, 0);
    return;
  }
  u32 slot = (u32)(position - p.base) % (u32)p.capacity;
  i64 place = batch;
  if (p.pages) {
    place = p.pages[batch * p.pages_batch + slot / (u32)p.page_slots];
    slot %= (u32)p.page_slots;
  }
  const char* row = p.from.words + place * p.from.words_batch + head * p.from.words_head + slot * p.from.words_slot;
  float x[8];
  if constexpr (CODES) {
    const char* scales = p.from.scale + place * p.from.scale_batch + head * p.from.scale_head + slot * p.from.scale_slot;
    u32 codes[8] = {};
    int at = 0, low = 0;
    add_field<8>((const u16*)row, at, low, first, codes);
    add_field<4>((const u16*)row, at, low, first, codes);
    add_field<2>((const u16*)row, at, low, first, codes);
    add_field<1>((const u16*)row, at, low, first, codes);
    int group = first / (ROW_SPAN ? ROW_SPAN : ROW_DIM);  // spans are multiples of eight
    float scale = WIDE_SCALE ? ((const float*)scales)[group] : f32_of_f16(((const u16*)scales)[group]);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = table[codes[i]] * scale;
  } else if constexpr (ROW_KIND == FP8) {  // word i of the row holds values i and i + ROW_DIM / 2
    constexpr int HALF = ROW_DIM / 2;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int d = first + i;
      u32 word = ((const u16*)row)[d % HALF];
      x[i] = f32_of_f16(f16x2_of_e4m3(d < HALF ? word & 0xFF : word >> 8) & 0xFFFF);
    }
  } else if constexpr (ROW_KIND == F32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = ((const float*)row)[first + i];
  } else {
    u32 w[4];
    load_words((const u16*)row + first, w);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = ROW_KIND == F16 ? f32_of_f16(word_of(w, i)) : f32_of_bf16(word_of(w, i));
  }
  if (!CODES)
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= p.factor;
  u32 y[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float limit = OUT_BF16 ? 3.3895314e38f : 65504.0f;
    float a = fminf(fmaxf(x[2 * i], -limit), limit), b = fminf(fmaxf(x[2 * i + 1], -limit), limit);
    y[i] = OUT_BF16 ? bf16x2(a, b) : f16x2(a, b);
  }
  *to = make_uint4(y[0], y[1], y[2], y[3]);
}
