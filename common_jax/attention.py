"""Softmax attention behind one function, with the kernel that suits the place.

B batch, N queries, M keys, H heads, D head width. Probabilities are float32 whatever the inputs.
"""

from __future__ import annotations

import math
import warnings

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "chunked")
# With fewer scores per head, XLA's batched matmul is as fast on a CPU as the loop over heads; with
# 1024 x 1024 it is six times slower.
CHUNKED_FROM_SCORES = 256 * 256
_warned: set[str] = set()


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lengths: jax.Array | None = None,
    causal: bool = False,
    turns: tuple[jax.Array, jax.Array] | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Scaled dot-product attention, q [B,N,H,D], k and v [B,M,H,D] -> [B,N,H,D] in q's dtype.

    `lengths` [B] int: keys at or beyond it are hidden. `causal`: query i sees keys 0..i.
    `turns`, int ([B,N] of the queries, [B,M] of the keys): a query sees keys of its own and
    earlier turns.
    `chunked` maps over batch x heads and keeps no scores for the backward pass; `auto` takes it
    on a CPU for long sequences, cudnn on a GPU where the kernel accepts the inputs, else xla.
    An implementation asked for that cannot take the inputs gives way to xla, with one warning.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r} is unknown; use one of {IMPLEMENTATIONS}")
    if q.shape[2:] != k.shape[2:] or k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise ValueError(f"attention over q {q.shape}, k {k.shape}, v {v.shape}: shapes disagree")
    if implementation == "auto":
        implementation = "xla" if _cudnn_obstacle(q) else "cudnn"
        if q.shape[1] * k.shape[1] >= CHUNKED_FROM_SCORES:
            # Decided when lowering: a program compiled for another platform keeps its kernel.
            return jax.lax.platform_dependent(
                cpu=lambda: _attend_chunked(q, k, v, lengths, causal, turns),
                default=lambda: _attend_whole(q, k, v, lengths, causal, turns, implementation),
            )
    if implementation == "cudnn":
        obstacle = _cudnn_obstacle(q)
        if obstacle:
            _warn_once(f"attention: cudnn cannot take {obstacle}; using xla")
            implementation = "xla"
    if implementation == "chunked":
        return _attend_chunked(q, k, v, lengths, causal, turns)
    return _attend_whole(q, k, v, lengths, causal, turns, implementation)


def _attend_whole(q, k, v, lengths, causal, turns, implementation) -> jax.Array:
    mask = None if turns is None else (turns[1][:, None] <= turns[0][:, :, None])[:, None]
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        key_value_seq_lengths=lengths,
        is_causal=causal,
        implementation=implementation,
    )


def _cudnn_obstacle(q: jax.Array) -> str:
    if jax.default_backend() not in ("gpu", "cuda"):
        return f"a {jax.default_backend()} device"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q.dtype}"
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"heads of size {q.shape[-1]}"
    return ""


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)


def _attend_chunked(q, k, v, lengths, causal, turns) -> jax.Array:
    """One head of one image at a time: its scores stay in the cache of a core."""
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    masked = lengths is not None or causal or turns is not None
    lengths = jnp.full((batch,), keys) if lengths is None else lengths
    scale = 1 / math.sqrt(width)

    def one_head(operands):
        q, k, v, length, turns = operands
        scores = jnp.einsum("nd,md->nm", q, k, preferred_element_type=jnp.float32) * scale
        if masked:
            visible = _visible(queries, keys, length, causal, turns)
            scores = jnp.where(visible, scores, -jnp.inf)
        probabilities = jax.nn.softmax(scores, axis=-1)
        return jnp.einsum("nm,md->nd", probabilities.astype(v.dtype), v)

    by_head = [jnp.moveaxis(x, 2, 1).reshape(batch * heads, -1, width) for x in (q, k, v)]
    of_rows = jax.tree.map(lambda x: jnp.repeat(x, heads, axis=0), (lengths, turns))
    out = jax.lax.map(jax.checkpoint(one_head), (*by_head, *of_rows))
    return jnp.moveaxis(out.reshape(batch, heads, queries, width), 1, 2)


def _visible(queries: int, keys: int, length: jax.Array, causal: bool, turns) -> jax.Array:
    visible = jnp.arange(keys)[None, :] < length
    if causal:
        visible &= jnp.arange(keys)[None, :] <= jnp.arange(queries)[:, None]
    if turns is not None:
        visible &= turns[1][None, :] <= turns[0][:, None]
    return visible
