"""Cases to tensors, and the comparison that every backend must pass. Used by tests and before anything is timed.

Inputs have peaked scores and one outlier channel, because uniform noise hides errors: each query points at one key,
so that a wrong key, a wrong scale or a wrong head changes the result by more than any tolerance.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .cases import Case
from .dispatch import attend, choose
from .layer import LayerCache
from .masks import BlockMap
from .quant import Codec, cat
from .reference import attention
from .spec import AttentionSpec
from .view import KVView, Segment

_SPARE = 13  # slots of a test's layer beyond its length, so that there is something that must not be read
_PEAK = 8.0  # score of a query's own key
_ONE_BY_ONE = 1024  # products at most, where plain float32 adds them in order
_SCORES, _VALUES = 2**19, 2**23  # at most, to see what plain float32 loses in 8 to 48 orders of summation


@dataclass
class Problem:
    """The tensors of a case: q, what it attends to, and the keys and values ``k``, ``v`` as they were appended."""

    case: Case
    q: Tensor
    view: KVView
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    sinks: Tensor | None = None

    @property
    def options(self) -> dict:
        """Arguments for ``attend``, but for the block map."""
        spec = self.case.spec
        names = ("causal", "window", "scale", "softcap", "alibi", "fast")
        return {name: getattr(spec, name) for name in names} | {"mask": self.mask, "sinks": self.sinks}

    def run(self, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """``attend`` on this problem: (out, lse). A block map is built for the backend's own tiles."""
        spec, block_map = self.case.spec, None
        if spec.block_map:
            block_map = BlockMap.build(self.mask, choose(spec, backend).tile(spec))
        return attend(self.q, self.view, **self.options, block_map=block_map, backend=backend, return_lse=True)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The reference on this problem, or on several copies of it along the batch axis of q, k and v."""
        view, options, copies = self.view, self.options, q.shape[0] // self.q.shape[0]
        del options["fast"]  # no part of what attention means
        if self.mask is not None and self.mask.ndim == 4 and self.mask.shape[0] > 1:
            options["mask"] = self.mask.repeat(copies, 1, 1, 1)
        return attention(
            q, k, v, **options, dtype=dtype,
            q_positions=torch.arange(view.length - q.shape[2], view.length, device=q.device),
            k_positions=torch.arange(view.first, view.length, device=q.device),
            starts=None if view.starts is None else view.starts.repeat(copies),
            lengths=None if view.lengths is None else view.lengths.expand(view.batch).repeat(copies),
        )  # fmt: skip

    @cached_property
    def stored(self) -> tuple[Tensor, Tensor]:
        """K and V as the view decodes them: float32, in the stored space."""
        return self.view.decode("k").to(self.q.device), self.view.decode("v").to(self.q.device)

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor]:
        """(out, lse) in float64 over the decoded rows, which are turned back in float64 too."""
        k, v = (c.output(x.double()) for c, x in zip((self.view.k_codec, self.view.v_codec), self.stored))
        return self._attention(self.q.double(), k, v, torch.float64)

    @cached_property
    def plain(self) -> tuple[Tensor, Tensor]:
        """``[n, *]`` of (out, lse) by plain PyTorch in float32 over the same decoded rows: what that precision costs.

        One result per order of the channels, because the loss of a single one may be small by luck.
        """
        q, (k, v) = self.view.k_codec.query(self.q), self.stored
        random = torch.Generator().manual_seed(0)
        spec = self.case.spec
        keys = spec.batch * spec.q_heads * max(1, spec.kv_len)
        count = min(48, max(8, min(_SCORES // (keys * spec.q_len), _VALUES // (keys * k.shape[3]))))
        orders = [torch.randperm(k.shape[3], generator=random).to(q.device) for _ in range(count)]
        q, k = (torch.cat([x[..., order] for order in orders]) for x in (q, k))
        with _OneByOne():
            out, lse = self._attention(q, k, v.repeat(count, 1, 1, 1), torch.float32)
        return tuple(x.unflatten(0, (count, -1)) for x in (self.view.v_codec.output(out), lse))

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """out by plain PyTorch in float32 whose weights are rounded to ``dtype``, as PyTorch's own are where it computes in
        ``dtype`` (which costs its scores more)."""
        q, (k, v) = self.view.k_codec.query(self.q), self.stored
        with _RoundedWeights(dtype):
            return self.view.v_codec.output(self._attention(q, k, v, torch.float32)[0])


class _OneByOne(TorchFunctionMode):
    """Matrix products add one product after the other. Libraries add in an order that depends on shape and machine,
    and a kernel need not be as lucky as they are."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (Tensor.__matmul__, Tensor.matmul, torch.matmul) or args[0].shape[-1] > _ONE_BY_ONE:
            return func(*args, **(kwargs or {}))
        a, b = args
        total = torch.zeros(torch.broadcast_shapes(a.shape[:-1] + (1,), b.shape[:-2] + (1, b.shape[-1])), dtype=a.dtype)
        total = total.to(a.device)
        for i in range(a.shape[-1]):
            total += a[..., i, None] * b[..., i, None, :]
        return total


