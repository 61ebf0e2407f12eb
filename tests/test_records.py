"""Records, random access to them, and mixtures at a fixed ratio."""

from __future__ import annotations

import pickle
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from data.record_boxes import RecordError
from data.records import Record, RecordSource, check_record, choose, mix
from tests.record_sets import draw


def numbered(tmp_path, name: str, count: int, start: int = 0) -> RecordSource:
    found = []
    for n in range(count):
        path = draw(tmp_path / name / f"{n}.png", seed=start + n)
        found.append(Record(f"{name}{n}", str(path), "caption", answers=(f"text {n}",)))
    return RecordSource(found, name)


def test_an_example_holds_record_picture_and_id(tmp_path):
    source = numbered(tmp_path, "a", 3)
    example = source[2]
    assert example["id"] == "a2" and example["record"].answers == ("text 2",)
    assert example["image"].shape == (30, 40, 3) and example["image"].dtype == np.uint8
    assert example["record"].size == (40, 30)  # read off the picture


def test_a_chat_record_may_lack_a_picture_and_no_other_may():
    turns = (("human", "hi"), ("gpt", "hello"))
    source = RecordSource([Record("x", None, "chat", conversations=turns)], "text")
    assert source[0]["image"] is None
    with pytest.raises(RecordError, match="vqa record without image"):
        check_record(Record("x", None, "vqa", "what?", ("this",)))


def test_a_picture_of_another_size_than_its_boxes_were_drawn_on_is_refused(tmp_path):
    path = str(draw(tmp_path / "a.png"))
    box = Record("x", path, "grounding", "the ship", boxes=((1, 1, 9, 9),), size=(80, 60))
    with pytest.raises(RecordError, match="40x30 pixels, but the record x says 80x60"):
        RecordSource([box], "boxes")[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "captoin"}, "task 'captoin' is none of caption"),
        ({"id": ""}, "id is empty"),
        ({"answers": ()}, "caption record without an answer"),
        ({"answers": ("fine", " ")}, "an answer is empty"),
        ({"task": "vqa", "question": " "}, "question is empty"),
        ({"task": "grounding", "question": "a ship"}, "without a box"),
        ({"task": "classification", "answers": ("x",), "classes": ("a", "b")}, "is none of a, b"),
        ({"labels": ("ship",)}, "1 labels for 0 boxes"),
        ({"task": "chat"}, "human and gpt in turn"),
        ({"task": "chat", "conversations": (("gpt", "a"), ("human", "b"))}, "human first"),
        ({"task": "chat", "conversations": (("human", "a"),)}, "question that nobody answers"),
        ({"task": "chat", "conversations": (("human", "a"), ("gpt", ""))}, "empty turn of gpt"),
    ],
)
def test_what_a_record_lacks_for_its_task_is_said(change, said):
    good = Record("x", "a.png", "caption", answers=("a field",))
    check_record(good)
    with pytest.raises(RecordError, match=said):
        check_record(replace(good, **change))


def test_questions_without_answers_pass_when_they_are_only_to_be_predicted():
    check_record(Record("x", "a.png", "vqa", "how many?"), answers=False)
    check_record(Record("x", "a.png", "grounding", "the ship"), answers=False)
    check_record(Record("x", "a.png", "chat", conversations=(("human", "a"),)), answers=False)


def test_the_fingerprint_changes_with_text_picture_and_order_and_not_with_the_folder(tmp_path):
    one, same = numbered(tmp_path / "1", "a", 3), numbered(tmp_path / "2", "a", 3)
    assert one.fingerprint == same.fingerprint
    other = RecordSource([*one.records[:2], replace(one.records[2], answers=("else",))], "a")
    assert other.fingerprint != one.fingerprint
    assert RecordSource(one.records[::-1], "a").fingerprint != one.fingerprint
    draw(tmp_path / "2" / "a" / "1.png", size=(50, 30))
    assert RecordSource(same.records, "a").fingerprint != one.fingerprint


def test_a_kept_picture_is_decoded_once_for_all_its_records(tmp_path):
    source = numbered(tmp_path, "a", 1)
    source = RecordSource([replace(source.records[0], id=f"{n}") for n in range(3)], "a")
    source.keep = 2**20
    first = source[0]["image"]
    (tmp_path / "a" / "0.png").unlink()
    assert source[2]["image"] is first
    assert pickle.loads(pickle.dumps(source)).keep == 2**20  # and holds no pixels
    assert len(pickle.dumps(source)) < first.nbytes


