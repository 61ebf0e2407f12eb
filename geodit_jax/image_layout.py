"""How a picture becomes image tokens: its canvas, its views, and what each token is made of.

A picture enters the model as one view, or as a squashed base view and the tiles of a canvas. Every
view gives g*g projected tokens. Image tokens are made of the rows of a *table*: those tokens, view
by view and row by row, and one newline vector behind them. Token t is the sum over k of
`weights[t,k] * table[rows[t,k]]`. Numpy only; sizes are (width, height) in pixels.

T image tokens, K table rows in one token (4 where a map is shrunk, else 1), g tokens per side of a
view. All arithmetic is the published one, rounding included: sizes in double precision in this
order of operations, sources of the bilinear filter in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from geodit_jax.config import GeoDiTConfig

Size = tuple[int, int]
MOST_TILES = 6  # per side of a canvas, where a config names no canvases
SHRINK_FROM = 1.1  # maps that are larger than the budget by less stay as they are


@dataclasses.dataclass(frozen=True)
class ImageLayout:
    """Views and tokens of one picture; `canvas` is None for a picture of one view."""

    num_views: int
    canvas: Size | None
    rows: np.ndarray
    """int32 [T,K]"""
    weights: np.ndarray
    """float32 [T,K]"""


# --------------------------------------------------------------------------------------- canvases
def pinpoints(config: GeoDiTConfig) -> tuple[Size, ...]:
    """Canvases a picture may take: those of the config, or all of 1..6 x 1..6 tiles, width outer.

    Raises ValueError for a canvas that is not a whole number of tiles.
    """
    side = _tower(config).image_size
    if not config.grid_pinpoints:
        tiles = range(1, MOST_TILES + 1)
        return tuple((side * i, side * j) for i in tiles for j in tiles)
    for width, height in config.grid_pinpoints:
        if min(width, height) < side or width % side or height % side:
            raise ValueError(
                f"grid_pinpoints holds the canvas {width}x{height}, which is not a whole number "
                f"of tiles of {side} pixels; use multiples of the tower's image_size"
            )
    return tuple((width, height) for width, height in config.grid_pinpoints)


def choose_canvas(size: Size, canvases: Sequence[Size]) -> Size:
    """The canvas that keeps most of the picture's pixels, then wastes least; the first one wins."""
    width, height = _checked(size)

    def rank(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return -kept, canvas[0] * canvas[1] - kept

    return min(canvases, key=rank)


# ----------------------------------------------------------------------------------------- layout
def lay_out(size: Size, config: GeoDiTConfig, slots: int | None = None) -> ImageLayout:
    """Views and tokens of a picture of `size`.

    slots: views in the array that holds the picture, unused ones included: the newline is row
    slots*g*g of the table. None: those of the largest picture (`max_views`).
    Raises ValueError when the picture has more views than slots, or no pixels.
    """
    canvas = _canvas(size, config)
    grid, num_views = _tower(config).grid, _count_views(canvas, config)
    slots = max_views(config) if slots is None else slots
    if num_views > slots:
        raise ValueError(
            f"a picture of {size[0]}x{size[1]} has {num_views} views, but there are {slots} "
            "slots; give the array more, or allow smaller canvases only"
        )
    newline = slots * grid * grid
    rows = np.arange(grid * grid)[:, None]
    weights = np.ones(rows.shape, np.float32)
    if canvas is None:
        if _ends_with_newline(config):
            rows, weights = _append(rows, weights, np.array([[newline]]), np.ones((1, 1)))
    elif config.merge == "flat":
        rows = np.arange(num_views * grid * grid)[:, None]
        weights = np.ones(rows.shape, np.float32)
    else:
        rows, weights = _append(rows, weights, *_lay_out_map(size, canvas, config, newline))
    return ImageLayout(num_views, canvas, rows.astype(np.int32), weights.astype(np.float32))


def count_tokens(size: Size, config: GeoDiTConfig) -> int:
    """Image tokens of a picture of `size`, without making them."""
    grid = _tower(config).grid
    canvas = _canvas(size, config)
    if canvas is None:
        return grid * grid + _ends_with_newline(config)
    if config.merge == "spatial_unpad":
        top, bottom, left, right = _crop(size, canvas, config)
        return grid * grid + _count_cells(bottom - top, right - left, config)
    return grid * grid * _count_views(canvas, config)


def max_views(config: GeoDiTConfig) -> int:
    """Views of the picture that has most."""
    if config.image_mode != "anyres":
        return 1
    return max(_count_views(canvas, config) for canvas in pinpoints(config))


def max_image_tokens(config: GeoDiTConfig) -> int:
    """Image tokens that no picture exceeds: the largest count over all ways to crop a canvas."""
    grid = _tower(config).grid
    if config.image_mode != "anyres":
        return grid * grid + _ends_with_newline(config)
    if config.merge != "spatial_unpad":
        return grid * grid * max_views(config)
    cells = 0
    for width, height in _maps(config):
        crops = [(h, width) for h in range(height + 1)] + [(height, w) for w in range(width + 1)]
        cells = max(cells, *(_count_cells(*crop, config) for crop in crops))
    return grid * grid + cells


def max_rows_per_token(config: GeoDiTConfig) -> int:
    """K that every layout of this config fits: 4 where some map is shrunk, else 1."""
    if config.image_mode != "anyres" or config.merge != "spatial_unpad":
        return 1
    return 4 if any(_shrunk(height, width, config) for width, height in _maps(config)) else 1


# --------------------------------------------------------------------------------- the map of tiles
def _lay_out_map(size: Size, canvas: Size, config: GeoDiTConfig, newline: int):
    """Rows and weights of the tokens behind the base view: the tiles joined to one map."""
    grid = _tower(config).grid
    columns, lines = _map_size(canvas, config)
    y, x = np.mgrid[:lines, :columns]
    view = 1 + y // grid * (columns // grid) + x // grid
    table = (view * grid + y % grid) * grid + x % grid
    if config.merge == "spatial":
        return table.reshape(-1, 1), np.ones((table.size, 1))
    top, bottom, left, right = _crop(size, canvas, config)
    table = table[top:bottom, left:right]
    target = _shrunk(*table.shape, config)
    if target:
        rows, weights = _shrink(table, target)
    else:
        rows, weights = table[..., None], np.ones((*table.shape, 1), np.float32)
    lines, _, taps = rows.shape
    end = np.eye(1, taps).repeat(lines, 0)[:, None]  # the newline alone
    rows = np.concatenate([rows, np.full((lines, 1, taps), newline)], axis=1)
    weights = np.concatenate([weights, end], axis=1)
    return rows.reshape(-1, taps), weights.reshape(-1, taps)


def _crop(size: Size, canvas: Size, config: GeoDiTConfig) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the part of the map that the picture covers.

    An odd slack leaves one line too many, as published.
    """
    width, height = size
    columns, lines = _map_size(canvas, config)
    if width / height > columns / lines:
        margin = (lines - int(height * (columns / width))) // 2
        return margin, lines - margin, 0, columns
    margin = (columns - int(width * (lines / height))) // 2
    return 0, lines, margin, columns - margin


def _shrunk(lines: int, columns: int, config: GeoDiTConfig) -> tuple[int, int] | None:
    """(lines, columns) of a map too large for the budget; None where it stays as it is."""
    budget = config.max_tiles * _tower(config).grid ** 2
    if not budget:
        return None
    ratio = math.sqrt(lines * columns / budget)
    # Floor division of doubles, not int(lines / ratio): they differ where the quotient is whole.
    return (int(lines // ratio), int(columns // ratio)) if ratio > SHRINK_FROM else None


def _shrink(table: np.ndarray, target: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """[h,w] table rows -> rows and weights [H,W,4]: bilinear, neither corners nor antialiasing."""
    (above, below, down), (before, behind, across) = map(_sources, table.shape, target)
    corners = [table[np.ix_(y, x)] for y in (above, below) for x in (before, behind)]
    parts = [np.outer(y, x) for y in (1 - down, down) for x in (1 - across, across)]
    return np.stack(corners, axis=-1), np.stack(parts, axis=-1)


def _sources(size: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `count` targets on an axis of `size`: its two neighbours and its way between."""
    scale = np.float64(np.float32(size) / np.float32(count))
    # The product is exact in double precision: one rounding, as the fused instruction has.
    at = (scale * (np.arange(count) + 0.5) - 0.5).astype(np.float32)
    at = np.maximum(at, np.float32(0))
    low = at.astype(np.int64)
    return low, np.minimum(low + 1, size - 1), at - low.astype(np.float32)


# ---------------------------------------------------------------------------------------- counting
def _append(rows, weights, more_rows, more_weights):
    """Joins two lists of tokens; the one with fewer rows in a token gets rows of weight 0."""
    taps = max(rows.shape[1], more_rows.shape[1])

    def widen(part):
        return np.pad(part, ((0, 0), (0, taps - part.shape[1])))

    rows = np.concatenate([widen(rows), widen(more_rows)])
    return rows, np.concatenate([widen(weights), widen(more_weights)])


def _tower(config: GeoDiTConfig):
    if config.tower is None:
        raise ValueError("this model is text only (tower=None): it takes no pictures")
    return config.tower


def _checked(size: Size) -> Size:
    if min(size) < 1:
        raise ValueError(f"a picture of {size[0]}x{size[1]} has no pixels")
    return size


def _canvas(size: Size, config: GeoDiTConfig) -> Size | None:
    size = _checked(size)
    return choose_canvas(size, pinpoints(config)) if config.image_mode == "anyres" else None


def _map_size(canvas: Size, config: GeoDiTConfig) -> Size:
    """(columns, lines) of tokens on a canvas."""
    tower = _tower(config)
    return tuple(part // tower.image_size * tower.grid for part in canvas)


def _maps(config: GeoDiTConfig) -> list[Size]:
    return [_map_size(canvas, config) for canvas in pinpoints(config)]


def _count_views(canvas: Size | None, config: GeoDiTConfig) -> int:
    if canvas is None:
        return 1
    side = _tower(config).image_size
    return 1 + canvas[0] // side * (canvas[1] // side)


def _count_cells(lines: int, columns: int, config: GeoDiTConfig) -> int:
    """Tokens of a map, newlines included."""
    lines, columns = _shrunk(lines, columns, config) or (lines, columns)
    return lines * (columns + 1)


def _ends_with_newline(config: GeoDiTConfig) -> bool:
    return config.merge == "spatial_unpad" and config.newline_on_single
