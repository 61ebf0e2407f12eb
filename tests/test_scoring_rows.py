"""Prediction files: what is wrong is named by line and field."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scoring_rows import make_rows

from geodit_jax.scoring.rows import read_boxes, read_rows

VQA = {"id": "1", "task": "vqa", "prediction": "yes", "answers": ["yes"]}
BOX = {"id": "1", "task": "grounding", "prediction": "", "boxes": [[0, 0, 1, 1]], "size": [9, 9]}


def test_a_file_and_its_rows_read_the_same(tmp_path):
    rows = make_rows()
    path = tmp_path / "predictions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    from_file, from_rows = read_rows(path), read_rows(rows)
    assert [r.key for r in from_file] == [r.key for r in from_rows]
    assert len(from_file) == len(rows)
    assert {row.where for row in from_file} == {f"{path}, line {k + 1}" for k in range(len(rows))}


@given(st.randoms(use_true_random=False))
def test_the_order_of_lines_is_no_matter(generator):
    rows = make_rows()
    mixed = generator.sample(rows, len(rows))
    assert [r.key for r in read_rows(mixed)] == [r.key for r in read_rows(rows)]


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(VQA) + "\n" + '{"id": "2", "task": "vqa", "predic')
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2 is not JSON"):
        read_rows(path)
    path.write_bytes(json.dumps(VQA).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"line 2 is not JSON"):
        read_rows(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "row 1 is a list"),
        ({"task": "vqa"}, "row 1 has no id, prediction, answers"),
        ({"id": "1", "prediction": "x"}, "row 1 has no task"),
        ({**VQA, "task": "vq"}, "task is 'vq'; use one of caption"),
        ({**VQA, "prediction": None}, "has no prediction"),
        ({**VQA, "prediction": 3}, "prediction is 3; a text"),
        ({**VQA, "answers": "yes"}, "answers is 'yes'; a list"),
        ({**VQA, "answers": [1]}, "answers holds 1; texts"),
        ({**BOX, "size": None}, "has no size"),
        ({**BOX, "size": [9]}, r"size is \[9\]; 2 finite"),
        ({**BOX, "size": [9, 0]}, "width and height must be positive"),
        ({**BOX, "boxes": []}, "grounding needs a true box"),
        ({**BOX, "boxes": [[0, 0, 1]]}, r"a box is \[0, 0, 1\]; 4 finite"),
        ({**BOX, "boxes": [[0, 0, 1, float("nan")]]}, "4 finite numbers"),
        ({**BOX, "boxes": [[0, 0, 1, True]]}, "4 finite numbers"),
        ({**BOX, "task": "detection"}, "has no question"),
        (
            {**BOX, "task": "detection", "question": "ship", "labels": ["car"]},
            "boxes of car in a row that asks for 'ship'",
        ),
    ],
)
def test_a_wrong_row_is_refused_by_name(row, message):
    with pytest.raises(ValueError, match=message):
        read_rows([row])


def test_two_predictions_of_one_example_are_refused():
    with pytest.raises(ValueError, match="row 3 and row 1 are both vqa of id '1'"):
        read_rows([VQA, {**VQA, "id": "2"}, {**VQA, "prediction": "no"}])
    assert len(read_rows([VQA, {**VQA, "question": "another?"}])) == 2


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"p\.jsonl holds no prediction"):
        read_rows(tmp_path / "p.jsonl")


def test_detection_may_have_no_true_box_and_blank_answers_are_dropped():
    negative = {k: v for k, v in BOX.items() if k != "boxes"} | {"question": "ship"}
    assert read_rows([{**negative, "task": "detection"}])[0].boxes == ()
    assert read_rows([{**VQA, "answers": [" ", "yes", ""]}])[0].answers == ("yes",)


def test_boxes_are_read_in_the_notation_of_the_row_else_of_the_call():
    row = {**BOX, "prediction": "[10,10,50,50]", "size": [200, 200]}
    assert read_boxes(read_rows([row])[0], "pixel").tolist() == [[10, 10, 50, 50]]
    assert read_boxes(read_rows([row])[0], "int100").tolist() == [[20, 20, 100, 100]]
    own = read_rows([{**row, "codec": "pixel"}])[0]
    assert read_boxes(own, "int100").tolist() == [[10, 10, 50, 50]]
