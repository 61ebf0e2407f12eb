"""Drawing for procedural scenes: an image and its land cover, painted in metres.

Shapes are signed distances turned into pixel coverage, so edges are smooth and the cover map is
exact at pixel centres. Only operations that IEEE 754 rounds exactly are applied to arrays (no
array sines, no matrix products), so the same seed gives the same bytes on every machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

BARE, LOW, TREES, WATER, PAVED, BUILDING = range(6)
TILE = 256
TEXEL = 0.75
"""Metres per texel of the crown tile."""

Colour = tuple[float, float, float]


@dataclass
class Thing:
    """An object: kind, box (x0, y0, x1, y1) in pixels clipped to the image, and a colour word."""

    kind: str
    box: tuple[float, float, float, float]
    colour: str


def between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def direction(angle: float) -> tuple[float, float]:
    """(cos, sin) rounded to 9 places: the last bit of a sine differs between C libraries."""
    return round(math.cos(angle), 9), round(math.sin(angle), 9)


@lru_cache(maxsize=64)
def _interpolation(side: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Left cell and smoothstep weight of every pixel centre over a grid of `cells`."""
    position = (np.arange(side, dtype=np.float32) + np.float32(0.5)) * np.float32(cells / side)
    left = np.minimum(position.astype(np.int64), cells - 1)
    t = position - left
    return left, (t * t * (3 - 2 * t)).astype(np.float32)


