"""The prefill kernels for any GPU: what fits which one, that they compile for all, and that planted faults are noticed."""

from __future__ import annotations

import ctypes
import re
from itertools import product
from typing import NamedTuple

import pytest
import torch

from gyrokv.backends import gpu
from gyrokv.backends.gpu import nvrtc, prefill, shapes
from gyrokv.cases import HEADS, Case, case
from gyrokv.testing import assert_matches

BF16, F32 = torch.bfloat16, torch.float32
# bytes of shared memory that a block may have, by compute capability
ROOMS = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90a": 232448, "sm_100a": 232448, "sm_120a": 101376}
SIZES = dict(batch=1, q_heads=4, kv_heads=2, q_len=140, kv_len=333, dtype=BF16)


def shape(dims: tuple[int, int], room: int, **settings) -> shapes.Portable:
    """The kernel of a problem; masks are float32."""
    spec = case("bf16", "bf16", dims, **(SIZES | settings)).spec
    return shapes.shape(spec, dims, (BF16, BF16, BF16), 2 if spec.mask else 0, room)


@pytest.mark.parametrize("room", sorted(set(ROOMS.values())))
def test_every_shape_fits_the_shared_memory(room):
    for dims, mask in product(HEADS, (None, "additive")):
        made = shape(dims, room, mask=mask)
        defines = dict(made.defines)
        assert made.shared <= room, f"{dims}: {made}"
        assert defines["DK"] >= dims[0] and defines["DV"] >= dims[1] and defines["DK"] % 16 == defines["DV"] % 16 == 0
        assert made.rows in (32, 64, 128) and made.keys in (32, 64) and made.threads in (128, 256)


PINNED = {
    (64, 64): dict(TALL=2, WARPS=4, KEYS=64, STAGES=1),
    (128, 128): dict(TALL=2, WARPS=4, KEYS=64, STAGES=2),
    (192, 128): dict(TALL=2, WARPS=4, KEYS=64, STAGES=1),
    (192, 192): dict(TALL=1, WARPS=4, KEYS=64, STAGES=1),
    (256, 256): dict(ROWS=128, KEYS=64, ROUNDS=1, TURNS=0),
    (320, 320): dict(ROWS=128, KEYS=64, ROUNDS=1, TURNS=0),
    (512, 512): dict(ROWS=64, KEYS=64, ROUNDS=1, TURNS=0),
    (576, 512): dict(ROWS=64, KEYS=64, ROUNDS=2, TURNS=0),
}


@pytest.mark.parametrize("dims", PINNED, ids=str)
def test_pinned_forms(dims):
    """A change of the form is a change of speed: measure it, then write it here."""
    defines = dict(shape(dims, ROOMS["sm_90a"]).defines)
    assert {name: defines.get(name) for name in PINNED[dims]} == PINNED[dims]


def test_tiles_are_those_of_the_kernel():
    """A block map is made for them."""
    for dims, room in product(HEADS, ROOMS.values()):
        spec = case("bf16", "bf16", dims, **SIZES, mask="additive", block_map=True).spec
        made = shape(dims, room, mask="additive")
        assert shapes.tile(spec, room) == (made.rows, made.keys)


def test_what_can_be_forced():
    with pytest.raises(ValueError, match=r"kernels='hopper' is not one that can be forced: \['portable', 'tall', 'short'\]"):
        gpu.forced("hopper").__enter__()
    assert not prefill._forced
    with gpu.forced("portable"):
        assert prefill._forced
    assert not prefill._forced


@pytest.mark.parametrize(("capability", "room"), [((9, 0), 0), ((8, 6), 101376), ((10, 0), 232448)])
def test_hopper_has_its_own(monkeypatch, capability, room):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(prefill.calls, "_shared_memory", lambda device: room or 232448)
    spec = case("bf16", "bf16", (128, 128), **SIZES).spec
    assert prefill.portable_room() == room
    assert gpu.how(spec).startswith("prefill, portable kernels" if room else "prefill; rows that")
    with gpu.forced("portable"):
        assert prefill.portable_room() > 0
        assert gpu.how(spec).startswith("prefill, portable kernels (" + ("Hopper's need" if room else "forced)"))


_SPILLS = 80  # bytes, where all registers are taken: two tiles of rows and 128 columns, masks
needs_compiler = pytest.mark.skipif(nvrtc.compiler_version() is None, reason="libnvrtc was not found")


@needs_compiler
def test_the_compiler_lays_structures_out_alike():
    sizes = {"Prefill": prefill.Prefill, "Operands": prefill.Operands}
    text = "".join(f'static_assert(sizeof({n}) == {ctypes.sizeof(m)}, "size");\n' for n, m in sizes.items())
    include = '#include "portable.cuh"\n'
    made = shape((64, 64), ROOMS["sm_80"])
    with nvrtc.sources([("prefill_portable.cu", include, include + text)]):
        nvrtc.compile_source("prefill_portable.cu", dict(made.defines), "sm_80")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (512, 512), (576, 512)], ids=str)
