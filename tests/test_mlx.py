"""``gyrokv.mlx`` on MLX's CPU back-end, its kernels on the executor: MLX's own source, mlx-lm's own models."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

mx = pytest.importorskip("mlx.core", reason="no MLX: pip install 'mlx[cpu]'", exc_type=ImportError)
pytest.importorskip("mlx_lm.models.base", reason="no mlx-lm: pip install mlx-lm", exc_type=ImportError)

import numpy as np  # noqa: E402
from metal_host.host import SCHEDULES, compiler  # noqa: E402
from metal_host.mlx_entry import executed  # noqa: E402
from mlx_lm.models import base, llama  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache  # noqa: E402
from mlx_models import llama_model, logits, oss_model, packed, same  # noqa: E402

import gyrokv.mlx  # noqa: E402
from gyrokv import CapacityError, Codec, GyroKVError, LayerCache, attend  # noqa: E402
from gyrokv.backends.metal import launches  # noqa: E402
from gyrokv.config import CacheConfig, LayerShape  # noqa: E402
from gyrokv.mlx import machine as mlx_machine  # noqa: E402
from gyrokv.mlx import trial  # noqa: E402

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++ to compile the executor of Metal source with")
CHUNKS = (9, 1, 1, 70, 1, 30, 1)


def filled(config: str, window: int | None, dim: int = 64, chunks=CHUNKS):
    """A layer of ours and torch's, fed with the same chunks: yields (handles, torch's view) after each."""
    ours = packed(config, window)
    policy = CacheConfig.parse(config).layer(0, 1, sliding=window is not None)
    k_codec, v_codec = policy.codecs(LayerShape(2, dim))
    theirs = LayerCache(k_codec, v_codec, kv_heads=2, window=window, sinks=policy.sinks, recent=policy.recent)
    random = torch.Generator().manual_seed(0)
    for tokens in chunks:
        k, v = torch.randn(2, 1, 2, tokens, dim, generator=random)
        q = torch.randn(1, 4, tokens, dim, generator=random)
        handles = ours.update_and_fetch(mx.array(k.numpy()), mx.array(v.numpy()))
        yield ours, handles, theirs.append(k, v), q


@pytest.mark.parametrize("window", [None, 20], ids=["full", "sliding"])
@pytest.mark.parametrize(
    "config, schedule", list(zip(("q8_0/turbo4", "turbo3/bf16", "f32/fp8_e4m3", "tq6/q4_0"), SCHEDULES))
)
def test_rows_and_outputs_are_those_of_torch(config, schedule, window):
    """The same tokens give the same bytes and the same attention: in chunks, through a ring's end, with learned sinks."""
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0])
    with executed(schedule):
        for layer, (keys, values), view, q in filled(config, window):
            capacity = layer._main.capacity
            for mine, torchs in zip(layer._main.pair, (view.owner._main.k, view.owner._main.v)):
                if view.owner._main.k.words.shape[2] == capacity and torchs.words.dtype == torch.int16:
                    live = [p % capacity for p in range(layer._first, layer.offset)]
                    assert torch.equal(
                        torch.from_numpy(np.array(mine.words).view(np.int16))[:, :, live], torchs.words[:, :, live]
                    )
            want = attend(q, view, window=window, sinks=sinks, backend="torch")
            got = gyrokv.mlx.attend(
                mx.array(q.numpy()), keys, values, scale=64**-0.5, mask="causal", sinks=mx.array(sinks.numpy())
            )
            torch.testing.assert_close(same(got), want, rtol=1e-5, atol=2e-5)
            assert keys.shape == (1, 2, view.kv_len, 64)


@pytest.mark.parametrize("window", [None, 20], ids=["full", "sliding"])
@pytest.mark.parametrize("options", ["sinks=12", "recent=17", "sinks=3,recent=40"])
def test_first_and_recent_tokens_stay_dense(options, window):
    """Token by token and in chunks, where both overlap, through the rings' ends, after a trim: what torch's layer gives."""
    with executed("random"):
        for layer, (keys, values), view, q in filled(f"k=turbo2,v=turbo3,{options}", window):
            assert [(s.first, s.stop, s.k_format) for s in keys.view.segments] == [
                (s.first, s.stop, s.k_format) for s in view.segments
            ]
            want = attend(q, view, window=window, backend="torch")
            got = gyrokv.mlx.attend(mx.array(q.numpy()), keys, values, scale=64**-0.5, mask="causal")
            torch.testing.assert_close(same(got), want, rtol=1e-5, atol=2e-5)
            ours, theirs = layer, view.owner
        cut = 60 if window is None else 5  # 60: more than the recent tokens
        ours.trim(cut)
        theirs.truncate(theirs.length - cut)
        k, v, q = (torch.randn(1, heads, 2, 64, generator=torch.Generator().manual_seed(1)) for heads in (2, 2, 4))
        handles = ours.update_and_fetch(mx.array(k.numpy()), mx.array(v.numpy()))
        want = attend(q, theirs.append(k, v), window=window, backend="torch")
        got = gyrokv.mlx.attend(mx.array(q.numpy()), *handles, scale=64**-0.5, mask="causal")
        torch.testing.assert_close(same(got), want, rtol=1e-5, atol=2e-5)


