"""Label and prediction pictures, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from common_jax.canvas import GAP, LINE, MARGIN, class_colours
from common_jax.overlays import IGNORED, MAX_ROWS, save_overlays

SIDE = 160
CLASSES = ("bare", "trees", "water")


def draw_tiles(path, line: int = 0, title: bool = False) -> list[np.ndarray]:
    """Image, label and prediction of one line of the sheet."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    y = MARGIN + LINE * (1 + title) + line * (SIDE + LINE + GAP)
    lefts = [MARGIN + c * (SIDE + GAP) for c in range(3)]
    return [pixels[y : y + SIDE, x : x + SIDE] for x in lefts]


def white(count: int = 1, side: int = SIDE) -> np.ndarray:
    return np.full((count, side, side, 3), 255, np.uint8)


def test_labels_and_right_predictions_show_the_class_colours(tmp_path):
    labels = np.random.default_rng(0).integers(0, 3, (2, SIDE, SIDE))
    path = save_overlays(white(2), labels, labels, CLASSES, tmp_path / "o.png")
    colours = class_colours(3)
    for n in range(2):
        image, label, prediction = draw_tiles(path, n)
        assert (image == 255).all()
        np.testing.assert_array_equal(label, colours[labels[n]])
        np.testing.assert_array_equal(prediction, colours[labels[n]])


def test_wrong_regions_are_outlined_and_keep_their_colour_inside(tmp_path):
    labels = np.zeros((1, SIDE, SIDE), int)
    predictions = labels.copy()
    predictions[0, 40:80, 50:100] = 2
    _, label, shown = draw_tiles(
        save_overlays(white(), labels, predictions, CLASSES, tmp_path / "o.png")
    )
    colours = class_colours(3)
    expected = colours[predictions[0]].copy()
    expected[40:80, 50:100] = 0
    expected[41:79, 51:99] = 255
    expected[42:78, 52:98] = colours[2]
    np.testing.assert_array_equal(shown, expected)
    assert (label == colours[0]).all()


def test_ignored_pixels_are_grey_and_never_wrong(tmp_path):
    labels = np.zeros((1, SIDE, SIDE), np.int32)
    labels[0, :30] = -1
    predictions = np.where(labels < 0, 1, labels)
    path = save_overlays(white(), labels, predictions, CLASSES, tmp_path / "o.png", ignore_index=-1)
    _, label, shown = draw_tiles(path)
    assert (label[:30] == IGNORED).all() and (label[30:] == class_colours(1)[0]).all()
    np.testing.assert_array_equal(shown, class_colours(3)[predictions[0]])


def test_dark_ground_darkens_the_colours_and_small_maps_are_enlarged(tmp_path):
    images = white(1, SIDE // 2)
    images[:, :, : SIDE // 4] = 0
    labels = np.ones((1, SIDE // 4, SIDE // 4), int)
    _, label, _ = draw_tiles(save_overlays(images, labels, labels, CLASSES, tmp_path / "o.png"))
    colour = class_colours(2)[1]
    assert (label[:, SIDE // 2 :] == colour).all()
    np.testing.assert_array_equal(label[0, 0], np.round(colour * 0.6).astype(np.uint8))


def test_many_images_are_cut_and_the_title_moves_them_down(tmp_path):
    count = MAX_ROWS + 3
    labels = np.broadcast_to(np.arange(count)[:, None, None] % 3, (count, 8, 8))
    path = save_overlays(white(count, 8), labels, labels, CLASSES, tmp_path / "o.png")
    for n in range(MAX_ROWS):
        assert (draw_tiles(path, n, title=True)[1] == class_colours(3)[n % 3]).all()
    with Image.open(path) as picture:
        assert picture.height < MARGIN * 2 + (MAX_ROWS + 1) * (SIDE + LINE + GAP)


def test_wrong_inputs_are_refused_with_the_value_found(tmp_path):
    good = np.zeros((1, SIDE, SIDE), int)
    for labels, predictions, message in (
        (good + 3, good, "labels hold class 3"),
        (good, good - 100, "predictions hold class -100"),
        (good.astype(float), good, "float64"),
        (good[0], good, "integers"),
        (good, np.zeros((1, 8, 8), int), "against the labels"),
        (np.zeros((2, 8, 8), int), good, "number of labels"),
    ):
        with pytest.raises(ValueError, match=message):
            save_overlays(white(), labels, predictions, CLASSES, tmp_path / "o.png")
