"""Metadata decides what a scene looks like."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data.scene_setting import Place, draw_place, draw_setting, mix, raw_metadata
from data.transforms import METADATA_FIELDS, normalise_metadata

PARIS = Place(2.35, 48.85, 1.5, 0.0, 2016, 7, 14)


def setting(place, seed=0):
    return draw_setting(np.random.default_rng(seed), place)


def test_summer_is_greener_than_winter_on_both_hemispheres():
    for latitude, warm, cold in ((48, 7, 1), (-48, 1, 7)):
        summer = [setting(replace(PARIS, latitude=latitude, month=warm), s).green for s in range(9)]
        winter = [setting(replace(PARIS, latitude=latitude, month=cold), s).green for s in range(9)]
        assert min(summer) > max(winter)
        assert setting(replace(PARIS, latitude=latitude, month=warm)).season == "summer"
        assert setting(replace(PARIS, latitude=latitude, month=cold)).season == "winter"


def test_snow_falls_in_cold_winters_only():
    snowy = [setting(replace(PARIS, latitude=60, month=1), s).snow for s in range(20)]
    assert 8 < sum(s > 0 for s in snowy) < 20
    for other in ({"month": 7}, {"latitude": 5.0, "month": 1}, {"latitude": -60.0, "month": 1}):
        assert not any(setting(replace(PARIS, **other), s).snow for s in range(20))


def test_shadows_point_away_from_the_sun_and_grow_with_latitude():
    north, south = setting(PARIS).sun, setting(replace(PARIS, latitude=-48.0)).sun
    assert north[1] < 0 < south[1]
    low, high = (setting(replace(PARIS, latitude=lat, month=1)).sun[1] for lat in (10.0, 50.0))
    assert abs(high) > abs(low)


def test_the_year_decides_how_densely_it_is_built():
    assert setting(replace(PARIS, year=2000)).built == 0
    assert setting(replace(PARIS, year=2024)).built == 1


def test_places_are_valid_metadata_and_gsd_follows_the_side():
    for seed in range(50):
        place, extent = draw_place(np.random.default_rng(seed), 64)
        finer, same = draw_place(np.random.default_rng(seed), 128)
        assert same == extent and finer.gsd == place.gsd / 2 == extent / 128
        assert replace(finer, gsd=place.gsd) == place
        assert normalise_metadata(**raw_metadata(place)).shape == (7,)
    assert tuple(raw_metadata(PARIS)) == METADATA_FIELDS


def test_mix_runs_from_the_first_to_the_second_colour():
    np.testing.assert_allclose(mix((0, 10, 20), (10, 20, 30), 0.5), [5, 15, 25])
