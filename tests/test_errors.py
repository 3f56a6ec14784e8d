"""Every check of a call, each with a message that names the argument, its value and the limit; nothing changes on error."""

from __future__ import annotations

import math

import pytest
import torch

from gyrokv import (
    BlockMap,
    CapacityError,
    Codec,
    FormatError,
    GyroKVError,
    KVView,
    LayerCache,
    Unsupported,
    attend,
    attention,
    explain,
)
from gyrokv.backends import tiled
from gyrokv.spec import AttentionSpec
from gyrokv.testing import poison_dead

META = torch.device("meta")


def q(batch=2, heads=4, tokens=3, dim=32, **options):
    return torch.randn(batch, heads, tokens, dim, **options)


def kv(batch=2, heads=2, tokens=9, dim=32, dim_v=None, **options):
    return torch.randn(batch, heads, tokens, dim, **options), torch.randn(batch, heads, tokens, dim_v or dim, **options)


def layer(k="turbo4", v="q8_0", dim=32, dim_v=None, **options) -> LayerCache:
    options = dict(batch=2, kv_heads=2) | options
    return LayerCache(Codec(k, dim, kv_heads=2), Codec(v, dim_v or dim, kv_heads=2), **options)


def filled(tokens=9, **options) -> LayerCache:
    made = layer(**options)
    made.append(*kv(tokens=tokens))
    return made


# -- attend: (what is wrong, error, what the message says)

