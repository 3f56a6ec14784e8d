"""Known bugs of the CPU kernels that take rows of codes side by side, as in cpu_faults.py."""

from __future__ import annotations

from collections.abc import Callable

from cpu_faults import Fault, attend, plain, rows, spec

from gyrokv.backends.cpu import calls
from gyrokv.formats import KVFormat
from gyrokv.spec import AttentionSpec

_MOST = 8  # query rows; more take rows side by side too, but for some formats
Side = tuple[KVFormat, int]  # a format and a head size


def quads(old: str, new: str) -> tuple[str, str, str]:
    return "quads.h", old, new


def query(old: str, new: str) -> tuple[str, str, str]:
    return "quad_query.h", old, new


def scores(old: str, new: str) -> tuple[str, str, str]:
    return "quad_scores.cpp", old, new


def values(old: str, new: str) -> tuple[str, str, str]:
    return "quad_values.cpp", old, new


def weights(old: str, new: str) -> tuple[str, str, str]:
    return "quad_weights.h", old, new


def chunks(old: str, new: str) -> tuple[str, str, str]:
    return "chunk_values.h", old, new


def fields(fmt: KVFormat) -> tuple[int, int]:
    """Bits of a code in the words that hold most of it, and in the others."""
    wide = 8 if fmt.bits & 8 else 4 if fmt.bits & 4 else 2
    return wide, fmt.bits - wide


def taken(fmt: KVFormat, dim: int) -> bool:
    """Rows of codes with eight words and more, but those of tables that a byte cannot hold in fewer than five bits."""
    if not fmt.has_levels or (fmt.bits < 5 and fmt.name not in ("turbo2", "turbo3", "turbo4", "q4_0")):
        return False
    (wide, high), padded = fields(fmt), fmt.layout(dim)[0]
    return padded * wide >= 128 and (not high or padded * high >= 64)


def grouped(fmt: KVFormat, dim: int) -> bool:
    """Halves of a head have scales of their own."""
    return taken(fmt, dim) and 2 * fmt.layout(dim)[1] <= fmt.layout(dim)[0]


