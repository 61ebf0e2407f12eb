"""Files and folders that do not fit are refused, named as they name themselves, with a way out."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from tiny_pipeline import LOADERS, UNET, WEIGHTS, edit, edit_json, make_components, write_pipeline

from satdifuser_jax.convert import (
    export_pipeline,
    load_text_encoder,
    load_unet,
    load_vae,
)
from satdifuser_jax.schedule import Schedule


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A pipeline folder; tests copy it before they change it."""
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "pipeline")


def test_missing_unused_and_misshapen_tensors_are_named_as_in_the_file(folder):
    def spoil(tensors):
        tensors["encoder.conv_in.weight"] = np.zeros((8, 4, 3, 3), np.float32)
        tensors["extra.bias"] = tensors.pop("quant_conv.bias")

    edit(folder / "vae" / WEIGHTS, spoil)
    with pytest.raises(ValueError, match="1 missing, 1 unused, 1 misshapen") as caught:
        load_vae(folder / "vae")
    text = str(caught.value)
    assert text.startswith(str(folder / "vae"))
    assert "encoder.conv_in.weight: found (8, 4, 3, 3), wanted (8, 3, 3, 3)" in text
    assert "missing: quant_conv.bias" in text and "unused: extra.bias" in text
    assert text.count("->") == 3  # what to do about each
    _, params, report = load_vae(folder / "vae", strict=False)
    assert report.missing == ("quant_conv.bias",) and not report.ok
    assert "bias" not in params["quant_conv"] and "kernel" in params["quant_conv"]


def test_missing_tensors_are_reported_in_the_naming_of_the_file(folder):
    def drop(tensors):
        bias = "encoder.mid_block.attentions.0.{}.bias"
        weight = "encoder.mid_block.attentions.0.{}.weight"
        tensors[weight.format("query")] = tensors.pop(weight.format("to_q"))
        del tensors[bias.format("to_q")], tensors[bias.format("to_k")]

    edit(folder / "vae" / WEIGHTS, drop)
    missing = load_vae(folder / "vae", strict=False)[2].missing
    assert {name.rpartition("attentions.0.")[2] for name in missing} == {"query.bias", "to_k.bias"}


def test_weights_of_another_component_are_recognised(folder):
    shutil.copy(folder / "vae" / WEIGHTS, folder / "unet" / WEIGHTS)
    with pytest.raises(ValueError, match="not the weights of a unet"):
        load_unet(folder / "unet", use_metadata=False)


def test_a_config_smaller_than_the_weights_is_refused(folder):
    edit_json(folder / "text_encoder" / "config.json", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"16 unused(.|\n)*smaller network"):
        load_text_encoder(folder / "text_encoder")


@pytest.mark.parametrize("kind", LOADERS)
def test_damaged_or_absent_files_are_named(folder, kind):
    file = next((folder / kind).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=rf"{kind}/.*safetensors .*download it again"):
        LOADERS[kind](folder / kind)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{kind}: no \.safetensors"):
        LOADERS[kind](folder / kind)


def test_bad_configs_are_named_with_their_key(folder):
    config = folder / "unet" / "config.json"
    edit_json(config, act_fn="gelu")
    with pytest.raises(ValueError, match=r"unet/config\.json: .*act_fn='gelu'"):
        load_unet(folder / "unet")
    config.write_text("{")
    with pytest.raises(ValueError, match=r"unet/config\.json is not valid JSON"):
        load_unet(folder / "unet")
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"unet/config\.json: no such file"):
        load_unet(folder / "unet")
    assert load_unet(folder / "unet", UNET)[0] == UNET


def test_an_unknown_component_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match=r"'unet2'.*known components are"):
        export_pipeline(tmp_path, {"unet2": make_components()["unet"]}, Schedule())
