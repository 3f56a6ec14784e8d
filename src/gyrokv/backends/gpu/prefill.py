"""Many query rows at once: staging of packed rows, tensor maps for Hopper, results of pieces of the keys joined.

16-bit rows are read where they lie; rows of other formats are unpacked to 16 bits, a bounded number of tokens at a time
(csrc/unpack.cu), so that the workspace does not grow with the context. The kernels are csrc/prefill.cu and
prefill_narrow.cu on Hopper, prefill_portable.cu and prefill_portable_wide.cu on other GPUs and where ``forced``;
``shapes`` says which serves what, and with which constants.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char, c_float, c_int, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ...formats import KVFormat
from ...masks import BlockMap
from ...quant import Packed, code_values, scale_divisor
from ...spec import AttentionSpec
from ...view import KVView, Segment
from . import calls, nvrtc
from .plan import TABLE, row_of
from .shapes import DTYPES, SECTION, served_by_cudnn, shape

# the workspace, bytes: K and V that are unpacked at a time; queries in 16 bits; results that wait to be joined
_STAGED, _QUERIES, _PART = (n * 2**20 for n in (112, 64, 64))
_DENSE_ROOM = 128.0
_ROOM = 4  # q in half precision is divided by 2**4: values up to 2**20 are exact, larger ones saturate
_UNPACK_THREADS, _JOIN_THREADS = 256, 128


class Prefill(ctypes.Structure):
    _fields_ = [
        ("out", c_void_p), ("out_strides", c_int64 * 3), ("lse", c_void_p), ("sinks", c_void_p), ("slopes", c_void_p),
        ("mask", c_void_p), ("mask_strides", c_int64 * 4), ("map", c_void_p), ("map_strides", c_int64 * 3),
        ("q_heads", c_int), ("groups", c_int), ("q_len", c_int), ("kv_len", c_int), ("tiles", c_int), ("section", c_int),
        ("pairs", c_int), ("causal", c_int), ("window", c_int), ("first", c_int), ("dv", c_int), ("scale", c_float),
        ("softcap", c_float), ("v_scale", c_float),
    ]  # fmt: skip


class Operands(ctypes.Structure):
    _fields_ = [("rows", c_void_p * 3), ("strides", c_int64 * 9), ("dk", c_int), ("dv", c_int)]


class Unpack(ctypes.Structure):
    _fields_ = [
        ("source", calls.Side), ("table", c_void_p), ("to", c_void_p), ("to_batch", c_int64), ("to_head", c_int64),
        ("pages", c_void_p), ("pages_batch", c_int64), ("page_slots", c_int64), ("slot", c_int64),
        ("count", c_int), ("capacity", c_int), ("heads", c_int), ("factor", c_float),
    ]  # fmt: skip


class Join(ctypes.Structure):
    _fields_ = [
        ("out", c_void_p), ("lse", c_void_p), ("part", c_void_p), ("part_lse", c_void_p), ("out_strides", c_int64 * 3),
        ("lse_strides", c_int64 * 2), ("heads", c_int), ("tokens", c_int), ("dim", c_int),
    ]  # fmt: skip


# -- which kernels

_forced = False


@contextmanager
def forced(kernels: str) -> Iterator[None]:
    """Prefill runs ``kernels`` inside: "portable", which other GPUs than Hopper run anyway. For tests and benchmarks.

    Raises ValueError for another name.
    """
    global _forced
    if kernels != "portable":
        raise ValueError(f"kernels={kernels!r} is not one that can be forced: ['portable']")
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def portable_room(device: int | None = None) -> int:
    """Bytes of shared memory that a block of the portable kernels may have; 0 where Hopper's kernels run."""
    if torch.cuda.get_device_capability(device)[0] == 9 and not _forced:
        return 0
    return calls._shared_memory(torch.cuda.current_device() if device is None else device)


# -- pieces of the keys


