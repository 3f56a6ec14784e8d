"""A prompt cache, one entry per layer of a model, as mlx-lm's functions take it; and from files."""

from __future__ import annotations

from typing import Any

import mlx_lm.models.cache as theirs
from mlx_lm.models.cache import save_prompt_cache

from ..config import CacheConfig
from . import trial
from .attention import install
from .batch import BatchPackedKVCache
from .packed import PackedKVCache
from .requirements import check_gpu

__all__ = ["DEFAULT", "cache", "load_prompt_cache", "save_prompt_cache"]

DEFAULT = "k=q8_0,v=turbo4"


def cache(model: Any, config: CacheConfig | str = DEFAULT, max_kv_size: int | None = None) -> list[Any]:
    """The ``prompt_cache`` for ``model`` with the layers that hold keys and values packed as ``config`` says.

    Layers of other kinds (recurrent states, say) keep mlx-lm's own caches. ``max_kv_size``: as in mlx-lm's
    ``make_prompt_cache``, for models that do not say themselves what to keep: the last tokens and the first 4. Raises
    GyroKVError without an Apple GPU, or if the kernels compute wrongly on it.
    """
    _ready()
    config = CacheConfig.parse(config)
    plain = theirs.make_prompt_cache(model, max_kv_size)
    packed = [i for i, c in enumerate(plain) if type(c) in (theirs.KVCache, theirs.RotatingKVCache)]
    for n, i in enumerate(packed):
        keep, size = getattr(plain[i], "keep", 0), getattr(plain[i], "max_size", None)
        policy = config.layer(n, len(packed), sliding=size is not None)
        plain[i] = PackedKVCache(policy, size and size - keep, keep)
    return plain


def load_prompt_cache(file_name: str, return_metadata: bool = False) -> Any:
    """mlx-lm's function of this name, for files of packed caches too: it looks for a cache's class in its own module, so
    ours are put there. Raises GyroKVError as :func:`cache` does."""
    _ready()
    for kind in (PackedKVCache, BatchPackedKVCache):
        setattr(theirs, kind.__name__, kind)
    return theirs.load_prompt_cache(file_name, return_metadata=return_metadata)


def _ready() -> None:
    check_gpu()
    trial.check()
    install()
