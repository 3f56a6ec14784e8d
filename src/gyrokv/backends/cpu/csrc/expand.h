// Stored rows to plain elements in the order of the head (int8, bfloat16 or float32), and these to lines of panels (see
// panels.h).
#pragma once
#include <algorithm>
#include <optional>

#include "core.h"
#include "simd.h"

namespace gyrokv {
namespace GYROKV_ISA {

// What a format is multiplied as.
enum Element : int { INT8, BFLOAT, FLOAT };
INLINE Element element_of(const Format& f) {
    if (f.kind == CODES) return INT8;
    if (BFLOAT_DOT && (f.kind == BF16 || f.kind == FP8_E4M3)) return BFLOAT;
    return FLOAT;
}
INLINE int size_of(Element e) { return e == INT8 ? 1 : e == BFLOAT ? 2 : 4; }
INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

constexpr int LARGEST_LEVEL = 10837;  // of words, a third of the largest one of two planes

// The table of each plane as panels store it: as many repetitions as fill 256 entries. And words of levels, see quads.h.
struct Tables {
    alignas(64) uint8_t plane[2][256];
    alignas(64) int16_t words[64];          // by codes of up to 6 bits
    alignas(64) uint8_t word_half[2][128];  // the low and the high bytes by the lower half of codes of 8 bits; no low one is 0
    float word_factor = 1.0f;               // levels are words times this
    explicit Tables(const Format& f) {
        if (f.kind != CODES) return;
        for (int p = 0; p < 2; ++p)
            for (int i = 0; i < 256; ++i) plane[p][i] = uint8_t(f.table[p][i & ((1 << f.bits) - 1)]) ^ uint8_t(ZERO);
        if (f.planes == 2 || f.bits <= 4) make_words(f);
    }

