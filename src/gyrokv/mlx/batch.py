"""The cache of one layer for several sequences of different lengths, as mlx-lm's batched generation uses it.

Sequences end together: the shorter ones begin later (left padding), so position p is a column of all of them, and a
kernel needs the first position of each and nothing else. A chunk of prompts of different lengths is padded on the
right while it is processed; ``finalize`` moves rows until sequences end together again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import Unsupported
from .packed import Causal, PackedKVCache
from .rows import Pair, both, cut, join


class _Part(NamedTuple):
    """Sequences with rows of positions ``first`` to ``stop - 1`` (None if they are empty), and the padding of each."""

    rows: Pair | None
    first: int
    stop: int
    padding: list[int]


def _part(cache: PackedKVCache, padding: list[int]) -> _Part:
    held = cache._main and not cache.empty()
    return _Part(cache._main.span(cache._first, cache._length) if held else None, cache._first, cache._length, padding)


class BatchPackedKVCache(PackedKVCache):
    """What mlx-lm's ``BatchKVCache`` and ``BatchRotatingKVCache`` are, with packed rows; made by ``merge``."""

    def __init__(self, like: PackedKVCache, padding: Sequence[int]) -> None:
        if like.policy.sinks or like.policy.recent or like.keep:
            raise Unsupported(
                f"a batch cannot keep first or recent tokens of its sequences beside the others: sinks={like.policy.sinks}, "
                f"recent={like.policy.recent}, keep={like.keep}; all must be 0"
            )
        super().__init__(like.policy, like.window)
        self._padding = list(padding)
        self._right: list[int] | None = None  # padding after the tokens that are being processed

    @classmethod
    def merge(cls, caches: Sequence[PackedKVCache]) -> BatchPackedKVCache:
        """The caches of single sequences as one. Raises Unsupported for policies that a batch cannot follow, ValueError
        for caches that differ in theirs."""
        made = cls(caches[0], [0] * len(caches))
        for cache in caches:
            made._check_alike(cache)
        made._assemble([_part(cache, [0]) for cache in caches])
        return made

    # -- what models call

    @property
    def offset(self) -> mx.array:
        """The position of the next token in each sequence, ``[B]``."""
        return mx.array([self._length - n for n in self._padding])

    @property
    def left_padding(self) -> mx.array:
        """Columns before each sequence's first token, ``[B]``."""
        return mx.array(self._padding)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Causal | mx.array | None:
        """As for a single sequence; arrays are ``[B, 1, N, keys held]``."""
        mask = super().make_mask(N, return_array, window_size)
        if not return_array:
            return mask
        keys = mx.arange(self._held_after(N), self._length + N)
        return mask & (keys >= mx.expand_dims(self.left_padding, (1, 2, 3)))

    # -- what mlx-lm calls

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce tokens that are padded: on the left (an empty cache only), or on the right until ``finalize``."""
        if left_padding is not None:
            if not self.empty():
                raise ValueError("left_padding can be added to an empty cache only")
            self._padding = [a + b for a, b in zip(self._padding, left_padding)]
        if right_padding is not None and max(right_padding) > 0:
            part = _part(self, self._padding)
            self._right = list(right_padding)
            if part.rows and self.window is not None:  # from now on a list: padding must not push tokens out of a ring
                self._load(part.rows, part.first, part.stop)

    def finalize(self) -> None:
        """Make sequences end together after tokens that were padded on the right."""
        whole, right, self._right = _part(self, self._padding), self._right, None
        if right is None or whole.rows is None:
            return
        parts = []
        for i, (padding, after) in enumerate(zip(self._padding, right)):
            rows = both(whole.rows, lambda t, i=i, n=after: t[i : i + 1, :, : t.shape[2] - n])
            parts.append(_Part(rows, whole.first, whole.stop - after, [padding]))
        self._assemble(parts)

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep the sequences ``batch_indices``, in that order."""
        indices = list(batch_indices)
        self._right = self._right and [self._right[i] for i in indices]
        self._assemble([self._of(indices)])

    def extend(self, other: BatchPackedKVCache) -> None:
        """Add the sequences of another batch."""
        self._check_alike(other)
        self._assemble([_part(self, self._padding), _part(other, other._padding)])

    def extract(self, idx: int) -> PackedKVCache:
        """Sequence ``idx`` as a cache of its own."""
        made = PackedKVCache(self.policy, self.window)
        part, start = self._of([idx]), self._padding[idx]
        if part.rows:
            first = max(part.first, start)
            made._load(cut(part.rows, first - part.first, part.stop - part.first), first - start, part.stop - start)
        return made

    @property
    def state(self) -> dict[str, Any]:
        """See :class:`PackedKVCache`."""
        return super().state | {"padding": self._padding}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        PackedKVCache.state.fset(self, state)
        self._padding, self._right = state["padding"], None

    # -- storage

    def _check_alike(self, other: PackedKVCache) -> None:
        mine, theirs = (f"{c.policy}, window={c.window}" for c in (self, other))
        if mine != theirs:
            raise ValueError(f"caches of a batch must be alike, but one has {mine}, another one {theirs}")

    def _ring(self) -> int | None:
        return None if self._right else super()._ring()

    def _starts(self) -> mx.array | None:
        return mx.array(self._padding, mx.int64) if any(self._padding) else None

    def _of(self, indices: list[int]) -> _Part:
        whole, chosen = _part(self, [self._padding[i] for i in indices]), mx.array(indices)
        return whole._replace(rows=whole.rows and both(whole.rows, lambda t: t[chosen]))

    def _assemble(self, parts: Sequence[_Part]) -> None:
        """Hold the sequences of ``parts``, with as little padding as may be."""
        stop = max(part.stop - min(part.padding) for part in parts)
        shifts = [stop - part.stop for part in parts]
        self._padding = [n + shift for part, shift in zip(parts, shifts) for n in part.padding]
        self._main, self._length, self._first = None, stop, 0
        if not any(part.rows for part in parts):
            return
        first = min(max(0, part.first + shift) for part, shift in zip(parts, shifts) if part.rows)
        like = next(part.rows for part in parts if part.rows)
        made = []
        for part in parts:
            rows = part.rows or both(like, partial(_no_rows, len(part.padding)))
            have, wanted = rows[0].words.shape[2], stop - first
            rows = cut(rows, max(0, have - wanted), have)
            made.append(both(rows, partial(_pad_left, max(0, wanted - have))))
        self._load(join(*made, axis=0), first, stop)


def _no_rows(batch: int, like: mx.array) -> mx.array:
    return mx.zeros((batch, like.shape[1], 0, like.shape[3]), like.dtype)


def _pad_left(rows: int, x: mx.array) -> mx.array:
    return mx.pad(x, [(0, 0), (0, 0), (rows, 0), (0, 0)]) if rows else x
