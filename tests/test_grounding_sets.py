"""DIOR-RSVG and RSVG on small files of the published formats, and the mistakes users make."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from data.gathering import Rules
from data.grounding_sets import read_dior_rsvg, read_rsvg, read_torch_list
from data.record_boxes import RecordError
from tests.record_sets import draw, write_whole

THING = (
    "<object><name>{kind}</name><pose>x</pose><bndbox><xmin>{0}</xmin><ymin>{1}</ymin>"
    "<xmax>{2}</xmax><ymax>{3}</ymax></bndbox><description>{text}</description></object>"
)


def write_xml(root, name: str, things: list) -> None:
    """things: (class, box, description) in the order of the file."""
    inside = "".join(THING.format(*box, kind=kind, text=text) for kind, box, text in things)
    path = root / "Annotations" / f"{name}.xml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f"<annotation><filename>{name}.jpg</filename><size><width>40</width><height>30</height>"
        f"<depth>3</depth></size>{inside}</annotation>"
    )
    draw(root / "JPEGImages" / f"{name}.jpg", seed=int(name))


@pytest.fixture
def dior(tmp_path):
    # Written out of order: the running number follows the names.
    write_xml(tmp_path, "00002", [("ship", (1, 2, 9, 8), "A ship at the top")])
    write_xml(
        tmp_path,
        "00001",
        [("dam", (5, 5, 20, 20), "A dam"), ("bridge", (0, 0, 40, 30), "The bridge ")],
    )
    for split, numbers in {"train": "1\n2\n", "val": "", "test": "0\n"}.items():
        (tmp_path / f"{split}.txt").write_text(numbers)
    return tmp_path


def test_the_lists_count_objects_over_sorted_files(dior):
    train = read_dior_rsvg(dior, "train")
    assert [r.question for r in train.records] == ["The bridge", "A ship at the top"]
    assert train.records[1].boxes == ((1, 2, 9, 8),) and train.records[1].labels == ("ship",)
    assert train.records[1].id == "dior_rsvg-00002" and train.records[1].size == (40, 30)
    assert train[1]["image"].shape == (30, 40, 3)
    assert read_dior_rsvg(dior, "test").records[0].question == "A dam"


def test_a_list_of_pictures_instead_of_objects_is_recognised(dior):
    (dior / "test.txt").write_text("00001.jpg\n")
    with pytest.raises(RecordError, match="test.txt: '00001.jpg' is no number; .*running objects"):
        read_dior_rsvg(dior, "train")
    (dior / "test.txt").write_text("00001\n")  # numbers, but of pictures
    with pytest.raises(RecordError, match="share a number"):
        read_dior_rsvg(dior, "train")
    (dior / "test.txt").write_text("11725\n")
    with pytest.raises(RecordError, match=r"name object 11725, Annotations has 3 \(0 to 2\)"):
        read_dior_rsvg(dior, "train")
    (dior / "test.txt").write_text("0 0")
    with pytest.raises(RecordError, match="a number occurs twice"):
        read_dior_rsvg(dior, "train")


def test_a_missing_annotation_file_is_noticed_since_it_shifts_all_numbers(dior):
    (dior / "Annotations" / "00002.xml").unlink()
    with pytest.raises(RecordError, match="every number behind a missing file means another"):
        read_dior_rsvg(dior, "train")
    write_xml(dior, "00000", [("car", (1, 1, 5, 5), "a"), ("car", (1, 1, 5, 5), "b")])
    with pytest.raises(RecordError, match="lists name 3 objects, Annotations has 4"):
        read_dior_rsvg(dior, "train")
    (dior / "Annotations" / "00000.xml").write_text("<annotation>")
    with pytest.raises(RecordError, match="00000.xml: not valid XML"):
        read_dior_rsvg(dior, "train")


def test_a_faulty_object_is_named_and_can_be_skipped(dior):
    write_xml(dior, "00002", [("ship", (9, 8, 1, 2), "reversed")])
    with pytest.raises(RecordError, match="00002.xml object 2: .*corners are reversed"):
        read_dior_rsvg(dior, "train")
    found = read_dior_rsvg(dior, "train", rules=Rules(on_bad="skip"))
    assert len(found) == 1 and found.counts == {"skipped": 1}
    path = dior / "Annotations" / "00001.xml"
    path.write_text(path.read_text().replace("description", "text"))
    with pytest.raises(RecordError, match="object 0: <object> has no <description>"):
        read_dior_rsvg(dior, "test")


def test_a_folder_without_the_parts_is_an_error(tmp_path, dior):
    (dior / "val.txt").unlink()
    with pytest.raises(FileNotFoundError, match="val.txt is not a file"):
        read_dior_rsvg(dior, "val")
    with pytest.raises(FileNotFoundError, match="Annotations is not a folder"):
        read_dior_rsvg(dior / "JPEGImages", "train")


# ------------------------------------------------------------------------------------------- RSVG
ENTRIES = [
    ("a.jpg", 7, [1, 2, 30, 20], "the white ship", [["ship"]]),
    ("a.jpg", "a_1", np.array([3.0, 4.0, 9.0, 9.0]), "the pier", []),
]


@pytest.mark.parametrize("form", ["zip", "old", "pickle", "json"])
def test_rsvg_lists_are_read_without_torch(tmp_path, form):
    draw(tmp_path / "images" / "a.jpg")
    if form == "json":
        plain = [[v.tolist() if isinstance(v, np.ndarray) else v for v in e] for e in ENTRIES]
        write_whole(tmp_path / "rsvg_test.json", plain)
    elif form == "pickle":
        (tmp_path / "rsvg_test.pth").write_bytes(pickle.dumps(ENTRIES, protocol=2))
    else:
        torch = pytest.importorskip("torch")
        zipped = form == "zip"
        path = tmp_path / "rsvg_test.pth"
        torch.save(ENTRIES, path, _use_new_zipfile_serialization=zipped)
    source = read_rsvg(tmp_path, "test")
    assert [r.question for r in source.records] == ["the white ship", "the pier"]
    assert [r.boxes[0] for r in source.records] == [(1, 2, 30, 20), (3, 4, 9, 9)]
    corners = read_rsvg(tmp_path, "test", box_format="xywh")
    assert corners.records[1].boxes[0] == (3, 4, 12, 13)


def test_tensors_and_strangers_in_a_list_name_the_conversion(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "rsvg_train.pth"
    torch.save([("a.jpg", torch.tensor([1, 2, 3, 4]), "x")], path)
    with pytest.raises(ValueError, match="rsvg_train.pth: .*convert it once .*torch.load"):
        read_torch_list(path)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="not a list of plain values"):
        read_torch_list(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="holds a dict, need a list"):
        read_torch_list(path)


def test_entries_without_box_or_text_and_absent_lists_are_named(tmp_path):
    draw(tmp_path / "a.jpg")
    write_whole(tmp_path / "rsvg_val.json", [["a.jpg", "no box"], ["a.jpg", [1, 2, 3, 4]], 7])
    with pytest.raises(RecordError, match="rsvg_val.json entry 0: .*need .picture"):
        read_rsvg(tmp_path, "val")
    with pytest.raises(RecordError, match="is empty"):
        read_rsvg(tmp_path, "val", rules=Rules(on_bad="skip"))
    with pytest.raises(FileNotFoundError, match="neither rsvg_test.json nor rsvg_test.pth"):
        read_rsvg(tmp_path, "test")
