"""The attention function that transformers calls when ``attn_implementation="gyrokv"``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..dispatch import choose, describe, run
from ..errors import GyroKVError
from ..reference import attention as dense_attention
from .handles import KVHandle
from .mask import CausalMask
from .static import Asked, StaticHandle

IMPLEMENTATION = "gyrokv"


# what models pass on to attention although it has no say in it: the mask and the positions are applied already
_WITHOUT_MEANING = frozenset(
    (
        "cache_position", "labels", "logits_to_keep", "mm_token_type_ids", "num_items_in_batch", "output_attentions",
        "output_hidden_states", "output_router_logits", "position_embeddings", "position_ids", "return_dict",
        "return_shared_kv_states", "token_type_ids", "use_cache",
    )
)  # fmt: skip


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of query ``[B, Hq, Tq, Dk]`` over the rows behind two handles, or over dense key and value
    ``[B, Hkv, Tkv, D]`` (no cache: training, encoders), which go to transformers' sdpa function.

    ``attention_mask``: a :class:`CausalMask`; or 4 axes, bool or additive, which then alone says what is seen; or None:
    causal by ``is_causal`` or the module's flag. ``s_aux [Hq]``: sink logits. Returns (out ``[B, Tq, Hq, Dv]``, None).
    Raises ValueError for attention weights, dropout over a cache, and arguments that it does not know.
    """
    _refuse(module, kwargs)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    asked = Asked(attention_mask, scaling, is_causal, sliding_window, softcap or 0.0, s_aux)
    if isinstance(key, StaticHandle) and isinstance(value, StaticHandle):
        if dropout:
            raise ValueError(f"dropout={dropout} over a packed cache is not supported; call model.eval()")
        return key.attend(query, asked).transpose(1, 2).contiguous(), None
    if isinstance(key, KVHandle) and isinstance(value, KVHandle) and key.source is value.source:
        if dropout:
            raise ValueError(f"dropout={dropout} over a packed cache is not supported; call model.eval()")
        with torch.no_grad():
            out = _packed(query, key, asked)
        if torch.is_grad_enabled() and query.requires_grad:
            out = _NoGradient.apply(query, out)
        return out.transpose(1, 2).contiguous(), None
    return _dense(module, query, key, value, dropout, asked), None


def _refuse(module: nn.Module, kwargs: dict) -> None:
    config = getattr(module, "config", None)
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise ValueError(
            "output_attentions=True: attention weights are never formed by attn_implementation='gyrokv'; use "
            "model.set_attn_implementation('eager') for them"
        )
    for name, given in kwargs.items():
        if name not in _WITHOUT_MEANING and given is not None and given is not False:
            raise ValueError(
                f"{type(module).__name__} passes {name}={_brief(given)} to attention, which attn_implementation='gyrokv' "
                "does not know; use another implementation for this model"
            )


def _brief(value) -> str:
    return f"tensor{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _packed(query: Tensor, key: KVHandle, asked: Asked) -> Tensor:
    """Attention over packed rows: ``[B, Hq, Tq, Dv]``."""
    view, mask, sinks = key.source.on(query.device), asked.mask, asked.sinks
    if isinstance(mask, CausalMask):
        pattern = mask.pattern
        covered, held = (pattern.kv_first, pattern.kv_first + pattern.kv_len), (view.first, view.length)
        if covered != held or pattern.q_len != query.shape[2] or pattern.q_first + pattern.q_len != view.length:
            raise GyroKVError(
                f"layer {key.source.log.index}: the mask is for {pattern.q_len} queries over keys {covered[0]} to "
                f"{covered[1] - 1}, but there are {query.shape[2]} queries, and the cache holds {held[0]} to {held[1] - 1}"
            )
        causal, window = True, pattern.window or view.window
        mask = None if pattern.keys is None else pattern.keys[:, None, None, :]
    elif mask is not None:
        if mask.ndim != 4:
            raise ValueError(f"attention_mask reached attention with {mask.ndim} axes; it must have 4 [B, 1, Tq, Tkv]")
        causal, window = False, None
    else:
        causal, window = asked.is_causal, (asked.window or view.window) if asked.is_causal else None
    view.check_current()
    options = dict(causal=causal, window=window, scale=asked.scale, softcap=asked.softcap)
    spec = describe(query, view, **options, mask=mask, sinks=sinks)
    backend = choose(spec)
    out, _ = run(backend, query, view, spec, mask=mask, sinks=sinks)
    key.source.log.backends[backend.name] += 1
    return out


def _dense(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, dropout: float, asked: Asked) -> Tensor:
    """Attention over dense keys and values: ``[B, Tq, Hq, Dv]``, differentiable."""
    mask, is_causal = asked.mask, asked.is_causal
    if isinstance(mask, CausalMask):
        is_causal, mask = True, None if mask.pattern.plain else mask.dense()
    elif mask is None and asked.window is not None and key.shape[2] > asked.window:
        raise ValueError(f"sliding_window={asked.window} over {key.shape[2]} dense keys needs an attention_mask")
    if not asked.softcap and asked.sinks is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=asked.scale, is_causal=is_causal
        )[0]
    if dropout:
        raise ValueError(f"dropout={dropout} with softcap or sinks is not supported; use attn_implementation='eager'")
    # without a mask, query i sees keys 0 to i, as sdpa takes it; a single query sees them all
    causal = is_causal and mask is None and query.shape[2] > 1
    out, _ = dense_attention(
        query, key, value, scale=asked.scale, causal=causal, softcap=asked.softcap, mask=mask, sinks=asked.sinks,
        q_positions=torch.arange(query.shape[2], device=query.device) if causal else None,
        dtype=torch.promote_types(query.dtype, torch.float32),
    )  # fmt: skip
    return out.to(query.dtype).transpose(1, 2).contiguous()


class _NoGradient(torch.autograd.Function):
    """Passes ``out`` on, and says so when somebody asks for its gradient (it would miss keys and values)."""

    @staticmethod
    def forward(ctx, query: Tensor, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise GyroKVError("attention over a packed cache has no gradient; train without a cache, or use torch.no_grad()")
