"""Flash decoding on NVIDIA GPUs: packed rows expand straight into operands of the tensor cores.

CUDA C++ in ``csrc/``, compiled for one problem at a time by the run-time compiler that comes with torch (``nvrtc.py``);
``plan.py`` says with which constants, ``calls.py`` launches. ``encode.py`` does both for new tokens.

``BOUND``: decode rounds q to half precision per row, relative to its largest value (to two halves or two bytes where
that is free or the output is float32; to bfloat16 where K is; to 14 bits where rows of 2 bits have 512 values), weights to
half precision relative to their largest (two bfloat16 where V is bfloat16 or float32), levels of tables that are not
integers to half precision: relative errors of 2**-12 each, which add up like random walks. Errors of q and of levels are
relative to the scores, so scores of some tens cost more. Prefill rounds weights to the 16-bit type of V:
2**-9 each for bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layer import LayerCache
from ...masks import BlockMap
from ...quant import Codec, Packed
from ...spec import AttentionSpec, features
from ...view import KVView
from . import calls, encode, nvrtc, plan, prefill, shapes, staging, turn
from .prefill import forced

__all__ = [
    "BOUND",
    "DEVICE",
    "UNDERSTANDS",
    "append",
    "append_at",
    "attend",
    "attend_heads",
    "attend_varlen",
    "forced",
    "missing",
    "name",
    "tile",
    "why_not",
    "why_not_append",
]

name = "gpu"
DEVICE = "cuda"
UNDERSTANDS = frozenset(f.name for f in features())
BOUND = 2e-3
_TILE = 64  # tokens and keys that share a state of a block map
_GRID = 65535  # most blocks along y and z
_LENGTH = 2**30


def missing() -> list[str]:
    """Why this machine cannot run it."""
    if not torch.cuda.is_available():
        return ["no NVIDIA GPU that torch can use"]
    if torch.version.hip:
        return ["an NVIDIA GPU (this is an AMD one; its kernels have not been tried)"]
    capability = torch.cuda.get_device_capability()
    reasons = [] if capability >= (8, 0) else [f"compute capability 8.0 (this GPU has {capability[0]}.{capability[1]})"]
    return reasons if nvrtc.compiler_version() else [*reasons, "NVIDIA's run-time compiler, libnvrtc (it comes with torch)"]


def why_not(spec: AttentionSpec) -> list[str]:
    reasons = []
    if spec.device != "cuda":
        reasons.append(f"device={spec.device} (it runs on cuda)")
    if spec.dtype not in calls.Q_TYPES:
        reasons.append(f"dtype={spec.dtype} (it takes {[str(d) for d in calls.Q_TYPES]})")
    for side, fmt, head_dim in (("k", spec.k_format, spec.head_dim), ("v", spec.v_format, spec.head_dim_v)):
        why = plan.why_not_row(fmt, head_dim)
        reasons += [f"{side}_format={fmt.name} ({why})"] if why else []
    for size, value in (("batch", spec.batch), ("kv_heads", spec.kv_heads)):
        if value > _GRID:
            reasons.append(f"{size}={value} (it takes at most {_GRID})")
    if spec.kv_len >= _LENGTH:
        reasons.append(f"kv_len={spec.kv_len} (it takes less than {_LENGTH})")
    return reasons


def tile(spec: AttentionSpec) -> tuple[int, int]:
    return (min(spec.q_len, _TILE), _TILE) if shapes.why_not(spec) else shapes.tile(spec, prefill.portable_room())


def how(spec: AttentionSpec) -> str:
    """Which kernels run ``spec``, and why."""
    why = shapes.why_not(spec)
    if why:
        return f"decode: {why}"
    if prefill.portable_room():
        major, minor = torch.cuda.get_device_capability()
        why = "forced" if major == 9 else f"Hopper's need compute capability 9.0, this GPU has {major}.{minor}"
        return f"prefill, portable kernels ({why})"
    return "prefill; rows that do not lie side by side in 16 bits are copied, a bounded number of them at a time"


def attend(
    q: Tensor, view: KVView, spec: AttentionSpec, mask: Tensor | None, block_map: BlockMap | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    if shapes.why_not(spec):
        return calls.attend(q, view, spec, mask, sinks)
    return prefill.attend(q, view, spec, mask, block_map, sinks)


def attend_varlen(
    q: Tensor, kv: KVView | tuple[Tensor, Tensor, Tensor], bounds: Tensor, spec: AttentionSpec, sinks: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Sequences behind each other in q ``[total_q, Hq, Dk]``, from ``bounds [B + 1]`` on, and in ``kv`` (k ``[total_k, Hkv,
    Dk]``, v and their bounds) or not. As ``attend_heads``; None where queries and keys are not read where they lie."""
    if shapes.why_not(spec) or not q.shape[0] or prefill.portable_room():
        return None
    q_bounds = bounds.to(torch.int32)
    if isinstance(kv, KVView):
        turned = kv.k_codec.query(q)
        rows = staging.Rows(turned, kv, spec)
        if not rows.keys:
            return None
        out, lse = prefill.attend_behind(turned, rows, spec, sinks, q_bounds)
        return kv.v_codec.output(out).to(q.dtype), lse
    k, v, k_bounds = kv
    if not (k.shape[0] and staging.Behind.takes(k, v)):
        return None
    return prefill.attend_behind(q, staging.Behind(k, v, k_bounds.to(torch.int32), spec.kv_len), spec, sinks, q_bounds)


