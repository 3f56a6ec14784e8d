"""Many query rows: a matrix unit takes them 32 at a time, in a way of its own, with rows of any format as bfloat16 terms."""

from __future__ import annotations

import pytest
import torch
from test_cpu import LEVELS, invented, long, right, same, threads

from gyrokv import FORMATS, BlockMap, Codec, LayerCache, attend
from gyrokv.backends import cpu
from gyrokv.testing import Problem, assert_close, inputs

# ragged numbers of rows and tokens, several windows of rows, every feature
WIDE = [
    long(k, v, q_len, kv_len, heads, dims, **dict(causal=True, dtype=torch.bfloat16) | settings)
    for k, v, q_len, kv_len, heads, dims, settings in (
        ("bf16", "bf16", 17, 17, (1, 1), (32, 32), {}),
        ("bf16", "fp8_e4m3", 19, 113, (2, 1), (40, 40), dict(batch=2)),
        ("fp8_e4m3", "bf16", 33, 1000, (3, 1), (80, 80), dict(window=300)),
        ("bf16", "bf16", 150, 1000, (4, 2), (128, 128), {}),
        ("bf16", "bf16", 600, 1300, (4, 1), (64, 64), {}),
        ("bf16", "bf16", 40, 2600, (16, 16), (32, 32), {}),
        ("bf16", "bf16", 20, 4200, (16, 1), (576, 512), {}),
        ("bf16", "bf16", 150, 700, (4, 1), (192, 128), dict(sinks=True, softcap=20.0)),
        ("bf16", "bf16", 65, 900, (4, 2), (256, 256), dict(mask="additive", alibi=8.0)),
        ("fp8_e4m3", "fp8_e4m3", 65, 900, (2, 2), (96, 96), dict(mask="bool", causal=False)),
        ("bf16", "bf16", 260, 1350, (1, 1), (64, 64), dict(mask="bool", block_map=True, causal=False)),
        ("bf16", "bf16", 40, 500, (4, 1), (72, 72), dict(batch=3, starts=True, scale=-0.2)),
        ("q8_0", "fp8_e4m3", 66, 1500, (4, 2), (112, 112), dict(unquantised=True, first=70, recent=400, rotation="none")),
        ("bf16", "bf16", 40, 1370, (4, 2), (64, 64), dict(window=1370, sliding=1370, ring=True, offset=900)),
    )
]  # fmt: skip

# what bfloat16 holds in two terms: each format as K and as V, every feature, q in either type, several segments and windows
_NAMES = list(FORMATS)
TERMS = [
    long(k, v, q_len, kv_len, heads, dims, **dict(causal=True) | settings)
    for k, v, q_len, kv_len, heads, dims, settings in (
        *((k, v, 33, 300, (2, 1), (128, 128), dict(dtype=dtype, fast=fast))
          for k, v, dtype, fast in zip(_NAMES, _NAMES[1:] + _NAMES[:1], [torch.float32, torch.bfloat16] * len(_NAMES),
                                       [False, False, True] * len(_NAMES))),
        ("turbo4", "q8_0", 70, 700, (4, 1), (256, 256), {}),
        ("q8_0", "turbo3", 300, 600, (4, 1), (96, 96), dict(dtype=torch.bfloat16)),
        ("tq6", "tq8", 65, 450, (4, 2), (64, 64), dict(window=300)),
        ("f16", "f16", 66, 290, (2, 2), (40, 40), dict(sinks=True, softcap=20.0)),
        ("q8_0", "q8_0", 65, 300, (4, 2), (192, 128), dict(mask="additive", alibi=8.0)),
        ("q4_0", "bf16", 65, 300, (2, 2), (576, 512), dict(mask="bool", causal=False)),
        ("bf16", "q8_0", 40, 290, (4, 1), (72, 72), dict(batch=3, starts=True, scale=-0.2)),
        ("q8_0", "turbo4", 66, 900, (4, 2), (128, 128), dict(unquantised=True, first=70, recent=400)),
    )
]  # fmt: skip


def rounded(data: Problem, out: torch.Tensor, lse: torch.Tensor) -> None:
    """AssertionError unless the result is right where weights and their sum are rounded to bfloat16, as out will be."""
    sizes = data.exact[1][torch.isfinite(data.exact[1])].abs()
    for what, got, exact, allowed in zip(("out", "lse"), (out, lse), data.exact, (2e-3, 2.0**-8 / float(sizes.max()))):
        assert_close(got, exact, exact[None], f"{what} of {data.case}", allowed)


@LEVELS
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_many_rows_of_bfloat16(level, case, problem):
    """Nothing else tests rows that are masked in part, blocks, windows of rows and segments there."""
    data = problem(case)
    for count in (1, 5):
        with threads(count):
            rounded(data, *data.run("cpu"))


@LEVELS
@pytest.mark.parametrize("case", TERMS, ids=str)
def test_many_rows_of_terms(level, case, problem):
    """Terms are made from codes in an order of their own, with scales of their own per token and group."""
    data = problem(case)
    right(data, *data.run("cpu"))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("coding", ["index", "sign_magnitude"])
def test_terms_of_every_width(bits, coding, backend_here):
    """Widths and tables that none of our formats has, in one plane and in two."""
    backend_here("cpu")
    for i, dim in enumerate((128, 96, 64)):
        k, v = invented(bits, coding, i % 2 == 0), invented(bits, coding, i % 2 == 1)
        data = inputs(long(k, v, 40, 150, (2, 1), (dim, dim), causal=True))
        right(data, *data.run("cpu"))


@pytest.mark.parametrize("case", WIDE[3:7] + TERMS[-8:-6], ids=str)
def test_threads_change_no_bit(case, backend_here, problem):
    """Windows and splits are chosen by sizes: who computes them may not change a result."""
    backend_here("cpu")
    data = problem(case)
    for count in (1, 3):
        with threads(count):
            first = data.run("cpu")
            for team in (True, False):
                with cpu.forced(team=team):
                    assert same(data.run("cpu"), first)


@pytest.mark.parametrize("case", [c for c in WIDE if c.spec.block_map], ids=str)
def test_block_map_changes_no_bit(case, backend_here, problem):
    """A block map that skips a visible key or shows a hidden one changes bits."""
    backend_here("cpu")
    data = problem(case)
    run = dict(data.options, backend="cpu", return_lse=True)
    block_map = BlockMap.build(data.mask, cpu.tile(case.spec))
    assert same(attend(data.q, data.view, **run, block_map=block_map), attend(data.q, data.view, **run))


@pytest.mark.parametrize("order", [1.0, -1.0])
def test_keys_far_below_the_maximum(order, backend_here):
    """The maximum grows late and by much, past what a weight can hold, or falls: squares must be done again."""
    backend_here("cpu")
    q = torch.zeros(1, 1, 40, 64, dtype=torch.bfloat16)
    q[..., 0] = torch.linspace(-1.0, 1.0, 40)
    k = torch.zeros(1, 1, 2000, 64, dtype=torch.bfloat16)
    k[0, 0, :, 0] = torch.linspace(-300.0, 300.0, 2000) * order
    v = torch.randn(1, 1, 2000, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    view = LayerCache(Codec("bf16", 64), Codec("bf16", 64), kv_heads=1).append(k, v)
    run = dict(causal=False, scale=1.0, return_lse=True)
    got, exact = attend(q, view, **run, backend="cpu"), attend(q.double(), view, **run, backend="reference")
    for what, a, b, allowed in zip(("out", "lse"), got, exact, (2e-3, 1e-4)):
        assert_close(a, b.double(), b.double()[None], what, allowed)
