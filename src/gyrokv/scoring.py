"""Windows of a text, and what is computed from a model's logits on them. Knows neither models nor caches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import EvaluationError

SHORTEST = 8  # tokens in a window
_ROWS = 64  # rows of logits that are turned into float64 log-probabilities at once


def windows(ids: Tensor, length: int, count: int | None = None, bos: int | None = None) -> Tensor:
    """The first ``count`` disjoint windows (all without it) of a text ``ids [N]``: ``[n, length]``.

    ``bos`` replaces the first token of every window (a token that is never scored), as llama.cpp does for models
    that expect one. Raises EvaluationError for windows that are too short or a text that has too few.
    """
    if ids.ndim != 1 or ids.is_floating_point():
        raise EvaluationError(f"ids has shape {tuple(ids.shape)}, {ids.dtype}; it must be integer [N]")
    if length < SHORTEST:
        raise EvaluationError(f"a window of {length} tokens is too short; the least is {SHORTEST}")
    if count is not None and count < 1:
        raise EvaluationError(f"{count} windows were asked for; the least is 1")
    available = ids.numel() // length
    if available < (count or 1):
        raise EvaluationError(
            f"the text has {ids.numel()} tokens, which is {available} windows of {length}; {count or 1} are needed"
        )
    parts = ids[: (count or available) * length].view(-1, length).clone()
    if bos is not None:
        parts[:, 0] = bos
    return parts


def first_scored(length: int) -> int:
    """The position in a window whose logits are the first to be scored; they predict the token after it."""
    return length // 2


def log_probs(logits: Tensor) -> Tensor:
    """Log-softmax in float64, on the CPU for a device that has no float64."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double().log_softmax(-1)


def score(logits: Tensor, targets: Tensor) -> Tensor:
    """NLL in nats of ``targets [n]`` under ``logits [n, vocabulary]``: float64 ``[n]`` on the CPU."""
    parts = []
    for part, aim in zip(logits.split(_ROWS), targets.split(_ROWS)):
        logs = log_probs(part)
        parts.append(-logs.gather(1, aim.to(logs.device)[:, None])[:, 0].cpu())
    return torch.cat(parts)


def divergence(base: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """KL(base || config) in nats, float64 ``[n]``, and whether both put the same token first, bool ``[n]``.

    Both arguments are logits ``[n, vocabulary]`` for the same positions.
    """
    kl, same = [], []
    for left, right in zip(base.split(_ROWS), logits.split(_ROWS)):
        p, q = log_probs(left), log_probs(right)
        kl.append((p.exp() * (p - q)).sum(-1).cpu())
        same.append((left.argmax(-1) == right.argmax(-1)).cpu())
    return torch.cat(kl), torch.cat(same)


def mean_and_error(x: Tensor) -> tuple[float, float]:
    """Mean of ``x [n]`` and its standard error, values taken as independent (at least two)."""
    return x.mean().item(), x.std().item() / math.sqrt(x.numel())
