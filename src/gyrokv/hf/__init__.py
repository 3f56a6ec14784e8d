"""Quantised KV caches for transformers models.

    attachment = gyrokv.hf.attach(model, "k=q8_0,v=turbo4")    # model.generate(...) and model(ids) now use it
    cache = gyrokv.hf.cache(model, "k=q8_0,v=turbo4")          # or hold it yourself: past_key_values=cache
    gyrokv.hf.attach(model, static=4096)                       # allocated once: compiled steps, CUDA graphs

A cache's ``update`` returns handles instead of dense keys and values; the attention function that importing this
package registers under the name ``gyrokv`` reads packed rows through them. Needs transformers >= 5.17, < 6.
"""

from . import requirements as _requirements

_requirements.check(_requirements.installed())

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402 (its version is checked first)

from . import attention, mask  # noqa: E402
from .attachment import Attachment, attach, detach  # noqa: E402
from .attention import IMPLEMENTATION  # noqa: E402
from .handles import KVHandle  # noqa: E402
from .mask import CausalMask  # noqa: E402
from .packed import PackedCache, PackedLayer, cache  # noqa: E402
from .static import StaticPackedCache, StaticPackedLayer  # noqa: E402

AttentionInterface.register(IMPLEMENTATION, attention.attention)
AttentionMaskInterface.register(IMPLEMENTATION, mask.mask)

__all__ = [
    "IMPLEMENTATION", "Attachment", "CausalMask", "KVHandle", "PackedCache", "PackedLayer", "StaticPackedCache",
    "StaticPackedLayer", "attach", "cache", "detach",
]  # fmt: skip
