"""The project's own format: one JSON record a line, read and written.

    {"id", "image", "task", "question", "answer" | "answers", "box" | "boxes", "box_format",
     "labels", "image_size": [w, h], "category", "classes", "conversations", "dataset", "split"}

Only `image` and `task` are needed, and what the task needs. {"text"} alone is plain text, as it
is. The other readers use `rows`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common_jax.files import atomic_path, read_json
from data.gathering import STRICT, Gathering, Rules
from data.record_boxes import RecordError, to_pixels
from data.records import Record, RecordSource


def rows(path: str | os.PathLike, gathering: Gathering) -> Iterator[tuple[str, dict]]:
    """(place, object) of each record of a JSON list or of JSON lines, whatever the suffix says.

    Raises FileNotFoundError; a line that is no JSON object is refused or skipped by the rules.
    """
    path = existing_file(path)
    with path.open(encoding="utf-8-sig") as file:
        first = file.read(64).lstrip()[:1]
    if first == "[":
        found = read_json(path)
        places = (f"{path} record {n}" for n in range(len(found)))
        pairs: Iterator = zip(places, found, strict=True)
    else:
        pairs = _lines(path, gathering)
    for where, row in pairs:
        if isinstance(row, dict):
            yield where, row
        else:
            gathering.refuse(where, f"a {type(row).__name__}, need a JSON object {{...}}")


def _lines(path: Path, gathering: Gathering) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path} line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    gathering.refuse(where, f"not valid JSON ({error})")
                    continue
                yield where, row


def existing_file(path: str | os.PathLike, what: str = "") -> Path:
    """The path. Raises FileNotFoundError saying what it should be."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file{f' ({what})' if what else ''}")
    return path


def texts(value: Any) -> tuple[str, ...]:
    """A text, a number, or a list of them, as texts without surrounding space."""
    if value is None:
        return ()
    values = value if isinstance(value, (list, tuple)) else [value]
    wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, (str, int, float))]
    if wrong:
        raise RecordError(f"{wrong[0]!r:.60} is no text")
    return tuple(str(v).strip() for v in values)


def picture_path(folder: Path, image: Any) -> str | None:
    """Where the picture of a record lies; None without one. A list of one picture is that one."""
    if isinstance(image, list):
        if len(image) > 1:
            raise RecordError(f"{len(image)} pictures; one per record is supported")
        image = image[0] if image else None
    if not image:
        return None
    if not isinstance(image, str):
        raise RecordError(f"image {image!r:.60} is no path")
    return image if image.startswith("scene:") else str(folder / image)


def _size(row: Mapping) -> tuple[int, int] | None:
    value = row.get("image_size", row.get("size"))
    if value is None:
        return None
    if len(value) != 2 or not all(isinstance(v, int) and v > 0 for v in value):
        raise RecordError(f"image_size {value!r:.60}: need [width, height] in pixels")
    return value[0], value[1]


def _boxes(row: Mapping) -> Sequence:
    if "box" in row and "boxes" in row:
        raise RecordError("both box and boxes are given; keep one")
    if row.get("box") is not None:
        return [row["box"]]
    found = row.get("boxes") or []
    if found and not isinstance(found[0], (list, tuple)):
        raise RecordError("boxes: need a list of boxes; a single one is called box")
    return found


def turns_of(value: Any) -> tuple[tuple[str, str], ...]:
    """((role, text), ...) of LLaVA conversations; `user` and `assistant` are other names."""
    other = {"user": "human", "assistant": "gpt"}
    return tuple((other.get(turn["from"], turn["from"]), turn["value"]) for turn in value or ())


def record_of(row: Mapping, name: str, folder: Path, gathering: Gathering) -> Record:
    """The record a JSON object describes. folder: what relative image paths start from."""
    if "answer" in row and "answers" in row:
        raise RecordError("both answer and answers are given; keep one")
    path = picture_path(folder, row.get("image"))
    size, found = _size(row), _boxes(row)
    box_format = row.get("box_format", "pixel")
    if found and size is None and path and box_format not in ("pixel", "xywh"):
        size = gathering.size_of(path)
    turns = turns_of(row.get("conversations"))
    plain = "text" in row and row.get("task", "text") == "text" and not (path or turns)
    return Record(
        id=str(row.get("id", name)),
        image=path,
        task="text" if plain else row["task"] if not turns else row.get("task", "chat"),
        question=str(row.get("question", "")).strip(),
        answers=(row["text"],) if plain else texts(row.get("answers", row.get("answer"))),
        boxes=tuple(to_pixels(box, box_format, size) for box in found),
        labels=texts(row.get("labels")),
        size=size,
        category=str(row.get("category", "")),
        classes=texts(row.get("classes")),
        conversations=turns,
        dataset=str(row.get("dataset", gathering.name)),
        split=str(row.get("split", "")),
    )


def read_records(
    path: str | os.PathLike,
    split: str = "",
    *,
    images: str | os.PathLike = "",
    rules: Rules = STRICT,
    name: str = "",
) -> RecordSource:
    """The records of a JSON list or JSON lines file.

    split: only those that say so, and those that name no split. images: the folder of relative
    picture paths (default: that of the file). Raises RecordError naming file and line.
    """
    path = existing_file(path)
    folder = Path(images).expanduser() if images else path.parent
    gathering = Gathering(name or path.stem, rules)
    for number, (where, row) in enumerate(rows(path, gathering)):
        if split and row.get("split") not in (None, "", split):
            continue
        with gathering.reading(where):
            record = record_of(row, f"{path.stem}-{number:06d}", folder, gathering)
            gathering.add(record, where)
    return gathering.finish()


def as_row(record: Record, folder: str | os.PathLike = "") -> dict[str, Any]:
    """A JSON object of a record; empty fields are left out. Pictures below `folder` relative."""
    if record.task == "text":
        known = {"dataset": record.dataset, "split": record.split}
        return {"id": record.id, "text": record.answers[0]} | {k: v for k, v in known.items() if v}
    image = record.image
    if image and folder and Path(image).is_relative_to(folder):
        image = Path(image).relative_to(folder).as_posix()
    row: dict[str, Any] = {"id": record.id, "image": image, "task": record.task}
    row |= {
        "question": record.question,
        "answers": list(record.answers),
        "labels": list(record.labels),
        "image_size": list(record.size or ()),
        "category": record.category,
        "classes": list(record.classes),
        "conversations": [{"from": role, "value": text} for role, text in record.conversations],
        "dataset": record.dataset,
        "split": record.split,
    }
    if record.boxes:
        row |= {"boxes": [list(box) for box in record.boxes], "box_format": "pixel"}
    return {key: value for key, value in row.items() if value or key in ("id", "image", "task")}


def write_records(path: str | os.PathLike, records: Sequence[Record]) -> None:
    """Writes JSON lines atomically; `read_records` of the file gives the same records."""
    folder = Path(path).parent
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(as_row(record, folder), ensure_ascii=False) + "\n")
