"""Boxes of any notation become corners in pixels, inside the frame, or are refused."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

BOX_FORMATS = ("pixel", "xywh", "unit", "unit2", "int100", "int1000")
"""pixel: corners; xywh: corner, width, height; unit, int100, int1000: corners as parts of 1, 100,
1000 of width and height; unit2: parts of the side of the square the picture is padded to."""

Box = tuple[float, float, float, float]
TOLERANCE = 1.0
"""Pixels a box may reach beyond the frame before it counts as wrong: conventions differ by one."""


class RecordError(ValueError):
    """A record that cannot be used. The message says where it is, what was found, what to do."""


def to_pixels(box: Sequence[float], box_format: str, size: tuple[int, int] | None) -> Box:
    """Corners in pixels from a box of any of BOX_FORMATS; size (width, height) of the picture.

    Raises RecordError on another number of values, on one that is no number, or no known format.
    """
    try:
        a, b, c, d = map(float, box)
    except (TypeError, ValueError):
        raise RecordError(f"box {box!r:.80}: need four numbers x0, y0, x1, y1") from None
    if not all(map(math.isfinite, (a, b, c, d))):
        raise RecordError(f"box {box!r:.80}: holds a number that is not finite")
    if box_format == "pixel":
        return a, b, c, d
    if box_format == "xywh":
        return a, b, a + c, b + d
    if box_format not in BOX_FORMATS:
        raise RecordError(f"box_format '{box_format}' is none of {', '.join(BOX_FORMATS)}")
    if size is None:
        raise RecordError(f"a box of format {box_format} needs the size of its picture")
    width, height = size
    if box_format == "unit2":
        side = max(width, height)
        left, top = (side - width) // 2, (side - height) // 2
        return a * side - left, b * side - top, c * side - left, d * side - top
    parts = {"unit": 1, "int100": 100, "int1000": 1000}[box_format]
    return a * width / parts, b * height / parts, c * width / parts, d * height / parts


def settle_box(box: Box, size: tuple[int, int] | None, fix: bool, counts: Counter) -> Box:
    """The box with ordered corners inside the frame. What was changed is counted.

    Raises RecordError on a box reversed, beyond the frame or without area unless `fix`, and on one
    that lies outside altogether.
    """
    x0, y0, x1, y1 = box
    width, height = size or (math.inf, math.inf)
    ordered = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
    if ordered != box:
        _allow(fix, f"box {box}: corners are reversed")
        counts["box reversed"] += 1
    x0, y0, x1, y1 = ordered
    beyond = max(-x0, -y0, x1 - width, y1 - height)
    if x0 > width or y0 > height or x1 < 0 or y1 < 0:
        raise RecordError(f"box {box} lies outside its picture of {width}x{height} pixels")
    if beyond > 0:
        if beyond > TOLERANCE:
            _allow(fix, f"box {box} reaches beyond its picture of {width}x{height} pixels")
            counts["box cut at the frame"] += 1
        x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height)
    if x1 <= x0 or y1 <= y0:
        _allow(fix, f"box {box} has no area")
        counts["box widened to a pixel"] += 1
        x0, x1 = _widen(x0, x1, width)
        y0, y1 = _widen(y0, y1, height)
    return float(x0), float(y0), float(x1), float(y1)


def _allow(fix: bool, problem: str) -> None:
    if not fix:
        raise RecordError(f"{problem}; correct it, or set boxes=fix")


def _widen(low: float, high: float, end: float) -> tuple[float, float]:
    if high > low:
        return low, high
    low = max(0.0, min(low - 0.5, end - 1))
    return low, low + 1
