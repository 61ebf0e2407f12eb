"""GEO-Bench folders as they lie on disk: bands, dates, labels, partitions, broken files."""

from __future__ import annotations

import errno
import json
import os
import pickle
import sys
import types

import h5py
import numpy as np
import pytest

from common_jax.files import UnsafePickleError
from data.catalog import GEOBENCH, open_source
from data.geobench import (
    GeoBenchError,
    GeoBenchSet,
    GeoBenchSource,
    fraction_partition,
    open_geobench,
)
from data.pipeline import eval_batches
from data.prepare import main

S2 = ("04 - Red", "03 - Green", "02 - Blue")
RGB = ("Red", "Green", "Blue")


def table(task="classification", bands=S2, divisor=4095.0, classes=3, sizes=(4, 2, 2)):
    names = tuple(f"c{k}" for k in range(classes))
    return GeoBenchSet(task, 8, 256, bands, divisor, "ours", sizes, names)


def write_sample(folder, name, bands, label=None, attribute=None, maps=None):
    """One sample: {array name: 2-D array}, and the label in the root attribute `pickle`."""
    with h5py.File(folder / f"{name}.hdf5", "w") as file:
        for key, value in (bands | (maps or {})).items():
            file.create_dataset(key, data=value)
        record = {"bands_order": list(bands), "label": label}
        file.attrs["pickle"] = attribute or repr(pickle.dumps(record))


def write_partition(folder, name="default", train=4, val=2, test=2):
    ids = [f"id_{k:04d}" for k in range(train + val + test)]
    parts = {"train": ids[:train], "valid": ids[train : train + val], "test": ids[train + val :]}
    (folder / f"{name}_partition.json").write_text(json.dumps(parts))
    return ids


def values(seed, side=8):
    rng = np.random.default_rng(seed)
    return {key: rng.integers(0, 5000, (side, side)).astype(np.uint16)
            for key in ("01 - Coastal aerosol", *S2, "08 - NIR")}  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """A classification set of eight samples."""
    folder = tmp_path / "classification_v1.0" / "m-tiny"
    folder.mkdir(parents=True)
    for k, name in enumerate(write_partition(folder)):
        write_sample(folder, name, values(k), label=np.int64(k % 3) if k % 2 else k % 3)
    return tmp_path


def folder_of(root, task="classification"):
    return root / f"{task}_v1.0" / "m-tiny"


def open_tiny(root, split="train", row=None, **options):
    return open_geobench("m-tiny", row or table(), split, root=str(root), **options)


def test_three_bands_are_scaled_and_clipped_in_rgb_order(root):
    source = open_tiny(root)
    stored = values(2)
    expected = np.stack([stored[band] for band in S2], -1) / 4095
    found = source[2]
    np.testing.assert_allclose(found["image"], np.clip(expected, 0, 1), rtol=1e-6)
    assert found["image"].dtype == np.float32 and found["image"].max() == 1
    assert found["label"] == 2 and found["label"].dtype == np.int32 and found["id"] == "id_0002"
    assert (source.task, source.classes, source.native_side) == (
        "classification",
        ("c0", "c1", "c2"),
        8,
    )


def test_splits_come_from_the_partition(root):
    assert [len(open_tiny(root, split)) for split in ("train", "val", "test")] == [4, 2, 2]
    (batch,) = eval_batches(open_tiny(root, "test"), batch_size=2)
    assert list(batch["id"]) == ["id_0006", "id_0007"] and list(batch["label"]) == [0, 1]
    np.testing.assert_array_equal(open_tiny(root).labels(), [0, 1, 2, 0])
    with pytest.raises(ValueError, match="no split 'valid'"):
        open_tiny(root, "valid")


def test_few_label_partitions_are_found_by_fraction(root):
    folder = folder_of(root)
    parts = json.loads((folder / "default_partition.json").read_text())
    (folder / "0.01x_train_partition.json").write_text(json.dumps(parts | {"train": ["id_0001"]}))
    assert fraction_partition(folder, 0.01) == "0.01x_train"
    assert fraction_partition(folder, 0.02) is None and fraction_partition(folder, 0.015) is None
    thin = open_tiny(root, partition="0.01x_train")
    assert thin.samples == ["id_0001"] and len(open_tiny(root, "val", partition="0.01x_train")) == 2
    with pytest.raises(FileNotFoundError, match=r"partitions here: 0\.01x_train, default"):
        open_tiny(root, partition="0.07x_train")


def test_a_wrong_number_of_samples_is_refused_unless_allowed(root):
    other = table(sizes=(5, 2, 2))
    with pytest.raises(GeoBenchError, match=r"4 train samples, expected 5.*check_sizes=False"):
        open_tiny(root, row=other)
    assert len(open_tiny(root, row=other, check_sizes=False)) == 4
    assert len(open_tiny(root, "val", row=other)) == 2


