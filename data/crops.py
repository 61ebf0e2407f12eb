"""Random crops and turns for pretraining: they know that a picture seen from above has no up."""

from __future__ import annotations

import numpy as np


class RandomCrop:
    """Square crop of a random side between `smallest` and `largest` pixels, at a random place.

    Sides are limited by the picture's short side; largest = 0 means the short side. A crop that
    will be resized to the same output has a finer ground sampling distance, so metadata[2] (GSD,
    see transforms.normalise_metadata) shrinks with it.
    """

    def __init__(self, smallest: int, largest: int = 0):
        if smallest < 1 or (largest and largest < smallest):
            raise ValueError(f"crop sides {smallest}..{largest}: need 1 <= smallest <= largest")
        self.smallest, self.largest = smallest, largest

    def __call__(self, example, rng: np.random.Generator):
        image = example["image"]
        height, width = image.shape[:2]
        short = min(height, width)
        high = min(self.largest or short, short)
        side = int(rng.integers(min(self.smallest, high), high + 1))
        top = int(rng.integers(height - side + 1))
        left = int(rng.integers(width - side + 1))
        out = dict(example) | {"image": image[top : top + side, left : left + side]}
        if example.get("metadata") is not None:
            metadata = np.array(example["metadata"], np.float32)
            metadata[2] *= side / short
            out["metadata"] = metadata
        return out


class QuarterTurns:
    """One of the eight flips and quarter turns of a square, each equally likely."""

    def __call__(self, example, rng: np.random.Generator):
        image = np.rot90(example["image"], int(rng.integers(4)))
        if rng.integers(2):
            image = image[:, ::-1]
        return dict(example) | {"image": np.ascontiguousarray(image)}
