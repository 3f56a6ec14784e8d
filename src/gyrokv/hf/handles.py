"""What a packed cache hands to a model in place of keys and values: tensors that hold no values.

A handle has the shape, dtype and device of the dense tensor it stands for, so models pass it along. Our attention
function reads the packed rows behind it. Any other operation gets the decoded values, and is counted by name.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import FallbackError, GyroKVError
from ..view import KVView

_SIDES = {"k": "keys", "v": "values"}
_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh.default)


class LayerLog:
    """What happened to one layer: ``backends`` that attended, ``fallbacks`` (operations that got dense values).

    ``index``: the layer in the model. ``strict``: a fallback raises. Copies of a cache go on counting here.
    """

    def __init__(self, index: int, strict: bool) -> None:
        self.index, self.strict = index, strict
        self.backends: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()

    def __deepcopy__(self, memo: dict) -> LayerLog:
        return self

    def fall_back(self, op: str, side: str) -> None:
        """Count operation ``op`` on the dense ``side``. Raises FallbackError in strict mode."""
        if self.strict:
            raise FallbackError(
                f"layer {self.index}: operation {op} asked for the dense {_SIDES[side]} of a packed cache, which "
                "strict=True forbids. Use gyrokv.hf.attach, or load the model with attn_implementation='gyrokv'; a model "
                "that changes keys or values after the cache (such as latent attention) can only run with strict=False"
            )
        self.fallbacks[op] += 1


class Source:
    """The rows of one layer that a call of ``update`` returned; its two handles share it."""

    def __init__(self, view: KVView, log: LayerLog) -> None:
        self.view, self.log = view, log
        self._moved: dict[torch.device, KVView] = {}

    def on(self, device: torch.device) -> KVView:
        """The view, with rows on ``device``; copied there once when a model is spread over devices."""
        if self.view.device == device:
            return self.view
        if device not in self._moved:
            self._moved[device] = self.view.to(device)
        return self._moved[device]


class KVHandle(Tensor):
    """Keys (``side="k"``) or values (``"v"``) ``[B, Hkv, Tkv, D]`` of ``source``, without values of its own."""

    source: Source
    side: str

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, source: Source, side: str, dtype: torch.dtype, device: torch.device) -> KVHandle:
        view = source.view
        codec = view.k_codec if side == "k" else view.v_codec
        shape = (view.batch, view.kv_heads, view.kv_len, codec.head_dim)
        handle = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        handle.source, handle.side = source, side
        return handle

    def dense(self) -> Tensor:
        """The decoded values, in the handle's dtype and on its device."""
        return self.source.on(self.device).heads(self.side, self.dtype)

    def __repr__(self) -> str:
        return f"KVHandle({_SIDES[self.side]} of layer {self.source.log.index}, {tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _SAME:
            return cls(args[0].source, args[0].side, args[0].dtype, args[0].device)
        if func is torch.ops.aten._to_copy.default and only_moves(args[0], kwargs):
            return cls(args[0].source, args[0].side, args[0].dtype, torch.device(kwargs["device"]))
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise GyroKVError(f"{args[0]!r} stands for packed rows; operation {func} cannot write to it")

        def values(x):
            if not isinstance(x, cls):
                return x
            x.source.log.fall_back(str(func), x.side)
            return x.dense()

        return func(*tree_map(values, args), **tree_map(values, kwargs))


def only_moves(x: Tensor, kwargs: dict) -> bool:
    """True when ``aten._to_copy(x, **kwargs)`` changes the device of ``x`` and not its dtype."""
    return kwargs.get("device") is not None and kwargs.get("dtype") in (None, x.dtype)
