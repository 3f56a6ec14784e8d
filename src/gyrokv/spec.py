"""``AttentionSpec``: one attention problem without its data.

Dispatch, error messages, tests, benchmarks and the CLI all use it. Optional parts of the problem are declared with
:func:`feature`; a backend lists the features it understands, so one that it has never heard of is refused by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .formats import KVFormat, get_format

HEAD_DIMS = (32, 40, 48, 64, 72, 80, 96, 112, 128, 192, 256, 320, 512, 576)
UNEQUAL_HEAD_DIMS = ((192, 128), (320, 256), (576, 512))
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MASKS = ("bool", "additive")


def feature(default: Any) -> Any:
    """A field of :class:`AttentionSpec` that backends must list in ``UNDERSTANDS`` before they see other values."""
    return field(default=default, metadata={"feature": True})


def check_head_dims(head_dim: int, head_dim_v: int) -> None:
    """Raise ValueError unless the pair is one of the supported head sizes."""
    if head_dim == head_dim_v and head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim={head_dim} is not supported; head sizes are {HEAD_DIMS}")
    if head_dim != head_dim_v and (head_dim, head_dim_v) not in UNEQUAL_HEAD_DIMS:
        raise ValueError(
            f"head_dim={head_dim} with head_dim_v={head_dim_v} is not supported; unequal pairs are {UNEQUAL_HEAD_DIMS}"
        )


def check_positive(**sizes: int) -> None:
    """Raise ValueError naming the first size that is below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def check_heads(q_heads: int, kv_heads: int) -> None:
    """Raise ValueError unless ``q_heads`` is a multiple of ``kv_heads``."""
    check_positive(q_heads=q_heads, kv_heads=kv_heads)
    if q_heads % kv_heads:
        raise ValueError(f"q_heads={q_heads} is not a multiple of kv_heads={kv_heads}")


@dataclass(frozen=True)
class AttentionSpec:
    """Sizes, formats, dtype, device and features of one call. Raises ValueError or TypeError when they make no sense.

    ``head_dim``, ``head_dim_v``: sizes of K and V heads as the caller sees them, without padding. ``kv_len``: keys
    that the cache view holds. ``dtype``: of q and of the output. ``scale``: of the scores, default
    ``1 / sqrt(head_dim)``. ``window``: positions that a query sees back, itself included. ``alibi``: ALiBi's
    ``max_bias``, 0 for none. ``starts``: sequences of the batch begin at different positions (left padding).
    ``ring``: keys lie in a ring buffer. ``unquantised``: part of the keys (first or most recent) are kept dense.
    ``paged``: rows lie in pages. ``lengths``: sequences have lengths of their own, on the device; ``kv_len`` is a bound.
    ``fast``: q, the weights and a format's levels may be rounded to 8 bits, which costs a relative error of up to 3e-2.
    """

    k_format: KVFormat
    v_format: KVFormat
    head_dim: int
    head_dim_v: int
    batch: int = 1
    q_heads: int = 1
    kv_heads: int = 1
    q_len: int = 1
    kv_len: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    scale: float | None = None
    causal: bool = feature(False)
    window: int | None = feature(None)
    softcap: float = feature(0.0)
    alibi: float = feature(0.0)
    mask: str | None = feature(None)
    block_map: bool = feature(False)
    sinks: bool = feature(False)
    starts: bool = feature(False)
    ring: bool = feature(False)
    unquantised: bool = feature(False)
    paged: bool = feature(False)
    lengths: bool = feature(False)
    fast: bool = feature(False)

    def __post_init__(self) -> None:
        for name in ("k_format", "v_format"):
            if not isinstance(getattr(self, name), KVFormat):
                object.__setattr__(self, name, get_format(getattr(self, name)))
        check_positive(head_dim=self.head_dim, head_dim_v=self.head_dim_v, batch=self.batch, q_len=self.q_len)
        check_heads(self.q_heads, self.kv_heads)
        check_head_dims(self.head_dim, self.head_dim_v)
        self.k_format.layout(self.head_dim)
        self.v_format.layout(self.head_dim_v)
        if self.kv_len < 0:
            raise ValueError(f"kv_len={self.kv_len} must be at least 0")
        if self.dtype not in DTYPES:
            raise TypeError(f"dtype={self.dtype} is not supported; dtypes are {[str(d) for d in DTYPES]}")
        if self.scale is None:
            object.__setattr__(self, "scale", 1.0 / math.sqrt(self.head_dim))
        elif not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale} must be finite")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")
        for name in ("softcap", "alibi"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} must be finite and >= 0")
        if self.mask is not None and self.mask not in MASKS:
            raise ValueError(f"mask={self.mask!r} is not one of {MASKS}")
        if self.alibi and self.mask != "additive":
            raise ValueError(f"alibi={self.alibi} scales an additive mask, but mask={self.mask!r}")
        if self.block_map and self.mask is None:
            raise ValueError("block_map was given without the mask that it was built for")

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads

    def uses(self) -> frozenset[str]:
        """Names of the features that this problem needs."""
        return self._uses

    @cached_property
    def _uses(self) -> frozenset[str]:
        return frozenset([f.name for f in features() if getattr(self, f.name) != f.default])

    @cached_property
    def limits(self) -> dict[ModuleType, list[str]]:
        """Why backends cannot run this, as far as the spec alone says so: each backend's, once it was asked."""
        return {}

    def __str__(self) -> str:
        dims = f"d{self.head_dim}" if self.head_dim == self.head_dim_v else f"d{self.head_dim}v{self.head_dim_v}"
        text = (
            f"{self.k_format}.{self.v_format}-{dims}-b{self.batch}-q{self.q_len}-kv{self.kv_len}"
            f"-h{self.q_heads}.{self.kv_heads}"
        )
        used = self.uses()
        marks = []
        for f in features():
            if f.name in used:
                value = getattr(self, f.name)
                marks.append(f.name if value is True else f"{f.name}={value:g}" if f.name != "mask" else f"mask={value}")
        text += "".join(f"{'-' if i == 0 else '+'}{m}" for i, m in enumerate(marks))
        return f"{text}-{str(self.dtype).removeprefix('torch.')}-{self.device}"


@cache
def features() -> tuple:
    """The dataclass fields of :class:`AttentionSpec` that are features."""
    return tuple(f for f in fields(AttentionSpec) if f.metadata.get("feature"))


def alibi_slopes(q_heads: int, max_bias: float) -> Tensor:
    """Slope per query head, float64 ``[Hq]`` (Press et al. 2022, extended to head counts that are no power of two)."""
    power = 2 ** int(math.log2(q_heads))
    base, between = 2.0 ** (-max_bias / power), 2.0 ** (-max_bias / (2 * power))
    slopes = [base ** (h + 1) if h < power else between ** (2 * (h - power) + 1) for h in range(q_heads)]
    return torch.tensor(slopes, dtype=torch.float64)
