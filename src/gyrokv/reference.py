"""What attention means: one slow function, dense, in float64 by default. Nothing else defines it.

Order of operations on a score: scale, softcap, additive bias, masks, softmax with learned sinks (see ``attention``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .masks import apply_mask
from .spec import alibi_slopes


def visible(
    q_positions: Tensor,
    k_positions: Tensor,
    *,
    causal: bool,
    window: int | None,
    starts: Tensor | None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Which keys each query sees by position alone: bool ``[B or 1, 1, Tq, Tkv]``.

    Positions ``[Tq]`` or ``[B, Tq]`` of queries, ``[Tkv]`` or ``[B, Tkv]`` of keys. causal: position k <= position q.
    window w: 0 <= q - k < w. ``starts [B]``: first position of each sequence. ``lengths [B or 1]``: where each ends.
    """
    q_positions, k_positions = (x if x.ndim == 2 else x[None] for x in (q_positions, k_positions))
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= (distance >= 0) & (distance < window)
    seen = seen[:, None]
    if starts is not None:
        seen = seen & (k_positions >= starts[:, None])[:, None, None, :]
    if lengths is not None:
        seen = seen & (k_positions < lengths[:, None])[:, None, None, :]
    return seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    alibi: float = 0.0,
    sinks: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention of q ``[B, Hq, Tq, Dk]`` over k ``[B, Hkv, Tkv, Dk]``, v ``[B, Hkv, Tkv, Dv]``, computed in ``dtype``.

    Query head h reads KV head ``h // (Hq / Hkv)``. Positions default to keys 0 … Tkv-1 and queries aligned to the
    bottom right (of each sequence's ``lengths``, if given); see :func:`visible`. ``mask`` broadcasts to
    ``[B, Hq, Tq, Tkv]`` (see ``masks.py``); ``alibi`` > 0 multiplies an additive mask by each head's slope.
    ``sinks [Hq]``: one extra logit per query head that joins the maximum and the denominator and has no value (as in
    GPT-OSS). Returns out ``[B, Hq, Tq, Dv]`` and the natural-log log-sum-exp ``[B, Hq, Tq]``, both in ``dtype``. A row
    that sees no key gives out = 0 and lse = -inf (= sink with sinks).
    """
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.to(dtype) for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    q_len, kv_len = q.shape[2], k.shape[2]
    if k_positions is None:
        k_positions = torch.arange(kv_len, device=q.device)
    if q_positions is None:
        q_positions = torch.arange(kv_len - q_len, kv_len, device=q.device)
    if lengths is not None:
        q_positions = lengths[:, None] - q_len + torch.arange(q_len, device=q.device)
    scores = (q @ k.mT) * (1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        full = mask if mask.ndim == 4 else mask[None, None]
        scores = apply_mask(scores, full, alibi_slopes(q.shape[1], alibi) if alibi else None)
    seen = visible(q_positions, k_positions, causal=causal, window=window, starts=starts, lengths=lengths)
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        column = sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    top = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:3], 1), -math.inf)
    weights = torch.exp(scores - top.masked_fill(top == -math.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    out = weights[..., :kv_len] @ v / total.masked_fill(total == 0, 1.0)
    return out, (top + total.log()).squeeze(-1)


def merge(parts: Sequence[tuple[Tensor, Tensor]], sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Join results over disjoint sets of keys: ``parts`` of (out ``[B, H, T, Dv]``, lse ``[B, H, T]``).

    ``sinks [H]`` are added once, here; the parts must have been computed without. Parts that saw nothing
    (lse = -inf) have no weight. Returns (out, lse) as if all keys had been attended at once.
    """
    if not parts:
        raise ValueError("parts is empty; merge needs at least one (out, lse)")
    outs, lses = (torch.stack(x) for x in zip(*parts))
    logits = lses
    if sinks is not None:
        logits = torch.cat((lses, sinks.to(lses)[None, None, :, None].expand(1, *lses.shape[1:])))
    lse = torch.logsumexp(logits, 0)
    weights = torch.exp(lses - lse.masked_fill(lse == -math.inf, 0.0))
    return (weights.unsqueeze(-1) * outs).sum(0), lse
