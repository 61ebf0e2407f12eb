from __future__ import annotations

import json
import threading

import pytest

from common_jax.stalls import StallWatch


def watch(folder, host=0, hosts=3):
    found = StallWatch(folder, host, hosts, 0)  # no thread: the test asks by itself
    found.folder.mkdir(exist_ok=True)
    found.beat = 10.0
    return found


def sign(found, host, count, step, doing, written):
    """What process `host` leaves in the workdir."""
    about = {"step": step, "doing": doing, "count": count, "since": 0.0, "pid": 70 + host}
    text = json.dumps(about | {"name": f"node-{host}", "written": written})
    (found.folder / f"{host}.json").write_text(text)


@pytest.mark.parametrize(
    ("signs", "told"),
    [
        # (how many signs so far, step, doing, seconds since the last one was written) of each
        (["9 7 step 1", "9 7 step 2", "7 7 data 1"], "host 2/3 (node-2, process 72) is in data of"),
        (["9 7 step 1", "6 6 step 2", "9 7 step 1"], "host 1/3 (node-1, process 71) is in step of"),
        (["9 7 step 1", "9 7 step 2", "9 7 step 1"], "every host waits for its devices at step 7"),
        (
            ["7 7 data 1", "5 6 checkpoint 2", "9 7 step 1"],
            "host 1/3 (node-1, process 71) is in ch",
        ),
        (["9 7 step 1", "9 7 data 2", "9 7 step 90"], "host 2/3 (node-2, process 72) is silent s"),
        (["9 7 step 1", "9 7 step 1", ""], "no sign of life at all from host 2/3"),
        # One batch behind the others in an evaluation; two of three behind; all of them alike.
        (["9 7 evaluation 1", "8 7 evaluation 1", "9 7 evaluation 1"], "host 1/3 (node-1, process"),
        (["9 7 step 1", "8 7 data 1", "8 7 data 1"], "process 71), and 1 more are in data of st"),
        (["1 0 start 1", "1 0 start 1", "1 0 start 1"], "every host is in start of step 0"),
        # Who is done is neither waited for nor silent; at the end the step may be an older one.
        (["9 4 report 1", "9 4 done 900", "9 4 done 900"], "host 0/3 (node-0, process 70) is in r"),
    ],
)
def test_the_host_that_the_others_wait_for_is_named(tmp_path, signs, told):
    now, found = 1000.0, watch(tmp_path)
    found.step, found.since = 7, now - 300
    for host, one in enumerate(signs):
        if one:
            count, step, doing, age = one.split()
            sign(found, host, int(count), int(step), doing, now - int(age))
    line = found.describe(now)
    assert line.startswith("no progress for 300 s at step 7: ") and told in line


def test_compiling_may_take_longer_and_who_is_done_never_speaks(tmp_path, monkeypatch):
    lines = []
    found = StallWatch(tmp_path, 0, 1, 0.0)
    found.folder.mkdir()
    found.seconds, found.beat, found.tell = 300.0, 10.0, lines.append
    now = found.since
    monkeypatch.setattr("time.time", lambda: now)
    for doing, after, speaks in (
        ("data", 299, False),
        ("data", 301, True),
        ("compiling", 3000, False),
        ("compiling", 3700, True),
        ("done", 9000, False),
    ):
        lines.clear()
        found.at(0, doing)
        found.told, now = now, now + after
        found.look()
        assert bool(lines) == speaks, (doing, after)


def test_without_progress_for_a_time_the_watch_speaks(tmp_path):
    spoke, lines = threading.Event(), []
    found = StallWatch(tmp_path, 0, 1, 0.2)
    found.tell = lambda line: (lines.append(line), spoke.set())
    found.at(3, "data")
    assert spoke.wait(20)
    found.close()
    assert "no progress for 0 s at step 3: host 0/1 (" in lines[0]
    assert "is in data of step 3" in lines[0]
    assert json.loads((tmp_path / "hosts" / "0.json").read_text())["doing"] == "data"


def test_a_damaged_sign_of_life_is_as_none(tmp_path):
    found = watch(tmp_path, hosts=1)
    (found.folder / "0.json").write_text("{")
    assert "no sign of life at all from host 0/1" in found.describe(0.0)
