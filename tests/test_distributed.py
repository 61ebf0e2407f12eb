"""Whose rows are whose; and what becomes of runs in several processes when something fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from common_jax import distributed
from common_jax.distributed import (
    JoinError,
    LostHostError,
    ask_first_for,
    blame_lost_host,
    check_same,
    check_same_examples,
    describe_place,
    find_cluster,
    find_share,
    gather_tree,
    join_processes,
    local_rows,
)
from common_jax.sharding import make_mesh, put_batch
from common_jax.train_loop import PREEMPTED, Pipeline, train
from common_jax.workdir import lock_workdir
from data.pipeline import eval_batches, train_batches
from tests.hosts import ROOT, find_port, read_run, run_hosts
from tests.linear_task import LinearTask, Points, linear_config

STEPS = 18
SETTINGS = {"optim.ema_decay": 0.9, "optim.steps": STEPS, "eval.every": 8, "checkpoint.every": 3}


# ------------------------------------------------------------------------------------ beginning
@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, ""),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "3"}, ""),  # the batch script, not srun
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, "SLURM"),
        ({"SLURM_STEP_NUM_TASKS": "1"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_WORKER_ID": "1"}, "TPU pod"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, "TPU pod"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ""),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
    ],
)
def test_a_process_knows_by_its_surroundings_that_it_is_one_of_several(environ, name):
    assert find_cluster(environ | {"JAX_PLATFORMS": "cpu"}) == name


def test_half_a_set_of_flags_is_refused():
    for flags in (("localhost:1", 2, None), (None, 2, None), (None, None, 0)):
        with pytest.raises(ValueError, match="--process_id belong together"):
            join_processes(*flags)


def test_a_process_alone_says_its_place_and_joins_nobody(capfd):
    join_processes(None, 1, None)
    told = capfd.readouterr().err
    assert told.startswith("host 0/1 (") and "2 of 2 devices, cpu" in told
    assert describe_place("SLURM") in told.replace(")", ", SLURM)", 1)
    assert not jax.distributed.is_initialized()


# ---------------------------------------------------------------------------------- whose rows
def test_processes_read_disjoint_shares_which_one_of_those_with_equal_rows_counts():
    apart = {0: {0, 1}, 1: {2, 3}}
    assert [find_share(apart, i) for i in (0, 1)] == [(0, 2, True), (1, 2, True)]
    # Devices of a torus are not ordered by process.
    woven = {0: {1, 3}, 1: {0, 2}}
    assert [find_share(woven, i) for i in (0, 1)] == [(1, 2, True), (0, 2, True)]
    # Four processes, tensor = 2 across processes: two hold the same rows.
    twins = {0: {0}, 1: {0}, 2: {1}, 3: {1}}
    found = [find_share(twins, i) for i in range(4)]
    assert found == [(0, 2, True), (0, 2, False), (1, 2, True), (1, 2, False)]
    with pytest.raises(ValueError, match=r"overlap and differ; choose mesh\.tensor"):
        find_share({0: {0, 1}, 1: {1, 2}}, 0)


def test_rows_of_a_global_array_come_back_as_they_were_put():
    for mesh in (make_mesh(), make_mesh(data=1, tensor=2), make_mesh(data=1, fsdp=2)):
        x = np.arange(12.0, dtype=np.float32).reshape(6, 2)
        there = put_batch({"x": x}, mesh)
        np.testing.assert_array_equal(local_rows(there)["x"], x)
        np.testing.assert_array_equal(np.asarray(gather_tree(there)["x"]), x)


# ------------------------------------------------------------------------------ several processes
def run_alone(workdir: Path, **changes) -> dict:
    config = linear_config(**SETTINGS | changes)
    assert train(LinearTask(config), config, str(workdir), PIPELINE) == 0
    return read_run(workdir)


PIPELINE = Pipeline(train_batches, eval_batches)


def assert_same_run(one: dict, other: dict) -> None:
    assert one["losses"].keys() == other["losses"].keys() == set(range(1, STEPS + 1))
    np.testing.assert_allclose(
        list(one["losses"].values()), list(other["losses"].values()), rtol=2e-6
    )
    assert one["results"] == other["results"]


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run_alone(tmp_path_factory.mktemp("whole"))


def test_a_run_of_two_processes_survives_kill_and_sigterm_of_either(whole, tmp_path):
    """kill -9 and SIGTERM of each process at random steps, and before the first one of a session;
    it ends on one process as if nothing had happened."""
    rng = np.random.default_rng(0)
    steps = [*map(int, rng.integers(2, 5, 3)), 0]
    for what, process, step in zip(["kill", "term"] * 2, (1, 0, 0, 1), steps):
        saved = saved_steps(tmp_path)
        ended = run_hosts(2, tmp_path, SETTINGS, {process: (what, step)})
        told = "\n".join(ended.errors)
        if what == "term":
            assert ended.statuses == [PREEMPTED, PREEMPTED], told
            assert "stopped by SIGTERM at step" in ended.errors[0]
        else:
            # Without process 0 JAX may abort the other before it can speak.
            lost = (LostHostError.status, -6) if process == 0 else (LostHostError.status,)
            assert ended.statuses[process] == -9 and ended.statuses[1 - process] in lost, told
        # The save before a kill may have been cut off too: what was whole counts.
        assert (f"continuing at step {saved[-1]} of" if saved else "starting at step 0") in told
        assert "host 0/2 (" in ended.errors[0] and "host 1/2 (" in ended.errors[1]
        assert what == "kill" or saved_steps(tmp_path)
    assert_same_run(run_alone(tmp_path), whole)


@pytest.mark.slow
def test_what_fails_in_one_process_ends_all_of_them_and_says_which(whole, tmp_path):
    """An error that only one raises; before it, a process that keeps the others waiting."""
    settings = SETTINGS | {"log.stall": 1.0, "data.workers": 1}
    ended = run_hosts(2, tmp_path, settings, {0: ("sleep", 1), 1: ("hurt", 4)})
    assert ended.statuses[1] == 1 and "OSError: this disk is broken" in ended.errors[1]
    assert ended.statuses[0] == LostHostError.status, ended.errors[0]
    assert "a process of this run is gone, or failed, in" in ended.errors[0]
    told = ended.errors[1]
    workers = json.loads(re.search(r"workers: (.*)", told)[1])
    assert workers and not any(Path(f"/proc/{pid}").exists() for pid in workers)
    # Silent: on a busy machine its watch does not run either.
    named = r"no progress for \d+ s at step \d+: host 0/2 \(.*\) is (in encoding of|silent since)"
    assert re.search(named, told), told
    assert_same_run(run_alone(tmp_path), whole)


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_all(whole, tmp_path):
    """One of two cannot read the newest; then four go on where the two were stopped.

    The two each hold half of a parameter, of its average and of its moments; the four, all of it.
    """
    halves = SETTINGS | {"mesh.data": 1, "mesh.fsdp": 2}
    assert run_hosts(2, tmp_path, halves, {0: ("term", 7)}).statuses == [PREEMPTED] * 2
    steps = saved_steps(tmp_path)
    ended = run_hosts(2, tmp_path, halves, {0: ("term", 5), 1: ("blind", 0)})
    assert ended.statuses == [PREEMPTED] * 2, ended.errors
    assert (
        f"host 1: checkpoint {tmp_path}/checkpoints/{steps[-1]} cannot be read" in ended.errors[1]
    )
    assert "another process cannot read its part" in ended.errors[0]
    assert f"continuing at step {steps[-2]} of" in ended.errors[0]
    assert run_hosts(4, tmp_path, SETTINGS).statuses == [0] * 4
    assert_same_run(read_run(tmp_path), whole)


@pytest.mark.slow
def test_a_process_with_fewer_files_is_named_and_nothing_is_trained(tmp_path):
    ended = run_hosts(2, tmp_path, SETTINGS, {1: ("fewer", 0)})
    assert ended.statuses == [1, 1]
    for told in ended.errors:
        assert "the number of training examples differs between the processes" in told
        assert "(host 1: 49; 1 of 2 hosts: 50)" in told
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_caches_are_built_together_or_refused_within_seconds(tmp_path):
    """One cache of two processes; a folder that is not shared; a process with other files."""
    settings = SETTINGS | {"data.cache_dir": str(tmp_path / "caches")}
    faults = {0: ("caches of 0", 0), 1: ("caches of 1", 0)}
    ended = run_hosts(2, tmp_path / "run", settings, faults, timeout=60)
    assert ended.statuses == [1, 1], ended.errors
    for told in ended.errors:
        assert "rows [0, 70, 149] 1 []" in told, told
        assert "is not one folder for all 2 processes: some did not see within 0.5 s" in told
        assert "the key of the latents cache (data, weights) differs between the" in told
    assert not list(tmp_path.glob("**/.shared-*"))


def test_a_process_with_other_files_is_named(monkeypatch):
    """Several processes, played by one: what they would send is given."""
    monkeypatch.setattr(jax, "process_count", lambda: 40)
    found = np.full(40, 7)
    monkeypatch.setattr(distributed, "_gather_exactly", lambda number: found)
    check_same("the number", 7)
    found[[3, 38]] = 8, 9
    with pytest.raises(
        ValueError, match=r"number differs .*\(host 3: 8, host 38: 9; 38 of 40 hosts"
    ):
        check_same("the number", 7)
    found[:19] = range(100, 119)
    with pytest.raises(ValueError, match=r"host 15: 115 and 4 more; 20 of 40 hosts: 7\)"):
        check_same("the number", 7)
    sent = []
    monkeypatch.setattr(distributed, "_gather_exactly", lambda n: sent.append(int(n)) or n)
    for fingerprint in ("one", "other"):
        points = Points(5, 0)
        points.fingerprint = fingerprint
        check_same_examples("training", points)
    assert sent[0] == sent[2] == 5 and sent[1] != sent[3] and max(sent) < 2**63


def test_what_fails_in_process_0_is_told_to_all(monkeypatch):
    def fail():
        raise OSError("no such disk")

    told = []
    monkeypatch.setattr(distributed, "tell_all", lambda value: told.append(value) or value)
    with pytest.raises(OSError, match="no such disk"):
        ask_first_for(fail, JoinError)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(distributed, "tell_all", lambda value: told[0])
    with pytest.raises(JoinError, match="process 0 could not go on: OSError: no such disk"):
        ask_first_for(fail, JoinError)


@pytest.mark.parametrize(
    ("told", "lost"),
    [
        ("UNAVAILABLE: connection closed by peer", True),
        ("INTERNAL: Gloo AllReduce failed", True),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes", False),
        ("INVALID_ARGUMENT: shapes differ", False),
        ("UNIMPLEMENTED: no such program", False),
        ("NOT_FOUND: no such file", False),
    ],
)
def test_what_a_process_does_wrong_by_itself_is_not_laid_on_another(monkeypatch, told, lost):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    kind = LostHostError if lost else jax.errors.JaxRuntimeError
    with pytest.raises(kind, match=told[:8]), blame_lost_host(lambda: "step of step 3"):
        raise jax.errors.JaxRuntimeError(told)


@pytest.mark.slow
def test_a_save_that_fails_in_one_process_ends_both(tmp_path):
    ended = run_hosts(2, tmp_path, SETTINGS, {1: ("full", 6)}, timeout=60)
    assert ended.statuses == [LostHostError.status, 1], ended.errors
    told = ended.errors[1]
    assert "CheckpointError: writing" in told and "failed at step 6: no space left" in told
    assert "Complete checkpoints kept there: [3]" in told


@pytest.mark.slow
def test_several_processes_score_the_checkpoint_that_all_of_them_can_read(tmp_path):
    """Process 0 chooses; the second process cannot read the best one."""
    settings = {"optim.ema_decay": 0.9}
    ended = run_hosts(2, tmp_path, settings, {0: ("eval", 0), 1: ("eval", 1)})
    assert ended.statuses == [0, 0], ended.errors
    assert f"host 1: checkpoint {tmp_path}/best/" in ended.errors[1]
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["checkpoint"] == "checkpoints/6" and found["selected_step"] == 6


@pytest.mark.slow
def test_a_second_run_in_several_processes_is_refused_by_all_and_changes_nothing(tmp_path):
    held = lock_workdir(tmp_path)
    ended = run_hosts(2, tmp_path, SETTINGS)
    held.close()
    assert ended.statuses == [1, 1]
    assert "is in use by process" in ended.errors[0]
    assert "process 0 could not go on: WorkdirError: workdir" in ended.errors[1]
    assert {p.name for p in tmp_path.iterdir()} == {".lock"}


def test_a_coordinator_that_is_not_there_is_named_after_a_time():
    code = "from common_jax.distributed import join_processes as j; j({}, 2, 1, seconds=2)"
    place = f"localhost:{find_port()}"
    command = [sys.executable, "-c", code.format(repr(place))]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0 and place in ended.stderr, ended.stderr
