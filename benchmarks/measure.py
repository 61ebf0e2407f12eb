"""Two programs measured in turn, and memory of a child process."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def alternate(jobs: Mapping[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of every job, one after the other, `repeats` rounds after one that warms up."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(repeats + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            spent = time.perf_counter() - start
            print(f"round {round_}  {name:<28}{spent:8.2f} s", file=sys.stderr, flush=True)
            if round_:
                found[name].append(spent)
    return found


def peak_during(job: Callable) -> float:
    """Peak resident memory of this process in GiB while `job` runs (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    job()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20


def run_child(module: str, flags: Sequence[str]) -> float:
    """The number that `python -m module flags...` prints in its last line."""
    command = [sys.executable, "-m", module, *flags]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(out.strip().splitlines()[-1])
