from __future__ import annotations

import numpy as np
import pytest

from data.crops import QuarterTurns, RandomCrop


def picture(height=20, width=30):
    return np.arange(height * width * 3, dtype=np.uint16).reshape(height, width, 3)


def test_crops_are_squares_inside_the_picture_of_every_allowed_side():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(300):
        image = RandomCrop(5, 12)({"image": picture()}, rng)["image"]
        assert image.shape[0] == image.shape[1]
        seen.add(image.shape[0])
        first = int(image[0, 0, 0]) // 3
        top, left = divmod(first, 30)
        side = image.shape[0]
        np.testing.assert_array_equal(image, picture()[top : top + side, left : left + side])
    assert seen == set(range(5, 13))


def test_crops_are_limited_by_the_short_side_and_scale_the_ground_sampling_distance():
    rng = np.random.default_rng(0)
    metadata = np.full(7, 100.0, np.float32)
    out = RandomCrop(500)({"image": picture(), "metadata": metadata}, rng)
    assert out["image"].shape == (20, 20, 3)
    assert out["metadata"][2] == 100.0
    out = RandomCrop(10, 10)({"image": picture(), "metadata": metadata}, rng)
    assert out["metadata"].tolist() == [100, 100, 50, 100, 100, 100, 100]
    assert metadata[2] == 100.0


def test_all_eight_turns_of_a_square_occur():
    square = picture(4, 4)
    rng = np.random.default_rng(0)
    seen = {QuarterTurns()({"image": square}, rng)["image"].tobytes() for _ in range(200)}
    assert len(seen) == 8


def test_impossible_crop_sides_are_refused():
    with pytest.raises(ValueError, match=r"crop sides 9\.\.4"):
        RandomCrop(9, 4)
