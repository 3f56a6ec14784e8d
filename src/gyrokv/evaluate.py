"""What a cache format costs: perplexity and KL divergence of a causal language model that reads a quantised cache.

Every window of the text is fed through a fresh cache. A layer appends before it attends, so each key and value that
a token attends to, its own included, has been through the format; a forward pass that kept the prompt's keys dense
would measure nothing. The first half of each window is context and the second half is scored, as llama.cpp's
perplexity tool does, and all configs see the same windows.

One window is finished for all configs before the next one starts, so the only log-probabilities that are held are
one window's of the baseline and of one config: the 16-bit run is neither stored for the whole text nor repeated.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone

import torch
from torch import Tensor, nn

from .config import CacheConfig
from .env import environment
from .errors import EvaluationError
from .scoring import divergence, first_scored, mean_and_error, score, windows

DEFAULT_PAIRS = (
    "q8_0/q8_0", "fp8_e4m3/fp8_e4m3", "tq6/tq5", "q8_0/turbo4", "q8_0/turbo3", "q4_0/q4_0", "turbo4/turbo4",
    "turbo3/turbo3", "turbo2/turbo2",
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Perplexity over the windows so far, and what the cache held at the end of the last one.

    ``ppl_se``: standard error, tokens taken as independent. ``bytes_per_token``: bytes of the live rows of all
    layers, scales and padding included, over the tokens of a window. ``bits_per_value``: the same over the values
    that those rows stand for. ``dense_bytes_per_token``: those values at 16 bits. ``prefill_tokens_per_s``: median
    over the windows, forward pass only. ``fallbacks``: how often something asked for dense keys or values.
    """

    windows: int
    scored_tokens: int
    ppl: float
    ppl_se: float
    bytes_per_token: float
    bits_per_value: float
    dense_bytes_per_token: float
    prefill_tokens_per_s: float
    fallbacks: int


@dataclass(frozen=True)
class Row:
    """One config of a comparison; differences and divergences are against the baseline, token by token.

    ``delta_nll``: mean of (NLL of this config - NLL of the baseline) in nats, ``delta_nll_se`` its standard error
    over the paired tokens. ``kl_mean``, ``kl_p99``: KL(baseline || config) over the whole vocabulary, in nats.
    ``top1``: share of tokens for which both put the same token first. ``ratio``: baseline bytes over bytes.
    ``decode_tokens_per_s``: one token at a time after a full window, None when it was not measured.
    """

    config: str
    label: str
    k: str
    v: str
    estimate: Estimate
    ratio: float
    delta_nll: float
    delta_nll_se: float
    delta_ppl_percent: float
    kl_mean: float
    kl_p99: float
    top1: float
    decode_tokens_per_s: float | None


@dataclass(frozen=True)
class Comparison:
    """All configs on one model and one text: ``rows[0]`` is the baseline."""

    model: dict
    tokens: dict
    settings: dict
    rows: tuple[Row, ...]
    seconds: float

    def to_dict(self) -> dict:
        """Plain lists, dicts, numbers and strings."""
        return asdict(self)


def feed(model: nn.Module, cache: object, ids: Tensor, first: int = 0, batch: int | None = None) -> Tensor:
    """Feed ``ids [T]`` through ``cache``, ``batch`` tokens at a time (all at once without it).

    Returns the logits of positions ``first <= p < T``: ``[T - first, vocabulary]`` in the model's dtype.
    """
    lean = "logits_to_keep" in inspect.signature(model.forward).parameters
    parts = []
    for start in range(0, ids.numel(), batch or ids.numel()):
        chunk = ids[start : start + (batch or ids.numel())]
        wanted = max(0, start + chunk.numel() - max(first, start))
        keep = {"logits_to_keep": max(1, wanted)} if lean else {}
        logits = model(input_ids=chunk[None], past_key_values=cache, use_cache=True, **keep).logits[0]
        if wanted:
            parts.append(logits[-wanted:])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def default_baseline(model: nn.Module) -> str:
    """The 16-bit cache that a model would have anyway: bf16 for a bfloat16 model, otherwise f16."""
    return "bf16" if model.dtype == torch.bfloat16 else "f16"


def label(config: CacheConfig) -> str:
    """The config in its short form, ``K/V`` for most; it parses to the same config."""
    return re.sub(r"\bk=([^,;]+),v=([^,;]+)", r"\1/\2", str(config))


