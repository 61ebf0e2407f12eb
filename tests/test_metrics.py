"""Scores against scikit-learn; counts over batches."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as oracle

from common_jax.metrics import (
    class_f1,
    count_confusion,
    count_multilabel,
    precision_recall,
    score,
    score_binary,
)

RNG = np.random.default_rng(0)


def close(a, b):
    assert abs(a - b) < 1e-12, (a, b)


@pytest.mark.parametrize("absent", [False, True])
def test_classification_scores_equal_scikit_learn(absent):
    labels = RNG.integers(0, 5 - absent, 300)
    guess = np.where(RNG.random(300) < 0.6, labels, RNG.integers(0, 5 - absent, 300))
    # Batches with padded rows add up to the whole.
    counts = sum(
        count_confusion(
            np.append(labels[i : i + 70], 3),
            np.append(guess[i : i + 70], 2),
            5,
            np.append(np.ones(len(labels[i : i + 70]), bool), False),
        )
        for i in range(0, 300, 70)
    )
    found, every = score(counts, "classification"), {"labels": range(5), "zero_division": 0}
    np.testing.assert_array_equal(counts, oracle.confusion_matrix(labels, guess, labels=range(5)))
    close(found["accuracy"], oracle.accuracy_score(labels, guess))
    precision = oracle.precision_score(labels, guess, average="macro", **every)
    recall = oracle.recall_score(labels, guess, average="macro", **every)
    close(found["macro_precision"], precision)
    close(found["macro_recall"], recall)
    close(found["macro_f1"], oracle.f1_score(labels, guess, average="macro", **every))
    default = oracle.f1_score(labels, guess, average="macro", zero_division=0)
    close(found["macro_f1_present"], default)
    close(found["f1_of_macro"], 2 * precision * recall / (precision + recall))
    assert abs(found["f1_of_macro"] - found["macro_f1"]) > 1e-6


def test_map_scores_equal_scikit_learn_with_and_without_absent_classes():
    labels = RNG.integers(0, 4, (6, 9, 9))
    guess = np.where(RNG.random(labels.shape) < 0.5, labels, RNG.integers(0, 4, labels.shape))
    labels[0, :3] = 255
    counts = count_confusion(labels, guess, 5, ignore_index=255)
    kept = labels != 255
    found = score(counts, "segmentation")
    iou = oracle.jaccard_score(
        labels[kept], guess[kept], labels=range(5), average=None, zero_division=0
    )
    every = {"labels": range(5), "average": None, "zero_division": 0}
    f1 = oracle.f1_score(labels[kept], guess[kept], **every)
    for k in range(5):
        close(found[f"iou_{k}"], iou[k])
        close(found[f"f1_{k}"], f1[k])
    precision, recall = precision_recall(counts)
    for k, value in enumerate(oracle.precision_score(labels[kept], guess[kept], **every)):
        close(precision[k], value)
    for k, value in enumerate(oracle.recall_score(labels[kept], guess[kept], **every)):
        close(recall[k], value)
    close(found["miou"], iou.mean())
    close(found["miou_present"], iou[:4].mean())
    assert counts.dtype == np.int64 and counts.sum() == kept.sum()


def test_multilabel_scores_equal_scikit_learn():
    labels = (RNG.random((80, 7)) < 0.3).astype(np.float32)
    guess = RNG.random((80, 7)) < 0.4
    mask = np.arange(80) < 70
    found = score(count_multilabel(guess, labels, mask), "multi_label_classification")
    truth, guess = labels[:70], guess[:70]
    close(found["micro_f1"], oracle.f1_score(truth, guess, average="micro"))
    close(found["micro_precision"], oracle.precision_score(truth, guess, average="micro"))
    close(found["micro_recall"], oracle.recall_score(truth, guess, average="micro"))
    close(found["macro_f1"], oracle.f1_score(truth, guess, average="macro", zero_division=0))
    close(found["accuracy"], oracle.accuracy_score(truth.reshape(-1), guess.reshape(-1)))


def test_scores_of_one_class_against_the_rest_equal_scikit_learn():
    labels = (RNG.random((4, 16, 16)) < 0.1).astype(np.int32)
    guess = np.where(RNG.random(labels.shape) < 0.8, labels, 1 - labels)
    found = score_binary(count_confusion(labels, guess, 2))
    flat = labels.reshape(-1), guess.reshape(-1)
    close(found["iou"], oracle.jaccard_score(*flat))
    close(found["f1"], oracle.f1_score(*flat))
    close(found["precision"], oracle.precision_score(*flat))
    close(found["recall"], oracle.recall_score(*flat))
    close(found["accuracy"], oracle.accuracy_score(*flat))
    swapped = score_binary(count_confusion(labels, guess, 2), positive=0)
    close(swapped["iou"], oracle.jaccard_score(*flat, pos_label=0))


def test_a_class_that_is_only_predicted_counts_as_present():
    counts = count_confusion([0, 0, 1], [0, 2, 1], 4)
    found = score(counts, "segmentation")
    close(found["miou_present"], (0.5 + 1 + 0) / 3)
    close(found["miou"], 1.5 / 4)
    close(class_f1(counts)[2], 0)


def test_padded_rows_and_ignored_pixels_of_label_maps_never_count():
    labels, guess = RNG.integers(0, 4, (2, 10, 6, 6))
    labels[0, :2] = 255
    whole = count_confusion(labels, guess, 4, ignore_index=255)
    total = 0
    for start in (0, 4, 8):  # the last batch has two padded rows, copies of the last one
        rows = np.arange(start, start + 4)
        take = np.minimum(rows, 9)
        total = total + count_confusion(labels[take], guess[take], 4, rows < 10, 255)
    np.testing.assert_array_equal(total, whole)
    assert whole.sum() == 10 * 36 - 12


def test_counts_beyond_float32_stay_exact():
    big = np.full((2, 2), 2**24 + 1, np.int64)
    assert (big + big)[0, 0] == 2 * (2**24 + 1)
    assert score(big + big, "classification")["accuracy"] == 0.5


def test_a_label_outside_the_classes_is_named():
    with pytest.raises(ValueError, match=r"label 7 is outside 0\.\.4"):
        count_confusion([1, 7], [1, 2], 5)
    with pytest.raises(ValueError, match="task 'x' is unknown"):
        score(np.eye(2), "x")
