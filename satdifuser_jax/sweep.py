"""Where the information is: a linear probe on every tap alone, at every kept time alone.

The frozen features are read once. Classification pools each tap to the mean and deviation of its
channels; segmentation reads the channels at a sample of labelled pixels (bilinearly, as a map of
logits is enlarged). Standardised by the training rows, each group of columns is given to a
regularised logistic regression whose strength is chosen on validation.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from common_jax.charts import save_bars
from common_jax.files import write_atomic, write_json
from common_jax.logistic import decide, fit_path, standardiser
from common_jax.metric_log import say
from common_jax.metrics import count_confusion, count_multilabel, score
from common_jax.progress import Progress
from common_jax.report import format_markdown_table
from common_jax.sharding import check_batch, open_mesh, put_batch
from common_jax.workdir import check_config
from satdifuser_jax.cache import require_space
from satdifuser_jax.figures import name_tap, save_sweep
from satdifuser_jax.linear_probe import pool_taps

AXES = ("timesteps", "taps")
SPLITS = ("train", "val", "test")
MAX_PIXELS = 8192  # labelled pixels of a split that a segmentation sweep looks at
ALL_TIMES, ALL_TAPS = "all times", "all taps"


class Rows(NamedTuple):
    """x float32 [N, T, D] on disk, targets int [N] or multi-hot [N, K]."""

    x: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Cell:
    """One probe: which times (indices) and columns it sees, and what they are called."""

    time: str
    tap: str
    times: tuple[int, ...]
    columns: np.ndarray


def sweep_taps(task, workdir: str | os.PathLike, axes: Sequence[str], batches: Callable) -> int:
    """Write sweep.md, sweep.json and sweep.png into a workdir, which may be a new folder.

    axes: "timesteps", "taps" or both; what is not named is joined. batches: data.pipeline
    .eval_batches. Prints the table; returns the exit status 0.
    """
    wrong = [axis for axis in axes if axis not in AXES]
    if wrong or not axes:
        raise ValueError(f"sweep={','.join(axes)}: name timesteps, taps or both")
    if jax.process_count() > 1:
        raise ValueError("a sweep runs in one process")
    folder, config = Path(workdir).expanduser(), task.config
    if (folder / "config.json").exists():
        check_config(folder, config, ("optim.", "batch_size"))
    folder.mkdir(parents=True, exist_ok=True)
    mesh = open_mesh(config.mesh)
    check_batch(config.eval.batch_size or config.batch_size, mesh)
    task.prepare(mesh, batches)
    cells = make_cells(task.spec, task.times, axes)
    rows = {split: read_rows(task, split) for split in SPLITS}
    found = run_probes(cells, rows, task.spec, task.selection)
    sizes = {split: len(part.targets) for split, part in rows.items()}
    write_results(task, folder, found, axes, sizes)
    return 0


# ------------------------------------------------------------------------------------------ rows
def read_rows(task, split: str) -> Rows:
    """One pass over a split; the rows lie in an unnamed file beside the caches until the end."""
    spec, source = task.spec, task.cached[split]
    pixels = int(np.clip(MAX_PIXELS // len(source), 1, 256)) if spec.segments else 1
    columns = _pooled_width(spec)
    directory = Path(task.config.data.cache_dir)
    directory.mkdir(parents=True, exist_ok=True)
    needed = 4 * len(source) * pixels * spec.num_keys * columns
    require_space(directory, f"{split} rows of the sweep", needed, "fewer taps, fewer images")
    targets: list[np.ndarray] = []
    with tempfile.TemporaryFile(dir=directory) as file:
        for values, labels in _iterate_rows(task, split, pixels):
            values.tofile(file)
            targets.append(labels)
        found = np.concatenate(targets)
        if not len(found):
            raise ValueError(f"the {split} split has no labelled pixel: nothing to probe")
        file.flush()
        shape = (len(found), spec.num_keys, columns)
        return Rows(np.memmap(file, np.float32, mode="r", shape=shape), found)


def _iterate_rows(task, split: str, pixels: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(features float32 [n, T, D], targets [n]) of each batch of a split."""
    spec, source = task.spec, task.cached[split]
    progress = Progress(f"{split} features", len(source))
    for batch in task.batches(source, task.transforms("val")):
        features = task.encode(put_batch(batch, task.mesh))["features"]
        mask = np.asarray(batch["mask"], bool)
        if spec.segments:
            places, labels = choose_pixels(batch, pixels, spec.ignore_index, task.config.seed)
            values, keep = read_pixels(features, places), mask[:, None] & (labels >= 0)
        else:
            values, labels, keep = pool_taps_once(features), batch["label"], mask
        yield np.asarray(values, np.float32)[keep], np.asarray(labels)[keep]
        progress.add(int(mask.sum()))


