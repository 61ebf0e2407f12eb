"""The user's own folders: classes, masks, or just pictures.

classes: DIR/<class>/<picture>, or DIR/labels.csv (path,class[,label]); DIR/classes.json fixes the
order of the classes, else it is alphabetical. masks: DIR/images/NAME.*, DIR/masks/NAME.* and
optionally DIR/classes.json. Train, val and test are separate folders, or one folder split by blocks
of image numbers (splits.py). The same picture in two splits is refused.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.images import SUFFIXES, Checked, check_images, decode, is_image, some_of
from data.splits import SPLITS, block_cuts, image_number, refuse_overlap, split_of


@dataclass(frozen=True)
class Item:
    """A picture of a folder with its class (or the group its numbers are counted in)."""

    path: str
    group: str
    checked: Checked


def natural(path: Path) -> list:
    """Sorting key in which 2 comes before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def existing(folder: str | Path) -> Path:
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder")
    return root


def read_classes(root: Path) -> list[str] | None:
    """Class names from classes.json (a list), or None."""
    file = root / "classes.json"
    if not file.exists():
        return None
    names = json.loads(file.read_text())
    if not isinstance(names, list) or len(set(names)) != len(names):
        raise ValueError(f"{file}: need a JSON list of distinct class names, in label order")
    return [str(name) for name in names]


def _rows_of_csv(file: Path) -> list[tuple[Path, str, str]]:
    with file.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    if not rows or not {"path", "class"} <= rows[0].keys():
        raise ValueError(f"{file}: need a header with the columns path and class")
    return [(file.parent / row["path"], row["class"], row.get("label") or "") for row in rows]


def class_files(root: Path) -> tuple[list[str], list[tuple[Path, str]]]:
    """(class names in label order, [(file, class)] in natural order)."""
    classes, table = read_classes(root), root / "labels.csv"
    if table.exists():
        rows = _rows_of_csv(table)
        missing = [str(path) for path, _, _ in rows if not path.exists()]
        if missing:
            raise FileNotFoundError(
                f"{table} names {len(missing)} absent files: {some_of(missing)}"
            )
        classes = classes or sorted({name for _, name, _ in rows})
        wrong = [
            f"{path.name}: {name} is {label}"
            for path, name, label in rows
            if label and (name not in classes or classes.index(name) != int(label))
        ]
        if wrong:
            raise ValueError(f"{table} disagrees with the class order {classes}: {some_of(wrong)}")
        files = [(path, name) for path, name, _ in rows]
    else:
        folders = sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
        found = [(p, d.name) for d in folders for p in d.rglob("*") if is_image(p)]
        files = sorted(found, key=lambda item: natural(item[0]))
        classes = classes or sorted({name for _, name in files})
    if not files:
        raise ValueError(f"{root} holds no class folders with pictures and no labels.csv")
    strange = sorted({name for _, name in files} - set(classes))
    if strange:
        raise ValueError(f"{root} has classes {strange} that are not in {classes}")
    return classes, files


def _items(
    files: Sequence[tuple[Path, str]], on_corrupt: str, problems: list[str] | None = None
) -> list[Item]:
    found = check_images([p for p, _ in files], on_corrupt, problems=problems)
    checked = {c.path: c for c in found}
    return [Item(str(p), group, checked[str(p)]) for p, group in files if str(p) in checked]


def split_items(
    load: Callable[[str], list[Item]], split: str, folders: dict[str, str]
) -> list[Item]:
    """The items of a split. folders: {"train": DIR, "val": DIR or "", "test": DIR or ""}.

    load(DIR) -> all items of a folder. Without a test folder the train folder is split in three,
    with a test but no val folder in two.
    """
    if split not in SPLITS:
        raise ValueError(f"no split '{split}'; known: {', '.join(SPLITS)}")
    if not folders.get("train"):
        raise ValueError("no folder given: set train=DIR (and test=DIR, or DIR is split by blocks)")
    items = {name: load(folder) for name, folder in folders.items() if folder}
    if "test" not in items or "val" not in items:
        items = _split_train(items)
    refuse_overlap({k: {i.checked.digest: i.path for i in v} for k, v in items.items()})
    return items[split]


def _split_train(items: dict[str, list[Item]]) -> dict[str, list[Item]]:
    numbers: dict[str, list[int]] = {}
    for item in items["train"]:
        numbers.setdefault(item.group, []).append(image_number(item.path))
    cuts = block_cuts(numbers)
    if "test" in items:  # only validation is cut off: the highest quarter of all
        cuts = {group: (test, 10**18) for group, (_, test) in cuts.items()}
    elif "val" in items:
        cuts = {group: (test, test) for group, (_, test) in cuts.items()}
    found: dict[str, list[Item]] = {name: list(part) for name, part in items.items()}
    found["train"] = []
    for item in items["train"]:
        part = split_of(cuts, item.group, image_number(item.path))
        found.setdefault(part, []).append(item)
    return found


def common_side(items: Sequence[Item]) -> int:
    """The most frequent short side in pixels."""
    return Counter(min(i.checked.height, i.checked.width) for i in items).most_common(1)[0][0]


def fingerprint_of(kind: str, parts: Sequence[str]) -> str:
    return f"{kind}-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:32]}"


