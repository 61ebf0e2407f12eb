"""Picture files: decode to three channels, check a whole folder once, find content twice.

Opening a folder decodes every file once, by threads: a corrupt file is then found before training
starts, and the hash of the pixels tells which pictures are the same whatever their name or format.
JPEG files in colour are decoded by libjpeg-turbo straight into an array, all others by Pillow.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".jp2"})
SMALLEST_SIDE = 8
JPEG_MAGIC = b"\xff\xd8\xff"
MAX_NAMED = 5


class ImageError(ValueError):
    """A picture that cannot be used; the message names the file."""


@dataclass(frozen=True)
class Checked:
    """A readable picture: height and width in pixels, hash of its pixels."""

    path: str
    height: int
    width: int
    digest: str


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def decode(path: str | os.PathLike) -> np.ndarray:
    """[H, W, 3]: uint8, or float32 in [0, 1] for 16-bit files (value / 65535).

    Grey is repeated, palettes are looked up, transparency is dropped. Raises ImageError on files
    that are truncated, no picture, smaller than 8 pixels, or hold other than 1, 3 or 4 channels.
    """
    pixels = _decode_jpeg(path)
    if pixels is None:
        pixels = _decode_any(path)
    if min(pixels.shape[:2]) < SMALLEST_SIDE:
        height, width = pixels.shape[:2]
        raise ImageError(f"{path}: {height}x{width} pixels; need at least {SMALLEST_SIDE} a side")
    return pixels


def _decode_jpeg(path: str | os.PathLike | NamedBytes) -> np.ndarray | None:
    """The pixels that Pillow gives, in 0.6 of its time. None for what is no JPEG in
    colour, very large, or damaged: there Pillow has the word."""
    try:
        content = _jpeg_content(path)
        if not content:
            return None
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours != "YCbCr" or height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        return simplejpeg.decode_jpeg(content)
    except (OSError, ValueError):
        return None


def _jpeg_content(path: str | os.PathLike | NamedBytes) -> bytes:
    """The whole file if it begins like a JPEG, else nothing."""
    if isinstance(path, NamedBytes):
        content = path.getvalue()
        return content if content.startswith(JPEG_MAGIC) else b""
    with open(path, "rb", buffering=0) as file:
        start = file.read(len(JPEG_MAGIC))
        return start + file.readall() if start == JPEG_MAGIC else b""


def _decode_any(path: str | os.PathLike | NamedBytes) -> np.ndarray:
    with _opened(path) as image:
        mode = image.mode
        if mode.startswith("I"):
            grey = np.asarray(image).astype(np.float32) / np.float32(65535)
            if grey.min() < 0 or grey.max() > 1:
                raise ImageError(f"{path}: values beyond 16 bits; save it as 8 or 16 bit")
            return np.repeat(grey[..., None], 3, -1)
        if mode == "F":
            raise ImageError(f"{path}: floating point pixels have no known range; save as 8 bit")
        return np.asarray(image if mode == "RGB" else image.convert("RGB"))


class NamedBytes(io.BytesIO):
    """Bytes that know where they came from, so that messages name it."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.source_name = name

    def __str__(self) -> str:
        return self.source_name


def decode_8bit(source: str | os.PathLike | NamedBytes) -> np.ndarray:
    """uint8 [H, W, 3] of a file or of bytes; 16-bit values are divided by 257."""
    pixels = decode(source)
    if pixels.dtype != np.uint8:
        pixels = np.rint(pixels * np.float32(255)).astype(np.uint8)
    return pixels


def decode_mask(path: str | os.PathLike) -> np.ndarray:
    """int32 [H, W] of class numbers, from a one-channel file (palette indices stay numbers)."""
    with _opened(path) as image:
        if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise ImageError(
                f"{path}: a mask of mode {image.mode}; need one channel of class numbers"
            )
        return np.asarray(image).astype(np.int32)


def refuse_system_errors(error: Exception) -> None:
    """Raises what the operating system said (no such file, too many open files, a disk that does
    not answer) once more: it tells nothing about the picture, so nothing may be skipped for it."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


class _opened:
    """PIL image of a file; every failure to decode it becomes an ImageError that names it."""

    def __init__(self, path: str | os.PathLike):
        self.path, self.image = path, None

    def __enter__(self) -> Image.Image:
        try:
            self.image = Image.open(self.path)
            self.image.load()
        except Exception as error:  # decoders raise anything from OSError to struct.error
            refuse_system_errors(error)
            reason = str(error) or type(error).__name__
            raise ImageError(
                f"{self.path}: cannot be read as a picture ({reason}); replace or remove it, "
                "or set on_corrupt=skip"
            ) from error
        return self.image

    def __exit__(self, *exc) -> None:
        self.image.close()


def digest_of(pixels: np.ndarray) -> str:
    """Hash of shape, type and values."""
    head = f"{pixels.shape}{pixels.dtype}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).hexdigest()


@lru_cache(maxsize=1_000_000)
def _check_once(path: str, size: int, changed: int) -> Checked | str:
    try:
        pixels = decode(path)
    except ImageError as error:
        return str(error)
    return Checked(path, pixels.shape[0], pixels.shape[1], digest_of(pixels))


def _check(path: str) -> Checked | str:
    state = os.stat(path)
    return _check_once(path, state.st_size, state.st_mtime_ns)


def some_of(names: Sequence[str]) -> str:
    """The first few of many, for messages."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(map(str, names[:MAX_NAMED])) + more


def check_images(
    paths: Sequence[str | os.PathLike],
    on_corrupt: str = "refuse",
    check: Callable[[str], object] = _check,
    problems: list[str] | None = None,
) -> list:
    """Reads every file once -> the Checked ones, in order.

    on_corrupt: "refuse" raises ImageError naming the broken files, "skip" leaves them out and logs
    how many and which; `problems` is given what is wrong with each. A file seen before in this
    process is not read again.
    """
    if on_corrupt not in ("refuse", "skip"):
        raise ValueError(f"on_corrupt='{on_corrupt}' is not refuse or skip")
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(check, map(str, paths)))
    broken = [result for result in results if isinstance(result, str)]
    if broken and on_corrupt == "refuse":
        raise ImageError(
            f"{len(broken)} of {len(results)} files are not usable: {some_of(broken)}. "
            "Replace or remove them, or set on_corrupt=skip"
        )
    if broken:
        logging.warning("skipped %d of %d files: %s", len(broken), len(results), some_of(broken))
        if problems is not None:
            problems += broken
    return [result for result in results if not isinstance(result, str)]
