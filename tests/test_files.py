"""Saved caches: bit for bit the same, usable as before, and refused when anything in the file is not as it was."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import save_file

import gyrokv
from gyrokv import CacheFileError, Codec, KVCache, LayerCache, LayerShape, append, attend
from gyrokv.files import load_layers, save_layers
from gyrokv.formats import FORMATS

DIM, HEADS = 32, 2
RANDOM = torch.Generator().manual_seed(0)
MATRIX = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=RANDOM)).Q
K, V = (torch.randn(3, HEADS, 120, DIM, generator=RANDOM) for _ in "kv")
Q = torch.randn(3, 4, 120, DIM, generator=RANDOM)


def layer(k: str = "turbo3", v: str = "q8_0", k_codec=None, **options) -> LayerCache:
    made = dict(kv_heads=HEADS)
    codecs = Codec(k, DIM, **made, **(k_codec or {})), Codec(v, DIM, **made)
    return LayerCache(*codecs, batch=3, **made, **options)


KINDS = {
    "plain": lambda: layer(),
    "dense": lambda: layer("f32", "bf16", dtype=torch.float16),
    "bf16": lambda: layer("bf16", "tq6.v1", dtype=torch.bfloat16, sinks=3, recent=10),
    "ring": lambda: layer("q4_0", "turbo4.v2", window=20),
    "ring_recent": lambda: layer(window=33, recent=7),
    "matrix": lambda: layer("fp8_e4m3", k_codec=dict(rotation=MATRIX[0], scale=torch.tensor([0.1, 0.3])), recent=4),
    "matrices": lambda: layer("q8_0", k_codec=dict(rotation=MATRIX, scale=2.0)),
    "hadamard": lambda: layer("q4_0", k_codec=dict(rotation="hadamard")),
    "unrotated": lambda: layer("turbo4", k_codec=dict(rotation="none")),
    "preallocated": lambda: layer(capacity=100),
}


def feed(store: LayerCache, start: int, stop: int):
    return store.append(K[:, :, start:stop], V[:, :, start:stop])


def assert_same(a: LayerCache, b: LayerCache) -> None:
    (tensors, positions), (others, expected) = a.state(), b.state()
    assert positions == expected and tensors.keys() == others.keys()
    for name, t in tensors.items():
        assert t.dtype == others[name].dtype and t.shape == others[name].shape
        assert t.contiguous().reshape(-1).view(torch.uint8).equal(others[name].contiguous().reshape(-1).view(torch.uint8))
    for mine, theirs in ((a.k_codec, b.k_codec), (a.v_codec, b.v_codec)):
        assert mine.format == theirs.format and torch.equal(mine.scale, theirs.scale) and mine.rotation == theirs.rotation
        assert (mine.matrix is None) == (theirs.matrix is None)
        assert mine.matrix is None or torch.equal(mine.matrix, theirs.matrix)
    for name in ("batch", "kv_heads", "dtype", "window", "sinks", "recent", "length"):
        assert getattr(a, name) == getattr(b, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 15, 90])
def test_round_trip_and_going_on(kind, count, tmp_path, device):
    """A loaded layer is the saved one bit for bit, and continuing from it equals never having saved."""
    saved = KINDS[kind]()
    feed(saved, 0, count)
    saved.set_starts(torch.tensor([0, 1, 0]))
    save_layers(tmp_path / "cache", [saved, None], {"mine": [1, "two"]})
    (loaded, nothing), note = load_layers(tmp_path / "cache", device)
    assert nothing is None and note == {"mine": [1, "two"]}
    assert loaded.device.type == device
    loaded.to("cpu")
    assert_same(saved, loaded)
    assert torch.equal(loaded.starts, saved.starts)
    views = [feed(x, count, count + 30) for x in (saved, loaded)]
    assert_same(saved, loaded)
    outs = [attend(Q[:, :, :30], view, window=saved.window) for view in views]
    assert torch.equal(*outs)
    for x in (saved, loaded):
        x.truncate(count + 29)
    assert_same(saved, loaded)


def test_a_cache_goes_on_elsewhere(device, tmp_path):
    """Saved on one device and continued on another: the same bytes, and attention over them agrees."""
    turned = ("matrix", "matrices", "hadamard")  # by products that devices round differently
    for kind, (source, target) in product([k for k in KINDS if k not in turned], ((device, "cpu"), ("cpu", device))):
        saved = KINDS[kind]()
        saved.to(source)
        append(saved, K[:, :, :60].to(source), V[:, :, :60].to(source))
        save_layers(tmp_path / "cache", [saved])
        (loaded,), _ = load_layers(tmp_path / "cache", target)
        outs = []
        for x, where in ((saved, source), (loaded, target)):
            view = append(x, K[:, :, 60:90].to(where), V[:, :, 60:90].to(where))
            outs.append([attend(Q[:, :, :n].to(where), view, window=x.window).cpu() for n in (1, 30)])
            x.to("cpu")
        assert_same(saved, loaded)
        for a, b in zip(*outs):
            assert float((a - b).norm() / a.norm()) < 2e-3, f"{kind}, {source} to {target}"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_round_trips(name, tmp_path):
    saved = layer(name, name)
    feed(saved, 0, 20)
    save_layers(tmp_path / "cache", [saved])
    (loaded,), _ = load_layers(tmp_path / "cache")
    assert_same(saved, loaded)


def test_an_empty_layer_round_trips(tmp_path):
    saved = layer(capacity=10)
    save_layers(tmp_path / "cache", [saved])
    (loaded,), _ = load_layers(tmp_path / "cache")
    for x in (saved, loaded):
        feed(x, 0, 5)
    assert_same(saved, loaded)


def cache() -> KVCache:
    shapes = [LayerShape(HEADS, DIM, k_rotation=MATRIX), LayerShape(HEADS, DIM, window=20)]
    made = KVCache("k=q8_0,v=turbo4,recent=4; last1: v=tq6", shapes, batch=3)
    for i in range(2):
        made.append(i, K[:, :, :50], V[:, :, :50])
    return made


def test_a_whole_cache(tmp_path):
    """Configuration and layers come back; the saved cache is only read."""
    saved = cache()
    saved.save(tmp_path / "cache")
    loaded = KVCache.load(tmp_path / "cache")
    assert str(loaded.config) == str(saved.config) and loaded.nbytes <= saved.nbytes
    for a, b in zip(saved.layers, loaded.layers):
        assert_same(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"], "no temporary file stays behind"


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    """An interrupted save must leave the older file as it was."""
    path = tmp_path / "cache"
    cache().save(path)
    before = path.read_bytes()

    def fail(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr(gyrokv.files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        cache().save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def refused(path, message: str) -> None:
    with pytest.raises(CacheFileError, match=message):
        KVCache.load(path)


def rewrite(path, change) -> None:
    """Change the header of a saved cache: ``change(header)`` edits it in place."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    table = json.loads(raw[8 : 8 + size])
    header = json.loads(table["__metadata__"]["gyrokv"])
    change(header)
    table["__metadata__"]["gyrokv"] = json.dumps(header)
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


