"""Pictures of what the features and heads do: mixing, gates, experts, predictions, PCA of taps.

`scales` are taps.Scale, fine -> coarse; `times` are the labels of the T kept keys (or timesteps) in
the order of the features. Every function writes one PNG and returns its path; too many images are
cut and the title says so. The general charts are here too, so that tasks import one module.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common_jax.canvas import (
    check_images,
    check_match,
    class_colours,
    colour_table,
    resize_tile,
    save_sheet,
    swatch,
    tile_size,
)
from common_jax.charts import (
    HeatMap,
    count_shown,
    number_format,
    save_bars,
    save_confusion,
    save_curves,
    save_grid,
    save_heat_map,
)
from common_jax.overlays import save_overlays

__all__ = [
    "name_tap",
    "project_colours",
    "save_bars",
    "save_confusion",
    "save_curves",
    "save_expert_use",
    "save_feature_pca",
    "save_gate_maps",
    "save_grid",
    "save_mixing",
    "save_overlays",
    "save_sweep",
]

MAX_ROWS = 8  # images of gate maps, one per line
MAX_PAIRS = 12  # images of the PCA picture
ENTROPY_COLOURS = "cividis"
KEPT_STEP = "kept step"

_TAP = re.compile(r"(up_blocks\.|down_blocks\.|mid_block)(\d*)\.\w+\.(\d+)\.(?:.+\.)?(\w+)")


def name_tap(tap: str) -> str:
    """`up_blocks.3.attentions.0.transformer_blocks.0.attn1` -> `up3 attn1.0`; others unchanged."""
    match = _TAP.fullmatch(tap)
    if match is None:
        return tap
    group, block, index, module = match.groups()
    return f"{group.split('_')[0]}{block} {module}.{index}"


# ------------------------------------------------------------------------------ weights of fusers
def save_mixing(weights, scales, times: Sequence, path) -> Path:
    """Global mixing weights [T*L], entry (t, l) at t*L + l, as taps x kept steps in percent.

    `weights` are after the softmax (they sum to 1). White is the even share 1 / (T*L), where
    training starts; orange is above, purple below. Sums per step and scale are written beside.
    """
    weights = np.asarray(weights, np.float64)
    taps = [name_tap(tap) for scale in scales for tap in scale.taps]
    check_match(weights.shape, (len(times) * len(taps),), "shape of the mixing weights")
    _check_shares(weights, "mixing weights", "give softmax(mixing_weights)")
    table = 100 * weights.reshape(len(times), len(taps)).T
    edges = np.cumsum([0] + [len(scale.taps) for scale in scales])
    sums = [table[a:b].sum() for a, b in zip(edges, edges[1:])]
    labels = HeatMap(
        rows=taps,
        columns=[f"{t}\n{share:.0f}%" for t, share in zip(times, table.sum(0))],
        bar=f"weight, % (even: {100 / weights.size:.2f})",
        xlabel=f"{KEPT_STEP}, share of all weight",
        title="Global mixing weights",
        groups=[(f"{_side(s)}: {x:.0f}%", len(s.taps)) for s, x in zip(scales, sums)],
        number=".2f",
        centre=100 / weights.size,
    )
    return save_heat_map(table, labels, path)


def save_sweep(table, scales, times: Sequence, path, metric: str) -> Path:
    """Results [T, L] of a probe per kept step and tap, NaN where not run; the best is outlined."""
    table = np.asarray(table, np.float64)
    taps = [name_tap(tap) for scale in scales for tap in scale.taps]
    check_match(table.shape, (len(times), len(taps)), "shape of the sweep [steps, taps]")
    labels = HeatMap(
        rows=taps,
        columns=[str(time) for time in times],
        bar=metric,
        xlabel=KEPT_STEP,
        title=f"{metric} of each tap alone",
        groups=[(_side(scale), len(scale.taps)) for scale in scales],
        number=number_format(table),
        mark_best=True,
    )
    return save_heat_map(table.T, labels, path)


def save_expert_use(use, path, *, scales=None, times: Sequence | None = None) -> Path:
    """Use of experts [S, E], or [S, T, E] per kept step: counts or shares, shown as % of a row."""
    use = np.asarray(use, np.float64)
    if use.ndim not in (2, 3) or not use.size or not np.isfinite(use).all() or use.min() < 0:
        raise ValueError(f"expert use {use.shape}: give finite values >= 0, [S, E] or [S, T, E]")
    names = [f"scale {s}" for s in range(len(use))]
    if scales is not None:
        check_match(len(use), len(scales), "number of scales in the expert use")
        names = [_side(scale) for scale in scales]
    rows, groups = names, ()
    if use.ndim == 3:
        steps = range(use.shape[1]) if times is None else times
        check_match(use.shape[1], len(steps), "number of kept steps in the expert use")
        rows = [f"{KEPT_STEP} {step}" for _ in names for step in steps]
        groups = [(name, len(steps)) for name in names]
    table = use.reshape(-1, use.shape[-1])
    total = table.sum(1, keepdims=True)
    experts = use.shape[-1]
    labels = HeatMap(
        rows=rows,
        columns=[str(e) for e in range(experts)],
        bar=f"share, % (even: {100 / experts:.1f})",
        xlabel="expert",
        title="Use of the experts",
        groups=groups,
        number=".0f",
        centre=100 / experts,
    )
    shares = np.where(total > 0, 100 * table / np.where(total > 0, total, 1), np.nan)
    return save_heat_map(shares, labels, path)


def save_gate_maps(images, gates, scales, times: Sequence, path) -> Path:
    """Local gates: per scale the step that dominates at each pixel, and how spread weights are.

    gates: one [N, h, w, K_s] per scale, entry (t, l) at t*L_s + l, summing to 1 over K_s. A line
    per image (at most MAX_ROWS): image, then for each scale the map of the step with the largest
    weight summed over its taps, under it the tap with the largest mean weight, and the entropy
    divided by ln K_s (0: one entry decides, 1: all alike).
    """
    images = check_images(images)
    check_match(len(gates), len(scales), "number of gate maps, one per scale")
    total, images = len(images), images[:MAX_ROWS]
    gates = [_check_gate(g, s, len(times), total)[:MAX_ROWS] for g, s in zip(gates, scales)]
    size = tile_size(*images.shape[1:3], smallest=128, largest=160)
    tiles = np.zeros((len(images), 1 + 2 * len(scales), *size, 3), np.uint8)
    captions = [[""] * tiles.shape[1] for _ in images]
    colours, headings = class_colours(len(times)), ["image"]
    for s, (gate, scale) in enumerate(zip(gates, scales)):
        headings += [f"{_side(scale)} step", f"{_side(scale)} spread"]
        by_step = gate.reshape(*gate.shape[:3], len(times), len(scale.taps))
        winner = by_step.sum(-1).argmax(-1)
        spread = colour_table(ENTROPY_COLOURS, _relative_entropy(gate))
        by_tap = by_step.mean((1, 2)).sum(1)
        for n in range(len(images)):
            tiles[n, 1 + 2 * s] = resize_tile(colours[winner[n]], size)
            tiles[n, 2 + 2 * s] = resize_tile(spread[n], size)
            best = int(by_tap[n].argmax())
            captions[n][1 + 2 * s] = f"{name_tap(scale.taps[best])} {by_tap[n, best]:.0%}"
            captions[n][2 + 2 * s] = f"mean {_relative_entropy(gate[n]).mean():.2f}"
    for n, image in enumerate(images):
        tiles[n, 0] = resize_tile(image, size, average=True)
    ramp = colour_table(ENTROPY_COLOURS, np.broadcast_to(np.linspace(0, 1, 80), (14, 80)))
    legend = [(swatch(c), f"{KEPT_STEP} {t}") for c, t in zip(colours, times)]
    legend.append((ramp, "spread: 0 (one entry) to 1 (all alike)"))
    title = "Local gates: dominant step, strongest tap, spread"
    title = ", ".join(filter(None, (title, count_shown(len(images), total))))
    return save_sheet(tiles, path, title=title, headings=headings, captions=captions, legend=legend)


def _check_gate(gate, scale, steps: int, images: int) -> np.ndarray:
    gate = np.asarray(gate, np.float64)
    what = f"gates of side {scale.side}"
    if gate.ndim != 4:
        raise ValueError(f"{what} have shape {gate.shape}; give [N, h, w, K]")
    check_match(len(gate), images, f"{what}: number of images")
    check_match(gate.shape[-1], steps * len(scale.taps), f"{what}: entries (steps * taps)")
    _check_shares(gate, what, "give the gates after the softmax")
    return gate


def _check_shares(values, what: str, advice: str) -> None:
    sums = values.sum(-1)
    if not np.isfinite(values).all() or values.min() < 0 or np.abs(sums - 1).max() > 1e-2:
        raise ValueError(f"{what} are not shares that sum to 1; {advice}")


def _relative_entropy(shares) -> np.ndarray:
    """Entropy over the last axis divided by its largest value, in [0, 1]."""
    terms = shares * np.log(np.maximum(shares, 1e-12))
    return np.clip(-terms.sum(-1) / max(np.log(shares.shape[-1]), 1e-12), 0, 1)


def _side(scale) -> str:
    return f"{scale.side}×{scale.side}"


# --------------------------------------------------------------------------------------- features
def save_feature_pca(images, features, path) -> Path:
    """Images beside the first three principal components of one scale's features, as colours.

    features [N, h, w, C]. One PCA over the shown images (at most MAX_PAIRS), so that equal colours
    mean equal features in all of them.
    """
    images, features = check_images(images), np.asarray(features)
    if features.ndim != 4:
        raise ValueError(f"features have shape {features.shape}; give one scale [N, h, w, C]")
    check_match(len(features), len(images), "number of feature maps for the images")
    total, images = len(images), images[:MAX_PAIRS]
    maps = project_colours(features[:MAX_PAIRS])
    size = tile_size(*images.shape[1:3])
    pairs = min(3, len(images))
    tiles = np.full((-(-len(images) // pairs), 2 * pairs, *size, 3), 255, np.uint8)
    for n, (image, colours) in enumerate(zip(images, maps)):
        row, column = n // pairs, 2 * (n % pairs)
        tiles[row, column] = resize_tile(image, size, average=True)
        tiles[row, column + 1] = resize_tile(colours, size)
    side = f"{features.shape[1]}×{features.shape[2]}"
    title = ", ".join(filter(None, (f"PCA of {side} features", count_shown(len(maps), total))))
    return save_sheet(tiles, path, title=title, headings=("image", "features") * pairs)


def project_colours(features) -> np.ndarray:
    """uint8 [N, h, w, 3]: three principal components of [N, h, w, C], 1 to 99 % made 0..255.

    The sign of each component makes its third moment positive. So the colours do not depend on an
    offset, a common factor, a rotation of the channels, or the order of the images. Components
    that do not exist or do not vary are mid-grey. Non-finite features raise ValueError.
    """
    features = np.asarray(features, np.float32)
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinity: no PCA; look for where they arise")
    points = features.reshape(-1, features.shape[-1])
    points = points - points.mean(0, dtype=np.float64).astype(np.float32)
    largest = np.abs(points).max(initial=0.0)
    colours = np.full((len(points), 3), 0.5)
    for i, scores in enumerate(_leading_scores(points / (largest or 1.0), 3).T):
        scores = scores * (1 if (scores.astype(np.float64) ** 3).sum() >= 0 else -1)
        low, high = np.percentile(scores, (1, 99))
        if high > low:
            colours[:, i] = np.clip((scores - low) / (high - low), 0, 1)
    return (255 * colours).round().astype(np.uint8).reshape(*features.shape[:-1], 3)


def _leading_scores(points, count: int) -> np.ndarray:
    """Scores [M, <= count] of centred points on their leading components, largest first.

    Subspace iteration from a fixed start: a wide scale has thousands of channels, of which a full
    decomposition would take minutes.
    """
    block = min(16, *points.shape)
    basis = np.random.default_rng(0).normal(size=(points.shape[1], block)).astype(points.dtype)
    for _ in range(30):
        left = np.linalg.qr(points @ basis)[0]
        basis = np.linalg.qr(points.T @ left)[0]
    u, s, _ = np.linalg.svd(points @ basis, full_matrices=False)
    keep = s[:count] > 1e-5 * max(s[0], 1e-12)
    return (u[:, :count] * s[:count])[:, keep]
