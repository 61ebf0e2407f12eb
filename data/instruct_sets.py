"""Instruction sets: LLaVA conversations, GeoChat-Instruct, GeoChat-Bench.

    conversations   [{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}]
    GeoChat-Bench   JSON lines {"question_id", "image" | "image_id", "text" | "question",
                    "ground_truth", "type", ...}

Text is kept as it is, boxes in it included; `<image>` is inserted where a set leaves it out, and
counted. MMRS-1M, which has a layout of its own: data/mmrs.py.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.class_sets import normalise_class
from data.gathering import STRICT, Gathering, Rules
from data.record_boxes import Box, RecordError, to_pixels
from data.record_files import existing_file, picture_path, rows, texts, turns_of
from data.record_pictures import Finder
from data.records import Record, RecordSource

BENCH_TASKS = {
    "aid": "classification",
    "ucmerced": "classification",
    "lrben": "vqa",
    "hrben": "vqa",
    "referring": "grounding",
    "region_captioning": "chat",
    "grounding_description": "chat",
}


def read_conversations(
    path: str | os.PathLike,
    split: str = "train",
    *,
    images: str | os.PathLike = "",
    name: str = "",
    rules: Rules = STRICT,
) -> RecordSource:
    """Chat records of a LLaVA JSON list or JSON lines. Records without image are kept.

    images: the folder of the pictures, default that of the file. An id that occurs again, as in
    several public sets, gets the number of its record behind it. Raises RecordError on more than
    one placeholder or picture, and on turns that do not alternate.
    """
    path = existing_file(path, "a file of conversations")
    folder = Path(images).expanduser() if images else path.parent
    gathering = Gathering(name or path.stem, rules)
    for number, (where, row) in enumerate(rows(path, gathering)):
        with gathering.reading(where):
            key = str(row.get("id", f"{path.stem}-{number:06d}"))
            record = Record(
                id=f"{key}#{number}" if key in gathering else key,
                image=picture_path(folder, row.get("image")),
                task="chat",
                conversations=turns_of(row["conversations"]),
                dataset=gathering.name,
                split=split,
            )
            gathering.add(record, where)
    return gathering.finish()


# ---------------------------------------------------------------------------------- GeoChat-Bench
def turned_box(box: Box, degrees: float) -> Box:
    """The upright box around a box turned about its centre; pixels."""
    x0, y0, x1, y1 = box
    c, s = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    width, height = c * (x1 - x0) + s * (y1 - y0), s * (x1 - x0) + c * (y1 - y0)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _box_of(value: Any, box_format: str, size: tuple[int, int]) -> Box:
    """A box given as `{<x0><y0><x1><y1>|<angle>}` (hundredths), four numbers, or four corners."""
    if isinstance(value, str):
        found = [float(v) for v in re.findall(r"<\s*(-?\d+(?:\.\d+)?)\s*>", value)]
        if len(found) not in (4, 5):
            raise RecordError(f"'{value:.60}': need a box {{<x0><y0><x1><y1>|<angle>}}")
        box = to_pixels(found[:4], "int100", size)
        return turned_box(box, found[4]) if len(found) == 5 else box
    if len(value) == 4 and all(isinstance(v, (int, float)) for v in value):
        return to_pixels(value, box_format, size)
    flat = [v for corner in value for v in (corner if isinstance(corner, Sequence) else [corner])]
    if len(flat) != 8:
        raise RecordError(f"{value!r:.80}: need four numbers or four corners")
    corners = [min(flat[::2]), min(flat[1::2]), max(flat[::2]), max(flat[1::2])]
    return to_pixels(corners, box_format, size)


def _boxes_of(value: Any, box_format: str, size: tuple[int, int]) -> tuple[Box, ...]:
    """One box, or a list of them."""
    if isinstance(value, str):
        parts = re.findall(r"\{[^}]*\}", value) or [value]
        return tuple(_box_of(part, box_format, size) for part in parts)
    depth = 0
    inner = value
    while isinstance(inner, Sequence) and inner:
        inner, depth = inner[0], depth + 1
    single = depth == 1 or (depth == 2 and len(value) == 4 and len(value[0]) == 2)
    return tuple(_box_of(part, box_format, size) for part in ([value] if single else value))


def _bench_record(row: dict, task: str, image: str, box_format: str, g: Gathering) -> Record:
    ask, truth = row.get("question", row.get("text")), row.get("ground_truth")
    if ask is None:
        raise RecordError("neither question nor text is given")
    record = Record(
        id=f"{g.name}-{row['question_id']}",
        image=image,
        task=task,
        question=str(ask).strip(),
        category=str(row.get("type", row.get("category", ""))),
        dataset=str(row.get("dataset", g.name)),
        split="test",
    )
    if task == "grounding":
        size = g.size_of(image)
        return replace(record, boxes=_boxes_of(truth or [], box_format, size), size=size)
    if task == "classification":
        return replace(record, answers=tuple(normalise_class(t) for t in texts(truth)))
    if task == "chat":
        turns = (("human", record.question),) + ((("gpt", str(truth)),) if truth else ())
        return replace(record, question="", conversations=turns)
    return replace(record, answers=texts(truth))


def read_geochat_bench(
    path: str | os.PathLike,
    *,
    images: str | os.PathLike,
    task: str = "",
    box_format: str = "int100",
    rules: Rules = STRICT,
) -> RecordSource:
    """One file of GeoChat-Bench. task: chosen by the file name where that is a published one.

    box_format: how boxes given as numbers are meant; those in text are hundredths. Turned boxes
    become the upright box around them. Class names are normalised.
    """
    path = existing_file(path, "JSON lines of GeoChat-Bench")
    task = task or BENCH_TASKS.get(path.stem.lower(), "")
    if not task:
        raise ValueError(f"{path}: no published name ({', '.join(BENCH_TASKS)}); set task=...")
    gathering, finder = Gathering(f"geochat_{path.stem.lower()}", rules), Finder(images)
    for where, row in rows(path, gathering):
        with gathering.reading(where):
            if "image" not in row and "image_id" not in row:
                raise RecordError("neither image nor image_id is given")
            image = finder.find(str(row.get("image", row.get("image_id"))))
            gathering.add(_bench_record(row, task, image, box_format, gathering), where)
    source = gathering.finish()
    if task == "classification":
        classes = tuple(sorted({a for r in source.records for a in r.answers}))
        source.records = [replace(record, classes=classes) for record in source.records]
    return source
