from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from satdifuser_jax.preprocess import check_side, resize, to_pixels, to_uint8

SIZES = [(64, 256), (120, 256), (332, 256), (500, 512), (320, 256), (7, 3), (3, 7), (5, 5)]


@pytest.mark.parametrize("size,side", SIZES)
def test_resize_equals_torch_antialiased_bilinear(size, side):
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(size).random((size, size + 1, 3), dtype=np.float32)
    peer = torch.nn.functional.interpolate(
        torch.tensor(image).permute(2, 0, 1)[None],
        size=(side, side),
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )
    peer = peer[0].permute(1, 2, 0).numpy()
    assert np.max(np.abs(resize(image, side, side) - peer)) <= 5e-7


def test_uint8_and_unit_floats_give_the_same_pixels_in_minus_one_to_one():
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    a, b = to_pixels(image, 32), to_pixels(image / np.float32(255), 32)
    np.testing.assert_array_equal(a, b)
    assert a.dtype == np.float32 and a.shape == (32, 32, 3)
    assert a.min() >= -1 and a.max() <= 1
    flat = to_pixels(np.full((4, 4, 3), 255, np.uint8), 8)
    np.testing.assert_allclose(flat, 1.0, atol=1e-6)


def test_floats_outside_the_unit_range_are_clipped_before_resizing():
    image = np.zeros((4, 4, 3), np.float32)
    image[0, 0] = 100.0
    clipped = np.clip(image, 0, 1)
    np.testing.assert_array_equal(to_pixels(image, 8), to_pixels(clipped, 8))


def test_native_size_keeps_uint8_values_exactly():
    image = np.random.default_rng(1).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(to_pixels(image, 9)), image)


def test_crop_takes_the_centre_of_the_short_side_and_stretch_squeezes():
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, 4:12] = 255  # exactly the central square
    assert to_pixels(image, 8, fit="crop").min() == 1.0
    assert to_pixels(image, 8, fit="stretch").min() == -1.0
    square = np.random.default_rng(2).integers(0, 256, (11, 11, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_pixels(square, 8, "crop"), to_pixels(square, 8, "stretch"))


@pytest.mark.parametrize(
    "image,message",
    [
        (np.zeros((4, 4), np.uint8), r"\[H,W,3\].*\(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), r"\[H,W,3\].*\(4, 4, 4\)"),
        (np.zeros((4, 4, 3), np.uint16), "uint16"),
        (np.full((4, 4, 3), np.nan, np.float32), "NaN"),
    ],
)
def test_an_unusable_image_is_refused_saying_what_was_found(image, message):
    with pytest.raises(ValueError, match=message):
        to_pixels(image, 8)


def test_a_size_that_is_not_square_or_not_divisible_is_refused():
    with pytest.raises(ValueError, match=r"\(256, 512\) is not square"):
        check_side((256, 512))
    with pytest.raises(ValueError, match="100 must be a positive multiple of 64"):
        check_side(100, 64)
    assert check_side([256, 256], 64) == 256
    with pytest.raises(ValueError, match="tile"):
        to_pixels(np.zeros((4, 4, 3), np.uint8), 8, fit="tile")


def test_preprocess_needs_no_jax():
    code = "import sys, satdifuser_jax.preprocess as p; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
