"""Every name of a public checkpoint has its place, whatever stands in front of it."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import golden_cases
from safetensors import safe_open

from common_jax.weights import flatten
from geodit_jax.config import GeoDiTConfig
from geodit_jax.model import count_parameters, model_shapes
from geodit_jax.torch_names import (
    Place,
    find_layout,
    find_place,
    is_ignorable,
    is_pooling_head,
    list_places,
    torch_name,
    torch_shape,
    torch_view,
)

GATE = Place("core/layers/mlp/gate_proj/kernel", 11)
NAMES = {
    "model.layers.11.mlp.gate_proj.weight": GATE,
    "model.model.layers.11.mlp.gate_proj.weight": GATE,
    "layers.11.mlp.gate_proj.weight": GATE,
    "model.transformer.blocks.11.ff_proj.weight": GATE,
    "transformer.blocks.11.ff_proj.weight": GATE,
    "model.transformer.blocks.0.ff_out.weight": Place("core/layers/mlp/down_proj/kernel", 0),
    "model.transformer.ff_out.weight": Place("core/lm_head/kernel"),
    "lm_head.weight": Place("core/lm_head/kernel"),
    "model.lm_head.weight": Place("core/lm_head/kernel"),
    "model.transformer.ln_f.weight": Place("core/norm/scale"),
    "norm.weight": Place("core/norm/scale"),
    "model.transformer.wte.weight": Place("core/embed_tokens/embedding"),
    "model.image_newline": Place("newline/embedding"),
    "module.model.image_newline": Place("newline/embedding"),
    "base_model.model.model.mm_projector.0.weight": Place("projector/linear_0/kernel"),
    "mm_projector.2.bias": Place("projector/linear_2/bias"),
    "mm_projector.1.bias": None,
    "model.rotary_emb.inv_freq": None,
    "vision_model.norm.weight": None,
    "text_model.encoder.layers.0.layer_norm1.weight": None,
    "model.layers.1.self_attn.q_proj.bias": None,
}
TOWER = {
    "embeddings.patch_embedding.weight": Place("tower/embeddings/patch_embedding/kernel"),
    "embeddings.position_embedding.weight": Place("tower/embeddings/position_embedding/embedding"),
    "encoder.layers.3.layer_norm2.weight": Place("tower/layers/layer_norm2/scale", 3),
    "encoder.layers.3.self_attn.out_proj.bias": Place("tower/layers/self_attn/out_proj/bias", 3),
    "post_layernorm.bias": Place("tower/post_layernorm/bias"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_both_layouts_with_any_prefix_find_their_place(name):
    assert find_place(name) == NAMES[name]


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "vision_model.",
        "vision_tower.vision_model.",
        "vision_tower.vision_tower.vision_model.",
        "model.vision_tower.vision_tower.vision_model.",
    ],
)
def test_a_tower_is_found_alone_and_inside_a_model(prefix):
    for name, place in TOWER.items():
        assert find_place(prefix + name) == place
    assert is_pooling_head(f"{prefix}head.probe") and is_ignorable(f"{prefix}head.probe")
    assert not is_pooling_head("lm_head.weight") and not is_ignorable("lm_head.weight")


def test_what_is_ignored_is_known_by_name_and_the_rest_is_left_over():
    for name in ("logit_scale", "text_model.head.weight", "vision_model.embeddings.position_ids"):
        assert is_ignorable(name) and find_place(name) is None
    for name in ("model.layers.0.self_attn.q_proj.lora_A.weight", "model.extra", "head_norm"):
        assert not is_ignorable(name) and find_place(name) is None


@pytest.mark.parametrize("layout", ["llava", "llada"])
def test_every_leaf_of_the_full_size_model_has_one_name_a_layer(layout):
    config = GeoDiTConfig()
    shapes = {path: leaf.shape for path, leaf in flatten(model_shapes(config)).items()}
    places = [place for path, shape in shapes.items() for place in list_places(path, shape[0])]
    names = [torch_name(place, layout) for place in places]
    assert len(set(names)) == len(names) == 717 == count_parameters(config).tensors
    assert [find_place(name) for name in names] == places
    assert find_layout(names) == layout
    sizes = [np.prod(torch_shape(p.path, shapes[p.path]), dtype=np.int64) for p in places]
    assert sum(sizes) == 8_434_837_024


@pytest.mark.parametrize("folder", golden_cases("llada_v"))
def test_published_names_and_shapes_are_those_of_the_tree(folder):
    files = {"checkpoint/model.safetensors": 72, "tower/llava_names.safetensors": 37}
    for file, count in files.items():
        with safe_open(folder / file, framework="numpy") as tensors:
            names = list(tensors.keys())
            assert len(names) == count
            for name in names:
                place = find_place(name)
                assert torch_name(place) == name
                found = tuple(tensors.get_slice(name).get_shape())
                tree = found[::-1] if len(found) == 2 else found
                tree = (*found[2:], *found[1::-1]) if len(found) == 4 else tree
                tree = found if place.path.endswith("embedding") else tree
                stacked = tree if place.layer is None else (9, *tree)
                assert torch_shape(place.path, stacked) == found
                assert torch_view(np.zeros(tree), place.path).shape == found
