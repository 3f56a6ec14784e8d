"""In a dense format of the model's own precision, every family generates the very tokens of sdpa or eager attention,
in every decoding mode of transformers that touches the cache in a different way."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from hf_models import FAMILIES, NEW, PROMPT, SLIDING, VOCAB, family, prompts

import gyrokv.hf as hf

MODES = {}


def go_on(model, ids, **cache):
    # the padding token's id is one that these models may generate
    asked = dict(attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, no_repeat_ngram_size=2)
    return model.generate(ids, **asked, **cache)


def mode(f):
    MODES[f.__name__] = f
    return f


@mode
def chunked_prefill(model, padded, single, held):
    return model.generate(**padded, prefill_chunk_size=11)


@mode
def beam_search(model, padded, single, held):
    return model.generate(**padded, num_beams=3)


@mode
def prompt_lookup(model, padded, single, held):
    return model.generate(**single, prompt_lookup_num_tokens=3)


@mode
def assisted(model, padded, single, held):
    """The assistant has a packed cache too: transformers 5.17 cannot take back drafts from its own sliding one."""
    assistant = family(model.family, seed=1)
    with hf.attach(assistant, "f32", strict=True):
        return model.generate(**single, assistant_model=assistant)


@mode
def held_cache(model, padded, single, held):
    return model.generate(**padded, **held())


@mode
def several_turns(model, padded, single, held):
    cache = held()
    first = model.generate(**single, **cache)
    return go_on(model, torch.cat((first, single["input_ids"][:, :5]), dim=1), **cache)


@mode
def copied_prompt_cache(model, padded, single, held):
    """Two continuations of one prompt, each from its own copy of the prompt's cache."""
    cache, out = held(), []
    with torch.no_grad():
        model(single["input_ids"][:, :-4], use_cache=True, **cache)
    for tail in (single["input_ids"][:, -4:], single["input_ids"][:, :4]):
        ids = torch.cat((single["input_ids"][:, :-4], tail), dim=1)
        out.append(go_on(model, ids, **copy.deepcopy(cache)))
    return torch.cat(out)


@mode
def crop_and_continue(model, padded, single, held):
    """Feed the prompt and a wrong continuation, take that back, go on."""
    cache = held()
    if cache:
        ids = single["input_ids"]
        with torch.no_grad():
            model(ids[:, :-3], use_cache=True, **cache)
            cache["past_key_values"].activate_past_recording()
            model(ids[:, :20], use_cache=True, **cache)
            cache["past_key_values"].crop(-20)
    return model.generate(**single, **cache)


@mode
def crop_nothing_after_each_step(model, padded, single, held):
    """What generate does on MPS, where it looks one step late whether to stop."""
    cache, ids = held(), single["input_ids"]
    if not cache:
        return model.generate(**single)
    past = cache["past_key_values"]
    past.activate_past_recording()
    step = ids
    for _ in range(NEW):
        with torch.no_grad():
            step = model(step, use_cache=True, **cache).logits[:, -1:].argmax(-1)
        past.crop(0)
        ids = torch.cat((ids, step), dim=1)
    with torch.no_grad():
        model(step, use_cache=True, **cache)
    past.crop(-1)
    assert past.seen == ids.shape[1] - 1
    return ids


@lru_cache(maxsize=64)
def expected(name: str, mode_name: str) -> torch.Tensor:
    """Tokens of a mode with the model's own attention and cache."""
    model = family(name)
    if mode_name == "greedy":
        return model.generate(**prompts())
    return MODES[mode_name](model, prompts(), prompts(padded=False), dict)


@pytest.mark.parametrize("mode_name", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_dense_cache_gives_the_tokens_of_the_model_without_it(name, mode_name):
    want = expected(name, mode_name)
    model = family(name)
    with hf.attach(model, "f32", strict=True) as attachment:
        got = MODES[mode_name](
            model, prompts(), prompts(padded=False), lambda: {"past_key_values": hf.cache(model, "f32", strict=True)}
        )
        assert attachment.cache.backends
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_batch_with_left_padding(name):
    model, asked = family(name), dict(return_dict_in_generate=True, output_logits=True)
    want = model.generate(**prompts(), **asked)
    with hf.attach(model, "f32", strict=True) as attachment:
        got = model.generate(**prompts(), **asked)
        assert attachment.cache is got.past_key_values and attachment.cache.seen == want.sequences.shape[1] - 1
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_model_and_cache(name):
    """The tokens are the same as with the model's own attention, except where its best two logits are closer together
    than its own rounding, which is also what bounds ours."""
    model, ids = family(name, dtype=torch.bfloat16), prompts()
    want = model.generate(**ids)
    with hf.attach(model, "bf16", strict=True):
        got = model.generate(**ids)
        ours = logits(model, want)
    exact, theirs = logits(family(name), want), logits(model, want)
    rounding = (theirs - exact).abs().max()
    assert (ours - exact).abs().max() <= 2 * rounding
    for row, (a, b) in enumerate(zip(got, want)):
        differ = (a != b).nonzero()
        if len(differ):
            at = int(differ[0])
            assert theirs[row, at - 1, b[at]] - theirs[row, at - 1, a[at]] <= 2 * rounding


def logits(model, sequences):
    """Logits for given sequences, whose first row has the padding of the prompts."""
    attention_mask = torch.ones_like(sequences)
    attention_mask[:, :PROMPT] = prompts()["attention_mask"]
    with torch.no_grad():
        out = model(sequences, attention_mask=attention_mask).logits.float()
    return out.masked_fill(attention_mask[:, :, None] == 0, 0.0)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4_shared"])
def test_an_attached_assistant_helps_a_model_that_is_not(name):
    single = prompts(padded=False)
    model, assistant = family(name), family(name, seed=1)
    want = model.generate(**single)
    with hf.attach(assistant, "k=q8_0,v=turbo4", strict=True) as attachment:
        got = model.generate(**single, assistant_model=assistant)
        assert all(layer.record_past for layer in attachment.cache.packed)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["llama", *SLIDING])
def test_a_cache_under_another_implementation_gives_the_same_tokens_through_counted_copies(name):
    model = family(name)
    with pytest.warns(UserWarning, match="dense copies"):
        cache = hf.cache(model, "f32")
    assert torch.equal(model.generate(**prompts(), past_key_values=cache), expected(name, "greedy"))
    assert cache.fallbacks > 0 and set(cache.fallback_ops) == {layer.log.index for layer in cache.packed}


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_implementation_without_packed_cache(name):
    """The registered functions serve a model that has only transformers' own cache, or none."""
    model = family(name)
    own, ids = model.config._attn_implementation, prompts()["input_ids"][1:]
    with torch.no_grad():
        want = model(ids).logits
    model.set_attn_implementation(hf.IMPLEMENTATION)
    try:
        assert torch.equal(model.generate(**prompts()), expected(name, "greedy"))
        assert torch.equal(model.generate(**prompts(), prefill_chunk_size=11), expected(name, "greedy"))
        assert torch.equal(model.generate(**prompts(), use_cache=False), expected(name, "greedy"))
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
    finally:
        model.set_attn_implementation(own)


def test_sampling_several_sequences_runs():
    model = family("mistral")
    with hf.attach(model, "turbo3", strict=True):
        out = model.generate(**{**prompts(), "do_sample": True}, num_return_sequences=2)
    assert out.shape[0] == 4 and int(out.max()) < VOCAB
