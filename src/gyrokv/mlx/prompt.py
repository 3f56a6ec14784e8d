"""A prompt cache: one entry per layer of a model, as mlx-lm's functions take it."""

from __future__ import annotations

from typing import Any

from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from ..config import CacheConfig
from ..errors import Unsupported
from . import trial
from .attention import install
from .layer import Layer
from .requirements import check_gpu

DEFAULT = "k=q8_0,v=turbo4"


def cache(model: Any, config: CacheConfig | str = DEFAULT) -> list[Any]:
    """The ``prompt_cache`` for ``model`` with the layers that hold keys and values packed as ``config`` says.

    Layers of other kinds (recurrent states, say) keep mlx-lm's own caches. Raises GyroKVError without an Apple GPU, or
    if the kernels compute wrongly on it, Unsupported for a layer that keeps its first tokens beside a window.
    """
    check_gpu()
    trial.check()
    config = CacheConfig.parse(config)
    plain = make_prompt_cache(model)
    packed = [i for i, c in enumerate(plain) if type(c) in (KVCache, RotatingKVCache)]
    for n, i in enumerate(packed):
        window = getattr(plain[i], "max_size", None)
        if getattr(plain[i], "keep", 0):
            raise Unsupported(
                f"layer {i} keeps its first {plain[i].keep} tokens beside a window of {window}; keep must be 0"
            )
        plain[i] = Layer(config, n, len(packed), window)
    install()
    return plain
