"""From a call to a backend: describe the problem, choose who runs it, say why not."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from . import place
from .backends import cpu, gpu, metal, reference, tiled
from .errors import CapacityError, Unsupported
from .layer import LayerCache
from .masks import BlockMap, check_mask, mask_kind
from .quant import Codec, Packed
from .spec import AttentionSpec
from .view import KVView

BACKENDS: dict[str, ModuleType] = {module.name: module for module in (cpu, gpu, metal, tiled, reference)}
AUTO = tuple(name for name in BACKENDS if name != "reference")


def reasons(backend: ModuleType, spec: AttentionSpec) -> list[str]:
    """Why ``backend`` cannot run ``spec`` here: what the machine lacks, features it does not know, its own limits."""
    limits = spec.limits.get(backend)
    if limits is None:
        unknown = [f"it does not know the feature {name}" for name in sorted(spec.uses() - backend.UNDERSTANDS)]
        limits = spec.limits[backend] = unknown + backend.why_not(spec)
    return [f"missing here: {m}" for m in backend.missing()] + limits


def explain(spec: AttentionSpec) -> str:
    """Every backend with every reason, and which one ``backend="auto"`` takes."""
    lines = [f"problem: {spec}"]
    chosen = next((name for name in AUTO if not reasons(BACKENDS[name], spec)), None)
    for name, backend in BACKENDS.items():
        why = reasons(backend, spec)
        if why:
            lines += [f"  {name}: cannot run because"] + [f"    {reason}" for reason in why]
        else:
            mark = " (chosen)" if name == chosen else "" if name in AUTO else "; never chosen, ask for it by name"
            how = f": {backend.how(spec)}" if hasattr(backend, "how") else ""
            lines.append(f"  {name}: can run{mark}{how}")
        if hint := getattr(backend, "hint", str)():
            lines.append(f"    {hint}")
    return "\n".join(lines)


def choose(spec: AttentionSpec, backend: str = "auto") -> ModuleType:
    """The backend that runs ``spec``. Raises Unsupported, with all reasons, or ValueError for an unknown name."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {['auto', *BACKENDS]}")
    for name in AUTO if backend == "auto" else (backend,):
        if not reasons(BACKENDS[name], spec):
            return BACKENDS[name]
    raise Unsupported(f"backend={backend!r} cannot run this\n{explain(spec)}")


def append(layer: LayerCache, k: Tensor, v: Tensor) -> KVView:
    """Encode and store tokens k ``[B, Hkv, T, Dk]``, v ``[B, Hkv, T, Dv]``; see :meth:`LayerCache.append`.

    Returns the view for queries of these tokens. Runs the first backend that can append to ``layer``, else torch.
    """
    for name in AUTO:
        backend = BACKENDS[name]
        if hasattr(backend, "append") and not backend.missing() and not backend.why_not_append(layer):
            return backend.append(layer, k, v)
    return layer.append(k, v)


def append_at(
    stores: tuple[Packed, Packed],
    codecs: tuple[Codec, Codec],
    values: tuple[Tensor, Tensor],
    lengths: Tensor,
    pages: Tensor | None = None,
    counts: Tensor | None = None,
) -> None:
    """:func:`gyrokv.place.append_at`, by the first backend that does it in one launch."""
    able = [BACKENDS[name] for name in AUTO if hasattr(BACKENDS[name], "append_at")] if counts is None else []
    if any(not backend.missing() and backend.append_at(stores, codecs, values, lengths, pages) for backend in able):
        return
    place.append_at(stores, codecs, values, lengths, pages, counts)


def attend(
    q: Tensor,
    kv: LayerCache | KVView,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    alibi: float = 0.0,
    sinks: Tensor | None = None,
    block_map: BlockMap | None = None,
    fast: bool = False,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q ``[B, Hq, Tq, Dk]`` over a cached layer; q are the last Tq positions that it holds.

    Any K format with any V format. ``causal``: bottom right. ``window``: positions seen back, itself included; it
    may not exceed the layer's own (None with ``causal=False`` and a mask: the mask alone says what is seen). ``scale``:
    default 1/sqrt(Dk). ``softcap``: c * tanh(s / c), 0 for none. ``mask``: bool (True = attend) or additive,
    broadcastable to ``[B, Hq, Tq, Tkv]``, rank 2 = ``[Tq, Tkv]``, where Tkv counts the keys held, oldest first.
    ``alibi``: ALiBi's max_bias, multiplies an additive mask by each head's slope.
    ``sinks [Hq]``: learned sink logits. ``block_map``: see :class:`gyrokv.masks.BlockMap`. ``fast``: q, the weights
    and a format's levels may be rounded to 8 bits, a relative error of up to 3e-2. ``backend``: a name, or ``"auto"``.
    Returns out ``[B, Hq, Tq, Dv]`` in q's dtype, and with ``return_lse`` the log-sum-exp ``[B, Hq, Tq]`` (float32,
    natural). Without keys out is 0. Raises ValueError (a tensor that requires grad too) and TypeError naming the argument,
    CapacityError when a ring has dropped what q looks back on, Unsupported with every backend's reasons.
    """
    view = kv.view() if isinstance(kv, LayerCache) else kv
    view.check_current()
    if torch.is_grad_enabled():
        check_gradients(q=q)
        for segment in view.segments:
            check_gradients(k=segment.k.words, v=segment.v.words)
    spec = describe(
        q, view, causal=causal, window=window, scale=scale, softcap=softcap, mask=mask, alibi=alibi, sinks=sinks,
        block_map=block_map, fast=fast,
    )  # fmt: skip
    out, lse = run(choose(spec, backend), q, view, spec, mask=mask, sinks=sinks, block_map=block_map)
    return (out, lse) if return_lse else out


def run(
    runner: ModuleType,
    q: Tensor,
    view: KVView,
    spec: AttentionSpec,
    *,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    block_map: BlockMap | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`attend` does once ``spec`` is described and ``runner`` is chosen for it: (out, lse)."""
    full = None
    if mask is not None:
        full = check_mask(mask, (spec.batch, spec.q_heads, spec.q_len, spec.kv_len), q.device)
    if block_map is not None:
        if mask.shape[-2:] != (spec.q_len, spec.kv_len):
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}; with a block_map its last axes must be "
                f"[q_len, kv_len] = {[spec.q_len, spec.kv_len]}"
            )
        block_map.check(mask, runner.tile(spec))
    if hasattr(runner, "attend_heads"):
        return runner.attend_heads(q, view, spec, full, block_map, sinks)
    out, lse = runner.attend(view.k_codec.query(q), view, spec, full, block_map, sinks)
    return view.v_codec.output(out).to(q.dtype), lse


def attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attend` over plain tensors k ``[B, Hkv, Tkv, Dk]``, v ``[B, Hkv, Tkv, Dv]`` instead of a cache."""
    return attend(q, KVView.of(k, v), **options)


def describe(
    q: Tensor, view: KVView, *, causal=False, window=None, scale=None, softcap=0.0, mask=None, alibi=0.0, sinks=None,
    block_map=None, fast=False,
) -> AttentionSpec:  # fmt: skip
    """The :class:`AttentionSpec` of a call; validates the tensors against each other (arguments as in :func:`attend`)."""
    if q.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be [B, Hq, Tq, D]")
    batch, q_heads, q_len, head_dim = q.shape
    if head_dim != view.k_codec.head_dim:
        raise ValueError(f"q has head_dim={head_dim} but the cache's keys have head_dim={view.k_codec.head_dim}")
    if batch != view.batch:
        raise ValueError(f"q has batch={batch} but the cache holds batch={view.batch}")
    if not q.is_contiguous() and q.numel() and q.stride(-1) != 1:
        raise ValueError(f"q has stride {q.stride(-1)} in its last axis, not 1; call .contiguous() on it")
    device, cache_device = q.device, view.device
    if cache_device is not None and cache_device != device:
        raise ValueError(f"q is on {device} but the cache is on {cache_device}")
    if sinks is not None:
        if tuple(sinks.shape) != (q_heads,) or not sinks.is_floating_point():
            raise ValueError(f"sinks has shape {tuple(sinks.shape)}, {sinks.dtype}; it must be floating [q_heads={q_heads}]")
        if sinks.device != device:
            raise ValueError(f"sinks is on {sinks.device} but q is on {device}")
    ring, paged, unquantised = view.layout
    spec = _spec(  # by position, in the order of its fields: to look it up by names takes twice as long
        view.k_codec.format, view.v_codec.format, head_dim, view.v_codec.head_dim, batch, q_heads, view.kv_heads, q_len,
        view.kv_len, q.dtype, device.type, scale, causal, window, softcap, alibi, None if mask is None else mask_kind(mask),
        block_map is not None, sinks is not None, view.starts is not None, ring, unquantised, paged,
        view.lengths is not None, fast,
    )  # fmt: skip
    _check_history(spec, view)
    return spec


_spec = lru_cache(maxsize=256)(AttentionSpec)  # all layers of a step have the same problem


def check_gradients(**tensors: Tensor) -> None:
    """Raise ValueError where autograd expects a gradient: kernels have none, and silence would look like zeros."""
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if x.requires_grad:
            raise ValueError(f"{name} requires grad, but attention over a cache has no gradient; use torch.no_grad()")


def _check_history(spec: AttentionSpec, view: KVView) -> None:
    """Raise unless the view still holds every key that its queries may look back on."""
    if view.window is None:
        return
    if spec.mask is not None and not spec.causal and spec.window is None:
        return  # the mask alone says which of the keys held are seen
    if spec.window is None or spec.window > view.window:
        raise ValueError(f"window={spec.window}, but this layer keeps a sliding window of {view.window}")
    if view.lengths is not None:
        held, looks_back = max((s.keep or view.length for s in view.segments), default=0), spec.window + spec.q_len - 1
        if held < min(looks_back, view.length):
            raise CapacityError(
                f"q has {spec.q_len} tokens that look back on {looks_back} positions with window={spec.window}, but the "
                f"ring holds {held}; attend with the view that append returned for these tokens"
            )
        return
    needed = max(0, view.length - spec.q_len - spec.window + 1)
    if view.first > needed:
        raise CapacityError(
            f"q has {spec.q_len} tokens that look back to position {needed}, but the ring holds {view.first} to "
            f"{view.length - 1}; attend with the view that append returned for these tokens"
        )