WRONG_CALLS = {
    "rank": (dict(q=torch.ones(3, 32)), ValueError, r"q has shape \(3, 32\); it must be \[B, Hq, Tq, D\]"),
    "head_dim": (dict(q=q(dim=64)), ValueError, "q has head_dim=64 but the cache's keys have head_dim=32"),
    "batch": (dict(q=q(batch=3)), ValueError, "q has batch=3 but the cache holds batch=2"),
    "q_heads": (dict(q=q(heads=5)), ValueError, "q_heads=5 is not a multiple of kv_heads=2"),
    "no_heads": (dict(q=q(heads=0)), ValueError, "q_heads=0 must be at least 1"),
    "no_queries": (dict(q=q(tokens=0)), ValueError, "q_len=0 must be at least 1"),
    "stride": (dict(q=q(tokens=32).mT), ValueError, r"q has stride 32 in its last axis, not 1; call .contiguous\(\)"),
    "dtype": (dict(q=q().long()), TypeError, "dtype=torch.int64 is not supported; dtypes are"),
    "grad": (dict(q=q().requires_grad_()), ValueError, "q requires grad, but attention over a cache has no gradient"),
    "device": (dict(q=q(device=META)), ValueError, "q is on meta but the cache is on cpu"),
    "window": (dict(window=0), ValueError, "window=0 must be at least 1"),
    "softcap": (dict(softcap=-1.0), ValueError, "softcap=-1.0 must be finite and >= 0"),
    "softcap_nan": (dict(softcap=math.nan), ValueError, "softcap=nan must be finite and >= 0"),
    "softcap_inf": (dict(softcap=math.inf), ValueError, "softcap=inf must be finite and >= 0"),
    "scale_nan": (dict(scale=math.nan), ValueError, "scale=nan must be finite"),
    "scale_inf": (dict(scale=-math.inf), ValueError, "scale=-inf must be finite"),
    "alibi": (dict(alibi=-8.0, mask=torch.zeros(3, 9)), ValueError, "alibi=-8.0 must be finite and >= 0"),
    "alibi_alone": (dict(alibi=8.0), ValueError, "alibi=8.0 scales an additive mask, but mask=None"),
    "alibi_bool": (dict(alibi=8.0, mask=torch.ones(3, 9) > 0), ValueError, "alibi=8.0 .* mask='bool'"),
    "sinks": (dict(sinks=torch.ones(2)), ValueError, r"sinks has shape \(2,\), torch.float32; .* \[q_heads=4\]"),
    "sinks_rank": (dict(sinks=torch.ones(4, 1)), ValueError, r"sinks has shape \(4, 1\)"),
    "sinks_dtype": (dict(sinks=torch.ones(4).int()), ValueError, r"sinks .* torch.int32; it must be floating"),
    "sinks_device": (dict(sinks=torch.ones(4, device=META)), ValueError, "sinks is on meta but q is on cpu"),
    "mask_rank": (dict(mask=torch.zeros(4, 3, 9)), ValueError, r"mask has 3 axes; it must have 2 \[q_len, kv_len\] or 4"),
    "mask_batch": (dict(mask=torch.zeros(3, 1, 3, 9)), ValueError, "its batch axis is 3 and must be 1 or 2"),
    "mask_heads": (dict(mask=torch.zeros(2, 2, 3, 9)), ValueError, "its q_heads axis is 2 and must be 1 or 4"),
    "mask_q_len": (dict(mask=torch.zeros(2, 4, 4, 9)), ValueError, "its q_len axis is 4 and must be 1 or 3"),
    "mask_kv_len": (dict(mask=torch.zeros(3, 8)), ValueError, r"its kv_len axis is 8 and must be 1 or 9 .*\[2, 4, 3, 9\]"),
    "mask_dtype": (dict(mask=torch.zeros(3, 9).double()), TypeError, "mask has dtype torch.float64; it must be bool"),
    "mask_int": (dict(mask=torch.zeros(3, 9).int()), TypeError, "mask has dtype torch.int32"),
    "mask_device": (dict(mask=torch.zeros(3, 9, device=META)), ValueError, "mask is on meta but q is on cpu"),
    "backend": (dict(backend="cuda"), ValueError, r"backend='cuda' is not one of \['auto', 'cpu', 'gpu', 'metal', 'torch'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls(name):
    """An argument that does not fit must be named, not broadcast, ignored or found by a kernel."""
    wrong, error, message = WRONG_CALLS[name]
    options = {"q": q()} | wrong
    with pytest.raises(error, match=message):
        attend(options.pop("q"), filled(), **options)


@pytest.mark.parametrize(
    ("k", "v", "error", "message"),
    [
        (*kv(dim=33), ValueError, r"head_dim=33 is not supported; head sizes are \(32, 40"),
        (*kv(dim=64, dim_v=32), ValueError, r"head_dim=64 with head_dim_v=32 is not supported; unequal pairs are"),
        (*kv(dim=128, dim_v=192), ValueError, "head_dim=128 with head_dim_v=192 is not supported"),
        (torch.ones(2, 9, 32), torch.ones(2, 9, 32), ValueError, r"k has shape \(2, 9, 32\) .* must be \[B, Hkv, Tkv, D\]"),
        (kv()[0], kv(tokens=8)[1], ValueError, "all but the last axis must agree"),
        (kv()[0], kv()[1].to(META), ValueError, "k is on cpu but v is on meta"),
        (kv(tokens=32)[0].mT, kv(tokens=32)[1], ValueError, r"k has stride 32 in its last axis, not 1"),
        (kv()[0], kv(tokens=32)[1].mT[:, :, :9], ValueError, r"v has stride"),
        (*(x.double() for x in kv()), FormatError, "dtype torch.float64 is no dense format"),
        (*kv(batch=0), ValueError, "batch=0 must be at least 1"),
        (*kv(heads=0), ValueError, "kv_heads=0 must be at least 1"),
    ],
)  # fmt: skip
def test_wrong_tensors(k, v, error, message):
    """The same for keys and values that are plain tensors."""
    with pytest.raises(error, match=message):
        attention(q(batch=k.shape[0] if k.ndim == 4 else 2, dim=k.shape[-1]), k, v)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (dict(kv_len=-1), ValueError, "kv_len=-1 must be at least 0"),
        (dict(mask="soft"), ValueError, "mask='soft' is not one of"),
        (dict(block_map=True), ValueError, "block_map was given without the mask that it was built for"),
        (dict(head_dim=0), ValueError, "head_dim=0 must be at least 1"),
        (dict(head_dim=192, head_dim_v=64), ValueError, "head_dim=192 with head_dim_v=64"),
        (dict(k_format="tq4.v1", head_dim=576, head_dim_v=576), FormatError, "head_dim=576: format tq4.v1"),
        (dict(v_format="nothing"), FormatError, "unknown format 'nothing'"),
        (dict(dtype=torch.int8), TypeError, "dtype=torch.int8 is not supported"),
    ],
)
def test_wrong_problems(wrong, error, message):
    """A problem that makes no sense cannot be written down."""
    with pytest.raises(error, match=message):
        AttentionSpec(**(dict(k_format="q8_0", v_format="q8_0", head_dim=64, head_dim_v=64) | wrong))


