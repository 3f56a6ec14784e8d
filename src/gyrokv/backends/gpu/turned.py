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

_CHUNK = 32  # values that are turned by products alone
_PIECE = 128  # values of a row that a warp turns, at most
_WARPS = 4  # of a block, about
_RESIDENT = 512  # threads of a processor with 128 registers each
_TARGET_BYTES = 16  # of shared memory for a row's addresses, of 32 rows twice
_OWN = 1024  # bytes of shared memory that every block has
_COPIES, _COPIES_MANY = 8, 32  # of an entry of a table, in shared memory
_ENTRY_MANY = 256  # bytes there that copies of an entry for cells and of one for squares take
_MOST_CELLS = 600


class Steps(NamedTuple):
    """How the index of the level of z is found, from M = min(z * scale + begin, 1) in float32, which is at least 0.254; or,
    ``clamped``, from M = (x + 1) / 2, where x is z * scale + begin within 0 and 1.

    ``table``: int32, for each cell of M what to add to its bits, so that byte 3 of the sum is the index. The cell is byte 2,
    or with ``near`` ``round((M - 1/2) * near)``. Four levels with boundaries at -b, 0 and b need no table: the index is the
    whole part of 4 x, or 3. ``begin``: the second; the first, a little lower, where z is to change its sign.
    """

    scale: float
    begin: tuple[float, float]
    clamped: bool
    near: int
    table: Tensor


