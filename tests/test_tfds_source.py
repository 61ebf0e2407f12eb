"""Prepared TensorFlow Datasets are read without TensorFlow."""

from __future__ import annotations

import io
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from data.pipeline import eval_batches
from data.tfds_source import open_tfds, split_names

tfds = pytest.importorskip("tensorflow_datasets")


class Rows(tfds.core.GeneratorBasedBuilder):
    """A tiny labelled set, written to array_record without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(12, 12, 3)),
            "label": tfds.features.ClassLabel(names=["field", "town"]),
            "several": tfds.features.Sequence(tfds.features.ClassLabel(names=["a", "b", "c"])),
            "map": tfds.features.Tensor(shape=(12, 12, 1), dtype=np.uint8),
            "bands": tfds.features.Tensor(shape=(12, 12, 5), dtype=np.uint16),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._rows(range(8)), "test": self._rows(range(8, 12))}

    def _rows(self, numbers):
        for k in numbers:
            encoded = io.BytesIO()
            Image.fromarray(np.full((12, 12, 3), k, np.uint8)).save(encoded, "PNG")
            encoded.seek(0)
            yield (
                k,
                {
                    "image": encoded,
                    "label": k % 2,
                    "several": [0, 2] if k % 2 else [1],
                    "map": np.full((12, 12, 1), k % 3, np.uint8),
                    "bands": np.full((12, 12, 5), 257 * k, np.uint16),
                },
            )

    def _generate_examples(self):
        return []


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    Rows(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_a_prepared_set_is_read_by_name_or_folder(prepared):
    for name, data_dir in (("rows", str(prepared)), (str(prepared / "rows" / "1.0.0"), "")):
        source = open_tfds(name, "test", data_dir=data_dir)
        assert (len(source), source.task, source.native_side) == (4, "classification", 12)
        assert source.classes == ("field", "town")
        values = sorted(
            (int(source[i]["image"][0, 0, 0]), int(source[i]["label"])) for i in range(4)
        )
        assert values == [(8, 0), (9, 1), (10, 0), (11, 1)]


def test_without_validation_split_val_is_the_end_of_train(prepared):
    lengths = [len(open_tfds("rows", s, data_dir=str(prepared))) for s in ("train", "val", "test")]
    assert lengths == [6, 2, 4]
    assert len(open_tfds("rows", "train", data_dir=str(prepared), tfds_split="train[:3]")) == 3


def test_split_names_cover_train_once():
    assert split_names(["train"], "train") == "train[:56%]"
    assert split_names(["train"], "val") == "train[56%:75%]"
    assert split_names(["train"], "test") == "train[75%:]"
    assert split_names(["train", "validation"], "val") == "validation"
    assert split_names(["train", "validation"], "train") == "train[:75%]"
    assert split_names(["train", "validation", "test"], "train") == "train"
    with pytest.raises(ValueError, match="tfds_split"):
        split_names(["all"], "train")


def test_maps_lists_of_classes_and_deep_bands_are_understood(prepared):
    options = {"data_dir": str(prepared), "tfds_split": "train"}
    maps = open_tfds("rows", "train", label_key="map", classes=("x", "y", "z"), **options)
    assert maps.task == "segmentation" and maps[0]["label"].shape == (12, 12)
    several = open_tfds("rows", "train", label_key="several", **options)
    hot = {tuple(several[i]["label"]) for i in range(8)}
    assert several.task == "multi_label_classification" and hot == {(0, 1, 0), (1, 0, 1)}
    deep = open_tfds("rows", "train", image_key="bands", **options)[0]["image"]
    assert deep.shape == (12, 12, 3) and deep.dtype == np.float32 and deep.max() <= 1


def test_the_source_is_picklable_and_goes_through_the_pipeline(prepared):
    source = pickle.loads(pickle.dumps(open_tfds("rows", "test", data_dir=str(prepared))))
    (batch,) = eval_batches(source, batch_size=4)
    assert batch["image"].shape == (4, 12, 12, 3) and sorted(batch["label"]) == [0, 0, 1, 1]
    other = open_tfds("rows", "train", data_dir=str(prepared))
    assert source.fingerprint != other.fingerprint and "rows/1.0.0" in source.fingerprint


def test_what_is_missing_is_explained(prepared):
    with pytest.raises(FileNotFoundError, match="tfds:nothing_of_that_name is neither"):
        open_tfds("nothing_of_that_name", "train", data_dir=str(prepared))
    with pytest.raises(FileNotFoundError, match="tfds:mnist is known but not prepared"):
        open_tfds("mnist", "train", data_dir=str(prepared))
    with pytest.raises(ValueError, match="no label 'species' among the features"):
        open_tfds("rows", "train", data_dir=str(prepared), label_key="species")
    with pytest.raises(ValueError, match="'map' carries no class names"):
        open_tfds("rows", "train", data_dir=str(prepared), label_key="map")


def test_tensorflow_itself_is_never_imported(prepared):
    open_tfds("rows", "train", data_dir=str(prepared))[0]
    assert "tensorflow" not in sys.modules
