"""A few small problems on a GPU, to be run under compute-sanitizer: see CONTRIBUTING.md. No test by itself.

Arguments: the parts to run, of ``append best alone joined portable behind``; without any, all.
"""

from __future__ import annotations

import sys
from unittest import mock

import torch

from gyrokv import Codec, LayerCache, attend_varlen, attention_varlen
from gyrokv.backends import gpu
from gyrokv.backends.gpu import prefill, staging
from gyrokv.cases import case
from gyrokv.testing import inputs, poisoned_memory

BF16 = torch.bfloat16
ADDITIVE = dict(mask="additive", mask_dtype=BF16)
CASES = (
    case("turbo4", "q8_0", (128, 128), kv_len=113, causal=True),
    case("turbo2", "turbo3", (64, 64), kv_len=333, q_len=3, causal=True, window=100),
    case("tq5", "bf16", (128, 128), kv_len=97, mask="additive"),
    case("bf16", "bf16", (128, 128), kv_len=200, q_len=70, dtype=BF16, causal=True),
    case("q8_0", "turbo4", (512, 512), kv_len=200, q_len=40, dtype=BF16, causal=True),
    case("bf16", "bf16", (128, 128), kv_len=300, q_len=70, dtype=BF16, causal=True, lengths=True, paged=True),
    case("bf16", "bf16", (512, 512), kv_len=300, q_len=70, dtype=BF16, lengths=True, paged=True, page=64),
    case("q8_0", "turbo4", (128, 128), kv_len=300, q_len=70, dtype=BF16, causal=True, lengths=True, paged=True),
    case("bf16", "turbo4", (512, 512), kv_len=300, q_len=70, dtype=BF16, causal=True, lengths=True, window=100),
    case("bf16", "bf16", (64, 64), kv_len=300, q_len=70, q_heads=8, kv_heads=2, dtype=BF16, softcap=30.0, mask="bool"),
    case("bf16", "bf16", (64, 64), kv_len=304, q_len=70, q_heads=8, dtype=BF16, mask_axes="bhqk", **ADDITIVE),
    case("bf16", "bf16", (64, 64), kv_len=300, q_len=70, q_heads=8, kv_heads=2, dtype=BF16, softcap=50.0, causal=True),
    case("bf16", "bf16", (128, 128), kv_len=304, q_len=70, q_heads=8, dtype=BF16, **ADDITIVE),
    case("bf16", "bf16", (256, 256), kv_len=302, q_len=70, dtype=BF16, mask="additive", masked=-1e5),
    case("bf16", "bf16", (512, 512), kv_len=300, q_len=70, dtype=BF16, mask="additive", mask_axes="bhqk"),
)


def run(name: str, cases: tuple) -> None:
    """Memory of results holds NaN before, because initcheck does not see what is stored in boxes."""
    results = prefill._Call.results

    def filled(call: prefill._Call, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return tuple(x.fill_(torch.nan) for x in results(call, dtype))

    for one in cases:
        with poisoned_memory():  # slots that hold nothing are copied with the others
            problem = inputs(one.on("cuda"))
        with mock.patch.object(prefill._Call, "results", filled):
            total = float(problem.run("gpu")[0].float().abs().sum())
        assert total == total, f"{one}: not all results were written"
        print(name, one, total, flush=True)


def best() -> None:
    run("best", CASES)


def alone() -> None:
    """One block takes all tiles, one after the other; those at 64 values are tall."""
    with gpu.forced("tall"), mock.patch.object(prefill, "_processors", lambda device: 1):
        run("alone", CASES[3:])


def portable() -> None:
    with gpu.forced("portable"):
        run("portable", CASES[3:])


def joined() -> None:
    """In pieces of 128 keys, whose results are joined."""
    staging.STAGED = 1
    run("joined", CASES[5:])


def behind() -> None:
    """Sequences behind each other, one of them empty, one longer than it may be."""
    for dim, k in ((64, "bf16"), (256, "bf16"), (512, "q8_0")):
        bounds = torch.tensor([0, 70, 70, 300, 310], dtype=torch.int32, device="cuda")
        q, *kv = (torch.randn(310, h, dim, device="cuda", dtype=BF16) for h in (8, 2, 2))
        print("behind", dim, float(attention_varlen(q, *kv, bounds, bounds, 200, 230)[:70].float().abs().sum()), flush=True)
        layer = LayerCache(Codec(k, dim), Codec(k, dim), batch=4, kv_heads=2, dtype=BF16, device="cuda")
        view = gpu.append(layer, *(torch.randn(4, 2, 230, dim, device="cuda", dtype=BF16) for _ in "kv"))
        print("of a cache", float(attend_varlen(q, view, bounds, 230).float().abs().sum()), flush=True)


def append() -> None:
    layer = LayerCache(Codec("turbo4", 128), Codec("q8_0", 128), batch=2, kv_heads=2, dtype=BF16, device="cuda", capacity=64)
    x = torch.randn(2, 2, 5, 128, device="cuda", dtype=BF16)
    gpu.append(layer, x, x)


PARTS = {part.__name__: part for part in (append, best, alone, joined, portable, behind)}


if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
    torch.cuda.synchronize()
