"""A score and its 95 % interval from what each row adds to sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

DRAWS, CHUNK, SEED = 1000, 50, 0


def measure(
    sums: np.ndarray,
    pictures: Sequence[str],
    finish: Callable[[np.ndarray], np.ndarray],
    names: Sequence[str],
) -> dict[str, dict]:
    """{name: {value, low, high}} of scores that are functions of sums over rows.

    sums: [N, K], what each row adds. finish: [..., K] -> [..., len(names)]; NaN means undefined and
    becomes None. pictures: the picture of each row. The interval draws pictures with replacement,
    not rows: questions about one picture are no independent evidence. It is None for one picture.
    The random numbers are fixed.
    """
    sums = np.asarray(sums, np.float64)
    values = finish(sums.sum(0))
    lows, highs = _draw(sums, pictures, finish, len(names))
    return {
        name: {"value": _plain(value), "low": _plain(low), "high": _plain(high)}
        for name, value, low, high in zip(names, values, lows, highs)
    }


def measure_means(values: Mapping[str, Sequence[float]], pictures: Sequence[str]) -> dict:
    """`measure` of the mean of each named column [N]."""
    columns = [np.asarray(column, np.float64) for column in values.values()]
    sums = np.stack([*columns, np.ones(len(pictures))], 1)
    return measure(sums, pictures, lambda t: t[..., :-1] / t[..., -1:], list(values))


def single(value: float | None) -> dict:
    """A score without an interval."""
    return {"value": _plain(value), "low": None, "high": None}


def _draw(sums, pictures, finish, count: int) -> tuple[np.ndarray, np.ndarray]:
    _, index = np.unique(np.asarray(pictures, str), return_inverse=True)
    total = int(index.max()) + 1
    if total < 2:
        return np.full(count, np.nan), np.full(count, np.nan)
    table = np.zeros((total, sums.shape[1]))
    np.add.at(table, index, sums)
    generator = np.random.default_rng(SEED)
    chances = np.full(total, 1 / total)
    draws = [
        finish(generator.multinomial(total, chances, size=CHUNK) @ table)
        for _ in range(DRAWS // CHUNK)
    ]
    draws = np.concatenate(draws)
    # A column without one defined draw stays undefined, and numpy need not warn of it.
    known = ~np.isnan(draws).all(0)
    bounds = np.full((2, count), np.nan)
    bounds[:, known] = np.nanpercentile(draws[:, known], [2.5, 97.5], axis=0)
    return bounds[0], bounds[1]


def _plain(value) -> float | None:
    return None if value is None or np.isnan(value) else float(value)
