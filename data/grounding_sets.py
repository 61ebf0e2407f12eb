"""Readers of visual grounding: DIOR-RSVG (XML) and RSVG (lists in torch files).

DIOR-RSVG numbers its expressions by running object: all `object` elements of Annotations/*.xml,
files in sorted order, from 0. train.txt, val.txt and test.txt list these numbers, not pictures.
"""

from __future__ import annotations

import os
import pickletools
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from common_jax.files import UnsafePickleError, read_json, restricted_loads
from data.folders import existing
from data.gathering import STRICT, Gathering, Rules
from data.record_boxes import RecordError, to_pixels
from data.record_pictures import Finder
from data.records import Record, RecordSource
from data.splits import SPLITS

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _listed(path: Path) -> list[int]:
    """The numbers of a split file. Raises RecordError on names or on a number twice."""
    found = path.read_text().split()
    wrong = [text for text in found if not text.isdigit()]
    if wrong:
        raise RecordError(
            f"{path}: '{wrong[0]}' is no number; the file lists running objects, not pictures"
        )
    numbers = [int(text) for text in found]
    if len(set(numbers)) < len(numbers):
        raise RecordError(f"{path}: a number occurs twice; restore the published file")
    return numbers


def _chosen(root: Path, split: str, objects: int) -> set[int]:
    """Numbers of a split, after checking that the lists at hand fit the annotations."""
    lists = {s: _listed(root / f"{s}.txt") for s in SPLITS if (root / f"{s}.txt").is_file()}
    if split not in lists:
        raise FileNotFoundError(f"{root / f'{split}.txt'} is not a file (running object numbers)")
    together = [n for numbers in lists.values() for n in numbers]
    largest = max(together, default=-1)
    shift = "every number behind a missing file means another object; restore the XML files"
    if largest >= objects:
        raise RecordError(
            f"{root}: the lists name object {largest}, Annotations has {objects} (0 to "
            f"{objects - 1}); {shift}"
        )
    if len(set(together)) < len(together):
        raise RecordError(f"{root}: two of {', '.join(lists)} share a number; restore the lists")
    if len(lists) == len(SPLITS) and len(together) != objects:
        raise RecordError(
            f"{root}: the three lists name {len(together)} objects, Annotations has {objects}; "
            f"{shift}, and use no list of pictures"
        )
    return set(lists[split])


def _text(node: ElementTree.Element, name: str) -> str:
    found = node.findtext(name)
    if found is None:
        raise RecordError(f"<{node.tag}> has no <{name}>")
    return found.strip()


def _size(tree: ElementTree.Element) -> tuple[int, int] | None:
    width, height = (tree.findtext(f"size/{side}") for side in ("width", "height"))
    return (int(width), int(height)) if width and height else None


def _parsed(path: Path) -> ElementTree.Element:
    """Raises RecordError: a file that cannot be parsed would shift every number behind it."""
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise RecordError(f"{path}: not valid XML ({error}); restore the file") from error


def read_dior_rsvg(
    root: str | os.PathLike,
    split: str,
    *,
    images: str | os.PathLike = "",
    rules: Rules = STRICT,
) -> RecordSource:
    """One record an expression; category = class of the object, id = its running number.

    root holds Annotations and the three lists; images defaults to root/JPEGImages.
    """
    root = existing(root)
    files = sorted(existing(root / "Annotations").glob("*.xml"), key=lambda path: path.name)
    trees = [(path, _parsed(path)) for path in files]
    chosen = _chosen(root, split, sum(len(tree.findall("object")) for _, tree in trees))
    finder, gathering = Finder(images or root / "JPEGImages"), Gathering("dior_rsvg", rules)
    number = -1
    for path, tree in trees:
        for node in tree.findall("object"):
            number += 1
            if number not in chosen:
                continue
            where = f"{path} object {number}"
            with gathering.reading(where):
                box = [float(_text(node, f"bndbox/{name}")) for name in CORNERS]
                gathering.add(
                    Record(
                        id=f"dior_rsvg-{number:05d}",
                        image=finder.find(_text(tree, "filename")),
                        task="grounding",
                        question=_text(node, "description"),
                        boxes=(to_pixels(box, "pixel", None),),
                        labels=(_text(node, "name"),),
                        size=_size(tree),
                        category=_text(node, "name"),
                        dataset="dior_rsvg",
                        split=split,
                    ),
                    where,
                )
    return gathering.finish()


