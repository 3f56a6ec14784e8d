"""The table of formats: published numbers as published, sizes as stored, and rows that check themselves."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import scalar
import torch

from gyrokv import Codec, FormatError, KVFormat, dequantize, quantize
from gyrokv.formats import FORMATS, dense_format, get_format
from gyrokv.rotation import ROTATIONS, hadamard, rotate, unrotate
from gyrokv.spec import HEAD_DIMS

# bytes of 128 values: levels and scales, nothing else
BYTES_128 = {
    "f32": 512, "f16": 256, "bf16": 256, "fp8_e4m3": 128, "q8_0": 136, "q4_0": 72, "turbo2": 34, "turbo3": 50,
    "turbo4": 66, "tq5": 82, "tq6": 98, "tq8": 130, "turbo2.v2": 34, "turbo3.v2": 50, "turbo4.v2": 66, "tq4.v1": 68,
    "tq5.v1": 84, "tq6.v1": 100, "tq8.v1": 132,
}  # fmt: skip


def test_published_tables_are_as_published():
    """A digit that differs makes other systems' caches unreadable."""
    for name, levels in scalar.BOOK["levels"].items():
        assert list(FORMATS[name].levels) == levels
        assert FORMATS[name].step == 1.0
    for name, midpoints in scalar.BOOK["midpoints"].items():
        assert list(FORMATS[name].midpoints) == midpoints
    book = scalar.BOOK["signs"]
    assert ROTATIONS["turbo"].signs == (book["turbo_s1"], book["turbo_s2"])
    assert ROTATIONS["mlx"].signs == (book["mlx_512"], "")
    assert book["mlx_512"].startswith(book["mlx_256"])
    assert FORMATS["tq4.v1"].scale_factor == 1.0


def test_bytes_per_128_values():
    """The size that users are told, against the size that is stored."""
    assert {name: FORMATS[name].bytes_per_head(128) for name in BYTES_128} == BYTES_128
    for f in FORMATS.values():
        assert quantize(torch.ones(128), f).nbytes == f.bytes_per_head(128)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_sizes_are_those_of_the_tensors(fmt):
    """Derived sizes must be the sizes of what an encoder returns, in every head size, padding included."""
    for dim in [d for d in HEAD_DIMS if not (fmt.whole_head and d > 512)]:
        packed = quantize(torch.ones(2, dim), fmt)
        assert packed.words.shape == (2, fmt.words_per_head(dim))
        assert packed.scale.shape == (2, fmt.scales_per_head(dim))
        assert packed.nbytes == 2 * fmt.bytes_per_head(dim)
        padded, group = fmt.layout(dim)
        assert padded >= dim and padded % group == 0
        if not fmt.is_dense:
            code_bytes = packed.words.numel() * 2
            assert code_bytes * 8 == 2 * padded * fmt.bits, "codes take exactly their bits"


def test_padding_is_what_the_description_says():
    """Published turbo rows pad to 128 values; ours pad to 32 and use a smaller group instead."""
    old, ours, tq = FORMATS["turbo4.v2"], FORMATS["turbo4"], FORMATS["tq6.v1"]
    assert [old.layout(d)[0] for d in (64, 80, 96, 128, 192, 256, 320, 576)] == [128, 128, 128, 128, 256, 256, 384, 640]
    assert [ours.layout(d) for d in (32, 40, 64, 80, 96, 192, 320, 576)] == [
        (32, 32), (64, 64), (64, 64), (96, 32), (96, 32), (192, 64), (320, 64), (576, 64)
    ]  # fmt: skip
    assert [tq.layout(d)[0] for d in (32, 64, 96, 192, 320, 512)] == [64, 64, 128, 256, 512, 512]
    assert [tq.scales_per_head(d) for d in (64, 256, 512)] == [1, 1, 2]
    assert FORMATS["tq6"].layout(512) == (512, 512) and FORMATS["tq6"].scales_per_head(512) == 1


def test_digest_covers_every_column():
    """A cache written under another definition of a row must not load; only the error bound is free."""
    row = FORMATS["turbo3.v2"]
    changes = dict(
        name="other", kind="linear", bits=3, element="float32", step=2.0, coding="index", scale="rms",
        scale_dtype="float32", corrected=False, groups=(64,), whole_head=True, scale_span=32, unit=2.0, scale_factor=2.0,
        rotation="mlx", ties="down", levels=tuple(2 * v for v in row.levels), midpoints=(), max_nmse=0.5,
    )  # fmt: skip
    assert changes.keys() == {f.name for f in fields(KVFormat)}
    for column, value in changes.items():
        other = replace(row, **{column: value})
        free = column in ("max_nmse", "bits")  # bits is unchanged here: the levels fix it
        assert (other.digest == row.digest) == free, column
    assert len({f.digest for f in FORMATS.values()}) == len(FORMATS)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("kind", "vector", "kind='vector' of format 'turbo2.v2' is not one of"),
        ("scale", "max", "scale='max'"),
        ("ties", "odd", "ties='odd'"),
        ("coding", "gray", "coding='gray'"),
        ("rotation", "fourier", "rotation='fourier'"),
        ("scale_factor", 0.0, "scale_factor=0.0 .* must be finite and > 0"),
        ("unit", float("nan"), "unit=nan"),
        ("step", float("inf"), "step=inf"),
        ("levels", (1.0, 2.0), "has 2 levels, 2 bits need 4"),
        ("levels", (0.0, 1.0, 1.0, 2.0), "not strictly ascending"),
        ("levels", (-2.0, -1.0, 1.0, 3.0), "not symmetric"),
        ("midpoints", (0.0,), "1 midpoints for 4 levels"),
    ],
)
def test_rows_that_contradict_themselves_are_refused(column, value, message):
    """A row is checked when it is made, so that no kernel meets one that means nothing."""
    with pytest.raises(FormatError, match=message):
        replace(FORMATS["turbo2.v2"], **{column: value})


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(FormatError, match="unknown format 'turbo9'; formats are f32, f16"):
        get_format("turbo9")
    with pytest.raises(FormatError, match="head_dim=0 must be at least 1"):
        FORMATS["q8_0"].layout(0)
    with pytest.raises(FormatError, match="head_dim=576: format tq4.v1 rotates whole heads of at most 512"):
        FORMATS["tq4.v1"].layout(576)
    with pytest.raises(FormatError, match="dtype torch.float64 is no dense format"):
        dense_format(torch.float64)
    assert get_format(FORMATS["q8_0"]) is FORMATS["q8_0"] and str(FORMATS["q8_0"]) == "q8_0"
    assert [dense_format(d).name for d in (torch.float32, torch.float16, torch.bfloat16)] == ["f32", "f16", "bf16"]


