"""Conversations and GeoChat-Bench on small files of the published formats."""

from __future__ import annotations

import pytest

from data.gathering import Rules
from data.instruct_sets import read_conversations, read_geochat_bench, turned_box
from data.record_boxes import RecordError
from tests.record_sets import draw, write_lines, write_whole


def turns(*texts: str) -> list:
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


@pytest.fixture
def folder(tmp_path):
    draw(tmp_path / "images" / "a.png", (200, 100))
    return tmp_path


def read(folder, rows, **options):
    path = write_whole(folder / "set.json", rows)
    return read_conversations(path, images=folder / "images", **options)


def test_a_missing_placeholder_is_inserted_at_the_first_human_turn_and_counted(folder):
    rows = [
        {"id": "x", "image": "a.png", "conversations": turns("what?", "a ship", "where?", "left")},
        {"id": "y", "image": "a.png", "conversations": turns("<image>\nwhat?", "a ship")},
        {"id": "z", "image": "a.png", "conversations": turns("hi", "yes?", "see <image>", "ok")},
    ]
    source = read(folder, rows)
    first, second, third = (r.conversations for r in source.records)
    assert first[0] == ("human", "<image>\nwhat?") and first[2] == ("human", "where?")
    assert second[0] == ("human", "<image>\nwhat?") and third[2] == ("human", "see <image>")
    assert source.counts == {"placeholder inserted": 1}
    system = [{"from": "system", "value": "be brief"}, *turns("what?", "a ship")]
    found = read(folder, [{"image": "a.png", "conversations": system}]).records[0]
    assert found.conversations[:2] == (("system", "be brief"), ("human", "<image>\nwhat?"))


def test_a_record_without_image_stays_text_only(folder):
    source = read(folder, [{"id": "x", "conversations": turns("hi", "hello")}])
    assert source[0]["image"] is None and source.records[0].conversations[0] == ("human", "hi")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": turns("<image> hi", "a")}, "1 <image> placeholders for 0 pictures"),
        (
            {"image": "a.png", "conversations": turns("<image><image> hi", "a")},
            "2 <image> .* for 1",
        ),
        ({"image": "a.png", "conversations": turns("hi", "a <image>")}, "outside a turn of human"),
        ({"image": ["a.png", "a.png"], "conversations": turns("hi", "a")}, "2 pictures; one per"),
        ({"image": "a.png", "conversations": turns("hi")}, "question that nobody answers"),
        ({"image": "a.png", "conversations": turns("hi", "a")[::-1]}, "human first"),
        ({"image": "a.png", "conversations": turns("hi", " ")}, "an empty turn of gpt"),
        ({"image": "a.png", "conversations": [{"role": "user"}]}, "field 'from' is lacking"),
        ({"image": "a.png", "conversations": []}, "no turn of human"),
        (
            {"image": "none.png", "conversations": turns("hi", "a")},
            "there is no picture .*none.png",
        ),
        ({"image": "a.png"}, "field 'conversations' is lacking"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_said_or_skipped(folder, row, said):
    good = {"id": "good", "conversations": turns("hi", "a")}
    with pytest.raises(RecordError, match=f"set.json record 1: .*{said}"):
        read(folder, [good, row])
    kept = read(folder, [good, row], rules=Rules(on_bad="skip"))
    assert [r.id for r in kept.records] == ["good"] and kept.counts["skipped"] == 1


def test_ids_that_occur_again_are_told_apart_and_json_lines_are_read(folder):
    rows = [{"id": "x", "conversations": turns("hi", str(k))} for k in range(3)]
    path = write_lines(folder / "set.jsonl", rows)
    assert [r.id for r in read_conversations(path).records] == ["x", "x#1", "x#2"]


# ---------------------------------------------------------------------------------- GeoChat-Bench
def bench(folder, file: str, rows: list, **options):
    return read_geochat_bench(write_lines(folder / file, rows), images=folder, **options)


def test_the_task_follows_from_the_published_file_name(folder):
    row = {"question_id": 1, "image": "a.png", "text": "Classify ...", "ground_truth": "BareLand"}
    other = row | {"question_id": 2, "ground_truth": "dense_residential"}
    found = bench(folder, "aid.jsonl", [row, other]).records
    assert found[0].answers == ("bare land",) and found[0].task == "classification"
    assert found[0].classes == ("bare land", "dense residential") and found[0].id == "geochat_aid-1"
    ask = {
        "question_id": 1,
        "image_id": "a",
        "question": "x?",
        "ground_truth": "yes",
        "type": "comp",
    }
    found = bench(folder, "hrben.jsonl", [ask]).records[0]
    assert (found.task, found.answers, found.category) == ("vqa", ("yes",), "comp")
    text = bench(folder, "region_captioning.jsonl", [ask]).records[0]
    assert text.conversations == (("human", "<image>\nx?"), ("gpt", "yes"))
    with pytest.raises(ValueError, match="no published name .*set task="):
        bench(folder, "mine.jsonl", [ask])
    assert bench(folder, "mine.jsonl", [ask], task="vqa").records[0].task == "vqa"


@pytest.mark.parametrize(
    ("truth", "boxes"),
    [
        ("{<10><20><30><40>}", [(20, 20, 60, 40)]),
        ("{<10><20><30><40>|<0>}{<0><0><10><10>|<90>}", [(20, 20, 60, 40), (5, -5, 15, 15)]),
        ([10, 20, 30, 40], [(20, 20, 60, 40)]),
        ([[10, 20, 30, 40], [0, 0, 10, 10]], [(20, 20, 60, 40), (0, 0, 20, 10)]),
        ([[10, 20], [30, 20], [30, 40], [10, 40]], [(20, 20, 60, 40)]),
        ([[[10, 20], [30, 20], [30, 40], [10, 40]]], [(20, 20, 60, 40)]),
        ([10, 20, 30, 20, 30, 40, 10, 40], [(20, 20, 60, 40)]),
    ],
)
def test_boxes_of_the_benchmark_are_read_in_every_form(folder, truth, boxes):
    row = {"question_id": 1, "image_id": "a", "question": "the ship", "ground_truth": truth}
    found = bench(folder, "referring.jsonl", [row], rules=Rules(boxes="fix")).records[0].boxes
    clipped = [(max(x0, 0), max(y0, 0), x1, y1) for x0, y0, x1, y1 in boxes]
    for got, wanted in zip(found, clipped, strict=True):
        assert got == pytest.approx(wanted, abs=1e-9)


def test_a_box_turned_by_45_degrees_is_enclosed():
    root = 2**0.5
    found = turned_box((-1, -1, 1, 1), 45)
    assert found == pytest.approx((-root, -root, root, root))


def test_faults_of_the_benchmark_are_named(folder):
    row = {"question_id": 1, "image_id": "a", "question": "the ship"}
    for truth, said in (
        ("nowhere", "need a box"),
        ([1, 2, 3], "need four numbers or four corners"),
        (None, "grounding record without a box"),
    ):
        with pytest.raises(RecordError, match=f"referring.jsonl line 1: .*{said}"):
            bench(folder, "referring.jsonl", [row | {"ground_truth": truth}])
    with pytest.raises(RecordError, match="neither image nor image_id"):
        bench(folder, "lrben.jsonl", [{"question_id": 1, "question": "x"}])
    with pytest.raises(RecordError, match="vqa record without an answer"):
        bench(folder, "lrben.jsonl", [row])
    assert bench(folder, "lrben.jsonl", [row], rules=Rules(answers="optional")).records
