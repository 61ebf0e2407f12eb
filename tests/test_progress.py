from __future__ import annotations

import io

from common_jax.progress import Progress, format_size, format_time


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_whole_lines_and_always_the_last_one():
    stream = io.StringIO()
    progress = Progress("taps", 1500, item_bytes=10**6, stream=stream)
    for _ in range(3):
        progress.add(500)
    first, *_, last = stream.getvalue().splitlines()
    assert first.startswith("taps: 500/1,500 (33%) | ") and "images/s" in first and "left" in first
    assert last.startswith("taps: 1,500/1,500 (100%)") and last.endswith("0:00 left | 1.5 GB")
    assert "\r" not in stream.getvalue()


def test_a_terminal_line_is_rewritten_and_ended():
    stream = Terminal()
    progress = Progress("taps", 10, stream=stream)
    progress.add(4)
    progress.close()
    assert stream.getvalue().startswith("\r") and stream.getvalue().endswith("\n")


def test_sizes_and_times_are_readable():
    assert [format_size(n) for n in (5, 1536, 21e6, 84e9, 2e12)] == [
        "5 B",
        "1.5 KB",
        "21.0 MB",
        "84.0 GB",
        "2.00 TB",
    ]
    assert [format_time(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
