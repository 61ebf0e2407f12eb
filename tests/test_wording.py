"""Captions with parts that may be left out."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from data.wording import (
    DrawCaption,
    always,
    compose,
    draw_caption,
    full_caption,
    read_wording,
    sometimes,
)


def test_the_full_caption_leaves_nothing_out_and_takes_the_first_of_several_texts():
    wording = compose(
        always("a"), sometimes(" b", 0.5), sometimes("", 0.5), ((0.3, " c"), (0.7, " d"))
    )
    assert full_caption(wording) == "a b c"


def test_parts_are_dropped_independently_at_their_rates():
    wording = compose(always("a"), sometimes(" fmow", 0.1), ((0.67, " left"), (0.33, " all")))
    rng = np.random.default_rng(0)
    found = Counter(draw_caption(wording, rng) for _ in range(4000))
    assert set(found) == {"a left", "a all", "a fmow left", "a fmow all"}
    assert abs(sum(n for text, n in found.items() if "fmow" in text) / 4000 - 0.9) < 0.02
    assert abs(sum(n for text, n in found.items() if "left" in text) / 4000 - 0.67) < 0.03
    assert abs(found["a left"] / 4000 - 0.067) < 0.02


def test_the_transform_draws_with_the_generator_of_the_example():
    example = {"caption": "", "wording": compose(always("a"), sometimes(" b", 0.5)), "id": "x"}
    drawn = [DrawCaption()(example, np.random.default_rng(k % 8))["caption"] for k in range(16)]
    assert drawn[:8] == drawn[8:] and set(drawn) == {"a", "a b"} and example["caption"] == ""


def test_wordings_survive_json_and_wrong_chances_are_refused():
    wording = compose(always("a"), sometimes(" b", 0.5), ())
    assert read_wording(json.loads(json.dumps(wording.pieces))) == wording
    with pytest.raises(ValueError, match=r"chances \[0.7, 0.7\]"):
        read_wording([[[0.7, "a"], [0.7, "b"]]])
