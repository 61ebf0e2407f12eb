"""A question about one picture, answered by GeoDiT: the library without configs and datasets.

    python -m examples.ask WEIGHTS PICTURE "Describe the image."

WEIGHTS is a folder of GeoDiT or LLaDA-V, or WORKDIR/export of a training run.
"""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

from geodit_jax.answering import Question
from geodit_jax.decode_config import DecodeConfig
from geodit_jax.inference import choose_dtype, load_responder


def main(weights: str, picture: str, text: str) -> None:
    # Eight passes over a window of 32 tokens, as in the paper; each keeps the surest ones.
    responder = load_responder(weights, DecodeConfig(length=32, steps=8), dtype=choose_dtype())
    image = np.asarray(Image.open(picture).convert("RGB"))
    ((_, answer),) = responder.answer([Question(text, image)])
    print(answer.text)
    for piece, step, confidence in zip(answer.pieces, answer.committed_at, answer.confidence):
        if piece:
            print(f"  pass {step + 1}  {confidence:.2f}  {piece!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
