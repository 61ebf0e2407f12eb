"""The text core against the published code's vectors, against torch transformers, and itself."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import golden_cases, read_golden, rel_error
from geodit_oracle import read_tree, tree_from_state
from torch_oracle import randomise
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from common_jax.init import host_init
from geodit_jax import llada
from geodit_jax.config import TextConfig
from geodit_jax.llada import Seen

TINY = TextConfig(vocab_rows=48, width=32, layers=3, heads=4, kv_heads=2, mlp=40)
BATCH, TOKENS = 2, 10
POSITIONS = np.broadcast_to(np.arange(TOKENS), (BATCH, TOKENS))


@pytest.fixture(scope="module")
def core():
    # Kernels of one layer: the fan-in that stacked shapes suggest would make attention flat.
    def kernel(rng, shape):
        return rng.standard_normal(shape) * 1.5 / np.sqrt(shape[-2])

    return host_init(llada.core_shapes(TINY), 0, [("kernel$", kernel)])


@pytest.fixture(scope="module")
def embeds():
    return np.random.default_rng(1).standard_normal((BATCH, TOKENS, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def full(core, embeds):
    """(hidden of all tokens, keys and values of all tokens)"""
    return run(core, embeds, keep=True)


def run(core, x, positions=None, config=TINY, **options):
    if positions is None:
        positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    static = {name: options.pop(name) for name in ("rows", "keep", "remat") if name in options}

    def call(core, x, positions, options):
        return llada.run(core, config, x, positions, **static, **options)

    return jax.jit(call)(core, x, positions, options)


def run_ids(core, config, ids, positions=None, **options):
    """(hidden, logits) of token ids."""
    hidden, _ = run(core, llada.embed(core, ids), positions, config, **options)
    return hidden, llada.logits(core, hidden)


# ------------------------------------------------------------------------- against published code
def read_config(folder) -> TextConfig:
    published = json.loads((folder / "config.json").read_text())
    return TextConfig(
        vocab_rows=published["vocab_size"],
        width=published["hidden_size"],
        layers=published["num_hidden_layers"],
        heads=published["num_attention_heads"],
        kv_heads=published["num_key_value_heads"],
        mlp=published["intermediate_size"],
        rope_theta=published["rope_theta"],
        eps=published["rms_norm_eps"],
    )


@pytest.fixture(scope="module")
def golden(request):
    """(config, core, arrays)"""
    folder = request.param
    _, arrays = read_golden(folder)
    core = read_tree(folder / "model.safetensors")["core"]
    config = read_config(folder)
    shapes = jax.tree.map(lambda leaf: leaf.shape, llada.core_shapes(config))
    assert jax.tree.map(np.shape, core) == shapes
    return config, core, arrays


GOLDEN = golden_cases("llada_mha") + golden_cases("llada_gqa")


@pytest.mark.parametrize("golden", GOLDEN, indirect=True)
def test_golden_hidden_states_and_logits(golden):
    config, core, arrays = golden
    hidden, logits = run_ids(core, config, arrays["ids"])
    assert rel_error(hidden, arrays["hidden"]) < 1e-5
    assert rel_error(logits, arrays["logits"]) < 1e-5


@pytest.mark.parametrize("golden", GOLDEN, indirect=True)
def test_golden_logits_behind_padding_on_the_left(golden):
    """Padding is put behind the text and hidden; every token keeps its position."""
    config, core, arrays = golden
    mask = arrays["attention_mask"]
    assert not mask.all()
    order = np.argsort(1 - mask, axis=1, kind="stable")
    ids = np.take_along_axis(arrays["ids"], order, axis=1)
    _, logits = run_ids(core, config, ids, order, seen=Seen(lengths=mask.sum(1)))
    expected = np.take_along_axis(arrays["logits_padded"], order[..., None], axis=1)
    real = np.take_along_axis(mask, order, axis=1) == 1
    assert rel_error(np.asarray(logits)[real], expected[real]) < 1e-5


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_core_is_torch_llama_without_a_causal_mask(kv_heads):
    config = dataclasses.replace(TINY, kv_heads=kv_heads)
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=config.vocab_rows,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=kv_heads,
        intermediate_size=config.mlp,
        rms_norm_eps=config.eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attn_implementation="eager",
    )
    module = randomise(transformers.LlamaForCausalLM(settings))
    core = tree_from_state(module.state_dict())["core"]
    ids = np.random.default_rng(0).integers(0, 48, (BATCH, TOKENS))
    with torch.no_grad():
        nothing_hidden = torch.zeros(BATCH, 1, TOKENS, TOKENS)
        expected = module(torch.from_numpy(ids), attention_mask=nothing_hidden).logits
    assert rel_error(run_ids(core, config, ids)[1], expected.numpy()) < 1e-5


def test_rotation_in_the_activations_dtype_is_that_of_torch_to_the_bit():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((BATCH, TOKENS, 3, 8)), jnp.bfloat16)
    angles = llada.rotary(jnp.asarray(POSITIONS) * 31, 8, 1e4)
    cos, sin = (
        torch.from_numpy(np.concatenate([part[:, :, 0]] * 2, -1)).bfloat16() for part in angles
    )
    heads_first = torch.from_numpy(np.asarray(x, np.float32)).bfloat16().transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(heads_first, heads_first, cos, sin)
    expected = expected.transpose(1, 2).float().numpy()
    found = np.asarray(llada.rotate(x, angles, "activation"), np.float32)
    np.testing.assert_array_equal(found, expected)
    assert np.any(np.asarray(llada.rotate(x, angles, "float32"), np.float32) != expected)


@pytest.mark.parametrize("cast", ["float32", "activation"])
def test_the_gradient_of_a_rotation_is_the_derivative_of_its_formula(cast):
    rng = np.random.default_rng(0)
    x, weights = (rng.standard_normal((BATCH, TOKENS, 3, 8), np.float32) for _ in range(2))
    cos, sin = llada.rotary(jnp.asarray(POSITIONS), 8, 1e4)

    def formula(x):
        a, b = x[..., :4], x[..., 4:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def loss(turn):
        return lambda x: jnp.sum(weights * turn(x) ** 2)

    expected = jax.grad(loss(formula))(x)
    found = jax.grad(loss(lambda x: llada.rotate(x, (cos, sin), cast)))(x)
    assert rel_error(found, expected) < 1e-6


def test_full_size_has_the_published_number_of_tensors_and_parameters():
    shapes = llada.core_shapes(TextConfig())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 8_015_581_184
    in_layers = jax.tree.leaves(shapes["layers"])
    assert sum(leaf.size for leaf in in_layers) == 32 * 218_112_000
    assert len(jax.tree.leaves(shapes)) + 31 * len(in_layers) == 291


# ------------------------------------------------------------------------------------ what it sees
def test_a_late_token_changes_every_early_one(core, embeds, full):
    changed = embeds.copy()
    changed[:, -1] += 1
    hidden, _ = run(core, changed)
    assert np.abs(hidden - full[0]).max(axis=2).min() > 1e-4


def test_left_and_right_padding_change_no_logit(core, embeds):
    """Three padded places in the second row; behind the text, or in front by their positions."""
    text = 7
    alone, _ = run(core, embeds[1:, :text])
    lengths = np.array([TOKENS, text])
    right, _ = run(core, embeds, POSITIONS, seen=Seen(lengths))
    in_front = POSITIONS.copy()
    in_front[1] = np.roll(np.arange(TOKENS), -3)  # text at 3..9, padding at 0..2
    left, _ = run(core, embeds, in_front, seen=Seen(lengths))
    assert rel_error(right[1:, :text], alone) < 1e-5
    assert rel_error(left[1:, :text], alone) < 1e-5
    unhidden, _ = run(core, embeds)
    assert np.abs(unhidden[1:, :text] - alone).max() > 1e-2  # padding that is seen does change them


def test_positions_count_only_relative_to_each_other(core, embeds, full):
    shifted, _ = run(core, embeds, POSITIONS + 1000)
    assert rel_error(shifted, full[0]) < 1e-4
    stretched, _ = run(core, embeds, POSITIONS * 2)
    assert rel_error(stretched, full[0]) > 1e-2


def test_the_order_in_memory_counts_for_nothing(core, embeds, full):
    order = np.random.default_rng(2).permutation(TOKENS)
    hidden, _ = run(core, embeds[:, order], POSITIONS[:, order])
    assert rel_error(hidden, full[0][:, order]) < 1e-5


def test_a_turn_is_computed_as_if_later_turns_did_not_exist(core, embeds):
    turns = np.repeat([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]], BATCH, 0)
    hidden, _ = run(core, embeds, seen=Seen(turns=(turns, turns)))
    part, _ = run(core, embeds[:, :7], seen=Seen(turns=(turns[:, :7], turns[:, :7])))
    assert rel_error(hidden[:, :7], part) < 1e-5
    first, _ = run(core, embeds[:, :3])
    assert rel_error(hidden[:, :3], first) < 1e-5
    changed = embeds.copy()
    changed[:, 0] += 1
    after, _ = run(core, changed, seen=Seen(turns=(turns, turns)))
    assert np.abs(after - hidden).max(axis=2).min() > 1e-4  # the first turn is seen by all


# ------------------------------------------------------------------------------- the ways to run it
@pytest.mark.parametrize(
    ("rows", "unrolled"), [(None, True), (4, False), (4, True), (TOKENS, False)]
)
def test_scanned_unrolled_and_trimmed_layers_give_the_same(core, embeds, full, rows, unrolled):
    layers = llada.unstack(core) if unrolled else core
    hidden, kept = run(layers, embeds, rows=rows, keep=True)
    assert rel_error(hidden, full[0][:, :rows]) < 1e-5
    behind = 0 if rows is None else rows
    assert np.stack(kept.k).shape == (3, BATCH, 2, 8, TOKENS - behind)
    assert np.stack(kept.v).shape == (3, BATCH, 2, TOKENS - behind, 8)
    if behind < TOKENS:
        assert rel_error(np.stack(kept.k), full[1].k[..., behind:]) < 1e-5
        assert rel_error(np.stack(kept.v), full[1].v[..., behind:, :]) < 1e-5


def test_nothing_is_kept_unless_asked_for(core, embeds):
    assert run(core, embeds[:, :3])[1] is None


@pytest.mark.parametrize(("rows", "unrolled"), [(None, False), (2, False), (2, True)])
def test_fresh_keys_and_values_of_the_others_give_the_full_run(core, embeds, full, rows, unrolled):
    own, lengths = 4, np.array([TOKENS, 8])
    layers = llada.unstack(core) if unrolled else core
    expected, kept = run(layers, embeds, seen=Seen(lengths), rows=own, keep=True)
    hidden, none = run(
        layers, embeds[:, :own], POSITIONS[:, :own], past=kept, seen=Seen(lengths), rows=rows
    )
    assert none is None
    assert rel_error(hidden, expected[:, :rows]) < 1e-5
    assert rel_error(hidden[1], full[0][1, :own][:rows]) > 1e-3  # lengths reach into the past


def test_turns_reach_into_the_past(core, embeds):
    own = 4
    turns = np.array([[2, 2, 2, 2, 0, 0, 0, 1, 1, 3]] * BATCH)
    expected, kept = run(core, embeds, seen=Seen(turns=(turns, turns)), rows=own, keep=True)
    seen = Seen(turns=(turns[:, :own], turns))
    hidden, _ = run(core, embeds[:, :own], POSITIONS[:, :own], past=kept, seen=seen)
    assert rel_error(hidden, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "remat"), [(None, "dots"), (4, "full")])
def test_what_the_backward_pass_computes_again_changes_no_gradient(core, embeds, rows, remat):
    def gradient(remat):
        def loss(core, x):
            hidden, _ = llada.run(core, TINY, x, POSITIONS, rows=rows, remat=remat)
            return jnp.sin(llada.logits(core, hidden)).sum()

        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(core, embeds))

    kept = gradient("none")
    for ours, expected in zip(gradient(remat), kept):
        if expected.any():  # the embedding table takes no part
            assert rel_error(ours, expected) < 1e-5
    assert sum(bool(leaf.any()) for leaf in kept) == len(kept) - 1


def test_bfloat16_is_close_to_float32_and_logits_stay_float32(core, embeds, full):
    hidden, _ = run(core, embeds.astype(jnp.bfloat16))
    assert hidden.dtype == jnp.bfloat16
    assert rel_error(np.asarray(hidden, np.float32), full[0]) < 5e-2
    assert llada.logits(core, hidden).dtype == jnp.float32


def test_wrong_requests_are_refused(core, embeds):
    with pytest.raises(ValueError, match="remat='some': use one of"):
        run(core, embeds, remat="some")
    with pytest.raises(ValueError, match="heads=3, kv_heads=3: heads must divide width"):
        TextConfig(width=32, heads=3, kv_heads=3)
    with pytest.raises(ValueError, match="rope_cast='bfloat16'"):
        TextConfig(rope_cast="bfloat16")
