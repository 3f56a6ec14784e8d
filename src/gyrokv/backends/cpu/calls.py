"""Tensors, formats and views as the library reads them: one structure per call, from parts that are made once."""

from __future__ import annotations

import ctypes
import math
import struct
from array import array
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import GyroKVError
from ...formats import KVFormat
from ...masks import BlockMap
from ...quant import Codec, Packed, code_values, saturate, scale_divisor
from ...rotation import ROTATIONS, sign_table
from ...spec import AttentionSpec, alibi_slopes
from ...view import KVView, Segment
from . import native

ELEMENTS = {
    torch.float32: native.F32,
    torch.float16: native.F16,
    torch.bfloat16: native.BF16,
    torch.float8_e4m3fn: native.FP8_E4M3,
}
SCALES = {"float16": native.SCALE_F16, "float32": native.SCALE_F32}
_MASKS = {
    torch.bool: native.MASK_BOOL,
    torch.float32: native.MASK_F32,
    torch.float16: native.MASK_F16,
    torch.bfloat16: native.MASK_BF16,
}
_RULES = {
    "absmax": native.RULE_ABSMAX,
    "signed_absmax": native.RULE_SIGNED_ABSMAX,
    "l2": native.RULE_L2,
    "rms": native.RULE_RMS,
}
_NO_FEATURES = (0,) * 16  # no mask, slopes, sinks, starts nor block map
_RANGE, _ROWS = struct.Struct("@qq"), struct.Struct("@18q")  # of a native.Run: position and count, and all else
_KEPT = "cpu", "cpu, fast"  # see _place
_RUN_WORDS = ctypes.sizeof(native.Run) // 8
_LEAST_TURNED = 32  # values of a block that kernels rotate: see Turn in csrc/core.h
_FEW_ROWS, _MANY_BITS = 2, 4  # query rows and bits of a value with which one term seldom takes less time than two
_ONE_PLANE, _TWO_PLANES = 127, 127 * 256  # largest magnitudes of levels in one and in two int8


# -- formats


def _format(fmt: KVFormat, head_dim: int, padded: int, coarse: bool) -> native.Format:
    """``fmt`` as kernels read it, for rows of ``padded`` values that stand for heads of ``head_dim``. ``coarse``: levels of
    two int8 become one, off by 1/254 of the largest at most."""
    if not fmt.has_levels:
        return native.Format(ELEMENTS[fmt.dtype], fmt.bits, padded, padded, native.SCALE_NONE, 1, 1.0, 0)
    planes, factor, table = _planes(fmt)
    if coarse and planes == 2:
        planes, factor, table = 1, 256 * factor, table[1:]
    _, group = fmt.layout(head_dim)
    whole = native.Format(
        native.CODES, fmt.bits, padded, min(group, fmt.scale_span or group), SCALES[fmt.scale_dtype],
        planes, factor / scale_divisor(fmt, head_dim), int(table[0] == list(range(-128, 128))),
    )  # fmt: skip
    for plane in range(planes):
        whole.table[plane][: len(table[plane])] = table[plane]
    return whole


def _planes(fmt: KVFormat) -> tuple[int, float, list[list[int]]]:
    """``(planes, factor, table[plane][code])``: value = factor * sum of 256**plane * table[plane][code].

    Integer levels are kept exactly. Others are rounded to 1/32512 of the largest, 1.5e-5 of it at most.
    """
    step = float(torch.tensor(fmt.step, dtype=torch.float32))
    most = max(map(abs, fmt.levels))
    values = code_values(fmt).double()
    if all(float(level).is_integer() for level in fmt.levels) and most <= _TWO_PLANES:
        factor = step
    else:
        factor, most = float(values.abs().max()) / _TWO_PLANES, _TWO_PLANES
    whole = (values / factor).round().int().tolist()
    consecutive = whole == list(range(-128, 128))
    if most <= _ONE_PLANE or consecutive:
        return 1, factor, [whole]
    high = [(value + 128) >> 8 for value in whole]
    return 2, factor, [[value - 256 * top for value, top in zip(whole, high)], high]


