"""Boxes as text: four notations, three ways to write a list, and a parser that never fails.

A notation says what the numbers mean: `unit2` parts of the square that the picture is padded to,
two decimals (MMRS-1M); `int100` and `int1000` hundredths and thousandths of width and height
(GeoChat and VRSBench; RSThinker and VHM); `pixel` pixels. Boxes are corners x0, y0, x1, y1 in
pixels of a picture of size (width, height). numpy only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

CODECS = ("unit2", "int100", "int1000", "pixel")
STYLES = ("brackets", "lists", "angles")
RANGES = {"unit2": 1, "int100": 100, "int1000": 1000}
"""The number at the far edge; `pixel` has the size of the picture instead."""

# Bounded repeats, and no start within a number: linear time on any text.
_NUMBER = r"(?<![0-9.])([-+]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20}))(?![0-9])"
_GAP = r"\s{0,3}"
_COMMA = rf"{_GAP},{_GAP}"
_POINT = rf"[(\[]{_GAP}{_NUMBER}{_COMMA}{_NUMBER}{_GAP}[)\]]"
_ANGLE = rf"<{_GAP}{_NUMBER}{_GAP}>"
BOX = re.compile(
    "|".join(
        (
            r"[\s,]{0,3}".join([_ANGLE] * 4),  # {<x0><y0><x1><y1>}, an angle behind is not read
            rf"{_POINT}[\s,]{{0,3}}{_POINT}",  # (x0,y0),(x1,y1)
            _COMMA.join([_NUMBER] * 4),  # [x0,y0,x1,y1;...] and [[x0,y0,x1,y1],...]
            rf"\[{_GAP}" + r"\s{1,3}".join([_NUMBER] * 4) + rf"{_GAP}\]",  # [x0 y0 x1 y1]
        )
    )
)


def format_boxes(
    boxes: Sequence[Sequence[float]],
    size: tuple[int, int],
    codec: str,
    style: str = "brackets",
) -> str:
    """Text of boxes [n,4]; reversed corners are sorted, parts outside the picture cut off.

    style: `brackets` [a,b,c,d;a,b,c,d] (MMRS-1M), `lists` [[a,b,c,d],[a,b,c,d]] (RSThinker),
    `angles` {<a><b><c><d>}{<a><b><c><d>} (GeoChat, VRSBench). Numbers are rounded to the notation's
    step. Raises ValueError on unknown names, a size without pixels, or boxes that are not four
    finite numbers each.
    """
    _check(size, codec)
    if style not in STYLES:
        raise ValueError(f"style={style!r} of boxes: use one of {STYLES}")
    corners = _read_corners(boxes)
    numbers = _scale(_settle(corners, size), size, codec)
    if codec == "unit2":
        texts = [[f"{value:.2f}" for value in box] for box in numbers]
    else:
        texts = [[str(int(np.rint(value))) for value in box] for box in numbers]
    if style == "angles":
        return "".join("{" + "".join(f"<{value}>" for value in box) + "}" for box in texts)
    joined = [",".join(box) for box in texts]
    if style == "lists":
        return "[" + ",".join(f"[{box}]" for box in joined) + "]"
    return "[" + ";".join(joined) + "]"


def parse_boxes(text: str, size: tuple[int, int], codec: str | None = None) -> np.ndarray:
    """float64 [n,4] pixels: every group of four numbers in `text` that looks like a box, in order.

    Any style is read, whatever surrounds it; corners are sorted and cut at the frame. Text without
    boxes gives [0,4]; no text raises. codec: the range of the numbers; None guesses it from them
    (see `guess_codec`). Raises ValueError on an unknown codec or a size without pixels.
    """
    _check(size, codec or "pixel")
    found = list(BOX.finditer(text)) if isinstance(text, str) else []
    words = [[word for word in match.groups() if word is not None] for match in found]
    numbers = np.array([[float(word) for word in four] for four in words]).reshape(-1, 4)
    codec = codec or guess_codec(numbers)
    return _settle(_unscale(numbers, size, codec), size)


def guess_codec(numbers: np.ndarray) -> str:
    """The finest notation whose range holds all numbers: up to 1, 100, 1000, else pixels.

    Pixels of pictures up to 1000 look like thousandths, and small ones like hundredths: where the
    notation is known, name it.
    """
    largest = np.max(numbers, initial=0.0)
    return next((codec for codec, limit in RANGES.items() if largest <= limit), "pixel")


def count_objects(label: str, number: int) -> str:
    """`13 ships`, `1 ship`, `no ships`."""
    return f"{number or 'no'} {label if number == 1 else pluralise(label)}"


def pluralise(label: str) -> str:
    """Regular English plural; words that end like plurals stay as they are."""
    if re.search(r"(s|x|z|ch|sh)$", label):
        return label if re.search(r"[^su]s$", label) else f"{label}es"
    return re.sub(r"(?<=[^aeiou])y$", "ie", label) + "s" if label else label


# ---------------------------------------------------------------------------------------- numbers
def _check(size: tuple[int, int], codec: str) -> None:
    if codec not in CODECS:
        raise ValueError(f"codec={codec!r} of boxes: use one of {CODECS}")
    if size is None or len(size) != 2 or min(size) < 1:
        raise ValueError(f"size={size}: boxes need the (width, height) of their picture in pixels")


def _read_corners(boxes) -> np.ndarray:
    try:
        corners = np.array([list(box) for box in boxes], np.float64).reshape(-1, 4)
    except (TypeError, ValueError):
        raise ValueError(f"boxes must be [n,4] numbers x0, y0, x1, y1; found {boxes}") from None
    if len(corners) != len(boxes) or not np.isfinite(corners).all():
        raise ValueError(f"boxes must be [n,4] finite numbers x0, y0, x1, y1; found {boxes}")
    return corners


def _frame(size: tuple[int, int], codec: str) -> tuple[np.ndarray, np.ndarray]:
    """(offset, pixels of the whole range) of x0, y0, x1, y1."""
    width, height = size
    if codec != "unit2":
        return np.zeros(4), np.array([width, height] * 2, np.float64)
    side = max(size)
    left, top = (side - width) // 2, (side - height) // 2
    return np.array([left, top] * 2, np.float64), np.full(4, side, np.float64)


def _scale(corners: np.ndarray, size: tuple[int, int], codec: str) -> np.ndarray:
    if codec == "pixel":
        return corners
    offset, whole = _frame(size, codec)
    return (corners + offset) / whole * RANGES[codec]


def _unscale(numbers: np.ndarray, size: tuple[int, int], codec: str) -> np.ndarray:
    if codec == "pixel":
        return numbers
    offset, whole = _frame(size, codec)
    return numbers / RANGES[codec] * whole - offset


def _settle(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Corners sorted and within the picture."""
    low = np.minimum(corners[:, :2], corners[:, 2:])
    high = np.maximum(corners[:, :2], corners[:, 2:])
    ordered = np.concatenate([low, high], axis=1)
    return np.clip(ordered, 0, np.array([*size, *size], np.float64))
