// Panels of int8 values straight from rows of codes.
//
// Rows are transposed while they are still packed, which moves a fraction of the bytes, and only then are codes
// separated and looked up. Words hold the even values of a half in one byte and the odd ones in the other (see
// packing.py), so pairs of lines are first sorted by bytes; within each four values of a K line the order becomes
// 0, 2, 1, 3, which q follows.
#pragma once
#include "expand.h"

namespace gyrokv {
namespace GYROKV_ISA {

using words = vec<uint16_t>;

// A table of line look-ups, in registers where it fits.
template <int entries>
struct LineTable {
#if defined(__AVX512VBMI__)
    static constexpr int parts = entries <= 64 ? 1 : entries / 64;
    __m512i part[parts];
    explicit LineTable(const uint8_t* table, uint8_t flipped = 0) {
        for (int i = 0; i < parts; ++i) part[i] = _mm512_loadu_si512(table + 64 * i) ^ _mm512_set1_epi8(char(flipped));
    }
    line operator()(line code) const {
        const __m512i index = (__m512i)code;
        if constexpr (entries <= 64) return (line)_mm512_permutexvar_epi8(index, part[0]);
        const __m512i low = _mm512_permutex2var_epi8(part[0], index, part[parts > 1]);
        if constexpr (entries == 128) return (line)low;
        const __m512i high = _mm512_permutex2var_epi8(part[parts - 2], index, part[parts - 1]);
        return (line)_mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
    }
#else
    const uint8_t* table;
    explicit LineTable(const uint8_t* table, uint8_t = 0) : table(table) {}
    line operator()(line code) const { return lookup<entries, LINE>(code, table); }
#endif
};

// The two fields of a code: `wide` low bits and `next` above them (0: none).
template <int bits>
struct Fields {
    static constexpr int wide = bits & 8 ? 8 : bits & 4 ? 4 : 2;
    static constexpr int next = bits - wide;
    static constexpr int steps = 8 / wide;          // codes per byte of the wide field
    static constexpr int repeats = next ? wide / next : 1;  // words of the wide field per word of the next
};

// Codes number s of each byte: from the wide field's bytes and those of the next, whose own code is number `place`.
template <int bits>
INLINE line codes_at(words wide, words next, int s, int place) {
    using F = Fields<bits>;
    auto mask = [](int width, int at) { return splat_of<words>((((1 << width) - 1) << at) * 0x0101); };
    words code = wide;
    if constexpr (F::wide < 8) code = shift_right(wide, s * F::wide) & mask(F::wide, 0);
    if constexpr (F::next > 0) {
        const int shift = place * F::next - F::wide;
        words high = shift > 0 ? shift_right(next, shift) : shift_left(next, -shift);
        code |= high & mask(F::next, F::wide);
    }
    return (line)code;
}

// What codes are: values, indices of a table, or a sign above indices of half a table.
enum Meaning : int { VALUES, INDICES, SIGNED_INDICES };
INLINE bool has_half_table(const Format& f) {
    const int half = 1 << (f.bits - 1);
    for (int p = 0; p < f.planes; ++p)
        for (int i = 0; i < half; ++i)
            if (f.table[p][i + half] != -f.table[p][i] || f.table[p][i] == -128) return false;
    return true;
}

// Bits of codes that are looked up so in panels: where a look-up is one of each 16 bytes of a table, or of each 64 or 128, half a table
// and a sign take less.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int LEAST_HALVED = 5;
#elif defined(__AVX512VBMI__) || defined(__aarch64__)
constexpr int LEAST_HALVED = 8;
#else
constexpr int LEAST_HALVED = 9;
#endif

// Codes to bytes as panels have them, or to signed ones.
template <int bits, int look_up, bool with_sign = ZERO == 0>
struct Decoder {
    static constexpr int entries = look_up == SIGNED_INDICES ? 1 << (bits - 1) : bits <= 4 ? 16 : bits <= 6 ? 64 : 256;
    LineTable<entries> low, high;
    explicit Decoder(const Tables& tables)
        : low(tables.plane[0], with_sign ? ZERO : 0), high(tables.plane[1], with_sign ? ZERO : 0) {}
    template <int planes>
    inline __attribute__((always_inline)) void values(line code, line* made) const {
        if constexpr (look_up == VALUES) {
            made[0] = with_sign ? code ^ 0x80 : code;
        } else {
            line index = code;
            if constexpr (look_up == SIGNED_INDICES && LINE < 64) index = code & splat_of<line>(entries - 1);
            made[0] = signed_as(code, low(index));
            if constexpr (planes == 2) made[1] = signed_as(code, high(index));
        }
    }
    template <int planes>
    inline __attribute__((always_inline)) void write(line code, char* to, int64_t plane) const {
        line made[planes];
        values<planes>(code, made);
        for (int p = 0; p < planes; ++p) store(to + p * plane, made[p]);
    }
    // With or without ZERO a byte of the other sign is 0 - it.
    static inline __attribute__((always_inline)) line signed_as(line code, line x) {
        if constexpr (look_up != SIGNED_INDICES) return x;
        if constexpr (bits < 8) code = (line)shift_left((words)code, 8 - bits);
        return (vec<int8_t>)code < 0 ? 0 - x : x;
    }
};

// Bytes 0 and 2 of both (`odd` = 0), or 1 and 3: as 0 of a, 0 of b, 2 of a, 2 of b.
template <int odd>
INLINE words sort_bytes(line a, line b) {
    const words x = (words)a, y = (words)b, low = splat_of<words>(0xff);
    if constexpr (odd == 0) return (x & low) | (y << 8);
    return (x >> 8) | (y & ~low);
}

INLINE bool packed_tokens(const Format& f) {  // whether k_lines_packed takes these rows
    const int narrow = f.bits & -f.bits, row = f.dim * f.bits / 8;
    return f.kind == CODES && f.bits != 7 && f.bits > 1 && f.dim * narrow % 64 == 0 && row >= 16 && row % 4 == 0;
}
INLINE bool packed_values(const Format& f) {  // whether v_lines_packed does
    const int narrow = f.bits & -f.bits, wide = f.bits & 8 ? 8 : f.bits & 4 ? 4 : 2, words = f.dim * narrow / 16;
    const bool repeats = words % LANES == 0 || words * 2 == LANES || words * 4 == LANES;
    return f.kind == CODES && f.bits != 7 && f.bits > 1 && f.dim * wide / 16 % LANES == 0 && words % 8 == 0 && repeats;
}

// Whether a line of V needs no other field, and no more of the rows than was read for it.
INLINE bool in_one_pass(const Format& f) {
    return (f.bits & (f.bits - 1)) == 0 && f.dim * f.bits / 16 % (LINE >= 64 ? 16 : LINE / 2) == 0;
}

constexpr int PACKED_BYTES = 1024;  // at least the longest packed row

// LANES rows of K to lines.
template <int bits, int look_up, int planes>
INLINE void k_lines_packed(const Format& f, const Decoder<bits, look_up>& decoder, const char* from, int64_t stride, char* to,
                           int64_t plane, Ahead& ahead) {
    using F = Fields<bits>;
    const int groups = f.dim * F::wide / 64;  // of four words
    auto write = [&](const words* low, const words* high, int group, int j) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h)
#pragma GCC unroll 4
            for (int s = 0; s < F::steps; ++s)
                decoder.template write<planes>(codes_at<bits>(low[h], high[h], s, s * F::repeats + j),
                                               to + ((s + h * F::steps) * groups + group) * LINE, plane);
    };
    if constexpr (F::next == 0) {
        auto four = [&](int64_t first, const line* x) {
            for (int i = 0; i < 4; i += 2) {
                const words low[2] = {sort_bytes<0>(x[i], x[i + 1]), sort_bytes<1>(x[i], x[i + 1])};
                write(low, low, int(first + i) / 2, 0);
            }
        };
        const int bytes = f.dim * bits / 8;
        transpose_tokens(from, stride, bytes / 16 * 16, ahead, four);
        if (bytes % 16)
            transpose_tokens(from + bytes - 16, stride, 16, ahead, [&](int64_t, const line* x) { four((bytes - 16) / 4, x); });
    } else {
        alignas(64) char raw[PACKED_BYTES / 4 * LINE];
        const int bytes = f.dim * bits / 8, next_groups = groups / F::repeats;
        transpose_tokens(from, stride, bytes / 16 * 16, raw, ahead);
        if (bytes % 16) transpose_tokens(from + bytes - 16, stride, 16, raw + (bytes - 16) / 4 * LINE, ahead);
        auto sorted = [&](const char* at, words* made) {
            const line a = load<line>(at), b = load<line>(at + LINE);
            made[0] = sort_bytes<0>(a, b), made[1] = sort_bytes<1>(a, b);
        };
        for (int n = 0; n < next_groups; ++n) {
            words high[2], low[2];
            sorted(raw + f.dim * F::wide / 32 * LINE + 2 * n * LINE, high);
#pragma GCC unroll 4
            for (int j = 0; j < F::repeats; ++j) {
                sorted(raw + 2 * (j * next_groups + n) * LINE, low);
                write(low, high, j * next_groups + n, j);
            }
        }
    }
}