# by identity, because a row hashes all of its levels; the row is kept, so that no other one can take its place
_formats: dict[tuple[int, int, int, bool], tuple[KVFormat, native.Format, int]] = {}


def format_address(fmt: KVFormat, head_dim: int, padded: int, coarse: bool = False) -> int:
    """Where the structure of ``fmt`` lies (see :func:`_format`); it lives as long as the process."""
    key = (id(fmt), head_dim, padded, coarse)
    found = _formats.get(key)
    if found is None:
        made = _format(fmt, head_dim, padded, coarse)
        found = _formats.setdefault(key, (fmt, made, ctypes.addressof(made)))
    return found[2]


# -- attention


def attend(
    q: Tensor,
    view: KVView,
    spec: AttentionSpec,
    mask: Tensor | None,
    block_map: BlockMap | None,
    sinks: Tensor | None,
    *,
    heads: bool = False,
) -> tuple[Tensor, Tensor]:
    """The contract's ``attend``, or with ``heads`` its ``attend_heads``: the kernels rotate q and the outputs.

    Tensors that the structure points to are held by the locals of this function.
    """
    library = native.library()
    k_codec, v_codec, dtype = view.k_codec, view.v_codec, q.dtype
    q_turn = turn_address(k_codec, False) if heads else 0
    if q_turn is None:
        q_turn, q = 0, k_codec.query(q)
    out_turn, out_dim, narrow = 0, v_codec.padded, v_codec.is_plain  # narrow: kernels may round outputs to bfloat16
    finished = heads and (turned := turn_address(v_codec, True)) is not None
    if finished:
        out_turn, out_dim, narrow = turned, v_codec.head_dim, True
    if not q.is_contiguous() and q.stride(3) != 1:
        q = q.contiguous()
    batch, q_heads, q_len, q_dim = q.shape
    out_dtype = torch.bfloat16 if narrow and dtype == torch.bfloat16 else torch.float32
    out = q.new_empty(batch, q_heads, q_len, out_dim, dtype=out_dtype)
    lse = q.new_empty(batch, q_heads, q_len, dtype=torch.float32)
    fast = spec.fast and pays(spec, library.level.name)
    runs = _runs(view, fast)
    runs_at, words = runs.buffer_info()
    features = _NO_FEATURES
    if mask is not None or sinks is not None or view.starts is not None:
        slopes = _slopes(q_heads, spec.alibi) if spec.alibi else None
        sinks = None if sinks is None else sinks.to(torch.float32).contiguous()
        starts = None if view.starts is None else view.starts.contiguous()
        states = None if block_map is None else block_map.states
        features = (
            _address(mask), *_broadcast_strides(mask), _address(slopes), _address(sinks), _address(starts),
            _address(states), *_broadcast_strides(states), *((0, 0) if block_map is None else block_map.tile),
            native.MASK_NONE if mask is None else _MASKS[mask.dtype],
        )  # fmt: skip
    call = native.ATTEND.pack(
        batch, q_heads, spec.kv_heads, q_len, k_codec.padded, v_codec.padded, q_dim, out_dim, ELEMENTS[q.dtype],
        1 if fast else 2, q.data_ptr(), *native.byte_strides(q), q_turn, out_turn, out.data_ptr(), lse.data_ptr(),
        spec.scale, spec.softcap, spec.causal, torch.get_num_threads(), ELEMENTS[out_dtype], words // _RUN_WORDS, runs_at,
        spec.window or 0, view.length - q_len, view.first, view.length, *features,
    )  # fmt: skip
    _check(library.attend(call, library.level.index))
    if heads and not finished:
        out = v_codec.output(out)
    return out.to(dtype) if heads and out.dtype != dtype else out, lse


def pays(spec: AttentionSpec, level: str) -> bool:
    """Whether to round to 8 bits where ``spec`` allows it: not where it takes as long or longer (see CONTRIBUTING.md)."""
    few = spec.q_len * spec.groups <= _FEW_ROWS
    return level != "avx512" or not (few and max(spec.k_format.bits, spec.v_format.bits) >= _MANY_BITS)


