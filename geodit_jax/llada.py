"""LLaDA, the text core: a LLaMA-shaped transformer in which every token sees every other.

B batch, N tokens whose hidden states are computed, M keys, L layers, D width, H heads, K key-value
heads, E head width. Parameters of all layers are stacked on a leading axis and scanned, or given as
a tuple with one tree a layer (`unstack`), which is run as straight code.

Attention has no order but the positions: a caller may lay tokens out as it likes. The sampler puts
the answer first and the padded prefix behind it, so that `lengths` alone hides padding.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from common_jax.attention import attend, attend_kept
from common_jax.init import traced_once
from common_jax.layers import Linear, RMSNorm, remat_policy
from common_jax.sharding import BATCH_AXES, constrain
from geodit_jax.config import TextConfig

Tree = Any


class KeyValues(NamedTuple):
    """Rotated keys [B,K,E,M] and values [B,K,M,E] of one layer; of all with a leading L or as a
    tuple. The layouts are those that `attend_kept` reads without a copy."""

    k: Any
    v: Any


class Seen(NamedTuple):
    """What a query may attend to; None where nothing is hidden.

    lengths [B] int: keys at or beyond it are hidden. turns: ([B,N] of the queries, [B,M] of the
    keys), a query sees its own turn and earlier ones.
    """

    lengths: jax.Array | None = None
    turns: tuple[jax.Array, jax.Array] | None = None


ALL_SEEN = Seen()


def rotary(positions: jax.Array, width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B,N,1,width/2] float32 of positions [B,N]."""
    exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    angles = positions.astype(jnp.float32)[..., None] * (1.0 / theta**exponents)
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array], cast: str) -> jax.Array:
    """Half-split rotation of [B,N,H,E]: the first half of E pairs with the second.

    It has a gradient by x alone, which is the rotation back.
    """
    return _rotate(x, *angles, jnp.dtype(jnp.float32) if cast == "float32" else x.dtype)


# Derived by JAX, the gradient would fill up each half with zeros and add them, in float32.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotate(x, cos, sin, dtype):
    cos, sin = cos.astype(dtype), sin.astype(dtype)
    a, b = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _rotate_forward(x, cos, sin, dtype):
    return _rotate(x, cos, sin, dtype), (cos, sin)


def _rotate_backward(dtype, angles, gradient):
    cos, sin = angles
    return _rotate(gradient, cos, -sin, dtype), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)


class SelfAttention(nn.Module):
    config: TextConfig
    attention: str = "auto"

    @nn.compact
    def __call__(self, x, angles, past, seen, rows):
        config, dtype = self.config, x.dtype

        def project(name, x, heads):
            y = Linear(heads * config.head_width, use_bias=False, dtype=dtype, name=name)(x)
            y = y.reshape(*y.shape[:2], heads, config.head_width)
            return constrain(y, BATCH_AXES, None, "tensor", None)

        k = rotate(project("k_proj", x, config.kv_heads), angles, config.rope_cast)
        v = project("v_proj", x, config.kv_heads)
        x, angles = x[:, :rows], tuple(part[:, :rows] for part in angles)
        q = rotate(project("q_proj", x, config.heads), angles, config.rope_cast)
        turns = seen.turns and (seen.turns[0][:, :rows], seen.turns[1])
        hidden = {"lengths": seen.lengths, "turns": turns}
        if past is not None:
            h = attend_kept(q, (k, v), past, **hidden)
        else:
            share = config.heads // config.kv_heads
            keys, values = (jnp.repeat(x, share, axis=2) if share > 1 else x for x in (k, v))
            h = attend(q, keys, values, implementation=self.attention, **hidden)
        h = h.reshape(*h.shape[:2], config.width)
        out = Linear(config.width, use_bias=False, dtype=dtype, name="o_proj")(h)
        return out, (k, v)


