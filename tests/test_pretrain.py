from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_train_loop import PIPELINE, losses
from text_towers import write_tower

from common_jax.sharding import make_mesh
from common_jax.train_loop import train
from configs import satdifuser_probe
from configs.satdifuser_pretrain import get_config
from satdifuser_jax.backbone import load_backbone
from satdifuser_jax.pretrain import PretrainTask, draw_noise
from satdifuser_jax.probe import ProbeTask
from satdifuser_jax.sample_files import DrawConfig, load_sampler, write_samples


def tiny(**changes):
    config = get_config("tiny")
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Workdir of one tiny pretraining."""
    folder = tmp_path_factory.mktemp("pretrain")
    config = tiny(**{"optim.steps": 8, "optim.lr": 1e-3, "eval.every": 4})
    assert train(PretrainTask(config), config, str(folder), PIPELINE) == 0
    return folder


@pytest.mark.slow
def test_pretraining_lowers_the_validation_loss_and_draws_samples(pretrained):
    lines = [json.loads(x) for x in (pretrained / "metrics.jsonl").read_text().splitlines()]
    found = [x["eval/val/mse"] for x in lines if "eval/val/mse" in x]
    assert found[-1] < found[0]
    assert len(losses(pretrained)) == 8
    assert len(list((pretrained / "samples").iterdir())) == 2


@pytest.mark.slow
def test_the_export_of_a_pretraining_is_a_backbone_for_a_probe(pretrained, tmp_path):
    backbone = load_backbone(
        pretrained / "export", resolution=None, prompt="A satellite image", prompt_cache=tmp_path
    )
    assert backbone.codec.patch == 4 and backbone.context.shape == (1, 1, 16)
    config = satdifuser_probe.get_config("tiny")
    with config.unlocked():
        config.model.weights = str(pretrained / "export")
        config.data.side, config.data.cache_dir = 32, str(tmp_path / "cache")
    assert train(ProbeTask(config), config, str(tmp_path / "probe"), PIPELINE) == 0


def test_an_export_without_a_text_tower_has_one_empty_token_for_every_prompt(tmp_path):
    task = PretrainTask(tiny())
    task.prepare(make_mesh(), None)
    params, _ = task.init(0)
    task.report(params, {}, {}, tmp_path)
    for prompt in ("", "A satellite image"):
        backbone = load_backbone(
            tmp_path / "export",
            resolution=None,
            prompt=prompt,
            prompt_cache=tmp_path,
            use_metadata=True,
        )
        assert backbone.codec.patch == 4
        np.testing.assert_array_equal(backbone.context, np.zeros((1, 1, 16)))
        jax.tree.map(np.testing.assert_array_equal, backbone.unet_params, dict(params))


def batch_of(task, count=4):
    rng = np.random.default_rng(0)
    side = task.config.data.side
    return task.encode(
        {
            "pixels": jnp.asarray(rng.uniform(-1, 1, (count, side, side, 3)), jnp.float32),
            "metadata": jnp.asarray(rng.uniform(100, 900, (count, 7)), jnp.float32),
            "index": jnp.arange(count),
        }
    )


def loss_of(task, params, batch, key):
    """What `task.loss` gives, in one program."""
    return jax.jit(lambda *args: task.loss(args[0], {}, *args[1:], None))(params, batch, key)


class Shrinks:
    """A network that costs nothing: its answer is a share of what it sees."""

    def apply(self, variables, x, t, context, metadata):
        return x * (0.5 + t[:, None, None, None] / 4000), {}


def test_the_loss_of_a_row_depends_on_its_index_not_on_its_batch():
    task = PretrainTask(tiny())
    task.unet = Shrinks()
    batch, key = batch_of(task), jax.random.key(0)
    whole, weight, _, _ = loss_of(task, {}, batch, key)
    halves = [
        loss_of(task, {}, jax.tree.map(lambda x, s=s: x[s], batch), key)[0]
        for s in (slice(0, 2), slice(2, 4))
    ]
    np.testing.assert_allclose(float(whole), float(sum(halves)), rtol=1e-5)
    assert float(weight) == 4


def test_the_loss_equals_the_formula_of_min_snr_on_a_network_that_answers_zero():
    """At the zero output layer of the start the error is the target itself."""
    task = PretrainTask(tiny(**{"model.min_snr_mode": "published"}))
    params, _ = task.init(0)
    batch, key = batch_of(task), jax.random.key(3)
    loss, _, _, metrics = loss_of(task, params, batch, key)
    expected = plain = 0.0
    for i in range(4):
        parts = jax.random.split(jax.random.fold_in(key, i), 4)
        t = int(jax.random.randint(parts[0], (), 0, 1000))
        noise = np.asarray(jax.random.normal(parts[1], batch["latents"].shape[1:]))
        alpha = float(task.frozen.schedule.alphas_cumprod[t])
        target = np.sqrt(alpha) * noise - np.sqrt(1 - alpha) * np.asarray(batch["latents"][i])
        snr = alpha / (1 - alpha)
        plain += np.mean(target**2)
        expected += min(snr, 5.0) / snr * np.mean(target**2)
    np.testing.assert_allclose(float(loss), expected, rtol=1e-5)
    np.testing.assert_allclose([*map(float, metrics["mse"])], [plain, 4], rtol=1e-5)


def test_noise_offset_and_input_perturbation_are_those_of_the_published_trainer():
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(2000))
    plain, seen = draw_noise(keys, (2, 2, 3), tiny().model)
    assert plain is seen
    both = tiny(**{"model.noise_offset": 0.5, "model.input_perturbation": 0.1}).model
    noise, seen = draw_noise(keys, (2, 2, 3), both)
    shift = np.asarray(noise - plain)  # one number a channel and image
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1, :1], shift.shape), atol=1e-6)
    np.testing.assert_allclose(shift[:, 0, 0].std(), 0.5, rtol=0.05)
    more = np.asarray(seen - noise)  # every number its own
    np.testing.assert_allclose(more.std(), 0.1, rtol=0.05)
    assert abs(np.corrcoef(more[:, 0, 0, 0], more[:, 0, 1, 0])[0, 1]) < 0.1


def test_perturbed_inputs_have_the_target_of_the_noise_alone():
    class Keeps:
        def apply(self, variables, x, t, context, metadata):
            self.seen = x
            return jnp.zeros_like(x), {}

    losses, inputs = [], []
    for amount in (0.0, 0.5):
        task = PretrainTask(tiny(**{"model.input_perturbation": amount}))
        task.unet = Keeps()
        losses.append(float(task.loss({}, {}, batch_of(task), jax.random.key(0), None)[0]))
        inputs.append(np.asarray(task.unet.seen))
    assert losses[0] == losses[1] and abs(inputs[0] - inputs[1]).max() > 0.1


def test_dropped_metadata_is_the_number_zero():
    always, never = (PretrainTask(tiny(**{"model.metadata_dropout": p})) for p in (1.0, 0.0))
    params, _ = always.init(0)
    params["conv_out"]["kernel"] = np.full_like(params["conv_out"]["kernel"], 0.01)
    batch, key = batch_of(always), jax.random.key(0)
    zeros = batch | {"metadata": jnp.zeros((4, 7))}
    dropped = float(loss_of(always, params, batch, key)[0])
    assert dropped == float(loss_of(never, params, zeros, key)[0])
    assert dropped != float(loss_of(never, params, batch, key)[0])


class Listens:
    """A network that costs nothing and hears its context: the answer is the context's mean."""

    def apply(self, variables, x, t, context, metadata):
        heard = jnp.broadcast_to(context.mean((1, 2)), t.shape)
        return jnp.broadcast_to(heard[:, None, None, None], x.shape), {}


