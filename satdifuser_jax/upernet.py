"""UPerNet decoder: pyramid pooling on the coarsest map, a feature pyramid down to the finest.

All maps are [B, h, w, P], fine -> coarse, any number of levels. Resizing is bilinear with
half-pixel centres; batch norms see the whole batch (under jit that is the global batch over all
devices), leave out padded rows, and keep the unbiased variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from common_jax.layers import declare

BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1


def resize_bilinear(x, side: tuple[int, int]):
    """[B, h, w, C] -> [B, *side, C], bilinear, half-pixel centres, no antialiasing."""
    if x.shape[1:3] == tuple(side):
        return x
    shape = (x.shape[0], *side, x.shape[3])
    return jax.image.resize(x, shape, "bilinear", antialias=False)


def pooling_matrix(size: int, bins: int) -> np.ndarray:
    """[bins, size] averages over the cells floor(i n/p) .. ceil((i+1) n/p), which may overlap."""
    matrix = np.zeros((bins, size), np.float32)
    for i in range(bins):
        start, stop = i * size // bins, -(-(i + 1) * size // bins)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def pool_adaptive(x, bins: int):
    """[B, h, w, C] -> [B, bins, bins, C]."""
    rows, columns = (pooling_matrix(size, bins) for size in x.shape[1:3])
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x)


class MaskedBatchNorm(nn.Module):
    """Batch norm over rows and positions, float32; rows with mask False count for nothing."""

    features: int

    @nn.compact
    def __call__(self, x, *, train: bool, mask=None):
        scale = declare(self, "scale", (self.features,))
        bias = declare(self, "bias", (self.features,))
        kept_mean = self.variable("batch_stats", "mean", jnp.zeros, (self.features,))
        kept_var = self.variable("batch_stats", "var", jnp.ones, (self.features,))
        x = x.astype(jnp.float32)
        mean, var = kept_mean.value, kept_var.value
        if train:
            if int(np.prod(x.shape[:3])) == 1:
                raise ValueError(
                    "batch norm over a single value (batch 1, 1x1 map) has no variance: "
                    "train with a batch of at least 2"
                )
            mean, var, unbiased = _moments(x, mask)
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                keep = 1 - BATCH_NORM_MOMENTUM
                kept_mean.value = keep * kept_mean.value + BATCH_NORM_MOMENTUM * mean
                kept_var.value = keep * kept_var.value + BATCH_NORM_MOMENTUM * unbiased
        return (x - mean) * (jax.lax.rsqrt(var + BATCH_NORM_EPS) * scale) + bias


def _moments(x, mask):
    """(mean, biased variance, unbiased variance) over rows and positions."""
    positions = x.shape[1] * x.shape[2]
    if mask is None:
        weight, count = 1.0, float(x.shape[0] * positions)
    else:
        weight = mask.astype(jnp.float32)[:, None, None, None]
        count = jnp.maximum(weight.sum() * positions, 1.0)
    mean = (x * weight).sum((0, 1, 2)) / count
    squares = (jnp.square(x - mean) * weight).sum((0, 1, 2))
    return mean, squares / count, squares / jnp.maximum(count - 1, 1.0)


class ConvBN(nn.Module):
    """Convolution with bias, batch norm, ReLU."""

    features: int
    size: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, *, train: bool, mask=None):
        window = (self.size, self.size)
        x = nn.Conv(self.features, window, padding="SAME", dtype=self.dtype, name="conv")(x)
        return nn.relu(MaskedBatchNorm(self.features, name="norm")(x, train=train, mask=mask))


class Upsample2(nn.Module):
    """2x2 transposed convolution with stride 2; kernel [2, 2, in, out]."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (2, 2, x.shape[-1], self.features)
        kernel = declare(self, "kernel", shape).astype(self.dtype)
        bias = declare(self, "bias", (self.features,)).astype(self.dtype)
        b, h, w, _ = x.shape
        y = jnp.einsum("bhwc,ijcd->bhiwjd", x.astype(self.dtype), kernel)
        return y.reshape(b, 2 * h, 2 * w, self.features) + bias


