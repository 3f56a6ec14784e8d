"""The entry for torch: kernels compiled by ``torch.mps.compile_shader`` and called with tensors of device "mps".

Facts of that interface: arguments bind to buffers 0, 1, 2, ... in order; a list of Python ints or floats becomes a
small constant array of 64-bit ints or float32; ``threads`` counts threads, not threadgroups; outputs are written in
place, and strides are ours to honour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .kernels import POSITIONS, Program

_TYPES = {
    torch.float32: "float",
    torch.float16: "half",
    torch.bfloat16: "bfloat",
    torch.bool: "bool",
    torch.int16: "ushort",  # words
    torch.uint8: "uchar",
    torch.int64: "long",
}

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def source(program: Program, inputs: Sequence[torch.dtype], outputs: Sequence[torch.dtype]) -> str:
    """Metal source of one kernel, called ``program.name``, for tensors of these dtypes."""
    parameters = [f"device const {_TYPES[t]}* {name}" for name, t in zip(program.inputs, inputs)]
    parameters += ["constant long* ints", "constant float* floats"]
    parameters += [f"device {_TYPES[t]}* {name}" for name, t in zip(program.outputs, outputs)]
    parameters = [f"{text} [[buffer({i})]]" for i, text in enumerate(parameters)]
    parameters += [f"{kind} {name} [[{name}]]" for name, kind in POSITIONS.items()]
    joined = ",\n    ".join(parameters)
    return f"{program.header}\nkernel void {program.name}(\n    {joined}) {{\n{program.body}}}\n"


class Machine:
    """Launches on tensors of ``device``; ``compile_shader(source)`` is torch's, or a test's."""

    def __init__(self, device: torch.device | str, compile_shader: Callable[[str], Any]) -> None:
        self.device, self._compile = torch.device(device), compile_shader
        self._kernels: dict[tuple, Any] = {}
        self._constants: dict[int, tuple[Tensor, Tensor]] = {}  # by identity; the key is kept, so no other takes its place

    def strides(self, x: Tensor) -> tuple[int, ...]:
        return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride()))

    def constant(self, value: Tensor) -> Tensor:
        found = self._constants.get(id(value))
        if found is None:
            found = self._constants[id(value)] = (value, value.to(self.device))
        return found[1]

    def fill(self, shape: Sequence[int], value: float) -> Tensor:
        return torch.full(shape, value, dtype=torch.float32, device=self.device)

    def concatenate(self, arrays: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(arrays))

    def launch(
        self, program: Program, inputs: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float],
        groups: Sequence[int], outputs: Sequence,
    ) -> list[Tensor]:  # fmt: skip
        """See ``launches.py``."""
        made = [
            torch.empty(target, dtype=getattr(torch, extra), device=self.device) if isinstance(target, tuple) else target
            for target, extra in outputs
        ]
        dtypes = (tuple(t.dtype for t in inputs), tuple(t.dtype for t in made))
        kernel = self._kernels.get((program.name, *dtypes))
        if kernel is None:
            library = self._compile(source(program, *dtypes))
            kernel = self._kernels[(program.name, *dtypes)] = getattr(library, program.name)
        threads = (groups[0] * program.threads, groups[1], groups[2])
        kernel(
            *inputs,
            [int(n) for n in ints],
            [float(x) for x in floats],
            *made,
            threads=threads,
            group_size=(program.threads, 1, 1),
        )
        return made


@cache
def machine() -> Machine:
    """The machine of this process's GPU."""
    return Machine("mps", torch.mps.compile_shader)
