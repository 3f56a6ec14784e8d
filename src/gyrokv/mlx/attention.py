"""Attention over handles, and the one place where mlx-lm's models call it."""

from __future__ import annotations

import sys
from functools import partial, wraps

import mlx.core as mx
import mlx_lm.models.base as base

from ..backends.metal import launches, why_not
from ..errors import Unsupported
from ..spec import AttentionSpec
from ..view import KVView
from .machine import DTYPES, machine, output, query
from .packed import Causal, Handle

_NAME = "scaled_dot_product_attention"


def attend(
    queries: mx.array,
    keys: Handle,
    values: Handle,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    softcap: float = 0.0,
) -> mx.array:
    """Attention of q ``[B, Hq, Tq, Dk]``, the last tokens held, over packed rows: ``[B, Hq, Tq, Dv]`` in q's dtype.

    ``mask``: None or "causal" (bottom right, with the layer's window), or an array, bool or additive, broadcastable to
    ``[B, Hq, Tq, keys held]``, which alone says what is seen. ``sinks [Hq]``: learned sink logits.
    """
    view, kept = keys.view, keys.kept
    if queries.ndim != 4 or queries.dtype not in DTYPES:
        raise ValueError(f"queries have shape {queries.shape}, {queries.dtype}; they must be floating [B, Hq, Tq, D]")
    if isinstance(mask, str) and mask != "causal":
        raise ValueError(f"mask={mask!r} is not 'causal', None or an array")
    if (queries.shape[0], queries.shape[3]) != (view.batch, view.k_codec.head_dim):
        raise ValueError(f"queries have shape {queries.shape}, but the cache holds keys of shape {keys.shape}")
    asked = mask.window if isinstance(mask, Causal) else None
    window = min((w for w in (asked, view.window) if w is not None), default=None)
    array = None if mask is None or isinstance(mask, str) else _four_axes(mask, queries, keys.shape[2])
    q = query(view.k_codec, queries)
    logits = None if sinks is None else sinks.astype(mx.float32)
    of = partial(_part, q, queries, scale=scale, softcap=softcap)
    if kept is None:
        out, _ = of(view, window, array, logits)
    else:  # first tokens, which no window hides, and the others are parts of one softmax
        n = keys.kept_len
        arrays = (None, None) if array is None else (array[..., :n], array[..., n:])
        out = _joined(of(kept, None, arrays[0], None), of(view, window, arrays[1], logits))
    return output(view.v_codec, out).astype(queries.dtype)


def _part(q, queries, view: KVView, window, array, logits, *, scale, softcap) -> tuple[mx.array, mx.array]:
    """``(out, lse)`` of the keys of a view; ``q``: queries in the space of its keys."""
    kind = None if array is None else "bool" if array.dtype == mx.bool_ else "additive"
    batch, q_heads, q_len, head_dim = queries.shape
    spec = AttentionSpec(
        view.k_codec.format, view.v_codec.format, head_dim, view.v_codec.head_dim, batch, q_heads, view.kv_heads, q_len,
        view.kv_len, DTYPES[queries.dtype], "mps", scale=scale, causal=array is None,
        window=window if array is None else None, mask=kind, softcap=softcap, sinks=logits is not None, ring=view.ring,
        starts=view.starts is not None, unquantised=view.unquantised,
    )  # fmt: skip
    if reasons := why_not(spec):
        raise Unsupported(f"gyrokv.mlx cannot run {spec}: {'; '.join(reasons)}")
    return launches.attend(machine(), q, view, spec, array, None, logits)


def _joined(a: tuple[mx.array, mx.array], b: tuple[mx.array, mx.array]) -> mx.array:
    """The output of two parts ``(out, lse)`` of a softmax; zeros where both are empty."""
    top = mx.maximum(mx.maximum(a[1], b[1]), -1e30)
    weights = [mx.exp(lse - top)[..., None] for _, lse in (a, b)]
    total = weights[0] + weights[1]
    return (a[0] * weights[0] + b[0] * weights[1]) / mx.where(total > 0, total, 1.0)


def _four_axes(mask: mx.array, queries: mx.array, kv_len: int) -> mx.array:
    full = mask.reshape((1,) * (4 - mask.ndim) + mask.shape) if mask.ndim < 4 else mask
    wanted = (*queries.shape[:3], kv_len)
    if full.ndim != 4 or any(have not in (1, want) for have, want in zip(full.shape, wanted)):
        raise ValueError(f"mask has shape {mask.shape}; it must broadcast to [B, Hq, Tq, keys held] = {list(wanted)}")
    if full.shape[3] != kv_len:
        full = mx.broadcast_to(full, (*full.shape[:3], kv_len))
    return full


def _through(original):
    """mlx-lm's attention, with handles taken care of."""

    @wraps(original)
    def scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks=None, **options):
        if isinstance(keys, Handle):
            return attend(queries, keys, values, scale=scale, mask=mask, sinks=sinks, **options)
        return original(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks, **options)

    scaled_dot_product_attention.gyrokv = original
    return scaled_dot_product_attention


def install() -> None:
    """Make mlx-lm's models hand handles to :func:`attend`: the function is replaced in ``mlx_lm.models.base`` and in the
    models that have imported it. May be called again, for models that were loaded since."""
    current = getattr(base, _NAME)
    original = getattr(current, "gyrokv", current)
    ours = current if hasattr(current, "gyrokv") else _through(original)
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.models.") and getattr(module, _NAME, None) is original:
            setattr(module, _NAME, ours)


def uninstall() -> None:
    """Undo :func:`install`."""
    current = getattr(base, _NAME)
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.models.") and getattr(module, _NAME, None) is current and hasattr(current, "gyrokv"):
            setattr(module, _NAME, current.gyrokv)
