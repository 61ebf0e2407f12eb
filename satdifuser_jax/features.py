"""What is kept of an extraction: its description, and the function that computes it for a batch.

`describe` names everything that latents or taps depend on. `satdifuser_jax.cache.build_cache` keeps
them for training, `satdifuser_jax.feature_files.write_features` writes them for any other use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from satdifuser_jax.cache import Batch, Encode
from satdifuser_jax.cache_spec import CacheSpec, Field
from satdifuser_jax.extract import (
    Backbone,
    ExtractConfig,
    encode_latents,
    extract,
    latents_at_times,
    on_device,
)
from satdifuser_jax.preprocess import PIXEL_TRANSFORM

KINDS = ("latents", "taps")
POOLS = ("none", "mean", "mean_std")


def describe(
    kind: str,
    backbone: Backbone,
    config: ExtractConfig,
    *,
    model: str,
    source: str,
    rows: int,
    side: int,
    dtype: str = "float16",
    pool: str = "none",
    transform: str = PIXEL_TRANSFORM,
) -> CacheSpec:
    """The spec of a cache or of feature files: its key changes with whatever changes a number.

    model: fingerprint of weights, module settings, schedule and prompt embeddings. source:
    fingerprint of the images and their metadata, in order. side: of the images, in pixels.
    transform: how a picture became pixels, beside its size. dtype: of taps; latents are float32.
    """
    if kind not in KINDS or pool not in POOLS:
        raise ValueError(f"kind={kind!r}, pool={pool!r}: choose from {KINDS} and {POOLS}")
    if kind == "taps" and not config.scales:
        raise ValueError("no taps chosen: set scales with satdifuser_jax.taps.select_taps")
    times, latent_side = config.times(backbone.schedule), backbone.latent_side(side)
    identity = {"model": model, "source": source, "transform": transform, "side": int(side)}
    identity |= {"mode": config.mode, "times": list(times), "metadata": config.metadata}
    identity |= {"posterior": config.posterior}
    if config.mode == "inversion":
        identity |= {
            "num_timesteps": config.num_timesteps,
            "prediction_type": config.prediction_type,
            "guidance_scale": config.guidance_scale,
        }
    if config.mode != "inversion" or config.posterior == "sample":
        identity["seed"] = config.seed
    if kind == "latents":
        channels = backbone.unet.config.in_channels
        shape = (len(times), latent_side, latent_side, channels)
        return CacheSpec(kind, rows, (Field("latents", shape),), identity)
    identity |= {"taps": [[s.side, list(s.taps)] for s in config.scales], "pool": pool}
    fields = tuple(
        Field(f"scale_{i}", _tap_shape(len(times), scale, pool), dtype)
        for i, scale in enumerate(config.scales)
    )
    return CacheSpec(kind, rows, fields, identity)


def _tap_shape(times: int, scale, pool: str) -> tuple[int, ...]:
    channels = sum(scale.channels)
    if pool == "none":
        return (times, scale.side, scale.side, channels)
    return (times, channels * (2 if pool == "mean_std" else 1))


def make_encoder(
    backbone: Backbone,
    config: ExtractConfig,
    spec: CacheSpec,
    put: Callable[[Batch], Batch] | None = None,
) -> Encode:
    """batch -> the arrays of `spec`; the batch holds `pixels` [b,S,S,3] in [-1,1] and `index` [b],
    `metadata` [b,F] where the config asks for it. `put` may place the batch on a mesh first.
    """
    backbone, pool = on_device(backbone), spec.identity.get("pool", "none")
    config = dataclasses.replace(config, dtype=spec.fields[0].dtype)

    def encode(batch: Batch) -> Sequence[jax.Array]:
        batch = put(batch) if put else batch
        index, metadata = batch["index"], batch.get("metadata")
        z0 = encode_latents(backbone, batch["pixels"], config, index)
        if spec.kind == "latents":
            return (latents_at_times(backbone, z0, config, index=index, metadata=metadata),)
        features = extract(backbone, z0, config, index=index, metadata=metadata).features
        return features if pool == "none" else pool_features(features, pool)

    return encode


def pool_features(features: Sequence[jax.Array], pool: str) -> tuple[jax.Array, ...]:
    """Maps [B,T,H,W,C] -> means over pixels [B,T,C], or means and deviations [B,T,2C]."""
    pooled = []
    for maps in features:
        exact = maps.astype(jnp.float32)
        parts = [exact.mean((2, 3))]
        if pool == "mean_std":
            parts.append(exact.std((2, 3)))
        pooled.append(jnp.concatenate(parts, axis=-1).astype(maps.dtype))
    return tuple(pooled)
