"""The operators: right, traceable, and blind to lengths until they run."""

from __future__ import annotations

import pytest
import torch

from gyrokv import CapacityError, Codec, LayerCache, attend, ops
from gyrokv.cases import kinds
from gyrokv.config import LayerPolicy, LayerShape

KINDS = [fmt.name for fmt in kinds()]
BOUND, TOKENS = 80, 40


def store(k: str, v: str = "turbo4", *, device: str = "cpu", pages: bool = False, **settings):
    """Arguments of both operators for an empty layer of two sequences: (rows, lengths, pages, settings)."""
    policy, shape = LayerPolicy(k, v, **settings), LayerShape(2, 64)
    rows = str(ops.Rows.of(policy, shape, BOUND))
    size = (11, 2, 16) if pages else (2, 2, BOUND)
    packed = [c.encode(torch.zeros(1, 1, 0, 64, device=device)) for c in policy.codecs(shape)]
    tensors = [torch.zeros(*size, t.shape[-1], dtype=t.dtype, device=device) for p in packed for t in p]
    table = (1 + torch.randperm(10)).view(2, 5).int().to(device) if pages else None
    return tensors, torch.zeros(2 if pages else 1, dtype=torch.int64, device=device), table, rows


def tokens(count: int, device: str = "cpu", seed: int = 0):
    return torch.randn(2, 2, 2, count, 64, generator=torch.Generator().manual_seed(seed)).to(device)


def append_arguments(made, k, v):
    tensors, lengths, table, rows = made
    return (*tensors, ops.new_trouble(k.device), k, v, lengths, table, None, rows)


def attend_arguments(made, q, mask=None, sinks=None, starts=None, backend="auto"):
    tensors, lengths, table, rows = made
    return (q, *tensors, lengths, table, starts, mask, sinks, rows, True, 0, None, 0.0, 0.0, False, backend)


@pytest.mark.parametrize("k", KINDS)
@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.parametrize("rotation", ["", "hadamard"])
def test_appending_and_attending_by_operators(k, pages, rotation, device):
    """The operators write a layer's bytes, and attend as it does."""
    made = store(k, device=device, pages=pages, k_rotation=rotation)
    codecs = LayerPolicy(k, "turbo4", k_rotation=rotation).codecs(LayerShape(2, 64))
    layer = LayerCache(*codecs, kv_heads=2, batch=2, device=device)
    q = torch.randn(2, 4, 3, 64, generator=torch.Generator().manual_seed(1)).to(device)
    for seed, count in enumerate((TOKENS, 1, 7)):
        k_new, v_new = tokens(count, device, seed)
        torch.ops.gyrokv.append(*append_arguments(made, k_new, v_new))
        made[1].add_(count)
        layer.append(k_new, v_new)
        out, lse = torch.ops.gyrokv.attend(*attend_arguments(made, q))
        want = attend(q, layer, return_lse=True, backend="reference")
        assert float((out - want[0]).norm() / want[0].norm()) < 2e-3 and float((lse - want[1]).abs().max()) < 2e-2
    if not pages:
        state = layer.state()[0]
        for t, name in zip(made[0], ("k.words", "k.scale", "v.words", "v.scale")):
            assert torch.equal(
                t[:, :, : layer.length].contiguous().view(torch.uint8), state[f"main.{name}"].view(torch.uint8)
            )


@pytest.mark.parametrize("k", KINDS)
@pytest.mark.parametrize("pages", [False, True])
def test_opcheck(k, pages, device):
    """Schema, fakes, functionalisation and ahead-of-time tracing."""
    made = store(k, device=device, pages=pages)
    torch.library.opcheck(ops.append, append_arguments(made, *tokens(TOKENS, device)))
    torch.ops.gyrokv.append(*append_arguments(made, *tokens(TOKENS, device)))
    made[1].add_(TOKENS)
    q = torch.randn(2, 4, 3, 64, device=device)
    mask, sinks = torch.ones(2, 1, 3, BOUND, dtype=torch.bool, device=device), torch.zeros(4, device=device)
    torch.library.opcheck(ops.attend, attend_arguments(made, q))
    if not pages:
        torch.library.opcheck(ops.attend, attend_arguments(made, q, mask, sinks, starts=torch.tensor([0, 3], device=device)))


def test_trouble(device):
    """NaN and too many tokens: at once on the CPU, when asked on an accelerator, and only once."""
    made = store("q8_0", device=device)
    k, v = tokens(TOKENS, device)
    arguments = append_arguments(made, k, v)
    trouble = arguments[4]
    torch.ops.gyrokv.append(*arguments)
    ops.check(trouble)
    spoiled = k.clone()
    spoiled[0, 0, 0, 0] = torch.inf
    made[1].fill_(BOUND - TOKENS + 1)
    for x, error in ((spoiled, ValueError), (k, CapacityError)):
        with pytest.raises(error, match="NaN|exceed|room"):
            torch.ops.gyrokv.append(*arguments[:5], x, *arguments[6:])
            ops.check(trouble)
        if error is ValueError:
            trouble.zero_()
    ops.check(trouble)


def test_one_graph_for_all_lengths(device):
    """Compiled once, the operators follow lengths that are written in place."""
    made, traced = store("turbo3", device=device), []

    def step(k, v, q):
        torch.ops.gyrokv.append(*append_arguments(made, k, v))
        made[1].add_(k.shape[2])
        return torch.ops.gyrokv.attend(*attend_arguments(made, q))[0]

    def count(graph, example):
        traced.append(graph)
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, backend=count)
    layer = LayerCache(Codec("turbo3", 64), Codec("turbo4", 64), kv_heads=2, batch=2, device=device)
    for seed in range(3):
        (k, v), q = tokens(5, device, seed), torch.randn(2, 4, 5, 64, device=device)
        got, want = compiled(k, v, q), attend(q, layer.append(k, v))
        assert float((got - want).norm() / want.norm()) < 2e-3
    assert len(traced) == 1


@pytest.mark.gpu
def test_a_captured_graph_follows_lengths():
    """A CUDA graph holds addresses, not lengths: replayed, it appends behind what is there and attends to all of it."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no accelerator")
    made = store("q8_0", device="cuda")
    (k, v), q = tokens(1, "cuda"), torch.randn(2, 4, 1, 64, device="cuda")
    arguments = append_arguments(made, k, v)

    def step():
        torch.ops.gyrokv.append(*arguments)
        made[1].add_(1)
        return torch.ops.gyrokv.attend(*attend_arguments(made, q))[0]

    step()  # compiles kernels and puts tables on the device
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    made[1].zero_()
    layer = LayerCache(Codec("q8_0", 64), Codec("turbo4", 64), kv_heads=2, batch=2, device="cuda")
    for seed in range(20):
        new = tokens(1, "cuda", seed)
        k.copy_(new[0])
        v.copy_(new[1])
        graph.replay()
        want = attend(q, layer.append(*new), backend="torch")
        assert float((out - want).norm() / want.norm()) < 2e-3
    ops.check(arguments[4])
