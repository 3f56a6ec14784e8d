"""Codes in words: the stated rule bit by bit, round trips, and the true width."""

from __future__ import annotations

import pytest
import scalar
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrokv.packing import fields, from_sign_magnitude, pack, to_sign_magnitude, unpack

WIDTHS = range(1, 9)


@st.composite
def codes(draw) -> tuple[int, torch.Tensor]:
    bits = draw(st.sampled_from(list(WIDTHS)))
    dim = 16 * draw(st.integers(1, 9))
    rows = draw(st.integers(0, 3))
    values = draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * dim, max_size=rows * dim))
    return bits, torch.tensor(values, dtype=torch.uint8).reshape(rows, dim)


@given(codes())
@settings(deadline=None, max_examples=80)
def test_round_trip(sample):
    """Whatever the codes, unpacking gives them back, and a row takes exactly its bits."""
    bits, x = sample
    words = pack(x, bits)
    assert words.dtype == torch.int16 and words.shape == (x.shape[0], x.shape[1] * bits // 16)
    assert torch.equal(unpack(words, bits), x)


@given(codes())
@settings(deadline=None, max_examples=80)
def test_planes_are_where_the_rule_says(sample):
    """Kernels read planes as slices of the head: a code in another place is another key."""
    bits, x = sample
    for row, words in zip(x, pack(x, bits)):
        assert [w % 2**16 for w in words.tolist()] == scalar.words(row.tolist(), bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_word_survives(bits):
    """All 2^16 words, the sign bit included, come back."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).repeat(bits).reshape(-1, 16 * bits)
    assert torch.equal(pack(unpack(words, bits), bits), words)


def test_the_example_of_the_module():
    """4 bits, D = 8, word 1 holds codes 1, 3, 5, 7 from the low bits up."""
    words = pack(torch.arange(8, dtype=torch.uint8), 4)
    assert [hex(w % 2**16) for w in words.tolist()] == ["0x6420", "0x7531"]


@pytest.mark.parametrize("bits", WIDTHS)
def test_sign_magnitude(bits):
    """Half a table serves both signs: the top bit is the sign, the rest counts outwards from zero."""
    index = torch.arange(2**bits, dtype=torch.uint8)
    code = to_sign_magnitude(index, bits)
    assert code.tolist() == [scalar.sign_magnitude(i, bits) for i in range(2**bits)]
    assert torch.equal(from_sign_magnitude(code, bits), index)
    levels = torch.arange(2**bits) - (2**bits - 1) / 2
    half = 2 ** (bits - 1)
    magnitude = levels[index.long()].abs()
    assert torch.equal((code % half).float() + 0.5, magnitude)
    assert torch.equal(code >= half, levels < 0)


def test_errors():
    with pytest.raises(ValueError, match="bits=0 must be between 1 and 8"):
        fields(0)
    with pytest.raises(ValueError, match="bits=9"):
        fields(9)
    with pytest.raises(ValueError, match="last axis 24 is not a multiple of 16, which a 1-bit field needs"):
        pack(torch.zeros(24, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="last axis of 1 words holds no whole number of 3-bit codes"):
        unpack(torch.zeros(1, dtype=torch.int16), 3)
    assert fields(7) == (4, 2, 1) and fields(8) == (8,)
