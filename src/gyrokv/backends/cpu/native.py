"""The compiled library: what Python hands to it, when it is loaded, and which instruction set runs.

The structures are those of ``csrc/core.h``, field by field; sizes are compared when the library is loaded, and a
library built from other sources than ``csrc/`` holds is refused. Nothing is loaded before it is first asked for.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import GyroKVError
from .build import CSRC, FAILURE, HOW_TO, LIBRARY, digest

F32, F16, BF16, FP8_E4M3, CODES = range(5)
MASK_NONE, MASK_BOOL, MASK_F32, MASK_F16, MASK_BF16 = range(5)
SCALE_NONE, SCALE_F16, SCALE_F32 = range(3)
RULE_ABSMAX, RULE_SIGNED_ABSMAX, RULE_L2, RULE_RMS, RULE_FLOAT8 = range(5)
_SYMBOL = "GOMP_parallel"  # what GCC's, LLVM's and Intel's OpenMP all call the start of a parallel region


def _structure(name: str, *fields: tuple[str, object]) -> type[ctypes.Structure]:
    """A structure whose fields are given as ``("a b c", type)``."""
    flat = [(field, kind) for names, kind in fields for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": flat})


_int, _long, _float, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

Format = _structure(
    "Format",
    ("kind bits dim group scale_type planes", _int),
    ("factor", _float),
    ("linear", _int),
    ("table", ctypes.c_int8 * 256 * 2),
)
Rows = _structure("Rows", ("words scale", _pointer), ("word_strides scale_strides", _long * 3))
Run = _structure("Run", ("position count", _long), ("k v", Rows), ("k_format v_format", _pointer))
Turn = _structure("Turn", ("before after", _pointer), ("block", _long))
Attend = _structure(
    "Attend",
    ("batch q_heads kv_heads q_len k_dim v_dim q_dim out_dim q_kind terms", _int),
    ("q", _pointer),
    ("q_strides", _long * 3),
    ("q_turn out_turn out lse", _pointer),
    ("scale softcap", _float),
    ("causal threads out_kind n_runs", _int),
    ("runs", _pointer),
    ("window q_first kv_first kv_stop", _long),
    ("mask", _pointer),
    ("mask_strides", _long * 4),
    ("slopes sinks starts map", _pointer),
    ("map_strides", _long * 4),
    ("map_rows map_keys mask_type", _int),
)


def _struct(structure: type[ctypes.Structure]) -> struct.Struct:
    """The layout of ``structure``, whose arrays are given as their elements: packing takes a fraction of the time."""
    codes = {_int: "i", _long: "q", _float: "f", _pointer: "P"}
    flat = [(kind._type_, kind._length_) if hasattr(kind, "_length_") else (kind, 1) for _, kind in structure._fields_]
    return struct.Struct("@" + "".join(codes[kind] * count for kind, count in flat) + "0q")


ATTEND = _struct(Attend)
Encode = _structure(
    "Encode",
    ("batch heads tokens dim x_kind padded group span bits sign_magnitude rule corrected ties scale_type", _int),
    ("linear rotate threads", _int),
    ("rotation_factor unscaled_factor scale_factor low high", _float),
    ("before after levels boundaries x", _pointer),
    ("x_strides", _long * 3),
    ("words", _pointer),
    ("word_strides", _long * 3),
    ("scale", _pointer),
    ("scale_strides", _long * 3),
)
ENCODE = _struct(Encode)
_MIRRORED = (Format, Rows, Run, Turn, Attend, Encode)


class Level(NamedTuple):
    """An instruction set that the library was built for. ``lacks``: why this machine cannot run it, empty if it can."""

    index: int
    name: str
    lacks: str


class Library:
    """A loaded library. Raises GyroKVError, saying what to do, when there is none that fits these sources."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            why = FAILURE.read_text(encoding="utf-8").strip() if FAILURE.is_file() else "it was never built"
            raise GyroKVError(f"there is no compiled library {path}: {why}; {HOW_TO}")
        if sys.byteorder != "little":
            raise GyroKVError("this machine is big-endian, and the kernels read little-endian words")
        try:
            self._dll = dll = ctypes.CDLL(str(path))
        except OSError as error:
            raise GyroKVError(f"{path} cannot be loaded ({error}); {HOW_TO}") from error
        for function in ("level", "lacks", "left_out", "digest", "compiler"):
            getattr(dll, f"gyrokv_{function}").restype = ctypes.c_char_p
        dll.gyrokv_size.restype = _long
        if self._text("digest") != digest():
            raise GyroKVError(f"{path} was built from other sources than {CSRC} holds; {HOW_TO}")
        for i, mirror in enumerate(_MIRRORED):
            if dll.gyrokv_size(i) != ctypes.sizeof(mirror):
                sizes = f"{dll.gyrokv_size(i)} bytes in csrc/core.h and {ctypes.sizeof(mirror)} in native.py"
                raise GyroKVError(f"{mirror.__name__} has {sizes}")
        self.path, self.compiler, self.left_out = path, self._text("compiler"), self._text("left_out")
        self.levels: tuple[Level, ...] = ()
        while dll.gyrokv_level(len(self.levels)):
            index = len(self.levels)
            self.levels += (Level(index, self._text("level", index), self._text("lacks", index)),)
        self.level = next(level for level in self.levels if not level.lacks)
        for function in (dll.gyrokv_attend, dll.gyrokv_encode):
            function.argtypes = (_pointer, ctypes.c_int)
        dll.gyrokv_team.argtypes = (_pointer,)
        self.attend, self.encode = dll.gyrokv_attend, dll.gyrokv_encode
        self.use_team(True)

    def _text(self, function: str, *arguments: int) -> str:
        return getattr(self._dll, f"gyrokv_{function}")(*arguments).decode()

    def use_team(self, wanted: bool) -> None:
        """Run on torch's OpenMP team if ``wanted`` and there is one, else on threads of the library's own."""
        found = _team() if wanted else None
        self._dll.gyrokv_team(found)
        self.team = found is not None


