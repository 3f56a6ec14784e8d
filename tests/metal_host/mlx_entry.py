"""Stands in for MLX's Metal back-end: kernels that ``mx.fast.metal_kernel`` was given run on the executor.

The source is MLX's own: it writes a kernel out while a call is traced for export, for which it needs no GPU.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from gyrokv.mlx.machine import machine

from .entries import library
from .host import Ran


def _printed(run: Callable[[], Any]) -> str:
    """What ``run`` writes to the process's standard output, C++ streams included."""
    sys.stdout.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            run()
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        return file.read().decode()


class Kernel:
    """What ``mx.fast.metal_kernel`` returns."""

    def __init__(self, real: Any, runs: Executor) -> None:
        self._real, self._runs = real, runs
        self._sources: dict[tuple, str] = {}

    def __call__(
        self, *, inputs: Sequence[mx.array], output_shapes: Sequence, output_dtypes: Sequence, grid, threadgroup, **options
    ) -> list[mx.array]:
        inputs = [mx.contiguous(x) for x in inputs]
        mx.eval(inputs)
        key = tuple((x.dtype, x.size < 8) for x in inputs)
        if key not in self._sources:
            arguments = dict(output_shapes=output_shapes, output_dtypes=output_dtypes, grid=grid, threadgroup=threadgroup)
            self._sources[key] = self._source(inputs, arguments | options)
        given = [_numpy(x) for x in inputs]
        made = [_numpy(mx.zeros(shape, dtype)) for shape, dtype in zip(output_shapes, output_dtypes)]
        for a in made:
            a.view(np.uint8).fill(0xFF)  # NaN: nobody may count on what new memory holds
        source = self._sources[key]
        name = re.search(r"\[\[kernel\]\] void (\w+)", source).group(1)
        groups = [n // size for n, size in zip(grid, threadgroup)]
        buffers = [(a.ctypes.data, a.nbytes) for a in (*given, *made)]
        self._runs.log.append(library(source).run(name, buffers, groups, threadgroup[0], self._runs.schedule))
        return [mx.array(a).view(dtype) if dtype == mx.bfloat16 else mx.array(a) for a, dtype in zip(made, output_dtypes)]

    def _source(self, inputs: Sequence[mx.array], options: dict) -> str:
        """MLX's own source for these inputs."""
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "kernel.mlxfn")
            shown = _printed(
                lambda: mx.export_function(path, lambda *x: self._real(inputs=list(x), verbose=True, **options), *inputs)
            )
        return shown.split("```\n")[1]


def _numpy(x: mx.array) -> np.ndarray:
    """A copy; numpy has no bfloat16, whose bits will do."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


@dataclass
class Executor:
    """``schedule``: of the runs; ``log``: what each did."""

    schedule: str = "forward"
    log: list[Ran] = field(default_factory=list)


@contextmanager
def executed(schedule: str = "forward") -> Iterator[Executor]:
    """Within: MLX has a GPU, as far as gyrokv can see."""
    runs = Executor(schedule)
    real, available = mx.fast.metal_kernel, mx.metal.is_available
    mx.fast.metal_kernel = lambda **options: Kernel(real(**options), runs)
    mx.metal.is_available = lambda: True
    machine.cache_clear()  # what it compiled belongs to one executor
    try:
        yield runs
    finally:
        machine.cache_clear()
        mx.fast.metal_kernel, mx.metal.is_available = real, available
