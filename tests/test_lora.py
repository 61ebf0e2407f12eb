from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rel_error
from test_geodit_task import tiny
from test_train_loop import PIPELINE

from common_jax import lora
from common_jax.layers import Linear
from common_jax.optim import make_optimizer
from common_jax.sharding import make_mesh, merge_trees, paths, split_tree
from common_jax.train_loop import train
from common_jax.train_step import start_state
from geodit_jax import llada
from geodit_jax.config import TextConfig
from geodit_jax.convert import load_model
from geodit_jax.task import GeoDiTTask

TEXT = TextConfig(vocab_rows=64, width=32, layers=2, heads=4, kv_heads=2, mlp=48)
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_tree(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: 0.2 * rng.standard_normal(s.shape, np.float32), shapes)


@pytest.fixture(scope="module")
def core():
    return random_tree(llada.core_shapes(TEXT))


@pytest.fixture(scope="module")
def adapted(core):
    """The core with adapters that have learnt something."""
    tree = lora.add_adapters(core, SEVEN, rank=4, alpha=6.0, seed=0)
    trained, frozen = split_tree(tree, lora.TRAINABLE)
    return merge_trees(frozen, random_tree(trained, seed=1))


@jax.jit
def logits(core):
    ids = jnp.arange(16).reshape(2, 8)
    positions = jnp.broadcast_to(jnp.arange(8), ids.shape)
    hidden, _ = llada.run(core, TEXT, llada.embed(core, ids), positions)
    return llada.logits(core, hidden)


def test_new_adapters_change_nothing(core):
    tree = lora.add_adapters(core, SEVEN, rank=4, alpha=6.0, seed=0)
    np.testing.assert_array_equal(logits(tree), logits(core))


def test_merged_and_unmerged_adapters_give_the_same_logits(core, adapted):
    merged = lora.merge_adapters(adapted)
    assert paths(merged) == paths(core)
    assert rel_error(logits(merged), logits(adapted)) < 1e-5
    assert rel_error(logits(adapted), logits(core)) > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_on_the_host_are_merged_there_to_the_same_numbers(adapted, dtype, monkeypatch):
    trained, frozen = split_tree(adapted, lora.TRAINABLE)
    here = merge_trees(jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), frozen), trained)
    expected = lora.merge_adapters(jax.tree.map(jnp.asarray, here))
    monkeypatch.setattr(lora, "_merge_kernel", None)  # nothing is put on a device
    found = lora.merge_adapters(here)
    assert paths(found) == paths(expected)
    for a, b in zip(leaves(found), leaves(expected)):
        assert type(a) is np.ndarray and a.dtype == b.dtype
        assert rel_error(a.astype(np.float32), b.astype(np.float32)) < (
            1e-6 if b.itemsize > 2 else 4e-3
        )


def test_a_layer_adds_its_product_alpha_over_rank_times():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(5, 3)).astype(np.float32)
    tree = lora.add_adapters({"q": {"kernel": kernel}}, ("q",), rank=2, alpha=3.0, seed=0)["q"]
    tree["lora_b"] = rng.normal(size=(2, 3)).astype(np.float32)
    x = rng.normal(size=(4, 5)).astype(np.float32)
    expected = x @ kernel + 1.5 * x @ tree["lora_a"] @ tree["lora_b"]
    found = Linear(3, use_bias=False).apply({"params": tree}, x)
    assert rel_error(found, expected) < 1e-5
    merged = lora.merge_adapters({"q": tree})["q"]
    assert set(merged) == {"kernel"} and rel_error(x @ merged["kernel"], expected) < 1e-5


def test_merging_keeps_the_type_of_kernels_and_rounds_once():
    kernel = jnp.full((2, 1, 1), 1.0, jnp.bfloat16)  # two layers of one number
    tree = lora.add_adapters({"q": {"kernel": kernel}}, ("q",), rank=1, alpha=1.0, seed=0)
    tree["q"] |= {"lora_a": np.full((2, 1, 1), 3e-2, np.float32)}
    tree["q"] |= {"lora_b": np.full((2, 1, 1), 1.0, np.float32)}
    merged = lora.merge_adapters(tree)["q"]["kernel"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, jnp.full((2, 1, 1), 1.03, jnp.bfloat16))


def test_adapters_that_cannot_be_are_refused(core):
    with pytest.raises(ValueError, match="no layer is called qproj"):
        lora.add_adapters(core, ("q_proj", "qproj"), rank=4, alpha=1.0, seed=0)
    with pytest.raises(ValueError, match=r"lora\.rank=0"):
        lora.add_adapters(core, SEVEN, rank=0, alpha=1.0, seed=0)
    twice = lora.add_adapters(core, SEVEN, rank=2, alpha=1.0, seed=0)
    with pytest.raises(ValueError, match="has adapters already"):
        lora.add_adapters(twice, SEVEN, rank=2, alpha=1.0, seed=0)
    with pytest.raises(ValueError, match=r"train\.stage=sft or pretrain"):
        GeoDiTTask(tiny("align", **{"lora.rank": 4}))


def test_only_adapters_are_trained_and_the_rest_is_held_in_the_type_of_the_computation():
    config = tiny(**{"lora.rank": 4, "lora.alpha": 1.0, "model.dtype": "bfloat16"})
    tx = make_optimizer(config.optim, lambda step: 1e-3)
    state, frozen = start_state(GeoDiTTask(config), tx, config, make_mesh())
    assert {path.rsplit("/")[-1] for path in paths(state.params)} == {"lora_a", "lora_b"}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert len(jax.tree.leaves(state.params)) == 2 * len(SEVEN)
    kept = sum(leaf.size for leaf in jax.tree.leaves(state.opt) if leaf.ndim)
    assert kept == 2 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    types = {path.rsplit("/")[-1]: leaf.dtype for path, leaf in zip(paths(frozen), leaves(frozen))}
    assert types.pop("lora_scale") == jnp.float32
    assert set(types.values()) == {jnp.dtype("bfloat16")}
    rows = {row.name: row for row in GeoDiTTask(config).plan()}
    assert [name for name, row in rows.items() if row.trainable] == ["core adapters"]
    assert sum(x.size for x in leaves(rows["core adapters"].shapes)) == sum(
        x.size for x in leaves(state.params)
    )


def leaves(tree):
    return jax.tree.leaves(tree)


@pytest.mark.slow
def test_a_run_with_adapters_exports_the_model_that_it_scored(tmp_path):
    settings = {"lora.rank": 4, "optim.lr": 1e-2, "data.val": "none", "eval.select": ""}
    config = tiny(**settings)
    made = GeoDiTTask(config)
    before, _ = made.init(config.seed)
    assert train(made, config, str(tmp_path), PIPELINE) == 0
    after = load_model(tmp_path / "export")[0]
    plain = lora.merge_adapters(before)
    changed = {
        path.rsplit("/")[-2]
        for path, a, b in zip(paths(plain), leaves(plain), leaves(after))
        if not np.array_equal(a, b)
    }
    assert changed == set(SEVEN)
