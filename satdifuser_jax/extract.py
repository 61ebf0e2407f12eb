"""A frozen diffusion model becomes features: encode, invert or noise, and read taps at kept times.

B batch, S image side, h w latent sides, C channels, T kept times (cleanest first), D context width.
The ten evaluations of an inversion are a Python loop over one compiled call; parameters are
arguments of it, never constants. Every operation is per image, so the batch axis may be sharded
over a mesh, and a result depends on (seed, image index), never on the batch an image is in.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from common_jax.compiler import jit
from satdifuser_jax.extract_config import ExtractConfig, Step, inversion_steps
from satdifuser_jax.preprocess import check_side
from satdifuser_jax.schedule import Schedule, ddim_step
from satdifuser_jax.taps import Scale
from satdifuser_jax.unet import SatUNet
from satdifuser_jax.vae import AutoencoderKL, SpaceToDepth

Features = tuple[jax.Array, ...]  # one [B,T,H,W,C] per scale, fine to coarse

# Separate random streams of one seed.
_POSTERIOR, _NOISE = 0, 1


@struct.dataclass
class Backbone:
    """The frozen model. A pytree: pass it to jitted functions as an argument, never close over it.

    context [1,S,D]: the prompt's embedding, in sampling also one per picture [B,S,D]; uncond
    [1,S,D]: the empty prompt's, for guidance.
    """

    unet: SatUNet = struct.field(pytree_node=False)
    unet_params: dict
    codec: AutoencoderKL | SpaceToDepth = struct.field(pytree_node=False)
    codec_params: dict
    schedule: Schedule = struct.field(pytree_node=False)
    context: jax.Array
    uncond: jax.Array | None = None

    @property
    def image_multiple(self) -> int:
        """Image sides must be divisible by this."""
        return self.codec.factor * 2 ** (self.unet.config.levels - 1)

    def latent_side(self, image_side: int) -> int:
        """Side of the latents of images of `image_side`; refuses sides that do not fit."""
        return check_side(image_side, self.image_multiple) // self.codec.factor


class Extraction(NamedTuple):
    """Everything one pass yields: features, the latents [B,T,h,w,C] they are of, and x0 likewise.

    x0 is the clean latent the network predicts at each kept time; None when noising.
    """

    features: Features
    latents: jax.Array
    x0: jax.Array | None


def encode_latents(backbone: Backbone, images, config: ExtractConfig, index=None) -> jax.Array:
    """Images [B,S,S,3] in [-1,1] -> latents float32 [B,h,w,C], scaled as the UNet expects.

    `index` [B] (position of each image in its data set) decides the draw of posterior="sample".
    """
    side = images.shape[1:3]
    if len(images.shape) != 4:
        raise ValueError(f"images {images.shape}: need [B,S,S,3]")
    check_side(tuple(side), backbone.image_multiple)
    drawn = (
        _indices(index, len(images), "posterior=sample") if config.posterior == "sample" else None
    )
    mean, logvar = encode_moments(backbone, images)
    logvar = None if drawn is None else logvar
    return draw_latents(backbone.codec, mean, logvar, drawn, np.uint32(config.seed))


def invert(backbone: Backbone, z0, config: ExtractConfig, metadata=None) -> jax.Array:
    """Latents z0 [B,h,w,C] -> the inverted latents at the kept keys [B,T,h,w,C], float32.

    These are all that later passes need (`features_at`); the last key costs no evaluation.
    """
    metadata, backbone = _metadata(backbone, metadata, len(z0), config), on_device(backbone)
    keys, x, kept = config.inversion_keys(backbone.schedule), jnp.asarray(z0, jnp.float32), []
    for step in inversion_steps(config, backbone.schedule):
        if step.key in keys:
            kept.append(x)
        if step.key > min(keys):
            x, _, _ = _run(backbone, x, step, metadata, config, scales=())
    return jnp.stack(kept, axis=1)


def noise_latents(backbone: Backbone, z0, config: ExtractConfig, index) -> jax.Array:
    """z0 [B,h,w,C] noised to each kept time [B,T,h,w,C]; draws by (seed, image index, time)."""
    drawn = _indices(index, len(z0), f"mode={config.mode}")
    times = np.asarray(config.times(backbone.schedule), np.int32)
    return _noise(backbone.schedule, z0, drawn, np.uint32(config.seed), times)


def latents_at_times(backbone, z0, config: ExtractConfig, *, index=None, metadata=None):
    """The latents [B,T,h,w,C] at the kept times, by inversion or by noising: what a cache keeps."""
    if config.mode == "inversion":
        return invert(backbone, z0, config, metadata)
    return noise_latents(backbone, z0, config, index)


def features_at(backbone: Backbone, latents, config: ExtractConfig, metadata=None) -> Features:
    """Taps of latents [B,T,h,w,C] at the kept times, all T as one batch of B*T.

    Returns one [B,T,H,W,C] per scale. May be called inside a jitted function.
    """
    _require_taps(config)
    times = config.times(backbone.schedule)
    if latents.shape[1] != len(times):
        raise ValueError(f"latents {latents.shape} hold {latents.shape[1]} times, not {times}")
    metadata = _metadata(backbone, metadata, len(latents), config)
    options = {"scales": config.scales, "times": times, "dtype": config.dtype}
    return _features_at(backbone, latents, metadata, **options)


def extract(backbone, z0, config: ExtractConfig, *, index=None, metadata=None) -> Extraction:
    """One pass from latents z0 [B,h,w,C]: the published ten calls, or noising and one call."""
    _require_taps(config)
    if config.mode != "inversion":
        latents = noise_latents(backbone, z0, config, index)
        return Extraction(features_at(backbone, latents, config, metadata), latents, None)
    metadata, backbone = _metadata(backbone, metadata, len(z0), config), on_device(backbone)
    keys, x, kept = config.inversion_keys(backbone.schedule), jnp.asarray(z0, jnp.float32), []
    for step in inversion_steps(config, backbone.schedule):
        x_next, x0, features = _run(backbone, x, step, metadata, config, scales=config.scales)
        if step.key in keys:
            kept.append(Extraction(features, x, x0))
        x = x_next
    return jax.tree.map(lambda *per_time: jnp.stack(per_time, axis=1), *kept)


def extract_features(
    backbone: Backbone, images, config: ExtractConfig, *, index=None, metadata=None
) -> Features:
    """Images [B,S,S,3] in [-1,1] -> features, one [B,T,H,W,C] per scale, fine to coarse."""
    z0 = encode_latents(backbone, images, config, index)
    return extract(backbone, z0, config, index=index, metadata=metadata).features


def on_device(backbone: Backbone) -> Backbone:
    """The backbone with host arrays copied to the device once, instead of at every call."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf) if type(leaf) is np.ndarray else leaf, backbone
    )


