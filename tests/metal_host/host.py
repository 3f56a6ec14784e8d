"""Metal source, run on the CPU: rewritten to C++ where macros cannot help, compiled by g++, called through ctypes.

``Library(source).kernel(name)(buffers, groups, threads)`` runs a kernel and raises :class:`KernelFault` for races,
accesses outside of buffers and threadgroup arrays, writes to read-only buffers, threads that wait for each other for
ever, and too much threadgroup memory. See ``runtime.cpp`` for how, and ``include/msl.h`` for the MSL that is known.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCHEDULES = ("forward", "reverse", "random", "lockstep")
CACHE = Path(tempfile.gettempdir()) / f"gyrokv-metal-host-{os.getuid()}"
_COMPILE = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-exceptions",
    f"-I{HERE}/include",
)
_HOOKED = ("-g1", "-w", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0")
_VECTORS = {  # attributes with three components: the member of Position
    "thread_position_in_grid": "grid",
    "thread_position_in_threadgroup": "thread",
    "threadgroup_position_in_grid": "group",
    "threadgroups_per_grid": "groups",
    "threads_per_threadgroup": "threads",
}
_SCALARS = {
    "thread_index_in_threadgroup": "index",
    "thread_index_in_simdgroup": "lane",
    "simdgroup_index_in_threadgroup": "simdgroup",
    "simdgroups_per_threadgroup": "simdgroups",
}
_PRELUDE = """#include "msl.h"
using namespace metal;
struct AnyPointer { void* p; template <typename T> operator T*() const { return static_cast<T*>(p); } };
struct AnyReference { void* p; template <typename T> operator const T&() const { return *static_cast<const T*>(p); } };
struct AnyPosition {
  const unsigned* v;
  operator uint() const { return v[0]; }
  operator ushort() const { return ushort(v[0]); }
  operator uint2() const { return uint2(v[0], v[1]); }
  operator uint3() const { return uint3(v[0], v[1], v[2]); }
  operator ushort3() const { return ushort3(v[0], v[1], v[2]); }
};
template <typename T, size_t N> T (&threadgroup_array(const char* name))[N] {
  return *static_cast<T(*)[N]>(metal_host::threadgroup_array(sizeof(T[N]), name));
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
        ("accesses", ctypes.c_uint64), ("threadgroup_bytes", ctypes.c_uint64), ("races", ctypes.c_uint32),
        ("out_of_bounds", ctypes.c_uint32), ("messages", ctypes.c_uint32), ("text", ctypes.c_char * 8192),
    )  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """What a run did. ``accesses``: of buffers and threadgroup memory; ``threadgroup_bytes``: of the last threadgroup."""

    accesses: int
    threadgroup_bytes: int


def compiler() -> str | None:
    """The g++ that compiles kernels, or None."""
    return shutil.which("g++")


