"""RSVQA, low and high resolution: three JSON files a split, answers in the official bins.

    {LR|USGS}_split_{train|val|test|test_phili}_{questions|answers|images}.json, pictures IMG_ID.tif

Entries of other splits are stubs with `active: false`. Test set 2 of the high resolution set
(Philadelphia) is the split `test_phili`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from common_jax.files import read_json
from data.gathering import STRICT, Gathering, Rules
from data.record_boxes import RecordError
from data.record_pictures import Finder
from data.records import Record, RecordSource

PREFIX = {"lr": "LR", "hr": "USGS"}
SPLITS = {"lr": ("train", "val", "test"), "hr": ("train", "val", "test", "test_phili")}


def _bins(number: float, unit: str) -> str:
    """0 | between 0 and 10 | ... | more than 1000, with the unit behind each number."""
    if number <= 0:
        return f"0{unit}"
    for low, high in ((0, 10), (10, 100), (100, 1000)):
        if number <= high:
            return f"between {low}{unit} and {high}{unit}"
    return f"more than 1000{unit}"


def bin_area(answer: str) -> str:
    """The bin of an area such as `1234m2`. Raises RecordError when the text is no area."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*m2\s*", answer)
    if not found:
        raise RecordError(f"area answer '{answer:.40}': need a number and m2")
    return _bins(float(found[1]), "m2")


def bin_count(answer: str) -> str:
    """The bin of a count. Raises RecordError when the text is no number."""
    if not re.fullmatch(r"\s*\d+\s*", answer):
        raise RecordError(f"count answer '{answer:.40}': need a number")
    return _bins(int(answer), "")


BINS: dict[str, dict[str, Callable[[str], str]]] = {
    "lr": {"count": bin_count},
    "hr": {"area": bin_area},
}


def _active(root: Path, which: str, split: str, part: str) -> list[dict]:
    """The entries of one file that belong to the split."""
    path = root / f"{PREFIX[which]}_split_{split}_{part}.json"
    if not path.is_file():
        there = sorted(p.name for p in root.glob("*_split_*_questions.json"))
        raise FileNotFoundError(
            f"{path} is not a file; {root} has {', '.join(there) or 'no question files of RSVQA'}"
        )
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(part), list):
        raise RecordError(f"{path}: has no list '{part}'")
    return [entry for entry in content[part] if entry.get("active")]


def read_rsvqa(
    root: str | os.PathLike,
    split: str,
    *,
    which: str = "lr",
    images: str | os.PathLike = "",
    binned: bool = True,
    rules: Rules = STRICT,
) -> RecordSource:
    """One record a question: category = its type, answers in the official bins.

    which: "lr" (counts are binned) or "hr" (areas are). images: the folder of IMG_ID.tif, default
    anywhere below root. binned=False keeps the exact numbers.
    """
    if which not in PREFIX:
        raise ValueError(f"which='{which}' is not lr or hr")
    if split not in SPLITS[which]:
        raise ValueError(f"RSVQA {which} has no split '{split}'; known: {', '.join(SPLITS[which])}")
    root = Path(root).expanduser()
    questions = _active(root, which, split, "questions")
    answers = {a["question_id"]: a["answer"] for a in _active(root, which, split, "answers")}
    known = {entry["id"] for entry in _active(root, which, split, "images")}
    finder, name = Finder(images or root), f"rsvqa_{which}"
    gathering = Gathering(name, rules)
    for entry in questions:
        where = f"{PREFIX[which]}_split_{split}_questions.json question {entry.get('id')}"
        with gathering.reading(where):
            if entry["id"] not in answers:
                raise RecordError("no active answer belongs to it")
            if entry["img_id"] not in known:
                raise RecordError(f"its picture {entry['img_id']} is not in the split {split}")
            answer, kind = str(answers[entry["id"]]), entry["type"]
            gathering.add(
                Record(
                    id=f"{name}-{split}-{entry['id']}",
                    image=finder.find(f"{entry['img_id']}.tif"),
                    task="vqa",
                    question=entry["question"].strip(),
                    answers=(BINS[which].get(kind, str)(answer) if binned else answer,),
                    category=kind,
                    dataset=name,
                    split=split,
                ),
                where,
            )
    return gathering.finish()
