"""Charts any task may want: grids of pictures, confusion matrices, heat maps, bars, curves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import Normalize, PowerNorm, TwoSlopeNorm
from matplotlib.patches import Rectangle

from common_jax.canvas import (
    GAP,
    MAX_PIXELS,
    OKABE_ITO,
    check_images,
    check_match,
    new_figure,
    plain,
    resize_tile,
    save_sheet,
    shorten,
    tile_size,
    write_png,
)

MAX_TILES = 64
MAX_BARS = 60
MAX_CURVES = 16
NUMBERED_CLASSES = 25  # confusion matrices up to this size show their counts
SMALL, TEXT = 7.5, 9.0  # points
# Blue first; yellow, faint on white, last.
COLOURS = [tuple(np.array(OKABE_ITO[i]) / 255) for i in (4, 0, 2, 5, 6, 1, 7, 3)]
MISSING = "#d0d0d0"


def save_grid(images, path, *, columns: int | None = None, titles=None) -> Path:
    """Pictures uint8 [N, H, W, 3] side by side, `titles` (N texts) under them.

    Small pictures are shown at whole multiples of their size, those above 256 pixels reduced. More
    than MAX_TILES are cut; the title of the sheet then says how many there were.
    """
    images = check_images(images)
    total = len(images)
    if titles is not None:
        check_match(len(titles), total, "number of titles for the images")
    if columns is not None and columns < 1:
        raise ValueError(f"columns is {columns}; give 1 or more, or None")
    images = images[:MAX_TILES]
    size = tile_size(*images.shape[1:3])
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    columns = max(1, min(columns, MAX_PIXELS // (size[1] + GAP)))
    rows = math.ceil(len(images) / columns)
    tiles = np.full((rows, columns, *size, 3), 255, np.uint8)
    captions = [[""] * columns for _ in range(rows)]
    for i, image in enumerate(images):
        tiles[i // columns, i % columns] = resize_tile(image, size, average=True)
        captions[i // columns][i % columns] = "" if titles is None else titles[i]
    return save_sheet(
        tiles,
        path,
        title=count_shown(len(images), total),
        captions=None if titles is None else captions,
    )


def count_shown(shown: int, total: int, what: str = "images") -> str:
    """'first 64 of 200 images', or nothing when all are shown."""
    return "" if shown == total else f"first {shown} of {total} {what}"


def save_confusion(counts, classes: Sequence[str], path) -> Path:
    """Confusion counts [K, K], rows = label, columns = prediction.

    Colour is the share of the row; rows without an example are grey. Counts are written up to
    NUMBERED_CLASSES classes.
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ValueError(f"counts have shape {counts.shape}; give [K, K] with rows = label")
    if not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0:
        raise ValueError(f"counts must be integers >= 0; found dtype {counts.dtype}")
    k = len(counts)
    check_match(len(classes), k, "number of class names for the counts")
    support = counts.sum(1, keepdims=True)
    shares = np.where(support > 0, counts / np.maximum(support, 1), np.nan)
    numbered = k <= NUMBERED_CLASSES
    side = 2.6 + (0.46 * k if numbered else min(0.2 * k, 18.0))
    figure = new_figure(max(side + 0.6, 4.2), max(side, 3.6))
    axes = figure.add_subplot()
    # The root makes confusions of a few per cent visible.
    drawn = _draw_cells(axes, shares, "Blues", PowerNorm(0.5, 0, 1))
    step = math.ceil(k / 90)
    names = [plain(shorten(name, 24)) for name in classes][::step]
    axes.set_xticks(range(0, k, step), names, rotation=90, fontsize=SMALL)
    axes.set_yticks(range(0, k, step), names, fontsize=SMALL)
    axes.set_xlabel("prediction", fontsize=TEXT)
    axes.set_ylabel("label", fontsize=TEXT)
    axes.set_aspect("equal")
    if numbered:
        _write_numbers(axes, drawn, [[_short_count(n) for n in row] for row in counts.tolist()])
    correct = int(np.trace(counts))
    rate = f"{correct / counts.sum():.1%}" if counts.sum() else "none"
    axes.set_title(f"{rate} of {int(counts.sum()):,} correct", fontsize=TEXT)
    _add_bar(figure, drawn, axes, "share of the label", shrink=0.8)
    return write_png(figure, path)


