"""Programs of a run for a machine that is not here: compiled for a TPU slice, and what they cost.

Compiling for TPUs needs `libtpu` (extra `tpu-plan`), no TPU. It may end the process that does it:
`common_jax.plan` starts one for it.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from common_jax.chips import CHIPS, GIB, Chip, find_chip
from common_jax.hlo import Collective, Cost, read_program
from common_jax.optim import make_optimizer, make_schedule
from common_jax.sharding import (
    AXES,
    BATCH_AXES,
    merge_trees,
    on_mesh,
    open_mesh,
    replicated,
    split_tree,
    tree_shardings,
)
from common_jax.task import Program, Sketch, Task
from common_jax.train_step import TrainState, jit_step

HERE = "here"


class OutOfMemoryError(RuntimeError):
    """The compiler refused a program: bytes it needs and bytes that a chip has for programs."""

    def __init__(self, used: float, limit: float):
        super().__init__(f"needs {used / GIB:.1f} GiB of {limit / GIB:.1f} GiB a chip")
        self.used, self.limit = used, limit


@dataclass(frozen=True)
class Machine:
    """`count` equal devices. chip: None if unknown; devices: None where nothing can be compiled."""

    name: str
    chip: Chip | None
    count: int
    devices: Sequence | None = None


@dataclass(frozen=True)
class Compiled:
    """A program of one device: bytes while it runs, its cost, seconds of compilation.

    arguments: state, weights and batch. peak: the most that is held at once, arguments included.
    count: how often a step runs it.
    """

    name: str
    arguments: int
    peak: int
    cost: Cost
    seconds: float
    count: int


def find_machine(topology: str, mesh) -> Machine:
    """Machine of `v5e:8x8` (a TPU slice), `H200:8` (devices of one host), `here`, or "" (any).

    Without a topology, the sizes in `mesh` say how many devices there are. Raises ValueError for
    an unknown chip or slice, RuntimeError without libtpu.
    """
    if not topology:
        sizes = [mesh[axis] for axis in AXES]
        if min(sizes) < 1:
            raise ValueError(f"--mesh: without --topology every size must be given, found {sizes}")
        return Machine("any device", None, math.prod(sizes))
    if topology == HERE:
        devices = jax.devices()
        chip = find_chip(devices[0].device_kind)
        return Machine(devices[0].device_kind, chip, len(devices), devices)
    name, _, size = topology.partition(":")
    if name not in CHIPS:
        raise ValueError(f"--topology={topology}: {name!r} is not one of {', '.join(CHIPS)}, here")
    chip = CHIPS[name]
    if not chip.torus:
        if size and not size.isdigit():
            raise ValueError(f"--topology={topology}: use {name}:NUMBER, as in {name}:8")
        return Machine(topology, chip, int(size or 1))
    dims = size.split("x")
    if len(dims) != chip.torus or not all(dim.isdigit() for dim in dims):
        example = "x".join(["4"] * chip.torus)
        raise ValueError(f"--topology={topology}: {name} has slices such as {name}:{example}")
    return Machine(topology, chip, math.prod(map(int, dims)), _describe_slice(topology))


def _describe_slice(topology: str) -> Sequence:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except RuntimeError as error:
        told = str(error).splitlines()[0]
        raise RuntimeError(
            f"--topology={topology}: the TPU compiler is not available ({told}). Install the extra "
            "tpu-plan (libtpu); plan one slice at a time; look whether a slice of this shape exists"
        ) from error


def lay_out_mesh(machine: Machine, mesh):
    """Mesh of the machine's devices, or an abstract one where it has none."""
    if machine.devices is not None:
        return open_mesh(mesh, machine.devices)
    sizes = [mesh[axis] for axis in AXES]
    rest = math.prod(size for size in sizes if size != -1)
    sizes = [machine.count // rest if size == -1 else size for size in sizes]
    if math.prod(sizes) != machine.count:
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes))} does not cover {machine.count} devices; choose --mesh "
            "sizes whose product is that number"
        )
    return AbstractMesh(tuple(sizes), AXES)


