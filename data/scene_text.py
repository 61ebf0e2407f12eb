"""Sentences about scenes: captions, questions with answers, and phrases for single objects.

Everything is read off the scene graph (class, objects, land cover, season), so every statement is
true of the picture. Doubtful cases are left out: a cover between "none" and "clearly there", kinds
of which only a small part is seen, centres near the middle line.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.scene_canvas import Thing
from data.scenes import CLASSES, LAND_COVER, OBJECTS, Scene

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PLURALS = {"boat": "boats", "building": "buildings", "plane": "planes", "tank": "storage tanks"}
SINGULARS = {"boat": "boat", "building": "building", "plane": "plane", "tank": "storage tank"}
COVER_WORDS = {
    "bare": "bare soil",
    "low vegetation": "grass or crops",
    "trees": "trees",
    "water": "water",
    "paved": "paved ground",
    "building": "buildings",
}
CLEAR = 0.04
"""Share of the image from which a cover is said to be there."""


@dataclass(frozen=True)
class Question:
    """kind: theme, presence, count, compare, location or season."""

    question: str
    answer: str
    kind: str


def count_words(kind: str, number: int) -> str:
    """The number in words up to ten: `two boats`, `one plane`, `12 buildings`."""
    word = NUMBERS[number] if number < len(NUMBERS) else str(number)
    return f"{word} {SINGULARS[kind] if number == 1 else PLURALS[kind]}"


def _an(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _scene_word(name: str) -> str:
    return f"{name} area" if name in ("industrial", "residential") else name


def shares(scene: Scene) -> dict[str, float]:
    """{land cover: share of the image}."""
    counts = np.bincount(scene.cover.ravel(), minlength=len(LAND_COVER))
    return {name: counts[k] / scene.cover.size for k, name in enumerate(LAND_COVER)}


def counts(scene: Scene) -> dict[str, int]:
    """{object kind: how many are seen at least by half}."""
    return {kind: sum(t.kind == kind for t in scene.things) for kind in OBJECTS}


def side_of(scene: Scene, thing: Thing) -> str | None:
    """`upper left` and so on; None when the centre is within a tenth of a middle line."""
    half = scene.image.shape[0] / 2
    x = (thing.box[0] + thing.box[2]) / 2 / half - 1
    y = (thing.box[1] + thing.box[3]) / 2 / half - 1
    if min(abs(x), abs(y)) < 0.1:
        return None
    return f"{'upper' if y < 0 else 'lower'} {'left' if x < 0 else 'right'}"


def _objects_clause(scene: Scene) -> str:
    # A kind that is also cut off at the edge has a doubtful number, but more than one is certain.
    seen = [
        PLURALS[kind] if kind in scene.cut else count_words(kind, n)
        for kind, n in counts(scene).items()
        if n
    ]
    if not seen:
        return ""
    return seen[0] if len(seen) == 1 else ", ".join(seen[:-1]) + " and " + seen[-1]


def _ground_clause(scene: Scene) -> str:
    """The two widest covers that are clearly there, widest first."""
    wide = sorted(shares(scene).items(), key=lambda item: -item[1])[:2]
    return " and ".join(COVER_WORDS[name] for name, share in wide if share >= CLEAR)


def captions(scene: Scene) -> list[str]:
    """Five true sentences, from short to full."""
    theme, objects, ground = _scene_word(scene.name), _objects_clause(scene), _ground_clause(scene)
    season = f"in {scene.season}" if "season" not in scene.season else f"in the {scene.season}"
    white = " under snow" if scene.snowy else ""
    with_objects = f" with {objects}" if objects else ""
    return [
        f"a satellite image of {_an(theme)}",
        f"{_an(theme)}{white} {season}",
        f"{_an(theme)}{with_objects}",
        f"a satellite image of {_an(theme)}, mostly {ground}",
        f"{_an(theme)}{white} seen from above {season}{with_objects}, mostly {ground}",
    ]


def _theme(scene: Scene) -> list[Question]:
    options = ", ".join(CLASSES)
    ask = f"What kind of scene is this: {options}?"
    return [Question(ask, scene.name, "theme")]


def _presence(scene: Scene) -> list[Question]:
    found = []
    for kind, number in counts(scene).items():
        if number or kind not in scene.cut:
            ask = f"Is there a {SINGULARS[kind]}?"
            found.append(Question(ask, "yes" if number else "no", "presence"))
    for name in ("trees", "water", "paved"):
        share = shares(scene)[name]
        if share == 0 or share >= CLEAR:
            ask = f"Is there any {COVER_WORDS[name]}?".replace("any trees", "a tree")
            found.append(Question(ask, "yes" if share else "no", "presence"))
    return found


def _count(scene: Scene) -> list[Question]:
    return [
        Question(f"How many {PLURALS[kind]} are there?", str(number), "count")
        for kind, number in counts(scene).items()
        if number and kind not in scene.cut
    ]


def _compare(scene: Scene) -> list[Question]:
    share = shares(scene)
    found = []
    for one, two in (("water", "trees"), ("paved", "low vegetation"), ("trees", "bare")):
        if abs(share[one] - share[two]) >= CLEAR:
            ask = f"Which covers more of the image: {COVER_WORDS[one]} or {COVER_WORDS[two]}?"
            more = one if share[one] > share[two] else two
            found.append(Question(ask, COVER_WORDS[more], "compare"))
    return found


def _location(scene: Scene) -> list[Question]:
    found = []
    for kind, number in counts(scene).items():
        if number != 1 or kind in scene.cut:
            continue
        place = side_of(scene, next(t for t in scene.things if t.kind == kind))
        if place:
            ask = f"In which quarter of the image is the {SINGULARS[kind]}?"
            found.append(Question(ask, place, "location"))
    return found


def questions(scene: Scene) -> list[Question]:
    """Every question that has one certain answer."""
    parts = (_theme, _presence, _count, _compare, _location)
    found = [question for part in parts for question in part(scene)]
    found.append(Question("Is there snow on the ground?", "yes" if scene.snowy else "no", "season"))
    return found


def phrases(scene: Scene) -> list[tuple[str, tuple[float, float, float, float]]]:
    """(phrase, box) for objects that a phrase names uniquely; boxes in pixels, x0 y0 x1 y1."""
    found = []
    for thing in scene.things:
        same = [t for t in scene.things if t.kind == thing.kind]
        twins = [t for t in same if t.colour == thing.colour]
        word, place = SINGULARS[thing.kind], side_of(scene, thing)
        beside = [t for t in same if side_of(scene, t) in (place, None)]
        if thing.kind in scene.cut:
            continue
        if len(same) == 1:
            found.append((f"the {word}", thing.box))
        elif len(twins) == 1:
            found.append((f"the {thing.colour} {word}", thing.box))
        elif place and len(beside) == 1:
            found.append((f"the {word} in the {place}", thing.box))
    return found
