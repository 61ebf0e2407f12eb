from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_loop import PIPELINE, losses

import launch
from common_jax.optim import make_optimizer
from common_jax.sharding import make_mesh, paths, split_tree
from common_jax.train_loop import train
from common_jax.train_step import TrainState, make_step
from configs import geodit_align, geodit_pretrain, geodit_sft
from data.pipeline import train_batches
from geodit_jax import flops, llada, task
from geodit_jax.config import find_size
from geodit_jax.convert import load_model
from geodit_jax.masking import IGNORED, Masks
from geodit_jax.model import count_parameters
from geodit_jax.task import EVAL_TIMES, GeoDiTTask
from geodit_jax.tokenizer import Tokenizer

CONFIGS = {"sft": geodit_sft, "align": geodit_align, "pretrain": geodit_pretrain}


def tiny(stage="sft", **changes):
    config = CONFIGS[stage].get_config("tiny")
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def batch_of(made, size=4):
    batches = train_batches(made.train_source(), made.transforms("train"), batch_size=size, seed=0)
    return {k: jnp.asarray(v) for k, v in next(batches).items()}


@pytest.fixture(scope="module")
def sft():
    return GeoDiTTask(tiny())


@pytest.fixture(scope="module")
def params(sft):
    return jax.tree.map(jnp.asarray, sft.init(0)[0])


@pytest.fixture(scope="module")
def batch(sft):
    return batch_of(sft)


LEARNING = {"data.size": 4, "optim.lr": 3e-3, "optim.schedule": "constant", "eval.every": 12}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run on four examples."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    config = tiny(**LEARNING, **{"optim.steps": 24, "checkpoint.every": 12})
    assert train(launch.make_task(config), config, str(folder), PIPELINE) == 0
    return folder


# ------------------------------------------------------------------------------------ whole runs
def test_four_examples_are_learnt(workdir):
    found = list(losses(workdir).values())
    assert np.mean(found[-8:]) < 0.3 * found[0]


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(workdir, tmp_path):
    for steps in (3, 5):
        config = tiny(**LEARNING, **{"optim.steps": steps, "data.val": "none", "eval.select": ""})
        assert train(GeoDiTTask(config), config, str(tmp_path), PIPELINE) == 0
    whole = losses(workdir)
    assert losses(tmp_path) == {step: whole[step] for step in range(1, 6)}


def test_the_best_checkpoint_is_the_one_of_the_lowest_validation_loss(workdir):
    results = json.loads((workdir / "results.json").read_text())
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {x["step"]: x["eval/val/loss"] for x in lines if "eval/val/loss" in x}
    assert results["selected_step"] == min(found, key=found.get)
    assert results["eval/val/loss"] == min(found.values())


def test_the_export_of_a_run_loads_and_goes_on(workdir):
    params, config, report = load_model(workdir / "export")
    assert config == find_size("tiny") and not report.missing
    made = Tokenizer.load(workdir / "export", config.tokens)
    onwards = GeoDiTTask(tiny(**LEARNING, **{"model.weights": str(workdir / "export")}))
    loaded, _ = onwards.init(0)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    text = "a satellite image of a harbor"
    assert onwards.tokenizer.encode(text) == made.encode(text)
    assert onwards.model == config


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "pretrain"])
def test_the_other_stages_run_and_change_only_what_they_train(stage, tmp_path):
    config = tiny(stage)
    made = launch.make_task(config)
    assert train(made, config, str(tmp_path), PIPELINE) == 0
    before, after = made.init(config.seed)[0], load_model(tmp_path / "export")[0]
    assert set(after) == ({"core"} if stage == "pretrain" else set(before))
    flat = zip(paths(before), jax.tree.leaves(before), jax.tree.leaves(after))
    changed = {path.split("/")[0] for path, a, b in flat if not np.array_equal(a, b)}
    assert changed == {"align": {"projector"}, "pretrain": {"core"}}[stage]


# -------------------------------------------------------------------------------- frozen and not
def test_a_file_of_plain_texts_is_pretrained_on(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(f'{{"text": "Text {k} tells of a harbour."}}\n' for k in range(40)))
    made = GeoDiTTask(tiny("pretrain", **{"data.name": "jsonl", "data.root": str(path)}))
    found = batch_of(made)
    text = made.tokenizer.decode(found["ids"][0, : int(found["length"][0])])
    assert " tells of a harbour." in text
    assert (found["labels"] == found["ids"])[0, : int(found["length"][0])].all()
    parts = [{r.id for r in made.sets.open(split)[0].records} for split in ("train", "val")]
    assert [len(ids) for ids in parts] == [36, 4] and not parts[0] & parts[1]


