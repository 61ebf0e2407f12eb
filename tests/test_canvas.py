"""Canvases: files, colours, tiles and sheets."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from common_jax.canvas import (
    GAP,
    LINE,
    MARGIN,
    class_colours,
    new_figure,
    plain,
    resize_tile,
    save_sheet,
    shorten,
    swatch,
    tile_size,
    write_png,
)


def read_pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def test_figures_have_the_asked_size_and_the_same_bytes_twice(tmp_path):
    for name in ("a.png", "b.png"):
        figure = new_figure(2, 1.5)
        figure.add_subplot().plot([1, 3, 2])
        assert write_png(figure, tmp_path / name) == tmp_path / name
    assert read_pixels(tmp_path / "a.png").shape == (180, 240, 3)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.png"):
        write_png(new_figure(1, 1), tmp_path / "a.jpg")


def test_figures_need_neither_pyplot_nor_jax():
    code = (
        "import sys, satdifuser_jax.figures\n"
        "print(sorted({'jax', 'matplotlib.pyplot', 'torch'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.stdout.strip() == "[]", shown.stdout + shown.stderr


def test_the_22_class_colours_differ_and_then_repeat():
    colours = class_colours(30).astype(int)
    apart = np.abs(colours[:22, None] - colours[None, :22]).sum(-1)
    assert apart[~np.eye(22, dtype=bool)].min() > 30
    assert (colours[22:] == colours[:8]).all()


def test_dollars_underscores_and_long_names_are_drawn_as_text():
    assert plain("5 $ and\n6 $") == r"5 \$ and 6 \$"
    assert plain("_background").endswith("_background") and plain("_background")[0] != "_"
    assert shorten("permanent crops", 10) == "permanent…" and shorten("water", 5) == "water"


@pytest.mark.parametrize(
    ("side", "shown"), [((64, 64), (128, 128)), ((32, 16), (160, 80)), ((200, 100), (200, 100))]
)
def test_small_pictures_grow_by_whole_factors(side, shown):
    assert tile_size(*side) == shown
    assert tile_size(1024, 512) == (256, 128)


def test_whole_factors_copy_pixels_and_reduction_averages():
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    grown = resize_tile(picture, (12, 18))
    np.testing.assert_array_equal(grown, picture.repeat(3, 0).repeat(3, 1))
    checks = np.indices((8, 8)).sum(0).astype(np.uint8) % 2 * 200
    assert (resize_tile(checks, (4, 4), average=True) == 100).all()


def test_sheets_hold_their_tiles_unchanged(tmp_path):
    tiles = np.random.default_rng(1).integers(0, 256, (2, 3, 120, 110, 3), dtype=np.uint8)
    path = save_sheet(
        tiles,
        tmp_path / "sheet.png",
        title="first 6 of 9 images",
        headings=("one", "two", "a heading far too long for its column"),
        captions=[["a", "", None], ["b", "c", "d"]],
        legend=[(swatch((255, 0, 0)), "red"), (swatch((0, 0, 255), 40), "blue")],
    )
    pixels = read_pixels(path)
    assert pixels.shape[1] == 3 * 110 + 2 * GAP + 2 * MARGIN
    for r in range(2):
        for c in range(3):
            y = MARGIN + 2 * LINE + r * (120 + LINE + GAP)
            x = MARGIN + c * (110 + GAP)
            np.testing.assert_array_equal(pixels[y : y + 120, x : x + 110], tiles[r, c])
    below = pixels[MARGIN + 2 * LINE + 2 * (120 + LINE + GAP) :]
    for colour, count in (((255, 0, 0), 14 * 14), ((0, 0, 255), 14 * 40)):
        assert (below == np.array(colour)).all(-1).sum() == count


def test_long_legends_flow_onto_new_lines_inside_the_sheet(tmp_path):
    tiles = np.zeros((1, 1, 64, 64, 3), np.uint8)
    heights = []
    for count in (2, 20):
        legend = [(swatch((9, 99, 199)), f"class number {i}") for i in range(count)]
        pixels = read_pixels(save_sheet(tiles, tmp_path / "l.png", legend=legend))
        assert (pixels == (9, 99, 199)).all(-1).sum() == count * 14 * 14
        heights.append(len(pixels))
    assert heights[1] >= heights[0] + 4 * LINE
