"""Intervals of scores."""

from __future__ import annotations

import numpy as np
import pytest

from geodit_jax.scoring.measure import measure, measure_means


def test_the_interval_of_a_share_is_that_of_theory():
    values = np.arange(400) % 4 == 0
    score = measure_means({"x": values}, [str(i) for i in range(400)])["x"]
    assert score["value"] == 0.25
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert score["low"] == pytest.approx(0.25 - half, abs=0.006)
    assert score["high"] == pytest.approx(0.25 + half, abs=0.006)


def test_rows_of_one_picture_are_drawn_together():
    values = np.arange(400) % 4 == 0
    alone = measure_means({"x": values}, [str(i) for i in range(400)])["x"]
    # Ten rows that agree, forty times: as much evidence as forty rows.
    grouped = measure_means({"x": np.repeat(values[:40], 10)}, np.repeat(np.arange(40), 10))["x"]
    assert grouped["value"] == 0.25
    assert grouped["high"] - grouped["low"] > 2.5 * (alone["high"] - alone["low"])


def test_one_picture_has_no_interval_and_an_undefined_score_no_value():
    one = measure_means({"x": [1, 0]}, ["a", "a"])["x"]
    assert one == {"value": 0.5, "low": None, "high": None}
    nothing = measure(np.zeros((3, 1)), list("abc"), lambda t: t * np.nan, ["x"])["x"]
    assert nothing == {"value": None, "low": None, "high": None}


def test_the_same_rows_give_the_same_interval_in_any_order():
    values, names = np.arange(30) % 7, np.array([f"p{i % 11}" for i in range(30)])
    order = np.random.default_rng(0).permutation(30)
    first = measure_means({"x": values}, names)["x"]
    assert first == pytest.approx(measure_means({"x": values[order]}, names[order])["x"])
