"""Records: one picture with one task in words, random access to many of them, and mixtures.

Every reader of vision-language data ends here, through `data/gathering.py`, which checks what it
reads. Boxes are (x0, y0, x1, y1) in pixels of the stored picture, whatever the file said.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from data.folders import fingerprint_of
from data.images import some_of
from data.record_boxes import Box, RecordError
from data.record_pictures import mark_of, read_picture

TASKS = ("caption", "grounding", "detection", "vqa", "classification", "chat", "text")
LONGEST_CYCLE = 10_000_000
MOST_HELD = 0.1
"""Share of a set without splits that is held out of training at most."""


@dataclass(frozen=True, slots=True)
class Record:
    """One question about one picture (or about none).

    caption: answers = all references. grounding: question = the expression, boxes = its targets.
    detection: question = a class, boxes = all of that class, labels = class per box. vqa: question,
    answers, category = question type. classification: answers = (class,), classes = all of them.
    chat: conversations = ((role, text), ...). text: answers = (what is to be read,), no picture.
    size is (width, height) of the stored picture.
    """

    id: str
    image: str | None
    task: str
    question: str = ""
    answers: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    labels: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    category: str = ""
    classes: tuple[str, ...] = ()
    conversations: tuple[tuple[str, str], ...] = ()
    dataset: str = ""
    split: str = ""


# ---------------------------------------------------------------------------------------- checks
def check_record(record: Record, *, answers: bool = True) -> None:
    """Raises RecordError saying what the record lacks for its task."""
    if record.task not in TASKS:
        raise RecordError(f"task '{record.task}' is none of {', '.join(TASKS)}")
    if not record.id:
        raise RecordError("the id is empty")
    if record.task not in ("chat", "text") and record.image is None:
        raise RecordError(f"a {record.task} record without image; only chat and text may lack one")
    if any(not isinstance(text, str) or not text.strip() for text in record.answers):
        raise RecordError("an answer is empty or no text")
    if record.task in ("grounding", "detection", "vqa") and not record.question.strip():
        raise RecordError("the question is empty")
    if record.task == "chat":
        _check_turns(record.conversations, answers)
    elif answers:
        _check_target(record)
    if record.labels and len(record.labels) != len(record.boxes):
        raise RecordError(f"{len(record.labels)} labels for {len(record.boxes)} boxes")


def _check_target(record: Record) -> None:
    if record.task == "grounding":
        if not record.boxes:
            raise RecordError("a grounding record without a box")
    elif record.task != "detection" and not record.answers:
        raise RecordError(f"a {record.task} record without an answer")
    if record.task == "classification" and record.classes:
        strange = [a for a in record.answers if a not in record.classes]
        if strange:
            raise RecordError(f"class {strange[0]!r} is none of {some_of(record.classes)}")


def _check_turns(turns: Sequence[tuple[str, str]], answers: bool) -> None:
    roles = [role for role, _ in turns if role != "system"]
    wanted = ["human", "gpt"] * (len(roles) // 2) + ["human"] * (len(roles) % 2)
    if not roles or roles != wanted:
        raise RecordError(f"turns {roles[:6]}: need human and gpt in turn, human first")
    if answers and len(roles) % 2:
        raise RecordError("the conversation ends with a question that nobody answers")
    empty = [role for role, text in turns if not isinstance(text, str) or not text.strip()]
    if empty and (answers or empty != ["gpt"]):
        raise RecordError(f"an empty turn of {empty[0]}")


# --------------------------------------------------------------------------------------- sources
class RecordSource:
    """Random access: `len`, `[i] -> {"record", "image", "id"}`, `records` (no pixels).

    image is uint8 [H, W, 3], or None. counts: what was skipped or changed on reading; problems:
    some of it in words. keep: bytes of decoded pictures that stay in memory, each picture once
    however many records share it.
    """

    task = "records"
    problems: Sequence[str] = ()

    def __init__(self, records: Sequence[Record], name: str, counts: Counter | None = None):
        self.records, self.name = list(records), name
        self.counts, self.keep = Counter(counts or {}), 0
        self._kept: dict[str, np.ndarray] = {}
        self._held = 0

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        record = self.records[int(i)]
        if record.image is None:
            return {"record": record, "image": None, "id": record.id}
        image = self._picture(record.image)
        size = (image.shape[1], image.shape[0])
        if record.size != size:
            if record.size is not None and record.boxes:
                raise RecordError(other_size(record, size))
            record = replace(record, size=size)
        return {"record": record, "image": image, "id": record.id}

    def _picture(self, name: str) -> np.ndarray:
        image = self._kept.get(name)
        if image is None:
            image = read_picture(name)
            if self._held + image.nbytes <= self.keep:
                self._kept[name] = image
                self._held += image.nbytes
        return image

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the records and of the sizes of their picture files; not of the folder."""
        marks = {name: mark_of(name) for name in {r.image for r in self.records if r.image}}
        rest = [field.name for field in fields(Record) if field.name != "image"]
        content = []
        for r in self.records:
            short = "/".join((r.image or "").replace("\\", "/").rsplit("/", 2)[-2:])
            values = [getattr(r, name) for name in rest]
            content.append(f"{values} {short} {marks.get(r.image, '')}")
        return fingerprint_of(self.name, content)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": {}, "_held": 0}


