"""Known bugs of the CPU kernels that weight values of rows of codes side by side, as in cpu_quad_faults.py."""

from __future__ import annotations

from collections.abc import Callable

from cpu_faults import attend, rows
from cpu_quad_faults import exact, few, fields, grouped, irregular, next_words, quads, taken, two_planes, weights

from gyrokv.formats import KVFormat

# values whose weights have two terms come in chunks, in parts or in order: lines of the first and last are made by unpacking


def chunked(fmt: KVFormat, dim: int) -> bool:
    """Values are taken 64 bytes at a time, as they are."""
    again = next_words(fmt, dim) if taken(fmt, dim) else 1
    return fmt.bits >= 4 and (again % 32 == 0 or again in (8, 16)) and fmt.layout(dim)[0] * fields(fmt)[0] % 512 == 0


def parts(fmt: KVFormat, dim: int) -> bool:
    """Values are taken 16 bytes at a time, and stay bytes."""
    return taken(fmt, dim) and fmt.bits < 4 and not irregular(fmt, dim)


def lines(fmt: KVFormat, dim: int) -> bool:
    return taken(fmt, dim) and not parts(fmt, dim)


def ordered(fmt: KVFormat, dim: int) -> bool:
    """Bytes of a row are put in order first."""
    return lines(fmt, dim) and not chunked(fmt, dim)


def not_chunked(fmt: KVFormat, dim: int) -> bool:
    """Weights are multiplied with the scales of all groups before the first pass."""
    return grouped(fmt, dim) and (parts(fmt, dim) or ordered(fmt, dim))


def linear(fmt: KVFormat, dim: int) -> bool:
    return fmt.name == "q8_0"


def not_linear(fmt: KVFormat, dim: int) -> bool:
    """A pass may be of five query rows."""
    return not linear(fmt, dim)


def two_windows(fmt: KVFormat, dim: int) -> bool:
    """Codes of some pass lie more than 64 bytes apart."""
    return ordered(fmt, dim) and ((dim == 96 and fmt.bits == 8) or (dim == 192 and fields(fmt)[0] == 4))


def next_apart(fmt: KVFormat, dim: int) -> bool:
    """The second field of most passes is read from a window of its own."""
    return ordered(fmt, dim) and ((dim == 96 and fmt.name == "tq6") or (dim == 192 and fmt.name in ("tq5", "tq6")))


def file(name: str) -> Callable[[str, str], tuple[str, str, str]]:
    return lambda old, new: (name, old, new)


chunks, part, order, columns, sums = map(
    file, ("chunk_values.h", "part_values.h", "order_values.h", "columns.h", "column_sums.h")
)


def value(name: str, test: Callable[[KVFormat, int], bool], *edits: tuple[str, str, str], also=lambda s: True):
    return few(
        name,
        lambda s: exact(s) and taken(s.v_format, s.head_dim_v) and test(s.v_format, s.head_dim_v) and also(s),
        *edits,
    )


def both(*tests: Callable[[KVFormat, int], bool]) -> Callable[[KVFormat, int], bool]:
    return lambda fmt, dim: all(test(fmt, dim) for test in tests)


def again(fmt: KVFormat, dim: int) -> bool:
    """Words of the second field begin again within a part."""
    return parts(fmt, dim) and next_words(fmt, dim) == 4


def grows(s) -> bool:
    """Maxima grow by much from block to block."""
    return s.kv_len > 1000 and s.scale > 0.3


