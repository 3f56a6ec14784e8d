"""Rotations of q and of the output by kernels: their signs (csrc/turn.cuh), and whole tensors for prefill (csrc/turn.cu)."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_uint32, c_void_p
from functools import cache

import torch
from torch import Tensor

from ...quant import Codec
from ...rotation import ROTATIONS, sign_table
from .nvrtc import kernel
from .plan import BF16, F16, F32

TYPES = {torch.float16: F16, torch.bfloat16: BF16, torch.float32: F32}
_VALUES = 640  # most values of a row: 576 in whole blocks of 128
_ROWS, _THREADS = 8, 256  # of a block

SignBits = c_uint32 * (_VALUES // 16)
NO_SIGNS = (0,) * (_VALUES // 16)


class _Turn(ctypes.Structure):
    _fields_ = [
        ("from_", c_void_p), ("to", c_void_p), ("strides", c_int64 * 3), ("heads", c_uint32), ("tokens", c_uint32),
        ("rows", c_uint32), ("from_dim", c_int), ("to_dim", c_int), ("signs", SignBits),
    ]  # fmt: skip


def block(codec: Codec) -> int:
    """The block of a codec's own rotation, 0 without one."""
    return 0 if codec.rotation == "none" else codec.group


@cache
def _signs(rotation: str, size: int, back: bool) -> tuple[int, ...]:
    words = []
    for table in ROTATIONS[rotation].signs[:: -1 if back else 1]:
        signs = sign_table(table, size).tolist()
        bits = [signs[d % size] < 0 for d in range(_VALUES)]
        words += [sum(bit << i for i, bit in enumerate(bits[at : at + 32])) for at in range(0, _VALUES, 32)]
    return tuple(words)


def signs(codec: Codec, back: bool) -> tuple[int, ...]:
    """``SignBits`` before and after the butterfly; ``back``: of the way from what is stored to values."""
    return _signs(codec.rotation, codec.group, back) if block(codec) else NO_SIGNS


def query(codec: Codec, q: Tensor) -> Tensor:
    """``codec.query``: by one kernel where a rotation is all that it does."""
    return _turn(codec, q, codec.padded, torch.float32, False) if _alone(codec) else codec.query(q)


def output(codec: Codec, out: Tensor, dtype: torch.dtype) -> Tensor:
    """``codec.output`` in ``dtype``, alike."""
    return _turn(codec, out, codec.head_dim, dtype, True) if _alone(codec) else codec.output(out).to(dtype)


def _alone(codec: Codec) -> bool:
    return codec.only_rotates and block(codec) > 0


def _turn(codec: Codec, x: Tensor, dim: int, dtype: torch.dtype, back: bool) -> Tensor:
    if x.stride(3) != 1:
        x = x.contiguous()
    batch, heads, tokens, from_dim = x.shape
    to = torch.empty((batch, heads, tokens, dim), dtype=dtype, device=x.device)
    rows = batch * heads * tokens
    if rows == 0:
        return to
    call = _Turn(x.data_ptr(), to.data_ptr(), x.stride()[:3], heads, tokens, rows, from_dim, dim, signs(codec, back))
    defines = ("IN_TYPE", TYPES[x.dtype]), ("OUT_TYPE", TYPES[dtype]), ("DIM", codec.padded), ("TURN", codec.group)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    with torch.cuda.device(x.device):
        kernel("turn", defines, x.device.index).launch((-(-rows // _ROWS), 1, 1), _THREADS, stream, call)
    return to