// 16 rows of V, `field` bytes of each from `from` on: sink(odd, quad, word, line) takes lines of 4 bytes, one of each of
// four tokens, per word from `word` on; `odd`: of which byte of the words. `part` takes a 128-bit part of a line alike.
template <class Sink, class Part, class Tick>
INLINE void interleave_words(const char* from, int64_t stride, int field, Sink sink, Part part, Tick tick) {
    using vq = vec<uint64_t>;
    constexpr int parts = LANES / 4;
    constexpr auto index = [](int i) constexpr { return parts * (i % 2) + i / 2; };
    words made[4];  // even low, even high, odd low, odd high
    auto interleave = [&](auto row) {
        words x[4];
        for (int i = 0; i < 4; ++i) x[i] = row(i);
        const words even01 = sort_bytes<0>((line)x[0], (line)x[1]), even23 = sort_bytes<0>((line)x[2], (line)x[3]);
        const words odd01 = sort_bytes<1>((line)x[0], (line)x[1]), odd23 = sort_bytes<1>((line)x[2], (line)x[3]);
        made[0] = zip<0>(even01, even23), made[1] = zip<1>(even01, even23);
        made[2] = zip<0>(odd01, odd23), made[3] = zip<1>(odd01, odd23);
    };
    int at = 0;
    for (; at + LINE <= field; at += LINE)
        for (int q = 0; q < 4; ++q) {
            tick();
            interleave([&](int i) { vq x = load<vq>(from + (4 * q + i) * stride + at); return (words)shuffle<index>(x, x); });
            sink(0, q, at / 2, made[0]), sink(0, q, at / 2 + LANES, made[1]);
            sink(1, q, at / 2, made[2]), sink(1, q, at / 2 + LANES, made[3]);
        }
#if defined(__AVX512F__)
    for (; at + 32 <= field; at += 32)
        for (int q = 0; q < 4; q += 2) {
            tick();
            interleave([&](int i) {
                const char* row = from + (4 * q + i) * stride + at;
                __m512i x = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)row));
                vq both = (vq)_mm512_inserti64x4(x, _mm256_loadu_si256((const __m256i*)(row + 4 * stride)), 1);
                return (words)shuffle<index>(both, both);
            });
            sink(0, q, at / 2, made[0]), sink(0, q + 1, at / 2, made[1]);
            sink(1, q, at / 2, made[2]), sink(1, q + 1, at / 2, made[3]);
        }
