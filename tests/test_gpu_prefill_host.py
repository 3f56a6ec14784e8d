"""How prefill cuts problems, copies rows and addresses tensors, without a GPU: the host carries out the launches."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace

import gpu_record
import pytest
import torch
from gpu_host import run

from gyrokv import GyroKVError
from gyrokv.backends import gpu
from gyrokv.backends.gpu import nvrtc, prefill, shapes, staging
from gyrokv.cases import Case, case, groups
from gyrokv.testing import assert_matches, inputs

CASES = groups()["many_queries"]
SIZES = dict(q_len=40, kv_len=290, dtype=torch.bfloat16)


def smaller(case: Case, **sizes) -> Case:
    return replace(case, spec=replace(case.spec, **sizes))


STRUCTURES = [(prefill.Prefill, "prefill.cuh"), (staging.Unpack, "unpack.cu")]


@pytest.mark.parametrize(("mirror", "file"), STRUCTURES)
def test_structures_are_laid_out_alike(mirror, file):
    """A field that moved would be read as another one: the same names in the same order, strides one by one."""
    text = re.sub(r"//[^\n]*", "", nvrtc._sources()[file].decode())
    body = re.search(rf"struct {mirror.__name__} {{(.*?)\n}};", text, re.DOTALL)[1]
    there = [re.sub(r"[^\w]", "", part.split()[-1]) for part in re.split("[;,]", body) if part.split()]
    for name, kind in mirror._fields_:
        if issubclass(kind, ctypes.Array):
            strides, there = there[: kind._length_], there[kind._length_ :]
            assert all(stride.startswith(name.removesuffix("strides")) for stride in strides)
        else:
            assert there.pop(0) == {"source": "from"}.get(name, name)
    assert not there


@pytest.mark.skipif(nvrtc.compiler_version() is None, reason="libnvrtc was not found")
@pytest.mark.parametrize(("mirror", "file"), STRUCTURES)
def test_the_compiler_finds_structures_of_the_same_size(mirror, file):
    name, data = mirror.__name__, inputs(case("q8_0", "q8_0", (512, 512), **SIZES))
    *_, launches = run(data)
    kernel = "unpack" if file == "unpack.cu" else "prefill"
    defines = next(defines for found, defines, _ in launches if found == kernel)
    for wrong in (0, 8):
        text = f'\nstatic_assert(sizeof({name}) == {ctypes.sizeof(mirror) + wrong}, "size");\nconstexpr bool '
        anchor = "\nconstexpr bool CODES" if kernel == "unpack" else "\nconstexpr bool JOINS"
        with nvrtc.sources([(file, anchor, text + anchor.split()[-1])]):
            if wrong:
                with pytest.raises(GyroKVError, match="static"):
                    nvrtc.compile_source(f"{kernel}.cu", defines, gpu_record.ARCH)
            else:
                nvrtc.compile_source(f"{kernel}.cu", defines, gpu_record.ARCH)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_launches_mean_the_reference(case, problem):
    data = problem(case)
    out, lse, launches = run(data)
    assert_matches(data, out, lse, gpu.BOUND)
    copies = [name for name, _, _ in launches].count("unpack")
    if not case.spec.k_format.is_dense:
        assert copies == 2 * len(data.view.segments) + (data.q.dtype != torch.float16)


@pytest.mark.parametrize("case", CASES[:: 3 if len(CASES) > 30 else 1], ids=str)
def test_pieces_mean_the_reference(case, problem, monkeypatch):
    """Two heads at a time, 128 keys at a time, and the results joined."""
    data = problem(smaller(case, kv_heads=3, q_heads=6) if not case.spec.mask else case)
    monkeypatch.setattr(staging, "STAGED", 1)
    out, lse, launches = run(data, processors=2)
    assert_matches(data, out, lse, gpu.BOUND)
    joined = [call.joined for name, _, call in launches if name != "unpack"]
    assert joined[0] == 0
    if case.spec.kv_len > 128 and case.spec.window is None and not case.spec.k_format.is_dense:
        assert joined.count(1) == joined.count(0) > 1


KINDS = [dict(), dict(starts=True), dict(lengths=True), dict(paged=True, lengths=True, page=48)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_pieces_of_one_side_mean_the_reference(kind, monkeypatch):
    """Keys are read where they lie, values copied 128 at a time, or the other way round."""
    monkeypatch.setattr(staging, "STAGED", 1)
    for pair in (("bf16", "q8_0"), ("q8_0", "bf16")):
        data = inputs(case(*pair, batch=3, causal=True, sinks=True, **SIZES, **kind))
        out, lse, launches = run(data, processors=2)
        assert_matches(data, out, lse, gpu.BOUND)
        assert max(call.kv_len for name, _, call in launches if name != "unpack") == 128


@pytest.mark.parametrize("k", ["bf16", "f16", "f32", "fp8_e4m3", "q4_0", "tq5", "turbo3"])
@pytest.mark.parametrize("page", [16, 256])
def test_rows_of_each_kind(k, page, problem):
    """What lies in words, in one or two fields, with scales of one or two widths, in pages or not."""
    for kind in (dict(), dict(paged=True, lengths=True, page=page)):
        data = problem(case(k, "turbo4", (96, 96), batch=2, causal=True, **kind, **SIZES))
        assert_matches(data, *run(data)[:2], gpu.BOUND)


def test_rows_that_lie_well_are_read_in_place():
    """A copy of 16-bit rows would cost time for nothing. What lies across the end of a ring is copied, and what a window
    sees in sequences of their own lengths if one side must be copied anyway."""
    copies = {}
    for name, settings in {
        "dense": dict(), "one side": dict(v="q8_0"), "starts": dict(starts=True),
        "pages": dict(paged=True, page=48), "lengths": dict(lengths=True, paged=True), "window": dict(window=50),
        "window in pages": dict(window=50, lengths=True, paged=True),
        "ring": dict(window=50, sliding=50, ring=True, lengths=True, kv_len=200, offset=90, q_len=40),
        "window and one side": dict(v="q8_0", window=50, lengths=True),
    }.items():  # fmt: skip
        settings = dict(k="bf16", v="bf16", causal=True) | SIZES | settings
        data = inputs(case(settings.pop("k"), settings.pop("v"), **settings))
        out, lse, launches = run(data)
        assert_matches(data, out, lse, gpu.BOUND)
        copies[name] = [name for name, _, _ in launches].count("unpack")
    assert copies == {
        "dense": 0, "one side": 1, "starts": 0, "pages": 0, "lengths": 0, "window": 0, "window in pages": 0, "ring": 2,
        "window and one side": 2,
    }  # fmt: skip


def test_queries_are_taken_a_few_at_a_time(monkeypatch):
    """Their copy in another type is bounded too."""
    monkeypatch.setattr(staging, "QUERIES", 1)
    data = inputs(case("q8_0", "turbo4", causal=True, sinks=True, **(SIZES | dict(q_len=400))))
    out, lse, launches = run(data)
    assert_matches(data, out, lse, gpu.BOUND)
    found = [call for name, _, call in launches if name != "unpack"]
    assert [call.q_len for call in found] == [384, 16] * 4 and all(call.pairs == 1 for call in found)


def test_a_window_needs_no_more_than_it_sees():
    """With lengths on the device too, where the keys that a window sees lie elsewhere in each sequence."""
    for kind in (dict(), dict(lengths=True), dict(paged=True, lengths=True)):
        data = inputs(case("q8_0", "turbo4", causal=True, window=60, batch=3, **SIZES, **kind))
        out, lse, launches = run(data)
        assert_matches(data, out, lse, gpu.BOUND)
        assert all(call.kv_len == 99 for name, _, call in launches if name != "unpack")


@pytest.mark.parametrize(
    ("settings", "mask", "exact", "seeded"),
    [
        (dict(mask="bool"), 1, False, True), (dict(mask="additive"), 4, True, True), (dict(), 0, True, False),
        (dict(mask="additive"), 2, False, False), (dict(mask="additive", alibi=8.0), 3, True, False),
        (dict(mask="bool", softcap=50.0), 1, True, False), (dict(mask="bool", scale=-0.1), 1, False, False),
    ],
)  # fmt: skip
def test_when_scores_begin_with_a_mask(settings, mask, exact, seeded):
    """Where heads have 64 values, if nothing comes between a score and its mask."""
    for dim in (64, 128, 512):
        spec = case("bf16", "bf16", (dim, dim), **(SIZES | settings)).spec
        made = shapes.shape(spec, (dim, dim), (torch.bfloat16,) * 3, mask, exact=exact)
        assert made.seeded == (seeded and dim == 64)


@pytest.mark.parametrize(("scale", "exact"), [(0.125, 1), (0.25, 1), (0.1, 0), (2.0, 0), (2.0**-70, 0), (-0.125, 0)])
def test_a_scale_that_rounds_nothing(scale, exact):
    data = inputs(case("bf16", "bf16", scale=scale, mask="additive", **SIZES))
    *_, launches = run(data)
    assert [dict(defines)["SEEDS"] for _, defines, _ in launches] == [exact]
