"""What README.md and CONTRIBUTING.md show must run: their Python, their commands, the row they add."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from gyrokv import FORMATS, KVFormat, dequantize, quantize

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Contents of the fenced blocks marked ``language``."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for mark, content in fences if mark == language]


@pytest.mark.parametrize("code", blocks(README, "python"), ids=["transformers", "bare"])
def test_readme_python_runs(code, tmp_path, monkeypatch, capsys):
    """A user who pastes the example would see an error."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_readme_commands_exist():
    """README would name a target or a command that is not there, or an option that it does not take."""
    import typer.main

    from gyrokv.cli.app import app

    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    text = "\n".join(blocks(README, ""))
    assert set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)) <= set(targets)
    group = typer.main.get_command(app)
    lines = [part for line in text.splitlines() for part in re.split(r"\s{3,}", line) if part.startswith("gyrokv ")]
    assert len(lines) >= 6
    for line in lines:
        _, command, *arguments = shlex.split(line)
        known = {name for parameter in group.commands[command].params for name in parameter.opts}
        assert {a for a in arguments if a.startswith("-")} <= known, line


def test_every_format_is_in_the_readme_or_new():
    """The table of formats would list a format that does not exist."""
    listed = re.findall(r"^\| `([\w.]+)` \| \d", README, re.MULTILINE)
    assert listed
    assert set(listed) <= set(FORMATS)


def test_gpu_table(tmp_path, monkeypatch):
    """A run that lacks a shape, a size or a peer must still give a table; without a run there is none."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    readme = importlib.import_module("readme")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.gpu_table() == ""
    shape = dict(groups=4, batch=1, kv_len=131072)
    rows = [
        dict(part="stock", by="flash", head_dim=128, kernel_us=200.0, ceiling_share=0.5, **shape),
        dict(part="stock", by="cudnn", head_dim=128, refused={"gqa": "no"}, **shape),
        dict(part="decode", formats="bf16", head_dim=128, kernel_us=100.0, ceiling_share=0.9, **shape),
        dict(part="decode", formats="q8_0/turbo4", head_dim=512, kernel_us=50.0, ceiling_share=0.8, **shape)
        | dict(times_faster_than_bf16=2.0, times_faster_than_best_stock=4.0),
        dict(part="append", formats="bf16", tokens=1, kernel_us=1.0, ceiling_share=0.1),
    ]
    machine = dict(devices={"cuda": "a GPU"}, driver="580", packages={"torch": "2.11"}, commit=None)
    record = dict(when="2026-01-01T00:00", environment=machine, command="run", kv_heads=8, rows=rows)
    record["ceiling"] = dict(gb_s=4280.0, way="add", ways={"add": 4280.0})
    (tmp_path / "gpu.json").write_text(json.dumps(record))
    lines = readme.gpu_table().splitlines()
    assert "| PyTorch, its best on bf16 | 200.0 µs, 50 % (flash) | – |" in lines
    assert "| `bf16` | 100.0 µs, 90 %, –, – | – |" in lines
    assert "| `q8_0/turbo4` | – | 50.0 µs, 80 %, 2.00x, 4.00x |" in lines
    assert "4.28 TB/s" in lines[2] and "16 sequences" not in "".join(lines)


def test_contributing_row_is_a_format():
    """The row that CONTRIBUTING.md adds would not be one, or not be as good as it says."""
    (row,) = blocks(CONTRIBUTING, "python")
    fmt = eval(row.strip().rstrip(","), {"KVFormat": KVFormat})
    x = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0))
    error = (dequantize(quantize(x, fmt), fmt, 128) - x).square().mean().item()
    assert 0.8 * fmt.max_nmse < error <= fmt.max_nmse
