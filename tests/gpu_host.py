"""Prefill on a machine without a GPU: launches are carried out by the host, from what their structures say.

What is tested so is how problems are cut, which rows go where, and every address and stride; not the kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from gyrokv import dispatch
from gyrokv.backends.gpu import nvrtc, plan, prefill, shapes, staging
from gyrokv.masks import BlockMap
from gyrokv.packing import unpack
from gyrokv.testing import Problem

_DENSE = {plan.F16: torch.float16, plan.BF16: torch.bfloat16, plan.F32: torch.float32}
_MASKS = {1: np.bool_, 2: np.float32, 3: np.float16, 4: np.int16}


@contextmanager
def hosted(processors: int = 132) -> Iterator[list]:
    """``gyrokv.backends.gpu.prefill`` runs on tensors of the CPU; yields the launches: (kernel, defines, structure)."""
    launches: list = []

    class Kernel:
        def __init__(self, name, defines, device, shared=0):
            self.name, self.defines = name, dict(defines)

        def launch(self, grid, threads, stream, call, *maps):
            call = type(call).from_buffer_copy(call)
            launches.append((self.name, self.defines, call))
            _unpack(call, self.defines, grid) if self.name == "unpack" else _prefill(call, self.defines, grid, *maps)

    cuda = {"current_stream": lambda device: SimpleNamespace(cuda_stream=0), "device": lambda device: nullcontext()}
    own = {"_tensor_map": lambda x, *box: x, "_processors": lambda device: processors, "portable_room": lambda device: 0}
    with (
        mock.patch.multiple(torch.cuda, **cuda), mock.patch.multiple(prefill, **own),
        mock.patch.object(nvrtc, "kernel", Kernel),
    ):  # fmt: skip
        yield launches


def run(problem: Problem, processors: int = 132) -> tuple[Tensor, Tensor, list]:
    """(out, lse, launches) of ``problem``."""
    backend, block_map = SimpleNamespace(attend=prefill.attend), None
    if problem.case.spec.block_map:
        block_map = BlockMap.build(problem.mask, shapes.tile(problem.case.spec))
        backend.tile = shapes.tile
    spec = dispatch.describe(problem.q, problem.view, **problem.options, block_map=block_map)
    options = dict(mask=problem.mask, sinks=problem.sinks, block_map=block_map)
    with hosted(processors) as launches:
        return *dispatch.run(backend, problem.q, problem.view, spec, **options), launches


def memory(address: int, dtype, sizes: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """What lies at ``address``; strides in elements."""
    item = np.dtype(dtype).itemsize
    extent = item * (1 + sum((n - 1) * s for n, s in zip(sizes, strides)))
    buffer = (ctypes.c_char * extent).from_address(address)
    return np.ndarray(sizes, dtype, buffer, strides=tuple(s * item for s in strides))


def own(call, batch: int) -> tuple[int, int]:
    """(start, tokens) of a sequence."""
    start = ctypes.c_int64.from_address(call.starts + 8 * batch).value if call.starts else 0
    if not call.lengths:
        return start, call.length
    return start, ctypes.c_int64.from_address(call.lengths + 8 * batch * call.lengths_batch).value


def _unpack(call: staging.Unpack, defines: dict, grid: tuple[int, int, int]) -> None:
    dim, kind, side = defines["ROW_DIM"], defines["ROW_KIND"], call.source
    assert grid[0] * 1024 >= call.count * dim // 8 > (grid[0] - 1) * 1024
    dtype = torch.bfloat16 if defines["OUT_BF16"] else torch.float16
    for b, h in np.ndindex(grid[2], grid[1]):
        start, tokens = own(call, b)
        origin = call.origin - (call.length - tokens if call.relative else 0)
        oldest = max(call.first, start, tokens - call.keep)
        for i in range(min(call.count, max(0, -(-(tokens - origin) // 128) * 128))):
            position, value = origin + i, torch.zeros(dim)
            if oldest <= position < min(call.stop, tokens - call.trail):
                place, slot = b, (position - call.base) % call.capacity
                if call.pages:
                    at = call.pages + 4 * (b * call.pages_batch + slot // call.page_slots)
                    place, slot = ctypes.c_int32.from_address(at).value, slot % call.page_slots

                def row(base, strides, size, dtype):
                    at = base + place * strides[0] + h * strides[1] + slot * strides[2]  # noqa: B023
                    assert base == side.scale or at % defines["ALIGNED"] == 0
                    return torch.frombuffer(bytearray(ctypes.string_at(at, size)), dtype=dtype)

                if kind in _DENSE:
                    size = dim * _DENSE[kind].itemsize
                    value = row(side.words, side.word_strides, size, _DENSE[kind]).float() * call.factor
                else:
                    value = unpack(row(side.words, side.word_strides, dim * defines["ROW_BITS"] // 8, torch.int16),
                                   defines["ROW_BITS"])  # fmt: skip
                    if kind == plan.FP8:
                        value = value.view(torch.float8_e4m3fn).float() * call.factor
                    else:
                        table = torch.from_numpy(memory(call.table, np.float32, (2 ** defines["ROW_BITS"],), (1,)))
                        groups = dim // defines["ROW_SPAN"]
                        wide = torch.float32 if defines["WIDE_SCALE"] else torch.float16
                        scales = row(side.scale, side.scale_strides, groups * wide.itemsize, wide).float()
                        value = (table[value.long()].view(groups, -1) * scales[:, None]).flatten()
            elif not call.fill:
                continue
            to = call.to + 2 * (b * call.to_batch + h * call.to_head + i * dim)
            value = value.to(dtype)
            ctypes.memmove(to, value.data_ptr(), 2 * dim)


def _from_pages(call: prefill.Prefill, pool: Tensor, page: int, batch: int) -> Tensor:
    """Rows ``[B, h, kv_len, D]`` where they are those of pages ``[pages, h, page, D]``."""
    if not page:
        return pool
    slots = call.slot + torch.arange(call.kv_len)
    tables = memory(call.pages, np.int32, (batch, call.last_page + 1), (call.pages_batch, 1)).copy()
    assert call.slot % 128 == 0 and pool.shape[2] == page
    table = torch.from_numpy(tables)[:, (slots // page).clamp(max=call.last_page)].long()  # [B, kv_len]
    return pool[table, :, slots % page].transpose(1, 2)


def _prefill(
    call: prefill.Prefill, d: dict, grid: tuple[int, int, int], q: Tensor, k: Tensor, v: Tensor, boxes: Tensor,
    stored: Tensor | None = None,
) -> None:  # fmt: skip
    k, v = _from_pages(call, k, d["K_PAGED"], q.shape[0]), _from_pages(call, v, d["V_PAGED"], q.shape[0])
    assert q.shape[1:3] == (call.kv_heads * call.groups, call.q_len) and k.shape[2] == v.shape[2] == call.kv_len
    assert k.shape[0] * k.shape[1] == call.pairs and q.shape[1] == k.shape[1] * call.groups
    blocks = call.pairs * call.groups // d["PACK"] * call.tiles
    assert call.groups % d["PACK"] == 0 and 0 < grid[0] <= blocks  # each takes a tile, then the next that is left
    queries, keys = torch.arange(call.q_len), torch.arange(call.kv_len)
    types = {0: torch.float16, 1: torch.bfloat16, 2: torch.float32}
    assert (q.dtype, k.dtype, v.dtype) == (types[d["Q_TYPE"]], types[d["Q_TYPE"]], types[d["V_TYPE"]])
    if d.get("STAGED"):
        assert stored.data_ptr() == call.out and stored.stride()[:3] == tuple(call.out_strides)
        assert stored.shape == (*q.shape[:3], call.dv) and stored.dtype == types[d["OUT_TYPE"]]
    for b, h in np.ndindex(*q.shape[:2]):
        first, begin, end = call.first, 0, call.kv_len
        if d["RAGGED"]:
            start, tokens = own(call, b)
            missing = call.length - tokens
            origin = call.origin - (missing if call.relative else 0)
            first -= 0 if call.relative else missing
            begin, end = max(0, start - origin, call.oldest - origin, tokens - call.keep - origin), tokens - origin
        distance = (queries + first)[:, None] - keys
        seen = ((keys >= begin) & (keys < end)).expand_as(distance)
        seen = seen & (distance >= 0) if call.causal or call.window else seen
        seen = seen & (distance < call.window) if call.window else seen
        s = q[b, h].double() @ k[b, h // call.groups].double().T * call.scale
        s = call.softcap * torch.tanh(s / call.softcap) if d["SOFTCAP"] else s
        if d["MASK"]:
            size, strides = np.dtype(_MASKS[d["MASK"]]).itemsize, tuple(call.mask_strides)
            at = call.mask + size * (b * strides[0] + h * strides[1])
            mask = torch.from_numpy(memory(at, _MASKS[d["MASK"]], tuple(s.shape), strides[2:]).copy())
            if d["MASK_BOXES"]:
                boxed = boxes.expand(*q.shape[:2], *s.shape)[b, h]
                assert torch.equal(mask, boxed.contiguous().view(mask.dtype))
            if d["MASK"] == 1:
                seen = seen & mask
            else:
                mask = (mask.view(torch.bfloat16) if d["MASK"] == 4 else mask).double()
                slope = ctypes.c_float.from_address(call.slopes + 4 * h).value if d["ALIBI"] else 1.0
                seen, s = seen & (mask > -65504.0), s + slope * mask.nan_to_num()
            assert d.get("MAPPED", bool(call.map)) == bool(call.map)
            if call.map:
                rows = 64 * d.get("GROUPS", 1) // d["PACK"]
                tiles = tuple(-(-n // t) for n, t in zip(s.shape, (rows, d["KEYS"])))
                at = call.map + b * call.map_strides[0] + h * call.map_strides[1]
                states = torch.from_numpy(memory(at, np.uint8, tiles, (call.map_strides[2], 1)).copy())
                full = states.repeat_interleave(rows, 0).repeat_interleave(d["KEYS"], 1)[: s.shape[0], : s.shape[1]]
                assert not (seen & (full == 0)).any(), "the map skips what the mask shows"
        s = s.masked_fill(~seen, -torch.inf)
        lse = memory(call.lse + 4 * (b * call.lse_strides[0] + h * call.lse_strides[1]), np.float32, (call.q_len,), (1,))
        of, strides = d["OUT_TYPE"], tuple(call.out_strides)
        kind = (np.float16, np.int16, np.float32)[of]
        at = call.out + (b * strides[0] + h * strides[1]) * np.dtype(kind).itemsize
        out = memory(at, kind, (call.q_len, call.dv), (strides[2], 1))
        sink = torch.full((call.q_len,), ctypes.c_float.from_address(call.sinks + 4 * h).value if call.sinks else -np.inf)
        sink = torch.from_numpy(lse.copy()) if call.joined else sink
        top = torch.maximum(s.amax(1), sink).clamp(min=-1e300)
        weights, before = torch.exp(s - top[:, None]), torch.exp(sink - top)
        total = weights.sum(1) + before
        tiles = begin // d["KEYS"] * d["KEYS"], -(-end // d["KEYS"]) * d["KEYS"]  # others are not read
        read = (keys >= tiles[0]) & (keys < tiles[1])
        read = (read & (keys >= begin) & (keys < end) if d["CLEARS"] else read)[:, None]
        values = torch.where(read, v[b, h // call.groups][:, : call.dv].double(), 0.0)
        result = weights @ values * call.v_scale
        if call.joined:
            assert of == 2
            result = result + before[:, None] * torch.from_numpy(out.copy())
        result = torch.where(total[:, None] > 0, result / total[:, None], 0.0)
        lse[:] = torch.where(total > 0, top + total.log(), -torch.inf).float().numpy()
        out[:] = result.to(types[of]).view(torch.int16).numpy() if of == 1 else result.to(types[of]).numpy()