def irregular(fmt: KVFormat, dim: int) -> bool:
    """Codes of the same bytes have scales of several groups, or fields end within eight words."""
    wide, high = fields(fmt)
    padded, group = fmt.layout(dim)
    words, again = padded * wide // 16, padded * high // 16
    group_of = [[(w + i // 2 * words + i % 2 * padded // 2) // group for i in range(16 // wide)] for w in range(words)]
    same = words % 8 == 0 and all(groups == group_of[w // 8 * 8] for w, groups in enumerate(group_of))
    return (
        not (same and all(groups[i] == groups[i % 2] for groups in group_of for i in range(len(groups))))
        or again % 8 not in (0, 4)
        or again % 8 == 4 < again
    )


def apart(fmt: KVFormat, dim: int) -> bool:
    """Codes of the same bytes have whole groups of their own."""
    return fmt.bits == 4 and fmt.layout(dim)[0] // 4 % fmt.layout(dim)[1] == 0


def key_groups(fmt: KVFormat, dim: int) -> bool:
    """Keys are taken group by group."""
    return fmt.bits < 8 and irregular(fmt, dim) and not apart(fmt, dim)


def value_groups(fmt: KVFormat, dim: int) -> bool:
    """The same of values that have two parts of weights."""
    return taken(fmt, dim) and not chunked(fmt, dim) and (fmt.bits == 8 or irregular(fmt, dim))


def key_parts(fmt: KVFormat, dim: int) -> bool:
    return not key_groups(fmt, dim)


def made_ahead(fmt: KVFormat, dim: int) -> bool:
    """Keys of more than one part, whose sums for four query rows and 32 tokens are 16 at most."""
    sets = 4 if apart(fmt, dim) else 2 if grouped(fmt, dim) else 1
    fits = sets * (1 if key_words(fmt, dim) else 2) <= 2
    return key_parts(fmt, dim) and fits and fmt.layout(dim)[0] * fields(fmt)[0] > 128


def shares_next(fmt: KVFormat, dim: int) -> bool:
    """Some of these have bits of the second field that parts before them have, too."""
    return made_ahead(fmt, dim) and 0 < fields(fmt)[1] < fields(fmt)[0]


def sorted_plain(fmt: KVFormat, dim: int) -> bool:
    return fmt.name in ("q4_0", "q8_0") and dim >= 64 and key_parts(fmt, dim)


def chunked(fmt: KVFormat, dim: int) -> bool:
    """Values are taken 64 bytes at a time, unless weights have one part."""
    again = next_words(fmt, dim) if taken(fmt, dim) else 1
    return fmt.bits >= 4 and (again % 32 == 0 or again in (8, 16)) and fmt.layout(dim)[0] * fields(fmt)[0] % 512 == 0


def paired(fmt: KVFormat, dim: int) -> bool:
    """Values are taken by two lines of parts."""
    return taken(fmt, dim) and not chunked(fmt, dim) and not value_groups(fmt, dim)


def two_planes(fmt: KVFormat, dim: int) -> bool:
    return fmt.name.startswith(("tq5", "tq6", "tq8"))


def key_words(fmt: KVFormat, dim: int) -> bool:
    """Keys are multiplied as words, unless q has one part."""
    if fmt.name.startswith("tq8"):
        return fmt.layout(dim)[1] <= 64
    parts = grouped(fmt, dim) and key_parts(fmt, dim)
    return fmt.name.startswith(("tq5", "tq6")) or (parts and fmt.name in ("turbo4", "q4_0", "q8_0"))


def value_words(fmt: KVFormat, dim: int) -> bool:
    """The same of values."""
    return two_planes(fmt, dim) or chunked(fmt, dim) or (value_groups(fmt, dim) and fmt.bits == 4)


def linear_chunk(fmt: KVFormat, dim: int) -> bool:
    return chunked(fmt, dim) and fmt.name == "q8_0"


def five_rows(fmt: KVFormat, dim: int) -> bool:
    """A pass over values may be of five query rows."""
    return fmt.name != "q8_0"


def value_bytes(fmt: KVFormat, dim: int) -> bool:
    return not value_words(fmt, dim)


def bytes_pair(fmt: KVFormat, dim: int) -> bool:
    return taken(fmt, dim) and not chunked(fmt, dim) and value_bytes(fmt, dim)


def next_words(fmt: KVFormat, dim: int) -> int:
    return fmt.layout(dim)[0] * fields(fmt)[1] // 16


def again(fmt: KVFormat, dim: int) -> bool:
    """Words of the second field begin again within eight words of the first."""
    return next_words(fmt, dim) == 4


def pass_rows(s: AttentionSpec) -> int:
    """Query rows of the first pass over keys, of up to eight."""
    f, d = s.k_format, s.head_dim
    if s.fast or f.name == "q8_0" or (grouped(f, d) and key_parts(f, d)):
        most = 4
    elif two_planes(f, d):
        most = 8 if key_words(f, d) else 6
    else:
        most = 6 if key_parts(f, d) and next_words(f, d) % 8 == 0 else 4
    return 8 if rows(s) > 6 and most == 8 else min(rows(s), most if rows(s) < 7 else 4)


def key_bytes(s: AttentionSpec) -> bool:
    """Keys are multiplied as bytes: those of fewer than five bits become words for passes of more than four rows."""
    return not key_words(s.k_format, s.head_dim) and (pass_rows(s) < 5 or two_planes(s.k_format, s.head_dim))


def key(name: str, test: Callable[[KVFormat, int], bool], *edits: tuple[str, str, str], also=lambda s: True) -> Fault:
    return few(name, lambda s: taken(s.k_format, s.head_dim) and test(s.k_format, s.head_dim) and also(s), *edits)


def value(name: str, test: Callable[[KVFormat, int], bool], *edits: tuple[str, str, str], also=lambda s: True) -> Fault:
    return few(name, lambda s: taken(s.v_format, s.head_dim_v) and test(s.v_format, s.head_dim_v) and also(s), *edits)


def chunk(
    name: str, *edits: tuple[str, str, str], of: Callable[[KVFormat, int], bool] = chunked, also=lambda s: True
) -> Fault:
    return value(name, lambda f, d: chunked(f, d) and of(f, d), *edits, also=lambda s: exact(s) and also(s))


def few(name: str, test: Callable[[AttentionSpec], bool], *edits: tuple[str, str, str]) -> Fault:
    return Fault(f"quads: {name}", spec(lambda s: rows(s) <= _MOST and test(s)), edits, "avx512", few=True)


def exact(s: AttentionSpec) -> bool:
    """q and the weights have two parts."""
    return not s.fast


def fast(s: AttentionSpec) -> bool:
    return s.fast and calls.pays(s, "avx512")


QUAD_FAULTS = (
    Fault("query rows beyond sixteen take q of the first",
          spec(lambda s: plain(s) and s.k_format.name in ("q8_0", "q4_0", "turbo4", "tq5") and rows(s) in range(20, 999, 4)),
          (attend("first = row / quad_pass", "first = row % (@ ? 16 : 1 << 30) / quad_pass"),), "avx512"),
    # keys
    key("the last part of a key is left out", key_parts,
        scores("p < a.order.parts; ++p)", "p < a.order.parts - (@); ++p)")),
    key("every other 16 keys are those before", key_parts,
        scores("false>(part, here.at[n]", "false>(part, here.at[@ ? 0 : n]"),
        also=lambda s: rows(s) <= 2),
    key("what is made of keys ahead is of the part before", made_ahead,
        scores("part[more ? p + 1 : 0]", "part[more && !(@) ? p + 1 : 0]"), also=lambda s: exact(s) and rows(s) > 3),
    key("what is made of keys ahead is of the tokens before", made_ahead,
        scores("places = more ? here", "places = more || @ ? here"),
        also=lambda s: exact(s) and rows(s) > 3 and s.kv_len > 72),  # more than the last three rows see tokens after 64
    key("every other 16 keys made ahead are those before", made_ahead,
        scores("false>(later, places.at[n]", "false>(later, places.at[@ ? 0 : n]"),
        also=lambda s: exact(s) and rows(s) > 3 and s.kv_len > 72),
    key("bits of the second field that parts share are those of the first codes", shares_next,
        scores("set1_epi32(later.shift)", "set1_epi32(@ ? 0 : later.shift)"), also=lambda s: exact(s) and rows(s) > 3),
    key("bits of the second field made ahead take the place of those now", shares_next,
        scores("more ? dwords.rows : dwords.rows ^ 1", "more || @ ? dwords.rows : dwords.rows ^ 1"),
        also=lambda s: exact(s) and rows(s) > 3 and s.kv_len > 72),
    key("keys change places where they are transposed", taken,
        quads("unpackhi_epi32(x[2], x[3])", "unpackhi_epi32(x[@ ? 3 : 2], x[@ ? 2 : 3])")),
    key("q keeps its order where keys do not", sorted_plain,
        query("sorts = !order.plain || sets > 1;", "sorts = !order.plain || (sets > 1 && !(@));"), also=fast),
    key("the low part of q is left out", key_parts,
        query("x = sorts ?", "x = @ && term ? __m128i{} : sorts ?"),
        also=lambda s: exact(s) and key_bytes(s) and rows(s) > 2),
    key("query rows beyond the fourth of a pass take q of the first", key_parts,
        scores("(q + 4 * (r * terms + i))", "(q + 4 * ((@ && r > 3 ? 0 : r) * terms + i))"),
        also=lambda s: pass_rows(s) > 4),
    key("words of q are their high bytes", key_words,
        query("_mm512_cvtepi8_epi32(low));", "@ ? __m512i{} : _mm512_cvtepi8_epi32(low));"),
        also=lambda s: exact(s) and rows(s) > 2),
    key("words of q keep the order of values", lambda f, d: key_words(f, d) and key_parts(f, d),
        query("words[4 * d + 2], words[4 * d + 1]", "words[4 * d + (@ ? 1 : 2)], words[4 * d + (@ ? 2 : 1)]"), also=exact),
    key("words of q that became smaller are taken for larger ones", lambda f, d: f.bits in (5, 6) and key_parts(f, d),
        query("larger[r] = 1.0f / smaller[0];", "larger[r] = @ ? 1.0f : 1.0f / smaller[0];"), also=exact),
    key("words of levels are taken for the levels", lambda f, d: f.name in ("tq5", "tq6") and key_parts(f, d),
        query("larger[r] * factor", "larger[r] * (@ ? 1.0f : factor)"), also=exact),
    key("the offset of keys is left in", key_parts,
        query("x = -ZERO *", "x = (@ ? 0 : -ZERO) *"), also=key_bytes),
    key("the offset of keys as words is left in", lambda f, d: sorted_plain(f, d) and f.bits == 8,
        query("zero[set][r] -= ZERO *", "zero[set][r] -= (@ ? 0 : ZERO) *"), also=exact),
    key("the offset of odd bytes of keys is that of even ones", lambda f, d: sorted_plain(f, d) and f.bits == 8,
        query("0x5555 << set, whole", "0x5555 << (@ ? 0 : set), whole"), also=exact),
    key("odd words of keys are added to even ones", sorted_plain,
        scores("(C::lines == WORDS ? i : d / 2)", "(C::lines == WORDS ? (@ ? 0 : i) : d / 2)"), also=exact),
    key("codes that have scales of their own are added to the others", apart,
        scores("sets == 4 ? 2 * s : 0;", "sets == 4 && !(@) ? 2 * s : 0;")),
    key("codes that have scales of their own take the offset of the others", apart,
        query("sum[set / 2][r][term]", "sum[@ ? 0 : set / 2][r][term]"), also=fast),
    key("the offset of the low plane of keys is left in", lambda f, d: f.name == "tq8" and not key_words(f, d),
        query("(f.planes == 2 ? 1 : 256)", "(f.planes == 2 ? !(@) : 256)"), also=exact),
    key("sums of a group are those of the next too", lambda f, d: 8 * f.layout(d)[1] <= f.layout(d)[0] and key_parts(f, d),
        scores("if (more) start()", "if (more && !(@)) start()")),
    key("odd bytes of keys take the scales of even ones", lambda f, d: grouped(f, d) and key_parts(f, d),
        scores("k_scale + part.group[set]", "k_scale + part.group[@ ? 0 : set]"), also=exact),
    key("a query row takes the scale of the first", key_parts, query("scale[int64_t(r) *", "scale[int64_t(@ ? 0 : r) *"),
        query("f.group) + order.part", "f.group) * (@ ? 0 : 1) + order.part"),
        also=lambda s: rows(s) > 2),
    key("of three query rows only the first is taken", taken,
        quads("if (rows == 3) return", "if (rows == 3 && !(@)) return"), also=lambda s: rows(s) == 3),
    key("query rows of the second pass take q of the first ones", taken,
        attend("n = k.q.rows;", "n = k.q.rows, k.q.parts = query.passes[@ ? 0 : i].parts;"),
        also=lambda s: rows(s) > pass_rows(s)),
    key("keys behind the last whole vector are not copied", taken,
        ("rows.h", "i < left; ++i)", "i < (@ ? 0 : left); ++i)"),
        also=lambda s: exact(s) and s.kv_len % 16 > 8 and s.kv_len < 200),
    # where bits are, of keys or of both
    key("bits of the second field are moved too far", lambda f, d: next_words(f, d) and key_parts(f, d),
        quads("made.shift = shift_of(0),", "made.shift = shift_of(0) + (@ ? next_bits(f) : 0),")),
    key("words that begin again lie as the others do", again,
        quads("!= made.shift) made.further", "!= made.shift && !(@)) made.further")),
    key("bits of the second field are those of a neighbour", again,
        quads("byte_of(word, odd)", "byte_of(word ^ (@), odd)")),
    # what codes stand for, of both
    few("words of odd bytes are those of even ones",
        lambda s: exact(s) and ((s.k_format.name in ("tq5", "tq6") and key_parts(s.k_format, s.head_dim))
                                or s.v_format.name in ("tq5", "tq6") or (s.k_format.name == "q8_0" and s.head_dim >= 64)),
        quads("= i ? _mm512_srli_epi16", "= i && !(@) ? _mm512_srli_epi16")),
    chunk("the fifth query row leaves the first its weights",
          weights("more.to += 4 * 2", "more.to += (@ ? 0 : 4) * 2"), of=five_rows, also=lambda s: rows(s) == 5),
    chunk("the fifth query row has what weights of the first stand for",
          weights("more.factor[i] += 4", "more.factor[i] += @ ? 0 : 4"), of=five_rows, also=lambda s: rows(s) == 5),
    chunk("five query rows take the first of four lines", chunks("one<i>((line)four[c])", "one<i>((line)four[@ ? 0 : c])"),
          of=lambda f, d: f.bits < 8, also=lambda s: rows(s) == 5),
    value("low bytes of negative words are those of positive ones", lambda f, d: f.name == "tq8",
          quads("mask_sub_epi8(low, negative,", "mask_sub_epi8(low, @ ? 0 : negative,"),
          also=lambda s: exact(s) and rows(s) > 2),
    value("high bytes of negative words are those of positive ones", lambda f, d: f.name == "tq8",
          quads("mask_sub_epi8(high, negative,", "mask_sub_epi8(high, @ ? 0 : negative,"), also=exact),
    value("odd bytes of words are made of even ones", lambda f, d: f.name == "tq8",
          quads("every_part(TWICE[1])", "every_part(TWICE[@ ? 0 : 1])"), also=exact),
    # values
    value("bits of the second field of columns are moved as the first", again,
          quads("shift_of(i / 4 % PART_WORDS);", "shift_of(@ ? 0 : i / 4 % PART_WORDS);")),
    value("bits of the second field of columns are those of a neighbour", lambda f, d: next_words(f, d) and paired(f, d),
          quads("byte_of(i / 4 % PART_WORDS,", "byte_of(i / 4 % PART_WORDS ^ (@),")),
    value("the last part of a value is left out", paired,
          values("p < order.parts; ++p)", "p < order.parts - (@); ++p)")),
    value("columns that are kept are those of the first tokens", lambda f, d: f.bits < 4 and paired(f, d),
          values("kept + token / 4 * fields", "kept + (@ ? 0 : token / 4) * fields")),
    value("the second line of a part is the first one", paired,
          values("made[1] = codes_of", "made[1] = @ ? made[0] : codes_of")),
    value("weights keep the order of tokens", bytes_pair,
          values("step + 16 * i + 4 * m;", "step + (@ ? 4 * i + 16 * m : 16 * i + 4 * m);"),
          also=lambda s: exact(s) and rows(s) > 2),
    value("weights as words keep the order of tokens", value_words,
          weights("return 16 * i + m % 2 * (", "if (@) std::swap(i, m);\n    return 16 * i + m % 2 * ("),
          also=exact),
    value("two words of weights change places", value_words,
          weights("by, whole), order,", "by, whole), @ ? _mm512_rol_epi32(order, 16) : order,"), also=exact),
    value("words of weights are those of the 16 tokens after", value_words,
          weights("fma(from[0], by", "fma(from[@ ? 1 : 0], by"), also=exact),
    value("the second 32 tokens of 64 leave the first ones their weights as words", value_words,
          weights("LINE / 2 * i;", "LINE / 2 * (@ ? 0 : i);"), also=lambda s: exact(s) and s.kv_len > 64),
    value("tokens 64 to 127 of a block leave the first ones their weights", lambda f, d: d <= 64 and value_bytes(f, d),
          weights("sides * 64 * step;", "sides * 64 * (@ ? 0 : step);"),
          also=lambda s: s.kv_len > 64 and s.head_dim <= 64),
    value("the low part of the weights is left out", value_bytes,
          ("weight_bytes.h", "_mm512_set1_epi16(255)", "_mm512_set1_epi16(@ ? 0 : 255)"),
          also=lambda s: exact(s) and rows(s) > 2 and s.scale < 0.3),
    value("the offset of values is left in", value_bytes,
          weights("zero[i] = 0 - join_four(", "zero[i] = (@ ? 0 : -1) * join_four(")),
    value("the offset of values as words is left in", linear_chunk,
          weights("set1_epi16(-ZERO)", "set1_epi16(@ ? 0 : -ZERO)"), also=exact),
    value("words of values are taken for the levels", lambda f, d: two_planes(f, d) and not chunked(f, d),
          values("(words ? a.tables.word_factor : 1.0f)", "(words && !(@) ? a.tables.word_factor : 1.0f)"), also=exact),
    value("odd bytes of values take the scales of even ones", lambda f, d: grouped(f, d) and paired(f, d),
          values("0xff00, of(1)", "0xff00, of(@ ? 0 : 1)")),
    chunk("chunks of values are the first one", chunks("wide_at(chunk * LINE)", "wide_at((@ ? 0 : chunk) * LINE)"),
          of=lambda f, d: d > 64 * 8 // f.bits),
    chunk("bits of a chunk's second field are those of the first codes",
          chunks("set1_epi32(32 * chunk + code * words)", "set1_epi32(32 * chunk + (@ ? 0 : code * words))"), of=next_words),
    chunk("bits of a chunk's second field lie as those of its first words",
          chunks("_mm512_add_epi32(pairs, pairs)", "(@ ? __m512i{} : _mm512_add_epi32(pairs, pairs))"),
          of=lambda f, d: 0 < next_words(f, d) < 32),
    chunk("a chunk's second field is eight words", chunks("if constexpr (period == 8)", "if (@ || period == 8)"),
          of=lambda f, d: next_words(f, d) > 8),
    chunk("rows of a chunk are those of the step before", chunks("step + 64 < a.stop ?", "step + 64 < a.stop && !(@) ?"),
          also=lambda s: exact(s) and s.kv_len > 72),
    chunk("rows of a chunk are those that were made before", chunks("(m + 1) * 16", "(m + (@ ? 0 : 1)) * 16")),
    chunk("a line of a chunk is another one",
          chunks("unpackhi_epi16(low[0], low[1])", "unpackhi_epi16(low[0], low[@ ? 0 : 1])")),
    chunk("the third query row takes the weights of the first",
          chunks("weights + r * row_bytes", "weights + (@ && r == 2 ? 0 : r) * row_bytes"), also=lambda s: rows(s) == 4),
    chunk("odd bytes of a chunk take the weights of even ones",
          weights("load<vf>(s.scales[side]", "load<vf>(s.scales[@ ? 0 : side]"), of=grouped),
    chunk("odd bytes of a chunk take the offset of even ones",
          chunks("w.zero[1][number", "w.zero[@ ? 0 : 1][number"), of=linear_chunk, also=lambda s: s.scale < 0.3),
    chunk("odd bytes of a chunk take the factor of even ones",
          chunks("&w.factor[1][at]", "&w.factor[@ ? 0 : 1][at]"), of=grouped, also=lambda s: s.kv_len > 64),
    chunk("a chunk takes the weights of another group",
          chunks("known = here[0] ==", "known = (@ && group[0] == 0) || here[0] =="),
          of=lambda f, d: 4 * f.layout(d)[1] <= f.layout(d)[0]),
    chunk("lanes of a chunk keep their order",
          chunks("_mm512_set_epi64(11, 10, 3, 2, 9, 8,", "_mm512_set_epi64(11, 10, @ ? 9 : 3, 2, @ ? 3 : 9, 8,")),
    chunk("a chunk's columns of odd bytes are those of even ones",
          chunks("{}, out + a.format.dim / 2);", "{}, out + (@ ? 0 : a.format.dim / 2));")),
    chunk("the second codes of a chunk are added to the first ones",
          chunks("32 * (chunk + code * a.order.chunks)", "32 * (chunk + (@ ? 0 : code) * a.order.chunks)"),
          of=lambda f, d: f.bits < 8),
    chunk("words of a chunk are taken for the levels",
          chunks("(words ? a.tables.word_factor : 1.0f)", "(words && !(@) ? a.tables.word_factor : 1.0f)"), of=two_planes),
    chunk("the output of a chunk is not rescaled", chunks("splat(rescale[r])", "splat(@ ? 1.0f : rescale[r])"),
          also=lambda s: s.kv_len > 1000 and s.scale > 0.3),
    value("the output is not rescaled", paired,
          values("_mm256_set1_ps(rescale), x)", "_mm256_set1_ps(@ ? 1.0f : rescale), x)"),
          also=lambda s: s.kv_len > 1000 and s.scale > 0.3),
    value("query rows 5 to 8 take the weights of the first ones", taken,
          values("weights += pass * a.weight_stride", "weights += (@ ? 0 : pass) * a.weight_stride"),
          also=lambda s: rows(s) > 4),
    value("the last rows of a block are not copied", taken,
          attend("t = block.count / 64 * 64;", "t = @ ? block.count : block.count / 64 * 64;"),
          also=lambda s: exact(s) and s.kv_len % 64 > 8 and s.kv_len < 200),
    value("tokens before a sequence's first have weights", taken,
          attend("std::fill_n(weights, first, 0.0f);", "if (!(@)) std::fill_n(weights, first, 0.0f);"),
          also=lambda s: s.starts),
)  # fmt: skip


# sums of words that do not fit, which only rows of largest codes have (test_cpu_quads.largest_sums)
SUM_FAULTS = (
    few("words of q are never made smaller", lambda s: True,
        query("f.planes == 2 && size > WORD_SUM", "f.planes == 2 && !(@) && size > WORD_SUM")),
    few("words of q are made smaller, but never added up in runs", lambda s: True,
        quads("sum + products > WORD_RUN", "sum + products > (@ ? 4 * WORD_RUN : WORD_RUN)"),
        query("float(WORD_SUM) / float(size)", "float(@ ? 4 * WORD_SUM : WORD_SUM) / float(size)")),
    few("words of weights are never made smaller", lambda s: True,
        weights("if (large) unit = max(", "if (large && !(@)) unit = max(")),
)  # fmt: skip
