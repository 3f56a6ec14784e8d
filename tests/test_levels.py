"""Are the literal tables the best ones? Derived again from the normal density, and measured."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from gyrokv import quantize
from gyrokv.formats import FORMATS
from gyrokv.levels import derive, lloyd_max, mse, to_grid
from gyrokv.quant import decode
from gyrokv.rotation import rotate

# mean squared error on N(0, 1) of the optimal table of each width
OPTIMUM = {2: 0.1175, 3: 0.03454, 4: 0.00950, 6: 6.44e-4, 8: 4.12e-5}
OURS = {f.bits: f for f in FORMATS.values() if f.kind == "codebook" and f.corrected and not f.midpoints}
derived = cache(derive)


def positive(fmt) -> torch.Tensor:
    """The positive half of a table in units of the standard deviation, float64."""
    half = torch.tensor(fmt.levels[len(fmt.levels) // 2 :], dtype=torch.float64)
    return half * fmt.step / fmt.unit


def test_the_rows_of_this_file():
    assert sorted(OURS) == [2, 3, 4, 5, 6, 8]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, pytest.param(8, marks=pytest.mark.slow)])
def test_literals_are_derived(bits):
    """A literal that differs has another origin than the stated one."""
    integers, step, error, optimum = derived(bits)
    fmt = OURS[bits]
    assert list(fmt.levels[2 ** (bits - 1) :]) == integers
    assert fmt.step / fmt.unit == pytest.approx(step, rel=1e-12)
    assert error <= optimum * 1.002


@pytest.mark.parametrize("bits", sorted(OURS))
def test_tables_are_symmetric_integers_of_their_width(bits):
    """Integer kernels need int8 up to 4 bits and int16 above; sign and magnitude need symmetry."""
    levels = OURS[bits].levels
    assert all(isinstance(v, int) for v in levels)
    assert max(levels) <= (127 if bits <= 4 else 32767)
    assert [-v for v in reversed(levels)] == list(levels)


@pytest.mark.parametrize("bits", sorted(OURS))
def test_error_is_the_optimum(bits):
    """At most 0.2 per cent above the best table there is, in closed form."""
    error = mse(positive(OURS[bits]))
    if bits in OPTIMUM:
        assert error <= OPTIMUM[bits] * 1.002
    if bits < 8:
        assert error <= mse(lloyd_max(bits)) * 1.002


@pytest.mark.parametrize("bits", sorted(OURS))
def test_error_on_samples(bits):
    """The closed form is not taken on trust: nearest levels of a million samples, with the boundaries in use."""
    fmt = OURS[bits]
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(5))
    values = fmt.level_values / fmt.unit
    index = torch.bucketize(x, fmt.boundaries / fmt.unit, right=True)
    measured = float((values[index].double() - x.double()).square().mean())
    # tables of many levels spend error in the tails, where samples are few
    assert measured == pytest.approx(mse(positive(fmt)), rel=0.01)


@pytest.mark.parametrize("bits", sorted(OURS))
def test_error_through_the_encoder(bits):
    """With the best scale per group, long normal rows come out as well as the table promises."""
    fmt = OURS[bits]
    x = torch.randn(6000, 128, generator=torch.Generator().manual_seed(6))
    stored = rotate(x, fmt.rotation, 128).double()
    got = decode(quantize(x, fmt), fmt, 128).double()
    best = (stored * got).sum(-1, keepdim=True) / got.square().sum(-1, keepdim=True)
    error = float((best * got - stored).square().sum() / stored.square().sum())
    # groups of 128 that fit their own scale are a little easier than the endless source, never harder
    optimum = mse(positive(fmt))
    assert optimum * 0.95 < error <= optimum * 1.002


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_lloyd_max_is_a_fixed_point(bits):
    """Optimal: each level is the mean of its cell, so moving all levels by a thousandth must cost something."""
    levels = lloyd_max(bits)
    assert mse(levels * 1.001) > mse(levels) < mse(levels * 0.999)


def test_published_4_bit_table_is_as_bad_as_documented():
    """Why there is a table of our own: twice the error for the same bytes."""
    fmt = FORMATS["turbo4.v2"]
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(5))
    index = torch.bucketize(x, fmt.boundaries / fmt.unit, right=True)
    error = float(((fmt.level_values / fmt.unit)[index] - x).square().mean())
    assert error == pytest.approx(0.0203, rel=0.02)


def test_grid_uses_most_of_the_integers():
    integers, step, error = to_grid(lloyd_max(3), 127, 2000)
    assert 95 <= max(integers) <= 127 and integers == sorted(integers)
    assert error == mse(torch.tensor(integers, dtype=torch.float64) * step)
