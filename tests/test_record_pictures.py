"""Pictures by name: files, members of archives, scenes."""

from __future__ import annotations

import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from data.images import ImageError
from data.record_pictures import Finder, digests, mark_of, read_picture, scene_name, size_of, survey
from data.scenes import draw_scene
from tests.record_sets import draw


@pytest.fixture
def archives(tmp_path):
    picture = draw(tmp_path / "free" / "c.png", seed=3)
    with zipfile.ZipFile(tmp_path / "part.zip", "w") as archive:
        archive.write(draw(tmp_path / "raw.d" / "a.png", seed=1), "images/a.png")
        archive.writestr("images/broken.png", b"no picture")
    with tarfile.open(tmp_path / "part.tar", "w") as archive:
        archive.add(draw(tmp_path / "raw.d" / "b.png", seed=2), "b.png")
    return tmp_path, picture


def test_a_member_of_an_archive_has_the_pixels_of_the_file(archives):
    root, _ = archives
    for member, file in (("part.zip!images/a.png", "a.png"), ("part.tar!b.png", "b.png")):
        name = f"{root}/{member}"
        assert np.array_equal(read_picture(name), read_picture(str(root / "raw.d" / file)))
        assert size_of(name) == (40, 30)


def test_faults_in_archives_name_archive_and_member(archives):
    root, _ = archives
    with pytest.raises(ImageError, match="part.zip!images/broken.png"):
        read_picture(f"{root}/part.zip!images/broken.png")
    for archive in ("part.zip", "part.tar"):
        with pytest.raises(FileNotFoundError, match=f"{archive} has no member x.png"):
            read_picture(f"{root}/{archive}!x.png")
    (root / "bad.zip").write_bytes(b"PK no archive")
    (root / "bad.tar").write_bytes(b"\x1f\x8b no archive")
    for archive in ("bad.zip", "bad.tar"):
        with pytest.raises(ImageError, match=archive):
            read_picture(f"{root}/{archive}!x.png")


def test_a_scene_is_drawn_from_its_name():
    name = scene_name(3, "val", 12, 32)
    assert np.array_equal(read_picture(name), draw_scene(3, "val", 12, 32).image)
    assert size_of(name) == (32, 32)
    with pytest.raises(ImageError, match="not a scene"):
        size_of("scene:none")


def test_the_mark_of_a_picture_changes_with_its_content_wherever_it_lies(archives):
    root, picture = archives
    names = [str(picture), f"{root}/part.zip!images/a.png", f"{root}/part.tar!b.png"]
    before = [mark_of(name) for name in names]
    assert min(before) > 0
    draw(picture, (50, 30))
    assert mark_of(names[0]) != before[0]
    assert [mark_of(f"{name}x") for name in names] == [-1, -1, -1]


def test_sixteen_bits_become_eight(tmp_path):
    values = np.array([[0, 257, 65535]] * 8, np.uint16).repeat(3, 1)
    Image.fromarray(values).save(tmp_path / "a.png")
    found = read_picture(str(tmp_path / "a.png"))
    assert found.dtype == np.uint8 and found[0, ::3, 0].tolist() == [0, 1, 255]


def test_the_survey_says_what_is_wrong_with_each(archives):
    root, picture = archives
    broken, absent = f"{root}/part.zip!images/broken.png", str(root / "none.png")
    found = survey([str(picture), broken, absent])
    assert found[str(picture)] == (40, 30)
    assert "cannot be read" in found[broken] and "there is no picture" in found[absent]


def test_pictures_are_found_by_path_name_stem_and_archive_member(archives):
    root, picture = archives
    finder = Finder(root)
    for name in ("free/c.png", "./free/c.png", "c.png", "elsewhere/c.tif", "c"):
        assert finder.find(name) == str(picture)
    assert finder.find("images/a.png") == f"{root}/part.zip!images/a.png"
    with pytest.raises(ImageError, match="several pictures below .* are named a.png"):
        finder.find("a.png")  # in the archive and beside it
    with pytest.raises(ImageError, match="no picture x.png below .*6 pictures, such as free/c.png"):
        finder.find("x.png")
    with pytest.raises(FileNotFoundError, match="none is not a folder"):
        Finder(root / "none")


def test_equal_pictures_have_one_digest_whatever_their_name_and_format(tmp_path):
    one, other = draw(tmp_path / "a.png"), draw(tmp_path / "b.tif")
    found = digests([str(one), str(other), str(draw(tmp_path / "c.png", seed=1))])
    assert sorted(found.values()) == [str(other), str(tmp_path / "c.png")]
