"""Saving and restoring: full disks, kills, damage, and how many are kept."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from common_jax import train_loop
from common_jax.checkpoint import Checkpoints
from common_jax.sharding import make_mesh, replicated
from tests.linear_task import LinearTask
from tests.test_train_loop import ROOT, final_params, kept_steps, losses, run


def test_restoring_needs_no_second_state_on_the_devices(tmp_path, monkeypatch):
    run(tmp_path, **{"optim.steps": 4})
    begun, alive = [], []
    start, restore = train_loop.start_state, Checkpoints.restore

    def watched_start(*args):
        state, frozen = start(*args)
        begun.extend(map(weakref.ref, jax.tree.leaves(state)))
        return state, frozen

    def watched_restore(self, like, **kwargs):
        alive.append(sum(ref() is not None for ref in begun))
        return restore(self, like, **kwargs)

    monkeypatch.setattr(train_loop, "start_state", watched_start)
    monkeypatch.setattr(Checkpoints, "restore", watched_restore)
    assert run(tmp_path) == 0
    assert len(begun) > 5 and alive == [0, 0]  # at the start, and of the best one at the end


def test_the_loop_alone_tells_jax_at_which_step_a_process_is(tmp_path, monkeypatch):
    """Two that told it different steps made one process stop at a step that another had passed."""
    told = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", told.append)
    saves = Checkpoints(tmp_path)
    for step in (1, 2):
        saves.save(step, {"x": jax.numpy.ones(3)}, {}, best=step == 1)
    saves.wait()
    saves.close()
    assert list(saves.folders["checkpoints"].iterdir()) and told == []


def test_saving_small_arrays_that_devices_share_compiles_nothing(tmp_path, caplog):
    assert len(jax.devices()) > 1
    state = {"x": jax.device_put(np.ones((6, 35)), replicated(make_mesh()))}
    saves = Checkpoints(tmp_path)
    with jax.log_compiles():
        jax.jit(lambda x: x[:3])(state["x"])
        assert "Finished XLA compilation" in caplog.text
        caplog.clear()
        saves.save(1, state, {})
        saves.wait()
    assert "Finished XLA compilation" not in caplog.text
    found, _ = saves.restore(state)
    np.testing.assert_array_equal(found["x"], state["x"])
    saves.close()


def test_a_full_disk_during_a_checkpoint_is_named_and_older_ones_stay(tmp_path):
    # A file-size limit makes every larger write fail as a full disk does.
    code = textwrap.dedent(
        """
        import resource, signal, sys
        sys.path.insert(0, ".")
        from absl import flags
        flags.FLAGS.mark_as_parsed()
        from common_jax import checkpoint, train_loop
        from tests.test_train_loop import run
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save = checkpoint.Checkpoints.save
        def limited(self, step, *args, **kwargs):
            if step >= 4:
                self.wait()
                resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
            save(self, step, *args, **kwargs)
            self.wait()
        checkpoint.Checkpoints.save = limited
        try:
            run(sys.argv[1], **{"eval.every": 100})
        except checkpoint.CheckpointError as error:
            print(str(error)[:2000])
            sys.exit(9)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 9, done.stderr[-3000:]
    assert "Complete checkpoints kept there: [2]" in done.stdout
    assert run(tmp_path, **{"eval.every": 100}) == 0


def test_kill_in_the_middle_of_a_save_resumes_from_the_last_whole_checkpoint(tmp_path):
    run(tmp_path / "whole", **{"eval.every": 100})
    code = textwrap.dedent(
        """
        import os, signal, sys
        sys.path.insert(0, ".")
        from absl import flags
        flags.FLAGS.mark_as_parsed()
        from common_jax import checkpoint
        from tests.test_train_loop import run
        save = checkpoint.Checkpoints.save
        def killed(self, step, *args, **kwargs):
            self.wait()
            save(self, step, *args, **kwargs)
            if step == 4:  # the asynchronous write has begun
                os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.Checkpoints.save = killed
        run(sys.argv[1], **{"eval.every": 100})
        """
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "cut")], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert run(tmp_path / "cut", **{"eval.every": 100}) == 0
    whole, cut = final_params(tmp_path / "whole")[1], final_params(tmp_path / "cut")[1]
    jax.tree.map(np.testing.assert_array_equal, whole, cut)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def damage(checkpoint: Path) -> None:
    for file in (checkpoint / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")


def test_a_damaged_newest_checkpoint_is_reported_and_replaced_from_the_one_before(tmp_path, capfd):
    run(tmp_path, **{"eval.every": 100})
    (tmp_path / "DONE").unlink()
    damage(tmp_path / "checkpoints" / "6")
    assert run(tmp_path, **{"eval.every": 100, "checkpoint.every": 1}) == 0
    err = capfd.readouterr().err
    assert "6 cannot be read" in err and "continuing at step 4" in err
    assert kept_steps(tmp_path) == [5, 6]
    assert final_params(tmp_path)[0] == 6


def test_a_damaged_best_checkpoint_gives_way_to_the_newest_at_the_end(tmp_path, capfd):
    class DamagesBest(LinearTask):
        def during(self, step, params, workdir):
            best = Path(workdir) / "best" / "2"
            while step == 6 and not best.is_dir():
                time.sleep(0.01)
            damage(best)

    settings = {"optim.lr": 0.0, "optim.min_lr": 0.0}  # the first one stays the best
    assert run(tmp_path, DamagesBest, **settings) == 0
    assert "The newest checkpoint is scored instead" in capfd.readouterr().err
    assert json.loads((tmp_path / "results.json").read_text())["selected_step"] == 6


def test_checkpoints_come_by_minutes_too_and_multiples_are_kept_for_good(tmp_path):
    settings = {"optim.steps": 9, "eval.every": 100, "eval.select": ""}
    by_time = {"checkpoint.every": 100, "checkpoint.minutes": 1e-9, "checkpoint.keep": 3}
    assert run(tmp_path / "time", **settings, **by_time) == 0
    assert kept_steps(tmp_path / "time") == [7, 8, 9]
    kept = {"checkpoint.every": 1, "checkpoint.keep": 2, "checkpoint.keep_every": 3}
    assert run(tmp_path / "kept", **settings, **kept) == 0
    assert kept_steps(tmp_path / "kept") == [3, 6, 8, 9]
