"""``gyrokv ppl`` and ``gyrokv compare``: what a cache format costs on your model and your text."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .. import evaluate
from ..config import CacheConfig
from ..page import columns, method, page
from ..scoring import SHORTEST
from .loading import load, read_text, require
from .options import (
    AllowFallbacks,
    Batch,
    Cache,
    CacheTypeK,
    CacheTypeV,
    Chunks,
    Context,
    Device,
    Dtype,
    Model,
    Text,
    UserError,
    at_least,
    blame,
    cache_config,
    console,
    parse_cache,
    running,
)

_PLOTS = (".png", ".svg")


def ppl(
    model: Model,
    file: Text,
    context: Context = 512,
    chunks: Chunks = None,
    cache_type_k: CacheTypeK = None,
    cache_type_v: CacheTypeV = None,
    cache: Cache = None,
    batch: Batch = None,
    allow_fallbacks: AllowFallbacks = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Perplexity of a text, read through the cache: windows of -c tokens, the second half of each is scored."""
    _check_sizes(context, chunks, batch)
    cache_config(cache, cache_type_k, cache_type_v, "f16")  # mistakes show before a model is loaded
    text, _ = read_text(file)
    loaded = load(model, dtype, device)
    loaded.check_context("-c", context)
    config = cache_config(cache, cache_type_k, cache_type_v, evaluate.default_baseline(loaded.model))
    ids = loaded.encode(text)
    start = time.perf_counter()
    estimates = evaluate.perplexity(
        loaded.model, ids, config, length=context, count=chunks, bos=loaded.bos, batch=batch, allow_fallbacks=allow_fallbacks
    )
    with running(model):
        for estimate in estimates:
            print(f"[{estimate.windows}]{estimate.ppl:.4f},", end="", flush=True)
    print(f"\nFinal estimate: PPL = {estimate.ppl:.4f} +/- {estimate.ppl_se:.5f}")
    smaller = estimate.dense_bytes_per_token / estimate.bytes_per_token
    print(
        f"cache {evaluate.label(config)}: {estimate.bytes_per_token:,.1f} bytes per token, {estimate.bits_per_value:.3f} "
        f"bits per value, {smaller:.2f}x smaller than 16 bits; {estimate.fallbacks} fallbacks\n"
        f"{estimate.scored_tokens} tokens scored in {estimate.windows} windows of {context}; "
        f"{estimate.prefill_tokens_per_s:.1f} tokens/s; {time.perf_counter() - start:.1f} s",
        file=sys.stderr,
    )