# -- rotations


def test_hadamard_is_sylvester():
    """Natural order and no scaling, against the recursive definition."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for size in (1, 2, 4, 8, 64):
        while matrix.shape[0] < size:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        x = torch.randn(3, size, dtype=torch.float64)
        torch.testing.assert_close(hadamard(x), x @ matrix, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="last axis 6 is not a power of two"):
        hadamard(torch.ones(6))


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_are_orthonormal_and_inverted(name):
    """A rotation is paid on q and undone on the output; that is exact only for an orthonormal map."""
    for block in (32, 64, 128):
        eye = torch.eye(2 * block, dtype=torch.float64)
        matrix = rotate(eye, name, block)
        torch.testing.assert_close(matrix @ matrix.mT, eye, rtol=0, atol=1e-12)
        torch.testing.assert_close(unrotate(matrix, name, block), eye, rtol=0, atol=1e-12)
        outside = matrix.clone()
        outside[:block, :block] = outside[block:, block:] = 0.0
        assert not outside.any(), "blocks stay apart"
    scaled = rotate(torch.eye(64), name, 64, 0.5)
    torch.testing.assert_close(scaled @ scaled.mT, torch.eye(64) * 16.0)


def test_dequantize_turns_back():
    """Decoded heads must be near what was encoded, not near its rotation."""
    x = torch.randn(50, 96)
    for name, fmt in FORMATS.items():
        got = dequantize(quantize(x, name), name, 96)
        assert got.shape == x.shape
        assert float((got - x).square().mean()) < 3 * max(fmt.max_nmse, 1e-12), name


# -- codecs


@pytest.mark.parametrize("rotation", [None, "none", "hadamard", "matrix", "matrices"])
@pytest.mark.parametrize("name", ["f32", "q8_0", "turbo4", "tq8"])
def test_codec_keeps_dot_products_and_inverts_its_maps(name, rotation):
    """q . k in the stored space is q . k in the model's; output undoes what encode did; scales are paid once."""
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 96, generator=random) for heads in (6, 3))
    matrix = torch.linalg.qr(torch.randn(3, 96, 96, generator=random)).Q
    chosen = {"matrix": matrix[0], "matrices": matrix}.get(rotation, rotation)
    codec = Codec(name, 96, kv_heads=3, rotation=chosen, scale=torch.tensor([0.5, 2.0, 3.0]))
    stored = codec.store_dense(k, torch.float32)
    assert stored.shape == (2, 3, 5, codec.padded)
    torch.testing.assert_close(codec.output(stored), k, rtol=1e-4, atol=1e-4)
    wide = stored.repeat_interleave(2, 1)
    torch.testing.assert_close(codec.query(q) @ wide.mT, q @ k.repeat_interleave(2, 1).mT, rtol=1e-4, atol=1e-3)
    decoded = codec.output(codec.decode(codec.encode(k)))
    assert float((decoded - k).square().mean()) <= 1.2 * codec.format.max_nmse + 1e-12
    assert not codec.identity and repr(codec).startswith(f"Codec({name}, head_dim=96")


def test_codec_arguments_are_checked():
    """Each message names the argument, its value and the limit."""
    eye = torch.eye(32)
    cases = (
        (dict(rotation="fourier"), "rotation='fourier' is not 'none', 'hadamard' or an orthogonal matrix"),
        (dict(rotation=2 * eye), "not orthogonal: M @ M.T differs from the identity by 3"),
        (dict(rotation=torch.full((32, 32), float("nan"))), "not orthogonal"),
        (dict(rotation=torch.eye(31)), r"rotation has shape \(31, 31\); it must be one of \[\(32, 32\)"),
        (dict(rotation=torch.eye(32).expand(3, 32, 32), kv_heads=2), r"rotation has shape \(3, 32, 32\)"),
        (dict(scale=0.0), "scale=0.0 must be finite and > 0"),
        (dict(scale=float("nan")), "scale=nan must be finite and > 0"),
        (dict(scale=torch.ones(3), kv_heads=2), r"scale has shape \(3,\); it must be a number or \[2\]"),
        (dict(scale=torch.ones(2, 2), kv_heads=2), r"scale has shape \(2, 2\)"),
    )
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            Codec("q8_0", 32, **options)
    with pytest.raises(FormatError, match="unknown format"):
        Codec("q9", 32)
    assert Codec("q8_0", 32).identity and Codec("turbo4", 32, rotation="none").identity


def test_input_is_checked():
    """NaN in one value must not silently poison a group."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(4, 32)
        x[2, 3] = bad
        with pytest.raises(ValueError, match=r"x holds 1 values that are NaN or inf \(of 128\)"):
            quantize(x, "turbo4")
    with pytest.raises(TypeError, match="x has dtype torch.int64; it must be floating point"):
        quantize(torch.ones(32, dtype=torch.int64), "turbo4")
