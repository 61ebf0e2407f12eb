"""Checkpoints in every public layout load to the same tree, and exports load to the same bits."""

from __future__ import annotations

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import transformers
from conftest import golden_cases, read_golden, rel_error
from geodit_oracle import read_tree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import (
    CONFIG,
    RAW,
    TOKENS,
    fill,
    head_tensors,
    model_tensors,
    projector_tensors,
    text_tensors,
    tower_tensors,
    write_model,
)

from common_jax.sharding import make_mesh, tree_shardings
from common_jax.weights import flatten, save_torch, tree_sha256
from geodit_jax import llada
from geodit_jax.convert import (
    convert_folder,
    describe_folder,
    export_model,
    load_model,
    read_folder_config,
)
from geodit_jax.model import SHARDING_RULES, init_model, model_shapes
from geodit_jax.torch_names import find_place, torch_name

ARRAYS = fill(model_tensors())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m", ARRAYS, shards=3)


@pytest.fixture(scope="module")
def params(folder):
    return load_model(folder)[0]


def assert_same(found, wanted) -> None:
    found, wanted = flatten(found), flatten(wanted)
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        assert found[path].dtype == value.dtype, path
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(value), err_msg=path)


# ------------------------------------------------------------------------------------ golden files
@pytest.mark.parametrize("golden", golden_cases("llada_[mg]*"))
def test_both_namings_load_to_the_same_tree(golden, tmp_path):
    shutil.copy(golden / "model_original_names.safetensors", tmp_path / "model.safetensors")
    shutil.copy(golden / "config.json", tmp_path)
    params, config, report = load_model(golden, tokens=TOKENS)
    native, native_config, _ = load_model(tmp_path, tokens=TOKENS)
    assert_same(native, params)
    assert_same(params, read_tree(golden / "model.safetensors"))
    assert config == native_config and config.tower is None and report.ok and report.loaded == 30
    _, arrays = read_golden(golden)
    ids = arrays["ids"]
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    embeds = llada.embed(params["core"], ids)
    hidden, _ = llada.run(params["core"], config.text, embeds, positions)
    assert rel_error(llada.logits(params["core"], hidden), arrays["logits"]) < 2e-5


@pytest.mark.parametrize("golden", golden_cases("llada_v"))
def test_a_whole_published_folder_loads_with_its_config_and_tokenizer(golden):
    params, config, report = load_model(golden / "checkpoint")
    assert_same(params, read_tree(golden / "checkpoint" / "model.safetensors"))
    meta = json.loads((golden / "meta.json").read_text())
    assert report.ok and report.loaded == 72 and config.tokens == TOKENS
    assert (config.tower.image_size, config.tower.grid) == (meta["side"], meta["grid"])
    assert (config.image_mode, config.max_tiles, config.merge) == ("anyres", 4, "spatial_unpad")


@pytest.mark.parametrize("golden", golden_cases("llada_v"))
def test_both_tower_files_replace_the_tower_of_a_model(golden):
    published = read_tree(golden / "tower" / "model.safetensors", tower_layers=2)
    loaded = {}
    for file in ("model", "llava_names"):
        path = golden / "tower" / f"{file}.safetensors"
        params, config, report = load_model(golden / "checkpoint", tower_folder=path)
        assert_same(params["tower"], published["tower"])
        assert config.tower.layers == 2 and report.ok
        loaded[file] = {name for name in report.ignored if "vision_tower" not in name}
    assert {n.split(".")[1] for n in loaded["model"]} == {"head", "encoder"}
    assert all("layers.2." in n for n in loaded["model"] if ".encoder." in n)


# ---------------------------------------------------------------------------- layouts of strangers
def test_three_shards_with_a_wrong_index_are_one_model(folder, params):
    assert sum(leaf.size for leaf in flatten(params).values()) == sum(
        array.size for array in ARRAYS.values()
    )
    assert load_model(folder)[1] == CONFIG
    for name, array in ARRAYS.items():
        place = find_place(name)
        leaf = flatten(params)[place.path]
        one = leaf if place.layer is None else leaf[place.layer]
        axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim, (0,))
        axes = (0, 1) if place.path.endswith("embedding") and array.ndim == 2 else axes
        np.testing.assert_array_equal(one, array.transpose(axes), err_msg=name)


@pytest.mark.parametrize("prefix", ["", "model.model."])
def test_a_missing_or_doubled_model_prefix_changes_nothing(tmp_path, params, prefix):
    renamed = {prefix + name.removeprefix("model."): a for name, a in ARRAYS.items()}
    assert_same(load_model(write_model(tmp_path, renamed))[0], params)


def test_torch_files_load_to_the_same_tree(tmp_path, params):
    names = list(ARRAYS)
    for i in (1, 2):
        part = {name: ARRAYS[name] for name in names[i - 1 :: 2]}
        save_torch(tmp_path / f"pytorch_model-0000{i}-of-00002.bin", part)
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    assert_same(load_model(tmp_path)[0], params)


