"""Masks as arguments: validation, the values that mean "masked", and block maps.

A mask is broadcastable to ``[B, Hq, Tq, Tkv]``; rank 2 is ``[Tq, Tkv]``. Boolean: True = attend. Additive: added to
the scores; a value of -65504 or less (the lowest half, any lower float, -inf) means masked, never "very unlikely".
The last axis runs over the keys that the cache view holds, oldest first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST = -65504.0
SKIP, ALL, MIXED = 0, 1, 2
_AXES = ("batch", "q_heads", "q_len", "kv_len")
_ADDITIVE = (torch.float32, torch.float16, torch.bfloat16)


def mask_kind(mask: Tensor) -> str:
    """``"bool"`` or ``"additive"``; TypeError for any other dtype."""
    if mask.dtype == torch.bool:
        return "bool"
    if mask.dtype in _ADDITIVE:
        return "additive"
    raise TypeError(f"mask has dtype {mask.dtype}; it must be bool or one of {[str(d) for d in _ADDITIVE]}")


def check_mask(mask: Tensor, shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """``mask`` with four axes and a full last one; raises ValueError naming the axis that does not fit ``shape``."""
    mask_kind(mask)
    if mask.ndim not in (2, 4):
        raise ValueError(f"mask has {mask.ndim} axes; it must have 2 [q_len, kv_len] or 4 [batch, q_heads, q_len, kv_len]")
    if mask.device != device:
        raise ValueError(f"mask is on {mask.device} but q is on {device}")
    full = mask if mask.ndim == 4 else mask[None, None]
    for axis, (have, want) in enumerate(zip(full.shape, shape)):
        if have not in (1, want):
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}: its {_AXES[axis]} axis is {have} and must be 1 or {want} "
                f"to broadcast to [batch, q_heads, q_len, kv_len] = {list(shape)}"
            )
    return full.expand(*full.shape[:3], shape[3])


def apply_mask(scores: Tensor, mask: Tensor, slopes: Tensor | None) -> Tensor:
    """Scores ``[B, Hq, Tq, n]`` with ``mask`` (4 axes, same last axis) applied; ``slopes [Hq]`` for ALiBi or None."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf)
    bias = mask.to(scores.dtype)
    if slopes is not None:
        bias = bias * slopes.to(scores)[:, None, None]
    return (scores + bias).masked_fill(mask <= LOWEST, -math.inf)


@dataclass(frozen=True)
class BlockMap:
    """What each ``tile`` of a mask holds: nothing visible, everything visible and unbiased, or a mixture.

    ``states [B or 1, Hq or 1, ceil(Tq / tile[0]), ceil(Tkv / tile[1])]`` uint8 of SKIP, ALL, MIXED. It changes no
    result, only the work done. It belongs to one mask (the tensor, unchanged since) and one tile shape.
    """

    states: Tensor
    tile: tuple[int, int]
    mask: Tensor
    version: int

    @classmethod
    def build(cls, mask: Tensor, tile: tuple[int, int]) -> BlockMap:
        """The map of ``mask`` (2 or 4 axes, full ``Tq`` and ``Tkv`` axes) for tiles of ``(rows, keys)``.

        Raises ValueError for a tile size below 1, TypeError for a dtype that no mask has.
        """
        if min(tile) < 1:
            raise ValueError(f"tile={tile} must be at least (1, 1)")
        additive = mask_kind(mask) == "additive"
        full = mask if mask.ndim == 4 else mask[None, None]
        visible = ~(full <= LOWEST) if additive else full  # NaN is not masked: it must reach the result
        neutral = full == 0 if additive else full
        rows, keys = full.shape[-2:]
        # the last tile of an axis may be short: pad with the neutral element of each reduction
        pad = (0, -keys % tile[1], 0, -rows % tile[0])

        def tiles(x: Tensor, fill: bool) -> Tensor:
            x = torch.nn.functional.pad(x, pad, value=fill)
            return x.unflatten(-1, (-1, tile[1])).unflatten(-3, (-1, tile[0]))

        any_visible = tiles(visible, False).any(-1).any(-2)
        all_neutral = tiles(neutral, True).all(-1).all(-2)
        states = torch.where(all_neutral, ALL, torch.where(any_visible, MIXED, SKIP)).to(torch.uint8)
        return cls(states, tuple(tile), mask, mask._version)

    def check(self, mask: Tensor, tile: tuple[int, int]) -> None:
        """Raise ValueError unless this is the map of ``mask`` for ``tile``."""
        if mask is not self.mask:
            raise ValueError("block_map was built for another mask tensor")
        if mask._version != self.version:
            raise ValueError("block_map is out of date: its mask was changed in place after it was built")
        if tuple(tile) != self.tile:
            raise ValueError(f"block_map was built for tiles of {self.tile}, but the kernel uses tiles of {tuple(tile)}")
