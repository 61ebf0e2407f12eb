"""Pictures with captions and metadata, for pretraining: random access whatever they are stored in.

A reader knows one way of storing: a folder of pictures, a CSV file beside pictures, WebDataset tars
(satellite_tars.py), or what `python -m data.prepare` wrote (shards.py). It has `len`, `name`,
`fingerprint`, `sample(i) -> Sample` and `problems`: what is wrong with what was left out on
opening. `SatelliteSource` makes examples of any of them.
"""

from __future__ import annotations

import csv
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common_jax.files import sha256_file, sha256_json
from data.folders import ImageFolder, is_excluded, open_images
from data.images import ImageError
from data.records import mix
from data.satellite_sample import CAPTION, Sample, metadata_vector, read_fields
from data.satellite_tars import find_tars, open_tars
from data.shards import PackedExamples, is_prepared, split_folder
from data.tar_index import stamp_of
from data.wording import always, compose, full_caption, read_wording, sometimes

TOO_MANY, TOO_SOON = 0.1, 1000
"""Skipping ends when more than this share of what was read is bad, after so many were read."""


class SatelliteSource:
    """Examples: image uint8 [H, W, 3], caption, metadata float32 [7], wording, id.

    caption is complete; `wording.DrawCaption` leaves parts out. metadata is normalised, 0 where not
    known, its gsd that of the picture when its short side is resized to `side` pixels (0: as it is
    stored). rows: places in the reader. on_corrupt: "refuse" raises at a picture or a field that
    cannot be used, "skip" takes the next that can, says how many there were at the 1st, 10th,
    100th..., and raises ImageError when it is more than TOO_MANY of what this process read. Errors
    of the operating system (OSError) are never skipped.
    """

    task, classes = "satellite", ()

    def __init__(
        self, reader: Any, rows: Sequence[int], *, side: int = 0, on_corrupt: str = "refuse"
    ):
        if on_corrupt not in ("refuse", "skip"):
            raise ValueError(f"on_corrupt='{on_corrupt}' is not refuse or skip")
        if not len(rows):
            raise ValueError(f"'{reader.name}' is empty: no picture is left")
        self.reader, self.rows, self.side = reader, rows, side
        self.name = reader.name
        self.on_corrupt = on_corrupt
        self.counts: Counter[str] = Counter()
        self._broken: set[int] = set()

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def fingerprint(self) -> str:
        chosen = sha256_json(list(self.rows))[:16]
        return f"{self.reader.fingerprint}[{chosen}] gsd at {self.side} px, {self.on_corrupt}"

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
        self.counts["read"] += 1
        for ahead in range(len(self.rows)):
            row = self.rows[(i + ahead) % len(self.rows)]
            if row not in self._broken:
                try:
                    return self._example(row)
                except (ValueError, KeyError) as error:
                    if self.on_corrupt == "refuse":
                        raise
                    self._count(row, error)
            if not ahead:  # those behind it are read in place of this one, and count when asked for
                self._count_bad()
        raise ImageError(f"none of the {len(self.rows)} pictures of '{self.name}' can be used")

    def _count(self, row: int, error: Exception) -> None:
        """Says the running count: in a worker process nobody else would."""
        self._broken.add(row)
        self.counts["skipped"] += 1
        count = self.counts["skipped"]
        if set(str(count)[1:]) <= {"0"} and str(count)[0] == "1":
            many = "picture is" if count == 1 else "pictures are"
            logging.warning(
                "%s: %d %s skipped, the next taken in place; now %s", self.name, count, many, error
            )

    def _count_bad(self) -> None:
        self.counts["bad"] += 1
        read, bad = self.counts["read"], self.counts["bad"]
        if read >= TOO_SOON and bad > TOO_MANY * read:
            raise ImageError(
                f"'{self.name}': {bad} of {read} pictures read cannot be used, more than "
                f"{TOO_MANY:.0%}; that is no accident. Copy the set again, or prepare it "
                "(data.prepare --on-corrupt=skip): its manifest names what is wrong"
            )


# ---------------------------------------------------------------------------------------- readers
class FolderReader:
    """Pictures of `folders.open_images`. described: the folder of a picture says what it shows."""

    def __init__(self, source: ImageFolder, root: Path, described: bool = False):
        self.source, self.described = source, described
        self.name, self.problems = root.name, source.problems
        self.prefix = os.path.join(root, "")
        self.fingerprint = f"{source.fingerprint}{'-described' * described}"

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, i: int) -> Sample:
        path = self.source.items[i].path
        pieces = [always(CAPTION)]
        if self.described:
            shown = os.path.basename(os.path.dirname(path)).replace("_", " ")
            pieces.append(sometimes(f" of a {shown}", 0.1))
        with open(path, "rb", buffering=0) as file:
            picture = file.read()
        name = path.removeprefix(self.prefix).replace(os.sep, "/")
        return Sample(name, picture, compose(*pieces))


