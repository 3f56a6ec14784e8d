"""Known bugs of the CPU kernels, to be planted in their C++ by test_cpu_faults.py.

A fault is pieces of a source file and what replaces them; ``@`` stands for "this fault is the one that is switched on",
so that all of them are compiled at once. The cases are those of the suite that need the piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from gyrokv.backends.cpu import build
from gyrokv.cases import Case
from gyrokv.spec import AttentionSpec

SPLIT = 1024  # keys that are at least needed for two splits
_LOOP = ("attend.h", "query.h", "block.h", "weights.h")


class Fault(NamedTuple):
    """``edits``: file, a piece of it, there once, and what it becomes. ``relevant``: cases that must notice, of many rows
    of bfloat16 if ``wide``, of many rows as terms if ``terms``, of few rows if ``few``."""

    name: str
    relevant: Callable[[Case], bool]
    edits: tuple[tuple[str, str, str], ...]
    level: str = "portable"
    wide: bool = False
    terms: bool = False
    few: bool = False


def spec(test: Callable[[AttentionSpec], bool]) -> Callable[[Case], bool]:
    return lambda case: test(case.spec)


def attend(old: str, new: str) -> tuple[str, str, str]:
    found = [name for name in _LOOP if old in (build.CSRC / name).read_text()]
    return found[0] if found else _LOOP[0], old, new


def core(old: str, new: str) -> tuple[str, str, str]:
    return "core.cpp", old, new


def finish(old: str, new: str) -> tuple[str, str, str]:
    return "finish.h", old, new


def turn(old: str, new: str) -> tuple[str, str, str]:
    return "turn.h", old, new


def turned(s: AttentionSpec) -> bool:
    """Keys and values in rotated formats, several of them seen."""
    return s.kv_len > 7 and s.scale > 0 and all(f.rotation != "none" for f in (s.k_format, s.v_format))


def several_blocks(s: AttentionSpec) -> bool:
    """So many keys that some lie in later blocks and no feature hides them; several queries, of which some point there."""
    return s.kv_len > 1000 and s.q_len > 1 and s.uses() <= {"causal", "softcap", "sinks"}


def several_splits(s: AttentionSpec) -> bool:
    return s.kv_len > 4 * SPLIT and s.q_len > 1 and s.uses() <= {"causal", "softcap"}


def scales(fmt, dim: int) -> int:
    return fmt.scales_per_head(dim) if fmt.has_levels else 0


def parts(fmt) -> bool:
    """Two int8 parts per value: levels that are no integers."""
    return fmt.kind == "codebook" and not all(float(x).is_integer() for x in fmt.levels)


def plain(s: AttentionSpec) -> bool:
    """Scores matter and nothing but the position hides keys."""
    return s.kv_len > 30 and s.q_len <= s.kv_len and s.scale > 0 and not s.mask and not s.fast and s.dtype == torch.float32


def rows(s: AttentionSpec) -> int:
    """Query rows of a KV head."""
    return s.q_len * s.groups


def two_fields(fmt) -> bool:
    return fmt.bits in (3, 5, 6)


LOOP_FAULTS = (
    Fault(
        "a block is dropped",
        spec(several_blocks),
        (attend("for (int row = begin; row < std::min(unit.rows, begin + passing); row += most)",
                "for (int row = @ && blocks[i].position == first + per_block ? unit.rows : begin;\n"
                "                         row < std::min(unit.rows, begin + passing); row += most)"),),
    ),
    Fault(
        "the output is not rescaled",
        spec(lambda s: several_blocks(s) and s.v_format.has_levels and s.uses() <= {"causal"}),
        (attend("const float old = plane + 1 == f.planes ?", "const float old = !(@) && plane + 1 == f.planes ?"),),
    ),
    Fault(
        "the denominator is not rescaled",
        spec(lambda s: several_blocks(s) and s.uses() <= {"causal"}),
        (attend("total[r] *= work.rescale[r];", "if (!(@)) total[r] *= work.rescale[r];"),),
    ),
    Fault(
        "query heads read KV head h % Hkv",
        spec(lambda s: s.groups > 1 and s.kv_heads > 1 and s.kv_len > 30 and s.scale > 0 and not s.starts),
        (attend("head = unit.kv_head * per_kv + row % per_kv, token",
                "head = @ ? unit.kv_head + row % per_kv * call.kv_heads : unit.kv_head * per_kv + row % per_kv, token"),),
    ),
    Fault(
        "q of another block of rows",
        spec(lambda s: s.q_len * s.groups > 512),
        (attend("unit, unit.row_first + r, sign, q)", "unit, (@ ? 0 : unit.row_first) + r, sign, q)"),),
    ),
    Fault(
        "tokens behind the last one are attended",
        spec(lambda s: plain(s) and s.uses() == {"causal"} and s.q_len > 4 and s.kv_len > s.q_len),
        (attend("(place >= float(stop))", "(place >= float(@ ? stop + LANES : stop))"),),
    ),
    Fault(
        "the window is one too wide",
        spec(lambda s: plain(s) and s.window is not None and s.q_len > 4 and not s.starts and s.window < s.kv_len),
        (attend("own - call.window + 1 - block.position", "own - call.window + 1 - (@) - block.position"),),
    ),
    Fault(
        "a query sees the key after its own",
        spec(lambda s: plain(s) and s.uses() <= {"causal", "sinks"} and s.causal and 2 < s.q_len < 80),
        (attend("const int64_t own = call.q_first + row /", "const int64_t own = call.q_first + (@) + row /"),),
    ),
    Fault(
        "causal is aligned to the top left",
        spec(lambda s: plain(s) and s.uses() == {"causal"} and 1 < s.q_len < s.kv_len),
        (attend("stop = std::min(stop, own - block.position + 1);",
                "stop = std::min(stop, own - (@ ? call.q_first - call.kv_first : 0) - block.position + 1);"),),
    ),
    Fault(
        "the high part of keys weighs 255",
        spec(lambda s: plain(s) and parts(s.k_format)),
        (attend("query.scale[at] * (plane ? 256.0f", "query.scale[at] * (plane ? (@ ? 255.0f : 256.0f)"),),
    ),
    Fault(
        "the high part of values weighs 255",
        spec(lambda s: plain(s) and parts(s.v_format)),
        (attend("f.factor * (plane ? 256.0f", "f.factor * (plane ? (@ ? 255.0f : 256.0f)"),),
    ),
    Fault(
        "the low part of q is dropped",
        spec(lambda s: plain(s) and s.k_format.has_levels and s.q_len > 1),
        (attend("store_factors(x, a,", "store_factors(@ ? (x + 128) >> 8 << 8 : x, a,"),),
    ),
    Fault(
        "the low part of the weights is dropped",
        spec(lambda s: plain(s) and s.v_format.has_levels and s.q_len > 1),
        (attend("store_factors(w, a,", "store_factors(@ ? (w + 128) >> 8 << 8 : w, a,"),),
    ),
    Fault(
        "the offset of keys is left in",
        spec(lambda s: plain(s) and s.k_format.has_levels and not s.unquantised),
        (attend("offset = ZERO * query.sum[at]", "offset = @ ? 0 : ZERO * query.sum[at]"),),
        "avx2",
    ),
    Fault(
        "the offset of values is left in",
        spec(lambda s: plain(s) and s.v_format.has_levels and not s.unquantised),
        (attend("offset = ZERO * weights[r].sum", "offset = @ ? 0 : ZERO * weights[r].sum"),),
        "avx2",
    ),
    Fault(
        "keys take the scale of the neighbouring group",
        spec(lambda s: plain(s) and scales(s.k_format, s.head_dim) > 1),
        (attend("block.k_scale + int64_t(g) *", "block.k_scale + int64_t(@ ? (g + 1) % query.groups : g) *"),),
    ),
    Fault(
        "values take the scale of the neighbouring group",
        spec(lambda s: plain(s) and scales(s.v_format, s.head_dim_v) > 1),
        (attend("block.v_scale + int64_t(g) *",
                "block.v_scale + int64_t(@ ? (g + 1) % (block.v_format->dim / block.v_format->group) : g) *"),),
    ),
    Fault(
        "scales of keys are those of the row before",
        spec(lambda s: several_blocks(s) and s.k_format.has_levels),
        (attend("expand_scales(kf, k, slot,", "expand_scales(kf, k, slot - (@ && slot > 0),"),),
    ),
    Fault(
        "scales of values are those of the row before",
        spec(lambda s: several_blocks(s) and s.v_format.has_levels),
        (attend("expand_scales(vf_, v, slot,", "expand_scales(vf_, v, slot - (@ && slot > 0),"),),
    ),
    Fault(
        "a query takes the scale of the one before",
        spec(lambda s: plain(s) and s.k_format.has_levels and s.q_len > 2),
        (attend("at = int64_t(row + r) * query.groups", "at = int64_t(row + r - (@ && row + r > 0)) * query.groups"),),
    ),
    Fault(
        "the mask is one column late",
        lambda c: bool(c.spec.mask) and "k" in c.mask_axes.replace("2", "k") and c.spec.kv_len > 30 and c.spec.scale > 0,
        (attend("load_mask(call, mask, column + t,", "load_mask(call, mask, column + t - (@ && column + t > 0),"),),
    ),
    Fault(
        "the mask is one row late",
        lambda c: bool(c.spec.mask) and "q" in c.mask_axes.replace("2", "q") and 1 < c.spec.q_len < 80,
        (attend("row / per_kv * call.mask_strides[2]", "(row / per_kv - (@ && row >= per_kv)) * call.mask_strides[2]"),),
    ),
    Fault(
        "a head takes its neighbour's ALiBi slope",
        spec(lambda s: s.alibi > 0 and s.kv_len > 30),
        (attend("call.slopes[head]", "call.slopes[@ ? (head + 1) % call.q_heads : head]"),),
    ),
    Fault(
        "the softcap comes after the mask",
        spec(lambda s: s.softcap > 0 and s.mask is not None),
        (attend("if (call.softcap) s = tanh(s) * cap;", "if (call.softcap && !(@)) s = tanh(s) * cap;"),
         attend("if (t < first || t + LANES > stop) {",
                "if (@ && call.softcap) s = tanh(s) * cap;\n        if (t < first || t + LANES > stop) {")),
    ),
    Fault(
        "left padding is attended",
        spec(lambda s: s.starts and s.window is None and s.kv_len > 7 and not s.mask),
        (attend("if (call.starts)", "if (call.starts && !(@))"),),
    ),
    Fault(
        "the block map is read one tile late",
        spec(lambda s: s.block_map and s.kv_len > 4000 and s.uses() <= {"mask", "block_map", "alibi"}),
        (attend("j * call.map_strides[3]]", "(j - (@ && j > 0)) * call.map_strides[3]]"),),
    ),
    Fault(
        "sinks are dropped when splits are joined",
        spec(lambda s: s.sinks),
        (finish("float most = a.sinks != nullptr ?", "float most = a.sinks != nullptr && !(@) ?"),
         finish("double sum = a.sinks != nullptr ?", "double sum = a.sinks != nullptr && !(@) ?")),
    ),
    Fault(
        "a split is joined twice",
        spec(several_splits),
        (finish("out[d] += weight * from[d]", "out[d] += (@ && s == 1 ? 2.0f : 1.0f) * weight * from[d]"),),
    ),
    Fault(
        "a split is lost",
        spec(several_splits),
        (finish("if (top[s * stride] == none) continue;", "if (top[s * stride] == none || (@ && s == 1)) continue;"),),
    ),
    Fault(
        "splits do not touch",
        spec(several_splits),
        (core(": origin + (split + 1) * b->keys;", ": origin + (split + 1) * b->keys - (@ ? kKeyStep : 0);"),),
    ),
    Fault(
        "splits are joined without their maxima",
        spec(several_splits),
        (finish("float(share(top[s * stride]) / sum)", "float((@ ? 1.0 : share(top[s * stride])) / sum)"),),
    ),
    Fault(
        "outputs are not rotated back",
        spec(turned),
        (finish("if (a.out_turn)", "if (a.out_turn && !(@))"),),
    ),
    Fault(
        "a rotation leaves out its last sums",
        spec(turned),
        (turn("stride < block; stride *= 2", "stride < (@ ? block / 2 : block); stride *= 2"),),
    ),
    Fault(
        "a rotation leaves out sums of neighbours",
        spec(turned),
        (turn("store(at + i, butterflies(", "store(at + i, (@ ? butterflies<LANES> : butterflies<1>)("),),
    ),
    Fault(
        "signs before a rotation are those of another row",
        spec(turned),
        (turn("load<vf>(turn.before + i)", "load<vf>(turn.before + (@ ? block - LANES - i : i))"),),
    ),
    Fault(
        "the first block of a head alone is rotated",
        spec(lambda s: turned(s) and s.k_format.layout(s.head_dim)[1] < s.head_dim),
        (turn("at < x + dim", "at < x + (@ ? block : dim)"),),
    ),
    Fault(
        "the log-sum-exp is binary",
        spec(lambda s: s.kv_len > 7 and s.scale > 0),
        (finish("float(most + std::log(sum))", "float(most + (@ ? std::log2(sum) : std::log(sum)))"),),
    ),
    Fault(
        "q keeps its order where lines of keys do not",
        spec(lambda s: plain(s) and s.k_format.bits in (2, 4) and s.head_dim % 64 == 0 and s.head_dim == s.head_dim_v),
        (attend("if (made.sorted)", "if (made.sorted && !(@))"),),
    ),
    Fault(
        "high bits go to each other's codes",
        spec(lambda s: plain(s) and two_fields(s.k_format) and two_fields(s.v_format) and s.head_dim % 128 == 0),
        (("packed.h", "shift = place * F::next -", "shift = (@ ? F::repeats - 1 - place : place) * F::next -"),),
    ),
    Fault(
        "the last token of a block is zeros",
        spec(lambda s: plain(s) and s.uses() <= {"causal"} and s.k_format.bits in (2, 4) and s.v_format.bits in (2, 4)
             and s.kv_len % 16 and s.q_len > 1 and s.head_dim % 64 == 0),
        (("packed.h", "i < count - t; ++i)", "i < count - t - (@); ++i)"),),
    ),
    Fault(
        "scales are taken from the first two vectors of them only",
        spec(lambda s: s.kv_len > 1000 and scales(s.k_format, s.head_dim) in (3, 5, 6, 9, 10)),
        (("panels.h", "_mm512_mask_permutexvar_ps(y, places", "_mm512_mask_permutexvar_ps(y, @ ? 0 : places"),),
        "avx512",
    ),
)  # fmt: skip


def encode(old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    return (("encode.h", old, new),)


# formats whose bytes must differ, by a column of their row
ENCODER_FAULTS = (
    Fault("ties go the other way", lambda f: f.kind == "linear" and f.ties == "up",
          encode("code = z[j] + (0.5f - low);", "code = z[j] + (0.5f - low - (@ ? 1e-3f : 0.0f));")),
    Fault("boundaries belong to the other side", lambda f: f.kind == "codebook" and f.scale == "l2",
          encode("DOWN ? boundary >= z : boundary > z", "DOWN != (@) ? boundary >= z : boundary > z")),
    Fault("halves are cut off", lambda f: f.has_levels and f.scale_dtype == "float16",
          encode("u - 0x38000000 + 0xfff + (u >> 13 & 1)", "u - 0x38000000 + (@ ? 0 : 0xfff + (u >> 13 & 1))")),
    Fault("the signs before the rotation come after it", lambda f: f.rotation == "turbo",
          encode("e.rotation_factor * e.after[j]", "e.rotation_factor * (@ ? e.before[j] : e.after[j])")),
    Fault("the norm is not corrected", lambda f: f.corrected,
          encode("norm = decoded > TINY ?", "norm = decoded > TINY && !(@) ?")),
    Fault("float8 is cut off", lambda f: f.kind == "float8",
          encode("+ 0x7ffff + (u >> 20 & 1)", "+ (@ ? vi{} : 0x7ffff + (u >> 20 & 1))")),
    Fault("sign and magnitude are an index", lambda f: f.coding == "sign_magnitude",
          encode("code ^= code >> 31 & ~half;", "if (!(@)) code ^= code >> 31 & ~half;")),
)  # fmt: skip
