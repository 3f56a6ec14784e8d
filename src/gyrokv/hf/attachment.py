"""``attach``: a model uses a packed cache without any other change to the code around it."""

from __future__ import annotations

import inspect
import warnings
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import CacheConfig
from ..errors import FallbackError, Unsupported
from .attention import IMPLEMENTATION
from .handles import LayerLog
from .packed import PackedCache
from .static import DEFAULT, StaticPackedCache

_SLOT = "_gyrokv_attachment"
_PREPARE = "_prepare_cache_for_generation"


class Attachment:
    """What :func:`attach` did to a model; :meth:`detach` undoes it, as does leaving a ``with`` block.

    ``cache``: the packed cache used last, or None. ``uncached``: forward passes that used none, by reason.
    """

    def __init__(self, model: PreTrainedModel, config: CacheConfig, strict: bool, static: int) -> None:
        self.model, self.config, self.strict, self.static = model, config, strict, static
        self.cache: PackedCache | StaticPackedCache | None = None
        self.uncached: dict[str, int] = {}
        self._logs: dict[int, LayerLog] = {}
        self._position = _cache_argument(model)
        self._implementations = _implementations(model)
        self._prepare_before = vars(model).get(_PREPARE)
        self._prepare_original = getattr(model, _PREPARE, None)
        self._hook = None
        self._attached = False

    def _attach(self) -> None:
        self._attached = True
        _set_implementation(self.model)
        if self._prepare_original is not None:
            setattr(self.model, _PREPARE, self._prepare_for_generation)
        self._hook = self.model.base_model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        setattr(self.model, _SLOT, self)

    def detach(self) -> None:
        """Restore the model as it was before :func:`attach`. Calling it again does nothing."""
        if not self._attached:
            return
        self._attached = False
        if self._hook is not None:
            self._hook.remove()
        vars(self.model).pop(_PREPARE, None)
        if self._prepare_before is not None:
            setattr(self.model, _PREPARE, self._prepare_before)
        for config, implementation in self._implementations:
            config._attn_implementation_internal = implementation
        vars(self.model).pop(_SLOT, None)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exc) -> None:
        self.detach()

    @property
    def fallbacks(self) -> int:
        """How often an operation got dense keys or values since :func:`attach`, in all caches made by it."""
        return sum(log.fallbacks.total() for log in self._logs.values())

    @property
    def fallback_ops(self) -> dict[int, dict[str, int]]:
        """:attr:`fallbacks` by layer and by the operation's name; layers without any are left out."""
        return {i: dict(log.fallbacks) for i, log in sorted(self._logs.items()) if log.fallbacks}

    def report(self) -> str:
        """The report of the last cache, with counts since :func:`attach`, and the forward passes that used no cache."""
        lines = [self.cache.report() if self.cache is not None else f"cache: {self.config}\n(not used yet)"]
        lines += [f"without a packed cache: {n} forward passes, because {reason}" for reason, n in self.uncached.items()]
        return "\n".join(lines)

    def _new_cache(self, static: int = 0) -> PackedCache | StaticPackedCache:
        self.cache = None  # so that the last one can be freed before the next grows
        if static:
            self.cache = StaticPackedCache(self.model.config, self.config, static)
            return self.cache
        self.cache = PackedCache(self.model.config, self.config, strict=self.strict, logs=self._logs)
        return self.cache

    def _prepare_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs):
        """In place of the model's method: put a packed cache where it would make its own."""
        ours = model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False
        if ours:
            asked = generation_config.cache_implementation
            if asked not in (None, "dynamic", "dynamic_full"):
                warnings.warn(
                    f"cache_implementation={asked!r} is not used: gyrokv.hf.attach provides the cache", stacklevel=2
                )
            generation_config.cache_implementation = None  # generate's own copy
            new = model_kwargs["past_key_values"] = self._new_cache(self.static)
            if generation_config.is_assistant:
                new.activate_past_recording()
        result = self._prepare_original(generation_config, model_kwargs, *args, **kwargs)
        if ours:
            new._is_user_defined = False  # generate owns it: it need not be left as if the last step had not run
        return result

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict):
        """In front of the base model: give it a packed cache when it has none."""
        by_position = len(args) > self._position
        given = args[self._position] if by_position else kwargs.get("past_key_values")
        if isinstance(given, (PackedCache, StaticPackedCache)):
            if not torch.compiler.is_compiling():
                self.cache = given
            return None
        if given is not None:
            return self._without(f"past_key_values is a {type(given).__name__}")
        if module.training:
            return self._without("the model is in training mode", expected=True)
        if kwargs.get("use_cache") is False:  # generate would take a cache in the output for its own
            return self._without("use_cache=False was asked for")
        if torch.is_grad_enabled():
            return self._without("gradients are enabled (use torch.no_grad() or torch.inference_mode())")
        _refuse_packed_sequences(kwargs)
        if by_position:
            return (*args[: self._position], self._new_cache(), *args[self._position + 1 :]), kwargs
        return args, {**kwargs, "past_key_values": self._new_cache()}

    def _without(self, reason: str, expected: bool = False) -> None:
        """Note a forward pass that keeps its keys and values dense."""
        if self.strict and not expected:
            raise FallbackError(f"a forward pass would not use the packed cache (strict=True): {reason}")
        if reason not in self.uncached and not expected:
            warnings.warn(f"a forward pass does not use the packed cache: {reason}", stacklevel=2)
        self.uncached[reason] = self.uncached.get(reason, 0) + 1