#endif
    for (; at < field; at += 16)
        for (int q = 0; q < 4; q += parts) {
            tick();
            interleave([&](int i) { return (words)load_parts(from + (4 * q + i) * stride + at, 4 * stride); });
            for (int k = 0; k < 4; ++k)
                for (int j = 0; j < parts; ++j) part(k >> 1, q + j, at / 2 + (k & 1) * 4, (const char*)&made[k] + 16 * j);
        }
}

// 16 rows of V to lines; a line of four tokens is `to` + LINE * (token / 4) in each panel.
template <int bits, int look_up, int planes>
INLINE void v_lines_packed(const Format& f, const Decoder<bits, look_up>& decoder, const char* from, int64_t stride, char* to,
                           int64_t panel, int64_t plane, Ahead& ahead) {
    using F = Fields<bits>;
    const int wide_words = f.dim * F::wide / 16, lines = wide_words / LANES;
    auto write = [&](int h, int q, words wide, words next, int j, int i) {
#pragma GCC unroll 4
        for (int s = 0; s < F::steps; ++s)
            decoder.template write<planes>(codes_at<bits>(wide, next, s, s * F::repeats + j),
                                           to + ((s + h * F::steps) * lines + i) * panel + q * LINE, plane);
    };
    // [byte of the word][quad][word]: where lines wait that need more than themselves
    auto sink_to = [&](char* raw, int n) {
        return std::pair([=](int h, int q, int word, words x) { store(raw + ((h * 4 + q) * n + word) * 4, x); },
                         [=](int h, int q, int word, const char* x) { std::memcpy(raw + ((h * 4 + q) * n + word) * 4, x, 16); });
    };
    if (F::next == 0 && in_one_pass(f)) {
        auto direct = [&](int h, int q, int word, words x) { write(h, q, x, x, 0, word / LANES); };
        return interleave_words(from, stride, 2 * wide_words, direct, [](int, int, int, const char*) {}, [&] { ahead.tick(); });
    }
    alignas(64) char low[16 * PACKED_BYTES], high[16 * PACKED_BYTES / 2];
    const int next_words = f.dim * F::next / 16;
    auto [low_line, low_part] = sink_to(low, wide_words);
    interleave_words(from, stride, 2 * wide_words, low_line, low_part, [] {});
    auto [high_line, high_part] = sink_to(high, next_words);
    if constexpr (F::next > 0) interleave_words(from + 2 * wide_words, stride, 2 * next_words, high_line, high_part, [] {});
    for (int h = 0; h < 2; ++h)
        for (int q = 0; q < 4; ++q) {
            ahead.tick();
            const char* wide_at = low + (h * 4 + q) * 4 * wide_words;
            const char* next_at = high + (h * 4 + q) * 4 * next_words;
            auto wide = [&](int i) { return load<words>(wide_at + i * LINE); };
            if constexpr (F::next == 0) {
                for (int i = 0; i < lines; ++i) write(h, q, wide(i), wide(i), 0, i);
            } else if (next_words % LANES == 0) {
                const int per_repeat = next_words / LANES;
                for (int n = 0; n < per_repeat; ++n) {
                    const words next = load<words>(next_at + n * LINE);
#pragma GCC unroll 4
                    for (int j = 0; j < F::repeats; ++j) write(h, q, wide(j * per_repeat + n), next, j, j * per_repeat + n);
                }
            } else {  // a line takes the next field's words `again` times, each time further codes of them
                const vu all = load<vu>(next_at);
                vu next;
                if (next_words * 2 == LANES)
                    next = shuffle<[](int i) constexpr { return i % (LANES / 2); }>(all, all) >>
                           lanes<[](int i) constexpr { return i / (LANES / 2) * F::next; }>();
                else
                    next = shuffle<[](int i) constexpr { return i % (LANES / 4); }>(all, all) >>
                           lanes<[](int i) constexpr { return i / (LANES / 4) * F::next; }>();
                const int again = LANES / next_words;
                for (int i = 0; i * again < F::repeats; ++i)
                    write(h, q, wide(i), shift_right((words)next, i * again * F::next), 0, i);
            }
        }
}

