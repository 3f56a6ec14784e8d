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
from ..view import KVView, Segment, rows_of

name = "torch"
UNDERSTANDS = frozenset(
    (
        "causal",
        "window",
        "softcap",
        "alibi",
        "mask",
        "block_map",
        "sinks",
        "starts",
        "ring",
        "unquantised",
        "paged",
        "lengths",
        "fast",
    )  # fmt: skip
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


class _Running:
    """The softmax so far: ``out [B, Hkv, groups, Tq, padded]``, relative to the largest score ``top``, and its ``total``."""

    def __init__(self, q: Tensor, sinks: Tensor | None, padded: int) -> None:
        self.top = q.new_full(q.shape[:-1], -math.inf)
        self.total = torch.zeros_like(self.top)
        if sinks is not None:
            self.top = sinks.to(torch.float32).view(1, *q.shape[1:3], 1).expand_as(self.top).clone()
            self.total = torch.where(self.top > -math.inf, 1.0, 0.0)
        self.out = q.new_zeros(*q.shape[:-1], padded)

    def add(self, scores: Tensor, v: Tensor, low: int, high: int) -> None:
        """Scores ``[B, Hq, high - low, n]`` of rows ``low`` to ``high``, values ``[B, Hkv, n, padded]``."""
        scores = scores.unflatten(1, self.top.shape[1:3])
        old = self.top[..., low:high]
        new = torch.maximum(old, scores.amax(-1))
        finite = new.masked_fill(new == -math.inf, 0.0)
        weights = torch.exp(scores - finite.unsqueeze(-1))
        rescale = torch.exp(old - finite)
        self.total[..., low:high] = self.total[..., low:high] * rescale + weights.sum(-1)
        self.out[..., low:high, :] = self.out[..., low:high, :] * rescale.unsqueeze(-1) + weights @ v.unsqueeze(2)
        self.top[..., low:high] = new

    def result(self) -> tuple[Tensor, Tensor]:
        out = self.out / self.total.masked_fill(self.total == 0, 1.0).unsqueeze(-1)
        return out.flatten(1, 2), (self.top + self.total.log()).flatten(1, 2)


def attend(
    q: Tensor, view: KVView, spec: AttentionSpec, mask: Tensor | None, block_map: BlockMap | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    q = q.to(torch.float32).unflatten(1, (spec.kv_heads, spec.groups))
    slopes = alibi_slopes(spec.q_heads, spec.alibi).to(q.device) if spec.alibi else None
    running = _Running(q, sinks, view.v_codec.padded)
    if spec.paged or spec.lengths:
        _ragged(running, q, view, spec, mask, slopes)
    else:
        _even(running, q, view, spec, mask, slopes, block_map)
    return running.result()


def _scores(q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
    """``[B, Hq, Tq, n]`` before masks; q ``[B, Hkv, groups, Tq, padded]``, k ``[B, Hkv, n, padded]``."""
    scores = (q @ k.unsqueeze(2).mT) * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    return scores.flatten(1, 2)


def _even(
    running: _Running,
    q: Tensor,
    view: KVView,
    spec: AttentionSpec,
    mask: Tensor | None,
    slopes: Tensor | None,
    block_map: BlockMap | None,
) -> None:
    """All sequences hold the same positions: tiles of positions."""
    q_len, q_first, keys = spec.q_len, view.length - spec.q_len, tile(spec)[1]
    for position, count, k, v in _tiles(view, keys):
        # rows that may see this tile: from its first key on (causal), up to the window after its last
        lookahead = spec.causal or spec.window is not None
        low = max(0, position - q_first) if lookahead else 0
        high = q_len if spec.window is None else min(q_len, position + count - 1 + spec.window - q_first)
        column = (position - view.first) // keys
        states = None if block_map is None else block_map.states[..., column]
        if low >= high or (states is not None and bool((states == SKIP).all())):
            continue
        scores = _scores(q[..., low:high, :], k, spec)
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
        running.add(scores, v, low, high)


def _ragged(
    running: _Running, q: Tensor, view: KVView, spec: AttentionSpec, mask: Tensor | None, slopes: Tensor | None
) -> None:
    """Sequences of their own lengths, or pages: tiles of slots, whose positions are tensors. Never waits for a device."""
    batch, q_len = spec.batch, spec.q_len
    if view.lengths is None:
        lengths = torch.full((batch,), view.length, dtype=torch.int64, device=q.device)
    else:
        lengths = view.lengths.expand(batch)
    longest = int(lengths.max()) if lengths.device.type == "cpu" else view.length  # a device's lengths are not looked at
    q_positions = lengths[:, None] - q_len + torch.arange(q_len, device=q.device)
    for segment in view.segments:
        stop, capacity = min(segment.stop, longest - segment.trail), segment.capacity
        used = min(capacity, max(0, stop - segment.base)) if segment.stop - segment.base <= capacity else capacity
        newest = (lengths - segment.trail).clamp(max=segment.stop)[:, None] - 1
        oldest = segment.first if segment.keep is None else (lengths - segment.keep).clamp(min=segment.first)[:, None]
        for slot in range(0, used, tile(spec)[1]):
            slots = torch.arange(slot, min(used, slot + tile(spec)[1]), device=q.device)
            positions = newest - (newest - segment.base - slots) % capacity  # [B, n]
            live = positions >= oldest
            k, v = (_decode_slots(segment, side, slots, view) for side in "kv")
            v = torch.where(live[:, None, :, None], v, 0.0)
            scores = _scores(q, k, spec)
            if mask is not None:
                columns = (positions - view.first).clamp(min=0)[:, None, None].expand(batch, *mask.shape[1:3], -1)
                scores = apply_mask(scores, mask.expand(batch, *mask.shape[1:]).gather(-1, columns), slopes)
            seen = visible(q_positions, positions, causal=spec.causal, window=spec.window, starts=None)
            if view.starts is not None:
                live = live & (positions >= view.starts[:, None])
            running.add(scores.masked_fill(~(seen & live[:, None, None]), -math.inf), v, 0, q_len)


def _decode_slots(segment: Segment, side: str, slots: Tensor, view: KVView) -> Tensor:
    """Values ``[B, Hkv, n, padded]`` in slots ``slots [n]``, of consecutive numbers."""
    packed, fmt, codec = (
        (segment.k, segment.k_format, view.k_codec) if side == "k" else (segment.v, segment.v_format, view.v_codec)
    )
    if segment.pages is None:
        rows = packed.map(lambda t: t.index_select(-2, slots))
    else:
        pages, inside = segment.pages[:, slots // segment.page_slots], slots % segment.page_slots
        rows = packed.map(lambda t: t[pages, :, inside].transpose(1, 2))
    return decode(rows, fmt, codec.head_dim)


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
