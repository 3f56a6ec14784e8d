"""The compiled CPU backend beyond what every backend is tested for: each instruction set, long problems, threads, bytes.

``test_backends.py`` runs every case on the best instruction set that this machine has.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import product

import numpy as np
import pytest
import torch
from test_bytes import rows

from gyrokv import BlockMap, Codec, LayerCache, attend
from gyrokv.backends import cpu
from gyrokv.backends.cpu.build import known_levels
from gyrokv.cases import HEADS, case, fits, groups
from gyrokv.dispatch import reasons
from gyrokv.formats import FORMATS, KVFormat
from gyrokv.spec import HEAD_DIMS, features
from gyrokv.testing import Problem, assert_close, assert_matches, inputs

LEVELS = pytest.mark.parametrize("level", known_levels(), indirect=True)
# of each group of cases every n-th, at an offset: n is prime to how a group is counted up, so that all of it is met
STEPS = {
    "head_sizes": (4, 0), "pairs": (17, 3), "features": (7, 0), "feature_pairs": (5, 2), "lengths": (7, 3),
    "many_tiles": (3, 0), "head_groups": (5, 2), "dtypes": (4, 0), "masks": (1, 0), "storage": (3, 0),
    "pages": (5, 0), "many_queries": (11, 4),
}  # fmt: skip
THIN = [c for name, group in groups().items() for c in group[STEPS[name][1] :: STEPS[name][0]] if not cpu.why_not(c.spec)]


def bound(spec) -> float:
    half = spec.dtype == torch.bfloat16 and not spec.v_format.has_levels
    return cpu.FAST_BOUND if spec.fast else cpu.BFLOAT16_BOUND if half else cpu.BOUND


def right(data: Problem, out: torch.Tensor, lse: torch.Tensor) -> None:
    """AssertionError unless the result is right to the bound alone; costs less than ``assert_matches``."""
    for what, got, exact in zip(("out", "lse"), (out, lse), data.exact):
        assert_close(got, exact, exact[None], f"{what} of {data.case}", bound(data.case.spec))


def test_the_thinned_cases_hold_everything():
    """A format, head size or feature that thinning loses would be tested on one instruction set only."""
    specs = [c.spec for c in THIN]
    assert {s.k_format.name for s in specs} == set(FORMATS) == {s.v_format.name for s in specs}
    assert {(s.head_dim, s.head_dim_v) for s in specs} == set(HEADS)
    assert set().union(*(s.uses() for s in specs)) == {f.name for f in features()}
    for name in ("ring", "block_map", "starts", "sinks", "mask", "window", "unquantised"):
        assert {1} < {s.q_len for s in specs if name in s.uses()}
    assert len({s.groups for s in specs}) > 3 and len({c.mask_axes for c in THIN}) > 4


@LEVELS
@pytest.mark.parametrize("case", THIN, ids=str)
def test_each_level_matches_the_reference(level, case, problem):
    """A wrong kernel on machines that lack the newest instructions, which nobody here would see."""
    assert cpu.level() == level and not reasons(cpu, case.spec)
    data = problem(case)
    assert_matches(data, *data.run("cpu"), bound(case.spec))


@LEVELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("v", FORMATS)
def test_the_error_is_what_is_documented(level, v, dtype):
    """Before it is rounded to q's dtype, which hides much: the docstring's bound is what users rely on.

    Where q is bfloat16 and values are multiplied as bfloat16, weights and their sum are rounded to it, as out will be.
    """
    fmt = FORMATS[v]
    rounded = dtype == torch.bfloat16 and not fmt.has_levels and fmt.bits <= 16
    for i, k in enumerate(("q8_0", "turbo4", "bf16")):
        data = inputs(case(k, v, q_len=17, kv_len=300, dtype=dtype, causal=True), seed=i)
        q, view = data.view.k_codec.query(data.q), data.view
        out, lse = cpu.attend(q, view, data.case.spec, None, None, None)
        for what, got, exact in (("out", view.v_codec.output(out), data.exact[0]), ("lse", lse, data.exact[1])):
            allowed = cpu.BOUND
            if rounded:
                allowed = 2e-3 if what == "out" else 2.0**-8 / float(exact.abs().max())
            assert_close(got, exact, exact[None], f"{what} of {data.case}", allowed)


def invented(bits: int, coding: str, whole: bool, groups: tuple[int, ...] = (128, 32)) -> KVFormat:
    """A row that no table has: uneven levels, or ``whole`` numbers, on both sides of zero."""
    half = torch.arange(1, 2 ** (bits - 1) + 1).double()
    if not whole:
        half = torch.rand(len(half), generator=torch.Generator().manual_seed(bits)).add(0.5).cumsum(0).double()
        half = half / half[-1]
    below = half if coding == "sign_magnitude" else half - 1 if whole else 0.75 * half - 0.1 * half[0]
    levels = tuple(torch.cat((-below.flip(0), half)).tolist())
    return KVFormat(
        f"invented{bits}", "codebook", bits, 1.0, coding=coding, scale="absmax", groups=groups, ties="up", levels=levels
    )


@LEVELS
@pytest.mark.parametrize("coding", ["index", "sign_magnitude"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_of_every_width(level, bits, coding):
    """Formats are rows of data, so widths, codings and tables that none of ours has must work, 1 and 7 bits too."""
    for data in invented_problems(bits, coding):
        right(data, *data.run("cpu"))
        layers = [LayerCache(data.view.k_codec, data.view.v_codec, kv_heads=2, batch=2) for _ in range(2)]
        cpu.append(layers[0], data.k, data.v)
        layers[1].append(data.k, data.v)
        assert equal_layers(*layers)


@lru_cache(maxsize=1)
def invented_problems(bits: int, coding: str) -> list[Problem]:
    """Made once for the levels that are tested one after the other."""
    made = []
    for i, dim in enumerate((128, 96, 64, 256, 48, 576)):
        k, v = invented(bits, coding, i % 2 == 0), invented(bits, coding, i % 2 == 1)
        made.append(inputs(case(k, v, (dim, dim), q_len=5, kv_len=150, causal=True)))
    return made


# -- long problems


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


def close(got, want, allowed: float) -> None:
    """``(out, lse)`` agree to ``allowed`` of the largest value."""
    for what, a, b in zip(("out", "lse"), got, want):
        assert_close(a, b.double(), b[None], what, allowed)


def long(k: str, v: str, q_len: int, kv_len: int, heads: tuple[int, int], dims=(64, 64), **settings):
    return case(k, v, dims, q_len=q_len, kv_len=kv_len, q_heads=heads[0], kv_heads=heads[1], **dict(batch=1) | settings)


# several blocks of tokens, several splits of the keys, several blocks of rows, rows of one query in two blocks
LONG = [
    long("q8_0", "turbo4", 1, 5000, (16, 1), causal=True),
    long("turbo3", "q4_0", 1, 4999, (4, 4), batch=2, starts=True, causal=True),
    long("fp8_e4m3", "tq6", 7, 3001, (12, 3), causal=True, sinks=True),
    long("bf16", "bf16", 7, 2900, (4, 1), causal=True, dtype=torch.bfloat16),
    long("tq5", "f16", 70, 2050, (6, 2), dims=(96, 96), causal=True, window=1100),
    long("q4_0", "turbo2", 70, 1300, (16, 1), causal=True, softcap=20.0),
    long("turbo4", "q8_0", 600, 1300, (4, 1), causal=True),
    long("q8_0", "q8_0", 600, 1400, (3, 1), causal=True, window=300),
    long("tq8", "turbo3", 70, 1700, (4, 1), mask="additive", alibi=8.0, block_map=True),
    long("q8_0", "turbo4", 600, 1350, (1, 1), mask="bool", block_map=True),
    long("turbo4", "q8_0", 7, 2500, (4, 2), causal=True, unquantised=True, first=70, recent=700, ring=True),
    long("q8_0", "tq4.v1", 7, 1408, (4, 2), causal=True, window=1370, sliding=1370, ring=True, offset=900),
    long("bf16", "bf16", 1, 2999, (15, 1), dims=(128, 128)),
    long("fp8_e4m3", "fp8_e4m3", 1, 3001, (11, 1), dims=(96, 96), causal=True),
    long("f16", "f16", 2, 1733, (6, 2), dims=(192, 192), causal=True),
]
ROWS = [c for c in LONG if c.spec.q_len == 7 or c.spec.kv_len == 5000]


@LEVELS
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_problems(level, case, problem):
    """What only shows with several blocks, splits or blocks of rows: state that is lost or joined in the wrong way."""
    data = problem(case)
    with threads(1):
        alone = data.run("cpu")
    with threads(5):
        split = data.run("cpu")
    right(data, *alone)
    right(data, *split)
    # weights rounded to bfloat16 relative to another maximum are others
    close(split, alone, bound(case.spec))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_threads_change_no_bit(case, count, backend_here, problem):
    """The order in which threads finish, or which threads they are, may not change a result: nothing could be repeated."""
    backend_here("cpu")
    data = problem(case)
    with threads(count):
        first = data.run("cpu")
        for team in (True, False, False, True):
            with cpu.forced(team=team):
                assert same(data.run("cpu"), first)


@LEVELS
@pytest.mark.parametrize("case", [c for c in LONG + THIN if c.spec.block_map], ids=str)
def test_block_map_changes_no_bit(level, case, problem):
    """A block map only saves work: one that skips a visible key or shows a hidden one changes bits."""
    data = problem(case)
    block_map = BlockMap.build(data.mask, cpu.tile(case.spec))
    if case.spec.kv_len > 1000 and case.spec.q_len > 1:
        assert set(block_map.states.unique().tolist()) == {0, 1, 2}
    run = dict(data.options, backend="cpu", return_lse=True)
    assert same(attend(data.q, data.view, **run, block_map=block_map), attend(data.q, data.view, **run))


PAIRS = [
    ("q8_0", "turbo4"), ("turbo3", "q4_0"), ("turbo2", "tq8"), ("tq5", "fp8_e4m3"), ("bf16", "tq6"), ("f16", "q8_0"),
    ("f32", "turbo4.v2"), ("tq6.v1", "bf16"),
]  # fmt: skip


@LEVELS
@pytest.mark.parametrize(("k", "v"), PAIRS)
def test_a_query_of_a_prefill_equals_the_query_alone(level, k, v, problem):
    """Decode and prefill run the same loop: a query among others and the same query alone agree."""
    data = inputs(long(k, v, 70, 1300, (8, 2), causal=True))
    out, lse = data.run("cpu")
    layer = data.view.owner
    for t in (69, 64, 37, 0):
        layer.truncate(1300 - 69 + t)
        one = attend(data.q[:, :, t : t + 1], layer, backend="cpu", return_lse=True)
        close(one, (out[:, :, t : t + 1], lse[:, :, t : t + 1]), 2 * cpu.BOUND)


@LEVELS
def test_keys_far_below_the_maximum(level):
    """The maximum grows late and by much, in steps, and stays or falls: weights must follow each step."""
    for order in (1.0, -1.0):
        data = inputs(long("f32", "q8_0", 3, 2000, (4, 1), causal=False, scale=1.0))
        ramp = torch.linspace(-60.0, 60.0, 2000)[:, None] * order
        k = torch.zeros(1, 1, 2000, 64)
        k[..., :1] = ramp
        q = torch.zeros(1, 4, 3, 64)
        q[..., 0] = torch.tensor([1.0, 0.1, -0.5])
        layer = LayerCache(Codec("f32", 64), data.view.v_codec, kv_heads=1)
        view = layer.append(k, data.v)
        got = attend(q, view, causal=False, scale=1.0, backend="cpu", return_lse=True)
        exact = attend(q.double(), view, causal=False, scale=1.0, backend="reference", return_lse=True)
        for what, a, b in zip(("out", "lse"), got, exact):
            assert_close(a, b.double(), b.double()[None], what, cpu.BOUND)


def test_two_callers_at_once(backend_here):
    """A server attends from several threads of its own: what one call keeps may not be another's."""
    backend_here("cpu")
    problems = [inputs(c) for c in LONG[:4]]
    for team in (True, False):
        with threads(3), cpu.forced(team=team), ThreadPoolExecutor(4) as pool:
            want = [data.run("cpu") for data in problems]
            for _ in range(3):
                # each Python thread has its own number of threads for torch, and splits depend on it
                got = pool.map(lambda data: (torch.set_num_threads(3), data.run("cpu"))[1], problems * 2)
                assert all(same(a, b) for a, b in zip(got, want * 2))


