"""The GPU backend up to the point where kernels start: what it would compile and launch, on a machine without a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch

from gyrokv.backends.gpu import calls, nvrtc, plan
from gyrokv.testing import Problem

ARCH = "sm_90a"


class Launch(NamedTuple):
    """One kernel's start. ``defines`` and ``shared`` are what it is compiled with, ``argument`` its structure."""

    name: str
    defines: dict[str, int | str]
    shared: int
    grid: tuple[int, int, int]
    threads: int
    argument: ctypes.Structure


@contextmanager
def recorded(processors: int = 132, shared_memory: int = plan.SHARED_MEMORY) -> Iterator[list[Launch]]:
    """Kernels are noted, not started, so that tensors of the CPU serve; results are what ``torch.empty`` holds."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, name, defines, device, shared=0):
            self.made = name, dict(defines), shared

        def launch(self, grid, threads, stream, argument):
            launches.append(Launch(*self.made, grid, threads, type(argument).from_buffer_copy(argument)))

    cuda = {"current_stream": lambda device: SimpleNamespace(cuda_stream=0), "device": lambda device: nullcontext()}
    own = {"kernel": Recorder, "_processors": lambda device: processors, "_shared_memory": lambda device: shared_memory}
    with mock.patch.multiple(torch.cuda, **cuda), mock.patch.multiple(calls, **own):
        yield launches


def launches(problem: Problem) -> list[Launch]:
    """What the backend would launch for ``problem``."""
    spec, view = problem.case.spec, problem.view
    mask = problem.mask
    if mask is not None:
        mask = mask.expand(spec.batch, spec.q_heads, spec.q_len, spec.kv_len)
    with recorded() as found:
        calls.attend(problem.q, view, spec, mask, problem.sinks, heads=True)
    return found


def compiles(launch: Launch) -> str:
    """The assembler's notes on the kernel of ``launch``. Raises GyroKVError if it cannot be compiled."""
    return nvrtc.compile_source(f"{launch.name}.cu", launch.defines, ARCH)[1]
