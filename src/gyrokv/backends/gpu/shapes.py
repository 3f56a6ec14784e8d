"""Which prefill kernel serves a problem, what it is compiled with, and how it is launched: pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ...spec import AttentionSpec
from .calls import Q_TYPES

FEWEST_QUERIES = 33  # below, decode reads every key once for all of them
DTYPES = (torch.float16, torch.bfloat16)


def why_not(spec: AttentionSpec) -> str:
    """Why the decode kernel serves ``spec`` instead; empty if these do."""
    if spec.q_len < FEWEST_QUERIES:
        return f"q_len={spec.q_len} (below {FEWEST_QUERIES}, decode reads each key once for all rows)"
    return "" if spec.dtype in DTYPES else f"dtype={spec.dtype}"


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled with, and its launch. ``dk``, ``dv``: multiples of 64; others are padded by tensor maps."""

    dk: int
    dv: int
    groups: int  # warpgroups that attend in the narrow kernel, whose output fits beside the scores; 0: the wide kernel
    q_type: int
    v_type: int
    out_type: int
    mask: int
    head_mask: bool  # query heads of one KV head have masks of their own
    pack: int  # query heads of a KV head that share a tile, each with ``rows`` queries
    softcap: int  # 0 none; 2: so small that no running maximum is needed
    alibi: bool
    any_scale: bool
    ragged: bool  # sequences have starts or lengths of their own
    pages: tuple[int, int]  # slots of a page of k and v where rows are read from pages, else 0
    clears: bool  # values that a sequence does not have are read
    behind: bool = False  # sequences lie behind each other in q
    boxed: bool = False  # tiles of the mask come by a tensor map
    seeded: bool = False  # products of scores begin with the mask's values
    mapped: bool = False  # the mask has a block map

    @property
    def rows(self) -> int:
        """Queries of a head in a tile."""
        return 64 * (self.groups or 1) // self.pack

    @property
    def threads(self) -> int:
        return 128 * (self.groups + 1) if self.groups else 512

    @property
    def keys(self) -> int:
        """Keys of a block. It does not depend on the kind of mask: block maps have one tile shape."""
        if not self.groups:
            return 128 if self.dv <= 512 and (self.dk <= 512 or not self.mask) else 64
        rows = 64 * self.groups
        room = _SHARED - _BARRIERS - 2 * rows * self.dk - (4 * rows * 128 if self.mask else 0)
        return 128 if self.dv <= 128 and room >= 2 * 256 * (self.dk + self.dv) else 64

    @property
    def boxes(self) -> tuple[int, int, int]:
        """Tokens of a box of q, k and v."""
        sizes = (self.keys, self.keys if self.groups else 32)
        return 8 if self.pack > 1 else 64, *(math.gcd(size, page) for size, page in zip(sizes, self.pages))

    @property
    def _parts(self) -> tuple[int, int, int, int]:
        """Bytes of shared memory: before the rings, of a stage of k and of v, after them."""
        if self.groups:
            return self.groups * 128 * self.dk, 2 * self.keys * self.dk, 2 * self.keys * self.dv, 0
        return 128 * self.dk + 4 * 8192, 128 * self.keys, 64 * ((self.dv // 64 + 1) // 2 * 64), 16 * 80 + 64

    @property
    def apart(self) -> bool:
        """Every row of a tile has its own in the mask: then warpgroups have tiles of it for themselves."""
        return self.head_mask or self.pack == 1

    @property
    def mask_bytes(self) -> int:
        """Of a tile of the mask in shared memory."""
        size = _SIZES[self.mask]
        return (64 if self.apart else self.rows) * max(128, self.keys * size) if size else 0

    @property
    def mask_stages(self) -> int:
        """Two for each part of a block where that leaves the fewest stages of k and v that there may be, in the wide kernel
        one more of k."""
        before, k, v, after = self._parts
        parts = self.groups if self.apart and self.groups else 1
        room = _SHARED - before - after - _BARRIERS - (2 * k + 2 * v if self.groups else 3 * k + 4 * v)
        return max(parts, min(2 * parts, room // self.mask_bytes)) if self.mask else 0

    @property
    def out_bytes(self) -> int:
        """Of the 16-bit output of a tile in the narrow kernel, where two stages of k and v fit beside it. Else 0: results
        go to memory from registers."""
        before, k, v, _ = self._parts
        size = self.groups * 128 * self.dv
        staged = size and not (self.mask or self.behind) and self.out_type != Q_TYPES[torch.float32]
        return size if staged and before + size + 2 * (k + v) + _BARRIERS <= _SHARED else 0

    @property
    def stages(self) -> tuple[int, int]:
        """Stages of k and of v, as many as fit. In the wide kernel each of two warpgroups has its own stages of v, and keeps
        one until it has asked for the products of the next."""
        before, k, v, after = self._parts
        left = _SHARED - before - after - self.out_bytes - self.mask_stages * self.mask_bytes - _BARRIERS
        if self.groups:
            many = min(4, left // (k + v))
            return min(4, (left - many * v) // k), many
        many = 6 if 6 * v + 5 * k <= left else 4
        return min(6, (left - many * v) // k), many

    @property
    def shared(self) -> int:
        (before, k, v, after), (many_k, many_v) = self._parts, self.stages
        masks = self.mask_stages
        rings = many_k * k + many_v * v + masks * self.mask_bytes
        return before + rings + self.out_bytes + after + 8 * (2 + 2 * (many_k + many_v + masks))

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        k, v = self.stages
        own = {"GROUPS": self.groups, "STAGED": int(self.out_bytes > 0)} if self.groups else {}
        names = {
            "DK": self.dk, "DV": self.dv, "KEYS": self.keys, "K_STAGES": k, "V_STAGES": v, "Q_TYPE": self.q_type,
            "V_TYPE": self.v_type, "OUT_TYPE": self.out_type, "PACK": self.pack, "MASK": self.mask,
            "HEAD_MASK": int(self.head_mask), "MASK_STAGES": self.mask_stages, "MASK_BOXES": int(self.boxed),
            "SEEDS": int(self.seeded), "MAPPED": int(self.mapped), "SOFTCAP": self.softcap,
            "ALIBI": int(self.alibi), "ANY_SCALE": int(self.any_scale),
            "RAGGED": int(self.ragged), "BEHIND": int(self.behind), "CLEARS": int(self.clears), "K_PAGED": self.pages[0],
            "V_PAGED": self.pages[1],
        }  # fmt: skip
        return tuple((names | own).items())

    @property
    def kernel(self) -> str:
        return "prefill_narrow" if self.groups else "prefill"


_SHARED, _BARRIERS = 232448, 256  # bytes of a block on compute capability 9.0; at most, of its barriers
_SIZES = (0, 1, 4, 2, 2)  # bytes of a value of each kind of mask
_TILE = {3: 1.0, 2: 0.82}  # time of a tile by its warpgroups, at 64 values; two thirds of the rows do not take two thirds
_NARROW = 256  # values of a head that the narrow kernel takes
_SMALL_SOFTCAP = 60.0  # e^60 times the keys of a sequence is a float32, and e^-60
_SMALL_SCALE = 2.0**-60  # below, scores are multiplied by it first: its inverse might be infinite
_RESERVED = 1024  # bytes of shared memory that a processor has beyond a block's most, and keeps for itself of each block's


@dataclass(frozen=True)
class Portable:
    """The same for the kernels that need nothing of Hopper. ``room``: bytes of shared memory that a block may have."""

    dims: tuple[int, int]
    q_type: int
    v_type: int
    out_type: int
    mask: int
    softcap: bool
    alibi: bool
    any_scale: bool
    ragged: bool
    room: int

    pack = 1

    @cached_property
    def _form(self) -> tuple[tuple[str, int], ...]:
        """The first form of a tile that fills a processor best: eight warps is what there are registers for."""

        def warps(form: tuple[tuple[str, int], ...]) -> int:
            need = self._bytes(dict(form))
            blocks = (self.room + _RESERVED) // (need + _RESERVED)
            return min(8, blocks * _threads(dict(form)) // 32)

        return max(_forms(*self.dims), key=warps)

    @property
    def wide(self) -> bool:
        """True for the kernel whose warps share the rows of a tile."""
        return "ROWS" in dict(self._form)

    @property
    def padded(self) -> tuple[int, int]:
        """Columns of K and V in shared memory."""
        return self._padded(self.wide)

    def _padded(self, wide: bool) -> tuple[int, int]:
        unit = 64 if wide else 16
        return tuple(-(-d // unit) * unit for d in self.dims)

    def _bytes(self, form: dict[str, int]) -> int:
        keys = form["KEYS"]
        if "ROWS" not in form:
            dk, dv = self._padded(False)
            return 32 * form["TALL"] * form["WARPS"] * dk + 2 * form["STAGES"] * keys * (dk + dv)
        dk, dv = self._padded(True)
        rows = form["ROWS"]
        sums = 0 if rows == 128 else _threads(form) * keys // form["ROUNDS"]
        held = max(dk, dv) if form["TURNS"] else dk + dv
        return 2 * rows * dk + 2 * keys * held + 2 * rows * keys + sums + 12 * rows

    @property
    def rows(self) -> int:
        form = dict(self._form)
        return form["ROWS"] if self.wide else 16 * form["TALL"] * form["WARPS"]

    @property
    def keys(self) -> int:
        return dict(self._form)["KEYS"]

    @property
    def threads(self) -> int:
        return _threads(dict(self._form))

    @property
    def shared(self) -> int:
        return self._bytes(dict(self._form))

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        dk, dv = self.padded
        types = ("Q_TYPE", self.q_type), ("V_TYPE", self.v_type), ("OUT_TYPE", self.out_type), ("MASK", self.mask)
        flags = ("SOFTCAP", int(self.softcap)), ("ALIBI", int(self.alibi)), ("ANY_SCALE", int(self.any_scale))
        return ("DK", dk), ("DV", dv), *self._form, *types, *flags, ("RAGGED", int(self.ragged))

    @property
    def kernel(self) -> str:
        return "prefill_portable_wide" if self.wide else "prefill_portable"


def _wide(rows: int, keys: int, rounds: int = 1, turns: int = 0) -> tuple[tuple[str, int], ...]:
    return ("ROWS", rows), ("KEYS", keys), ("ROUNDS", rounds), ("TURNS", turns)


def _tall(tall: int, warps: int, keys: int, stages: int) -> tuple[tuple[str, int], ...]:
    return ("TALL", tall), ("WARPS", warps), ("KEYS", keys), ("STAGES", stages)


def _threads(form: dict[str, int]) -> int:
    return 32 * form["WARPS"] if "WARPS" in form else 128 if form["ROWS"] == 32 else 256


def _forms(dk: int, dv: int) -> list[tuple[tuple[str, int], ...]]:
    """Forms of a tile for rows of K and V of so many values, the fastest first."""
    if dv > 320:
        return [_wide(64, 64), _wide(64, 64, 2), _wide(64, 32), _wide(32, 32, 1, 1)]
    if dv > 256:
        return [_wide(128, 64), _wide(64, 64), _wide(64, 32)]
    if dv > 128:
        return [_wide(128, 64)] * (dv > 192) + [_tall(1, 4, 64, 1), _tall(1, 4, 32, 1)]
    return [_tall(2, 4, 64, 2)] * (dv > 112) + [_tall(2, 4, 64, 1), _tall(2, 4, 32, 1)]


def shape(
    spec: AttentionSpec, dims: tuple[int, int], types: tuple[torch.dtype, ...], mask: int, room: int = 0,
    pages: tuple[int, int] = (0, 0), clears: bool = False, head_mask: bool = False, boxed: bool = False,
    exact: bool = False, mapped: bool = False, processors: int = 0, behind: bool = False,
) -> Shape | Portable:  # fmt: skip
    """The kernel of a problem whose rows have ``dims`` values. ``types``: of k, v and the output; ``mask``: 0 for none;
    ``room``: 0 for Hopper's kernels, otherwise bytes of shared memory that a block of a portable one may have; ``pages``,
    ``clears``, ``head_mask``, ``mapped``, ``behind``: see :class:`Shape`; ``boxed``: a tensor map can describe the mask;
    ``exact``: q times the scale rounds nothing; ``processors``: among which tiles are dealt out, for tiles that suit their
    number. Block maps do not know it: with them, and at 0, there is one tile for problems of a kind.
    """
    ragged = spec.starts or spec.lengths or clears
    if room:
        features = spec.softcap > 0, spec.alibi > 0, spec.scale <= 0, ragged
        return Portable(dims, *(Q_TYPES[t] for t in types), mask, *features, room)
    dk, dv = (-(-d // 64) * 64 for d in dims)
    pack = next(n for n in (4, 2, 1) if spec.groups % n == 0)
    bounded = spec.softcap <= _SMALL_SOFTCAP and types[1] == torch.bfloat16 and mask < 2
    softcap = (2 if bounded else 1) if spec.softcap > 0 else 0
    features = softcap, spec.alibi > 0, spec.scale < _SMALL_SCALE, ragged, pages, clears
    groups = _warpgroups(spec, dk, dv, pack, 0 if mapped else processors)
    made = Shape(dk, dv, groups, *(Q_TYPES[t] for t in types), mask, head_mask and pack > 1, pack, *features)
    seeded = mask == 1 or mask > 1 and exact and not made.alibi
    seeded = seeded and dv == 64 and not (softcap or made.any_scale)
    return replace(made, boxed=boxed and made.keys * _SIZES[mask] >= 128, seeded=seeded, mapped=mapped, behind=behind)


def _warpgroups(spec: AttentionSpec, dk: int, dv: int, pack: int, processors: int) -> int:
    """Of the narrow kernel. Three where registers allow, unless tiles are so few that those of two are done earlier."""
    if max(dk, dv) > _NARROW:
        return 0
    if dv > 64 or not processors:
        return 2 if dv > 64 else 3
    even = not spec.causal or spec.window or spec.kv_len > 2 * spec.q_len

    def time(groups: int) -> float:
        tiles = spec.batch * spec.q_heads // pack * -(-spec.q_len // (64 * groups // pack))
        rounds = -(-tiles // processors) if even else max(1.0, tiles / 2 / processors)  # causal: half of the keys, mostly
        return rounds * _TILE[groups]

    return min(_TILE, key=time)


def tile(spec: AttentionSpec, room: int = 0) -> tuple[int, int]:
    """Queries and keys of a tile."""
    dims = spec.k_format.layout(spec.head_dim)[0], spec.v_format.layout(spec.head_dim_v)[0]
    found = shape(spec, dims, (spec.dtype,) * 3, int(spec.mask is not None), room)
    return found.rows, found.keys