def test_unequal_pairs_are_supported_and_others_may_be_stored():
    for dim, dim_v in ((192, 128), (320, 256), (576, 512)):
        assert AttentionSpec("q8_0", "turbo4", dim, dim_v).head_dim_v == dim_v
    odd = layer(dim=64, dim_v=32)
    odd.append(*kv(dim=64, dim_v=32))
    with pytest.raises(ValueError, match="head_dim=64 with head_dim_v=32 is not supported"):
        attend(q(dim=64), odd)


def test_masks_broadcast_only_where_axes_are_one():
    """A block map needs the whole last axes: tiles of a broadcast axis are not tiles of the problem."""
    k, v = kv(tokens=700)
    for shape in ((3, 1), (1, 1, 1, 700)):
        mask = torch.ones(shape, dtype=torch.bool)
        attention(q(), k, v, mask=mask)
        with pytest.raises(ValueError, match=r"with a block_map its last axes must be \[q_len, kv_len\] = \[3, 700\]"):
            attention(q(), k, v, mask=mask, block_map=BlockMap.build(mask, (3, 512)))


def test_unsupported_lists_every_backend_with_every_reason():
    """No silent fallback: the error says what was tried and why each refused, before anything runs."""
    with pytest.raises(Unsupported) as refusal:
        attend(q().double(), filled())
    text = str(refusal.value)
    assert text.startswith("backend='auto' cannot run this\nproblem: turbo4.q8_0-d32-b2-q3-kv9-h4.2-causal-float64-cpu")
    assert "torch: cannot run because\n    dtype=torch.float64 (it computes in float32)" in text
    assert "reference: can run; never chosen, ask for it by name" in text
    assert attend(q().double(), filled(), backend="reference").dtype == torch.float64
    spec = AttentionSpec("q8_0", "q8_0", 64, 64)
    assert explain(spec).count("can run (chosen)") == 1 and "torch: can run" in explain(spec)
    assert isinstance(refusal.value, NotImplementedError) and tiled.why_not(spec) == []


def test_ring_history():
    """A ring that has dropped what a query looks back on says so, instead of attending to less."""
    ring = layer(window=20)
    view = ring.append(*kv(tokens=150))
    attend(q(tokens=150), view, window=20)
    with pytest.raises(CapacityError, match="q has 150 tokens that look back to position 0, but the ring holds 86 to 149"):
        attend(q(tokens=150), ring, window=20)
    for window in (21, None):
        with pytest.raises(ValueError, match=f"window={window}, but this layer keeps a sliding window of 20"):
            attend(q(tokens=1), ring, window=window)
    attend(q(tokens=45), ring, window=20)
    with pytest.raises(CapacityError, match="q has 46 tokens that look back to position 85"):
        attend(q(tokens=46), ring, window=20)


def test_stale_views():
    """Rows may be other tokens' by now."""
    made = layer()
    view = made.append(*kv())
    for change in (
        lambda: made.append(*kv(tokens=1)),
        lambda: made.truncate(5),
        lambda: made.set_starts(torch.tensor([0, 1])),
        lambda: made.select(torch.tensor([1, 0])),
        made.reset,
    ):
        view = made.view()
        change()
        with pytest.raises(GyroKVError, match="this view is out of date"):
            attend(q(tokens=1), view)


# -- LayerCache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch=0), "batch=0 must be at least 1"),
        (dict(kv_heads=0), "kv_heads=0 must be at least 1"),
        (dict(window=0), "window=0 must be at least 1"),
        (dict(sinks=-1), "sinks=-1 must be at least 0"),
        (dict(recent=-1), "recent=-1 must be at least 0"),
        (dict(capacity=-1), "capacity=-1 must be at least 0"),
        (dict(dim=33), "head_dim=33 is not supported"),
        (dict(dtype=torch.float64), "dtype torch.float64 is no dense format"),
    ],
)
def test_wrong_layers(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)


def spoiled(value: float) -> torch.Tensor:
    x = kv(tokens=2)[0]
    x[1, 1, 1, 5] = value
    return x


