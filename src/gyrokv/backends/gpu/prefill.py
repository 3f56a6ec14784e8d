"""Many query rows at once: queries, tensor maps for Hopper, launches.

The kernels are csrc/prefill.cu and prefill_narrow.cu on Hopper, prefill_portable.cu and prefill_portable_wide.cu on other
GPUs and where ``forced``; ``shapes`` says which serves what, and with which constants;
``staging`` which sequences, heads and keys are taken at a time, and where their rows lie. Results over different keys of
the same queries are joined by the kernels themselves.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char, c_float, c_int, c_int64, c_uint32, c_uint64, c_void_p
from functools import cache

import torch
from torch import Tensor

from ...masks import BlockMap
from ...spec import AttentionSpec
from ...view import KVView
from . import calls, nvrtc, staging
from .shapes import Portable, Shape, shape

_SECTION = 24 * 2**20  # bytes of K and V that blocks read at a time, to stay in L2
_STEP = 384  # queries are taken in multiples of it, which all tiles divide
_LOWERED = 4  # q in half precision is divided by 2**4: values up to 2**20 are exact, larger ones saturate


class Prefill(ctypes.Structure):
    _fields_ = [
        ("out", c_void_p), ("out_strides", c_int64 * 3), ("lse", c_void_p), ("lse_strides", c_int64 * 2),
        ("sinks", c_void_p), ("slopes", c_void_p), ("mask", c_void_p), ("mask_strides", c_int64 * 4), ("map", c_void_p),
        ("map_strides", c_int64 * 3), ("starts", c_void_p), ("lengths", c_void_p), ("lengths_batch", c_int64),
        ("bounds", c_void_p), ("key_bounds", c_void_p), ("tokens", c_int64),
        ("pages", c_void_p), ("pages_batch", c_int64), ("slot", c_int), ("last_page", c_int), ("length", c_int),
        ("oldest", c_int), ("keep", c_int), ("origin", c_int), ("relative", c_int), ("kv_heads", c_int), ("groups", c_int),
        ("q_len", c_int), ("kv_len", c_int), ("tiles", c_int), ("section", c_int), ("pairs", c_int), ("causal", c_int),
        ("window", c_int), ("first", c_int), ("joined", c_int), ("dv", c_int), ("scale", c_float), ("softcap", c_float),
        ("v_scale", c_float),
    ]  # fmt: skip


class Operands(ctypes.Structure):
    _fields_ = [("rows", c_void_p * 3), ("strides", c_int64 * 9), ("dk", c_int), ("dv", c_int)]


# -- which kernels

FORCED = ("portable", "tall", "short")
_forced: str | None = None


@contextmanager
def forced(kernels: str) -> Iterator[None]:
    """Prefill runs ``kernels`` inside: "portable", which other GPUs than Hopper run anyway; or Hopper's with "tall" or
    "short" tiles where there are both, and their number would tell which. For tests and benchmarks.

    Raises ValueError for another name.
    """
    global _forced
    if kernels not in FORCED:
        raise ValueError(f"kernels={kernels!r} is not one that can be forced: {list(FORCED)}")
    before, _forced = _forced, kernels
    try:
        yield
    finally:
        _forced = before


def portable_room(device: int | None = None) -> int:
    """Bytes of shared memory that a block of the portable kernels may have; 0 where Hopper's kernels run."""
    if torch.cuda.get_device_capability(device)[0] == 9 and _forced != "portable":
        return 0
    return calls._shared_memory(torch.cuda.current_device() if device is None else device)


# -- launches


@cache
def _encode_map():
    return ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled


