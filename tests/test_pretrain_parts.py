from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from test_prompts import write_tokenizer
from tiny_pipeline import PLAIN, TEXT, UNET, VAE, make_components, write_pipeline

from common_jax.sharding import make_mesh
from common_jax.weights import LazyTensor, flatten
from configs.satdifuser_pretrain import get_config
from satdifuser_jax.convert import export_component, export_pipeline
from satdifuser_jax.pretrain_parts import (
    find_parts,
    load_codec_params,
    load_text,
    load_unet_params,
    load_words,
)
from satdifuser_jax.schedule import Schedule
from satdifuser_jax.text_encoder import init_text_encoder
from satdifuser_jax.unet import UNetConfig, init_unet
from satdifuser_jax.vae import SpaceToDepth


def settings(arg="tiny", **changes):
    config = get_config(arg)
    with config.unlocked():
        config.model.update(changes)
    return config.model


@pytest.fixture
def pipeline(tmp_path):
    return write_pipeline(tmp_path / "pipeline")


def test_every_part_of_a_pipeline_is_found_without_reading_weights(pipeline):
    for weights in pipeline.rglob("*.safetensors"):
        weights.write_bytes(b"not weights")
    parts = find_parts(settings(weights=str(pipeline)), 16)
    # 16 pixels are 8 of the latent: what an export draws unless told otherwise.
    unet = dataclasses.replace(UNET, sample_size=8)
    assert UNET.sample_size != 8 and parts.unet == unet
    assert (parts.codec.config, parts.text) == (VAE, TEXT)
    assert parts.schedule == Schedule() and set(parts.folders) == {
        "unet",
        "vae",
        "text_encoder",
        "tokenizer",
    }


def test_the_schedule_is_that_of_the_weights_unless_asked_for(tmp_path):
    epsilon = Schedule(prediction_type="epsilon")
    export_pipeline(tmp_path, make_components(), epsilon)
    model = settings(weights=str(tmp_path), text="none")
    assert find_parts(model, 16).schedule == epsilon
    model = settings(weights=str(tmp_path), text="none", prediction_type="v_prediction")
    assert find_parts(model, 16).schedule == Schedule()
    model = settings(zero_snr=True)
    assert find_parts(model, 16).schedule == Schedule(rescale_betas_zero_snr=True)


def test_stable_diffusion_gets_new_metadata_embeddings_and_keeps_its_weights(pipeline):
    weights = init_unet(PLAIN, 5)
    (pipeline / "unet" / "config.json").unlink()
    export_component(pipeline / "unet", "unet", PLAIN, weights)
    parts = find_parts(settings(weights=str(pipeline)), 16)
    assert parts.unet == dataclasses.replace(UNET, sample_size=8)
    found, old = flatten(load_unet_params(parts, seed=0)), flatten(weights)
    new = {path for path in found if path.startswith("metadata_embedding_")}
    assert set(found) - set(old) == new and len(new) == 7 * 4
    for path, value in old.items():
        np.testing.assert_array_equal(found[path], value)
    assert all(np.std(found[path]) > 0 for path in new)


def test_a_pipeline_that_lacks_anything_else_is_refused(pipeline):
    weights = init_unet(UNET, 5)
    del weights["conv_out"]["bias"]
    export_component(pipeline / "unet", "unet", UNET, weights)
    with pytest.raises(ValueError, match=r"missing: conv_out\.bias"):
        load_unet_params(find_parts(settings(weights=str(pipeline)), 16), seed=0)


def test_metadata_embeddings_are_dropped_where_the_run_has_no_metadata(pipeline):
    parts = find_parts(settings(weights=str(pipeline), metadata=False), 16)
    assert parts.unet == dataclasses.replace(PLAIN, sample_size=8)
    assert not any(name.startswith("metadata") for name in load_unet_params(parts, seed=0))


def test_frozen_parts_are_read_in_the_asked_for_dtype(pipeline):
    for file in (pipeline / "tokenizer").iterdir():
        file.unlink()
    (pipeline / "tokenizer").rmdir()
    write_tokenizer(pipeline / "tokenizer")
    parts = find_parts(settings(weights=str(pipeline)), 16)
    tower, tokenize = load_text(parts, "bfloat16"), load_words(parts)
    assert {str(leaf.dtype) for leaf in flatten(tower.params).values()} == {"bfloat16"}
    assert tokenize(["a satellite image"]).shape == (1, TEXT.max_position_embeddings)
    vae = flatten(load_codec_params(parts))
    assert set(vae) == set(flatten(make_components()["vae"][1]))
    assert parts.codec.dtype == "float32"
    half = find_parts(settings(weights=str(pipeline), vae_dtype="bfloat16"), 16)
    assert half.codec.dtype == "bfloat16" and load_codec_params(half).keys() == {
        *load_codec_params(parts)
    }


