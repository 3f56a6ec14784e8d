"""The mask function: recognised masks stay descriptions, all others are transformers' own, and both say the same."""

from __future__ import annotations

import pytest
import torch
from hf_models import FAMILIES, WINDOW, family
from transformers import DynamicCache
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import gyrokv
import gyrokv.hf as hf
from gyrokv.hf.attention import attention
from gyrokv.hf.handles import LayerLog
from gyrokv.hf.mask import mask

Q, PAST = 9, 30


def arguments(window: int | None = None, padded: bool = True, past: int = PAST) -> dict:
    first = 0 if window is None else max(0, past - window + 1)
    attention_mask = torch.ones(2, past + Q, dtype=torch.bool)
    attention_mask[0, : past - 3] = False
    f = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    return dict(
        batch_size=2, q_length=Q, kv_length=past + Q - first, q_offset=past, kv_offset=first, mask_function=f,
        attention_mask=attention_mask if padded else None, local_size=window,
    )  # fmt: skip


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 1, 8, 31, 100])
@pytest.mark.parametrize("past", [0, PAST])
def test_a_description_says_what_the_mask_says(window, padded, past):
    given = arguments(window, padded and past > 0, past)
    described, want = mask(**given), sdpa_mask(**given, allow_is_causal_skip=False)
    assert isinstance(described, hf.CausalMask) and described.shape == want.shape and described.dtype == torch.bool
    assert torch.equal(described.dense(), want)
    assert torch.equal(described & True, want)
    assert torch.equal(described[..., :5], want[..., :5])
    assert torch.equal(described[1:].to("cpu"), want[1:])
    tail = described[:, :, -4:, :]
    assert isinstance(tail, hf.CausalMask) and torch.equal(tail.dense(), want[:, :, -4:, :])
    assert isinstance(described.detach(), hf.CausalMask) and "kv_len" in repr(described)
    assert described.to(torch.float32).dtype == torch.float32


def test_a_long_prompt_needs_no_square_mask():
    length = 2**22  # the mask would have 2 ** 44 entries
    padding = torch.ones(1, length, dtype=torch.bool)
    padding[0, 0] = False
    described = mask(1, length, length, attention_mask=padding)
    assert described.shape == (1, 1, length, length) and described.pattern.keys.shape == (1, length)


@pytest.mark.parametrize(
    "change",
    [
        dict(mask_function=lambda b, h, q, k: k <= q),
        dict(mask_function=chunked_causal_mask_function(8, torch.zeros(2, dtype=torch.int64)), local_size=8),
        dict(mask_function=sliding_window_causal_mask_function(8), local_size=9),
        dict(q_offset=torch.tensor(PAST)),
        dict(kv_length=PAST + Q + 5),
    ],
    ids=["own function", "chunks", "other window", "tensor offset", "static cache"],
)
def test_anything_else_gets_the_full_mask(change):
    given = {**arguments(padded=False), **change}
    full = mask(**given)
    assert type(full) is torch.Tensor and torch.equal(full, sdpa_mask(**given, allow_is_causal_skip=False))


@pytest.mark.parametrize("case", ["packed", "or", "and", "bidirectional", "sliding or"])
def test_patterns_that_transformers_makes(case):
    """Packed sequences, vision blocks and the like: the same values as for sdpa."""
    config = FAMILIES["mistral"][0](**FAMILIES["mistral"][1])
    config._attn_implementation = hf.IMPLEMENTATION
    embeddings, positions = torch.zeros(1, 40, 8), torch.arange(40)[None]

    def block(b, h, q, k):
        return (q // 10 == 2) & (k // 10 == 2)

    given = dict(config=config, inputs_embeds=embeddings, attention_mask=None, past_key_values=None)
    make = {
        "packed": lambda: create_causal_mask(**given, position_ids=positions % 15),
        "or": lambda: create_causal_mask(**given, or_mask_function=block),
        "and": lambda: create_causal_mask(**given, and_mask_function=block),
        "bidirectional": lambda: create_bidirectional_mask(
            config, embeddings, attention_mask=torch.arange(40)[None] > 4, past_key_values=None
        ),
        "sliding or": lambda: create_sliding_window_causal_mask(**given, or_mask_function=block),
    }[case]
    ours = make()
    config._attn_implementation = "sdpa"
    assert type(ours) is torch.Tensor and torch.equal(ours, make())


def held(window: int | None = None, tokens: int = 100, config: str = "f32"):
    """A layer that holds ``tokens`` tokens, the last Q of which were just appended, and what was stored."""
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(2, 2, tokens, 64, generator=generator) for _ in "kv")
    layer = hf.PackedLayer(gyrokv.CacheConfig.parse(config), 0, 1, window, LayerLog(0, True))
    layer.update(k[:, :, :-Q], v[:, :, :-Q])
    return layer.update(k[:, :, -Q:], v[:, :, -Q:]), k, v, torch.randn(2, 4, Q, 64, generator=generator)


