// What Hopper's prefill kernels share: which tiles a block takes, masks in shared memory, caps, the running softmax.
// Each 64 rows of a tile hold 64 / PACK positions. Where heads share a tile, 8 positions of one head are followed by the same 8 of
// the next, so that a thread's two rows are two heads at one position: what it reads of a mask serves both.
// They define GUESSES too: weights are made before maxima are looked for; and SEEDED: scores come with the mask added, of floats
// in units of exponents of e.
#pragma once
#include "hopper.cuh"
// Not where tiles are parts of a block, or blocks of a tile: then neighbours have blocks in common, which L2 serves faster. Nor where
// boxes, of masks and pages, have places of their own, or copies of what a sequence does not have are zeros only up to a multiple
// of KEYS.
constexpr bool UNEVEN = KEYS % (ROWS / PACK) && ROWS / PACK % KEYS;
constexpr bool SHIFTS = UNEVEN && MASK == 0 && K_PAGED == 0 && V_PAGED == 0 && RAGGED == CLEARS;
#include "prefill.cuh"

constexpr bool SCALED = SEEDED && MASK > 1;  // q, and so scores
constexpr bool BOUNDED = SOFTCAP == 2;  // scores are so small that exponents need no reference
constexpr bool TRUSTS = BOUNDED && MASK == 0 && !ANY_SCALE && DV <= 128;  // sums tell whether scores are within half the cap
constexpr int TURN = 64 / PACK;         // positions of each 64 rows
constexpr int RUN = PACK > 1 ? 8 : 64;  // of a box of q

// Every warp begins so: barriers have been made, what earlier kernels wrote is seen. It finds its first tile meanwhile, which takes
// a thousand cycles, if that takes no memory.
INLINE void begin() {
  asm volatile("bar.sync 0;" ::: "memory");
  wait_for_earlier_kernels();
}
template <class F>
INLINE void begin_with(F find) {
  if (RAGGED || MAPPED) begin();
  find();
  if (!RAGGED && !MAPPED) begin();
}

// f(tile) of each tile of a block. The host starts as many blocks as run at a time: loads of a tile run beside the end of
// the one before. Every other round goes backwards: tiles get shorter.
template <class F>
INLINE void each_tile(const Prefill& p, F f) {
  int all = p.pairs * (p.groups / PACK) * p.tiles, many = gridDim.x, mine = blockIdx.x, first = 0;
  Tile tile;
  begin_with([&] { tile = Tile(p, mine); });
  while (true) {
    if (!tile.leaves_results(p)) f(tile);
    first += many, mine = many - 1 - mine;
    if (first + mine >= all) return;
    tile = Tile(p, first + mine);
  }
}

// f(tile, look_ahead): it calls look_ahead() once, while it waits for something.
template <class F>
INLINE void each_tile_ahead(const Prefill& p, F f) {
  int all = p.pairs * (p.groups / PACK) * p.tiles, many = gridDim.x, mine = blockIdx.x, first = 0;
  Tile tile, next;
  bool found;
  auto look_ahead = [&] {
    for (found = false; first + mine < all && !found; first += many, mine = many - 1 - mine)
      next = Tile(p, first + mine), found = !next.leaves_results(p);
  };
  begin_with(look_ahead);
  while (found) {
    tile = next;
    f(tile, look_ahead);
  }
}

// x[i] of thread t of a quad becomes x[t] of its thread i
INLINE void turn_quad(u32 (&x)[4], int t) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    bool upper = t & step;
    const int other = 3 - step;  // pairs (i, i + step) trade places
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      int i = n * other;
      u32 sent = __shfl_xor_sync(~0u, upper ? x[i] : x[i + step], step);
      if (upper) x[i] = sent;
      else x[i + step] = sent;
    }
  }
}

// Among 64 rows: the head and the position of row 8 * eight.
INLINE int head_of(int eight) { return eight % PACK; }
INLINE int position_of(int eight) { return eight / PACK * 8; }

INLINE Rows rows_of(const Tile& tile, int sixtyfour, int warp, int lane) {
  Rows found;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    found.head[r] = tile.head + head_of(2 * warp + r);
    found.row[r] = tile.row + sixtyfour * TURN + position_of(PACK > 1 ? 2 * warp : 2 * warp + r) + lane / 4;
  }
  return found;
}

