"""Attention over rotated, quantised KV caches: any K format with any V format, from one memory format."""

from importlib import import_module

from .cache import KVCache
from .config import CacheConfig, LayerPolicy, LayerShape
from .dispatch import BACKENDS, append, attend, attention, explain
from .errors import CacheFileError, CapacityError, FallbackError, FormatError, GyroKVError, Unsupported
from .formats import FORMATS, KVFormat
from .layer import LayerCache
from .masks import BlockMap
from .paged import PagedCache
from .quant import Codec, Packed, dequantize, quantize
from .reference import merge
from .spec import AttentionSpec
from .varlen import attend_varlen, attention_varlen
from .view import KVView

__version__ = "0.1.0"

_LATER = ("evaluate", "hf", "mlx", "ops", "wire")  # submodules that are imported when first asked for


def __getattr__(name: str):
    if name in _LATER:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BACKENDS", "FORMATS", "AttentionSpec", "BlockMap", "CacheConfig", "CacheFileError", "CapacityError", "Codec",
    "FallbackError", "FormatError", "GyroKVError", "KVCache", "KVFormat", "KVView", "LayerCache", "LayerPolicy",
    "LayerShape", "Packed", "PagedCache", "Unsupported", "append", "attend", "attend_varlen", "attention",
    "attention_varlen", "dequantize", "explain", "merge", "quantize",
]  # fmt: skip
