"""Which examples belong to train, val and test; few-label subsets; refused overlap.

Neighbouring numbers of remote sensing images are often one site, so files are split by blocks of
numbers, never at random: of each class the highest quarter of the numbered images is the test part,
of the rest the highest quarter the validation part.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from data.images import some_of

SPLITS = ("train", "val", "test")


def image_number(name: str) -> int:
    """Number in a file name: leading digits (`009_x187_y0.jpg` 9), else the last (`forest07` 7)."""
    stem = PurePath(name).stem
    digits = re.match(r"\d+", stem) or re.search(r"(\d+)(?!.*\d)", stem)
    if digits is None:
        raise ValueError(
            f"'{name}' has no number, so the folder cannot be split by blocks; give separate "
            "folders: train=DIR, val=DIR, test=DIR"
        )
    return int(digits.group(digits.lastindex or 0))


def block_cuts(numbers: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """{group: (first validation number, first test number)} from the numbers of each group."""
    cuts = {}
    for group, found in numbers.items():
        ordered = sorted(set(found))
        if len(ordered) < 3:
            raise ValueError(
                f"'{group}' has {len(ordered)} numbered images; need 3 to split it in blocks, "
                "or give train=DIR, val=DIR, test=DIR"
            )
        test = len(ordered) - max(1, round(len(ordered) / 4))
        val = test - max(1, round(test / 4))
        cuts[group] = ordered[val], ordered[test]
    return cuts


def split_of(cuts: Mapping[str, tuple[int, int]], group: str, number: int) -> str:
    """The split of an image; also for images that were not there when the cuts were made."""
    val, test = cuts[group]
    return "test" if number >= test else "val" if number >= val else "train"


def few_labels(labels: np.ndarray | None, length: int, fraction: float, seed: int) -> np.ndarray:
    """Indices (ascending) of about `fraction` of `length` examples.

    With class numbers ([N]) every class keeps at least one example and its share; otherwise (None,
    or multi-hot rows) the choice is over all. Of one seed, a smaller fraction lies in a larger.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"label_fraction={fraction} is not in (0, 1]")
    if labels is None or np.ndim(labels) != 1:
        labels = np.zeros(length, np.int64)
    order = np.random.default_rng([seed, length]).permutation(length)
    kept = []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        kept.append(members[: max(1, int(fraction * len(members) + 0.5))])
    return np.sort(np.concatenate(kept))


class Subset:
    """Some examples of another source, in the given order."""

    def __init__(self, source: Any, indices: Sequence[int], note: str):
        self.source, self.indices = source, np.asarray(indices, np.int64)
        self.name, self.task, self.classes = source.name, source.task, source.classes
        self.native_side = source.native_side
        chosen = hashlib.sha256(self.indices.tobytes()).hexdigest()[:16]
        self.fingerprint = f"{source.fingerprint}[{note}:{chosen}]"

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.source[int(self.indices[i])]


def labels_of(source: Any) -> np.ndarray | None:
    """int [N] class numbers or float [N, K]; None where labels are maps or absent."""
    if hasattr(source, "labels"):
        return source.labels()
    if source.task != "classification":
        return None
    return np.array([int(source[i]["label"]) for i in range(len(source))])


def keep_fraction(source: Any, fraction: float, seed: int = 0) -> Any:
    """The source itself for 1.0, else a seeded, stratified, nested subset of it."""
    if fraction == 1:
        return source
    chosen = few_labels(labels_of(source), len(source), fraction, seed)
    return Subset(source, chosen, f"{fraction:g} of labels, seed {seed}")


def refuse_overlap(parts: Mapping[str, Mapping[str, str]]) -> None:
    """parts: {split: {content hash: file}}. Raises ValueError when two splits share a picture."""
    names = list(parts)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            shared = sorted(parts[one].keys() & parts[other].keys())
            if shared:
                pairs = [f"{parts[one][d]} = {parts[other][d]}" for d in shared]
                raise ValueError(
                    f"{len(shared)} pictures are in {one} and in {other}: {some_of(pairs)}. "
                    f"Remove them from one of the two, else the {other} score means nothing"
                )
