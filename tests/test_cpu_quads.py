"""Few query rows: without a matrix unit a CPU takes rows of K and V as they are, codes or not, in ways of their own."""

from __future__ import annotations

import pytest
import torch
from test_cpu import LEVELS, invented, long, right

from gyrokv import Codec, LayerCache, attend
from gyrokv.backends import cpu
from gyrokv.backends.cpu import calls
from gyrokv.cases import case
from gyrokv.dispatch import describe, explain
from gyrokv.testing import inputs

_NAMES = ("turbo2", "turbo3", "turbo4", "q4_0", "q8_0", "tq5", "tq6", "tq8")  # every width, one plane and two
_SHAPES = ((1, 1, 1), (1, 4, 2), (3, 1, 1), (2, 2, 1), (5, 1, 1), (2, 4, 1), (7, 2, 2), (3, 2, 1))  # 1 to 8 rows
_LENGTHS = (33, 75, 130, 700, 122, 1330)

# each width in each head size as K and as V, with whole and ragged vectors and blocks; each third with a single part of q
QUADS = [
    long(name, _NAMES[(i + 3) % 8], q_len, _LENGTHS[(i + j) % 6], heads, (dim, dim), causal=True, fast=(i + j) % 3 == 2)
    for j, dim in enumerate((32, 64, 96, 128, 192, 256))
    for i, name in enumerate(_NAMES)
    for q_len, *heads in [_SHAPES[(i + j) % 8]]
] + [
    long(k, v, q_len, kv_len, heads, dims, **dict(causal=True) | settings)
    for k, v, q_len, kv_len, heads, dims, settings in (
        ("turbo4", "q8_0", 1, 75, (2, 2), (128, 128), {}),
        ("tq6", "tq5", 2, 2500, (4, 1), (64, 64), {}),
        ("turbo2", "q4_0", 3, 1800, (2, 1), (128, 128), {}),
        ("turbo3", "q8_0", 4, 1500, (2, 1), (64, 64), {}),
        ("turbo4", "tq6", 2, 1500, (2, 1), (64, 64), dict(scale=0.4, batch=12)),  # maxima grow by much, in a split too
        ("q8_0", "turbo3", 3, 1400, (1, 1), (96, 96), dict(scale=0.4, batch=12)),
        ("q8_0", "turbo3", 3, 1400, (1, 1), (128, 128), dict(scale=0.4, batch=12)),
        ("tq6", "tq6", 2, 400, (2, 1), (96, 96), {}),
        ("tq6", "tq6", 4, 290, (2, 2), (320, 320), {}),
        ("turbo3", "q8_0", 2, 1400, (2, 1), (128, 128), dict(scale=0.4, batch=12)),
        ("tq5", "q4_0", 4, 1300, (2, 1), (128, 128), dict(scale=0.4, batch=12)),
        ("turbo4", "tq8.v1", 4, 2100, (1, 1), (576, 512), {}),
        ("tq5.v1", "turbo3", 3, 700, (4, 2), (192, 128), {}),
        ("q8_0", "turbo2", 4, 900, (2, 1), (96, 96), dict(window=70)),
        ("turbo3", "tq6", 2, 400, (4, 1), (192, 192), dict(window=41, sinks=True)),
        ("q4_0", "turbo4", 3, 350, (4, 2), (256, 256), dict(batch=3, starts=True)),
        ("tq8", "q8_0", 5, 290, (2, 2), (96, 96), dict(mask="additive", alibi=8.0)),
        ("turbo4", "turbo3", 2, 500, (2, 1), (80, 80), dict(unquantised=True, first=30, recent=90)),
        ("q4_0", "turbo4", 1, 290, (3, 1), (256, 256), dict(fast=True)),
        ("q4_0", "tq8", 2, 130, (4, 2), (128, 128), dict(fast=True)),
    )
]  # fmt: skip

# passes of five rows, six and eight, with a row of zeros or not, and what is left of 8 and 16
QUADS += [
    long(name, _NAMES[(i + 5) % 8], 1, _LENGTHS[(i + j) % 6], (heads, 1), (dim, dim), causal=True, fast=fast)
    for fast, many in ((False, (5, 6, 7, 13, 14, 15, 22, 23)), (True, (8, 5, 13, 6, 7, 14, 16, 15)))
    for j, dim in enumerate((64, 128, 96, 256, 192))
    for i, name in enumerate(_NAMES)
    for heads in [many[(3 * i + j) % 8]]
] + [  # where even and odd bytes of keys have scales of their own, and both codes of a byte
    long(name, "turbo3", 1, _LENGTHS[i % 6], (heads, 1), (dim, dim), causal=True, fast=fast)
    for name, dim in (("q8_0", 128), ("q4_0", 128), ("q4_0", 256), ("turbo4", 256), ("turbo4", 512))
    for i, (heads, fast) in enumerate([(n, False) for n in (5, 6, 8)] + [(n, True) for n in (3, 4, 5, 6, 8)])
]