   private:
    void make_words(const Format& f) {
        auto level = [&](int i) { return f.planes == 2 ? f.table[1][i] * 256 + f.table[0][i] : f.table[0][i]; };
        int most = 0;
        for (int i = 0; i < 1 << f.bits; ++i) most = std::max(most, std::abs(level(i)));
        const int step = most > LARGEST_LEVEL ? 3 : 1;
        word_factor = float(step);
        for (int i = 0; i < 1 << std::min(f.bits, 7); ++i) {
            const int size = (std::abs(level(i)) + step / 2) / step, word = level(i) < 0 ? -size : size;
            if (i < 64) words[i] = int16_t(word);
            const int known = word & 255 ? word : word + 1;
            word_half[0][i] = uint8_t(known), word_half[1][i] = uint8_t(known >> 8);
        }
        for (int i = 1 << f.bits; i < 64; ++i) words[i] = words[i & ((1 << f.bits) - 1)];
    }
};

// Those of K (side 0) or V (1), made once while a thread's calls have the same format.
INLINE const Tables& tables_of(const Format& f, int side) {
    struct Known {
        Format format;
        Tables tables;
    };
    static thread_local std::optional<Known> known[2];
    std::optional<Known>& own = known[side];
    if (!own || std::memcmp(&own->format, &f, sizeof f)) own.emplace(Known{f, Tables(f)});
    return own->tables;
}

// Rows that are `stride` bytes apart, to rows of plain bytes.
struct Span {
    const char* from;
    int64_t from_stride;
    uint8_t* to;
    int64_t to_stride;
    int count;
};

// `bytes` of one field of each row, from word `first` on: `width` bits of each of 16 * words / width values, ored at bit
// `low` into the codes (set when low is 0). Word i holds values i, i + words, ... With `entries` the table's values are
// written instead.
template <int bytes, int width, int low, int entries>
INLINE void unpack_part(const Span& rows, int words, int first, const uint8_t* table) {
    using B = vec<uint8_t, bytes>;
    using H = vec<uint8_t, bytes / 2>;
    constexpr uint16_t mask = uint16_t(((1 << width) - 1) * 0x0101);
    const char* from = rows.from + 2 * first;
    uint8_t* to = rows.to + first;
    for (int t = 0; t < rows.count; ++t, from += rows.from_stride, to += rows.to_stride) {
        const auto x = load<vec<uint16_t, bytes>>(from);
        for (int s = 0; s < 8 / width; ++s) {
            B code = (B)(shift_right(x, s * width) & mask);
            if constexpr (entries > 0) code = lookup<entries, bytes>(code, table);
            code = shuffle<[](int i) constexpr { return i < bytes / 2 ? 2 * i : 2 * i - bytes + 1; }>(code, code);
            uint8_t *even = to + s * words, *odd = even + 8 / width * words;
            H a = half<0, uint8_t, bytes>(code), b = half<1, uint8_t, bytes>(code);
            if constexpr (low > 0) {
                a = load<H>(even) | shift_left(a, low);
                b = load<H>(odd) | shift_left(b, low);
            }
            store(even, a);
            store(odd, b);
        }
    }
}
template <int width, int low, int entries>
INLINE void unpack_field(const Span& rows, int words, const uint8_t* table) {
    int i = 0;
    if constexpr (LINE >= 64)
        for (; i + 32 <= words; i += 32) unpack_part<64, width, low, entries>(rows, words, i, table);
    if constexpr (LINE >= 32)
        for (; i + 16 <= words; i += 16) unpack_part<32, width, low, entries>(rows, words, i, table);
    for (; i + 8 <= words; i += 8) unpack_part<16, width, low, entries>(rows, words, i, table);
    for (; i < words; ++i)
        for (int t = 0; t < rows.count; ++t)
            for (int k = 0; k < 16 / width; ++k) {
                uint16_t word;
                std::memcpy(&word, rows.from + t * rows.from_stride + 2 * i, 2);
                uint8_t code = word >> (k * width) & ((1 << width) - 1);
                if constexpr (entries > 0) code = table[code];
                uint8_t* place = rows.to + t * rows.to_stride + k * words + i;
                *place = low ? *place | code << low : code;
            }
}

// Rows of codes to their planes, which are `plane` bytes apart. Reads only the rows; writes whole lines.
template <int bits>
INLINE void unpack_rows(const Format& f, const Tables& tables, Span rows, int64_t plane) {
    constexpr int entries = bits <= 4 ? 16 : bits <= 6 ? 64 : 256;
    const int dim = f.dim;
    if (bits == 8 && f.linear) {
        unpack_field<8, 0, 0>(rows, dim / 2, nullptr);
        if constexpr (ZERO == 0)
            for (int t = 0; t < rows.count; ++t)
                for (int i = 0; i < dim; i += 16) {
                    uint8_t* at = rows.to + t * rows.to_stride + i;
                    store(at, load<vec<uint8_t, 16>>(at) ^ 0x80);
                }
    } else if constexpr ((bits & (bits - 1)) == 0) {
        uint8_t* to = rows.to;
        for (int p = 0; p < f.planes; ++p) {
            rows.to = to + p * plane;
            unpack_field<bits, 0, entries>(rows, dim * bits / 16, tables.plane[p]);
        }
    } else {
        constexpr int wide = bits & 4 ? 4 : 2, next = bits & 2 && wide != 2 ? 2 : 1;
        unpack_field<wide, 0, 0>(rows, dim * wide / 16, nullptr);
        rows.from += dim * wide / 8;
        unpack_field<next, wide, 0>(rows, dim * next / 16, nullptr);
        rows.from += dim * next / 8;
        if constexpr (bits == 7) unpack_field<1, 6, 0>(rows, dim / 16, nullptr);
        for (int t = 0; t < rows.count; ++t)
            for (int i = 0; i < dim; i += LINE) {
                uint8_t* at = rows.to + t * rows.to_stride + i;
                const line code = load<line>(at);
                for (int p = 0; p < f.planes; ++p) store(at + p * plane, lookup<entries, LINE>(code, tables.plane[p]));
            }
    }
}

inline void unpack_codes(const Format& f, const Tables& tables, const Span& rows, int64_t plane) {
#define GYROKV_UNPACK(bits) \
    case bits: return unpack_rows<bits>(f, tables, rows, plane)
    switch (f.bits) {
        GYROKV_UNPACK(1);
        GYROKV_UNPACK(2);
        GYROKV_UNPACK(3);
        GYROKV_UNPACK(4);
        GYROKV_UNPACK(5);
        GYROKV_UNPACK(6);
        GYROKV_UNPACK(7);
        GYROKV_UNPACK(8);
    }
#undef GYROKV_UNPACK
}

INLINE int size_of_kind(int kind) { return kind == F32 ? 4 : kind == FP8_E4M3 ? 1 : 2; }

// LANES values of a F32, F16 or BF16 row of `dim` from index i on, zeros after its end. Reads only the row.
template <int kind>
INLINE vf load_values(const char* row, int i, int dim) {
    constexpr int size = kind == F32 ? 4 : 2;
    alignas(64) char tail[LINE];
    const char* from = row + i * size;
    if (i + LANES > dim) {
        std::memset(tail, 0, LINE);
        if (i < dim) std::memcpy(tail, from, (dim - i) * size);
        from = tail;
    }
    if constexpr (kind == F32) return load<vf>(from);
    if constexpr (kind == F16) return half_to_float(from);
    return bfloat_to_float(from);
}
INLINE vf load_values(int kind, const char* row, int i, int dim) {
    return kind == F32 ? load_values<F32>(row, i, dim) : kind == F16 ? load_values<F16>(row, i, dim) : load_values<BF16>(row, i, dim);
}

// A dense row times `factor` as bfloat16 or float32, with zeros up to whole lines.
template <int kind, Element e>
INLINE void convert_values(int dim, const char* row, char* to, float factor = 1.0f) {
    const int padded = int(round_up(int64_t(dim) * size_of(e), LINE)) / size_of(e);
    for (int i = 0; i < padded; i += LANES) {
        vf x = load_values<kind>(row, i, dim);
        if (factor != 1.0f) x *= factor;
        if constexpr (e == BFLOAT)
            store(to + 2 * i, to_bfloat(x));
        else
            store(to + 4 * i, x);
    }
}

// A dense or fp8 row as it is multiplied. Exact: rows become bfloat16 only if they have at most 8 significant bits.
INLINE void convert_row(const Format& f, const char* row, char* to) {
    constexpr Element short_row = BFLOAT_DOT ? BFLOAT : FLOAT;
    if (f.kind == F32) return convert_values<F32, FLOAT>(f.dim, row, to);
    if (f.kind == F16) return convert_values<F16, FLOAT>(f.dim, row, to);
    if (f.kind == BF16) return convert_values<BF16, short_row>(f.dim, row, to);
    const int words = f.dim / 2;
    auto each_value = [&](auto convert) {  // the second half after the first, whose last vector may run into it
        for (int odd = 0; odd < 2; ++odd)
            for (int i = 0; i < words; i += LINE / 2) {
                vec<uint16_t> w = {};
                if (i + LINE / 2 <= words)
                    w = load<vec<uint16_t>>(row + 2 * i);
                else
                    std::memcpy(&w, row + 2 * i, 2 * (words - i));
                convert(odd * words + i, odd ? w >> 8 : w & 0xff);
            }
    };
    alignas(64) uint16_t values[640 + LINE];
    if constexpr (BFLOAT_DOT) {
        each_value([&](int at, vec<uint16_t> code) { store(values + at, fp8_to_bfloat(code)); });
        const int64_t bytes = 2 * int64_t(f.dim);
        std::memcpy(to, values, bytes);
        std::memset(to + bytes, 0, round_up(bytes, LINE) - bytes);
    } else {
        each_value([&](int at, vec<uint16_t> code) { store(values + at, fp8_to_half(code)); });
        convert_values<F16, short_row>(f.dim, (const char*)values, to, 256.0f);
    }
}

// ROWS_AT_ONCE consecutive tokens as rows of plain elements, `stride` bytes apart; those from `count` on are zeros.
struct PlainRows {
    const char* first;
    int64_t stride, plane;  // bytes
};

constexpr int ROWS_AT_ONCE = 16;
constexpr int ROW_BYTES = 640 * 4 + 64;  // the longest plain row, of a padded head
INLINE int64_t plain_stride(const Format& f) { return round_up(int64_t(f.dim) * size_of(element_of(f)), LINE); }

INLINE int64_t row_bytes(const Format& f) {
    return f.kind == CODES ? int64_t(f.dim) * f.bits / 8 : int64_t(f.dim) * size_of_kind(f.kind);
}

#if defined(__AMX_INT8__)
constexpr bool MATRIX_UNIT = true;
// Tiles 0..3: C; 4: A; 7: B. With more than 16 rows C is 2 x 2 tiles, 5 the second A and 6 the second B; else C is 4
// panels wide, so that four sums run at a time either way.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// The tile instructions are opaque to the compiler, which does not see that they read memory.
INLINE void memory_barrier() { __asm__ volatile("" ::: "memory"); }

class MatrixUnit {
   public:
    ~MatrixUnit() { _tile_release(); }
    void configure(int rows, int depth) {  // depth: lines of B per tile, 8 or 16
        if (rows == rows_ && depth == depth_) return;
        rows_ = rows, depth_ = depth;
        TileConfig config;
        for (int i = 0; i < 8; ++i) {
            const bool second = rows > 16 && (i == 2 || i == 3 || i == 5);
            config.rows[i] = uint8_t(i >= 6 ? depth : second ? rows - 16 : std::min(rows, 16));
            config.bytes[i] = uint16_t(i == 4 || i == 5 ? 4 * depth : 64);
        }
        memory_barrier();
        _tile_loadconfig(&config);
    }

