from __future__ import annotations

import jax
import pytest
from small_probe import small_config
from test_geodit_sketch import kinds

from common_jax.flops import count_flops
from common_jax.sharding import make_mesh
from configs.satdifuser_pretrain import get_config
from data.pipeline import train_batches
from satdifuser_jax.pretrain import PretrainTask
from satdifuser_jax.probe import ProbeTask
from satdifuser_jax.sketch import count_training_flops
from satdifuser_jax.unet import UNetConfig


def test_a_sketch_of_pretraining_has_the_arrays_that_training_makes():
    task = PretrainTask(get_config("tiny"))
    sketch = task.sketch(make_mesh(), 2)
    settings = {"batch_size": 2, "seed": 0}
    batch = next(train_batches(task.train_source(), task.transforms("train"), **settings))
    assert kinds(sketch.programs["encode"].batch) == kinds(batch)
    task.prepare(make_mesh(), None)
    assert kinds(sketch.batch) == kinds(task.encode(jax.tree.map(jax.numpy.asarray, batch)))
    assert kinds(sketch.params) == kinds(task.init(0)[0])


@pytest.mark.slow
def test_a_full_size_pretraining_is_sketched_without_weights():
    task = PretrainTask(get_config("size=sd21"))
    sketch = task.sketch(None, 3)
    assert task.parts.unet.block_out_channels == UNetConfig.sd21().block_out_channels
    assert sketch.batch["latents"].shape == (3, 32, 32, 4)
    assert sketch.batch["context"].shape == (3, 77, 1024)
    _, tower = sketch.programs["encode"].weights
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(tower.params)} == {"bfloat16"}
    config = task.config.copy_and_resolve_references().unlock()
    config.data.cache, config.data.smallest_crop, config.data.flips = "all", 0, False
    cached = PretrainTask(config).sketch(None, 3)
    assert cached.batch["context"].shape == (3, 77, 1024)
    assert set(cached.programs["encode"].batch) == {"index", "metadata", "mean", "logvar", "text"}


@pytest.mark.parametrize("cache", ["taps", "latents", "none"])
def test_a_sketch_of_a_probe_has_the_features_its_head_reads(cache):
    task = ProbeTask(small_config("tiny,fuser=gw", **{"data.cache": cache}))
    sketch = task.sketch(None, 2)
    expected = {"taps": set(), "latents": {"features"}, "none": {"encode", "features"}}
    assert set(sketch.programs) == expected[cache]
    if cache == "latents":
        part = sketch.programs["features"]
        made = jax.eval_shape(part.function, part.weights, part.batch)
        assert kinds(made) == kinds(sketch.batch["features"])
    params, state = task.init(0)
    assert kinds((sketch.params, sketch.state)) == kinds((params, state))
    loss = jax.eval_shape(
        lambda params, state, batch: task.loss(params, state, batch, jax.random.key(0), None)[0],
        sketch.params,
        sketch.state,
        sketch.batch,
    )
    assert loss.shape == ()


def test_an_inversion_from_pixels_calls_the_network_once_for_every_time():
    changes = {"data.cache": "none", "model.mode": "inversion", "model.timesteps": ()}
    task = ProbeTask(small_config("tiny,fuser=gw", **changes, **{"model.save_timesteps": (47, 40)}))
    part = task.sketch(None, 2).programs["features"]
    assert part.count == 10
    assert part.batch["latents"].shape[1] == 1


def test_a_frozen_network_costs_one_pass_and_what_is_cached_none():
    def count(cache):
        task = ProbeTask(small_config("tiny,fuser=gw", **{"data.cache": cache}))
        part = task.sketch(None, 2).programs.get("features")
        alone = part and count_flops(part.function, part.weights, part.batch)
        return count_training_flops(task, 2), alone

    (head, nothing), (both, network) = count("taps"), count("latents")
    assert nothing is None and list(head) == ["train"] and head["train"] > 0
    assert both == head | {"features": pytest.approx(network / 2)}  # two rows


@pytest.mark.slow
@pytest.mark.parametrize(("side", "giga"), [(256, 181.1), (512, 804.3)])
def test_a_call_of_stable_diffusion_has_the_known_number_of_operations(side, giga):
    """As counted by hooks on the public network in torch."""
    config = get_config("size=sd21").copy_and_resolve_references().unlock()
    config.data.side, config.data.cache = side, "all"  # neither codec nor text tower
    config.data.smallest_crop, config.data.flips = 0, False
    config.model.metadata = False
    counted = count_training_flops(PretrainTask(config), 1)
    assert counted["encode"] == 0
    assert counted["train"] / 3 == pytest.approx(giga * 1e9, rel=0.002)
