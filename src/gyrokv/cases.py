"""The problems that we test and time, as data: groups of cases, each group with an intent.

A case is an :class:`AttentionSpec`, which is all that a kernel sees, and how the cache behind it came about. Formats
and head sizes come from the tables, so a new row is tested without a change here. A full product would be some
millions of runs; the groups cross only what can interact. ``testing.py`` turns a case into tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from types import MappingProxyType

import torch

from . import formats
from .errors import FormatError
from .formats import KVFormat
from .layer import ring_capacity
from .spec import HEAD_DIMS, UNEQUAL_HEAD_DIMS, AttentionSpec

HEADS = tuple((d, d) for d in HEAD_DIMS) + UNEQUAL_HEAD_DIMS
ODD_LENGTHS = (1, 7, 31, 33, 63, 65, 113, 1000)
QUERY_LENGTHS = (1, 2, 7, 31, 33, 65)


@dataclass(frozen=True)
class Case:
    """A problem and its history. Prints itself as a test id; equal cases print alike.

    ``offset``: positions before the first key held (a sliding layer has dropped them). ``sliding``: the layer's own
    window, 0 for none. ``first``, ``recent``: tokens kept dense. ``mask_axes``: which of the axes ``bhqk`` of the
    mask are full (``2``: rank 2, ``qk``); ``mask_dtype``, ``masked``: of an additive mask. ``rotation``: replaces the
    formats' own: ``none``, ``hadamard``, ``matrix`` (one) or ``matrices`` (one per KV head). ``factor``: the static
    scale of KV head 0; head h has h + 1 times as much. ``plain``: keys and values are plain tensors, not a cache. ``page``:
    slots of a page of paged rows.
    """

    spec: AttentionSpec
    offset: int = 0
    sliding: int = 0
    first: int = 0
    recent: int = 0
    mask_axes: str = "2"
    mask_dtype: torch.dtype = torch.float32
    masked: float = float("-inf")
    rotation: str = ""
    factor: float = 0.0
    plain: bool = False
    page: int = 16

    @property
    def length(self) -> int:
        """Tokens that the layer has seen; with lengths on the device, their bound."""
        return self.spec.kv_len + self.offset

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence: all the same, or with lengths on the device all different, and short of the bound."""
        cut = self.spec.kv_len // 5 if self.spec.lengths else 0
        return [self.length - cut * (b % 3 + 1) for b in range(self.spec.batch)]

    def on(self, device: str) -> Case:
        """The same case on another device."""
        return replace(self, spec=replace(self.spec, device=device))

    def __str__(self) -> str:
        marks = [f"at{self.offset}"] if self.offset else []
        if self.spec.scale != 1.0 / math.sqrt(self.spec.head_dim):
            marks.append(f"scale{self.spec.scale:g}")
        marks += [f"sliding{self.sliding}"] if self.sliding else []
        marks += [f"dense{self.first}.{self.recent}"] if self.first or self.recent else []
        if self.spec.mask:
            marks.append(f"mask{self.mask_axes}")
        if self.spec.mask == "additive":
            marks.append(f"{str(self.mask_dtype).removeprefix('torch.')}{self.masked:g}")
        marks += [self.rotation] if self.rotation else []
        marks += [f"factor{self.factor:g}"] if self.factor else []
        marks += ["plain"] if self.plain else []
        marks += [f"page{self.page}"] if self.spec.paged else []
        return "-".join([str(self.spec), *marks])


def fits(fmt: KVFormat, head_dim: int) -> bool:
    """True when ``fmt`` can hold heads of ``head_dim`` values."""
    try:
        fmt.layout(head_dim)
    except FormatError:
        return False
    return True


def kinds() -> list[KVFormat]:
    """One row per combination of the columns that a kernel may branch on (width apart): the first of each."""
    rows: dict[tuple, KVFormat] = {}
    for fmt in formats.FORMATS.values():
        key = (fmt.kind, fmt.scale, fmt.scale_dtype, fmt.rotation, fmt.coding, fmt.ties, fmt.whole_head)
        rows.setdefault(key, fmt)
    return list(rows.values())


