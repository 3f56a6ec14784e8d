"""How tests run a problem on the Metal kernels, executed on the CPU."""

from __future__ import annotations

import pytest
from torch import Tensor

from gyrokv import BlockMap
from gyrokv.backends import metal
from gyrokv.backends.metal.launches import Tuning
from gyrokv.masks import check_mask
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


def block_map_of(data: Problem) -> BlockMap | None:
    """The map that a problem asks for, for the kernels' tiles."""
    return BlockMap.build(data.mask, metal.tile(data.case.spec)) if data.case.spec.block_map else None
