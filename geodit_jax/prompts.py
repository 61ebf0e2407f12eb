"""Wording of the tasks: what is asked about a record, and what the right answer looks like.

The templates are in `prompts.toml`; those of the published model are not known.
"""

from __future__ import annotations

import os
import string
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from geodit_jax.boxes import STYLES, count_objects, format_boxes, pluralise

DEFAULTS = Path(__file__).with_name("prompts.toml")
FIELDS = {
    "caption": (set(), {"answer"}),
    "vqa": ({"question"}, {"answer", "question"}),
    "classification": ({"classes"}, {"answer", "classes"}),
    "grounding": ({"question"}, {"boxes", "question"}),
    "detection": ({"question", "plural"}, {"boxes", "count", "question", "plural"}),
}
"""What the templates of each task may hold: in questions, in answers."""


@dataclass(frozen=True)
class Prompts:
    """Templates by task and name, made by `load_prompts`.

    A record has the fields of `data.records.Record`: task, question, answers, boxes, size, classes,
    conversations.
    """

    templates: Mapping[str, Mapping[str, str]]

    def ask(self, record) -> str:
        """The question about `record`, without a placeholder for its picture.

        A chat of one question gives that question. Raises ValueError on an unknown task, or a chat
        of several questions (use its conversations).
        """
        if record.task == "chat":
            return record.question or _only_pair(record)[0]
        question = record.question.strip()
        if record.task == "grounding":  # the expression stands within a sentence
            question = question.removesuffix(".")
        return self._find(record)["question"].format(
            question=question, plural=pluralise(question), classes=", ".join(record.classes)
        )

    def answer(self, record, codec: str) -> str:
        """The text that a model should write: the first answer, or the boxes in `codec`.

        Boxes of a detection come largest first, so that a window that is too short keeps what
        matters; without boxes the answer says so. Raises ValueError where the record lacks an
        answer, a box or the size of its picture.
        """
        if record.task == "chat":
            return _only_pair(record)[1]
        templates = self._find(record)
        if record.task in ("grounding", "detection"):
            return _answer_boxes(record, codec, templates)
        if not record.answers:
            raise ValueError(f"record {record.id}: no answer to learn from")
        return templates["answer"].format(
            answer=record.answers[0], question=record.question, classes=", ".join(record.classes)
        )

    def _find(self, record) -> Mapping[str, str]:
        if record.task not in self.templates:
            known = ", ".join(self.templates)
            raise ValueError(f"record {record.id}: task {record.task!r} is none of {known}, chat")
        return self.templates[record.task]


def load_prompts(path: str | os.PathLike | None = None) -> Prompts:
    """The default templates; those named in the TOML file at `path` replace them one by one.

    Raises ValueError on a file that is not TOML, tasks or names that do not exist, and templates
    with fields that cannot be filled.
    """
    templates = tomllib.loads(DEFAULTS.read_text(encoding="utf-8"))
    if path is not None:
        try:
            own = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid TOML ({error})") from error
        for task, table in own.items():
            _check_table(path, task, table, templates)
            templates[task] = templates[task] | table
    return Prompts(templates)


def _check_table(path, task: str, table, known: Mapping[str, Mapping[str, str]]) -> None:
    if task not in known or not isinstance(table, dict):
        raise ValueError(f"{path}: {task!r} is none of the tables {', '.join(known)}")
    for name, text in table.items():
        where = f"{path}: [{task}] {name}"
        if name not in known[task] or not isinstance(text, str):
            raise ValueError(f"{where} is none of the texts {', '.join(known[task])}")
        if name == "boxes":
            if text not in STYLES:
                raise ValueError(f"{where}={text!r}: use one of {', '.join(STYLES)}")
            continue
        allowed = FIELDS[task][name != "question"]
        try:
            fields = {
                field for _, field, _, _ in string.Formatter().parse(text) if field is not None
            }
        except ValueError as error:
            raise ValueError(f"{where}={text!r}: {error}; write braces twice") from error
        if fields - allowed:
            raise ValueError(
                f"{where} holds {sorted(fields - allowed)}, not only {sorted(allowed)}"
            )


def _answer_boxes(record, codec: str, templates: Mapping[str, str]) -> str:
    if record.size is None:
        raise ValueError(f"record {record.id}: boxes need the size of the picture")
    if record.task == "grounding" and not record.boxes:
        raise ValueError(f"record {record.id}: grounding without a box to learn from")
    boxes, name = list(record.boxes), "answer"
    if record.task == "detection":
        boxes.sort(key=lambda box: -abs((box[2] - box[0]) * (box[3] - box[1])))
        name = {0: "none", 1: "one"}.get(len(boxes), "answer")
    label = record.question.strip()
    return templates[name].format(
        boxes=format_boxes(boxes, record.size, codec, templates["boxes"]),
        count=count_objects(label, len(boxes)),
        question=label,
        plural=pluralise(label),
    )


def _only_pair(record) -> tuple[str, str]:
    """Question and answer of a chat of one question; its placeholder is taken out."""
    turns = [message for message in record.conversations if message[0] != "system"]
    if len(turns) != 2:
        raise ValueError(
            f"record {record.id}: a chat of {len(turns)} messages has no single question; "
            "use its conversations"
        )
    return turns[0][1].replace("<image>", "").strip(), turns[1][1]