def choose(source: RecordSource, keep: Callable[[Record], bool], note: str) -> RecordSource:
    """The records for which keep(record) is true, as a source `NAME[note]`."""
    kept = [record for record in source.records if keep(record)]
    if not kept:
        raise RecordError(f"'{source.name}': no record is left by '{note}'")
    chosen = RecordSource(kept, f"{source.name}[{note}]", source.counts)
    chosen.keep = source.keep
    return chosen


def hold_out(source: RecordSource, count: int) -> tuple[RecordSource, RecordSource]:
    """(the rest, about `count` records) of a set that has no splits; no picture is in both.

    Pictures, or records without one, are held out evenly spaced, at most MOST_HELD of them. Raises
    RecordError when there is only one.
    """
    pictures = list(dict.fromkeys(r.image or r.id for r in source.records))
    if len(pictures) < 2:
        raise RecordError(
            f"'{source.name}' has a single picture: nothing can be held out; name other "
            "sets for validation (data.val, or none)"
        )
    share = min(count / len(source), MOST_HELD)
    number = max(1, int(share * len(pictures)))
    held = {pictures[(2 * k + 1) * len(pictures) // (2 * number)] for k in range(number)}
    return (
        choose(source, lambda r: (r.image or r.id) not in held, "rest"),
        choose(source, lambda r: (r.image or r.id) in held, "held out"),
    )


def shared_records(one: RecordSource, other: RecordSource) -> set[str]:
    """Ids of the records that two splits of a set have in common, by what they say."""
    known = {record.id: record for record in one.records}
    same = ("image", "task", "question", "answers", "conversations")
    return {
        r.id
        for r in other.records
        if r.id in known and all(getattr(r, n) == getattr(known[r.id], n) for n in same)
    }


def other_size(record: Record, size: tuple[int, int]) -> str:
    return (
        f"{record.image}: {size[0]}x{size[1]} pixels, but the record {record.id} says "
        f"{record.size[0]}x{record.size[1]}; its boxes would not fit: use the picture they were "
        "drawn on"
    )


# --------------------------------------------------------------------------------------- mixtures
def _cycle(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the ratio of the weights, as they are written in decimals."""
    parts = [Fraction(str(weight)) for weight in weights]
    if any(part <= 0 for part in parts):
        raise ValueError(f"weights {list(weights)}: need numbers above 0; leave the source out")
    common = math.lcm(*(part.denominator for part in parts))
    whole = [int(part * common) for part in parts]
    whole = [n // math.gcd(*whole) for n in whole]
    if sum(whole) > LONGEST_CYCLE:
        raise ValueError(f"weights {list(weights)}: too fine a ratio; round them to two decimals")
    return whole


class Mix:
    """Several sources as one; random access, without random numbers.

    Without weights one stands behind the other, each example once: training shuffles over all.
    With weights they are interleaved at a fixed ratio. A cycle holds each source as often as its
    weight says, evenly spread. Sources are walked in order and start again at their end. The length
    is the smallest number of whole cycles in which every source was seen once, so that small or
    heavy sources come several times.
    """

    task = "records"

    def __init__(self, sources: Sequence[Any], weights: Sequence[float] | None = None):
        if not sources or (weights is not None and len(sources) != len(weights)):
            raise ValueError(f"{len(sources)} sources with {len(weights or ())} weights")
        empty = [source.name for source in sources if not len(source)]
        if empty:
            raise ValueError(f"sources without records: {some_of(empty)}")
        self.sources, self._times = list(sources), None
        self.name = "mix(" + ", ".join(s.name for s in sources) + ")"
        if weights is None:
            self._ends = np.cumsum([len(source) for source in sources], dtype=np.int64)
            self._length = int(self._ends[-1])
            return
        self._times = times = _cycle(weights)
        source = np.repeat(np.arange(len(times), dtype=np.int32), times)
        rank = np.concatenate([np.arange(n) for n in times])
        order = np.lexsort((source, (rank + 0.5) / np.repeat(times, times)))
        self._source, self._rank = source[order], rank[order]
        rounds = [-(-len(s) // n) for s, n in zip(sources, times, strict=True)]
        self._length = max(rounds) * len(order)

    def __len__(self) -> int:
        return self._length

    def place(self, i: int) -> tuple[int, int]:
        """(number of the source, index in it) of example i."""
        if not 0 <= i < self._length:
            raise IndexError(f"record {i} of {self._length}")
        if self._times is None:
            k = int(np.searchsorted(self._ends, i, side="right"))
            return k, int(i) - int(self._ends[k] - len(self.sources[k]))
        turn, at = divmod(int(i), len(self._source))
        k = int(self._source[at])
        return k, (turn * self._times[k] + int(self._rank[at])) % len(self.sources[k])

    def __getitem__(self, i: int) -> dict[str, Any]:
        k, j = self.place(i)
        return self.sources[k][j]

    @cached_property
    def records(self) -> list[Record]:
        """The record of every example, in order, repeats included."""
        return [self.sources[k].records[j] for k, j in map(self.place, range(len(self)))]

    @property
    def counts(self) -> Counter:
        return sum((source.counts for source in self.sources), Counter())

    @property
    def fingerprint(self) -> str:
        ratio = ":".join(map(str, self._times or ["all"]))
        return fingerprint_of(f"mix-{ratio}", [source.fingerprint for source in self.sources])


def mix(sources: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
    """Sources at a fixed ratio (None: one behind the other). A single one is returned as it is.

    Raises ValueError on an empty source, a weight not above 0, or a ratio too fine to repeat.
    """
    return sources[0] if len(sources) == 1 else Mix(sources, weights)
