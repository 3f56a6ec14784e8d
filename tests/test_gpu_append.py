"""New tokens on the GPU: the plan and the tables, which need no GPU; what the compiler makes of them; the bytes."""

from __future__ import annotations

import re
from itertools import product

import gpu_rows
import numpy as np
import pytest
import torch
from test_cpu import HOW, bits, equal_layers, hard_rows, invented, strided

from gyrokv import Codec, LayerCache
from gyrokv.backends import gpu
from gyrokv.backends.gpu import encode, nvrtc
from gyrokv.backends.gpu.plan import SHARED_MEMORY
from gyrokv.cases import fits
from gyrokv.dispatch import append
from gyrokv.formats import FORMATS, KVFormat
from gyrokv.quant import Packed
from gyrokv.spec import HEAD_DIMS, UNEQUAL_HEAD_DIMS

DEVICE = "cuda"
F16, BF16, F32 = encode.ELEMENTS.values()
TABLES = [f for f in FORMATS.values() if f.kind == "codebook"] + [
    invented(b, coding, whole) for b, coding, whole in product((1, 4, 7, 8), ("index", "sign_magnitude"), (False, True))
]


def side(fmt: KVFormat | str, head_dim: int, many: bool, element: int = BF16, room: int = SHARED_MEMORY) -> encode.Side:
    fmt = FORMATS.get(fmt, fmt)
    row = fmt.words_per_head(head_dim) * (fmt.dtype.itemsize if fmt.is_dense else 2)
    return encode.side(fmt, head_dim, fmt.rotation, element, min(16, row & -row), many, room)


# -- without a GPU


@pytest.mark.parametrize(("fmt", "head_dim", "many", "expected"), [
    ("tq4.v1", 128, False, (16, 16, 128, 6672)),
    ("turbo4", 128, True, (8, 128, 512, 115520)),
    ("turbo4", 512, False, (8, 8, 128, 26688)),
    ("turbo4", 512, True, (8, 128, 512, 213824)),
    ("tq8", 128, False, (8, 32, 128, 36960)),
    ("tq8", 512, False, (8, 8, 128, 55520)),
    ("tq8", 512, True, (8, 64, 512, 212736)),
    ("turbo3", 320, True, (8, 24, 480, 100512)),
    ("q8_0", 576, True, (32, 16, 288, 23424)),
    ("tq8.v1", 512, False, (32, 8, 128, 13312)),
    ("tq8.v1", 512, True, (64, 16, 128, 30304)),
    ("fp8_e4m3", 40, True, (8, 32, 160, 3328)),
    ("bf16", 128, True, (8, 32, 128, 768)),
    ("f32", 128, True, (4, 32, 128, 768)),
], ids=str)  # fmt: skip
def test_the_plan(fmt, head_dim, many, expected):
    """Values per thread, heads per block, threads, bytes of shared memory: a change is meant, or it is a mistake."""
    found = side(fmt, head_dim, many)
    assert (int(dict(found.defines)["VALUES"]), found.rows, found.threads, found.shared) == expected


def test_every_row_has_a_plan():
    """A format that the kernel refuses would be encoded by torch, which takes a hundred launches."""
    for fmt, dim in product(FORMATS.values(), HEAD_DIMS):
        if fits(fmt, dim):
            assert not encode.why_not_row(fmt, dim, fmt.rotation)
            for many, element, room in product((False, True), (BF16, F32), (99 * 1024, 227 * 1024)):
                found = side(fmt, dim, many, element, room)
                assert found.threads <= 1024 and found.shared <= room, (fmt.name, dim)


def test_rows_that_the_kernel_cannot_write_are_refused():
    """They must go to torch with a reason, not come out wrong."""
    close = KVFormat(
        "close", "codebook", 2, 1.0, coding="index", scale="absmax", groups=(32,), levels=(0.0, 1e-6, 2e-6, 1.0), ties="up"
    )
    for fmt, text in ((invented(4, "index", False, (96,)), "powers of two"), (close, "closer together")):
        layer = LayerCache(Codec(fmt, 96), Codec("q8_0", 96), kv_heads=1)
        device, why = gpu.why_not_append(layer)
        assert device == "device=cpu (it runs on cuda)" and why.startswith(f"k_format={fmt.name} (") and text in why


