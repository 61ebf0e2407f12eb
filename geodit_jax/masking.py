"""The forward process of masked diffusion and its loss (Nie et al. 2025, LLaDA; LLaDA-V).

A time t is drawn for every sequence; each of its targets becomes the mask token with probability p
of t, and the model is asked for what stood there. B sequences, S positions, D width, V vocabulary
rows. Position `-100` of the labels is no target.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common_jax.sharding import BATCH_AXES, axis_size, constrain

IGNORED = -100
LEAST = 1e-3  # the smallest chance of a target to be masked: 1/p stays finite
WEIGHTINGS = ("1/p", "none")
ROWS = 512  # rows whose logits exist at a time


class Masks(NamedTuple):
    """where [B,S] bool: positions that become the mask token. p [B] float32: their chance."""

    where: jax.Array
    p: jax.Array


class Loss(NamedTuple):
    """total: sum over sequences (the only part with a gradient). nll [B,S] and hits [B,S] float32:
    cross-entropy and whether the best id is the label, at masked targets, else 0."""

    total: jax.Array
    nll: jax.Array
    hits: jax.Array


def _keys(key, numbers: jax.Array):
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers.astype(jnp.uint32))


def draw_times(key, index: jax.Array, group: int = 1) -> jax.Array:
    """t in [0, 1) for examples by their place `index` [B] in the stream, float32.

    group > 1: the times of `group` examples in a row are one random number shifted by multiples
    of 1/group, so a batch has early and late ones in equal parts; each alone stays uniform.
    """
    first = jax.vmap(jax.random.uniform)(_keys(key, index // group))
    shift = (index % group).astype(jnp.float32) / group
    return jnp.mod(first + shift, 1.0)


def mask_targets(
    t: jax.Array, u: jax.Array, targets: jax.Array, at_least_one: bool = False
) -> Masks:
    """Masks the targets [B,S] where u [B,S] < p, p = (1 - 1e-3) t + 1e-3 of times t [B].

    at_least_one: a sequence in which none is masked gets the target with the smallest u.
    """
    p = (1 - LEAST) * t + LEAST
    where = (u < p[:, None]) & targets
    if at_least_one:
        first = jnp.argmin(jnp.where(targets, u, jnp.inf), axis=1)
        chosen = jax.nn.one_hot(first, u.shape[1], dtype=bool) & targets
        where |= chosen & ~where.any(axis=1, keepdims=True)
    return Masks(where, p)


def draw_masks(
    key,
    index: jax.Array,
    targets: jax.Array,
    *,
    t: jax.Array | None = None,
    group: int = 1,
    at_least_one: bool = False,
) -> Masks:
    """Masks of examples [B] by their place in the stream alone: no batch, mesh or host matters.

    t [B]: given times; else drawn, see `draw_times`.
    """
    of_times, of_places = jax.random.split(key)
    t = draw_times(of_times, index, group) if t is None else t
    draw = jax.vmap(lambda k: jax.random.uniform(k, targets.shape[1:]))
    return mask_targets(t, draw(_keys(of_places, index)), targets, at_least_one)


def complement(masks: Masks, targets: jax.Array) -> Masks:
    """Masks of exactly the other targets: of two such copies every target is supervised once.

    Li et al. 2025, LaViDa. The chance is 1 - p, but not below 1e-3.
    """
    return Masks(targets & ~masks.where, jnp.maximum(1 - masks.p, LEAST))


def masked_loss(
    core: Any,
    hidden: jax.Array,
    labels: jax.Array,
    masks: Masks,
    *,
    weighting: str = "1/p",
    groups: int = 1,
    rows: int = ROWS,
) -> Loss:
    """Cross-entropy at masked targets, / p (or not: `none`), / targets of the sequence, summed.

    core: the text core, for its head. hidden [B,S,D] after the final norm; labels [B,S].
    The head sees masked rows only, `rows` at a time: no logits [B,S,V] exist (with groups of few
    rows their gradient does, in hidden's dtype). groups: parts of the batch that choose their rows
    apart; as many as devices share the batch, else rows would travel.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"loss_weighting={weighting!r}: use one of {WEIGHTINGS}")
    targets = labels != IGNORED
    scale = 1 / jnp.maximum(targets.sum(1), 1)
    scale = scale / masks.p if weighting == "1/p" else scale
    weights = jnp.where(masks.where & targets, scale[:, None], 0.0)

    def split(x):
        return x.reshape(groups, -1, *x.shape[2:])

    kernel = core["lm_head"]["kernel"]
    parts = map(split, (hidden, labels, weights))
    total, nll, hits = _cross_entropy(kernel, *parts, min(rows, labels.size // groups))
    return Loss(total, nll.reshape(labels.shape), hits.reshape(labels.shape))


# Gradients are made together with the loss, while the logits of a chunk are there: otherwise the
# backward pass would compute them again, and a loop of unknown length has no backward pass at all.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(kernel, hidden, labels, weights, rows: int):
    """-> (sum of weights x cross-entropy, cross-entropy [G,N], hits [G,N]) of hidden [G,N,D]."""
    return _run_chunks(kernel, hidden, labels, weights, rows, (False, False))[:3]


def _forward(kernel, hidden, labels, weights, rows: int):
    wanted = (kernel.perturbed, hidden.perturbed)  # a frozen head needs no gradient of its size
    values = (kernel.value, hidden.value, labels.value, weights.value)
    *out, d_kernel, d_hidden = _run_chunks(*values, rows, wanted)
    return tuple(out), (d_kernel, d_hidden)


def _backward(rows: int, saved, cotangents):
    d_kernel, d_hidden = saved
    by = cotangents[0]

    def scaled(gradient):
        return None if gradient is None else (gradient * by).astype(gradient.dtype)

    return scaled(d_kernel), scaled(d_hidden), None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def columns_at_once(vocabulary: int) -> int:
    """Columns of the head whose gradient is made at once: one of up to 16 parts of whole tiles."""
    parts = [n for n in range(1, 17) if vocabulary % (n * 128) == 0]
    return vocabulary // max(parts, default=1)


def _gradient_by_columns(errors, pick, chunks, rows: int, width: int):
    """Sum over G and chunks of pick(i) [G,rows,D] x errors [G,N,V] -> [D,V], split like a head.

    width: D.
    """
    groups, _, vocabulary = errors.shape
    count = vocabulary if axis_size("tensor") > 1 else columns_at_once(vocabulary)

    def columns(first):
        def add(i, total):
            error = jax.lax.dynamic_slice(errors, (0, i * rows, first), (groups, rows, count))
            more = jnp.einsum("gnd,gnv->gdv", pick(i), error, preferred_element_type=jnp.float32)
            return total + more

        total = jax.lax.fori_loop(0, chunks, add, jnp.zeros((groups, width, count), jnp.float32))
        return constrain(total.astype(errors.dtype).sum(0), "fsdp", "tensor")

    parts = jax.lax.map(columns, jnp.arange(0, vocabulary, count))
    whole = jnp.moveaxis(parts, 0, 1).reshape(width, vocabulary)
    return constrain(whole, "fsdp", "tensor")


def _run_chunks(kernel, hidden, labels, weights, rows: int, wanted: tuple[bool, bool]):
    groups, length, width = hidden.shape
    order = jnp.argsort(weights == 0, axis=1, stable=True)  # rows that count come first
    chunks = -(-(weights != 0).sum(1).max() // rows)
    sorted_length = -(-length // rows) * rows
    padded = jnp.pad(order, ((0, 0), (0, sorted_length - length)))
    exists = jnp.arange(sorted_length) < length
    # Gathered once, not for every chunk; rows stay where they are.
    cast = constrain(kernel.astype(hidden.dtype), None, "tensor")
    hidden = constrain(hidden, BATCH_AXES, None, None)

    def pick(x, i):
        at = jax.lax.dynamic_slice_in_dim(padded, i * rows, rows, 1)
        return jax.vmap(lambda x, at: x[at])(x, at)

    def one(i, carry):
        nll, hits, errors, d_kernel, d_hidden = carry
        real = jax.lax.dynamic_slice_in_dim(exists, i * rows, rows)

        def put(into, value):
            return jax.lax.dynamic_update_slice_in_dim(into, value, i * rows, 1)

        x, weight = pick(hidden, i), pick(weights, i) * real
        logits = jnp.einsum("gnd,dv->gnv", x, cast, preferred_element_type=jnp.float32)
        logits = constrain(logits, BATCH_AXES, None, "tensor")
        label = jnp.maximum(pick(labels, i), 0)
        top = logits.max(-1)
        powers = jnp.exp(logits - top[..., None])
        sums = powers.sum(-1)
        chosen = jnp.take_along_axis(logits, label[..., None], -1)[..., 0]
        counts = (weight != 0).astype(jnp.float32)
        nll = put(nll, counts * (jnp.log(sums) + top - chosen))
        hits = put(hits, counts * (logits.argmax(-1) == label))
        if any(wanted):
            is_label = jnp.arange(logits.shape[-1]) == label[..., None]
            error = (powers / sums[..., None] - is_label) * weight[..., None]
            error = error.astype(x.dtype)
        if errors is not None:
            errors = put(errors, error)
        elif wanted[0]:
            d_kernel += jnp.einsum("gnd,gnv->gdv", x, error, preferred_element_type=jnp.float32)
        if wanted[1]:
            d_hidden = put(d_hidden, jnp.einsum("gnv,dv->gnd", error, cast))
        return nll, hits, errors, d_kernel, d_hidden

    flat = jnp.zeros((groups, sorted_length), jnp.float32)
    # Summed over devices, the kernel's gradient is made by columns: whole, in float32, each device
    # would hold it beside everything else. That needs the errors of all rows at once, and pays
    # where these take no more than it.
    is_smaller = sorted_length * hidden.dtype.itemsize <= width * 4
    by_columns = wanted[0] and groups > 1 and is_smaller
    errors = None
    if by_columns:
        errors = jnp.zeros((groups, sorted_length, kernel.shape[1]), hidden.dtype)
        errors = constrain(errors, BATCH_AXES, None, "tensor")
    d_kernel = None
    if wanted[0] and not by_columns:
        d_kernel = jnp.zeros((groups, *kernel.shape), jnp.float32)
    d_hidden = jnp.zeros((groups, sorted_length, width), hidden.dtype) if wanted[1] else None
    nll, hits, errors, d_kernel, d_hidden = jax.lax.fori_loop(
        0, chunks, one, (flat, flat, errors, d_kernel, d_hidden)
    )
    back = jnp.argsort(order, axis=1)

    def unsort(x):
        return jax.vmap(lambda x, at: x[at])(x, back)

    nll, hits = unsort(nll), unsort(hits)
    if by_columns:
        picked = functools.partial(pick, hidden)
        d_kernel = _gradient_by_columns(errors, picked, chunks, rows, width).astype(kernel.dtype)
    elif wanted[0]:
        d_kernel = d_kernel.sum(0).astype(kernel.dtype)
    if wanted[1]:
        d_hidden = unsort(d_hidden)
    return jnp.sum(weights * nll), nll, hits, d_kernel, d_hidden
