"""Evaluation through the cache: windows, scores, and the ways in which a measurement can mean nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import gyrokv.hf
from gyrokv import FORMATS, CacheConfig, env, evaluate, scoring
from gyrokv.errors import EvaluationError

LAYERS, KV_HEADS, HEAD_DIM, VOCABULARY, WINDOW = 2, 2, 64, 97, 32


pytestmark = pytest.mark.filterwarnings("ignore:a forward pass does not use the packed cache")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=KV_HEADS, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, VOCABULARY, (5 * WINDOW + 3,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def compared(model, ids):
    configs = ("f32/f32", "f16/f16", "q8_0/turbo4", "turbo2/turbo2", "turbo3/turbo3,recent=8")
    return evaluate.compare(model, ids, configs, length=WINDOW, count=3, decode=4)


def plain_nll(model, window):
    """NLL of the second half of a window with no cache at all."""
    with torch.no_grad():
        logits = model(input_ids=window[None], use_cache=False).logits[0].double()
    first = window.numel() // 2
    return torch.nn.functional.cross_entropy(logits[first:-1], window[first + 1 :], reduction="none")


def test_windows_are_disjoint_and_in_order(ids):
    parts = scoring.windows(ids, WINDOW)
    assert parts.shape == (5, WINDOW)
    assert torch.equal(parts.flatten(), ids[: 5 * WINDOW])
    assert torch.equal(scoring.windows(ids, WINDOW, 2), parts[:2])


def test_bos_replaces_the_first_token_of_each_window_only(ids):
    parts = scoring.windows(ids, WINDOW, bos=7)
    assert (parts[:, 0] == 7).all() and torch.equal(parts[:, 1:], scoring.windows(ids, WINDOW)[:, 1:])


@pytest.mark.parametrize(
    ("length", "count", "message"),
    [
        (4, None, "the least is 8"),
        (WINDOW, 6, "5 windows of 32; 6 are needed"),
        (WINDOW, 0, "least is 1"),
        (999, None, "1 are"),
    ],
)
def test_windows_that_cannot_be_made(ids, length, count, message):
    with pytest.raises(EvaluationError, match=message):
        scoring.windows(ids, length, count)


def test_an_f32_cache_gives_the_plain_model_s_nll(model, ids):
    last = list(evaluate.perplexity(model, ids, "f32/f32", length=WINDOW, count=3))[-1]
    nll = torch.cat([plain_nll(model, part) for part in scoring.windows(ids, WINDOW, 3)])
    assert last.windows == 3 and last.scored_tokens == nll.numel() == 3 * (WINDOW - 1 - WINDOW // 2)
    assert math.log(last.ppl) == pytest.approx(nll.mean().item(), abs=1e-5)
    assert last.ppl_se == pytest.approx(last.ppl * nll.std().item() / math.sqrt(nll.numel()), rel=1e-4)


@pytest.mark.parametrize("batch", [1, 5, 16, 31])
def test_feeding_in_chunks_changes_nothing(model, ids, batch):
    with torch.no_grad(), gyrokv.hf.attach(model, "f32"):
        whole = evaluate.feed(model, gyrokv.hf.cache(model, "f32"), ids[:WINDOW], 16)
        chunks = evaluate.feed(model, gyrokv.hf.cache(model, "f32"), ids[:WINDOW], 16, batch)
    assert whole.shape == (16, VOCABULARY)
    torch.testing.assert_close(chunks, whole, atol=1e-4, rtol=1e-4)


def test_keys_are_quantised_from_the_first_token_on(model, ids):
    # a window fed at once must read what a window fed token by token reads; a few codes differ, because float32
    # products of other shapes round differently
    with torch.no_grad(), gyrokv.hf.attach(model, "turbo2"):
        whole = evaluate.feed(model, gyrokv.hf.cache(model, "turbo2"), ids[:WINDOW])
        steps = evaluate.feed(model, gyrokv.hf.cache(model, "turbo2"), ids[:WINDOW], batch=1)
    with torch.no_grad():
        plain = model(input_ids=ids[None, :WINDOW], use_cache=False).logits[0]
    moved = (whole - plain).abs()
    assert moved[0].max() > 1e-2  # the first token attends to itself alone, and already that is quantised
    assert (steps - whole).abs().mean() < 0.1 * moved.mean()


def test_bytes_are_those_of_the_formats(compared):
    for row in compared.rows:
        if "recent" in row.config:
            continue
        per_head = FORMATS[row.k].bytes_per_head(HEAD_DIM) + FORMATS[row.v].bytes_per_head(HEAD_DIM)
        assert row.estimate.bytes_per_token == LAYERS * KV_HEADS * per_head
        assert row.estimate.bits_per_value == pytest.approx(8 * per_head / (2 * HEAD_DIM))
        assert row.ratio == pytest.approx(compared.rows[0].estimate.bytes_per_token / row.estimate.bytes_per_token)
        assert row.estimate.dense_bytes_per_token == LAYERS * KV_HEADS * HEAD_DIM * 2 * 2


def test_dense_copies_of_recent_tokens_are_counted(compared):
    row = compared.rows[-1]
    packed = LAYERS * KV_HEADS * 2 * FORMATS["turbo3"].bytes_per_head(HEAD_DIM)
    dense = LAYERS * KV_HEADS * 2 * HEAD_DIM * 4 * 8 / WINDOW
    assert row.estimate.bytes_per_token == packed + dense
    assert row.label == "turbo3/turbo3,recent=8"


def test_divergence_is_zero_for_itself_and_positive_otherwise(compared):
    base, f32, same, mixed, coarse, _ = compared.rows
    assert base.label == same.label == "f16/f16"
    for row in (base, same):
        assert (row.kl_mean, row.kl_p99, row.top1, row.delta_nll, row.delta_nll_se) == (0.0, 0.0, 1.0, 0.0, 0.0)
    assert 0 < f32.kl_mean < mixed.kl_mean < coarse.kl_mean <= coarse.kl_p99
    assert coarse.top1 < 1.0
    assert coarse.delta_ppl_percent == pytest.approx(100 * (coarse.estimate.ppl / base.estimate.ppl - 1))


def test_divergence_against_its_definition():
    a, b = torch.randn(2, 130, 11, generator=torch.Generator().manual_seed(0))
    kl, same = scoring.divergence(a, b)
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    torch.testing.assert_close(kl, torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1))
    assert torch.equal(same, a.argmax(-1) == b.argmax(-1)) and (kl >= 0).all()


def test_the_paired_error_is_that_of_the_differences(model, ids):
    result = evaluate.compare(model, ids, ["turbo2"], length=WINDOW, count=3, decode=0)
    nll = []
    with torch.no_grad(), gyrokv.hf.attach(model, "f16"):
        for config in ("f16", "turbo2"):
            parts = scoring.windows(ids, WINDOW, 3)
            logits = [evaluate.feed(model, gyrokv.hf.cache(model, config), part, WINDOW // 2)[:-1] for part in parts]
            nll.append(torch.cat([scoring.score(x, part[WINDOW // 2 + 1 :]) for x, part in zip(logits, parts)]))
    delta = nll[1] - nll[0]
    assert result.rows[1].delta_nll == pytest.approx(delta.mean().item(), abs=1e-7)
    assert result.rows[1].delta_nll_se == pytest.approx(delta.std().item() / math.sqrt(delta.numel()), rel=1e-4)
    assert result.rows[1].decode_tokens_per_s is None


def test_a_report_is_json_with_its_environment(compared):
    record = evaluate.report([compared], [{"path": "text.txt"}], "gyrokv compare")
    again = json.loads(json.dumps(record, allow_nan=False))
    assert again == json.loads(json.dumps(again)) and again["command"] == "gyrokv compare"
    assert datetime.fromisoformat(again["when"]).tzinfo is not None
    assert again["environment"]["packages"]["torch"] and again["environment"]["gyrokv"]
    entry = again["models"][0]
    assert entry["text"] == {"path": "text.txt"} and entry["model"]["class"] == "Qwen2ForCausalLM"
    assert entry["settings"]["windows"] == 3 and len(entry["tokens"]["sha256"]) == 64
    assert [row["label"] for row in entry["rows"]][:3] == ["f16/f16", "f32/f32", "f16/f16"]
    assert all(row["decode_tokens_per_s"] > 0 for row in entry["rows"])


@pytest.mark.parametrize("decode", [0, 2])
def test_progress_counts_every_pass_of_every_config(model, ids, decode):
    seen = []
    evaluate.compare(model, ids, ["q8_0"], length=WINDOW, count=2, decode=decode, progress=lambda *step: seen.append(step))
    passes = 6 if decode else 4
    assert seen == [(i + 1, passes, ("f16/f16", "q8_0/q8_0")[i % 2]) for i in range(passes)]


def test_a_run_that_quantised_nothing_stops(model, ids):
    # dense copies of all tokens: packed rows exist, but nothing reads them
    with pytest.raises(EvaluationError, match="nothing was quantised"):
        config = f"q8_0/q8_0,recent={WINDOW}"
        evaluate.compare(model, ids, [config], baseline="f32", length=WINDOW, count=1, decode=0)


def test_fallbacks_stop_a_run_unless_allowed(model, ids, monkeypatch):
    original = evaluate.usage
    monkeypatch.setattr(evaluate, "usage", lambda cache: replace(original(cache), fallbacks=3))
    with pytest.raises(EvaluationError, match="asked 3 times for dense"):
        list(evaluate.perplexity(model, ids, "q8_0", length=WINDOW, count=1))
    *_, last = evaluate.perplexity(model, ids, "q8_0", length=WINDOW, count=2, allow_fallbacks=True)
    assert last.fallbacks == 6


def test_a_model_that_ignores_the_cache_stops(model, ids, monkeypatch):
    original = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, **_: original(input_ids=input_ids, use_cache=False))
    with pytest.raises(EvaluationError, match="the model did not use it"):
        list(evaluate.perplexity(model, ids, "q8_0", length=WINDOW, count=1))


def test_nan_stops_a_run(model, ids, monkeypatch):
    original = model.forward

    def broken(*arguments, **options):
        out = original(*arguments, **options)
        return SimpleNamespace(logits=out.logits * math.nan)

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(EvaluationError, match="NaN or inf in window 1"):
        list(evaluate.perplexity(model, ids, "q8_0", length=WINDOW, count=1))


def test_decode_must_fit_the_window(model, ids):
    with pytest.raises(EvaluationError, match="decode=32"):
        evaluate.compare(model, ids, ["q8_0"], length=WINDOW, decode=WINDOW)


def test_the_baseline_follows_the_model_s_dtype(model):
    assert evaluate.default_baseline(model) == "f16"
    assert evaluate.default_baseline(SimpleNamespace(dtype=torch.bfloat16)) == "bf16"


@pytest.mark.parametrize("text", ["q8_0/turbo4", "turbo3/f16,sinks=4; first2: q8_0/q8_0; last1: v=f16"])
def test_labels_parse_to_the_config_they_name(text):
    assert evaluate.label(CacheConfig.parse(text)) == text


def test_every_default_pair_is_a_config():
    assert len({CacheConfig.parse(pair) for pair in evaluate.DEFAULT_PAIRS}) == len(evaluate.DEFAULT_PAIRS)


def test_the_self_test_passes_and_notices_a_wrong_backend(monkeypatch):
    checks = env.self_test()
    assert {c.case.split(".")[0] for c in checks} >= {"q8_0", "turbo3"} and all(c.passed for c in checks)
    torch_backend = env.BACKENDS["torch"]
    original = torch_backend.attend
    monkeypatch.setattr(torch_backend, "attend", lambda *a: (original(*a)[0] * 1.1, original(*a)[1]))
    assert not any(c.passed for c in env.self_test() if c.backend == "torch")


def test_the_environment_is_json():
    facts = json.loads(json.dumps(env.environment()))
    assert facts["devices"]["cpu"] and facts["threads"] >= 1 and "torch" in facts["packages"]
    assert set(env.backends()) == set(env.BACKENDS)
