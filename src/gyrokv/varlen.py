"""Attention of sequences whose tokens follow each other in one tensor, with their bounds in ``cu_seqlens``.

The arguments are those of FlashAttention's functions for variable lengths: tokens of sequence b are rows
``cu_seqlens[b]`` to ``cu_seqlens[b + 1]`` of ``[total, heads, D]``. A backend may read them so (``attend_varlen`` of its
module). Others see one batch: keys and values where they lie, as pages that begin wherever a sequence does, and queries
copied so that all sequences end in the same row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .dispatch import attend, check_gradients, choose, describe
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
    bounds that are none. On an accelerator nobody waits to read them: sequences that have more tokens than they may become
    NaN.
    """
    view = kv.view() if isinstance(kv, LayerCache) else kv
    view.check_current()
    bounds = _checked(q, cu_seqlens_q, max_seqlen_q, view.batch, options)
    found = _as_they_lie(q, view, view, bounds, max_seqlen_q, options)
    out, lse = _padded(q, view, bounds, max_seqlen_q, options) if found is None else found
    return (out, lse) if return_lse else out


def _checked(q: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int, batch: int, options: dict) -> Tensor:
    """Bounds of q."""
    for name in _PADDED:
        if options.get(name) is not None:
            raise ValueError(
                f"{name} is given, but sequences of different lengths share no {name}; call attend for each of them"
            )
    if q.ndim != 3:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be [total_q, Hq, D]")
    bounds = _bounds("q", cu_seqlens_q, q, max_seqlen_q)
    if len(bounds) - 1 != batch:
        raise ValueError(f"cu_seqlens_q is of {len(bounds) - 1} sequences, but there are keys of batch={batch}")
    return bounds


def _as_they_lie(
    q: Tensor, view: KVView, kv: KVView | tuple[Tensor, Tensor, Tensor], bounds: Tensor, most: int, options: dict
) -> tuple[Tensor, Tensor] | None:
    """(out, lse) by a backend that reads sequences behind each other; ``view`` says what of ``kv`` is the same for all."""
    if not q.shape[0]:
        return None
    options = dict(causal=True) | options
    backend, sinks = options.pop("backend", "auto"), options.get("sinks")
    batch = q.as_strided((view.batch, q.shape[1], most, q.shape[2]), (0, q.stride(1), 0, q.stride(2)))  # stands for one
    spec = describe(batch, view, **options)
    runner = choose(spec, backend)
    return runner.attend_varlen(q, kv, bounds, spec, sinks) if hasattr(runner, "attend_varlen") else None


def _padded(q: Tensor, view: KVView, bounds: Tensor, max_seqlen_q: int, options: dict) -> tuple[Tensor, Tensor]:
    """(out, lse) by any backend: sequences end in the same row of a batch."""
    bounds = bounds.to(torch.int64)
    ends = bounds[1:]
    total = q.shape[0]
    most = min(max_seqlen_q, max(1, total))
    rows = (ends[:, None] + torch.arange(-most, 0, device=q.device)).clamp_(0, max(0, total - 1))
    queries = q[rows] if total else q.new_zeros(*rows.shape, *q.shape[1:])
    out, lse = attend(queries.transpose(1, 2), view, return_lse=True, **options)
    token = torch.arange(total, device=q.device)
    sequence = torch.searchsorted(ends, token, right=True).clamp_(max=len(ends) - 1)
    row = token - ends[sequence] + most
    fits, row = (bounds.diff() <= most)[sequence] & (row >= 0) & (row < most), row.clamp(0, most - 1)
    out = torch.where(fits[:, None, None], out[sequence, :, row], torch.nan)
    return out, torch.where(fits, lse[sequence, :, row].T, torch.nan)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: bool = False,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attend_varlen` over plain tensors k ``[total_k, Hkv, Dk]``, v ``[total_k, Hkv, Dv]`` with bounds of their own.

    ``causal`` is bottom right: the last query of a sequence sees all of its keys. k and v are read where they lie if total_k
    is a multiple of 128, else copied once.
    """
    k_bounds = _check_keys(k, v, cu_seqlens_k, max_seqlen_k)
    codecs = [Codec(dense_format(x.dtype), x.shape[2]) for x in (k, v)]
    outline = KVView((), *codecs, len(k_bounds) - 1, k.shape[1], first=0, length=max_seqlen_k, lengths=k_bounds[1:])
    bounds = _checked(q, cu_seqlens_q, max_seqlen_q, outline.batch, options)
    if q.device != k.device:
        raise ValueError(f"q is on {q.device} but k is on {k.device}")
    check_gradients(q=q, k=k, v=v)
    found = _as_they_lie(q, outline, (k, v, k_bounds), bounds, max_seqlen_q, options)
    if found is None:
        view, fits = _paged(k, v, codecs, k_bounds, max_seqlen_k)
        found = _padded(q if fits is None else _spoilt(q, bounds, fits), view, bounds, max_seqlen_q, options)
    return found if return_lse else found[0]


def _bounds(name: str, bounds: Tensor, x: Tensor, most: int) -> Tensor:
    """``cu_seqlens_<name>``, if it can be what it is for x ``[total, heads, D]``."""
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
    return bounds


def _check_keys(k: Tensor, v: Tensor, cu_seqlens_k: Tensor, most: int) -> Tensor:
    """Bounds of k and v."""
    if k.ndim != 3 or v.ndim != 3:
        raise ValueError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; both must be [total_k, Hkv, D]")
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(f"k has shape {tuple(k.shape)} but v {tuple(v.shape)}; all but the last axis must agree")
    if k.device != v.device:
        raise ValueError(f"k is on {k.device} but v is on {v.device}")
    return _bounds("k", cu_seqlens_k, k, most)


def _paged(k: Tensor, v: Tensor, codecs: list[Codec], bounds: Tensor, most: int) -> tuple[KVView, Tensor | None]:
    """A view of a batch, and on an accelerator whether each sequence fits it."""
    bounds = bounds.to(torch.int64)
    first, lengths = bounds[:-1], bounds.diff()
    rows = []
    for x, codec in zip((k, v), codecs):
        missing = -x.shape[0] % _SLOTS or (0 if x.shape[0] else _SLOTS)
        paged = (pad(x, (0, 0, 0, 0, 0, missing)) if missing else x).unflatten(0, (-1, _SLOTS)).transpose(1, 2)
        rows.append(codec.encode(paged))
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


def _spoilt(q: Tensor, bounds: Tensor, fits: Tensor) -> Tensor:
    """q with NaN for queries of sequences whose keys do not fit their bound."""
    token = torch.arange(q.shape[0], device=q.device)
    sequence = torch.searchsorted(bounds[1:].to(torch.int64), token, right=True).clamp_(max=len(fits) - 1)
    return torch.where(fits[sequence][:, None, None], q, torch.nan)
