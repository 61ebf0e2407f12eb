from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_cases, read_golden, rel_error, tree_norm

from geodit_jax import llada
from geodit_jax.chat import IMAGE
from geodit_jax.config import TextConfig
from geodit_jax.convert import load_model
from geodit_jax.image_layout import lay_out
from geodit_jax.masking import (
    IGNORED,
    Masks,
    columns_at_once,
    complement,
    draw_masks,
    draw_times,
    mask_targets,
    masked_loss,
)
from geodit_jax.model import encode_images, merge
from geodit_jax.sequence import expand
from geodit_jax.views import make_views
from tests.test_views import procedural

KEY = jax.random.key(7)


# ---------------------------------------------------------------------------- published training
def load_core(folder, config: TextConfig):
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")

    def layer(i, path):
        name = f"model.layers.{i}.{path.removesuffix('/kernel').removesuffix('/scale')}.weight"
        value = tensors[name.replace("/", ".")]
        return value.T if path.endswith("kernel") else value

    shapes = llada.core_shapes(config)["layers"]
    flat, structure = jax.tree_util.tree_flatten_with_path(shapes)
    names = ["/".join(key.key for key in path) for path, _ in flat]
    stacks = [np.stack([layer(i, name) for i in range(config.layers)]) for name in names]
    return {
        "embed_tokens": {"embedding": tensors["model.embed_tokens.weight"]},
        "layers": jax.tree.unflatten(structure, stacks),
        "norm": {"scale": tensors["model.norm.weight"]},
        "lm_head": {"kernel": tensors["lm_head.weight"].T},
    }


@functools.cache
def read_case(folder):
    import json

    meta, golden = read_golden(folder)
    published = json.loads((folder / "config.json").read_text())
    config = TextConfig(
        vocab_rows=published["vocab_size"],
        width=published["hidden_size"],
        layers=published["num_hidden_layers"],
        heads=published["num_attention_heads"],
        kv_heads=published["num_key_value_heads"],
        mlp=published["intermediate_size"],
        eps=published["rms_norm_eps"],
        rope_theta=published["rope_theta"],
    )
    return meta, golden, config, load_core(folder, config)


def loss_of_golden(core, golden, config, mask_id, turns=None):
    labels = jnp.asarray(golden["loss/labels"])
    masks = mask_targets(golden["loss/t"], golden["loss/u"], labels != IGNORED)
    mask_row = core["embed_tokens"]["embedding"][mask_id]
    x = jnp.where(masks.where[..., None], mask_row, golden["loss/embeds"])
    positions = jnp.broadcast_to(jnp.arange(labels.shape[1]), labels.shape)
    seen = llada.Seen(turns=None if turns is None else (turns, turns))
    hidden, _ = llada.run(core, config, x, positions, seen=seen)
    return masked_loss(core, hidden, labels, masks, rows=5).total / len(labels)


@pytest.mark.parametrize("folder", golden_cases("llada_[mg]*"))
def test_loss_and_gradients_equal_the_published_training(folder):
    meta, golden, config, core = read_case(folder)
    loss = functools.partial(
        loss_of_golden, golden=golden, config=config, mask_id=meta["ids"]["mask"]
    )
    value, gradient = jax.jit(jax.value_and_grad(loss))(core)
    assert rel_error(value, golden["loss/plain"]) < 2e-5
    assert rel_error(tree_norm(gradient), golden["loss/gradnorm"]) < 1e-4
    first = gradient["layers"]["self_attn"]["q_proj"]["kernel"][0]
    assert rel_error(first.T, golden["loss/grad_q0"]) < 1e-4


@pytest.mark.parametrize("folder", golden_cases("llada_[mg]*"))
def test_loss_under_the_turn_mask_equals_the_published_training(folder):
    meta, golden, config, core = read_case(folder)
    turns = jnp.asarray(golden["loss/conversation_ids"])
    loss = jax.jit(loss_of_golden, static_argnums=(2, 3))
    arrays = {k: v for k, v in golden.items() if k.startswith("loss/")}
    value = loss(core, arrays, config, meta["ids"]["mask"], turns)
    assert rel_error(value, golden["loss/conversation"]) < 2e-5


PICTURES = {"chat": 1, "chat_batch": 3, "two_turns": 1, "square": 2, "plain": 2}
ROWS, LENGTH, SLOTS = 3, 195, 9  # one shape for all cases: one compilation


