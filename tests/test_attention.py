"""Attention: every implementation gives the same numbers as the formula, and the same gradients."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import rel_error

from common_jax import attention
from common_jax.attention import attend, attend_kept, planned_for
from common_jax.layers import remat_policy

run = jax.jit(attend, static_argnames=("causal", "implementation"))  # tests block alike
BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 12, 10, 3, 8


IMPLEMENTATIONS = ["auto", "inference", "xla", "chunked", "sliced", "blocked"]


@pytest.fixture(autouse=True)
def five_queries_a_block(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_SCORES", 5 * KEYS * HEADS)


def inputs(queries=QUERIES, keys=KEYS, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = [(BATCH, n, HEADS, WIDTH) for n in (queries, keys, keys)]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def reference(q, k, v, lengths=None, causal=False, turns=None):
    """float64, one score at a time in mind: no fused anything."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    hidden = np.zeros(scores.shape, bool)
    if lengths is not None:
        hidden |= np.arange(k.shape[1])[None, None, None] >= lengths[:, None, None, None]
    if causal:
        hidden |= np.triu(np.ones(scores.shape[2:], bool), 1)
    if turns is not None:
        hidden |= (turns[1][:, None] > turns[0][:, :, None])[:, None]
    scores[hidden] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("masking", ["none", "lengths", "causal", "both"])
def test_attention_equals_the_formula(implementation, masking):
    causal = masking in ("causal", "both")
    q, k, v = inputs(KEYS if causal else QUERIES)
    lengths = np.array([4, KEYS]) if masking in ("lengths", "both") else None
    out = run(q, k, v, lengths=lengths, causal=causal, implementation=implementation)
    assert rel_error(out, reference(q, k, v, lengths, causal)) < 2e-6


