"""What a pretraining is built of, and where the weights of each part lie.

`find_parts` reads config files alone, so that a run can be planned before any weights are there;
the `load_*` functions read arrays; given a mesh, every process reads its own slices only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from common_jax.init import host_init
from common_jax.weights import flatten, unflatten
from satdifuser_jax.backbone import METADATA_FIELDS, find_places, read_codec
from satdifuser_jax.components import find_components
from satdifuser_jax.convert import load_text_encoder, load_unet, load_vae, read_config
from satdifuser_jax.prompts import PromptTokenizer, load_tokenizer
from satdifuser_jax.schedule import Schedule
from satdifuser_jax.text_encoder import CLIPTextModel, TextConfig, TextTower, text_encoder_shapes
from satdifuser_jax.torch_names import METADATA
from satdifuser_jax.unet import UNetConfig, unet_shapes
from satdifuser_jax.vae import AutoencoderKL, SpaceToDepth, VAEConfig, vae_shapes

SD21 = "sd21"  # a part of these sizes whose weights are not at hand: enough to plan a run
NO_TEXT = "none"


@dataclasses.dataclass(frozen=True)
class Parts:
    """Sizes of the network, its codec and its text tower; `folders` has those with weights."""

    unet: UNetConfig
    codec: AutoencoderKL | SpaceToDepth
    text: TextConfig | None
    schedule: Schedule
    folders: Mapping[str, Path]

    def require(self, name: str, setting: str) -> Path:
        """Folder of a part that has weights; ValueError says which setting names one."""
        if name not in self.folders:
            raise ValueError(
                f"no weights of the {name}: set {setting} to a folder in the public layout, or "
                "model.weights to a whole pipeline. Planning needs none"
            )
        return self.folders[name]


def find_parts(model, side: int) -> Parts:
    """The parts that `config.model` names, for images of `side` pixels; no weights are read.

    A folder of its own comes first, then that of the pipeline in `model.weights`. Raises
    FileNotFoundError, or ValueError where parts do not fit together.
    """
    folders, schedule = {}, Schedule()
    if model.weights:
        found = find_components(model.weights, side)
        schedule = found.schedule
        names = ("unet", "vae", "text_encoder", "tokenizer")
        folders = {name: getattr(found, name) for name in names if getattr(found, name)}
    if model.vae not in ("", SD21):
        folders["vae"] = Path(model.vae)
    if model.text not in ("", SD21, NO_TEXT):
        folders |= {name: Path(model.text) / name for name in ("text_encoder", "tokenizer")}
    chosen = {"prediction_type": model.prediction_type, "rescale_betas_zero_snr": model.zero_snr}
    schedule = dataclasses.replace(schedule, **{key: it for key, it in chosen.items() if it})
    codec, text = _find_codec(model, folders), _find_text(model, folders)
    width = text.hidden_size if text else model.context_dim
    if "unet" in folders:
        fields = METADATA_FIELDS if model.metadata else 0
        unet = read_config(folders["unet"], "unet")
        # The side that its export draws by default is the one of this run.
        latent = side // codec.factor
        unet = dataclasses.replace(unet, num_metadata=fields, sample_size=latent)
    else:
        unet = unet_config(model, codec.latent_channels, width, side // codec.factor)
    _check(unet, codec, text, folders)
    return Parts(unet, codec, text, schedule, folders)


def _find_codec(model, folders):
    if "vae" not in folders:
        sd21 = AutoencoderKL(VAEConfig(), dtype=jnp.dtype(model.vae_dtype))
        return sd21 if model.vae == SD21 else SpaceToDepth(model.patch)
    return read_codec(folders["vae"], jnp.dtype(model.vae_dtype))


def _find_text(model, folders) -> TextConfig | None:
    if model.text == NO_TEXT:
        return None
    if {"text_encoder", "tokenizer"} <= folders.keys():
        return read_config(folders["text_encoder"], "text_encoder")
    return TextConfig() if model.text == SD21 else None


def _check(unet: UNetConfig, codec, text: TextConfig | None, folders) -> None:
    if unet.in_channels != codec.latent_channels:
        raise ValueError(
            f"the UNet in {folders.get('unet')} takes latents of {unet.in_channels} channels, the "
            f"codec makes {codec.latent_channels}; set model.vae to the VAE it was trained with"
        )
    if text and unet.cross_attention_dim != text.hidden_size:
        raise ValueError(
            f"the UNet attends to a context of width {unet.cross_attention_dim}, the text tower "
            f"makes {text.hidden_size}; set model.text to the tower it was trained with, or none"
        )


def unet_config(model, latent_channels: int, context_dim: int, latent_side: int) -> UNetConfig:
    """UNetConfig of the sizes in `config.model` (channels, heads, attention_levels, ...)."""
    levels = tuple(model.attention_levels)
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in levels)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(levels))
    return UNetConfig(
        block_out_channels=tuple(model.channels),
        layers_per_block=model.layers_per_block,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=context_dim,
        attention_head_dim=tuple(model.heads),
        norm_num_groups=min(32, *(c // 4 for c in model.channels)),
        in_channels=latent_channels,
        out_channels=latent_channels,
        sample_size=latent_side,
        num_metadata=METADATA_FIELDS if model.metadata else 0,
    )


def load_unet_params(parts: Parts, seed: int, mesh: Mesh | None = None) -> dict:
    """The weights of the pipeline, or initial values: on a mesh, or as host arrays without one.

    Metadata embeddings that the weights lack (those of Stable Diffusion) get initial values.
    """
    shapes = unet_shapes(parts.unet)
    where = find_places(shapes, mesh)
    if "unet" not in parts.folders:
        # A zero output layer starts the loss at the variance of the target (Ho et al. 2020).
        rule = r"^conv_out/", lambda rng, shape: np.zeros(shape)
        return host_init(shapes, seed, [rule], where)
    folder, uses = parts.folders["unet"], None if parts.unet.num_metadata else False
    _, params, report = load_unet(
        folder, parts.unet, use_metadata=uses, strict=False, shardings=where
    )
    rest = tuple(name for name in report.missing if not name.startswith(f"{METADATA}."))
    dataclasses.replace(report, missing=rest).raise_if_bad()
    loaded = flatten(params)
    lacking = {path: leaf for path, leaf in flatten(shapes).items() if path not in loaded}
    drawn = host_init(unflatten(lacking), seed, shardings=where)
    return unflatten(loaded | flatten(drawn))


def load_codec_params(parts: Parts, dtype: str = "float32", mesh: Mesh | None = None) -> dict:
    """The frozen codec in `dtype`, on a mesh or as host arrays; {} for one without parameters."""
    if isinstance(parts.codec, SpaceToDepth):
        return {}
    folder, config = parts.require("vae", "model.vae"), parts.codec.config
    where = find_places(vae_shapes(config), mesh)
    return load_vae(folder, config, dtype=jnp.dtype(dtype), shardings=where)[1]


def load_text(parts: Parts, dtype: str, mesh: Mesh | None = None) -> TextTower:
    """The frozen text tower in `dtype`, its parameters on a mesh or as host arrays."""
    folder, dtype = parts.require("text_encoder", "model.text"), jnp.dtype(dtype)
    where = find_places(text_encoder_shapes(parts.text), mesh)
    _, params, _ = load_text_encoder(folder, parts.text, dtype=dtype, shardings=where)
    return TextTower(CLIPTextModel(parts.text, dtype=dtype), params)


def load_words(parts: Parts) -> PromptTokenizer:
    """The tokenizer, with texts cut to the length of the tower."""
    tokenizer = load_tokenizer(parts.require("tokenizer", "model.text"))
    return dataclasses.replace(tokenizer, length=parts.text.max_position_embeddings)
