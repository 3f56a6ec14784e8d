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


def weights(old: str, new: str) -> tuple[str, str, str]:
    return "quad_weights.h", old, new


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


def two_planes(fmt: KVFormat, dim: int) -> bool:
    return fmt.name.startswith(("tq5", "tq6", "tq8"))


def key_words(fmt: KVFormat, dim: int) -> bool:
    """Keys are multiplied as words, unless q has one part."""
    if fmt.name.startswith("tq8"):
        return fmt.layout(dim)[1] <= 64
    parts = grouped(fmt, dim) and key_parts(fmt, dim)
    return fmt.name.startswith(("tq5", "tq6")) or (parts and fmt.name in ("turbo4", "q4_0", "q8_0"))


def next_words(fmt: KVFormat, dim: int) -> int:
    return fmt.layout(dim)[0] * fields(fmt)[1] // 16


def again(fmt: KVFormat, dim: int) -> bool:
    """Words of the second field begin again within eight words of the first."""
    return next_words(fmt, dim) == 4


def pass_rows(s: AttentionSpec) -> int:
    """Query rows of the first pass over keys, of up to eight."""
    f, d = s.k_format, s.head_dim
    if s.fast:
        most = 6 if apart(f, d) else 8
    elif two_planes(f, d):
        most = 4 if grouped(f, d) and key_parts(f, d) else 8 if key_words(f, d) else 6
    elif key_words(f, d):
        most = 8 if f.name == "q8_0" else 6
    else:
        few_rows = f.name == "q8_0" or grouped(f, d) or not key_parts(f, d) or next_words(f, d) % 8
        most = 4 if few_rows else 6
    return 8 if rows(s) > 6 and most == 8 else min(rows(s), most if rows(s) < 7 else 4)


def key_bytes(s: AttentionSpec) -> bool:
    """Keys are multiplied as bytes: those of fewer than five bits become words for passes of more than four rows."""
    return not key_words(s.k_format, s.head_dim) and (pass_rows(s) < 5 or two_planes(s.k_format, s.head_dim))


def key(name: str, test: Callable[[KVFormat, int], bool], *edits: tuple[str, str, str], also=lambda s: True) -> Fault:
    return few(name, lambda s: taken(s.k_format, s.head_dim) and test(s.k_format, s.head_dim) and also(s), *edits)


def few(name: str, test: Callable[[AttentionSpec], bool], *edits: tuple[str, str, str]) -> Fault:
    return Fault(f"quads: {name}", spec(lambda s: rows(s) <= _MOST and test(s)), edits, "avx512", few=True)


def exact(s: AttentionSpec) -> bool:
    """q and the weights have two parts."""
    return not s.fast


def fast(s: AttentionSpec) -> bool:
    return s.fast and calls.pays(s, "avx512")


def in_halves(s: AttentionSpec) -> bool:
    """Even bytes of keys are multiplied before odd ones."""
    return fast(s) and apart(s.k_format, s.head_dim) and rows(s) > 2


def ahead(s: AttentionSpec) -> bool:
    """Dwords of keys are made while others are multiplied: not where 16 tokens alone share a pass."""
    return exact(s) and rows(s) > 3 and not (s.k_format.name == "q8_0" and pass_rows(s) == 8)


QUAD_FAULTS = (
    Fault("query rows beyond sixteen take q of the first",
          spec(lambda s: plain(s) and s.k_format.name in ("q8_0", "q4_0", "turbo4", "tq5") and rows(s) in range(20, 999, 4)),
          (attend("first = row / quad_pass", "first = row % (@ ? 16 : 1 << 30) / quad_pass"),), "avx512"),
    # keys
    key("the last part of a key is left out", key_parts,
        scores("p < a.order.parts; ++p)", "p < a.order.parts - (@); ++p)"),
        scores("p < stop; ++p)", "p < stop - (@); ++p)")),
    key("every other 16 keys are those before", key_parts,
        scores("false>(part, here.at[n]", "false>(part, here.at[@ ? 0 : n]"),
        also=lambda s: rows(s) <= 2),
    key("what is made of keys ahead is of the part before", made_ahead,
        scores("part[more ? p + 1 : 0]", "part[more && !(@) ? p + 1 : 0]"), also=ahead),
    key("what is made of keys ahead is of the tokens before", made_ahead,
        scores("places = more ? here", "places = more || @ ? here"),
        also=lambda s: ahead(s) and s.kv_len > 72),  # more than the last three rows see tokens after 64
    key("every other 16 keys made ahead are those before", made_ahead,
        scores("false>(later, places.at[n]", "false>(later, places.at[@ ? 0 : n]"),
        also=lambda s: ahead(s) and s.kv_len > 72),
    key("bits of the second field that parts share are those of the first codes", shares_next,
        scores("set1_epi32(later.shift)", "set1_epi32(@ ? 0 : later.shift)"), also=ahead),
    key("bits of the second field made ahead take the place of those now", shares_next,
        scores("more ? dwords.rows : dwords.rows ^ 1", "more || @ ? dwords.rows : dwords.rows ^ 1"),
        also=lambda s: ahead(s) and s.kv_len > 72),
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
        scores("sets == 4 ? 2 * s : 0;", "sets == 4 && !(@) ? 2 * s : 0;"),
        scores("dot_parts(sum[n][s][r], k[n], own)", "dot_parts(sum[n][@ ? 0 : s][r], k[n], own)")),
    key("codes that have scales of their own take the offset of the others", apart,
        query("sum[set / 2][r][term]", "sum[@ ? 0 : set / 2][r][term]"), also=fast),
    key("the offset of the low plane of keys is left in", lambda f, d: f.name == "tq8" and not key_words(f, d),
        query("(f.planes == 2 ? 1 : 256)", "(f.planes == 2 ? !(@) : 256)"), also=exact),
    key("sums of a group are those of the next too", lambda f, d: 8 * f.layout(d)[1] <= f.layout(d)[0] and key_parts(f, d),
        scores("if (more) start()", "if (more && !(@)) start()"), also=lambda s: not in_halves(s)),
    key("odd bytes that wait are those of another part", lambda f, d: apart(f, d) and d >= 128,
        scores("side ? odd[p]", "side ? odd[@ ? first : p]"), also=in_halves),
    key("odd bytes that wait meet the q of even ones", apart,
        scores("p + 2 * side)", "p + 2 * (@ ? 0 : side))"), also=in_halves),
    key("odd bytes that wait take the scales of even ones", apart,
        scores("set = 2 * s + side;", "set = 2 * s + (@ ? 0 : side);"), also=in_halves),
    key("every other 16 keys, half by half, are those before", apart,
        scores("false>(a.order.part[p], here.at[n]", "false>(a.order.part[p], here.at[@ ? 0 : n]"),
        also=lambda s: in_halves(s) and s.kv_len > 16),
    key("scales of a group, half by half, are those of the next too", lambda f, d: 8 * f.layout(d)[1] <= f.layout(d)[0],
        scores("q_scale += 4 * set_bytes;", "q_scale += (@ ? 0 : 4) * set_bytes;"), also=in_halves),
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
        ("rows.h", "i < std::min(left, LANES)", "i < (@ ? 0 : std::min(left, LANES))"),
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
