"""New tokens to packed rows where they belong (csrc/encode.cu), K and V in one launch unless they are many and differ.

The bytes are those of ``quant.encode``, but for what lies on a boundary in rows of csrc/turned.cuh.

The first half are pure functions: what a kernel is compiled with. ``append`` launches.
"""

from __future__ import annotations

import ctypes
import math
import struct
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import GyroKVError
from ...formats import KVFormat
from ...packing import to_sign_magnitude
from ...quant import Codec, Packed, saturate
from ...rotation import ROTATIONS, sign_table
from . import turned
from .nvrtc import Kernel
from .plan import SHARED_MEMORY

ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_DENSE, _FLOAT8, _LINEAR, _TABLE = range(4)
_RULES = {"l2": 0, "rms": 1, "absmax": 2, "signed_absmax": 3}
_UP, _DOWN, _AWAY = range(3)
_GROUPS = tuple(2**n for n in range(3, 11))  # values that are rotated or scaled as one
_THREADS = 128  # of a block, about
_RESIDENT = 384  # threads of a processor with 168 registers each
_ROW_BYTES = 24  # of shared memory for a row's addresses
_MOST_CELLS = 2047
_TABLE_BYTES = 20 * 1024  # of shared memory for copies of a table, where many tokens come at once
_MANY = 48  # groups of 128 values per processor and side from which on a thread takes a group of its own
_APART = 8  # times as many from which on sides that differ have a launch each


# -- what a kernel is compiled with


class Cells(NamedTuple):
    """A uniform grid over the values that a table decides between, no cell with two boundaries.

    Value z lies in cell ``round(n * clamp(z * scale + 1/2, 0, 1))``, half to even, in float32. ``rows [n + 1, 2 or 4]``
    int32: bits of the cell's boundary, ``below | above << 8`` (stored codes), bits of the squares of their levels.
    """

    scale: float
    n: int
    rows: Tensor


@cache
def cells(fmt: KVFormat, last: float) -> Cells | None:
    """The grid for factors of ``last``, whose product is compared with ``fmt.boundaries``.

    None if boundaries lie too close together.
    """
    boundaries = preimages(fmt.boundaries, last, fmt.ties == "up")
    exact = boundaries.double()
    mantissa, exponent = math.frexp(0.5 / max(1e-30, float(exact.abs().max())))
    scale = math.ldexp(math.floor(mantissa * 256) - 1, exponent - 8)  # of 8 bits: products in float64 are exact
    at = (exact * scale + 0.5).float().double()
    closest = float(at.diff().min()) if len(at) > 1 else 1.0
    for n in range(max(4, int(0.5 / max(closest, 2.0**-24))), _MOST_CELLS + 1):
        cell = (at * n).round()  # half to even, of an exact product
        if bool((cell.diff() > 0).all()):
            return Cells(scale, n, _cell_rows(fmt, boundaries, cell.long(), n))
    return None


def preimages(boundaries: Tensor, factor: float, least: bool) -> Tensor:
    """For each boundary b the least x whose float32 product with ``factor`` is b or more, or else the largest whose
    product is b or less: x and the product are on the same side of them."""
    most = 0x7F7FFFFF  # of the bits of a finite float32; numbers in order, negative ones as -bits
    low, high = (torch.full(boundaries.shape, end, dtype=torch.int64) for end in (-most - 1, most + 1))

    def value(order: Tensor) -> Tensor:
        size = order.abs().to(torch.int32).view(torch.float32)
        return torch.where(order < 0, -size, size)

    while bool((high - low > 1).any()):
        middle = (low + high).div(2, rounding_mode="floor")
        product = value(middle) * torch.tensor(factor, dtype=torch.float32)
        right = product >= boundaries if least else product > boundaries
        low, high = torch.where(right, low, middle), torch.where(right, middle, high)
    return value(high if least else low)