class NeckLevel(nn.Module):
    """One level of the neck: rescale by 4, 2 (learned), 1 (identity), 0.5 or 0.25 (max pooling)."""

    rescale: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, *, train: bool, mask=None):
        features = x.shape[-1]
        if self.rescale in (2, 4):
            x = Upsample2(features, self.dtype, name="up_0")(x)
        if self.rescale == 4:
            x = MaskedBatchNorm(features, name="norm")(x, train=train, mask=mask)
            x = nn.gelu(x, approximate=False)
            x = Upsample2(features, self.dtype, name="up_1")(x)
        if self.rescale < 1:
            window = (round(1 / self.rescale),) * 2
            x = nn.max_pool(x, window, strides=window)
        return x


class UPerNet(nn.Module):
    """Maps [B, h, w, P], fine -> coarse, to logits [B, output_side, output_side, K]."""

    num_classes: int
    output_side: int
    channels: int = 512
    pool_scales: Sequence[int] = (1, 2, 3, 6)
    rescales: Sequence[float] | None = None
    dropout: float = 0.1
    dtype: Any = jnp.float32

    def block(self, size, name):
        return ConvBN(self.channels, size, self.dtype, name=name)

    @nn.compact
    def __call__(self, maps, *, train: bool = False, mask=None, keys=None):
        how = {"train": train, "mask": mask}
        rescales = self.rescales or (1,) * len(maps)
        check_rescales(rescales, len(maps))
        maps = [
            NeckLevel(rescale, self.dtype, name=f"neck_ops_{i}")(x, **how)
            for i, (rescale, x) in enumerate(zip(rescales, maps))
        ]
        top = self.block(3, "bottleneck")(self._pool_pyramid(maps[-1], how), **how)
        levels = [self.block(1, f"lateral_convs_{i}")(x, **how) for i, x in enumerate(maps[:-1])]
        levels.append(top)
        for i in reversed(range(len(levels) - 1)):
            levels[i] += resize_bilinear(levels[i + 1], levels[i].shape[1:3])
        outs = [self.block(3, f"fpn_convs_{i}")(x, **how) for i, x in enumerate(levels[:-1])]
        outs.append(top)
        outs = [resize_bilinear(x, outs[0].shape[1:3]) for x in outs]
        x = self.block(3, "fpn_bottleneck")(jnp.concatenate(outs, -1), **how)
        if train and self.dropout > 0:
            x = drop_channels(x, self.dropout, keys)
        x = nn.Conv(self.num_classes, (1, 1), dtype=self.dtype, name="conv_seg")(x)
        return resize_bilinear(x.astype(jnp.float32), (self.output_side,) * 2)

    def _pool_pyramid(self, x, how):
        branches = [x]
        for i, bins in enumerate(self.pool_scales):
            pooled = self.block(1, f"psp_modules_{i}")(pool_adaptive(x, bins), **how)
            branches.append(resize_bilinear(pooled, x.shape[1:3]))
        return jnp.concatenate(branches, -1)


def check_rescales(rescales, levels: int) -> None:
    """Raises ValueError unless there is one legal factor a level."""
    if len(rescales) != levels or not set(rescales) <= {4, 2, 1, 0.5, 0.25}:
        raise ValueError(
            f"rescales is {tuple(rescales)} for {levels} levels: give one of 4, 2, 1, 0.5, 0.25 "
            "for each level"
        )


def drop_channels(x, rate: float, keys):
    """Zero whole channels of [B, h, w, C] with probability `rate`, each row by its own key."""
    if keys is None:
        raise ValueError("channel dropout in training needs one random key per row: pass keys")
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (x.shape[-1],)))(keys)
    return jnp.where(keep[:, None, None, :], x / (1 - rate), 0.0)
