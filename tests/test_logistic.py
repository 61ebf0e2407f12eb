from __future__ import annotations

import numpy as np
import pytest
from conftest import rel_error
from sklearn.linear_model import LogisticRegression

from common_jax.logistic import STRENGTHS, decide, fit_logistic, fit_path, standardiser


def problem(rows=120, columns=7, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns)).astype(np.float32)
    y = (x[:, :classes] + rng.normal(size=(rows, classes))).argmax(1)
    return x, y


@pytest.mark.parametrize("strength", [1e-1, 1e-3])
@pytest.mark.parametrize("columns", [7, 150])
def test_class_weights_equal_those_of_scikit_learn(strength, columns):
    x, y = problem(columns=columns)
    ours = fit_logistic(x, y, 4, strength)
    theirs = LogisticRegression(C=1 / (strength * len(x)), tol=1e-8, max_iter=5000)
    theirs.fit(x.astype(np.float64), y)
    logits, expected = decide(x, ours), theirs.decision_function(x.astype(np.float64))
    # Softmax does not see a common shift of the logits of a row.
    logits, expected = (z - z.mean(1, keepdims=True) for z in (logits, expected))
    assert rel_error(logits, expected) < 2e-3


def test_labels_that_hold_together_are_fitted_one_by_one():
    x, y = problem()
    rows = np.stack([y == 0, (y == 1) | (y == 2)], 1).astype(np.float32)
    ours = fit_logistic(x, rows, 2, 1e-2)
    for k in range(2):
        theirs = LogisticRegression(C=1 / (1e-2 * len(x)), tol=1e-8, max_iter=5000)
        theirs.fit(x.astype(np.float64), rows[:, k])
        np.testing.assert_allclose(ours[:-1, k], theirs.coef_[0], atol=2e-3)
        np.testing.assert_allclose(ours[-1, k], theirs.intercept_[0], atol=2e-3)


def test_a_path_ends_where_each_strength_alone_ends():
    x, y = problem()
    path = fit_path(x, y, 4)
    assert [strength for strength, _ in path] == sorted(STRENGTHS, reverse=True)
    for strength, weights in path:
        alone = fit_logistic(x, y, 4, strength)
        np.testing.assert_allclose(decide(x, weights), decide(x, alone), atol=0.05)


def test_classes_without_an_example_and_constant_columns_are_no_trouble():
    x, y = problem(classes=2)
    x[:, 3] = 5.0
    scale = standardiser(x)
    assert scale.std[3] == 1 and np.abs(scale(x)[:, 3]).max() == 0
    np.testing.assert_allclose(scale(x)[:, 0].std(), 1, rtol=1e-5)
    logits = decide(scale(x), fit_logistic(scale(x), y, 5, 1e-3))
    assert np.isfinite(logits).all() and set(logits.argmax(1)) <= {0, 1}


def test_values_that_are_not_finite_are_refused():
    x, y = problem()
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        fit_logistic(x, y, 4, 1e-2)
