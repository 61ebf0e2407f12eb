"""The gate without a convolution, and sparse experts exact for any routing."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import rel_error
from test_residual_block import random_tree

from common_jax.sharding import make_mesh
from satdifuser_jax.bottlenecks import blend_stack
from satdifuser_jax.experts import (
    balance_loss,
    blend_chosen,
    choose_experts,
    gate_logits,
    published_balance,
)
from satdifuser_jax.residual_block import BlockShape

BLOCK = BlockShape(4, 8, 16, 4)
KEYS, BATCH, SIDE = 2, 3, 4
ROUTINGS = {
    "all rows to one expert": [[2, 2]] * 6,
    "first expert idle": [[1, 2], [3, 1], [2, 3], [3, 2], [1, 3], [2, 1]],
    "spread": [[0, 1], [2, 3], [3, 0], [1, 2], [0, 3], [2, 0]],
}


@functools.cache
def problem(block=BLOCK):
    rng = np.random.default_rng(0)
    trees = [random_tree(block, seed) for seed in range(block.count)]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
    x = rng.standard_normal((BATCH * KEYS, SIDE, SIDE, block.channels), np.float32)
    return stack, x, rng.random((BATCH * KEYS, 2), np.float32)


@pytest.mark.parametrize("side", [(1, 1), (2, 2), (5, 3)])
def test_gate_from_border_sums_equals_a_padded_convolution_and_its_mean(side):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, *side, 7), np.float32)
    kernel, bias = rng.standard_normal((3, 3, 7, 5), np.float32), rng.random(5, np.float32)
    conv = torch.nn.functional.conv2d(
        torch.as_tensor(x).permute(0, 3, 1, 2),
        torch.as_tensor(kernel).permute(3, 2, 0, 1),
        torch.as_tensor(bias),
        padding=1,
    )
    found = jax.jit(gate_logits)(x, kernel, bias)
    assert rel_error(found, conv.mean((2, 3))) < 1e-5


def test_chosen_experts_share_one_softmax_best_first():
    weights, chosen = choose_experts(jnp.asarray([[1.0, 3.0, 2.0, -1.0]]), 2)
    assert chosen.tolist() == [[1, 2]]
    assert rel_error(weights, [[1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))]]) < 1e-6


@functools.cache
def gradients(implementation, pooled, block=BLOCK):
    """Compiled (sparse, dense with zero weights for the rest): loss and gradients of
    (experts, weights), for any chosen experts."""
    _, x, _ = problem(block)
    shape = (BATCH, 16) if pooled else (BATCH, SIDE * SIDE, 16)
    g = np.random.default_rng(2).standard_normal(shape, np.float32)

    def sparse(stack, weights, chosen):
        how = (block, KEYS, pooled, implementation, None)
        return (blend_chosen(*how, stack, x, weights, chosen) * g).sum()

    def dense(stack, weights, chosen):
        every = (jax.nn.one_hot(chosen, block.count) * weights[..., None]).sum(1)
        return (blend_stack(block, KEYS, pooled, stack, x, every.T) * g).sum()

    return [jax.jit(jax.value_and_grad(loss, (0, 1))) for loss in (sparse, dense)]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("implementation, pooled", [("loop", True), ("ragged", False)])
def test_sparse_experts_are_exact_for_any_routing(routing, implementation, pooled):
    stack, _, weights = problem()
    sparse, dense = gradients(implementation, pooled)
    found = sparse(stack, weights, np.asarray(ROUTINGS[routing]))
    expected = dense(stack, weights, np.asarray(ROUTINGS[routing]))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert rel_error(a, b) < 1e-5
    idle = sorted(set(range(BLOCK.count)) - {e for row in ROUTINGS[routing] for e in row})
    for leaf in jax.tree.leaves(found[1][0]):
        assert not np.any(np.asarray(leaf)[idle]), "an expert that ran nowhere got a gradient"


@pytest.mark.parametrize(
    "implementation, pooled, block",
    [
        ("loop", False, dataclasses.replace(BLOCK, remat=True)),
        ("ragged", True, dataclasses.replace(BLOCK, channels=16)),
    ],
    ids=["loop of maps, nothing kept", "ragged, identity shortcuts"],
)
def test_both_implementations_take_maps_and_means(implementation, pooled, block):
    stack, _, weights = problem(block)
    sparse, dense = gradients(implementation, pooled, block)
    found = sparse(stack, weights, np.asarray(ROUTINGS["spread"]))
    expected = dense(stack, weights, np.asarray(ROUTINGS["spread"]))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert rel_error(a, b) < 1e-5


def test_devices_of_a_mesh_route_their_own_rows_to_the_same_result():
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = make_mesh(devices=jax.devices()[:2])
    block, keys = BLOCK, 1
    stack, x, weights = problem()
    chosen = jnp.asarray(ROUTINGS["spread"])

    def loss(mesh, stack, weights):
        y = blend_chosen(block, keys, True, "loop", mesh, stack, x, weights, chosen)
        return (y * jnp.arange(1.0, 7.0)[:, None]).sum()

    one, two = (
        jax.jit(jax.value_and_grad(functools.partial(loss, m), (0, 1)))(stack, weights)
        for m in (None, mesh)
    )
    for a, b in zip(jax.tree.leaves(two), jax.tree.leaves(one)):
        assert rel_error(a, b) < 1e-5


def test_balance_is_least_when_experts_are_used_evenly():
    even, skewed = jnp.full((2, 3, 4), 0.25), jnp.asarray([[[0.7, 0.1, 0.1, 0.1]] * 3] * 2)
    assert abs(float(balance_loss(even))) < 1e-6
    assert float(balance_loss(skewed)) > 0.3
    # The published value has the opposite sign, and reads the last scale alone.
    u = np.asarray(skewed[-1], np.float64)
    assert rel_error(published_balance(skewed), -(u * np.log(4 * u + 1e-8)).sum() / 6) < 1e-5


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation is 'sorted'"):
        blend_chosen(BLOCK, 1, True, "sorted", None, {}, None, None, None)


def test_experts_are_compiled_for_the_platform_of_the_program_not_of_this_machine():
    stack, x, weights = problem()
    how = (BLOCK, KEYS, True, "auto", None)
    chosen = jnp.asarray(ROUTINGS["spread"])
    run = jax.jit(functools.partial(blend_chosen, *how)).trace(stack, x, weights, chosen)
    texts = {
        platform: run.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu")
    }
    assert "while" in texts["cpu"] and "ragged_dot" not in texts["cpu"]
    assert "ragged_dot" in texts["tpu"]