@pytest.mark.parametrize("shift", [2**31 - 40, 2**33 + 17])
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_positions_beyond_32_bits(case, shift, backend_here, problem):
    """Only differences of positions count, so a stream that is billions of tokens old gives the same bits."""
    backend_here("cpu")
    data = problem(case)
    view = data.view
    moved = [replace(s, base=s.base + shift, first=s.first + shift, stop=s.stop + shift) for s in view.segments]
    later = replace(
        view, segments=tuple(moved), first=view.first + shift, length=view.length + shift, owner=None,
        starts=None if view.starts is None else view.starts + shift,
    )  # fmt: skip
    run = dict(data.options, backend="cpu", return_lse=True)
    assert same(attend(data.q, later, **run), attend(data.q, view, **run))


# -- append: the bytes


def hard_rows(dim: int, dtype: torch.dtype, count: int, seed: int = 0) -> torch.Tensor:
    """``[2, 2, count, dim]``: the hard rows of ``test_bytes.py`` and random ones of several sizes, as ``dtype``."""
    random = torch.Generator().manual_seed(seed)
    hard = torch.from_numpy(rows(dim)).nan_to_num()
    x = torch.randn(2, 2, count, dim, generator=random) * 10.0 ** torch.randint(-3, 3, (2, 2, count, 1), generator=random)
    flat = x.view(-1, dim)
    n = min(len(hard), len(flat))
    flat[torch.randperm(len(flat), generator=random)[:n]] = hard[:n]
    return x.double().clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """``x`` with other strides; memory between its rows holds NaN."""
    if how == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "part of wider rows":
        return torch.cat((x, torch.full_like(x, torch.nan)), -1)[..., : x.shape[3]]
    if how == "every other value":
        return torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[..., ::2]
    if how == "one sequence twice":
        return x[:1].expand_as(x)
    return x


