"""What memory may the compiled CPU backend touch? Its tensors end at pages that fault, lie far apart, or hold NaN."""

from __future__ import annotations

import copy
import ctypes
import faulthandler
import math
import mmap
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from gyrokv import BlockMap, Codec, LayerCache, append, attend
from gyrokv.backends import cpu
from gyrokv.backends.cpu.build import known_levels
from gyrokv.cases import FEATURES, case, fits, groups
from gyrokv.formats import FORMATS
from gyrokv.spec import HEAD_DIMS
from gyrokv.testing import inputs, poison_dead
from gyrokv.view import KVView

LEVELS = pytest.mark.parametrize("level", known_levels(), indirect=True)
posix = pytest.mark.skipif(os.name != "posix", reason="needs mprotect and fork")

# -- pages that fault


class Guarded:
    """Copies of tensors whose last (``at_end``) or first byte lies at a page that cannot be read or written."""

    def __init__(self, at_end: bool) -> None:
        self.at_end, self.kept = at_end, []
        self._protect = ctypes.CDLL(None, use_errno=True).mprotect
        self._protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor at a guard page; what was not written is 0x7F bytes, NaN in most dtypes."""
        page, size = mmap.PAGESIZE, math.prod(shape) * dtype.itemsize
        if not size:
            return torch.zeros(shape, dtype=dtype)
        inside = -(-size // page) * page
        memory = mmap.mmap(-1, inside + 2 * page)
        memory[:] = b"\x7f" * len(memory)
        first = page + inside - size if self.at_end else page
        flat = torch.frombuffer(memory, dtype=dtype, count=size // dtype.itemsize, offset=first)
        start = flat.data_ptr() - first
        for guard in (start, start + page + inside):
            if self._protect(guard, page, 0):  # PROT_NONE
                raise OSError(ctypes.get_errno(), "mprotect")
        self.kept.append(memory)
        return flat.view(shape)

    def __call__(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else self.room(tuple(t.shape), t.dtype).copy_(t)


def in_a_child(body: Callable[[], None]) -> str:
    """What went wrong when ``body`` ran in a child process: empty, the name of a signal, or a traceback."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        finished = False
        try:
            body()
            finished = True
        finally:
            os.write(writable, b"" if finished else traceback.format_exc()[-4000:].encode())
            os._exit(0)  # without pytest's own ending
    os.close(writable)
    with os.fdopen(readable) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else said


@posix
@pytest.mark.parametrize("at_end", [True, False])
def test_guard_pages_guard(at_end):
    """The tests below would show nothing if one value beyond a tensor could be read."""
    t = Guarded(at_end)(torch.arange(5.0))
    beyond = ctypes.c_float.from_address(t.data_ptr() + (20 if at_end else -4))

    def inside() -> None:
        assert t.tolist() == [0, 1, 2, 3, 4]

    def outside() -> None:
        faulthandler.disable()  # this crash is wanted
        assert beyond.value

    def wrong() -> None:
        assert t[4] == 5

    assert in_a_child(inside) == ""
    assert in_a_child(outside) in ("SIGSEGV", "SIGBUS")
    assert "assert t[4] == 5" in in_a_child(wrong)


def alone(k, v, dims=(64, 64), **settings):
    """One sequence with one KV head, so that the last row of all is the last row of its tensor."""
    return case(k, v, dims, **dict(batch=1, kv_heads=1, q_heads=2) | settings)


def guarded_view(view: KVView, guard: Guarded) -> KVView:
    """``view`` on rows that lie at guard pages; of segments that do not wrap only the live rows exist."""

    def rows(segment):
        live = segment.capacity if segment.stop - segment.base > segment.capacity else segment.stop - segment.base
        k, v = (packed.map(lambda t: guard(t[:, :, :live])) for packed in (segment.k, segment.v))
        return replace(segment, k=k, v=v)

    return replace(view, segments=tuple(map(rows, view.segments)), owner=None, starts=guard(view.starts))


