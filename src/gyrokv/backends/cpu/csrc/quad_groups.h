// Where the codes of a key are, group by group: for rows side by side (see quads.h) whose codes of the same bytes have scales of several
// groups, or whose fields end within a vector.
#pragma once
#include <algorithm>

#include "packed.h"

namespace gyrokv {
namespace GYROKV_ISA {

constexpr int WORD_RUN = 64;  // products of so many large words are added up as integers, at most
constexpr int PART_WORDS = 8, PART_BYTES = 2 * PART_WORDS;

#if defined(__AVX512VBMI__) && !defined(__AMX_INT8__)
#define GYROKV_QUADS 1

// Bits of a code's field in the words that hold most of it, and above them.
INLINE int wide_bits(const Format& f) { return f.bits & 8 ? 8 : f.bits & 4 ? 4 : 2; }
INLINE int next_bits(const Format& f) { return f.bits - wide_bits(f); }

// Where the code of a value is: bytes from the beginning of a row, and how far its bits of a field lie above the lowest of a byte. Those of
// the next field are turned right until they lie above the wide ones, which may be to the left. (Elsewhere bits are moved by shifts: on
// AMD's cores rotations keep products waiting.)
struct CodePlaces {
    const int wide, next, words, count, half;
    explicit CodePlaces(const Format& f)
        : wide(wide_bits(f)), next(next_bits(f)), words(f.dim * wide / 16), count(f.dim * next / 16), half(f.dim / 2) {}
    int side(int value) const { return value >= half; }
    int word(int value) const { return value % half % words; }
    int shift(int value) const { return value % half / words * wide; }
    int next_word(int value) const { return value % half % count; }
    int next_shift(int value) const { return value % half / count * next; }
    int next_turn(int value) const { return (next_shift(value) - wide) & 31; }
    int next_field() const { return 2 * words; }
    int row_bytes() const { return 2 * (words + count); }
};

// Whether all codes of 16 bytes have the same scale, or those of even bytes one and those of odd bytes one, and the next field's words
// begin again with them, or once within them.
INLINE bool has_parts(const Format& f) {
    const CodePlaces place(f);
    auto group_of = [&](int word, int code, int odd) { return (word + code * place.words + odd * place.half) / f.group; };
    bool same = place.words % PART_WORDS == 0;
    for (int w = 0; w < place.words; w += 4)
        for (int i = 0; i < 16 / place.wide; ++i) same &= group_of(w, i / 2, i % 2) == group_of(w / PART_WORDS * PART_WORDS, 0, i % 2);
    return same && (place.count % PART_WORDS == 0 || place.count == PART_WORDS / 2);
}

// Keys: bytes of each row become dwords of it, and these codes, four bytes or two words of a dword at a time.
struct GroupKeys {
    struct Part {  // 16 bytes
        int32_t at;                             // from the beginning of a row
        __mmask32 further;                      // whose bits lie one code higher, in 16-bit lanes
        alignas(16) uint8_t order[PART_BYTES];  // unless codes become words
    };
    struct Dword {
        int32_t wide, next;        // vectors of a dword of 16 rows: bytes from the first one
        int32_t shift, next_turn;  // see CodePlaces
    };
    struct Run {
        int32_t group, first, count, dwords;  // values, and dwords of them
    };
    static constexpr int MOST_BYTES = 640 * 6 / 8, MOST_WINDOWS = MOST_BYTES / LINE + 1, MOST_PARTS = MOST_BYTES / PART_BYTES + 2;
    static constexpr int MOST_VECTORS = 4 * MOST_PARTS;
    int windows = 0, parts = 0, dwords = 0, runs = 0;
    bool beyond = false;           // bytes behind a row are read
    int32_t window[MOST_WINDOWS];  // 64 bytes, if codes become words; vectors of parts come after those of windows
    Part part[MOST_PARTS];
    Dword dword[640 / 2];
    Run run[640 / 32];

    // words: of two values, in place of four bytes; most: values of a run
    void make(const Format& f, bool words, int most) {
        const CodePlaces place(f);
        windows = parts = dwords = runs = 0;
        for (int w = 0; w < place.words && !words; w += PART_WORDS) {  // bytes: of even values first
            Part& p = part[parts++];
            p.at = 2 * std::min(w, place.words - PART_WORDS), p.further = 0;
            for (int i = 0; i < PART_BYTES; ++i) p.order[i] = uint8_t(i % PART_WORDS * 2 + i / PART_WORDS);
        }
        const int begun = parts, step = place.count % 4 ? 2 : 4;
        if (words) take_all(place.row_bytes());
        else add_spans(place, step);
        auto wide_at = [&](int value) {
            const int w = place.word(value), number = w / PART_WORDS;
            if (words) return LINE * vector_of(2 * w);
            return LINE * (4 * number + (w - part[number].at / 2) / 4 + 2 * place.side(value));
        };
        auto next_at = [&](int value) {
            const int w = place.next_word(value);
            if (words) return LINE * vector_of(place.next_field() + 2 * w);
            return LINE * (4 * (begun + w / step / 2) + w / step % 2 + 2 * place.side(value));
        };
        for (int v = 0; v < f.dim; v += most) {
            Run& r = run[runs++];
            r.group = v / f.group, r.first = v, r.count = most, r.dwords = most / (words ? 2 : 4);
            for (int i = v; i < v + most; i += words ? 2 : 4) {
                const int odd = words ? 8 * place.side(i) : 0;
                Dword& d = dword[dwords++];
                d.wide = wide_at(i), d.shift = place.shift(i) + odd, d.next = d.next_turn = 0;
                if (place.next) d.next = next_at(i), d.next_turn = (place.next_turn(i) + odd) & 31;
            }
        }
    }

   private:
    // Windows and parts of the whole row, as it is.
    void take_all(int bytes) {
        for (; bytes - LINE * windows >= LINE; ++windows) window[windows] = LINE * windows;
        int done = LINE * windows;
        beyond = !done && bytes > 3 * PART_BYTES;  // which takes no longer than four parts
        if (beyond || (done && bytes - done > 3 * PART_BYTES)) window[windows++] = std::max(bytes - LINE, 0), done = bytes;
        for (; done < bytes; done += PART_BYTES) part[parts++].at = std::min(done, bytes - PART_BYTES);
    }
    int vector_of(int byte) const {
        for (int i = 0; i < windows; ++i)
            if (byte >= window[i] && byte < window[i] + LINE) return LANES * i + (byte - window[i]) / 4;
        int p = 0;
        while (byte >= part[p].at + PART_BYTES) ++p;
        return LANES * windows + 4 * p + (byte - part[p].at) / 4;
    }
    // Parts of two spans of four of its words, even bytes before odd ones. Spans begin at each `step`, and the last one may go on at the
    // field's beginning.
    void add_spans(const CodePlaces& place, int step) {
        const int spans = place.count / step;
        for (int i = 0; i < spans; i += 2) {
            Part& p = part[parts++];
            const int from = place.count > PART_WORDS ? 2 * step * i : 0;
            p.at = std::min(place.next_field() + from, place.row_bytes() - PART_BYTES), p.further = 0;
            for (int j = 0; j < PART_BYTES; ++j) {
                const int word = step * std::min(i + j / 4 % 2, spans - 1) + j % 4;
                p.order[j] = uint8_t(place.next_field() + 2 * (word % place.count) + j / PART_WORDS - p.at);
                if (word >= place.count) p.further |= 0x01010101u << (j / 2);
            }
        }
    }
};

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
