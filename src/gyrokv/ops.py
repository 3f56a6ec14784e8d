"""``torch.ops.gyrokv.append`` and ``.attend``: appending and attending as operators that torch.compile and CUDA graphs take.

Both take tensors and one string of settings that never changes, read lengths on the device, and keep nothing: a
captured graph sees new lengths because they are written in place. They have fakes, so tracing runs no kernel.
``append`` cannot raise for what it finds in values on an accelerator: it sets ``trouble`` (see :func:`check`), and on
the CPU, where looking costs no wait, raises at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .config import LayerPolicy, LayerShape
from .dispatch import append_at, choose, describe, run
from .errors import CapacityError
from .quant import Codec, Packed, check_finite
from .view import KVView, Segment


@dataclass(frozen=True)
class Rows:
    """What rows of a layer mean: the same for every call. :meth:`__str__` is what the operators take.

    ``bound``: tokens at most. ``window``: the layer's sliding window, 0 for none. ``keep``: how many of the last tokens
    the rows hold, 0 for all of them. Formats and rotations as in :class:`LayerPolicy`.
    """

    k: str
    v: str
    head_dim: int
    head_dim_v: int
    bound: int
    window: int = 0
    k_rotation: str = ""
    v_rotation: str = ""
    keep: int = 0

    @classmethod
    def of(cls, policy: LayerPolicy, shape: LayerShape, bound: int, keep: int = 0) -> Rows:
        """For a layer of ``shape`` under ``policy``, whose dense rows (``sinks``, ``recent``) are not among these."""
        return cls(
            policy.k, policy.v, shape.head_dim, shape.head_dim_v or shape.head_dim, bound, shape.window or 0,
            policy.k_rotation, policy.v_rotation, keep,
        )  # fmt: skip

    def __str__(self) -> str:
        return ",".join(str(value) for value in vars(self).values())


@cache
def _rows(text: str) -> Rows:
    return Rows(*(int(value) if value.isdecimal() else value for value in text.split(",")))


@cache
@torch.inference_mode(False)
def codecs(text: str, device: torch.device) -> tuple[Codec, Codec]:
    """Codecs of K and V, with what they multiply by on ``device``: a captured graph must copy nothing from the host."""
    rows = _rows(text)
    policy = LayerPolicy(rows.k, rows.v, k_rotation=rows.k_rotation, v_rotation=rows.v_rotation)
    made = policy.codecs(LayerShape(1, rows.head_dim, rows.head_dim_v))
    for codec in made:
        if codec.matrix is not None:
            codec.matrix = codec.matrix.to(device)
    return made


_TROUBLE = ("NaN or inf was appended: what attends to it is NaN", "more tokens were appended than there is room for")


def new_trouble(device: torch.device) -> Tensor:
    """Flags for :func:`append`: int32 ``[2]``, all 0."""
    return torch.zeros(len(_TROUBLE), dtype=torch.int32, device=device)


def check(trouble: Tensor) -> None:
    """Raise what appends since the last call found on an accelerator: ValueError or CapacityError. Waits for it."""
    found = trouble.tolist()
    trouble.zero_()
    for error, flag, text in zip((ValueError, CapacityError), found, _TROUBLE):
        if flag:
            raise error(f"{text}; the cache holds it: reset it")


@torch.library.custom_op("gyrokv::append", mutates_args=("k_words", "k_scale", "v_words", "v_scale", "trouble"))
def append(
    k_words: Tensor,
    k_scale: Tensor,
    v_words: Tensor,
    v_scale: Tensor,
    trouble: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    pages: Tensor | None,
    counts: Tensor | None,
    rows: str,
) -> None:
    """Encode tokens k ``[B, Hkv, T, Dk]``, v and store them behind the first ``lengths [B or 1]``; see ``place.py``.

    ``rows``: a :class:`Rows` as a string. ``lengths`` itself is left to the caller, once per step and not per layer.
    """
    settings = _rows(rows)
    if k.device.type == "cpu":
        for name, x in (("k", k), ("v", v)):
            check_finite(x, name)
        held = int(lengths.max())
        if held + (k.shape[2] if counts is None else 0) > settings.bound:
            raise CapacityError(f"{held} tokens held and {k.shape[2]} more exceed the limit of {settings.bound}")
    else:
        wrong = ~(torch.isfinite(k).all() & torch.isfinite(v).all())
        full = (lengths + (k.shape[2] if counts is None else 0)).max() > settings.bound
        trouble |= torch.stack((wrong, full))
    stores = Packed(k_words, k_scale), Packed(v_words, v_scale)
    append_at(stores, codecs(rows, k.device), (k, v), lengths, pages, counts)


@append.register_fake
def _(k_words, k_scale, v_words, v_scale, trouble, k, v, lengths, pages, counts, rows):
    settings = _rows(rows)
    torch._check(k.shape[-1] == settings.head_dim and v.shape[-1] == settings.head_dim_v)


@torch.library.custom_op("gyrokv::attend", mutates_args=())
def attend(
    q: Tensor,
    k_words: Tensor,
    k_scale: Tensor,
    v_words: Tensor,
    v_scale: Tensor,
    lengths: Tensor,
    pages: Tensor | None,
    starts: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    rows: str,
    causal: bool,
    window: int,
    scale: float | None,
    softcap: float,
    alibi: float,
    fast: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """:func:`gyrokv.attend` over rows with ``lengths`` (and ``pages``) on the device: (out ``[B, Hq, Tq, Dv]``, lse).

    ``window``: 0 for none; the columns of ``mask`` are positions 0 to ``rows.bound - 1``. Which backend runs, and in
    how many splits, follows from shapes and settings alone.
    """
    settings = _rows(rows)
    k_codec, v_codec = codecs(rows, q.device)
    segment = Segment(
        Packed(k_words, k_scale), Packed(v_words, v_scale), k_codec.format, v_codec.format, base=0, first=0,
        stop=settings.bound, pages=pages, keep=settings.keep or None,
    )  # fmt: skip
    view = KVView(
        (segment,), k_codec, v_codec, q.shape[0], k_words.shape[1], first=0, length=settings.bound,
        window=settings.window or None, starts=starts, lengths=lengths,
    )  # fmt: skip
    spec = describe(
        q, view, causal=causal, window=window or None, scale=scale, softcap=softcap, alibi=alibi, fast=fast, mask=mask,
        sinks=sinks,
    )  # fmt: skip
    out, lse = run(choose(spec, backend), q, view, spec, mask=mask, sinks=sinks)
    return out.contiguous(), lse.contiguous()


@attend.register_fake
def _(q, k_words, k_scale, v_words, v_scale, lengths, pages, starts, mask, sinks, rows, *settings):
    out = q.new_empty(*q.shape[:3], _rows(rows).head_dim_v)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)
