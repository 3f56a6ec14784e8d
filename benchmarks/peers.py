"""What the CPU kernels are measured with and against: a stopwatch, this machine's memory, torch's own attention, and
figures quoted from elsewhere. ``cpu.py`` uses it; nothing runs by itself."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gyrokv.dispatch import BACKENDS

QUOTED_ON = "quoted, 2 Zen 4 cores"
_NAMES = (
    "llama.cpp f16", "llama.cpp q8_0", "llama.cpp q4_0", "fork turbo4", "fork turbo3",
    "ik f16", "ik q8_0", "ik q4_0", "ik q6_0",
)  # fmt: skip
# us of one decode step, batch 1, 8 KV heads x 4 query heads, by (head size, tokens): measured elsewhere, NOT on the machine
# of this run. llama.cpp, its fork with turbo formats, ik_llama.cpp; caches head-major, flash attention.
QUOTED: dict[tuple[int, int], dict[str, float]] = {
    size: dict(zip(_NAMES, times))
    for size, times in {
        (128, 4096): (2463, 3403, 6219, 20862, 35175, 634, 506, 601, 646),
        (128, 16384): (10353, 13865, 24623, 91323, 137061, 4863, 3282, 2182, 3703),
        (256, 4096): (3680, 5325, 10829, 46175, 60963, 2321, 806, 951, 1041),
        (256, 16384): (15296, 22031, 43382, 179338, 239318, 10315, 5703, 4422, 5134),
        (512, 4096): (6244, 11531, 20852, 81806, 122109, 4972, 3185, 2916, 2306),
        (512, 16384): (26911, 40056, 86877, 367969, 541465, 21075, 11964, 9330, 10581),
    }.items()
}
QUOTED[128, 16384]["torch bfloat16"] = 6950  # scaled_dot_product_attention in its best form
COUNTERPARTS = {
    "bf16": ("llama.cpp f16", "ik f16", "torch bfloat16"),
    "f16": ("llama.cpp f16", "ik f16"),
    "q8_0": ("llama.cpp q8_0", "ik q8_0"),
    "q4_0": ("llama.cpp q4_0", "ik q4_0"),
    "turbo4": ("fork turbo4",), "turbo4.v2": ("fork turbo4",),
    "turbo3": ("fork turbo3",), "turbo3.v2": ("fork turbo3",),
    "tq6": ("ik q6_0",),
}  # fmt: skip


def quoted(formats: str, head_dim: int, kv_len: int) -> dict[str, float]:
    """Quoted times in us of the formats that are most like ``formats``, under names that say where they come from."""
    times = QUOTED.get((head_dim, kv_len), {})
    return {f"{name} ({QUOTED_ON})": times[name] for name in COUNTERPARTS.get(formats, ()) if name in times}


def last_level_cache() -> int:
    """Bytes of all caches of the highest level that the system reports; 64 MiB where it reports none."""
    found: dict[int, dict[str, int]] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level, size, cpus = ((index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
        except OSError:
            continue
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(size[-1:], 1)
        found.setdefault(int(level), {})[cpus] = int(size.rstrip("KMG")) * unit
    return sum(found[max(found)].values()) if found else 64 * 2**20


def available_memory() -> int:
    """Bytes that can be allocated without swapping; 8 GiB where the system does not say."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 8 * 2**30)


def levels(backend: str) -> list[str]:
    """Names of the instruction sets that ``backend`` can be forced to use on this machine, the best first."""
    module = BACKENDS[backend]
    if not hasattr(module, "forced"):
        return []
    return [level.name for level in import_module(f"{module.__name__}.native").library().levels if not level.lacks]


def forced(backend: str, level: str) -> AbstractContextManager:
    """The context in which ``backend`` uses the instruction set ``level`` ("": its own choice)."""
    return BACKENDS[backend].forced(level) if level else nullcontext()


def timed(call: Callable[[int], object], least: int, seconds: float) -> dict:
    """Median, 20th and 80th percentile of ``call(i)`` in us: ``least`` repetitions and ``seconds`` after a warm-up of 3."""
    return timed_in_turns([(call, nullcontext)], least, seconds, turns=1)[0]


