"""``KVCache``: the layers of a model, and what a :class:`CacheConfig` decided for each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .config import CacheConfig, LayerShape
from .dispatch import append, attend
from .errors import CacheFileError
from .files import load_layers, save_layers
from .layer import LayerCache
from .view import KVView


class KVCache:
    """K and V of every layer, in the formats that ``config`` says (a :class:`CacheConfig` or its string syntax).

    ``shapes``: one :class:`LayerShape` per attention layer. ``batch``, ``dtype``, ``device``, ``capacity``, ``grow``
    as in :class:`LayerCache`. ``append(layer, k, v)`` and ``attend(q, layer)`` take a layer's index.
    """

    def __init__(
        self,
        config: CacheConfig | str,
        shapes: Sequence[LayerShape],
        *,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int = 0,
        grow: bool = True,
    ) -> None:
        self.config = CacheConfig.parse(config)
        if not shapes:
            raise ValueError("shapes is empty; a cache needs at least one LayerShape")
        self.layers = [
            new_layer(
                self.config, i, len(shapes), shape, batch=batch, dtype=dtype, device=device, capacity=capacity, grow=grow
            )
            for i, shape in enumerate(shapes)
        ]

    def append(self, layer: int, k: Tensor, v: Tensor) -> KVView:
        """Store tokens in layer ``layer``; see :func:`gyrokv.append`."""
        return append(self.layers[layer], k, v)

    def attend(self, q: Tensor, layer: int, **options) -> Tensor | tuple[Tensor, Tensor]:
        """Attend over layer ``layer``; options as in :func:`gyrokv.attend`, the window is the layer's by default."""
        options.setdefault("window", self.layers[layer].window)
        return attend(q, self.layers[layer], **options)

    @property
    def length(self) -> int:
        """Tokens seen by the first layer."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, unused slots included."""
        return sum(layer.nbytes for layer in self.layers)

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens in every layer, or in none when one of them cannot."""
        for layer in self.layers:
            layer.check_truncate(length)
        for layer in self.layers:
            layer.truncate(length)

    def select(self, index: Tensor) -> None:
        """Replace the batch by its rows ``index``."""
        for layer in self.layers:
            layer.select(index)

    def set_starts(self, starts: Tensor | None) -> None:
        """First position of each sequence (left padding)."""
        for layer in self.layers:
            layer.set_starts(starts)

    def report(self) -> str:
        """One line per layer: what is stored, in which format, and what it takes."""
        return report(self.layers, str(self.config))

    def save(self, path: str | os.PathLike) -> None:
        """Write the cache to a safetensors file; see ``files.py``."""
        save_layers(path, self.layers, {"config": str(self.config)})

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> KVCache:
        """Read a cache that :meth:`save` wrote. Raises CacheFileError for anything else."""
        layers, note = load_layers(path, device)
        if "config" not in note or not all(layers):
            raise CacheFileError(f"{path} holds layers of another kind of cache; load it with what saved it")
        cache = cls.__new__(cls)
        cache.config, cache.layers = CacheConfig.parse(note["config"]), layers
        return cache


def new_layer(config: CacheConfig, index: int, layers: int, shape: LayerShape, **options) -> LayerCache:
    """The empty cache of attention layer ``index`` of ``layers``; ``options`` go to :class:`LayerCache`."""
    policy = config.layer(index, layers, sliding=shape.window is not None)
    codecs = policy.codecs(shape)
    return LayerCache(
        *codecs, kv_heads=shape.kv_heads, window=shape.window, sinks=policy.sinks, recent=policy.recent, **options
    )


def report(layers: Iterable[LayerCache | str | None], title: str) -> str:
    """A table of ``layers`` (None: holds nothing yet; a string: what it is instead): formats, sizes, tokens and bytes,
    summed from tensors."""
    head = f"{'layer':>5}  {'kind':<14} {'heads':<9} {'k / v':<23} {'dense':<9} {'tokens':>7} {'bytes':>12}"
    lines = [f"cache: {title}", head]
    total = 0
    for i, layer in enumerate(layers):
        if not isinstance(layer, LayerCache):
            lines.append(f"{i:>5}  ({layer or 'nothing stored yet'})")
            continue
        total += layer.nbytes
        dims = sorted({layer.k_codec.head_dim, layer.v_codec.head_dim}, reverse=True)
        kind = "full" if layer.window is None else f"sliding {layer.window}"
        rotations = ["" if c.override is None else "*" for c in (layer.k_codec, layer.v_codec)]
        formats = f"{layer.k_codec.format}{rotations[0]} / {layer.v_codec.format}{rotations[1]}"
        dense = f"{layer.sinks}+{layer.recent}" if layer.sinks or layer.recent else "-"
        heads = f"{layer.kv_heads}x{'/'.join(map(str, dims))}"
        lines.append(f"{i:>5}  {kind:<14} {heads:<9} {formats:<23} {dense:<9} {layer.length:>7} {layer.nbytes:>12,}")
    lines.append(f"{'total':>5}  {total:>79,} bytes  (dense: first+last tokens kept unquantised; *: rotation replaced)")
    return "\n".join(lines)
