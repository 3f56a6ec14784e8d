// Rows of codes side by side, for few query rows where there is no matrix unit: 16 bytes of each of four tokens in a vector.
//
// Such a part is eight words of the widest field of a row; moved right by k codes it holds, per token, values
// x .. x + 7 and, in the odd bytes, those half a head behind (see packing.py). Turned to them, the bits of the next field
// complete the codes, and one look-up makes bytes of them: a line, 16 values of each token. Nothing is written back before it is
// multiplied, so that shuffles and products, which want different parts of a core, overlap.
#pragma once
#include "packed.h"

namespace gyrokv {
namespace GYROKV_ISA {

#if defined(__AVX512VBMI__) && !defined(__AMX_INT8__)
#define GYROKV_QUADS 1
#endif

constexpr int QUAD_TOKENS = 256;      // of a block, at most
constexpr int QUAD_HALF = 128;        // whose weights are rounded relative to the same largest one
constexpr int64_t QUAD_BLOCK = 40960;  // bytes of a block of K or V: V is passed over several times
constexpr int WORD_RUN = 64;          // products of so many large words are added up as integers, at most
constexpr int WORD_SUM = 198000;      // the sizes of what such are multiplied with add up to this, at most
static_assert((WORD_SUM + WORD_RUN / 2) * int64_t(LARGEST_LEVEL) < int64_t(1) << 31);
constexpr int PART_WORDS = 8, PART_BYTES = 2 * PART_WORDS;
constexpr int MOST_QUAD_ROWS = 16;            // query rows
constexpr int MOST_PARTS = 640 / PART_BYTES + 640 / 32;  // lines of a padded head, and those of two groups

#if !defined(GYROKV_QUADS)

constexpr bool TAKES_QUADS = false;
struct Quads {
    Quads(const Format&, bool, int, bool) {}
};
INLINE bool takes_quads(const Format&, int, int) { return false; }

#else

constexpr bool TAKES_QUADS = true;

// Bits of a code's field in the words that hold most of it, and above them.
INLINE int wide_bits(const Format& f) { return f.bits & 8 ? 8 : f.bits & 4 ? 4 : 2; }
INLINE int next_bits(const Format& f) { return f.bits - wide_bits(f); }

// Whether `rows` query rows take rows of a format so, with `terms` parts of q or of the weights.
INLINE bool takes_quads(const Format& f, int rows, int terms) {
    if (f.kind != CODES || rows > MOST_QUAD_ROWS || f.dim % 32 || f.group % 32 || f.bits == 1 || f.bits == 7) return false;
    if (f.dim * wide_bits(f) / 16 < PART_WORDS || (next_bits(f) && f.dim * next_bits(f) / 16 < PART_WORDS / 2)) return false;
    if (f.bits < 5 || f.linear) return f.planes == 1;
    return f.planes == terms && (f.bits < 8 || has_half_table(f));
}

alignas(16) constexpr uint8_t TWICE[2][PART_BYTES] = {{0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14},
                                                      {1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15}};
alignas(16) constexpr uint8_t SORTED[PART_BYTES] = {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15};
INLINE __m512i every_part(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }

// Where the bits of a part are. The next field has fewer words, which begin again: those of a part may lie at the field's end and
// at its beginning, and the last of them may have to be moved further than the first.
struct Part {
    int32_t wide, next, second;   // bytes from the beginning of a row; second: from `next` to words after a wrap
    int32_t shift;                // of the first code
    __mmask8 words[2], here;      // whose even and odd bytes count; of the next field's, those at `next`
    bool wraps, last;             // last: lines from the next part on have other scales
    int32_t group[2];             // of the scale, of even and of odd bytes
    alignas(16) uint8_t gather[PART_BYTES];   // bytes of the next field, in the order of a line of keys
    __mmask32 further;                        // whose bits lie one code higher, in 16-bit lanes
    uint32_t turn;                            // that brings the bits above the others
    alignas(64) uint8_t column_gather[LINE];  // the same for lines of columns (see quad_values.h)
    uint32_t column_turn[LANES];
};

struct Quads {
    int parts = 0;
    int lines;     // of a part
    bool plain;    // words of the next field lie like those of the first
    int chunks;    // of 64 bytes, if they are taken so: see chunk_values.h
    int steps;     // codes of a byte
    int sets;      // 2 where even and odd bytes may have scales of their own
    bool words;    // see Lines
    Part part[MOST_PARTS];
    int first[MOST_PARTS];  // value of the first byte of a line [part][line]; the odd ones lie dim / 2 behind

