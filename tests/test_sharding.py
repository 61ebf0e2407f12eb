from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import xla_flags
from jax.sharding import PartitionSpec as P

from common_jax.sharding import (
    BATCH_AXES,
    check_batch,
    constrain,
    fit_spec,
    make_mesh,
    merge_trees,
    on_mesh,
    put_batch,
    put_tree,
    replicated,
    split_tree,
    tree_shardings,
)

ROOT = Path(__file__).parent.parent


def test_a_mesh_that_does_not_cover_the_devices_is_refused_with_its_sizes():
    devices = jax.devices()
    assert make_mesh(devices=devices).shape["data"] == len(devices)
    with pytest.raises(ValueError, match=r"'data': 3.*covers 3 devices, but 2 are present"):
        make_mesh(data=3, devices=devices[:2])
    with pytest.raises(ValueError, match="at most one size may be -1"):
        make_mesh(data=-1, fsdp=-1)


def test_a_batch_that_does_not_divide_names_the_nearest_that_do():
    mesh = make_mesh(devices=jax.devices()[:2])
    check_batch(8, mesh)
    with pytest.raises(ValueError, match=r"batch_size=7 is not divisible by 2 .*use 6 or 8"):
        check_batch(7, mesh)
    with pytest.raises(ValueError, match=r"eval.batch_size=1 .* use 2"):
        check_batch(1, mesh, "eval.batch_size")


def test_two_devices_give_the_gradient_of_one():
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    w = np.ones((3, 2), np.float32)

    def loss(w, x):
        return jnp.square(jnp.tanh(x @ w)).sum() / x.shape[0]

    found = []
    for count in (1, 2):
        mesh = make_mesh(devices=jax.devices()[:count])
        batch = put_batch({"x": x, "id": np.array(["a"] * 8)}, mesh)
        assert set(batch) == {"x"} and len(batch["x"].sharding.device_set) == count
        params = put_tree({"w": w}, tree_shardings({"w": w}, (), mesh))
        found.append(np.asarray(jax.jit(jax.grad(loss))(params["w"], batch["x"])))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


def test_the_first_rule_that_matches_a_path_places_the_leaf():
    mesh = make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    tree = {"a": {"kernel": np.zeros((4, 2))}, "b": {"kernel": np.zeros((4, 2))}}
    rules = [("^a/", ("fsdp",)), ("kernel", (None, "fsdp"))]
    placed = put_tree(tree, tree_shardings(tree, rules, mesh))
    assert placed["a"]["kernel"].addressable_shards[0].data.shape == (2, 2)
    assert placed["b"]["kernel"].addressable_shards[0].data.shape == (4, 1)


def test_splitting_and_merging_a_tree_is_the_identity():
    tree = {"head": {"w": 1, "b": 2}, "body": {"head": {"w": 3}, "w": 4}}
    chosen, rest = split_tree(tree, r"^head/|body/w")
    assert chosen == {"head": {"w": 1, "b": 2}, "body": {"w": 4}}
    assert rest == {"body": {"head": {"w": 3}}}
    assert merge_trees(rest, chosen) == tree


def test_an_axis_that_does_not_divide_a_side_is_left_out():
    mesh = make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    assert fit_spec(("fsdp", None), (4, 3), mesh) == P("fsdp", None)
    assert fit_spec((None, ("data", "fsdp")), (4, 3), mesh) == P(None, None)
    with pytest.raises(ValueError, match="more entries than the shape"):
        fit_spec((None, "fsdp"), (4,), mesh)


def test_a_large_parameter_that_would_lie_whole_is_refused_by_name():
    split = make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    tree = {"a": {"kernel": jax.ShapeDtypeStruct((1025, 1025), np.float32)}}
    with pytest.raises(ValueError, match=r"a/kernel \(1025, 1025\), 4 MiB.*no sharding rule"):
        tree_shardings(tree, (), split)
    with pytest.raises(ValueError, match=r"its rule \('fsdp',\) splits nothing with mesh.fsdp=2"):
        tree_shardings(tree, [("kernel", ("fsdp",))], split)
    even = {"a": {"kernel": jax.ShapeDtypeStruct((1026, 1025), np.float32)}}
    assert tree_shardings(even, [("kernel", ("fsdp",))], split)["a"]["kernel"].spec == P("fsdp")
    # Whole on purpose; small; and on a mesh that is data parallel alone.
    tree_shardings(tree, [("a/", ())], split)
    tree_shardings({"b": np.zeros((1024, 1024), np.float32)}, (), split)
    tree_shardings(tree, (), make_mesh(data=2, devices=jax.devices()[:2]))


class Device:
    """What a mesh is built from, without hardware."""

    platform, device_kind = "cpu", "cpu"

    def __init__(self, number: int, slice_index: int):
        self.id, self.slice_index, self.process_index = number, slice_index, slice_index


def test_slices_lie_along_dcn_whole_and_in_order():
    interleaved = [Device(i, i % 2) for i in range(8)]
    mesh = make_mesh(data=-1, fsdp=2, dcn=2, devices=interleaved)
    assert dict(mesh.shape) == {"dcn": 2, "data": 2, "fsdp": 2, "tensor": 1}
    slices = [{device.slice_index for device in part.flat} for part in mesh.devices]
    assert slices == [{0}, {1}]
    three = [Device(i, i // 2) for i in range(6)]
    with pytest.raises(ValueError, match=r"mesh.dcn=2, but the 6 devices lie in 3 slices"):
        make_mesh(data=-1, dcn=2, devices=three)


def test_a_slice_of_tpus_is_never_joined_to_another_by_fast_axes():
    devices = [Device(i, i // 2) for i in range(4)]
    for device in devices:
        device.platform = "tpu"
    with pytest.raises(ValueError, match=r"lie in 2 slices; use mesh.dcn=2"):
        make_mesh(data=-1, devices=devices)


def test_constraints_hold_inside_on_mesh_and_are_nothing_outside():
    mesh = make_mesh(data=2, devices=jax.devices()[:2])

    def double(x):
        return constrain(2 * x, BATCH_AXES, None)

    x = np.arange(8.0).reshape(4, 2)
    assert "sharding_constraint" not in str(jax.make_jaxpr(double)(x))
    placed = jax.device_put(x, replicated(mesh))
    doubled = jax.jit(on_mesh(mesh, double))(placed)
    assert doubled.addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(doubled, 2 * x)


@pytest.mark.slow
def test_eight_devices_give_the_steps_of_one_on_every_mesh():
    environment = os.environ | {
        "XLA_FLAGS": xla_flags(8),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "tests/eight_devices.py"]
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout)
    assert found["devices"] == 8
    assert set(found["meshes"]) == {"geodit 2x2x2x1", "geodit 1x2x2x2", "unet 2x4x1x1"}
    for name, errors in found["meshes"].items():
        assert errors["loss"] < 1e-5, name
        assert errors["grad_norm"] < 1e-4, name
        assert errors["moved"] < 1e-4, name
        assert errors["fell"] < 0.9995, name  # the steps did something
        assert errors["share"] < (0.35 if "unet" in name else 0.3), name
