"""How tests run a problem on the Metal kernels, executed on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gyrokv import BlockMap
from gyrokv.backends import metal
from gyrokv.backends.metal.launches import Tuning
from gyrokv.masks import LOWEST, check_mask
from gyrokv.testing import Problem
from gyrokv.view import KVView

from .entries import Executor
from .host import compiler

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no g++ to compile the executor of Metal source with")
DECODE, PREFILL = Tuning(decode_rows=10**9, split_keys=32), Tuning(decode_rows=0, split_keys=64)


def run(
    data: Problem, machine: Executor, tuning: Tuning, block_map: BlockMap | None = None, view: KVView | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a problem, as ``dispatch.run`` would have them."""
    spec, view = data.case.spec, view or data.view
    mask = None
    if data.mask is not None:
        mask = check_mask(data.mask, (spec.batch, spec.q_heads, spec.q_len, spec.kv_len), data.q.device)
    out, lse = metal._attend(machine, view.k_codec.query(data.q), view, spec, mask, block_map, data.sinks, tuning)
    return view.v_codec.output(out).to(spec.dtype), lse


def mask_of_all_states(rows: int, keys: int, dtype: torch.dtype) -> Tensor:
    """``[2, 3, rows, keys]``: tiles that are skipped, plain, mixed, mixed by one element; additive ones also biased, and
    hidden by the largest values that hide."""
    i, t = torch.arange(rows)[:, None], torch.arange(keys)[None]
    seen = ((t // 64 == i // 64) | (t >= 128)).repeat(2, 3, 1, 1)
    seen[0, 1, rows // 2, 0] ^= True
    seen[0, 2, rows // 2, keys // 2] ^= True
    seen[1, 2, -1, -1] = False
    if dtype == torch.bool:
        return seen
    mask = torch.where(seen, 0.0, torch.where(t % 2 == 0, LOWEST, -torch.inf)).to(dtype)
    mask[1, 0, 0, 0] = -1.5
    mask[1, 1, -1] = -65503.99 if dtype == torch.float32 else -65024.0  # the next value after the limit is seen
    mask[1, 0, 0, keys // 2] = torch.nan  # hides nothing
    return mask


def block_map_of(data: Problem) -> BlockMap | None:
    """The map that a problem asks for, for the kernels' tiles."""
    return BlockMap.build(data.mask, metal.tile(data.case.spec)) if data.case.spec.block_map else None
