from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from small_probe import small_config

from common_jax.files import read_json
from common_jax.logistic import decide, fit_path, standardiser
from common_jax.workdir import WorkdirError, open_workdir
from data.pipeline import eval_batches
from satdifuser_jax.heads import HeadSpec
from satdifuser_jax.linear_probe import pool_taps
from satdifuser_jax.probe import ProbeTask
from satdifuser_jax.sweep import (
    ALL_TAPS,
    ALL_TIMES,
    Rows,
    choose_pixels,
    make_cells,
    read_pixels,
    run_probe,
    sweep_taps,
    tap_columns,
)
from satdifuser_jax.taps import Scale
from satdifuser_jax.upernet import resize_bilinear

SCALES = (Scale(8, ("a", "b"), (2, 3)), Scale(4, ("c",), (4,)))
TIMES = (21, 61)


def spec_of(task="classification", classes=3):
    side = 16 if task == "segmentation" else None
    return HeadSpec(task, "linear", classes, SCALES, len(TIMES), output_side=side)


def random_features(images=3, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(images, len(TIMES), s.side, s.side, sum(s.channels)) for s in SCALES]
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def test_columns_of_a_tap_are_its_means_and_deviations_alone():
    features = random_features()
    pooled, columns = np.asarray(pool_taps(features)), dict(tap_columns(spec_of()))
    assert list(columns) == ["a", "b", "c"]
    parts = {"a": features[0][..., :2], "b": features[0][..., 2:], "c": features[1]}
    for tap, maps in parts.items():
        expected = np.concatenate([maps.mean((2, 3)), maps.std((2, 3))], -1)
        np.testing.assert_allclose(pooled[..., columns[tap]], expected, atol=1e-5)
    assert sorted(np.concatenate(list(columns.values()))) == list(range(pooled.shape[-1]))


def test_pixels_are_read_where_a_map_would_be_enlarged():
    features, side = random_features(), 16
    y, x = np.divmod(np.arange(side**2), side)
    places = np.stack([(y + 0.5) / side, (x + 0.5) / side], -1).astype(np.float32)
    values = read_pixels(features, np.broadcast_to(places, (3, *places.shape)))
    columns, start = dict(tap_columns(spec_of("segmentation"))), 0
    for maps in features:
        channels = maps.shape[-1]
        enlarged = resize_bilinear(maps.reshape(-1, *maps.shape[2:]), (side, side))
        expected = enlarged.reshape(3, len(TIMES), side**2, channels).transpose(0, 2, 1, 3)
        np.testing.assert_allclose(values[..., start : start + channels], expected, atol=1e-5)
        start += channels
    assert columns["b"].tolist() == [2, 3, 4] and columns["c"].tolist() == [5, 6, 7, 8]


def test_chosen_pixels_are_labelled_ones_by_image_not_by_batch():
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 3, (4, 10, 12))
    maps[0, 2:] = -100  # 24 labelled pixels
    maps[1] = -100
    batch = {"label": maps, "index": np.array([5, 6, 7, 8])}
    places, labels = choose_pixels(batch, 30, -100, seed=1)
    assert (labels[1] == -1).all() and (labels[[0, 2, 3]] >= 0).all()
    y, x = (places * [10, 12]).astype(int).transpose(2, 0, 1)
    for i in (0, 2, 3):
        np.testing.assert_array_equal(labels[i], maps[i][y[i], x[i]])
    assert len(set(zip(y[2], x[2]))) == 30  # without replacement where there are enough
    again = choose_pixels({"label": maps[2:], "index": np.array([7, 8])}, 30, -100, seed=1)
    np.testing.assert_array_equal(again[1], labels[2:])
    assert (choose_pixels(batch, 30, -100, seed=2)[1][2:] != labels[2:]).any()


