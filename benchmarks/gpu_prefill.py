"""Speed of prefill on a Hopper GPU beside cuDNN and our kernels for other GPUs, and of prefill onto long packed caches,
measured in one run.

``python benchmarks/gpu_prefill.py`` writes ``results/gpu_prefill.json``. Times are medians of replayed CUDA graphs.
FLOP are those of the visible keys. The workspace is what a call allocates beyond its output.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime, timezone
from pathlib import Path

import torch
from gpu import codecs, rows
from gpu_stock import timed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gyrokv import attend
from gyrokv.backends import gpu
from gyrokv.cases import case
from gyrokv.dispatch import describe
from gyrokv.env import environment
from gyrokv.testing import inputs
from gyrokv.view import KVView, Segment

ROOT = Path(__file__).resolve().parent.parent
TOKENS, HEADS, KV_HEADS = 8192, 16, 4  # of causal prefill
LONG, QUERIES, LONG_HEADS, LONG_KV_HEADS = 65536, 4096, 32, 8  # the last queries of a long cache
FORMATS = ("bf16", "q8_0", "turbo4", "turbo4/turbo2", "tq6")
LIMIT = 6e-3  # relative error that the gate allows: weights and outputs are bfloat16


def check(formats: str, dim: int) -> None:
    """SystemExit if prefill of a small problem is off."""
    k, _, v = formats.partition("/")
    sizes = dict(batch=2, q_heads=8, kv_heads=2, q_len=200, kv_len=777, causal=True, dtype=torch.bfloat16, device="cuda")
    problem = inputs(case(k, v or k, (dim, dim), **sizes))
    out, exact = problem.run("gpu")[0], problem.exact[0]
    error = float((out.double() - exact).norm() / exact.norm())
    if not error <= LIMIT:
        raise SystemExit(f"gate: {formats} at head_dim {dim} is off by {error:.3g}, allowed {LIMIT:g}; nothing was timed")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def causal(dim: int) -> dict:
    """Causal attention of 8K tokens over plain tensors, and cuDNN where it has a kernel."""
    q, k, v = normal(1, HEADS, TOKENS, dim), *(normal(1, KV_HEADS, TOKENS, dim) for _ in "kv")
    flop, view = 2.0 * TOKENS * TOKENS * HEADS * dim, KVView.of(k, v)
    us = timed(lambda _: attend(q, view, backend="gpu"), 1)["us"]
    row = {"part": "causal", "head_dim": dim, "tflops": flop / us / 1e6}
    with gpu.forced("portable"):
        row["portable_tflops"] = flop / timed(lambda _: attend(q, view, backend="gpu"), 1)["us"] / 1e6
    if dim <= 256:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            us = timed(lambda _: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 1)["us"]
        row["cudnn_tflops"] = flop / us / 1e6
    return row


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu_prefill.json", help="JSON file to write")
    parser.add_argument("--commit", help="commit of a tree that is no git checkout")
    options = parser.parse_args()
    for formats in FORMATS:
        check(formats, 128)
        check(formats, 512)
    found = [causal(dim) for dim in (64, 128, 256, 512)]
    found += [onto(formats, dim) for dim in (128, 512) for formats in FORMATS]
    about = environment()
    if options.commit:
        about["commit"] = options.commit
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    options.out.write_text(json.dumps({"when": when, "environment": about, "rows": found}, indent=1) + "\n")
    for row in found:
        print(row)


if __name__ == "__main__":
    main()
