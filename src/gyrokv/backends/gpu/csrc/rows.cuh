// How rows reach a warp: which slots are live, pages, copies to shared memory, scales.
// The host defines PAGED.
#pragma once
#include "codec.cuh"
#include "params.cuh"

// Positions relative to the first live one, `offset`, run from 0 to count - 1; slots hold them in order, modulo capacity.
struct Slots {
  int first_slot, count, capacity;
  INLINE int offset(int slot) const { return slot - first_slot + (slot < first_slot ? capacity : 0); }
  INLINE bool live(int slot) const { return slot < capacity && offset(slot) < count; }
  // are slots slot .. slot + n - 1 live and of consecutive positions?
  INLINE bool whole(int slot, int n) const {
    int low = slot - first_slot;
    return low >= 0 ? low + n <= count && slot + n <= capacity : low + n <= 0 && low + capacity + n <= count;
  }
};

// Where the rows of one head and sequence lie. STRIDE: bytes from slot to slot; 0 if only known when it runs.
struct Rows {
  const char* base;
  i64 slot_stride;  // bytes
  i64 page_stride;
  const int* pages;
  int page_slots;

  template <int STRIDE>
  INLINE const char* at(int slot) const {
#if PAGED
    int page = slot / page_slots;
    return base + pages[page] * page_stride + (slot - page * page_slots) * (STRIDE ? STRIDE : slot_stride);
#else
    return base + (i64)slot * (STRIDE ? STRIDE : slot_stride);
#endif
  }
};

// COUNT rows from slot on to shared memory, or what a warp of a team has of them; zeros where no live row is, unless all
// are (WHOLE). A page holds whole tiles.
template <class R, int COUNT, int PITCH, int COPY, int STRIDE, bool WHOLE>
INLINE void copy_rows(u32 to, const Rows& rows, int slot, const Slots& slots, int rank, int lane) {
  constexpr int PER_ROW = R::BYTES_ROW / COPY, ALL = COUNT * PER_ROW;
  static_assert(R::BYTES_ROW % COPY == 0, "copies of whole rows");
  const char* from = rows.at<STRIDE>(slot);
  i64 stride = STRIDE ? STRIDE : rows.slot_stride;
  if constexpr (TEAM > 1) {  // of each block of words
    constexpr int BYTES = R::MINE * R::WORD, PARTS = BYTES / COPY;
    static_assert(BYTES % COPY == 0 && (PARTS <= 32 ? COUNT * PARTS % 32 == 0 && 32 % PARTS == 0 : PARTS % 32 == 0), "parts of lanes");
    int row = PARTS <= 32 ? lane / PARTS : 0, part = PARTS <= 32 ? lane % PARTS : lane;
    to += row * PITCH + part * COPY, from += rank * BYTES + part * COPY;
#pragma unroll
    for (int block = 0; block < R::NREG; ++block)
#pragma unroll
      for (int i = 0; i < COUNT * PARTS / 32; ++i) {
        int down = PARTS <= 32 ? i * (32 / PARTS) : i / (PARTS / 32), across = PARTS <= 32 ? 0 : i % (PARTS / 32) * 32 * COPY;
        u32 place = to + down * PITCH + block * BYTES + across;
        int offset = block * TEAM * BYTES + across;
        if (WHOLE) copy_async<COPY>(place, from + (row + down) * stride + offset);
        else {
          bool live = slots.live(slot + row + down);
          copy_async<COPY>(place, from + (live ? (row + down) * stride : 0) + offset, live);
        }
      }
  } else if (WHOLE) {
    // what lanes differ by is added once
    constexpr bool ALIKE = 32 % PER_ROW == 0, CLOSE = PITCH == R::BYTES_ROW;
    if (STRIDE == R::BYTES_ROW) from += lane * COPY;
    else if (ALIKE) from += lane / PER_ROW * stride + lane % PER_ROW * COPY;
    from = as_one(from);
    if (CLOSE) to += lane * COPY;
    else if (ALIKE) to += lane / PER_ROW * PITCH + lane % PER_ROW * COPY;
#pragma unroll
    for (int i = 0; i < (ALL + 31) / 32; ++i) {
      int e = i * 32 + lane, row = e / PER_ROW, part = e % PER_ROW;
      if (ALIKE) row = i * (32 / PER_ROW), part = 0;
      if (!ALIKE && PER_ROW % 32 == 0) row = i * 32 / PER_ROW, part = i * 32 % PER_ROW + lane;
      i64 offset = STRIDE == R::BYTES_ROW ? i * 32 * COPY : row * stride + part * COPY;
      if (ALL % 32 == 0 || e < ALL) copy_async<COPY>(to + (CLOSE ? i * 32 * COPY : row * PITCH + part * COPY), from + offset);
    }
  } else {
    for (int e = lane; e < ALL; e += 32) {
      int row = e / PER_ROW, part = e % PER_ROW;
      bool live = slots.live(slot + row);
      copy_async<COPY>(to + row * PITCH + part * COPY, from + (live ? row * stride : 0) + part * COPY, live);
    }
  }
}

