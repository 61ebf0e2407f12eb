"""A picture becomes the pixels the encoder expects: [0,1], resized, then [-1,1]. numpy only.

The resize is bilinear with antialiasing and half-pixel centres, the published transform. It is
linear in each axis, so it is two small matrix products; enlarging uses the same formula.
"""

from __future__ import annotations

import functools

import numpy as np

# Part of every cache key: change it whenever a change below changes a pixel.
PIXEL_TRANSFORM = "clip[0,1] -> bilinear antialias -> (x-0.5)/0.5, version 1"
FITS = ("stretch", "crop")


def check_side(side, multiple: int = 1) -> int:
    """A square side in pixels as int; unequal (H, W) and sizes that do not divide are refused."""
    if isinstance(side, (tuple, list)):
        if len(set(side)) != 1:
            raise ValueError(
                f"size {tuple(side)} is not square: taps are read back from token rows as a square "
                f"map; give one side, for example {max(side)}"
            )
        side = side[0]
    if int(side) != side or side < 1 or side % multiple:
        raise ValueError(f"side {side} must be a positive multiple of {multiple} pixels")
    return int(side)


@functools.lru_cache(maxsize=64)
def resize_matrix(size: int, new_size: int) -> np.ndarray:
    """Weights [new_size, size] float32 of an antialiased bilinear resize of one axis."""
    scale = size / new_size
    width = max(scale, 1.0)  # the triangle widens only when shrinking
    centres = (np.arange(new_size) + 0.5) * scale
    distance = np.abs(np.arange(size)[None, :] + 0.5 - centres[:, None]) / width
    weights = np.maximum(1.0 - distance, 0.0)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    weights.setflags(write=False)
    return weights


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """float32 [H,W,C] -> [height,width,C]; equals torch's antialiased bilinear to 3e-7."""
    h, w, channels = image.shape
    if (h, w) == (height, width):
        return image
    if w != width:  # columns first, then rows: the smaller product of the two orders is rare
        image = np.einsum("vw,hwc->hvc", resize_matrix(w, width), image, optimize=True)
    if h != height:
        rows = resize_matrix(h, height) @ image.reshape(h, width * channels)
        image = rows.reshape(height, width, channels)
    return np.ascontiguousarray(image, np.float32)


def to_unit(image: np.ndarray) -> np.ndarray:
    """uint8 0..255 or float [H,W,3] -> float32 clipped to [0,1]."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"an image must be [H,W,3] (red, green, blue), found {image.shape}")
    if image.dtype == np.uint8:
        return image.astype(np.float32) / np.float32(255)
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"image dtype {image.dtype}: scale it to float in [0,1] or uint8 first")
    if not np.isfinite(image).all():
        raise ValueError("the image holds NaN or infinity; fill missing pixels first")
    return np.clip(image.astype(np.float32), 0.0, 1.0)


def to_pixels(image: np.ndarray, side: int, fit: str = "stretch") -> np.ndarray:
    """uint8 or float-in-[0,1] [H,W,3] -> float32 [side,side,3] in [-1,1].

    fit: "stretch" resizes both axes to `side` (published features); "crop" resizes the short side,
    then takes the centre (published pretraining). The same for square images.
    """
    side = check_side(side)
    image = to_unit(image)
    height, width = image.shape[:2]
    if fit == "stretch":
        image = resize(image, side, side)
    elif fit == "crop":
        short = min(height, width)
        image = resize(image, round(height * side / short), round(width * side / short))
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        image = image[top : top + side, left : left + side]
    else:
        raise ValueError(f"fit={fit!r} is not one of {FITS}")
    return (image - np.float32(0.5)) / np.float32(0.5)


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """[-1,1] float [...,3] back to uint8 0..255, rounded; values outside are clipped."""
    return np.clip(np.rint((np.asarray(pixels, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)
