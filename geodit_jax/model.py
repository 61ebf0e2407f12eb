"""The whole model: pictures and text become one sequence of embeddings for the text core.

B batch, V view slots, S pixels per side of a view in `pixels` and tokens of a sequence elsewhere, g
tokens per side of a view, R = V*g*g projected tokens, D width of the core, K table rows that one
image token mixes (`image_layout.py`). A model without a tower has the core alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from common_jax.init import host_init
from common_jax.layers import Linear
from common_jax.sharding import BATCH_AXES, constrain
from geodit_jax import llada
from geodit_jax.config import IMAGE, GeoDiTConfig
from geodit_jax.siglip import encode_views, tower_shapes

Tree = Any

# Regex on paths -> mesh axes, the first match wins (`common_jax.sharding.tree_shardings`). Kernels
# that widen are split by columns over `tensor`, those that narrow by rows: a block then needs two
# sums over `tensor`. `fsdp` splits the other side. Layers are never split; what no rule names
# (norms, biases of narrowing layers) is small and replicated.
SHARDING_RULES = (
    (r"embed_tokens/embedding$", ("tensor", "fsdp")),
    (r"lm_head/kernel$", ("fsdp", "tensor")),
    (r"layers/.*(q_proj|k_proj|v_proj|gate_proj|up_proj)/lora_a$", (None, "fsdp", None)),
    (r"layers/.*(q_proj|k_proj|v_proj|gate_proj|up_proj)/lora_b$", (None, None, "tensor")),
    (r"layers/.*(o_proj|down_proj)/lora_a$", (None, "tensor", None)),
    (r"layers/.*(o_proj|down_proj)/lora_b$", (None, None, "fsdp")),
    (r"layers/.*(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1)/kernel$", (None, "fsdp", "tensor")),
    (r"layers/.*(q_proj|k_proj|v_proj|fc1)/bias$", (None, "tensor")),
    (r"layers/.*(o_proj|down_proj|out_proj|fc2)/kernel$", (None, "tensor", "fsdp")),
    (r"patch_embedding/kernel$", (None, None, None, "fsdp")),
    (r"position_embedding/embedding$", (None, "fsdp")),
    (r"projector/linear_0/kernel$", ("fsdp", "tensor")),
    (r"projector/linear_0/bias$", ("tensor",)),
    (r"projector/linear_2/kernel$", ("tensor", "fsdp")),
)


# ------------------------------------------------------------------------------ shapes and values
class Counts(NamedTuple):
    """Parameters of a model, those that are used, and tensors in a checkpoint of it."""

    parameters: int
    used: int
    tensors: int


def model_shapes(config: GeoDiTConfig) -> dict:
    """The parameter tree as `jax.ShapeDtypeStruct`; nothing is computed."""

    def linear(rows, columns):
        leaves = {"kernel": (rows, columns), "bias": (columns,)}
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}

    core = {"core": llada.core_shapes(config.text)}
    if config.tower is None:
        return core
    width = config.text.width
    return core | {
        "tower": tower_shapes(config.tower),
        "projector": {
            "linear_0": linear(config.tower.width, width),
            "linear_2": linear(width, width),
        },
        "newline": {"embedding": jax.ShapeDtypeStruct((width,), jnp.float32)},
    }


def count_parameters(config: GeoDiTConfig) -> Counts:
    """Sizes by abstract shapes; a checkpoint holds one tensor for every layer of a stack."""
    shapes = model_shapes(config)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    stacks = [shapes[name]["layers"] for name in ("core", "tower") if name in shapes]
    layers = [leaf.shape[0] - 1 for leaf in jax.tree.leaves(stacks)]
    unused = jax.tree.leaves(shapes.get("tower", {}).get("post_layernorm", {}))
    return Counts(
        parameters,
        parameters - sum(leaf.size for leaf in unused),
        len(jax.tree.leaves(shapes)) + sum(layers),
    )


def init_model(config: GeoDiTConfig, seed: int, shardings: dict | None = None) -> dict:
    """Random parameters (numpy, or placed by `shardings` one at a time) for training from scratch.

    Kernels are normal with standard deviation 1/sqrt(fan_in), cut at three; those that write to the
    residual stream of layer l are divided by sqrt(2 (l+1)), so that the stream grows slowly with
    depth (the "mitchell" values of LLaDA). Tables and the newline have 1/sqrt(width), biases are 0.
    """
    rules = [
        (r"layers/.*(o_proj|down_proj|out_proj|fc2)/kernel$", _draw_outputs),
        (r"kernel$", _draw_kernel),
        (r"embedding$", lambda rng, shape: _draw(rng, shape, shape[-1])),
        (r"bias$", lambda rng, shape: np.zeros(shape, np.float32)),
    ]
    return host_init(model_shapes(config), seed, rules, shardings)


def _draw(rng: np.random.Generator, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
    values = rng.standard_normal(shape, np.float32)
    while (far := np.abs(values) > 3).any():
        values[far] = rng.standard_normal(int(far.sum()), np.float32)
    return values / np.float32(math.sqrt(fan_in))


def _draw_kernel(rng, shape):
    """[C,F], or [L,C,F] stacked; four axes are a convolution [p,p,3,F]."""
    return _draw(rng, shape, math.prod(shape[:-1]) if len(shape) == 4 else shape[-2])


def _draw_outputs(rng, shape):
    depth = np.arange(1, shape[0] + 1, dtype=np.float32)
    return _draw_kernel(rng, shape) / np.sqrt(2 * depth)[:, None, None]


# ----------------------------------------------------------------------------------------- images
def normalise(pixels: jax.Array) -> jax.Array:
    """uint8 [...,3] -> float32 in [-1,1]."""
    return (pixels.astype(jnp.float32) / 255 - 0.5) / 0.5


def project(projector: Tree, x: jax.Array) -> jax.Array:
    """Tower features [...,W] -> [...,D]: linear, exact GELU, linear."""
    width = projector["linear_2"]["kernel"].shape[-1]
    linear = Linear(width, dtype=x.dtype)
    h = linear.apply({"params": projector["linear_0"]}, x)
    return linear.apply({"params": projector["linear_2"]}, nn.gelu(h, approximate=False))


def encode_images(
    params: Tree, config: GeoDiTConfig, pixels: jax.Array, dtype=jnp.float32, remat: str = "none"
) -> jax.Array:
    """uint8 [B,V,S,S,3] -> projected tokens [B,V*g*g,D] in `dtype`, view by view, row by row.

    remat: see `siglip.encode_views`. Raises ValueError for a model without a tower.
    """
    if config.tower is None:
        raise ValueError("this model is text only (tower=None): it takes no pictures")
    views = normalise(pixels.reshape(-1, *pixels.shape[2:]))
    features = encode_views(params["tower"], config.tower, views, dtype=dtype, remat=remat)
    tokens = project(params["projector"], features)
    return tokens.reshape(pixels.shape[0], -1, tokens.shape[-1])


def merge(
    params: Tree,
    config: GeoDiTConfig,
    ids: jax.Array,
    image_tokens: jax.Array | None = None,
    rows: jax.Array | None = None,
    weights: jax.Array | None = None,
    dtype=None,
) -> jax.Array:
    """Ids [B,S] and projected tokens [B,R,D] -> embeddings [B,S,D].

    rows int [B,S,K], weights float32 [B,S,K]: the position of an image token (id `IMAGE`) gets the
    sum over k of weights[k] * table[rows[k]]; in the table the newline vector follows the R tokens.
    All weights 0 give a zero vector. Without `image_tokens` every id must be text. dtype: of the
    result; None is that of `image_tokens`, float32 without.
    """
    is_image = ids == IMAGE
    if dtype is None:
        dtype = jnp.float32 if image_tokens is None else image_tokens.dtype
    # Rows are looked up where columns of the table lie, then travel: the table itself never does.
    outer, fsdp = BATCH_AXES[:-1], BATCH_AXES[-1]
    text = constrain(jnp.where(is_image, 0, ids), outer, None)
    text = constrain(llada.embed(params["core"], text, dtype), outer, None, fsdp)
    text = constrain(text, BATCH_AXES, None, None)
    if image_tokens is None:
        return text
    newline = params["newline"]["embedding"]
    newline = jnp.broadcast_to(newline, (ids.shape[0], 1, config.text.width))
    table = jnp.concatenate([image_tokens.astype(dtype), newline.astype(dtype)], axis=1)
    table = constrain(table, BATCH_AXES, None, None)
    # One gather after another: all K at once would need K times the memory of the sequence.
    mixed = sum(
        jax.vmap(lambda table, row: table[row])(table, rows[..., k]) * weights[..., k, None]
        for k in range(rows.shape[-1])
    )
    return jnp.where(is_image[..., None], mixed.astype(dtype), text)
