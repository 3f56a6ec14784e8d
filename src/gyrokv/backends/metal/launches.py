"""From a call to launches of kernels, for arrays of any library: what torch tensors and MLX arrays share.

A *machine* has the arrays: ``strides(x)``, in elements; ``constant(tensor)``, a torch tensor of the CPU as an array;
``launch(program, inputs, ints, floats, groups, outputs)``, which runs a :class:`Program` over ``groups`` threadgroups
and returns the ``outputs``, given as (shape, type name) or as arrays to write to with (array, strides);
``concatenate(arrays)`` along the first axis; ``fill(shape, value)``, float32.

The keys of a view lie in segments of different formats, and a decode step is cut into splits. Both are parts of one
softmax: every launch returns normalised outputs and their log-sum-exp, and one more joins them. Learned sinks belong
to the first part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...formats import KVFormat
from ...quant import Codec
from ...rotation import ROTATIONS, sign_table
from ...spec import AttentionSpec, alibi_slopes
from ...view import KVView, Segment
from . import kernels
from .kernels import Program

TILE_KEYS = 64  # keys that share a state of a block map: a multiple of every kernel's blocks
TILE_ROWS = 64
_DECODE_BLOCK = 32  # keys


class Tuning(NamedTuple):
    """``decode_rows``: more query rows of a KV head than these go to the prefill kernel. ``split_groups``: threadgroups
    that a decode step is split into, if each gets ``split_keys`` keys. ``map_elements``: a mask of at least as many
    queries times keys gets a block map, if none is given."""

    decode_rows: int = 32
    split_groups: int = 64
    split_keys: int = 512
    map_elements: int = 1 << 16


TUNING = Tuning()


def attend(
    machine: Any,
    q: Any,
    view: KVView,
    spec: AttentionSpec,
    mask: Any = None,
    block_map: Any = None,
    sinks: Any = None,
    tuning: Tuning | None = None,
) -> tuple[Any, Any]:
    """``(out [B, Hq, Tq, padded], lse [B, Hq, Tq])``, float32. ``mask``: four axes; ``block_map``: its states, four axes,
    for tiles of ``tile(spec)``; ``sinks [Hq]`` float32."""
    tuning = tuning or TUNING
    shape = (spec.batch, spec.q_heads, spec.q_len)
    v_dim = view.v_codec.padded
    if not view.segments:
        lse = machine.fill(shape, -math.inf) if sinks is None else machine.fill(shape, 0.0) + sinks[None, :, None]
        return machine.fill((*shape, v_dim), 0.0), lse
    heads = _heads(machine, spec, sinks)
    starts = view.starts if view.starts is not None else machine.constant(_zeros(spec.batch))
    nothing = machine.constant(_zeros(1))
    shared = {"q": q, "heads": heads, "starts": starts, "mask": nothing, "map": nothing}
    ints = dict(
        batch=spec.batch, q_heads=spec.q_heads, kv_heads=spec.kv_heads, groups=spec.groups, q_len=spec.q_len,
        q_first=view.length - spec.q_len, kv_first=view.first, causal=int(spec.causal), window=spec.window or 0,
    )  # fmt: skip
    ints |= _strides("q", "bht", machine.strides(q))
    ints |= dict.fromkeys(("mask_b", "mask_h", "mask_q", "mask_k", "map_b", "map_h", "map_q", "map_k"), 0)
    ints |= dict(map_rows=1, map_keys=1)
    if mask is not None:
        shared["mask"] = mask
        ints |= _strides("mask", "bhqk", machine.strides(mask))
        if block_map is None and spec.q_len * spec.kv_len >= tuning.map_elements:
            block_map = states(machine, mask, tile(spec))
    if block_map is not None:
        shared["map"] = block_map
        rows, keys = tile(spec)
        ints |= _strides("map", "bhqk", machine.strides(block_map)) | dict(map_rows=rows, map_keys=keys)
    outs, lses = [], []
    for i, segment in enumerate(view.segments):
        options = (mask is not None, block_map is not None, tuning)
        program, tiles, own = _plan(segment, view, spec, *options)
        inputs = shared | _rows(machine, segment, view)
        numbers = ints | own | _row_strides(machine, segment) | dict(sinks=int(sinks is not None and i == 0))
        splits = own["splits"]
        out, lse = machine.launch(
            program,
            [inputs[name] for name in program.inputs],
            [numbers[name] for name in program.ints],
            [spec.scale, spec.softcap],
            (splits, tiles, spec.batch * spec.kv_heads),
            [((splits, *shape, v_dim), "float32"), ((splits, *shape), "float32")],
        )
        outs.append(out)
        lses.append(lse)
    if len(outs) > 1:
        outs, lses = [machine.concatenate(outs)], [machine.concatenate(lses)]
    if outs[0].shape[0] == 1:
        return outs[0][0], lses[0][0]
    return _merge(machine, outs[0], lses[0], ints, spec)


def tile(spec: AttentionSpec) -> tuple[int, int]:
    """Rows and keys of a block map's tiles."""
    return min(spec.q_len, TILE_ROWS), TILE_KEYS


