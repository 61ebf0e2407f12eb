"""The starts of several processes, with stand-ins for the programs of the clusters."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORDS = ["--config=configs/geodit_sft.py:size=8b,data=mmrs", "--workdir=/a folder/run"]


def start(script, folder: Path, programs: dict[str, str], words, **environ):
    """Runs a script with only `programs` ({name: bash}) in its way; (status, what they noted)."""
    tools = folder / "bin"
    tools.mkdir()
    for name, body in programs.items():
        path = folder / name if "/" in name else tools / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\nNOTES={folder}/notes\n{body}\n")
        path.chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / "scripts" / script), *words]
    done = subprocess.run(
        command, cwd=folder, env={"PATH": path, "HOME": str(folder)} | environ, timeout=30
    )
    return done.returncode, (folder / "notes").read_text().splitlines()


# Runs what it is given for the machines, on this one.
GCLOUD = 'for word; do [ "${word%%=*}" = --command ] && bash -c "${word#*=}"; done'

# Notes its words one a line, then ends with the statuses of STATUSES in turn, then with 0.
COUNTED = """printf '%s\\n' "$@" >> $NOTES
left=$(cat STATUSES 2>/dev/null); echo "${left#* }" > STATUSES; exit ${left%% *}"""


POD = {"gcloud": GCLOUD, ".venv/bin/python": COUNTED, "sleep": 'echo "sleep $1" >> $NOTES'}
ONCE = ["launch.py", "train", *WORDS]


def start_pod(folder, **environ):
    place = {"TPU": "slice", "ZONE": "zone", "CHECKOUT": str(folder)}
    return start("tpu_pod.sh", folder, POD, WORDS, **place, **environ)


def test_a_pod_starts_again_after_a_stop_but_not_after_an_error(tmp_path):
    (tmp_path / "STATUSES").write_text("75 69 134 1 0")
    assert start_pod(tmp_path) == (1, [*ONCE, "sleep 10"] * 3 + ONCE)


def test_a_pod_does_not_start_again_forever(tmp_path):
    (tmp_path / "STATUSES").write_text("69 " * 9)
    assert start_pod(tmp_path, RESTARTS="2") == (69, [*ONCE, "sleep 10"] * 2 + ONCE)


def test_training_on_a_pod_outlives_the_connection_and_is_followed_again(tmp_path):
    """The first connection is cut; the second finds the run and starts no other."""
    slow = "echo begun $# >> $NOTES; echo a line; while [ ! -e go ]; do /bin/sleep 0.1; done"
    cut = """for word; do case $word in --command=*)
    timeout --signal=KILL 1 bash -c "${word#*=}"; esac; done; exit 9"""
    programs = POD | {"gcloud": cut, ".venv/bin/python": slow}
    environ = {"TPU": "slice", "ZONE": "zone", "CHECKOUT": str(tmp_path)}
    assert start("tpu_pod.sh", tmp_path, programs, WORDS, **environ)[0] == 9
    (tmp_path / "go").touch()
    again = subprocess.run(
        ["bash", str(ROOT / "scripts" / "tpu_pod.sh"), *WORDS],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)} | environ,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "a line" in again.stdout
    assert (tmp_path / "notes").read_text().splitlines() == ["begun 4"]


# Starts a process for each of STATUSES, one after the other, and gives the highest, as srun does.
SRUN = """most=0
for _ in $(cat STATUSES); do "$@"; last=$?; [ $last -gt $most ] && most=$last; done; exit $most"""


@pytest.mark.parametrize(
    ("ended", "status", "requeued"),
    [
        ("0 0", 0, False),
        ("75 75", 75, True),
        ("69 75", 75, True),
        ("69 134", 134, True),
        ("1 69", 1, False),  # one failed by itself: it would again
        ("134 1 69", 1, False),
        ("2 69", 2, False),
    ],
)
def test_a_slurm_job_queues_itself_again_unless_a_process_failed(tmp_path, ended, status, requeued):
    programs = {"srun": SRUN, ".venv/bin/python": COUNTED, "scontrol": 'echo "$@" >> $NOTES'}
    (tmp_path / "STATUSES").write_text(ended)
    found, notes = start("slurm.sh", tmp_path, programs, WORDS, SLURM_JOB_ID="7")
    assert found == status
    assert notes[:4] == ONCE
    assert notes[4 * len(ended.split()) :] == (["requeue 7"] if requeued else [])


def test_sigterm_of_slurm_reaches_python_and_its_status_is_passed_on(tmp_path):
    stops = "trap 'echo saved >> $NOTES; exit 75' TERM; kill -TERM $PPID; kill -TERM $$; exit 3"
    programs = {"srun": '"$@"', ".venv/bin/python": stops, "scontrol": 'echo "$@" >> $NOTES'}
    found = start("slurm.sh", tmp_path, programs, WORDS, SLURM_JOB_ID="7")
    assert found == (75, ["saved", "requeue 7"])


def test_a_slurm_job_does_not_queue_itself_forever(tmp_path):
    programs = {"srun": "touch $NOTES; exit 75", "scontrol": 'echo "$@" >> $NOTES'}
    environ = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "100"}
    assert start("slurm.sh", tmp_path, programs, WORDS, **environ) == (75, [])


def test_a_workload_is_restarted_on_the_statuses_of_a_stop_and_of_a_lost_machine(tmp_path):
    environ = {"CLUSTER": "c", "TPU_TYPE": "v5litepod-64", "IMAGE": "i:1"}
    programs = {"xpk": 'printf "%s\\n" "$@" >> $NOTES'}
    status, notes = start("xpk.sh", tmp_path, programs, ["my-run", *WORDS], **environ)
    assert status == 0 and "--restart-on-exit-codes=69,75" in notes
    assert "--workload=my-run" in notes
    command = next(word for word in notes if word.startswith("--command="))
    said = subprocess.run(
        ["bash", "-c", command.removeprefix("--command=").replace("python", "printf '%s\\n'", 1)],
        capture_output=True,
        text=True,
    )
    assert said.stdout.splitlines() == ["launch.py", "train", *WORDS]
