"""The definition (``reference.py`` in float64 on decoded rows) behind the backend contract. Runs anything, slowly."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import BlockMap
from ..reference import attention
from ..spec import AttentionSpec, features
from ..view import KVView

name = "reference"
UNDERSTANDS = frozenset(f.name for f in features())


def missing() -> list[str]:
    return []


def why_not(spec: AttentionSpec) -> list[str]:
    return []


def tile(spec: AttentionSpec) -> tuple[int, int]:
    return max(1, spec.q_len), max(1, spec.kv_len)


def attend(
    q: Tensor, view: KVView, spec: AttentionSpec, mask: Tensor | None, block_map: BlockMap | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, lse = attention(
        q,
        view.decode("k").to(q.device),
        view.decode("v").to(q.device),
        scale=spec.scale,
        causal=spec.causal,
        window=spec.window,
        softcap=spec.softcap,
        mask=mask,
        alibi=spec.alibi,
        sinks=sinks,
        q_positions=torch.arange(view.length - spec.q_len, view.length, device=q.device),
        k_positions=torch.arange(view.first, view.length, device=q.device),
        starts=_first_held(view),
        lengths=view.lengths,
    )
    return out.float(), lse.float()


def _first_held(view: KVView) -> Tensor | None:
    """The first position that each sequence still holds, or that it begins with; None when it is ``view.first``."""
    if view.lengths is None:
        return view.starts
    held = torch.tensor(
        [part.view.first for part in view.parts() for _ in range(part.view.batch)], device=view.lengths.device
    )
    return held if view.starts is None else torch.maximum(held, view.starts)
