"""The user's folders: classes by folder or table, separate or block splits, corrupt files."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from data.folders import class_files, open_class_folder, open_images
from data.images import ImageError
from data.pipeline import eval_batches


def picture(path, seed, size=(12, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def fields(tmp_path):
    """Two classes of eight numbered pictures."""
    for c, name in enumerate(("crop", "town")):
        for k in range(8):
            picture(tmp_path / "all" / name / f"{name}{k + 1}.png", 100 * c + k)
    return tmp_path / "all"


def names(source):
    return sorted(item.path.rsplit("/", 1)[1] for item in source.items)


def test_one_folder_is_split_by_blocks_of_numbers(fields):
    parts = {
        split: open_class_folder(split, train=str(fields)) for split in ("train", "val", "test")
    }
    assert names(parts["test"]) == ["crop7.png", "crop8.png", "town7.png", "town8.png"]
    assert names(parts["val"]) == ["crop5.png", "crop6.png", "town5.png", "town6.png"]
    assert len(parts["train"]) == 8 and parts["train"].classes == ("crop", "town")
    assert len({part.fingerprint for part in parts.values()}) == 3


def test_examples_carry_picture_label_and_path(fields):
    source = pickle.loads(pickle.dumps(open_class_folder("train", train=str(fields))))
    example = source[len(source) - 1]
    assert example["image"].shape == (12, 12, 3) and example["image"].dtype == np.uint8
    assert example["label"] == 1 and example["label"].dtype == np.int32
    assert example["id"].endswith("town4.png")
    assert (source.task, source.native_side) == ("classification", 12)
    assert list(source.labels()) == [0] * 4 + [1] * 4
    batch = next(eval_batches(source, batch_size=8))
    np.testing.assert_array_equal(batch["label"], source.labels())


def test_train_and_test_folders_may_be_given_separately(fields, tmp_path):
    for k in range(3):
        picture(tmp_path / "new" / "town" / f"view{k}.png", 900 + k)
    options = {"train": str(fields), "test": str(tmp_path / "new")}
    assert names(open_class_folder("test", **options)) == ["view0.png", "view1.png", "view2.png"]
    assert len(open_class_folder("train", **options)) == 12
    assert names(open_class_folder("val", **options)) == [
        "crop7.png", "crop8.png", "town7.png", "town8.png"]  # fmt: skip
    assert list(open_class_folder("test", **options).labels()) == [1, 1, 1]


def test_three_folders_are_taken_as_they_are(fields, tmp_path):
    picture(tmp_path / "v" / "town" / "a.png", 901)
    picture(tmp_path / "t" / "crop" / "b.png", 902)
    options = {"train": str(fields), "val": str(tmp_path / "v"), "test": str(tmp_path / "t")}
    lengths = [len(open_class_folder(split, **options)) for split in ("train", "val", "test")]
    assert lengths == [16, 1, 1]
    del options["test"]
    lengths = [len(open_class_folder(split, **options)) for split in ("train", "val", "test")]
    assert lengths == [12, 1, 4]


def test_the_same_picture_in_train_and_test_is_refused(fields, tmp_path):
    copy = tmp_path / "t" / "crop" / "other_name.bmp"
    copy.parent.mkdir(parents=True)
    Image.open(fields / "crop" / "crop2.png").save(copy)
    with pytest.raises(ValueError, match=r"are in train and in test: .*crop2\.png = .*other_name"):
        open_class_folder("train", train=str(fields), test=str(tmp_path / "t"))
    with pytest.raises(ValueError, match="are in train and in test"):
        open_class_folder("train", train=str(fields), test=str(fields))


def test_a_table_and_a_class_order_are_obeyed(fields):
    (fields / "classes.json").write_text(json.dumps(["town", "crop"]))
    (fields / "labels.csv").write_text(
        "path,class,label\ncrop/crop1.png,crop,1\ntown/town2.png,town,0\n"
    )
    classes, files = class_files(fields)
    assert classes == ["town", "crop"] and [(p.name, c) for p, c in files] == [
        ("crop1.png", "crop"), ("town2.png", "town")]  # fmt: skip


@pytest.mark.parametrize(
    "table, message",
    [
        ("path,class,label\ncrop/crop1.png,crop,1\n", "disagrees with the class order"),
        ("path,class\ncrop/crop99.png,crop\n", "absent files: .*crop99"),
        ("file,class\ncrop/crop1.png,crop\n", "columns path and class"),
        ("path,class\ncrop/crop1.png,lake\n", r"classes \['lake'\]"),
    ],
)
def test_a_wrong_table_is_explained(fields, table, message):
    (fields / "classes.json").write_text(json.dumps(["crop", "town"]))
    (fields / "labels.csv").write_text(table)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        class_files(fields)


def test_unknown_classes_absent_and_empty_folders_are_explained(fields, tmp_path):
    picture(tmp_path / "t" / "lake" / "1.png", 5)
    with pytest.raises(ValueError, match=r"\['lake'\]; the train folder has \['crop', 'town'\]"):
        open_class_folder("train", train=str(fields), test=str(tmp_path / "t"))
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        open_class_folder("train", train=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no class folders"):
        open_class_folder("train", train=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no split 'dev'"):
        open_class_folder("dev", train=str(fields))
    with pytest.raises(ValueError, match="train=DIR"):
        open_images("train", roots=[])


def test_a_corrupt_picture_is_refused_by_name_or_skipped(fields):
    (fields / "crop" / "crop3.png").write_bytes(b"half a picture")
    with pytest.raises(ImageError, match=r"1 of 16 files .*crop3\.png"):
        open_class_folder("train", train=str(fields))
    assert "crop3.png" not in names(
        open_class_folder("train", train=str(fields), on_corrupt="skip")
    )


def test_the_fingerprint_follows_the_pixels(fields):
    before = open_class_folder("train", train=str(fields)).fingerprint
    assert open_class_folder("train", train=str(fields)).fingerprint == before
    picture(fields / "crop" / "crop1.png", 777)
    assert open_class_folder("train", train=str(fields)).fingerprint != before


def test_unlabelled_pictures_of_several_folders_without_masks_and_excluded_ones(fields, tmp_path):
    for k in range(10):
        picture(tmp_path / "raw" / "deep" / f"{k}.png", 300 + k)
    picture(tmp_path / "raw" / "masks" / "0.png", 999)
    Image.open(fields / "crop" / "crop1.png").save(tmp_path / "raw" / "again.png")
    roots = [str(fields), str(tmp_path / "raw")]
    everything = open_images("train", roots=roots, holdout=0)
    assert (
        len(everything) == 26
        and everything.task == "images"
        and set(everything[0]) == {"image", "id"}
    )
    digest = next(i.checked.digest for i in everything.items if i.path.endswith("deep/4.png"))
    thin = open_images(
        "train", roots=roots, holdout=0, exclude=["town1.png", "crop/crop2.png", f"sha256:{digest}"]
    )
    gone = set(names(everything)) - set(names(thin))
    assert gone == {"town1.png", "crop2.png", "4.png"} and len(thin) == 23


def test_the_holdout_is_the_end_of_each_folder(fields):
    train = open_images("train", roots=str(fields), holdout=0.25)
    val = open_images("val", roots=str(fields), holdout=0.25)
    assert names(val) == ["crop7.png", "crop8.png", "town7.png", "town8.png"]
    assert not set(train.digests) & set(val.digests) and len(train) == 12
    with pytest.raises(ValueError, match="no split 'test'"):
        open_images("test", roots=str(fields))
    with pytest.raises(ValueError, match="empty"):
        open_images("val", roots=str(fields), holdout=0)


def test_real_classes_are_read_and_split_without_shared_pictures(eo_data):
    """Opening refuses shared pictures, so three opened splits are the proof."""
    parts = {
        s: open_class_folder(s, train=str(eo_data / "ucmerced")) for s in ("train", "val", "test")
    }
    assert sum(len(p) for p in parts.values()) == 882
    for part in parts.values():
        assert len(part.classes) == 21 and set(part.labels()) == set(range(21))
        assert part.native_side == 256 and part[0]["image"].shape == (256, 256, 3)
    assert len(parts["test"]) == 210
