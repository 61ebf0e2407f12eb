"""Extraction against golden vectors, loops in torch and numpy, and networks with known answers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_cases, read_golden, rel_error
from fake_unet import FAKE_SCALES, SCHEDULE, TINY, FakeUNet, fake

from common_jax.files import read_json
from satdifuser_jax.convert import load_unet, load_vae
from satdifuser_jax.extract import (
    Backbone,
    ExtractConfig,
    encode_latents,
    extract,
    extract_features,
    features_at,
    invert,
    latents_at_times,
    noise_latents,
)
from satdifuser_jax.extract_config import inversion_steps
from satdifuser_jax.prompts import prompt_embeddings
from satdifuser_jax.schedule import Schedule, ScheduleError
from satdifuser_jax.taps import PUBLISHED_LAYERS, select_taps
from satdifuser_jax.unet import SatUNet, UNetConfig, init_unet, unet_shapes
from satdifuser_jax.vae import AutoencoderKL, SpaceToDepth, VAEConfig, init_vae

TINY_SCALES = select_taps(TINY, PUBLISHED_LAYERS, 8)


def latents(batch=3, side=4, channels=4, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, side, side, channels), np.float32)


@pytest.fixture(scope="module")
def tiny():
    """A tiny real UNet on space-to-depth latents, random weights, in a backbone."""
    config = dataclasses.replace(TINY, in_channels=12, out_channels=12)
    context = np.random.default_rng(5).standard_normal((1, 7, 24), np.float32)
    parts = (SatUNet(config), init_unet(config, 3), SpaceToDepth(2), {}, SCHEDULE, context)
    return Backbone(*parts)


# ------------------------------------------------------------------------------ golden vectors
def golden_backbone(folder, tmp_path):
    checkpoint = folder / "checkpoint"
    unet_config, unet, report = load_unet(checkpoint / "unet")
    report.raise_if_bad()
    vae_config, vae, report = load_vae(checkpoint / "vae")
    report.raise_if_bad()
    meta, arrays = read_golden(folder)
    text = {name: checkpoint / name for name in ("tokenizer", "text_encoder")}
    context = prompt_embeddings([meta["inversion"]["prompt"]], **text, cache=tmp_path)
    scheduler = Schedule.from_config(read_json(checkpoint / "scheduler" / "scheduler_config.json"))
    parts = (SatUNet(unet_config), unet, AutoencoderKL(vae_config), vae, scheduler, context)
    return Backbone(*parts), meta["inversion"], arrays


def nhwc(array):
    return np.moveaxis(array, 1, -1)


@pytest.mark.parametrize("folder", golden_cases("satdifuser_*"))
def test_golden_inversion_from_image_and_prompt(folder, tmp_path):
    backbone, settings, arrays = golden_backbone(folder, tmp_path)
    side = backbone.latent_side(settings["img_size"])
    config = ExtractConfig(
        keys=tuple(settings["save_timesteps"]),
        num_timesteps=settings["num_timesteps"],
        scales=select_taps(backbone.unet.config, settings["layer_idxs"], side),
        metadata="record" if "metadata" in arrays else "none",
    )
    metadata = arrays.get("metadata")
    z0 = encode_latents(backbone, nhwc(arrays["images"]), config)
    assert rel_error(z0, nhwc(arrays["latents"])) < 2e-5
    found = jax.device_get(extract(backbone, z0, config, metadata=metadata))
    for t, key in enumerate(config.keys):
        expected = nhwc(arrays[f"inversion/x0/{key}"])
        assert rel_error(found.x0[:, t], expected) < 1e-4, key
        for scale, features in zip(config.scales, found.features):
            assert sum(scale.channels) == features.shape[-1]
            assert settings["dims"][str(scale.side)] == list(scale.channels)
            expected = nhwc(arrays[f"inversion/feats/{key}/{scale.side}"])
            assert rel_error(features[:, t], expected) < 1e-4, (key, scale.side)


# --------------------------------------------------------------------------- against torch
def test_inversion_equals_a_torch_loop_on_random_weights():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from torch_oracle import nchw, randomise, tree_from_torch
    from torch_oracle import nhwc as to_nhwc

    torch.manual_seed(0)
    unet = randomise(diffusers.UNet2DConditionModel.from_config(TINY.to_dict()))
    context = np.random.default_rng(5).standard_normal((1, 7, 24), np.float32)
    params = tree_from_torch(unet.state_dict())
    backbone = Backbone(SatUNet(TINY), params, SpaceToDepth(2), {}, SCHEDULE, context)
    z0 = latents(2, 8, 4)
    config = ExtractConfig(scales=TINY_SCALES)
    found = extract(backbone, z0, config)

    seen, expected = {}, {}
    for scale in TINY_SCALES:
        for name in scale.taps:
            module = unet.get_submodule(name)
            module.register_forward_hook(lambda m, a, out, n=name: seen.__setitem__(n, out))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    x = nchw(z0)
    for i in range(10):
        t, t_next = (-1 if i == 0 else 20 * i - 19), 20 * i + 1
        a = torch.tensor(1.0, dtype=torch.float64) if t < 0 else abar[t]
        with torch.no_grad():
            text = torch.from_numpy(context).expand(2, -1, -1)
            e = unet(x, torch.full((2,), float(t)), text).sample.double()
        x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
        if 49 - i in (47, 45, 40):
            expected[49 - i] = (dict(seen), x0, x)
        x = (abar[t_next].sqrt() * x0 + (1 - abar[t_next]).sqrt() * e).float()
    for k, key in enumerate((47, 45, 40)):
        taps, x0, x = expected[key]
        assert rel_error(found.x0[:, k], to_nhwc(x0)) < 1e-4
        assert rel_error(found.latents[:, k], to_nhwc(x)) < 1e-4
        for scale, features in zip(TINY_SCALES, found.features):
            maps = [to_nhwc(taps[n]) if taps[n].ndim == 4 else taps[n].numpy() for n in scale.taps]
            maps = [m.reshape(2, scale.side, scale.side, -1) for m in maps]
            assert rel_error(features[:, k], np.concatenate(maps, -1)) < 1e-4

    # the way of a latents cache: what is stored gives the same features, three keys in one call
    for a, b in zip(features_at(backbone, found.latents, config), found.features):
        assert rel_error(a, b) < 2e-5


# ------------------------------------------------------------- networks with known answers
@pytest.mark.parametrize("prediction", ["as_epsilon", "epsilon", "v_prediction"])
def test_every_prediction_type_equals_a_numpy_loop(prediction):
    z0 = latents()
    config = ExtractConfig(prediction_type=prediction, scales=FAKE_SCALES)
    found = extract(fake(), z0, config)
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    x, kept = z0.astype(np.float64), []
    for t, t_next in zip([-1, *range(1, 162, 20)], range(1, 182, 20)):
        a = 1.0 if t < 0 else abar[t]
        e = 0.12 * x + 1e-4 * t
        if prediction == "v_prediction":
            e = np.sqrt(a) * e + np.sqrt(1 - a) * x
        x0 = (x - np.sqrt(1 - a) * e) / np.sqrt(a)
        if t in (21, 61, 161):
            kept.append((x, x0))
        x = np.sqrt(abar[t_next]) * x0 + np.sqrt(1 - abar[t_next]) * e
    assert rel_error(found.latents, np.stack([x for x, _ in kept], 1)) < 1e-5
    assert rel_error(found.x0, np.stack([x0 for _, x0 in kept], 1)) < 1e-5


def test_the_published_quirk_shrinks_the_signal_by_the_predicted_share():
    z, noise = latents(2)
    backbone = fake("velocity", {"z": z, "noise": noise})
    reached, abar = (21, 61, 161), SCHEDULE.alphas_cumprod.astype(np.float64)
    config = {"timesteps": reached}
    quirk = invert(backbone, z[None], ExtractConfig(**config))
    correct = invert(backbone, z[None], ExtractConfig(**config, prediction_type="v_prediction"))
    for k, (t, share) in enumerate(zip(reached, (0.004, 0.022, 0.091))):
        root, rest = np.sqrt(abar[t]), np.sqrt(1 - abar[t])
        # a perfect v-network under the correct conversion stays on the line from z to the noise
        assert rel_error(correct[0, k], root * z + rest * noise) < 1e-5
        basis = np.stack([z.ravel(), noise.ravel()], 1).astype(np.float64)
        clean, _ = np.linalg.lstsq(basis, np.asarray(quirk[0, k]).ravel(), rcond=None)[0]
        steps = [1.0, *abar[1 : t + 1 : 20]]  # alpha_bar at -1, 1, 21, ..., t
        predicted = sum(
            (np.sqrt(1 - b) - np.sqrt(b * (1 - a) / a)) * np.sqrt(1 - a)
            for a, b in zip(steps, steps[1:])
        )
        assert abs(predicted - share) < 6e-4  # the published analysis: 0.4, 2.2 and 9.1 %
        assert abs((root - clean) - predicted) < 0.1 * predicted


def test_the_ten_published_evaluations_and_their_labels():
    steps = list(inversion_steps(ExtractConfig(), SCHEDULE))
    assert [s.t for s in steps] == [-1, *range(1, 162, 20)]
    assert [s.key for s in steps] == list(range(49, 39, -1))
    assert [s.t_next for s in steps] == list(range(1, 182, 20))
    assert ExtractConfig().times(SCHEDULE) == (21, 61, 161)
    coarse = ExtractConfig(keys=(7, 8), num_timesteps=10)
    assert coarse.times(SCHEDULE) == (1, 101) and len(list(inversion_steps(coarse, SCHEDULE))) == 3


def test_each_feature_was_seen_at_its_own_time_in_one_pass_and_from_stored_latents():
    backbone, z0 = fake(), latents()
    config = ExtractConfig(keys=(40, 49, 47), scales=FAKE_SCALES)  # any order given
    found = extract(backbone, z0, config)
    assert [found.features[0][0, k, 0, 0, 0] for k in range(3)] == [-1.0, 21.0, 161.0]
    stored = invert(backbone, z0, config)
    np.testing.assert_allclose(stored, found.latents, rtol=1e-6)
    np.testing.assert_array_equal(stored[:, 0], z0)  # key 49 is the latent itself
    np.testing.assert_array_equal(features_at(backbone, stored, config)[0], found.features[0])


def test_raw_timesteps_mean_the_same_as_keys():
    assert ExtractConfig(timesteps=(161, 21, 61)).inversion_keys(SCHEDULE) == (47, 45, 40)
    backbone, z0 = fake(), latents()
    a = invert(backbone, z0, ExtractConfig(timesteps=(21, 81)))
    np.testing.assert_array_equal(a, invert(backbone, z0, ExtractConfig(keys=(47, 44))))


def test_inversion_compiles_once_for_all_calls_keys_and_batches():
    backbone = fake()
    invert(backbone, latents(5), ExtractConfig())
    before = FakeUNet.traces
    invert(backbone, latents(5, seed=1), ExtractConfig(keys=(30, 45)))
    assert FakeUNet.traces == before


def test_guidance_mixes_both_prompts_and_keeps_conditional_taps():
    backbone, z0, g = fake(num_metadata=7), latents(), 2.5
    metadata = np.random.default_rng(0).random((3, 7), np.float32) / 100
    config = ExtractConfig(keys=(48,), guidance_scale=g, scales=FAKE_SCALES, metadata="record")
    found = extract(backbone, z0, config, metadata=metadata)
    # one step from t=-1, where x0 is z0: x = sqrt(a) z0 + sqrt(1-a) e
    extra = metadata.mean(1)[:, None, None, None]
    conditional = (0.12 + 10 * extra) * z0 - 1e-4
    unconditional = 0.07 * z0 - 1e-4  # empty prompt and zero metadata
    e = unconditional + g * (conditional - unconditional)
    assert rel_error(found.latents[:, 0], SCHEDULE.add_noise(z0, e, 1)) < 1e-6
    assert rel_error(found.features[0][:, 0, 0, 0, 1], np.full(3, 0.02)) < 1e-6
    assert rel_error(found.features[0][:, 0, 0, 0, 2], metadata.mean(1)) < 1e-6
    unguided = extract(backbone, z0, ExtractConfig(keys=(48,), scales=FAKE_SCALES))
    assert rel_error(unguided.latents[:, 0], SCHEDULE.add_noise(z0, 0.12 * z0 - 1e-4, 1)) < 1e-6
    with pytest.raises(ValueError, match="empty prompt"):
        extract(backbone.replace(uncond=None), z0, config, metadata=metadata)


def test_metadata_is_left_out_zero_or_the_records():
    backbone, z0 = fake(num_metadata=7), latents()
    record = np.full((3, 7), 5.0, np.float32)
    for choice, value in (("none", 0.0), ("zeros", 0.0), ("record", 5.0)):
        config = ExtractConfig(keys=(49,), metadata=choice, scales=FAKE_SCALES)
        found = extract(backbone, z0, config, metadata=record).features[0]
        assert found[0, 0, 0, 0, 2] == value
    stored = np.stack([z0, z0], 1)
    config = ExtractConfig(keys=(49, 48), metadata="record", scales=FAKE_SCALES)
    rows = np.arange(3, dtype=np.float32)[:, None] * np.ones(7, np.float32)
    found = features_at(backbone, stored, config, rows)[0]
    assert found[:, :, 0, 0, 2].tolist() == [[0, 0], [1, 1], [2, 2]]  # each image's own, at all T
    with pytest.raises(ValueError, match="carry none"):
        extract(backbone, z0, config)
    with pytest.raises(ValueError, match="no metadata embeddings"):
        extract(fake(), z0, config, metadata=record)


# ------------------------------------------------------------------------------------ noise
def test_noising_takes_any_times_and_draws_by_seed_index_and_time():
    backbone, z0, index = fake(), latents(), np.array([7, 2**33 + 1, 3])
    config = ExtractConfig(mode="noising", timesteps=(900, 5, 100, 20))
    noisy = np.asarray(latents_at_times(backbone, z0, config, index=index))
    assert noisy.shape == (3, 4, 4, 4, 4) and config.times(SCHEDULE) == (5, 20, 100, 900)
    fewer = noise_latents(
        backbone, z0[2:], ExtractConfig(mode="noising", timesteps=(100,)), index[2:]
    )
    np.testing.assert_allclose(noisy[2:, 2:3], fewer, rtol=1e-6)  # alone or in company
    other = noise_latents(
        backbone, z0, ExtractConfig(mode="noising", timesteps=(5,), seed=1), index
    )
    assert not np.allclose(other[:, 0], noisy[:, 0])
    abar = SCHEDULE.alphas_cumprod[[5, 20, 100, 900]][None, :, None, None, None]
    noise = (noisy - np.sqrt(abar) * z0[:, None]) / np.sqrt(1 - abar)
    flat = np.corrcoef(noise.reshape(12, -1))
    assert np.abs(flat - np.eye(12)).max() < 0.5 and abs(noise.std() - 1) < 0.1


def test_noising_features_are_of_each_time_and_need_an_index():
    backbone, z0 = fake(), latents()
    config = ExtractConfig(mode="noising", timesteps=(5, 900), scales=FAKE_SCALES)
    found = extract(backbone, z0, config, index=np.arange(3))
    assert found.features[0][0, :, 0, 0, 0].tolist() == [5.0, 900.0] and found.x0 is None
    with pytest.raises(ValueError, match="index of each of 3 images"):
        extract(backbone, z0, config)


def test_generation_mode_is_one_key_one_grid_step_above_inversion():
    config = ExtractConfig(mode="generation", keys=(40,), scales=FAKE_SCALES)
    found = extract(fake(), latents(), config, index=np.arange(3))
    assert found.features[0][0, :, 0, 0, 0].tolist() == [181.0]
    with pytest.raises(ValueError, match="one key .*noising"):
        ExtractConfig(mode="generation", keys=(47, 40))


def test_posterior_sample_is_a_function_of_seed_and_index_around_the_mean():
    vae = AutoencoderKL(VAEConfig(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1))
    backbone = fake().replace(codec=vae, codec_params=init_vae(vae.config, 0))
    images = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
    mean = np.asarray(encode_latents(backbone, images, ExtractConfig()))
    sample = ExtractConfig(posterior="sample")

    def draw(images, *index):
        return np.asarray(encode_latents(backbone, images, sample, index=np.array(index)))

    a, b = draw(images, 4, 5, 6), draw(images[::-1], 6, 5, 4)
    np.testing.assert_allclose(a, b[::-1], rtol=1e-4, atol=1e-6)
    c = draw(images, 7, 5, 6)
    assert not np.allclose(a[0], c[0]) and np.allclose(a[1:], c[1:], atol=1e-6)
    encode = jax.jit(functools.partial(vae.apply, method="encode"))
    _, logvar = encode({"params": backbone.codec_params}, images)
    noise = ((a - mean) / 0.18215) / np.exp(0.5 * np.asarray(logvar))
    assert abs(noise.std() - 1) < 0.1 and abs(noise.mean()) < 0.1
    with pytest.raises(ValueError, match="posterior=sample"):
        encode_latents(backbone, images, sample)


# ---------------------------------------------------------------------------- whole program
@pytest.mark.slow
def test_a_batch_sharded_over_two_devices_gives_the_features_of_one(tiny):
    config = ExtractConfig(mode="noising", timesteps=(21,), scales=TINY_SCALES)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    index = np.array([3, 8])
    one = extract_features(tiny, images, config, index=index)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    two = extract_features(
        jax.device_put(tiny, everywhere), jax.device_put(images, rows), config, index=index
    )
    for a, b in zip(two, one):
        assert len(a.sharding.device_set) == 2 and not a.sharding.is_fully_replicated
        assert rel_error(a, b) < 1e-5


@pytest.mark.slow
def test_full_size_features_have_the_published_shapes():
    config = UNetConfig.sd21()
    context = jax.ShapeDtypeStruct((1, 77, 1024), jnp.float32)
    parts = (SatUNet(config), unet_shapes(config), SpaceToDepth(8), {}, SCHEDULE, context)
    settings = ExtractConfig(scales=select_taps(config, PUBLISHED_LAYERS, 32), dtype="bfloat16")
    stored = jax.ShapeDtypeStruct((2, 3, 32, 32, 4), jnp.float32)
    found = jax.eval_shape(lambda b, x: features_at(b, x, settings), Backbone(*parts), stored)
    shapes = [(1920, 32), (3840, 16), (7680, 8), (3840, 4)]
    assert [f.shape for f in found] == [(2, 3, side, side, c) for c, side in shapes]
    assert {f.dtype for f in found} == {jnp.dtype("bfloat16")}
    assert sum(int(np.prod(f.shape[2:])) for f in found) == 3_502_080


# -------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "settings,message",
    [
        ({"mode": "sideways"}, "mode='sideways' is not one of"),
        ({"keys": (47,), "timesteps": (21,)}, "not both"),
        ({"keys": (47, 47)}, "distinct"),
        ({"keys": ()}, "not empty"),
        ({"mode": "noising"}, "raw times"),
        ({"guidance_scale": -2.0}, "-1"),
        ({"prediction_type": "sample"}, "sample"),
        ({"posterior": "mean"}, "posterior='mean'"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        ExtractConfig(**settings)


def test_a_key_or_time_outside_the_schedule_is_refused_before_any_call():
    for settings in ({"keys": (50, 47)}, {"timesteps": (22,)}):
        with pytest.raises(ScheduleError, match="outside"):
            invert(fake(), latents(), ExtractConfig(**settings))
    with pytest.raises(ScheduleError, match="1000"):
        ExtractConfig(mode="noising", timesteps=(1000,)).times(SCHEDULE)


def test_images_that_are_not_square_or_do_not_divide_are_refused():
    backbone, config = fake(), ExtractConfig()
    with pytest.raises(ValueError, match=r"\(16, 32\) is not square"):
        encode_latents(backbone, np.zeros((1, 16, 32, 3), np.float32), config)
    with pytest.raises(ValueError, match="multiple of 4"):
        encode_latents(backbone, np.zeros((1, 18, 18, 3), np.float32), config)
    assert backbone.latent_side(16) == 8


def test_missing_taps_and_scales_of_another_size_are_refused(tiny):
    with pytest.raises(ValueError, match="no taps chosen"):
        extract(fake(), latents(), ExtractConfig())
    wrong = ExtractConfig(keys=(49,), scales=select_taps(TINY, PUBLISHED_LAYERS, 16))
    with pytest.raises(ValueError, match="chosen for side 16"):
        extract(tiny, latents(1, 8, 12), wrong)
    with pytest.raises(ValueError, match="hold 2 times"):
        features_at(fake(), np.zeros((1, 2, 4, 4, 4)), ExtractConfig(scales=FAKE_SCALES))
