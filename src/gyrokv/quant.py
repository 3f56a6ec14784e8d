"""What a format means: encode and decode, in plain torch. Every encoder of every backend is tested against this file.

All arithmetic is float32, one rounding per operation, sums in index order, half conversion to nearest even; the
result is the same bits on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import packing
from .formats import KVFormat, get_format
from .rotation import check_orthogonal, rotate, turn, unrotate

HALF_MAX = 65504.0
_TINY = 1e-10  # a group whose norm is no larger is stored as zeros


class Packed(NamedTuple):
    """Encoded rows. ``words [..., W]``: int16 words, or the values of a dense row; ``scale [..., S]``, S may be 0."""

    words: Tensor
    scale: Tensor

    def map(self, f) -> Packed:
        """``f`` applied to both tensors."""
        return Packed(f(self.words), f(self.scale))

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return sum(t.numel() * t.element_size() for t in self)


def cat(parts: Sequence[Packed], dim: int) -> Packed:
    """Concatenate packed rows along ``dim``, which is not the last."""
    return parts[0] if len(parts) == 1 else Packed(*(torch.cat(ts, dim) for ts in zip(*parts)))


def quantize(x: Tensor, fmt: KVFormat | str) -> Packed:
    """Encode heads ``x [..., D]`` (floating) in ``fmt``, rotated as the format says (other rotations: :class:`Codec`).

    Values that a dense, float8 or half-precision scale cannot hold saturate. Raises ValueError for NaN or inf,
    TypeError for a dtype that is not floating, FormatError for a head size that the format cannot hold.
    """
    fmt = get_format(fmt)
    check_finite(x, "x")
    return encode(x, fmt, fmt.rotation)


def dequantize(packed: Packed, fmt: KVFormat | str, head_dim: int) -> Tensor:
    """Decode to float32 heads ``[..., head_dim]``, rotated back and without padding."""
    fmt = get_format(fmt)
    _, group = fmt.layout(head_dim)
    return unrotate(decode(packed, fmt, head_dim), fmt.rotation, group)[..., :head_dim]


def check_finite(x: Tensor, argument: str) -> None:
    """Raise TypeError unless ``x`` is floating, ValueError if it holds NaN or inf."""
    if not x.is_floating_point():
        raise TypeError(f"{argument} has dtype {x.dtype}; it must be floating point")
    x = x if x.element_size() > 1 else x.to(torch.float32)
    if math.isfinite(x.sum().item()):
        return  # the sum of anything that is not finite is not finite either; the reverse does not hold
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(f"{argument} holds {bad} values that are NaN or inf (of {x.numel()}); they cannot be cached")


def encode(x: Tensor, fmt: KVFormat, rotation: str) -> Packed:
    """:func:`quantize` without the check. ``rotation`` is applied to the zero-padded head, in blocks of the group."""
    if fmt.is_dense:
        words = saturate(x, fmt.dtype)
        return Packed(words, words.new_empty(*words.shape[:-1], 0))
    padded, group = fmt.layout(x.shape[-1])
    x = torch.nn.functional.pad(saturate(x, torch.float32), (0, padded - x.shape[-1]))
    if fmt.kind == "float8":
        codes = saturate(rotate(x, rotation, group), fmt.dtype).view(torch.uint8)
        return Packed(packing.pack(codes, fmt.bits), x.new_empty(*x.shape[:-1], 0))
    normalised, norm = _normalise(x, fmt, rotation, group)
    index = _nearest(normalised, fmt)
    codes = packing.to_sign_magnitude(index, fmt.bits) if fmt.coding == "sign_magnitude" else index
    if fmt.corrected:
        levels = _constant(fmt, "level_values", x.device)[index.long()].unflatten(-1, (norm.shape[-1], -1))
        length = _root(_sum_in_order(levels * levels))
        norm = torch.where(length > _TINY, norm / length, norm)
    scale_dtype = getattr(torch, fmt.scale_dtype)
    if scale_dtype == torch.float16:
        norm = norm.nan_to_num(nan=HALF_MAX).clamp(-HALF_MAX, HALF_MAX)  # NaN: float32 overflowed in the rotation
    return Packed(packing.pack(codes, fmt.bits), norm.to(scale_dtype))


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as ``dtype``; values beyond its range become its largest (clamped in a dtype that can hold the limits)."""
    if x.dtype == dtype:
        return x
    limits = torch.finfo(dtype)
    wide = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    return wide.clamp(limits.min, limits.max).to(dtype)


def decode(packed: Packed, fmt: KVFormat, head_dim: int) -> Tensor:
    """Values ``[..., padded head_dim]`` as float32 in the space that was stored: padded, and rotated if it was."""
    if fmt.is_dense:
        return packed.words.to(torch.float32)
    codes = packing.unpack(packed.words, fmt.bits)
    if fmt.kind == "float8":
        return codes.view(fmt.dtype).to(torch.float32)
    # index_select by int32 takes half the time of indexing by int64
    values = code_values(fmt, codes.device).index_select(0, codes.flatten().int()).view(codes.shape)
    norm = packed.scale.to(torch.float32)
    values = (values.unflatten(-1, (norm.shape[-1], -1)) * norm.unsqueeze(-1)).flatten(-2)
    return values / scale_divisor(fmt, head_dim)


