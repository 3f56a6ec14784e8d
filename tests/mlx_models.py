"""What the tests of ``gyrokv.mlx`` share: small models of mlx-lm with random weights, caches from a string."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.models import gpt_oss, llama

import gyrokv.mlx
from gyrokv.config import CacheConfig


def packed(config: str, window: int | None = None, keep: int = 0) -> gyrokv.mlx.PackedKVCache:
    return gyrokv.mlx.PackedKVCache(CacheConfig.parse(config).layer(0, 1, sliding=window is not None), window, keep)


def same(x: mx.array) -> torch.Tensor:
    return torch.from_numpy(np.array(x.astype(mx.float32)))


def llama_model():
    options = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4, vocab_size=61)
    return llama.Model(llama.ModelArgs(model_type="llama", num_key_value_heads=2, rms_norm_eps=1e-5, head_dim=32, **options))


def oss_model():
    """Learned sinks, sliding layers between full ones, experts."""
    options = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4, vocab_size=61)
    model = gpt_oss.Model(
        gpt_oss.ModelArgs(
            model_type="gpt_oss",
            num_key_value_heads=2,
            head_dim=32,
            sliding_window=20,
            num_local_experts=2,
            num_experts_per_tok=1,
            layer_types=["sliding_attention", "full_attention"],
            **options,
        )  # fmt: skip
    )
    for layer in model.model.layers:
        layer.self_attn.sinks = mx.array([0.5, -1.0, 2.0, 0.0])
    return model


def logits(model, cache, tokens: mx.array) -> mx.array:
    """Of a prompt in chunks and of single tokens after it."""
    parts, start = [], 0
    for count in (7, 60, 1, 1, 30, 1):
        parts.append(model(tokens[None, start : start + count], cache=cache))
        start += count
    return mx.concatenate(parts, axis=1)