def _cell_rows(fmt: KVFormat, boundaries: Tensor, cell: Tensor, n: int) -> Tensor:
    below = torch.bucketize(torch.arange(n + 1), cell)  # boundaries in earlier cells
    own = torch.zeros(n + 1, dtype=torch.int64)
    own[cell] = 1
    boundary = torch.full((n + 1,), torch.inf)
    boundary[cell] = boundaries
    codes = torch.arange(2**fmt.bits)
    if fmt.coding == "sign_magnitude":
        codes = to_sign_magnitude(codes, fmt.bits)
    squares = fmt.level_values * fmt.level_values
    above = below + own
    pair = (codes[below] | codes[above] << 8).to(torch.int32)
    first, *rest = (t.view(torch.int32) for t in (boundary, squares[below], squares[above]))
    return torch.stack((first, pair, *(rest if fmt.corrected else ())), -1)


def is_turned(codec: Codec, dtype: torch.dtype) -> bool:
    """Whether csrc/turned.cuh encodes heads of ``dtype``: their bytes need not be the definition's."""
    fmt = codec.format
    if fmt.is_dense or dtype not in (torch.float16, torch.bfloat16):
        return False
    padded, group, span, _ = _layout(fmt, codec.head_dim, codec.rotation)
    return turned.side(fmt, padded, group, span, codec.rotation, False, SHARED_MEMORY) is not None


def _layout(fmt: KVFormat, head_dim: int, rotation: str) -> tuple[int, int, int, float]:
    """(values stored, rotated as one, of one scale; the factor of the last product before levels are chosen)."""
    padded, group = fmt.layout(head_dim)
    if fmt.kind == "float8" and rotation == "none":  # nothing but the kernel's convenience
        group = next(n for n in (32, 16, 8) if padded % n == 0)
    if fmt.scale == "l2":
        return padded, group, group, fmt.unit if ROTATIONS[rotation].mixes else fmt.unit * math.sqrt(group)
    span = min(group, fmt.scale_span or group)
    if fmt.scale != "rms":
        return padded, group, span, 1.0
    return padded, group, span, math.sqrt(span) if span == group else fmt.scale_factor


def _float32(value: float) -> float:
    return ctypes.c_float(value).value


_reasons: dict[tuple[int, int, str], tuple[KVFormat, str]] = {}  # by identity: hashing a row hashes all of its levels


def why_not_row(fmt: KVFormat, head_dim: int, rotation: str) -> str:
    """Why the kernel cannot write rows of ``fmt``; empty if it can."""
    key = (id(fmt), head_dim, rotation)
    found = _reasons.get(key)
    if found is None:
        found = _reasons.setdefault(key, (fmt, _why_not_row(fmt, head_dim, rotation)))
    return found[1]


def _why_not_row(fmt: KVFormat, head_dim: int, rotation: str) -> str:
    if fmt.is_dense:
        return "" if fmt.dtype in ELEMENTS else f"it knows no {fmt.dtype}"
    if fmt.kind == "float8" and fmt.dtype != torch.float8_e4m3fn:
        return f"it knows no {fmt.dtype}"
    if head_dim % 8:
        return f"head_dim={head_dim}; it takes multiples of 8"
    padded, group, span, last = _layout(fmt, head_dim, rotation)
    if padded % 8 or (group not in _GROUPS or span not in _GROUPS):
        return f"groups of {group} values and scales of {span}; it takes powers of two from {_GROUPS[0]} to {_GROUPS[-1]}"
    if fmt.has_levels and fmt.scale_dtype not in ("float16", "float32"):
        return f"scale_dtype={fmt.scale_dtype}; it knows float16 and float32"
    if fmt.kind == "linear" and fmt.coding != "index":
        return f"coding={fmt.coding}; it stores integers by index"
    if fmt.kind == "codebook" and cells(fmt, _float32(last)) is None:
        return f"its levels lie closer together than 1/{_MOST_CELLS} of their range"
    return ""


@dataclass(frozen=True)
class Side:
    """What the kernel is compiled with for one side. ``rows``: heads per block. ``shared``: bytes that a block needs.

    ``resident``: threads of a processor that registers are to suffice for, or 0. ``turned``: by csrc/turned.cuh, where
    blocks go on to other rows. ``table``: what the kernel looks up.
    """

    defines: tuple[tuple[str, str], ...]
    rows: int
    threads: int
    shared: int
    resident: int
    turned: int
    table: Tensor | None


