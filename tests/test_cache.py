"""The cache is storage: the same bytes however tokens arrive, and the same result as never having done otherwise."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrokv import CapacityError, Codec, KVCache, KVView, LayerCache, LayerShape, append, attend
from gyrokv.backends import cpu
from gyrokv.errors import GyroKVError
from gyrokv.formats import FORMATS
from gyrokv.layer import chronological, ring_capacity
from gyrokv.reference import attention
from gyrokv.testing import poison_dead

DIM, HEADS, BATCH, TOKENS = 32, 2, 2, 200
PROPERTY = settings(deadline=None, max_examples=25, print_blob=True)


@dataclass(frozen=True)
class Layer:
    """A kind of layer to test, small enough to try many histories of it."""

    name: str
    k: str = "turbo3"
    v: str = "q8_0"
    options: tuple[tuple[str, int], ...] = ()

    def make(self, **more) -> LayerCache:
        codecs = (Codec(self.k, DIM, kv_heads=HEADS), Codec(self.v, DIM, kv_heads=HEADS))
        return LayerCache(*codecs, **(dict(batch=BATCH, kv_heads=HEADS) | dict(self.options) | more))

    def __str__(self) -> str:
        return self.name


LINEAR = (
    Layer("growing"),
    Layer("preallocated", options=(("capacity", 300),)),
    Layer("dense", "bf16", "f32"),
    Layer("fp8", "fp8_e4m3", "tq6"),
    Layer("first", "q4_0", "turbo4", (("sinks", 5),)),
)
RECENT = (Layer("recent", options=(("recent", 12),)), Layer("both", "tq5", "turbo2", (("sinks", 3), ("recent", 9))))
RINGS = (Layer("ring", options=(("window", 20),)), Layer("ring_recent", "q4_0", "turbo4", (("window", 33), ("recent", 7))))
ALL = LINEAR + RECENT + RINGS


def tokens(count: int, batch: int = BATCH, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, HEADS, count, DIM, generator=random) * (1 + 9 * (torch.arange(DIM) == 3)) for _ in "kv")


K, V = tokens(TOKENS)
Q = tokens(TOKENS, seed=1)[0].repeat_interleave(2, 1)


def feed(layer: LayerCache, start: int, stop: int) -> KVView:
    return layer.append(K[:, :, start:stop], V[:, :, start:stop])


def same_state(a: LayerCache, b: LayerCache, but: tuple[str, ...] = ()) -> None:
    """Tensors bit for bit, and the positions they stand for."""
    (tensors, positions), (others, expected) = a.state(), b.state()
    assert {n: p for n, p in positions.items() if not n.startswith(but or "-")} == {
        n: p for n, p in expected.items() if not n.startswith(but or "-")
    }
    assert tensors.keys() == others.keys()
    for name in tensors:
        if not name.startswith(but or "-"):
            x, y = tensors[name].contiguous(), others[name].contiguous()
            assert x.dtype == y.dtype and x.shape == y.shape, name
            assert torch.equal(x.view(torch.uint8) if x.numel() else x, y.view(torch.uint8) if y.numel() else y), name


def brute_force(layer: LayerCache, length: int, q: torch.Tensor, window: int | None, first: int = 0):
    """Attention in float64 over what the layer should hold: decoded rows, the dense ones exactly where they are kept."""
    k, v = (c.output(c.decode(c.encode(x[:, :, :length]))) for c, x in ((layer.k_codec, K), (layer.v_codec, V)))
    k, v = k.double(), v.double()
    dense = [p for p in range(length) if p < layer.sinks or p >= length - layer.recent]
    for p in dense:
        k[:, :, p], v[:, :, p] = K[:, :, p].double(), V[:, :, p].double()
    positions = torch.arange(length - q.shape[2], length)
    return attention(q, k, v, causal=True, window=window, q_positions=positions)


def chunks(limit: int = TOKENS) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, 70), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) <= limit)


# -- the same bytes


@pytest.mark.parametrize("kind", ALL, ids=str)
@given(sizes=chunks())
@PROPERTY
def test_chunks_do_not_matter(kind, sizes):
    """A token is encoded once: its bytes may not depend on what arrived together with it."""
    whole, parts = kind.make(), kind.make()
    feed(whole, 0, sum(sizes))
    start = 0
    for size in sizes:
        view = feed(parts, start, start + size)
        start += size
        assert view.length == parts.length == start
    same_state(whole, parts)


@pytest.mark.parametrize("kind", LINEAR, ids=str)
@given(sizes=chunks(120), cut=st.integers(0, 120), more=st.integers(1, 70))
@PROPERTY
def test_truncated_is_as_if_never_appended(kind, sizes, cut, more):
    """Speculative decoding takes tokens back: nothing of them may remain."""
    layer, clean = kind.make(), kind.make()
    start = 0
    for size in sizes:
        feed(layer, start, start + size)
        start += size
    cut = min(cut, start)
    layer.truncate(cut)
    if cut:
        feed(clean, 0, cut)
        same_state(layer, clean)
    feed(layer, cut, cut + more)
    feed(clean, cut, cut + more)
    same_state(layer, clean)


@pytest.mark.parametrize("kind", RECENT, ids=str)
def test_truncation_keeps_quantised_rows(kind):
    """What was dense and overwritten is read from its quantised row: precision is lost, never a token."""
    layer, clean = kind.make(), kind.make()
    feed(layer, 0, 60)
    layer.truncate(51)
    feed(clean, 0, 51)
    same_state(layer, clean, but=("recent",))
    view = layer.view()
    assert [(s.first, s.stop) for s in view.segments if s.first >= 40 or s.stop > 40][-1][1] == 51
    covered = [p for s in view.segments for p in range(s.first, s.stop)]
    assert covered == list(range(51))


@pytest.mark.parametrize("kind", RINGS, ids=str)
@given(before=st.integers(1, 90), more=st.integers(1, 40), cut=st.integers(0, 40))
@PROPERTY
def test_recorded_past_allows_truncation(kind, before, more, cut):
    """With its past recorded a ring takes tokens back too, and attends as if they had never come."""
    layer, clean = kind.make(), kind.make()
    feed(layer, 0, before)
    layer.record_past()
    feed(layer, before, before + more)
    length = before + min(cut, more)
    layer.truncate(length)
    layer.record_past(False)
    feed(clean, 0, length)
    window = dict(kind.options)["window"]
    q = Q[:, :, :1]
    got, want = (attend(q, x, window=window) for x in (layer, clean))
    if not layer.recent:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    one, other = feed(layer, length, length + 70), feed(clean, length, length + 70)
    torch.testing.assert_close(*(attend(Q[:, :, :70], x, window=window) for x in (one, other)), rtol=1e-5, atol=1e-5)


def test_a_ring_without_its_past_refuses():
    """Positions that are gone cannot be attended: an error, and nothing changes."""
    layer = RINGS[0].make()
    feed(layer, 0, 150)
    before = layer.state()
    with pytest.raises(CapacityError, match="length=100: the ring holds positions 86 to 149, but the window of 20"):
        layer.truncate(100)
    assert layer.state()[1] == before[1]
    layer.truncate(110)
    assert layer.length == 110
    with pytest.raises(ValueError, match="length=111 must be between 0 and the 110 tokens held"):
        layer.truncate(111)
    with pytest.raises(ValueError, match="length=-1"):
        layer.truncate(-1)


@pytest.mark.parametrize("kind", RINGS, ids=str)
@given(sizes=chunks())
@PROPERTY
def test_a_ring_is_the_end_of_a_linear_layer(kind, sizes):
    """The rows that a ring holds are those of a layer that keeps everything, and every chunk attends alike."""
    window = dict(kind.options)["window"]
    linear = Layer("linear", kind.k, kind.v, tuple((n, s) for n, s in kind.options if n != "window"))
    ring, whole = kind.make(), linear.make()
    start = 0
    for size in sizes:
        views = [feed(layer, start, start + size) for layer in (ring, whole)]
        start += size
        outs = [attend(Q[:, :, start - size : start], view, window=window, backend="torch") for view in views]
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    store, (tensors, positions) = ring.state()[0], whole.state()
    first = ring.state()[1]["main_first"]
    assert first == max(0, start - ring_capacity(window)) and ring.view().kv_len == start - first
    for name in (n for n in tensors if n.startswith("main")):
        assert torch.equal(store[name], tensors[name][:, :, first:])
    assert positions["length"] == start


# -- the same result


@pytest.mark.parametrize("kind", ALL, ids=str)
@given(sizes=chunks(150))
@settings(deadline=None, max_examples=10)
def test_attend_against_brute_force(kind, sizes):
    """Dense rows where dense rows are kept, decoded ones elsewhere, each once, in order."""
    layer, start = kind.make(), 0
    window = dict(kind.options).get("window")
    for size in sizes:
        start += size
        view = feed(layer, start - size, start)
        q = Q[:, :, start - size : start]
        out, lse = attend(q, view, window=window, backend="torch", return_lse=True)
        want, want_lse = brute_force(layer, start, q, window)
        torch.testing.assert_close(out.double(), want, rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-4)


def test_growth_keeps_bytes():
    """Moving rows to a larger store may not touch them, and grows in steps, not with every token."""
    layer, sizes = Layer("growing").make(), set()
    big_k, big_v = (torch.cat([x] * 4, 2) for x in (K, V))
    for t in range(0, 800, 50):
        feeding = (big_k[:, :, t : t + 50], big_v[:, :, t : t + 50])
        layer.append(*feeding)
        sizes.add(layer.tensors[0].shape[-2])
    whole = Layer("growing").make(capacity=800)
    whole.append(big_k[:, :, :800], big_v[:, :, :800])
    same_state(layer, whole)
    assert sizes == {256, 512, 1024}
    assert whole.tensors[0].shape[-2] == 800


def test_reserve_moves_only_live_rows():
    """A ring that is opened and closed again holds the same rows, oldest first."""
    layer = RINGS[0].make()
    feed(layer, 0, 100)
    layer.record_past()
    feed(layer, 100, 190)
    layer.record_past(False)
    view = feed(layer, 190, 191)
    clean = RINGS[0].make()
    feed(clean, 0, 191)
    main, other = layer.view().segments[0], clean.view().segments[0]
    assert main.capacity == other.capacity == 64 and view.length == 191
    rows = [chronological(s.k, s, 171, 191).words for s in (main, other)]
    assert torch.equal(*rows)


@given(st.lists(st.integers(0, BATCH - 1), min_size=1, max_size=5))
@PROPERTY
def test_select_reorders_repeats_and_drops(index):
    """Beam search: the chosen sequences, whole, with their starts; then they go on on their own."""
    layer = Layer("both", "tq5", "turbo2", (("sinks", 3), ("recent", 9))).make()
    feed(layer, 0, 40)
    layer.set_starts(torch.tensor([0, 6]))
    layer.select(torch.tensor(index))
    direct = Layer("both", "tq5", "turbo2", (("sinks", 3), ("recent", 9))).make(batch=len(index))
    direct.append(K[index, :, :40], V[index, :, :40])
    direct.set_starts(torch.tensor([0, 6])[index])
    same_state(layer, direct)
    for x in (layer, direct):
        x.append(K[index, :, 40:50], V[index, :, 40:50])
    same_state(layer, direct)
    assert layer.batch == len(index)


def test_starts_hide_padding_in_a_batch():
    """A sequence that is padded on the left gives what it gives alone."""
    layer, alone = (Layer("plain", "turbo4", "q4_0").make(batch=b) for b in (2, 1))
    layer.set_starts(torch.tensor([0, 17]))
    view, short = feed(layer, 0, 50), alone.append(K[1:, :, 17:50], V[1:, :, 17:50])
    for backend, bound in (("torch", 1e-5), ("auto", cpu.BOUND)):  # float32, and 16 bits of q and of the weights
        out, lone = attend(Q[:, :, :50], view, backend=backend), attend(Q[1:, :, 17:50], short, backend=backend)
        torch.testing.assert_close(out[1:, :, 17:], lone, rtol=bound, atol=bound)
        assert (out[1, :, :17] == 0).all()
    assert layer.set_starts(None) is None and layer.view().starts is None


# -- sizes


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_the_tensors(name):
    """The size that is reported is the size that is held, and what the format says per token."""
    layer = Layer("one", name, name).make(capacity=300)
    assert layer.nbytes == 300 * BATCH * HEADS * 2 * FORMATS[name].bytes_per_head(DIM)
    assert layer.live_nbytes == 0
    feed(layer, 0, 10)
    assert layer.live_nbytes == 10 * BATCH * HEADS * 2 * FORMATS[name].bytes_per_head(DIM)
    assert layer.nbytes == sum(t.numel() * t.element_size() for t in layer.tensors)


def test_dense_copies_count_too():
    """Rows that are kept twice are stored twice: leaving them out would flatter the format."""
    layer = Layer("both", "q8_0", "q8_0", (("sinks", 3), ("recent", 9))).make(dtype=torch.bfloat16)
    feed(layer, 0, 30)
    rows = BATCH * HEADS * 2
    assert layer.live_nbytes == rows * (30 * FORMATS["q8_0"].bytes_per_head(DIM) + 12 * DIM * 2)


def test_device_and_reset():
    layer = Layer("both", "q8_0", "turbo4", (("sinks", 3), ("recent", 9))).make()
    feed(layer, 0, 30)
    layer.to("cpu")
    assert layer.device == torch.device("cpu")
    held = layer.nbytes
    layer.set_starts(torch.tensor([1, 2]))
    layer.reset()
    assert layer.length == 0 and layer.nbytes == held and layer.starts is None and layer.view().kv_len == 0
    assert (attend(Q[:, :, :1], layer) == 0).all()
    feed(layer, 0, 20)
    clean = Layer("both", "q8_0", "turbo4", (("sinks", 3), ("recent", 9))).make()
    feed(clean, 0, 20)
    same_state(layer, clean)
    assert repr(layer) == "LayerCache(k=q8_0, v=turbo4, head_dim=32/32, batch=2, kv_heads=2, length=20)"
    assert repr(RINGS[0].make()).endswith("length=0, window=20)")


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_views_are_copies_on_request_and_stale_after_writing(kind):
    """A view must not silently show tokens that came later; a copy keeps what it saw."""
    layer = kind.make()
    view = feed(layer, 0, 40)
    copy = view.to("cpu")
    want = attend(Q[:, :, :3], copy, window=view.window)
    feed(layer, 40, 45)
    for use in (lambda: attend(Q[:, :, :3], view, window=view.window), lambda: view.decode("k"), lambda: view.to("cpu")):
        with pytest.raises(GyroKVError, match="this view is out of date"):
            use()
    poison_dead(layer)
    assert copy.owner is None and not attend(Q[:, :, :3], copy, window=view.window).isnan().any()
    assert want.shape == (BATCH, 2 * HEADS, 3, DIM)


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_since_drops_the_oldest_keys(kind):
    """A shorter view is the same keys from a position on."""
    layer = kind.make()
    feed(layer, 0, 40)
    view = layer.view()
    short = view.since(25)
    assert (short.first, short.kv_len, short.length) == (25, 15, 40)
    assert torch.equal(short.decode("k"), view.decode("k")[:, :, 25 - view.first :])
    assert view.since(0) is view and view.since(40).kv_len == 0
    assert view.heads("v", torch.float16).shape == (BATCH, HEADS, view.kv_len, DIM)


# -- a whole cache


def whole() -> KVCache:
    shapes = [LayerShape(HEADS, DIM), LayerShape(HEADS, DIM, window=20), LayerShape(HEADS, DIM)]
    return KVCache("k=q8_0,v=turbo4,recent=4; last1: v=bf16; sliding: recent=0", shapes, batch=BATCH)


def test_a_cache_is_its_layers():
    """Append and attend by layer index; sizes are sums; the configuration decides per layer."""
    cache = whole()
    for i in range(3):
        view = cache.append(i, K[:, :, :40], V[:, :, :40])
        assert torch.equal(cache.attend(Q[:, :, :3], i), attend(Q[:, :, :3], view, window=cache.layers[i].window))
    assert cache.length == 40 and cache.nbytes == sum(layer.nbytes for layer in cache.layers)
    assert [layer.v_codec.format.name for layer in cache.layers] == ["turbo4", "turbo4", "bf16"]
    assert [layer.recent for layer in cache.layers] == [4, 0, 4]
    lines = cache.report().splitlines()
    assert len(lines) == 6 and "sliding 20" in lines[3] and f"{cache.nbytes:,}" in lines[-1]


def test_a_cache_truncates_all_layers_or_none():
    """Layers of different lengths would answer for different texts."""
    cache = whole()
    for i in range(3):
        cache.append(i, K[:, :, :150], V[:, :, :150])
    with pytest.raises(CapacityError):
        cache.truncate(90)
    assert [layer.length for layer in cache.layers] == [150] * 3
    cache.truncate(120)
    assert [layer.length for layer in cache.layers] == [120] * 3
    cache.set_starts(torch.tensor([0, 5]))
    cache.select(torch.tensor([1, 1, 0]))
    assert all(layer.batch == 3 and layer.starts.tolist() == [5, 5, 0] for layer in cache.layers)
    with pytest.raises(ValueError, match="shapes is empty"):
        KVCache("q8_0", [])


def test_append_without_a_kernel_is_the_layers_own():
    """The dispatching append stores the same bytes as the layer."""
    one, other = LINEAR[0].make(), LINEAR[0].make()
    append(one, K[:, :, :9], V[:, :, :9])
    feed(other, 0, 9)
    same_state(one, other)
