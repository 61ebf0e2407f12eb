"""Pictures with captions and metadata: what an example holds, faults, order of batches."""

from __future__ import annotations

import csv
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common_jax.train_loop import Pipeline, train
from configs.satdifuser_pretrain import get_config
from data.images import ImageError
from data.pipeline import eval_batches, train_batches
from data.prepare import main
from data.satellite import SatelliteSource, open_satellite
from data.satellite_sample import Sample
from data.transforms import normalise_metadata
from data.wording import DrawCaption
from satdifuser_jax.pretrain import PretrainTask
from tests.tar_samples import fmow, satlas, spacenet, write_tar

HEADER = ["path", "caption", "longitude", "latitude", "gsd", "cloud_cover", "date"]


def draw(path, value: int, size=(12, 9)):
    """A picture of one colour; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 2 * value, 255 - value)).save(path)


@pytest.fixture
def table(tmp_path):
    """Ten pictures and their CSV file; the third has no metadata but its longitude."""
    rows = []
    for k in range(10):
        draw(tmp_path / f"{k}.png", 10 * k)
        rows.append([f"{k}.png", f"field {k}", k, -k, 0.5, 0.25, "2019-08-31"])
    rows[2] = ["2.png", "", 2, "", "", "", ""]
    path = tmp_path / "pictures.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    return path


def test_an_example_holds_image_caption_metadata_and_id(table):
    source = open_satellite("train", root=str(table), holdout=0.2, side=18)
    assert len(source) == 8 and len(open_satellite("val", root=str(table), holdout=0.2)) == 2
    example = source[3]
    assert example["image"].shape == (9, 12, 3) and example["image"].dtype == np.uint8
    assert example["image"][0, 0].tolist() == [30, 60, 225]
    assert example["caption"] == "field 3" and example["id"] == "3.png"
    wanted = normalise_metadata(
        longitude=3, latitude=-3, gsd=0.5 * 9 / 18, cloud_cover=0.25, year=2019, month=8, day=31
    )
    np.testing.assert_array_equal(example["metadata"], wanted)
    assert example["metadata"].dtype == np.float32 and source.native_side == 9


def test_what_is_not_known_is_zero_after_normalisation(table):
    example = open_satellite("train", root=str(table))[2]
    np.testing.assert_allclose(example["metadata"], [182 / 360 * 1000, 0, 0, 0, 0, 0, 0], rtol=1e-6)
    assert example["caption"] == "a satellite image"


def test_a_broken_picture_stops_the_run_or_is_counted_and_its_neighbour_taken(table, tmp_path):
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:40])
    (tmp_path / "5.png").unlink()
    with pytest.raises(ImageError, match="4.png: cannot be read"):
        open_satellite("train", root=str(table), holdout=0.0)[4]
    with pytest.raises(ImageError, match="line 7: .*No such file"):
        open_satellite("train", root=str(table), holdout=0.0)[5]
    source = open_satellite("train", root=str(table), holdout=0.0, on_corrupt="skip")
    assert [source[i]["id"] for i in (3, 4, 5, 4, 6)] == [f"{k}.png" for k in (3, 6, 6, 6, 6)]
    assert (source.counts["skipped"], source.counts["bad"], source.counts["read"]) == (2, 3, 5)


def test_a_changed_picture_or_table_is_another_set(table):
    def fingerprint():
        return open_satellite("train", root=str(table), holdout=0.0).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    picture = table.parent / "3.png"
    os.utime(picture, ns=(0, 10**18))
    second = fingerprint()
    table.write_text(table.read_text().replace("field 7", "house 7"))
    assert len({first, second, fingerprint()}) == 3


class Spoilt:
    """A reader of 40 samples; `bad` of them, spread evenly, cannot be used."""

    name, fingerprint, problems = "spoilt", "spoilt", ()

    def __init__(self, bad: int):
        self.bad = {k * 40 // bad for k in range(bad)}

    def __len__(self):
        return 40

    def sample(self, i):
        if i in self.bad:
            raise ImageError(f"{i} is spoilt")
        return Sample(str(i), np.zeros((8, 8, 3), np.uint8))


def test_skipping_tells_the_running_count_and_ends_when_too_many_are_bad(caplog):
    source = SatelliteSource(Spoilt(3), range(40), on_corrupt="skip")
    for i in range(1200):
        source[i % 40]
    assert [r.message for r in caplog.records] == [
        "spoilt: 1 picture is skipped, the next taken in place; now 0 is spoilt"
    ]
    source = SatelliteSource(Spoilt(16), range(40), on_corrupt="skip")
    for i in range(999):
        source[i % 40]
    assert "spoilt: 10 pictures are skipped" in caplog.records[-1].message
    with pytest.raises(ImageError, match="40[0-9] of 10[0-9][0-9] pictures read .* more than 10%"):
        for i in range(40):
            source[i]


def test_errors_of_the_system_are_not_skipped(table, monkeypatch):
    source = open_satellite("train", root=str(table), holdout=0.0, on_corrupt="skip")

    def full(path):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(Path, "read_bytes", full)
    with pytest.raises(OSError, match="Too many open files"):
        source[0]


def test_a_folder_is_read_without_captions_of_its_own(tmp_path):
    for k in range(4):
        draw(tmp_path / "forest" / f"{k}.jpg", 20 * k)
    source = open_satellite("train", root=str(tmp_path), holdout=0.0, exclude=["2.jpg"])
    assert [e["caption"] for e in map(source.__getitem__, range(3))] == ["a satellite image"] * 3
    assert not source[0]["metadata"].any()


class Recorder:
    """A reader that remembers which samples were asked for."""

    def __init__(self, reader):
        self.reader, self.asked = reader, []
        self.name, self.fingerprint, self.problems = reader.name, reader.fingerprint, ()

    def __len__(self):
        return len(self.reader)

    def sample(self, i):
        self.asked.append(i)
        return self.reader.sample(i)


def test_two_processes_read_disjoint_shares(table):
    shares = []
    for host in range(2):
        reader = Recorder(open_satellite("train", root=str(table), holdout=0.0).reader)
        source = SatelliteSource(reader, range(8))
        batches = list(eval_batches(source, batch_size=4, host=host, num_hosts=2))
        assert [len(batch["id"]) for batch in batches] == [2, 2]
        shares.append(sorted(reader.asked))
    assert shares == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_batches_of_two_processes_are_those_of_one(table):
    source = open_satellite("train", root=str(table), holdout=0.0)
    options = {"batch_size": 4, "seed": 1, "step": 3}
    whole = next(train_batches(source, (DrawCaption(),), **options))
    parts = [next(train_batches(source, (), **options, host=h, num_hosts=2)) for h in range(2)]
    for key in ("image", "metadata", "index"):
        np.testing.assert_array_equal(whole[key], np.concatenate([p[key] for p in parts]))


class Scales:
    """A network of one number, which compiles at once."""

    def apply(self, variables, x, t, context, metadata):
        return x * variables["params"]["scale"] + 1e-4 * metadata.mean(), {}


class Small(PretrainTask):
    """All of pretraining but its network."""

    def init(self, seed):
        self.unet = Scales()
        return {"scale": np.float32([1.0])}, {}

    def flops(self):
        return {"train": 1.0}

    def report(self, params, state, results, workdir):
        pass


def test_tars_and_a_prepared_folder_are_pretrained_on(tmp_path):
    """One run that sees every picture of both."""
    write_tar(tmp_path / "tars" / "a.tar", fmow(1) | spacenet() | satlas())
    for k in range(5):
        draw(tmp_path / "in" / f"{k}.png", 40 * k)
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--workers=0"]) == 0
    config = get_config("tiny")
    with config.unlocked():
        config.data.name, config.data.train = "satellite", f"{tmp_path}/tars,{tmp_path}/out"
        config.data.holdout, config.data.smallest_crop, config.data.side = 0.25, 8, 16
        config.batch_size, config.optim.steps, config.eval.samples = 4, 2, 0
    run = tmp_path / "run"
    assert train(Small(config), config, str(run), Pipeline(train_batches, eval_batches)) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(found) == 2 and np.isfinite(found).all()
