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


@dataclass(frozen=True)
class Row:
    """Rows of one side as kernels read them. ``span``: values per scale, 0 without scales. ``factor``: on values.
    ``mirrored``: a table whose codes have a sign as their top bit."""

    kind: int
    bits: int
    dim: int
    span: int
    wide_scale: bool = False
    factor: float = 1.0
    low: int = 0
    high: int = 0
    mirrored: bool = False

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
    def planes(self) -> int:
        """Values of a unit."""
        return {F16: 1, BF16: 1, F32: 2}.get(self.kind, 16 // self._field)

    @property
    def fold(self) -> int:
        """Parts of a warp's lanes that take different planes where rows are short; not where they become bytes."""
        return 2 if self.words <= 4 and self.planes >= 4 else 1

    @property
    def lut_bytes(self) -> int:
        return 256 << self.bits if self.kind == TABLE else 0

    @property
    def pair_bytes(self) -> int:
        """Bytes of a table of pairs: of 6 bits, of magnitudes."""
        return 128 << 2 * (5 if self.bits == 6 else self.bits) if self.kind == TABLE else 0


@cache
def _table(fmt: KVFormat) -> tuple[int, float, int, int, bool]:
    """(kind, factor, low, high, mirrored) of rows with levels."""
    step, levels = float(fmt.step), fmt.levels
    half = 2 ** (fmt.bits - 1)
    if fmt.coding == "index" and fmt.bits in (4, 8) and list(levels) == list(range(-half, half)):
        return LINEAR, step, 0, 0, False
    whole = all(float(level).is_integer() and abs(level) <= (126 if fmt.bits == 4 else 127) for level in levels)
    by_code = (code_values(fmt).double() / step).round().int().tolist()
    if whole and (fmt.bits in (2, 3) or (fmt.bits == 4 and fmt.coding == "sign_magnitude")):
        text = bytes(level & 255 for level in by_code[:8]).ljust(8, b"\0")
        return BYTES, step, int.from_bytes(text[:4], "little"), int.from_bytes(text[4:], "little"), False
    return TABLE, float(code_values(fmt).abs().max()), 0, 0, fmt.coding == "sign_magnitude"


@cache
def _row(fmt: KVFormat, head_dim: int) -> Row:
    padded, group = fmt.layout(head_dim)
    if not fmt.has_levels:
        return Row(_DENSE[fmt.element], fmt.bits, padded, 0)
    kind, factor, low, high, mirrored = _table(fmt)
    span = min(group, fmt.scale_span or group)
    factor /= scale_divisor(fmt, head_dim)
    return Row(kind, fmt.bits, padded, span, fmt.scale_dtype == "float32", factor, low, high, mirrored)


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

    ``columns``: query rows per KV head. ``copy``: alignment of rows in bytes (16, 8 or 4), and of scales (4 or 2).
    ``page_slots``: slots of a page, a multiple of 16, or 0 without pages. ``k_turn``, ``v_turn``: the blocks of rotations
    that the kernel applies to q and to the output, or 0.
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
    k_scale_copy: int = 4
    v_scale_copy: int = 4
    k_turn: int = 0
    v_turn: int = 0
    out_type: int = F32


@dataclass(frozen=True)
class Plan:
    """A kernel's constants and its launch. ``rows``: query rows per block. ``team``: warps that share a tile."""

    defines: tuple[tuple[str, int], ...]
    rows: int
    tile: int
    warps: int
    shared: int
    team: int = 1


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


def _pitch(row: Row, copy: int, side: str, team: int = 1) -> int:
    """Bytes from row to row in shared memory, of what a warp of a team has: the fewest without bank conflicts."""
    word, words = 4 if row.kind == F32 else 2, row.words // team
    if side == "k":
        sharing = 4 // row.fold
        vector = _vector(words // 2, sharing)
        size, lanes = (8, 2 * vector) if row.kind == F32 else (4 * vector, 2 * vector)
        at = [(lane // 4, min(lane % sharing * lanes, words - 2) * word) for lane in range(32)]
    elif words % 8 == 0 and row.kind != F32:  # eight words of a token at once
        size, at = 16, [(lane, 0) for lane in range(32)]
    else:
        size, at = 4, [(2 * (lane % 4), min(lane // 4 % (8 // row.fold), words - 1) * word) for lane in range(32)]
    unit = max(copy, size, 4)
    first = -(-row.bytes // team // unit) * unit
    pitches = range(first, first + 144, unit)
    return min(pitches, key=lambda pitch: (_conflicts([r * pitch + b for r, b in at], size), pitch))


def _integers(row: Row, side: str, rows: int) -> bool:
    """True when a side is multiplied as bytes, which takes two terms of q and of the weights: free on K, and on V while
    four query rows fill half of a product. Two lookups per code, for either sign, pay for themselves on K alone, and
    while a product meets few scales; not for long rows of 2 bits and many query rows, by measurement, unless codes are
    gathered. Eight query rows take two products on V, which pays for itself in rows of up to 256 values."""
    if row.kind != BYTES:
        return False
    if side == "k":
        return _gathered(row) or ((row.bits < 4 or row.scales <= 2) and not (row.bits == 2 and rows > 4 and row.dim > 256))
    return row.bits < 4 and (rows == 4 or (rows == 8 and row.dim <= 256 and row.span >= min(row.dim, 128)))


def _gathered(row: Row) -> bool:
    """Do codes of keys change places, so that a product of bytes meets one scale? ``K_GATHERED`` in csrc/score.cuh."""
    nibbles, vector = row.planes // 4, _vector(row.words // 2, 4)
    possible = row.kind == BYTES and (row.scales == 2 or (row.scales == 4 and nibbles > 1))
    two_units = row.scales == 4 or nibbles == 1
    whole = row.words % (8 * vector) == 0 and row.span % row.words == 0
    return possible and whole and not (two_units and vector % 2)


def _pairs(problem: Problem) -> bool:
    """True where one lookup may yield two values: tables of 5 bits, or of 6 with a sign, and not two different ones."""
    tables = [row for row in (problem.k, problem.v) if row.kind == TABLE]
    short = all(row.bits <= 5 or (row.bits == 6 and row.mirrored) for row in tables)
    return bool(tables) and short and (len(tables) == 1 or problem.same_table)


def halves(row: Row) -> bool:
    """True for rows whose words two warps may share: of 512 values, whose sums fill the registers of one, that are looked
    up. Halves of a block are 64 bytes and more there, by 32 from memory it is slower. Both halves meet the same scales."""
    return row.kind == TABLE and row.bits >= 6 and row.dim == 512 and row.span % row.words == 0


def _team(problem: Problem, rows: int) -> int:
    """Warps that share the words of each row."""
    shared = halves(problem.k) and halves(problem.v) and problem.k_copy == problem.v_copy == 16
    return 2 if shared and rows <= 8 else 1


def _registers(problem: Problem, rows: int, terms: int, tile: int, team: int) -> int:
    """About how many registers a lane needs: sums, weights, and what every kernel has."""
    v, k, tiles, dims = problem.v, problem.k, tile // 16, problem.v.dim // team
    columns = -(-rows // 8)
    per_lane = 1 if terms == 2 and rows <= 4 else 2
    k_columns = columns if terms == 1 else 1 if rows <= 4 else 2 * columns
    sums = k.scales if 1 < k.scales <= 9 else 1
    scores = tiles * 4 * (sums * k_columns + columns)
    if _integers(v, "v", rows):
        products = max(v.scales, 1) * columns * per_lane
        return 70 + 5 * -(-dims // 16) * columns * per_lane // 4 + 32 * products * (7 if tile == 32 else 5) // 5
    out = -(-dims // 16) * 4 * columns
    work = 2 * tiles * max(v.scales, 1) * columns * (2 if v.kind in (BF16, F32) else 1) + 16
    return out + max(scores, work) + 72


def plan(problem: Problem, shared_memory: int = SHARED_MEMORY) -> Plan:
    """The constants for ``problem``. Raises nothing: every row that :func:`why_not_row` lets pass has a plan."""
    return _plan(problem, shared_memory)


@cache
def _plan(problem: Problem, shared_memory: int) -> Plan:
    k, v = problem.k, problem.v
    rows = 4 if problem.columns <= 4 else 8 if problem.columns <= 8 or v.dim > 256 else 16
    team = _team(problem, rows)
    k_int, v_int = _integers(k, "k", rows), _integers(v, "v", rows)
    # one bfloat16 holds a q of that dtype only; where four rows fill half a product, two terms are free
    rounded = k.kind in (BF16, F32) and (problem.q_type != BF16 or problem.k_turn > 0)
    terms = 2 if problem.two_terms or rounded or k_int or rows == 4 else 1
    columns = -(-rows // 8)
    k_columns = columns if terms == 1 else 1 if rows == 4 else 2 * columns
    k_pitch, v_pitch = _pitch(k, problem.k_copy, "k", team), _pitch(v, problem.v_copy, "v", team)
    slot = k_pitch + v_pitch + k.scale_bytes + v.scale_bytes
    skew = 16 * ((problem.k_scale_copy == 2) + (problem.v_scale_copy == 2))
    room = shared_memory - _STATIC
    per_lane = 1 if rows == 4 and terms == 2 else 2
    per_warp = 4 * per_lane * columns * v.dim * 4 // team
    tables = TABLE in (k.kind, v.kind)
    whole = problem.page_slots % 32 == 0  # a page holds whole tiles
    # the longest tiles, of bytes alone, and warps that they suit by measurement
    short = v.dim <= (256 if rows == 8 or k.bits == v.bits == 2 else 128) and v.span >= min(v.dim, 128)
    longest = problem.page_slots % 64 == 0 and k_int and v_int and k.bits < 4 and short
    by_two = k_int and k.bits == 4 and k.scales == 2 and v.kind == BYTES and rows <= 8  # two units change places
    # registers that spill cost less here than short tiles: many query rows, and long rows of 2 bits
    many = rows == 16 and k.scales <= 2 and k.bits * v.dim < 1024
    spills = k_int and v.kind == BYTES and (many or (rows == 8 and k.bits == v.bits == 2))
    # lookups of short rows, and pairs of six bits, gain more from registers than from warps, by measurement
    fewer = tables and (v.dim <= 64 or (_pairs(problem) and any(row.kind == TABLE and row.bits == 6 for row in (k, v))))

    def sums(tile: int) -> int:
        """Bytes of a warp for the scores of its share of rows, twice"""
        return tile // 16 * columns * per_lane * 512 if team > 1 else 0

    def cut(fixed: int) -> tuple[int, int]:
        """(tile, warps) beside ``fixed`` bytes"""

        def warps_of(tile: int) -> tuple[int, int]:
            """(as many as registers allow, as many as there are)"""
            registers = _registers(problem, rows, terms, tile, team)
            if k_int and v_int and k.bits < 4 and registers <= 124:
                most = 20
            elif by_two:
                most = 8
            else:
                most = 16 if registers <= (150 if v_int else 136) and not fewer else 12 if registers <= 184 else 8
            warps = max(1, min(most, (room - fixed) // (tile * slot + skew + sums(tile)), room // per_warp))
            return most, warps - (warps % 4 if warps >= 8 else warps % team)  # alike on the four schedulers

        # long tiles cost less per token, unless they leave too few warps; bytes gain more than spilled registers cost
        warps = min(12 if v.dim * rows <= 512 else 8, (room - fixed) // (64 * slot + skew) // 4 * 4)
        if longest and warps >= 8:
            return 64, warps
        most, warps = warps_of(32)
        fits = v_int or spills or _registers(problem, rows, terms, 32, team) + 24 * tables <= 176
        if whole and warps == most and fits:
            return 32, warps
        return 16, warps_of(16)[1]

    def beside(lut: int) -> int:
        return -(-(lut + _query_bytes(k, k_columns, k_int, team)) // 128) * 128

    fixed, pair_fixed = beside(max(k.lut_bytes, v.lut_bytes)), beside(max(k.pair_bytes, v.pair_bytes))
    tile, warps = cut(fixed)
    pairs = _pairs(problem) and cut(pair_fixed) == (tile, warps)
    fixed = pair_fixed if pairs else fixed
    shared = max(fixed + warps * (tile * slot + skew + sums(tile)), warps * per_warp)
    defines = {
        "K_KIND": k.kind, "K_BITS": k.bits, "K_SPAN": k.span, "K_SCALE32": int(k.wide_scale),
        "K_INT": int(k_int), "DK": k.dim,
        "V_KIND": v.kind, "V_BITS": v.bits, "V_SPAN": v.span, "V_SCALE32": int(v.wide_scale),
        "V_INT": int(v_int), "DV": v.dim,
        "ROWS": rows, "TERMS": terms, "Q_TYPE": problem.q_type, "SOFTCAP": int(problem.softcap), "MASK": problem.mask,
        "ALIBI": int(problem.alibi), "PAGED": int(problem.page_slots > 0), "SAME_TABLE": int(problem.same_table),
        "LUT_PAIRS": int(pairs), "K_TURN": problem.k_turn, "V_TURN": problem.v_turn, "OUT_TYPE": problem.out_type,
        "TILE": tile, "WARPS": warps, "TEAM": team,
        "K_PITCH": k_pitch, "V_PITCH": v_pitch,
        "K_COPY": problem.k_copy, "V_COPY": problem.v_copy, "K_STRIDE": problem.k_stride, "V_STRIDE": problem.v_stride,
        "K_SCALE_STRIDE": problem.k_scale_stride, "V_SCALE_STRIDE": problem.v_scale_stride,
        "K_SCALE_COPY": problem.k_scale_copy, "V_SCALE_COPY": problem.v_scale_copy, "SHARED": shared,
    }  # fmt: skip
    return Plan(tuple(defines.items()), rows, tile, warps, shared, team)


def _query_bytes(k: Row, k_columns: int, integers: bool, team: int = 1) -> int:
    """Shared memory that q takes as operands: ``Q_BYTES`` in csrc/score.cuh. ``integers``: ``K_INT``."""
    fold = 1 if integers else k.fold
    mine = k.words // team
    vector = _vector(mine // 2, 4 // fold)
    size, words, span = 8 // fold * vector, k.words, k.span or k.dim
    chunks, planes = -(-mine // size), k.planes // fold

    def scale(chunk: int, plane: int, last: bool) -> int:
        word = min((chunk + 1) * size, mine) - 1 if last else chunk * size
        folded = plane + (fold - 1) * planes if last else plane
        return (word if k.kind == F32 else word + folded * words) // span

    if integers:
        step = planes // 4
        pairs, count = [(n, n + 3 * step) for n in range(step)], chunks * vector * step
    else:
        even = range(0, planes - 1, 2)
        agree = all(scale(c, p, False) == scale(c, p + 1, True) for c in range(chunks) for p in even)
        by_plane = planes > 1 and (vector == 1 or (k.kind != F32 and agree))
        pairs = [(p, p + 1) for p in even] if by_plane else [(p, p) for p in range(planes)]
        count = chunks * (vector if by_plane or vector == 1 else vector // 2) * len(pairs)
    most = max(scale(c, b, True) - scale(c, a, False) + 1 for c in range(chunks) for a, b in pairs)
    most = 1 if integers and _gathered(k) else most
    return team * count * most * k_columns * 256


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
