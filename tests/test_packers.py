"""What each kind of set becomes, and what is read from it again."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data.catalog import open_source
from data.images import ImageError
from data.packers import ExamplePacker, PicturePacker, PictureRules, SatellitePacker
from data.packing import unpack
from data.record_pictures import scene_name
from data.satellite import open_reader
from data.shards import Manifest, shard_name, write_manifest, write_shard
from tests.tar_samples import fmow, jpeg, npy, write_tar


def write_set(folder, packer):
    records = [packer.pack(i) for i in range(len(packer))]
    note = write_shard(folder / shard_name(0), records)
    write_manifest(
        folder, Manifest(packer.kind, packer.name, packer.fingerprint, (note,), about=packer.about)
    )
    return folder


def picture_of(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(unpack(content, "x")[1]["picture"]))


def test_files_keep_their_bytes_and_arrays_become_png(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.jpg": jpeg()} | fmow(7))
    packer = SatellitePacker(open_reader(tmp_path), range(2), PictureRules())
    header, parts = unpack(packer.pack(0), "x")
    assert parts["picture"] == jpeg() and header["id"] == "a" and header["fields"] == {}
    assert picture_of(packer.pack(1)).format == "PNG"
    assert unpack(packer.pack(1), "x")[0]["wording"][1] == [[0.9, " fmow"]]


def test_reduced_pictures_have_a_coarser_gsd(tmp_path):
    write_tar(tmp_path / "a.tar", fmow(7))
    packer = SatellitePacker(open_reader(tmp_path), range(1), PictureRules(side=4, quality=90))
    image = picture_of(packer.pack(0))
    assert image.size == (5, 4) and image.format == "JPEG"
    assert unpack(packer.pack(0), "x")[0]["fields"]["gsd"] == 0.5 * 8 / 4
    small = SatellitePacker(open_reader(tmp_path), range(1), PictureRules(side=8))
    assert picture_of(small.pack(0)).size == (10, 8) and small.fingerprint != packer.fingerprint


def test_what_cannot_be_decoded_is_not_packed(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.jpg": jpeg()[:200], "fmow-1.input.npy": npy([1])})
    packer = SatellitePacker(open_reader(tmp_path), range(2), PictureRules())
    with pytest.raises(ImageError, match="a: cannot be read"):
        packer.pack(0)
    with pytest.raises(ImageError, match="fmow-1"):
        packer.pack(1)


def test_pictures_of_records_are_files_members_and_scenes(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.jpg": jpeg()})
    (tmp_path / "b.jpg").write_bytes(jpeg(7))
    names = [f"{tmp_path}/a.tar!a.jpg", f"{tmp_path}/b.jpg", scene_name(0, "train", 3, 32)]
    packer = PicturePacker("mixed", names, PictureRules())
    assert unpack(packer.pack(0), "x")[1]["picture"] == jpeg()
    assert unpack(packer.pack(1), "x")[1]["picture"] == jpeg(7)
    assert picture_of(packer.pack(2)).size == (32, 32)


@pytest.mark.parametrize("name", ["scenes", "scenes_seg"])
def test_labelled_examples_come_back_bit_for_bit(tmp_path, name):
    source = open_source(name, "train", size=3, side=32)
    found = open_source(f"prepared:{write_set(tmp_path, ExamplePacker(source))}", "train")
    assert (found.task, found.classes, found.native_side) == (source.task, source.classes, 32)
    for i in range(3):
        assert found[i]["id"] == source[i]["id"]
        for key in ("image", "label", "metadata"):
            np.testing.assert_array_equal(found[i][key], source[i][key])
            assert found[i][key].dtype == source[i][key].dtype
    if name == "scenes":
        assert found.labels().tolist() == [0, 1, 2]
    else:
        assert found.labels() is None


class Bands:
    """Two examples as GEO-Bench gives them: float pictures, multi-hot labels, no metadata."""

    name, task, classes, native_side, fingerprint = (
        "bands",
        "multi_label_classification",
        "abc",
        8,
        "f",
    )

    def __len__(self):
        return 2

    def __getitem__(self, i):
        image = np.random.default_rng(i).random((8, 8, 3), np.float32)
        return {"image": image, "label": np.eye(3, dtype=np.float32)[i], "id": f"s{i}"}


def test_float_pictures_come_back_bit_for_bit(tmp_path):
    found = open_source(f"prepared:{write_set(tmp_path, ExamplePacker(Bands()))}", "train")
    np.testing.assert_array_equal(found[1]["image"], Bands()[1]["image"])
    assert found[1]["image"].dtype == np.float32 and "metadata" not in found[1]
    np.testing.assert_array_equal(found.labels(), np.eye(3)[:2])
