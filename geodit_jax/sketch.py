"""Runs of GeoDiT by shapes alone, for plans: parameters, a batch, answers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from common_jax.task import Program, Sketch
from geodit_jax import llada
from geodit_jax.answering import ANSWER_LENGTHS, BUCKET
from geodit_jax.decode_config import TRAINED_HERE, fit_window
from geodit_jax.image_layout import max_image_tokens, max_rows_per_token, max_views
from geodit_jax.model import encode_images, merge, model_shapes
from geodit_jax.sampler import generate

QUESTIONS = 8  # that a Responder answers at once


def sketch_run(task, mesh, rows: int) -> Sketch:
    """`GeoDiTTask.sketch`; `embed` and `decode`: answers of the model, see `_sketch_answers`."""
    task.mesh = mesh
    batch = {name: _ints(rows) for name in ("index", "length", "cut")}
    length, sees = _length(task), _sees(task)
    batch |= {name: _ints(rows, length) for name in ("ids", "labels", "turns")}
    if sees:
        batch |= _pictures(task.model, rows, length)
    return Sketch(task.shapes(), {}, batch, _sketch_answers(task))


def _sees(task) -> bool:
    return task.model.tower is not None and not task.config.data.blind


def _length(task) -> int:
    """Positions of a whole sequence."""
    return task.config.data.text_length + (max_image_tokens(task.model) if _sees(task) else 0)


def _pictures(model, rows: int, length: int) -> dict:
    """Views, and where their tokens lie among `length` positions."""
    side, taps = model.tower.image_size, max_rows_per_token(model)
    return {
        "image_rows": _ints(rows, length, taps),
        "image_weights": jax.ShapeDtypeStruct((rows, length, taps), jnp.float32),
        "pixels": jax.ShapeDtypeStruct((rows, max_views(model), side, side, 3), jnp.uint8),
    }


def _sketch_answers(task) -> dict[str, Program]:
    """What a `Responder` runs on its one device for a batch of questions as long as an example:
    `embed` (tower, projector, prompts), then `decode`, the longest answer; its layers lie apart."""
    model, dtype, sees = task.model, task.dtype, _sees(task)
    decoder = fit_window(TRAINED_HERE, max(ANSWER_LENGTHS.values()))
    length = -(-_length(task) // BUCKET) * BUCKET
    weights = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), model_shapes(model)
    )
    weights["core"] = jax.eval_shape(llada.unstack, weights["core"])
    asked = {"ids": _ints(QUESTIONS, length)}
    if sees:
        asked |= _pictures(model, QUESTIONS, length)
    prompts = {
        "prefix": jax.ShapeDtypeStruct((QUESTIONS, length, model.text.width), dtype),
        "length": _ints(QUESTIONS),
    }

    def embed(weights, asked):
        tokens = encode_images(weights, model, asked["pixels"], dtype) if sees else None
        places = asked.get("image_rows"), asked.get("image_weights")
        return merge(weights, model, asked["ids"], tokens, *places, dtype)

    def decode(weights, prompts):
        key = jax.random.key(0)
        given = prompts["prefix"], prompts["length"], key, decoder
        return generate(weights["core"], model, *given)._asdict()

    return {
        "embed": Program(embed, weights, asked, count=0),
        "decode": Program(decode, weights, prompts, count=0, passes=decoder.steps),
    }


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
