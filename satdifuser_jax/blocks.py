"""Layers shared by the UNet and the VAE, in NHWC.

B batch, H height, W width, C channels, N tokens (N = H*W), S length of the text, D its width.
Convolutions and matmuls run in `Numerics.dtype`; norms and softmax are float32. Blocks return
`(y, taps)`: taps are the intermediate maps a caller may want, by their name inside the block.
What a caller ignores is removed by XLA. Parameters are declared with their shapes only; values
come from a checkpoint or from `common_jax.init.host_init`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from common_jax.attention import attend
from common_jax.layers import LayerNorm, Linear, declare
from common_jax.sharding import BATCH_AXES, constrain

Taps = dict[str, jax.Array]

# Regex on paths -> mesh axes, of every network made of these layers; the first match wins. What no
# rule names (norms, biases) is small and lies whole on every device. `fsdp` splits inputs. Maps
# are held to the batch's axes (`constrain`): else the compiler splits channels as kernels are.
SHARDING_RULES = (
    (r"conv\w*/kernel$", (None, None, "fsdp", None)),
    (r"kernel$", ("fsdp", None)),
    (r"embedding$", (None, "fsdp")),
)


@dataclasses.dataclass(frozen=True)
class Numerics:
    """What every block of one network shares: its norms, compute dtype and memory policy."""

    norm_groups: int = 32
    norm_eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    attention: str = "auto"
    remat: str = "none"  # none | dots | full: what the backward pass computes again


# A CPU spends its time on the weights of a convolution with few pixels and wide channels. As one
# matmul that is 2 to 3 times faster from this size on, and 1.4 times for a whole UNet call.
MATMUL_UP_TO_PIXELS = 8 * 8
MATMUL_FROM_WEIGHTS = 3 * 3 * 512 * 512


def conv2d(
    x: jax.Array, kernel: jax.Array, stride: int = 1, padding: tuple[int, int] = (1, 1)
) -> jax.Array:
    """Convolution of x [B,H,W,C] with kernel [h,w,C,F]; `padding` (before, after) on both axes."""
    native = functools.partial(_convolve, stride=stride, padding=padding)
    pixels = x.shape[1] * x.shape[2] // stride**2
    if pixels > MATMUL_UP_TO_PIXELS or kernel.size < MATMUL_FROM_WEIGHTS:
        return native(x, kernel)
    matmul = functools.partial(_convolve_by_matmul, stride=stride, padding=padding)
    return jax.lax.platform_dependent(x, kernel, cpu=matmul, default=native)


def _convolve(x, kernel, stride, padding) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _convolve_by_matmul(x, kernel, stride, padding) -> jax.Array:
    """Neighbourhoods as rows [B,H',W',h*w*C] times the kernel as a matrix."""
    height, width, _, features = kernel.shape
    x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    rows = (x.shape[1] - height) // stride + 1
    columns = (x.shape[2] - width) // stride + 1
    neighbours = [
        x[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.dot(jnp.concatenate(neighbours, axis=-1), kernel.reshape(-1, features))


class Conv(nn.Module):
    """Square convolution with bias, [B,H,W,C] -> [B,H',W',F]."""

    features: int
    size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = declare(self, "kernel", shape).astype(self.dtype)
        bias = declare(self, "bias", (self.features,)).astype(self.dtype)
        x = x.astype(self.dtype)
        if self.size == 1:
            y = jnp.dot(x, kernel[0, 0])
        else:
            y = conv2d(x, kernel, self.stride, self.padding)
        return constrain(y, BATCH_AXES) + bias


class GroupNorm(nn.Module):
    """Normalise [B,H,W,C] over space and groups of channels, in float32; keeps x's dtype."""

    groups: int
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = declare(self, "scale", (x.shape[-1],))
        bias = declare(self, "bias", (x.shape[-1],))
        wide = x.astype(jnp.float32)
        mean = self._per_group(wide.mean((1, 2)))
        # Two passes: E[x^2] - E[x]^2 loses digits where a map's mean is far from zero.
        variance = self._per_group(jnp.square(wide - mean[:, None, None]).mean((1, 2)))
        gain = jax.lax.rsqrt(variance + self.eps) * scale
        return ((wide - mean[:, None, None]) * gain[:, None, None] + bias).astype(x.dtype)

    def _per_group(self, per_channel: jax.Array) -> jax.Array:
        """Means over each group of [B,C], repeated for its channels."""
        batch, channels = per_channel.shape
        means = per_channel.reshape(batch, self.groups, -1).mean(-1)
        return jnp.repeat(means, channels // self.groups, axis=-1)


def sinusoid(values: jax.Array, width: int) -> jax.Array:
    """[B] -> [B,width] float32: cosines of values * 10000^(-i/(width/2)), then their sines."""
    half = width // 2
    exponents = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / half
    angles = values.astype(jnp.float32)[:, None] * np.exp(exponents)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ScalarEmbedding(nn.Module):
    """One number per image [B] -> [B,features]: sinusoid of width `width`, then two layers."""

    width: int
    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, values: jax.Array) -> jax.Array:
        h = Linear(self.features, dtype=self.dtype, name="linear_1")(sinusoid(values, self.width))
        return Linear(self.features, dtype=self.dtype, name="linear_2")(nn.silu(h))


