"""Baselines without a model."""

from __future__ import annotations

import numpy as np
import pytest
from scoring_rows import find, make_rows

from data.records import Record
from geodit_jax.scoring.baselines import (
    colour_histogram,
    find_nearest,
    most_frequent,
    nearest_image_captions,
)
from geodit_jax.scoring.score import score_predictions


def train_records() -> list[Record]:
    def record(task, **fields):
        fields = {"id": str(len(made)), "image": "a.png", "size": (50, 100)} | fields
        made.append(Record(task=task, **fields))

    made: list[Record] = []
    for kind, answer in [("presence", "no"), ("presence", "yes"), ("presence", "yes")]:
        record("vqa", dataset="ucm", question="?", category=kind, answers=(answer,))
    record("vqa", dataset="ucm", question="?", category="count", answers=("7",))
    for name in ("forest", "river", "river"):
        record("classification", dataset="aid", answers=(name,))
    record("caption", dataset="ucm", answers=("a park", "many trees", "many trees"))
    for x in (0.0, 10.0, 20.0):
        record("grounding", question="ship", boxes=((x, 20.0, x + 10, 60.0),))
    record("detection", question="ship", boxes=((5.0, 10.0, 15.0, 30.0),), labels=("ship",))
    record("detection", question="car", boxes=((25.0, 50.0, 50.0, 100.0),), labels=("car",))
    return made


def test_the_most_frequent_answer_of_the_same_task_and_type():
    rows = {row["id"]: row for row in most_frequent(train_records(), make_rows())}
    assert rows["c0"]["prediction"] == "many trees"
    assert rows["q0"]["prediction"] == "yes" and rows["q1"]["prediction"] == "7"
    assert rows["q2"]["prediction"] == "yes"  # a type that training never asks: the whole task
    assert rows["k1"]["prediction"] == "river"
    # Median corners in parts of the training pictures, in pixels of a square of 100.
    assert rows["g0"]["prediction"] == "[20,20,40,60]" and rows["g0"]["codec"] == "pixel"
    assert rows["d0"]["prediction"] == "[10,10,30,30]"
    assert rows["c0"]["answers"] == make_rows()[0]["answers"]


def test_baseline_rows_are_scored_like_any_others():
    result = score_predictions(most_frequent(train_records(), make_rows()), meteor=False)
    assert find(result, "aid", "classification")["accuracy"] == 0.5
    assert find(result, "vhr", "detection")["recall_0.50"] == 0.5


def test_nothing_of_the_test_rows_leaks_into_the_baseline():
    changed = [{**row, "answers": ["other"], "prediction": "other"} for row in make_rows()]
    first, second = (most_frequent(train_records(), rows) for rows in (make_rows(), changed))
    assert [r["prediction"] for r in first] == [r["prediction"] for r in second]


def test_ties_go_by_the_alphabet_and_chat_has_no_answer():
    train = [Record("1", "a", "classification", answers=(n,)) for n in ("b", "a")]
    row = {"id": "x", "task": "classification", "answers": ["a"], "prediction": ""}
    assert most_frequent(train, [row])[0]["prediction"] == "a"
    assert most_frequent([], [{**row, "task": "chat"}])[0]["prediction"] == ""


def test_a_task_without_training_records_is_refused():
    with pytest.raises(ValueError, match="row 'c0': no training record of task 'caption'"):
        most_frequent([], make_rows())


def test_the_caption_of_the_nearest_picture():
    draw = np.random.default_rng(0)
    green, grey = (draw.normal(c, 9, (16, 16, 3)).clip(0, 255) for c in ([40, 160, 60], [120] * 3))
    train = [colour_histogram(x.astype(np.uint8)) for x in (green, grey)]
    test = [colour_histogram(x.astype(np.uint8)) for x in (grey[::-1], green[:, ::-1], grey)]
    captions = [["a forest", "trees"], ["a road"]]
    found = nearest_image_captions(np.array(train), captions, np.array(test))
    assert found == ["a road", "a forest", "a road"]
    assert find_nearest(np.array(train), np.array(test)).tolist() == [1, 0, 1]


def test_histograms_are_shares_and_refuse_other_arrays():
    image = np.zeros((4, 5, 3), np.uint8)
    image[:2] = 255
    shares = colour_histogram(image)
    assert shares.shape == (512,) and shares.sum() == 1 and shares[0] == shares[-1] == 0.5
    with pytest.raises(ValueError, match=r"float64 \(4, 4, 3\)"):
        colour_histogram(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="1 lists of captions for 2"):
        nearest_image_captions(np.zeros((2, 3)), [["a"]], np.zeros((1, 3)))
    with pytest.raises(ValueError, match="no training picture"):
        find_nearest(np.zeros((0, 3)), np.zeros((1, 3)))
