"""Speed of prefill on a Hopper GPU beside PyTorch's kernels, FlashInfer's, FFPA's and ours for other GPUs,
measured in one run.

``python benchmarks/gpu_prefill.py`` writes ``results/gpu_prefill.json``. Six parts: ``attention`` (plain tensors, causal
and full), ``few`` (short prompts beside cuDNN), ``behind`` (prompts in one tensor, by ``cu_seqlens``), ``feature`` (each
optional part of a problem, as a share of the plain speed), ``window`` (what the visible tiles cost, beside those of the
causal run), ``onto`` (a long packed cache). Times are medians of replayed CUDA graphs; what is compared with plain
attention, and short prompts with cuDNN, take turns. FLOP are those of the visible keys. The workspace is what a call
allocates beyond its output. A mask of each head's own is as large as the scores: beside it stands how long reading it takes
at the speed at which the GPU copies memory.

Before anything is timed, every kernel is compared with float64 on a small problem (the gate), in several processes, which
also compile them; one that is wrong ends the run without a number.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import NamedTuple

import gpu_stock
import torch
from gpu import codecs, rows
from gpu_stock import KERNELS, in_turn, timed
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gyrokv import attend, attention_varlen
from gyrokv.backends import gpu
from gyrokv.backends.gpu import shapes
from gyrokv.cases import case
from gyrokv.dispatch import describe
from gyrokv.env import environment
from gyrokv.masks import BlockMap
from gyrokv.testing import inputs
from gyrokv.view import KVView, Segment

ROOT = Path(__file__).resolve().parent.parent
BF16 = torch.bfloat16
HEADS, KV_HEADS = 16, 4  # of all parts but the last
DIMS = ((64, 64), (128, 128), (256, 256), (512, 512), (576, 512))
TOKENS, MIDDLE = (2048, 8192, 32768), 8192  # middle: of features and of kernels that are slow
MORE = {(512, 512): (16384,)}  # tokens, beside those
FEW_HEADS, FEW_TOKENS = ((16, 4), (32, 8), (8, 1)), (512, 1024, 2048, 4096)  # of problems with few tiles
LENGTHS = ((1024,) * 8, (100, 300, 4000, 77, 1500, 2000, 64, 151))  # of prompts behind each other
WINDOW = 1024
LONG, QUERIES, LONG_HEADS, LONG_KV_HEADS = 65536, 4096, 32, 8  # the last queries of a long cache
FORMATS = ("bf16", "q8_0", "turbo4", "turbo4/turbo2", "tq6", "tq8")
LIMIT = 6e-3  # relative error that the gate allows: weights and outputs are bfloat16
BOUND = 1e-2  # that a kernel of others may differ from ours, on what is timed
FEATURES = {  # name: what is asked for, beside causal (True) or full attention
    "sinks": (True, dict(sinks=True)),
    "softcap": (True, dict(softcap=50.0)),
    "window": (True, dict(window=WINDOW)),
    "mask bool": (False, dict(mask="bool")),
    "mask bf16": (False, dict(mask="additive", mask_dtype=BF16)),
    "mask f16": (False, dict(mask="additive", mask_dtype=torch.float16)),
    "mask f32": (False, dict(mask="additive", mask_dtype=torch.float32)),
    "mask bf16 per head": (False, dict(mask="additive", mask_dtype=BF16, mask_axes="bhqk")),
}


# -- the gate


class Config(NamedTuple):
    formats: str
    dims: tuple[int, int]
    feature: str = "causal"
    kernels: str = ""  # or those that are forced

    def error(self) -> float:
        """The relative error on a small problem, in the dtype that is timed."""
        causal, features = FEATURES.get(self.feature, (True, {}))
        k, _, v = self.formats.partition("/")
        sizes = dict(batch=2, q_heads=8, kv_heads=2, q_len=200, kv_len=777, dtype=BF16, device="cuda")
        forced = gpu.forced(self.kernels) if self.kernels else nullcontext()
        with torch.no_grad(), forced:
            problem = inputs(case(k, v or k, self.dims, causal=causal, **sizes, **features))
            out, exact = problem.run("gpu")[0], problem.exact[0]
            return float((out.double() - exact).norm() / exact.norm())


def configurations() -> list[Config]:
    """All kernels that are timed."""
    found = [Config("bf16", dims, kernels=kernels) for kernels in ("tall", "portable") for dims in DIMS]
    found.append(Config("bf16", DIMS[0], kernels="short"))
    found += [Config("bf16", dims, name, "tall") for dims, name in product(DIMS[:4], FEATURES)]
    found += [Config(formats, (d, d)) for formats, d in product(FORMATS, (128, 512))]
    return list(dict.fromkeys(found))


def gate(processes: int) -> dict:
    """Raises SystemExit on a kernel that is wrong. Returns the number of checks and the worst relative error."""
    configs = configurations()
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        errors = dict(zip(configs, pool.map(Config.error, configs)))
    for config, error in errors.items():
        if not error <= LIMIT:
            raise SystemExit(f"gate: {config} is off by {error:.3g}, allowed {LIMIT:g}; nothing was timed")
    print(f"gate: {len(errors)} kernels are right, relative error at most {max(errors.values()):.1e}", flush=True)
    return {"configurations": len(errors), "worst_relative_error": max(errors.values()), "limit": LIMIT}


# -- plain attention, and others' kernels


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=BF16)


def plain(dims: tuple[int, int], tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return normal(1, HEADS, tokens, dims[0]), *(normal(1, KV_HEADS, tokens, d) for d in dims)


def tflops(us: float, dims: tuple[int, int], tokens: int, causal: bool) -> float:
    return (1.0 if causal else 2.0) * tokens * tokens * HEADS * sum(dims) / us / 1e6


def attention(dims: tuple[int, int], tokens: int, causal: bool) -> dict:
    """Our kernels, and those of others: TFLOP/s, or why there is none."""
    q, k, v = plain(dims, tokens)
    view = KVView.of(k, v)
    result = {"part": "attention", "dims": dims, "tokens": tokens, "causal": causal}

    def ours() -> Tensor:
        return attend(q, view, causal=causal, backend="gpu")

    result["tflops"] = tflops(timed(lambda _: ours(), 1)["us"], dims, tokens, causal)
    expected, found = ours(), {}

    def portable() -> Tensor:
        with gpu.forced("portable"):
            return ours()

    for name, call in (others(q, k, v, causal) | {"gyrokv, portable": portable}).items():
        if name in ("efficient", "gyrokv, portable") and tokens != MIDDLE:
            continue
        found[name] = peer(call, expected, lambda us: tflops(us, dims, tokens, causal))
    return result | {"others": found}


def others(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Callable[[], Tensor]]:
    """PyTorch's fused kernels (the memory-efficient one gets K and V repeated per query head), FlashInfer's and FFPA's."""
    repeated = [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)]

    def stock(name: str) -> Tensor:
        given, gqa = (repeated, False) if name == "efficient" else ((k, v), True)
        with sdpa_kernel(KERNELS[name]):
            return scaled_dot_product_attention(q, *given, is_causal=causal, enable_gqa=gqa)

    def flashinfer() -> Tensor:
        from flashinfer import single_prefill_with_kv_cache as run

        return run(*(x[0].transpose(0, 1) for x in (q, k, v)), causal=causal).transpose(0, 1)[None]

    def ffpa() -> Tensor:
        from ffpa_attn import TritonBackend
        from ffpa_attn import ffpa_attn_func as run

        if q.shape[-1] <= 256:
            raise ValueError("leaves heads of up to 256 values to PyTorch")
        form = TritonBackend(forward=True, enable_tma=True)  # its fastest without tuning
        return run(q, k, v, is_causal=causal, enable_gqa=True, forward_backend=form)

    found = {n: lambda n=n: stock(n) for n in ("cudnn", "flash", "efficient")}
    return found | {"flashinfer": flashinfer, "ffpa": ffpa}


