"""Scene classification: one folder per class (AID, WHU-RS19, UC Merced, your own), as records."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from data.folders import class_files, existing
from data.gathering import STRICT, Gathering, Rules
from data.images import some_of
from data.records import Record, RecordSource
from data.splits import SPLITS, block_cuts, image_number, split_of

_WRITTEN_AS_ONE = {
    words.replace(" ", ""): words
    for words in (
        "baseball diamond",
        "dense residential",
        "golf course",
        "medium residential",
        "mobile home park",
        "parking lot",
        "sparse residential",
        "storage tanks",
        "tennis court",
    )
}
"""Folders of UC Merced, whose names have no boundary between words."""


def normalise_class(name: str) -> str:
    """Words in lower case: `BaseballField`, `baseball_field`, `Baseball-Field` -> `baseball field`.

    A name without any boundary stays one word, but for those of UC Merced (`golfcourse`);
    `class_key` makes both spellings equal.
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    words = " ".join(re.split(r"[\s_\-]+", spaced.strip(" _-\t"))).lower()
    return _WRITTEN_AS_ONE.get(words, words)


def class_key(name: str) -> str:
    """What two spellings of a class share: letters and digits in lower case."""
    return re.sub(r"[\s_\-]+", "", name).lower()


def class_names(names: Sequence[str], where: str) -> dict[str, str]:
    """{name as found: words}. Raises ValueError when two names are spellings of one class."""
    keys: dict[str, str] = {}
    for name in names:
        other = keys.setdefault(class_key(name), name)
        if other != name:
            raise ValueError(f"{where}: '{other}' and '{name}' are one class; merge the folders")
    return {name: normalise_class(name) for name in names}


def _splits(files: Sequence[tuple[Path, str]]) -> list[str]:
    """The split of each file: blocks of the numbers of its class."""
    numbers: dict[str, list[int]] = {}
    for path, name in files:
        numbers.setdefault(name, []).append(image_number(path.name))
    cuts = block_cuts(numbers)
    return [split_of(cuts, name, image_number(path.name)) for path, name in files]


def read_class_folder(
    root: str | os.PathLike,
    split: str = "all",
    *,
    name: str = "classes",
    classes: Sequence[str] = (),
    rules: Rules = STRICT,
) -> RecordSource:
    """One record a picture: answers = its class, classes = all of them.

    split: "all" (these sets have no official split), or train, val, test by blocks of the image
    numbers of each class. classes: the list to score against, when the folder has only some.
    """
    if split not in ("all", *SPLITS):
        raise ValueError(f"no split '{split}'; known: all, {', '.join(SPLITS)}")
    folder = existing(root)
    found, files = class_files(folder)
    words = class_names(found, str(folder))
    known = tuple(normalise_class(c) for c in classes) or tuple(words.values())
    spelled = {class_key(c): c for c in known}
    strange = sorted(n for n in found if class_key(n) not in spelled)
    if strange:
        raise ValueError(f"{folder} has classes {some_of(strange)} that are not in {known}")
    gathering = Gathering(name, rules)
    parts = ["all"] * len(files) if split == "all" else _splits(files)
    for (path, label), part in zip(files, parts, strict=True):
        if part != split:
            continue
        with gathering.reading(str(path)):
            gathering.add(
                Record(
                    id=f"{name}-{path.relative_to(folder).as_posix()}",
                    image=str(path),
                    task="classification",
                    answers=(spelled[class_key(label)],),
                    classes=known,
                    dataset=name,
                    split="" if split == "all" else split,
                ),
                str(path),
            )
    return gathering.finish()
