"""How a problem is cut up: what kernels are compiled with, and how many splits there are. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from ...formats import KVFormat
from ...quant import code_values, scale_divisor

F16, BF16, F32, FP8, LINEAR, BYTES, TABLE = range(7)  # csrc/codec.cuh
_DENSE = {"float16": F16, "bfloat16": BF16, "float32": F32, "float8_e4m3fn": FP8}
SHARED_MEMORY = 227 * 1024  # bytes of a block on compute capability 9.0
_STATIC = 4096  # bytes that kernels declare themselves, at most
_DENORMAL = 2.0**24  # bytes are taken for half-precision denormals


@dataclass(frozen=True)
class Row:
    """Rows of one side as kernels read them. ``span``: values per scale, 0 without scales. ``factor``: on values."""

    kind: int
    bits: int
    dim: int
    span: int
    wide_scale: bool = False
    factor: float = 1.0
    low: int = 0
    high: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of words."""
        return self.dim * (self.bits if self.kind not in (F16, BF16, F32) else 32 if self.kind == F32 else 16) // 8

    @property
    def scales(self) -> int:
        return self.dim // self.span if self.span else 0

    @property
    def scale_bytes(self) -> int:
        return self.scales * (4 if self.wide_scale else 2)

    @property
    def _field(self) -> int:
        return {F16: 16, BF16: 16, F32: 8}.get(self.kind, self.bits & -self.bits)

    @property
    def words(self) -> int:
        """Words of a block: units of a row."""
        return self.dim if self.kind in (F16, BF16, F32) else self.dim * self._field // 16

    @property
    def lut_bytes(self) -> int:
        return 128 << self.bits if self.kind == TABLE else 0


@cache
def _table(fmt: KVFormat) -> tuple[int, float, int, int]:
    """(kind, factor, low, high) of rows with levels."""
    step, levels = float(fmt.step), fmt.levels
    half = 2 ** (fmt.bits - 1)
    if fmt.coding == "index" and fmt.bits in (4, 8) and list(levels) == list(range(-half, half)):
        return LINEAR, step, 0, 0
    whole = all(float(level).is_integer() and abs(level) <= 127 for level in levels)
    by_code = (code_values(fmt).double() / step).round().int().tolist()
    if whole and (fmt.bits in (2, 3) or (fmt.bits == 4 and fmt.coding == "sign_magnitude")):
        entries = by_code[:8] if fmt.bits == 4 else [level + 128 for level in by_code]
        text = bytes(entries + [0] * (8 - len(entries)))
        return BYTES, step * _DENORMAL, int.from_bytes(text[:4], "little"), int.from_bytes(text[4:], "little")
    return TABLE, float(code_values(fmt).abs().max()), 0, 0


@cache
def _row(fmt: KVFormat, head_dim: int) -> Row:
    padded, group = fmt.layout(head_dim)
    if not fmt.has_levels:
        return Row(_DENSE[fmt.element], fmt.bits, padded, 0)
    kind, factor, low, high = _table(fmt)
    span = min(group, fmt.scale_span or group)
    return Row(kind, fmt.bits, padded, span, fmt.scale_dtype == "float32", factor / scale_divisor(fmt, head_dim), low, high)


_rows: dict[tuple[int, int, int], tuple[KVFormat, Row]] = {}  # by identity: hashing a row hashes all of its levels


def row_of(fmt: KVFormat, head_dim: int, padded: int) -> Row:
    """The rows of ``fmt`` that stand for heads of ``head_dim``; a dense row holds ``padded`` values."""
    key = (id(fmt), head_dim, padded)
    found = _rows.get(key)
    if found is None:
        row = _row(fmt, head_dim) if fmt.has_levels else Row(_DENSE[fmt.element], fmt.bits, padded, 0)
        found = _rows.setdefault(key, (fmt, row))
    return found[1]


def why_not_row(fmt: KVFormat, head_dim: int) -> str:
    """Why kernels cannot read rows of ``fmt``; empty if they can."""
    if not fmt.has_levels:
        return "" if fmt.element in _DENSE else f"it knows no {fmt.element}"
    row = _row(fmt, head_dim)
    if row.kind == TABLE and fmt.bits not in (2, 3, 4, 5, 6, 8):
        return f"its tables have 2, 3, 4, 5, 6 or 8 bits, not {fmt.bits}"
    if fmt.scale_dtype not in ("float16", "float32"):
        return f"scale_dtype={fmt.scale_dtype}; it knows float16 and float32"
    if row.span % 8 or row.dim % 32:
        return f"groups of {row.span} values in rows of {row.dim}; it takes multiples of 8 and 32"
    return ""


