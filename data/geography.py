"""Where things lie and how large they are, on the ellipsoid of GPS; GeoJSON and WKT, no library.

Lengths and areas are taken in the tangent plane at the middle of a shape: for buildings and roads
of a picture of a few kilometres they are right to better than a part in a thousand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_AXIS, _SQUASHED = 6378137.0, 0.00669437999014
"""Semi-major axis in metres and first eccentricity squared of WGS84."""


def _metres(points: np.ndarray) -> np.ndarray:
    """Degrees [N, 2] (longitude, latitude) to metres around their middle."""
    middle = points.mean(0)
    sine = math.sin(math.radians(middle[1]))
    bend = 1 - _SQUASHED * sine**2
    east = _AXIS / math.sqrt(bend) * math.cos(math.radians(middle[1]))
    north = _AXIS * (1 - _SQUASHED) / bend**1.5
    return np.radians(points - middle) * (east, north)


def _shoelace(ring: np.ndarray) -> float:
    x, y = ring[:, 0], ring[:, 1]
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _rings(geometry: Mapping) -> Iterator[tuple[np.ndarray, bool]]:
    """(points [N, 2], whether it is a hole) of polygons; lines as rings that are none."""
    kind, inside = geometry["type"], geometry["coordinates"]
    if kind == "GeometryCollection":
        raise ValueError("a GeometryCollection; need polygons or lines")
    if kind in ("LineString", "Polygon"):
        inside = [inside]
    for shape in inside:
        rings = shape if "Polygon" in kind else [shape]
        for number, ring in enumerate(rings):
            yield np.asarray(ring, np.float64)[:, :2], number > 0


def area(geometry: Mapping, projected: bool = False) -> float:
    """Square metres of a GeoJSON Polygon or MultiPolygon. projected: coordinates are metres."""
    total = 0.0
    for ring, hole in _rings(geometry):
        size = _shoelace(ring if projected else _metres(ring))
        total += -size if hole else size
    return total


def length(geometry: Mapping, projected: bool = False) -> float:
    """Metres of a GeoJSON LineString or MultiLineString."""
    total = 0.0
    for line, _ in _rings(geometry):
        steps = np.diff(line if projected else _metres(line), axis=0)
        total += float(np.hypot(steps[:, 0], steps[:, 1]).sum())
    return total


def middle_of(geometries: Sequence[Mapping]) -> tuple[float, float] | None:
    """(longitude, latitude) of the middle of the box around GeoJSON shapes; None without any."""
    points = [ring for geometry in geometries for ring, _ in _rings(geometry) if len(ring)]
    if not points:
        return None
    every = np.concatenate(points)
    low, high = every.min(0), every.max(0)
    return float((low[0] + high[0]) / 2), float((low[1] + high[1]) / 2)


def centroid(text: str) -> tuple[float, float]:
    """(longitude, latitude) of the centroid of the first ring of a WKT POLYGON.

    Raises ValueError on anything else.
    """
    found = re.match(r"\s*(?:MULTI)?POLYGON\s*\(+([^()]+)\)", text, re.IGNORECASE)
    if not found:
        raise ValueError(f"'{text:.40}' is no WKT polygon")
    ring = np.array([point.split()[:2] for point in found[1].split(",")], np.float64)
    start = ring[0]
    ring = ring - start  # small numbers: the products below lose no digits
    ahead = np.roll(ring, -1, 0)
    cross = ring[:, 0] * ahead[:, 1] - ahead[:, 0] * ring[:, 1]
    if not cross.sum():
        return tuple(map(float, start + ring.mean(0)))
    middle = ((ring + ahead) * cross[:, None]).sum(0) / (3 * cross.sum())
    return tuple(map(float, start + middle))


def tile_place(column: float, row: float, zoom: int) -> tuple[float, float]:
    """(longitude, latitude) of the corner of a web-Mercator tile; parts of tiles are allowed."""
    number = 2.0**zoom
    latitude = math.atan(math.sinh(math.pi * (1 - 2 * row / number)))
    return column / number * 360 - 180, math.degrees(latitude)
