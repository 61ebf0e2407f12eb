"""Values of parameters made on the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.init import host_init, traced_once
from common_jax.sharding import make_mesh, tree_shardings


def leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


SHAPES = {
    "conv": {"kernel": leaf(3, 3, 64, 32), "bias": leaf(32)},
    "norm": {"scale": leaf(8), "bias": leaf(8)},
    "table": {"embedding": leaf(500, 40)},
}


def test_defaults_follow_the_leaf_name():
    params = host_init(SHAPES, seed=0)
    bound = 1 / np.sqrt(9 * 64)
    for name in ("kernel", "bias"):
        values = params["conv"][name]
        assert values.dtype == np.float32
        assert 0.9 * bound < np.abs(values).max() <= bound
        assert abs(values.mean()) < 0.3 * bound
    np.testing.assert_array_equal(params["norm"]["scale"], 1)
    np.testing.assert_array_equal(params["norm"]["bias"], 0)
    assert abs(params["table"]["embedding"].std() / 0.02 - 1) < 0.02


def test_a_value_depends_on_seed_path_and_shape_only():
    whole, part = host_init(SHAPES, seed=3), host_init({"conv": SHAPES["conv"]}, seed=3)
    np.testing.assert_array_equal(whole["conv"]["kernel"], part["conv"]["kernel"])
    moved = host_init({"other": SHAPES["conv"]}, seed=3)
    for other in (moved["other"], host_init(SHAPES, seed=4)["conv"]):
        assert np.abs(other["kernel"] - whole["conv"]["kernel"]).max() > 0


def test_rules_come_first_and_keep_shape_and_dtype():
    rules = [
        ("conv/bias", lambda rng, shape: np.zeros(shape)),
        ("conv/", lambda rng, shape: rng.standard_normal(shape)),
    ]
    shapes = SHAPES | {"conv": {"kernel": leaf(2, 4, dtype=jnp.bfloat16), "bias": leaf(4)}}
    params = host_init(shapes, 0, rules)
    np.testing.assert_array_equal(params["conv"]["bias"], 0)
    assert params["conv"]["kernel"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"rule 'scale' made shape \(2,\) for norm/scale"):
        host_init(SHAPES, 0, [("scale", lambda rng, shape: np.ones(2))])


def test_placed_leaves_have_the_values_of_those_on_the_host():
    mesh = make_mesh(data=1, fsdp=2)
    where = tree_shardings(SHAPES, [("embedding$", ("fsdp", None))], mesh)
    rules = [("embedding$", lambda rng, shape: rng.random(shape, np.float32))]
    placed = host_init(SHAPES, 1, rules, where)
    expected = host_init(SHAPES, 1, rules)
    jax.tree.map(np.testing.assert_array_equal, placed, expected)
    table = placed["table"]["embedding"]
    assert {shard.data.shape for shard in table.addressable_shards} == {(250, 40)}


def test_an_unknown_leaf_needs_a_rule():
    with pytest.raises(ValueError, match=r"a/temperature \(1,\); give host_init a rule"):
        host_init({"a": {"temperature": leaf(1)}}, 0)


def test_shapes_are_traced_once_and_no_caller_sees_what_another_changed():
    traced = []

    @traced_once
    def shapes(config):
        traced.append(config)
        return {"block": {"kernel": leaf(config)}}

    shapes(3)["block"]["bias"] = leaf(1)
    assert shapes(3) == {"block": {"kernel": leaf(3)}} and shapes(4)["block"]["kernel"].shape == (
        4,
    )
    assert traced == [3, 4]