def whole_model(folder):
    """(meta, arrays, params, config) of the tiny LLaDA-V."""
    meta, golden = read_golden(folder)
    params, config, _ = load_model(folder / "checkpoint")
    return meta, golden, params, config


def example_of(case, row, meta, golden, config):
    """Arrays of one row of a published batch, by our own layouts and views."""
    ids, labels = (golden[f"loss/{case}/{name}"][row].tolist() for name in ("input_ids", "labels"))
    size = tuple(meta[("photo", "photo2")[row]]) if IMAGE in ids else None
    layouts = [] if size is None else [lay_out(size, config, SLOTS)]
    example = expand(
        (ids, labels, [0] * len(ids)),
        layouts,
        config,
        config.tokens.eos,
        length=LENGTH,
        slots=SLOTS,
    )
    side = config.tower.image_size
    example["pixels"] = np.zeros((SLOTS, side, side, 3), np.uint8)
    if size is not None:
        views = make_views(procedural(*size, **meta["image"]), config)
        example["pixels"][: len(views)] = views
    taps = 4 - example["image_rows"].shape[1]
    for name in ("image_rows", "image_weights"):
        example[name] = np.pad(example[name], ((0, 0), (0, taps)))
    return example


def batch_of(case, meta, golden, config):
    """A published batch as padded arrays, with its draws."""
    rows, length = golden[f"loss/{case}/labels_expanded"].shape
    examples = [example_of(case, row, meta, golden, config) for row in range(rows)]
    batch = {k: np.stack([e[k] for e in examples]) for k in examples[0]}
    np.testing.assert_array_equal(
        batch["labels"][:, :length], golden[f"loss/{case}/labels_expanded"]
    )
    zero = golden.get(f"loss/{case}/embeds_are_zero", np.zeros((rows, length), bool))
    turns = golden.get(f"loss/{case}/conversation_ids", np.zeros((rows, length), np.int64))
    batch |= {"zero": zero, "turns": turns, "u": golden[f"loss/{case}/u"]}
    batch |= {"t": golden[f"loss/{case}/t"], "length": np.full(rows, length)}
    for name, fill in {"labels": IGNORED, "zero": True, "turns": 0, "u": 1.0}.items():
        more = ((0, ROWS - rows), (0, LENGTH - batch[name].shape[1]))
        batch[name] = np.pad(batch[name], more, constant_values=fill)
    return {k: np.pad(v, [(0, ROWS - len(v))] + [(0, 0)] * (v.ndim - 1)) for k, v in batch.items()}


def loss_of_model(params, batch, config, rows):
    """The published loss, which lets zero vectors behind shorter rows be attended."""
    masks = mask_targets(batch["t"], batch["u"], batch["labels"] != IGNORED)
    ids = jnp.where(masks.where, config.tokens.mask, batch["ids"])
    tokens = encode_images(params, config, batch["pixels"])
    x = merge(params, config, ids, tokens, batch["image_rows"], batch["image_weights"])
    x = jnp.where(batch["zero"][..., None], 0.0, x)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), ids.shape)
    lengths = jnp.maximum(batch["length"], 1)
    seen = llada.Seen(lengths, (batch["turns"], batch["turns"]))
    hidden, _ = llada.run(params["core"], config.text, x, positions, seen=seen)
    return masked_loss(params["core"], hidden, batch["labels"], masks).total / rows


@pytest.mark.parametrize("folder", golden_cases("llada_v"))
def test_losses_and_gradients_of_every_part_equal_the_published_training(folder):
    meta, golden, params, config = whole_model(folder)
    program = jax.jit(jax.value_and_grad(functools.partial(loss_of_model, config=config)))
    for case, rows in PICTURES.items():
        mode = {"square": "square", "plain": "square"}.get(case, "anyres")
        merged = "flat" if case == "plain" else "spatial_unpad"
        how = dataclasses.replace(config, image_mode=mode, merge=merged)
        value, gradient = program(params, batch_of(case, meta, golden, how), rows=rows)
        assert rel_error(value, golden[f"loss/{case}/loss"]) < 2e-5, case
        for part, tree in gradient.items():
            expected = golden[f"loss/{case}/gradnorm_{part}"]
            assert rel_error(tree_norm(tree), expected) < 1e-4, (case, part)
        first = gradient["projector"]["linear_0"]["kernel"]
        assert rel_error(first.T, golden[f"loss/{case}/grad_projector0"]) < 1e-4, case