def test_absent_samples_and_shared_samples_are_named(root):
    folder = folder_of(root)
    (folder / "id_0003.hdf5").unlink()
    with pytest.raises(GeoBenchError, match=r"1 of 8 samples .* absent: id_0003\.hdf5"):
        open_tiny(root)
    parts = {"train": ["id_0000"], "valid": ["id_0001"], "test": ["id_0000"]}
    (folder / "default_partition.json").write_text(json.dumps(parts))
    with pytest.raises(GeoBenchError, match="id_0000 is in train and in test"):
        open_tiny(root)


def test_multi_hot_labels_are_float_vectors(root):
    folder, hot = folder_of(root), np.array([1, 0, 1])
    write_sample(folder, "id_0000", values(0), label=hot)
    row = table("multi_label_classification")
    found = open_tiny(root, row=row)[0]["label"]
    assert found.dtype == np.float32 and list(found) == [1, 0, 1]
    for wrong in (np.array([1, 0]), np.array([1, 0, 2])):
        write_sample(folder, "id_0000", values(0), label=wrong)
        with pytest.raises(GeoBenchError, match=r"id_0000\.hdf5: label .* is not 3 zeros and ones"):
            open_tiny(root, row=row)[0]


@pytest.fixture
def dated(tmp_path):
    """A segmentation set with dates in the names, as in m-nz-cattle, and bands of other sizes."""
    folder = tmp_path / "segmentation_v1.0" / "m-tiny"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in write_partition(folder):
        bands = {f"{band}_2016-02-18": rng.integers(0, 255, (8, 8), np.uint8) for band in RGB}
        bands |= {"Canopy height model_2016-02-18": rng.random((2, 2)), "Redness": np.zeros((8, 8))}
        maps = {"label_2016-02-18": rng.integers(0, 2, (8, 8), np.uint8)}
        write_sample(folder, name, bands, maps=maps)
    return tmp_path


SEG = {"task": "segmentation", "bands": RGB, "divisor": 255.0, "classes": 2}


def test_dated_bands_and_dated_labels_are_matched_by_prefix(dated):
    example = open_tiny(dated, row=table(**SEG))[0]
    with h5py.File(folder_of(dated, "segmentation") / "id_0000.hdf5") as file:
        red, label = file["Red_2016-02-18"][:], file["label_2016-02-18"][:]
    np.testing.assert_allclose(example["image"][..., 0], red / np.float32(255), rtol=1e-6)
    np.testing.assert_array_equal(example["label"], label)
    assert example["label"].dtype == np.int32


def test_other_bands_may_have_any_size_and_a_coarse_colour_is_resized(dated):
    folder = folder_of(dated, "segmentation")
    bands = {"Red": np.full((8, 8), 51, np.uint8), "Green": np.full((8, 8), 102, np.uint8),
             "Blue": np.full((4, 4), 153, np.uint8), "426 nm": np.zeros((3, 3))}  # fmt: skip
    write_sample(folder, "id_0000", bands, maps={"label": np.ones((8, 8), np.uint8)})
    image = open_tiny(dated, row=table(**SEG))[0]["image"]
    np.testing.assert_allclose(image, np.broadcast_to([0.2, 0.4, 0.6], (8, 8, 3)), rtol=1e-6)


def test_the_first_of_several_dates_is_taken(dated):
    folder = folder_of(dated, "segmentation")
    bands = {
        f"{band}_2019-0{m}-01": np.full((8, 8), 10 * m, np.uint8) for band in RGB for m in (3, 1, 2)
    }
    write_sample(folder, "id_0000", bands, maps={"label": np.zeros((8, 8), np.uint8)})
    assert open_tiny(dated, row=table(**SEG))[0]["image"].max() == np.float32(10 / 255)


def test_a_set_is_prepared_and_read_back_without_loss(root, tmp_path, monkeypatch):
    monkeypatch.setitem(GEOBENCH, "m-eurosat", table())
    folder_of(root).rename(root / "classification_v1.0" / "m-eurosat")
    monkeypatch.setenv("GEO_BENCH_DIR", str(root))
    out = tmp_path / "out" / "train"
    assert main(["examples:m-eurosat", str(out), "--split=train", "--workers=0"]) == 0
    before, after = (
        open_source("m-eurosat", "train"),
        open_source(f"prepared:{out.parent}", "train"),
    )
    assert (after.task, after.classes, after.native_side) == ("classification", before.classes, 8)
    np.testing.assert_array_equal(after.labels(), before.labels())
    for i in range(4):
        np.testing.assert_array_equal(after[i]["image"], before[i]["image"])
        assert after[i]["image"].dtype == np.float32 and after[i]["id"] == before[i]["id"]


