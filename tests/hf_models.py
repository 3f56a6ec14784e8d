"""Tiny random models of each family that the transformers integration supports, and the prompts they get."""

from __future__ import annotations

from functools import lru_cache

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

VOCAB, WINDOW = 97, 16
PROMPT, NEW = 72, 10  # longer than the ring buffer of a window of 16, which has 64 slots

_BASE = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
_SLIDING = {**_BASE, "head_dim": 64, "sliding_window": WINDOW}
_TYPES = ["sliding_attention", "full_attention"]
_GEMMA4 = {
    **_SLIDING,
    "head_dim": 256,
    "global_head_dim": 512,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
    "layer_types": _TYPES,
}
_GEMMA4_SHARED = {**_GEMMA4, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _TYPES * 2}
_GEMMA4_KEQV = {**_GEMMA4, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0}
_EXPERTS = dict(num_local_experts=2, num_experts_per_tok=2)  # all of them: rounding must not switch one for another

# name -> (config class, its arguments, the implementation to compare with: sdpa knows neither softcap nor sinks)
FAMILIES = {
    "llama": (LlamaConfig, {**_BASE, "head_dim": 64}, "sdpa"),
    "qwen2": (Qwen2Config, {**_BASE, "hidden_size": 128}, "sdpa"),
    "qwen3": (Qwen3Config, {**_BASE, "head_dim": 128}, "sdpa"),
    "mistral": (MistralConfig, _SLIDING, "sdpa"),
    "phi": (PhiConfig, {**_BASE, "hidden_size": 128}, "sdpa"),
    "phi3": (Phi3Config, {**_BASE, "hidden_size": 128, "sliding_window": WINDOW}, "sdpa"),
    "gemma2": (
        Gemma2Config,
        {**_SLIDING, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 64, "layer_types": _TYPES},
        "eager",
    ),
    "gemma3": (Gemma3TextConfig, {**_SLIDING, "layer_types": _TYPES}, "sdpa"),
    "gpt_oss": (GptOssConfig, {**_SLIDING, **_EXPERTS, "layer_types": _TYPES}, "eager"),
    "gemma4": (Gemma4TextConfig, _GEMMA4, "sdpa"),
    "gemma4_shared": (Gemma4TextConfig, _GEMMA4_SHARED, "sdpa"),
    "gemma4_k_eq_v": (Gemma4TextConfig, _GEMMA4_KEQV, "sdpa"),
}
SLIDING = ("mistral", "phi3", "gemma2", "gemma3", "gpt_oss", "gemma4", "gemma4_shared", "gemma4_k_eq_v")

LATENT = (
    DeepseekV3Config,
    {
        **_BASE, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 64, "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 2,
    },
    "sdpa",
)  # fmt: skip


def make(row: tuple, *, seed: int = 0, dtype: torch.dtype = torch.float32, attn: str | None = None):
    """A model of a row of FAMILIES, with weights large enough that its logits are not flat."""
    config_class, arguments, implementation = row
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class(**arguments), attn_implementation=attn or implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(0, 2)
            elif parameter.ndim > 1:
                parameter.mul_(3.0)
    # how much is drafted must not depend on what else is installed (transformers asks scikit-learn for a threshold)
    model.generation_config.assistant_confidence_threshold = 0.0
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.num_assistant_tokens = 5
    return model.to(dtype).eval()


@lru_cache(maxsize=4)
def family(name: str, seed: int = 0, dtype: torch.dtype = torch.float32):
    """The model of a family; shared between tests, which must leave it as it was."""
    model = make(FAMILIES[name], seed=seed, dtype=dtype)
    model.family = name
    return model


def prompts(padded: bool = True) -> dict:
    """Arguments of ``generate``: two prompts, the first with left padding; or one prompt, which may repeat itself (so
    that guesses of the next tokens are right at times)."""
    ids = torch.randint(2, VOCAB, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :21], ids[0, :21] = 0, 0
    rows = slice(None) if padded else slice(1, None)
    given = dict(input_ids=ids[rows], attention_mask=attention_mask[rows], max_new_tokens=NEW, do_sample=False)
    return {**given, "no_repeat_ngram_size": 2} if padded else given
