"""Views of pictures: the published pixels exactly, pictures of every kind, and faults."""

from __future__ import annotations

import dataclasses
import json
import re
import zlib

import numpy as np
import pytest
from PIL import Image

from geodit_jax.config import GeoDiTConfig, TowerConfig
from geodit_jax.image_layout import lay_out
from geodit_jax.views import MAX_PIXELS, make_views, read_picture, resize, to_rgb
from tests.conftest import golden_cases

MODES = {"square": "square", "pad": "pad", "anyres_max_4": "anyres"}
SMALL = GeoDiTConfig(tower=TowerConfig(image_size=32, patch=8))
GRADIENT = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)


def procedural(width: int, height: int, a, b, d, s) -> np.ndarray:
    """uint8 [height, width, 3], the pictures of the golden vectors."""
    y, x, c = np.ogrid[:height, :width, :3]
    a, b, d, s = (np.array(values)[c] for values in (a, b, d, s))
    return ((a * x + b * y + x * y // d + 48 * ((x // 24 + y // 16) % 2) + s) % 256).astype(
        np.uint8
    )


@pytest.mark.parametrize("folder", golden_cases("llada_v"))
def test_views_equal_the_published_ones_in_every_pixel(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (top, left), step = meta["sample_start"], meta["sample_step"]
    with np.load(folder / "views.npz") as arrays:
        golden = {key: arrays[key] for key in arrays.files}
    cases = sorted(key.removesuffix("/n_views") for key in golden if key.endswith("/n_views"))
    assert len(cases) == len(meta["sizes"]) * len(MODES)
    for case in cases:
        width, height, mode = re.fullmatch(r"(\d+)x(\d+)/(\w+)", case).groups()
        config = GeoDiTConfig(image_mode=MODES[mode])
        views = make_views(procedural(int(width), int(height), **meta["image"]), config)
        assert len(views) == golden[f"{case}/n_views"], case
        np.testing.assert_array_equal(views.sum((1, 2, 3), dtype=np.int64), golden[f"{case}/sum"])
        crc = [zlib.crc32(np.ascontiguousarray(view)) for view in views]
        np.testing.assert_array_equal(crc, golden[f"{case}/crc32"], case)
        sample = (views[:, top::step, left::step] / np.float32(255) - 0.5) / 0.5
        found = sample.transpose(0, 3, 1, 2)
        assert found.shape == golden[f"{case}/sample"].shape
        np.testing.assert_allclose(found, golden[f"{case}/sample"], rtol=0, atol=1e-7)
        layout = lay_out((int(width), int(height)), config)
        assert layout.num_views == len(views)
        if layout.canvas:
            assert list(layout.canvas) == golden[f"{case}/canvas"].tolist(), case


@pytest.mark.parametrize("size", [(30, 50), (50, 30), (32, 32), (1, 1), (1, 900), (900, 1)])
@pytest.mark.parametrize("mode", ["square", "pad", "anyres"])
def test_pictures_of_every_shape_give_whole_views(size, mode):
    config = dataclasses.replace(SMALL, image_mode=mode)
    views = make_views(np.full((size[1], size[0], 3), 200, np.uint8), config)
    assert views.dtype == np.uint8
    assert views.shape == (lay_out(size, config).num_views, 32, 32, 3)
    if mode != "pad":
        assert (views[0] == 200).all()


def test_each_axis_is_filtered_by_itself():
    tall = Image.fromarray(GRADIENT.transpose(1, 0, 2).copy())
    once = tall.resize((17, tall.height), Image.Resampling.BICUBIC)
    by_hand = once.resize((17, 23), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(resize(tall, 17, 23)), np.asarray(by_hand))


def test_padding_is_grey_and_centred():
    views = make_views(
        np.zeros((10, 32, 3), np.uint8), dataclasses.replace(SMALL, image_mode="pad")
    )
    assert (views[0, :11] == 127).all() and (views[0, 21:] == 127).all()
    assert (views[0, 11:21] == 0).all()


def test_grey_alpha_palette_and_16_bit_give_the_same_views():
    grey = GRADIENT[..., 0]
    expected = make_views(np.repeat(grey[..., None], 3, 2), SMALL)
    palette = Image.fromarray(grey).convert("P")
    pictures = {
        "grey": grey,
        "one channel": grey[..., None],
        "grey and alpha": np.stack([grey, 255 - grey], -1),
        "alpha": np.stack([grey, grey, grey, 255 - grey], -1),
        "16 bit": grey.astype(np.uint16) * 257,
        "float": grey / np.float32(255),
        "Pillow grey": Image.fromarray(grey),
        "Pillow 16 bit": Image.fromarray(grey.astype(np.uint16) * 257),
        "Pillow 32 bit": Image.fromarray(grey.astype(np.int32) * 257),
        "Pillow alpha": Image.fromarray(grey).convert("RGBA"),
        "palette": palette,
    }
    for kind, picture in pictures.items():
        np.testing.assert_array_equal(make_views(picture, SMALL), expected, err_msg=kind)


@pytest.mark.parametrize(
    "picture, message",
    [
        (np.zeros((3, 8, 8), np.uint8), r"\[H,W,1 to 4\], found the shape \(3, 8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), "found the shape"),
        (np.full((4, 4, 3), np.nan), r"must lie in \[0,1\]"),
        (np.full((4, 4, 3), 7.0), r"must lie in \[0,1\]"),
        (np.zeros((4, 4, 3), np.int64), "pixels of type int64"),
        (Image.fromarray(np.full((4, 4), 70_000, np.int32)), "beyond 16 bits"),
        (Image.fromarray(np.zeros((4, 4), np.float32)), "floating point"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        to_rgb(picture)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_beyond_the_limit_are_refused_before_any_work(tmp_path):
    huge = np.broadcast_to(np.zeros(3, np.uint8), (20_000, 20_000, 3))
    with pytest.raises(ValueError, match=f"20000x20000 pixels, more than {MAX_PIXELS:,}"):
        make_views(huge, SMALL)
    long = np.zeros((1, 20_000, 3), np.uint8)
    with pytest.raises(ValueError, match="padded to a square.*20000x20000"):
        make_views(long, dataclasses.replace(SMALL, image_mode="pad"))
    assert make_views(long, SMALL).shape == (1, 32, 32, 3)
    for side in (13_000, 20_000):  # the second is beyond what Pillow itself opens
        path = tmp_path / f"{side}.ppm"
        path.write_bytes(b"P6 %d %d 255\n" % (side, side))
        with pytest.raises(ValueError, match=f"{side}.ppm.*more than {MAX_PIXELS:,}.*smaller"):
            read_picture(path)


def test_files_are_read_and_broken_ones_named(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(GRADIENT).save(path)
    np.testing.assert_array_equal(read_picture(path), GRADIENT)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.png: cannot be used as a picture \(.*truncated"):
        read_picture(path)
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png: cannot be used"):
        read_picture(path)
    with pytest.raises(FileNotFoundError):
        read_picture(tmp_path / "none.png")


def test_a_model_without_tower_takes_no_pictures():
    with pytest.raises(ValueError, match="text only"):
        make_views(GRADIENT, GeoDiTConfig(tower=None))
