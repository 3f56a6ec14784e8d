"""Lengths on the device and pages, for backends whose kernels know neither: sequence after sequence.

Where host and device are one, reading lengths costs nothing; pages are copied, packed as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..masks import BlockMap
from ..spec import AttentionSpec
from ..view import KVView


def attend(
    plain: Callable,
    q: Tensor,
    view: KVView,
    spec: AttentionSpec,
    mask: Tensor | None,
    block_map: BlockMap | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The contract's ``attend`` by one, ``plain``, that takes neither lengths nor pages.

    A block map, which changes no result, is not used: it fits the whole mask only.
    """
    if not (spec.lengths or spec.paged):
        return plain(q, view, spec, mask, block_map, sinks)
    done = []
    for batch, columns, part in view.parts():
        rows = None
        if mask is not None:
            rows = (mask if mask.shape[0] == 1 else mask[batch])[..., columns]
        alone = replace(
            spec, batch=part.batch, kv_len=part.kv_len, ring=part.ring, unquantised=part.unquantised, block_map=False,
            paged=False, lengths=False,
        )  # fmt: skip
        done.append(plain(q[batch], part, alone, rows, None, sinks))
    return tuple(torch.cat(results) for results in zip(*done))
