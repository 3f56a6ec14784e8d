"""The GPU backend on a GPU: determinism, splits, far and odd memory, streams, graphs, devices, and random problems."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gyrokv import Codec, LayerCache, attend, attention
from gyrokv.backends import gpu
from gyrokv.backends.gpu import plan
from gyrokv.cases import FEATURES, HEADS, Case, case, compatible, fits
from gyrokv.formats import FORMATS
from gyrokv.layer import ring_capacity
from gyrokv.quant import Packed
from gyrokv.testing import Problem, assert_close, assert_matches, inputs, poison_dead
from gyrokv.view import KVView

pytestmark = pytest.mark.gpu
FAR = 2**30 + 64  # elements of two bytes: one step passes 2**31 bytes, two pass 2**32
CHUNKS, PER_CHUNK = 100, 100
KERNELS = 40  # kinds of random problems: what is compiled differs between kinds, hardly within one


@pytest.fixture(autouse=True)
def _here(backend_here):
    backend_here("gpu")
    yield
    torch.cuda.empty_cache()  # other processes test on the same GPU


def on_gpu(*args, **settings) -> Case:
    return case(*args, **settings).on("cuda")


def run(data: Problem, view=None, q: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q, view = data.q if q is None else q, view or data.view
    return attend(q, view, **data.options, backend="gpu", return_lse=True)


def close(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], what: object) -> None:
    """AssertionError unless (out, lse) are within the kernels' bound, and rounding, of ``wanted``."""
    for x, y in zip(got, wanted):
        assert_close(x, y.double(), y.float()[None], str(what), gpu.BOUND)


SOME = (
    dict(k="turbo4", v="turbo3", q_len=3, kv_len=1113, causal=True),
    dict(k="q8_0", v="tq6", dims=(128, 128), q_heads=16, kv_len=4200, dtype=torch.bfloat16),
    dict(k="bf16", v="bf16", dims=(512, 512), q_heads=8, kv_len=2100, dtype=torch.bfloat16, sinks=True),
    dict(k="f32", v="fp8_e4m3", dims=(96, 96), q_len=5, kv_len=777, starts=True),
    dict(k="turbo2", v="q4_0", q_len=2, kv_len=900, unquantised=True, first=5, recent=60, ring=True, causal=True),
    dict(k="turbo2", v="turbo3", dims=(256, 256), kv_len=4200),
    dict(k="tq5", v="tq5", dims=(128, 128), kv_len=4200, dtype=torch.bfloat16),
    dict(k="tq8", v="tq6", dims=(512, 512), kv_len=4200, dtype=torch.bfloat16),
)


@pytest.mark.parametrize("settings", SOME, ids=lambda s: f"{s['k']}.{s['v']}")
def test_two_runs_are_bitwise_equal(settings):
    """The order in which warps and blocks are joined depends on sizes alone."""
    data = inputs(on_gpu(**settings))
    first = [x.clone() for x in run(data)]
    for _ in range(5):
        for x, y in zip(first, run(data)):
            assert torch.equal(x, y)


@pytest.mark.parametrize("settings", SOME, ids=lambda s: f"{s['k']}.{s['v']}")
@pytest.mark.parametrize("count", [1, 2, 5, 33, 256, 1000])
def test_any_number_of_splits_is_right(settings, count, monkeypatch):
    """Splits without a tile, and merges of each size."""
    data = inputs(on_gpu(**settings))
    monkeypatch.setattr(plan, "splits", lambda *sizes: count)
    assert_matches(data, *run(data), gpu.BOUND)


# -- memory


def spread(t: Tensor, axis: int) -> Tensor:
    """``t [B, H, T, N]`` in memory where steps along ``axis`` are so long that its last index lies past 2**32 bytes."""
    last = t.shape[axis] - 1
    strides = [0, 0, 0, 1]
    strides[axis] = -(-(2 * FAR) // last // 64) * 64 + 64
    size = t.shape[3]
    for i in sorted(set(range(3)) - {axis}, reverse=True):
        strides[i] = size
        size *= t.shape[i]
    assert size <= strides[axis] and last * strides[axis] * t.element_size() > 2**32
    buffer = torch.empty(last * strides[axis] + size, dtype=t.dtype, device=t.device)
    return buffer.as_strided(t.shape, strides).copy_(t)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["sequences", "heads", "slots"])
@pytest.mark.parametrize("which", ["k words", "k scale", "v words", "v scale"])
@pytest.mark.parametrize("formats", [("q8_0", "turbo4"), ("tq6", "q4_0"), ("bf16", "fp8_e4m3")], ids=".".join)
def test_offsets_past_32_bits(formats, which, axis):
    """Offsets in bytes, in codes, in elements: none may be computed in 32 bits."""
    side, part = which.split()
    if part == "scale" and not FORMATS[formats[side == "v"]].has_levels:
        pytest.skip("these rows have no scale")
    data = inputs(on_gpu(*formats, batch=3, q_heads=6, kv_heads=3, kv_len=70, q_len=2, causal=True))
    (segment,) = data.view.segments
    segment = replace(segment, **{s: getattr(segment, s).map(lambda t: t[:, :, :70]) for s in "kv"})
    packed = getattr(segment, side)
    fields = packed._asdict() | {part: spread(getattr(packed, part), axis)}
    view = replace(data.view, segments=(replace(segment, **{side: Packed(**fields)}),), owner=None)
    close(run(data, view), data.exact, data.case)


