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

constexpr int PART_WORDS = 8, PART_BYTES = 2 * PART_WORDS;
constexpr int MOST_QUAD_ROWS = 16;             // query rows
constexpr int MOST_PARTS = 640 / PART_BYTES;  // lines of a padded head

#if !defined(GYROKV_QUADS)

constexpr bool TAKES_QUADS = false;
struct Quads {
    Quads(const Format&, bool) {}
};
INLINE bool takes_quads(const Format&, int, int) { return false; }

#else

constexpr bool TAKES_QUADS = true;

// Query rows that take rows of a format so, with `terms` parts of q or of the weights.
INLINE bool takes_quads(const Format& f, int rows, int terms) {
    if (f.kind != CODES || rows > MOST_QUAD_ROWS || f.dim % 32 || f.group % 32 || f.bits == 1 || f.bits == 7) return false;
    if (f.bits < 5 || f.linear) return f.planes == 1;
    return f.planes == terms && (f.bits < 8 || has_half_table(f));
}

alignas(16) constexpr uint8_t SORTED[PART_BYTES] = {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15};
INLINE __m512i every_part(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }

// Where the bits of a part are. A part is whole in most heads; in others its words are loaded by mask, those of the next
// field from two places, because they begin again.
struct Part {
    int32_t wide, next[2];        // bytes from the beginning of a row
    int32_t shift;                // of the first code
    __mmask8 words, next_words[2];
    bool last;                    // lines from the next part on have other scales
    int32_t group[4];             // of the scale, of each four values of a line
    alignas(16) uint8_t gather[PART_BYTES], sort[PART_BYTES];  // of the next field, before and after
    uint32_t turn[4];             // that brings its bits above the others
};

struct Quads {
    int parts = 0;
    int lines;     // of a part
    bool whole;    // parts are loaded without masks
    Part part[MOST_PARTS];
    int first[MOST_PARTS];  // value of the first byte of a line [part][line]; the odd ones lie dim / 2 behind

    // `several`: all lines of a part together where they have the same scales
    Quads(const Format& f, bool several) {
        const int wide = f.bits & 8 ? 8 : f.bits & 4 ? 4 : 2, next = f.bits - wide, steps = 8 / wide;
        const int words = f.dim * wide / 16, next_words = f.dim * next / 16, base = f.dim * wide / 8;
        whole = words % PART_WORDS == 0 && next_words % PART_WORDS == 0;
        auto group_of = [&](int first, int lane) { return (first + lane % 2 * 4 + lane / 2 * (f.dim / 2)) / f.group; };
        bool same = several && next_words % 4 == 0;
        for (int p = 0; p < words; p += PART_WORDS)
            for (int lane = 0; lane < 4; ++lane)
                for (int k = 1; k < steps; ++k) same &= group_of(p, lane) == group_of(p + k * words, lane);
        lines = same ? steps : 1;
        for (int k = 0; k < steps; k += lines)
            for (int p = 0; p < words; p += PART_WORDS) {
                Part& made = part[parts];
                const int count = std::min(PART_WORDS, words - p);
                made.wide = 2 * p, made.shift = k * wide, made.words = __mmask8((1 << count) - 1);
                for (int lane = 0; lane < 4; ++lane) made.group[lane] = std::min(group_of(p + k * words, lane), f.dim / f.group - 1);
                for (int s = 0; s < lines; ++s) first[parts * lines + s] = p + (k + s) * words;
                if (next) {
                    const bool all = next_words <= PART_WORDS;  // one load has the whole field
                    const int from = all ? 0 : p % next_words, here = std::min(PART_WORDS, next_words - from);
                    made.next[0] = base + 2 * from, made.next[1] = base + 2 * (from - next_words);
                    made.next_words[0] = __mmask8((1 << here) - 1), made.next_words[1] = __mmask8(all ? 0 : ~made.next_words[0]);
                    const bool early = next_words % 4 == 0;  // words that sorting brings together are turned alike
                    for (int i = 0; i < PART_BYTES; ++i) {
                        const int w = early ? i % PART_WORDS : i / 2, odd = early ? i / PART_WORDS : i % 2;
                        made.gather[i] = uint8_t(2 * (all ? (p + w) % next_words : w) + odd);
                        made.sort[i] = early ? uint8_t(i) : SORTED[i];
                        made.turn[i / 4] = uint32_t(((p + w + k * words) / next_words * next - wide) & 31);
                    }
                }
                ++parts;
            }
        for (int i = 0; i < parts; ++i)
            part[i].last = i + 1 == parts || !std::equal(part[i].group, part[i].group + 4, part[i + 1].group);
    }
};

