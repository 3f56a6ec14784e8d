"""Flash attention for Apple GPUs: Metal kernels that read packed rows, for torch's device "mps".

``msl/`` holds the cores, ``kernels.py`` what specialises them, ``launches.py`` how a call becomes launches, for torch
here (``torch_mps.py``) and for MLX in ``gyrokv.mlx``. All arithmetic on scores and outputs is float32.

The kernels were executed on a CPU executor for MSL (``tests/metal_host``), not yet timed on Apple GPUs: they have not
run there, so the first use on a Mac compares them with PyTorch (:func:`trial`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ...formats import FORMATS, KVFormat
from ...layer import LayerCache
from ...masks import BlockMap
from ...quant import Codec, Packed, saturate
from ...spec import AttentionSpec, features
from ...view import KVView, rows_of
from .. import tiled
from . import kernels, launches, torch_mps

name = "metal"
DEVICE = "mps"
NOTE = "executed on a CPU executor for MSL, not yet timed on Apple GPUs"
UNDERSTANDS = frozenset(f.name for f in features()) - {"lengths", "paged"}
_TRIAL = 1e-2  # absolute, on outputs of order 1, and share of values: room for rare codes next to a boundary


def missing() -> list[str]:
    """Why kernels cannot be launched from torch here. On a Mac the first call tries them."""
    if not torch.backends.mps.is_available():
        why = "finds none" if torch.backends.mps.is_built() else "was built without it"
        return [f"no Apple GPU here (torch's device mps: this torch {why})"]
    if not hasattr(torch.mps, "compile_shader"):
        return [f"torch {torch.__version__} has no torch.mps.compile_shader (it came with 2.7)"]
    return _tried()


def hint() -> str:
    """What to install on a Mac for the same kernels under MLX; empty elsewhere, and where it is installed."""
    if not torch.backends.mps.is_available() or (find_spec("mlx") and find_spec("mlx_lm")):
        return ""
    return "for mlx-lm's models install the extra: pip install 'gyrokv[mlx]'"


@cache
def _tried() -> list[str]:
    return trial(torch_mps.machine())


def trial(machine: torch_mps.Machine) -> list[str]:
    """Why the kernels are not to be used on ``machine``: each is compiled once, and compared with PyTorch.

    No Apple GPU has run them before a user's does, so what its compiler refuses or computes wrongly must end in another
    backend and a reason, not in an error or in wrong text.
    """
    fmt = next(f for f in FORMATS.values() if f.coding == "sign_magnitude" and f.corrected)
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 70, 64, generator=random).to(machine.device) for heads in (2, 1, 1))
    layer, plain = (LayerCache(Codec(fmt, 64), Codec(fmt, 64), kv_heads=1, device=machine.device) for _ in range(2))
    spec = AttentionSpec(fmt, fmt, 64, 64, q_heads=2, q_len=70, kv_len=70, causal=True, device=machine.device.type)
    mask = torch.ones(1, 1, 70, 70, dtype=torch.bool).tril().to(machine.device)
    masked = replace(spec, causal=False, mask="bool")
    decode, prefill = launches.Tuning(decode_rows=10**9, split_keys=32), launches.Tuning(decode_rows=0)
    runs = ((spec, None, decode), (spec, None, prefill), (masked, mask, prefill._replace(map_elements=0)))
    off = []
    try:
        view, want = _append(machine, layer, k, v), plain.append(k, v)
        for problem, seen, tuning in runs:
            got = _attend(machine, view.k_codec.query(q), view, problem, seen, None, None, tuning)
            exact = tiled.attend(view.k_codec.query(q), view, problem, seen, None, None)
            off += [(a - b).flatten() for a, b in zip(got, exact)]
    except (RuntimeError, SyntaxError, TypeError) as error:
        return [f"Metal's compiler or driver refused the kernels: {error}"]
    most = float(torch.cat(off).abs().max())
    other = float((view.decode("k") != want.decode("k")).float().mean())
    if most <= _TRIAL and other <= _TRIAL:
        return []
    return [
        f"outputs of the kernels differ from PyTorch's by {most:.3g}, {other:.3g} of the rows' values too (limit {_TRIAL:g})"
    ]


def why_not(spec: AttentionSpec) -> list[str]:
    reasons = []
    if spec.device != DEVICE:
        reasons.append(f"device={spec.device} (it runs on {DEVICE})")
    if spec.dtype == torch.float64:
        reasons.append("dtype=torch.float64 (it computes in float32)")
    return (
        reasons + _why_not_format("k", spec.k_format, spec.head_dim) + _why_not_format("v", spec.v_format, spec.head_dim_v)
    )


def _why_not_format(side: str, fmt: KVFormat, head_dim: int) -> list[str]:
    if not fmt.has_levels:
        return []
    _, group = fmt.layout(head_dim)
    span = min(group, fmt.scale_span or group)
    if span % kernels.LANES == 0:
        return []
    return [f"{side}_format={fmt.name} (groups of {span} values at head_dim={head_dim}; it takes multiples of 32)"]


def tile(spec: AttentionSpec) -> tuple[int, int]:
    return launches.tile(spec)


def attend(
    q: Tensor, view: KVView, spec: AttentionSpec, mask: Tensor | None, block_map: BlockMap | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _attend(torch_mps.machine(), q, view, spec, mask, block_map, sinks)


def _attend(machine, q, view, spec, mask, block_map, sinks, tuning=None) -> tuple[Tensor, Tensor]:
    q = q if q.stride(3) == 1 else q.contiguous()
    states = None if block_map is None else block_map.states
    sinks = None if sinks is None else sinks.to(torch.float32)
    return launches.attend(machine, q, view, spec, mask, states, sinks, tuning)


def why_not_append(layer: LayerCache) -> list[str]:
    reasons = [] if layer.device.type == DEVICE else [f"device={layer.device} (it runs on {DEVICE})"]
    for side, codec in (("k", layer.k_codec), ("v", layer.v_codec)):
        reasons += _why_not_format(side, codec.format, codec.head_dim)
    return reasons


def append(layer: LayerCache, k: Tensor, v: Tensor) -> KVView:
    """:meth:`LayerCache.append`, with rows encoded by a kernel, in place if they fit."""
    return _append(torch_mps.machine(), layer, k, v)


def _append(machine, layer: LayerCache, k: Tensor, v: Tensor) -> KVView:
    layer.check_input(k, v)
    found = layer.slots(k.shape[2])
    if found is None:
        rows = (_encode(machine, codec, x) for codec, x in ((layer.k_codec, k), (layer.v_codec, v)))
        return layer.write(*rows, k, v)
    *stores, slot = found
    for codec, x, store in zip((layer.k_codec, layer.v_codec), (k, v), stores):
        _encode(machine, codec, x, rows_of(store, slot, x.shape[2]))
    return layer.fill(k, v)


def _encode(machine, codec: Codec, x: Tensor, into: Packed | None = None) -> Packed:
    """Rows of heads x, to ``into`` if it is given."""
    fmt = codec.format
    if fmt.is_dense:
        rows = codec.encode(x)
        return rows if into is None else Packed(into.words.copy_(rows.words), into.scale)
    x = codec.prepare(x)
    x = x if x.dtype in torch_mps.FLOATS else saturate(x, torch.float32)
    x = x if x.stride(3) == 1 else x.contiguous()
    if into is None:
        words = x.new_empty((*x.shape[:3], fmt.words_per_head(codec.head_dim)), dtype=torch.int16)
        scale_dtype = getattr(torch, fmt.scale_dtype) if fmt.has_levels else torch.float32
        into = Packed(words, x.new_empty((*x.shape[:3], fmt.scales_per_head(codec.head_dim)), dtype=scale_dtype))
    targets = [into.words, into.scale if fmt.has_levels else x.new_empty(1, 1, 1, 1)]  # without scales none is written
    launches.encode(machine, x, codec, [(t, machine.strides(t)) for t in targets])
    return into
