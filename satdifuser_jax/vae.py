"""Pictures to latents and back: the autoencoder of Stable Diffusion, or a parameter-free one.

Both codecs have methods `encode` and `decode`, properties `factor` (pixels per latent pixel),
`latent_channels` and `scaling_factor` (which callers apply). B batch, S image side, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from common_jax.attention import attend
from common_jax.init import host_init, traced_once
from common_jax.layers import Linear
from satdifuser_jax.blocks import (
    Conv,
    Downsample,
    GroupNorm,
    Numerics,
    ResnetBlock,
    Upsample,
)
from satdifuser_jax.published_config import take_fields, to_json

FIXED = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
IGNORED = {"force_upcast", "down_block_types", "up_block_types"}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes under the names of the published config.json; the defaults are Stable Diffusion 2.1."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 768
    scaling_factor: float = 0.18215

    def __post_init__(self):
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"VAE block_out_channels has {channels}, not divisible by "
                    f"norm_num_groups={self.norm_num_groups}"
                )

    @classmethod
    def from_dict(cls, config: Mapping) -> VAEConfig:
        """From a published config.json. Raises ValueError on a value that is not implemented."""
        for side in ("Down", "Up"):
            name = "Encoder" if side == "Down" else "Decoder"
            types = set(config.get(f"{side.lower()}_block_types", ()))
            if not types <= {f"{side}{name}Block2D"}:
                raise ValueError(f"VAE {side.lower()}_block_types={sorted(types)}: not implemented")
        return cls(**take_fields(cls, config, fixed=FIXED, ignored=IGNORED))

    def to_dict(self) -> dict:
        """A config.json that `from_dict` and torch diffusers read."""
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            **to_json(self),
        }


class MapAttention(nn.Module):
    """Single-head attention over the pixels of a map [B,H,W,C], added to it."""

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        h = GroupNorm(self.numerics.norm_groups, self.numerics.norm_eps, name="group_norm")(x)
        h = h.reshape(batch, height * width, channels)
        q, k, v = (
            Linear(channels, dtype=self.numerics.dtype, name=name)(h)[:, :, None]
            for name in ("query", "key", "value")
        )
        h = attend(q, k, v, implementation=self.numerics.attention)[:, :, 0]
        h = Linear(channels, dtype=self.numerics.dtype, name="proj_attn")(h)
        return x + h.reshape(x.shape)


class VAEMiddle(nn.Module):
    """Resnet, attention, resnet at the latent's resolution."""

    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x, _ = ResnetBlock(x.shape[-1], self.numerics, name="resnets_0")(x)
        x = MapAttention(self.numerics, name="attentions_0")(x)
        return ResnetBlock(x.shape[-1], self.numerics, name="resnets_1")(x)[0]


class VAELevel(nn.Module):
    """Resnets of one resolution, then "down" (padded right and below only), "up" or nothing."""

    features: int
    layers: int
    resample: str | None
    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = self.numerics.dtype
        for i in range(self.layers):
            x, _ = ResnetBlock(self.features, self.numerics, name=f"resnets_{i}")(x)
        if self.resample == "down":
            return Downsample(padding=(0, 1), dtype=dtype, name="downsamplers_0")(x)
        if self.resample == "up":
            return Upsample(dtype=dtype, name="upsamplers_0")(x)
        return x


