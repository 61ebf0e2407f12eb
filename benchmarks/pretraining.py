"""A small DiffusionSat on real images, from files to pictures: prepared, trained by two processes,
killed, resumed, drawn.

    EO_DATA_DIR=... python -m benchmarks.pretraining --workdir=runs/satellite [--steps=1500]

UC Merced pictures (no test picture among them) with captions of their classes, and where there are
any with a written one, become ArrayRecord by data.prepare. Two processes train in pixel space; at
half of the steps one of them is killed with SIGKILL, then the same command goes on. Pictures of
eight prompts are drawn at the end, with and without guidance.

No CLIP weights are needed: the text tower is a small one with random weights, never trained, over a
vocabulary made from the captions. It tells captions apart, it knows nothing of language.
Every part is an ordinary command; the same call continues. Writes WORKDIR/drawn-*/grid.png.
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

from common_jax.files import write_json
from common_jax.metric_log import say
from data.real_images import split_table
from satdifuser_jax.convert import export_component
from satdifuser_jax.text_encoder import TextConfig, init_text_encoder

WORKDIR = flags.DEFINE_string("workdir", "runs/small_diffusionsat", "Folder of everything.")
STEPS = flags.DEFINE_integer("steps", 1500, "Training steps of 32 pictures.")
GSD = 0.3048  # metres: UC Merced pictures are cut from orthophotos of one foot a pixel
SIDE = 32
START, END = "<|startoftext|>", "<|endoftext|>"
PROMPTS = (
    "a satellite image of a river",
    "a satellite image of a beach",
    "a satellite image of a forest",
    "a satellite image of a freeway",
    "a satellite image of a parking lot",
    "a satellite image of an airplane",
    "a satellite image of an agricultural field",
    "a satellite image of a dense residential area",
)
CLASSES = {
    "agricultural": "an agricultural field",
    "airplane": "an airplane",
    "baseballdiamond": "a baseball diamond",
    "buildings": "buildings",
    "chaparral": "chaparral",
    "denseresidential": "a dense residential area",
    "golfcourse": "a golf course",
    "mediumresidential": "a medium residential area",
    "mobilehomepark": "a mobile home park",
    "parkinglot": "a parking lot",
    "sparseresidential": "a sparse residential area",
    "storagetanks": "storage tanks",
    "tenniscourt": "a tennis court",
}
PLACES = re.compile(r"\b(left|right|top|bottom|upper|lower)\b")
NETWORK = {
    "model.channels": (64, 96, 128),
    "model.heads": (2, 3, 4),
    "model.layers_per_block": 1,
    "optim.warmup_epochs": 2.0,
    "model.patch": 2,
    "data.flips": True,  # no caption names a place, see caption_pictures
    "eval.every": 500,
    "eval.guidance": 2.0,
    "checkpoint.every": 100,
    "log.every": 20,
    "data.side": SIDE,
}


# ------------------------------------------------------------------------------------ the pictures
def caption_pictures(root: Path) -> dict[str, list[tuple[str, str]]]:
    """{split: [(path, caption)]} of UC Merced: the class, and the first written sentence if any.

    Sentences that name a place in the picture are left out: a turned picture would make them false.
    """
    with (root / "ucm_captions" / "captions.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    written = {Path(row["image"]).name: row["captions"][0] for row in rows}
    found: dict[str, list[tuple[str, str]]] = {"train": [], "val": []}
    for name, split in split_table(root).items():
        if not name.startswith("ucmerced/") or split not in found:
            continue
        path, kind = root / name, Path(name).parent.name
        texts = [f"a satellite image of {CLASSES.get(kind, f'a {kind}')}"]
        more = written.get(path.name, "")
        texts += [more] if more and not PLACES.search(more) else []
        found[split] += [(str(path.absolute()), text) for text in texts]
    return found


def prepare(folder: Path, rows: dict[str, list[tuple[str, str]]]) -> None:
    for split, pairs in rows.items():
        table = folder / f"{split}.csv"
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "caption", "gsd"])
            writer.writerows([*pair, GSD] for pair in pairs)
        out = str(folder / "records" / split)
        run("-m", "data.prepare", str(table), out, "--per-shard=200")
        run("-m", "data.prepare", "--verify", out)


def write_tower(folder: Path, texts: list[str]) -> None:
    """text_encoder/ with random weights and tokenizer/ in the layout of CLIP's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    suffix = "</w>"
    words = Tokenizer(models.BPE(end_of_word_suffix=suffix, unk_token=END))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=[END, START], end_of_word_suffix=suffix
    )
    words.train_from_iterator(texts, trainer)
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    words.model.save(str(folder / "tokenizer"))
    names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 24}
    write_json(folder / "tokenizer" / "tokenizer_config.json", names | about)
    config = TextConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
    )
    export_component(folder / "text_encoder", "text_encoder", config, init_text_encoder(config, 0))


# ------------------------------------------------------------------------------------ the commands
def run(*words: str) -> None:
    status = subprocess.run([sys.executable, *words]).returncode
    if status:
        sys.exit(f"`python {' '.join(words)}` ended with status {status}")


def start_two(folder: Path, steps: int) -> list[subprocess.Popen]:
    """Both processes of the training."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = NETWORK | {
        "data.train": folder / "records",
        "model.text": folder / "tower",
        "optim.steps": steps,
    }
    words = [f"--config.{name}={value}" for name, value in settings.items()]
    config = "--config=configs/satdifuser_pretrain.py:dataset=satellite"
    place = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    command = [sys.executable, "launch.py", "train", config, f"--workdir={folder / 'run'}"]
    return [
        subprocess.Popen([*command, *words, *place, f"--process_id={i}"], cwd=Path.cwd())
        for i in range(2)
    ]


def last_step(folder: Path) -> int:
    file = folder / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def train(folder: Path, steps: int) -> None:
    if last_step(folder) < steps // 2:
        both = start_two(folder, steps)
        while last_step(folder) < steps // 2:
            if any(process.poll() is not None for process in both):
                sys.exit("a process of the training ended by itself")
            time.sleep(1.0)
        say(f"killing process 1 after step {last_step(folder)}")
        both[1].send_signal(signal.SIGKILL)
        say(f"process 0 ended with status {both[0].wait(timeout=300)}")
    statuses = [process.wait() for process in start_two(folder, steps)]
    if any(statuses):
        sys.exit(f"the resumed training ended with {statuses}")


def main(_):
    root = Path(os.environ.get("EO_DATA_DIR") or sys.exit("EO_DATA_DIR is not set"))
    folder = Path(WORKDIR.value).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    rows = caption_pictures(root)
    if not (folder / "tower").exists():
        prepare(folder, rows)
        write_tower(folder / "tower", [text for pairs in rows.values() for _, text in pairs])
    train(folder, STEPS.value)
    asked = [f"--prompt={prompt}" for prompt in PROMPTS]
    about = f"--metadata=gsd={GSD * 256 / SIDE}"
    for guidance in (1, 3):
        out = f"--out={folder / f'drawn-{guidance}'}"
        drawing = f"--sampling=count=32,batch=16,steps=50,guidance={guidance}"
        run("launch.py", "sample", f"--workdir={folder / 'run'}", out, *asked, about, drawing)


if __name__ == "__main__":
    app.run(main)
