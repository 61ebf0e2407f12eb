"""Public folders become trees and folders again; whatever does not fit is named."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import golden_cases, rel_error
from flax.serialization import msgpack_restore
from safetensors.numpy import load_file
from tiny_pipeline import (
    LOADERS,
    PLAIN,
    UNET,
    WEIGHTS,
    edit,
    edit_json,
    make_components,
    write_pipeline,
)
from torch_oracle import tree_from_torch

from common_jax.weights import flatten, open_tensors, save_torch, tree_sha256
from satdifuser_jax.convert import (
    convert_pipeline,
    export_pipeline,
    find_components,
    load_text_encoder,
    load_unet,
    load_vae,
    read_config,
    to_flax_diffusers,
)
from satdifuser_jax.schedule import Schedule
from satdifuser_jax.unet import SatUNet, init_unet


@pytest.fixture(scope="module")
def components():
    return make_components()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A pipeline folder; tests copy it before they change it."""
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "pipeline")


# ------------------------------------------------------------------------------------ round trips
@pytest.mark.parametrize("kind", LOADERS)
def test_import_of_an_export_is_the_same_tree_bit_for_bit(exported, components, kind):
    config, params, report = LOADERS[kind](exported / kind)
    assert config == components[kind][0]
    assert tree_sha256(params) == tree_sha256(components[kind][1])
    assert report.ok and report.loaded == len(flatten(params)) and not report.ignored


def test_half_precision_survives_a_round_trip_and_is_cast_on_request(components, tmp_path):
    def halve(tree):
        return {
            k: halve(v) if isinstance(v, dict) else v.astype(ml_dtypes.bfloat16)
            for k, v in tree.items()
        }

    config, params = components["vae"]
    export_pipeline(tmp_path, {"vae": (config, halve(params))}, Schedule())
    kept = load_vae(tmp_path / "vae", dtype=None)[1]
    assert tree_sha256(kept) == tree_sha256(halve(params))
    cast = flatten(load_vae(tmp_path / "vae")[1])
    assert {leaf.dtype for leaf in cast.values()} == {np.dtype(np.float32)}
    wanted = flatten(halve(params))
    assert all(np.array_equal(cast[path], wanted[path].astype(np.float32)) for path in cast)


