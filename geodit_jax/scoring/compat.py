"""The `paper_compat` profile: the evaluator that the group behind GeoDiT has in circulation.

Written after the behaviour of the evaluator published with RSThinker; whether the tables of GeoDiT
were made by it is not known (its CIDEr values above 100 were not). Its scores are higher than, and
not comparable with, those of other papers: use them only beside numbers made the same way.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np

from geodit_jax.scoring import boxes, text
from geodit_jax.scoring.measure import measure_means
from geodit_jax.scoring.rows import Row, read_boxes
from geodit_jax.scoring.standard import THRESHOLDS, Scores

NOTES = (
    "Not comparable with standard scores: overlaps read corners as width and height, answers are "
    "matched as substrings, BLEU counts characters, CIDEr is another formula (0 to 1).",
    "Known differences: ROUGE-L is without the stemmer; METEOR (NLTK with WordNet) is not "
    "measured; boxes are read in pixels of the picture, not of a fixed 800 x 800 frame; the test "
    "samples of the published tables are not public.",
    "Unknown: whether this evaluator made the tables of GeoDiT; its caption scores cannot be.",
)
COUNT_WORDS = "no one two three four five six seven eight nine ten eleven twelve"
MARKUP = re.compile(r"\{[^}]*\}|<[^>]*>")
WEIGHTS = ((1.0,), (0.5, 0.5), (0.33, 0.33, 0.33), (0.25, 0.25, 0.25, 0.25))


# --------------------------------------------------------------------------------------- captions
def score_captions(rows: Sequence[Row], codec: str | None = None, meteor: bool = True) -> Scores:
    """Mean sentence BLEU of characters, ROUGE-L and a CIDEr-like mean against one reference."""
    predictions = [MARKUP.sub("", row.prediction) for row in rows]
    pairs = list(zip(predictions, (row.answers for row in rows)))
    blocks = np.array([character_bleu(prediction, several) for prediction, several in pairs])
    columns = {f"bleu_{n}_characters": blocks[:, n - 1] for n in range(1, 5)}
    columns["rouge_l_first"] = [rouge_first(p, several[0]) for p, several in pairs]
    columns["cider_like"] = [cider_like(p, several[0]) for p, several in pairs]
    missing = {"meteor_nltk": "METEOR of NLTK needs WordNet, which is not part of this project"}
    return measure_means(columns, [row.picture for row in rows]), missing


def character_bleu(prediction: str, references: Sequence[str]) -> list[float]:
    """Sentence BLEU-1 to 4 of raw strings: n-grams are of characters. No smoothing."""
    if not prediction:
        return [0.0] * 4
    counts = text.bleu_counts([list(prediction)], [[list(r) for r in references]])[0]
    matches, totals, (length, closest) = counts[:4], counts[4:8], counts[8:]
    if not matches[0]:
        return [0.0] * 4
    precisions = np.where(matches > 0, matches / np.maximum(totals, 1), sys.float_info.min)
    penalty = 1.0 if length > closest else float(np.exp(1 - closest / length))
    return [penalty * float(np.exp(np.log(precisions[: len(w)]) @ w)) for w in WEIGHTS]


def rouge_first(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure (beta 1) of lower-case words of letters and digits, without a stemmer."""
    a, b = (re.findall(r"[a-z0-9]+", words.lower()) for words in (prediction, reference))
    common = text.longest_common(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0


def cider_like(prediction: str, reference: str) -> float:
    """Mean over 1- to 4-grams of the share in common and of a TF-IDF cosine of the two texts.

    0 as soon as both texts are too short for an n-gram: the formula is undefined there.
    """
    total = 0.0
    for n in range(1, 5):
        a, b = (_grams(words.split(), n) for words in (prediction, reference))
        longest = max(a.total(), b.total())
        terms = [
            _grams(re.findall(r"\b\w\w+\b", words.lower()), n) for words in (prediction, reference)
        ]
        if not longest or not (terms[0] or terms[1]):
            return 0.0
        total += (a & b).total() / longest + _tfidf_cosine(*terms)
    return total / 8


def _grams(words: Sequence[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _tfidf_cosine(a: Counter, b: Counter) -> float:
    """Cosine with smoothed document frequencies over just these two documents."""
    terms = sorted(a | b)
    rarity = np.array([1.0 if t in a and t in b else np.log(1.5) + 1.0 for t in terms])
    vectors = [np.array([counts[t] for t in terms]) * rarity for counts in (a, b)]
    norm = np.linalg.norm(vectors[0]) * np.linalg.norm(vectors[1])
    return float(vectors[0] @ vectors[1] / norm) if norm else 0.0


# ------------------------------------------------------------------------------------------ boxes
def score_grounding(rows: Sequence[Row], codec: str | None = None) -> Scores:
    """Accuracy and mean of the inflated overlap of the first box."""
    predicted = [read_boxes(row, codec) for row in rows]
    truth = [row.boxes[:1] for row in rows]
    overlaps = boxes.grounding_overlaps(predicted, truth, "corner_size")
    columns = {f"acc_{t:.2f}_corner_size": boxes.reaches(overlaps, t) for t in THRESHOLDS}
    columns["mean_iou_corner_size"] = overlaps
    return measure_means(columns, [row.picture for row in rows]), {}


def score_detection(rows: Sequence[Row], codec: str | None = None) -> Scores:
    """AP and F1 of each picture and class by the inflated overlap, averaged."""
    pairs = [(read_boxes(row, codec), row.boxes) for row in rows]
    columns = {
        "ap_image_0.50_corner_size": [image_ap(*pair) for pair in pairs],
        "f1_image_0.50_corner_size": [image_f1(*pair) for pair in pairs],
    }
    return measure_means(columns, [row.picture for row in rows]), {}


def image_ap(predicted, truth, threshold: float = 0.5) -> float:
    """Eleven-point AP; a box that prefers a taken one counts as wrong; overlap must exceed."""
    overlaps = boxes.iou(predicted, truth, "corner_size")
    if not overlaps.size:
        return 0.0
    taken, hits = set(), []
    for row in overlaps:
        best = int(np.argmax(row))
        hits.append(row[best] > threshold and best not in taken)
        if hits[-1]:
            taken.add(best)
    found = np.cumsum(hits)
    recall, precision = found / overlaps.shape[1], found / np.arange(1, len(hits) + 1)
    steps = np.arange(0, 1.1, 0.1)
    return float(np.mean([precision[recall >= t].max(initial=0.0) for t in steps]))


def image_f1(predicted, truth, threshold: float = 0.5) -> float:
    """F1 with boxes matched in the order of the answer, each to its best free true box."""
    overlaps = boxes.iou(predicted, truth, "corner_size")
    matches = 0
    for row in overlaps if overlaps.size else ():
        best = int(np.argmax(row))
        if row[best] >= threshold:
            matches += 1
            overlaps[:, best] = -1.0
    total = sum(overlaps.shape)
    return 2 * matches / total if total else 0.0


# ---------------------------------------------------------------------------------------- answers
def score_classification(rows: Sequence[Row], codec: str | None = None) -> Scores:
    """The class, without `_`, `-` and spaces, is a substring of the answer."""
    right = [any(bare(a) in bare(r.prediction) for a in r.answers) for r in rows]
    return measure_means({"accuracy_substring": right}, [row.picture for row in rows]), {}


def bare(answer: str) -> str:
    """Lower case without underscores, hyphens and spaces."""
    return re.sub(r"[_\- ]", "", answer.lower())


def score_questions(rows: Sequence[Row], codec: str | None = None) -> Scores:
    """The true answer, or the word for its number, is a substring of the answer."""
    columns = {"accuracy_substring": [substring_right(r.prediction, r.answers) for r in rows]}
    return measure_means(columns, [row.picture for row in rows]), {}


def substring_right(prediction: str, answers: Sequence[str]) -> bool:
    """Substring match in lower case; 0 to 12 also as a word, where 0 is `no`."""
    said = prediction.lower()
    words = {str(number): word for number, word in enumerate(COUNT_WORDS.split())}
    wanted = [answer.lower() for answer in answers]
    return any(w in said or words.get(w, w) in said for w in wanted)


SCORERS = {
    "caption": score_captions,
    "grounding": score_grounding,
    "detection": score_detection,
    "classification": score_classification,
    "vqa": score_questions,
}
