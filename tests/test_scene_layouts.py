"""The eight layouts show what their name says, in any season and at any side."""

from __future__ import annotations

import numpy as np
import pytest

from data.scene_canvas import BUILDING, PAVED, TREES, WATER
from data.scene_layouts import LAYOUTS
from data.scenes import draw_scene


@pytest.fixture(scope="module")
def seen():
    """25 scenes of each layout."""
    return {
        name: [draw_scene(1, "train", k + 8 * n) for n in range(25)]
        for k, name in enumerate(LAYOUTS)
    }


def share(scenes, cover):
    return np.array([(scene.cover == cover).mean() for scene in scenes])


def number(scenes, kind):
    return np.array([sum(thing.kind == kind for thing in scene.things) for scene in scenes])


def test_each_class_has_what_names_it(seen):
    assert (share(seen["forest"], TREES) > 0.15).all()
    assert (share(seen["river"], WATER) > 0.02).all()
    assert (share(seen["harbour"], WATER) > 0.08).all()
    for name in ("airport", "highway"):
        assert (share(seen[name], PAVED) > 0.06).all()
    for name in ("industrial", "residential"):
        assert (share(seen[name], BUILDING) > 0.01).all()
    assert np.mean(number(seen["airport"], "plane") > 0) > 0.8
    assert np.mean(number(seen["harbour"], "boat") > 0) > 0.8
    assert np.median(number(seen["residential"], "building")) > 8


def test_covers_overlap_between_classes(seen):
    """No class owns a cover: amounts of one class lie inside those of another."""
    assert share(seen["highway"], TREES).max() > share(seen["forest"], TREES).min()
    assert share(seen["river"], WATER).max() > share(seen["harbour"], WATER).min()
    assert share(seen["industrial"], PAVED).max() > np.median(share(seen["airport"], PAVED))


@pytest.mark.parametrize("index", range(8))
def test_the_layout_is_the_same_ground_at_another_side(index):
    small, large = draw_scene(2, "train", index, 32), draw_scene(2, "train", index, 128)
    assert small.place.gsd == 4 * large.place.gsd
    for cover in (WATER, BUILDING, PAVED):
        assert (small.cover == cover).mean() == pytest.approx(
            (large.cover == cover).mean(), abs=0.05
        )
