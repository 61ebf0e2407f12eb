"""Prepared folders: what the manifest promises is there, nothing else, and whole."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from data import shards
from data.packing import pack
from data.shards import (
    FileNote,
    Manifest,
    PackedExamples,
    ShardError,
    read_manifest,
    read_packed,
    shard_name,
    split_folder,
    verify,
    write_manifest,
    write_shard,
)


@pytest.fixture
def folder(tmp_path):
    """Three shards of 3, 0 and 2 examples."""
    notes, number = [], 0
    for shard, count in enumerate((3, 0, 2)):
        records = [
            pack({"id": number + k}, {"picture": bytes([number + k]) * 50}) for k in range(count)
        ]
        notes.append(write_shard(tmp_path / shard_name(shard), records))
        number += count
    write_manifest(tmp_path, Manifest("satellite", "five", "source-1", tuple(notes)))
    return tmp_path


def test_examples_are_read_in_any_order_also_by_another_process(folder):
    for source in (
        examples := PackedExamples(folder, "satellite"),
        pickle.loads(pickle.dumps(examples)),
    ):
        assert len(source) == 5
        for i in (4, 0, 3, 2, 1):
            header, parts = source[i]
            assert header == {"id": i} and parts == {"picture": bytes([i]) * 50}
    assert read_packed(str(folder / shard_name(2)), 1)[0] == {"id": 4}
    manifest = read_manifest(folder)
    assert manifest.count == 5 and [note.count for note in manifest.shards] == [3, 0, 2]


def test_a_shard_missing_from_the_manifest_is_refused(folder):
    write_shard(folder / shard_name(7), [pack({"id": 9}, {})])
    with pytest.raises(ShardError, match="00007.array_record not in manifest.json"):
        PackedExamples(folder, "satellite")


def test_a_shard_missing_from_the_disk_is_refused(folder):
    (folder / shard_name(2)).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 files .* are absent: 00002.array_record"):
        PackedExamples(folder, "satellite")


def test_a_cut_shard_is_refused(folder):
    content = (folder / shard_name(0)).read_bytes()
    (folder / shard_name(0)).write_bytes(content[:-100])
    with pytest.raises(ShardError, match="other sizes than in manifest.json: 00000.array_record"):
        read_manifest(folder)


def test_changed_bytes_are_found_by_verification_and_never_given_out(folder):
    path = folder / shard_name(0)
    assert verify(folder) == []
    content = bytearray(path.read_bytes())
    at = content.index(bytes([1]) * 50)
    content[at + 3] ^= 0xFF
    path.write_bytes(content)
    assert verify(folder) == [f"{path}: another sha256 than in manifest.json"]
    with pytest.raises(ShardError, match="record 1: damaged"):
        PackedExamples(folder, "satellite")[1]
    with pytest.raises(ShardError, match="record 1"):
        read_packed(str(path), 1)


def one_each(folder, count):
    """A set of `count` shards of one example."""
    notes = [
        write_shard(folder / shard_name(k), [pack({"id": k}, {"picture": bytes([k])})])
        for k in range(count)
    ]
    write_manifest(folder, Manifest("satellite", "many", "source-1", tuple(notes)))
    return PackedExamples(folder, "satellite")


def test_shards_are_closed_again_when_many_are_read(tmp_path, monkeypatch):
    source = one_each(tmp_path, 12)
    monkeypatch.setattr(shards, "OPEN_SHARDS", 3)
    shards._open_shards.cache_clear()
    before = len(os.listdir("/proc/self/fd"))
    for i in (*range(12), 0, 11, 5):
        assert source[i][0] == {"id": i}
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    shards._open_shards.cache_clear()


SCARCE = """
import resource, sys
from data.satellite import PreparedReader
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
reader = PreparedReader(sys.argv[1])
assert [reader.examples[i][0]["id"] for i in range(len(reader))] == list(range(50))
"""


def test_more_shards_than_files_may_be_open_are_read_right(tmp_path):
    one_each(tmp_path, 50)
    command = [sys.executable, "-c", SCARCE, str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)


def test_what_the_system_refuses_is_no_damage(tmp_path):
    """And so never skipped; when the system answers again, reading goes on."""
    source = one_each(tmp_path, 2)
    (tmp_path / shard_name(1)).rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(OSError, match="00001.array_record: the system cannot .*No such file"):
            source[1]
    (tmp_path / "away").rename(tmp_path / shard_name(1))
    assert source[1][0] == {"id": 1}


def test_a_wrong_count_is_found_by_verification(folder):
    content = json.loads((folder / "manifest.json").read_text())
    content["files"][0]["count"] = 4
    (folder / "manifest.json").write_text(json.dumps(content))
    assert "3 records, manifest.json says 4" in verify(folder)[0]


def test_folders_of_another_kind_or_without_manifest_are_refused(folder, tmp_path):
    with pytest.raises(ShardError, match="holds satellite, but records are needed"):
        read_manifest(folder, "records")
    with pytest.raises(FileNotFoundError, match="manifest.json is absent"):
        read_manifest(tmp_path / "none")
    (folder / "manifest.json").write_text('{"format": 0}')
    with pytest.raises(ShardError, match="not format 1"):
        read_manifest(folder)


def test_a_split_has_a_folder_of_its_own_or_shares_one(folder, tmp_path):
    assert split_folder(folder, "train") == folder
    note = write_shard(folder / "val" / shard_name(0), [pack({"id": 0}, {})])
    write_manifest(folder / "val", Manifest("satellite", "v", "s", (note,)))
    assert split_folder(folder, "val") == folder / "val"
    with pytest.raises(FileNotFoundError, match="neither"):
        split_folder(tmp_path / "none", "train")


def test_the_fingerprint_is_of_the_content():
    def of(digest):
        return Manifest("satellite", "x", "s", (FileNote("a", 1, 1, digest),)).fingerprint

    assert of("1") == of("1") != of("2")