pool_taps_once = jax.jit(pool_taps)


@jax.jit
def read_pixels(features, places):
    """Features [B,T,H,W,C] per scale at places [B,P,2] (y, x in 0..1) -> [B,P,T,sum of C].

    Bilinear between the centres of the features' pixels, constant beyond the outermost ones.
    """
    parts = []
    for x in features:
        size = jnp.asarray(x.shape[2:4], jnp.float32)
        where = jnp.clip(places * size - 0.5, 0, size - 1)
        low = jnp.floor(where).astype(jnp.int32)
        high = jnp.minimum(low + 1, jnp.asarray(x.shape[2:4]) - 1)
        share = where - low
        total = 0.0
        for corner_y, weight_y in ((low[..., 0], 1 - share[..., 0]), (high[..., 0], share[..., 0])):
            for corner_x, weight_x in (
                (low[..., 1], 1 - share[..., 1]),
                (high[..., 1], share[..., 1]),
            ):
                picked = jax.vmap(lambda f, y, x: f[:, y, x])(x, corner_y, corner_x)
                weight = (weight_y * weight_x)[:, None, :, None]
                total = total + weight * picked.astype(jnp.float32)
        parts.append(jnp.moveaxis(total, 1, 2))
    return jnp.concatenate(parts, -1)


def choose_pixels(batch, count: int, ignore_index: int, seed: int):
    """(places [B,count,2] in 0..1, labels [B,count]) of labelled pixels, by (seed, image index).

    An image without a labelled pixel gets labels of -1.
    """
    maps = np.asarray(batch["label"])
    places = np.zeros((*maps.shape[:1], count, 2), np.float32)
    labels = np.full(places.shape[:2], -1, np.int64)
    for i, (label, index) in enumerate(zip(maps, batch["index"])):
        known = np.flatnonzero(label != ignore_index)
        if not len(known):
            continue
        rng = np.random.default_rng([seed, int(index)])
        chosen = rng.choice(known, count, replace=len(known) < count)
        y, x = np.divmod(chosen, label.shape[1])
        places[i] = np.stack([(y + 0.5) / label.shape[0], (x + 0.5) / label.shape[1]], -1)
        labels[i] = label.ravel()[chosen]
    return places, labels


# ---------------------------------------------------------------------------------------- probes
def make_cells(spec, times: Sequence[int], axes: Sequence[str]) -> list[Cell]:
    """The probes of a sweep: by time, then by tap in the order of the features."""
    taps = list(tap_columns(spec))
    every = np.concatenate([columns for _, columns in taps])
    if "taps" not in axes:
        taps = [(ALL_TAPS, np.sort(every))]
    if "timesteps" in axes:
        chosen = [(str(time), (i,)) for i, time in enumerate(times)]
    else:
        chosen = [(ALL_TIMES, tuple(range(len(times))))]
    return [Cell(time, tap, at, columns) for time, at in chosen for tap, columns in taps]


def tap_columns(spec) -> Iterator[tuple[str, np.ndarray]]:
    """(tap, its columns in a row of features) of every tap."""
    parts, start = (1 if spec.segments else 2), 0
    for scale in spec.scales:
        width, place = sum(scale.channels), start
        for tap, channels in zip(scale.taps, scale.channels):
            spans = [np.arange(channels) + place + part * width for part in range(parts)]
            yield tap, np.concatenate(spans)
            place += channels
        start += parts * width


def _pooled_width(spec) -> int:
    return sum(sum(scale.channels) for scale in spec.scales) * (1 if spec.segments else 2)


