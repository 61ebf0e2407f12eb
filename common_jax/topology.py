"""Programs of a run for a machine that is not here: compiled for a TPU slice, and what they cost.

Compiling for TPUs needs `libtpu` (extra `tpu-plan`), no TPU. It may end the process that does it:
`common_jax.plan` starts one for it.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from common_jax.attention import planned_for
from common_jax.chips import CHIPS, GIB, Chip, find_chip
from common_jax.flops import count_traced
from common_jax.hlo import Cost, read_program
from common_jax.optim import make_optimizer, make_schedule
from common_jax.sharding import (
    AXES,
    BATCH_AXES,
    check_batch,
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
TRAINING = ("train", "last")
LATE = 2**31 - 2  # a step by which every phase has been left


class OutOfMemoryError(RuntimeError):
    """The compiler refused a program: bytes it needs and bytes that a chip has for programs."""

    def __init__(self, used: float, limit: float):
        super().__init__(f"needs {used / GIB:.1f} GiB of {limit / GIB:.1f} GiB a chip")
        self.used, self.limit = used, limit


@dataclass(frozen=True)
class Machine:
    """`count` equal devices. chip: None if unknown; devices: None where nothing can be compiled.

    limit: bytes that programs may hold on each; None if unknown.
    """

    name: str
    chip: Chip | None
    count: int
    devices: Sequence | None = None
    limit: float | None = None

    @property
    def platform(self) -> str:
        """cpu, gpu or tpu; "" if unknown."""
        if self.devices is not None:
            return self.devices[0].platform
        return ("tpu" if self.chip.torus else "gpu") if self.chip else ""


@dataclass(frozen=True)
class Compiled:
    """A program of one device: bytes while it runs, its cost, seconds of compilation.

    arguments: state, weights and batch. peak: the most that is held at once, arguments included.
    held: what other programs of the run keep meanwhile. count: how often a step runs it. passes:
    see `Program`. model_flops: of all devices, nothing computed twice; 0 if not counted.
    """

    name: str
    arguments: int
    peak: int
    cost: Cost
    seconds: float
    count: int
    held: float = 0.0
    passes: int = 1
    model_flops: float = 0.0

    @property
    def total(self) -> float:
        """Bytes in use while it runs."""
        return self.peak + self.held


def find_machine(topology: str, mesh) -> Machine:
    """Machine of `v5e:8x8` (a TPU slice), `H200:8` (devices of one host), `here`, or "" (any).

    `mesh.dcn` slices of TPUs, each as large as `topology` says. Without a topology, the sizes in
    `mesh` say how many devices there are. Raises ValueError for an unknown chip or slice,
    RuntimeError without libtpu.
    """
    if not topology:
        sizes = [mesh[axis] for axis in AXES]
        if min(sizes) < 1:
            raise ValueError(f"--mesh: without --topology every size must be given, found {sizes}")
        return Machine("any device", None, math.prod(sizes))
    if topology == HERE:
        devices = jax.devices()
        chip, told = find_chip(devices[0].device_kind), devices[0].memory_stats() or {}
        limit = told.get("bytes_limit", chip and chip.hbm)
        return Machine(devices[0].device_kind, chip, len(devices), devices, limit)
    name, _, size = topology.partition(":")
    if name not in CHIPS:
        raise ValueError(f"--topology={topology}: {name!r} is not one of {', '.join(CHIPS)}, here")
    chip = CHIPS[name]
    if not chip.torus:
        if size and not size.isdigit():
            raise ValueError(f"--topology={topology}: use {name}:NUMBER, as in {name}:8")
        return Machine(topology, chip, int(size or 1), limit=chip.hbm)
    dims = size.split("x")
    if len(dims) != chip.torus or not all(dim.isdigit() for dim in dims):
        example = "x".join(["4"] * chip.torus)
        raise ValueError(f"--topology={topology}: {name} has slices such as {name}:{example}")
    if mesh.dcn < 1:
        raise ValueError(f"mesh.dcn={mesh.dcn}: with a slice of TPUs give the number of slices")
    lengths = tuple(map(int, dims))
    devices = _describe_slice(topology, chip, lengths, mesh.dcn)
    name = f"{mesh.dcn} x {topology}" if mesh.dcn > 1 else topology
    return Machine(name, chip, len(devices), devices, chip.hbm)


def _describe_slice(topology: str, chip: Chip, lengths: tuple, slices: int) -> Sequence:
    from jax.experimental import topologies

    settings = {}
    if chip.name == "v4":  # else every core is a device, which JAX no longer does on v4
        settings["chip_config_name"] = "megacore"
    if max(lengths) == 1:  # a host of one chip; by default hosts have four
        settings["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        settings["num_slices"] = slices
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **settings)
    except RuntimeError as error:
        told = str(error).splitlines()[0]
        raise RuntimeError(
            f"--topology={topology}: the TPU compiler is not available ({told}). Install the extra "
            "tpu-plan (libtpu); plan one slice at a time; look whether a slice of this shape exists"
        ) from error
    expected = slices * math.prod(lengths)
    if len(found.devices) != expected:
        raise RuntimeError(
            f"--topology={topology}: the compiler knows {len(found.devices)} devices in place of "
            f"{expected}; this version of libtpu cannot be planned with"
        )
    return found.devices


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
def list_programs(task: Task, mesh) -> dict[str, int]:
    """{name: how often a step runs it} of what can be compiled, in the order of a step.

    `last` is the training step of the last phase where that differs from the first, `train`.
    """
    parts = task.sketch(mesh, task.config.batch_size).programs
    named = {name: part.count for name, part in parts.items() if part.count}
    named["train"] = 1
    if task.phase(0) != task.phase(LATE):
        named["last"] = 1
    return named | {"eval": 0} | {name: 0 for name, part in parts.items() if not part.count}


def check_program(task: Task, mesh, name: str) -> None:
    """Raises ValueError for an unknown name, and where the mesh is not one to run it on."""
    known = list_programs(task, mesh)
    if name not in known:
        raise ValueError(f"--programs: {name!r} is not one of {', '.join(known)}")
    if name == "eval":
        check_batch(count_rows(task.config, name), mesh, "eval.batch_size")
    if name != "eval" and not known[name] and mesh.size > 1:
        raise ValueError(
            f"--programs={name}: this runs on one device, and the mesh has {mesh.size}; plan it "
            "alone for a single chip, as in --topology=v5e:1x1"
        )


def compile_program(task: Task, mesh, name: str) -> Compiled:
    """One program of a run, compiled for the devices of `mesh`: one of `list_programs`.

    Raises OutOfMemoryError where the compiler refuses it, ValueError as `check_program` does.
    """
    check_program(task, mesh, name)
    sketch = task.sketch(mesh, count_rows(task.config, name))
    part = sketch.programs.get(name, Program(None, {}, sketch.batch))
    with planned_for(mesh.devices.flat[0].platform):
        if name in TRAINING:
            traced = _trace_train(task, sketch, mesh, task.phase(0 if name == "train" else LATE))
        elif name == "eval":
            traced = _trace_eval(task, sketch, mesh)
        else:
            traced = _trace(part, mesh)
        lowered = traced.lower()
    start = time.perf_counter()
    compiled = _compile(lowered)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    cost, flops = _cost(compiled, traced, mesh)
    arguments = memory.argument_size_in_bytes
    weights = arguments - bytes_per_device(place_batch(part.batch, mesh))
    held = max(resident_bytes(task, sketch, mesh, name) - weights, 0)
    if name in TRAINING:  # its own count has what the backward pass computes again
        flops = task.flops().get(name, 0.0) * task.config.batch_size
    peak = memory.peak_memory_in_bytes
    return Compiled(
        name, arguments, peak, cost, seconds, part.count, held, part.passes, flops * part.passes
    )


def _cost(compiled, traced, mesh):
    """(what the compiled text tells, operations of all devices as traced)."""
    cost, flops = read_program(compiled.as_text(), mesh.shape["dcn"]), count_traced(traced.jaxpr)
    if cost.library_calls:
        cost = dataclasses.replace(cost, flops=max(cost.flops, flops / mesh.size))
    return cost, flops


def count_rows(config, name: str) -> int:
    """Examples in the batch of a program."""
    return config.eval.batch_size or config.batch_size if name == "eval" else config.batch_size


def resident_bytes(task: Task, sketch: Sketch, mesh, name: str) -> int:
    """Bytes a device of all that stays there between the programs of a run that has `name`."""
    parts = sketch.programs
    if name in parts and not parts[name].count:  # a run of its own
        return bytes_per_device(place(parts[name].weights, parts[name].rules, mesh))
    state, frozen, _ = sketch_state(task, sketch, mesh)
    kept = [place(part.weights, part.rules, mesh) for part in parts.values() if part.count]
    return bytes_per_device((state, frozen, kept))


def _trace_train(task: Task, sketch: Sketch, mesh, phase):
    state, frozen, tx = sketch_state(task, sketch, mesh)
    key = place(jax.eval_shape(lambda: jax.random.key(0)), (), mesh)
    step = jit_step(task, tx, task.config, state)
    return step.trace(state, frozen, place_batch(sketch.batch, mesh), key, phase)


def _trace_eval(task: Task, sketch: Sketch, mesh):
    state, frozen, _ = sketch_state(task, sketch, mesh)
    predict = jax.jit(
        on_mesh(mesh, task.predict),
        static_argnums=3,
        out_shardings=(NamedSharding(mesh, P(BATCH_AXES)), replicated(mesh)),
    )
    params, batch = merge_trees(frozen, state.params), place_batch(sketch.batch, mesh)
    return predict.trace(params, state.state, batch, task.phase(0, train=False))


def _trace(part: Program, mesh):
    weights = place(part.weights, part.rules, mesh)
    return jax.jit(on_mesh(mesh, part.function)).trace(weights, place_batch(part.batch, mesh))


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