    // needed: else there are no parts; terms: of q or of the weights; columns: for values
    Quads(const Format& f, bool needed, int terms, bool columns) {
        if (!needed) return;
        const int wide = wide_bits(f), next = next_bits(f), steps = 8 / wide, words = f.dim * wide / 16;
        plain = f.dim * next / 16 % PART_WORDS == 0;
        auto first_word = [&](int p) { return std::min(p, words - PART_WORDS); };  // the last part may begin in the one before
        auto group_of = [&](int p, int k, int odd, int four) {
            const int from = first_word(p);
            return (from + k * words + (from < p ? 4 : 4 * four) + odd * (f.dim / 2)) / f.group;
        };
        bool same = true;  // lines of a part have the same scales
        for (int p = 0; p < words; p += PART_WORDS)
            for (int i = 0; i < 4 * steps; ++i) same &= group_of(p, i / 4, i / 2 % 2, i % 2) == group_of(p, 0, i / 2 % 2, 0);
        lines = same ? steps : 1, sets = 1, chunks = 0, this->steps = steps;
        const int next_words = f.dim * next / 16;
        const bool whole = words % 32 == 0 && (next_words % 32 == 0 || next_words == 8 || next_words == 16);
        const bool four = f.bits == 4 && (terms == 2 || !same);  // else two lines of a part cost less
        if (whole && (f.planes == 2 || four || (f.bits == 8 && f.linear))) chunks = words / 32;
        for (int k = 0; k < steps; k += lines)
            for (int p = 0; p < words; p += PART_WORDS)
                for (int four = 0; four < 2; ++four) {  // a second time, where the last four values of a byte have other scales
                    Part& made = part[parts];
                    const int from = first_word(p);
                    made.words[0] = made.words[1] = 0;
                    for (int odd = 0; odd < 2; ++odd) {
                        made.group[odd] = group_of(p, k, odd, four);
                        const bool alike = group_of(p, k, odd, 0) == group_of(p, k, odd, 1);
                        if (!alike || !four) made.words[odd] = __mmask8(from < p ? 0xf0 : alike ? 0xff : four ? 0xf0 : 0x0f);
                    }
                    if (!made.words[0] && !made.words[1]) continue;
                    made.wide = 2 * from, made.shift = k * wide;
                    if (made.group[0] != made.group[1]) sets = 2;
                    for (int s = 0; s < lines; ++s) first[parts * lines + s] = from + (k + s) * words;
                    if (next) place_next(f, made, from, k, columns);
                    ++parts;
                }
        for (int i = 0; i < parts; ++i)
            part[i].last = i + 1 == parts || !std::equal(part[i].group, part[i].group + 2, part[i + 1].group);
        if (f.planes == 2) this->words = columns || f.bits < 8;
        else this->words = terms == 2 && (columns ? chunks > 0 : sets == 2 && (f.linear || f.bits == 4));
        if (columns || !this->words || f.planes == 1) return;
        for (int i = 0, values = 0; i < parts; ++i) {  // see WORD_RUN
            auto of = [&](const Part& p) { return lines * (std::popcount(p.words[0]) + std::popcount(p.words[1])); };
            values += of(part[i]);
            if (i + 1 < parts) part[i].last |= values + of(part[i + 1]) > WORD_RUN;
            if (part[i].last) values = 0;
        }
    }