// 64 rows of q: chunks of 64 dims
INLINE void load_queries(u32 to, const TensorMap* map, const Tile& tile, int sixtyfour, u32 full) {
  for (int i = 0; i < DK / 64; ++i)
    for (int first = 0; first < TURN; first += RUN)
      load_box(to + i * 8192 + first * PACK * 128, map, i * 64, tile.token(tile.row + sixtyfour * TURN + first), tile.head,
               tile.batch_of_rows(), full);
}

// A row of the output from column `first` on, by a quad of threads: value(4 j + 2 r + i) is column 8 j + 2 t + i of thread t's.
// Of 16 bits, four threads trade columns, so that each writes 16 bytes: a store costs as much as the rows that it touches.
template <int COLUMNS, class F>
INLINE void write_row(const Prefill& p, const Tile& tile, const Rows& rows, int r, int first, int t, float before, F value) {
  bool here = tile.has(p, rows.row[r]);
  i64 at = tile.batch_of_rows() * p.out_batch + rows.head[r] * p.out_head + (i64)tile.token(rows.row[r]) * p.out_token + first;
  if constexpr (OUT_TYPE == 2) {
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
      int column = 8 * j + 2 * t;
      if (here && first + column < p.dv) store(p, at + column, value(4 * j + 2 * r), value(4 * j + 2 * r + 1), before);
    }
  } else {
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j += 4) {
      u32 x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float a = value(4 * (j + e) + 2 * r), b = value(4 * (j + e) + 2 * r + 1);
        x[e] = OUT_TYPE == 1 ? bf16x2(a, b) : f16x2(a, b);
      }
      turn_quad(x, t);
      int column = 8 * (j + t);
      if (here && first + column < p.dv) *(uint4*)((u16*)p.out + at + column) = make_uint4(x[0], x[1], x[2], x[3]);
    }
  }
}

// Results of tokens that have no row, because their sequence has more than q_len. By 128 threads.
INLINE void spoil(const Prefill& p, const Tile& tile) {
  if (!BEHIND || tile.row > 0) return;
  for (i64 token = max((i64)tile.q_shift + tile.begin_row, 0LL); token < min((i64)tile.q_shift, p.tokens); ++token)
    for (int head = tile.head; head < tile.head + PACK; ++head) {
      i64 at = head * p.out_head + token * p.out_token;
      for (int c = threadIdx.x % 128; c < p.dv; c += 128) {
        if (OUT_TYPE == 2) ((float*)p.out)[at + c] = NO_NUMBER;
        else ((u16*)p.out)[at + c] = 0x7FFF;
      }
      if (threadIdx.x % 128 == 0) p.lse[head * p.lse_head + token] = NO_NUMBER;
    }
}

// A mask's tile in shared memory, as stored: rows of PITCH bytes, part c (16 bytes; 32 of floats, of which a quad of threads reads
// 32) of row r at c ^ r, within 128 bytes; of boxes, 128 bytes of all rows (of floats 32, in order) come before the next (NEXT
// bytes apart). Heads that share a mask share its rows. Where every row of a tile has its own (APART), each 64 rows are a tile of
// the mask, that a warpgroup releases when it has looked, whatever the others do.
struct MaskTile {
  static constexpr bool APART = HEAD_MASK || PACK == 1;
  static constexpr int PARTS = APART ? ROWS / 64 : 1;  // of a block of keys
  static constexpr int SIZE = MASK == 1 ? 1 : MASK == 2 ? 4 : 2, WIDTH = KEYS * SIZE > 128 ? KEYS * SIZE : 128;
  static constexpr int COUNT = APART ? 64 : POSITIONS, BYTES = COUNT * WIDTH;
  static constexpr int PART = SIZE == 4 ? 32 : 16;
  static constexpr bool IN_ORDER = MASK_BOXES && SIZE == 4;  // four rows of 32 bytes are all banks
  static constexpr int PITCH = IN_ORDER ? 32 : MASK_BOXES ? 128 : WIDTH, NEXT = MASK_BOXES ? COUNT * PITCH : 128;

