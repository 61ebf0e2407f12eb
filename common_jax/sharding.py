"""Meshes and where arrays live on them. One mesh `(dcn, data, fsdp, tensor)` serves every run.

The batch is split over `dcn`, `data` and `fsdp`, parameters over `fsdp` and `tensor`. `dcn` counts
slices that only a data-centre network joins: nothing but the sum of gradients crosses it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("dcn", "data", "fsdp", "tensor")
BATCH_AXES = ("dcn", "data", "fsdp")
LARGEST_WHOLE = 4 * 2**20
"""Bytes that a parameter may take on every device where parameters are split at all."""


def open_mesh(mesh, devices: Sequence | None = None) -> Mesh:
    """The mesh of the sizes in `config.mesh`, over all devices or those given."""
    return make_mesh(mesh.data, mesh.fsdp, mesh.tensor, mesh.dcn, devices)


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, dcn: int = 1, devices: Sequence | None = None
) -> Mesh:
    """Mesh over all devices; at most one size is -1 and takes what the others leave.

    Raises ValueError when the sizes do not multiply to the number of devices, or when `dcn` parts
    would cut through a slice.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [dcn, data, fsdp, tensor]
    if sizes.count(-1) > 1:
        raise ValueError(f"mesh={dict(zip(AXES, sizes))}: at most one size may be -1")
    if -1 in sizes:
        rest = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = len(devices) // max(rest, 1)
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes))} covers {math.prod(sizes)} devices, but "
            f"{len(devices)} are present; set one of mesh.data, mesh.fsdp, mesh.tensor to -1"
        )
    auto = (AxisType.Auto,) * len(AXES)
    # Each part is ordered by its own fast links; the slow ones lie between parts.
    parts = [
        jax.make_mesh(tuple(sizes[1:]), AXES[1:], axis_types=auto[1:], devices=part).devices
        for part in _split_slices(devices, sizes[0])
    ]
    return Mesh(np.stack(parts), AXES, axis_types=auto)


def _split_slices(devices: Sequence, dcn: int) -> list[Sequence]:
    """The devices in `dcn` equal parts of whole slices (hosts, where devices name no slice)."""

    def slice_of(device) -> int:
        return getattr(device, "slice_index", device.process_index)

    slices = len({slice_of(device) for device in devices})
    # Between hosts of GPUs parameters may well be split; between slices of TPUs they never should.
    is_multislice = devices[0].platform == "tpu" and hasattr(devices[0], "slice_index")
    if slices > 1 and (slices % dcn or (dcn == 1 and is_multislice)):
        raise ValueError(
            f"mesh.dcn={dcn}, but the {len(devices)} devices lie in {slices} slices; use "
            f"mesh.dcn={slices} (the other sizes are those of one slice)"
        )
    if dcn == 1:
        return [devices]
    ordered, size = sorted(devices, key=slice_of), len(devices) // dcn
    return [ordered[i * size : (i + 1) * size] for i in range(dcn)]


def count_ways(mesh: Mesh) -> int:
    """Parts that the batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch_size: int, mesh: Mesh, what: str = "batch_size") -> None:
    """Refuse a global batch that does not split evenly over the mesh and the hosts."""
    ways = math.lcm(count_ways(mesh), jax.process_count())
    if batch_size % ways:
        low, high = batch_size // ways * ways, -(-batch_size // ways) * ways
        choices = f"{low} or {high}" if low else str(high)
        sizes = ", ".join(f"{axis}={mesh.shape[axis]}" for axis in BATCH_AXES)
        raise ValueError(
            f"{what}={batch_size} is not divisible by {ways} devices (mesh {sizes}); use {choices}"
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
    """NamedSharding of every leaf: the first rule whose regex matches its path, else replicated.

    An axis that does not divide its dimension is left out. Where the mesh splits parameters (fsdp
    or tensor above 1), a leaf of more than 4 MiB that stays whole on every device raises
    ValueError, unless its rule is `()`, which says that it may.
    """
    leaves, structure = jax.tree_util.tree_flatten(tree)
    placed = [_place(path, leaf, rules, mesh) for path, leaf in zip(paths(tree), leaves)]
    return jax.tree_util.tree_unflatten(structure, placed)


def _place(path: str, leaf, rules, mesh: Mesh) -> NamedSharding:
    spec = next((spec for pattern, spec in rules if re.search(pattern, path)), None)
    sharding = NamedSharding(mesh, fit_spec(spec or (), leaf.shape, mesh))
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    size = leaf.size * leaf.dtype.itemsize
    if spec != () and fsdp * tensor > 1 and size > LARGEST_WHOLE and sharding.is_fully_replicated:
        why = "no sharding rule names it" if spec is None else f"its rule {spec} splits nothing"
        raise ValueError(
            f"{path} {tuple(leaf.shape)}, {size / 2**20:.0f} MiB, would lie whole on every device: "
            f"{why} with mesh.fsdp={fsdp}, mesh.tensor={tensor}. Choose a mesh.fsdp that divides "
            "its sides, or add a rule; the rule () lets it lie whole"
        )
    return sharding


def fit_spec(spec: Sequence, shape: Sequence[int], mesh) -> P:
    """PartitionSpec of `spec` without the entries that do not divide their dimension."""
    if len(spec) > len(shape):
        raise ValueError(f"sharding {tuple(spec)} has more entries than the shape {tuple(shape)}")

    def divides(entry, size: int) -> bool:
        axes = (entry,) if isinstance(entry, str) else entry or ()
        return size % math.prod(mesh.shape[axis] for axis in axes) == 0

    return P(*(entry if divides(entry, size) else None for entry, size in zip(spec, shape)))


def on_mesh(mesh: Mesh, function: Callable) -> Callable:
    """`function`, traced so that `constrain` inside of it lays arrays out on `mesh`."""

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def constrain(x: jax.Array, *spec) -> jax.Array:
    """x laid out by `spec`, an entry a dimension; x itself where `on_mesh` set no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fit_spec(spec, x.shape, mesh))


def axis_size(axis: str) -> int:
    """Devices along an axis of the mesh; 1 where `on_mesh` set none."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[axis]


def put_tree(tree, shardings):
    """Host arrays -> device arrays; each process hands over only the slices it owns."""

    def one(leaf, sharding):
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree, shardings)


def read_slices(shape: Sequence[int], sharding, read: Callable) -> jax.Array:
    """Device array of which this process reads only the slices that it holds, each of them once.

    read: (a slice with its bounds for every dimension) -> that part as numpy.
    """
    once = functools.lru_cache(None)(lambda *bounds: read(tuple(slice(*pair) for pair in bounds)))

    def fetch(index):
        return once(*(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)))

    return jax.make_array_from_callback(tuple(shape), sharding, fetch)


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
