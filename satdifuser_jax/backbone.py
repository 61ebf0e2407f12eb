"""A folder in the public layout becomes a Backbone, and back.

Beside what the public release holds, a folder of ours may have `vae/config.json` of class
SpaceToDepth (a codec without weights) and `prompts/` with stored prompt embeddings.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from common_jax.files import read_json, sha256_json, write_json
from common_jax.sharding import put_tree, tree_shardings
from common_jax.weights import tree_sha256
from satdifuser_jax.blocks import SHARDING_RULES
from satdifuser_jax.convert import (
    Components,
    export_pipeline,
    find_components,
    is_weightless,
    load_unet,
    load_vae,
    read_config,
)
from satdifuser_jax.extract import Backbone
from satdifuser_jax.prompts import PromptError, prompt_embeddings, save_embedding
from satdifuser_jax.schedule import Schedule
from satdifuser_jax.unet import SatUNet, UNetConfig, init_unet, unet_shapes
from satdifuser_jax.vae import AutoencoderKL, SpaceToDepth, vae_shapes

EMPTY_PROMPT = ""
NO_TEXT_TOWER = "none"  # encoder fingerprint of embeddings that no text tower made


def load_codec(folder: str | os.PathLike, dtype=jnp.float32):
    """(module, params) of a VAE folder, or of one whose config.json says SpaceToDepth."""
    config_file = Path(folder) / "config.json"
    if config_file.is_file():
        raw = read_json(config_file)
        if raw.get("_class_name") == "SpaceToDepth":
            return SpaceToDepth(raw["patch"]), {}
    config, params, _ = load_vae(folder)
    return AutoencoderKL(config, dtype=dtype), params


def load_backbone(
    root: str | os.PathLike,
    *,
    resolution: int | None,
    prompt: str,
    prompt_cache: str | os.PathLike,
    untrained_seed: int | None = None,
    use_metadata: bool = False,
    is_guided: bool = False,
    dtype: str = "float32",
) -> Backbone:
    """Read the frozen model of a pipeline folder; parameters are host arrays.

    resolution: pixels, chooses `resolution<pixels>/` where the release has several.
    untrained_seed: keep the sizes, but draw the UNet's weights at random (the control experiment).
    use_metadata: keep the seven metadata embeddings (the published extractor drops them).
    """
    parts = find_components(root, resolution)
    if untrained_seed is None:
        config, params, _ = load_unet(parts.unet, use_metadata=use_metadata)
    else:
        config = UNetConfig.from_dict(read_json(parts.unet / "config.json"))
        params = init_unet(config, untrained_seed)
    codec, codec_params = load_codec(parts.require("vae"))
    texts = [prompt, EMPTY_PROMPT] if is_guided else [prompt]
    embeddings = read_prompts(parts, texts, prompt_cache)
    return Backbone(
        unet=SatUNet(config, dtype=jnp.dtype(dtype)),
        unet_params=cast_params(params, dtype),
        codec=codec,
        codec_params=codec_params,
        schedule=parts.schedule,
        context=embeddings[:1],
        uncond=embeddings[1:] if is_guided else None,
    )


def abstract_backbone(
    root: str | os.PathLike, *, resolution: int | None, use_metadata: bool, dtype: str
) -> Backbone:
    """`load_backbone` with shapes in place of arrays; of the folder only config files are read."""
    parts = find_components(root, resolution)
    config, folder = read_config(parts.unet, "unet"), parts.require("vae")
    config = dataclasses.replace(config, num_metadata=config.num_metadata if use_metadata else 0)
    unet_params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), unet_shapes(config)
    )
    if is_weightless(folder):
        codec, codec_params = load_codec(folder)
    else:
        codec = AutoencoderKL(read_config(folder, "vae"))
        codec_params = vae_shapes(codec.config)
    context = jax.ShapeDtypeStruct((1, 77, config.cross_attention_dim), jnp.float32)
    return Backbone(SatUNet(config), unet_params, codec, codec_params, parts.schedule, context)


def small_backbone(seed: int) -> Backbone:
    """An untrained UNet of 1.1 M parameters on 4 x 4 pixel patches: smoke tests need no weights."""
    codec = SpaceToDepth(4)
    config = UNetConfig(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=(2, 2),
        norm_num_groups=8,
        in_channels=codec.latent_channels,
        out_channels=codec.latent_channels,
        num_metadata=7,
    )
    return Backbone(
        unet=SatUNet(config),
        unet_params=init_unet(config, seed),
        codec=codec,
        codec_params={},
        schedule=Schedule(),
        context=np.zeros((1, 1, config.cross_attention_dim), np.float32),
    )


def cast_params(params, dtype: str):
    """Frozen weights in the compute type: half the memory in bfloat16, nothing is lost twice."""
    return jax.tree.map(lambda p: np.asarray(p).astype(jnp.dtype(dtype)), params)


def read_prompts(parts: Components, texts: Sequence[str], cache=None) -> np.ndarray:
    """Embeddings [n, S, D]: stored beside the weights, else by the text tower, kept in `cache`."""
    stored = parts.root / "prompts"
    if stored.is_dir():
        try:
            return prompt_embeddings(texts, cache=stored)
        except PromptError:
            if parts.text_encoder is None:
                raise
    return prompt_embeddings(
        texts, tokenizer=parts.tokenizer, text_encoder=parts.text_encoder, cache=cache
    )


def place_backbone(backbone: Backbone, mesh) -> Backbone:
    """The backbone on a mesh: large parameters split over `fsdp`, the rest whole on every device.

    Raises ValueError where a large one cannot be split.
    """
    return put_tree(backbone, tree_shardings(backbone, SHARDING_RULES, mesh))


def fingerprint(backbone: Backbone) -> str:
    """sha256 over everything that decides what this backbone computes."""
    parts = {
        "unet": tree_sha256(backbone.unet_params),
        "codec": tree_sha256(backbone.codec_params) if backbone.codec_params else "",
        "config": repr((backbone.unet, backbone.codec, backbone.schedule)),
        "context": tree_sha256({"context": backbone.context}),
        "uncond": "" if backbone.uncond is None else tree_sha256({"uncond": backbone.uncond}),
    }
    return sha256_json(parts)


def export_backbone(folder, backbone: Backbone, prompts: Mapping, *, tower=None, tokenizer=None):
    """Write a folder that `load_backbone` reads. prompts: {text: embedding [S, D]}.

    tower: (config, params) of the text tower, tokenizer: its folder; then every prompt works.
    """
    folder = Path(folder)
    unet_params, codec_params = jax.tree.map(
        np.asarray, (backbone.unet_params, backbone.codec_params)
    )
    components = {"unet": (backbone.unet.config, unet_params)}
    if isinstance(backbone.codec, SpaceToDepth):
        write_json(
            folder / "vae" / "config.json",
            {"_class_name": "SpaceToDepth", "patch": backbone.codec.patch},
        )
    else:
        components["vae"] = (backbone.codec.config, codec_params)
    for text, embedding in prompts.items():
        name = f"prompt-{sha256_json([text, NO_TEXT_TOWER])[:24]}.npz"
        save_embedding(folder / "prompts" / name, text, embedding, NO_TEXT_TOWER)
    if tower is not None:
        components["text_encoder"] = (tower[0], jax.tree.map(np.asarray, tower[1]))
    export_pipeline(folder, components, backbone.schedule, tokenizer=tokenizer)
