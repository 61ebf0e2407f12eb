"""Short answers: what counts as the same, and what must not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geodit_jax.scoring import answers

CLASSES = ["dense residential", "residential", "Bare Land", "storage_tanks", "SportsField"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The twenty-one Ships.", ["21", "ships"]),
        ("A", ["a"]),
        ("There are 1,024 of them", ["there", "are", "1024", "of", "them"]),
        ("twenty", ["20"]),
        ("twenty ten", ["20", "10"]),
        ("twenty zero", ["20", "0"]),
        ("100m2", ["100", "m2"]),
        ("", []),
    ],
)
def test_words_are_lower_case_without_articles_and_numbers_are_digits(text, words):
    assert answers.split_words(text) == words


# ----------------------------------------------------------------------------------------- classes
@pytest.mark.parametrize("said", ["Dense Residential", "denseresidential.", "dense_residential"])
def test_class_names_agree_up_to_case_space_and_punctuation(said):
    assert answers.same_class(said, "dense-residential")


def test_a_longer_class_name_is_not_the_shorter_one_within_it():
    assert answers.name_class("It is dense residential.", CLASSES) == "dense residential"
    assert not answers.contains_class("It is dense residential.", "residential", CLASSES)
    assert answers.contains_class("a residential area", "residential", CLASSES)


def test_two_named_classes_are_no_answer():
    said = "bare land or a sports field"
    assert answers.name_class(said, CLASSES) is None
    assert not answers.contains_class(said, "Bare Land", CLASSES)
    assert answers.contains_class("sports field", "SportsField", CLASSES)


def test_a_class_name_within_another_word_is_not_found():
    assert answers.name_class("an airporter", ["airport"]) is None
    assert not answers.contains_class("", "airport", ["airport"])
    assert not answers.same_class("", "")


@given(st.sampled_from(CLASSES))
def test_the_true_class_itself_is_right(name):
    assert answers.same_class(name, name) and answers.contains_class(name, name, CLASSES)


# --------------------------------------------------------------------------------------- questions
@pytest.mark.parametrize(
    ("value", "area", "count"),
    [
        (0, "0m2", "0"),
        (1, "between 0m2 and 10m2", "between 0 and 10"),
        (10, "between 0m2 and 10m2", "between 0 and 10"),
        (11, "between 10m2 and 100m2", "between 10 and 100"),
        (100, "between 10m2 and 100m2", "between 10 and 100"),
        (1000, "between 100m2 and 1000m2", "between 100 and 1000"),
        (1001, "more than 1000m2", "more than 1000"),
    ],
)
def test_ranges_are_those_of_rsvqa(value, area, count):
    assert answers.bin_number(value, "m2") == area and answers.bin_number(value) == count
    assert answers.is_right(f"{value}m2", [area], "area", "rsvqa_hr")
    assert answers.is_right(area, [f"{value}m2"], "area", "rsvqa_hr")
    assert answers.is_right(str(value), [count], "count", "rsvqa_lr")
    assert answers.is_right(count, [str(value)], "count", "rsvqa_lr")


def test_neighbouring_ranges_differ():
    assert not answers.is_right("between 10m2 and 100m2", ["between 0m2 and 10m2"], "area")
    assert not answers.is_right("more than 1000", ["between 100 and 1000"], "count")
    assert not answers.is_right("0", ["between 0 and 10"], "count", "rsvqa_lr")


def test_counts_are_ranges_in_low_resolution_rsvqa_only():
    assert answers.is_right("7", ["5"], "count", "RSVQA-LR")
    assert not answers.is_right("7", ["5"], "count", "RSVQA-HR")
    assert not answers.is_right("7", ["5"], "count", "ucm_vqa")


@pytest.mark.parametrize(
    ("said", "truth", "right"),
    [
        ("Yes.", "yes", True),
        ("yes, there is a road", "yes", True),
        ("no", "yes", False),
        ("yes and no", "yes", False),
        ("there is none I know", "no", False),
        ("", "no", False),
        ("three", "3", True),
        ("There are 3 ships", "three", True),
        ("3 or 4", "3", False),
        ("13", "3", False),
        ("3.0", "3", True),
        ("many", "3", False),
        ("The Rural area", "rural area", True),
        ("rural", "urban", False),
        ("top-left", "top left", True),
        ("A", "a", True),
    ],
)
def test_answers_by_kind(said, truth, right):
    assert answers.is_right(said, [truth]) is right


def test_any_of_several_true_answers_is_right_and_none_is_wrong():
    assert answers.is_right("forest", ["trees", "forest"])
    assert not answers.is_right("forest", [])


def test_containment_needs_whole_words():
    assert answers.contains_answer("It is in the top left corner.", ["top left"])
    assert answers.contains_answer("there are two ships", ["2"])
    assert not answers.contains_answer("nothing is known", ["no"])
    assert not answers.contains_answer("anything", [""])


def test_every_true_answer_of_real_questions_is_right_for_itself(eo_data):
    lines = (eo_data / "ucm_vqa" / "vqa.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        assert answers.is_right(row["answer"], [row["answer"]], row["type"], "ucm_vqa"), row
    kinds = {answers.kind_of(row["answer"], row["type"], "ucm_vqa") for row in rows}
    assert {"yes_no", "number", "text"} <= kinds


@given(st.text(max_size=40), st.text(max_size=10))
def test_no_answer_breaks_the_comparison(said, truth):
    for kind in answers.KINDS:
        found = answers.canonical(said, kind)
        assert found is None or found
    assert answers.is_right(said, [truth]) in (True, False)
    assert answers.contains_answer(said, [truth]) in (True, False)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind='colour'"):
        answers.canonical("red", "colour")