class CsvReader:
    """A CSV file with the column `path`, and any of caption, longitude, latitude, gsd, cloud_cover,
    year, month, day, or date (2019-08-31). Paths are relative to the file; empty cells are unknown.
    """

    problems: Sequence[str] = ()

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.name = self.path.stem
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

    @cached_property
    def fingerprint(self) -> str:
        """Of the file, and of the sizes and times of its pictures."""
        with ThreadPoolExecutor(8) as pool:  # a disk far away answers several at once
            marks = list(pool.map(stamp_of, [self.path.parent / name for name in self.names]))
        return f"csv-{sha256_json([sha256_file(self.path), marks])[:32]}"

    @property
    def names(self) -> list[str]:
        return [row["path"] for row in self.rows]

    def sample(self, i: int) -> Sample:
        row, where = self.rows[i], f"{self.path} line {i + 2}"
        try:
            picture = (self.path.parent / row["path"]).read_bytes()
            fields = read_fields(row)
        except (FileNotFoundError, IsADirectoryError, ValueError) as error:
            raise ImageError(f"{where}: {error}") from error
        caption = (row.get("caption") or "").strip() or CAPTION
        return Sample(row["path"], picture, compose(always(caption)), fields)


class PreparedReader:
    """What data.prepare wrote of the kind "satellite"; its manifest names what was left out."""

    problems: Sequence[str] = ()

    def __init__(self, folder: Path):
        self.examples = PackedExamples(folder, "satellite")
        manifest = self.examples.manifest
        self.name, self.fingerprint = manifest.name, manifest.fingerprint

    def __len__(self) -> int:
        return len(self.examples)

    def sample(self, i: int) -> Sample:
        header, parts = self.examples[i]
        wording = read_wording(header["wording"])
        return Sample(header["id"], parts["picture"], wording, header["fields"])


# ----------------------------------------------------------------------------------------- opening
def open_reader(
    root: str | Path,
    *,
    exclude: Sequence[str] = (),
    places: str = "",
    described: bool = False,
    on_corrupt: str = "refuse",
) -> Any:
    """The reader of what lies at `root`: a prepared set, a CSV file, tars, or a folder of pictures.

    Tars: a file, a folder of them, `DIR/a-{000..365}.tar`, or a .txt file with such lines.
    exclude: pictures of a folder that must not be seen, as in `open_images`. places: the CSV file
    with the polygons of fMoW. described: captions of a folder are made of the names of its folders.
    """
    path = Path(root).expanduser()
    if path.is_dir() and is_prepared(path):
        return PreparedReader(path)
    if path.suffix == ".csv":
        return CsvReader(path)
    tars = find_tars(str(root))
    if tars:
        return open_tars(tars, places=places, on_corrupt=on_corrupt)
    found = open_images("train", roots=path, exclude=exclude, holdout=0.0, on_corrupt=on_corrupt)
    return FolderReader(found, path, described)


def kept_rows(reader: Any, exclude: Sequence[str]) -> Sequence[int]:
    """Places of the samples that `exclude` does not name, by file name or by the end of the path.

    Raises ValueError where names are not known before the pictures are read.
    """
    if not exclude or isinstance(reader, FolderReader):  # a folder has left them out
        return range(len(reader))
    if isinstance(reader, PreparedReader) or any(e.startswith("sha256:") for e in exclude):
        raise ValueError(
            f"'{reader.name}' cannot leave out pictures after the fact, nor by their content; give "
            "the list to data.prepare (--exclude) and prepare a folder of pictures"
        )
    names = frozenset(exclude)
    return [i for i, name in enumerate(reader.names) if not is_excluded(Path(name), names)]


def _open_one(split: str, root: str, holdout: float, side: int, options: dict) -> SatelliteSource:
    known = {"side": side, "on_corrupt": options["on_corrupt"]}
    parts = [name for name in ("train", "val") if is_prepared(Path(root).expanduser() / name)]
    if parts:
        reader = PreparedReader(split_folder(root, split if "val" in parts else "train"))
    else:
        reader = open_reader(root, **options)
    if "val" in parts:
        return SatelliteSource(reader, kept_rows(reader, options["exclude"]), **known)
    rows = kept_rows(reader, options["exclude"])
    first = len(rows) - int(np.ceil(holdout * len(rows)))
    return SatelliteSource(reader, rows[:first] if split == "train" else rows[first:], **known)


def open_satellite(
    split: str,
    *,
    root: str | Mapping[str, float],
    side: int = 0,
    holdout: float = 0.05,
    exclude: Sequence[str] = (),
    places: str = "",
    on_corrupt: str = "refuse",
) -> Any:
    """Pictures with captions and metadata at `root`, see `open_reader`.

    root: several are joined by commas that no braces hold: each picture comes once. {root: weight}:
    they are interleaved at this ratio, see `records.mix`.
    split: "train" or "val": the prepared folders of these names below root, else the last `holdout`
    of all (of `train`, where that stands alone) in the order they are stored is "val". side: pixels
    the short side will be resized to, for the gsd.
    """
    if split not in ("train", "val"):
        raise ValueError(f"pictures for pretraining have no split '{split}'; known: train, val")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout={holdout} is not in [0, 1)")
    options = {"exclude": tuple(exclude), "places": places, "on_corrupt": on_corrupt}
    weights = list(root.values()) if isinstance(root, Mapping) else None
    roots = [part for part in re.split(r",(?![^{}]*\})", root) if part] if weights is None else root
    if not roots:
        raise ValueError("nothing to read: name a folder, a CSV file, tars or a prepared set")
    return mix([_open_one(split, part, holdout, side, options) for part in roots], weights)
