"""Pictures of fusers and features: what is drawn where, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from common_jax.canvas import GAP, LINE, MARGIN, class_colours, colour_table
from satdifuser_jax import figures
from satdifuser_jax.figures import name_tap, project_colours
from satdifuser_jax.taps import PUBLISHED_LAYERS, Scale, list_taps, select_taps
from satdifuser_jax.unet import UNetConfig

TIMES = (47, 45, 40)
SCALES = (
    Scale(8, ("up_blocks.1.resnets.0.conv2", "up_blocks.1.resnets.1.conv2"), (8, 8)),
    Scale(4, ("up_blocks.0.resnets.0.conv2",), (16,)),
)
SIDE = 128  # tiles of 64-pixel images


@pytest.fixture
def heat_map(monkeypatch):
    """What was handed to the heat map, in place of drawing it."""
    calls = {}
    monkeypatch.setattr(
        figures, "save_heat_map", lambda values, labels, path: calls.update(v=values, labels=labels)
    )
    return calls


def draw_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def read_tile(path, row: int, column: int, *, captions: bool) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    y = MARGIN + 2 * LINE + row * (SIDE + GAP + LINE * captions)
    x = MARGIN + column * (SIDE + GAP)
    return pixels[y : y + SIDE, x : x + SIDE]


def test_taps_get_short_names_that_stay_unique():
    assert name_tap("up_blocks.3.attentions.0.transformer_blocks.0.attn1") == "up3 attn1.0"
    assert name_tap("mid_block.resnets.1.conv2") == "mid conv2.1"
    assert name_tap("something else") == "something else"
    taps = list(list_taps(UNetConfig.sd21()))
    names = [name_tap(tap) for tap in taps]
    assert len(set(names)) == len(taps) and max(map(len, names)) <= 13


def test_mixing_puts_entry_t_times_l_plus_l_at_tap_l_and_step_t(heat_map):
    weights = np.arange(1, 10) / 45
    figures.save_mixing(weights, SCALES, TIMES, "x.png")
    np.testing.assert_allclose(
        heat_map["v"], 100 / 45 * np.array([[1, 4, 7], [2, 5, 8], [3, 6, 9]])
    )
    labels = heat_map["labels"]
    assert list(labels.rows) == ["up1 conv2.0", "up1 conv2.1", "up0 conv2.0"]
    assert [group for group, _ in labels.groups] == ["8×8: 60%", "4×4: 40%"]
    assert labels.columns[2].split("\n") == ["40", "53%"]
    assert labels.centre == pytest.approx(100 / 9)


def test_mixing_refuses_logits_and_wrong_lengths(tmp_path):
    with pytest.raises(ValueError, match="softmax"):
        figures.save_mixing(np.ones(9), SCALES, TIMES, tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"found \(8,\), expected \(9,\)"):
        figures.save_mixing(np.full(8, 1 / 8), SCALES, TIMES, tmp_path / "m.png")


def test_the_published_63_weights_fit_one_readable_file(tmp_path):
    scales = select_taps(UNetConfig.sd21(), PUBLISHED_LAYERS, 32)
    path = figures.save_mixing(np.full(63, 1 / 63), scales, TIMES, tmp_path / "m.png")
    with Image.open(path) as picture:
        assert picture.format == "PNG" and 400 < picture.width < 1200 and picture.height < 1200
    table = np.random.default_rng(0).random((50, 21))
    path = figures.save_sweep(table, scales, range(50), tmp_path / "s.png", "accuracy")
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width < 2500


def test_sweep_is_drawn_taps_by_steps_with_three_digits(heat_map):
    table = np.arange(9.0).reshape(3, 3)
    figures.save_sweep(table / 10, SCALES, TIMES, "s.png", "mIoU")
    np.testing.assert_array_equal(heat_map["v"], table.T / 10)
    assert heat_map["labels"].number == ".3f" and heat_map["labels"].mark_best
    figures.save_sweep(table * 10, SCALES, TIMES, "s.png", "mIoU")
    assert heat_map["labels"].number == ".1f"
    with pytest.raises(ValueError, match="sweep"):
        figures.save_sweep(table[:2], SCALES, TIMES, "s.png", "mIoU")


def test_expert_use_is_shared_out_per_row_and_unused_rows_are_missing(heat_map):
    use = np.array([[[1, 3], [2, 2]], [[0, 0], [5, 0]]])
    figures.save_expert_use(use, "e.png", scales=SCALES, times=TIMES[:2])
    expected = [[25, 75], [50, 50], [np.nan, np.nan], [100, 0]]
    np.testing.assert_array_equal(heat_map["v"], expected)
    assert heat_map["labels"].groups == [("8×8", 2), ("4×4", 2)]
    figures.save_expert_use(use.sum(1), "e.png")
    np.testing.assert_allclose(heat_map["v"], [[37.5, 62.5], [100, 0]])
    for bad, message in ((use - 1, ">= 0"), (use[0, 0], r"\[S, E\]"), (use[:1], "scales")):
        with pytest.raises(ValueError, match=message):
            figures.save_expert_use(bad, "e.png", scales=SCALES)


def test_gate_maps_show_the_winning_step_and_the_spread(tmp_path):
    # Scale 0: left half all weight on step 45 through its second tap, right half even.
    first = np.zeros((1, 8, 8, 6))
    first[:, :, :4, 1 * 2 + 1] = 1
    first[:, :, 4:] = 1 / 6
    # Scale 1: step 40 by a little at every pixel.
    second = np.broadcast_to([0.3, 0.3, 0.4], (1, 4, 4, 3))
    images = draw_images(1)
    path = figures.save_gate_maps(images, [first, second], SCALES, TIMES, tmp_path / "g.png")
    tiles = [read_tile(path, 0, column, captions=True) for column in range(5)]
    np.testing.assert_array_equal(tiles[0], images[0].repeat(2, 0).repeat(2, 1))
    colours = class_colours(3)
    assert (tiles[1][:, :64] == colours[1]).all() and (tiles[3] == colours[2]).all()
    assert (tiles[2][:, :64] == colour_table("cividis", 0.0)).all()
    assert (tiles[2][:, 64:] == colour_table("cividis", 1.0)).all()


def test_gate_maps_refuse_logits_wrong_counts_and_missing_scales(tmp_path):
    path, images = tmp_path / "g.png", draw_images(2)
    even = [np.full((2, 8, 8, 6), 1 / 6), np.full((2, 4, 4, 3), 1 / 3)]
    for gates, message in (
        (even[:1], "one per scale"),
        ([even[0] * 3, even[1]], "side 8 .*softmax"),
        ([even[0], even[1][..., :2]], "side 4: entries"),
        ([even[0][:1], even[1]], "side 8: number of images"),
        ([even[0][0], even[1]], r"\[N, h, w, K\]"),
    ):
        with pytest.raises(ValueError, match=message):
            figures.save_gate_maps(images, gates, SCALES, TIMES, path)


def draw_features(seed: int = 0, count: int = 3, side: int = 8, channels: int = 24) -> np.ndarray:
    """Features with three clear, skewed directions and a little noise."""
    rng = np.random.default_rng(seed)
    scores = rng.exponential(size=(count, side, side, 3)) * (9, 5, 2)
    basis = np.linalg.qr(rng.normal(size=(channels, 3)))[0]
    return scores @ basis.T + 0.01 * rng.normal(size=(count, side, side, channels))


def test_pca_colours_ignore_offset_factor_rotation_and_order():
    features = draw_features()
    colours = project_colours(features).astype(int)
    assert colours.shape == (3, 8, 8, 3) and colours.min() == 0 and colours.max() == 255
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.normal(size=(24, 24)))[0]
    for other in (
        features + rng.normal(size=24) * 50,
        features * 1e-4,
        features * 1e20,
        features @ rotation,
        -features @ rotation,
    ):
        assert np.abs(project_colours(other) - colours).max() <= 1
    order = [2, 0, 1]
    assert np.abs(project_colours(features[order]) - colours[order]).max() <= 1


def test_pca_orders_components_by_variance_and_matches_an_exact_decomposition():
    for channels in (5, 24, 300):  # few channels, many positions, more channels than positions
        features = draw_features(2, channels=channels)
        points = features.reshape(-1, channels)
        u, s, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
        colours = project_colours(features).reshape(-1, 3).astype(float)
        for i in range(3):
            scores = u[:, i] * s[i] * np.sign((u[:, i] ** 3).sum())
            low, high = np.percentile(scores, (1, 99))
            expected = 255 * np.clip((scores - low) / (high - low), 0, 1)
            assert np.abs(colours[:, i] - expected).max() <= 1


def test_pca_without_variance_is_mid_grey_and_outliers_do_not_flatten_the_rest():
    assert (project_colours(np.full((2, 4, 4, 40), 7.0)) == 128).all()
    one = np.random.default_rng(0).random((1, 32, 32, 1))
    colours = project_colours(one)
    assert np.ptp(colours[..., 0]) == 255 and (colours[..., 1:] == 128).all()
    one[0, 0, 0] = 1e4
    assert project_colours(one)[..., 0].std() > 50


def test_pca_picture_pairs_each_image_with_its_features(tmp_path):
    images, features = draw_images(4), draw_features(count=4)
    path = figures.save_feature_pca(images, features, tmp_path / "p.png")
    colours = project_colours(features)
    for n in range(4):
        row, column = n // 3, 2 * (n % 3)
        shown = read_tile(path, row, column, captions=False)
        np.testing.assert_array_equal(shown, images[n].repeat(2, 0).repeat(2, 1))
        shown = read_tile(path, row, column + 1, captions=False)
        np.testing.assert_array_equal(shown, colours[n].repeat(16, 0).repeat(16, 1))


def test_pca_refuses_infinite_features_and_wrong_counts(tmp_path):
    features, path = draw_features(), tmp_path / "p.png"
    features[0, 0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        figures.save_feature_pca(draw_images(3), features, path)
    with pytest.raises(ValueError, match="number of feature maps"):
        figures.save_feature_pca(draw_images(2), features, path)
    with pytest.raises(ValueError, match=r"\[N, h, w, C\]"):
        figures.save_feature_pca(draw_images(3), features[None], path)
