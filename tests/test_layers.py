from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import errors

from common_jax.layers import LayerNorm, Linear

X = np.ones((3, 4), np.float32)


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Linear(5, name="out")(LayerNorm(name="norm")(x))


@pytest.fixture(scope="module")
def params():
    return Two().init(jax.random.key(0), X)["params"]


def test_layers_declare_the_shapes_of_their_parameters(params):
    shapes = jax.tree.map(np.shape, params)
    assert shapes == {
        "norm": {"scale": (4,), "bias": (4,)},
        "out": {"kernel": (4, 5), "bias": (5,)},
    }
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    values = {"kernel": np.arange(20.0, dtype=np.float32).reshape(4, 5), "bias": np.ones(5)}
    np.testing.assert_allclose(
        Linear(5).apply({"params": values}, x), x @ values["kernel"] + 1, rtol=1e-5, atol=1e-5
    )


def test_a_parameter_of_another_shape_or_a_missing_one_is_named(params):
    told = r'"kernel" in "/out".*generate shape \(4, 5\), but .* has shape \(4, 6\)'
    wrong = {**params, "out": {**params["out"], "kernel": np.ones((4, 6), np.float32)}}
    with pytest.raises(errors.ScopeParamShapeError, match=told):
        Two().apply({"params": wrong}, X)
    lacking = {**params, "norm": {"scale": params["norm"]["scale"]}}
    with pytest.raises(errors.ScopeParamNotFoundError, match=r'"bias".*"/norm"'):
        Two().apply({"params": lacking}, X)


def test_no_initial_value_is_made_of_a_parameter_that_is_given(params, monkeypatch):
    def made(*args):
        raise AssertionError("an initial value was made")

    monkeypatch.setattr(nn.initializers, "zeros", made)
    assert Two().apply({"params": params}, X).shape == (3, 5)
    with pytest.raises(AssertionError, match="initial value"):
        Two().init(jax.random.key(0), X)
