"""Decoding a bundled model end to end: transformers with gyrokv's cache beside llama.cpp, on the same tokens.

Needs the packages llama-cpp-python and gguf; without them :func:`measure` says so and measures nothing. The model is
converted to GGUF in float32, the precision that transformers computes in too, so that both differ in their caches and
their code only. Text quality plays no part: 16K tokens is past the positions that the model was trained on.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
MODEL, TEXT = ROOT / "models/qwen2-d128", ROOT / "models/heldout.txt"
PACKAGES = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}
FORMATS = ("f16", "q8_0", "q4_0")  # of both
OURS = ("none", "bf16", *FORMATS, "q8_0/turbo4", "turbo4")  # none: the cache that transformers has by itself
BATCH = 512  # prompt tokens per forward pass, of both
GATE_TOKENS, GATE_LIMIT = (32, 300), 1e-2  # relative error of the logits after so many tokens, llama.cpp's f16 cache

TENSORS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def interleaved(x: Tensor, head_dim: int) -> Tensor:
    """Rows ``[H * D, ...]`` of a projection whose rotary pairs are (i, i + D/2), with the pairs side by side."""
    return x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def convert(model: Path, out: Path) -> None:
    """Write the Qwen2 model in directory ``model`` as a float32 GGUF file without a tokenizer.

    Its architecture is "llama": llama.cpp's qwen2 takes no head size other than hidden size / heads, its llama takes
    any, and biases, but rotates neighbouring values. Raises ValueError for a tensor that this does not know.
    """
    from gguf import GGUFWriter

    config = json.loads((model / "config.json").read_text())
    dim = config["head_dim"]
    writer = GGUFWriter(str(out), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, tensor in load_file(model / "model.safetensors").items():
        renamed = whole.get(name) or ("output.weight" if name == "lm_head.weight" else None)
        if renamed is None:
            _, _, layer, part = name.split(".", 3)
            part, kind = part.rsplit(".", 1)
            if part not in TENSORS:
                raise ValueError(f"{model} has a tensor {name} that this conversion does not know")
            renamed = f"blk.{layer}.{TENSORS[part]}.{kind}"
            if TENSORS[part] in ("attn_q", "attn_k"):
                tensor = interleaved(tensor, dim)
        writer.add_tensor(renamed, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    """A GGUF model in llama.cpp with room for ``tokens`` and a cache of ``fmt`` for K and V; flash attention is on."""

    def __init__(self, path: Path, tokens: int, fmt: str, threads: int) -> None:
        import llama_cpp as api

        self.api = api
        self.log = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self.log, None)
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(os.fsencode(path), api.llama_model_default_params())
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = tokens, BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = getattr(api, f"GGML_TYPE_{fmt.upper()}")
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = self.model and api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp refuses the model or a {fmt} cache of {tokens} tokens")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def feed(self, ids: Tensor) -> Tensor:
        """Decode ``ids [T]`` after what was fed before; logits ``[vocabulary]`` of the last one."""
        for chunk in ids.split(BATCH):
            tokens = (self.api.llama_token * chunk.numel())(*chunk.tolist())
            if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, chunk.numel())):
                raise RuntimeError("llama.cpp could not decode")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (self.vocabulary,)))

    def close(self) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)


def timed(feed: Callable[[Tensor], Tensor], ids: Tensor, context: int, steps: int) -> dict:
    """Feed ``context`` tokens, then ``steps`` more one by one; times of the steps, each with the likeliest next token."""
    start = time.perf_counter_ns()
    feed(ids[:context]).argmax()
    prefill = time.perf_counter_ns() - start
    times = []
    for i in range(context, context + steps):
        start = time.perf_counter_ns()
        feed(ids[i : i + 1]).argmax()
        times.append(time.perf_counter_ns() - start)
    slow, middle, fast = (1e9 / float(t) for t in np.percentile(times[2:], (80, 50, 20)))
    speeds = {"tokens_per_s": middle, "tokens_per_s_p20": slow, "tokens_per_s_p80": fast}
    return speeds | {"steps": steps - 2, "prefill_tokens_per_s": context / prefill * 1e9}


def measure(contexts: list[int], steps: int) -> dict:
    """Decode ``steps`` tokens after each of ``contexts`` tokens with every cache of both. Returns rows with medians of
    tokens per second, or why there are none. Raises SystemExit if llama.cpp computes other logits than transformers."""
    lacking = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if lacking:
        why = f"not installed: {', '.join(lacking)}"
        print(f"peers: skipped, {why}")
        return {"skipped": why}
    from gyrokv.cli.loading import load
    from gyrokv.dispatch import AUTO, BACKENDS
    from gyrokv.evaluate import feed
    from gyrokv.hf import attach

    loaded, threads = load(str(MODEL), "float32", "cpu"), torch.get_num_threads()
    model, ids, rows = loaded.model, loaded.encode(TEXT.read_text(encoding="utf-8")), []
    if ids.numel() < max(contexts) + steps:
        raise SystemExit(f"peers: {TEXT.name} has {ids.numel()} tokens, too few for a context of {max(contexts)}")

    def ours(name: str) -> tuple[Callable[[Tensor], Tensor], ExitStack]:
        """A function that feeds a fresh cache of ``name``, and what to close after it."""
        from transformers import DynamicCache

        from gyrokv.hf import cache as new_cache

        stack = ExitStack()
        if name == "none":
            cache = DynamicCache(config=model.config)
        else:
            stack.enter_context(attach(model, name, strict=True))
            cache = new_cache(model, name, strict=True)
        return lambda ids: feed(model, cache, ids, ids.numel() - 1, BATCH)[-1], stack

    def add(by: str, cache: str, context: int, speeds: dict) -> None:
        rows.append({"by": by, "cache": cache, "context": context} | speeds)
        numbers = f"{speeds['tokens_per_s']:>8.1f} tokens/s (prefill {speeds['prefill_tokens_per_s']:.0f})"
        print(f"peers   {by:<20}{cache:<12} {context:>6} tokens {numbers}", flush=True)

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model.gguf"
        convert(MODEL, path)
        errors = []
        for count in GATE_TOKENS:
            feed_own, stack = ours("none")
            llama = Llama(path, count, "f16", threads)
            with stack:
                exact, got = feed_own(ids[:count]), llama.feed(ids[:count]).clone()
            llama.close()
            errors.append(float((got - exact).norm() / exact.norm()))
            if not errors[-1] <= GATE_LIMIT or got.argmax() != exact.argmax():
                raise SystemExit(f"gate: llama.cpp's logits after {count} tokens are off by {errors[-1]:.3g}")
        for context in contexts:
            for name in FORMATS:
                llama = Llama(path, context + steps, name, threads)
                add("llama.cpp", name, context, timed(llama.feed, ids, context, steps))
                llama.close()
            for name in OURS:
                feed_own, stack = ours(name)
                with stack:
                    speeds = timed(feed_own, ids, context, steps)
                add("transformers" if name == "none" else "transformers+gyrokv", name, context, speeds)
    import llama_cpp

    return {
        "model": MODEL.name,
        "dtype": "float32",
        "batch": BATCH,
        "threads": threads,
        "backend": next(name for name in AUTO if not BACKENDS[name].missing()),
        "packages": {package: importlib.metadata.version(package) for package in PACKAGES.values()},
        "llama.cpp": llama_cpp.llama_print_system_info().decode().strip(" |"),
        "positions_trained": model.config.max_position_embeddings,
        "logits_relative_error": errors,
        "rows": rows,
    }
