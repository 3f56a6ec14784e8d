"""Rows that a GPU encoded against the definition's. csrc/turned.cuh may take the other level at a boundary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gyrokv import Codec, packing, quant
from gyrokv.quant import Packed

NEAR = 2.0**-17  # of the values' expected deviation: how far from a boundary a code may differ
SHARE = 1e-4  # of codes
SCALES = 5e-3  # of the scales of groups whose codes agree: the last bit of half precision follows that of float32


class Differences(NamedTuple):
    """Shares of codes, and of scales where all codes of the group agree."""

    codes: float
    scales: float


def indices(rows: Packed, codec: Codec) -> Tensor:
    """Of levels, ``[..., padded]``, int64."""
    fmt = codec.format
    codes = packing.unpack(rows.words, fmt.bits)
    return (packing.from_sign_magnitude(codes, fmt.bits) if fmt.coding == "sign_magnitude" else codes).long()


def differences(got: Packed, want: Packed, x: Tensor, codec: Codec) -> Differences:
    """Of rows of heads ``x [..., D]``. Asserts that codes differ by one level, next to a boundary, scales by one unit in
    the last place, and that groups keep their norm."""
    fmt = codec.format
    a, b = indices(got, codec), indices(want, codec)
    wide = torch.nn.functional.pad(x.to(torch.float32), (0, codec.padded - codec.head_dim))
    z, _ = quant._normalise(wide, fmt, codec.rotation, codec.group)
    other = a != b
    assert not bool(other.any()) or int((a - b)[other].abs().max()) == 1, "codes differ by more than one level"
    boundary = fmt.boundaries.to(a.device)[torch.minimum(a, b)[other]]
    off = (z[other] - boundary).abs() / (fmt.unit if fmt.scale == "l2" else 1.0)
    assert not len(off) or float(off.max()) <= NEAR, f"a code differs {float(off.max()):.2g} from a boundary"
    same = ~other.unflatten(-1, (-1, codec.group)).any(-1)
    units = (got.scale.view(torch.int16).int() - want.scale.view(torch.int16).int()).abs()
    assert int((units * same).max()) <= 1, "a scale differs by more than one unit"
    levels = fmt.level_values.to(a.device)
    norms = [p.scale.float() * levels[i].unflatten(-1, (-1, codec.group)).norm(dim=-1) for p, i in ((got, a), (want, b))]
    largest = torch.finfo(got.scale.dtype).max
    kept = (got.scale < largest) & (want.scale < largest)  # a scale that saturates keeps no norm
    torch.testing.assert_close(*(n[kept] for n in norms), rtol=2e-3, atol=1e-6)
    return Differences(float(other.double().mean()), float((units * same > 0).double().mean()))


def alike(got: Packed, want: Packed, codec: Codec) -> bool:
    """The same but for few codes and scales, for tests of where rows go."""
    a, b = indices(got, codec), indices(want, codec)
    few = max(64, a.numel() // 250)  # half of a row of equal values lies on a boundary
    scales = (got.scale.float() - want.scale.float()).abs() > 1e-3 * want.scale.float().abs() + 1e-7
    return int((a != b).sum()) <= few and int((a - b).abs().max()) <= 1 and int(scales.sum()) <= few