def run_guarded(c, at_end: bool, monkeypatch) -> None:
    """The kernel on guarded copies of all that it reads and with guarded room for all that it writes."""
    data = inputs(c)
    spec, guard = c.spec, Guarded(at_end)
    mask = guard(data.mask)
    full = None if mask is None else (mask if mask.ndim == 4 else mask[None, None]).expand(-1, -1, -1, spec.kv_len)
    block_map = None
    if spec.block_map:
        block_map = BlockMap.build(mask, cpu.tile(spec))
        block_map = replace(block_map, states=guard(block_map.states))
    want = cpu.attend(data.view.k_codec.query(data.q), data.view, spec, full, block_map, data.sinks)
    q, view, sinks = guard(data.view.k_codec.query(data.q)), guarded_view(data.view, guard), guard(data.sinks)

    def room(*sizes, dtype):
        return guard.room(tuple(sizes[0] if len(sizes) == 1 else sizes), dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *sizes, dtype=None: room(*sizes, dtype=dtype or x.dtype))
    monkeypatch.setattr(torch, "empty", lambda *sizes, dtype=None: room(*sizes, dtype=dtype or torch.float32))

    def body() -> None:
        got = cpu.attend(q, view, spec, full, block_map, sinks)
        assert all(torch.equal(a, b) for a, b in zip(got, want))

    said = in_a_child(body)
    assert not said, f"{c}, guarded {'behind' if at_end else 'before'}: {said}"


def formats_at_the_end() -> Iterator:
    """Each format with each head size, in turns with one and several queries and keys that fill no vector."""
    for i, (fmt, dim) in enumerate(product(FORMATS.values(), HEAD_DIMS)):
        if fits(fmt, dim) and i % 3 == 0:
            yield alone(fmt, fmt, (dim, dim), q_len=(1, 3, 17)[i % 7 % 3], kv_len=(1, 7, 33, 65, 130)[i % 5], causal=True)
    # rows shorter than a vector, whose last bytes vectors read that begin before them
    for name, dim in product(("turbo2", "turbo3", "turbo4", "tq5", "tq6", "tq8"), (96, 192)):
        yield alone(name, name, (dim, dim), kv_len=130, causal=True)
    # the same in whole steps of 16 keys and 64 values, of which nothing is copied for being fewer
    for name, dim in product(("turbo2", "turbo3", "turbo4", "tq5", "tq6"), (32, 64, 96)):
        yield alone(name, name, (dim, dim), kv_len=64, causal=True)


def features_at_the_end() -> Iterator:
    for i, (name, q_len) in enumerate(product(FEATURES, (1, 7))):
        for k, v in (("q8_0", "turbo4"), ("turbo3", "bf16"), ("fp8_e4m3", "q4_0"))[i % 3 :: 3]:
            yield alone(k, v, **FEATURES[name], q_len=q_len)
    for dtype in (torch.float16, torch.bfloat16):
        yield alone("q8_0", "q8_0", mask="additive", mask_dtype=dtype, q_len=7, kv_len=71)
        yield alone("q8_0", "q8_0", dtype=dtype, q_len=7, kv_len=71, dims=(40, 40))
        yield alone("q8_0", "bf16", mask="bool", mask_axes="k", dtype=dtype, q_len=33, kv_len=70, q_heads=3)


@posix
@LEVELS
@pytest.mark.parametrize("at_end", [True, False], ids=["behind", "before"])
@pytest.mark.parametrize("which", [formats_at_the_end, features_at_the_end])
def test_nothing_beyond_a_tensor_is_touched(level, which, at_end, monkeypatch):
    """A row at the end of an allocation: a read of one vector too many would crash a user's process, once in a while."""
    for c in which():
        with monkeypatch.context() as patch:
            run_guarded(c, at_end, patch)


