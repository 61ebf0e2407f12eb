"""WebDataset tars for pretraining: samples are members whose names agree up to their first dot.

A sample is a picture (an image file, `input.npy` or `rgb.npy`) and what is said of it. Samples of
fMoW, SpaceNet and Satlas are known by the first word of their names; of others `KEY.txt` is the
caption and `KEY.json` may hold `caption` and the metadata of satellite_sample.read_fields.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from common_jax.files import restricted_loads, sha256_json
from data.images import SUFFIXES, ImageError, some_of
from data.satellite_sample import CAPTION, Sample, read_fields
from data.satellite_sets import (
    Places,
    choose_frame,
    describe_fmow,
    describe_satlas,
    describe_spacenet,
)
from data.tar_index import index_tar
from data.wording import always, compose

ARRAYS = ("input.npy", "rgb.npy", "npy")
Parts = dict[str, tuple[int, int, int]]
"""{what follows the key: (number of the tar, first byte, bytes)}."""


def expand_braces(text: str) -> list[str]:
    """`a-{000..002}.tar` -> a-000.tar, a-001.tar, a-002.tar; `{x,y}` both."""
    found = re.search(r"\{([^{}]*)\}", text)
    if not found:
        return [text]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers:
        first, last = numbers.groups()
        inside = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    else:
        inside = found[1].split(",")
    ends = expand_braces(text[found.end() :])
    return [f"{text[: found.start()]}{part}{end}" for part in inside for end in ends]


def find_tars(root: str) -> list[Path]:
    """Tars of a file, a folder, a name with braces, or a text file with one of these a line."""
    path = Path(root).expanduser()
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.suffix == ".txt" and path.is_file():
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        return [tar for line in lines for tar in find_tars(str(path.parent / line))]
    return [Path(name) for name in expand_braces(str(path)) if name.endswith(".tar")]


def _split_name(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    key, _, rest = path.name.partition(".")
    return str(path.parent / key), rest.lower()


def _picture_part(parts: Parts) -> str | None:
    arrays = (name for name in ARRAYS if name in parts)
    files = (name for name in parts if f".{name.rpartition('.')[2]}" in SUFFIXES)
    return next(arrays, None) or next(files, None)


def read_places(path: str) -> Places:
    """fMoW's CSV file, with the columns category, location_id, image_id and polygon."""
    with open(Path(path).expanduser(), newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        need = {"category", "location_id", "image_id", "polygon"}
        if not need <= set(rows.fieldnames or ()):
            raise ValueError(f"{path}: need the columns {', '.join(sorted(need))}")
        return {
            (row["category"], int(row["location_id"]), int(row["image_id"])): row["polygon"]
            for row in rows
        }


class TarReader:
    """Random access to the samples of tars, in order; see satellite.py for readers.

    places: CSV file with the polygons of fMoW. Damaged members and samples without a picture are
    refused, or under on_corrupt=skip left out and told in `problems`.
    """

    def __init__(self, tars: Sequence[Path], *, places: str = "", on_corrupt: str = "refuse"):
        absent = [str(tar) for tar in tars if not tar.is_file()]
        if absent or not tars:
            raise FileNotFoundError(f"no such tar files: {some_of(absent) or 'none was named'}")
        self.tars, self.name = [str(tar) for tar in tars], Path(tars[0]).parent.name
        self.places = read_places(places) if places else {}
        self.keys: list[str] = []
        self.parts: list[Parts] = []
        self.problems = problems = [text for k in range(len(tars)) for text in self._index(k)]
        if problems and on_corrupt == "refuse":
            raise ImageError(
                f"{len(problems)} damaged members: {some_of(problems)}. Copy the tars again, or "
                "set on_corrupt=skip to leave them out"
            )
        if problems:
            logging.warning("skipped %d members: %s", len(problems), some_of(problems))
        sizes = [[Path(tar).name, Path(tar).stat().st_size] for tar in self.tars]
        self.fingerprint = f"tars-{sha256_json([sizes, len(self.keys), len(self.places)])[:32]}"

    def _index(self, number: int) -> list[str]:
        index, found = index_tar(self.tars[number]), {}
        for name, (start, count) in index.members.items():
            key, rest = _split_name(name)
            found.setdefault(key, {})[rest] = (number, start, count)
        lacking = []
        for key, parts in found.items():
            if _picture_part(parts):
                self.keys.append(key)
                self.parts.append(parts)
            else:
                lacking.append(f"{self.tars[number]}: {key} has no picture")
        return [*index.broken, *lacking]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def names(self) -> list[str]:
        return [f"{k}.{_picture_part(p)}" for k, p in zip(self.keys, self.parts, strict=True)]

    def _read(self, i: int, part: str) -> Any:
        number, start, count = self.parts[i][part]
        with open(self.tars[number], "rb") as file:
            file.seek(start)
            content = file.read(count)
        return _decode(content, part, f"{self.tars[number]}: {self.keys[i]}.{part}")

    def sample(self, i: int) -> Sample:
        """Raises ImageError naming the tar and the member."""
        picture = _picture_part(self.parts[i])
        where = f"{self.tars[self.parts[i][picture][0]]}: {self.keys[i]}"
        try:
            rest = {part: self._read(i, part) for part in self.parts[i] if part != picture}
            return self._described(i, self._read(i, picture), rest)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ImageError(
                f"{where}: {type(error).__name__} {error} lacks or is wrong"
            ) from error

    def _described(self, i: int, picture: Any, rest: dict[str, Any]) -> Sample:
        key = self.keys[i]
        name = PurePosixPath(key).name
        which = re.match(r"[a-z]*", name.lower())[0]
        if which == "satlas":
            shown, frame = choose_frame(key, picture, rest["info.json"]["image_names"])
            said = describe_satlas(name, rest, shown.shape[:2], frame)
            return Sample(key, to_rgb(shown, key), *said)
        if which in ("fmow", "spacenet"):
            said = (
                describe_fmow(rest, self.places)
                if which == "fmow"
                else describe_spacenet(name, rest)
            )
            return Sample(key, to_rgb(picture, key), *said)
        about = rest.get("json", {})
        caption = str(rest.get("txt", about.get("caption", ""))).strip() or CAPTION
        return Sample(key, to_rgb(picture, key), compose(always(caption)), read_fields(about))


def _decode(content: bytes, part: str, where: str) -> Any:
    """A member by its last suffix; pictures stay bytes, what is not known is left alone."""
    kind = part.rpartition(".")[2]
    try:
        if kind == "npy":
            return np.load(io.BytesIO(content), allow_pickle=False)
        if kind == "json":
            return json.loads(content)
        if kind == "txt":
            return content.decode().strip()
        if kind == "cls":
            return int(content)
    except (ValueError, EOFError) as error:  # of numpy, JSON, UTF-8 and int alike
        raise ImageError(f"{where}: {error}") from error
    if kind in ("pyd", "pkl"):
        return restricted_loads(content, source=where)
    return content


def to_rgb(picture: Any, where: str) -> Any:
    """Bytes as they are; arrays as uint8 [H, W, 3].

    Channels may come first. uint16 is stretched from the 2nd to the 98th percentile of each channel
    to 0..255, as for the released weights.
    """
    if isinstance(picture, bytes):
        return picture
    if picture.ndim == 3 and picture.shape[0] == 3 and picture.shape[-1] != 3:
        picture = np.moveaxis(picture, 0, -1)
    if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype not in (np.uint8, np.uint16):
        raise ImageError(f"{where}: an array {picture.shape} {picture.dtype}; need 8 or 16 bit RGB")
    if picture.dtype == np.uint16:
        low, high = np.percentile(picture, (2, 98), axis=(0, 1))
        stretched = (picture - low) / np.maximum(high - low, 1) * 255
        picture = np.clip(np.rint(stretched), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(picture)
