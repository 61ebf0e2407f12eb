"""Faults, many times: what becomes of a run in several processes, in a table.

    python -m benchmarks.faults [--runs=20] [--out=faults.json]

Every run is cut short four times by chance (SIGKILL or SIGTERM of one process, at a random step),
starts again each time on 1, 2 or 4 processes, and must end with the losses and scores of a run that
nothing happened to. A run takes about half a minute on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from common_jax.files import write_json
from common_jax.report import format_table
from tests.hosts import read_run, run_hosts

SETTINGS = {
    "optim.ema_decay": 0.9,
    "optim.steps": 24,
    "eval.every": 8,
    "checkpoint.every": 3,
    "batch_size": 8,
}
CUTS = 4


def cut_run(rng: np.random.Generator, workdir: Path) -> tuple[list[str], list[str]]:
    """One run, cut and continued until it ends; (what was done, what went wrong)."""
    story, wrong = [], []
    for _ in range(CUTS):
        count, what = int(rng.choice([1, 2, 4])), str(rng.choice(["kill", "term"]))
        process, step = int(rng.integers(count)), int(rng.integers(0, 7))
        ended = run_hosts(count, workdir, SETTINGS, {process: (what, step)})
        story.append(f"{what} {process}/{count} after {step}: {ended.statuses}")
        expected = [75] * count if what == "term" else None
        if ended.statuses == [0] * count:
            break  # it came to its end before the fault did
        if expected and ended.statuses != expected:
            wrong.append(f"{story[-1]}, expected {expected}: {ended.errors}")
        if not expected and (ended.statuses[process] != -9 or 0 in ended.statuses):
            wrong.append(f"{story[-1]}: {ended.errors}")
    count = int(rng.choice([1, 2, 4]))
    ended = run_hosts(count, workdir, SETTINGS)
    story.append(f"to the end on {count}: {ended.statuses}")
    if ended.statuses != [0] * count:
        wrong.append(f"{story[-1]}: {ended.errors}")
    return story, wrong


def compare(run: dict, whole: dict) -> float:
    """Largest relative difference of losses; infinite when steps or scores differ."""
    if run["losses"].keys() != whole["losses"].keys() or run["results"] != whole["results"]:
        return float("inf")
    a, b = (np.array(list(x["losses"].values())) for x in (run, whole))
    return float(np.max(np.abs(a - b) / np.abs(b)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="faults.json")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        assert run_hosts(1, Path(folder) / "whole", SETTINGS).statuses == [0]
        whole = read_run(Path(folder) / "whole")
        for number in range(options.runs):
            start, workdir = time.perf_counter(), Path(folder) / str(number)
            story, wrong = cut_run(np.random.default_rng([options.seed, number]), workdir)
            difference = float("inf") if wrong else compare(read_run(workdir), whole)
            row = {"run": number, "difference": difference, "faults": len(story) - 1}
            row["seconds"] = round(time.perf_counter() - start, 1)
            rows.append(row | {"story": "; ".join(story), "wrong": wrong})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    good = sum(row["difference"] < 2e-6 for row in rows)
    print(format_table(rows, ["run", "faults", "difference", "seconds", "story"]))
    print(f"{good} of {len(rows)} runs ended as the undisturbed one")
    safe = [row | {"difference": str(row["difference"])} for row in rows]
    write_json(options.out, {"settings": SETTINGS, "runs": safe, "good": good})
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
