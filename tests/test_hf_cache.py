"""The cache object: what it holds, what it reports, and every operation of transformers' cache contract."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import _BASE, FAMILIES, LATENT, SLIDING, WINDOW, family, make, prompts
from transformers import Lfm2Config, LlamaConfig, T5Config

import gyrokv
import gyrokv.hf as hf

CONFIG = "k=q8_0,v=turbo4"


@pytest.fixture
def llama():
    model = family("llama")
    with hf.attach(model, CONFIG, strict=True):
        yield model


@pytest.fixture
def mistral():
    model = family("mistral")
    with hf.attach(model, CONFIG, strict=True):
        yield model


def feed(model, ids, cache, **options):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **options).logits


def row(padded: bool = False) -> torch.Tensor:
    return prompts(padded)["input_ids"]


# norm of the error over the norm of the logits; Gemma 4 does not scale its scores, which makes random weights peaked
BOUNDS = {"q8_0": (0.02, 0.2), CONFIG: (0.2, 0.6), "turbo4": (0.2, 0.9)}


@pytest.mark.parametrize("name", FAMILIES)
def test_quantised_caches_are_read_packed_are_smaller_and_are_close(name):
    model, ids = family(name), row()

    def run(config):
        cache = hf.cache(model, config, strict=True)
        out = torch.cat((feed(model, ids, cache), feed(model, ids[:, :1], cache)), dim=1)
        return out, cache

    with hf.attach(model):
        dense, _ = run("f32")
        half, bf16 = run("bf16")
        previous = half
        for config, bounds in BOUNDS.items():
            out, cache = run(config)
            assert cache.fallbacks == 0 and cache.fallback_ops == {}
            assert set(cache.backends) == {layer.log.index for layer in cache.packed}
            assert cache.nbytes == sum(t.numel() * t.element_size() for layer in cache.packed for t in layer.store.tensors)
            assert cache.live_nbytes <= cache.nbytes < bf16.nbytes and cache.live_nbytes < 0.6 * bf16.live_nbytes
            assert not torch.equal(out, dense) and not torch.equal(out, previous)
            assert torch.linalg.norm(out - dense) < bounds[name.startswith("gemma4")] * torch.linalg.norm(dense)
            previous = out


@pytest.mark.parametrize("fmt", gyrokv.FORMATS)
def test_every_format(fmt, mistral):
    cache = hf.cache(mistral, fmt, strict=True)
    out = mistral.generate(**prompts(), past_key_values=cache, output_logits=True, return_dict_in_generate=True)
    assert cache.seen == out.sequences.shape[1] - 1 and torch.isfinite(torch.stack(out.logits)).all()
    assert str(cache.packed[0].store.k_codec.format) == fmt and fmt in cache.report()


def test_layers_can_differ():
    model = family("gemma4_shared")
    with hf.attach(model, "turbo3,recent=8,sinks=2; sliding: f32; last1: v=bf16", strict=True) as attachment:
        model.generate(**prompts())
        sliding, full = (layer.store for layer in attachment.cache.packed)
        assert (str(sliding.k_codec.format), sliding.window, sliding.recent) == ("f32", WINDOW, 8)
        assert (str(full.k_codec.format), str(full.v_codec.format), full.sinks) == ("turbo3", "bf16", 2)
        assert (sliding.k_codec.head_dim, full.k_codec.head_dim) == (256, 512)
        report = attachment.report()
    for text in ("sliding 16", "turbo3 / bf16", "fallbacks: none", "attended by", "in layer"):
        assert text in report


def test_report_before_use_and_of_layers_that_stay_dense():
    config = {**_BASE, "hidden_size": 128, "layer_types": ["conv", "full_attention"], "block_ff_dim": 64}
    model = make((Lfm2Config, config, "sdpa"))
    want = model.generate(**prompts())
    with hf.attach(model, "f32", strict=True) as attachment:
        assert "not used yet" in attachment.report()
        assert torch.equal(model.generate(**prompts()), want)
        cache = attachment.cache
        assert "LinearAttentionLayer, not packed" in attachment.report()
        assert cache.nbytes > sum(layer.store.nbytes for layer in cache.packed) and cache.fallbacks == 0
        with pytest.raises(gyrokv.GyroKVError, match="layer 0 is a LinearAttentionLayer"):
            cache.save("unused")
    assert "nobody yet" in hf.cache(model.config).report()


def test_sliding_layers_stay_small_and_their_sizes_are_those_of_transformers(mistral):
    cache, theirs = hf.cache(mistral), mistral.config
    with torch.no_grad():
        for i in range(40):
            mistral(row()[:, i : i + 1 + i % 3], past_key_values=cache)
    store = cache.packed[0].store
    assert store.view().kv_len == 64 < store.length == cache.seen == cache.get_seq_length()
    assert cache.get_mask_sizes(3, 0) == (WINDOW - 1 + 3, store.length - WINDOW + 1)
    assert cache.packed[0].get_max_length() == theirs.sliding_window and hf.cache(family("llama").config).seen == 0
    assert cache.is_sliding == [True, True] and not cache.is_compileable and cache.is_croppable


@pytest.mark.parametrize("name", ["llama", *SLIDING])
def test_save_and_load(name, tmp_path):
    model, ids = family(name), row()
    with hf.attach(model, CONFIG, strict=True):
        cache = hf.cache(model, CONFIG, strict=True)
        feed(model, ids, cache)
        cache.save(tmp_path / "cache.safetensors")
        again = hf.PackedCache.load(tmp_path / "cache.safetensors", model, strict=True)
        assert again.seen == cache.seen and str(again.policy) == str(cache.policy)
        for step in range(3):
            token = ids[:, step : step + 1]
            assert torch.equal(feed(model, token, again), feed(model, token, cache))


def test_loading_for_another_model(llama, tmp_path):
    cache = hf.cache(llama)
    feed(llama, row(), cache)
    cache.save(tmp_path / "cache")
    with pytest.raises(gyrokv.CacheFileError, match=r"windows \[None, None\].*\[16, 16\]"):
        hf.PackedCache.load(tmp_path / "cache", family("mistral").config)
    assert hf.PackedCache.load(tmp_path / "cache", llama.config).seen == cache.seen
    with pytest.raises(FileNotFoundError):
        hf.PackedCache.load(tmp_path / "none", llama)


def test_batch_operations(llama):
    """Each gives the logits of a cache that was filled with the same sequences in that order."""
    ids = torch.cat((row(), row().flip(1), row().roll(7, 1)))

    def after(change, order):
        changed, plain = hf.cache(llama), hf.cache(llama)
        feed(llama, ids, changed)
        feed(llama, ids[order], plain)
        change(changed)
        token = torch.full((len(order), 1), 5)
        torch.testing.assert_close(feed(llama, token, changed), feed(llama, token, plain), rtol=1e-4, atol=1e-4)

    after(lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0])
    after(lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])
    after(lambda c: c.batch_select_indices(torch.tensor([2, 1])), [2, 1])
    after(lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2])
    empty = hf.cache(llama)
    empty.reorder_cache(torch.tensor([0]))
    empty.batch_repeat_interleave(2)
    empty.batch_select_indices(torch.tensor([0]))


def test_reset_offload_and_early_initialization(llama):
    cache = hf.cache(llama)
    first = feed(llama, row(), cache)
    layer = cache.packed[0]
    layer.offload()
    layer.prefetch()
    cache.reset()
    assert cache.seen == cache.nbytes == 0 and not cache.is_initialized
    layer.offload()
    layer.prefetch()
    twice = feed(llama, row().repeat(2, 1), cache)  # another batch size
    torch.testing.assert_close(twice[:1], first, rtol=1e-4, atol=1e-4)
    early = hf.cache(llama)
    early.early_initialization(1, 2, 64, torch.float32, torch.device("cpu"))
    assert early.is_initialized and early.seen == 0 and torch.equal(feed(llama, row(), early), first)


def test_copies_are_independent(mistral):
    cache = hf.cache(mistral)
    feed(mistral, row(), cache)
    other = copy.deepcopy(cache)
    want = feed(mistral, row()[:, :2], other)
    feed(mistral, row().flip(1), other)
    assert cache.seen == row().shape[1] and torch.equal(feed(mistral, row()[:, :2], cache), want)


def test_crop(llama, mistral):
    cache = hf.cache(llama)
    cache.crop(0)
    feed(llama, row(), cache)
    cache.crop(-2)
    cache.crop(torch.tensor(-1))
    assert cache.seen == row().shape[1] - 3
    cache.crop(40)  # the older meaning: the length to keep
    assert cache.seen == 40
    with pytest.raises(ValueError, match="length=-1"):
        cache.crop(-41)
    sliding = hf.cache(mistral)
    feed(mistral, row(), sliding)
    assert not sliding.packed[0].record_past
    with pytest.raises(gyrokv.CapacityError, match="record the past"):
        sliding.crop(-60)
    assert {layer.get_seq_length() for layer in sliding.packed} == {row().shape[1]}
    sliding.activate_past_recording()
    feed(mistral, row(), sliding)
    assert sliding.packed[0].record_past
    sliding.crop(-72)
    fresh = hf.cache(mistral)
    fresh.activate_past_recording()
    feed(mistral, row(), fresh)
    fresh.crop(-60)
    assert fresh.seen == row().shape[1] - 60
    for layer in sliding.packed:
        layer.record_past = False
    feed(mistral, row(), sliding)
    assert sliding.packed[0].store.view().kv_len == 64


def test_crop_changes_no_layer_when_one_cannot():
    config_class, arguments, _ = FAMILIES["gemma3"]
    cache = hf.cache(config_class(**{**arguments, "layer_types": ["full_attention", "sliding_attention"]}))
    for layer in range(2):
        cache.update(*torch.randn(2, 1, 2, row().shape[1], 64), layer)
    with pytest.raises(gyrokv.CapacityError):
        cache.crop(-60)
    assert {layer.get_seq_length() for layer in cache.packed} == {row().shape[1]}


def test_strict_names_the_operation_the_layer_and_the_remedy():
    model = family("llama")
    with pytest.warns(UserWarning, match=r"attn_implementation='sdpa'.*set_attn_implementation\('gyrokv'\)"):
        cache = hf.cache(model, strict=True)
    with pytest.raises(gyrokv.FallbackError, match=r"layer 0: operation aten\.\w+.*keys.*attn_implementation='gyrokv'"):
        model.generate(**prompts(), past_key_values=cache)


def test_latent_attention_falls_back():
    """These models store the latent and expand it after the cache, so they run on decoded values, and that is said."""
    model = make(LATENT)
    want = model.generate(**prompts())
    with hf.attach(model, "f32") as attachment:
        assert torch.equal(model.generate(**prompts()), want)
        assert attachment.fallbacks > 0 and set(attachment.fallback_ops) == {0, 1}
        assert "aten." in attachment.report() and "fallbacks: none" not in attachment.report()
        assert attachment.cache.packed[0].store.kv_heads == 1
    with hf.attach(model, "f32", strict=True), pytest.raises(gyrokv.FallbackError, match="latent"):
        model.generate(**prompts())


def test_handles(llama):
    cache = hf.cache(llama.config, CONFIG)
    k, v = torch.randn(2, 1, 2, 7, 64)
    key, value = cache.update(k, v, 0)
    assert key.shape == k.shape and key.dtype == k.dtype and key.device == k.device and "keys of layer 0" in repr(key)
    assert isinstance(key.detach(), hf.KVHandle) and isinstance(key.to("cpu"), hf.KVHandle) and cache.fallbacks == 0
    torch.testing.assert_close(key.dense(), k, rtol=0.02, atol=0.02)
    assert cache.fallbacks == 0
    assert type(key + 0) is torch.Tensor and torch.equal(key + 0, key.dense())
    assert (value @ torch.ones(64, 1)).shape == (1, 2, 7, 1)
    assert cache.fallbacks == 3 and set(cache.fallback_ops) == {0} and "aten.add.Tensor" in cache.fallback_ops[0]
    with pytest.raises(gyrokv.GyroKVError, match="cannot write"):
        key.mul_(2)
    cache.update(k, v, 0)
    with pytest.raises(gyrokv.GyroKVError, match="out of date"):
        key.dense()
    strict = hf.cache(llama.config, CONFIG, strict=True)
    _, value = strict.update(k, v, 1)
    with pytest.raises(gyrokv.FallbackError, match=r"layer 1: operation aten\.mul\.Tensor asked for the dense values"):
        value * 2


def test_a_handle_on_another_device_reads_a_copy(llama):
    cache = hf.cache(llama.config, CONFIG)
    key, value = (x.to("meta") for x in cache.update(*torch.randn(2, 1, 2, 7, 64), 0))
    source = key.source
    assert key.device.type == "meta" and source is value.source
    assert source.on(torch.device("meta")) is source.on(torch.device("meta"))
    assert source.on(torch.device("meta")).device.type == "meta"


def test_nan_is_refused_before_it_is_stored(llama):
    cache = hf.cache(llama.config, CONFIG)
    with pytest.raises(ValueError, match="k holds 1 values that are NaN"):
        k = torch.zeros(1, 2, 3, 64)
        k[0, 0, 0, 0] = torch.nan
        cache.update(k, torch.zeros(1, 2, 3, 64), 0)
    assert cache.seen == 0


def test_what_cannot_be_cached():
    model = make((LlamaConfig, {**_BASE, "head_dim": 24}, "sdpa"))
    with hf.attach(model, CONFIG), pytest.raises(ValueError, match="head_dim=24 is not supported"):
        model.generate(**prompts())
    with pytest.raises(gyrokv.Unsupported, match="encoder-decoder"):
        hf.cache(T5Config())
    with pytest.raises(TypeError, match="model is a str"):
        hf.cache("llama")
    with pytest.raises(gyrokv.FormatError, match="unknown format 'q9_9'"):
        hf.cache(LlamaConfig(**_BASE), "q9_9")
    conv = Lfm2Config(**{**_BASE, "layer_types": ["conv", "conv"]})
    with pytest.raises(gyrokv.Unsupported, match="no attention layer"):
        hf.cache(conv)
