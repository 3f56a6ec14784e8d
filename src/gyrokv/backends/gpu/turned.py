"""What csrc/turned.cuh is compiled with: rotated rows of 16-bit values with symmetric levels, by tensor cores."""

from __future__ import annotations

import math
import struct
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...formats import KVFormat
from ...rotation import ROTATIONS, sign_table

TILE = 8  # rows that a team of warps takes at once
_CHUNK = 32  # values that are turned by products alone
_PIECE = 128  # values of a row that a warp turns, at most
_WARPS = 4  # of a block, about
_RESIDENT, _RESIDENT_WIDE = 512, 384  # threads of a processor with 128 and with 168 registers each
_SHARED = 227 * 1024  # bytes of a processor, 1024 of them a block's own
_TARGET_BYTES = 16  # of shared memory for a row's addresses, of 32 rows twice
_BIG_TABLE = 16 * 1024  # bytes of squares from which on more warps share them


class Steps(NamedTuple):
    """What is looked up for normalised values |z|, as M = 1 + |z| * scale, float32.

    ``table``: int32, for the cells ``round(|z| * scale * near)`` from 0 on, what to add to the bits of M: byte 3 of the sum
    is the index of the level's magnitude. Empty where there are two magnitudes: then M = 2 at the boundary.
    """

    scale: float
    near: int
    table: Tensor


class Curve(NamedTuple):
    """What finds four magnitudes of |z| without a table, from a = clamp(|z| * scale + offset, 0, 1), float32.

    The bits 21 and 22 of ``(square * a + slope) * a + start``, a float32 from 1 to 2, are the index of the magnitude.
    """

    scale: float
    offset: float
    start: float
    slope: float
    square: float


@cache
def curve(fmt: KVFormat) -> Curve | None:
    """The parabola through the three positive boundaries, as far as it rises; None if there are others, or too little."""
    half = 2 ** (fmt.bits - 1)
    if half != 4:
        return None
    (a, b, c), margin = fmt.boundaries[half:].double().tolist(), 0.02  # of an index
    square = (1 / (c - b) - 1 / (b - a)) / (c - a)  # of index = (square z + slope) z + start
    slope = 1 / (b - a) - square * (a + b)
    start = 1 - (square * a + slope) * a

    def where(index: float) -> float:
        """The first z of an index on the branch that rises."""
        inside = slope * slope - 4 * square * (start - index)
        return (math.sqrt(inside) - slope) / (2 * square) if inside > 0 else -slope / (2 * square)

    first, last = max(0.0, where(margin)), where(4 - margin)
    if not abs(square) > 1e-6 or not (square * last + slope) * last + start > 3 + margin:
        return None
    width = last - first
    start += (square * first + slope) * first
    slope = (2 * square * first + slope) * width
    return Curve(1 / width, -first / width, 1 + start / 4, slope / 4, square * width * width / 4)


@cache
def steps(fmt: KVFormat, most: float) -> Steps | None:
    """For |z| up to ``most``; None if levels are not symmetric or lie closer together than 1/1023 of the largest."""
    half = 2 ** (fmt.bits - 1)
    levels, boundaries = fmt.level_values, fmt.boundaries
    if not (torch.equal(levels, -levels.flip(0)) and torch.equal(boundaries, -boundaries.flip(0))):
        return None
    positive = boundaries[half:].double()  # after each magnitude but the last
    if half == 2:
        return Steps(1.0 / float(positive[0]), 0, torch.zeros(0, dtype=torch.int32))
    scale = 0.999 / float(positive[-1]) if half > 1 else 1.0 / most
    grids = ((n, (positive * (scale * n)).round()) for n in range(1, 1024))
    near, at = next(((n, at.long()) for n, at in grids if bool((at.diff() > 0).all())), (0, None))
    if at is None:
        return None
    cell = torch.arange(round(1.01 * most * scale * near) + 1)
    below = torch.searchsorted(at, cell)  # boundaries in earlier cells
    bits = (1.0 + positive * scale).float().view(torch.int32).long()
    inside = torch.isin(cell, at)
    start = (1.0 + (cell - 0.6).clamp(min=0) / near).float().view(torch.int32).long()
    add = torch.where(inside, (below + 1 << 24) - torch.cat((bits, bits.new_zeros(1)))[below], (below << 24) - start)
    return Steps(scale, near, torch.where(add >= 2**31, add - 2**32, add).to(torch.int32))


def _bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


