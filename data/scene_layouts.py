"""The eight scene classes: what stands where. Each layout paints a canvas.

Layouts borrow each other's parts (a pond in a field, a road through a forest, houses by a river),
so that no colour alone names a class.
"""

from __future__ import annotations

import math

import numpy as np

from data import scene_parts as parts
from data.scene_canvas import BARE, LOW, PAVED, Canvas, between, smooth_noise
from data.scene_setting import Setting, mix


def _surroundings(canvas: Canvas, rng, setting: Setting) -> None:
    """A land to put something on: meadow, fields, woods or thinly built."""
    kind = rng.random()
    if kind < 0.35:
        parts.fields(canvas, rng, setting, between(rng, 22, 45), parts.turn(rng))
        parts.grove(canvas, rng, setting, between(rng, -0.3, 0.3), 4)
        return
    parts.ground(canvas, rng, setting, between(rng, 0, 0.5))
    if kind > 0.8:
        parts.lot(canvas, rng, setting, between(rng, 0.25, 0.5))
    parts.grove(canvas, rng, setting, between(rng, -0.2, 1.2), int(rng.integers(2, 7)))


def _free(canvas: Canvas) -> np.ndarray:
    return (canvas.cover == LOW) | (canvas.cover == BARE)


def farmland(canvas: Canvas, rng, setting: Setting) -> None:
    angle = parts.turn(rng)
    border = parts.fields(canvas, rng, setting, between(rng, 20, 42), angle)
    if rng.random() < 0.25:  # a field watered by a turning arm
        cx, cy = (between(rng, -0.25, 0.25) * canvas.extent for _ in range(2))
        tone = mix(setting.grass, (70, 112, 52), setting.green)
        x, y = canvas.x - np.float32(cx), canvas.y - np.float32(cy)
        radius, distance = between(rng, 22, 34), np.sqrt(x * x + y * y)
        rings = tone * (1 + 0.07 * parts.triangle(distance / 5))[..., None]
        canvas.fill(distance - radius, rings, LOW)
    if rng.random() < 0.5:  # hedges along some boundaries
        clumps = smooth_noise(rng, canvas.side, 5)
        hedge = (border < between(rng, 1.5, 3.0)) & (clumps > between(rng, -0.4, 0.5))
        canvas.crowns(rng, hedge * np.float32(0.95), setting.tree, setting.bare_trees)
    if rng.random() < 0.5:
        parts.grove(canvas, rng, setting, between(rng, -0.15, 0.6), 2)
    if rng.random() < 0.35:
        parts.pond(canvas, rng, setting)
    if rng.random() < 0.2:
        parts.lot(canvas, rng, setting, between(rng, 0.1, 0.25))
    if rng.random() < 0.6:
        u, v = canvas.axes(angle if rng.random() < 0.7 else parts.turn(rng))
        offset = np.float32(between(rng, -0.35, 0.35) * canvas.extent)
        parts.road(canvas, rng, setting, v - offset, between(rng, 1.6, 4.5), rng.random() < 0.6)
    if rng.random() < 0.6:
        parts.scattered_houses(canvas, rng, setting, int(rng.integers(1, 9)), _free(canvas))


def forest(canvas: Canvas, rng, setting: Setting) -> None:
    if rng.random() < 0.3:
        parts.fields(canvas, rng, setting, between(rng, 22, 45), parts.turn(rng))
    else:
        parts.ground(canvas, rng, setting, between(rng, 0.05, 0.5))
    if rng.random() < 0.2:
        parts.lot(canvas, rng, setting, between(rng, 0.1, 0.25))
    if rng.random() < 0.4:
        parts.pond(canvas, rng, setting)
    if rng.random() < 0.5:
        _, across = parts.meander(canvas, rng, parts.turn(rng), between(rng, 0.02, 0.2))
        parts.road(canvas, rng, setting, across, between(rng, 1.5, 5.0), rng.random() < 0.6)
    if rng.random() < 0.4:
        parts.scattered_houses(canvas, rng, setting, int(rng.integers(1, 7)), _free(canvas))
    parts.grove(canvas, rng, setting, between(rng, 0.6, 1.5), int(rng.integers(2, 6)))


