"""What scenes are made of: grounds, fields, roads, water, trees, buildings, boats, planes, tanks.

A part paints on a canvas and notes its objects. All sizes are metres, `angle` is in radians.
"""

from __future__ import annotations

import math

import numpy as np

from data.scene_canvas import (
    BARE,
    BUILDING,
    LOW,
    PAVED,
    WATER,
    Canvas,
    between,
    direction,
    reach_of,
    smooth_curve,
    smooth_noise,
    triangle,
)
from data.scene_setting import Setting, mix

WHITE, SHADE = (225, 225, 222), (60, 62, 66)
ROOFS = {
    "red": (158, 88, 68),
    "brown": (122, 96, 80),
    "grey": (128, 128, 130),
    "dark": (78, 78, 84),
    "white": (208, 206, 200),
    "blue": (92, 116, 150),
}


CAR_PAINT = (WHITE, WHITE, WHITE, (46, 48, 54), (46, 48, 54), (150, 60, 52), (70, 92, 140))


def pick(rng, choices):
    """One of `choices`; repeat an entry to make it likelier."""
    return choices[int(rng.random() * len(choices))]


def turn(rng) -> float:
    return between(rng, 0, math.pi)


def ground(canvas: Canvas, rng, setting: Setting, bare: float = 0.25) -> None:
    """Grass running over into drier grass and patches of soil; `bare` is the share of soil."""
    blend = smooth_noise(rng, canvas.side, 3) * 0.5 + smooth_noise(rng, canvas.side, 9) * 0.3
    t = np.clip(blend + 0.5, 0, 1)[..., None]
    canvas.image[:] = setting.grass + t * (setting.dry - setting.grass)
    patch = smooth_noise(rng, canvas.side, 5) + 0.4 * smooth_noise(rng, canvas.side, 13)
    distance = (0.9 - 1.8 * bare - patch) * np.float32(canvas.pixel * 3)
    canvas.fill(distance, setting.soil, BARE)


