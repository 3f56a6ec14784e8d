"""The string syntax: what it selects, how it prints, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrokv import CacheConfig, FormatError, LayerPolicy, LayerShape
from gyrokv.formats import FORMATS


def layers(text: str, count: int = 6, sliding: tuple[int, ...] = ()) -> list[str]:
    config = CacheConfig.parse(text)
    return [str(config.layer(i, count, sliding=i in sliding)) for i in range(count)]


def test_forms_of_one_layer():
    """The short forms are what they stand for."""
    assert (
        CacheConfig.parse("q8_0/turbo4")
        == CacheConfig.parse("k=q8_0,v=turbo4")
        == CacheConfig.parse(" k = q8_0 , v=turbo4 ")
    )
    assert CacheConfig.parse("turbo4") == CacheConfig.parse("k=turbo4,v=turbo4")
    full = LayerPolicy("turbo3", "turbo3", sinks=4, recent=64, k_rotation="hadamard", v_rotation="none")
    assert CacheConfig.parse("turbo3,recent=64,sinks=4,k_rotation=hadamard,v_rotation=none").default == full
    assert CacheConfig.parse("k=q8_0").default == LayerPolicy("q8_0", "bf16")
    config = CacheConfig.parse("q8_0")
    assert CacheConfig.parse(config) is config


def test_later_parts_override_earlier_ones_where_they_select():
    """Each selector picks its layers, and only the settings it names change."""
    plain, first, last = "k=turbo3,v=turbo3", "k=q8_0,v=q8_0", "k=turbo3,v=bf16"
    assert layers("turbo3; first2: q8_0; last1: v=bf16") == [first, first, plain, plain, plain, last]
    assert layers("turbo3; layers1-2: k=q8_0; layers2: v=q4_0") == [
        plain, "k=q8_0,v=turbo3", "k=q8_0,v=q4_0", plain, plain, plain
    ]  # fmt: skip
    assert layers("turbo3; sliding: q8_0; full: recent=8", 3, sliding=(1,)) == [
        "k=turbo3,v=turbo3,recent=8", first, "k=turbo3,v=turbo3,recent=8"
    ]  # fmt: skip
    assert layers("turbo3; last3: q8_0; first2: bf16", 4) == ["k=bf16,v=bf16", "k=bf16,v=bf16", first, first]
    assert layers("turbo3; first0: q8_0; layers9: q8_0", 2) == [plain, plain]
    assert layers("turbo3,recent=8; first1: recent=0", 2) == [plain, "k=turbo3,v=turbo3,recent=8"]


policies = st.builds(
    LayerPolicy,
    k=st.sampled_from(sorted(FORMATS)),
    v=st.sampled_from(sorted(FORMATS)),
    sinks=st.integers(0, 9),
    recent=st.integers(0, 99),
    k_rotation=st.sampled_from(["", "none", "hadamard"]),
    v_rotation=st.sampled_from(["", "none", "hadamard"]),
)
selectors = st.one_of(
    st.sampled_from(["sliding", "full"]),
    st.builds("{}{}".format, st.sampled_from(["first", "last", "layers"]), st.integers(0, 12)),
    st.builds("layers{}-{}".format, st.integers(0, 5), st.integers(0, 12)),
)
settings_of = st.dictionaries(
    st.sampled_from(["k", "v", "recent", "sinks", "k_rotation"]), st.just(None), min_size=1
).flatmap(
    lambda names: st.fixed_dictionaries(
        {
            n: st.sampled_from(sorted(FORMATS))
            if n in "kv"
            else st.integers(0, 99)
            if n != "k_rotation"
            else st.just("none")
            for n in names
        }
    )
)


@given(policies, st.lists(st.tuples(selectors, settings_of), max_size=4))
@settings(deadline=None, max_examples=100)
def test_printing_and_parsing_are_inverse(default, overrides):
    """A saved cache stores its configuration as text."""
    config = CacheConfig(default, tuple((s, tuple(values.items())) for s, values in overrides))
    again = CacheConfig.parse(str(config))
    assert again == config and str(again) == str(config)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ValueError, "unknown format ''"),
        ("turbo9", FormatError, "unknown format 'turbo9'; formats are"),
        ("k=turbo9", FormatError, "unknown format 'turbo9'"),
        ("k=q8_0,w=q8_0", ValueError, "unknown setting 'w'; settings are k, v, sinks, recent"),
        ("q8_0,k=q4_0", ValueError, "'k' is set twice"),
        ("q8_0,recent=many", ValueError, "recent='many' must be a whole number of tokens"),
        ("q8_0,recent=-1", ValueError, "recent='-1' must be a whole number"),
        ("q8_0; q4_0", ValueError, "'q4_0' is a second default; prefix it with a selector"),
        ("first2: q8_0", ValueError, "has no default for all layers"),
        ("q8_0; middle: q4_0", ValueError, "'middle' selects no layers; use firstN, lastN"),
        ("q8_0; first: q4_0", ValueError, "'first' selects no layers"),
        ("q8_0; first1-2: q4_0", ValueError, "'first1-2' selects no layers"),
        ("q8_0; last1: turbo9", FormatError, "unknown format 'turbo9'"),
        ("q8_0,k_rotation=fourier", ValueError, "k_rotation='fourier' is not one of"),
        ("q8_0; last1: v_rotation=fourier", ValueError, "v_rotation='fourier'"),
    ],
)
def test_mistakes_are_quoted(text, error, message):
    """A typo in a configuration must not become another configuration."""
    with pytest.raises(error, match=message):
        CacheConfig.parse(text)


def test_policies_check_themselves():
    for options, message in (
        (dict(k="q9"), "unknown format 'q9'"),
        (dict(sinks=-1), "sinks=-1 must be at least 0"),
        (dict(recent=-2), "recent=-2 must be at least 0"),
        (dict(v_rotation="x"), "v_rotation='x' is not one of"),
    ):
        with pytest.raises(ValueError, match=message):
            LayerPolicy(**options)


def test_codecs_of_a_policy():
    """Head sizes, rotations and static scales reach the side that they are for."""
    policy = LayerPolicy("q8_0", "turbo4", k_rotation="hadamard")
    shape = LayerShape(2, 192, 128, v_rotation=torch.eye(128), k_scale=0.5, v_scale=torch.tensor([1.0, 2.0]))
    k, v = policy.codecs(shape)
    assert (k.format.name, k.head_dim, k.override, float(k.scale)) == ("q8_0", 192, "hadamard", 0.5)
    assert (v.format.name, v.head_dim, v.rotation, v.scale.tolist()) == ("turbo4", 128, "none", [1.0, 2.0])
    assert torch.equal(v.matrix, torch.eye(128))
    same = policy.codecs(LayerShape(2, 64))
    assert same[1].head_dim == 64 and same[1].matrix is None and same[1].rotation == "turbo"
    with pytest.raises(ValueError, match="v_rotation has shape"):
        policy.codecs(LayerShape(2, 64, v_rotation=torch.eye(32)))
