"""``PagedCache``: K and V of many sequences in pages of one pool per layer, for servers that batch continuously.

    cache = PagedCache("k=q8_0,v=turbo4", shapes, pages=4096, page_size=64)
    a = cache.add()
    batch = cache.extend([a, b], [1, 17])          # room for new tokens, in all layers
    view = batch.append(layer, k, v)               # k [B, Hkv, 17, D], short sequences at the right
    out = gyrokv.attend(q, view)
    c = cache.fork(a)                              # shares all pages of a until either is extended

One table of pages serves all layers. A page that several sequences share is copied when one of them writes to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import CacheConfig, LayerShape
from .dispatch import append_at
from .errors import CapacityError
from .place import NOBODY
from .quant import Codec, Packed, check_finite
from .spec import check_head_dims, check_positive
from .view import KVView, Segment
from .watch import Watch

PAGE_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class _Layer:
    """The pools of a layer: rows ``[pages + 1, Hkv, page_size, *]``; page 0 belongs to nobody."""

    k_codec: Codec
    v_codec: Codec
    k: Packed
    v: Packed
    shape: LayerShape


class Batch:
    """Sequences that were extended together: where their new tokens go, and what their queries see.

    ``pages`` int32 ``[B, max_pages]``, ``before`` and ``lengths`` int64 ``[B]`` on the device; ``counts``: new tokens of
    each. Valid until one of the sequences is extended, truncated or removed.
    """

    def __init__(
        self, cache: PagedCache, pages: Tensor, before: Tensor, lengths: Tensor, counts: Tensor, tokens: int
    ) -> None:
        self._cache, self.pages, self.before, self.lengths, self.counts = cache, pages, before, lengths, counts
        self.tokens = tokens

    def append(self, layer: int, k: Tensor, v: Tensor) -> KVView:
        """Encode and store k ``[B, Hkv, T, Dk]``, v ``[B, Hkv, T, Dv]``, T the largest count; sequences with fewer new
        tokens have them at the right. Returns the view for queries of these tokens.

        Raises ValueError or TypeError (shapes, devices, NaN, inf) before anything is written; on an accelerator NaN
        and inf are raised by a later call, or by :meth:`PagedCache.check_values`.
        """
        here = self._cache.layers[layer]
        for name, x, codec in (("k", k, here.k_codec), ("v", v, here.v_codec)):
            wanted = (len(self.pages), here.shape.kv_heads, self.tokens, codec.head_dim)
            if tuple(x.shape) != wanted:
                raise ValueError(f"{name} has shape {tuple(x.shape)}; this batch takes {list(wanted)} in layer {layer}")
            if x.device != self.pages.device:
                raise ValueError(f"{name} is on {x.device} but the cache is on {self.pages.device}")
            if not x.is_floating_point():
                raise TypeError(f"{name} has dtype {x.dtype}; it must be floating point")
            if self._cache.check and self._cache.watch is None:
                check_finite(x, name)
        if self._cache.check and self._cache.watch is not None:
            self._cache.watch.look(k, v)
        codecs = here.k_codec, here.v_codec
        append_at((here.k, here.v), codecs, (k, v), self.before, self.pages, self.counts)
        return self.view(layer)

    def view(self, layer: int) -> KVView:
        """What the sequences hold in ``layer``."""
        here = self._cache.layers[layer]
        bound = self.pages.shape[1] * self._cache.page_size
        segment = Segment(here.k, here.v, here.k_codec.format, here.v_codec.format, 0, 0, bound, pages=self.pages)
        return KVView(
            (segment,), here.k_codec, here.v_codec, len(self.pages), here.shape.kv_heads, first=0, length=bound,
            window=here.shape.window, lengths=self.lengths,
        )  # fmt: skip


class PagedCache:
    """Sequences of tokens in pages of ``page_size`` slots. ``pages``: how many each layer's pool has.

    ``config``: a :class:`CacheConfig` or its string; dense sinks and recent tokens are refused. ``shapes``: one
    :class:`LayerShape` per layer; a sliding layer keeps all of its pages. ``check=False`` skips the test for NaN and inf.
    """

    def __init__(
        self,
        config: CacheConfig | str,
        shapes: Sequence[LayerShape],
        *,
        pages: int,
        page_size: int = 64,
        device: torch.device | str = "cpu",
        check: bool = True,
    ) -> None:
        self.config = CacheConfig.parse(config)
        if not shapes:
            raise ValueError("shapes is empty; a cache needs at least one LayerShape")
        if page_size not in PAGE_SIZES:
            raise ValueError(f"page_size={page_size} is not one of {PAGE_SIZES}")
        check_positive(pages=pages)
        self.page_size, self.pages, self.check = page_size, pages, check
        self.device = torch.empty(0, device=device).device
        self.watch = Watch.on(self.device)
        self.layers = [self._layer(i, len(shapes), shape) for i, shape in enumerate(shapes)]
        self._free = list(range(pages, 0, -1))
        self._users = [0] * (pages + 1)
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0

    def _layer(self, index: int, count: int, shape: LayerShape) -> _Layer:
        policy = self.config.layer(index, count, sliding=shape.window is not None)
        for name in ("sinks", "recent"):
            if getattr(policy, name):
                raise ValueError(
                    f"{name}={getattr(policy, name)}: a paged cache keeps no dense rows; layer {index} asks for it"
                )
        codecs = policy.codecs(shape)
        check_positive(kv_heads=shape.kv_heads)
        pools = []
        for codec in codecs:
            check_head_dims(codec.head_dim, codec.head_dim)
            like = codec.encode(torch.empty(1, shape.kv_heads, 0, codec.head_dim, device=self.device))
            size = (self.pages + 1, shape.kv_heads, self.page_size)
            pools.append(like.map(lambda t: t.new_empty(*size, t.shape[-1])))  # noqa: B023 (called at once)
        return _Layer(*codecs, *pools, shape)

    def check_values(self) -> None:
        """Raise ValueError if NaN or inf was appended on an accelerator. Waits for it."""
        if self.watch is not None:
            self.watch.wait()

    # -- sequences

    def add(self) -> int:
        """A new sequence without tokens; returns its number."""
        self._next += 1
        self._tables[self._next], self._lengths[self._next] = [], 0
        return self._next

    def fork(self, sequence: int, length: int | None = None) -> int:
        """A new sequence that begins with the first ``length`` tokens (default: all) of another, in the same pages."""
        held = self.length(sequence)
        length = held if length is None else length
        if not 0 <= length <= held:
            raise ValueError(f"length={length} must be between 0 and the {held} tokens of sequence {sequence}")
        made = self.add()
        self._tables[made], self._lengths[made] = self._tables[sequence][: self._count(length)], length
        for page in self._tables[made]:
            self._users[page] += 1
        return made

    def remove(self, sequence: int) -> None:
        """Forget a sequence; its pages are free unless others share them."""
        self.truncate(sequence, 0)
        del self._tables[sequence], self._lengths[sequence]

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first ``length`` tokens of a sequence."""
        held = self.length(sequence)
        if not 0 <= length <= held:
            raise ValueError(f"length={length} must be between 0 and the {held} tokens of sequence {sequence}")
        table, kept = self._tables[sequence], self._count(length)
        for page in table[kept:]:
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)
        del table[kept:]
        self._lengths[sequence] = length

    def length(self, sequence: int) -> int:
        """Tokens of a sequence. Raises ValueError for a number that :meth:`add` did not return or that was removed."""
        if sequence not in self._lengths:
            raise ValueError(f"sequence={sequence} is not in this cache, which holds {len(self._lengths)} sequences")
        return self._lengths[sequence]

    def _count(self, length: int) -> int:
        return -(-length // self.page_size)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence uses."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.nbytes for layer in self.layers for pool in (layer.k, layer.v))

    # -- tokens

    def extend(
        self, sequences: Sequence[int], counts: int | Sequence[int], *, length: int = 0, into: Batch | None = None
    ) -> Batch:
        """Make room for ``counts`` more tokens (one number, or one for each) of different ``sequences``, in all layers.

        Their lengths grow at once: write the tokens with :meth:`Batch.append`, or go back with :meth:`truncate`.
        ``length``: tokens that tables have room for, at least those held. ``into``: an earlier batch of the same sizes,
        whose tensors are written to in place of new ones, so that a captured graph sees them. Raises CapacityError when
        the pool has too few free pages, ValueError for wrong arguments, and changes nothing then.
        """
        if not sequences or len(set(sequences)) != len(sequences):
            raise ValueError(f"sequences={list(sequences)} must be different, and at least one")
        counts = [counts] * len(sequences) if isinstance(counts, int) else list(counts)
        if len(counts) != len(sequences) or min(counts) < 0 or max(counts) < 1:
            raise ValueError(f"counts={counts} must be {len(sequences)} numbers >= 0 that are not all 0")
        before = [self.length(s) for s in sequences]
        after = [held + count for held, count in zip(before, counts)]
        width = max(self._count(max(max(after), length)), into.pages.shape[1] if into else 1)
        if into is not None and (len(sequences), width, max(counts)) != (*into.pages.shape, into.tokens):
            raise ValueError(
                f"into has {len(into.pages)} sequences, {into.pages.shape[1]} pages each and {into.tokens} new tokens; this "
                f"batch has {len(sequences)}, {width} and {max(counts)}"
            )
        shared = self._sharing(s for s, count in zip(sequences, counts) if count)
        needed = sum(self._count(a) - self._count(b) for a, b in zip(after, before)) + len(shared)
        if needed > len(self._free):
            raise CapacityError(
                f"{sum(counts)} more tokens need {needed} pages of {self.page_size} slots, but {len(self._free)} of "
                f"pages={self.pages} are free"
            )
        self._copy_last_pages(shared)
        for sequence, total in zip(sequences, after):
            table = self._tables[sequence]
            while len(table) < self._count(total):
                table.append(self._take())
            self._lengths[sequence] = total
        rows = [self._tables[s] + [NOBODY] * (width - len(self._tables[s])) for s in sequences]
        tensors = [torch.tensor(rows, dtype=torch.int32)] + [
            torch.tensor(x, dtype=torch.int64) for x in (before, after, counts)
        ]
        if into is None:
            return Batch(self, *(t.to(self.device) for t in tensors), max(counts))
        for mine, new in zip((into.pages, into.before, into.lengths, into.counts), tensors):
            mine.copy_(new)
        return into

    def _sharing(self, sequences: Iterable[int]) -> list[int]:
        """Those of ``sequences`` that need a copy of their last page before they write to it; the last user needs none."""
        found, users = [], {}
        for sequence in sequences:
            if self._lengths[sequence] % self.page_size:
                page = self._tables[sequence][-1]
                users[page] = users.get(page, self._users[page]) - 1
                found += [sequence] if users[page] else []
        return found

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _copy_last_pages(self, sequences: Sequence[int]) -> None:
        """Give each of ``sequences`` a last page of its own."""
        old = [self._tables[s][-1] for s in sequences]
        if not old:
            return
        new = [self._take() for _ in old]
        for sequence, page, copy in zip(sequences, old, new):
            self._users[page] -= 1
            self._tables[sequence][-1] = copy
        source, target = (torch.tensor(pages, device=self.device) for pages in (old, new))
        for layer in self.layers:
            for t in (*layer.k, *layer.v):
                t.index_copy_(0, target, t.index_select(0, source))

    def __repr__(self) -> str:
        return (
            f"PagedCache({self.config}, {len(self.layers)} layers, {len(self._lengths)} sequences, "
            f"page_size={self.page_size}, {self.free_pages} of {self.pages} pages free)"
        )