class Module(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_full_mask_alone_says_what_is_seen(window, kind):
    """As for image tokens that see each other: keys after the query, on sliding layers too."""
    (key, value), k, v, q = held(window)
    kv_len = key.shape[2]
    assert kv_len == (100 if window is None else WINDOW - 1 + Q)
    given = torch.rand(2, 1, Q, kv_len, generator=torch.Generator().manual_seed(4)) < 0.5
    bias = given if kind == "bool" else torch.where(given, 0.5, -torch.inf)
    out, weights = attention(Module(), q, key, value, bias, sliding_window=window)
    want = gyrokv.attention(q, k[:, :, -kv_len:], v[:, :, -kv_len:], causal=False, mask=bias)
    assert weights is None
    torch.testing.assert_close(out, want.transpose(1, 2))


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("causal", [True, False])
def test_without_a_mask_the_flag_decides(window, causal):
    (key, value), k, v, q = held(window, tokens=40)
    n = key.shape[2]
    if window is not None and not causal:
        with pytest.raises(ValueError, match="window"):
            attention(Module(), q, key, value, None, is_causal=False)
        return
    out, _ = attention(Module(), q, key, value, None, is_causal=causal)
    want = gyrokv.attention(q, k[:, :, -n:], v[:, :, -n:], causal=causal, window=window)
    torch.testing.assert_close(out, want.transpose(1, 2))


def test_a_sliding_mask_over_a_layer_that_keeps_everything():
    (key, value), k, v, q = held()
    described = mask(2, Q, 100, q_offset=100 - Q, mask_function=sliding_window_causal_mask_function(7), local_size=7)
    out, _ = attention(Module(), q, key, value, described)
    torch.testing.assert_close(out, gyrokv.attention(q, k, v, window=7).transpose(1, 2))


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing_are_zero(sinks):
    (key, value), _, _, q = held()
    padding = torch.ones(2, 100, dtype=torch.bool)
    padding[0] = False
    described = mask(2, Q, 100, q_offset=100 - Q, attention_mask=padding)
    assert isinstance(described, hf.CausalMask)
    s_aux = torch.zeros(4) if sinks else None
    out, _ = attention(Module(), q, key, value, described, s_aux=s_aux)
    assert not out[0].any() and torch.isfinite(out).all() and out[1].any()


def test_a_mask_for_other_keys_is_refused():
    (key, value), _, _, q = held()
    described = mask(2, Q, 80, q_offset=80 - Q)
    with pytest.raises(gyrokv.GyroKVError, match="keys 0 to 79.*holds 0 to 99"):
        attention(Module(), q, key, value, described)
    with pytest.raises(ValueError, match="2 axes"):
        attention(Module(), q, key, value, torch.ones(2, 100, dtype=torch.bool))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_callers_own_mask(name):
    """A 4-D mask goes to the layers as it is."""
    model = family(name)
    ids = torch.arange(2, WINDOW)[None]  # within the window: one mask serves both kinds of layer
    own = torch.rand(1, 1, ids.shape[1], ids.shape[1], generator=torch.Generator().manual_seed(5)) < 0.6
    own |= torch.eye(ids.shape[1], dtype=torch.bool)
    with torch.no_grad():
        want = model(ids, attention_mask=own, past_key_values=DynamicCache(config=model.config)).logits
        with hf.attach(model, "f32", strict=True):
            got = model(ids, attention_mask=own).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