def test_text_tower_and_projector_may_lie_in_three_places(tmp_path, params):
    def pick(shapes, rename=str):
        return {name: ARRAYS[rename(name)] for name in shapes}

    native = {torch_name(find_place(n), "llada"): a for n, a in pick(text_tensors()).items()}
    write_model(tmp_path / "llada", native)
    tower = pick(tower_tensors(), lambda n: f"model.vision_tower.vision_tower.{n}")
    siglip = fill(tower_tensors(3) | head_tensors()) | tower
    siglip |= fill({"text_model.head.weight": (4, 4), "logit_scale": (1,)})
    vision = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
    write_model(tmp_path / "siglip", siglip, {"vision_config": vision})
    stage1 = pick(projector_tensors()) | {"model.image_newline": ARRAYS["model.image_newline"]}
    save_torch(tmp_path / "llada" / "mm_projector.bin", stage1)
    found, config, report = load_model(tmp_path / "llada", tower_folder=tmp_path / "siglip")
    assert_same(found, params)
    assert config == CONFIG and report.ok
    assert len(report.ignored) == 16 + 3 + 2  # the last layer, the head, and the text half

    wrapped = {f"base_model.{name}": 2 * a for name, a in stage1.items()}
    save_file(wrapped, tmp_path / "stage1.safetensors")
    places = {"tower_folder": tmp_path / "siglip"}
    places["projector_file"] = tmp_path / "stage1.safetensors"
    doubled = load_model(tmp_path / "llada", **places)[0]
    np.testing.assert_array_equal(
        doubled["projector"]["linear_2"]["kernel"], 2 * params["projector"]["linear_2"]["kernel"]
    )
    (tmp_path / "llada" / "mm_projector.bin").unlink()
    with pytest.raises(ValueError, match=r"no projector in the files(.|\n)*no newline"):
        load_model(tmp_path / "llada", tower_folder=tmp_path / "siglip")
    fresh, config, report = load_model(
        tmp_path / "llada", tower_folder=tmp_path / "siglip", seed=3, dtype=np.float32
    )
    drawn = init_model(config, 3)
    assert (config.image_mode, config.merge) == ("square", "flat")
    for part in ("projector", "newline"):
        assert_same(fresh[part], drawn[part])
    assert "drawn from seed 3" in str(report)


def test_a_checkpoint_without_newline_loads_where_its_merge_reads_none(tmp_path):
    arrays = {name: a for name, a in ARRAYS.items() if name != "model.image_newline"}
    params, config, report = load_model(write_model(tmp_path, arrays))
    assert config.merge == "flat" and not params["newline"]["embedding"].any()
    assert "no newline vector" in str(report)
    unpadding = RAW | {"mm_patch_merge_type": "spatial_unpad"}
    write_model(tmp_path, arrays, unpadding)
    with pytest.raises(ValueError, match=r"1 missing(.|\n)*model\.image_newline, wanted \(32,\)"):
        load_model(tmp_path)
    newline = load_model(tmp_path, seed=0)[0]["newline"]["embedding"]
    assert 0.5 < newline.std() * np.sqrt(32) < 1.5


def test_a_vocabulary_cut_to_the_tokenizer_loads(tmp_path, params):
    cut = {n: a[:501] if a.shape[0] == 512 else a for n, a in ARRAYS.items()}
    found, config, _ = load_model(write_model(tmp_path, cut))
    assert config.text.vocab_rows == 501 == config.tokens.size
    table = params["core"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(found["core"]["embed_tokens"]["embedding"], table[:501])
    kernel = params["core"]["lm_head"]["kernel"]
    np.testing.assert_array_equal(found["core"]["lm_head"]["kernel"], kernel[:, :501])


def test_the_dtype_is_that_of_the_files_or_the_one_asked_for(tmp_path, params):
    def halve(name, a):
        return a.astype(ml_dtypes.bfloat16) if "layers.1." not in name else a

    write_model(tmp_path, {name: halve(name, a) for name, a in ARRAYS.items()})
    found = flatten(load_model(tmp_path)[0])
    # A stack holds values of its widest layer, so that none is rounded.
    assert found["core/layers/mlp/up_proj/kernel"].dtype == np.float32
    assert found["core/lm_head/kernel"].dtype == ml_dtypes.bfloat16
    wanted = params["core"]["lm_head"]["kernel"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found["core/lm_head/kernel"], wanted)
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
        leaves = flatten(load_model(tmp_path, dtype=dtype)[0])
        assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(dtype)}
        np.testing.assert_array_equal(leaves["core/lm_head/kernel"], wanted.astype(dtype))


