"""The kernels for ARM, where there are a cross compiler and an emulator: otherwise nothing here would run them."""

from __future__ import annotations

import pytest
import torch
from arm_host import host
from test_cpu import THIN, equal_layers, hard_rows, right
from test_cpu_quads import DENSE_CASES, QUADS

from gyrokv import Codec, LayerCache
from gyrokv.backends import cpu
from gyrokv.backends.cpu import native
from gyrokv.formats import FORMATS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(host.missing()), reason=f"ARM's processors: {host.missing()}")]
# some of what other levels are tested with: a call takes the emulator a tenth of a second and more
CASES = [c for c in (*THIN[::4], *QUADS[::3], *DENSE_CASES[::3]) if c.spec.q_len * c.spec.kv_len * c.spec.q_heads < 100_000]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> host.ArmLibrary:
    return host.ArmLibrary(tmp_path_factory.mktemp("arm"))


@pytest.fixture(params=host.LEVELS)
def arm(built, request, monkeypatch):
    monkeypatch.setattr(native, "_library", built)
    built.level = built.levels[host.LEVELS.index(request.param)]
    return request.param


def test_what_is_run_here_holds_everything():
    """A format or a head size that is left out would never be run on an ARM processor before users do."""
    specs = [c.spec for c in CASES]
    assert {s.k_format.name for s in specs} == set(FORMATS) == {s.v_format.name for s in specs}
    assert len({s.head_dim for s in specs}) > 9 and len({s.q_len * s.groups for s in specs}) > 9


@pytest.mark.parametrize("case", CASES, ids=str)
def test_arm_matches_the_reference(arm, case, problem):
    """Products of int8 with a sign, vectors of four: no other level has them."""
    data = problem(case)
    right(data, *data.run("cpu"))


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if not f.is_dense], ids=str)
def test_arm_encodes_the_same_bytes(arm, fmt):
    """A cache that is written on one machine is read on another."""
    for dim in (64, 96, 128):
        layers = [LayerCache(Codec(fmt, dim), Codec(fmt, dim), kv_heads=2, batch=2) for _ in range(2)]
        x = hard_rows(dim, torch.float32, 19)
        cpu.append(layers[0], x, x)
        layers[1].append(x, x)
        assert equal_layers(*layers)
