"""Can the tests of the Metal kernels fail? Barriers are dropped one by one, and known mistakes planted in their text."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
from metal_host.entries import Executor
from metal_host.host import KernelFault
from metal_host.problems import block_map_of, mask_of_all_states, needs_compiler, run

from gyrokv import BlockMap, Codec
from gyrokv.backends import metal
from gyrokv.backends.metal import kernels, launches
from gyrokv.backends.metal.launches import Tuning
from gyrokv.cases import case
from gyrokv.formats import FORMATS
from gyrokv.testing import assert_matches, inputs


def wrong(kernel: str, edit) -> str:
    """What is found when kernels of a changed source run on the kernel's cases; empty if nothing is."""
    tuning, cases = FAULTY[kernel]
    for one, schedule in product(cases, ("forward", "random")):
        data = inputs(one)
        if one.spec.block_map:
            data.mask[..., :128] = False  # blocks that are skipped, two and more in a row
        try:
            assert_matches(data, *run(data, Executor("torch", schedule, edit), tuning, block_map_of(data)))
        except KernelFault as fault:
            return str(fault)
        except AssertionError as error:
            return f"wrong values: {error}"
    return ""


BARRIER = re.compile(r"(?:threadgroup|simdgroup)_barrier\(mem_flags::mem_threadgroup\);")
ONE = dict(batch=1, q_heads=2, kv_heads=2)
FAULTY = {
    "decode": (Tuning(decode_rows=10**9, split_groups=1), [case("turbo4", "q8_0", q_len=2, kv_len=300, **ONE)]),
    "prefill": (
        Tuning(decode_rows=0, split_groups=1),
        [
            case("turbo4", "q8_0", (96, 96), q_len=9, kv_len=240, mask="bool", block_map=True, **ONE),
            case("turbo4", "q8_0", (96, 96), q_len=70, kv_len=5, causal=True, **ONE),  # tiles that see no key
        ],
    ),
}


def without_barrier(name: str, n: int):
    """An edit that drops the n-th barrier of a kernel's file, from programs that hold the file."""
    body = kernels._text(f"{name}.h")
    spot = list(BARRIER.finditer(body))[n]
    changed = body[: spot.start()] + body[spot.end() :]
    return lambda source: source.replace(body, changed)


def count_barriers(name: str) -> int:
    return len(BARRIER.findall((kernels.MSL / f"{name}.h").read_text()))


@needs_compiler
@pytest.mark.parametrize("name, n", [(name, n) for name in ("decode", "prefill") for n in range(count_barriers(name))])
def test_every_barrier_is_needed_and_missed(name, n):
    """Without any one of them the executor must report a race: it sees each, and none is there for nothing."""
    assert "race" in wrong(name, without_barrier(name, n))


@needs_compiler
@pytest.mark.parametrize("n", range(count_barriers("encode")))
def test_every_barrier_of_the_encoder_is_needed(n):
    found = ""
    for name in ("turbo4", "q8_0", "tq6", "tq6.v1"):
        codec = Codec(FORMATS[name], 256)
        machine = Executor("torch", "random", without_barrier("encode", n))
        try:
            metal._encode(machine, codec, torch.randn(1, 1, 3, 256))
        except KernelFault as fault:
            found = str(fault)
    assert "race" in found


EDITS = {
    "a wrong stride of keys": ("all", "kv_head * c.k_h", "kv_head * c.k_t", ""),
    "a wrong stride of tokens": ("all", "* c.v_t,", "* c.v_h,", ""),
    "a block too many": ("all", "t1 = min(", "t1 = 0 * min(", ""),
    "keys past the end": ("decode", "t1 = min(32, seen.high - position)", "t1 = 32", ""),
    "keys past the capacity": (
        "decode",
        "wrapped(slot + u, int(c.capacity))",
        "slot + u + int(c.capacity)",
        "out of bounds",
    ),
    "no rescale of the output": ("decode", "acc[r][j] *= rescale", "acc[r][j] *= 1.0f", "wrong values"),
    "no rescale of the sum": ("decode", "total[r] * rescale + simd_sum", "total[r] + simd_sum", "wrong values"),
    "no rescale of tiles": ("prefill", "if (any)\n", "if (false)\n", "wrong values"),
    "no rescale of a tile's sum": ("prefill", "total * rescale + sum", "total + sum", "wrong values"),
    "another row's rescale": ("prefill", "own % 8 * 9", "(own + 1) % 8 * 9", "wrong values"),
    "keys of another block": ("prefill", "stage[e] = slot < 0 || d >= DK", "stage[e] = d >= DK", ""),
    "a part without its weight": ("decode", "value += factor[s] * parts", "value += parts", "wrong values"),
    "the scale of another group": ("all", "scale[d / (SPAN ? SPAN : 1)]", "scale[0]", "wrong values"),
    "planes in another order": ("all", "W * (d / n)", "W * (16 / W - 1 - d / n)", "wrong values"),
    "no barrier of memory": ("prefill", "mem_flags::mem_threadgroup", "mem_flags::mem_none", "race"),
    "lanes that run in step": ("prefill", "threadgroup_barrier", "simdgroup_barrier", "race"),
}


@needs_compiler
@pytest.mark.parametrize("name", EDITS)
def test_planted_faults_are_found(name):
    """Known mistakes in the kernels' text, each where the executor or the reference must notice it."""
    where, old, new, said = EDITS[name]
    for kernel in ("decode", "prefill") if where == "all" else (where,):

        def edit(source: str) -> str:
            assert old in source or "merge<" in source
            return source.replace(old, new)

        found = wrong(kernel, edit)
        assert found and said in found, found


MAP_EDITS = {
    "a tile past the last key": ("min((tile + 1) * c.map_keys, c.stop)", "(tile + 1) * c.map_keys", ""),
    "a tile past the last row": ("min((group.y + 1) * c.map_rows, c.q_len)", "(group.y + 1) * c.map_rows", "out of bounds"),
    "tiles past the last": ("if (tile >= tiles) return;", "", ""),
    "another stride": ("i * c.mask_q + t * c.mask_k", "i * c.mask_k + t * c.mask_q", ""),
    "another head": ("head % c.q_heads * c.mask_h", "head / c.q_heads * c.mask_h", "wrong states"),
    "a limit that is seen": ("bias <= MASKED", "bias < MASKED", "wrong states"),
    "a bias that is lost": ("bias == 0.0f", "bias > MASKED", "wrong states"),
    "the first row alone": ("(whole || !some)", "i == 0", "wrong states"),
    "a lane's own opinion": ("some = simd_any(some);", "", ""),
    "every lane writes": ("if (lane == 0) states", "states", "race"),
}


@needs_compiler
@pytest.mark.parametrize("name", ["none", *MAP_EDITS])
def test_planted_faults_of_the_block_map_are_found(name):
    old, new, said = MAP_EDITS.get(name, ("", "", ""))
    found, mask = "", mask_of_all_states(70, 150, torch.float32)
    want = BlockMap.build(mask, (64, 64)).states

    def edit(source: str) -> str:
        assert old in source
        return source.replace(old, new) if old else source

    for schedule in ("forward", "random"):
        try:
            if not torch.equal(launches.states(Executor("torch", schedule, edit), mask, (64, 64)), want):
                found = found or "wrong states"
        except KernelFault as fault:
            found = found or str(fault)
    assert bool(found) == bool(old) and said in found, found


@needs_compiler
def test_the_faultless_kernels_pass():
    """The tests above would pass if everything failed."""
    for kernel in FAULTY:
        assert wrong(kernel, lambda source: source) == ""
