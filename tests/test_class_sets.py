"""Class folders as classification records; class names in any spelling."""

from __future__ import annotations

import pytest

from data.class_sets import class_key, normalise_class, read_class_folder
from data.record_boxes import RecordError
from tests.record_sets import draw


@pytest.mark.parametrize(
    "name",
    ["BaseballField", "baseball_field", "Baseball-Field", " baseball  Field", "baseballField"],
)
def test_every_spelling_of_a_class_gives_the_same_words(name):
    assert normalise_class(name) == "baseball field"
    assert class_key(name) == "baseballfield"


def test_names_without_boundaries_and_capitals():
    assert normalise_class("Airport") == "airport"
    assert normalise_class("mobilehomepark") == "mobile home park"
    assert normalise_class("NASABase") == "nasa base"
    assert normalise_class("somethingelse") == "somethingelse"


@pytest.fixture
def aid(tmp_path):
    for kind in ("BareLand", "dense_residential"):
        for n in range(8):
            draw(tmp_path / kind / f"{kind.lower()}_{n}.jpg", (16, 16), seed=n)
    return tmp_path


def test_all_pictures_or_blocks_of_them_become_records(aid):
    everything = read_class_folder(aid)
    assert len(everything) == 16 and everything.records[0].answers == ("bare land",)
    assert everything.records[0].classes == ("bare land", "dense residential")
    parts = {s: read_class_folder(aid, s) for s in ("train", "val", "test")}
    assert [len(p) for p in parts.values()] == [8, 4, 4]
    ids = [r.id for p in parts.values() for r in p.records]
    assert len(set(ids)) == 16
    assert {r.image[-5] for r in parts["test"].records} == {"6", "7"}


def test_a_class_list_in_another_spelling_is_matched(aid):
    classes = ("Dense Residential", "bare-land", "Port")
    found = read_class_folder(aid, classes=classes).records[0]
    assert found.answers == ("bare land",) and found.classes[2] == "port"
    with pytest.raises(ValueError, match="classes dense_residential that are not in"):
        read_class_folder(aid, classes=("bare land",))


def test_two_spellings_of_one_class_and_an_unknown_split_are_refused(aid):
    draw(aid / "Bare_Land" / "x_1.jpg")
    with pytest.raises(ValueError, match="are one class; merge the folders"):
        read_class_folder(aid)
    with pytest.raises(ValueError, match="no split 'dev'; known: all, train"):
        read_class_folder(aid, "dev")


def test_a_picture_that_is_none_is_refused(aid):
    (aid / "BareLand" / "bareland_3.jpg").write_bytes(b"nothing")
    with pytest.raises(RecordError, match="bareland_3.jpg: cannot be read"):
        read_class_folder(aid)
