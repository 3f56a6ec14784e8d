"""The Metal kernels, executed on the CPU: every kind of problem, through both entries, under every schedule.

A run fails for races, accesses out of bounds, writes to read-only memory, threads that wait for ever, more than 32 KiB
of threadgroup memory, and for results that float64 attention over the decoded rows does not confirm.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from zlib import crc32

import pytest
import torch
from metal_host.entries import Executor
from metal_host.host import SCHEDULES
from metal_host.problems import DECODE, PREFILL, block_map_of, mask_of_all_states, needs_compiler, run

from gyrokv import BACKENDS, BlockMap, Codec, LayerCache, append, attend, explain
from gyrokv.backends import cpu, metal
from gyrokv.backends.metal import kernels, launches, torch_mps
from gyrokv.backends.metal.launches import Tuning
from gyrokv.cases import FEATURES, HEADS, Case, case, compatible, fits, groups
from gyrokv.formats import FORMATS
from gyrokv.spec import AttentionSpec
from gyrokv.testing import Problem, assert_matches, inputs, poison_dead
from gyrokv.view import KVView

ENTRIES = ("torch", "mlx")


def runs(what: object) -> list[tuple[str, str]]:
    """(entry, schedule): each schedule once, each entry twice; which go together changes from case to case."""
    start = crc32(str(what).encode())
    return [(ENTRIES[(start + i) % 2], schedule) for i, schedule in enumerate(SCHEDULES)]


def each_format_and_head_size() -> list[Case]:
    """Every format as K and as V, every head size, each pair of neighbours in the tables once."""
    names, found = list(FORMATS), []
    queues = names * 2, (names[1:] + names[:1]) * 2
    for i, dims in enumerate(HEADS * 2):
        k, v = (q.pop(next(j for j, n in enumerate(q) if fits(FORMATS[n], d))) for q, d in zip(queues, dims))
        found.append(case(k, v, dims, q_len=(3, 1)[i % 2], kv_len=35, causal=True, batch=1))
    return found


def honoured(case: Case) -> bool:
    """True when the kernels know all of its features; that others are refused is tested with the backends."""
    return case.spec.uses() <= metal.UNDERSTANDS


def of_one_sequence(case: Case) -> Case:
    """The same, in half the time, where nothing depends on there being two."""
    return replace(case, spec=replace(case.spec, batch=1))


def each_pair_of_features() -> list[Case]:
    """Each feature alone, for two sequences, and with each other one."""
    found = {}
    for a, b in product(FEATURES, repeat=2):
        settings = compatible(a, b)
        if settings is not None:
            one = case("q8_0", "turbo4", **settings, q_len=7)
            one = one if a == b or one.spec.starts else of_one_sequence(one)
            if honoured(one):
                found[str(one)] = one
    return list(found.values())


def small(name: str, step: int = 1, keys: int = 200) -> list[Case]:
    """Cases of a group that the executor runs in little time."""
    found = [c for c in groups()[name] if c.spec.kv_len <= keys and c.spec.dtype != torch.float64 and honoured(c)]
    return found[::step]


CASES = {
    "formats": each_format_and_head_size(),
    "features": each_pair_of_features(),
    "lengths": [of_one_sequence(c) for c in small("lengths")],
    "head_groups": small("head_groups", 2),
    "dtypes": small("dtypes"),
    "masks": small("masks"),
    "storage": small("storage"),
}
ALL = [pytest.param(c, id=f"{name}-{c}") for name, cases in CASES.items() for c in cases]


@needs_compiler
@pytest.mark.parametrize("case", ALL)
def test_kernels_match_the_reference(case, problem):
    """Decode and prefill, under every schedule, through both entries."""
    data = problem(case)
    for tuning in (DECODE, PREFILL):
        first = None
        for entry, schedule in runs(case):
            machine = Executor(entry, schedule)
            got = run(data, machine, tuning, block_map_of(data))
            if first is None:
                assert_matches(data, *got)
                assert case.spec.dtype != torch.float32 or relative_error(got[0], data.exact[0]) <= 1e-5
            first = first or got
            assert all(torch.equal(a, b) for a, b in zip(got, first)), f"{entry}, {schedule} differs from the first run"
            for program, ran in machine.log:
                assert ran.threadgroup_bytes == program.threadgroup_bytes


@needs_compiler
@pytest.mark.parametrize("case", list(filter(honoured, groups()["many_tiles"]))[::2], ids=str)
def test_long_problems(case, problem):
    """Many blocks, several splits, the choice of kernel and splits that users get; each schedule in turn."""
    data = problem(case)
    for tuning in (launches.TUNING, Tuning(decode_rows=0)):
        entry, schedule = runs(case)[crc32(str(case).encode()) // 2 % len(SCHEDULES)]
        assert_matches(data, *run(data, Executor(entry, schedule), tuning, block_map_of(data)))


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    off, size = torch.linalg.vector_norm(got.double() - exact), torch.linalg.vector_norm(exact)
    return float(off / size) if size else float(off)


def test_cases_cover_what_there_is():
    """A format, head size or feature that no case here uses would be tested nowhere."""
    specs = [c.spec for c in CASES["formats"]]
    assert {s.k_format.name for s in specs} == {s.v_format.name for s in specs} == set(FORMATS)
    assert {(s.head_dim, s.head_dim_v) for s in specs} == set(HEADS)
    assert {name for c in CASES["features"] for name in c.spec.uses()} == metal.UNDERSTANDS


def specialisations() -> list[kernels.Program]:
    found = [kernels.block_map()]
    for k, v, (dk, dv) in product(FORMATS.values(), FORMATS.values(), HEADS):
        if fits(k, dk) and fits(v, dv):
            sides = kernels.side(k, dk, k.layout(dk)[0]), kernels.side(v, dv, v.layout(dv)[0])
            found.append(kernels.prefill(*sides, True, True))
            found += [kernels.decode(rows, *sides, True, True) for rows in (1, 2, 4, 8)]
    for fmt, dims in product(FORMATS.values(), HEADS):
        if fits(fmt, dims[0]) and not fmt.is_dense:
            found.append(kernels.encode(fmt, dims[0], fmt.rotation))
    return found


def test_threadgroup_memory_fits():
    """32 KiB is what every Apple GPU has; more fails when a pipeline is made, on the user's machine."""
    programs = set(specialisations())
    assert len(programs) > 1000
    for program in programs:
        assert program.threadgroup_bytes <= 32768, f"{program.call}: {program.arrays}"
        assert program.threads <= 512 and len(program.inputs) + len(program.outputs) + 2 <= 31


