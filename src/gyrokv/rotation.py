"""Rotations: orthonormal maps of a head, applied before encoding and paid on q and on the output.

H is the natural-order (Sylvester) Walsh-Hadamard butterfly: strides h = 1, 2, 4, ...; (a, b) -> (a + b, a - b), no
scaling. All arithmetic is float32, one rounding per operation, so that rotated values are the same bits everywhere.
Randomised Hadamard transforms for quantisation: QuIP (Chee et al. 2023), QuaRot (Ashkboos et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """A row: ``y = after * (H(before * x) * c)`` on blocks of the head; ``signs`` are hex, bit 1 = -1, low bit first.

    ``signs`` holds the tables before and after H, each ``""`` for all ones.
    """

    name: str
    signs: tuple[str, str] = ("", "")
    mixes: bool = True


_MLX = (
    "a73b91f46dc2580eb37f24d68945ea1c63afd852970be13d76c419fe4a852cdb"
    "d34ea8179c5be63172b90df5438a6ec7582f94e1b63d0a7cc561d84fa3971e85"
)

ROTATIONS: Mapping[str, Rotation] = MappingProxyType(
    {
        row.name: row
        for row in (
            Rotation("none", mixes=False),
            Rotation("hadamard"),
            Rotation("turbo", ("59036ae44959f842bb3bc6a4a950f249", "90eeac16dc8f623f7a35a5b76265a5be")),
            Rotation("mlx", (_MLX, "")),
        )
    }
)


_WHOLE = 128  # the largest block that is turned by one matrix; two small ones take less time for larger blocks


@cache
@torch.inference_mode(False)  # so that what is kept serves every mode
def sign_table(table: str, block: int) -> Tensor:
    """The signs of a row's hex ``table`` for ``block`` values: float32 1 and -1."""
    if not table:
        return torch.ones(block, device="cpu")
    raw = bytes.fromhex(table)
    return torch.tensor([-1.0 if raw[j // 8] >> (j % 8) & 1 else 1.0 for j in range(block)], device="cpu")


@cache
@torch.inference_mode(False)
def _signs(table: str, block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """:func:`sign_table` on ``device``: a captured graph must copy nothing from the host."""
    return sign_table(table, block).to(device, dtype)


def hadamard(x: Tensor) -> Tensor:
    """H of the last axis (a power of two), unscaled. Keeps the dtype of ``x`` (float32 or float64)."""
    dim = x.shape[-1]
    if dim & (dim - 1):
        raise ValueError(f"last axis {dim} is not a power of two")
    stride = 1
    while stride < dim:
        pairs = x.unflatten(-1, (dim // (2 * stride), 2, stride))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        stride *= 2
    return x


def rotate(x: Tensor, name: str, block: int, factor: float | None = None) -> Tensor:
    """Rotate each ``block`` consecutive values of the last axis by row ``name``.

    ``factor`` multiplies after H and before the second signs; the default 1/sqrt(block) makes the map orthonormal.
    Without rotation (row ``none``) the values are multiplied by ``factor * sqrt(block)``, the same change of length.
    """
    row = ROTATIONS[name]
    if not row.mixes:
        return x if factor is None else x * _round(factor * math.sqrt(block), x)
    before, after = (_signs(table, block, x.dtype, x.device) for table in row.signs)
    factor = 1.0 / math.sqrt(block) if factor is None else factor
    y = hadamard(x.unflatten(-1, (-1, block)) * before) * _round(factor, x)
    return (y * after).flatten(-2)


def unrotate(y: Tensor, name: str, block: int) -> Tensor:
    """Inverse of :func:`rotate` with the default factor."""
    row = ROTATIONS[name]
    if not row.mixes:
        return y
    before, after = (_signs(table, block, y.dtype, y.device) for table in row.signs)
    x = hadamard(y.unflatten(-1, (-1, block)) * after) * _round(1.0 / math.sqrt(block), y)
    return (x * before).flatten(-2)


def turn(x: Tensor, name: str, block: int, *, back: bool = False) -> Tensor:
    """:func:`rotate` with the default factor, or with ``back`` :func:`unrotate`, by matrix products.

    It takes a tenth of the time, but its last bits differ between machines and shapes: for q and outputs, not for what
    is stored.
    """
    if not ROTATIONS[name].mixes:
        return x
    if block <= _WHOLE:
        return (x.reshape(-1, block) @ _matrix(name, block, back, x.dtype, x.device)).view(x.shape)
    before, left, right, after = _factors(name, block, back, x.dtype, x.device)
    y = (x.reshape(-1, block) * before).view(-1, len(left), len(right))
    return ((left @ (y @ right)).view(-1, block) * after).view(x.shape)


@cache
@torch.inference_mode(False)
def _matrix(name: str, block: int, back: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What multiplies a block from the right."""
    matrix = rotate(torch.eye(block, dtype=dtype, device="cpu"), name, block)
    return (matrix.mT if back else matrix).contiguous().to(device)


@cache
@torch.inference_mode(False)
def _factors(name: str, block: int, back: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """``(before, left, right, after)``: H of a block, as a matrix of rows, is H of its columns times H of its rows."""
    before, after = (sign_table(table, block).to(device, dtype) for table in ROTATIONS[name].signs)
    rows = 2 ** (int(math.log2(block)) // 2)
    left, right = (_matrix("hadamard", size, False, dtype, device) for size in (rows, block // rows))
    return (after, left, right, before) if back else (before, left, right, after)


def _round(value: float, like: Tensor) -> float:
    """``value`` as the nearest number of ``like``'s dtype (a Python float times a float32 tensor rounds twice else)."""
    return float(torch.tensor(value, dtype=like.dtype))


def check_orthogonal(matrix: Tensor, head_dim: int, kv_heads: int | None, argument: str) -> Tensor:
    """Validate a caller's rotation ``[D, D]`` or ``[Hkv, D, D]`` and return it as float32.

    Raises ValueError naming ``argument`` when the shape is wrong or ``M @ M.T`` is off the identity by more than 1e-3.
    """
    shape = tuple(matrix.shape)
    wanted = [(head_dim, head_dim)] + ([(kv_heads, head_dim, head_dim)] if kv_heads else [])
    if shape not in wanted:
        raise ValueError(f"{argument} has shape {shape}; it must be one of {wanted}")
    matrix = matrix.detach().to(torch.float32)
    exact = matrix.double()
    off = float((exact @ exact.mT - torch.eye(head_dim, dtype=torch.float64, device=matrix.device)).abs().max())
    if not off <= 1e-3:
        raise ValueError(f"{argument} is not orthogonal: M @ M.T differs from the identity by {off:.3g} (limit 1e-3)")
    return matrix