class _RoundedWeights(TorchFunctionMode):
    """Of the products of the reference, the left side of the second one is rounded to ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.products = dtype, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.__matmul__, Tensor.matmul, torch.matmul):
            self.products += 1
            if self.products == 2:
                args = args[0].to(self.dtype).to(args[0].dtype), *args[1:]
        return func(*args, **(kwargs or {}))


def inputs(case: Case | AttentionSpec, seed: int = 0) -> Problem:
    """The tensors of ``case``: the same ones for the same case and seed, on every machine and device."""
    case = case if isinstance(case, Case) else Case(case)
    spec, device = case.spec, case.spec.device
    digest = hashlib.sha256(f"{case.on('cpu')} {seed}".encode()).digest()
    random = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=random)

    model = torch.float32 if spec.dtype == torch.float64 else spec.dtype
    k = normal(spec.batch, spec.kv_heads, case.length, spec.head_dim)
    v = normal(spec.batch, spec.kv_heads, case.length, spec.head_dim_v)
    outlier = spec.head_dim // 3
    k[..., outlier] += 5.0
    v[..., spec.head_dim_v // 2] *= 8.0
    k, v = (x.to(model).to(device) for x in (k, v))

    q = 0.5 * normal(spec.batch, spec.q_heads, spec.q_len, spec.head_dim)
    if spec.kv_len:
        wanted = whole(spec.kv_len, spec.batch, spec.q_heads, spec.q_len)
        wanted = case.offset + wanted % (torch.tensor(case.lengths)[:, None, None] - case.offset)
        keys = k.float().cpu().repeat_interleave(spec.groups, 1)
        keys = keys.gather(2, wanted.unsqueeze(-1).expand(*wanted.shape, spec.head_dim))
        keys[..., outlier] -= 5.0
        q = q + keys * (_PEAK * math.sqrt(spec.head_dim) / (keys * keys).sum(-1, keepdim=True))
    # heads last but one in memory, as models have them: kernels must honour strides
    q = q.transpose(1, 2).contiguous().transpose(1, 2).to(spec.dtype).to(device)
    sinks = (2.0 + 3.0 * normal(spec.q_heads)).to(device) if spec.sinks else None
    mask = _mask(case, normal).to(device) if spec.mask else None
    view = _view(case, k, v, normal)
    if spec.starts:
        starts = torch.tensor([case.offset + spec.kv_len * (b + 1) // 4 for b in range(spec.batch)])
        if view.owner is None:
            view = replace(view, starts=starts.to(device))
        else:
            view.owner.set_starts(starts)
            view = view.owner.view()
    return Problem(case, q, view, k, v, mask, sinks)


def codecs(case: Case, normal) -> tuple[Codec, Codec]:
    """Codecs of K and V with the rotation and the static scales that ``case`` asks for."""
    spec, made = case.spec, []
    for fmt, dim in ((spec.k_format, spec.head_dim), (spec.v_format, spec.head_dim_v)):
        rotation: str | Tensor | None = case.rotation or None
        if case.rotation.startswith("matri"):
            count = () if case.rotation == "matrix" else (spec.kv_heads,)
            rotation = torch.linalg.qr(normal(*count, dim, dim).double()).Q.float().to(spec.device)
        factor = case.factor * torch.arange(1.0, spec.kv_heads + 1) if case.factor else 1.0
        made.append(Codec(fmt, dim, kv_heads=spec.kv_heads, rotation=rotation, scale=factor))
    return tuple(made)


def _view(case: Case, k: Tensor, v: Tensor, normal) -> KVView:
    """The rows of ``case``: what came before the queries' own tokens, then these in one chunk."""
    spec = case.spec
    if case.plain:
        return KVView.of(k, v)
    views = []
    sequences = range(spec.batch) if spec.lengths else [slice(None)]
    for b in sequences:
        rows = slice(b, b + 1) if spec.lengths else b
        layer = LayerCache(
            *(codecs(case, normal) if not views else (views[0].k_codec, views[0].v_codec)),
            batch=1 if spec.lengths else spec.batch, kv_heads=spec.kv_heads, dtype=k.dtype, device=spec.device,
            window=case.sliding or None, sinks=case.first, recent=case.recent,
            capacity=0 if case.sliding else case.length + _SPARE,
        )  # fmt: skip
        length = case.lengths[b if spec.lengths else 0]
        view, before = layer.view(), max(0, length - spec.q_len)
        for start, stop in ((0, before // 2), (before // 2, before), (before, length)):
            if start < stop:
                view = layer.append(k[rows, :, start:stop], v[rows, :, start:stop])
        views.append(view)
    if spec.lengths:
        view = together(views, case)
    return in_pages(view, case.page) if spec.paged else view


def together(views: list[KVView], case: Case) -> KVView:
    """Views of one sequence each as one view, with lengths on the device up to ``case.length``."""
    kinds = [dict(first=0, stop=case.first)] if case.first else []
    later = dict(first=max(case.first, case.offset), stop=case.length)
    kinds += [later | dict(trail=case.recent, keep=views[0].segments[0].capacity if case.sliding else None)]
    kinds += [later | dict(keep=case.recent)] if case.recent else []
    segments = []
    for rows, settings in zip(zip(*(view.segments for view in views)), kinds):
        k, v = (cat([getattr(s, side) for s in rows], dim=0) for side in "kv")
        segments.append(Segment(k, v, rows[0].k_format, rows[0].v_format, base=0, **settings))
    lengths = torch.tensor([view.length for view in views], device=case.spec.device)
    return replace(
        views[0], segments=tuple(segments), batch=len(views), first=case.offset, length=case.length, lengths=lengths,
        owner=None,
    )  # fmt: skip


def in_pages(view: KVView, page: int) -> KVView:
    """The same rows in pages of ``page`` slots, in a shuffled order; slots that hold nothing are poisoned."""
    lengths = torch.tensor([view.length]) if view.lengths is None else view.lengths.cpu()

    def paged(s: Segment) -> Segment:
        count = -(-s.capacity // page)
        order = torch.randperm(view.batch * count + 2, generator=torch.Generator().manual_seed(count))
        table = order[: view.batch * count].view(view.batch, count)
        # the position in each slot [B, slots], as in a segment of the new capacity
        newest = (lengths - s.trail).clamp(max=s.stop).expand(view.batch)[:, None] - 1
        positions = newest - (newest - s.base - torch.arange(count * page)) % (count * page)
        held = (positions >= s.first) & (positions > newest - s.capacity)
        slots = (positions - s.base).clamp(min=0) % s.capacity

        def moved(t: Tensor) -> Tensor:
            index, live = (x.to(t.device)[:, None, :, None] for x in (slots, held))
            rows = t.gather(2, index.expand(-1, t.shape[1], -1, t.shape[3]))
            pool = _garbage(t.new_empty(len(order), t.shape[1], page, t.shape[3]))
            rows = torch.where(live, rows, _garbage(torch.empty_like(rows)))
            pool[table.to(t.device)] = rows.unflatten(2, (count, page)).transpose(1, 2)
            return pool

        return replace(s, k=s.k.map(moved), v=s.v.map(moved), pages=table.int().to(s.k.words.device))

    return replace(view, segments=tuple(map(paged, view.segments)), owner=None)


def _garbage(t: Tensor) -> Tensor:
    return t.fill_(math.nan if t.is_floating_point() else 0x7F7F)


def _mask(case: Case, normal) -> Tensor:
    """A mask with all that a block map tells apart: a free quarter, a masked half, the rest mixed; else an empty row."""
    spec, axes = case.spec, "qk" if case.mask_axes == "2" else case.mask_axes
    sizes = zip("bhqk", (spec.batch, spec.q_heads, spec.q_len, spec.kv_len))
    shape = [size if axis in axes else 1 for axis, size in sizes]
    keys = torch.linspace(0.0, 1.0, shape[3]) if shape[3] > 1 else torch.ones(1)
    free, dropped = keys < 0.25, (keys >= 0.25) & (keys < 0.75)
    seen = ((normal(*shape) < 0.6) | free) & ~dropped
    if shape[2] > 1 and not spec.block_map:
        seen[:, :, 1] = False
    if spec.mask == "bool":
        mask = seen
    else:
        bias = (-1.5 * normal(*shape).abs()).masked_fill(free, 0.0)
        mask = bias.masked_fill(~seen, case.masked).to(case.mask_dtype)
    # the last columns of a wider mask: what lies beyond its end must not be read
    wide = torch.cat((mask, mask.new_full((*shape[:3], 3), math.nan if spec.mask == "additive" else True)), dim=-1)
    mask = wide[..., : shape[3]]
    return mask[0, 0] if case.mask_axes == "2" else mask


def assert_close(got: Tensor, exact: Tensor, plain: Tensor, what: str, bound: float = 0.0) -> None:
    """AssertionError, with size and place of offenders, unless ``got`` is as near to ``exact`` as it must be.

    Allowed is twice the worst loss of the results ``plain [n, *]`` and one rounding of ``got``'s dtype, for the
    largest error and for the relative error; the worst of few results is at least three times their standard
    deviation. ``bound``: relative error that a kernel documents as its own.
    """
    assert got.shape == exact.shape, f"{what} has shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if not got.numel():
        return
    finite = torch.isfinite(exact)
    size = torch.where(finite, exact, 0.0).abs()
    losses = torch.where(finite, plain.double() - exact, 0.0)
    worst = torch.maximum(losses.abs().amax(0), 3.0 * losses.square().mean(0).sqrt()).max()
    rounding = max(torch.finfo(got.dtype).eps, torch.finfo(torch.float32).eps) / 2
    # infinities agree only when they are equal
    off = torch.where(got.double() == exact, 0.0, (got.double() - exact).abs())
    allowed = 2.0 * worst + rounding * size + bound * size.max()
    wrong = ~(off <= allowed)  # not a plain >, because NaN must fail
    if bool(wrong.any()):
        places = wrong.nonzero()[:4].tolist()
        first = tuple(places[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} values are off, at most by {float(off.max()):.3g}; at {first} "
            f"got {float(got[first]):.8g}, exact {float(exact[first]):.8g}, allowed {float(allowed[first]):.3g}; "
            f"first places {places}"
        )
    norm = torch.linalg.vector_norm
    error, limit = norm(off), 2.0 * max(map(norm, losses)) + (rounding + bound) * norm(size)
    assert error <= limit, f"{what}: relative error {float(error / norm(size)):.3g}, allowed {float(limit / norm(size)):.3g}"


def assert_matches(
    problem: Problem, out: Tensor, lse: Tensor, bound: float = 0.0, weights: torch.dtype | None = None
) -> None:
    """AssertionError unless ``(out, lse)`` is right for ``problem``, given the stored bytes. ``weights``: what the backend
    rounds weights to before they are multiplied by values, if it does."""
    spec = problem.case.spec
    assert out.dtype == spec.dtype, f"out has dtype {out.dtype}, expected {spec.dtype}"
    assert lse.dtype == torch.float32, f"lse has dtype {lse.dtype}, expected torch.float32"
    plain = list(problem.plain)
    if weights is not None:
        plain[0] = torch.cat((plain[0], problem.rounded(weights)[None]))
    for i, (what, got) in enumerate((("out", out), ("lse", lse))):
        assert_close(got, problem.exact[i], plain[i], f"{what} of {problem.case}", bound)


_MAKERS = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` and its relatives hand out NaN and garbage, so that reading what nobody wrote shows."""

    def poisoning(make):
        def made(*args, **options):
            t = make(*args, **options)
            if t.is_floating_point() and t.element_size() > 1:
                return t.detach().fill_(math.nan).requires_grad_(t.requires_grad) if t.numel() else t
            if t.is_complex() or t.dtype == torch.bool or not t.numel() or not t.is_contiguous():
                return t
            t.view(-1).view(torch.uint8).fill_(0x7F)  # NaN as fp8 too
            return t

        return made

    originals = [(owner, name, getattr(owner, name)) for owner, name in _MAKERS]
    for owner, name, make in originals:
        setattr(owner, name, poisoning(make))
    try:
        yield
    finally:
        for owner, name, make in originals:
            setattr(owner, name, make)


def poison_dead(layer: LayerCache) -> None:
    """Overwrite every slot of ``layer`` that holds no live position with NaN scales and garbage codes."""
    for rows in (layer._main, layer._sinks, layer._recent):
        if rows.k is None:
            continue
        segment = rows.segment()
        dead = torch.ones(segment.capacity, dtype=torch.bool)
        for slot, count in segment.runs(segment.first, segment.stop):
            dead[slot : slot + count] = False
        dead = dead.to(segment.k.words.device)
        for t in (*segment.k, *segment.v):
            t.copy_(torch.where(dead[:, None], _garbage(torch.empty_like(t)), t))