def timed_in_turns(
    calls: Sequence[tuple[Callable[[int], object], Callable[[], AbstractContextManager]]],
    least: int,
    seconds: float,
    turns: int = 10,
) -> list[dict]:
    """What ``timed`` says of each call within its context (entered once a turn), all of them taking ``turns``, and
    ``turns_us``, the median of each: whatever else the machine does meets them alike, see ``ratio``."""
    times: list[list[list[int]]] = [[] for _ in calls]
    gc.collect()
    gc.disable()
    try:
        for turn in range(turns):
            for (call, context), taken in zip(calls, times):
                with context():
                    begun = 3 * (turn + 1) + sum(map(len, taken))
                    for i in range(begun - 3, begun):
                        call(i)
                    own: list[int] = []
                    end = time.perf_counter_ns() + int(seconds / turns * 1e9)
                    while len(own) < -(-least // turns) or (time.perf_counter_ns() < end and len(own) < 2000 // turns):
                        start = time.perf_counter_ns()
                        call(begun + len(own))
                        own.append(time.perf_counter_ns() - start)
                    taken.append(own)
    finally:
        gc.enable()
    result = []
    for taken in times:
        low, middle, high = (float(t) / 1e3 for t in np.percentile(sum(taken, []), (20, 50, 80)))
        each = [float(np.median(own)) / 1e3 for own in taken]
        result.append({"us": middle, "us_p20": low, "us_p80": high, "repetitions": sum(map(len, taken)), "turns_us": each})
    return result


def ratio(slow: dict, fast: dict) -> float:
    """How many times ``fast`` is as fast as ``slow``: the median over the turns that they took together."""
    return float(np.median(np.divide(slow["turns_us"], fast["turns_us"])))


class Memory:
    """Reads a buffer of ``nbytes`` that no cache holds, with all threads, by torch's reductions of float32: which of
    ``reads`` is the fastest depends on how fast memory is at the time. ``all_gb_s``: how fast each was when this was made.

    On the machine where this was chosen they read faster than a loop over 512-bit loads with a thread per core did.
    """

    def __init__(self, cache: int, least: int) -> None:
        self.nbytes = min(max(2 * cache, 2**30), available_memory() // 4) // 2**20 * 2**20
        x = torch.ones(self.nbytes // 4)
        rows, weights = x.view(-1, 2**16), torch.ones(2**16)
        reads = {"dot": lambda i: torch.dot(x, x), "mv": lambda i: torch.mv(rows, weights), "sum": lambda i: x.sum()}
        self.all_gb_s = {name: self.gb_s(timed(read, least, 0.0)) for name, read in reads.items()}
        self.reads = [read for name, read in reads.items() if self.all_gb_s[name] > max(self.all_gb_s.values()) / 2]
        size = f"{self.nbytes / 2**30:.2f} GiB, {torch.get_num_threads()} threads"
        print(f"memory is read at {max(self.all_gb_s.values()):.1f} GB/s ({size})")

    @staticmethod
    def fastest(times: list[dict]) -> dict:
        """Of the times of all ``reads``, taken in turns: that of the one with the least median, of each turn the least."""
        best = min(times, key=lambda time: time["us"])
        return best | {"turns_us": np.min([time["turns_us"] for time in times], axis=0).tolist()}

    def gb_s(self, time: dict) -> float:
        return self.nbytes / time["us"] / 1e3


def torch_forms(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Callable[[], Tensor]]:
    """torch's attention of q ``[1, Hq, Tq, D]`` over k, v ``[1, Hkv, Tkv, D]`` in the forms that CPUs can run: the group
    folded into the query rows, or ``enable_gqa``. Causal is bottom right, which needs a mask (torch's own is top left)."""
    q_len, kv_len, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    mask = None
    if causal:
        mask = torch.full((q_len, kv_len), float("-inf"), dtype=q.dtype).triu(kv_len - q_len + 1)
    rows = q.reshape(1, k.shape[1], groups * q_len, q.shape[3])
    long = None if mask is None else mask.repeat(groups, 1)
    return {
        "folded": lambda: scaled_dot_product_attention(rows, k, v, attn_mask=long),
        "enable_gqa": lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
    }