_turned: dict[tuple[str, int, bool], tuple[native.Turn, int, tuple]] = {}


def turn_address(codec: Codec, back: bool) -> int | None:
    """Where the ``native.Turn`` lies that is all of what ``codec`` does to q or, with ``back``, to outputs; 0 if that is
    nothing, None if kernels cannot do it. It lives as long as the process."""
    if not codec.only_rotates:
        return None
    if codec.rotation == "none":
        return 0
    if codec.group % _LEAST_TURNED:
        return None
    key = (codec.rotation, codec.group, back)
    found = _turned.get(key)
    if found is None:
        signs = [sign_table(table, codec.group) for table in ROTATIONS[codec.rotation].signs[:: -1 if back else 1]]
        before, after = signs[0].contiguous(), (signs[1] / math.sqrt(codec.group)).contiguous()
        made = native.Turn(before.data_ptr(), after.data_ptr(), codec.group)
        found = _turned.setdefault(key, (made, ctypes.addressof(made), (before, after)))
    return found[1]


def _runs(view: KVView, fast: bool) -> array:
    """The view's rows as runs of consecutive slots, in order of position: ``native.Run``, as the 64-bit integers of it."""
    made = []
    for segment in view.segments:
        place, position = _place(segment, view, fast), segment.first
        for slot, count in segment.runs(position, segment.stop):
            made += _RANGE.pack(position, count), place.rows if slot == 0 else place.rows_from(slot)
            position += count
    return array("q", b"".join(made))


class _Place(NamedTuple):
    """Where rows of k and v lie: kept with their store, as to ask tensors takes longer than to pack a call, most of all
    after a call that left nothing else in a core's cache. ``at``: of k's words, by which a moved store is noticed.
    ``rows``: what follows position and count in ``native.Run``, packed."""

    k: Packed
    v: Packed
    at: int
    rows: bytes

    def rows_from(self, slot: int) -> bytes:
        fields = _ROWS.unpack(self.rows)
        return _ROWS.pack(*_from(fields[:8], slot), *_from(fields[8:16], slot), *fields[16:])


def _place(segment: Segment, view: KVView, fast: bool) -> _Place:
    k, v = segment.k, segment.v
    found = segment.kept.get(_KEPT[fast])
    if found is None or found.k is not k or found.v is not v or found.at != k.words.data_ptr():
        sides = (segment.k_format, view.k_codec), (segment.v_format, view.v_codec)
        formats = [format_address(fmt, codec.head_dim, codec.padded, fast) for fmt, codec in sides]
        found = segment.kept[_KEPT[fast]] = _Place(k, v, k.words.data_ptr(), _ROWS.pack(*_rows(k), *_rows(v), *formats))
    return found


def _rows(packed: Packed) -> tuple[int, ...]:
    """``native.Rows``, flat."""
    words, scale = packed
    strides = native.byte_strides(scale) if scale.shape[-1] else (0, 0, 0)
    return words.data_ptr(), scale.data_ptr(), *native.byte_strides(words), *strides


def _from(rows: tuple[int, ...], slot: int) -> tuple[int, ...]:
    words, scale, _, _, word_stride, _, _, scale_stride = rows
    return words + slot * word_stride, scale + slot * scale_stride, *rows[2:]


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _broadcast_strides(t: Tensor | None) -> tuple[int, ...]:
    """Strides of ``t`` in elements, 0 for axes of one; of nothing, four zeros."""
    if t is None:
        return 0, 0, 0, 0
    return tuple(0 if size == 1 else stride for size, stride in zip(t.shape, t.stride()))


@cache
def _slopes(q_heads: int, max_bias: float) -> Tensor:
    return alibi_slopes(q_heads, max_bias).to("cpu", torch.float32)


def _check(status: int) -> None:
    if status == 2:
        raise MemoryError("the CPU kernels found no memory for what they hold between keys")
    if status:
        raise GyroKVError(f"the CPU kernels returned status {status}")


# -- encoding