def test_an_exported_pipeline_is_read_by_torch_diffusers(components, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    plain = components | {"unet": (PLAIN, init_unet(PLAIN, 0))}
    export_pipeline(tmp_path, plain, Schedule())
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    text = transformers.CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    table = scheduler.alphas_cumprod.numpy()
    np.testing.assert_allclose(table, Schedule().alphas_cumprod, rtol=1e-6)
    assert scheduler.config.prediction_type == "v_prediction"
    state = {n.removeprefix("text_model."): v for n, v in text.state_dict().items()}
    states = {"unet": unet.state_dict(), "vae": vae.state_dict(), "text_encoder": state}
    for kind, state in states.items():
        tree = tree_from_torch(state, vae=kind == "vae")
        assert tree_sha256(tree) == tree_sha256(plain[kind][1]), kind


def test_an_export_without_metadata_is_a_whole_torch_pipeline(components, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    export_pipeline(tmp_path, {"unet": (PLAIN, init_unet(PLAIN, 0))}, Schedule())
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert hasattr(diffusers, index["_class_name"])
    assert all(hasattr(diffusers, index[part][1]) for part in ("unet", "scheduler"))


@pytest.mark.parametrize("golden", golden_cases("satdifuser_*"))
def test_golden_checkpoints_load_whole_and_survive_export(golden, tmp_path):
    parts = find_components(golden / "checkpoint")
    found = {kind: load(parts.require(kind)) for kind, load in LOADERS.items()}
    for kind, (config, params, report) in found.items():
        assert report.raise_if_bad().loaded == len(flatten(params)), kind
        state = {
            name.removeprefix("text_model."): torch.from_numpy(tensor.read())
            for name, tensor in open_tensors(parts.require(kind)).items()
        }
        tree = tree_from_torch(state, vae=kind == "vae")
        assert tree_sha256(tree) == tree_sha256(params), kind
        assert config == read_config(parts.require(kind), kind)
    pipeline = {kind: part[:2] for kind, part in found.items()}
    export_pipeline(tmp_path, pipeline, parts.schedule, tokenizer=parts.tokenizer)
    again = find_components(tmp_path)
    assert again.schedule == parts.schedule
    for kind, load in LOADERS.items():
        config, params, _ = load(again.require(kind))
        assert config == found[kind][0]
        assert tree_sha256(params) == tree_sha256(found[kind][1])
    vocabularies = [p.tokenizer / "vocab.json" for p in (parts, again)]
    assert vocabularies[0].read_bytes() == vocabularies[1].read_bytes()


# ------------------------------------------------------------------------------- namings and files
def test_both_namings_and_the_convolutional_shape_of_vae_attention_load(folder, components):
    file = folder / "vae" / WEIGHTS
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for name in list(tensors):
            for new, before in old.items():
                if f".attentions.0.{new}." in name:
                    tensors[name.replace(new, before)] = tensors.pop(name)

    def widen(tensors):
        for name, value in tensors.items():
            if "attentions.0" in name and value.ndim == 2:
                tensors[name] = value[:, :, None, None]

    wanted = tree_sha256(components["vae"][1])
    for change in (lambda tensors: None, rename, widen):
        edit(file, change)
        assert tree_sha256(load_vae(folder / "vae")[1]) == wanted
    assert "encoder.mid_block.attentions.0.query.weight" in load_file(file)


def test_the_old_vae_naming_can_be_written(components, tmp_path):
    vae = {"vae": components["vae"]}
    export_pipeline(tmp_path, vae, Schedule(), old_vae_names=True)
    names = load_file(tmp_path / "vae" / WEIGHTS)
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in names
    assert not any("to_q" in name for name in names)
    assert tree_sha256(load_vae(tmp_path / "vae")[1]) == tree_sha256(components["vae"][1])


def test_text_names_load_with_and_without_prefix_and_position_ids_are_ignored(folder, components):
    file, wanted = folder / "text_encoder" / "model.safetensors", components["text_encoder"][1]

    def add_positions(tensors):
        tensors["text_model.embeddings.position_ids"] = np.arange(5)[None]

    def drop_prefix(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("text_model.")] = tensors.pop(name)

    for change in (add_positions, drop_prefix):
        edit(file, change)
        _, params, report = load_text_encoder(folder / "text_encoder")
        assert tree_sha256(params) == tree_sha256(wanted)
        assert report.ok and len(report.ignored) == 1


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_torch_bin_files_load_in_every_float_type(folder, components, kind, dtype):
    file = next((folder / kind).glob("*.safetensors"))
    tensors = {name: value.astype(dtype) for name, value in load_file(file).items()}
    file.unlink()
    save_torch(file.with_suffix(".bin"), tensors)
    loaded = flatten(LOADERS[kind](folder / kind)[1])
    for path, value in flatten(components[kind][1]).items():
        assert loaded[path].dtype == np.float32
        assert np.array_equal(loaded[path], value.astype(dtype).astype(np.float32)), path


# -------------------------------------------------------------------------------------- metadata
def test_metadata_embeddings_are_kept_dropped_or_followed(folder, components):
    wanted = components["unet"][1]
    for use_metadata in (None, True):
        config, params, report = load_unet(folder / "unet", use_metadata=use_metadata)
        assert config == UNET and tree_sha256(params) == tree_sha256(wanted)
    config, params, report = load_unet(folder / "unet", use_metadata=False)
    assert config == PLAIN and report.ok and len(report.ignored) == 28
    plain = {name: node for name, node in wanted.items() if not name.startswith("metadata")}
    assert tree_sha256(params) == tree_sha256(plain)


def test_a_config_that_forgot_the_metadata_is_an_error_with_both_ways_out(folder):
    edit_json(folder / "unet" / "config.json", use_metadata=False, num_metadata=0)
    with pytest.raises(ValueError, match=r"28 unused(.|\n)*use_metadata=True loads") as caught:
        load_unet(folder / "unet")
    assert "metadata_embedding.0.linear_1.weight" in str(caught.value)
    assert load_unet(folder / "unet", use_metadata=True)[0] == UNET
    assert load_unet(folder / "unet", use_metadata=False)[0] == PLAIN


def test_asking_for_metadata_that_the_file_lacks_says_so(folder):
    def drop(tensors):
        for name in [name for name in tensors if "metadata" in name]:
            del tensors[name]

    edit(folder / "unet" / WEIGHTS, drop)
    for use_metadata in (None, True):
        with pytest.raises(ValueError, match=r"28 missing(.|\n)*use_metadata=False"):
            load_unet(folder / "unet", use_metadata=use_metadata)
    edit_json(folder / "unet" / "config.json", use_metadata=False)
    with pytest.raises(ValueError, match=r"missing: metadata_embedding\.0\.linear_1\.bias"):
        load_unet(folder / "unet", use_metadata=True)
    assert load_unet(folder / "unet")[0] == PLAIN


# ------------------------------------------------------------------------------------- conversion
FLAX = dataclasses.replace(PLAIN, block_out_channels=(32, 64), norm_num_groups=32)


def test_a_flax_diffusers_dump_is_our_tree(components, tmp_path):
    parts = components | {"unet": (FLAX, init_unet(FLAX, 0))}
    to_flax_diffusers(tmp_path, parts)
    for kind, name in (("unet", "diffusion_flax_model"), ("vae", "diffusion_flax_model")):
        tree = msgpack_restore((tmp_path / kind / f"{name}.msgpack").read_bytes())
        assert tree_sha256(tree) == tree_sha256(parts[kind][1])
        assert read_config(tmp_path / kind, kind) == parts[kind][0]
    tree = msgpack_restore((tmp_path / "text_encoder" / "flax_model.msgpack").read_bytes())
    layer = tree["text_model"]["encoder"]["layers"]["1"]
    wanted = components["text_encoder"][1]
    assert tree_sha256(layer) == tree_sha256(wanted["encoder"]["layers_1"])
    assert tree_sha256(tree["text_model"]["embeddings"]) == tree_sha256(wanted["embeddings"])
    with pytest.raises(ValueError, match="no metadata embeddings.*use_metadata=False"):
        to_flax_diffusers(tmp_path, components)
    with pytest.warns(UserWarning, match="norms in 8 groups.*always in 32"):
        to_flax_diffusers(tmp_path, {"unet": (PLAIN, init_unet(PLAIN, 0))})


def test_the_flax_unet_of_diffusers_reads_the_dump(tmp_path):
    """Their norms in transformers have eps 1e-5 (torch: 1e-6) and their GELU is approximate."""
    module = "diffusers.models.unets.unet_2d_condition_flax"
    peer = pytest.importorskip(module, reason="needs diffusers<0.40, the last with Flax classes")
    params = init_unet(FLAX, 0)
    to_flax_diffusers(tmp_path, {"unet": (FLAX, params)})
    model, loaded = peer.FlaxUNet2DConditionModel.from_pretrained(tmp_path / "unet")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 8, 8, 4), np.float32)
    context = rng.standard_normal((1, 5, FLAX.cross_attention_dim), np.float32)
    t = jnp.array([21.0])
    theirs = model.apply({"params": loaded}, x.transpose(0, 3, 1, 2), t, context).sample
    ours, _ = SatUNet(FLAX).apply({"params": params}, x, t, context)
    assert rel_error(theirs.transpose(0, 2, 3, 1), ours) < 1e-4


