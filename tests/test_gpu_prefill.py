"""Many query rows on the GPU: the kernels of prefill against float64, in pieces and whole, and what explain says."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import pytest
import torch

from gyrokv import Codec, LayerCache, attend, reference
from gyrokv.backends import gpu
from gyrokv.backends.gpu import prefill, staging
from gyrokv.cases import FEATURES, HEADS, Case, case, fits
from gyrokv.formats import FORMATS
from gyrokv.testing import Problem, assert_matches, inputs
from gyrokv.view import KVView

BF16, F16 = torch.bfloat16, torch.float16
PAIRS = (("bf16", "bf16"), ("q8_0", "turbo4"), ("turbo3", "f16"))
# features that keep their own settings of sizes get these only where they say nothing
DIMS = ((64, 64), (128, 128), (256, 256), (512, 512), (576, 512))
SIZES = dict(batch=2, q_heads=6, kv_heads=2, q_len=200, kv_len=333)


def _featured(k: str, v: str, name: str, dtype: torch.dtype) -> Case:
    return case(k, v, (128, 128), **(SIZES | dict(FEATURES[name]) | dict(q_len=70, dtype=dtype)))


def ragged() -> list[Case]:
    """Sequences that begin or end where only the device knows, in rings and pages, for each kernel."""
    sizes = SIZES | dict(batch=4, q_len=150, kv_len=700, dtype=BF16, causal=True)
    kinds = (dict(starts=True), dict(lengths=True), dict(paged=True, lengths=True), dict(starts=True, lengths=True))
    found = [
        case(k, v, dims, **(sizes | kind))
        for (k, v), dims, kind in product(PAIRS, ((64, 64), (128, 128), (512, 512)), kinds)
    ]
    found += [case("q8_0", "tq6", dims, **(sizes | dict(paged=True, lengths=True))) for dims in HEADS]
    for page, (k, v) in product((16, 32, 64, 128, 256), PAIRS):
        found.append(case(k, v, (128, 128), paged=True, lengths=True, page=page, **sizes))
        found.append(case(k, v, (256, 256), paged=True, page=page, **(sizes | dict(causal=False))))
    for settings, kind, dim in product(FEATURES.values(), kinds, (64, 512)):
        if not settings.get("sliding"):
            settings = sizes | dict(causal=False) | settings | kind | dict(q_len=70)
            found.append(case("q8_0", "f16", (dim, dim), **settings))
        elif not kind.get("starts"):
            settings = sizes | settings | kind | dict(sliding=90, window=90, kv_len=290, offset=39, q_len=60)
            found.append(case("q8_0", "f16", (dim, dim), **settings))
    for window, kind in product((1, 100, 600), kinds):
        found.append(case("bf16", "turbo4", (128, 128), window=window, **(sizes | kind)))
    return found


def cases() -> list[Case]:
    found = [
        case(f, f, dims, dtype=dtype, causal=True, **SIZES)
        for f, dims, dtype in product(("bf16", "f16", "turbo4"), HEADS, (BF16, F16))
        if fits(FORMATS[f], dims[0]) and fits(FORMATS[f], dims[1])
    ]
    found += [case(f, f, (64, 64), dtype=BF16, causal=True, **SIZES) for f in FORMATS]
    found += [
        case(k, v, (128, 128), dtype=BF16, **SIZES)
        for k, v in product(("q8_0", "tq5", "turbo2", "fp8_e4m3", "f32"), repeat=2)
    ]
    found += [_featured(k, v, name, dtype) for (k, v), name, dtype in product(PAIRS, FEATURES, (BF16, F16))]
    for q_len, kv_len in ((33, 33), (63, 64), (65, 1000), (129, 385), (300, 100), (191, 193)):
        for dim, causal in product((64, 128, 256, 512), (False, True)):
            found.append(
                case("bf16", "bf16", (dim, dim), dtype=BF16, causal=causal, **(SIZES | dict(q_len=q_len, kv_len=kv_len)))
            )
    for window, dim in product((1, 32, 40, 100, 1024), (64, 256, 512)):
        found.append(case("bf16", "q8_0", (dim, dim), dtype=BF16, causal=True, window=window, **(SIZES | dict(kv_len=1300))))
    for window, dim in product((17, 81, 82, 209, 210), (64, 128)):  # 48 queries see 64, 128, 129, 256, 257 keys
        found.append(case("bf16", "bf16", (dim, dim), dtype=BF16, causal=True, window=window, **(SIZES | dict(q_heads=8))))
    for groups, dim in product((1, 2, 4, 5, 8), (64, 128, 512)):
        found.append(case("bf16", "bf16", (dim, dim), dtype=BF16, causal=True, **(SIZES | dict(q_heads=2 * groups))))
    for softcap, dim in product((2.0, 9.0, 30.0), (64, 128, 256)):
        found.append(case("bf16", "f16", (dim, dim), dtype=BF16, causal=True, softcap=softcap, **(SIZES | dict(q_heads=8))))
    for dim, v, scale in product((64, 128, 256, 512), ("bf16", "f16"), (1.0, 3.0)):  # weights outgrow their references
        found.append(case("bf16", v, (dim, dim), dtype=BF16, causal=True, scale=scale, **(SIZES | dict(kv_len=1000))))
    return list(dict.fromkeys(found + masked() + ragged()))


def masked() -> list[Case]:
    """Each kind of mask with each shape in each kernel; in turn: heads of a tile, alignment of the mask's rows, features."""
    values = (torch.float32, -1e5), (F16, -65504.0), (BF16, -1e5)
    kinds = [dict(mask="bool"), *(dict(mask="additive", mask_dtype=t, masked=m) for t, m in values)]
    found = []
    for i, (dim, kind, axes) in enumerate(product((64, 128, 256, 512), kinds, ("2", "k", "bhqk", "hqk", "q"))):
        sizes = SIZES | dict(q_heads=(2, 4, 8)[i % 3], kv_len=(336, 334, 333)[i // 3 % 3])
        features = (dict(), dict(causal=True), dict(window=150), dict(softcap=9.0), dict(scale=-0.1))[i // 2 % 5]
        found.append(case("bf16", "bf16", (dim, dim), dtype=BF16, mask_axes=axes, **sizes, **kind, **features))
    return found


def assert_right(data: Problem, results: tuple[torch.Tensor, torch.Tensor]) -> None:
    """AssertionError unless they are right for kernels that round weights to the type in which V is multiplied."""
    weights = BF16 if data.case.spec.v_format.name == "bf16" else F16
    assert_matches(data, *results, gpu.BOUND, weights)


def _kernels_of(dims: tuple[int, int]) -> tuple[str, ...]:
    """Hopper's, of both heights of tiles where they have two, and those that any GPU can run."""
    return (*(("tall", "short") if dims[1] <= 64 and dims[0] <= 256 else ("best",)), "portable")


@pytest.fixture
def kernels(request) -> Iterator[str]:
    with nullcontext() if request.param == "best" else gpu.forced(request.param):
        yield request.param


def of_dims(*dims: int | tuple[int, int], hopper: bool = False) -> list[tuple]:
    """(dims, kernels), of Hopper alone if asked for."""
    found = [(d, kernels) for d in dims for kernels in _kernels_of(d if isinstance(d, tuple) else (d, d))]
    return [(d, kernels) for d, kernels in found if not hopper or kernels != "portable"]


ALL = [(c, kernels) for c in cases() for kernels in _kernels_of((c.spec.head_dim, c.spec.head_dim_v))]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "kernels"), ALL, ids=str, indirect=["kernels"])
def test_prefill_matches_reference(case, kernels, backend_here, problem):
    """A failure is a wrong kernel, or rows unpacked or joined wrongly."""
    backend_here("gpu")
    data = problem(case.on("cuda"))
    assert_right(data, data.run("gpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("pair", [("bf16", "bf16"), ("q8_0", "turbo4"), ("turbo2", "tq6")])
@pytest.mark.parametrize(
    "settings",
    [
        dict(causal=True), dict(causal=True, window=300), dict(mask="additive"), dict(sinks=True),
        dict(causal=True, lengths=True, sinks=True), dict(starts=True, window=300), dict(paged=True, lengths=True),
        dict(mask="bool", block_map=True, lengths=True), dict(mask="additive", block_map=True, causal=True, window=300),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kernels", ["best", "portable"], indirect=True)
def test_pieces_change_nothing_but_rounding(pair, settings, kernels, backend_here, monkeypatch):
    """Keys copied and joined in small pieces, a head and a few queries at a time: the result of one piece."""
    backend_here("gpu")
    for dim in (128, 512):
        made = case(*pair, (dim, dim), dtype=BF16, **(SIZES | dict(q_len=500, kv_len=2000)), **settings).on("cuda")
        data = inputs(made)
        whole = data.run("gpu")
        with monkeypatch.context() as patch:
            patch.setattr(staging, "STAGED", 1)
            patch.setattr(staging, "QUERIES", 1)
            pieces = data.run("gpu")
        assert_right(data, pieces)
        for a, b in zip(whole, pieces):
            a, b = (x.float().nan_to_num(neginf=0.0) for x in (a, b))
            assert float((a - b).norm() / b.norm()) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("pair", list(product(("bf16", "q8_0", "turbo3"), ("bf16", "turbo4", "tq8"))))
@pytest.mark.parametrize("kernels", ["best", "portable"], indirect=True)
def test_a_query_alone_is_the_query_among_many(pair, kernels, backend_here):
    """Prefill and decode must agree for every pair of formats: the last query of many, and the same query alone."""
    backend_here("gpu")
    data = inputs(case(*pair, (128, 128), dtype=BF16, causal=True, **SIZES).on("cuda"))
    many = attend(data.q, data.view, backend="gpu")
    one = attend(data.q[:, :, -1:].contiguous(), data.view, backend="gpu")
    assert float((many[:, :, -1:].float() - one.float()).norm() / one.float().norm()) < 6e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dim", (64, 512))
@pytest.mark.parametrize("kind", [dict(starts=True), dict(lengths=True), dict(paged=True, lengths=True)], ids=str)
def test_a_ragged_query_alone_is_the_query_among_many(kind, dim, backend_here):
    backend_here("gpu")
    settings = SIZES | dict(batch=5, dtype=BF16, causal=True) | kind
    data = inputs(case("q8_0", "turbo4", (dim, dim), **settings).on("cuda"))
    many = attend(data.q, data.view, backend="gpu")
    one = attend(data.q[:, :, -1:].contiguous(), data.view, backend="gpu")
    assert float((many[:, :, -1:].float() - one.float()).norm() / one.float().norm()) < 6e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("dims", "kernels"), of_dims(*DIMS), indirect=["kernels"])
@pytest.mark.parametrize("features", [dict(causal=True), dict(causal=True, window=100), dict(softcap=20.0)], ids=str)
def test_two_runs_are_bitwise_equal(dims, features, kernels, backend_here):
    backend_here("gpu")
    data = inputs(case("bf16", "turbo4" if dims[0] == 128 else "bf16", dims, dtype=BF16, **SIZES, **features).on("cuda"))
    first = data.run("gpu")
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, data.run("gpu")))


@pytest.mark.gpu
@pytest.mark.parametrize(("dims", "kernels"), of_dims(*DIMS, hopper=True), ids=str, indirect=["kernels"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(causal=True), dict(causal=True, window=100), dict(causal=True, window=1), dict(softcap=50.0),
        dict(causal=True, sinks=True, q_len=300, kv_len=100), dict(mask="bool", window=150),
        dict(mask="additive", mask_dtype=BF16, mask_axes="bhqk"),
    ],
    ids=str,
)  # fmt: skip
def test_blocks_of_many_tiles_change_no_bit(dims, kernels, settings, backend_here, monkeypatch):
    """A tile is loaded while a block attends to the one before; here as often as there are tiles, or never."""
    backend_here("gpu")
    data = inputs(case("bf16", "bf16", dims, **(SIZES | dict(q_heads=8, dtype=BF16) | settings)).on("cuda"))
    results = []
    for blocks in (10**6, 3, 1):
        monkeypatch.setattr(prefill, "_processors", lambda device, blocks=blocks: blocks)
        results.append(data.run("gpu"))
    assert_right(data, results[0])
    assert all(torch.equal(a, b) for found in results[1:] for a, b in zip(results[0], found))


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "kernels"), of_dims(64, 128, 256, 512), indirect=["kernels"])
def test_a_block_map_changes_no_bit(dim, kernels, backend_here):
    """The map is an optimisation: skipped and unread tiles give the same bits as looking at all of the mask."""
    backend_here("gpu")
    for name, heads, axes in product(("block_map", "bool_block_map"), (2, 8), ("2", "bhqk")):
        settings = SIZES | dict(FEATURES[name]) | dict(q_heads=heads, mask_axes=axes, q_len=300, kv_len=700, dtype=BF16)
        data = inputs(case("bf16", "bf16", (dim, dim), **settings).on("cuda"))
        with_map = data.run("gpu")
        options = {k: v for k, v in data.options.items() if k != "block_map"}
        without = attend(data.q, data.view, **options, backend="gpu", return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(with_map, without))


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "kernels"), of_dims(64, 128, 256, 512), indirect=["kernels"])
@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
@pytest.mark.parametrize("kind", (torch.bool, BF16, F16, torch.float32), ids=str)
def test_references_follow_scores_that_grow(kind, dtype, dim, kernels, backend_here):
    """From the last key on, scores pass those before by more than a float32 has exponents; some rows see none at first."""
    backend_here("gpu")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, n, dim, device="cuda", dtype=dtype) for h, n in ((8, 200), (2, 600), (2, 600)))
    k *= torch.linspace(60.0, 1.0, 600, device="cuda", dtype=dtype)[:, None]
    seen = torch.rand(200, 600, device="cuda") > 0.3
    seen[:100, 300:] = False
    mask = seen if kind == torch.bool else torch.where(seen, -0.5, -torch.inf).to(kind)
    exact = reference.attention(q.double(), k.double(), v.double(), mask=mask)[0]
    assert float((attend(q, KVView.of(k, v), causal=False, mask=mask, backend="gpu") - exact).norm() / exact.norm()) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dim", (64, 128, 512))
