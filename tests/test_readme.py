"""What README.md and CONTRIBUTING.md show must run: their Python, their commands, the row they add."""

from __future__ import annotations

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


def test_contributing_row_is_a_format():
    """The row that CONTRIBUTING.md adds would not be one, or not be as good as it says."""
    (row,) = blocks(CONTRIBUTING, "python")
    fmt = eval(row.strip().rstrip(","), {"KVFormat": KVFormat})
    x = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0))
    error = (dequantize(quantize(x, fmt), fmt, 128) - x).square().mean().item()
    assert 0.8 * fmt.max_nmse < error <= fmt.max_nmse