def _short_count(count: int) -> str:
    """At most five characters, so that counts of pixels fit a cell; nothing for 0."""
    if count < 10_000:
        return str(count) if count else ""
    unit = min(int(math.log10(count) // 3), 4)
    value = count / 1000**unit
    return f"{value:.1f}"[: 3 if value < 10 else -2] + " kMGT"[unit]


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """Labels of a heat map of values [R, C].

    groups: (text, rows) of consecutive rows, written at the right. number: format of the cell
    texts. centre: value drawn white, larger and smaller ones in two hues; None: one dark to light
    scale. mark_best outlines the largest value.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    bar: str
    xlabel: str = ""
    title: str = ""
    groups: Sequence[tuple[str, int]] = ()
    number: str = ".1f"
    centre: float | None = None
    mark_best: bool = False


def save_heat_map(values, labels: HeatMap, path) -> Path:
    """Writes values [R, C] (NaN: not measured, grey) with numbers where they fit."""
    values = np.asarray(values, np.float64)
    check_match(values.shape, (len(labels.rows), len(labels.columns)), "shape of the heat map")
    if labels.groups:
        check_match(sum(n for _, n in labels.groups), len(values), "rows in the groups")
    rows, columns = values.shape
    numbered = columns <= 24 and rows <= 80
    width = 3.4 + (0.58 if numbered else 0.2) * columns
    figure = new_figure(min(max(width, 4.4), 20), min(1.5 + 0.27 * rows, 30))
    axes = figure.add_subplot()
    if labels.centre is None:
        drawn = _draw_cells(axes, values, "cividis", _span(values))
    else:
        drawn = _draw_cells(axes, values, "PuOr_r", _centred(values, labels.centre))
    step = 1 if numbered else math.ceil(columns / 40)
    ticks = [str(text) for text in labels.columns][::step]
    axes.set_xticks(range(0, columns, step), ticks, fontsize=SMALL)
    axes.set_yticks(range(rows), [plain(t) for t in labels.rows], fontsize=SMALL)
    axes.set_xlabel(labels.xlabel, fontsize=TEXT)
    axes.set_title(plain(labels.title), fontsize=TEXT)
    if numbered:
        text = [[format(v, labels.number) if np.isfinite(v) else "" for v in r] for r in values]
        _write_numbers(axes, drawn, text)
    if labels.mark_best and np.isfinite(values).any():
        row, column = np.unravel_index(np.nanargmax(values), values.shape)
        box = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec="#d55e00", lw=2.5, zorder=5)
        axes.add_patch(box)
    _draw_groups(axes, labels.groups)
    _add_bar(figure, drawn, axes, labels.bar)
    return write_png(figure, path)


def _span(values) -> Normalize:
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    return Normalize(low, high if high > low else low + 1e-6)


def _centred(values, centre: float) -> TwoSlopeNorm:
    """Symmetric around the centre and never below 0; an even map stays white."""
    finite = values[np.isfinite(values)]
    reach = max(np.abs(finite - centre).max() if finite.size else 0.0, 0.1 * centre)
    return TwoSlopeNorm(centre, vmin=max(0.0, centre - reach), vmax=centre + reach)


def _draw_cells(axes, values, colours: str, norm):
    table = matplotlib.colormaps[colours].with_extremes(bad=MISSING)
    drawn = axes.imshow(values, cmap=table, norm=norm, aspect="auto", interpolation="nearest")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return drawn


def _write_numbers(axes, drawn, texts) -> None:
    colours = drawn.cmap(drawn.norm(drawn.get_array()))[..., :3]
    dark = colours @ np.array([0.299, 0.587, 0.114]) < 0.5
    for (row, column), is_dark in np.ndenumerate(dark):
        shade = "white" if is_dark else "black"
        text = texts[row][column]
        axes.text(column, row, text, ha="center", va="center", fontsize=SMALL, color=shade)


def _draw_groups(axes, groups) -> None:
    start = -0.5
    for text, count in groups:
        if start > 0:
            axes.axhline(start, color="white", lw=4)
        axes.annotate(
            plain(text),
            (1, start + count / 2),
            (7, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
        )
        start += count


def _add_bar(figure, drawn, axes, label: str, shrink: float = 1.0) -> None:
    bar = figure.colorbar(drawn, ax=axes, shrink=shrink, aspect=30, pad=0.02)
    bar.set_label(plain(label), fontsize=TEXT)
    bar.ax.tick_params(labelsize=SMALL)
    bar.outline.set_visible(False)


def save_bars(rows, path, *, xlabel: str = "", title: str = "") -> Path:
    """Horizontal bars: rows of (name, value, low, high), top to bottom in the order given.

    low and high are ends of the error bar (not lengths), both None for none. At most MAX_BARS rows
    are drawn; the title says so when there were more.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("no bars to draw: rows is empty")
    for row in rows:
        _check_bar(row)
    total, rows = len(rows), rows[:MAX_BARS]
    names = [plain(shorten(row[0], 40)) for row in rows]
    values = np.array([row[1] for row in rows], np.float64)
    ends = [(v, v) if low is None else (low, high) for _, v, low, high in rows]
    errors = np.abs(np.array(ends, np.float64).T - values)
    figure = new_figure(7.0, 1.1 + 0.32 * len(rows))
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    axes.barh(places, values, height=0.66, color=COLOURS[5])
    for place, error in zip(places, errors.T):
        if error.any():
            bar = error[:, None]
            axes.errorbar(values[place], place, xerr=bar, fmt="none", ecolor="black", capsize=3)
    lowest, highest = min(0.0, np.min(ends)), max(0.0, np.max(ends))
    reach = (highest - lowest) or 1.0
    number = number_format(values)
    for place, value, (_, high) in zip(places, values, ends):
        side = max(high, 0.0) + 0.015 * reach
        axes.text(side, place, format(value, number), va="center", fontsize=SMALL)
    axes.set_xlim(lowest - 0.03 * reach * (lowest < 0), highest + 0.13 * reach)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(places, names, fontsize=TEXT)
    axes.set_xlabel(plain(xlabel), fontsize=TEXT)
    axes.set_title(plain(_join(title, count_shown(len(rows), total, "rows"))), fontsize=TEXT)
    _trim_axes(axes, grid="x")
    axes.tick_params(axis="y", length=0)
    return write_png(figure, path)


def number_format(values) -> str:
    """Format that shows about three digits of the largest value: .3f for rates, .1f for percent."""
    largest = np.nanmax(np.abs(values)) if np.isfinite(values).any() else 1.0
    return ".3f" if largest <= 2 else ".1f" if largest < 1000 else ".0f"


def _check_bar(row) -> None:
    if len(row) != 4:
        raise ValueError(f"bar {row!r} has {len(row)} entries; give (name, value, low, high)")
    name, value, low, high = row
    if not math.isfinite(value) or (low is None) != (high is None):
        raise ValueError(
            f"bar {name!r}: value {value} must be finite, low {low} and high {high} numbers or None"
        )
    if low is not None and not low <= value <= high:
        raise ValueError(f"bar {name!r}: value {value} is not between low {low} and high {high}")


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _trim_axes(axes, grid: str) -> None:
    axes.grid(axis=grid, color="#e0e0e0", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL if grid != "x" else TEXT)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save_curves(series: Mapping[str, tuple], path, ylabel: str, *, xlabel: str = "step") -> Path:
    """Lines over steps: {name: (steps [n], values [n])}; NaN leaves a gap.

    Beyond eight lines the dash changes with the colours; at most MAX_CURVES are drawn.
    """
    if not series:
        raise ValueError("no curves to draw: series is empty")
    figure = new_figure(7.2, 4.2)
    axes = figure.add_subplot()
    for i, (name, (steps, values)) in enumerate(list(series.items())[:MAX_CURVES]):
        steps, values = np.asarray(steps), np.asarray(values)
        if steps.ndim != 1 or steps.shape != values.shape or not steps.size:
            raise ValueError(
                f"curve {name!r}: steps {steps.shape} and values {values.shape} must be equally "
                "long lists of numbers, not empty"
            )
        style = ("-", "--")[i // len(COLOURS)]
        marker = "o" if len(steps) <= 20 else None
        colour = COLOURS[i % len(COLOURS)]
        label = plain(shorten(name, 40))
        axes.plot(steps, values, style, color=colour, marker=marker, ms=4, lw=1.8, label=label)
    axes.set_xlabel(plain(xlabel), fontsize=TEXT)
    axes.set_ylabel(plain(ylabel), fontsize=TEXT)
    axes.set_title(count_shown(min(len(series), MAX_CURVES), len(series), "curves"), fontsize=TEXT)
    _trim_axes(axes, grid="both")
    if len(series) > 6:
        figure.legend(loc="outside right upper", fontsize=SMALL, frameon=False)
    elif len(series) > 1:
        axes.legend(fontsize=SMALL, frameon=False)
    return write_png(figure, path)
