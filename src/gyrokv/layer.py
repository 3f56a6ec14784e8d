"""``LayerCache``: the K and V of one attention layer. Storage only; it knows no kernel.

Every token is encoded once, when it arrives, so appending in any chunking gives the same bytes. A sliding layer
keeps a ring buffer. The first ``sinks`` tokens and the ``recent`` last ones may be kept dense as well; their
quantised rows exist too, so nothing is encoded later and cropping loses nothing but precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import CapacityError
from .formats import dense_format
from .quant import Codec, Packed, cat, check_finite
from .rows import Rows
from .spec import check_head_dims, check_positive
from .view import KVView, Segment, chronological, rows_of
from .watch import Watch

_GROWTH = 256  # rows: the least that a growing layer allocates; it doubles, then adds 16 times this


def ring_capacity(window: int) -> int:
    """Slots of the ring buffer of a sliding layer: the window, and at least 32 tokens of slack."""
    return -(-(window + 32) // 64) * 64


def _numbered(device: torch.device | str) -> torch.device:
    """``device`` as tensors on it name it: ``cuda`` is ``cuda:0`` there, and the two do not compare equal."""
    return torch.empty(0, device=device).device


class LayerCache:
    """K and V of one layer: ``append``, ``view``, ``truncate``, ``select``; ``length`` tokens have been seen.

    ``batch``, ``kv_heads``: sizes. ``dtype``: of the dense rows of ``sinks`` and ``recent`` (the model's). ``window``:
    sliding window in tokens; older ones are dropped. ``sinks``, ``recent``: how many of the first and of the last
    tokens are also kept dense (sinks only without a window). ``capacity``: slots allocated at once; ``grow=False``
    makes it a limit. ``check=False`` skips the test for NaN and inf (see :meth:`check_values`). Raises ValueError for
    sizes that make no sense.
    """

    def __init__(
        self,
        k_codec: Codec,
        v_codec: Codec,
        *,
        kv_heads: int,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        window: int | None = None,
        sinks: int = 0,
        recent: int = 0,
        capacity: int = 0,
        grow: bool = True,
        check: bool = True,
    ) -> None:
        check_positive(batch=batch, kv_heads=kv_heads)
        for codec in (k_codec, v_codec):  # any pair can be stored; attending checks the pair
            check_head_dims(codec.head_dim, codec.head_dim)
        for name, value in (("sinks", sinks), ("recent", recent), ("capacity", capacity)):
            if value < 0:
                raise ValueError(f"{name}={value} must be at least 0")
        if window is not None:
            check_positive(window=window)
        self.k_codec, self.v_codec = k_codec, v_codec
        self.batch, self.kv_heads, self.dtype, self.device = batch, kv_heads, dtype, _numbered(device)
        self.window, self.grow, self.check = window, grow, check
        self.sinks = 0 if window is not None else sinks
        self.recent = recent
        self._watch = Watch.on(self.device)
        self.length = 0
        self.version = 0
        self.keep_past = False
        self.starts: Tensor | None = None
        self._limit = None if grow or window is not None else capacity
        self._kept_from = 0
        dense = dense_format(dtype)
        self._main = Rows(k_codec.format, v_codec.format)
        self._sinks, self._recent = Rows(dense, dense), Rows(dense, dense)
        if window is None and capacity:
            self._reserve(capacity, *self._encode_nothing())

    def _encode_nothing(self) -> tuple[Packed, Packed]:
        shape = (self.batch, self.kv_heads, 0)
        return tuple(c.encode(torch.empty(*shape, c.head_dim, device=self.device)) for c in (self.k_codec, self.v_codec))

    # -- writing

    def append(self, k: Tensor, v: Tensor) -> KVView:
        """Encode and store k ``[B, Hkv, T, Dk]`` and v ``[B, Hkv, T, Dv]``; returns the view for queries of these tokens.

        Raises ValueError, TypeError (shapes, dtypes, devices, NaN, inf) or CapacityError before anything is written.
        """
        self.check_input(k, v)
        return self.write(self.k_codec.encode(k), self.v_codec.encode(v), k, v)

    def check_input(self, k: Tensor, v: Tensor) -> None:
        """Raise what :meth:`append` would raise."""
        tokens = k.shape[2] if k.ndim == 4 else 0
        for name, x, codec in (("k", k, self.k_codec), ("v", v, self.v_codec)):
            wanted = (self.batch, self.kv_heads, tokens, codec.head_dim)
            if tuple(x.shape) != wanted or tokens < 1:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; this layer takes [B={self.batch}, Hkv={self.kv_heads}, T>=1, "
                    f"D={codec.head_dim}], and the same T for k and v"
                )
            if x.device != self.device:
                raise ValueError(f"{name} is on {x.device} but the cache is on {self.device}")
            if not x.is_floating_point():
                raise TypeError(f"{name} has dtype {x.dtype}; it must be floating point")
            if self.check and self._watch is None:
                check_finite(x, name)
        if self._limit is not None and self.length + tokens > self._limit:
            raise CapacityError(f"{self.length} tokens held and {tokens} more exceed capacity={self._limit}")
        if self.check and self._watch is not None:
            self._watch.look(k, v)

    def check_values(self) -> None:
        """Raise ValueError if NaN or inf was appended: on an accelerator :meth:`append` does not wait to find out, and
        says so in a later call. Waits for the device; does nothing on the CPU, where :meth:`append` raised."""
        if self._watch is not None:
            self._watch.wait()

    def write(self, k_rows: Packed, v_rows: Packed, k: Tensor, v: Tensor) -> KVView:
        """:meth:`append` for rows that a backend encoded; ``k``, ``v`` are the same tokens, for the dense segments."""
        tokens, start = k.shape[2], self.length
        main, first = self._main, self._first_needed()
        past = None  # a ring that cannot hold the chunk and what its queries look back on hands out a longer copy
        if not self._is_ring:
            self._reserve(start + tokens - first, k_rows, v_rows)
            stored = tokens
        else:
            self._reserve(ring_capacity(self.window), k_rows, v_rows)
            if start + tokens - first > main.capacity:
                old = main.segment()
                rows = (
                    cat([chronological(p, old, first, start), new], dim=-2) for p, new in ((old.k, k_rows), (old.v, v_rows))
                )
                past = Segment(*rows, main.k_format, main.v_format, base=first, first=first, stop=start + tokens)
            stored = min(tokens, main.capacity)
        skip = tokens - stored
        main.write(start + skip, rows_of(k_rows, skip, stored), rows_of(v_rows, skip, stored))
        return self._written(k, v, past)

    def slots(self, tokens: int) -> tuple[Packed, Packed, int] | None:
        """For a backend that encodes in place: the stores of K and V, and the slot where the next ``tokens`` begin.

        None when they do not fit in one piece: :meth:`write` encoded rows then. What the slots held before is given up
        (no later query needs it), so views taken before are out of date. :meth:`fill` is called once they are written.
        """
        main, stop = self._main, self.length + tokens
        if self._is_ring and main.capacity != ring_capacity(self.window):
            return None
        if stop - self._first_needed() > main.capacity or self.length % main.capacity + tokens > main.capacity:
            return None
        main.first = max(main.first, stop - main.capacity)
        self.version += 1
        return main.k, main.v, self.length % main.capacity

    def fill(self, k: Tensor, v: Tensor) -> KVView:
        """The end of :meth:`append` when the rows of tokens k, v lie in the :meth:`slots` handed out for them."""
        self._main.stop = self.length + k.shape[2]
        return self._written(k, v)

    @property
    def _is_ring(self) -> bool:
        return self.window is not None and not self.keep_past

    def _first_needed(self) -> int:
        """The first position held that later queries, or :meth:`truncate`, may look back on."""
        if self.window is None:
            return self._main.first
        return max(self._main.first, (self._kept_from if self.keep_past else self.length) - self.window + 1)

    def _written(self, k: Tensor, v: Tensor, past: Segment | None = None) -> KVView:
        tokens, start = k.shape[2], self.length
        self._write_dense(self._sinks, self.sinks, start, min(tokens, max(0, self.sinks - start)), 0, k, v)
        stored = min(tokens, self.recent)
        self._write_dense(self._recent, self.recent, start + tokens - stored, stored, tokens - stored, k, v)
        self.length += tokens
        self.version += 1
        return self.view(past)

    def _reserve(self, rows: int, like_k: Packed, like_v: Packed) -> None:
        """Make room for ``rows`` live rows: exactly for a ring, by doubling (or up to the limit) otherwise."""
        capacity = self._main.capacity
        if self._is_ring:
            self._main.reserve(rows, like_k, like_v)
        elif rows > capacity:
            grown = max(rows, min(2 * capacity, capacity + 16 * _GROWTH), _GROWTH)
            self._main.reserve(grown if self._limit is None else self._limit, like_k, like_v)

    def _write_dense(self, rows: Rows, capacity: int, position: int, count: int, skip: int, k: Tensor, v: Tensor) -> None:
        if not count:
            return
        packed = []
        for x, codec in ((k, self.k_codec), (v, self.v_codec)):
            words = codec.store_dense(x.narrow(2, skip, count), self.dtype)
            packed.append(Packed(words, words.new_empty(*words.shape[:-1], 0)))
        rows.reserve(capacity, *packed)
        if position > rows.stop:
            rows.first = position
        rows.write(position, *packed)

    # -- reading

    def view(self, past: Segment | None = None) -> KVView:
        """The layer as it stands. (``past``: a longer copy of the main rows, from :meth:`write`.)"""
        main = self._main if past is None else past
        sinks_stop, recent_first = 0, self.length
        if self.sinks or self.recent:
            sinks_stop = self._sinks.stop
            if self._recent.stop > self._recent.first:
                recent_first = max(self._recent.first, sinks_stop)
        parts = []
        if sinks_stop:
            parts.append(self._sinks.segment(0, sinks_stop))
        first = max(main.first, sinks_stop)
        if first < recent_first:
            base = 0 if past is None else past.base
            parts.append(Segment(main.k, main.v, main.k_format, main.v_format, base, first, recent_first, main.kept))
        if recent_first < self.length:
            parts.append(self._recent.segment(recent_first, self.length))
        return KVView(  # by position, which takes half as long
            tuple(parts), self.k_codec, self.v_codec, self.batch, self.kv_heads, min(main.first, self.length), self.length,
            self.window, self.starts, None, self, self.version,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes held, unused slots included: the sum over the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def live_nbytes(self) -> int:
        """Bytes of the rows in use, dense copies included."""
        total = 0
        for rows in (self._main, self._sinks, self._recent):
            live = rows.stop - rows.first
            total += sum(t.narrow(-2, 0, live).numel() * t.element_size() for t in rows.tensors)
        return total

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor that holds rows."""
        return (*self._main.tensors, *self._sinks.tensors, *self._recent.tensors)

    # -- changing what is held

    def set_starts(self, starts: Tensor | None) -> None:
        """Sequence b begins at position ``starts[b]`` (left padding before it is never attended); None for all 0."""
        if starts is not None:
            if tuple(starts.shape) != (self.batch,) or starts.is_floating_point():
                raise ValueError(
                    f"starts has shape {tuple(starts.shape)}, {starts.dtype}; it must be integer [{self.batch}]"
                )
            starts = starts.to(device=self.device, dtype=torch.int64)
        self.starts = starts
        self.version += 1

    def check_truncate(self, length: int) -> None:
        """Raise what :meth:`truncate` would raise."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length={length} must be between 0 and the {self.length} tokens held")
        if self.window is not None:
            needed = max(0, length - self.window + 1)
            if self._main.first > needed:
                raise CapacityError(
                    f"length={length}: the ring holds positions {self._main.first} to {self.length - 1}, but the window "
                    f"of {self.window} before it reaches back to {needed}; record the past before appending what may be cut"
                )

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens. Raises ValueError, or CapacityError if a ring has lost what
        the window before ``length`` needs (see :meth:`record_past`)."""
        self.check_truncate(length)
        for rows in (self._main, self._sinks, self._recent):
            rows.truncate(length)
        self.length = self._kept_from = length
        self.version += 1

    def record_past(self, keep: bool = True) -> None:
        """Keep in a sliding layer all tokens from the window before now on, until :meth:`truncate` moves that point."""
        self.keep_past, self._kept_from = keep, self.length

    def select(self, index: Tensor) -> None:
        """Replace the batch by its rows ``index [B']`` (reorder, repeat or drop sequences)."""
        if index.ndim != 1 or index.is_floating_point() or index.numel() < 1:
            raise ValueError(f"index has shape {tuple(index.shape)}, {index.dtype}; it must be a non-empty [B'] of integers")
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= self.batch:
            raise ValueError(f"index runs from {low} to {high}; sequences are 0 to {self.batch - 1}")
        self._map(lambda t: t.index_select(0, index.to(device=t.device, dtype=torch.int64)))
        self.batch = index.numel()

    def to(self, device: torch.device | str) -> None:
        """Move all rows to ``device``."""
        self._map(lambda t: t.to(device))
        self.device = _numbered(device)
        self._watch = Watch.on(self.device)

    def reset(self) -> None:
        """Forget all tokens; allocated slots stay."""
        for rows in (self._main, self._sinks, self._recent):
            rows.first = rows.stop = 0
        self.length = self._kept_from = 0
        self.starts = None
        self.version += 1

    def _map(self, f) -> None:
        for rows in (self._main, self._sinks, self._recent):
            rows.map(f)
        if self.starts is not None:
            self.starts = f(self.starts)
        self.version += 1

    # -- saving

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Live rows in canonical order (oldest first, row after row), and the positions they stand for."""
        tensors, meta = {}, {"length": self.length}
        for name, rows in (("main", self._main), ("sinks", self._sinks), ("recent", self._recent)):
            if rows.k is None:
                continue
            meta[f"{name}_first"], meta[f"{name}_stop"] = rows.first, rows.stop
            segment = rows.segment()
            for side, packed in (("k", rows.k), ("v", rows.v)):
                part = chronological(packed, segment, rows.first, rows.stop)
                tensors[f"{name}.{side}.words"], tensors[f"{name}.{side}.scale"] = (t.contiguous() for t in part)
        if self.starts is not None:
            tensors["starts"] = self.starts
        return tensors, meta

    def load_state(self, tensors: dict[str, Tensor], meta: dict[str, int]) -> None:
        """Restore what :meth:`state` returned, on this layer's device."""
        self.reset()
        for name, rows in (("main", self._main), ("sinks", self._sinks), ("recent", self._recent)):
            if f"{name}_first" not in meta:
                continue
            first, stop = meta[f"{name}_first"], meta[f"{name}_stop"]
            k, v = (Packed(*(tensors[f"{name}.{s}.{t}"].to(self.device) for t in ("words", "scale"))) for s in "kv")
            fixed = {"sinks": self.sinks, "recent": self.recent}.get(name)
            if fixed is None:
                fixed = ring_capacity(self.window) if self.window is not None else stop
            rows.reserve(max(fixed, stop - first), k, v)
            rows.first = rows.stop = first
            rows.write(first, k, v)
        if "starts" in tensors:
            self.starts = tensors["starts"].to(self.device)
        self.length = self._kept_from = meta["length"]
        self.version += 1

    def __repr__(self) -> str:
        window = "" if self.window is None else f", window={self.window}"
        return (
            f"LayerCache(k={self.k_codec.format}, v={self.v_codec.format}, head_dim={self.k_codec.head_dim}"
            f"/{self.v_codec.head_dim}, batch={self.batch}, kv_heads={self.kv_heads}, length={self.length}{window})"
        )