@pytest.mark.parametrize("arch", ROOMS)
def test_kernels_compile_without_spills(arch, dims):
    """Registers that go to memory and back in the loop cost more than the loop."""
    for settings in (dict(causal=True), dict(mask="additive")):
        made = shape(dims, ROOMS[arch], **settings)
        notes = nvrtc.compile_source(f"{made.kernel}.cu", dict(made.defines), arch)[1]
        registers, spills = (int(re.search(p, notes)[1]) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
        assert registers * made.threads <= 65536
        most = _SPILLS if settings.get("mask") or dims[1] == 128 else 0
        assert spills <= most, f"{made}: {spills} bytes of {registers} registers are spilled"


# -- results


@pytest.fixture
def room(request, monkeypatch) -> int:
    """``request.param`` bytes of shared memory are all that a block may have."""
    monkeypatch.setattr(prefill, "portable_room", lambda device=None: request.param)
    return request.param


@pytest.mark.gpu
@pytest.mark.parametrize("room", sorted(set(ROOMS.values())), indirect=True)
@pytest.mark.parametrize(
    "settings", [dict(scale=1.0), dict(causal=False, mask="additive", block_map=True)], ids=["steep", "mask"]
)
@pytest.mark.parametrize("dims", HEADS, ids=str)
def test_forms_for_every_gpu(dims, settings, room, problem, backend_here):
    """What GPUs with less memory get, as far as this GPU can tell; maxima that grow from tile to tile."""
    backend_here("gpu")
    data = problem(case("bf16", "bf16", dims, **(SIZES | dict(causal=True) | settings)).on("cuda"))
    assert_matches(data, *data.run("gpu"), gpu.BOUND, torch.bfloat16)


# -- planted faults


class Fault(NamedTuple):
    """``edits``: file, a piece of it, there once, and what it becomes. ``case``: one that must notice."""

    name: str
    case: Case
    edits: tuple[tuple[str, str, str], ...]


def of(dim: int, v_dim: int = 0, **settings) -> Case:
    return case("bf16", "bf16", (dim, v_dim or dim), **(SIZES | dict(causal=True) | settings))


def narrow(old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    return (("prefill_portable.cu", old, new),)


def wide(old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    return (("prefill_portable_wide.cu", old, new),)


def both(old: str, new: str) -> tuple[tuple[str, str, str], ...]:
    return (("portable.cuh", old, new),)


STEEP = dict(scale=1.0)  # maxima grow from tile to tile, by more than what needs no rescaling
FAULTS = (
    # every warp has its own rows
    Fault("a_tile_of_keys_is_dropped", of(64), narrow("tile.seen(block - 1)", "tile.seen(block - 2)")),
    Fault("the_output_is_not_rescaled", of(128, **STEEP),
          narrow("o[m][i] *= softmax[m].factor[i / 2 % 2];", "o[m][i] *= 1.0f;")),
    Fault("keys_after_the_last_are_attended", of(64, causal=False),
          narrow("Range(p, tile, block, rows_of(", "Range(p, tile, min(block, 4), rows_of(")),
    Fault("the_second_rows_see_the_keys_of_the_first", of(128),
          narrow("Range(p, tile, block, rows_of(tile, row + 16 * m),", "Range(p, tile, block, rows_of(tile, row),")),
    Fault("the_second_rows_take_the_queries_of_the_first", of(128),
          narrow("load_matrices(a.at(32 * i) + m * 32 * DK, x[m])", "load_matrices(a.at(32 * i), x[m])")),
    Fault("queries_kept_in_registers_are_of_the_first_dims", of(64),
          narrow("x[m][e] = kept[KEEP_Q ? i : 0][m][e]", "x[m][e] = kept[0][m][e]")),
    Fault("a_query_head_reads_another_KV_head", of(128),
          narrow("from.k + tile.batch * from.k_batch + tile.kv_head",
                 "from.k + tile.batch * from.k_batch + (tile.head & 1)")),
    Fault("the_next_values_are_used", of(128),
          narrow("c(k_at + K_BYTES", "c(shared + K_AT + (STAGES - 1 - stage) * STAGE_BYTES + K_BYTES")),
    Fault("the_maxima_of_two_rows_are_exchanged", of(128, **STEEP),
          narrow("softmax[i / 2].raise(i % 2, most[i])", "softmax[i / 2].raise(i % 2, most[i ^ 1])")),
    Fault("a_row_is_stored_for_its_neighbour", of(80),
          narrow("int at_row = row + 16 * m + 8 * r;", "int at_row = row + 16 * m + 8 * (1 - r);")),
    # warps share rows
    Fault("a_tile_of_keys_is_dropped_by_all", of(512), wide("tile.seen(block - 1)", "tile.seen(block - 2)")),
    Fault("half_of_the_head_is_left_out", of(512),
          wide("(part ? s[1][at + e] : s[0][at + e]) + x[e]", "(part ? s[1][at + e] : s[0][at + e])")),
    Fault("sums_of_other_rows_are_added", of(512),
          wide("x[e] = part ? s[0][at + e] : s[1][at + e]", "x[e] = part ? s[1][at + e] : s[0][at + e]")),
    Fault("sums_of_other_warps_are_added", of(512), wide("(warp ^ 1) * SUM_BYTES", "(warp ^ 3) * SUM_BYTES")),
    Fault("both_parts_take_the_same_dims", of(512), wide("at = PARTS == 2 ? part * 64", "at = PARTS == 2 ? 0 * 64")),
    Fault("halves_of_the_keys_have_their_own_reference", of(512, **STEEP),
          wide("fmaxf(load_shared_f32(tops(0, row)), load_shared_f32(tops(1, row)))", "load_shared_f32(tops(half, row))")),
    Fault("weights_keep_the_old_reference", of(512, **STEEP),
          wide("        weigh(m);\n      }\n      __syncthreads();", "      }\n      __syncthreads();")),
    Fault("weights_that_were_made_again_count_twice", of(512, **STEEP),
          wide("softmax[m].total[r] = before[m][r];", "")),
    Fault("the_shared_output_is_not_rescaled", of(512, **STEEP),
          wide("      __syncthreads();\n      scale_output();", "      __syncthreads();")),
    Fault("a_half_of_the_keys_is_not_counted", of(512), wide(
        "load_shared_f32(tops(0, own + 16 * m + 8 * r)) + load_shared_f32(tops(1, own + 16 * m + 8 * r))",
        "load_shared_f32(tops(0, own + 16 * m + 8 * r))")),
    Fault("both_halves_see_the_keys_of_the_first", of(512),
          wide("own + 16 * m), t + keys / 2), mask", "own + 16 * m), t), mask")),
    Fault("a_mask_is_that_of_the_first_keys", of(512, causal=False, mask="additive"),
          wide("mask[m].load(p, tile, block, tile.row + own + 16 * m, t + keys / 2)",
               "mask[m].load(p, tile, block, tile.row + own + 16 * m, t)")),
    Fault("eight_columns_that_are_left_are_others", of(576), wide("narrow.at(32 * ACROSS * WIDE)", "narrow.at(0)")),
    Fault("the_second_band_takes_the_weights_of_the_first", of(256),
          wide("w(shared + P_AT, band + a_row(lane)", "w(shared + P_AT, a_row(lane)")),
    Fault("the_sums_of_the_second_round_are_those_of_the_first", of(576, 512),
          wide("int at = 4 * (round * MANY + i);\n          float x[4];\n          load",
               "int at = 4 * i;\n          float x[4];\n          load")),
    # rows in shared memory
    Fault("pieces_trade_places_in_writing_only", of(96),
          both("((bytes & (LINE - 1)) ^ turned)", "((bytes & (LINE - 1)) ^ (turned & 16))")),
    Fault("the_last_line_is_not_copied", of(320), both("c < LINES; c += SIDE)", "c < LINES - SIDE; c += SIDE)")),
    Fault("columns_after_the_last_are_read", of(72), both("here && (c < LINES - SIDE || last)", "here")),
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_planted_fault_is_noticed(fault, problem, backend_here):
    """If a planted fault passes, so would the same mistake in a new kernel."""
    backend_here("gpu")
    data = problem(fault.case.on("cuda"))
    with gpu.forced("portable"):
        assert_matches(data, *data.run("gpu"), gpu.BOUND)
        with nvrtc.sources(fault.edits), pytest.raises(AssertionError):
            assert_matches(data, *data.run("gpu"), gpu.BOUND)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_every_fault_is_one_of_the_sources(fault):
    """A fault whose anchor is gone, or that is in a kernel that its case does not run, plants nothing."""
    spec = fault.case.spec
    made = shape((spec.head_dim, spec.head_dim_v), ROOMS["sm_90a"], mask=spec.mask)
    assert fault.edits[0][0] in (f"{made.kernel}.cu", "portable.cuh")
    with nvrtc.sources(fault.edits):
        if nvrtc.compiler_version() is not None:
            nvrtc.compile_source(f"{made.kernel}.cu", dict(made.defines), "sm_90a")
