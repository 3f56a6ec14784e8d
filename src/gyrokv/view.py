"""What a kernel reads: segments of packed rows, and which positions they hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import GyroKVError
from .formats import KVFormat, dense_format
from .quant import Codec, Packed, cat, decode


@dataclass(frozen=True)
class Segment:
    """Rows ``[B, Hkv, capacity, *]`` of K and V; position p lies in slot ``(p - base) % capacity``.

    Live are the positions ``first <= p < stop``. Formats are those of the rows, so a dense segment of a quantised
    layer names a dense format; its values lie in the same (rotated, padded) space as the decoded ones.
    """

    k: Packed
    v: Packed
    k_format: KVFormat
    v_format: KVFormat
    base: int
    first: int
    stop: int

    @property
    def capacity(self) -> int:
        return self.k.words.shape[-2]

    def runs(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """``(slot, count)`` of the contiguous runs of slots that hold positions ``first <= p < stop``, in order."""
        while first < stop:
            slot = (first - self.base) % self.capacity
            count = min(stop - first, self.capacity - slot)
            yield slot, count
            first += count


def _same(a: KVFormat, b: KVFormat) -> bool:
    return a is b or a == b  # comparing rows compares all of their columns


def rows_of(packed: Packed, slot: int, count: int) -> Packed:
    """``count`` rows of ``packed [B, H, capacity, *]`` from ``slot`` on, as views."""
    return packed.map(lambda t: t.narrow(-2, slot, count))


def chronological(packed: Packed, segment: Segment, first: int, stop: int) -> Packed:
    """Rows of positions ``first <= p < stop``, oldest first."""
    parts = [rows_of(packed, slot, count) for slot, count in segment.runs(first, stop)]
    return cat(parts or [rows_of(packed, 0, 0)], dim=-2)


@dataclass(frozen=True)
class KVView:
    """K and V of one layer as they stand: positions ``first <= p < length``, each in exactly one segment.

    Valid until its layer is next written to; :meth:`check_current` raises after that. ``window`` is the layer's
    sliding window: older keys may be gone. ``starts [B]`` holds the first position of each sequence (left padding),
    or is None.
    """

    segments: tuple[Segment, ...]
    k_codec: Codec
    v_codec: Codec
    batch: int
    kv_heads: int
    first: int
    length: int
    window: int | None = None
    starts: Tensor | None = None
    owner: object | None = None
    version: int = 0

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> KVView:
        """A view of plain tensors k ``[B, Hkv, Tkv, Dk]``, v ``[B, Hkv, Tkv, Dv]`` (float32, float16, bfloat16)."""
        if k.ndim != 4 or v.ndim != 4:
            raise ValueError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; both must be [B, Hkv, Tkv, D]")
        if k.shape[:3] != v.shape[:3]:
            raise ValueError(f"k has shape {tuple(k.shape)} but v {tuple(v.shape)}; all but the last axis must agree")
        if k.device != v.device:
            raise ValueError(f"k is on {k.device} but v is on {v.device}")
        codecs = []
        for name, x in (("k", k), ("v", v)):
            if x.shape[2] and x.stride(-1) != 1:
                raise ValueError(f"{name} has stride {x.stride(-1)} in its last axis, not 1; call .contiguous() on it")
            codecs.append(Codec(dense_format(x.dtype), x.shape[-1]))
        rows = [c.encode(x) for c, x in zip(codecs, (k, v))]
        length = k.shape[2]
        segment = Segment(*rows, codecs[0].format, codecs[1].format, base=0, first=0, stop=length)
        return cls((segment,) if length else (), *codecs, k.shape[0], k.shape[1], first=0, length=length)

    @property
    def kv_len(self) -> int:
        """Number of keys held."""
        return self.length - self.first

    @property
    def device(self) -> torch.device | None:
        """Where the rows lie; None when there are none."""
        return self.segments[0].k.words.device if self.segments else None

    @property
    def ring(self) -> bool:
        """True when some segment wraps around its end."""
        return any(s.stop - s.base > s.capacity for s in self.segments)

    @property
    def unquantised(self) -> bool:
        """True when part of a quantised layer is kept dense."""
        k_format, v_format = self.k_codec.format, self.v_codec.format
        return not all(_same(s.k_format, k_format) and _same(s.v_format, v_format) for s in self.segments)

    def check_current(self) -> None:
        """Raise GyroKVError if the layer was written to after this view was taken: its rows may be other tokens'."""
        if self.owner is not None and self.owner.version != self.version:
            raise GyroKVError("this view is out of date: its layer was changed after the view was taken; take a new one")

    def since(self, first: int) -> KVView:
        """The same keys without those before position ``first``."""
        if first <= self.first:
            return self
        kept = tuple(replace(s, first=max(s.first, first)) for s in self.segments if s.stop > first)
        return replace(self, segments=kept, first=min(first, self.length))

    def to(self, device: torch.device | str) -> KVView:
        """A copy of the rows on ``device``, independent of the layer from now on."""
        self.check_current()
        rows = (replace(s, k=s.k.map(lambda t: t.to(device)), v=s.v.map(lambda t: t.to(device))) for s in self.segments)
        starts = None if self.starts is None else self.starts.to(device)
        return replace(self, segments=tuple(rows), starts=starts, owner=None)

    def decode(self, side: str) -> Tensor:
        """All keys (``side="k"``) or values (``"v"``), oldest first, as stored: float32 ``[B, Hkv, Tkv, padded]``."""
        self.check_current()
        codec = self.k_codec if side == "k" else self.v_codec
        parts = []
        for segment in self.segments:
            packed, fmt = (segment.k, segment.k_format) if side == "k" else (segment.v, segment.v_format)
            for slot, count in segment.runs(segment.first, segment.stop):
                parts.append(decode(rows_of(packed, slot, count), fmt, codec.head_dim))
        if not parts:
            return torch.zeros(self.batch, self.kv_heads, 0, codec.padded)
        return torch.cat(parts, dim=-2)

    def heads(self, side: str, dtype: torch.dtype) -> Tensor:
        """All keys or values as a model sees them: ``[B, Hkv, Tkv, D]`` in ``dtype``, rotated back, without padding."""
        codec = self.k_codec if side == "k" else self.v_codec
        return codec.output(self.decode(side)).to(dtype)
