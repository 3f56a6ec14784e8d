"""Before the first cache is made: do the kernels compute here what torch's CPU backend computes?"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import torch

from ..backends import tiled
from ..backends.metal import launches
from ..config import LayerPolicy
from ..errors import GyroKVError
from ..formats import FORMATS
from ..layer import LayerCache
from ..masks import BlockMap
from ..quant import Codec
from ..spec import AttentionSpec
from .attention import attend
from .machine import machine
from .packed import PackedKVCache

_LIMIT = 1e-2  # absolute, on outputs of order 1: room for a rare code next to a boundary


@cache
def check() -> None:
    """Raise GyroKVError if a small problem, decode and prefill, or the block map of a mask comes out otherwise than in
    torch.

    No Apple GPU has run these kernels before a user's does, and here is no other backend to fall back on.
    """
    fmt = next(f for f in FORMATS.values() if f.coding == "sign_magnitude" and f.corrected)
    random = torch.Generator().manual_seed(0)
    layer = PackedKVCache(LayerPolicy(fmt.name, fmt.name))
    plain = LayerCache(Codec(fmt, 64), Codec(fmt, 64), kv_heads=1)
    for tokens in (70, 1):
        q, k, v = (torch.randn(1, heads, tokens, 64, generator=random) for heads in (2, 1, 1))
        handles = layer.update_and_fetch(mx.array(k.numpy()), mx.array(v.numpy()))
        got = torch.tensor(attend(mx.array(q.numpy()), *handles, scale=0.125, mask="causal").tolist())
        view = plain.append(k, v)
        spec = AttentionSpec(fmt, fmt, 64, 64, q_heads=2, q_len=tokens, kv_len=view.kv_len, causal=True)
        want, _ = tiled.attend(view.k_codec.query(q), view, spec, None, None, None)
        off = float((got - view.v_codec.output(want)).abs().max())
        if not off <= _LIMIT:
            raise _wrong(f"outputs differ from torch's by {off:.3g} (limit {_LIMIT:g})")
    i = torch.arange(200)
    mask = torch.where((i[:70, None] // 64 == i // 64) | (i >= 128), 0.0, -torch.inf)[None, None]  # tiles of every state
    mask[..., 5, 150] = -1.5
    tile = (64, 64)
    if launches.states(machine(), mx.array(mask.numpy()), tile).tolist() != BlockMap.build(mask, tile).states.tolist():
        raise _wrong("the block map of a mask differs from torch's")


def _wrong(what: str) -> GyroKVError:
    return GyroKVError(f"gyrokv.mlx computes wrongly on this machine: {what}; please report it")
