"""The cache of one layer for mlx-lm's models: packed K and V in MLX arrays, and handles on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..config import CacheConfig, LayerPolicy, LayerShape
from ..errors import CapacityError
from ..formats import dense_format
from ..layer import ring_capacity
from ..quant import Codec, Packed
from ..view import KVView, Segment
from .machine import DTYPES, encode, query, saturate
from .rows import Pair, Rows, join

_STEP = 256  # rows that a growing cache adds at once, and at least what it holds


class Causal(str):
    """The mask "causal" of mlx-lm, with the sliding window that a model asked for (None: the cache's own)."""

    window: int | None

    def __new__(cls, window: int | None) -> Causal:
        made = super().__new__(cls, "causal")
        made.window = window
        return made


@dataclass(frozen=True)
class Handle:
    """What ``update_and_fetch`` returns in place of dense keys (``side="k"``) or values: a view of packed rows, and one
    of first tokens that every query sees whatever the window (None without such)."""

    view: KVView
    kept: KVView | None
    side: str
    dtype: Any

    @property
    def codec(self) -> Codec:
        return self.view.k_codec if self.side == "k" else self.view.v_codec

    @property
    def kept_len(self) -> int:
        """Keys in ``kept``."""
        return self.kept.segments[0].stop if self.kept else 0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.view.batch, self.view.kv_heads, self.kept_len + self.view.kv_len, self.codec.head_dim)