def code_values(fmt: KVFormat, device: torch.device | str = "cpu") -> Tensor:
    """The value of each *stored* code of a row with levels: float32 ``[2 ** bits]``, to be multiplied by the scale."""
    return _code_values(fmt, torch.device(device))


@cache
@torch.inference_mode(False)
def _constant(fmt: KVFormat, table: str, device: torch.device) -> Tensor:
    """A table of a row on ``device``: a captured graph must copy nothing from the host."""
    return getattr(fmt, table).to(device)


@cache
@torch.inference_mode(False)
def _code_values(fmt: KVFormat, device: torch.device) -> Tensor:
    index = torch.arange(2**fmt.bits, dtype=torch.int64)
    if fmt.coding == "sign_magnitude":
        index = packing.from_sign_magnitude(index, fmt.bits)
    return fmt.level_values[index].to(device)


def scale_divisor(fmt: KVFormat, head_dim: int) -> float:
    """What the product of level and scale is divided by: published rms rows store the norm of the whole span."""
    if fmt.scale != "rms" or fmt.corrected:
        return 1.0
    _, group = fmt.layout(head_dim)
    one_span = not fmt.scale_span or group <= fmt.scale_span
    return float(torch.tensor(math.sqrt(group) if one_span else fmt.scale_factor, dtype=torch.float32))


def _sum_in_order(x: Tensor) -> Tensor:
    """Sum of the last axis, one float32 addition per element in index order (torch.sum adds in blocks)."""
    columns = x.movedim(-1, 0).contiguous()
    total = columns[0].clone()
    for column in columns[1:]:
        total += column
    return total


def _root(x: Tensor) -> Tensor:
    """Square root of float32, correctly rounded where there is float64: torch's own can be off in the last bit."""
    return x.sqrt() if x.device.type == "mps" else x.double().sqrt().float()


def _normalise(x: Tensor, fmt: KVFormat, rotation: str, group: int) -> tuple[Tensor, Tensor]:
    """``(values to compare with the boundaries [..., padded], norm [..., S])`` by the row's scale rule."""
    if fmt.scale == "l2":
        groups = x.unflatten(-1, (-1, group))
        norm = _root(_sum_in_order(groups * groups))
        inverse = torch.where(norm > _TINY, 1.0 / norm, 0.0)
        return rotate((groups * inverse.unsqueeze(-1)).flatten(-2), rotation, group, fmt.unit), norm
    y = rotate(x, rotation, group)
    spans = y.unflatten(-1, (-1, min(group, fmt.scale_span or group)))
    if fmt.scale == "rms":
        size = spans.shape[-1]
        if size == group:
            norm = _root(_sum_in_order(spans * spans))
            root = float(torch.tensor(math.sqrt(size), dtype=torch.float32))
            z = spans * (1.0 / norm).unsqueeze(-1) * root
        else:
            norm = _root(_sum_in_order(spans * spans) / size)
            z = spans / norm.unsqueeze(-1) * fmt.scale_factor
        return torch.where((norm > _TINY).unsqueeze(-1), z, 0.0).flatten(-2), norm
    extreme = spans.gather(-1, spans.abs().argmax(-1, keepdim=True)).squeeze(-1)
    if fmt.scale == "absmax":
        norm = extreme.abs() / fmt.levels[-1]
        inverse = 1.0 / norm
        z = spans * torch.where(torch.isfinite(inverse), inverse, 0.0).unsqueeze(-1)
    else:
        norm = extreme / fmt.levels[0]
        z = torch.where((norm != 0).unsqueeze(-1), spans / norm.unsqueeze(-1), 0.0)
    return z.flatten(-2), norm


def _nearest(z: Tensor, fmt: KVFormat) -> Tensor:
    """Index (uint8) of the level that each normalised value takes, ties as the row says."""
    if fmt.kind == "linear":
        low, high = fmt.levels[0], fmt.levels[-1]
        if fmt.ties == "up":
            return (z + (0.5 - low)).floor().clamp(0, high - low).to(torch.uint8)
        whole = z.trunc()
        whole = whole + torch.where((z - whole).abs() >= 0.5, z.sign(), 0.0)
        return (whole.clamp(-high, high) - low).to(torch.uint8)
    return torch.bucketize(z.contiguous(), _constant(fmt, "boundaries", z.device), right=fmt.ties == "up").to(torch.uint8)