HOW = ("plain", "tokens first", "part of wider rows", "every other value", "one sequence twice")


def equal_layers(a: LayerCache, b: LayerCache) -> bool:
    (mine, about), (other, about_other) = a.state(), b.state()
    assert about == about_other and mine.keys() == other.keys()
    return all(bits(mine[name]) == bits(other[name]) for name in mine)


def bits(t: torch.Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b""


@LEVELS
@pytest.mark.parametrize("fmt", FORMATS)
def test_append_writes_the_bytes_of_the_definition(level, fmt):
    """A bit that differs makes a cache that another machine or another backend would have written differently."""
    sizes = [d for d in HEAD_DIMS if fits(FORMATS[fmt], d)]
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    for i, dim in enumerate(sizes):
        dtype, how = dtypes[i % 4 if i % 5 else 0], HOW[i % len(HOW)]
        x = strided(hard_rows(dim, dtype, 19, i), how)
        layers = [LayerCache(Codec(fmt, dim), Codec(fmt, dim), kv_heads=2, batch=2) for _ in range(2)]
        cpu.append(layers[0], x, x)
        layers[1].append(x, x)
        assert equal_layers(*layers), f"{fmt} of {dim}, {dtype}, {how}"


@LEVELS
@pytest.mark.parametrize("fmt", ["q8_0", "q4_0", "turbo3", "tq5", "tq6.v1", "fp8_e4m3"])
def test_append_in_any_dtype_and_chunking(level, fmt):
    """Bytes may not depend on how tokens arrive, in which dtype's strides, or which lane of a vector they fall into."""
    for dtype, how in product((torch.float32, torch.float16, torch.bfloat16), HOW):
        x = strided(hard_rows(96, dtype, 75), how)
        whole = LayerCache(Codec(fmt, 96), Codec("q8_0", 96), kv_heads=2, batch=2)
        whole.append(x, x)
        parts = LayerCache(Codec(fmt, 96), Codec("q8_0", 96), kv_heads=2, batch=2, capacity=3)
        at = 0
        for count in (1, 2, 3, 15, 17, 37):
            cpu.append(parts, x[:, :, at : at + count], x[:, :, at : at + count])
            at += count
        assert at == 75 and equal_layers(whole, parts), f"{fmt}, {dtype}, {how}"


@LEVELS
@pytest.mark.parametrize("settings", [
    dict(window=20), dict(sinks=4, recent=9), dict(window=40, recent=50), dict(capacity=64), dict(capacity=200, sinks=70),
], ids=str)  # fmt: skip
def test_append_to_every_kind_of_layer(level, settings):
    """Rings that wrap, long chunks that they cannot hold, dense copies, growth: encoding in place must miss none."""
    layers = [
        LayerCache(Codec("turbo4", 80), Codec("q8_0", 80), kv_heads=2, batch=2, dtype=torch.bfloat16, **settings)
        for _ in range(2)
    ]
    for i, count in enumerate((1, 30, 1, 5, 40, 64, 1, 90, 3, 3)):
        x = hard_rows(80, torch.bfloat16, count, i)
        views = cpu.append(layers[0], x, x.flip(-1)), layers[1].append(x, x.flip(-1))
        assert equal_layers(*layers)
        assert all(bits(a.decode(side)) == bits(b.decode(side)) for a, b in [views] for side in "kv")
        if i == 4:
            for layer in layers:
                layer.truncate(layer.length - 1)


@LEVELS
@pytest.mark.parametrize("name", ["matrix", "matrices", "hadamard", "none"])
def test_append_through_linear_maps(level, name):
    """A codec's own rotation and static scales come before the encoder, in every dtype."""
    random = torch.Generator().manual_seed(1)
    shape = {"matrix": (96, 96), "matrices": (2, 96, 96)}.get(name)
    rotation = torch.linalg.qr(torch.randn(shape, generator=random).double()).Q.float() if shape else name
    for fmt, dtype in product(("turbo3", "q4_0", "fp8_e4m3"), (torch.float32, torch.bfloat16)):
        x = hard_rows(96, dtype, 33).clamp(-1e3, 1e3)
        codec = Codec(fmt, 96, kv_heads=2, rotation=rotation, scale=torch.tensor([0.5, 3.0]))
        layers = [LayerCache(codec, codec, kv_heads=2, batch=2) for _ in range(2)]
        cpu.append(layers[0], x, x)
        layers[1].append(x, x)
        assert equal_layers(*layers)


def test_hard_rows_are_hard():
    """The tests of bytes would show little with rows that no rule treats apart."""
    x = hard_rows(64, torch.float32, 19)
    size = x.abs().amax(-1).flatten().numpy()
    assert (size == 0).any() and (size > 1e29).any() and ((size > 0) & (size < 1e-10)).any()
    assert np.isfinite(size).all()
