// Where the codes of columns of V are, for rows side by side (see quads.h).
#pragma once
#include <bit>

#include "quad_groups.h"

namespace gyrokv {
namespace GYROKV_ISA {

#if defined(GYROKV_QUADS)

constexpr int VALUE_ROWS = 5;                 // of a pass over values, at most
constexpr int MOST_PARTS = 640 / PART_BYTES;  // of a padded head

// 16 bytes of a row, see part_values.h: of words `first` and the next ones.
struct ColumnPart {
    int32_t wide, next, first, step;  // bytes from the beginning of a row; the value of the first code, and values to the next one
    int32_t group[2];                 // of even bytes, odd bytes
    alignas(LINE) uint8_t gather[LINE];  // bytes of the next field, of four rows
    alignas(LINE) int32_t shift[LANES];  // of the first code's bits above the lowest

    void make(const Format& f, int number) {
        const CodePlaces place(f);
        first = number * PART_WORDS, wide = 2 * first, next = 0, step = place.words;
        group[0] = first / f.group, group[1] = (first + place.half) / f.group;
        if (!place.next) return;
        // of a shorter field all, and what lies before it
        const int from = place.count < PART_WORDS ? place.count - PART_WORDS : first % place.count;
        next = place.next_field() + 2 * from;
        for (int i = 0; i < LINE; ++i) {
            const int value = first + i / 4 % PART_WORDS, odd = i / 4 / PART_WORDS;
            gather[i] = uint8_t(i % 4 * PART_BYTES + 2 * (place.next_word(value) - from) + odd), shift[i / 4] = place.next_shift(value);
        }
    }
};

// How bytes of a row are read that are put in order by a look-up (see order_values.h): from one window, or those of the next field from one
// of their own, which may be half as long; from two windows, where the next field is in the second one or has two of its own.
enum Windows : int { TOGETHER, HALF_NEXT, NEXT, TWO, TWO_NEXT };

// Passes over rows whose bytes are put in order, so that unpacking those of four tokens makes lines with the same scale.
struct Columns {
    static constexpr int WINDOW = LINE, SPAN = 32;  // bytes; consecutive values of two lines
    // Four lines, or two: dword 4 p + i of the bytes in order are four columns of line i.
    struct Pass {
        int32_t spans, first[2];    // values from each on
        Windows windows;
        int32_t at[2], next_at[2];  // of the windows: bytes from the beginning of a row
        alignas(LINE) uint8_t order[LINE], next_order[LINE];  // among bytes of the windows
        alignas(LINE) uint8_t next_turn[LINE];                // where a byte begins whose bits of the next field are above wide ones
        alignas(LINE) int32_t shift[LANES];
    };
    static constexpr int MOST = 640 / SPAN;
    int passes = 0;
    Pass pass[MOST];

    // A head is a whole number of spans, and so are groups.
    void make(const Format& f) {
        const CodePlaces place(f);
        const int spans = f.dim / SPAN;
        bool taken[MOST] = {};
        passes = 0;
        for (int i = 0; i < spans; ++i) {
            if (taken[i]) continue;
            Pass& made = pass[passes++];
            int with = i, least = 1 << 30;
            for (int j = i + 1; j < spans; ++j) {
                if (taken[j]) continue;
                const int bytes = find_windows(place, i, j, made), groups = 1 + (i * SPAN / f.group != j * SPAN / f.group);
                const int cost = (made.windows * 4 + groups) * 1024 + bytes;
                if (bytes > 0 && cost < least) least = cost, with = j;
            }
            taken[i] = taken[with] = true;
            find_windows(place, i, with, made);
            made.spans = with == i ? 1 : 2, made.first[0] = i * SPAN, made.first[1] = with * SPAN;
            fill(place, made);
        }
    }