def case(k: KVFormat | str, v: KVFormat | str, dims: tuple[int, int] = (64, 64), **settings) -> Case:
    """A case from settings of :class:`AttentionSpec` and :class:`Case`; 4 query heads over 2 KV heads, batch 2."""
    own = {name: settings.pop(name) for name in tuple(settings) if name in Case.__dataclass_fields__}
    sizes = dict(batch=2, q_heads=4, kv_heads=2, q_len=1, kv_len=65) | settings
    return Case(AttentionSpec(k, v, *dims, **sizes), **own)


# What a feature needs: settings that make it count. Two features conflict when they set one thing differently.
FEATURES = MappingProxyType(
    {
        "causal": dict(causal=True),
        "window": dict(causal=True, window=17),
        "window_only": dict(window=9),
        "softcap": dict(softcap=4.0),
        "bool_mask": dict(mask="bool"),
        "additive_mask": dict(mask="additive"),
        "alibi": dict(mask="additive", alibi=8.0),
        "block_map": dict(mask="additive", block_map=True),
        "bool_block_map": dict(mask="bool", block_map=True),
        "sinks": dict(sinks=True),
        "starts": dict(starts=True),
        "ring": dict(causal=True, window=32, ring=True, sliding=32, kv_len=64, offset=39),
        "first_dense": dict(unquantised=True, first=5),
        "recent_dense": dict(unquantised=True, recent=11, ring=True),
        "paged": dict(paged=True),
        "lengths": dict(lengths=True),
        "fast": dict(fast=True),
    }
)


def compatible(*names: str) -> dict | None:
    """The settings of several features together, or None when they contradict each other."""
    merged: dict = {}
    for name in names:
        for key, value in FEATURES[name].items():
            if merged.setdefault(key, value) != value:
                return None
    if merged.get("sliding") and merged.get("first"):
        return None  # a sliding layer drops its first tokens
    return merged


def _head_sizes() -> Iterator[Case]:
    """Each format in each head size: one query, and a short prefill of the next size."""
    for i, (fmt, dims) in enumerate(product(formats.FORMATS.values(), HEADS)):
        if fits(fmt, dims[0]) and fits(fmt, dims[1]):
            yield case(fmt, fmt, dims, q_len=(1, 5)[i % 2], kv_len=33, causal=True, batch=1)


def _pairs() -> Iterator[Case]:
    """Each K format with each V format, once."""
    for k, v in product(formats.FORMATS.values(), repeat=2):
        yield case(k, v, (128, 128), q_len=3, kv_len=35, causal=True, batch=1)


def _features() -> Iterator[Case]:
    """Each feature with one format of each kind, for one query and for several."""
    rows = kinds()
    for i, (k, name, q_len) in enumerate(product(rows, FEATURES, (1, 7))):
        settings = FEATURES[name]
        v = rows[(rows.index(k) + i) % len(rows)]
        if settings.get("unquantised") and k.is_dense and v.is_dense:
            continue
        yield case(k, v, **settings, q_len=q_len)


def _feature_pairs() -> Iterator[Case]:
    """Each pair of features that can be used together, on one pair of formats."""
    for a, b in combinations(FEATURES, 2):
        settings = compatible(a, b)
        if settings is not None:
            yield case("q8_0", "turbo4", **settings, q_len=7)


def _lengths() -> Iterator[Case]:
    """Odd numbers of queries and keys, also more queries than keys, and no keys."""
    for q_len, kv_len in product(QUERY_LENGTHS, ODD_LENGTHS):
        yield case("turbo4", "q8_0", q_len=q_len, kv_len=kv_len, causal=q_len % 2 == 1)
    for q_len in (1, 7):
        yield case("turbo4", "q8_0", q_len=q_len, kv_len=0)
        yield case("turbo4", "q8_0", q_len=q_len, kv_len=0, sinks=True)


