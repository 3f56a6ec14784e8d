"""What ``cpu.py`` measures, and the comparison with float64 without which nothing is timed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, product

import peers
import torch
from torch import Tensor

from gyrokv import FORMATS, AttentionSpec, Codec, LayerCache, append, attend, attention
from gyrokv.dispatch import BACKENDS, reasons
from gyrokv.testing import inputs

KV_HEADS = 8
GROUP = 4  # query heads per KV head, where nothing else is said
GROUPS = tuple(range(1, 17))
HEAD_DIMS, PREFILL_DIMS = (64, 96, 128, 192, 256, 512), (128, 256, 512)
KV_LENS = (4096, 16384)
PREFILL = (512, 4096)  # queries, keys
MIXED = ("q8_0/turbo4", "turbo4/turbo2")
QUICK = ("bf16", "q8_0", "q4_0", "turbo4", "turbo3", "q8_0/turbo4")
PREFILL_FORMATS = ("bf16", "q8_0", "turbo4", "tq6", "turbo3")
PARTS = ("decode", "prefill", "append", "peers")
# relative error that the gate allows, by what a point asks for: a bfloat16 output alone is rounded by 2e-3
LIMITS = {"exact": 3e-4, "fast": 3e-2, "bfloat16": 5e-3}
GATE_TOKENS, GATE_QUERIES = 777, 33
PEER_DTYPES = (torch.bfloat16, torch.float32)
CHUNK = 1024  # tokens encoded at once: bounds memory


@dataclass(frozen=True)
class Point:
    """One configuration of our kernels. ``formats``: of K and V, ``K/V`` or one for both. ``level``: the instruction
    set that is forced, or "" for the machine's best. ``fast``: attend's argument."""

    part: str
    formats: str
    head_dim: int
    kv_len: int
    groups: int = GROUP
    q_len: int = 1
    causal: bool = True
    fast: bool = False
    level: str = ""

    @property
    def pair(self) -> tuple[str, str]:
        k, _, v = self.formats.partition("/")
        return k, v or k

    @property
    def spec(self) -> AttentionSpec:
        extra = {"dtype": self.dtype} | ({"fast": True} if self.fast else {})
        sizes = dict(q_heads=KV_HEADS * self.groups, kv_heads=KV_HEADS, q_len=self.q_len, kv_len=self.kv_len)
        return AttentionSpec(*self.pair, self.head_dim, self.head_dim, **sizes, causal=self.causal, **extra)

    @property
    def dtype(self) -> torch.dtype:
        """Of q: prefill comes from models as bfloat16."""
        return torch.bfloat16 if self.part == "prefill" else torch.float32

    @property
    def mode(self) -> str:  # a key of LIMITS
        return "fast" if self.fast else "bfloat16" if self.dtype == torch.bfloat16 else "exact"

    def attend(self, q: Tensor, kv, backend: str) -> Tensor:
        extra = {"fast": True} if self.fast else {}
        return attend(q, kv, causal=self.causal, backend=backend, **extra)

    def __str__(self) -> str:
        queries = "" if self.q_len == 1 else f" q{self.q_len} {'causal' if self.causal else 'full'}"
        marks = [m for m in ("fast" if self.fast else "", self.level) if m]
        return " ".join([f"{self.formats:<13} d{self.head_dim} kv{self.kv_len} g{self.groups}{queries}", *marks])


def plan(options: argparse.Namespace) -> list[Point]:
    """Every configuration of our kernels that this run times, those that read the same data side by side."""
    points, first = [], min(options.kv_len)
    rounds = hasattr(BACKENDS[options.backend], "FAST_BOUND")  # others understand fast and do nothing else for it
    for dim, kv_len, formats in product(options.head_dim, options.kv_len, options.formats):
        everything = dim == 128 and kv_len == first and not options.quick
        for groups in options.groups if everything else (GROUP,):
            point = Point("decode", formats, dim, kv_len, groups)
            dense = all(FORMATS[name].is_dense for name in point.pair)
            forced = peers.levels(options.backend) if everything and groups == GROUP else []
            modes = (False, True) if rounds and not dense else (False,)
            points += [replace(point, fast=fast, level=level) for level in ("", *forced) for fast in modes]
    for dim, causal, formats in product(options.head_dim, (False, True), PREFILL_FORMATS):
        if dim in PREFILL_DIMS and formats in options.formats:
            points.append(Point("prefill", formats, dim, PREFILL[1], q_len=PREFILL[0], causal=causal))
    points += [Point("append", formats, 128, tokens) for formats in options.formats for tokens in (PREFILL[1], 1)]
    return [point for point in points if point.part in options.only]


def refused(points: list[Point], backend: str) -> dict[Point, list[str]]:
    """The points that ``backend`` cannot run, with its reasons (append falls back by itself)."""
    why = {point: reasons(BACKENDS[backend], point.spec) for point in points if point.part != "append"}
    return {point: reasons for point, reasons in why.items() if reasons}


def gate(points: list[Point], backend: str) -> dict:
    """Compare every distinct configuration with float64 on inputs that show mistakes. Raises SystemExit on the first
    that is off. Returns the number of checks and the worst relative errors."""
    worst = dict.fromkeys(LIMITS, 0.0)
    small = {replace(point, kv_len=GATE_TOKENS, q_len=min(point.q_len, GATE_QUERIES)) for point in points}
    order = sorted(small, key=lambda p: (p.part, p.head_dim, p.formats, p.groups, p.causal))
    for spec, group in groupby(order, key=lambda p: (p.part, replace(p, fast=False, level="").spec)):
        problem = inputs(spec[1])
        for point in group:
            if point.part == "append":
                error = _append_error(point, problem)
            else:
                with peers.forced(backend, point.level):
                    out = point.attend(problem.q, problem.view, backend)
                error = _relative(out, problem.exact[0])
            limit = LIMITS[point.mode]
            if not error <= limit:
                raise SystemExit(f"gate: {point.part} {point} is off by {error:.3g}, allowed {limit:g}; nothing was timed")
            worst[point.mode] = max(worst[point.mode], error)
    for dim in sorted({p.head_dim for p in points if p.part == "prefill"}):
        _check_peers(dim)
    print(f"gate: {len(order)} configurations are right, relative error at most {worst['exact']:.1e}")
    return {
        "configurations": len(order),
        "worst_relative_error": worst,
        "limits": LIMITS,
    }


def _relative(got: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(got.double() - exact) / torch.linalg.vector_norm(exact))


def _append_error(point: Point, problem) -> float:
    """0 when ``gyrokv.append`` stores the bits that the definition stores, else 1."""
    layer = new_layer(point, GATE_TOKENS)
    append(layer, problem.k, problem.v)
    wanted, got = problem.view.owner.state()[0], layer.state()[0]
    return float(not all(torch.equal(wanted[name].view(torch.uint8), got[name].view(torch.uint8)) for name in wanted))


def _check_peers(dim: int) -> None:
    """The forms in which torch's own attention is timed compute the same thing. Raises SystemExit."""
    q, k, v = torch.randn(1, KV_HEADS * GROUP, GATE_QUERIES, dim), *torch.randn(2, 1, KV_HEADS, GATE_TOKENS, dim)
    for causal in (False, True):
        exact = attention(q, k, v, causal=causal, backend="reference")
        for form, call in peers.torch_forms(q, k, v, causal).items():
            if not _relative(call().view_as(exact), exact.double()) <= LIMITS["exact"]:
                raise SystemExit(f"gate: torch's attention in the form {form} (causal={causal}) computes something else")


def new_layer(point: Point, capacity: int) -> LayerCache:
    return LayerCache(*(Codec(name, point.head_dim) for name in point.pair), kv_heads=KV_HEADS, capacity=capacity)


def filled(point: Point) -> LayerCache:
    """A layer that holds ``kv_len`` tokens drawn from N(0, 1)."""
    layer = new_layer(point, point.kv_len)
    for start in range(0, point.kv_len, CHUNK):
        append(layer, *torch.randn(2, 1, KV_HEADS, min(CHUNK, point.kv_len - start), point.head_dim))
    return layer


def clones(layer: LayerCache, count: int) -> Iterator[LayerCache]:
    """Copies of ``layer`` that share no memory with it or with each other."""
    state = layer.state()
    for _ in range(count):
        clone = LayerCache(layer.k_codec, layer.v_codec, kv_heads=KV_HEADS)
        clone.load_state(*state)
        yield clone
