"""DDIM sampling: pictures drawn from a diffusion model, with guidance and metadata."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from common_jax.compiler import jit
from satdifuser_jax.extract import Backbone, call_guided, call_unet
from satdifuser_jax.schedule import ddim_step


@dataclass(frozen=True)
class SampleConfig:
    """num_steps: UNet calls. guidance_scale: active above 1 only (the published rule)."""

    num_steps: int = 50
    guidance_scale: float = 1.0
    seed: int = 0

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 1.0


def sample_latents(
    backbone: Backbone, spec: SampleConfig, *, count: int, side: int, metadata=None
) -> jax.Array:
    """`count` latents [count,side,side,C] float32, `side` in latent pixels, one compiled loop.

    Image i depends on (seed, i) alone. metadata [count,F] normalised; a UNet with metadata
    embeddings that is given none gets zeros, the value of a missing field in its training. The
    unconditional half has the empty prompt and zero metadata.
    """
    fields = backbone.unet.config.num_metadata
    if metadata is not None and not fields:
        raise ValueError("metadata is given, but this UNet has no metadata embeddings")
    if fields:
        metadata = jnp.zeros((count, fields)) if metadata is None else jnp.asarray(metadata)
        if metadata.shape != (count, fields):
            raise ValueError(f"metadata {metadata.shape}: need [{count},{fields}]")
    if spec.is_guided and backbone.uncond is None:
        raise ValueError(
            f"guidance_scale={spec.guidance_scale} needs the embedding of the empty prompt; load "
            "the backbone with it or use guidance_scale=1"
        )
    steps = tuple(
        np.asarray(s, np.float32) for s in backbone.schedule.sampling_steps(spec.num_steps)
    )
    guidance = np.float32(spec.guidance_scale) if spec.is_guided else None
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(spec.seed)))(
        jnp.arange(count)
    )
    shape = (side, side, backbone.unet.config.in_channels)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    return _denoise(backbone, noise, steps, metadata, guidance)


def decode_latents(backbone: Backbone, latents) -> jax.Array:
    """Latents [B,h,w,C] -> images [B,S,S,3] in [-1,1], clipped."""
    return _decode(backbone, latents)


def sample_images(
    backbone: Backbone, spec: SampleConfig, *, count: int, side: int, metadata=None
) -> jax.Array:
    """`count` images [count,S,S,3] in [-1,1]; `side` in latent pixels. See `sample_latents`."""
    latents = sample_latents(backbone, spec, count=count, side=side, metadata=metadata)
    return decode_latents(backbone, latents)


@jit
def _denoise(backbone: Backbone, x, steps, metadata, guidance) -> jax.Array:
    def step(x, values):
        t, a, a_next = values
        if guidance is None:
            out, _ = call_unet(backbone, x, jnp.full(len(x), t), backbone.context, metadata)
        else:
            out, _ = call_guided(backbone, x, t, metadata, guidance)
        epsilon = backbone.schedule.to_epsilon(out, x, t)
        return ddim_step(x, epsilon, a, a_next)[0], None

    return jax.lax.scan(step, x, steps)[0]


@jit
def _decode(backbone: Backbone, latents) -> jax.Array:
    latents = latents / backbone.codec.scaling_factor
    images = backbone.codec.apply({"params": backbone.codec_params}, latents, method="decode")
    return jnp.clip(images.astype(jnp.float32), -1.0, 1.0)
