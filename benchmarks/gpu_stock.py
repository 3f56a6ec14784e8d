"""What stands beside our kernels on a GPU: how calls are timed, how fast it copies, PyTorch's own attention.

Times are of kernels: calls are captured into a CUDA graph, which is replayed and timed by events.
"""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

CALLS, REPLAYS = 5, 7  # of a graph at least; of which the median counts
SLOW = 0.02  # seconds: slower calls are timed fewer times
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
FORMS = ("folded", "gqa", "repeated")  # query heads as rows of their KV head; enable_gqa; K and V repeated in memory
MOST_REPEATED = 24 * 2**30  # bytes of repeated K and V


def driver() -> str | None:
    """The driver's version."""
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done and done.returncode == 0 and done.stdout.strip():
        return done.stdout.split("\n")[0].strip()
    info = Path("/proc/driver/nvidia/version")
    return info.read_text().split("\n")[0] if info.is_file() else None


def _seconds(call: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3


def _captured(call: Callable[[int], object], copies: int) -> tuple[torch.cuda.CUDAGraph, int, int]:
    """A graph of calls, how many, and how many replays are enough."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(2):
            call(i % copies)
    torch.cuda.current_stream().wait_stream(side)
    once = _seconds(lambda: call(0))
    count, replays = (1, 3) if once > SLOW else (-(-CALLS // copies) * copies, REPLAYS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i % copies)
    graph.replay()
    return graph, count, replays


def timed(call: Callable[[int], object], copies: int) -> dict:
    """Microseconds per ``call(i)``, ``i`` going round ``copies`` of the data: median, least and most of the replays."""
    with torch.no_grad():
        graph, count, replays = _captured(call, copies)
        times = sorted(_seconds(graph.replay) / count * 1e6 for _ in range(replays))
    del graph
    return {"us": times[len(times) // 2], "us_least": times[0], "us_most": times[-1]}


def in_turn(*calls: Callable[[], object]) -> list[float]:
    """Median microseconds of each of ``calls``, which are replayed one after the other, so that all see the same clocks."""
    with torch.no_grad():
        made = [_captured(lambda _, c=call: c(), 1) for call in calls]
        times = [[_seconds(graph.replay) / count * 1e6 for graph, count, _ in made] for _ in range(REPLAYS)]
    return [sorted(of_one)[REPLAYS // 2] for of_one in zip(*times)]


def copy_ceiling(quick: bool) -> dict:
    """The fastest of several ways and sizes to copy memory, in GB/s read plus written; ``ways`` holds all of them."""
    ways: dict[str, float] = {}
    for megabytes in (256, 1024) if quick else (256, 512, 1024, 2048):
        a = torch.randint(-100, 100, (megabytes * 2**19,), dtype=torch.int16, device="cuda")
        b = torch.empty_like(a)
        for dtype in (torch.int16, torch.int32, torch.float32):
            x, y = a.view(dtype), b.view(dtype)
            for name, call in {
                "copy_": lambda i, x=x, y=y: y.copy_(x),
                "add": lambda i, x=x, y=y: torch.add(x, 1, out=y),
            }.items():
                way = f"{name} {str(dtype).removeprefix('torch.')}, {megabytes} MiB"
                ways[way] = 2 * a.nbytes / timed(call, 1)["us"] / 1e3
    way = max(ways, key=ways.get)
    return {"gb_s": ways[way], "way": way, "ways": ways}


def attention(kernel: str, form: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one query token per sequence, q ``[B, Hq, 1, D]``, as PyTorch computes it."""
    with sdpa_kernel(KERNELS[kernel]):
        if form == "folded":
            rows = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
            return scaled_dot_product_attention(rows, k, v).reshape(q.shape)
        return scaled_dot_product_attention(q, k, v, enable_gqa=form == "gqa")


def forms(q: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[str, str, dict | str]]:
    """(kernel, form, time or why it was refused) of every kernel and form; K and V are repeated where nothing else runs."""
    found, ran = [], set()
    for form, kernel in product(FORMS, KERNELS):
        given = pairs
        if form == "repeated":
            if kernel in ran:
                continue
            groups = q.shape[1] // pairs[0][0].shape[1]
            if 2 * pairs[0][0].nbytes * groups > MOST_REPEATED:
                found.append((kernel, form, f"repeated K and V take more than {MOST_REPEATED / 2**30:.0f} GiB"))
                continue
            given = [tuple(x.repeat_interleave(groups, 1) for x in pair) for pair in pairs[: max(1, len(pairs) // groups)]]
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                time = timed(lambda i, k=kernel, f=form, d=given: attention(k, f, q, *d[i]), len(given))
            ran.add(kernel)
            found.append((kernel, form, time))
        except RuntimeError as error:
            torch.cuda.synchronize()
            reasons = [str(w.message).split(" (Triggered")[0] for w in said if "untime" not in str(w.category)]
            found.append((kernel, form, " ".join([str(error).split("\n")[0], *dict.fromkeys(reasons)])[:600]))
        del given
    return found


def wrong(head_dim: int, groups: int, kv_heads: int) -> list[str]:
    """Kernels and forms that compute something else than float64 attention on a small problem."""
    k, v = torch.randn(2, 2, kv_heads, 777, head_dim, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(2, kv_heads * groups, 1, head_dim, device="cuda", dtype=torch.bfloat16)
    repeated = tuple(x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q.double() @ repeated[0].double().mT / head_dim**0.5
    exact = scores.softmax(-1) @ repeated[1].double()
    bad = []
    for form, kernel in product(FORMS, KERNELS):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = attention(kernel, form, q, *(repeated if form == "repeated" else (k, v)))
        except RuntimeError:
            continue  # refused; the timing says why
        if not float((got.double() - exact).norm() / exact.norm()) <= 1e-2:
            bad.append(f"{kernel} {form}")
    return bad
