"""The nearest setting in which a program of a plan fits the memory of the machine."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator

from common_jax.plan_sizes import SHARE, judge, size_rows
from common_jax.plan_text import list_changes
from common_jax.task import Task
from common_jax.topology import (
    TRAINING,
    Compiled,
    Machine,
    OutOfMemoryError,
    compile_program,
    lay_out_mesh,
)


def compile_fitting(machine: Machine, mesh, task: Task, name: str) -> Compiled:
    """`compile_program`; OutOfMemoryError also where it fits only without what others hold."""
    compiled = compile_program(task, mesh, name)
    if machine.limit and compiled.total > machine.limit:
        raise OutOfMemoryError(compiled.total, machine.limit)
    return compiled


def find_fit(build: Callable, config, machine: Machine, name: str):
    """(changes, bytes a chip) of the nearest setting where program `name` fits; (changes, None) if
    none does, with the last that was tried.

    build: config -> Task. Nearest: nothing but what is computed again or where parameters lie, then
    more microbatches, then a smaller batch. Each is compiled, or counted by shapes and bytes where
    nothing can be compiled. A setting that is refused is passed over, its mesh for good.
    """
    tried, seen, keeps_mesh = {}, [{}], False
    for changes in neighbours(config, machine, name, build(config).accumulates):
        if keeps_mesh:
            changes = {k: v for k, v in changes.items() if not k.startswith("mesh.")}
        if changes in seen:
            continue
        seen.append(changes)
        changed = config.copy_and_resolve_references().unlock()
        changed.update_from_flattened_dict(changes)
        try:
            return changes, _need(build(changed.lock()), machine, name)
        except OutOfMemoryError as error:
            tried = changes
            print(f"tried {list_changes(changes)}: {error}", file=sys.stderr, flush=True)
        except ValueError as error:
            keeps_mesh |= any(key.startswith("mesh.") for key in changes)
            print(f"passed over {list_changes(changes)}: {error}", file=sys.stderr, flush=True)
    return tried, None


def _need(task: Task, machine: Machine, name: str) -> float:
    """Bytes a chip where it fits, else OutOfMemoryError."""
    mesh = lay_out_mesh(machine, task.config.mesh)
    if machine.devices is not None:
        return compile_fitting(machine, mesh, task, name).total
    least = sum(size for _, size in size_rows(machine, mesh, task))
    if judge(machine, least) != "fits":
        raise OutOfMemoryError(least, SHARE * machine.limit)
    return least


def neighbours(
    config, machine: Machine, name: str = "train", accumulates: bool = True
) -> Iterator[dict]:
    """Settings {key: value} to try for a program, the nearest first; each is complete by itself."""
    mesh, parts = config.mesh, config.optim.accumulate
    again = _computed_again(config) if name in TRAINING else {}
    share = machine.count // max(mesh.tensor * mesh.dcn, 1)
    split = {"mesh.data": 1, "mesh.fsdp": share} if mesh.fsdp not in (-1, share) else {}
    alone = [changes for changes in (again, split) if changes]
    yield from alone
    both = again | split
    if len(alone) > 1:
        yield both
    key = "eval.batch_size" if name == "eval" and config.eval.batch_size else "batch_size"
    ways = max(machine.count // max(mesh.tensor, 1), 1)
    rows = (config.eval.batch_size if key != "batch_size" else config.batch_size) // ways
    is_split = name in TRAINING and accumulates
    for count in range(parts + 1, rows + 1) if is_split else ():
        if rows % count == 0:
            yield both | {"optim.accumulate": count}
    while rows > 1:
        rows //= 2
        changes = both | {key: rows * ways}
        if (
            is_split
        ):  # in one piece: microbatches need a second gradient, and a row at a time failed
            changes["optim.accumulate"] = 1
        elif parts > 1 and key == "batch_size":
            changes["optim.accumulate"] = math.gcd(parts, rows)
        yield changes


def _computed_again(config) -> dict:
    """More of the forward pass, a second time in the backward pass."""
    now = config.model.get("remat")
    if now is False:
        return {"model.remat": True}
    return {"model.remat": "full"} if now in ("none", "dots") else {}
