"""What a probe must beat: hand-made colour and texture features with logistic regression."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import uniform_filter
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from common_jax.metrics import count_confusion, score
from data.catalog import open_source
from satdifuser_jax.preprocess import resize, to_unit


def colour_and_hog(image) -> np.ndarray:
    """8x8x8 colour histogram and gradient histograms (9 bins, 8 x 8 cells of 16 pixels)."""
    image = resize(to_unit(image), 128, 128)
    bins = np.minimum((image * 8).astype(int), 7).reshape(-1, 3)
    colour = np.bincount(bins @ [64, 8, 1], minlength=512) / len(bins)
    dy, dx = np.gradient(image.mean(-1))
    size, angle = np.hypot(dx, dy), np.mod(np.arctan2(dy, dx), np.pi)
    cell = np.arange(128) // 16
    index = (cell[:, None] * 8 + cell) * 9 + np.minimum((angle / np.pi * 9).astype(int), 8)
    hog = np.bincount(index.ravel(), size.ravel(), 576).reshape(64, 9)
    hog /= np.linalg.norm(hog, axis=1, keepdims=True) + 1e-3
    return np.concatenate([np.sqrt(colour), hog.ravel()])


def score_road_colours(folder: str) -> dict:
    """Logistic regression on the colour of a pixel and mean and deviation of its surroundings."""

    def describe(image):
        image = to_unit(image)
        parts = [image, image**2]
        for size in (5, 15, 41):
            mean = uniform_filter(image, (size, size, 0))
            spread = uniform_filter(image**2, (size, size, 0)) - mean**2
            parts += [mean, np.sqrt(np.maximum(spread, 0))]
        return np.concatenate(parts, -1)

    rng, x, y = np.random.default_rng(0), [], []
    source = open_source("masks", "train", train=folder)
    for i in range(len(source)):
        row = source[i]
        chosen = rng.integers(row["label"].size, size=2000)
        x.append(describe(row["image"]).reshape(row["label"].size, -1)[chosen])
        y.append(row["label"].ravel()[chosen])
    x, y = np.concatenate(x), np.concatenate(y)
    scaler = StandardScaler().fit(x)
    model = LogisticRegression(max_iter=300).fit(scaler.transform(x), y)
    counts = 0
    source = open_source("masks", "test", train=folder)
    for i in range(len(source)):
        row = source[i]
        features = describe(row["image"]).reshape(row["label"].size, -1)
        guess = model.predict(scaler.transform(features))
        counts = counts + count_confusion(row["label"].ravel(), guess, 2)
    found = score(counts, "segmentation")
    return {"miou": 100 * found["miou"], "road IoU": 100 * found["iou_1"]}
