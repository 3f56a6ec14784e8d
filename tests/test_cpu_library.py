"""How the compiled CPU backend is built, found and refused, and whether sanitizers find fault with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_cpu import invented

from gyrokv import GyroKVError, explain
from gyrokv.backends import cpu
from gyrokv.backends.cpu import build, native
from gyrokv.cases import case
from gyrokv.dispatch import choose, reasons
from gyrokv.testing import inputs

SPEC = case("q8_0", "turbo4").spec


@pytest.fixture
def fresh(monkeypatch):
    """As in a process that has not loaded the library yet."""
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_why", None)
    return monkeypatch


def test_without_a_library_torch_takes_over_and_says_why(fresh, tmp_path):
    """An installation without a compiler must work, and must say what is missing and what to do about it."""
    (tmp_path / "_core.txt").write_text("no C++20 compiler found; looked for $CXX\n")
    fresh.setattr(native, "LIBRARY", tmp_path / "_core.so")
    fresh.setattr(native, "FAILURE", tmp_path / "_core.txt")
    (why,) = cpu.missing()
    assert "no C++20 compiler found" in why and "python hatch_build.py" in why and "pip install" in why
    assert reasons(cpu, SPEC)[0] == f"missing here: {why}" and choose(SPEC).name == "torch" and why in explain(SPEC)
    assert cpu.describe() == {"cpu level": f"none: {why}"}
    with pytest.raises(GyroKVError, match="no C\\+\\+20 compiler found"):
        native.library()
    data = inputs(case("q8_0", "turbo4"))
    data.run()


def test_a_library_that_was_never_built_is_explained(fresh, tmp_path):
    fresh.setattr(native, "LIBRARY", tmp_path / "_core.so")
    fresh.setattr(native, "FAILURE", tmp_path / "_core.txt")
    assert f"{tmp_path / '_core.so'}: it was never built; {build.HOW_TO}" in cpu.missing()[0]


def test_a_stale_library_is_refused(fresh, backend_here):
    """Kernels of older sources would be tested, and trusted, in place of those in the tree."""
    backend_here("cpu")
    fresh.setattr(native, "_library", None)
    fresh.setattr(native, "digest", lambda: "of other sources")
    with pytest.raises(GyroKVError, match="built from other sources than .*csrc holds; reinstall gyrokv .*hatch_build.py"):
        native.Library(build.LIBRARY)
    assert "other sources" in cpu.missing()[0] and choose(SPEC).name == "torch"


def test_a_file_that_is_no_library_is_refused(tmp_path):
    path = tmp_path / "_core.so"
    path.write_bytes(b"not a library")
    with pytest.raises(GyroKVError, match="cannot be loaded .*hatch_build.py"):
        native.Library(path)
    with pytest.raises(GyroKVError, match="cannot be loaded"), cpu.forced(path=path):
        pass
    assert not native._library or native._library.path == build.LIBRARY


def test_structures_of_another_size_are_refused(fresh, backend_here):
    """Fields that Python and C++ place differently would be read as other numbers, addresses among them."""
    backend_here("cpu")
    fresh.setattr(native, "_MIRRORED", (*native._MIRRORED[1:], native._MIRRORED[0]))
    with pytest.raises(GyroKVError, match="Rows has .* bytes in csrc/core.h and .* in native.py"):
        native.Library(build.LIBRARY)


def test_what_is_packed_is_the_structure():
    """``ATTEND`` writes the bytes that ctypes would, padding included."""
    values = list(range(1, len(native.ATTEND.unpack(bytes(native.ATTEND.size))) + 1))
    made = native.Attend.from_buffer_copy(native.ATTEND.pack(*values))
    flat = []
    for name, _ in native.Attend._fields_:
        value = getattr(made, name)
        flat += value if hasattr(value, "__len__") else [value]
    assert flat == values


def test_a_level_that_cannot_run_is_refused(backend_here):
    """A benchmark that asks for one instruction set must not time another."""
    backend_here("cpu")
    best = cpu.level()
    with pytest.raises(ValueError, match=r"level='mmx' is not one that runs here: \[.*'portable'\]"), cpu.forced("mmx"):
        pass
    used = native.library()
    levels = tuple(found._replace(lacks="this CPU has none") if found.name == best else found for found in used.levels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(used, "levels", levels)
        with pytest.raises(ValueError, match=f"level='{best}' is not one that runs here"), cpu.forced(best):
            pass
    assert cpu.level() == best


def test_forcing_is_undone(backend_here):
    """What a test or a benchmark forces must not stay for the rest of the process, also when it fails."""
    backend_here("cpu")
    before = cpu.describe()
    with pytest.raises(ZeroDivisionError), cpu.forced("portable", team=False) as used:
        assert cpu.level() == "portable" and not used.team
        said = cpu.describe()
        assert "portable: asked for" in said["cpu level"] or before["cpu level"].startswith("portable")
        assert "of its own" in said["cpu threads"]
        raise ZeroDivisionError
    assert cpu.describe() == before


def test_the_levels_are_described(backend_here):
    backend_here("cpu")
    built = [level.name for level in native.library().levels]
    assert built[-1] == "portable" and tuple(built) == tuple(n for n in build.known_levels() if n in built)
    assert all(name in native.library().left_out for name in set(build.known_levels()) - set(built))
    assert all(name in cpu.describe()["cpu built"] for name in built)


def test_groups_that_kernels_cannot_take_are_refused(backend_here):
    """Kernels multiply 32 values at a time: a row with smaller groups must go to torch, not come out wrong."""
    backend_here("cpu")
    fmt = invented(4, "index", False, (16,))
    spec = case(fmt, "q8_0").spec
    assert any("16" in reason for reason in cpu.why_not(spec)) and "torch: can run (chosen)" in explain(spec)


# -- building


def test_a_build_without_a_compiler_says_so(monkeypatch, tmp_path, capsys):
    """pip hides what a build printed, so the reason is kept beside the library."""
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "_core.so")
    monkeypatch.setattr(build, "FAILURE", tmp_path / "_core.txt")
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setattr(build.build, "__defaults__", (tmp_path / "_core.so", *build.build.__defaults__[1:]))
    with pytest.raises(build.NoCompiler, match=r"looked for \$CXX; .*no-such-compiler does not compile C\+\+20"):
        build.build_in_place()
    assert "no C++20 compiler found" in (tmp_path / "_core.txt").read_text()
    assert build.main() == 1 and build.main(["--if-needed"]) == 0
    assert "was not built" in capsys.readouterr().err and not (tmp_path / "_core.so").exists()


def test_sources_that_do_not_compile_say_why(monkeypatch, tmp_path):
    """The first errors of the compiler and the command must be there, or nobody could report them."""
    compiler_here()
    broken = tmp_path / "csrc"
    shutil.copytree(build.CSRC, broken)
    with (broken / "core.h").open("a") as file:
        file.write('\nstatic_assert(false, "broken on purpose");\n')
    monkeypatch.setattr(build, "CSRC", broken)
    with pytest.raises(build.BuildError, match="(?s)cannot compile .*\\.cpp with -std=c\\+\\+20.*broken on purpose"):
        build.build(tmp_path / "core.so", levels=("portable",))
    assert not list(tmp_path.glob("core.so*"))


def test_every_source_counts_for_the_digest(monkeypatch, tmp_path):
    """An edit that does not change the digest would leave the old kernels in use."""
    copy = tmp_path / "csrc"
    shutil.copytree(build.CSRC, copy)
    monkeypatch.setattr(build, "CSRC", copy)
    seen = {build.digest()}
    files = sorted(copy.iterdir())
    for path in files:
        path.write_text(path.read_text() + "\n")
        seen.add(build.digest())
    assert len(seen) == len(files) + 1 and {".h", ".cpp"} == {path.suffix for path in files}


def compiler_here() -> list[str]:
    try:
        return build.find_compiler()
    except build.NoCompiler as error:
        pytest.skip(str(error))


# -- sanitizers

_FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1", "-O1")
_SUITE = """
import itertools, sys
import torch
from gyrokv import Codec, LayerCache
from gyrokv.backends import cpu
from gyrokv.backends.cpu import native
from gyrokv.cases import cases, fits
from gyrokv.formats import FORMATS
from gyrokv.spec import HEAD_DIMS
from gyrokv.testing import inputs, poisoned_memory
from test_cpu import LONG, THIN, hard_rows
from test_cpu_prefill import TERMS, WIDE