    // The unit sleeps when nothing was multiplied or stored for some 1000 cycles, and then takes 2000 to wake up.
    void keep_awake() {
        if (!rows_) return;  // not in use
        memory_barrier();
        _tile_dpbusd(0, 4, 6);
        _tile_stored(0, unread_, LINE);
    }
    // Between products that are never far away a product is enough. Overwrites tile 0.
    void nudge() {
        if (!rows_) return;
        memory_barrier();
        _tile_dpbusd(0, 4, 6);
    }

   private:
    int rows_ = 0, depth_ = 0;
    alignas(64) char unread_[16 * LINE];
};

#else
constexpr bool MATRIX_UNIT = false;
struct MatrixUnit {
    void keep_awake() {}
    void nudge() {}
};
#endif

constexpr int64_t CACHE_LINE = 64;

// Fetches rows a few cache lines at a time while others are computed with: a burst would wait for memory, and between bursts memory would
// wait. Lines of codes come from four pages in turns, because a core follows each page with a prefetcher of its own, and these have more
// lines on their way than its buffers hold; rows that are no codes, of which memory is slower than the core, come faster in order. Rows of
// K and of V do not take turns: where they lie in the same bank of memory, each turn would open another row of it.
class Ahead {
   public:
    Ahead() = default;
    Ahead(const Ahead&) = delete;
    Ahead& operator=(const Ahead&) = delete;

