"""On a Mac: the Metal kernels on its GPU, against float64 on the CPU. Everywhere else there is nothing to run.

Bounds are wider than on the executor: a GPU's exponential, division and matrix units have their own last bits.
"""

from __future__ import annotations

import os

import pytest
import torch

from gyrokv import BlockMap, Codec, LayerCache, append, attend
from gyrokv.backends import metal
from gyrokv.cases import Case, cases, fits
from gyrokv.formats import FORMATS, KVFormat
from gyrokv.testing import Problem, assert_matches, inputs

if metal.missing() and "metal" not in os.environ.get("GYROKV_REQUIRE", "").split(","):
    pytest.skip(f"needs an Apple GPU: {'; '.join(metal.missing())}", allow_module_level=True)

pytestmark = pytest.mark.apple
BOUND = 1e-4
CODES_OFF = 1e-4  # share of codes that may be another level, next to a boundary
CASES = [c for c in cases() if c.spec.dtype != torch.float64]


def run(data: Problem, device: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a problem that lies on the CPU, computed on ``device``."""
    moved = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in data.options.items()}
    if data.case.spec.block_map:
        moved["block_map"] = BlockMap.build(moved["mask"], metal.tile(data.case.spec))
    out, lse = attend(data.q.to(device), data.view.to(device), **moved, **options, return_lse=True)
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gpu_matches_the_reference(case: Case, backend_here):
    """A failure is a kernel that Apple's compiler or GPU runs otherwise than the executor does."""
    backend_here("metal")
    data = inputs(case)
    assert_matches(data, *run(data, "mps", backend="metal"), BOUND)


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if not f.is_dense], ids=str)
def test_the_gpu_encodes_the_same_rows(fmt: KVFormat, backend_here):
    """But for codes next to a boundary, and never by more than a level."""
    backend_here("metal")
    for dim in (d for d in (64, 80, 128, 512) if fits(fmt, d)):
        k, v = torch.randn(2, 1, 2, 500, dim, generator=torch.Generator().manual_seed(0))
        layers = [LayerCache(Codec(fmt, dim), Codec(fmt, dim), kv_heads=2, device=device) for device in ("cpu", "mps")]
        want, got = (append(layer, k.to(layer.device), v.to(layer.device)).to("cpu") for layer in layers)
        for side in "kv":
            a, b = want.decode(side), got.decode(side)
            assert float(((a - b).abs() > 1e-3 * a.abs().max()).float().mean()) <= CODES_OFF


def test_mlx_matches_torch(backend_here):
    """``gyrokv.mlx`` on the GPU: the same tokens, in chunks, through a ring, with learned sinks."""
    backend_here("metal")
    mx = pytest.importorskip("mlx.core", reason="no MLX: pip install 'gyrokv[mlx]'")
    import gyrokv.mlx
    from gyrokv.config import LayerPolicy

    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0])
    for window in (None, 20):
        ours = gyrokv.mlx.PackedKVCache(LayerPolicy("q8_0", "turbo4"), window)
        theirs = LayerCache(Codec("q8_0", 64), Codec("turbo4", 64), kv_heads=2, window=window)
        for tokens in (9, 1, 70, 1):
            q, k, v = (torch.randn(1, heads, tokens, 64) for heads in (4, 2, 2))
            keys, values = ours.update_and_fetch(mx.array(k.numpy()), mx.array(v.numpy()))
            got = gyrokv.mlx.attend(
                mx.array(q.numpy()), keys, values, scale=0.125, mask="causal", sinks=mx.array(sinks.numpy())
            )
            want = attend(q, theirs.append(k, v), window=window, sinks=sinks, backend="torch")
            torch.testing.assert_close(torch.tensor(got.tolist()), want, rtol=1e-2, atol=1e-2)