@posix
@LEVELS
@pytest.mark.parametrize("at_end", [True, False], ids=["behind", "before"])
def test_the_encoder_touches_nothing_beyond_a_tensor(level, at_end, monkeypatch):
    """Both what is encoded and the rows that it goes to end at a page that faults."""
    guard = Guarded(at_end)
    for i, (fmt, dim) in enumerate(product((f for f in FORMATS.values() if not f.is_dense), HEAD_DIMS)):
        if not fits(fmt, dim) or i % 2:
            continue
        dtype, tokens = (torch.float32, torch.float16, torch.bfloat16)[i % 3], (1, 2, 17)[i // 2 % 3]
        codec = Codec(fmt, dim)
        x = guard(torch.randn(1, 1, tokens, dim).to(dtype))
        want = codec.encode(x)
        layer = LayerCache(codec, codec, kv_heads=1, capacity=tokens, grow=False)
        layer._main.k, layer._main.v = layer._main.k.map(guard), layer._main.v.map(guard)

        def body() -> None:
            cpu.append(layer, x, x)  # noqa: B023
            for store in (layer._main.k, layer._main.v):  # noqa: B023
                assert all(torch.equal(a, b) for a, b in zip(store, want))  # noqa: B023

        said = in_a_child(body)
        assert not said, f"{fmt} of {dim}, {tokens} tokens, {dtype}: {said}"


@posix
@pytest.mark.parametrize("team", [True, False])
def test_a_forked_process_does_not_wait_for_its_parents_threads(team, backend_here):
    """A data loader or a server that forks after the first call would hang in the second one."""
    backend_here("cpu")
    data = inputs(case("q8_0", "turbo4", q_len=7, kv_len=4200, causal=True))

    def again() -> None:
        signal.alarm(60)  # a child that hangs is ended by the system
        assert all(torch.equal(a, b) for a, b in zip(calls(), want))

    def calls() -> tuple[Tensor, Tensor]:
        return cpu.attend(q, data.view, data.case.spec, None, None, None)

    q = data.view.k_codec.query(data.q)
    torch.set_num_threads(3)
    try:
        with cpu.forced(team=team):
            want = calls()
            assert in_a_child(again) == ""
            assert all(torch.equal(a, b) for a, b in zip(calls(), want))
    finally:
        torch.set_num_threads(1)


# -- slots that hold no live row

DEAD = [
    c for c in (*groups()["features"][::7], *groups()["storage"], *groups()["many_tiles"][::4])
    if not cpu.why_not(c.spec) and not (c.plain or c.spec.paged or c.spec.lengths)  # those come with dead slots poisoned
]  # fmt: skip


def test_dead_slots_are_there():
    """Rings, dense copies and ragged batches must be among the cases below, or their dead slots go untested."""
    assert {name for c in DEAD for name in c.spec.uses()} >= {"ring", "unquantised", "starts", "mask", "window"}


@LEVELS
@pytest.mark.parametrize("case", DEAD, ids=str)
def test_dead_slots_are_not_read(level, case):
    """Slots beyond the length and slots that a ring no longer uses hold NaN; none may reach the result."""
    data = inputs(case)
    before = data.run("cpu")
    poison_dead(data.view.owner)
    after = data.run("cpu")
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert not bool(after[0].isnan().any() or after[1].isnan().any())


# -- strides

FAR = 2**31 + 2**27  # bytes, more than 32 bits hold with or without a sign after a few steps


def far_apart(t: Tensor, axis: int) -> Tensor:
    """A copy of ``t`` whose ``axis`` has steps of more than 2**31 bytes in all; only pages that are used exist."""
    if t.shape[axis] < 2 or not t.numel():
        return t
    size = t.element_size()
    step = -(-FAR // (t.shape[axis] - 1) // 4096) * 4096 // size
    strides = list(t.contiguous().stride())
    if strides[axis] >= step:
        return t
    strides[axis] = step
    length = 1 + sum((n - 1) * s for n, s in zip(t.shape, strides))
    memory = mmap.mmap(-1, length * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    return torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, strides).copy_(t)


@posix
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["sequences", "heads", "tokens"])
@LEVELS
def test_offsets_beyond_32_bits(level, axis):
    """A cache of more than 2 GiB: an offset that is computed in 32 bits reads another row, or nothing at all."""
    for k, v, settings in (
        ("q8_0", "turbo4", dict(causal=True)), ("turbo3", "bf16", dict(mask="additive", mask_axes="bhqk")),
        ("f32", "fp8_e4m3", dict(mask="bool", mask_axes="bhqk", block_map=True)), ("tq6.v1", "f16", dict(sinks=True)),
    ):  # fmt: skip
        data = inputs(case(k, v, **settings, q_len=3, kv_len=33))
        spec, view = data.case.spec, data.view
        q, mask, block_map = view.k_codec.query(data.q), data.mask, None
        if spec.block_map:
            block_map = BlockMap.build(mask, cpu.tile(spec))
        want = cpu.attend(q, view, spec, mask, block_map, data.sinks)

        def rows(t: Tensor) -> Tensor:
            return far_apart(t[:, :, :33], axis)

        far = replace(view, segments=tuple(replace(s, k=s.k.map(rows), v=s.v.map(rows)) for s in view.segments))
        words = far.segments[0].k.words
        assert words.stride(axis) * (words.shape[axis] - 1) * words.element_size() >= FAR
        if block_map is not None:
            block_map = replace(block_map, states=far_apart(block_map.states, axis))
        far_mask = None if mask is None else far_apart(mask, axis)
        got = cpu.attend(far_apart(q, axis), far, spec, far_mask, block_map, data.sinks)
        assert all(torch.equal(a, b) for a, b in zip(got, want)), f"{k}.{v}"


@posix
@LEVELS
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["sequences", "heads", "tokens"])
def test_the_encoder_writes_beyond_32_bits(level, axis):
    """The same for what is encoded and for the rows that it goes to."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 9, 96, generator=random)
    for fmt, dtype in (("q8_0", torch.float32), ("turbo3", torch.bfloat16)):
        codec = Codec(fmt, 96)
        layer = LayerCache(codec, codec, kv_heads=2, batch=2, capacity=9)
        for store in ("k", "v"):
            setattr(layer._main, store, getattr(layer._main, store).map(lambda t: far_apart(t, axis)))
        far = far_apart(x.to(dtype), axis)
        assert far.stride(axis) * (far.shape[axis] - 1) * far.element_size() >= FAR
        view = cpu.append(layer, far, far)
        want = codec.encode(x.to(dtype))
        assert all(torch.equal(a[:, :, :9], b) for a, b in zip(view.segments[0].k, want))


@LEVELS
def test_rows_need_not_be_contiguous(level):
    """Rows of a slice, of a transposed store, of one head for all: strides are honoured wherever a row may lie."""
    for k, v in (("q8_0", "turbo3"), ("bf16", "fp8_e4m3"), ("tq5", "f32"), ("turbo2", "q4_0")):
        data = inputs(case(k, v, q_len=5, kv_len=40, causal=True))
        want = data.run("cpu")
        view = data.view

        def moved(t: Tensor) -> Tensor:
            """Tokens first, in wider rows, whose other values are NaN."""
            if not t.numel():
                return t
            wide = torch.full((*t.shape[:3], t.shape[3] + 3), torch.nan if t.is_floating_point() else 0x7F7F, dtype=t.dtype)
            wide = wide.transpose(1, 2).contiguous().transpose(1, 2)
            wide[..., : t.shape[3]] = t
            return wide[..., : t.shape[3]]

        other = replace(view, segments=tuple(replace(s, k=s.k.map(moved), v=s.v.map(moved)) for s in view.segments))
        q = torch.stack((data.q, torch.full_like(data.q, torch.nan)), 1).flatten(0, 1)[::2]
        got = cpu.attend_heads(q, other, data.case.spec, None, None, None)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), f"{k}.{v}"


def test_a_default_device_does_not_move_outputs(backend_here):
    """Kernels write to addresses: results belong where q is, whatever torch's default device."""
    backend_here("cpu")
    data = inputs(case("turbo4", "q8_0", q_len=2, kv_len=40, causal=True))
    want = data.run("cpu")
    with torch.device("meta"):
        got = data.run("cpu")
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def grown(layer: LayerCache) -> LayerCache:
    append(layer, *torch.randn(2, 2, 2, 300, 64))
    return layer


