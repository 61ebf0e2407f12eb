"""MMRS-1M on small files of the published layout."""

from __future__ import annotations

import pytest

from data.gathering import Rules
from data.mmrs import is_optical, read_mmrs, singular
from data.record_boxes import RecordError
from tests.record_sets import draw, write_whole


def row(image: str, *texts: str) -> dict:
    turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
    return {"image": f"data/{image}", "conversations": turns}


@pytest.fixture
def root(tmp_path):
    data = tmp_path / "data"
    for part in ("caption", "classification", "detection", "RSVG", "VQA"):
        draw(data / part / "a.jpg", (200, 100))
    brief = "Answer the question using a single word or phrase."
    caption = row("caption/a.jpg", "Describe it.", "A bay.", "Describe it.", "A blue bay.")
    box = row(
        "RSVG/a.jpg",
        "Describe the region:[0.10,0.30,0.30,0.45]", "The pier.",
        "Where is the pier?", "[0.10,0.30,0.30,0.45]",
    )  # fmt: skip
    ships = "There are <p>2 ships</p>[0.10,0.30,0.30,0.45;0.50,0.50,0.50,0.60]"
    found = row("detection/a.jpg", "Find all.", f"{ships} and <p>1 dock</p>[0.0,0.25,1.0,0.76].")
    files = {
        "caption/ucm.json": [caption],
        "VQA/hr.json": [row("VQA/a.jpg", f"How many? {brief}", "3")],
        "RSVG/rsvg_trainval.json": [box],
        "classification/NWPU_cls.json": [
            row("classification/a.jpg", f"What category? {brief}", kind)
            for kind in ("GolfCourse", "dense_residential")
        ],
        "detection/dior/train.json": [found],
        "detection/HRSID/train.json": [row("detection/none.jpg", "a", "b")],
        "detection/IR_ship/train.json": [row("detection/none.jpg", "a", "b")],
        "total.json": [row("caption/none.jpg", "twice", "counted")],
    }
    for name, content in files.items():
        write_whole(data / "json" / name, content)
    return tmp_path


def test_conversations_get_their_placeholder_and_only_optical_sets_are_read(root):
    source = read_mmrs(root)
    assert len(source) == 6 and all(r.task == "chat" for r in source.records)
    assert all(r.conversations[0][1].startswith("<image>\n") for r in source.records)
    assert source.counts == {"placeholder inserted": 6, "files not optical": 2}
    assert source[0]["image"].shape == (100, 200, 3)
    assert read_mmrs(root / "data", parts=("VQA",)).records[0].id == "mmrs-VQA/hr-000000"


def test_tasks_are_taken_out_of_the_conversations(root):
    found = {}
    for record in read_mmrs(root, form="task").records:
        found.setdefault(record.task, []).append(record)
    assert found["caption"][0].answers == ("A bay.", "A blue bay.")
    assert (found["vqa"][0].question, found["vqa"][0].answers) == ("How many?", ("3",))
    kinds = [r.answers[0] for r in found["classification"]]
    assert kinds == ["golf course", "dense residential"]
    assert found["classification"][0].classes == ("dense residential", "golf course")
    pier = found["grounding"]
    assert len(pier) == 1 and pier[0].question == "The pier"
    assert pier[0].boxes[0] == pytest.approx((20, 10, 60, 40))  # of the padded square of 200


def test_detection_answers_become_one_record_a_class_with_boxes_fixed(root):
    source = read_mmrs(root, parts=("detection",), form="task")
    ships, docks = source.records
    assert ships.question == "ship" and ships.labels == ("ship", "ship")
    assert ships.boxes[1] == pytest.approx((99.5, 50, 100.5, 70))  # rounded to no width
    assert docks.boxes[0] == pytest.approx((0, 0, 200, 100))  # rounded beyond the frame
    assert source.counts["box widened to a pixel"] == 1
    assert source.counts["box cut at the frame"] == 1
    with pytest.raises(RecordError, match="has no area"):
        read_mmrs(root, parts=("detection",), form="task", rules=Rules())


def test_a_detection_answer_that_contradicts_itself_is_refused(root):
    path = root / "data" / "json" / "detection" / "dior" / "train.json"
    write_whole(path, [row("detection/a.jpg", "x", "There are <p>3 ships</p>[0.1,0.3,0.3,0.45]")])
    with pytest.raises(RecordError, match="train.json record 0: 'ships': says 3, lists 1 boxes"):
        read_mmrs(root, parts=("detection",), form="task")
    write_whole(path, [row("detection/a.jpg", "x", "nothing")])
    with pytest.raises(RecordError, match="need <p>NUMBER CLASS</p>"):
        read_mmrs(root, parts=("detection",), form="task")


def test_the_class_is_the_same_word_for_one_object_and_for_many():
    for one, many in (
        ("ship", "ships"),
        ("tennis court", "tennis-courts"),
        ("overpass", "overpasses"),
        ("bus", "buses"),
        ("ferry", "ferries"),
        ("chimney", "chimneys"),
    ):
        assert singular(one, 1) == singular(many, 2) == one
    assert singular("golf course", 0) == "golf course" and singular("bus", 2) == "bus"


def test_other_sensors_are_read_only_when_asked_for(root):
    with pytest.raises(RecordError, match="there is no picture .*none.jpg"):
        read_mmrs(root, parts=("detection",), sensors="all")
    names = ("HIT-UAV", "IR_plane", "infrared_ship_1", "SSDD", "sarv2", "HRSID")
    assert not any(map(is_optical, names))
    assert all(map(is_optical, ("dior", "FAR1M", "VisDrone", "HRRSD", "UCAS")))


def test_a_wrong_folder_or_option_is_refused(root):
    with pytest.raises(FileNotFoundError, match="json/caption is not a folder"):
        read_mmrs(root / "data" / "caption")
    with pytest.raises(ValueError, match="need parts of caption"):
        read_mmrs(root, parts=("captions",))
    with pytest.raises(ValueError, match="form chat or task"):
        read_mmrs(root, form="turns")
