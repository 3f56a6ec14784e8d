"""Speed of the CPU kernels beside what this machine can read and what others compute on it, measured in one run.

``python benchmarks/cpu.py`` measures everything and writes ``results/cpu.json``; ``--quick`` takes a few sizes and less
than three minutes. A run that leaves something out writes ``build/cpu.json`` unless ``--out`` says otherwise.

Before anything is timed, every configuration is compared with float64 (the gate); one that is wrong ends the run
without a number. Decode is timed on cold data: calls rotate over copies of a layer that together are at least twice
the last-level cache. Prefill and append are limited by arithmetic and timed on one layer. Times are of the public
calls, rotation of q and the description of the problem included. Thread count: torch's (``OMP_NUM_THREADS``).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from itertools import groupby, product
from pathlib import Path

import llama
import peers
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gyrokv import FORMATS, AttentionSpec, Codec, LayerCache, append, attend, attention
from gyrokv.dispatch import BACKENDS, reasons
from gyrokv.env import environment
from gyrokv.spec import HEAD_DIMS as SUPPORTED
from gyrokv.testing import inputs

ROOT = Path(__file__).resolve().parent.parent
KV_HEADS = 8
GROUP = 4  # query heads per KV head, where nothing else is said
GROUPS = (1, 2, 4, 8, 16)
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


# -- the plan and its gate


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


# -- what is timed


class Bench:
    """Times the points of a plan; ``rows`` holds what came of them. ``cache``: bytes of the last-level cache.
    ``ceiling``: in GB/s, for the shares that are printed."""

    def __init__(self, options: argparse.Namespace, cache: int, ceiling: float) -> None:
        self.backend, self.least, self.seconds = options.backend, options.repetitions, 0.1 if options.quick else 0.3
        self.cache, self.ceiling = cache, ceiling
        self.rows: list[dict] = []

    def timed(self, call: Callable[[int], object]) -> dict:
        return peers.timed(call, self.least, self.seconds)

    def add(self, what: str, time: dict, ratios: dict[str, float | None] | None = None, **row) -> None:
        """Record and print one measurement; ``ratios``: how many times faster ours is."""
        ratios = {name: value for name, value in (ratios or {}).items() if value}
        self.rows.append(row | time | ({"times_faster_than": ratios} if ratios else {}))
        notes = [f"{row[unit]:8.1f} {label}" for unit, label in (("gb_s", "GB/s"), ("gflop_s", "GFLOP/s")) if unit in row]
        if row["part"] == "decode":
            notes.append(f"{100 * row['gb_s'] / self.ceiling:3.0f} %")
        notes += [f"{name.replace(f' ({peers.QUOTED_ON})', '*')} x{value:.2f}" for name, value in ratios.items()]
        spread = f"{time['us_p20']:.0f}-{time['us_p80']:.0f}"
        print(f"{row['part']:<8}{what:<44}{time['us']:>11.1f} us ({spread}) {'  '.join(notes)}", flush=True)

    def find(self, **wanted) -> float | None:
        """The time in us of the row that has these values, or None."""
        rows = (r for r in self.rows if all(r.get(name) == value for name, value in wanted.items()))
        return next((row["us"] for row in rows), None)

    def copies(self, nbytes: int) -> int:
        """Copies of ``nbytes`` that no cache holds, as far as memory allows."""
        return max(2, min(-(-2 * self.cache // nbytes) + 1, peers.available_memory() // 2 // nbytes))

    def cold(self, nbytes: int, count: int) -> dict:
        return {"bytes": nbytes, "copies": count, "cold": nbytes * count >= 2 * self.cache}

    def decode(self, points: list[Point]) -> None:
        for (dim, kv_len), group in groupby(points, key=lambda p: (p.head_dim, p.kv_len)):
            group = list(group)
            self.decode_torch(dim, kv_len, sorted({p.groups for p in group}))
            for _, same in groupby(group, key=lambda p: p.formats):
                self.decode_ours(list(same))

    def decode_torch(self, dim: int, kv_len: int, all_groups: list[int]) -> None:
        """torch's attention with the group folded into the query rows."""
        for dtype in PEER_DTYPES:
            kv = torch.randn(2, 1, KV_HEADS, kv_len, dim).to(dtype)
            nbytes = kv.numel() * kv.element_size()
            count = self.copies(nbytes)
            copies = [kv.clone() for _ in range(count)]
            name = f"torch {str(dtype).removeprefix('torch.')}"
            for groups in all_groups:
                q = torch.randn(1, KV_HEADS, groups, dim, dtype=dtype)
                time = self.timed(lambda i, q=q, copies=copies: scaled_dot_product_attention(q, *copies[i % len(copies)]))
                row = dict(part="decode", by=name, head_dim=dim, kv_len=kv_len, groups=groups) | self.cold(nbytes, count)
                self.add(f"{name:<13} d{dim} kv{kv_len} g{groups}", time, gb_s=nbytes / time["us"] / 1e3, **row)

    def decode_ours(self, points: list[Point]) -> None:
        """Points that differ in groups, mode and level only."""
        layer = filled(points[0])
        nbytes = layer.live_nbytes
        count = self.copies(nbytes)
        copies = list(clones(layer, count))
        for point in points:
            q = torch.randn(1, KV_HEADS * point.groups, 1, point.head_dim)
            with peers.forced(self.backend, point.level):
                time = self.timed(lambda i, q=q, point=point: point.attend(q, copies[i % count], self.backend))
            same = dict(part="decode", head_dim=point.head_dim, kv_len=point.kv_len, groups=point.groups)
            against = {"bf16": self.find(**same, by="gyrokv", formats="bf16", fast=False, level="")}
            against |= {f"torch {d}": self.find(**same, by=f"torch {d}") for d in ("bfloat16", "float32")}
            if point.groups == GROUP:
                against |= peers.quoted(point.formats, point.head_dim, point.kv_len)
            ratios = {name: us and us / time["us"] for name, us in against.items()}
            row = asdict(point) | {"by": "gyrokv"} | self.cold(nbytes, count)
            self.add(str(point), time, ratios, gb_s=nbytes / time["us"] / 1e3, **row)

    def prefill(self, points: list[Point]) -> None:
        for (dim, causal), group in groupby(points, key=lambda p: (p.head_dim, p.causal)):
            q_len, kv_len = PREFILL
            pairs = q_len * kv_len - (q_len * (q_len - 1) // 2 if causal else 0)
            flop = 4 * pairs * KV_HEADS * GROUP * dim
            best: dict[str, float] = {}
            for dtype in PEER_DTYPES:
                q = torch.randn(1, KV_HEADS * GROUP, q_len, dim, dtype=dtype)
                k, v = torch.randn(2, 1, KV_HEADS, kv_len, dim).to(dtype)
                name = f"torch {str(dtype).removeprefix('torch.')}"
                for form, call in peers.torch_forms(q, k, v, causal).items():
                    time = self.timed(lambda i, call=call: call())
                    best[name] = min(best.get(name, time["us"]), time["us"])
                    row = dict(part="prefill", by=name, form=form, head_dim=dim, causal=causal, q_len=q_len, kv_len=kv_len)
                    what = f"{name} {form} d{dim} {'causal' if causal else 'full'}"
                    self.add(what, time, groups=GROUP, flop=flop, gflop_s=flop / time["us"] / 1e3, **row)
            for point in group:
                layer = filled(point)
                q = torch.randn(1, KV_HEADS * GROUP, q_len, dim, dtype=point.dtype)
                time = self.timed(lambda i, q=q, layer=layer, point=point: point.attend(q, layer, self.backend))
                ratios = {name: us / time["us"] for name, us in best.items()}
                row = asdict(point) | {"by": "gyrokv", "flop": flop}
                self.add(str(point), time, ratios, gflop_s=flop / time["us"] / 1e3, **row)

    def append(self, points: list[Point]) -> None:
        capacity = PREFILL[1]
        for point in points:
            tokens = point.kv_len
            layer = new_layer(point, capacity)
            k, v = torch.randn(2, 1, KV_HEADS, tokens, point.head_dim)

            def call(i: int, layer=layer, k=k, v=v) -> None:
                if layer.length + k.shape[2] > capacity:
                    layer.reset()
                append(layer, k, v)

            nbytes, time = k.nbytes + v.nbytes, self.timed(call)
            able = (b for b in BACKENDS.values() if hasattr(b, "append") and not b.missing() and not b.why_not_append(layer))
            encoder = next((b.name for b in able), "torch")  # as gyrokv.append chooses
            row = dict(part="append", formats=point.formats, head_dim=point.head_dim, tokens=tokens, input_bytes=nbytes)
            what = f"{point.formats:<13} d{point.head_dim} {tokens} token{'s' if tokens > 1 else ''}"
            self.add(what, time, by="gyrokv", backend=encoder, gb_s=nbytes / time["us"] / 1e3, **row)


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


# -- the command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sizes and formats, 5 repetitions at least")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to measure")
    parser.add_argument(
        "--head-dim", nargs="+", type=int, choices=SUPPORTED, metavar="D", help=f"head sizes (default {HEAD_DIMS})"
    )
    parser.add_argument("--kv-len", nargs="+", type=int, help="tokens held, for decode and for the contexts of peers")
    parser.add_argument("--groups", nargs="+", type=int, help="query heads per KV head, for the first length at 128")
    parser.add_argument("--formats", nargs="+", metavar="FORMAT", help="of K and V: one name, or K/V")
    parser.add_argument("--repetitions", type=int, help="timed calls, at least (default 15)")
    parser.add_argument("--backend", default="cpu", help="which of ours (default cpu)")
    options = parser.parse_args()
    narrowed = [name for name, value in vars(options).items() if name != "out" and value != parser.get_default(name)]
    options.complete = not narrowed
    options.out = options.out or (ROOT / "benchmarks/results/cpu.json" if options.complete else ROOT / "build/cpu.json")
    names = sorted(FORMATS, key=lambda name: name != "bf16")  # what the others are compared with comes first
    options.only = options.only or list(PARTS)
    options.head_dim = options.head_dim or ([128] if options.quick else list(HEAD_DIMS))
    options.kv_len = options.kv_len or list(KV_LENS[:1] if options.quick else KV_LENS)
    options.groups = options.groups or list(GROUPS)
    options.formats = options.formats or (list(QUICK) if options.quick else [*names, *MIXED])
    options.repetitions = options.repetitions or (5 if options.quick else 15)
    if unknown := {name for formats in options.formats for name in formats.split("/")} - FORMATS.keys():
        parser.error(f"--formats: {', '.join(sorted(unknown))} is not one of {', '.join(FORMATS)}")
    return options


def main() -> int:
    options = parse()
    if options.backend not in BACKENDS:
        raise SystemExit(f"this gyrokv has no backend {options.backend}; it has {', '.join(BACKENDS)}")
    if lacking := BACKENDS[options.backend].missing():
        raise SystemExit(f"backend {options.backend} cannot run here: {'; '.join(lacking)}")
    torch.manual_seed(0)
    begun, cache, points = time.monotonic(), peers.last_level_cache(), plan(options)
    without = refused(points, options.backend)
    points = [point for point in points if point not in without]
    for point, why in without.items():
        print(f"not measured: {point.part} {point}: {'; '.join(why)}")
    with torch.no_grad():
        checked = gate(points, options.backend)
        whole = llama.measure(options.kv_len, 8 if options.quick else 32) if "peers" in options.only else None
        ceiling = [peers.read_ceiling(cache, options.repetitions)]
        print(f"(p20-p80), % of the ceiling, xN: ours takes 1/N of that time, *: {peers.QUOTED_ON}, not measured here")
        bench = Bench(options, cache, ceiling[0]["gb_s"])
        for part in ("decode", "prefill", "append"):
            getattr(bench, part)([p for p in points if p.part == part])
        ceiling.append(peers.read_ceiling(cache, options.repetitions))
    best = max(ceiling, key=lambda c: c["gb_s"])  # of the start and the end: a share is never flattered by a dip
    for row in bench.rows:
        if row["part"] == "decode":
            row["ceiling_share"] = row["gb_s"] / best["gb_s"]
    result = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment() | {"last_level_cache_bytes": cache, "vector": torch.backends.cpu.get_cpu_capability()},
        "command": " ".join(["python", "benchmarks/cpu.py", *sys.argv[1:]]),
        "complete": options.complete,
        "backend": options.backend,
        "threads": torch.get_num_threads(),
        "gate": checked,
        "ceiling": best | {"runs_gb_s": [c["gb_s"] for c in ceiling]},
        "quoted": {"on": peers.QUOTED_ON, "us": {f"d{d} kv{n}": times for (d, n), times in peers.QUOTED.items()}},
        "rows": bench.rows,
        "not_measured": {f"{point.part} {point}": why for point, why in without.items()},
        "peers": whole,
        "seconds": round(time.monotonic() - begun),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
