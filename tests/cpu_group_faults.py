"""Known bugs of the CPU kernels that take codes group by group (quad_groups.h), as in cpu_quad_faults.py."""

from __future__ import annotations

from cpu_faults import rows
from cpu_quad_faults import (
    exact,
    fields,
    key,
    key_groups,
    key_words,
    next_words,
    quads,
    query,
    scores,
)  # fmt: skip

from gyrokv.formats import KVFormat


def groups(old: str, new: str) -> tuple[str, str, str]:
    return "quad_groups.h", old, new


def byte_groups(fmt: KVFormat, dim: int) -> bool:
    return key_groups(fmt, dim) and not key_words(fmt, dim)


def word_groups(fmt: KVFormat, dim: int) -> bool:
    return key_groups(fmt, dim) and key_words(fmt, dim)


GROUP_FAULTS = (
    key("the last part of a key's dwords is the one before", key_groups,
        scores("load_parts(from + part.at", "load_parts(from + (@ && p + 1 == keys.parts ? keys.part[p - 1] : part).at")),
    key("dwords of keys of a group are those of the group before", key_groups,
        scores("(dword + 2 < end)", "(dword + 2 < end && !(@ && dword + 2 == stop))")),
    key("dwords of 64 bytes change places", lambda f, d: word_groups(f, d) and d >= 96,
        quads("put(4 + d, ", "put((@ ? 8 : 4) + d, "), also=exact),
    key("dwords of the last bytes are those of the first", lambda f, d: word_groups(f, d) and f.name == "tq6" and d == 96,
        groups("return LANES * windows + 4 * p", "return (@ ? 0 : LANES * windows) + 4 * p"), also=exact),
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
        groups("(w - part[number].at / 2)", "(@ ? w % PART_WORDS : w - part[number].at / 2)")),
    key("odd bytes of a group's dwords are even ones", byte_groups,
        groups(" / 4 + 2 * place.side(value)", " / 4 + (@ ? 0 : 2) * place.side(value)")),
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
)  # fmt: skip
