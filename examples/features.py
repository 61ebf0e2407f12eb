"""Features of one picture from a frozen diffusion model: the library without configs and datasets.

    python -m examples.features [PIPELINE_FOLDER [PICTURE]]

PIPELINE_FOLDER is in the public layout, or WORKDIR/export of a pretraining; without it a small
network with random weights stands in. Without PICTURE a grey square is used.
"""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

from satdifuser_jax.backbone import load_backbone, small_backbone
from satdifuser_jax.extract import extract_features
from satdifuser_jax.extract_config import ExtractConfig
from satdifuser_jax.preprocess import to_pixels
from satdifuser_jax.taps import PUBLISHED_LAYERS, select_taps


def main(weights: str = "", picture: str = "", side: int = 64) -> None:
    settings = {"resolution": None, "prompt": "A satellite image", "prompt_cache": ".cache/prompts"}
    backbone = load_backbone(weights, **settings) if weights else small_backbone(seed=0)
    image = Image.open(picture).convert("RGB") if picture else Image.new("RGB", (64, 64), "grey")
    scales = select_taps(backbone.unet.config, PUBLISHED_LAYERS, backbone.latent_side(side))
    config = ExtractConfig(scales=scales, keys=(47, 45, 40))  # t = 21, 61, 161 by DDIM inversion
    pixels = to_pixels(np.asarray(image), side)[None]
    for scale, features in zip(scales, extract_features(backbone, pixels, config)):
        print(f"side {scale.side}: {features.shape} [image, time, y, x, channel]")
        print("  " + ", ".join(scale.taps))


if __name__ == "__main__":
    main(*sys.argv[1:])
