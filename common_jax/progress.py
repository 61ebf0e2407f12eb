"""Progress of long work as one plain line on stderr, and sizes and times for people."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """A line on stderr: done, rate, time left. Rewritten in a terminal, every 10 s in a log."""

    def __init__(
        self,
        title: str,
        total: int,
        item_bytes: int = 0,
        stream: TextIO | None = None,
        unit: str = "images",
    ):
        self.title, self.total, self.item_bytes, self.unit = title, total, item_bytes, unit
        self.stream = stream or sys.stderr
        self.done, self.start, self.shown = 0, time.monotonic(), 0.0

    def add(self, count: int) -> None:
        self.done += count
        every = 0.5 if self.stream.isatty() else 10.0
        if time.monotonic() - self.shown > every or self.done >= self.total:
            self.show()

    def show(self) -> None:
        self.shown = time.monotonic()
        rate = self.done / max(self.shown - self.start, 1e-6)
        left = (self.total - self.done) / rate if rate else 0.0
        written = f" | {format_size(self.done * self.item_bytes)}" if self.item_bytes else ""
        line = (
            f"{self.title}: {self.done:,}/{self.total:,} ({self.done / self.total:.0%}) | "
            f"{rate:.1f} {self.unit}/s | {format_time(left)} left{written}"
        )
        end = "" if self.stream.isatty() and self.done < self.total else "\n"
        self.stream.write(("\r\x1b[K" if self.stream.isatty() else "") + line + end)
        self.stream.flush()

    def close(self) -> None:
        """End the line of an unfinished count, so that what is printed next has its own."""
        if self.done < self.total and self.stream.isatty():
            self.stream.write("\n")


def format_size(count: float) -> str:
    """1536 -> "1.5 KB" (thousands, as disks are sold)."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def format_time(seconds: float) -> str:
    """3725 -> "1:02:05", 65 -> "1:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