TURNS = (
    np.array([[0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 3, 3], [5, 5, 5, 5, 1, 1, 1, 1, 1, 2, 2, 5]]),
    np.array([[0, 0, 0, 0, 1, 1, 1, 2, 2, 3], [5, 1, 1, 2, 2, 2, 5, 5, 9, 9]]),
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths", [None, np.array([4, KEYS])], ids=["all", "lengths"])
def test_a_query_sees_its_own_and_earlier_turns(implementation, lengths):
    q, k, v = inputs()
    out = run(q, k, v, lengths=lengths, turns=TURNS, implementation=implementation)
    expected = reference(q, k, v, lengths, turns=TURNS)
    assert rel_error(out, expected) < 2e-6
    assert rel_error(expected, reference(q, k, v, lengths)) > 0.1


def test_attention_equals_torch():
    q, k, v = inputs()
    tensors = [torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors).transpose(1, 2)
    for implementation in ("xla", "chunked", "sliced", "blocked"):
        assert rel_error(run(q, k, v, implementation=implementation), expected) < 2e-6


def test_heads_are_sliced_in_pairs_where_their_number_is_even():
    q, k, v = (x.repeat(2, axis=2) * np.arange(1, 7)[:, None] for x in inputs())
    lengths = np.array([4, KEYS])
    out = run(q, k, v, lengths=lengths, turns=TURNS, implementation="sliced")
    assert rel_error(out, reference(q, k, v, lengths, turns=TURNS)) < 2e-6


@pytest.mark.parametrize("lengths", [None, np.array([8, KEYS])], ids=["all", "lengths"])
@pytest.mark.parametrize("turns", [None, TURNS], ids=["all", "turns"])
def test_kept_keys_are_seen_as_if_they_stood_behind_the_own_ones(lengths, turns):
    q, k, v = inputs()
    own, first = [x[:, :4, :1] for x in (k, v)], 4  # one group for all heads
    kept = k[:, first:, :1].transpose(0, 2, 3, 1), v[:, first:, :1].transpose(0, 2, 1, 3)
    out = jax.jit(attend_kept)(q, own, kept, lengths=lengths, turns=turns)
    k, v = (x[:, :, :1].repeat(HEADS, axis=2) for x in (k, v))
    assert rel_error(out, reference(q, k, v, lengths, turns=turns)) < 2e-6


@pytest.mark.parametrize("turns", [None, TURNS], ids=["all", "turns"])
@pytest.mark.parametrize("implementation", ["chunked", "blocked"])
def test_gradients_equal_those_of_xla(implementation, turns):
    q, k, v = inputs()

    def gradients(implementation):
        def loss(*qkv):
            out = attend(*qkv, turns=turns, implementation=implementation)
            return jnp.sum(jnp.sin(out))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    for ours, theirs in zip(gradients(implementation), gradients("xla")):
        assert rel_error(ours, theirs) < 2e-6


def test_a_key_beyond_its_length_changes_nothing():
    q, k, v = inputs()
    lengths = np.array([4, 7])
    changed = v.copy()
    changed[0, 4:] = changed[1, 7:] = 1e3
    for implementation in ("xla", "chunked", "sliced", "blocked"):
        before = run(q, k, v, lengths=lengths, implementation=implementation)
        after = run(q, k, changed, lengths=lengths, implementation=implementation)
        np.testing.assert_array_equal(before, after)


def test_a_cpu_loops_over_heads_only_where_sequences_are_long(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_SCORES", 2**25)

    def loops(tokens):
        q = jax.ShapeDtypeStruct((1, tokens, 2, 8), jnp.float32)
        return "scan[" in str(jax.make_jaxpr(attend)(q, q, q))

    assert loops(256) and not loops(16)


@pytest.mark.parametrize("scores", [2 * 256 * 256, 256 * 256])
def test_no_accelerator_holds_all_scores_of_long_sequences(scores, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_SCORES", scores)
    q = jax.ShapeDtypeStruct((1, 256, 2, 8), jnp.float32)
    traced = jax.jit(lambda *qkv: attend(*qkv)).trace(q, q, q)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert ("x256x256xf32" in text) == (scores > 256 * 256)


def test_low_precision_inputs_keep_their_dtype():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs())
    for implementation in ("xla", "chunked", "sliced", "blocked"):
        out = run(q, k, v, implementation=implementation)
        assert out.dtype == jnp.bfloat16
        assert rel_error(out.astype(jnp.float32), reference(q, k, v)) < 2e-2


def test_a_kernel_that_cannot_take_the_inputs_gives_way_and_says_so_once():
    attention._warned.clear()
    q, k, v = inputs()
    with pytest.warns(UserWarning, match="cudnn cannot take .*using xla"):
        out = attend(q, k, v, implementation="cudnn")
    np.testing.assert_array_equal(out, attend(q, k, v, implementation="xla"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(q, k, v, implementation="cudnn")


@pytest.mark.slow
@pytest.mark.parametrize("turns", [None, TURNS], ids=["all", "turns"])
@pytest.mark.parametrize("lengths", [None, np.array([4, 8])], ids=["whole", "lengths"])
@pytest.mark.parametrize("sizes", [(11, 9), (11, 10), (12, 9)], ids=str)
def test_odd_lengths_are_made_even_without_a_trace_for_kernels_that_need_it(sizes, lengths, turns):
    q, k, v = inputs(*sizes)
    turns = turns and (turns[0][:, : sizes[0]], turns[1][:, : sizes[1]])

    def loss(attend):
        return lambda *qkv: jnp.sum(jnp.sin(attend(*qkv, lengths, False, turns, "xla")))

    out = jax.jit(attention._attend_even, static_argnums=(4, 6))(
        q, k, v, lengths, False, turns, "xla"
    )
    assert out.shape == q.shape
    assert rel_error(out, reference(q, k, v, lengths, turns=turns)) < 2e-6
    ours, theirs = (
        jax.jit(jax.grad(loss(attend), (0, 1, 2)))(q, k, v)
        for attend in (attention._attend_even, attention._attend_whole)
    )
    for mine, other in zip(ours, theirs):
        assert rel_error(mine, other) < 2e-6


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cudnn runs on NVIDIA GPUs only")
@pytest.mark.parametrize("sizes", [(729, 729), (1024, 77), (838, 838)], ids=str)
@pytest.mark.parametrize("lengths", [None, np.array([40, 60])], ids=["whole", "lengths"])
def test_cudnn_trains_on_any_length(sizes, lengths):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(*sizes))

    def loss(implementation):
        def run(*qkv):
            out = attend(*qkv, lengths=lengths, implementation=implementation)
            return jnp.sum(jnp.sin(out.astype(jnp.float32)))

        return run

    ours, theirs = (jax.grad(loss(kind), (0, 1, 2))(q, k, v) for kind in ("cudnn", "xla"))
    for mine, other in zip(ours, theirs):
        assert rel_error(mine.astype(jnp.float32), other.astype(jnp.float32)) < 3e-2


def test_wrong_requests_are_refused():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="attention='flash' is unknown"):
        attend(q, k, v, implementation="flash")
    with pytest.raises(ValueError, match="shapes disagree"):
        attend(q, k[:, :-1], v)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_attention_that_is_planned_for_a_gpu_keeps_what_cudnn_keeps(remat):
    """Queries, keys, values, the result and a number a query: no scores, of no platform."""
    x = jax.ShapeDtypeStruct((2, 320, 4, 16), jnp.bfloat16)

    def kept(q, k, v):
        run = lambda q, k, v: attend(2 * q, 2 * k, 2 * v)  # noqa: E731
        if remat != "none":
            run = jax.checkpoint(run, policy=remat_policy(remat))
        return [y for y in jax.tree.leaves(jax.vjp(run, q, k, v)[1]) if y.shape]

    with planned_for("gpu"):
        leaves = jax.eval_shape(kept, x, x, x)
    statistics = jax.ShapeDtypeStruct((2, 4, 320), jnp.float32)
    assert sorted(map(str, leaves)) == sorted(map(str, [x, x, x, x, statistics]))


def test_attention_that_is_planned_for_a_platform_has_no_other_in_its_program():
    x = jax.ShapeDtypeStruct((1, 320, 2, 16), jnp.float32)
    assert "platform_index" in str(jax.make_jaxpr(attend)(x, x, x))
    for platform in ("cpu", "gpu", "tpu"):
        with planned_for(platform):
            assert "platform_index" not in str(jax.make_jaxpr(lambda x: attend(x, x, x))(x))
