"""Scenes as records: captions, boxes, questions and classes that are true of the picture.

Record i is a function of (seed, split, i) alone: kinds take turns, and a scene that has nothing to
ask for a kind (no object that a phrase names alone, say) is passed over for another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from data.record_pictures import scene_name
from data.records import Record
from data.scene_text import SINGULARS, captions, phrases, questions
from data.scenes import CLASSES, SPLITS, VERSION, Scene, draw_scene

KINDS = ("caption", "grounding", "detection", "vqa", "classification")
OTHER_SCENES = 1_000_003
"""Step to the next scene to try. Prime to the eight classes, so that another class comes."""
TRIES = 200


def _captions(scene: Scene, shared: dict) -> list[Record]:
    return [Record(task="caption", answers=tuple(captions(scene)), category=scene.name, **shared)]


def _grounding(scene: Scene, shared: dict) -> list[Record]:
    return [
        Record(task="grounding", question=phrase, boxes=(box,), **shared)
        for phrase, box in phrases(scene)
    ]


def _detection(scene: Scene, shared: dict) -> list[Record]:
    """One record a kind of object that is there and not cut off by the frame."""
    found = []
    for kind, word in SINGULARS.items():
        boxes = tuple(thing.box for thing in scene.things if thing.kind == kind)
        if boxes and kind not in scene.cut:
            labels = (word,) * len(boxes)
            found.append(
                Record(task="detection", question=word, boxes=boxes, labels=labels, **shared)
            )
    return found


def _vqa(scene: Scene, shared: dict) -> list[Record]:
    return [
        Record(task="vqa", question=q.question, answers=(q.answer,), category=q.kind, **shared)
        for q in questions(scene)
    ]


def _classification(scene: Scene, shared: dict) -> list[Record]:
    return [Record(task="classification", answers=(scene.name,), classes=CLASSES, **shared)]


_MAKE = {"caption": _captions, "grounding": _grounding, "detection": _detection, "vqa": _vqa,
         "classification": _classification}  # fmt: skip


def scene_candidates(scene: Scene, kind: str, *, name: str = "", key: str = "") -> list[Record]:
    """Every record of one kind that a scene allows; boxes in pixels of scene.image."""
    side = scene.image.shape[0]
    shared = {"id": key, "image": name, "size": (side, side), "dataset": "scenes"}
    return _MAKE[kind](scene, shared)


def _pick(found: Sequence[Record], rng: np.random.Generator) -> Record:
    """First the kind of question, then one of it: no kind wins by its number of questions."""
    groups = sorted({record.category for record in found})
    group = groups[rng.integers(len(groups))]
    members = [record for record in found if record.category == group]
    return members[rng.integers(len(members))]


class SceneRecords:
    """Random-access records of scenes: `len`, `[i] -> {"record", "image", "id"}`, `records`.

    kinds: which of KINDS, in turn: record i is of kinds[i % len(kinds)] and shows scene
    i // len(kinds) where that scene allows it. max_boxes: detection asks only for objects of which
    there are at most so many (0: any number). `records` draws every scene.
    """

    task, name = "records", "scenes"

    def __init__(
        self,
        split: str,
        size: int,
        *,
        kinds: Sequence[str] = KINDS,
        seed: int = 0,
        side: int = 64,
        max_boxes: int = 0,
    ):
        strange = [kind for kind in kinds if kind not in KINDS]
        if strange or not kinds:
            raise ValueError(f"kinds {list(kinds)}: need some of {', '.join(KINDS)}")
        if split not in SPLITS:
            raise ValueError(f"scenes have no split '{split}'; known: {', '.join(SPLITS)}")
        self.split, self.size, self.kinds = split, int(size), tuple(kinds)
        self.seed, self.side, self.max_boxes = int(seed), int(side), int(max_boxes)
        self.counts: Counter = Counter()
        chosen = f"{side}px-{'+'.join(self.kinds)}-max{self.max_boxes}"
        self.fingerprint = f"scene-records-v{VERSION}-{split}-{size}-seed{seed}-{chosen}"

    def __len__(self) -> int:
        return self.size

    def _allowed(self, record: Record) -> bool:
        many = record.task == "detection" and len(record.boxes) > self.max_boxes > 0
        return not many

    def _draw(self, i: int) -> tuple[Record, Scene]:
        if not 0 <= i < self.size:
            raise IndexError(f"record {i} of {self.size}")
        number, turn = divmod(int(i), len(self.kinds))
        kind = self.kinds[turn]
        rng = np.random.default_rng([self.seed, SPLITS[self.split], int(i), 1])
        for attempt in range(TRIES):
            index = number + attempt * OTHER_SCENES
            scene = draw_scene(self.seed, self.split, index, self.side)
            name = scene_name(self.seed, self.split, index, self.side)
            key = f"scenes-{self.split}-{kind}-{i:06d}"
            found = [
                record
                for record in scene_candidates(scene, kind, name=name, key=key)
                if self._allowed(record)
            ]
            if found:
                return _pick(found, rng), scene
        raise ValueError(f"no scene of {TRIES} allows {kind} with max_boxes={self.max_boxes}")

    def record(self, i: int) -> Record:
        return self._draw(i)[0]

    @cached_property
    def records(self) -> list[Record]:
        return [self.record(i) for i in range(self.size)]

    def __getitem__(self, i: int) -> dict[str, Any]:
        record, scene = self._draw(int(i))
        return {"record": record, "image": scene.image, "id": record.id}


def record_texts(record: Record) -> list[str]:
    """Every text of a record; boxes as `[x0,y0,x1,y1]` in hundredths of the picture."""
    found = [record.question, *record.answers, *record.labels]
    found += [text for _, text in record.conversations]
    for box in record.boxes:
        parts = [round(100 * v / side) for v, side in zip(box, record.size * 2, strict=True)]
        found.append("[" + ",".join(map(str, parts)) + "]")
    return [text for text in found if text]


def scene_texts(
    count: int,
    *,
    seed: int = 0,
    side: int = 64,
    kinds: Sequence[str] = KINDS,
    render: Callable[[Record], Iterable[str]] = record_texts,
) -> list[str]:
    """Every text that `count` training scenes give, to train a tokenizer on.

    render(record) -> texts: pass the prompts and the box notation of a model to see its wording.
    """
    return [
        text
        for index in range(count)
        for scene in (draw_scene(seed, "train", index, side),)
        for kind in kinds
        for record in scene_candidates(scene, kind, key="text")
        for text in render(record)
    ]