def test_sharded_leaves_hold_the_same_values_each_device_its_slice(folder, params):
    mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
    shardings = tree_shardings(model_shapes(read_folder_config(folder)), SHARDING_RULES, mesh)
    found = load_model(folder, shardings=shardings)[0]
    assert_same(found, params)
    kernel = found["core"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 16, 40)}
    layers = NamedSharding(mesh, P("fsdp"))
    everything = jax.tree.map(lambda x: layers if x.shape[0] % 2 == 0 else x, model_shapes(CONFIG))
    replicated = NamedSharding(mesh, P())
    everything = jax.tree.map(
        lambda x: x if isinstance(x, NamedSharding) else replicated, everything
    )
    assert_same(load_model(folder, shardings=everything)[0], params)
    with pytest.raises(ValueError, match=r"shardings and the model differ in newline/embedding"):
        load_model(folder, shardings={k: v for k, v in shardings.items() if k != "newline"})


# -------------------------------------------------------------------------------------- exporting
@pytest.mark.parametrize("golden", golden_cases("llada_v"))
def test_an_export_comes_back_bit_for_bit_with_its_tokenizer(golden, tmp_path):
    params, config, _ = load_model(golden / "checkpoint")
    out = tmp_path / "out"
    for _ in range(2):  # a second export replaces the first
        export_model(out, params, config, golden / "checkpoint", shard_bytes=300_000)
    found, found_config, report = load_model(out)
    assert tree_sha256(found) == tree_sha256(params) and found_config == config and report.ok
    shards = sorted(out.glob("model-*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(shards) == 4 and max(shard.stat().st_size for shard in shards) < 310_000
    held = {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["weight_map"] == held
    original = load_file(golden / "checkpoint" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in original.values())
    written = {name: a for shard in shards for name, a in load_file(shard).items()}
    assert {n: a.tobytes() for n, a in written.items()} == {
        n: a.tobytes() for n, a in original.items()
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (out / name).read_bytes() == (golden / "checkpoint" / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "wrong about 0 of 72 tensors" in describe_folder(out)[0]


def test_transformers_reads_the_text_core_of_an_export(tmp_path):
    config = CONFIG.__class__(CONFIG.text, None, TOKENS)
    core = {"core": init_model(config, 0)["core"]}
    export_model(tmp_path / "out", core, config, dtype=np.float32)
    torch_config = transformers.LlamaConfig.from_pretrained(tmp_path / "out", local_files_only=True)
    model, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "out", config=torch_config, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    kernel = core["core"]["layers"]["mlp"]["down_proj"]["kernel"]
    theirs = model.model.layers[2].mlp.down_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(theirs, kernel[2].T)


def test_device_arrays_export_like_host_arrays(tmp_path, params):
    mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
    shardings = tree_shardings(model_shapes(CONFIG), SHARDING_RULES, mesh)
    export_model(tmp_path / "a", jax.device_put(params, shardings), CONFIG)
    assert_same(load_model(tmp_path / "a")[0], params)
    export_model(tmp_path / "b", params, CONFIG, dtype=ml_dtypes.bfloat16)
    halved = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    assert_same(load_model(tmp_path / "b")[0], halved)


def test_a_folder_is_rewritten_in_the_other_layout_and_back(folder, params, tmp_path):
    text = convert_folder(folder, tmp_path / "native", to="llada")
    assert "30 tensors written" in text and "42 tensors of tower and projector left out" in text
    names = load_file(tmp_path / "native" / "model.safetensors")
    assert len(names) == 30 and all(name.startswith("model.transformer.") for name in names)
    assert "d_model" in json.loads((tmp_path / "native" / "config.json").read_text())
    found, config, _ = load_model(tmp_path / "native")
    assert_same(found["core"], params["core"])
    assert config.text == CONFIG.text and config.tokens == TOKENS
    convert_folder(tmp_path / "native", tmp_path / "back")
    assert_same(load_model(tmp_path / "back")[0]["core"], params["core"])
    convert_folder(folder, tmp_path / "whole")
    assert_same(load_model(tmp_path / "whole")[0], params)
    with pytest.raises(ValueError, match="to='flax': use one of"):
        convert_folder(folder, tmp_path / "x", to="flax")


def test_a_description_counts_parts_and_sees_the_wrong_index(folder):
    text, is_usable = describe_folder(folder)
    assert is_usable
    assert "names of LLaDA-V" in text and text.endswith("\nusable")
    assert f"wrong about {len(ARRAYS)} of {len(ARRAYS)} tensors; it is not used" in text
    assert "tokenizer: none" in text and "float32" in text
    size = sum(a.size for name, a in ARRAYS.items() if "vision_tower" in name)
    assert f"tower           37 {size:>14,}" in text
    assert f"all             72 {sum(a.size for a in ARRAYS.values()):>14,}" in text
