"""Are pointers of the Metal kernels in the right address spaces? A compiler for another language with such spaces says."""

from __future__ import annotations

import re

import pytest
import torch
from metal_host import spaces
from metal_host.entries import mlx_kernel

from gyrokv.backends.metal import kernels, torch_mps
from gyrokv.formats import FORMATS

pytestmark = pytest.mark.skipif(spaces.clang() is None, reason="no clang: install it, or `pip install ziglang`")
INPUTS = {
    "k_levels": torch.float32, "v_levels": torch.float32, "heads": torch.float32, "starts": torch.int64,
    "mask": torch.bool, "map": torch.uint8, "parts": torch.float32, "lses": torch.float32, "x": torch.bfloat16,
    "signs": torch.float32, "levels": torch.float32, "boundaries": torch.float32,
}  # fmt: skip


def programs():
    """(program, dtypes of inputs and outputs): each kernel, for rows of words, dense rows, and both."""

    def side(name):
        fmt = FORMATS[name]
        return kernels.side(fmt, 64, fmt.layout(64)[0])

    for (k, v), q in (
        (("turbo3", "bf16"), torch.bfloat16), (("f16", "tq5.v1"), torch.float16), (("fp8_e4m3", "q8_0"), torch.float32),
    ):  # fmt: skip
        dtypes = dict(INPUTS, q=q)
        for name, row in (("k", FORMATS[k]), ("v", FORMATS[v])):
            dtypes[f"{name}_words"] = row.dtype if row.is_dense else torch.int16
            scaled = row.has_levels
            dtypes[f"{name}_scale"] = getattr(torch, row.scale_dtype) if scaled else dtypes[f"{name}_words"]
        for program in (kernels.decode(2, side(k), side(v), True, True), kernels.prefill(side(k), side(v), True, True)):
            yield program, dtypes, (torch.float32, torch.float32)
    yield kernels.merge(64), INPUTS, (torch.float32, torch.float32)
    for mask in (torch.bool, torch.float32, torch.float16):
        yield kernels.block_map(), INPUTS | dict(mask=mask), (torch.uint8,)
    for name in ("turbo4", "q8_0", "q4_0", "tq6", "tq8.v1", "fp8_e4m3"):
        scale = getattr(torch, FORMATS[name].scale_dtype)
        yield kernels.encode(FORMATS[name], 64, FORMATS[name].rotation), INPUTS, (torch.int16, scale)


PROGRAMS = list(programs())


def torch_source(program, inputs, outputs) -> str:
    return torch_mps.source(program, [inputs[name] for name in program.inputs], outputs)


def mlx_source(program, inputs, outputs) -> str:
    """With masks and starts so small that MLX puts them into another address space."""
    few = ("mask", "map", "starts", "lses", "floats")
    given = [(name, inputs[name], 1 if name in few else 100) for name in program.inputs]
    given += [("ints", torch.int64, len(program.ints)), ("floats", torch.float32, len(program.floats))]
    kernel = mlx_kernel("custom_kernel", given, list(zip(program.outputs, outputs)), program.body)
    return program.header + kernel.replace("[[kernel]]", "kernel")


@pytest.mark.parametrize("source", [torch_source, mlx_source])
@pytest.mark.parametrize("n", range(len(PROGRAMS)), ids=lambda n: f"{n}-{PROGRAMS[n][0].kernel}")
def test_address_spaces_agree(n, source):
    """A pointer to device memory that is passed as one to threadgroup memory: the executor would run it."""
    found = spaces.errors(source(*PROGRAMS[n]))
    assert not found, found[:3000]


@pytest.mark.parametrize(
    "old, new",
    {
        "threadgroup const float* table": "device const float* table",
        "threadgroup float* parts": "float* parts",
        "thread const Call& c": "threadgroup const Call& c",
        "device float* out, device float* lse": "device float* out, constant float* lse",
        "tops[simdgroup * R + r] = top[r];": "device float* p = tops; p[0] = top[r];",
        "threadgroup float* k_table": "thread float* k_table",
    }.items(),
)
def test_mixed_up_spaces_are_found(old, new):
    """One qualifier changed or left out at a time."""
    source = torch_source(*PROGRAMS[0])
    source = re.sub(r",\n +", ", ", source)
    assert old in source
    assert "error" in spaces.errors(source.replace(old, new))