def _bits(value: float) -> str:
    return f"0x{struct.unpack('<I', struct.pack('<f', value))[0]:08x}u"


def _sign_words(name: str, which: int, group: int) -> str:
    """The signs of a rotation as a list of 32-bit words, bit 1 = -1."""
    row = ROTATIONS[name]
    table = (sign_table(row.signs[which], group) < 0).long() if row.mixes else torch.zeros(group, dtype=torch.int64)
    return ",".join(f"0x{sum(int(bit) << i for i, bit in enumerate(part)):08x}u" for part in table.split(32))


@cache
def side(
    fmt: KVFormat, head_dim: int, rotation: str, element: int, align: int, many: bool, room: int = SHARED_MEMORY
) -> Side:
    """``element``: of the values given. ``align``: of stored rows in bytes. ``many``: tokens enough that threads need
    not share groups. ``room``: bytes of shared memory that a block may have."""
    dense, (padded, group, span, last) = fmt.is_dense, (head_dim, 1, 1, 1.0)
    if not dense:
        padded, group, span, last = _layout(fmt, head_dim, rotation)
    z = None if dense or element == ELEMENTS[torch.float32] else turned.side(fmt, padded, group, span, rotation, many, room)
    if dense or z:
        values = 4 if dense and ELEMENTS[torch.float32] in (element, ELEMENTS[fmt.dtype]) else 8
    else:
        values = min(span, (128 if span <= 128 else 64) if many else 16 if span <= 128 else 32)
    kind = _DENSE if dense else {"float8": _FLOAT8, "linear": _LINEAR, "codebook": _TABLE}[fmt.kind]
    grid = cells(fmt, _float32(last)) if kind == _TABLE and not z else None
    entry, copies = 16 if fmt.corrected else 8, 1
    while grid and many and copies < 128 // entry and 2 * copies * (grid.n + 1) * entry <= _TABLE_BYTES:
        copies *= 2
    units = padded // values
    step = 32 // math.gcd(units, 32)
    rows = min(_THREADS, max(1, 32 * _THREADS // padded)) if dense else max(step, _THREADS // units // step * step)
    threads = _THREADS if dense else -(-rows * units // 32) * 32
    size = 4 if element == ELEMENTS[torch.float32] else 2
    shared = 0 if dense else rows * units * 16 * (values * size // 16 | 1)
    shared += -(-(grid.n + 1) * copies * entry // 16) * 16 if grid else 0
    levels = fmt.levels or (0.0,)
    named = {
        "KIND": kind, "IN": element, "OUT": ELEMENTS[fmt.dtype] if dense else 0, "DIM": head_dim, "PADDED": padded,
        "GROUP": group, "SPAN": span, "BITS": 0 if dense else fmt.bits, "RULE": _RULES.get(fmt.scale, _RULES["absmax"]),
        "TIES": _UP if fmt.ties == "up" else _AWAY if fmt.kind == "linear" else _DOWN, "CORRECTED": int(fmt.corrected),
        "ROTATE": int(not dense and ROTATIONS[rotation].mixes), "WIDE_SCALE": int(fmt.scale_dtype == "float32"),
        "LOW": int(levels[0]), "HIGH": int(levels[-1]), "BOTTOM": _bits(levels[0]), "TOP": _bits(levels[-1]),
        "STEP": _bits(fmt.step), "FACTOR": _bits(1.0 / math.sqrt(group)), "LAST": _bits(last),
        "CELLS": grid.n if grid else 0, "CELL_SCALE": _bits(grid.scale if grid else 0.0), "COPIES": copies,
        "ALIGN": align, "VALUES": values, "ROWS": rows,
        "BEFORE": _sign_words(rotation, 0, group), "AFTER": _sign_words(rotation, 1, group),
    } | turned.OTHER  # fmt: skip
    if z:
        return Side(_texts(named | z.defines | {"ROWS": z.rows}), z.rows, z.threads, z.shared, z.resident, z.tile, z.table)
    resident, shared = _RESIDENT if many and values >= 64 else 0, shared + _ROW_BYTES * rows
    return Side(_texts(named), rows, threads, shared, resident, 0, grid.rows if grid else None)


def _texts(named: dict[str, object]) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(value)) for name, value in named.items())


def defines(k: Side, v: Side) -> dict[str, str]:
    """What a kernel for two sides is compiled with."""
    threads = max(k.threads, v.threads)
    blocks = max(1, min(filter(None, (k.resident, v.resident)), default=0) // threads)
    both = {"THREADS": str(threads), "BLOCKS": str(blocks), "SAME": str(int(k.defines == v.defines))}
    both["APPEND_BYTES"] = str(_APPEND.size)
    return both | {f"{which}_{name}": value for which, part in (("K", k), ("V", v)) for name, value in part.defines}


# -- launches


# struct Append of csrc/params.cuh: 13 numbers and 2 of 32 bits per side, 6 more, and 14 of 32 bits. Packing tuples
# takes a third of the time of filling a structure.
_APPEND = struct.Struct("=13q2I13q2I6q14I")
_Append = ctypes.c_char * _APPEND.size


@cache
def _divisor(by: int) -> tuple[int, int, int]:
    """struct Divisor of csrc/params.cuh."""
    shift = (by - 1).bit_length()
    return by, ((2**shift - by) << 32) // by + 1, shift


@dataclass(frozen=True)
class Place:
    """Where tokens go: token i of sequence b to slot ``(start + i - base) % capacity``, at most ``capacity`` tokens.

    start is ``slot``, or ``lengths[b]`` (int64 ``[B]`` or ``[1]`` on the device) where there are any; ``capacity`` 0 is
    that of the stores. With ``pages`` (int32 ``[B, n]``) a slot lies in page ``pages[b, slot // page_slots]``, stores are
    ``[pages, Hkv, page_slots, *]``, and ``capacity`` counts the slots of a sequence.
    """

    slot: int = 0
    base: int = 0
    capacity: int = 0
    lengths: Tensor | None = None
    pages: Tensor | None = None
    page_slots: int = 1


class _Launcher:
    """A kernel for one side or both (``which``), and its tables."""

    def __init__(self, which: tuple[int, ...], sides: tuple[Side, Side], device: torch.device) -> None:
        self.which, own = which, [sides[i] for i in which]
        names = defines(own[0], own[-1])
        self.rows, self.threads, self.resident = [s.rows for s in own], int(names["THREADS"]), int(names["BLOCKS"])
        self.kernel = Kernel("encode", names, device.index, max(s.shared for s in own))
        self.tables = [torch.empty(0, device=device) if s.table is None else s.table.to(device) for s in own]
        self.turned = [s.turned for s in own]

    def launch(self, fields: list[tuple[int, ...]], numbers: tuple[int, ...], rows: int, device: torch.device) -> None:
        """``fields``: of struct Append, of K and V; ``numbers``: those after them."""
        blocks, sides = [], []
        most = max(1, _most_blocks(device.index, self.resident) // max(1, sum(map(bool, self.turned))))
        for i, table, at_once, tile in zip(self.which, self.tables, self.rows, self.turned):
            count = -(-rows // at_once)
            blocks.append(min(count, most) if tile else count)
            tiles = divmod(-(-rows // tile), blocks[-1] * at_once // tile) if tile else (0, 0)
            sides.append((*fields[i], table.data_ptr(), *tiles))
        call = _Append.from_buffer_copy(_APPEND.pack(*sides[0], *sides[-1], *numbers, rows, blocks[0]))
        self.kernel.launch((sum(blocks), 1, 1), self.threads, torch.cuda.current_stream(device).cuda_stream, call)


# with the formats, which are known by their ids
_launchers: dict[tuple, tuple[tuple[KVFormat, ...], list[_Launcher]]] = {}


@cache
def _many(device: int) -> int:
    return _MANY * torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _room(device: int) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@cache
def _most_blocks(device: int, resident: int) -> int:
    """Of a side where blocks go on to other rows, when ``resident`` fit on a processor."""
    return resident * torch.cuda.get_device_properties(device).multi_processor_count


def append(
    k: Tensor, v: Tensor, codecs: tuple[Codec, Codec], stores: tuple[Packed, Packed], place: Place
) -> tuple[Packed, Packed]:
    """Write k ``[B, Hkv, T, Dk]`` and v ``[B, Hkv, T, Dv]`` as rows of ``stores``; returns ``stores``."""
    batch, heads, tokens, _ = k.shape
    device, rows = k.device, batch * heads * tokens
    if rows >= 2**31:
        raise GyroKVError(f"{batch} sequences x {heads} heads x {tokens} tokens at once; at most 2**31 - 1 rows")
    groups = rows * min(codecs[0].padded, codecs[1].padded) // 128
    many, apart = (groups >= n * _many(device.index) for n in (1, _APART))
    held, parts, fields = [], [], []
    for x, codec, (words, scale) in zip((k, v), codecs, stores):
        x, source = _source(codec.prepare(x))
        (to, *strides), (scale_to, *scale_strides) = _address(words), _address(scale)
        align = _aligned(to, words.shape[3] * words.element_size(), *strides)
        parts.append((codec.head_dim, codec.rotation, ELEMENTS[x.dtype], align, many, _room(device.index)))
        fields.append((*source, to, scale_to, *strides, *scale_strides))
        held.append(x)
    key = (id(codecs[0].format), id(codecs[1].format), *parts, apart, device.index)
    found = _launchers.get(key)
    if found is None:
        formats = tuple(codec.format for codec in codecs)
        sides = tuple(side(fmt, *part) for fmt, part in zip(formats, parts))
        # a kernel is only as good as its worse side, above all where one side is turned and the other is not
        unlike = apart or (many and bool(sides[0].turned) != bool(sides[1].turned))
        each = ((0,), (1,)) if unlike and sides[0].defines != sides[1].defines else ((0, 1),)
        found = _launchers.setdefault(key, (formats, [_Launcher(which, sides, device) for which in each]))
    lengths, pages = place.lengths, place.pages
    numbers = (
        0 if lengths is None else lengths.data_ptr(), 0 if pages is None else pages.data_ptr(),
        0 if lengths is None or len(lengths) == 1 else lengths.stride(0), 0 if pages is None else pages.stride(0),
        place.slot, place.base,
        *_divisor(place.page_slots), *_divisor(place.capacity or words.shape[2]), *_divisor(heads), *_divisor(tokens),
    )  # fmt: skip
    with torch.cuda.device(device):
        for launcher in found[1]:
            launcher.launch(fields, numbers, rows, device)
    return stores


def _source(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """``x`` as the kernel reads it, and its address: 16 or 32-bit floats, consecutive in a head that begins at 16 bytes."""
    if x.dtype not in ELEMENTS:
        x = saturate(x, torch.float32)
    address = _address(x)
    if x.stride(3) != 1 or _aligned(*address) < 16:
        x = x.clone(memory_format=torch.contiguous_format)
        address = _address(x)
    return x, address


def _address(t: Tensor) -> tuple[int, ...]:
    """Where the first row of ``t`` lies, and bytes from one to the next along each axis (0 along axes of one)."""
    size = t.element_size()
    (batch, heads, tokens, _), (a, b, c, _) = t.shape, t.stride()
    return t.data_ptr(), a * size if batch > 1 else 0, b * size if heads > 1 else 0, c * size if tokens > 1 else 0


def _aligned(*addresses: int) -> int:
    """Bytes that sums of multiples of ``addresses`` are aligned to: 16, 8, 4 or 2."""
    bits = 16
    for address in addresses:
        bits |= address
    return max(2, bits & -bits)


def empty_rows(x: Tensor, codec: Codec) -> Packed:
    """Room for heads x ``[B, Hkv, T, D]``."""
    fmt = codec.format
    words = x.new_empty((*x.shape[:3], fmt.words_per_head(x.shape[3])), dtype=fmt.dtype if fmt.is_dense else torch.int16)
    scale_dtype = getattr(torch, fmt.scale_dtype) if fmt.has_levels else words.dtype if fmt.is_dense else torch.float32
    return Packed(words, x.new_empty((*x.shape[:3], fmt.scales_per_head(x.shape[3])), dtype=scale_dtype))