@pytest.mark.parametrize("factor", [0.08838834764831845, 11.313708498984761, 1.0, 0.3])
@pytest.mark.parametrize("least", [False, True])
def test_preimages_are_on_the_same_side(factor, least):
    """The kernel compares what comes before the last product: one float further and the other level would be chosen."""
    factor = np.float32(factor)
    boundaries = torch.cat((FORMATS["tq8"].boundaries, FORMATS["turbo4.v2"].boundaries))
    found = encode.preimages(boundaries, float(factor), least).numpy()
    for b, x in zip(boundaries.numpy(), found):
        below, above = np.nextafter(x, np.float32(-np.inf)), np.nextafter(x, np.float32(np.inf))
        if least:
            assert x * factor >= b and below * factor < b
        else:
            assert x * factor <= b and above * factor > b


@pytest.mark.parametrize("fmt", TABLES, ids=str)
def test_cells_lead_to_the_nearest_level(fmt):
    """Each boundary, its neighbours and random values: the code that the grid finds against the definition's."""
    last = encode._float32(encode._layout(fmt, 128, fmt.rotation)[3])
    grid = encode.cells(fmt, last)
    edge = encode.preimages(fmt.boundaries, last, True)
    far = torch.full_like(edge, torch.inf)
    random = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * fmt.boundaries.abs().max() / last
    x = torch.cat((edge, edge.nextafter(far), edge.nextafter(-far), random, torch.tensor([0.0, -0.0, 3e38, -3e38])))
    part = (x.double() * grid.scale + 0.5).float().clamp(0, 1)
    rows = grid.rows[(part.double() * grid.n).round().long()]
    boundary = rows[:, 0].contiguous().view(torch.float32)
    above = ~(boundary > x) if fmt.ties == "up" else ~(boundary >= x)
    index = torch.bucketize(x * last, fmt.boundaries, right=fmt.ties == "up")
    codes = encode.to_sign_magnitude(index, fmt.bits) if fmt.coding == "sign_magnitude" else index
    assert torch.equal(torch.where(above, rows[:, 1] >> 8, rows[:, 1] & 255).long(), codes)
    if fmt.corrected:
        squares = torch.where(above, rows[:, 3], rows[:, 2]).view(torch.float32)
        assert torch.equal(squares, (fmt.level_values * fmt.level_values)[index])


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_compiler_spills_nothing(fmt):
    """Values of a group live in registers: what does not fit goes through memory, several times."""
    if nvrtc.compiler_version() is None:
        pytest.skip("libnvrtc is not here")
    for i, dim in enumerate(d for d in HEAD_DIMS if fits(FORMATS[fmt], d)):
        sides = (side(fmt, dim, many, (F16, BF16, F32)[(i + many) % 3]) for many in (False, True))
        _, notes = nvrtc.compile_source("encode.cu", encode.defines(*sides), "sm_90a")
        bytes_of = [int(re.search(rf"(\d+) bytes {what}", notes)[1]) for what in ("stack frame", "spill stores")]
        assert max(bytes_of) <= (8 if (fmt, dim) == ("turbo3.v2", 576) else 0), (dim, notes)  # the longest rows of all


# -- the bytes, on a GPU


def layers(k: Codec, v: Codec, **settings) -> tuple[LayerCache, LayerCache]:
    """The same layer on the GPU and on the CPU."""
    return tuple(LayerCache(k, v, kv_heads=2, batch=2, device=device, **settings) for device in (DEVICE, "cpu"))


def same_state(there: LayerCache, here: LayerCache, *dtypes: torch.dtype) -> bool:
    """``dtypes``: of the tokens, of both sides or of each. Rows that csrc/turned.cuh wrote may differ where they may."""
    there.to("cpu")
    codecs = dict(k=here.k_codec, v=here.v_codec)
    turned = {side for side, dtype in zip("kv", (*dtypes, *dtypes)) if encode.is_turned(codecs[side], dtype)}
    if not turned:
        return equal_layers(there, here)
    (mine, about), (other, about_other) = there.state(), here.state()
    assert about == about_other and mine.keys() == other.keys()
    rows = {
        side: [Packed(state[f"main.{side}.words"], state[f"main.{side}.scale"]) for state in (mine, other)]
        for side in turned
    }
    rest = all(
        bits(mine[name]) == bits(other[name]) for name in mine if name.split(".")[:2] not in [["main", s] for s in turned]
    )
    return rest and all(gpu_rows.alike(*pair, codecs[side]) for side, pair in rows.items())


