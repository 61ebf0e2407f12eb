"""Pictures with captions and metadata, for pretraining: random access whatever they are stored in.

A reader knows one way of storing: a folder of pictures, a CSV file beside pictures, WebDataset tars
(satellite_tars.py), or what `python -m data.prepare` wrote (shards.py). It has `len`, `name`,
`fingerprint`, `sample(i) -> Sample`. `SatelliteSource` makes examples of any of them.
"""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common_jax.files import sha256_file
from data.folders import ImageFolder, open_images
from data.images import ImageError, NamedBytes, decode_8bit
from data.transforms import METADATA_FIELDS, normalise_metadata
from data.wording import Wording, always, full_caption, sometimes

CAPTION = "a satellite image"
# Stand-ins for what is not known: their places become 0 after normalisation.
_NEUTRAL = dict(zip(METADATA_FIELDS, (0.0, 0.0, 1.0, 0.0, 2000.0, 1.0, 1.0), strict=True))
MAX_NAMED = 5


@dataclass(frozen=True)
class Sample:
    """One picture as it is stored.

    picture: the bytes of its file, or uint8 [H, W, 3]. fields: what is known of METADATA_FIELDS, in
    the units of `normalise_metadata`, gsd that of the stored picture.
    """

    id: str
    picture: bytes | np.ndarray
    wording: Wording = (always(CAPTION),)
    fields: Mapping[str, float] = field(default_factory=dict)

    def pixels(self) -> np.ndarray:
        """uint8 [H, W, 3]. Raises ImageError naming the sample."""
        if isinstance(self.picture, np.ndarray):
            return self.picture
        return decode_8bit(NamedBytes(self.picture, self.id))


def metadata_vector(fields: Mapping[str, float], scale: float = 1.0) -> np.ndarray:
    """float32 [7], normalised; 0 where a field is not known. scale: multiplies the gsd.

    Raises ValueError on a value that cannot be right and on a field that is none of the seven.
    """
    strange = sorted(fields.keys() - _NEUTRAL.keys())
    if strange:
        raise ValueError(f"metadata {', '.join(strange)}; known: {', '.join(METADATA_FIELDS)}")
    values = _NEUTRAL | {name: float(value) for name, value in fields.items()}
    values["gsd"] *= scale
    known = np.array([name in fields for name in METADATA_FIELDS], np.float32)
    return normalise_metadata(**values) * known


class SatelliteSource:
    """Examples: image uint8 [H, W, 3], caption, metadata float32 [7], wording, id.

    caption is complete; `wording.DrawCaption` leaves parts out. metadata is normalised, 0 where not
    known, its gsd that of the picture when its short side is resized to `side` pixels (0: as it is
    stored). rows: places in the reader. on_corrupt: "refuse" raises at a picture or a field that
    cannot be used, "skip" takes the next that can; `counts` tells how many there were.
    """

    task, classes = "satellite", ()

    def __init__(self, reader: Any, rows: range, *, side: int = 0, on_corrupt: str = "refuse"):
        if on_corrupt not in ("refuse", "skip"):
            raise ValueError(f"on_corrupt='{on_corrupt}' is not refuse or skip")
        if not len(rows):
            raise ValueError(f"'{reader.name}' is empty: no picture is left")
        self.reader, self.rows, self.side, self.skips = reader, rows, side, on_corrupt == "skip"
        self.name = reader.name
        self.fingerprint = f"{reader.fingerprint}[{rows.start}:{rows.stop}]{side}{on_corrupt}"
        self.counts: Counter[str] = Counter()
        self._broken: set[int] = set()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def native_side(self) -> int:
        """Short side of the first picture in pixels."""
        return min(self[0]["image"].shape[:2])

    def _example(self, row: int) -> dict[str, Any]:
        sample = self.reader.sample(row)
        image = sample.pixels()
        scale = min(image.shape[:2]) / self.side if self.side else 1.0
        return {
            "image": image,
            "caption": full_caption(sample.wording),
            "metadata": metadata_vector(sample.fields, scale),
            "wording": sample.wording,
            "id": sample.id,
        }

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = int(i)
        if not 0 <= i < len(self.rows):
            raise IndexError(f"picture {i} of {len(self.rows)} of '{self.name}'")
        for ahead in range(len(self.rows)):
            row = self.rows[(i + ahead) % len(self.rows)]
            try:
                return self._example(row)
            except (ValueError, KeyError) as error:
                if not self.skips:
                    raise
                self._count(row, error)
        raise ImageError(f"none of the {len(self.rows)} pictures of '{self.name}' can be used")

    def _count(self, row: int, error: Exception) -> None:
        if row in self._broken:
            return
        self._broken.add(row)
        self.counts["skipped"] += 1
        if self.counts["skipped"] <= MAX_NAMED:
            logging.warning("%s: skipped, the next is taken in its place: %s", self.name, error)


