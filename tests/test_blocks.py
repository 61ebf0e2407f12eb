"""Each layer of the UNet and the VAE against its torch counterpart on random weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from conftest import rel_error
from diffusers.models.attention_processor import Attention as TorchAttention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch_oracle import nchw, nhwc, randomise, tree_from_torch

from satdifuser_jax import blocks
from satdifuser_jax.blocks import Numerics
from satdifuser_jax.vae import MapAttention

NUMERICS = Numerics(norm_groups=8)


def maps(channels: int, side: int = 6, mean: float = 0.5) -> np.ndarray:
    rng = np.random.default_rng(0)
    return mean + rng.standard_normal((2, side, side, channels), np.float32)


def run(module, torch_module, *inputs, vae=False):
    params = tree_from_torch(torch_module.state_dict(), vae)
    return jax.jit(lambda p, *a: module.apply({"params": p}, *a))(params, *inputs)


@pytest.mark.parametrize("features", [32, 48])
@pytest.mark.parametrize("embedded", [True, False])
def test_resnet_block_equals_torch(features, embedded):
    width = 20 if embedded else None
    torch_block = randomise(
        ResnetBlock2D(
            in_channels=32, out_channels=features, temb_channels=width, groups=8, eps=1e-5
        )
    )
    x = maps(32)
    emb = np.random.default_rng(1).standard_normal((2, 20), np.float32) if embedded else None
    seen = []
    torch_block.conv2.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        expected = torch_block(nchw(x), None if emb is None else torch.from_numpy(emb))
    block = blocks.ResnetBlock(features, NUMERICS)
    y, taps = run(block, torch_block, x, *([emb] if embedded else []))
    assert rel_error(y, nhwc(expected)) < 1e-5
    assert rel_error(taps["conv2"], nhwc(seen[0])) < 1e-5


def test_spatial_transformer_equals_torch():
    torch_block = randomise(
        Transformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=32,
            cross_attention_dim=12,
            norm_num_groups=8,
            use_linear_projection=True,
        )
    )
    x = maps(32)
    context = np.random.default_rng(1).standard_normal((2, 5, 12), np.float32)
    with torch.no_grad():
        expected = torch_block(nchw(x), encoder_hidden_states=torch.from_numpy(context)).sample
    y, taps = run(blocks.SpatialTransformer(4, NUMERICS), torch_block, x, context)
    assert rel_error(y, nhwc(expected)) < 1e-5
    assert {name.rsplit(".")[-1] for name in taps} == {"attn1", "attn2"}


def test_vae_attention_equals_torch():
    torch_block = TorchAttention(
        32, heads=1, dim_head=32, norm_num_groups=8, eps=1e-6, bias=True, residual_connection=True
    )
    torch_block = randomise(torch_block)
    state = {f"attentions.0.{name}": value for name, value in torch_block.state_dict().items()}
    params = tree_from_torch(state, vae=True)["attentions_0"]
    x = maps(32)
    with torch.no_grad():
        expected = torch_block(nchw(x))
    module = MapAttention(Numerics(norm_groups=8, norm_eps=1e-6))
    y = jax.jit(lambda p, x: module.apply({"params": p}, x))(params, x)
    assert rel_error(y, nhwc(expected)) < 1e-5


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_group_norm_equals_torch_far_from_zero_too(mean):
    torch_norm = randomise(torch.nn.GroupNorm(8, 32, eps=1e-6))
    x = maps(32, mean=mean)
    exact = torch_norm.double()(nchw(x).double())
    y = run(blocks.GroupNorm(8, 1e-6), torch_norm, x)
    assert rel_error(y, nhwc(exact)) < 1e-5


def test_layer_norm_equals_torch():
    torch_norm = randomise(torch.nn.LayerNorm(32))
    x = maps(32)
    with torch.no_grad():
        expected = torch_norm(torch.from_numpy(x))
    assert rel_error(run(blocks.LayerNorm(), torch_norm, x), expected) < 1e-5


@pytest.mark.parametrize("side", [6, 7])
def test_unet_downsample_equals_torch(side):
    torch_layer = randomise(Downsample2D(16, use_conv=True, padding=1))
    x = maps(16, side)
    with torch.no_grad():
        expected = torch_layer(nchw(x))
    assert rel_error(run(blocks.Downsample(), torch_layer, x), nhwc(expected)) < 1e-5


def test_vae_downsample_pads_right_and_below_only():
    torch_layer = randomise(Downsample2D(16, use_conv=True, padding=0))
    x = maps(16)
    with torch.no_grad():
        expected = torch_layer(nchw(x))
    y = run(blocks.Downsample(padding=(0, 1)), torch_layer, x)
    assert rel_error(y, nhwc(expected)) < 1e-5


def test_upsample_equals_torch():
    torch_layer = randomise(Upsample2D(16, use_conv=True))
    x = maps(16)
    with torch.no_grad():
        expected = torch_layer(nchw(x))
    assert rel_error(run(blocks.Upsample(), torch_layer, x), nhwc(expected)) < 1e-5


def test_scalar_embedding_equals_torch_for_timesteps_and_for_large_metadata():
    values = np.array([-1, 0, 1, 21, 161, 999, 463.219, 941.807], np.float32)
    mlp = randomise(TimestepEmbedding(32, 64))
    project = Timesteps(32, flip_sin_to_cos=True, downscale_freq_shift=0)
    with torch.no_grad():
        expected = mlp(project(torch.from_numpy(values)))
    assert rel_error(run(blocks.ScalarEmbedding(32, 64), mlp, values), expected) < 1e-5


@pytest.mark.parametrize(
    ("timestep", "cosines", "sines"),
    [
        (-1, (0.5403, 0.5865, 0.6284), (-0.8415, -0.8099, -0.7779)),
        (21, (-0.5477, 0.5606, 0.9911), (0.8367, 0.8281, -0.1329)),
        (161, (-0.7118, 0.3648, 0.5218), (-0.7024, 0.9311, -0.8531)),
    ],
)
def test_sinusoid_has_the_published_values(timestep, cosines, sines):
    vector = np.asarray(blocks.sinusoid(np.array([timestep]), 320))[0]
    np.testing.assert_allclose(vector[:3], cosines, atol=6e-5)
    np.testing.assert_allclose(vector[160:163], sines, atol=6e-5)
