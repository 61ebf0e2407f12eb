"""Which masks become tokens after a pass: choice, confidence, quota, blocks and the stop.

B rows, L positions of the answer, V vocabulary rows. Every row goes its own way: it has its own
block, step and end, so that a row of a batch is decoded as it would be alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from geodit_jax.config import TokenIds
from geodit_jax.decode_config import DecodeConfig, forbidden_ids, make_quotas


class Progress(NamedTuple):
    """Where each row stands."""

    ids: jax.Array
    """[B,L] int32, the mask id where nothing is committed."""
    end: jax.Array
    """[B] positions at or beyond it are not decoded."""
    block: jax.Array
    """[B] the block in work."""
    step: jax.Array
    """[B] passes the block has had."""
    masks: jax.Array
    """[B] masks the block had at its start."""
    passes: jax.Array
    """[B] passes the row has had."""
    committed_at: jax.Array
    """[B,L] pass that fixed the token, -1 where none did."""
    confidence: jax.Array
    """[B,L] float32 probability the token had then."""


def begin(rows: int, decode: DecodeConfig, mask: int) -> Progress:
    """Nothing but masks."""

    def whole(value, dtype=jnp.int32):
        return jnp.full((rows, decode.length), value, dtype)

    def each(value):
        return jnp.full((rows,), value, jnp.int32)

    end, masks = each(decode.length), each(decode.block_length)
    return Progress(
        whole(mask), end, each(0), each(0), masks, each(0), whole(-1), whole(0, jnp.float32)
    )


def is_active(progress: Progress, decode: DecodeConfig) -> jax.Array:
    """bool [B]: rows that need another pass."""
    return progress.block * decode.block_length < progress.end


def commit(
    progress: Progress,
    logits: jax.Array,
    keys: jax.Array,
    decode: DecodeConfig,
    tokens: TokenIds,
    stop_ids: Sequence[int],
) -> Progress:
    """Progress after one pass. logits [B,L,V] float32, keys [B] random keys of the rows.

    Finished rows stay as they are. Source: the samplers of LLaDA and LLaDA-V.
    """
    active = is_active(progress, decode)
    if decode.length_mode == "auto":
        progress = _set_end(progress, logits, decode, tokens)
    keys = jax.vmap(jax.random.fold_in)(keys, progress.passes)
    choice, odds = choose(logits, keys, decode, tokens)
    inside = _in_block(progress, decode)
    masked = progress.ids == tokens.mask
    eligible = inside if decode.revisable else inside & masked
    score = odds
    if decode.remasking == "random":
        draw = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), odds.shape[1:]))
        score = draw(keys)
    place = rank(score, eligible)
    chosen = eligible & (place < _count(progress, odds, place, eligible, decode)[:, None])
    ids = jnp.where(chosen, choice, progress.ids)
    if decode.revisable:
        ids = jnp.where(inside & ~chosen, tokens.mask, ids)
    is_mask, changed = ids == tokens.mask, ids != progress.ids
    fixed_at = jnp.where(changed, progress.passes[:, None], progress.committed_at)
    confidence = jnp.where(chosen, jax.nn.sigmoid(odds), progress.confidence)
    progress = progress._replace(
        ids=ids,
        passes=progress.passes + active,
        committed_at=jnp.where(is_mask, -1, fixed_at),
        confidence=jnp.where(is_mask, 0.0, confidence),
    )
    if decode.stop:
        progress = progress._replace(end=jnp.minimum(progress.end, find(ids, stop_ids)))
    return _advance(progress, is_mask, decode)


def choose(
    logits: jax.Array, keys: jax.Array, decode: DecodeConfig, tokens: TokenIds
) -> tuple[jax.Array, jax.Array]:
    """(ids [B,L], their log-odds [B,L]); forbidden ids have no probability."""
    forbidden = jnp.asarray(forbidden_ids(logits.shape[-1], tokens, decode.banned))
    logits = jnp.where(forbidden, -jnp.inf, logits)
    noisy = logits
    if decode.temperature:
        # `high`: low-resolution uniforms cut off the tail, which sharpens the distribution.
        draw = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], mode="high"))
        noisy = logits + decode.temperature * draw(keys)
    ids = jnp.argmax(noisy, axis=-1).astype(jnp.int32)
    return ids, log_odds(logits, ids)


def log_odds(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """log(p / (1 - p)) of ids [B,L] under logits [B,L,V].

    It ranks as the probability p does, and still tells apart what float32 rounds to p = 1.
    """
    is_chosen = jnp.arange(logits.shape[-1]) == ids[..., None]
    chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(jnp.where(is_chosen, -jnp.inf, logits), axis=-1)


def rank(score: jax.Array, eligible: jax.Array) -> jax.Array:
    """[B,L]: how many eligible positions go first, by higher score, then by lower position."""
    position = jnp.arange(score.shape[1])
    mine, other = score[:, :, None], score[:, None, :]
    first = (other > mine) | ((other == mine) & (position < position[:, None]))
    return jnp.sum(first & eligible[:, None, :], axis=-1)


def find(ids: jax.Array, sequence: Sequence[int]) -> jax.Array:
    """[B]: where `sequence` first begins in ids [B,L]; L where it does not occur."""
    length = ids.shape[1]
    starts = length - len(sequence) + 1
    if starts < 1:
        return jnp.full(ids.shape[:1], length)
    hits = [ids[:, i : i + starts] == token for i, token in enumerate(sequence)]
    return _first(jnp.stack(hits).all(0), length)


def find_end_of_text(ids: jax.Array, tokens: TokenIds) -> jax.Array:
    """[B]: the first position that holds one of the two end-of-text ids; L where none does."""
    return _first((ids == tokens.eot) | (ids == tokens.eos), ids.shape[1])


def _first(hits: jax.Array, otherwise: int) -> jax.Array:
    return jnp.where(hits.any(-1), jnp.argmax(hits, axis=-1), otherwise).astype(jnp.int32)


def _in_block(progress: Progress, decode: DecodeConfig) -> jax.Array:
    at = jnp.arange(decode.length)
    start = progress.block[:, None] * decode.block_length
    return (at >= start) & (at < start + decode.block_length) & (at < progress.end[:, None])


def _set_end(progress, logits, decode, tokens) -> Progress:
    """On the first pass, the answer ends with the first position that wants to end it."""
    unwritten = jnp.asarray(forbidden_ids(logits.shape[-1], tokens, "none"))
    wanted = jnp.argmax(jnp.where(unwritten, -jnp.inf, logits), axis=-1)
    end = jnp.minimum(find_end_of_text(wanted, tokens) + 1, decode.length)
    end = jnp.where(progress.passes == 0, end, progress.end)
    masks = jnp.where(progress.passes == 0, jnp.minimum(end, decode.block_length), progress.masks)
    return progress._replace(end=end, masks=masks)


def _count(progress, odds, place, eligible, decode) -> jax.Array:
    """[B] how many positions to commit (with `revisable`: to hold) after this pass."""
    if not decode.counts_by_confidence:
        quotas = make_quotas(decode.block_length, decode.block_steps, decode.quota)
        table = jnp.asarray(quotas.cumsum(1) if decode.revisable else quotas)
        return table[progress.masks, progress.step]
    if decode.threshold:
        sure = jax.nn.sigmoid(odds) >= decode.threshold
    else:  # sigmoid(-odds) is 1 - p without its rounding error
        sure = (place + 2) * jax.nn.sigmoid(-odds) < decode.factor
    return jnp.maximum(1, jnp.max(jnp.where(eligible & sure, place + 1, 0), axis=-1))


def _advance(progress: Progress, is_mask: jax.Array, decode: DecodeConfig) -> Progress:
    """Go on to the next block where this one holds no mask before the end."""
    left = (is_mask & _in_block(progress, decode)).any(-1)
    block = jnp.where(left, progress.block, progress.block + 1)
    remaining = progress.end - block * decode.block_length
    return progress._replace(
        block=block,
        step=jnp.where(left, progress.step + 1, 0),
        masks=jnp.where(left, progress.masks, jnp.clip(remaining, 0, decode.block_length)),
    )