  INLINE static u32 place(int row, int byte) { return row * PITCH + (IN_ORDER ? byte : byte ^ row % (128 / PART) * PART); }
};

// Their ring of MASK_STAGES: 64 threads arrive at a barrier ``full`` of a stage, a lane of each warp that reads at ``empty``.
using MaskRing = Ring<MASK ? MASK_STAGES : 1>;

// 64 threads copy tiles of the mask to shared memory: asynchronously, 16 bytes at a time or 4, where all strides are such.
struct MaskLoader {
  static constexpr int SIZE = MaskTile::SIZE, ROW = KEYS * SIZE;  // row: bytes
  static constexpr int MANY = HEAD_MASK ? TURN : MaskTile::COUNT;  // rows of one head that follow each other
  const Prefill& p;
  const char* from;
  i64 token, key;  // bytes
  int rows, thread;
  bool by16, by4;

  INLINE MaskLoader(const Prefill& p, const Tile& tile, int thread)
      : p(p), token(p.mask_token * SIZE), key(p.mask_key * SIZE), rows(p.q_len - tile.row), thread(thread) {
    from = p.mask + (tile.batch * p.mask_batch + tile.head * p.mask_head) * SIZE + tile.row * token;
    i64 bits = (i64)p.mask | (p.mask_batch | p.mask_head | p.mask_token) * SIZE;
    by16 = key == SIZE && bits % 16 == 0, by4 = key == SIZE && bits % 4 == 0;
  }
  // f(where a part of a row comes from, from there to that of the thread's next row, where to, row, rows, step of rows, byte in
  // the row, bytes up to the last key)
  template <int PART, class F>
  INLINE void each(u32 to, int block, int first, F f) const {
    constexpr int PARTS = ROW / PART, STEP = PARTS < 64 ? 64 / PARTS : 1;
    for (int byte = thread % PARTS * PART; byte < ROW; byte += 64 * PART) {
      int row = PARTS < 64 ? thread / PARTS : 0, left = (p.kv_len - block * KEYS) * SIZE - byte;
      for (int span = 0; span < MaskTile::COUNT; span += MANY) {
        const char* at = from + (first + row) * token + (block * KEYS + byte / SIZE) * key;
        if (HEAD_MASK) at += span / TURN * p.mask_head * SIZE;
        f(at, STEP * token, to + span * MaskTile::PITCH, row, min(MANY, rows - first), STEP, byte, left);
      }
    }
  }
  template <int PART>
  INLINE void copy(u32 to, int block, int first) const {
    each<PART>(to, block, first, [&](const char* at, i64 next, u32 to, int row, int end, int step, int byte, int left) {
      int bytes = min(max(left, 0), PART);
#pragma unroll 4
      for (; row < end; row += step, at += next) copy_async_first<PART>(to + MaskTile::place(row, byte), at, bytes);
    });
  }
  // 4 bytes of a row, of which the first are to be read
  template <bool DENSE>
  INLINE u32 word(const char* at, int bytes) const {
    if (DENSE) {
      int shift = (int)(i64)at & 3;
      const u32* words = (const u32*)(at - shift);
      u32 low = bytes > 0 ? words[0] : 0, high = bytes > 0 && shift + bytes > 4 ? words[1] : 0;
      return __funnelshift_r(low, high, 8 * shift);
    }
    u32 x = 0;
#pragma unroll
    for (int i = 0; i < 4; i += SIZE, at += key)
      if (i < bytes) x |= (SIZE == 1 ? *(const u8*)at : SIZE == 2 ? *(const u16*)at : *(const u32*)at) << 8 * i;
    return x;
  }
  template <bool DENSE>
  INLINE void copy_words(u32 to, int block, int first) const {
    constexpr int LOADS = 8;  // under way
    each<4>(to, block, first, [&](const char* at, i64 next, u32 to, int row, int end, int step, int byte, int left) {
      for (; row < end; row += LOADS * step) {
        u32 x[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i, at += next) x[i] = word<DENSE>(at, row + i * step < end ? min(left, 4) : 0);
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
          if (row + i * step < end) store_shared(to + MaskTile::place(row + i * step, byte), x[i]);
      }
    });
  }
  // rows of a tile of the mask, from row ``first`` of a tile on
  INLINE void load(u32 to, int block, int first, u32 full) const {
    if (by16) copy<16>(to, block, first);
    else if (by4) copy<4>(to, block, first);
    else if (SIZE < 4 && key == SIZE) copy_words<true>(to, block, first);
    else copy_words<false>(to, block, first);
    if (by4) arrive_after_copies(full);
    else arrive(full);
  }
};