class Encoder(nn.Module):
    """Images [B,S,S,3] -> moments before quant_conv [B,S/f,S/f,2*latent]."""

    config: VAEConfig
    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, self.numerics.dtype
        x = Conv(config.block_out_channels[0], dtype=dtype, name="conv_in")(x)
        last = len(config.block_out_channels) - 1
        for i, features in enumerate(config.block_out_channels):
            resample = "down" if i < last else None
            shape = (features, config.layers_per_block, resample)
            x = VAELevel(*shape, self.numerics, name=f"down_blocks_{i}")(x)
        x = VAEMiddle(self.numerics, name="mid_block")(x)
        norm = (self.numerics.norm_groups, self.numerics.norm_eps)
        x = nn.silu(GroupNorm(*norm, name="conv_norm_out")(x))
        return Conv(2 * config.latent_channels, dtype=dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents after post_quant_conv [B,s,s,latent] -> images [B,S,S,3]."""

    config: VAEConfig
    numerics: Numerics

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, self.numerics.dtype
        x = Conv(config.block_out_channels[-1], dtype=dtype, name="conv_in")(x)
        x = VAEMiddle(self.numerics, name="mid_block")(x)
        last = len(config.block_out_channels) - 1
        for i, features in enumerate(reversed(config.block_out_channels)):
            resample = "up" if i < last else None
            shape = (features, config.layers_per_block + 1, resample)
            x = VAELevel(*shape, self.numerics, name=f"up_blocks_{i}")(x)
        norm = (self.numerics.norm_groups, self.numerics.norm_eps)
        x = nn.silu(GroupNorm(*norm, name="conv_norm_out")(x))
        return Conv(config.out_channels, dtype=dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """The autoencoder of Stable Diffusion. Use `apply({"params": p}, x, method="encode")`."""

    config: VAEConfig
    dtype: jnp.dtype = jnp.float32
    attention: str = "auto"

    def setup(self):
        config = self.config
        # Every norm of the VAE has eps 1e-6; its config does not say so.
        numerics = Numerics(config.norm_num_groups, 1e-6, self.dtype, self.attention)
        self.encoder = Encoder(config, numerics)
        self.quant_conv = Conv(2 * config.latent_channels, size=1, dtype=self.dtype)
        self.post_quant_conv = Conv(config.latent_channels, size=1, dtype=self.dtype)
        self.decoder = Decoder(config, numerics)

    @property
    def factor(self) -> int:
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def scaling_factor(self) -> float:
        return self.config.scaling_factor

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [B,S,S,3] in [-1,1] -> mean and log-variance [B,S/f,S/f,latent], unscaled.

        The log-variance is clamped to [-30, 20]. S must be divisible by `factor` f.
        """
        check_sides(images, self.factor, self.config.in_channels)
        mean, logvar = jnp.split(self.quant_conv(self.encoder(images)), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Unscaled latents [B,s,s,latent] -> images [B,S,S,3], about [-1,1], not clipped."""
        return self.decoder(self.post_quant_conv(latents))

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.decode(self.encode(images)[0])


class SpaceToDepth(nn.Module):
    """A codec without parameters (params = {}): every p x p patch becomes one latent pixel."""

    patch: int = 4
    image_channels: int = 3

    @property
    def factor(self) -> int:
        return self.patch

    @property
    def latent_channels(self) -> int:
        return self.patch**2 * self.image_channels

    @property
    def scaling_factor(self) -> float:
        return 1.0

    def encode(self, images: jax.Array) -> tuple[jax.Array, None]:
        """Images [B,S,S,3] -> (latents [B,S/p,S/p,3*p*p], None): there is no posterior."""
        check_sides(images, self.patch, self.image_channels)
        pattern = "b (h p) (w q) c -> b h w (p q c)"
        return rearrange(images, pattern, p=self.patch, q=self.patch), None

    def decode(self, latents: jax.Array) -> jax.Array:
        """The exact inverse of `encode`."""
        pattern = "b h w (p q c) -> b (h p) (w q) c"
        return rearrange(latents, pattern, p=self.patch, q=self.patch)


def check_sides(images: jax.Array, factor: int, channels: int) -> None:
    if images.ndim != 4 or images.shape[-1] != channels:
        raise ValueError(f"images {images.shape}: need [B,S,S,{channels}]")
    if images.shape[1] % factor or images.shape[2] % factor:
        raise ValueError(f"images {images.shape}: sides must be divisible by {factor}")


@traced_once
def vae_shapes(config: VAEConfig) -> dict:
    """The parameter tree as `jax.ShapeDtypeStruct`; nothing is computed."""
    vae = AutoencoderKL(config)
    images = jax.ShapeDtypeStruct((1, vae.factor, vae.factor, config.in_channels), jnp.float32)
    return jax.eval_shape(vae.init, jax.random.key(0), images)["params"]


def init_vae(config: VAEConfig, seed: int) -> dict:
    """Random parameters (numpy), layer by layer as torch initialises them."""
    return host_init(vae_shapes(config), seed)
