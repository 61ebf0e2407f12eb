"""Scenes as records: every kind, true of the picture, the same at every access."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from data.record_pictures import read_picture
from data.records import check_record
from data.scene_records import KINDS, SceneRecords, record_texts, scene_candidates, scene_texts
from data.scene_text import captions, phrases, questions
from data.scenes import draw_scene

SIDE = 48


@pytest.fixture(scope="module")
def source() -> SceneRecords:
    return SceneRecords("train", 40, side=SIDE)


def test_kinds_take_turns_and_every_record_fits_its_task(source):
    for i, record in enumerate(source.records):
        assert record.task == KINDS[i % len(KINDS)]
        check_record(record)
        for x0, y0, x1, y1 in record.boxes:
            assert 0 <= x0 < x1 <= SIDE and 0 <= y0 < y1 <= SIDE
    assert len({record.id for record in source.records}) == len(source)
    # A scene passed over is replaced by one that no other record of the kind shows.
    assert len({(record.task, record.image) for record in source.records}) == len(source)


def test_a_record_is_true_of_the_scene_it_names(source):
    for record in source.records:
        split, index = record.image.split("/")[1], int(record.image.split("/")[2].split("@")[0])
        scene = draw_scene(0, split, index, SIDE)
        if record.task == "caption":
            assert record.answers == tuple(captions(scene))
        elif record.task == "grounding":
            assert (record.question, record.boxes[0]) in phrases(scene)
        elif record.task == "vqa":
            asked = {(q.question, q.answer, q.kind) for q in questions(scene)}
            assert (record.question, record.answers[0], record.category) in asked
        elif record.task == "detection":
            kind = {"storage tank": "tank"}.get(record.question, record.question)
            assert set(record.boxes) == {t.box for t in scene.things if t.kind == kind}
        else:
            assert record.answers == (scene.name,) and scene.name in record.classes


def test_access_is_random_and_repeatable_and_the_picture_follows_from_its_name(source):
    again = pickle.loads(pickle.dumps(SceneRecords("train", 40, side=SIDE)))
    for i in (33, 4, 17, 1):
        example = again[i]
        assert example["record"] == source.records[i] and example["id"] == source.records[i].id
        assert np.array_equal(example["image"], read_picture(example["record"].image))
        assert example["image"].shape == (SIDE, SIDE, 3)
    with pytest.raises(IndexError, match="record 40 of 40"):
        again[40]


def test_splits_seeds_and_sizes_give_other_records_and_longer_sets_begin_alike(source):
    def pictures(**options):
        made = {"split": "train", "size": 5, "side": SIDE} | options
        return [r.image for r in SceneRecords(**made).records]

    assert pictures(size=10)[:5] == pictures() == [r.image for r in source.records[:5]]
    sets = [set(pictures()), set(pictures(split="val")), set(pictures(split="test"))]
    sets.append(set(pictures(seed=1)))
    assert len(set.union(*sets)) == sum(map(len, sets))
    prints = {SceneRecords("val", 5, side=s, kinds=k).fingerprint
              for s in (32, 48) for k in (("vqa",), KINDS)}  # fmt: skip
    assert len(prints) == 4


def test_kinds_and_numbers_of_boxes_can_be_chosen():
    boxes = SceneRecords("val", 12, kinds=("detection",), side=SIDE, max_boxes=2)
    assert {len(r.boxes) for r in boxes.records} <= {1, 2}
    assert all(r.task == "detection" for r in boxes.records)
    many = SceneRecords("val", 12, kinds=("detection",), side=SIDE)
    assert max(len(r.boxes) for r in many.records) > 2
    with pytest.raises(ValueError, match="need some of caption"):
        SceneRecords("val", 3, kinds=("masks",))
    with pytest.raises(ValueError, match="no split 'dev'"):
        SceneRecords("dev", 3)


def test_one_kind_alone_still_shows_every_class():
    asked = SceneRecords("train", 24, kinds=("classification",), side=32)
    assert {r.answers[0] for r in asked.records} == set(asked.records[0].classes)


def test_the_texts_hold_questions_answers_and_boxes_of_training_scenes():
    found = scene_texts(4, side=SIDE)
    for index in range(4):
        scene = draw_scene(0, "train", index, SIDE)
        assert set(captions(scene)) <= set(found)
        for q in questions(scene):
            assert {q.question, q.answer} <= set(found)
    assert any(text.startswith("[") and text.count(",") == 3 for text in found)
    own = scene_texts(2, side=SIDE, kinds=("caption",), render=lambda record: [record.task])
    assert own == ["caption", "caption"]


def test_a_box_is_written_in_hundredths_of_its_picture():
    record = scene_candidates(draw_scene(0, "train", 0, SIDE), "classification", key="x")[0]
    record = replace(record, boxes=((12.0, 0.0, 24.0, 48.0),))
    assert record_texts(record) == [record.answers[0], "[25,0,50,100]"]
