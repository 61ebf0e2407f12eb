"""Stacks of residual bottlenecks: many blocks of one shape, run in a loop that is compiled once.

A stack of L blocks (residual_block.py) keeps its parameters on a leading axis:

    shortcut/kernel [L, C, P]            shortcut/norm/{scale,bias} [L, P]    (absent where C = P)
    conv1/kernel    [L, C, P/4]          conv1/norm/{scale,bias}    [L, P/4]
    conv2/kernel    [L, 3, 3, P/4, P/4]  conv2/norm/{scale,bias}    [L, P/4]
    conv3/kernel    [L, P/4, P]          conv3/norm/{scale,bias}    [L, P]

One block at a time keeps the work in the cache: on the CPU faster than batching the stack or
unrolling it, with a third of the memory and half the compile time.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from common_jax.layers import declare
from satdifuser_jax.residual_block import BlockShape, block_backward, block_forward


@dataclasses.dataclass(frozen=True)
class TapGroup:
    """Equally wide neighbouring taps of one scale: they share one stack."""

    scale: int
    first: int  # index of the first tap among all taps
    count: int
    channels: int
    offset: int  # first channel inside the scale


def group_taps(scales) -> list[TapGroup]:
    """Runs of equal width inside each scale, in tap order."""
    groups, tap = [], 0
    for index, scale in enumerate(scales):
        offset = 0
        start = len(groups)
        for channels in scale.channels:
            last = groups[-1] if len(groups) > start else None
            if last is not None and last.channels == channels:
                groups[-1] = dataclasses.replace(last, count=last.count + 1)
            else:
                groups.append(TapGroup(index, tap, 1, channels, offset))
            tap, offset = tap + 1, offset + channels
    return groups


def fold_keys(features):
    """[B, T, H, W, C] -> [B*T, H, W, C]: keys share their bottlenecks."""
    return features.reshape(-1, *features.shape[2:])


class _Affine(nn.Module):
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self):
        scale = declare(self, "scale", self.shape)
        return {"scale": scale, "bias": declare(self, "bias", self.shape)}


class _Convolution(nn.Module):
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self):
        kernel = declare(self, "kernel", self.shape)
        return {"kernel": kernel, "norm": _Affine((self.shape[0], self.shape[-1]), name="norm")()}


class KernelBias(nn.Module):
    """Holds a kernel of `shape` and its bias."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self):
        kernel = declare(self, "kernel", self.shape)
        bias = declare(self, "bias", self.shape[-1:])
        return {"kernel": kernel, "bias": bias}


class BottleneckStack(nn.Module):
    """Holds the parameters of a stack; calling it returns their tree for the functions below."""

    block: BlockShape

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        b = self.block
        shapes = {
            "conv1": (b.count, b.channels, b.mid),
            "conv2": (b.count, 3, 3, b.mid, b.mid),
            "conv3": (b.count, b.mid, b.width),
        }
        if b.has_shortcut:
            shapes["shortcut"] = (b.count, b.channels, b.width)
        return {name: _Convolution(shape, name=name)() for name, shape in shapes.items()}


# ----------------------------------------------------------------------------------------- loops
def _taps_of(x, index, block: BlockShape):
    """Rows [n*M, C] that block `index` reads: its part of the channels, or all of them."""
    x = x.reshape(-1, x.shape[-1])
    if x.shape[-1] == block.channels:
        return x
    return jax.lax.dynamic_slice_in_dim(x, index * block.channels, block.channels, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project_stack(block: BlockShape, tree, x):
    """Output of every block: x [n, H, W, L*C], or [n, H, W, C] read by all -> [L, n, H*W, P].

    x is a constant: its gradient is zero by definition.
    """
    return _project_forward(block, tree, x)[0]


def _project_forward(block, tree, x):
    def one(item):
        return block_forward(item[0], _taps_of(x, item[1], block), x.shape[1:3], block)

    outputs, kept = jax.lax.map(one, (tree, jnp.arange(block.count)))
    return outputs, (tree, x, kept)


def _project_backward(block, residuals, g):
    tree, x, kept = residuals

    def one(item):
        tree, index, kept, g = item
        rows = _taps_of(x, index, block)
        return block_backward(tree, rows, kept, lambda _: (g, None), x.shape[1:3], block)[0]

    return jax.lax.map(one, (tree, jnp.arange(block.count), kept, g)), None


project_stack.defvjp(_project_forward, _project_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def blend_stack(block: BlockShape, keys: int, pooled: bool, tree, x, weights):
    """Weighted sum over blocks and keys, without keeping the projected maps.

    x [B*T, H, W, L*C] as in `project_stack`, T = keys; weights [L, B*T], or [L, B*T, H*W] where
    positions have their own.
    Returns [B, H*W, P], or its mean over positions [B, P] when `pooled`. x is a constant.
    """
    return _blend_forward(block, keys, pooled, tree, x, weights)[0]


def _sum_keys(y, keys: int):
    return y.reshape(-1, keys, *y.shape[1:]).sum(1)


def _blend_forward(block, keys, pooled, tree, x, weights):
    n, h, w, _ = x.shape

    def one(total, item):
        tree, index, weight = item
        y, kept = block_forward(tree, _taps_of(x, index, block), (h, w), block)
        if pooled and weight.ndim == 1:
            y = y.mean(1)
            return total + _sum_keys(y * weight[:, None], keys), (kept, y)
        y = y * weight.reshape(n, -1, 1)
        return total + _sum_keys(y.mean(1) if pooled else y, keys), (kept, None)

    shape = (n // keys, block.width) if pooled else (n // keys, h * w, block.width)
    items = (tree, jnp.arange(block.count), weights)
    total, (kept, means) = jax.lax.scan(one, jnp.zeros(shape), items)
    return total, (tree, x, weights, kept, means)


def _blend_backward(block, keys, pooled, residuals, g):
    tree, x, weights, kept, means = residuals
    n, h, w, _ = x.shape
    g = jnp.repeat(g, keys, 0)
    g = g[:, None] / (h * w) if pooled else g  # [n, 1 or H*W, P]

    def one(item):
        tree, index, weight, kept, mean = item

        def gradient_of(output):
            gradient = jnp.broadcast_to(g * weight.reshape(n, -1, 1), output.shape)
            if mean is not None:
                return gradient, (mean * g[:, 0]).sum(-1) * (h * w)
            to_weight = (output * g).sum(-1)
            return gradient, to_weight if weight.ndim == 2 else to_weight.sum(-1)

        rows = _taps_of(x, index, block)
        return block_backward(tree, rows, kept, gradient_of, (h, w), block)

    items = (tree, jnp.arange(block.count), weights, kept, means)
    to_tree, to_weights = jax.lax.map(one, items)
    return to_tree, None, to_weights


blend_stack.defvjp(_blend_forward, _blend_backward)
