"""Foreign bytes, at import and export only: published block and row layouts <-> packed rows.

A block holds its half-precision scale first, then codes. Codes on the wire are indices into the ascending table
(q8_0: signed integers). Layouts: ggml's ``q8_0`` and ``q4_0``; the turbo llama.cpp fork's blocks, first and second
version; mlx-native's tq rows. Nothing else in the package knows these bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from . import packing
from .errors import FormatError
from .formats import KVFormat, get_format
from .quant import Packed


@dataclass(frozen=True)
class WireLayout:
    """A row: the format that the bytes hold, values per block (0: whole rows, scales apart), and the code fields.

    ``codes``: how a block's codes lie. ``signed``: one signed byte each. ``halves``: byte j holds code j low and
    code j + block/2 high. ``pairs``: byte j holds codes 2j low and 2j + 1 high. ``planes``: the low two bits, four
    codes a byte, then bit 2, eight codes a byte. ``bytes``: one code a byte.
    ``reserved``: zero bytes between the scale and the codes.
    """

    name: str
    format: str
    block: int
    codes: str
    reserved: int = 0


WIRE: Mapping[str, WireLayout] = MappingProxyType(
    {
        layout.name: layout
        for layout in (
            WireLayout("q8_0", "q8_0", 32, "signed"),
            WireLayout("q4_0", "q4_0", 32, "halves"),
            WireLayout("turbo2.v1", "turbo2.v2", 32, "planes"),
            WireLayout("turbo3.v1", "turbo3.v2", 32, "planes"),
            WireLayout("turbo4.v1", "turbo4.v2", 128, "pairs", reserved=2),
            WireLayout("turbo2.v2", "turbo2.v2", 128, "planes"),
            WireLayout("turbo3.v2", "turbo3.v2", 128, "planes"),
            WireLayout("turbo4.v2", "turbo4.v2", 128, "pairs", reserved=2),
            WireLayout("tq4.v1", "tq4.v1", 0, "pairs"),
            WireLayout("tq5.v1", "tq5.v1", 0, "bytes"),
            WireLayout("tq6.v1", "tq6.v1", 0, "bytes"),
            WireLayout("tq8.v1", "tq8.v1", 0, "bytes"),
        )
    }
)


def get_layout(name: str) -> WireLayout:
    """The layout called ``name``; FormatError listing the names if there is none."""
    if name not in WIRE:
        raise FormatError(f"unknown wire layout {name!r}; layouts are {', '.join(WIRE)}")
    return WIRE[name]


def export_rows(packed: Packed, layout: str, head_dim: int) -> tuple[Tensor, ...]:
    """Packed rows ``[..., W]`` as foreign bytes: ``(blocks [..., n] uint8,)``, or for tq ``(codes [..., n] uint8,
    norms [...] or [..., 2] float32)``. The rows must be in ``get_layout(layout).format`` (heads padded as it pads).
    """
    row = get_layout(layout)
    fmt = get_format(row.format)
    words = fmt.words_per_head(head_dim)
    if packed.words.shape[-1] != words:
        raise FormatError(f"rows have {packed.words.shape[-1]} words; head_dim={head_dim} in {fmt} has {words}")
    index = packing.unpack(packed.words, fmt.bits)
    if fmt.coding == "sign_magnitude":
        index = packing.from_sign_magnitude(index, fmt.bits)
    if not row.block:
        norms = packed.scale.squeeze(-1) if packed.scale.shape[-1] == 1 else packed.scale
        return _put(index, row, fmt), norms.contiguous()
    blocks = index.unflatten(-1, (-1, row.block))
    scale = packed.scale.repeat_interleave(blocks.shape[-2] // packed.scale.shape[-1], -1)
    head = scale.contiguous().view(torch.uint8).unflatten(-1, (-1, 2))
    reserved = head.new_zeros(*head.shape[:-1], row.reserved)
    return (torch.cat((head, reserved, _put(blocks, row, fmt)), dim=-1).flatten(-2),)


def import_rows(parts: tuple[Tensor, ...], layout: str, head_dim: int) -> Packed:
    """Packed rows from what :func:`export_rows` returns. Raises FormatError when sizes, scales or codes cannot be such
    rows: a wrong length, a code past the table, a scale that is NaN or inf, v1 blocks of a group with unequal norms."""
    row = get_layout(layout)
    fmt = get_format(row.format)
    padded, _ = fmt.layout(head_dim)
    if len(parts) != (1 if row.block else 2):
        raise FormatError(f"wire layout {layout} has {1 if row.block else 2} tensors; got {len(parts)}")
    for name, part, dtype in zip(("blocks" if row.block else "codes", "norms"), parts, (torch.uint8, torch.float32)):
        if part.dtype != dtype:
            raise FormatError(f"{name} of wire layout {layout} have dtype {part.dtype}; they must be {dtype}")
    scales = fmt.scales_per_head(head_dim)
    if not row.block:
        codes, norms = parts
        scale = norms.unsqueeze(-1) if scales == 1 else norms
        wanted = (*codes.shape[:-1], scales)
        if tuple(scale.shape) != wanted:
            raise FormatError(f"norms of wire layout {layout} have shape {tuple(norms.shape)}; codes need {wanted}")
        index = _take(codes, padded, row, fmt)
    else:
        count = padded // row.block
        size = 2 + row.reserved + _code_bytes(row.block, row, fmt)
        if parts[0].shape[-1] != count * size:
            raise FormatError(
                f"blocks of wire layout {layout} have {parts[0].shape[-1]} bytes; head_dim={head_dim} has {count} x {size}"
            )
        blocks = parts[0].unflatten(-1, (count, size))
        scale = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1).unflatten(-1, (scales, -1))
        if not bool((scale == scale[..., :1]).all()):
            raise FormatError(f"blocks of wire layout {layout}: the blocks of one group must carry the same finite norm")
        scale = scale[..., 0].contiguous()
        index = _take(blocks[..., 2 + row.reserved :], row.block, row, fmt).flatten(-2)
    if not bool(torch.isfinite(scale).all()):
        raise FormatError(f"scales of wire layout {layout} hold NaN or inf")
    codes = packing.to_sign_magnitude(index, fmt.bits) if fmt.coding == "sign_magnitude" else index
    return Packed(packing.pack(codes, fmt.bits), scale)


def _code_bytes(count: int, row: WireLayout, fmt: KVFormat) -> int:
    return count if row.codes in ("signed", "bytes") else count * fmt.bits // 8


def _bits_up(x: Tensor, width: int) -> Tensor:
    """Codes of ``width`` bits ``[..., n]`` to bytes, the first code in the low bits."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=x.device)
    return (x.unflatten(-1, (-1, 8 // width)) << shifts).sum(-1, dtype=torch.int32).to(torch.uint8)


def _bits_down(x: Tensor, width: int) -> Tensor:
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=x.device)
    return ((x.unsqueeze(-1) >> shifts) & (2**width - 1)).flatten(-2)


def _put(index: Tensor, row: WireLayout, fmt: KVFormat) -> Tensor:
    """Level indices ``[..., n]`` (uint8) to the layout's code bytes."""
    if row.codes == "signed":
        return index ^ 0x80
    if row.codes == "bytes":
        return index
    if row.codes == "pairs":
        return _bits_up(index, 4)
    if row.codes == "halves":
        low, high = index.chunk(2, dim=-1)
        return low | high << 4
    low = _bits_up(index & 3, 2)
    return low if fmt.bits == 2 else torch.cat((low, _bits_up(index >> 2, 1)), dim=-1)


def _take(raw: Tensor, count: int, row: WireLayout, fmt: KVFormat) -> Tensor:
    """Inverse of :func:`_put` for ``count`` codes."""
    size = _code_bytes(count, row, fmt)
    if raw.shape[-1] != size:
        raise FormatError(f"codes of wire layout {row.name} have {raw.shape[-1]} bytes; {count} values need {size}")
    if row.codes == "signed":
        index = raw ^ 0x80
        if bool((index == 0).any()):
            raise FormatError("a q8_0 code is -128; codes run from -127 to 127")
        return index
    if row.codes == "bytes":
        if fmt.bits < 8 and bool((raw >> fmt.bits).any()):
            limit = 2**fmt.bits - 1
            raise FormatError(f"codes of wire layout {row.name} run up to {int(raw.max())}; {fmt.bits} bits end at {limit}")
        return raw
    if row.codes == "pairs":
        return _bits_down(raw, 4)
    if row.codes == "halves":
        return torch.cat((raw & 15, raw >> 4), dim=-1)
    low = _bits_down(raw[..., : count // 4], 2)
    return low if fmt.bits == 2 else low | _bits_down(raw[..., count // 4 :], 1) << 2
