"""Is each kernel right on the bytes it is given? Every case on every backend, against float64 on the decoded rows."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from gyrokv import BACKENDS, BlockMap, FormatError, LayerCache, Unsupported, attend, explain
from gyrokv.backends import cpu, tiled
from gyrokv.cases import FEATURES, HEADS, case, cases, compatible, fits, groups, kinds
from gyrokv.dispatch import choose, describe, reasons
from gyrokv.formats import FORMATS
from gyrokv.spec import features
from gyrokv.testing import assert_matches, inputs, poison_dead

CASES = cases()


def bound(backend, spec) -> float:
    """The relative error that a backend documents because it rounds q or p itself; none by default."""
    value = getattr(backend, "BOUND", 0.0)
    assert 0.0 <= value <= 2e-3
    fast, half = getattr(backend, "FAST_BOUND", value), getattr(backend, "BFLOAT16_BOUND", value)
    assert value <= half <= 2e-3 and value <= fast <= 3e-2
    return fast if spec.fast else half if spec.dtype == torch.bfloat16 and not spec.v_format.has_levels else value


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backend_matches_reference(name, case, device, backend_here, problem):
    """A failure is a wrong kernel: a result off by more than float32 loses, or a refusal that does not say why."""
    backend = backend_here(name)
    case = case.on(device)
    why = reasons(backend, case.spec)
    data = problem(case)
    if why:
        with pytest.raises(Unsupported) as refusal:
            data.run(name)
        assert said_by(name, str(refusal.value)) == why
        return
    assert_matches(data, *data.run(name), bound(backend, case.spec))


def said_by(name: str, text: str) -> list[str]:
    """The reasons that an explanation lists for one backend."""
    lines = text.splitlines()
    start = lines.index(f"  {name}: cannot run because") + 1
    own = []
    for line in lines[start:]:
        if not line.startswith("    "):
            break
        own.append(line.strip())
    return own


@pytest.mark.gpu
def test_an_accelerator_is_here():
    """With ``-m gpu`` on a machine without one this skips, so that the run says why nothing ran."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no accelerator")
    torch.zeros(1, device="cuda")


@pytest.mark.parametrize("case", CASES[::9] + groups()["feature_pairs"] + groups()["storage"], ids=str)
def test_inputs_are_the_case(case, problem):
    """If this fails the tests test something else than their ids say."""
    data = problem(case)
    seen = describe(data.q, data.view, **data.options, block_map=True if case.spec.block_map else None)
    assert seen == case.spec
    assert data.view.first == case.offset


def test_inputs_are_peaked_with_an_outlier_channel(problem):
    """Uniform inputs would hide errors: some weight must dominate, and one channel must be far larger."""
    data = problem(case("f32", "f32", q_len=7, kv_len=1000))
    scores = data.q @ data.k.repeat_interleave(2, 1).mT / 8.0
    assert float(scores.softmax(-1).amax(-1).median()) > 0.3
    for x in (data.k, data.v):
        size = x.abs().mean((0, 1, 2))
        assert float(size.max() / size.median()) > 4.0


# -- coverage


def test_cases_are_unique():
    """Two cases with one id would hide each other's result."""
    assert len({str(c) for c in CASES}) == len(CASES)


def test_everything_reaches_the_torch_backend():
    """The torch backend is the fallback of all others: each format, pair, head size and feature must reach it."""
    specs = [c.spec for c in CASES if not reasons(tiled, c.spec)]
    assert {(s.k_format.name, s.v_format.name) for s in specs} == {(k, v) for k in FORMATS for v in FORMATS}
    for fmt in FORMATS.values():
        mine = {(s.head_dim, s.head_dim_v) for s in specs if s.k_format == s.v_format == fmt}
        assert mine >= {dims for dims in HEADS if fits(fmt, dims[0]) and fits(fmt, dims[1])}
    used = set().union(*(s.uses() for s in specs))
    assert used == {f.name for f in features()}
    pairs = {pair for s in specs for pair in ((a, b) for a in s.uses() for b in s.uses())}
    possible = [frozenset(spec.uses()) for a in FEATURES for b in FEATURES if (spec := together(a, b)) is not None]
    assert pairs >= {(a, b) for uses in possible for a in uses for b in uses}
    assert {s.groups for s in specs} >= set(range(1, 9))


