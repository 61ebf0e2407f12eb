"""Small models on eight devices and on one: python tests/eight_devices.py, JSON on stdout."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
import optax

STEPS = 3
MESHES = {  # data, fsdp, tensor, dcn
    "geodit": [(1, 1, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)],
    "unet": [(1, 1, 1, 1), (2, 4, 1, 1)],
}


def make_geodit(mesh, **changes):
    """(task, one global batch) of GeoDiT, all of it trained."""
    from configs.geodit_sft import get_config
    from geodit_jax.config import GeoDiTConfig, TextConfig, TowerConfig, find_size
    from geodit_jax.model import IMAGE
    from geodit_jax.task import GeoDiTTask

    task = GeoDiTTask(change(get_config("tiny"), **changes))
    task.model = GeoDiTConfig(
        TextConfig(vocab_rows=1024, width=32, layers=2, heads=4, kv_heads=2, mlp=48),
        TowerConfig(image_size=16, patch=8, width=16, layers=2, heads=2, mlp=24),
        find_size("tiny").tokens,
    )
    task.prepare(mesh, None)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1000, (8, 12)).astype(np.int32)
    labels = np.where(np.arange(12) < 7, -100, ids)
    ids[:, :5] = IMAGE
    rows = np.zeros((8, 12, 1), np.int32)
    rows[:, :5, 0] = np.arange(5)
    return task, {
        "ids": ids,
        "labels": labels,
        "length": rng.integers(9, 13, 8).astype(np.int32),
        "turns": np.zeros((8, 12), np.int32),
        "cut": np.zeros(8, np.int32),
        "index": np.arange(8),
        "image_rows": rows,
        "image_weights": np.ones(rows.shape, np.float32),
        "pixels": rng.integers(0, 256, (8, 1, 16, 16, 3)).astype(np.uint8),
    }


def make_unet(mesh, **changes):
    """(task, one global batch) of the diffusion objective."""
    from configs.satdifuser_pretrain import get_config
    from satdifuser_jax.pretrain import PretrainTask

    task = PretrainTask(change(get_config("tiny"), **changes))
    task.prepare(mesh, None)
    rng = np.random.default_rng(0)
    return task, {
        "pixels": rng.uniform(-1, 1, (8, 32, 32, 3)).astype(np.float32),
        "metadata": rng.uniform(100, 900, (8, 7)).astype(np.float32),
        "index": np.arange(8),
    }


def change(config, **changes):
    with config.unlocked():
        config.update_from_flattened_dict({"batch_size": 8, "seed": 1, **changes})
    return config


def follow(make, sizes) -> dict:
    """Losses, norms and final parameters of a few steps, and the share of them on one device."""
    from common_jax.sharding import make_mesh, put_batch
    from common_jax.train_step import jit_step, start_state

    count = int(np.prod(sizes))
    mesh = make_mesh(*sizes, devices=jax.devices()[:count])
    # Half of the meshes split steps as well: neither may change a number.
    task, batch = make(mesh, **{"optim.accumulate": 2 if sizes[-1] > 1 else 1})
    # Plain descent: parameters then differ by what gradients differ, small ones by little.
    tx = optax.sgd(0.1)
    state, frozen = start_state(task, tx, task.config, mesh)
    batch = task.encode(put_batch(batch, mesh))
    key = jax.random.key(0)
    step = jit_step(task, tx, task.config, state).lower(state, frozen, batch, key, None).compile()
    losses, norms, leaves = [], [], jax.tree.leaves(state.params)
    share = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    share /= sum(leaf.nbytes for leaf in leaves)
    start = [np.asarray(leaf) for leaf in leaves]
    for _ in range(STEPS):
        state, metrics = step(state, frozen, batch, key)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    ends = [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]
    moved = [end - first for first, end in zip(start, ends)]
    return {"loss": losses, "grad_norm": norms, "moved": moved, "share": share}


def compare(found: dict, expected: dict) -> dict:
    """Largest relative differences; of what parameters moved by, relative to the farthest one."""

    def error(a, b) -> float:
        return max(abs(x - y) / abs(y) for x, y in zip(a, b))

    farthest = max(np.abs(b).max() for b in expected["moved"])
    pairs = zip(found["moved"], expected["moved"])
    return {
        "loss": error(found["loss"], expected["loss"]),
        "grad_norm": error(found["grad_norm"], expected["grad_norm"]),
        "moved": float(max(np.abs(a - b).max() for a, b in pairs) / farthest),
        "fell": expected["loss"][-1] / expected["loss"][0],
        "share": found["share"],
    }


def main() -> None:
    sys.path.insert(0, ".")
    results = {}
    for name, make in (("geodit", make_geodit), ("unet", make_unet)):
        alone, *others = [follow(make, sizes) for sizes in MESHES[name]]
        for sizes, found in zip(MESHES[name][1:], others):
            results[f"{name} {'x'.join(map(str, sizes))}"] = compare(found, alone)
    print(json.dumps({"devices": len(jax.devices()), "meshes": results}))


if __name__ == "__main__":
    main()
