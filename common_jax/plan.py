"""`launch.py plan`: what a run holds and needs, before it has a machine; no weights are read.

Parts and sizes come from abstract shapes. With a topology or a mesh, the programs of the run are
compiled for it (`topology.py`) and told as memory, exchanges and the shortest possible time.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import jax

from common_jax.chips import CHIPS, GIB
from common_jax.hlo import Cost
from common_jax.sharding import AXES, check_batch, merge_trees, split_tree
from common_jax.task import PlanRow, Task
from common_jax.topology import (
    Compiled,
    Machine,
    OutOfMemoryError,
    axes_of,
    bytes_per_device,
    compile_program,
    count_rows,
    find_machine,
    lay_out_mesh,
    place_batch,
    send_rate,
    sketch_state,
)

CHILD = "EO_PLAN_CHILD"  # set in the process that compiles for TPUs


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
def plan_run(build: Callable, config, topology: str, programs: Sequence[str]) -> Iterator[str]:
    """What the programs of a run need on a machine, and what they can reach there: a paragraph
    each, told as soon as it is known.

    build: config -> Task. topology: see `topology.find_machine`. Where the training step does not
    fit, the nearest setting that does is looked for, a compilation each. Raises ValueError where
    mesh, batch and machine do not fit together.
    """
    machine, task = find_machine(topology, config.mesh), build(config)
    mesh = lay_out_mesh(machine, config.mesh)
    check_batch(config.batch_size, mesh)
    yield describe_setting(machine, mesh, config)
    if machine.devices is None:
        yield describe_sizes(machine, mesh, task)
        return
    for name in programs:
        try:
            print(f"compiling {name}; this takes minutes", file=sys.stderr, flush=True)
            yield describe_program(machine, mesh, task, compile_program(task, mesh, name))
        except OutOfMemoryError as error:
            verdict = f"{name}: does not fit, it {error}"
            if name == "train":
                verdict += "\n" + describe_fit(*find_fit(build, config, machine))
            yield verdict


def run_in_child(topology: str) -> int | None:
    """Exit status of this same command in a process of its own, for a TPU slice; else None.

    The TPU compiler may end the process that it runs in. Raises RuntimeError where it did.
    """
    name = topology.partition(":")[0]
    if name not in CHIPS or not CHIPS[name].torus or os.environ.get(CHILD):
        return None
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
    env = os.environ | quiet | {"JAX_PLATFORMS": "cpu", CHILD: "1"}
    status = subprocess.run([sys.executable, *sys.argv], env=env).returncode
    if status < 0:
        raise RuntimeError(f"the TPU compiler ended with signal {-status}; try a smaller program")
    return status


def set_mesh(mesh, sizes: Sequence[str]) -> None:
    """Sizes as in `fsdp=64` into `config.mesh`; axes that are not named become 1."""
    given = {axis: size for axis, _, size in (word.partition("=") for word in sizes)}
    unknown = [axis for axis, size in given.items() if axis not in AXES or not is_size(size)]
    if unknown:
        raise ValueError(f"--mesh: {unknown[0]}={given[unknown[0]]}; axes are {', '.join(AXES)}")
    if given:
        mesh.update({axis: int(given.get(axis, 1)) for axis in AXES})


def is_size(text: str) -> bool:
    return text == "-1" or (text.isdigit() and text != "0")


def describe_setting(machine: Machine, mesh, config) -> str:
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    memory = f", {machine.chip.hbm / GIB:.0f} GiB each" if machine.chip else ""
    parts = config.optim.accumulate
    accumulated = f" in {parts} microbatches" if parts > 1 else ""
    return (
        f"{machine.name}: {machine.count} chips{memory}; mesh {sizes}; "
        f"batch {config.batch_size}{accumulated}"
    )


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


def describe_sizes(machine: Machine, mesh, task: Task) -> str:
    """Shapes and bytes alone, for devices that nothing is compiled for here."""
    rows = state_rows(task, mesh)
    rows.append(("gradients", rows[0][1]))
    kept = kept_bytes(task, task.config.batch_size // task.config.optim.accumulate)
    rows.append(("kept for the backward pass", kept // machine.count))
    least = sum(size for _, size in rows)
    lines = ["train (not compiled: shapes and bytes), a chip"]
    lines += [f"  {name:<28}{human_bytes(size):>12}" for name, size in rows]
    limit = machine.chip and machine.chip.hbm
    verdict = ""
    if limit:
        verdict = f" of {human_bytes(limit)}: " + ("may fit" if least < limit else "does not fit")
    lines.append(f"  {'at least':<28}{human_bytes(least):>12}{verdict}")
    cost = sum(task.flops().values())
    if cost and machine.chip:
        seconds = cost * task.config.batch_size / (machine.count * machine.chip.flops)
        lines.append(f"  {cost * task.config.batch_size:.3g} model FLOPs, at least {seconds:.3g} s")
    return "\n".join(lines)


def kept_bytes(task: Task, rows: int) -> int:
    """Bytes of the arrays that the backward pass of `rows` examples needs, parameters left out."""
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

    kept = jax.eval_shape(residuals, params, frozen, sketch.state, sketch.batch, key)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


def describe_program(machine: Machine, mesh, task: Task, compiled: Compiled) -> str:
    """Memory, exchanges and the shortest time of one program."""
    times = f", {compiled.count} times a step" if compiled.count > 1 else ""
    limit = f" of {human_bytes(machine.chip.hbm)}" if machine.chip else ""
    lines = [
        f"{compiled.name}{times} (compiled in {compiled.seconds:.0f} s): "
        f"{human_bytes(compiled.peak)}{limit} a chip"
    ]
    rows = state_rows(task, mesh) if compiled.name == "train" else []
    rows = rows or [("weights and batch", compiled.arguments)]
    rows.append(("activations and workspace", compiled.peak - compiled.arguments))
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
    if machine.chip:
        lines += describe_roofline(machine, mesh, task, compiled)
    return "\n".join(lines)


def describe_roofline(machine: Machine, mesh, task: Task, compiled: Compiled) -> list[str]:
    """The shortest time by arithmetic, memory and network, if they overlap perfectly."""
    chip, cost = machine.chip, compiled.cost
    seconds = roofline(machine, mesh, cost)
    slowest = max(seconds, key=seconds.get)
    parts = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
    lines = [f"  at least {1e3 * seconds[slowest]:.1f} ms by {slowest} ({parts})"]
    lines.append(
        f"  a chip: {cost.flops:.3g} FLOPs, {human_bytes(cost.hbm_bytes)} through its memory"
    )
    model = task.flops().get(compiled.name, 0.0) / compiled.count
    if model:
        model *= count_rows(task.config, compiled.name)
        mfu = model / (machine.count * chip.flops * seconds[slowest])
        share = model / (machine.count * cost.flops)
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


# ------------------------------------------------------------------------------- what would fit
def find_fit(build: Callable, config, machine: Machine):
    """(changes, Compiled) of the nearest setting whose training step fits; (changes, None) if none.

    Nearest: nothing but what is computed again or where parameters lie, then more microbatches,
    then a smaller batch.
    """
    tried = {}
    for changes in neighbours(config, machine):
        changed = config.copy_and_resolve_references().unlock()
        changed.update_from_flattened_dict(changes)
        mesh = lay_out_mesh(machine, changed.mesh)
        tried = changes
        try:
            return changes, compile_program(build(changed.lock()), mesh, "train")
        except OutOfMemoryError as error:
            print(f"tried {_list(changes)}: {error}", file=sys.stderr, flush=True)
    return tried, None


def neighbours(config, machine: Machine) -> Iterator[dict]:
    """Settings {key: value} to try, the nearest first; each set is complete by itself."""
    mesh = config.mesh
    remat = {"model.remat": "full"} if config.model.get("remat") in ("none", "dots") else {}
    share = machine.count // max(mesh.tensor * mesh.dcn, 1)
    split = {"mesh.data": 1, "mesh.fsdp": share} if mesh.fsdp not in (-1, share) else {}
    alone = [changes for changes in (remat, split) if changes]
    yield from alone
    both = remat | split
    if len(alone) > 1:
        yield both
    ways = max(machine.count // max(mesh.tensor, 1), 1)
    parts, rows = config.optim.accumulate, config.batch_size // ways
    while rows % (2 * parts) == 0:
        parts *= 2
        yield both | {"optim.accumulate": parts}
    while rows > 1:
        rows //= 2
        yield both | {"optim.accumulate": 1, "batch_size": rows * ways}


def describe_fit(changes: dict, compiled: Compiled | None) -> str:
    if compiled is None:
        return f"  nothing near it fits, not even {_list(changes)}; take more chips, or larger ones"
    return f"  fits with {_list(changes)}: {human_bytes(compiled.peak)} a chip"


def _list(changes: dict) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())