# ---------------------------------------------------------------------------------------- readers
class FolderReader:
    """Pictures of `folders.open_images`. described: the folder of a picture says what it shows."""

    def __init__(self, source: ImageFolder, described: bool = False):
        self.source, self.described = source, described
        self.name = "folder"
        self.fingerprint = f"{source.fingerprint}{'-described' * described}"

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, i: int) -> Sample:
        path = Path(self.source.items[i].path)
        wording = [always(CAPTION)]
        if self.described:
            wording.append(sometimes(f" of a {path.parent.name.replace('_', ' ')}", 0.1))
        return Sample(str(path), path.read_bytes(), tuple(wording))


class CsvReader:
    """A CSV file with the column `path`, and any of caption, longitude, latitude, gsd, cloud_cover,
    year, month, day, or date (2019-08-31). Paths are relative to the file; empty cells are unknown.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.name, self.fingerprint = self.path.stem, f"csv-{sha256_file(self.path)[:32]}"
        with self.path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            if "path" not in (table.fieldnames or ()):
                raise ValueError(
                    f"{self.path}: need a header with the column path, found "
                    f"{', '.join(table.fieldnames or ()) or 'nothing'}"
                )
            self.rows = list(table)

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, i: int) -> Sample:
        row, where = self.rows[i], f"{self.path} line {i + 2}"
        try:
            picture = (self.path.parent / row["path"]).read_bytes()
            fields = read_fields(row)
        except (OSError, ValueError) as error:
            raise ImageError(f"{where}: {error}") from error
        caption = (row.get("caption") or "").strip() or CAPTION
        return Sample(row["path"], picture, (always(caption),), fields)


def read_fields(row: Mapping[str, Any]) -> dict[str, float]:
    """What a row of a table or a JSON object says of METADATA_FIELDS; `date` is 2019-08-31..."""
    fields = {name: float(row[name]) for name in METADATA_FIELDS if row.get(name) not in (None, "")}
    if row.get("date"):
        fields |= read_date(str(row["date"]))
    return fields


def read_date(text: str) -> dict[str, float]:
    """Year, month and day of `2019-08-31` and of longer texts that begin so."""
    parts = text.strip()[:10].split("-")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise ValueError(f"date '{text:.40}': need YEAR-MONTH-DAY")
    return dict(zip(("year", "month", "day"), map(float, parts), strict=True))


# ----------------------------------------------------------------------------------------- opening
def open_reader(root: str, exclude: Sequence[str] = (), on_corrupt: str = "refuse") -> Any:
    """The reader of a CSV file or a folder of pictures, told by what lies there."""
    path = Path(root).expanduser()
    if path.suffix == ".csv" and path.is_file():
        return CsvReader(path)
    found = open_images("train", roots=root, exclude=exclude, holdout=0.0, on_corrupt=on_corrupt)
    return FolderReader(found)


def _part(reader: Any, split: str, holdout: float) -> range:
    first = len(reader) - int(np.ceil(holdout * len(reader)))
    return range(first) if split == "train" else range(first, len(reader))


def open_satellite(
    split: str,
    *,
    root: str,
    side: int = 0,
    holdout: float = 0.05,
    exclude: Sequence[str] = (),
    on_corrupt: str = "refuse",
) -> SatelliteSource:
    """Pictures with captions and metadata below `root`; the last `holdout` of them is "val".

    side: pixels the short side will be resized to, for the gsd. exclude: pictures of a folder that
    must not be seen, as in `open_images`.
    """
    if split not in ("train", "val"):
        raise ValueError(f"pictures for pretraining have no split '{split}'; known: train, val")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout={holdout} is not in [0, 1)")
    reader = open_reader(root, exclude, on_corrupt)
    return SatelliteSource(reader, _part(reader, split, holdout), side=side, on_corrupt=on_corrupt)
