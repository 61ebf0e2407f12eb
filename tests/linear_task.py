"""A task of one matrix, small enough to compile in no time: it exercises the loop, not a model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from common_jax.task import Evaluator, Program, Sketch, Task
from configs.base import base_config


class Points:
    """Three Gaussian blobs in the plane; the label is the blob."""

    name, task, classes, fingerprint = "points", "classification", ("a", "b", "c"), "points"

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        rng = np.random.default_rng([self.seed, int(i)])
        label = int(rng.integers(3))
        angle = 2 * np.pi * label / 3
        point = np.array([np.cos(angle), np.sin(angle)]) + 0.2 * rng.normal(size=2)
        return {"x": point.astype(np.float32), "label": np.int32(label)}


class LinearTask(Task):
    """Softmax regression with a frozen copy of its matrix and noise keyed by stream index."""

    trainable = r"^linear/"

    def init(self, seed):
        rng = np.random.default_rng(seed)
        kernel = rng.normal(size=(2, 3)).astype(np.float32)
        return {
            "linear": {"kernel": kernel, "bias": np.zeros(3, np.float32)},
            "frozen": {"kernel": kernel.copy()},
        }, {"calls": np.zeros((), np.int32)}

    def train_source(self):
        return Points(self.config.data.examples, 0)

    def logits(self, params, x):
        return x @ params["linear"]["kernel"] + params["linear"]["bias"]

    def loss(self, params, state, batch, key, phase):
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (2,)))
        x = batch["x"] + 0.1 * noise(batch["index"].astype(jnp.uint32))
        logp = jax.nn.log_softmax(self.logits(params, x))
        losses = -jnp.take_along_axis(logp, batch["label"][:, None], 1)[:, 0]
        losses = losses * self.config.model.scale
        return losses.sum(), jnp.float32(len(losses)), {"calls": state["calls"] + 1}, {}

    def predict(self, params, state, batch, phase):
        return self.logits(params, batch["x"]), state

    def evaluators(self):
        def update(logits, batch):
            right = (logits.argmax(-1) == batch["label"]) & batch["mask"]
            return np.array([right.sum(), batch["mask"].sum()])

        def finish(counts):
            return {"accuracy": float(counts[0] / counts[1])}

        return {
            name: Evaluator(Points(count, seed), (), update, finish)
            for name, count, seed in (("val", 21, 1), ("test", 22, 2))
        }

    def sketch(self, mesh, rows):
        def leaf(*shape, dtype=jnp.float32):
            return jax.ShapeDtypeStruct(shape, dtype)

        given = jax.tree.map(lambda x: leaf(*x.shape, dtype=x.dtype), self.init(0))
        numbers = leaf(rows, dtype=jnp.int32)
        batch = {"x": leaf(rows, 2), "label": numbers, "index": numbers}
        twice = Program(lambda w, b: b @ w @ w, leaf(2, 2), leaf(rows, 2), count=3)
        return Sketch(*given, batch, {"twice": twice})


def linear_config(**changes) -> ConfigDict:
    c = base_config()
    c.task = "linear"
    c.model = ConfigDict({"scale": 1.0})
    c.data = ConfigDict({"examples": 50, "workers": 0, "cache_dir": ""})
    c.batch_size = 8
    c.optim.steps = 6
    c.optim.warmup_epochs = 0.0
    c.eval.every = 2
    c.eval.select = "val/accuracy"
    c.checkpoint.every = 2
    c.log.every = 1
    c.update_from_flattened_dict(changes)
    return c
