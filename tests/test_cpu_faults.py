"""Can the suite fail? Known kernel bugs (cpu_faults.py and, by kernels, cpu_tile_faults.py, cpu_quad_faults.py, ...) are
planted in the C++ of the CPU backend, and the comparison must notice each."""

from __future__ import annotations

import shutil

import pytest
import torch
from cpu_faults import ENCODER_FAULTS, LOOP_FAULTS, Fault
from cpu_float_faults import FLOAT_FAULTS
from cpu_group_faults import GROUP_FAULTS
from cpu_quad_faults import QUAD_FAULTS, SUM_FAULTS
from cpu_tile_faults import TILE_FAULTS
from cpu_value_faults import VALUE_FAULTS
from test_cpu import LONG, equal_layers, hard_rows, right, threads
from test_cpu_prefill import TERMS, WIDE, rounded
from test_cpu_quads import DENSE_CASES, QUADS, largest_sums

from gyrokv import Codec, LayerCache
from gyrokv.backends import cpu
from gyrokv.backends.cpu import build, native
from gyrokv.cases import Case, cases
from gyrokv.formats import FORMATS
from gyrokv.testing import assert_matches

FAULTS = LOOP_FAULTS + TILE_FAULTS + QUAD_FAULTS + VALUE_FAULTS + GROUP_FAULTS + FLOAT_FAULTS
ALL = FAULTS + SUM_FAULTS + ENCODER_FAULTS
_MOST = 6  # cases that are run for one fault, spread over all that are relevant
_LEVELS = ("amx", "avx512", "avx2", "portable")  # tiles, lines of codes, half tables, products without an offset

pytestmark = pytest.mark.slow


def planted(folder) -> None:
    """Put all faults into the copy of ``csrc/`` at ``folder``, none of them switched on."""
    original = {path.name: path.read_text() for path in folder.iterdir()}
    text = dict(original)
    for number, fault in enumerate(ALL, 1):
        for name, old, new in fault.edits:
            count = original[name].count(old)
            assert count == 1 == text[name].count(old), f"{old!r} occurs {count} times in {name}; adapt {fault.name!r}"
            text[name] = text[name].replace(old, new.replace("@", f"fault == {number}"))
    for name, kept in (("quads.h", "if (key != own.key)"), ("expand.h", "if (!own ||")):  # these are made of the faults too
        assert text[name].count(kept) == 1, f"{kept!r} is not in {name}"
        text[name] = text[name].replace(kept, f"if (true || {kept[4:]}")
    start = "namespace gyrokv {\n"
    text["core.h"] = text["core.h"].replace(start, f"{start}extern int fault;\n", 1)
    text["core.cpp"] += "\nint gyrokv::fault = 0;\nGYROKV_API void gyrokv_plant(int which) { fault = which; }\n"
    for name, content in text.items():
        (folder / name).write_text(content)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> native.Library:
    folder = tmp_path_factory.mktemp("planted")
    shutil.copytree(build.CSRC, folder / "csrc")
    planted(folder / "csrc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "CSRC", folder / "csrc")
        try:
            made = build.build(folder / "core.so", ("-O1",), [name for name in build.known_levels() if name in _LEVELS])
        except build.NoCompiler as error:
            pytest.skip(str(error))
        return native.Library(made.path)


@pytest.fixture
def plant(built, backend_here, monkeypatch):
    """``plant(fault)``: from now on the backend has it; None for no fault at all."""
    backend_here("cpu")
    monkeypatch.setattr(native, "_library", built)
    best = built.level

    def switch(fault: Fault | None) -> None:
        wanted = "portable" if fault is None else fault.level
        found = {level.name: level for level in built.levels if not level.lacks}
        if wanted not in found:
            pytest.skip(f"{wanted} does not run here")
        built.level = found[wanted]
        built._dll.gyrokv_plant(0 if fault is None else 1 + ALL.index(fault))

    with threads(3):
        yield switch
    built._dll.gyrokv_plant(0)
    built.level = best


def check(case: Case, problem) -> None:
    """AssertionError unless the backend is right."""
    data = problem(case)
    out, lse = data.run("cpu")
    if case in WIDE:
        rounded(data, out, lse)
    elif case in LONG or case in TERMS or case in QUADS or case in DENSE_CASES:
        right(data, out, lse)
    else:
        assert_matches(data, out, lse, cpu.FAST_BOUND if case.spec.fast else cpu.BOUND)


def chosen(fault: Fault) -> list[Case]:
    pool = WIDE if fault.wide else TERMS if fault.terms else QUADS + DENSE_CASES if fault.few else (*cases(), *LONG)
    relevant = [c for c in pool if fault.relevant(c) and not cpu.why_not(c.spec)]
    return relevant[:: -(-len(relevant) // _MOST) or 1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name.replace(" ", "_"))
def test_planted_fault_is_noticed(fault, plant, problem):
    """If a planted fault passes, so would the same mistake in a new kernel."""
    assert chosen(fault), "no case of the suite needs this"
    plant(fault)
    for case in chosen(fault):
        with pytest.raises(AssertionError):
            check(case, problem)
            print(f"not noticed by {case}")


@pytest.mark.parametrize("fault", FAULTS[::6], ids=lambda f: f.name.replace(" ", "_"))
def test_no_fault_is_noticed_in_the_same_library(fault, plant, problem):
    """Planting must not break anything by itself, or the tests above show nothing."""
    plant(None)
    for case in chosen(fault):
        check(case, problem)


@pytest.mark.parametrize("fault", SUM_FAULTS, ids=lambda f: f.name.replace(" ", "_"))
def test_planted_fault_of_sums_is_noticed(fault, plant):
    """Only rows of the largest codes have sums that do not fit."""
    for bits in (5, 6):
        plant(None)
        largest_sums(bits)
        plant(fault)
        with pytest.raises(AssertionError):
            largest_sums(bits)


def same_bytes(fmt) -> bool:
    for dim in (64, 128):
        x = hard_rows(dim, torch.float32, 19)
        layers = [LayerCache(Codec(fmt, dim), Codec(fmt, dim), kv_heads=2, batch=2) for _ in range(2)]
        cpu.append(layers[0], x, x)
        layers[1].append(x, x)
        if not equal_layers(*layers):
            return False
    return True


@pytest.mark.parametrize("fault", ENCODER_FAULTS, ids=lambda f: f.name.replace(" ", "_"))
def test_planted_fault_of_the_encoder_is_noticed(fault, plant):
    """A wrong bit in what is stored must show, with each format that the fault concerns."""
    formats = [f for f in FORMATS.values() if fault.relevant(f)]
    assert formats
    plant(None)
    assert all(same_bytes(f) for f in formats)
    plant(fault)
    assert not [f.name for f in formats if same_bytes(f)]