def together(a: str, b: str):
    settings = compatible(a, b)
    return None if settings is None else case("q8_0", "turbo4", **settings).spec


def test_each_feature_meets_each_kind_of_format():
    """A kernel that honours a feature for one kind of row only must be noticed."""
    seen = {(c.spec.k_format.name, name) for c in groups()["features"] for name in c.spec.uses()}
    for fmt in kinds():
        names = {f.name for f in features()} - (set() if not fmt.is_dense else {"unquantised"})
        assert names <= {name for k, name in seen if k == fmt.name}


def test_an_unknown_feature_is_refused(monkeypatch):
    """A backend that has never heard of a feature must refuse it by name, not ignore it."""
    for backend in (cpu, tiled):
        monkeypatch.setattr(backend, "UNDERSTANDS", backend.UNDERSTANDS - {"softcap"})
    data = inputs(case("q8_0", "q8_0", softcap=4.0))
    with pytest.raises(Unsupported, match="it does not know the feature softcap"):
        data.run("torch")
    with pytest.raises(Unsupported, match="(?s)problem: q8_0.q8_0.*torch: cannot run.*reference: can run; never chosen"):
        data.run("auto")


def test_unsupported_and_missing_are_told_apart(monkeypatch):
    """What a machine lacks is a reason to skip, what a kernel cannot do is not: both must be listed."""
    monkeypatch.setattr(tiled, "missing", lambda: ["no such device"])
    spec = case("q8_0", "q8_0", dtype=torch.float64).spec
    assert reasons(tiled, spec) == ["missing here: no such device", "dtype=torch.float64 (it computes in float32)"]
    assert "torch: cannot run" in explain(spec) and "chosen)" not in explain(spec)


# -- invariances


@pytest.mark.parametrize("case", [c for c in CASES if c.spec.block_map], ids=str)
@pytest.mark.parametrize("scores", [tiled._SCORES, 1])
def test_block_map_changes_nothing(case, scores, monkeypatch, problem):
    """A block map only saves work: a map that skips a visible key or shows a hidden one changes bits."""
    monkeypatch.setattr(tiled, "_SCORES", scores)
    data = problem(case)
    without = attend(data.q, data.view, **data.options, backend="torch", return_lse=True)
    block_map = BlockMap.build(data.mask, tiled.tile(case.spec))
    with_map = attend(data.q, data.view, **data.options, backend="torch", return_lse=True, block_map=block_map)
    assert all(torch.equal(a, b) for a, b in zip(without, with_map))


def test_block_maps_of_long_cases_hold_every_state():
    """Skipped, free and mixed tiles must all occur, or the test above shows nothing."""
    for c in CASES:
        if c.spec.block_map and c.spec.kv_len > 4096:
            data = inputs(c)
            assert set(BlockMap.build(data.mask, tiled.tile(c.spec)).states.unique().tolist()) == {0, 1, 2}


@pytest.mark.parametrize("case", groups()["features"][::3] + groups()["many_tiles"] + groups()["storage"], ids=str)
def test_small_tiles_agree(case, monkeypatch, problem):
    """The result may not depend on where tiles end: tiles of 64 keys instead of as many as fit."""
    monkeypatch.setattr(tiled, "_SCORES", 1)
    assert tiled.tile(case.spec)[1] == 64
    data = problem(case)
    assert_matches(data, *data.run("torch"))


@pytest.mark.parametrize("case", groups()["features"][::5] + groups()["storage"], ids=str)
def test_dead_slots_are_not_read(case, device):
    """Slots beyond the length and slots that a ring no longer uses hold NaN; none may reach the result."""
    data = inputs(case.on(device))
    before = data.run("torch")
    if data.view.owner is not None:
        poison_dead(data.view.owner)
    after = data.run("torch")
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert not bool(after[0].isnan().any() or after[1].isnan().any())


def test_dead_ring_slots_after_truncation():
    """A ring that was cut back holds newer tokens' rows in dead slots; they must not be attended."""
    c = case("turbo4", "q8_0", causal=True, window=32, ring=True, sliding=32, kv_len=64, offset=39)
    data = inputs(c)
    layer = data.view.owner
    layer.record_past()
    layer.append(data.k[:, :, :9], data.v[:, :, :9])
    layer.truncate(c.length)
    poison_dead(layer)
    got, want = attend(data.q, layer, **data.options, return_lse=True), inputs(c)
    assert_matches(want, *got, bound(choose(c.spec), c.spec))


