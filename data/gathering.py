"""What every reader of records does: check each one and its picture, refuse, or skip and count."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from data.images import MAX_NAMED, some_of
from data.record_boxes import RecordError, settle_box
from data.record_pictures import size_of, survey
from data.records import Record, RecordSource, check_record, other_size

PLACEHOLDER = "<image>"
Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Rules:
    """What is done about faults.

    on_bad: "refuse" raises at the first bad record, "skip" leaves it out and counts it.
    boxes: "refuse" or "fix" those reversed, beyond the frame, or without area. pictures: "header"
    looks at the size of each picture on opening, "decode" reads all of it, "trust" only when it is
    used. answers: "needed", or "optional" for questions that are only to be predicted.
    """

    on_bad: str = "refuse"
    boxes: str = "refuse"
    pictures: str = "header"
    answers: str = "needed"

    def __post_init__(self):
        known = {
            "on_bad": ("refuse", "skip"),
            "boxes": ("refuse", "fix"),
            "pictures": ("header", "decode", "trust"),
            "answers": ("needed", "optional"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}='{getattr(self, name)}' is not {' or '.join(values)}")


STRICT = Rules()


class Gathering:
    """Collects the records of a reader, checks them, and gives a RecordSource."""

    def __init__(self, name: str, rules: Rules = STRICT):
        self.name, self.rules, self.counts = name, rules, Counter()
        self._found: dict[str, tuple[Record, str]] = {}
        self._refused: list[str] = []

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def refuse(self, where: str, problem: str) -> None:
        """Raises RecordError, or counts under on_bad=skip."""
        message = f"{where}: {problem}"
        if self.rules.on_bad == "refuse":
            raise RecordError(
                f"{message}. Correct it, or set on_bad=skip to leave such records out"
            )
        self.counts["skipped"] += 1
        if len(self._refused) <= MAX_NAMED:
            self._refused.append(message)

    @contextmanager
    def reading(self, where: str) -> Iterator[None]:
        """Whatever is wrong inside is refused under the name of the place."""
        try:
            yield
        except KeyError as error:
            problem = f"the field {error} is lacking"
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            problem = str(error)
        else:
            return
        self.refuse(where, problem)

    def size_of(self, image: str) -> tuple[int, int]:
        """(width, height) from the header. Raises RecordError when there is no such picture."""
        try:
            return size_of(image)
        except FileNotFoundError:
            raise RecordError(f"there is no picture {image}") from None

    def add(self, record: Record, where: str) -> None:
        """Takes one record. Raises RecordError; call it inside `reading`."""
        if record.boxes:
            if record.size is None and record.image and self.rules.pictures != "trust":
                record = replace(record, size=self.size_of(record.image))
            fix = self.rules.boxes == "fix"
            boxes = tuple(settle_box(b, record.size, fix, self.counts) for b in record.boxes)
            record = replace(record, boxes=boxes)
        if record.task == "chat":
            turns = self._place_picture(record.conversations, record.image is not None)
            record = replace(record, conversations=turns)
        check_record(record, answers=self.rules.answers == "needed")
        if record.id in self._found:
            raise RecordError(f"the id '{record.id}' is that of {self._found[record.id][1]} too")
        self._found[record.id] = (record, where)

    def _place_picture(self, turns: Turns, pictured: bool) -> Turns:
        """Turns with one placeholder for the picture, inserted where a set leaves it out."""
        found = [(role, text.count(PLACEHOLDER)) for role, text in turns]
        number = sum(n for _, n in found)
        if number > pictured:
            raise RecordError(
                f"{number} {PLACEHOLDER} placeholders for {int(pictured)} pictures; remove the rest"
            )
        if any(n and role != "human" for role, n in found):
            raise RecordError(f"{PLACEHOLDER} stands outside a turn of human; move it there")
        if number == pictured:
            return turns
        first = next((k for k, (role, _) in enumerate(turns) if role == "human"), None)
        if first is None:
            raise RecordError(f"no turn of human to put {PLACEHOLDER} in")
        self.counts["placeholder inserted"] += 1
        text = f"{PLACEHOLDER}\n{turns[first][1]}"
        return (*turns[:first], ("human", text), *turns[first + 1 :])

    def finish(self) -> RecordSource:
        """Looks at the pictures. Raises RecordError when no record is left."""
        sizes = {}
        if self.rules.pictures != "trust":
            images = dict.fromkeys(r.image for r, _ in self._found.values() if r.image)
            sizes = survey(list(images), decoded=self.rules.pictures == "decode")
        kept = []
        for record, where in self._found.values():
            size = sizes.get(record.image)
            problem = size if isinstance(size, str) else ""
            if size is not None and not problem:
                if record.boxes and record.size not in (None, size):
                    problem = other_size(record, size)
                record = replace(record, size=size)
            if problem:
                self.refuse(where, problem)
            else:
                kept.append(record)
        if self.counts:
            told = ", ".join(f"{n} {what}" for what, n in sorted(self.counts.items()))
            logging.warning("%s: %s. %s", self.name, told, some_of(self._refused))
        if not kept:
            raise RecordError(f"'{self.name}' is empty: no usable record. {some_of(self._refused)}")
        source = RecordSource(kept, self.name, self.counts)
        source.problems = tuple(self._refused)
        return source
