// What the prefill kernels for any GPU from compute capability 8.0 on share: rows in shared memory, and their operands.
// Rows of COLUMNS 16-bit values lie side by side, COLUMNS a multiple of 16. 16-byte pieces trade places within a line of 128
// bytes, or of 64 or 32 where lines of 128 do not fill a row, so that eight rows of one column meet in no bank.
#pragma once
#include "prefill.cuh"

struct Operands {
  const char *q, *k, *v;
  i64 q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token;  // bytes
  int dk, dv;                                                                        // true columns
};

template <int COLUMNS>
INLINE int turn(int row) {
  return (COLUMNS % 64 == 0 ? row % 8 : COLUMNS % 32 == 0 ? row / 2 % 4 : row / 4 % 2) << 4;
}

// A lane's place in rows: `at` is the address of a column, in bytes from the lane's own.
template <int COLUMNS>
struct Place {
  static_assert(COLUMNS % 16 == 0, "columns");
  static constexpr int LINE = COLUMNS % 64 == 0 ? 128 : COLUMNS % 32 == 0 ? 64 : 32;
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

// Copies rows [first, first + MANY) of `count`, `step` bytes apart, and `columns` of their values; zeros around. Threads side by
// side copy SIDE lines side by side; a thread's place in a row is the same in all of its rows.
template <int MANY, int COLUMNS, int THREADS>
INLINE void load_rows(u32 to, const char* from, i64 step, int first, int count, int columns) {
  constexpr int LINE = Place<COLUMNS>::LINE, LINES = COLUMNS * 2 / LINE, SIDE = LINE == 128 ? LINES & -LINES : 1;
  constexpr int PIECES = SIDE * LINE / 16, ROUND = THREADS / PIECES;
  static_assert(ROUND % 8 == 0 || (LINE == 128 && (ROUND & (ROUND - 1)) == 0), "rows of a thread are turned in a known way");
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));  // addresses are made anew: there are no registers to keep them
  int row = thread / PIECES, piece = thread % PIECES;
  u32 line = to + row * 2 * COLUMNS + (piece / (LINE / 16)) * LINE, turned = turn<COLUMNS>(row) ^ piece % (LINE / 16) << 4;
  bool last = (LINES - SIDE) * LINE / 2 + 8 * piece < columns;
  from += (first + row) * step + 16 * piece;
#pragma unroll
  for (int n = 0; n < MANY; n += ROUND, from += ROUND * step) {
    if (MANY % ROUND && row + n >= MANY) break;
    bool here = first + row + n < count;
    u32 place = line + n * 2 * COLUMNS + (ROUND % 8 ? turned ^ n % 8 << 4 : turned);
#pragma unroll
    for (int c = 0; c < LINES; c += SIDE)
      copy_async<16>(place + c * LINE, from + c * LINE, here && (c < LINES - SIDE || last));
  }
}

// Asks for the mask of a block, so that it is near when the scores are there.
template <int THREADS>
INLINE void prefetch_mask(const Prefill& p, const Tile& tile, int block) {
  int thread = threadIdx.x, row = min(tile.row + thread % ROWS, p.q_len - 1), key = block * KEYS;
  if (block < 0 || p.mask_key != 1 || (tile.map && tile.map[block] == 1)) return;
  const char* at = p.mask + (tile.batch * p.mask_batch + tile.head * p.mask_head + row * p.mask_token + key) * Mask::SIZE;
#pragma unroll
  for (int i = 0; i < KEYS * Mask::SIZE; i += 128 * (THREADS / ROWS)) {
    int byte = i + thread / ROWS * 128;
    if (byte < min(KEYS, p.kv_len - key) * Mask::SIZE) prefetch(at + byte);
  }
}

// four accumulators of a product
INLINE float (&quad(float* x))[4] { return *(float(*)[4])x; }
