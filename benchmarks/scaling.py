"""Weak scaling on meshes and in several processes: equal steps, and what devices exchange.

    python -m benchmarks.scaling [--steps=10] [--rows=2] [--systems=geodit,unet] [--out=FILE.json]

Every run is the training loop on a tiny model and the built-in scenes, with `rows` examples a
device. The table has the largest relative differences of losses and gradient norms to those of 1
device with the same batch, and for 8 devices the bytes that each sends in a step as the compiled
program says, beside those that sums of gradients and split parameters cannot do without
(`least_bytes`), whatever the batch. Programs for CPUs have no reduce-scatter: a sum
of which every device needs a part costs there what a whole one costs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common_jax.files import write_json
from common_jax.report import format_table
from tests.hosts import ROOT, find_port

SYSTEMS = ("geodit", "unet")
ALONE = "1 device"
# processes, devices of each, sizes of the mesh
CASES = {
    ALONE: (1, 1, {}),
    "8 devices": (1, 8, {"data": 8}),
    "8 devices, fsdp 4": (1, 8, {"data": 2, "fsdp": 4}),
    "8 devices, fsdp 2, tensor 2": (1, 8, {"data": 2, "fsdp": 2, "tensor": 2}),
    "8 devices, dcn 2, fsdp 2": (1, 8, {"dcn": 2, "data": 2, "fsdp": 2}),
    "2 processes, fsdp 2": (2, 1, {"data": 1, "fsdp": 2}),
    "4 processes, fsdp 2": (4, 1, {"data": 2, "fsdp": 2}),
}


# ------------------------------------------------------------------------------ inside a process
def make_task(system: str, case: str, batch: int, steps: int):
    """Task of a tiny run without evaluation, on scenes."""
    from configs import geodit_sft, satdifuser_pretrain
    from geodit_jax.task import GeoDiTTask
    from satdifuser_jax.pretrain import PretrainTask

    is_geodit = system == "geodit"
    config = (geodit_sft if is_geodit else satdifuser_pretrain).get_config("tiny")
    changes = {"batch_size": batch, "optim.steps": steps, "eval.every": steps, "data.size": 64}
    changes |= {"data.val": "none", "eval.select": ""} if is_geodit else {"eval.samples": 0}
    changes |= {f"mesh.{axis}": size for axis, size in CASES[case][2].items()}
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return (GeoDiTTask if is_geodit else PretrainTask)(config)


def run_process(system: str, case: str, batch: int, steps: int, workdir: str, place: list) -> int:
    """One process of a run; with several devices it also writes what they exchange."""
    from absl import flags

    flags.FLAGS.mark_as_parsed()
    from common_jax.distributed import join_processes
    from common_jax.train_loop import Pipeline, train
    from data.pipeline import eval_batches, train_batches

    port, process, count = place
    join_processes(*((f"localhost:{port}", count, process) if count > 1 else (None, 1, None)))
    task = make_task(system, case, batch, steps)
    status = train(task, task.config, workdir, Pipeline(train_batches, eval_batches))
    if CASES[case][1] > 1:
        found = count_exchanged(make_task(system, case, batch, steps))
        write_json(Path(workdir) / "exchanged.json", found)
    return status


def count_exchanged(task) -> dict[str, float]:
    """Bytes that a device sends in a step: by the program, by `least_bytes`; of all parameters."""
    import jax

    from common_jax.sharding import open_mesh
    from common_jax.topology import compile_program, sketch_state

    mesh = open_mesh(task.config.mesh)
    program = compile_program(task, mesh, "train")
    params = sketch_state(task, task.sketch(mesh, task.config.batch_size), mesh)[0].params
    by_kind: dict[str, float] = {}
    for made in program.cost.collectives:
        by_kind[made.kind] = by_kind.get(made.kind, 0.0) + made.bytes
    return {
        "sent": sum(by_kind.values()),
        "least": least_bytes(params, mesh),
        "parameters": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)),
        **by_kind,
    }


def least_bytes(params, mesh) -> float:
    """Bytes that a device must send in a step for its trained parameters, by rings of n devices.

    A sum that all need costs 2 (n-1)/n of an array, one of which each needs its part half of that,
    and so does gathering an array from its parts, which happens before its first use. What tensor
    parallelism exchanges of activations comes on top, and is not counted here.
    """
    import jax

    shape, total = dict(mesh.shape), 0.0
    outer = shape["dcn"] * shape["data"]
    for leaf in jax.tree.leaves(params):
        part = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        axes = {axis for entry in leaf.sharding.spec for axis in _names(entry)}
        ways = shape["fsdp"] if "fsdp" in axes else 1
        sums = outer * shape["fsdp"] // ways  # devices that hold the same part
        total += 2 * (ways - 1) * part + 2 * (sums - 1) / sums * part
    return total


def _names(entry) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


# ------------------------------------------------------------------------------------ around them
def run_case(system: str, case: str, batch: int, steps: int, folder: Path) -> dict:
    """Losses and gradient norms of one run, and what was exchanged where that is known."""
    count, devices, _ = CASES[case]
    workdir, port = folder / system / f"{case} of {batch}".replace(" ", "_"), find_port()
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    processes = []
    for process in range(count):
        inner = json.dumps([system, case, batch, steps, str(workdir), [port, process, count]])
        command = [sys.executable, "-m", "benchmarks.scaling", f"--inside={inner}"]
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        )
    try:
        errors = [process.communicate()[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{system}, {case}: {errors[-1][-3000:]}")
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {
        name: [x[f"train/{name}"] for x in lines if f"train/{name}" in x]
        for name in ("loss", "grad_norm")
    }
    exchanged = workdir / "exchanged.json"
    return found | (json.loads(exchanged.read_text()) if exchanged.exists() else {})


def compare(found: dict, alone: dict, name: str) -> float:
    if len(found[name]) != len(alone[name]):
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in zip(found[name], alone[name]))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=2, help="examples a device")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--out", default="")
    parser.add_argument("--inside", default="", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.inside:
        return run_process(*json.loads(given.inside))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for system in given.systems.split(","):
            alone: dict[int, dict] = {}
            for case, (count, devices, _) in CASES.items():
                if case == ALONE:
                    continue
                batch = given.rows * count * devices
                settings = batch, given.steps, Path(folder)
                alone[batch] = alone.get(batch) or run_case(system, ALONE, *settings)
                found = run_case(system, case, *settings)
                row = {"system": system, "run": case, "batch": batch}
                row["last loss"] = found["loss"][-1]
                for name in ("loss", "grad_norm"):
                    row[f"{name} differs"] = compare(found, alone[batch], name)
                if "sent" in found:
                    row |= {name: found[name] / 2**20 for name in ("parameters", "sent", "least")}
                    row["exchanged"] = {k: v for k, v in found.items() if "-" in k}
                print(json.dumps(row), file=sys.stderr, flush=True)
                rows.append(row)
    sizes = [(name, ".2f") for name in ("parameters", "sent", "least")]
    differences = [("loss differs", ".1e"), ("grad_norm differs", ".1e")]
    columns = ["system", "run", "batch", ("last loss", ".6f"), *differences, *sizes]
    title = f"{given.steps} steps, {given.rows} examples a device; MiB held and sent by each a step"
    print(format_table(rows, columns, title=title))
    if given.out:
        write_json(Path(given.out), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
