"""``attach`` changes a model in three places, and puts all of them back; what it cannot serve it refuses."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from hf_models import FAMILIES, SLIDING, VOCAB, family, make, prompts
from transformers import (
    AutoModelForImageTextToText,
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma3Config,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import gyrokv
import gyrokv.hf as hf
from gyrokv.hf.attention import attention
from gyrokv.hf.requirements import check

CONFIG = "k=q8_0,v=turbo4"


def state(model) -> tuple:
    """All that attach may touch."""
    return (
        set(vars(model)), dict(model.base_model._forward_pre_hooks), model._prepare_cache_for_generation.__func__,
        [m.config._attn_implementation_internal for m in model.modules() if hasattr(m, "config")],
    )  # fmt: skip


def logits(model, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(prompts(False)["input_ids"], **options).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_attach_and_detach(name):
    model = family(name)
    before, dense = state(model), logits(model)
    attachment = hf.attach(model, CONFIG, strict=True)
    assert model.config._attn_implementation == hf.IMPLEMENTATION
    packed = logits(model)
    assert attachment.cache.seen == packed.shape[1] and not torch.equal(packed, dense)
    assert torch.equal(packed, logits(model, past_key_values=hf.cache(model, CONFIG)))
    attachment.detach()
    attachment.detach()
    assert state(model) == before and torch.equal(logits(model), dense)
    with hf.attach(model, "f32"):
        torch.testing.assert_close(logits(model), dense, rtol=1e-4, atol=1e-3)
    assert state(model) == before


def test_attaching_again_replaces():
    model = family("llama")
    before = state(model)
    first = hf.attach(model, CONFIG)
    second = hf.attach(model, "turbo3")
    logits(model)
    assert first.cache is None and str(second.cache.policy) == "k=turbo3,v=turbo3"
    first.detach()
    assert model.config._attn_implementation == hf.IMPLEMENTATION
    hf.detach(model)
    assert state(model) == before
    hf.detach(model)


def test_the_model_is_restored_after_errors():
    model = family("llama")
    before = state(model)
    with pytest.raises(RuntimeError, match="mine"), hf.attach(model):
        raise RuntimeError("mine")
    assert state(model) == before
    for bad, error in (("nonsense=1", ValueError), ("q9_9", gyrokv.FormatError)):
        with pytest.raises(error):
            hf.attach(model, bad)
        assert state(model) == before
    # an instance's own wrapper around the method comes back too
    own = model._prepare_cache_for_generation
    model._prepare_cache_for_generation = own
    try:
        with hf.attach(model):
            assert model._prepare_cache_for_generation is not own
        assert vars(model)["_prepare_cache_for_generation"] is own
    finally:
        del model._prepare_cache_for_generation


def test_a_copy_of_an_attached_model_has_its_own_attachment():
    model = make(FAMILIES["llama"])
    attachment = hf.attach(model, CONFIG)
    other = copy.deepcopy(model)
    attachment.detach()
    out = other.generate(**prompts())
    assert attachment.cache is None and out.shape[0] == 2
    hf.detach(other)
    assert state(other)[1:] == state(model)[1:] and torch.equal(logits(other), logits(model))


def test_generate_leaves_a_callers_cache_and_settings_alone():
    model = family("llama")
    with hf.attach(model, CONFIG, strict=True) as attachment:
        mine = hf.cache(model, "turbo3")
        model.generate(**prompts(), past_key_values=mine)
        assert attachment.cache is mine and mine.seen > 0
        with pytest.warns(UserWarning, match="cache_implementation='static' is not used"):
            model.generate(**prompts(), cache_implementation="static")
        out = model.generate(**prompts(), return_dict_in_generate=True)
        assert out.past_key_values is attachment.cache and "q8_0 / turbo4" in attachment.report()


def test_asking_for_no_cache():
    model = family("llama")
    want = model.generate(**prompts())
    with hf.attach(model, "turbo2") as attachment:
        with pytest.warns(UserWarning, match="use_cache=False"):
            assert torch.equal(model.generate(**prompts(), use_cache=False), want)
        assert attachment.cache is None and "because use_cache=False" in attachment.report()
    with hf.attach(model, strict=True), pytest.raises(gyrokv.FallbackError, match="use_cache=False"):
        logits(model, use_cache=False)


def test_positional_and_base_model_calls():
    model = family("llama")
    ids = prompts(False)["input_ids"]
    with hf.attach(model, CONFIG, strict=True) as attachment, torch.no_grad():
        want = model.base_model(ids).last_hidden_state
        first = attachment.cache
        assert torch.equal(model.base_model(ids, None, None, None).last_hidden_state, want)
        assert attachment.cache is not first
        mine = hf.cache(model, CONFIG)
        model.base_model(ids, None, None, mine)
        assert attachment.cache is mine


def test_training_is_not_cached():
    model = make(FAMILIES["gemma2"])
    ids = prompts(False)["input_ids"]
    model.set_attn_implementation("eager")
    model.train()
    model(ids, labels=ids).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with hf.attach(model, CONFIG) as attachment, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert attachment.cache is None and "1 forward passes, because the model is in training" in attachment.report()
    for n, p in model.named_parameters():
        if n in want:
            torch.testing.assert_close(p.grad, want[n], rtol=1e-3, atol=1e-4)


def test_gradients_are_never_wrong_without_a_word():
    model = make(FAMILIES["llama"])
    ids = prompts(False)["input_ids"]
    with hf.attach(model, CONFIG) as attachment:
        with pytest.warns(UserWarning, match="gradients are enabled"):
            model(ids)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model(ids)  # said once
        assert attachment.cache is None and list(attachment.uncached.values()) == [2]
        loss = model(ids, labels=ids, past_key_values=hf.cache(model, CONFIG)).loss
        with pytest.raises(gyrokv.GyroKVError, match="no gradient"):
            loss.backward()
    with hf.attach(model, CONFIG, strict=True), pytest.raises(gyrokv.FallbackError, match="gradients are enabled"):
        model(ids)


def test_another_cache_is_noticed():
    model = family("llama")
    with hf.attach(model, CONFIG) as attachment:
        with pytest.warns(UserWarning, match="past_key_values is a DynamicCache"):
            out = logits(model, past_key_values=DynamicCache(config=model.config))
        assert "DynamicCache" in attachment.report()
    torch.testing.assert_close(out, logits(model), rtol=1e-4, atol=1e-4)
    with hf.attach(model, CONFIG, strict=True), pytest.raises(gyrokv.FallbackError, match="DynamicCache"):
        logits(model, past_key_values=DynamicCache(config=model.config))


def test_packed_sequences_are_refused():
    model = family("llama")
    length = prompts(False)["input_ids"].shape[1]
    with hf.attach(model, CONFIG):
        logits(model, position_ids=torch.arange(length)[None])
        with pytest.raises(ValueError, match="packed sequences"):
            logits(model, position_ids=torch.arange(length)[None] % 20)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_attention_weights_are_refused(name):
    model = family(name)
    with hf.attach(model, CONFIG):
        with pytest.raises(ValueError, match="output_attentions=True.*eager"):
            logits(model, output_attentions=True)
        with pytest.raises(ValueError, match="output_attentions=True"):
            model.generate(**prompts(), output_attentions=True, return_dict_in_generate=True)


class Module(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


def test_arguments_that_would_change_the_result_are_refused():
    cache = hf.cache(family("llama").config, CONFIG)
    key, value = cache.update(*torch.randn(2, 1, 2, 7, 64), 0)
    q = torch.randn(1, 4, 7, 64)
    call = dict(module=Module(), query=q, key=key, value=value, attention_mask=None)
    attention(**call, position_ids=torch.arange(7), use_cache=True, position_bias=None, output_router_logits=False)
    with pytest.raises(ValueError, match=r"Module passes position_bias=tensor\[1, 4, 7, 7\]"):
        attention(**call, position_bias=torch.zeros(1, 4, 7, 7))
    with pytest.raises(ValueError, match="passes cu_seq_lens_q="):
        attention(**call, cu_seq_lens_q=torch.arange(2))
    with pytest.raises(ValueError, match=r"dropout=0\.1 over a packed cache"):
        attention(**call, dropout=0.1)
    dense = dict(module=Module(), query=q, key=key.dense(), value=value.dense(), attention_mask=None)
    with pytest.raises(ValueError, match="dropout=0.1 with softcap or sinks"):
        attention(**dense, dropout=0.1, softcap=5.0)
    with pytest.raises(ValueError, match="sliding_window=3 over 7 dense keys"):
        attention(**dense, sliding_window=3)
    assert attention(**dense, dropout=0.1)[0].shape == (1, 7, 4, 64)


def test_dropout_in_training_mode_over_a_held_cache():
    model = make((FAMILIES["llama"][0], {**FAMILIES["llama"][1], "attention_dropout": 0.1}, "sdpa")).train()
    with hf.attach(model, CONFIG), pytest.raises(ValueError, match="model.eval()"):
        logits(model, past_key_values=hf.cache(model, CONFIG))


def test_models_without_a_cache_to_pack():
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32, vocab_size=VOCAB)
    with pytest.raises(TypeError, match="model is a Linear"):
        hf.attach(torch.nn.Linear(2, 2))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2))
    before = state(t5)
    with pytest.raises(gyrokv.Unsupported, match="encoder-decoder"):
        hf.attach(t5)
    assert state(t5) == before
    bert = BertModel(BertConfig(**sizes))
    hooks = dict(bert._forward_pre_hooks)
    try:
        hf.attach(bert)
    except gyrokv.Unsupported as error:
        assert "past_key_values" in str(error) and dict(bert._forward_pre_hooks) == hooks
    else:
        hf.detach(bert)


def test_a_model_whose_attention_cannot_be_exchanged(monkeypatch):
    model = family("llama")
    before = state(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_can_set_attn_implementation", lambda self: False)
        patch.setattr(type(model.model), "_can_set_attn_implementation", lambda self: False)
        with pytest.raises(gyrokv.Unsupported, match="cannot be exchanged"):
            hf.attach(model)
    assert state(model) == before


def test_image_and_text():
    """Only the text decoder changes; image tokens that see each other get the full mask. Same tokens as sdpa."""
    config_class, arguments, _ = FAMILIES["gemma3"]
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=4
    )
    config = Gemma3Config(
        text_config=config_class(**arguments), vision_config=vision, mm_tokens_per_image=4, image_token_index=90,
        boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    ids = prompts(False)["input_ids"].clamp(max=80)
    ids[0, 10:14] = ids[0, 40:44] = 90
    given = dict(
        input_ids=ids, pixel_values=torch.randn(2, 3, 16, 16), token_type_ids=(ids == 90).long(), max_new_tokens=8,
        attention_mask=torch.ones_like(ids), do_sample=False, no_repeat_ngram_size=2, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    want = model.generate(**given)
    with hf.attach(model, "f32", strict=True):
        kinds = config.text_config._attn_implementation, config.vision_config._attn_implementation
        assert kinds == (hf.IMPLEMENTATION, "sdpa")
        got = model.generate(**given)
    assert torch.equal(got.sequences, want.sequences) and config.text_config._attn_implementation == "sdpa"
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", *SLIDING])
def test_loading_with_the_implementation_by_name(name):
    model = make(FAMILIES[name], attn=hf.IMPLEMENTATION)
    cache = hf.cache(model, "f32", strict=True)
    got = model.generate(**prompts(), past_key_values=cache)
    assert torch.equal(got, family(name).generate(**prompts()))


@pytest.mark.parametrize("version", ["4.57.1", "5.16.2", "6.0.0", None])
def test_wrong_versions_say_what_to_install(version):
    with pytest.raises(ImportError, match=r"transformers >=5\.17,<6.*pip install 'transformers>=5\.17,<6'"):
        check(version)


@pytest.mark.parametrize("version", ["5.17.0", "5.23.0", "5.24.0.dev0"])
def test_right_versions(version):
    check(version)


def test_importing(tmp_path):
    """gyrokv alone loads no transformers; gyrokv.hf says what is wrong with none, and with an old one."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text('__version__ = "5.2.0"\n')
    code = f"""
import sys, gyrokv
assert "transformers" not in sys.modules
for fake in (lambda: sys.modules.update(transformers=None), lambda: sys.path.insert(0, {str(tmp_path)!r})):
    sys.modules.pop("transformers", None)
    fake()
    try:
        import gyrokv.hf
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    none, old = done.stdout.splitlines()
    assert "there is none" in none and "gyrokv.hf needs transformers >=5.17,<6, not 5.2.0" in old, done.stderr
