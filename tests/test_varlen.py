"""Sequences behind each other in one tensor: does each get what it gets alone?"""

from __future__ import annotations

import pytest
import torch

from gyrokv import BACKENDS, Codec, KVView, LayerCache, Unsupported, attend, attend_varlen, attention_varlen, reference
from gyrokv.backends.gpu import nvrtc
from gyrokv.cases import case
from gyrokv.testing import inputs

BF16 = torch.bfloat16
LENGTHS = ((5, 5), (40, 70), (0, 3), (130, 300), (1, 128), (33, 10), (2, 0))  # of queries and of keys
SETTINGS = [dict(), dict(causal=False), dict(window=20), dict(softcap=5.0), dict(scale=0.5), dict(sinks=True)]


def bounds(lengths, device: str, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


def packed(lengths, dims: tuple[int, int], dtype: torch.dtype, device: str):
    """q, k, v and their bounds."""
    made = torch.Generator().manual_seed(0)
    totals = [sum(n) for n in zip(*lengths)]

    def rows(total: int, heads: int, dim: int) -> torch.Tensor:
        return torch.randn(total, heads, dim, generator=made).to(device, dtype)

    tensors = rows(totals[0], 8, dims[0]), *(rows(totals[1], 2, d) for d in dims)
    return *tensors, *(bounds(n, device) for n in zip(*lengths))


def alone(q, k, v, cu_q, cu_k, **options):
    """float64, sequence by sequence: (out, lse), packed too."""
    found = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]):
        rows = (x.transpose(0, 1)[None].double() for x in (q[a:b], k[c:d], v[c:d]))
        found.append(reference.attention(*rows, **options))
    return torch.cat([out[0].transpose(0, 1) for out, _ in found]), torch.cat([lse[0] for _, lse in found], dim=1)


def assert_near(found, exact, bound: float) -> None:
    for a, b in zip(found, exact):
        seen = torch.isfinite(b)
        assert torch.equal(torch.isfinite(a), seen) and float((a[seen] - b[seen]).norm() / b[seen].norm()) < bound


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "metal"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("dims", "dtype"), [((64, 64), torch.float32), ((192, 128), BF16), ((512, 512), BF16)], ids=str)
def test_each_sequence_is_as_it_is_alone(name, settings, dims, dtype, backend_here, device):
    backend_here(name)
    if (name == "gpu") != (device == "cuda") and name in ("cpu", "gpu"):
        return  # backends of another device refuse it, which is told with the cases
    data = packed(LENGTHS, dims, dtype, device)
    options = dict(causal=True) | settings
    if "sinks" in settings:
        options["sinks"] = torch.randn(8, generator=torch.Generator().manual_seed(1)).to(device)
    found = attention_varlen(*data, 130, 300, return_lse=True, backend=name, **options)
    assert found[0].shape == (*data[0].shape[:2], dims[1]) and found[0].dtype == dtype
    assert_near(found, alone(*data, **options), 8e-3 if dtype == BF16 else 1e-3)
    looser = attention_varlen(*data, 1000, 5000, return_lse=True, backend=name, **options)
    assert_near(looser, [x.double() for x in found], 8e-3 if dtype == BF16 else 1e-3)


def test_metal_refuses_lengths_on_the_device():
    with pytest.raises(Unsupported, match="lengths"):
        attention_varlen(*packed(LENGTHS, (64, 64), torch.float32, "cpu"), 130, 300, backend="metal")


def test_rows_that_fill_pages_are_read_where_they_lie(device):
    """128 divides the number of keys: nothing is copied, and what lies between heads may be anything."""
    q, k, v, *cu = packed(((10, 100), (20, 156)), (64, 64), BF16, device)
    wide = torch.full((256, 4, 64), torch.nan, dtype=BF16, device=device)
    wide[:, 1:3] = k
    a, b = (attention_varlen(q, x, v, *cu, 20, 156) for x in (k, wide[:, 1:3]))
    assert torch.equal(a, b)


