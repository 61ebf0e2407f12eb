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


def sign(found, host, step, doing, written):
    """What process `host` leaves in the workdir."""
    about = {"step": step, "doing": doing, "since": 0.0, "pid": 70 + host}
    text = json.dumps(about | {"name": f"node-{host}", "written": written})
    (found.folder / f"{host}.json").write_text(text)


@pytest.mark.parametrize(
    ("signs", "told"),
    [
        # (step, doing, seconds since the last sign of life) of each process
        (
            ["7 step 1", "7 step 2", "7 data 1"],
            "host 2/3 (node-2, process 72) is in data of",
        ),
        (
            ["7 step 1", "6 step 2", "7 step 1"],
            "host 1/3 (node-1, process 71) is in step of",
        ),
        (["7 step 1", "7 step 2", "7 step 1"], "every host waits for its devices at step 7"),
        (["7 data 1", "6 checkpoint 2", "7 step 1"], "host 1/3 (node-1, process 71) is in check"),
        (["7 step 1", "7 data 2", "7 step 90"], "host 2/3 (node-2, process 72) is silent since 90"),
        (["7 step 1", "7 step 1", ""], "no sign of life at all from host 2/3"),
    ],
)
def test_the_host_that_the_others_wait_for_is_named(tmp_path, signs, told):
    now, found = 1000.0, watch(tmp_path)
    found.step, found.since = 7, now - 300
    for host, one in enumerate(signs):
        if one:
            step, doing, age = one.split()
            sign(found, host, int(step), doing, now - int(age))
    line = found.describe(now)
    assert line.startswith("no progress for 300 s at step 7: ") and told in line


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