@pytest.mark.slow
@pytest.mark.parametrize("formats", [("q8_0", "turbo2"), ("bf16", "tq5")], ids=".".join)
def test_slots_past_2_31_codes(formats):
    """Few live tokens at the end of one long row of slots: 2**31 codes and 2**31 bytes lie before them."""
    data = inputs(on_gpu(*formats, (512, 512), batch=1, q_heads=8, kv_heads=1, kv_len=300, causal=True))
    (segment,) = data.view.segments
    before = 2**31 // 512 + 5
    capacity = before + 300 + 40

    def moved(t: Tensor) -> Tensor:
        far = torch.empty(1, 1, capacity, t.shape[3], dtype=t.dtype, device=t.device)
        far[:, :, before : before + 300] = t[:, :, :300]
        return far

    rows = {s: getattr(segment, s).map(moved) for s in "kv"}
    view = replace(
        data.view, segments=(replace(segment, **rows, first=before, stop=before + 300),), owner=None,
        first=before, length=before + 300,
    )  # fmt: skip
    close(run(data, view), data.exact, data.case)


@pytest.mark.slow
@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("formats", [("turbo4", "q8_0"), ("bf16", "turbo3")], ids=".".join)
def test_a_long_context_matches_torch(formats, q_len):
    """300,001 tokens: many tiles per warp, many splits, one token in the last tile."""
    tokens, heads, dim = 300_001, 2, 64
    made = torch.Generator("cuda").manual_seed(q_len)
    k, v = torch.randn(2, 1, heads, tokens, dim, device="cuda", generator=made)
    layer = LayerCache(*(Codec(f, dim) for f in formats), kv_heads=heads, device="cuda", capacity=tokens)
    for start in range(0, tokens, 50_000):
        layer.append(k[:, :, start : start + 50_000], v[:, :, start : start + 50_000])
    places = torch.randint(0, tokens - q_len, (4 * q_len,), device="cuda", generator=made)
    q = 1.5 * k.repeat_interleave(2, 1)[:, torch.arange(4, device="cuda").repeat_interleave(q_len), places]
    q = q.view(1, 4, q_len, dim)
    close(*(attend(q, layer, backend=name, return_lse=True) for name in ("gpu", "torch")), formats)


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "two_bytes_off": lambda x: torch.cat((x[..., :1], x), -1)[..., 1:],
    "four_bytes_off": lambda x: torch.cat((x[..., :2], x), -1)[..., 2:],
    "every_other_token": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "one_batch": lambda x: x[:1].expand_as(x),
    "heads_expanded": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("how", ODD)
@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_plain_tensors_of_any_strides(name, how):
    """Strides and offsets that are no multiples of a copy, and strides of zero."""
    dtype = FORMATS[name].dtype
    data = inputs(on_gpu(name, name, (72, 72), plain=True, q_len=7, kv_len=131, causal=True, dtype=dtype))
    q, k, v = (ODD[how](x) for x in (data.q, data.k, data.v))
    wanted = Problem(data.case, q, KVView.of(k, v), k, v).exact
    close(attention(q, k, v, backend="gpu", return_lse=True), wanted, how)


def test_dead_slots_are_not_read():
    """NaN in every slot without a live position."""
    for settings in (
        dict(causal=True, window=32, ring=True, sliding=32, kv_len=64, offset=39),
        dict(unquantised=True, first=5, recent=11, ring=True, kv_len=90),
        dict(kv_len=113),
    ):
        for formats in (("f32", "bf16"), ("fp8_e4m3", "fp8_e4m3"), ("q8_0", "turbo3"), ("tq8", "f16")):
            if settings.get("unquantised") and FORMATS[formats[0]].is_dense and FORMATS[formats[1]].is_dense:
                continue
            data = inputs(on_gpu(*formats, q_len=3, **settings))
            wanted = data.exact
            poison_dead(data.view.owner)
            close(run(data), wanted, data.case)


# -- streams, graphs, devices


def test_it_runs_on_the_current_stream():
    """A kernel on another stream would read q before it is there."""
    data = inputs(on_gpu("turbo4", "q8_0", q_len=2, kv_len=900, causal=True))
    wanted = [x.clone() for x in run(data)]
    q = torch.zeros_like(data.q)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        q.copy_(data.q)
        got = run(data, q=q)
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(got, wanted))