class PictureSource:
    """What the sources over picture files share: `items`, hashes, a fingerprint of the content."""

    def __init__(self, name: str, items: Sequence[Item], classes: Sequence[str]):
        if not items:
            raise ValueError(f"source '{name}' is empty: no usable picture is left")
        self.name, self.items, self.classes = name, list(items), tuple(classes)
        self.native_side = common_side(items)
        content = [f"{i.checked.digest} {i.group}" for i in self.items]
        self.fingerprint = fingerprint_of(name, [*self.classes, *content])

    def __len__(self) -> int:
        return len(self.items)

    @property
    def digests(self) -> dict[str, str]:
        """{hash of pixels: file}."""
        return {item.checked.digest: item.path for item in self.items}

    def picture(self, i: int) -> dict[str, Any]:
        return {"image": decode(self.items[i].path), "id": self.items[i].path}


class ClassFolder(PictureSource):
    """Examples: image [H, W, 3], label int32, id (the path)."""

    task = "classification"

    def labels(self) -> np.ndarray:
        return np.array([self.classes.index(item.group) for item in self.items])

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.picture(i) | {"label": np.int32(self.classes.index(self.items[i].group))}


class ImageFolder(PictureSource):
    """Pictures without labels, for pretraining. Examples: image [H, W, 3], id.

    problems: what is wrong with each picture that was left out.
    """

    task = "images"
    problems: Sequence[str] = ()

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.picture(i)


class Pictures(ImageFolder):
    """Pictures to be described, each under its path relative to the folder it was found in."""

    def __init__(self, items: Sequence[Item], root: Path):
        super().__init__("pictures", items, ())
        self.names = [Path(item.path).relative_to(root).as_posix() for item in items]


def open_pictures(path: str | Path, on_corrupt: str = "refuse") -> Pictures:
    """One picture, or every picture below a folder in natural order; none is merged or left out.

    on_corrupt: "refuse" raises ImageError naming the broken files, "skip" leaves them out.
    """
    path = Path(path).expanduser()
    if path.is_file():
        files, root = [path], path.parent
    elif path.is_dir():
        files = sorted((p for p in path.rglob("*") if is_image(p)), key=natural)
        root = path
    else:
        raise FileNotFoundError(f"{path} is neither a picture nor a folder of pictures")
    if not files:
        raise ValueError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    return Pictures(_items([(file, "") for file in files], on_corrupt), root)


def open_class_folder(
    split: str, *, train: str, val: str = "", test: str = "", on_corrupt: str = "refuse"
) -> ClassFolder:
    """A split of class folders; the class list is that of the train folder."""
    classes, _ = class_files(existing(train))

    def load(folder: str) -> list[Item]:
        root = existing(folder)
        _, files = class_files(root)
        strange = sorted({name for _, name in files} - set(classes))
        if strange:
            raise ValueError(f"{root} has classes {strange}; the train folder has {classes}")
        return _items(files, on_corrupt)

    items = split_items(load, split, {"train": train, "val": val, "test": test})
    return ClassFolder("folder", items, classes)


def is_excluded(path: Path, exclude: frozenset[str]) -> bool:
    """By file name, or by the end of the path for entries that hold a slash."""
    if path.name in exclude:
        return True
    return any("/".join(path.parts[-n:]) in exclude for n in range(2, min(6, len(path.parts)) + 1))


def open_images(
    split: str,
    *,
    roots: Sequence[str] | str,
    exclude: Sequence[str] = (),
    holdout: float = 0.05,
    on_corrupt: str = "refuse",
) -> ImageFolder:
    """Every picture below `roots` but those in folders named `masks`, for pretraining.

    exclude: file names (`a.jpg`), path ends (`test/a.jpg`) or pixel hashes (`sha256:...`) that must
    not be seen. The last `holdout` of each folder, in order of numbers, is split "val", the rest
    "train". A picture that is there several times is kept once.
    """
    if split not in ("train", "val"):
        raise ValueError(f"pictures without labels have no split '{split}'; known: train, val")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout={holdout} is not in [0, 1)")
    roots = [roots] if isinstance(roots, (str, Path)) else list(roots)
    if not roots:
        raise ValueError("no folder given: set train=DIR (several: separated by commas)")
    names = frozenset(exclude)
    files: dict[Path, None] = {}
    for root in map(existing, roots):
        found = sorted(
            (
                p
                for p in root.rglob("*")
                if is_image(p) and "masks" not in p.relative_to(root).parts
            ),
            key=natural,
        )
        if not found:
            raise ValueError(f"{root} holds no pictures")
        files |= dict.fromkeys(p for p in found if not is_excluded(p, names))
    problems: list[str] = []
    items = _items([(path, str(path.parent)) for path in files], on_corrupt, problems)
    once: dict[str, Item] = {}
    for item in items:
        if f"sha256:{item.checked.digest}" not in names:
            first = once.setdefault(item.checked.digest, item)
            if first is not item:
                problems.append(f"{item.path}: the same picture as {first.path}")
    groups: dict[str, list[Item]] = {}
    for item in once.values():
        groups.setdefault(item.group, []).append(item)
    kept = []
    for members in groups.values():
        first = len(members) - int(np.ceil(holdout * len(members)))
        kept += members[:first] if split == "train" else members[first:]
    source = ImageFolder("images", kept, ())
    source.problems = problems
    return source