def stored(x: torch.Tensor, codec: Codec) -> Packed:
    """Rows of ``x``, which other tests compare with the definition's."""
    rows = tuple(encode.empty_rows(x, codec) for _ in "kv")
    x = x.to(DEVICE).contiguous()
    return encode.append(x, x, (codec, codec), tuple(r.map(lambda t: t.to(DEVICE)) for r in rows), encode.Place())[0].map(
        torch.Tensor.cpu
    )


def same_but_for_nan(there: LayerCache, here: LayerCache) -> bool:
    """The same values: what is no number has other bits on other processors."""
    there.to("cpu")
    (mine, _), (other, _) = there.state(), here.state()
    numbers = ((mine[name].float().nan_to_num(nan=-7.0), other[name].float().nan_to_num(nan=-7.0)) for name in other)
    return mine.keys() == other.keys() and all(torch.equal(*pair) for pair in numbers)


@pytest.fixture
def ours(backend_here, monkeypatch):
    """``ours(many)``: after it the GPU backend encodes, as many tokens or as few."""
    backend_here("gpu")

    def choose(many: bool):
        monkeypatch.setattr(encode, "_many", lambda device: 0 if many else 2**60)

    return choose


MANY = pytest.mark.parametrize("many", [False, True], ids=["few", "many"])


@pytest.mark.gpu
@MANY
@pytest.mark.parametrize("fmt", FORMATS)
def test_append_writes_the_bytes_of_the_definition(fmt, many, ours):
    """A bit that differs makes a cache that another machine or another backend would have written differently."""
    ours(many)
    sizes = [d for d in HEAD_DIMS if fits(FORMATS[fmt], d)]
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    for i, dim in enumerate(sizes):
        dtype, how = dtypes[(i + many) % 4 if i % 5 else 2 * many], HOW[i % len(HOW)]
        x, y = (strided(hard_rows(dim, dtype, 75 if i % 4 == 0 else 19, seed), how) for seed in (i, i + 1))
        there, here = layers(Codec(fmt, dim), Codec(fmt, dim))
        gpu.append(there, x.to(DEVICE), y.to(DEVICE))
        here.append(x, y)
        assert same_state(there, here, dtype), f"{fmt} of {dim}, {dtype}, {how}"


@pytest.mark.gpu
@MANY
@pytest.mark.parametrize(("k", "v"), [("turbo4", "bf16"), ("f32", "q8_0"), ("fp8_e4m3", "tq6"), ("q4_0", "turbo3.v2")])
def test_append_of_unequal_sides(k, v, many, ours):
    """K and V share a launch: formats, head sizes, heads per block and types of one may not reach into the other."""
    ours(many)
    for (k_dim, v_dim), dtype in product((*UNEQUAL_HEAD_DIMS, (64, 64)), (torch.bfloat16, torch.float32)):
        if not (fits(FORMATS[k], k_dim) and fits(FORMATS[v], v_dim)):
            continue
        there, here = layers(Codec(k, k_dim), Codec(v, v_dim))
        for count, seed in ((33, 0), (1, 1)):
            x, y = hard_rows(k_dim, dtype, count, seed), hard_rows(v_dim, torch.float16, count, seed)
            gpu.append(there, x.to(DEVICE), y.to(DEVICE))
            here.append(x, y)
        assert same_state(there, here, dtype, torch.float16), f"{k_dim}, {v_dim}, {dtype}"


