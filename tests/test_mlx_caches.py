"""``gyrokv.mlx``'s caches as mlx-lm's own functions use them: batches, files, copies, trims, rotating caches."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

mx = pytest.importorskip("mlx.core", reason="no MLX: pip install 'mlx[cpu]'", exc_type=ImportError)
pytest.importorskip("mlx_lm.models.base", reason="no mlx-lm: pip install mlx-lm", exc_type=ImportError)

import mlx_lm.models.cache as theirs  # noqa: E402
from metal_host.host import compiler  # noqa: E402
from metal_host.mlx_entry import executed  # noqa: E402
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step  # noqa: E402
from mlx_models import llama_model, oss_model, packed, same  # noqa: E402

import gyrokv.mlx  # noqa: E402
from gyrokv import Unsupported  # noqa: E402

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++ to compile the executor of Metal source with")
BATCHED = "k=q8_0,v=turbo4"


def heads(tokens: int, random: torch.Generator) -> list[mx.array]:
    """q of 4 heads, k and v of 2, of one sequence."""
    return [mx.array(torch.randn(1, n, tokens, 32, generator=random).numpy()) for n in (4, 2, 2)]


def feed(cache, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    handles = cache.update_and_fetch(k, v)
    return gyrokv.mlx.attend(q, *handles, scale=0.2, mask=cache.make_mask(q.shape[2]) or "causal")


def rows(cache) -> list[mx.array]:
    """Words and scales held, oldest first."""
    return [t for p in cache._main.span(cache._first, cache._length) for t in p]


def assert_close(a: mx.array, b: mx.array) -> None:
    torch.testing.assert_close(same(a), same(b), rtol=1e-5, atol=2e-5)


# -- batches


class Sequences:
    """A batch, and a cache of its own for each sequence: both are given the same tokens, and must answer alike."""

    def __init__(self, window: int | None, seed: int) -> None:
        self.window, self.random = window, torch.Generator().manual_seed(seed)
        self.alone = [packed(BATCHED, window) for _ in range(3)]
        self.batch = self.alone[0].merge([copy.deepcopy(c) for c in self.alone])

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self.random))

    def prompt(self) -> None:
        """Tokens of different counts, padded on the right with large values, in chunks."""
        counts = [self.number(1, 50) for _ in self.alone]
        most = max(counts)
        new = [heads(n, self.random) for n in counts]
        want = [feed(c, *x) for c, x in zip(self.alone, new)]
        padded = [
            mx.concatenate([mx.pad(x[i], [(0, 0), (0, 0), (0, most - n), (0, 0)], constant_values=99.0)
                            for x, n in zip(new, counts)])
            for i in range(3)
        ]  # fmt: skip
        self.batch.prepare(lengths=counts, right_padding=[most - n for n in counts])
        got = mx.concatenate([feed(self.batch, *(x[:, :, a : a + 16] for x in padded)) for a in range(0, most, 16)], axis=2)
        self.batch.finalize()
        for i, n in enumerate(counts):
            assert_close(got[i : i + 1, :, :n], want[i])

    def step(self) -> None:
        new = [heads(1, self.random) for _ in self.alone]
        got = feed(self.batch, *(mx.concatenate(xs) for xs in zip(*new)))
        assert_close(got, mx.concatenate([feed(c, *x) for c, x in zip(self.alone, new)]))

    def leave(self) -> None:
        if len(self.alone) > 1:
            kept = sorted(torch.randperm(len(self.alone), generator=self.random)[: self.number(1, len(self.alone))].tolist())
            self.alone = [self.alone[i] for i in kept]
            self.batch.filter(kept)

    def join(self) -> None:
        for c in (new := [packed(BATCHED, self.window) for _ in range(self.number(1, 2))]):
            if n := self.number(0, 40):
                feed(c, *heads(n, self.random))
        self.alone += new
        self.batch.extend(new[0].merge([copy.deepcopy(c) for c in new]))

    def trim(self) -> None:
        if self.batch.is_trimmable() and all(c.is_trimmable() and c.offset > 2 for c in self.alone):
            for c in (*self.alone, self.batch):
                assert c.trim(2) == 2

    def check(self) -> None:
        assert self.batch.offset.tolist() == [c.offset for c in self.alone]
        assert self.batch.size() <= self.batch._main.capacity
        for i, c in enumerate(self.alone):
            found = self.batch.extract(i)
            assert type(found) is type(c) and found.offset == c.offset and found.size() <= c.offset
            if c.empty():
                assert found.empty()
                continue
            n = min(c.size(), found.size(), c.size() if self.window is None else self.window - 1)
            for a, b in zip(rows(found), rows(c)):
                assert bool(mx.array_equal(a[:, :, a.shape[2] - n :], b[:, :, b.shape[2] - n :]))


@pytest.mark.parametrize("window", [None, 20], ids=["full", "sliding"])
@pytest.mark.parametrize("seed", range(3))
def test_sequences_of_a_batch_do_not_notice(seed, window):
    """Prompts of different lengths, steps, sequences that join and leave, trims: outputs and bytes of each alone."""
    with executed("random"):
        both = Sequences(window, seed)
        for name in [
            "prompt",
            "prompt",
            "step",
            "prompt",
            "join",
            "step",
            "leave",
            "prompt",
            "trim",
            "step",
            "join",
            "prompt",
            "leave",
            "step",
        ]:
            getattr(both, name)()
            both.check()


def test_a_sequence_that_leaves_amid_padded_prompts():
    """The padding on the right goes with the sequences that stay."""
    random = torch.Generator().manual_seed(0)
    new = [heads(n, random) for n in (9, 2, 5)]
    with executed():
        alone = packed(BATCHED)
        feed(alone, *new[2])
        batch = alone.merge([packed(BATCHED)] * 3)
        batch.prepare(lengths=[9, 2, 5], right_padding=[0, 7, 4])
        wide = [[mx.pad(x, [(0, 0), (0, 0), (0, 9 - x.shape[2]), (0, 0)]) for x in xs] for xs in new]
        feed(batch, *(mx.concatenate(xs) for xs in zip(*wide)))
        batch.filter([2])
        batch.finalize()
        assert batch.offset.tolist() == [5]
        assert all(bool(mx.array_equal(a, b)) for a, b in zip(rows(batch), rows(alone)))


@pytest.mark.parametrize("make", [llama_model, oss_model])
def test_batched_generation(make):
    """mlx-lm's BatchGenerator, prompts that join later and end earlier: the tokens of its own caches, and caches back."""
    mx.random.seed(0)
    model = make()
    prompts = [mx.random.randint(0, 61, (n,)).tolist() for n in (5, 37, 70)]

    def generated(caches) -> tuple[dict, dict]:
        maker = BatchGenerator(model, stop_tokens=[], prefill_step_size=16, completion_batch_size=4, prefill_batch_size=2)
        found = {uid: [] for uid in maker.insert(prompts, [4, 9, 6], caches=caches)}
        ended = {}
        while said := maker.next_generated():
            for one in said:
                found[one.uid].append((one.token, one.logprobs))
                ended |= {one.uid: one.prompt_cache} if one.finish_reason else {}
        maker.close()
        return found, ended

    want, _ = generated(None)
    with executed() as runs:
        got, ended = generated([gyrokv.mlx.cache(model, "f32") for _ in prompts])
    assert len(runs.log) > 20
    for uid, n in zip(want, (5, 37, 70)):
        assert [token for token, _ in got[uid]] == [token for token, _ in want[uid]]
        torch.testing.assert_close(*(same(mx.stack([p for _, p in x[uid]])) for x in (got, want)), rtol=1e-4, atol=1e-4)
        assert [c.offset for c in ended[uid]] == [n + len(want[uid])] * 2


