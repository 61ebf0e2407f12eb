"""The image codecs against torch diffusers, the published code's golden vectors, and themselves."""

from __future__ import annotations

import diffusers
import jax
import numpy as np
import pytest
import torch
from conftest import golden_cases, read_golden, rel_error
from torch_oracle import nchw, nhwc, randomise, tree_from_torch

from satdifuser_jax.convert import load_vae
from satdifuser_jax.vae import AutoencoderKL, SpaceToDepth, VAEConfig, init_vae, vae_shapes

TINY = VAEConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=16)


def run(config, params, x, method):
    vae = AutoencoderKL(config)
    return jax.jit(lambda p, x: vae.apply({"params": p}, x, method=method))(params, x)


@pytest.fixture(scope="module")
def torch_vae():
    torch.manual_seed(0)
    vae = randomise(diffusers.AutoencoderKL.from_config(TINY.to_dict()))
    return vae, tree_from_torch(vae.state_dict(), vae=True)


def test_encoder_equals_torch_diffusers_on_random_weights(torch_vae):
    vae, params = torch_vae
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    mean, logvar = run(TINY, params, images, "encode")
    with torch.no_grad():
        posterior = vae.encode(nchw(images)).latent_dist
    assert mean.shape == (2, 8, 8, 4)
    assert rel_error(mean, nhwc(posterior.mean)) < 2e-5
    assert rel_error(logvar, nhwc(posterior.logvar)) < 2e-5


def test_decoder_equals_torch_diffusers_on_random_weights(torch_vae):
    vae, params = torch_vae
    latents = np.random.default_rng(1).standard_normal((2, 8, 8, 4), np.float32)
    with torch.no_grad():
        expected = vae.decode(nchw(latents)).sample
    assert rel_error(run(TINY, params, latents, "decode"), nhwc(expected)) < 2e-5


def test_log_variance_is_clamped():
    params = init_vae(TINY, 0)
    params["quant_conv"]["bias"] = np.array([0] * 4 + [1e3, -1e3, 0, 0], np.float32)
    _, logvar = run(TINY, params, np.zeros((1, 16, 16, 3), np.float32), "encode")
    assert logvar[..., 0].min() == 20 and logvar[..., 1].max() == -30


def test_full_size_has_the_published_number_of_tensors():
    leaves = jax.tree.leaves(vae_shapes(VAEConfig()))
    assert len(leaves) == 248
    assert round(sum(leaf.size for leaf in leaves) / 1e6, 2) == 83.65


def test_config_round_trips_and_refuses_what_is_not_implemented():
    assert VAEConfig.from_dict(TINY.to_dict()) == TINY
    assert VAEConfig.from_dict(diffusers.AutoencoderKL.from_config(TINY.to_dict()).config) == TINY
    with pytest.raises(ValueError, match="shift_factor=0.5"):
        VAEConfig.from_dict(TINY.to_dict() | {"shift_factor": 0.5})
    with pytest.raises(ValueError, match="AttnDownEncoderBlock2D"):
        VAEConfig.from_dict(TINY.to_dict() | {"down_block_types": ["AttnDownEncoderBlock2D"] * 2})
    with pytest.raises(ValueError, match="16, not divisible by norm_num_groups=32"):
        VAEConfig(block_out_channels=(16, 32))


def test_image_side_must_fit_the_latent_grid():
    with pytest.raises(ValueError, match="divisible by 2"):
        run(TINY, init_vae(TINY, 0), np.zeros((1, 15, 16, 3), np.float32), "encode")


def test_space_to_depth_is_lossless_and_keeps_patches_in_place():
    codec = SpaceToDepth(4)
    images = np.random.default_rng(0).standard_normal((2, 8, 16, 3), np.float32)
    latents, logvar = codec.apply({"params": {}}, images, method="encode")
    assert logvar is None and latents.shape == (2, 2, 4, codec.latent_channels)
    np.testing.assert_array_equal(latents[1, 1, 2].reshape(4, 4, 3), images[1, 4:8, 8:12])
    np.testing.assert_array_equal(codec.apply({"params": {}}, latents, method="decode"), images)


def test_codecs_share_one_interface():
    for codec, factor in ((AutoencoderKL(TINY), 2), (SpaceToDepth(4), 4)):
        assert codec.factor == factor
        side = 4 * factor
        params = init_vae(TINY, 0) if factor == 2 else {}
        images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
        latents, _ = jax.eval_shape(
            lambda x, c=codec, p=params: c.apply({"params": p}, x, method="encode"), images
        )
        assert latents.shape == (1, 4, 4, codec.latent_channels)
        assert codec.scaling_factor == (0.18215 if factor == 2 else 1.0)


@pytest.mark.parametrize("folder", golden_cases("satdifuser_*"))
def test_golden_vae_posterior_and_reconstruction(folder):
    _, arrays = read_golden(folder)
    config, params, report = load_vae(folder / "checkpoint" / "vae")
    report.raise_if_bad()
    mean, logvar = run(config, params, nhwc(arrays["images"]), "encode")
    assert rel_error(mean, nhwc(arrays["latent_mean"])) < 2e-5
    assert rel_error(logvar, nhwc(arrays["latent_logvar"])) < 2e-5
    latents = mean * config.scaling_factor
    assert rel_error(latents, nhwc(arrays["latents"])) < 2e-5
    recon = run(config, params, latents / config.scaling_factor, "decode")
    assert rel_error(recon, nhwc(arrays["vae_recon"])) < 2e-5