class Codec:
    """One side (K or V) of a layer: a format, a head size, and the linear maps around it.

    What is stored is ``encode(R x / s)``: R is the format's own rotation, or ``rotation`` in its place (``"none"``,
    ``"hadamard"``, or an orthogonal matrix ``[D, D]`` or ``[Hkv, D, D]``, float), and s is ``scale``, one positive
    factor per KV head (a float or ``[Hkv]``; formats with static scales need it when values pass their range). Both
    are linear, so they are paid on q (:meth:`query`) and on the output (:meth:`output`) and no kernel knows of them.
    ``side`` ("k" or "v") only names the argument in errors.
    """

    def __init__(
        self,
        fmt: KVFormat | str,
        head_dim: int,
        *,
        kv_heads: int | None = None,
        rotation: str | Tensor | None = None,
        scale: float | Tensor = 1.0,
        side: str = "",
    ) -> None:
        self.format = get_format(fmt)
        self.head_dim = head_dim
        self.padded, self.group = self.format.layout(head_dim)
        self.matrix: Tensor | None = None
        prefix = f"{side}_" if side else ""
        self.scale = torch.as_tensor(scale, dtype=torch.float32)
        if self.scale.ndim > 1 or (self.scale.ndim == 1 and self.scale.shape[0] != kv_heads):
            raise ValueError(f"{prefix}scale has shape {tuple(self.scale.shape)}; it must be a number or [{kv_heads}]")
        if not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
            raise ValueError(f"{prefix}scale={scale} must be finite and > 0")
        self._unscaled = bool((self.scale == 1.0).all())
        self.rotation = self.format.rotation
        if isinstance(rotation, Tensor):
            self.matrix, self.rotation = check_orthogonal(rotation, head_dim, kv_heads, f"{prefix}rotation"), "none"
        elif rotation == "hadamard":
            self.rotation = "none"
            block = head_dim & -head_dim
            self.matrix = torch.block_diag(*[rotate(torch.eye(block), "hadamard", block).mT] * (head_dim // block))
        elif rotation == "none":
            self.rotation = "none"
        elif rotation is not None:
            raise ValueError(f"{prefix}rotation={rotation!r} is not 'none', 'hadamard' or an orthogonal matrix")
        self.override = rotation

    @property
    def identity(self) -> bool:
        """True when stored values are the values themselves, but for rounding and padding."""
        return self.matrix is None and self.rotation == "none" and self._unscaled

    @property
    def only_rotates(self) -> bool:
        """True when nothing but the row's own rotation, or none, lies between values and what is stored."""
        return self.matrix is None and self._unscaled

    def _per_head(self, x: Tensor) -> Tensor:
        """The scale shaped to multiply ``x [B, H, T, D]``, where H may be the query heads."""
        scale = self.scale.to(x.device)
        if scale.ndim == 1:
            scale = scale.repeat_interleave(x.shape[-3] // scale.shape[0])[:, None, None]
        return scale

    def _matrix(self, x: Tensor) -> Tensor:
        matrix = self.matrix.to(x)
        return matrix if matrix.ndim == 2 else matrix.repeat_interleave(x.shape[-3] // matrix.shape[0], 0)

    def prepare(self, x: Tensor) -> Tensor:
        """Into the space that the format encodes: scaled, turned by the caller's matrix (not by the row's rotation)."""
        if not self._unscaled:
            x = x.to(torch.float32) / self._per_head(x)
        if self.matrix is not None:
            x = x.to(torch.float32) @ self._matrix(x.float()).mT
        return x

    def encode(self, x: Tensor) -> Packed:
        """Heads ``[B, Hkv, T, D]`` to packed rows."""
        return encode(self.prepare(x), self.format, self.rotation)

    def decode(self, packed: Packed) -> Tensor:
        """Packed rows to stored values ``[B, Hkv, T, padded]``, float32: what a kernel multiplies."""
        return decode(packed, self.format, self.head_dim)

    def store_dense(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Heads ``[B, Hkv, T, D]`` in the stored space but unquantised: ``[B, Hkv, T, padded]``, ``dtype``."""
        x = self._pad(self.prepare(x))
        return saturate(x if self.rotation == "none" else rotate(x.to(torch.float32), self.rotation, self.group), dtype)

    def _pad(self, x: Tensor) -> Tensor:
        return x if self.padded == self.head_dim else torch.nn.functional.pad(x, (0, self.padded - self.head_dim))

    def query(self, q: Tensor) -> Tensor:
        """q ``[B, Hq, Tq, D]`` to the space of stored keys: ``[B, Hq, Tq, padded]``; float32 unless nothing changes."""
        if not self._unscaled:
            q = q.to(torch.float32) * self._per_head(q)
        if self.matrix is not None:
            q = q.to(torch.float32) @ self._matrix(q.float()).mT
        q = self._pad(q)
        return q if self.rotation == "none" else turn(q.to(torch.float32), self.rotation, self.group)

    @property
    def is_plain(self) -> bool:
        """True when heads are stored as they are but for padding: no rotation, no scale."""
        return self.rotation == "none" and self.matrix is None and self._unscaled

    def output(self, out: Tensor) -> Tensor:
        """An output (or values) ``[B, H, T, padded]`` in the stored space back to heads ``[B, H, T, D]``."""
        if self.rotation != "none":
            out = turn(out, self.rotation, self.group, back=True)
        if self.padded != self.head_dim:
            out = out[..., : self.head_dim]
        if self.matrix is not None:
            out = out @ self._matrix(out)
        return out if self._unscaled else out * self._per_head(out)

    def __repr__(self) -> str:
        name = self.override if isinstance(self.override, str) else "matrix"
        extra = "" if self.override is None else f", rotation={name}"
        return f"Codec({self.format.name}, head_dim={self.head_dim}{extra})"