@pytest.mark.parametrize("settings", SOME, ids=lambda s: f"{s['k']}.{s['v']}")
def test_a_captured_graph_can_be_replayed(settings):
    """Captured calls with new values of q, and other work between, give the bits of plain calls."""
    data = inputs(on_gpu(**settings))
    queries = [data.q, -data.q, data.q.flip(2).flip(1)]
    wanted = [[x.clone() for x in run(data, q=q)] for q in queries]
    q = torch.zeros_like(data.q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(data, q=q)
    for i in (0, 1, 2, 0):
        q.copy_(queries[i])
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(got, wanted[i]))
        torch.randn(1000, 1000, device="cuda").sum()


def test_another_device_than_the_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("it takes two GPUs")
    data = inputs(on_gpu("tq5", "turbo4", q_len=2, kv_len=900, causal=True))
    wanted = run(data)
    got = run(data, data.view.to("cuda:1"), data.q.to("cuda:1"))
    assert got[0].device.index == 1 and torch.cuda.current_device() == 0
    assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(got, wanted))


# -- sizes, and everything at random


@pytest.mark.slow
@pytest.mark.parametrize("dims", HEADS, ids=lambda d: f"{d[0]}.{d[1]}")
def test_query_rows_of_every_number(dims):
    """1 to 32 query heads per KV head, 1 to 16 query tokens: blocks that are not full, several blocks per KV head."""
    names = [name for name, fmt in FORMATS.items() if fits(fmt, dims[0]) and fits(fmt, dims[1])]
    at = HEADS.index(dims)
    k, v = names[at % len(names)], names[(5 * at + 3) % len(names)]
    sizes = {(groups, 1 + 7 * groups % 16) for groups in range(1, 33)} | {(1 + 5 * n % 32, n) for n in range(1, 17)}
    for groups, q_len in sorted(sizes | {(32, 16), (1, 1)}):
        data = inputs(on_gpu(k, v, dims, q_heads=2 * groups, q_len=q_len, kv_len=70, causal=True, batch=1))
        close(run(data), data.exact, data.case)


def kernel_kind(seed: int) -> dict:
    """What a kernel is compiled for, drawn at random: formats, head sizes, features, dtypes, how many query rows."""
    dice = random.Random(seed)
    while True:
        k, v, dims = dice.choice([*FORMATS.values()]), dice.choice([*FORMATS.values()]), dice.choice(HEADS)
        settings = compatible(*dice.sample([*FEATURES], dice.choice((0, 1, 1, 2, 2))))
        if settings is None or not (fits(k, dims[0]) and fits(v, dims[1])):
            continue
        if settings.get("unquantised") and k.is_dense and v.is_dense:
            continue
        settings = dict(settings, dtype=dice.choice((torch.float32, torch.bfloat16, torch.float16)))
        if settings.get("mask") == "additive":
            settings["mask_dtype"] = dice.choice((torch.float32, torch.float16, torch.bfloat16))
        return dict(k=k, v=v, dims=dims, columns=dice.choice(((1, 4), (5, 8), (9, 40))), **settings)


def random_case(kind: dict, dice: random.Random) -> Case:
    """A problem of ``kind``: everything that its kernel takes as an argument is drawn."""
    settings = dict(kind)
    low, high = settings.pop("columns")
    groups = dice.randint(1, min(high, 16))
    q_len = dice.randint(-(-low // groups), max(-(-low // groups), min(20, high // groups)))
    kv_len = dice.choice((dice.randint(1, 40), dice.randint(1, 300), dice.randint(300, 1500), 16 * dice.randint(1, 40)))
    if settings.get("sliding"):
        window = dice.randint(1, 150)
        settings |= dict(sliding=window, window=window, kv_len=ring_capacity(window), offset=dice.randint(1, 150))
    else:
        settings["kv_len"] = kv_len
        if "window" in settings:
            settings["window"] = dice.randint(1, kv_len + 9)
    for name, most in (("first", 40), ("recent", 90)):
        if settings.get(name):
            settings[name] = dice.randint(1, most)
    if settings.get("softcap"):
        settings["softcap"] = dice.choice((1.0, 4.0, 50.0))
    if settings.get("mask") == "additive":
        settings["masked"] = dice.choice((float("-inf"), -65504.0))
    if settings.get("mask") and not settings.get("block_map"):
        settings["mask_axes"] = dice.choice(("2", "k", "qk", "hqk", "bqk", "bhqk", "hk", "q", "bh"))
    if dice.random() < 0.2:
        settings["scale"] = dice.choice((1.3, 0.3, -0.5)) / math.sqrt(settings["dims"][0])
    kv_heads = dice.randint(1, 5)
    sizes = dict(batch=dice.randint(1, 4), q_heads=kv_heads * groups, kv_heads=kv_heads, q_len=q_len)
    return on_gpu(**settings, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(CHUNKS))
def test_random_problems(seed):
    """10,000 problems in all. A failure names the problem; ``inputs(case)`` makes the same tensors again."""
    dice, kind = random.Random(1000 + seed), kernel_kind(seed % KERNELS)
    for _ in range(PER_CHUNK):
        data = inputs(random_case(kind, dice))
        close(data.run("gpu"), data.exact, data.case)
