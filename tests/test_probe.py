from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_train_loop import PIPELINE, losses
from tiny_pipeline import store_prompts, write_pipeline

from common_jax.files import read_json
from common_jax.sharding import make_mesh
from common_jax.train_loop import train
from data.pipeline import eval_batches
from satdifuser_jax import feature_source
from satdifuser_jax.extract import features_at
from satdifuser_jax.probe import ProbeTask
from satdifuser_jax.probe_report import write_report
from tests.hosts import ROOT, find_port
from tests.small_probe import SIDE, small_config


def probe(workdir, arg="tiny", **changes):
    """Results of a run with one call of the network at one time, unless `changes` say otherwise."""
    config = small_config(arg, **{"data.cache_dir": str(workdir.parent / "cache"), **changes})
    assert train(ProbeTask(config), config, str(workdir), PIPELINE) == 0
    return json.loads((workdir / "results.json").read_text())


@pytest.mark.slow
def test_no_cache_cached_latents_and_cached_taps_train_alike(tmp_path):
    settings = {"model.mode": "inversion", "model.timesteps": (), "optim.lr": 1e-3}
    settings["model.save_timesteps"] = (48, 47)  # three calls of the network
    settings["model.layers"] = {"up_blocks": {"attn1": "all"}}
    runs = {
        kind: (probe(tmp_path / kind, **{"data.cache": kind, **settings}), losses(tmp_path / kind))
        for kind in ("none", "latents", "taps")
    }
    for kind in ("latents", "taps"):
        np.testing.assert_allclose(
            list(runs[kind][1].values()), list(runs["none"][1].values()), rtol=1e-4
        )
        assert runs[kind][0]["eval/test/accuracy"] == runs["none"][0]["eval/test/accuracy"]
    assert {p.name for p in (tmp_path / "taps" / "figures").iterdir()} == {
        "confusion.png",
        "mixing_weights.png",
    }


@pytest.mark.slow
def test_one_of_several_processes_draws_its_report_on_a_device_of_its_own(tmp_path, monkeypatch):
    config = small_config(
        "tiny,fuser=gw", **{"data.cache": "latents", "data.cache_dir": str(tmp_path)}
    )
    task = ProbeTask(config)
    task.prepare(make_mesh(), eval_batches)
    params, state = task.init(0)
    task.maker.backbone = None  # a program on the mesh of all processes would wait for the others
    task.mesh = None
    seen = []

    def watch(backbone, *args):
        seen.extend(leaf.devices() for leaf in jax.tree.leaves(backbone))
        return features_at(backbone, *args)

    monkeypatch.setattr(feature_source, "features_at", watch)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    write_report(task, params, state, str(tmp_path))
    assert (tmp_path / "figures" / "mixing_weights.png").exists()
    assert seen and set.union(*seen) == {jax.local_devices()[0]}
    assert task.maker.backbone is None  # the task itself stays as it is


@pytest.mark.slow
def test_two_processes_with_half_a_backbone_each_train_like_one_with_the_whole(tmp_path):
    store_prompts(write_pipeline(tmp_path / "pipeline"), "A satellite image")
    runs = {count: run_probe(tmp_path, count) for count in (1, 2)}
    np.testing.assert_allclose(list(runs[2].values()), list(runs[1].values()), rtol=1e-5)
    models = [read_json(tmp_path / f"run{count}" / "labels.json")["backbone"] for count in runs]
    assert models[0] == models[1]
    assert (tmp_path / "run2" / "figures" / "mixing_weights.png").exists()


def run_probe(folder, count):
    """Losses of a run in `count` processes of one device each; all of them fill its cache."""
    settings = {"model.weights": folder / "pipeline", "mesh.fsdp": count, "data.side": SIDE}
    settings |= {"data.cache": "latents", "data.cache_dir": folder / f"cache{count}"}
    settings |= {"model.mode": "noising", "model.timesteps": "(21,)"}
    command = [sys.executable, "launch.py", "train", f"--workdir={folder}/run{count}"]
    command += ["--config=configs/satdifuser_probe.py:tiny", f"--num_processes={count}"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    place = f"--coordinator=localhost:{find_port()}"
    # The last of two values counts: those of the suite compile faster.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    hosts = [
        subprocess.Popen(
            [*command, *([place, f"--process_id={i}"] if count > 1 else [])],
            cwd=ROOT,
            env=env,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for i in range(count)
    ]
    try:
        errors = [host.communicate(timeout=300)[1] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0] * count, errors
    return losses(folder / f"run{count}")


def test_experts_that_depend_on_the_whole_batch_are_not_split():
    for changes in ({"model.warmup": "calls"}, {"model.balance_weight": 0.1}):
        (name,) = changes
        with pytest.raises(
            ValueError, match=rf"{name}.* microbatches it would be another training"
        ):
            _ = ProbeTask(small_config("tiny,fuser=moe", **changes)).accumulates
    assert ProbeTask(small_config("tiny,fuser=moe")).accumulates
    assert ProbeTask(small_config("tiny,fuser=gw", **{"model.warmup": "calls"})).accumulates


@pytest.mark.slow
def test_experts_warm_up_then_choose_and_the_run_draws_their_use(tmp_path, capfd):
    probe(tmp_path / "moe", "tiny,fuser=moe", **{"model.warmup_length": 2, "model.top_k": 1})
    err = capfd.readouterr().err
    assert "training step (dense)" in err and "training step (sparse)" in err
    assert (tmp_path / "moe" / "figures" / "expert_use.png").exists()


@pytest.mark.slow
def test_segmentation_scores_maps_and_draws_overlays(tmp_path):
    results = probe(tmp_path / "seg", "tiny,dataset=scenes_seg,fuser=lw")
    assert 0 <= results["eval/test/miou"] <= results["eval/test/miou_present"] <= 1
    names = {p.name for p in (tmp_path / "seg" / "figures").iterdir()}
    assert {"predictions.png", "gates.png", "confusion.png"} <= names


def test_a_linear_probe_learns_the_scenes_better_than_chance(tmp_path):
    changes = {
        "data.size": 160,
        "data.eval_size": 80,
        "batch_size": 32,
        "optim.steps": 60,
        "optim.lr": 3e-3,
        "eval.every": 60,
        "checkpoint.every": 60,
    }
    results = probe(tmp_path / "linear", "tiny,fuser=linear", **changes)
    assert results["eval/test/accuracy"] > 2.5 / 8


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Workdir of a finished run; its cache lies beside it."""
    workdir = tmp_path_factory.mktemp("probe") / "plain"
    probe(workdir)
    return workdir


@pytest.mark.slow
def test_few_labels_use_the_cache_of_all_pictures(plain, capfd):
    few = {"data.label_fraction": 0.5, "optim.steps": 1, "eval.every": 1}
    probe(plain.parent / "few", **few)
    assert "taps cache:" not in capfd.readouterr().err


def test_augmentation_refuses_a_cache(tmp_path):
    with pytest.raises(ValueError, match="augment=published changes the pixels of every epoch"):
        probe(tmp_path / "x", **{"data.augment": "published"})


@pytest.mark.slow
def test_metadata_of_the_record_changes_the_features(plain):
    record = {"model.metadata": "record", "optim.steps": 1, "eval.every": 1}
    assert probe(plain.parent / "record", **record)["step"] == 1
    assert losses(plain.parent / "record")[1] != losses(plain)[1]