def _many_tiles() -> Iterator[Case]:
    """Each feature over so many keys that every kernel uses several tiles."""
    for name, settings in FEATURES.items():
        if settings.get("sliding"):
            settings = settings | dict(sliding=2080, window=2080, kv_len=ring_capacity(2080), offset=700)
        elif "window" in settings:
            settings = settings | dict(window=1100, kv_len=4200)
        else:
            settings = settings | dict(kv_len=4200)
        recent = dict(recent=1500) if name == "recent_dense" else {}
        yield case("turbo3", "q4_0", (32, 32), **(settings | recent), q_len=7, batch=1)
        yield case("q8_0", "tq6", (64, 64), **(settings | recent), q_len=1, batch=1)


def _head_groups() -> Iterator[Case]:
    """Query heads per KV head from 1 to 8, and more; several KV heads."""
    for groups, kv_heads in product((*range(1, 9), 12), (1, 3)):
        yield case("turbo3", "q4_0", q_heads=groups * kv_heads, kv_heads=kv_heads, q_len=2, kv_len=31, sinks=True)


def _dtypes() -> Iterator[Case]:
    """Each dtype of q with one format of each kind, and with features that mix dtypes."""
    for fmt, dtype in product(kinds(), (torch.bfloat16, torch.float16, torch.float64)):
        yield case(fmt, fmt, dtype=dtype, q_len=3, causal=True)
    for dtype in (torch.bfloat16, torch.float16):
        yield case("turbo4", "q8_0", dtype=dtype, q_len=3, sinks=True, unquantised=True, first=3, recent=9, ring=True)
        yield case("turbo4", "q8_0", dtype=dtype, q_len=3, mask="additive", mask_dtype=dtype, alibi=8.0)


def _masks() -> Iterator[Case]:
    """Each mask shape, dtype and value that means masked."""
    for axes in ("2", "k", "qk", "hqk", "bqk", "bhqk", "hk", "q", "bh"):
        yield case("q8_0", "turbo3", mask="bool", mask_axes=axes, q_len=7)
        yield case("q8_0", "turbo3", mask="additive", mask_axes=axes, q_len=7, alibi=8.0, q_heads=6)
    lowest = float(torch.finfo(torch.bfloat16).min)
    for dtype, masked in (
        (torch.float32, -65504.0), (torch.float32, lowest), (torch.float16, -65504.0), (torch.float16, float("-inf")),
        (torch.bfloat16, lowest), (torch.bfloat16, float("-inf")),
    ):  # fmt: skip
        for sinks in (False, True):
            yield case("q8_0", "turbo3", mask="additive", mask_dtype=dtype, masked=masked, q_len=7, sinks=sinks)


def _storage() -> Iterator[Case]:
    """Plain tensors, rows of a long chunk that a ring cannot hold, other rotations, static scales, other scales."""
    for name in ("f32", "f16", "bf16"):
        yield case(name, name, plain=True, q_len=7, causal=True, dtype=formats.FORMATS[name].dtype)
    sliding = dict(sliding=20, window=20, causal=True)
    yield case("turbo4", "q8_0", **sliding, q_len=70, kv_len=89, offset=44)
    yield case("turbo4", "q8_0", **sliding, q_len=9, kv_len=50)
    yield case("turbo4", "q8_0", **sliding | dict(window=11), q_len=9, kv_len=64, offset=3, ring=True)
    yield case("turbo4", "q8_0", **sliding, q_len=9, kv_len=64, offset=3, ring=True, recent=30, unquantised=True)
    yield case("turbo4", "q8_0", q_len=9, kv_len=20, first=64, unquantised=True, causal=True)
    yield case("turbo4", "q8_0", q_len=9, kv_len=80, first=30, recent=60, ring=True, unquantised=True, starts=True)
    for fmt, rotation in product(("q4_0", "turbo4", "fp8_e4m3"), ("none", "hadamard", "matrix", "matrices")):
        yield case(
            fmt, fmt, (96, 96), rotation=rotation, q_len=3, causal=True, first=3, recent=5, unquantised=True, ring=True
        )
    yield case("fp8_e4m3", "fp8_e4m3", (192, 128), rotation="hadamard", factor=0.03, q_len=3, causal=True)
    yield case("q8_0", "turbo4", (80, 80), factor=3.0, q_len=3, causal=True)
    for scale in (0.0, -0.2, 0.5):
        yield case("turbo4", "q8_0", scale=scale, q_len=3)
    yield case("turbo3.v2", "tq6.v1", (576, 512), unquantised=True, first=5)  # padded to 640: the longest rows there are


