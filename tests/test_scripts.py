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


def test_a_pod_starts_again_after_a_stop_but_not_after_an_error(tmp_path):
    programs = {
        "gcloud": GCLOUD,
        ".venv/bin/python": COUNTED,
        "sleep": 'echo "sleep $1" >> $NOTES',
    }
    (tmp_path / "STATUSES").write_text("75 69 134 1 0")
    environ = {"TPU": "slice", "ZONE": "zone", "CHECKOUT": str(tmp_path)}
    status, notes = start("tpu_pod.sh", tmp_path, programs, WORDS, **environ)
    once = ["launch.py", "train", *WORDS]
    assert notes == [*once, "sleep 10"] * 3 + once
    assert status == 1


@pytest.mark.parametrize(("ended", "requeued"), [(75, True), (69, True), (134, True), (1, False)])
def test_a_slurm_job_queues_itself_again_after_a_stop(tmp_path, ended, requeued):
    srun = f'printf "%s\\n" "$@" >> $NOTES; exit {ended}'
    programs = {"srun": srun, "scontrol": 'echo "$@" >> $NOTES'}
    status, notes = start("slurm.sh", tmp_path, programs, WORDS, SLURM_JOB_ID="7")
    assert status == ended
    assert notes[:4] == [".venv/bin/python", "launch.py", "train", WORDS[0]]
    assert notes[5:] == (["requeue 7"] if requeued else [])


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
