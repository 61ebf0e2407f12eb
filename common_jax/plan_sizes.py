"""Plans of devices that nothing is compiled for here: shapes and bytes alone."""

from __future__ import annotations

import jax

from common_jax.attention import planned_for
from common_jax.plan_text import human_bytes, state_rows
from common_jax.sharding import count_ways, merge_trees, split_tree
from common_jax.task import Task
from common_jax.topology import Machine, bytes_per_device, place

SHARE = 0.75  # of a GPU's memory that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says more


def size_rows(machine: Machine, mesh, task: Task) -> list[tuple[str, int]]:
    """(part, bytes a chip) of what a training step holds at least, workspace left out."""
    rows, config = state_rows(task, mesh), task.config
    gradient = dict(rows).get("parameters in training", 0)
    rows.append(("gradients", gradient))
    if config.optim.accumulate > 1:
        rows.append(("gradients of a microbatch", gradient))
    # Of an unknown device: attention without a kernel of its own.
    platform = machine.platform or "tpu"
    kept = kept_bytes(task, config.batch_size // config.optim.accumulate, platform)
    rows.append(("kept for the backward pass", kept // count_ways(mesh)))
    parts = task.sketch(mesh, config.batch_size).programs.values()
    others = [place(part.weights, part.rules, mesh) for part in parts if part.count]
    if others:
        rows.append(("held by other programs", bytes_per_device(others)))
    return rows


def judge(machine: Machine, least: float) -> str:
    """`fits`, `too close` or `does not fit`; "" for unknown devices. least: bytes a chip."""
    if not machine.limit:
        return ""
    return next(
        (
            word
            for word, share in (("fits", SHARE), ("too close", 1))
            if least <= share * machine.limit
        ),
        "does not fit",
    )


def describe_sizes(machine: Machine, mesh, task: Task) -> tuple[str, str]:
    """(paragraph, verdict) of the training step."""
    rows = size_rows(machine, mesh, task)
    least = sum(size for _, size in rows)
    lines = ["train (not compiled: shapes and bytes), a chip"]
    lines += [f"  {name:<28}{human_bytes(size):>12}" for name, size in rows]
    verdict = judge(machine, least)
    told = f" of {human_bytes(machine.limit)}: {verdict}" if verdict else ""
    lines.append(f"  {'at least':<28}{human_bytes(least):>12}{told}")
    if verdict == "too close":
        lines.append(
            f"  JAX takes {100 * SHARE:.0f} % of the memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION "
            "says more, and workspace comes on top"
        )
    cost = sum(task.flops().values()) * task.config.batch_size
    if cost and machine.chip:
        seconds = cost / (machine.count * machine.chip.flops)
        lines.append(f"  {cost:.3g} model FLOPs a step, at least {seconds:.3g} s")
    return "\n".join(lines), verdict


def kept_bytes(task: Task, rows: int, platform: str = "") -> int:
    """Bytes of the arrays that the backward pass of `rows` examples needs, parameters left out.

    platform: which attention is taken, see `attention.planned_for`.
    """
    sketch = task.sketch(None, rows)
    params, frozen = split_tree(sketch.params, task.trainable)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def residuals(params, frozen, state, batch, key):
        def total(params):
            merged = merge_trees(frozen, params)
            return task.loss(merged, state, batch, key, task.phase(0))[0]

        given = {id(leaf) for leaf in jax.tree.leaves((params, frozen, state, batch))}
        kept = jax.tree.leaves(jax.vjp(total, params)[1])
        return [leaf for leaf in kept if id(leaf) not in given and hasattr(leaf, "shape")]

    with planned_for(platform):
        kept = jax.eval_shape(residuals, params, frozen, sketch.state, sketch.batch, key)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
