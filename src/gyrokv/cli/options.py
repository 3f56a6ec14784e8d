"""Options that several commands share, and the checks on their values."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..config import CacheConfig
from ..errors import GyroKVError
from ..formats import get_format

Model = Annotated[
    str,
    typer.Option(
        "-m", "--model", metavar="MODEL", help="A model in Hugging Face format: a directory, or hf:OWNER/NAME from the hub."
    ),
]
Text = Annotated[Path, typer.Option("-f", "--file", help="A text file (UTF-8).")]
CacheTypeK = Annotated[
    str | None, typer.Option("-ctk", "--cache-type-k", metavar="FORMAT", help="Format of keys (see `gyrokv formats`).")
]
CacheTypeV = Annotated[str | None, typer.Option("-ctv", "--cache-type-v", metavar="FORMAT", help="Format of values.")]
Cache = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="CONFIG",
        help="The whole cache config in place of -ctk and -ctv, e.g. 'k=q8_0,v=turbo4;first2:q8_0'.",
    ),
]
Context = Annotated[int, typer.Option("-c", "--ctx-size", help="Tokens per window.")]
Chunks = Annotated[int | None, typer.Option("--chunks", help="Windows to read; all of the text without it.")]
Batch = Annotated[int | None, typer.Option("-b", "--batch-size", help="Tokens per forward pass; a whole window without it.")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="auto (float32 on a CPU, else the checkpoint's), float32, float16 or bfloat16.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
AllowFallbacks = Annotated[
    bool, typer.Option("--allow-fallbacks", help="Go on when the model asks for dense keys or values.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class UserError(GyroKVError):
    """A mistake on the command line; the message names the option, the value and the limit."""


@contextmanager
def blame(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of ``kinds`` into a UserError that begins with ``what``."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{what}: {error}") from error


@contextmanager
def running(model: str) -> Iterator[None]:
    """Turn what gyrokv refuses about a model (such as its head size, a ValueError) into a UserError that names it."""
    try:
        yield
    except GyroKVError:
        raise
    except ValueError as error:
        raise UserError(f"-m {model}: {error}") from error


def parse_cache(text: str, option: str) -> CacheConfig:
    """A cache config as the user wrote it after ``option``. Raises UserError."""
    with blame(option, ValueError):
        return CacheConfig.parse(text)


def cache_config(cache: str | None, k: str | None, v: str | None, default: str) -> CacheConfig:
    """What ``--cache`` or ``-ctk`` and ``-ctv`` ask for; a side that is not named is stored as ``default``."""
    if cache is not None and (k is not None or v is not None):
        raise UserError("--cache and -ctk/-ctv exclude each other; write both sides into --cache 'k=...,v=...'")
    if cache is not None:
        return parse_cache(cache, "--cache")
    for option, name in (("-ctk", k), ("-ctv", v)):
        if name is not None:
            with blame(option, ValueError):
                get_format(name)
    return CacheConfig.parse(f"k={k or default},v={v or default}")


def at_least(option: str, value: int | float | None, least: int | float) -> None:
    """Raise UserError when ``value`` (None: not given) is below ``least``."""
    if value is not None and not value >= least:
        raise UserError(f"{option} {value} must be at least {least}")


def print_json(value: object) -> None:
    """Print ``value`` as JSON. Raises ValueError for NaN and infinity, which JSON does not have."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def console(stderr: bool = False, width: int = 120) -> Console:
    """A console; ``width`` columns where the stream is no terminal, which knows its own."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else width, highlight=False)