def _built(name: str, text: str, command: Sequence[str]) -> Path:
    """The file that ``command`` (with the source's and the output's names appended) makes of ``text``, made once."""
    digest = _digest(text, *command)
    CACHE.mkdir(mode=0o700, exist_ok=True)
    output = CACHE / f"{name}-{digest}.so"
    if not output.exists():
        mine = f"{name}-{digest}.{os.getpid()}"  # another process may be making the same
        source, made = CACHE / f"{mine}.cpp", CACHE / mine
        source.write_text(text)
        done = subprocess.run([*command, str(source), "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise KernelFault(f"{shutil.which('g++')} cannot compile {source}:\n{done.stderr[:4000]}")
        os.replace(made, output)
    return output


def _digest(*texts: str) -> str:
    headers = "".join((HERE / "include" / h).read_text() for h in ("msl.h", "runtime.h"))
    return hashlib.sha256("\0".join((headers, *texts)).encode()).hexdigest()[:24]


@cache
def _precompiled() -> str:
    """A folder with ``msl.h`` precompiled; g++ takes it when it is the first to hold the header, and may ignore it."""
    folder = CACHE / f"header-{_digest(*_COMPILE, *_HOOKED)}"
    if not (folder / "msl.h.gch").exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = folder / str(os.getpid())
        command = ["g++", *_COMPILE, *_HOOKED, "-x", "c++-header", str(HERE / "include/msl.h"), "-o", str(made)]
        subprocess.run(command, capture_output=True, check=True)
        os.replace(made, folder / "msl.h.gch")
    return str(folder)


@cache
def _runtime() -> Path:
    return _built("runtime", (HERE / "runtime.cpp").read_text(), ["g++", *_COMPILE, "-O2", "-fvisibility=hidden", "-c"])


def _balanced(text: str, at: int, pair: str) -> int:
    """Where the bracket opened at ``at`` is closed."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == pair[0]) - (text[i] == pair[1])
        if depth == 0:
            return i
    raise KernelFault(f"unbalanced {pair} in: {text[at : at + 80]}")


def _split(text: str) -> list[str]:
    """``text`` at the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "<([") - (c in ">)]")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [p.strip() for p in (*parts, text[start:]) if p.strip()]


@dataclass(frozen=True)
class _Parameter:
    """``argument``: the C++ that hands it over; ``buffer``: its index, or None for a position; ``writable``, ``name``."""

    argument: str
    buffer: int | None
    writable: bool
    name: str


def _parameters(text: str) -> list[_Parameter]:
    found, next_buffer = [], 0
    for part in _split(text):
        attribute = re.search(r"\[\[\s*(\w+)\s*(?:\(\s*(\d+)\s*\))?\s*\]\]", part)
        plain = re.sub(r"\[\[.*?\]\]", "", part).strip()
        name = re.search(r"(\w+)$", plain).group(1)
        kind = attribute.group(1) if attribute else "buffer"
        if kind == "buffer":
            index = int(attribute.group(2)) if attribute and attribute.group(2) else next_buffer
            next_buffer = index + 1
            wrap = "AnyReference" if "&" in plain else "AnyPointer"
            writable = not re.search(r"\bconst\b|\bconstant\b", plain)
            found.append(_Parameter(f"{wrap}{{buffers[{index}]}}", index, writable, name))
        elif kind in _VECTORS:
            found.append(_Parameter(f"AnyPosition{{at.{_VECTORS[kind]}}}", None, False, name))
        elif kind in _SCALARS:
            found.append(_Parameter(f"at.{_SCALARS[kind]}", None, False, name))
        else:
            raise KernelFault(f"parameter {part!r}: the executor knows no attribute {kind}")
    return found


def translate(source: str) -> tuple[str, dict[str, list[_Parameter]]]:
    """C++ for a Metal source, and the parameters of every kernel in it."""
    text = re.sub(r"//[^\n]*|#include <metal_\w+>", "", source)  # msl.h is there
    text = re.sub(r"\bconst\s+constant\b|\bconstant\s+const\b", "constant", text)
    instances: dict[str, str] = {}

    def instance(match: re.Match) -> str:
        name = "".join(re.findall(r'"([^"]*)"', match.group(1)))
        instances[name] = re.search(r"decltype\((.*)\)\s*[^()]*$", match.group(2), re.S).group(1).strip()
        return "\n" * match.group(0).count("\n")

    pattern = r"template\s*\[\[\s*host_name\(([^)]*)\)\s*\]\]\s*(?:\[\[kernel\]\]|kernel)([^;]*);"
    text = re.sub(pattern, instance, text)
    pieces, parameters, templated, last = [], {}, {}, 0
    for match in re.finditer(r"(template\s*<[^{};()]*>\s*)?(?:\[\[\s*kernel\s*\]\]|\bkernel\b)\s+void\s+(\w+)\s*\(", text):
        close = _balanced(text, match.end() - 1, "()")
        name, own = match.group(2), text[match.end() : close]
        (templated if match.group(1) else parameters)[name] = _parameters(own)
        stripped = re.sub(r"\[\[.*?\]\]", "", own)
        pieces += [text[last : match.start()], f"{match.group(1) or ''}void {name}({stripped})"]
        last = close + 1
    text = "".join([*pieces, text[last:]])
    text = re.sub(
        r"\bthreadgroup\s+(\w+)\s+(\w+)\s*\[([^\]]*)\]\s*;", r'auto& \2 = threadgroup_array<\1, (\3)>("\2");', text
    )
    if left := re.search(r"\bthreadgroup\s+\w+\s+\w+\s*(\[[^\]]*\]\s*)*[;=]", text):
        raise KernelFault(f"threadgroup variable of a form that the executor does not know: {left.group(0)}")
    text = re.sub(r"\[\[\s*(?!maybe_unused|nodiscard)[\w:]+\s*(\([^)]*\))?\s*\]\]", "", text)
    thunks, kernels = [], {}
    calls = {name: name for name in parameters} | instances
    for i, (name, call) in enumerate(calls.items()):
        own = (parameters | templated)[call.split("<")[0].strip()]
        arguments = ", ".join(p.argument for p in own)
        thunks.append(
            f'extern "C" __attribute__((visibility("default"))) void thunk{i}(void** buffers, '
            f"const metal_host::Position& at) {{ {call}({arguments}); }}"
        )
        kernels[name] = own
    return f'{_PRELUDE}#line 1 "source.metal"\n{text}\n' + "\n".join(thunks) + "\n", kernels


class Library:
    """A Metal source, compiled. ``source`` has no includes but Metal's own."""

    def __init__(self, source: str) -> None:
        self.source = source
        text, self.kernels = translate(source)
        command = ["g++", f"-I{_precompiled()}", *_COMPILE, *_HOOKED, "-c"]
        self.path = _built("kernel", text, ["sh", "-c", _LINK, "sh", str(_runtime()), *command])
        self._dll = ctypes.CDLL(str(self.path))

    def kernel(self, name: str) -> Kernel:
        """The kernel (or instance, by host name) called ``name``."""
        return Kernel(self, name, getattr(self._dll, f"thunk{list(self.kernels).index(name)}"))

    def locate(self, message: str) -> str:
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


# compiles with all arguments but the runtime's, the source's and the output's, then links both objects
_LINK = (
    'runtime="$1"; shift; set -e; for last; do :; done; '
    '"$@".o; g++ -shared "$last.o" "$runtime" -o "$last" -Wl,-Bsymbolic; rm "$last.o"'
)


class Kernel:
    """A kernel of a :class:`Library`."""

    def __init__(self, library: Library, name: str, thunk) -> None:
        self.library, self.name, self._thunk = library, name, thunk
        buffers = {p.buffer: p for p in library.kernels[name] if p.buffer is not None}
        self.buffers = [buffers[i] for i in sorted(buffers)]

    def __call__(
        self,
        buffers: Sequence[tuple[int, int]],
        groups: Sequence[int],
        threads: Sequence[int],
        schedule: str = "forward",
        seed: int = 1,
    ) -> Ran:
        """Run over ``groups`` threadgroups of ``threads``. ``buffers``: (address, bytes) in order of their index."""
        if len(buffers) != len(self.buffers):
            raise KernelFault(f"{self.name} takes {len(self.buffers)} buffers, not {len(buffers)}")
        given = (_Buffer * len(buffers))(
            *(_Buffer(a, n, p.writable, p.name.encode()) for (a, n), p in zip(buffers, self.buffers))
        )
        sizes = [(ctypes.c_uint * 3)(*(*s, 1, 1)[:3]) for s in (groups, threads)]
        outcome = _Outcome()
        self.library._dll.metal_host_run(
            self._thunk, given, len(buffers), *sizes, SCHEDULES.index(schedule), ctypes.c_uint64(seed), ctypes.byref(outcome)
        )
        if outcome.messages:
            said = self.library.locate(outcome.text.decode())
            raise KernelFault(f"{self.name}, schedule {schedule}: {outcome.messages} findings\n{said}")
        return Ran(outcome.accesses, outcome.threadgroup_bytes)
