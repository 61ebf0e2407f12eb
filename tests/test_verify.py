"""`verify` says of a folder whether it can be used, and why not."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_pipeline import PLAIN, UNET, WEIGHTS, edit, make_components, write_pipeline

from common_jax.weights import flatten
from satdifuser_jax.convert import export_pipeline
from satdifuser_jax.schedule import Schedule
from satdifuser_jax.unet import init_unet
from satdifuser_jax.verify import verify


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def folder(exported, tmp_path):
    """Without the tokenizer, which is one in name only."""
    shutil.copytree(exported, tmp_path / "pipeline")
    shutil.rmtree(tmp_path / "pipeline" / "tokenizer")
    return tmp_path / "pipeline"


def test_a_good_folder_is_usable_and_its_table_counts_everything(folder):
    found = verify(folder)
    assert found.ok
    for part in found.parts:
        leaves = flatten(make_components()[part.name][1]).values()
        assert (part.tensors, part.dtypes) == (len(leaves), ("float32",))
        assert part.parameters == sum(leaf.size for leaf in leaves)
    assert [stage.name for stage in found.stages] == ["encode", "unet", "decode"]
    assert {stage.shape for stage in found.stages} == {(1, 4, 4, 4), (1, 8, 8, 3)}
    text = str(found)
    for word in ("text_encoder", "236", "v_prediction", "decode", "usable", "float32"):
        assert word in text, text


def test_a_peer_is_asked_at_every_stage_and_its_difference_shown(folder):
    asked = {}

    def peer(stage, components, inputs):
        asked[stage] = {name: value.shape for name, value in inputs.items()}
        return np.ones((1, 8, 8, 3) if stage == "decode" else (1, 4, 4, 4))

    found = verify(folder, image=np.zeros((30, 30, 3), np.uint8), peer=peer)
    assert asked == {
        "encode": {"images": (1, 8, 8, 3)},
        "unet": {"x": (1, 4, 4, 4), "t": (1,), "context": (1, 77, UNET.cross_attention_dim)},
        "decode": {"latents": (1, 4, 4, 4)},
    }
    assert not found.ok and all(stage.error > 0.1 for stage in found.stages)
    assert "NOT usable" in str(found)


def test_torch_agrees_at_every_stage(tmp_path):
    pytest.importorskip("diffusers")
    from benchmarks.torch_peer import run_stage

    plain = make_components() | {"unet": (PLAIN, init_unet(PLAIN, 0))}
    export_pipeline(tmp_path, plain, Schedule())
    found = verify(tmp_path, peer=run_stage)
    assert found.ok and len(found.stages) == 3
    assert all(stage.error < 2e-5 for stage in found.stages), str(found)


def test_bad_parts_are_reported_and_not_run(folder):
    def spoil(tensors):
        tensors["quant_conv.bias"] = np.full(8, np.nan, np.float32)

    def drop(tensors):
        del tensors["conv_in.bias"]

    edit(folder / "vae" / WEIGHTS, spoil)
    found = verify(folder)
    assert not found.ok and "vae: 8 values are not finite" in str(found)
    assert [stage.name for stage in found.stages] == ["unet"]
    edit(folder / "unet" / WEIGHTS, drop)
    text = str(verify(folder))
    assert "missing: conv_in.bias" in text and "NOT usable" in text


def test_a_folder_may_lack_the_text_tower_and_have_a_codec_without_weights(folder):
    for name in ("text_encoder", "vae"):
        shutil.rmtree(folder / name)
    (folder / "vae").mkdir()
    config = {"_class_name": "SpaceToDepth", "patch": 4}
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    found = verify(folder)
    assert found.ok and [part.name for part in found.parts] == ["unet"]


def test_the_dtypes_of_the_files_are_shown(folder):
    def halve(tensors):
        for name in load_file(folder / "unet" / WEIGHTS):
            if name.startswith("up_blocks"):
                tensors[name] = tensors[name].astype(np.float16)

    edit(folder / "unet" / WEIGHTS, halve)
    assert verify(folder).parts[-1].dtypes == ("float16", "float32")