class ResnetBlock(nn.Module):
    """Two normalised convolutions and a shortcut; the embedding [B,E] shifts the map between."""

    features: int
    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array | None = None) -> tuple[jax.Array, Taps]:
        norm = (self.numerics.norm_groups, self.numerics.norm_eps)
        dtype = self.numerics.dtype
        h = nn.silu(GroupNorm(*norm, name="norm1")(x))
        h = Conv(self.features, dtype=dtype, name="conv1")(h)
        if emb is not None:
            shift = Linear(self.features, dtype=dtype, name="time_emb_proj")(nn.silu(emb))
            h = h + shift[:, None, None]
        h = nn.silu(GroupNorm(*norm, name="norm2")(h))
        h = Conv(self.features, dtype=dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, size=1, dtype=dtype, name="conv_shortcut")(x)
        return x + h, {"conv2": h}


class Attention(nn.Module):
    """Multi-head attention of tokens [B,N,C] over themselves or over a context [B or 1,S,D]."""

    heads: int
    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        batch, tokens, channels = x.shape
        source = x if context is None else context

        def project(name: str, inputs: jax.Array) -> jax.Array:
            layer = Linear(channels, use_bias=False, dtype=self.numerics.dtype, name=name)
            y = constrain(layer(inputs), BATCH_AXES)
            return y.reshape(*inputs.shape[:2], self.heads, -1)

        q = project("to_q", x)
        # A context shared by the batch is projected once, then broadcast.
        shape = (batch, source.shape[1], self.heads, channels // self.heads)
        k = jnp.broadcast_to(project("to_k", source), shape)
        v = jnp.broadcast_to(project("to_v", source), shape)
        h = attend(q, k, v, implementation=self.numerics.attention)
        out = Linear(channels, dtype=self.numerics.dtype, name="to_out_0")
        return constrain(out(h.reshape(batch, tokens, channels)), BATCH_AXES)


class GatedGelu(nn.Module):
    """C -> 4C: value * gelu(gate), exact gelu; one projection holds the value half first."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        both = Linear(8 * x.shape[-1], dtype=self.dtype, name="proj")(x)
        value, gate = jnp.split(constrain(both, BATCH_AXES), 2, axis=-1)
        return value * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = GatedGelu(self.dtype, name="net_0")(x)
        return constrain(Linear(x.shape[-1], dtype=self.dtype, name="net_2")(h), BATCH_AXES)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward on tokens [B,N,C], each on a residual path."""

    heads: int
    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> tuple[jax.Array, Taps]:
        attn1 = Attention(self.heads, self.numerics, name="attn1")(LayerNorm(name="norm1")(x))
        x = x + attn1
        attn2 = Attention(self.heads, self.numerics, name="attn2")
        attn2 = attn2(LayerNorm(name="norm2")(x), context)
        x = x + attn2
        x = x + FeedForward(self.numerics.dtype, name="ff")(LayerNorm(name="norm3")(x))
        return x, {"attn1": attn1, "attn2": attn2}


class SpatialTransformer(nn.Module):
    """One transformer block over the pixels of a map [B,H,W,C], with a residual around it."""

    heads: int
    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> tuple[jax.Array, Taps]:
        batch, height, width, channels = x.shape
        dtype = self.numerics.dtype
        # eps of this norm is 1e-6 in every published Stable Diffusion, whatever norm_eps says.
        h = GroupNorm(self.numerics.norm_groups, 1e-6, name="norm")(x)
        h = h.reshape(batch, height * width, channels)
        h = Linear(channels, dtype=dtype, name="proj_in")(h)
        block = TransformerBlock(self.heads, self.numerics, name="transformer_blocks_0")
        h, taps = block(h, context)
        h = Linear(channels, dtype=dtype, name="proj_out")(h)
        taps = {f"transformer_blocks.0.{name}": tap.reshape(x.shape) for name, tap in taps.items()}
        return x + h.reshape(x.shape), taps


class Downsample(nn.Module):
    """Halve the side by a stride-2 convolution; `padding` (before, after) on both axes."""

    padding: tuple[int, int] = (1, 1)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Conv(x.shape[-1], 3, 2, self.padding, self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Double the side by repetition, then convolve."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return Conv(x.shape[-1], dtype=self.dtype, name="conv")(x)
