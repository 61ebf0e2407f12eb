"""One optimiser step as a pure function: gradient, microbatches, update, moving average."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from common_jax.optim import update_ema
from common_jax.sharding import merge_trees
from common_jax.task import Task


class TrainState(NamedTuple):
    """Everything that training changes. `params` and `ema` hold the trainable leaves only."""

    step: Any
    params: Any
    ema: Any
    state: Any
    opt: Any


def make_step(task: Task, tx, config):
    """One optimiser step as a pure function (train_state, frozen, batch, key, phase)."""
    parts = config.optim.accumulate
    if parts > 1 and not task.accumulates:
        raise ValueError(
            f"optim.accumulate={parts}: this task uses BatchNorm, whose statistics belong to the "
            "whole batch and would change with the split; use optim.accumulate=1"
        )

    def gradient(params, state, frozen, batch, key, phase):
        def total(params):
            loss, weight, new, metrics = task.loss(
                merge_trees(frozen, params), state, batch, key, phase
            )
            return loss, (weight, new, metrics)

        (loss, aux), grads = jax.value_and_grad(total, has_aux=True)(params)
        return loss, aux, grads

    def accumulated(params, state, frozen, batch, key, phase):
        if parts == 1:
            return gradient(params, state, frozen, batch, key, phase)
        split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

        def one(carry, micro):
            state, loss, weight, grads = carry
            more, (w, state, metrics), g = gradient(params, state, frozen, micro, key, phase)
            return (state, loss + more, weight + w, jax.tree.map(jnp.add, grads, g)), metrics

        start = (state, jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (state, loss, weight, grads), metrics = jax.lax.scan(one, start, split)
        return loss, (weight, state, jax.tree.map(jnp.mean, metrics)), grads

    def step(train: TrainState, frozen, batch, key, phase):
        loss, (weight, state, metrics), grads = accumulated(
            train.params, train.state, frozen, batch, key, phase
        )
        weight = jnp.maximum(weight, 1e-9)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt = tx.update(grads, train.opt, train.params)
        params = optax.apply_updates(train.params, updates)
        ema = train.ema
        if config.optim.ema_decay:
            ema = update_ema(ema, params, train.step, config.optim.ema_decay)
        metrics = {"loss": loss / weight, "grad_norm": optax.tree.norm(grads), **metrics}
        return TrainState(train.step + 1, params, ema, state, opt), metrics

    return step
