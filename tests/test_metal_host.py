"""Can the executor of Metal source be trusted? What is right must run to the right values, what is wrong be found."""

from __future__ import annotations

import re

import pytest
import torch
from metal_host.entries import library, span
from metal_host.host import SCHEDULES, KernelFault, compiler, translate

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++ to compile the executor of Metal source with")

SIGNATURE = """
#include <metal_stdlib>
using namespace metal;
kernel void k(device const float* a [[buffer(0)]], device float* out [[buffer(1)]], constant long* n [[buffer(2)]],
    uint3 group [[threadgroup_position_in_grid]], uint3 grid [[thread_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]], uint sg [[simdgroup_index_in_threadgroup]],
    uint index [[thread_index_in_threadgroup]]) {
"""


def run(body: str, a: torch.Tensor, out: torch.Tensor, schedule: str, *, groups=1, threads=64, n=(0,)) -> None:
    numbers = torch.tensor(n)
    library(f"{SIGNATURE}{body}\n}}").run("k", [span(a), span(out), span(numbers)], (groups,), threads, schedule)


def finding(body: str, schedule: str = "forward", **options) -> str:
    """What the executor says of a wrong kernel over 64 values."""
    with pytest.raises(KernelFault) as fault:
        run(body, torch.ones(64), torch.zeros(64), schedule, **options)
    return str(fault.value)


SUM = """
  threadgroup float x[64];
  x[index] = a[64 * group.x + index];
  {barrier}
  float total = 0.0f;
  for (int i = 0; i < 64; ++i) total += x[i];
  out[64 * group.x + index] = total;
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_right_kernel_runs(schedule):
    """A sum through threadgroup memory, several threadgroups: no false alarm, and the values of each."""
    a = torch.randn(3 * 64)
    out = torch.zeros(3 * 64)
    run(SUM.format(barrier=BARRIER), a, out, schedule, groups=3)
    torch.testing.assert_close(out, a.view(3, 64).sum(1).repeat_interleave(64))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "barrier", ["", "simdgroup_barrier(mem_flags::mem_threadgroup);", "threadgroup_barrier(mem_flags::mem_none);"]
)
def test_a_dropped_barrier_is_a_race(barrier, schedule):
    """Also one that orders too little: only a SIMD-group, or no memory."""
    said = finding(SUM.format(barrier=barrier), schedule)
    assert "race: x byte" in said and "at line" in said


def test_a_write_after_a_read_is_a_race():
    """The second use of an array needs a barrier before it as well as after."""
    again = "x[index] = 0.0f;" + BARRIER
    assert "not ordered after the read" in finding(SUM.format(barrier=BARRIER) + again)


NEIGHBOUR = "threadgroup float x[64]; x[index] = a[index]; {barrier} out[index] = x[index ^ 1];"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_simd_barriers_order_their_lanes(schedule):
    """A SIMD-group's barrier is enough for its own lanes, and running in step is not."""
    a, out = torch.arange(64.0), torch.zeros(64)
    run(NEIGHBOUR.format(barrier="simdgroup_barrier(mem_flags::mem_threadgroup);"), a, out, schedule)
    assert torch.equal(out, torch.tensor([i ^ 1 for i in range(64)]).float())
    assert "race" in finding(NEIGHBOUR.format(barrier="float s = simd_sum(a[index]);"), schedule)


@pytest.mark.parametrize(
    "body, said",
    {
        "out[index] = a[index + 1];": "out of bounds: read of 4 bytes at 256 of a[256 bytes] at line",
        "out[index] = a[long(index) - 1 + n[0]];": "read of 4 bytes at -4 of a[256 bytes]",
        "out[64 * 64 * 64 + index] = 0.0f;": "out of bounds: write of 4 bytes at 1048576 of out[256 bytes]",
        "threadgroup float x[32]; x[index] = 1.0f;": "of x[128 bytes] at line",
        "threadgroup float x[32]; threadgroup float y[32]; x[lane] = y[lane] = 1.0f; out[index] = x[40];": "of x[128 bytes]",
        "const_cast<float*>(a)[index] = 1.0f;": "write to the read-only buffer a",
        "out[0] = float(index);": "race: out byte 0",
        "threadgroup float x[8200]; x[index] = 0.0f;": "more than 32768 bytes",
        "if (index < 40) threadgroup_barrier(mem_flags::mem_threadgroup);": "stuck: 40 threads at a barrier",
        "if (lane < 16) out[index] = simd_sum(a[index]);": "32 at the SIMD-group operation simd_sum, 32 have ended",
        "out[index] = lane < 16 ? simd_sum(a[index]) : simd_max(a[index]);": "meet at simd_",
        "out[index] = simd_shuffle_xor(a[index], ushort(lane + 1));": "a shuffle from a lane that is none of 0 to 31",
    }.items(),
)  # fmt: skip
def test_what_is_wrong_is_found(body, said):
    text = finding(body)
    assert said in text, text


