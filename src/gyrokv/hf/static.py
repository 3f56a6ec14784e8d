"""A static packed cache: allocated once, its length on the device, for torch.compile and CUDA graphs.

``update`` and attention are the operators of ``gyrokv.ops``; what a model passes on in place of keys and values are
plain objects, which compile faster than tensor subclasses and which nothing but our attention function can read.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, StaticCache
from transformers.cache_utils import CacheLayerMixin, StaticLayer, StaticSlidingWindowLayer

from .. import ops
from ..config import CacheConfig, LayerShape
from ..errors import GyroKVError, Unsupported
from ..layer import ring_capacity
from ..spec import check_head_dims, check_positive
from .mask import CausalMask, Slots

DEFAULT = "k=q8_0,v=turbo4"


class Asked(NamedTuple):
    """What a model asks of attention, besides queries, keys and values. See ``attention.attention``."""

    mask: Tensor | None
    scale: float | None
    is_causal: bool
    window: int | None
    softcap: float
    sinks: Tensor | None


class StaticHandle:
    """Keys or values ``[B, Hkv, slots, D]`` of a static layer, without values: for attention alone."""

    def __init__(self, layer: StaticPackedLayer, stores: tuple[Tensor, ...], rows: str, head_dim: int, like: Tensor) -> None:
        self.layer, self.stores, self.rows = layer, stores, rows
        self.shape = torch.Size((like.shape[0], like.shape[1], layer.max_length, head_dim))
        self.dtype, self.device = like.dtype, like.device

    def to(self, *args, **kwargs) -> StaticHandle:
        """Itself: rows stay where they are."""
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None) -> NoReturn:
        _refuse(getattr(func, "__name__", str(func)))

    def __getitem__(self, index) -> NoReturn:
        _refuse("indexing")

    def attend(self, query: Tensor, asked: Asked) -> Tensor:
        """Attention ``[B, Hq, Tq, Dv]``. A mask of one row marks padding; of several, it alone says what is seen."""
        mask, window = asked.mask, self.layer.window or 0
        if isinstance(mask, CausalMask):
            mask = None if mask.pattern.keys is None else mask.pattern.keys[:, None, None, :]
        causal = asked.is_causal
        if mask is not None:
            if mask.ndim != 4 or mask.shape[3] != self.layer.max_length:
                raise ValueError(
                    f"attention_mask has shape {tuple(mask.shape)}; a static cache takes [B, 1, Tq, {self.layer.max_length}]"
                )
            causal = mask.shape[2] == 1
            window = window if causal else 0
        out, _ = torch.ops.gyrokv.attend(
            query, *self.stores, self.layer.lengths, None, None, mask, asked.sinks, self.rows, causal, window, asked.scale,
            asked.softcap, 0.0, False, "auto",
        )  # fmt: skip
        return out


def _refuse(operation: str) -> NoReturn:
    raise GyroKVError(
        f"operation {operation} needs dense keys or values, which a static packed cache does not give; use "
        "attn_implementation='gyrokv' (gyrokv.hf.attach), or a cache that is not static"
    )


class StaticPackedLayer(CacheLayerMixin):
    """One attention layer of at most ``max_length`` tokens; a sliding one keeps a ring.

    ``k_words`` and so on: rows ``[B, Hkv, slots, *]``, allocated when the first keys arrive. ``lengths`` int64 ``[1]``.
    """

    is_compileable = True
    is_croppable = False

    def __init__(self, config: CacheConfig, index: int, count: int, window: int | None, max_length: int) -> None:
        super().__init__()
        self.policy = config.layer(index, count, sliding=window is not None)
        for name in ("sinks", "recent"):
            if getattr(self.policy, name) and (name, window is None) != ("sinks", False):
                raise ValueError(f"{name}={getattr(self.policy, name)}: a static cache keeps no dense rows (layer {index})")
        self.window, self.max_length, self.is_sliding = window, max_length, window is not None
        slots = max_length if window is None else ring_capacity(window)
        self.slots, self.ring = min(slots, max_length), slots < max_length
        self.rows = ""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys ``[B, Hkv, T, Dk]`` and values; T may be 0."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, head_dim = key_states.shape
        shape = LayerShape(heads, head_dim, value_states.shape[3], self.window)
        stores = []
        for codec in self.policy.codecs(shape):
            check_head_dims(codec.head_dim, codec.head_dim)
            like = codec.encode(torch.empty(1, heads, 0, codec.head_dim, device=self.device))
            stores += [torch.zeros(batch, heads, self.slots, t.shape[3], dtype=t.dtype, device=self.device) for t in like]
        self.k_words, self.k_scale, self.v_words, self.v_scale = stores
        self.lengths = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.trouble = ops.new_trouble(self.device)
        rows = str(ops.Rows.of(self.policy, shape, self.max_length))  # ends with keep=0
        self._rows = rows[: rows.rindex(",") + 1]
        self.rows = f"{self._rows}{self.slots if self.ring else 0}"
        self.is_initialized = True
        if not torch.compiler.is_compiling():
            for t in self.tensors:
                torch._dynamo.mark_static_address(t)
            ops.codecs(self.rows, self.device)  # before a graph is captured

    @property
    def stores(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rows."""
        return self.k_words, self.k_scale, self.v_words, self.v_scale

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything allocated."""
        return (*self.stores, self.lengths, self.trouble) if self.is_initialized else ()

    @torch.no_grad()
    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[StaticHandle, StaticHandle]:
        """Store keys ``[B, Hkv, T, Dk]`` and values; returns handles on all that queries of these tokens may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens, stores, rows = key_states.shape[2], self.stores, self.rows
        past = self.ring and tokens + self.window - 1 > self.slots
        if past:  # a ring that cannot hold the chunk and what its queries look back on hands out a longer copy
            slots = tokens + self.window - 1
            back = self.lengths + torch.arange(1 - self.window, 0, device=self.device)
            stores = tuple(_moved(t, back, t.new_zeros(*t.shape[:2], slots, t.shape[3])) for t in stores)
            rows = f"{self._rows}{slots}"
        torch.ops.gyrokv.append(*stores, self.trouble, key_states, value_states, self.lengths, None, None, rows)
        self.lengths.add_(tokens)
        if past:
            kept = self.lengths + torch.arange(-self.slots, 0, device=self.device)
            for ring, copy in zip(self.stores, stores):
                _moved(copy, kept, ring)
        heads = (key_states.shape[3], key_states), (value_states.shape[3], value_states)
        return tuple(StaticHandle(self, stores, rows, head_dim, like) for head_dim, like in heads)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks have a column for every position."""
        return self.max_length if torch.compiler.is_compiling() else Slots(self.max_length), 0

    def get_seq_length(self) -> int | Tensor:
        """Tokens seen: a tensor on the device, or 0 before the first."""
        return self.lengths[0] if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_length

    def reset(self) -> None:
        """Forget all tokens; what is allocated stays."""
        if self.is_initialized:
            self.lengths.zero_()
            self.trouble.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the batch by its rows ``beam_idx [B]``."""
        for t in self.stores if self.is_initialized else ():
            t.copy_(t.index_select(0, beam_idx.to(t.device)))

    def offload(self) -> NoReturn:
        raise Unsupported("a static packed cache stays on its device; use a cache that is not static to offload it")

    prefetch = offload

    def check(self) -> None:
        """Raise what was wrong with tokens appended since the last call; see :func:`gyrokv.ops.check`."""
        if self.is_initialized:
            ops.check(self.trouble)


