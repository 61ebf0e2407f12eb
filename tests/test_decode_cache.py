"""The prefix cache: where it is exact, that it is used, and that refreshing renews it."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from text_cores import SMALL, random_core

from geodit_jax import llada
from geodit_jax.decode_config import DecodeConfig
from geodit_jax.sampler import generate

KEY = jax.random.key(0)
EXACT = DecodeConfig(length=8, steps=4, banned="none", stop=False)
CACHED = dataclasses.replace(EXACT, cache="prefix")
LENGTHS = np.array([9, 4, 7], np.int32)


@pytest.fixture(scope="module")
def decode():
    """Decodes one batch of unequal prefixes with the settings it is given."""
    core = random_core()
    width = SMALL.text.width
    prefix = np.random.default_rng(0).normal(0, 0.02, (3, 9, width)).astype(np.float32)

    def run(settings, config=SMALL):
        found = generate(core, config, prefix, LENGTHS, KEY, settings, suffix_ids=(3,))
        return jax.tree.map(np.asarray, found)

    return run


def assert_same(a, b):
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.committed_at, b.committed_at)
    np.testing.assert_array_equal(a.steps, b.steps)
    np.testing.assert_allclose(a.confidence, b.confidence, rtol=1e-4)


def test_refreshing_at_every_pass_is_exact(decode):
    assert_same(decode(dataclasses.replace(CACHED, refresh_every=1)), decode(EXACT))


def test_one_step_with_a_cache_is_exact(decode):
    one = {"steps": 1}
    assert_same(
        decode(dataclasses.replace(CACHED, **one)), decode(dataclasses.replace(EXACT, **one))
    )


@pytest.mark.parametrize("steps", [2, 8])
def test_a_prefix_that_never_saw_the_answer_can_be_kept_exactly(decode, steps):
    config = dataclasses.replace(SMALL, prefix_lm=True)
    settings = dataclasses.replace(CACHED, steps=steps)
    assert_same(decode(settings, config), decode(dataclasses.replace(EXACT, steps=steps), config))


@pytest.mark.slow
@pytest.mark.parametrize("option", [{"guidance": 1.0, "block": 4}, {"threshold": 0.2}])
def test_the_exact_cache_goes_with_other_options(decode, option):
    config = dataclasses.replace(SMALL, prefix_lm=True)
    settings = dataclasses.replace(CACHED, **option)
    assert_same(decode(settings, config), decode(dataclasses.replace(EXACT, **option), config))


def test_an_old_prefix_is_seen_until_it_is_refreshed(decode):
    exact, kept = decode(EXACT), decode(CACHED)
    renewed = decode(dataclasses.replace(CACHED, refresh_every=2))
    for found in (kept, renewed):
        first = exact.committed_at == 0
        np.testing.assert_array_equal(found.ids[first], exact.ids[first])
        np.testing.assert_allclose(found.confidence[first], exact.confidence[first], rtol=1e-4)
    at = (kept.committed_at == 1) & (exact.committed_at == 1)
    np.testing.assert_array_equal(kept.confidence[at], renewed.confidence[at])
    assert np.abs(kept.confidence - exact.confidence)[at].max() > 1e-3
    assert (kept.confidence != renewed.confidence).any()  # from pass 2 on


def test_a_cached_pass_computes_the_answer_alone(decode, monkeypatch):
    tokens, run = [], llada.run
    monkeypatch.setattr(
        llada, "run", lambda *a, **k: tokens.append((a[2].shape[1], k["keep"])) or run(*a, **k)
    )
    decode(dataclasses.replace(CACHED, length=5, steps=5))  # compiled here only
    assert tokens == [(5 + 1 + 9, True), (5 + 1, False)]
