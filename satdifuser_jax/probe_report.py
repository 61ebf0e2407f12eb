"""What a finished probe leaves to look at: figures in the workdir, of some test images."""

from __future__ import annotations

import copy
from pathlib import Path

import jax
import numpy as np

from common_jax.sharding import make_mesh
from satdifuser_jax import figures
from satdifuser_jax.cache import Subset, spread_rows
from satdifuser_jax.preprocess import resize, to_unit

SHOWN = 8


def write_report(task, params, state, workdir: str) -> list[Path]:
    """Draw confusion counts, fusion weights and predictions of a ProbeTask; returns the files.

    Of several processes one may call it: then it computes on a device of its own.
    """
    if jax.process_count() > 1:
        task = copy.copy(task)
        task.mesh = make_mesh(devices=jax.local_devices()[:1])
        task.maker = task.maker.on(task.mesh)
    folder = Path(workdir) / "figures"
    folder.mkdir(exist_ok=True)
    scales, times, spec = task.spec.scales, task.times, task.spec
    written = []
    if "test" in task.counts and spec.task != "multi_label_classification":
        classes = task.sources["test"].classes
        written.append(
            figures.save_confusion(task.counts["test"], classes, folder / "confusion.png")
        )
    batch, images = spread_examples(task, SHOWN)
    phase = "dense" if spec.fuser == "moe" else None
    (logits, aux), _ = jax.jit(task.apply, static_argnums=3)(
        params, state, task.encode(batch), phase
    )
    aux = jax.tree.map(np.asarray, aux)
    if "mixing" in aux:
        written.append(
            figures.save_mixing(aux["mixing"], scales, times, folder / "mixing_weights.png")
        )
    if "gates" in aux:
        written.append(
            figures.save_gate_maps(images, aux["gates"], scales, times, folder / "gates.png")
        )
    if "use" in aux:
        path = folder / "expert_use.png"
        written.append(figures.save_expert_use(aux["use"], path, scales=scales, times=times))
    if spec.segments:
        labels = np.asarray(batch["label"]).astype(int)
        predictions = np.asarray(logits).argmax(-1)
        pictures = np.stack([fit_picture(image, labels.shape[1]) for image in images])
        classes = task.sources["test"].classes
        written.append(
            figures.save_overlays(
                pictures,
                labels,
                predictions,
                classes,
                folder / "predictions.png",
                ignore_index=spec.ignore_index,
            )
        )
    return written


def spread_examples(task, count: int, split: str = "test"):
    """(batch as the loop would make it, pictures uint8 [n,S,S,3]) of examples from the whole split.

    Splits are often sorted by class: the first examples would all look alike.
    """
    cached, source = task.cached[split], task.sources[split]
    rows = spread_rows(len(cached), count)
    batch = next(iter(task.batches(Subset(cached, rows), task.transforms(split))))
    rows = rows[: int(np.asarray(batch["mask"]).sum())]  # a batch may be smaller than `count`
    batch = {k: v[: len(rows)] for k, v in batch.items() if v.dtype.kind in "biufV"}
    batch["index"] = rows.astype(batch["index"].dtype)
    images = [fit_picture(source[int(i)]["image"], task.side) for i in rows]
    return batch, np.stack(images)


def fit_picture(image, side: int) -> np.ndarray:
    """uint8 [side, side, 3] for a figure."""
    return np.rint(255 * np.clip(resize(to_unit(image), side, side), 0, 1)).astype(np.uint8)
