"""The project's own JSON lines: read, checked, written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data.gathering import Rules
from data.record_boxes import RecordError
from data.record_files import read_records, write_records
from tests.record_sets import draw, write_lines, write_whole

FIX, SKIP = Rules(boxes="fix"), Rules(on_bad="skip")


@pytest.fixture
def folder(tmp_path):
    draw(tmp_path / "a.png", (200, 100))
    return tmp_path


def caption(**more) -> dict:
    return {"image": "a.png", "task": "caption", "answers": ["one", "two"]} | more


def test_every_task_is_read(folder):
    turns = [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "hello"}]
    given = [
        caption(id="c"),
        {"image": "a.png", "task": "vqa", "question": "how many?", "answer": 3},
        {"image": "a.png", "task": "grounding", "question": "the ship", "box": [1, 2, 30, 40]},
        {"image": "a.png", "task": "detection", "question": "ship", "boxes": [[10, 10, 30, 40]],
         "box_format": "int100", "labels": ["ship"]},
        {"image": "a.png", "task": "classification", "answer": "port", "classes": ["port", "sea"]},
        {"image": "a.png", "conversations": turns},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    ]  # fmt: skip
    source = read_records(write_lines(folder / "set.jsonl", given))
    found = source.records
    assert [r.task for r in found[:5]] == [row["task"] for row in given[:5]]
    assert found[0].id == "c" and found[0].answers == ("one", "two") and found[1].answers == ("3",)
    assert found[2].boxes == ((1, 2, 30, 40),) and found[2].size == (200, 100)
    assert found[3].boxes == ((20, 10, 60, 40),) and found[3].labels == ("ship",)
    assert found[5].task == "chat" and found[6].image is None
    assert found[1].id == "set-000001" and found[1].dataset == "set"
    assert source[3]["image"].shape == (100, 200, 3)


def test_the_lines_of_the_documentation_are_read(tmp_path):
    docs = Path(__file__).parent.parent / "docs" / "data.md"
    lines = re.search(r"### Your own records.*?```json\n(.*?)```", docs.read_text(), re.S)[1]
    draw(tmp_path / "a.png", (100, 100))
    (tmp_path / "set.jsonl").write_text(lines)
    source = read_records(tmp_path / "set.jsonl")
    assert [r.task for r in source.records] == [
        "caption", "vqa", "classification", "grounding", "detection", "chat", "text",
    ]  # fmt: skip
    assert not source.counts


def test_written_records_are_read_back_equal(folder):
    given = [
        caption(id="c", split="train"),
        {"id": "g", "image": "a.png", "task": "grounding", "question": "ü", "box": [1, 2, 3.5, 4]},
    ]
    first = read_records(write_lines(folder / "set.jsonl", given))
    write_records(folder / "again.jsonl", first.records)
    assert read_records(folder / "again.jsonl").records == first.records
    assert '"image": "a.png"' in (folder / "again.jsonl").read_text()


def test_plain_texts_are_read_as_they_are_and_back(folder):
    rows = [{"text": " Two\nlines. "}, {"text": "one", "split": "val"}]
    path = write_lines(folder / "set.jsonl", rows)
    first = read_records(path)
    assert [(r.task, r.image, r.answers) for r in first.records] == [
        ("text", None, (" Two\nlines. ",)),
        ("text", None, ("one",)),
    ]
    write_records(folder / "again.jsonl", first.records)
    assert read_records(folder / "again.jsonl").records == first.records
    for wrong in ({"text": ""}, {"text": 3}):
        with pytest.raises(RecordError, match="an answer is empty or no text"):
            read_records(write_lines(folder / "set.jsonl", [wrong]))


def test_a_json_list_and_a_byte_order_mark_are_read_too(folder):
    path = write_whole(folder / "set.json", [caption(), caption()])
    assert len(read_records(path)) == 2
    path.write_bytes(b"\xef\xbb\xbf" + write_lines(folder / "l.jsonl", [caption()]).read_bytes())
    assert len(read_records(path)) == 1


def test_a_split_keeps_its_records_and_those_that_name_none(folder):
    rows = [caption(split="train"), caption(split="test"), caption()]
    found = read_records(write_lines(folder / "set.jsonl", rows), "test")
    assert [r.id for r in found.records] == ["set-000001", "set-000002"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "a.png", "answer": "x"}, "field 'task' is lacking"),
        (caption(image="b.png"), "there is no picture .*b.png"),
        (caption(image=["a.png", "a.png"]), "2 pictures; one per record"),
        (caption(answer="x"), "both answer and answers"),
        (caption(answers=[]), "caption record without an answer"),
        (caption(answers=[{}]), "is no text"),
        (caption(answers=[True]), "True is no text"),
        (caption(task="grounding", question="x", boxes=[1, 2, 3, 4]), "single one is called box"),
        (caption(task="grounding", question="x", box=[30, 20, 5, 5]), "reversed.*boxes=fix"),
        (caption(task="grounding", question="x", box=[1, 1, 500, 5]), "beyond its picture of 200x"),
        (caption(task="grounding", question="x", box=[1, 1, 5, 5], image_size=[20, 10]), "says 20"),
        (caption(image_size=[20]), "need \\[width, height\\]"),
        ([1, 2], "a list, need a JSON object"),
        (caption(id="0"), "the id '0' is that of .* line 1 too"),
    ],
)
def test_a_bad_record_is_refused_with_its_line_or_skipped_and_counted(folder, row, said):
    path = write_lines(folder / "set.jsonl", [caption(id="0", image_size=[200, 100]), row])
    with pytest.raises(RecordError, match=f"set.jsonl line 2: (?s:.*){said}"):
        read_records(path)
    source = read_records(path, rules=SKIP)
    assert [r.id for r in source.records] == ["0"] and source.counts == {"skipped": 1}


def test_a_damaged_line_is_named(folder):
    path = write_lines(folder / "set.jsonl", [caption()])
    path.write_text(path.read_text() + '{"image": \n')
    with pytest.raises(RecordError, match="line 2: not valid JSON"):
        read_records(path)
    assert read_records(path, rules=SKIP).counts == {"skipped": 1}


def test_fixed_boxes_are_counted(folder):
    rows = [caption(task="grounding", question="x", box=[30, 20, 5, 5])]
    rows += [caption(task="grounding", question="x", box=[1, 1, 500, 5])]
    source = read_records(write_lines(folder / "set.jsonl", rows), rules=FIX)
    assert [r.boxes[0] for r in source.records] == [(5, 5, 30, 20), (1, 1, 200, 5)]
    assert source.counts == {"box reversed": 1, "box cut at the frame": 1}


def test_a_broken_picture_is_found_on_opening_when_all_are_decoded(folder):
    content = (folder / "a.png").read_bytes()
    (folder / "b.png").write_bytes(content[: len(content) // 2])
    path = write_lines(folder / "set.jsonl", [caption(), caption(image="b.png")])
    assert len(read_records(path)) == 2  # the header is whole
    with pytest.raises(RecordError, match="line 2: .*b.png: cannot be read as a picture"):
        read_records(path, rules=Rules(pictures="decode"))
    skipped = read_records(path, rules=Rules(pictures="decode", on_bad="skip"))
    assert len(skipped) == 1 and skipped.counts == {"skipped": 1}


def test_nothing_left_and_an_absent_file_are_errors(folder):
    path = write_lines(folder / "set.jsonl", [caption(image="b.png")])
    with pytest.raises(RecordError, match="is empty: no usable record"):
        read_records(path, rules=SKIP)
    with pytest.raises(FileNotFoundError, match="none.jsonl is not a file"):
        read_records(folder / "none.jsonl")


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="on_bad='ignore' is not refuse or skip"):
        Rules(on_bad="ignore")
