"""Every set of records by name."""

from __future__ import annotations

import shutil

import pytest

from data.record_boxes import RecordError
from data.record_catalog import TABLE, RecordSets, known_records, named_sets, open_records
from data.records import mix
from tests.record_sets import draw, write_lines, write_whole


@pytest.fixture
def lines(tmp_path):
    rows = []
    for n in range(10):
        draw(tmp_path / "p" / f"{n}.png", seed=n)
        rows.append({"id": f"{n}", "image": f"p/{n}.png", "task": "caption", "answer": f"text {n}"})
    return write_lines(tmp_path / "set.jsonl", rows)


def test_an_unknown_name_or_option_is_refused_with_the_known(lines):
    with pytest.raises(ValueError, match="unknown records 'rsic'; known: scenes, jsonl"):
        open_records("rsic", "train", root="x")
    with pytest.raises(ValueError, match="unknown records 'ucmerced'"):
        open_records("ucmerced", "train")
    with pytest.raises(ValueError, match="no option colour; known: answers, boxes, images, keep"):
        open_records("jsonl", "train", root=str(lines), colour=1)
    with pytest.raises(ValueError, match="no option limit; known: kinds, max_boxes, seed, side"):
        open_records("scenes", "train", limit=3)
    with pytest.raises(ValueError, match="boxes='repair' is not refuse or fix"):
        open_records("jsonl", "train", root=str(lines), boxes="repair")


@pytest.mark.parametrize("name", sorted(TABLE))
def test_every_set_says_what_its_root_is_and_refuses_an_empty_folder(name, tmp_path):
    with pytest.raises(ValueError, match=f"records '{name}' need root: "):
        open_records(name, "train")
    split = "test" if name == "geochat_bench" else "train"
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        open_records(name, split, root=str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_limit_takes_records_evenly_and_kept_pictures_stay(lines):
    source = open_records("jsonl", "train", root=str(lines), limit=5, keep=2**20)
    assert [r.id for r in source.records] == ["0", "2", "4", "6", "8"]
    assert source[1]["image"] is source[1]["image"]
    whole = open_records("jsonl", "train", root=str(lines), limit=99)
    assert len(whole) == 10 and whole.fingerprint != source.fingerprint


def test_rules_reach_the_reader(lines):
    bad = {"image": "p/0.png", "task": "caption"}
    path = write_lines(lines.parent / "bad.jsonl", [bad, bad | {"answer": "x"}])
    with pytest.raises(RecordError, match="line 1: a caption record without an answer"):
        open_records("jsonl", "", root=str(path))
    assert open_records("jsonl", "", root=str(path), on_bad="skip").counts == {"skipped": 1}
    assert len(open_records("jsonl", "", root=str(path), answers="optional")) == 2


def test_sets_in_folders_are_opened_by_the_folder_alone(tmp_path):
    draw(tmp_path / "imgs" / "1.tif")
    sentences = [{"raw": "a bay"}]
    images = [{"filename": "1.tif", "split": "test", "sentences": sentences}]
    write_whole(tmp_path / "dataset.json", {"images": images})
    source = open_records("ucm_captions", "test", root=str(tmp_path))
    assert source.records[0].id == "ucm_captions-1.tif"
    turns = [{"from": "human", "value": "<image> hi"}, {"from": "gpt", "value": "[refer] x"}]
    draw(tmp_path / "Images_train" / "a.png")
    write_whole(tmp_path / "VRSBench_train.json", [{"image": "a.png", "conversations": turns}])
    source = open_records("vrsbench_chat", "train", root=str(tmp_path))
    assert source.records[0].task == "chat" and source[0]["image"] is not None


def test_scenes_and_files_mix(lines):
    scenes = open_records("scenes", "val", size=10, side=32, kinds=("caption", "vqa"))
    mixed = mix([open_records("jsonl", "val", root=str(lines)), scenes], [1, 1])
    assert len(mixed) == 20
    assert [mixed[i]["record"].dataset for i in (0, 1)] == ["set", "scenes"]


def test_splits_a_set_does_not_have_are_refused(tmp_path):
    for name, said in (
        ("vrsbench_vqa", "known: train, test"),
        ("mmrs", "it is training data"),
        ("geochat_bench", "known: test"),
    ):
        with pytest.raises(ValueError, match=said):
            open_records(name, "val", root=str(tmp_path))


def test_the_names_of_all_sets_are_known():
    assert {"scenes", "rsicd", "real:ucm_vqa", "mmrs"} <= set(known_records())


# ------------------------------------------------------------------------- training, validation
def sets(root, val=None, val_size=4):
    named = {"train": named_sets("jsonl", root), "val": named_sets("jsonl", root)}
    if val == "none":
        del named["val"]
    return RecordSets(named, {"train": 0, "val": val_size}, {"keep": 2**20}, {})


@pytest.fixture
def one_file(tmp_path):
    """60 records of 30 pictures, no splits."""
    draw(tmp_path / "0.png")
    for k in range(1, 30):
        shutil.copy(tmp_path / "0.png", tmp_path / f"{k}.png")
    rows = [{"image": f"{k % 30}.png", "task": "caption", "answer": f"c{k}"} for k in range(60)]
    return str(write_lines(tmp_path / "set.jsonl", rows))


def seen(source, field="image"):
    return {getattr(record, field) for record in source.records}


def test_of_a_file_without_splits_no_picture_is_in_training_and_validation(one_file):
    opened = sets(one_file)
    (train,), (val,) = opened.open("train"), opened.open("val")
    assert (len(train), len(val), len(seen(val))) == (56, 4, 2)
    assert not seen(train) & seen(val) and train.keep == val.keep == 2**20
    (val,) = sets(one_file, val_size=0).open("val")
    assert len(val) == 6  # a tenth, not all
    (whole,) = sets(one_file, val="none").open("train")
    assert len(whole) == 60


def test_records_that_name_their_split_stay_in_it_and_others_are_trained_on(tmp_path):
    rows = [{"text": f"t{k}", "split": s} for k, s in enumerate(["train", "val", "", "val", ""])]
    root = str(write_lines(tmp_path / "set.jsonl", rows))
    opened = sets(root)
    (train,), (val,) = opened.open("train"), opened.open("val")
    assert seen(train, "answers") == {("t0",), ("t2",), ("t4",)}
    assert seen(val, "answers") == {("t1",), ("t3",)}


def test_of_a_single_picture_nothing_is_held_out(tmp_path):
    root = str(write_lines(tmp_path / "set.jsonl", [{"text": "alone"}]))
    with pytest.raises(RecordError, match="single picture: nothing can be held out"):
        sets(root).open("train")


def test_every_set_has_a_root_or_none_has():
    assert named_sets("a+b", "x+y") == [("a", "x"), ("b", "y")]
    assert named_sets("a+b", "") == [("a", ""), ("b", "")]
    with pytest.raises(ValueError, match="1 roots for the 2 sets a, b"):
        named_sets("a+b", "x")