// The scales of a row, as they are stored
template <class R, bool WIDE>
struct Scales {
  static constexpr int SIZE = WIDE ? 4 : 2, COUNT = R::SCALED ? R::GROUPS : 0, BYTES = COUNT * SIZE, N = (BYTES + 3) / 4;
  u32 raw[N ? N : 1];

  INLINE void load(u32 address) {  // in shared memory
    if constexpr (BYTES % 4 == 2) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        u32 x = load_shared_u16(address + 2 * i);
        raw[i / 2] = i % 2 ? raw[i / 2] | x << 16 : x;
      }
    } else if constexpr (N > 0) {
      constexpr int WIDTH = N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;
#pragma unroll
      for (int i = 0; i < N; i += WIDTH) load_shared<WIDTH>(address + 4 * i, raw + i);
    }
  }
  INLINE float at(int group) const {
    if constexpr (!R::SCALED) return 1.0f;
    if constexpr (WIDE) return __uint_as_float(raw[group]);
    else return f32_of_f16(raw[group / 2] >> (group % 2 * 16));
  }
};

// Scales of a tile's slots from slot on to shared memory; zeros where no live row is, unless all are (WHOLE). Those that
// do not lie side by side are waited for. skew: bytes from a word's start to the first scale; the word after the last
// that is whole holds scales of the row, too, for a tile's slots are an even number
template <class S, int STRIDE, int COPY, bool WHOLE>
INLINE void copy_scales(u32 to, u32 skew, const Rows& rows, int slot, const Slots& slots, int lane) {
  constexpr int ALL = TILE * S::BYTES / 4;
  if constexpr (ALL == 0) return;
  const char* from = rows.at<STRIDE>(slot);
  if constexpr (WHOLE && STRIDE > 0) {
    from = as_one(from - skew + 4 * lane);
#pragma unroll
    for (int i = 0; i < (ALL + 31) / 32; ++i)
      if (ALL % 32 == 0 || i * 32 + lane < ALL) copy_async<4>(to + 4 * (i * 32 + lane), from + 128 * i);
    if (COPY == 2 && skew && lane == 0) copy_async<4>(to + 4 * ALL, from + 4 * ALL);
  } else {
    i64 stride = STRIDE ? STRIDE : rows.slot_stride;
    to += skew;
#pragma unroll 1
    for (int row = lane; row < TILE; row += 32) {
      bool live = WHOLE || slots.live(slot + row);
#pragma unroll
      for (int i = 0; i < S::COUNT; ++i) {
        if (S::SIZE == 4) store_shared(to + row * S::BYTES + 4 * i, live ? ((const u32*)(from + row * stride))[i] : 0u);
        else store_shared_u16(to + row * S::BYTES + 2 * i, live ? ((const u16*)(from + row * stride))[i] : 0u);
      }
    }
  }
}

// of slot 16 i + 8 half + g in scales[i][half]
template <class S>
INLINE void load_scales(S (&scales)[TILE / 16][2], u32 at, int g) {
#pragma unroll
  for (int i = 0; i < TILE / 8; ++i) scales[i / 2][i % 2].load(at + (8 * i + g) * S::BYTES);
}