def river(canvas: Canvas, rng, setting: Setting) -> None:
    _surroundings(canvas, rng, setting)
    angle = parts.turn(rng)
    along, across = parts.meander(canvas, rng, angle, between(rng, 0.06, 0.2))
    half = (0.045 + 0.16 * rng.random() ** 2) * canvas.extent
    widths = half * (1 + 0.3 * smooth_noise(rng, canvas.side, 4))
    parts.water(canvas, rng, setting, np.abs(across) - widths)
    if rng.random() < 0.3:  # sand banks
        bank = smooth_noise(rng, canvas.side, 7) * np.float32(8)
        sand = np.maximum(np.abs(across) - widths * 0.7, 3.6 - bank)
        canvas.fill(sand, mix(setting.soil, (214, 204, 178), 0.5), BARE)
    belt = np.clip(1.1 - (np.abs(across) - widths) / np.float32(12), 0, 1) * between(rng, 0, 0.9)
    canvas.crowns(rng, belt, setting.tree, setting.bare_trees)
    if rng.random() < 0.45:
        at = between(rng, -0.25, 0.25) * canvas.extent
        parts.road(canvas, rng, setting, along - np.float32(at), between(rng, 3, 6))
    if rng.random() < 0.45:
        parts.scattered_houses(canvas, rng, setting, int(rng.integers(2, 16)), _free(canvas))


def highway(canvas: Canvas, rng, setting: Setting) -> None:
    _surroundings(canvas, rng, setting)
    if rng.random() < 0.35:
        parts.pond(canvas, rng, setting)
    angle = parts.turn(rng)
    bend = between(rng, 0.1, 0.35) if rng.random() < 0.4 else 0.0
    along, across = parts.meander(canvas, rng, angle, bend, knots=2, ripple=0.0)
    if rng.random() < 0.35:
        crossing = angle + between(rng, 0.8, 2.3)
        _, v = canvas.axes(crossing)
        parts.road(canvas, rng, setting, v, between(rng, 2.5, 4.5))
    half = between(rng, 6.5, 13.0)
    canvas.fill(np.abs(across) - half - 3, setting.dry, LOW)
    parts.road(canvas, rng, setting, across, half)
    middle = setting.dry if rng.random() < 0.6 else setting.concrete
    canvas.fill(
        np.abs(across) - between(rng, 0.6, 1.6), middle, LOW if middle is setting.dry else PAVED
    )
    for sign in (-1, 1):
        parts.lane(canvas, along, across - np.float32(sign * half * 0.55), 0.25, 5)
        parts.lane(canvas, along, across - np.float32(sign * half * 0.95), 0.25)
    if not bend:
        shift = float((canvas.axes(angle)[1] - across)[0, 0])
        points = []
        for _ in range(int(rng.integers(2, 6 + int(10 * setting.built)))):
            v = pick_lane(rng, half)
            points.append(parts.place_at(angle, between(rng, -0.6, 0.6) * canvas.extent, v + shift))
        parts.cars(canvas, rng, points, angle)
    if rng.random() < 0.5:
        parts.scattered_houses(canvas, rng, setting, int(rng.integers(2, 16)), _free(canvas))


def pick_lane(rng, half: float) -> float:
    return (1 if rng.random() < 0.5 else -1) * half * parts.pick(rng, (0.32, 0.75))


def _street_axis(rng, extent: float, low: float, high: float) -> list[float]:
    """Offsets of parallel streets across the image."""
    at, offsets = -0.75 * extent - between(rng, 0, high), []
    while at < 0.75 * extent + high:
        offsets.append(at)
        at += between(rng, low, high)
    return offsets


def residential(canvas: Canvas, rng, setting: Setting) -> None:
    parts.ground(canvas, rng, setting, between(rng, 0, 0.35))
    angle, extent = parts.turn(rng), canvas.extent
    u, v = canvas.axes(angle)
    streets = _street_axis(rng, extent, 42, 52)
    cross = _street_axis(rng, extent, 60, 130)
    grid = [np.abs(v - np.float32(at)) for at in streets] + [
        np.abs(u - np.float32(at)) for at in cross
    ]
    nearest = np.minimum.reduce(grid)
    if rng.random() < 0.4:
        parts.lot(canvas, rng, setting, between(rng, 0.15, 0.5))
    parts.grove(canvas, rng, setting, between(rng, -0.1, 0.9), 7)
    parts.road(canvas, rng, setting, nearest, between(rng, 2.6, 4.8))
    if rng.random() < 0.2:
        parts.pond(canvas, rng, setting)
    pitch, odds = between(rng, 17.5, 22), 0.6 + 0.42 * setting.built
    jitter = between(rng, 0, 0.25)
    for at in streets:
        for row in (at - 12.5, at + 12.5):
            for k in range(-int(0.75 * extent / pitch), int(0.75 * extent / pitch) + 1):
                along = k * pitch + between(rng, -1.5, 1.5)
                tilt = between(rng, -jitter, jitter) + (math.pi / 2 if rng.random() < 0.2 else 0)
                if rng.random() > odds or any(abs(along - c) < 12.5 for c in cross):
                    continue
                x, y = parts.place_at(angle, along, row + between(rng, -1, 1))
                if max(abs(x), abs(y)) < extent / 2 + 6:
                    parts.house(canvas, rng, setting, x, y, angle + tilt)
        spots = [
            parts.place_at(
                angle, between(rng, -0.7, 0.7) * extent, at + parts.pick(rng, (-1.4, 1.4))
            )
            for _ in range(int(rng.integers(0, 4)))
        ]
        parts.cars(canvas, rng, spots, angle)


