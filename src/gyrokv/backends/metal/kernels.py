"""What is compiled: a kernel of ``msl/``, the integers that specialise it, its threadgroup memory. No device is needed.

A :class:`Program` is the text that both entries share: the cores as a header, and the body of a kernel that declares
the threadgroup arrays and calls one of them. ``torch_mps.py`` puts a signature around the body, MLX writes its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, wraps
from pathlib import Path

import torch
from torch import Tensor

from ...formats import KVFormat
from ...quant import code_values, scale_divisor
from ...rotation import ROTATIONS

MSL = Path(__file__).resolve().parent / "msl"
THREADGROUP_BYTES = 32768  # on every Apple GPU
LANES = 32
MERGE_GROUPS = ENCODE_GROUPS = MAP_GROUPS = 4  # SIMD-groups of a threadgroup
DECODE_GROUPS = 4
_REGISTERS = 72  # values of q and of the output that a thread of the decode kernel holds at most
_LEAST = 8  # elements of an array: MLX hands smaller ones over in another address space

ATTEND_INTS = (
    "batch", "q_heads", "kv_heads", "groups", "q_len", "q_first", "kv_first", "first", "stop", "base", "capacity",
    "blocks", "splits", "causal", "window", "sinks", "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "ks_b", "ks_h", "ks_t",
    "v_b", "v_h", "v_t", "vs_b", "vs_h", "vs_t", "mask_b", "mask_h", "mask_q", "mask_k", "map_b", "map_h", "map_q",
    "map_k", "map_rows", "map_keys",
)  # fmt: skip
ATTEND_FLOATS = ("scale", "softcap")
ATTEND_INPUTS = (
    "q", "k_words", "k_scale", "v_words", "v_scale", "k_levels", "v_levels", "heads", "starts", "mask", "map",
)  # fmt: skip
ENCODE_INTS = ("tokens", "x_b", "x_h", "x_t", "w_b", "w_h", "w_t", "s_b", "s_h", "s_t")
ENCODE_FLOATS = ("rotation_factor", "unscaled_factor", "scale_factor", "low", "high", "root")
POSITIONS = {
    "threadgroup_position_in_grid": "uint3",
    "simdgroup_index_in_threadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
}
_WHERE = ", ".join(POSITIONS)
_INCLUDES = """#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
using namespace metal;
#define UNROLL _Pragma("clang loop unroll(full)")
namespace gyrokv {
"""


@dataclass(frozen=True)
class Program:
    """``arrays``: (type, name, length) of what lies in threadgroup memory. ``threads``: of a threadgroup."""

    kernel: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ints: tuple[str, ...]
    floats: tuple[str, ...]
    files: tuple[str, ...]
    arrays: tuple[tuple[str, str, int], ...]
    call: str
    threads: int

    @property
    def threadgroup_bytes(self) -> int:
        """Bytes of threadgroup memory, each array aligned to 16."""
        size = {"float": 4, "int": 4, "ushort": 2}
        return sum(-(-size[kind] * length // 16) * 16 for kind, _, length in self.arrays)

    @cached_property
    def header(self) -> str:
        """The cores, and the structure of the numbers that a call passes."""
        fields = "".join(f"  long {name};\n" for name in self.ints) + "".join(f"  float {name};\n" for name in self.floats)
        values = [f"ints[{i}]" for i in range(len(self.ints))] + [f"floats[{i}]" for i in range(len(self.floats))]
        cores = "".join(_text(name) for name in self.files)
        return (
            f"{_INCLUDES}struct Call {{\n{fields}}};\n"
            "template <typename Ints, typename Floats>\nMETAL_FUNC Call load_call(Ints ints, Floats floats) {\n"
            f"  Call c = {{{', '.join(values)}}};\n  return c;\n}}\n{cores}}}  // namespace gyrokv\n"
        )

    @cached_property
    def body(self) -> str:
        """The statements of the kernel; inputs, outputs, ``ints``, ``floats`` and positions are its arguments."""
        declared = "".join(f"  threadgroup {kind} {name}[{length}];\n" for kind, name, length in self.arrays)
        return f"{declared}  using namespace gyrokv;\n  const Call c = load_call(ints, floats);\n  {self.call}\n"

    @cached_property
    def name(self) -> str:
        """A name for the kernel that no other program has."""
        digest = hashlib.sha256(f"{self.header}{self.body}{self.threads}".encode()).hexdigest()[:12]
        return f"gyrokv_{self.kernel}_{digest}"


@cache
def _text(name: str) -> str:
    return (MSL / name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Side:
    """K or V rows as a kernel reads them: ``Codec`` of ``common.h``, and its length of ``levels``."""

    kind: str
    bits: int
    dim: int
    span: int
    lowest: int

    @property
    def codec(self) -> str:
        return f"Codec<{self.kind}, {self.bits}, {self.dim}, {self.span}, {self.lowest}>"

    @property
    def levels(self) -> int:
        return 2**self.bits if self.kind == "TABLE" else 1


def per_row(make: Callable) -> Callable:
    """``functools.cache`` for functions of a format: by identity, because a row hashes all of its levels."""
    found: dict[tuple, tuple] = {}  # the row is kept, so that no other one can take its place

    @wraps(make)
    def cached(fmt: KVFormat, *others):
        key = (id(fmt), *others)
        if key not in found:
            found[key] = (fmt, make(fmt, *others))
        return found[key][1]

    return cached


@per_row
def side(fmt: KVFormat, head_dim: int, padded: int) -> Side:
    """Rows in ``fmt`` of ``padded`` values that stand for heads of ``head_dim``."""
    if not fmt.has_levels:
        return Side("FLOAT8" if fmt.kind == "float8" else "DENSE", fmt.bits, padded, 0, 0)
    _, group = fmt.layout(head_dim)
    whole = list(range(-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1)))
    linear = code_values(fmt).tolist() == whole and scale_divisor(fmt, head_dim) == 1.0
    kind, lowest = ("LINEAR", whole[0]) if linear else ("TABLE", 0)
    return Side(kind, fmt.bits, padded, min(group, fmt.scale_span or group), lowest)


def padded_array(values: Tensor, fill: float = 0.0) -> Tensor:
    """``values`` flat, with at least as many elements as MLX keeps in the device address space."""
    return torch.nn.functional.pad(values.flatten(), (0, max(0, _LEAST - values.numel())), value=fill)


@per_row
def levels(fmt: KVFormat, head_dim: int) -> Tensor:
    """The value of each stored code, to be multiplied by the scale: float32, on the CPU."""
    if not fmt.has_levels:
        return torch.zeros(_LEAST)
    return padded_array(code_values(fmt) / scale_divisor(fmt, head_dim))


def _tables(k: Side, v: Side) -> tuple[tuple[str, str, int], ...]:
    return ("float", "k_table", k.levels), ("float", "v_table", v.levels)


def _attention(
    kernel: str, rows: int, simdgroups: int, k: Side, v: Side, mask: bool, block_map: bool, arrays: Sequence
) -> Program:
    names = ", ".join((*ATTEND_INPUTS, "out", "lse", "c", *(name for _, name, _ in arrays), _WHERE))
    call = f"{kernel}<{rows}, {simdgroups}, {k.codec}, {v.codec}, {int(mask)}, {int(block_map)}>({names});"
    return Program(
        kernel, ATTEND_INPUTS, ("out", "lse"), ATTEND_INTS, ATTEND_FLOATS, ("common.h", f"{kernel}.h"),
        tuple(arrays), call, LANES * simdgroups,
    )  # fmt: skip


def decode_rows(rows: int, k_dim: int, v_dim: int) -> int:
    """Query rows of a threadgroup of the decode kernel: a power of two, as many as there are and registers hold."""
    most = max(1, _REGISTERS // (-(-k_dim // LANES) + -(-v_dim // LANES)))
    return 2 ** int(math.log2(min(most, 8, 2 ** math.ceil(math.log2(rows)))))


@cache
def decode(rows: int, k: Side, v: Side, mask: bool, block_map: bool) -> Program:
    """The decode kernel for ``rows`` query rows per threadgroup."""
    n = DECODE_GROUPS
    own = (("float", "parts", n * LANES * -(-v.dim // LANES)), ("float", "tops", n * rows), ("float", "totals", n * rows))
    return _attention("decode", rows, n, k, v, mask, block_map, (*own, *_tables(k, v)))


@cache
def prefill(k: Side, v: Side, mask: bool, block_map: bool) -> Program:
    """The prefill kernel with as many query rows per threadgroup as memory and registers hold."""
    wide = max(k.dim, v.dim)
    n = 4 if wide <= 256 else 8
    for fragments in (4, 2, 1):
        queries, keys = 8 * fragments, 8 * n
        arrays = (
            ("float", "rows", queries * wide), ("float", "stage", keys * 32), ("float", "scores", queries * keys),
            ("float", "diagonal", 64 * fragments), ("int", "slots", keys), ("int", "flags", n),
            ("float", "inverse", queries), *_tables(k, v),
        )  # fmt: skip
        program = _attention("prefill", fragments, n, k, v, mask, block_map, arrays)
        if program.threadgroup_bytes <= THREADGROUP_BYTES and queries * v.dim <= 32 * n * 32:
            break
    return program


@cache
def merge(v_dim: int) -> Program:
    """Joins the parts of a split."""
    call = f"merge<{v_dim}, {MERGE_GROUPS}>(parts, lses, out, lse, c, {_WHERE});"
    return Program(
        "merge", ("parts", "lses"), ("out", "lse"), ATTEND_INTS, ATTEND_FLOATS, ("common.h", "decode.h"),
        (), call, LANES * MERGE_GROUPS,
    )  # fmt: skip


@cache
def block_map() -> Program:
    """The states of a mask's tiles."""
    return Program(
        "block_map", ("mask",), ("states",), ATTEND_INTS, ATTEND_FLOATS, ("common.h", "block_map.h"),
        (), f"block_map<{MAP_GROUPS}>(mask, states, c, {_WHERE});", LANES * MAP_GROUPS,
    )  # fmt: skip


_RULES = {"absmax": "ABSMAX", "signed_absmax": "SIGNED_ABSMAX", "l2": "L2", "rms": "RMS", "head": "STATIC"}
_TIES = {"up": "UP", "down": "DOWN", "away": "AWAY", "even": "UP"}


@per_row
def encode(fmt: KVFormat, head_dim: int, rotation: str) -> Program:
    """The append kernel of a format that is not dense."""
    padded, group = fmt.layout(head_dim)
    if not fmt.has_levels:
        group = -(-padded // LANES) * LANES
    span = group if fmt.scale in ("l2", "head") else min(group, fmt.scale_span or group)
    n = ENCODE_GROUPS
    constants = (
        n, head_dim, padded, group, span, fmt.bits, _RULES[fmt.scale], _TIES[fmt.ties], int(ROTATIONS[rotation].mixes),
        int(fmt.kind == "linear"), int(fmt.coding == "sign_magnitude"), int(fmt.corrected),
        int(fmt.scale_dtype == "float16"),
    )  # fmt: skip
    names = f"x, signs, levels, boundaries, words, scale, c, scratch, codes, {_WHERE}"
    return Program(
        "encode", ("x", "signs", "levels", "boundaries"), ("words", "scale"), ENCODE_INTS, ENCODE_FLOATS,
        ("encode.h",), (("float", "scratch", n * group), ("ushort", "codes", n * padded)),
        f"encode<{', '.join(map(str, constants))}>({names});", LANES * n,
    )  # fmt: skip
