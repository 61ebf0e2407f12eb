"""VRSBench: evaluation lists and annotations on small files of the published format."""

from __future__ import annotations

import pytest

from data.record_boxes import RecordError
from data.vrsbench import read_vrsbench_annotations, read_vrsbench_list
from tests.record_sets import draw, write_whole

NAME = "P0003_0002.png"


def listed(**more) -> dict:
    shared = {"image_id": NAME, "question": " where? ", "dataset": "DOTA", "question_id": 4}
    return shared | more


@pytest.fixture
def root(tmp_path):
    for folder in ("Images_train", "Images_val"):
        draw(tmp_path / folder / (NAME if folder == "Images_val" else f"t{NAME}"), (200, 100))
    caption = listed(ground_truth="A long text.", type="caption")
    box = listed(ground_truth="{<10><20><30><40>}", type="ref", unique=True, obj_cls="ship",
                 obj_corner=[0] * 8, obj_ids=[1], size_group="small")  # fmt: skip
    ask = listed(ground_truth="2", type="object quantity")
    for name, row in {"Cap": caption, "referring": box, "vqa": ask}.items():
        write_whole(tmp_path / f"VRSBench_EVAL_{name}.json", [row])
    things = [
        {"obj_id": 0, "obj_cls": "ship", "obj_coord": [0.1, 0.2, 0.3, 0.4], "is_unique": False,
         "referring_sentence": "The small ship"},
        {"obj_id": 1, "obj_cls": "ship", "obj_coord": [0.5, 0.2, 0.6, 0.4], "is_unique": True,
         "referring_sentence": ""},
    ]  # fmt: skip
    pairs = [{"ques_id": 0, "question": "How many?", "type": "object quantity", "answer": "2"}]
    content = {"image": f"t{NAME}", "caption": "Text.", "objects": things, "qa_pairs": pairs}
    write_whole(tmp_path / "Annotations_train" / "t.json", content)
    return tmp_path


def test_the_three_lists_give_their_tasks(root):
    caption = read_vrsbench_list(root, "caption").records[0]
    assert caption.answers == ("A long text.",) and caption.question == ""
    ask = read_vrsbench_list(root, "vqa").records[0]
    assert (ask.question, ask.answers, ask.category) == ("where?", ("2",), "object quantity")
    box = read_vrsbench_list(root, "grounding").records[0]
    assert box.boxes == ((20, 20, 60, 40),) and box.category == "unique"
    assert box.labels == ("ship",) and box.id == "vrsbench-grounding-4" and not box.answers


def test_annotations_of_pictures_give_the_same_tasks(root):
    box = read_vrsbench_annotations(root, "train", "grounding")
    assert len(box) == 1  # an object without a sentence asks nothing
    assert box.records[0].boxes[0] == pytest.approx((20, 20, 60, 40))
    assert box.records[0].category == "not unique"
    assert read_vrsbench_annotations(root, "train", "caption").records[0].answers == ("Text.",)
    ask = read_vrsbench_annotations(root, "train", "vqa").records[0]
    assert (ask.question, ask.answers) == ("How many?", ("2",))


def test_faults_are_named(root):
    bad = listed(ground_truth="somewhere", unique=True)
    write_whole(root / "VRSBench_EVAL_referring.json", [bad])
    with pytest.raises(RecordError, match="referring.json record 0: 'somewhere': need a box"):
        read_vrsbench_list(root, "grounding")
    with pytest.raises(ValueError, match="no task 'detection'; known: caption, grounding, vqa"):
        read_vrsbench_list(root, "detection")
    with pytest.raises(FileNotFoundError, match="VRSBench_EVAL_Cap.json is not a file"):
        read_vrsbench_list(root / "Images_val", "caption")
    with pytest.raises(FileNotFoundError, match="Annotations_val is not a folder"):
        read_vrsbench_annotations(root, "val", "caption")
