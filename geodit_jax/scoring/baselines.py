"""Answers that need no model: the most frequent one, and the caption of the nearest picture.

A model is worth something where it beats these. They make rows like a model's, scored alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from geodit_jax.boxes import format_boxes
from geodit_jax.scoring.answers import squeeze


def most_frequent(train: Sequence, rows: Iterable[Mapping]) -> list[dict]:
    """Copies of prediction rows, answered by what is most frequent in the training records.

    train: records (`id, task, dataset, question, answers, boxes, size, category`) with the truth.
    caption, classification, vqa: the most frequent answer, for vqa of the same type; grounding and
    detection: one box with the median corners, of the same class for detection. Records of the same
    dataset go first, then those of other datasets. Of equally frequent answers the first in
    alphabetical order is taken. ValueError when the training records have nothing for a row.
    """
    by_key: dict[tuple, list] = {}
    for record in train:
        topic = _topic(record.task, record.category, record.question)
        for key in _keys(record.task, record.dataset, topic):
            by_key.setdefault(key, []).append(record)
    answered, cache = [], {}
    for row in rows:
        if row["task"] == "chat":
            answered.append({**row, "prediction": ""})
            continue
        topic = _topic(row["task"], row.get("category", ""), row.get("question", ""))
        keys = _keys(row["task"], row.get("dataset", ""), topic)
        key = next((key for key in keys if key in by_key), None)
        if key is None:
            raise ValueError(
                f"row {row['id']!r}: no training record of task {row['task']!r}; give training "
                "records of every task that is scored"
            )
        if key not in cache:
            cache[key] = _summarise(row["task"], by_key[key])
        answered.append(_answer(row, cache[key]))
    return answered


def _topic(task: str, category: str, question: str) -> str:
    """What narrows a task: the type of a question, the class to find."""
    return squeeze({"vqa": category, "detection": question}.get(task, ""))


def _keys(task: str, dataset: str, topic: str) -> list[tuple]:
    """From narrow to wide."""
    return [(task, dataset, topic), (task, None, topic), (task, dataset, None), (task, None, None)]


def _summarise(task: str, records: Sequence):
    if task in ("grounding", "detection"):
        corners = [
            np.asarray(box, np.float64) / np.tile(record.size, 2)
            for record in records
            for box in record.boxes
        ]
        return np.median(corners, 0) if corners else None
    counts = Counter(answer for record in records for answer in record.answers)
    return min(counts, key=lambda answer: (-counts[answer], answer)) if counts else ""


def _answer(row: Mapping, found) -> dict:
    if row["task"] not in ("grounding", "detection"):
        return {**row, "prediction": found}
    if found is None:
        return {**row, "prediction": "", "codec": "pixel"}
    box = found * np.tile(np.asarray(row["size"], np.float64), 2)
    text = format_boxes(box[None], tuple(row["size"]), "pixel")
    return {**row, "prediction": text, "codec": "pixel"}


# ---------------------------------------------------------------------------------------- nearest
def colour_histogram(image: np.ndarray, bins: int = 8) -> np.ndarray:
    """Shares of the `bins`^3 cells of colour space, float64 [bins^3], of uint8 [H, W, 3]."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image is {image.dtype} {image.shape}; uint8 [H, W, 3] is needed")
    cells = image.reshape(-1, 3).astype(np.int64) * bins // 256
    index = (cells[:, 0] * bins + cells[:, 1]) * bins + cells[:, 2]
    return np.bincount(index, minlength=bins**3) / len(index)


def find_nearest(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Index of the training row [N, F] nearest to each test row [M, F] by summed difference."""
    train, test = np.asarray(train, np.float64), np.asarray(test, np.float64)
    if not len(train):
        raise ValueError("there is no training picture to be nearest")
    return np.array([np.abs(train - row).sum(1).argmin() for row in test], np.int64)


def nearest_image_captions(
    train_features: np.ndarray, captions: Sequence[Sequence[str]], test_features: np.ndarray
) -> list[str]:
    """The first caption of the nearest training picture, for each test picture.

    train_features [N, F] with their captions (N lists), test_features [M, F], such as
    `colour_histogram` of each picture.
    """
    if len(captions) != len(train_features):
        raise ValueError(f"{len(captions)} lists of captions for {len(train_features)} pictures")
    return [captions[index][0] for index in find_nearest(train_features, test_features)]