def test_choosing_keeps_what_the_condition_says_and_refuses_nothing(tmp_path):
    source = numbered(tmp_path, "a", 4)
    kept = choose(source, lambda record: record.id in ("a1", "a3"), "odd")
    assert [r.id for r in kept.records] == ["a1", "a3"] and kept.name == "a[odd]"
    with pytest.raises(RecordError, match="no record is left by 'none'"):
        choose(source, lambda record: False, "none")


def test_a_mix_holds_the_ratio_in_every_cycle_and_sees_every_record(tmp_path):
    a, b = numbered(tmp_path, "a", 5), numbered(tmp_path, "b", 4, 9)
    mixed = mix([a, b], [0.75, 0.25])
    assert len(mixed) == 16  # four cycles of 3 + 1, until b was seen once
    ids = [mixed[i]["id"] for i in range(len(mixed))]
    for start in range(0, 16, 4):
        assert Counter(i[0] for i in ids[start : start + 4]) == {"a": 3, "b": 1}
    assert [i for i in ids if i[0] == "b"] == ["b0", "b1", "b2", "b3"]
    assert [i for i in ids if i[0] == "a"] == [f"a{n % 5}" for n in range(12)]
    assert [r.id for r in mixed.records] == ids


def test_a_source_is_spread_evenly_over_a_mix(tmp_path):
    mixed = mix([numbered(tmp_path, "a", 10), numbered(tmp_path, "b", 4)], [5, 2])
    kinds = "".join(record.id[0] for record in mixed.records)
    assert kinds == "abaaaba" * 2  # never two of the rare one within three


def test_a_mix_is_the_same_in_any_order_of_access_and_after_pickling(tmp_path):
    mixed = mix([numbered(tmp_path, "a", 5), numbered(tmp_path, "b", 3)], [2, 3])
    there = [mixed[i]["id"] for i in range(len(mixed))]
    back = pickle.loads(pickle.dumps(mixed))
    assert [back[i]["id"] for i in reversed(range(len(back)))] == there[::-1]
    assert back.fingerprint == mixed.fingerprint


def test_a_mix_without_weights_shows_every_record_exactly_once(tmp_path):
    mixed = mix([numbered(tmp_path, "a", 5), numbered(tmp_path, "b", 3)])
    ids = [f"a{n}" for n in range(5)] + ["b0", "b1", "b2"]
    assert [r.id for r in mixed.records] == [mixed[i]["id"] for i in range(8)] == ids
    with pytest.raises(IndexError, match="record 8 of 8"):
        mixed[8]


class Long:
    """A source of so many examples that nothing may be kept of each."""

    fingerprint = "long"

    def __init__(self, name, count):
        self.name, self.count = name, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return (self.name, i)


def test_sets_of_any_length_are_mixed_and_cost_nothing_per_example():
    tracemalloc.start()
    mixed = mix([Long("a", 70_000_001), Long("b", 33_000_000)])
    heavy = mix([Long("a", 70_000_001), Long("b", 33_000_000)], [0.3, 0.7])
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 100_000
    assert [mixed[i] for i in (70_000_000, 70_000_001)] == [("a", 70_000_000), ("b", 0)]
    assert Counter(heavy[i][0] for i in range(10)) == {"a": 3, "b": 7}


def test_weights_that_mean_nothing_are_refused(tmp_path):
    a, b = numbered(tmp_path, "a", 2), numbered(tmp_path, "b", 2)
    with pytest.raises(ValueError, match="need numbers above 0"):
        mix([a, b], [1, 0])
    with pytest.raises(ValueError, match="2 sources with 1 weights"):
        mix([a, b], [1])
    with pytest.raises(ValueError, match="too fine a ratio"):
        mix([a, b], [0.1234567891, 0.9])
    with pytest.raises(ValueError, match="sources without records: none"):
        mix([a, RecordSource([], "none")], [1, 1])
    with pytest.raises(IndexError, match="record 4 of 4"):
        mix([a, b], [1, 1])[4]
