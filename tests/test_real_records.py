"""The development images as records: one split for all sets of UC Merced."""

from __future__ import annotations

import pytest

from data.gathering import Rules
from data.real_records import REAL, read_real
from data.record_boxes import RecordError
from data.record_pictures import digests
from data.splits import SPLITS, refuse_overlap


@pytest.fixture(scope="module")
def sets(eo_data):
    return {name: {s: read_real(name, s, root=eo_data) for s in SPLITS} for name in REAL}


def test_no_picture_is_in_two_splits_across_all_sets(sets):
    parts = {}
    for split in SPLITS:
        names = [r.image for found in sets.values() for r in found[split].records]
        parts[split] = digests(names)
    refuse_overlap(parts)
    assert all(len(part) > 150 for part in parts.values())


def test_every_record_of_the_files_is_in_exactly_one_split(sets):
    totals = {name: sum(len(part) for part in found.values()) for name, found in sets.items()}
    assert totals == {
        "ucm_captions": 336,
        "ucm_vqa": 766,
        "ucmerced": 882,
        "nwpu_vhr10_grounding": 65,
        "nwpu_vhr10_detection": 233,
    }
    boxes = [len(r.boxes) for p in sets["nwpu_vhr10_detection"].values() for r in p.records]
    assert sum(boxes) == 1416


def test_records_say_what_their_task_needs(sets):
    caption = sets["ucm_captions"]["train"][0]
    assert len(caption["record"].answers) == 5 and caption["image"].shape == (256, 256, 3)
    kinds = {r.category for r in sets["ucm_vqa"]["test"].records}
    assert kinds == {"theme", "presence", "count", "location"}
    classes = {r.answers[0] for r in sets["ucmerced"]["test"].records}
    assert len(classes) == 21 and "golf course" in classes
    assert set(sets["ucmerced"]["test"].records[0].classes) == classes


def test_an_unknown_set_split_or_folder_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no development set 'x'; known: ucm_captions"):
        read_real("x", "train", root=tmp_path)
    with pytest.raises(ValueError, match="no split 'dev'"):
        read_real("ucm_vqa", "dev", root=tmp_path)
    monkeypatch.delenv("EO_DATA_DIR", raising=False)
    with pytest.raises(FileNotFoundError, match="needs root=DIR, or EO_DATA_DIR"):
        read_real("ucm_vqa", "train")
    with pytest.raises((FileNotFoundError, RecordError)):
        read_real("ucm_vqa", "train", root=tmp_path, rules=Rules())
