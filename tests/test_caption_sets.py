"""Caption sets, on small files of the published formats."""

from __future__ import annotations

import csv
import tarfile
import zipfile

import pytest

from data.caption_sets import (
    read_karpathy_captions,
    read_nwpu_captions,
    read_skyscript,
    read_tar_captions,
)
from data.gathering import Rules
from data.record_boxes import RecordError
from tests.record_sets import draw, write_whole

SKIP = Rules(on_bad="skip")


def karpathy_row(name: str, split: str, sentences: list[str]) -> dict:
    listed = [{"raw": raw, "tokens": raw.split(), "sentid": k} for k, raw in enumerate(sentences)]
    return {"filename": name, "imgid": 0, "split": split, "sentids": [0], "sentences": listed}


@pytest.fixture
def rsicd(tmp_path):
    for n in range(3):
        draw(tmp_path / "RSICD_images" / f"airport_{n}.jpg", seed=n)
    rows = [
        karpathy_row("airport_0.jpg", "train", ["many planes .", " many planes . "]),
        karpathy_row("airport_1.tif", "test", ["a runway ."] * 5),  # saved here as .jpg
        karpathy_row("airport_2.jpg", "val", ["grass ."]),
    ]
    return write_whole(tmp_path / "dataset_rsicd.json", {"images": rows, "dataset": "rsicd"})


def test_karpathy_captions_keep_every_sentence_of_the_split(rsicd):
    train = read_karpathy_captions(rsicd, "train", images=rsicd.parent, name="rsicd")
    assert [r.answers for r in train.records] == [("many planes .", "many planes .")]
    test = read_karpathy_captions(rsicd, "test", images=rsicd.parent, name="rsicd")
    assert len(test.records[0].answers) == 5 and test[0]["image"].shape == (30, 40, 3)
    assert test.records[0].id == "rsicd-airport_1.tif" and test.records[0].size == (40, 30)


def test_a_caption_file_with_faults_is_refused(rsicd, tmp_path):
    rows = [
        karpathy_row("airport_0.jpg", "train", ["fine"]),
        karpathy_row("airport_9.jpg", "train", ["lost"]),
        karpathy_row("airport_1.jpg", "train", []),
        karpathy_row("airport_2.jpg", "training", ["odd"]),
    ]
    for row, said in zip(
        rows[1:], ("no picture airport_9.jpg", "without an answer", "split 'training' is none of")
    ):
        path = write_whole(tmp_path / "d.json", {"images": [rows[0], row]})
        with pytest.raises(RecordError, match=f"d.json image 1: .*{said}"):
            read_karpathy_captions(path, "train", images=rsicd.parent)
    path = write_whole(tmp_path / "d.json", {"images": rows})
    found = read_karpathy_captions(path, "train", images=rsicd.parent, rules=SKIP)
    assert len(found) == 1 and found.counts == {"skipped": 3}


def test_one_caption_format_taken_for_the_other_is_said(rsicd, tmp_path):
    with pytest.raises(RecordError, match="another caption set"):
        read_nwpu_captions(rsicd, "train", images=rsicd.parent)
    path = write_whole(tmp_path / "n.json", {"airplane": []})
    with pytest.raises(RecordError, match="no list 'images'"):
        read_karpathy_captions(path, "train", images=tmp_path)


def test_nwpu_captions_have_five_keys_and_class_folders(tmp_path):
    keys = ("raw", "raw_1", "raw_2", "raw_3", "raw_4")
    for kind in ("airplane", "lake"):
        draw(tmp_path / "images" / kind / "x_001.jpg")  # one name in two classes
    row = {"filename": "x_001.jpg", "imgid": 1, "sentid": 1, "split": "test"}
    row |= {key: f"text {key} ." for key in keys}
    lame = {key: value for key, value in row.items() if key != "raw_3"}
    good = write_whole(tmp_path / "dataset_nwpu.json", {"airplane": [row], "lake": []})
    found = read_nwpu_captions(good, "test", images=tmp_path / "images")
    assert found.records[0].answers == tuple(f"text {key} ." for key in keys)
    assert found.records[0].category == "airplane"
    assert found.records[0].image.endswith("images/airplane/x_001.jpg")
    bad = write_whole(tmp_path / "bad.json", {"lake": [lame]})
    with pytest.raises(RecordError, match="class lake picture 0: the field 'raw_3' is lacking"):
        read_nwpu_captions(bad, "test", images=tmp_path / "images")


# -------------------------------------------------------------------------------------- SkyScript
def skyscript_csv(path, rows, header=("filepath", "title", "title_multi_objects")):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


@pytest.fixture
def skyscript(tmp_path):
    draw(tmp_path / "images2" / "a1.jpg")
    for archive, member in (("images3.zip", "images3/b.jpg"), ("images4.zip", "c.jpg")):
        with zipfile.ZipFile(tmp_path / archive, "w") as packed:
            packed.write(draw(tmp_path / "raw.d" / "b.jpg", seed=2), member)
    rows = [
        ("images2/a1.jpg", "a road", "a road, beside a field"),
        ("images3/b.jpg", "a quay, old", ""),
        ("images4/c.jpg", "x", "a lake"),
    ]
    return skyscript_csv(tmp_path / "top30.csv", rows)


def test_skyscript_reads_folders_and_archives_and_takes_the_title_where_it_must(skyscript):
    source = read_skyscript(skyscript, images=skyscript.parent)
    answers = [r.answers[0] for r in source.records]
    assert answers == ["a road, beside a field", "a quay, old", "a lake"]
    assert all(source[i]["image"].shape == (30, 40, 3) for i in range(3))
    assert source.counts == {"title_multi_objects empty, title taken": 1}
    assert len(read_skyscript(skyscript, images=skyscript.parent, limit=2)) == 2
    titles = read_skyscript(skyscript, images=skyscript.parent, column="title")
    assert titles.records[0].answers == ("a road",)


def test_skyscript_with_another_header_or_without_its_pictures_is_refused(skyscript, tmp_path):
    bad = skyscript_csv(tmp_path / "bad.csv", [], ("path", "title"))
    with pytest.raises(
        RecordError, match="need the columns filepath, title_multi_objects, found p"
    ):
        read_skyscript(bad, images=tmp_path)
    far = skyscript_csv(tmp_path / "far.csv", [("images7/a.jpg", "x", "y")])
    with pytest.raises(RecordError, match="line 2: no folder and no archive 'images7'"):
        read_skyscript(far, images=tmp_path)
    gone = skyscript_csv(tmp_path / "gone.csv", [("images2/none.jpg", "x", "y")])
    with pytest.raises(RecordError, match="there is no picture .*none.jpg"):
        read_skyscript(gone, images=tmp_path, rules=Rules())


def test_tar_captions_pair_pictures_with_texts(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "note.txt").write_text("a bay \n")
    with tarfile.open(tmp_path / "d" / "0.tar", "w") as archive:
        archive.add(draw(tmp_path / "a.jpg"), "k1.jpg")
        archive.add(tmp_path / "note.txt", "k1.txt")
    found = read_tar_captions(tmp_path / "d")
    assert found.records[0].answers == ("a bay",) and found[0]["image"].shape == (30, 40, 3)
    with tarfile.open(tmp_path / "d" / "1.tar", "w") as archive:
        archive.add(tmp_path / "a.jpg", "k2.jpg")
    with pytest.raises(RecordError, match="1.tar member k2.jpg: no k2.txt beside it"):
        read_tar_captions(tmp_path / "d")
    with pytest.raises(FileNotFoundError, match="holds no tar files"):
        read_tar_captions(tmp_path)