def stored_as(formats: tuple[KVFormat, ...], head_dim: int, native: torch.dtype) -> tuple[torch.dtype, int]:
    """(element type that rows are multiplied as, n: they are unpacked divided by 2**n).

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


@dataclass(frozen=True)
class Piece:
    """``count`` keys of positions ``first`` on, in consecutive slots of a segment. ``stored``: read where they lie."""

    segment: Segment
    slot: int
    first: int
    count: int
    stored: bool


def _pieces(view: KVView, spec: AttentionSpec, staging: _Staging) -> list[Piece]:
    """The keys that some query sees; rows to unpack in pieces that there is room for."""
    low = 0 if spec.window is None else max(0, view.length - spec.q_len - spec.window + 1)
    pieces = []
    for segment in view.segments:
        stored, first = staging.reads(segment), max(segment.first, low)
        for slot, count in segment.runs(first, segment.stop):
            step = count if stored else staging.most
            pieces += [Piece(segment, slot + i, first + i, min(step, count - i), stored) for i in range(0, count, step)]
            first += count
    return pieces


def _mappable(t: Tensor) -> bool:
    """Can a tensor map describe ``t [B, H, T, D]`` of 16-bit values?"""
    strides = [s * 2 for s, n in zip(t.stride()[:3], t.shape) if n > 1]
    return t.stride(3) == 1 and t.data_ptr() % 16 == 0 and all(s % 16 == 0 and s > 0 for s in strides)


class _Staging:
    """Room for the unpacked rows of one piece. ``types``, ``shifts``: of k and v, see :func:`stored_as`."""

    def __init__(self, q: Tensor, view: KVView, spec: AttentionSpec, stream: int) -> None:
        self._codecs, self._stream = (view.k_codec, view.v_codec), stream
        self._shape, self._device = (spec.batch, spec.kv_heads), view.device
        formats = (
            tuple(s.k_format for s in view.segments) or (view.k_codec.format,),
            tuple(s.v_format for s in view.segments) or (view.v_codec.format,),
        )
        found = [stored_as(f, c.head_dim, t) for f, c, t in zip(formats, self._codecs, (q.dtype, spec.dtype))]
        self.types, self.shifts = zip(*found)
        self._rows: list[Tensor] = []
        self.most = max(128, _STAGED // (spec.batch * spec.kv_heads * sum(c.padded for c in self._codecs) * 2) // 128 * 128)

    def reads(self, segment: Segment) -> bool:
        """True when its rows are read where they lie."""
        sides = (segment.k_format, segment.k), (segment.v_format, segment.v)
        return all(self._as_stored(i, fmt, packed.words) for i, (fmt, packed) in enumerate(sides))

    def _as_stored(self, side: int, fmt: KVFormat, words: Tensor) -> bool:
        return not self.shifts[side] and fmt.is_dense and fmt.dtype == self.types[side] and _mappable(words)

    def rows(self, piece: Piece, longest: int) -> list[Tensor]:
        """k ``[B, Hkv, count, Dk]`` and v of a piece; the next call may overwrite them."""
        segment, packed = piece.segment, (piece.segment.k, piece.segment.v)
        if not piece.stored and not self._rows:
            sizes = [(*self._shape, longest, c.padded) for c in self._codecs]
            self._rows = [torch.empty(size, dtype=t, device=self._device) for size, t in zip(sizes, self.types)]
        rows = []
        for i, (codec, fmt) in enumerate(zip(self._codecs, (segment.k_format, segment.v_format))):
            if self._as_stored(i, fmt, packed[i].words):
                rows.append(packed[i].words.narrow(2, piece.slot, piece.count))
                continue
            rows.append(self._rows[i].narrow(2, 0, piece.count))
            _unpack(packed[i], fmt, codec, rows[i], piece.slot, segment.capacity, self.shifts[i], self._stream)
        return rows


@cache
def _values(fmt_id: int, device: torch.device, head_dim: int, shift: int) -> Tensor:
    fmt = _known[fmt_id]
    return (code_values(fmt) / scale_divisor(fmt, head_dim) * 2.0**-shift).to(device)


_known: dict[int, KVFormat] = {}  # by identity: hashing a row hashes all of its levels


def _unpack(packed: Packed, fmt: KVFormat, codec, to: Tensor, slot: int, capacity: int, shift: int, stream: int) -> None:
    device = to.device
    row = row_of(fmt, codec.head_dim, codec.padded)
    rows = calls.Rows(packed, row)
    table = None
    if fmt.has_levels:
        _known.setdefault(id(fmt), fmt)
        table = _values(id(fmt), device, codec.head_dim, shift)
    defines = (
        ("ROW_KIND", TABLE if fmt.has_levels else row.kind), ("ROW_BITS", fmt.bits), ("ROW_DIM", row.dim),
        ("ROW_SPAN", row.span), ("WIDE_SCALE", int(row.wide_scale)), ("OUT_BF16", int(to.dtype == torch.bfloat16)),
    )  # fmt: skip
    call = Unpack(
        rows.side, 0 if table is None else table.data_ptr(), to.data_ptr(), to.stride(0), to.stride(1), 0, 0, 1, slot,
        to.shape[2], capacity, to.shape[1], 2.0**-shift,
    )  # fmt: skip
    blocks = -(-to.shape[2] * (row.dim // 8) // _UNPACK_THREADS)
    nvrtc.kernel("unpack", defines, device.index).launch((blocks, to.shape[1], to.shape[0]), _UNPACK_THREADS, stream, call)


# -- launches


@cache
def _encode_map():
    return ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled


def _tensor_map(x: Tensor, tokens: int) -> ctypes.Array:
    """x ``[B, H, T, D]`` of 16 bits in boxes of 64 dims and ``tokens`` tokens: swizzled by 128 bytes, zeros around."""
    room = (c_char * 192)()
    at = -ctypes.addressof(room) % 64
    sizes = (c_uint64 * 4)(*reversed(x.shape))
    strides = (c_uint64 * 3)(*(s * 2 if n > 1 else 16 for s, n in reversed(list(zip(x.stride()[:3], x.shape)))))
    box, steps = (c_uint32 * 4)(64, tokens, 1, 1), (c_uint32 * 4)(1, 1, 1, 1)
    element = 9 if x.dtype == torch.bfloat16 else 6  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, _FLOAT16
    made = (c_char * 128).from_buffer(room, at)
    nvrtc.check_driver(
        _encode_map()(ctypes.byref(made), element, 4, c_void_p(x.data_ptr()), sizes, strides, box, steps, 0, 3, 3, 0),
        f"tensor map of {tuple(x.shape)}, strides {x.stride()}",
    )
    return made


def _operands(q: Tensor, k: Tensor, v: Tensor) -> Operands:
    """Rows of 16-bit values where the portable kernels find them."""
    strides = [s * 2 for x in (q, k, v) for s in x.stride()[:3]]
    return Operands((c_void_p * 3)(*(x.data_ptr() for x in (q, k, v))), (c_int64 * 9)(*strides), k.shape[3], v.shape[3])


def attend(
    q: Tensor, view: KVView, spec: AttentionSpec, mask: Tensor | None, block_map: BlockMap | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The contract's ``attend``; out in the dtype of ``spec`` where nothing but a cast would follow."""
    stream = torch.cuda.current_stream(q.device).cuda_stream
    with torch.cuda.device(q.device):
        staging = _Staging(q, view, spec, stream)
        pieces = _pieces(view, spec, staging)
        call = _Call(q, view, spec, mask, sinks, staging, stream)
        alone, longest = len(pieces) == 1, max((p.count for p in pieces if not p.stored), default=0)
        whole = alone and call.step >= spec.q_len
        if whole and view.v_codec.identity and pieces[0].stored and not call.room and served_by_cudnn(spec):
            return call.cudnn(*staging.rows(pieces[0], 0))
        out, lse = call.results(spec.q_len, spec.dtype if alone and view.v_codec.identity else torch.float32)
        for low in range(0, spec.q_len, call.step):
            call.take(low, min(spec.q_len, low + call.step))
            for i, piece in enumerate(pieces):
                rows = staging.rows(piece, longest)
                if i == 0:
                    call.first(piece.first, *rows, out, lse, block_map if whole else None)
                else:
                    call.join(piece.first, *rows, out, lse)
        if not pieces:
            out.zero_()
            lse.copy_(torch.full_like(lse, -torch.inf) if sinks is None else call.sinks[None, :, None].expand_as(lse))
    return out, lse