_SIZES = ["padded", "group", "span", "bits", "sign_magnitude", "rule", "corrected", "ties", "scale_type", "linear", "rotate"]
_FACTORS = ["rotation_factor", "unscaled_factor", "scale_factor", "low", "high", "before", "after", "levels", "boundaries"]
# by identity, as above; the tensors that a structure points to live as long as the process
_encoders: dict[tuple[int, int, str], tuple[KVFormat, tuple, tuple, tuple[Tensor, ...]]] = {}


def empty_rows(x: Tensor, fmt: KVFormat) -> Packed:
    """Room for heads x ``[B, Hkv, T, D]`` in a format that is not dense."""
    words = x.new_empty((*x.shape[:3], fmt.words_per_head(x.shape[3])), dtype=torch.int16)
    scale_dtype = getattr(torch, fmt.scale_dtype) if fmt.has_levels else torch.float32
    return Packed(words, x.new_empty((*x.shape[:3], fmt.scales_per_head(x.shape[3])), dtype=scale_dtype))


def encode(x: Tensor, codec: Codec, into: Packed, slot: int = 0) -> Packed:
    """:meth:`Codec.encode` for rows that are not dense: heads x ``[B, Hkv, T, D]`` to ``into`` from ``slot`` on, the
    same bits. Returns ``into``."""
    library = native.library()
    x = codec.prepare(x)
    if x.dtype not in ELEMENTS or x.element_size() == 1:
        x = saturate(x, torch.float32)
    if x.stride(3) != 1:
        x = x.contiguous()
    batch, heads, tokens, head_dim = x.shape
    _, sizes, factors, _ = _encoder(codec.format, head_dim, codec.rotation)
    words, scale, *strides = _from(_rows(into), slot)
    call = native.ENCODE.pack(
        batch, heads, tokens, head_dim, ELEMENTS[x.dtype], *sizes, torch.get_num_threads(), *factors,
        x.data_ptr(), *native.byte_strides(x), words, *strides[:3], scale, *strides[3:],
    )  # fmt: skip
    _check(library.encode(call, library.level.index))
    return into


def _encoder(fmt: KVFormat, head_dim: int, rotation: str) -> tuple[KVFormat, tuple, tuple, tuple[Tensor, ...]]:
    """What an Encode holds but for the data: ``_SIZES`` and ``_FACTORS``."""
    key = (id(fmt), head_dim, rotation)
    found = _encoders.get(key)
    if found is None:
        settings, tensors = _encoder_settings(fmt, head_dim, rotation)
        sizes, factors = (tuple(settings.get(name, 0) for name in names) for names in (_SIZES, _FACTORS))
        found = _encoders.setdefault(key, (fmt, sizes, factors, tensors))
    return found


def _encoder_settings(fmt: KVFormat, head_dim: int, rotation: str) -> tuple[dict, tuple]:
    padded, group = fmt.layout(head_dim)
    row = ROTATIONS[rotation]
    l2 = fmt.scale == "l2"
    settings = dict(
        padded=padded, group=group, bits=fmt.bits,
        span=group if l2 else min(group, fmt.scale_span or group),
        sign_magnitude=fmt.coding == "sign_magnitude", corrected=fmt.corrected, linear=fmt.kind == "linear",
        ties=0 if fmt.ties == "up" else 2 if fmt.kind == "linear" else 1,
        rotate=row.mixes, rotation_factor=fmt.unit if l2 else 1.0 / math.sqrt(group),
        unscaled_factor=fmt.unit * math.sqrt(group) if l2 else 1.0, scale_factor=fmt.scale_factor,
    )  # fmt: skip
    tensors = {}
    if row.mixes:
        tensors = {side: sign_table(signs, group) for side, signs in zip(("before", "after"), row.signs)}
    if fmt.has_levels:
        settings |= dict(rule=_RULES[fmt.scale], scale_type=SCALES[fmt.scale_dtype])
        settings |= dict(low=fmt.levels[0], high=fmt.levels[-1])
        tensors |= dict(levels=fmt.level_values, boundaries=fmt.boundaries)
    else:
        settings |= dict(rule=native.RULE_FLOAT8, scale_type=native.SCALE_NONE)
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    return settings | {name: t.data_ptr() for name, t in tensors.items()}, tuple(tensors.values())