// A format whose rows are taken so, as a type.
template <int bits_, int look_up_, int planes_>
struct Coded {
    static constexpr int bits = bits_, look_up = look_up_, planes = planes_;
};
// body(Coded) as rows of `f` want it.
template <class Body>
INLINE void as_coded(const Format& f, Body body) {
    switch (f.bits) {
        case 2: return body(Coded<2, INDICES, 1>{});
        case 3: return body(Coded<3, INDICES, 1>{});
        case 4: return body(Coded<4, INDICES, 1>{});
        case 5: return f.planes == 2 ? body(Coded<5, INDICES, 2>{}) : body(Coded<5, INDICES, 1>{});
        case 6: return f.planes == 2 ? body(Coded<6, INDICES, 2>{}) : body(Coded<6, INDICES, 1>{});
        default:
            if (f.linear) return body(Coded<8, VALUES, 1>{});
            return f.planes == 2 ? body(Coded<8, SIGNED_INDICES, 2>{}) : body(Coded<8, SIGNED_INDICES, 1>{});
    }
}

// Words of four rows, `step` bytes apart, from one place or, where they are not whole, from two.
INLINE __m512i load_four(const char* at, int64_t step, const __mmask8 (&words)[2], int64_t second) {
    auto one = [&](int i) {
        const char* from = at + i * step;
        return _mm_mask_loadu_epi16(_mm_maskz_loadu_epi16(words[0], from), words[1], from + second);
    };
    __m512i x = _mm512_castsi128_si512(one(0));
    x = _mm512_inserti32x4(x, one(1), 1);
    x = _mm512_inserti32x4(x, one(2), 2);
    return _mm512_inserti32x4(x, one(3), 3);
}

// Parts of four rows, `step` bytes apart, to lines: of a token the first, third, .. byte of a part, then the others.
template <class C, bool whole>
struct PartLines {
    using F = Fields<C::bits>;
    __m512i wide, next;
    inline __attribute__((always_inline)) PartLines(const Part& p, const char* rows, int64_t step) {
        const __m512i sorted = every_part(SORTED);
        if constexpr (whole)
            wide = (__m512i)load_parts(rows + p.wide, step);
        else
            wide = load_four(rows + p.wide, step, {p.words, 0}, 0);
        wide = _mm512_srl_epi16(_mm512_shuffle_epi8(wide, sorted), _mm_cvtsi32_si128(p.shift));
        if constexpr (F::next > 0) {
            if constexpr (whole) {
                next = _mm512_shuffle_epi8((__m512i)load_parts(rows + p.next[0], step), sorted);
            } else {
                next = load_four(rows + p.next[0], step, p.next_words, p.next[1] - p.next[0]);
                next = _mm512_shuffle_epi8(next, every_part(p.gather));
            }
            next = _mm512_rorv_epi32(next, every_part(p.turn));
            if constexpr (!whole) next = _mm512_shuffle_epi8(next, every_part(p.sort));
        }
    }
    // Codes number s; bits above them do not matter.
    template <int s>
    inline __attribute__((always_inline)) line codes() const {
        __m512i code = wide;
        if constexpr (s > 0) code = _mm512_srli_epi16(code, s * F::wide);
        if constexpr (F::next > 0) {
            __m512i high = next;
            if constexpr (s > 0) high = _mm512_ror_epi32(high, s * F::repeats * F::next);
            code = _mm512_ternarylogic_epi32(_mm512_set1_epi8((1 << F::wide) - 1), code, high, 0xca);
        }
        return (line)code;
    }
};

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