def industrial(canvas: Canvas, rng, setting: Setting) -> None:
    parts.ground(canvas, rng, setting, between(rng, 0.1, 0.6))
    angle, extent = parts.turn(rng), canvas.extent
    parts.grove(canvas, rng, setting, between(rng, -0.3, 0.8), 5)
    u, v = canvas.axes(angle)
    streets = _street_axis(rng, extent, 52, 78)
    cross = _street_axis(rng, extent, 55, 95)
    grid = [np.abs(v - np.float32(at)) for at in streets] + [
        np.abs(u - np.float32(at)) for at in cross
    ]
    parts.road(canvas, rng, setting, np.minimum.reduce(grid), between(rng, 3.2, 4.6))
    for v0, v1 in zip(streets, streets[1:]):
        for u0, u1 in zip(cross, cross[1:]):
            x, y = parts.place_at(angle, (u0 + u1) / 2, (v0 + v1) / 2)
            if max(abs(x), abs(y)) < extent / 2 + 30:
                _yard(canvas, rng, setting, (x, y, angle), ((u1 - u0) / 2 - 7, (v1 - v0) / 2 - 7))


def _yard(canvas: Canvas, rng, setting: Setting, frame, half) -> None:
    """One industrial plot: a hall, two halls, tanks or a car park."""
    x, y, angle = frame
    a, b = half
    use = rng.random()
    if use > 0.88 or rng.random() < 0.45:
        tone = setting.concrete if rng.random() < 0.5 else setting.asphalt
        canvas.rectangle(x, y, angle, (a + 2, b + 2), tone, PAVED)
    if use < 0.42 + 0.2 * setting.built:
        size = (a * between(rng, 0.45, 0.95), b * between(rng, 0.4, 0.9))
        parts.hall(canvas, rng, setting, x, y, angle, size)
    elif use < 0.75:
        for side in (-1, 1):
            cx, cy = parts.place_at(angle, side * a * 0.5, 0, x, y)
            size = (a * between(rng, 0.28, 0.42), b * between(rng, 0.45, 0.9))
            parts.hall(canvas, rng, setting, cx, cy, angle, size)
    elif use < 0.88:
        radius = min(a, b) * between(rng, 0.3, 0.42)
        for k in range(max(1, int(a / radius / 1.25))):
            cx, cy = parts.place_at(
                angle, -a + radius + 2.5 * radius * k, between(rng, -2, 2), x, y
            )
            parts.tank(canvas, rng, cx, cy, radius)
    else:
        rows = int(b / 4)
        spots = [
            parts.place_at(angle, between(rng, -a, a), (r - rows / 2) * 6.5, x, y)
            for r in range(rows)
            for _ in range(int(a / 4))
        ]
        parts.cars(canvas, rng, spots[:24], angle + math.pi / 2)


