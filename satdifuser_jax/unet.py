"""The conditional UNet of Stable Diffusion 2 and DiffusionSat, returning its prediction and taps.

B batch, H height and W width of the latent, C channels, S length and D width of the context.
Parameter names are those of the public checkpoints with `.N` written `_N`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from common_jax.init import host_init, traced_once
from common_jax.layers import remat_policy
from satdifuser_jax.blocks import (
    Conv,
    Downsample,
    GroupNorm,
    Numerics,
    ResnetBlock,
    ScalarEmbedding,
    SpatialTransformer,
    Taps,
    Upsample,
)
from satdifuser_jax.published_config import take_fields, to_json

DOWN_TYPES = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UP_TYPES = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}

# Keys of a published config.json that this network implements for one value only.
FIXED = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
    "use_linear_projection": True,
}
# Keys whose value changes nothing here (attention is float32 inside anyway).
IGNORED = {"upcast_attention", "use_metadata", "addition_embed_type_num_heads"}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes of the network, under the names of the published config.json.

    `attention_head_dim` is the number of heads per level (its published name is misleading).
    `num_metadata` > 0 adds that many metadata embeddings, beside the time embedding.
    """

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    cross_attention_dim: int = 1024
    attention_head_dim: int | tuple[int, ...] = (5, 10, 20, 20)
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 96
    num_metadata: int = 0

    def __post_init__(self):
        for name in ("block_out_channels", "down_block_types", "up_block_types"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.attention_head_dim, int):
            object.__setattr__(self, "attention_head_dim", tuple(self.attention_head_dim))
        for name in ("down_block_types", "up_block_types"):
            self._check_types(name, DOWN_TYPES if name == "down_block_types" else UP_TYPES)
        if len(self.heads) != self.levels:
            raise ValueError(
                f"attention_head_dim={self.attention_head_dim} has {len(self.heads)} entries for "
                f"{self.levels} levels; give one number or one per level"
            )
        for channels, heads in zip(self.block_out_channels, self.heads):
            for key, divisor in (("norm_num_groups", self.norm_num_groups), ("heads", heads)):
                if channels % divisor:
                    raise ValueError(
                        f"block_out_channels has {channels}, not divisible by {key}={divisor}"
                    )

    def _check_types(self, name: str, known: Mapping[str, bool]) -> None:
        types = getattr(self, name)
        if len(types) != self.levels or not set(types) <= set(known):
            raise ValueError(
                f"{name}={types}: need {self.levels} of {sorted(known)}, one per level"
            )

    @property
    def levels(self) -> int:
        return len(self.block_out_channels)

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads per level, fine to coarse."""
        given = self.attention_head_dim
        return (given,) * self.levels if isinstance(given, int) else given

    @property
    def use_metadata(self) -> bool:
        return self.num_metadata > 0

    @classmethod
    def sd21(cls, metadata: bool = False) -> UNetConfig:
        """Stable Diffusion 2.1, the backbone of DiffusionSat; with its seven metadata fields."""
        return cls(num_metadata=7 if metadata else 0)

    @classmethod
    def from_dict(cls, config: Mapping) -> UNetConfig:
        """From a published config.json. Raises ValueError on a value that is not implemented."""
        chosen = take_fields(cls, config, fixed=FIXED, ignored=IGNORED)
        if not config.get("use_metadata", chosen.get("num_metadata", 0) > 0):
            chosen["num_metadata"] = 0
        return cls(**chosen)

    def to_dict(self) -> dict:
        """A config.json that `from_dict` and torch diffusers read."""
        name = "SatUNet" if self.use_metadata else "UNet2DConditionModel"
        return {"_class_name": name, "use_metadata": self.use_metadata, **FIXED, **to_json(self)}


def prefixed(prefix: str, taps: Taps) -> Taps:
    return {f"{prefix}.{name}": tap for name, tap in taps.items()}


class Level(nn.Module):
    """Blocks of one resolution: resnets, each followed by a transformer if `heads` > 0.

    `skips` (up path) are concatenated to the input of each resnet, last first. `resample` is
    "down", "up" or None. Returns every map a later level may read (the last one leaves the level)
    and the taps by name.
    """

    features: int
    layers: int
    heads: int
    resample: str | None
    numerics: Numerics

    @nn.compact
    def __call__(self, x, emb, context, skips=()) -> tuple[list[jax.Array], Taps]:
        resnet, transformer = block_types(self.numerics.remat)
        outputs, taps, skips = [], {}, list(skips)
        for i in range(self.layers):
            if skips:
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            x, found = resnet(self.features, self.numerics, name=f"resnets_{i}")(x, emb)
            taps |= prefixed(f"resnets.{i}", found)
            if self.heads:
                block = transformer(self.heads, self.numerics, name=f"attentions_{i}")
                x, found = block(x, context)
                taps |= prefixed(f"attentions.{i}", found)
            outputs.append(x)
        if self.resample == "down":
            outputs.append(Downsample(dtype=self.numerics.dtype, name="downsamplers_0")(x))
        elif self.resample == "up":
            outputs.append(Upsample(dtype=self.numerics.dtype, name="upsamplers_0")(x))
        return outputs, taps


class Middle(nn.Module):
    """Resnet, transformer, resnet at the coarsest resolution."""

    heads: int
    numerics: Numerics

    @nn.compact
    def __call__(self, x, emb, context) -> tuple[jax.Array, Taps]:
        resnet, transformer = block_types(self.numerics.remat)
        features = x.shape[-1]
        x, first = resnet(features, self.numerics, name="resnets_0")(x, emb)
        x, tokens = transformer(self.heads, self.numerics, name="attentions_0")(x, context)
        x, last = resnet(features, self.numerics, name="resnets_1")(x, emb)
        taps = prefixed("attentions.0", tokens)
        return x, taps | prefixed("resnets.0", first) | prefixed("resnets.1", last)


def block_types(remat: str) -> tuple[type[nn.Module], type[nn.Module]]:
    """The resnet and the transformer; the backward pass computes what `remat` says again."""
    policy = remat_policy(remat)
    if remat == "none":
        return ResnetBlock, SpatialTransformer
    return nn.remat(ResnetBlock, policy=policy), nn.remat(SpatialTransformer, policy=policy)


class SatUNet(nn.Module):
    """Noise predictor with metadata embeddings and named taps.

    Call: x [B,H,W,Cin], t [B] (float; -1 is a legal timestep), context [B or 1,S,D], metadata
    [B,num_metadata] already normalised or None (then its embeddings are left out), `taps` a
    static tuple of dotted names such as "up_blocks.3.attentions.0.transformer_blocks.0.attn1".
    Returns the prediction [B,H,W,Cout] and {tap name: [B,h,w,C]}, both in `dtype`. H and W must
    be divisible by 2^(levels-1). Whoever reads only taps pays for no later layer under jit.
    Attention taps are the output of attention before its residual, conv2 taps likewise.
    """

    config: UNetConfig
    dtype: jnp.dtype = jnp.float32
    attention: str = "auto"
    remat: str = "none"

    @nn.compact
    def __call__(self, x, t, context, metadata=None, taps=()) -> tuple[jax.Array, Taps]:
        config = self.config
        self._check(x, context, metadata)
        numerics = Numerics(
            config.norm_num_groups, config.norm_eps, self.dtype, self.attention, self.remat
        )
        emb = self._embed(t, metadata)
        x = Conv(config.block_out_channels[0], dtype=self.dtype, name="conv_in")(x)
        skips, found = self._descend(x, emb, context, numerics)
        x, middle = Middle(config.heads[-1], numerics, name="mid_block")(skips[-1], emb, context)
        found |= prefixed("mid_block", middle)
        x, risen = self._ascend(x, skips, (emb, context), numerics)
        found |= risen
        x = GroupNorm(config.norm_num_groups, config.norm_eps, name="conv_norm_out")(x)
        y = Conv(config.out_channels, dtype=self.dtype, name="conv_out")(nn.silu(x))
        unknown = [name for name in taps if name not in found]
        if unknown:
            raise ValueError(f"unknown taps {unknown}; this UNet has {sorted(found)}")
        return y, {name: found[name] for name in taps}

    def _embed(self, t, metadata) -> jax.Array:
        first = self.config.block_out_channels[0]
        emb = ScalarEmbedding(first, 4 * first, self.dtype, name="time_embedding")(t)
        fields = [
            ScalarEmbedding(first, 4 * first, self.dtype, name=f"metadata_embedding_{i}")
            for i in range(self.config.num_metadata)
        ]
        # At initialisation every field is called, so that its parameters exist.
        if metadata is None and self.is_initializing():
            metadata = jnp.zeros((t.shape[0], len(fields)))
        if metadata is not None:
            for i, field in enumerate(fields):
                emb = emb + field(metadata[:, i])
        return emb

    def _descend(self, x, emb, context, numerics) -> tuple[list[jax.Array], Taps]:
        config, skips, found = self.config, [x], {}
        for i, kind in enumerate(config.down_block_types):
            level = Level(
                config.block_out_channels[i],
                config.layers_per_block,
                config.heads[i] if DOWN_TYPES[kind] else 0,
                "down" if i < config.levels - 1 else None,
                numerics,
                name=f"down_blocks_{i}",
            )
            outputs, taps = level(skips[-1], emb, context)
            skips += outputs
            found |= prefixed(f"down_blocks.{i}", taps)
        return skips, found

    def _ascend(self, x, skips, conditions, numerics) -> tuple[jax.Array, Taps]:
        config, found, skips = self.config, {}, list(skips)
        layers = config.layers_per_block + 1
        for i, kind in enumerate(config.up_block_types):
            level = Level(
                config.block_out_channels[-1 - i],
                layers,
                config.heads[-1 - i] if UP_TYPES[kind] else 0,
                "up" if i < config.levels - 1 else None,
                numerics,
                name=f"up_blocks_{i}",
            )
            outputs, taps = level(x, *conditions, skips[-layers:])
            del skips[-layers:]
            x = outputs[-1]
            found |= prefixed(f"up_blocks.{i}", taps)
        return x, found

    def _check(self, x, context, metadata) -> None:
        config, factor = self.config, 2 ** (self.config.levels - 1)
        if x.ndim != 4 or x.shape[-1] != config.in_channels:
            raise ValueError(f"latents {x.shape}: need [B,H,W,{config.in_channels}]")
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"latents {x.shape}: sides must be divisible by {factor} ({config.levels} levels)"
            )
        if context.shape[-1] != config.cross_attention_dim or (
            context.shape[0] not in (1, x.shape[0])
        ):
            raise ValueError(
                f"context {context.shape} with latents {x.shape}: "
                f"need [{x.shape[0]} or 1,S,{config.cross_attention_dim}]"
            )
        if metadata is not None and metadata.shape != (x.shape[0], config.num_metadata):
            raise ValueError(
                f"metadata {metadata.shape}: this UNet needs [{x.shape[0]},{config.num_metadata}]"
                + ("" if config.use_metadata else "; it has no metadata embeddings, pass None")
            )


@traced_once
def unet_shapes(config: UNetConfig) -> dict:
    """The parameter tree as `jax.ShapeDtypeStruct`; nothing is computed."""
    side = 2 ** (config.levels - 1)
    x = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    context = jax.ShapeDtypeStruct((1, 1, config.cross_attention_dim), jnp.float32)
    return jax.eval_shape(SatUNet(config).init, jax.random.key(0), x, t, context)["params"]


def init_unet(config: UNetConfig, seed: int) -> dict:
    """Random parameters (numpy), layer by layer as torch initialises them."""
    return host_init(unet_shapes(config), seed)
