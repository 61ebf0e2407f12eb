from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.sharding import (
    check_batch,
    make_mesh,
    merge_trees,
    put_batch,
    put_tree,
    split_tree,
    tree_shardings,
)


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