// Rows to panels, for up to 16 tokens from `from` on; rows from `count` on are zeros of the code.
template <int bits, int look_up, int planes>
inline void packed_panels(const Format& f, const Tables& tables, bool keys, const char* from, int64_t stride, int count,
                          int tokens, char* to, int64_t panel, int64_t plane, MatrixUnit& unit, Ahead& ahead) {
    const Decoder<bits, look_up> decoder(tables);
    const int bytes = f.dim * bits / 8;
    alignas(64) char padded[16 * PACKED_BYTES];
    for (int t = 0; t < tokens; t += 16, from += 16 * stride) {
        unit.keep_awake();
        const char* rows = from;
        int64_t step = stride;
        if (count - t < 16) {
            std::memset(padded, 0, 16 * bytes);
            for (int i = 0; i < count - t; ++i) std::memcpy(padded + i * bytes, from + i * stride, bytes);
            rows = padded, step = bytes;
        }
        if (keys)
            for (int i = 0; i < 16; i += LANES)
                k_lines_packed<bits, look_up, planes>(f, decoder, rows + i * step, step, to + (t + i) / LANES * panel, plane, ahead);
        else
            v_lines_packed<bits, look_up, planes>(f, decoder, rows, step, to + t / 4 * LINE, panel, plane, ahead);
    }
}

inline void packed_panels(const Format& f, const Tables& tables, bool keys, const char* from, int64_t stride, int count,
                          int tokens, char* to, int64_t panel, int64_t plane, MatrixUnit& unit, Ahead& ahead) {
    auto with = [&]<int bits, int look_up, int planes>() {
        packed_panels<bits, look_up, planes>(f, tables, keys, from, stride, count, tokens, to, panel, plane, unit, ahead);
    };
    auto run = [&]<int bits>(std::integral_constant<int, bits>) {
        if (bits == 8 && f.linear) return with.template operator()<bits, bits == 8 ? VALUES : INDICES, 1>();
        if constexpr (bits >= LEAST_HALVED)
            if (has_half_table(f)) {
                if (f.planes == 1) return with.template operator()<bits, SIGNED_INDICES, 1>();
                return with.template operator()<bits, SIGNED_INDICES, 2>();
            }
        if (f.planes == 1) return with.template operator()<bits, INDICES, 1>();
        with.template operator()<bits, INDICES, 2>();
    };
    switch (f.bits) {
        case 2: return run(std::integral_constant<int, 2>{});
        case 3: return run(std::integral_constant<int, 3>{});
        case 4: return run(std::integral_constant<int, 4>{});
        case 5: return run(std::integral_constant<int, 5>{});
        case 6: return run(std::integral_constant<int, 6>{});
        case 8: return run(std::integral_constant<int, 8>{});
    }
}

}  // namespace GYROKV_ISA
}  // namespace gyrokv