# -- encoding


@needs_compiler
@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if not f.is_dense], ids=str)
def test_encoded_rows_are_the_definitions(fmt):
    """The same bytes, also of zeros, of huge and of tiny values, of values on ties, of padded heads."""
    random = torch.Generator().manual_seed(1)
    for dim, dtype in ((80, torch.float32), (128, torch.bfloat16), (64, torch.float16), (512, torch.float32)):
        x = torch.randn(2, 3, 9, dim, generator=random)
        x *= torch.tensor([1e-3, 1.0, 50.0, 1e-12, 1e6, 3.0, 2.0, 0.0, 9.0])[:, None]
        x[1, 1, 6, ::2] = 0.0
        x[0, 2, 1] = (x[0, 2, 1] * 4).round() / 8
        if dtype == torch.float32:
            x[0, 0, 5] = 1e38
        x = x.clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else x.to(dtype)
        codec = Codec(fmt, dim)
        want = codec.encode(x)
        targets = [(tuple(want.words.shape), "int16")]
        targets.append((tuple(want.scale.shape) if fmt.has_levels else (1, 1, 1, 1), fmt.scale_dtype))
        for entry, schedule in runs(f"{fmt.name} {dim}"):
            machine = Executor(entry, schedule)
            got = metal._encode(machine, codec, x) if entry == "torch" else launches.encode(machine, x, codec, targets)
            assert torch.equal(got[0], want.words)
            if fmt.has_levels:
                torch.testing.assert_close(got[1], want.scale, rtol=0, atol=0, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("window", [None, 40])
def test_append_writes_where_the_layer_says(window):
    """Token by token and in chunks, in place and through a ring's end: the layer that torch fills, byte for byte."""
    options = dict(kv_heads=2, batch=2, window=window, sinks=3, recent=4)
    codecs = Codec("turbo3", 96), Codec("q4_0", 96)
    ours, theirs = (LayerCache(*codecs, **options) for _ in range(2))
    random = torch.Generator().manual_seed(0)
    machine = Executor("torch")
    for tokens in (5, 1, 1, 50, 1, 33, 1):
        k, v = torch.randn(2, 2, 2, tokens, 96, generator=random)
        view = metal._append(machine, ours, k, v)
        theirs.append(k, v)
        assert view.length == ours.length == theirs.length
        for a, b in zip(ours.state()[0].values(), theirs.state()[0].values()):
            assert torch.equal(a, b)


# -- invariances


@needs_compiler
@pytest.mark.parametrize("case", [c for c in CASES["features"] if c.spec.block_map][::3], ids=str)
def test_block_maps_change_nothing(case, problem):
    """Bitwise: a map only saves work."""
    data = problem(case)
    for tuning in (DECODE, PREFILL):
        with_map = run(data, Executor("torch"), tuning, block_map_of(data))
        assert all(torch.equal(a, b) for a, b in zip(with_map, run(data, Executor("torch"), tuning)))


@needs_compiler
def test_block_maps_of_long_masks():
    """Tiles of every state, and keys and rows that do not fill them: skipped keys must not be read at all."""
    one = case("turbo4", "q8_0", (32, 32), mask="bool", block_map=True, q_len=70, kv_len=300, batch=1, q_heads=2, kv_heads=1)
    data = inputs(one)
    rows, keys = torch.arange(70)[:, None], torch.arange(300)[None]
    data.mask.copy_((keys // 64 == rows // 64) | (keys >= 256))
    data.mask[3, 100] = True
    block_map = block_map_of(data)
    assert set(block_map.states.unique().tolist()) == {0, 1, 2}
    for tuning in (DECODE, PREFILL):
        machine, plain = Executor("torch"), Executor("torch")
        with_map = run(data, machine, tuning, block_map)
        assert_matches(data, *with_map)
        assert all(torch.equal(a, b) for a, b in zip(with_map, run(data, plain, tuning)))
        assert machine.log[0][1].accesses < plain.log[0][1].accesses


TILES = {  # and sizes of masks
    (64, 64): ((130, 203), (64, 64)),
    (33, 64): ((33, 150), (67, 9)),
    (1, 64): ((1, 300), (3, 65)),
    (7, 5): ((15, 33), (3, 4)),
}


@needs_compiler
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_block_maps_are_the_definitions(dtype, tile):
    """Odd sizes, one row, tiles of every state, short tiles, masks in steps, turned and broadcast, values at the limit."""
    for rows, keys in TILES[tile]:
        whole = mask_of_all_states(rows, keys, dtype)
        wide = torch.zeros(2, 3, rows, 2 * keys, dtype=dtype)
        wide[..., ::2] = whole
        masks = {
            "plain": whole, "in steps": wide[..., ::2], "turned": whole.transpose(2, 3).contiguous().transpose(2, 3),
            "of one head": whole[:1, :1], "of one sequence, for all": whole[:1].expand(2, 3, rows, keys),
            "one column": whole[..., :1].expand(2, 3, rows, keys),
        }  # fmt: skip
        for name, mask in masks.items():
            for entry, schedule in runs(f"{name} {rows} {dtype}"):
                got = launches.states(Executor(entry, schedule), mask, tile)
                assert torch.equal(got, BlockMap.build(mask, tile).states), f"{rows} x {keys}, {name}, {entry}, {schedule}"


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16], ids=str)
def test_large_masks_get_a_block_map(dtype, problem):
    """One that nobody gave: no bit of the result changes, and keys are skipped."""
    kind = "bool" if dtype == torch.bool else "additive"
    one = case("turbo4", "q8_0", (32, 32), mask=kind, mask_dtype=dtype, q_len=70, kv_len=300, batch=1, q_heads=2, kv_heads=1)
    data = inputs(one)
    data.mask.copy_(mask_of_all_states(70, 300, dtype)[0, 0])
    for tuning in (DECODE, PREFILL):
        machine, plain = Executor("torch"), Executor("torch")
        got = run(data, machine, tuning._replace(map_elements=70 * 300))
        assert_matches(data, *got)
        assert all(torch.equal(a, b) for a, b in zip(got, run(data, plain, tuning._replace(map_elements=70 * 300 + 1))))
        ran = {program.kernel: ran.accesses for program, ran in machine.log}
        assert "block_map" in ran and "block_map" not in {program.kernel for program, _ in plain.log}
        assert sum(ran.values()) < sum(r.accesses for _, r in plain.log)


@needs_compiler
@pytest.mark.parametrize("case", CASES["features"][::5] + CASES["storage"][::3], ids=str)
def test_dead_slots_are_not_read(case):
    """Slots beyond the length and slots that a ring no longer uses hold NaN; none may reach the result."""
    data = inputs(case)
    before = [run(data, Executor("torch"), tuning, block_map_of(data)) for tuning in (DECODE, PREFILL)]
    if data.view.owner is not None:
        poison_dead(data.view.owner)
    for tuning, want in zip((DECODE, PREFILL), before):
        assert all(torch.equal(a, b) for a, b in zip(run(data, Executor("torch"), tuning, block_map_of(data)), want))


@needs_compiler
@pytest.mark.parametrize("split_groups", [1, 4, 64])
def test_splits_agree(split_groups, problem):
    """The number of splits changes the rounding only, and empty splits nothing."""
    data = problem(case("turbo4", "q8_0", q_len=2, kv_len=300, causal=True, window=90, sinks=True))
    tuning = Tuning(decode_rows=10**9, split_groups=split_groups, split_keys=32)
    assert_matches(data, *run(data, Executor("torch"), tuning))


PAIRS = list(zip(list(FORMATS)[::3], list(FORMATS)[1::3]))


def encoded_by_metal(k: str, v: str, problem) -> tuple[Problem, KVView]:
    """A problem, and the view of its tokens in a cache that Metal filled."""
    data = problem(case(k, v, (64, 64), q_len=3, kv_len=70, causal=True))
    layer = LayerCache(data.view.k_codec, data.view.v_codec, batch=2, kv_heads=2)
    return data, metal._append(Executor("torch"), layer, data.k, data.v)


@needs_compiler
@pytest.mark.parametrize("k, v", PAIRS)
def test_the_same_bytes_attend_alike_elsewhere(k, v, problem):
    """A cache that Metal encoded gives the CPU's backends what it gives Metal, and the reverse."""
    data, mine = encoded_by_metal(k, v, problem)
    options = data.options | dict(return_lse=True)
    assert_matches(data, *run(data, Executor("torch"), DECODE, view=mine))
    assert_matches(data, *attend(data.q, mine, **options, backend="torch"))
    if not cpu.missing():
        assert_matches(data, *attend(data.q, mine, **options, backend="cpu"), cpu.BOUND)


@needs_compiler
@pytest.mark.gpu
@pytest.mark.parametrize("k, v", PAIRS)
def test_the_same_bytes_attend_alike_on_a_gpu(k, v, problem, backend_here):
    """The same on NVIDIA's: rows that Metal encoded, and Metal on rows that the GPU encoded."""
    gpu = backend_here("gpu")
    data, mine = encoded_by_metal(k, v, problem)
    got = attend(data.q.cuda(), mine.to("cuda"), **data.options, backend="gpu", return_lse=True)
    assert_matches(data, *(t.cpu() for t in got), gpu.BOUND)
    layer = LayerCache(data.view.k_codec, data.view.v_codec, batch=2, kv_heads=2, device="cuda")
    theirs = append(layer, data.k.cuda(), data.v.cuda()).to("cpu")
    assert all(torch.equal(mine.decode(side), theirs.decode(side)) for side in "kv")
    assert_matches(data, *run(data, Executor("torch"), DECODE, view=theirs))


# -- what users see


def test_the_backend_says_why_it_cannot_run():
    """Off a Mac: no Apple GPU. On one: other devices and float64, by name and limit."""
    spec = AttentionSpec("q8_0", "turbo4", 128, 128, dtype=torch.float64)
    assert metal.why_not(spec) == ["device=cpu (it runs on mps)", "dtype=torch.float64 (it computes in float32)"]
    assert BACKENDS["metal"] is metal
    if not torch.backends.mps.is_available():
        assert "missing here: no Apple GPU here" in explain(spec)
    layer = LayerCache(Codec("q8_0", 64), Codec("turbo4", 64), kv_heads=1)
    assert metal.why_not_append(layer) == ["device=cpu (it runs on mps)"]


@needs_compiler
def test_a_mac_tries_the_kernels_first(monkeypatch):
    """Kernels that a Mac's compiler refuses, or that it computes wrongly, become a reason; good ones none."""
    assert metal.trial(Executor("torch")) == []
    wrong = metal.trial(
        Executor("torch", edit=lambda source: source.replace("value += factor[s]", "value += 2.0f * factor[s]"))
    )
    assert "outputs of the kernels differ from PyTorch's by" in wrong[0]
    lost = metal.trial(Executor("torch", edit=lambda source: source.replace("value / sum", "value / 0.0f * 0.0f")))
    assert "outputs of the kernels differ from PyTorch's by nan" in lost[0]

    def refuses(source):
        raise RuntimeError("Failed to create metal library, error: no")

    assert "refused the kernels: Failed to create metal library" in metal.trial(torch_mps.Machine("cpu", refuses))[0]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(metal, "find_spec", lambda name: None)
    monkeypatch.setattr(metal, "_tried", lambda: [])
    if hasattr(torch.mps, "compile_shader"):
        text = explain(AttentionSpec("q8_0", "turbo4", 128, 128, device="mps"))
        assert "  metal: can run (chosen)\n    for mlx-lm's models install the extra: pip install 'gyrokv[mlx]'" in text
    monkeypatch.delattr(torch.mps, "compile_shader", raising=False)
    assert "has no torch.mps.compile_shader" in metal.missing()[0]
