"""Linear probe: statistics of the taps, standardised by the training set, and one linear layer.

Features as in fusers.py. Classification reads, for every key, tap and channel, the mean and the
standard deviation over space; segmentation reads the channels themselves at every position.

    classification  decoder/linear/{kernel [T*2*C, K], bias [K]}, C channels over all scales
                    feature_stats/decoder/{mean, std} [T*2*C]
    segmentation    decoder/linear_{s}/kernel [T*C_s, K], decoder/bias [K]
                    feature_stats/decoder/{mean_{s}, std_{s}} [T*C_s]

`probe_inputs` gives the vectors, `feature_stats` reads a training set for the state above.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from common_jax.layers import declare
from satdifuser_jax.upernet import resize_bilinear


def pool_taps(features: Sequence):
    """Mean and standard deviation over space: [B, T, 2*C] float32, per scale means then deviations.

    Slice axis 1 for the vector of one key.
    """
    parts = []
    for x in features:
        x = x.astype(jnp.float32)
        mean = x.mean((2, 3))
        spread = jnp.square(x - mean[:, :, None, None]).mean((2, 3))
        # The square root has no slope at 0, which constant maps reach.
        parts += [mean, jnp.sqrt(jnp.maximum(spread, 1e-20))]
    return jnp.concatenate(parts, -1)


def probe_inputs(features: Sequence, *, segments: bool) -> list:
    """What the probe standardises: one [B, D] vector, or [B, H, W, T*C_s] for every scale."""
    if not segments:
        pooled = pool_taps(features)
        return [pooled.reshape(pooled.shape[0], -1)]
    return [
        jnp.moveaxis(x, 1, 3).reshape(x.shape[0], *x.shape[2:4], -1).astype(jnp.float32)
        for x in features
    ]


class LinearProbe(nn.Module):
    """Logits [B, K], or [B, output_side, output_side, K] where output_side is given."""

    num_classes: int
    output_side: int | None = None

    @nn.compact
    def __call__(self, features):
        segments = self.output_side is not None
        inputs = probe_inputs(features, segments=segments)
        scaled = []
        for s, x in enumerate(inputs):
            suffix = f"_{s}" if segments else ""
            mean = self.variable("feature_stats", f"mean{suffix}", jnp.zeros, x.shape[-1:])
            std = self.variable("feature_stats", f"std{suffix}", jnp.ones, x.shape[-1:])
            scaled.append((x - mean.value) / std.value)
        if not segments:
            return nn.Dense(self.num_classes, name="linear")(scaled[0])
        bias = declare(self, "bias", (self.num_classes,))
        side = (self.output_side,) * 2
        logits = bias
        for s, x in enumerate(scaled):
            layer = nn.Dense(self.num_classes, use_bias=False, name=f"linear_{s}")
            logits = logits + resize_bilinear(layer(x), side)
        return logits


def feature_stats(batches: Iterable, *, segments: bool) -> dict:
    """feature_stats of a head, from the batches of a training set.

    A batch holds `features`, a [B, T, H, W, C] for every scale, and `mask` [B], False for rows that
    only fill it up.
    """
    moments = jax.jit(lambda f, mask: batch_moments(probe_inputs(f, segments=segments), mask))
    total = None
    for batch in batches:
        total = merge_moments(total, moments(batch["features"], batch["mask"]))
    return stats_from_moments(total, segments=segments)


def batch_moments(inputs: Sequence, mask) -> list[tuple]:
    """(count, mean, squares about it) of each array of `probe_inputs`, masked rows left out."""
    moments = []
    for x in inputs:
        weight = mask.astype(jnp.float32).reshape(-1, *[1] * (x.ndim - 1))
        axes = tuple(range(x.ndim - 1))
        count = weight.sum() * np.prod(x.shape[1:-1])
        mean = (x * weight).sum(axes) / jnp.maximum(count, 1)
        moments.append((count, mean, (jnp.square(x - mean) * weight).sum(axes)))
    return moments


def merge_moments(a, b):
    """Moments of two disjoint sets together, in float64 on the host; None is the empty set."""
    if a is None:
        return [tuple(np.asarray(v, np.float64) for v in part) for part in b]
    merged = []
    for one, two in zip(a, b):
        (n, mean, square), (m, other, squares) = one, (np.asarray(v, np.float64) for v in two)
        total = max(n + m, 1.0)
        gap = other - mean
        square = square + squares + np.square(gap) * n * m / total
        merged.append((n + m, mean + gap * m / total, square))
    return merged


def stats_from_moments(moments, *, segments: bool) -> dict:
    """feature_stats of a head; channels that never vary keep a deviation of 1."""
    stats = {}
    for s, (count, mean, square) in enumerate(moments):
        suffix = f"_{s}" if segments else ""
        std = np.sqrt(square / max(float(count), 1.0))
        stats[f"mean{suffix}"] = mean.astype(np.float32)
        stats[f"std{suffix}"] = np.where(std > 1e-7, std, 1.0).astype(np.float32)
    return {"decoder": stats}