def run_probes(cells: Sequence[Cell], rows: dict[str, Rows], spec, metric: str) -> list[dict]:
    """`run_probe` of every cell, in order. One thread a probe: theirs are too small to share."""
    progress, found = Progress("probes", len(cells), unit="probes"), []
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(lambda cell: run_probe(cell, rows, spec, metric), cells):
            found.append(result)
            progress.add(1)
    return found


def run_probe(cell: Cell, rows: dict[str, Rows], spec, metric: str) -> dict:
    """Fit one cell for all strengths; returns scores at the strength that is best on validation."""
    parts = {split: _columns_of(part.x, cell) for split, part in rows.items()}
    scale = standardiser(parts["train"])
    parts = {split: scale(x) for split, x in parts.items()}

    def scores(split: str, weights) -> dict[str, float]:
        targets = rows[split].targets
        logits = decide(parts[split], weights)
        if targets.ndim == 2:
            return score(count_multilabel(logits > 0, targets), spec.task)
        return score(count_confusion(targets, logits.argmax(1), spec.num_classes), spec.task)

    path = fit_path(parts["train"], rows["train"].targets, spec.num_classes)
    # max() keeps the first of equals, which is the strongest regularisation.
    strength, weights = max(path, key=lambda item: scores("val", item[1])[metric])
    return {
        "time": cell.time,
        "tap": cell.tap,
        "strength": strength,
        **{split: scores(split, weights)[metric] for split in SPLITS},
        "test_scores": scores("test", weights),
    }


def _columns_of(x: np.ndarray, cell: Cell) -> np.ndarray:
    parts = [np.asarray(x[:, time][:, cell.columns]) for time in cell.times]
    return np.concatenate(parts, 1)


# --------------------------------------------------------------------------------------- results
def write_results(task, folder: Path, found: list[dict], axes, sizes: dict[str, int]) -> None:
    """Table, picture and numbers of a finished sweep; the table is printed too."""
    spec, metric = task.spec, task.selection
    best = max(found, key=lambda cell: cell["val"])
    times = list(dict.fromkeys(cell["time"] for cell in found))
    taps = list(dict.fromkeys(cell["tap"] for cell in found))
    table = np.array([cell["test"] for cell in found]).reshape(len(times), len(taps))
    about = {
        "task": spec.task,
        "metric": metric,
        "axes": list(axes),
        "rows": sizes,
        "weights": task.config.model.weights or "none: random",
    }
    write_json(folder / "sweep.json", about | {"best": best, "cells": found})
    text = format_sweep(about, best, table, times, taps)
    write_atomic(folder / "sweep.md", text.encode())
    print(text)
    label = f"test {metric}"
    if "taps" in axes:
        save_sweep(table, spec.scales, times, folder / "sweep.png", label)
    else:
        bars = [
            (f"t = {time}", float(value), None, None) for time, value in zip(times, table[:, 0])
        ]
        save_bars(bars, folder / "sweep.png", xlabel=label, title="all taps at one time")
    say(f"written: {folder}/sweep.md, sweep.json, sweep.png")


def format_sweep(about: dict, best: dict, table, times: list[str], taps: list[str]) -> str:
    """Markdown: what was done, the best cell, test scores of taps (rows) by times (columns)."""
    what = "labelled pixels" if about["task"] == "segmentation" else "images"
    sizes = ", ".join(f"{name} {count:,}" for name, count in about["rows"].items())
    rows = [
        {"tap": name_tap(tap), **{time: float(value) for time, value in zip(times, table[:, i])}}
        for i, tap in enumerate(taps)
    ]
    lines = [
        f"# Sweep over {' and '.join(about['axes'])}",
        "",
        f"Test {about['metric']} of a linear probe on each part of the features alone; strength of "
        f"the regularisation chosen on validation. Columns are timesteps. {what}: {sizes}. "
        f"Backbone weights: {about['weights']}.",
        "",
        f"Best on validation: {name_tap(best['tap'])} at {best['time']}, val {best['val']:.4f}, "
        f"test {best['test']:.4f}.",
        "",
        format_markdown_table(rows, ["tap", *((time, ".4f") for time in times)]),
        "",
    ]
    return "\n".join(lines)
