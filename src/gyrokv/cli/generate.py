"""``gyrokv generate``: text from a quantised cache, as it is produced."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..evaluate import default_baseline, feed, label, usage
from .loading import Loaded, load, read_text
from .options import Cache, CacheTypeK, CacheTypeV, Device, Dtype, Model, UserError, at_least, cache_config, console, running

_CHUNK = 512  # prompt tokens per forward pass: bounds memory, and the progress bar moves
_LONG = 2048  # prompt tokens from which on progress is shown


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="The prompt.")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="A file that holds the prompt (UTF-8).")] = None,
    predict: Annotated[int, typer.Option("-n", "--predict", help="Tokens to generate, at most.")] = 128,
    cache_type_k: CacheTypeK = None,
    cache_type_v: CacheTypeV = None,
    cache: Cache = None,
    context: Annotated[
        int | None, typer.Option("-c", "--ctx-size", help="Limit on prompt and new tokens together; default: the model's.")
    ] = None,
    temperature: Annotated[float, typer.Option("--temp", help="Sampling temperature; 0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option("-s", "--seed", help="Seed for sampling.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Continue a prompt. Text goes to stdout; speed and cache size go to stderr."""
    at_least("-n", predict, 1)
    at_least("--temp", temperature, 0)
    at_least("-c", context, 2)
    if (prompt is None) == (file is None):
        raise UserError("give the prompt with either -p or -f")
    text = prompt if file is None else read_text(file)[0]
    cache_config(cache, cache_type_k, cache_type_v, "f16")  # mistakes show before a model is loaded
    loaded = load(model, dtype, device)
    config = cache_config(cache, cache_type_k, cache_type_v, default_baseline(loaded.model))
    ids = loaded.encode(text)
    if loaded.bos is not None:
        ids = torch.cat((torch.tensor([loaded.bos]), ids))
    if not ids.numel():
        raise UserError("the prompt is empty")
    total = ids.numel() + predict
    if context is not None and total > context:
        raise UserError(
            f"-c {context} is less than the {ids.numel()} tokens of the prompt and -n {predict} together ({total})"
        )
    loaded.check_context("-c" if context else "prompt and -n together:", context or total)
    with running(model):
        _run(loaded, config, ids, predict, temperature, seed)


def _run(loaded: Loaded, config, ids: Tensor, predict: int, temperature: float, seed: int) -> None:
    from ..hf import attach
    from ..hf import cache as new_cache

    model = loaded.model
    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad(), attach(model, config):
        cache = new_cache(model, config)
        start = time.perf_counter()
        logits = _prefill(model, cache, ids.to(model.device))
        prefill = time.perf_counter() - start
        count = steps = 0  # tokens taken, and those among them that were fed for a next one

        def tokens() -> Iterator[int]:
            nonlocal logits, count, steps
            stop = _stop_tokens(model)
            while count < predict:
                token = _sample(logits[-1], temperature, generator)
                count += 1
                if int(token) in stop:
                    return
                yield int(token)
                if count < predict:
                    logits = feed(model, cache, token.view(1))
                    steps += 1

        start = time.perf_counter()
        for piece in detokenize(loaded.tokenizer, tokens()):
            print(piece, end="", flush=True)
        print(flush=True)
        decode = time.perf_counter() - start
    held = usage(cache)
    dense = 2 * held.values
    lines = (
        f"prompt: {ids.numel()} tokens, {ids.numel() / prefill:.1f} tokens/s",
        f"generated: {count} tokens, {steps / decode:.1f} tokens/s",
        f"cache: {label(config)}, {held.live_nbytes:,} bytes for {held.tokens} tokens, {dense / held.live_nbytes:.2f}x "
        f"smaller than 16 bits ({dense:,}); {held.fallbacks} fallbacks",
    )
    print("\n" + "\n".join(lines), file=sys.stderr)


def _prefill(model: nn.Module, cache: object, ids: Tensor) -> Tensor:
    """Feed the prompt in chunks, with a progress bar for a long one on a terminal; logits of the last token."""
    hidden = ids.numel() < _LONG or not sys.stderr.isatty()
    shown = (TextColumn("prompt"), BarColumn(), TextColumn("{task.completed}/{task.total} tokens"), TimeRemainingColumn())
    with Progress(*shown, console=console(stderr=True), transient=True, disable=hidden) as progress:
        task = progress.add_task("prompt", total=ids.numel())
        for chunk in ids.split(_CHUNK):
            logits = feed(model, cache, chunk, chunk.numel() - 1)
            progress.advance(task, chunk.numel())
    return logits


def _stop_tokens(model: nn.Module) -> frozenset[int]:
    end = model.generation_config.eos_token_id
    return frozenset(() if end is None else (end,) if isinstance(end, int) else end)


def _sample(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token id from logits ``[vocabulary]``."""
    if temperature == 0:
        return logits.argmax()
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[0]


def detokenize(tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text as tokens arrive: whole characters only, because a token may end within a character's UTF-8 bytes.

    The tokens of the last piece are decoded again with each new one, since some tokenizers write a token differently
    (a leading space) at the start of a text.
    """
    held: list[int] = []
    shown = 0  # tokens of `held` whose text has been given out
    for token in tokens:
        held.append(token)
        before, after = _decode(tokenizer, held[:shown]), _decode(tokenizer, held)
        if len(after) > len(before) and not after.endswith("\ufffd"):
            yield after[len(before) :]
            held, shown = held[shown:], len(held) - shown
    rest = _decode(tokenizer, held)[len(_decode(tokenizer, held[:shown])) :]
    if rest:
        yield rest


def _decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
