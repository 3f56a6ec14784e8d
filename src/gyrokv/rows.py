"""Packed rows of K and V by position: what a layer keeps, in a ring or not."""

from __future__ import annotations

from torch import Tensor

from .memory import empty_rows
from .quant import Packed
from .view import Kept, Segment, chronological, rows_of


class Rows:
    """A store of packed K and V rows ``[B, Hkv, capacity, *]``; position p lies in slot ``p % capacity``."""

    def __init__(self, k_format, v_format) -> None:
        self.k_format, self.v_format = k_format, v_format
        self.k: Packed | None = None
        self.v: Packed | None = None
        self.first = self.stop = 0
        self.kept = Kept()

    @property
    def capacity(self) -> int:
        return 0 if self.k is None else self.k.words.shape[-2]

    def reserve(self, capacity: int, like_k: Packed, like_v: Packed) -> None:
        """Move the live rows, bytes untouched, to a store of ``capacity`` slots."""
        if capacity == self.capacity:
            return
        old = self.segment() if self.k is not None else None
        self.kept = Kept()
        self.k, self.v = (like.map(lambda t: empty_rows(t, capacity)) for like in (like_k, like_v))
        if old is not None and old.first < old.stop:
            first, stop = max(old.first, old.stop - capacity), old.stop
            self.first = self.stop = first
            self.write(first, *(chronological(p, old, first, stop) for p in (old.k, old.v)))

    def write(self, position: int, k: Packed, v: Packed) -> None:
        """Store rows (no more than the capacity) for the positions from ``position`` on; older ones may be lost."""
        done, count = 0, k.words.shape[-2]
        while done < count:
            slot = (position + done) % self.capacity
            n = min(count - done, self.capacity - slot)
            for store, rows in ((self.k, k), (self.v, v)):
                for into, part in zip(rows_of(store, slot, n), rows_of(rows, done, n)):
                    into.copy_(part)
            done += n
        self.stop = position + count
        self.first = max(self.first, self.stop - self.capacity)

    def truncate(self, length: int) -> None:
        self.stop = min(self.stop, length)
        self.first = min(self.first, self.stop)

    def segment(self, first: int | None = None, stop: int | None = None) -> Segment:
        first, stop = self.first if first is None else first, self.stop if stop is None else stop
        return Segment(self.k, self.v, self.k_format, self.v_format, base=0, first=first, stop=stop, kept=self.kept)

    def map(self, f) -> None:
        if self.k is not None:
            self.k, self.v, self.kept = self.k.map(f), self.v.map(f), Kept()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return () if self.k is None else (*self.k, *self.v)