def _tensor_map(x: Tensor, tokens: int, heads: int = 1) -> ctypes.Array:
    """x ``[B, H, T, D]`` in boxes of ``tokens`` tokens, ``heads`` heads and 128 bytes, swizzled by 128 bytes; of float32
    32 bytes, in order. Zeros around."""
    room = (c_char * 192)()
    at = -ctypes.addressof(room) % 64
    sizes, size = (c_uint64 * 4)(*reversed(x.shape)), x.element_size()
    strides = (c_uint64 * 3)(*(s * size if n > 1 else 16 for s, n in reversed(list(zip(x.stride()[:3], x.shape)))))
    width, swizzle = (32, 0) if size == 4 else (128, 3)
    box, steps = (c_uint32 * 4)(width // size, tokens, heads, 1), (c_uint32 * 4)(1, 1, 1, 1)
    # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, _FLOAT16, _FLOAT32, _UINT8
    element = {torch.bfloat16: 9, torch.float16: 6, torch.float32: 7}.get(x.dtype, 0)
    made = (c_char * 128).from_buffer(room, at)
    about = ctypes.byref(made), element, 4, c_void_p(x.data_ptr()), sizes, strides, box, steps, 0, swizzle, 3, 0
    status = nvrtc.in_context(lambda: _encode_map()(*about))
    nvrtc.check_driver(status, f"tensor map of {tuple(x.shape)}, strides {x.stride()}")
    return made


def _boxed(mask: Tensor, first: int) -> bool:
    """Can a tensor map describe ``mask``, from key ``first`` on? Axes that broadcast may have any size but that of keys."""
    size, (batch, head, token, key) = mask.element_size(), calls.strides(mask)
    return key == 1 and token > 0 and not any(x * size % 16 for x in (batch, head, token, first, mask.data_ptr() // size))


def _operands(q: Tensor, k: Tensor, v: Tensor) -> Operands:
    """Rows of 16-bit values where the portable kernels find them."""
    strides = [s * 2 for x in (q, k, v) for s in x.stride()[:3]]
    return Operands((c_void_p * 3)(*(x.data_ptr() for x in (q, k, v))), (c_int64 * 9)(*strides), k.shape[3], v.shape[3])


def attend(
    q: Tensor, view: KVView, spec: AttentionSpec, mask: Tensor | None, block_map: BlockMap | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The contract's ``attend``; out in the dtype of ``spec`` where nothing but a cast would follow."""
    with torch.cuda.device(q.device):
        room = portable_room(q.device.index)
        rows = staging.Rows(q, view, spec, gaps=not room)
        call = _Call(q, rows, spec, mask, block_map, sinks, room)
        if not rows.keys:
            return call.nothing()
        return call.run()


def attend_behind(
    q: Tensor, rows: staging.Rows | staging.Behind, spec: AttentionSpec, sinks: Tensor | None, bounds: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Attention of q ``[total, Hq, Dk]``, of which sequence b has those from ``bounds[b]`` on (int32 ``[B + 1]``): (out
    ``[total, Hq, Dv]``, lse ``[Hq, total]``)."""
    with torch.cuda.device(q.device):
        out, lse = _Behind(q.transpose(0, 1)[None], rows, spec, sinks, bounds).run()
        return out[0].transpose(0, 1), lse[0]


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Call:
    """What the launches of one call share. Queries are taken ``step`` at a time, so that their 16-bit copy is bounded."""

    def __init__(
        self, q: Tensor, rows: staging.Rows, spec: AttentionSpec, mask: Tensor | None, block_map: BlockMap | None,
        sinks: Tensor | None, room: int,
    ) -> None:  # fmt: skip
        self.room = room
        self.q, self.rows, self.spec, self.mask, self.block_map = q, rows, spec, mask, block_map
        self.stream = torch.cuda.current_stream(q.device).cuda_stream
        self.sinks = None if sinks is None else sinks.to(torch.float32).contiguous()
        self.slopes = calls.head_slopes(spec.q_heads, spec.alibi, q.device) if spec.alibi else None
        self.dims = tuple(c.padded for c in rows.codecs)
        self.scale, self.v_scale = spec.scale * 2.0 ** rows.shifts[0], 2.0 ** rows.shifts[1]
        self.copied = q.dtype != rows.types[0] or not staging.mappable(q)
        self.lowered = 0 if q.dtype == rows.types[0] else _LOWERED
        self.scale *= 2.0**self.lowered
        self.processors = _processors(q.device.index)
        made = self.shape(torch.float32)
        most = spec.batch * spec.kv_heads
        if self.copied:
            most = max(1, staging.QUERIES // (self._bytes(1) * min(_STEP, spec.q_len)))
        blocks = spec.groups // made.pack * -(-spec.q_len // made.rows)
        self.cut = staging.cut(spec.batch, spec.kv_heads, rows.keys, rows.room, blocks, self.processors, most)
        self.step = spec.q_len
        if self.copied:
            pairs = self.cut.batches * self.cut.heads
            self.step = min(spec.q_len, max(_STEP, staging.QUERIES // self._bytes(pairs) // _STEP * _STEP))
            self.buffer = torch.empty(self._bytes(pairs) // 2 * self.step, dtype=rows.types[0], device=q.device)

    def _bytes(self, pairs: int) -> int:
        """Of a token of the queries of some KV heads, in 16 bits."""
        return pairs * self.spec.groups * self.dims[0] * 2

    def shape(self, out: torch.dtype) -> Shape | Portable:
        mask, own, boxed = 0, False, False
        if self.mask is not None:
            mask, own = calls.MASKS[self.mask.dtype], calls.strides(self.mask)[1] != 0
            boxed = _boxed(self.mask, self.rows.first - self.rows.view.first)
        types = *self.rows.types, out
        exact = self.scale <= 1.0 and math.frexp(self.scale)[0] == 0.5
        settings = dict(head_mask=own, boxed=boxed, exact=exact, mapped=self.block_map is not None)
        settings["behind"] = isinstance(self, _Behind)
        settings["processors"] = {"tall": 0, "short": 2**31}.get(_forced, self.processors)
        return shape(self.spec, self.dims, types, mask, self.room, self.rows.pages, self.rows.clears, **settings)

    def results(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        sizes, device = (self.spec.batch, self.spec.q_heads, self.spec.q_len), self.q.device
        return torch.empty((*sizes, self.dims[1]), dtype=dtype, device=device), torch.empty(sizes, device=device)

    def nothing(self) -> tuple[Tensor, Tensor]:
        """Results without keys."""
        out, lse = self.results(torch.float32)
        lse.copy_(torch.full_like(lse, -torch.inf) if self.sinks is None else self.sinks[None, :, None].expand_as(lse))
        return out.zero_(), lse

    def run(self) -> tuple[Tensor, Tensor]:
        """By our kernels."""
        rows, spec, step = self.rows, self.spec, self.cut.keys
        whole = step >= rows.keys and rows.view.v_codec.identity
        out, lse = self.results(spec.dtype if whole else torch.float32)
        for batches, heads in self.cut.parts(spec.batch, spec.kv_heads):
            for first in range(0, rows.keys, step):
                count = min(step, rows.keys - first)
                k, v = rows.take(batches, heads, rows.first + first, count, self.stream)
                for low in range(0, spec.q_len, self.step):
                    self.launch(batches, heads, low, rows.first + first, count, k, v, out, lse)
        return out, lse

    def piece(self, x: Tensor, batches: slice, heads: slice, low: int) -> Tensor:
        """Of q ``[B, Hq, Tq, D]`` or results, ``step`` queries from ``low`` on."""
        return x[batches, heads, low : low + self.step]

    def bound(self, call: Prefill, batches: slice) -> None:
        """What a call says of where sequences lie."""

    def queries(self, batches: slice, heads: slice, low: int) -> Tensor:
        """``step`` queries from ``low`` on as the kernel takes them: ``[b, h * groups, n, Dk]``."""
        q = self.piece(self.q, batches, heads, low)
        if not self.copied:
            return q
        return staging.narrowed(q, self.buffer[: q.numel()].view(q.shape), self.lowered, self.stream)

    def launch(
        self, batches: slice, heads: slice, low: int, first: int, keys: int, k: Tensor, v: Tensor, out: Tensor,
        lse: Tensor,
    ) -> None:  # fmt: skip
        """``step`` queries from ``low`` on of these sequences and KV heads, and ``keys`` keys from position ``first`` on."""
        spec, rows = self.spec, self.rows
        q_heads = slice(heads.start * spec.groups, heads.stop * spec.groups)
        q, q_len = self.queries(batches, q_heads, low), min(self.step, spec.q_len - low)
        out, lse = (self.piece(x, batches, q_heads, low) for x in (out, lse))
        made = self.shape(out.dtype)
        tiles, pairs = -(-q_len // made.rows), len(range(spec.batch)[batches]) * len(range(spec.kv_heads)[heads])
        starts, lengths, lengths_batch = rows.ends(batches)
        call = Prefill(
            out=out.data_ptr(), out_strides=out.stride()[:3], lse=lse.data_ptr(), lse_strides=lse.stride()[:2],
            sinks=0 if self.sinks is None else self.sinks[q_heads].data_ptr(),
            slopes=0 if self.slopes is None else self.slopes[q_heads].data_ptr(), starts=starts, lengths=lengths,
            lengths_batch=lengths_batch, length=rows.view.length, oldest=rows.view.first, keep=rows.keep, origin=first,
            relative=rows.relative, kv_heads=len(range(spec.kv_heads)[heads]), groups=spec.groups, q_len=q_len, kv_len=keys,
            tiles=tiles,
            section=max(1, min(pairs, _SECTION // (keys * sum(self.dims) * 2))), pairs=pairs, causal=spec.causal,
            window=spec.window or 0, first=rows.view.length - spec.q_len + low - first, joined=first > rows.first,
            dv=self.dims[1], scale=self.scale, softcap=spec.softcap, v_scale=self.v_scale,
        )  # fmt: skip
        self.bound(call, batches)
        at = batches.start, q_heads.start, low, first - rows.view.first
        if any(rows.pages):
            (segment,) = rows.view.segments
            call.pages, call.pages_batch = staging.table_of(segment, batches)
            call.slot, call.last_page = rows.slot + first - rows.first, segment.pages.shape[1] - 1
        if self.mask is not None:
            call.mask, call.mask_strides = _at(self.mask, at), calls.strides(self.mask)
        if self.block_map is not None:
            states = self.block_map.states
            call.map = _at(states, (*at[:2], at[2] // made.rows, at[3] // made.keys))
            call.map_strides = calls.strides(states)[:3]
        blocks = pairs * spec.groups // made.pack * tiles
        if self.room:
            where = [_operands(q, k, v)]
        else:
            where = [_tensor_map(x, n, m) for x, n, m in zip((q, k, v), made.boxes, (made.pack, 1, 1))]
            where.append(where[0])  # of no mask
            if made.boxed:
                sizes = q.shape[0], q.shape[1], q.shape[2], keys
                parts = (slice(i, i + n) if s else slice(1) for i, n, s in zip(at, sizes, calls.strides(self.mask)))
                own = (64 // made.pack, made.pack) if made.apart else (made.rows, 1)
                where[3] = _tensor_map(self.mask[tuple(parts)], *own)
            if made.groups:
                many = min(2, made.pack)  # heads in the 16 rows of a warp
                where.append(_tensor_map(out, 16 // many, many) if made.out_bytes else where[0])
            # tiles of one length, or all of one section: dealt out among as many blocks as run at once. Else the hardware
            # deals them out.
            even = not rows.ragged and (not spec.causal or spec.window or call.section == pairs)
            if even and self.block_map is None:
                blocks = min(blocks, self.processors)
        kernel = nvrtc.kernel(made.kernel, made.defines, q.device.index, made.shared)
        kernel.launch((blocks, 1, 1), made.threads, self.stream, call, *where)


class _Behind(_Call):
    """Sequences behind each other in q ``[1, Hq, total, D]`` and in results. Of q there is one 16-bit copy, or none."""

    def __init__(
        self, q: Tensor, rows: staging.Rows | staging.Behind, spec: AttentionSpec, sinks: Tensor | None, bounds: Tensor
    ):
        self.bounds = bounds
        super().__init__(q, rows, spec, None, None, sinks, 0)
        self.step = spec.q_len
        if self.copied:
            room = torch.empty(q.shape[:3] + self.dims[:1], dtype=rows.types[0], device=q.device)
            self.q, self.copied = staging.narrowed(q, room, self.lowered, self.stream), False

    def results(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        _, heads, total, _ = self.q.shape
        out = torch.empty((total, heads, self.dims[1]), dtype=dtype, device=self.q.device)
        return out.transpose(0, 1)[None], torch.empty((1, heads, total), device=self.q.device)

    def piece(self, x: Tensor, batches: slice, heads: slice, low: int) -> Tensor:
        return x[:, heads]

    def bound(self, call: Prefill, batches: slice) -> None:
        call.bounds, call.tokens = self.bounds.data_ptr() + 4 * batches.start, self.q.shape[2]
        if self.rows.bounds is not None:
            call.key_bounds = self.rows.bounds.data_ptr() + 4 * batches.start


def _at(t: Tensor, index: tuple[int, ...]) -> int:
    """Address of an element of ``t``, whose axes of one stand for any size."""
    return t.data_ptr() + sum(i * s for i, s in zip(index, calls.strides(t))) * t.element_size()
