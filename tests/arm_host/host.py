"""The CPU backend's library as ARM's processors run it: from a cross compiler, each call carried out by an emulator."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from gyrokv.backends.cpu import build, calls, native
from gyrokv.masks import BlockMap
from gyrokv.view import KVView

COMPILER, EMULATOR, SYSTEM = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
LEVELS = ("neon", "portable")


def missing() -> str:
    """What is not here, or nothing."""
    return ", ".join(f"no {name}" for name in (COMPILER, EMULATOR) if not shutil.which(name))


class ArmLibrary:
    """In place of :class:`native.Library`: its ``attend`` and ``encode`` run elsewhere, on copies of what they are given.

    A call holds addresses only. How much lies there is told by the variables of the function in ``calls.py`` that makes it.
    """

    team, left_out, compiler = False, "", COMPILER

    def __init__(self, folder: Path) -> None:
        self.folder, self.core, self.program = folder, folder / "core.so", folder / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CXX", COMPILER)
            patch.setattr(build, "_architecture", lambda: "aarch64")
            made = build.build(self.core)
        assert made.levels == LEVELS, made.left_out
        source = Path(__file__).with_name("run.cpp")
        flags = ("-std=c++20", "-O1", f"-I{build.CSRC}", str(source), "-o", str(self.program), "-ldl")
        subprocess.run([COMPILER, *flags], check=True, capture_output=True)
        self.levels = tuple(native.Level(i, name, "") for i, name in enumerate(LEVELS))
        self.level = self.levels[0]

    def attend(self, call: bytes, level: int) -> int:
        own = sys._getframe(1).f_locals
        written = [own["out"], own["lse"]]
        at, words = own["runs"].buffer_info()
        extra = [(at, 8 * words)]
        extra += [(found[2], ctypes.sizeof(native.Format)) for found in calls._formats.values()]
        tensors = []
        for turn, address, signs in calls._turned.values():
            extra.append((address, ctypes.sizeof(turn)))
            tensors += signs
        return self._run(0, call, level, written, [*tensors, *_tensors(own.values())], extra)

    def encode(self, call: bytes, level: int) -> int:
        own = sys._getframe(1).f_locals
        tensors = [t for *_, held in calls._encoders.values() for t in held]
        return self._run(1, call, level, list(own["into"]), [own["x"], *tensors], [])

    def _run(self, encodes: int, call: bytes, level: int, written: list[Tensor], read: list[Tensor], extra: list) -> int:
        given, made = self.folder / "call", self.folder / "made"
        regions = {region: True for region in map(_storage, written) if region[1]}
        for region in (*map(_storage, read), *extra):
            if region[1]:
                regions.setdefault(region, False)
        with given.open("wb") as file:
            file.write(struct.pack("3Q", encodes, len(call), len(regions)) + call)
            for (at, size), is_written in regions.items():
                file.write(struct.pack("3Q", at, size, is_written) + ctypes.string_at(at, size))
        command = [EMULATOR, "-L", SYSTEM, self.program, self.core, level, given, made]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.returncode, done.stderr[-1000:])
        data, position = made.read_bytes(), 0
        for (at, size), is_written in regions.items():
            if is_written:
                ctypes.memmove(at, data[position : position + size], size)
                position += size
        return 0


def _storage(t: Tensor) -> tuple[int, int]:
    storage = t.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _tensors(values) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, BlockMap):
            yield value.states
        elif isinstance(value, KVView):
            for segment in value.segments:
                yield from (*segment.k, *segment.v)
