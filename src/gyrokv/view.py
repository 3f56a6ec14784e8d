"""What a kernel reads: segments of packed rows, and which positions they hold."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import GyroKVError
from .formats import KVFormat, dense_format
from .quant import Codec, Packed, cat, decode


class Kept(dict):
    """What backends keep about a store from call to call. It holds addresses, so copies of it are empty, pickled too."""

    def __reduce__(self) -> tuple:
        return Kept, ()


@dataclass(eq=False, slots=True)  # not frozen: one is made per call, and to make a frozen one takes five times as long
class Segment:
    """Rows ``[B, Hkv, capacity, *]`` of K and V; position p lies in slot ``(p - base) % capacity``.

    Live are the positions ``first <= p < stop``. Formats are those of the rows, so a dense segment of a quantised
    layer names a dense format; its values lie in the same (rotated, padded) space as the decoded ones.

    With ``pages`` (int32 ``[B, max_pages]``) rows are ``[pages, Hkv, page_slots, *]``: slot s of sequence b is slot
    ``s % page_slots`` of page ``pages[b, s // page_slots]``, and the capacity is ``max_pages * page_slots``. Entries
    of pages without a live slot are any page. Of a sequence of L tokens only ``L - keep <= p < L - trail`` are live.
    ``kept``: of the store that the rows lie in; what backends keep there is under a key of their own, and says of which
    ``k`` and ``v`` it is.
    """

    k: Packed
    v: Packed
    k_format: KVFormat
    v_format: KVFormat
    base: int
    first: int
    stop: int
    kept: Kept = field(default_factory=Kept, repr=False)
    pages: Tensor | None = None
    trail: int = 0
    keep: int | None = None

    def __post_init__(self) -> None:
        if self.pages is not None and (self.pages.dtype != torch.int32 or self.page_slots % 16):
            raise ValueError(
                f"pages has dtype {self.pages.dtype} and {self.page_slots} slots a page; it must be int32, and slots a "
                "multiple of 16"
            )

    @property
    def page_slots(self) -> int:
        """Slots of a page; 0 without pages."""
        return 0 if self.pages is None else self.k.words.shape[-2]

    @property
    def capacity(self) -> int:
        slots = self.k.words.shape[-2]
        return slots if self.pages is None else slots * self.pages.shape[1]

    def live(self, length: int) -> tuple[int, int]:
        """``(first, stop)`` of the live positions of a sequence of ``length`` tokens."""
        first = self.first if self.keep is None else max(self.first, length - self.keep)
        return first, max(first, min(self.stop, length - self.trail))

    def of(self, batch: slice, length: int) -> Segment:
        """The part of sequences ``batch``, all of ``length`` tokens, without pages (which are copied)."""
        first, stop = self.live(length)
        if self.pages is None:
            k, v = (p.map(lambda t: t[batch]) for p in (self.k, self.v))
        else:  # without wrapping around, the pages up to the last live slot will do
            count = min(self.pages.shape[1], -(-(stop - self.base) // self.page_slots))
            pages = self.pages[batch, : max(1, count)]
            k, v = (p.map(lambda t: t[pages].transpose(1, 2).flatten(2, 3)) for p in (self.k, self.v))
        return Segment(k, v, self.k_format, self.v_format, self.base, first, stop)

    def runs(self, first: int, stop: int) -> list[tuple[int, int]]:
        """``(slot, count)`` of the contiguous runs of slots that hold positions ``first <= p < stop``, in order."""
        capacity, made = self.capacity, []
        while first < stop:
            slot = (first - self.base) % capacity
            count = min(stop - first, capacity - slot)
            made.append((slot, count))
            first += count
        return made


def _same(a: KVFormat, b: KVFormat) -> bool:
    return a is b or a == b  # comparing rows compares all of their columns


def rows_of(packed: Packed, slot: int, count: int) -> Packed:
    """``count`` rows of ``packed [B, H, capacity, *]`` from ``slot`` on, as views."""
    return packed.map(lambda t: t.narrow(-2, slot, count))


def chronological(packed: Packed, segment: Segment, first: int, stop: int) -> Packed:
    """Rows of positions ``first <= p < stop``, oldest first."""
    parts = [rows_of(packed, slot, count) for slot, count in segment.runs(first, stop)]
    return cat(parts or [rows_of(packed, 0, 0)], dim=-2)


class Part(NamedTuple):
    """Sequences ``batch`` of a view as a ``view`` of their own; its keys are the ``columns`` of the whole one's."""

    batch: slice
    columns: slice
    view: KVView


@dataclass(eq=False, slots=True)
class KVView:
    """K and V of one layer as they stand: positions ``first <= p < length``, each in exactly one segment.

    Valid until its layer is next written to; :meth:`check_current` raises after that. ``window`` is the layer's
    sliding window: older keys may be gone. ``starts [B]`` holds the first position of each sequence (left padding),
    or is None. With ``lengths`` (int64 ``[B]`` or ``[1]``, on the device) sequence b has ``lengths[b]`` tokens, and
    ``length`` is a bound on them that may not be exceeded; its keys begin at ``first`` or later.
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
    lengths: Tensor | None = None
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
        """Number of keys held; with ``lengths`` a bound, and the number of columns of a mask."""
        return self.length - self.first

    @property
    def device(self) -> torch.device | None:
        """Where the rows lie; None when there are none."""
        return self.segments[0].k.words.device if self.segments else None

    @property
    def layout(self) -> tuple[bool, bool, bool]:
        """:attr:`ring`, :attr:`paged` and :attr:`unquantised`, in one loop, because each call needs all three."""
        k_format, v_format = self.k_codec.format, self.v_codec.format
        ring = paged = unquantised = False
        for s in self.segments:
            ring |= s.stop - s.base > s.capacity
            paged |= s.pages is not None
            unquantised |= not (_same(s.k_format, k_format) and _same(s.v_format, v_format))
        return ring, paged, unquantised

    @property
    def ring(self) -> bool:
        """True when some segment wraps around its end."""
        return self.layout[0]

    @property
    def paged(self) -> bool:
        """True when rows lie in pages."""
        return self.layout[1]

    @property
    def unquantised(self) -> bool:
        """True when part of a quantised layer is kept dense."""
        return self.layout[2]

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

    def parts(self) -> list[Part]:
        """Plain views, without lengths on the device and without pages, of sequences that are equally long.

        Waits for the device, and copies pages: for definitions, tests, and where host and device are one.
        """
        if self.lengths is None and not self.paged:
            return [Part(slice(None), slice(None), self)]
        lengths = [self.length] * self.batch if self.lengths is None else self.lengths.expand(self.batch).tolist()
        made, start = [], 0
        for stop in range(1, self.batch + 1):
            if stop < self.batch and lengths[stop] == lengths[start]:
                continue
            batch, length = slice(start, stop), lengths[start]
            segments = tuple(s for s in (s.of(batch, length) for s in self.segments) if s.first < s.stop)
            first = min((s.first for s in segments), default=length)
            view = replace(
                self, segments=segments, batch=stop - start, first=first, length=length, lengths=None,
                starts=None if self.starts is None else self.starts[batch],
            )  # fmt: skip
            made.append(Part(batch, slice(first - self.first, length - self.first), view))
            start = stop
        return made

    def to(self, device: torch.device | str) -> KVView:
        """A copy of the rows on ``device``, independent of the layer from now on."""
        self.check_current()

        def moved(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        rows = (replace(s, k=s.k.map(moved), v=s.v.map(moved), pages=moved(s.pages), kept=Kept()) for s in self.segments)
        return replace(self, segments=tuple(rows), starts=moved(self.starts), lengths=moved(self.lengths), owner=None)

    def decode(self, side: str) -> Tensor:
        """All keys (``side="k"``) or values (``"v"``), oldest first, as stored: float32 ``[B, Hkv, Tkv, padded]``.

        With ``lengths``, zeros where a sequence has none.
        """
        self.check_current()
        codec = self.k_codec if side == "k" else self.v_codec
        if self.lengths is not None or self.paged:
            whole = torch.zeros(self.batch, self.kv_heads, self.kv_len, codec.padded, device=self.device)
            for part in self.parts():
                if part.view.segments:
                    whole[part.batch, :, part.columns] = part.view.decode(side)
            return whole
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
