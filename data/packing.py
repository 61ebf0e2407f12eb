"""One example as bytes: a JSON header and named parts. What `data.prepare` writes as one record.

    4 bytes "EOX1" | 4 bytes length of the header, little-endian | header, UTF-8 JSON | the parts

The header's "parts" lists [name, bytes] in order. Parts are files as they were found (a JPEG keeps
its bytes) or arrays: `npz` is the numpy format, compressed by zlib.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

MAGIC = b"EOX1"


class PackingError(ValueError):
    """Bytes that are no packed example; the message says where they were."""


def pack(header: Mapping[str, Any], parts: Mapping[str, bytes]) -> bytes:
    """header: JSON values; its key "parts" is taken."""
    table = [[name, len(content)] for name, content in parts.items()]
    text = json.dumps(dict(header) | {"parts": table}, ensure_ascii=False).encode()
    return b"".join([MAGIC, len(text).to_bytes(4, "little"), text, *parts.values()])


def unpack(content: bytes, where: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(header, parts). Raises PackingError naming `where`."""
    start = 8 + int.from_bytes(content[4:8], "little")
    if content[:4] != MAGIC or len(content) < start:
        raise PackingError(f"{where}: not an example of data.prepare; prepare the set again")
    header, parts = json.loads(content[8:start]), {}
    for name, length in header.pop("parts"):
        parts[name] = content[start : start + length]
        start += length
    if start != len(content):
        raise PackingError(f"{where}: {len(content)} bytes, its header says {start}")
    return header, parts


def pack_picture(pixels: np.ndarray, quality: int = 0) -> bytes:
    """uint8 [H, W, 3] as PNG, without loss, or as JPEG of a quality in 1..100."""
    file, image = io.BytesIO(), Image.fromarray(pixels)
    if quality:
        image.save(file, "JPEG", quality=quality, subsampling=0)
    else:
        image.save(file, "PNG", compress_level=3)
    return file.getvalue()


def pack_array(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array, order="C"), allow_pickle=False)
    return zlib.compress(file.getbuffer(), 1)


def unpack_array(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(zlib.decompress(content)), allow_pickle=False)
