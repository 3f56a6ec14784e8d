"""Speed of the GPU kernels beside what this GPU can copy and what PyTorch computes on it, measured in one run.

``python benchmarks/gpu.py`` measures everything and writes ``results/gpu.json``; ``--quick`` takes a few sizes. A run
that leaves something out writes ``build/gpu.json`` unless ``--out`` says otherwise.

Before anything is timed, every configuration is compared with float64 on a small problem (the gate), in several
processes, which also compile the kernels; one that is wrong ends the run without a number. Times are of replayed CUDA
graphs of whole calls of ``attend``, with the rotations of q and of the output.
Calls rotate over data of more than 200 MB, so that no cache helps. Rows are random words with plausible scales: a
kernel's time does not depend on values. The share of the ceiling counts the bytes of live rows, which are read once.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import gpu_stock
import torch

from gyrokv import FORMATS, Codec, LayerCache, append, attend
from gyrokv.backends import gpu
from gyrokv.cases import case, fits
from gyrokv.dispatch import describe, reasons
from gyrokv.env import environment
from gyrokv.formats import KVFormat
from gyrokv.quant import Packed
from gyrokv.testing import inputs
from gyrokv.view import KVView, Segment

ROOT = Path(__file__).resolve().parent.parent
KV_HEADS = 8
HEAD_DIMS, GROUPS = (128, 64, 256, 512), (4, 8)
SHAPES = ((1, 131072), (16, 16384), (1, 4096), (64, 4096), (1, 16384))  # sequences, tokens
MIXED = ("q8_0/turbo4", "q8_0/turbo3", "turbo4/turbo2")
QUICK = ("bf16", "q8_0", "turbo4", "turbo3", "q8_0/turbo4")
PARTS = ("decode", "stock", "append")
COLD = 220 * 10**6  # bytes over which calls rotate, at least
LIMIT = 3e-3  # relative error that the gate allows: outputs are bfloat16
GATE_TOKENS = 777
LAYERS = 32  # of the graph that appends a token
APPENDS = ((128, 1), (512, 1), (128, 4096), (128, 32768), (256, 32768), (512, 32768))  # head_dim, tokens


@dataclass(frozen=True)
class Point:
    """One decode problem. ``formats``: of K and V, ``K/V`` or one for both."""

    formats: str
    head_dim: int
    groups: int
    batch: int
    kv_len: int

    @property
    def pair(self) -> tuple[KVFormat, KVFormat]:
        k, _, v = self.formats.partition("/")
        return FORMATS[k], FORMATS[v or k]

    def __str__(self) -> str:
        return f"{self.formats:<13} d{self.head_dim} g{self.groups} {self.batch} x {self.kv_len}"


# -- the plan and its gate


def plan(options: argparse.Namespace) -> list[Point]:
    """Every decode problem, the most telling shapes first: a run that reaches its limit lacks the last ones."""
    order = product(options.shapes, options.head_dim, options.formats, options.groups)
    points = [Point(formats, dim, groups, *shape) for shape, dim, formats, groups in order]
    return [p for p in points if all(fits(fmt, p.head_dim) for fmt in p.pair)]


def check(config: tuple[str, int, int]) -> tuple[tuple[str, int, int], float]:
    """The relative error of one configuration (formats, head_dim, groups) on a small problem."""
    formats, dim, groups = config
    sizes = dict(batch=2, q_heads=KV_HEADS * groups, kv_heads=KV_HEADS, q_len=1, kv_len=GATE_TOKENS, causal=True)
    with torch.no_grad():
        problem = inputs(case(*Point(*config, 1, 1).pair, (dim, dim), **sizes, dtype=torch.bfloat16, device="cuda"))
        out, exact = problem.run("gpu")[0], problem.exact[0]
        return config, float((out.double() - exact).norm() / exact.norm())


def check_append(formats: str) -> float:
    """The share of the bytes that ``append`` stores that are not those of the definition; 1 where none may differ."""
    stored, made = [], codecs(formats, 128)
    k, v = torch.randn(2, 2, KV_HEADS, 100, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    for device, add in (("cuda", append), ("cpu", LayerCache.append)):
        layer = LayerCache(*made, kv_heads=KV_HEADS, batch=2, dtype=k.dtype, device=device)
        for start, stop in ((0, 99), (99, 100)):
            add(layer, *(x[:, :, start:stop].to(device) for x in (k, v)))
        stored.append({name: t.cpu().contiguous().view(torch.uint8) for name, t in layer.state()[0].items()})
    other = max(float((stored[0][name] != t).float().mean()) for name, t in stored[1].items() if t.numel())
    return other if any(gpu.encode.is_turned(codec, k.dtype) for codec in made) else float(other > 0)


def gate(points: list[Point], options: argparse.Namespace) -> dict:
    """Raises SystemExit on a configuration that is wrong. Returns the number of checks and the worst relative error."""
    configs = sorted({(p.formats, p.head_dim, p.groups) for p in points})
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        errors = dict(pool.map(check, configs))
    if "append" in options.only:
        errors |= {("append", formats): check_append(formats) for formats in options.formats}
    for config, error in errors.items():
        if not error <= LIMIT:
            raise SystemExit(f"gate: {config} is off by {error:.3g}, allowed {LIMIT:g}; nothing was timed")
    for dim, groups in product(options.head_dim, options.groups):
        if bad := gpu_stock.wrong(dim, groups, KV_HEADS):
            raise SystemExit(f"gate: torch's {', '.join(bad)} (head_dim={dim}, groups={groups}) compute something else")
    worst = max(errors.values(), default=0.0)
    print(f"gate: {len(errors)} configurations are right, relative error at most {worst:.1e}", flush=True)
    return {"configurations": len(errors), "worst_relative_error": worst, "limit": LIMIT}


# -- data


def codecs(formats: str, dim: int) -> tuple[Codec, Codec]:
    k, v = Point(formats, dim, 1, 1, 1).pair
    return Codec(k, dim), Codec(v, dim)


def rows(fmt: KVFormat, dim: int, *shape: int) -> Packed:
    """Random rows ``[*shape, *]`` of ``fmt``, on the device."""
    if not fmt.has_levels:
        made = torch.float32 if fmt.bits == 32 else torch.bfloat16
        words = torch.randn(*shape, fmt.layout(dim)[0], device="cuda", dtype=made)
        words = words.to(getattr(torch, fmt.element))
        words = words if fmt.is_dense else words.view(torch.int16)
        return Packed(words, words.new_empty(*shape, 0))
    words = torch.randint(-(2**15), 2**15, (*shape, fmt.words_per_head(dim)), device="cuda", dtype=torch.int16)
    scale = 0.005 + 0.01 * torch.rand(*shape, fmt.scales_per_head(dim), device="cuda")
    return Packed(words, scale.to(getattr(torch, fmt.scale_dtype)))


def views(point: Point) -> tuple[list[KVView], int]:
    """Copies of the problem's rows that no cache holds, and the bytes of one."""
    (k, v), shape = point.pair, (point.batch, KV_HEADS, point.kv_len)
    nbytes = point.batch * KV_HEADS * point.kv_len * (k.bytes_per_head(point.head_dim) + v.bytes_per_head(point.head_dim))
    count = -(-COLD // nbytes)
    packed = [rows(fmt, point.head_dim, count, *shape) for fmt in (k, v)]
    made = codecs(point.formats, point.head_dim)
    return [
        KVView(
            (Segment(*(p.map(lambda t, i=i: t[i]) for p in packed), k, v, base=0, first=0, stop=point.kv_len),),
            *made, point.batch, KV_HEADS, first=0, length=point.kv_len,
        )
        for i in range(count)
    ], nbytes  # fmt: skip


# -- what is timed


class Bench:
    """Times the points of a plan; ``rows`` holds what came of them. ``ceiling``: in GB/s. Ends after ``seconds``."""

    def __init__(self, ceiling: float, begun: float, seconds: float) -> None:
        self.ceiling, self.stop = ceiling, begun + seconds
        self.rows: list[dict] = []
        self.left_out: dict[str, str] = {}

    def room(self, what: str) -> bool:
        """False, with a note, when the time is up. Gives memory back that earlier points held."""
        if torch.cuda.memory_reserved() > 40 * 2**30:
            torch.cuda.empty_cache()
        if time.monotonic() < self.stop:
            return True
        self.left_out[what] = "the run had reached its limit of time"
        return False

    def add(self, what: str, **row) -> None:
        self.rows.append(row)
        numbers = [f"{name}={value:.4g}" for name, value in row.items() if isinstance(value, float)]
        print(f"{row['part']:<7}{what:<40}", *numbers, flush=True)

    def find(self, **wanted) -> dict | None:
        return next((r for r in self.rows if all(r.get(name) == value for name, value in wanted.items())), None)

    def decode(self, points: list[Point]) -> None:
        made: tuple[object, list[KVView], int] = None, [], 0
        for point in points:
            if not self.room(f"decode {point}"):
                continue
            key = (point.formats, point.head_dim, point.batch, point.kv_len)
            if made[0] != key:
                made = None, [], 0  # frees the rows before the next are made
                made = key, *views(point)
            _, data, nbytes = made
            q = torch.randn(point.batch, KV_HEADS * point.groups, 1, point.head_dim, device="cuda", dtype=torch.bfloat16)
            spec = describe(q, data[0], causal=True)
            if why := reasons(gpu, spec):
                self.left_out[f"decode {point}"] = "; ".join(why)
                continue
            kernel = gpu_stock.timed(lambda i, q=q, d=data: attend(q, d[i], backend="gpu"), len(data))
            self.add(
                str(point), part="decode", formats=point.formats, head_dim=point.head_dim, groups=point.groups,
                batch=point.batch, kv_len=point.kv_len, bytes=nbytes, copies=len(data), kernel_us=kernel["us"],
                kernel_us_least=kernel["us_least"], kernel_us_most=kernel["us_most"],
                gb_s=nbytes / kernel["us"] / 1e3, ceiling_share=nbytes / kernel["us"] / 1e3 / self.ceiling,
            )  # fmt: skip

    def stock(self, options: argparse.Namespace) -> None:
        """PyTorch's attention on bfloat16: every kernel in every form, the best form of each marked."""
        for (batch, kv_len), dim, groups in product(options.shapes, options.head_dim, options.groups):
            what = f"stock d{dim} g{groups} {batch} x {kv_len}"
            if not self.room(what):
                continue
            shape = (batch, KV_HEADS, kv_len, dim)
            nbytes = 4 * batch * KV_HEADS * kv_len * dim
            data = [tuple(torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16)) for _ in range(-(-COLD // nbytes))]
            q = torch.randn(batch, KV_HEADS * groups, 1, dim, device="cuda", dtype=torch.bfloat16)
            found = gpu_stock.forms(q, data)
            same = dict(part="stock", head_dim=dim, groups=groups, batch=batch, kv_len=kv_len, bytes=nbytes)
            for kernel in gpu_stock.KERNELS:
                ran = [(t["us"], form) for name, form, t in found if name == kernel and isinstance(t, dict)]
                refused = {form: t for name, form, t in found if name == kernel and isinstance(t, str)}
                row = same | dict(by=kernel, forms={form: us for us, form in ran}, refused=refused)
                if ran:
                    us, form = min(ran)
                    gb_s = nbytes / us / 1e3
                    row |= dict(kernel_us=us, form=form, gb_s=gb_s, ceiling_share=gb_s / self.ceiling)
                self.add(f"{kernel} d{dim} g{groups} {batch} x {kv_len}", **row)
            del data

    def append(self, formats: list[str]) -> None:
        """A token for each of 32 layers in one graph, per layer; and many tokens at once."""
        own = hasattr(gpu, "append")
        if not own:
            self.left_out["append"] = "the gpu backend has no append of its own"
        for name, (dim, tokens) in product(formats if own else (), APPENDS):
            if not self.room(f"append {name} d{dim} {tokens}"):
                continue
            made = codecs(name, dim)
            nbytes = KV_HEADS * tokens * (4 * dim + sum(c.format.bytes_per_head(dim) for c in made))
            count = LAYERS if tokens == 1 else -(-COLD // nbytes)
            k, v = torch.randn(2, count, 1, KV_HEADS, tokens, dim, device="cuda").bfloat16()
            room = dict(kv_heads=KV_HEADS, dtype=k.dtype, device="cuda", check=False, capacity=8 * tokens + 64)
            layers = [LayerCache(*made, **room) for _ in range(count)]
            time = gpu_stock.timed(lambda i, s=layers, k=k, v=v: append(s[i], k[i], v[i]), count)
            self.add(
                f"{name} d{dim} {tokens} tokens", part="append", formats=name, head_dim=dim, tokens=tokens, layers=count,
                bytes=nbytes, kernel_us=time["us"], gb_s=nbytes / time["us"] / 1e3,
                ceiling_share=nbytes / time["us"] / 1e3 / self.ceiling,
            )  # fmt: skip

    def compare(self) -> None:
        """What rows say of each other: ours against our bf16 and the best of PyTorch's, long against short contexts."""
        for row in [r for r in self.rows if r["part"] == "decode"]:
            same = {name: row[name] for name in ("head_dim", "groups", "batch", "kv_len")}
            dense = self.find(part="decode", formats="bf16", **same)
            others = [r for r in self.rows if r["part"] == "stock" and "kernel_us" in r and same.items() <= r.items()]
            if dense:
                row["times_faster_than_bf16"] = dense["kernel_us"] / row["kernel_us"]
            if others:
                best = min(others, key=lambda r: r["kernel_us"])
                row["best_stock"] = f"{best['by']} {best['form']}"
                row["times_faster_than_best_stock"] = best["kernel_us"] / row["kernel_us"]
            if (row["batch"], row["kv_len"]) == (1, 131072):
                short = self.find(part="decode", formats=row["formats"], **(same | {"kv_len": 16384}))
                row["over_16k"] = row["kernel_us"] / short["kernel_us"] if short else None


# -- the command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sizes and formats")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to measure")
    parser.add_argument("--head-dim", nargs="+", type=int, metavar="D", help=f"head sizes (default {HEAD_DIMS})")
    parser.add_argument("--groups", nargs="+", type=int, help=f"query heads per KV head (default {GROUPS})")
    parser.add_argument("--shapes", nargs="+", metavar="BxT", help="sequences x tokens, such as 16x16384")
    parser.add_argument("--formats", nargs="+", metavar="FORMAT", help="of K and V: one name, or K/V")
    parser.add_argument("--processes", type=int, default=12, help="that compile and check (default 12)")
    parser.add_argument("--seconds", type=float, default=450, help="after which nothing more is measured (default 450)")
    parser.add_argument("--commit", help="commit of a tree that is no git checkout")
    options = parser.parse_args()
    free = ("out", "commit", "processes", "seconds")
    narrowed = [name for name, value in vars(options).items() if name not in free and value != parser.get_default(name)]
    options.complete = not narrowed
    options.out = options.out or (ROOT / "benchmarks/results/gpu.json" if options.complete else ROOT / "build/gpu.json")
    names = sorted((n for n in FORMATS if "." not in n), key=lambda n: n != "bf16")  # current ones, bf16 first
    options.only = options.only or list(PARTS)
    options.head_dim = options.head_dim or ([128] if options.quick else list(HEAD_DIMS))
    options.groups = options.groups or ([4] if options.quick else list(GROUPS))
    given = [tuple(map(int, shape.split("x"))) for shape in options.shapes or ()]
    options.shapes = given or list(SHAPES[:2] if options.quick else SHAPES)
    options.formats = options.formats or (list(QUICK) if options.quick else [*names, *MIXED])
    if unknown := {name for formats in options.formats for name in formats.split("/")} - FORMATS.keys():
        parser.error(f"--formats: {', '.join(sorted(unknown))} is not one of {', '.join(FORMATS)}")
    return options


def main() -> int:
    options = parse()
    if lacking := gpu.missing():
        raise SystemExit(f"backend gpu cannot run here: {'; '.join(lacking)}")
    torch.manual_seed(0)
    begun, points = time.monotonic(), plan(options)
    gc.freeze()  # a collection comes before every captured graph
    with torch.no_grad():
        checked = gate(points, options)
        first = gpu_stock.copy_ceiling(options.quick)
        print(f"copies: {first['gb_s']:.0f} GB/s by {first['way']}", flush=True)
        bench = Bench(first["gb_s"], begun, options.seconds)
        if "stock" in options.only:
            bench.stock(options)
        if "append" in options.only:
            bench.append(options.formats)
        if "decode" in options.only:
            bench.decode(points)
    bench.compare()
    machine = environment()
    machine["commit"] = machine["commit"] or options.commit
    result = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": machine | {"driver": gpu_stock.driver(), "cuda": torch.version.cuda},
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "complete": options.complete and not bench.left_out,
        "kv_heads": KV_HEADS,
        "gate": checked,
        "ceiling": first,
        "rows": bench.rows,
        "not_measured": bench.left_out,
        "seconds": round(time.monotonic() - begun),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(f"wrote {options.out} after {result['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
