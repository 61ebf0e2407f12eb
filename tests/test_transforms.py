"""Transforms against independent formulas, and what they refuse."""

from __future__ import annotations

import colorsys
import pickle

import numpy as np
import pytest

from data import transforms as tr

PLACE = dict(longitude=2.35, latitude=48.85, gsd=0.5, cloud_cover=0.2, year=2016, month=7, day=14)


def rng(seed=0):
    return np.random.default_rng(seed)


def picture(seed=0, height=9, width=9):
    return rng(seed).random((height, width, 3), dtype=np.float32)


def test_metadata_follows_the_published_normalisation():
    expected = [182.35 / 360, 138.85 / 180, 0.5, 0.2, 36 / 120, 7 / 12, 14 / 31]
    found = tr.normalise_metadata(**PLACE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.array(expected) * 1000, rtol=1e-6)
    assert len(tr.METADATA_FIELDS) == 7 and list(PLACE) == list(tr.METADATA_FIELDS)


@pytest.mark.parametrize(
    "field, value",
    [("longitude", 181), ("latitude", -91), ("month", 0), ("cloud_cover", 20), ("year", 36)],
)
def test_metadata_that_cannot_be_right_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        tr.normalise_metadata(**(PLACE | {field: value}))


def coordinates(side=12):
    """An image whose pixels say where they were, and a label map saying the same."""
    y, x = np.mgrid[:side, :side].astype(np.float32)
    return {"image": np.stack([y, x, y * 0], -1) / side, "label": (y * side + x).astype(np.int32)}


def test_rotation_moves_the_label_with_the_image_and_ignores_what_it_uncovers():
    augment = tr.PublishedAugment(p=1.0, jitter=0.0)
    for seed in range(6):
        out = augment(coordinates(), rng(seed))
        known = out["label"] >= 0
        place = np.rint(out["image"] * 12).astype(int)
        np.testing.assert_array_equal(
            (place[..., 0] * 12 + place[..., 1])[known], out["label"][known]
        )
        assert (out["label"][~known] == -100).all() and (out["image"][~known] < 1e-6).all()


def test_metadata_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="gsd=nan"):
        tr.normalise_metadata(**(PLACE | {"gsd": float("nan")}))


def test_rotation_by_a_quarter_turn_equals_rot90():
    image = picture(2)
    np.testing.assert_array_equal(tr.rotate(image, 90), np.rot90(image))
    np.testing.assert_array_equal(tr.rotate(image, 0), image)
    assert (tr.rotate(np.ones((9, 9)), 45)[0, 0]) == 0


def test_hue_equals_colorsys():
    image = picture(3)
    image[0, 0] = 0.5
    for shift in (-0.1, 0.0, 0.07, 0.4):
        expected = np.empty_like(image)
        for where in np.ndindex(9, 9):
            h, s, v = colorsys.rgb_to_hsv(*image[where])
            expected[where] = colorsys.hsv_to_rgb((h + shift) % 1, s, v)
        np.testing.assert_allclose(tr.adjust_hue(image, shift), expected, atol=2e-6)


def test_factor_one_is_the_identity_and_zero_the_limit():
    image = picture(4)
    for adjust in (tr.adjust_brightness, tr.adjust_contrast, tr.adjust_saturation):
        np.testing.assert_allclose(adjust(image, 1.0), image, atol=1e-7)
    assert tr.adjust_brightness(image, 0).max() == 0
    assert np.ptp(tr.adjust_contrast(image, 0)) < 1e-6
    assert np.ptp(tr.adjust_saturation(image, 0), axis=-1).max() < 1e-6


def test_published_augmentation_changes_half_of_the_images():
    augment, generator = tr.PublishedAugment(), rng(5)
    example = {"image": (picture(6) * 255).astype(np.uint8), "label": np.int32(3)}
    outs = [augment(example, generator) for _ in range(400)]
    same = sum(np.array_equal(o["image"], tr.to_unit(example["image"])) for o in outs)
    assert 160 < same < 240
    assert all(o["image"].dtype == np.float32 and o["label"] == 3 for o in outs)
    assert all(o["image"].min() >= 0 and o["image"].max() <= 1 for o in outs)


def test_augmentation_is_picklable_and_follows_its_generator():
    augment = pickle.loads(pickle.dumps(tr.PublishedAugment(p=1.0)))
    example = {"image": picture(), "label": np.int32(1)}
    one, two, other = (augment(example, rng(seed))["image"] for seed in (9, 9, 10))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)
