"""NaN and inf on an accelerator: found without waiting, late, but never lost."""

from __future__ import annotations

import copy

import pytest
import torch

from gyrokv import Codec, LayerCache
from gyrokv.watch import Watch

GOOD = torch.ones(1, 2, 1, 32)


def spoiled(value: float) -> torch.Tensor:
    x = GOOD.clone()
    x[0, 1, 0, 3] = value
    return x


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_watch_remembers(value, device):
    """What was seen stays until it is raised, however much is fine after it; then it is forgotten."""
    watch, good, bad = Watch(torch.device(device)), GOOD.to(device), spoiled(value).to(device)
    watch.look(good, good)
    watch.wait()
    for k, v in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match="k or v of an earlier append held NaN or inf"):
            watch.look(k, v)
            watch.look(good, good)
            watch.wait()
        watch.wait()


def test_where_looking_is_free_nobody_watches():
    layer = LayerCache(Codec("q8_0", 32), Codec("q8_0", 32), kv_heads=2)
    assert Watch.on(layer.device) is None
    layer.check_values()


@pytest.mark.gpu
def test_append_raises_in_a_later_call_on_an_accelerator():
    """The append that brings NaN goes through; one of the next calls raises, or asking does."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no accelerator")
    layer = LayerCache(Codec("q8_0", 32), Codec("q8_0", 32), kv_heads=2, device="cuda")
    layer.append(spoiled(torch.nan).cuda(), GOOD.cuda())
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="earlier append"):
        layer.append(GOOD.cuda(), GOOD.cuda())
    assert layer.length == 1
    layer.append(GOOD.cuda(), spoiled(torch.inf).cuda())
    with pytest.raises(ValueError, match="earlier append"):
        layer.check_values()
    layer.check_values()
    copy.deepcopy(layer).append(GOOD.cuda(), GOOD.cuda())


@pytest.mark.gpu
def test_append_does_not_wait_for_an_accelerator():
    """A host that waits for every token cannot run ahead."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no accelerator")
    layer = LayerCache(Codec("q8_0", 32), Codec("q8_0", 32), kv_heads=2, device="cuda", capacity=64)
    k = GOOD.cuda()
    layer.append(k, k)  # puts tables on the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            layer.append(k, k)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert layer.length == 4
