"""Segmentation folders: pairs, class numbers, sizes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from data.images import ImageError
from data.masks import MaskRules, open_masks
from data.pipeline import eval_batches


def pair(root, name, seed, size=(12, 12), classes=3, mask=None):
    rng = np.random.default_rng(seed)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(
        root / "images" / f"{name}.png"
    )
    mask = rng.integers(0, classes, size, np.uint8) if mask is None else mask
    Image.fromarray(mask).save(root / "masks" / f"{name}.png")


@pytest.fixture
def roads(tmp_path):
    for k in range(8):
        pair(tmp_path / "roads", f"tile_{k}", k)
    return tmp_path / "roads"


def test_masks_are_split_by_blocks_and_batched(roads):
    parts = {split: open_masks(split, train=str(roads)) for split in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [4, 2, 2]
    train = parts["train"]
    assert (train.task, train.classes, train.native_side) == ("segmentation", ("0", "1", "2"), 12)
    batch = next(eval_batches(train, batch_size=4))
    assert batch["label"].shape == (4, 12, 12) and batch["label"].dtype == np.int32
    stored = np.asarray(Image.open(roads / "masks" / "tile_0.png"))
    np.testing.assert_array_equal(train[0]["label"], stored)


def test_class_names_come_from_the_folder_or_the_caller(roads):
    assert open_masks("train", train=str(roads), rules=MaskRules(("a", "b", "c"))).classes == (
        "a",
        "b",
        "c",
    )
    (roads / "classes.json").write_text(json.dumps(["ground", "road", "roof"]))
    assert open_masks("train", train=str(roads)).classes == ("ground", "road", "roof")


def test_a_mask_value_beyond_the_classes_is_refused_by_name(roads):
    (roads / "classes.json").write_text(json.dumps(["ground", "road"]))
    with pytest.raises(
        ImageError, match=r"tile_\d\.png: value 2, but there are 2 classes \(0\.\.1\)"
    ):
        open_masks("train", train=str(roads))
    ignoring = open_masks("train", train=str(roads), rules=MaskRules(ignore=2))
    stored = np.asarray(Image.open(roads / "masks" / "tile_0.png"))
    np.testing.assert_array_equal(
        ignoring[0]["label"], np.where(stored == 2, -100, stored.astype(int))
    )


def test_colour_masks_missing_masks_and_other_sizes_are_refused_by_name(roads):
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(roads / "masks" / "tile_3.png")
    with pytest.raises(ImageError, match=r"tile_3\.png: a mask of mode RGB"):
        open_masks("train", train=str(roads))
    pair(roads, "tile_3", 3, mask=np.zeros((9, 12), np.uint8))
    with pytest.raises(ImageError, match=r"tile_3\.png: 9x12 pixels, its picture has 12x12"):
        open_masks("train", train=str(roads))
    (roads / "masks" / "tile_3.png").unlink()
    with pytest.raises(ValueError, match=r"1 pictures .* no mask of their name: tile_3\.png"):
        open_masks("train", train=str(roads))
    with pytest.raises(FileNotFoundError, match="images/ and masks/"):
        open_masks("train", train=str(roads / "images"))


def test_a_wrong_mask_is_not_skipped_with_corrupt_pictures(roads):
    (roads / "images" / "tile_0.png").write_bytes(b"broken")
    kept = [
        len(open_masks(s, train=str(roads), on_corrupt="skip")) for s in ("train", "val", "test")
    ]
    assert sum(kept) == 7
    (roads / "masks" / "tile_1.png").write_bytes(b"broken")
    with pytest.raises(ImageError, match=r"1 masks are not usable: .*tile_1\.png"):
        open_masks("train", train=str(roads), on_corrupt="skip")


def test_pictures_of_several_sizes_are_refused_cropped_or_padded(tmp_path):
    for k, size in enumerate([(12, 20), (16, 16), (12, 12), (20, 14)]):
        pair(tmp_path, f"{k}", k, size)
    with pytest.raises(ValueError, match="12x12, 12x20.*fit=crop"):
        open_masks("train", train=str(tmp_path))
    crop = open_masks("train", train=str(tmp_path), rules=MaskRules(fit="crop"))
    pad = open_masks("train", train=str(tmp_path), rules=MaskRules(fit="pad"))
    stored = np.asarray(Image.open(tmp_path / "masks" / "0.png"))
    assert crop.native_side == 12 and pad.native_side == 20
    np.testing.assert_array_equal(crop[0]["label"], stored[:, 4:16])
    np.testing.assert_array_equal(pad[0]["label"][:12], stored)
    assert (pad[0]["label"][12:] == -100).all() and not pad[0]["image"][12:].any()
    for source in (crop, pad):
        shapes = {(source[i]["image"].shape[:2], source[i]["label"].shape) for i in range(2)}
        assert shapes == {((source.native_side,) * 2, (source.native_side,) * 2)}
    assert crop.fingerprint != pad.fingerprint
    with pytest.raises(ValueError, match="not refuse, crop, pad"):
        open_masks("train", train=str(tmp_path), rules=MaskRules(fit="stretch"))


def test_the_fingerprint_follows_the_masks(roads):
    before = open_masks("train", train=str(roads)).fingerprint
    pair(roads, "tile_0", 0, mask=np.full((12, 12), 2, np.uint8))
    assert open_masks("train", train=str(roads)).fingerprint != before


def test_real_roads_and_objects_are_read(eo_data):
    parts = [open_masks(s, train=str(eo_data / "roads")) for s in ("train", "val", "test")]
    assert sum(map(len, parts)) == 70 and all(p.classes == ("0", "1") for p in parts)
    assert parts[0][0]["label"].shape == (400, 400)
    objects = open_masks("test", train=str(eo_data / "vhr10_masks"), rules=MaskRules(fit="pad"))
    assert len(objects.classes) == 11 and objects[0]["label"].shape == (512, 512)
