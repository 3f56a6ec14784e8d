"""Views with lengths on the device and pages: do they mean what plain views of each sequence mean?"""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from gyrokv import BACKENDS, CapacityError, attend
from gyrokv.backends.gpu import plan
from gyrokv.cases import case, groups, kinds
from gyrokv.dispatch import reasons
from gyrokv.formats import FORMATS
from gyrokv.testing import inputs
from gyrokv.view import Kept

RAGGED = dict(lengths=True, causal=True, q_len=3, kv_len=100, batch=3)


def test_parts_are_the_sequences():
    """Each part holds one sequence's rows; sequences of one length stay together."""
    data = inputs(case("q8_0", "turbo4", paged=True, page=32, **RAGGED))
    parts = data.view.parts()
    assert [(p.view.length, p.columns, p.view.batch) for p in parts] == [(n, slice(0, n), 1) for n in (80, 60, 40)]
    assert not any(p.view.paged or p.view.lengths is not None for p in parts)
    same = replace(data.view, lengths=torch.tensor([40]))
    assert [(p.batch, p.view.length) for p in same.parts()] == [(slice(0, 3), 40)]
    k = data.view.decode("k")
    assert k.shape[2] == 100 and (k[2, :, 40:] == 0).all() and torch.equal(k[1:2, :, :60], parts[1].view.decode("k"))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("settings", [dict(), dict(paged=True), dict(first=3, recent=9, unquantised=True, ring=True)])
def test_lengths_change_without_a_new_view(name, settings, backend_here, device):
    """The same view after its lengths were written to attends to what they say then: nothing is kept from before."""
    backend_here(name)
    ragged = case("q8_0", "turbo4", **RAGGED, **settings, device=device)
    if reasons(BACKENDS[name], ragged.spec):
        return  # what is refused is told with the cases
    data = inputs(ragged)
    before = attend(data.q, data.view, backend=name)
    data.view.lengths.sub_(torch.tensor([7, 0, 9], device=device))
    after = attend(data.q, data.view, backend=name)
    want = attend(data.q, data.view, backend="reference")
    slack = 1e-5 if name == "torch" else 0.0  # the sums of torch's products may depend on the other sequences' lengths
    torch.testing.assert_close(after[1], before[1], rtol=slack, atol=slack)
    assert not torch.equal(after[0], before[0])
    assert float((after - want).norm() / want.norm()) < 1e-3


def test_a_ring_too_short_for_its_queries_is_refused():
    data = inputs(case("q8_0", "q8_0", causal=True, window=32, ring=True, sliding=32, kv_len=64, offset=39, lengths=True))
    q = torch.randn(2, 4, 34, 64)
    with pytest.raises(CapacityError, match="q has 34 tokens that look back on 65 positions .* the ring holds 64"):
        attend(q, data.view, window=32)
    attend(q[:, :, :33], data.view, window=32)


def test_pages_are_checked():
    data = inputs(case("q8_0", "q8_0", paged=True))
    segment = data.view.segments[0]
    with pytest.raises(ValueError, match="pages has dtype torch.int64 and 16 slots a page; it must be int32"):
        replace(segment, pages=segment.pages.long())
    with pytest.raises(ValueError, match="8 slots a page"):
        replace(segment, k=segment.k.map(lambda t: t[:, :, :8]))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("slots", [16, 32, 48, 256])
def test_gpu_tiles_fit_into_pages(fmt, slots):
    """A tile that straddles two pages would be read from the first one's neighbour."""
    row = plan.row_of(FORMATS[fmt], 128, 128)
    made = plan.plan(plan.Problem(row, row, 4, plan.BF16, False, page_slots=slots))
    assert slots % made.tile == 0 and dict(made.defines)["PAGED"] == 1


def test_every_kind_of_row_meets_pages():
    seen = {c.spec.k_format.name for c in groups()["pages"] if c.spec.paged}
    assert {fmt.name for fmt in kinds()} <= seen


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda kept: pickle.loads(pickle.dumps(kept))])
def test_what_backends_keep_stays_with_its_store(copied):
    """It is about addresses, which mean nothing for a copy, and less in another process."""
    assert copied(Kept(cpu=1)) == {} and type(copied(Kept(cpu=1))) is Kept
