"""A probe whose programs are small, and a workdir of it that no training had to make."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from common_jax.checkpoint import Checkpoints
from common_jax.workdir import open_workdir
from configs.satdifuser_probe import get_config
from satdifuser_jax.heads import init_head
from satdifuser_jax.inference import Labels, remember_labels
from satdifuser_jax.probe import ProbeTask

CLASSES = ("field", "forest", "town", "water")
SIDE = 32


def small_config(arg: str = "tiny,fuser=linear", **changes) -> ConfigDict:
    """One call of the network at one time, for four pictures of 32 pixels."""
    config = get_config(arg)
    settings = {
        "data.side": SIDE,
        "data.cache_dtype": "float32",
        "model.mode": "noising",
        "model.timesteps": (21,),
    }
    with config.unlocked():
        if "model.layers" in changes:
            config.model.layers = ConfigDict(changes.pop("model.layers"))
        config.update_from_flattened_dict(settings | changes)
    return config


def make_workdir(folder: Path, config: ConfigDict, labels: Labels, step: int = 7) -> ProbeTask:
    """A run whose best checkpoint holds the first values of the head; its statistics are random."""
    task = ProbeTask(config)
    task.labels = labels
    open_workdir(str(folder), config, is_writer=True)
    params, state = init_head(task.spec, seed=0)
    rng = np.random.default_rng(0)
    for values in state.get("feature_stats", {}).get("decoder", {}).values():
        values += rng.uniform(0, 0.5, values.shape).astype(np.float32)
    tree = {"params": params, "state": state, "ema": {}, "opt": {}, "step": jnp.int32(step)}
    saves = Checkpoints(folder)
    saves.save(step, tree, {}, best=True)
    saves.close()
    remember_labels(folder, labels, "another backbone")
    return task


def write_pictures(folder: Path, sizes, seed: int = 0) -> list[str]:
    """Random pictures `<i>.png` of (height, width); returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    names = [f"{i}.png" for i in range(len(sizes))]
    for name, (height, width) in zip(names, sizes):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / name)
    return names
