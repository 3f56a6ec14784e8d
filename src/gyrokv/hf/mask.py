"""The mask function: causal and sliding masks are described, never stored as ``q_len x kv_len`` values.

transformers builds a mask from a function of indices. When that function is the very one that it uses for causal or
sliding-window attention, :func:`mask` returns a :class:`CausalMask`; for anything else (packed sequences, vision
blocks, chunks, custom functions) the full boolean mask that transformers would build for sdpa.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import FunctionType

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from ..reference import visible
from .handles import only_moves


@dataclass(frozen=True)
class Pattern:
    """Queries at ``q_first`` and on see keys from ``kv_first`` up to themselves, at most ``window`` of them.

    ``keys [B, Tkv]`` (bool): keys that are no padding; None when all are keys.
    """

    batch: int
    q_first: int
    q_len: int
    kv_first: int
    kv_len: int
    window: int | None
    keys: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, 1, self.q_len, self.kv_len

    def dense(self, device: torch.device) -> Tensor:
        """The mask itself: bool ``[B, 1, Tq, Tkv]``, True = attend."""
        q_positions = torch.arange(self.q_first, self.q_first + self.q_len, device=device)
        k_positions = torch.arange(self.kv_first, self.kv_first + self.kv_len, device=device)
        seen = visible(q_positions, k_positions, causal=True, window=self.window, starts=None)
        if self.keys is not None:
            seen = seen & self.keys[:, None, None, :]
        return seen.expand(self.shape)

    @property
    def plain(self) -> bool:
        """True when it says no more than "causal" to queries and keys of these lengths."""
        whole = self.window is None or self.kv_len <= self.window
        return self.keys is None and whole and self.q_len in (1, self.kv_len)


class Slots(int):
    """A number of keys that says: these are all slots of a static cache of ours, whose queries come last."""


class CausalMask(Tensor):
    """A boolean mask ``[B, 1, Tq, Tkv]`` that is only described; any operation but a slice of rows builds it."""

    pattern: Pattern

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, pattern: Pattern, device: torch.device | str) -> CausalMask:
        described = Tensor._make_wrapper_subclass(cls, pattern.shape, dtype=torch.bool, device=torch.device(device))
        described.pattern = pattern
        return described

    def dense(self) -> Tensor:
        """The mask itself."""
        return self.pattern.dense(self.device)

    def __repr__(self) -> str:
        return f"CausalMask({self.pattern})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].pattern, args[0].device)
        if func is torch.ops.aten._to_copy.default and only_moves(args[0], kwargs):
            pattern, device = args[0].pattern, kwargs["device"]
            keys = None if pattern.keys is None else pattern.keys.to(device)
            return cls(replace(pattern, keys=keys), device)
        if func is torch.ops.aten.slice.Tensor:
            rows = _rows(*args)
            if rows is not None:
                pattern = replace(args[0].pattern, q_first=args[0].pattern.q_first + rows.start, q_len=len(rows))
                return cls(pattern, args[0].device)

        def values(x):
            return x.dense() if isinstance(x, cls) else x

        return func(*tree_map(values, args), **tree_map(values, kwargs))


def _rows(x: CausalMask, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> range | None:
    """The query rows that ``aten.slice`` keeps of ``x``; None when it cuts another axis, skips rows or leaves none."""
    kept = range(x.shape[dim])[slice(start, stop, step)]
    if step != 1 or not len(kept) or (dim % 4 != 2 and len(kept) < x.shape[dim]):
        return None
    return kept if dim % 4 == 2 else range(x.pattern.q_len)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: FunctionType = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | None:
    """transformers' mask interface. Returns a :class:`CausalMask`, or what its sdpa mask function returns; for a static
    cache of ours one row per sequence, bool ``[B, 1, 1, kv_length]`` of the keys that are no padding, or None.

    Causal and sliding masks are recognised when their last query and last key are the same position. ``attention_mask
    [B, T]`` marks padding by False; the mask returned covers the keys from ``kv_offset`` on.
    """
    full = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, device=device,
        **{**kwargs, "allow_is_causal_skip": False},
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return sdpa_mask(**full)
    known = {None: causal_mask_function}
    if local_size is not None:
        known = {local_size: sliding_window_causal_mask_function(local_size), **known}
    window = next((w for w, f in known.items() if _same(mask_function, f)), mask_function)
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    static = isinstance(kv_length, Slots)
    if window is mask_function or not (aligned or static):
        return sdpa_mask(**full)
    keys = None
    if attention_mask is not None:
        keys = attention_mask[:, kv_offset : kv_offset + kv_length].to(device=device, dtype=torch.bool)
        keys = torch.nn.functional.pad(keys, (0, kv_length - keys.shape[1]))
        if static and q_length == 1:  # a graph may have been captured with it
            return keys[:, None, None, :]
        # reading the flag costs a wait per mask, an unneeded mask costs every layer
        keys = None if bool(keys[:, : attention_mask.shape[1]].all()) else keys
    if static:
        return None if keys is None else keys[:, None, None, :]
    return CausalMask(Pattern(batch_size, q_offset, q_length, kv_offset, kv_length, window, keys), device)


def _same(f, g) -> bool:
    """True when ``f`` and ``g`` are one function: the same code over equal captured functions and integers.

    Index functions are compared, not sampled: one that differs in any way gets the full mask, which is always right.
    """
    if f is g:
        return True
    if isinstance(f, FunctionType) and isinstance(g, FunctionType):
        return f.__code__ is g.__code__ and _same(_captured(f), _captured(g))
    if isinstance(f, tuple) and isinstance(g, tuple):
        return len(f) == len(g) and all(map(_same, f, g))
    return type(f) is type(g) is int and f == g


def _captured(f: FunctionType) -> tuple:
    return tuple(cell.cell_contents for cell in f.__closure__ or ())