class _Call:
    """What the launches of one call share. Queries are taken ``step`` at a time, so that their 16-bit copy is bounded."""

    def __init__(
        self, q: Tensor, view: KVView, spec: AttentionSpec, mask: Tensor | None, sinks: Tensor | None, staging: _Staging,
        stream: int,
    ) -> None:  # fmt: skip
        self.all, self.view, self.spec, self.mask, self.stream = q, view, spec, mask, stream
        self.sinks = None if sinks is None else sinks.to(torch.float32).contiguous()
        self.slopes = calls.head_slopes(spec.q_heads, spec.alibi, q.device) if spec.alibi else None
        self.dims, self.room = (view.k_codec.padded, view.v_codec.padded), portable_room(q.device.index)
        self.scale, self.v_scale = spec.scale * 2.0 ** staging.shifts[0], 2.0 ** staging.shifts[1]
        self.low, self.q, self.step = 0, q, spec.q_len
        self.copied = q.dtype != staging.types[0]
        if self.copied:
            self.scale *= 2.0**_ROOM
            self.step = max(128, _QUERIES // (spec.batch * spec.q_heads * self.dims[0] * 2) // 128 * 128)
        elif not _mappable(q):
            self.all = self.q = q.contiguous()

    def take(self, low: int, high: int) -> None:
        """Go on with queries ``low`` to ``high``."""
        self.low, self.q = low, self.all[:, :, low:high]
        if self.copied:  # to half precision, without a copy in between
            half = torch.empty(self.q.shape, dtype=torch.float16, device=self.q.device)
            self.q = torch.mul(self.q, 2.0**-_ROOM, out=half).clamp_(-65504.0, 65504.0)

    def first(self, first: int, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block_map: BlockMap | None) -> None:
        """Keys of positions ``first`` on, and sinks, to out and lse of all queries."""
        n = self.q.shape[2]
        these = lse if n == self.spec.q_len else torch.empty((*lse.shape[:2], n), device=lse.device)
        self.launch(0, n, first, k, v, out[:, :, self.low : self.low + n], these, block_map, self.sinks)
        if these is not lse:
            lse[:, :, self.low : self.low + n] = these

    def results(self, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        sizes, device = (self.spec.batch, self.spec.q_heads, tokens), self.q.device
        return torch.empty((*sizes, self.dims[1]), dtype=dtype, device=device), torch.empty(sizes, device=device)

    def cudnn(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All queries, by PyTorch's operator."""
        run = torch.ops.aten._scaled_dot_product_cudnn_attention
        out, lse, *_ = run(self.q, k, v, None, True, 0.0, self.spec.causal, False, scale=self.spec.scale)
        return out, lse.reshape(self.q.shape[:3])

    def launch(
        self, low: int, high: int, first: int, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        block_map: BlockMap | None = None, sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Queries ``low`` to ``high`` of those taken over keys of positions ``first`` on, to their ``out`` and ``lse``."""
        spec, mask, q = self.spec, self.mask, self.q[:, :, low:high]
        types = q.dtype, v.dtype, out.dtype
        made = shape(spec, self.dims, types, 0 if mask is None else calls.MASKS[mask.dtype], k.shape[2], self.room)
        heads, keys = spec.batch * spec.kv_heads, k.shape[2]
        tiles = -(-q.shape[2] // made.rows)
        call = Prefill(
            out=out.data_ptr(), out_strides=out.stride()[:3], lse=lse.data_ptr(),
            sinks=0 if sinks is None else sinks.data_ptr(), slopes=0 if self.slopes is None else self.slopes.data_ptr(),
            q_heads=spec.q_heads, groups=spec.groups, q_len=q.shape[2], kv_len=keys, tiles=tiles,
            section=max(1, min(heads, SECTION // (keys * sum(self.dims) * 2))), pairs=heads, causal=spec.causal,
            window=spec.window or 0, first=self.view.length - spec.q_len + self.low + low - first, dv=self.dims[1],
            scale=self.scale, softcap=spec.softcap, v_scale=self.v_scale,
        )  # fmt: skip
        if mask is not None:
            strides = calls.strides(mask)
            at = (self.low + low) * strides[2] + (first - self.view.first) * strides[3]
            call.mask, call.mask_strides = mask.data_ptr() + at * mask.element_size(), strides
        if block_map is not None:
            call.map, call.map_strides = block_map.states.data_ptr(), calls.strides(block_map.states)[:3]
        rows = [_operands(q, k, v)] if self.room else [_tensor_map(x, n) for x, n in zip((q, k, v), made.boxes)]
        kernel = nvrtc.kernel(made.kernel, made.defines, q.device.index, made.shared)
        kernel.launch((made.cluster * heads * spec.groups * tiles, 1, 1), made.threads, self.stream, call, *rows)

    def join(self, first: int, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Add keys of positions ``first`` on to out and lse, a bounded number of queries at a time."""
        spec, dim = self.spec, self.dims[1]
        rows = spec.batch * spec.q_heads
        step = min(self.q.shape[2], max(128, _PART // (rows * dim * 4) // 128 * 128))
        part, part_lse = (t.flatten() for t in self.results(step, torch.float32))
        for low in range(0, self.q.shape[2], step):
            n = min(step, self.q.shape[2] - low)
            sizes = spec.batch, spec.q_heads, n
            these, these_lse = part[: rows * n * dim].view(*sizes, dim), part_lse[: rows * n].view(sizes)
            self.launch(low, low + n, first, k, v, these, these_lse)
            at = slice(self.low + low, self.low + low + n)
            to, to_lse = out[:, :, at], lse[:, :, at]
            call = Join(
                to.data_ptr(), to_lse.data_ptr(), these.data_ptr(), these_lse.data_ptr(), to.stride()[:3],
                to_lse.stride()[:2], spec.q_heads, n, dim,
            )  # fmt: skip
            nvrtc.kernel("join", (), out.device.index).launch((rows * n, 1, 1), _JOIN_THREADS, self.stream, call)
