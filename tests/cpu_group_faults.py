"""Known bugs of the CPU kernels that take codes group by group (quad_groups.h), as in cpu_quad_faults.py."""

from __future__ import annotations

from cpu_faults import rows
from cpu_quad_faults import (
    exact,
    fields,
    grouped,
    key,
    key_groups,
    key_words,
    next_words,
    query,
    scores,
    value,
    value_groups,
    value_words,
    values,
)  # fmt: skip

from gyrokv.formats import KVFormat


def groups(old: str, new: str) -> tuple[str, str, str]:
    return "quad_groups.h", old, new


def byte_groups(fmt: KVFormat, dim: int) -> bool:
    return key_groups(fmt, dim) and not key_words(fmt, dim)


def word_groups(fmt: KVFormat, dim: int) -> bool:
    return key_groups(fmt, dim) and key_words(fmt, dim)


GROUP_FAULTS = (
    # keys
    key("the last part of a key's dwords is the one before", key_groups,
        scores("load_parts(from + part.at", "load_parts(from + (@ && p + 1 == keys.parts ? keys.part[p - 1] : part).at")),
    key("dwords of keys of a group are those of the group before", key_groups,
        scores("lines_of(dword[dword + 1 < end]", "lines_of(dword[dword + 1 < end && !(@ && dword + 1 == stop)]")),
    key("every 16 keys of a group are the first ones", key_groups,
        scores("make(n, places.at[n], places", "make(n, places.at[@ ? 0 : n], places")),
    key("codes above others in a byte are not moved to its end", key_groups,
        scores("set1_epi32(d.shift)", "set1_epi32(@ ? 0 : d.shift)")),
    key("bits of the second field of a group lie as those of the first codes",
        lambda f, d: key_groups(f, d) and next_words(f, d),
        scores("set1_epi32(d.next_turn)", "set1_epi32(@ ? keys.dword[0].next_turn : d.next_turn)")),
    key("words of a group that begin again lie as the others do", lambda f, d: byte_groups(f, d) and next_words(f, d) == 6,
        groups("if (word >= place.count)", "if (word >= place.count && !(@))")),
    key("the last words of a field that ends within a part are those before them",
        lambda f, d: byte_groups(f, d) and f.layout(d)[0] * fields(f)[0] % 128,
        groups("in = w - part[number].at / 2;", "in = @ ? w % PART_WORDS : w - part[number].at / 2;")),
    key("odd bytes of a group's dwords are even ones", byte_groups,
        groups("in / 4 + 2 * place.side(value)", "in / 4 + (@ ? 0 : 2) * place.side(value)")),
    key("odd words of a group's dwords are even ones", word_groups,
        groups("odd = words ? 8 * place.side(i)", "odd = words && !(@) ? 8 * place.side(i)"), also=exact),
    key("the low part of q of a group is left out", byte_groups,
        query("_mm_store_si128((__m128i*)bytes, term(number, v))",
              "_mm_store_si128((__m128i*)bytes, @ && number ? __m128i{} : term(number, v))"),
        also=lambda s: exact(s) and rows(s) > 2),
    key("the offset of a group's keys is left in", byte_groups,
        query("-ZERO * (256 * all[0]", "(@ ? 0 : -ZERO) * (256 * all[0]"), also=exact),
    key("words of q of a group that became smaller are taken for larger ones", word_groups,
        query("factor *= word_factor / smaller[0];", "factor *= word_factor / (@ ? 1.0f : smaller[0]);"), also=exact),
    key("a group of keys takes the scales of the first", key_groups,
        scores("run.group * a.scale_stride", "(@ ? 0 : run.group) * a.scale_stride")),
    key("a group of q takes the scale of the first", key_groups,
        query("f.group) + run.group]", "f.group) + (@ ? 0 : run.group)]"), also=lambda s: rows(s) > 2),
    # values
    value("the last lines of groups are left out", value_groups,
          values("p < order.columns.lines;", "p < order.columns.lines - (@ ? 4 : 0);"), also=exact),
    value("four columns of a line are those before them", value_groups,
          groups("made.first[c / 4], value", "made.first[@ && c / 4 == 3 ? 2 : c / 4], value"), also=exact),
    value("codes of columns are those of the first in their bytes", lambda f, d: value_groups(f, d) and f.bits < 8,
          groups("made.shift[c] = place.shift(value);", "made.shift[c] = @ ? 0 : place.shift(value);"), also=exact),
    value("bits of the second field of a group's columns are turned as the first",
          lambda f, d: value_groups(f, d) and next_words(f, d),
          groups("next_turn[c] = place.next_turn(value);", "next_turn[c] = place.next_turn(@ ? 0 : value);"), also=exact),
    value("bits of the second field of a group's columns are those of the first",
          lambda f, d: value_groups(f, d) and next_words(f, d),
          groups("next_word(value) - made.next_at", "next_word(@ ? made.first[0] : value) - made.next_at"), also=exact),
    value("the second line has the window of the first one", lambda f, d: value_groups(f, d) and f.bits == 8 and d > 32,
          values("window(rows + two[1].at, stride)", "window(rows + two[@ ? 0 : 1].at, stride)"), also=exact),
    value("rows of a field that is read as a whole change places",
          lambda f, d: value_groups(f, d) and 16 < next_words(f, d) <= 32,
          values("epi8(row[2], order, row[3])", "epi8(row[@ ? 3 : 2], order, row[@ ? 2 : 3])"), also=exact),
    value("rows shorter than a window have no last bytes", lambda f, d: f.name == "turbo2" and d == 96,
          values("std::min<int64_t>(a.bytes, 32)", "std::min<int64_t>(@ ? 16 : a.bytes, 32)")),
    value("lines of a group are those of the first", lambda f, d: value_groups(f, d) and grouped(f, d),
          values("return all[0].group;", "return @ ? 0 : all[0].group;"), also=exact),
    value("four lines of a group are the first two, twice",
          lambda f, d: value_groups(f, d) and value_words(f, d) and f.layout(d)[1] % 64 == 0,
          values("two_of(all + i, rows", "two_of(all + (@ ? 0 : i), rows"), also=exact),
    value("a line of a group is not rescaled", value_groups,
          values("_mm_set1_ps(rescale), x)", "_mm_set1_ps(@ ? 1.0f : rescale), x)"),
          also=lambda s: exact(s) and s.kv_len > 1000 and s.scale > 0.3),
)  # fmt: skip