   private:
    // The next field of the eight words from `first` on, for code k of them.
    static void place_next(const Format& f, Part& made, int first, int k, bool columns) {
        const int wide = wide_bits(f), next = next_bits(f), words = f.dim * wide / 16, count = f.dim * next / 16;
        const bool all = count < PART_WORDS;  // one load has the whole field, and what lies before it
        const int from = all ? count - PART_WORDS : first % count, here = all ? PART_WORDS : std::min(PART_WORDS, count - from);
        made.wraps = here < PART_WORDS, made.here = __mmask8((1 << here) - 1);
        made.next = f.dim * wide / 8 + 2 * from, made.second = -2 * count;
        auto byte_of = [&](int w, int odd) { return uint8_t(2 * (all ? (first + w) % count - from : w) + odd); };
        auto turn_of = [&](int w) { return uint32_t(((first + w + k * words) / count * next - wide) & 31); };
        made.turn = turn_of(0), made.further = 0;
        for (int i = 0; i < PART_BYTES; ++i) {
            const int word = f.planes == 2 ? i / 2 : i % PART_WORDS, odd = f.planes == 2 ? i % 2 : i / PART_WORDS;
            made.gather[i] = byte_of(word, odd);
            if (turn_of(word) != made.turn) made.further |= 0x01010101u << (i / 2);
        }
        for (int i = 0; columns && i < LINE; ++i) {
            made.column_gather[i] = uint8_t(i % 4 * PART_BYTES + byte_of(i / 4 % PART_WORDS, i / 4 / PART_WORDS));
            made.column_turn[i / 4] = turn_of(i / 4 % PART_WORDS);
        }
    }
};

// What codes are multiplied as: bytes, two planes of bytes, or words: those of even bytes and those of odd ones, with words of q or
// weights. Words take two products where two planes take three, and one sum where two terms or planes take two; but to make them costs
// a shift or two, and sums of large ones fit an integer only if what they meet is less precise (WORD_SUM): too little for keys of tables
// of 256.
enum Lines : int { BYTES, PLANES, WORDS };

// A format whose rows are taken so, as a type.
template <int bits_, int look_up_, int lines_>
struct Coded {
    static constexpr int bits = bits_, look_up = look_up_, lines = lines_;
    static constexpr bool large = lines == WORDS && bits > 4 && look_up != VALUES;  // words beyond a byte
    static constexpr int sums(int terms) { return lines == WORDS ? 1 : lines == PLANES ? 2 : terms; }  // of a line and a row
};
// body(Coded) as rows of `f` want it.
template <bool columns, class Body>
INLINE void as_coded(const Format& f, const Quads& order, Body body) {
    switch (f.bits) {
        case 2: return body(Coded<2, INDICES, BYTES>{});
        case 3: return body(Coded<3, INDICES, BYTES>{});
        case 4: return order.words ? body(Coded<4, INDICES, WORDS>{}) : body(Coded<4, INDICES, BYTES>{});
        case 5: return order.words ? body(Coded<5, INDICES, WORDS>{}) : body(Coded<5, INDICES, BYTES>{});
        case 6: return order.words ? body(Coded<6, INDICES, WORDS>{}) : body(Coded<6, INDICES, BYTES>{});
        default:
            if (f.linear) return order.words ? body(Coded<8, VALUES, WORDS>{}) : body(Coded<8, VALUES, BYTES>{});
            return f.planes == 2 ? body(Coded<8, SIGNED_INDICES, columns ? WORDS : PLANES>{}) : body(Coded<8, SIGNED_INDICES, BYTES>{});
    }
}

// What lines are of codes.
template <class C>
struct Levels : Decoder<C::bits, C::look_up> {
    static constexpr int lines = C::lines == BYTES ? 1 : 2;
    explicit Levels(const Tables& tables) : Decoder<C::bits, C::look_up>(tables) {}
    inline __attribute__((always_inline)) void of(line code, line* made) const { this->template values<lines>(code, made); }
};
template <class C>
    requires(C::lines == WORDS)
struct Levels<C> {
    static constexpr int lines = 2;
    __m512i part[C::bits == 8 ? 4 : 2];
    explicit Levels(const Tables& tables) {
        const void* from = C::bits == 8 ? (const void*)tables.word_half : tables.words;
        for (int i = 0; i < int(sizeof part / LINE); ++i) part[i] = _mm512_load_si512((const char*)from + i * LINE);
    }
    inline __attribute__((always_inline)) void of(line code, line* made) const {
        const __m512i x = (__m512i)code, odd = _mm512_srli_epi16(x, 8);
        if constexpr (C::look_up == VALUES) {  // with ZERO
            made[0] = (line)_mm512_and_si512(x, _mm512_set1_epi16(255)), made[1] = (line)odd;
        } else if constexpr (C::bits < 8) {
            auto look_up = [&](__m512i at) __attribute__((always_inline)) {
                if constexpr (C::bits < 6) return (line)_mm512_permutexvar_epi16(at, part[0]);
                return (line)_mm512_permutex2var_epi16(part[0], at, part[1]);
            };
            made[0] = look_up(x), made[1] = look_up(odd);
        } else {
            const __mmask64 negative = _mm512_movepi8_mask(x), second = 0xaaaaaaaaaaaaaaaa;
            __m512i low = _mm512_permutex2var_epi8(part[0], x, part[1]), high = _mm512_permutex2var_epi8(part[2], x, part[3]);
            low = _mm512_mask_sub_epi8(low, negative, __m512i{}, low);  // and carries nothing, as it is not 0
            high = _mm512_mask_sub_epi8(high, negative, _mm512_set1_epi8(-1), high);
            made[0] = (line)_mm512_mask_shuffle_epi8(low, second, high, every_part(TWICE[0]));
            made[1] = (line)_mm512_mask_shuffle_epi8(high, ~second, low, every_part(TWICE[1]));
        }
    }
};

// The next field's words of a part, of four rows, `step` bytes apart.
template <bool plain>
INLINE __m512i load_next(const Part& p, const char* row, int64_t step) {
    row += p.next;
    if (plain || !p.wraps) return (__m512i)load_parts(row, step);
    auto one = [&](int i) {
        const char* at = row + i * step;
        return _mm_mask_loadu_epi16(_mm_maskz_loadu_epi16(p.here, at), __mmask8(~p.here), at + p.second);
    };
    __m512i x = _mm512_castsi128_si512(one(0));
    x = _mm512_inserti32x4(x, one(1), 1);
    x = _mm512_inserti32x4(x, one(2), 2);
    return _mm512_inserti32x4(x, one(3), 3);
}

// Codes number s of a part; bits above them do not matter.
template <int bits, int s>
INLINE line codes_of(__m512i wide, __m512i next) {
    using F = Fields<bits>;
    __m512i code = wide;
    if constexpr (s > 0) code = _mm512_srli_epi16(code, s * F::wide);
    if constexpr (F::next > 0) {
        __m512i high = next;
        if constexpr (s > 0) high = _mm512_ror_epi32(high, s * F::repeats * F::next);
        code = _mm512_ternarylogic_epi32(_mm512_set1_epi8((1 << F::wide) - 1), code, high, 0xca);
    }
    return (line)code;
}

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
