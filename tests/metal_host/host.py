"""Metal source, run on the CPU: rewritten to C++ where macros cannot help, compiled by g++, called through ctypes.

``Library(source).run(name, buffers, groups, threads)`` runs a kernel and raises :class:`KernelFault` for races,
accesses outside of buffers and threadgroup arrays, writes to read-only buffers, threads that wait for each other for
ever, and too much threadgroup memory. See ``runtime.cpp`` for how, and ``include/msl.h`` for the MSL that is known.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCHEDULES = ("forward", "reverse", "random", "lockstep")
CACHE = HERE.parents[1] / "build" / "metal_host"  # of compiled kernels, for all tests and their workers
_GXX = ("g++", "-std=c++17", "-fPIC", "-shared", "-fno-exceptions", f"-I{HERE}/include")
_RUNTIME = (*_GXX, "-O2", "-fno-semantic-interposition")
_KERNEL = (
    *_GXX, "-O1", "-ffp-contract=off", "-nostdlib", "-g1", "-w", "-fsanitize=thread",
    "--param", "tsan-instrument-func-entry-exit=0",
)  # fmt: skip
_ATTRIBUTE = re.compile(r"\[\[.*?\]\]")
_POSITIONS = {  # the C++ that hands an attribute over
    "thread_position_in_grid": "uint3{at.grid[0], at.grid[1], at.grid[2]}",
    "threadgroup_position_in_grid": "uint3{at.group[0], at.group[1], at.group[2]}",
    "thread_index_in_threadgroup": "at.index",
    "thread_index_in_simdgroup": "at.lane",
    "simdgroup_index_in_threadgroup": "at.simdgroup",
}
_PRELUDE = """#include "msl.h"
using namespace metal;
struct AnyPointer { void* p; template <typename T> operator T*() const { return static_cast<T*>(p); } };
template <typename T, size_t N> T (&threadgroup_array(const char* name))[N] {
  return *static_cast<T(*)[N]>(metal_host::threadgroup_array(sizeof(T[N]), name));
}
extern "C" {
extern __attribute__((visibility("hidden"))) char __ehdr_start, _end;
const char* metal_host_image[] = {&__ehdr_start, &_end};
}
"""


class KernelFault(AssertionError):
    """What the executor found, with lines of the Metal source."""


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("writable", ctypes.c_int32),
        ("name", ctypes.c_char_p),
    )


class _Outcome(ctypes.Structure):
    _fields_ = (
        ("accesses", ctypes.c_uint64),
        ("threadgroup_bytes", ctypes.c_uint64),
        ("messages", ctypes.c_uint32),
        ("text", ctypes.c_char * 8192),
    )


@dataclass(frozen=True)
class Ran:
    """What a run did. ``accesses``: of buffers and threadgroup memory; ``threadgroup_bytes``: of the last threadgroup."""

    accesses: int
    threadgroup_bytes: int


def compiler() -> str | None:
    """The g++ that compiles kernels, or None: without one, and on processors that the executor does not know."""
    return shutil.which("g++") if platform.machine() == "x86_64" else None


def _built(name: str, text: str, command: Sequence[str], libraries: Sequence[str] = ()) -> Path:
    """The library that ``command`` makes of ``text``: made once, whichever process or test asks for it first."""
    headers = (HERE / "include" / header for header in ("msl.h", "runtime.h"))
    parts = (*(header.read_text() for header in headers), *command, *libraries, text)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    CACHE.mkdir(parents=True, exist_ok=True)
    output = CACHE / f"{name}-{digest}.so"
    if not output.exists():
        source = CACHE / f"{name}-{digest}.{os.getpid()}.cpp"  # another process may be making the same
        made = source.with_suffix("")
        source.write_text(text)
        whole = [*command, str(source), "-o", str(made), *libraries]
        done = subprocess.run(whole, capture_output=True, text=True, check=False)
        source.unlink()
        if done.returncode:
            raise KernelFault(f"{command[0]} cannot compile {source.name}:\n{done.stderr[:4000]}")
        os.replace(made, output)
    return output


@cache
def _runtime() -> tuple[str, ctypes.CDLL]:
    """``runtime.cpp``, which all kernels of this process share: its path, and the library."""
    path = str(_built("runtime", (HERE / "runtime.cpp").read_text(), _RUNTIME))
    return path, ctypes.CDLL(path)


@dataclass(frozen=True)
class _Buffers:
    """The buffers of a kernel in order of their index: ``names``, and which are ``writable``."""

    names: tuple[str, ...]
    writable: tuple[bool, ...]


def _parameters(text: str) -> tuple[list[str], _Buffers]:
    """The C++ that hands each parameter over, and the buffers, which are numbered in order."""
    arguments, names, writable = [], [], []
    for part in text.split(","):
        attribute = re.search(r"\[\[\s*(\w+)\s*(?:\(\s*(\d+)\s*\))?\s*\]\]", part)
        kind, number = attribute.groups() if attribute else ("buffer", None)
        plain = _ATTRIBUTE.sub("", part).strip()
        if kind in _POSITIONS:
            arguments.append(_POSITIONS[kind])
        elif kind == "buffer" and number in (None, str(len(names))):
            arguments.append(f"AnyPointer{{buffers[{len(names)}]}}")
            names.append(re.search(r"(\w+)$", plain).group(1))
            writable.append(not re.search(r"\bconst\b|\bconstant\b", plain))
        else:
            raise KernelFault(f"parameter {part!r}: the executor knows no attribute {kind}, and buffers in order only")
    return arguments, _Buffers(tuple(names), tuple(writable))


def translate(source: str) -> tuple[str, dict[str, _Buffers]]:
    """C++ for a Metal source, and the buffers of every kernel in it."""
    text = re.sub(r"//[^\n]*|#include <metal_\w+>", "", source)  # msl.h is there
    text = re.sub(r"\bconst\s+constant\b|\bconstant\s+const\b", "constant", text)
    entries, kernels = [], {}

    def function(match: re.Match) -> str:
        name, own = match.groups()
        arguments, kernels[name] = _parameters(own)
        call = f"{name}({', '.join(arguments)});"
        entries.append(f'extern "C" void entry_{name}(void** buffers, const metal_host::Position& at) {{ {call} }}')
        return f"void {name}({_ATTRIBUTE.sub('', own)}) {{"

    text = re.sub(r"(?:\[\[kernel\]\]|\bkernel\b)\s+void\s+(\w+)\s*\(([^{]*)\)\s*{", function, text)
    text = re.sub(
        r"\bthreadgroup\s+(\w+)\s+(\w+)\s*\[([^\]]*)\]\s*;", r'auto& \2 = threadgroup_array<\1, (\3)>("\2");', text
    )
    if left := re.search(r"\bthreadgroup\s+\w+\s+\w+\s*(\[[^\]]*\]\s*)*[;=]", text):
        raise KernelFault(f"threadgroup variable of a form that the executor does not know: {left.group(0)}")
    return f'{_PRELUDE}#line 1 "source.metal"\n{text}\n' + "\n".join(entries) + "\n", kernels


class Library:
    """A Metal source, compiled. ``source`` has no includes but Metal's own."""

    def __init__(self, source: str) -> None:
        self.source = source
        runtime, _ = _runtime()
        text, self.kernels = translate(source)
        self.path = _built("kernel", text, _KERNEL, [runtime, "-lm"])
        self._dll = ctypes.CDLL(str(self.path))
        self._image = (ctypes.c_char_p * 2).in_dll(self._dll, "metal_host_image")

    def run(
        self,
        name: str,
        buffers: Sequence[tuple[int, int]],
        groups: Sequence[int],
        threads: int,
        schedule: str = "forward",
        seed: int = 1,
    ) -> Ran:
        """Run kernel ``name`` over threadgroups (x, y, z) of ``threads``. ``buffers``: (address, bytes) in their order."""
        known = self.kernels[name]
        if len(buffers) != len(known.names):
            raise KernelFault(f"{name} takes {len(known.names)} buffers, not {len(buffers)}")
        if len(buffers) > 31 or not 0 < threads <= 1024:
            raise KernelFault(f"{name}: {len(buffers)} buffers, {threads} threads; 31 and 1024 are the most")
        given = (_Buffer * len(buffers))(
            *((*buffer, writable, label.encode()) for buffer, label, writable in zip(buffers, known.names, known.writable))
        )
        sizes = (ctypes.c_uint * 3)(*(*groups, 1, 1)[:3])
        outcome = _Outcome()
        _runtime()[1].metal_host_run(
            getattr(self._dll, f"entry_{name}"), self._image, given, len(buffers), sizes, threads,
            SCHEDULES.index(schedule), ctypes.c_uint64(seed), ctypes.byref(outcome),
        )  # fmt: skip
        if outcome.messages:
            said = self._located(outcome.text.decode())
            raise KernelFault(f"{name}, schedule {schedule}: {outcome.messages} findings\n{said}")
        return Ran(outcome.accesses, outcome.threadgroup_bytes)

    def _located(self, message: str) -> str:
        """``message`` with ``@address`` replaced by the line of the Metal source."""

        def line(match: re.Match) -> str:
            command = ["addr2line", "-e", str(self.path), hex(int(match.group(1), 16) - 1)]
            place = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
            number = re.search(r"(?:source\.metal|kernel-[\w.]+\.cpp):(\d+)", place)
            lines = self.source.splitlines()
            if not number or not 0 < int(number.group(1)) <= len(lines):
                return f"at {place}"
            return f"at line {number.group(1)}: {lines[int(number.group(1)) - 1].strip()}"

        return re.sub(r"@([0-9a-f]+)", line, message)
