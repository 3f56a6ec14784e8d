// Rows of codes side by side, where there is no matrix unit: 16 bytes of each of four tokens in a vector.
//
// Such a part is eight words of the widest field of a row; moved right by k codes it holds, per token, values
// x .. x + 7 and, in the odd bytes, those half a head behind (see packing.py). Turned to them, the bits of the next field
// complete the codes, and one look-up makes bytes of them: a line, 16 values of each token. Nothing is written back before it is
// multiplied, so that shuffles and products, which want different parts of a core, overlap. Where codes of the same bytes have scales of
// several groups, they are taken group by group instead (see quad_groups.h).
#pragma once
#include <array>
#include <bit>

#include "columns.h"

namespace gyrokv {
namespace GYROKV_ISA {

constexpr int QUAD_TOKENS = 1024;      // of a block, at most
constexpr int QUAD_HALF = 128;         // whose weights are rounded relative to the same largest one
constexpr int64_t QUAD_BLOCK = 65536;  // bytes of a block of K or V, at most
constexpr int WORD_SUM = 198000;       // sizes of what a run of large words (WORD_RUN) meets add up to this, at most
static_assert((WORD_SUM + WORD_RUN / 2) * int64_t(LARGEST_LEVEL) < int64_t(1) << 31);
constexpr int QUAD_ROWS = 8;           // of a pass over keys, at most

#if !defined(GYROKV_QUADS)

constexpr bool TAKES_QUADS = false;
struct Quads {};
struct ColumnQuads {};
INLINE bool takes_quads(const Format&, int, int) { return false; }
template <class Order>
INLINE const Order& quads_of(const Format&, int) { static const Order none; return none; }

#else

constexpr bool TAKES_QUADS = true;

// Query rows that take rows of a format so, at most. Each four make lines of codes anew, but multiply words of two planes once, and
// need no sums of each group in memory. Where panels cost no more products and few such sums, many rows are faster with them.
INLINE int most_quad_rows(const Format& f, int terms) {
    constexpr int all = 1 << 30;
    if (terms == 1) return f.group <= 32 ? 64 : 16;
    if (f.planes == 2 || f.bits == 8) return all;
    if (f.bits == 4) return f.group <= 32 ? all : 256;
    return f.group <= 32 ? 128 : f.group <= 64 ? 64 : 16;
}

// Whether `rows` query rows take rows of a format so, with `terms` parts of q or of the weights.
INLINE bool takes_quads(const Format& f, int rows, int terms) {
    if (f.kind != CODES || rows > most_quad_rows(f, terms) || f.dim % 32 || f.group % 32 || f.bits == 1 || f.bits == 7) return false;
    if (f.dim * wide_bits(f) / 16 < PART_WORDS || (next_bits(f) && f.dim * next_bits(f) / 16 < PART_WORDS / 2)) return false;
    if (const int next = f.dim * next_bits(f) / 16; next % 4 && next > PART_WORDS) return false;
    if (f.bits < 5 || f.linear) return f.planes == 1;
    return f.planes == terms && (f.bits < 8 || has_half_table(f));
}

alignas(16) constexpr uint8_t TWICE[2][PART_BYTES] = {{0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14},
                                                      {1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15}};
alignas(16) constexpr uint8_t SORTED[PART_BYTES] = {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15};
INLINE __m512i every_part(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }

// Where the bits of a part are. The next field may have four words, which begin again within a part.
struct Part {
    int32_t wide, next;                      // bytes from the beginning of a row
    int32_t next_number;                     // among the parts of the next field, of the one with its bits
    bool begins;                             // no part before it has those
    bool last;                               // parts from the next one on have other scales
    int32_t group[4];                        // of the scale: [code][even, odd bytes], of the first codes
    alignas(16) uint8_t gather[PART_BYTES];  // bytes of the next field, in the order of a line
    __mmask32 further;                       // whose bits lie one code higher, in 16-bit lanes
    int32_t shift;                           // of the first code's bits above the lowest
};

// How keys are taken.
struct Quads {
    int parts;
    int lines;      // of a part: codes of a byte
    int step;       // values from one of them to the next
    bool plain;     // words of the next field lie like those of the first
    int sets;       // of scales of a part: 2 where even and odd bytes may have their own, 4 where each of two codes may
    bool words, many_words;  // see Lines; the same for passes of more than four rows
    int most_rows;  // of a pass: see quad_pass
    bool by_group;  // see quad_groups.h, in place of parts
    Part part[MOST_PARTS];
    GroupKeys keys;

