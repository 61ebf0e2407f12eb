"""Runs of SatDiFuser by shapes alone, for plans and for counting their operations."""

from __future__ import annotations

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from common_jax.flops import count_flops
from common_jax.task import Program, Sketch, Task
from satdifuser_jax.blocks import SHARDING_RULES
from satdifuser_jax.extract import encode_latents, features_at
from satdifuser_jax.extract_config import inversion_steps
from satdifuser_jax.heads import feature_shapes, head_shapes
from satdifuser_jax.text_encoder import CLIPTextModel, TextTower, text_encoder_shapes
from satdifuser_jax.unet import unet_shapes
from satdifuser_jax.vae import SpaceToDepth, vae_shapes


def count_training_flops(task: Task, rows: int) -> dict[str, float]:
    """Operations of one example in a batch of `rows` by program, traced, nothing is computed.

    What is trained costs three forward passes, what is frozen a single one; nothing counts twice.
    """
    task = copy.copy(task)  # a sketch sets its mesh
    sketch = task.sketch(None, rows)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def forward(params, state, batch, key):
        return task.loss(params, state, batch, key, task.phase(0))[:2]

    trained = count_flops(forward, sketch.params, sketch.state, sketch.batch, key)
    cost = {"train": 3 * trained / rows}
    for name, part in sketch.programs.items():
        cost[name] = part.count * count_flops(part.function, part.weights, part.batch) / rows
    return cost


# ----------------------------------------------------------------------------------- pretraining
def sketch_pretraining(task, mesh, rows: int) -> Sketch:
    """`PretrainTask.sketch`: the step, and `encode`: codec and text tower."""
    parts, data = task.parts, task.config.data
    codec = {}
    if not isinstance(parts.codec, SpaceToDepth):
        codec = _shapes(vae_shapes(parts.codec.config), parts.codec.dtype)
    frozen, tower = _shapes(task.frozen).replace(codec_params=codec), None
    if parts.text:
        module = CLIPTextModel(parts.text, dtype=jnp.dtype(task.config.model.dtype))
        tower = TextTower(module, _shapes(text_encoder_shapes(parts.text), module.dtype))
    batch = {"index": _array((rows,), "int32")}
    if parts.unet.num_metadata:
        batch["metadata"] = _array((rows, parts.unet.num_metadata))
    side = data.side // parts.codec.factor
    if data.cache == "none":
        batch["pixels"] = _array((rows, data.side, data.side, 3))
    else:
        names = ("mean", "logvar") if codec else ("mean",)
        batch |= {name: _array((rows, side, side, parts.codec.latent_channels)) for name in names}
    if parts.text and data.cache == "all":
        width = parts.text.max_position_embeddings, parts.text.hidden_size
        is_half = jnp.dtype(task.config.model.dtype) == jnp.bfloat16
        batch["text"] = _array((rows, *width), "uint16" if is_half else "float32")
    elif parts.text:
        batch["ids"] = _array((rows, parts.text.max_position_embeddings), "int32")

    def encode(weights, batch):
        planned = copy.copy(task)
        planned.frozen, planned.tower = weights
        return planned.encode(batch)

    made = jax.eval_shape(encode, (frozen, tower), batch)
    encoder = Program(encode, (frozen, tower), batch, SHARDING_RULES)
    return Sketch(unet_shapes(parts.unet), {}, made, {"encode": encoder})


# ----------------------------------------------------------------------------------------- probes
def sketch_probe(task, mesh, rows: int) -> Sketch:
    """`ProbeTask.sketch`: the head's step, and what makes its features from what is cached.

    From pixels these are `encode` (the codec) and `features`, one call of the network, which an
    inversion makes for one time after another; from latents all kept times are one call.
    """
    if "backbone" not in vars(task):
        task.plan()  # shapes in place of weights
    task.mesh = mesh
    spec, backbone, config = task.spec, _shapes(task.backbone), task.extract_config
    params, state = _head(spec)
    features = tuple(_array(leaf.shape, config.dtype) for leaf in feature_shapes(spec, rows))
    batch = {"features": features, "index": _array((rows,), "int32"), "label": _label(task, rows)}
    cache, programs = task.config.data.cache, {}
    latent = backbone.latent_side(task.side)
    latent_shape = (latent, latent, backbone.unet.config.in_channels)
    given = {"latents": _array((rows, spec.num_keys, *latent_shape))}
    calls = 1
    if cache == "none":
        if config.mode == "inversion":
            calls = len(list(inversion_steps(config, backbone.schedule)))
            first = config.inversion_keys(backbone.schedule)[:1]
            config = dataclasses.replace(config, keys=first, timesteps=None)
            given["latents"] = _array((rows, 1, *latent_shape))
        pixels = {
            "pixels": _array((rows, task.side, task.side, 3)),
            "index": _array((rows,), "int32"),
        }
        codec = backbone.replace(unet_params={})

        def encode(weights, batch):
            return encode_latents(weights, batch["pixels"], task.extract_config, batch["index"])

        programs["encode"] = Program(encode, codec, pixels, SHARDING_RULES)
    if config.metadata == "record":
        given["metadata"] = _array((rows, backbone.unet.config.num_metadata))

    def call(weights, batch):
        return features_at(weights, batch["latents"], config, batch.get("metadata"))

    if cache != "taps":
        network = backbone.replace(codec_params={})
        programs["features"] = Program(call, network, given, SHARDING_RULES, calls)
    return Sketch(params, state, batch, programs)


def _head(spec):
    """(parameters, state) of a head; a linear one also keeps statistics of its features."""
    found = dict(head_shapes(spec))
    return found.pop("params"), found


def _label(task, rows: int):
    if task.spec.segments:
        return _array((rows, task.labels.native_side, task.labels.native_side), "int32")
    if task.spec.task == "multi_label_classification":
        return _array((rows, task.spec.num_classes))
    return _array((rows,), "int32")


def _shapes(tree, dtype=None):
    """Abstract leaves, of `dtype` where one is given."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), dtype or x.dtype), tree)


def _array(shape, dtype="float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
