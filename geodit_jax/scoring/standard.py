"""The `standard` profile: what each task is scored by. One function per task, rows to scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from geodit_jax.scoring import answers, boxes, text
from geodit_jax.scoring.measure import measure, measure_means, single
from geodit_jax.scoring.rows import Row, read_boxes
from geodit_jax.scoring.tokenise import tokenise

Scores = tuple[dict[str, dict], dict[str, str]]
"""({name: {value, low, high}}, {name: why it was not measured})."""

THRESHOLDS = (0.25, 0.5, 0.7)
BLEU_NAMES = [f"bleu_{n}" for n in range(1, 5)]


def score_captions(rows: Sequence[Row], codec: str | None = None, meteor: bool = True) -> Scores:
    """CIDEr-D (0..10), BLEU-1 to 4, ROUGE-L, METEOR, and the share of empty captions."""
    pictures = [row.picture for row in rows]
    predicted = [tokenise(row.prediction) for row in rows]
    references = [[tokenise(answer) for answer in row.answers] for row in rows]
    columns = {
        "cider": text.cider_d(predicted, references),
        "rouge_l": text.rouge_l(predicted, references),
        "empty": [not words for words in predicted],
    }
    scores = measure_means(columns, pictures)
    counts = text.bleu_counts(predicted, references)
    scores |= measure(counts, pictures, text.bleu, BLEU_NAMES)
    missing = text.missing_for_meteor() if meteor else "METEOR was switched off"
    if missing:
        return scores, {"meteor": missing}
    return scores | {"meteor": single(text.meteor(predicted, references)[0])}, {}


def score_grounding(rows: Sequence[Row], codec: str | None = None) -> Scores:
    """Accuracy at overlaps 0.25, 0.5, 0.7 (>=), 0.5 (>), mean overlap; by category when several.

    VRSBench also by its own rule: corners as whole percents, sides one longer.
    """
    predicted = [read_boxes(row, codec) for row in rows]
    truth = [boxes.as_boxes(row.boxes) for row in rows]
    overlaps = boxes.grounding_overlaps(predicted, truth)
    columns = {f"acc_{t:.2f}": boxes.reaches(overlaps, t) for t in THRESHOLDS}
    columns["acc_0.50_strict"] = boxes.reaches(overlaps, 0.5, strict=True)
    columns["mean_iou"] = overlaps
    columns["unreadable"] = [not len(found) for found in predicted]
    if "vrsbench" in answers.squeeze(rows[0].dataset):
        sides = [np.tile(np.asarray(row.size), 2) for row in rows]
        official = boxes.grounding_overlaps(
            [np.round(100 * found / side) for found, side in zip(predicted, sides)],
            [np.round(100 * true / side) for true, side in zip(truth, sides)],
            "pixel",
        )
        columns |= {f"acc_{t:.2f}_vrsbench": boxes.reaches(official, t) for t in (0.5, 0.7)}
    scores = measure_means(columns, [row.picture for row in rows])
    right = columns["acc_0.50"]
    return scores | _by_category(rows, right, "acc_0.50"), {}


def score_detection(rows: Sequence[Row], codec: str | None = None) -> Scores:
    """mAP@0.5 over classes with equal confidences, AP per image, and F1@0.5 of box sets.

    A row is one picture and one class; a class without any true box has no AP and is not counted.
    """
    predicted = [read_boxes(row, codec) for row in rows]
    pairs = [(found, boxes.as_boxes(row.boxes)) for found, row in zip(predicted, rows)]
    classes: dict[str, list] = {}
    for row, pair in zip(rows, pairs):
        classes.setdefault(row.question, []).append(pair)
    each = {name: boxes.average_precision(found) for name, found in sorted(classes.items())}
    known = [ap for ap in each.values() if ap is not None]
    scores = {"map_0.50": single(np.mean(known) if known else None)}
    per_image = [boxes.eleven_point(*pair) for pair in pairs]
    sums = np.array(
        [
            [
                boxes.count_matches(*pair),
                boxes.count_matches(*pair, matching="hungarian"),
                len(pair[0]),
                len(pair[1]),
                0.0 if ap is None else ap,
                ap is not None,
            ]
            for pair, ap in zip(pairs, per_image)
        ]
    )
    names = ["f1_0.50", "f1_0.50_hungarian", "precision_0.50", "recall_0.50", "ap_image_0.50"]
    scores |= measure(sums, [row.picture for row in rows], _finish_detection, names)
    return scores | {f"ap_0.50/{name}": single(ap) for name, ap in each.items()}, {}


def _finish_detection(sums: np.ndarray) -> np.ndarray:
    greedy, best, predicted, truths, ap, images = np.moveaxis(sums, -1, 0)
    columns = [
        boxes.f1(greedy, predicted, truths),
        boxes.f1(best, predicted, truths),
        ratio(greedy, predicted),
        ratio(greedy, truths),
        ratio(ap, images),
    ]
    return np.stack(columns, -1)


def score_classification(rows: Sequence[Row], codec: str | None = None) -> Scores:
    """Accuracy by equal names, and by the one class that the answer names."""
    columns = {
        "accuracy": [any(answers.same_class(r.prediction, a) for a in r.answers) for r in rows],
        "contains": [
            any(answers.contains_class(r.prediction, a, r.classes) for a in r.answers) for r in rows
        ],
    }
    return measure_means(columns, [row.picture for row in rows]), {}


def score_questions(rows: Sequence[Row], codec: str | None = None) -> Scores:
    """Accuracy over questions (OA), mean over types (AA), per type, and by containment."""
    right = np.array(
        [answers.is_right(r.prediction, r.answers, r.category, r.dataset) for r in rows]
    )
    held = np.array([answers.contains_answer(r.prediction, r.answers) for r in rows])
    types = sorted({row.category for row in rows})
    member = np.array([[row.category == name for name in types] for row in rows])
    sums = np.concatenate([member * right[:, None], member, held[:, None]], 1)

    def finish(total: np.ndarray) -> np.ndarray:
        hits, questions = total[..., : len(types)], total[..., len(types) : -1]
        each = ratio(hits, questions)
        asked = questions.sum(-1)
        # A draw may miss a type; the mean is then over the types that it has.
        mean = ratio(np.nansum(each, -1), (questions > 0).sum(-1))
        overall = [ratio(hits.sum(-1), asked), mean, ratio(total[..., -1], asked)]
        return np.concatenate([np.stack(overall, -1), each], -1)

    names = ["accuracy", "accuracy_mean_of_types", "contains"]
    names += [f"accuracy/{name or 'other'}" for name in types]
    return measure(sums, [row.picture for row in rows], finish, names), {}


def ratio(a, b) -> np.ndarray:
    """a / b, NaN where b is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)


def _by_category(rows: Sequence[Row], right: np.ndarray, name: str) -> dict[str, dict]:
    categories = sorted({row.category for row in rows})
    if len(categories) < 2:
        return {}
    found = {}
    for category in categories:
        picked = [i for i, row in enumerate(rows) if row.category == category]
        key = f"{name}/{category or 'other'}"
        found |= measure_means({key: right[picked]}, [rows[i].picture for i in picked])
    return found


SCORERS = {
    "caption": score_captions,
    "grounding": score_grounding,
    "detection": score_detection,
    "classification": score_classification,
    "vqa": score_questions,
}
NOTES = (
    "CIDEr is 0 to 10 (papers print it times 100: 1.13 is 113.0); the other scores are 0 to 1.",
    "Detection: every box has the same confidence; the order of ids decides ties of map_0.50.",
)