# -- what a kernel is compiled with


@dataclass(frozen=True)
class Problem:
    """Everything that changes the code. ``stride``s: bytes from slot to slot where rows lie side by side, else 0.

    ``columns``: query rows per KV head. ``copy``: alignment of rows in bytes (16, 8 or 4). ``page_slots``: slots of a
    page, a multiple of 16, or 0 without pages.
    """

    k: Row
    v: Row
    columns: int
    q_type: int
    two_terms: bool
    softcap: bool = False
    mask: int = 0
    alibi: bool = False
    page_slots: int = 0
    same_table: bool = False
    k_copy: int = 16
    v_copy: int = 16
    k_stride: int = 0
    v_stride: int = 0
    k_scale_stride: int = 0
    v_scale_stride: int = 0


@dataclass(frozen=True)
class Plan:
    """A kernel's constants and its launch. ``rows``: query rows per block."""

    defines: tuple[tuple[str, int], ...]
    rows: int
    tile: int
    warps: int
    stages: int
    shared: int


def _vector(units: int, lanes: int) -> int:
    return next(n for n in (4, 2, 1) if n == 1 or units % (n * lanes) == 0)


def _conflicts(addresses: list[int], size: int) -> int:
    """Passes that one load of ``size`` bytes per lane takes in shared memory, less the fewest possible."""
    lanes = min(32, 128 // size) if size >= 4 else 32
    passes = 0
    for start in range(0, 32, lanes):
        banks: dict[int, set[int]] = {}
        for address in addresses[start : start + lanes]:
            for byte in range(address, address + max(size, 4), 4):
                banks.setdefault(byte // 4 % 32, set()).add(byte // 4)
        passes += max(map(len, banks.values()))
    return passes - 32 // lanes


def _pitch(row: Row, copy: int, side: str) -> int:
    """Bytes from row to row in shared memory: the fewest without bank conflicts."""
    word = 4 if row.kind == F32 else 2
    if side == "k":
        vector = _vector(row.words // 2, 4)
        size, lanes = (8, 2 * vector) if row.kind == F32 else (4 * vector, 2 * vector)
        at = [(lane // 4, min((lane % 4) * lanes, row.words - 2) * word) for lane in range(32)]
    else:
        vector = _vector(row.words, 8)
        size = vector * word
        at = [(2 * (lane % 4), min((lane // 4) * vector, row.words - vector) * word) for lane in range(32)]
    unit = max(copy, size, 4)
    first = -(-row.bytes // unit) * unit
    pitches = range(first, first + 144, unit)
    return min(pitches, key=lambda pitch: (_conflicts([r * pitch + b for r, b in at], size), pitch))


def _accumulators(problem: Problem, columns: int, tile: int) -> int:
    """32-bit registers per lane that hold sums."""
    v, k = problem.v, problem.k
    terms = 1 if not problem.two_terms else 2
    offset = v.scales if v.kind == BYTES and v.bits < 4 else 0
    sums = k.scales if 1 < k.scales <= 9 else 2 if tile == 16 else 1
    weights = max(v.scales, 1) * 2 * (2 if v.kind in (BF16, F32) else 1)
    dims = v.dim // 16 if v.words % 8 == 0 else 2 * -(-v.dim // 16)
    return columns * (4 * (dims + offset) + tile // 16 * (4 + weights)) + tile // 16 * 4 * sums * columns * terms


def plan(problem: Problem, shared_memory: int = SHARED_MEMORY) -> Plan:
    """The constants for ``problem``. Raises nothing: every row that :func:`why_not_row` lets pass has a plan."""
    return _plan(problem, shared_memory)


@cache
def _plan(problem: Problem, shared_memory: int) -> Plan:
    k, v = problem.k, problem.v
    rows = 4 if problem.columns <= 4 else 8 if problem.columns <= 8 or v.dim > 256 else 16
    columns = -(-rows // 8)
    terms = 2 if problem.two_terms else 1
    k_columns = columns if terms == 1 else 1 if rows <= 4 else 2 * columns
    k_pitch, v_pitch = _pitch(k, problem.k_copy, "k"), _pitch(v, problem.v_copy, "v")
    tables = k.lut_bytes + (0 if problem.same_table else v.lut_bytes)
    sums = k_columns * 8 * max(k.scales, 1) * 4
    fixed = -(-(tables + _query_bytes(k, k_columns) + sums) // 128) * 128
    whole = problem.page_slots % 32 == 0  # a page holds whole tiles
    tile = 32 if whole and k_pitch + v_pitch <= 640 and _accumulators(problem, columns, 32) <= 120 else 16
    registers = 64 + _accumulators(problem, columns, tile)
    most = 16 if registers <= 120 else 12 if registers <= 160 else 8
    per_stage, per_warp = tile * (k_pitch + v_pitch), 8 * columns * v.dim * 4
    room = shared_memory - _STATIC
    warps = max(1, min(most, (room - fixed) // per_stage, room // per_warp))
    warps -= warps % 4 if warps > 4 else 0
    stages = max(1, min(3, (room - fixed) // (per_stage * warps)))
    shared = max(fixed + warps * stages * per_stage, warps * per_warp)
    defines = {
        "K_KIND": k.kind, "K_BITS": k.bits, "K_SPAN": k.span, "K_SCALE32": int(k.wide_scale), "DK": k.dim,
        "V_KIND": v.kind, "V_BITS": v.bits, "V_SPAN": v.span, "V_SCALE32": int(v.wide_scale), "DV": v.dim,
        "ROWS": rows, "TERMS": terms, "Q_TYPE": problem.q_type, "SOFTCAP": int(problem.softcap), "MASK": problem.mask,
        "ALIBI": int(problem.alibi), "PAGED": int(problem.page_slots > 0), "SAME_TABLE": int(problem.same_table),
        "TILE": tile, "STAGES": stages, "WARPS": warps, "K_PITCH": k_pitch, "V_PITCH": v_pitch,
        "K_COPY": problem.k_copy, "V_COPY": problem.v_copy, "K_STRIDE": problem.k_stride, "V_STRIDE": problem.v_stride,
        "K_SCALE_STRIDE": problem.k_scale_stride, "V_SCALE_STRIDE": problem.v_scale_stride,
        "SHARED": shared,
    }  # fmt: skip
    return Plan(tuple(defines.items()), rows, tile, warps, stages, shared)


def _query_bytes(k: Row, k_columns: int) -> int:
    """Shared memory that q takes as operands: pairs of dims x scales that meet in one (``Share`` in csrc/codec.cuh)."""
    vector = _vector(k.words // 2, 4)
    size, words, span = 8 * vector, k.words, k.span or k.dim
    chunks, planes = -(-words // size), {F16: 1, BF16: 1, F32: 2}.get(k.kind, 16 // k._field)

    def scale(chunk: int, plane: int, last: bool) -> int:
        word = min((chunk + 1) * size, words) - 1 if last else chunk * size
        return (word if k.kind == F32 else word + plane * words) // span

    even = range(0, planes - 1, 2)
    agree = all(scale(c, p, False) == scale(c, p + 1, True) for c in range(chunks) for p in even)
    by_plane = planes > 1 and (vector == 1 or (k.kind != F32 and agree))
    pairs = [(p, p + 1) for p in even] if by_plane else [(p, p) for p in range(planes)]
    most = max(scale(c, b, True) - scale(c, a, False) + 1 for c in range(chunks) for a, b in pairs)
    steps = vector if by_plane or vector == 1 else vector // 2
    return chunks * steps * len(pairs) * most * k_columns * 256


# -- splits


def splits(units: int, tiles: int, warps: int, processors: int) -> int:
    """Blocks that share one KV head's keys, so that ``units * splits`` blocks fill ``processors`` with little left over.

    A block's fixed cost is about that of ``warps`` tiles; blocks beyond the processors wait for another wave.
    """
    if units == 0 or tiles <= warps:
        return 1
    most = min(-(-tiles // warps), 4 * processors // units + 1, 256)
    return min(range(1, max(1, most) + 1), key=lambda n: (_cost(units * n, -(-tiles // (n * warps)), processors), n))


def _cost(blocks: int, rounds: int, processors: int) -> float:
    waves = -(-blocks // processors)
    return waves * (rounds + 2.0) + 0.002 * blocks
