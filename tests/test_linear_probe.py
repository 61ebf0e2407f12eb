"""Linear probe: the vectors it reads, the statistics it divides by, its place in a head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from conftest import rel_error
from head_cases import make_features, make_spec

from common_jax.logistic import decide, fit_logistic
from satdifuser_jax.heads import Head, init_head
from satdifuser_jax.linear_probe import (
    batch_moments,
    feature_stats,
    merge_moments,
    pool_taps,
    stats_from_moments,
)

SPEC = make_spec(fuser="linear")


def test_pooled_taps_are_means_and_deviations_of_every_key_and_scale():
    features = make_features(SPEC)
    fine, coarse = features
    expected = [fine.mean((2, 3)), fine.std((2, 3)), coarse.mean((2, 3)), coarse.std((2, 3))]
    assert rel_error(pool_taps(features), np.concatenate(expected, -1)) < 1e-5


def test_a_constant_map_has_a_finite_gradient():
    grad = jax.grad(lambda x: pool_taps([x]).sum())(jnp.ones((1, 1, 2, 2, 3)))
    assert np.isfinite(grad).all()


def stats_of(spec, features, batch=2):
    def batches():
        for start in range(0, len(features[0]), batch):
            rows = np.arange(start, start + batch)
            part = [x[np.minimum(rows, len(x) - 1)] for x in features]
            yield {"features": part, "mask": jnp.asarray(rows < len(features[0]))}

    return feature_stats(batches(), segments=spec.segments)


def test_statistics_over_padded_batches_equal_numpy_over_the_set():
    features = make_features(SPEC, batch=5)
    stats = stats_of(SPEC, features)["decoder"]
    pooled = np.asarray(pool_taps(features)).reshape(5, -1).astype(np.float64)
    assert rel_error(stats["mean"], pooled.mean(0)) < 1e-5
    assert rel_error(stats["std"], pooled.std(0)) < 1e-5


def test_statistics_of_values_far_from_zero_keep_their_deviation():
    x = (1000 + np.random.default_rng(0).standard_normal((6, 4))).astype(np.float32)
    moments = None
    for part in (x[:2], x[2:]):
        moments = merge_moments(moments, batch_moments([part], jnp.ones(len(part), bool)))
    stats = stats_from_moments(moments, segments=False)["decoder"]
    assert rel_error(stats["std"], x.astype(np.float64).std(0)) < 1e-3


def test_a_channel_that_never_varies_is_left_as_it_is():
    moments = merge_moments(None, batch_moments([np.full((3, 2), 7.0)], jnp.ones(3, bool)))
    assert stats_from_moments(moments, segments=False)["decoder"]["std"].tolist() == [1, 1]


def test_a_fitted_logistic_regression_is_a_head():
    features = make_features(SPEC, batch=24)
    labels = np.arange(24) % SPEC.num_classes
    stats = stats_of(SPEC, features, batch=8)
    pooled = np.asarray(pool_taps(features)).reshape(24, -1)
    scaled = (pooled - stats["decoder"]["mean"]) / stats["decoder"]["std"]
    weights = fit_logistic(scaled, labels, SPEC.num_classes, 1e-2).astype(np.float32)
    params = {"decoder": {"linear": {"kernel": weights[:-1], "bias": weights[-1]}}}
    wanted = jax.tree.map(np.shape, init_head(SPEC, 0)[0])
    assert jax.tree.map(np.shape, params) == wanted
    logits, _ = Head(SPEC).apply({"params": params, "feature_stats": stats}, features)
    assert rel_error(logits, decide(scaled, weights)) < 1e-4
    assert (np.argmax(logits, -1) == labels).mean() > 0.9


def test_segmentation_probe_reads_channels_at_every_position():
    spec = make_spec(fuser="linear", task="segmentation", output_side=6)
    features = make_features(spec, batch=2)
    params, state = init_head(spec, 0)
    state = {"feature_stats": stats_of(spec, features)}
    logits, _ = jax.jit(lambda v, f: Head(spec).apply(v, f))({"params": params, **state}, features)
    stats, layers = state["feature_stats"]["decoder"], params["decoder"]
    fine = features[0].transpose(0, 2, 3, 1, 4).reshape(2, 6, 6, -1)
    coarse = features[1].transpose(0, 2, 3, 1, 4).reshape(2, 3, 3, -1)
    fine = (fine - stats["mean_0"]) / stats["std_0"] @ layers["linear_0"]["kernel"]
    coarse = (coarse - stats["mean_1"]) / stats["std_1"] @ layers["linear_1"]["kernel"]
    # Doubling keeps the mean of a map, and a corner pixel is the corner of what it came from.
    expected = fine.mean((1, 2)) + coarse.mean((1, 2)) + layers["bias"]
    assert logits.shape == (2, 6, 6, spec.num_classes)
    assert rel_error(logits.mean((1, 2)), expected) < 1e-4
    assert rel_error(logits[:, 0, 0], fine[:, 0, 0] + coarse[:, 0, 0] + layers["bias"]) < 1e-4
