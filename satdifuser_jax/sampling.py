"""DDIM sampling: pictures drawn from a diffusion model, with guidance, prompts and metadata."""

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
    backbone: Backbone, spec: SampleConfig, *, index, side: int, metadata=None
) -> jax.Array:
    """Latents [B,side,side,C] float32 of images `index` [B], `side` in latent pixels, one program.

    An image depends on (seed, its index) and on its row of `backbone.context` and of metadata
    alone. The context is one for all [1,S,D] or one per image [B,S,D]. metadata [B,F] normalised; a
    UNet with metadata embeddings that is given none gets zeros, the value of a missing field in its
    training. The unconditional half has the empty prompt and zero metadata. Rows may be sharded.
    """
    fields, count = backbone.unet.config.num_metadata, len(index)
    if metadata is not None and not fields:
        raise ValueError("metadata is given, but this UNet has no metadata embeddings")
    if fields:
        metadata = np.zeros((count, fields), np.float32) if metadata is None else metadata
        if metadata.shape != (count, fields):
            raise ValueError(f"metadata {metadata.shape}: need [{count},{fields}]")
    if len(backbone.context) not in (1, count):
        raise ValueError(f"{len(backbone.context)} prompts for {count} images: give 1 or {count}")
    if spec.is_guided and backbone.uncond is None:
        raise ValueError(
            f"guidance_scale={spec.guidance_scale} needs the embedding of the empty prompt; load "
            "the backbone with it or use guidance_scale=1"
        )
    steps = tuple(
        np.asarray(s, np.float32) for s in backbone.schedule.sampling_steps(spec.num_steps)
    )
    guidance = np.float32(spec.guidance_scale) if spec.is_guided else None
    shape = (side, side, backbone.unet.config.in_channels)
    noise = _draw(np.uint32(spec.seed), index, shape=shape)
    return _denoise(backbone, noise, steps, metadata, guidance)


def decode_latents(backbone: Backbone, latents) -> jax.Array:
    """Latents [B,h,w,C] -> images [B,S,S,3] in [-1,1], clipped."""
    return _decode(backbone, latents)


def sample_images(
    backbone: Backbone, spec: SampleConfig, *, index, side: int, metadata=None
) -> jax.Array:
    """Images [B,S,S,3] in [-1,1]; `side` in latent pixels. See `sample_latents`."""
    latents = sample_latents(backbone, spec, index=index, side=side, metadata=metadata)
    return decode_latents(backbone, latents)


@functools.partial(jit, static_argnames=("shape",))
def _draw(seed, index, *, shape) -> jax.Array:
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(index)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


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