GOOD = kv(tokens=2)
WRONG_TOKENS = {
    "k_rank": (GOOD[0][0], GOOD[1], ValueError, r"k has shape \(2, 2, 32\); this layer takes \[B=2, Hkv=2, T>=1, D=32\]"),
    "k_batch": (kv(batch=1)[0], GOOD[1], ValueError, r"k has shape \(1, 2, 9, 32\)"),
    "k_heads": (kv(heads=4)[0], GOOD[1], ValueError, r"k has shape \(2, 4, 9, 32\)"),
    "k_dim": (kv(dim=64)[0], GOOD[1], ValueError, r"k has shape \(2, 2, 9, 64\)"),
    "v_dim": (GOOD[0], kv(tokens=2, dim=64)[1], ValueError, r"v has shape \(2, 2, 2, 64\)"),
    "v_tokens": (GOOD[0], kv(tokens=3)[1], ValueError, r"v has shape \(2, 2, 3, 32\).*the same T for k and v"),
    "none": (*kv(tokens=0), ValueError, r"k has shape \(2, 2, 0, 32\)"),
    "k_device": (GOOD[0].to(META), GOOD[1], ValueError, "k is on meta but the cache is on cpu"),
    "v_device": (GOOD[0], GOOD[1].to(META), ValueError, "v is on meta but the cache is on cpu"),
    "k_dtype": (GOOD[0].int(), GOOD[1], TypeError, "k has dtype torch.int32; it must be floating point"),
    "v_dtype": (GOOD[0], GOOD[1].long(), TypeError, "v has dtype torch.int64"),
    "k_nan": (spoiled(math.nan), GOOD[1], ValueError, r"k holds 1 values that are NaN or inf \(of 256\)"),
    "v_inf": (GOOD[0], spoiled(-math.inf), ValueError, "v holds 1 values that are NaN or inf"),
    "capacity": (*kv(tokens=12), CapacityError, "9 tokens held and 12 more exceed capacity=20"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TOKENS)
def test_a_failed_append_changes_nothing(name):
    """Half a write, of K without V or of some heads, would be a cache that belongs to no text."""
    made = filled(capacity=20, grow=False, sinks=2, recent=4)
    poison_dead(made)
    view, raw = made.view(), [t.clone() for t in made.tensors]
    k, v, error, message = WRONG_TOKENS[name]
    with pytest.raises(error, match=message):
        made.append(k, v)
    assert made.length == 9 and all(a.view(torch.uint8).equal(b.view(torch.uint8)) for a, b in zip(raw, made.tensors))
    attend(q(), view)


def test_capacity_is_a_limit_only_when_it_may_not_grow():
    fixed = layer(capacity=20, grow=False)
    assert fixed.tensors[0].shape[-2] == 20
    fixed.append(*kv(tokens=20))
    with pytest.raises(CapacityError, match="20 tokens held and 1 more exceed capacity=20"):
        fixed.append(*kv(tokens=1))
    growing = layer(capacity=20)
    growing.append(*kv(tokens=300))
    assert growing.length == 300


def test_checking_can_be_turned_off():
    """For captured graphs: then a NaN is the caller's, and the append still works."""
    made = layer("f32", "f32", check=False)
    made.append(spoiled(math.nan), GOOD[1])
    assert made.length == 2


def test_wrong_starts_and_indices():
    made = filled()
    for starts, message in (
        (torch.tensor([1]), r"starts has shape \(1,\), torch.int64; it must be integer \[2\]"),
        (torch.tensor([0.0, 1.0]), "starts has shape .* torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            made.set_starts(starts)
    for index, message in (
        (torch.tensor([[0]]), r"index has shape \(1, 1\)"),
        (torch.tensor([0.0]), "torch.float32; it must be a non-empty"),
        (torch.tensor([], dtype=torch.int64), r"index has shape \(0,\)"),
        (torch.tensor([0, 2]), "index runs from 0 to 2; sequences are 0 to 1"),
        (torch.tensor([-1]), "index runs from -1 to -1"),
    ):
        with pytest.raises(ValueError, match=message):
            made.select(index)
    assert made.batch == 2 and made.starts is None


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_without_keys_the_result_is_zero(backend, with_sinks):
    """An empty cache is no error: out is 0 and lse -inf, or the sink."""
    sinks = torch.arange(4.0) if with_sinks else None
    for store in (layer(), layer(capacity=10), layer(window=5), KVView.of(*kv(tokens=0))):
        window = getattr(store, "window", None)
        out, lse = attend(q(), store, window=window, sinks=sinks, backend=backend, return_lse=True)
        assert out.shape == (2, 4, 3, 32) and (out == 0).all()
        want = sinks if with_sinks else torch.full((4,), -math.inf)
        assert torch.equal(lse, want[:, None].expand(2, 4, 3))
