"""K and V as prefill multiplies them: 16-bit rows side by side.

Rows that lie so, also in pages, are read where they are. All others (packed, across the end of a ring, in several segments)
are copied by csrc/unpack.cu, a bounded number at a time: of some heads all positions, or some positions. What a sequence
does not have becomes zeros, for its weight is 0 and 0 * NaN is not.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from ...formats import KVFormat, dense_format
from ...quant import Codec, Packed, code_values, scale_divisor
from ...spec import AttentionSpec
from ...view import KVView, Segment
from . import calls, nvrtc
from .plan import TABLE, Row, row_of
from .shapes import DTYPES

# the workspace, bytes: K and V that are copied at a time; queries in 16 bits
STAGED, QUERIES = (n * 2**20 for n in (176, 64))
FAR = 2**30  # positions: no limit
_DENSE_ROOM = 128.0
_THREADS, _TURNS = 256, 4  # of unpack; how often a thread takes eight values


class Unpack(ctypes.Structure):
    _fields_ = [
        ("source", calls.Side), ("table", c_void_p), ("to", c_void_p), ("to_batch", c_int64), ("to_head", c_int64),
        ("pages", c_void_p), ("starts", c_void_p), ("lengths", c_void_p), ("pages_batch", c_int64),
        ("lengths_batch", c_int64), ("first", c_int), ("stop", c_int), ("keep", c_int), ("trail", c_int), ("base", c_int),
        ("capacity", c_int), ("page_slots", c_int), ("length", c_int), ("origin", c_int), ("count", c_int),
        ("relative", c_int), ("fill", c_int), ("factor", c_float),
    ]  # fmt: skip


# -- what is taken at a time


@dataclass(frozen=True)
class Cut:
    """Sequences, KV heads of each, and positions that are taken at a time."""

    batches: int
    heads: int
    keys: int

    def parts(self, batch: int, heads: int) -> Iterator[tuple[slice, slice]]:
        """Sequences and KV heads of each part."""
        for b in range(0, batch, self.batches):
            for h in range(0, heads, self.heads):
                yield slice(b, min(batch, b + self.batches)), slice(h, min(heads, h + self.heads))


_SIZES = 32  # numbers of sequences that are considered


def cut(batch: int, heads: int, keys: int, rows: int, blocks: int, processors: int, most: int) -> Cut:
    """How a problem is cut, so that there is room for ``rows`` rows of a head.

    All ``keys`` positions of some heads at a time if those fill the ``processors`` with ``blocks`` each: then no results
    are joined. Else some positions of as many heads as do, at most ``most``.
    """
    pairs, enough = min(batch * heads, most), -(-processors // blocks)
    fit = min(pairs, rows // max(1, keys))
    if fit == batch * heads:
        return Cut(batch, heads, max(1, keys))
    if fit >= min(pairs, enough):
        return Cut(*_fewest_waves(batch, heads, fit, blocks, processors), max(1, keys))
    few = _rectangle(min(pairs, enough), heads)
    return Cut(*few, max(128, min(-(-keys // 128), rows // math.prod(few) // 128) * 128))


@cache
def _fewest_waves(batch: int, heads: int, fit: int, blocks: int, processors: int) -> tuple[int, int]:
    """Sequences and heads, at most ``fit``, whose parts leave the fewest processors without a block."""
    top = min(batch, fit // heads)
    sizes = [(1, h) for h in range(1, min(fit, heads - 1) + 1)]
    sizes += [(b, heads) for b in range(max(1, top - _SIZES + 1), top + 1)]

    def waves(size: tuple[int, int]) -> tuple[int, int]:
        (b, h), total = size, 0
        for m, many in ((b, batch // b), (batch % b, 1)):
            for n, times in ((h, heads // h), (heads % h, 1)):
                total += many * times * -(-m * n * blocks // processors)
        return total, -b * h

    return min(sizes, key=waves)


def _rectangle(pairs: int, heads: int) -> tuple[int, int]:
    return (1, pairs) if pairs < heads else (pairs // heads, heads)


# -- rows


def stored_as(formats: tuple[KVFormat, ...], head_dim: int, native: torch.dtype) -> tuple[torch.dtype, int]:
    """(element type that rows are multiplied as, n: they are copied divided by 2**n).

    Dense rows of ``native`` (K: the type that q comes in; V: that of the problem) or of half precision are taken as they
    are. All others become half precision, which keeps more of codes and of rotated values than bfloat16 does: n makes
    room for the largest scale, and for dense values up to 2**23. What is larger saturates.
    """
    types = {f.dtype if f.is_dense else None for f in formats}
    if types == {torch.float16} or (types == {native} and native in DTYPES):
        return formats[0].dtype, 0
    most = [float(code_values(f).abs().max()) / scale_divisor(f, head_dim) for f in formats if f.has_levels]
    most += [_DENSE_ROOM for f in formats if f.is_dense or f.scale_dtype != "float16"]
    return torch.float16, max(0, math.ceil(math.log2(max(1.0, *most))) if most else 0)


def mappable(t: Tensor) -> bool:
    """Can a tensor map describe ``t [B, H, T, D]`` of 16-bit values?"""
    strides = [s * 2 for s, n in zip(t.stride()[:3], t.shape) if n > 1]
    return t.stride(3) == 1 and t.data_ptr() % 16 == 0 and all(s % 16 == 0 and s > 0 for s in strides)


class Rows:
    """K and V of a problem. ``types``, ``shifts``: of k and v, see :func:`stored_as`; ``direct``: read where they lie.

    Of interest are the ``keys`` positions from ``first`` on. ``relative``: in sequences that are shorter than the view's
    length they lie as much earlier, so that all of them have what a window sees in the same place. ``gaps``: the kernel
    reads pages, and does without values that a sequence does not have.
    """

    def __init__(self, q: Tensor, view: KVView, spec: AttentionSpec, gaps: bool = True) -> None:
        self.view, self.codecs = view, (view.k_codec, view.v_codec)
        formats = (
            tuple(s.k_format for s in view.segments) or (view.k_codec.format,),
            tuple(s.v_format for s in view.segments) or (view.v_codec.format,),
        )
        found = [stored_as(f, c.head_dim, t) for f, c, t in zip(formats, self.codecs, (q.dtype, spec.dtype))]
        self.types, self.shifts = zip(*found)
        even = gaps or not (view.paged or spec.starts or spec.lengths)
        plain = tuple(even and self._as_they_are(side) for side in range(2))
        unseen = 0 if spec.window is None else max(0, view.length - spec.q_len - spec.window + 1 - view.first)
        if spec.lengths and (spec.mask or all(plain)):
            unseen = 0  # it lies elsewhere in each sequence
        elif spec.mask or (view.paged and any(plain)):
            unseen = unseen // 128 * 128  # block maps and pages have tiles
        self.first, self.keys = view.first + unseen, view.kv_len - unseen
        self.relative = spec.lengths and unseen > 0
        self.direct = plain if not self.relative and self._in_a_row() else (False, False)
        self.starts = view.starts.contiguous() if spec.starts else None
        self.lengths = view.lengths.contiguous() if spec.lengths else None
        self.keep = max((FAR if s.keep is None else s.keep for s in view.segments), default=0)
        # the largest first: it clears what no segment fills
        self.segments = sorted(view.segments, key=lambda s: s.first - min(s.stop, s.first + (s.keep or FAR)))
        copied = sum(c.padded * 2 for c, direct in zip(self.codecs, self.direct) if not direct)
        self.room = STAGED // copied if copied else 2**62
        self._buffers: dict[int, Tensor] = {}

    bounds = None  # of sequences that lie behind each other: see Behind

    @property
    def ragged(self) -> bool:
        """Sequences have starts or lengths of their own."""
        return self.starts is not None or self.lengths is not None

    @property
    def slot(self) -> int:
        """That of position ``first``, where rows are read where they lie."""
        segment = self.view.segments[0]
        return (self.first - segment.base) % segment.capacity

    @property
    def pages(self) -> tuple[int, int]:
        """Slots of a page of k and v where rows are read in pages, else 0."""
        return tuple(self.view.segments[0].page_slots if direct else 0 for direct in self.direct)

    @property
    def clears(self) -> bool:
        """The kernel reads values that a sequence does not have."""
        return self.direct[1] and (self.ragged or self.view.paged)

    def _in_a_row(self) -> bool:
        """The slots of all positions follow each other, in pages from a tile's first on."""
        if len(self.view.segments) != 1:
            return False
        segment = self.view.segments[0]
        whole = segment.stop >= self.view.length and not segment.trail and segment.keep is None
        return whole and self.slot + self.keys <= segment.capacity and not (self.view.paged and self.slot % 128)

    def _as_they_are(self, side: int) -> bool:
        if len(self.view.segments) != 1:
            return False
        segment = self.view.segments[0]
        fmt, packed = ((segment.k_format, segment.k), (segment.v_format, segment.v))[side]
        dense = not self.shifts[side] and fmt.is_dense and fmt.dtype == self.types[side]
        return dense and mappable(packed.words)

    def take(self, batches: slice, heads: slice, first: int, count: int, stream: int) -> list[Tensor]:
        """k ``[b, h, count, Dk]`` and v of positions ``first`` on, or all of their pages ``[pages, h, slots, D]``; the next
        call may overwrite copies."""
        taken = []
        for side, codec in enumerate(self.codecs):
            if self.direct[side]:
                (segment,) = self.view.segments
                words, slot = (segment.k, segment.v)[side].words, self.slot + first - self.first
                taken.append(words[:, heads] if self.view.paged else words[batches, heads, slot : slot + count])
                continue
            size = batches.stop - batches.start, heads.stop - heads.start, count, codec.padded
            if side not in self._buffers:  # the first part is the largest
                self._buffers[side] = torch.empty(math.prod(size), dtype=self.types[side], device=self.view.device)
            to = self._buffers[side][: math.prod(size)].view(size)
            for i, segment in enumerate(self.segments):
                self._copy(segment, side, batches, heads, first, to, i == 0, stream)
            taken.append(to)
        return taken

    def _copy(
        self, segment: Segment, side: int, batches: slice, heads: slice, first: int, to: Tensor, fill: bool, stream: int
    ) -> None:
        """Rows of positions ``first`` on that a segment has to their places in ``to``."""
        stop = first + to.shape[2]
        if not self.ragged:  # then what is nowhere is not asked for
            start, stop = max(first, segment.first), min(stop, segment.stop)
            if start >= stop:
                return
            first, to = start, to[:, :, start - first : stop - first]
        fmt, packed = ((segment.k_format, segment.k), (segment.v_format, segment.v))[side]
        codec, shift = self.codecs[side], self.shifts[side]
        row = row_of(fmt, codec.head_dim, codec.padded)
        packed = Packed(*(t[slice(None) if segment.page_slots else batches, heads] for t in packed))
        call = Unpack(
            source=_side(packed, row), first=segment.first, stop=segment.stop,
            keep=FAR if segment.keep is None else segment.keep, trail=segment.trail, base=segment.base,
            capacity=segment.capacity, page_slots=max(1, segment.page_slots), length=self.view.length, origin=first,
            relative=self.relative, fill=fill, factor=2.0**-shift,
        )  # fmt: skip
        table = _table(fmt, to.device, codec.head_dim, shift)
        call.table = 0 if table is None else table.data_ptr()
        call.pages, call.pages_batch = table_of(segment, batches)
        call.starts, call.lengths, call.lengths_batch = self.ends(batches)
        _unpack(call, row, fmt, packed.words, to, stream)

    def ends(self, batches: slice) -> tuple[int, int, int]:
        """(address of starts, address of lengths, stride of lengths) of some sequences, as structures hold them."""
        starts = 0 if self.starts is None else self.starts.data_ptr() + 8 * batches.start
        if self.lengths is None:
            return starts, 0, 0
        stride = int(self.lengths.shape[0] > 1)
        return starts, self.lengths.data_ptr() + 8 * stride * batches.start, stride


