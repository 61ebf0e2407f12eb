"""Canvases, views and image tokens against the published code's vectors and its table of counts."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from conftest import golden_cases, rel_error
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf

from geodit_jax import image_layout
from geodit_jax.config import GeoDiTConfig, TowerConfig
from geodit_jax.image_layout import (
    choose_canvas,
    count_tokens,
    lay_out,
    max_image_tokens,
    max_rows_per_token,
    max_views,
    pinpoints,
)

FULL = GeoDiTConfig(image_mode="anyres")
SQUARE = GeoDiTConfig(image_mode="square")
SIZES = st.tuples(st.integers(1, 6000), st.integers(1, 6000))


def configure(merge: str, aspect: str, **changes) -> GeoDiTConfig:
    """From the published names, such as spatial_unpad and anyres_max_4."""
    mode, _, tiles = aspect.partition("_max_")
    return GeoDiTConfig(image_mode=mode, merge=merge, max_tiles=int(tiles or 0), **changes)


def assemble(layout, tokens: np.ndarray, newline: np.ndarray) -> np.ndarray:
    """tokens [V*g*g,D] of as many views as there are slots -> [T,D] in float64."""
    table = np.concatenate([tokens, newline[None]])
    assert layout.rows.max() < len(table)
    return np.einsum("tk,tkd->td", layout.weights.astype(np.float64), table[layout.rows])


# ------------------------------------------------------------------------- against published code
@pytest.fixture(scope="module")
def assembly(request):
    folder = request.param
    with np.load(folder / "assembly.npz") as arrays:
        return json.loads((folder / "meta.json").read_text()), dict(arrays)


def procedural_tokens(meta: dict, arrays: dict, num_views: int) -> np.ndarray:
    """Projected procedural features [V*729,D] in float64."""
    v, t, c = np.ogrid[:num_views, :729, : meta["feature_width"]]
    mixed = (7919 * v + 104729 * t + 1299709 * c + meta["seed"]) % 2003
    x = (mixed / 1001 - 1).astype(np.float32).reshape(num_views * 729, -1)
    h = x @ arrays["mm_projector.0.weight"].T.astype(np.float64) + arrays["mm_projector.0.bias"]
    h = h * (1 + erf(h / math.sqrt(2))) / 2
    return h @ arrays["mm_projector.2.weight"].T.astype(np.float64) + arrays["mm_projector.2.bias"]


@pytest.mark.parametrize("assembly", golden_cases("llada_v"), indirect=True)
def test_golden_image_tokens(assembly):
    meta, arrays = assembly
    names = sorted(name.removesuffix("/length") for name in arrays if name.endswith("/length"))
    assert len(names) >= 24
    for name in names:
        source, merge, aspect = name.split("/")
        size = tuple(map(int, source.split("x"))) if "x" in source else (500, 400)
        config = configure(merge, aspect, newline_on_single=source != "stacked")
        slots = lay_out(size, config).num_views
        layout = lay_out(size, config, slots)
        tokens = procedural_tokens(meta, arrays, slots)
        found = assemble(layout, tokens, arrays["image_newline"])
        assert len(found) == count_tokens(size, config) == arrays[f"{name}/length"], name
        index = arrays[f"{name}/index"]
        assert rel_error(found[index], arrays[f"{name}/tokens"]) < 1e-5, name
        assert rel_error(found.sum(0), arrays[f"{name}/sum"]) < 1e-5, name


@pytest.mark.parametrize("folder", golden_cases("llada_v"))
def test_golden_canvases_and_numbers_of_views(folder):
    with np.load(folder / "views.npz") as arrays:
        cases = [name.removesuffix("/n_views") for name in arrays.files if "/n_views" in name]
        assert cases
        for case in cases:
            size, aspect = case.split("/")
            layout = lay_out(tuple(map(int, size.split("x"))), configure("spatial_unpad", aspect))
            assert layout.num_views == arrays[f"{case}/n_views"], case
            expected = arrays[f"{case}/canvas"] if f"{case}/canvas" in arrays.files else None
            assert (layout.canvas is None) == (expected is None)
            if expected is not None:
                assert layout.canvas == tuple(expected), case


@pytest.mark.parametrize(
    ("size", "canvas", "tokens"),
    [
        ((224, 224), (1, 1), 1485),
        ((256, 256), (1, 1), 1485),
        ((300, 200), (1, 1), 1261),
        ((385, 385), (2, 2), 3699),
        ((500, 500), (2, 2), 3699),
        ((512, 512), (2, 2), 3699),
        ((600, 600), (2, 2), 3699),
        ((800, 800), (3, 3), 3699),
        ((1000, 1000), (3, 3), 3699),
        ((1024, 1024), (3, 3), 3699),
        ((640, 480), (2, 2), 2929),
        ((1280, 720), (4, 2), 3649),
        ((720, 1280), (2, 4), 3681),
        ((4000, 1000), (6, 2), 3563),
        ((1160, 800), (4, 3), 3589),
        ((2000, 100), (6, 1), 2196),
    ],
)
def test_published_token_counts(size, canvas, tokens):
    layout = lay_out(size, FULL)
    assert layout.canvas == tuple(384 * part for part in canvas)
    assert layout.num_views == 1 + canvas[0] * canvas[1]
    assert len(layout.rows) == count_tokens(size, FULL) == tokens


@pytest.mark.parametrize(
    ("merge", "newline", "tokens"),
    [("flat", True, 729), ("spatial", True, 729), ("spatial_unpad", True, 730)]
    + [("spatial_unpad", False, 729)],
)
@pytest.mark.parametrize("mode", ["square", "pad"])
def test_a_picture_of_one_view_has_its_tokens_and_maybe_a_newline(mode, merge, newline, tokens):
    config = GeoDiTConfig(image_mode=mode, merge=merge, newline_on_single=newline)
    for size in ((1, 1), (4000, 30)):
        layout = lay_out(size, config)
        assert layout.num_views == 1 and layout.canvas is None
        assert len(layout.rows) == count_tokens(size, config) == tokens
        assert len(layout.rows) == max_image_tokens(config)
    np.testing.assert_array_equal(layout.rows[:, 0], np.arange(tokens))  # 729 is the newline


MAPS = [(75, 108), (50, 162), (54, 150), (81, 100), (98, 162), (81, 81), (40, 162), (54, 96)]


@pytest.mark.parametrize("shape", MAPS + [shape[::-1] for shape in MAPS])
def test_shrinking_is_the_bilinear_interpolation_of_torch(shape):
    target = image_layout._shrunk(*shape, FULL)
    ratio = math.sqrt(shape[0] * shape[1] / (4 * 729))
    assert target == (shape[0] // ratio, shape[1] // ratio)
    features = np.random.default_rng(0).standard_normal((*shape, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(features.transpose(2, 0, 1)[None].copy()), size=target, mode="bilinear"
    )[0].permute(1, 2, 0)
    table = np.arange(shape[0] * shape[1]).reshape(shape)
    rows, weights = image_layout._shrink(table, target)
    found = np.einsum("hwk,hwkd->hwd", weights, features.reshape(-1, 3)[rows])
    assert rel_error(found, expected.numpy()) < 1e-6


# -------------------------------------------------------------------------------------- properties
@settings(max_examples=60, deadline=None, derandomize=True)
@given(SIZES, st.sampled_from(["flat", "spatial", "spatial_unpad"]), st.sampled_from([0, 4, 9]))
def test_every_picture_fits_what_the_config_promises(size, merge, tiles):
    config = GeoDiTConfig(image_mode="anyres", merge=merge, max_tiles=tiles)
    layout = lay_out(size, config)
    count, taps = layout.rows.shape
    assert layout.weights.shape == (count, taps)
    assert count == count_tokens(size, config) <= max_image_tokens(config)
    assert layout.num_views <= max_views(config) == 37
    assert taps <= max_rows_per_token(config)
    assert layout.rows.min() >= 0 and layout.rows.max() <= max_views(config) * 729
    np.testing.assert_allclose(layout.weights.sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(layout.rows[:729, 0], np.arange(729))  # the base view in front


def test_unused_view_slots_move_the_newline_and_nothing_else():
    exact, padded = lay_out((640, 480), FULL, slots=5), lay_out((640, 480), FULL, slots=9)
    newline = exact.rows == 5 * 729
    assert newline.sum() == 40  # one for every line of the map
    np.testing.assert_array_equal(padded.rows[newline], 9 * 729)
    np.testing.assert_array_equal(padded.rows[~newline], exact.rows[~newline])
    np.testing.assert_array_equal(padded.weights, exact.weights)
    largest = lay_out((640, 480), FULL)
    np.testing.assert_array_equal(largest.rows[newline], max_views(FULL) * 729)


def test_tokens_of_a_map_lie_where_they_lie_in_the_picture():
    """Every token of a 2 x 3 canvas carries its place; the map reads line by line."""
    tower = TowerConfig(image_size=16, patch=4)
    config = GeoDiTConfig(tower=tower, image_mode="anyres", max_tiles=0, grid_pinpoints=((48, 32),))
    layout = lay_out((48, 32), config)
    places = np.full((7 * 16 + 1, 2), -1.0)  # (y, x) of every table row
    for tile in range(6):
        y, x = np.mgrid[:4, :4]
        corner = 4 * np.array([tile // 3, tile % 3])
        places[16 * (1 + tile) : 16 * (2 + tile)] = np.stack([y, x], -1).reshape(-1, 2) + corner
    found = places[layout.rows[16:, 0]].reshape(8, 13, 2)
    np.testing.assert_array_equal(found[:, :12], np.stack(np.mgrid[:8, :12], -1))
    np.testing.assert_array_equal(found[:, 12], -1)


def test_canvases_default_to_all_of_six_by_six_tiles_with_the_width_outside():
    canvases = pinpoints(FULL)
    assert len(canvases) == 36
    assert canvases[:2] == ((384, 384), (384, 768)) and canvases[6] == (768, 384)
    assert choose_canvas((525, 315), canvases) == (768, 384)
    assert choose_canvas((1, 20_000), canvases) == (384, 384)  # no canvas keeps a pixel of it


def test_no_picture_needs_rows_to_mix_where_maps_are_never_shrunk():
    assert max_rows_per_token(FULL) == 4
    assert max_rows_per_token(SQUARE) == 1
    assert max_rows_per_token(dataclasses.replace(FULL, max_tiles=0)) == 1
    assert max_rows_per_token(dataclasses.replace(FULL, merge="flat")) == 1
    few = dataclasses.replace(FULL, grid_pinpoints=((384, 768), (768, 768)))
    assert max_rows_per_token(few) == 1
    assert max_views(few) == 5


# ------------------------------------------------------------------------------------------ errors
def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="640x480 has 5 views, but there are 4 slots"):
        lay_out((640, 480), FULL, slots=4)
    with pytest.raises(ValueError, match="0x3 has no pixels"):
        lay_out((0, 3), FULL)
    with pytest.raises(ValueError, match="0x3 has no pixels"):
        count_tokens((0, 3), SQUARE)
    with pytest.raises(ValueError, match="400x384, which is not a whole number of tiles of 384"):
        pinpoints(dataclasses.replace(FULL, grid_pinpoints=((400, 384),)))
    with pytest.raises(ValueError, match="text only"):
        lay_out((3, 3), GeoDiTConfig(tower=None))