def test_a_whole_pipeline_is_converted_both_ways(folder, components, tmp_path):
    text = convert_pipeline(folder, tmp_path / "public")
    assert "written to" in text and "0 missing" in text
    assert find_components(tmp_path / "public").tokenizer is not None
    for kind, load in LOADERS.items():
        found = load(tmp_path / "public" / kind)[1]
        assert tree_sha256(found) == tree_sha256(components[kind][1])
    with pytest.warns(UserWarning, match="always in 32"):
        convert_pipeline(folder, tmp_path / "flax", "flax-diffusers")
    flax_unet = (tmp_path / "flax" / "unet" / "diffusion_flax_model.msgpack").read_bytes()
    assert "metadata_embedding_0" not in msgpack_restore(flax_unet)
    with pytest.raises(ValueError, match="known are 'public' and 'flax-diffusers'"):
        convert_pipeline(folder, tmp_path / "x", "onnx")


def test_a_codec_without_weights_and_stored_prompts_are_carried_along(folder, tmp_path):
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "text_encoder")
    for name, content in (("vae/config.json", '{"_class_name": "SpaceToDepth", "patch": 4}'),):
        (folder / name).parent.mkdir()
        (folder / name).write_text(content)
    (folder / "prompts").mkdir()
    (folder / "prompts" / "prompt-1.npz").write_bytes(b"x")
    convert_pipeline(folder, tmp_path / "out")
    for name in ("vae/config.json", "prompts/prompt-1.npz"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
