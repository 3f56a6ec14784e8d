"""Stands in for what launches kernels on a Mac: torch's ``compile_shader`` and MLX's ``metal_kernel``, for CPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from gyrokv.backends.metal import launches, torch_mps
from gyrokv.backends.metal.kernels import POSITIONS, Program

from .host import Library, Ran

_SMALL = 8  # MLX hands inputs with fewer elements over in the constant address space
_MLX_TYPES = {
    torch.float32: "float", torch.float16: "float16_t", torch.bfloat16: "bfloat16_t", torch.bool: "bool",
    torch.int16: "uint16_t", torch.uint8: "uint8_t", torch.int64: "int64_t",
}  # fmt: skip


@cache
def library(source: str) -> Library:
    """A source compiled once per process."""
    return Library(source)


def span(t: Tensor) -> tuple[int, int]:
    """Address, and bytes from the first to the last element."""
    if not t.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return t.data_ptr(), (last + 1) * t.element_size()


def mlx_kernel(
    name: str, inputs: Sequence[tuple[str, torch.dtype, int]], outputs: Sequence[tuple[str, torch.dtype]], body: str
) -> str:
    """The kernel that MLX 0.32 writes around ``body``. ``inputs``: (name, dtype, elements)."""
    parameters = []
    for parameter, dtype, elements in inputs:
        space = "constant" if elements < _SMALL else "device"
        parameters.append(f"const {space} {_MLX_TYPES[dtype]}* {parameter}")
    parameters += [f"device {_MLX_TYPES[dtype]}* {parameter}" for parameter, dtype in outputs]
    parameters = [f"{text} [[buffer({i})]]" for i, text in enumerate(parameters)]
    parameters += [f"{kind} {attribute} [[{attribute}]]" for attribute, kind in POSITIONS.items() if attribute in body]
    joined = ",\n  ".join(parameters)
    return f"[[kernel]] void {name}(\n  {joined}) {{\n{body}\n}}\n"


class Executor(torch_mps.Machine):
    """Runs launches of tensors of the CPU through the entry ``torch`` or ``mlx``, under ``schedule``.

    Both entries of a program are one source, so that its cores are compiled once. ``log``: what every launch did;
    ``edit`` changes a source before it is compiled.
    """

    def __init__(self, entry: str, schedule: str = "forward", edit: Callable[[str], str] = lambda source: source) -> None:
        super().__init__("cpu", self._shader)
        self.entry, self.schedule, self.edit = entry, schedule, edit
        self.log: list[tuple[Program, Ran]] = []

    def strides(self, x: Tensor) -> tuple[int, ...]:
        return super().strides(x) if self.entry == "torch" else launches.contiguous(x.shape)

    def launch(self, program, inputs, ints, floats, groups, outputs):
        self._now = program
        if self.entry == "mlx":
            if not all(isinstance(target, tuple) for target, _ in outputs):
                raise TypeError("MLX writes to new arrays only")
            inputs = [x.contiguous() for x in inputs]  # as MLX does by itself
        self._sizes = [x.numel() for x in inputs]
        return super().launch(program, inputs, ints, floats, groups, outputs)

    def _shader(self, source: str):
        """What ``compile_shader`` returns: an object whose attribute of the kernel's name launches it."""
        program, name = self._now, self._now.name

        def launch(*arguments, threads: Sequence[int], group_size: Sequence[int]) -> None:
            kept, buffers, inputs = [], [], []
            count = len(program.inputs)
            for label, argument in zip((*program.inputs, "ints", "floats", *program.outputs), arguments):
                if not isinstance(argument, Tensor):
                    kept.append(torch.tensor(argument, dtype=torch.int64 if isinstance(argument[0], int) else torch.float32))
                    argument = kept[-1]
                buffers.append(span(argument))
                inputs.append((label, argument.dtype, argument.numel()))
            outputs = [(label, dtype) for label, dtype, _ in inputs[count + 2 :]]
            own = mlx_kernel(f"custom_kernel_{name}", inputs[: count + 2], outputs, program.body)
            label = name if self.entry == "torch" else f"custom_kernel_{name}"
            assert all(n % size == 0 for n, size in zip(threads, group_size))
            groups = [n // size for n, size in zip(threads, group_size)]
            ran = library(self.edit(f"{source}\n{own}")).run(label, buffers, groups, program.threads, self.schedule)
            self.log.append((program, ran))

        return type("Shader", (), {name: staticmethod(launch)})()
