"""Does the code keep its own rules? Imports point one way, nothing knows a format by name, a new row needs no code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gyrokv
from gyrokv import Codec, FormatError, KVCache, KVFormat, LayerCache, LayerShape, attend, dequantize, quantize
from gyrokv.cases import cases, kinds
from gyrokv.formats import FORMATS
from gyrokv.testing import assert_matches, inputs

SOURCE = Path(gyrokv.__file__).parent
TESTS = Path(__file__).parent
FILES = {path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", "."): path for path in SOURCE.rglob("*.py")}

# Modules by height: each imports lower ones only. What is not listed stands on top and may import all but the CLI.
HEIGHTS = (
    ("errors", "memory", "packing", "rotation", "levels", "masks"),
    ("formats",),
    ("quant", "spec"),
    ("wire", "view", "reference", "config"),
    ("rows", "place", "watch"),
    ("layer",),
    ("files", "backends"),
    ("dispatch",),
    ("cache", "cases", "paged"),
    ("testing",),
)
TOP = len(HEIGHTS)


def package(module: str) -> str:
    """``backends.tiled`` belongs to ``backends``."""
    return module.split(".")[0]


def height(module: str) -> int:
    name = package(module)
    if name in ("cli", "__main__"):
        return TOP + 1 + (name == "__main__")
    return next((i for i, names in enumerate(HEIGHTS) if name in names), TOP)


def imports(module: str, tree: ast.AST) -> set[str]:
    """Modules of this package that ``module`` imports, also inside functions."""
    found = set()
    here = module.removesuffix(".__init__").split(".") if module.endswith(".__init__") else module.split(".")[:-1]
    here = [part for part in here if part != "__init__"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("gyrokv.") for a in node.names if a.name.startswith("gyrokv.")}
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = here[: len(here) - node.level + 1]
            base += node.module.split(".") if node.module else []
        elif node.module and node.module.split(".")[0] == "gyrokv":
            base = node.module.split(".")[1:]
        else:
            continue
        for alias in node.names:
            for name in (".".join([*base, alias.name]), ".".join(base)):
                if name and (name in FILES or f"{name}.__init__" in FILES):
                    found.add(name)
                    break
    return found


@pytest.mark.parametrize("module", FILES)
def test_imports_point_one_way(module):
    """A backward import makes two modules one: neither could be understood or replaced alone."""
    if module == "__init__":
        return
    used = imports(module, ast.parse(FILES[module].read_text()))
    for other in used - {module}:
        if package(other) != package(module):
            assert height(other) < height(module) or (height(other) == height(module) == TOP), f"{module} imports {other}"


def test_the_imports_are_seen():
    """The test above would pass if it found nothing."""
    assert imports("quant", ast.parse(FILES["quant"].read_text())) == {"packing", "formats", "rotation"}
    assert "backends.tiled" in imports("dispatch", ast.parse(FILES["dispatch"].read_text()))
    assert {"quant", "reference"} <= imports("backends.tiled", ast.parse(FILES["backends.tiled"].read_text()))
    tree = ast.parse("def f():\n    from ..dispatch import attend\n    import gyrokv.cli")
    assert imports("backends.x", tree) == {"dispatch", "cli"} and height("dispatch") > height("backends.x")


def test_nothing_imports_the_command_line():
    users = {m for m, p in FILES.items() if any(package(i) == "cli" for i in imports(m, ast.parse(p.read_text())))}
    assert {package(m) for m in users} <= {"cli", "__main__"}


def run(code: str) -> str:
    """The output of ``code`` in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_light():
    """``import gyrokv`` loads torch and safetensors: no framework, no plotting, no compiler, no command line."""
    code = (
        "import sys, torch, numpy, safetensors, safetensors.torch\n"
        "before = set(sys.modules)\n"
        "import gyrokv\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))\n"
        "print(*sorted(m for m in sys.modules if m.startswith('gyrokv.')))"
    )
    new, own = (set(line.split()) for line in run(code).splitlines())
    for heavy in ("transformers", "triton", "mlx", "matplotlib", "typer", "rich", "numba", "hypothesis", "pytest"):
        assert heavy not in new
    assert "gyrokv" in new and new <= {"gyrokv"} | set(sys.stdlib_module_names)
    assert not {
        m for m in own if package(m.removeprefix("gyrokv.")) in ("hf", "cli", "testing", "cases", "levels", "evaluate")
    }


# -- formats by name

NAMES = frozenset(FORMATS)
# Here a name is data: the table itself, foreign layouts, defaults and examples. Kernels and storage know none.
MAY_NAME = ("formats", "wire", "config", "cases", "evaluate", "cli", "hf", "page", "plot", "scoring")


def names_in(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value in NAMES}