def test_cells_are_single_or_joined_as_asked():
    cells = make_cells(spec_of(), TIMES, ["timesteps", "taps"])
    assert [(c.time, c.tap) for c in cells[:4]] == [
        ("21", "a"), ("21", "b"), ("21", "c"), ("61", "a"),
    ]  # fmt: skip
    (taps, times) = (make_cells(spec_of(), TIMES, [axis]) for axis in ("taps", "timesteps"))
    assert [(c.time, c.tap, c.times) for c in taps][0] == (ALL_TIMES, "a", (0, 1))
    assert [(c.time, c.tap, c.times) for c in times] == [
        ("21", ALL_TAPS, (0,)), ("61", ALL_TAPS, (1,)),
    ]  # fmt: skip
    assert times[0].columns.tolist() == list(range(18))


def informative_rows(task, count, seed):
    """Rows in which tap b at time 61 alone tells the class, in units of a thousandth."""
    rng = np.random.default_rng(seed)
    columns = dict(tap_columns(spec_of(task)))
    x = rng.normal(size=(count, len(TIMES), sum(map(len, columns.values()))))
    labels = rng.integers(0, 3, count)
    x[:, 1, columns["b"][:3]] = np.eye(3)[labels] + 0.2 * rng.normal(size=(count, 3))
    x = (1e-3 * x).astype(np.float32)
    if task == "multi_label_classification":
        return Rows(x, np.eye(3, dtype=np.float32)[labels])
    return Rows(x, labels)


@pytest.mark.parametrize("task", ["classification", "multi_label_classification", "segmentation"])
def test_the_probe_that_sees_the_class_wins(task):
    sizes = {"train": 90, "val": 60, "test": 60}
    rows = {name: informative_rows(task, n, i) for i, (name, n) in enumerate(sizes.items())}
    metric = {"classification": "accuracy", "segmentation": "miou"}.get(task, "micro_f1")
    cells = make_cells(spec_of(task), TIMES, ["timesteps", "taps"])
    found = {(c.time, c.tap): run_probe(c, rows, spec_of(task), metric) for c in cells}
    scores = {place: result["test"] for place, result in found.items()}
    assert scores.pop(("61", "b")) > 0.9
    assert max(scores.values()) < 0.6


def test_the_strongest_of_the_strengths_that_are_best_on_validation_is_taken():
    rng = np.random.default_rng(0)
    rows = {}
    for split, flips in (("train", 0.4), ("val", 0.0), ("test", 0.0)):
        x = rng.normal(size=(40, 2, 18)).astype(np.float32)
        labels = np.where(rng.random(40) < flips, rng.integers(0, 3, 40), x[:, 0, :3].argmax(1))
        rows[split] = Rows(x, labels)
    cell = make_cells(spec_of(), TIMES, ["timesteps"])[0]
    found = run_probe(cell, rows, spec_of(), "accuracy")
    scale = standardiser(rows["train"].x[:, 0])
    path = fit_path(scale(rows["train"].x[:, 0]), rows["train"].targets, 3)
    scores = {
        split: [
            float((decide(scale(r.x[:, 0]), weights).argmax(1) == r.targets).mean())
            for _, weights in path
        ]
        for split, r in rows.items()
    }
    best = int(np.argmax(scores["val"]))  # the first of equals; the path begins with the strongest
    assert len(set(scores["val"])) > 0 and scores["val"][best] > scores["val"][-1]
    assert found["strength"] == path[best][0]
    assert [found[split] for split in rows] == [scores[split][best] for split in rows]


class Images:
    """Pictures that are features already: tap b at time 61 tells the class."""

    def __init__(self, count, seed):
        self.rows, self.seed = informative_rows("classification", count, seed), seed

    def __len__(self):
        return len(self.rows.targets)

    def __getitem__(self, i):
        rng = np.random.default_rng([self.seed, int(i)])
        fine, coarse = (rng.normal(size=(2, s.side, s.side, sum(s.channels))) for s in SCALES)
        fine[1, ..., 2:] += 3 * np.eye(3)[self.rows.targets[i]]
        label = np.int32(self.rows.targets[i])
        return {
            "fine": fine.astype(np.float32),
            "coarse": coarse.astype(np.float32),
            "label": label,
        }