def _pages() -> Iterator[Case]:
    """Each page size with rows of each kind; a single length for one sequence and for all; nothing held yet."""
    for page, fmt in product((16, 32, 64, 256), kinds()):
        yield case(fmt, "turbo4", (128, 128), paged=True, lengths=True, page=page, q_len=3, kv_len=300, causal=True)
    for mask in ("bool_mask", "alibi"):
        yield case("q8_0", "turbo4", **compatible("ring", "lengths", mask), q_len=3)
    for batch, paged in product((1, 5), (False, True)):
        yield case("turbo3", "q8_0", lengths=True, paged=paged, batch=batch, causal=True, q_len=4, kv_len=113)
    yield case("turbo3", "q8_0", lengths=True, causal=True, q_len=4, kv_len=0, sinks=True)
    yield case(
        "q8_0", "turbo4", lengths=True, first=9, recent=20, unquantised=True, ring=True, q_len=40, kv_len=90, causal=True
    )


def _many_queries() -> Iterator[Case]:
    """Enough queries, in 16 bits, for kernels of prefill: each feature alone, and with sequences of their own lengths."""
    extras = (None, "starts", "lengths", "paged")
    for i, (name, extra) in enumerate(product(FEATURES, extras)):
        settings = compatible(name, extra or name)
        sliding = settings.get("sliding")
        if extra == name or (sliding and extra == "starts"):
            continue
        settings = dict(kv_len=150) | settings | dict(lengths=extra in ("lengths", "paged") or name == "lengths")
        if sliding:  # a long chunk: the view holds all that it looks back on
            settings |= dict(kv_len=90, offset=30) if settings["lengths"] else dict(kv_len=71, offset=49, ring=False)
        dtype, dense = ((torch.bfloat16, "bf16"), (torch.float16, "f16"))[i % 2]
        yield case("q8_0", "turbo4", **settings, q_len=40, dtype=dtype)
        if extra and not settings.get("unquantised"):
            yield case(dense, dense, **settings, q_len=40, dtype=dtype)


GROUPS: tuple[Callable[[], Iterable[Case]], ...] = (
    _head_sizes, _pairs, _features, _feature_pairs, _lengths, _many_tiles, _head_groups, _dtypes, _masks, _storage,
    _pages, _many_queries,
)  # fmt: skip


def groups() -> dict[str, list[Case]]:
    """Cases by group; a case that several groups yield stays in the first."""
    seen: set[str] = set()
    table: dict[str, list[Case]] = {}
    for group in GROUPS:
        unique = {str(c): c for c in group()}
        table[group.__name__.strip("_")] = [c for name, c in unique.items() if name not in seen]
        seen.update(unique)
    return table


def cases(device: str = "cpu") -> list[Case]:
    """Every case to test, without duplicates, on ``device``."""
    return [c.on(device) for group in groups().values() for c in group]


def timed(device: str = "cpu", kv_len: int = 4096, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """Cases to time: decode and prefill over ``kv_len`` keys with heads of 128, each format with itself."""
    shape = dict(batch=1, q_heads=32, kv_heads=8, kv_len=kv_len, dtype=dtype, device=device, causal=True)
    rows = formats.FORMATS.values()
    return [case(fmt, fmt, (128, 128), q_len=q_len, **shape) for q_len, fmt in product((1, 512), rows)]
