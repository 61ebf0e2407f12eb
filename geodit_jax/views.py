"""A picture becomes the square views that the tower encodes, as uint8. numpy and Pillow, no jax.

Every resize is bicubic and done one axis after the other, width first, rounding in between. That
is what Pillow up to 12 does in one call; later versions start with the height of portrait pictures
and move single pixels by up to 25 grey levels. Done axis by axis every version gives the pixels
that the published weights were trained on.
"""

from __future__ import annotations

import math
import os

import numpy as np
from PIL import Image

from geodit_jax.config import GeoDiTConfig
from geodit_jax.image_layout import choose_canvas, pinpoints

MAX_PIXELS = 150_000_000
"""Larger pictures are refused before they are decoded: 450 MB as RGB, for views of 384 pixels."""
PAD_COLOUR = (127, 127, 127)


def make_views(image: np.ndarray | Image.Image, config: GeoDiTConfig) -> np.ndarray:
    """uint8 [n, side, side, 3] of one picture, side = the tower's image_size.

    `square`: the picture squashed; `pad`: padded to a square with mean grey; `anyres`: the squashed
    picture, then the tiles of its canvas row by row. Raises ValueError for arrays that are no
    pictures (see `to_rgb`), pictures beyond MAX_PIXELS and models without a tower.
    """
    if config.tower is None:
        raise ValueError("this model is text only (tower=None): it takes no pictures")
    side, picture = config.tower.image_size, to_rgb(image)
    if config.image_mode == "pad":
        views = [resize(_pad_to_square(picture), side, side)]
    else:
        views = [resize(picture, side, side)]
    if config.image_mode == "anyres":
        canvas = choose_canvas(picture.size, pinpoints(config))
        views += _cut(_fit_on_canvas(picture, canvas), side)
    return np.stack([np.asarray(view) for view in views])


def resize(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic, each axis by itself; an axis that has its size already is not filtered."""
    picture = picture.resize((width, picture.height), Image.Resampling.BICUBIC)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _pad_to_square(picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    _check_size(side, side, "padded to a square, the picture")
    square = Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _fit_on_canvas(picture: Image.Image, canvas: tuple[int, int]) -> Image.Image:
    """The picture as large as the canvas allows, centred on black; doubles, in this order."""
    (width, height), (wide, high) = picture.size, canvas
    across, down = wide / width, high / height
    if across < down:
        new = wide, min(math.ceil(height * across), high)
    else:
        new = min(math.ceil(width * down), wide), high
    paper = Image.new("RGB", canvas)
    paper.paste(resize(picture, *new), ((wide - new[0]) // 2, (high - new[1]) // 2))
    return paper


def _cut(paper: Image.Image, side: int) -> list[Image.Image]:
    """Tiles, row by row."""
    corners = [(x, y) for y in range(0, paper.height, side) for x in range(0, paper.width, side)]
    return [paper.crop((x, y, x + side, y + side)) for x, y in corners]


# ----------------------------------------------------------------------------------------- pixels
def read_picture(path: str | os.PathLike) -> np.ndarray:
    """uint8 [H,W,3] of a file of any size and kind (see `to_rgb`).

    Raises FileNotFoundError; ValueError naming the file when it is truncated, no picture, or beyond
    MAX_PIXELS (found before it is decoded).
    """
    try:
        with Image.open(path) as image:
            _check_size(*image.size, "the picture")
            return np.asarray(to_rgb(image))
    except FileNotFoundError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path}: more than {MAX_PIXELS:,} pixels; cut it into parts or make it smaller first"
        ) from error
    except Exception as error:  # decoders raise anything from OSError to struct.error
        raise ValueError(f"{path}: cannot be used as a picture ({error})") from error


def to_rgb(image: np.ndarray | Image.Image) -> Image.Image:
    """RGB of a Pillow image or an array [H,W], [H,W,C] with 1 to 4 channels.

    Grey is repeated, palettes are looked up, transparency is dropped as in published code. 16-bit
    values are divided by 257; floats must lie in [0,1]. Raises ValueError on other kinds.
    """
    if isinstance(image, Image.Image):
        _check_size(*image.size, "the picture")
        if image.mode == "F":
            raise ValueError("floating point pixels have no known range; save the file as 8 bit")
        if not image.mode.startswith("I"):
            return image.convert("RGB")
        image = _to_16_bits(np.asarray(image))
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4) or array.size == 0:
        raise ValueError(f"a picture must be [H,W] or [H,W,1 to 4], found the shape {array.shape}")
    _check_size(array.shape[1], array.shape[0], "the picture")
    array = _to_bytes(array[..., :1] if array.shape[2] < 3 else array[..., :3])
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3))))


def _to_bytes(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError("floating point pixels must lie in [0,1]; scale them first")
        return np.rint(array * np.float64(255)).astype(np.uint8)
    if array.dtype.kind != "u" or array.itemsize != 2:
        raise ValueError(f"pixels of type {array.dtype}: use uint8, uint16 or floats in [0,1]")
    return np.rint(array / 257).astype(np.uint8)


def _to_16_bits(array: np.ndarray) -> np.ndarray:
    """Pillow holds some 16-bit files as 32-bit integers."""
    if array.min() < 0 or array.max() > 65535:
        raise ValueError("pixel values beyond 16 bits; save the picture as 8 or 16 bit")
    return array.astype(np.uint16)


def _check_size(width: int, height: int, what: str) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{what} has {width}x{height} pixels, more than {MAX_PIXELS:,}; cut it into parts or "
            "make it smaller first"
        )
