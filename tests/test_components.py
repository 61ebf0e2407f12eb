"""Both public layouts are found; what a folder lacks, or a scheduler that moves keys, is named."""

from __future__ import annotations

import shutil

import pytest
from tiny_pipeline import edit_json, write_pipeline

from satdifuser_jax.components import find_components, is_weightless
from satdifuser_jax.schedule import ScheduleError


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A pipeline folder; tests copy it before they change it."""
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "pipeline")


def test_both_public_layouts_are_found(exported, tmp_path):
    flat = shutil.copytree(exported, tmp_path / "flat")
    parts = find_components(flat)
    assert parts.unet == flat / "unet" and parts.text_encoder == flat / "text_encoder"
    root = tmp_path / "release"
    for side in (256, 512):
        place = shutil.copytree(exported, root / f"resolution{side}")
        for step in (100000, 150000):
            shutil.copytree(place / "unet", place / f"checkpoint-{step}" / "unet")
    parts = find_components(root, 256)
    assert parts.unet == root / "resolution256" / "checkpoint-150000" / "unet"
    assert parts.vae == root / "resolution256" / "vae"
    shutil.rmtree(root / "resolution512" / "checkpoint-150000")
    assert "checkpoint-100000" in str(find_components(root, 512).unet)
    assert find_components(root / "resolution256").unet == parts.unet
    with pytest.raises(ValueError, match=r"resolution=1024 was asked for.*\[256, 512\]"):
        find_components(root, 1024)
    with pytest.raises(ValueError, match="resolution=None was asked for"):
        find_components(root)


def test_what_a_folder_lacks_is_named_when_it_is_needed(folder):
    shutil.rmtree(folder / "text_encoder")
    parts = find_components(folder)
    assert parts.text_encoder is None
    with pytest.raises(FileNotFoundError, match=r"pipeline/text_encoder: no such folder"):
        parts.require("text_encoder")
    shutil.rmtree(folder / "unet")
    with pytest.raises(FileNotFoundError, match=r"neither checkpoint-150000/unet nor unet"):
        find_components(folder)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        find_components(folder / "nowhere")


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps_offset", 0), ("_class_name", "EulerDiscreteScheduler"), ("beta_schedule", "cosine")],
)
def test_a_scheduler_that_changes_the_keys_is_refused(folder, key, value):
    file = folder / "scheduler" / "scheduler_config.json"
    edit_json(file, **{key: value})
    with pytest.raises(ScheduleError, match=rf"scheduler_config\.json: {key}={value!r}"):
        find_components(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json: no such file"):
        find_components(folder)


def test_only_a_parameter_free_codec_is_weightless(folder):
    assert not is_weightless(folder / "vae")
    assert not is_weightless(folder / "nowhere")
    edit_json(folder / "vae" / "config.json", _class_name="SpaceToDepth")
    assert is_weightless(folder / "vae")
