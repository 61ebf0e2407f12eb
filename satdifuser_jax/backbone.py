"""A folder in the public layout becomes a Backbone, and back.

Beside what the public release holds, a folder of ours may have `vae/config.json` of class
SpaceToDepth (a codec without weights) and `prompts/` with stored prompt embeddings.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from common_jax.distributed import ask_first_for, gather_array
from common_jax.files import read_json, sha256_json, write_json
from common_jax.init import host_init
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
METADATA_FIELDS = 7  # longitude, latitude, GSD, cloud cover, year, month, day
NO_TEXT_TOWER = "none"  # encoder fingerprint of embeddings that no text tower made


def read_codec(folder: Path, dtype=jnp.float32) -> AutoencoderKL | SpaceToDepth:
    """The module that a vae folder describes; only its config.json is read."""
    if is_weightless(folder):
        return SpaceToDepth(read_json(folder / "config.json")["patch"])
    return AutoencoderKL(read_config(folder, "vae"), dtype=dtype)


@dataclasses.dataclass(frozen=True)
class BackboneFolder:
    """A frozen model in a pipeline folder, and how it is used.

    root: a folder in the public layout, or WORKDIR/export of a pretraining.
    prompt: stored in the folder, or embedded by its text tower; prompt_cache: a folder that keeps
    such embeddings, or None.
    resolution: pixels, chooses `resolution<pixels>/` where the release has several.
    untrained_seed: keep the sizes, but draw the UNet's weights at random (the control experiment).
    use_metadata: keep the seven metadata embeddings (the published extractor drops them).
    is_guided: the empty prompt is embedded beside the prompt. dtype: of the UNet and its weights.
    """

    root: str | os.PathLike
    resolution: int | None
    prompt: str
    prompt_cache: str | os.PathLike | None
    untrained_seed: int | None = None
    use_metadata: bool = False
    is_guided: bool = False
    dtype: str = "float32"

    @functools.cached_property
    def parts(self) -> Components:
        return find_components(self.root, self.resolution)

    @functools.cached_property
    def contexts(self) -> np.ndarray:
        """Embeddings [1 or 2,S,D] of the prompts; of several processes the first asks the tower."""
        texts = [self.prompt, EMPTY_PROMPT] if self.is_guided else [self.prompt]

        def read() -> list:
            return read_prompts(self.parts, texts, self.prompt_cache).tolist()

        return np.asarray(ask_first_for(read, PromptError), np.float32)

    def shapes(self) -> Backbone:
        """Shapes in place of arrays; only config files are read."""
        config = read_config(self.parts.unet, "unet")
        fields = (config.num_metadata or METADATA_FIELDS) if self.use_metadata else 0
        config = dataclasses.replace(config, num_metadata=fields)
        # In the compute type: half the memory in bfloat16, nothing is lost twice.
        dtype = jnp.dtype(self.dtype)
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), unet_shapes(config)
        )
        codec = read_codec(self.parts.require("vae"))
        codec_params = {} if isinstance(codec, SpaceToDepth) else vae_shapes(codec.config)
        context = jax.ShapeDtypeStruct((1, 77, config.cross_attention_dim), jnp.float32)
        return Backbone(
            unet=SatUNet(config, dtype=dtype),
            unet_params=params,
            codec=codec,
            codec_params=codec_params,
            schedule=self.parts.schedule,
            context=context,
            uncond=context if self.is_guided else None,
        )

    def load(self, mesh: Mesh | None = None) -> Backbone:
        """The model as host arrays, or on a mesh: a process reads only what lies on its devices.

        Of several processes all must call it first; later one may. Raises FileNotFoundError, and
        ValueError where weights, config or mesh do not fit together, or nothing embeds the prompt.
        """
        found, parts = self.shapes(), self.parts
        where, dtype = find_places(found.unet_params, mesh), jnp.dtype(self.dtype)
        if self.untrained_seed is None:
            config, uses = found.unet.config, self.use_metadata
            _, params, _ = load_unet(
                parts.unet, config, use_metadata=uses, dtype=dtype, shardings=where
            )
        else:
            params = host_init(found.unet_params, self.untrained_seed, shardings=where)
        codec_params = {}
        if found.codec_params:
            where = find_places(found.codec_params, mesh)
            codec_params = load_vae(parts.require("vae"), found.codec.config, shardings=where)[1]
        backbone = found.replace(
            unet_params=params,
            codec_params=codec_params,
            context=self.contexts[:1],
            uncond=self.contexts[1:] if self.is_guided else None,
        )
        return backbone if mesh is None else place_backbone(backbone, mesh)


def load_backbone(root: str | os.PathLike, **settings) -> Backbone:
    """The frozen model of a folder as host arrays. settings: those of `BackboneFolder`."""
    return BackboneFolder(root, **settings).load()


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


def find_places(tree, mesh: Mesh | None):
    """Shardings of parameters (arrays or shapes) on a mesh; None without one."""
    return None if mesh is None else tree_shardings(tree, SHARDING_RULES, mesh)


def place_backbone(backbone: Backbone, mesh: Mesh) -> Backbone:
    """The backbone on a mesh: large parameters split over `fsdp`, the rest whole on every device.

    Raises ValueError where a large one cannot be split.
    """
    return put_tree(backbone, find_places(backbone, mesh))


def fingerprint(backbone: Backbone) -> str:
    """sha256 over everything that decides what this backbone computes, wherever it lies.

    Where processes hold parts of it every one must ask; the host holds one parameter at a time.
    """
    parts = {
        "unet": tree_sha256(backbone.unet_params, gather_array),
        "codec": tree_sha256(backbone.codec_params, gather_array) if backbone.codec_params else "",
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
