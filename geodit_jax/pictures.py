"""Pictures of answers: boxes on the image, and how a text came out of its masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle

from common_jax.canvas import colour_table, new_figure, plain, write_png

FOUND, TRUE = "#ff3b30", "#34c759"
LONGEST_PIECE = 14


def save_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    path,
    *,
    title: str = "",
    truth: np.ndarray | None = None,
) -> Path:
    """uint8 [H,W,3] with boxes [n,4] (x0, y0, x1, y1, pixels): found ones red, true ones green."""
    height, width = image.shape[:2]
    figure = new_figure(6, 6 * height / width + 0.5)
    axes = figure.add_subplot()
    axes.imshow(image)
    axes.set_axis_off()
    for colour, group in ((TRUE, truth), (FOUND, boxes)):
        for x0, y0, x1, y1 in np.reshape([] if group is None else group, (-1, 4)):
            axes.add_patch(
                Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=2)
            )
    axes.set_title(plain(title), fontsize=9, wrap=True)
    return write_png(figure, path)


def save_history(pieces: Sequence[str], committed_at: np.ndarray, path, *, title: str = "") -> Path:
    """One line for each pass, tokens coloured by the pass that fixed them.

    pieces: text of each position, "" behind the end; committed_at int [L], -1: fixed by none.
    """
    length = max((k + 1 for k, piece in enumerate(pieces) if piece), default=1)
    pieces, committed_at = list(pieces[:length]), np.asarray(committed_at)[:length]
    passes = max(int(committed_at.max()) + 1, 1)
    colours = colour_table("viridis", np.linspace(0.15, 0.95, passes)) / 255
    figure = new_figure(max(0.85 * length, 5), 0.42 * passes + 0.9)
    axes = figure.add_subplot(xlim=(0, length), ylim=(passes, 0))
    for step in range(passes):
        for k, (piece, at) in enumerate(zip(pieces, committed_at)):
            known = 0 <= at <= step
            colour = colours[at] if known else (0.92, 0.92, 0.92)
            axes.add_patch(Rectangle((k, step), 1, 1, facecolor=colour, edgecolor="white"))
            if known:
                dark = colour[:3] @ (0.3, 0.6, 0.1) < 0.55
                axes.text(
                    k + 0.5,
                    step + 0.5,
                    plain(piece[:LONGEST_PIECE]),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                    fontweight="bold" if at == step else "normal",
                )
    axes.set_yticks(np.arange(passes) + 0.5, [f"pass {n + 1}" for n in range(passes)], fontsize=8)
    axes.set_xticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(plain(title), fontsize=9, wrap=True)
    return write_png(figure, path)
