"""Where and when a scene is: what its metadata says decides how it looks.

Latitude and date give the season (vegetation, snow, length and side of shadows), longitude the
colour of the soil, the year how densely it is built up, GSD the size of things in pixels, and cloud
cover the haze. So the seven metadata fields carry information about the pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from data.scene_canvas import between


@dataclass(frozen=True)
class Place:
    """Raw metadata: degrees east and north, metres per pixel, fraction of cloud, date."""

    longitude: float
    latitude: float
    gsd: float
    cloud_cover: float
    year: int
    month: int
    day: int


@dataclass(frozen=True)
class Setting:
    """A place and what follows from it. Colours are [3] float32 in 0..255 before the atmosphere."""

    place: Place
    green: float
    snow: float
    built: float
    bare_trees: bool
    season: str
    sun: tuple[float, float]
    grass: np.ndarray
    dry: np.ndarray
    tree: np.ndarray
    soil: np.ndarray
    water: np.ndarray
    asphalt: np.ndarray
    concrete: np.ndarray


def mix(a, b, t: float) -> np.ndarray:
    """(1 - t) a + t b as float32."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return a + np.float32(t) * (b - a)


def draw_place(rng: np.random.Generator, side: int) -> tuple[Place, float]:
    """A place and the extent in metres of an image of it; the extent does not depend on `side`."""
    extent = 96.0 * 2 ** between(rng, 0.0, 1.0)
    cloudy = rng.random() < 0.3
    place = Place(
        longitude=round(between(rng, -180, 180), 4),
        latitude=round(between(rng, -55, 68), 4),
        gsd=extent / side,
        cloud_cover=round(between(rng, 0.05, 0.35) if cloudy else between(rng, 0, 0.05), 3),
        year=int(rng.integers(2000, 2025)),
        month=int(rng.integers(1, 13)),
        day=int(rng.integers(1, 29)),
    )
    return place, extent


def _warmth(place: Place) -> tuple[float, float]:
    """(warmth 0..1 peaking in local mid-summer, phase of the local year 0..1)."""
    phase = (place.month - 1 + place.day / 31) / 12
    if place.latitude < 0:
        phase = (phase + 0.5) % 1
    gap = abs(phase - 0.55)
    return 1 - 2 * min(gap, 1 - gap), phase


def _season(warmth: float, phase: float, latitude: float) -> str:
    if abs(latitude) < 23:
        return "wet season" if warmth > 0.5 else "dry season"
    if warmth > 0.62:
        return "summer"
    if warmth < 0.3:
        return "winter"
    return "spring" if phase < 0.55 else "autumn"


def _shadow(place: Place, warmth: float) -> tuple[float, float]:
    """Metres of shadow per metre of height at about half past ten, x east and y south."""
    tilt = (2 * warmth - 1) * 23.4 * (1 if place.latitude >= 0 else -1)
    zenith = min(abs(place.latitude - tilt) + 15, 62)
    length = round(math.tan(math.radians(zenith)), 6)
    away = -0.85 if place.latitude >= tilt else 0.85
    return round(-0.52 * length, 6), round(away * length, 6)


def _jitter(rng: np.random.Generator, colour, amount: float) -> np.ndarray:
    spread = rng.random(3, dtype=np.float32) * 2 - 1
    return np.asarray(colour, np.float32) * (1 + np.float32(amount) * spread)


def draw_setting(rng: np.random.Generator, place: Place) -> Setting:
    """Season, sun and colours of a place, with the spread of real scenes around them."""
    warmth, phase = _warmth(place)
    season, far = _season(warmth, phase, place.latitude), abs(place.latitude)
    tropical = far < 23
    green = 0.35 + 0.6 * warmth if tropical else min(max((warmth - 0.2) * 1.7, 0.05), 1.0)
    green = min(max(green + between(rng, -0.18, 0.12), 0.0), 1.0)
    snowy = not tropical and far > 42 and warmth < 0.28 and rng.random() < 0.75
    snow = between(rng, 0.45, 0.9) if snowy else 0.0
    turning = season == "autumn" and far > 32
    red = 1 - abs(abs(place.longitude) - 90) / 90
    tree = mix((70, 76, 48), (40, 66, 38), green)
    if turning:
        tree = mix(tree, (132, 92, 46), between(rng, 0.35, 0.9))
    bare_trees = season == "winter" and far > 38
    if bare_trees:
        tree = mix(tree, (96, 88, 76), 0.8)
    soil = mix((158, 142, 114), (154, 112, 78), red * between(rng, 0.4, 1))
    water = mix((34, 58, 82), (112, 112, 88), between(rng, 0, 1) ** 2)
    water = mix(water, (50, 84, 62), between(rng, 0, 0.9)) * np.float32(between(rng, 0.75, 1.35))
    return Setting(
        place=place,
        green=green,
        snow=snow,
        built=(place.year - 2000) / 24,
        bare_trees=bare_trees,
        season=season,
        sun=_shadow(place, warmth),
        grass=_jitter(rng, mix((158, 146, 100), (98, 126, 68), green), 0.08),
        dry=_jitter(rng, mix((176, 158, 116), (132, 140, 86), green), 0.08),
        tree=_jitter(rng, tree, 0.1),
        soil=_jitter(rng, soil, 0.06),
        water=_jitter(rng, water, 0.1),
        asphalt=_jitter(rng, mix((78, 80, 84), (148, 144, 136), between(rng, 0, 1)), 0.05),
        concrete=_jitter(rng, mix((142, 136, 124), (205, 202, 196), between(rng, 0, 1)), 0.05),
    )


def raw_metadata(place: Place) -> dict[str, float]:
    """The keywords of `transforms.normalise_metadata`."""
    return {
        "longitude": place.longitude,
        "latitude": place.latitude,
        "gsd": place.gsd,
        "cloud_cover": place.cloud_cover,
        "year": place.year,
        "month": place.month,
        "day": place.day,
    }
