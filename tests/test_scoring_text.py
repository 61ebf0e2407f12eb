"""Caption scores against the public COCO caption scorers and against counts by hand."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from geodit_jax.scoring import text
from geodit_jax.scoring.tokenise import tokenise

TEXT = "a the road river many trees green cars are parked in on near large house of"
WORDS = TEXT.split()
SENTENCE = st.lists(st.sampled_from(WORDS[:5]), min_size=1, max_size=7)
SET = st.lists(
    st.tuples(SENTENCE, st.lists(SENTENCE, min_size=1, max_size=4)), min_size=2, max_size=6
)


def published(predictions, references):
    """Scores of pycocoevalcap: {name: (set, images)}."""
    truth = {i: [" ".join(r) for r in several] for i, several in enumerate(references)}
    said = {i: [" ".join(p)] for i, p in enumerate(predictions)}
    return {
        "cider": Cider().compute_score(truth, said),
        "bleu": Bleu(4).compute_score(truth, said, verbose=0),
        "rouge": Rouge().compute_score(truth, said),
    }


def assert_equal_to_published(predictions, references):
    wanted = published(predictions, references)
    cider = text.cider_d(predictions, references)
    np.testing.assert_allclose(cider, wanted["cider"][1], rtol=0, atol=1e-6)
    assert abs(cider.mean() - wanted["cider"][0]) < 1e-6
    rouge = text.rouge_l(predictions, references)
    np.testing.assert_allclose(rouge, wanted["rouge"][1], rtol=0, atol=1e-6)
    counts = text.bleu_counts(predictions, references)
    np.testing.assert_allclose(text.bleu(counts.sum(0)), wanted["bleu"][0], rtol=0, atol=1e-6)
    # Of single images the published scorer reports the same formula on their own counts.
    np.testing.assert_allclose(text.bleu(counts).T, wanted["bleu"][1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_random_captions_score_as_published(seed):
    draw = random.Random(seed)

    def sentence():
        return draw.choices(WORDS, k=draw.randint(1, 16))

    references = [[sentence() for _ in range(draw.randint(1, 5))] for _ in range(30)]
    predictions = [
        draw.choice(several)[: draw.randint(1, 16)] + draw.choices(WORDS, k=draw.randint(0, 4))
        for several in references
    ]
    assert_equal_to_published(predictions, references)


@settings(max_examples=40, deadline=None)
@given(SET)
def test_short_captions_with_repeated_words_score_as_published(examples):
    assert_equal_to_published([p for p, _ in examples], [r for _, r in examples])


def test_real_captions_score_as_published(eo_data):
    lines = (eo_data / "ucm_captions" / "captions.jsonl").read_text().splitlines()
    captions = [[tokenise(c) for c in json.loads(line)["captions"]] for line in lines]
    predictions = [several[0] for several in captions]
    references = [captions[(i + 3) % len(captions)][1:] for i in range(len(captions))]
    assert_equal_to_published(predictions, references)


def test_an_empty_prediction_scores_zero_and_harms_nothing_else():
    references = [[["a", "road"]], [["many", "green", "trees"]], [["a", "house"]]]
    predictions = [[], ["many", "green", "trees"], ["a", "house"]]
    cider, rouge = text.cider_d(predictions, references), text.rouge_l(predictions, references)
    assert cider[0] == rouge[0] == 0 and (cider[1:] > 0).all() and (rouge[1:] == 1).all()
    counts = text.bleu_counts(predictions, references)
    assert counts[0].tolist() == [0] * 9 + [2]
    assert text.bleu(counts[0]).tolist() == [0] * 4


def test_an_image_without_references_is_refused_by_its_number():
    for scorer in (text.cider_d, text.rouge_l, text.bleu_counts):
        with pytest.raises(ValueError, match="image 1 has no reference"):
            scorer([["a"], ["a"]], [[["a"]], [[]]])
        with pytest.raises(ValueError, match="2 predictions and 1 lists"):
            scorer([["a"], ["a"]], [[["a"]]])


def test_a_reference_without_words_counts_as_no_reference():
    full, padded = [[["a", "road"]], [["trees"]]], [[["a", "road"], []], [[], ["trees"]]]
    for scorer in (text.cider_d, text.rouge_l, text.bleu_counts):
        predictions = [["a", "road"], ["road"]]
        np.testing.assert_array_equal(scorer(predictions, full), scorer(predictions, padded))


def test_cider_of_one_image_alone_is_zero():
    assert text.cider_d([["a", "road"]], [[["a", "road"]]]).tolist() == [0.0]


def test_bleu_of_the_example_of_papineni_is_clipped():
    # "the the the the the the the" has 2 of 7 unigrams, its published modified precision.
    references = [tokenise("the cat is on the mat"), tokenise("there is a cat on the mat")]
    counts = text.bleu_counts([["the"] * 7], [references])
    assert counts[0, 0] == 2 and counts[0, 4] == 7 and counts[0, 8:].tolist() == [7, 7]


def test_rouge_of_the_example_of_lin():
    # police killed the gunman / police kill the gunman: common subsequence of 3 of 4 words.
    said, truth = tokenise("police kill the gunman"), tokenise("police killed the gunman")
    found = text.rouge_l([said], [[truth]])
    assert found[0] == pytest.approx(0.75)


@settings(max_examples=40, deadline=None)
@given(SET)
def test_a_perfect_caption_reaches_the_top_of_every_score(examples):
    references = [several[:1] for _, several in examples]
    predictions = [several[0] for several in references]
    np.testing.assert_allclose(text.rouge_l(predictions, references), 1)
    counts = text.bleu_counts(predictions, references)
    assert text.bleu(counts.sum(0))[0] == pytest.approx(1)
    # With one reference CIDEr counts the orders that have a weight: equal vectors have cosine 1.
    best = text.cider_d(predictions, references)
    assert (best <= 10 + 1e-9).all()
    other = text.cider_d([p[::-1] for p in predictions], references)
    assert (best >= other - 1e-9).all()


def test_distinct_long_captions_reach_ten():
    captions = [["many", "green", "trees", "here"], ["two", "large", "white", "houses"]]
    np.testing.assert_allclose(text.cider_d(captions, [[c] for c in captions]), 10)


@settings(max_examples=30, deadline=None)
@given(SET, st.randoms(use_true_random=False))
def test_order_of_images_and_of_references_changes_nothing(examples, generator):
    mixed = [(p, generator.sample(r, len(r))) for p, r in examples]
    generator.shuffle(mixed)
    for scorer in (text.cider_d, text.rouge_l, text.bleu_counts):
        before = scorer([p for p, _ in examples], [r for _, r in examples]).sum(0)
        after = scorer([p for p, _ in mixed], [r for _, r in mixed]).sum(0)
        np.testing.assert_allclose(before, after, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(text.missing_for_meteor() is not None, reason="METEOR cannot run here")
def test_meteor_of_equal_words_is_one_and_of_other_words_zero():
    predictions, references = [["a", "road"], ["a", "tree"]], [[["a", "road"]], [["houses"]]]
    score, each = text.meteor(predictions, references)
    assert each.tolist() == [1, 0] and 0 < score < 1


def test_meteor_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(text.shutil, "which", lambda name: "/usr/bin/java")
    assert "jar of the package pycocoevalcap" in text.missing_for_meteor()
    monkeypatch.setattr(text.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="METEOR needs Java"):
        text.meteor([["a"]], [[["a"]]])