class Turned(NamedTuple):
    """``rows``: of a block at once. ``shared``: bytes. ``resident``: threads of a processor that registers suffice for."""

    defines: dict[str, int]
    rows: int
    threads: int
    shared: int
    resident: int
    table: Tensor


_CURVE = ("CURVED", "OFFSET", "START", "SLOPE", "SQUARE")
_NAMES = ("TURNED", "NEAR", "STEPS", "INDEX", "BYTES", "LEVELS_LOW", "LEVELS_HIGH", "REACH", "PIECE", "SHARED")
OTHER = dict.fromkeys((*_NAMES, *_CURVE), 0)


def side(fmt: KVFormat, padded: int, group: int, span: int, rotation: str, many: bool) -> Turned | None:
    """For rows of 16-bit values; None if the kernel does not take them. ``many``: tokens enough that a warp need not share
    a row whose groups it can turn one by one."""
    row = ROTATIONS[rotation]
    ours = fmt.kind == "codebook" and row.mixes and fmt.corrected and fmt.scale_dtype == "float16" and fmt.ties == "up"
    rule = fmt.scale == "l2" or fmt.scale == "rms" and not row.signs[1]
    if not (ours and rule and group % _CHUNK == 0 and group <= 4 * _PIECE and span == group):
        return None
    unit = fmt.unit if fmt.scale == "l2" else 1.0  # of z, where norms are 1 per value
    found, bent = steps(fmt, math.sqrt(group) * unit), curve(fmt)
    if found is None:
        return None
    before, after = (sign_table(table, group) for table in row.signs)
    signs = [torch.where(before < 0, -0x8000, 0).to(torch.int16).view(torch.int32)]
    signs += [after.view(torch.int32)] if fmt.scale == "l2" else []
    positive = fmt.levels[len(fmt.levels) // 2 :]
    narrow = _CHUNK < group <= _PIECE and len(positive) <= 8 and all(x == int(x) <= 127 for x in positive)
    if not narrow:
        bent = None
    elif bent:
        found = Steps(bent.scale, 0, found.table[:0])
    table = torch.cat((*signs, found.table))
    table = torch.nn.functional.pad(table, (0, -len(table) % 4))
    squares = 0 if narrow else 256 * len(positive)
    if many and (padded == group or narrow and padded <= 4 * group):
        piece = padded  # its codes stay in registers
    elif group > _PIECE:
        piece = _PIECE
    else:
        piece = next(n for n in range(_PIECE // group * group, 0, -group) if padded % n == 0)
    team, slices = padded // piece, max(1, group // piece)
    teams = 1 if slices > 1 else max(1, (2 if squares >= _BIG_TABLE and padded <= 256 else 1) * _WARPS // team)
    fields = [n for n in (1, 2, 4, 8) if fmt.bits & n]
    together = team == 1 and (narrow or piece == group)  # codes of a row in a warp's registers
    packed = all(padded * n % 512 == 0 or padded * n in ((128, 256) if n < 4 else (256,) * (n == 4)) for n in fields)
    buffers = 0 if together and packed else 2 if team > 1 and slices == 1 else 1  # for codes
    exchanged = 4 * TILE * padded + 2 * 4 * TILE * team if slices > 1 else 0
    bytes_of_team = 2 * TILE * padded + buffers * TILE * (padded + 16) + exchanged + 64 * _TARGET_BYTES
    shared = 4 * len(table) + squares + teams * bytes_of_team
    low, high = (sum(int(x) << 8 * i for i, x in enumerate(positive[j : j + 4]) if narrow) for j in (0, 4))
    names = OTHER | {
        "TURNED": 1, "NEAR": found.near, "STEPS": len(found.table), "BYTES": int(narrow), "PIECE": piece, "SHARED": shared,
        "INDEX": int(fmt.coding == "index"), "LEVELS_LOW": low, "LEVELS_HIGH": high, "REACH": _bits(unit * found.scale),
    } | dict(zip(_CURVE, [1, *map(_bits, bent[1:])] if bent else [0] * 5))  # fmt: skip
    table = torch.cat((table, (fmt.level_values**2)[len(positive) :].view(torch.int32)))
    threads = 32 * team * teams
    fit = _SHARED // (shared + 1024) * threads
    resident = _RESIDENT_WIDE if piece > (_PIECE if bent else 2 * _PIECE if group > _PIECE else 4 * _PIECE) else _RESIDENT
    return Turned(names, TILE * teams, threads, shared, min(resident, max(threads, fit)), table)
