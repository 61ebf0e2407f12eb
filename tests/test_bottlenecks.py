"""Stacks: grouping of taps, the blend against the projected maps it never keeps."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from conftest import rel_error
from test_residual_block import random_tree

from satdifuser_jax.bottlenecks import TapGroup, blend_stack, group_taps, project_stack
from satdifuser_jax.residual_block import BlockShape, block_forward
from satdifuser_jax.taps import Scale

BLOCK = BlockShape(3, 8, 16, 4)
KEYS, BATCH, SIDE = 2, 2, 4


def random_stack(block=BLOCK):
    trees = [random_tree(block, seed) for seed in range(block.count)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def random_inputs(channels):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH * KEYS, SIDE, SIDE, channels), np.float32)
    return x, rng.random((BLOCK.count, BATCH * KEYS), np.float32)


def test_taps_of_one_width_and_scale_form_a_group():
    scales = (Scale(8, ("",) * 4, (4, 4, 6, 4)), Scale(4, ("",) * 2, (4, 4)))
    assert group_taps(scales) == [
        TapGroup(0, 0, 2, 4, 0),
        TapGroup(0, 2, 1, 6, 8),
        TapGroup(0, 3, 1, 4, 14),
        TapGroup(1, 4, 2, 4, 0),
    ]


@pytest.mark.parametrize("shared", [False, True], ids=["own channels", "same channels"])
def test_every_block_of_a_stack_reads_its_own_channels(shared):
    stack, (x, _) = random_stack(), random_inputs(8 if shared else 24)
    outputs = jax.jit(lambda s, x: project_stack(BLOCK, s, x))(stack, x)
    one = jax.jit(lambda tree, rows: block_forward(tree, rows, (SIDE, SIDE), BLOCK)[0])
    trees = [random_tree(BLOCK, seed) for seed in range(BLOCK.count)]
    for i, (output, tree) in enumerate(zip(outputs, trees)):
        rows = (x if shared else x[..., 8 * i : 8 * i + 8]).reshape(-1, 8)
        assert rel_error(output, one(tree, rows)) < 1e-6


@pytest.mark.parametrize("pooled", [False, True], ids=["maps", "pooled"])
@pytest.mark.parametrize("positions", [False, True], ids=["by row", "by position"])
def test_blend_and_its_gradient_equal_the_sum_of_projected_maps(pooled, positions):
    block = dataclasses.replace(BLOCK, remat=pooled != positions)  # both ways, each twice
    stack, (x, weights) = random_stack(), random_inputs(24)
    if positions:
        weights = np.random.default_rng(2).random((*weights.shape, SIDE * SIDE), np.float32)
    shape = (BATCH, 16) if pooled else (BATCH, SIDE * SIDE, 16)
    g = np.random.default_rng(1).standard_normal(shape, np.float32)

    def blended(stack, weights):
        return (blend_stack(block, KEYS, pooled, stack, x, weights) * g).sum()

    def summed(stack, weights):
        weights = weights.reshape(BLOCK.count, BATCH * KEYS, -1, 1)
        y = project_stack(BLOCK, stack, x) * weights
        y = y.reshape(BLOCK.count, BATCH, KEYS, SIDE * SIDE, 16).sum((0, 2))
        return ((y.mean(1) if pooled else y) * g).sum()

    found = jax.jit(jax.value_and_grad(blended, (0, 1)))(stack, weights)
    expected = jax.jit(jax.value_and_grad(summed, (0, 1)))(stack, weights)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert rel_error(a, b) < 1e-5


def test_remat_keeps_less_memory():
    stack, (x, weights) = random_stack(), random_inputs(24)

    def temporary(block):
        def loss(stack):
            return blend_stack(block, KEYS, True, stack, x, weights).sum()

        compiled = jax.jit(jax.grad(loss)).lower(stack).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(dataclasses.replace(BLOCK, remat=True)) < temporary(BLOCK)
