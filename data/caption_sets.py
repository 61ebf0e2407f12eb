"""Readers of caption sets: RSICD, UCM-Captions, Sydney-Captions, NWPU-Captions, SkyScript, tars.

RSICD, UCM, Sydney   {"images": [{"filename", "split", "sentences": [{"raw"}, ...]}, ...]}
NWPU-Captions        {class: [{"filename", "split", "raw", "raw_1", ..., "raw_4"}, ...]}
SkyScript            CSV with filepath, title, title_multi_objects
webdataset           tar files of NAME.jpg with NAME.txt
"""

from __future__ import annotations

import csv
import os
from pathlib import Path, PurePosixPath

from common_jax.files import read_json
from data.gathering import STRICT, Gathering, Rules
from data.images import SUFFIXES, some_of
from data.record_boxes import RecordError
from data.record_files import existing_file, texts
from data.record_pictures import INSIDE, Finder, members, read_member
from data.records import Record, RecordSource
from data.splits import SPLITS

NWPU_KEYS = ("raw", "raw_1", "raw_2", "raw_3", "raw_4")
TRUSTING = Rules(pictures="trust")
"""For sets of millions of pictures: none is opened before it is used."""


def _split_named(row: dict) -> str:
    if row["split"] not in SPLITS:
        raise RecordError(f"split '{row['split']}' is none of {', '.join(SPLITS)}")
    return row["split"]


def read_karpathy_captions(
    path: str | os.PathLike,
    split: str,
    *,
    images: str | os.PathLike,
    name: str = "captions",
    rules: Rules = STRICT,
) -> RecordSource:
    """One record a picture, answers = its sentences. For RSICD, UCM-Captions, Sydney-Captions.

    images: the folder of the pictures, at any depth, also saved with another suffix.
    """
    content = read_json(existing_file(path, "the JSON file of the captions"))
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise RecordError(
            f"{path}: has no list 'images'; NWPU-Captions and other sets have readers of their own"
        )
    gathering, finder = Gathering(name, rules), Finder(images)
    for number, row in enumerate(content["images"]):
        where = f"{path} image {number}"
        with gathering.reading(where):
            if _split_named(row) == split:
                raw = [sentence["raw"] for sentence in row["sentences"]]
                gathering.add(
                    Record(
                        id=f"{name}-{row['filename']}",
                        image=finder.find(row["filename"]),
                        task="caption",
                        answers=texts(raw),
                        dataset=name,
                        split=split,
                    ),
                    where,
                )
    return gathering.finish()


def read_nwpu_captions(
    path: str | os.PathLike,
    split: str,
    *,
    images: str | os.PathLike,
    name: str = "nwpu_captions",
    rules: Rules = STRICT,
) -> RecordSource:
    """One record a picture; category = its class. images: the folder of the class folders."""
    content = read_json(existing_file(path, "dataset_nwpu.json"))
    if not isinstance(content, dict) or "images" in content:
        raise RecordError(
            f"{path}: need {{class: [pictures]}}; this looks like another caption set"
        )
    gathering, finder = Gathering(name, rules), Finder(images)
    for kind, listed in content.items():
        for number, row in enumerate(listed):
            where = f"{path} class {kind} picture {number}"
            with gathering.reading(where):
                if _split_named(row) == split:
                    gathering.add(
                        Record(
                            id=f"{name}-{row['filename']}",
                            image=finder.find(f"{kind}/{row['filename']}"),
                            task="caption",
                            answers=texts([row[key] for key in NWPU_KEYS]),
                            category=kind,
                            dataset=name,
                            split=split,
                        ),
                        where,
                    )
    return gathering.finish()


# -------------------------------------------------------------------------------------- SkyScript
def _places(folder: Path) -> dict[str, str]:
    """{first part of a file path: what to put before the path}, for folders and zip archives."""
    found = {path.name: f"{folder}/" for path in folder.iterdir() if path.is_dir()}
    for path in sorted(folder.glob("*.zip")):
        if path.stem not in found:
            inside = next(iter(members(path)), "")
            bare = PurePosixPath(inside).parts[:1] != (path.stem,)
            found[path.stem] = f"{path}{INSIDE}" + ("-" if bare else "")
    return found


def _skyscript_picture(places: dict[str, str], path: str, folder: Path) -> str:
    first, _, rest = path.partition("/")
    if first not in places:
        raise RecordError(
            f"no folder and no archive '{first}' in {folder} for {path}; it holds "
            f"{some_of(sorted(places)) or 'neither folders nor zip archives'}"
        )
    before = places[first]
    return f"{before[:-1]}{rest}" if before.endswith(f"{INSIDE}-") else f"{before}{path}"


def read_skyscript(
    path: str | os.PathLike,
    split: str = "train",
    *,
    images: str | os.PathLike,
    column: str = "title_multi_objects",
    limit: int = 0,
    rules: Rules = TRUSTING,
) -> RecordSource:
    """Captions of a SkyScript CSV file; a file is one split. limit: only the first rows.

    images: the folder that holds images2, images3, ... as folders or as zip archives. Rows whose
    `column` is empty take `title`, and are counted.
    """
    folder, gathering = Path(images).expanduser(), Gathering("skyscript", rules)
    places = _places(folder)
    with existing_file(path, "the CSV file").open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        wanted = {"filepath", column}
        if not wanted <= set(reader.fieldnames or ()):
            raise RecordError(
                f"{path}: need the columns {', '.join(sorted(wanted))}, found "
                f"{', '.join(reader.fieldnames or ()) or 'none'}"
            )
        for row in reader:
            where = f"{path} line {reader.line_num}"
            with gathering.reading(where):
                caption = (row[column] or "").strip()
                if not caption and row.get("title"):
                    caption = row["title"].strip()
                    gathering.counts[f"{column} empty, title taken"] += 1
                record = Record(
                    id=row["filepath"],
                    image=_skyscript_picture(places, row["filepath"], folder),
                    task="caption",
                    answers=(caption,),
                    dataset="skyscript",
                    split=split,
                )
                gathering.add(record, where)
            if limit and len(gathering) >= limit:
                break
    return gathering.finish()


def read_tar_captions(
    folder: str | os.PathLike, split: str = "train", *, rules: Rules = TRUSTING
) -> RecordSource:
    """Captions of tar files (webdataset): NAME.txt beside NAME.jpg in the archive.

    folder: a tar file, or a folder whose tar files are read in order of names.
    """
    root = Path(folder).expanduser()
    archives = [root] if root.is_file() else sorted(root.glob("*.tar"))
    if not archives:
        raise FileNotFoundError(f"{root} holds no tar files")
    gathering = Gathering(root.stem, rules)
    for archive in archives:
        names = members(archive)
        known = set(names)
        for picture in (n for n in names if PurePosixPath(n).suffix.lower() in SUFFIXES):
            where = f"{archive} member {picture}"
            with gathering.reading(where):
                text = str(PurePosixPath(picture).with_suffix(".txt"))
                if text not in known:
                    raise RecordError(f"no {text} beside it")
                caption = read_member(f"{archive}{INSIDE}{text}").decode("utf-8").strip()
                record = Record(
                    id=f"{archive.stem}/{picture}",
                    image=f"{archive}{INSIDE}{picture}",
                    task="caption",
                    answers=(caption,),
                    dataset=root.stem,
                    split=split,
                )
                gathering.add(record, where)
    return gathering.finish()
