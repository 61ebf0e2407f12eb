"""The whole model against the published code's vectors, against torch modules, and itself."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import golden_cases, read_golden, rel_error
from geodit_oracle import read_tree, tree_from_state
from torch_oracle import randomise

from common_jax.lora import add_adapters
from common_jax.sharding import make_mesh, paths, tree_shardings
from configs.geodit_sft import get_config
from geodit_jax import llada, model
from geodit_jax.config import SIZES, GeoDiTConfig, TextConfig, TokenIds, TowerConfig
from geodit_jax.image_layout import lay_out
from geodit_jax.model import IMAGE
from geodit_jax.siglip import encode_views

ROOT = Path(__file__).parent.parent
TINY = GeoDiTConfig(
    TextConfig(vocab_rows=48, width=32, layers=2, heads=4, kv_heads=4, mlp=40),
    TowerConfig(image_size=30, patch=7, width=24, layers=2, heads=3, mlp=40),
    TokenIds(mask=47, eos=46),
)


@pytest.fixture(scope="module")
def params():
    return model.init_model(TINY, 0)


def place(ids: np.ndarray, layout) -> dict[str, np.ndarray]:
    """Token ids [N] with one picture -> ids, rows and weights, with a leading axis of one."""
    (at,) = np.flatnonzero(ids == IMAGE)
    behind = len(ids) - at - 1
    tokens = np.full(len(layout.rows), IMAGE)
    around = ((at, behind), (0, 0))
    arrays = {
        "ids": np.concatenate([ids[:at], tokens, ids[at + 1 :]]),
        "rows": np.pad(layout.rows, around),
        "weights": np.pad(layout.weights, around),
    }
    return {name: value[None] for name, value in arrays.items()}


@functools.partial(jax.jit, static_argnums=1)
def run_core(params, config, x):
    """Embeddings -> (hidden, logits)"""
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    hidden, _ = llada.run(params["core"], config.text, x, positions)
    return hidden, llada.logits(params["core"], hidden)


# ------------------------------------------------------------------------- against published code
@pytest.fixture(scope="module")
def golden(request):
    """(config, params, meta, arrays, names of the cases)"""
    folder = request.param
    published = json.loads((folder / "checkpoint" / "config.json").read_text())
    vision = published["vision_config"]
    config = GeoDiTConfig(
        TextConfig(
            vocab_rows=published["vocab_size"],
            width=published["hidden_size"],
            layers=published["num_hidden_layers"],
            heads=published["num_attention_heads"],
            kv_heads=published["num_key_value_heads"],
            mlp=published["intermediate_size"],
            rope_theta=published["rope_theta"],
            eps=published["rms_norm_eps"],
        ),
        TowerConfig(
            image_size=vision["image_size"],
            patch=vision["patch_size"],
            width=vision["hidden_size"],
            layers=vision["num_hidden_layers"] - 1,
            heads=vision["num_attention_heads"],
            mlp=vision["intermediate_size"],
            eps=vision["layer_norm_eps"],
        ),
        grid_pinpoints=tuple(map(tuple, published["image_grid_pinpoints"])),
    )
    params = read_tree(folder / "checkpoint" / "model.safetensors")
    shapes = jax.tree.map(lambda leaf: leaf.shape, model.model_shapes(config))
    assert jax.tree.map(np.shape, params) == shapes
    meta, arrays = read_golden(folder)
    cases = sorted(name.removesuffix("/pixels") for name in arrays if name.startswith("model/"))
    return config, params, meta, arrays, [name for name in cases if f"{name}/logits" in arrays]


@pytest.mark.parametrize("golden", golden_cases("llada_v"), indirect=True)
def test_golden_pixels_to_logits(golden):
    config, params, meta, arrays, cases = golden
    assert len(cases) >= 4
    for case in cases:
        _, merge, aspect = case.split("/")
        mode, _, tiles = aspect.partition("_max_")
        changed = dict(image_mode=mode, merge=merge, max_tiles=int(tiles or 0))
        _check_case(dataclasses.replace(config, **changed), params, meta, arrays, case)


def _check_case(config, params, meta, arrays, case):
    pixels = arrays[f"{case}/pixels"]
    pixels = pixels.reshape(-1, *pixels.shape[-3:]).transpose(0, 2, 3, 1)
    layout = lay_out(tuple(meta["photo"]), config, slots=len(pixels))
    assert layout.num_views == len(pixels), case
    features = encode_views(params["tower"], config.tower, pixels)
    tokens = model.project(params["projector"], features).reshape(1, -1, config.text.width)
    ids = np.concatenate([arrays["model/prompt"].reshape(-1), np.full(8, meta["ids"]["mask"])])
    x = model.merge(params, config, *_in_order(place(ids, layout), tokens))
    is_image = place(ids, layout)["ids"][0] == IMAGE
    assert rel_error(x[0][is_image], arrays[f"{case}/image_tokens"].reshape(-1, x.shape[-1])) < 1e-5
    hidden, logits = run_core(params, config, x)
    expected = arrays[f"{case}/hidden"].reshape(-1, hidden.shape[-1])
    assert rel_error(hidden[0][~is_image], expected) < 2e-5, case
    expected = arrays[f"{case}/logits"].reshape(-1, logits.shape[-1])
    assert rel_error(logits[0][~is_image][-len(expected) :], expected) < 2e-5, case


def _in_order(placed, tokens):
    return placed["ids"], tokens, placed["rows"], placed["weights"]


def test_the_model_is_siglip_projector_and_llama_of_torch():
    tower, core, projector = _torch_parts()
    newline = np.random.default_rng(3).standard_normal(32).astype(np.float32)
    state = {f"vision_model.{name}": value for name, value in tower.state_dict().items()}
    state |= {f"model.mm_projector.{name}": value for name, value in projector.state_dict().items()}
    state |= core.state_dict() | {"model.image_newline": newline}
    params = tree_from_state(state, TINY.tower.layers)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 1, 30, 30, 3)).astype(np.uint8)
    ids = np.array([5, 6, IMAGE, 7, 47, 47])
    with torch.no_grad():
        scaled = torch.from_numpy(pixels[0].transpose(0, 3, 1, 2) / 127.5 - 1).float()
        features = tower(scaled, output_hidden_states=True).hidden_states[-2]
        text = core.model.embed_tokens(torch.tensor([5, 6, 7, 47, 47]))
        parts = [text[:2], projector(features)[0], torch.from_numpy(newline)[None], text[2:]]
        embeds = torch.cat(parts)[None]
        unhidden = torch.zeros(1, 1, embeds.shape[1], embeds.shape[1])
        expected = core(inputs_embeds=embeds, attention_mask=unhidden).logits
    tokens = model.encode_images(params, TINY, pixels)
    x = model.merge(params, TINY, *_in_order(place(ids, lay_out((9, 9), TINY)), tokens))
    assert rel_error(run_core(params, TINY, x)[1], expected.numpy()) < 2e-5


def _torch_parts():
    torch.manual_seed(0)
    tower = transformers.SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=30,
        patch_size=7,
    )
    core = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=40,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        attn_implementation="eager",
    )
    projector = torch.nn.Sequential(
        torch.nn.Linear(24, 32), torch.nn.GELU(), torch.nn.Linear(32, 32)
    )
    modules = transformers.SiglipVisionModel(tower), transformers.LlamaForCausalLM(core), projector
    return [randomise(module) for module in modules]


# ------------------------------------------------------------------------------------------ counts
def test_full_size_has_the_published_number_of_tensors_and_parameters():
    assert model.count_parameters(SIZES["8b"]) == (8_434_837_024, 8_434_834_720, 717)
    text_only = dataclasses.replace(SIZES["8b"], tower=None)
    assert model.count_parameters(text_only) == (8_015_581_184, 8_015_581_184, 291)
    assert set(model.model_shapes(text_only)) == {"core"}


@pytest.mark.parametrize(("size", "low", "high"), [("1b", 0.9e9, 1.6e9), ("100m", 0.8e8, 1.8e8)])
def test_sizes_are_what_they_are_called(size, low, high):
    assert low < model.count_parameters(SIZES[size]).parameters < high


# ------------------------------------------------------------------------------------------- parts
def test_image_positions_mix_the_table_and_text_positions_embed(params):
    rng = np.random.default_rng(0)
    ids = np.array([[3, IMAGE, IMAGE, IMAGE, 4], [IMAGE, 5, 6, 7, 46]])
    rows = rng.integers(0, 7, (2, 5, 4)).astype(np.int32)
    rows[0, 1] = [6, 0, 0, 0]
    weights = rng.random((2, 5, 4)).astype(np.float32)
    weights[0, 1], weights[0, 2] = [1, 0, 0, 0], 0
    tokens = rng.standard_normal((2, 6, 32)).astype(np.float32)
    x = model.merge(params, TINY, ids, tokens, rows, weights)
    table = np.concatenate([tokens, np.tile(params["newline"]["embedding"], (2, 1, 1))], axis=1)
    expected = params["core"]["embed_tokens"]["embedding"][np.maximum(ids, 0)]
    for b, s in np.argwhere(ids == IMAGE):
        expected[b, s] = weights[b, s] @ table[b, rows[b, s]]
    assert rel_error(x, expected) < 1e-6
    np.testing.assert_array_equal(x[0, 1], params["newline"]["embedding"])
    np.testing.assert_array_equal(x[0, 2], 0)


def test_text_alone_needs_no_picture(params):
    ids = np.array([[3, 4, 46]])
    x = model.merge({"core": params["core"]}, TINY, ids)
    np.testing.assert_array_equal(x, params["core"]["embed_tokens"]["embedding"][ids])
    assert model.merge(params, TINY, ids, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="text only"):
        model.encode_images(params, dataclasses.replace(TINY, tower=None), np.zeros((1, 1, 3, 3)))


def test_unused_view_slots_change_no_embedding(params):
    """The same picture in an array with room for two more views, which hold anything."""
    config = dataclasses.replace(TINY, image_mode="anyres")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 5, 30, 30, 3)).astype(np.uint8)
    ids, found = np.array([5, IMAGE, 7]), []
    for slots in (3, 5):
        tokens = model.encode_images(params, config, pixels[:, :slots])
        placed = place(ids, lay_out((60, 30), config, slots))
        found.append(model.merge(params, config, *_in_order(placed, tokens)))
    assert found[0].shape[1] == 2 + 16 + 4 * 9
    assert rel_error(found[1], found[0]) < 1e-6


def test_black_is_minus_one_and_white_is_one():
    x = model.normalise(np.array([0, 51, 255], np.uint8))
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, [-1, -0.6, 1], atol=1e-7)


def test_bfloat16_is_close_to_float32(params):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 1, 30, 30, 3)).astype(np.uint8)
    placed = place(np.array([5, 6, IMAGE, 7, 47, 47]), lay_out((9, 9), TINY))

    def run(dtype):
        tokens = model.encode_images(params, TINY, pixels, dtype)
        x = model.merge(params, TINY, *_in_order(placed, tokens))
        assert tokens.dtype == x.dtype == dtype
        return run_core(params, TINY, x)[1]

    assert rel_error(run(jnp.bfloat16), run(jnp.float32)) < 5e-2


# ------------------------------------------------------------------------------------------- values
def test_initial_values_have_the_stated_spread_and_follow_the_seed(params):
    wide = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, width=128, mlp=192))
    values = model.init_model(wide, 1)
    layers, core = values["core"]["layers"], values["core"]
    cut = 0.9866  # standard deviation of a normal cut at three
    for kernel, expected in [
        (layers["mlp"]["up_proj"]["kernel"], 1 / math.sqrt(128)),
        (layers["mlp"]["down_proj"]["kernel"][0], 1 / math.sqrt(2 * 192)),
        (layers["mlp"]["down_proj"]["kernel"][1], 1 / math.sqrt(4 * 192)),
        (core["embed_tokens"]["embedding"], 1 / math.sqrt(128)),
        (values["tower"]["embeddings"]["patch_embedding"]["kernel"], 1 / math.sqrt(7 * 7 * 3)),
        (values["projector"]["linear_0"]["kernel"], 1 / math.sqrt(24)),
    ]:
        assert kernel.std() == pytest.approx(cut * expected, rel=0.05)
        assert np.abs(kernel).max() <= 3.001 * expected
    newline = values["newline"]["embedding"]
    assert newline.std() == pytest.approx(1 / math.sqrt(128), rel=0.2)
    again, other = model.init_model(wide, 1), model.init_model(wide, 2)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(values)))
    assert not np.array_equal(other["newline"]["embedding"], newline)
    assert model.init_model(dataclasses.replace(TINY, tower=None), 0).keys() == {"core"}
    np.testing.assert_array_equal(
        model.init_model(dataclasses.replace(TINY, tower=None), 0)["core"]["lm_head"]["kernel"],
        params["core"]["lm_head"]["kernel"],
    )


def test_a_fresh_model_guesses():
    config = SIZES["tiny"]
    core = model.init_model(dataclasses.replace(config, tower=None), 0)
    ids = np.random.default_rng(0).integers(0, 1024, (2, 24))
    _, logits = run_core(core, config, model.merge(core, config, ids))
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], -1).mean()
    assert abs(loss - math.log(1024)) < 1


# ---------------------------------------------------------------------------------------- sharding
def test_every_large_leaf_of_the_full_model_is_split_evenly_on_a_pod():
    shapes = model.model_shapes(SIZES["8b"])
    targets = get_config().lora.targets
    shapes["core"] = add_adapters(shapes["core"], targets, rank=1, alpha=1.0, seed=0)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    shardings = jax.tree.leaves(tree_shardings(shapes, model.SHARDING_RULES, mesh))
    pod, whole, replicated, used = {"fsdp": 32, "tensor": 8}, 0, 0, set()
    for path, leaf, sharding in zip(paths(shapes), jax.tree.leaves(shapes), shardings):
        assert len(sharding.spec) <= len(leaf.shape), path
        for size, axis in zip(leaf.shape, sharding.spec):
            assert axis is None or size % pod[axis] == 0, path
        used.add(sharding.spec)
        whole += leaf.size
        replicated += leaf.size if not any(sharding.spec) else 0
    assert replicated < 1e-4 * whole
    assert {tuple(rule[1]) for rule in model.SHARDING_RULES} <= {tuple(spec) for spec in used}
