"""`launch.py plan`: what a run holds and needs, before it has a machine; no weights are read.

Parts and sizes come from abstract shapes. With a topology or a mesh, the programs of the run are
compiled for it (`topology.py`) and told as memory, exchanges and the shortest possible time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from common_jax.chips import CHIPS
from common_jax.plan_fit import compile_fitting, find_fit
from common_jax.plan_sizes import describe_sizes
from common_jax.plan_text import describe_fit, describe_program, describe_setting, describe_step
from common_jax.sharding import AXES, check_batch
from common_jax.topology import (
    OutOfMemoryError,
    check_program,
    find_machine,
    lay_out_mesh,
    list_programs,
)

CHILD = "EO_PLAN_CHILD"  # set in the process that compiles for TPUs


def plan_run(build: Callable, config, topology: str, programs: Sequence[str] = ()) -> Iterator[str]:
    """What the programs of a run need on a machine, and what they can reach there: a paragraph
    each, told as soon as it is known.

    build: config -> Task. topology: see `topology.find_machine`. programs: none are all that a
    step runs. Where one does not fit, the nearest setting in which it does is looked for. Raises
    ValueError where mesh, batch and machine do not fit together.
    """
    machine, task = find_machine(topology, config.mesh), build(config)
    mesh = lay_out_mesh(machine, config.mesh)
    check_batch(config.batch_size, mesh)
    yield describe_setting(machine, mesh, config)
    if machine.devices is None:
        yield from _plan_sizes(build, config, machine, programs)
        return
    known = list_programs(task, mesh)
    chosen = programs or [name for name, count in known.items() if count]
    for name in chosen:
        check_program(task, mesh, name)
    made = []
    for name in chosen:
        print(f"compiling {name}; this takes minutes", file=sys.stderr, flush=True)
        try:
            made.append(compile_fitting(machine, mesh, task, name))
            yield describe_program(machine, mesh, task, made[-1])
        except OutOfMemoryError as error:
            yield f"{name}: does not fit, it {error}"
            can_shrink = known[name] or name == "eval"  # by settings; a run of its own has none
            found = find_fit(build, config, machine, name) if can_shrink else ({}, None)
            yield describe_fit(*found)
    in_step = [one for one in made if known[one.name]]
    if machine.chip and len(in_step) > 1 and len(in_step) == sum(map(bool, known.values())):
        yield describe_step(machine, mesh, in_step)


def _plan_sizes(build: Callable, config, machine, programs: Sequence[str]) -> Iterator[str]:
    mesh = lay_out_mesh(machine, config.mesh)
    told, verdict = describe_sizes(machine, mesh, build(config))
    yield told
    if verdict in ("too close", "does not fit"):
        yield describe_fit(*find_fit(build, config, machine, "train"))
    if programs:
        yield "--programs is not looked at: nothing is compiled, the training step alone is told"


def run_in_child(topology: str) -> int | None:
    """Exit status of this same command in a process of its own, for a TPU slice; else None.

    The TPU compiler may end the process that it runs in. Raises RuntimeError where it did.
    """
    name = topology.partition(":")[0]
    if name not in CHIPS or not CHIPS[name].torus or os.environ.get(CHILD):
        return None
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
    # Of this machine, not of the one that is planned: libtpu complains where it finds none.
    quiet |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}
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