@dataclass(frozen=True)
class Usage:
    """What a model's cache holds. ``tokens``: that every layer has seen, 0 when they disagree; ``values``: numbers
    that the rows held stand for; ``live_nbytes``: bytes of those rows; ``quantised``: some are in a format that is
    not dense; ``fallbacks``: how often something asked for dense keys or values."""

    tokens: int
    values: int
    live_nbytes: int
    quantised: bool
    fallbacks: int


def usage(cache) -> Usage:
    """Count what the packed layers of a cache of :func:`gyrokv.hf.cache` hold, from their tensors."""
    seen = {layer.get_seq_length() for layer in cache.packed}
    stores = [layer.store for layer in cache.packed if layer.store is not None]
    values = sum(
        store.batch * store.kv_heads * store.view().kv_len * (store.k_codec.head_dim + store.v_codec.head_dim)
        for store in stores
    )
    quantised = any(not c.format.is_dense for store in stores for c in (store.k_codec, store.v_codec))
    live = sum(store.live_nbytes for store in stores)
    return Usage(seen.pop() if len(seen) == 1 else 0, values, live, quantised, cache.fallbacks)


@dataclass
class _Run:
    """One config: what its windows gave so far."""

    config: CacheConfig
    allow_fallbacks: bool
    nll: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    decode: float | None = None
    fallbacks: int = 0
    quantised: bool = False
    sizes: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def window(self, model: nn.Module, ids: Tensor, batch: int | None) -> Tensor:
        """Feed one window ``[T]``, score its second half and return the logits that were scored."""
        from .hf import cache as new_cache

        name, first = label(self.config), first_scored(ids.numel())
        cache = new_cache(model, self.config)
        start = time.perf_counter()
        logits = feed(model, cache, ids, first, batch)[:-1]
        _wait(logits)
        self.speeds.append(ids.numel() / (time.perf_counter() - start))
        if not bool(torch.isfinite(logits).all()):
            raise EvaluationError(f"{name}: the model's logits hold NaN or inf in window {len(self.nll) + 1}")
        self._inspect(cache, ids.numel())
        self.nll.append(score(logits, ids[first + 1 :]))
        return logits

    def _inspect(self, cache, length: int) -> None:
        """Note what ``cache`` holds after ``length`` tokens. Raises EvaluationError if it was not used as a cache."""
        name, held = label(self.config), usage(cache)
        if held.tokens != length:
            raise EvaluationError(f"{name}: the cache holds {held.tokens} tokens of {length}; the model did not use it")
        self.fallbacks += held.fallbacks
        if self.fallbacks and not self.allow_fallbacks:
            raise EvaluationError(
                f"{name}: the model asked {self.fallbacks} times for dense keys or values, so what it attended to was not "
                "read from the packed cache; allow fallbacks to measure it nevertheless"
            )
        self.quantised = held.quantised
        self.sizes = (held.live_nbytes / length, 8 * held.live_nbytes / held.values, 2 * held.values / length)

    def time_decode(self, model: nn.Module, ids: Tensor, steps: int, batch: int | None) -> None:
        """Median speed of the last ``steps`` tokens of a window ``[T]``, fed one by one."""
        from .hf import cache as new_cache

        cache = new_cache(model, self.config)
        feed(model, cache, ids[:-steps], ids.numel() - steps - 1, batch)
        seconds = []
        for i in range(ids.numel() - steps, ids.numel()):
            start = time.perf_counter()
            _wait(feed(model, cache, ids[i : i + 1]))
            seconds.append(time.perf_counter() - start)
        self.decode = 1.0 / torch.tensor(seconds).median().item()

    def estimate(self) -> Estimate:
        nll = torch.cat(self.nll)
        mean, error = mean_and_error(nll)
        ppl = math.exp(mean)
        return Estimate(
            len(self.nll), nll.numel(), ppl, ppl * error, *self.sizes,
            prefill_tokens_per_s=torch.tensor(self.speeds).median().item(), fallbacks=self.fallbacks,
        )  # fmt: skip

    def row(self, base: _Run) -> Row:
        nll, base_nll = torch.cat(self.nll), torch.cat(base.nll)
        delta, error = mean_and_error(nll - base_nll)
        kl = torch.cat(self.kl)
        estimate, policy = self.estimate(), self.config.default
        return Row(
            str(self.config), label(self.config), policy.k, policy.v, estimate,
            ratio=base.sizes[0] / self.sizes[0], delta_nll=delta, delta_nll_se=error,
            delta_ppl_percent=100.0 * math.expm1(delta), kl_mean=kl.mean().item(), kl_p99=kl.quantile(0.99).item(),
            top1=torch.cat(self.same).double().mean().item(), decode_tokens_per_s=self.decode,
        )  # fmt: skip


