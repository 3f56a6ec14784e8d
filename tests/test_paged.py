"""Paged caches: the same bytes and results as a plain cache of each sequence, whatever is shared, copied and freed."""

from __future__ import annotations

import pytest
import torch

from gyrokv import CapacityError, Codec, LayerCache, LayerShape, PagedCache, attend
from gyrokv.cases import kinds
from gyrokv.formats import FORMATS
from gyrokv.paged import PAGE_SIZES

SHAPES = [LayerShape(2, 64), LayerShape(2, 32, window=20)]


def tokens(batch: int, count: int, layer: int = 0, seed: int = 0, device: str = "cpu"):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 2, count, SHAPES[layer].head_dim, generator=made).to(device)


def grow(cache: PagedCache, sequences: list[int], counts: list[int], seed: int):
    """Extend by random tokens: the batch, and what each sequence got by layer, right-aligned padding left out."""
    batch, wide = cache.extend(sequences, counts), max(counts)
    given = [tokens(len(sequences), wide, layer, seed, cache.device) for layer in range(len(cache.layers))]
    views = [batch.append(layer, *kv) for layer, kv in enumerate(given)]
    return views, [[kv[:, b : b + 1, :, wide - n :] for kv in given] for b, n in enumerate(counts)]


def rows(view):
    """Packed rows of a view of one sequence, in order."""
    (segment,) = view.parts()[0].view.segments
    return [t[:, :, : segment.stop] for t in (*segment.k, *segment.v)]


@pytest.mark.parametrize("k", [fmt.name for fmt in kinds()])
@pytest.mark.parametrize("page_size", PAGE_SIZES[::2])
def test_bytes_are_those_of_a_plain_cache(k, page_size, device):
    """Pages are storage only: ragged appends give each sequence the bytes that it has alone."""
    cache = PagedCache(f"k={k},v=turbo4", SHAPES, pages=40, page_size=page_size, device=device)
    ids, history = [cache.add() for _ in range(3)], {}
    for step, counts in enumerate(([5, 40, 17], [1, 1, 1], [0, 30, 2])):
        views, given = grow(cache, ids, counts, step)
        for sequence, count, kvs in zip(ids, counts, given):
            history.setdefault(sequence, []).extend([kvs] * (count > 0))
    assert [cache.length(s) for s in ids] == [6, 71, 20]
    for b, sequence in enumerate(ids):
        for layer, shape in enumerate(SHAPES):
            alone = LayerCache(Codec(k, shape.head_dim), Codec("turbo4", shape.head_dim), kv_heads=2, device=device)
            for kvs in history[sequence]:
                alone.append(*kvs[layer])
            mine = views[layer].parts()[b].view
            want = alone.state()[0]
            segment = mine.segments[0]
            for side in ("k", "v"):
                for part in ("words", "scale"):
                    got = getattr(getattr(segment, side), part)[:, :, : mine.length]
                    assert torch.equal(got.contiguous().view(torch.uint8), want[f"main.{side}.{part}"].view(torch.uint8))
            q = torch.randn(3, 4, 2, shape.head_dim, generator=torch.Generator().manual_seed(9)).to(device)
            out = attend(q, views[layer], window=shape.window)[b : b + 1]
            exact = attend(q[b : b + 1], alone, window=shape.window, backend="reference")
            assert float((out - exact).norm() / exact.norm()) < 2e-3


def test_a_shared_page_is_copied_when_written_to(device):
    """Neither of two sequences that share a prefix may see what the other appends."""
    cache = PagedCache("q8_0/turbo3", SHAPES, pages=9, page_size=16, device=device)
    a = cache.add()
    views, _ = grow(cache, [a], [39], 0)
    want = [t.clone() for t in rows(views[0])]
    b, c = cache.fork(a), cache.fork(a, 32)
    assert cache.free_pages == 6 and (cache.length(b), cache.length(c)) == (39, 32)
    grow(cache, [b, c], [3, 20], 1)  # b copies its third page, c takes new ones
    assert cache.free_pages == 3
    views, _ = grow(cache, [a], [1], 2)  # nobody else has its third page now
    assert cache.free_pages == 3
    assert all(torch.equal(x[:, :, :39], y) for x, y in zip(rows(views[0]), want))
    views, _ = grow(cache, [c], [1], 3)
    assert all(torch.equal(x[:, :, :32], y[:, :, :32]) for x, y in zip(rows(views[0]), want))
    for sequence in (a, b, c):
        cache.remove(sequence)
    assert cache.free_pages == 9 and not any(cache._users)