def compare(
    model: Annotated[
        list[str],
        typer.Option(
            "-m", "--model", metavar="MODEL", help="A model directory, or hf:OWNER/NAME. Several give several tables."
        ),
    ],
    file: Text,
    pairs: Annotated[
        str | None,
        typer.Option("--pairs", metavar="K/V,...", help="K/V pairs, separated by commas: q8_0/turbo4,q4_0/q4_0,..."),
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option("--cache", metavar="CONFIG", help="A whole cache config to compare as well; may be repeated."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="CONFIG", help="What to compare with; default: the 16-bit cache (f16 or bf16)."),
    ] = None,
    context: Context = 512,
    chunks: Chunks = None,
    batch: Batch = None,
    decode: Annotated[int, typer.Option("--decode", help="Tokens per config to time one by one; 0 for none.")] = 16,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers here as JSON.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Write a plot here (.png or .svg).")] = None,
    html_path: Annotated[Path | None, typer.Option("--html", help="Write a report page here.")] = None,
    allow_fallbacks: AllowFallbacks = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Compare cache formats on one text: bytes, perplexity, KL divergence against the 16-bit cache, speed."""
    _check_sizes(context, chunks, batch)
    if not 0 <= decode < context:
        raise UserError(f"--decode {decode} must be between 0 and {context - 1} (-c less one)")
    configs = _configs(pairs, cache)
    reference = None if baseline is None else parse_cache(baseline, "--baseline")
    _check_outputs(json_path, plot_path, html_path)
    text, about = read_text(file)
    results = []
    for name in model:
        loaded = load(name, dtype, device)
        loaded.check_context("-c", context)
        with running(name), _progress(name) as progress:
            result = evaluate.compare(
                loaded.model, loaded.encode(text), configs, baseline=reference, length=context, count=chunks,
                bos=loaded.bos, batch=batch, decode=decode, allow_fallbacks=allow_fallbacks, progress=progress,
            )  # fmt: skip
        results.append(result)
        _print_table({**result.to_dict(), "text": about})
    record = evaluate.report(results, [about] * len(results), shlex.join(("gyrokv", *sys.argv[1:])))
    if json_path is not None:
        with blame(f"--json {json_path}", OSError):
            json_path.write_text(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    if plot_path is not None:
        from .. import plot

        with blame(f"--plot {plot_path}", OSError):
            plot.save(record["models"], plot_path)
    if html_path is not None:
        with blame(f"--html {html_path}", OSError):
            html_path.write_text(page(record), "utf-8")


def _check_sizes(context: int, chunks: int | None, batch: int | None) -> None:
    at_least("-c", context, SHORTEST)
    at_least("--chunks", chunks, 1)
    at_least("-b", batch, 1)


def _configs(pairs: str | None, caches: Sequence[str] | None) -> list[CacheConfig]:
    """The configs that ``--pairs`` and ``--cache`` name, or the usual ones when neither is given."""
    wanted = [] if pairs is None else [("--pairs", pair.strip()) for pair in pairs.split(",")]
    wanted += [("--cache", text) for text in caches or ()]
    configs = [parse_cache(text, option) for option, text in wanted or [("--pairs", p) for p in evaluate.DEFAULT_PAIRS]]
    twice = [evaluate.label(c) for i, c in enumerate(configs) if c in configs[:i]]
    if twice:
        raise UserError(f"{twice[0]} is given twice")
    return configs


def _check_outputs(json_path: Path | None, plot_path: Path | None, html_path: Path | None) -> None:
    """Find what would fail only after a long run."""
    if plot_path is not None and plot_path.suffix not in _PLOTS:
        raise UserError(f"--plot {plot_path} must end in {' or '.join(_PLOTS)}")
    for option, path in (("--plot", plot_path), ("--html", html_path), ("--json", json_path)):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{option} {path}: there is no directory {path.parent}")
        if path is not None and path.is_dir():
            raise UserError(f"{option} {path} is a directory")
    if plot_path is not None or html_path is not None:
        require("matplotlib", "eval", "--plot and --html")


@contextmanager
def _progress(name: str):
    """What ``evaluate.compare`` reports, as a bar on a terminal and otherwise as a line for each tenth."""
    shown = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    start = time.perf_counter()
    terminal = sys.stderr.isatty()
    with Progress(*shown, console=console(stderr=True), transient=True, disable=not terminal) as bar:
        task = bar.add_task(Path(name).name, total=None)

        def report(done: int, total: int, config: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{Path(name).name} {config[:30]}")
            if not terminal and 10 * done // total > 10 * (done - 1) // total:
                print(f"{name}: {done}/{total} runs, {time.perf_counter() - start:.0f} s", file=sys.stderr)

        yield report


def _print_table(entry: dict) -> None:
    """The table of one model; a terminal that is too narrow for it gets the most telling columns."""
    shown = columns(entry["rows"])
    full, endless = _table(entry, shown), Console(width=1000)
    needed = Measurement.get(endless, endless.options, full)
    out = console(width=needed.maximum)
    fits = needed.minimum <= out.width
    out.print(full if fits else _table(entry, [c for c in shown if c.narrow]))
    out.print(method(entry), style="dim")
    if not fits:
        print(f"(all columns need {needed.minimum} characters, there are {out.width}; --json and --html have everything)")
    print()


def _table(entry: dict, shown: Sequence) -> Table:
    model = entry["model"]
    title = f"{model['path']}: {model['class']}, {model['dtype']} on {model['device']}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in shown:
        if column is shown[0]:  # the only one that may be long
            table.add_column(column.heading, min_width=18, overflow="fold")
        else:
            table.add_column(column.heading, justify="right", no_wrap=True)
    for i, row in enumerate(entry["rows"]):
        table.add_row(*(column.text(row) for column in shown), style="dim" if i == 0 else None)
    return table
