"""Tar files as the sets of pretraining are distributed, written by the tests that read them."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def jpeg(value: int = 90, size: tuple[int, int] = (12, 9)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (value, 60, 30)).save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> dict[str, int]:
    """-> {member: offset of its header}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    offsets = {}
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            offsets[name] = archive.offset
            archive.addfile(info, io.BytesIO(content))
    return offsets


def fmow(number: int) -> dict[str, bytes]:
    about = {
        "img_filename": f"airport_{number}_0_rgb.jpg",
        "gsd": 0.5,
        "cloud_cover": 20,
        "timestamp": "2016-02-04T10:20:30Z",
        "country_code": "BRA",
    }
    key = f"fmow-{number:06d}"
    return {
        f"{key}.input.npy": npy(np.full((8, 10, 3), number, np.uint8)),
        f"{key}.output.cls": b"0",
        f"{key}.metadata.json": json.dumps(about).encode(),
    }


def spacenet(city: str = "Vegas") -> dict[str, bytes]:
    ring = [[-115.2, 36.2], [-115.1999, 36.2], [-115.1999, 36.2001], [-115.2, 36.2001]]
    house = {"geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}}
    pixels = np.linspace(0, 4000, 3 * 10 * 12).reshape(3, 10, 12).astype(np.uint16)
    key = f"spacenet_2_AOI_{city}_img7"
    return {
        f"{key}.rgb.npy": npy(pixels),
        f"{key}.metadata.json": json.dumps({"features": [house, house]}).encode(),
    }


def satlas(
    names: tuple[str, ...] = ("a_2018-05-06", "b_2020-07-08"), values: tuple[int, ...] = (10, 20)
) -> dict[str, bytes]:
    """values: colour of each picture of the stack; names may be fewer."""
    targets = [
        {"labels": np.array([1, 1, 15]), "boxes": np.array([[0, 0, 2, 2]] * 2 + [[6, 6, 8, 8]])}
    ]
    about = {"task_name": "point", "image_names": list(names)}
    key = "satlas_32768_49152_point"
    frames = np.array([np.full((8, 8, 3), value, np.uint8) for value in values])
    return {
        f"{key}.rgb.npy": npy(frames),
        f"{key}.info.json": json.dumps(about).encode(),
        f"{key}.targets.pyd": pickle.dumps(targets),
    }