def test_a_dropped_caption_is_the_empty_prompt():
    def losses_of(dropout, context):
        task = PretrainTask(tiny(**{"model.caption_dropout": dropout}))
        task.unet = Listens()
        task.frozen = task.frozen.replace(uncond=np.full((1, 1, 16), 0.5, np.float32))
        batch = batch_of(task, 64) | {"context": jnp.full((64, 1, 16), context)}
        return float(loss_of(task, {}, batch, jax.random.key(0))[0])

    empty, spoken = losses_of(0.0, 0.5), losses_of(0.0, 3.0)
    assert losses_of(1.0, 3.0) == empty
    # The error is quadratic in the context: half the rows give half the difference.
    share = (losses_of(0.5, 3.0) - empty) / (spoken - empty)
    assert 0.3 < share < 0.7


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """(config, workdir) of a tiny pretraining with a text tower, guidance and a cache."""
    folder = tmp_path_factory.mktemp("captioned")
    text = {"model.text": str(write_tower(folder / "tower")), "data.cache": "latents"}
    fixed = {"data.smallest_crop": 0, "data.flips": False, "data.cache_dir": str(folder / "cache")}
    config = tiny(**text, **fixed, **{"data.size": 8, "eval.guidance": 2.0, "eval.samples": 3})
    assert train(PretrainTask(config), config, str(folder / "run"), PIPELINE) == 0
    return config, folder / "run"


@pytest.mark.slow
def test_captions_reach_the_network_and_the_export_draws_what_the_run_draws(captioned, tmp_path):
    config, workdir = captioned
    assert len(losses(workdir)) == 3 and (workdir / "samples" / "0000003.png").is_file()
    prompts = ["A satellite image", "New Zealand"]
    run, export = PretrainTask(config).sampler(workdir), load_sampler(workdir / "export", None)
    assert run.side == export.side == 32
    np.testing.assert_allclose(run.embed(prompts), export.embed(prompts), rtol=1e-5, atol=1e-6)
    drawing = DrawConfig(count=2, steps=2, guidance=4.0)
    for name, sampler in (("run", run), ("export", export)):
        write_samples(sampler, drawing, prompts, {"month": 7.0}, tmp_path / name)
    one, two = (
        np.asarray(Image.open(tmp_path / name / "0001.png"), int) for name in ("run", "export")
    )
    assert abs(one - two).max() <= 1
