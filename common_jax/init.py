"""Parameter values made on the host, from abstract shapes.

Tracing and compiling an `init` costs more than training a tiny model; `jax.eval_shape` plus numpy
costs nothing. Every value depends on (seed, path, shape) alone, so adding a layer, sharding the
tree or making one leaf at a time changes no other leaf.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from common_jax.sharding import put_tree

Rule = tuple[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]]


def traced_once(shapes: Callable[..., dict]) -> Callable[..., dict]:
    """`shapes(config)`, traced for a config once; every caller gets a tree of its own."""
    kept = functools.lru_cache(maxsize=16)(shapes)

    @functools.wraps(shapes)
    def copied(config) -> dict:
        return jax.tree.map(lambda leaf: leaf, kept(config))

    return copied


def host_init(
    shapes: Mapping, seed: int, rules: Sequence[Rule] = (), shardings: Mapping | None = None
) -> dict:
    """Numpy parameters for a tree of `jax.ShapeDtypeStruct` (nested dicts).

    `rules` are (regex searched in "a/b/kernel", fn(rng, shape) -> array); the first match wins.
    Without one the leaf name decides: `kernel` is uniform within 1/sqrt(fan_in), a `bias` beside
    a kernel likewise, a `bias` beside a `scale` is 0, `scale` is 1, `embedding` is normal with
    standard deviation 0.02 (the initial values of torch's layers, and of CLIP's embeddings).
    With `shardings`, of the same tree, a leaf is placed before the next one is made: the host never
    holds the whole. Raises ValueError for a leaf that neither a rule nor the defaults know.
    """
    made = [(re.compile(pattern), make) for pattern, make in rules]
    return _fill(shapes, (), seed, made, shardings)


def leaf_rng(seed: int, path: str, shape: tuple[int, ...]) -> np.random.Generator:
    """The generator of one leaf: a function of (seed, path, shape) and of nothing else."""
    digest = hashlib.sha256(f"{seed}:{path}:{tuple(shape)}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


def _fill(node: Mapping, prefix: tuple[str, ...], seed: int, rules: list, shardings) -> dict:
    filled = {}
    for name, child in node.items():
        where = shardings and shardings[name]
        if isinstance(child, Mapping):
            filled[name] = _fill(child, (*prefix, name), seed, rules, where)
        else:
            path = "/".join((*prefix, name))
            value = _make_leaf(path, child, node, leaf_rng(seed, path, child.shape), rules)
            filled[name] = put_tree(value, where) if where else value
    return filled


def _make_leaf(path: str, leaf: jax.ShapeDtypeStruct, siblings, rng, rules) -> np.ndarray:
    for pattern, make in rules:
        if pattern.search(path):
            value = np.asarray(make(rng, leaf.shape), leaf.dtype)
            if value.shape != leaf.shape:
                raise ValueError(
                    f"init rule {pattern.pattern!r} made shape {value.shape} for {path}, "
                    f"which needs {leaf.shape}"
                )
            return value
    return _default(path, leaf.shape, siblings, rng).astype(leaf.dtype, copy=False)


def _default(path: str, shape: tuple[int, ...], siblings, rng) -> np.ndarray:
    name = path.rsplit("/", 1)[-1]
    if name == "kernel" or (name == "bias" and "kernel" in siblings):
        bound = 1 / np.sqrt(np.prod(siblings["kernel"].shape[:-1]))
        return (2 * rng.random(shape, np.float32) - 1) * np.float32(bound)
    if name == "bias" and "scale" in siblings:
        return np.zeros(shape, np.float32)
    if name == "scale":
        return np.ones(shape, np.float32)
    if name == "embedding":
        return np.float32(0.02) * rng.standard_normal(shape, np.float32)
    raise ValueError(f"no initial value known for parameter {path} {shape}; give host_init a rule")
