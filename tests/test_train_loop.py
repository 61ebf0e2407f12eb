from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from common_jax import train_loop
from common_jax.checkpoint import Checkpoints
from common_jax.optim import make_optimizer
from common_jax.sharding import make_mesh
from common_jax.train_loop import PREEMPTED, LossError, Pipeline, train
from common_jax.workdir import WorkdirError
from data.pipeline import eval_batches, train_batches
from tests.hosts import run_hosts
from tests.linear_task import LinearTask, linear_config

PIPELINE = Pipeline(train_batches, eval_batches)
ROOT = Path(__file__).parent.parent


def run(workdir, task=LinearTask, **changes):
    config = linear_config(**changes)
    return train(task(config), config, str(workdir), PIPELINE)


def losses(workdir, name="train/loss") -> dict[int, float]:
    lines = [json.loads(x) for x in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: x[name] for x in lines if name in x}


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


def test_a_gradient_that_is_not_finite_is_never_saved(tmp_path):
    class Breaks(LinearTask):
        def loss(self, params, state, batch, key, phase):
            loss, *rest = super().loss(params, state, batch, key, phase)
            bias = params["linear"]["bias"].sum()
            # The root of 0 has a value, but no derivative.
            distance = jax.numpy.abs(bias - jax.lax.stop_gradient(bias))
            distance += jax.numpy.where(state["calls"] == 4, 0.0, 1.0)
            return loss + jax.numpy.sqrt(distance), *rest

    with pytest.raises(LossError, match=r"norm inf at step 5; the last good checkpoint is step 4"):
        run(tmp_path, Breaks, **{"checkpoint.every": 1, "log.every": 100})
    assert kept_steps(tmp_path)[-1] == 4
    assert run(tmp_path, **{"checkpoint.every": 1, "log.every": 100}) == 0


def test_patience_ends_a_run_and_the_best_checkpoint_is_scored(tmp_path):
    # Learning rate zero: the first evaluation stays the best one.
    settings = {"optim.lr": 0.0, "optim.min_lr": 0.0, "optim.steps": 40, "eval.patience": 2}
    assert run(tmp_path, **settings) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["selected_step"], results["step"]) == (2, 6)


def test_a_run_that_ended_early_and_was_cut_off_before_its_scores_only_scores(tmp_path):
    class CutOff(LinearTask):
        def report(self, *_):
            raise OSError("cut off")

    settings = {"optim.lr": 0.0, "optim.min_lr": 0.0, "optim.steps": 40, "eval.patience": 2}
    with pytest.raises(OSError, match="cut off"):
        run(tmp_path, CutOff, **settings)
    assert run(tmp_path, **settings) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["selected_step"], results["step"]) == (2, 6)
    assert kept_steps(tmp_path)[-1] == 6


def test_a_first_score_that_is_no_number_does_not_stay_the_best(tmp_path):
    class Late(LinearTask):
        seen = 0

        def evaluators(self):
            sets = super().evaluators()

            def finish(counts):
                self.seen += 1
                return {"accuracy": float("nan") if self.seen == 1 else 0.5}

            return sets | {"val": dataclasses.replace(sets["val"], finish=finish)}

    assert run(tmp_path, Late) == 0
    assert json.loads((tmp_path / "results.json").read_text())["selected_step"] == 4


def test_a_batch_of_evaluation_that_does_not_split_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"eval\.batch_size=3 is not divisible by 2 devices"):
        run(tmp_path, **{"eval.batch_size": 3})


def test_nothing_is_gathered_for_a_task_that_draws_nothing(tmp_path, monkeypatch):
    drawn, gathered = [], []

    class Draws(LinearTask):
        def during(self, step, params, workdir):
            drawn.append(params)

    def gather(tree):
        gathered.append(tree)
        return tree

    monkeypatch.setattr(train_loop, "gather_tree", gather)
    config = linear_config()
    config.eval.samples = 0
    assert train(Draws(config), config, str(tmp_path / "none"), PIPELINE) == 0
    assert len(drawn) == 4 and not any(drawn) and len(gathered) == 1  # for the report
    assert run(tmp_path / "some", Draws) == 0
    assert all(drawn[4:]) and len(gathered) == 6


def test_what_is_kept_of_a_split_parameter_lies_where_it_lies():
    class Split(LinearTask):
        sharding_rules = (("linear/kernel", ("fsdp", None)),)

    config = linear_config(**{"optim.ema_decay": 0.9})
    tx = make_optimizer(config.optim, lambda step: 0.1)
    state, _ = train_loop.start_state(Split(config), tx, config, make_mesh(data=1, fsdp=2))
    kernel = state.params["linear"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, 3)}
    copies = [x for x in jax.tree.leaves((state.ema, state.opt)) if x.shape == kernel.shape]
    assert len(copies) == 3 and all(x.sharding == kernel.sharding for x in copies)


def test_microbatches_equal_one_batch(tmp_path):
    class Weighted(LinearTask):
        def loss(self, params, state, batch, key, phase):
            logp = jax.nn.log_softmax(self.logits(params, batch["x"]))
            # Unequal weights: a mean of microbatch means would differ from the mean over rows.
            rows = 1.0 + batch["label"].astype(np.float32)
            picked = jax.numpy.take_along_axis(logp, batch["label"][:, None], 1)[:, 0]
            found = -(rows * picked).sum(), rows.sum()
            return *found, state, {"again": found}

    run(tmp_path / "one", Weighted)
    run(tmp_path / "four", Weighted, **{"optim.accumulate": 4})
    a, b = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert a.keys() == b.keys()
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-6)
    metrics = losses(tmp_path / "four", "train/again")
    np.testing.assert_allclose(list(metrics.values()), list(b.values()), rtol=1e-6)


def test_batchnorm_tasks_refuse_microbatches(tmp_path):
    class WithBatchNorm(LinearTask):
        accumulates = False

    with pytest.raises(ValueError, match=r"optim\.accumulate=2.*BatchNorm"):
        run(tmp_path, WithBatchNorm, **{"optim.accumulate": 2})


def test_one_program_serves_the_whole_run(tmp_path, capfd):
    run(tmp_path)
    assert capfd.readouterr().err.count("compiled the training step") == 1


@pytest.mark.slow
def test_two_hosts_give_the_losses_and_scores_of_one_and_wait_for_a_long_report(tmp_path):
    run(tmp_path / "one", **{"optim.ema_decay": 0.9})
    # JAX waits 3 seconds at the end; the report of process 0 takes 5.
    ended = run_hosts(2, tmp_path / "two", {"optim.ema_decay": 0.9}, {0: ("report", 0)})
    assert ended.statuses == [0, 0], ended.errors
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-6)
    scores = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two")]
    for result in scores:
        del result["seconds"]
    assert scores[0] == scores[1]


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