def _moved(source: Tensor, positions: Tensor, target: Tensor) -> Tensor:
    """``target`` with the rows of ``positions [n]``; both have position p in slot p modulo their slots."""
    return target.index_copy_(2, positions % target.shape[2], source.index_select(2, positions % source.shape[2]))


class StaticPackedCache(Cache):
    """A packed cache of at most ``max_length`` tokens for a model with ``config``, for compiled steps and CUDA graphs.

    ``policy``: what layers store (:class:`CacheConfig` or its string); dense ``sinks`` and ``recent`` rows are refused.
    On the CPU NaN, inf and too many tokens raise at once; on an accelerator, where looking would mean to wait, they are
    noted there and :meth:`check` raises. Cropping, offloading and other attention implementations are not supported.
    """

    def __init__(self, config: PreTrainedConfig, policy: CacheConfig | str = DEFAULT, max_length: int = 0) -> None:
        check_positive(static=max_length)
        if config.is_encoder_decoder:
            raise Unsupported(f"{type(config).__name__} is an encoder-decoder model; only decoder-only ones are supported")
        self.policy, self.max_length = CacheConfig.parse(policy), max_length
        # what needs which layer is transformers' knowledge, so its own cache is the template
        layers: list = StaticCache(config=config, max_cache_len=max_length).layers
        replaced = [i for i, layer in enumerate(layers) if type(layer) in (StaticLayer, StaticSlidingWindowLayer)]
        if not replaced:
            raise Unsupported(f"{type(config).__name__} has no attention layer with a cache that can be packed")
        for index, i in enumerate(replaced):
            window = layers[i].max_cache_len if layers[i].is_sliding else None
            layers[i] = StaticPackedLayer(self.policy, index, len(replaced), window, max_length)
        super().__init__(layers=layers)

    @property
    def packed(self) -> list[StaticPackedLayer]:
        """The layers that hold packed rows."""
        return [layer for layer in self.layers if isinstance(layer, StaticPackedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all packed rows; all are allocated at once."""
        return sum(t.numel() * t.element_size() for layer in self.packed for t in layer.tensors)

    def check(self) -> None:
        """Raise ValueError if NaN or inf, CapacityError if too many tokens were appended. Waits for the device."""
        for layer in self.packed:
            layer.check()

    def report(self) -> str:
        """What the layers store."""
        lines = [f"cache: {self.policy}, static, at most {self.max_length} tokens"]
        for i, layer in enumerate(self.layers):
            what = "not packed"
            if isinstance(layer, StaticPackedLayer):
                kind = f"sliding {layer.window}" if layer.is_sliding else "full"
                what = f"{kind}, {layer.policy}, {layer.slots} slots"
            lines.append(f"{i:>5}  {what}")
        return "\n".join([*lines, f"total  {self.nbytes:,} bytes"])
