"""Tensors, formats and views as the library reads them: one structure per call, from parts that are made once."""

from __future__ import annotations

import ctypes
import math
from array import array
from functools import cache

import torch
from torch import Tensor

from ...errors import GyroKVError
from ...formats import KVFormat
from ...masks import BlockMap
from ...quant import Codec, Packed, code_values, saturate, scale_divisor
from ...rotation import ROTATIONS, sign_table
from ...spec import AttentionSpec, alibi_slopes
from ...view import KVView
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
_RUN_WORDS = ctypes.sizeof(native.Run) // 8
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
    q: Tensor, view: KVView, spec: AttentionSpec, mask: Tensor | None, block_map: BlockMap | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The contract's ``attend``. Tensors that the structure points to are held by the locals of this function."""
    library = native.library()
    if q.stride(3) != 1:
        q = q.contiguous()
    batch, q_heads, q_len, k_dim = q.shape
    v_dim = view.v_codec.padded
    rounds = q.dtype == torch.bfloat16 and view.v_codec.is_plain
    out = q.new_empty((batch, q_heads, q_len, v_dim), dtype=torch.bfloat16 if rounds else torch.float32)
    lse = q.new_empty((batch, q_heads, q_len), dtype=torch.float32)
    runs = _runs(view, spec.fast)
    slopes = _slopes(q_heads, spec.alibi) if spec.alibi else None
    sinks = None if sinks is None else sinks.to(torch.float32).contiguous()
    starts = None if view.starts is None else view.starts.contiguous()
    call = native.Attend(
        batch, q_heads, spec.kv_heads, q_len, k_dim, v_dim, ELEMENTS[q.dtype], 1 if spec.fast else 2,
        q.data_ptr(), native.byte_strides(q), out.data_ptr(), lse.data_ptr(),
        spec.scale, spec.softcap, spec.causal, torch.get_num_threads(), ELEMENTS[out.dtype],
        spec.window or 0, view.length - q_len, view.first, view.length,
    )  # fmt: skip
    if mask is not None:
        call.mask, call.mask_type, call.mask_strides = mask.data_ptr(), _MASKS[mask.dtype], _broadcast_strides(mask)
    if block_map is not None:
        states = block_map.states
        call.map, call.map_strides = states.data_ptr(), _broadcast_strides(states)
        call.map_rows, call.map_keys = block_map.tile
    for name, vector in (("slopes", slopes), ("sinks", sinks), ("starts", starts)):
        if vector is not None:
            setattr(call, name, vector.data_ptr())
    call.runs, words = runs.buffer_info()
    call.n_runs = words // _RUN_WORDS
    _check(library.attend(ctypes.byref(call), library.level.index))
    return out, lse


def _runs(view: KVView, fast: bool) -> array:
    """The view's rows as runs of consecutive slots, in order of position: ``native.Run``, written as the 64-bit integers
    that it consists of, because a structure of structures takes longer to make."""
    k_codec, v_codec = view.k_codec, view.v_codec
    runs = array("q")
    for segment in view.segments:
        k_format = format_address(segment.k_format, k_codec.head_dim, k_codec.padded, fast)
        v_format = format_address(segment.v_format, v_codec.head_dim, v_codec.padded, fast)
        k, v = _rows(segment.k), _rows(segment.v)
        position = segment.first
        for slot, count in segment.runs(segment.first, segment.stop):
            runs.extend((position, count))
            for words, scale, word_strides, scale_strides in (_from(k, slot), _from(v, slot)):
                runs.extend((words, scale, *word_strides, *scale_strides))
            runs.extend((k_format, v_format))
            position += count
    return runs


def _rows(packed: Packed) -> tuple:
    words, scale = packed
    strides = native.byte_strides(scale) if scale.shape[-1] else (0, 0, 0)
    return words.data_ptr(), scale.data_ptr(), native.byte_strides(words), strides


def _from(rows: tuple, slot: int) -> tuple:
    words, scale, word_strides, scale_strides = rows
    return words + slot * word_strides[2], scale + slot * scale_strides[2], word_strides, scale_strides


def _broadcast_strides(t: Tensor) -> tuple[int, ...]:
    """Strides of ``t`` in elements, 0 for axes of one."""
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

_encoders: dict[tuple[int, int, str], tuple[KVFormat, native.Encode, tuple]] = {}  # by identity, as above


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
    call = native.Encode.from_buffer_copy(_encoder(codec.format, head_dim, codec.rotation))
    call.batch, call.heads, call.tokens, call.threads = batch, heads, tokens, torch.get_num_threads()
    call.x, call.x_kind, call.x_strides = x.data_ptr(), ELEMENTS[x.dtype], native.byte_strides(x)
    call.words, call.scale, call.word_strides, call.scale_strides = _from(_rows(into), slot)
    _check(library.encode(ctypes.byref(call), library.level.index))
    return into


def _encoder(fmt: KVFormat, head_dim: int, rotation: str) -> native.Encode:
    """An Encode that lacks only the data. The tensors that it points to live as long as the process."""
    key = (id(fmt), head_dim, rotation)
    found = _encoders.get(key)
    if found is None:
        settings, tensors = _encoder_settings(fmt, head_dim, rotation)
        found = _encoders.setdefault(key, (fmt, native.Encode(**settings), tensors))
    return found[1]


def _encoder_settings(fmt: KVFormat, head_dim: int, rotation: str) -> tuple[dict, tuple]:
    padded, group = fmt.layout(head_dim)
    row = ROTATIONS[rotation]
    l2 = fmt.scale == "l2"
    settings = dict(
        dim=head_dim, padded=padded, group=group, bits=fmt.bits,
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