_DENSE = ("bf16", "f16", "f32", "fp8_e4m3")
_DIMS = (40, 48, 72, 80, 96, 112, 128)  # whole numbers of vectors, pairs and chunks of them, or not
# 1 to 9, 16 and 17 rows of each
DENSE_CASES = [
    long(_DENSE[(i + j) % 4], _DENSE[(i + 2 * j) % 4], 1, _LENGTHS[(i + j) % 4], (heads, 1), (dim, dim), causal=True)
    for j, dim in enumerate(_DIMS)
    for i, heads in enumerate((1, 2, 3, 4, 5, 7, 8, 9, 16, 17))
] + [  # fp8, whose keys are turned and whose lines of values are kept
    long(
        *("fp8_e4m3", _DENSE[(i + j) % 4])[:: 1 - 2 * (i % 2)], 1, _LENGTHS[(i + j) % 6], (heads, 1), (dim, dim), causal=True
    )
    for j, dim in enumerate((32, 96, 128))
    for i, heads in enumerate((6, 10, 11, 12, 14, 15, 18, 25, 31, 32))
]
# as many query rows as one pass over turned keys takes, and the fewest of bfloat16 that are turned, or one less
DENSE_CASES += [
    long(name, name, 1, _LENGTHS[i % 4], (heads, 1), (dim, dim), causal=True)
    for name, pairs in (
        ("fp8_e4m3", ((13, 128), (13, 192))),
        ("bf16", ((7, 64), (8, 64), (11, 96), (13, 112), (10, 128), (11, 128), (12, 192), (13, 192))),
    )
    for i, (heads, dim) in enumerate(pairs)
]


@LEVELS
@pytest.mark.parametrize("case", QUADS + DENSE_CASES, ids=str)
def test_few_rows(level, case, problem):
    """Where a code's bits are depends on width and head size, and what shares a scale too."""
    data = problem(case)
    right(data, *data.run("cpu"))


@LEVELS
@pytest.mark.parametrize("coding", ["index", "sign_magnitude"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_few_rows_of_every_width(level, bits, coding):
    """Tables that none of our formats has: whole numbers or not, of other widths, groups of 32 and more."""
    for i, dim in enumerate((128, 96, 64, 256, 192, 32)):
        k, v = invented(bits, coding, i % 2 == 0), invented(bits, coding, i % 2 == 1)
        fast = bits < 8 and i % 3 == 0
        for q_len in (1 + i % 4, 5 + i % 4):
            data = inputs(case(k, v, (dim, dim), q_len=q_len, kv_len=150, causal=True, batch=1, fast=fast))
            right(data, *data.run("cpu"))


def largest_sums(bits: int) -> None:
    """AssertionError unless sums of nothing but the largest codes are right."""
    fmt, codec_of = invented(bits, "sign_magnitude", False), lambda: Codec(fmt, 128)
    signs = torch.randn(128, generator=torch.Generator().manual_seed(bits)).sign()
    layer = LayerCache(codec_of(), codec_of(), kv_heads=1)
    layer.append(signs.expand(1, 1, 300, 128), torch.ones(1, 1, 300, 128))
    for heads in (1, 4):
        q = (0.5 * signs).expand(1, heads, 1, 128)
        got, want = (attend(q, layer, backend=backend, return_lse=True) for backend in ("cpu", "torch"))
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=cpu.BOUND, atol=0.0)


@LEVELS
@pytest.mark.parametrize("bits", (4, 5, 6, 8))
def test_sums_of_the_largest_codes(level, bits):
    """Levels of 16 bits times q or weights of as many fill 32 bits with two products."""
    largest_sums(bits)


@LEVELS
@pytest.mark.parametrize("fmt", ["bf16", "f16", "fp8_e4m3"])
def test_few_tokens_of_dense_rows(level, fmt):
    """Tokens that are left over, of pairs and of whole vectors, have a large share of the result."""
    for kv_len in (1, 2, 3, 17):
        for heads in (1, 3, 16):
            data = inputs(long(fmt, fmt, 1, kv_len, (heads, 1), dims=(96, 96)))
            right(data, *data.run("cpu"))


@LEVELS
@pytest.mark.parametrize("fmt", ["turbo2", "turbo4", "tq6", "q8_0"])
def test_rounding_to_8_bits_only_where_it_pays(level, fmt):
    """What is allowed, and would take longer, is not done."""
    layer = LayerCache(Codec(fmt, 128), Codec(fmt, 128), kv_heads=1)
    layer.append(*torch.randn(2, 1, 1, 150, 128))
    for heads in (1, 2, 4):
        q = torch.randn(1, heads, 1, 128)
        loose, exact = (attend(q, layer, fast=fast, backend="cpu", return_lse=True) for fast in (True, False))
        same = all(torch.equal(a, b) for a, b in zip(loose, exact))
        spec = describe(q, layer.view(), fast=True)
        pays = calls.pays(spec, cpu.level())
        assert (", rounding as fast allows" if pays else ", as without fast") in explain(spec)
        if not pays:
            assert same
        elif cpu.level() == "avx512":
            assert not same and (heads > 2 or fmt == "turbo2")
