"""Foreign bytes at the border: every layout byte by byte from its description, round trips, and refusals."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from gyrokv import FormatError, quantize
from gyrokv.formats import FORMATS
from gyrokv.packing import from_sign_magnitude, unpack
from gyrokv.wire import WIRE, export_rows, get_layout, import_rows

BLOCKS = {name: row for name, row in WIRE.items() if row.block}
ROWS = {name: row for name, row in WIRE.items() if not row.block}


def encoded(layout: str, dim: int, rows: int = 3):
    """(packed, indices into the ascending table, scales) of a few heads in the layout's format."""
    fmt = FORMATS[WIRE[layout].format]
    random = torch.Generator().manual_seed(2)
    packed = quantize(torch.randn(rows, dim, generator=random) * 3.0, fmt)
    index = unpack(packed.words, fmt.bits)
    index = from_sign_magnitude(index, fmt.bits) if fmt.coding == "sign_magnitude" else index
    return packed, index.tolist(), packed.scale.tolist()


def half(x: float) -> bytes:
    return struct.pack("<e", x)


def low_planes(codes: list[int]) -> bytes:
    """Code j in byte j / 4 at bits 2 * (j mod 4), low two bits only."""
    out = bytearray(len(codes) // 4)
    for j, c in enumerate(codes):
        out[j // 4] |= (c & 3) << 2 * (j % 4)
    return bytes(out)


def high_plane(codes: list[int]) -> bytes:
    """Bit 2 of code j in byte j / 8, bit j mod 8."""
    out = bytearray(len(codes) // 8)
    for j, c in enumerate(codes):
        out[j // 8] |= (c >> 2 & 1) << j % 8
    return bytes(out)


def nibbles(codes: list[int]) -> bytes:
    """Even values in the low nibble."""
    return bytes(codes[j] | codes[j + 1] << 4 for j in range(0, len(codes), 2))


def block_bytes(layout: str, codes: list[int], scale: float) -> bytes:
    """One block as its publication lays it out."""
    if layout == "q8_0":
        return half(scale) + struct.pack("<32b", *(c - 128 for c in codes))
    if layout == "q4_0":
        return half(scale) + bytes(codes[j] | codes[j + 16] << 4 for j in range(16))
    if layout.startswith("turbo2"):
        return half(scale) + low_planes(codes)
    if layout.startswith("turbo3"):
        return half(scale) + low_planes(codes) + high_plane(codes)
    return half(scale) + half(0.0) + nibbles(codes)


SIZES = {
    "q8_0": 34,
    "q4_0": 18,
    "turbo2.v1": 10,
    "turbo3.v1": 14,
    "turbo4.v1": 68,
    "turbo2.v2": 34,
    "turbo3.v2": 50,
    "turbo4.v2": 68,
}


def test_every_block_layout_is_described_here():
    assert SIZES.keys() == BLOCKS.keys()
    assert [WIRE[n].block for n in SIZES] == [32, 32, 32, 32, 128, 128, 128, 128]


@pytest.mark.parametrize("layout", BLOCKS)
@pytest.mark.parametrize("dim", [128, 256])
def test_blocks_byte_by_byte(layout, dim):
    """A published cache is these bytes; one bit elsewhere is another cache."""
    packed, index, scales = encoded(layout, dim)
    (blocks,) = export_rows(packed, layout, dim)
    size = WIRE[layout].block
    span = dim // len(scales[0])
    for row in range(len(index)):
        want = b"".join(
            block_bytes(layout, index[row][start : start + size], scales[row][start // span])
            for start in range(0, dim, size)
        )
        assert bytes(blocks[row].tolist()) == want
    assert blocks.shape == (3, dim // size * SIZES[layout])
    assert blocks.dtype == torch.uint8


@pytest.mark.parametrize("layout", ["turbo2.v1", "turbo3.v1"])
def test_first_version_repeats_the_norm(layout):
    """Four blocks of 32 values hold one rotated group of 128: all carry its norm."""
    packed, _, scales = encoded(layout, 128, rows=1)
    (blocks,) = export_rows(packed, layout, 128)
    heads = blocks.reshape(4, -1)[:, :2].contiguous().view(torch.float16)
    assert heads.flatten().tolist() == [scales[0][0]] * 4


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("dim", [256, 512])
def test_tq_rows_byte_by_byte(layout, dim):
    """Whole rows of codes, norms apart: one per row, two for 512 values."""
    packed, index, scales = encoded(layout, dim)
    codes, norms = export_rows(packed, layout, dim)
    for row in range(3):
        assert bytes(codes[row].tolist()) == (nibbles(index[row]) if layout == "tq4.v1" else bytes(index[row]))
    assert norms.shape == ((3,) if dim == 256 else (3, 2)) and norms.dtype == torch.float32
    assert np.array_equal(norms.reshape(3, -1).numpy(), np.array(scales, dtype=np.float32))


@pytest.mark.parametrize("layout", WIRE)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_round_trip(layout, dim):
    """What is exported and imported again is the same cache, to the bit, whatever axes come before."""
    fmt = FORMATS[WIRE[layout].format]
    x = torch.randn(2, 3, 4, dim) * torch.tensor([1e-3, 1.0, 100.0, 0.0])[:, None]
    packed = quantize(x, fmt)
    back = import_rows(export_rows(packed, layout, dim), layout, dim)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(packed, back))


def test_versions_are_not_mixed_up():
    """Codes are only meaningful with their table: the layout fixes the format."""
    assert {n: r.format for n, r in WIRE.items() if n != r.format} == {
        "turbo2.v1": "turbo2.v2", "turbo3.v1": "turbo3.v2", "turbo4.v1": "turbo4.v2"
    }  # fmt: skip
    with pytest.raises(FormatError, match="unknown wire layout 'turbo4'; layouts are q8_0"):
        get_layout("turbo4")


def test_export_refuses_other_rows():
    packed = quantize(torch.randn(2, 128), "q8_0")
    with pytest.raises(FormatError, match="rows have 64 words; head_dim=128 in q4_0 has 32"):
        export_rows(packed, "q4_0", 128)
    with pytest.raises(FormatError, match="rows have 64 words; head_dim=256 in q8_0 has 128"):
        export_rows(packed, "q8_0", 256)


def broken(layout: str, dim: int, change) -> tuple:
    parts = [p.clone() for p in export_rows(encoded(layout, dim)[0], layout, dim)]
    return change(parts)


def put(part: int, place: tuple, value):
    def change(parts):
        parts[part][place] = value
        return tuple(parts)

    return change


@pytest.mark.parametrize(
    ("layout", "dim", "change", "message"),
    [
        ("q8_0", 64, lambda p: (p[0][:, :-1],), "blocks of wire layout q8_0 have 67 bytes; head_dim=64 has 2 x 34"),
        ("q8_0", 64, lambda p: (p[0], p[0]), "wire layout q8_0 has 1 tensors; got 2"),
        ("q8_0", 64, lambda p: (p[0].int(),), "blocks of wire layout q8_0 have dtype torch.int32; they must be torch.uint8"),
        ("q8_0", 64, put(0, (1, 7), 0x80), "a q8_0 code is -128; codes run from -127 to 127"),
        ("q8_0", 64, put(0, (0, 1), 0x7C), "NaN or inf|same finite norm"),
        ("q4_0", 64, put(0, (0, 1), 0x7F), "NaN or inf|same finite norm"),
        ("turbo3.v1", 128, put(0, (0, 15), 0x11), "the blocks of one group must carry the same finite norm"),
        ("turbo4.v2", 128, put(0, (2, 1), 0xFE), "NaN or inf|same finite norm"),
        ("tq4.v1", 256, lambda p: (p[0],), "wire layout tq4.v1 has 2 tensors; got 1"),
        ("tq6.v1", 256, put(0, (0, 9), 64), "codes of wire layout tq6.v1 run up to 64; 6 bits end at 63"),
        ("tq5.v1", 256, put(0, (0, 9), 200), "run up to 200; 5 bits end at 31"),
        ("tq4.v1", 256, lambda p: (p[0][:, :-1], p[1]), "codes of wire layout tq4.v1 have 127 bytes; 256 values need 128"),
        ("tq8.v1", 256, lambda p: (p[0], p[1].half()), "norms of wire layout tq8.v1 have dtype torch.float16"),
        ("tq8.v1", 512, lambda p: (p[0], p[1][:, 0]), "norms of wire layout tq8.v1 have shape"),
        ("tq8.v1", 256, put(1, (0,), float("nan")), "scales of wire layout tq8.v1 hold NaN or inf"),
        ("tq8.v1", 256, put(1, (0,), float("inf")), "scales of wire layout tq8.v1 hold NaN or inf"),
    ],
)
def test_import_refuses_what_cannot_be_such_rows(layout, dim, change, message):
    """Foreign bytes are input: a wrong length, width or scale is an error here, not a wrong result later."""
    with pytest.raises(FormatError, match=message):
        import_rows(broken(layout, dim, change), layout, dim)


def test_the_width_is_part_of_the_format():
    """6-bit codes cannot be read as 8-bit ones: the packed rows differ in size, and the bytes name their layout."""
    codes, norms = export_rows(encoded("tq8.v1", 256)[0], "tq8.v1", 256)
    assert int(codes.max()) > 63
    with pytest.raises(FormatError, match="6 bits end at 63"):
        import_rows((codes, norms), "tq6.v1", 256)
    packed = quantize(torch.randn(1, 256), "tq6.v1")
    with pytest.raises(FormatError, match="rows have 96 words; head_dim=256 in tq8.v1 has 128"):
        export_rows(packed, "tq8.v1", 256)