    void make(const Format& f, int terms) {
        const int wide = wide_bits(f), next = next_bits(f), words = f.dim * wide / 16, next_words = f.dim * next / 16;
        auto group_of = [&](int word, int code, int odd) { return (word + code * words + odd * (f.dim / 2)) / f.group; };
        parts = words / PART_WORDS, lines = 8 / wide, step = words, sets = 1;
        const bool apart = f.bits == 4 && words % f.group == 0;  // codes, which have whole groups
        by_group = !apart && !has_parts(f);
        plain = next_words % PART_WORDS == 0;
        for (int p = 0; p < parts && !by_group; ++p) {
            Part& made = part[p];
            made.wide = p * PART_BYTES;
            for (int i = 0; i < 4; ++i) made.group[i] = group_of(p * PART_WORDS, i / 2 % lines, i % 2);
            if (made.group[0] != made.group[1]) sets = apart ? 4 : 2;
            made.next_number = p % std::max(1, next_words / PART_WORDS), made.begins = made.next_number == p;
            if (next) place_next(f, made, p * PART_WORDS);
        }
        if (f.planes == 2) this->words = f.bits < 8 || f.group <= WORD_RUN;
        else this->words = terms == 2 && sets > 1 && (f.linear || f.bits == 4);
        const bool large = this->words && f.planes == 2;  // see WORD_RUN
        const bool small = sets == 1 && f.bits < 5 && terms == 2 && plain && !by_group;
        many_words = this->words || small;
        const bool apart_words = this->words && !large && !by_group;
        const bool byte = terms == 1 && f.planes == 1;  // one product for each code and row
        if ((sets == 1 && large) || (sets <= 2 && byte) || (apart_words && f.linear)) most_rows = QUAD_ROWS;
        else most_rows = small || byte || apart_words || (sets == 1 && f.planes == 2) ? 6 : 4;
        if (by_group) {
            keys.make(f, this->words, !large || f.group <= WORD_RUN ? f.group : f.group % WORD_RUN ? 32 : WORD_RUN);
            return;
        }
        for (int p = 0, sum = 0; p < parts; ++p) {
            Part &own = part[p], &after = part[p + 1 < parts ? p + 1 : p];
            const int products = lines * PART_BYTES;
            sum += products;
            own.last = p + 1 == parts || !std::equal(own.group, own.group + 4, after.group) || (large && sum + products > WORD_RUN);
            if (own.last) sum = 0;
        }
    }

    bool words_for(int rows) const { return rows > 4 ? many_words : words; }

    // The value of the first byte of a part's code; the second one is half a head behind it.
    int first(int part, int code) const { return part * PART_WORDS + code * step; }

