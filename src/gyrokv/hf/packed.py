"""A transformers cache whose attention layers hold packed keys and values."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ..cache import LayerShape, new_layer, report
from ..config import CacheConfig
from ..dispatch import append
from ..errors import CacheFileError, FallbackError, GyroKVError, Unsupported
from ..files import load_layers, save_layers
from ..layer import LayerCache
from .attention import IMPLEMENTATION
from .handles import KVHandle, LayerLog, Source
from .static import DEFAULT, StaticPackedCache


class PackedLayer(CacheLayerMixin):
    """One attention layer: a :class:`gyrokv.LayerCache` (``store``), made when the first keys and values arrive.

    ``index`` of ``count``: which of the layers that own packed rows this is, for the config's selectors. ``window``:
    sliding window in tokens, or None.
    """

    is_croppable = True
    is_compileable = False

    def __init__(self, config: CacheConfig, index: int, count: int, window: int | None, log: LayerLog) -> None:
        super().__init__()
        self.config, self.index, self.count, self.window, self.log = config, index, count, window, log
        self.is_sliding = window is not None
        self.store: LayerCache | None = None
        self._record_past = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the store for keys ``[B, Hkv, T, Dk]`` and values ``[B, Hkv, T, Dv]``; T may be 0.

        Raises ValueError or FormatError for sizes that gyrokv or the layer's formats do not support.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = LayerShape(key_states.shape[1], key_states.shape[3], value_states.shape[3], self.window)
        self.store = new_layer(
            self.config, self.index, self.count, shape, batch=key_states.shape[0], dtype=self.dtype, device=self.device,
        )  # fmt: skip
        self.store.record_past(self._record_past)
        self.is_initialized = True

    @torch.no_grad()
    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store keys ``[B, Hkv, T, Dk]`` and values; returns handles on all that queries of these tokens may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.store.device != key_states.device:
            self.store.to(key_states.device)
        _, first = self.get_mask_sizes(key_states.shape[2])
        view = append(self.store, key_states.detach(), value_states.detach()).since(first)
        source = Source(view, self.log)
        return tuple(KVHandle(source, side, x.dtype, x.device) for side, x in (("k", key_states), ("v", value_states)))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys, position of the first) that queries of the next ``query_length`` tokens get."""
        seen = self.get_seq_length()
        first = 0 if self.window is None else max(0, seen - self.window + 1)
        return seen + query_length - first, first

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return 0 if self.store is None else self.store.length

    def get_max_length(self) -> int:
        """The sliding window, or -1 for no limit."""
        return -1 if self.window is None else self.window

    @property
    def record_past(self) -> bool:
        """Whether a sliding layer keeps what :meth:`crop` may have to go back to."""
        return self._record_past

    @record_past.setter
    def record_past(self, keep: bool) -> None:
        self._record_past = keep
        if self.store is not None:
            self.store.record_past(keep)

    def activate_past_recording(self) -> None:
        """Keep all tokens of a sliding layer until the next :meth:`crop`."""
        self.record_past = True

    def cropped(self, tokens_to_remove: int) -> int:
        """The length that :meth:`crop` leaves. Raises what it would raise."""
        length, change = self.get_seq_length(), int(tokens_to_remove)  # assisted decoding counts in tensors
        length = min(length, change) if change > 0 else length + change
        if self.store is not None:
            self.store.check_truncate(length)
        return length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; a positive number is the length to keep (an older meaning).

        Raises ValueError when there are not so many, CapacityError when a sliding layer lost what it would go back to.
        """
        length = self.cropped(tokens_to_remove)
        if self.store is not None:
            self.store.truncate(length)

    def reset(self) -> None:
        """Forget everything, sizes included."""
        self.store, self.is_initialized = None, False

    def _select(self, index: Tensor) -> None:
        if self.get_seq_length():
            self.store.select(index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the batch by its rows ``beam_idx [B']``."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times."""
        if self.store is not None:
            self._select(torch.arange(self.store.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` (integers, or a bool per sequence)."""
        if self.store is not None:
            self._select(torch.arange(self.store.batch, device=indices.device)[indices])

    def offload(self) -> None:
        """Move the rows to the CPU."""
        if self.store is not None:
            self.store.to("cpu")

    def prefetch(self) -> None:
        """Move the rows back to the layer's device."""
        if self.store is not None:
            self.store.to(self.device)

    def __repr__(self) -> str:
        return f"PackedLayer({self.store or 'empty'})"


class PackedCache(Cache):
    """A cache for a model with ``config``. See :func:`cache`.

    ``layers``: one per model layer, a :class:`PackedLayer` in place of each plain dynamic one. ``policy``: what the
    layers store. ``logs``: counters by layer to go on with.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        policy: CacheConfig | str = DEFAULT,
        *,
        strict: bool = False,
        logs: dict[int, LayerLog] | None = None,
    ) -> None:
        if config.is_encoder_decoder:
            raise Unsupported(f"{type(config).__name__} is an encoder-decoder model; only decoder-only ones are supported")
        self.policy = CacheConfig.parse(policy)
        # what needs which layer is transformers' knowledge, so its own cache is the template
        layers: list = DynamicCache(config=config).layers
        replaced = [i for i, layer in enumerate(layers) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)]
        if not replaced:
            raise Unsupported(f"{type(config).__name__} has no attention layer with a cache that can be packed")
        for i, layer in enumerate(layers):
            if strict and i not in replaced and isinstance(layer, DynamicLayer):
                raise FallbackError(f"layer {i} needs a {type(layer).__name__}, which stays dense; strict=True forbids it")
        logs = {} if logs is None else logs
        for index, i in enumerate(replaced):
            window = layers[i].sliding_window if layers[i].is_sliding else None
            log = logs.setdefault(i, LayerLog(i, strict))
            layers[i] = PackedLayer(self.policy, index, len(replaced), window, log)
        super().__init__(layers=layers)

    @property
    def packed(self) -> list[PackedLayer]:
        """The layers that hold packed rows."""
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]

    @property
    def seen(self) -> int:
        """Tokens seen."""
        return self.packed[0].get_seq_length()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, unused slots and layers that stay dense included."""
        return sum(_layer_nbytes(layer) for layer in self.layers)

    @property
    def live_nbytes(self) -> int:
        """Bytes of the rows in use."""
        return sum(_layer_nbytes(layer, live=True) for layer in self.layers)

    @property
    def fallbacks(self) -> int:
        """How often an operation got dense keys or values, in all layers. Copies of a cache count together."""
        return sum(layer.log.fallbacks.total() for layer in self.packed)

    @property
    def fallback_ops(self) -> dict[int, dict[str, int]]:
        """:attr:`fallbacks` by layer and by the operation's name; layers without any are left out."""
        return {layer.log.index: dict(layer.log.fallbacks) for layer in self.packed if layer.log.fallbacks}

    @property
    def backends(self) -> dict[int, dict[str, int]]:
        """How often each backend attended over each layer."""
        return {layer.log.index: dict(layer.log.backends) for layer in self.packed if layer.log.backends}

    def report(self) -> str:
        """What each layer stores and takes, which backends read it, and which operations got dense values."""
        rows = [layer.store if isinstance(layer, PackedLayer) else _note(layer) for layer in self.layers]
        counts = [_counts("attended by", self.backends) or "attended by: nobody yet"]
        counts.append(_counts("fallbacks (operations that got dense values)", self.fallback_ops) or "fallbacks: none")
        return "\n".join([report(rows, str(self.policy)), *counts])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens in every layer, or in none when a packed one cannot."""
        for layer in self.packed:
            layer.cropped(tokens_to_remove)
        super().crop(tokens_to_remove)

    def save(self, path: str | os.PathLike) -> None:
        """Write the packed rows to a safetensors file (see ``gyrokv.files``); :meth:`load` reads it.

        Raises GyroKVError when a layer that is not packed holds something.
        """
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, PackedLayer) and _layer_nbytes(layer):
                raise GyroKVError(f"layer {i} is a {type(layer).__name__} with contents, which cannot be saved")
        save_layers(path, [layer.store for layer in self.packed], {"config": str(self.policy)})

    @classmethod
    def load(
        cls, path: str | os.PathLike, model: PreTrainedModel | PreTrainedConfig, *, strict: bool = False
    ) -> PackedCache:
        """Read a cache that :meth:`save` wrote, for ``model`` (or its config, then on the CPU until it is used).

        Raises FileNotFoundError, or CacheFileError for another file or for a model with other layers.
        """
        device = model.device if isinstance(model, PreTrainedModel) else "cpu"
        stores, note = load_layers(path, device)
        loaded = cls(config_of(model), note["config"], strict=strict)
        here, there = [layer.window for layer in loaded.packed], [store and store.window for store in stores]
        if len(here) != len(there) or any(s is not None and s.window != w for s, w in zip(stores, here)):
            raise CacheFileError(f"{path} holds layers with windows {there}, but this model's layers have {here}")
        for layer, store in zip(loaded.packed, stores):
            if store is not None:
                layer.store, layer.is_initialized = store, True
                layer.dtype, layer.device = store.dtype, store.device
        return loaded


def cache(
    model: PreTrainedModel | PreTrainedConfig, config: CacheConfig | str = DEFAULT, *, strict: bool = False, static: int = 0
) -> PackedCache | StaticPackedCache:
    """A :class:`PackedCache` to pass as ``past_key_values=`` to ``model`` (or a model with this config).

    ``config``: what layers store, see ``gyrokv.config``. Packed rows are read by ``attn_implementation="gyrokv"``
    (:func:`attach`, or when loading the model); any other gets dense copies, which :attr:`PackedCache.fallbacks`
    counts and ``strict=True`` forbids (FallbackError). ``static``: tokens at most; then a :class:`StaticPackedCache`,
    allocated once, for torch.compile and CUDA graphs, which nothing but that implementation can read. A model of another
    is warned of. Raises Unsupported for a model whose cache cannot be packed, FormatError and ValueError for a bad config.
    """
    made = (
        StaticPackedCache(config_of(model), config, static)
        if static
        else PackedCache(config_of(model), config, strict=strict)
    )
    if isinstance(model, PreTrainedModel):
        used = config_of(model).get_text_config(decoder=True)._attn_implementation
        if used != IMPLEMENTATION:
            warnings.warn(
                f"this model uses attn_implementation={used!r}, which reads a packed cache through dense copies; call "
                f"gyrokv.hf.attach(model) or model.set_attn_implementation({IMPLEMENTATION!r})",
                stacklevel=2,
            )
    return made


def config_of(model: PreTrainedModel | PreTrainedConfig) -> PreTrainedConfig:
    """The config of a model, or the config itself. Raises TypeError for anything else."""
    if isinstance(model, PreTrainedConfig):
        return model
    if isinstance(model, PreTrainedModel):
        return model.config
    raise TypeError(f"model is a {type(model).__name__}; it must be a transformers model or config")


def _note(layer) -> str:
    nbytes = _layer_nbytes(layer)
    return f"{type(layer).__name__}, not packed: {nbytes:,} bytes"


def _layer_nbytes(layer, live: bool = False) -> int:
    if isinstance(layer, PackedLayer):
        return 0 if layer.store is None else layer.store.live_nbytes if live else layer.store.nbytes
    return sum(t.numel() * t.element_size() for t in _tensors(list(vars(layer).values())))


def _tensors(values: Sequence):
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(list(value.values()))


def _counts(title: str, counts: dict[int, dict[str, int]]) -> str:
    """``title: torch 12x (layers 0-3), ...``; empty without counts."""
    layers: dict[tuple[str, int], list[int]] = {}
    for layer, names in counts.items():
        for name, count in names.items():
            layers.setdefault((name, count), []).append(layer)
    parts = [f"{name} {count}x in layer{'s' * (len(ls) > 1)} {_ranges(ls)}" for (name, count), ls in layers.items()]
    return f"{title}: " + "; ".join(parts) if parts else ""


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