def _team() -> int | None:
    """The address of ``GOMP_parallel`` in the OpenMP that torch has loaded, or None."""
    if sys.platform == "win32":
        return None
    function = getattr(ctypes.CDLL(None), _SYMBOL, None)
    return None if function is None else ctypes.cast(function, _pointer).value


_library: Library | None = None
_why: str | None = None  # why it could not be loaded


def missing() -> list[str]:
    """Why the library cannot be used here; loads it when first asked."""
    global _library, _why
    if _library is None and _why is None:
        try:
            _library = Library(LIBRARY)
        except GyroKVError as error:
            _why = str(error)
    return [] if _why is None else [_why]


def library() -> Library:
    """The loaded library. Raises GyroKVError when there is none."""
    if _library is None and missing():
        raise GyroKVError(_why)
    return _library


@contextmanager
def forced(level: str | None = None, *, team: bool | None = None, path: str | Path | None = None) -> Iterator[Library]:
    """Within: another level than the best, the library's own threads (``team=False``), or the library at ``path``.

    Concerns the whole process; for tests and benchmarks. Raises ValueError for a level that cannot run here.
    """
    global _library, _why
    before = _library, _why
    if path is not None:
        _library, _why = Library(Path(path)), None
    used = library()
    level_before, team_before = used.level, used.team
    try:
        if level is not None:
            used.level = _runnable(used, level)
        if team is not None:
            used.use_team(team)
        yield used
    finally:
        used.level = level_before
        used.use_team(team_before)
        _library, _why = before


def _runnable(used: Library, name: str) -> Level:
    for level in used.levels:
        if level.name == name and not level.lacks:
            return level
    can = [level.name for level in used.levels if not level.lacks]
    raise ValueError(f"level={name!r} is not one that runs here: {can}")


def level() -> str:
    """The level in use."""
    return library().level.name


def describe() -> dict[str, str]:
    """The level in use and why, the levels that were built, the compiler, and how threads are run."""
    if missing():
        return {"cpu level": f"none: {_why}"}
    used = library()
    better = [f"{level.name} not: {level.lacks}" for level in used.levels[: used.level.index] if level.lacks]
    forced_down = len(better) < used.level.index
    why = [f"{used.level.name}: {'asked for' if forced_down else 'the best that runs here'}", *better]
    if used.left_out:
        why.append(f"not built: {used.left_out}")
    return {
        "cpu level": "; ".join(why),
        "cpu built": f"{', '.join(level.name for level in used.levels)} by {used.compiler}",
        "cpu threads": f"{torch.get_num_threads()}, {'the OpenMP team of torch' if used.team else 'of its own'}",
    }


def byte_strides(t: Tensor) -> tuple[int, int, int]:
    """Strides of all but the last axis of ``t [B, H, T, D]`` in bytes."""
    a, b, c, _ = t.stride()
    size = t.element_size()
    return a * size, b * size, c * size
