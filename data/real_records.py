"""The development images of $EO_DATA_DIR as records, cut as data/real_images.py cuts them.

UC Merced, its captions and its questions share one split by picture name, VHR-10 has its own. The
validation part is a block of what would be training data: training never sees it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from common_jax.files import read_json
from data.class_sets import normalise_class
from data.folders import class_files, existing
from data.gathering import STRICT, Gathering, Rules
from data.real_images import split_table
from data.record_boxes import RecordError, to_pixels
from data.record_files import rows
from data.records import Record, RecordSource
from data.splits import SPLITS

Rows = Iterator[tuple[str, dict]]


def _lines(folder: str, file: str) -> Callable[[Path, Gathering], Rows]:
    """Rows of a JSON lines file, `image` made relative to the root."""

    def read(root: Path, gathering: Gathering) -> Rows:
        for where, row in rows(root / folder / file, gathering):
            yield where, row | {"image": f"{folder}/{row.get('image')}"}

    return read


def _class_rows(root: Path, gathering: Gathering) -> Rows:
    names, files = class_files(root / "ucmerced")
    classes = tuple(map(normalise_class, names))
    for path, name in files:
        image = path.relative_to(root).as_posix()
        yield str(path), {"image": image, "class": normalise_class(name), "classes": classes}


def _detection_rows(root: Path, gathering: Gathering) -> Rows:
    """One row a picture and class, from the COCO file."""
    path = root / "nwpu_vhr10" / "annotations.json"
    content = read_json(path)
    names = {c["id"]: normalise_class(c["name"]) for c in content["categories"]}
    for image in content["images"]:
        found: dict[str, list] = {}
        for thing in content["annotations"]:
            if thing["image_id"] == image["id"]:
                found.setdefault(names[thing["category_id"]], []).append(thing["bbox"])
        shared = {"width": image["width"], "height": image["height"]}
        for kind, boxes in found.items():
            row = {"image": f"nwpu_vhr10/{image['file_name']}", "class": kind, "boxes": boxes}
            yield f"{path} image {image['id']} class {kind}", row | shared


def _caption(row: dict) -> Record:
    answers = tuple(text.strip() for text in row["captions"])
    return Record("", row["image"], "caption", answers=answers, category=row["class"])


def _vqa(row: dict) -> Record:
    answers = (str(row["answer"]).strip(),)
    return Record("", row["image"], "vqa", row["question"], answers, category=row["type"])


def _classification(row: dict) -> Record:
    answers = (row["class"],)
    return Record("", row["image"], "classification", answers=answers, classes=row["classes"])


def _grounding(row: dict) -> Record:
    kind, size = normalise_class(row["category"]), (row["width"], row["height"])
    boxes = (to_pixels(row["bbox_xyxy"], "pixel", size),)
    found = Record("", row["image"], "grounding", row["phrase"], boxes=boxes, size=size)
    return replace(found, labels=(kind,), category=kind)


def _detection(row: dict) -> Record:
    size, kind = (row["width"], row["height"]), row["class"]
    boxes = tuple(to_pixels(box, "xywh", size) for box in row["boxes"])
    found = Record("", row["image"], "detection", kind, boxes=boxes, size=size)
    return replace(found, labels=(kind,) * len(boxes), category=kind)


REAL: dict[str, tuple[Callable[[Path, Gathering], Rows], Callable[[dict], Record]]] = {
    "ucm_captions": (_lines("ucm_captions", "captions.jsonl"), _caption),
    "ucm_vqa": (_lines("ucm_vqa", "vqa.jsonl"), _vqa),
    "ucmerced": (_class_rows, _classification),
    "nwpu_vhr10_grounding": (_lines("nwpu_vhr10", "grounding_singletons.jsonl"), _grounding),
    "nwpu_vhr10_detection": (_detection_rows, _detection),
}


def read_real(
    name: str, split: str, *, root: str | os.PathLike = "", rules: Rules = STRICT
) -> RecordSource:
    """A split (train, val, test) of one of REAL. root: default $EO_DATA_DIR."""
    if name not in REAL:
        raise ValueError(f"no development set '{name}'; known: {', '.join(REAL)}")
    if split not in SPLITS:
        raise ValueError(f"no split '{split}'; known: {', '.join(SPLITS)}")
    root = root or os.environ.get("EO_DATA_DIR", "")
    if not root:
        raise FileNotFoundError(f"real:{name} needs root=DIR, or EO_DATA_DIR in the environment")
    folder = existing(root)
    table, gathering = split_table(folder), Gathering(f"real:{name}", rules)
    read, make = REAL[name]
    for number, (where, row) in enumerate(read(folder, gathering)):
        with gathering.reading(where):
            record = make(row)
            if record.image not in table:
                raise RecordError(f"there is no picture {folder / record.image}")
            if table[record.image] == split:
                image = str(folder / record.image)
                key = f"{name}-{number:05d}"
                record = replace(record, id=key, image=image, dataset=f"real:{name}", split=split)
                gathering.add(record, where)
    return gathering.finish()