def test_what_a_batch_cannot_keep_is_refused():
    """Dense tokens at the sequences' own ends and first tokens of their own, by name; caches that are not alike."""
    for cache, said in (
        (packed("q8_0,sinks=4"), "sinks=4, recent=0, keep=0"),
        (packed("q8_0,recent=8"), "sinks=0, recent=8, keep=0"),
        (packed("q8_0", 28, 4), "sinks=0, recent=0, keep=4"),
    ):
        with pytest.raises(Unsupported, match=f"a batch cannot keep first or recent tokens .* {said}; all must be 0"):
            cache.merge([cache, cache])
    with pytest.raises(ValueError, match="alike, but one has k=q8_0,v=q8_0, window=None, another one k=q4_0"):
        packed("q8_0").merge([packed("q8_0"), packed("q4_0")])
    batch = packed("q8_0").merge([packed("q8_0")])
    with executed():
        feed(batch, *heads(3, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="left_padding can be added to an empty cache only"):
        batch.prepare(left_padding=[2])


def test_padding_on_the_left_is_not_seen():
    """mlx-lm's older way: prompts padded on the left, announced before."""
    random = torch.Generator().manual_seed(0)
    short, long = heads(5, random), heads(9, random)
    with executed():
        alone = [feed(packed(BATCHED), *x) for x in (short, long)]
        batch = packed(BATCHED).merge([packed(BATCHED)] * 2)
        batch.prepare(left_padding=[4, 0])
        assert batch.offset.tolist() == [-4, 0]
        wide = (mx.pad(x, [(0, 0), (0, 0), (4, 0), (0, 0)], constant_values=99.0) for x in short)
        padded = [mx.concatenate(pair) for pair in zip(wide, long)]
        seen = batch.make_mask(9, return_array=True)
        got = feed(batch, *padded)
    assert seen.shape == (2, 1, 9, 9) and seen.sum(axis=(1, 2, 3)).tolist() == [15, 45]
    assert_close(got[:1, :, 4:], alone[0])
    assert_close(got[1:], alone[1])


# -- files and copies


CONFIGS = [
    ("k=q8_0,v=turbo4", None, 0),
    ("k=turbo3,v=bf16,sinks=3,recent=17", None, 0),
    ("f16/fp8_e4m3", 20, 0),
    ("q8_0", 28, 4),
]


def with_tokens(config: str, window: int | None, keep: int, random: torch.Generator):
    cache = packed(config, window, keep)
    for tokens in (9, 1, 80):
        feed(cache, *heads(tokens, random))
    return cache


@pytest.mark.parametrize("config, window, keep", CONFIGS)
@pytest.mark.parametrize("save", [gyrokv.mlx.save_prompt_cache, theirs.save_prompt_cache], ids=["ours", "theirs"])
def test_saved_caches_come_back(config, window, keep, save, tmp_path):
    """All arrays and numbers, empty caches among them, and the same bits from then on."""
    random = torch.Generator().manual_seed(0)
    with executed():
        cache, path = with_tokens(config, window, keep, random), str(tmp_path / "cache.safetensors")
        if cache.is_trimmable():
            cache.trim(20)  # more than the recent tokens that are held dense
        save(path, [cache, packed(config, window, keep), theirs.KVCache()], {"model": "none"})
        (loaded, empty, other), metadata = gyrokv.mlx.load_prompt_cache(path, return_metadata=True)
        assert metadata == {"model": "none"} and type(other) is theirs.KVCache and empty.empty()
        assert type(loaded) is type(cache) and (loaded.offset, loaded.nbytes) == (cache.offset, cache.nbytes)
        for tokens in (1, 40):
            new = heads(tokens, random)
            assert bool(mx.array_equal(feed(loaded, *new), feed(cache, *new)))
        feed(empty, *heads(2, random))


@pytest.mark.parametrize("window", [None, 20])
def test_saved_batches_come_back(window, tmp_path):
    random = torch.Generator().manual_seed(0)
    with executed():
        batch = packed(BATCHED, window).merge([with_tokens(BATCHED, window, 0, random), packed(BATCHED, window)])
        path = str(tmp_path / "cache.safetensors")
        gyrokv.mlx.save_prompt_cache(path, [batch])
        (loaded,) = gyrokv.mlx.load_prompt_cache(path)
        assert loaded.offset.tolist() == batch.offset.tolist() == [90, 0]
        new = [mx.concatenate([x, x]) for x in heads(1, random)]
        assert bool(mx.array_equal(feed(loaded, *new), feed(batch, *new)))


@pytest.mark.parametrize("config, window, keep", CONFIGS)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_are_independent(config, window, keep, copied):
    """What is written to one does not reach the other, and codecs are shared: their tables are on the device once."""
    random = torch.Generator().manual_seed(0)
    with executed():
        cache = with_tokens(config, window, keep, random)
        other, third = copied(cache), copied(cache)
        assert other._codecs is cache._codecs
        a, b, c = (heads(2, random) for _ in range(3))
        feed(third, *a)
        want = feed(third, *c)
        feed(other, *a)
        feed(cache, *b)
        assert bool(mx.array_equal(feed(other, *c), want)) and other.offset == cache.offset + 2


def test_generation_with_and_without_a_draft():
    """mlx-lm's generators, prompts in chunks: the probabilities of its own caches, after rejected drafts too."""
    mx.random.seed(0)
    model, draft, prompt = llama_model(), llama_model(), mx.random.randint(0, 61, (40,))
    options = dict(max_tokens=6, prefill_step_size=16)

    def generated(make) -> list[mx.array]:
        plain = generate_step(prompt, model, prompt_cache=make(model), **options)
        drafted = speculative_generate_step(prompt, model, draft, prompt_cache=make(model) + make(draft), **options)
        return [logprobs for _, logprobs, *_ in (*plain, *drafted)]

    want = generated(theirs.make_prompt_cache)
    with executed():
        got = generated(lambda m: gyrokv.mlx.cache(m, "f32"))
    torch.testing.assert_close(same(mx.stack(got)), same(mx.stack(want)), rtol=1e-4, atol=1e-4)


def test_the_least_recently_used_prompts():
    """mlx-lm's server keeps prompts by their tokens: one that begins alike is copied and trimmed."""
    mx.random.seed(0)
    model, tokens = llama_model(), mx.random.randint(0, 61, (30,))
    with executed():
        kept, cache = theirs.LRUPromptCache(), gyrokv.mlx.cache(model)
        model(tokens[None], cache=cache)
        kept.insert_cache("model", tokens.tolist(), cache)
        found, rest = kept.fetch_nearest_cache("model", [*tokens.tolist()[:20], 60])
        assert rest == [60] and found[0].offset == 20 and cache[0].offset == 30
        fresh = gyrokv.mlx.cache(model)
        want = model(mx.array([[*tokens.tolist()[:20], 60]]), cache=fresh)[:, -1:]
        torch.testing.assert_close(same(model(mx.array([rest]), cache=found)), same(want), rtol=1e-4, atol=1e-4)


# -- rotating caches that keep their first tokens


def test_rotating_caches_that_keep_first_tokens():
    """``max_kv_size``: token by token through the ring's end, the outputs of mlx-lm's cache."""
    random = torch.Generator().manual_seed(0)
    with executed():
        model = SimpleNamespace(layers=[None])  # one that leaves the choice of caches to mlx-lm
        (cache,), other = gyrokv.mlx.cache(model, "f32", max_kv_size=32), theirs.RotatingKVCache(32, keep=4)
        assert (cache.window, cache.keep) == (28, 4)
        for tokens in (20, *[1] * 90):
            q, k, v = heads(tokens, random)
            mask = other.make_mask(tokens)
            want = mx.fast.scaled_dot_product_attention(q, *other.update_and_fetch(k, v), scale=0.2, mask=mask)
            assert_close(feed(cache, q, k, v), want)
        assert not theirs.can_trim_prompt_cache([cache])


def test_first_tokens_are_seen_by_every_query():
    """In chunks longer than the ring too, with learned sinks, marked or by an array: a plain mask says what is seen."""
    random, learned = torch.Generator().manual_seed(0), mx.array([0.5, -1.0, 3.0, 0.0])
    with executed():
        cache, k_all, v_all = packed("f32", 28, 4), [], []
        for tokens in (2, 7, 100, 1, 30):
            q, k, v = heads(tokens, random)
            k_all, v_all = [*k_all, k], [*v_all, v]
            array = cache.make_mask(tokens, return_array=True)
            keys, values = cache.update_and_fetch(k, v)
            assert cache.keys_and_values() == (keys, values) and keys.shape[2] == array.shape[1]
            t = mx.arange(cache.offset)
            i = t[-tokens:, None]
            seen = (t <= i) & ((i - t < 28) | (t < 4))
            want = mx.fast.scaled_dot_product_attention(
                q, mx.concatenate(k_all, axis=2), mx.concatenate(v_all, axis=2), scale=0.2, mask=seen, sinks=learned
            )
            for mask in ("causal", array):
                assert_close(gyrokv.mlx.attend(q, keys, values, scale=0.2, mask=mask, sinks=learned), want)