problems = [inputs(c) for c in (*LONG, *WIDE, *TERMS, *THIN[::4])]
with cpu.forced(path=sys.argv[1]) as used:
    levels = [level.name for level in used.levels if not level.lacks]
for level in levels:
    with cpu.forced(level, path=sys.argv[1]), poisoned_memory():
        for count, team in ((1, True), (3, False)):
            torch.set_num_threads(count)
            with cpu.forced(team=team):
                for problem in problems:
                    problem.run("cpu")
        torch.set_num_threads(1)
        for i, (fmt, dim) in enumerate(itertools.product(FORMATS.values(), HEAD_DIMS)):
            if fits(fmt, dim) and i % 2:
                dtype = (torch.float32, torch.float16, torch.bfloat16)[i % 3]
                x = hard_rows(dim, dtype, (1, 5, 19)[i // 2 % 3])
                cpu.append(LayerCache(Codec(fmt, dim), Codec(fmt, dim), kv_heads=2, batch=2), x, x)
print("clean:", *levels)
"""


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path, backend_here):
    """Reads and writes beyond tensors and scratch memory, shifts and conversions without a meaning, misaligned access."""
    backend_here("cpu")
    command = compiler_here()
    libraries = [runtime(command, f"lib{name}.so") for name in ("asan", "ubsan")]
    if not all(libraries) or build._accepts(command, "int f() { return 0; }", _FLAGS):
        pytest.skip(f"{command} has no sanitizers")
    built = build.build(tmp_path / "core.so", _FLAGS)
    environment = dict(
        os.environ, LD_PRELOAD=" ".join(libraries), ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1",
        PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), str(Path(build.__file__).parents[3])]),
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _SUITE, str(built.path)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-6000:]
    can = [level.name for level in native.library().levels if not level.lacks]
    assert done.stdout.split() == ["clean:", *can]


def runtime(command: list[str], name: str) -> str:
    """The path of a sanitizer's runtime, empty when the compiler has none."""
    said = subprocess.run([*command, f"-print-file-name={name}"], capture_output=True, text=True, check=False).stdout.strip()
    return said if os.path.isabs(said) and os.path.exists(said) else ""
