"""Label maps beside the pictures they belong to, with wrong regions outlined."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common_jax.canvas import (
    check_images,
    check_match,
    class_colours,
    resize_tile,
    save_sheet,
    shorten,
    swatch,
    tile_size,
)
from common_jax.charts import count_shown

MAX_ROWS = 8  # images, one per line
IGNORED = (128, 128, 128)


def save_overlays(images, labels, predictions, classes, path, ignore_index: int = -100) -> Path:
    """Image, label and prediction [N, H, W] side by side; wrong regions have an outline.

    Class colours lie over the grey picture. Pixels with `ignore_index` are grey in the label and
    never count as wrong. At most MAX_ROWS images. The legend holds the classes that occur.
    """
    images = check_images(images)
    total = len(images)
    labels = _check_map(labels, total, "labels", len(classes), ignore_index)
    predictions = _check_map(predictions, total, "predictions", len(classes))
    check_match(predictions.shape, labels.shape, "shape of the predictions against the labels")
    images, labels, predictions = (x[:MAX_ROWS] for x in (images, labels, predictions))
    size = tile_size(*images.shape[1:3])
    colours = class_colours(len(classes))
    tiles = np.zeros((len(images), 3, *size, 3), np.uint8)
    captions = []
    for n, image in enumerate(images):
        known = labels[n] != ignore_index
        wrong = known & (labels[n] != predictions[n])
        shown = np.where(known[..., None], colours[np.where(known, labels[n], 0)], IGNORED)
        tiles[n, 0] = resize_tile(image, size, average=True)
        tiles[n, 1] = tint(tiles[n, 0], resize_tile(shown.astype(np.uint8), size))
        tinted = tint(tiles[n, 0], resize_tile(colours[predictions[n]], size))
        tiles[n, 2] = _outline(tinted, resize_tile(wrong.astype(np.uint8), size) > 0)
        right = f"{1 - wrong.sum() / known.sum():.1%} right" if known.any() else "no label"
        captions.append(["", "", right])
    present = np.unique(np.concatenate([labels[labels != ignore_index], predictions.ravel()]))
    legend = [(swatch(colours[k]), shorten(classes[k], 32)) for k in present]
    if (labels == ignore_index).any():
        legend.append((swatch(IGNORED), "not labelled"))
    edge = np.zeros((14, 14, 3), np.uint8)
    edge[1:-1, 1:-1] = 255
    edge[2:-2, 2:-2] = 200
    legend.append((edge, "wrong"))
    return save_sheet(
        tiles,
        path,
        title=count_shown(len(images), total),
        headings=("image", "label", "prediction"),
        captions=captions,
        legend=legend,
    )


def _check_map(values, images: int, what: str, classes: int, ignore_index: int | None = None):
    values = np.asarray(values)
    if values.ndim != 3 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{what} are {values.dtype} {values.shape}; give integers [N, H, W]")
    check_match(len(values), images, f"number of {what} for the images")
    bad = (values < 0) | (values >= classes)
    if ignore_index is not None:
        bad &= values != ignore_index
    if bad.any():
        raise ValueError(f"{what} hold class {values[bad][0]}; classes are 0..{classes - 1}")
    return values


def tint(image: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Class colours [H, W, 3] over a picture [H, W, 3], darker where it is dark; uint8."""
    grey = image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    return (colours * (0.6 + 0.4 * grey / 255)[..., None]).round().astype(np.uint8)


def _outline(picture: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Black rim on the outermost pixels of the region, white one inside it."""
    inner = _erode(region)
    picture = picture.copy()
    picture[region & ~inner] = 0
    picture[inner & ~_erode(inner)] = 255
    return picture


def _erode(region: np.ndarray) -> np.ndarray:
    """Pixels whose four neighbours are in the region; beyond the picture counts as inside."""
    wide = np.pad(region, 1, constant_values=True)
    return region & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
