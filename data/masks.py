"""Segmentation folders: DIR/images/NAME.*, DIR/masks/NAME.*, optionally DIR/classes.json.

A mask has one channel of class numbers. Pictures must be squares of one size, or `fit` makes them
so: "crop" takes the centre square of the smallest side of the folder, "pad" fills up to the largest
side (black, label -100, which losses and scores ignore).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.folders import (
    Item,
    PictureSource,
    existing,
    fingerprint_of,
    natural,
    read_classes,
    split_items,
)
from data.images import Checked, ImageError, check_images, decode_mask, digest_of, is_image, some_of

IGNORE = -100
FITS = ("refuse", "crop", "pad")


@dataclass(frozen=True)
class MaskRules:
    """classes: names or () to take them from the folder; ignore: mask value that becomes -100."""

    classes: tuple[str, ...] = ()
    ignore: int | None = None
    fit: str = "refuse"


@dataclass(frozen=True)
class Pair(Item):
    """A picture with its mask and the hash of the mask."""

    mask: str = ""
    mask_digest: str = ""


def mask_pairs(root: Path) -> dict[Path, Path]:
    """{picture: mask} by equal names without suffix. Pictures without a mask are refused."""
    folders = root / "images", root / "masks"
    if not all(folder.is_dir() for folder in folders):
        raise FileNotFoundError(f"{root} needs the two folders images/ and masks/")
    masks = {p.stem: p for p in folders[1].rglob("*") if is_image(p)}
    pictures = sorted((p for p in folders[0].rglob("*") if is_image(p)), key=natural)
    bare = [p.name for p in pictures if p.stem not in masks]
    if bare:
        raise ValueError(
            f"{len(bare)} pictures of {root} have no mask of their name: {some_of(bare)}"
        )
    if not pictures:
        raise ValueError(f"{root}/images holds no pictures")
    return {p: masks[p.stem] for p in pictures}


def _check_pair(picture: Checked, mask: Path, rules: MaskRules) -> tuple[Pair, set[int]]:
    """The pair and its class numbers. Raises ImageError on a mask that does not fit."""
    found = decode_mask(mask)
    if found.shape != (picture.height, picture.width):
        raise ImageError(
            f"{mask}: {found.shape[0]}x{found.shape[1]} pixels, its picture has "
            f"{picture.height}x{picture.width}"
        )
    values = set(np.unique(found).tolist()) - {rules.ignore}
    wrong = [v for v in values if v < 0 or rules.classes and v >= len(rules.classes)]
    if wrong:
        raise ImageError(
            f"{mask}: value {wrong[0]}, but there are {len(rules.classes)} classes "
            f"(0..{len(rules.classes) - 1}); correct the mask or the class list, or set ignore"
        )
    return Pair(picture.path, "", picture, str(mask), digest_of(found)), values


def _load(root: Path, on_corrupt: str, rules: MaskRules) -> tuple[list[Pair], set[int]]:
    """(pairs, class numbers found). A wrong mask is a wrong label: never skipped silently."""
    pairs = mask_pairs(root)
    items, values, broken = [], {0}, []
    for picture in check_images(list(pairs), on_corrupt):
        try:
            item, found = _check_pair(picture, pairs[Path(picture.path)], rules)
        except ImageError as error:
            broken.append(str(error))
            continue
        values |= found
        items.append(item)
    if broken:
        raise ImageError(f"{len(broken)} masks are not usable: {some_of(broken)}")
    return items, values


def _common_square(items: Sequence[Item], fit: str) -> int:
    """The side all examples get, from every picture of the train folder."""
    shapes = {(i.checked.height, i.checked.width) for i in items}
    if fit == "pad":
        return max(max(shape) for shape in shapes)
    if fit == "refuse" and (len(shapes) > 1 or len(set(next(iter(shapes)))) > 1):
        known = some_of(sorted(f"{h}x{w}" for h, w in shapes))
        raise ValueError(
            f"pictures of {known} pixels are not squares of one size: set fit=crop (centre square "
            "of the smallest side) or fit=pad (to the largest side, label -100)"
        )
    return min(min(shape) for shape in shapes)


def _fit(array: np.ndarray, fit: str, side: int, fill: int) -> np.ndarray:
    height, width = array.shape[:2]
    if fit == "pad" and max(height, width) <= side:
        padded = np.full((side, side, *array.shape[2:]), fill, array.dtype)
        padded[:height, :width] = array
        return padded
    if fit == "refuse" or min(height, width) < side:
        raise ValueError(f"a picture of {height}x{width} pixels is not {side}x{side}; set fit")
    top, left = (height - side) // 2, (width - side) // 2
    return array[top : top + side, left : left + side]


class MaskFolder(PictureSource):
    """Examples: image [S, S, 3], label int32 [S, S] (class numbers, -100 ignored), id."""

    task = "segmentation"

    def __init__(self, items: Sequence[Pair], classes: Sequence[str], rules: MaskRules, side: int):
        super().__init__("masks", items, classes)
        self.rules, self.native_side = rules, side
        content = [self.fingerprint, f"{rules.fit} {side} {rules.ignore}"]
        self.fingerprint = fingerprint_of("masks", content + [i.mask_digest for i in items])

    def __getitem__(self, i: int) -> dict[str, Any]:
        example, label = self.picture(i), decode_mask(self.items[i].mask)
        if self.rules.ignore is not None:
            label = np.where(label == self.rules.ignore, IGNORE, label).astype(np.int32)
        if label.shape != (self.native_side, self.native_side):
            image = _fit(example["image"], self.rules.fit, self.native_side, 0)
            label = _fit(label, self.rules.fit, self.native_side, IGNORE)
            example |= {"image": image}
        return example | {"label": label}


def open_masks(
    split: str,
    *,
    train: str,
    val: str = "",
    test: str = "",
    on_corrupt: str = "refuse",
    rules: MaskRules | None = None,
) -> MaskFolder:
    """A split of mask folders.

    The classes are rules.classes, else classes.json of the train folder, else the numbers found in
    it. Raises ImageError on masks that are colours, have another size than their picture, or hold
    a value beyond the classes.
    """
    rules = rules or MaskRules()
    if rules.fit not in FITS:
        raise ValueError(f"fit='{rules.fit}' is not {', '.join(FITS)}")
    root = existing(train)
    known = rules.classes or tuple(read_classes(root) or ())
    items, values = _load(root, on_corrupt, replace(rules, classes=known))
    classes = known or tuple(str(k) for k in range(max(values) + 1))
    rules, side = replace(rules, classes=classes), _common_square(items, rules.fit)

    def load(folder: str) -> list[Pair]:
        return items if folder == train else _load(existing(folder), on_corrupt, rules)[0]

    chosen = split_items(load, split, {"train": train, "val": val, "test": test})
    return MaskFolder(chosen, classes, rules, side)