# --------------------------------------------------------------------------------- forward process
draw = jax.jit(draw_masks, static_argnames=("group", "at_least_one"))
loss_in_rows = jax.jit(masked_loss, static_argnames="rows")


def targets_of(rows, length=400, every=2):
    return jnp.broadcast_to(jnp.arange(length) % every == 0, (rows, length))


def test_targets_are_masked_with_probability_p_and_nothing_else_is():
    targets = targets_of(64)
    masks = draw(KEY, jnp.arange(64), targets)
    assert not (masks.where & ~targets).any()
    share = masks.where.sum(1) / targets.sum(1)
    # 200 draws a row: three standard deviations of a share are at most 0.11.
    assert float(jnp.abs(share - masks.p).max()) < 0.13
    assert float(masks.p.min()) >= 1e-3 and float(masks.p.max()) <= 1.0
    assert 0.35 < float(masks.p.mean()) < 0.65


def test_the_masks_of_an_example_do_not_depend_on_its_batch():
    targets = targets_of(8)
    whole = draw(KEY, jnp.arange(8), targets, group=4)
    part = draw(KEY, jnp.arange(3, 5), targets[3:5], group=4)
    np.testing.assert_array_equal(whole.where[3:5], part.where)
    np.testing.assert_array_equal(whole.p[3:5], part.p)


def test_grouped_times_are_evenly_spread_and_change_between_groups():
    times = np.asarray(draw_times(KEY, jnp.arange(4000), group=8)).reshape(-1, 8)
    ordered = np.sort(times, axis=1)
    np.testing.assert_allclose(np.diff(ordered, axis=1), 1 / 8, atol=1e-6)
    assert np.unique(ordered[:, 0]).size == len(ordered)
    assert times.min() >= 0 and times.max() < 1
    # Each place in the group is uniform by itself.
    np.testing.assert_allclose(times.mean(0), 0.5, atol=0.06)


def test_at_least_one_target_is_masked_where_there_is_one():
    targets = jnp.concatenate([targets_of(63, 40), jnp.zeros((1, 40), bool)])
    index, t = jnp.arange(64), jnp.zeros(64)
    few = draw(KEY, index, targets, t=t)
    some = draw(KEY, index, targets, t=t, at_least_one=True)
    assert not few.where.any(1).all()
    np.testing.assert_array_equal(some.where.any(1), targets.any(1))
    assert not (some.where & ~targets).any()
    np.testing.assert_array_equal(some.where | few.where, some.where)


def test_a_copy_and_its_complement_mask_every_target_once():
    targets = targets_of(16)
    masks = draw(KEY, jnp.arange(16), targets)
    other = complement(masks, targets)
    np.testing.assert_array_equal(masks.where ^ other.where, targets)
    np.testing.assert_allclose(other.p, np.maximum(1 - masks.p, 1e-3))


# -------------------------------------------------------------------------------------------- loss
def problem(batch=4, length=24, width=16, vocab=40):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(batch, length, width)).astype(np.float32)
    labels = rng.integers(0, vocab, (batch, length)).astype(np.int32)
    labels[:, :7] = IGNORED
    labels[2] = IGNORED  # a row without targets
    core = {"lm_head": {"kernel": rng.normal(size=(width, vocab)).astype(np.float32)}}
    masks = draw(KEY, jnp.arange(batch), labels != IGNORED)
    return core, jnp.asarray(hidden), jnp.asarray(labels), masks


