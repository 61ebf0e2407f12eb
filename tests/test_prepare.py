"""data.prepare: every form in, the same examples out; stopped and resumed; broken ones counted."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import children, wait_until_gone

from common_jax.files import sha256_file
from data import prepare as prepare_module
from data.prepare import main, options_of
from data.record_catalog import open_records
from data.satellite import open_satellite
from data.shards import read_manifest
from tests.record_sets import draw, write_lines
from tests.tar_samples import fmow, jpeg, satlas, spacenet, write_tar

QUIET = ["--workers=0"]
WRITE_ONE = prepare_module.write_one
ROOT = Path(__file__).parent.parent


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_of_pictures_becomes_shards_with_captions_of_its_folders(tmp_path):
    for k in range(5):
        draw(tmp_path / "in" / "dense_forest" / f"{k}.jpg", seed=k)
    out = tmp_path / "out"
    assert main([str(tmp_path / "in"), str(out), "--per-shard=2", "--described", *QUIET]) == 0
    assert files(out) == [f"0000{k}.array_record" for k in range(3)] + ["manifest.json"]
    source = open_satellite("train", root=str(out), holdout=0.0)
    assert [source[i]["id"] for i in range(5)] == [f"dense_forest/{k}.jpg" for k in range(5)]
    assert source[0]["caption"] == "a satellite image of a dense forest"
    np.testing.assert_array_equal(
        source[3]["image"], np.asarray(Image.open(tmp_path / "in/dense_forest/3.jpg"))
    )


def test_prepared_splits_are_found_and_a_missing_validation_part_is_cut_off(tmp_path):
    for name, count in (("train", 4), ("val", 2)):
        for k in range(count):
            draw(tmp_path / name / f"{name}{k}.png", seed=k)

    def ids(split):
        source = open_satellite(split, root=str(tmp_path / "out"), holdout=0.25)
        return [source[i]["id"] for i in range(len(source))]

    assert main([str(tmp_path / "train"), str(tmp_path / "out" / "train"), *QUIET]) == 0
    assert ids("train") == ["train0.png", "train1.png", "train2.png"]
    assert ids("val") == ["train3.png"]
    assert main([str(tmp_path / "val"), str(tmp_path / "out" / "val"), *QUIET]) == 0
    assert len(ids("train")) == 4 and ids("val") == ["val0.png", "val1.png"]
    shutil.rmtree(tmp_path / "out" / "train")
    with pytest.raises(FileNotFoundError, match="neither .*train"):
        ids("train")


def test_tars_give_the_same_examples_prepared_and_as_they_are(tmp_path):
    write_tar(
        tmp_path / "in" / "a.tar", fmow(1) | fmow(2) | spacenet() | satlas() | {"b.jpg": jpeg()}
    )
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), *QUIET]) == 0
    options = {"holdout": 0.0, "side": 4}
    before = open_satellite("train", root=str(tmp_path / "in"), **options)
    after = open_satellite("train", root=str(tmp_path / "out"), **options)
    assert len(before) == len(after) == 5
    for i in range(5):
        one, other = before[i], after[i]
        assert (one["caption"], one["wording"], one["id"]) == (
            other["caption"],
            other["wording"],
            other["id"],
        )
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["metadata"], other["metadata"])


def test_a_csv_file_is_prepared_without_what_is_excluded(tmp_path):
    for k in range(3):
        draw(tmp_path / f"{k}.png", seed=k)
    (tmp_path / "in.csv").write_text("path,caption,gsd\n0.png,a,1\n1.png,b,2\n2.png,c,3\n")
    (tmp_path / "no.json").write_text('["1.png"]')
    arguments = [
        str(tmp_path / "in.csv"),
        str(tmp_path / "out"),
        f"--exclude={tmp_path / 'no.json'}",
    ]
    assert main([*arguments, *QUIET]) == 0
    source = open_satellite("train", root=str(tmp_path / "out"), holdout=0.0)
    assert [source[i]["caption"] for i in range(2)] == ["a", "c"]
    with pytest.raises(ValueError, match="cannot leave out pictures after the fact"):
        open_satellite("train", root=str(tmp_path / "out"), exclude=["0.png"])


@pytest.fixture
def talk(tmp_path):
    """Four records of three pictures, and one of text alone."""
    for k in range(3):
        draw(tmp_path / "in" / f"{k}.png", seed=k)
    rows = [
        {"image": "0.png", "task": "caption", "answers": ["a field", "fields"]},
        {"image": "1.png", "task": "grounding", "question": "it", "box": [1, 2, 9, 8]},
        {"image": "1.png", "task": "vqa", "question": "what?", "answer": "water"},
        {"image": "2.png", "task": "caption", "answer": "a road"},
    ]
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    return write_lines(tmp_path / "in" / "set.jsonl", [*rows, {"conversations": turns}])


def test_records_keep_their_texts_and_share_their_pictures(talk, tmp_path):
    out = tmp_path / "out"
    arguments = ["records:jsonl", str(out), f"--root={talk}", "--per-shard=2", *QUIET]
    assert main(arguments) == 0
    assert read_manifest(out).count == 3 and "records.jsonl" in files(out)
    before, after = (
        open_records("jsonl", "", root=talk),
        open_records("prepared", "train", root=out),
    )
    assert len(after) == 5 and after.name == before.name
    for i in range(4):
        one, other = before[i], after[i]
        np.testing.assert_array_equal(one["image"], other["image"])
        for name in ("id", "task", "question", "answers", "boxes", "size", "conversations"):
            assert getattr(one["record"], name) == getattr(other["record"], name)
    assert after.records[1].image == after.records[2].image and after[4]["image"] is None


def test_records_move_with_their_folder_and_lose_broken_pictures_alone(talk, tmp_path):
    (talk.parent / "0.png").write_bytes(b"broken")
    arguments = ["records:jsonl", str(tmp_path / "out"), f"--root={talk}", "--on-corrupt=skip"]
    assert main([*arguments, "--option=pictures=trust", *QUIET]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.skipped == 1 and "0.png: cannot be read" in manifest.problems[0]
    other = [a.replace("/out", "/other") for a in arguments]
    assert main([*other, *QUIET]) == 0  # found on opening
    manifest = read_manifest(tmp_path / "other")
    assert manifest.skipped == 1 and "0.png: cannot be read" in manifest.problems[0]
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    source = open_records("prepared", "train", root=str(moved))
    assert [r.task for r in source.records] == ["grounding", "vqa", "caption", "chat"]
    assert source[2]["image"].shape == (30, 40, 3)


def test_labelled_sets_are_prepared_by_split(tmp_path):
    arguments = ["examples:scenes", str(tmp_path), "--split=val", "--option=size=4", *QUIET]
    assert main([*arguments, "--option=side=32"]) == 0
    manifest = read_manifest(tmp_path, "examples")
    assert manifest.count == 4 and manifest.about["task"] == "classification"


def tar_with_a_broken_picture(folder: Path) -> str:
    members = {f"{k}.jpg": jpeg(20 * k) for k in range(6)}
    offsets = write_tar(folder / "a.tar", members)
    data = bytearray((folder / "a.tar").read_bytes())
    data[offsets["2.jpg"] + 512 : offsets["2.jpg"] + 700] = b"\xff" * 188
    (folder / "a.tar").write_bytes(data)
    return str(folder)


def test_a_broken_tar_member_stops_or_is_counted_and_left_out(tmp_path, capsys, monkeypatch):
    source = tar_with_a_broken_picture(tmp_path / "in")
    arguments = [source, str(tmp_path / "out"), "--per-shard=2", *QUIET]
    assert main(arguments) == 1
    assert "2: cannot be read as a picture" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()
    counting = Counting(monkeypatch)
    assert main([*arguments, "--on-corrupt=skip"]) == 0
    assert counting.numbers == [1, 2]  # what was written before the broken one is kept
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.count, manifest.skipped) == (5, 1) and len(manifest.problems) == 1
    ids = open_satellite("train", root=str(tmp_path / "out"), holdout=0.0)
    assert [ids[i]["id"] for i in range(5)] == ["0", "1", "3", "4", "5"]


def test_the_manifest_names_what_opening_left_out(tmp_path):
    """A lost header loses a text and a picture here, and is a third problem itself."""
    folder = Path(tar_with_a_broken_picture(tmp_path / "in"))
    members = {"8.jpg": jpeg(), "7.jpg": jpeg(), "7.txt": b"seven", "9.jpg": jpeg()}
    offsets = write_tar(folder / "b.tar", members)
    data = bytearray((folder / "b.tar").read_bytes())
    data[offsets["7.jpg"] : offsets["7.jpg"] + 512] = b"\xff" * 512
    (folder / "b.tar").write_bytes(data)
    assert main([str(folder), str(tmp_path / "out"), "--on-corrupt=skip", *QUIET]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.count, manifest.skipped) == (7, 3)
    for text in (
        f"damaged header at byte {offsets['7.jpg']}",
        "7 has no picture",
        "2: cannot be read",
    ):
        assert any(text in problem for problem in manifest.problems), text


def test_the_manifest_names_broken_and_equal_pictures_of_a_folder(tmp_path):
    for k in range(3):
        draw(tmp_path / "in" / f"{k}.png", seed=min(k, 1))
    (tmp_path / "in" / "3.png").write_bytes(b"broken")
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--on-corrupt=skip", *QUIET]
    assert main(arguments) == 0
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.count, manifest.skipped) == (2, 2)
    assert "3.png: cannot be read" in manifest.problems[0]
    assert "2.png: the same picture as" in manifest.problems[1]


class Counting:
    """Counts the shards that are written."""

    def __init__(self, monkeypatch, fail_at: int = -1):
        self.numbers, self.fail_at = [], fail_at
        monkeypatch.setattr(prepare_module, "write_one", self)

    def __call__(self, job, number):
        if number == self.fail_at:
            raise OSError("No space left on device")
        self.numbers.append(number)
        return WRITE_ONE(job, number)


def test_a_stopped_run_goes_on_where_it_was_and_gives_the_same_bytes(tmp_path, monkeypatch, capsys):
    for k in range(7):
        draw(tmp_path / "in" / f"{k}.png", seed=k)
    arguments = [str(tmp_path / "in"), "--per-shard=2", *QUIET]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    Counting(monkeypatch, fail_at=2)
    assert main([*arguments, str(tmp_path / "out")]) == 1
    assert "No space left" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no finished set"):
        read_manifest(tmp_path / "out")
    (tmp_path / "out" / "00001.array_record").write_bytes(b"spoilt since")
    (tmp_path / "out" / ".00002.array_record.x.partial").write_bytes(b"left by a kill")
    counting = Counting(monkeypatch)
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert counting.numbers == [1, 2, 3]
    assert read_manifest(tmp_path / "out") == read_manifest(tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert main([*arguments, str(tmp_path / "out")]) == 0 and counting.numbers == [1, 2, 3]


def test_other_options_write_anew_and_another_set_is_not_overwritten(tmp_path, monkeypatch, capsys):
    for k in range(3):
        draw(tmp_path / "in" / f"{k}.png", seed=k)
    out, source = str(tmp_path / "out"), str(tmp_path / "in")
    Counting(monkeypatch, fail_at=2)
    assert main([source, out, "--per-shard=1", *QUIET]) == 1
    counting = Counting(monkeypatch)
    assert main([source, out, "--per-shard=1", "--side=8", *QUIET]) == 0
    assert counting.numbers == [0, 1, 2]
    assert main([source, out, *QUIET]) == 1
    assert "holds another set" in capsys.readouterr().err


def test_parts_of_several_machines_are_one_set(tmp_path, capsys):
    for k in range(5):
        draw(tmp_path / "in" / f"{k}.png", seed=k)
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--per-shard=1", *QUIET]
    assert main([*arguments, "--part=2/2"]) == 0
    assert "3 shards of other parts are missing" in capsys.readouterr().err
    assert main([*arguments, "--part=1/2"]) == 0
    assert read_manifest(tmp_path / "out").count == 5


def test_a_part_reads_its_own_shards_again_and_the_last_one_all(tmp_path, monkeypatch, capsys):
    for k in range(5):
        draw(tmp_path / "in" / f"{k}.png", seed=k)
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--per-shard=1", *QUIET]
    read = []

    def hashed(path):
        read.append(Path(path).name[4])
        return sha256_file(path)

    monkeypatch.setattr(prepare_module, "sha256_file", hashed)
    assert main([*arguments, "--part=1/3"]) == 0 and main([*arguments, "--part=2/3"]) == 0
    assert not read
    assert main([*arguments, "--part=2/3"]) == 0 and sorted(read) == ["1", "4"]
    spoilt = tmp_path / "out" / "00004.array_record"
    content = spoilt.read_bytes()
    spoilt.write_bytes(content[:-1] + b"x")
    read.clear()
    assert main([*arguments, "--part=3/3"]) == 1 and sorted(read) == ["0", "1", "3", "4"]
    assert "00004.array_record changed since other parts" in capsys.readouterr().err
    assert main([*arguments, "--part=2/3"]) == 0  # writes it anew, and ends last
    assert read_manifest(tmp_path / "out").count == 5 and spoilt.read_bytes() == content


def test_verification_reads_everything(tmp_path, capsys):
    draw(tmp_path / "in" / "0.png")
    out = tmp_path / "out"
    assert main([str(tmp_path / "in"), str(out), *QUIET]) == 0
    assert main([str(out), "--verify"]) == 0
    path = out / "00000.array_record"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main([str(out), "--verify"]) == 1
    assert "another sha256" in capsys.readouterr().err


def test_a_killed_run_with_a_worker_process_is_resumed(tmp_path):
    for k in range(40):
        draw(tmp_path / "in" / f"{k}.png", size=(200, 150), seed=k)
    out = tmp_path / "out"
    arguments = [str(tmp_path / "in"), str(out), "--per-shard=1"]
    command = [sys.executable, "-m", "data.prepare", *arguments, "--workers=1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)
    limit = time.monotonic() + 300
    while not list(out.glob("*.json")) and time.monotonic() < limit:
        time.sleep(0.01)
    workers = children(process.pid)
    process.kill()
    process.wait()
    wait_until_gone(workers)
    written = len(list(out.glob("*.json")))
    assert 0 < written < 40 and not (out / "manifest.json").exists()
    assert main([*arguments, *QUIET]) == 0 and main([str(out), "--verify"]) == 0
    assert read_manifest(out).count == 40 and len(files(out)) == 41


def test_options_are_json_or_text():
    assert options_of(["size=4", "form=task", 'parts=["VQA"]', "binned=false"]) == {
        "size": 4, "form": "task", "parts": ["VQA"], "binned": False}  # fmt: skip
    with pytest.raises(ValueError, match="KEY=VALUE"):
        options_of(["size"])


def test_wrong_arguments_say_what_to_do(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "name the folder to write" in capsys.readouterr().err
    assert main(["records:jsonl", str(tmp_path / "out"), "--root=x", "--side=9"]) == 1
    assert "would move the boxes" in capsys.readouterr().err
