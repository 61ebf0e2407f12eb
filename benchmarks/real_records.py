"""What a small GeoDiT learns from real images: captions, questions, classes, boxes, from scratch.

    EO_DATA_DIR=... python -m benchmarks.real_records --workdir=runs/real_records

Trains one model on UC Merced captions, questions and classes and on VHR-10 boxes together, and one
that never sees a picture; the best step of each and the decoder are chosen on validation. Both
answer the test pictures, none of which was seen (blocks of consecutive numbers, as neighbours are
near-copies). Beside them: the most frequent answer of the training records, and the caption of the
training picture with the nearest colours. Every part is an ordinary run; the same command
continues. Writes table.md, table.json, curve.png. About 35 minutes on 2 cores.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(".cache/xla").absolute()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import numpy as np
from absl import app, flags, logging

from common_jax.charts import save_curves
from common_jax.files import write_json
from common_jax.host_memory import use_huge_pages
from common_jax.metric_log import say
from common_jax.report import format_table, write_markdown_table
from common_jax.train_loop import Pipeline, train_whole
from configs import geodit_sft
from data.pipeline import eval_batches, train_batches
from data.record_catalog import open_records
from geodit_jax.decode_config import TRAINED_HERE, DecodeConfig
from geodit_jax.inference import predict_records, responder_of_run
from geodit_jax.scoring.baselines import colour_histogram, most_frequent, nearest_image_captions
from geodit_jax.scoring.score import score_predictions
from geodit_jax.task import GeoDiTTask

WORKDIR = flags.DEFINE_string("workdir", "runs/real_records", "Folder of all runs.")
STEPS = flags.DEFINE_integer("steps", 3600, "Training steps of the model that sees.")
BLIND = flags.DEFINE_integer("blind_steps", 1200, "Training steps of the one that does not.")
# How often each set is drawn: captions and boxes are few, questions many.
SETS = {
    "real:ucm_captions": 5,
    "real:ucm_vqa": 2,
    "real:ucmerced": 2,
    "real:nwpu_vhr10_grounding": 2,
    "real:nwpu_vhr10_detection": 1,
}
# A model from scratch has learnt to fill answers up with end-of-text, which the published decoder
# forbids; the captions of the validation pictures choose.
DECODERS = {
    "as published": DecodeConfig(),
    "end-of-text allowed": TRAINED_HERE,
    "and blocks of 8": DecodeConfig(banned="none", block=8),
}
PIPELINE = Pipeline(train_batches, eval_batches)


def run_config(steps: int, blind: bool):
    c = geodit_sft.get_config("size=tiny,data=" + "+".join(SETS))
    with c.unlocked():
        c.data.weights = tuple(SETS.values())
        c.data.val_size, c.data.blind = 100, blind
        c.batch_size, c.optim.steps = 16, steps
        c.optim.weight_decay = 0.05
        c.train.label_policy = "response_only"
        c.train.antithetic = c.train.at_least_one = True
        c.eval.every, c.checkpoint.every = 300, 300
    return c


def train_model(folder: Path, steps: int, blind: bool) -> float:
    """Seconds it took; a finished run is not repeated."""
    config = run_config(steps, blind)
    return train_whole(GeoDiTTask(config), config, folder, PIPELINE)


def answer(folder: Path, name: str, decode: DecodeConfig, sets=SETS, split="test") -> list[dict]:
    """Rows of the records of a split, kept in `answers-NAME.jsonl`."""
    path = folder / f"answers-{name}.jsonl"
    if not path.exists():
        sources = [open_records(name, split) for name in sets]
        predict_records(responder_of_run(folder, decode), sources, path, batch_size=32)
    return [json.loads(line) for line in path.read_text().splitlines()]


def choose_decoder(folder: Path) -> str:
    """The one of DECODERS whose captions of the validation pictures score best."""
    found = {}
    for number, (name, decode) in enumerate(DECODERS.items()):
        rows = answer(folder, f"val-{number}", decode, ("real:ucm_captions",), "val")
        found[name] = score(rows)["caption cider"]["value"]
    say("CIDEr of validation captions: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    return max(found, key=found.get)


def nearest_captions(rows: list[dict]) -> list[dict]:
    """The caption rows, answered by the training picture with the nearest colours."""
    parts = {split: open_records("real:ucm_captions", split) for split in ("train", "test")}
    colours = {
        split: np.stack([colour_histogram(source[i]["image"]) for i in range(len(source))])
        for split, source in parts.items()
    }
    captions = [record.answers for record in parts["train"].records]
    found = nearest_image_captions(colours["train"], captions, colours["test"])
    by_id = {record.id: text for record, text in zip(parts["test"].records, found)}
    return [{**row, "prediction": by_id[row["id"]]} for row in rows if row["task"] == "caption"]


def score(rows: list[dict]) -> dict[str, dict]:
    """{task and metric: {value, low, high}} of the metrics shown."""
    shown = {
        "caption": ("cider", "bleu_4"),
        "grounding": ("acc_0.50", "mean_iou"),
        "detection": ("map_0.50",),
        "classification": ("accuracy",),
    }
    found = {}
    for group in score_predictions(rows, meteor=False)["groups"]:
        task, metrics = group["task"], group["metrics"]
        names = shown.get(task, tuple(metrics))  # questions: accuracy of every type
        found |= {f"{task} {name}": metrics[name] for name in names if name in metrics}
    return found


def draw_losses(folder: Path) -> None:
    """Validation loss along the training of both models."""
    curves = {}
    for name in ("sees", "blind"):
        lines = [json.loads(x) for x in (folder / name / "metrics.jsonl").read_text().splitlines()]
        points = [(x["step"], x["eval/val/loss"]) for x in lines if "eval/val/loss" in x]
        curves[name] = tuple(zip(*dict(points).items()))
    save_curves(curves, folder / "curve.png", "validation loss", xlabel="training steps")


def main(_):
    logging.set_verbosity(logging.WARNING)
    folder = Path(WORKDIR.value)
    seconds = {
        "sees": train_model(folder / "sees", STEPS.value, blind=False),
        "blind": train_model(folder / "blind", BLIND.value, blind=True),
    }
    draw_losses(folder)
    chosen = choose_decoder(folder / "sees")
    decode = DECODERS[chosen]
    rows = answer(folder / "sees", "8", decode)
    records = [r for name in SETS for r in open_records(name, "train").records]
    columns = {
        "8 steps": score(rows),
        "1 step": score(
            answer(folder / "sees", "1", dataclasses.replace(decode, steps=1, block=0))
        ),
        "blind": score(answer(folder / "blind", "8", decode)),
        "most frequent": score(most_frequent(records, rows)),
        "nearest colours": score(nearest_captions(rows)),
    }
    write_json(folder / "table.json", {"seconds": seconds, "decoder": chosen, "scores": columns})
    table = [
        {"score": name, "low": first["low"], "high": first["high"]}
        | {column: found[name]["value"] for column, found in columns.items() if name in found}
        for name, first in columns["8 steps"].items()
    ]
    shown = ["score", *((name, ".3f") for name in ("8 steps", "low", "high", *list(columns)[1:]))]
    times = ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items())
    say(
        "\n"
        + format_table(table, shown, title=f"Unseen real pictures (decoder: {chosen}; {times})")
    )
    write_markdown_table(table, shown, folder / "table.md")


if __name__ == "__main__":
    use_huge_pages()
    app.run(main)
