"""Speed of the CPU kernels beside what this machine can read and what others compute on it, measured in one run.

``python benchmarks/cpu.py`` measures everything and writes ``results/cpu.json``; ``--quick`` takes a few sizes and less
than three minutes. A run that leaves something out writes ``build/cpu.json`` unless ``--out`` says otherwise.

Before anything is timed, every configuration is compared with float64 (the gate); one that is wrong ends the run
without a number. Decode is timed on cold data: calls rotate over copies of a layer that together are at least twice
the last-level cache. All points of a size take turns with torch's attention and with reading memory; shares and ratios
are those of turns, so that whatever else the machine does meets both sides. Prefill and append are limited by
arithmetic and timed on one layer. Times are of the public calls, rotation of q and the description of the problem
included. Thread count: torch's (``OMP_NUM_THREADS``).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import groupby
from pathlib import Path

import llama
import peers
import torch
from cpu_plan import (
    GROUP,
    GROUPS,
    HEAD_DIMS,
    KV_HEADS,
    KV_LENS,
    MIXED,
    PARTS,
    PEER_DTYPES,
    PREFILL,
    QUICK,
    Point,
    clones,
    filled,
    gate,
    new_layer,
    plan,
    refused,
)
from torch.nn.functional import scaled_dot_product_attention

from gyrokv import FORMATS, append
from gyrokv.dispatch import BACKENDS
from gyrokv.env import environment
from gyrokv.spec import HEAD_DIMS as SUPPORTED

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Entry:
    """A decode call that takes its turns with others. ``row``: what is recorded of it beside its time."""

    what: str
    call: Callable[[int], object]
    row: dict
    context: Callable[[], AbstractContextManager] = nullcontext


class Bench:
    """Times the points of a plan; ``rows`` holds what came of them. ``cache``: bytes of the last-level cache."""

    def __init__(self, options: argparse.Namespace, cache: int, memory: peers.Memory) -> None:
        self.backend, self.least, self.seconds = options.backend, options.repetitions, 0.1 if options.quick else 0.3
        self.cache, self.memory = cache, memory
        self.rows: list[dict] = []

    def timed(self, call: Callable[[int], object]) -> dict:
        return peers.timed(call, self.least, self.seconds)

    def add(self, what: str, time: dict, ratios: dict[str, float | None] | None = None, **row) -> None:
        """Record and print one measurement; ``ratios``: how many times faster ours is."""
        ratios = {name: value for name, value in (ratios or {}).items() if value}
        self.rows.append(row | time | ({"times_faster_than": ratios} if ratios else {}))
        notes = [f"{row[unit]:8.1f} {label}" for unit, label in (("gb_s", "GB/s"), ("gflop_s", "GFLOP/s")) if unit in row]
        if row["part"] == "decode":
            notes.append(f"{100 * row['ceiling_share']:3.0f} %")
        notes += [f"{name.replace(f' ({peers.QUOTED_ON})', '*')} x{value:.2f}" for name, value in ratios.items()]
        spread = f"{time['us_p20']:.0f}-{time['us_p80']:.0f}"
        print(f"{row['part']:<8}{what:<44}{time['us']:>11.1f} us ({spread}) {'  '.join(notes)}", flush=True)

    def find(self, **wanted) -> dict | None:
        """The row that has these values, or None."""
        rows = (r for r in self.rows if all(r.get(name) == value for name, value in wanted.items()))
        return next(rows, None)

    def copies(self, nbytes: int) -> int:
        """Copies of ``nbytes`` that no cache holds, as far as memory allows."""
        return max(2, min(-(-2 * self.cache // nbytes) + 1, peers.available_memory() // 2 // nbytes))

    def cold(self, nbytes: int, count: int) -> dict:
        return {"bytes": nbytes, "copies": count, "cold": nbytes * count >= 2 * self.cache}

    def decode(self, points: list[Point]) -> None:
        """Points of one size take turns with each other, with torch's attention and with reading memory."""
        for (dim, kv_len), group in groupby(points, key=lambda p: (p.head_dim, p.kv_len)):
            group = list(group)
            entries = list(self.torch_entries(dim, kv_len, sorted({p.groups for p in group})))
            reserve = peers.available_memory() // 2
            for _, same in groupby(group, key=lambda p: p.formats):
                entries += self.our_entries(list(same))
                if peers.available_memory() < reserve:
                    self.decode_entries(entries)
                    entries.clear()
            if entries:
                self.decode_entries(entries)

    def decode_entries(self, entries: list[Entry]) -> None:
        reads = self.memory.reads
        calls = [*((read, nullcontext) for read in reads), *((entry.call, entry.context) for entry in entries)]
        times = peers.timed_in_turns(calls, self.least, self.seconds)
        read, times = self.memory.fastest(times[: len(reads)]), times[len(reads) :]
        print(f"memory is read at {self.memory.gb_s(read):.1f} GB/s in turns with the following")
        for entry, taken in zip(entries, times):
            self.add_decode(entry, taken, read)

    def add_decode(self, entry: Entry, time: dict, read: dict) -> None:
        """Ratios are those of turns; only quoted times, which took none, are set against the median of all calls."""
        ratios, sizes = {}, {name: entry.row[name] for name in ("head_dim", "kv_len", "groups")}
        if "formats" in entry.row:
            rivals = {"bf16": self.find(**sizes, by="gyrokv", formats="bf16", fast=False, level="")}
            rivals |= {f"torch {d}": self.find(**sizes, by=f"torch {d}") for d in ("bfloat16", "float32")}
            if entry.row["fast"]:
                same = {name: entry.row[name] for name in ("formats", "level")}
                rivals["two terms"] = self.find(**sizes, **same, by="gyrokv", fast=False)
            ratios = {name: row and peers.ratio(row, time) for name, row in rivals.items()}
            if sizes["groups"] == GROUP:
                quoted = peers.quoted(entry.row["formats"], sizes["head_dim"], sizes["kv_len"])
                ratios |= {name: us / time["us"] for name, us in quoted.items()}
        nbytes = entry.row["bytes"]
        row = entry.row | {
            "gb_s": nbytes / time["us"] / 1e3,
            "ceiling_gb_s": self.memory.gb_s(read),
            "ceiling_share": peers.ratio(read, time) * nbytes / self.memory.nbytes,
        }
        self.add(entry.what, time, ratios, **row)

    def torch_entries(self, dim: int, kv_len: int, all_groups: list[int]) -> Iterator[Entry]:
        """torch's attention with the group folded into the query rows."""
        for dtype in PEER_DTYPES:
            kv = torch.randn(2, 1, KV_HEADS, kv_len, dim).to(dtype)
            count = self.copies(kv.nbytes)
            copies = [kv.clone() for _ in range(count)]
            name = f"torch {str(dtype).removeprefix('torch.')}"
            for groups in all_groups:
                q = torch.randn(1, KV_HEADS, groups, dim, dtype=dtype)
                row = dict(part="decode", by=name, head_dim=dim, kv_len=kv_len, groups=groups)
                yield Entry(
                    f"{name:<13} d{dim} kv{kv_len} g{groups}",
                    lambda i, q=q, copies=copies: scaled_dot_product_attention(q, *copies[i % len(copies)]),
                    row | self.cold(kv.nbytes, count),
                )

    def our_entries(self, points: list[Point]) -> Iterator[Entry]:
        """Points that differ in groups, mode and level only."""
        layer = filled(points[0])
        nbytes = layer.live_nbytes
        count = self.copies(nbytes)
        copies = list(clones(layer, count))
        for point in points:
            q = torch.randn(1, KV_HEADS * point.groups, 1, point.head_dim)
            yield Entry(
                str(point),
                lambda i, q=q, point=point: point.attend(q, copies[i % count], self.backend),
                asdict(point) | {"by": "gyrokv"} | self.cold(nbytes, count),
                partial(peers.forced, self.backend, point.level),
            )

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
        memory = peers.Memory(cache, options.repetitions)
        print(f"(p20-p80), % of the ceiling, xN: ours takes 1/N of that time, *: {peers.QUOTED_ON}, not measured here")
        bench = Bench(options, cache, memory)
        for part in ("decode", "prefill", "append"):
            getattr(bench, part)([p for p in points if p.part == part])
    result = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment() | {"last_level_cache_bytes": cache, "vector": torch.backends.cpu.get_cpu_capability()},
        "command": " ".join(["python", "benchmarks/cpu.py", *sys.argv[1:]]),
        "complete": options.complete,
        "backend": options.backend,
        "threads": torch.get_num_threads(),
        "gate": checked,
        "ceiling": {"bytes": memory.nbytes, "all_gb_s": memory.all_gb_s},
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