@pytest.mark.parametrize("paged", (False, True))
@pytest.mark.parametrize("k", ("q8_0", "bf16"))
@pytest.mark.parametrize("settings", [dict(causal=True), dict(), dict(causal=True, window=90, sinks=True)], ids=str)
def test_lengths_of_every_kind(k, dim, paged, settings, backend_here):
    """Nothing held, fewer tokens than queries, the last key at and beside the end of a tile."""
    backend_here("gpu")
    settings = SIZES | dict(batch=8, q_len=70, kv_len=800, dtype=BF16, lengths=True, paged=paged) | settings
    data = inputs(case(k, "bf16", (dim, dim), **settings).on("cuda"))
    lengths = torch.tensor([0, 1, 69, 71, 127, 128, 129, 256], device="cuda")
    data.view = replace(data.view, lengths=lengths)
    assert_right(data, data.run("gpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [dict(), dict(window=150), dict(sinks=True)], ids=str)
def test_ragged_keys_of_wide_heads(settings, backend_here):
    """Keys where they lie, beside values there and copies of values."""
    backend_here("gpu")
    for kind in (dict(starts=True), dict(lengths=True), dict(paged=True, lengths=True)):
        sizes = SIZES | dict(batch=4, kv_len=700, dtype=BF16, causal=True) | kind
        for v in ("bf16", "q8_0"):
            data = inputs(case("bf16", v, (512, 512), **(sizes | settings)).on("cuda"))
            assert_right(data, data.run("gpu"))


@pytest.mark.gpu
def test_a_captured_graph_follows_the_lengths(backend_here):
    """Nothing of a launch may depend on what the device alone knows."""
    backend_here("gpu")
    settings = SIZES | dict(batch=4, kv_len=700, dtype=BF16, causal=True, paged=True, lengths=True)
    data = inputs(case("q8_0", "turbo4", (128, 128), **settings).on("cuda"))
    data.run("gpu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = data.run("gpu")
    for cut in (0, 33, 200):
        data.view.lengths.sub_(cut)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, data.run("gpu")))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "sizes"),
    [
        (128, dict(batch=1, q_heads=8, kv_heads=8, q_len=64, kv_len=100_000)),
        (512, dict(batch=2, q_heads=8, kv_heads=2, q_len=2048, kv_len=40_000)),
        (64, dict(batch=700, q_heads=16, kv_heads=16, q_len=64, kv_len=128)),
        (128, dict(batch=1, q_heads=256, kv_heads=4, q_len=1024, kv_len=2000)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
def test_the_workspace_is_bounded(dim, sizes, dtype, backend_here):
    """At most 256 MB beside the results, whatever the sizes."""
    backend_here("gpu")
    spec = case("q8_0", "q8_0", (dim, dim), dtype=dtype, **sizes).spec
    layer = LayerCache(
        Codec("q8_0", dim), Codec("q8_0", dim), batch=spec.batch, kv_heads=spec.kv_heads, dtype=dtype, device="cuda",
        capacity=spec.kv_len, check=False,
    )  # fmt: skip
    x = torch.zeros(spec.batch, spec.kv_heads, min(spec.kv_len, 2000), dim, dtype=dtype, device="cuda")
    for _ in range(spec.kv_len // x.shape[2]):
        view = gpu.append(layer, x, x)
    q = torch.zeros(spec.batch, spec.q_heads, spec.q_len, dim, dtype=dtype, device="cuda")
    del x
    attend(q, view, backend="gpu")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attend(q, view, backend="gpu")
    results = out.numel() * 6 + out.numel() // dim * 4  # float32 before it becomes 16 bits; log-sum-exp
    assert torch.cuda.max_memory_allocated() - before <= 256e6 + results


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bool", BF16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["every second key", "keys first", "an odd start", "one row", "one column"])
def test_strides_of_a_mask_change_no_bit(kind, layout, backend_here):
    """Whatever its strides and alignment, and whatever lies between its values: the result of a contiguous mask."""
    backend_here("gpu")
    sizes = SIZES | dict(q_heads=8, kv_len=336, dtype=BF16)
    own = dict(mask="bool") if kind == "bool" else dict(mask="additive", mask_dtype=kind)
    data = inputs(case("bf16", "bf16", (128, 128), **sizes, **own).on("cuda"))
    full, other = data.mask, torch.full((), 1 if kind == "bool" else torch.nan, dtype=data.mask.dtype, device="cuda")
    if layout in ("one row", "one column"):
        given = full[-1:] if layout == "one row" else full[:, :1]
        full = given.expand(full.shape).contiguous()
    elif layout == "every second key":
        given = torch.stack((full, other.expand_as(full)), dim=-1)[..., 0]
    elif layout == "keys first":
        given = full.T.contiguous().T
    else:
        room = other.expand(full.shape[0], full.shape[1] + 5).clone()
        given = room[:, 3:-2]
        given.copy_(full)
    results = [attend(data.q, data.view, **data.options | {"mask": mask}, backend="gpu") for mask in (full, given)]
    assert torch.equal(*results)


@pytest.mark.gpu
def test_a_thread_may_begin_with_attention(backend_here):
    """A new thread has no context of the driver until something makes one."""
    backend_here("gpu")
    data = inputs(case("bf16", "q8_0", (128, 128), dtype=BF16, causal=True, **SIZES).on("cuda"))
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(data.run, "gpu").result()[0], data.run("gpu")[0])