// All that are looked at. to: the first stage; full, empty: its barriers. Boxes of PITCH bytes and all rows of a tile are asked
// for by one thread.
INLINE void load_mask(const Prefill& p, const TensorMap* map, u32 to, u32 full, u32 empty) {
  constexpr int BOX = MaskTile::PITCH;
  MaskRing ring;
  each_tile(p, [&](const Tile& tile) {
    const MaskLoader loader(p, tile, threadIdx.x % 64);
    int head = p.mask_head ? tile.head : 0, batch = p.mask_batch ? tile.batch : 0;
    for (int block = tile.block; block >= 0; block = tile.seen(block - 1)) {
      if (!tile.masked(block)) continue;
      for (int part = 0; part < MaskTile::PARTS; ++part, ring.advance()) {
        u32 at = to + ring.stage * MaskTile::BYTES, here = full + 8 * ring.stage;
        wait(empty + 8 * ring.stage, ring.parity ^ 1);
        if constexpr (!MASK_BOXES) {
          loader.load(at, block, part * TURN, here);
        } else if (threadIdx.x == 64) {
          arrive_expect(here, MaskTile::BYTES);
          for (int i = 0; i < MaskTile::WIDTH / BOX; ++i)
            load_box(at + i * MaskTile::NEXT, map, block * KEYS + i * (BOX / MaskTile::SIZE), tile.row + part * TURN, head, batch,
                     here);
        }
      }
    }
  });
}

// What a thread reads of a mask's tile, for its two rows. A value of -65504 or less means "masked". Added as it is, it hides a key
// from a row that has a score above LOW (a power of 2); other rows are looked at again. (A score of 64,000 it would not hide.)
struct Mask {
  static constexpr bool AGAIN = MASK > 1 && !ALIBI, COMMON = PACK > 1 && !HEAD_MASK;
  static constexpr int SIZE = MaskTile::SIZE, WORDS = MASK == 2 ? 2 : 1;
  static constexpr int OWN = COMMON ? 1 : 2, STEP = COMMON && SIZE == 2 ? 2 : 1;  // rows that differ; units of a read
  static constexpr float LOW = -1000.0f, LEAST = -65504.0f;
  using Value = typename Choose<MASK == 1, u32, float>::type;
  using Words = u32[2 * STEP][OWN][WORDS];
  MaskRing ring;
  u32 at, full, empty;  // at: 16-bit values come by matrices: of a lane's row there; else of the thread's first row
  u32 from;             // the same in the tile at hand
  Words first;          // its first units
  float factor[2];      // of values, to the unit of scores

