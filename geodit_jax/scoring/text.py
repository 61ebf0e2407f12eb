"""Caption scores: CIDEr-D, BLEU-1 to 4, ROUGE-L, and METEOR where Java is.

All of them take words (`tokenise`): `predictions` is one list of words per image, `references` one
list of lists of words per image. The results equal those of the public COCO caption scorers to
1e-6. References without a word are dropped; an image left without any is refused. A prediction
without a word scores 0.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

Words = Sequence[str]
ORDERS = 4
# The published scorer keeps BLEU defined without matches by these two constants; they show only
# there: no 4-gram in common gives about 1e-4 instead of 0.
TINY, SMALL = 1e-15, 1e-9


def check_references(references: Sequence[Sequence[Words]]) -> list[list[Words]]:
    """The references that hold words; ValueError names the image that has none."""
    kept = [[words for words in several if len(words)] for several in references]
    for index, several in enumerate(kept):
        if not several:
            raise ValueError(
                f"image {index} has no reference with a word in it; leave the image out, or give "
                "it a caption"
            )
    return kept


def _paired(predictions, references) -> list[tuple[Words, list[Words]]]:
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} lists of references; there "
            "must be one list of references for each prediction"
        )
    return list(zip(predictions, check_references(references)))


def count_ngrams(words: Words) -> Counter:
    """Counts of all n-grams of 1 to 4 words, as tuples."""
    words = tuple(words)
    return Counter(
        words[i : i + n] for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1)
    )


# ------------------------------------------------------------------------------------------ CIDEr
def cider_d(
    predictions: Sequence[Words], references: Sequence[Sequence[Words]], sigma: float = 6.0
) -> np.ndarray:
    """CIDEr-D of each image, float64 [N] in 0..10; the score of the set is their mean.

    Vedantam et al. 2015: cosine of TF-IDF vectors of 1- to 4-grams, clipped counts, a Gaussian
    penalty on the difference of lengths, times 10. Document frequencies come from the references
    given, so scores depend on the set, and a single image always has 0 (every n-gram is in every
    document). Tables of papers print the mean times 100.
    """
    pairs = _paired(predictions, references)
    counted = [[count_ngrams(words) for words in several] for _, several in pairs]
    frequency = Counter()
    for several in counted:
        frequency.update(set().union(*several))
    images = np.log(max(len(pairs), 1))
    scores = np.zeros(len(pairs))
    for index, (words, _) in enumerate(pairs):
        own = _weigh(count_ngrams(words), frequency, images)
        similar = [
            _similarity(own, _weigh(counts, frequency, images), sigma) for counts in counted[index]
        ]
        scores[index] = 10.0 * np.mean(similar)
    return scores


def _weigh(counts: Counter, frequency: Counter, images: float):
    """(TF-IDF weights by n-gram, their norms by order [4], number of 2-grams)."""
    weights = {g: c * (images - np.log(max(1, frequency[g]))) for g, c in counts.items()}
    squares = np.zeros(ORDERS)
    for gram, weight in weights.items():
        squares[len(gram) - 1] += weight * weight
    # The published scorer measures length by the number of 2-grams.
    return weights, np.sqrt(squares), sum(c for g, c in counts.items() if len(g) == 2)


def _similarity(own, other, sigma: float) -> float:
    weights, norms, length = own
    other_weights, other_norms, other_length = other
    products = np.zeros(ORDERS)
    for gram in weights.keys() & other_weights.keys():
        products[len(gram) - 1] += min(weights[gram], other_weights[gram]) * other_weights[gram]
    scale = norms * other_norms
    cosines = np.divide(products, scale, out=np.zeros(ORDERS), where=scale > 0)
    return float(np.mean(cosines) * np.exp(-((length - other_length) ** 2) / (2 * sigma**2)))


# ------------------------------------------------------------------------------------------- BLEU
def bleu_counts(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """What BLEU is made of, int64 [N, 10] by image: 4 matches, 4 totals, length, closest length.

    Sums of rows go into `bleu`, so that any part of a set is scored without counting again.
    """
    pairs = _paired(predictions, references)
    table = np.zeros((len(pairs), 2 * ORDERS + 2), np.int64)
    for row, (words, several) in zip(table, pairs):
        most = Counter()
        for reference in several:
            most |= count_ngrams(reference)
        for gram, count in count_ngrams(words).items():
            row[len(gram) - 1] += min(count, most[gram])
            row[ORDERS + len(gram) - 1] += count
        row[-2] = len(words)
        row[-1] = min((abs(len(r) - len(words)), len(r)) for r in several)[1]
    return table


def bleu(counts: np.ndarray) -> np.ndarray:
    """BLEU-1 to 4 [..., 4] of summed counts [..., 10]; Papineni et al. 2002, closest reference.

    The score of a set is `bleu(bleu_counts(...).sum(0))`.
    """
    counts = np.asarray(counts, np.float64)
    matches, totals = counts[..., :ORDERS], counts[..., ORDERS : 2 * ORDERS]
    precisions = (matches + TINY) / (totals + SMALL)
    means = np.cumprod(precisions, -1) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (counts[..., -2:-1] + TINY) / (counts[..., -1:] + SMALL)
    return means * np.where(ratio < 1, np.exp(1 - 1 / np.maximum(ratio, 1e-300)), 1.0)


# ------------------------------------------------------------------------------------------ ROUGE
def rouge_l(
    predictions: Sequence[Words], references: Sequence[Sequence[Words]], beta: float = 1.2
) -> np.ndarray:
    """ROUGE-L of each image, float64 [N] in 0..1; the score of the set is their mean.

    F-measure of the longest common subsequence, recall weighted by beta^2; the best precision and
    the best recall over the references, taken separately, as the COCO scorer does (Lin 2004).
    """
    scores = np.zeros(len(predictions))
    for index, (words, several) in enumerate(_paired(predictions, references)):
        common = np.array([longest_common(words, reference) for reference in several])
        if not common.any():
            continue
        precision = common.max() / len(words)
        recall = (common / [len(reference) for reference in several]).max()
        scores[index] = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return scores


def longest_common(a: Words, b: Words) -> int:
    """Length of the longest common subsequence."""
    best = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, best[j] = (
                best[j],
                (diagonal + 1 if word == other else max(best[j], best[j - 1])),
            )
    return best[-1]


# ----------------------------------------------------------------------------------------- METEOR
def missing_for_meteor() -> str | None:
    """Why METEOR cannot be computed here, or None when it can."""
    if shutil.which("java") is None:
        return "METEOR needs Java; none is installed"
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None:
        return "METEOR needs the jar of the package pycocoevalcap; it is not installed"
    jar = Path(package.submodule_search_locations[0]) / "meteor" / "meteor-1.5.jar"
    return None if jar.is_file() else f"METEOR needs {jar.name}; pycocoevalcap came without it"


def meteor(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple:
    """(METEOR 1.5 of the set, of each image float64 [N]), by the Java program of its authors.

    RuntimeError says what is missing where `missing_for_meteor` is not None.
    """
    missing = missing_for_meteor()
    if missing:
        raise RuntimeError(missing)
    from pycocoevalcap.meteor.meteor import Meteor

    pairs = _paired(predictions, references)
    scorer = Meteor()
    score, each = scorer.compute_score(
        {i: [" ".join(words) for words in several] for i, (_, several) in enumerate(pairs)},
        {i: [" ".join(words)] for i, (words, _) in enumerate(pairs)},
    )
    return float(score), np.asarray(each, np.float64)