   private:
    static int wide_byte(const CodePlaces& place, int value) { return place.side(value) + 2 * place.word(value); }
    static int next_byte(const CodePlaces& place, int value) {
        return place.side(value) + place.next_field() + 2 * place.next_word(value);
    }
    // Bytes of a row that are wanted.
    struct Wanted {
        bool byte[640] = {};
        int low = 640, high = 0, count = 0;
        void add(int i) { count += !byte[i], byte[i] = true, low = std::min(low, i), high = std::max(high, i + 1); }
        int from(int i) const {
            while (i < high && !byte[i]) ++i;
            return i;
        }
    };
    // Of the codes of two spans. Returns how many bytes these have, or 0 if two windows of a field do not hold them.
    static int find_windows(const CodePlaces& place, int span, int other, Pass& made) {
        Wanted wide, next;
        for (int s : {span, other})
            for (int v = s * SPAN; v < (s + 1) * SPAN; ++v) {
                wide.add(wide_byte(place, v));
                if (place.next) next.add(next_byte(place, v));
            }
        const int last = std::max(place.row_bytes() - WINDOW, 0);
        auto two = [&](const Wanted& wanted, int32_t* at) {  // false if the second one is not enough
            at[0] = std::min(wanted.low, last), at[1] = std::min(wanted.from(at[0] + WINDOW), last);
            return wanted.high <= at[1] + WINDOW;
        };
        bool fits = two(wide, made.at);
        const bool one = wide.high <= made.at[0] + WINDOW;
        if (std::max(wide.high, next.high) <= made.at[0] + WINDOW) {
            made.windows = TOGETHER, made.next_at[0] = made.at[0];
        } else if (one && next.high - next.low <= WINDOW / 2) {
            made.windows = HALF_NEXT, made.next_at[0] = std::min(next.low, place.row_bytes() - WINDOW / 2);
        } else if (one && next.high - next.low <= WINDOW) {
            made.windows = NEXT, made.next_at[0] = std::min(next.low, last);
        } else if (!place.next || (next.low >= made.at[1] && next.high <= made.at[1] + WINDOW)) {
            made.windows = TWO, made.next_at[0] = made.at[1];
        } else {
            made.windows = TWO_NEXT, fits &= two(next, made.next_at);
        }
        return fits ? wide.count + next.count : 0;
    }
    static void fill(const CodePlaces& place, Pass& made) {
        auto within = [](int byte, const int32_t* at) {
            return uint8_t(byte < at[0] + WINDOW ? byte - at[0] : WINDOW + byte - at[1]);
        };
        for (int i = 0; i < LINE; ++i) {
            const int dword = i / 4, line = dword % 4, value = made.first[line / 2] + line % 2 * LANES + dword / 4 * 4 + i % 4;
            made.order[i] = within(wide_byte(place, value), made.at);
            made.shift[dword] = place.shift(value);  // which four values share
            made.next_order[i] = place.next ? within(next_byte(place, value), made.next_at) : 0;
            made.next_turn[i] = uint8_t((i % 8 * 8 + (place.next ? place.next_shift(value) - place.wide : 0)) & 63);
        }
    }
};

// How values are taken: 64 bytes at a time as they are (see chunk_values.h), 16 bytes at a time, or in order.
struct ColumnQuads {
    int chunks, parts;  // or 0
    bool words;         // see Lines in quads.h
    bool beyond;        // bytes behind a row are read
    ColumnPart part[MOST_PARTS];
    Columns columns;

    // terms: of the weights
    void make(const Format& f, int terms) {
        const CodePlaces place(f);
        const bool repeats = !place.next || (std::has_single_bit(unsigned(place.count)) && place.count >= 8);
        const bool whole = repeats && 2 * place.words % LINE == 0;
        // of one int8, rows of tables of 5 bits and more take longer so from memory, though less in the first cache
        chunks = whole && (f.planes == 2 || f.bits == 4 || f.linear) ? 2 * place.words / LINE : 0;
        const bool bytes = f.bits < 8 && (terms == 1 || f.bits < 4) && has_parts(f);
        parts = !chunks && bytes ? place.words / PART_WORDS : 0;
        words = terms == 2 && !parts;
        for (int p = 0; p < parts; ++p) part[p].make(f, p);
        if (!chunks && !parts) columns.make(f);
        beyond = !chunks && !parts && place.row_bytes() < LINE;
    }
};

#endif

}  // namespace GYROKV_ISA
}  // namespace gyrokv
