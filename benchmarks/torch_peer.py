"""Torch diffusers and transformers as the peer of `satdifuser_jax.verify`, float32 on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

CLASSES = {
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
    "text_encoder": transformers.CLIPTextModel,
}


def load_part(kind: str, folder: Path) -> torch.nn.Module:
    """The public class of a component, from its folder; metadata embeddings are left unread."""
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()  # they list every tensor they leave unread
    return CLASSES[kind].from_pretrained(folder, torch_dtype=torch.float32).eval()


@torch.no_grad()
def run_stage(stage: str, parts, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The output of one stage of `verify`, NHWC."""
    values = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
    if stage == "prompt":
        model = load_part("text_encoder", parts.text_encoder)
        return model(values["ids"].long()).last_hidden_state.numpy()
    if stage == "unet":
        model = load_part("unet", parts.unet)
        out = model(_nchw(values["x"]), values["t"], values["context"]).sample
    elif stage == "encode":
        model = load_part("vae", parts.vae)
        out = model.encode(_nchw(values["images"])).latent_dist.mean
    else:
        model = load_part("vae", parts.vae)
        out = model.decode(_nchw(values["latents"])).sample
    return out.permute(0, 2, 3, 1).numpy()


def _nchw(value: torch.Tensor) -> torch.Tensor:
    return value.permute(0, 3, 1, 2)
