"""Grids, confusion matrices, heat maps, bars and curves, judged by their pixels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from common_jax.canvas import GAP, LINE, MARGIN
from common_jax.charts import (
    COLOURS,
    MAX_TILES,
    HeatMap,
    _short_count,
    save_bars,
    save_confusion,
    save_curves,
    save_grid,
    save_heat_map,
)


def read_pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def count_colour(pixels, colour) -> int:
    return int((np.abs(pixels.astype(int) - np.asarray(colour)).max(-1) <= 1).sum())


def draw_images(count: int, side: int = 80) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_grid_shows_every_image_where_it_belongs(tmp_path):
    images = draw_images(5)
    path = save_grid(images, tmp_path / "new" / "grid.png", columns=3, titles=list("abcde"))
    assert path == tmp_path / "new" / "grid.png"
    pixels = read_pixels(path)
    for i, image in enumerate(images):
        y = MARGIN + i // 3 * (160 + LINE + GAP)
        x = MARGIN + i % 3 * (160 + GAP)
        shown = pixels[y : y + 160, x : x + 160]
        np.testing.assert_array_equal(shown, image.repeat(2, 0).repeat(2, 1))
    empty = pixels[MARGIN + 160 + LINE + GAP :][:160, MARGIN + 2 * (160 + GAP) :]
    assert (empty == 255).all()


def test_large_grids_are_cut_and_say_so(tmp_path):
    whole = read_pixels(save_grid(draw_images(MAX_TILES, 8), tmp_path / "a.png"))
    cut = read_pixels(save_grid(draw_images(500, 8), tmp_path / "b.png"))
    assert cut.shape == (whole.shape[0] + LINE, *whole.shape[1:])
    assert (cut[MARGIN : MARGIN + LINE] < 128).any()
    wide = read_pixels(save_grid(draw_images(40, 160), tmp_path / "c.png", columns=40))
    assert wide.shape[1] <= 4100


def test_grid_refuses_what_is_no_picture(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match="float32"):
        save_grid(np.zeros((1, 8, 8, 3), np.float32), path)
    with pytest.raises(ValueError, match=r"\(8, 8, 3\)"):
        save_grid(np.zeros((8, 8, 3), np.uint8), path)
    with pytest.raises(ValueError, match="titles"):
        save_grid(draw_images(2), path, titles=["a"])
    with pytest.raises(ValueError, match="columns is 0"):
        save_grid(draw_images(2), path, columns=0)
    assert not list(tmp_path.iterdir())


def test_confusion_colours_are_shares_of_the_label(tmp_path):
    counts = np.random.default_rng(0).integers(1, 20, (26, 26))
    names = [f"class {i}" for i in range(26)]
    more = counts.copy()
    more[3] *= 7
    shown = [
        read_pixels(save_confusion(c, names, tmp_path / "c.png")) for c in (counts, more, counts.T)
    ]
    assert shown[0].shape == shown[1].shape and max(shown[0].shape) < 2500
    below_title = slice(40, None)
    np.testing.assert_array_equal(shown[0][below_title], shown[1][below_title])
    assert (shown[0][below_title] != shown[2][below_title]).any()


def test_confusion_takes_one_class_empty_rows_and_200_classes(tmp_path):
    for counts in (np.array([[4]]), np.zeros((3, 3), int), np.eye(200, dtype=np.int64)):
        names = [f"a rather long name, number {i}" for i in range(len(counts))]
        pixels = read_pixels(save_confusion(counts, names, tmp_path / "c.png"))
        assert max(pixels.shape) < 3500


def test_confusion_refuses_wrong_counts(tmp_path):
    for counts, names, message in (
        (np.zeros((2, 3), int), "ab", "shape"),
        (np.zeros((2, 2)), "ab", "integers"),
        (np.array([[1, -1], [0, 0]]), "ab", ">= 0"),
        (np.zeros((2, 2), int), "abc", "class names"),
    ):
        with pytest.raises(ValueError, match=message):
            save_confusion(counts, names, tmp_path / "c.png")


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, ""), (7, "7"), (9_999, "9999"), (12_345, "12k"), (515_000, "515k"), (2_140_000, "2.1M")],
)
def test_counts_fit_their_cells(count, shown):
    assert _short_count(count) == shown


def test_heat_map_outlines_the_best_and_greys_the_missing(tmp_path):
    values = np.array([[0.1, np.nan], [0.3, 0.9], [0.2, 0.4]])
    labels = HeatMap(rows=["a", "b", "c"], columns=["x", "y"], bar="rate", mark_best=True)
    pixels = read_pixels(save_heat_map(values, labels, tmp_path / "h.png"))
    assert count_colour(pixels, (0xD0, 0xD0, 0xD0)) > 300
    ys, xs = np.nonzero(np.abs(pixels.astype(int) - (0xD5, 0x5E, 0)).max(-1) <= 8)
    gy, gx = np.nonzero((pixels == 0xD0).all(-1))
    assert abs(ys.min() - np.percentile(gy, 98)) < 5  # the cell below the grey one
    assert abs(xs.mean() - np.median(gx)) < 10


def test_even_heat_map_around_its_centre_is_pale(tmp_path):
    labels = HeatMap(rows="ab", columns="xyz", bar="share", centre=2.0, groups=[("all", 2)])
    even, uneven = (
        read_pixels(save_heat_map(values, labels, tmp_path / "h.png"))[:, :330]
        for values in (np.full((2, 3), 2.0), np.array([[0.0, 2, 4], [4, 2, 0]]))
    )
    saturation = [int((p.max(-1).astype(int) - p.min(-1)).max()) for p in (even, uneven)]
    assert saturation[0] < 30 < 90 < saturation[1]


def test_heat_map_refuses_labels_that_do_not_match(tmp_path):
    labels = HeatMap(rows="ab", columns="xy", bar="")
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        save_heat_map(np.zeros((2, 3)), labels, tmp_path / "h.png")
    labels = HeatMap(rows="ab", columns="xy", bar="", groups=[("one", 1)])
    with pytest.raises(ValueError, match="groups"):
        save_heat_map(np.zeros((2, 2)), labels, tmp_path / "h.png")


def test_bars_are_as_long_as_their_values(tmp_path):
    fill = np.array(COLOURS[5]) * 255
    rows = [("full", 1.0, None, None), ("half", 0.5, None, None)]
    pixels = read_pixels(save_bars(rows, tmp_path / "b.png"))
    lengths = (np.abs(pixels - fill).max(-1) <= 1).sum(1)
    longest, shortest = lengths.max(), lengths[lengths > 0].min()
    assert shortest == pytest.approx(longest / 2, abs=2)


def test_error_bars_span_low_to_high(tmp_path):
    widths = []
    for half in (0.1, 0.2):
        rows = [("a", 0.5, 0.5 - half, 0.5 + half), ("b", 1.0, None, None)]
        pixels = read_pixels(save_bars(rows, tmp_path / "b.png"))
        inside = pixels[20:-60, 120:-20]  # without the axes
        black = (inside < 60).all(-1).sum(1)
        widths.append(black.max())
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.1)


def test_bars_refuse_values_outside_their_interval_and_cut_long_lists(tmp_path):
    path = tmp_path / "b.png"
    for rows, message in (
        ([], "empty"),
        ([("a", 0.5, 0.6, 0.7)], "not between"),
        ([("a", float("nan"), None, None)], "finite"),
        ([("a", 0.5, 0.1, None)], "numbers or None"),
        ([("a", 0.5)], "2 entries"),
    ):
        with pytest.raises(ValueError, match=message):
            save_bars(rows, path)
    many = [(f"run {i}", i / 300, None, None) for i in range(300)]
    assert max(read_pixels(save_bars(many, path)).shape) < 3000


def test_each_curve_has_its_colour_and_lies_at_its_values(tmp_path):
    steps = np.arange(30)
    series = {"low": (steps, np.zeros(30)), "high": (steps, np.ones(30))}
    pixels = read_pixels(save_curves(series, tmp_path / "c.png", "loss"))
    assert pixels.shape == (504, 864, 3)
    rows = []
    for colour in COLOURS[:2]:
        match = np.abs(pixels[:, :600] - np.array(colour) * 255).max(-1) <= 2
        assert match.any(1).sum() < 10  # one thin level line
        rows.append(np.nonzero(match)[0].mean())
    assert rows[0] > rows[1] + 300


def test_curves_refuse_lengths_that_differ(tmp_path):
    with pytest.raises(ValueError, match="'a'.*equally"):
        save_curves({"a": ([1, 2], [1.0])}, tmp_path / "c.png", "loss")
    with pytest.raises(ValueError, match="empty"):
        save_curves({}, tmp_path / "c.png", "loss")