# ------------------------------------------------------------------------------- compiled parts
@jit
def encode_moments(backbone: Backbone, images):
    """Images [B,S,S,3] -> (mean, log-variance or None), float32 [B,h,w,C], not yet scaled."""
    params = {"params": backbone.codec_params}
    images = jnp.asarray(images, jnp.float32)
    mean, logvar = backbone.codec.apply(params, images, method="encode")
    mean = mean.astype(jnp.float32)
    return mean, None if logvar is None else logvar.astype(jnp.float32)


@functools.partial(jit, static_argnames=("codec",))
def draw_latents(codec, mean, logvar, index, seed) -> jax.Array:
    """Scaled latents of moments [B,h,w,C]: a draw by (seed, index [B]); the mean without logvar."""
    if logvar is not None:
        mean = mean + jnp.exp(0.5 * logvar) * _draw(seed, _POSTERIOR, index, mean.shape[1:])
    return mean * codec.scaling_factor


def _run(backbone, x, step: Step, metadata, config: ExtractConfig, *, scales):
    """One evaluation and DDIM step: (x at t_next, predicted x0, features of this evaluation)."""
    if config.is_guided and backbone.uncond is None:
        raise ValueError(
            "guidance_scale is set, but the backbone has no embedding of the empty prompt"
        )
    guidance = np.float32(config.guidance_scale) if config.is_guided else None
    times = np.float32(step.t), np.float32(step.t_next)
    static = {"scales": scales, "prediction": config.prediction_type, "dtype": config.dtype}
    made = _evaluate(backbone, x, times, metadata, guidance, **static)
    if jax.default_backend() == "cpu":
        # A CPU sets memory aside for every call that is queued: ten calls would hold ten times.
        jax.block_until_ready(made)
    return made


@functools.partial(jit, static_argnames=("scales", "prediction", "dtype"))
def _evaluate(backbone: Backbone, x, times, metadata, guidance, *, scales, prediction, dtype):
    schedule, (t, t_next) = backbone.schedule, times
    if guidance is None:
        out, taps = call_unet(backbone, x, jnp.full(len(x), t), backbone.context, metadata, scales)
    else:
        out, taps = call_guided(backbone, x, t, metadata, guidance, scales)
    epsilon = schedule.to_epsilon(out, x, t, prediction)
    x_next, x0 = ddim_step(x, epsilon, schedule.alpha_bar(t), schedule.alpha_bar(t_next))
    return x_next, x0, _join(taps, scales, dtype)


