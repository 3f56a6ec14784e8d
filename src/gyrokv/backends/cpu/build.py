"""Compiles ``csrc/`` into one shared library beside this file.

Standard library only: ``hatch_build.py`` loads this file by its path, before there is a gyrokv to import.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE / "csrc"
LIBRARY = HERE / ("_core" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so"))
FAILURE = HERE / "_core.txt"  # why there is no library: pip shows what a build printed only when it is asked to
HOW_TO = "reinstall gyrokv (`pip install .` or `pip install -e .`) or, in a checkout, run `python hatch_build.py`"

_SHARED = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVXVNNI = (*_AVX2, "-mavxvnni")
_AVX512 = (
    *_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512vnni", "-mavx512bf16",
)  # fmt: skip
_AMX = (*_AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16")
_SOURCES = {"avx512": ("quad_values.cpp", "quad_scores.cpp")}  # beside kernels.cpp; what takes longest comes first
# speed alone, where the compiler knows it: also on other makers' CPUs (see CONTRIBUTING.md)
_TUNING = {"avx512": ("-mtune=sapphirerapids",)}
_X86 = "#include <immintrin.h>\n"
_PROBES = {  # something that needs the compiler, its headers and its assembler to know the instructions
    "avx2": _X86 + "__m256 f(__m256 a, __m128i b) { return _mm256_fmadd_ps(a, _mm256_cvtph_ps(b), a); }",
    "avxvnni": _X86 + "__m256i f(__m256i a) { return _mm256_dpbusd_avx_epi32(a, a, a); }",
    "avx512": _X86 + "__m512i f(__m512i a) { return _mm512_dpbusd_epi32(a, a, _mm512_permutexvar_epi8(a, a)); }",
    "amx": _X86 + "void f() { _tile_dpbssd(0, 1, 2); _tile_dpbf16ps(3, 4, 5); }",
    "neon": "#include <arm_neon.h>\nint32x4_t f(int32x4_t a, int8x16_t b) { return vdotq_s32(a, b, b); }",
    "portable": "int f() { return 0; }",
}
_LEVELS = {  # best first
    "x86_64": {"amx": _AMX, "avx512": _AVX512, "avxvnni": _AVXVNNI, "avx2": _AVX2, "portable": ()},
    "aarch64": {"neon": ("-march=armv8.2-a+dotprod+fp16",), "portable": ()},
    "": {"portable": ()},
}
_CXX20 = "#include <atomic>\n#include <concepts>\n#include <thread>\ntemplate <std::integral T> T f(T x) { return x; }\n"


class BuildError(Exception):
    """The sources do not compile; the message holds the command and what the compiler said."""


class NoCompiler(BuildError):
    """There is no C++20 compiler; the message says what was looked for and what to install."""


@dataclass(frozen=True)
class Built:
    """A library. ``left_out``: instruction sets that the compiler does not know, and why."""

    path: Path
    compiler: str
    levels: tuple[str, ...]
    left_out: dict[str, str]


def digest() -> str:
    """Of every source file and of this one, by name and content; a library carries that of its own sources."""
    total = hashlib.sha256()
    for path in (*sorted(p for p in CSRC.iterdir() if p.suffix in (".h", ".cpp")), Path(__file__)):
        total.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def candidates() -> Iterator[list[str]]:
    """Commands that may be a C++ compiler: ``$CXX`` alone if it is set, else compilers on the path, else zig's."""
    if os.environ.get("CXX"):
        yield shlex.split(os.environ["CXX"])
        return
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            yield [found]
    # a build in isolation imports nothing from the environment that it installs to, but that one's files are there
    spec = importlib.util.find_spec("ziglang")
    folders = [*(spec.submodule_search_locations if spec else ()), str(Path(sysconfig.get_path("platlib")) / "ziglang")]
    for folder in folders:
        if found := shutil.which("zig", path=folder):
            yield [found, "c++"]
            return


def find_compiler() -> list[str]:
    """The first candidate that compiles C++20. Raises NoCompiler."""
    failed = []
    for command in candidates():
        said = _accepts(command, _CXX20, ("-std=c++20",))
        if not said:
            return command
        failed.append(f"{shlex.join(command)} does not compile C++20 ({said})")
    looked = "$CXX" if os.environ.get("CXX") else "$CXX, c++, g++, clang++ and the Python package ziglang"
    tried = "".join(f"; {text}" for text in failed)
    raise NoCompiler(f"no C++20 compiler found; looked for {looked}{tried}; install g++ or clang, or `pip install ziglang`")