@cache
def steps(fmt: KVFormat, most: float) -> Steps | None:
    """For |z| up to ``most``; None if levels are not symmetric or lie so close that a table has no room beside the rows."""
    levels, boundaries = fmt.level_values, fmt.boundaries.double()
    if not (torch.equal(levels, -levels.flip(0)) and torch.equal(boundaries, -boundaries.flip(0))):
        return None
    last, unit = float(boundaries[-1]), 2.0**-24
    if len(boundaries) == 3:
        return Steps(0.25 / last, (0.5, 0.5 + unit), True, 0, torch.zeros(0, dtype=torch.int32))
    # Values below 1/2 have another exponent and cells of their own, of the first level; none lies in the cell of 1/4, which
    # is that of 1.
    slope = 0.745 / (most + last)
    middle = math.floor((1.0 - last * slope) * 2**16) / 2**16
    cell = ((boundaries * slope + middle - 0.5) * 256).floor()
    near, clamped = 0, bool((cell.diff() <= 0).any()) or bool((cell < 0).any())
    if clamped:
        slope, middle = 0.2499 / (last or most), 0.75
        cell = ((boundaries * slope + 0.25) * 256).floor()
    while not bool((cell.diff() > 0).all()):
        near += 4
        if near // 2 >= _MOST_CELLS:
            return None
        cell = ((boundaries * slope + 0.25) * near).round()
    scale, begin = (2 * slope, (0.5 - 2 * unit, 0.5)) if clamped else (slope, (middle - unit, middle))
    bits = (boundaries * slope + middle).float().view(torch.int32).long()
    each = torch.arange(near // 2 + 1 if near else 129)
    below = torch.searchsorted(cell.long(), each)  # boundaries in earlier cells
    start = (0.5 + (each - 0.6).clamp(min=0) / near if near else 0.5 + each / 256).float().view(torch.int32).long()
    inside = torch.isin(each, cell.long())
    add = torch.where(inside, (below + 1 << 24) - torch.cat((bits, bits[:1]))[below], (below << 24) - start)
    if not clamped:
        add = torch.cat((add, -(0x3E000000 + (torch.arange(129, 256) << 16))))
    return Steps(scale, begin, clamped, near, torch.where(add >= 2**31, add - 2**32, add).to(torch.int32))


def _bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


class Turned(NamedTuple):
    """``tile``: rows that a team of warps takes at once. ``rows``: of a block at once. ``shared``: bytes. ``resident``:
    threads of a processor that registers suffice for."""

    defines: dict[str, int]
    tile: int
    rows: int
    threads: int
    shared: int
    resident: int
    table: Tensor


_LEVELS = ("NEAR", "STEPS", "INDEX", "BYTES", "LEVELS_LOW", "LEVELS_HIGH", "REACH", "BEGIN", "CLAMPED")
OTHER = dict.fromkeys(("TURNED", "PIECE", "SHARED", *_LEVELS), 0)


def side(fmt: KVFormat, padded: int, group: int, span: int, rotation: str, many: bool, room: int) -> Turned | None:
    """For rows of 16-bit values; None if the kernel does not take them. ``many``: tokens enough that a warp need not share
    a row whose groups it can turn one by one. ``room``: bytes of shared memory that a block may have."""
    row = ROTATIONS[rotation]
    ours = fmt.kind == "codebook" and row.mixes and fmt.corrected and fmt.scale_dtype == "float16" and fmt.ties == "up"
    rule = fmt.scale == "l2" or fmt.scale == "rms" and not row.signs[1]
    if not (ours and rule and group % _CHUNK == 0 and group <= 4 * _PIECE and span == group):
        return None
    unit = fmt.unit if fmt.scale == "l2" else 1.0  # of z, where norms are 1 per value
    found = steps(fmt, math.sqrt(group) * unit)
    if found is None:
        return None
    before, after = (sign_table(table, group) for table in row.signs)
    positive, levels = fmt.levels[len(fmt.levels) // 2 :], len(fmt.levels)
    narrow = _CHUNK < group <= _PIECE and len(positive) <= 8 and all(x == int(x) <= 127 for x in positive)
    if many and (padded == group or narrow and padded <= 4 * group):
        piece = padded  # its codes stay in registers
    elif group > _PIECE:
        piece = _PIECE
    else:
        piece = next(n for n in range(_PIECE // group * group, 0, -group) if padded % n == 0)
    team, slices = padded // piece, max(1, group // piece)
    apart = 2 if narrow and piece == padded == 2 * _PIECE == 2 * group else 1  # chunks that make a word
    # a lane has the words t, t + 4, t + 8 and t + 12 of a chunk, and of the result values 2 g, 2 g + 1, and 16 on
    table = [torch.where(before < 0, -0x8000, 0).to(torch.int16).view(torch.int32).view(-1, 4, 4).transpose(1, 2).flatten()]
    after = after.view(-1, 2, 8, 2).transpose(1, 2).flatten()
    if fmt.scale == "l2":
        begin = torch.where(after < 0, *(torch.tensor(x, dtype=torch.float32) for x in found.begin))
        table += [begin.view(torch.int32), _flips(fmt, after, apart if narrow else 0)]
    signs = torch.cat(table)
    signs = torch.nn.functional.pad(signs, (0, -len(signs) % 4))
    squares = fmt.level_values[: 0 if narrow else levels] ** 2
    cells = len(found.table)
    fields = [n for n in (1, 2, 4, 8) if fmt.bits & n]
    together = team == 1 and (narrow or piece == group)  # codes of a row in a warp's registers
    packed = all(padded * n % 512 == 0 or padded * n in ((128, 256) if n < 4 else (256,) * (n == 4)) for n in fields)
    buffers = 0 if together and packed else 2 if team > 1 and slices == 1 else 1  # for codes
    exchanged = 4 * 8 * padded + 2 * 4 * 8 * team if slices > 1 else 0
    tile = 4 if many and group == piece > 2 * _PIECE else 8  # halves of a row are turned like rows
    bytes_of_team = 2 * tile * padded + buffers * tile * (padded + 16) + exchanged + 64 * _TARGET_BYTES
    warps = _RESIDENT // 32 if many else 1 if slices > 1 else _WARPS
    for copies in (_COPIES_MANY,) * many + (_COPIES,):
        each = _ENTRY_MANY * max(cells, len(squares)) if copies == _COPIES_MANY else 4 * copies * (cells + len(squares))
        tables = (4 * len(signs) + each + 15) // 16 * 16
        teams = max(1, min(warps // team, (room - tables) // bytes_of_team))
        if tables + max(teams, warps // team // 2) * bytes_of_team <= room:
            break
    threads, shared = 32 * team * teams, tables + teams * bytes_of_team
    low, high = (sum(int(x) << 8 * i for i, x in enumerate(positive[j : j + 4]) if narrow) for j in (0, 4))
    names = OTHER | {
        "TURNED": 1, "NEAR": found.near, "STEPS": cells, "BYTES": int(narrow), "PIECE": piece, "SHARED": shared,
        "INDEX": int(fmt.coding == "index"), "LEVELS_LOW": low, "LEVELS_HIGH": high, "REACH": _bits(unit * found.scale),
        "BEGIN": _bits(found.begin[1]), "CLAMPED": int(found.clamped), "COPIES": copies,
    }  # fmt: skip
    table = torch.cat((signs, found.table, squares.view(torch.int32)))
    table = torch.nn.functional.pad(table, (0, -len(table) % 4))
    fit = (room + _OWN) // (shared + _OWN) * threads
    return Turned(names, tile, tile * teams, threads, shared, min(_RESIDENT, max(threads, fit)), table)


def _flips(fmt: KVFormat, after: Tensor, apart: int) -> Tensor:
    """What signs ``after [group]`` change in words of codes, int32: of a lane's 4 values of a chunk, ``[chunk, g]``, a byte
    each; or of two chunks that lie ``apart``, ``[pair, g]``, 4 bits each."""
    most = 2**fmt.bits - 1
    plus, minus = (0, most) if fmt.coding == "index" else (most, most // 2)
    codes = torch.where(after < 0, minus, plus).long().view(-1, 8, 4)
    if apart:
        codes = codes.view(-1, 2, apart, 8, 4)
        codes = (codes[:, 0] | codes[:, 1] << 4).flatten(0, 1)
    words = (codes << 8 * torch.arange(4)).sum(-1).flatten()
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
