"""Static packed caches: eager, compiled and captured, on full and sliding layers, give the tokens of the dynamic ones."""

from __future__ import annotations

import pytest
import torch
from hf_models import FAMILIES, NEW, PROMPT, SLIDING, family, make, prompts
from torch._dynamo.utils import counters
from transformers import CompileConfig

from gyrokv import CapacityError, GyroKVError
from gyrokv.cases import kinds
from gyrokv.formats import FORMATS
from gyrokv.hf import StaticPackedCache, attach, cache

LENGTH = 128  # slots; a window of 16 has a ring of 64, the prompt is longer


def compiled(backend: str, **settings) -> dict:
    """Arguments of ``generate`` that compile every step on any device, without graph breaks."""
    config = CompileConfig(backend=backend, fullgraph=True, mode=None, dynamic=False, **settings)
    config._compile_all_devices = True
    return dict(compile_config=config)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def attached(name: str, policy: str, **options):
    model = family(name)
    vars(model).pop("_compiled_call", None)
    return model, attach(model, policy, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_static_tokens_are_the_dynamic_ones(name):
    """Left padding, a prompt longer than the ring, sinks, softcap, shared layers: storage may change no token."""
    model, attachment = attached(name, "k=q8_0,v=turbo4")
    with attachment:
        want = model.generate(**prompts())
    model, attachment = attached(name, "k=q8_0,v=turbo4", static=LENGTH)
    with attachment:
        assert torch.equal(model.generate(**prompts()), want)
        assert isinstance(attachment.cache, StaticPackedCache) and int(attachment.cache.get_seq_length()) == PROMPT + NEW - 1
        assert name not in SLIDING or any(layer.ring for layer in attachment.cache.packed)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "gemma4_shared"])
def test_compiled_tokens_are_the_eager_ones(name):
    """One graph, no break, and none again for another cache."""
    model, attachment = attached(name, "k=turbo4,v=q8_0", static=LENGTH)
    with attachment:
        want = model.generate(**prompts())
        for _ in range(2):
            assert torch.equal(model.generate(**prompts(), **compiled("eager")), want)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("fmt", kinds(), ids=str)
def test_each_kind_of_row_compiles(fmt):
    """Ahead-of-time tracing sees every mutation: a row that is written behind its back would stay as it was."""
    config, arguments, implementation = FAMILIES["llama"]
    model = make((config, {**arguments, "num_hidden_layers": 1}, implementation))
    with attach(model, fmt.name, static=LENGTH):
        want = model.generate(**prompts())
        assert torch.equal(model.generate(**prompts(), **compiled("aot_eager")), want)


