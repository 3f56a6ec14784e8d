"""Quantised KV caches for mlx-lm's models, on Apple GPUs.

    prompt_cache = gyrokv.mlx.cache(model, "k=q8_0,v=turbo4")    # mlx_lm.generate(..., prompt_cache=prompt_cache)

K and V formats may differ, sliding layers keep rings, first and recent tokens may stay dense (``sinks=4,recent=64``),
learned sinks are honoured. Caches are trimmed, copied, batched (``mlx_lm.batch_generate(..., prompt_caches=[...])``) and
saved by mlx-lm's own functions; :func:`load_prompt_cache` reads them. Executed on a CPU executor for MSL, not yet timed on
Apple GPUs.
"""

from . import requirements as _requirements

_requirements.check_installed()

from .attention import attend, install, uninstall  # noqa: E402 (what it needs is checked first)
from .batch import BatchPackedKVCache  # noqa: E402
from .packed import Handle, PackedKVCache  # noqa: E402
from .prompt import cache, load_prompt_cache, save_prompt_cache  # noqa: E402

__all__ = [
    "BatchPackedKVCache", "Handle", "PackedKVCache", "attend", "cache", "install", "load_prompt_cache",
    "save_prompt_cache", "uninstall",
]  # fmt: skip
