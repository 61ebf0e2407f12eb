"""What `launch.py plan` says: tables of parts, of memory and exchanges of compiled programs."""

from __future__ import annotations

import math

import jax

from common_jax.chips import GIB
from common_jax.hlo import Cost
from common_jax.network import axes_of, send_rate
from common_jax.task import PlanRow, Task
from common_jax.topology import (
    TRAINING,
    Compiled,
    Machine,
    bytes_per_device,
    place_batch,
    sketch_state,
)


def count(shapes) -> tuple[int, int, int]:
    """(parameters, tensors, bytes) of a tree of ShapeDtypeStruct or arrays."""
    leaves = jax.tree.leaves(shapes)
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    return sum(sizes), len(leaves), sum(n * leaf.dtype.itemsize for n, leaf in zip(sizes, leaves))


def human_bytes(n: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def plan_table(rows: list[PlanRow], optimizer_copies: int = 2) -> str:
    """Text table of parameters, tensors and bytes; trainable parts show what training adds.

    optimizer_copies: arrays of a parameter's size that the optimiser keeps (2 for Adam).
    """
    lines = [f"{'part':<24}{'parameters':>15}{'tensors':>9}{'weights':>12}{'training':>12}  note"]
    totals = [0, 0, 0, 0]
    for row in rows:
        parameters, tensors, size = count(row.shapes)
        # Gradients and optimiser moments are kept in float32 beside the parameters.
        training = 4 * parameters * (1 + optimizer_copies) if row.trainable else 0
        for i, value in enumerate((parameters, tensors, size, training)):
            totals[i] += value
        lines.append(
            f"{row.name:<24}{parameters:>15,}{tensors:>9}{human_bytes(size):>12}"
            f"{human_bytes(training) if training else '-':>12}  {row.note}"
        )
    lines.append(
        f"{'total':<24}{totals[0]:>15,}{totals[1]:>9}{human_bytes(totals[2]):>12}"
        f"{human_bytes(totals[3]):>12}"
    )
    extras = [(name, size) for row in rows for name, size in row.extra_bytes.items()]
    if extras:
        lines += ["", "beside the parameters"]
        lines += [f"  {name:<46}{human_bytes(size):>12}" for name, size in extras]
    return "\n".join(lines)


# --------------------------------------------------------------------------------- compiled ahead
def describe_setting(machine: Machine, mesh, config) -> str:
    """Machine, mesh and batch in a line."""
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    memory = f", {machine.chip.hbm / GIB:.5g} GiB each" if machine.chip else ""
    parts = config.optim.accumulate
    accumulated = f" in {parts} microbatches" if parts > 1 else ""
    chips = "1 chip" if machine.count == 1 else f"{machine.count} chips"
    return f"{machine.name}: {chips}{memory}; mesh {sizes}; batch {config.batch_size}{accumulated}"


def state_rows(task: Task, mesh) -> list[tuple[str, int]]:
    """(part, bytes a chip) of what a training step is given."""
    sketch = task.sketch(mesh, task.config.batch_size)
    state, frozen, _ = sketch_state(task, sketch, mesh)
    parts = {
        "parameters in training": state.params,
        "optimiser": state.opt,
        "moving average": state.ema,
        "frozen parameters": frozen,
        "batch": place_batch(sketch.batch, mesh),
    }
    rows = [(name, bytes_per_device(tree)) for name, tree in parts.items()]
    return [(name, size) for name, size in rows if size]


def describe_program(machine: Machine, mesh, task: Task, compiled: Compiled) -> str:
    """Memory, exchanges and the shortest time of one program."""
    times = f", {compiled.count} times a step" if compiled.count > 1 else ""
    limit = f" of {human_bytes(machine.limit)}" if machine.limit else ""
    lines = [
        f"{compiled.name}{times} (compiled in {compiled.seconds:.0f} s): "
        f"{human_bytes(compiled.total)}{limit} a chip"
    ]
    rows = state_rows(task, mesh) if compiled.name in TRAINING else []
    rows = rows or [("weights and batch", compiled.arguments)]
    rows.append(("activations and workspace", compiled.peak - compiled.arguments))
    if compiled.held:
        rows.append(("held by other programs", compiled.held))
    lines += [f"  {name:<28}{human_bytes(size):>12}" for name, size in rows]
    cost = compiled.cost
    if cost.collectives:
        lines.append(f"  {'exchange':<20}{'over':<14}{'times':>7}{'sent a chip':>14}{'time':>10}")
    for made in sorted(cost.collectives, key=lambda c: -c.bytes):
        seconds = made.bytes / send_rate(machine, mesh, made) if machine.chip else math.nan
        lines.append(
            f"  {made.kind:<20}{axes_of(made, mesh):<14}{made.count:>7.0f}"
            f"{human_bytes(made.bytes):>14}{1e3 * seconds:>7.1f} ms"
        )
    if cost.open_loops:
        lines.append(f"  {cost.open_loops} loops of a length that depends on data count once")
    if cost.library_calls:
        lines.append(
            f"  {cost.library_calls} products are calls of a library: arithmetic is that of the "
            "traced program"
        )
    if machine.chip:
        lines += describe_roofline(machine, mesh, compiled)
    return "\n".join(lines)


def describe_roofline(machine: Machine, mesh, compiled: Compiled) -> list[str]:
    """The shortest time by arithmetic, memory and network, if they overlap perfectly."""
    chip, cost, model = machine.chip, compiled.cost, compiled.model_flops
    seconds = roofline(machine, mesh, cost)
    slowest = max(seconds, key=seconds.get)
    parts = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
    lines = [f"  at least {1e3 * seconds[slowest]:.1f} ms by {slowest} ({parts})"]
    if compiled.passes > 1:
        total = 1e3 * compiled.passes * seconds[slowest]
        lines.append(f"  that is the first pass; {compiled.passes} passes: at least {total:.1f} ms")
    lines.append(
        f"  a chip: {cost.flops:.3g} FLOPs, {human_bytes(cost.hbm_bytes)} through its memory"
    )
    if model and cost.flops:
        share = model / (machine.count * cost.flops * compiled.passes)
        mfu = model / (machine.count * chip.flops * compiled.passes * seconds[slowest])
        lines.append(
            f"  model FLOPs {model:.3g} ({100 * share:.0f} % of what is computed): "
            f"MFU at most {100 * mfu:.0f} %"
        )
    return lines


def roofline(machine: Machine, mesh, cost: Cost) -> dict[str, float]:
    """Seconds that arithmetic, memory and network each need alone."""
    network = sum(made.bytes / send_rate(machine, mesh, made) for made in cost.collectives)
    return {
        "arithmetic": cost.flops / machine.chip.flops,
        "memory": cost.hbm_bytes / machine.chip.hbm_bandwidth,
        "network": network,
    }


def describe_step(machine: Machine, mesh, made: list[Compiled]) -> str:
    """The programs that a step runs one after another, and the shortest time of all."""
    training = [one for one in made if one.name in TRAINING][-1:]  # the last phase is the longest
    parts = [one for one in made if one.name not in TRAINING] + training
    times = {one.name: one.count * max(roofline(machine, mesh, one.cost).values()) for one in parts}
    told = " + ".join(f"{name} {1e3 * value:.1f} ms" for name, value in times.items())
    return f"a step: {told} = at least {1e3 * sum(times.values()):.1f} ms"


def describe_fit(changes: dict, needed: float | None) -> str:
    """The nearest setting in which a program fits, and the bytes of a chip that it needs there."""
    if needed is not None:
        return f"  fits with {list_changes(changes)}: {human_bytes(needed)} a chip"
    tried = f"nothing near it fits, not even {list_changes(changes)}"
    return (
        f"  {tried if changes else 'no setting makes it smaller'}; take more chips, or larger ones"
    )


def list_changes(changes: dict) -> str:
    """As they are given on the command line."""
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())