def attend_heads(
    q: Tensor, view: KVView, spec: AttentionSpec, mask: Tensor | None, block_map: BlockMap | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The contract's: decode rotates q and the output in its own kernels, prefill by one before and one after."""
    if shapes.why_not(spec):
        return calls.attend(q, view, spec, mask, sinks, heads=True)
    out, lse = prefill.attend(turn.query(view.k_codec, q), view, spec, mask, block_map, sinks)
    return turn.output(view.v_codec, out, q.dtype), lse


def why_not_append(layer: LayerCache) -> list[str]:
    reasons = [] if layer.device.type == "cuda" else [f"device={layer.device} (it runs on cuda)"]
    for side, codec in (("k", layer.k_codec), ("v", layer.v_codec)):
        why = encode.why_not_row(codec.format, codec.head_dim, codec.rotation)
        reasons += [f"{side}_format={codec.format.name} ({why})"] if why else []
    return reasons


def append(layer: LayerCache, k: Tensor, v: Tensor) -> KVView:
    """:meth:`LayerCache.append`, with rows of K and V encoded by one kernel, in place if they fit.

    The same bytes, but that rotated rows of 16-bit values may hold the other level at a boundary (``encode.is_turned``).
    """
    layer.check_input(k, v)
    codecs = layer.k_codec, layer.v_codec
    found = layer.slots(k.shape[2])
    if found is None:
        stores = tuple(encode.empty_rows(x, codec) for x, codec in zip((k, v), codecs))
        return layer.write(*encode.append(k, v, codecs, stores, encode.Place()), k, v)
    *stores, slot = found
    encode.append(k, v, codecs, stores, encode.Place(slot))
    return layer.fill(k, v)


def append_at(
    stores: tuple[Packed, Packed], codecs: tuple[Codec, Codec], values: tuple[Tensor, Tensor], lengths: Tensor,
    pages: Tensor | None,
) -> bool:  # fmt: skip
    """``place.append_at`` in one launch; False where it cannot."""
    k, v = values
    slots = stores[0].words.shape[2]
    capacity = slots if pages is None else slots * pages.shape[1]
    able = k.device.type == "cuda" and k.shape[2] <= capacity
    if not able or any(encode.why_not_row(c.format, c.head_dim, c.rotation) for c in codecs):
        return False
    encode.append(k, v, codecs, stores, encode.Place(0, 0, capacity, lengths, pages, slots))
    return True
