"""Small text cores, of golden folders and random ones, and decoding without our loop."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from geodit_oracle import read_tree

from common_jax.init import host_init
from geodit_jax import llada
from geodit_jax.config import GeoDiTConfig, TextConfig, TokenIds

IDS = TokenIds(mask=40, eos=41, bos=42, start_header=43, end_header=44, eot=45, size=46)
SMALL = GeoDiTConfig(
    text=TextConfig(vocab_rows=48, width=32, layers=2, heads=4, kv_heads=2, mlp=48),
    tower=None,
    tokens=IDS,
)


def random_core(config: GeoDiTConfig = SMALL, seed: int = 0) -> dict:
    """Kernels large enough that every answer token depends on the others."""
    rules = [(r"kernel$", lambda rng, shape: rng.normal(0, 1.5 * shape[-2] ** -0.5, shape))]
    return jax.tree.map(jnp.asarray, host_init(llada.core_shapes(config.text), seed, rules))


def read_core(folder: Path) -> tuple[dict, dict]:
    """(parameters, config.json) of a checkpoint with LLaDA-V's names."""
    core = read_tree(folder / "model.safetensors")["core"]
    return jax.tree.map(jnp.asarray, core), json.loads((folder / "config.json").read_text())


@functools.partial(jax.jit, static_argnums=(1, 3))
def answer_logits(core, config: GeoDiTConfig, x, start: int):
    """Logits behind `start` of one sequence [1,N,D], laid out in the order of its positions."""
    positions = jnp.arange(x.shape[1])[None]
    turns = (positions >= start).astype(jnp.int32)
    seen = llada.Seen(turns=(turns, turns)) if config.prefix_lm else llada.Seen()
    hidden, _ = llada.run(core, config.text, x, positions, seen=seen)
    return llada.logits(core, hidden)[0, start:]


def decode_plainly(core, config, prefix, decode, suffix_ids=(), stop_ids=(), banned=()):
    """(ids [L], tokens before the stop, passes): the published sampler as a loop, one row [P,D].

    Greedy, linear quota; everything is computed again at each pass, confidence is a float64
    probability.
    """
    mask, length = config.tokens.mask, decode.length
    size = decode.block or length
    steps = min(decode.steps, length) // (length // size)
    ids = np.full(length, mask)
    end, passes = length, 0
    for start in range(0, length, size):
        for step in range(steps):
            place = np.arange(length)
            open_ = (ids == mask) & (place >= start) & (place < min(start + size, end))
            if not open_.any():
                break
            probability, choice = _predict(core, config, prefix, ids, suffix_ids, decode, banned)
            quota = size // steps + (step < size % steps)
            best = sorted(np.flatnonzero(open_), key=lambda i: (-probability[i], i))[:quota]
            ids[best] = choice[best]
            passes += 1
            for i in range(min(end, length - len(stop_ids) + 1) if stop_ids else 0):
                if tuple(ids[i : i + len(stop_ids)]) == tuple(stop_ids):
                    end = i
                    break
    return ids, end, passes


def _predict(core, config, prefix, ids, suffix_ids, decode, banned):
    def look(prefix, suffix_ids):
        parts = [prefix, llada.embed(core, ids), llada.embed(core, np.array(suffix_ids, int))]
        out = answer_logits(core, config, jnp.concatenate(parts)[None], len(prefix))
        return np.asarray(out, np.float64)[: len(ids)]

    logits = look(prefix, suffix_ids)
    if decode.guidance:
        masks = np.full(len(prefix), config.tokens.mask)
        blind = look(llada.embed(core, masks), [config.tokens.mask] * len(suffix_ids))
        logits = blind + (decode.guidance + 1) * (logits - blind)
    logits[:, [config.tokens.mask, *banned, *range(config.tokens.size, logits.shape[1])]] = -np.inf
    choice = logits.argmax(-1)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return (odds / odds.sum(-1, keepdims=True))[np.arange(len(ids)), choice], choice