def test_queries_of_a_cache(device):
    """Several queries for each sequence of a quantised cache, of different number."""
    layer = LayerCache(Codec("q8_0", 64), Codec("turbo4", 64), batch=3, kv_heads=2, dtype=BF16, device=device)
    made = torch.Generator().manual_seed(0)
    k, v = (torch.randn(3, 2, 100, 64, generator=made).to(device, BF16) for _ in "kv")
    view = layer.append(k, v)
    counts = (3, 0, 40)
    q, cu = torch.randn(43, 8, 64, generator=made).to(device, BF16), bounds(counts, device, torch.int64)
    out, lse = attend_varlen(q, layer, cu, 40, return_lse=True)
    kept = [view.heads(side, torch.float64) for side in "kv"]
    for b, (first, stop) in enumerate(zip(cu[:-1], cu[1:])):
        exact = reference.attention(q[first:stop].transpose(0, 1)[None].double(), *(x[b : b + 1] for x in kept), causal=True)
        if counts[b]:
            assert_near((out[first:stop].transpose(0, 1), lse[:, first:stop]), (exact[0][0], exact[1][0]), 8e-3)


def test_nothing_to_ask(device):
    q, k, v, cu_q, cu_k = packed(((0, 5), (0, 9)), (64, 64), BF16, device)
    out, lse = attention_varlen(q, k, v, cu_q, cu_k, 1, 9, return_lse=True)
    assert out.shape == (0, 8, 64) and lse.shape == (8, 0)


def test_wrong_bounds_are_refused():
    q, k, v, cu_q, cu_k = packed(((5, 7), (3, 9)), (64, 64), BF16, "cpu")
    for wrong, error, text in (
        (dict(cu_seqlens_q=cu_q.float()), TypeError, "cu_seqlens_q has dtype torch.float32; it must be int32 or int64"),
        (dict(cu_seqlens_q=cu_q[None]), ValueError, r"cu_seqlens_q has shape \(1, 3\)"),
        (dict(cu_seqlens_q=cu_q + 1), ValueError, r"cu_seqlens_q=\[1, 6, 9\] does not rise from 0 to 8"),
        (dict(cu_seqlens_k=cu_k.flip(0)), ValueError, r"cu_seqlens_k=\[16, 7, 0\] does not rise from 0 to 16"),
        (
            dict(cu_seqlens_q=bounds((5, 1, 2), "cpu")),
            ValueError,
            "cu_seqlens_q is of 3 sequences, but there are keys of batch=2",
        ),
        (dict(max_seqlen_q=4), ValueError, "max_seqlen_q=4 is less than 5 tokens of a sequence of q"),
        (dict(max_seqlen_k=8), ValueError, "max_seqlen_k=8 is less than 9 tokens of a sequence of k"),
        (dict(max_seqlen_q=0), ValueError, "max_seqlen_q=0 must be at least 1"),
        (dict(q=q[None]), ValueError, r"q has shape \(1, 8, 8, 64\); it must be \[total_q, Hq, D\]"),
        (dict(v=v[1:]), ValueError, r"k has shape \(16, 2, 64\) but v \(15, 2, 64\)"),
        (dict(k=k[0], v=v[0]), ValueError, r"both must be \[total_k, Hkv, D\]"),
        (dict(mask=torch.ones(5, 5, dtype=torch.bool)), ValueError, "mask is given, but sequences of different lengths"),
    ):
        given = dict(q=q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=5, max_seqlen_k=9)
        with pytest.raises(error, match=text):
            attention_varlen(**(given | wrong))


