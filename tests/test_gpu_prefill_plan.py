"""How prefill cuts problems into parts and tiles, and which kernel serves what, without a GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from gyrokv import explain
from gyrokv.backends.gpu import shapes, staging
from gyrokv.cases import HEADS, case

BF16, F16 = torch.bfloat16, torch.float16

SIZES_OF_PROBLEMS = (
    dict(batch=1, heads=8, keys=65536, blocks=128), dict(batch=1, heads=8, keys=65536, blocks=256),
    dict(batch=64, heads=8, keys=4096, blocks=1), dict(batch=700, heads=16, keys=128, blocks=1),
    dict(batch=3, heads=7, keys=1_000_000, blocks=5), dict(batch=1, heads=1, keys=10**6, blocks=1),
    dict(batch=65535, heads=3, keys=17, blocks=2), dict(batch=2, heads=40, keys=3000, blocks=40),
)  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES_OF_PROBLEMS, ids=str)
def test_a_cut_fits_and_covers(sizes):
    """Every head and key once; no more rows at a time than there is room for; whole heads where they fill the machine."""
    batch, heads, keys, blocks = sizes.values()
    for bytes_of_row, most in product((128, 512, 2048, 2304), (1, 7, 10**9)):
        rows = staging.STAGED // bytes_of_row
        made = staging.cut(batch, heads, keys, rows, blocks, 132, most)
        pairs = made.batches * made.heads
        assert pairs * made.keys <= rows and 1 <= pairs <= most
        assert made.heads == heads or made.batches == 1
        assert made.keys >= keys or made.keys % 128 == 0
        fit = min(rows // keys, most, batch * heads)
        assert made.keys >= keys or fit < min(-(-132 // blocks), batch * heads)
        if batch < 100:
            seen = torch.zeros(batch, heads, dtype=torch.int32)
            for part in made.parts(batch, heads):
                seen[part] += 1
            assert bool((seen == 1).all())


def test_cuts_have_few_waves():
    """Without a limit all at once; else parts whose last blocks leave few processors idle."""
    assert staging.cut(2, 8, 1000, 2**62, 5, 132, 10**9) == staging.Cut(2, 8, 1000)
    assert staging.cut(1, 8, 65536, 5 * 65536, 66, 132, 10**9) == staging.Cut(1, 4, 65536)
    assert staging.cut(6, 2, 1000, 10_000, 132, 132, 10**9) == staging.Cut(5, 2, 1000)


def test_plans_fit():
    """Every problem has a kernel whose shared memory fits, with as many stages as a warpgroup holds at once."""
    flags = (False, True)
    for (dk, dv), mask, heads, own, exact, short in product(HEADS, range(5), (2, 4, 8), flags, flags, flags):
        spec = case("bf16", "bf16", (dk, dv), q_heads=heads, q_len=100, dtype=BF16, device="cuda").spec
        settings = dict(head_mask=own, exact=exact)
        made = shapes.shape(spec, (dk, dv), (BF16, F16, BF16), mask, **settings, processors=2**31 if short else 0)
        assert made.shared <= 232448 and made.stages[0] >= 2 and made.stages[1] >= (2 if made.groups else 4)
        assert made.mask_stages >= (made.groups if made.apart else 1) if mask else made.mask_stages == 0
        if not short:
            assert (made.rows, made.keys) == (shapes.tile(replace(spec, mask="bool" if mask else None)))
        assert made.dk % 64 == made.dv % 64 == 0 <= min(made.dk - dk, made.dv - dv)


@pytest.mark.parametrize(
    ("q_heads", "q_len", "causal", "groups"),
    [
        (16, 2048, False, 2), (16, 3072, False, 3), (16, 8192, False, 3), (32, 1024, False, 2), (8, 4096, False, 2),
        (16, 1024, True, 2), (16, 3072, True, 3), (16, 8192, True, 3), (8, 4096, True, 2), (32, 2048, True, 3),
    ],
)  # fmt: skip
def test_tiles_are_short_where_they_are_few(q_heads, q_len, causal, groups):
    """What was the faster one on 132 processors; a block map has tiles of one height, and wider values too."""
    sizes = dict(q_heads=q_heads, kv_heads=q_heads // 4, q_len=q_len, kv_len=q_len, causal=causal, dtype=BF16, batch=1)
    spec = case("bf16", "bf16", (64, 64), **sizes).spec
    types = (BF16,) * 3
    assert shapes.shape(spec, (64, 64), types, 0, processors=132).groups == groups
    assert shapes.shape(spec, (64, 64), types, 1, processors=132, mapped=True).groups == 3
    assert shapes.tile(spec)[0] == 192 // 4
    wider = case("bf16", "bf16", (128, 128), **sizes).spec
    assert shapes.shape(wider, (128, 128), types, 0, processors=132).groups == 2


def test_explain_says_why_decode_serves():
    assert "q_len=32 (below 33" in shapes.why_not(case("bf16", "bf16", q_len=32, dtype=BF16).spec)
    assert shapes.why_not(case("bf16", "bf16", q_len=33, kv_len=40).spec) == "dtype=torch.float32"
    for kind in (dict(starts=True), dict(lengths=True), dict(paged=True)):
        assert shapes.why_not(case("bf16", "bf16", q_len=33, kv_len=40, dtype=BF16, **kind).spec) == ""
    assert shapes.why_not(case("q8_0", "tq5", q_len=33, kv_len=40, dtype=F16).spec) == ""
    assert "gpu" in explain(case("bf16", "bf16", dtype=BF16, device="cuda").spec)
