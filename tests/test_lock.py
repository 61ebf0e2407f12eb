from __future__ import annotations

import signal
import subprocess
import sys

from common_jax.lock import locked

HOLD = """
import sys, time
from common_jax.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(path, seconds):
    command = [sys.executable, "-c", HOLD, str(path), str(seconds)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    return child


def test_a_second_process_waits_until_the_first_is_done(tmp_path, capfd):
    child = hold(tmp_path / "lock", 0.3)
    with locked(tmp_path / "lock"):
        assert child.wait(timeout=10) == 0
    assert "waiting" in capfd.readouterr().err


def test_a_killed_process_leaves_no_lock(tmp_path):
    child = hold(tmp_path / "lock", 60)
    child.send_signal(signal.SIGKILL)
    child.wait()
    with locked(tmp_path / "lock"):
        pass
