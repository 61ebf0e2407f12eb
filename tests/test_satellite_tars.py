"""WebDataset tars: samples of every set, damaged members, random access."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from data.images import ImageError
from data.pipeline import eval_batches, train_batches
from data.satellite import open_satellite
from data.satellite_tars import TarReader, expand_braces, find_tars, to_rgb
from data.wording import DrawCaption, full_caption
from tests.tar_samples import fmow, jpeg, npy, satlas, spacenet, write_tar


def test_samples_of_the_three_sets_are_told_by_their_names(tmp_path):
    write_tar(tmp_path / "a.tar", fmow(7) | spacenet() | satlas())
    reader = TarReader([tmp_path / "a.tar"])
    captions = [full_caption(reader.sample(i).wording) for i in range(len(reader))]
    assert captions[0] == "a fmow satellite image of a airport in Brazil"
    assert captions[1].startswith("a spacenet satellite image of 2 buildings covering an area of ")
    assert captions[2] == (
        "a satlas satellite image of 2 wind turbines in the top left, "
        "1 power tower in the bottom right"
    )
    assert reader.sample(0).pixels().shape == (8, 10, 3)
    assert reader.sample(1).pixels().shape == (10, 12, 3)
    assert reader.sample(2).pixels().max() in (10, 20)


@pytest.mark.parametrize(
    "names, values, taken",
    [
        (["a_2018-05-06", "b_2020-07-08"], (1, 2, 3, 4, 5), {4: 2018, 5: 2020}),
        (["a_2018-05-06", "anchor_2019-01-02", "c_2020-07-08"], (1, 2, 3, 4), {3: 2019}),
        (["c_2020-07-08"], (7,), {7: 2020}),
    ],
)
def test_the_names_of_satlas_are_those_of_the_last_pictures(tmp_path, names, values, taken):
    """Picture and date belong together; an anchor goes before all others."""
    write_tar(tmp_path / "a.tar", satlas(names, values))
    sample = TarReader([tmp_path / "a.tar"]).sample(0)
    assert taken[int(sample.pixels()[0, 0, 0])] == sample.fields["year"]


@pytest.mark.parametrize("names, values", [((), ()), ((), (1,)), (("a_2018-05-06",) * 2, (1,))])
def test_a_stack_without_a_picture_for_every_name_is_refused(tmp_path, names, values):
    write_tar(tmp_path / "a.tar", satlas(names, values))
    with pytest.raises(ImageError, match="a name for each"):
        TarReader([tmp_path / "a.tar"]).sample(0)


def test_pictures_with_texts_and_json_are_read(tmp_path):
    about = {"caption": "unused", "gsd": 0.3, "date": "2019-08-31"}
    members = {
        "x/a.jpg": jpeg(), "x/a.txt": b" a harbour\n", "x/a.json": json.dumps(about).encode(),
        "y/a.jpg": jpeg(), "y/a.json": b'{"caption": "a field"}', "z.npy": npy([1]),
        "b.jpeg": jpeg(),
    }  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    source = open_satellite("train", root=str(tmp_path / "a.tar"), holdout=0.25)
    assert [source[i]["caption"] for i in range(2)] == ["a harbour", "a field"]
    assert source[0]["metadata"][2] == pytest.approx(300) and source[0]["metadata"][6] == 1000
    assert source.reader.names == ["x/a.jpg", "y/a.jpg", "z.npy", "b.jpeg"]
    assert open_satellite("val", root=str(tmp_path), holdout=0.25)[0]["id"] == "b"


def test_polygons_of_the_csv_file_give_fmow_its_places(tmp_path):
    write_tar(tmp_path / "a.tar", fmow(12) | fmow(13))
    write_places(tmp_path / "fmow.csv", ["airport", 12, 0, SQUARE])
    options = {"root": str(tmp_path), "side": 4, "holdout": 0.0}
    source = open_satellite("train", places=str(tmp_path / "fmow.csv"), **options)
    expected = np.array([191 / 360, 111 / 180, 0.5 * 8 / 4, 0.2, 36 / 120, 2 / 12, 4 / 31]) * 1000
    np.testing.assert_allclose(source[0]["metadata"], expected, rtol=1e-6)
    np.testing.assert_allclose(source[1]["metadata"], expected * ([0] * 2 + [1] * 5), rtol=1e-6)


def write_places(path, *rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["category", "location_id", "image_id", "polygon"])
        writer.writerows(rows)
    return str(path)


SQUARE = "POLYGON ((10 20, 12 20, 12 22, 10 22, 10 20))"


def test_pictures_without_a_place_are_counted_and_a_strange_table_is_refused(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", fmow(12) | fmow(13) | spacenet() | {"b.jpg": jpeg()})
    options = {"root": str(tmp_path), "holdout": 0.0}
    open_satellite("train", **options)
    assert "2 of 2 fMoW pictures looked at have no longitude" in caplog.records[-1].message
    table = write_places(tmp_path / "fmow.csv", ["airport", 12, 0, SQUARE])
    open_satellite("train", places=table, **options)
    assert "1 of 2 fMoW pictures" in caplog.records[-1].message
    assert "fmow.csv lacks them" in caplog.records[-1].message
    write_places(tmp_path / "fmow.csv", ["airport", 14, 0, SQUARE])
    with pytest.raises(ValueError, match="has none of the 2 fMoW pictures of"):
        open_satellite("train", places=table, **options)
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="need the columns category"):
        TarReader([tmp_path / "a.tar"], places=str(tmp_path / "bad.csv"))


def test_both_splits_share_one_reader_until_a_file_changes(tmp_path):
    write_tar(tmp_path / "a.tar", fmow(12) | fmow(13))
    table = write_places(tmp_path / "fmow.csv", ["airport", 12, 0, SQUARE])

    def reader(split):
        return open_satellite(split, root=str(tmp_path), places=table, holdout=0.5).reader

    first = reader("train")
    assert reader("val") is first
    write_places(tmp_path / "fmow.csv", ["airport", 12, 0, SQUARE.replace("20", "30")])
    corrected = reader("val")
    assert corrected is not first and corrected.fingerprint != first.fingerprint
    write_tar(tmp_path / "a.tar", fmow(12) | fmow(14))
    assert len({reader("train").fingerprint, corrected.fingerprint, first.fingerprint}) == 3


def test_a_tar_with_a_broken_member_is_refused_or_read_without_it(tmp_path):
    members = {f"{k}.jpg": jpeg(20 * k) for k in range(5)}
    members |= {f"{k}.txt": f"picture {k}".encode() for k in range(5)}
    offsets = write_tar(tmp_path / "a.tar", dict(sorted(members.items())))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[offsets["1.jpg"] : offsets["1.jpg"] + 512] = b"\xff" * 512  # a lost header
    data[offsets["3.jpg"] + 512 : offsets["3.jpg"] + 600] = b"\xff" * 88  # a spoilt picture
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ImageError, match="2 damaged members: .*damaged header.*1 has no picture"):
        open_satellite("train", root=str(tmp_path))
    source = open_satellite("train", root=str(tmp_path), holdout=0.0, on_corrupt="skip")
    assert len(source.reader.problems) == 2 and len(source) == 4
    assert [source[i]["caption"][-1] for i in range(4)] == ["0", "2", "4", "4"]
    assert source.counts["skipped"] == 1


def test_a_sample_that_lacks_what_its_set_needs_is_named(tmp_path):
    members = fmow(1)
    del members["fmow-000001.output.cls"]
    write_tar(tmp_path / "a.tar", members | {"fmow-000002.input.npy": npy([1, 2])[:50]})
    reader = TarReader([tmp_path / "a.tar"])
    with pytest.raises(ImageError, match="a.tar: fmow-000001: KeyError 'category.txt'"):
        reader.sample(0)
    with pytest.raises(ImageError, match="fmow-000002"):
        reader.sample(1)


def test_excluded_pictures_are_not_seen(tmp_path):
    write_tar(tmp_path / "a.tar", {f"x/{k}.jpg": jpeg() for k in range(4)})
    options = {"root": str(tmp_path), "holdout": 0.0}
    source = open_satellite("train", exclude=["2.jpg", "x/0.jpg"], **options)
    assert [source[i]["id"] for i in range(len(source))] == ["x/1", "x/3"]
    with pytest.raises(ValueError, match="nor by their content"):
        open_satellite("train", exclude=["sha256:00"], **options)


def test_several_sets_come_whole_or_at_the_ratio_of_their_weights(tmp_path):
    write_tar(tmp_path / "a/a.tar", {f"a{k}.jpg": jpeg() for k in range(4)})
    write_tar(tmp_path / "b/b.tar", {f"b{k}.jpg": jpeg() for k in range(2)})
    a, b = f"{tmp_path}/a", f"{tmp_path}/b"

    def names(root):
        source = open_satellite("train", root=root, holdout=0.0)
        return [source[i]["id"] for i in range(len(source))]

    assert names(f"{a},{b}") == ["a0", "a1", "a2", "a3", "b0", "b1"]
    assert "".join(name[0] for name in names({a: 1, b: 2})) == "bab" * 4


def test_tars_are_named_by_braces_folders_and_lists(tmp_path):
    assert expand_braces("x-{008..010}-{a,b}.tar") == [
        f"x-{n}-{c}.tar" for n in ("008", "009", "010") for c in "ab"
    ]
    for name in ("t-00.tar", "t-01.tar", "u.tar"):
        write_tar(tmp_path / name, {f"{name}.jpg": jpeg()})
    (tmp_path / "list.txt").write_text("t-{00..01}.tar\n\nu.tar\n")
    assert [p.name for p in find_tars(str(tmp_path / "list.txt"))] == [
        "t-00.tar",
        "t-01.tar",
        "u.tar",
    ]
    assert len(open_satellite("train", root=f"{tmp_path}/t-{{00..01}}.tar", holdout=0.0)) == 2
    with pytest.raises(FileNotFoundError, match="t-02.tar"):
        open_satellite("train", root=f"{tmp_path}/t-{{00..02}}.tar")


def test_arrays_become_8_bit_pictures():
    first = np.zeros((3, 5, 6), np.uint8)
    assert to_rgb(first, "x").shape == (5, 6, 3)
    ramp = np.repeat(np.arange(1001, dtype=np.uint16)[:, None, None] * 50, 3, -1).repeat(2, 1)
    found = to_rgb(ramp, "x")
    assert found[0, 0, 0] == 0 and found[1000, 0, 0] == 255
    assert found[500, 0, 0] in (127, 128) and found[20, 0, 0] == 0 and found[980, 0, 0] == 255
    for wrong in (np.zeros((5, 6, 4), np.uint8), np.zeros((5, 6, 3), np.float32)):
        with pytest.raises(ImageError, match="need 8 or 16 bit RGB"):
            to_rgb(wrong, "x")


def test_wordings_do_not_disturb_batches(tmp_path):
    write_tar(tmp_path / "a.tar", satlas())
    source = open_satellite("train", root=str(tmp_path), holdout=0.0)
    train = next(train_batches(source, (DrawCaption(),), batch_size=2, seed=0))
    assert sorted(train) == ["image", "index", "metadata"] and train["metadata"].shape == (2, 7)
    (batch,) = eval_batches(source, batch_size=2)
    assert batch["mask"].tolist() == [True, False] and "wind" in batch["caption"][0]
