"""From nothing to answers: train a tiny GeoDiT on built-in scenes, decode it, score it.

    python -m examples.quickstart_geodit --workdir=runs/quickstart_geodit

Trains a model and a copy that never sees the picture, scores captions, grounding, detection,
questions and classes of unseen scenes beside the most frequent answer, varies the number of
decoding steps and what is masked again, and draws how one caption came about.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(".cache/xla").absolute()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

from absl import app, flags, logging

from common_jax.charts import save_curves
from common_jax.host_memory import use_huge_pages
from common_jax.metric_log import say
from common_jax.report import format_table, write_markdown_table
from common_jax.train_loop import Pipeline, train_whole
from configs import geodit_sft
from data.pipeline import eval_batches, train_batches
from data.scene_records import SceneRecords
from geodit_jax.answering import Question
from geodit_jax.decode_config import TRAINED_HERE, DecodeConfig
from geodit_jax.inference import predict_records, responder_of_run
from geodit_jax.pictures import save_history
from geodit_jax.scoring.baselines import most_frequent
from geodit_jax.scoring.score import score_predictions
from geodit_jax.task import GeoDiTTask

WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart_geodit", "Folder of all runs.")
STEPS = flags.DEFINE_integer("steps", 1000, "Training steps of the model that sees.")
EACH = flags.DEFINE_integer("each", 48, "Test records of each kind.")
# The score each task is known by: CIDEr-D, accuracy at an overlap of 0.5, mean average precision.
MAIN = {
    "caption": "cider",
    "grounding": "acc_0.50",
    "detection": "map_0.50",
    "vqa": "accuracy",
    "classification": "accuracy",
}
KINDS = ("caption", "grounding", "detection", "vqa", "classification")
# What says most about a picture in few tokens comes most often. Coordinates are many tokens that
# take long to learn, and as long as they are guessed their gradients hide the others.
DRAWN = (*("caption", "vqa", "classification") * 2, "grounding", "detection")
PIPELINE = Pipeline(train_batches, eval_batches)
SHOWS = """\
What this shows: the whole path works, and what a model that writes by unmasking learns from
pictures beyond a copy that never saw one. What it does not show: how good GeoDiT is. The scenes are
drawn by a program, the network has about 1 M parameters and was trained for minutes, once."""


def run_config(steps: int, blind: bool):
    c = geodit_sft.get_config("size=tiny,data=scenes")
    with c.unlocked():
        c.data.blind, c.data.codec = blind, "int100"
        c.data.kinds, c.data.size, c.data.text_length = DRAWN, 16384, 72
        c.train.label_policy = "response_only"
        c.train.antithetic = c.train.at_least_one = True
        c.batch_size, c.optim.steps = 16, steps
        c.eval.every, c.log.every, c.checkpoint.every = steps, 50, 300
    return c


def train_model(folder: Path, steps: int, blind: bool) -> float:
    """Seconds it took; a finished run is not repeated."""
    config = run_config(steps, blind)
    return train_whole(GeoDiTTask(config), config, folder, PIPELINE)


def score(folder: Path, name: str, kinds, each: int, decode: DecodeConfig = TRAINED_HERE) -> dict:
    """{task: main score in percent} of a trained run on unseen scenes."""
    sources = [SceneRecords("test", each, kinds=(kind,), max_boxes=2) for kind in kinds]
    responder = responder_of_run(folder, decode)
    path = predict_records(responder, sources, folder / f"{name}.jsonl", batch_size=16)
    return main_scores(score_predictions(path, meteor=False))


def main_scores(result: dict) -> dict:
    return {
        group["task"]: 100 * group["metrics"][MAIN[group["task"]]]["value"]
        for group in result["groups"]
    }


def score_most_frequent(folder: Path) -> dict:
    """Scores of the most frequent answer of the training records, on the rows of a run."""
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    train_records = SceneRecords("train", 600, max_boxes=2).records
    return main_scores(score_predictions(most_frequent(train_records, rows), meteor=False))


def ablate(folder: Path, each: int) -> list[dict]:
    """The two ablations of the paper: steps, and which tokens are masked again."""
    rows = []
    for remasking in ("low_confidence", "random"):
        for steps in (1, 2, 4, 8, 16):
            decode = dataclasses.replace(TRAINED_HERE, steps=steps, remasking=remasking)
            name = f"{remasking}-{steps}"
            found = score(folder, name, ("caption", "classification"), each, decode)
            rows.append({"remasking": remasking, "steps": steps, **found})
    curves = {
        f"{task}, {remasking}": tuple(
            zip(*((r["steps"], r[task]) for r in rows if r["remasking"] == remasking))
        )
        for task in ("caption", "classification")
        for remasking in ("low_confidence", "random")
    }
    save_curves(curves, folder.parent / "steps.png", "score in percent", xlabel="decoding steps")
    return rows


def main(_):
    logging.set_verbosity(logging.WARNING)
    start, folder = time.perf_counter(), Path(WORKDIR.value)
    parts = {}
    for name, steps in (("sees", STEPS.value), ("blind", STEPS.value // 2)):
        say(f"\n== training: {name}")
        parts[name] = train_model(folder / name, steps, blind=name == "blind")
    table = [
        {"model": name, **score(folder / name, "answers", KINDS, EACH.value)} for name in parts
    ]
    table.append({"model": "most frequent", **score_most_frequent(folder / "sees")})
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items())
    columns = ["model", *((kind, ".1f") for kind in KINDS)]
    say("\n" + format_table(table, columns, title=f"Test scores in percent ({times})"))
    write_markdown_table(table, columns, folder / "table.md")
    rows = ablate(folder / "sees", EACH.value // 2)
    columns = ["remasking", "steps", ("caption", ".1f"), ("classification", ".1f")]
    say("\n" + format_table(rows, columns, title="Decoding steps and remasking, percent"))
    write_markdown_table(rows, columns, folder / "steps.md")
    draw_one_decode(folder)
    say(f"\n{SHOWS}\n\neverything {time.perf_counter() - start:.0f} s")
    say(f"Figures: {folder}/steps.png, {folder}/history.png, tables beside them")


def draw_one_decode(folder: Path) -> None:
    """How the caption of one unseen scene came about."""
    example = SceneRecords("test", 1, kinds=("caption",))[0]
    responder = responder_of_run(folder / "sees")
    question = Question(responder.prompts.ask(example["record"]), example["image"], "caption")
    ((_, answer),) = responder.answer([question])
    save_history(answer.pieces, answer.committed_at, folder / "history.png", title=answer.text)


if __name__ == "__main__":
    use_huge_pages()
    app.run(main)
