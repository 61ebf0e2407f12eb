"""Prepared TensorFlow Datasets, read without TensorFlow through `tfds.data_source`.

The dataset must lie on disk in array_record format (`tfds build --file_format=array_record`, or
`tfds.builder(name, file_format="array_record").download_and_prepare()`); nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

IMAGE_KEYS = ("image", "rgb", "optical")
LABEL_KEYS = ("label", "labels", "mask", "segmentation_mask", "segmentation_label", "map")
NAMES = {"train": ("train",), "val": ("validation", "val", "valid"), "test": ("test",)}


def _builder(name: str, data_dir: str):
    import tensorflow_datasets as tfds

    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            return tfds.builder_from_directory(folder)
        return tfds.builder(name, data_dir=data_dir or None)
    except (tfds.core.DatasetNotFoundError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"tfds:{name} is neither a prepared dataset in '{data_dir or 'default'}' nor "
            "a folder of one; prepare it with file_format=array_record and give data_dir=DIR"
        ) from error


def split_names(known: Mapping[str, Any] | list[str], split: str) -> str:
    """The tfds split for ours. Without a validation split, val is the last quarter of train.

    Without a test split the order is train 56 %, val 19 %, test 25 % of train.
    """
    names = {ours: next((n for n in theirs if n in known), "") for ours, theirs in NAMES.items()}
    if split not in names:
        raise ValueError(f"no split '{split}'; known: {', '.join(names)}")
    if not names["train"]:
        raise ValueError(
            f"the dataset has splits {sorted(known)}; give tfds_split='...' for {split}"
        )
    first, last = ("train", 100) if names["test"] else ("train", 75)
    cut = last if names["val"] else (75 if names["test"] else 56)
    return {
        "train": f"{first}[:{cut}%]" if cut < 100 else first,
        "val": names["val"] or f"train[{cut}%:{last}%]",
        "test": names["test"] or "train[75%:]",
    }[split]


def _key(features: Mapping[str, Any], given: str, usual: tuple[str, ...], what: str) -> str:
    found = given or next((key for key in usual if key in features), "")
    if found not in features:
        raise ValueError(
            f"no {what} '{found}' among the features {sorted(features)}; set {what}_key"
        )
    return found


class TfdsSource:
    """Examples: image [H, W, 3] (first three channels), label, id."""

    def __init__(self, name: str, records, features, keys: tuple[str, str]):
        self.name, self.split, self.records = f"tfds:{name}", "", records
        self.image_key, self.label_key = keys
        feature = features[self.label_key]
        shape = tuple(feature.shape or ())
        self.task = {0: "classification", 1: "multi_label_classification"}.get(
            len(shape), "segmentation"
        )
        # A list of class numbers (Sequence of ClassLabel) holds its names one level deeper.
        inner = getattr(feature, "feature", feature)
        self.classes = tuple(getattr(inner, "names", None) or ())
        self.listed = self.task == "multi_label_classification" and shape[0] is None
        side = features[self.image_key].shape[0]
        self.native_side = int(side or np.shape(self.records[0][self.image_key])[0])
        self.fingerprint = ""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        record = self.records[int(i)]
        image = np.asarray(record[self.image_key])
        if image.ndim != 3:
            raise ValueError(
                f"{self.name}: image {i} has shape {image.shape}, need [H, W, channels]"
            )
        image = np.repeat(image, 3, -1) if image.shape[-1] == 1 else image[..., :3]
        if image.dtype == np.uint16:
            image = image.astype(np.float32) / np.float32(65535)
        label = np.asarray(record[self.label_key])
        if self.listed:
            label = np.isin(np.arange(len(self.classes)), label).astype(np.float32)
        elif self.task == "multi_label_classification":
            label = label.astype(np.float32)
        else:
            label = label.reshape(label.shape[:2] if self.task == "segmentation" else ())
            label = label.astype(np.int32)
        return {"image": image, "label": label, "id": f"{self.name}/{self.split}/{int(i)}"}


def open_tfds(
    name: str,
    split: str,
    *,
    data_dir: str = "",
    image_key: str = "",
    label_key: str = "",
    tfds_split: str = "",
    classes: Sequence[str] = (),
) -> TfdsSource:
    """A split of a prepared dataset: a registered name, or the folder of a version of one.

    classes: names, needed where the label feature does not carry them (plain numbers, masks).
    """
    builder = _builder(name, data_dir)
    features, splits = builder.info.features, builder.info.splits
    if not splits:
        raise FileNotFoundError(
            f"tfds:{name} is known but not prepared in {builder.data_dir}; run "
            "builder.download_and_prepare() with file_format=array_record first"
        )
    chosen = tfds_split or split_names(splits, split)
    keys = (
        _key(features, image_key, IMAGE_KEYS, "image"),
        _key(features, label_key, LABEL_KEYS, "label"),
    )
    try:
        records = builder.as_data_source(chosen)
    except NotImplementedError as error:
        raise ValueError(
            f"tfds:{name} is stored as {builder.info.file_format}, which has no random access; "
            "prepare it again with file_format=array_record"
        ) from error
    source = TfdsSource(name, records, features, keys)
    source.split, source.classes = chosen, tuple(classes) or source.classes
    if not source.classes:
        raise ValueError(f"tfds:{name}: '{keys[1]}' carries no class names; set classes=[...]")
    sizes = {key: (info.num_examples, info.num_bytes) for key, info in splits.items()}
    source.fingerprint = f"tfds-{builder.info.full_name}-{chosen}-{keys}-{sorted(sizes.items())}"
    return source
