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
# These take minutes by nature: the process that is in one speaks so many times later.
SLOW, SLOW_TIMES = ("preparing", "compiling", "report"), 12
DONE = "done"  # the last sign of a process; it is never waited for


class StallWatch:
    """A thread that writes WORKDIR/hosts/<i>.json and reads those of the others.

    seconds: without progress before anything is said, and between two such lines; 0 is never.
    """

    def __init__(self, workdir: Path, host: int, hosts: int, seconds: float):
        self.folder, self.host, self.hosts, self.seconds = workdir / "hosts", host, hosts, seconds
        self.step, self.doing, self.since, self.count = 0, "start", time.time(), 0
        self.told, self.stopped = self.since, threading.Event()
        self.beat = min(LONGEST_BEAT, seconds / 4)
        if seconds:
            self.folder.mkdir(exist_ok=True)
            self.write()
            threading.Thread(target=self.watch, daemon=True, name="stall-watch").start()

    def at(self, step: int, doing: str) -> None:
        """This process is at `step`, `doing` something: data, encoding, step, ...

        Every process must call it at the same places: who did so less often is behind.
        """
        self.step, self.doing, self.since = step, doing, time.time()
        self.count += 1

    def watch(self) -> None:
        while not self.stopped.wait(self.beat):
            self.look()

    def look(self) -> None:
        self.write()
        now, doing = time.time(), self.doing
        patience = self.seconds * (SLOW_TIMES if doing in SLOW else 1)
        if doing != DONE and now - max(self.since, self.told) > patience:
            self.told = now
            self.tell(self.describe(now))

    def tell(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def write(self) -> None:
        """A full or slow disk must not end a run that could go on."""
        sign = {"step": self.step, "doing": self.doing, "count": self.count, "since": self.since}
        sign |= {"pid": os.getpid(), "name": socket.gethostname(), "written": time.time()}
        file = self.folder / f"{self.host}.json"
        partial = file.with_suffix(".partial")
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps(sign))
            partial.replace(file)

    def describe(self, now: float) -> str:
        """The line that names the process which the others wait for."""
        waited = f"no progress for {now - self.since:.0f} s at step {self.step}"
        signs = {i: sign for i in range(self.hosts) if (sign := self.read(i))}
        missing = sorted({*range(self.hosts)} - {*signs})
        if missing:
            return f"{waited}: no sign of life at all from host {missing[0]}/{self.hosts}"
        alive = {i: sign for i, sign in signs.items() if sign["doing"] != DONE}
        silent = [i for i in alive if now - signs[i]["written"] > SILENT_BEATS * self.beat]
        least = min(sign["count"] for sign in alive.values())
        behind = [i for i in alive if alive[i]["count"] == least]
        slow = (silent or behind)[0]
        sign = alive[slow]
        who = f"host {slow}/{self.hosts} ({sign['name']}, process {sign['pid']})"
        if silent:
            return f"{waited}: {who} is silent since {now - sign['written']:.0f} s"
        if len(behind) == len(alive) > 1:
            where = (
                "waits for its devices at"
                if sign["doing"] == "step"
                else f"is in {sign['doing']} of"
            )
            return f"{waited}: every host {where} step {sign['step']}"
        more = f", and {len(behind) - 1} more are" if len(behind) > 1 else " is"
        return f"{waited}: {who}{more} in {sign['doing']} of step {sign['step']}"

    def read(self, host: int) -> dict | None:
        try:
            return json.loads((self.folder / f"{host}.json").read_text())
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        self.stopped.set()
        if self.seconds and self.doing == DONE:
            self.write()