@pytest.mark.parametrize("case", groups()["features"][::4], ids=str)
def test_two_runs_are_bitwise_equal(case, device, problem):
    """Differences between runs would be a race or memory that nobody wrote."""
    data = problem(case.on(device))
    assert all(torch.equal(a, b) for a, b in zip(data.run("torch"), data.run("torch")))


@pytest.mark.parametrize("k", FORMATS)
def test_prefill_equals_decode(k, device):
    """A query among others and the same query alone must agree, for every pair: no kernel may have its own meaning."""
    for v in FORMATS:
        whole = inputs(case(k, v, (64, 64), q_len=4, kv_len=9, causal=True, batch=1, device=device))
        view, rows = whole.view, []
        layer = LayerCache(view.k_codec, view.v_codec, batch=1, kv_heads=2, device=device)
        for t in range(9):
            one = layer.append(whole.k[:, :, t : t + 1], whole.v[:, :, t : t + 1])
            if t >= 5:
                rows.append(attend(whole.q[:, :, t - 5 : t - 4], one, return_lse=True))
        allowed = bound(choose(whole.case.spec), whole.case.spec)
        assert_matches(whole, torch.cat([r[0] for r in rows], 2), torch.cat([r[1] for r in rows], 2), allowed)


def test_wrong_block_maps_are_refused():
    """A map of another mask, of a changed mask, or of another tile shape would hide keys silently."""
    data = inputs(case("q8_0", "q8_0", mask="bool", block_map=True, q_len=3))
    tile = tiled.tile(data.case.spec)
    good = BlockMap.build(data.mask, tile)

    def run(block_map, **changed):
        return attend(data.q, data.view, **{**data.options, **changed}, block_map=block_map, backend="torch")

    run(good)
    with pytest.raises(ValueError, match="another mask tensor"):
        run(good, mask=data.mask.clone())
    with pytest.raises(ValueError, match=re.escape(f"tiles of (3, 32), but the kernel uses tiles of {tile}")):
        run(BlockMap.build(data.mask, (3, 32)))
    with pytest.raises(ValueError, match="without the mask"):
        run(good, mask=None)
    data.mask[0, 0] = False
    with pytest.raises(ValueError, match="out of date"):
        run(good)
    with pytest.raises(ValueError, match=r"tile=\(0, 4\)"):
        BlockMap.build(data.mask, (0, 4))
    with pytest.raises(TypeError, match="mask has dtype torch.int64"):
        BlockMap.build(data.mask.long(), (1, 4))


def test_block_map_states_by_brute_force():
    """Each tile's state, computed one by one: a short last tile must not be taken for a full one."""
    c = case("q8_0", "q8_0", mask="additive", q_len=7, kv_len=33, mask_axes="bhqk")
    mask = inputs(c).mask
    states = BlockMap.build(mask, (3, 8)).states
    assert states.shape == (2, 4, 3, 5)
    nan_alone = torch.tensor([[-torch.inf, torch.nan]])
    assert int(BlockMap.build(nan_alone, (1, 2)).states) == 2  # not masked: it must reach the result
    for b in range(2):
        for h in range(4):
            for i in range(3):
                for j in range(5):
                    part = mask[b, h, 3 * i : 3 * i + 3, 8 * j : 8 * j + 8]
                    want = 1 if bool((part == 0).all()) else 0 if bool((part <= -65504).all()) else 2
                    assert int(states[b, h, i, j]) == want


def test_case_knows_its_device():
    c = CASES[0].on("cuda")
    assert c.spec.device == "cuda" and replace(c, spec=replace(c.spec, device="cpu")) == CASES[0]


def test_cases_skip_only_what_a_format_cannot_hold():
    """A format that quietly drops out of a head size would be tested nowhere."""
    dropped = {(f.name, d) for f in FORMATS.values() for d, _ in HEADS if not fits(f, d)}
    assert dropped == {(f.name, 576) for f in FORMATS.values() if f.whole_head}
    with pytest.raises(FormatError, match="at most 512"):
        case("tq4.v1", "q8_0", (576, 576))
