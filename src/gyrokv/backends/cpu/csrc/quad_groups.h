// Where the codes of a row are, group by group: for rows side by side (see quads.h) whose codes of the same bytes have scales of
// several groups, or whose fields end within a vector.
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

// Keys: 16 bytes of each row become four dwords of it, and these codes, four bytes or two words of a dword at a time.
struct GroupKeys {
    struct Part {
        int32_t at;                               // bytes from the beginning of a row
        __mmask32 further;                        // whose bits lie one code higher, in 16-bit lanes
        alignas(16) uint8_t order[PART_BYTES];    // unless codes become words
    };
    struct Dword {
        int32_t wide, next;        // vectors of a dword of 16 rows: bytes from the first one
        int32_t shift, next_turn;  // see CodePlaces
    };
    struct Run {
        int32_t group, first, count, dwords;  // values, and dwords of them
    };
    static constexpr int MOST_PARTS = 640 * 6 / 128 + 2;
    int parts = 0, dwords = 0, runs = 0;
    Part part[MOST_PARTS];
    Dword dword[640 / 2];
    Run run[640 / 32];

    // words: of two values, in place of four bytes; most: values of a run
    void make(const Format& f, bool words, int most) {
        const CodePlaces place(f);
        parts = dwords = runs = 0;
        for (int w = 0; w < place.words; w += PART_WORDS) {  // bytes: of even values first
            Part& p = part[parts++];
            p.at = 2 * std::min(w, place.words - PART_WORDS), p.further = 0;
            for (int i = 0; i < PART_BYTES; ++i) p.order[i] = uint8_t(i % PART_WORDS * 2 + i / PART_WORDS);
        }
        const int begun = parts, step = place.count % 4 ? 2 : 4;
        if (words) add_words(place);
        else add_spans(place, step);
        auto wide_at = [&](int value) {
            const int w = place.word(value), number = w / PART_WORDS, in = w - part[number].at / 2;
            return LINE * (4 * number + (words ? in / 2 : in / 4 + 2 * place.side(value)));
        };
        auto next_at = [&](int value) {
            const int w = place.next_word(value), number = begun + w / PART_WORDS;
            if (words) return LINE * (4 * number + (place.next_field() + 2 * w - part[number].at) / 4);
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
    // Parts of the next field, as it is.
    void add_words(const CodePlaces& place) {
        for (int w = 0; w < place.count; w += PART_WORDS) {
            Part& p = part[parts++];
            p.at = std::min(place.next_field() + 2 * w, place.row_bytes() - PART_BYTES), p.further = 0;
        }
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

// Values: lines of 16 columns of a group, four consecutive ones at a time, from a window of 32 bytes of each row.
struct GroupColumns {
    static constexpr int WINDOW = 32, WHOLE = 64, MOST_LINES = 2 * 640 / 16 + 640 / 32;
    struct Lines {
        int32_t at, next_at, stop;  // of the windows; behind the last byte wanted of the first one
        int32_t first[4];           // of each four columns: the first value, or -1
        int32_t group;
        alignas(64) uint8_t order[LINE], next_order[LINE];
        int32_t shift[LANES], next_turn[LANES];
    };
    int lines = 0;                 // even: two by two of the same group
    bool fours;                    // and four by four
    bool together, next_together;  // the two have the same windows, and that of the next field
    bool next_whole;               // the next field is longer than that, and read as a whole, from WHOLE bytes
    Lines line[MOST_LINES];

    void make(const Format& f) {
        const CodePlaces place(f);
        lines = 0, fours = together = next_together = true;
        next_whole = 2 * place.count > WINDOW && 2 * place.count <= WHOLE && place.row_bytes() >= WHOLE;
        for (int g = 0; g * f.group < f.dim; ++g) {
            int four[640 / 4], count = 0;
            for (int v = g * f.group; v < (g + 1) * f.group; v += 4) four[count++] = v;
            std::stable_sort(four, four + count, [&](int a, int b) { return place.word(a) < place.word(b); });
            const int begun = lines;
            for (int i = 0; i < count; i += take(place, g, four + i, std::min(count - i, 4))) {
            }
            if ((lines - begun) % 2) {
                line[lines] = line[lines - 1];
                std::fill_n(line[lines++].first, 4, -1);
            }
            fours &= (lines - begun) % 4 == 0;
            for (int i = begun; i < lines; i += 2) {
                Lines &a = line[i], &b = line[i + 1];
                if (b.at >= a.at && b.stop <= a.at + WINDOW) b.at = a.at;
                next_together &= a.next_at == b.next_at, together &= a.at == b.at && next_together;
            }
        }
        for (int i = 0; i < lines; ++i) fill(place, line[i]);
    }

   private:
    struct Span {
        int low = 1 << 20, high = 0;
        Span with(int from, int bytes) const { return {std::min(low, from), std::max(high, from + bytes)}; }
        bool fits() const { return high - low <= WINDOW; }
    };
    // A line of the first of up to four times four columns of a group, as many as windows hold. Returns how many.
    int take(const CodePlaces& place, int group, const int* four, int count) {
        Span wide, next;
        int taken = 0;
        for (; taken < count; ++taken) {
            const Span more = wide.with(2 * place.word(four[taken]), 8);
            Span more_next = next;
            for (int j = 0; place.next && !next_whole && j < 4; ++j) more_next = more_next.with(2 * place.next_word(four[taken] + j), 2);
            if (!more.fits() || !more_next.fits()) break;
            wide = more, next = more_next;
        }
        Lines& made = line[lines++];
        const int last = std::max(place.row_bytes() - WINDOW, 0);
        made.group = group, made.at = std::min(wide.low, last), made.stop = wide.high;
        made.next_at = next_whole ? place.row_bytes() - WHOLE : place.next ? std::min(place.next_field() + next.low, last) : 0;
        for (int i = 0; i < 4; ++i) made.first[i] = i < taken ? four[i] : -1;
        return taken;
    }
    void fill(const CodePlaces& place, Lines& made) const {
        for (int c = 0; c < LANES; ++c) {
            const int four = made.first[c / 4], value = four + c % 4;
            made.shift[c] = made.next_turn[c] = 0;
            std::memset(made.order + 4 * c, 0, 4), std::memset(made.next_order + 4 * c, 0, 4);
            if (four < 0) continue;
            made.shift[c] = place.shift(value);
            if (place.next) made.next_turn[c] = place.next_turn(value);
            const int wide = place.side(value) + 2 * place.word(value) - made.at;
            const int next = place.next ? place.side(value) + place.next_field() + 2 * place.next_word(value) - made.next_at : 0;
            for (int t = 0; t < 4; ++t) {
                made.order[4 * c + t] = uint8_t(t * WINDOW + wide);
                made.next_order[4 * c + t] = uint8_t(next_whole ? t % 2 * WHOLE + next : t * WINDOW + next);
            }
        }
    }
};

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
