"""A small model on eight devices and on one: python tests/eight_devices.py, JSON on stdout."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

CONFIG = dict(
    text=dict(vocab_rows=64, width=32, layers=2, heads=4, kv_heads=2, mlp=48),
    tower=dict(image_size=16, patch=8, width=16, layers=2, heads=2, mlp=24),
)


def make_batch(config, image) -> dict:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 64, (8, 12)).astype(np.int32)
    ids[:, :5] = image
    rows = np.zeros((8, 12, 1), np.int32)
    rows[:, :5, 0] = np.arange(5)
    pixels = rng.integers(0, 256, (8, 1, 16, 16, 3)).astype(np.uint8)
    return dict(ids=ids, rows=rows, weights=np.ones(rows.shape, np.float32), pixels=pixels)


def main() -> None:
    sys.path.insert(0, ".")
    from common_jax.sharding import make_mesh, put_batch, put_tree, tree_shardings
    from geodit_jax import llada, model
    from geodit_jax.config import GeoDiTConfig, TextConfig, TowerConfig

    config = GeoDiTConfig(TextConfig(**CONFIG["text"]), TowerConfig(**CONFIG["tower"]))

    def loss(params, batch):
        tokens = model.encode_images(params, config, batch["pixels"])
        x = model.merge(params, config, batch["ids"], tokens, batch["rows"], batch["weights"])
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        hidden, _ = llada.run(params["core"], config.text, x, positions)
        logits = llada.logits(params["core"], hidden)
        return jnp.sin(logits).mean(), logits

    params = model.init_model(config, 0)
    batch = make_batch(config, model.IMAGE)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    found = []
    for devices, sizes in ((jax.devices()[:1], (1, 1, 1)), (jax.devices(), (2, 2, 2))):
        mesh = make_mesh(*sizes, devices=devices)
        placed = put_tree(params, tree_shardings(params, model.SHARDING_RULES, mesh))
        found.append((placed, *step(placed, put_batch(batch, mesh))))
    (_, (_, logits), grads), (placed, (_, sharded_logits), sharded_grads) = found

    def error(a, b) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))

    for tree in (grads, sharded_grads):  # a bias that all keys share moves no softmax
        del tree["tower"]["layers"]["self_attn"]["k_proj"]["bias"]
    kernels = [leaf for leaf in jax.tree.leaves(placed) if leaf.ndim > 1]
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in kernels)
    print(
        json.dumps(
            dict(
                devices=len(jax.devices()),
                logits=error(sharded_logits, logits),
                gradients=max(jax.tree.leaves(jax.tree.map(error, sharded_grads, grads))),
                share=on_one / sum(leaf.nbytes for leaf in kernels),
            )
        )
    )


if __name__ == "__main__":
    main()
