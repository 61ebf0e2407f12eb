from __future__ import annotations

import numpy as np
from small_probe import small_config
from tiny_pipeline import UNET, VAE, make_components, write_pipeline

from common_jax.plan_text import count, plan_table
from data.catalog import GEOBENCH
from satdifuser_jax.heads import init_head
from satdifuser_jax.probe import ProbeTask


def plan(arg, **changes):
    task = ProbeTask(small_config(arg, **changes))
    return task, {row.name: row for row in task.plan()}


def test_a_plan_counts_what_a_folder_holds_without_its_weights(tmp_path):
    folder = write_pipeline(tmp_path / "pipeline")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    expected = {kind: count(params)[:2] for kind, (_, params) in make_components().items()}
    weights = {"model.weights": str(folder), "data.side": 0}
    for metadata in ("zeros", "none"):
        task, rows = plan("tiny", **weights, **{"model.metadata": metadata})
        assert count(rows["vae"].shapes)[:2] == expected["vae"]
        found = count(rows["unet"].shapes)[:2]
        assert (found == expected["unet"]) == (metadata == "zeros")
    dropped = [p for n, p in make_components()["unet"][1].items() if n.startswith("metadata")]
    assert found[0] + count(dropped)[0] == expected["unet"][0]
    assert task.backbone.unet.config.block_out_channels == UNET.block_out_channels
    assert task.backbone.codec.config == VAE
    assert "frozen" in plan_table(list(rows.values()))


def test_half_precision_halves_the_frozen_network(tmp_path):
    folder = write_pipeline(tmp_path / "pipeline")
    sizes = [
        count(plan("tiny", **{"model.weights": str(folder), "model.dtype": d})[1]["unet"].shapes)[2]
        for d in ("float32", "bfloat16")
    ]
    assert sizes[0] == 2 * sizes[1]


def test_a_plan_of_a_benchmark_needs_no_download(monkeypatch, tmp_path):
    monkeypatch.setenv("GEO_BENCH_DIR", str(tmp_path / "nothing"))
    for name in ("m-eurosat", "m-SA-crop-type"):
        task, rows = plan(f"dataset={name},fuser=linear", **{"data.side": 0})
        assert task.side == GEOBENCH[name].side
        classes = len(GEOBENCH[name].classes)
        assert task.spec.num_classes == classes
        head = rows["head (linear)"]
        assert count(head.shapes)[0] == count(init_head(task.spec, 0)[0])[0]
        sides = [scale.side for scale in task.spec.scales]
        channels = [sum(scale.channels) for scale in task.spec.scales]
        taps = 4 * sum(s * s * c for s, c in zip(sides, channels))  # float32, one time
        latents = 4 * task.backbone.latent_side(task.side) ** 2 * 48
        assert sorted(head.extra_bytes.values()) == sorted([taps, latents])
        assert np.prod(task.backbone.unet.config.in_channels) == 48