def test_on_a_mesh_parts_are_the_same_and_no_split_tensor_is_read_whole(pipeline, monkeypatch):
    export_component(pipeline / "unet", "unet", PLAIN, init_unet(PLAIN, 5))
    parts = find_parts(settings(weights=str(pipeline)), 16)  # the metadata embeddings are drawn
    mesh, reads, read = make_mesh(fsdp=2, devices=jax.devices()[:2]), [], LazyTensor.read

    def counted(tensor, index=()):
        value = read(tensor, index)
        reads.append(value.size)
        return value

    def load(mesh):
        reads.clear()
        trees = load_unet_params(parts, 0, mesh), load_codec_params(parts, mesh=mesh)
        return [*map(flatten, trees), flatten(load_text(parts, "float32", mesh).params)]

    whole = load(None)
    monkeypatch.setattr(LazyTensor, "read", counted)
    for placed, expected in zip(load(mesh), whole, strict=True):
        assert placed.keys() == expected.keys()
        for path, value in expected.items():
            np.testing.assert_array_equal(np.asarray(placed[path]), value, err_msg=path)
    expected = []
    for path, leaf in (item for tree in load(mesh) for item in tree.items()):
        if not path.startswith("metadata_embedding_"):
            expected += [leaf.size] if leaf.is_fully_replicated else [leaf.size // 2] * 2
    assert sorted(reads) == sorted(expected)


def test_the_full_size_can_be_planned_without_weights_but_not_trained():
    parts = find_parts(settings("size=sd21"), 256)
    assert parts.unet == dataclasses.replace(UNetConfig.sd21(metadata=True), sample_size=32)
    assert (parts.codec.factor, parts.text.hidden_size, parts.folders) == (8, 1024, {})
    with pytest.raises(ValueError, match=r"no weights of the vae: set model\.vae"):
        load_codec_params(parts)
    with pytest.raises(ValueError, match=r"no weights of the text_encoder: set model\.text"):
        load_text(parts, "float32")


def test_parts_that_do_not_fit_together_are_refused(pipeline):
    model = settings(weights=str(pipeline))
    wide = dataclasses.replace(TEXT, hidden_size=16)
    export_component(pipeline / "text_encoder", "text_encoder", wide, init_text_encoder(wide, 0))
    with pytest.raises(ValueError, match="context of width 8, the text tower makes 16"):
        find_parts(model, 16)
    assert find_parts(settings(weights=str(pipeline), text="none"), 16).text is None
    (pipeline / "vae" / "config.json").write_text('{"_class_name": "SpaceToDepth", "patch": 4}')
    with pytest.raises(ValueError, match="takes latents of 4 channels, the codec makes 48"):
        find_parts(model, 16)


def test_from_scratch_the_network_starts_at_the_variance_of_the_target():
    parts = find_parts(settings(), 32)
    assert parts.codec == SpaceToDepth(4) and parts.unet.sample_size == 8
    assert not load_unet_params(parts, 0)["conv_out"]["kernel"].any()


def test_published_is_the_recipe_of_diffusionsat():
    c = get_config("dataset=satellite,published")
    assert (c.optim.name, c.optim.lr, c.optim.schedule) == ("adamw", 4e-6, "constant")
    assert (c.optim.weight_decay, c.optim.clip, c.optim.ema_decay) == (1e-2, 1.0, 0.9999)
    assert (c.batch_size, c.optim.steps, c.data.side) == (64, 150_000, 256)
    assert (c.model.min_snr_mode, c.model.metadata_dropout) == ("published", 0.1)
    assert (c.data.smallest_crop, c.data.flips, c.model.caption_dropout) == (0, False, 0.0)
    assert (c.checkpoint.every, c.checkpoint.keep_every, c.eval.guidance) == (500, 10_000, 3.0)
    large = get_config("dataset=satellite,published,side=512")
    assert (large.optim.lr, large.data.side) == (2e-6, 512)
    assert get_config().eval.guidance == 1.0
