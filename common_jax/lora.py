"""Low-rank adapters (Hu et al. 2021, LoRA) as a transform of the parameter tree.

A kernel [...,C,F] gets three neighbours: `lora_a` [...,C,r], `lora_b` [...,r,F] and the number
`lora_scale` [...] = alpha / r. `common_jax.layers.Linear` adds scale * (x a) b to x kernel where it
finds them; leading axes are those of stacked layers. b starts at 0: a new tree computes what the
old one did. Only a and b are trained: a regex on their names is all that the optimiser needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common_jax.init import leaf_rng

Tree = Any

TRAINABLE = r"/lora_[ab]$"
NAMES = ("lora_a", "lora_b", "lora_scale")


def add_adapters(tree: Tree, targets: Sequence[str], rank: int, alpha: float, seed: int) -> Tree:
    """The tree with adapters beside the kernels of the layers named in `targets`.

    New leaves are float32 arrays on the host: a normal with standard deviation 1/sqrt(C), b zeros.
    Raises ValueError for a rank below 1, a target that no layer has, a layer that has adapters.
    """
    return _extend(tree, targets, rank, lambda *leaf: _make_leaf(*leaf, alpha / rank, seed))


def merge_adapters(tree: Tree) -> Tree:
    """The tree without adapters: kernel + scale * a b, in the kernel's dtype, nothing else touched.

    Kernels stay where they are, numpy arrays on the host; one layer of a stack is merged at a time.
    """
    if not isinstance(tree, Mapping):
        return tree
    if not set(NAMES) <= set(tree):
        return {name: merge_adapters(child) for name, child in tree.items()}
    merged = {name: leaf for name, leaf in tree.items() if name not in NAMES}
    kernel, adapters = tree["kernel"], [tree[name] for name in NAMES]
    # What was gathered from several hosts would not fit into the memory of one of their devices.
    merge = _merge_on_host if isinstance(kernel, np.ndarray) else _merge_kernel
    return merged | {"kernel": merge(kernel, *adapters)}


def _merge_on_host(kernel, a, b, scale) -> np.ndarray:
    merged, layers = np.empty_like(kernel), kernel.shape[:-2]
    a, b, scale = (np.asarray(leaf, np.float32) for leaf in (a, b, scale))
    for layer in np.ndindex(layers):
        update = scale[layer] * (a[layer] @ b[layer])
        merged[layer] = (kernel[layer].astype(np.float32) + update).astype(kernel.dtype)
    return merged


@jax.jit
def _merge_kernel(kernel, a, b, scale):
    def one(leaves):
        kernel, a, b, scale = leaves
        update = jnp.dot(a, b, precision="highest", preferred_element_type=jnp.float32)
        return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)

    leaves = (kernel, a, b, scale)
    return one(leaves) if kernel.ndim == 2 else jax.lax.map(one, leaves)


def _extend(tree: Tree, targets: Sequence[str], rank: int, make: Callable) -> Tree:
    if rank < 1:
        raise ValueError(f"lora.rank={rank}: adapters need a rank of 1 or more")
    found: set[str] = set()

    def visit(node, path: tuple[str, ...]):
        if not isinstance(node, Mapping):
            return node
        out = {name: visit(child, (*path, name)) for name, child in node.items()}
        if not path or path[-1] not in targets or "kernel" not in node:
            return out
        if set(NAMES) & set(node):
            raise ValueError(f"{'/'.join(path)} has adapters already; merge them first")
        found.add(path[-1])
        *layers, rows, columns = node["kernel"].shape
        shapes = ((*layers, rows, rank), (*layers, rank, columns), tuple(layers))
        return out | {n: make("/".join((*path, n)), n, s) for n, s in zip(NAMES, shapes)}

    extended = visit(tree, ())
    missing = [name for name in targets if name not in found]
    if missing or not targets:
        raise ValueError(f"lora.targets: no layer is called {', '.join(missing) or '(none given)'}")
    return extended


def _make_leaf(path: str, name: str, shape: tuple[int, ...], scale: float, seed: int):
    if name == "lora_scale":
        return np.full(shape, scale, np.float32)
    if name == "lora_b":
        return np.zeros(shape, np.float32)
    values = leaf_rng(seed, path, shape).standard_normal(shape, np.float32)
    return values / np.float32(np.sqrt(shape[-2]))
