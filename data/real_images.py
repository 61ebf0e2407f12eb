"""The splits of the development images ($EO_DATA_DIR): one for all folders that share pictures.

UC Merced, its captions and its questions are cut at the same numbers of each class, the VHR-10
pictures and the crops made from them at the same picture numbers, the road tiles at theirs.
Unlabelled Sentinel-2 tiles are training data. Pretraining leaves out what `held_out` lists.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from data.images import is_image
from data.splits import block_cuts, image_number, split_of

FAMILIES = {
    "ucmerced": ("ucmerced", "ucm_captions/images", "ucm_vqa/images"),
    "vhr10": ("nwpu_vhr10/images", "vhr10_masks/images"),
    "roads": ("roads/images",),
}
UNLABELLED = ("sentinel2_rgb",)


def _group(family: str, path: Path) -> str:
    """UC Merced files are named by class; the others are one group."""
    return re.sub(r"\d+$", "", path.stem) if family == "ucmerced" else family


def split_table(root: str | Path) -> dict[str, str]:
    """{path relative to root: train | val | test} of every picture below the known folders."""
    root, table = Path(root), {}
    for family, folders in FAMILIES.items():
        paths = [p for folder in folders for p in sorted((root / folder).rglob("*")) if is_image(p)]
        numbers: dict[str, list[int]] = {}
        for path in paths:
            numbers.setdefault(_group(family, path), []).append(image_number(path.name))
        cuts = block_cuts(numbers)
        for path in paths:
            split = split_of(cuts, _group(family, path), image_number(path.name))
            table[path.relative_to(root).as_posix()] = split
    for folder in UNLABELLED:
        found = (p for p in sorted((root / folder).rglob("*")) if is_image(p))
        table |= {p.relative_to(root).as_posix(): "train" for p in found}
    return table


def held_out(root: str | Path, splits: Sequence[str] = ("val", "test")) -> list[str]:
    """Path ends for `open_source("images", ..., exclude=...)`."""
    return sorted(path for path, split in split_table(root).items() if split in splits)
