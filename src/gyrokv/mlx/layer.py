"""One layer of a cache for mlx-lm's models: packed K and V in MLX arrays, and handles on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..config import CacheConfig, LayerShape
from ..errors import CapacityError
from ..formats import dense_format
from ..layer import ring_capacity
from ..quant import Codec, Packed
from ..view import KVView, Segment
from .machine import DTYPES, encode, query, saturate

_STEP = 256  # rows that a growing layer adds at once, and at least what it holds


class Causal(str):
    """The mask "causal" of mlx-lm, with the sliding window that a model asked for (None: the layer's own)."""

    window: int | None

    def __new__(cls, window: int | None) -> Causal:
        made = super().__new__(cls, "causal")
        made.window = window
        return made


@dataclass(frozen=True)
class Handle:
    """What ``update_and_fetch`` returns in place of dense keys (``side="k"``) or values: a view of packed rows."""

    view: KVView
    side: str
    dtype: Any

    @property
    def codec(self) -> Codec:
        return self.view.k_codec if self.side == "k" else self.view.v_codec

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.view.batch, self.view.kv_heads, self.view.kv_len, self.codec.head_dim)


class Layer:
    """The cache of attention layer ``index`` of ``count``, as mlx-lm's models use it. ``window``: sliding, or None.

    Formats come from ``config`` when the first keys and values arrive. Every token is encoded once; a sliding layer
    keeps a ring buffer and hands out a longer copy for a chunk that the ring cannot hold. The policy's ``sinks`` first
    tokens (without a window) and ``recent`` last ones are kept dense as well, in the dtype of the first keys.
    """

    def __init__(self, config: CacheConfig, index: int, count: int, window: int | None) -> None:
        self.policy = config.layer(index, count, sliding=window is not None)
        self.window = window
        self.offset = 0
        self._first = 0  # the oldest position held
        self._recent_first = 0  # the oldest position held dense among the last ones
        self._sinks: tuple[Packed, Packed] | None = None
        self._recent: tuple[Packed, Packed] | None = None
        self._k: Packed | None = None
        self._v: Packed | None = None
        self._codecs: tuple[Codec, Codec] | None = None

    # -- what models call

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Handle, Handle]:
        """Store keys ``[B, Hkv, T, Dk]`` and values; returns handles on what queries of these tokens may see."""
        batch, kv_heads, tokens, k_dim = keys.shape
        if self._codecs is None:
            self._codecs = self.policy.codecs(LayerShape(kv_heads, k_dim, values.shape[3], self.window))
        k, v = (encode(codec, x) for codec, x in zip(self._codecs, (keys, values)))
        start, stop, first = self.offset, self.offset + tokens, self._first_after(tokens)
        past = None
        if self.window is None:
            self._reserve(stop, k, v)
            kept = tokens
        else:
            self._reserve(ring_capacity(self.window), k, v)
            kept = min(tokens, self._capacity)
            if stop - first > self._capacity:
                past = tuple(_join(self._span(old, first, start), new) for old, new in zip((self._k, self._v), (k, v)))
        self._write(stop - kept, *(p.map(lambda t: t[:, :, tokens - kept :]) for p in (k, v)))
        self._write_dense(keys, values)
        self.offset = stop
        formats = tuple(codec.format for codec in self._codecs)
        if past is not None:
            segment = Segment(*past, *formats, base=first, first=first, stop=stop)
        else:
            first = self._first
            segment = Segment(self._k, self._v, *formats, base=0, first=first, stop=stop)
        view = KVView(
            self._with_dense(segment), *self._codecs, batch, kv_heads, first=first, length=stop, window=self.window
        )  # fmt: skip
        return Handle(view, "k", keys.dtype), Handle(view, "v", values.dtype)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Causal | mx.array | None:
        """The mask for N queries that come next: a marker, because kernels see positions, or bool ``[N, keys held]``."""
        window = window_size or self.window
        if return_array:
            keys = mx.arange(self._held_after(N), self.offset + N)[None]
            queries = mx.arange(self.offset, self.offset + N)[:, None]
            seen = keys <= queries
            return seen if window is None else seen & (queries - keys < window)
        return None if N == 1 and window_size is None else Causal(window)

    # -- what mlx-lm calls

    @property
    def state(self) -> list[mx.array]:
        """The arrays, to be evaluated."""
        held = ((self._k, self._v) if self._k else (), self._sinks or (), self._recent or ())
        return [t for pair in held for p in pair for t in p if t.size]

    def size(self) -> int:
        """Tokens held."""
        return self.offset - self._first

    def empty(self) -> bool:
        return self.offset == 0

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.state)

    def is_trimmable(self) -> bool:
        return self.window is None or self._first == 0

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens; returns how many there were. Raises CapacityError when a ring has lost what the
        window before them needs."""
        n = min(self.offset, n)
        if self.window is not None and self._first > max(0, self.offset - n - self.window + 1):
            raise CapacityError(f"n={n}: the ring holds positions {self._first} to {self.offset - 1} only")
        self.offset -= n
        return n

    # -- storage

    @property
    def _capacity(self) -> int:
        return 0 if self._k is None else self._k.words.shape[2]

    def _first_after(self, tokens: int) -> int:
        """The first position that queries of the next ``tokens`` may look back on."""
        return 0 if self.window is None else max(self._first, self.offset - self.window + 1)

    def _held_after(self, tokens: int) -> int:
        """The first position in the view after the next ``tokens``."""
        if self.window is None:
            return 0
        capacity, stop, first = ring_capacity(self.window), self.offset + tokens, self._first_after(tokens)
        return first if stop - first > capacity else max(self._first, stop - capacity)

    def _reserve(self, rows: int, k: Packed, v: Packed) -> None:
        if rows <= self._capacity:
            return
        more = rows if self.window is not None else -(-(rows - self._capacity) // _STEP) * _STEP

        def grown(old: mx.array | None, like: mx.array) -> mx.array:
            new = mx.zeros((*like.shape[:2], more, like.shape[3]), dtype=like.dtype)
            return new if old is None else mx.concatenate([old, new], axis=2)

        before = (self._k or (None, None), self._v or (None, None))
        self._k, self._v = (Packed(*map(grown, old, like)) for old, like in zip(before, (k, v)))

    def _write(self, position: int, k: Packed, v: Packed) -> None:
        _put((self._k, self._v), position, (k, v))
        self._first = max(self._first, position + k.words.shape[2] - self._capacity)

    def _write_dense(self, keys: mx.array, values: mx.array) -> None:
        """Keep what the policy wants of tokens that come next unquantised, in the space of the stored rows."""
        start, tokens = self.offset, keys.shape[2]
        sinks, recent = 0 if self.window is not None else self.policy.sinks, self.policy.recent

        def rows(skip: int, count: int) -> tuple[Packed, Packed]:
            made = []
            for codec, x, old in zip(self._codecs, (keys, values), self._sinks or self._recent or (None, None)):
                dtype = keys.dtype if old is None else old.words.dtype
                words = saturate(query(codec, x[:, :, skip : skip + count]), dtype)
                made.append(Packed(words, words[..., :0]))
            return tuple(made)

        if (count := min(tokens, sinks - start)) > 0:
            new = rows(0, count)
            self._sinks = self._sinks or _empty(new, sinks)
            _put(self._sinks, start, new)
        if count := min(tokens, recent):
            new = rows(tokens - count, count)
            self._recent = self._recent or _empty(new, recent)
            _put(self._recent, start + tokens - count, new)
            self._recent_first = max(min(self._recent_first, start), start + tokens - recent)

    @staticmethod
    def _dense(pair: tuple[Packed, Packed], first: int, stop: int) -> Segment:
        return Segment(*pair, *(dense_format(DTYPES[p.words.dtype]) for p in pair), base=0, first=first, stop=stop)

    def _with_dense(self, main: Segment) -> tuple[Segment, ...]:
        """The segments of a view: dense rows take the place of their quantised ones."""
        stop = main.stop
        first = max(main.first, min(self.policy.sinks, stop) if self._sinks else 0)
        recent_first = max(first, self._recent_first) if self._recent else stop
        parts = [self._dense(self._sinks, main.first, first)] if main.first < first else []
        if first < recent_first:
            parts.append(replace(main, first=first, stop=recent_first))
        if recent_first < stop:
            parts.append(self._dense(self._recent, recent_first, stop))
        return tuple(parts)

    def _span(self, packed: Packed, first: int, stop: int) -> Packed:
        """Rows of positions ``first <= p < stop``, oldest first."""
        parts = []
        while first < stop:
            slot = first % self._capacity
            n = min(stop - first, self._capacity - slot)
            parts.append(packed.map(lambda t, a=slot, b=slot + n: t[:, :, a:b]))
            first += n
        found = parts[0] if parts else packed.map(lambda t: t[:, :, :0])
        for part in parts[1:]:
            found = _join(found, part)
        return found


def _empty(like: tuple[Packed, Packed], rows: int) -> tuple[Packed, Packed]:
    return tuple(p.map(lambda t: mx.zeros((*t.shape[:2], rows, t.shape[3]), dtype=t.dtype)) for p in like)


def _put(stores: tuple[Packed, Packed], position: int, rows: tuple[Packed, Packed]) -> None:
    """Write K and V rows from ``position`` on; position p goes to slot p modulo the stores' capacity."""
    done, count, capacity = 0, rows[0].words.shape[2], stores[0].words.shape[2]
    while done < count:
        slot = (position + done) % capacity
        n = min(count - done, capacity - slot)
        for store, new in zip(stores, rows):
            for into, part in zip(store, new):
                if part.size:
                    into[:, :, slot : slot + n] = part[:, :, done : done + n]
        done += n


def _join(a: Packed, b: Packed) -> Packed:
    return Packed(*(mx.concatenate(pair, axis=2) for pair in zip(a, b)))
