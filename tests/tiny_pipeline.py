"""A pipeline small enough for every test: two levels, random weights, metadata embeddings."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from satdifuser_jax.convert import export_pipeline, load_text_encoder, load_unet, load_vae
from satdifuser_jax.prompts import save_embedding
from satdifuser_jax.schedule import Schedule
from satdifuser_jax.text_encoder import TextConfig, init_text_encoder
from satdifuser_jax.unet import UNetConfig, init_unet
from satdifuser_jax.vae import VAEConfig, init_vae

UNET = UNetConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=8,
    attention_head_dim=(2, 2),
    norm_num_groups=8,
    num_metadata=7,
)
PLAIN = dataclasses.replace(UNET, num_metadata=0)
VAE = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8)
TEXT = TextConfig(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=5,
)
LOADERS = {"unet": load_unet, "vae": load_vae, "text_encoder": load_text_encoder}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@functools.cache
def make_components() -> dict[str, tuple]:
    """{kind: (config, params)}; shared, not to be changed."""
    return {
        "unet": (UNET, init_unet(UNET, 0)),
        "vae": (VAE, init_vae(VAE, 1)),
        "text_encoder": (TEXT, init_text_encoder(TEXT, 2)),
    }


def write_pipeline(folder: Path) -> Path:
    """The components in the public layout, with a tokenizer in name only."""
    export_pipeline(folder, make_components(), Schedule())
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    return folder


def store_prompts(folder: Path, *prompts: str) -> None:
    """Random embeddings of prompts in a pipeline folder, so that no text tower is asked."""
    rng = np.random.default_rng(0)
    for number, prompt in enumerate(prompts):
        embedding = rng.standard_normal((TEXT.max_position_embeddings, TEXT.hidden_size))
        file = folder / "prompts" / f"prompt-{number}.npz"
        save_embedding(file, prompt, embedding.astype(np.float32), "none")


def edit(file, change) -> None:
    """Rewrites a safetensors file after change(dict of arrays)."""
    tensors = load_file(file)
    change(tensors)
    save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, file)


def edit_json(file, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
