"""UPerNet against torch: maps, statistics, dropout."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import rel_error
from head_cases import make_spec, make_torch_head, port_head

from satdifuser_jax.upernet import (
    MaskedBatchNorm,
    UPerNet,
    drop_channels,
    pool_adaptive,
    pooling_matrix,
    resize_bilinear,
)

SPEC = make_spec(task="segmentation", dropout=0.0, pool_scales=(1, 6), projection_dim=16)


def make_decoder(spec, folder):
    """(torch decoder, ours, its params, its statistics)."""
    head = make_torch_head(spec)
    params, state = port_head(head, spec, folder)
    fields = ("num_classes", "output_side", "channels", "pool_scales", "rescales", "dropout")
    ours = UPerNet(**{name: getattr(spec, name) for name in fields})
    return head.decoder, ours, params["decoder"], state["batch_stats"]["decoder"]


def make_maps(spec, seed=0, batch=3):
    rng = np.random.default_rng(seed)
    shape = [(batch, s.side, s.side, spec.projection_dim) for s in spec.scales]
    return [rng.standard_normal(s, np.float32) for s in shape]


def to_torch(maps):
    return [torch.as_tensor(x).permute(0, 3, 1, 2) for x in maps]


@pytest.mark.parametrize("rescales", [None, (2, 4), (0.5, 1)], ids=str)
def test_decoder_equals_torch_for_every_rescale(rescales, tmp_path):
    spec = dataclasses.replace(SPEC, rescales=rescales)
    theirs, ours, params, stats = make_decoder(spec, tmp_path)
    maps = make_maps(spec)
    variables = {"params": params, "batch_stats": stats}
    found = jax.jit(lambda v, maps: ours.apply(v, maps))(variables, maps)
    expected = theirs(to_torch(maps)).detach().permute(0, 2, 3, 1)
    assert found.shape == (3, 10, 10, spec.num_classes)
    assert rel_error(found, expected) < 1e-5


def test_training_statistics_equal_torch_after_several_steps(tmp_path):
    theirs, ours, params, stats = make_decoder(SPEC, tmp_path)
    theirs.train()

    @jax.jit
    def step(stats, maps):
        variables = {"params": params, "batch_stats": stats}
        y, changes = ours.apply(variables, maps, train=True, mutable=["batch_stats"])
        return y, changes["batch_stats"]

    for seed in range(4):
        maps = make_maps(SPEC, seed)
        y, stats = step(stats, maps)
        expected = theirs(to_torch(maps)).detach().permute(0, 2, 3, 1)
        assert rel_error(y, expected) < 1e-5
    modules = {
        "bottleneck": theirs.bottleneck[1],
        "psp_modules_0": theirs.psp_modules[0][2],  # 3 values a channel: unbiased or not shows
        "lateral_convs_0": theirs.lateral_convs[0][1],
        "fpn_convs_0": theirs.fpn_convs[0][1],
        "fpn_bottleneck": theirs.fpn_bottleneck[1],
    }
    for name, module in modules.items():
        assert rel_error(stats[name]["norm"]["mean"], module.running_mean) < 1e-5, name
        assert rel_error(stats[name]["norm"]["var"], module.running_var) < 1e-5, name


def test_padded_rows_leave_outputs_statistics_and_gradients_alone():
    norm = MaskedBatchNorm(5)
    x = np.random.default_rng(0).standard_normal((4, 3, 3, 5), np.float32)
    mask = np.asarray([True, True, False, True])
    variables = {
        "params": {"scale": np.full(5, 1.5, np.float32), "bias": np.ones(5, np.float32)},
        "batch_stats": {"mean": np.zeros(5, np.float32), "var": np.ones(5, np.float32)},
    }

    def run(x, mask):
        y, changes = norm.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
        kept = 1.0 if mask is None else mask[:, None, None, None]
        return (jnp.sin(y) * kept).sum(), (y, changes["batch_stats"])

    grad, (y, stats) = jax.jit(jax.grad(run, has_aux=True))(x, mask)
    x[2] = 1e3
    also = jax.jit(jax.grad(run, has_aux=True))(x, mask)
    short, (expected, wanted) = jax.jit(jax.grad(run, has_aux=True))(x[mask], None)
    assert rel_error(y[mask], expected) < 1e-5
    assert rel_error(grad[mask], short) < 1e-5 and not np.any(grad[2])
    for name in ("mean", "var"):
        assert rel_error(stats[name], wanted[name]) < 1e-5
        assert np.array_equal(stats[name], also[1][1][name])


def test_evaluation_never_moves_statistics_and_one_value_is_refused():
    norm = MaskedBatchNorm(2)
    x = np.ones((1, 1, 1, 2), np.float32)
    variables = {
        "params": {"scale": np.ones(2), "bias": np.zeros(2)},
        "batch_stats": {"mean": np.ones(2), "var": np.ones(2)},
    }
    _, changes = norm.apply(variables, x, train=False, mutable=["batch_stats"])
    assert np.array_equal(changes["batch_stats"]["mean"], np.ones(2))
    with pytest.raises(ValueError, match="batch of at least 2"):
        norm.apply(variables, x, train=True, mutable=["batch_stats"])


def test_adaptive_bins_overlap_as_published():
    bins = [(np.flatnonzero(row)[0], np.flatnonzero(row)[-1] + 1) for row in pooling_matrix(4, 6)]
    assert bins == [(0, 1), (0, 2), (1, 2), (2, 3), (2, 4), (3, 4)]


@pytest.mark.parametrize("size, bins", [(1, 6), (4, 3), (7, 6), (8, 1)])
def test_adaptive_pooling_equals_torch(size, bins):
    x = np.random.default_rng(0).standard_normal((2, size, size, 3), np.float32)
    expected = torch.nn.functional.adaptive_avg_pool2d(to_torch([x])[0], bins)
    assert rel_error(pool_adaptive(x, bins), expected.permute(0, 2, 3, 1)) < 1e-6


@pytest.mark.parametrize("size, side", [(4, 9), (8, 5), (3, 3), (1, 6)])
def test_resizing_equals_torch_up_and_down(size, side):
    x = np.random.default_rng(0).standard_normal((2, size, size, 3), np.float32)
    expected = torch.nn.functional.interpolate(to_torch([x])[0], (side, side), mode="bilinear")
    assert rel_error(resize_bilinear(x, (side, side)), expected.permute(0, 2, 3, 1)) < 1e-6


def test_dropout_takes_whole_channels_by_the_key_of_each_row():
    x = np.ones((3, 4, 4, 400), np.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    y = np.asarray(drop_channels(x, 0.1, keys))
    assert set(np.unique(y)) <= {np.float32(0), np.float32(1 / 0.9)}
    assert np.array_equal(y.min((1, 2)), y.max((1, 2))), "a channel is kept or dropped whole"
    assert abs((y == 0).mean() - 0.1) < 0.03
    assert not np.array_equal(y[0], y[1])
    # A row's draw depends on its key alone, not on its place in the batch.
    assert np.array_equal(drop_channels(x[:2], 0.1, keys[1:]), y[1:])
    with pytest.raises(ValueError, match="pass keys"):
        drop_channels(x, 0.1, None)


def test_rescales_must_fit_the_levels():
    with pytest.raises(ValueError, match=r"rescales is \(3, 1\) for 2 levels"):
        UPerNet(2, 8, rescales=(3, 1)).apply({}, make_maps(SPEC))
