"""Several processes of one run on this machine, with faults that come at a chosen step.

`run_hosts` starts them; each is `python tests/hosts.py PORT PROCESS COUNT WORKDIR SETTINGS FAULT`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Ended(NamedTuple):
    """Exit statuses and stderr of all processes; 124 where one did not end in time."""

    statuses: list[int]
    errors: list[str]


def find_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run_hosts(count, workdir, changes=None, faults=None, devices=1, timeout=600) -> Ended:
    """Runs the linear task in `count` processes of `devices` devices each.

    changes: settings of linear_config. faults: {process: (what, step)}, see `Faulty`.
    """
    # The last of two values counts: those of the suite compile faster.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    port, hosts = find_port(), []
    for process in range(count):
        words = [port, process, count, workdir, json.dumps(changes or {})]
        words.append(json.dumps((faults or {}).get(process, ["", 0])))
        command = [sys.executable, "tests/hosts.py", *map(str, words)]
        hosts.append(
            subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        )
    late, limit = [], time.monotonic() + timeout
    try:
        for host in hosts:
            with contextlib.suppress(subprocess.TimeoutExpired):
                host.communicate(timeout=max(0.0, limit - time.monotonic()))
        late = [host for host in hosts if host.poll() is None]
    finally:
        for host in hosts:
            host.kill()
    errors = [host.communicate()[1] for host in hosts]
    return Ended([124 if host in late else host.returncode for host in hosts], errors)


def read_run(workdir: Path) -> dict:
    """Losses by step and final scores of a finished run."""
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((workdir / "results.json").read_text())
    del results["seconds"]
    losses = {x["step"]: x["train/loss"] for x in lines if "train/loss" in x}
    return {"losses": losses, "results": results}


def make_faulty(what: str, step: int):
    """LinearTask that does `what` while the batch of a step (from 0) is on its way.

    kill, term: this process gets SIGKILL or SIGTERM. sleep: 4 seconds go by. fewer: one example is
    missing here, other: they have another fingerprint. hurt: an exception that only this process
    raises. blind: the newest checkpoint cannot be read here. full: nor can the one of `step` be
    written. report: it takes 5 seconds, more than JAX waits at the end. eval: after the run it is
    scored, by processes of which the second cannot read its best checkpoint. caches, or caches
    that fewer see: see `make_caches`.
    """
    import multiprocessing

    import orbax.checkpoint as ocp

    from common_jax import checkpoint
    from tests.linear_task import LinearTask, Points

    class Faulty(LinearTask):
        calls = 0
        sharding_rules = (("linear/kernel", ("fsdp", None)),)

        def train_source(self):
            points = Points(self.config.data.examples - (what == "fewer"), 0)
            points.fingerprint += what if what == "other" else ""
            return points

        def prepare(self, mesh, batches):
            if what.startswith("caches"):
                make_caches(Path(self.config.data.cache_dir), what)
            if what == "blind":
                read, seen = ocp.CheckpointManager.restore, []

                def restore(manager, at, args=None):
                    seen.append(at)
                    if len(seen) == 1:
                        raise ValueError("these bytes are damaged")
                    return read(manager, at, args=args)

                ocp.CheckpointManager.restore = restore
            if what == "full":
                write = ocp.CheckpointManager.save

                def save(manager, at, **kwargs):
                    if at >= step:
                        while not any(p.name.isdigit() for p in manager.directory.iterdir()):
                            time.sleep(0.01)  # until an earlier one is complete
                        raise OSError("no space left on this disk")
                    return write(manager, at, **kwargs)

                ocp.CheckpointManager.save = save
            if what == "eval" and step:
                read_parts = checkpoint._read_parts

                def read_some(folder, at, parts):
                    if folder.name == "best":
                        raise ValueError("these bytes are damaged")
                    return read_parts(folder, at, parts)

                checkpoint._read_parts = read_some

        def report(self, params, state, results, workdir):
            assert params["linear"]["kernel"].shape == (2, 3)
            time.sleep(5 * (what == "report"))

        def encode(self, batch):
            if "mask" not in batch:
                if self.calls == step:
                    self.happen()
                self.calls += 1
            return batch

        def happen(self):
            if what in ("kill", "term"):
                os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGTERM)
                time.sleep(0.0 if what == "kill" else 1.5)  # JAX looks for the signal every second
            if what == "sleep":
                time.sleep(4)
            if what == "hurt":
                workers = [worker.pid for worker in multiprocessing.active_children()]
                print(f"workers: {workers}", file=sys.stderr)
                raise OSError("this disk is broken")

    return Faulty


def make_caches(root: Path, what: str) -> None:
    """A cache in a folder of all processes; one apart; one of data that differ where `what` says.

    The last two are refused: the first of them is said on stderr, the second ends the process.
    """
    import jax
    import numpy as np

    from satdifuser_jax.cache_spec import CacheError, CacheSpec, Field
    from satdifuser_jax.feature_source import check_shared, open_finished, open_or_build

    def batches(wanted):
        yield {"index": np.arange(len(wanted)), "mask": np.ones(len(wanted), bool)}

    def spec_of(source: str) -> CacheSpec:
        return CacheSpec("latents", 150, (Field("row", (), "int32"),), {"source": source})

    def build(spec: CacheSpec):
        return open_or_build(root, batches, lambda batch: [batch["index"]], spec)

    found = build(spec_of("same")).read([0, 70, 149])
    whole = open_finished(root, (spec_of("same"),))
    # One process finds this whole, the other does not: neither may use it.
    other = spec_of("same" if jax.process_index() else "absent")
    print(f"rows {found[0].tolist()} {len(whole)} {open_finished(root, (other,))}", file=sys.stderr)
    try:
        check_shared(root / f"apart{jax.process_index()}", seconds=0.5)
    except CacheError as error:
        print(f"CacheError: {error}", file=sys.stderr)
    build(spec_of(what))


def main(port, process, count, workdir, changes, fault) -> int:
    from absl import flags

    flags.FLAGS.mark_as_parsed()
    from common_jax import distributed
    from common_jax.distributed import LostHostError, join_processes, leave
    from common_jax.evaluate import evaluate_workdir
    from common_jax.train_loop import Pipeline, train
    from data.pipeline import eval_batches, train_batches
    from tests.linear_task import linear_config

    if json.loads(fault)[0] == "report":
        distributed.SHUTDOWN_SECONDS = 3
    try:
        alone = int(count) == 1
        place = (None, 1, None) if alone else (f"localhost:{port}", int(count), int(process))
        join_processes(*place)
        config = linear_config(**json.loads(changes))
        task = make_faulty(*json.loads(fault))(config)
        status = train(task, config, workdir, Pipeline(train_batches, eval_batches))
        if json.loads(fault)[0] == "eval":
            evaluate_workdir(task, workdir, eval_batches)
        return status
    except Exception as error:  # as launch.py does
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return leave(error.status if isinstance(error, LostHostError) else 1)


if __name__ == "__main__":
    sys.modules["torch"] = None  # tensorboardX would import it, which takes as long as the run
    sys.path.insert(0, str(ROOT))
    sys.exit(main(*sys.argv[1:]))