class PackedKVCache:
    """What mlx-lm's ``KVCache`` (``window=None``) or ``RotatingKVCache`` is, with packed rows as ``policy`` says.

    A query sees the last ``window`` tokens, and the first ``keep`` in any case. Every token is encoded once; with a
    window rows lie in a ring buffer, and a chunk that it cannot hold gets a longer copy. The policy's ``sinks`` first
    tokens (with a window: the ``keep`` first) and ``recent`` last ones are kept dense as well, in the dtype of the
    first keys.
    """

    def __init__(self, policy: LayerPolicy, window: int | None = None, keep: int = 0) -> None:
        self.policy, self.window, self.keep = policy, window, keep
        self._length = 0  # positions so far
        self._first = 0  # the oldest position held
        self._recent_first = 0  # the oldest position held dense among the last ones
        self._main: Rows | None = None
        self._sinks: Rows | None = None
        self._recent: Rows | None = None
        self._codecs: tuple[Codec, Codec] | None = None
        self._handles: tuple[Handle, Handle] | None = None

    # -- what models call

    @property
    def offset(self) -> int:
        """The position of the next token."""
        return self._length

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Handle, Handle]:
        """Store keys ``[B, Hkv, T, Dk]`` and values; returns handles on what queries of these tokens may see."""
        batch, kv_heads, tokens, k_dim = keys.shape
        if self._codecs is None:
            self._codecs = self.policy.codecs(LayerShape(kv_heads, k_dim, values.shape[3], self.window))
        new = tuple(encode(codec, x) for codec, x in zip(self._codecs, (keys, values)))
        first, stop, ring = self._first_after(), self._length + tokens, self._ring()
        formats = tuple(codec.format for codec in self._codecs)
        main = self._main = self._main or Rows.like(new, ring or _STEP, self._length)
        if ring is None:
            main.grow(-(-(stop - main.base) // _STEP) * _STEP)
        if long := ring is not None and stop - first > ring:
            past = join(main.span(first, self._length), new)
            segment = Segment(*past, *formats, base=first, first=first, stop=stop)
        main.put(self._length, new)
        self._put_dense(keys, values)
        self._first, self._length = max(self._first, stop - main.capacity), stop
        if not long:
            first = self._first
            segment = Segment(*main.pair, *formats, base=main.base, first=first, stop=stop)
        sinks, rest = self._with_dense(segment)
        common = dict(
            k_codec=self._codecs[0], v_codec=self._codecs[1], batch=batch, kv_heads=kv_heads, starts=self._starts()
        )
        kept = None
        if self.window is not None and sinks:
            kept = KVView(sinks, first=0, length=stop, **common)
            sinks, first = (), rest[0].first if rest else stop
        view = KVView(sinks + rest, first=first, length=stop, window=self.window, **common)
        self._handles = Handle(view, kept, "k", keys.dtype), Handle(view, kept, "v", values.dtype)
        return self._handles

    def keys_and_values(self) -> tuple[Handle, Handle]:
        """What the last ``update_and_fetch`` returned, for layers that share another one's keys."""
        return self._handles

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Causal | mx.array | None:
        """The mask for N queries that come next: a marker, because kernels see positions, or bool ``[N, keys held]``."""
        window = window_size or self.window
        if not return_array:
            return None if N == 1 and window_size is None else Causal(window)
        stop, kept = self._length + N, 0 if self.window is None else self.keep
        keys = mx.concatenate([mx.arange(min(kept, stop)), mx.arange(max(kept, self._held_after(N)), stop)])
        queries = mx.arange(self._length, stop)[:, None]
        seen = keys <= queries
        return seen if window is None else seen & ((queries - keys < window) | (keys < kept))

    # -- what mlx-lm calls

    @property
    def state(self) -> dict[str, Any]:
        """Arrays, to be evaluated, and the numbers that give them their meaning; ``from_state`` is the reverse."""
        stores = {"main": self._main, "sinks": self._sinks, "recent": self._recent}
        found = {name: [rows.base, rows.arrays] for name, rows in stores.items() if rows}
        return found | {
            "policy": str(self.policy), "window": self.window, "keep": self.keep,
            "positions": [self._length, self._first, self._recent_first],
        }  # fmt: skip

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        PackedKVCache.__init__(self, CacheConfig.parse(state["policy"]).default, state["window"], state["keep"])
        self._length, self._first, self._recent_first = state["positions"]
        for name in ("main", "sinks", "recent"):
            if name in state:
                base, arrays = state[name]
                setattr(self, f"_{name}", Rows(tuple(Packed(*pair) for pair in arrays), base))

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> PackedKVCache:
        """The cache whose ``state`` this was."""
        made = cls.__new__(cls)
        made.state = state
        return made

    def __deepcopy__(self, memo: dict) -> PackedKVCache:
        made = type(self).__new__(type(self))
        made.__dict__ |= {name: x.copy() if isinstance(x, Rows) else x for name, x in self.__dict__.items()}
        made._handles = None  # they are on the rows of this cache
        return made

    def __copy__(self) -> PackedKVCache:
        return self.__deepcopy__({})

    @staticmethod
    def merge(caches: Sequence[PackedKVCache]) -> PackedKVCache:
        """One cache for the sequences of several; see ``batch.py``."""
        from .batch import BatchPackedKVCache  # which is made of this class

        return BatchPackedKVCache.merge(caches)

    def size(self) -> int:
        """Tokens held."""
        return self._length - self._first

    def empty(self) -> bool:
        return self._length == 0

    @property
    def nbytes(self) -> int:
        stores = (rows for rows in (self._main, self._sinks, self._recent) if rows)
        return sum(t.nbytes for rows in stores for packed in rows.pair for t in packed)

    def is_trimmable(self) -> bool:
        return self.window is None or self._first == 0

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens; returns how many there were. Raises CapacityError when a ring has lost what the
        window before them needs."""
        n = min(self._length, n)
        if self.window is not None and self._first > max(0, self._length - n - self.window + 1):
            raise CapacityError(f"n={n}: the ring holds positions {self._first} to {self._length - 1} only")
        self._length -= n
        return n

    # -- storage

    def _ring(self) -> int | None:
        """Rows of the ring; None where rows are added as they come."""
        return None if self.window is None else ring_capacity(self.window)

    def _starts(self) -> mx.array | None:
        """The first position of each sequence."""
        return None

    def _first_after(self) -> int:
        """The first position that the next queries may look back on."""
        return 0 if self.window is None else max(self._first, self._length - self.window + 1)

    def _held_after(self, tokens: int) -> int:
        """The first position in the view after the next ``tokens``."""
        first, stop, ring = self._first_after(), self._length + tokens, self._ring()
        if ring is None:
            return self._first
        return first if stop - first > ring else max(self._first, stop - ring)

    def _load(self, rows: Pair, first: int, stop: int) -> None:
        """Hold rows of positions ``first`` to ``stop - 1`` and nothing else; of a ring its last ones."""
        ring, count = self._ring(), rows[0].words.shape[2]
        capacity = ring or max(1, -(-count // _STEP)) * _STEP
        self._main = Rows.like(rows, capacity, first)
        self._main.put(first, rows)
        self._length, self._first = stop, max(first, stop - capacity)

    def _put_dense(self, keys: mx.array, values: mx.array) -> None:
        """Keep what is wanted of tokens that come next unquantised, in the space of the stored rows."""
        start, tokens, recent = self._length, keys.shape[2], self.policy.recent
        sinks = self.policy.sinks if self.window is None else self.keep

        def rows(skip: int, count: int) -> Pair:
            made, old = [], self._sinks or self._recent
            for i, (codec, x) in enumerate(zip(self._codecs, (keys, values))):
                dtype = old.pair[i].words.dtype if old else keys.dtype
                words = saturate(query(codec, x[:, :, skip : skip + count]), dtype)
                made.append(Packed(words, words[..., :0]))
            return tuple(made)

        if (count := min(tokens, sinks - start)) > 0:
            new = rows(0, count)
            self._sinks = self._sinks or Rows.like(new, sinks)
            self._sinks.put(start, new)
        if count := min(tokens, recent):
            new = rows(tokens - count, count)
            self._recent = self._recent or Rows.like(new, recent)
            self._recent.put(start + tokens - count, new)
            self._recent_first = max(min(self._recent_first, start), start + tokens - recent)

    def _with_dense(self, main: Segment) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
        """First tokens, and the others: dense rows take the place of their quantised ones."""

        def dense(rows: Rows, first: int, stop: int) -> tuple[Segment, ...]:
            formats = (dense_format(DTYPES[packed.words.dtype]) for packed in rows.pair)
            return (Segment(*rows.pair, *formats, base=rows.base, first=first, stop=stop),) if first < stop else ()

        stop = main.stop
        sinks = min(self._sinks.capacity, stop) if self._sinks else 0
        first = max(main.first, sinks)
        recent_first = max(first, self._recent_first) if self._recent else stop
        rest = (replace(main, first=first, stop=recent_first),) if first < recent_first else ()
        recent = dense(self._recent, recent_first, stop) if self._recent else ()
        return dense(self._sinks, 0, sinks) if sinks else (), rest + recent
