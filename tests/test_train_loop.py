from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from common_jax.checkpoint import Checkpoints
from common_jax.train_loop import PREEMPTED, LossError, Pipeline, train
from common_jax.workdir import WorkdirError, lock_workdir
from data.pipeline import eval_batches, train_batches
from tests.hosts import run_hosts
from tests.linear_task import LinearTask, linear_config

PIPELINE = Pipeline(train_batches, eval_batches)
ROOT = Path(__file__).parent.parent


def run(workdir, task=LinearTask, **changes):
    config = linear_config(**changes)
    return train(task(config), config, str(workdir), PIPELINE)


def losses(workdir) -> dict[int, float]:
    lines = [json.loads(x) for x in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: x["train/loss"] for x in lines if "train/loss" in x}


def final_params(workdir):
    saves = Checkpoints(Path(workdir))
    step = saves.steps()[-1]
    tree = saves.managers["checkpoints"].restore(step)
    saves.close()
    return step, jax.tree.map(np.asarray, tree["state"])


class StopsAtThree(LinearTask):
    """Sends this process SIGTERM while the third batch is on its way."""

    calls = 0

    def encode(self, batch):
        self.calls += "index" in batch and "mask" not in batch
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch


def test_six_steps_equal_three_then_sigterm_then_three_bit_for_bit(tmp_path):
    settings = {"optim.ema_decay": 0.9, "eval.every": 100, "checkpoint.every": 100}
    assert run(tmp_path / "whole", **settings) == 0
    assert run(tmp_path / "cut", StopsAtThree, **settings) == PREEMPTED
    assert final_params(tmp_path / "cut")[0] == 3
    assert run(tmp_path / "cut", **settings) == 0
    (step, whole), (cut_step, cut) = (
        final_params(tmp_path / "whole"),
        final_params(tmp_path / "cut"),
    )
    assert step == cut_step == 6
    jax.tree.map(np.testing.assert_array_equal, whole, cut)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_a_run_writes_what_a_reader_looks_for_and_learns(tmp_path):
    assert run(tmp_path, **{"optim.steps": 60, "optim.lr": 0.1, "eval.every": 20}) == 0
    names = {p.name for p in tmp_path.iterdir()}
    assert {"config.json", "command.txt", "env.txt", "metrics.jsonl", "tb", "checkpoints"} <= names
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["eval/test/accuracy"] > 0.9
    assert (tmp_path / "DONE").exists()
    before = (tmp_path / "metrics.jsonl").read_text()
    assert run(tmp_path, **{"optim.steps": 60, "optim.lr": 0.1, "eval.every": 20}) == 0
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_another_config_in_the_same_workdir_is_refused_naming_the_key(tmp_path):
    run(tmp_path)
    with pytest.raises(WorkdirError, match=r"optim\.lr: 0\.01 there, 0\.5 now"):
        run(tmp_path, **{"optim.lr": 0.5})
    with pytest.raises(WorkdirError, match=r"optim\.steps.*may only grow"):
        run(tmp_path, **{"optim.steps": 3})


def test_a_finished_run_goes_on_when_it_is_to_be_longer(tmp_path):
    settings = {"optim.schedule": "constant", "eval.every": 100}
    assert run(tmp_path / "whole", **settings, **{"optim.steps": 9}) == 0
    assert run(tmp_path / "longer", **settings, **{"optim.steps": 6}) == 0
    assert run(tmp_path / "longer", **settings, **{"optim.steps": 9}) == 0
    assert losses(tmp_path / "longer") == losses(tmp_path / "whole")
    assert json.loads((tmp_path / "longer" / "results.json").read_text())["step"] == 9
    assert (tmp_path / "longer" / "DONE").exists()
    with pytest.raises(WorkdirError, match=r"optim\.lr: 0\.01 there, 0\.5 now"):
        run(tmp_path / "longer", **settings, **{"optim.steps": 12, "optim.lr": 0.5})
    assert (tmp_path / "longer" / "DONE").exists()


