"""Many query rows on the GPU: the kernels of prefill against float64, in pieces and whole, and what explain says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product

import pytest
import torch

from gyrokv import attend, explain
from gyrokv.backends import gpu
from gyrokv.backends.gpu import prefill, shapes
from gyrokv.cases import FEATURES, HEADS, Case, case, fits
from gyrokv.formats import FORMATS
from gyrokv.testing import assert_matches, inputs

BF16, F16 = torch.bfloat16, torch.float16
PAIRS = (("bf16", "bf16"), ("q8_0", "turbo4"), ("turbo3", "f16"))
# features that keep their own settings of sizes get these only where they say nothing
SIZES = dict(batch=2, q_heads=6, kv_heads=2, q_len=200, kv_len=333)


def _featured(k: str, v: str, name: str, dtype: torch.dtype) -> Case:
    return case(k, v, (128, 128), **(SIZES | dict(FEATURES[name]) | dict(q_len=70, dtype=dtype)))


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
    for groups in (1, 2, 5, 8):
        found.append(case("bf16", "bf16", (512, 512), dtype=BF16, causal=True, **(SIZES | dict(q_heads=2 * groups))))
    return list(dict.fromkeys(found))


@pytest.fixture(params=["best", "portable"])
def kernels(request) -> Iterator[str]:
    """Those that the GPU would get, and those that any GPU can run."""
    with gpu.forced("portable") if request.param == "portable" else nullcontext():
        yield request.param


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases(), ids=str)
def test_prefill_matches_reference(case, kernels, backend_here, problem):
    """A failure is a wrong kernel, or rows unpacked or joined wrongly."""
    backend_here("gpu")
    data = problem(case.on("cuda"))
    assert_matches(data, *data.run("gpu"), gpu.BOUND)


@pytest.mark.gpu
@pytest.mark.parametrize("pair", [("bf16", "bf16"), ("q8_0", "turbo4"), ("turbo2", "tq6")])
@pytest.mark.parametrize(
    "settings", [dict(causal=True), dict(causal=True, window=300), dict(mask="additive"), dict(sinks=True)], ids=str
)
def test_pieces_change_nothing_but_rounding(pair, settings, kernels, backend_here, monkeypatch):
    """Keys unpacked and joined in small pieces, queries a few at a time: the result of one piece."""
    backend_here("gpu")
    made = case(*pair, (128, 128), dtype=BF16, **(SIZES | dict(q_len=500, kv_len=2000)), **settings).on("cuda")
    data = inputs(made)
    whole = data.run("gpu")
    monkeypatch.setattr(prefill, "_STAGED", 1)
    monkeypatch.setattr(prefill, "_PART", 1)
    monkeypatch.setattr(prefill, "_QUERIES", 1)
    assert_matches(data, *data.run("gpu"), gpu.BOUND)
    for a, b in zip(whole, data.run("gpu")):
        a, b = (x.float().nan_to_num(neginf=0.0) for x in (a, b))
        assert float((a - b).norm() / b.norm()) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("pair", product(("bf16", "q8_0", "turbo3"), ("bf16", "turbo4", "tq8")))
def test_a_query_alone_is_the_query_among_many(pair, kernels, backend_here):
    """Prefill and decode must agree for every pair of formats: the last query of many, and the same query alone."""
    backend_here("gpu")
    data = inputs(case(*pair, (128, 128), dtype=BF16, causal=True, **SIZES).on("cuda"))
    many = attend(data.q, data.view, backend="gpu")
    one = attend(data.q[:, :, -1:].contiguous(), data.view, backend="gpu")
    assert float((many[:, :, -1:].float() - one.float()).norm() / one.float().norm()) < 6e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (512, 512), (576, 512)])
@pytest.mark.parametrize("features", [dict(causal=True), dict(causal=True, window=100), dict(softcap=20.0)], ids=str)
def test_two_runs_are_bitwise_equal(dims, features, kernels, backend_here):
    backend_here("gpu")
    data = inputs(case("bf16", "turbo4" if dims[0] == 128 else "bf16", dims, dtype=BF16, **SIZES, **features).on("cuda"))
    first = data.run("gpu")
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, data.run("gpu")))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", (64, 128, 256, 512))
def test_a_block_map_changes_no_bit(dim, kernels, backend_here):
    """The map is an optimisation: skipped and unread tiles give the same bits as looking at all of the mask."""
    backend_here("gpu")
    for name in ("block_map", "bool_block_map"):
        settings = SIZES | dict(FEATURES[name]) | dict(q_len=300, kv_len=700, dtype=BF16)
        data = inputs(case("bf16", "bf16", (dim, dim), **settings).on("cuda"))
        with_map = data.run("gpu")
        options = {k: v for k, v in data.options.items() if k != "block_map"}
        without = attend(data.q, data.view, **options, backend="gpu", return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(with_map, without))


def test_plans_fit():
    """Every problem has a kernel whose shared memory fits, with at least two stages of each operand."""
    for (dk, dv), mask, out in product(HEADS, (0, 1), (BF16, torch.float32)):
        spec = case("bf16", "bf16", (dk, dv), q_len=100, dtype=BF16, device="cuda").spec
        made = shapes.shape(spec, (dk, dv), (BF16, F16, out), mask)
        assert made.shared <= 232448 and min(made.stages) >= 2
        assert made.dk % 64 == made.dv % 64 == 0 and made.dk >= dk and made.dv >= dv


def test_explain_says_why_decode_serves():
    assert "q_len=32 (below 33" in shapes.why_not(case("bf16", "bf16", q_len=32, dtype=BF16).spec)
    assert shapes.why_not(case("bf16", "bf16", q_len=33, kv_len=40).spec) == "dtype=torch.float32"
    assert shapes.why_not(case("bf16", "bf16", q_len=33, kv_len=40, dtype=BF16, starts=True).spec) == "the feature starts"
    assert shapes.why_not(case("q8_0", "tq5", q_len=33, kv_len=40, dtype=F16).spec) == ""
    assert "gpu" in explain(case("bf16", "bf16", dtype=BF16, device="cuda").spec)