def test_too_many_open_files_are_no_truncated_sample(root, monkeypatch):
    source = open_tiny(root)

    def full(path, mode):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(h5py, "File", full)
    with pytest.raises(OSError, match="Too many open files"):
        source[0]


def test_labels_beyond_the_classes_or_of_another_size_are_named(dated, root):
    folder = folder_of(dated, "segmentation")
    colours = {band: np.zeros((8, 8), np.uint8) for band in RGB}
    write_sample(folder, "id_0000", colours, maps={"label": np.full((8, 8), 7, np.uint8)})
    with pytest.raises(GeoBenchError, match=r"id_0000\.hdf5: label 7, but there are 2 classes"):
        open_tiny(dated, row=table(**SEG))[0]
    write_sample(folder, "id_0000", colours, maps={"label": np.zeros((4, 4), np.uint8)})
    with pytest.raises(GeoBenchError, match=r"label \(4, 4\) and image \(8, 8\) differ"):
        open_tiny(dated, row=table(**SEG))[0]
    write_sample(folder, "id_0000", colours)
    with pytest.raises(GeoBenchError, match="no array 'label'"):
        open_tiny(dated, row=table(**SEG))[0]
    write_sample(folder_of(root), "id_0000", values(0), label=-1)
    with pytest.raises(GeoBenchError, match="label -1, but there are 3 classes"):
        open_tiny(root)[0]


def test_a_missing_band_lists_those_that_are_there(root):
    with pytest.raises(GeoBenchError, match=r"no band 'Red' among 01 - Coastal aerosol, 02 - Blue"):
        open_tiny(root, row=table(bands=RGB))[0]


def test_a_truncated_file_is_named(root):
    path = folder_of(root) / "id_0001.hdf5"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no hdf5 at all"):
        path.write_bytes(content)
        with pytest.raises(GeoBenchError, match=r"id_0001\.hdf5: cannot be read as HDF5"):
            open_tiny(root)[1]


class Payload:
    """What a hostile file would hold: unpickling it runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_hostile_pickle_is_refused_and_never_run(root, tmp_path):
    flag = tmp_path / "ran"
    attack = repr(pickle.dumps({"label": Payload(flag)}))
    write_sample(folder_of(root), "id_0000", values(0), attribute=attack)
    with pytest.raises(UnsafePickleError, match=r"id_0000\.hdf5.*system"):
        open_tiny(root)[0]
    assert not flag.exists()


@pytest.mark.parametrize(
    "attribute, message",
    [
        ("__import__('os').getcwd()", "does not spell bytes"),
        ("'text'", "spells str, not bytes"),
        (repr(pickle.dumps([1, 2])), "holds list, not a dict"),
        (repr(pickle.dumps({"bands_order": []})), "holds no label"),
        (repr(pickle.dumps({"label": 1})[:-4]), "damaged"),
    ],
)
def test_a_strange_attribute_is_explained(root, attribute, message):
    write_sample(folder_of(root), "id_0000", values(0), attribute=attribute)
    with pytest.raises(ValueError, match=rf"id_0000\.hdf5.*{message}"):
        open_tiny(root)[0]


def test_records_of_the_library_are_read_without_it(root, monkeypatch):
    """Classes of absent packages become inert records; the label is still found."""
    for name in ("geobench.dataset", "ccb.io.dataset"):
        parts = name.split(".")
        packages = {".".join(parts[: k + 1]) for k in range(len(parts))}
        for package in packages:
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        kind = type("Band", (), {"__module__": name, "__qualname__": "Band"})
        sys.modules[name].Band = kind
        band = kind()
        band.wavelength = np.float64(0.66)
        text = repr(pickle.dumps({"04 - Red": {"band_info": band}, "label": 2}))
        for package in packages:
            monkeypatch.delitem(sys.modules, package)
        write_sample(folder_of(root), "id_0000", values(0), attribute=text)
        assert open_tiny(root)[0]["label"] == 2


def test_the_source_is_picklable_and_its_fingerprint_names_samples_and_scaling(root):
    source = open_tiny(root)
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[1]["image"], source[1]["image"])
    prints = {source.fingerprint, open_tiny(root, "val").fingerprint,
              open_tiny(root, row=table(divisor=255.0)).fingerprint}  # fmt: skip
    assert len(prints) == 3 and isinstance(again, GeoBenchSource)


def test_where_to_put_the_data_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("GEO_BENCH_DIR", raising=False)
    with pytest.raises(FileNotFoundError, match="set GEO_BENCH_DIR"):
        open_geobench("m-tiny", table(), "train")
    monkeypatch.setenv("GEO_BENCH_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="m-tiny is not in this copy"):
        open_geobench("m-tiny", table(), "train")
