"""Runs of GeoDiT by shapes alone, for plans: parameters, a batch, the decoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from common_jax.task import Program, Sketch
from geodit_jax.decode_config import DecodeConfig
from geodit_jax.image_layout import max_image_tokens, max_rows_per_token, max_views
from geodit_jax.model import model_shapes
from geodit_jax.sampler import generate


def sketch_run(task, mesh, rows: int) -> Sketch:
    """`GeoDiTTask.sketch`. `decode` answers `rows` prompts of a whole sequence's length each."""
    task.mesh = mesh
    params, model, data = task.shapes(), task.model, task.config.data
    sees = model.tower is not None and not data.blind
    length = data.text_length + (max_image_tokens(model) if sees else 0)
    batch = {name: _ints(rows) for name in ("index", "length", "cut")}
    batch |= {name: _ints(rows, length) for name in ("ids", "labels", "turns")}
    if sees:
        side, taps = model.tower.image_size, max_rows_per_token(model)
        batch["image_rows"] = _ints(rows, length, taps)
        batch["image_weights"] = jax.ShapeDtypeStruct((rows, length, taps), jnp.float32)
        views = (rows, max_views(model), side, side, 3)
        batch["pixels"] = jax.ShapeDtypeStruct(views, jnp.uint8)
    core = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, task.dtype), model_shapes(model)["core"]
    )
    prompts = {
        "prefix": jax.ShapeDtypeStruct((rows, length, model.text.width), task.dtype),
        "length": _ints(rows),
    }

    def decode(core, prompts):
        key = jax.random.key(0)
        given = prompts["prefix"], prompts["length"], key, DecodeConfig()
        return generate(core, model, *given)._asdict()

    return Sketch(
        params, {}, batch, {"decode": Program(decode, core, prompts, task.sharding_rules)}
    )


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
