"""Where members lie, and what a damaged archive costs: its damaged members, no others."""

from __future__ import annotations

import io
import tarfile

import pytest

from data import tar_index
from data.images import ImageError
from data.tar_index import index_tar, open_samples

SIZES = (700, 512, 3, 1000)


def write_tar(path, form=tarfile.PAX_FORMAT, names="abcd"):
    """Members with sizes SIZES, filled with their own letter; -> offsets of the headers."""
    offsets = []
    with tarfile.open(path, "w", format=form) as archive:
        for name, size in zip(names, SIZES, strict=True):
            info = tarfile.TarInfo(f"set/{name}.jpg")
            info.size = size
            offsets.append(archive.offset)
            archive.addfile(info, io.BytesIO(name[:1].encode() * size))
    return offsets


def contents(path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {name: data[a : a + n] for name, (a, n) in index_tar(path).members.items()}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_found_where_they_lie(tmp_path, form):
    write_tar(tmp_path / "a.tar", form)
    found = contents(tmp_path / "a.tar")
    assert found == {f"set/{c}.jpg": c.encode() * n for c, n in zip("abcd", SIZES)}
    assert index_tar(tmp_path / "a.tar").broken == ()


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_longer_than_a_header_are_read(tmp_path, form):
    names = [c * 150 for c in "abcd"]
    write_tar(tmp_path / "a.tar", form, names)
    assert list(index_tar(tmp_path / "a.tar").members) == [f"set/{name}.jpg" for name in names]


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_a_damaged_header_loses_one_member_and_is_told(tmp_path, which):
    path = tmp_path / "a.tar"
    offsets = write_tar(path)
    data = bytearray(path.read_bytes())
    data[offsets[which] + 148 : offsets[which] + 156] = b"garbage!"  # the checksum
    path.write_bytes(data)
    index = index_tar(path)
    assert list(index.members) == [f"set/{c}.jpg" for k, c in enumerate("abcd") if k != which]
    (problem,) = index.broken
    assert "damaged header" in problem


def test_a_cut_archive_loses_its_last_member_and_is_told(tmp_path):
    path = tmp_path / "a.tar"
    offsets = write_tar(path)
    path.write_bytes(path.read_bytes()[: offsets[3] + 512 + 100])
    index = index_tar(path)
    assert list(index.members) == ["set/a.jpg", "set/b.jpg", "set/c.jpg"]
    assert "set/d.jpg is cut off" in index.broken[0]


def test_archives_behind_each_other_are_one(tmp_path):
    write_tar(tmp_path / "a.tar")
    write_tar(tmp_path / "b.tar", names="efgh")
    both = (tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes()
    (tmp_path / "c.tar").write_bytes(both)
    assert len(index_tar(tmp_path / "c.tar").members) == 8


def test_what_is_no_plain_tar_file_is_refused(tmp_path):
    for name, content in (("a.tar", b"x" * 2000), ("b.tar", b"\x1f\x8b" + b"0" * 600), ("c", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match="not a plain tar archive"):
            index_tar(tmp_path / name)


def described(samples) -> list:
    return [(samples.key(i), samples.members(i), samples.picture_part(i)) for i in range(4)]


@pytest.mark.parametrize("writable", [True, False])
def test_an_index_is_kept_and_believed_while_the_tar_is_unchanged(tmp_path, monkeypatch, writable):
    """Beside the tar, or in the cache folder of the user."""
    path, cache = tmp_path / "x" / "a.tar", tmp_path / "cache"
    path.parent.mkdir()
    write_tar(path)
    monkeypatch.setattr(tar_index, "WORTH_KEEPING", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    beside = path.with_name(".a.tar.index.npz")
    if not writable:
        beside.mkdir()  # root may write anywhere: a folder stands where the file would be
    first = open_samples(str(path))
    assert beside.is_file() == writable and bool(list(cache.rglob("*.npz"))) != writable
    read = tar_index.read_samples
    monkeypatch.setattr(tar_index, "read_samples", lambda path: pytest.fail("all headers read"))
    again = open_samples(str(path))
    assert described(again) == described(first)
    assert (again.broken, first.key(2)) == (first.broken, "set/c")
    monkeypatch.setattr(tar_index, "read_samples", read)
    write_tar(path, names="efgh")
    assert open_samples(str(path)).key(2) == "set/g"
    if writable:
        beside.write_bytes(beside.read_bytes()[:300])
        assert open_samples(str(path)).key(2) == "set/g"


def test_an_index_remembers_what_is_damaged(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    offsets = write_tar(path, names=["a", "b", "c", "d"])
    data = bytearray(path.read_bytes())
    data[offsets[1] + 148 : offsets[1] + 156] = b"garbage!"
    path.write_bytes(data)
    monkeypatch.setattr(tar_index, "WORTH_KEEPING", 1)
    (problem,) = open_samples(str(path)).broken
    assert problem == f"{path}: damaged header at byte {offsets[1]}"
    assert open_samples(str(path)).broken == (problem,)


def test_a_sample_takes_little_memory(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for k in range(3000):
            name = f"fmow-{k // 3:06d}.{('input.npy', 'output.cls', 'metadata.json')[k % 3]}"
            archive.addfile(tarfile.TarInfo(name))
    samples = open_samples(str(tmp_path / "a.tar"))
    held = sum(getattr(samples, name).nbytes for name in samples.FIELDS)
    assert len(samples) == 1000 and held < 120 * len(samples)