def smooth_noise(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """[side, side] float32 value noise in [-1, 1] with `cells` cells along a side."""
    grid = rng.random((cells + 1, cells + 1), dtype=np.float32) * 2 - 1
    left, t = _interpolation(side, cells)
    rows = grid[left] + (grid[left + 1] - grid[left]) * t[:, None]
    return rows[:, left] + (rows[:, left + 1] - rows[:, left]) * t[None, :]


def smooth_curve(rng: np.random.Generator, t: np.ndarray, knots: int) -> np.ndarray:
    """Smooth random function of t in [-1, 1] (clamped beyond), values in [-1, 1]."""
    values = rng.random(knots + 1, dtype=np.float32) * 2 - 1
    position = np.clip((t + 1) * (knots / 2), 0, knots - 1e-3).astype(np.float32)
    left = position.astype(np.int64)
    s = position - left
    return values[left] + (values[left + 1] - values[left]) * (s * s * (3 - 2 * s))


def triangle(t: np.ndarray) -> np.ndarray:
    """Triangle wave of period 1, values in [-1, 1]."""
    return np.abs(t - np.floor(t) - 0.5) * 4 - 1


@lru_cache(maxsize=1)
def _grain_tile() -> np.ndarray:
    """Periodic fine texture [TILE, TILE] in about [-1, 1]."""
    rng = np.random.default_rng(20)
    total = np.zeros((TILE, TILE), np.float32)
    for cells, weight in ((32, 0.35), (64, 0.35), (128, 0.3), (256, 0.3)):
        grid = rng.random((cells, cells), dtype=np.float32) * 2 - 1
        left, t = _interpolation(TILE, cells)
        right = (left + 1) % cells
        rows = grid[left] + (grid[right] - grid[left]) * t[:, None]
        total += np.float32(weight) * (rows[:, left] + (rows[:, right] - rows[:, left]) * t)
    return total


@lru_cache(maxsize=1)
def _crown_tile() -> tuple[np.ndarray, np.ndarray]:
    """Periodic tree crowns: dome height in [0, 1] and a number in [0, 1) per crown."""
    rng = np.random.default_rng(21)
    height = np.zeros((TILE, TILE), np.float32)
    owner = np.ones((TILE, TILE), np.float32)
    for _ in range(3000):
        cy, cx, name, r, top = rng.random(5)
        r = (1.6 + 2.9 * r * r) / TEXEL
        reach = int(r) + 1
        near = np.arange(-reach, reach + 1)
        rows, cols = (near + int(cy * TILE)) % TILE, (near + int(cx * TILE)) % TILE
        inside = 1 - (near[:, None] ** 2 + near[None, :] ** 2) / (r * r)
        dome = (0.55 + 0.45 * top) * np.sqrt(np.maximum(inside, 0))
        window = np.ix_(rows, cols)
        higher = dome > height[window]
        height[window] = np.where(higher, dome, height[window])
        owner[window] = np.where(higher, name, owner[window])
    return height, owner


@dataclass
class Canvas:
    """An image being painted. `extent` metres along a side, origin in the middle, y down."""

    side: int
    extent: float
    sun: tuple[float, float] = (0.6, -0.8)
    """Metres a shadow runs (x, y) per metre of height."""
    image: np.ndarray = field(init=False)
    cover: np.ndarray = field(init=False)
    things: list[Thing] = field(default_factory=list)
    cut: set[str] = field(default_factory=set)

    def __post_init__(self):
        self.pixel = self.extent / self.side
        centres = (np.arange(self.side, dtype=np.float32) + np.float32(0.5)) * np.float32(
            self.pixel
        ) - np.float32(self.extent / 2)
        self.x, self.y = centres[None, :], centres[:, None]
        self.image = np.zeros((self.side, self.side, 3), np.float32)
        self.cover = np.full((self.side, self.side), LOW, np.uint8)

    def axes(self, angle: float, cx: float = 0.0, cy: float = 0.0):
        """Coordinates (along, across) [side, side] in metres of a frame turned by `angle`."""
        c, s = direction(angle)
        x, y = self.x - np.float32(cx), self.y - np.float32(cy)
        c, s = np.float32(c), np.float32(s)
        return x * c + y * s, y * c - x * s

    def window(self, cx: float, cy: float, radius: float) -> tuple[slice, slice] | None:
        """Pixels within `radius` metres of a point, or None when outside the image."""
        half = self.extent / 2
        x0, x1 = (int((cx + d + half) / self.pixel) for d in (-radius, radius))
        y0, y1 = (int((cy + d + half) / self.pixel) for d in (-radius, radius))
        if x1 < 0 or y1 < 0 or x0 >= self.side or y0 >= self.side:
            return None
        return slice(max(y0, 0), y1 + 2), slice(max(x0, 0), x1 + 2)

    def fill(self, distance: np.ndarray, colour, cover: int | None = None, where=np.s_[:]) -> None:
        """Paints where `distance` (metres, negative inside) says; `colour` [3] or an array."""
        alpha = np.clip(0.5 - distance / np.float32(self.pixel), 0, 1)[..., None]
        view = self.image[where]
        view += alpha * (np.asarray(colour, np.float32) - view)
        if cover is not None:
            self.cover[where][distance < 0] = cover

    def shade(self, distance: np.ndarray, strength: float, where=np.s_[:]) -> None:
        """Darkens where `distance` is negative."""
        alpha = np.clip(0.5 - distance / np.float32(self.pixel), 0, 1)[..., None]
        self.image[where] *= 1 - np.float32(strength) * alpha

    def local(self, where, angle: float, cx: float, cy: float):
        """Frame coordinates inside a window."""
        c, s = direction(angle)
        x = self.x[:, where[1]] - np.float32(cx)
        y = self.y[where[0]] - np.float32(cy)
        c, s = np.float32(c), np.float32(s)
        return x * c + y * s, y * c - x * s

    def rectangle(self, cx, cy, angle, half, colour, cover=None, height=0.0, ridge=0.0) -> None:
        """Turned rectangle with half sizes `half` = (a, b); `ridge` parts a roof in two tones."""
        a, b = half
        dx, dy = self.sun[0] * height, self.sun[1] * height
        where = self.window(cx + dx / 2, cy + dy / 2, a + b + abs(dx) + abs(dy) + self.pixel)
        if where is None:
            return
        if height:
            u, v = self.local(where, angle, cx + dx, cy + dy)
            self.shade(np.maximum(np.abs(u) - a, np.abs(v) - b), 0.5, where)
        u, v = self.local(where, angle, cx, cy)
        colour = np.asarray(colour, np.float32)
        if ridge:
            c, s = direction(angle)
            lit = ridge if self.sun[1] * c - self.sun[0] * s < 0 else -ridge
            colour = colour * (1 + np.where(v > 0, np.float32(lit), np.float32(-lit)))[..., None]
        self.fill(np.maximum(np.abs(u) - a, np.abs(v) - b), colour, cover, where)

    def disc(self, cx, cy, radius, colour, cover=None, height=0.0, tone=0.0) -> None:
        """Disc, with a shadow when it has a height and a tone running with the sun."""
        dx, dy = self.sun[0] * height, self.sun[1] * height
        where = self.window(cx + dx / 2, cy + dy / 2, radius + abs(dx) + abs(dy) + self.pixel)
        if where is None:
            return
        if height:
            u, v = self.local(where, 0.0, cx + dx, cy + dy)
            self.shade(np.sqrt(u * u + v * v) - radius, 0.5, where)
        u, v = self.local(where, 0.0, cx, cy)
        colour = np.asarray(colour, np.float32)
        if tone:
            slope = (u * self.sun[0] + v * self.sun[1]) * np.float32(-tone / radius)
            colour = colour * (1 + np.clip(slope, -0.25, 0.25))[..., None]
        self.fill(np.sqrt(u * u + v * v) - radius, colour, cover, where)

    def crowns(self, rng, density: np.ndarray | float, colour, bare: bool = False) -> None:
        """Trees where the crown's number is below `density`; never on water, road or building."""
        heights, owners = _crown_tile()
        oy, ox = rng.integers(0, TILE, 2)
        rows = np.floor(self.y[:, 0] / np.float32(TEXEL)).astype(np.int64) + oy
        cols = np.floor(self.x[0] / np.float32(TEXEL)).astype(np.int64) + ox
        height, owner = (t[np.ix_(rows % TILE, cols % TILE)] for t in (heights, owners))
        back = np.ix_(
            (rows - round(self.sun[1] * 4 / TEXEL)) % TILE,
            (cols - round(self.sun[0] * 4 / TEXEL)) % TILE,
        )
        ground = self.cover < TREES
        shadow = ground & (heights[back] > 0.2) & (owners[back] < density)
        self.image[shadow] *= np.float32(0.62)
        near = np.ix_(
            (rows - round(self.sun[1] * 1.6 / TEXEL)) % TILE,
            (cols - round(self.sun[0] * 1.6 / TEXEL)) % TILE,
        )
        tree = ground & (height > 0.15) & (owner < density)
        light = 0.62 + 0.5 * height + 0.55 * (height - heights[near])
        tint = np.float32(0.86) + np.float32(0.28) * ((owner * 97) % 1)
        shaded = (light * tint)[..., None] * np.asarray(colour, np.float32)
        solid = np.float32(0.55 if bare else 1.0)
        self.image[tree] += solid * (shaded[tree] - self.image[tree])
        self.cover[tree] = TREES

    def roughen(self, rng, amounts: np.ndarray) -> None:
        """Fine texture, stronger on some covers: `amounts` [6] are relative amplitudes."""
        tile = _grain_tile()
        oy, ox = rng.integers(0, TILE, 2)
        index = np.arange(self.side)
        fine = tile[np.ix_((index + oy) % TILE, (index + ox) % TILE)]
        self.image *= (1 + fine * amounts.astype(np.float32)[self.cover])[..., None]

    def note(
        self, kind: str, cx: float, cy: float, reach: tuple[float, float], colour: str
    ) -> None:
        """Records an object's box if at least half of it is inside, else its kind as cut."""
        half = self.extent / 2
        x0, x1 = ((cx + d + half) / self.pixel for d in (-reach[0], reach[0]))
        y0, y1 = ((cy + d + half) / self.pixel for d in (-reach[1], reach[1]))
        cx0, cx1 = max(x0, 0.0), min(x1, float(self.side))
        cy0, cy1 = max(y0, 0.0), min(y1, float(self.side))
        seen = max(cx1 - cx0, 0) * max(cy1 - cy0, 0)
        if seen >= 0.5 * (x1 - x0) * (y1 - y0):
            box = tuple(round(value, 2) for value in (cx0, cy0, cx1, cy1))
            self.things.append(Thing(kind, box, colour))
        elif seen > 0:
            self.cut.add(kind)


def reach_of(angle: float, a: float, b: float) -> tuple[float, float]:
    """Half sizes of the upright box around a turned rectangle with half sizes a, b."""
    c, s = direction(angle)
    return abs(a * c) + abs(b * s), abs(a * s) + abs(b * c)
