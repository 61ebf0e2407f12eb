"""Meshes and where arrays live on them. One mesh `(data, fsdp, tensor)` serves every run."""

from __future__ import annotations

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """Mesh over all devices; at most one size is -1 and takes what the others leave.

    Raises ValueError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1:
        raise ValueError(f"mesh={dict(zip(AXES, sizes))}: at most one size may be -1")
    if -1 in sizes:
        rest = int(np.prod([s for s in sizes if s != -1]))
        sizes[sizes.index(-1)] = len(devices) // max(rest, 1)
    if int(np.prod(sizes)) != len(devices) or min(sizes) < 1:
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes))} covers {int(np.prod(sizes))} devices, but "
            f"{len(devices)} are present; set one of mesh.data, mesh.fsdp, mesh.tensor to -1"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_batch(batch_size: int, mesh: Mesh, what: str = "batch_size") -> None:
    """Refuse a global batch that does not split evenly over the mesh and the hosts."""
    ways = int(np.prod([mesh.shape[a] for a in BATCH_AXES]))
    ways = int(np.lcm(ways, jax.process_count()))
    if batch_size % ways:
        low, high = batch_size // ways * ways, -(-batch_size // ways) * ways
        choices = f"{low} or {high}" if low else str(high)
        raise ValueError(
            f"{what}={batch_size} is not divisible by {ways} devices "
            f"(mesh data={mesh.shape['data']}, fsdp={mesh.shape['fsdp']}); use {choices}"
        )


def put_batch(batch: dict, mesh: Mesh) -> dict:
    """Host-local numpy rows -> global arrays sharded over the batch axes; text stays behind."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    arrays = {k: v for k, v in batch.items() if getattr(v, "dtype", np.dtype("O")).kind in "biufV"}
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in arrays.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def paths(tree) -> list[str]:
    """`a/b/kernel` of every leaf, in tree order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [
        "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path) for path, _ in flat
    ]


def tree_shardings(tree, rules, mesh: Mesh):
    """NamedSharding of every leaf: the first rule whose regex matches its path, else replicated."""

    def one(path: str) -> NamedSharding:
        for pattern, spec in rules:
            if re.search(pattern, path):
                return NamedSharding(mesh, P(*spec))
        return replicated(mesh)

    structure = jax.tree_util.tree_structure(tree)
    return jax.tree_util.tree_unflatten(structure, [one(p) for p in paths(tree)])


def put_tree(tree, shardings):
    """Host arrays -> device arrays; each process hands over only the slices it owns."""

    def one(leaf, sharding):
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree, shardings)


def split_tree(tree: dict, pattern: str) -> tuple[dict, dict]:
    """Nested dict -> (leaves whose path matches, the others), both nested dicts without holes."""
    chosen, rest = {}, {}
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    for (path, leaf), name in zip(flat, paths(tree)):
        target = chosen if re.search(pattern, name) else rest
        for key in path[:-1]:
            target = target.setdefault(key.key, {})
        target[path[-1].key] = leaf
    return chosen, rest


def merge_trees(a: dict, b: dict) -> dict:
    """Inverse of split_tree."""
    out = dict(a)
    for key, value in b.items():
        out[key] = merge_trees(out[key], value) if key in out else value
    return out