def _accepts(command: Sequence[str], source: str, flags: Sequence[str]) -> str:
    """Empty when ``source`` compiles to an object, else the first error."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.cpp"
        path.write_text(source)
        try:
            done = _run([*command, *flags, "-c", str(path), "-o", str(path.with_suffix(".o"))])
        except OSError as error:
            return str(error)
    if done.returncode == 0:
        return ""
    return _errors(done).splitlines()[0]


def _errors(done: subprocess.CompletedProcess) -> str:
    """What a compiler said: the lines that name errors, else the last ones; 20 at most."""
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    errors = dict.fromkeys(line for line in lines if "error" in line.lower())
    return "\n".join(list(errors)[:20] or lines[-20:])


def _run(command: Sequence[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


def known_levels() -> tuple[str, ...]:
    """The instruction sets that there are kernels for on this architecture, best first."""
    return tuple(_LEVELS[_architecture()])


def build(output: str | Path = LIBRARY, extra_flags: Sequence[str] = (), levels: Sequence[str] | None = None) -> Built:
    """Compile and link ``output``; ``extra_flags`` come last on every command (as for sanitizers).

    ``levels``: which of :func:`known_levels`, default all. An existing file is replaced at once, so that processes
    that have loaded it keep it. Raises BuildError.
    """
    output = Path(output)
    command = find_compiler()
    flags_of = {name: flags for name, flags in _LEVELS[_architecture()].items() if levels is None or name in levels}
    left_out = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def probe(name: str) -> str:
            return _accepts(command, _PROBES[name], ("-O1", *flags_of[name]))

        for name, said in zip(tuple(flags_of), pool.map(probe, flags_of)):
            if said:
                left_out[name] = f"the compiler does not know it: {said}"
                del flags_of[name]
        about = "; ".join(f"{name}: {said}" for name, said in left_out.items())
        defines = (
            f"-DGYROKV_LEVELS={''.join(f'X({name})' for name in flags_of)}",
            f"-DGYROKV_DIGEST={_quoted(digest())}",
            f"-DGYROKV_LEFT_OUT={_quoted(about)}",
        )
        tuning = {
            name: () if _accepts(command, _PROBES["portable"], flags) else flags
            for name, flags in _TUNING.items() if name in flags_of
        }  # fmt: skip

        def compiled(part: tuple[str, str]) -> str:
            level, source = part
            made = Path(folder) / f"{level}-{source}.o"
            own = (*flags_of[level], *tuning.get(level, ()), f"-DGYROKV_ISA={level}") if level else defines
            _compile(command, source, made, (*_SHARED, *own, *extra_flags))
            return str(made)

        parts = [(level, source) for level in flags_of for source in _SOURCES.get(level, ())]
        parts += [*((level, "kernels.cpp") for level in flags_of), ("", "core.cpp")]
        objects = dict(zip(parts, pool.map(compiled, parts)))
        # least first: of a function that the compiler put into several objects (from a header of the standard
        # library, say) the linker takes the first, which must run on every CPU
        levels_up = ("", *reversed(flags_of))
        _link(
            command, [made for level in levels_up for part, made in objects.items() if part[0] == level], output, extra_flags
        )
    return Built(output, shlex.join(command), tuple(flags_of), left_out)


def _architecture() -> str:
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    return machine if machine in _LEVELS and sys.maxsize > 2**32 else ""


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _compile(command: Sequence[str], source: str, output: Path, flags: Sequence[str]) -> None:
    done = _run([*command, *flags, "-c", str(CSRC / source), "-o", str(output)])
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} cannot compile {source} with {shlex.join(flags)}:\n{_errors(done)}")


def _link(command: Sequence[str], objects: Sequence[str], output: Path, flags: Sequence[str]) -> None:
    """Link with a C++ runtime of the library's own where the linker can, so that it meets no other one in the process."""
    own = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL")
    fresh = output.with_name(f"{output.name}.{os.getpid()}")
    try:
        for options in (own, ()) if sys.platform.startswith("linux") else ((),):
            done = _run([*command, "-shared", "-pthread", *objects, "-o", str(fresh), *options, *flags])
            if done.returncode == 0:
                break
        else:
            raise BuildError(f"{shlex.join(command)} cannot link {output.name}:\n{_errors(done)}")
        os.replace(fresh, output)
    finally:
        fresh.unlink(missing_ok=True)


def build_in_place() -> Built:
    """:func:`build`, with a record of the reason beside this file if it fails. Raises BuildError."""
    try:
        built = build()
    except BuildError as error:
        FAILURE.write_text(f"{error}\n", encoding="utf-8")
        raise
    FAILURE.unlink(missing_ok=True)
    return built


def current() -> bool:
    """True when there is a library, and it was built from the sources as they are."""
    return LIBRARY.is_file() and digest().encode() in LIBRARY.read_bytes()


def warning(error: BuildError) -> str:
    """What to print when an installation goes on without the library."""
    return f"gyrokv's compiled CPU backend was not built: {error}\nAttention runs in torch until it is: {HOW_TO}"


def main(arguments: Sequence[str] = ()) -> int:
    """Build in place; with ``--if-needed`` only when sources changed, and without a compiler that is no failure."""
    relaxed = "--if-needed" in arguments
    if relaxed and current():
        return 0
    try:
        built = build_in_place()
    except BuildError as error:
        print(warning(error), file=sys.stderr)
        return 0 if relaxed and isinstance(error, NoCompiler) else 1
    print(f"built {built.path} with {built.compiler}: {', '.join(built.levels)}")
    for name, said in built.left_out.items():
        print(f"left out {name}: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
