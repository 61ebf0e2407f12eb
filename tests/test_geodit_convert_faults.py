"""Checkpoints that do not fit are refused, every tensor by its name, and nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from conftest import golden_cases
from tiny_checkpoint import CONFIG, RAW, TOKENS, edit, fill, model_tensors, write_model

from geodit_jax import convert
from geodit_jax.convert import describe_folder, export_model, load_model
from geodit_jax.torch_names import find_place, torch_name

ARRAYS = fill(model_tensors())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of one file; tests copy it before they change it."""
    return write_model(tmp_path_factory.mktemp("model") / "m", ARRAYS)


@pytest.fixture
def folder(model, tmp_path):
    return shutil.copytree(model, tmp_path / "m")


def weights(folder):
    return folder / "model-00001-of-00001.safetensors"


def edit_json(folder, **changes) -> None:
    (folder / "config.json").write_text(json.dumps(RAW | changes))


def test_missing_and_misshapen_tensors_are_all_named_with_their_shapes(folder):
    def spoil(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.mm_projector.2.bias"]
        tensors["model.norm.weight"] = np.zeros(31, np.float32)
        tensors["model.layers.0.self_attn.o_proj.weight"] = np.zeros((32, 30), np.float32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)

    edit(weights(folder), spoil)
    with pytest.raises(ValueError, match="2 missing, 1 unused, 2 misshapen") as caught:
        load_model(folder)
    text = str(caught.value)
    assert "missing: model.layers.1.mlp.up_proj.weight, wanted (40, 32)" in text
    assert "missing: model.mm_projector.2.bias, wanted (32,)" in text
    assert "model.norm.weight: found (31,), wanted (32,)" in text
    assert "model.layers.0.self_attn.o_proj.weight: found (32, 30), wanted (32, 32)" in text
    assert "unused: model.layers.0.self_attn.q_proj.bias" in text and "->" in text
    described, _ = describe_folder(folder)
    assert described.endswith("NOT usable, see above") and "2 misshapen" in described


def test_missing_tensors_are_named_as_the_file_names_the_others(folder):
    def rename(tensors):
        old = {name: tensors.pop(name) for name in list(tensors)}
        for name, array in old.items():
            tensors[torch_name(find_place(name), "llada")] = array
        del tensors["model.transformer.blocks.2.ff_out.weight"]

    edit(weights(folder), rename)
    with pytest.raises(ValueError, match=r"model\.transformer\.blocks\.2\.ff_out\.weight, wanted"):
        load_model(folder)


def test_leftovers_are_reported_and_do_not_stop_a_load(folder):
    edit(weights(folder), lambda t: t.update({"model.resampler.weight": np.zeros(3, np.float32)}))
    assert load_model(folder)[2].unused == ("model.resampler.weight",)


def test_two_names_of_one_tensor_are_refused(folder):
    edit(weights(folder), lambda t: t.update({"norm.weight": np.zeros(32, np.float32)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight and norm\.weight are the same"):
        load_model(folder)


def test_a_lacking_shard_is_named_although_the_index_hides_it(folder, tmp_path):
    write_model(tmp_path / "s", ARRAYS, shards=3)
    (tmp_path / "s" / "model-00002-of-00003.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(ARRAYS, "model-00001-of-00003.safetensors")}
    (tmp_path / "s" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"shards \[2\] of 3 are lacking"):
        load_model(tmp_path / "s")


def test_layers_that_lack_at_the_end_are_missed(folder):
    def drop(tensors):
        for name in [name for name in tensors if "model.layers.2." in name]:
            del tensors[name]

    edit(weights(folder), drop)
    with pytest.raises(ValueError, match=r"9 missing(.|\n)*model\.layers\.2\.mlp"):
        load_model(folder)


def test_a_config_that_contradicts_the_tensors_is_quoted_with_its_folder(folder):
    edit_json(folder, num_attention_heads=16)
    with pytest.raises(ValueError, match=r"/m: config\.json says 16 heads.*one folder"):
        load_model(folder)
    described, is_usable = describe_folder(folder)
    assert described.endswith("NOT usable, see above") and not is_usable


def test_files_that_are_no_llada_are_recognised(folder):
    def keep_tower(tensors):
        for name in [name for name in tensors if "vision_tower" not in name]:
            del tensors[name]

    edit(weights(folder), keep_tower)
    with pytest.raises(ValueError, match="no tensor of a LLaDA text core"):
        load_model(folder)


def test_a_projector_without_a_tower_asks_for_one(folder):
    def drop_tower(tensors):
        for name in [name for name in tensors if "vision_tower" in name]:
            del tensors[name]

    edit(weights(folder), drop_tower)
    with pytest.raises(ValueError, match="no vision tower; give tower_folder="):
        load_model(folder)
    with pytest.raises(ValueError, match=r"has no tensor of the tower"):
        load_model(folder, tower_folder=folder)


def test_unknown_special_ids_are_asked_for(folder):
    edit_json(folder, geodit_jax={})
    with pytest.raises(ValueError, match=r"nothing tells the special ids.*tokens="):
        load_model(folder)
    assert load_model(folder, tokens=TOKENS)[1] == CONFIG
    assert "nothing tells the special ids" in describe_folder(folder)[0]


@pytest.mark.parametrize("golden", golden_cases("llada_v"))
def test_a_tokenizer_with_other_ids_is_refused(golden, folder, tmp_path):
    shutil.copy(golden / "checkpoint" / "tokenizer.json", folder)
    params, config, _ = load_model(folder)
    edit_json(folder, geodit_jax={"tokens": dataclasses.asdict(TOKENS) | {"mask": 499}})
    with pytest.raises(ValueError, match="mask 500, model 499"):
        load_model(folder)
    other = dataclasses.replace(config, tokens=dataclasses.replace(TOKENS, eot=489))
    with pytest.raises(ValueError, match="eot 488, model 489"):
        export_model(tmp_path / "out", params, other, golden / "checkpoint")
    assert not (tmp_path / "out").exists()


def test_a_truncated_file_is_named(folder):
    file = weights(folder)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"safetensors .*download it again"):
        load_model(folder)


def test_trees_of_another_config_are_not_exported(folder, tmp_path):
    params = load_model(folder)[0]
    deeper = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, layers=4))
    with pytest.raises(ValueError, match=r"9 missing(.|\n)*layers\.3"):
        export_model(tmp_path / "out", params, deeper)
    flatter = dataclasses.replace(CONFIG, tower=dataclasses.replace(CONFIG.tower, layers=1))
    with pytest.raises(ValueError, match="more layers than config"):
        export_model(tmp_path / "out", params, flatter)
    with pytest.raises(ValueError, match="more/bias is no parameter"):
        export_model(tmp_path / "out", params | {"more": {"bias": np.zeros(2)}}, CONFIG)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_leaves_the_old_one(folder, tmp_path, monkeypatch):
    params = load_model(folder)[0]
    export_model(tmp_path / "out", params, CONFIG)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def stop(path, value):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "write_json", stop)
    changed = dict(params, newline={"embedding": np.zeros(32, np.float32)})
    with pytest.raises(KeyboardInterrupt):
        export_model(tmp_path / "out", changed, CONFIG)
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert after == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]


def test_a_folder_with_other_files_is_never_replaced(folder, tmp_path):
    params = load_model(folder)[0]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match=r"home holds thesis\.tex"):
        export_model(tmp_path / "home", params, CONFIG)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]
