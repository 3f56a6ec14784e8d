"""Does the one definition of attention mean what it should? Against PyTorch, closed forms and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from gyrokv import merge
from gyrokv.masks import LOWEST
from gyrokv.reference import attention
from gyrokv.spec import alibi_slopes

INF = math.inf


def sample(q_len=5, kv_len=9, q_heads=6, kv_heads=2, batch=2, dim=16, seed=0):
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, q_heads, q_len, dim, generator=random, dtype=torch.float64)
    k, v = (torch.randn(batch, kv_heads, kv_len, d, generator=random, dtype=torch.float64) for d in (dim, dim + 8))
    return q, k, v


def brute_force(q, k, v, *, scale=None, softcap=0.0, seen=None, bias=None, sinks=None):
    """One query and one key at a time, in the order of the description."""
    groups = q.shape[1] // k.shape[1]
    out, lse = (
        torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64),
        torch.full(q.shape[:3], -INF, dtype=torch.float64),
    )
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                scores, values = [], []
                for j in range(k.shape[2]):
                    if seen is not None and not seen(b, h, i, j):
                        continue
                    s = float(q[b, h, i] @ k[b, h // groups, j]) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
                    s = softcap * math.tanh(s / softcap) if softcap else s
                    scores.append(s + (bias(b, h, i, j) if bias else 0.0))
                    values.append(v[b, h // groups, j])
                total = sum(math.exp(s) for s in scores) + (math.exp(float(sinks[h])) if sinks is not None else 0.0)
                if total:
                    lse[b, h, i] = math.log(total)
                for s, value in zip(scores, values):
                    out[b, h, i] += math.exp(s) / total * value
    return out, lse


def agree(got, want):
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "additive", "scale"])
def test_against_pytorch(kv_heads, kind):
    """The same numbers as PyTorch's own attention, with grouped heads."""
    q, k, v = sample(q_len=9, kv_heads=kv_heads)
    seen = torch.rand(2, 6, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.7
    seen[..., 0] = True
    bias = torch.randn(2, 1, 9, 9, generator=torch.Generator().manual_seed(2))
    mine, theirs = {
        "plain": ({}, {}),
        "causal": ({"causal": True}, {"is_causal": True}),
        "bool": ({"mask": seen}, {"attn_mask": seen}),
        "additive": ({"mask": bias}, {"attn_mask": bias.double()}),
        "scale": ({"scale": 0.3}, {"scale": 0.3}),
    }[kind]
    want = scaled_dot_product_attention(q, k, v, enable_gqa=True, **theirs)
    torch.testing.assert_close(attention(q, k, v, **mine)[0], want, rtol=1e-10, atol=1e-12)


def test_causal_is_aligned_to_the_bottom_right():
    """The last query sees all keys, whatever the lengths; more queries than keys leave rows without any."""
    for q_len, kv_len in ((3, 8), (8, 3), (1, 5)):
        q, k, v = sample(q_len, kv_len)
        want = brute_force(q, k, v, seen=lambda b, h, i, j, d=kv_len - q_len: j <= i + d)
        agree(attention(q, k, v, causal=True), want)


def test_everything_at_once_by_brute_force():
    """The order of operations: scale, softcap, biased by each head's slope, masked, sinks in the denominator."""
    q, k, v = sample(q_len=4, kv_len=7)
    mask = torch.randn(2, 1, 4, 7, generator=torch.Generator().manual_seed(3))
    mask[0, 0, 1] = -INF
    mask[1, 0, 2, ::2] = LOWEST
    sinks = torch.randn(6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    starts = torch.tensor([0, 2])
    slopes = alibi_slopes(6, 8.0)

    def seen(b, h, i, j):
        distance = i + 3 - j
        return 0 <= distance < 4 and j >= int(starts[b]) and float(mask[b, 0, i, j]) > LOWEST

    def bias(b, h, i, j):
        return float(mask[b, 0, i, j]) * float(slopes[h])

    got = attention(q, k, v, scale=0.4, causal=True, window=4, softcap=1.5, mask=mask, alibi=8.0, sinks=sinks, starts=starts)
    agree(got, brute_force(q, k, v, scale=0.4, softcap=1.5, seen=seen, bias=bias, sinks=sinks))


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_window_by_brute_force(window):
    """A query sees itself and the window - 1 positions before it, causal or not."""
    q, k, v = sample(q_len=6, kv_len=11)
    want = brute_force(q, k, v, seen=lambda b, h, i, j: 0 <= i + 5 - j < window)
    agree(attention(q, k, v, window=window), want)
    agree(attention(q, k, v, window=window, causal=True), want)


def test_equal_scores_give_the_mean_of_the_prefix():
    """Closed form: with q = 0 the causal output is the running mean, and lse the logarithm of the count."""
    _, k, v = sample(q_len=9)
    out, lse = attention(torch.zeros(2, 6, 9, 16), k, v, causal=True)
    counts = torch.arange(1.0, 10.0, dtype=torch.float64)
    mean = v.cumsum(2) / counts[:, None]
    torch.testing.assert_close(out, mean.repeat_interleave(3, 1))
    torch.testing.assert_close(lse, counts.log().expand(2, 6, 9))


def test_one_large_score_picks_its_value():
    """Closed form: a score far above the others gives that key's value."""
    _, k, v = sample(kv_heads=6)
    q = 1e3 * k[:, :, [4]] / k[:, :, [4]].norm(dim=-1, keepdim=True) * torch.ones(1, 1, 5, 1, dtype=torch.float64)
    same = (k @ k[:, :, 4, :, None]).squeeze(-1).argmax(-1) == 4
    out, _ = attention(q, k, v, scale=10.0)
    torch.testing.assert_close(out[same], v[:, :, [4]].expand_as(out)[same])


# -- rows that see nothing


@pytest.mark.parametrize("masked", [-INF, LOWEST, torch.finfo(torch.bfloat16).min, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_without_a_visible_key(masked, with_sinks):
    """Out is 0, lse is -inf or the sink: a masked value means hidden, never very unlikely, and never NaN."""
    q, k, v = sample()
    mask = torch.zeros(5, 9, dtype=torch.bfloat16 if masked < -1e38 and masked > -INF else torch.float32)
    mask[2] = masked
    sinks = torch.arange(6.0, dtype=torch.float64) if with_sinks else None
    out, lse = attention(q, k, v, mask=mask, sinks=sinks)
    assert (out[:, :, 2] == 0).all() and not out.isnan().any()
    assert torch.equal(lse[:, :, 2], (sinks if with_sinks else torch.full((6,), -INF).double()).expand(2, 6))
    kept = [0, 1, 3, 4]
    agree((out[:, :, kept], lse[:, :, kept]), attention(q[:, :, kept], k, v, sinks=sinks))


def test_boolean_masks_and_starts_leave_rows_empty_too():
    q, k, v = sample()
    mask = torch.ones(5, 9, dtype=torch.bool)
    mask[3] = False
    out, lse = attention(q, k, v, mask=mask)
    assert (out[:, :, 3] == 0).all() and (lse[:, :, 3] == -INF).all()
    out, lse = attention(q, k, v, causal=True, starts=torch.tensor([0, 7]))
    assert (out[1, :, :3] == 0).all() and (lse[1, :, :3] == -INF).all() and (lse[1, :, 3:] > -INF).all()


def test_the_value_above_the_limit_is_a_number():
    """-65280 is the next bfloat16 above the limit: it is a bias, and alone it hides nothing."""
    q, k, v = sample()
    mask = torch.full((5, 9), -65280.0, dtype=torch.bfloat16)
    torch.testing.assert_close(attention(q, k, v, mask=mask)[0], attention(q, k, v)[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_no_keys(with_sinks):
    q, k, v = sample(kv_len=0)
    sinks = torch.arange(6.0) if with_sinks else None
    out, lse = attention(q, k, v, sinks=sinks)
    assert out.shape == (2, 6, 5, 24) and (out == 0).all()
    assert torch.equal(
        lse, (sinks.double() if with_sinks else torch.tensor(-INF).double().expand(6))[:, None].expand(2, 6, 5)
    )


# -- parts of the description one by one


def test_sinks_are_an_extra_key_with_the_value_zero():
    """Closed form: the same as one more key whose score is the sink and whose value is nothing."""
    q, k, v = sample(kv_heads=6)
    sinks = torch.randn(6, dtype=torch.float64)
    zeros = torch.zeros(2, 6, 1, 16, dtype=torch.float64), torch.zeros(2, 6, 1, 24, dtype=torch.float64)
    bias = torch.zeros(1, 6, 1, 10)
    bias[0, :, 0, 9] = sinks.float()
    want = attention(q, torch.cat((k, zeros[0]), 2), torch.cat((v, zeros[1]), 2), mask=bias.expand(1, 6, 5, 10))
    agree(attention(q, k, v, sinks=sinks.float().double()), want)


def test_alibi_slopes_are_the_published_ones():
    """8 heads: halves; 12 heads: those, then every other one of 16 heads."""
    assert alibi_slopes(8, 8.0).tolist() == [2.0 ** -(h + 1) for h in range(8)]
    sixteen = [2.0 ** (-0.5 * (h + 1)) for h in range(16)]
    torch.testing.assert_close(
        alibi_slopes(12, 8.0), torch.tensor([2.0 ** -(h + 1) for h in range(8)] + sixteen[0:8:2], dtype=torch.float64)
    )
    assert alibi_slopes(1, 8.0).tolist() == [2.0**-8]


def test_alibi_multiplies_the_mask_by_the_slope():
    q, k, v = sample(q_len=9, q_heads=8)
    distance = (torch.arange(9)[None] - torch.arange(9)[:, None]).float()
    want = attention(q, k, v, mask=(distance * alibi_slopes(8, 8.0)[:, None, None])[None].float(), causal=True)
    agree(attention(q, k, v, mask=distance, alibi=8.0, causal=True), want)


def test_softcap_bounds_scores_and_vanishes_when_large():
    q, k, v = sample()
    for cap, like in ((1e-9, 0 * q), (1e6, q)):
        got, want = attention(q, k, v, softcap=cap)[0], attention(like, k, v)[0]
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_positions_decide_not_the_order_of_keys():
    """A ring holds keys in another order; with their positions the result is that of the linear layer."""
    q, k, v = sample(q_len=3, kv_len=9)
    order = torch.tensor([6, 7, 8, 0, 1, 2, 3, 4, 5])
    got = attention(
        q, k[:, :, order], v[:, :, order], causal=True, window=5, k_positions=order + 40, q_positions=torch.arange(46, 49)
    )
    agree(got, attention(q, k, v, causal=True, window=5))


def test_starts_hide_left_padding():
    """A padded sequence gives what the same sequence gives alone."""
    q, k, v = sample(q_len=9)
    out, lse = attention(q, k, v, causal=True, starts=torch.tensor([0, 4]))
    alone = attention(q[1:, :, 4:], k[1:, :, 4:], v[1:, :, 4:], causal=True)
    agree((out[1:, :, 4:], lse[1:, :, 4:]), alone)


def test_dtype_is_that_of_the_computation():
    q, k, v = sample()
    exact, plain = attention(q, k, v)[0], attention(q, k, v, dtype=torch.float32)[0]
    assert plain.dtype == torch.float32
    assert 0 < float((plain - exact).abs().max()) < 1e-5


# -- merge


@pytest.mark.parametrize("with_sinks", [False, True])
def test_parts_merge_to_the_whole(with_sinks):
    """Splits, an empty one included, give the whole; sinks count once, at the end."""
    q, k, v = sample()
    sinks = torch.randn(6, dtype=torch.float64) if with_sinks else None
    parts = [attention(q, k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 4), (4, 4), (4, 5), (5, 9))]
    agree(merge(parts, sinks), attention(q, k, v, sinks=sinks))


def test_merging_nothing_visible():
    """Parts that saw nothing have no weight; if none saw anything the result says so."""
    q, k, v = sample()
    empty = attention(q, k[:, :, :0], v[:, :, :0])
    out, lse = merge([empty, empty])
    assert (out == 0).all() and (lse == -INF).all()
    sinks = torch.arange(6.0, dtype=torch.float64)
    out, lse = merge([empty], sinks)
    assert (out == 0).all() and torch.equal(lse[0, :, 0], sinks)
    agree(merge([attention(q, k, v)]), attention(q, k, v))
    with pytest.raises(ValueError, match="parts is empty"):
        merge([])
