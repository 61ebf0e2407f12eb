"""The text tower of CLIP: token ids to the hidden states that condition the UNet.

B batch, S tokens, D width, H heads. Pre-norm transformer with a causal mask and nothing else: the
published pipelines pass no padding mask, so padded positions take part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from common_jax.attention import attend
from common_jax.compiler import jit
from common_jax.init import host_init, traced_once
from common_jax.layers import LayerNorm, Linear, declare
from satdifuser_jax.published_config import to_json

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes under the names of the published config.json; defaults: Stable Diffusion 2.1."""

    vocab_size: int = 49408
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 23
    num_attention_heads: int = 16
    max_position_embeddings: int = 77
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={self.hidden_act!r}: need one of {sorted(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by "
                f"num_attention_heads={self.num_attention_heads}"
            )

    @classmethod
    def from_dict(cls, config: Mapping) -> TextConfig:
        """From a published config.json; of its many general keys only the sizes matter here.

        Raises ValueError on an activation that is not implemented.
        """
        own = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in config.items() if key in own})

    def to_dict(self) -> dict:
        """A config.json that `from_dict` and torch transformers read."""
        return {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            **to_json(self),
        }


class Embedding(nn.Module):
    """A table [count, width] looked up by integer ids."""

    count: int
    width: int

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        return declare(self, "embedding", (self.count, self.width))[ids]


class Embeddings(nn.Module):
    """Token plus position embeddings, [B,S] -> [B,S,D]."""

    config: TextConfig

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        config = self.config
        token = Embedding(config.vocab_size, config.hidden_size, name="token_embedding")
        position = Embedding(
            config.max_position_embeddings, config.hidden_size, name="position_embedding"
        )
        return token(ids) + position(jnp.arange(ids.shape[1]))


class SelfAttention(nn.Module):
    """Causal multi-head attention over [B,S,D]."""

    heads: int
    dtype: jnp.dtype = jnp.float32
    attention: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (
            Linear(x.shape[-1], dtype=self.dtype, name=name)(x).reshape(
                *x.shape[:2], self.heads, -1
            )
            for name in ("q_proj", "k_proj", "v_proj")
        )
        h = attend(q, k, v, causal=True, implementation=self.attention)
        return Linear(x.shape[-1], dtype=self.dtype, name="out_proj")(h.reshape(x.shape))


class MLP(nn.Module):
    hidden: int
    activation: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = ACTIVATIONS[self.activation](Linear(self.hidden, dtype=self.dtype, name="fc1")(x))
        return Linear(x.shape[-1], dtype=self.dtype, name="fc2")(h)


class Layer(nn.Module):
    config: TextConfig
    dtype: jnp.dtype = jnp.float32
    attention: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        attention = SelfAttention(
            config.num_attention_heads, self.dtype, self.attention, name="self_attn"
        )
        mlp = MLP(config.intermediate_size, config.hidden_act, self.dtype, name="mlp")
        x = x + attention(LayerNorm(config.layer_norm_eps, name="layer_norm1")(x))
        return x + mlp(LayerNorm(config.layer_norm_eps, name="layer_norm2")(x))


class Layers(nn.Module):
    config: TextConfig
    dtype: jnp.dtype = jnp.float32
    attention: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, self.dtype, self.attention, name=f"layers_{i}")(x)
        return x


class CLIPTextModel(nn.Module):
    """Token ids int32 [B,S] -> last hidden state after the final norm [B,S,D]."""

    config: TextConfig
    dtype: jnp.dtype = jnp.float32
    attention: str = "auto"

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        config = self.config
        if ids.ndim != 2 or ids.shape[1] > config.max_position_embeddings:
            raise ValueError(
                f"token ids {ids.shape}: need [B,S] with S <= {config.max_position_embeddings}"
            )
        x = Embeddings(config, name="embeddings")(ids).astype(self.dtype)
        x = Layers(config, self.dtype, self.attention, name="encoder")(x)
        return LayerNorm(config.layer_norm_eps, name="final_layer_norm")(x)


@struct.dataclass
class TextTower:
    """A frozen tower. A pytree: pass it to jitted functions as an argument, never close over it."""

    model: CLIPTextModel = struct.field(pytree_node=False)
    params: dict


@jit
def embed_ids(tower: TextTower, ids) -> jax.Array:
    """Token ids [B,S] -> embeddings [B,S,D] in the dtype of the tower."""
    return tower.model.apply({"params": tower.params}, ids)


@traced_once
def text_encoder_shapes(config: TextConfig) -> dict:
    """The parameter tree as `jax.ShapeDtypeStruct`; nothing is computed."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(CLIPTextModel(config).init, jax.random.key(0), ids)["params"]


def init_text_encoder(config: TextConfig, seed: int) -> dict:
    """Random parameters (numpy): linear layers as torch initialises them, embeddings N(0, 0.02)."""
    return host_init(text_encoder_shapes(config), seed)