    // Begins anew: what is left comes at once.
    void start() {
        stop_ = end_, credit_ = ALL;
        fetch();
        now_ = stop_ = end_ = mark_ = stream_, rate_ = credit_ = 0;
    }
    struct Wanted {
        bool keys, values;  // else their scales only
    };
    // Adds `count` rows from the first one on, and their scales.
    void add(const Format& kf, const Rows& k, const Format& vf_, const Rows& v, int64_t first, int64_t count, Wanted wanted) {
        add_scales(kf, k, first, count), add_scales(vf_, v, first, count);
        if (wanted.keys) add_words(kf, k, first, count);
        if (wanted.values) add_words(vf_, v, first, count);
    }
    void add_words(const Format& f, const Rows& rows, int64_t first, int64_t count) {
        add_lines(rows.words, rows.word_strides[2], row_bytes(f), first, count, IN_ORDER && f.kind != CODES);
    }
    // What was added so far is to come before next().
    void mark() { mark_ = end_; }
    // All that was added is to come within `ticks` until next() and `later` after it.
    void until(int ticks, int later = 0) {
        later_ = later;
        rate_ = std::max(rate(lines_before(mark_), ticks), rate(lines_before(end_), ticks + later));
        stop_ = end_;
    }
    void next() {
        if (mark_ == stream_) return;
        stop_ = mark_, credit_ = ALL;
        fetch();
        stop_ = end_, mark_ = stream_, credit_ = 0, rate_ = rate(lines_before(end_), later_);
    }

