"""Who is everybody waiting for? Each process leaves a sign of life in the workdir; after a time
without progress the slowest one is named, with what it was doing.

One that died is found by JAX itself. This is for one that lives and does not get on: a disk that
hangs, a machine that swaps. The others only see a collective that does not end.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

LONGEST_BEAT = 10.0  # seconds between two signs of life
SILENT_BEATS = 4  # so many missed ones: the process is frozen, or its machine is


class StallWatch:
    """A thread that writes WORKDIR/hosts/<i>.json and reads those of the others.

    seconds: without progress before anything is said, and between two such lines; 0 is never.
    """

    def __init__(self, workdir: Path, host: int, hosts: int, seconds: float):
        self.folder, self.host, self.hosts, self.seconds = workdir / "hosts", host, hosts, seconds
        self.step, self.doing, self.since = 0, "start", time.time()
        self.told, self.stopped = self.since, threading.Event()
        self.beat = min(LONGEST_BEAT, seconds / 4)
        if seconds:
            self.folder.mkdir(exist_ok=True)
            self.write()
            threading.Thread(target=self.watch, daemon=True, name="stall-watch").start()

    def at(self, step: int, doing: str) -> None:
        """This process is at `step`, `doing` something: data, encoding, step, ..."""
        self.step, self.doing, self.since = step, doing, time.time()

    def watch(self) -> None:
        while not self.stopped.wait(self.beat):
            self.write()
            now = time.time()
            if now - max(self.since, self.told) > self.seconds:
                self.told = now
                self.tell(self.describe(now))

    def tell(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def write(self) -> None:
        """A full or slow disk must not end a run that could go on."""
        sign = {"step": self.step, "doing": self.doing, "since": self.since, "pid": os.getpid()}
        file = self.folder / f"{self.host}.json"
        partial = file.with_suffix(".partial")
        with contextlib.suppress(OSError):
            text = json.dumps(sign | {"name": socket.gethostname(), "written": time.time()})
            partial.write_text(text)
            partial.replace(file)

    def describe(self, now: float) -> str:
        """The line that names the process which the others wait for."""
        waited = f"no progress for {now - self.since:.0f} s at step {self.step}"
        signs = {i: sign for i in range(self.hosts) if (sign := self.read(i))}
        missing = sorted({*range(self.hosts)} - {*signs})
        if missing:
            return f"{waited}: no sign of life at all from host {missing[0]}/{self.hosts}"
        silent = [i for i in signs if now - signs[i]["written"] > SILENT_BEATS * self.beat]
        # All wait for the one behind; of those at one step, for the one that is not waiting.
        order = sorted(signs, key=lambda i: (signs[i]["step"], signs[i]["doing"] == "step"))
        slow = (silent or order)[0]
        sign = signs[slow]
        who = f"host {slow}/{self.hosts} ({sign['name']}, process {sign['pid']})"
        if silent:
            return f"{waited}: {who} is silent since {now - sign['written']:.0f} s"
        alike = all((s["step"], s["doing"]) == (sign["step"], "step") for s in signs.values())
        if alike and self.hosts > 1:
            return f"{waited}: every host waits for its devices at step {sign['step']}"
        return f"{waited}: {who} is in {sign['doing']} of step {sign['step']}"

    def read(self, host: int) -> dict | None:
        try:
            return json.loads((self.folder / f"{host}.json").read_text())
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        self.stopped.set()
