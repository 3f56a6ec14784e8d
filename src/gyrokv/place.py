"""Rows to their places: what an append with lengths on the device does. A backend may do the same in one launch.

Token t of T of sequence b gets position ``lengths[b] + t``; in a batch of unequal ``counts`` tokens stand at the right:
``lengths[b] + counts[b] - T + t``, and the first ``T - counts[b]`` belong to nobody.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quant import Codec, Packed

NOBODY = 0  # the page that takes what belongs to nobody; no table names it but where nothing is held


def append_at(
    stores: tuple[Packed, Packed],
    codecs: tuple[Codec, Codec],
    values: tuple[Tensor, Tensor],
    lengths: Tensor,
    pages: Tensor | None = None,
    counts: Tensor | None = None,
) -> None:
    """Encode tokens k ``[B, Hkv, T, Dk]``, v ``[B, Hkv, T, Dv]`` and write them into ``stores``; nobody waits.

    ``stores``: rows ``[B, Hkv, capacity, *]``, where position p has slot ``p % capacity``, or with ``pages [B, max_pages]``
    rows ``[pages, Hkv, page_slots, *]``. ``lengths [B or 1]``: tokens held before. ``counts [B]``: only with pages.
    """
    for store, codec, x in zip(stores, codecs, values):
        slots = store.words.shape[2]
        capacity = slots if pages is None else slots * pages.shape[1]
        tokens, skip = x.shape[2], max(0, x.shape[2] - capacity)
        positions = lengths[:, None] + torch.arange(skip, tokens, device=x.device)  # [B or 1, T]
        rows = codec.encode(x[:, :, skip:])
        if pages is None:
            _write(store, rows, positions % capacity)
            continue
        if counts is not None:
            positions = positions + (counts[:, None] - tokens)
        inside = positions.clamp(min=0) % capacity
        page = pages.gather(1, inside.expand(x.shape[0], -1) // slots).long()
        if counts is not None:
            mine = torch.arange(skip, tokens, device=x.device) >= tokens - counts[:, None]
            page = torch.where(mine, page, NOBODY)
        for into, part in zip(store, rows):
            if part.shape[-1]:
                into[page, :, inside.expand_as(page) % slots] = part.transpose(1, 2)


def _write(store: Packed, rows: Packed, slots: Tensor) -> None:
    """Rows ``[B, Hkv, T, *]`` to ``slots [B or 1, T]``."""
    for into, part in zip(store, rows):
        if not part.shape[-1]:
            continue
        if slots.shape[0] == 1:
            into.index_copy_(2, slots[0], part)
        else:
            into.scatter_(2, slots[:, None, :, None].expand(part.shape), part)
