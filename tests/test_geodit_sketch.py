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


def test_the_decoder_answers_whole_sequences():
    task = GeoDiTTask(geodit_sft.get_config("tiny"))
    sketch = task.sketch(make_mesh(), 2)
    decode = sketch.programs["decode"]
    made = jax.eval_shape(decode.function, decode.weights, decode.batch)
    assert made["ids"].shape == (2, 32)
    assert decode.batch["prefix"].shape[:2] == sketch.batch["ids"].shape