    inline __attribute__((always_inline)) void tick(int weight = 1) {
        credit_ += rate_ * weight;
        if (credit_ >= 2 * PARTS * ONE) fetch();
    }

    // The same, without a call, before which compilers store all vectors that are in use.
    inline __attribute__((always_inline)) void tick_inside(int weight) {
        credit_ += rate_ * weight;
        if (__builtin_expect(credit_ >= PARTS * ONE, 0)) take_turns();
    }

   private:
    __attribute__((noinline)) void fetch() { take_turns(); }
    inline __attribute__((always_inline)) void take_turns() {
        int64_t credit = credit_;
        for (; credit >= PARTS * ONE && now_ < stop_; credit -= PARTS * ONE) {
            Stream& s = *now_;
            const char *at = s.at, *half = at + 2 * s.part;
            const int64_t part = s.part;
            __builtin_prefetch(at, 0, LEVEL), __builtin_prefetch(at + part, 0, LEVEL);
            __builtin_prefetch(half, 0, LEVEL), __builtin_prefetch(half + part, 0, LEVEL);
            s.at = at + s.step;
            if (__builtin_expect(--s.left, 1)) continue;
            s.at += s.jump, s.left = s.turns;
            if (!--s.rows) ++now_;
        }
        if (now_ == stop_) rate_ = credit = 0;
        credit_ = credit;
    }

#if defined(__AMX_INT8__)
    static constexpr int LEVEL = 2;  // into the second cache
    static constexpr bool IN_ORDER = false;
#else
    static constexpr int LEVEL = 3;  // into the first one
    static constexpr bool IN_ORDER = true;  // rows that are no codes
#endif
    static constexpr int64_t ONE = 256, ALL = ONE << 20;
    static constexpr int PARTS = 4;  // lines that are asked for at once, at least
    struct Stream {
        const char* at;             // the next line of the first part
        int64_t part, step, jump;   // bytes: from part to part; to the part's next line; from there to the next row after the last one
        int32_t left, turns, rows;  // lines left of the row; of a row; rows left of a part
    };
    void add_scales(const Format& f, const Rows& rows, int64_t first, int64_t count) {
        if (f.scale_type == SCALE_NONE) return;
        const int64_t bytes = int64_t(f.dim / f.group) * (f.scale_type == SCALE_F16 ? 2 : 4);
        add_lines(rows.scale, rows.scale_strides[2], bytes, first, count, false);
    }
    // In order: parts are lines of the same row that follow each other, if there are no gaps between rows.
    void add_lines(const char* from, int64_t stride, int64_t bytes, int64_t first, int64_t count, bool in_order) {
        if (count <= 0) return;
        const bool joined = bytes == stride;
        in_order &= joined;
        const int64_t each = (count + PARTS - 1) / PARTS, rows = joined ? 1 : each;
        const int64_t step = in_order ? PARTS * CACHE_LINE : CACHE_LINE, length = in_order ? count * bytes : each / rows * bytes;
        const int turns = int((length + step - 1) / step);
        *end_++ = {from + first * stride, in_order ? CACHE_LINE : each * stride, step, stride - step * turns, turns, turns, int(rows)};
    }
    // Lines that are left of what was added before `end`.
    int64_t lines_before(const Stream* end) const {
        int64_t lines = 0;
        for (const Stream* s = now_; s < end; ++s) lines += PARTS * (int64_t(s->rows - 1) * s->turns + s->left);
        return lines;
    }
    static int64_t rate(int64_t lines, int ticks) { return lines * ONE / std::max(ticks, 1) + 1; }
    Stream stream_[5], *now_ = stream_, *stop_ = stream_, *end_ = stream_, *mark_ = stream_;
    int64_t rate_ = 0, credit_ = 0;
    int later_ = 0;
};

inline PlainRows plain_rows(const Format& f, const Tables& tables, const char* from, int64_t row_stride, int count, char* scratch) {
    const Element e = element_of(f);
    const bool as_stored = f.kind == F32 ? e == FLOAT : f.kind == BF16 && e == BFLOAT;
    const int64_t stride = plain_stride(f), plane = ROWS_AT_ONCE * stride;
    if (as_stored && f.dim * int64_t(size_of(e)) == stride && count == ROWS_AT_ONCE) return {from, row_stride, 0};
    if (f.kind == CODES)
        unpack_codes(f, tables, {from, row_stride, (uint8_t*)scratch, stride, count}, plane);
    else
        for (int t = 0; t < count; ++t) convert_row(f, from + t * row_stride, scratch + t * stride);
    if (count < ROWS_AT_ONCE)
        for (int p = 0; p < f.planes; ++p) std::memset(scratch + p * plane + count * stride, 0, (ROWS_AT_ONCE - count) * stride);
    return {scratch, stride, plane};
}

// K: rows of LANES tokens to lines of 4 bytes per token; sink(first, lines) takes four at a time.
template <class Sink>
INLINE void transpose_tokens(const char* from, int64_t stride, int64_t bytes, Ahead& ahead, Sink sink) {
    for (int64_t at = 0; at < bytes; at += 16) {
        ahead.tick();
        vu x[4];  // part j of x[i]: 16 bytes of token 4 j + i
        for (int i = 0; i < 4; ++i) x[i] = load_parts(from + i * stride + at, 4 * stride);
        using vq = vec<uint64_t>;
        const vq a = (vq)zip<0>(x[0], x[1]), b = (vq)zip<0>(x[2], x[3]), c = (vq)zip<1>(x[0], x[1]), d = (vq)zip<1>(x[2], x[3]);
        const line lines[4] = {(line)zip<0>(a, b), (line)zip<1>(a, b), (line)zip<0>(c, d), (line)zip<1>(c, d)};
        sink(at / 4, lines);
    }
}
INLINE void transpose_tokens(const char* from, int64_t stride, int64_t bytes, char* to, Ahead& ahead) {
    transpose_tokens(from, stride, bytes, ahead, [=](int64_t first, const line* lines) {
        for (int i = 0; i < 4; ++i) store(to + (first + i) * LINE, lines[i]);
    });
}

// V: one line of each of 4 (int8), 2 (bfloat16) or 1 tokens to 4, 2 or 1 lines of LANES consecutive values, which
// belong to as many panels. Moving whole 32-bit parts first leaves the columns in order.
template <Element e>
INLINE void interleave_tokens(const char* from, int64_t stride, char* to, int64_t panel) {
    constexpr int parts = LANES / 4;
    if constexpr (e == INT8) {
        constexpr auto index = [](int i) constexpr { return parts * (i % 4) + i / 4; };
        line x[4];
        for (int i = 0; i < 4; ++i) {
            vu raw = load<vu>(from + i * stride);
            x[i] = (line)shuffle<index>(raw, raw);
        }
        using vs = vec<uint16_t>;
        vs a = (vs)zip<0>(x[0], x[1]), b = (vs)zip<0>(x[2], x[3]), c = (vs)zip<1>(x[0], x[1]), d = (vs)zip<1>(x[2], x[3]);
        store(to, zip<0>(a, b));
        store(to + panel, zip<1>(a, b));
        store(to + 2 * panel, zip<0>(c, d));
        store(to + 3 * panel, zip<1>(c, d));
    } else if constexpr (e == BFLOAT) {
        using vq = vec<uint64_t>;
        constexpr auto index = [](int i) constexpr { return parts * (i % 2) + i / 2; };
        vec<uint16_t> x[2];
        for (int i = 0; i < 2; ++i) {
            vq raw = load<vq>(from + i * stride);
            x[i] = (vec<uint16_t>)shuffle<index>(raw, raw);
        }
        store(to, zip<0>(x[0], x[1]));
        store(to + panel, zip<1>(x[0], x[1]));
    } else {
        store(to, load<vu>(from));
    }
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
