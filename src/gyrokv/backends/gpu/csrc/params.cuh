// Arguments of the kernels, as the host lays them out (calls.py).
#pragma once
#include "turn.cuh"

// Arguments reach a processor by lines of 64 bytes, each of which costs a kernel the latency of memory when it is first
// used. This asks for all of them at once. at: a word of shared memory that thread 0 may overwrite
template <class P>
INLINE void touch(const P& p, u32 at) {
  u32 x = 0;
#pragma unroll
  for (int i = 0; i < (int)sizeof(P); i += 64) x ^= ((const u32*)&p)[i / 4];
  if (threadIdx.x == 0) store_shared(at, x);
}

struct Side {
  const char* words;  // of batch 0, head 0, slot 0
  const char* scale;
  i64 words_batch, words_head, words_slot;  // bytes; of a paged cache: from page to page in place of batches
  i64 scale_batch, scale_head, scale_slot;
};

struct Finish {
  const float* sinks;  // [Hq] or null
  char* out;           // [B, Hq, Tq, out_dim]
  float* lse;          // [B, Hq, Tq]
  int out_dim;
  SignBits signs;  // of the output, where it is rotated
};

struct Attend {
  const char* q;
  i64 q_batch, q_head, q_token;  // elements
  Side k, v;
  float* out;           // [B, Hq, Tq, splits_total, DV], relative to exp2(top)
  float2* top;          // [B, Hq, Tq, splits_total]: the largest score in units of log2, the sum of weights
  const float* slopes;  // [Hq] or null
  const char* mask;
  i64 mask_batch, mask_head, mask_token, mask_key;  // elements
  const i64* starts;                                // [B] or null
  const float* k_table;                             // values by code, of rows that look them up
  const float* v_table;
  const int* pages;      // [B, pages_batch]: the page of each page_slots slots
  const i64* lengths;    // [B or 1]: tokens of each sequence, in place of length; or null
  i64 lengths_batch, pages_batch, page_slots;
  i64 origin;  // the position that starts, lengths and all those below count from; it lies in slot 0
  // Positions; live here are max(first, length - keep) <= p < min(stop, length - trail). kv_first: the mask's first key
  int length, first, stop, trail, keep, kv_first, window;  // window 0: none
  int capacity, q_heads, kv_heads, q_len, groups, causal;
  int splits, split_base, splits_total;
  u32 over_groups, over_splits;  // see `quotient`
  float scale, softcap, k_factor, v_factor;
  u32 k_low, k_high, v_low, v_high;  // tables of bytes
  int q_dim;                         // values of q in memory: DK or fewer
  SignBits k_signs;                  // of q, with K_TURN
  Finish finish;                     // where a block has all keys of its rows; else without an output
};

struct Merge {
  const float* part;
  const float2* top;
  int q_heads, q_len, splits, dim;
  Finish finish;
};

struct Source {
  const char* values;  // of batch 0, head 0, token 0
  i64 batch, head, token;  // bytes
};

struct Store {
  char* words;  // as in Side
  char* scale;
  i64 words_batch, words_head, words_slot;  // bytes
  i64 scale_batch, scale_head, scale_slot;
};

struct Divisor {
  u32 by, factor, shift;
  // n / by for n < 2^31 (Granlund and Montgomery 1994): factor = floor(2^32 (2^shift - by) / by) + 1, 2^shift >= by
  INLINE u32 quotient(u32 n) const { return (__umulhi(n, factor) + n) >> shift; }
};

struct Append {
  struct One {
    Source from;
    Store to;
    const char* table;  // codes by value, see csrc/encode.cu and csrc/turned.cuh; or null
    u32 each, rest;     // of csrc/turned.cuh: tiles per team of warps, and how many of these take one more
  } side[2];            // K, V
  // Token i of sequence b goes to slot (start + i - base) % capacity, where start is lengths[b] or, without lengths, slot
  const i64* lengths;  // [B or 1] or null
  const int* pages;    // [B, pages_batch]: the page of each page_slots slots, or null
  i64 lengths_batch, pages_batch, slot, base;
  Divisor page_slots, capacity, heads, tokens;
  u32 rows;      // batch * heads * tokens
  u32 k_blocks;  // those of K come first
};
