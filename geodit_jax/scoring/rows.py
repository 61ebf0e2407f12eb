"""Prediction files: one JSON object a line, checked before anything is counted.

A row holds all that scoring needs:

    id            str     the example; rows of one picture share `image` where it is given
    task          str     caption, grounding, detection, vqa, classification or chat
    prediction    str     the generated text
    dataset, category, question, image, codec: str, may be absent
    answers       [str]   caption: all references; vqa: accepted answers; classification: the class;
                          blank ones are dropped
    boxes         [[x0, y0, x1, y1]] true boxes in pixels of the picture; detection may have none
    size          [width, height] of the picture
    classes       [str]   classification: all classes
    labels        [str]   detection: class of each box, the same as `question`

Other fields (tokens, steps, seconds) are carried by the file and not looked at.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from geodit_jax.boxes import parse_boxes

NEEDED = {
    "caption": ("answers",),
    "vqa": ("answers",),
    "classification": ("answers",),
    "grounding": ("boxes", "size"),
    "detection": ("size", "question"),
    "chat": (),
}
TASKS = tuple(NEEDED)
TEXTS = ("id", "task", "prediction", "dataset", "category", "question", "image", "codec")
LISTS = ("answers", "labels", "classes")


@dataclasses.dataclass(frozen=True)
class Row:
    """One prediction beside its truth; `where` names its line in messages."""

    id: str
    task: str
    prediction: str
    where: str
    dataset: str = ""
    category: str = ""
    question: str = ""
    image: str = ""
    codec: str = ""
    answers: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    boxes: tuple[tuple[float, ...], ...] = ()
    size: tuple[float, float] | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What no second row may repeat; also the order in which rows are counted."""
        return (self.dataset, self.task, self.id, self.question, self.category)

    @property
    def picture(self) -> str:
        """The picture it belongs to, else the row itself."""
        return self.image or self.id


def read_rows(source: str | os.PathLike | Iterable[Mapping]) -> list[Row]:
    """Rows of a JSONL file, or of mappings, sorted so that their order in the source is no matter.

    ValueError names the line and the field for broken JSON, a missing or wrong field, an unknown
    task, a box that is not four finite numbers, or two rows of one example.
    """
    rows = [_read_row(value, where) for where, value in _read_values(source)]
    if not rows:
        raise ValueError(f"{_name(source)} holds no prediction")
    seen: dict[tuple, str] = {}
    for row in rows:
        if row.key in seen:
            raise ValueError(
                f"{row.where} and {seen[row.key]} are both {row.task} of id {row.id!r} "
                f"(dataset {row.dataset!r}, question {row.question!r}); remove one, or two "
                "predictions would count for one example"
            )
        seen[row.key] = row.where
    return sorted(rows, key=lambda row: row.key)


def _name(source) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else "the list of rows"


def _read_values(source) -> Iterator[tuple[str, object]]:
    if not isinstance(source, str | os.PathLike):
        yield from ((f"row {number}", value) for number, value in enumerate(source, 1))
        return
    with Path(source).open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{source}, line {number}"
            try:
                yield where, json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{where} is not JSON ({error}); the file may have been cut while it was "
                    "written: delete the line or predict again"
                ) from error


def _read_row(value, where: str) -> Row:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is a {type(value).__name__}; one JSON object a line is needed")
    task = value.get("task")
    if task is not None and task not in TASKS:
        raise ValueError(f"{where}: task is {task!r}; use one of {', '.join(TASKS)}")
    needed = ("id", "task", "prediction", *NEEDED.get(task, ()))
    missing = [name for name in needed if value.get(name) is None]
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}; a row of task {task} needs it")
    fields = {name: _text(value, name, where) for name in TEXTS}
    fields |= {name: _texts(value, name, where) for name in LISTS}
    fields["answers"] = tuple(answer for answer in fields["answers"] if answer.strip())
    boxes = tuple(_numbers(b, 4, "a box", where) for b in _list(value, "boxes", where))
    size = value.get("size")
    size = None if size is None else _numbers(size, 2, "size", where)
    row = Row(where=where, boxes=boxes, size=size, **fields)
    _check_task(row)
    return row


def _check_task(row: Row) -> None:
    if row.size is not None and min(row.size) <= 0:
        raise ValueError(f"{row.where}: size is {row.size}; width and height must be positive")
    if row.task == "grounding" and not row.boxes:
        raise ValueError(f"{row.where}: grounding needs a true box; `boxes` is empty")
    others = sorted(set(row.labels) - {row.question})
    if row.task == "detection" and others:
        raise ValueError(
            f"{row.where}: boxes of {', '.join(others)} in a row that asks for {row.question!r}; "
            "a detection row holds one class, named in `question`"
        )


def _text(value: Mapping, name: str, where: str) -> str:
    text = value.get(name)
    if text is None:
        return ""
    if name == "id" and isinstance(text, int) and not isinstance(text, bool):
        return str(text)
    if not isinstance(text, str):
        raise ValueError(f"{where}: {name} is {text!r:.60}; a text is needed")
    return text


def _list(value: Mapping, name: str, where: str) -> list:
    items = value.get(name)
    if items is None:
        return []
    if not isinstance(items, list | tuple):
        raise ValueError(f"{where}: {name} is {items!r:.60}; a list is needed")
    return list(items)


def _texts(value: Mapping, name: str, where: str) -> tuple[str, ...]:
    items = _list(value, name, where)
    for item in items:
        if not isinstance(item, str):
            raise ValueError(f"{where}: {name} holds {item!r:.60}; texts are needed")
    return tuple(items)


def _numbers(value, count: int, name: str, where: str) -> tuple[float, ...]:
    good = isinstance(value, list | tuple) and len(value) == count
    if good:
        good = all(
            isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
            for v in value
        )
    if not good:
        raise ValueError(f"{where}: {name} is {value!r:.60}; {count} finite numbers are needed")
    return tuple(float(v) for v in value)


def read_boxes(row: Row, codec: str | None = None) -> np.ndarray:
    """Boxes of the prediction, float64 [k, 4] in pixels of the picture; k = 0 if unreadable.

    The notation is that of the row, else `codec`, else guessed from the text.
    """
    return parse_boxes(row.prediction, row.size, row.codec or codec)