@pytest.mark.slow
def test_inductor_compiles_it():
    model, attachment = attached("gemma3", "k=q8_0,v=turbo3", static=LENGTH)
    with attachment:
        want = model.generate(**prompts())
        assert torch.equal(model.generate(**prompts(), **compiled("inductor")), want)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_cuda_graphs_are_not_skipped(name):
    """With mode reduce-overhead nothing may keep a step out of its CUDA graph; logits agree with eager ones."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no accelerator")
    model = make(FAMILIES[name], dtype=torch.float32).to("cuda")
    given = {key: x.to("cuda") if isinstance(x, torch.Tensor) else x for key, x in prompts().items()}
    with attach(model, "k=q8_0,v=turbo4", static=LENGTH) as attachment:
        model.generation_config.disable_compile = True
        want = model.generate(**given, output_scores=True, return_dict_in_generate=True)
        model.generation_config.disable_compile = False
        config = CompileConfig(fullgraph=True, mode="reduce-overhead", dynamic=False)
        got = model.generate(**given, output_scores=True, return_dict_in_generate=True, compile_config=config)
        attachment.cache.check()
    assert not counters["inductor"]["cudagraph_skips"] and not counters["graph_break"]
    assert torch.equal(got.sequences[:, : PROMPT + 1], want.sequences[:, : PROMPT + 1])
    mine, other = (x.scores[1].masked_fill(x.scores[1] == -torch.inf, 0.0) for x in (got, want))  # -inf: n-grams that repeat
    error = float((mine - other).norm() / other.norm())
    assert error < 1e-2


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_chunks_turns_and_reset(name):
    """Chunked prefill, a second turn on the same cache, the cache used again after a reset."""
    model, attachment = attached(name, "k=q8_0,v=turbo4")
    with attachment:
        held = cache(model, "k=q8_0,v=turbo4", static=LENGTH)
        want = model.generate(**prompts())
        got = model.generate(**prompts(), past_key_values=held, prefill_chunk_size=30)
        assert torch.equal(got, want)
        both = dict(input_ids=want, attention_mask=torch.cat((prompts()["attention_mask"], torch.ones(2, NEW).long()), 1))
        go_on = dict(max_new_tokens=5, do_sample=False, no_repeat_ngram_size=2)
        assert torch.equal(model.generate(**both, past_key_values=held, **go_on), model.generate(**both, **go_on))
        bytes_held, first = held.nbytes, held.packed[0].k_words.data_ptr()
        held.reset()
        assert int(held.get_seq_length()) == 0
        assert torch.equal(model.generate(**prompts(), past_key_values=held), want)
        assert held.nbytes == bytes_held and held.packed[0].k_words.data_ptr() == first
        assert "static, at most 128 tokens" in held.report()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_beams(name):
    """Beam search reorders the batch in place: each beam must go on from its own past."""
    found = []
    for options in ({}, {"static": LENGTH}):
        model, attachment = attached(name, "k=f32,v=f32", **options)
        with attachment:
            found.append(model.generate(**prompts(), num_beams=3))
    assert torch.equal(*found)


def test_memory_is_allocated_once():
    """The bytes are those of the formats, and a step leaves every tensor where it was."""
    model, attachment = attached("gemma3", "k=q8_0,v=turbo4")
    held = StaticPackedCache(model.config, "k=q8_0,v=turbo4", LENGTH)
    ids, places = prompts()["input_ids"], []
    with attachment, torch.no_grad():
        for step in (ids, ids[:, :1], ids[:, :3]):
            model(step, past_key_values=held)
            places.append([t.data_ptr() for layer in held.packed for t in layer.tensors])
    assert places[0] == places[1] == places[2] and int(held.get_seq_length()) == PROMPT + 4
    per_token = 2 * 2 * (FORMATS["q8_0"].bytes_per_head(64) + FORMATS["turbo4"].bytes_per_head(64))
    small = sum(t.numel() * t.element_size() for layer in held.packed for t in (layer.lengths, layer.trouble))
    assert held.nbytes == per_token * (64 + LENGTH) + small
    marked = [t for layer in held.packed for t in layer.tensors]
    assert all(getattr(t, "_dynamo_static_input_type", None) for t in marked)


def test_too_many_tokens_and_what_is_not_a_number():
    """On the CPU both raise at once, in eager and in compiled steps."""
    model, attachment = attached("llama", "q8_0", static=PROMPT + 3)
    with attachment:
        with pytest.raises(CapacityError, match=f"{PROMPT + 3} tokens held and 1 more exceed the limit of {PROMPT + 3}"):
            model.generate(**prompts(), **compiled("eager"))
        with pytest.raises(ValueError, match="k holds .* NaN"), torch.no_grad():
            model(inputs_embeds=torch.full((1, 3, 64), torch.nan), past_key_values=cache(model, "q8_0", static=8))


def test_refusals():
    model = family("llama")
    with pytest.warns(UserWarning, match="reads a packed cache through dense copies"):
        cache(model, "q8_0", static=64)
    with pytest.raises(ValueError, match="static=-1 must be at least 1"):
        StaticPackedCache(model.config, "q8_0", -1)
    with pytest.raises(ValueError, match=r"recent=8: a static cache keeps no dense rows \(layer 0\)"):
        attach(model, "k=q8_0,v=q8_0,recent=8", static=64)
    held = StaticPackedCache(model.config, "q8_0", 64)
    with pytest.raises(GyroKVError, match="needs dense keys or values"), torch.no_grad():
        model(prompts()["input_ids"][:, :5], past_key_values=held)  # sdpa: detached above
