"""The published augmentation as a transform of single examples, and the metadata vector.

A transform is a picklable callable `(example, rng) -> example` that draws only from the given
generator. Images are uint8 (0..255) or float32 ([0, 1]), height x width x 3; geometry moves a
segmentation label ([H, W]) with its image. Crops and turns for pretraining: crops.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Example = dict[str, Any]

METADATA_FIELDS = ("longitude", "latitude", "gsd", "cloud_cover", "year", "month", "day")
_OFFSET = (180, 90, 0, 0, -1980, 0, 0)
_RANGE = (360, 180, 1, 1, 120, 12, 31)
_GREY = np.array([0.2989, 0.587, 0.114], np.float32)


def normalise_metadata(
    *,
    longitude: float,
    latitude: float,
    gsd: float,
    cloud_cover: float,
    year: float,
    month: float,
    day: float,
) -> np.ndarray:
    """The seven metadata fields of DiffusionSat, float32 [7], each in about 0..1000.

    Degrees east and north, metres per pixel (of the image as the model sees it: multiply the
    sensor's GSD by `short side / model side` when the image is resized), cloud cover as a fraction,
    date. (longitude + 180, latitude + 90, gsd, cloud, year - 1980, month, day) / (360, 180, 1, 1,
    120, 12, 31) * 1000, as the released weights were trained. Raises ValueError on values that
    cannot be right; a *missing* field is 0 after normalisation, not before.
    """
    limits = {
        "longitude": (longitude, -180, 180),
        "latitude": (latitude, -90, 90),
        "gsd": (gsd, 0, 1e5),
        "cloud_cover": (cloud_cover, 0, 1),
        "year": (year, 1980, 2100),
        "month": (month, 1, 12),
        "day": (day, 1, 31),
    }
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise ValueError(f"metadata field {name}={value} is not in {low}..{high}")
    # Plain numbers: of seven values numpy would take five times as long.
    raw = longitude, latitude, gsd, cloud_cover, year, month, day
    scaled = [(x + offset) / width * 1000 for x, offset, width in zip(raw, _OFFSET, _RANGE)]
    return np.array(scaled, np.float32)


def to_unit(image: np.ndarray) -> np.ndarray:
    """uint8 0..255 or float in [0, 1] -> float32 in [0, 1] (float input is clipped)."""
    if image.dtype == np.uint8:
        return image.astype(np.float32) / np.float32(255)
    return np.clip(image.astype(np.float32), 0, 1)


def _has_map(example: Example) -> bool:
    return np.ndim(example.get("label")) == 2


def _move(example: Example, image_fn, label_fn=None) -> Example:
    """Applies a geometric function to the image and, when it is a map, to the label."""
    moved = example | {"image": np.ascontiguousarray(image_fn(example["image"]))}
    if _has_map(example):
        moved["label"] = np.ascontiguousarray((label_fn or image_fn)(example["label"]))
    return moved


def rotate(array: np.ndarray, degrees: float, fill: float = 0) -> np.ndarray:
    """Rotation about the centre (counter-clockwise), nearest pixel, same size, `fill` outside."""
    height, width = array.shape[:2]
    angle = np.deg2rad(degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    y = np.arange(height)[:, None] - (height - 1) / 2
    x = np.arange(width)[None, :] - (width - 1) / 2
    from_x = np.rint(cos * x - sin * y + (width - 1) / 2).astype(np.int64)
    from_y = np.rint(sin * x + cos * y + (height - 1) / 2).astype(np.int64)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    turned = array[from_y.clip(0, height - 1), from_x.clip(0, width - 1)]
    turned[~inside] = fill
    return turned


def _blend(image: np.ndarray, other: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(np.float32(factor) * image + np.float32(1 - factor) * other, 0, 1)


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return _blend(image, np.zeros_like(image), factor)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean grey of the image."""
    return _blend(image, np.full_like(image, (image @ _GREY).mean()), factor)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the grey image."""
    return _blend(image, np.repeat((image @ _GREY)[..., None], 3, -1), factor)


def adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turns the hue by `shift` of a full circle; value and saturation stay."""
    high, low = image.max(-1), image.min(-1)
    span = high - low
    safe = np.where(span > 0, span, 1)
    r, g, b = (image[..., c] for c in range(3))
    hue = np.where(
        high == r, (g - b) / safe, np.where(high == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )
    hue = (hue / 6 + shift) % 1.0
    # Each channel is a clipped triangle wave of the hue.
    position = (np.array([5, 3, 1], np.float32) + hue[..., None] * 6) % 6
    ramp = np.clip(np.minimum(position, 4 - position), 0, 1)
    return (high[..., None] - span[..., None] * ramp).astype(np.float32)


_JITTER = (adjust_brightness, adjust_contrast, adjust_saturation)


@dataclass(frozen=True)
class PublishedAugment:
    """The augmentation of the published code, at native size, on [0, 1].

    With probability `p` the whole chain: mirror left-right (0.5), mirror up-down (0.5), rotation by
    a uniform angle in +-`degrees` (nearest, zero fill), brightness, contrast, saturation (factors
    1 +- `jitter`) and hue (+- `jitter` of a circle) in random order. A label map turns along;
    what the rotation uncovers becomes `ignore`. -> image float32 in [0, 1].
    """

    p: float = 0.5
    degrees: float = 90.0
    jitter: float = 0.1
    ignore: int = -100

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        example = example | {"image": to_unit(example["image"])}
        if rng.random() >= self.p:
            return example
        if rng.random() < 0.5:
            example = _move(example, lambda a: a[:, ::-1])
        if rng.random() < 0.5:
            example = _move(example, lambda a: a[::-1])
        angle = rng.uniform(-self.degrees, self.degrees)
        example = _move(
            example, lambda a: rotate(a, angle), lambda a: rotate(a, angle, self.ignore)
        )
        image = example["image"]
        for k in rng.permutation(4):
            if k == 3:
                image = adjust_hue(image, rng.uniform(-self.jitter, self.jitter))
            else:
                image = _JITTER[k](image, rng.uniform(1 - self.jitter, 1 + self.jitter))
        return example | {"image": image}
