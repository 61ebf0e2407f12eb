"""The table of datasets and the one way to open them."""

from __future__ import annotations

import json
import pickle

import h5py
import numpy as np
import pytest
from PIL import Image

from data import catalog
from data.catalog import GEOBENCH, defaults, open_source


def test_all_twelve_sets_are_in_the_table_with_the_sizes_of_the_papers():
    assert len(GEOBENCH) == 12
    tasks = [row.task for row in GEOBENCH.values()]
    assert tasks.count("segmentation") == 6 and tasks.count("multi_label_classification") == 1
    counts = {name: len(row.classes) for name, row in GEOBENCH.items()}
    assert counts == {
        "m-eurosat": 10, "m-bigearthnet": 43, "m-so2sat": 17, "m-brick-kiln": 2, "m-forestnet": 12,
        "m-pv4ger": 2, "m-pv4ger-seg": 2, "m-nz-cattle": 2, "m-NeonTree": 2, "m-cashew-plant": 7,
        "m-SA-crop-type": 10, "m-chesapeake": 7}  # fmt: skip
    for row in GEOBENCH.values():
        assert row.side == (512 if row.native_side > 256 else 256)
        assert row.scaling in ("published", "ours") and row.divisor > 0 and len(row.sizes) == 3
        assert len(set(row.classes)) == len(row.classes)


def test_published_prompts_and_scalings_are_verbatim():
    published = {name: row for name, row in GEOBENCH.items() if row.scaling == "published"}
    divisors = {"m-eurosat": 4095, "m-bigearthnet": 4095, "m-nz-cattle": 255, "m-chesapeake": 1}
    assert {name: row.divisor for name, row in published.items()} == divisors
    assert defaults("m-nz-cattle").prompt == "A satellite image of New Zealand cattles"
    assert defaults("m-chesapeake").prompt == "A satellite image of Cheasapeake landcovers"
    others = {
        row.prompt for name, row in GEOBENCH.items() if name not in ("m-nz-cattle", "m-chesapeake")
    }
    assert others == {"A satellite image"}


@pytest.mark.parametrize("name", list(GEOBENCH))
def test_every_set_opens_from_a_folder_of_its_own_format(name, tmp_path):
    row = GEOBENCH[name]
    kind = "segmentation" if row.task == "segmentation" else "classification"
    folder = tmp_path / f"{kind}_v1.0" / name
    folder.mkdir(parents=True)
    side, last = row.native_side, len(row.classes) - 1
    label = np.eye(43, dtype=int)[last] if row.task == "multi_label_classification" else last
    for sample in "abc":
        with h5py.File(folder / f"{sample}.hdf5", "w") as file:
            for k, band in enumerate(row.bands):
                file[band] = np.full((side, side), row.divisor * (0.25 + 0.25 * k), np.float32)
            if kind == "segmentation":
                file["label"] = np.full((side, side), last, np.uint8)
            file.attrs["pickle"] = repr(pickle.dumps({"label": label}))
    parts = {"train": ["a"], "valid": ["b"], "test": ["c"]}
    (folder / "default_partition.json").write_text(json.dumps(parts))
    with pytest.raises(ValueError, match=rf"1 train samples, expected {row.sizes[0]}"):
        open_source(name, "train", root=str(tmp_path))
    source = open_source(name, "val", root=str(tmp_path), check_sizes=False)
    example = source[0]
    np.testing.assert_allclose(example["image"][0, 0], [0.25, 0.5, 0.75], rtol=1e-5)
    assert example["image"].shape == (side, side, 3) and source.classes == row.classes
    expected = {
        "classification": (),
        "multi_label_classification": (43,),
        "segmentation": (side, side),
    }
    assert example["label"].shape == expected[row.task] and example["label"].max() in (last, 1)


def test_few_labels_use_the_published_partition_where_there_is_one(tmp_path):
    folder = tmp_path / "classification_v1.0" / "m-eurosat"
    folder.mkdir(parents=True)
    names = [f"s{k}" for k in range(40)]
    for k, name in enumerate(names):
        with h5py.File(folder / f"{name}.hdf5", "w") as file:
            file.attrs["pickle"] = repr(pickle.dumps({"label": k % 2}))
    parts = {"train": names[:38], "valid": names[38:39], "test": names[39:]}
    for file, train in (("default", names[:38]), ("0.05x_train", ["s3", "s4"])):
        (folder / f"{file}_partition.json").write_text(json.dumps(parts | {"train": train}))
    options = {"root": str(tmp_path), "check_sizes": False}
    assert open_source("m-eurosat", "train", label_fraction=0.05, **options).samples == ["s3", "s4"]
    drawn = open_source("m-eurosat", "train", label_fraction=0.5, **options)
    assert len(drawn) == 20  # half of 19 is rounded up, in both classes
    assert len(open_source("m-eurosat", "val", label_fraction=0.5, **options)) == 1


def test_a_published_scaling_is_refused_where_there_is_none(tmp_path):
    with pytest.raises(ValueError, match="m-so2sat has no published scaling"):
        open_source("m-so2sat", "train", scaling="published", root=str(tmp_path))
    with pytest.raises(ValueError, match="not default, published or ours"):
        open_source("m-so2sat", "train", scaling="mine", root=str(tmp_path))


def test_scenes_of_both_tasks_open_with_size_seed_side_and_few_labels():
    assert len(open_source("scenes", "val")) == catalog.SCENE_SIZES["val"]
    source = open_source("scenes_seg", "train", size=16, seed=3, side=32)
    assert source[0]["label"].shape == (32, 32) and len(source.classes) == 6
    assert len(open_source("scenes", "train", size=800, label_fraction=0.01)) == 8
    assert len(open_source("scenes", "test", size=800, label_fraction=0.01)) == 800


def test_folders_open_by_name(tmp_path):
    for folder in ("a", "b"):
        for k in range(4):
            path = tmp_path / "all" / folder / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((9, 9, 3), 20 * k + ord(folder), np.uint8)).save(path)
    assert len(open_source("folder", "train", train=str(tmp_path / "all"))) == 4
    assert len(open_source("folder", "train", train=str(tmp_path / "all"), label_fraction=0.1)) == 2
    assert len(open_source("images", "train", roots=[str(tmp_path)], holdout=0.0)) == 8


def test_unknown_names_options_and_splits_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown dataset 'eurosat'; known: scenes, .*m-eurosat"):
        open_source("eurosat", "train")
    with pytest.raises(ValueError, match="unknown dataset 'eurosat'"):
        defaults("eurosat")
    with pytest.raises(
        ValueError, match="'folder' has no option trian; known: on_corrupt, test, train, val"
    ):
        open_source("folder", "train", trian="x")
    with pytest.raises(ValueError, match="'masks' has no option sise; known: classes, fit"):
        open_source("masks", "train", sise=3)
    with pytest.raises(ValueError, match="no split 'dev'; known: train, val, test"):
        open_source("scenes", "dev")


def test_defaults_say_what_a_name_means_before_files_are_opened():
    assert defaults("m-forestnet").side == 512 and defaults("m-eurosat").task == "classification"
    assert defaults("scenes_seg").task == "segmentation" and len(defaults("scenes").classes) == 8
    assert defaults("folder").side == 0 and defaults("tfds:rows").prompt == "A satellite image"
