"""Shapes on a canvas: cover exact at pixel centres, edges smooth, boxes tight."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data.scene_canvas import (
    BARE,
    BUILDING,
    LOW,
    PAVED,
    TREES,
    WATER,
    Canvas,
    reach_of,
    smooth_curve,
    smooth_noise,
    triangle,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def bounds(mask):
    rows, cols = np.nonzero(mask)
    return cols.min(), rows.min(), cols.max() + 1, rows.max() + 1


def test_disc_covers_exactly_the_pixels_whose_centre_is_inside():
    canvas = Canvas(40, 80.0)
    canvas.disc(3.0, -5.0, 11.0, (200, 0, 0), BUILDING)
    inside = (canvas.x - 3) ** 2 + (canvas.y + 5) ** 2 < 11**2
    np.testing.assert_array_equal(canvas.cover == BUILDING, inside)
    assert canvas.image[inside][:, 0].min() >= 100 - 1e-3  # half covered at the very edge
    assert canvas.image[~inside][:, 0].max() <= 100 + 1e-3


@pytest.mark.parametrize("angle", [0.0, 0.4, 1.2, math.pi / 2, 2.9])
def test_box_of_a_turned_rectangle_fits_its_pixels(angle):
    canvas = Canvas(200, 100.0)
    canvas.rectangle(4, -7, angle, (14, 6), (255, 255, 255), BUILDING)
    canvas.note("building", 4, -7, reach_of(angle, 14, 6), "white")
    found = bounds(canvas.cover == BUILDING)
    np.testing.assert_allclose(canvas.things[0].box, found, atol=1.5)


def test_a_painted_shape_does_not_depend_on_the_side():
    shares = []
    for side in (50, 100, 400):
        canvas = Canvas(side, 100.0)
        canvas.rectangle(10, 10, 0.7, (20, 9), (1, 1, 1), BUILDING)
        shares.append((canvas.cover == BUILDING).mean())
    np.testing.assert_allclose(shares, 4 * 20 * 9 / 100**2, rtol=0.03)


def test_shapes_outside_leave_the_image_alone():
    canvas = Canvas(32, 64.0)
    canvas.rectangle(200, 0, 0, (5, 5), (9, 9, 9), BUILDING, height=5)
    canvas.disc(0, -90, 4, (9, 9, 9), WATER, height=5)
    canvas.note("tank", 0, -90, (4, 4), "white")
    assert (canvas.cover == LOW).all() and not canvas.image.any()
    assert not canvas.things and not canvas.cut


def test_objects_count_from_half_inside_and_are_cut_below():
    canvas = Canvas(64, 64.0)
    canvas.note("boat", 31.0, 0.0, (4, 4), "white")  # 5 of 8 metres inside
    canvas.note("plane", 33.0, 0.0, (4, 4), "white")  # 3 of 8 metres inside
    assert [thing.kind for thing in canvas.things] == ["boat"] and canvas.cut == {"plane"}
    assert canvas.things[0].box == (59.0, 28.0, 64.0, 36.0)


def test_shadow_falls_where_the_sun_says():
    canvas = Canvas(64, 64.0, sun=(1.0, 0.0))
    canvas.image[:] = 100
    canvas.disc(0, 0, 4, (100, 100, 100), BUILDING, height=8)
    assert canvas.image[32, 42, 0] < 60 and canvas.image[32, 22, 0] == 100


def test_trees_stand_on_open_ground_only():
    canvas = Canvas(64, 128.0)
    canvas.image[:] = 150
    canvas.cover[:, :16], canvas.cover[:, 16:32], canvas.cover[:, 32:48] = WATER, PAVED, BARE
    before = canvas.cover.copy()
    canvas.crowns(rng(), 1.0, (40, 70, 40))
    assert (canvas.cover[:, :32] == before[:, :32]).all()
    assert (canvas.cover[:, 32:] == TREES).mean() > 0.5
    np.testing.assert_array_equal(canvas.image[:, :32], 150)


def test_more_density_means_more_trees():
    counts = []
    for density in (0.0, 0.2, 0.6, 1.0):
        canvas = Canvas(64, 128.0)
        canvas.crowns(rng(), density, (40, 70, 40))
        counts.append(int((canvas.cover == TREES).sum()))
    assert counts[0] == 0 and counts == sorted(set(counts))


def test_noise_is_smooth_bounded_and_seeded():
    field = smooth_noise(rng(1), 64, 5)
    assert field.shape == (64, 64) and field.dtype == np.float32
    assert np.abs(field).max() <= 1 and field.std() > 0.2
    assert np.abs(np.diff(field, axis=0)).max() < 0.35
    np.testing.assert_array_equal(field, smooth_noise(rng(1), 64, 5))
    curve = smooth_curve(rng(2), np.linspace(-1.5, 1.5, 301, dtype=np.float32), 6)
    assert np.abs(curve).max() <= 1 and np.abs(np.diff(curve)).max() < 0.2


def test_triangle_wave_has_period_one_and_unit_range():
    t = np.linspace(-3, 3, 601)
    np.testing.assert_allclose(triangle(t), triangle(t + 1), atol=1e-12)
    assert triangle(t).min() == pytest.approx(-1) and triangle(t).max() == pytest.approx(1)
