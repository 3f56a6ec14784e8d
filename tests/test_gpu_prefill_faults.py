"""Can the suite fail on prefill? Known mistakes are planted in its CUDA C++, and the comparison must notice.

None of them makes a kernel wait forever. That edits find their place is tested without a GPU too.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from test_gpu_faults import harness

from gyrokv.backends import gpu
from gyrokv.backends.gpu import nvrtc
from gyrokv.cases import Case, case

BF16, F16 = torch.bfloat16, torch.float16
SIZES = dict(batch=2, q_heads=8, kv_heads=2, q_len=200, kv_len=333, dtype=BF16)
ADDITIVE = dict(mask="additive", mask_dtype=BF16, masked=-1e5)


class Fault(NamedTuple):
    """``edits``: file, a piece of it, there once, and what it becomes. ``settings``: of the case that must notice."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    settings: dict
    dim: int = 128
    bound: float = gpu.BOUND

    @property
    def case(self) -> Case:
        return case("bf16", "bf16", (self.dim, self.dim), **(SIZES | self.settings)).on("cuda")


def shared(old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    """In what all prefill kernels include."""
    return (("prefill.cuh", old, new),)


def hopper(old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    return (("hopper_prefill.cuh", old, new),)


FAULTS = (
    Fault("all_rows_are_the_first_head's", hopper("head = tile.head + warp * 16 / TURN;", "head = tile.head;"), {}),
    Fault("rows_of_a_head_follow_those_of_the_next",
          hopper("sixtyfour * TURN + warp * 16 % TURN + lane / 4;", "sixtyfour * 64 + warp * 16 + lane / 4;"),
          dict(causal=True)),
    Fault("a_query_sees_the_key_after_its_own",
          shared("min(end, position) :", "min(end, position + 1) :"), dict(causal=True)),
    Fault("the_first_key_of_a_window_is_dropped",
          shared("position - p.window + 1 - key", "position - p.window + 2 - key"), dict(causal=True, window=40)),
    Fault("the_denominator_is_not_rescaled", shared("      total[r] *= factor[r];\n", ""), dict(kv_len=2000)),
    Fault("the_output_is_not_rescaled", (("prefill.cu", "      rescale(false);\n", ""),), dict(kv_len=2000), 512),
    Fault("sinks_are_not_in_the_denominator",
          shared("sum * exp2_fast(reached - most) + exp2_fast(sink - most);", "sum * exp2_fast(reached - most);"),
          dict(sinks=True)),
    Fault("a_term_of_the_cap_is_off", hopper("{0.863379568f,", "{0.853379567f,"), dict(softcap=9.0)),
    Fault("scores_beyond_the_cap_are_off", hopper("fabsf(x * twice)", "fabsf(x)"), dict(softcap=2.0)),
    Fault("a_mask_is_a_row_off", hopper("first + lane % 16,", "first + (lane + 1) % 16,"), ADDITIVE),
    Fault("a_mask_of_bytes_is_a_row_off", hopper("first + lane / 4, lane % 4", "first + (lane / 4 + 1) % 8, lane % 4"),
          dict(mask="bool")),
    Fault("a_mask_has_the_unit_of_exponents", hopper("/ (ANY_SCALE ? 1.0f : p.scale); }", "/ 1.0f; }"), ADDITIVE),
    Fault("the_lowest_value_is_a_number", hopper("u32 y = lowest_to_infinity<MASK == 4>(x[0]);", "u32 y = x[0];"),
          dict(mask="additive", mask_dtype=F16, masked=-65504.0)),
    Fault("the_lowest_float_is_a_number",
          hopper("hide_least(y[0], __fmaf_rn(y[0], factor, a));", "__fmaf_rn(y[0], factor, a);"),
          dict(mask="additive", mask_dtype=torch.float32, masked=-65504.0)),
    Fault("a_mask's_first_stage_is_read_again", hopper("read(ring.stage * MaskTile::BYTES,", "read(0,"), ADDITIVE),
    Fault("16_bytes_are_of_the_first_tile", hopper("copy<16>(to, block)", "copy<16>(to, 0)"), ADDITIVE | dict(kv_len=336)),
    Fault("4_bytes_are_of_the_first_tile", hopper("copy<4>(to, block)", "copy<4>(to, 0)"), ADDITIVE | dict(kv_len=334)),
    Fault("words_are_of_the_first_tile", hopper("copy_words<true>(to, block)", "copy_words<true>(to, 0)"),
          ADDITIVE),
    Fault("words_lose_their_second_half", hopper("shift + bytes > 4 ? words[1] : 0;", "0;"), ADDITIVE),
    Fault("heads_take_the_first_one's_mask", hopper("span / TURN % PACK * p.mask_head", "0 * p.mask_head"),
          ADDITIVE | dict(mask_axes="bhqk")),
    Fault("a_head_takes_another_slope", hopper("p.slopes[head]", "p.slopes[0]"), ADDITIVE | dict(alibi=8.0)),
    Fault("a_tile_to_look_at_counts_as_visible", shared("state(at) == 1); }", "state(at) == 2); }"),
          ADDITIVE | dict(block_map=True)),
    Fault("a_tile_that_some_see_is_skipped", shared("state(at) == 0) --at;", "state(at) != 1) --at;"),
          ADDITIVE | dict(block_map=True)),
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_planted_fault_is_noticed(fault, problem, backend_here):
    backend_here("gpu")
    assert harness(fault, [fault.case], problem) == [], "without the fault"
    with nvrtc.sources(fault.edits):
        assert harness(fault, [fault.case], problem), f"{fault.case} does not notice"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_every_fault_is_one_of_the_sources(fault):
    """A fault whose anchor is gone plants nothing."""
    with nvrtc.sources(fault.edits):
        assert nvrtc._sources() != nvrtc._files()
