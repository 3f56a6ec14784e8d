"""K and V rows in MLX arrays, by position."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..quant import Packed

Pair = tuple[Packed, Packed]  # of K and of V


class Rows:
    """K and V rows ``[B, Hkv, capacity, *]``: position p lies in slot ``(p - base) % capacity``."""

    def __init__(self, pair: Pair, base: int = 0) -> None:
        self.pair, self.base = pair, base

    @classmethod
    def like(cls, pair: Pair, capacity: int, base: int = 0) -> Rows:
        """Zeros, for rows such as those of ``pair``."""
        return cls(both(pair, lambda t: _zeros(t, capacity)), base)

    @property
    def capacity(self) -> int:
        return self.pair[0].words.shape[2]

    @property
    def arrays(self) -> list[list[mx.array]]:
        """Words and scales of K, then of V."""
        return [list(packed) for packed in self.pair]

    def grow(self, capacity: int) -> None:
        """Have at least ``capacity`` slots; no position may have wrapped around the end."""
        more = capacity - self.capacity
        if more > 0:
            self.pair = both(self.pair, lambda t: mx.concatenate([t, _zeros(t, more)], axis=2))

    def put(self, position: int, new: Pair) -> None:
        """Write rows from ``position`` on, in place; those that the store cannot hold are left out."""
        count = new[0].words.shape[2]
        done = max(0, count - self.capacity)
        while done < count:
            slot = (position + done - self.base) % self.capacity
            n = min(count - done, self.capacity - slot)
            for store, rows in zip(self.pair, new):
                for into, part in zip(store, rows):
                    if part.size:
                        into[:, :, slot : slot + n] = part[:, :, done : done + n]
            done += n

    def span(self, first: int, stop: int) -> Pair:
        """Rows of positions ``first <= p < stop``, oldest first."""
        parts = [cut(self.pair, 0, 0)]
        while first < stop:
            slot = (first - self.base) % self.capacity
            n = min(stop - first, self.capacity - slot)
            parts.append(cut(self.pair, slot, slot + n))
            first += n
        return join(*(parts[1:] or parts))

    def copy(self) -> Rows:
        """The same rows; what is written to one does not reach the other."""
        return Rows(both(self.pair, mx.array), self.base)


def both(pair: Pair, f: Callable[[mx.array], mx.array]) -> Pair:
    """``f`` applied to words and scales of K and V."""
    return pair[0].map(f), pair[1].map(f)


def cut(pair: Pair, start: int, stop: int) -> Pair:
    """Rows ``start`` to ``stop - 1``."""
    return both(pair, lambda t: t[:, :, start:stop])


def join(*pairs: Pair, axis: int = 2) -> Pair:
    """One after the other: rows (axis 2), or sequences (0)."""
    if len(pairs) == 1:
        return pairs[0]
    return tuple(Packed(*(mx.concatenate(list(ts), axis=axis) for ts in zip(*packed))) for packed in zip(*pairs))


def _zeros(like: mx.array, rows: int) -> mx.array:
    return mx.zeros((*like.shape[:2], rows, like.shape[3]), dtype=like.dtype)