def call_guided(backbone: Backbone, x, t, metadata, guidance, scales=()):
    """(guided output, conditional taps by name) of the UNet on x [B,h,w,C] at scalar t.

    out = uncond + guidance * (cond - uncond); the unconditional half has the empty prompt and zero
    metadata. Both are one batch, rows in pairs, so that a sharded batch stays where it is.
    """
    batch = len(x)
    both = (jnp.asarray(e) for e in (backbone.context, backbone.uncond))
    pairs = [jnp.broadcast_to(e, (batch, *e.shape[1:])) for e in both]
    context = jnp.stack(pairs, axis=1).reshape(2 * batch, *pairs[0].shape[1:])
    if metadata is not None:
        metadata = jnp.stack([metadata, jnp.zeros_like(metadata)], 1).reshape(2 * batch, -1)
    rows = jnp.repeat(x, 2, axis=0)
    out, taps = call_unet(backbone, rows, jnp.full(len(rows), t), context, metadata, scales)
    out = out.astype(jnp.float32).reshape(batch, 2, *out.shape[1:])
    taps = {name: tap.reshape(batch, 2, *tap.shape[1:])[:, 0] for name, tap in taps.items()}
    return out[:, 1] + guidance * (out[:, 0] - out[:, 1]), taps


@functools.partial(jit, static_argnames=("scales", "times", "dtype"))
def _features_at(backbone: Backbone, latents, metadata, *, scales, times, dtype) -> Features:
    batch, count = latents.shape[:2]
    x = latents.reshape(batch * count, *latents.shape[2:])
    t = jnp.tile(jnp.asarray(times, jnp.float32), batch)
    metadata = None if metadata is None else jnp.repeat(metadata, count, axis=0)
    _, taps = call_unet(backbone, x, t, backbone.context, metadata, scales)
    return tuple(f.reshape(batch, count, *f.shape[1:]) for f in _join(taps, scales, dtype))


@functools.partial(jit, static_argnames=("schedule",))
def _noise(schedule: Schedule, z0, index, seed, times):
    noise = jax.vmap(lambda t: _draw(seed, _NOISE, index, z0.shape[1:], t), out_axes=1)(times)
    a = schedule.alpha_bar(times).reshape(1, -1, 1, 1, 1)
    return jnp.sqrt(a) * jnp.asarray(z0, jnp.float32)[:, None] + jnp.sqrt(1.0 - a) * noise


def call_unet(backbone: Backbone, x, t, context, metadata, scales=()):
    """(output, taps by name) of the UNet on x [B,h,w,C] at t [B]."""
    names = tuple(name for scale in scales for name in scale.taps)
    params = {"params": backbone.unet_params}
    return backbone.unet.apply(params, x, t, context, metadata, taps=names)


def _join(taps: dict, scales: tuple[Scale, ...], dtype: str) -> Features:
    for name, side in ((name, scale.side) for scale in scales for name in scale.taps):
        if taps[name].shape[1] != side:
            raise ValueError(
                f"tap {name} has side {taps[name].shape[1]}, but its scale was chosen for side "
                f"{side}; call select_taps with the side of these latents"
            )
    joined = (jnp.concatenate([taps[name] for name in s.taps], axis=-1) for s in scales)
    return tuple(features.astype(dtype) for features in joined)


def _draw(seed, stream: int, index, shape, time=0) -> jax.Array:
    """Normal noise [B, *shape], each row a function of (seed, stream, time, its index) alone."""
    base = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), time)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(base, i), shape))(index)


# -------------------------------------------------------------------------------------- checks
def _indices(index, batch: int, why: str) -> jax.Array | np.ndarray:
    if index is None or len(index) != batch:
        found = None if index is None else len(index)
        raise ValueError(f"{why} needs the index of each of {batch} images, found {found}")
    if isinstance(index, jax.Array):
        return index.astype(jnp.uint32)
    return (np.asarray(index, np.int64) & 0xFFFFFFFF).astype(np.uint32)


def _metadata(backbone: Backbone, metadata, batch: int, config: ExtractConfig):
    """What the UNet is given: None, zeros or the images' own [B,F]."""
    fields = backbone.unet.config.num_metadata
    if config.metadata == "none":
        return None
    if not fields:
        raise ValueError(
            f"metadata={config.metadata}, but this UNet has no metadata embeddings; use "
            "metadata=none or load the checkpoint with use_metadata"
        )
    if config.metadata == "zeros":
        return jnp.zeros((batch, fields), jnp.float32)
    if metadata is None:
        raise ValueError("metadata=record, but the images carry none; use metadata=zeros or none")
    return jnp.asarray(metadata, jnp.float32)


def _require_taps(config: ExtractConfig) -> None:
    if not config.scales:
        raise ValueError("no taps chosen: set scales with satdifuser_jax.taps.select_taps")
