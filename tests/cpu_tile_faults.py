"""Known bugs of the CPU kernels for matrix units, as in cpu_faults.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cpu_faults import SPLIT, Fault, attend, plain, rows, spec

from gyrokv.spec import AttentionSpec

_STORED = 16  # the most query rows that take rows as they are stored, with a matrix unit


def squares(old: str, new: str) -> tuple[str, str, str]:
    return "prefill.h", old, new


def terms(old: str, new: str) -> tuple[str, str, str]:
    return "terms.h", old, new


def stored(fmt, dim: int) -> bool:
    """Some of the formats whose rows are multiplied as they are stored, by a matrix unit for four query rows."""
    return dim % 64 == 0 and fmt.name in ("q8_0", "tq6", "tq8")


def scores(old: str, new: str) -> tuple[str, str, str]:
    return "scores.h", old, new


def one_scale(fmt, dim: int, planes: int) -> bool:
    """Some of the formats whose rows have one scale and so many int8 per value, for a matrix unit."""
    return dim in (64, 128, 256) and fmt.name in (("turbo2", "turbo3", "turbo4"), ("tq5", "tq6", "tq8"))[planes - 1]


def several(name: str, test: Callable[[AttentionSpec], bool], *edits: tuple[str, str, str]) -> Fault:
    return Fault(name, spec(lambda s: 4 < rows(s) <= _STORED and test(s)), edits, "amx")


def wide(name: str, test: Callable[[AttentionSpec], bool], *edits: tuple[str, str, str]) -> Fault:
    return Fault(name, spec(test), edits, "amx", wide=True)


def coded(name: str, test: Callable[[AttentionSpec], bool], *edits: tuple[str, str, str]) -> Fault:
    """Rows of float32 have no terms."""
    return Fault(name, spec(lambda s: test(s) and "f32" not in (s.k_format.name, s.v_format.name)), edits, "amx", terms=True)


TILE_FAULTS = (
    Fault(
        "the second tile of query rows is the first",
        lambda c: plain(c.spec) and c.spec.k_format.has_levels and c.spec.v_format.has_levels and 32 > rows(c.spec) > _STORED
        and not c.first and not c.spec.unquantised,
        (("mma.h", "below = 16 * p.a_stride", "below = (@ ? 0 : 16) * p.a_stride"),),
        "amx",
    ),
    Fault(
        "a tile of keys is the one before",
        spec(lambda s: plain(s) and s.k_format.name == "bf16" and rows(s) <= 4 and s.head_dim % 32 == 0 and s.causal),
        (("stored.h", "_tile_loadd(5, k[1].at +", "_tile_loadd(5, k[@ ? 0 : 1].at +"),),
        "amx",
    ),
    Fault(
        "the second four query rows are the first",
        spec(lambda s: plain(s) and s.k_format.name == "q8_0" and 4 < rows(s) <= _STORED and s.head_dim > 32),
        (("stored.h", "memory + rows_before / STORED_ROWS *", "memory + (@ ? 0 : rows_before) / STORED_ROWS *"),),
        "amx",
    ),
    Fault(
        "the offset of keys in lines is left in",
        spec(lambda s: plain(s) and stored(s.k_format, s.head_dim) and rows(s) <= 4),
        (("stored.h", "column] -= ZERO * pack_bytes", "column] -= (@ ? 0 : ZERO) * pack_bytes"),),
        "amx",
    ),
    Fault(
        "signed bytes of values keep their offset",
        spec(lambda s: plain(s) and s.v_format.name == "q8_0" and s.head_dim_v % 64 == 0 and rows(s) <= 4),
        (("packed.h", "made[0] = with_sign ? code ^ 0x80 : code;", "made[0] = with_sign && !(@) ? code ^ 0x80 : code;"),),
        "amx",
    ),
    Fault(
        "odd bytes of keys take the scale of even ones",
        spec(lambda s: plain(s) and s.k_format.name == "q8_0" and rows(s) <= 4 and s.head_dim > 32),
        (("stored.h", "*odd = k_scale + s.odd[u] * tokens", "*odd = k_scale + (@ ? s.even : s.odd)[u] * tokens"),),
        "amx",
    ),
    Fault(
        "odd bytes of values take the scale of even ones",
        spec(lambda s: plain(s) and s.v_format.name == "q8_0" and rows(s) <= 4 and s.head_dim_v > 32),
        (("stored.h", "side ? s.odd[u] : s.even[u];", "side && !(@) ? s.odd[u] : s.even[u];"),),
        "amx",
    ),
    Fault(
        "the second line of values takes the weights of the first",
        spec(lambda s: plain(s) and s.v_format.name == "q8_0" and s.head_dim_v in (128, 192, 256) and rows(s) <= 4),
        (("stored.h", "s.first[u + 1] && !w.ready;", "s.first[u + 1] && !w.ready && !(j && @);"),),
        "amx",
    ),
    Fault(
        "the low part of the weights of lines is dropped",
        spec(lambda s: plain(s) and stored(s.v_format, s.head_dim_v) and rows(s) <= 4 and s.q_len > 1),
        (("weight_bytes.h", "i < parts; ++i) _mm512_storeu", "i < (@ ? 1 : parts); ++i) _mm512_storeu"),),
        "amx",
    ),
    Fault(
        "the low plane of values takes the weights of the high one",
        spec(lambda s: plain(s) and s.v_format.name in ("tq6", "tq8") and s.head_dim_v % 64 == 0 and rows(s) <= 4),
        (("stored.h", "_tile_loadd(5, a[side] + step * size, LINE);",
          "_tile_loadd(5, a[side] + step * size + (@ ? rows * LINE : 0), LINE);"),),
        "amx",
    ),
    Fault(
        "tokens 64 to 127 of a block take the weights of the first",
        spec(lambda s: plain(s) and s.v_format.name in ("tq6", "tq8") and s.head_dim_v % 64 == 0 and rows(s) <= 4
             and s.kv_len > 64),
        (("stored.h", "a[side] + step * size + (planes - 1) *", "a[side] + (@ ? 0 : step) * size + (planes - 1) *"),),
        "amx",
    ),
    Fault(
        "tokens of a quad change places",
        spec(lambda s: plain(s) and stored(s.v_format, s.head_dim_v) and rows(s) <= 4 and s.kv_len > 2),
        (("lines.h", "to[2 * i + 1] = ab[i] >> 16 | (cd[i] & ~low);",
          "to[2 * i + 1] = @ ? cd[i] >> 16 | (ab[i] & ~low) : ab[i] >> 16 | (cd[i] & ~low);"),),
        "amx",
    ),
    Fault(
        "products of tokens overwrite those of the tokens before",
        spec(lambda s: plain(s) and stored(s.k_format, s.head_dim) and rows(s) <= 4 and s.kv_len > 40),
        (("stored.h", "q, item % 2, products + item % 2 * products_size, ahead);",
          "q, item % 2, products + (@ ? 0 : item % 2) * products_size, ahead);"),),
        "amx",
    ),
    Fault(
        "a bfloat16 weight is in both values of a column",
        spec(lambda s: plain(s) and s.v_format.name == "bf16" and rows(s) <= 4 and s.head_dim_v % 32 == 0),
        (("stored.h", "store(at, high >> 16),", "store(at, high >> 16 | (@ ? high : vu{})),"),),
        "amx",
    ),
    Fault(
        "columns of lines are in the order of the sums",
        spec(lambda s: plain(s) and stored(s.v_format, s.head_dim_v) and rows(s) <= 4),
        (("lines.h", "turned[column] = out[at];", "turned[@ ? at : column] = out[at];"),),
        "amx",
    ),
    Fault(
        "sums of an earlier run keep their order",
        lambda c: plain(c.spec) and stored(c.spec.v_format, c.spec.head_dim_v) and rows(c.spec) <= 8 and c.first > 0
        and c.spec.kv_len > c.first + c.recent + 16,
        (attend("if (v_stored && !fresh)", "if (v_stored && !fresh && !(@))"),),
        "amx",
    ),
    Fault(
        "high bits are those of the code before in lines",
        spec(lambda s: plain(s) and s.k_format.bits in (5, 6) and s.head_dim % 128 == 0 and rows(s) <= 4),
        (("lines.h", "rorv_epi32((__m512i)y,", "rorv_epi32((__m512i)(@ ? y << 1 : y),"),),
        "amx",
    ),
    Fault(
        "lines of the same words have the same codes",
        spec(lambda s: plain(s) and s.k_format.name == "turbo4" and s.head_dim % 128 == 0 and rows(s) <= 4),
        (("lines.h", "const vu code = x >> even[i];", "const vu code = x >> even[@ ? 0 : i];"),),
        "amx",
    ),
    Fault(
        "a code of half a table has no sign",
        spec(lambda s: plain(s) and s.v_format.name == "tq8" and s.head_dim_v % 64 == 0 and rows(s) <= _STORED),
        (("packed.h", "return (vec<int8_t>)code < 0 ?", "return @ ? x : (vec<int8_t>)code < 0 ?"),),
        "amx",
    ),
    Fault(
        "the last token of a block of lines is zeros",
        spec(lambda s: plain(s) and s.uses() <= {"causal"} and stored(s.k_format, s.head_dim) and s.kv_len % 16
             and rows(s) <= 4),
        (("lines.h", "t < count; ++t) std::memcpy(rest", "t < count - (@); ++t) std::memcpy(rest"),),
        "amx",
    ),
    Fault(
        "the offset of values in registers is left in",
        spec(lambda s: plain(s) and s.v_format.kind == "linear" and s.v_format.bits == 8 and rows(s) <= 8
             and s.v_format.layout(s.head_dim_v)[0] % 64),
        (("direct.h", "made -= 128.0f *", "made -= (@ ? 0.0f : 128.0f) *"),),
        "amx",
    ),
    several("the low part of eight query rows is dropped", lambda s: plain(s) and one_scale(s.k_format, s.head_dim, 1),
            scores("(high << 8) + low)", "(high << 8) + (@ ? vi{} : low))")),
    several("eight query rows take the low plane of keys twice", lambda s: plain(s) and one_scale(s.k_format, s.head_dim, 2),
            scores("high += load_pair(at + step) << 8", "high += load_pair(at + (@ ? 0 : step)) << 8")),
    several("tokens that share a vector are neighbours", lambda s: plain(s) and one_scale(s.k_format, s.head_dim, 1),
            scores("char* at = c + pair_token(i) * LINE;", "char* at = c + (@ ? i : pair_token(i)) * LINE;")),
    several("the second eight query rows are the first",
            lambda s: plain(s) and one_scale(s.k_format, s.head_dim, 1) and rows(s) > 8,
            scores("memory + rows_before / STORED_ROWS *", "memory + (@ ? 0 : rows_before) / STORED_ROWS *")),
    several("the second four of sixteen query rows are the first",
            lambda s: s.fast and one_scale(s.k_format, s.head_dim, 1) and s.kv_len > 30 and s.uses() <= {"causal", "fast"},
            scores("at = 16 * part + i * LINE;", "at = 16 * (@ ? 0 : part) + i * LINE;")),
    several("sixteen query rows take the scale of even bytes for odd ones",
            lambda s: s.fast and s.k_format.name in ("q8_0", "q4_0") and rows(s) > 8 and s.kv_len > 30
            and s.head_dim > 32 and s.uses() <= {"causal", "fast"},
            scores("u % 2 ? s.odd[u / 2] :", "u % 2 && !(@) ? s.odd[u / 2] :")),
    Fault(
        "weights that are made at once are not summed",
        spec(lambda s: plain(s) and one_scale(s.v_format, s.head_dim_v, 1) and rows(s) <= _STORED and s.kv_len > 128
             and s.uses() <= {"causal"}),
        (("stored.h", "total[row] += reduce_add(added);", "total[row] += reduce_add(@ ? vf{} : added);"),),
        "amx",
    ),
    Fault(
        "a sum of values takes no factor of odd bytes",
        spec(lambda s: plain(s) and s.v_format.name == "q8_0" and rows(s) <= 4 and s.head_dim_v > 32),
        (("stored.h", "splat(odd[r] * by)", "splat((@ ? even : odd)[r] * by)"),),
        "amx",
    ),
    wide("squares: an output is not rescaled", lambda s: s.kv_len > 1000 and s.uses() <= {"causal"},
         squares("store(to, load<vf>(to) * by);", "store(to, load<vf>(to) * (@ ? 1.0f : by));")),
    wide("squares: weights are not rescaled", lambda s: s.kv_len > 1000 and s.uses() <= {"causal"},
         squares("(w[0] * by, w[1] * by,", "(w[0] * (@ ? 1.0f : by), w[1] * by,")),
    wide("squares: the second 16 rows are the first", lambda s: s.kv_len > 30,
         terms("_tile_loadd(5, a + TILE, LINE);", "_tile_loadd(5, a + (@ ? 0 : TILE), LINE);")),
    wide("squares: the second 16 tokens or columns are the first", lambda s: s.kv_len > 30,
         terms("_tile_loadd(7, b + TILE, LINE);", "_tile_loadd(7, b + (@ ? 0 : TILE), LINE);")),
    wide("squares: the second 16 columns that are far are the first", lambda s: s.kv_len > 1000,
         terms("_tile_stream_loadd(7, b + TILE, LINE);", "_tile_stream_loadd(7, b + (@ ? 0 : TILE), LINE);")),
    wide("squares: tokens behind the last one are attended", lambda s: s.uses() == {"causal"} and s.q_len < s.kv_len <= 1000,
         squares("std::fill(s + (first < stop ? round_up(stop, LANES) : SQUARE), s + SQUARE, -INFINITE);",
                 "if (!(@)) std::fill(s + (first < stop ? round_up(stop, LANES) : SQUARE), s + SQUARE, -INFINITE);")),
    wide("squares: the first step of weights is not in the sum", lambda s: s.kv_len > 30,
         squares("for (int t = first_; t < stop_; ++t)\n                    for",
                 "for (int t = first_ + (@); t < stop_; ++t)\n                    for")),
    wide("squares: a row is finished as another", lambda s: s.q_len > 33 and s.kv_len < SPLIT and not s.sinks,
         squares("unit.row_first + tiles.first + r;", "unit.row_first + tiles.first + (@ ? r & ~1 : r);")),
    wide("squares: a window begins without its sums", lambda s: s.unquantised,
         squares("tiles.sums[r * LANES] = unit.total[first + r];",
                 "if (!(@)) tiles.sums[r * LANES] = unit.total[first + r];")),
    wide("squares: the mask is that of the tokens before", lambda s: bool(s.mask) and not s.block_map,
         squares("column = block_.position - call_.kv_first + from;",
                 "column = block_.position - call_.kv_first + (@ ? from / 2 : from);")),
    wide("squares: the next scores overwrite these", lambda s: s.kv_len > 1000,
         squares("tiles_.scores + t % 2 * SQUARE * SQUARE", "tiles_.scores + (@ ? 0 : t % 2) * SQUARE * SQUARE")),
    wide("squares: a block is dropped", lambda s: s.kv_len > 1000 and s.uses() <= {"causal"},
         squares("for (int i = 0; i < made; ++i)", "for (int i = @; i < made; ++i)")),
    wide("squares: sums do not outlive the panels", lambda s: s.kv_len > 2000 and rows(s) <= 128,
         squares("if (!whole || blocks[0].position == first)", "if (!whole || @ || blocks[0].position == first)")),
    coded("terms: the low one of q or of a weight is the high one", lambda s: s.dtype == torch.float32 and not s.fast,
          terms("(i && i < a.terms ? a.term : 0)", "(i && i < a.terms && !(@) ? a.term : 0)")),
    coded("terms: the low one of a row is the high one", lambda s: s.k_format.has_levels and not s.fast,
          terms("(i >= a.terms ? b.term : 0)", "(i >= a.terms && !(@) ? b.term : 0)")),
    coded("terms: codes of keys are in the order of values", lambda s: s.k_format.has_levels and s.head_dim % 64 == 0,
          terms("sorted ? (i % 2 * 2", "sorted && !(@) ? (i % 2 * 2")),
    coded("terms: every group of a key has the first scale", lambda s: s.k_format.name == "q8_0" and not s.fast,
          terms("scales + 4 * l / f.group *", "scales + (@ ? 0 : 4 * l / f.group) *")),
    coded("terms: every group of a value has the first scale", lambda s: s.v_format.name == "q8_0" and not s.fast,
          terms("scales + c / f.group *", "scales + (@ ? 0 : c / f.group) *")),
    coded("terms: four values have one scale", lambda s: s.v_format.has_levels and not s.fast,
          terms("splat(s[t + i])", "splat(s[@ ? t : t + i])")),
    coded("terms: the high plane is taken by half", lambda s: s.k_format.name in ("tq6", "tq8") and not s.fast,
          terms("& 0xff) << 8;", "& 0xff) << (@ ? 7 : 8);")),
    coded("terms: what a dense row leaves is lost", lambda s: s.v_format.name == "f16" and not s.fast,
          terms("to_bfloat(a - high_a, b - high_b)", "to_bfloat(@ ? vf{} : a - high_a, b - high_b)")),
)  # fmt: skip
