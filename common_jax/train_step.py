"""One optimiser step as a pure function: gradient, microbatches, update, moving average."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from common_jax.compiler import compiler_options
from common_jax.optim import update_ema
from common_jax.sharding import (
    count_ways,
    merge_trees,
    on_mesh,
    put_tree,
    replicated,
    split_tree,
    tree_shardings,
)
from common_jax.task import Task


class TrainState(NamedTuple):
    """Everything that training changes. `params` and `ema` hold the trainable leaves only."""

    step: Any
    params: Any
    ema: Any
    state: Any
    opt: Any


def start_state(task: Task, tx, config, mesh) -> tuple[TrainState, Any]:
    """(state before step 1, frozen parameters), made by `task.init` and placed on the mesh.

    What the optimiser and the moving average keep of a parameter lies where the parameter lies.
    """
    rules = task.sharding_rules

    def place(tree, rules=rules):
        return put_tree(tree, tree_shardings(tree, rules, mesh))

    params, state = task.init(config.seed)
    params, frozen = map(place, split_tree(params, task.trainable))
    where = tree_shardings(jax.eval_shape(tx.init, params), rules, mesh)
    opt = jax.jit(tx.init, out_shardings=where)(params)
    ema = jax.tree.map(jnp.copy, params) if config.optim.ema_decay else {}
    step = place(jnp.zeros((), jnp.int32))
    return TrainState(step, params, ema, place(state, ()), opt), frozen


def shapes_of(train: TrainState) -> TrainState:
    """Abstract arrays of the same shapes, types and places."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), train
    )


def jit_step(task: Task, tx, config, like: TrainState):
    """`make_step` as one program: (train_state, frozen, batch, key, phase), the last one static.

    like: arrays, or abstract ones with shardings. What the step returns lies where they lie, and
    the memory of the state that it is given is used again. Compile it with `.lower(...).compile()`.
    """
    where = jax.tree.map(lambda x: x.sharding, like)
    mesh = where.step.mesh
    ways = count_ways(mesh) * config.optim.accumulate
    if config.optim.accumulate > 1 and config.batch_size % ways:
        raise ValueError(
            f"batch_size={config.batch_size} does not split into optim.accumulate="
            f"{config.optim.accumulate} microbatches over {count_ways(mesh)} devices; use a "
            f"multiple of {ways}"
        )
    on_cpu = mesh.devices.flat[0].platform == "cpu"  # not when compiled ahead for another platform
    return jax.jit(
        on_mesh(mesh, make_step(task, tx, config, where.params)),
        static_argnums=4,
        donate_argnums=0,
        out_shardings=(where, replicated(mesh)),
        compiler_options=compiler_options() if on_cpu else {},
    )


def make_step(task: Task, tx, config, where=None):
    """One optimiser step as a pure function (train_state, frozen, batch, key, phase).

    where: shardings of the trainable parameters, which gradients take over as soon as they are
    there: each device then keeps its part of their sum, never the whole.
    """
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
        return loss, aux, grads if where is None else jax.lax.with_sharding_constraint(grads, where)

    def accumulated(params, state, frozen, batch, key, phase):
        if parts == 1:
            return gradient(params, state, frozen, batch, key, phase)
        # Every n-th row, so that the rows of a microbatch lie on all devices already.
        split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

        def one(carry, micro):
            state, loss, weight, grads = carry
            more, (w, state, metrics), g = gradient(params, state, frozen, micro, key, phase)
            return (state, loss + more, weight + w, jax.tree.map(jnp.add, grads, g)), metrics

        start = (state, jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (state, loss, weight, grads), metrics = jax.lax.scan(one, start, split)
        return loss, (weight, state, jax.tree.map(lambda x: jnp.sum(x, 0), metrics)), grads

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
        means = {name: total / jnp.maximum(n, 1e-9) for name, (total, n) in metrics.items()}
        metrics = {"loss": loss / weight, "grad_norm": optax.tree.norm(grads), **means}
        return TrainState(train.step + 1, params, ema, state, opt), metrics

    return step