def test_rotations_that_a_policy_adds():
    """To formats without one of their own: a matrix on keys, queries, values and outputs, as torch applies it."""
    config = "k=f32,v=f32,k_rotation=hadamard,v_rotation=hadamard"
    with executed():
        for layer, handles, view, q in filled(config, None, 96, (9, 1)):
            assert layer._codecs[0].matrix is not None and layer._codecs[1].matrix is not None
            mine, torchs = layer._main.pair[0].words[:, :, : layer.offset], view.decode("k")
            torch.testing.assert_close(same(mine), torchs, rtol=1e-5, atol=1e-5)
            got = gyrokv.mlx.attend(mx.array(q.numpy()), *handles, scale=96**-0.5, mask="causal")
            torch.testing.assert_close(same(got), attend(q, view, backend="torch"), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    """Keys, values and queries as models have them; the output in the same dtype."""
    with executed():
        layer = packed("k=q8_0,v=turbo4", None)
        k, v, q = (mx.random.normal((1, heads, 40, 96)).astype(getattr(mx, dtype)) for heads in (2, 2, 4))
        keys, values = layer.update_and_fetch(k, v)
        got = gyrokv.mlx.attend(q, keys, values, scale=0.1, mask="causal")
    assert got.dtype == getattr(mx, dtype) and got.shape == (1, 4, 40, 96)
    theirs = LayerCache(Codec("q8_0", 96), Codec("turbo4", 96), kv_heads=2)
    want = attend(same(q), theirs.append(same(k), same(v)), scale=0.1, backend="torch")
    limit = 2 * torch.finfo(getattr(torch, dtype)).eps
    torch.testing.assert_close(same(got), want, rtol=limit, atol=limit)


@pytest.mark.parametrize("shape", [(7, 16), (1, 1, 7, 16), (1, 4, 7, 16), (1, 4, 1, 16)])
@pytest.mark.parametrize("additive", [False, True])
def test_masks(shape, additive, monkeypatch):
    """Arrays of every shape that broadcasts, bool and additive: the mask alone says what is seen, with a block map too."""
    random = torch.Generator().manual_seed(3)
    mask = torch.rand(shape, generator=random) > 0.4
    mask = torch.where(mask, torch.randn(shape, generator=random), -torch.inf) if additive else mask
    with executed("random") as runs:
        layer = packed("k=q8_0,v=turbo4", None)
        k, v, q = (torch.randn(1, heads, n, 64, generator=random) for heads, n in ((2, 16), (2, 16), (4, 7)))
        keys, values = layer.update_and_fetch(*(mx.array(x.numpy()) for x in (k, v)))
        got = gyrokv.mlx.attend(mx.array(q.numpy()), keys, values, scale=0.125, mask=mx.array(mask.numpy()))
        mx.eval(got)
        count = len(runs.log)
        monkeypatch.setattr(launches, "TUNING", launches.Tuning(map_elements=0))
        mapped = gyrokv.mlx.attend(mx.array(q.numpy()), keys, values, scale=0.125, mask=mx.array(mask.numpy()))
        assert bool(mx.array_equal(got, mapped)) and len(runs.log) == count + 2
        with pytest.raises(ValueError, match=r"mask has shape \(7, 15\); it must broadcast to .* \[1, 4, 7, 16\]"):
            gyrokv.mlx.attend(mx.array(q.numpy()), keys, values, scale=0.125, mask=mx.zeros((7, 15)))
    theirs = LayerCache(Codec("q8_0", 64), Codec("turbo4", 64), kv_heads=2)
    want = attend(q, theirs.append(k, v), mask=mask, causal=False, scale=0.125, backend="torch")
    torch.testing.assert_close(same(got), want, rtol=1e-5, atol=2e-5)


# -- models


@pytest.mark.parametrize("make", [llama_model, oss_model])
def test_models_compute_what_they_did(make):
    """With unquantised rows: the logits of mlx-lm's own caches, over windows, rings and sinks."""
    mx.random.seed(0)
    model, tokens = make(), mx.random.randint(0, 61, (100,))
    want = logits(model, make_prompt_cache(model), tokens)
    with executed() as runs:
        cache = gyrokv.mlx.cache(model, "f32")
        assert all(isinstance(c, gyrokv.mlx.PackedKVCache) for c in cache)
        got = logits(model, cache, tokens)
        mx.eval([c.state for c in cache])
    assert len(runs.log) >= 12
    torch.testing.assert_close(same(got), same(want), rtol=1e-4, atol=1e-4)


def test_models_run_quantised_and_take_less_memory():
    """Formats per side and per layer; tokens differ from the exact ones by little."""
    mx.random.seed(0)
    model, tokens = llama_model(), mx.random.randint(0, 61, (100,))
    want = logits(model, make_prompt_cache(model), tokens)
    with executed():
        cache = gyrokv.mlx.cache(model, "k=q8_0,v=turbo4; last1: tq8")
        got = logits(model, cache, tokens)
    dense = 256 * 2 * 2 * 32 * 4
    assert cache[0].nbytes == 256 * 2 * (34 + 18) and cache[1].nbytes == 256 * 2 * (34 + 34) < dense / 3
    assert 0 < float(mx.linalg.norm(got - want) / mx.linalg.norm(want)) < 0.15


def test_trim_forgets():
    """Speculative decoding cuts the cache back; what is computed after is as if the tokens had never been."""
    mx.random.seed(0)
    model, tokens = llama_model(), mx.random.randint(0, 61, (30,))
    with executed():
        cache = gyrokv.mlx.cache(model, "k=q8_0,v=turbo4")
        model(tokens[None, :20], cache=cache)
        want = model(tokens[None, 20:22], cache=cache)
        assert trim_prompt_cache(cache, 2) == 2 and cache[0].offset == cache[0].size() == 20
        assert bool(mx.array_equal(model(tokens[None, 20:22], cache=cache), want))


def test_a_ring_says_what_it_has_lost():
    with executed():
        layer = packed("q8_0", 20)
        k = mx.zeros((1, 1, 90, 32))
        layer.update_and_fetch(k, k)
    assert not layer.is_trimmable() and layer.size() == 64
    assert layer.trim(5) == 5
    with pytest.raises(CapacityError, match="n=50: the ring holds positions 26 to 84 only"):
        layer.trim(50)


def test_arrays_are_made_when_models_ask_for_them():
    """``return_array``: bool over the keys that the layer will hold."""
    full, sliding = (packed("q8_0", w) for w in (None, 4))
    assert full.make_mask(1) is None and full.make_mask(5) == "causal"
    assert full.make_mask(5, window_size=3).window == 3 and sliding.make_mask(5).window == 4
    assert bool(mx.array_equal(full.make_mask(5, return_array=True), base.create_causal_mask(5)))
    assert bool(mx.array_equal(sliding.make_mask(5, return_array=True), base.create_causal_mask(5, window_size=4)))


# -- what users see


def test_without_an_apple_gpu_it_says_so():
    with pytest.raises(GyroKVError, match="no Apple GPU here: MLX .* has no Metal back-end"):
        gyrokv.mlx.cache(llama_model())


@pytest.mark.parametrize(
    "kernel, said", [("decode", "outputs differ from torch's by"), ("block_map", "the block map of a mask")]
)
def test_wrong_kernels_are_noticed_before_they_are_used(kernel, said, monkeypatch):
    """There is no other backend to fall back on: a GPU that computes otherwise must not write text."""
    trial.check.cache_clear()
    with executed():
        right = mlx_machine.Machine.launch

        def launch(self, program, *arguments):
            found = right(self, program, *arguments)
            return [x + 1 for x in found] if program.kernel == kernel else found

        monkeypatch.setattr(mlx_machine.Machine, "launch", launch)
        with pytest.raises(GyroKVError, match=f"computes wrongly on this machine: {said}"):
            gyrokv.mlx.cache(llama_model())
        monkeypatch.undo()
        assert len(gyrokv.mlx.cache(llama_model())) == 2


def test_install_can_be_undone():
    """The models' function is ours while it is installed, and mlx-lm's own after."""
    gyrokv.mlx.uninstall()
    before = llama.scaled_dot_product_attention
    for _ in range(2):
        gyrokv.mlx.install()
        assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention is not before
    gyrokv.mlx.uninstall()
    assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention is before


def test_without_mlx_it_says_what_to_install():
    """On a machine without MLX the import fails with the name of the extra."""
    hidden = (
        "import importlib.util as u, sys; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'mlx' else real(name, *a)\nimport gyrokv.mlx"
    )
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, timeout=120)
    assert "install it with: pip install 'gyrokv[mlx]'" in done.stderr
