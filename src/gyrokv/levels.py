"""How the literal level tables of ``formats.py`` were derived: Lloyd-Max on N(0, 1), then an integer grid.

Only tests and ``python -m gyrokv.levels`` import this module; the tables themselves are literals, because levels
computed at import could differ in the last bit between machines, and cache bytes would no longer be comparable.

Method: S. P. Lloyd, "Least squares quantization in PCM" (1982) and J. Max, "Quantizing for minimum distortion" (1960).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SQRT2 = math.sqrt(2.0)


def _pdf(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def _tail(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(x / _SQRT2)


def _edges(levels: Tensor) -> Tensor:
    """Decision boundaries of the positive half, from 0 to infinity: shape ``[n + 1]`` for ``n`` positive levels."""
    inner = 0.5 * (levels[1:] + levels[:-1])
    return torch.cat((levels.new_zeros(1), inner, levels.new_full((1,), math.inf)))


def mse(levels: Tensor) -> float:
    """Mean squared error on N(0, 1) of the symmetric table whose positive half is ``levels`` (float64, ascending)."""
    edges = _edges(levels)
    finite = edges.clamp_max(60.0)
    mass = _tail(edges[:-1]) - _tail(edges[1:])
    first = _pdf(edges[:-1]) - _pdf(finite[1:])
    second = mass + edges[:-1] * _pdf(edges[:-1]) - finite[1:] * _pdf(finite[1:])
    return 2.0 * float((second - 2.0 * levels * first + levels * levels * mass).sum())


def lloyd_max(bits: int, tolerance: float = 1e-13, limit: int = 400_000) -> Tensor:
    """Positive half ``[2 ** (bits - 1)]`` of the optimal ``2 ** bits``-level table for N(0, 1), float64.

    Iterates the two optimality conditions (boundaries are midpoints, levels are centroids) from the high-resolution
    guess of Panter and Dite (levels at the quantiles of N(0, 3)) until no level moves by more than ``tolerance``.
    """
    count = 2 ** (bits - 1)
    quantile = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = math.sqrt(3.0) * _SQRT2 * torch.erfinv(quantile)
    for _ in range(limit):
        edges = _edges(levels)
        mass = _tail(edges[:-1]) - _tail(edges[1:])
        centroids = (_pdf(edges[:-1]) - _pdf(edges[1:])) / mass
        moved = float((centroids - levels).abs().max())
        levels = centroids
        if moved < tolerance:
            break
    return levels


def to_grid(levels: Tensor, largest: int, candidates: int = 20_000) -> tuple[list[int], float, float]:
    """Round ``levels`` to ``integer * step`` with integers up to ``largest``, choosing the step of least error.

    Returns ``(integers of the positive half, step, mean squared error)``. Steps from ``levels[-1] / largest`` up to
    a third more are tried, so that between 3/4 and all of the integer range is used.
    """
    finest = float(levels[-1]) / largest
    best: tuple[list[int], float, float] | None = None
    for i in range(candidates):
        step = finest * (1.0 + i / (3.0 * candidates))
        grid = torch.round(levels / step)
        error = mse(grid * step)
        if best is None or error < best[2]:
            best = ([int(g) for g in grid], step, error)
    assert best is not None
    return best


def derive(bits: int) -> tuple[list[int], float, float, float]:
    """``(positive integers, step in units of sigma, its error, the optimum's error)`` of one converged row."""
    optimum = lloyd_max(bits)
    narrow = bits <= 4
    integers, step, error = to_grid(optimum, 127 if narrow else 32767, 20_000 if narrow else 400)
    return integers, step, error, mse(optimum)


if __name__ == "__main__":
    for width in (2, 3, 4, 5, 6, 8):
        integers, step, error, optimum_error = derive(width)
        print(f"{width} bits: step {step!r}  error {error:.6e}  ({error / optimum_error - 1:+.4%} over the optimum)")
        print(f"  {integers}")
