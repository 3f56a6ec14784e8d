"""Can the suite fail on prefill? Known mistakes are planted in its CUDA C++, and the comparison must notice.

None of them makes a kernel wait forever. That edits find their place is tested without a GPU too.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from test_gpu_faults import harness

from gyrokv import attend
from gyrokv.backends import gpu
from gyrokv.backends.gpu import nvrtc
from gyrokv.cases import Case, case
from gyrokv.testing import inputs
from gyrokv.view import KVView

BF16, F16 = torch.bfloat16, torch.float16
SIZES = dict(batch=2, q_heads=8, kv_heads=2, q_len=200, kv_len=333, dtype=BF16)
ADDITIVE = dict(mask="additive", mask_dtype=BF16, masked=-1e5)
BOXES = ADDITIVE | dict(kv_len=336)  # rows of 16 bytes times a number
FLOATS = BOXES | dict(mask_dtype=torch.float32)


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


def narrow(old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    return (("prefill_narrow.cu", old, new),)


FAULTS = (
    Fault("all_rows_are_the_first_head's", hopper("tile.head + head_of(2 * warp + r);", "tile.head;"), {}),
    Fault("rows_of_a_head_follow_each_other",
          hopper("position_of(PACK > 1 ? 2 * warp : 2 * warp + r) + lane / 4;", "(2 * warp + r) * 8 % TURN + lane / 4;"),
          dict(causal=True)),
    Fault("queries_of_a_box_are_those_of_the_first",
          hopper("sixtyfour * TURN + first), tile.head", "sixtyfour * TURN), tile.head"), {}),
    Fault("a_query_sees_the_key_after_its_own",
          shared("min(end, position) :", "min(end, position + 1) :"), dict(causal=True)),
    Fault("the_first_key_of_a_window_is_dropped",
          shared("position - p.window + 1 - key", "position - p.window + 2 - key"), dict(causal=True, window=40)),
    Fault("blocks_of_keys_begin_with_multiples", narrow("k_map, c * 64, token,", "k_map, c * 64, token - tile.shift,"),
          dict(causal=True, window=40), 64),
    Fault("the_denominator_is_not_rescaled", shared("      total[r] *= factor[r];\n", ""), dict(kv_len=2000)),
    Fault("the_output_is_not_rescaled", (("prefill.cu", "      rescale(false);\n", ""),), dict(kv_len=2000), 512),
    Fault("sinks_are_not_in_the_denominator",
          shared("all = __fmaf_rn(sum, here, there);", "all = sum * here;"),
          dict(sinks=True)),
    Fault("rounded_sums_are_not_rescaled",
          shared("      if (ROUNDED) rounded[r] *= factor[r];\n", ""), dict(kv_len=2000), 512),
    Fault("rounded_sums_forget_every_other_key",
          shared("rounded[r] += V_BF16 ? __uint_as_float(w & 0xFFFF0000u) : f32_of_f16(w >> 16);", ""), {}, 512),
    Fault("a_term_of_the_cap_is_off", hopper("{{0.99992484f,", "{{0.98992484f,"), dict(softcap=60.0)),
    Fault("scores_beyond_the_cap_are_off", hopper("fabsf(x * twice)", "fabsf(x)"), dict(softcap=2.0)),
    Fault("sums_of_squares_are_within_any_cap", hopper("? half * half : half", "? INFINITE : half"),
          dict(softcap=2.0), 64),
    Fault("magnitudes_are_within_any_cap", hopper("? half * half : half", "? half * half : INFINITE"),
          dict(softcap=2.0)),
    Fault("sums_tell_of_no_large_score", hopper("fmaxf(own[0], own[1]) <= cap.most", "true"),
          dict(softcap=30.0, scale=2.0), 64),
    Fault("a_mask_is_a_row_off", hopper("+ lane % 8, lane / (COMMON", "+ (lane + 1) % 8, lane / (COMMON"), ADDITIVE),
    Fault("a_mask_of_bytes_is_a_row_off", hopper("row(0) + lane / 4,", "row(0) + (lane / 4 + 1) % 8,"),
          dict(mask="bool")),
    Fault("a_mask_has_the_unit_of_exponents", hopper("1.0f / (ANY_SCALE ? 1.0f : p.scale));", "1.0f);"), ADDITIVE),
    Fault("the_lowest_value_is_a_number", hopper("          mask.hide(s);\n", ""),
          dict(mask="additive", mask_dtype=F16, masked=-65504.0)),
    Fault("the_lowest_value_times_a_slope_is_a_number", hopper("!AGAIN && y <= LEAST", "false && y <= LEAST"),
          dict(mask="additive", mask_dtype=F16, masked=-65504.0, alibi=8.0)),
    Fault("a_mask's_first_stage_is_read_again", hopper("(at + ring.stage * MaskTile::BYTES)", "(at)"), ADDITIVE),
    Fault("16_bytes_are_of_the_first_tile", hopper("copy<16>(to, block, first)", "copy<16>(to, 0, first)"),
          dict(mask="bool", kv_len=336), 256),
    Fault("4_bytes_are_of_the_first_tile", hopper("copy<4>(to, block,", "copy<4>(to, 0,"), ADDITIVE | dict(kv_len=334)),
    Fault("words_are_of_the_first_tile", hopper("copy_words<true>(to, block, first)", "copy_words<true>(to, 0, first)"),
          ADDITIVE),
    Fault("words_lose_their_second_half", hopper("shift + bytes > 4 ? words[1] : 0;", "0;"), ADDITIVE),
    Fault("heads_take_the_first_one's_mask", hopper("span / TURN * p.mask_head", "0 * p.mask_head"),
          ADDITIVE | dict(mask_axes="bhqk")),
    Fault("a_head_takes_another_slope", hopper("p.slopes[rows.head[r]]", "p.slopes[0]"), ADDITIVE | dict(alibi=8.0)),
    Fault("a_tile_to_look_at_counts_as_visible", shared("state(at) == 1); }", "state(at) == 2); }"),
          ADDITIVE | dict(block_map=True)),
    Fault("threads_of_a_quad_do_not_trade_columns", hopper("      turn_quad(x, t);\n", ""), {}, 256),
    Fault("stored_columns_are_not_swizzled", narrow("((column ^ lane % 8) << 4)", "(column << 4)"), {}),
    Fault("all_columns_are_stored_in_the_first_ones_place", narrow("map, c * 64, row, head,", "map, 0, row, head,"), {}),
    Fault("warps_store_in_the_first_one's_place", narrow("(PACK > 1 ? position_of(2 * warp) : 16 * warp), h", "0, h"), {}),
    Fault("warps_store_in_the_first_head's_place", narrow("head = tile.head + head_of(2 * warp);", "head = tile.head;"), {}),
    Fault("a_row_ends_with_the_columns_of_its_begin", hopper("int column = 8 * (j + t);", "int column = 8 * t;"), {}, 512),
    Fault("boxes_of_a_mask_are_those_of_the_first_keys", hopper("block * KEYS + i * (", "i * ("), BOXES),
    Fault("the_second_box_of_a_mask_is_the_first",
          hopper("block * KEYS + i * (BOX / MaskTile::SIZE)", "block * KEYS"), BOXES),
    Fault("all_warpgroups_have_the_boxes_of_the_first", hopper("tile.row + part * TURN, head", "tile.row, head"),
          BOXES | dict(mask_axes="bhqk")),
    Fault("all_warpgroups_have_the_copies_of_the_first", hopper("part * TURN, here);", "0, here);"),
          ADDITIVE | dict(mask_axes="bhqk")),
    Fault("queries_are_not_scaled", narrow("if (SCALED) scale_queries(", "if (false) scale_queries("), ADDITIVE, 64),
    Fault("scores_begin_with_zeros", narrow("i > 0 || SEEDED && masked", "i > 0"), dict(mask="bool"), 64),
    Fault("visible_scores_begin_with_those_before", narrow("i > 0 || SEEDED && masked", "i > 0 || SEEDED"),
          ADDITIVE | dict(block_map=True, kv_len=1000), 64),
    Fault("scores_begin_with_the_first_tile_again", hopper("(at + ring.stage * MaskTile::BYTES)", "(at)"), ADDITIVE, 64),
    Fault("the_lowest_value_is_a_number_to_begin_with", hopper("          mask.hide(s);\n", ""),
          dict(mask="additive", mask_dtype=F16, masked=-65504.0), 64),
    Fault("heads_have_the_boxes_of_the_first", hopper("p.mask_head ? tile.head : 0", "0"), BOXES | dict(mask_axes="bhqk")),
    Fault("the_second_half_of_a_box's_keys_is_the_first", hopper("unit / 4 * MaskTile::NEXT", "0"), BOXES),
    Fault("all_boxes_of_floats_are_the_first", hopper("from + part * MaskTile::NEXT", "from"), FLOATS),
    Fault("a_box_of_floats_is_swizzled", hopper("(IN_ORDER ? byte :", "(false ? byte :"), FLOATS, 64),
    Fault("heads_have_the_floats_of_the_first", hopper("<< 5) + r * APART, x", "<< 5), x"),
          FLOATS | dict(mask_axes="bhqk"), 64),
    Fault("any_guess_is_right", hopper("fmaxf(own[0], own[1]) <= MOST", "true"), dict(mask="bool", causal=True), 64),
    Fault("a_wrong_guess_counts", hopper("if (right) count();", "count();"),
          dict(mask="bool", causal=True)),
    Fault("a_guess_forgets_the_keys_before", hopper("total[0] += own[0],", "total[0] = own[0],"), ADDITIVE, 64),
    Fault("a_tile_that_some_see_is_skipped", shared("state(at) == 0) --at;", "state(at) != 1) --at;"),
          ADDITIVE | dict(block_map=True)),
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_planted_fault_is_noticed(fault, problem, backend_here):
    """Tiles are tall where there are two heights: more of them hold several blocks of keys in part."""
    backend_here("gpu")
    with gpu.forced("tall"):
        assert harness(fault, [fault.case], problem) == [], "without the fault"
    with gpu.forced("tall"), nvrtc.sources(fault.edits):
        assert harness(fault, [fault.case], problem), f"{fault.case} does not notice"


def _lowest_values(dim: int) -> float:
    """How far a mask of the lowest values that do not mean "masked", and of those that do, is from the boolean mask."""
    data = inputs(case("bf16", "bf16", (dim, dim), mask="bool", **(SIZES | dict(kv_len=600))).on("cuda"))
    low = torch.where(data.mask, -65503.0, -65504.0)
    found, expected = (attend(data.q, data.view, mask=m, backend="gpu").float() for m in (low, data.mask))
    return float((found - expected).norm() / expected.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("dim", (64, 128, 512))
def test_a_row_of_low_values_is_looked_at_again(dim, backend_here):
    """A score near -65504 has 6 bits after the point."""
    backend_here("gpu")
    assert _lowest_values(dim) < 3e-2
    trusting = hopper("Mask::AGAIN && top[r] < Mask::LOW ? -INFINITE : top[r] + SLACK", "top[r] + SLACK")
    trusting += hopper("low = Mask::AGAIN && __any_sync", "low = false && __any_sync")
    with nvrtc.sources(trusting):
        assert _lowest_values(dim) > 1e-1


def _far_below(dim: int) -> float:
    """How far the lse of scores is off that are all far below half the cap."""
    q, k = torch.full((1, 8, 200, dim), -1.0), torch.linspace(45.0, 60.0, 512)[:, None].expand(1, 2, 512, dim) * 8 / dim
    q, k = q.to("cuda", BF16), k.to("cuda", BF16)
    scores = 30.0 * torch.tanh(q[0, 0, :1].double() @ k[0, 0].double().T / 8 / 30.0)
    _, lse = attend(q, KVView.of(k, k), scale=1 / 8, softcap=30.0, causal=False, backend="gpu", return_lse=True)
    return float((lse.double() - scores.logsumexp(1)).abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("dim", (64, 128))
def test_scores_far_below_half_the_cap_are_capped(dim, backend_here):
    """Their weights are too small to be seen by the sums of a block."""
    backend_here("gpu")
    assert _far_below(dim) < 1e-2
    with nvrtc.sources(hopper("fminf(own[0], own[1]) >= cap.least", "true")):
        assert _far_below(dim) > 1e-1


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_every_fault_is_one_of_the_sources(fault):
    """A fault whose anchor is gone plants nothing."""
    with nvrtc.sources(fault.edits):
        assert nvrtc._sources() != nvrtc._files()
