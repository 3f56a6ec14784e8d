"""Can the tests of prefill fail, where it reads, copies and joins? Known bugs are planted, as in ``test_gpu_faults.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import gpu_host
import gpu_record
import pytest

from gyrokv.backends import gpu
from gyrokv.backends.gpu import nvrtc, staging
from gyrokv.cases import Case, groups
from gyrokv.spec import AttentionSpec
from gyrokv.testing import assert_matches, inputs

_MOST = 4  # cases that are run for one fault
CASES = [c for c in groups()["many_queries"] if not c.spec.block_map]


class Fault(NamedTuple):
    """``old`` is there once in ``file``. ``relevant``: cases of which one must notice. ``joined``: in pieces of 128 keys."""

    name: str
    relevant: Callable[[AttentionSpec], bool]
    file: str
    old: str
    new: str
    joined: bool = False
    dim: int = 64


def apart(s: AttentionSpec) -> bool:
    """Nothing but the length says which keys are seen."""
    return s.lengths and not (s.causal or s.window or s.mask or s.starts)


def plain(s: AttentionSpec) -> bool:
    return s.kv_len == 150 and s.uses() <= {"causal", "sinks"} and not s.k_format.is_dense


def dense(s: AttentionSpec) -> bool:
    """Rows are read where they lie."""
    return s.k_format.is_dense and not s.ring


def joined(s: AttentionSpec) -> bool:
    """The second piece of the keys matters."""
    return s.kv_len == 150 and not (s.window or s.mask or s.lengths or s.k_format.is_dense)


FAULTS = (
    Fault("left padding is attended", lambda s: s.starts and not s.window, "prefill.cuh",
          "if (p.starts) start = max(start, (int)p.starts[batch]);", ""),
    Fault("keys after the end count", apart, "prefill.cuh",
          "own_end = min(p.kv_len, tokens - origin);", "own_end = p.kv_len;"),
    Fault("queries lie at the end of the longest sequence", lambda s: s.lengths and s.causal, "prefill.cuh",
          "own_first = p.relative ? p.first : p.first - missing;", "own_first = p.first;"),
    Fault("keys of a window end where those of the longest sequence do", lambda s: s.lengths and s.window and not s.mask,
          "prefill.cuh", "p.relative ? p.origin - missing : p.origin", "p.origin"),
    Fault("keys of a window are those of the longest sequence",
          lambda s: not dense(s) and s.lengths and s.window and not s.mask, "unpack.cu",
          "(p.relative ? p.length - tokens : 0)", "0"),
    Fault("all sequences have the length of the first", apart, "prefill.cuh",
          "p.lengths[batch * p.lengths_batch]", "p.lengths[0]"),
    Fault("a query sees the key after its own", lambda s: s.causal and not s.mask, "prefill.cuh",
          "min(end, position) : end", "min(end, position + 1) : end"),
    Fault("the window is one too wide", lambda s: s.window and not s.mask, "prefill.cuh",
          "low[r] = p.window ? position - p.window + 1 - key", "low[r] = p.window ? position - p.window - key"),
    Fault("values that are nowhere are not cleared", lambda s: dense(s) and s.lengths, "prefill.cuh",
          "if (row < begin || row >= end) store_zeros(values + 16 * i);", ""),
    Fault("values are cleared a row early", lambda s: dense(s) and s.lengths and not s.window, "prefill.cuh",
          "row >= end) store_zeros", "row >= end - 1) store_zeros", dim=512),
    Fault("a part of 32 values is taken for the one before", lambda s: dense(s) and s.lengths, "prefill.cu",
          "block * KEYS + slot * 64 + part * 32, 1 + which", "block * KEYS + slot * 64, 1 + which", dim=512),
    Fault("boxes are those of the first page", lambda s: dense(s) and s.paged and not s.mask, "prefill.cuh",
          "pages[min(slot / PAGED, (u32)p.last_page)]", "pages[0]"),
    Fault("all sequences are read from the pages of the first", lambda s: dense(s) and s.paged and not s.mask, "prefill.cuh",
          "p.pages + tile.batch * p.pages_batch;", "p.pages;"),
    Fault("boxes of keys lie on each other", lambda s: dense(s) and s.paged and not s.mask, "prefill_narrow.cu",
          "load_box(to + c * CHUNK_BYTES + before * 128, k_map", "load_box(to + c * CHUNK_BYTES, k_map"),
    Fault("boxes of values lie on each other", lambda s: dense(s) and s.paged and not s.mask, "prefill.cu",
          "load_box(to + c * 64 + before * 128, v_map", "load_box(to + c * 64, v_map", dim=512),
    Fault("what is nowhere is not cleared", lambda s: not dense(s) and (s.lengths or s.starts), "unpack.cu",
          "else if (p.fill) to[item] = make_uint4(0, 0, 0, 0);", ""),
    Fault("all sequences have the pages of the first", lambda s: not dense(s) and s.paged and not s.mask, "unpack.cu",
          "p.pages[batch * p.pages_batch + slot", "p.pages[slot"),
    Fault("pages have other slots", lambda s: not dense(s) and s.paged, "unpack.cu",
          "      slot %= (u32)p.page_slots;\n", "      slot = 0;\n"),
    Fault("a ring is one slot short", lambda s: not dense(s) and s.ring and s.lengths and s.window, "unpack.cu",
          "% (u32)p.capacity", "% (u32)(p.capacity - 1)"),
    Fault("dense recent rows stand for all", lambda s: not dense(s) and s.unquantised and s.ring and s.lengths, "unpack.cu",
          "max(p.first, tokens - p.keep)", "p.first"),
    Fault("values take the scale of the first group", plain, "unpack.cu",
          "f32_of_f16(((const u16*)scales)[first / SPAN])", "f32_of_f16(((const u16*)scales)[0])"),
    Fault("codes of a field are those of its first plane", plain, "unpack.cu",
          "word >> d / WORDS * WIDTH &", "word &"),
    Fault("the second eight values of a thread are the first", plain, "unpack.cu",
          "load(next, item + step);", "load(next, item);"),
    Fault("words are swapped", plain, "unpack.cu", ">> 16 * (i % 2)", ">> 16 * (1 - i % 2)"),
    Fault("results before are forgotten", joined, "prefill.cuh",
          "x += before * old.x, y += before * old.y;", "", joined=True),
    Fault("results before have no weight", joined, "prefill.cuh",
          "sink = joins ? old[r] : p.sinks", "sink = p.sinks", joined=True),
    Fault("the share of results before is not normalised", joined, "prefill.cuh",
          "before[r] = joins && all > 0.0f ? there * inverse", "before[r] = joins && all > 0.0f ? there", joined=True),
    Fault("sinks are counted in each piece", lambda s: s.sinks and joined(s), "prefill.cuh",
          "sink = joins ? old[r] :", "sink = joins && !p.sinks ? old[r] :", joined=True),
    Fault("rows take the share of the row eight before", joined, "prefill.cu",
          "warp * 2048 + 32 * r + lane", "warp * 2048 + lane", joined=True, dim=512),
    Fault("shares are not sent", joined, "prefill.cu",
          "    store_shared(to.weights() + lane, before[0]);\n", "", joined=True, dim=512),
    Fault("heads share the log-sum-exp of the first", lambda s: not dense(s) and plain(s), "prefill.cuh",
          " + rows.head[r] * p.lse_head + tile.token(rows.row[r]);", " + tile.token(rows.row[r]);"),
)  # fmt: skip


def chosen(fault: Fault) -> list[Case]:
    relevant = [c for c in CASES if fault.relevant(c.spec)]
    relevant = relevant[:: -(-len(relevant) // _MOST)] if relevant else []
    return [replace(c, spec=replace(c.spec, head_dim=fault.dim, head_dim_v=fault.dim, scale=None)) for c in relevant]


def noticed(case: Case, problem) -> bool:
    data = problem(case)
    try:
        assert_matches(data, *data.run("gpu"), gpu.BOUND)
    except AssertionError:
        return True
    return False


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_planted_fault_is_noticed(fault, problem, backend_here, monkeypatch):
    """If a planted fault passes, so would the same mistake in a new kernel."""
    backend_here("gpu")
    if fault.joined:
        monkeypatch.setattr(staging, "STAGED", 1)
    on_gpu = [case.on("cuda") for case in chosen(fault)]
    assert not any(noticed(case, problem) for case in on_gpu), "without the fault"
    with nvrtc.sources([(fault.file, fault.old, fault.new)]):
        assert any(noticed(case, problem) for case in on_gpu), f"none of {[str(case) for case in on_gpu]} notices"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_every_fault_is_one_of_the_sources(fault, monkeypatch):
    """A fault whose anchor is gone plants nothing; one that does not compile shows nothing."""
    selected = chosen(fault)
    assert 0 < len(selected) <= _MOST, "no case of the suite needs this"
    if fault.joined:
        monkeypatch.setattr(staging, "STAGED", 1)
    with nvrtc.sources([(fault.file, fault.old, fault.new)]):
        if nvrtc.compiler_version() is None:
            return
        *_, launches = gpu_host.run(inputs(selected[0]))
        kernels = {(name, tuple(defines.items())) for name, defines, _ in launches}
        wanted = {k for k in kernels if (k[0] == "unpack") == (fault.file == "unpack.cu")}
        assert wanted and (not fault.file.endswith(".cu") or {f"{name}.cu" for name, _ in wanted} == {fault.file})
        for name, defines in wanted:
            nvrtc.compile_source(f"{name}.cu", dict(defines), gpu_record.ARCH)
