"""RSVQA on small files of the published format: stubs, joins, bins."""

from __future__ import annotations

import pytest

from data.gathering import Rules
from data.record_boxes import RecordError
from data.vqa_sets import bin_area, bin_count, read_rsvqa
from tests.record_sets import draw, write_whole

STUB = {"id": 9, "active": False}


def write_rsvqa(root, prefix: str, split: str, triples: list) -> None:
    """triples: (type, question, answer), all about picture 5."""
    questions = [
        {"id": k, "img_id": 5, "type": kind, "question": ask, "answers_ids": [k], "active": True}
        for k, (kind, ask, _) in enumerate(triples)
    ]
    answers = [
        {"id": k, "question_id": k, "people_id": 0, "answer": answer, "active": True}
        for k, (_, _, answer) in enumerate(triples)
    ]
    images = [{"id": 5, "original_name": "a.tif", "questions_ids": [0], "active": True}]
    stem = f"{prefix}_split_{split}"
    write_whole(root / f"{stem}_questions.json", {"questions": [STUB, *questions]})
    write_whole(root / f"{stem}_answers.json", {"answers": [STUB, *answers]})
    write_whole(root / f"{stem}_images.json", {"images": [STUB, *images]})


LOW = [
    ("count", "How many roads are there?", "37"),
    ("presence", "Is there a road?", "yes"),
    ("rural_urban", "Is it a rural or an urban area?", "rural"),
    ("comp", "Are there more roads than rivers?", "no"),
]


@pytest.fixture
def root(tmp_path):
    draw(tmp_path / "Images_LR" / "5.tif", (16, 16))
    write_rsvqa(tmp_path, "LR", "test", LOW)
    return tmp_path


def test_active_questions_are_joined_with_their_answers_and_counts_binned(root):
    source = read_rsvqa(root, "test")
    assert [r.category for r in source.records] == [kind for kind, _, _ in LOW]
    answers = [r.answers[0] for r in source.records]
    assert answers == ["between 10 and 100", "yes", "rural", "no"]
    assert source.records[0].id == "rsvqa_lr-test-0" and source[0]["image"].shape == (16, 16, 3)
    assert read_rsvqa(root, "test", binned=False).records[0].answers == ("37",)


def test_the_second_test_set_of_high_resolution_bins_areas_and_not_counts(root):
    triples = [("area", "What is the area covered by buildings?", "1234m2"), ("count", "x?", "37")]
    write_rsvqa(root, "USGS", "test_phili", triples)
    source = read_rsvqa(root, "test_phili", which="hr")
    assert [r.answers[0] for r in source.records] == ["more than 1000m2", "37"]
    with pytest.raises(ValueError, match="RSVQA lr has no split 'test_phili'"):
        read_rsvqa(root, "test_phili")


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (0, "0"),
        (1, "between 0 and 10"),
        (10, "between 0 and 10"),
        (11, "between 10 and 100"),
        (100, "between 10 and 100"),
        (101, "between 100 and 1000"),
        (1000, "between 100 and 1000"),
        (1001, "more than 1000"),
    ],
)
def test_bins_are_closed_above(number, name):
    assert bin_count(str(number)) == name
    words = [f"{word}m2" if word.isdigit() else word for word in name.split()]
    assert bin_area(f"{number}m2") == " ".join(words)


def test_answers_that_cannot_be_binned_are_refused():
    with pytest.raises(RecordError, match="need a number and m2"):
        bin_area("12")
    with pytest.raises(RecordError, match="need a number"):
        bin_count("many")


def test_absent_files_answers_and_pictures_are_named(root):
    with pytest.raises(
        FileNotFoundError, match="LR_split_train_questions.json is not a file.*has L"
    ):
        read_rsvqa(root, "train")
    with pytest.raises(ValueError, match="which='rs' is not lr or hr"):
        read_rsvqa(root, "test", which="rs")
    write_whole(root / "LR_split_test_answers.json", {"answers": [STUB]})
    with pytest.raises(RecordError, match="question 0: no active answer belongs to it"):
        read_rsvqa(root, "test")
    write_rsvqa(root, "LR", "test", LOW)
    (root / "Images_LR" / "5.tif").unlink()
    with pytest.raises(RecordError, match="question 0: no picture 5.tif below"):
        read_rsvqa(root, "test")
    write_whole(root / "LR_split_test_images.json", {"images": [STUB]})
    with pytest.raises(RecordError, match="picture 5 is not in the split test"):
        read_rsvqa(root, "test")
    with pytest.raises(RecordError, match="is empty"):
        read_rsvqa(root, "test", rules=Rules(on_bad="skip"))