def harbour(canvas: Canvas, rng, setting: Setting) -> None:
    _surroundings(canvas, rng, setting)
    angle, extent = between(rng, 0, 2 * math.pi), canvas.extent
    _, v = canvas.axes(angle)
    shore = between(rng, -0.22, 0.3) * extent
    parts.water(canvas, rng, setting, np.float32(shore) - v)
    quay = between(rng, 4, 20)
    paved = np.abs(v - np.float32(shore - quay / 2)) - np.float32(quay / 2)
    canvas.fill(paved, setting.concrete, PAVED)
    at = -0.7 * extent
    spacing = between(rng, 36, 60)
    while at < 0.7 * extent:
        if rng.random() < 0.85:
            frame = (angle, at, shore)
            _pier(canvas, rng, setting, frame, between(rng, 0.2, 0.45) * extent, 0.4 * spacing)
        at += spacing * between(rng, 0.8, 1.2)
    for k in range(-3, 4):
        if rng.random() < 0.35 + 0.4 * setting.built:
            half = (between(rng, 6, 11), between(rng, 4, 8))
            place = parts.place_at(angle, k * 27.0, shore - quay - half[1] - between(rng, 1, 8))
            if rng.random() < 0.75:
                parts.hall(canvas, rng, setting, *place, angle, half)
            else:
                parts.tank(canvas, rng, *place, min(half))


def _pier(canvas: Canvas, rng, setting: Setting, frame, length: float, room: float) -> None:
    """A pier from the quay with boats on both sides, each side at most `room` metres wide."""
    angle, at, shore = frame
    half = between(rng, 1.4, 2.8)
    x, y = parts.place_at(angle, at, shore + length / 2 - 1)
    canvas.rectangle(x, y, angle, (half, length / 2), setting.concrete, PAVED)
    size = min(between(rng, 9, 17), (room - half) / 1.08)
    gap, berth = size * 0.55, between(rng, 5, 20)
    while berth < length:
        for side in (-1, 1):
            if rng.random() < 0.45:
                place = parts.place_at(angle, at + side * (half + size * 0.58), shore + berth)
                heading = angle if side > 0 else angle + math.pi
                parts.boat(canvas, rng, *place, heading, size * between(rng, 0.8, 1.05))
        berth += gap * between(rng, 1.0, 2.2)


def airport(canvas: Canvas, rng, setting: Setting) -> None:
    _surroundings(canvas, rng, setting)
    angle, extent = between(rng, 0, 2 * math.pi), canvas.extent
    u, v = canvas.axes(angle)
    runway, half = between(rng, -0.36, -0.15) * extent, between(rng, 7, 14)
    canvas.fill(np.abs(v - np.float32(runway)) - half - between(rng, 2, 20), setting.grass, LOW)
    canvas.fill(np.abs(v - np.float32(runway)) - half, setting.asphalt, PAVED)
    parts.lane(canvas, u, v - np.float32(runway), 0.45, 7)
    for sign in (-1, 1):
        parts.lane(canvas, u, v - np.float32(runway + sign * half * 0.93), 0.3)
    apron = runway + half + between(rng, 12, 30)
    edge = np.float32(apron)
    depth = between(rng, 0.2, 0.5) * extent
    tone = setting.concrete if rng.random() < 0.6 else setting.asphalt
    canvas.fill(np.abs(v - edge - np.float32(depth / 2)) - np.float32(depth / 2), tone, PAVED)
    parts.lane(canvas, u, v - edge - 5, 0.3)
    middle, reach = np.float32((runway + apron) / 2), np.float32((apron - runway) / 2)
    link = np.abs(u - np.float32(between(rng, -0.35, 0.35) * extent)) - between(rng, 4, 6)
    canvas.fill(np.maximum(link, np.abs(v - middle) - reach), setting.asphalt, PAVED)
    for k in range(-2, 3):
        if rng.random() < 0.45:
            place = parts.place_at(angle, k * 45.0, apron + depth + between(rng, 14, 20))
            parts.hall(
                canvas, rng, setting, *place, angle, (between(rng, 9, 20), between(rng, 8, 12))
            )
    size = between(rng, 20, 32)
    at = -0.65 * extent + between(rng, 0, size)
    while at < 0.65 * extent:
        if rng.random() < 0.5 + 0.35 * setting.built:
            place = parts.place_at(
                angle, at, apron + 6 + size / 2 + between(rng, 0, max(depth - size * 0.9, 1))
            )
            heading = angle + math.pi / 2 + between(rng, -0.35, 0.35)
            parts.plane(canvas, rng, *place, heading, size * between(rng, 0.85, 1.1))
        at += size * between(rng, 1.1, 1.6)
    if rng.random() < 0.4:
        place = parts.place_at(angle, between(rng, -0.4, 0.4) * extent, runway)
        parts.plane(canvas, rng, *place, angle, size)


LAYOUTS = {
    "airport": airport,
    "farmland": farmland,
    "forest": forest,
    "harbour": harbour,
    "highway": highway,
    "industrial": industrial,
    "residential": residential,
    "river": river,
}