def test_alignment_keeps_no_gradient_and_no_optimiser_state_of_the_rest():
    config = tiny("align")
    made = GeoDiTTask(config)
    params, frozen = split_tree(made.init(0)[0], made.trainable)
    assert set(params) == {"projector"} and set(frozen) == {"tower", "core", "newline"}
    opt = make_optimizer(config.optim, lambda step: 1e-3).init(params)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(opt) if leaf.ndim)
    assert sizes == 2 * sum(leaf.size for leaf in jax.tree.leaves(params))
    # The gradient of the head is the only array of this shape.
    gradient = f"f32[1,{made.model.text.width},{made.model.text.vocab_rows}]"
    assert gradient not in write_step(made, params, frozen)
    both = GeoDiTTask(tiny())
    assert gradient in write_step(both, both.init(0)[0], {})


def write_step(made, params, frozen) -> str:
    tx = make_optimizer(made.config.optim, lambda step: 1e-3)
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, {}, tx.init(params))
    step = jax.make_jaxpr(make_step(made, tx, made.config), static_argnums=4)
    return str(step(state, frozen, batch_of(made), jax.random.key(0), None))


def test_frozen_parts_are_held_in_the_type_of_the_computation():
    params, _ = GeoDiTTask(tiny("align", **{"model.dtype": "bfloat16"})).init(0)
    types = {path.split("/")[0]: leaf.dtype for path, leaf in zip(paths(params), leaves(params))}
    assert types == {
        "core": jnp.bfloat16,
        "tower": jnp.bfloat16,
        "newline": jnp.bfloat16,
        "projector": jnp.float32,
    }


def leaves(tree):
    return jax.tree.leaves(tree)


def test_the_tower_learns_at_its_own_rate():
    made = GeoDiTTask(tiny(**{"optim.tower_lr": 2e-4, "optim.lr": 1e-3}))
    assert made.lr_factors == ((r"^tower/", pytest.approx(0.2)),)
    assert GeoDiTTask(tiny()).lr_factors == ()


def test_the_plan_lists_every_parameter_without_reading_anything():
    rows = GeoDiTTask(geodit_align.get_config("size=8b")).plan()
    total = sum(leaf.size for row in rows for leaf in jax.tree.leaves(row.shapes))
    assert total == 8_434_837_024
    assert {row.name: row.trainable for row in rows} == {
        "tower": False,
        "projector": True,
        "newline": False,
        "core": False,
    }


# ------------------------------------------------------------------------------------- objective
@pytest.fixture(scope="module")
def program(sft):
    """loss(params, batch) of one compilation."""
    key = jax.random.key(1)
    return jax.jit(lambda params, batch: sft.loss(params, {}, batch, key, None))


def test_a_row_counts_the_same_in_any_place_of_any_batch(program, params, batch):
    whole, weight, _, metrics = program(params, batch)
    rows = [{k: jnp.roll(v, -i, axis=0) for k, v in batch.items()} for i in range(4)]
    turned = [program(params, row)[0] for row in rows]
    np.testing.assert_allclose(turned, float(whole), rtol=1e-5)
    # One row four times is four times that row.
    single = [
        program(params, {k: jnp.repeat(v[i : i + 1], 4, 0) for k, v in batch.items()})[0] / 4
        for i in range(4)
    ]
    np.testing.assert_allclose(float(sum(single)), float(whole), rtol=1e-5)
    hits, masked = metrics["accuracy"]
    assert float(weight) == 4 and 0 <= int(hits) <= int(masked) == int(metrics["nll"][1])


def test_a_mesh_of_two_devices_gives_the_loss_of_one(program, params, batch):
    other = GeoDiTTask(tiny())
    other.prepare(make_mesh(data=2), None)
    split = jax.jit(lambda p, b: other.loss(p, {}, b, jax.random.key(1), None))
    sharding = jax.NamedSharding(other.mesh, jax.P(("data", "fsdp")))
    parts = jax.device_put(params, jax.NamedSharding(other.mesh, jax.P()))
    found = split(parts, jax.device_put(batch, sharding))[0]
    np.testing.assert_allclose(float(found), float(program(params, batch)[0]), rtol=1e-5)


class Constant:
    """Stands for the core: every hidden state is the same."""

    Seen = llada.Seen

    @staticmethod
    def run(core, config, x, positions, **_):
        return jnp.ones_like(x), None


@pytest.fixture
def constant(monkeypatch, params):
    """Parameters of a model whose logits are all equal, wherever the core is not run."""
    monkeypatch.setattr(task, "llada", Constant)
    head = {"lm_head": {"kernel": jnp.zeros_like(params["core"]["lm_head"]["kernel"])}}
    return params | {"core": params["core"] | head}


