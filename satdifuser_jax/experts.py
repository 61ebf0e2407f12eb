"""Mixture of experts over whole images: the gate, the choice, and experts run on their images only.

An expert is one bottleneck of a stack (bottlenecks.py); a row is one image at one key. Sparse
evaluation is exact for any routing: nothing is dropped when every row picks the same expert.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from common_jax.sharding import BATCH_AXES
from satdifuser_jax.residual_block import (
    BlockShape,
    apply_norm,
    block_backward,
    block_forward,
    norm_stats,
)


def gate_logits(x, kernel, bias):
    """Mean over positions of a zero-padded 3x3 convolution of x [N, H, W, C]: [N, E] float32.

    No convolution is run: for each of the nine taps the mean sees all positions but one border
    row or column, so totals and border sums of each channel are enough.
    """
    x = x.astype(jnp.float32)
    rows = x.sum(2)  # [N, H, C]
    by_column = [rows - x[:, :, -1], rows, rows - x[:, :, 0]]
    sums = []
    for taps in ("before", "at", "after"):
        for column in by_column:
            total = column.sum(1)
            if taps == "before":
                total = total - column[:, -1]
            elif taps == "after":
                total = total - column[:, 0]
            sums.append(total)
    pooled = jnp.stack(sums, 1).reshape(x.shape[0], 3, 3, x.shape[-1])
    positions = x.shape[1] * x.shape[2]
    return jnp.einsum("nijc,ijce->ne", pooled, kernel) / positions + bias


def choose_experts(logits, top_k: int):
    """(weights, chosen) [N, k]: softmax over the k largest logits, best first."""
    values, chosen = jax.lax.top_k(logits, top_k)
    return jax.nn.softmax(values, -1), chosen


def balance_loss(use):
    """Sum over experts of u ln(E u), mean over all leading axes: 0 when use [..., E] is even."""
    experts = use.shape[-1]
    return (use * jnp.log(experts * use + 1e-8)).sum(-1).mean()


def published_balance(use):
    """The value the published code returns and never trains: use [S, T, E], last scale only."""
    scales, keys, experts = use.shape
    return -(use[-1] * jnp.log(experts * use[-1] + 1e-8)).sum() / (scales * keys)


def blend_chosen(block: BlockShape, keys, pooled, implementation, mesh, tree, x, weights, chosen):
    """Weighted sum of the chosen experts of every row, and over keys.

    x [B*T, H, W, C], weights and chosen [B*T, k] -> [B, H*W, P], or its mean [B, P] when `pooled`.
    implementation: `loop` goes expert by expert over its rows (CPU), `ragged` is one ragged product
    of sorted rows (accelerators), `auto` decides by the platform that the program is compiled for.
    With a mesh of several devices each routes its own rows. x is a constant: no gradient flows into
    it.
    """
    if implementation not in ("auto", "loop", "ragged"):
        raise ValueError(f"implementation is {implementation!r}: take auto, loop or ragged")
    loop, ragged = (functools.partial(f, block, keys, pooled) for f in _BLENDS)
    choose = functools.partial(jax.lax.platform_dependent, cpu=loop, default=ragged)
    run = {"auto": choose, "loop": loop, "ragged": ragged}[implementation]
    if mesh is not None and mesh.size > 1:
        rows = P(BATCH_AXES)
        specs = {"in_specs": (P(), rows, rows, rows), "out_specs": rows}
        run = jax.shard_map(run, mesh=mesh, check_vma=False, **specs)
    return run(tree, jax.lax.stop_gradient(x), weights, chosen)


def _sort_by_expert(chosen, experts: int):
    """(order of the flat assignments by expert, first and one past last place of each expert)."""
    flat = chosen.reshape(-1)
    ends = jnp.cumsum(jnp.bincount(flat, length=experts))
    return jnp.argsort(flat, stable=True), jnp.concatenate([jnp.zeros(1, ends.dtype), ends])


# ------------------------------------------------------------------------- expert by expert (CPU)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _blend_looped(block, keys, pooled, tree, x, weights, chosen):
    return _looped_forward(block, keys, pooled, tree, x, weights, chosen)[0]


def _looped_forward(block, keys, pooled, tree, x, weights, chosen):
    n, h, w, c = x.shape
    rows, k = x.reshape(n, h * w, c), chosen.shape[1]
    order, bounds = _sort_by_expert(chosen, block.count)

    def run(tree, row):
        y, kept = block_forward(tree, rows[row], (h, w), block)
        return y[0].mean(0) if pooled else y[0], kept

    one = jax.tree.map(lambda leaf: leaf[0], tree)
    kept = jax.eval_shape(lambda: run(one, 0)[1])
    kept = jax.tree.map(lambda leaf: jnp.zeros((n * k, *leaf.shape), leaf.dtype), kept)
    shape = (block.width,) if pooled else (h * w, block.width)

    def expert(carry, item):
        tree, start, end = item

        def step(place, carry):
            total, outputs, kept = carry
            at = order[place]
            y, keep = run(tree, at // k)
            total = total.at[at // k // keys].add(weights.reshape(-1)[at] * y)
            outputs = outputs.at[at].set(y) if pooled else outputs
            return total, outputs, jax.tree.map(lambda a, b: a.at[at].set(b), kept, keep)

        return jax.lax.fori_loop(start, end, step, carry), None

    outputs = jnp.zeros((n * k, *shape) if pooled else ())
    carry = (jnp.zeros((n // keys, *shape)), outputs, kept)
    (total, outputs, kept), _ = jax.lax.scan(expert, carry, (tree, bounds[:-1], bounds[1:]))
    return total, (tree, x, weights, chosen, kept, outputs)


def _looped_backward(block, keys, pooled, residuals, g):
    tree, x, weights, chosen, kept, outputs = residuals
    n, h, w, c = x.shape
    rows, k = x.reshape(n, h * w, c), chosen.shape[1]
    order, bounds = _sort_by_expert(chosen, block.count)

    def expert(to_weights, item):
        tree, start, end = item

        def step(place, carry):
            grads, to_weights = carry
            at = order[place]
            g_row, weight = g[at // k // keys], weights.reshape(-1)[at]

            def gradient_of(output):
                if pooled:
                    each = g_row * weight / (h * w)
                    return jnp.broadcast_to(each, output.shape), (outputs[at] * g_row).sum()
                return g_row * weight, (output * g_row).sum()

            keep = jax.tree.map(lambda leaf: leaf[at], kept)
            more, slope = block_backward(tree, rows[at // k], keep, gradient_of, (h, w), block)
            return jax.tree.map(jnp.add, grads, more), to_weights.at[at].set(slope)

        start_grads = jax.tree.map(jnp.zeros_like, tree)
        grads, to_weights = jax.lax.fori_loop(start, end, step, (start_grads, to_weights))
        return to_weights, grads

    items = (tree, bounds[:-1], bounds[1:])
    to_weights, grads = jax.lax.scan(expert, jnp.zeros(weights.size), items)
    return grads, None, to_weights.reshape(weights.shape), None


_blend_looped.defvjp(_looped_forward, _looped_backward)


# ---------------------------------------------------------------- one ragged product (accelerators)
def _blend_ragged(block, keys, pooled, tree, x, weights, chosen):
    n, h, w, c = x.shape
    k, m = chosen.shape[1], h * w
    order, bounds = _sort_by_expert(chosen, block.count)
    experts, sizes = chosen.reshape(-1)[order], (jnp.diff(bounds) * m).astype(jnp.int32)

    def convolve(name, inputs):
        kernel = tree[name]["kernel"].reshape(block.count, -1, tree[name]["kernel"].shape[-1])
        inputs, kernel = inputs.astype(block.dtype), kernel.astype(block.dtype)
        kind = {"preferred_element_type": jnp.float32}
        y = jax.lax.ragged_dot(inputs.reshape(-1, inputs.shape[-1]), kernel, sizes, **kind)
        y = y.reshape(n * k, m, -1)
        norm = {key: value[experts] for key, value in tree[name]["norm"].items()}
        return apply_norm(norm, y, norm_stats(y, block.groups))

    x = x.reshape(n, m, c)[order // k]
    y = jax.nn.relu(convolve("conv1", x))
    y = jax.nn.relu(convolve("conv2", gather_neighbours(y, (h, w))))
    skip = convolve("shortcut", x) if block.has_shortcut else x.astype(jnp.float32)
    y = jax.nn.relu(convolve("conv3", y) + skip)
    y = y.mean(1) if pooled else y
    weight = weights.reshape(-1)[order].reshape(-1, *[1] * (y.ndim - 1))
    shape = (n // keys, *y.shape[1:])
    return jnp.zeros(shape).at[order // k // keys].add(weight * y)


_BLENDS = _blend_looped, _blend_ragged


def gather_neighbours(x, side: tuple[int, int]):
    """[n, H*W, C] -> [n, H*W, 9*C]: the zero-padded 3x3 neighbourhood of every position."""
    h, w = side
    n, _, c = x.shape
    x = jnp.pad(x.reshape(n, h, w, c), ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifts, -1).reshape(n, h * w, 9 * c)
