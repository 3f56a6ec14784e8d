// What the prefill kernels for any GPU from compute capability 8.0 on share: rows in shared memory, and their operands.
// Rows of COLUMNS 16-bit values lie side by side, COLUMNS a multiple of 32; 16-byte pieces trade places within 128 bytes (64 if
// COLUMNS is no multiple of 64), so that eight rows of one column meet in no bank.
#pragma once
#include "prefill.cuh"

struct Operands {
  const char *q, *k, *v;
  i64 q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token;  // bytes
  int dk, dv;                                                                        // true columns
};

template <int COLUMNS>
INLINE int turn(int row) {
  return (COLUMNS % 64 ? row / 2 % 4 : row % 8) << 4;
}

// A lane's place in rows: `at` is the address of a column, in bytes from the lane's own.
template <int COLUMNS>
struct Place {
  static_assert(COLUMNS % 32 == 0, "columns");
  static constexpr int LINE = COLUMNS % 64 ? 64 : 128;
  u32 row, turned;

  INLINE Place(u32 base, int row, int piece = 0) : row(base + row * 2 * COLUMNS), turned(turn<COLUMNS>(row) ^ piece << 4) {}
  INLINE u32 at(int bytes) const { return row + (bytes & ~(LINE - 1)) + ((bytes & (LINE - 1)) ^ turned); }
};

// Matrices of a product from a lane's place: a [16 x 16], rows of memory are rows; b [16 x 16], rows of memory are columns of b,
// or, loaded transposed, rows of b. `piece`: of a lane.
INLINE int a_row(int lane) { return lane % 16; }
INLINE int a_piece(int lane) { return lane / 16; }
INLINE int b_row(int lane) { return lane / 16 * 8 + lane % 8; }
INLINE int b_piece(int lane) { return lane / 8 % 2; }

// Copies rows [first, first + MANY) of `count`, `step` bytes apart, and `columns` of their values; zeros around. A thread copies
// the same piece of every line of its rows, so that all but the row is known to the compiler.
template <int MANY, int COLUMNS, int THREADS>
INLINE void load_rows(u32 to, const char* from, i64 step, int first, int count, int columns) {
  constexpr int LINE = Place<COLUMNS>::LINE, LINES = COLUMNS * 2 / LINE, PIECES = LINE / 16, ROUND = THREADS / PIECES;
  static_assert(ROUND % 8 == 0, "rows of a thread are turned alike");
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));  // addresses are made anew: there are no registers to keep them
  int row = thread / PIECES, piece = thread % PIECES;
  u32 place = Place<COLUMNS>(to, row, piece).at(0);
  bool last = (LINES - 1) * LINE / 2 + 8 * piece < columns;
  from += (first + row) * step + 16 * piece;
#pragma unroll
  for (int n = 0; n < MANY; n += ROUND, from += ROUND * step) {
    if (MANY % ROUND && row + n >= MANY) break;
    bool here = first + row + n < count;
#pragma unroll
    for (int c = 0; c < LINES; ++c)
      copy_async<16>(place + n * 2 * COLUMNS + c * LINE, from + c * LINE, here && (c < LINES - 1 || last));
  }
}

// four accumulators of a product
INLINE float (&quad(float* x))[4] { return *(float(*)[4])x; }
