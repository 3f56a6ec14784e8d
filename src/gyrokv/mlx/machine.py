"""The entry for MLX: kernels as ``mlx.core.fast.metal_kernel`` takes them, called with MLX arrays.

Facts of that interface: the source is the body of a kernel, MLX writes its signature and makes inputs contiguous;
``grid`` counts threads; outputs are always new arrays; inputs of fewer than 8 elements come in another address space.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import torch
from torch import Tensor

from ..backends.metal import launches
from ..backends.metal.kernels import Program
from ..quant import Codec, Packed
from ..rotation import rotate

DTYPES = {mx.float32: torch.float32, mx.float16: torch.float16, mx.bfloat16: torch.bfloat16}


class Machine:
    """Launches on MLX's default stream; see ``backends/metal/launches.py``."""

    def __init__(self) -> None:
        self._kernels: dict[str, Any] = {}
        self._constants: dict[int, tuple[Tensor, mx.array]] = {}  # by identity; the key is kept, as no other may take it

    def strides(self, x: mx.array) -> tuple[int, ...]:
        return launches.contiguous(x.shape)

    def constant(self, value: Tensor) -> mx.array:
        found = self._constants.get(id(value))
        if found is None:
            found = self._constants[id(value)] = (value, mx.array(value.numpy()))
        return found[1]

    def fill(self, shape: Sequence[int], value: float) -> mx.array:
        return mx.full(tuple(shape), value, dtype=mx.float32)

    def concatenate(self, arrays: Sequence[mx.array]) -> mx.array:
        return mx.concatenate(list(arrays), axis=0)

    def launch(
        self, program: Program, inputs: Sequence[mx.array], ints: Sequence[int], floats: Sequence[float],
        groups: Sequence[int], outputs: Sequence,
    ) -> list[mx.array]:  # fmt: skip
        """See ``launches.py``; ``outputs`` are all (shape, type name)."""
        kernel = self._kernels.get(program.name)
        if kernel is None:
            kernel = self._kernels[program.name] = mx.fast.metal_kernel(
                name=program.name, input_names=[*program.inputs, "ints", "floats"], output_names=list(program.outputs),
                header=program.header, source=program.body,
            )  # fmt: skip
        return kernel(
            inputs=[*inputs, mx.array([int(n) for n in ints], mx.int64), mx.array([float(x) for x in floats], mx.float32)],
            grid=(groups[0] * program.threads, groups[1], groups[2]),
            threadgroup=(program.threads, 1, 1),
            output_shapes=[tuple(shape) for shape, _ in outputs],
            output_dtypes=[getattr(mx, kind) for _, kind in outputs],
        )


@cache
def machine() -> Machine:
    """The machine of this process."""
    return Machine()


# -- the linear maps around a format (see quant.Codec)


@cache
@torch.inference_mode(False)
def _rotation(name: str, block: int) -> mx.array:
    """What multiplies a block of ``block`` values from the right."""
    return mx.array(rotate(torch.eye(block), name, block).numpy())


@cache
@torch.inference_mode(False)
def _matrix(codec: Codec) -> mx.array:
    return mx.array(codec.matrix.numpy())


def prepare(codec: Codec, x: mx.array) -> mx.array:
    """Heads ``[B, H, T, D]`` in the space that the format encodes: turned by the caller's matrix."""
    return x if codec.matrix is None else x.astype(mx.float32) @ _matrix(codec).T


def query(codec: Codec, q: mx.array) -> mx.array:
    """q ``[B, Hq, Tq, D]`` in the space of stored keys: ``[B, Hq, Tq, padded]``."""
    q = prepare(codec, q)
    if codec.padded != codec.head_dim:
        q = mx.pad(q, [(0, 0)] * 3 + [(0, codec.padded - codec.head_dim)])
    if codec.rotation == "none":
        return q
    blocks = q.astype(mx.float32).reshape(*q.shape[:3], -1, codec.group) @ _rotation(codec.rotation, codec.group)
    return blocks.reshape(q.shape)


def output(codec: Codec, out: mx.array) -> mx.array:
    """An output ``[B, H, T, padded]`` in the space of stored values back to heads ``[B, H, T, D]``."""
    if codec.rotation != "none":
        blocks = out.reshape(*out.shape[:3], -1, codec.group) @ _rotation(codec.rotation, codec.group).T
        out = blocks.reshape(out.shape)
    out = out[..., : codec.head_dim]
    return out if codec.matrix is None else out @ _matrix(codec)


def encode(codec: Codec, x: mx.array) -> Packed:
    """Heads ``[B, H, T, D]`` to packed rows, words as uint16."""
    fmt, x = codec.format, prepare(codec, x)
    if fmt.is_dense:
        words = saturate(x, getattr(mx, fmt.element))
        return Packed(words, words[..., :0])
    shape = x.shape[:3]
    scales = fmt.scales_per_head(codec.head_dim)
    targets = [
        ((*shape, fmt.words_per_head(codec.head_dim)), "uint16"),
        ((*shape, max(1, scales)), fmt.scale_dtype),  # a row without scales writes none
    ]
    words, scale = launches.encode(machine(), x, codec, targets)
    return Packed(words, scale[..., :scales])


def saturate(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """``x`` as ``dtype``; values beyond its range become its largest."""
    if x.dtype == dtype:
        return x
    limits = mx.finfo(dtype)
    return mx.clip(x.astype(mx.float32), limits.min, limits.max).astype(dtype)