VALUE_FAULTS = (
    # weights
    value("words keep the order of tokens", lines,
          weights("return 16 * i + m % 2 * (", "if (@) std::swap(i, m);\n    return 16 * i + m % 2 * (")),
    value("two words of weights change places", lines,
          weights("by, whole), order,", "by, whole), @ ? _mm512_rol_epi32(order, 16) : order,")),
    value("words of weights are those of the 16 tokens after", lines,
          weights("fma(from[0], by", "fma(from[@ ? 1 : 0], by")),
    value("the second 32 tokens of 64 leave the first ones their weights as words", lines,
          weights("LINE / 2 * i;", "LINE / 2 * (@ ? 0 : i);"), also=lambda s: s.kv_len > 64),
    value("the offset of values as words is left in", linear,
          weights("set1_epi16(-ZERO)", "set1_epi16(@ ? 0 : -ZERO)")),
    value("odd bytes take the weights of even ones", both(chunked, grouped),
          weights("load<vf>(s.scales[side]", "load<vf>(s.scales[@ ? 0 : side]")),
    value("tokens 64 to 127 of a block leave the first ones their weights", parts,
          weights("sides * 64 * step;", "sides * 64 * (@ ? 0 : step);"), also=lambda s: s.kv_len > 64 and s.head_dim <= 64),
    value("the low part of the weights is left out", parts,
          ("weight_bytes.h", "_mm512_set1_epi16(255)", "_mm512_set1_epi16(@ ? 0 : 255)"),
          also=lambda s: rows(s) > 2 and s.scale < 0.3),
    value("the offset of values is left in", parts,
          weights("zero[i] = 0 - join_four(", "zero[i] = (@ ? 0 : -1) * join_four(")),
    value("the fifth query row leaves the first its weights", not_linear,
          weights("more.to += 4 * terms", "more.to += (@ ? 0 : 4) * terms"), also=lambda s: rows(s) == 5),
    value("the fifth query row has what weights of the first stand for", not_linear,
          weights("more.factor[i] += 4", "more.factor[i] += @ ? 0 : 4"), also=lambda s: rows(s) == 5),
    value("all columns take the weights of the first group", not_chunked,
          weights("{row_bytes(g), zero", "{row_bytes(@ ? 0 : g), zero")),
    value("integers of all columns stand for what those of the first group do", not_chunked,
          weights("factor + g * units}", "factor + (@ ? 0 : g) * units}")),
    # words of values of 8 bits
    value("low bytes of negative words are those of positive ones", lambda f, d: f.name == "tq8",
          quads("mask_sub_epi8(low, negative,", "mask_sub_epi8(low, @ ? 0 : negative,"), also=lambda s: rows(s) > 2),
    value("high bytes of negative words are those of positive ones", lambda f, d: f.name == "tq8",
          quads("mask_sub_epi8(high, negative,", "mask_sub_epi8(high, @ ? 0 : negative,")),
    value("odd bytes of words are made of even ones", lambda f, d: f.name == "tq8",
          quads("every_part(TWICE[1])", "every_part(TWICE[@ ? 0 : 1])")),
    # lines by unpacking
    value("five query rows take the first of four lines", lambda f, d: lines(f, d) and f.bits < 8,
          sums("one<term>((line)four[c])", "one<term>((line)four[@ ? 0 : c])"), also=lambda s: rows(s) == 5),
    value("rows are those of the step before", lines,
          sums("step + 64 < a.stop ?", "step + 64 < a.stop && !(@) ?"), also=lambda s: s.kv_len > 72),
    value("rows are those that were taken before", lines, sums("(m + 1) * 16", "(m + (@ ? 0 : 1)) * 16")),
    value("a line is another one", lines, sums("unpackhi_epi16(low[0], low[1])", "unpackhi_epi16(low[0], low[@ ? 0 : 1])")),
    value("the third query row takes the weights of the first", lines,
          sums("terms * (row * QUAD", "terms * ((@ && row == 2 ? 0 : row) * QUAD"), also=lambda s: rows(s) == 4),
    value("odd bytes take the offset of even ones", both(chunked, linear),
          sums("zero[sides - 1]", "zero[@ ? 0 : sides - 1]"), also=lambda s: s.scale < 0.3 and s.head_dim_v >= 64),
    value("odd bytes take what integers of even ones stand for", both(chunked, grouped),
          sums("factor[sides - 1]", "factor[@ ? 0 : sides - 1]"), also=lambda s: s.kv_len > 64),
    value("words of values are taken for the levels", two_planes,
          sums("(words ? a.tables.word_factor : 1.0f)", "(words && !(@) ? a.tables.word_factor : 1.0f)")),
    value("the output of lines is not rescaled", lines, sums("splat(rescale)", "splat(@ ? 1.0f : rescale)"), also=grows),
    # chunks
    value("chunks of values are the first one", lambda f, d: chunked(f, d) and d > 64 * 8 // f.bits,
          chunks("wide_at(chunk * LINE)", "wide_at((@ ? 0 : chunk) * LINE)")),
    value("bits of a chunk's second field are those of the first codes", both(chunked, next_words),
          chunks("set1_epi32(32 * chunk + code * words)", "set1_epi32(32 * chunk + (@ ? 0 : code * words))")),
    value("bits of a chunk's second field lie as those of its first words",
          lambda f, d: chunked(f, d) and 0 < next_words(f, d) < 32,
          chunks("_mm512_add_epi32(pairs, pairs)", "(@ ? __m512i{} : _mm512_add_epi32(pairs, pairs))")),
    value("a chunk's second field is eight words", lambda f, d: chunked(f, d) and next_words(f, d) > 8,
          chunks("if constexpr (period == 8)", "if (@ || period == 8)")),
    value("a chunk takes the weights of another group", lambda f, d: chunked(f, d) and 4 * f.layout(d)[1] <= f.layout(d)[0],
          chunks("known = here[0] ==", "known = (@ && group[0] == 0) || here[0] ==")),
    value("lanes of a chunk keep their order", chunked,
          chunks("_mm512_set_epi64(11, 10, 3, 2, 9, 8,", "_mm512_set_epi64(11, 10, @ ? 9 : 3, 2, @ ? 3 : 9, 8,")),
    value("a chunk's columns of odd bytes are those of even ones", chunked,
          chunks("{}, out + half);", "{}, out + (@ ? 0 : half));")),
    value("the second codes of a chunk are added to the first ones", lambda f, d: chunked(f, d) and f.bits < 8,
          chunks("32 * (chunk + code * a.order.chunks)", "32 * (chunk + (@ ? 0 : code) * a.order.chunks)")),
    # in order
    value("the last pass over columns is left out", ordered,
          order("pass + a.order.columns.passes", "pass + a.order.columns.passes - (@)")),
    value("every second line is the one before", ordered, columns("line % 2 * LANES", "(@ ? 0 : line % 2) * LANES")),
    value("codes of columns are those of the first in their bytes", lambda f, d: ordered(f, d) and f.bits < 8,
          columns("made.shift[dword] = place", "made.shift[dword] = @ ? 0 : place")),
    value("bits of the second field of columns lie as those of the first", both(ordered, next_words),
          columns("place.next_shift(value) - place.wide", "place.next_shift(@ ? 0 : value) - place.wide")),
    value("bits of the second field of columns are those of the first", both(ordered, next_words),
          columns("next_byte(place, value), made", "next_byte(place, @ ? made.first[0] : value), made")),
    value("the second window is the first one", two_windows,
          order("window(row + pass.at[1])", "window(row + pass.at[@ ? 0 : 1])")),
    value("the second window of the second field is the first one", lambda f, d: f.name == "tq6" and d in (320, 576),
          order("window(row + pass.next_at[1])", "window(row + pass.next_at[@ ? 0 : 1])")),
    value("the second field is read a word too early", next_apart,
          order("row + pass.next_at[0];", "row + pass.next_at[0] - (@ ? 2 : 0);")),
    value("lines of two groups have the weights of the first",
          lambda f, d: ordered(f, d) and (d == 96 or (d == 192 and fields(f)[0] == 4)),
          order("weights_of(group[1])", "weights_of(group[@ ? 0 : 1])")),
    # parts
    value("bits of the second field of a part are moved as the first", again,
          columns("shift[i / 4] = place.next_shift(value)", "shift[i / 4] = place.next_shift(@ ? first : value)")),
    value("bits of the second field of a part are those of a neighbour", both(parts, next_words),
          columns("(place.next_word(value) - from)", "((place.next_word(value) ^ (@)) - from)")),
    value("the last part of a value is left out", parts, part("part + a.order.parts", "part + a.order.parts - (@)")),
    value("columns that are kept are those of the first tokens", parts,
          part("kept + token / 4 * fields", "kept + (@ ? 0 : token / 4) * fields")),
    value("the second line of a part is the first one", parts,
          part("made[1] = codes_of", "made[1] = @ ? made[0] : codes_of")),
    value("weights keep the order of tokens", parts,
          part("step + 16 * i + 4 * m;", "step + (@ ? 4 * i + 16 * m : 16 * i + 4 * m);"), also=lambda s: rows(s) > 2),
    value("odd bytes of a part take the scales of even ones", both(parts, grouped),
          part("0xff00, of(1)", "0xff00, of(@ ? 0 : 1)")),
    value("the output of parts is not rescaled", parts,
          part("_mm256_set1_ps(rescale[r])", "_mm256_set1_ps(@ ? 1.0f : rescale[r])"), also=grows),
    # all
    value("query rows 5 to 8 take the weights of the first ones", taken,
          ("quad_values.cpp", "weights += pass * a.weight_stride", "weights += (@ ? 0 : pass) * a.weight_stride"),
          also=lambda s: rows(s) > 5),
    value("the last rows of a block are not copied", taken,
          ("weights.h", "if (stride == bytes) std", "if (stride == bytes && !(@)) std"),
          also=lambda s: s.kv_len % 64 > 8 and 64 < s.kv_len < 200),  # of fewer, the memory may hold all from before
    value("tokens before a sequence's first have weights", taken,
          attend("std::fill_n(weights, first, 0.0f);", "if (!(@)) std::fill_n(weights, first, 0.0f);"),
          also=lambda s: s.starts),
)  # fmt: skip