def test_threadgroup_memory_begins_as_nan():
    """Whoever reads what nobody wrote gets NaN, not the zeros of a fresh page."""
    out = torch.zeros(64)
    run("threadgroup float x[64]; out[index] = x[index];", torch.ones(64), out, "forward")
    assert bool(out.isnan().all())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_simd_group_operations(schedule):
    """Each against what MSL says of it."""
    a, lanes = torch.randn(32), torch.arange(32)
    for text, want in (
        ("simd_sum(x)", a.sum().expand(32)),
        ("simd_max(x)", a.max().expand(32)),
        ("simd_shuffle_xor(x, 5)", a[lanes ^ 5]),
        ("simd_broadcast(x, 7)", a[7].expand(32)),
        ("simd_any(lane == 9) && !simd_any(lane == 32)", torch.ones(32)),
        ("simd_all(lane < 32) && !simd_all(lane < 31)", torch.ones(32)),
    ):
        out = torch.zeros(32)
        run(f"float x = a[index]; out[index] = {text};", a, out, schedule, threads=32)
        torch.testing.assert_close(out, want, msg=text)


MATRICES = """
  threadgroup float x[64]; threadgroup float y[64];
  for (int i = lane; i < 64; i += 32) x[i] = a[i];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_float8x8 left, right;
  simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(2.0f);
  simdgroup_load(left, x, 8);
  simdgroup_load(right, x, 8, ulong2(0, 0), true);
  simdgroup_multiply_accumulate(sum, left, right, sum);
  simdgroup_store(sum, y, 8);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = lane; i < 64; i += 32) out[i] = y[i];
"""


def test_matrices():
    """A product with a transposed operand."""
    a, out = torch.randn(64), torch.zeros(64)
    run(MATRICES, a, out, "random", threads=32)
    x = a.view(8, 8)
    torch.testing.assert_close(out.view(8, 8), 2.0 + x @ x.T)


def test_halves_round_as_torch_does():
    """Every rounding case: subnormals, ties, overflow, signs; both directions, all 65536 patterns."""
    bits = torch.arange(65536, dtype=torch.int32)
    for kind, dtype in (("half", torch.float16), ("bfloat", torch.bfloat16)):
        exact = bits.to(torch.int16).view(dtype).float()
        tested = exact[torch.isfinite(exact)]
        near = torch.nextafter(tested, torch.full_like(tested, 3e38))
        middle = ((tested.double() + tested.roll(1).double()) / 2).float()
        a = torch.cat((tested, near, middle, torch.tensor([65519.9, 65520.0, 1e-8, 3e-8, -2.9e-8])))
        a = torch.nn.functional.pad(a, (0, -len(a) % 64))
        out = torch.zeros_like(a)
        run(f"out[grid.x] = float({kind}(a[grid.x]));", a, out, "forward", groups=len(a) // 64)
        assert torch.equal(out, a.to(dtype).float())


def test_what_cannot_be_translated_is_an_error():
    """A threadgroup variable that silently became a local one would give wrong answers."""
    with pytest.raises(KernelFault, match="threadgroup variable of a form"):
        translate("kernel void k(device float* a) { threadgroup float x[2][3]; }")
    with pytest.raises(KernelFault, match="the executor knows no attribute thread_position_in_hyperspace"):
        translate("kernel void k(uint i [[thread_position_in_hyperspace]]) { }")
    with pytest.raises(KernelFault, match="buffers in order only"):
        translate("kernel void k(device float* a [[buffer(1)]]) { }")
    with pytest.raises(KernelFault, match=re.compile("cannot compile.*undefined_function", re.S)):
        library("kernel void k(device float* a) { a[0] = undefined_function(); }")
