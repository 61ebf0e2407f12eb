"""One bottleneck against torch, its written-out gradient against autodiff."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import rel_error
from torch_heads import Bottleneck

from satdifuser_jax.residual_block import (
    BlockShape,
    apply_norm,
    block_backward,
    block_forward,
    norm_gradient,
    norm_stats,
)

N, SIDE = 3, (5, 4)


def random_tree(block: BlockShape, seed=0):
    rng = np.random.default_rng(seed)

    def conv(*shape):
        norm = {"scale": rng.uniform(0.5, 1.5, shape[-1]), "bias": rng.normal(size=shape[-1])}
        norm = {name: value.astype(np.float32) for name, value in norm.items()}
        return {"kernel": 0.2 * rng.standard_normal(shape, np.float32), "norm": norm}

    tree = {
        "conv1": conv(block.channels, block.mid),
        "conv2": conv(3, 3, block.mid, block.mid),
        "conv3": conv(block.mid, block.width),
    }
    if block.has_shortcut:
        tree["shortcut"] = conv(block.channels, block.width)
    return tree


def torch_block(tree, block: BlockShape) -> Bottleneck:
    module = Bottleneck(block.channels, block.width, block.groups)
    with torch.no_grad():
        for name, leaf in tree.items():
            conv, kernel = getattr(module, name), torch.as_tensor(leaf["kernel"])
            kernel = kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T[..., None, None]
            conv.weight.copy_(kernel)
            conv.norm.weight.copy_(torch.as_tensor(leaf["norm"]["scale"]))
            conv.norm.bias.copy_(torch.as_tensor(leaf["norm"]["bias"]))
    return module


@pytest.mark.parametrize("channels", [12, 32], ids=["shortcut", "identity"])
@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
def test_block_and_its_gradient_equal_torch(channels, remat):
    block = BlockShape(1, channels, 32, 4, remat=remat)
    tree, rng = random_tree(block), np.random.default_rng(1)
    x = rng.standard_normal((N, *SIDE, channels), np.float32)
    g = rng.standard_normal((N, SIDE[0] * SIDE[1], 32), np.float32)

    def ours(tree, x):
        rows = x.reshape(-1, channels)
        y, kept = block_forward(tree, rows, SIDE, block)
        assert bool(kept) != remat
        return y, *block_backward(tree, rows, kept, lambda y: (g, y.sum()), SIDE, block)

    y, grads, extra = jax.jit(ours)(tree, x)
    module = torch_block(tree, block)
    expected = module(torch.as_tensor(x).permute(0, 3, 1, 2))
    expected.backward(torch.as_tensor(g).reshape(N, *SIDE, 32).permute(0, 3, 1, 2))
    expected = expected.detach().permute(0, 2, 3, 1).reshape(y.shape)
    assert rel_error(y, expected) < 1e-5
    assert rel_error(extra, expected.sum()) < 1e-5
    assert ("shortcut" in grads) == (channels != 32)
    for name, grad in grads.items():
        conv = getattr(module, name)
        kernel = conv.weight.grad.permute(2, 3, 1, 0).reshape(grad["kernel"].shape)
        assert rel_error(grad["kernel"], kernel) < 2e-5, name
        assert rel_error(grad["norm"]["scale"], conv.norm.weight.grad) < 2e-5, name
        assert rel_error(grad["norm"]["bias"], conv.norm.bias.grad) < 2e-5, name


def test_norm_of_maps_far_from_zero_equals_float64():
    rng = np.random.default_rng(2)
    y = (rng.standard_normal((2, 30, 8)) + 300).astype(np.float32)
    norm = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    found = apply_norm(norm, jnp.asarray(y), norm_stats(jnp.asarray(y), 2))
    exact = y.astype(np.float64).reshape(2, 30, 2, 4)
    exact = exact - exact.mean((1, 3), keepdims=True)
    exact /= np.sqrt(np.square(exact).mean((1, 3), keepdims=True) + 1e-5)
    assert np.abs(found - exact.reshape(y.shape)).max() < 2e-4  # 300 * 2**-23 = 4e-5 in y itself


def test_norm_gradient_equals_autodiff():
    rng = np.random.default_rng(3)
    y, g = (rng.standard_normal((2, 12, 8), np.float32) for _ in range(2))
    norm = {"scale": rng.uniform(0.5, 2, 8).astype(np.float32), "bias": np.ones(8, np.float32)}

    def apply(norm, y):
        return (apply_norm(norm, y, norm_stats(y, 4)) * g).sum()

    expected = jax.jit(jax.grad(apply, (1, 0)))(norm, y)
    found = jax.jit(lambda y: norm_gradient(norm, y, norm_stats(y, 4), g, 4))(y)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert rel_error(a, b) < 1e-5


def test_bfloat16_products_stay_near_float32():
    block = BlockShape(1, 12, 32, 4)
    tree = random_tree(block)
    x = np.random.default_rng(4).standard_normal((N * SIDE[0] * SIDE[1], 12), np.float32)
    half = dataclasses.replace(block, dtype=jnp.bfloat16)
    exact, near = (
        jax.jit(lambda tree, x, b=b: block_forward(tree, x, SIDE, b)[0])(tree, x)
        for b in (block, half)
    )
    assert near.dtype == jnp.float32
    assert 1e-4 < rel_error(near, exact) < 3e-2


def test_a_width_that_norms_cannot_split_is_refused():
    with pytest.raises(ValueError, match="projection_dim is 96.*multiple of 128"):
        BlockShape(1, 12, 96)