  INLINE Mask(u32 to, u32 full, u32 empty, int sixtyfour, int warp, int lane) : full(full), empty(empty) {
    auto row = [=](int r) {
      int eight = 2 * warp + r, position = position_of(eight);
      return (HEAD_MASK ? head_of(eight) * TURN : MaskTile::APART ? 0 : sixtyfour * TURN) + position;
    };
    if (MaskTile::APART) ring.advance(sixtyfour);
    if (SIZE == 2) at = to + MaskTile::place(row(COMMON ? 0 : lane / 8 % 2) + lane % 8, lane / (COMMON ? 8 : 16) * 16);
    else at = to + MaskTile::place(row(0) + lane / 4, lane % 4 * 2 * SIZE);
  }
  INLINE void start(const Prefill& p, const Rows& rows) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      factor[r] = (ALIBI ? p.slopes[rows.head[r]] : 1.0f) * (SOFTCAP ? LOG2E : 1.0f / (ANY_SCALE ? 1.0f : p.scale));
  }
  INLINE void fetch() {  // before look or seed: waits for a tile, and reads what there are registers for
    wait(full + 8 * ring.stage, ring.parity);
    asm volatile("mov.u32 %0, %1;" : "=r"(from) : "r"(at + ring.stage * MaskTile::BYTES));  // made once, not for every read
    if (!SEEDED) read(0, first);
  }
  INLINE void seed(float (&s)[SCORES]) {  // what is added to scores that are 0, there and then: the compiler would select 64 times
    each<false>(s, [&](Value y, int, float& score) {
      float x = 0.0f;
      if constexpr (MASK == 1) hide_zero(y, x);
      else x = y;
      asm volatile("mov.f32 %0, %1;" : "=f"(score) : "f"(x));
    });
  }
  INLINE void look(float (&s)[SCORES]) {
    each<true>(s, [&](Value y, int r, float& score) {
      if constexpr (MASK == 1) hide_zero(y, score);
      else score = __fmaf_rn(!AGAIN && y <= LEAST ? -INFINITE : y, factor[r], score);
    });
  }
  // May a value that means "masked" count, among keys of row r whose largest score is ``most``?
  INLINE static bool counts(float most, float top) { return AGAIN && most > -INFINITE && fmaxf(most, top) < LOW; }
  INLINE void hide(float (&s)[SCORES]) {
    each<false>(s, [&](Value y, int, float& score) { score = y <= LEAST ? -INFINITE : score; });
  }
  INLINE void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(empty + 8 * ring.stage);
    ring.advance(MaskTile::PARTS);
  }

 private:
  template <bool FETCHED, class F>
  INLINE void each(float (&s)[SCORES], F f) {  // f(value, row, its score)
#pragma unroll
    for (int unit = 0; unit < UNITS; unit += STEP) {
      Words own;
      const bool here = FETCHED && unit == 0;
      if (!here) read(unit, own);
      const Words& x = here ? first : own;
#pragma unroll
      for (int i = 0; i < 2 * STEP * 4; ++i) {
        int j = i / 4, r = i / 2 % 2;
        f(value(x[j][r % OWN], i % 2), r, s[8 * unit + i]);
      }
    }
  }
  INLINE static Value value(const u32 (&x)[WORDS], int e) {
    if constexpr (MASK == 1) return x[0] & 0xFF << 8 * e;
    else if constexpr (MASK == 2) return __uint_as_float(x[e % WORDS]);
    else if constexpr (MASK == 3) return f32_of_f16(x[0] >> 16 * e);
    else return __uint_as_float(e ? x[0] & 0xFFFF0000u : x[0] << 16);
  }
  // keys 16 unit + 8 j + 2 t (+ 1) of the rows: x[j][r]
  INLINE void read(int unit, Words& x) const {
    if constexpr (SIZE == 2) {
      u32 y[4];
      load_matrices((from ^ unit % 4 << 5) + unit / 4 * MaskTile::NEXT, y);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i / OWN][i % OWN][0] = y[i];
    } else {
      constexpr int APART = (PACK > 1 ? TURN : 8) * MaskTile::PITCH;  // the thread's rows
#pragma unroll
      for (int i = 0; i < 2 * OWN; ++i) {
        int j = i / OWN, r = i % OWN, part = 2 * unit + j;
        if (MASK == 1) x[j][r][0] = load_shared_u16((from ^ unit << 4) + r * APART + 8 * j);
        else load_shared<WORDS>((MaskTile::IN_ORDER ? from + part * MaskTile::NEXT : from ^ part << 5) + r * APART, x[j][r]);
      }
    }
  }
};

// c tanh(x / c) of scores, in powers of 2. While those of a warp are within c / 2 it is x times a polynomial of x^2 (largest error
// 5e-6 c and 1.3e-7 c: the least there is); else it takes exponentials. Up to 64 values of V, where maxima are what takes longest,
// SUMMED scores are within if their sum of squares is.
struct Cap {
  static constexpr int SUMMED = DV == 64 ? 8 : 1;
  static constexpr int DEGREE = BOUNDED ? 2 : 3;
  static constexpr float TERMS[2][4] = {{0.99992484f, -0.33085483f, 0.11254052f},
                                        {0.99999768f, -0.33320653f, 0.13145135f, -0.04337221f}};
  float cap, limit, twice, terms[DEGREE + 1];
  // TRUSTS: sums that a thread's weights of a row have only if no score is above half the cap, and those below count for nothing:
  // less than 2^-12 of them all. The polynomial grows with x, wherever x is.
  float least, most;

