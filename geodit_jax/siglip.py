"""The SigLIP vision tower: pixels of a view to one feature for every patch.

N views, S pixels per side, p patch size, g = S // p tokens per side, T = g*g tokens, W width. A
pre-norm transformer with a learned position table, no class token and no pooling: the features are
the hidden states behind the last block that runs, before `post_layernorm` (published behaviour of
LLaDA-V, whose towers have lost the block behind it). The norm's parameters are kept because
checkpoints hold them; nothing reads them. Parameters of the blocks are stacked on a leading axis
and scanned.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from common_jax.attention import attend
from common_jax.init import traced_once
from common_jax.layers import LayerNorm, Linear, remat_policy
from common_jax.sharding import BATCH_AXES, constrain
from geodit_jax.config import TowerConfig

Tree = Any


class SelfAttention(nn.Module):
    heads: int
    attention: str = "auto"

    @nn.compact
    def __call__(self, x):
        q, k, v = (
            Linear(x.shape[-1], dtype=x.dtype, name=name)(x).reshape(*x.shape[:2], self.heads, -1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        h = attend(q, k, v, implementation=self.attention).reshape(x.shape)
        return Linear(x.shape[-1], dtype=x.dtype, name="out_proj")(h)


class MLP(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        h = nn.gelu(Linear(self.hidden, dtype=x.dtype, name="fc1")(x), approximate=True)
        return Linear(x.shape[-1], dtype=x.dtype, name="fc2")(h)


class Block(nn.Module):
    """[N,T,W] -> [N,T,W]."""

    config: TowerConfig
    attention: str = "auto"

    @nn.compact
    def __call__(self, x):
        config = self.config
        attention = SelfAttention(config.heads, self.attention, name="self_attn")
        x = x + attention(LayerNorm(config.eps, name="layer_norm1")(x))
        x = x + MLP(config.mlp, name="mlp")(LayerNorm(config.eps, name="layer_norm2")(x))
        return constrain(x, BATCH_AXES, None, None)


@traced_once
def tower_shapes(config: TowerConfig) -> dict:
    """The parameter tree as `jax.ShapeDtypeStruct`, blocks stacked; nothing is computed."""
    width, patch = config.width, config.patch

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def block(key):
        return Block(config, "xla").init(key, jnp.zeros((1, 1, width)))["params"]

    layers = jax.eval_shape(block, jax.random.key(0))
    return {
        "embeddings": {
            "patch_embedding": {"kernel": leaf(patch, patch, 3, width), "bias": leaf(width)},
            "position_embedding": {"embedding": leaf(config.grid**2, width)},
        },
        "layers": jax.tree.map(lambda x: leaf(config.layers, *x.shape), layers),
        "post_layernorm": {"scale": leaf(width), "bias": leaf(width)},
    }


def encode_views(
    tower: Tree,
    config: TowerConfig,
    pixels: jax.Array,
    *,
    dtype=jnp.float32,
    remat: str = "none",
    attention: str = "auto",
) -> jax.Array:
    """Normalised pixels [N,S,S,3] -> features [N,T,W] in `dtype`, tokens row by row.

    Pixels beyond the last whole patch are not seen. remat: what the backward pass computes again of
    every block, `none`, `dots` (all but matmuls) or `full`. Raises ValueError for views of another
    size.
    """
    side = config.image_size
    if pixels.shape[1:] != (side, side, 3):
        raise ValueError(f"pixels {pixels.shape}: this tower needs [N,{side},{side},3]")
    x = _embed_patches(tower["embeddings"], config, pixels.astype(dtype))
    block = Block(config, attention)

    def apply(x, layer):
        return block.apply({"params": layer}, x), None

    policy = remat_policy(remat)
    if remat != "none":
        apply = jax.checkpoint(apply, policy=policy)
    return jax.lax.scan(apply, x, tower["layers"])[0]


def _embed_patches(embeddings: Tree, config: TowerConfig, pixels: jax.Array) -> jax.Array:
    """A convolution whose stride is its size, as one matmul."""
    grid, patch, dtype = config.grid, config.patch, pixels.dtype
    x = pixels[:, : grid * patch, : grid * patch]
    x = x.reshape(-1, grid, patch, grid, patch, 3).swapaxes(2, 3).reshape(-1, grid**2, patch**2 * 3)
    patches = embeddings["patch_embedding"]
    kernel, bias = patches["kernel"].astype(dtype), patches["bias"].astype(dtype)
    x = jnp.dot(x, kernel.reshape(-1, config.width)) + bias
    return x + embeddings["position_embedding"]["embedding"].astype(dtype)
