"""``CacheConfig``: which formats each layer uses, in one string syntax for code and for the command line.

    k=q8_0,v=turbo4                          K and V of every layer
    q8_0/turbo4          turbo4              short for k=q8_0,v=turbo4 and for k=turbo4,v=turbo4
    k=turbo3,v=turbo3,recent=64,sinks=4      the 64 last and the 4 first tokens are also kept dense
    k=q4_0,v=q4_0,k_rotation=hadamard        another rotation than the format's own (none, hadamard)
    turbo3; first2: q8_0; last1: v=bf16      later parts override earlier ones on the layers that they select

A sliding layer drops its first tokens, so ``sinks`` does nothing there.

Selectors: ``firstN``, ``lastN`` (attention layers that own a cache, in order), ``layersA-B`` or ``layersA`` (counted
from 0), ``sliding``, ``full``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from torch import Tensor

from .formats import get_format
from .quant import Codec

_SELECTOR = re.compile(r"(first|last|layers)(\d+)(?:-(\d+))?|sliding|full")
_ROTATIONS = ("none", "hadamard")


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one attention layer: ``head_dim_v`` defaults to ``head_dim``; ``window``: sliding window in tokens.

    ``k_rotation``, ``v_rotation``: orthogonal ``[D, D]`` or ``[Hkv, D, D]`` in place of the formats' rotations.
    ``k_scale``, ``v_scale``: static scales, a number or ``[Hkv]`` (see :class:`Codec`; fp8 saturates at 448 of them).
    """

    kv_heads: int
    head_dim: int
    head_dim_v: int | None = None
    window: int | None = None
    k_rotation: Tensor | None = None
    v_rotation: Tensor | None = None
    k_scale: float | Tensor = 1.0
    v_scale: float | Tensor = 1.0


@dataclass(frozen=True)
class LayerPolicy:
    """What one layer's cache stores: formats of K and V, dense first (``sinks``) and last (``recent``) tokens, and
    rotations that replace the formats' own (``none``, ``hadamard``, ``""`` for the format's)."""

    k: str = "bf16"
    v: str = "bf16"
    sinks: int = 0
    recent: int = 0
    k_rotation: str = ""
    v_rotation: str = ""

    def __post_init__(self) -> None:
        for name in ("k", "v"):
            get_format(getattr(self, name))
        for name in ("sinks", "recent"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name}={value} must be at least 0")
        for name in ("k_rotation", "v_rotation"):
            value = getattr(self, name)
            if value and value not in _ROTATIONS:
                raise ValueError(f"{name}={value!r} is not one of {_ROTATIONS}; matrices go to LayerCache's codecs")

    def codecs(self, shape: LayerShape) -> tuple[Codec, Codec]:
        """Codecs of K and V for one layer; a matrix in ``shape`` replaces a rotation named here."""
        k = Codec(
            self.k,
            shape.head_dim,
            kv_heads=shape.kv_heads,
            rotation=self.k_rotation or None if shape.k_rotation is None else shape.k_rotation,
            scale=shape.k_scale,
            side="k",
        )
        v = Codec(
            self.v,
            shape.head_dim_v or shape.head_dim,
            kv_heads=shape.kv_heads,
            rotation=self.v_rotation or None if shape.v_rotation is None else shape.v_rotation,
            scale=shape.v_scale,
            side="v",
        )
        return k, v

    def __str__(self) -> str:
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name in "kv" or getattr(self, f.name))


@dataclass(frozen=True)
class CacheConfig:
    """A default :class:`LayerPolicy` and overrides ``(selector, settings)``, applied in order. See the module."""

    default: LayerPolicy = field(default_factory=LayerPolicy)
    overrides: tuple[tuple[str, tuple[tuple[str, str | int], ...]], ...] = ()

    @classmethod
    def parse(cls, text: str | CacheConfig) -> CacheConfig:
        """Read the string syntax. Raises ValueError (FormatError for a format) quoting the part that is wrong."""
        if isinstance(text, CacheConfig):
            return text
        default, overrides = None, []
        for part in (p.strip() for p in text.split(";")):
            selector, colon, settings = (s.strip() for s in part.rpartition(":"))
            if not colon:
                if default is not None:
                    raise ValueError(f"cache config {text!r}: {part!r} is a second default; prefix it with a selector")
                default = LayerPolicy(**_settings(settings, text))
            else:
                match = _SELECTOR.fullmatch(selector)
                if not match or (match[3] and match[1] != "layers"):
                    raise ValueError(
                        f"cache config {text!r}: {selector!r} selects no layers; use firstN, lastN, layersA-B, "
                        "sliding or full"
                    )
                values = _settings(settings, text)
                LayerPolicy(**values)
                overrides.append((selector, tuple(values.items())))
        if default is None:
            raise ValueError(f"cache config {text!r} has no default for all layers, such as 'k=q8_0,v=turbo4'")
        return cls(default, tuple(overrides))

    def layer(self, index: int, layers: int, sliding: bool = False) -> LayerPolicy:
        """The policy of attention layer ``index`` of ``layers``; ``sliding``: it has a sliding window."""
        policy = self.default
        for selector, values in self.overrides:
            if _selects(selector, index, layers, sliding):
                policy = replace(policy, **dict(values))
        return policy

    def __str__(self) -> str:
        parts = [str(self.default)]
        parts += [f"{s}: " + ",".join(f"{name}={value}" for name, value in values) for s, values in self.overrides]
        return "; ".join(parts)


def _settings(text: str, whole: str) -> Mapping[str, str | int]:
    """``k=q8_0,v=turbo4,recent=64`` or the short forms ``q8_0`` and ``q8_0/turbo4`` to a dict."""
    values: dict[str, str | int] = {}
    kinds = {f.name: type(f.default) for f in fields(LayerPolicy)}
    for item in (i.strip() for i in text.split(",")):
        name, equals, value = (s.strip() for s in item.partition("="))
        if not equals:
            k, slash, v = (s.strip() for s in name.partition("/"))
            pairs = [("k", k), ("v", v if slash else k)]
        else:
            pairs = [(name, value)]
        for key, raw in pairs:
            if key not in kinds:
                raise ValueError(f"cache config {whole!r}: unknown setting {key!r}; settings are {', '.join(kinds)}")
            if key in values:
                raise ValueError(f"cache config {whole!r}: {key!r} is set twice")
            if kinds[key] is int and not raw.isdecimal():
                raise ValueError(f"cache config {whole!r}: {key}={raw!r} must be a whole number of tokens")
            if key in "kv":
                get_format(raw)
            values[key] = int(raw) if kinds[key] is int else raw
    return values


def _selects(selector: str, index: int, layers: int, sliding: bool) -> bool:
    if selector in ("sliding", "full"):
        return sliding == (selector == "sliding")
    kind, low, high = _SELECTOR.fullmatch(selector).groups()
    if kind == "layers":
        return int(low) <= index <= int(high or low)
    return index < int(low) if kind == "first" else index >= layers - int(low)
