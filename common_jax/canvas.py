"""Canvases: PNG files without a display, tile sheets at exact pixels, colours all can tell apart.

Nothing here touches matplotlib's global state: figures are objects with an Agg canvas of their own,
so they may be drawn from any thread and on machines without a screen. Files are written atomically
and the same input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image

from common_jax.files import atomic_path

DPI = 120
MARGIN, GAP = 12, 6  # pixels around a sheet and between its tiles
MAX_PIXELS = 4000  # longest side of a sheet
LINE = 22  # pixels of one line of text on a sheet
FONT = 8.5  # points

# Okabe and Ito (2008): eight colours that differ for every common kind of colour vision.
OKABE_ITO = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (0, 0, 0),
)

Legend = Sequence[tuple[np.ndarray, str]]


def class_colours(count: int) -> np.ndarray:
    """uint8 [count, 3]: eight base colours, then lighter and darker ones; 22 in all, repeating."""
    base = np.array(OKABE_ITO, np.float64)
    lighter, darker = base[:7] * 0.45 + 255 * 0.55, base[:7] * 0.5
    table = np.concatenate([base, lighter, darker]).round().astype(np.uint8)
    return table[np.arange(count) % len(table)]


def colour_table(name: str, values: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] of a matplotlib colour map for values in [0, 1]."""
    colours = matplotlib.colormaps[name](np.asarray(values, np.float64), bytes=True)
    return np.asarray(colours)[..., :3]


def plain(text) -> str:
    """Text that matplotlib draws as it is: no formula between dollars, no hidden legend entry."""
    text = " ".join(str(text).split()).replace("$", r"\$")
    return "\N{HAIR SPACE}" + text if text.startswith("_") else text


def shorten(text, limit: int) -> str:
    """At most `limit` characters, with an ellipsis where text was cut."""
    text = str(text)
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def new_figure(width: float, height: float, *, layout: str | None = "constrained") -> Figure:
    """A figure of width x height inches with its own Agg canvas."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    if layout == "constrained":
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure


def write_png(figure: Figure, path) -> Path:
    """Draws the figure into `path` in one step; returns the path."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are written as PNG; end the name in .png")
    with atomic_path(path) as partial:
        figure.canvas.print_png(str(partial), metadata={"Software": None})
    return path


def check_images(images, name: str = "images") -> np.ndarray:
    """Returns uint8 [N, H, W, 3]; ValueError says what came instead."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"{name} have shape {images.shape}; give [N, H, W, 3] with N >= 1")
    if images.dtype != np.uint8:
        raise ValueError(f"{name} have dtype {images.dtype}; give uint8 in 0..255")
    return images


def check_match(found, expected, what: str) -> None:
    """Raises ValueError when two sizes that must agree do not."""
    if found != expected:
        raise ValueError(f"{what}: found {found}, expected {expected}")


def tile_size(height: int, width: int, *, smallest: int = 160, largest: int = 256):
    """(height, width) on the sheet: whole multiples for small pictures, reduced for large ones."""
    longest = max(height, width)
    if longest > largest:
        return (
            max(1, round(height * largest / longest)),
            max(1, round(width * largest / longest)),
        )
    factor = max(1, smallest // longest)
    return height * factor, width * factor


def resize_tile(picture: np.ndarray, size: tuple[int, int], *, average: bool = False) -> np.ndarray:
    """uint8 [h, w, 3] or [h, w] at `size` (height, width): nearest, or box means if `average`.

    Whole multiples copy every pixel, so what is seen is what is stored.
    """
    if picture.shape[:2] == tuple(size):
        return picture
    reduces = size[0] < picture.shape[0] or size[1] < picture.shape[1]
    method = Image.Resampling.BOX if average and reduces else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), method))


def swatch(colour, width: int = 14) -> np.ndarray:
    """Legend mark of one colour, uint8 [14, width, 3]."""
    return np.broadcast_to(np.asarray(colour, np.uint8), (14, width, 3))


def save_sheet(tiles, path, *, title="", headings=None, captions=None, legend: Legend = ()):
    """Writes uint8 tiles [R, C, h, w, 3] as one picture with their pixels unchanged.

    headings: C texts above the columns. captions: [R][C] texts under the tiles (None or "": none).
    legend: (uint8 mark [14, w, 3], text) pairs, flowed under the tiles. Texts too long for their
    place are cut with an ellipsis. Tile (0, 0) starts at column MARGIN, below title and headings
    (LINE pixels each, where given).
    """
    rows, columns, height, width = tiles.shape[:4]
    pitch = width + GAP
    line = LINE if captions is not None else 0
    measure = _Ruler()
    inner = max(columns * pitch - GAP, 330, min(measure(title), 1200))
    marks = _flow(legend, inner, measure)
    top = MARGIN + LINE * bool(title) + LINE * (headings is not None)
    bottom = top + rows * (height + line + GAP)
    marks_height = LINE * (1 + marks[-1][1]) if marks else 0
    sheet = np.full((bottom + marks_height + MARGIN, inner + 2 * MARGIN, 3), 255, np.uint8)
    texts = [(MARGIN, MARGIN, measure.fit(title, inner), "left")]
    centres = [MARGIN + c * pitch + width // 2 for c in range(columns)]
    for text, x in zip(headings or (), centres):
        texts.append((x, top - LINE, measure.fit(text, pitch), "center"))
    for r in range(rows):
        y = top + r * (height + line + GAP)
        for c, x in enumerate(centres):
            left = MARGIN + c * pitch
            sheet[y : y + height, left : left + width] = tiles[r, c]
            if captions is not None:
                text = measure.fit(captions[r][c] or "", pitch)
                texts.append((x, y + height, text, "center"))
    for (mark, text), (x, row) in zip(legend, marks):
        y = bottom + row * LINE
        sheet[y + 4 : y + 4 + len(mark), MARGIN + x : MARGIN + x + mark.shape[1]] = mark
        texts.append((MARGIN + x + mark.shape[1] + 5, y, measure.fit(text, inner), "left"))
    return _print_sheet(sheet, texts, path)


def _flow(legend: Legend, width: int, measure: _Ruler) -> list[tuple[int, int]]:
    """(x, row) of each legend entry, left to right, then on the next line."""
    places, x, row = [], 0, 0
    for mark, text in legend:
        need = mark.shape[1] + 5 + min(measure(text), width)
        if x and x + need > width:
            x, row = 0, row + 1
        places.append((x, row))
        x += need + 16
    return places


def _print_sheet(sheet: np.ndarray, texts, path) -> Path:
    height, width = sheet.shape[:2]
    # The added thousandth keeps the pixel count when inches are turned back into pixels.
    figure = new_figure((width + 1e-3) / DPI, (height + 1e-3) / DPI, layout=None)
    figure.figimage(sheet, 0, 0, origin="upper")
    for x, y, text, align in texts:
        if text:
            place = (x / width, 1 - (y + LINE / 2) / height)
            figure.text(*place, plain(text), ha=align, va="center_baseline", fontsize=FONT)
    return write_png(figure, path)


class _Ruler:
    """Widths of texts in pixels as they will be drawn."""

    def __init__(self):
        self._renderer = new_figure(1, 1, layout=None).canvas.get_renderer()
        self._font = FontProperties(size=FONT)

    def __call__(self, text: str) -> int:
        if not text:
            return 0
        return int(self._renderer.get_text_width_height_descent(text, self._font, False)[0]) + 1

    def fit(self, text: str, width: int) -> str:
        text = str(text)
        while len(text) > 1 and self(text) > width:
            text = text.rstrip("…")[:-1].rstrip() + "…"
        return text