class Behind:
    """K and V ``[total, Hkv, D]`` of 16-bit values, where sequences lie behind each other, in place of :class:`Rows`.

    ``bounds``: int32 ``[B + 1]``, their first tokens; ``most``: tokens of a sequence, at most.
    """

    ragged, relative, clears, pages, first, slot, keep, room, shifts = True, False, True, (0, 0), 0, 0, FAR, 2**62, (0, 0)

    def __init__(self, k: Tensor, v: Tensor, bounds: Tensor, most: int) -> None:
        self.sides = [x.transpose(0, 1)[None] for x in (k, v)]
        self.codecs = tuple(Codec(dense_format(x.dtype), x.shape[2]) for x in (k, v))
        self.types, self.keys, self.bounds = (k.dtype, v.dtype), most if k.shape[0] else 0, bounds
        self.view = SimpleNamespace(length=most, first=0, v_codec=self.codecs[1])

    @staticmethod
    def takes(k: Tensor, v: Tensor) -> bool:
        return k.dtype in DTYPES and v.dtype in DTYPES and all(mappable(x.transpose(0, 1)[None]) for x in (k, v))

    def take(self, batches: slice, heads: slice, first: int, count: int, stream: int) -> list[Tensor]:
        return [x[:, heads] for x in self.sides]

    def ends(self, batches: slice) -> tuple[int, int, int]:
        return 0, 0, 0