@pytest.mark.gpu
@MANY
@pytest.mark.parametrize("coding", ["index", "sign_magnitude"])
@pytest.mark.parametrize("width", range(1, 9))
def test_rows_of_every_width(width, coding, many, ours):
    """Formats are rows of data: widths, codings and tables that none of ours has must work."""
    ours(many)
    for i, dim in enumerate((128, 96, 256, 48)):
        fmt = invented(width, coding, i % 2 == 0)
        x = hard_rows(dim, torch.float32, 21, i)
        there, here = layers(Codec(fmt, dim), Codec(fmt, dim))
        gpu.append(there, x.to(DEVICE), x.flip(-1).to(DEVICE))
        here.append(x, x.flip(-1))
        assert same_state(there, here, torch.float32), f"{fmt} of {dim}"


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [
    dict(window=20), dict(sinks=4, recent=9), dict(window=40, recent=50), dict(capacity=64), dict(capacity=200, sinks=70),
], ids=str)  # fmt: skip
def test_append_to_every_kind_of_layer(settings, ours):
    """Rings that wrap, long chunks that they cannot hold, dense copies, growth: encoding in place must miss none."""
    ours(False)
    there, here = layers(Codec("turbo4", 80), Codec("q8_0", 80), dtype=torch.bfloat16, **settings)
    for i, count in enumerate((1, 30, 1, 5, 40, 64, 1, 90, 3, 3)):
        x = hard_rows(80, torch.bfloat16, count, i)
        view, want = gpu.append(there, *(t.to(DEVICE) for t in (x, x.flip(-1)))), here.append(x, x.flip(-1))
        for name, t in there._main.k._asdict().items():
            live = there._main.stop - there._main.first
            assert live == here._main.stop - here._main.first and t.shape == getattr(here._main.k, name).shape
        for side in "kv":  # dense rows hold rotated values, which torch may round otherwise on a GPU
            close = torch.isclose(view.decode(side).cpu(), want.decode(side), rtol=2e-2, atol=1e-30)
            assert int((~close).sum()) <= (max(64, close.numel() // 250) if side == "k" else 0)  # k: turned by tensor cores
        if i == 4:
            for layer in (there, here):
                layer.truncate(layer.length - 1)
    (a, _), (b, _) = there.state(), here.state()
    assert all(bits(a[name].cpu()) == bits(b[name]) for name in a if name.startswith("main.v"))
    k = [Packed(state["main.k.words"].cpu(), state["main.k.scale"].cpu()) for state in (a, b)]
    assert gpu_rows.alike(*k, here.k_codec)


@pytest.mark.gpu
@MANY
@pytest.mark.parametrize("name", ["hadamard", "none"])
def test_append_with_another_rotation(name, many, ours):
    """A codec's own rotation replaces the row's, static scales come first: torch applies both before the kernel."""
    ours(many)
    for fmt, dtype in product(("turbo3", "tq5", "q4_0", "fp8_e4m3"), (torch.float32, torch.bfloat16)):
        x = hard_rows(96, dtype, 33).clamp(-1e3, 1e3)
        codec = Codec(fmt, 96, kv_heads=2, rotation=name, scale=torch.tensor([0.5, 4.0]))
        prepared = codec.prepare(x.to(DEVICE)).cpu()
        there, here = layers(codec, codec)
        gpu.append(there, x.to(DEVICE), x.to(DEVICE))
        bare = Codec(fmt, 96, rotation="none")
        here.write(bare.encode(prepared), bare.encode(prepared), x, x)
        assert same_state(there, here, dtype), f"{fmt}, {dtype}"


@pytest.mark.gpu
@MANY
@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.has_levels], ids=str)
def test_append_of_what_overflows(fmt, many, ours):
    """Sums that reach infinity in the rotation, and what comes of them: the definition has bytes for these too."""
    ours(many)
    for dim in (128, 512):
        x = torch.randn(2, 2, 5, dim, generator=torch.Generator().manual_seed(0))
        x[:, :, 0], x[:, :, 1], x[:, :, 2, 1::3] = 3.4e38, -3.4e38, 3e38
        x[:, :, 3] *= 1e19
        x[:, :, 4] = 0.0
        x[:, :, 4, [0, dim // 2]] = 2e38  # infinite in the last stage alone: 0 times infinity when it is normalised
        there, here = layers(Codec(fmt, dim), Codec(fmt, dim))
        gpu.append(there, x.to(DEVICE), x.flip(-1).to(DEVICE))
        here.append(x, x.flip(-1))
        assert same_but_for_nan(there, here), f"{fmt} of {dim}"


@pytest.mark.gpu
@MANY
def test_append_where_the_device_says(many, ours):
    """Lengths on the device, one per sequence or one for all, rings, and pages in any order: no row beside its slot."""
    ours(many)
    batch, heads, dim, slots, tokens = 3, 2, 64, 16, 5
    codecs = Codec("turbo3", dim), Codec("bf16", dim)
    x = hard_rows(dim, torch.bfloat16, tokens)[:1].expand(batch, -1, -1, -1).contiguous()
    x = (x * torch.tensor([1.0, 2.0, 3.0])[:, None, None, None]).to(torch.bfloat16)
    want = [stored(x, codec) for codec in codecs]
    for lengths, base, pages in product(([7, 0, 46], [46]), (0, 3), (None, [[4, 0, 8], [1, 7, 2], [6, 3, 5]])):
        capacity = 3 * slots
        shape = (batch, heads, capacity, dim) if pages is None else (9, heads, slots, dim)
        like = torch.empty(shape, dtype=x.dtype, device=DEVICE)
        stores = tuple(encode.empty_rows(like, codec).map(torch.zeros_like) for codec in codecs)
        lengths_there = torch.tensor(lengths, device=DEVICE) + base
        pages_there = None if pages is None else torch.tensor(pages, dtype=torch.int32, device=DEVICE)
        place = encode.Place(
            base=base, capacity=capacity, lengths=lengths_there, pages=pages_there, page_slots=1 if pages is None else slots
        )
        there = x.to(DEVICE)
        encode.append(there, there, codecs, stores, place)
        for store, rows in zip(stores, want):
            right = store.map(lambda t: torch.zeros_like(t, device="cpu"))
            for b, i in product(range(batch), range(tokens)):
                slot = (lengths[b % len(lengths)] + i) % capacity
                page, at = (b, slot) if pages is None else (pages[b][slot // slots], slot % slots)
                for into, part in zip(right, rows):
                    into[page, :, at] = part[b, :, i]
            assert all(bits(a.cpu()) == bits(b) for a, b in zip(store, right)), (lengths, base, pages)


@pytest.mark.gpu
@MANY
def test_rows_at_odd_addresses(many, ours):
    """Values that do not begin at 16 bytes, and stores whose rows are aligned to their own size alone."""
    ours(many)
    for fmt, dim in (("turbo3", 96), ("q8_0", 48), ("fp8_e4m3", 40), ("turbo2", 32)):
        codec = Codec(fmt, dim)
        x = hard_rows(dim, torch.bfloat16, 19)
        want = stored(x, codec)
        wide = torch.full((*x.shape[:3], dim + 3), torch.nan, dtype=x.dtype, device=DEVICE)
        odd = wide[..., 1 : dim + 1]
        odd.copy_(x)
        base = encode.empty_rows(odd, codec)
        flat = torch.zeros(base.words.numel() + 1, dtype=torch.int16, device=DEVICE)
        words = flat[1:].view(base.words.shape)
        encode.append(odd, odd, (codec, codec), (Packed(words, base.scale), encode.empty_rows(odd, codec)), encode.Place())
        assert bits(words.cpu()) == bits(want.words) and bits(base.scale.cpu()) == bits(want.scale), fmt


@pytest.mark.gpu
def test_many_blocks_and_the_chosen_kernel(backend_here):
    """A long chunk by the kernel that its length chooses, then single tokens by the other one."""
    backend_here("gpu")
    codec = Codec("turbo4", 128), Codec("q8_0", 128)
    there, here = layers(*codec, capacity=9000)
    random = torch.Generator().manual_seed(0)
    for count in (8200, 700, 1, 1):
        x = torch.randn(2, 2, count, 128, generator=random).to(torch.bfloat16)
        append(there, x.to(DEVICE), x.to(DEVICE))
        append(here, x, x)
    assert same_state(there, here, torch.bfloat16)


@pytest.mark.gpu
def test_append_in_a_graph(backend_here):
    """One launch whose slot is read from the device: a captured step serves every position."""
    backend_here("gpu")
    codecs = Codec("turbo4", 128), Codec("turbo4", 128)
    x = hard_rows(128, torch.bfloat16, 6).to(DEVICE)
    step, length = x[:, :, :1].clone(), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    stores = tuple(encode.empty_rows(x, codec).map(torch.zeros_like) for codec in codecs)
    place = encode.Place(lengths=length)
    encode.append(step, step, codecs, stores, place)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        encode.append(step, step, codecs, stores, place)
    for t in range(6):
        step.copy_(x[:, :, t : t + 1])
        length.fill_(t)
        graph.replay()
    for store, codec in zip(stores, codecs):
        assert all(bits(a.cpu()) == bits(b) for a, b in zip(store, stored(x, codec)))