def moved(layer: LayerCache) -> LayerCache:
    """Its tensors are the same objects in other memory, as ``share_memory_`` would leave them."""
    for t in layer.tensors:
        t.set_(t.clone())
    return layer


@pytest.mark.parametrize("elsewhere", [grown, moved, copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_rows_are_read_where_they_lie_now(elsewhere, backend_here):
    """Addresses are kept with a store from call to call: one that has moved must not be read where it was."""
    backend_here("cpu")
    layer = LayerCache(Codec("q4_0", 64), Codec("tq5", 64), kv_heads=2, batch=2, capacity=40, recent=3)
    append(layer, *torch.randn(2, 2, 2, 40, 64))
    q = torch.randn(2, 4, 1, 64)
    attend(q, layer, backend="cpu")
    before = [t.narrow(2, 0, t.shape[2]) for t in layer.tensors]  # keeps the memory
    layer = elsewhere(layer)
    want = attend(q, layer, backend="reference")
    now = {t.data_ptr() for t in layer.tensors}
    left = [t for t in before if t.data_ptr() not in now]
    assert len(left) == {copy.copy: 0, grown: 4}.get(elsewhere, 6)
    for t in left:
        t.view(torch.uint8).fill_(0x7F)
    got = attend(q, layer, backend="cpu")
    assert float((got - want).norm() / want.norm()) < 3e-4