FAULTS = {  # in the sources of Hopper's prefill: a piece, there once, and what it becomes
    "queries_are_those_of_the_sequence_before": ("prefill.cuh", "q_shift = end - p.q_len,", "q_shift = end - p.q_len - 1,"),
    "rows_before_a_sequence_are_written": ("prefill.cuh", "(row < begin_row || ", "("),
    "keys_begin_with_those_of_the_first": ("prefill.cuh", "load(0, key + tile.k_shift, 0);", "load(0, key, 0);"),
    "keys_of_the_next_sequence_are_seen": ("prefill.cuh", "own_end = max(0, min(keys, p.kv_len)),", "own_end = p.kv_len,"),
    "positions_are_those_of_the_longest": ("prefill.cuh", "own_first = own_end - p.q_len;", "own_first = p.first;"),
    "a_tile_of_the_first_rows_is_left_out": ("prefill.cuh", "row + POSITIONS <= begin_of_rows()", "row < begin_of_rows()"),
}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dim", (64, 512))
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_noticed(fault, dim, backend_here):
    backend_here("gpu")
    data = packed(LENGTHS, (dim, dim), BF16, "cuda")
    exact = alone(*data, causal=True)
    assert_near(attention_varlen(*data, 130, 300, return_lse=True, backend="gpu"), exact, 8e-3)
    with nvrtc.sources([FAULTS[fault]]), pytest.raises(AssertionError):
        assert_near(attention_varlen(*data, 130, 300, return_lse=True, backend="gpu"), exact, 8e-3)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_of_the_sources(fault):
    with nvrtc.sources([FAULTS[fault]]):
        assert nvrtc._sources() != nvrtc._files()


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (512, 512)], ids=str)
@pytest.mark.parametrize("k", ("bf16", "q8_0"))
def test_many_queries_of_a_cache_on_the_gpu(k, dims, backend_here):
    """Queries behind each other, keys in a batch, also in pages, of lengths that the device knows."""
    backend_here("gpu")
    for kind in (dict(lengths=True), dict(starts=True), dict(paged=True, lengths=True)):
        sizes = dict(batch=3, q_heads=8, kv_heads=2, q_len=70, kv_len=700, dtype=BF16, causal=True, device="cuda")
        data = inputs(case(k, "bf16", dims, **sizes, **kind))
        counts = (70, 33, 1)
        rows = torch.cat([data.q[b, :, 70 - n :].transpose(0, 1) for b, n in enumerate(counts)])
        found = attend_varlen(rows, data.view, bounds(counts, "cuda"), 70, return_lse=True, backend="gpu")
        out, lse = attend(data.q, data.view, return_lse=True, backend="gpu")
        exact = (
            torch.cat([out[b, :, 70 - n :].transpose(0, 1) for b, n in enumerate(counts)]).double(),
            torch.cat([lse[b, :, 70 - n :] for b, n in enumerate(counts)], dim=1).double(),
        )
        assert_near(found, exact, 4e-3)


@pytest.mark.gpu
def test_what_does_not_fit_its_bounds_is_nan(backend_here):
    """Nobody waits for the GPU to read bounds, and nothing may be lost in silence."""
    backend_here("gpu")
    data = packed(((40, 70), (130, 300), (5, 5)), (64, 64), BF16, "cuda")
    right = attention_varlen(*data, 130, 300)
    queries, keys = attention_varlen(*data, 100, 300), attention_varlen(*data, 130, 290)
    for found in (queries, keys):
        assert torch.isnan(found[40:170]).all()
        for rows in (slice(0, 40), slice(170, 175)):
            assert float((found[rows].float() - right[rows].float()).norm() / right[rows].float().norm()) < 8e-3
    for wild in (10**9, -5):
        cu = data[3].clone()
        cu[2] = wild
        assert torch.isnan(attention_varlen(*data[:3], cu, data[4], 130, 300)[40:]).any()
    assert torch.equal(attention_varlen(*data, 130, 300), right)


def test_a_view_of_one_sequence_is_the_plain_one():
    q, k, v, *cu = packed(((9, 20),), (64, 64), torch.float32, "cpu")
    plain = KVView.of(*(x.transpose(0, 1)[None] for x in (k, v)))
    out = attend_varlen(q, plain, cu[0], 9)
    assert float((out - attention_varlen(q, k, v, *cu, 9, 20)).abs().max()) < 1e-5
