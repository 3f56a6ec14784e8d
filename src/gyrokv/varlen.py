"""Attention of sequences whose tokens follow each other in one tensor, with their bounds in ``cu_seqlens``.

The arguments are those of FlashAttention's functions for variable lengths: tokens of sequence b are rows
``cu_seqlens[b]`` to ``cu_seqlens[b + 1]`` of ``[total, heads, D]``. Kernels see one batch: keys and values where they
lie, as pages that begin wherever a sequence does, and queries copied so that all sequences end in the same row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .dispatch import attend
from .formats import dense_format
from .layer import LayerCache
from .quant import Codec
from .spec import check_positive
from .view import KVView, Segment

_SLOTS = 128  # of a page: rows that kernels read at a time
_PADDED = ("mask", "block_map")  # whose rows and columns are those of a batch


def attend_varlen(
    q: Tensor,
    kv: LayerCache | KVView,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    *,
    return_lse: bool = False,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`gyrokv.attend` of q ``[total_q, Hq, Dk]``: of each sequence in ``kv`` its last tokens, as many as it has in q.

    ``cu_seqlens_q``: int32 or int64 ``[B + 1]`` on q's device, from 0 to total_q. ``max_seqlen_q``: the most queries of a
    sequence, or more. ``options``: those of ``attend`` but ``mask`` and ``block_map``. Returns out ``[total_q, Hq, Dv]``,
    and with ``return_lse`` the log-sum-exp ``[Hq, total_q]``. Raises what ``attend`` raises, and ValueError or TypeError for
    bounds that are none. On an accelerator nobody waits to read them: what does not fit them becomes NaN.
    """
    for name in _PADDED:
        if options.get(name) is not None:
            raise ValueError(
                f"{name} is given, but sequences of different lengths share no {name}; call attend for each of them"
            )
    view = kv.view() if isinstance(kv, LayerCache) else kv
    if q.ndim != 3:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be [total_q, Hq, D]")
    ends = _bounds("q", cu_seqlens_q, q, max_seqlen_q)[1:]
    if len(ends) != view.batch:
        raise ValueError(f"cu_seqlens_q is of {len(ends)} sequences, but the cache holds batch={view.batch}")
    total = q.shape[0]
    most = min(max_seqlen_q, max(1, total))
    rows = (ends[:, None] + torch.arange(-most, 0, device=q.device)).clamp_(0, max(0, total - 1))
    queries = q[rows] if total else q.new_zeros(*rows.shape, *q.shape[1:])
    out, lse = attend(queries.transpose(1, 2), view, return_lse=True, **options)
    token = torch.arange(total, device=q.device)
    sequence = torch.searchsorted(ends, token, right=True).clamp_(max=len(ends) - 1)
    row = token - ends[sequence] + most
    fits, row = (row >= 0) & (row < most), row.clamp(0, most - 1)
    out = torch.where(fits[:, None, None], out[sequence, :, row], torch.nan)
    return (out, torch.where(fits, lse[sequence, :, row].T, torch.nan)) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attend_varlen` over plain tensors k ``[total_k, Hkv, Dk]``, v ``[total_k, Hkv, Dv]`` with bounds of their own.

    ``causal`` is bottom right: the last query of a sequence sees all of its keys. k and v are read where they lie if total_k
    is a multiple of 128, else copied once.
    """
    view, fits = _view(k, v, cu_seqlens_k, max_seqlen_k)
    q = q if fits is None else _spoilt(q, cu_seqlens_q, fits)
    return attend_varlen(q, view, cu_seqlens_q, max_seqlen_q, **options)


def _bounds(name: str, bounds: Tensor, x: Tensor, most: int) -> Tensor:
    """``cu_seqlens_<name>`` as int64, if it can be what it is for x ``[total, heads, D]``."""
    check_positive(**{f"max_seqlen_{name}": most})
    if bounds.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens_{name} has dtype {bounds.dtype}; it must be int32 or int64")
    if bounds.ndim != 1 or bounds.shape[0] < 2:
        raise ValueError(f"cu_seqlens_{name} has shape {tuple(bounds.shape)}; it must be [B + 1]")
    if bounds.device != x.device:
        raise ValueError(f"cu_seqlens_{name} is on {bounds.device} but {name} is on {x.device}")
    if bounds.device.type == "cpu":
        lengths = bounds.diff()
        if int(bounds[0]) != 0 or int(bounds[-1]) != x.shape[0] or int(lengths.min()) < 0:
            raise ValueError(
                f"cu_seqlens_{name}={bounds.tolist()} does not rise from 0 to {x.shape[0]}, the number of tokens of {name}"
            )
        if int(lengths.max()) > most:
            raise ValueError(f"max_seqlen_{name}={most} is less than {int(lengths.max())} tokens of a sequence of {name}")
    return bounds.to(torch.int64)


def _view(k: Tensor, v: Tensor, cu_seqlens_k: Tensor, most: int) -> tuple[KVView, Tensor | None]:
    """A view of a batch, and on an accelerator whether each sequence fits it."""
    if k.ndim != 3 or v.ndim != 3:
        raise ValueError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; both must be [total_k, Hkv, D]")
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(f"k has shape {tuple(k.shape)} but v {tuple(v.shape)}; all but the last axis must agree")
    if k.device != v.device:
        raise ValueError(f"k is on {k.device} but v is on {v.device}")
    bounds = _bounds("k", cu_seqlens_k, k, most)
    first, lengths = bounds[:-1], bounds.diff()
    codecs, rows = [], []
    for x in (k, v):
        missing = -x.shape[0] % _SLOTS or (0 if x.shape[0] else _SLOTS)
        paged = (pad(x, (0, 0, 0, 0, 0, missing)) if missing else x).unflatten(0, (-1, _SLOTS)).transpose(1, 2)
        codecs.append(Codec(dense_format(x.dtype), x.shape[2]))
        rows.append(codecs[-1].encode(paged))
    pages = -(-(min(most, max(1, k.shape[0])) + _SLOTS - 1) // _SLOTS)  # a sequence may begin in a page's last slot
    table = first[:, None] // _SLOTS + torch.arange(pages, device=k.device)
    starts = first % _SLOTS
    stops = starts + lengths
    segment = Segment(
        *rows, codecs[0].format, codecs[1].format, base=0, first=0, stop=pages * _SLOTS,
        pages=table.clamp_(0, paged.shape[0] - 1).to(torch.int32),
    )  # fmt: skip
    view = KVView(
        (segment,), *codecs, len(first), k.shape[1], first=0, length=segment.stop, starts=starts,
        lengths=stops.clamp(max=segment.stop),
    )  # fmt: skip
    return view, None if k.device.type == "cpu" else (lengths >= 0) & (lengths <= most)


def _spoilt(q: Tensor, cu_seqlens_q: Tensor, fits: Tensor) -> Tensor:
    """q with NaN for queries of sequences whose keys do not fit their bound."""
    token = torch.arange(q.shape[0], device=q.device)
    sequence = torch.searchsorted(cu_seqlens_q[1:].to(torch.int64), token, right=True).clamp_(max=len(fits) - 1)
    return torch.where(fits[sequence][:, None, None], q, torch.nan)
