"""Flash attention in plain torch: packed rows are decoded a tile at a time and never held whole.

Runs on any device that torch has, in float32. Online softmax: Milakov and Gimelshein 2018; tiling: FlashAttention
(Dao et al. 2022).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..masks import ALL, SKIP, BlockMap, apply_mask
from ..quant import decode
from ..reference import visible
from ..spec import AttentionSpec, alibi_slopes
from ..view import KVView, rows_of

name = "torch"
UNDERSTANDS = frozenset(
    ("causal", "window", "softcap", "alibi", "mask", "block_map", "sinks", "starts", "ring", "unquantised", "fast")
)
_SCORES = 2**19  # float32 scores held at once (2 MiB, so that they stay in a cache), while a tile keeps its least width


def missing() -> list[str]:
    return []


def why_not(spec: AttentionSpec) -> list[str]:
    if spec.dtype == torch.float64:
        return ["dtype=torch.float64 (it computes in float32)"]
    return []


def tile(spec: AttentionSpec) -> tuple[int, int]:
    """All rows by as many keys as keep the scores within 2 MiB: 64 to 512, a power of two."""
    keys = max(1, _SCORES // (spec.batch * spec.q_heads * spec.q_len))
    return spec.q_len, min(512, max(64, 2 ** int(math.log2(keys))))


def attend(
    q: Tensor, view: KVView, spec: AttentionSpec, mask: Tensor | None, block_map: BlockMap | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, kv_heads, groups, q_len = spec.batch, spec.kv_heads, spec.groups, spec.q_len
    q = q.to(torch.float32).unflatten(1, (kv_heads, groups))
    slopes = alibi_slopes(spec.q_heads, spec.alibi).to(q.device) if spec.alibi else None
    top = q.new_full((batch, kv_heads, groups, q_len), -math.inf)
    total = torch.zeros_like(top)
    if sinks is not None:
        top = sinks.to(torch.float32).view(1, kv_heads, groups, 1).expand_as(top).clone()
        total = torch.where(top > -math.inf, 1.0, 0.0)
    out = q.new_zeros(batch, kv_heads, groups, q_len, view.v_codec.padded)
    q_first = view.length - q_len
    keys = tile(spec)[1]

    for position, count, k, v in _tiles(view, keys):
        # rows that may see this tile: from its first key on (causal), up to the window after its last
        lookahead = spec.causal or spec.window is not None
        low = max(0, position - q_first) if lookahead else 0
        high = q_len if spec.window is None else min(q_len, position + count - 1 + spec.window - q_first)
        column = (position - view.first) // keys
        states = None if block_map is None else block_map.states[..., column]
        if low >= high or (states is not None and bool((states == SKIP).all())):
            continue
        scores = (q[..., low:high, :] @ k.unsqueeze(2).mT) * spec.scale
        if spec.softcap:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        scores = scores.flatten(1, 2)
        if mask is not None and not (states is not None and bool((states == ALL).all())):
            part = mask[..., position - view.first : position - view.first + count]
            part = part if part.shape[-2] == 1 else part[..., low:high, :]
            scores = apply_mask(scores, part, slopes)
        partly = lookahead and not _all_seen(spec, position, count, q_first + low, q_first + high - 1)
        if partly or view.starts is not None:
            seen = visible(
                torch.arange(q_first + low, q_first + high, device=q.device),
                torch.arange(position, position + count, device=q.device),
                causal=spec.causal,
                window=spec.window,
                starts=view.starts,
            )
            scores = scores.masked_fill(~seen, -math.inf)
        scores = scores.unflatten(1, (kv_heads, groups))
        old = top[..., low:high]
        new = torch.maximum(old, scores.amax(-1))
        finite = new.masked_fill(new == -math.inf, 0.0)
        weights = torch.exp(scores - finite.unsqueeze(-1))
        rescale = torch.exp(old - finite)
        total[..., low:high] = total[..., low:high] * rescale + weights.sum(-1)
        out[..., low:high, :] = out[..., low:high, :] * rescale.unsqueeze(-1) + weights @ v.unsqueeze(2)
        top[..., low:high] = new

    out = out / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    return out.flatten(1, 2), (top + total.log()).flatten(1, 2)


def _tiles(view: KVView, keys: int):
    """``(position, count, k [B, Hkv, n, padded], v)`` in float32, oldest first. Tiles start at multiples of ``keys``
    from the first key held, whatever the segments, so that a block map's columns are tiles."""
    for segment in view.segments:
        position = segment.first
        while position < segment.stop:
            end = min(segment.stop, position + keys - (position - view.first) % keys)
            for slot, count in segment.runs(position, end):
                k = decode(rows_of(segment.k, slot, count), segment.k_format, view.k_codec.head_dim)
                v = decode(rows_of(segment.v, slot, count), segment.v_format, view.v_codec.head_dim)
                yield position, count, k, v
                position += count


def _all_seen(spec: AttentionSpec, position: int, count: int, q_first: int, q_last: int) -> bool:
    """True when position alone lets every row from ``q_first`` to ``q_last`` see every key of the tile."""
    behind = position + count - 1 <= q_first
    return behind and (spec.window is None or q_last - position < spec.window)