# ---------------------------------------------------------------------------------------- arguments
def place(tree, rules, mesh):
    """Abstract arrays where `rules` say."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        tree_shardings(tree, rules, mesh),
    )


def place_batch(batch, mesh):
    """Abstract arrays with their rows on the axes of the batch."""
    where = NamedSharding(mesh, P(BATCH_AXES))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), batch
    )


def sketch_state(task: Task, sketch: Sketch, mesh):
    """(TrainState, frozen parameters, optimiser) as `start_state` would make them, abstract."""
    config, rules = task.config, task.sharding_rules
    # The length of an epoch changes numbers of the schedule, not the program.
    sizes = {"examples": config.batch_size, "batch_size": config.batch_size}
    tx = make_optimizer(config.optim, make_schedule(config.optim, **sizes), task.lr_factors)
    params, frozen = split_tree(sketch.params, task.trainable)
    step = jax.ShapeDtypeStruct((), "int32")
    state = TrainState(
        place(step, (), mesh),
        place(params, rules, mesh),
        place(params, rules, mesh) if config.optim.ema_decay else {},
        place(sketch.state, (), mesh),
        place(jax.eval_shape(tx.init, params), rules, mesh),
    )
    return state, place(frozen, rules, mesh), tx


def bytes_per_device(tree) -> int:
    """Bytes that one device holds of placed abstract arrays."""
    leaves = jax.tree.leaves(tree)
    parts = (math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    return sum(size * leaf.dtype.itemsize for size, leaf in zip(parts, leaves))


# --------------------------------------------------------------------------------------- compiling
def compile_program(task: Task, mesh, name: str) -> Compiled:
    """One program of a run, compiled for the devices of `mesh`: `train`, `eval`, or one that the
    task sketches beside them. Raises OutOfMemoryError, ValueError for an unknown name."""
    sketch = task.sketch(mesh, count_rows(task.config, name))
    known = ("train", "eval", *sketch.programs)
    if name not in known:
        raise ValueError(f"--programs: {name!r} is not one of {', '.join(known)}")
    if name == "train":
        lowered, count = _lower_train(task, sketch, mesh), 1
    elif name == "eval":
        lowered, count = _lower_eval(task, sketch, mesh), 1
    else:
        lowered, count = _lower(sketch.programs[name], mesh), sketch.programs[name].count
    start = time.perf_counter()
    compiled = _compile(lowered)
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), read_program(compiled.as_text())
    arguments = memory.argument_size_in_bytes
    return Compiled(name, arguments, memory.peak_memory_in_bytes, cost, seconds, count)


def count_rows(config, name: str) -> int:
    """Examples in the batch of a program."""
    return config.batch_size if name == "train" else config.eval.batch_size or config.batch_size


def _lower_train(task: Task, sketch: Sketch, mesh):
    state, frozen, tx = sketch_state(task, sketch, mesh)
    key = place(jax.eval_shape(lambda: jax.random.key(0)), (), mesh)
    step = jit_step(task, tx, task.config, state)
    return step.lower(state, frozen, place_batch(sketch.batch, mesh), key, task.phase(0))


def _lower_eval(task: Task, sketch: Sketch, mesh):
    state, frozen, _ = sketch_state(task, sketch, mesh)
    predict = jax.jit(
        on_mesh(mesh, task.predict),
        static_argnums=3,
        out_shardings=(NamedSharding(mesh, P(BATCH_AXES)), replicated(mesh)),
    )
    params, batch = merge_trees(frozen, state.params), place_batch(sketch.batch, mesh)
    return predict.lower(params, state.state, batch, task.phase(0, train=False))


def _lower(program: Program, mesh):
    weights = place(program.weights, program.rules, mesh)
    return jax.jit(on_mesh(mesh, program.function)).lower(weights, place_batch(program.batch, mesh))


def _compile(lowered):
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        told = r"Used {0} of {0} hbm|temporaries \({0}\) exceeds available HBM \({0}\)"
        found = re.search(told.format(r"([\d.]+[KMG])"), str(error))
        if not found:
            raise
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}
        used, limit = (float(size[:-1]) * unit[size[-1]] for size in found.groups() if size)
        raise OutOfMemoryError(used, limit) from error


# ---------------------------------------------------------------------------------------- network
def axes_of(collective: Collective, mesh) -> str:
    """Mesh axes along which its devices differ, as in `data+fsdp`."""
    places = np.array(np.unravel_index(collective.group, mesh.devices.shape))
    varies = (places != places[:, :1]).any(axis=1)
    return "+".join(axis for axis, moves in zip(mesh.axis_names, varies) if moves)


def send_rate(machine: Machine, mesh, collective: Collective) -> float:
    """Bytes a second that one device can send to the others of its group.

    In a torus, a dimension that the group spans gives two links a chip where it closes to a ring
    and one where it does not.
    """
    chip, group = machine.chip, mesh.devices.flatten()[list(collective.group)]
    if not chip.torus:
        return chip.link_bandwidth
    everywhere = np.array([device.coords for device in mesh.devices.flat])
    inside = np.array([device.coords for device in group])
    links = 0
    for axis in range(everywhere.shape[1]):
        length, whole = (len(set(places[:, axis])) for places in (inside, everywhere))
        if length > 1:
            links += 2 if length == whole and length >= chip.wraps_from else 1
    return max(links, 1) * chip.link_bandwidth