def test_complementary_copies_supervise_every_target_once(constant, batch):
    made = GeoDiTTask(tiny(**{"train.complementary": True, "train.loss_weighting": "none"}))
    program = jax.jit(lambda p, b: made.loss(p, {}, b, jax.random.key(0), None))
    loss, weight, _, metrics = program(constant, batch)
    # Without 1/p two disjoint copies give each target's cross-entropy once, log V, halved.
    vocab = made.model.text.vocab_rows
    np.testing.assert_allclose(float(loss), 4 * np.log(vocab) / 2, rtol=1e-5)
    assert float(weight) == 4
    targets = int((batch["labels"] != IGNORED).sum())
    nll, masked = metrics["nll"]
    assert int(masked) == targets
    np.testing.assert_allclose(float(nll), targets * np.log(vocab), rtol=1e-5)


def test_validation_of_a_model_that_knows_nothing_is_log_v_and_fill_rows_do_not_count(
    sft, constant, batch
):
    outputs, _ = sft.predict(constant, {}, batch, None)
    assert outputs.shape == (4, len(EVAL_TIMES), 3)
    evaluator = sft.evaluators()["val"]
    counts = evaluator.update(np.asarray(outputs), {"mask": np.ones(4, bool)})
    found = evaluator.finish(counts)
    nll = np.log(sft.model.text.vocab_rows)
    assert abs(found["loss_t0.9"] - nll) < 0.25 * nll and 0 < found["loss"] < 2 * nll
    broken = np.array(outputs)
    broken[2:] = np.nan
    mask = np.array([True, True, False, False])
    fill = evaluator.finish(evaluator.update(broken, {"mask": mask}))
    half = evaluator.finish(evaluator.update(np.asarray(outputs)[:2], {"mask": mask[:2]}))
    assert fill == half


def test_validation_draws_the_same_masks_every_time(sft, constant, batch):
    one, other = (sft.predict(constant, {}, batch, None)[0] for _ in range(2))
    np.testing.assert_array_equal(one, other)
    masked = np.asarray(one)[:, :, 2].sum(0)
    assert (np.diff(masked) > 0).all()  # more at later times


@pytest.mark.slow
@pytest.mark.parametrize("prefix_lm", [False, True])
def test_prompts_see_answers_only_without_prefix_lm(prefix_lm, params):
    made = GeoDiTTask(tiny(**{"model.prefix_lm": prefix_lm}))
    batch = batch_of(made)
    plain = GeoDiTTask(tiny(**{"train.label_policy": "response_only"}))
    answers = batch_of(plain)["labels"] != IGNORED
    prompts = (batch["labels"] != IGNORED) & ~answers
    assert prompts.any()
    masks = Masks(prompts, jnp.full(4, 0.5))

    @jax.jit
    def nll_of_prompts(ids):
        now = batch | {"ids": ids}
        return made._score(params, now, made._see(params, batch), masks).nll

    changed = jnp.where(answers, (batch["ids"] + 7) % 900, batch["ids"])
    one, other = nll_of_prompts(batch["ids"]), nll_of_prompts(changed)
    assert np.array_equal(one, other) == prefix_lm


def test_wrong_settings_are_refused_with_what_to_use():
    with pytest.raises(ValueError, match="use one of align, sft, pretrain"):
        GeoDiTTask(tiny(**{"train.stage": "rl"}))
    with pytest.raises(ValueError, match="2 roots for the 1 sets scenes"):
        GeoDiTTask(tiny(**{"data.root": "a+b"})).train_source()


# ------------------------------------------------------------------------------------ operations
def test_operations_of_the_core_are_what_the_compiler_counts():
    text = find_size("tiny").text
    length = 64
    core = jax.tree.map(lambda s: jnp.zeros(s.shape), llada.core_shapes(text))

    def forward(core, x):
        positions = jnp.arange(length)[None]
        hidden, _ = llada.run(llada.unstack(core), text, x, positions, attention="xla")
        return llada.logits(core, hidden)

    x = jnp.zeros((1, length, text.width))
    counted = jax.jit(forward).lower(core, x).compile().cost_analysis()["flops"]
    expected = flops.core_flops(text, length) + flops.head_flops(text, length)
    assert expected < counted < 1.1 * expected  # norms, rotation and softmax come on top


def test_a_frozen_part_costs_less_than_a_trained_one():
    config = find_size("8b")
    both, aligned = (flops.count_training_flops(config, 100, s) for s in ("sft", "align"))
    assert 0.6 < aligned / both < 0.7
    # With the complement of every mask the core sees twice the rows, the tower still one picture.
    twice = flops.count_training_flops(config, 100, "sft", complementary=True)
    views = flops.max_views(config) * (
        flops.tower_flops(config.tower) + flops.projector_flops(config)
    )
    assert twice == pytest.approx(2 * both - 3 * views)
    arg = geodit_sft.get_config("tiny").copy_and_resolve_references().unlock()
    counted = []
    for arg.train.complementary in (False, True):
        counted.append(GeoDiTTask(arg).flops()["train"])
    assert counted[1] > 1.5 * counted[0]
    # Six operations for each parameter and token, attention and the part of the head beside it.
    tokens, used = 830, count_parameters(config).used
    assert 0.85 < both / (6 * tokens * used) < 1.1
