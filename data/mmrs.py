"""MMRS-1M as distributed: data/{caption,classification,detection,RSVG,VQA} and data/json.

    {"image": "data/...", "conversations": [{"from", "value"}, ...]}   without `<image>`

Boxes in its text are parts of the side of the padded square with two decimals, so that a box read
from it is off by up to half a hundredth of the side. Set names say "trainval": its NWPU, UC Merced
and WHU pictures are also those of evaluation sets, see `record_pictures.digests`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from data.class_sets import normalise_class
from data.folders import existing
from data.gathering import Gathering, Rules
from data.record_boxes import Box, RecordError, to_pixels
from data.record_files import rows, turns_of
from data.records import Record, RecordSource

PARTS = ("caption", "classification", "detection", "RSVG", "VQA")
NOT_OPTICAL = ("hrsid", "sarv2", "ssdd", "hit-uav", "ir_", "infrared_ship")
ROUNDED = Rules(boxes="fix")
"""Two decimals leave boxes without area and boxes just beyond the frame."""

_NUMBERS = r"\[\s*([\d.,;\s]+?)\s*\]"
_FOUND = re.compile(r"<p>\s*(\d+)\s+(.+?)\s*</p>\s*" + _NUMBERS)
_ASKED = re.compile(r"\s*answer (?:the question )?using a single word or phrase\.?\s*$", re.I)


def is_optical(name: str) -> bool:
    """False for the detection sets of radar and infrared pictures, by folder or file name."""
    return not name.lower().startswith(NOT_OPTICAL)


def _files(root: Path, part: str, sensors: str, gathering: Gathering) -> list[Path]:
    """The files of a part. Whole detection sets of other sensors are left out and counted."""
    folder = existing(root / "json" / part)
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no JSON files")
    if part != "detection" or sensors == "all":
        return files
    kept = [p for p in files if all(map(is_optical, (p.parent.name, p.stem)))]
    if len(kept) < len(files):
        gathering.counts["files not optical"] += len(files) - len(kept)
    return kept


def _picture(root: Path, row: dict) -> str:
    """`data/` in front of a path is the root itself."""
    return str(root / str(row["image"]).removeprefix("./").removeprefix("data/"))


def _pairs(turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    roles = [role for role, _ in turns]
    if not turns or roles != ["human", "gpt"] * (len(turns) // 2):
        raise RecordError(f"turns {roles[:4]}: need human and gpt in turn")
    said = [text.replace("<image>", "").strip() for _, text in turns]
    return list(zip(said[::2], said[1::2], strict=True))


def _square_boxes(text: str, size: tuple[int, int]) -> tuple[Box, ...]:
    """Boxes separated by `;`, four numbers each, of the padded square."""
    return tuple(to_pixels(part.split(","), "unit2", size) for part in text.split(";") if part)


def _caption(pairs, base: Record, gathering: Gathering) -> Iterator[Record]:
    yield replace(base, task="caption", answers=tuple(answer for _, answer in pairs))


def _classification(pairs, base: Record, gathering: Gathering) -> Iterator[Record]:
    for _, answer in pairs:
        yield replace(base, task="classification", answers=(normalise_class(answer.rstrip(".")),))


def _vqa(pairs, base: Record, gathering: Gathering) -> Iterator[Record]:
    for question, answer in pairs:
        yield replace(base, task="vqa", question=_ASKED.sub("", question), answers=(answer,))


def _grounding(pairs, base: Record, gathering: Gathering) -> Iterator[Record]:
    """From the pairs box -> text, which hold the bare expression; every text -> box pair is the
    other direction of one of them."""
    size = gathering.size_of(base.image)
    for question, answer in pairs:
        found = re.search(r":\s*" + _NUMBERS + r"\s*$", question)
        if not found:
            gathering.counts["text to box, the other direction"] += 1
            continue
        boxes = _square_boxes(found[1], size)
        yield replace(base, task="grounding", question=answer.rstrip("."), boxes=boxes, size=size)


def singular(words: str, number: int) -> str:
    """The class of `13 ships` is `ship`: regular English plurals lose their ending."""
    words = normalise_class(words)
    if number == 1 or not words.endswith("s") or words.endswith(("ss", "us")):
        return words
    if words.endswith("ies"):
        return f"{words[:-3]}y"
    return words[:-2] if words.endswith(("ses", "xes", "ches", "shes")) else words[:-1]


def _detection(pairs, base: Record, gathering: Gathering) -> Iterator[Record]:
    size = gathering.size_of(base.image)
    for _, answer in pairs:
        found = _FOUND.findall(answer)
        if not found:
            raise RecordError(f"answer '{answer:.60}': need <p>NUMBER CLASS</p>[boxes]")
        for number, kind, numbers in found:
            boxes = _square_boxes(numbers, size)
            if len(boxes) != int(number):
                raise RecordError(f"'{kind}': says {number}, lists {len(boxes)} boxes")
            kind = singular(kind, len(boxes))
            labels = (kind,) * len(boxes)
            yield replace(
                base, task="detection", question=kind, boxes=boxes, labels=labels, size=size
            )


AS_TASK = {"caption": _caption, "classification": _classification, "detection": _detection,
           "RSVG": _grounding, "VQA": _vqa}  # fmt: skip


def _records(row: dict, part: str, form: str, base: Record, gathering: Gathering):
    turns = turns_of(row["conversations"])
    if form == "chat":
        return [replace(base, conversations=turns)]
    found = list(AS_TASK[part](_pairs(turns), base, gathering))
    return [replace(r, id=f"{r.id}-{k}" if len(found) > 1 else r.id) for k, r in enumerate(found)]


def _with_classes(source: RecordSource) -> RecordSource:
    """Fills in the classes of each classification set: those that occur in it."""
    found: dict[str, set[str]] = {}
    for record in source.records:
        if record.task == "classification":
            found.setdefault(record.dataset, set()).update(record.answers)
    classes = {name: tuple(sorted(names)) for name, names in found.items()}
    source.records = [
        replace(r, classes=classes[r.dataset]) if r.dataset in classes else r
        for r in source.records
    ]
    return source


def read_mmrs(
    root: str | os.PathLike,
    *,
    parts: Sequence[str] = PARTS,
    sensors: str = "optical",
    form: str = "chat",
    rules: Rules = ROUNDED,
) -> RecordSource:
    """MMRS-1M. root: its folder `data`, or the one that holds it.

    sensors: "optical" leaves out radar and infrared detection sets, "all" keeps them. form: "chat"
    gives conversations as distributed with `<image>` inserted; "task" gives caption,
    classification, detection, grounding and vqa records with boxes in pixels, so that they can be
    asked and answered in any notation.
    """
    wrong = [part for part in parts if part not in PARTS]
    if wrong or sensors not in ("optical", "all") or form not in ("chat", "task"):
        raise ValueError(
            f"parts={list(parts)}, sensors={sensors}, form={form}: need parts of "
            f"{', '.join(PARTS)}, sensors optical or all, form chat or task"
        )
    root = existing(root)
    root = root / "data" if (root / "data" / "json").is_dir() else root
    gathering = Gathering("mmrs", rules)
    for part in parts:
        for path in _files(root, part, sensors, gathering):
            for number, (where, row) in enumerate(rows(path, gathering)):
                with gathering.reading(where):
                    inside = path.relative_to(root / "json").with_suffix("").as_posix()
                    base = Record(
                        id=f"mmrs-{inside}-{number:06d}",
                        image=_picture(root, row),
                        task="chat",
                        dataset=f"mmrs-{inside}",
                        split="train",
                    )
                    for record in _records(row, part, form, base, gathering):
                        gathering.add(record, where)
    return _with_classes(gathering.finish())