def narrowed(x: Tensor, to: Tensor, lowered: int, stream: int) -> Tensor:
    """``to``, 16-bit values side by side, after x ``[B, H, T, D]`` (D in eights), dense, over 2**lowered: saturated."""
    fmt = dense_format(x.dtype)
    packed, row = Packed(x, x), row_of(fmt, x.shape[3], x.shape[3])
    call = Unpack(
        source=_side(packed, row), stop=x.shape[2], keep=FAR, capacity=x.shape[2], page_slots=1, length=x.shape[2],
        factor=2.0**-lowered,
    )  # fmt: skip
    _unpack(call, row, fmt, x, to, stream)
    return to


def _unpack(call: Unpack, row: Row, fmt: KVFormat, words: Tensor, to: Tensor, stream: int) -> None:
    """Start ``call`` for all of ``to [B, H, T, D]``."""
    defines = (
        ("ROW_KIND", TABLE if fmt.has_levels else row.kind), ("ROW_BITS", fmt.bits), ("ROW_DIM", row.dim),
        ("ROW_SPAN", row.span), ("WIDE_SCALE", int(row.wide_scale)), ("ALIGNED", _alignment(words)),
        ("OUT_BF16", int(to.dtype == torch.bfloat16)),
    )  # fmt: skip
    call.to, call.to_batch, call.to_head, call.count = to.data_ptr(), to.stride(0), to.stride(1), to.shape[2]
    blocks = -(-call.count * (row.dim // 8) // (_THREADS * _TURNS))
    nvrtc.kernel("unpack", defines, to.device.index).launch((blocks, to.shape[1], to.shape[0]), _THREADS, stream, call)


def table_of(segment: Segment, batches: slice) -> tuple[int, int]:
    """(address, stride) of the pages of some sequences, as structures hold them."""
    if segment.pages is None:
        return 0, 0
    return segment.pages.data_ptr() + 4 * segment.pages.stride(0) * batches.start, segment.pages.stride(0)


def _side(packed: Packed, row: Row) -> calls.Side:
    def strides(t: Tensor) -> tuple[int, ...]:
        return tuple(s * t.element_size() for s in t.stride()[:3])

    words, scale = packed
    if not row.span:
        return calls.Side(words.data_ptr(), 0, strides(words))
    return calls.Side(words.data_ptr(), scale.data_ptr(), strides(words), strides(scale))


def _alignment(words: Tensor) -> int:
    """Bytes, 16, 4 or 2, that each row of ``words [B, H, T, N]`` is aligned to."""
    size = words.element_size()
    bits = words.data_ptr() | math.gcd(*(s * size for s, n in zip(words.stride()[:3], words.shape) if n > 1), 0)
    return next(n for n in (16, 4, 2) if bits % n == 0)


_tables: dict[tuple, tuple[KVFormat, Tensor]] = {}  # by identity: hashing a row hashes all of its levels


def _table(fmt: KVFormat, device: torch.device, head_dim: int, shift: int) -> Tensor | None:
    """Values by code over 2**shift, float32, of a row with levels."""
    if not fmt.has_levels:
        return None
    key = id(fmt), device, head_dim, shift
    if key not in _tables:
        _tables[key] = fmt, (code_values(fmt) / scale_divisor(fmt, head_dim) * 2.0**-shift).to(device)
    return _tables[key][1]