def _wait(x: Tensor) -> None:
    """Return when ``x`` has been computed: an accelerator runs behind the clock."""
    if x.device.type != "cpu":
        torch.accelerator.synchronize()


def perplexity(
    model: nn.Module,
    ids: Tensor,
    config: CacheConfig | str,
    *,
    length: int = 512,
    count: int | None = None,
    bos: int | None = None,
    batch: int | None = None,
    allow_fallbacks: bool = False,
) -> Iterator[Estimate]:
    """The perplexity of a text ``ids [N]`` through the cache, after each of its windows.

    Arguments as in :func:`compare`. Raises EvaluationError as soon as a window shows that the number means nothing.
    """
    from .hf import attach

    parts = windows(ids, length, count, bos)
    run = _Run(CacheConfig.parse(config), allow_fallbacks)
    with torch.no_grad(), attach(model, run.config):
        for part in parts.to(model.device):
            run.window(model, part, batch)
            yield run.estimate()


def compare(
    model: nn.Module,
    ids: Tensor,
    configs: Sequence[CacheConfig | str],
    *,
    baseline: CacheConfig | str | None = None,
    length: int = 512,
    count: int | None = None,
    bos: int | None = None,
    batch: int | None = None,
    decode: int = 16,
    allow_fallbacks: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Comparison:
    """Compare ``configs`` with ``baseline`` (default: the 16-bit cache) on the windows of a text ``ids [N]``.

    ``model``: a transformers causal model in eval mode, with ids on any device. ``length``, ``count``, ``bos``: see
    :func:`windows`. ``batch``: tokens per forward pass, all of a window without it. ``decode``: tokens at the end of
    the last window to be timed one by one, in a second pass over it; 0 for none. ``progress(done, total, label)`` is
    called after each pass of each config.

    Raises EvaluationError for a text or windows that are too short, for NaN, when a model did not use the cache or
    asked for dense values (unless ``allow_fallbacks``), and when a quantised config gave the same NLL as the baseline
    for every token, which means that nothing was quantised.
    """
    from .hf import attach

    parts = windows(ids, length, count, bos)
    if not 0 <= decode < length:
        raise EvaluationError(f"decode={decode} tokens must be at least 0 and less than the window of {length}")
    start = time.perf_counter()
    base = _Run(CacheConfig.parse(baseline or default_baseline(model)), allow_fallbacks)
    runs = [base, *(_Run(CacheConfig.parse(config), allow_fallbacks) for config in configs)]
    done, total = 0, (len(parts) + bool(decode)) * len(runs)

    def step(run: _Run) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, label(run.config))

    with torch.no_grad(), attach(model, base.config):
        for part in parts.to(model.device):
            for run in runs:
                logits = run.window(model, part, batch)
                if run is base:
                    reference = logits
                kl, same = divergence(reference, logits)
                run.kl.append(kl)
                run.same.append(same)
                step(run)
            _check_difference(base, runs[1:])
        for run in runs if decode else ():
            run.time_decode(model, part, decode, batch)
            step(run)
    settings = {
        "window": length, "windows": len(parts), "scored_per_window": length - 1 - first_scored(length),
        "bos": bos, "batch": batch, "decode": decode, "baseline": str(base.config), "allow_fallbacks": allow_fallbacks,
    }  # fmt: skip
    tokens = {"count": ids.numel(), "sha256": hashlib.sha256(ids.to("cpu", torch.int64).numpy().tobytes()).hexdigest()}
    return Comparison(
        describe_model(model), tokens, settings, tuple(run.row(base) for run in runs), time.perf_counter() - start
    )


def _check_difference(base: _Run, runs: Sequence[_Run]) -> None:
    for run in runs:
        if run.quantised and all(torch.equal(a, b) for a, b in zip(run.nll, base.nll)):
            raise EvaluationError(
                f"{label(run.config)}: every NLL equals that of {label(base.config)} exactly, so nothing was quantised"
            )


def describe_model(model: nn.Module) -> dict:
    """Where a model came from, its class, parameters, dtype, device and attention layers."""
    config = model.config.get_text_config()
    return {
        "path": model.config.name_or_path,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "layers": config.num_hidden_layers,
        "max_positions": getattr(config, "max_position_embeddings", None),
    }


def report(comparisons: Sequence[Comparison], texts: Sequence[dict], command: str) -> dict:
    """A JSON-serialisable record: ``models`` (one entry per comparison, with its ``text``), environment, command,
    and ``when`` (UTC, ISO 8601)."""
    models = [{**c.to_dict(), "text": text} for c, text in zip(comparisons, texts)]
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"command": command, "when": when, "environment": environment(), "models": models}
