"""From nothing to a table: pretrain a small diffusion model on built-in scenes, probe its features.

    python -m examples.quickstart --workdir=runs/quickstart

About five minutes on two CPU cores, no download. Every part is an ordinary run of `launch.py`; the
same command continues where it was stopped.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(".cache/xla").absolute()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

from absl import app, flags, logging

from common_jax.host_memory import use_huge_pages
from common_jax.metric_log import say
from common_jax.report import format_table, write_markdown_table
from common_jax.train_loop import Pipeline, train_whole
from configs import satdifuser_pretrain, satdifuser_probe
from data.pipeline import eval_batches, train_batches
from satdifuser_jax.figures import save_bars
from satdifuser_jax.pretrain import PretrainTask
from satdifuser_jax.probe import ProbeTask

WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Folder of all runs.")
STEPS = flags.DEFINE_integer("steps", 280, "Pretraining steps.")
PIPELINE = Pipeline(train_batches, eval_batches)

SHOWS = """\
What this shows: the whole path works, and features of a pretrained diffusion model can be compared
with those of the same network untrained, through heads trained from one cache. What it does not
show: how good SatDiFuser is. The scenes are drawn by a program, the network has 1 M parameters and
saw them for about a minute, and this is one seed: differences of a few points mean nothing."""


def pretrain_config(steps: int):
    """A UNet of about 2 M parameters on 4 x 4 pixel patches of 64-pixel scenes."""
    c = satdifuser_pretrain.get_config()
    with c.unlocked():
        c.model.channels, c.model.heads = (48, 96), (2, 3)
        c.model.attention_levels, c.model.layers_per_block = (False, True), 1
        c.batch_size, c.optim.steps = 16, steps
        c.eval.every, c.log.every = steps, 25
        c.eval.sample_steps, c.checkpoint.every = 20, 250
        c.optim.ema_decay = 0.99
        c.optim.warmup_epochs = 0.01
    return c


def probe_config(dataset: str, fuser: str, weights: Path, untrained: bool, cache: Path):
    """A head on cached taps at three times of an inversion on a grid of ten."""
    c = satdifuser_probe.get_config(f"dataset={dataset},fuser={fuser}")
    with c.unlocked():
        c.model.weights, c.model.untrained = str(weights), untrained
        c.model.num_timesteps, c.model.save_timesteps = 10, (8, 7, 6)  # t = 1, 101, 201
        c.model.prediction_type = "v_prediction"
        c.model.projection_dim, c.model.channels = 48, 32
        c.model.num_experts = 4
        c.data.size, c.data.eval_size = 512, 256
        c.data.cache, c.data.cache_dir = "taps", str(cache)
        c.optim.name, c.optim.lr = "adamw", 1e-2 if fuser != "linear" else 3e-3
        c.optim.schedule, c.optim.warmup_epochs = "cosine", 1.0
        c.optim.epochs, c.optim.weight_decay = 8.0, 1e-2
        c.eval.every, c.eval.patience, c.log.every = 64, 0, 50
        if fuser == "linear":
            c.optim.weight_decay = 0.1
    return c


def run(task, config, workdir: Path) -> tuple[dict, float]:
    """(results, seconds of this process); a finished run is read, not repeated."""
    seconds = train_whole(task, config, workdir, PIPELINE)
    return json.loads((workdir / "results.json").read_text()), seconds


def probe_all(folder: Path) -> list[dict]:
    """Every head on every task and backbone; rows of the table."""
    rows = []
    for dataset, metric in (("scenes", "accuracy"), ("scenes_seg", "miou")):
        for untrained in (False, True):
            for fuser in ("linear", "gw") if untrained else ("linear", "gw", "lw", "moe"):
                name = f"{dataset}-{'untrained' if untrained else 'pretrained'}-{fuser}"
                say(f"\n== {name}")
                config = probe_config(
                    dataset, fuser, folder / "pretrain" / "export", untrained, folder / "cache"
                )
                results, seconds = run(ProbeTask(config), config, folder / name)
                rows.append(
                    {
                        "task": "segmentation" if dataset == "scenes_seg" else "classification",
                        "UNet": "untrained" if untrained else "pretrained",
                        "head": fuser,
                        "metric": metric,
                        "test": 100 * results[f"eval/test/{metric}"],
                        "seconds": seconds,
                    }
                )
    return rows


def main(_):
    logging.set_verbosity(logging.WARNING)
    start, folder = time.perf_counter(), Path(WORKDIR.value)
    say("== pretraining")
    config = pretrain_config(STEPS.value)
    _, seconds = run(PretrainTask(config), config, folder / "pretrain")
    rows = probe_all(folder)
    columns = ["task", "UNet", "head", "metric", ("test", ".1f"), ("seconds", ".0f")]
    title = f"pretraining {seconds:.0f} s, everything {time.perf_counter() - start:.0f} s"
    table = format_table(rows, columns, title=f"\nTest scores in percent ({title})")
    print(f"{table}\n\n{SHOWS}\n")
    write_markdown_table(rows, columns, folder / "table.md")
    bars = [(f"{r['task']} {r['UNet']} {r['head']}", r["test"], None, None) for r in rows]
    save_bars(bars, folder / "table.png", xlabel="test score (%)")
    print(f"Figures: {folder}/table.png, {folder}/*/figures/, {folder}/pretrain/samples/")


if __name__ == "__main__":
    use_huge_pages()
    app.run(main)
