"""Decoding: an answer of masks becomes text in a few passes of the core.

B rows, P prefix positions (prompt with pictures, padded on the right), L positions of the answer,
F of a fixed suffix, G = B, or 2B with guidance, D width, V vocabulary rows. In memory the answer
comes first and the prefix last, so that its padding is hidden by a length; positions are those of
prefix, answer, suffix. Source: the samplers of LLaDA (text) and LLaDA-V (embeddings).

What saves work without changing an answer is always on: pictures are embedded by the caller, once;
the head sees answer rows only, and so does the last block but for its keys and values; a pass that
would commit nothing is left out; the loop ends when all rows are complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common_jax.compiler import jit
from geodit_jax import llada
from geodit_jax.config import GeoDiTConfig
from geodit_jax.decode_config import DecodeConfig
from geodit_jax.unmasking import Progress, begin, commit, find_end_of_text, is_active

Tree = Any


class Decoded(NamedTuple):
    """Answers and how they came about."""

    ids: jax.Array
    """[B,L] int32; behind the end of an answer, positions that were never decoded hold eos."""
    length: jax.Array
    """[B] tokens before the stop sequence, eot or eos, whichever comes first."""
    steps: jax.Array
    """[B] passes until the row was complete."""
    committed_at: jax.Array
    """[B,L] int32: the pass that fixed a token, -1 where none did."""
    confidence: jax.Array
    """[B,L] float32: the probability the token had in that pass, 0 where none did."""


class _Given(NamedTuple):
    """What no pass changes."""

    prefix: jax.Array  # [G,P,D]
    suffix: jax.Array  # [G,F,D]
    angles: tuple[jax.Array, jax.Array]  # of the rotation, [G,L+F+P,1,E/2]
    lengths: jax.Array | None  # [G] keys that are seen


def generate(
    core: Tree,
    config: GeoDiTConfig,
    prefix: jax.Array,
    lengths: jax.Array | None,
    key: jax.Array,
    decode: DecodeConfig,
    suffix_ids: Sequence[int] = (),
    stop_ids: Sequence[int] = (),
) -> Decoded:
    """Answers to a batch of embedded prompts. Compiled once for each shape and each `decode`.

    core: parameters of the text core; on a CPU give `llada.unstack(core)`, made once.
    prefix [B,P,D], in the dtype of the computation; lengths [B] are its real tokens (None: all P).
    key: one random key, or one for each row [B]; unused without temperature and random remasking.
    suffix_ids: fixed tokens behind the answer. stop_ids: stop sequence; (): end-of-turn.
    Raises ValueError where shapes or ids do not fit.
    """
    if prefix.ndim != 3 or prefix.shape[-1] != config.text.width:
        raise ValueError(f"prefix {prefix.shape}: expected [rows, tokens, {config.text.width}]")
    if lengths is not None and lengths.shape != prefix.shape[:1]:
        raise ValueError(f"lengths {lengths.shape}: expected one for each of {len(prefix)} rows")
    unknown = [i for i in (*suffix_ids, *stop_ids) if not 0 <= i < config.text.vocab_rows]
    if unknown:
        raise ValueError(f"ids {unknown} are not among {config.text.vocab_rows} vocabulary rows")
    keys = key if key.ndim else jax.random.split(key, len(prefix))
    if keys.shape != prefix.shape[:1]:
        raise ValueError(f"{keys.shape[0]} keys for {len(prefix)} rows: give one, or one a row")
    stop = tuple(stop_ids) or (config.tokens.eot,)
    return _decode(core, prefix, lengths, keys, config, decode, tuple(suffix_ids), stop)


def _decode(core, prefix, lengths, keys, config, decode, suffix_ids, stop_ids) -> Decoded:
    given = _arrange(core, config, decode, prefix, lengths, suffix_ids)
    per_prefix = decode.passes_per_prefix

    def advance(progress: Progress, past):
        logits, past = _look(core, config, decode, given, progress, past)
        return commit(progress, logits, keys, decode, config.tokens, stop_ids), past

    def decode_round(progress: Progress) -> Progress:
        """One pass over everything, then passes over the answer that use its prefix again."""
        progress, past = advance(progress, None)
        if per_prefix == 1:
            return progress

        def more(carry):
            progress, count = carry
            due = (count < per_prefix) if per_prefix else True
            return is_active(progress, decode).any() & due

        def again(carry):
            progress, count = carry
            return advance(progress, past)[0], count + 1

        return jax.lax.while_loop(more, again, (progress, jnp.int32(1)))[0]

    progress = begin(prefix.shape[0], decode, config.tokens.mask)
    progress = jax.lax.while_loop(
        lambda progress: is_active(progress, decode).any(), decode_round, progress
    )
    end = jnp.minimum(progress.end, find_end_of_text(progress.ids, config.tokens))
    ids = jnp.where(progress.ids == config.tokens.mask, config.tokens.eos, progress.ids)
    return Decoded(ids, end, progress.passes, progress.committed_at, progress.confidence)


_decode = jit(_decode, static_argnums=(4, 5, 6, 7))


def _arrange(core, config, decode, prefix, lengths, suffix_ids) -> _Given:
    """Positions and fixed embeddings; guidance adds rows whose fixed tokens are masks."""
    rows, width, dtype, text = *prefix.shape[:2], prefix.dtype, config.text
    full = jnp.full((rows,), width) if lengths is None else lengths
    own = jnp.arange(decode.length + len(suffix_ids))
    behind = jnp.broadcast_to(jnp.arange(width), (rows, width))
    positions = jnp.concatenate([full[:, None] + own, behind], axis=1)
    suffix = llada.embed(core, jnp.asarray(suffix_ids, jnp.int32), dtype)
    suffix = jnp.broadcast_to(suffix, (rows, *suffix.shape))
    seen = None if lengths is None else lengths + len(own)
    angles = llada.rotary(positions, text.head_width, text.rope_theta)
    given = _Given(prefix, suffix, angles, seen)
    if not decode.guidance:
        return given
    mask = llada.embed(core, config.tokens.mask, dtype)
    blank = given._replace(
        prefix=jnp.broadcast_to(mask, prefix.shape), suffix=jnp.broadcast_to(mask, suffix.shape)
    )
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), given, blank)


def _look(core, config, decode, given: _Given, progress: Progress, past):
    """One pass: (logits [B,L,V] float32, keys and values of the prefix for later passes)."""
    copies = 2 if decode.guidance else 1
    answer = llada.embed(core, jnp.tile(progress.ids, (copies, 1)), given.prefix.dtype)
    x = jnp.concatenate([answer, given.suffix], axis=1)
    own = x.shape[1]
    if past is None:
        x = jnp.concatenate([x, given.prefix], axis=1)
    hidden, kept = llada.run(
        core,
        config.text,
        x,
        tuple(part[:, : x.shape[1]] for part in given.angles),
        seen=llada.Seen(given.lengths, _turns(config, decode, given, progress, x.shape[1])),
        past=past,
        rows=own,
        keep=past is None and decode.passes_per_prefix != 1,
        attention="inference",
    )
    logits = llada.logits(core, hidden[:, : decode.length])
    if decode.guidance:
        seeing, blind = jnp.split(logits, 2)
        logits = blind + (decode.guidance + 1) * (seeing - blind)
    return logits, kept


def _turns(config, decode, given: _Given, progress: Progress, queries: int):
    """Turns that hide the answer from the prefix, or what lies behind the end from all."""
    if not (config.prefix_lm or decode.length_mode == "auto"):
        return None
    rows, keys = given.angles[0].shape[:2]
    turns = jnp.ones((rows, keys), jnp.int32)
    if decode.length_mode == "auto":
        copies = rows // progress.end.shape[0]
        hidden = jnp.arange(decode.length) >= jnp.tile(progress.end, copies)[:, None]
        turns = turns.at[:, : decode.length].add(hidden)
    if config.prefix_lm:
        own = keys - given.prefix.shape[1]
        turns = turns.at[:, own:].set(0)
    return turns[:, :queries], turns
