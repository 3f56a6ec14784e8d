"""What every test runs under: one thread, fresh memory full of NaN, and the devices that are here."""

from __future__ import annotations

import os
from functools import lru_cache

import pytest
import torch

from gyrokv import BACKENDS
from gyrokv.backends.cpu import forced, native
from gyrokv.cases import Case
from gyrokv.testing import Problem, inputs, poisoned_memory

torch.set_num_threads(1)

# Backends whose absence is a failure here, not a skip: GYROKV_REQUIRE=torch,triton
REQUIRED = frozenset(name for name in os.environ.get("GYROKV_REQUIRE", "").split(",") if name)
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


def pytest_configure(config: pytest.Config) -> None:
    unknown = REQUIRED - BACKENDS.keys()
    if unknown:
        raise pytest.UsageError(f"GYROKV_REQUIRE names {sorted(unknown)}; backends are {sorted(BACKENDS)}")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device that torch can use here; all but the CPU are marked ``gpu``."""
    return request.param


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield


@pytest.fixture
def backend_here():
    """``backend_here(name)``: the backend module, after a skip if this machine lacks what it needs.

    It fails instead when GYROKV_REQUIRE names the backend, so that a skip cannot hide a broken installation.
    """

    def check(name: str):
        missing = BACKENDS[name].missing()
        if missing and name in REQUIRED:
            pytest.fail(f"GYROKV_REQUIRE names {name}, but: {missing}")
        if missing:
            pytest.skip(f"{name}: {'; '.join(missing)}")
        return BACKENDS[name]

    return check


@pytest.fixture
def level(request: pytest.FixtureRequest, backend_here):
    """The CPU backend on the instruction set named by ``request.param``, after a skip if it cannot run here."""
    backend_here("cpu")
    lacks = {found.name: found.lacks for found in native.library().levels}
    why = lacks.get(request.param, "the compiler does not know it")
    if why:
        pytest.skip(f"{request.param}: {why}")
    with forced(request.param):
        yield request.param


@lru_cache(maxsize=4)
def _problem(case: Case) -> Problem:
    return inputs(case)


@pytest.fixture
def problem():
    """``problem(case)``: its tensors, made once for the backends that are tested one after the other."""
    return _problem
