from __future__ import annotations

import jax
import numpy as np
import pytest
from conftest import rel_error
from fake_unet import SCHEDULE, fake

from satdifuser_jax.sampling import SampleConfig, decode_latents, sample_images, sample_latents
from satdifuser_jax.vae import SpaceToDepth


def start(spec, count, side):
    """The noise that sampling starts from, by the stated rule (seed, image number)."""
    keys = [jax.random.fold_in(jax.random.key(spec.seed), i) for i in range(count)]
    return np.stack([np.asarray(jax.random.normal(k, (side, side, 4))) for k in keys])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_equals_diffusers_ddim(guidance):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")

    spec = SampleConfig(num_steps=7, guidance_scale=guidance, seed=3)
    metadata = np.random.default_rng(0).random((2, 7), np.float32) / 100
    found = sample_latents(
        fake(num_metadata=7), spec, index=np.arange(2), side=4, metadata=metadata
    )
    scheduler = diffusers.DDIMScheduler.from_config(SCHEDULE.to_config())
    scheduler.set_timesteps(7)
    x = torch.from_numpy(start(spec, 2, 4))
    extra = torch.from_numpy(metadata.mean(1))[:, None, None, None]
    for t in scheduler.timesteps:
        out = (0.12 + 10 * extra) * x + 1e-4 * t
        if guidance > 1:  # the other half: empty prompt, zero metadata
            empty = 0.07 * x + 1e-4 * t
            out = empty + guidance * (out - empty)
        x = scheduler.step(out, t, x).prev_sample
    assert rel_error(found, x.numpy()) < 2e-5


def test_an_image_depends_on_its_seed_and_number_alone():
    backbone = fake()
    many = sample_latents(backbone, SampleConfig(num_steps=3), index=np.arange(5), side=4)
    few = sample_latents(backbone, SampleConfig(num_steps=3), index=np.arange(2), side=4)
    np.testing.assert_allclose(many[:2], few, rtol=1e-5)
    other = sample_latents(backbone, SampleConfig(num_steps=3, seed=1), index=np.arange(2), side=4)
    assert not np.allclose(other, few)


def test_a_perfect_velocity_network_samples_its_picture():
    rng = np.random.default_rng(0)
    z = rng.uniform(-0.5, 0.5, (4, 4, 12)).astype(np.float32)
    spec = SampleConfig(num_steps=20)
    backbone = fake("velocity", in_channels=12, out_channels=12)
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), (4, 4, 12))
    backbone = backbone.replace(unet_params={"z": z, "noise": np.asarray(noise)})
    latents = np.asarray(sample_latents(backbone, spec, index=np.arange(1), side=4))[0]
    # Sampling assumes pure noise at the first time; what is left of z there is its only error.
    assert np.corrcoef(latents.ravel(), z.ravel())[0, 1] > 0.98
    picture = SpaceToDepth(2).apply({}, latents[None], method="decode")
    images = sample_images(backbone, spec, index=np.arange(1), side=4)
    assert images.shape == (1, 8, 8, 3)
    np.testing.assert_allclose(images, np.clip(picture, -1, 1), atol=1e-6)


def test_decoding_undoes_the_scaling():
    backbone = fake()
    images = np.random.default_rng(1).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    latents, _ = backbone.codec.apply({}, images, method="encode")
    np.testing.assert_allclose(decode_latents(backbone, latents), images, atol=1e-6)


def test_missing_metadata_counts_as_zeros_and_wrong_ones_are_refused():
    backbone, spec = fake(num_metadata=7), SampleConfig(num_steps=2)
    a = sample_latents(backbone, spec, index=np.arange(2), side=4)
    b = sample_latents(
        backbone, spec, index=np.arange(2), side=4, metadata=np.zeros((2, 7), np.float32)
    )
    np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"need \[2,7\]"):
        sample_latents(backbone, spec, index=np.arange(2), side=4, metadata=np.zeros((3, 7)))
    with pytest.raises(ValueError, match="no metadata embeddings"):
        sample_latents(fake(), spec, index=np.arange(2), side=4, metadata=np.zeros((2, 7)))
    with pytest.raises(ValueError, match="empty prompt"):
        guided = SampleConfig(num_steps=2, guidance_scale=2.0)
        sample_latents(fake().replace(uncond=None), guided, index=np.arange(2), side=4)
