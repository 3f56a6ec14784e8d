"""Are the address spaces of a Metal source right? Clang knows, as C++ for OpenCL: the executor erases them.

A pointer without an address space, an error in Metal, is a generic one there: those are searched for in the text. Not
seen: Metal's own words that OpenCL lacks, and what else differs between the two languages.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
_FLAGS = (
    "-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-fsyntax-only", "-w", f"-I{HERE}/include", "-include", "spaces.h",
    "-target", "spir64",
)  # fmt: skip
_POINTER = re.compile(
    r"((?:\b\w+\s+){0,3})\b(?:float|int|uint|ushort|half|bfloat|long|bool|Call|T)\s*(?:const\s*)?[*&]\s*\w"
)
_SPACES = {"device", "threadgroup", "thread", "constant"}


@cache
def clang() -> tuple[str, ...] | None:
    """The command of a clang: one on the path, or the one in the Python package ziglang."""
    if found := shutil.which("clang"):
        return (found,)
    spec = importlib.util.find_spec("ziglang")
    for folder in spec.submodule_search_locations if spec else ():
        if found := shutil.which("zig", path=folder):
            return (found, "clang")
    return None


def errors(source: str) -> str:
    """What clang says against ``source``; empty if nothing."""
    text = re.sub(r"//[^\n]*|#include <metal_\w+>|\[\[.*?\]\]", "", source)
    for match in _POINTER.finditer(text):
        if not _SPACES & set(match.group(1).split()):
            return f"error: a pointer or reference without an address space: {match.group(0)!r}"
    text = re.sub(r"\bconst constant\b|\bconstant const\b", "constant", text)
    done = subprocess.run([*clang(), *_FLAGS, "-"], input=text, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""
