"""Commits on rigged logits: order, quotas, what may be written, where an answer ends."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from text_cores import IDS

from geodit_jax.decode_config import DecodeConfig
from geodit_jax.unmasking import (
    begin,
    choose,
    commit,
    find,
    find_end_of_text,
    is_active,
    log_odds,
    rank,
)

ROWS, LENGTH, VOCABULARY = 3, 12, 48
GREEDY = DecodeConfig(length=LENGTH, steps=4)


def draw_logits(seed: int, scale: float = 3.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (ROWS, LENGTH, VOCABULARY)).astype(np.float32)
    logits[..., [IDS.eos, IDS.eot]] = -50.0  # ends where a test says so
    return logits


@functools.partial(jax.jit, static_argnames=("decode", "stop"))
def advance(progress, logits, keys, decode, stop):
    return commit(progress, logits, keys, decode, IDS, stop), is_active(progress, decode)


def drive(decode: DecodeConfig, logits=None, seed: int = 0, stop=(IDS.eot,)) -> list:
    """Progress after every pass until all rows are complete.

    logits: the same at each pass, or (None) other random ones at each.
    """
    progress = begin(ROWS, decode, IDS.mask)
    keys = jax.random.split(jax.random.key(seed), ROWS)
    found = []
    while bool(is_active(progress, decode).any()):
        assert len(found) <= decode.length, "the loop does not end"
        now = draw_logits(100 + len(found)) if logits is None else logits
        progress, _ = advance(progress, now, keys, decode, stop)
        found.append(jax.tree.map(np.asarray, progress))
    return found


# ---------------------------------------------------------------------------------------- ranking
def test_log_odds_are_those_of_the_probability_and_do_not_saturate():
    logits = jnp.asarray([[[0.0, 30.0, 1.0], [0.0, 40.0, 1.0], [2.0, 1.0, 0.5]]])
    ids = jnp.asarray([[1, 1, 2]])
    wide = np.asarray(logits, np.float64)
    p = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
    chosen = np.take_along_axis(p, np.asarray(ids)[..., None], -1)[..., 0]
    others = p.sum(-1) - chosen
    odds = np.asarray(log_odds(logits, ids))[0]
    assert float(jax.nn.softmax(logits)[0, 0, 1]) == float(jax.nn.softmax(logits)[0, 1, 1]) == 1
    assert odds[0] < odds[1]
    np.testing.assert_allclose(odds[2], np.log(chosen[0, 2] / others[0, 2]), rtol=1e-5)
    np.testing.assert_allclose(odds[:2], [30 - np.log(1 + np.e), 40 - np.log(1 + np.e)], rtol=1e-5)


def test_equal_confidence_goes_to_the_lowest_position():
    score = jnp.asarray([[1.0, 2.0, 1.0, 2.0, 0.0]])
    eligible = jnp.asarray([[True, True, True, True, True]])
    np.testing.assert_array_equal(rank(score, eligible)[0], [2, 0, 3, 1, 4])
    same = np.zeros((ROWS, LENGTH, VOCABULARY), np.float32)
    first = drive(GREEDY, same)[0]
    np.testing.assert_array_equal(first.committed_at[0] == 0, np.arange(LENGTH) < 3)


def test_positions_that_are_not_eligible_take_no_place():
    score, eligible = jnp.asarray([[9.0, 1.0, 2.0]]), jnp.asarray([[False, True, True]])
    np.testing.assert_array_equal(rank(score, eligible)[0, 1:], [1, 0])


def test_commit_order_is_the_order_of_confidence():
    logits = draw_logits(0)
    decode = DecodeConfig(length=LENGTH, steps=LENGTH, stop=False)
    last = drive(decode, logits)[-1]
    ids, odds = choose(jnp.asarray(logits), None, decode, IDS)
    order = np.argsort(-np.asarray(odds), axis=1)
    np.testing.assert_array_equal(np.argsort(last.committed_at, axis=1), order)
    np.testing.assert_array_equal(last.ids, ids)
    np.testing.assert_allclose(last.confidence, jax.nn.sigmoid(odds), rtol=1e-6)


# ------------------------------------------------------------------------------ what always holds
OPTIONS = {
    "greedy": {},
    "blocks": {"block": 4, "steps": 6},
    "cosine": {"quota": "cosine", "steps": 5},
    "random": {"remasking": "random"},
    "warm": {"temperature": 1.0},
    "threshold": {"threshold": 0.5},
    "factor": {"factor": 1.0},
    "revisable": {"revisable": True},
    "auto": {"length_mode": "auto"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_no_mask_is_left_and_no_banned_id_is_written(name):
    decode = DecodeConfig(**{"length": LENGTH, "steps": 4, "stop": False} | OPTIONS[name])
    logits = draw_logits(1)
    logits[..., [*IDS.banned, IDS.mask, 46, 47]] += 50  # what the model wants most of all
    last = drive(decode, logits)[-1]
    inside = np.arange(LENGTH) < last.end[:, None]
    assert not np.isin(last.ids[inside], [*IDS.banned, IDS.mask, 46, 47]).any()
    assert (last.committed_at[inside] >= 0).all()
    assert (last.confidence[inside] > 0).all()


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "revisable"])
def test_committed_tokens_never_change(name):
    decode = DecodeConfig(**{"length": LENGTH, "steps": 4} | OPTIONS[name])
    history = drive(decode)
    assert len(history) > 1
    for before, after in zip(history, history[1:]):
        held = before.ids != IDS.mask
        np.testing.assert_array_equal(after.ids[held], before.ids[held])
        np.testing.assert_array_equal(after.committed_at[held], before.committed_at[held])
        np.testing.assert_array_equal(after.confidence[held], before.confidence[held])


def test_each_pass_commits_its_quota():
    decode = DecodeConfig(length=LENGTH, steps=5, stop=False)
    held = [(p.ids != IDS.mask).sum(1) for p in drive(decode)]
    np.testing.assert_array_equal(np.diff(held, axis=0, prepend=0)[:, 0], [3, 3, 2, 2, 2])


def test_blocks_are_finished_from_left_to_right():
    decode = DecodeConfig(length=LENGTH, steps=6, block=4, stop=False)
    last = drive(decode)[-1]
    np.testing.assert_array_equal(last.committed_at // 2, np.tile(np.arange(12) // 4, (ROWS, 1)))
    np.testing.assert_array_equal(last.passes, 6)


# ---------------------------------------------------------------------------------------- options
def test_a_threshold_commits_what_is_sure_enough_and_at_least_one():
    logits = np.zeros((ROWS, LENGTH, VOCABULARY), np.float32)
    logits[:, :5, 7] = 12.0  # p > 0.99 at five positions, about 1/42 elsewhere
    last = drive(DecodeConfig(length=LENGTH, threshold=0.9, stop=False), logits)[-1]
    np.testing.assert_array_equal(last.committed_at[0], [0] * 5 + list(range(1, 8)))


def test_a_threshold_above_one_commits_one_token_a_pass():
    one = drive(DecodeConfig(length=LENGTH, threshold=1.5))
    slow = drive(DecodeConfig(length=LENGTH, steps=LENGTH))
    for a, b in zip(one, slow, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)


@pytest.mark.parametrize("factor", [0.5, 1.5, 4.0])
def test_a_factor_commits_as_many_as_the_bound_allows(factor):
    logits = draw_logits(2)
    decode = DecodeConfig(length=LENGTH, factor=factor, stop=False)
    first = drive(decode, logits)[0]
    _, odds = choose(jnp.asarray(logits), None, decode, IDS)
    p = -np.sort(-1 / (1 + np.exp(-np.asarray(odds, np.float64))), axis=1)
    for row, held in zip(p, (first.ids != IDS.mask).sum(1)):
        allowed = [n for n in range(1, LENGTH + 1) if (n + 1) * (1 - row[n - 1]) < factor]
        assert held == max(allowed, default=1)


def test_revisable_tokens_are_held_by_quota_and_can_be_masked_again_or_replaced():
    decode = DecodeConfig(length=LENGTH, steps=4, revisable=True, stop=False)
    history = drive(decode)
    held = [(p.ids != IDS.mask).sum(1) for p in history]
    np.testing.assert_array_equal(np.array(held)[:, 0], [3, 6, 9, 12])
    before, after = history[1], history[2]
    was = before.ids != IDS.mask
    assert (after.ids[was] == IDS.mask).any()
    assert ((after.ids != before.ids) & (after.ids != IDS.mask))[was].any()
    np.testing.assert_array_equal(after.committed_at == -1, after.ids == IDS.mask)
    wanted, _ = choose(jnp.asarray(draw_logits(103)), None, decode, IDS)
    np.testing.assert_array_equal(history[-1].ids, wanted)  # the last pass decides all


def test_random_order_is_drawn_for_each_row_and_is_not_that_of_confidence():
    decode = DecodeConfig(length=LENGTH, steps=LENGTH, remasking="random", stop=False)
    logits = np.repeat(draw_logits(3)[:1], ROWS, 0)
    orders = [drive(decode, logits, seed)[-1].committed_at for seed in (0, 0, 1)]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()
    assert (orders[0][0] != orders[0][1]).any()
    greedy = DecodeConfig(length=LENGTH, steps=LENGTH, stop=False)
    assert (orders[0] != drive(greedy, logits)[-1].committed_at).any()


def test_temperature_one_draws_from_the_softmax():
    logits = jnp.zeros((4000, 1, VOCABULARY)).at[:, 0, 8:].set(-20.0)
    logits = logits.at[:, 0, :3].set(jnp.log(jnp.asarray([4.0, 2.0, 1.0])))
    logits = logits.at[:, 0, 3:8].set(-20.0)
    keys = jax.random.split(jax.random.key(0), 4000)
    ids, odds = choose(logits, keys, DecodeConfig(temperature=1.0), IDS)
    share = np.bincount(np.asarray(ids)[:, 0], minlength=3)[:3] / 4000
    np.testing.assert_allclose(share, np.array([4, 2, 1]) / 7, atol=0.03)
    at_zero = np.asarray(odds)[np.asarray(ids) == 0]
    np.testing.assert_allclose(at_zero, np.log(4 / 3), rtol=1e-5)  # confidence without the noise


# -------------------------------------------------------------------------------- where it ends
def test_a_sequence_is_found_where_it_first_begins():
    ids = jnp.asarray([[5, 6, 7, 6, 7], [6, 6, 7, 0, 0], [0, 0, 0, 0, 6]])
    np.testing.assert_array_equal(find(ids, (6, 7)), [1, 1, 5])
    np.testing.assert_array_equal(find(ids, (6,)), [1, 0, 4])
    np.testing.assert_array_equal(find(ids, (1, 2, 3, 4, 5, 6)), [5, 5, 5])
    np.testing.assert_array_equal(
        find_end_of_text(jnp.asarray([[1, 45, 41], [41, 0, 45]]), IDS), [1, 0]
    )


def test_after_a_stop_the_quota_fills_only_what_is_before_it():
    logits = draw_logits(4)
    logits[0, 6, IDS.eot] = 100.0  # the surest token of row 0: committed first
    decode = DecodeConfig(length=LENGTH, steps=LENGTH)
    history = drive(decode, logits)
    last = history[-1]
    assert last.end[0] == 6 and last.passes[0] == 7
    assert (last.ids[0, :6] != IDS.mask).all() and (last.ids[0, 7:] == IDS.mask).all()
    without = drive(DecodeConfig(length=LENGTH, steps=LENGTH, stop=False), logits)[-1]
    assert without.passes[0] == LENGTH
    np.testing.assert_array_equal(last.ids[0, :7], without.ids[0, :7])


def test_an_earlier_stop_moves_the_end_forward():
    logits = draw_logits(5)
    logits[:, 9, IDS.eot], logits[:, 2, IDS.eot] = 100.0, 90.0
    ends = [p.end[0] for p in drive(DecodeConfig(length=LENGTH, steps=LENGTH), logits)]
    assert ends[:2] == [9, 2]


def test_blocks_behind_a_stop_are_skipped():
    logits = draw_logits(6)
    logits[1, 5, IDS.eot] = 100.0
    decode = DecodeConfig(length=LENGTH, steps=12, block=4)
    last = drive(decode, logits)[-1]
    assert last.passes[1] == 4 + 2  # the first block, the stop, and the one token before it
    assert (last.ids[1, 6:] == IDS.mask).all()


def test_a_stop_of_several_tokens_counts_only_when_complete():
    logits = draw_logits(7)
    logits[:, 3, 20] = logits[:, 4, 21] = logits[:, 8, 20] = 100.0
    last = drive(DecodeConfig(length=LENGTH, steps=LENGTH), logits, stop=(20, 21))[-1]
    np.testing.assert_array_equal(last.end, 3)


def test_the_first_pass_decides_the_length_and_short_answers_take_few_passes():
    logits = draw_logits(8)
    logits[0, 2, IDS.eot] = 50.0
    logits[0, 3:, IDS.eos] = 50.0
    logits[1, 7:, IDS.eos] = 50.0  # banned, but a wish to end all the same
    decode = DecodeConfig(length=LENGTH, steps=8, length_mode="auto")
    last = drive(decode, logits)[-1]
    np.testing.assert_array_equal(last.passes, [3, 8, 8])
    assert (last.ids[0, 3:] == IDS.mask).all() and last.ids[0, 2] == IDS.eot
    assert (last.ids[1, :8] != IDS.mask).all() and (last.ids[1, 8:] == IDS.mask).all()
    assert last.end[2] == LENGTH