# ------------------------------------------------------------------------------------------- RSVG
def _old_torch_object(content: bytes) -> bytes:
    """The fourth pickle of the torch format before 1.6 (behind magic, version and machine)."""
    stream = BytesIO(content)
    for _ in range(3):
        for _ in pickletools.genops(stream):
            pass
    return content[stream.tell() :]


def read_torch_list(path: str | os.PathLike) -> list:
    """A list of plain values from a `.pth` file (torch zip, older torch, or a pickle) or JSON.

    Torch is not needed. Raises ValueError with a one-line conversion when the file holds tensors or
    anything else that is not plain, or is damaged.
    """
    path = Path(path)
    if path.suffix == ".json":
        return read_json(path)
    content = path.read_bytes()
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                inside = [n for n in archive.namelist() if n.endswith("data.pkl")]
                content = archive.read(inside[0])
        elif content[2:13] == b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P":  # the magic number of torch
            content = _old_torch_object(content)
        found = restricted_loads(content, source=str(path))
    except (UnsafePickleError, ValueError, IndexError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: not a list of plain values ({error}). If you trust the file, convert it once "
            "where torch is installed, and leave the .json beside it: python -c "
            f"\"import torch, json; x = torch.load('{path}', weights_only=False); "
            f"json.dump(x, open('{path.with_suffix('.json')}', 'w'), default=lambda v: list(v))\""
        ) from error
    if not isinstance(found, (list, tuple)):
        raise ValueError(f"{path}: holds a {type(found).__name__}, need a list")
    return list(found)


def _is_box(value: Any) -> bool:
    values = value.tolist() if isinstance(value, np.ndarray) else value
    return (
        isinstance(values, (list, tuple))
        and len(values) == 4
        and all(isinstance(v, (int, float, np.number)) for v in values)
    )


def _fields(entry: Any) -> tuple[str, Sequence[float], str]:
    """(picture, box, expression) of an entry: the first text, the first box, the text behind it."""
    at = next((k for k, value in enumerate(entry) if _is_box(value)), None)
    before = [v for v in entry[: at or 0] if isinstance(v, str)]
    behind = [v for v in entry[(at or 0) + 1 :] if isinstance(v, str)]
    if at is None or not before or not behind:
        raise RecordError(f"{entry!r:.100}: need (picture, ..., box, expression, ...)")
    box = entry[at]
    return before[0], box.tolist() if isinstance(box, np.ndarray) else box, behind[0]


def read_rsvg(
    root: str | os.PathLike,
    split: str,
    *,
    images: str | os.PathLike = "",
    box_format: str = "pixel",
    rules: Rules = STRICT,
) -> RecordSource:
    """One record an expression of rsvg_SPLIT.pth (or the rsvg_SPLIT.json it was converted to).

    images: the folder of the pictures, default anywhere below root. box_format: "pixel" for
    corners, "xywh" for corner, width and height.
    """
    root = existing(root)
    candidates = [root / f"rsvg_{split}{suffix}" for suffix in (".json", ".pth")]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{root} has neither {candidates[0].name} nor {candidates[1].name}")
    finder, gathering = Finder(images or root), Gathering("rsvg", rules)
    for number, entry in enumerate(read_torch_list(path)):
        where = f"{path} entry {number}"
        with gathering.reading(where):
            picture, box, expression = _fields(entry)
            gathering.add(
                Record(
                    id=f"rsvg-{split}-{number:05d}",
                    image=finder.find(picture),
                    task="grounding",
                    question=expression.strip(),
                    boxes=(to_pixels(box, box_format, None),),
                    dataset="rsvg",
                    split=split,
                ),
                where,
            )
    return gathering.finish()
