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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from common_jax.files import restricted_loads, sha256_file, sha256_json
from data.images import ImageError, some_of
from data.satellite_sample import CAPTION, Sample, read_fields
from data.satellite_sets import (
    Places,
    choose_frame,
    describe_fmow,
    describe_satlas,
    describe_spacenet,
)
from data.tar_index import open_samples, stamp_of
from data.wording import always, compose

FAULTS = (KeyError, IndexError, TypeError, AttributeError)
"""What reading a sample raises that is not made as its set says."""
LOOKED_AT = 200
"""fMoW pictures whose places are looked up when tars are opened."""


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
    refused, or under on_corrupt=skip left out and told in `problems`. Raises ValueError when
    `places` has none of the pictures. Opened through `open_tars`.
    """

    def __init__(self, tars: Sequence[Path], *, places: str = "", on_corrupt: str = "refuse"):
        absent = [str(tar) for tar in tars if not tar.is_file()]
        if absent or not tars:
            raise FileNotFoundError(f"no such tar files: {some_of(absent) or 'none was named'}")
        self.tars, self.name = [str(tar) for tar in tars], Path(tars[0]).parent.name
        self.places = read_places(places) if places else {}
        with ThreadPoolExecutor(8) as pool:  # a disk far away answers several at once
            self.samples = list(pool.map(open_samples, self.tars))
        self.ends = np.cumsum([len(samples) for samples in self.samples], dtype=np.int64)
        self.problems = problems = [text for samples in self.samples for text in samples.broken]
        if problems and on_corrupt == "refuse":
            raise ImageError(
                f"{len(problems)} damaged members: {some_of(problems)}. Copy the tars again, or "
                "set on_corrupt=skip to leave them out"
            )
        if problems:
            logging.warning("skipped %d members: %s", len(problems), some_of(problems))
        self._look_up_places(places)
        files = [[Path(tar).name, *stamp_of(tar)] for tar in self.tars]
        marks = [files, len(self), sha256_file(Path(places).expanduser()) if places else ""]
        self.fingerprint = f"tars-{sha256_json(marks)[:32]}"

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def names(self) -> list[str]:
        return [f"{s.key(j)}.{s.picture_part(j)}" for s in self.samples for j in range(len(s))]

    def _place(self, i: int) -> tuple[int, int]:
        """(number of the tar, place in it) of sample i."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)} of '{self.name}'")
        number = int(np.searchsorted(self.ends, i, side="right"))
        return number, int(i) - int(self.ends[number] - len(self.samples[number]))

    def _read(self, i: int, wanted: Callable[[str], bool]) -> dict[str, Any]:
        """The decoded parts of a sample."""
        number, j = self._place(i)
        key, found = self.samples[number].key(j), {}
        with open(self.tars[number], "rb") as file:
            for part, (start, count) in self.samples[number].members(j).items():
                if wanted(part):
                    file.seek(start)
                    where = f"{self.tars[number]}: {key}.{part}"
                    found[part] = _decode(file.read(count), part, where)
        return found

    def _look_up_places(self, path: str) -> None:
        """Refuses a CSV file with none of the places, and warns of pictures without one."""
        looked, known = 0, 0
        for i in np.linspace(0, len(self), min(len(self), LOOKED_AT), endpoint=False).astype(int):
            number, j = self._place(int(i))
            if set_of(self.samples[number].key(j)) != "fmow":
                continue
            picture = self.samples[number].picture_part(j)
            try:
                rest = self._read(int(i), lambda part, picture=picture: part != picture)
                _, fields = describe_fmow(rest, self.places)
            except (ValueError, *FAULTS):  # said when it is read
                continue
            looked, known = looked + 1, known + ("longitude" in fields)
        if path and looked and not known:
            raise ValueError(
                f"{path} has none of the {looked} fMoW pictures of '{self.name}' that were looked "
                "up; give the CSV file of these tars, with the same split"
            )
        if known < looked:
            told = f"{path} lacks them" if path else "give the CSV file of the set (places)"
            logging.warning(
                "%s: %d of %d fMoW pictures looked at have no longitude and latitude: %s",
                *(self.name, looked - known, looked, told),
            )

    def sample(self, i: int) -> Sample:
        """Raises ImageError naming the tar and the member."""
        number, j = self._place(i)
        key, picture = self.samples[number].key(j), self.samples[number].picture_part(j)
        try:
            parts = self._read(i, lambda part: True)
            return self._described(key, parts.pop(picture), parts)
        except FAULTS as error:
            raise ImageError(
                f"{self.tars[number]}: {key}: {type(error).__name__} {error} lacks or is wrong"
            ) from error

    def _described(self, key: str, picture: Any, rest: dict[str, Any]) -> Sample:
        name, which = PurePosixPath(key).name, set_of(key)
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


def set_of(key: str) -> str:
    """The first word of the name of a sample, which tells the set it is of."""
    return re.match(r"[a-z]*", PurePosixPath(key).name.lower())[0]


def open_tars(tars: Sequence[Path], *, places: str = "", on_corrupt: str = "refuse") -> TarReader:
    """A TarReader; the same one as long as the files are the same: both splits share it."""
    files = tuple((str(tar), stamp_of(tar)) for tar in tars)
    changed = stamp_of(Path(places).expanduser()) if places else None
    return _opened(files, places, changed, on_corrupt)


@lru_cache(maxsize=8)
def _opened(files: tuple, places: str, changed: tuple | None, on_corrupt: str) -> TarReader:
    return TarReader([Path(tar) for tar, _ in files], places=places, on_corrupt=on_corrupt)


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
