"""What the GPU backend decides and compiles before a kernel starts: tested on machines without a GPU too."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import gpu_record
import pytest
import torch

from gyrokv import GyroKVError, attention, explain
from gyrokv.backends import gpu
from gyrokv.backends.gpu import calls, nvrtc, plan
from gyrokv.cases import case, cases, fits
from gyrokv.dispatch import reasons
from gyrokv.formats import FORMATS, KVFormat
from gyrokv.spec import HEAD_DIMS
from gyrokv.testing import inputs

_SPILLS = 320  # bytes; the worst of the sample (tables on both sides, 16 query rows) has 308
COLUMNS = (1, 4, 5, 8, 9, 32)  # query rows per KV head
# rows, tile, warps and the pitches of K and V: what was measured to be fast
PINNED = {
    ("bf16", "bf16", 128, 4): (4, 16, 16, 320, 272),
    ("bf16", "bf16", 512, 8): (8, 16, 6, 1088, 1040),
    ("q8_0", "q8_0", 128, 4): (4, 32, 12, 192, 144),
    ("q8_0", "q8_0", 128, 16): (16, 16, 12, 192, 144),
    ("turbo4", "turbo4", 128, 4): (4, 32, 16, 64, 80),
    ("turbo4", "turbo4", 512, 8): (8, 16, 8, 320, 272),
    ("turbo3", "turbo3", 128, 4): (4, 64, 12, 48, 48),
    ("turbo2", "turbo2", 128, 8): (8, 64, 8, 32, 48),
    ("turbo2", "turbo2", 256, 8): (8, 64, 8, 64, 80),
    ("tq6", "tq6", 128, 4): (4, 32, 12, 96, 112),
    ("turbo2", "turbo2", 256, 4): (4, 64, 8, 64, 80),
    ("tq5", "tq5", 128, 4): (4, 32, 16, 80, 80),
    ("tq8", "tq5", 128, 8): (8, 32, 16, 192, 80),
    ("f32", "f32", 512, 4): (4, 16, 3, 2064, 2064),
    ("fp8_e4m3", "fp8_e4m3", 576, 4): (4, 16, 8, 576, 592),
    ("q8_0", "turbo3", 128, 4): (4, 32, 16, 192, 48),
    ("turbo2", "turbo2", 512, 8): (8, 32, 8, 192, 144),
    ("turbo4", "turbo4", 256, 4): (4, 32, 8, 192, 144),
}


def row(fmt: KVFormat, dim: int) -> plan.Row:
    return plan.row_of(fmt, dim, fmt.layout(dim)[0])


def problem(k: KVFormat, v: KVFormat, dim: int, columns: int, two_terms: bool = False) -> plan.Problem:
    """Rows side by side, aligned as an allocation is."""
    rows = row(k, dim), row(v, dim)
    copies = [next(n for n in (16, 8, 4) if r.bytes % n == 0) for r in rows]
    strides = *(r.bytes for r in rows), *(r.scale_bytes for r in rows)
    table = rows[0].kind == plan.TABLE and k is v
    return plan.Problem(*rows, columns, plan.BF16, two_terms, False, 0, False, False, table, *copies, *strides)


@pytest.mark.parametrize("name", FORMATS)
def test_every_plan_fits_the_machine(name):
    """Any format with this one, at any head size, for any number of query rows: within what a block may have."""
    for (other, v), dim, columns in product(FORMATS.items(), HEAD_DIMS, COLUMNS):
        k = FORMATS[name]
        if not (fits(k, dim) and fits(v, dim)):
            continue
        for two_terms in (False, True):
            made = plan.plan(problem(k, v, dim, columns, two_terms))
            defines = dict(made.defines)
            what = f"{name}.{other} d{dim} {columns} rows: {made}"
            assert made.rows == (4 if columns <= 4 else 8 if columns <= 8 or defines["DV"] > 256 else 16), what
            assert made.tile in (16, 32, 64) and 1 <= made.warps <= 20 and made.warps % made.team == 0, what
            assert made.shared + plan._STATIC <= plan.SHARED_MEMORY, what
            slot = defines["K_PITCH"] + defines["V_PITCH"] + sum(row(f, dim).scale_bytes for f in (k, v))
            ring = made.warps * made.tile * slot
            assert ring <= made.shared and made.warps // made.team * made.rows * defines["DV"] * 4 <= made.shared, what


@pytest.mark.parametrize("pair", PINNED, ids=lambda p: ".".join(map(str, p)))
def test_pinned_plans(pair):
    """A change of the plan is a change of speed: measure it, then write it here."""
    k, v, dim, columns = pair
    made = plan.plan(problem(FORMATS[k], FORMATS[v], dim, columns))
    defines = dict(made.defines)
    assert (made.rows, made.tile, made.warps, defines["K_PITCH"], defines["V_PITCH"]) == PINNED[pair]


@pytest.mark.parametrize("columns", COLUMNS)
def test_q_keeps_the_bits_that_the_bound_counts_on(columns):
    """One bfloat16 is a term of q only if q has no more bits: 2**-9 would pass the bound."""
    for name, q_type in product(("f16", "bf16", "f32", "q8_0", "tq6"), (plan.F16, plan.BF16, plan.F32)):
        made = plan.plan(replace(problem(FORMATS[name], FORMATS["tq5"], 40, columns), q_type=q_type))
        exact = q_type == plan.BF16 or name not in ("bf16", "f32")
        assert dict(made.defines)["TERMS"] == (1 if exact and columns > 4 else 2), (name, q_type)


@pytest.mark.parametrize("side", ["k", "v"])
def test_pitches_are_free_of_conflicts(side):
    """Lanes that read shared memory at once meet in no bank. Keys of float32 are read twice as wide: two passes more."""
    for fmt, dim in product(FORMATS.values(), HEAD_DIMS):
        if not fits(fmt, dim):
            continue
        r = row(fmt, dim)
        copies = [n for n in (16, 8, 4) if r.bytes % n == 0]
        for copy, team in product(copies, (1, 2) if plan.halves(r) else (1,)):
            pitch = plan._pitch(r, copy, side, team)
            assert pitch >= r.bytes // team and pitch % copy == 0
            size, at = loads(r, side, r.words // team)
            passes = plan._conflicts([i * pitch + byte for i, byte in at], size)
            assert passes <= (2 if r.kind == plan.F32 and side == "k" else 0), f"{fmt} d{dim} copies of {copy}: {passes}"


def loads(r: plan.Row, side: str, words: int) -> tuple[int, list[tuple[int, int]]]:
    """(bytes per lane, (row, byte) by lane) of the loads in score.cuh and values.cuh. ``words``: those a warp has."""
    units = 4 if r.kind == plan.F32 else 2
    if side == "k":  # load_pairs: words j .. j + 2 VEC - 1 of row g
        vector = next(n for n in (4, 2, 1) if n == 1 or words // 2 % (4 * n) == 0)
        size = 8 if r.kind == plan.F32 else 4 * vector
        return size, [(lane // 4, min(lane % 4 * 2 * vector, words - 2) * units) for lane in range(32)]
    if words % 8 == 0 and r.kind != plan.F32:  # load_transposed: 16 bytes of each token
        return 16, [(lane, 0) for lane in range(32)]
    return 4, [(2 * (lane % 4), min(lane // 4, words - 1) * units) for lane in range(32)]


def test_conflicts_are_counted():
    """The test above would pass if nothing ever conflicted."""
    assert plan._conflicts([128 * lane for lane in range(32)], 4) == 31
    assert plan._conflicts([4 * lane for lane in range(32)], 4) == 0
    assert plan._conflicts([0] * 32, 4) == 0, "one word for all lanes is one pass"
    assert plan._conflicts([256 * lane for lane in range(32)], 16) == 28


@pytest.mark.parametrize("units", [1, 8, 64, 500, 70_000])
def test_splits(units):
    """At least one, no more than the merge holds, none without a tile for each warp; long contexts fill the machine."""
    for tiles, warps in product((1, 2, 16, 17, 130, 4096, 300_000), (1, 8, 16)):
        count = plan.splits(units, tiles, warps, 132)
        assert 1 <= count <= 256 and (count == 1 or (count - 1) * warps < tiles)
        if tiles == 300_000 and units <= 64:
            assert units * count >= 0.9 * 132
    assert plan.splits(0, 100, 8, 132) == 1


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 12, 71, 128, 255, 256, 1000])
def test_kernels_divide_by_multiplying(n):
    """csrc/score.cuh's ``quotient``: the product is too large by one at most."""
    over = calls._over(n)
    for x in (*range(3 * n), *(m * n + i for m in (997, 2**20 // n, (2**31 - 1) // n - 1) for i in (-1, 0, 1))):
        q = x * over >> 32 if over else x
        assert q - (x - q * n < 0) == x // n


# -- structures


MERGE = {"SPLITS": 32, "OUT_TYPE": 2, "DIM": 128, "V_TURN": 0}
CTYPES = {"float": 4, "int": 4, "u32": 4, "i64": 8}


def structures() -> dict[str, list[tuple[str, int, int]]]:
    """(field, offset, size) of each structure in params.cuh, and of the one in turn.cuh, laid out as C++ does."""
    sources = nvrtc._sources()
    text = re.sub(r"//[^\n]*", "", (sources["turn.cuh"] + sources["params.cuh"]).decode())
    text = text.split("struct Source")[0]  # the encoder's, which asserts its own size, come last
    made: dict[str, list[tuple[str, int, int]]] = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL):
        at, fields = 0, []
        for declaration in filter(None, (part.strip() for part in body.split(";"))):
            kind, names = re.match(r"(?:const )?(\w+\*?) (.*)", declaration, re.DOTALL).groups()
            size = 8 if kind.endswith("*") else CTYPES.get(kind) or -(-sum(made[kind][-1][1:]) // 8) * 8
            for field in re.split(r",\s*", names):
                field, count = re.fullmatch(r"\s*(\w+)(?:\[(\d+)\])?\s*", field).groups()
                at += -at % (4 if kind == "SignBits" else min(size, 8))
                fields.append((field, at, size * int(count or 1)))
                at += fields[-1][2]
        made[name] = fields
    return made


@pytest.mark.parametrize("mirror", [calls.Side, calls.Finish, calls.Attend, calls.Merge], ids=lambda m: m.__name__)
def test_structures_are_laid_out_alike(mirror):
    """A field that moved would be read as another one."""
    fields = structures()[mirror.__name__]
    end = sum(fields[-1][1:])
    assert end + -end % 8 == ctypes.sizeof(mirror)
    there = {name: (at, size) for name, at, size in fields}
    for name, kind in mirror._fields_:
        offset, size = getattr(mirror, name).offset, ctypes.sizeof(kind)
        if issubclass(kind, ctypes.Array) and name not in there:  # strides: one array here, a field each there
            parts = [(at, n) for _, at, n in fields if offset <= at < offset + size]
            assert parts == [(offset + i * 8, 8) for i in range(size // 8)], name
        else:
            assert there[name] == (offset, size), name


needs_compiler = pytest.mark.skipif(nvrtc.compiler_version() is None, reason="libnvrtc was not found")


@needs_compiler
def test_the_compiler_lays_structures_out_alike():
    mirrors = (calls.Side, calls.Finish, calls.Attend, calls.Merge)
    size = "".join(f'static_assert(sizeof({m.__name__}) == {ctypes.sizeof(m)}, "size");\n' for m in mirrors)
    include = '#include "finish.cuh"\n'
    with nvrtc.sources([("merge.cu", include, include + size)]):
        nvrtc.compile_source("merge.cu", MERGE, gpu_record.ARCH)
    with (
        nvrtc.sources([("merge.cu", include, include + size.replace("== ", "== 8 + "))]),
        pytest.raises(GyroKVError, match="(?s)merge.cu does not compile for sm_90a with -DSPLITS=32 .*static"),
    ):
        nvrtc.compile_source("merge.cu", MERGE, gpu_record.ARCH)


# -- what would be launched


@pytest.mark.parametrize("at", range(3))
def test_launches_of_every_case(at):
    """Grids, threads and sizes that a GPU takes, and no more kernels than problems that differ in their constants."""
    for c in cases()[at::40]:
        if [r for r in gpu.why_not(c.on("cuda").spec) if r]:
            continue
        data = inputs(c)
        launches = gpu_record.launches(data)
        parts, merges = launches[: len(data.view.segments)], launches[len(data.view.segments) :]
        total = sum(p.argument.splits for p in parts)
        assert [m.name for m in merges] == ["merge"] * (total != 1)
        for merge in merges:
            assert merge.grid == (c.spec.batch * c.spec.q_heads * c.spec.q_len, 1, 1) and merge.argument.splits == total
        for launch in parts:
            assert launch.name == "attend" and launch.threads == 32 * launch.defines["WARPS"] <= 640
            tiles = -(-c.spec.groups * c.spec.q_len // launch.defines["ROWS"])
            assert launch.grid == (tiles, c.spec.kv_heads, c.spec.batch * launch.argument.splits)
            assert launch.shared + plan._STATIC <= plan.SHARED_MEMORY
            call = launch.argument
            assert call.splits_total == total and bool(call.finish.out) == (total == 1)
        assert [p.argument.split_base for p in parts] == [
            sum(p.argument.splits for p in parts[:i]) for i in range(len(parts))
        ]


SAMPLE = (
    dict(k="bf16", v="bf16", dims=(128, 128)), dict(k="q8_0", v="q8_0", dims=(128, 128)),
    dict(k="turbo4", v="turbo4", dims=(128, 128)), dict(k="turbo3", v="turbo2", dims=(256, 256)),
    dict(k="tq6", v="tq5", dims=(64, 64)), dict(k="fp8_e4m3", v="q4_0", dims=(96, 96)),
    dict(k="f32", v="tq8", dims=(80, 80), mask="additive", alibi=8.0, softcap=4.0),
)  # fmt: skip


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("heads", [8, 16, 32])
@pytest.mark.parametrize("settings", SAMPLE, ids=lambda s: f"{s['k']}.{s['v']}")
def test_kernels_compile_without_large_spills(settings, heads):
    """Registers that go to memory and back in the loop cost more than the loop."""
    dtype = torch.float32 if settings.get("mask") else torch.bfloat16
    data = inputs(case(**settings, q_heads=heads, kv_len=300, causal=True, dtype=dtype))
    for launch in gpu_record.launches(data):
        notes = gpu_record.compiles(launch)
        registers, spills = (int(re.search(p, notes)[1]) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
        assert registers * launch.threads <= 65536
        assert spills <= _SPILLS, f"{launch.name} {launch.defines}: {spills} bytes of {registers} registers are spilled"


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(nvrtc, "_compiler", lambda: None)
    with pytest.raises(GyroKVError, match="no CUDA compiler: libnvrtc was not found"):
        nvrtc.compile_source("merge.cu", MERGE, gpu_record.ARCH)


# -- reasons


@pytest.fixture
def machine(monkeypatch):
    """``machine(available, hip, capability, compiler)``: torch says that such a GPU is here."""

    def pretend(available=True, hip=None, capability=(9, 0), compiler=(13, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(nvrtc, "compiler_version", lambda: compiler)

    return pretend


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        (dict(), []),
        (dict(capability=(8, 0)), []),
        (dict(available=False), ["no NVIDIA GPU that torch can use"]),
        (dict(hip="6.4"), ["an NVIDIA GPU (this is an AMD one; its kernels have not been tried)"]),
        (dict(capability=(7, 5)), ["compute capability 8.0 (this GPU has 7.5)"]),
        (dict(compiler=None), ["NVIDIA's run-time compiler, libnvrtc (it comes with torch)"]),
    ],
    ids=["h200", "a100", "none", "amd", "old", "no_compiler"],
)  # fmt: skip
def test_what_a_machine_lacks(machine, there, missing):
    machine(**there)
    assert gpu.missing() == missing
    spec = case("q8_0", "turbo4").on("cuda").spec
    assert reasons(gpu, spec) == [f"missing here: {m}" for m in missing]
    lines = explain(spec).split("\n")
    if missing:
        at = lines.index("  gpu: cannot run because")
        assert lines[at + 1] == f"    missing here: {missing[0]}"
    else:
        assert any(line.startswith("  gpu: can run (chosen): decode: ") for line in lines)


def test_what_kernels_cannot_do():
    """What the spec alone rules out, in words that name the argument, the value and the limit."""
    base = case("q8_0", "turbo4").on("cuda").spec
    assert gpu.why_not(base) == []
    for settings, wanted in (
        (dict(dtype=torch.float64), "dtype=torch.float64 (it takes ['torch.float16', 'torch.bfloat16', 'torch.float32'])"),
        (dict(batch=65536), "batch=65536 (it takes at most 65535)"),
        (dict(q_heads=70_000, kv_heads=70_000), "kv_heads=70000 (it takes at most 65535)"),
        (dict(kv_len=2**30), "kv_len=1073741824 (it takes less than 1073741824)"),
    ):
        assert gpu.why_not(case("q8_0", "turbo4", **settings).on("cuda").spec) == [wanted]
    assert gpu.why_not(case("q8_0", "turbo4").spec) == ["device=cpu (it runs on cuda)"]
    q = torch.zeros(1, 1, 1, 64)
    with pytest.raises(
        GyroKVError, match=r"(?s)backend='gpu' cannot run this.*gpu: cannot run.*device=cpu \(it runs on cuda\)"
    ):
        attention(q, q, q, backend="gpu")


# -- compiled kernels on disk


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> Iterator[list]:
    """The list of what was compiled: a compiler that needs neither time nor a library. The cache is an empty folder."""
    made: list = []

    def compile_source(name, defines, arch):
        made.append((name, dict(defines), arch))
        return f"{name} {sorted(defines.items())} {arch}".encode(), ""

    monkeypatch.setenv("GYROKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: (13, 0))
    return made


def test_kernels_are_kept(compiled, monkeypatch, tmp_path):
    """Compiled once for the same sources, constants, architecture and compiler; anew when one of them differs."""
    code = nvrtc.cubin("merge.cu", MERGE, "sm_90a")
    assert nvrtc.cubin("merge.cu", MERGE, "sm_90a") == code and len(compiled) == 1
    nvrtc.cubin("merge.cu", {"SPLITS": 256}, "sm_90a")
    nvrtc.cubin("merge.cu", MERGE, "sm_80")
    monkeypatch.setattr(nvrtc, "compiler_version", lambda: (13, 1))
    nvrtc.cubin("merge.cu", MERGE, "sm_90a")
    assert len(compiled) == 4 == len(list((tmp_path / "cache/kernels").iterdir()))
    with nvrtc.sources([("merge.cu", "exp2f(top[i].x - reference)", "0.0f")]):
        nvrtc.cubin("merge.cu", MERGE, "sm_90a")
        nvrtc.cubin("merge.cu", MERGE, "sm_90a")
    assert len(compiled) == 6 and len(list((tmp_path / "cache/kernels").iterdir())) == 4


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-1], lambda b: b[:40], lambda b: b[:3] + b"x" + b[4:]])
def test_damaged_files_are_compiled_again(compiled, tmp_path, damage):
    """The driver may crash on half a kernel; a wrong one computes something else."""
    code = nvrtc.cubin("merge.cu", MERGE, "sm_90a")
    (path,) = (tmp_path / "cache/kernels").iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert nvrtc.cubin("merge.cu", MERGE, "sm_90a") == code
    assert len(compiled) == 2 and path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_time_only(compiled, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("GYROKV_CACHE", str(tmp_path / "file"))
    assert nvrtc.cubin("merge.cu", MERGE, "sm_90a") == nvrtc.cubin("merge.cu", MERGE, "sm_90a")
    assert len(compiled) == 2


def test_two_processes_compile_side_by_side(tmp_path, monkeypatch):
    """Each gets a whole kernel, and one is left."""
    code = (
        "import os, time\n"
        "from gyrokv.backends.gpu import nvrtc\n"
        "nvrtc.compiler_version = lambda: (13, 0)\n"
        "nvrtc.compile_source = lambda *a: (time.sleep(0.3), (b'kernel' * 100000, ''))[1]\n"
        "for i in range(3):\n"
        "    assert nvrtc.cubin('merge.cu', {'SPLITS': i}, 'sm_90a') == b'kernel' * 100000\n"
    )
    monkeypatch.setenv("GYROKV_CACHE", str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True), "ab"))
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    assert len(list((tmp_path / "kernels").iterdir())) == 3