def plain_loss(core, hidden, labels, masks, weighting):
    """The formula on all logits at once."""
    logp = jax.nn.log_softmax(hidden @ core["lm_head"]["kernel"])
    nll = -jnp.take_along_axis(logp, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    nll = jnp.where(masks.where, nll, 0.0)
    nll = nll / masks.p[:, None] if weighting == "1/p" else nll
    return (nll.sum(1) / jnp.maximum((labels != IGNORED).sum(1), 1)).sum()


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["1/p", "none"])
@pytest.mark.parametrize(
    ("rows", "groups", "width", "vocab"),
    [
        (512, 1, 16, 40),
        (5, 1, 16, 40),
        (5, 2, 16, 40),
        (12, 4, 16, 40),
        (5, 2, 64, 384),  # few rows, wide: by columns, in three parts
    ],
)
def test_loss_in_chunks_and_groups_equals_the_formula_and_its_gradient(
    weighting, rows, groups, width, vocab
):
    core, hidden, labels, masks = problem(width=width, vocab=vocab)
    chunked = functools.partial(
        lambda c, h, **how: masked_loss(c, h, labels, masks, **how).total,
        weighting=weighting,
        rows=rows,
        groups=groups,
    )
    value, gradient = jax.value_and_grad(chunked, argnums=(0, 1))(core, hidden)
    expected = jax.value_and_grad(plain_loss, argnums=(0, 1))(
        core, hidden, labels, masks, weighting
    )
    assert rel_error(value, expected[0]) < 1e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, expected[1])


def test_the_gradient_of_a_head_is_made_in_parts_of_whole_tiles():
    assert [columns_at_once(n) for n in (384, 126464, 126349)] == [128, 126464 // 13, 126349]


def test_rows_of_a_batch_add_up_so_microbatches_are_exact():
    core, hidden, labels, masks = problem()
    whole = loss_in_rows(core, hidden, labels, masks).total
    parts = [
        loss_in_rows(core, hidden[s], labels[s], Masks(masks.where[s], masks.p[s])).total
        for s in (slice(0, 1), slice(1, 4))
    ]
    np.testing.assert_allclose(float(whole), float(sum(parts)), rtol=1e-6)


def test_nll_and_hits_are_those_of_masked_targets_in_their_places():
    core, hidden, labels, masks = problem()
    found = loss_in_rows(core, hidden, labels, masks, rows=5)
    logits = hidden @ core["lm_head"]["kernel"]
    right = (logits.argmax(-1) == labels) & masks.where
    np.testing.assert_array_equal(found.hits, right.astype(np.float32))
    np.testing.assert_array_equal(found.nll > 0, masks.where)


def test_expected_loss_of_a_constant_model_is_the_same_at_every_time():
    """1/p undoes the number of masked targets: with equal logits the mean is log V at any t."""
    rows, length, vocab = 256, 64, 11
    labels = jnp.zeros((rows, length), jnp.int32)
    core = {"lm_head": {"kernel": jnp.zeros((4, vocab))}}
    hidden = jnp.ones((rows, length, 4))

    @jax.jit
    def mean_at(t):
        masks = draw(KEY, jnp.arange(rows), labels != IGNORED, t=jnp.full(rows, t))
        return masked_loss(core, hidden, labels, masks).total / rows

    for t in (0.05, 0.3, 0.7, 1.0):
        p = (1 - 1e-3) * t + 1e-3
        three_deviations = 3 * np.sqrt((1 - p) / p / (rows * length)) * np.log(vocab)
        assert abs(float(mean_at(t)) - np.log(vocab)) <= three_deviations + 1e-5, t


def test_no_array_of_all_logits_and_no_gradient_of_a_frozen_head_exist():
    batch, length, width, vocab = 2, 64, 8, 97
    hidden = jnp.ones((batch, length, width))
    labels = jnp.zeros((batch, length), jnp.int32)
    masks = draw(KEY, jnp.arange(batch), labels != IGNORED)
    core = {"lm_head": {"kernel": jnp.ones((width, vocab))}}

    def text_of(argnums):
        grad = jax.grad(
            lambda c, h: masked_loss(c, h, labels, masks, rows=16).total, argnums=argnums
        )
        return jax.jit(grad).lower(core, hidden).as_text()

    both, frozen = text_of((0, 1)), text_of(1)
    sizes = [
        np.prod([int(n) for n in s.split("x")[:-1]]) for s in re.findall(r"<([\dx]+x)f32", both)
    ]
    assert sizes and max(sizes) <= 16 * vocab  # not batch * length * vocab
    outputs = rf"tensor<{width}x16xf32>, tensor<16x{vocab}xf32>|-> tensor<1x{width}x{vocab}xf32>"
    assert re.search(outputs, both) and not re.search(outputs, frozen)


def test_unknown_weighting_is_refused():
    core, hidden, labels, masks = problem()
    with pytest.raises(ValueError, match="loss_weighting='p': use one of"):
        masked_loss(core, hidden, labels, masks, weighting="p")
