"""GEO-Bench: the twelve sets as they lie on disk, without the geobench package.

One HDF5 file per sample with one array per band (`04 - Red`, or dated `04 - Red_2020-01-31`). A
segmentation label is an array whose name starts with `label`; a classification label hides in the
root attribute `pickle`, text that spells a pickled dict. Pickles are read by the restricted
unpickler, which never runs code. Splits are lists of file names in `<name>_partition.json`.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from common_jax.files import restricted_loads
from data.images import refuse_system_errors, some_of

LONGEST_PICKLE = 4 << 20
SPLIT_KEYS = {"train": "train", "val": "valid", "test": "test"}
FOLDERS = {
    "classification": "classification_v1.0",
    "multi_label_classification": "classification_v1.0",
    "segmentation": "segmentation_v1.0",
}


class GeoBenchError(ValueError):
    """A set or sample that is not as it should be; the message names the file."""


@dataclass(frozen=True)
class GeoBenchSet:
    """One row of the catalog.

    bands: names of red, green and blue. divisor: value that becomes 1.0. scaling: whether the
    divisor is that of the published code or ours. side: of the backbone, in pixels. sizes: examples
    of train, val and test.
    """

    task: str
    native_side: int
    side: int
    bands: tuple[str, str, str]
    divisor: float
    scaling: str
    sizes: tuple[int, int, int]
    classes: tuple[str, ...]
    prompt: str = "A satellite image"


def set_folder(name: str, task: str, root: str = "") -> Path:
    """Folder of a set below `root`, else below $GEO_BENCH_DIR."""
    root = root or os.environ.get("GEO_BENCH_DIR", "")
    if not root:
        raise FileNotFoundError(
            f"{name} needs GEO-Bench on disk: set GEO_BENCH_DIR to the folder that holds "
            "classification_v1.0 and segmentation_v1.0"
        )
    folder = Path(root).expanduser() / FOLDERS[task] / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is absent: {name} is not in this copy of GEO-Bench")
    return folder


def read_partition(folder: Path, name: str) -> dict[str, list[str]]:
    """{"train": [...], "valid": [...], "test": [...]}, file names without suffix, checked."""
    file = folder / f"{name}_partition.json"
    if not file.exists():
        known = sorted(p.name[: -len("_partition.json")] for p in folder.glob("*_partition.json"))
        raise FileNotFoundError(f"{file} is absent; partitions here: {', '.join(known) or 'none'}")
    parts = json.loads(file.read_text())
    if not isinstance(parts, dict) or not set(SPLIT_KEYS.values()) <= parts.keys():
        raise GeoBenchError(f"{file}: need the keys train, valid and test")
    seen: dict[str, str] = {}
    for split in SPLIT_KEYS.values():
        for sample in parts[split]:
            if seen.setdefault(sample, split) != split:
                raise GeoBenchError(f"{file}: sample {sample} is in {seen[sample]} and in {split}")
    here = {entry.name for entry in os.scandir(folder)}
    missing = [f"{sample}.hdf5" for sample in seen if f"{sample}.hdf5" not in here]
    if missing:
        raise GeoBenchError(
            f"{len(missing)} of {len(seen)} samples of {file} are absent: {some_of(missing)}; "
            "the copy is incomplete"
        )
    return parts


def fraction_partition(folder: Path, fraction: float) -> str | None:
    """Name of the few-label partition of a fraction (`0.01x_train`), None where there is none."""
    name = f"{fraction:.2f}x_train"
    exact = abs(float(name[:4]) - fraction) < 1e-9
    return name if exact and (folder / f"{name}_partition.json").exists() else None


def band_key(keys: Sequence[str], band: str, path: Path) -> str:
    """The array of a band: its name, or its name with a date (the first date of several)."""
    dated = re.compile(re.escape(band) + r"(_\d{4}-\d{2}-\d{2}.*)?$", re.IGNORECASE)
    found = sorted(key for key in keys if dated.match(key))
    if not found:
        raise GeoBenchError(f"{path}: no band '{band}' among {some_of(sorted(keys))}")
    return found[0]


def read_rgb(file: h5py.File, bands: Sequence[str], path: Path) -> np.ndarray:
    """[H, W, 3] float32, unscaled; a coarser band is brought to the size of the finest."""
    keys = list(file.keys())
    planes = [np.asarray(file[band_key(keys, band, path)], np.float32) for band in bands]
    flat = [band for band, plane in zip(bands, planes) if plane.ndim != 2]
    if flat:
        raise GeoBenchError(f"{path}: band {flat[0]} is no 2-D array")
    height, width = max(plane.shape for plane in planes)
    for k, plane in enumerate(planes):
        if plane.shape != (height, width):
            resized = Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR)
            planes[k] = np.asarray(resized)
    return np.stack(planes, -1)


def read_attributes(file: h5py.File, path: Path) -> Mapping[str, Any]:
    """The dict in the root attribute `pickle`, read without running it."""
    text = file.attrs.get("pickle")
    if text is None:
        raise GeoBenchError(f"{path}: no attribute 'pickle', so there is no label")
    text = text.decode() if isinstance(text, bytes) else str(text)
    if len(text) > LONGEST_PICKLE:
        raise GeoBenchError(f"{path}: attribute 'pickle' of {len(text)} characters; not read")
    try:
        content = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise GeoBenchError(f"{path}: attribute 'pickle' does not spell bytes ({error})") from error
    if not isinstance(content, bytes):
        raise GeoBenchError(
            f"{path}: attribute 'pickle' spells {type(content).__name__}, not bytes"
        )
    found = restricted_loads(content, source=f"{path} (attribute 'pickle')")
    if not isinstance(found, Mapping):
        raise GeoBenchError(f"{path}: attribute 'pickle' holds {type(found).__name__}, not a dict")
    return found


def read_label(file: h5py.File, table: GeoBenchSet, path: Path) -> np.ndarray:
    """int32 class, float32 [K] multi-hot, or int32 [H, W]; checked against the class count."""
    count = len(table.classes)
    if table.task == "segmentation":
        keys = sorted(key for key in file if key.lower().startswith("label"))
        if not keys:
            raise GeoBenchError(f"{path}: no array 'label' among {some_of(sorted(file.keys()))}")
        label = np.asarray(file[keys[0]]).astype(np.int32)
        label = label[..., 0] if label.ndim == 3 and label.shape[-1] == 1 else label
    else:
        label = np.asarray(read_attributes(file, path).get("label"))
        if label.dtype == object:
            raise GeoBenchError(f"{path}: attribute 'pickle' holds no label")
        if table.task == "multi_label_classification":
            if label.shape != (count,) or not np.isin(label, (0, 1)).all():
                raise GeoBenchError(f"{path}: label {label.shape} is not {count} zeros and ones")
            return label.astype(np.float32)
        label = label.astype(np.int32).reshape(())
    if label.min() < 0 or label.max() >= count:
        worst = label.max() if label.max() >= count else label.min()
        raise GeoBenchError(
            f"{path}: label {worst}, but there are {count} classes (0..{count - 1})"
        )
    return label


class GeoBenchSource:
    """Examples: image float32 [H, W, 3] in [0, 1] (red, green, blue), label, id."""

    def __init__(self, name: str, table: GeoBenchSet, folder: Path, samples: Sequence[str]):
        self.name, self.table, self.folder = name, table, Path(folder)
        self.samples = list(samples)
        self.task, self.classes = table.task, table.classes
        self.native_side = table.native_side
        content = [f"{s} {(self.folder / (s + '.hdf5')).stat().st_size}" for s in self.samples]
        head = f"{table.bands} {table.divisor}"
        digest = hashlib.sha256("\n".join([head, *content]).encode()).hexdigest()
        self.fingerprint = f"{name}-{digest[:32]}"

    def __len__(self) -> int:
        return len(self.samples)

    def _open(self, i: int) -> tuple[Path, h5py.File]:
        path = self.folder / f"{self.samples[int(i)]}.hdf5"
        try:
            return path, h5py.File(path, "r")
        except OSError as error:
            raise _damaged(path, error) from error

    def labels(self) -> np.ndarray | None:
        """All labels, from every file; None for maps."""
        if self.task == "segmentation":
            return None
        found = []
        for i in range(len(self)):
            path, file = self._open(i)
            with file:
                found.append(read_label(file, self.table, path))
        return np.stack(found)

    def __getitem__(self, i: int) -> dict[str, Any]:
        path, file = self._open(i)
        try:
            with file:
                image = read_rgb(file, self.table.bands, path)
                label = read_label(file, self.table, path)
        except OSError as error:
            raise _damaged(path, error) from error
        image = np.clip(image / np.float32(self.table.divisor), 0, 1)
        if self.task == "segmentation" and label.shape != image.shape[:2]:
            raise GeoBenchError(f"{path}: label {label.shape} and image {image.shape[:2]} differ")
        return {"image": image, "label": label, "id": self.samples[int(i)]}


def _damaged(path: Path, error: OSError) -> GeoBenchError:
    refuse_system_errors(error)
    return GeoBenchError(f"{path}: cannot be read as HDF5 ({error}); truncated? copy it again")


def open_geobench(
    name: str,
    table: GeoBenchSet,
    split: str,
    *,
    root: str = "",
    partition: str = "default",
    check_sizes: bool = True,
) -> GeoBenchSource:
    """A split (train, val, test) of a set.

    The number of examples must be that of the catalog (for few-label partitions: of val and test),
    unless check_sizes is False.
    """
    if split not in SPLIT_KEYS:
        raise ValueError(f"{name} has no split '{split}'; known: {', '.join(SPLIT_KEYS)}")
    folder = set_folder(name, table.task, root)
    samples = read_partition(folder, partition)[SPLIT_KEYS[split]]
    expected = dict(zip(SPLIT_KEYS, table.sizes))[split]
    whole = split != "train" or partition in ("default", "1.00x_train")
    if check_sizes and whole and len(samples) != expected:
        raise GeoBenchError(
            f"{folder}: {len(samples)} {split} samples, expected {expected}. Another release of "
            "GEO-Bench? Scores would not be comparable; set check_sizes=False to use it anyway"
        )
    return GeoBenchSource(name, table, folder, samples)