def peer(call: Callable[[], Tensor], expected: Tensor, speed: Callable[[float], float]) -> float | str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
        error = float((call().float() - expected.float()).norm() / expected.float().norm())
        if not error <= BOUND:
            return f"differs by {error:.2g}"
        return speed(timed(lambda _: call(), 1)["us"])
    except ImportError:
        return "not installed"
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        torch.cuda.synchronize()
        return str(error).split("\n")[0][:120]


def few(dims: tuple[int, int], heads: tuple[int, int], tokens: int, causal: bool) -> dict:
    """Short prompts, whose tiles are too few to go round: ours and cuDNN in turn, in microseconds."""
    q, *kv = (normal(1, h, tokens, d) for h, d in zip((heads[0], heads[1], heads[1]), (dims[0], *dims)))
    view, stock = KVView.of(*kv), others(q, *kv, causal)["cudnn"]
    us, cudnn = in_turn(lambda: attend(q, view, causal=causal, backend="gpu"), stock)
    return {"part": "few", "dims": dims, "heads": heads, "tokens": tokens, "causal": causal, "us": us, "cudnn_us": cudnn}


def behind(dims: tuple[int, int], lengths: tuple[int, ...]) -> dict:
    """Causal attention of prompts behind each other in one tensor, in microseconds: ours, PyTorch's (K and V repeated per
    query head) and ours of the same prompts as a padded batch, in turn."""
    from torch.nn.attention.varlen import varlen_attn

    total, most = sum(lengths), max(lengths)
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    q, *kv = (normal(total, h, dims[0]) for h in (HEADS, KV_HEADS, KV_HEADS))
    repeated = [x.repeat_interleave(HEADS // KV_HEADS, 1) for x in kv]
    batch, *pair = (normal(len(lengths), h, most, dims[0]) for h in (HEADS, KV_HEADS, KV_HEADS))
    calls = {
        "us": lambda: attention_varlen(q, *kv, bounds, bounds, most, most, backend="gpu"),
        "padded_us": lambda: attend(batch, KVView.of(*pair), backend="gpu"),
    }
    if dims[0] <= 256:
        calls["torch_us"] = lambda: varlen_attn(q, *repeated, bounds, bounds, most, most, window_size=(-1, 0))
    return {"part": "behind", "dims": dims, "lengths": lengths, **dict(zip(calls, in_turn(*calls.values())))}


# -- features


def additions(features: dict, tokens: int) -> dict:
    """Arguments for ``attend``; a fifth of the keys is masked."""
    features = dict(features)
    dtype, axes = features.pop("mask_dtype", torch.bool), features.pop("mask_axes", "2")
    if "mask" in features:
        mask = torch.rand(1, HEADS if axes == "bhqk" else 1, tokens, tokens, device="cuda", dtype=BF16) > 0.2
        features["mask"] = mask if dtype == torch.bool else torch.where(mask, -0.5, -torch.inf).to(dtype)
    if "sinks" in features:
        features["sinks"] = torch.randn(HEADS, device="cuda")
    return features


def featured(dims: tuple[int, int], memory: float) -> list[dict]:
    """Each feature: its time, and the time of plain attention of the same keys relative to it. ``memory``: bytes per
    microsecond, for masks that are as large as the scores."""
    q, k, v = plain(dims, MIDDLE)
    view, found = KVView.of(k, v), []

    def compared(name: str, causal: bool, **options) -> dict:
        of_causal = causal or name.startswith("causal")
        base, us = in_turn(
            lambda: attend(q, view, causal=of_causal, backend="gpu"),
            lambda: attend(q, view, causal=causal, **options, backend="gpu"),
        )
        row = {"part": "feature", "dims": dims, "feature": name, "us": us, "share_of_plain": base / us}
        mask = options.get("mask")
        if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
            row["us_to_read_the_mask"] = mask.nbytes / memory
        return row

    for name, (causal, features) in FEATURES.items():
        if name != "window":
            found.append(compared(name, causal, **additions(features, MIDDLE)))
    future = torch.ones(MIDDLE, MIDDLE, dtype=torch.bool, device="cuda").triu_(1)
    mask = torch.zeros(MIDDLE, MIDDLE, dtype=BF16, device="cuda").masked_fill_(future, -torch.inf)
    block_map = BlockMap.build(mask, gpu.tile(describe(q, view, mask=mask)))
    return [*found, compared("causal as a bf16 mask with a block map", False, mask=mask, block_map=block_map)]


def windowed(dims: tuple[int, int], tokens: int) -> dict:
    """``cost``: the time of a visible tile, relative to the causal run's."""
    q, k, v = plain(dims, tokens)
    view = KVView.of(k, v)
    size, keys = shapes.tile(describe(q, view, causal=True))

    def tiles(window: int) -> int:
        return sum((min(r + size, tokens) - 1) // keys - max(0, r - window + 1) // keys + 1 for r in range(0, tokens, size))

    whole, us = in_turn(*(lambda w=w: attend(q, view, causal=True, window=w, backend="gpu") for w in (None, WINDOW)))
    cost = us / tiles(WINDOW) / (whole / tiles(tokens))
    return {"part": "window", "dims": dims, "tokens": tokens, "window": WINDOW, "us": us, "cost": cost}


# -- onto a long cache


def onto(formats: str, dim: int) -> dict:
    """The last 4K tokens of 64K, all of them in the cache."""
    pair = codecs(formats, dim)
    packed = [rows(c.format, dim, 1, LONG_KV_HEADS, LONG) for c in pair]
    view = KVView((Segment(*packed, *(c.format for c in pair), 0, 0, LONG),), *pair, 1, LONG_KV_HEADS, 0, LONG)
    q = normal(1, LONG_HEADS, QUERIES, dim)
    spec, turned = describe(q, view, causal=True), view.k_codec.query(q)
    us = timed(lambda _: gpu.attend(turned, view, spec, None, None, None), 1)["us"]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = gpu.attend(turned, view, spec, None, None, None)
    torch.cuda.synchronize()
    more = torch.cuda.max_memory_allocated() - before - out.nbytes - lse.nbytes
    flop = 4.0 * QUERIES * (LONG - QUERIES / 2) * LONG_HEADS * dim
    speed = {"ms": us / 1e3, "tflops": flop / us / 1e6}
    return {"part": "onto", "formats": formats, "head_dim": dim, **speed, "workspace": more}


def measured() -> list[dict]:
    found = []

    def add(*some: dict) -> None:
        for row in some:
            print(row, flush=True)
        found.extend(some)

    for dims in DIMS:
        for tokens, is_causal in product(sorted({*TOKENS, *MORE.get(dims, ())}), (True, False)):
            add(attention(dims, tokens, is_causal))
    for problem in product(DIMS[:3], FEW_HEADS, FEW_TOKENS, (True, False)):
        add(few(*problem))
    for dims, lengths in product(DIMS[:4], LENGTHS):
        add(behind(dims, lengths))
    memory = gpu_stock.copy_ceiling(quick=True)["gb_s"] * 1e3
    for dims in DIMS[:4]:
        add(*featured(dims, memory))
        torch.cuda.empty_cache()
    for dims, tokens in product(DIMS[:4], TOKENS[1:]):
        add(windowed(dims, tokens))
    for dim, formats in product((128, 512), FORMATS):
        add(onto(formats, dim))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu_prefill.json", help="JSON file to write")
    parser.add_argument("--processes", type=int, default=16, help="that compile and check (default 16)")
    parser.add_argument("--commit", help="commit of a tree that is no git checkout")
    options = parser.parse_args()
    begun = time.monotonic()
    with torch.no_grad():
        checked = gate(options.processes)
        found = measured()
    about = environment()
    about["commit"] = about["commit"] or options.commit
    about |= {"driver": gpu_stock.driver(), "cuda": torch.version.cuda}
    record = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": about,
        "command": "python benchmarks/gpu_prefill.py",  # no option changes what is measured
        "heads": [HEADS, KV_HEADS],
        "gate": checked,
        "rows": found,
        "seconds": round(time.monotonic() - begun),
    }
    options.out.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    print(f"wrote {options.out} after {record['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
