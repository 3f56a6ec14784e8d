"""Tensors, formats and views as the kernels read them: one structure per launch (csrc/params.cuh)."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_uint32, c_void_p
from functools import cache

import torch
from torch import Tensor

from ...formats import KVFormat
from ...quant import Packed, code_values
from ...spec import AttentionSpec, alibi_slopes
from ...view import KVView, Segment
from . import plan, turn
from .nvrtc import kernel

Q_TYPES = turn.TYPES
MASKS = {torch.bool: 1, torch.float32: 2, torch.float16: 3, torch.bfloat16: 4}
_FAR = 2**31 - 1  # positions from the origin on: no limit


class Side(ctypes.Structure):
    _fields_ = [("words", c_void_p), ("scale", c_void_p), ("word_strides", c_int64 * 3), ("scale_strides", c_int64 * 3)]


class Finish(ctypes.Structure):
    _fields_ = [
        ("sinks", c_void_p), ("out", c_void_p), ("lse", c_void_p), ("out_dim", c_int), ("signs", turn.SignBits),
    ]  # fmt: skip


class Attend(ctypes.Structure):
    _fields_ = [
        ("q", c_void_p), ("q_strides", c_int64 * 3), ("k", Side), ("v", Side), ("out", c_void_p), ("top", c_void_p),
        ("slopes", c_void_p), ("mask", c_void_p), ("mask_strides", c_int64 * 4), ("starts", c_void_p),
        ("k_table", c_void_p), ("v_table", c_void_p), ("pages", c_void_p), ("lengths", c_void_p),
        ("lengths_batch", c_int64), ("pages_batch", c_int64), ("page_slots", c_int64),
        ("origin", c_int64), ("length", c_int), ("first", c_int), ("stop", c_int), ("trail", c_int), ("keep", c_int),
        ("kv_first", c_int), ("window", c_int),
        ("capacity", c_int), ("q_heads", c_int), ("kv_heads", c_int), ("q_len", c_int), ("groups", c_int),
        ("causal", c_int), ("splits", c_int), ("split_base", c_int), ("splits_total", c_int),
        ("over_groups", c_uint32), ("over_splits", c_uint32),
        ("scale", c_float), ("softcap", c_float), ("k_factor", c_float), ("v_factor", c_float),
        ("k_low", c_uint32), ("k_high", c_uint32), ("v_low", c_uint32), ("v_high", c_uint32),
        ("q_dim", c_int), ("k_signs", turn.SignBits), ("finish", Finish),
    ]  # fmt: skip


class Merge(ctypes.Structure):
    _fields_ = [
        ("part", c_void_p), ("top", c_void_p), ("q_heads", c_int), ("q_len", c_int), ("splits", c_int), ("dim", c_int),
        ("finish", Finish),
    ]  # fmt: skip


# -- rows


class Rows:
    """One side of a segment: tensors that kernels can address, and how."""

    def __init__(self, packed: Packed, row: plan.Row, paged: bool = False) -> None:
        self.row = row
        words, scale = packed
        self.copy = _alignment(words, row.bytes)
        if not self.copy:
            words = words.contiguous()
            self.copy = _alignment(words, row.bytes)
        need = 4 if row.wide_scale or row.scales % 2 == 0 else 2
        if row.span and _alignment(scale, row.scale_bytes, (4, 2)) < need:
            scale = scale.contiguous()
        self.words, self.scale = words, scale
        self.word_strides, self.scale_strides = _byte_strides(words), _byte_strides(scale) if row.span else (0, 0, 0)
        self.stride = row.bytes if self.word_strides[2] == row.bytes else 0
        self.scale_stride = row.scale_bytes if self.scale_strides[2] == row.scale_bytes else 0
        # copied by words: where heads have an odd number of them, every other head's begin in the middle of one
        heads = [n for size, n in zip(scale.shape[:2], self.scale_strides) if size > 1]
        self.scale_copy = 4 if all(n % 4 == 0 for n in heads) else 2
        if row.span and (scale.data_ptr() % 4 or (paged and self.scale_copy == 2)):
            self.scale_stride, self.scale_copy = 0, 4

    @property
    def side(self) -> Side:
        scale = self.scale.data_ptr() if self.row.span else 0
        return Side(self.words.data_ptr(), scale, self.word_strides, self.scale_strides)


def _byte_strides(t: Tensor) -> tuple[int, ...]:
    size = t.element_size()
    return tuple(stride * size for stride in t.stride()[:3])


def _alignment(t: Tensor, row_bytes: int, sizes: tuple[int, ...] = (16, 8, 4)) -> int:
    """The largest of ``sizes`` that every row of ``t [B, H, T, N]`` is aligned to, 0 for none."""
    if t.shape[3] > 1 and t.stride(3) != 1:
        return 0
    bits = t.data_ptr() | row_bytes
    for stride, count in zip(_byte_strides(t), t.shape):
        if count > 1:
            bits |= stride
    return next((size for size in sizes if bits % size == 0), 0)


_tables: dict[tuple[int, torch.device], tuple[KVFormat, Tensor]] = {}  # by identity: hashing a row hashes its levels


def _table(fmt: KVFormat, row: plan.Row, device: torch.device) -> Tensor | None:
    """Values by code over the largest, float32, of rows that look them up."""
    if row.kind != plan.TABLE:
        return None
    key = (id(fmt), device)
    if key not in _tables:
        values = code_values(fmt)
        _tables[key] = fmt, (values / values.abs().max()).to(device)
    return _tables[key][1]


# -- attention


@cache
def head_slopes(q_heads: int, max_bias: float, device: torch.device) -> Tensor:
    return alibi_slopes(q_heads, max_bias).to(device, torch.float32)


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _shared_memory(device: int) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def strides(t: Tensor) -> tuple[int, ...]:
    """In elements, 0 for axes of one."""
    return tuple(0 if size == 1 else stride for size, stride in zip(t.shape, t.stride()))


def _origin(segment: Segment, view: KVView, spec: AttentionSpec) -> int:
    """The last position in slot 0 that is no later than the first that can be seen: kernels count in 32 bits from it."""
    if view.lengths is not None:
        return segment.base
    first = segment.first if segment.keep is None else max(segment.first, view.length - segment.keep)
    if spec.window:
        first = max(first, view.length - spec.q_len - spec.window + 1)
    return segment.base + max(0, first - segment.base) // segment.capacity * segment.capacity


def _over(n: int) -> int:
    """What kernels multiply by to divide by n."""
    return -(-(2**32) // n) % 2**32


class _Part:
    """A segment's launch: its kernel, how many splits, the structure."""

    def __init__(
        self, segment: Segment, view: KVView, q: Tensor, spec: AttentionSpec, mask: Tensor | None, turns: bool,
        v_turn: int, out_type: int,
    ) -> None:  # fmt: skip
        k_codec, v_codec, device = view.k_codec, view.v_codec, q.device
        k = Rows(segment.k, plan.row_of(segment.k_format, k_codec.head_dim, k_codec.padded), segment.pages is not None)
        v = Rows(segment.v, plan.row_of(segment.v_format, v_codec.head_dim, v_codec.padded), segment.pages is not None)
        columns = spec.groups * spec.q_len
        problem = plan.Problem(
            k.row, v.row, columns, Q_TYPES[q.dtype], spec.dtype == torch.float32, spec.softcap > 0,
            MASKS[mask.dtype] if mask is not None else 0, spec.alibi > 0, segment.page_slots,
            k.row.kind == plan.TABLE and segment.k_format is segment.v_format, k.copy, v.copy, k.stride, v.stride,
            k.scale_stride, v.scale_stride, k.scale_copy, v.scale_copy, turn.block(k_codec) if turns else 0, v_turn,
            out_type,
        )  # fmt: skip
        self.plan = plan.plan(problem, _shared_memory(device.index))
        self.kernel = kernel("attend", self.plan.defines, device.index, self.plan.shared)
        self.row_tiles = -(-columns // self.plan.rows)
        seen = segment.stop - segment.first if segment.keep is None else min(segment.stop - segment.first, segment.keep)
        if spec.window:
            seen = min(seen, spec.window + spec.q_len)
        origin = _origin(segment, view, spec)

        def near(position: int) -> int:
            return max(-_FAR, min(position - origin, _FAR))

        tiles = -(-seen // self.plan.tile) + 1
        units = spec.batch * spec.kv_heads * self.row_tiles
        self.splits = plan.splits(units, tiles, self.plan.warps // self.plan.team, _processors(device.index))
        self.held = k, v, _table(segment.k_format, k.row, device), _table(segment.v_format, v.row, device)
        self.call = Attend(
            q=q.data_ptr(), q_strides=strides(q)[:3], k=k.side, v=v.side,
            k_table=_pointer(self.held[2]), v_table=_pointer(self.held[3]),
            origin=origin, length=near(view.length), first=near(segment.first), stop=near(segment.stop),
            trail=min(segment.trail, _FAR), keep=_FAR if segment.keep is None else min(segment.keep, _FAR),
            kv_first=near(view.first), window=min(spec.window or 0, 2**30), capacity=segment.capacity,
            q_heads=spec.q_heads, kv_heads=spec.kv_heads, q_len=spec.q_len, groups=spec.groups, causal=spec.causal,
            splits=self.splits, over_groups=_over(spec.groups), over_splits=_over(self.splits), scale=spec.scale,
            softcap=spec.softcap, k_factor=k.row.factor, v_factor=v.row.factor, k_low=k.row.low,
            k_high=k.row.high, v_low=v.row.low, v_high=v.row.high, q_dim=q.shape[3],
        )  # fmt: skip
        if turns:
            self.call.k_signs = turn.signs(k_codec, back=False)
        if segment.pages is not None:
            self.call.pages, self.call.pages_batch = segment.pages.data_ptr(), segment.pages.stride(0)
            self.call.page_slots = segment.page_slots
        if view.lengths is not None:
            self.call.lengths, self.call.lengths_batch = view.lengths.data_ptr(), strides(view.lengths)[0]
        if mask is not None:
            self.call.mask, self.call.mask_strides = mask.data_ptr(), strides(mask)


def attend(
    q: Tensor, view: KVView, spec: AttentionSpec, mask: Tensor | None, sinks: Tensor | None, heads: bool = False
) -> tuple[Tensor, Tensor]:
    """The contract's ``attend``, or with ``heads`` its ``attend_heads``, with the rotations in the kernels.

    Tensors that structures point to are held by the locals of this function.
    """
    first = heads and view.k_codec.only_rotates  # nothing is to be done on q before
    last = heads and view.v_codec.only_rotates  # nor on the output after
    if heads and not first:
        q = view.k_codec.query(q)
    if q.stride(3) != 1:
        q = q.contiguous()
    batch, q_heads, q_len, _ = q.shape
    device, v_dim = q.device, view.v_codec.padded
    out_dim = view.v_codec.head_dim if last else v_dim
    out = torch.empty((batch, q_heads, q_len, out_dim), dtype=spec.dtype if last else torch.float32, device=device)
    lse = torch.empty((batch, q_heads, q_len), dtype=torch.float32, device=device)
    sinks = None if sinks is None else sinks.to(torch.float32).contiguous()
    starts = None if view.starts is None else view.starts.contiguous()
    slopes = head_slopes(q_heads, spec.alibi, device) if spec.alibi else None
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):
        v_turn, out_type = turn.block(view.v_codec) if last else 0, Q_TYPES[out.dtype]
        finish = Finish(_pointer(sinks), out.data_ptr(), lse.data_ptr(), out_dim, turn.signs(view.v_codec, back=True))
        parts = [_Part(segment, view, q, spec, mask, first, v_turn, out_type) for segment in view.segments]
        total = sum(part.splits for part in parts)
        whole = total == 1  # one block has all keys of a row
        results = batch, q_heads, q_len, 0 if whole else total
        partial = torch.empty((*results, v_dim), dtype=torch.float32, device=device)
        top = torch.empty((*results, 2), dtype=torch.float32, device=device)
        base = 0
        for part in parts:
            call = part.call
            call.out, call.top, call.split_base, call.splits_total = partial.data_ptr(), top.data_ptr(), base, total
            call.slopes, call.starts = _pointer(slopes), _pointer(starts)
            if whole:
                call.finish = finish
            grid = (part.row_tiles, spec.kv_heads, batch * part.splits)
            part.kernel.launch(grid, part.plan.warps * 32, stream, call)
            base += part.splits
        if not whole:
            merge = Merge(partial.data_ptr(), top.data_ptr(), q_heads, q_len, total, v_dim, finish)
            rows = batch * q_heads * q_len
            most = next(n for n in (32, 256, 1024, 8192) if n >= total)
            defines = ("SPLITS", most), ("OUT_TYPE", out_type), ("DIM", v_dim), ("V_TURN", v_turn)
            kernel("merge", defines, device.index).launch((rows, 1, 1), -(-v_dim // 32) * 32, stream, merge)
    return (out, lse) if last or not heads else (view.v_codec.output(out).to(spec.dtype), lse)