def states(machine: Any, mask: Any, tile: tuple[int, int]) -> Any:
    """:class:`BlockMap`'s states of ``mask`` (four axes) for tiles of (rows, keys), made on the GPU."""
    batch, heads, q_len, kv_len = mask.shape
    program, (rows, keys) = kernels.block_map(), tile
    shape = (batch, heads, -(-q_len // rows), -(-kv_len // keys))
    numbers = dict.fromkeys(program.ints, 0) | _strides("mask", "bhqk", machine.strides(mask))
    numbers |= dict(q_heads=heads, q_len=q_len, stop=kv_len, map_rows=rows, map_keys=keys)
    groups = (-(-shape[3] // kernels.MAP_GROUPS), shape[2], batch * heads)
    floats = [0.0] * len(program.floats)
    return machine.launch(program, [mask], [numbers[name] for name in program.ints], floats, groups, [(shape, "uint8")])[0]


def _merge(machine: Any, outs: Any, lses: Any, ints: dict, spec: AttentionSpec) -> tuple[Any, Any]:
    splits, *shape = outs.shape
    program = kernels.merge(shape[-1])
    numbers = dict.fromkeys(program.ints, 0) | ints | dict(splits=splits)
    rows = spec.batch * spec.q_heads * spec.q_len
    return machine.launch(
        program,
        [outs, lses],
        [numbers[name] for name in program.ints],
        [spec.scale, spec.softcap],
        (-(-rows // kernels.MERGE_GROUPS), 1, 1),
        [(tuple(shape), "float32"), (tuple(shape[:-1]), "float32")],
    )


def _plan(
    segment: Segment, view: KVView, spec: AttentionSpec, mask: bool, block_map: bool, tuning: Tuning
) -> tuple[Program, int, dict]:
    """The program, tiles of query rows, and the numbers that say how the segment's keys are cut up."""
    k = kernels.side(segment.k_format, view.k_codec.head_dim, view.k_codec.padded)
    v = kernels.side(segment.v_format, view.v_codec.head_dim, view.v_codec.padded)
    rows = spec.groups * spec.q_len
    if rows <= tuning.decode_rows:
        size = kernels.decode_rows(rows, k.dim, v.dim)
        program, keys = kernels.decode(size, k, v, mask, block_map), _DECODE_BLOCK
    else:
        program = kernels.prefill(k, v, mask, block_map)
        simdgroups = program.threads // kernels.LANES
        size, keys = _prefill_rows(program), 8 * simdgroups
    tiles = -(-rows // size)
    blocks = -(-(segment.stop - view.first) // keys) - (segment.first - view.first) // keys
    wanted = tuning.split_groups // (tiles * spec.batch * spec.kv_heads)
    splits = max(1, min(wanted, blocks * keys // tuning.split_keys))
    per_split = -(-blocks // splits)
    own = dict(
        first=segment.first, stop=segment.stop, base=segment.base, capacity=segment.capacity, blocks=per_split,
        splits=-(-blocks // per_split),
    )  # fmt: skip
    return program, tiles, own


def _prefill_rows(program: Program) -> int:
    return next(length for _, name, length in program.arrays if name == "inverse")


def _rows(machine: Any, segment: Segment, view: KVView) -> dict:
    """Words, scales and levels; rows without scales hand their words over twice."""
    found = {}
    for name, packed, fmt, codec in (
        ("k", segment.k, segment.k_format, view.k_codec),
        ("v", segment.v, segment.v_format, view.v_codec),
    ):
        found[f"{name}_words"] = packed.words
        found[f"{name}_scale"] = packed.scale if packed.scale.shape[-1] else packed.words
        found[f"{name}_levels"] = machine.constant(kernels.levels(fmt, codec.head_dim))
    return found


def _row_strides(machine: Any, segment: Segment) -> dict:
    found = {}
    for name, packed in (("k", segment.k), ("v", segment.v)):
        found |= _strides(name, "bht", machine.strides(packed.words))
        scaled = packed.scale.shape[-1] > 0
        found |= _strides(f"{name}s", "bht", machine.strides(packed.scale) if scaled else (0, 0, 0))
    return found


def _strides(name: str, axes: str, strides: Sequence[int]) -> dict:
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, strides)}


@cache
def _zeros(count: int) -> Tensor:
    return kernels.padded_array(torch.zeros(count, dtype=torch.int64))


@cache
def _slopes(q_heads: int, max_bias: float) -> Tensor:
    slopes = alibi_slopes(q_heads, max_bias).float() if max_bias else torch.ones(q_heads)
    return kernels.padded_array(torch.cat((torch.full((q_heads,), -math.inf), slopes)))


def _heads(machine: Any, spec: AttentionSpec, sinks: Any) -> Any:
    """Sinks and slopes of the query heads, one after the other."""
    found = machine.constant(_slopes(spec.q_heads, spec.alibi))
    return found if sinks is None else machine.concatenate([sinks, found[spec.q_heads :]])


@cache
def _signs(rotation: str, group: int) -> Tensor:
    return torch.cat([sign_table(table, group) for table in ROTATIONS[rotation].signs])


@kernels.per_row
def _encoder_tables(fmt: KVFormat) -> tuple[Tensor, Tensor]:
    if not fmt.has_levels:
        return torch.zeros(8), torch.zeros(8)
    return kernels.padded_array(fmt.level_values), kernels.padded_array(fmt.boundaries)


def encode(machine: Any, x: Any, codec: Codec, outputs: Sequence) -> list:
    """Rows of heads x ``[B, H, T, D]``, which ``codec.prepare`` has been applied to, in a format that is not dense.

    ``outputs``: words and scale, as the machine's ``launch`` takes them; a row without scales writes none.
    """
    fmt, rotation = codec.format, codec.rotation
    program = kernels.encode(fmt, codec.head_dim, rotation)
    _, group = fmt.layout(codec.head_dim)
    l2 = fmt.scale == "l2"
    low, high = (fmt.levels[0], fmt.levels[-1]) if fmt.has_levels else (0.0, 0.0)
    floats = dict(
        rotation_factor=fmt.unit if l2 else 1.0 / math.sqrt(group),
        unscaled_factor=fmt.unit * math.sqrt(group), scale_factor=fmt.scale_factor, low=low, high=high,
        root=math.sqrt(group),
    )  # fmt: skip
    batch, heads, tokens, _ = x.shape
    ints = dict(tokens=tokens) | _strides("x", "bht", machine.strides(x))
    for name, (target, strides) in zip(("w", "s"), outputs):
        ints |= _strides(name, "bht", contiguous(target) if isinstance(target, tuple) else strides)
    tables = [machine.constant(t) for t in (_signs(rotation, group), *_encoder_tables(fmt))]
    return machine.launch(
        program,
        [x, *tables],
        [ints[name] for name in program.ints],
        [floats[name] for name in program.floats],
        (-(-tokens // kernels.ENCODE_GROUPS), heads, batch),
        outputs,
    )


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of an array without gaps; 0 for an axis of one element, as masks are broadcast."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(0 if size == 1 else step)
        step *= size
    return tuple(reversed(strides))
