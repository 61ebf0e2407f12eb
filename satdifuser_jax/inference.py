"""A frozen backbone, and a head trained on it, applied to pictures of one's own.

`pictures` are data.folders.Pictures: `[i] -> {"image": [H,W,3]}`, `names` and `items` with sizes.
Each is stretched to the square that the backbone is given.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from common_jax.canvas import class_colours, save_sheet, swatch, tile_size
from common_jax.evaluate import restore_trained
from common_jax.files import atomic_path, read_json, write_atomic, write_json
from common_jax.metric_log import say
from common_jax.overlays import tint
from common_jax.progress import Progress
from common_jax.report import format_table
from common_jax.sharding import check_batch, count_ways, on_mesh, open_mesh, put_batch, replicated
from common_jax.weights import flatten
from common_jax.workdir import check_config
from satdifuser_jax.cache import Subset
from satdifuser_jax.feature_files import write_features
from satdifuser_jax.feature_source import ToProbeInput
from satdifuser_jax.features import describe, make_encoder
from satdifuser_jax.heads import head_shapes
from satdifuser_jax.preprocess import to_unit

LABELS = "labels.json"
SHOWN = 40  # lines of a printed table
TOP = 3  # classes of a line
# Settings that a prediction does not depend on, or that only say where things are.
MAY_DIFFER = (
    *(f"data.{name}" for name in ("train", "val", "test", "size", "eval_size", "label_fraction")),
    *(f"data.{name}" for name in ("augment", "fit", "on_corrupt", "cache", "scaling")),
    *(f"model.{name}" for name in ("weights", "prompt_cache", "head", "remat", "balance_weight")),
    *("optim.", "batch_size"),
)


@dataclasses.dataclass(frozen=True)
class Labels:
    """What a head speaks of: kind of task, class names, pixels of a side of its label maps."""

    task: str
    classes: tuple[str, ...]
    native_side: int


def remember_labels(workdir: str | os.PathLike, labels: Labels, model: str) -> None:
    """Write what `predict_pictures` needs beside the checkpoint. model: backbone fingerprint."""
    write_json(Path(workdir) / LABELS, dataclasses.asdict(labels) | {"backbone": model})


# --------------------------------------------------------------------------------------- features
def extract_pictures(
    task, pictures, batches: Callable, out: str | os.PathLike, file_format: str
) -> int:
    """Write the taps of each picture into `out` (feature_files.py); the same call goes on later.

    batches: data.pipeline.eval_batches. Returns the exit status 0.
    """
    config, extraction = task.config, task.extract_config
    mesh, batch_size = _local_mesh(config, len(pictures))
    maker = task.open_backbone(mesh)
    spec = describe(
        "taps",
        maker.backbone,
        extraction,
        model=maker.model,
        source=pictures.fingerprint,
        rows=len(pictures),
        side=task.side,
        dtype=config.data.cache_dtype,
        pool=config.model.pool,
    )
    encode = make_encoder(maker.backbone, extraction, spec, lambda batch: put_batch(batch, mesh))
    prepare = ToProbeInput(task.side, extraction.metadata == "record")

    def load(wanted):
        return batches(Subset(pictures, wanted), (prepare,), batch_size=batch_size)

    say(f"{len(pictures)} pictures, given to the backbone as {task.side} x {task.side} pixels")
    about = _describe_features(task)
    manifest = write_features(
        out, load, encode, spec, names=pictures.names, about=about, file_format=file_format
    )
    for field, scale in zip(spec.fields, about["scales"]):
        print(f"{field.name} {list(field.shape)} {field.dtype}: {len(scale['taps'])} taps")
    print(f"features of {len(pictures)} pictures in {manifest.parent} ({manifest.name} says more)")
    if not config.model.weights:
        print("THEY MEAN NOTHING: without --config.model.weights the network is a random one")
    return 0


def _describe_features(task) -> dict:
    """What a reader of the files wants to know beside shapes."""
    model = task.config.model
    scales = [
        {"side": scale.side, "taps": [list(pair) for pair in zip(scale.taps, scale.channels)]}
        for scale in task.extract_config.scales
    ]
    return {
        "weights": str(model.weights) or f"none: random, seed {task.config.seed}",
        "prompt": task.prompt,
        "times": list(task.times),
        "axes": ["time", "channel"] if model.pool != "none" else ["time", "y", "x", "channel"],
        "pool": model.pool,
        "scales": scales,
    }


# ------------------------------------------------------------------------------------- predictions
def predict_pictures(
    task, workdir: str | os.PathLike, pictures, batches: Callable, out: str | os.PathLike | None
) -> int:
    """Run the best head of a workdir on pictures and write into `out` (WORKDIR/predictions).

    predictions.jsonl: a line per picture with a value per class: probability, or share of the area
    for segmentation, which adds masks/ (class numbers, at the size of the picture), overlays/ and
    classes.json. Prints a table. The training data is not needed. Returns the exit status 0.
    """
    folder = check_config(workdir, task.config, MAY_DIFFER)
    known = _recall_labels(task, folder)
    mesh, batch_size = _local_mesh(task.config, len(pictures))
    maker = task.open_backbone(mesh)
    if known and known != maker.model:
        say("the backbone is not the one this head was trained on: expect worse predictions")
    trained = restore_trained(task, folder, mesh)
    _check_head(task.spec, trained.params, folder)
    say(f"head of {folder}/{trained.source}, {len(pictures)} pictures")
    out = Path(out or folder / "predictions")
    out.mkdir(parents=True, exist_ok=True)
    classes, segments = task.labels.classes, task.spec.segments
    writer = _MapWriter(out, pictures, classes) if segments else None
    lines, progress = [], Progress("predictions", len(pictures))
    prepare = ToProbeInput(task.side, task.extract_config.metadata == "record")
    loader = batches(pictures, (prepare,), batch_size=batch_size)
    for row, output in _predict_rows(task, trained, loader, mesh):
        if segments:
            writer.add(row, output)
            values = np.bincount(output.ravel(), minlength=len(classes)) / output.size
        else:
            values = to_probabilities(output, task.spec.task)
        lines.append((pictures.names[row], values))
        progress.add(1)
    records = [_to_record(name, values, task.labels) for name, values in lines]
    write_atomic(out / "predictions.jsonl", "".join(json.dumps(r) + "\n" for r in records).encode())
    print(format_predictions(records))
    print(f"written to {out}")
    return 0


def to_probabilities(logits: np.ndarray, task: str) -> np.ndarray:
    """Logits [K] -> probabilities [K]; they sum to 1 unless several labels may hold at once."""
    logits = np.asarray(logits, np.float64)
    if task == "multi_label_classification":
        return 1 / (1 + np.exp(-logits))
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def format_predictions(records: list[dict]) -> str:
    """Text table of the first SHOWN records, and how often each class was predicted."""
    rows = []
    for record in records[:SHOWN]:
        ranked = sorted(record["values"].items(), key=lambda item: -item[1])[:TOP]
        shown = ", ".join(f"{name} {value:.1%}" for name, value in ranked)
        rows.append(
            {"picture": record["picture"], "prediction": _join(record), "most likely": shown}
        )
    lines = [format_table(rows, ["picture", "prediction", "most likely"])]
    if len(records) > SHOWN:
        lines.append(f"... and {len(records) - SHOWN} more in predictions.jsonl")
    counts = Counter(_join(record) for record in records).most_common(10)
    return "\n".join([*lines, "predicted: " + ", ".join(f"{k} {n}" for k, n in counts)])


def _join(record: dict) -> str:
    found = record["prediction"]
    return found if isinstance(found, str) else " + ".join(found) or "none"


def _to_record(name: str, values: np.ndarray, labels: Labels) -> dict:
    if labels.task == "multi_label_classification":
        prediction = [c for c, value in zip(labels.classes, values) if value > 0.5]
    else:
        prediction = labels.classes[int(np.argmax(values))]
    by_class = {c: round(float(value), 6) for c, value in zip(labels.classes, values)}
    return {"picture": name, "prediction": prediction, "values": by_class}


def _recall_labels(task, folder: Path) -> str | None:
    """Labels of the run in `folder` without its data; returns the backbone they belong to."""
    if not (folder / LABELS).is_file():  # a run that was stopped before its first evaluation
        return None
    found = read_json(folder / LABELS)
    task.labels = Labels(found["task"], tuple(found["classes"]), found["native_side"])
    return found["backbone"]


def _check_head(spec, params, folder: Path) -> None:
    wanted = {k: tuple(v.shape) for k, v in flatten(head_shapes(spec)["params"]).items()}
    found = {k: tuple(v.shape) for k, v in flatten(params).items()}
    wrong = sorted(k for k in {*wanted, *found} if wanted.get(k) != found.get(k))
    if wrong:
        raise ValueError(
            f"the head in {folder} does not fit this backbone and config: {wrong[0]} is "
            f"{found.get(wrong[0])} there, {wanted.get(wrong[0])} is needed ({len(wrong)} such); "
            "use the config and the weights it was trained with"
        )


def _predict_rows(task, trained, loader, mesh) -> Iterator[tuple[int, np.ndarray]]:
    """(row, logits [K] or label map [S,S]) of each picture, in order."""
    program = on_mesh(mesh, task.predict)
    predict = jax.jit(program, static_argnums=3, out_shardings=replicated(mesh))
    phase = task.phase(trained.step, train=False)
    for batch in loader:
        encoded = task.encode(put_batch(batch, mesh))
        # The state is that of the end of training for every picture, whatever came before it.
        outputs, _ = predict(trained.params, trained.state, encoded, phase)
        for row, output, is_real in zip(batch["index"], np.asarray(outputs), batch["mask"]):
            if is_real:
                yield int(row), output


class _MapWriter:
    """masks/NAME.png (class numbers with a palette), overlays/NAME.png, classes.json."""

    def __init__(self, out: Path, pictures, classes):
        if len(classes) > 256:
            raise ValueError(f"{len(classes)} classes: a mask file holds at most 256")
        self.out, self.pictures, self.classes = out, pictures, classes
        self.colours = class_colours(len(classes))
        stems = Counter(Path(name).with_suffix("") for name in pictures.names)
        self.is_unique = max(stems.values()) == 1
        write_json(out / "classes.json", list(classes))

    def add(self, row: int, labels: np.ndarray) -> None:
        name, checked = Path(self.pictures.names[row]), self.pictures.items[row].checked
        file = name.with_suffix(".png") if self.is_unique else Path(f"{name}.png")
        mask = Image.fromarray(labels.astype(np.uint8))
        mask.putpalette(self.colours.ravel().tolist())  # values stay, viewers show colours
        mask = mask.resize((checked.width, checked.height), Image.Resampling.NEAREST)
        with atomic_path(self.out / "masks" / file) as partial:
            mask.save(partial, format="PNG")
        self._overlay(row, np.asarray(mask), self.out / "overlays" / file)

    def _overlay(self, row: int, labels: np.ndarray, path: Path) -> None:
        """The picture and its prediction side by side, with the classes that occur."""
        image = np.rint(255 * to_unit(self.pictures[row]["image"])).astype(np.uint8)
        size = tile_size(*labels.shape, smallest=256, largest=768)
        image = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BOX))
        shown = Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST)
        tiles = np.stack([image, tint(image, self.colours[np.asarray(shown)])])
        shares = np.bincount(labels.ravel(), minlength=len(self.classes)) / labels.size
        legend = [
            (swatch(self.colours[k]), f"{self.classes[k]} {shares[k]:.1%}")
            for k in np.argsort(-shares, kind="stable")
            if shares[k]
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_sheet(tiles[None], path, headings=("picture", "prediction"), legend=legend)


def _local_mesh(config, rows: int):
    """(mesh over the devices of this process, batch size that fits it and is not above need)."""
    if jax.process_count() > 1:
        raise ValueError("extract and predict run in one process; give each its own pictures")
    mesh = open_mesh(config.mesh)
    batch_size = config.eval.batch_size or config.batch_size
    check_batch(batch_size, mesh)
    ways = count_ways(mesh)
    return mesh, min(batch_size, -(-rows // ways) * ways)
