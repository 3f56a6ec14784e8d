"""Rotated rows of 16-bit values by tensor cores (csrc/turned.cuh): the table of levels, the codes, planted mistakes."""

from __future__ import annotations

import math
from itertools import product

import gpu_rows
import pytest
import torch
from test_cpu import bits, hard_rows

from gyrokv import Codec
from gyrokv.backends.gpu import encode, nvrtc, turned
from gyrokv.cases import fits
from gyrokv.formats import FORMATS, KVFormat
from gyrokv.quant import Packed
from gyrokv.spec import HEAD_DIMS

DEVICE = "cuda"
TURNED = [f for f in FORMATS.values() if encode.is_turned(Codec(f, 128), torch.bfloat16)]
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _where_there_is_a_gpu(request, backend_here):
    if request.node.get_closest_marker("gpu"):
        backend_here("gpu")


def encoded(x: torch.Tensor, codec: Codec, many: bool = False) -> Packed:
    """Rows of ``x [B, H, T, D]`` by the kernel of few tokens, or of ``many``; K and V alike."""
    stores = [encode.empty_rows(x, codec).map(torch.zeros_like) for _ in "kv"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_many", lambda device: 0 if many else 2**60)
        encode.append(x, x, (codec, codec), tuple(stores), encode.Place())
    assert all(bits(a.cpu()) == bits(b.cpu()) for a, b in zip(*stores))
    return stores[0]


def random_rows(dim: int, dtype: torch.dtype, count: int, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """``[1, 2, count, dim]``: of several sizes, a third of them with some values far larger than the others."""
    random = torch.Generator(device).manual_seed(seed)
    x = torch.randn(1, 2, count, dim, generator=random, device=device)
    x[:, :, ::3] *= (2.0 * torch.randn(dim, generator=random, device=device)).exp()
    x[:, :, 1::3, dim // 3] *= 100.0
    x *= 10.0 ** torch.randint(-3, 4, (1, 2, count, 1), generator=random, device=device)
    return x.clamp(-6e4, 6e4).to(dtype)


# -- without a GPU


def test_the_formats_that_are_turned():
    """One more or less is meant, or it is a mistake: bytes of these may differ from the definition's."""
    names = {f.name for f in TURNED}
    assert names == {"turbo2", "turbo3", "turbo4", "turbo2.v2", "turbo3.v2", "turbo4.v2", "tq5", "tq6", "tq8"}


def index_of(z: torch.Tensor, found: turned.Steps, begin: float) -> torch.Tensor:
    """What the kernel computes of z, step by step, with the rounding of float32."""
    scale, most = (float(torch.tensor(x, dtype=torch.float32)) for x in (found.scale, 3.9999998))
    x = (z.double() * scale + begin).float().clamp(0, 1)
    if not len(found.table):
        return (x.double() * most).floor().long()
    m = (x.double() / 2 + 0.5).float() if found.clamped else x
    bits = m.view(torch.int32).long()
    cell = ((m.double() - 0.5) * found.near).round().long() if found.near else bits >> 16 & 0xFF
    return (bits + found.table[cell].long()) % 2**32 >> 24


@pytest.mark.parametrize("group", [32, 128, 512])
@pytest.mark.parametrize("fmt", TURNED, ids=str)
def test_steps_lead_to_the_nearest_level(fmt: KVFormat, group: int):
    """At boundaries, beside them and anywhere up to the largest."""
    unit = fmt.unit if fmt.scale == "l2" else 1.0
    most = math.sqrt(group) * unit
    found = turned.steps(fmt, most)
    edges = fmt.boundaries[fmt.boundaries.abs() < most]
    random = torch.rand(80000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = torch.cat((edges, edges * (1 + 2e-6), edges * (1 - 2e-6), random * most, random * unit, torch.tensor([most, -most])))
    for begin in found.begin:
        off = index_of(z, found, begin) != torch.bucketize(z, fmt.boundaries, right=True)
        distance = (z[:, None] - fmt.boundaries).abs().min(1).values
        assert float(distance[off].max() if off.any() else 0.0) <= gpu_rows.NEAR / 2 * unit, begin
    zero, middle = torch.zeros(1), 2 ** (fmt.bits - 1)
    assert [int(index_of(zero, found, begin)) for begin in found.begin] == [middle - 1, middle], "0, and 0 that is flipped"


def test_rows_of_other_shapes_are_not_turned():
    """Ties that go down, scales that are not corrected, 32-bit values, own rotations: to the other kernel."""
    for name in ("tq4.v1", "tq8.v1", "q8_0", "q4_0", "bf16", "fp8_e4m3"):
        assert not encode.is_turned(Codec(name, 128), torch.bfloat16), name
    assert not encode.is_turned(Codec("turbo4", 128), torch.float32)
    assert not encode.is_turned(Codec("turbo4", 128, rotation="hadamard"), torch.bfloat16)


# -- the bytes, on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", TURNED, ids=str)
def test_codes_differ_at_boundaries_alone(fmt: KVFormat):
    """Hard rows and random ones at every head size: nothing but what lies on a boundary may be another level."""
    for i, dim in enumerate(d for d in HEAD_DIMS if fits(fmt, d)):
        codec, dtype = Codec(fmt, dim), DTYPES[i % 2]
        for x in (hard_rows(dim, dtype, 75, i), random_rows(dim, dtype, 65, seed=i)):
            got = encoded(x.to(DEVICE), codec, many=i % 3 != 0)
            gpu_rows.differences(got.map(torch.Tensor.cpu), codec.encode(x), x, codec)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", TURNED, ids=str)
def test_share_of_codes_that_differ(fmt: KVFormat):
    """Of more than 10**7 codes; rare means rare."""
    dims = [d for d in (128, 96, 256, 512) if fits(fmt, d)]
    for dim, dtype in product(dims, DTYPES):
        codec = Codec(fmt, dim)
        x = random_rows(dim, dtype, 1_600_000 // dim, DEVICE, dim)
        found = gpu_rows.differences(encoded(x, codec, many=True), codec.encode(x), x, codec)
        assert found.codes <= gpu_rows.SHARE and found.scales <= gpu_rows.SCALES, (dim, dtype, found)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", TURNED, ids=str)
def test_bytes_depend_on_no_other_row(fmt: KVFormat):
    """A token alone, a few, as many as a warp takes at once, by either kernel: the same bytes, whatever lies beside it."""
    for dim in (d for d in (128, 96, 256, 512) if fits(fmt, d)):
        codec, x = Codec(fmt, dim), random_rows(dim, torch.bfloat16, 67, DEVICE)
        whole = encoded(x, codec, many=True)
        for start, stop in ((0, 1), (13, 14), (20, 29), (5, 67), (0, 67)):
            part = encoded(x[:, :, start:stop].contiguous(), codec)
            assert all(bits(a.cpu()) == bits(b[:, :, start:stop].cpu()) for a, b in zip(part, whole)), (dim, start, stop)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", TURNED, ids=str)
def test_processors_with_less_shared_memory(fmt: KVFormat, monkeypatch):
    """Fewer warps of a block, or fewer copies of tables: the same bytes."""
    for dim in (d for d in (128, 256, 512) if fits(fmt, d)):
        codec, x = Codec(fmt, dim), random_rows(dim, torch.bfloat16, 67, DEVICE)
        whole = encoded(x, codec, many=True)
        monkeypatch.setattr(encode, "_room", lambda device: 99 * 1024)
        part = encoded(x, codec, many=True)
        monkeypatch.undo()
        assert all(bits(a.cpu()) == bits(b.cpu()) for a, b in zip(part, whole)), dim


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", TURNED, ids=str)
def test_zeros_and_what_is_tiny_or_huge(fmt: KVFormat):
    """Norms below the smallest, subnormal numbers, norms whose square overflows."""
    for dim, dtype in product((128, 256), DTYPES):
        codec = Codec(fmt, dim)
        x = torch.randn(1, 2, 12, dim, generator=torch.Generator().manual_seed(0))
        x[:, :, 0], x[:, :, 1], x[:, :, 2] = 0.0, -0.0, 1e-30
        x[:, :, 3] *= 6e-8
        x[:, :, 4], x[:, :, 5, 7] = 65504.0, 65504.0
        x[:, :, 6] *= 1e-5
        x[:, :, 7] *= 1e4
        x[:, :, 8, 1::2], x[:, :, 9, : dim - 1] = 0.0, 0.0
        x = x.clamp(-65504.0, 65504.0).to(dtype)
        gpu_rows.differences(encoded(x.to(DEVICE), codec).map(torch.Tensor.cpu), codec.encode(x), x, codec)
    x = torch.full((1, 2, 3, 128), 3e38).to(torch.bfloat16)
    x[:, :, 1, ::2] = 1e30
    rows = encoded(x.to(DEVICE), Codec(fmt, 128)).map(torch.Tensor.cpu)
    assert bool((rows.scale == 65504.0).all()), "a norm that overflows saturates"


# -- planted mistakes: none makes a value larger than its table is long

FAULTS = [
    ("the rows g and g + 8 of the transform alike", "minus + i % 2 & 1) << 31", "minus & 1) << 31"),
    ("two bits of an index that change places", "lane >> 2 & (lane & 3 |", "lane >> 3 & (lane & 3 |"),
    ("signs before the transform of the next chunk", "CHUNKS + q) * 4 + threadIdx", "CHUNKS + (q ^ 1)) * 4 + threadIdx"),
    ("signs before the transform of the first piece", "((part % SLICES + half()) *", "(half() *"),
    ("signs before the transform of the first half", "((part % SLICES + half()) *", "(part % SLICES *"),
    ("signs after the transform of other values", "(tables + T::FLIPS_AT) + g;", "(tables + T::FLIPS_AT) + 2 * t;"),
    ("no differences of halves of a chunk", "u[2] ^ MINUSES, u[3] ^ MINUSES", "u[2], u[3]"),
    ("no signs before in wide groups", "u[0] ^= sign.x, u[1] ^= sign.y", "u[0] ^= sign.x"),
    ("chunks of the piece before", "(chunk(0, q) * 8 + i) * 128", "((chunk(0, q) ^ 4) * 8 + i) * 128"),
    ("pieces that are not turned", "butterfly<OWN, CHUNKS>(y)", "butterfly<2 * OWN, CHUNKS>(y)"),
    ("folds that are not turned", "butterfly<FOLD, CHUNKS>(y)", "butterfly<CHUNKS, CHUNKS>(y)"),
    ("halves that are not turned", "a = a + b, b = difference", "a = a + b"),
    ("no differences of chunks", "y[q + h][i] = a - b", "y[q + h][i] = a + b"),
    ("squares of one piece twice", "own = take(0, 2 * t + second)", "own += take(0, 2 * t + second)"),
    ("squares of one half twice", "own = other = own + other", "own = other = 2.0f * own"),
    ("squares of one piece's levels", "take(1, lane % 4", "take(0, lane % 4"),
    ("a norm that is too large", "own *= (float)T::FOLDS", "own *= 1.01f * T::FOLDS"),
    ("norms of the other row", "{second ? other : own, second", "{second ? own : other, second"),
    ("values that are too large", "factor[k] = root[k] * C::reach()", "factor[k] = root[k] * 1.01f * C::reach()"),
    ("the next cell", "8388608.0f - C::NEAR / 2", "8388609.0f - C::NEAR / 2"),
    ("a cell of other bits", "prmt(bits, own, 0x5524)", "prmt(bits, own, 0x5514)"),
    ("clamped values that are too large", "__fmaf_rn(m, 0.5f, 0.5f)", "__fmaf_rn(m, 0.501f, 0.499f)"),
    ("four levels that are not even", "3.9999998f", "3.9f"),
    ("squares of odd levels", "square_of(u32 index) const {", "square_of(u32 index) const { index |= 1 << 8 * INDEX_AT;"),
    ("a root of few bits", "__fmaf_rn(-x * root, root, 1.0f), root)", "__fmaf_rn(-x * root, root, 1.0001f), root)"),
    ("zeros with a sign", "factor[k], from[i])", "factor[k], C::begin())"),
    ("groups that are not quite zero", "norm[k] > TINY * TINY &&", "norm[k] > 0.0f &&"),
    ("magnitudes that count from the other end", "return x ^ below<C>(x & HALF * ONES) ^", "return x ^"),
    ("squares of four levels of eight", "__dp4a((int)high, (int)high, __dp4a", "__dp4a((int)low, (int)low, __dp4a"),
    ("scales of the other row", "+ lane / 4 % 2;", "+ 1 - lane / 4 % 2;"),
    ("values in another order", "prmt(x[2], x[3], PAIR), 0x5410)", "prmt(x[3], x[2], PAIR), 0x5410)"),
    ("planes that change places", "WIDTH * (plane % (PLANES / 2))", "WIDTH * (plane % 2)"),
    ("planes of the values 16 on elsewhere", "(16 - WIDTH * STEP / 2)", "(16 - WIDTH * STEP)"),
    ("words of the values 16 on", "(at + 32, {words[k][1]})", "(at + 32, {words[k][0]})"),
    ("a word without the codes of another lane", "keep |= __shfl_xor_sync(~0u, give, 16)", "__shfl_xor_sync(~0u, give, 16)"),
    ("the words of another lane", "START + 4 * (g % 4)", "START + 4 * (g / 2)"),
    ("the last tile's rows again", "then = row_of(tile + 1)", "then = row_of(tile)"),
    ("the addresses of the batch before", "now ^= 32)", "now ^= 0)"),
]  # fmt: skip
CASES = [
    ("turbo4", 128),
    ("tq8", 256),
    ("turbo3", 128),
    ("turbo2", 64),
    ("tq6", 128),
    ("turbo4", 512),
    ("turbo3", 96),
    ("tq5", 512),
]


@pytest.fixture
def few_warps(monkeypatch):
    """One block of four warps per side, which take 16 or 32 rows at once and go on to others."""
    monkeypatch.setattr(encode, "_most_blocks", lambda device, resident: 1)
    monkeypatch.setattr(turned, "_RESIDENT", 128)
    for clear in (encode.side.cache_clear, encode._launchers.clear):
        clear()
    yield
    for clear in (encode.side.cache_clear, encode._launchers.clear):
        clear()


def wrong(name: str, dim: int) -> str:
    """What is wrong with rows of a format; empty if nothing is."""
    codec = Codec(name, dim)
    x = random_rows(dim, torch.bfloat16, 170)
    x[:, :, 6] = x[:, :, 0] / float(x[:, :, 0].float().norm()) * 1e-11  # less than what counts
    x[:, :, 7], x[:, :, 8] = 0.0, 0.0
    x[:, :, 8, 1], x[:, :, 8, 5] = 2.0, 2.0  # half of the turned values are 0
    want = codec.encode(x)
    for many in (False, True):
        got = encoded(x.to(DEVICE), codec, many).map(torch.Tensor.cpu)
        try:
            found = gpu_rows.differences(got, want, x, codec)
        except AssertionError as error:
            return str(error)
        if not (found.codes <= 5e-4 and found.scales <= 0.02):
            return f"too much differs: {found}"
    return ""


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dim"), CASES)
def test_rows_without_a_fault(name, dim, few_warps):
    """The comparison itself: what it notices below is the fault."""
    assert not wrong(name, dim)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dim"), CASES)
def test_rows_that_do_not_follow_each_other(name, dim, few_warps, monkeypatch):
    """Few teams of warps, each for many rows: heads that end, a ring that wraps, pages, values with gaps between them."""
    codec, tokens, capacity, slots = Codec(name, dim), 150, 192, 16
    wide = random_rows(2 * dim, torch.bfloat16, 2 * tokens, DEVICE)
    x = wide.view(2, 2, tokens, 2 * dim)[..., dim:]
    rows = encoded(x.contiguous(), codec)
    pages = torch.randperm(24, generator=torch.Generator().manual_seed(0)).view(2, 12)
    for start, paged, many in ((0, False, False), (170, False, True), (170, True, False), (0, True, True)):
        monkeypatch.setattr(encode, "_many", lambda device, many=many: 0 if many else 2**60)
        like = torch.empty((24, 2, slots, dim) if paged else (2, 2, capacity, dim), dtype=x.dtype, device=DEVICE)
        stores = tuple(encode.empty_rows(like, codec).map(torch.zeros_like) for _ in "kv")
        where = dict(pages=pages.int().to(DEVICE), page_slots=slots) if paged else {}
        encode.append(x, x, (codec, codec), stores, encode.Place(slot=start, capacity=capacity, **where))
        at = (start + torch.arange(tokens)) % capacity
        for store in stores:
            for part, whole in zip(store, rows):
                held = torch.stack([part[pages[b, at // slots], :, at % slots] for b in range(2)]) if paged else None
                found = held.transpose(1, 2) if paged else part[:, :, at]
                assert bits(found.cpu()) == bits(whole.cpu()), (start, paged)


@pytest.mark.gpu
@pytest.mark.parametrize(("fault", "old", "new"), FAULTS, ids=[f[0] for f in FAULTS])
def test_faults_are_noticed(fault, old, new, few_warps):
    """Each mistake must change the rows of some format by more than what may differ."""
    with nvrtc.sources([("turned.cuh", old, new)]):
        for name, dim in CASES:
            if wrong(name, dim):
                return
            encode._launchers.clear()
    pytest.fail(f"nobody noticed: {fault}")


@pytest.mark.parametrize(("fault", "old", "new"), FAULTS, ids=[f[0] for f in FAULTS])
def test_faults_have_their_place(fault, old, new):
    """Each is planted in a piece of source that is there once."""
    with nvrtc.sources([("turned.cuh", old, new)]):
        pass
