"""Can the suite fail? Known kernel bugs are planted in the torch backend, and its own comparison must notice each.

A fault is a piece of the backend's source and what replaces it. The cases are those of the suite that need the piece.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from textwrap import indent
from typing import NamedTuple

import pytest
import torch

from gyrokv import BACKENDS
from gyrokv.backends import tiled
from gyrokv.cases import Case, cases
from gyrokv.formats import FORMATS
from gyrokv.spec import AttentionSpec
from gyrokv.testing import assert_matches

_MOST = 12  # cases that are run for one fault, spread over all that are relevant
_SOFTCAP = """    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
"""
_PARTLY = "        partly = lookahead"
_TILED = "for segment in view.segments:\n        position"


class Fault(NamedTuple):
    """``edits``: pieces of source, each there once, and what they become. ``relevant``: cases that must notice,
    among those with lengths on the device or pages if ``ragged``, else among the others."""

    name: str
    relevant: Callable[[Case], bool]
    edits: dict[str, str]
    ragged: bool = False


def spec(test: Callable[[AttentionSpec], bool]) -> Callable[[Case], bool]:
    return lambda case: test(case.spec)


def several_tiles(case: Case) -> bool:
    return case.spec.kv_len > 2 * tiled.tile(case.spec)[1]


def masked_rows(case: Case) -> bool:
    """Some row sees no key: the mask has an empty row, as those of the cases do without a block map."""
    s = case.spec
    return bool(s.mask) and s.q_len > 1 and not s.block_map and not s.sinks and case.mask_axes in ("2", "qk", "bhqk")


FAULTS = (
    Fault(
        "a tile is dropped",
        lambda c: several_tiles(c) and c.spec.uses() <= {"sinks", "softcap", "causal"},
        {"if low >= high or (": "if low >= high or column == 1 or ("},
    ),
    Fault(
        "the output is not rescaled",
        lambda c: several_tiles(c) and c.spec.uses() <= {"softcap", "causal"},
        {"out[..., low:high, :] * rescale.unsqueeze(-1) + weights": "out[..., low:high, :] + weights"},
    ),
    Fault(
        "the denominator is not rescaled",
        lambda c: several_tiles(c) and c.spec.uses() <= {"softcap", "causal"},
        {"total[..., low:high] * rescale + weights.sum(-1)": "total[..., low:high] + weights.sum(-1)"},
    ),
    Fault(
        "query heads read KV head h % Hkv",
        spec(lambda s: s.groups > 1 and s.kv_heads > 1 and s.kv_len > 1),
        {
            "k.unsqueeze(2).mT": "k[:, torch.arange(spec.q_heads) % k.shape[1]].unflatten(1, q.shape[1:3]).mT",
            "weights @ v.unsqueeze(2)":
            "weights @ v[:, torch.arange(self.top[0, ..., 0].numel()) % v.shape[1]].unflatten(1, self.top.shape[1:3])",
        },
    ),
    Fault(
        "one slot beyond the last key is read",
        lambda c: c.spec.uses() <= {"causal", "sinks"} and not c.plain and c.spec.kv_len > 0 and c.spec.q_len == 1,
        {"end = min(segment.stop, ": "end = min(segment.stop + 1, "},
    ),
    Fault(
        "the window is one too wide",
        spec(lambda s: s.window is not None and s.q_len > 1 and not s.mask and not s.starts),
        {
            "window=spec.window,\n": "window=spec.window and spec.window + 1,\n",
            "q_last - position < spec.window)": "q_last - position < spec.window + 1)",
            "count - 1 + spec.window": "count + spec.window",
        },
    ),
    Fault(
        "a query sees the key after its own",
        spec(lambda s: s.causal and s.q_len > 2 and s.uses() <= {"causal", "sinks"} and s.kv_len > s.q_len),
        {"torch.arange(q_first + low, q_first + high,": "torch.arange(q_first + low + 1, q_first + high + 1,"},
    ),
    Fault(
        "causal is aligned to the top left",
        spec(lambda s: s.uses() == {"causal"} and 1 < s.q_len < s.kv_len),
        {"low = max(0, position - q_first)": "low = max(0, position)",
         "torch.arange(q_first + low, q_first + high,": "torch.arange(low, high,",
         "_all_seen(spec, position, count, q_first + low, q_first + high - 1)": "False"},
    ),
    Fault(
        "values are decoded with another version's table",
        spec(lambda s: s.v_format.name in ("turbo2", "turbo3", "turbo4") and s.kv_len > 0 and s.head_dim_v % 128 == 0),
        {"segment.v_format, view.v_codec.head_dim": "_other_version(segment.v_format), view.v_codec.head_dim"},
    ),
    Fault(
        "keys come out one per cent too long",
        spec(lambda s: s.kv_len > 7 and s.dtype == torch.float32 and s.scale > 0 and not s.softcap),
        {"view.k_codec.head_dim)": "view.k_codec.head_dim) * 1.01"},
    ),
    Fault(
        "the default scale counts padding",
        spec(lambda s: s.kv_len > 7 and s.k_format.layout(s.head_dim)[0] != s.head_dim),
        {"* spec.scale": "/ math.sqrt(k.shape[-1])"},
    ),
    Fault(
        "the softcap comes after the mask",
        spec(lambda s: s.softcap > 0 and s.mask is not None),
        {_SOFTCAP: "", _PARTLY: indent(_SOFTCAP, "    ") + _PARTLY},
    ),
    Fault(
        "sinks are dropped",
        spec(lambda s: s.sinks),
        {"if sinks is not None:": "if False:"},
    ),
    Fault(
        "sinks have a value",
        spec(lambda s: s.sinks and s.kv_len > 0),
        {"q.new_zeros(": "q.new_ones("},
    ),
    Fault(
        "the log-sum-exp is binary",
        spec(lambda s: s.kv_len > 7),
        {"self.top + self.total.log()": "self.top + self.total.log2()"},
    ),
    Fault(
        "a ring is read in the order of its slots",
        lambda c: c.sliding > 0 and c.spec.ring,
        {"in segment.runs(position, end):": "in [(position - segment.first, end - position)]:"},
    ),
    Fault(
        "left padding is attended",
        spec(lambda s: s.starts and s.window is None and s.kv_len > 7),
        {"starts=view.starts,": "starts=None,"},
    ),
    Fault(
        "the mask ends after the first tile",
        lambda c: several_tiles(c) and c.spec.mask is not None,
        {"if mask is not None and not": "if mask is not None and column == 0 and not"},
    ),
    Fault(
        "a head takes its neighbour's ALiBi slope",
        spec(lambda s: s.alibi > 0 and s.kv_len > 7),
        {"alibi_slopes(spec.q_heads, spec.alibi)": "alibi_slopes(spec.q_heads, spec.alibi).roll(1)"},
    ),
    Fault(
        "the most recent segment is read twice",
        lambda c: c.recent > 0 and not c.spec.mask,
        {_TILED: _TILED.replace("view.segments", "(*view.segments, view.segments[-1])")},
    ),
    Fault(
        "the first dense segment is skipped",
        lambda c: c.first > 0 and not c.spec.starts and not c.spec.window,
        {_TILED: _TILED.replace("view.segments", "view.segments[1:]")},
    ),
    Fault(
        "the block map is read one tile late",
        lambda c: several_tiles(c) and c.spec.block_map,
        {"states = None if block_map is None else block_map.states[..., column]":
         "states = None if block_map is None else block_map.states[..., max(0, column - 1)]"},
    ),
    Fault(
        "probabilities and values are rounded to half",
        spec(lambda s: s.kv_len > 31 and s.dtype == torch.float32),
        {"weights @ v.unsqueeze(2)": "(weights.half() @ v.unsqueeze(2).half()).float()"},
    ),
    Fault(
        "q is rounded to bfloat16",
        spec(lambda s: s.kv_len > 31 and s.dtype == torch.float32 and s.scale > 0),
        {"q = q.to(torch.float32)": "q = q.to(torch.bfloat16).to(torch.float32)"},
    ),
    Fault(
        "an empty row divides by zero",
        masked_rows,
        {"self.total.masked_fill(self.total == 0, 1.0)": "self.total"},
    ),
    Fault(
        "an empty row subtracts infinity from itself",
        masked_rows,
        {"finite = new.masked_fill(new == -math.inf, 0.0)": "finite = new"},
    ),
    Fault(
        "the lowest half is a number, not a mask",
        lambda c: masked_rows(c) and c.masked == -65504.0,
        {"scores = apply_mask(scores, part, slopes)": "scores = scores + part.to(scores)"},
    ),
    Fault(
        "a slot beyond a sequence's end is read",
        spec(lambda s: s.lengths and s.uses() <= {"lengths", "paged", "sinks"} and s.kv_len > 7 and s.batch > 1),
        {"[:, None] - 1\n": "[:, None]\n"}, True,
    ),
    Fault(
        "all sequences are as long as the first",
        spec(lambda s: s.lengths and s.batch > 1 and s.kv_len > 7 and not s.mask and not s.window),
        {"view.lengths.expand(batch)": "view.lengths[:1].expand(batch)"}, True,
    ),
    Fault(
        "pages are read in order",
        spec(lambda s: s.paged and s.kv_len > 31 and not s.mask),
        {"segment.pages[:, slots // segment.page_slots]":
         "(slots // segment.page_slots).expand(len(segment.pages), -1)"}, True,
    ),
    Fault(
        "recent tokens are read twice",
        lambda c: c.recent > 0 and c.spec.lengths and not c.spec.mask and not c.spec.starts,
        {"(lengths - segment.trail)": "(lengths)"}, True,
    ),
    Fault(
        "dead values are multiplied by zero",
        spec(lambda s: s.lengths and s.kv_len > 7 and s.batch > 1 and not (s.mask or s.ring)),
        {"v = torch.where(live[:, None, :, None], v, 0.0)": "v = v"}, True,
    ),
    Fault(
        "columns of a mask are slots",
        lambda c: c.spec.lengths and c.sliding > 0 and c.spec.mask is not None,
        {"(positions - view.first).clamp(min=0)": "slots.expand_as(positions)"}, True,
    ),
)  # fmt: skip


def planted(fault: Fault) -> types.ModuleType:
    """The torch backend with ``fault`` in it."""
    source = inspect.getsource(tiled)
    for old, new in fault.edits.items():
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in the backend; adapt the fault"
        source = source.replace(old, new)
    module = types.ModuleType(f"{tiled.__name__}_planted")
    module.__package__ = tiled.__package__
    module._other_version = lambda fmt: FORMATS[f"{fmt.name}.v2"]
    exec(compile(source, f"<{fault.name}>", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name.replace(" ", "_"))
def test_planted_fault_is_noticed(fault, monkeypatch, problem):
    """If a planted fault passes, so would the same mistake in a new kernel."""
    possible = [c for c in cases() if fault.ragged == (c.spec.paged or c.spec.lengths) and not tiled.why_not(c.spec)]
    relevant = [c for c in possible if fault.relevant(c)]
    assert relevant, "no case of the suite needs this"
    chosen = relevant[:: -(-len(relevant) // _MOST)]
    monkeypatch.setitem(BACKENDS, tiled.name, planted(fault))
    for case in chosen:
        data = problem(case)
        out, lse = data.run(tiled.name)
        with pytest.raises(AssertionError):
            assert_matches(data, out, lse)


def test_no_fault_is_noticed_in_the_real_backend(monkeypatch, problem):
    """Planting must not break anything by itself, or the tests above show nothing."""
    unchanged = planted(Fault("nothing", lambda c: True, {"import math\n": "import math\n"}))
    monkeypatch.setitem(BACKENDS, tiled.name, unchanged)
    for case in [c for c in cases() if not unchanged.why_not(c.spec)][::100]:
        data = problem(case)
        assert_matches(data, *data.run(tiled.name))
