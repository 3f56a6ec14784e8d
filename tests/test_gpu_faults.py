"""Can the suite fail? Known kernel bugs are planted in the CUDA C++ of the GPU backend, and the comparison must notice.
Missing waits are not among them: whether a copy arrives in time without one is luck.

A fault is pieces of a source file and what replaces them; kernels are compiled anew from the edited sources. The cases
are those of the suite that need the piece. Everything but the run itself is tested without a GPU too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import gpu_record
import pytest
import torch

from gyrokv.backends import gpu
from gyrokv.backends.gpu import nvrtc, plan
from gyrokv.cases import Case, cases
from gyrokv.formats import KVFormat
from gyrokv.spec import AttentionSpec
from gyrokv.testing import assert_matches, inputs

_MOST = 6  # cases that are run for one fault, spread over all that are relevant
_FLOAT32 = 3e-5  # relative error of kernels whose operands are all of two terms
_CAP = "float y = x + slope[j][e] * bias; x = (SOFTCAP ? p.softcap * tanhf(y / p.softcap) : y) * LOG2E;"


class Fault(NamedTuple):
    """``edits``: file, a piece of it, there once, and what it becomes. ``relevant``: cases of which one must notice.

    ``splits``: how many blocks share a head's keys; 0 leaves it to the plan. One block makes warps take many tiles.
    """

    name: str
    relevant: Callable[[Case], bool]
    edits: tuple[tuple[str, str, str], ...]
    splits: int = 0
    bound: float = gpu.BOUND


def spec(test: Callable[[AttentionSpec], bool]) -> Callable[[Case], bool]:
    return lambda case: test(case.spec)


def attend(old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    return (("attend.cu", old, new),)


def score(old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    return (("score.cuh", old, new),)


def values(old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    return (("values.cuh", old, new),)


def codec(old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    return (("codec.cuh", old, new),)


def turn(old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    return (("turn.cuh", old, new),)


def rows(old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    return (("rows.cuh", old, new),)


def merge(old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    return (("merge.cu", old, new),)


def finish(old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    return (("finish.cuh", old, new),)


def row(fmt: KVFormat, dim: int) -> plan.Row:
    return plan.row_of(fmt, dim, fmt.layout(dim)[0])


def plain(s: AttentionSpec) -> bool:
    """Scores matter and nothing but the position hides keys."""
    return s.kv_len > 30 and s.q_len <= s.kv_len and s.scale > 0 and s.uses() <= {"causal"}


def long(s: AttentionSpec) -> bool:
    """Several tiles for each warp of one block, of which every query sees some."""
    return s.kv_len > 4000 and s.uses() <= {"causal", "softcap", "sinks"}


def k_rows(test: Callable[[plan.Row], bool]) -> Callable[[Case], bool]:
    """Cases whose keys are such rows."""
    return lambda c: plain(c.spec) and test(row(c.spec.k_format, c.spec.head_dim))


def v_rows(test: Callable[[plan.Row], bool]) -> Callable[[Case], bool]:
    """Cases whose values are such rows."""
    return lambda c: plain(c.spec) and test(row(c.spec.v_format, c.spec.head_dim_v))


def v_bytes(case: Case) -> bool:
    """Values are multiplied as bytes."""
    return v_rows(lambda r: plan._integers(r, "v", 4))(case) and case.spec.groups * case.spec.q_len <= 4


def gathered(scales: int) -> Callable[[Case], bool]:
    """Codes of keys of so many scales change places before they are multiplied as bytes."""
    return k_rows(lambda r: plan._gathered(r) and r.scales == scales)


def teams(case: Case) -> bool:
    """Two warps share the words of each row."""
    s = case.spec
    halves = plan.halves(row(s.k_format, s.head_dim)) and plan.halves(row(s.v_format, s.head_dim_v))
    return plain(s) and s.groups * s.q_len <= 8 and halves


def masked_rows(case: Case) -> bool:
    """Some row sees no key: the mask has an empty row, as those of the cases do without a block map."""
    s = case.spec
    return bool(s.mask) and s.q_len > 1 and not s.block_map and not s.sinks and case.mask_axes in ("2", "qk", "bhqk")


FAULTS = (
    Fault("the_last_tile_is_dropped", spec(long),
          attend("    step(Bool<false>(), tile);", "    if (tile < end - 1) step(Bool<false>(), tile);"), splits=1),
    Fault("the_output_is_not_rescaled", spec(long),
          values("r.top[j][i] = most;\n    }\n    scale_out(r, j, factor);", "r.top[j][i] = most;\n    }"), splits=1),
    Fault("the_denominator_is_not_rescaled", spec(long), values("r.total[j][i] *= factor[i];", ""), splits=1),
    Fault("the_output_keeps_the_old_unit_of_scales",
          lambda c: long(c.spec) and row(c.spec.v_format, c.spec.head_dim_v).kind in (plan.LINEAR, plan.TABLE),
          values("{r.unit / unit, r.unit / unit}", "{1.0f, 1.0f}"), splits=1),
    Fault("a_warp_fetches_the_tile_after_the_next", spec(long),
          attend("later = tile + TEAMS;", "later = tile + 2 * TEAMS;"), splits=1),
    Fault("scales_are_one_tile_late", spec(long),
          attend("k_scale_rows, tile * TILE", "k_scale_rows, max(tile - TEAMS, begin) * TILE"), splits=1),
    Fault("scales_of_the_last_slots_are_not_copied", lambda c: long(c.spec) and row(c.spec.k_format, c.spec.head_dim).scales,
          rows("if (ALL % 32 == 0 || i * 32 + lane < ALL) copy_async<4>", "if (i * 32 + lane < ALL - 1) copy_async<4>")),
    Fault("scales_of_a_part_of_a_tile_are_those_of_its_first_slot",
          lambda c: v_rows(lambda r: r.scales > 0 and not r.wide_scale)(c) and c.spec.kv_len == 31,
          rows("((const u16*)(from + row * stride))[i]", "((const u16*)from)[i]")),
    Fault("scales_in_the_middle_of_a_word_begin_with_it",  # the heads of these cases have an odd number of slots
          lambda c: long(c.spec) and c.spec.kv_heads > 1 and row(c.spec.k_format, c.spec.head_dim).scale_bytes == 2,
          attend("load_scales(k_scales, k_scales_at + k_skew, g);", "load_scales(k_scales, k_scales_at, g);")),
    Fault("the_first_warp_is_left_out", spec(plain),
          attend("for (int w = 0; w < TEAMS; ++w) sum += parts", "for (int w = 1; w < TEAMS; ++w) sum += parts")),
    Fault("warps_are_added_without_factors", spec(long),
          attend("? 0.0f : exp2_fast(run.top[j][e] - most);", "? 0.0f : 1.0f;"), splits=1),
    Fault("splits_overlap", lambda c: long(c.spec),
          attend("end = begin + share + (split < rest);",
                 "end = min(tile_low + tiles, begin + share + (split < rest) + 1);"),
          splits=7),
    Fault("splits_are_added_without_factors", spec(long),
          merge("exp2f(top[i].x - reference);", "top[i].x == -INFINITY ? 0.0f : 1.0f;"), splits=7),
    Fault("rows_of_one_block_take_the_sum_of_the_first", spec(lambda s: plain(s) and s.groups * s.q_len > 1),
          attend("joined[row].x, joined[row].y", "joined[0].x, joined[0].y"), splits=1),
    Fault("rows_of_one_block_take_the_sink_of_one_head", spec(lambda s: s.sinks and s.kv_len > 7 and s.groups > 1),
          attend("row_at(p, unit, row).head, x", "unit.head, x"), splits=1),
    Fault("a_segment_overwrites_the_one_before", lambda c: c.spec.unquantised and c.spec.kv_len > 30,
          attend("* p.splits_total + p.split_base + split;", "* p.splits_total + split;")),
    Fault("query_rows_are_ordered_by_head", spec(lambda s: plain(s) and s.groups > 1 and 1 < s.q_len != s.groups),
          score("at.head * p.q_head + at.token * p.q_token",
                "(unit.head * p.groups + row / p.q_len % p.groups) * p.q_head + row % p.q_len * p.q_token")),
    Fault("KV_heads_are_swapped", spec(lambda s: plain(s) and s.kv_heads > 1),
          attend("+ unit.head * head, slot", "+ (p.kv_heads - 1 - unit.head) * head, slot")),
    Fault("all_rows_take_the_norm_of_the_first", spec(lambda s: plain(s) and s.q_heads * s.q_len > 1),
          attend(", norms[row]);", ", norms[0]);")),
    Fault("slots_after_the_end_count", spec(lambda s: s.kv_len in (31, 33, 65, 113) and not s.uses() and s.q_len < s.kv_len),
          attend("if (!seen) x = -INFINITY;", "if (!seen && live) x = -INFINITY;")),
    Fault("dead_rows_are_copied",
          lambda c: v_rows(lambda r: not r.span)(c) and not c.plain,
          rows("from + (live ? row * stride : 0) + part * COPY, live);",
               "from + (slot + row < slots.capacity ? row * stride : 0) + part * COPY, true);")),
    Fault("a_table_is_one_entry_late", k_rows(lambda r: r.kind == plan.TABLE),
          score("(const char*)table, at)", "(const char*)table, max(0, at - 1))")),
    Fault("two_values_of_a_lookup_change_places", k_rows(lambda r: r.kind == plan.TABLE and r.bits <= 5),
          codec("WORTH = 128 | 128 * R::LEVELS << 16;", "WORTH = 128 * R::LEVELS | 128 << 16;")),
    Fault("one_byte_of_a_table_is_off", k_rows(lambda r: r.kind == plan.BYTES and r.bits < 4),
          codec("return prmt(table.low, table.high, nibbles);", "return prmt(table.low ^ 0x0800, table.high, nibbles);")),
    Fault("codes_of_one_sign_are_not_looked_up", k_rows(lambda r: r.kind == plan.BYTES and r.bits == 4 and r.scales <= 2),
          codec("PASSES = BITS == 4 ? 2 : 1;", "PASSES = 1;")),
    Fault("values_of_a_plane_lose_their_sign", v_rows(lambda r: r.kind == plan.BYTES and r.bits == 4),
          codec("h[2] = prmt(y, even, 0x7250);", "h[2] = prmt(y, 0, 0x7250);")),
    Fault("planes_of_bytes_are_swapped", v_rows(lambda r: r.kind == plan.LINEAR and r.bits == 8),
          codec("h[0] = add_f16x2(prmt(z[0], 0x64646464, 0x4240), 0xE480E480);\n"
                "    h[1] = add_f16x2(prmt(z[0], 0x64646464, 0x4341), 0xE480E480);",
                "h[1] = add_f16x2(prmt(z[0], 0x64646464, 0x4240), 0xE480E480);\n"
                "    h[0] = add_f16x2(prmt(z[0], 0x64646464, 0x4341), 0xE480E480);")),
    Fault("nibbles_are_shifted_by_four_only", v_rows(lambda r: r.kind == plan.LINEAR and r.bits == 4),
          codec("u32 x = z[0] >> 8;", "u32 x = z[0] >> 4;")),
    Fault("high_bits_of_3_bit_codes_are_of_another_plane", v_rows(lambda r: r.bits == 3),
          codec("u32 top = m ? z[2] << 1 : z[2] << 2;", "u32 top = z[2] << 2;")),
    Fault("high_bits_of_5_bit_codes_are_of_another_plane", v_rows(lambda r: r.bits == 5),
          codec("u32 top = z[4] >> m;", "u32 top = z[4];")),
    Fault("high_bits_of_6_bit_codes_are_of_another_plane", k_rows(lambda r: r.bits == 6),
          codec("u32 top = z[2] >> (2 * m);", "u32 top = z[2] >> m;")),
    Fault("signs_of_6_bit_codes_are_lost", k_rows(lambda r: r.bits == 6),
          codec("return pair ^ (x << up & 0x80008000);", "return pair;")),
    Fault("signs_of_6_bit_codes_are_of_another_plane", v_rows(lambda r: r.bits == 6),
          codec("last, 14 - 4 * p - 2 * m)", "last, 14 - 4 * p)")),
    Fault("a_half_of_fp8_is_read_twice", k_rows(lambda r: r.kind == plan.FP8),
          codec("h[1] = f16x2_of_e4m3(x >> 16);", "h[1] = f16x2_of_e4m3(x);")),
    Fault("q_turns_without_its_first_signs", lambda c: plain(c.spec) and c.spec.k_format.rotation in ("turbo", "mlx"),
          turn("x[j] = flip(x[j], signs.before[j], lane);", ""), splits=1),
    Fault("the_output_turns_without_its_last_signs",
          lambda c: plain(c.spec) and c.spec.v_format.rotation in ("turbo", "mlx"),
          turn("signs.after[j], lane", "0, lane")),
    Fault("the_butterfly_has_a_stage_less", lambda c: plain(c.spec) and c.spec.v_format.rotation != "none",
          turn("for (int h = 1; h < 32; h *= 2)", "for (int h = 1; h < 16; h *= 2)")),
    Fault("short_rows_have_planes_of_the_other_byte", k_rows(lambda r: r.fold == 2 and r.kind == plan.TABLE),
          score("t / 2 * 8 : 0);", "8 - t / 2 * 8 : 0);")),
    Fault("q_has_its_high_term_only",
          lambda c: plain(c.spec) and c.spec.dtype == torch.float32 and exact_rows(c.spec),
          score("return K::IS_BF16 ? bf16x2(rest, 0.0f) : f16x2(rest, 0.0f);", "return 0;"), bound=_FLOAT32),
    Fault("q_as_integers_has_its_high_term_only", k_rows(lambda r: r.kind == plan.BYTES and r.bits < 4),
          score("return (term ? whole - 256 * high : high) & 255;", "return (term ? 0 : high) & 255;"), bound=3e-4),
    Fault("weights_have_their_high_term_only",
          lambda c: plain(c.spec) and c.spec.dtype == torch.float32 and exact_rows(c.spec),
          values("b[tile][group][V_TERMS - 1][j][i] = transpose8(low);", "b[tile][group][V_TERMS - 1][j][i] = 0;"),
          bound=_FLOAT32),
    Fault("weights_as_integers_have_their_high_term_only",
          v_bytes,
          values("fmaf(high, 256.0f * unit[j][e], fmaf(low, unit[j][e], out))", "fmaf(high, 256.0f * unit[j][e], out)")),
    Fault("values_of_bytes_are_not_centred", v_bytes, attend("x = x * V_TINY - offset[group];", "x = x * V_TINY;")),
    Fault("two_of_four_tokens_change_places", v_bytes, values("prmt(w[0], w[1], 0x4051)", "prmt(w[0], w[1], 0x0415)")),
    Fault("odd_nibbles_are_of_other_tokens", v_bytes, codec("odd = prmt(odd, 0, 0x3120);", "odd = prmt(odd, 0, 0x1320);")),
    Fault("float32_values_have_their_high_term_only",
          lambda c: v_rows(lambda r: r.kind == plan.F32)(c) and c.spec.dtype == torch.float32 and exact_rows(c.spec),
          values("part < (V::SPLIT ? 2 : 1)", "part < 1"), bound=_FLOAT32),
    Fault("keys_take_the_scale_of_the_first_group", k_rows(lambda r: r.scales > 1),
          score("float scale = scales[i].at(group);", "float scale = scales[i].at(0);")),
    Fault("keys_take_the_scale_of_the_other_eight_tokens", k_rows(lambda r: r.scales > 0),
          score("float scale = scales[i].at(group);", "float scale = scales[1 - i].at(group);")),
    Fault("values_take_the_scale_of_the_first_group",
          v_rows(lambda r: r.scales > 1 and r.kind in (plan.LINEAR, plan.TABLE)),
          values("scales[tile][i].at(group) * r.inverse", "scales[tile][i].at(0) * r.inverse")),
    Fault("the_window_is_one_too_wide", spec(lambda s: s.window and s.q_len > 1 and not s.mask and not s.starts),
          attend("back < window)", "back <= window)")),
    Fault("a_query_sees_the_key_after_its_own", spec(lambda s: plain(s) and s.causal and s.q_len > 2),
          attend("back >= 0)", "back >= -1)")),
    Fault("left_padding_is_attended", spec(lambda s: s.starts and s.window is None and s.kv_len > 7),
          attend("  if (p.starts) first =", "  if (false) first =")),
    Fault("a_ring_is_read_in_the_order_of_its_slots", lambda c: c.sliding > 0 and c.spec.ring,
          rows("return slot - first_slot + (slot < first_slot ? capacity : 0);", "return slot - first_slot;")),
    Fault("a_warp_takes_only_its_own_scores", teams, attend("] += load_shared_f32(theirs + i * 128);", "] *= 2.0f;")),
    Fault("scores_of_a_team_are_those_of_the_step_before", teams,
          attend("^ 1) + turn * WARPS)", "^ 1) + (turn ^ 1) * WARPS)")),
    Fault("both_warps_take_the_same_share_of_q", teams,
          score("+ rank * Q_SHARE + lane * 8;\n  Sum", "+ lane * 8;\n  Sum")),
    Fault("both_warps_copy_the_same_words", teams, rows("from += rank * BYTES + part * COPY;", "from += part * COPY;")),
    Fault("blocks_of_words_are_those_of_whole_rows", teams,
          codec("(r * R::MINE + j) * 2, z[r]", "(r * R::WORDS + j) * 2 % K_PITCH, z[r]")),
    Fault("values_of_both_warps_are_the_same_dims", teams, attend("rank * V::MINE + dim_of", "dim_of")),
    Fault("products_meet_the_scale_of_the_other_half", gathered(2),
          score("n / K::NIBBLES + n % 2 * 2 : n % 2;", "n / K::NIBBLES + n % 2 * 2 : 1 - n % 2;")),
    Fault("products_meet_scales_in_the_order_of_registers", gathered(4),
          score("n / K::NIBBLES + n % 2 * 2 : n % 2;", "n : n % 2;")),
    Fault("words_of_two_units_change_places_in_q", gathered(4),
          score("(K::GROUPS == 4 ? vec : nibble) % 2;", "(K::GROUPS == 4 ? 1 - vec % 2 : nibble % 2);")),
    Fault("bytes_of_a_word_stay_side_by_side", gathered(2), score("prmt(z[r][vec + i], 0, 0x3120)", "z[r][vec + i]")),
    Fault("the_softcap_comes_after_the_mask", spec(lambda s: s.softcap > 0 and s.mask == "additive"),
          attend("          if (SOFTCAP) {", "          if (false) {")
          + attend("x = bias == -INFINITY ? bias : (x + (MASK == 1 ? 0.0f : slope[j][e] * bias)) * LOG2E;",
                   "if (bias == -INFINITY) x = bias; else { " + _CAP + " }")),
    Fault("a_mask_has_one_row_of_queries", lambda c: bool(c.spec.mask) and c.spec.q_len > 1 and c.mask_axes in ("2", "qk"),
          attend(" + at.token * p.mask_token;", ";")),
    Fault("a_mask_has_one_row_per_KV_head", lambda c: bool(c.spec.mask) and c.spec.groups > 1 and "h" in c.mask_axes,
          attend("at.head * p.mask_head", "unit.head * p.mask_head")),
    Fault("a_head_takes_another_slope", spec(lambda s: s.alibi > 0 and s.kv_len > 7 and s.groups > 1),
          attend("p.slopes[at.head]", "p.slopes[unit.head]")),
    Fault("the_lowest_half_is_a_number", lambda c: masked_rows(c) and c.masked == -65504.0,
          score("return x <= -65504.0f ? -INFINITY : x;", "return x;")),
    Fault("sinks_are_not_in_the_denominator", spec(lambda s: s.sinks and s.kv_len > 7),
          finish("total * factor + exp2f(sink - reference);", "total * factor;")),
    Fault("the_log_sum_exp_is_binary", spec(plain), finish("log2f(total)) * 0.6931471805599453f", "log2f(total))")),
)  # fmt: skip


def exact_rows(s: AttentionSpec) -> bool:
    """Nothing of K, V or the weights is rounded to half precision."""
    return s.k_format.element in ("float32", "float16", "bfloat16") and s.v_format.element in ("float32", "bfloat16")


def chosen(fault: Fault) -> list[Case]:
    relevant = [c for c in cases() if fault.relevant(c) and not [r for r in gpu.why_not(c.on("cuda").spec) if r]]
    return relevant[:: -(-len(relevant) // _MOST)] if relevant else []


def harness(fault: Fault, all_cases: list[Case], problem) -> list[str]:
    """What the comparison says of each case that it notices."""
    noticed = []
    for case in all_cases:
        data = problem(case)
        try:
            assert_matches(data, *data.run("gpu"), fault.bound)
        except AssertionError as wrong:
            noticed.append(f"{case}: {wrong}")
    return noticed


@pytest.fixture
def splits(monkeypatch):
    """``splits(n)``: that many blocks share a head's keys; 0: as many as the plan says."""

    def force(count: int) -> None:
        if count:
            monkeypatch.setattr(plan, "splits", lambda units, tiles, warps, processors: count)

    return force


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_planted_fault_is_noticed(fault, problem, splits, backend_here):
    """If a planted fault passes, so would the same mistake in a new kernel."""
    backend_here("gpu")
    on_gpu = [case.on("cuda") for case in chosen(fault)]
    splits(fault.splits)
    assert harness(fault, on_gpu, problem) == [], "without the fault"
    with nvrtc.sources(fault.edits):
        for case in on_gpu:
            if harness(fault, [case], problem):
                return
    pytest.fail(f"none of {[str(case) for case in on_gpu]} notices")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_every_fault_is_one_of_the_sources(fault):
    """A fault whose anchor is gone plants nothing; one that does not compile shows nothing."""
    selected = chosen(fault)
    assert 0 < len(selected) <= _MOST, "no case of the suite needs this"
    with nvrtc.sources(fault.edits):
        if nvrtc.compiler_version() is None:
            return
        for launch in gpu_record.launches(inputs(selected[0])):
            if launch.name == ("merge" if fault.edits[0][0] == "merge.cu" else "attend"):
                gpu_record.compiles(launch)


def test_faults_are_many_and_in_every_source():
    assert len({f.name for f in FAULTS}) == len(FAULTS) >= 24
    files = {name for fault in FAULTS for name, _, _ in fault.edits}
    assert files == {
        "attend.cu",
        "score.cuh",
        "values.cuh",
        "codec.cuh",
        "rows.cuh",
        "merge.cu",
        "turn.cuh",
        "finish.cuh",
    }


def test_edited_sources_are_forgotten():
    """An edit that outlives its block, or that is made nowhere, would change other tests or none."""
    before = nvrtc._sources()
    with nvrtc.sources([("finish.cuh", "log2f(total)", "log2f(total + 1.0f)")]):
        assert nvrtc._sources()["finish.cuh"] != before["finish.cuh"]
        with nvrtc.sources([("finish.cuh", "log2f(total + 1.0f)", "0.0f")]):
            assert b"log2f" not in nvrtc._sources()["finish.cuh"]
    assert nvrtc._sources() == before
    for old in ("no such piece", "float"):
        with pytest.raises(ValueError, match=f"merge.cu holds '{old}' [0-9]+ times, not once"):
            nvrtc.sources([("merge.cu", old, "")]).__enter__()
    assert nvrtc._sources() == before
