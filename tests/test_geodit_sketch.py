from __future__ import annotations

import jax
import numpy as np
import pytest

from common_jax.sharding import make_mesh, paths
from configs import geodit_pretrain, geodit_sft
from data.pipeline import train_batches
from geodit_jax.task import GeoDiTTask


def kinds(tree) -> dict:
    """{path: (shape, type on a device)}."""
    leaves = jax.tree.leaves(tree)
    types = (jax.dtypes.canonicalize_dtype(leaf.dtype) for leaf in leaves)
    return {path: (np.shape(x), kind) for path, x, kind in zip(paths(tree), leaves, types)}


@pytest.mark.parametrize("config", [geodit_sft, geodit_pretrain])
def test_a_sketch_has_the_arrays_that_training_makes(config):
    task = GeoDiTTask(config.get_config("tiny"))
    sketch = task.sketch(make_mesh(), 2)
    settings = {"batch_size": 2, "seed": 0}
    batch = next(train_batches(task.train_source(), task.transforms("train"), **settings))
    assert kinds(sketch.batch) == kinds(batch)
    assert kinds(sketch.params) == kinds(task.init(0)[0])


def test_answers_are_sketched_as_a_responder_computes_them():
    task = GeoDiTTask(geodit_sft.get_config("tiny"))
    sketch = task.sketch(None, 2)
    embed, decode = (sketch.programs[name] for name in ("embed", "decode"))
    prefix = jax.eval_shape(embed.function, embed.weights, embed.batch)
    assert kinds(prefix) == kinds(decode.batch["prefix"])
    # Eight questions at once, padded to a multiple of 64; no step of training runs it.
    assert prefix.shape[0] == 8 and prefix.shape[1] % 64 == 0
    assert 0 <= prefix.shape[1] - sketch.batch["ids"].shape[1] < 64
    made = jax.eval_shape(decode.function, decode.weights, decode.batch)
    assert made["ids"].shape == (8, 32)
    assert (embed.count, decode.count, decode.passes) == (0, 0, 8)
    assert isinstance(decode.weights["core"]["layers"], tuple)
