"""config.json in every published spelling becomes the config that the tensors show."""

from __future__ import annotations

import dataclasses
import json

import pytest
from conftest import golden_cases
from tiny_checkpoint import CONFIG, RAW, TOKENS, model_tensors, text_tensors

from common_jax.weights import flatten
from geodit_jax.config import GeoDiTConfig, TextConfig, TokenIds
from geodit_jax.export_config import to_llada, to_published
from geodit_jax.image_layout import pinpoints
from geodit_jax.model import model_shapes
from geodit_jax.published_config import read_config, read_pinpoints
from geodit_jax.torch_names import find_place, list_places, torch_shape

NATIVE = {
    "model_type": "llada",
    "d_model": 32,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 40,
    "vocab_size": 512,
    "embedding_size": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "include_bias": False,
}


def place(names) -> dict:
    return {find_place(name): shape for name, shape in names.items()}


def places_of(config: GeoDiTConfig) -> dict:
    """{place: torch shape} of a whole model."""
    leaves = {path: leaf.shape for path, leaf in flatten(model_shapes(config)).items()}
    return {
        where: torch_shape(path, shape)
        for path, shape in leaves.items()
        for where in list_places(path, shape[0])
    }


WHOLE = place(model_tensors())
TEXT = place(text_tensors())


def read(raw=RAW, shapes=WHOLE, tokens=TOKENS, **options) -> GeoDiTConfig:
    options = {"vision": raw.get("vision_config")} | options
    return read_config(raw, shapes, tokens, **options)


def without(raw: dict, *keys: str, **others) -> dict:
    return {key: value for key, value in raw.items() if key not in keys} | others


def test_both_spellings_give_the_same_text_core():
    assert read(RAW, TEXT).text == read(NATIVE, TEXT).text == CONFIG.text
    assert read(NATIVE, TEXT).tower is None


def test_sizes_are_those_of_the_tensors_whatever_the_config_says():
    lies = {"hidden_size": 99, "intermediate_size": 7, "vocab_size": 3, "num_hidden_layers": 2}
    lies |= {"mm_hidden_size": 5, "model_type": "bert"}
    assert read(RAW | lies) == CONFIG
    rows = place(text_tensors(rows=507))
    assert read(RAW, rows).text == dataclasses.replace(CONFIG.text, vocab_rows=507)


def test_one_misshapen_tensor_changes_no_size():
    for name, wrong in {
        "model.embed_tokens.weight": (511, 31),
        "model.norm.weight": (31,),
        "model.layers.0.mlp.gate_proj.weight": (41, 32),
        "model.layers.0.self_attn.k_proj.weight": (12, 32),
    }.items():
        assert read(shapes=WHOLE | {find_place(name): wrong}) == CONFIG


def test_layers_that_the_config_declares_and_the_files_lack_are_wanted():
    first = {p: shape for p, shape in WHOLE.items() if "core" not in p.path or p.layer != 2}
    assert read(shapes=first).text.layers == 3


def test_missing_mm_keys_get_documented_defaults():
    config = read(without(RAW, "vision_config"), vision={"num_attention_heads": 3})
    assert (config.image_mode, config.merge, config.max_tiles) == ("anyres", "spatial_unpad", 4)
    assert config.tower == CONFIG.tower and config.grid_pinpoints == ()
    bare = {p: shape for p, shape in WHOLE.items() if p.path != "newline/embedding"}
    config = read(shapes=bare)
    assert (config.image_mode, config.merge) == ("square", "flat")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("square", ("square", 4)), ("pad", ("pad", 4)), ("anyres", ("anyres", 0))]
    + [("anyres_max_9", ("anyres", 9))],
)
def test_picture_modes_are_read(mode, expected):
    config = read(RAW | {"image_aspect_ratio": mode, "mm_patch_merge_type": "flat"})
    assert (config.image_mode, config.max_tiles) == expected and config.merge == "flat"


def test_all_spellings_of_the_grid_give_the_same_canvases():
    pixels = [[28 * i, 28 * j] for i in range(1, 3) for j in range(1, 4)]
    spellings = ["(1x1),...,(2x3)", pixels, json.dumps(pixels), str([tuple(p) for p in pixels])]
    grids = [read_pinpoints(value, 28) for value in spellings]
    assert grids == [tuple(map(tuple, pixels))] * 4
    assert [read(RAW | {"image_grid_pinpoints": value}) for value in spellings] == [
        dataclasses.replace(CONFIG, grid_pinpoints=grids[0])
    ] * 4
    # The grid every published model has is the default, however it is written.
    full = [[28 * i, 28 * j] for i in range(1, 7) for j in range(1, 7)]
    for value in (None, "(1x1),...,(6x6)", full, json.dumps(full)):
        assert read(RAW | {"image_grid_pinpoints": value}).grid_pinpoints == ()