   private:
    // The next field of the eight words from `first` on.
    static void place_next(const Format& f, Part& made, int first) {
        const CodePlaces place(f);
        const bool all = place.count < PART_WORDS;  // one load has the whole field, and what lies before it
        const int from = all ? place.count - PART_WORDS : first % place.count;
        made.next = place.next_field() + 2 * from;
        auto byte_of = [&](int w, int odd) { return uint8_t(2 * (all ? (first + w) % place.count - from : w) + odd); };
        auto shift_of = [&](int w) { return place.next_shift(first + w); };
        made.shift = shift_of(0), made.further = 0;
        for (int i = 0; i < PART_BYTES; ++i) {
            const int word = f.planes == 2 ? i / 2 : i % PART_WORDS, odd = f.planes == 2 ? i % 2 : i / PART_WORDS;
            made.gather[i] = byte_of(word, odd);
            if (shift_of(word) != made.shift) made.further |= 0x01010101u << (i / 2);
        }
    }
};

// An order of a format, made once while a thread's calls have the same one; terms: of q or of the weights.
template <class Order>
INLINE const Order& quads_of(const Format& f, int terms) {
    struct Known {
        std::array<int, 6> key;
        Order order;
    };
    static thread_local Known own;
    const std::array<int, 6> key = {f.bits, f.dim, f.group, f.planes, f.linear, terms};
    if (key != own.key) own.key = key, own.order.make(f, terms);
    return own.order;
}

// What codes are multiplied as: bytes, two planes of bytes, or words: those of even bytes and those of odd ones, with words of q or
// weights. Words take two products where two planes take three, and one sum where two terms or planes take two; but to make them costs
// a shift or two, and sums of large ones fit an integer only if what they meet is less precise (WORD_SUM): too little for keys of tables
// of 256, but in small groups.
enum Lines : int { BYTES, PLANES, WORDS };

// A format whose rows are taken so, as a type.
template <int bits_, int look_up_, int lines_>
struct Coded {
    static constexpr int bits = bits_, look_up = look_up_, lines = lines_;
    static constexpr bool large = lines == WORDS && bits > 4 && look_up != VALUES;  // words beyond a byte
    static constexpr int sums(int terms) { return lines == WORDS ? 1 : lines == PLANES ? 2 : terms; }  // of a line and a row
};
// body(Coded) as rows of `f` want it, as words or not.
template <bool columns, class Body>
INLINE void as_coded(const Format& f, bool words, Body body) {
    auto of_table = [&]<int bits>(std::integral_constant<int, bits>) {
        if (words) return body(Coded<bits, INDICES, WORDS>{});
        body(Coded<bits, INDICES, BYTES>{});
    };
    switch (f.bits) {
        case 2: return of_table(std::integral_constant<int, 2>{});
        case 3: return of_table(std::integral_constant<int, 3>{});
        case 4: return of_table(std::integral_constant<int, 4>{});
        case 5: return of_table(std::integral_constant<int, 5>{});
        case 6: return of_table(std::integral_constant<int, 6>{});
        default:
            if (f.linear) return words ? body(Coded<8, VALUES, WORDS>{}) : body(Coded<8, VALUES, BYTES>{});
            if (f.planes == 1) return body(Coded<8, SIGNED_INDICES, BYTES>{});
            if constexpr (!columns)
                if (!words) return body(Coded<8, SIGNED_INDICES, PLANES>{});
            body(Coded<8, SIGNED_INDICES, WORDS>{});
    }
}

// Whether lines of words can be made one without the other.
template <class C>
constexpr bool ONE_BY_ONE = C::lines == WORDS && (C::bits < 8 || C::look_up == VALUES);

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
    // Of the low byte of each word.
    inline __attribute__((always_inline)) line word(__m512i code) const {
        if constexpr (C::bits < 6) return (line)_mm512_permutexvar_epi16(code, part[0]);
        return (line)_mm512_permutex2var_epi16(part[0], code, part[1]);
    }
    // Line number i.
    template <int i>
        requires(ONE_BY_ONE<C>)
    inline __attribute__((always_inline)) line one(line code) const {
        const __m512i x = i ? _mm512_srli_epi16((__m512i)code, 8) : (__m512i)code;
        if constexpr (C::look_up != VALUES) return word(x);
        return (line)(i ? x : _mm512_and_si512(x, _mm512_set1_epi16(255)));  // with ZERO
    }
    inline __attribute__((always_inline)) void of(line code, line* made) const {
        if constexpr (ONE_BY_ONE<C>) {
            made[0] = one<0>(code), made[1] = one<1>(code);
        } else {
            const __m512i x = (__m512i)code;
            const __mmask64 negative = _mm512_movepi8_mask(x), second = 0xaaaaaaaaaaaaaaaa;
            __m512i low = _mm512_permutex2var_epi8(part[0], x, part[1]), high = _mm512_permutex2var_epi8(part[2], x, part[3]);
            low = _mm512_mask_sub_epi8(low, negative, __m512i{}, low);  // and carries nothing, as it is not 0
            high = _mm512_mask_sub_epi8(high, negative, _mm512_set1_epi8(-1), high);
            made[0] = (line)_mm512_mask_shuffle_epi8(low, second, high, every_part(TWICE[0]));
            made[1] = (line)_mm512_mask_shuffle_epi8(high, ~second, low, every_part(TWICE[1]));
        }
    }
};

// Codes number s of a part, of whose next field the first bits are the lowest; bits above codes do not matter.
template <int bits, int s>
INLINE line codes_of(__m512i wide, __m512i next) {
    using F = Fields<bits>;
    __m512i code = wide;
    if constexpr (s > 0) code = _mm512_srli_epi16(code, s * F::wide);
    if constexpr (F::next > 0) {
        __m512i high = next;
        if constexpr (s == 0) high = _mm512_slli_epi16(high, F::wide);
        if constexpr (s > 1) high = _mm512_srli_epi16(high, (s - 1) * F::wide);
        code = _mm512_ternarylogic_epi32(code, _mm512_set1_epi8((1 << F::wide) - 1), high, 0xe2);
    }
    return (line)code;
}

// Parts of 16 rows to four vectors of a dword of each row.
INLINE void dwords_of(const __m512i* x, __m512i* to) {
    const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpacklo_epi32(x[2], x[3]);
    const __m512i c = _mm512_unpackhi_epi32(x[0], x[1]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    to[0] = _mm512_unpacklo_epi64(a, b), to[1] = _mm512_unpackhi_epi64(a, b);
    to[2] = _mm512_unpacklo_epi64(c, d), to[3] = _mm512_unpackhi_epi64(c, d);
}

// 64 bytes of 16 rows to 16 vectors of a dword of each row.
template <class Put>
INLINE void all_dwords_of(const char* rows, int64_t stride, Put put) {
    __m512i four[4][4];  // [rows][dword of each 16 bytes]
    for (int i = 0; i < 4; ++i) {
        const char* at = rows + 4 * i * stride;
        __m512i x[4];
        for (int j = 0; j < 4; ++j) x[j] = _mm512_loadu_si512(at + j * stride);
        dwords_of(x, four[i]);
    }
    for (int d = 0; d < 4; ++d) {
        const __m512i a = _mm512_shuffle_i32x4(four[0][d], four[1][d], 0x44), b = _mm512_shuffle_i32x4(four[2][d], four[3][d], 0x44);
        const __m512i c = _mm512_shuffle_i32x4(four[0][d], four[1][d], 0xee), e = _mm512_shuffle_i32x4(four[2][d], four[3][d], 0xee);
        put(d, _mm512_shuffle_i32x4(a, b, 0x88)), put(4 + d, _mm512_shuffle_i32x4(a, b, 0xdd));
        put(8 + d, _mm512_shuffle_i32x4(c, e, 0x88)), put(12 + d, _mm512_shuffle_i32x4(c, e, 0xdd));
    }
}

// Of `rows` query rows, those of the next pass: codes are looked up anew in each, so seven and one of zeros are one where eight may be.
INLINE int quad_pass(int rows, int most) {
    if (rows >= 7 && most == QUAD_ROWS) return QUAD_ROWS;
    return rows <= 6 && rows <= most ? rows : std::min(rows, 4);
}
// Of those from `row` on of all `rows`, over keys, whose scores may be taken of so many at once.
constexpr int KEY_ROWS = 8;
INLINE int key_pass(int row, int rows, int most) { return quad_pass(std::min(KEY_ROWS - row % KEY_ROWS, rows - row), most); }
// body(rows) of a pass of `most` rows at most.
template <int most, class Body>
INLINE void as_pass(int rows, Body body) {
    if constexpr (most >= 8)
        if (rows == 8) return body(std::integral_constant<int, 8>{});
    if constexpr (most >= 6)
        if (rows == 6) return body(std::integral_constant<int, 6>{});
    if constexpr (most >= 5)
        if (rows == 5) return body(std::integral_constant<int, 5>{});
    if (rows == 4) return body(std::integral_constant<int, 4>{});
    if (rows == 3) return body(std::integral_constant<int, 3>{});
    if (rows == 2) return body(std::integral_constant<int, 2>{});
    body(std::integral_constant<int, 1>{});
}

// body(terms) for those that takes_quads allows.
template <class C, class Body>
INLINE void as_terms(int terms, Body body) {
    if constexpr (C::lines != BYTES) return body(std::integral_constant<int, 2>{});
    constexpr bool both = C::bits < 5 || C::look_up == VALUES;
    if constexpr (both)
        if (terms == 2) return body(std::integral_constant<int, 2>{});
    if constexpr (C::lines == BYTES) body(std::integral_constant<int, 1>{});
}

INLINE vi dot_parts(vi sum, line k, __m512i q) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)k, q); }

INLINE vi dot_words(vi sum, line k, __m512i q) { return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)k, q); }

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
