"""Predictions of records and answers about one's own pictures, from a folder of weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from common_jax.files import atomic_path
from common_jax.metric_log import say
from common_jax.progress import Progress
from common_jax.report import format_table
from common_jax.workdir import read_config
from data.images import decode as read_image
from data.images import is_image
from data.record_catalog import open_records
from data.record_files import existing_file, read_records
from geodit_jax.answering import Answer, Question, Responder
from geodit_jax.boxes import parse_boxes
from geodit_jax.convert import load_model
from geodit_jax.decode_config import TRAINED_HERE, DecodeConfig
from geodit_jax.instruct import SYSTEMS
from geodit_jax.pictures import save_boxes, save_history
from geodit_jax.prompts import Prompts, load_prompts
from geodit_jax.scoring.score import main_score
from geodit_jax.tokenizer import Tokenizer

CHUNK = 256  # pictures in memory at once


def load_responder(folder, decode: DecodeConfig | None = None, *, dtype=jnp.float32, **settings):
    """A Responder from a checkpoint folder (`convert.load_model`) with its tokenizer.

    Raises FileNotFoundError or ValueError naming what is missing or does not fit.
    """
    params, config, report = load_model(folder, dtype=dtype)
    say(str(report))
    tokenizer = Tokenizer.load(folder, config.tokens)
    return Responder(params, config, tokenizer, decode or DecodeConfig(), dtype=dtype, **settings)


def choose_dtype(name: str = "auto"):
    """float32 or bfloat16; `auto` is what suits this device: bfloat16 on an accelerator."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def responder_of_run(
    workdir, decode: DecodeConfig = TRAINED_HERE, dtype: str = "auto"
) -> Responder:
    """The model that the training in `workdir` exported, asked as it was trained.

    dtype: `float32`, `bfloat16`, or `auto`, that of the training.
    """
    config = read_config(workdir)
    data = config["data"]
    return load_responder(
        Path(workdir) / "export",
        decode,
        dtype=choose_dtype(config["model"]["dtype"] if dtype == "auto" else dtype),
        lengths=config["answer"],
        system=SYSTEMS[data["system"]],
        blind=data["blind"],
        prompts=load_prompts(data["prompts"] or None),
        codec=data["codec"],
    )


# --------------------------------------------------------------------------------------- records
def predict_records(
    responder: Responder,
    sources: Sequence,
    path,
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> Path:
    """Answers every record of the sources (`data/records.py`) into `path`, JSON lines for scoring.

    Pictures are read in chunks. The file appears when it is complete.
    """
    ask, path = responder.prompts.ask, Path(path)
    with atomic_path(path) as partial, open(partial, "w") as file:
        for source in sources:
            shown = Progress(f"answers to {source.name}", len(source), unit="answers")
            for start in range(0, len(source), CHUNK):
                examples = [source[k] for k in range(start, min(start + CHUNK, len(source)))]
                questions = [
                    Question(ask(e["record"]), e["image"], e["record"].task) for e in examples
                ]
                rows = {}
                for place, answer in responder.answer(questions, batch_size=batch_size, seed=seed):
                    rows[place] = make_row(examples[place]["record"], answer, responder.codec)
                    shown.add(1)
                file.writelines(json.dumps(rows[k]) + "\n" for k in range(len(examples)))
            shown.close()
    return path


def make_row(record, answer: Answer, codec: str) -> dict:
    """One line of predictions.jsonl: the answer beside all that scoring it needs."""
    row = {
        "id": record.id,
        "task": record.task,
        "dataset": record.dataset,
        "category": record.category,
        "question": record.question,
        "image": record.image or "",
        "codec": codec,
        "prediction": answer.text,
        "answers": list(record.answers),
        "boxes": [list(map(float, box)) for box in record.boxes],
        "labels": list(record.labels),
        "size": list(record.size) if record.size else None,
        "classes": list(record.classes),
        "tokens": answer.tokens,
        "steps": answer.steps,
        "seconds": round(answer.seconds, 5),
    }
    return {name: value for name, value in row.items() if value not in (None, "", [])} | {
        "prediction": answer.text
    }


def score_records(
    responder: Responder, names: Sequence[str], out, profile: str = "standard", **settings
) -> dict:
    """Answers record sets and scores them together.

    names: `NAME` for the test split, `NAME@SPLIT`, and `=ROOT` behind either where the set lies in
    a folder or file of one's own; or a JSON lines file. Writes OUT/predictions.jsonl,
    OUT/scores.json and OUT/scores.txt; prints the table.
    """
    sources = [_open_set(name) for name in names]
    path = predict_records(responder, sources, Path(out) / "predictions.jsonl", **settings)
    return main_score(path, Path(out) / "scores.json", profile)


def _open_set(text: str):
    name, _, root = text.partition("=")
    if name.endswith((".jsonl", ".json")):
        name, root = "jsonl", name
    name, _, split = name.partition("@")
    return open_records(name, split or "test", root=root or None)


# ----------------------------------------------------------------------------------- own pictures
def ask_pictures(
    responder: Responder,
    images,
    ask: str,
    out,
    *,
    task: str = "",
    history: bool = False,
) -> list[dict]:
    """Asks one question about a picture or every picture of a folder, or all of a JSON lines file.

    Prints the answers and writes OUT/predictions.jsonl; where an answer holds boxes, also
    OUT/boxes/NAME.png; with `history` OUT/history/NAME.png, the passes of the decoder. `task` sets
    the answer window (`caption`, ...); "" is the general one. Returns the rows.
    """
    out = Path(out)
    asked = list(_questions(responder.prompts, images, ask, task))
    rows: list[dict] = [{}] * len(asked)
    for place, answer in responder.answer([question for _, question in asked]):
        name, question = asked[place]
        rows[place] = _show(name, question, answer, out, history)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / "predictions.jsonl") as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = [{**row, "boxes": len(row.get("boxes", []))} for row in rows]
    print(format_table(shown, ["image", "question", "prediction", "boxes"]))
    print(f"written: {out}")
    return rows


def _questions(prompts: Prompts, images, ask: str, task: str):
    """(name, Question) of everything that is asked about."""
    if str(images).endswith((".jsonl", ".json")):
        source = read_records(existing_file(images))
        for k in range(len(source)):
            record = source.records[k]
            text = ask or prompts.ask(record)
            yield record.id, Question(text, source[k]["image"], task or record.task)
        return
    if not ask:
        raise ValueError("nothing is asked: give --ask='Describe the image.' or a JSON lines file")
    path = Path(images)
    files = sorted(filter(is_image, path.rglob("*"))) if path.is_dir() else [existing_file(path)]
    if not files:
        raise ValueError(f"{path} holds no picture")
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        yield name, Question(ask, read_image(file), task or "chat")


def _show(name: str, question: Question, answer: Answer, out: Path, history: bool) -> dict:
    row = {
        "id": name,
        "image": name,
        "task": question.task,
        "question": question.text,
        "prediction": answer.text,
        "tokens": answer.tokens,
        "steps": answer.steps,
        "seconds": round(answer.seconds, 4),
    }
    stem = Path(name).with_suffix("").as_posix()
    if question.image is not None:
        size = (question.image.shape[1], question.image.shape[0])
        boxes = parse_boxes(answer.text, size, None)  # whatever notation it is in
        if len(boxes):
            row["boxes"] = boxes.round(1).tolist()
            target = out / "boxes" / f"{stem}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            save_boxes(question.image, boxes, target, title=f"{question.text}\n{answer.text}")
    if history:
        target = out / "history" / f"{stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        save_history(answer.pieces, answer.committed_at, target, title=question.text)
    return row
