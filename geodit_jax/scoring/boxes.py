"""Box scores: overlap, grounding, detection without confidences. Boxes are [n, 4] x0 y0 x1 y1.

A language model gives boxes without a confidence. Average precision then ranks all boxes equal, and
the order of the images decides ties; beside it stand scores that need no ranking.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

RECALLS = np.linspace(0.0, 1.0, 101)
MAX_BOXES = 100
"""Boxes of one image and class that COCO looks at."""
# COCO finds an overlap that misses the threshold by rounding alone good enough.
ROUNDING = 1e-10
CONVENTIONS = ("plain", "pixel", "corner_size")


def as_boxes(boxes) -> np.ndarray:
    """float64 [n, 4] of anything like a list of boxes; empty input gives [0, 4]."""
    boxes = np.asarray(boxes, np.float64)
    if not boxes.size:
        return np.zeros((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes have the shape {boxes.shape}; [n, 4] is needed: x0, y0, x1, y1")
    return boxes


def iou(a, b, convention: str = "plain") -> np.ndarray:
    """Intersection over union of every box of `a` [n, 4] with every box of `b` [m, 4]: [n, m].

    convention:
      `plain`: corners are points of the plane, as in COCO;
      `pixel`: corners are pixels that belong to the box, so each side is one longer (VRSBench);
      `corner_size`: the last two numbers are read as width and height although they are a corner,
        as an evaluator in circulation does. It inflates the overlap: comparisons with it only.
    Empty, reversed and non-finite boxes overlap nothing (0, never NaN).
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r}; use one of {', '.join(CONVENTIONS)}")
    a, b = as_boxes(a), as_boxes(b)
    extra = 1.0 if convention == "pixel" else 0.0
    if convention == "corner_size":
        a, b = (np.concatenate([x[:, :2], x[:, :2] + x[:, 2:]], 1) for x in (a, b))
    with np.errstate(invalid="ignore", over="ignore"):
        low = np.maximum(a[:, None, :2], b[None, :, :2])
        high = np.minimum(a[:, None, 2:], b[None, :, 2:])
        both = np.clip(high - low + extra, 0, None).prod(-1)
        areas = [np.clip(x[:, 2:] - x[:, :2] + extra, 0, None).prod(-1) for x in (a, b)]
        union = areas[0][:, None] + areas[1][None] - both
        good = np.isfinite(union) & (union > 0)
        return np.divide(both, union, out=np.zeros_like(both), where=good)


# -------------------------------------------------------------------------------------- grounding
def grounding_overlaps(
    predicted: Sequence, truth: Sequence, convention: str = "plain"
) -> np.ndarray:
    """Overlap of the first predicted box of each expression with its box: float64 [N].

    predicted: [k, 4] by expression, k = 0 where the answer could not be read (overlap 0).
    truth: [m, 4] by expression; of several targets the one that fits best counts. Accuracy at a
    threshold is the mean of `reaches(overlaps, threshold)`.
    """
    if len(predicted) != len(truth):
        raise ValueError(f"{len(predicted)} answers for {len(truth)} expressions")
    firsts = [as_boxes(boxes)[:1] for boxes in predicted]
    return np.array([iou(a, b, convention).max(initial=0.0) for a, b in zip(firsts, truth)])


def reaches(overlaps, threshold: float, strict: bool = False) -> np.ndarray:
    """bool [N]: overlap >= threshold, or > threshold if `strict` (evaluators differ)."""
    overlaps = np.asarray(overlaps, np.float64)
    return overlaps > threshold if strict else overlaps >= threshold


# -------------------------------------------------------------------------------------- detection
def average_precision(images: Sequence[tuple], threshold: float = 0.5) -> float | None:
    """COCO's AP of one class at one overlap, every box with the same confidence; None: no truth.

    images: (predicted [k, 4], truth [m, 4]) of each image. Ties of the ranking go by the order of
    `images`, then by the order of the boxes in the answer: COCO's result for equal confidences.
    """
    truths = sum(len(as_boxes(truth)) for _, truth in images)
    if not truths:
        return None
    hits = [match_in_order(predicted, truth, threshold) for predicted, truth in images]
    hits = np.concatenate([np.zeros(0, bool), *hits])
    found = np.cumsum(hits)
    recall = found / truths
    precision = found / np.arange(1, len(hits) + 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return float(envelope[np.searchsorted(recall, RECALLS, side="left")].mean())


def match_in_order(predicted, truth, threshold: float) -> np.ndarray:
    """Which of the first 100 boxes found a true box: bool [k]; each takes its best free one."""
    overlaps = iou(as_boxes(predicted)[:MAX_BOXES], truth)
    hits = np.zeros(len(overlaps), bool)
    for index, row in enumerate(overlaps):
        free = np.where(row >= min(threshold, 1 - ROUNDING), row, -1.0)
        if free.size and free.max() >= 0:
            # Of equal overlaps COCO takes the last.
            overlaps[:, free.size - 1 - np.argmax(free[::-1])] = -2.0
            hits[index] = True
    return hits


def eleven_point(predicted, truth, threshold: float = 0.5) -> float | None:
    """AP of one image by eleven recalls (0, 0.1, ... 1); boxes in the order of the answer.

    None when there is neither a box nor an answer; 0 when only one of them is there.
    """
    truth = as_boxes(truth)
    hits = match_in_order(predicted, truth, threshold)
    if not len(truth):
        return 0.0 if len(hits) else None
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    # Recalls are compared as counts of tenths: 0.3 as a sum of floats is not 3/10.
    reached = [found * 10 >= tenth * len(truth) for tenth in range(11)]
    return float(np.mean([precision[r].max() if r.any() else 0.0 for r in reached]))


def count_matches(predicted, truth, threshold: float = 0.5, matching: str = "greedy") -> int:
    """Number of pairs (predicted, true), each box used once, with overlap >= threshold.

    matching: `greedy` takes the best overlap first; `hungarian` makes the most pairs.
    """
    overlaps = iou(predicted, truth)
    good = overlaps >= threshold
    if matching == "hungarian":
        rows, columns = linear_sum_assignment(good.astype(float), maximize=True)
        return int(good[rows, columns].sum())
    if matching != "greedy":
        raise ValueError(f"matching={matching!r}; use greedy or hungarian")
    used_rows, used_columns = set(), set()
    pairs = np.argwhere(good)
    best_first = np.argsort(-overlaps[good], kind="stable")
    for row, column in pairs[best_first].tolist():
        if row not in used_rows and column not in used_columns:
            used_rows.add(row)
            used_columns.add(column)
    return len(used_rows)


def f1(matches, predicted, truths):
    """2 * matches / (predicted + truths), elementwise; NaN where there is nothing at all."""
    total = np.asarray(predicted, np.float64) + truths
    none = np.full_like(total, np.nan)
    return np.divide(2.0 * np.asarray(matches), total, out=none, where=total > 0)
