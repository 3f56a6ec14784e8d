"""Stands in for what launches kernels on a Mac: torch's ``compile_shader`` here, on tensors of the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .host import Library, Ran


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


class Shader:
    """What ``torch.mps.compile_shader(source)`` returns, as far as it is used. ``ran``: of every launch, into ``log``."""

    def __init__(self, source: str, schedule: str = "forward", seed: int = 1, log: list[Ran] | None = None) -> None:
        self._library, self._schedule, self._seed, self._log = library(source), schedule, seed, log

    def __getattr__(self, name: str):
        kernel = self._library.kernel(name)

        def launch(*arguments, threads: Sequence[int], group_size: Sequence[int]) -> None:
            kept, buffers = [], []
            for argument in arguments:
                if isinstance(argument, Tensor):
                    buffers.append(span(argument))
                    continue
                kept.append(np.array(argument, dtype=np.int64 if isinstance(argument[0], int) else np.float32))
                buffers.append((kept[-1].ctypes.data, kept[-1].nbytes))
            if any(n % size for n, size in zip(threads, group_size)):
                raise ValueError(f"threads={threads} is not a multiple of group_size={group_size}")
            groups = [n // size for n, size in zip(threads, group_size)]
            ran = kernel(buffers, groups, group_size, self._schedule, self._seed)
            if self._log is not None:
                self._log.append(ran)

        return launch


def compile_shader(schedule: str, log: list[Ran] | None = None):
    """``compile_shader`` whose kernels run under ``schedule``."""
    return lambda source: Shader(source, schedule, log=log)