def test_without_pages_nothing_changes():
    cache = PagedCache("turbo4", SHAPES, pages=4, page_size=16)
    a = cache.add()
    grow(cache, [a], [40], 0)
    b = cache.fork(a)
    raw = [t.clone() for layer in cache.layers for t in (*layer.k, *layer.v)]
    with pytest.raises(CapacityError, match="18 more tokens need 3 pages of 16 slots, but 1 of pages=4 are free"):
        cache.extend([a, b], [9, 9])
    assert (cache.length(a), cache.length(b), cache.free_pages) == (40, 40, 1)
    now = [t for layer in cache.layers for t in (*layer.k, *layer.v)]
    assert all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(raw, now))
    cache.truncate(a, 32)  # b's alone now
    cache.extend([b], 8)
    assert cache.free_pages == 1


def test_a_batch_can_be_written_to_again(device):
    """A captured graph holds the tensors of one batch: later steps must find them in place."""
    cache = PagedCache("q8_0", SHAPES, pages=20, page_size=16, device=device)
    ids = [cache.add(), cache.add()]
    grow(cache, ids, [20, 3], 0)
    batch = cache.extend(ids, 1, length=64)
    pointer, view = batch.pages.data_ptr(), batch.append(0, *tokens(2, 1, device=device))
    assert view.length == 64
    again = cache.extend(ids, 1, into=batch)
    again.append(0, *tokens(2, 1, seed=5, device=device))
    assert again is batch and batch.pages.data_ptr() == pointer and batch.lengths.tolist() == [22, 5]
    assert [p.view.length for p in view.parts()] == [22, 5]
    with pytest.raises(ValueError, match="into has 2 sequences, 4 pages each and 1 new tokens; this batch has 1, 4 and 1"):
        cache.extend(ids[:1], 1, into=batch)


WRONG = {
    "page_size": (dict(page_size=24), "page_size=24 is not one of"),
    "pages": (dict(pages=0), "pages=0 must be at least 1"),
    "dense": (dict(config="k=q8_0,v=q8_0,recent=4"), "recent=4: a paged cache keeps no dense rows; layer 0"),
    "shapes": (dict(shapes=[]), "shapes is empty"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_caches(name):
    wrong, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        PagedCache(**(dict(config="q8_0", shapes=SHAPES, pages=4) | wrong))


def test_wrong_steps():
    cache = PagedCache("q8_0", SHAPES, pages=4, page_size=16)
    a = cache.add()
    for sequences, counts, message in (
        ([a, a], 1, "must be different"), ([], 1, "at least one"), ([7], 1, "sequence=7 is not in this cache"),
        ([a], [1, 2], r"counts=\[1, 2\] must be 1 numbers"), ([a], [-1], "counts"), ([a], 0, "not all 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            cache.extend(sequences, counts)
    for call in (cache.fork, cache.truncate):
        with pytest.raises(ValueError, match="length=3 must be between 0 and the 0 tokens of sequence 1"):
            call(a, 3)
    batch = cache.extend([a], 2)
    k, v = tokens(1, 2)
    spoiled = k.clone()
    spoiled[0, 0, 0, 0] = torch.nan
    for wrong, message in (
        (k[:, :, :1], r"k has shape \(1, 2, 1, 64\); this batch takes \[1, 2, 2, 64\] in layer 0"),
        (spoiled, "k holds 1 values that are NaN"), (k.to("meta"), "k is on meta but the cache is on cpu"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            batch.append(0, wrong, v)
    with pytest.raises(TypeError, match="k has dtype torch.int64"):
        batch.append(0, k.long(), v)


def test_bytes_of_the_pools():
    cache = PagedCache("q8_0/turbo4", SHAPES, pages=7, page_size=32)
    per_token = sum(2 * (FORMATS["q8_0"].bytes_per_head(d) + FORMATS["turbo4"].bytes_per_head(d)) for d in (64, 32))
    assert cache.nbytes == 8 * 32 * per_token and "7 of 7 pages free" in repr(cache)
