"""Sentences about scenes are true of the scene graph."""

from __future__ import annotations

import re

import pytest

from data.scene_text import (
    CLEAR,
    COVER_WORDS,
    PLURALS,
    captions,
    count_words,
    counts,
    phrases,
    questions,
    shares,
)
from data.scenes import CLASSES, draw_scene


@pytest.fixture(scope="module")
def drawn():
    return [draw_scene(5, "train", k) for k in range(160)]


def answers(scene, kind):
    return {q.question: q.answer for q in questions(scene) if q.kind == kind}


def test_captions_name_the_class_and_true_numbers(drawn):
    for scene in drawn:
        sentences = captions(scene)
        assert len(sentences) == 5 and all(scene.name in s for s in sentences)
        for kind, number in counts(scene).items():
            named = PLURALS[kind] in sentences[2] or count_words(kind, 1) in sentences[2]
            assert named == (number > 0)
            if number and kind not in scene.cut:
                assert count_words(kind, number) in sentences[2]


def test_captions_name_the_widest_cover_first(drawn):
    for scene in drawn:
        widest = max(shares(scene).items(), key=lambda item: item[1])[0]
        assert captions(scene)[3].split("mostly ")[1].startswith(COVER_WORDS[widest])


def test_counts_are_asked_only_where_nothing_is_cut_off(drawn):
    asked = 0
    for scene in drawn:
        for question, answer in answers(scene, "count").items():
            kind = next(k for k, word in PLURALS.items() if word in question)
            assert int(answer) == counts(scene)[kind] > 0 and kind not in scene.cut
            asked += 1
    assert asked > 40


def test_presence_answers_agree_with_objects_and_cover(drawn):
    both = set()
    for scene in drawn:
        found = answers(scene, "presence")
        for kind, number in counts(scene).items():
            word = {"tank": "storage tank"}.get(kind, kind)
            answer = found.get(f"Is there a {word}?")
            if answer is None:
                assert not number and kind in scene.cut
            else:
                assert answer == ("yes" if number else "no")
        water = found.get("Is there any water?")
        share = shares(scene)["water"]
        assert water == (None if 0 < share < CLEAR else "yes" if share else "no")
        both.add(water)
    assert both == {None, "yes", "no"} or both == {"yes", "no"}


def test_comparisons_and_quarters_are_clear(drawn):
    quarters = 0
    words = {word: name for name, word in COVER_WORDS.items()}
    for scene in drawn:
        for question, answer in answers(scene, "compare").items():
            one, two = re.match(
                r".*: (.*) or (.*)\?", question.replace("grass or", "grass/")
            ).groups()
            one, two = (w.replace("grass/", "grass or") for w in (one, two))
            more, less = (one, two) if answer == one else (two, one)
            assert shares(scene)[words[more]] >= shares(scene)[words[less]] + CLEAR
        for question, answer in answers(scene, "location").items():
            kind = next(k for k in PLURALS if k in question)
            (thing,) = [t for t in scene.things if t.kind == kind]
            x, y = (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2
            assert answer == f"{'upper' if y < 32 else 'lower'} {'left' if x < 32 else 'right'}"
            quarters += 1
    assert quarters > 10


def test_every_scene_has_a_theme_question_and_a_season_question(drawn):
    for scene in drawn[:16]:
        (theme,) = answers(scene, "theme").items()
        assert theme[1] == scene.name and all(name in theme[0] for name in CLASSES)
        assert answers(scene, "season")["Is there snow on the ground?"] in ("yes", "no")


def test_a_phrase_names_one_object(drawn):
    named = 0
    for scene in drawn:
        found = phrases(scene)
        assert len({phrase for phrase, _ in found}) == len(found)
        boxes = [thing.box for thing in scene.things]
        assert all(box in boxes for _, box in found)
        named += len(found)
    assert named > 60


@pytest.mark.parametrize(
    "number, words", [(1, "one storage tank"), (10, "ten storage tanks"), (11, "11 storage tanks")]
)
def test_numbers_are_words_up_to_ten(number, words):
    assert count_words("tank", number) == words