@pytest.mark.parametrize("value", ["x", "[]", [], 7, "[[1], [2]]", [[1, 2], None]])
def test_an_unreadable_grid_is_quoted(value):
    with pytest.raises(ValueError, match=r"image_grid_pinpoints=.*pairs"):
        read_pinpoints(value, 28)


def test_a_grid_of_other_tiles_is_refused():
    with pytest.raises(ValueError, match="30x28, which is not a whole number of tiles of 28"):
        read(RAW | {"image_grid_pinpoints": [[30, 28]]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 3}, "3 heads, which do not divide the width 32"),
        ({"num_attention_heads": 16}, "16 heads and 2 key-value heads.*2 wide.*16 rows"),
        ({"num_key_value_heads": 4}, "4 heads and 4 key-value heads.*8 wide.*16 rows"),
        ({"num_attention_heads": None}, "neither num_attention_heads nor n_heads"),
        ({"vision_config": {"num_attention_heads": 5}}, "num_attention_heads=5 does not fit"),
        ({"vision_config": {}}, "num_attention_heads=None does not fit.*24"),
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio='highres': use square"),
        ({"mm_patch_merge_type": "unpad"}, "mm_patch_merge_type='unpad': use one of"),
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear' is not implemented"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented"),
        ({"attention_bias": True}, "attention_bias=True is not implemented"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling=.* is not implemented"),
    ],
)
def test_contradictions_and_other_computations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        read(RAW | change)


def test_a_picture_size_that_does_not_fit_the_position_table_is_named():
    vision = RAW["vision_config"] | {"image_size": 384}
    with pytest.raises(ValueError, match="4 positions.*384 pixels in patches of 14"):
        read(vision=vision)


def test_a_tokenizer_longer_than_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="513 entries and the model 512 rows"):
        read(tokens=dataclasses.replace(TOKENS, size=513))


def test_heads_default_to_llada_where_the_width_is_llada():
    full = places_of(GeoDiTConfig())
    assert read({}, full, TokenIds()) == GeoDiTConfig(image_mode="anyres")
    named = {"mm_vision_tower": "google/siglip2-so400m-patch14-378"}
    assert read(named, full, TokenIds()).tower.image_size == 378


@pytest.mark.parametrize("has_head", [True, False])
@pytest.mark.parametrize(("declared", "found", "run"), [(3, 2, 2), (3, 3, 2), (2, 2, 1)])
def test_the_last_layer_of_a_whole_tower_does_not_run(declared, found, run, has_head):
    shapes = {p: s for p, s in WHOLE.items() if not p.path.startswith("tower/layers")}
    first = {p: s for p, s in WHOLE.items() if p.path.startswith("tower/layers") and p.layer == 0}
    shapes |= {p._replace(layer=i): s for p, s in first.items() for i in range(found)}
    vision = {"num_attention_heads": 3, "num_hidden_layers": declared}
    assert read(shapes=shapes, vision=vision, has_head=has_head).tower.layers == run


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, image_mode="square", merge="flat", max_tiles=2),
        dataclasses.replace(CONFIG, max_tiles=0, newline_on_single=False, prefix_lm=True),
        dataclasses.replace(CONFIG, grid_pinpoints=((28, 56), (56, 28)), merge="spatial"),
        dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, rope_cast="activation")),
        GeoDiTConfig(),
    ],
    ids=["anyres", "square", "options", "grid", "cast", "8b"],
)
def test_a_written_config_reads_back_as_the_same(config):
    raw = json.loads(json.dumps(to_published(config)))
    assert read(raw, places_of(config), TokenIds(**raw["geodit_jax"]["tokens"])) == config
    grid = [list(canvas) for canvas in pinpoints(config)]
    assert raw["image_grid_pinpoints"] == grid and raw["hidden_size"] == config.text.width
    text = GeoDiTConfig(config.text, None, config.tokens, prefix_lm=config.prefix_lm)
    native = json.loads(json.dumps(to_llada(config)))
    assert read(native, places_of(text), config.tokens) == text
    assert native["d_model"] == config.text.width and "hidden_size" not in native


@pytest.mark.parametrize("folder", golden_cases("llada_v"))
def test_our_spelling_of_the_published_config_has_the_published_values(folder):
    raw = json.loads((folder / "checkpoint" / "config.json").read_text())
    config = GeoDiTConfig(
        text=TextConfig(vocab_rows=512, width=64, layers=3, heads=4, kv_heads=4, mlp=160),
        tower=dataclasses.replace(CONFIG.tower, image_size=60, width=32, layers=2, heads=4, mlp=80),
        tokens=TOKENS,
        image_mode="anyres",
    )
    assert read(raw, places_of(config)) == config
    ours = to_published(config)
    same = ours.keys() & raw.keys() - {"max_position_embeddings", "pad_token_id"}
    assert len(same) > 25
    vision = ours.pop("vision_config")
    assert raw["vision_config"].items() <= vision.items()
    assert {key: ours[key] for key in same - {"vision_config"}} == {
        key: raw[key] for key in same - {"vision_config"}
    }
