"""The evaluator in circulation, by hand; its quirks are what is tested."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from geodit_jax.scoring import compat


def test_bleu_counts_characters():
    # "abcd" of "abce": 3 of 4 letters, 2 of 3 pairs, 1 of 2 triples, no run of four.
    found = compat.character_bleu("abcd", ["abce"])
    brevity = 1.0  # equal lengths: exp(1 - 4/4)
    assert found[0] == pytest.approx(brevity * 3 / 4)
    assert found[1] == pytest.approx((3 / 4 * 2 / 3) ** 0.5)
    assert found[2] == pytest.approx((3 / 4 * 2 / 3 * 1 / 2) ** 0.33)
    assert 0 < found[3] < 1e-70
    assert compat.character_bleu("", ["a"]) == compat.character_bleu("x", ["a"]) == [0] * 4
    assert compat.character_bleu("ab", ["abcd"])[0] == pytest.approx(np.exp(1 - 4 / 2))


def test_tfidf_cosine_is_that_of_scikit_learn():
    a, b = "many green trees near a road", "some green trees are near the wide road"
    total = 0.0
    for n in range(1, 5):
        table = TfidfVectorizer(ngram_range=(n, n)).fit_transform([a, b]).toarray()
        total += table[0] @ table[1]
        grams = [
            [tuple(t.split()[i : i + n]) for i in range(len(t.split()) - n + 1)] for t in (a, b)
        ]
        total += len(set(grams[0]) & set(grams[1])) / max(len(grams[0]), len(grams[1]))
    assert compat.cider_like(a, b) == pytest.approx(total / 8)


def test_the_cider_like_score_is_one_at_best_and_zero_for_short_texts():
    assert compat.cider_like("many green trees here", "many green trees here") == pytest.approx(1)
    assert compat.cider_like("green trees", "green trees") == 0
    assert compat.cider_like("", "") == compat.cider_like("! ? . ,", "a b c d") == 0


def test_only_the_first_reference_counts_for_rouge():
    assert compat.rouge_first("a road", "A road.") == 1
    assert compat.rouge_first("a road", "trees") == compat.rouge_first("", "trees") == 0


@pytest.mark.parametrize(
    ("said", "truth", "right"),
    [
        ("nothing of the kind", "no", True),
        ("there are three", "3", True),
        ("there is not a thing: none", "0", True),
        ("13", "3", True),
        ("two", "3", False),
    ],
)
def test_questions_are_right_by_substring(said, truth, right):
    assert compat.substring_right(said, [truth]) is right


def test_classes_lose_spaces_hyphens_and_underscores_only():
    assert compat.bare("Dense-residential_area here") == "denseresidentialareahere"


def test_a_box_that_prefers_a_taken_one_is_wrong():
    truth = [[0, 0, 10, 10], [2, 0, 10, 10]]
    answer = [[0, 0, 10, 10], [0, 0, 10, 9]]
    # Both prefer the first true box; the second true box stays unfound by AP, not by F1.
    assert compat.image_ap(answer, truth) == pytest.approx(6 / 11)
    assert compat.image_f1(answer, truth) == 1


def test_pictures_without_truth_or_answer_score_zero():
    box = [[0, 0, 10, 10]]
    for pair in (([], box), (box, []), ([], [])):
        assert compat.image_ap(*pair) == compat.image_f1(*pair) == 0
