"""Processes that tests started, and what those started in turn."""

from __future__ import annotations

import subprocess
import time


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True).stdout
    return [int(it) for it in found.split()]


def wait_until_gone(pids: list[int], seconds: float = 60.0) -> None:
    """AssertionError where there is none to wait for, or one still lives after so many seconds."""
    assert pids
    limit = time.monotonic() + seconds
    while left := [pid for pid in pids if _lives(pid)]:
        assert time.monotonic() < limit, f"processes {left} still live"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True).stdout
    return bool(state.strip()) and not state.strip().startswith(b"Z")
