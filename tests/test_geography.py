"""Areas, lengths and places against values known by other means."""

from __future__ import annotations

import numpy as np
import pytest

from data.geography import area, centroid, length, middle_of, tile_place


def square(longitude, latitude, degrees):
    a, b = longitude + degrees, latitude + degrees
    corners = [[longitude, latitude], [a, latitude], [a, b], [longitude, b], [longitude, latitude]]
    return {"type": "Polygon", "coordinates": [corners]}


@pytest.mark.parametrize("latitude, metres", [(0.0, 110574.0), (45.0, 111132.0), (60.0, 111412.0)])
def test_a_degree_north_has_its_tabulated_length(latitude, metres):
    ends = [[10.0, latitude - 0.005], [10.0, latitude + 0.005]]
    found = length({"type": "LineString", "coordinates": ends})
    assert found == pytest.approx(metres / 100, rel=1e-4)


@pytest.mark.parametrize("latitude, metres", [(0.0, 111320.0), (45.0, 78847.0), (60.0, 55800.0)])
def test_a_degree_east_has_its_tabulated_length(latitude, metres):
    line = {"type": "MultiLineString", "coordinates": [[[5.0, latitude], [5.01, latitude]]] * 2}
    assert length(line) == pytest.approx(2 * metres / 100, rel=1e-4)


def test_areas_of_buildings_and_courtyards():
    side = 1e-3
    whole = area(square(-115.0, 36.0, side))
    assert whole == pytest.approx(111.0 * 90.2, rel=2e-3)
    court = square(-115.0 + side / 4, 36.0 + side / 4, side / 2)["coordinates"][0]
    hollow = {"type": "Polygon", "coordinates": [*square(-115.0, 36.0, side)["coordinates"], court]}
    assert area(hollow) == pytest.approx(0.75 * whole, rel=1e-5)
    both = {"type": "MultiPolygon", "coordinates": [hollow["coordinates"]] * 2}
    assert area(both) == pytest.approx(1.5 * whole, rel=1e-5)
    metres = {"type": "Polygon", "coordinates": [[[5e5, 5e6], [500010, 5e6], [500010, 5000020]]]}
    assert area(metres, projected=True) == 100


def test_places_of_shapes():
    assert middle_of([square(10, 20, 2), square(14, 18, 2)]) == (13.0, 20.0)
    assert middle_of([]) is None
    text = "POLYGON ((30.0 10.0, 32.0 10.0, 32.0 14.0, 30.0 14.0, 30.0 10.0))"
    np.testing.assert_allclose(centroid(text), (31.0, 12.0), rtol=1e-12)
    np.testing.assert_allclose(centroid("MULTIPOLYGON (((0 0, 3 0, 0 3, 0 0)))"), (1.0, 1.0))
    with pytest.raises(ValueError, match="no WKT polygon"):
        centroid("POINT (1 2)")


def test_corners_of_map_tiles():
    assert tile_place(0, 0, 17) == (-180.0, pytest.approx(85.0511287798, abs=1e-9))
    assert tile_place(2**16, 2**16, 17) == (0.0, 0.0)
    assert tile_place(2, 3, 3) == (-90.0, pytest.approx(40.97989806962, abs=1e-9))
