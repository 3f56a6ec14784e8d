"""Flash attention compiled for the CPU: packed rows are multiplied as integers, or, for many rows of q, as bfloat16.

``csrc/`` is compiled once per instruction set when gyrokv is installed (``build.py``); the best one that this machine
runs is chosen when the library is first used (``native.py``).

``BOUND``: q is rounded per row and group of K's scale, and the weights per row, at most 128 consecutive tokens and
group of V's scale, to 16 bits relative to the largest (where the CPU has int8 dot products, often the sum of two int8);
levels of tables that are not integers to 16 bits too, or, with AVX-512 and without a matrix unit, to 14 bits, and q and
weights to as many as sums of 64 products allow. The products are exact in int32 and summed in float32. A single
rounding of 16 is off by 2**-17 of the largest at most; over the tokens these add up like a random walk, to about 1e-4
of the output when one weight is far above the others. bfloat16 rows take q and weights as two bfloat16 (one where q is
bfloat16, as the output will be: then ``BFLOAT16_BOUND`` holds before that rounding), other dense rows, and all where a
CPU has no products of bfloat16, are computed in float32. Many rows of q with a matrix unit take values of codes and of
float16 as two bfloat16 too, off by 2**-16 of a value at most. ``FAST_BOUND``: with ``fast`` a single int8 or bfloat16,
levels too.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from ...formats import KVFormat
from ...layer import LayerCache
from ...masks import BlockMap
from ...quant import Codec, Packed
from ...spec import AttentionSpec, features
from ...view import KVView
from .. import ragged
from . import calls
from .native import describe, forced, level, missing

__all__ = [
    "BFLOAT16_BOUND", "BOUND", "FAST_BOUND", "UNDERSTANDS", "append", "attend", "attend_heads", "describe", "forced",
    "how", "level", "missing", "name", "tile", "why_not", "why_not_append",
]  # fmt: skip

name = "cpu"
UNDERSTANDS = frozenset(f.name for f in features())
BOUND = 3e-4
BFLOAT16_BOUND = 2e-3
FAST_BOUND = 3e-2
_TILE = 64  # tokens and keys that share a state of a block map


def why_not(spec: AttentionSpec) -> list[str]:
    reasons = []
    if spec.device != "cpu":
        reasons.append(f"device={spec.device} (it runs on the CPU)")
    if spec.dtype == torch.float64:
        reasons.append("dtype=torch.float64 (it computes in float32)")
    sides = (("k", spec.k_format, spec.head_dim), ("v", spec.v_format, spec.head_dim_v))
    return reasons + [reason for side in sides for reason in _why_not_format(*side)]


@lru_cache(maxsize=256)
def _why_not_format(side: str, fmt: KVFormat, head_dim: int) -> tuple[str, ...]:
    what = f"{side}_format={fmt.name}"
    if not fmt.has_levels:
        return () if fmt.dtype in calls.ELEMENTS else (f"{what} (it knows no {fmt.dtype})",)
    _, group = fmt.layout(head_dim)
    span = min(group, fmt.scale_span or group)
    reasons = [f"{what} (groups of {span} values at head_dim={head_dim}; it takes multiples of 32)"] if span % 32 else []
    if fmt.scale_dtype not in calls.SCALES:
        reasons.append(f"{what} (scale_dtype={fmt.scale_dtype}; it knows {list(calls.SCALES)})")
    return tuple(reasons)


def how(spec: AttentionSpec) -> str:
    """For ``explain``: the level, and what it makes of ``fast``."""
    if not spec.fast:
        return f"level {level()}"
    rounding = "rounding as fast allows" if calls.pays(spec, level()) else "as without fast, which takes about as long here"
    return f"level {level()}, {rounding}"


def tile(spec: AttentionSpec) -> tuple[int, int]:
    return min(spec.q_len, _TILE), _TILE


def attend(
    q: Tensor, view: KVView, spec: AttentionSpec, mask: Tensor | None, block_map: BlockMap | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    return ragged.attend(calls.attend, q, view, spec, mask, block_map, sinks)


def attend_heads(
    q: Tensor, view: KVView, spec: AttentionSpec, mask: Tensor | None, block_map: BlockMap | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The contract's: q and outputs are rotated row by row where the kernels read and write them."""
    return ragged.attend(_attend_heads, q, view, spec, mask, block_map, sinks)


_attend_heads = partial(calls.attend, heads=True)


def why_not_append(layer: LayerCache) -> list[str]:
    reasons = [] if layer.device.type == "cpu" else [f"device={layer.device} (it runs on the CPU)"]
    for side, codec in (("k", layer.k_codec), ("v", layer.v_codec)):
        reasons += _why_not_format(side, codec.format, codec.head_dim)
    return reasons


def append(layer: LayerCache, k: Tensor, v: Tensor) -> KVView:
    """:meth:`LayerCache.append`, with rows encoded by the library, in place if they fit: the same bytes."""
    layer.check_input(k, v)
    found = layer.slots(k.shape[2])
    if found is None:
        return layer.write(_encode(layer.k_codec, k), _encode(layer.v_codec, v), k, v)
    *stores, slot = found
    for codec, x, store in zip((layer.k_codec, layer.v_codec), (k, v), stores):
        if codec.format.is_dense:
            store.words.narrow(2, slot, x.shape[2]).copy_(codec.encode(x).words)
        else:
            calls.encode(x, codec, store, slot)
    return layer.fill(k, v)


def _encode(codec: Codec, x: Tensor) -> Packed:
    return codec.encode(x) if codec.format.is_dense else calls.encode(x, codec, calls.empty_rows(x, codec.format))
