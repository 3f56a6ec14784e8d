"""Known bugs of the CPU kernels for matrix units, as in cpu_faults.py."""

from __future__ import annotations

from collections.abc import Callable

from cpu_faults import DIRECT, SPLIT, Fault, attend, plain, rows, spec

from gyrokv.spec import AttentionSpec

_STORED = 16  # the most query rows that take rows as they are stored, with a matrix unit


def squares(old: str, new: str) -> tuple[str, str, str]:
    return "prefill.h", old, new


def stored(fmt, dim: int) -> bool:
    """Some of the formats whose rows are multiplied as they are stored, by a matrix unit for four query rows."""
    return dim % 64 == 0 and fmt.name in ("q8_0", "tq6", "tq8")


def wide(name: str, test: Callable[[AttentionSpec], bool], *edits: tuple[str, str, str]) -> Fault:
    return Fault(name, spec(test), edits, "amx", wide=True)


TILE_FAULTS = (
    Fault(
        "the second tile of query rows is the first",
        lambda c: plain(c.spec) and c.spec.k_format.has_levels and c.spec.v_format.has_levels and rows(c.spec) > _STORED
        and not c.first,
        (("mma.h", "below = 16 * p.a_stride", "below = (@ ? 0 : 16) * p.a_stride"),),
        "amx",
    ),
    Fault(
        "a tile of keys is the one before",
        spec(lambda s: plain(s) and s.k_format.name == "bf16" and rows(s) <= DIRECT and s.head_dim % 32 == 0 and s.causal),
        (("stored.h", "_tile_loadd(5, k[1].at +", "_tile_loadd(5, k[@ ? 0 : 1].at +"),),
        "amx",
    ),
    Fault(
        "the second four query rows are the first",
        spec(lambda s: plain(s) and s.k_format.name == "bf16" and 4 < rows(s) <= _STORED and s.head_dim % 32 == 0),
        (("stored.h", "memory + rows_before / STORED_ROWS *", "memory + (@ ? 0 : rows_before) / STORED_ROWS *"),),
        "amx",
    ),
    Fault(
        "the offset of keys in lines is left in",
        spec(lambda s: plain(s) and stored(s.k_format, s.head_dim) and rows(s) <= 4),
        (("stored.h", "column] -= ZERO * reduce_add(sum)", "column] -= (@ ? 0 : ZERO) * reduce_add(sum)"),),
        "amx",
    ),
    Fault(
        "signed bytes of values keep their offset",
        spec(lambda s: plain(s) and s.v_format.name == "q8_0" and rows(s) <= 4),
        (("packed.h", "store(to, with_sign ? code ^ 0x80 : code);", "store(to, with_sign && !(@) ? code ^ 0x80 : code);"),),
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
        spec(lambda s: plain(s) and s.v_format.name == "q8_0" and rows(s) <= 4 and s.head_dim_v > 64),
        (("stored.h", "fresh = j == s.first[u + 1];", "fresh = j == s.first[u + 1] && !(j && @);"),),
        "amx",
    ),
    Fault(
        "the low part of the weights of lines is dropped",
        spec(lambda s: plain(s) and stored(s.v_format, s.head_dim_v) and rows(s) <= 4 and s.q_len > 1),
        (("stored.h", "_mm512_storeu_si512(at + rows * LINE,", "if (!(@)) _mm512_storeu_si512(at + rows * LINE,"),),
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
        (("stored.h", "q, item % 2, products + item % 2 * products_size);",
          "q, item % 2, products + (@ ? 0 : item % 2) * products_size);"),),
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
        (("lines.h", "rorv_epi32((__m512i)next(row),", "rorv_epi32((__m512i)(@ ? next(row) << 1 : next(row)),"),),
        "amx",
    ),
    Fault(
        "the last token of a block of lines is zeros",
        spec(lambda s: plain(s) and s.uses() <= {"causal"} and stored(s.k_format, s.head_dim) and s.kv_len % 16
             and rows(s) <= 4),
        (("lines.h", "t < count; ++t) std::memcpy(rest", "t < count - (@); ++t) std::memcpy(rest"),),
        "amx",
    ),
    wide("squares: an output is not rescaled", lambda s: s.kv_len > 1000 and s.uses() <= {"causal"},
         squares("store(to, load<vf>(to) * by);", "store(to, load<vf>(to) * (@ ? 1.0f : by));")),
    wide("squares: weights are not rescaled", lambda s: s.kv_len > 1000 and s.uses() <= {"causal"},
         squares("to_bfloat(bfloat_to_float(to) * by)", "to_bfloat(bfloat_to_float(to) * (@ ? 1.0f : by))")),
    wide("squares: the second 16 rows take the weights of the first", lambda s: s.kv_len > 30,
         squares("_tile_loadd(5, a + TILE, LINE);", "_tile_loadd(5, a + (@ ? 0 : TILE), LINE);")),
    wide("squares: the second 16 rows are multiplied with other keys", lambda s: s.kv_len > 30,
         squares("below = 16 * stride;", "below = (@ ? 0 : 16) * stride;")),
    wide("squares: tokens behind the last one are attended", lambda s: s.uses() == {"causal"} and s.q_len < s.kv_len <= 1000,
         squares("std::fill(s + (first < stop ? round_up(stop, LANES) : SQUARE), s + SQUARE, -INFINITE);",
                 "if (!(@)) std::fill(s + (first < stop ? round_up(stop, LANES) : SQUARE), s + SQUARE, -INFINITE);")),
    wide("squares: the first step of weights is not in the sum", lambda s: s.kv_len > 30,
         squares("for (int t = first_; t < stop_; ++t) added", "for (int t = first_ + (@); t < stop_; ++t) added")),
    wide("squares: a row is finished as another", lambda s: s.q_len > 33 and s.kv_len < SPLIT and not s.sinks,
         squares("one.row_first += row,", "one.row_first += @ ? row & ~1 : row,")),
    wide("squares: a window begins without its sums", lambda s: s.unquantised,
         squares("tiles.sums[r * LANES] = unit.total[first + r];",
                 "if (!(@)) tiles.sums[r * LANES] = unit.total[first + r];")),
    wide("squares: the mask is that of the tokens before", lambda s: bool(s.mask) and not s.block_map,
         squares("column = block_.position - call_.kv_first + from;",
                 "column = block_.position - call_.kv_first + (@ ? from / 2 : from);")),
    wide("squares: the next scores overwrite these", lambda s: s.kv_len > 1000,
         squares("tiles_.scores + t % 2 * SQUARE * SQUARE", "tiles_.scores + (@ ? 0 : t % 2) * SQUARE * SQUARE")),
    wide("squares: a block is dropped", lambda s: s.kv_len > 1000 and s.uses() <= {"causal"},
         attend("for (int i = 0; i < made; ++i)\n                        for (int row = begin; row < begin + tiles.rows;",
                "for (int i = @; i < made; ++i)\n                        for (int row = begin; row < begin + tiles.rows;")),
)  # fmt: skip