def _cells(rng, t: np.ndarray, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Cell number and distance to the cell's border along one axis, widths varied around `size`."""
    edges = np.cumsum(size * (0.55 + 0.9 * rng.random(24, dtype=np.float32)), dtype=np.float64)
    edges = (edges - edges[11]).astype(np.float32)
    number = np.clip(np.searchsorted(edges, t.ravel()).reshape(t.shape), 1, len(edges) - 1)
    return number, np.minimum(t - edges[number - 1], edges[number] - t)


def fields(canvas: Canvas, rng, setting: Setting, size: float, angle: float) -> np.ndarray:
    """Parcels of crops with rows; returns the distance to the nearest boundary in metres."""
    u, v = canvas.axes(angle)
    column, edge_u = _cells(rng, u, size)
    shift = (rng.random(32, dtype=np.float32) * size)[column]
    row, edge_v = _cells(rng, v + shift, size * between(rng, 0.8, 1.8))
    style = (column * 7 + row * 3) % 16
    ripe, green = (196, 172, 104), mix((120, 128, 66), (70, 118, 52), setting.green)
    choices = np.stack([green, mix(green, ripe, 0.5), ripe, setting.grass, setting.soil,
                        mix(setting.soil, (90, 72, 58), 0.5)]).astype(np.float32)  # fmt: skip
    odds = np.array([0.28, 0.16, 0.1, 0.16, 0.15, 0.15])
    odds[:2] *= 0.35 + setting.green
    kind = np.searchsorted(np.cumsum(odds / odds.sum()), rng.random(16)).clip(0, 5)
    tones = choices[kind] * (0.86 + 0.28 * rng.random((16, 1), dtype=np.float32))
    canvas.image[:] = tones[style]
    canvas.cover[:] = np.where(kind >= 4, BARE, LOW).astype(np.uint8)[style]
    period = np.maximum(2.6 * canvas.pixel, 2.5 + 3 * rng.random(16)).astype(np.float32)[style]
    along = (rng.random(16) < 0.5)[style]
    rows = triangle(np.where(along, u, v) / period)
    strength = (0.14 * rng.random(16, dtype=np.float32) * (rng.random(16) < 0.75))[style]
    canvas.image *= (1 + strength * rows)[..., None]
    border = np.minimum(edge_u, edge_v)
    canvas.fill(border - np.float32(0.8), setting.dry * 0.92, LOW)
    return border


def road(canvas: Canvas, rng, setting: Setting, across, half: float, paved: bool = True) -> None:
    """A road where `across` (distance from its middle, metres) is below `half`."""
    distance = np.abs(across)
    canvas.fill(distance - half * 1.25, mix(setting.soil, setting.dry, 0.5), BARE)
    colour = setting.asphalt if paved else mix(setting.soil, WHITE, 0.25)
    canvas.fill(distance - half, colour, PAVED if paved else BARE)


def lane(canvas: Canvas, along, across, width: float, dash: float = 0.0) -> None:
    """A painted line; `dash` metres on and off, 0 for a solid one. Fades below a pixel's width."""
    distance = np.abs(across) - np.float32(max(width, canvas.pixel * 0.45))
    if dash:
        distance = np.maximum(distance, triangle(along / np.float32(2 * dash)) * dash * 0.5)
    canvas.fill(distance, (205, 205, 198))


def house(canvas: Canvas, rng, setting: Setting, cx, cy, angle) -> None:
    a, b = between(rng, 4.6, 7.2), between(rng, 3.4, 4.8)
    name = pick(rng, ("red", "red", "red", "brown", "brown", "grey", "grey", "dark", "white"))
    roof = mix(ROOFS[name], WHITE, 0.6 * setting.snow) * np.float32(between(rng, 0.85, 1.15))
    canvas.rectangle(cx, cy, angle, (a, b), roof, BUILDING, height=4.0, ridge=0.13)
    canvas.note("building", cx, cy, reach_of(angle, a, b), name)


def hall(canvas: Canvas, rng, setting: Setting, cx, cy, angle, half) -> None:
    """A large flat-roofed building with ribs or vents on its roof."""
    name = pick(rng, ("white", "white", "white", "grey", "grey", "grey", "blue", "brown", "red"))
    roof = mix(ROOFS[name], WHITE, 0.4 * setting.snow) * np.float32(between(rng, 0.85, 1.1))
    canvas.rectangle(cx, cy, angle, half, roof, BUILDING, between(rng, 6, 11), 0.04)
    c, s = direction(angle)
    for k in range(int(rng.integers(1, 5))):
        u, v = between(rng, -0.8, 0.8) * half[0], between(rng, -0.7, 0.7) * half[1]
        x, y = cx + u * c - v * s, cy + u * s + v * c
        tone = (190, 190, 190) if k % 2 else (96, 98, 102)
        canvas.rectangle(x, y, angle, (between(rng, 1, 2.6), between(rng, 0.9, 1.8)), tone)
    canvas.note("building", cx, cy, reach_of(angle, *half), name)


def tank(canvas: Canvas, rng, cx: float, cy: float, radius: float) -> None:
    white = rng.random() < 0.75
    colour = (214, 214, 208) if white else (150, 132, 118)
    canvas.disc(cx, cy, radius, colour, BUILDING, height=6.0, tone=0.16)
    canvas.disc(cx, cy, radius * 0.16, np.asarray(colour) * 0.72)
    canvas.note("tank", cx, cy, (radius, radius), "white" if white else "brown")


def boat(canvas: Canvas, rng, cx: float, cy: float, angle: float, length: float) -> None:
    """A hull pointed at the front with a cabin; water stays the land cover."""
    half, beam = length / 2, length * between(rng, 0.13, 0.17)
    where = canvas.window(cx, cy, length)
    if where is not None:
        u, v = canvas.local(where, angle, cx, cy)
        point = np.maximum(u / half, 0)
        distance = np.maximum(np.abs(v) - beam * (1 - point * point), np.abs(u) - half)
        canvas.fill(distance, (222, 222, 220), None, where)
    c, s = direction(angle)
    canvas.rectangle(cx - 0.2 * half * c, cy - 0.2 * half * s, angle, (half * 0.3, beam * 0.55),
                     (120, 110, 100) if rng.random() < 0.5 else (90, 110, 140))  # fmt: skip
    canvas.note("boat", cx, cy, reach_of(angle, half, beam), "white")


def plane(canvas: Canvas, rng, cx: float, cy: float, angle: float, length: float) -> None:
    """Fuselage, swept wings and tail, with a shadow; the apron stays the land cover."""
    half = length / 2
    dx, dy = canvas.sun[0] * 3, canvas.sun[1] * 3
    for ox, oy, colour in ((dx, dy, None), (0.0, 0.0, (232, 232, 230))):
        where = canvas.window(cx + ox, cy + oy, length)
        if where is None:
            continue
        u, v = canvas.local(where, angle, cx + ox, cy + oy)
        side = np.abs(v)
        body = np.maximum(np.abs(u) - half, side - half * 0.13)
        swept = u + 0.45 * side
        wing = np.maximum(np.abs(swept - half * 0.12) - half * 0.15, side - half * 0.95)
        tail = np.maximum(np.abs(swept + half * 0.78) - half * 0.1, side - half * 0.36)
        distance = np.minimum(np.minimum(body, wing), tail)
        if colour is None:
            canvas.shade(distance, 0.45, where)
        else:
            canvas.fill(distance, colour, None, where)
    canvas.note("plane", cx, cy, reach_of(angle, half, half * 0.95), "white")


def cars(canvas: Canvas, rng, points, angle: float) -> None:
    """Vehicles at (x, y) points, too small to count as objects."""
    for x, y in points:
        canvas.rectangle(x, y, angle, (2.3, 1.05), pick(rng, CAR_PAINT))


def place_at(angle: float, u: float, v: float, cx: float = 0.0, cy: float = 0.0):
    """World point of frame coordinates (u along, v across)."""
    c, s = direction(angle)
    return cx + u * c - v * s, cy + u * s + v * c


def grove(canvas: Canvas, rng, setting: Setting, amount: float, cells: int = 4) -> None:
    """Trees in clumps: `amount` 0 gives a few, 1 a forest."""
    clumps = smooth_noise(rng, canvas.side, cells) + 0.35 * smooth_noise(rng, canvas.side, 11)
    canvas.crowns(
        rng, np.clip(amount + 0.9 * clumps - 0.25, 0, 1), setting.tree, setting.bare_trees
    )


def meander(canvas: Canvas, rng, angle: float, bend: float, knots: int = 5, ripple: float = 0.3):
    """(along, across) of a curve through the image that swings by `bend` of the extent."""
    u, v = canvas.axes(angle)
    t = u * np.float32(2 / (canvas.extent * 1.5))
    swing = smooth_curve(rng, t, knots) + np.float32(ripple) * smooth_curve(rng, t, 12)
    offset = between(rng, -0.15, 0.15) * canvas.extent
    return u, v - swing * np.float32(bend * canvas.extent) - np.float32(offset)


def water(canvas: Canvas, rng, setting: Setting, distance) -> None:
    """Water where `distance` is negative, with a wet bank and a lighter shallow edge."""
    canvas.fill(distance - 2.2, mix(setting.soil, setting.dry, between(rng, 0, 0.7)), BARE)
    shallow = np.clip(1 + distance / np.float32(between(rng, 5, 14)), 0, 1)[..., None]
    swell = 1 + 0.05 * smooth_noise(rng, canvas.side, 7)[..., None]
    tone = (setting.water + 0.3 * shallow * (setting.soil - setting.water)) * swell
    canvas.fill(distance, tone, WATER)


def pond(canvas: Canvas, rng, setting: Setting) -> None:
    cx, cy = (between(rng, -0.35, 0.35) * canvas.extent for _ in range(2))
    radius = 7 + 26 * rng.random() ** 2
    x, y = canvas.x - np.float32(cx), canvas.y - np.float32(cy)
    ragged = 1 + 0.35 * smooth_noise(rng, canvas.side, 8)
    water(canvas, rng, setting, np.sqrt(x * x + y * y) - radius * ragged)


def lot(canvas: Canvas, rng, setting: Setting, amount: float) -> None:
    """Irregular paved ground over about `amount` of the image: yards, squares, car parks."""
    patch = smooth_noise(rng, canvas.side, 4) + 0.3 * smooth_noise(rng, canvas.side, 11)
    tone = mix(setting.asphalt, setting.concrete, rng.random())
    canvas.fill((0.75 - 1.5 * amount - patch) * np.float32(canvas.pixel * 2), tone, PAVED)


def scattered_houses(canvas: Canvas, rng, setting: Setting, number: int, free) -> int:
    """Up to `number` houses where the boolean map `free` allows; returns how many stand."""
    angle, built = turn(rng), 0
    for _ in range(number):
        x, y = (between(rng, -0.42, 0.42) * canvas.extent for _ in range(2))
        row = int((y / canvas.extent + 0.5) * canvas.side)
        col = int((x / canvas.extent + 0.5) * canvas.side)
        reach = max(1, round(9 / canvas.pixel))
        near = free[max(row - reach, 0) : row + reach + 1, max(col - reach, 0) : col + reach + 1]
        if near.all():
            house(canvas, rng, setting, x, y, angle)
            built += 1
            free[max(row - reach, 0) : row + reach + 1, max(col - reach, 0) : col + reach + 1] = (
                False
            )
    return built