def attach(
    model: PreTrainedModel, config: CacheConfig | str = DEFAULT, *, strict: bool = False, static: int = 0
) -> Attachment:
    """Make ``model.generate(...)`` and ``model(ids)`` (in eval mode, without gradients) use a packed cache.

    ``config``: what layers store, see ``gyrokv.config``. ``strict``: FallbackError instead of a count when something
    asks for dense keys or values. A forward pass without ``past_key_values`` gets a fresh cache, so that measurements
    read what is stored; one that cannot (``use_cache=False``, gradients, another cache) is warned of, and refused when
    strict. ``static``: tokens at most; ``generate`` then gets static caches and compiles its steps where transformers does
    that (on CUDA), see :class:`StaticPackedCache`. Attaching again replaces. Raises TypeError, or Unsupported when the
    model's attention or cache cannot be exchanged, FormatError and ValueError for a bad config.
    """
    config = CacheConfig.parse(config)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}; it must be a transformers model")
    PackedCache(model.config, config, strict=strict)
    if static:
        StaticPackedCache(model.config, config, static)
    detach(model)
    attachment = Attachment(model, config, strict, static)
    with ExitStack() as undo:
        undo.callback(attachment.detach)
        attachment._attach()
        undo.pop_all()
    return attachment


def detach(model: PreTrainedModel) -> None:
    """Undo :func:`attach`; does nothing to a model that is not attached."""
    attachment = vars(model).get(_SLOT)
    if attachment is not None:
        attachment.detach()


def _cache_argument(model: PreTrainedModel) -> int:
    """Where the base model's forward takes ``past_key_values`` by position. Raises Unsupported if it does not."""
    names = list(inspect.signature(type(model.base_model).forward).parameters)[1:]
    if "past_key_values" not in names:
        raise Unsupported(
            f"{type(model.base_model).__name__}.forward takes no past_key_values, so there is no cache to pack"
        )
    return names.index("past_key_values")


def _implementations(model: PreTrainedModel) -> list[tuple]:
    """(config, attention implementation) of the model and all models and configs inside it."""
    configs, todo = {}, [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while todo:
        config = todo.pop()
        if config is not None and id(config) not in configs:
            configs[id(config)] = config
            todo += [getattr(config, name, None) for name in config.sub_configs]
    return [(config, config._attn_implementation_internal) for config in configs.values()]


def _set_implementation(model: PreTrainedModel) -> None:
    """Use our attention in the text decoder only: encoders of images or sound have no cache. Raises Unsupported."""
    text = model.config.get_text_config(decoder=True)
    name = next((n for n in model.config.sub_configs if getattr(model.config, n, None) is text), None)
    model.set_attn_implementation(IMPLEMENTATION if name is None else {name: IMPLEMENTATION})
    if text._attn_implementation != IMPLEMENTATION:
        raise Unsupported(
            f"the attention of {type(model).__name__} cannot be exchanged (it does not use AttentionInterface)"
        )


def _refuse_packed_sequences(kwargs: dict) -> None:
    """With a cache transformers does not look for several sequences in one row, so they would see each other."""
    positions = kwargs.get("position_ids")
    if kwargs.get("attention_mask") is not None or not isinstance(positions, Tensor) or positions.ndim != 2:
        return
    if bool((positions.diff(dim=-1) != 1).any()):
        raise ValueError("position_ids do not rise by 1 along a row (packed sequences?), which needs a pass without a cache")
