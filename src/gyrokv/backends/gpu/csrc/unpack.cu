// Packed rows -> 16-bit values, for kernels that multiply plain tensors: a thread takes eight values of a row.
//
// The host defines ROW_KIND (codec.cuh: F16, BF16, F32, FP8, or TABLE for all rows with levels), ROW_BITS, ROW_DIM, ROW_SPAN, WIDE_SCALE,
// OUT_BF16. Source: packing.py, a field of w bits over ROW_DIM values is ROW_DIM * w / 16 words; value d is in word d % words.
#include "codec.cuh"
#include "params.cuh"

struct Unpack {
  Side from;           // of batch 0, head 0, slot 0
  const float* table;  // values by code
  u16* to;             // [batch, head, count, ROW_DIM]
  i64 to_batch, to_head;  // elements
  const int* pages;
  i64 pages_batch, page_slots, slot;  // slot of the first row
  int count, capacity, heads;
  float factor;  // on values that no table gives
};

constexpr bool CODES = ROW_KIND == TABLE;
constexpr int EIGHTS = ROW_DIM / 8, GROUPS = ROW_SPAN ? ROW_DIM / ROW_SPAN : 1;

// adds a field of WIDTH bits, whose words begin at `at`, to the codes of eight values
template <int WIDTH>
INLINE void add_field(const u16* row, int& at, int& low, int first, u32 (&codes)[8]) {
  if constexpr ((ROW_BITS & WIDTH) != 0) {
    constexpr int WORDS = ROW_DIM * WIDTH / 16;
    if constexpr (WORDS % 8 == 0) {
      int shift = first / WORDS * WIDTH;
      const u16* from = row + at + first % WORDS;
#pragma unroll
      for (int i = 0; i < 8; ++i) codes[i] |= (from[i] >> shift & ((1 << WIDTH) - 1)) << low;
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
  i64 slot = (p.slot + token) % p.capacity, place = batch;
  if (p.pages) {
    place = p.pages[batch * p.pages_batch + slot / p.page_slots];
    slot %= p.page_slots;
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
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      x[i] = ROW_KIND == F32 ? ((const float*)row)[first + i] : ROW_KIND == F16 ? f32_of_f16(((const u16*)row)[first + i]) : f32_of_bf16(((const u16*)row)[first + i]);
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
  *(uint4*)(p.to + batch * p.to_batch + head * p.to_head + token * ROW_DIM + first) = make_uint4(y[0], y[1], y[2], y[3]);
}
