"""Quotas, forbidden ids, and settings that contradict each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
from text_cores import IDS

from geodit_jax.decode_config import DecodeConfig, fit_window, forbidden_ids, make_quotas


@pytest.mark.parametrize(
    "masks, steps, shares",
    [
        (16, 8, [2] * 8),
        (32, 8, [4] * 8),
        (8, 8, [1] * 8),
        (7, 8, [1] * 7 + [0]),
        (10, 8, [2, 2, 1, 1, 1, 1, 1, 1]),
        (8, 16, [1] * 8 + [0] * 8),
        (16, 3, [6, 5, 5]),
    ],
)
def test_linear_quotas_are_equal_shares_with_the_remainder_in_front(masks, steps, shares):
    np.testing.assert_array_equal(make_quotas(masks, steps, "linear")[masks], shares)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_quotas_of_any_number_of_masks_add_up_and_waste_no_pass(kind):
    for steps in (1, 2, 5, 8):
        table = make_quotas(40, steps, kind)
        np.testing.assert_array_equal(table.sum(1), np.arange(41))
        assert (table >= 0).all()
        for row in table:  # zeros at the end only: no pass commits nothing
            assert not row[np.count_nonzero(row) :].any()


def test_cosine_leaves_the_masks_of_maskgit():
    row = make_quotas(32, 8, "cosine")[32]
    left = [math.floor(32 * math.cos(math.pi * k / 16)) for k in range(1, 8)]
    np.testing.assert_array_equal(32 - row.cumsum(), [*left, 0])
    assert list(row) == sorted(row)  # few tokens first, while nothing is known


def test_steps_are_shared_by_blocks_and_never_exceed_the_tokens():
    assert DecodeConfig(length=32, steps=8, block=8).block_steps == 2
    assert DecodeConfig(length=8, steps=100).block_steps == 8
    assert DecodeConfig(length=32, steps=100, block=8).block_steps == 8


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"length": 32, "block": 5}, "block=5 does not divide length=32"),
        ({"length": 32, "block": 64}, "does not divide"),
        ({"length": 32, "block": 8, "steps": 6}, "use a multiple of 4"),
        ({"length": 0}, "at least 1"),
        ({"steps": 0}, "at least 1"),
        ({"remasking": "lowest"}, "remasking='lowest' is unknown; use one of"),
        ({"quota": "square"}, "quota"),
        ({"banned": "all"}, "banned"),
        ({"cache": "dual"}, "cache"),
        ({"length_mode": "long"}, "length_mode"),
        ({"temperature": -1.0}, "temperature=-1.0 is negative"),
        ({"guidance": -0.5}, "guidance"),
        ({"refresh_every": 2}, "needs cache=prefix"),
        ({"threshold": 0.9, "factor": 1.0}, "use one of them"),
        ({"threshold": 0.9, "revisable": True}, "use one of them"),
        ({"threshold": 0.9, "remasking": "random"}, "rank by confidence"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**settings)


def test_mask_and_rows_without_a_token_are_forbidden_whatever_is_banned():
    always = {IDS.mask, 46, 47}
    names = {"none": set(), "eos": {IDS.eos}, "llada_v": set(IDS.banned)}
    for banned, more in names.items():
        assert set(np.flatnonzero(forbidden_ids(48, IDS, banned))) == always | more
    assert IDS.eot not in IDS.banned  # the one way to end an answer


def test_a_decoder_fits_every_window_and_blocks_share_its_steps():
    decode = DecodeConfig(steps=8, block=8)
    found = [fit_window(decode, window) for window in (4, 8, 32, 40)]
    assert [(d.length, d.block, d.steps, d.block_steps) for d in found] == [
        (4, 4, 8, 4),
        (8, 8, 8, 8),
        (32, 8, 8, 2),
        (40, 8, 10, 2),
    ]
    assert fit_window(DecodeConfig(), 12) == DecodeConfig(length=12)
    with pytest.raises(ValueError, match="block=8 does not divide length=12"):
        fit_window(decode, 12)