class FeatureTask:
    """What a sweep needs of a ProbeTask, without a network."""

    spec, times, selection = spec_of(), TIMES, "accuracy"

    def __init__(self, config):
        self.config = config

    def prepare(self, mesh, batches):
        self.mesh = mesh
        self.batches = lambda *args: batches(*args, batch_size=self.config.batch_size)
        sizes = {"train": 61, "val": 30, "test": 30}
        self.cached = {name: Images(n, i) for i, (name, n) in enumerate(sizes.items())}

    def transforms(self, split):
        assert split != "train"  # augmentation is none of a sweep's
        return ()

    def encode(self, batch):
        return {"features": (batch["fine"], batch["coarse"])}


@pytest.fixture
def config(tmp_path):
    return small_config(**{"data.cache_dir": str(tmp_path / "cache"), "batch_size": 8})


def test_a_sweep_leaves_a_table_numbers_and_a_picture(config, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert sweep_taps(FeatureTask(config), workdir, ["timesteps", "taps"], eval_batches) == 0
    found = read_json(workdir / "sweep.json")
    assert (found["best"]["tap"], found["best"]["time"]) == ("b", "61")
    assert found["best"]["test"] > 0.9 and len(found["cells"]) == 6
    assert found["rows"] == {"train": 61, "val": 30, "test": 30}  # padding does not count
    text = (workdir / "sweep.md").read_text()
    assert "Best on validation: b at 61" in text and text in capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("| b "))
    cells = {(c["time"], c["tap"]): c["test"] for c in found["cells"]}
    assert f"{cells['21', 'b']:.4f}" in row and f"{cells['61', 'b']:.4f}" in row
    assert (workdir / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not any(p.is_file() for p in (tmp_path / "cache").rglob("*"))  # nothing is left behind


def test_a_sweep_over_one_axis_joins_the_other(config, tmp_path):
    for axis, count in (("timesteps", 2), ("taps", 3)):
        sweep_taps(FeatureTask(config), tmp_path / axis, [axis], eval_batches)
        assert len(read_json(tmp_path / axis / "sweep.json")["cells"]) == count
        assert (tmp_path / axis / "sweep.png").exists()


def test_unknown_axes_and_workdirs_of_other_runs_are_refused(config, tmp_path):
    for axes in (["timestep"], []):
        with pytest.raises(ValueError, match="name timesteps, taps or both"):
            sweep_taps(FeatureTask(config), tmp_path, axes, eval_batches)
    open_workdir(str(tmp_path), config, is_writer=True)
    other = small_config(**{"model.timesteps": (61,), "data.cache_dir": config.data.cache_dir})
    with pytest.raises(WorkdirError, match=r"model\.timesteps"):
        sweep_taps(FeatureTask(other), tmp_path, ["taps"], eval_batches)


@pytest.mark.slow
def test_a_probe_of_maps_is_swept_from_its_cache(tmp_path, capfd):
    changes = {"data.cache_dir": str(tmp_path / "cache"), "data.size": 8, "data.eval_size": 4}
    config = small_config("tiny,dataset=scenes_seg,fuser=gw", **changes)
    assert ProbeTask(config).sweep(str(tmp_path / "run"), ["taps"]) == 0
    found = read_json(tmp_path / "run" / "sweep.json")
    assert found["task"] == "segmentation" and found["metric"] == "miou"
    assert found["rows"] == {"train": 8 * 256, "val": 4 * 256, "test": 4 * 256}
    assert {cell["tap"].split(".")[0] for cell in found["cells"]} == {"up_blocks"}
    assert all(0 <= cell["test"] <= 1 for cell in found["cells"])
    assert "labelled pixels: train 2,048" in capfd.readouterr().out