  INLINE Cap(const Prefill& p) {
    float inverse = (ANY_SCALE ? 1.0f : p.scale) / p.softcap, power = inverse;
    cap = LOG2E * p.softcap, twice = 2.0f * LOG2E * inverse;
    float half = 0.5f / inverse;
    limit = inverse > 1e-4f && inverse < 1e4f ? SUMMED > 1 ? half * half : half : -1.0f;  // powers stay finite
#pragma unroll
    for (int i = 0; i <= DEGREE; ++i, power *= inverse * inverse) terms[i] = TERMS[DEGREE - 2][i] * cap * power;
    most = exp2_fast(0.462f * cap), least = (float)(KEYS / 4 << 12) / most;  // 0.462: tanh(1 / 2)
  }
  INLINE float polynomial(float x) const {
    float w = x * x, y = terms[DEGREE];
#pragma unroll
    for (int n = DEGREE - 1; n >= 0; --n) y = __fmaf_rn(y, w, terms[n]);
    return x * y;
  }
  INLINE bool within(const float (&s)[SCORES]) const {  // all scores of the warp
    float most[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < SCORES; i += SUMMED) {
      float x = SUMMED > 1 ? s[i] * s[i] : fabsf(s[i]);
#pragma unroll
      for (int j = 1; j < SUMMED; ++j) x = __fmaf_rn(s[i + j], s[i + j], x);
      most[i / SUMMED % 2] = fmaxf(most[i / SUMMED % 2], x);
    }
    return __all_sync(~0u, fmaxf(most[0], most[1]) <= limit);
  }
  INLINE void apply(float (&s)[SCORES]) const {
    if (within(s)) {
#pragma unroll
      for (int i = 0; i < SCORES; ++i) s[i] = polynomial(s[i]);
    } else {
#pragma unroll
      for (int i = 0; i < SCORES; ++i) {  // tanh(x) = 1 - 2 / (exp(2 x) + 1)
        float x = s[i];
        s[i] = copysignf(__fmaf_rn(-2.0f * cap, inverse_fast(exp2_fast(fabsf(x * twice)) + 1.0f), cap), x);
      }
    }
  }
};

// of a thread's two rows, g and g + 8 of its warp's 16
struct Softmax : Sums {
  float limit[2] = {-INFINITE, -INFINITE};  // references are looked at where a maximum passes this
  // With GUESSES instead, where a thread's sum of weights of a block passes MOST. blind: no row of the warp has seen a key;
  // low: in one of them a value that means "masked" may count.
  static constexpr float MOST = 256.0f;
  static constexpr bool ALONE = GUESSES || TRUSTS;  // own: a block's sums by themselves
  float own[2];
  // settled: in none of them may one count.
  bool blind = true, low = false, settled = !Mask::AGAIN;

  INLINE static float unit(const Prefill& p) {  // log2 of e to a score, once capped
    return SOFTCAP ? 1.0f : (ANY_SCALE || SCALED ? 1.0f : p.scale) * LOG2E;
  }

