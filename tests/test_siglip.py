"""The tower against the published code's vectors, against torch transformers, and itself."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import golden_cases, read_golden, rel_error
from geodit_oracle import read_tree, tree_from_state
from torch_oracle import randomise

from geodit_jax.config import TowerConfig
from geodit_jax.siglip import encode_views, tower_shapes

TINY = TowerConfig(image_size=30, patch=7, width=24, layers=2, heads=3, mlp=40)


def first_layers(tower: dict, count: int) -> dict:
    return {**tower, "layers": jax.tree.map(lambda x: x[:count], tower["layers"])}


def torch_tower(config: TowerConfig) -> transformers.SiglipVisionModel:
    """A tower with one block more than ours runs, as published ones have."""
    torch.manual_seed(0)
    settings = transformers.SiglipVisionConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers + 1,
        num_attention_heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch,
        attn_implementation="eager",
    )
    return randomise(transformers.SiglipVisionModel(settings))


@pytest.fixture(scope="module")
def tiny():
    """(torch module, our tree, pixels NHWC)"""
    module = torch_tower(TINY)
    names = {f"vision_model.{name}": value for name, value in module.state_dict().items()}
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 30, 30, 3)).astype(np.float32)
    return module, tree_from_state(names, TINY.layers)["tower"], pixels


def test_features_are_the_hidden_state_before_the_last_block_of_torch_transformers(tiny):
    module, tower, pixels = tiny
    with torch.no_grad():
        channels_first = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
        expected = module(channels_first, output_hidden_states=True).hidden_states[-2]
    assert rel_error(encode_views(tower, TINY, pixels), expected.numpy()) < 1e-5


@pytest.mark.parametrize("folder", golden_cases("llada_v"))
@pytest.mark.parametrize("file", ["model", "llava_names"])
def test_golden_tower_after_every_layer(folder, file):
    meta, arrays = read_golden(folder)
    sizes = meta["tower"]
    config = TowerConfig(
        image_size=sizes["image_size"],
        patch=sizes["patch_size"],
        width=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"] - 1,
        heads=sizes["num_attention_heads"],
        mlp=sizes["intermediate_size"],
        eps=sizes["layer_norm_eps"],
    )
    tower = read_tree(folder / "tower" / f"{file}.safetensors", config.layers)["tower"]
    shapes = jax.tree.map(lambda x: x.shape, tower_shapes(config))
    assert jax.tree.map(np.shape, tower) == shapes
    pixels = arrays["tower/pixels"].transpose(0, 2, 3, 1)
    hidden = arrays["tower/hidden"]
    assert len(hidden) == config.layers + 1
    for count, expected in enumerate(hidden):
        found = encode_views(first_layers(tower, count), config, pixels)
        assert rel_error(found, expected) < 1e-5
    assert rel_error(encode_views(tower, config, pixels), arrays["tower/features"]) < 1e-5


def test_pixels_beyond_the_last_whole_patch_and_the_unused_norm_change_nothing(tiny):
    _, tower, pixels = tiny
    seen = TINY.grid * TINY.patch
    assert seen == 28
    changed = pixels.copy()
    changed[:, seen:] = changed[:, :, seen:] = 0.7
    norm = {name: value + 1 for name, value in tower["post_layernorm"].items()}
    before = encode_views(tower, TINY, pixels)
    after = encode_views({**tower, "post_layernorm": norm}, TINY, changed)
    np.testing.assert_array_equal(before, after)
    changed[:, seen - 1, 0] = 0.7
    assert np.abs(encode_views(tower, TINY, changed) - before).max() > 1e-3


def test_views_do_not_see_each_other(tiny):
    _, tower, pixels = tiny
    both, alone = encode_views(tower, TINY, pixels), encode_views(tower, TINY, pixels[1:])
    assert rel_error(both[1:], alone) < 1e-6


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputing_blocks_changes_no_gradient(tiny, remat):
    _, tower, pixels = tiny

    def gradient(remat):
        return jax.jit(
            jax.grad(lambda t: jnp.sin(encode_views(t, TINY, pixels, remat=remat)).sum())
        )(tower)

    kept, again = gradient("none"), gradient(remat)
    for tree in (kept, again):  # a bias that all keys share moves no softmax: rounding is left
        del tree["layers"]["self_attn"]["k_proj"]["bias"], tree["post_layernorm"]
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(kept)):
        assert rel_error(a, b) < 1e-5


def test_bfloat16_features_are_close_to_those_of_float32(tiny):
    _, tower, pixels = tiny
    found = encode_views(tower, TINY, pixels, dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    assert rel_error(found.astype(jnp.float32), encode_views(tower, TINY, pixels)) < 3e-2


def test_full_size_has_the_published_number_of_tensors_and_parameters():
    shapes = tower_shapes(TowerConfig())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 397_747_744
    expanded = len(jax.tree.leaves(shapes)) + 25 * len(jax.tree.leaves(shapes["layers"]))
    assert expanded == 421
    longer = tower_shapes(dataclasses.replace(TowerConfig(), layers=27))
    assert longer["layers"]["layer_norm1"]["scale"].shape == (27, 1152)


def test_views_of_another_size_are_refused(tiny):
    _, tower, pixels = tiny
    with pytest.raises(ValueError, match=r"pixels \(2, 28, 30, 3\): .* needs \[N,30,30,3\]"):
        encode_views(tower, TINY, pixels[:, :28])