def test_a_second_process_on_the_same_workdir_is_refused(tmp_path):
    held = lock_workdir(tmp_path)
    with pytest.raises(WorkdirError, match="in use by process"):
        run(tmp_path)
    held.close()


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(tmp_path):
    class Breaks(LinearTask):
        def loss(self, params, state, batch, key, phase):
            loss, *rest = super().loss(params, state, batch, key, phase)
            return loss * jax.numpy.where(state["calls"] == 4, np.nan, 1.0), *rest

    with pytest.raises(LossError, match="nan at step 5; the last good checkpoint is step 4"):
        run(tmp_path, Breaks)
    saves = Checkpoints(tmp_path)
    assert saves.steps()[-1] == 4
    saves.close()


def test_patience_ends_a_run_and_the_best_checkpoint_is_scored(tmp_path):
    # Learning rate zero: the first evaluation stays the best one.
    settings = {"optim.lr": 0.0, "optim.min_lr": 0.0, "optim.steps": 40, "eval.patience": 2}
    assert run(tmp_path, **settings) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["selected_step"], results["step"]) == (2, 6)


def test_microbatches_equal_one_batch(tmp_path):
    class Weighted(LinearTask):
        def loss(self, params, state, batch, key, phase):
            logp = jax.nn.log_softmax(self.logits(params, batch["x"]))
            # Unequal weights: a mean of microbatch means would differ from the mean over rows.
            rows = 1.0 + batch["label"].astype(np.float32)
            picked = jax.numpy.take_along_axis(logp, batch["label"][:, None], 1)[:, 0]
            return -(rows * picked).sum(), rows.sum(), state, {}

    run(tmp_path / "one", Weighted)
    run(tmp_path / "four", Weighted, **{"optim.accumulate": 4})
    a, b = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert a.keys() == b.keys()
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-6)


def test_batchnorm_tasks_refuse_microbatches(tmp_path):
    class WithBatchNorm(LinearTask):
        accumulates = False

    with pytest.raises(ValueError, match=r"optim\.accumulate=2.*BatchNorm"):
        run(tmp_path, WithBatchNorm, **{"optim.accumulate": 2})


def test_one_program_serves_the_whole_run(tmp_path, capfd):
    run(tmp_path)
    assert capfd.readouterr().err.count("compiled the training step") == 1


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


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(tmp_path, capfd):
    run(tmp_path, **{"eval.every": 100})
    (tmp_path / "DONE").unlink()
    for file in (tmp_path / "checkpoints" / "6" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    assert run(tmp_path, **{"eval.every": 100}) == 0
    err = capfd.readouterr().err
    assert "6 cannot be read" in err and "continuing at step 4" in err


def test_two_hosts_give_the_losses_and_scores_of_one(tmp_path):
    run(tmp_path / "one", **{"optim.ema_decay": 0.9})
    ended = run_hosts(2, tmp_path / "two", {"optim.ema_decay": 0.9})
    assert ended.statuses == [0, 0], ended.errors
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-6)
    scores = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two")]
    for result in scores:
        del result["seconds"]
    assert scores[0] == scores[1]


def test_checkpoints_come_by_minutes_too_and_multiples_are_kept_for_good(tmp_path):
    settings = {"optim.steps": 9, "eval.every": 100, "eval.select": ""}
    by_time = {"checkpoint.every": 100, "checkpoint.minutes": 1e-9, "checkpoint.keep": 3}
    assert run(tmp_path / "time", **settings, **by_time) == 0
    assert kept_steps(tmp_path / "time") == [7, 8, 9]
    kept = {"checkpoint.every": 1, "checkpoint.keep": 2, "checkpoint.keep_every": 3}
    assert run(tmp_path / "kept", **settings, **kept) == 0
    assert kept_steps(tmp_path / "kept") == [3, 6, 8, 9]


def kept_steps(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def test_a_profile_of_a_few_steps_and_the_mfu_are_asked_for_by_config(tmp_path, monkeypatch):
    class Counted(LinearTask):
        def flops(self):
            return {"encode": 400.0, "train": 600.0}

    monkeypatch.setattr("common_jax.metric_log.peak_flops", lambda kind: 1e9)
    assert run(tmp_path, Counted, **{"log.profile": 2, "eval.every": 100}) == 0
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in lines if "perf/mfu" in x]
    assert len(steps) == 6
    for line in steps:
        expected = line["perf/examples_per_s"] * 1000.0 / (1e9 * jax.device_count())
        assert line["perf/mfu"] == pytest.approx(expected)
