"""Scores from integer counts (numpy): counts add up over batches and hosts, scores come last.

Two definitions of F1 over classes are in use and named here: `f1_of_macro` is the harmonic mean of
macro precision and macro recall (what the published SatDiFuser code calls F1), `macro_f1` the mean
of the per-class F1. Likewise `miou` averages over all classes, absent ones counting 0 (published),
and `miou_present`, `macro_f1_present` over those that occur in labels or predictions (as
scikit-learn takes macro means). All scores are fractions in [0, 1].
"""

from __future__ import annotations

import numpy as np


def count_confusion(labels, predictions, num_classes: int, mask=None, ignore_index: int = -100):
    """int64 [K, K], rows = label, columns = prediction; arrays [B, ...] of class numbers.

    Rows of the batch with mask [B] False and elements labelled `ignore_index` do not count.
    Raises ValueError on a label or prediction outside 0..K-1.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape:
        raise ValueError(f"labels {labels.shape} and predictions {predictions.shape} differ")
    kept = labels != ignore_index
    if mask is not None:
        kept &= np.asarray(mask, bool).reshape(-1, *[1] * (labels.ndim - 1))
    truth, guess = labels[kept].astype(np.int64), predictions[kept].astype(np.int64)
    for name, values in (("label", truth), ("prediction", guess)):
        if values.size and not (values.min() >= 0 and values.max() < num_classes):
            wrong = values[(values < 0) | (values >= num_classes)][0]
            raise ValueError(
                f"{name} {wrong} is outside 0..{num_classes - 1}; raise the number of classes, or "
                "set model.ignore_index for no-data"
            )
    flat = np.bincount(truth * num_classes + guess, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def count_multilabel(predictions, labels, mask=None):
    """int64 [4, K]: true positives, false positives, false negatives, true negatives per class.

    predictions bool [B, K], labels multi-hot [B, K].
    """
    guess, truth = np.asarray(predictions, bool), np.asarray(labels) > 0.5
    if mask is not None:
        rows = np.asarray(mask, bool)
        guess, truth = guess[rows], truth[rows]
    pairs = (guess & truth, guess & ~truth, ~guess & truth, ~guess & ~truth)
    return np.stack([pair.sum(0) for pair in pairs]).astype(np.int64)


def ratio(a, b):
    """a / b, 0 where b is 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b != 0)


def harmonic_mean(a, b):
    return ratio(2 * np.multiply(a, b), np.add(a, b))


def precision_recall(counts):
    """Per-class precision and recall [K] of confusion counts (0 where undefined)."""
    right = np.diag(counts)
    return ratio(right, counts.sum(0)), ratio(right, counts.sum(1))


def class_iou(counts):
    """Intersection over union per class [K]; 0 for a class that occurs nowhere."""
    right = np.diag(counts)
    return ratio(right, counts.sum(0) + counts.sum(1) - right)


def class_f1(counts):
    """F1 per class [K]; 0 for a class that occurs nowhere."""
    return harmonic_mean(*precision_recall(counts))


def is_present(counts):
    """bool [K]: the class occurs among labels or predictions."""
    return (counts.sum(0) + counts.sum(1)) > 0


def mean_present(values, counts) -> float:
    """Mean over the classes that occur; 0 where nothing was counted."""
    present = is_present(counts)
    return float(values[present].mean()) if present.any() else 0.0


def score_classes(counts) -> dict[str, float]:
    """Accuracy and macro scores of confusion counts."""
    precision, recall = precision_recall(counts)
    return {
        "accuracy": float(ratio(np.trace(counts), counts.sum())),
        "macro_precision": float(precision.mean()),
        "macro_recall": float(recall.mean()),
        "f1_of_macro": float(harmonic_mean(precision.mean(), recall.mean())),
        "macro_f1": float(class_f1(counts).mean()),
        "macro_f1_present": mean_present(class_f1(counts), counts),
    }


def score_binary(counts, positive: int = 1) -> dict[str, float]:
    """Accuracy, and scores of the positive class alone, such as a road against all the rest."""
    precision, recall = (values[positive] for values in precision_recall(counts))
    return {
        "accuracy": float(ratio(np.trace(counts), counts.sum())),
        "iou": float(class_iou(counts)[positive]),
        "f1": float(harmonic_mean(precision, recall)),
        "precision": float(precision),
        "recall": float(recall),
    }


def score_map(counts) -> dict[str, float]:
    """Scores of label maps from confusion counts over pixels; `iou_<k>`, `f1_<k>` per class."""
    iou = class_iou(counts)
    return {
        "miou": float(iou.mean()),
        "miou_present": mean_present(iou, counts),
        **score_classes(counts),
        **{f"iou_{k}": float(value) for k, value in enumerate(iou)},
        **{f"f1_{k}": float(value) for k, value in enumerate(class_f1(counts))},
    }


def score_multilabel(counts) -> dict[str, float]:
    """Micro and macro scores of `count_multilabel`."""
    hit, extra, missed, _ = counts
    precision, recall = (
        ratio(hit.sum(), (hit + extra).sum()),
        ratio(hit.sum(), (hit + missed).sum()),
    )
    per_class = harmonic_mean(ratio(hit, hit + extra), ratio(hit, hit + missed))
    return {
        "micro_f1": float(harmonic_mean(precision, recall)),
        "micro_precision": float(precision),
        "micro_recall": float(recall),
        "macro_f1": float(per_class.mean()),
        "accuracy": float(ratio((counts[0] + counts[3]).sum(), counts.sum())),
    }


def score(counts, task: str) -> dict[str, float]:
    """Scores of summed counts for classification, multi_label_classification or segmentation."""
    known = {
        "classification": score_classes,
        "multi_label_classification": score_multilabel,
        "segmentation": score_map,
    }
    if task not in known:
        raise ValueError(f"task {task!r} is unknown; use one of {', '.join(known)}")
    return known[task](counts)
