"""Optimisers and learning-rate schedules from `config.optim`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from common_jax.sharding import paths


def count_steps(optim, *, examples: int, batch_size: int) -> int:
    """Length of a run: `optim.steps`, or what `optim.epochs` need (batches straddle epochs)."""
    return optim.steps or max(1, math.ceil(optim.epochs * examples / batch_size))


def make_schedule(optim, *, examples: int, batch_size: int):
    """Learning rate as a function of the step.

    `epoch_cosine` is the published SatDiFuser schedule: constant inside an epoch, linear warm-up
    from `warmup_lr` over `warmup_epochs`, then cosine from `lr` to `min_lr` at `epochs`.
    `cosine` does the same per step; `constant` only warms up. `warmup_share` > 0 is the length of
    the warm-up as a part of all steps, rounded up, instead of `warmup_epochs`.
    Epoch of step k is k * batch_size // examples.
    """
    kinds = ("epoch_cosine", "cosine", "constant")
    if optim.schedule not in kinds:
        raise ValueError(f"optim.schedule={optim.schedule!r} is unknown; use one of {kinds}")
    per_epoch = optim.schedule == "epoch_cosine"
    epochs = optim.steps * batch_size / examples if optim.steps else optim.epochs
    warmup = float(optim.warmup_epochs)
    if optim.warmup_share:
        steps = count_steps(optim, examples=examples, batch_size=batch_size)
        warmup = math.ceil(optim.warmup_share * steps) * batch_size / examples

    def schedule(step):
        epoch = step * (batch_size / examples)
        if per_epoch:
            # Integer arithmetic: a float product may fall just below a whole epoch.
            epoch = (jnp.asarray(step, jnp.int32) * batch_size // examples).astype(jnp.float32)
        rising = optim.warmup_lr + (optim.lr - optim.warmup_lr) * epoch / max(warmup, 1e-9)
        if optim.schedule == "constant":
            return jnp.where(epoch < warmup, rising, optim.lr)
        end = max(epochs - warmup, 1e-9)
        turn = jnp.clip((epoch - warmup) / end, 0, 1)
        falling = optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * turn))
        return jnp.where(epoch < warmup, rising, falling)

    return schedule


def make_optimizer(optim, schedule, factors: Sequence = ()) -> optax.GradientTransformation:
    """`adam` adds weight decay to the gradient (L2, the published recipe); `adamw` decouples it.

    factors: (regex on parameter paths, factor of the learning rate); the first match counts.
    """
    adam = {"b1": optim.b1, "b2": optim.b2, "eps": optim.eps}
    parts = [optax.clip_by_global_norm(optim.clip)] if optim.clip else []
    if optim.name == "adam":
        if optim.weight_decay:
            parts.append(optax.add_decayed_weights(optim.weight_decay))
        parts.append(optax.adam(schedule, **adam))
    elif optim.name == "adamw":
        parts.append(optax.adamw(schedule, weight_decay=optim.weight_decay, **adam))
    else:
        raise ValueError(f"optim.name={optim.name!r} is unknown; use adam or adamw")
    if factors:
        parts.append(_scale_by_path(factors))
    return optax.chain(*parts)


def _scale_by_path(factors: Sequence) -> optax.GradientTransformation:
    def update(updates, params=None):
        def factor(path: str) -> float:
            return next((f for pattern, f in factors if re.search(pattern, path)), 1.0)

        leaves, structure = jax.tree.flatten(updates)
        scaled = [leaf * factor(path) for leaf, path in zip(leaves, paths(updates))]
        return jax.tree.unflatten(structure, scaled)

    return optax.stateless(update)


def update_ema(ema, params, step, decay: float):
    """Exponential average with the DiffusionSat ramp min(decay, (1 + step) / (10 + step))."""
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - rate) * (p - e), ema, params)
