"""Regularised logistic regression in numpy: small problems, solved to the end.

    mean over rows of the loss + strength / 2 * sum(W ** 2), the bias left free

The loss is softmax cross-entropy for class numbers and the sum over classes of binary
cross-entropies for multi-hot rows. Convex, so the solver (L-BFGS) decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize

STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)


class Standard(NamedTuple):
    """Mean and deviation [D] of training rows; columns that never vary keep a deviation of 1."""

    mean: np.ndarray
    std: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return (x - self.mean) / self.std


def standardiser(x: np.ndarray) -> Standard:
    """Of rows x [N, D]; computed in float64, kept in float32."""
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    varies = std > 1e-6 * np.maximum(np.abs(mean), 1e-6)
    return Standard(mean.astype(np.float32), np.where(varies, std, 1.0).astype(np.float32))


def fit_logistic(
    x: np.ndarray, targets: np.ndarray, num_classes: int, strength: float, start=None
) -> np.ndarray:
    """Weights [D + 1, K], the bias in the last row. x float32 [N, D], best standardised.

    targets: class numbers int [N], or multi-hot float [N, K]. start: weights of a near problem.
    Raises ValueError on inputs that are not finite.
    """
    if not np.isfinite(x).all():
        raise ValueError("features hold NaN or infinity; look for where they arise")
    shape = (x.shape[1] + 1, num_classes)
    several = targets.ndim == 2
    wanted = targets if several else np.eye(num_classes, dtype=x.dtype)[targets]

    def objective(flat):
        weights = flat.reshape(shape)
        logits = decide(x, weights)
        if several:
            losses = np.logaddexp(0, logits) - wanted * logits
            errors = 1 / (1 + np.exp(-np.clip(logits, -500, 500))) - wanted
        else:
            top = logits.max(1, keepdims=True)
            shares = np.exp(logits - top)
            sums = shares.sum(1, keepdims=True)
            losses = np.log(sums) + top - (wanted * logits).sum(1, keepdims=True)
            errors = shares / sums - wanted
        errors = (errors / len(x)).astype(x.dtype)
        slope = strength * weights
        slope[-1] = 0
        slope[:-1] += x.T @ errors
        slope[-1] += errors.sum(0)
        penalty = strength / 2 * np.square(weights[:-1]).sum()
        return losses.sum() / len(x) + penalty, slope.ravel()

    start = np.zeros(shape) if start is None else start
    # A slope of size g leaves the weights off by up to g / strength.
    options = {"maxiter": 300, "gtol": min(1e-5, 1e-3 * strength), "ftol": 1e-10}
    found = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(shape)


def decide(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Logits float64 [N, K]."""
    return (x @ weights[:-1].astype(x.dtype)).astype(np.float64) + weights[-1]


def fit_path(
    x: np.ndarray, targets: np.ndarray, num_classes: int, strengths: Sequence[float] = STRENGTHS
) -> list[tuple[float, np.ndarray]]:
    """[(strength, weights)] from strong to weak, each started from the one before."""
    path: list[tuple[float, np.ndarray]] = []
    for strength in sorted(strengths, reverse=True):
        start = path[-1][1] if path else None
        path.append((strength, fit_logistic(x, targets, num_classes, strength, start)))
    return path