  // Scores of a block, of which unit(p) are a power of 2: what is added and hidden. masked: is its mask to be looked at?
  template <class F>
  INLINE void take(float (&s)[SCORES], const Prefill& p, Mask& mask, bool masked, F hide) {
    if constexpr (ANY_SCALE) {
#pragma unroll
      for (int i = 0; i < SCORES; ++i) s[i] *= p.scale;
    }
    if constexpr (SOFTCAP) Cap(p).apply(s);
    if constexpr (MASK > 0)
      if (masked) mask.look(s);
    hide();
  }
  // Maxima, and what they make of the references. That of a row depends on no other row, though the warp looks at all of them.
  INLINE void refer(float (&s)[SCORES], const Prefill& p, Mask& mask, bool masked) {
    if constexpr (BOUNDED) {
      top[0] = top[1] = 0.0f, factor[0] = factor[1] = 1.0f, grown = false;
      return;
    }
    float x[2] = {most(s, p, 0), most(s, p, 1)};
    grown = GUESSES || __any_sync(~0u, x[0] > limit[0] || x[1] > limit[1]);
    if (grown) {
      if constexpr (Mask::AGAIN) {
        if (masked && __any_sync(~0u, Mask::counts(x[0], top[0]) || Mask::counts(x[1], top[1]))) {
          mask.hide(s);
          x[0] = most(s, p, 0), x[1] = most(s, p, 1);
        }
      }
      most_of_quads(x);
      if (GUESSES && !blind) most_of_quads(own);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        raise(r, x[r], GUESSES ? blind || own[r] > MOST ? 0.0f : INFINITE : SLACK);
        limit[r] = Mask::AGAIN && top[r] < Mask::LOW ? -INFINITE : top[r] + SLACK;
      }
      blind = __all_sync(~0u, fmaxf(top[0], top[1]) == NOTHING);
      low = Mask::AGAIN && __any_sync(~0u, is_low(0) || is_low(1));
      settled = !Mask::AGAIN || __all_sync(~0u, fminf(top[0], top[1]) >= Mask::LOW);
    }
  }
  INLINE bool is_low(int r) const { return top[r] < Mask::LOW && top[r] > NOTHING; }
  template <class F>
  INLINE void weigh(u32 (&w)[UNITS][4], F make) {  // make(unit, its weights)
    float before[2] = {total[0], total[1]};
    if (ALONE) total[0] = total[1] = -0.0f;  // what added to it takes no instruction
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) make(unit, w[unit]);
    if (ALONE) {
#pragma unroll
      for (int r = 0; r < 2; ++r) own[r] = total[r], total[r] = before[r];
    }
  }
  INLINE void weigh(const float (&s)[SCORES], float scale, u32 (&w)[UNITS][4]) {
    weigh(w, [&](int unit, u32 (&w)[4]) { weights(s, unit, scale, w); });
  }
  // Weights of scores that were not taken. Whether these are small is seen by sums, which are there anyway; else they are capped.
  INLINE void weigh_small(float (&s)[SCORES], const Prefill& p, u32 (&w)[UNITS][4]) {
    const Cap cap(p);
    if (cap.least < cap.most) {
      weigh(w, [&](int unit, u32 (&w)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float x[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) x[e] = exp2_fast(cap.polynomial(s[8 * unit + 2 * i + e]));
          w[i] = add(i % 2, x[0], x[1]);
        }
      });
      if (__all_sync(~0u, fminf(own[0], own[1]) >= cap.least && fmaxf(own[0], own[1]) <= cap.most)) return;
    }
    cap.apply(s);
    weigh(s, 1.0f, w);
  }
  INLINE void count() {  // the same sums in whichever way a block went
    if (ALONE) total[0] += own[0], total[1] += own[1];
  }
  // Weights by the references from before; false, and nothing is counted, where sums tell that they may be too low. Sums are
  // there anyway, maxima take an instruction per key.
  INLINE bool guess(const float (&s)[SCORES], float scale, u32 (&w)[UNITS][4]) {
    if (blind) return false;
    weigh(s, scale, w);
    bool right = __all_sync(~0u, fmaxf(own[0], own[1]) <= MOST) && !low;
    if (right) count();
    return right;
  }
  INLINE static float most(const float (&s)[SCORES], const Prefill& p, int r) {  // of a thread's keys of a row, log2
    float x = s[2 * r];
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j) x = fmaxf(x, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
    return x * unit(p);
  }

  // weights of 16 keys: two of a row in each of 4 registers
  INLINE void weights(const float (&s)[SCORES], int unit, float scale, u32 (&w)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float y = s[8 * unit + 2 * i + e];
        x[e] = exp2_fast(BOUNDED ? y : SOFTCAP ? y - top[i % 2] : __fmaf_rn(y, scale, -top[i % 2]));
      }
      w[i] = add(i % 2, x[0], x[1]);
    }
  }
};