@pytest.fixture
def path(tmp_path):
    cache().save(tmp_path / "cache")
    return tmp_path / "cache"


def test_every_flipped_byte_is_noticed(path):
    """One bit anywhere, in tensors, in the header or in what the header says: never a cache that is slightly wrong."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    step = max(1, (len(raw) - size) // 60)
    places = [*range(0, 8 + size, 23), *range(8 + size, len(raw), step), len(raw) - 1]
    for place in places:
        broken = bytearray(raw)
        broken[place] ^= 0x01
        if raw[place : place + 1].isspace():
            continue  # padding of the header says nothing
        path.write_bytes(bytes(broken))
        with pytest.raises(CacheFileError):
            KVCache.load(path)


@pytest.mark.parametrize("keep", [0, 5, 100, 1000, -1])
def test_truncated_files_are_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "is not a readable safetensors file")


def test_other_files_are_refused(tmp_path):
    """Anything that is not a saved cache is said to be none."""
    text, foreign = tmp_path / "text", tmp_path / "foreign"
    text.write_text("this is no cache\n" * 20)
    refused(text, "text is not a readable safetensors file")
    save_file({"x": torch.ones(3)}, foreign)
    refused(foreign, "is a safetensors file but not a saved gyrokv cache")
    save_file({"x": torch.ones(3)}, foreign, metadata={"gyrokv": "not json"})
    refused(foreign, "its header lacks or garbles")
    save_file({"x": torch.ones(3)}, foreign, metadata={"gyrokv": "{}"})
    refused(foreign, "its header lacks or garbles 'layout'")
    with pytest.raises(FileNotFoundError, match="no cache file at .*missing"):
        KVCache.load(tmp_path / "missing")


def test_caches_of_another_kind_are_refused(tmp_path):
    """Layers without a configuration are no KVCache."""
    store = layer()
    feed(store, 0, 3)
    save_layers(tmp_path / "layers", [store])
    refused(tmp_path / "layers", "layers of another kind of cache")
    save_layers(tmp_path / "layers", [store, None], {"config": "q8_0"})
    refused(tmp_path / "layers", "layers of another kind of cache")


def test_edited_headers_are_refused(path):
    """What the file says about its rows is covered by the checksum, as the rows are."""
    raw = path.read_bytes()

    def set_length(header):
        header["layers"][0]["positions"]["length"] += 1

    for change, message in (
        (set_length, "contents do not match the checksum"),
        (lambda h: h.update(layout=7), "file layout 7; this version reads 1"),
        (lambda h: h.pop("checksum"), "lacks or garbles 'checksum'"),
        (lambda h: h.update(note={}), "contents do not match the checksum"),
    ):
        path.write_bytes(raw)
        rewrite(path, change)
        refused(path, message)


def test_formats_that_mean_something_else_are_refused(path, monkeypatch):
    """The bytes of a row mean nothing without its definition: the same name is not enough."""
    table = dict(FORMATS)
    monkeypatch.setattr(gyrokv.formats, "FORMATS", table)
    KVCache.load(path)
    table["turbo4"] = replace(FORMATS["turbo4"], step=FORMATS["turbo4"].step * 1.0001)
    refused(path, "another definition of format 'turbo4': digest [0-9a-f]{12}, here [0-9a-f]{12}")
    del table["turbo4"]
    refused(path, "holds format 'turbo4', which is unknown here")


def test_a_failed_load_changes_nothing(path):
    """Loading makes a new cache: one that is in use stays as it is, whatever the file holds."""
    mine = cache()
    before = [layer.state() for layer in mine.layers]
    path.write_bytes(path.read_bytes()[:-3])
    refused(path, "not a readable")
    for (tensors, positions), used in zip(before, mine.layers):
        now, there = used.state()
        assert there == positions and all(torch.equal(now[n], t) for n, t in tensors.items())
