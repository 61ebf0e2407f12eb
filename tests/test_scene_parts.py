"""Parts of scenes: what each one adds to cover and objects."""

from __future__ import annotations

import numpy as np
import pytest

from data import scene_parts as parts
from data.scene_canvas import BARE, BUILDING, LOW, PAVED, WATER, Canvas
from data.scene_setting import Place, draw_setting


def blank(side=128, extent=128.0):
    rng = np.random.default_rng(3)
    setting = draw_setting(rng, Place(10.0, 45.0, extent / side, 0.0, 2015, 6, 1))
    canvas = Canvas(side, extent, setting.sun)
    canvas.image[:] = setting.grass
    return canvas, rng, setting


def test_a_house_is_one_building_with_a_tight_box():
    canvas, rng, setting = blank()
    parts.house(canvas, rng, setting, 5.0, -8.0, 0.6)
    rows, cols = np.nonzero(canvas.cover == BUILDING)
    (thing,) = canvas.things
    assert thing.kind == "building" and thing.colour in parts.ROOFS
    np.testing.assert_allclose(
        thing.box, (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1), atol=1.5
    )


@pytest.mark.parametrize("kind", ["boat", "plane"])
def test_boats_and_planes_are_bright_inside_their_box_and_leave_the_cover(kind):
    canvas, rng, setting = blank()
    canvas.image[:], before = 60, canvas.cover.copy()
    draw = parts.boat if kind == "boat" else parts.plane
    draw(canvas, rng, 0.0, 0.0, 0.5, 24.0)
    (thing,) = canvas.things
    assert thing.kind == kind
    rows, cols = np.nonzero(canvas.image[..., 0] > 140)
    x0, y0, x1, y1 = thing.box
    assert x0 - 1 <= cols.min() and cols.max() <= x1 and y0 - 1 <= rows.min() and rows.max() <= y1
    np.testing.assert_array_equal(canvas.cover, before)


def test_a_tank_is_round_and_casts_a_shadow():
    canvas, rng, _ = blank()
    canvas.image[:] = 150
    parts.tank(canvas, rng, 0.0, 0.0, 10.0)
    assert (canvas.cover == BUILDING).sum() == pytest.approx(np.pi * 100, rel=0.03)
    assert (canvas.image[..., 0] < 100).sum() > 20


def test_roads_are_paved_or_bare_and_as_wide_as_asked():
    canvas, rng, setting = blank()
    _, across = canvas.axes(0.0)
    parts.road(canvas, rng, setting, across, 4.0)
    assert (canvas.cover == PAVED).sum() == 8 * 128
    parts.road(canvas, rng, setting, across - np.float32(30), 4.0, paved=False)
    assert (canvas.cover[64 + 30] == BARE).all()


def test_fields_have_several_colours_and_report_their_borders():
    canvas, rng, setting = blank()
    border = parts.fields(canvas, rng, setting, 25.0, 0.3)
    assert set(np.unique(canvas.cover)) <= {BARE, LOW}
    assert border.min() >= 0 and border.max() > 5
    tones = {tuple(np.rint(tone / 8).astype(int)) for tone in canvas.image[border > 4]}
    assert len(tones) > 8


def test_water_has_a_bank():
    canvas, rng, setting = blank()
    _, across = canvas.axes(0.0)
    parts.water(canvas, rng, setting, np.abs(across) - 10)
    assert (canvas.cover[64] == WATER).all() and (canvas.cover[64 + 11] == BARE).all()
    assert (canvas.cover[64 + 20] == LOW).all()


def test_ground_holds_the_share_of_soil_it_is_asked_for_roughly():
    shares = []
    for bare in (0.0, 0.25, 0.5):
        canvas, rng, setting = blank()
        parts.ground(canvas, rng, setting, bare)
        shares.append((canvas.cover == BARE).mean())
    assert shares[0] < 0.15 < shares[1] < shares[2] < 0.75


def test_scattered_houses_stand_on_free_ground_and_apart():
    canvas, rng, setting = blank()
    free = np.ones((128, 128), bool)
    free[:, :64] = False
    number = parts.scattered_houses(canvas, rng, setting, 40, free)
    assert number == len(canvas.things) > 2
    assert not (canvas.cover[:, :64] == BUILDING).any()
    centres = [((t.box[0] + t.box[2]) / 2, (t.box[1] + t.box[3]) / 2) for t in canvas.things]
    gaps = [np.hypot(a[0] - b[0], a[1] - b[1]) for a in centres for b in centres if a is not b]
    assert min(gaps) > 8
