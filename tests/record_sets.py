"""Small sets in the formats of published ones, written by the tests that read them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def draw(path: Path, size: tuple[int, int] = (40, 30), seed: int = 0) -> Path:
    """A picture of random pixels, (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_whole(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path
