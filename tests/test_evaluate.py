from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from common_jax.checkpoint import CheckpointError, read_checkpoint
from common_jax.evaluate import evaluate_workdir, restore_trained
from common_jax.files import read_json, write_json
from common_jax.sharding import make_mesh
from common_jax.train_loop import Pipeline, train
from common_jax.workdir import WorkdirError, check_config, open_workdir, read_config
from configs import satdifuser_pretrain
from data.pipeline import eval_batches, train_batches
from tests.linear_task import LinearTask, linear_config

PIPELINE = Pipeline(train_batches, eval_batches)
AVERAGED = {"optim.ema_decay": 0.7, "optim.lr": 0.3}


def run(workdir, **changes):
    config = linear_config(**changes)
    assert train(LinearTask(config), config, str(workdir), PIPELINE) == 0
    return Path(workdir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run"), **AVERAGED)


def evaluate(workdir, **changes):
    return evaluate_workdir(LinearTask(linear_config(**changes)), workdir, eval_batches)


def contents(folder: Path) -> dict:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_an_evaluation_repeats_the_scores_of_the_run_and_changes_nothing_else(finished, capsys):
    before = contents(finished)
    assert evaluate(finished, **AVERAGED) == 0
    results = json.loads((finished / "results.json").read_text())
    found = json.loads((finished / "eval.json").read_text())
    scored = {key: value for key, value in results.items() if key.startswith("eval/")}
    assert scored and scored.items() <= found.items()
    assert found["checkpoint"] == f"best/{results['selected_step']}"
    after = contents(finished)
    assert {k: v for k, v in after.items() if k.name != "eval.json"} == before
    table = capsys.readouterr().out
    assert f"{found['eval/test/accuracy']:.4f}" in table and "val" in table.splitlines()[1]


def test_averaged_or_raw_parameters_are_taken_as_the_config_says(finished):
    tree, _ = read_checkpoint(finished, ("params", "ema"))
    stored = {"raw": tree["params"]["linear"]["kernel"], "ema": tree["ema"]["linear"]["kernel"]}
    assert abs(stored["raw"] - stored["ema"]).max() > 1e-3
    for kind, kernel in stored.items():
        task = LinearTask(linear_config(**AVERAGED, **{"eval.params": kind}))
        trained = restore_trained(task, finished, make_mesh())
        np.testing.assert_array_equal(trained.params["linear"]["kernel"], kernel)
        # What is not trained is not in the checkpoint: it comes from the task.
        start = task.init(task.config.seed)[0]["frozen"]["kernel"]
        np.testing.assert_array_equal(trained.params["frozen"]["kernel"], start)


def test_a_damaged_best_checkpoint_gives_way_to_the_newest(finished, tmp_path, capsys):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    (best,) = (workdir / "best").iterdir()
    shutil.rmtree(best / "state")
    assert evaluate(workdir, **AVERAGED) == 0
    assert "cannot be read" in capsys.readouterr().err
    found = json.loads((workdir / "eval.json").read_text())
    assert found["checkpoint"] == "checkpoints/6"
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(CheckpointError, match="none can be read: best/"):
        evaluate(workdir, **AVERAGED)
    shutil.rmtree(workdir / "best")
    with pytest.raises(CheckpointError, match="there is none yet"):
        evaluate(workdir, **AVERAGED)


def test_another_config_or_no_run_is_refused(finished, tmp_path):
    with pytest.raises(WorkdirError, match=r"optim\.lr: 0\.3 there, 0\.01 now"):
        evaluate(finished, **{"optim.ema_decay": 0.7})
    with pytest.raises(WorkdirError, match="no run was started"):
        evaluate(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_task_without_evaluation_sets_is_told_so(finished):
    class Blind(LinearTask):
        def evaluators(self):
            return {}

    with pytest.raises(ValueError, match="no evaluation sets"):
        evaluate_workdir(Blind(linear_config(**AVERAGED)), finished, eval_batches)


def test_a_stored_config_comes_back_as_it_was(tmp_path):
    config = linear_config(**{"optim.lr": 0.3})
    layers = {"up": {"attn1": "all", "conv2": ((0, 1), (2, 0))}}
    config.model.layers = ConfigDict(layers)
    config.model.keys = (47, 45)
    config.model.empty = ()
    open_workdir(str(tmp_path), config, is_writer=True)
    found = read_config(tmp_path)
    assert ConfigDict(found).to_dict() == config.to_dict()
    assert found["model"]["layers"] == layers
    check_config(tmp_path, ConfigDict(found))
    with pytest.raises(WorkdirError, match=r"model\.keys: \(47, 45\) there, \(47,\) now"):
        check_config(tmp_path, ConfigDict(found | {"model": found["model"] | {"keys": (47,)}}))
    check_config(tmp_path, ConfigDict(found | {"seed": 7}), ignored=("se",))


def test_a_run_of_before_a_setting_is_read_and_resumed_as_it_computed(tmp_path):
    config = satdifuser_pretrain.get_config("tiny")
    open_workdir(str(tmp_path), config, is_writer=True)
    stored = read_json(tmp_path / "config.json")
    del stored["model.zero_snr"]
    write_json(tmp_path / "config.json", stored)
    assert read_config(tmp_path)["model"]["zero_snr"] is False
    open_workdir(str(tmp_path), config, is_writer=True)
    del stored["model.min_snr_gamma"]
    write_json(tmp_path / "config.json", stored)
    with pytest.raises(WorkdirError, match=r"min_snr_gamma: None there, 5\.0 now"):
        open_workdir(str(tmp_path), config, is_writer=True)
