"""Softmax attention behind one function, with the kernel that suits the place.

B batch, N queries, M keys, H heads, D head width. Probabilities are float32 whatever the inputs.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import warnings

import jax
import jax.numpy as jnp

from common_jax.attention_sketch import attend_sketched

IMPLEMENTATIONS = ("auto", "inference", "xla", "cudnn", "chunked", "sliced", "blocked")
# With fewer scores per head, XLA's batched matmul is as fast on a CPU as the loop over heads; with
# 1024 x 1024 it is six times slower.
CHUNKED_FROM_SCORES = 256 * 256
# Scores of one example that an accelerator holds at once: 128 MiB of float32.
BLOCK_SCORES = 2**25
_warned: set[str] = set()
_planned: contextvars.ContextVar[str] = contextvars.ContextVar("planned", default="")


@contextlib.contextmanager
def planned_for(platform: str):
    """Within, what is traced attends as it would on `platform` (cpu, gpu, tpu; "": where it is).

    cuDNN's kernel then stands there by shapes alone on a machine without it.
    """
    token = _planned.set("gpu" if platform == "cuda" else platform)
    try:
        yield
    finally:
        _planned.reset(token)


def _platform() -> str:
    return _planned.get() or jax.default_backend()


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
    on a CPU for long sequences, cudnn on a GPU where the kernel accepts the inputs, else xla, or
    `blocked`, a block of queries at a time, where the scores of one example fill 256 MiB.
    `inference` does as `auto` with `sliced` in place of `chunked`: it copies no inputs, which
    makes the forward pass faster and the backward pass slower.
    An implementation asked for that cannot take the inputs gives way to xla, with one warning.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r} is unknown; use one of {IMPLEMENTATIONS}")
    if q.shape[2:] != k.shape[2:] or k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise ValueError(f"attention over q {q.shape}, k {k.shape}, v {v.shape}: shapes disagree")
    if implementation in ("auto", "inference"):
        on_cpu = _attend_chunked if implementation == "auto" else _attend_sliced
        implementation = "cudnn"
        if _cudnn_obstacle(q):
            scores = q.shape[1] * k.shape[1] * q.shape[2]
            implementation = "blocked" if scores >= 2 * BLOCK_SCORES else "xla"
        is_long = q.shape[1] * k.shape[1] >= CHUNKED_FROM_SCORES
        if is_long and _planned.get() == "cpu":
            return on_cpu(q, k, v, lengths, causal, turns)
        if is_long and not _planned.get():
            # Decided when lowering: a program compiled for another platform keeps its kernel.
            return jax.lax.platform_dependent(
                cpu=lambda: on_cpu(q, k, v, lengths, causal, turns),
                default=lambda: _dispatch(q, k, v, lengths, causal, turns, implementation),
            )
    if implementation == "cudnn":
        obstacle = _cudnn_obstacle(q)
        if obstacle:
            _warn_once(f"attention: cudnn cannot take {obstacle}; using xla")
            implementation = "xla"
    return _dispatch(q, k, v, lengths, causal, turns, implementation)


def _dispatch(q, k, v, lengths, causal, turns, implementation) -> jax.Array:
    parts = {"chunked": _attend_chunked, "sliced": _attend_sliced, "blocked": _attend_blocked}
    if implementation in parts:
        return parts[implementation](q, k, v, lengths, causal, turns)
    whole = _attend_even if implementation == "cudnn" else _attend_whole
    return whole(q, k, v, lengths, causal, turns, implementation)


def _attend_even(q, k, v, lengths, causal, turns, implementation) -> jax.Array:
    """With a row more where queries or keys are odd: cuDNN has no backward pass for those.

    The row of the keys is hidden, that of the queries dropped.
    """
    batch, queries, keys = *q.shape[:2], k.shape[1]
    more = (queries % 2, keys % 2)
    if not any(more):
        return _attend_whole(q, k, v, lengths, causal, turns, implementation)
    if more[1] and lengths is None:
        lengths = jnp.full((batch,), keys, jnp.int32)
    if turns is not None:  # the same turns again: a query that sees no key would divide by zero
        turns = tuple(jnp.pad(x, ((0, 0), (0, n)), "edge") for x, n in zip(turns, more))
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, n), (0, 0), (0, 0))) for x, n in zip((q, k, v), (*more, more[1]))
    )
    return _attend_whole(q, k, v, lengths, causal, turns, implementation)[:, :queries]


def _attend_whole(q, k, v, lengths, causal, turns, implementation) -> jax.Array:
    if implementation == "cudnn" and jax.default_backend() not in ("gpu", "cuda"):
        return attend_sketched(q, k, v)  # only where it is planned for
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
    if _platform() not in ("gpu", "cuda"):
        return f"a {_platform()} device"
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
            visible = _visible(jnp.arange(queries), keys, length, causal, turns)
            scores = jnp.where(visible, scores, -jnp.inf)
        probabilities = jax.nn.softmax(scores, axis=-1)
        return jnp.einsum("nm,md->nd", probabilities.astype(v.dtype), v)

    by_head = [jnp.moveaxis(x, 2, 1).reshape(batch * heads, -1, width) for x in (q, k, v)]
    of_rows = jax.tree.map(lambda x: jnp.repeat(x, heads, axis=0), (lengths, turns))
    out = jax.lax.map(jax.checkpoint(one_head), (*by_head, *of_rows))
    return jnp.moveaxis(out.reshape(batch, heads, queries, width), 1, 2)


def _attend_sliced(q, k, v, lengths, causal, turns) -> jax.Array:
    """Two heads of one image at a time, cut from where they lie: no transposed copies."""
    batch, queries, heads, width = q.shape
    keys, count = k.shape[1], 2 - heads % 2
    masked = lengths is not None or causal or turns is not None
    lengths = jnp.full((batch,), keys) if lengths is None else lengths
    lengths, turns = jax.tree.map(jnp.asarray, (lengths, turns))  # a traced row cuts no numpy
    scale = 1 / math.sqrt(width)

    def some_heads(place):
        row, head = place // (heads // count), place % (heads // count) * count

        def cut(x):
            return jax.lax.dynamic_slice(x, (row, 0, head, 0), (1, x.shape[1], count, width))[0]

        scores = jnp.einsum("nhd,mhd->hnm", cut(q), cut(k), preferred_element_type=jnp.float32)
        scores = scores * scale
        if masked:
            own_turns = jax.tree.map(lambda x: x[row], turns)
            visible = _visible(jnp.arange(queries), keys, lengths[row], causal, own_turns)
            scores = jnp.where(visible, scores, -jnp.inf)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        h = jnp.einsum("hnm,mhd->hnd", weights.astype(v.dtype), cut(v))
        # Dividing values is less work than dividing scores.
        return (h / weights.sum(-1, keepdims=True)).astype(q.dtype)

    out = jax.lax.map(some_heads, jnp.arange(batch * heads // count))
    return jnp.moveaxis(out.reshape(batch, heads, queries, width), 1, 2)


def _attend_blocked(q, k, v, lengths, causal, turns) -> jax.Array:
    """A block of queries of all examples and heads at a time; no scores are kept."""
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    least = -(-queries // max(BLOCK_SCORES // (heads * keys), 1))
    # Equal blocks where a count not much larger gives them: filled ones compute on zeros.
    count = next((n for n in range(least, 2 * least) if queries % n == 0), least)
    size = -(-queries // count)
    masked = lengths is not None or causal or turns is not None
    lengths = jnp.full((batch,), keys) if lengths is None else jnp.asarray(lengths)

    def cut(x, axis):
        """Blocks of queries in front; the last one is filled up with zeros."""
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, count * size - queries)
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)

    def block(operands):
        q, places, own = operands
        mask = None
        if masked:
            seen = functools.partial(_visible, places, keys, causal=causal)
            pairs = None if turns is None else (own, turns[1])
            mask = jax.vmap(lambda length, turns: seen(length, turns=turns))(lengths, pairs)[
                :, None
            ]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")

    own = None if turns is None else cut(jnp.asarray(turns[0]), 1)
    operands = (cut(q, 1), jnp.arange(count * size).reshape(count, size), own)
    out = jnp.moveaxis(jax.lax.map(jax.checkpoint(block), operands), 0, 1)
    return out.reshape(batch, count * size, *q.shape[2:])[:, :queries]


def attend_kept(
    q: jax.Array,
    own: tuple[jax.Array, jax.Array],
    kept: tuple[jax.Array, jax.Array],
    *,
    lengths: jax.Array | None = None,
    turns: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """A few queries q [B,N,H,D] over keys and values of their own and many kept ones.

    own: k and v [B,O,K,D]. kept: k [B,K,D,M] and v [B,K,M,D], the layouts that matmuls read
    without a copy, behind the own ones for `lengths` [B] and `turns` ([B,N], [B,O+M]), which mean
    what they do in `attend`. K divides H. Nothing is concatenated: both parts share one softmax.
    """
    batch, queries, heads, width = q.shape
    groups, first = own[0].shape[2], own[0].shape[1]
    q = q.reshape(batch, queries, groups, heads // groups, width)
    scale, wide = 1 / math.sqrt(width), jnp.float32
    new = jnp.einsum("bnghd,bmgd->bgnhm", q, own[0], preferred_element_type=wide) * scale
    old = jnp.einsum("bnghd,bgdm->bgnhm", q, kept[0], preferred_element_type=wide) * scale
    keys = first + old.shape[-1]
    if lengths is not None or turns is not None:
        length = jnp.full((batch,), keys) if lengths is None else lengths
        visible = (jnp.arange(keys) < length[:, None])[:, None]
        if turns is not None:
            visible &= turns[1][:, None] <= turns[0][:, :, None]
        visible = visible[:, None, :, None]
        new = jnp.where(visible[..., :first], new, -jnp.inf)
        old = jnp.where(visible[..., first:], old, -jnp.inf)
    top = jnp.maximum(new.max(-1), old.max(-1))[..., None]
    new, old = jnp.exp(new - top), jnp.exp(old - top)
    total = (new.sum(-1) + old.sum(-1))[..., None]
    h = jnp.einsum("bgnhm,bmgd->bgnhd", new.astype(q.dtype), own[1]) + jnp.einsum(
        "bgnhm,bgmd->bgnhd", old.astype(q.dtype), kept[1]
    )
    h = jnp.moveaxis((h / total).astype(q.dtype), 1, 2)
    return h.reshape(batch, queries, heads, width)


def _visible(places: jax.Array, keys: int, length: jax.Array, causal: bool, turns) -> jax.Array:
    """[N or 1,M] of one example: which keys the queries at `places` [N] see."""
    visible = jnp.arange(keys)[None, :] < length
    if causal:
        visible &= jnp.arange(keys)[None, :] <= places[:, None]
    if turns is not None:
        visible &= turns[1][None, :] <= turns[0][:, None]
    return visible
