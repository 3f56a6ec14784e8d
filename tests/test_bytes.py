"""Are the bytes exact? Encoders against a scalar implementation of the published description, and against hashes."""

from __future__ import annotations

import hashlib
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scalar
import torch
from scalar import F

from gyrokv import Codec, dequantize, quantize
from gyrokv.cases import HEADS, fits
from gyrokv.formats import FORMATS
from gyrokv.packing import from_sign_magnitude, unpack
from gyrokv.quant import Packed, decode

GOLDEN = Path(__file__).parent / "data" / "golden.json"
HEAD_SIZES = sorted({d for dims in HEADS for d in dims})
SIDES = [(f, d) for f, d in product(FORMATS.values(), HEAD_SIZES) if fits(f, d)]
IDS = [f"{f}-{d}" for f, d in SIDES]


def integers(count: int, seed: int) -> np.ndarray:
    """``count`` int64 from -32768 to 32767 by a linear congruential generator: the same on every machine."""
    state, out = seed * 2654435761 % 2**32, np.empty(count, dtype=np.int64)
    for i in range(count):
        state = (1664525 * state + 1013904223) % 2**32
        out[i] = (state >> 16) - 32768
    return out


def rows(dim: int) -> np.ndarray:
    """Heads ``[n, dim]`` float32: bell-shaped, skewed, tied, empty, tiny, huge and sparse ones."""
    raw = integers(4 * dim * 4, dim)
    bell = (raw.reshape(4, 4, dim).sum(1) / 16384.0).astype(F)
    bell[1, dim // 3] *= F(50)
    bell[2] *= F(3e-5)
    whole = (raw[: 2 * dim].reshape(2, dim) % 255 - 127).astype(F)
    ties = whole / F(2)  # against 127: q8_0 codes that end in one half
    ties[0, ::32], ties[1, ::32] = F(127), F(-127)
    eighths = (raw[:dim] % 16 - 8).astype(F) / F(2)  # against -8: q4_0 codes that end in one half
    eighths[::32] = F(-8)
    tied = np.full(dim, F(1.5))  # the largest magnitude with either sign: the first one counts
    tied[1::2] = F(-1.5)
    hot = np.zeros((6, dim), dtype=F)
    hot[0, 0], hot[1, dim - 1], hot[2, dim // 2] = F(1), F(-3), F(1e30)
    hot[3, [0, 1]], hot[4, [2, dim - 2]] = F(1), F(0.25)  # two alike: rotated values are exactly zero
    hot[5, :5] = F(1e-11)
    flat = np.stack([np.full(dim, F(v)) for v in (0.0, -0.0, 1.0, 1e-11, -1e-40, 3e-38, 6e4, -7e4, 1e30)])
    decimals = (raw[:dim] / 1000.0).astype(F) * F(1e-12)
    return np.concatenate([bell, ties, eighths[None], tied[None], -tied[None], hot, flat, decimals[None]]).astype(F)


def expected(fmt, x: np.ndarray) -> tuple[list[int], np.ndarray]:
    """(words as unsigned integers, scales) of one head, by the scalar implementation."""
    values = [F(v) for v in x]
    padded, _ = fmt.layout(len(values))
    if fmt.is_dense:
        convert = {"float32": F, "float16": scalar.half, "bfloat16": scalar.bf16}[fmt.element]
        return [convert(v) for v in values], np.zeros(0)
    if fmt.kind == "float8":
        codes = [scalar.fp8(v) for v in scalar.padded_to(values, padded)]
        return scalar.words(codes, 8), np.zeros(0)
    codes, scales = scalar.encode(fmt, values)
    if fmt.coding == "sign_magnitude":
        codes = [scalar.sign_magnitude(c, fmt.bits) for c in codes]
    return scalar.words(codes, fmt.bits), np.array(scales, dtype=fmt.scale_dtype)


def bits(t: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor as unsigned integers."""
    t = t.contiguous()
    return t.view({2: torch.int16, 4: torch.int32}[t.element_size()]).numpy()


@pytest.mark.parametrize(("fmt", "dim"), SIDES, ids=IDS)
def test_encoder_is_the_description(fmt, dim):
    """A difference is a format of our own under a published name: caches could not be exchanged."""
    x = rows(dim)
    packed = Codec(fmt, dim).encode(torch.from_numpy(x)[None, None])
    assert torch.equal(quantize(torch.from_numpy(x), fmt).words, packed.words[0, 0])
    for i, row in enumerate(x):
        words, scales = expected(fmt, row)
        kind = {"float32": F, "float16": np.float16, "bfloat16": np.uint16}.get(fmt.element, np.uint16)
        assert bits(packed.words[0, 0, i]).tobytes() == np.array(words, dtype=kind).tobytes(), f"words of row {i}"
        if fmt.has_levels:
            assert bits(packed.scale[0, 0, i]).tobytes() == scales.tobytes(), f"scales of row {i}"


@pytest.mark.parametrize(
    ("fmt", "dim"), [s for s in SIDES if s[0].has_levels], ids=[i for s, i in zip(SIDES, IDS) if s[0].has_levels]
)
def test_decoder_is_the_description(fmt, dim):
    """Each code times its scale, in the published order of operations, to the bit."""
    packed = quantize(torch.from_numpy(rows(dim)[:7]), fmt)
    got = decode(packed, fmt, dim)
    codes = unpack(packed.words, fmt.bits)
    index = from_sign_magnitude(codes, fmt.bits) if fmt.coding == "sign_magnitude" else codes
    for i in range(7):
        want = scalar.decode(fmt, index[i].tolist(), packed.scale[i].numpy().tolist(), dim)
        assert bits(got[i]).tobytes() == np.array(want, dtype=F).tobytes()


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.has_levels], ids=str)
def test_every_code_has_its_value(fmt):
    """Code points walked one by one: each stored code decodes to its own level, at scales 1 and 2.5."""
    dim = 256
    codes = [i % 2**fmt.bits for i in range(dim)]
    words = torch.tensor(scalar.words(codes, fmt.bits), dtype=torch.int32).to(torch.int16)
    index = codes
    if fmt.coding == "sign_magnitude":
        index = [next(j for j in range(2**fmt.bits) if scalar.sign_magnitude(j, fmt.bits) == c) for c in codes]
    for scale in (1.0, 2.5):
        scales = torch.full((fmt.scales_per_head(dim),), scale, dtype=getattr(torch, fmt.scale_dtype))
        got = decode(Packed(words, scales), fmt, dim)
        assert got.tolist() == scalar.decode(fmt, index, scales.tolist(), dim)


def test_every_fp8_code_has_its_value():
    """All 254 finite codes survive decoding and encoding, and halfway values go to the even code."""
    codes = [c for c in range(256) if c & 0x7F != 0x7F]
    values = torch.tensor([scalar.fp8_value(c & 0x7F) * (-1 if c & 0x80 else 1) for c in codes] + [0.0, 0.0])
    packed = quantize(values, "fp8_e4m3")
    assert dequantize(packed, "fp8_e4m3", 256).tolist() == values.tolist()
    positive = torch.tensor([scalar.fp8_value(c) for c in range(0x7F)])
    halves = (positive[1:] + positive[:-1]) / 2
    stored = unpack(quantize(torch.nn.functional.pad(halves, (0, 2)), "fp8_e4m3").words, 8)
    assert all(int(c) % 2 == 0 for c in stored[:126])


def half_of(fmt) -> int:
    return 2 ** (fmt.bits - 1)


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.kind == "codebook"], ids=str)
def test_zero_groups_and_ties_at_zero(fmt):
    """A zero of a symmetric table is on its middle boundary: it takes code 2, 4, 8 where ties go up and one less where
    they go down. In any table it takes the level that the boundaries give it, and no scale."""
    x = torch.zeros(2, 128)
    x[1, [0, 1]] = 1.0  # at least half of the values, rotated or not, are exactly zero
    packed = quantize(x, fmt)
    index = unpack(packed.words, fmt.bits)
    middle = scalar.count_below(F(0), fmt.boundaries.tolist(), fmt.ties == "up")
    if fmt.coding == "sign_magnitude":
        index = from_sign_magnitude(index, fmt.bits)
        assert middle == (half_of(fmt) if fmt.ties == "up" else half_of(fmt) - 1)
    assert (index[0] == middle).all() and (packed.scale[0] == 0).all()
    assert int((index[1] == middle).sum()) >= 64
    assert (dequantize(packed, fmt, 128)[0] == 0).all()


def test_saturation_is_at_the_largest_half():
    """A norm beyond half precision would be infinity, and infinity times a level poisons the row."""
    for fmt in FORMATS.values():
        if fmt.has_levels and fmt.scale_dtype == "float16":
            for size in (1e30, 3.4e38):
                packed = quantize(torch.full((1, 128), size), fmt)
                assert (packed.scale.abs() == 65504).all() and decode(packed, fmt, 128).isfinite().all(), fmt.name
    for name, largest in (("f16", 65504.0), ("fp8_e4m3", 448.0), ("bf16", torch.finfo(torch.bfloat16).max)):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            top = torch.finfo(dtype).max
            got = dequantize(quantize(torch.tensor([[top, -top] * 16], dtype=dtype), name), name, 32)
            assert got.tolist() == [[largest, -largest] * 16], (name, dtype)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_the_input_does_not_matter(fmt, dtype):
    """Values that both dtypes hold must give the same bytes."""
    x = torch.from_numpy(rows(128)[:2]).to(torch.bfloat16).to(torch.float16).to(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(quantize(x.float(), fmt), quantize(x.to(dtype), fmt)))


def golden(fmt, dim: int) -> str:
    x = torch.from_numpy((integers(24 * dim, 7).reshape(24, dim) / 4096.0).astype(F))
    x[:, 5] *= 9.0
    packed = quantize(x, fmt)
    total = hashlib.sha256(str([tuple(t.shape) for t in packed]).encode())
    for t in packed:
        if t.numel():
            total.update(bits(t).astype(f"<i{t.element_size()}").tobytes())
    return total.hexdigest()


@pytest.mark.parametrize(("name", "hashes"), json.loads(GOLDEN.read_text()).items())
def test_bytes_are_those_of_the_first_release(name, hashes):
    """Saved caches hold these bytes. A change needs a new name, not a new hash. (A row gets its hashes on release.)"""
    assert {dim: golden(FORMATS[name], int(dim)) for dim in hashes} == hashes


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_encoding_on_a_device(fmt, device):
    """A device may round a value next to a boundary otherwise: at most 1 code in 10 000, by at most one level."""
    dim, count = 128, 400
    random = torch.Generator().manual_seed(3)
    x = torch.randn(count, dim, generator=random) * (1 + 20 * (torch.arange(dim) == 9))
    here, there = quantize(x, fmt), quantize(x.to(device), fmt).map(lambda t: t.cpu())
    if fmt.is_dense:
        assert torch.equal(here.words, there.words)
        return
    a, b = (unpack(p.words, fmt.bits).int() for p in (here, there))
    if fmt.coding == "sign_magnitude":
        a, b = (from_sign_magnitude(c.to(torch.uint8), fmt.bits).int() for c in (a, b))
    assert float((a != b).float().mean()) <= 1e-4 and int((a - b).abs().max()) <= 1
    if fmt.scale_dtype == "float16" and here.scale.numel():
        assert int((here.scale.view(torch.int16) - there.scale.view(torch.int16)).abs().max()) <= 1
    elif here.scale.numel():
        torch.testing.assert_close(there.scale, here.scale, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.max_nmse > 0], ids=str)
def test_error_is_what_the_row_says(fmt):
    """Good enough, from both sides: a bound that is too loose would hide a regression."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 128, generator=random)
    error = (dequantize(quantize(x, fmt), fmt, 128).double() - x.double()).square().mean() / x.double().square().mean()
    assert 0.8 * fmt.max_nmse < float(error) <= fmt.max_nmse


def test_dense_rows_of_the_right_dtype_are_copied_bit_for_bit():
    x = torch.randn(3, 40)
    assert torch.equal(quantize(x, "f32").words, x) and quantize(x, "f32").scale.shape == (3, 0)


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.corrected], ids=str)
def test_corrected_scales_keep_the_norm(fmt):
    """Attention is a weighted sum of values: a norm that shrinks with every group would shrink the output."""
    x = torch.from_numpy(rows(128)[:1])
    got = decode(quantize(x, fmt), fmt, 128)
    assert float(got.norm()) == pytest.approx(float(x.norm()), rel=1e-3)