class MLP(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        def linear(name, features, x):
            return Linear(features, use_bias=False, dtype=x.dtype, name=name)(x)

        gate = linear("gate_proj", self.hidden, x)
        h = nn.silu(gate) * linear("up_proj", self.hidden, x)
        h = constrain(h, BATCH_AXES, None, "tensor")
        return linear("down_proj", x.shape[-1], h)


class Block(nn.Module):
    """x [B,N,D] -> (hidden states of the first `rows` tokens, (k, v) [B,N,K,E] of all N).

    `past`: keys and values of tokens outside x, which stand behind those of x.
    """

    config: TextConfig
    attention: str = "auto"

    @nn.compact
    def __call__(self, x, angles, past, seen, rows=None):
        norm = RMSNorm(self.config.eps, name="input_layernorm")
        h, own = SelfAttention(self.config, self.attention, name="self_attn")(
            norm(x), angles, past, seen, rows
        )
        x = x[:, :rows] + h
        norm = RMSNorm(self.config.eps, name="post_attention_layernorm")
        x = x + MLP(self.config.mlp, name="mlp")(norm(x))
        return constrain(x, BATCH_AXES, None, None), own


@traced_once
def core_shapes(config: TextConfig) -> dict:
    """The parameter tree as `jax.ShapeDtypeStruct`, layers stacked; nothing is computed."""
    width, rows = config.width, config.vocab_rows

    def block(key):
        x = jnp.zeros((1, 1, width))
        angles = rotary(jnp.zeros((1, 1)), config.head_width, config.rope_theta)
        return Block(config, "xla").init(key, x, angles, None, Seen())["params"]

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    layers = jax.eval_shape(block, jax.random.key(0))
    return {
        "embed_tokens": {"embedding": leaf(rows, width)},
        "layers": jax.tree.map(lambda x: leaf(config.layers, *x.shape), layers),
        "norm": {"scale": leaf(width)},
        "lm_head": {"kernel": leaf(width, rows)},
    }


def unstack(core: Tree) -> dict:
    """The same core with one tree a layer: no copy of a layer's weights per step on a CPU."""
    layers = core["layers"]
    count = len(jax.tree.leaves(layers)[0])
    return {**core, "layers": tuple(jax.tree.map(lambda x: x[i], layers) for i in range(count))}  # noqa: B023


def embed(core: Tree, ids: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Token ids [...] -> [...,D]."""
    return core["embed_tokens"]["embedding"][ids].astype(dtype)


def run(
    core: Tree,
    config: TextConfig,
    x: jax.Array,
    positions: jax.Array | tuple[jax.Array, jax.Array],
    *,
    seen: Seen = ALL_SEEN,
    past: KeyValues | None = None,
    rows: int | None = None,
    keep: bool = False,
    remat: str = "none",
    attention: str = "auto",
) -> tuple[jax.Array, KeyValues | None]:
    """Hidden states after the final norm.

    x [B,N,D] embeddings, positions [B,N] int. Returns (hidden [B,rows,D], kept). A loop over calls
    gives `rotary(positions)` made outside: inside, XLA would fuse it into every layer and compute
    each cosine again for each head.
    rows: only the first `rows` tokens are wanted; the last block then computes nothing else.
    keep: return the keys and values of the tokens behind `rows`, for `past` of later calls.
    remat: what the backward pass computes again, `none`, `dots` (all but matmuls) or `full`.
    """
    block = Block(config, attention)
    angles = positions
    if not isinstance(positions, tuple):
        angles = rotary(positions, config.head_width, config.rope_theta)

    def apply(layer, x, past, rows):
        x, own = block.apply({"params": layer}, x, angles, past, seen, rows)
        behind = rows if rows is not None else first
        return x, _keep(*own, behind) if keep else None

    first = 0 if rows is None else rows
    policy = remat_policy(remat)
    if remat != "none":
        apply = jax.checkpoint(apply, policy=policy, static_argnums=(3,))
    layers = core["layers"]
    if isinstance(layers, tuple):
        x, kept = _run_unrolled(apply, layers, x, past, rows)
    elif rows is None:
        x, kept = jax.lax.scan(lambda x, at: apply(at[0], x, at[1], None), x, (layers, past))
    else:
        x, kept = _run_trimmed(apply, layers, x, past, rows)
    return RMSNorm(config.eps).apply({"params": core["norm"]}, x), kept


def _keep(k: jax.Array, v: jax.Array, start: int) -> KeyValues:
    """Keys and values [B,N,K,E] from token `start` on, as `past` takes them."""
    return KeyValues(k[:, start:].transpose(0, 2, 3, 1), v[:, start:].transpose(0, 2, 1, 3))


def _run_unrolled(apply, layers, x, past, rows):
    kept = []
    for i, layer in enumerate(layers):
        before = None if past is None else KeyValues(past.k[i], past.v[i])
        x, own = apply(layer, x, before, rows if i == len(layers) - 1 else None)
        kept.append(own)
    if kept[0] is None:
        return x, None
    return x, KeyValues(tuple(own.k for own in kept), tuple(own.v for own in kept))


def _run_trimmed(apply, layers, x, past, rows):
    """Scan over layer numbers: slicing the stack itself would copy almost all weights."""
    last = len(jax.tree.leaves(layers)[0]) - 1

    def at(i):
        return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, keepdims=False), layers)

    def before(i):
        return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, keepdims=False), past)

    x, kept = jax.lax.scan(lambda x, i: apply(at(i), x, before(i), None), x, jnp.arange(last))
    x, own = apply(at(last), x, before(last), rows)
    if own is not None:
        kept = jax.tree.map(lambda all, one: jnp.concatenate([all, one[None]]), kept, own)
    return x, kept


def logits(core: Tree, hidden: jax.Array) -> jax.Array:
    """[...,D] -> [...,V] float32."""
    kernel = core["lm_head"]["kernel"].astype(hidden.dtype)
    return jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