def branches(tree: ast.AST) -> list[int]:
    """Lines where a comparison, a match, or a prefix or suffix test involves the name of a format."""
    lines = []
    for node in ast.walk(tree):
        affix = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "endswith", "removesuffix")
        if (isinstance(node, (ast.Compare, ast.match_case)) or affix) and names_in(getattr(node, "pattern", node)):
            lines.append(getattr(node, "lineno", 0))
    return lines


@pytest.mark.parametrize("module", FILES)
def test_no_code_branches_on_the_name_of_a_format(module):
    """A row must be enough to add a format; whoever compares names needs a change for every row."""
    tree = ast.parse(FILES[module].read_text())
    assert branches(tree) == []
    if package(module) not in MAY_NAME:
        assert names_in(tree) == set()


def test_branches_are_seen():
    for code in (
        "x = fmt.name == 'turbo4'",
        "if fmt.name in ('q8_0', 'q4_0'): pass",
        "y = 1 if 'bf16' != name else 2",
        "match name:\n    case 'tq6': pass",
        "name.startswith('turbo3')",
    ):
        assert branches(ast.parse(code))
    assert not branches(ast.parse("cache = make('q8_0', v='turbo4')"))


# -- a new format


# 4-bit NormalFloat (Dettmers et al. 2023): asymmetric levels, scaled by the largest magnitude
NF4 = KVFormat(
    "normal4", "codebook", 4, 0.0102, coding="index", scale="absmax", groups=(64, 32), ties="down",
    levels=(
        -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
        0.24611230, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ),
)  # fmt: skip


def test_a_row_is_enough_to_store_and_attend():
    """Quantise, hold, attend and count bytes with a row that the library has never seen."""
    x = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0))
    packed = quantize(x, NF4)
    assert packed.words.shape == (2000, 32) and packed.scale.shape == (2000, 2) and NF4.bytes_per_head(128) == 68
    error = float((dequantize(packed, NF4, 128) - x).square().mean() / x.square().mean())
    assert 0.8 * NF4.max_nmse < error <= NF4.max_nmse
    layer = LayerCache(Codec(NF4, 96), Codec(FORMATS["turbo4"], 96), kv_heads=2)
    assert layer.k_codec.group == 32
    k, v, q = (torch.randn(1, heads, 20, 96) for heads in (2, 2, 4))
    out = attend(q, layer.append(k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert float((out - want).norm() / want.norm()) < 0.25
    with pytest.raises(FormatError, match="unknown format 'normal4'"):
        Codec("normal4", 64)


def test_a_row_in_the_table_is_configured_saved_and_tested(monkeypatch, tmp_path):
    """In the table it has a name: configurations, files and the cases of this suite pick it up."""
    monkeypatch.setattr(gyrokv.formats, "FORMATS", {**FORMATS, NF4.name: NF4})
    cache = KVCache("k=normal4,v=turbo4,recent=4", [LayerShape(2, 64)])
    cache.append(0, *torch.randn(2, 1, 2, 30, 64))
    cache.save(tmp_path / "cache")
    loaded = KVCache.load(tmp_path / "cache")
    q = torch.randn(1, 4, 1, 64)
    assert torch.equal(cache.attend(q, 0), loaded.attend(q, 0)) and loaded.layers[0].k_codec.format is NF4
    assert NF4 in kinds()
    mine = [c for c in cases() if NF4 in (c.spec.k_format, c.spec.v_format)]
    assert {c.spec.head_dim for c in mine} >= {32, 96, 576} and {c.spec.v_format.name for c in mine} >= set(FORMATS)
    for case in mine[::12]:
        data = inputs(case)
        assert_matches(data, *data.run("torch"))


def test_a_row_reaches_the_tests_of_the_backends():
    """Collecting the suite with one more row yields its cases: no test lists formats by hand."""
    code = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "import gyrokv.formats as formats, test_structure\n"
        "formats.FORMATS = dict(formats.FORMATS, normal4=test_structure.NF4)\n"
        "import test_backends\n"
        "print(sum('normal4' in str(c) for c in test_backends.CASES))"
    )
    assert int(run(code)) > 60


# -- files


@pytest.mark.parametrize("path", [*SOURCE.rglob("*.py"), *TESTS.glob("*.py")], ids=lambda p: p.name)
def test_files_are_short(path):
    """400 lines, 600 for a kernel in a backend's own folder: what is longer is two things."""
    kernel = path.parent.parent.name == "backends"
    assert len(path.read_text().splitlines()) <= (600 if kernel else 400)


@pytest.mark.parametrize("module", FILES)
def test_no_handler_swallows_what_it_does_not_know(module):
    """A broad except turns a typo into a slow path or a wrong result; one that cleans up must raise again."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
            raises = isinstance(node.body[-1], ast.Raise)
            assert not broad or raises, f"line {node.lineno}"
