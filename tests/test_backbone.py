from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny_pipeline import store_prompts, write_pipeline

from common_jax import distributed
from common_jax.sharding import make_mesh
from common_jax.weights import LazyTensor, flatten
from satdifuser_jax import feature_source
from satdifuser_jax.backbone import BackboneFolder, fingerprint, small_backbone
from satdifuser_jax.extract_config import ExtractConfig
from satdifuser_jax.feature_source import FeatureMaker
from satdifuser_jax.prompts import PromptError

CACHE = {"kind": "none", "dir": "", "dtype": "float32", "workers": 0}
EVERYTHING = {"use_metadata": True, "is_guided": True, "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline with stored embeddings of two prompts, which no tower need be asked for."""
    folder = write_pipeline(tmp_path_factory.mktemp("backbone") / "pipeline")
    store_prompts(folder, "fields", "")
    return folder


def folder_of(pipeline, **settings) -> BackboneFolder:
    return BackboneFolder(pipeline, None, "fields", None, **settings)


def leaves(backbone):
    return {path: np.asarray(leaf) for path, leaf in flatten(trees(backbone)).items()}


def trees(backbone):
    return {"unet": backbone.unet_params, "codec": backbone.codec_params}


@pytest.mark.parametrize("settings", [{}, EVERYTHING, {"untrained_seed": 3}])
def test_on_a_mesh_a_backbone_is_the_same_and_no_split_tensor_is_read_whole(
    pipeline, monkeypatch, settings
):
    folder = folder_of(pipeline, **settings)
    whole, reads, read = folder.load(), [], LazyTensor.read
    mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])

    def counted(tensor, index=()):
        value = read(tensor, index)
        reads.append(value.size)
        return value

    monkeypatch.setattr(LazyTensor, "read", counted)
    placed = folder.load(mesh)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(placed)} == {mesh}
    expected = leaves(whole)
    assert leaves(placed).keys() == expected.keys()
    for path, leaf in leaves(placed).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    np.testing.assert_array_equal(placed.context, whole.context)
    assert fingerprint(placed) == fingerprint(whole)
    sizes, split = [], 0
    for path, leaf in flatten(trees(placed)).items():
        if path.startswith("codec") or "untrained_seed" not in settings:
            split += not leaf.is_fully_replicated
            sizes += [leaf.size] if leaf.is_fully_replicated else [leaf.size // 2] * 2
    assert sorted(reads) == sorted(sizes) and split > 10


@pytest.mark.parametrize("settings", [{}, EVERYTHING, {"untrained_seed": 3, "use_metadata": True}])
def test_the_shapes_of_a_backbone_are_those_of_its_arrays(pipeline, settings):
    folder = folder_of(pipeline, **settings)
    shapes, loaded = folder.shapes(), folder.load()
    for name in ("unet", "codec", "schedule"):
        assert getattr(shapes, name) == getattr(loaded, name)
    found, expected = (
        {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(trees(backbone)).items()}
        for backbone in (loaded, shapes)
    )
    assert found == expected
    assert (shapes.uncond is None) == (loaded.uncond is None)
    has_metadata = any(path.startswith("unet/metadata") for path in found)
    assert has_metadata == settings.get("use_metadata", False)


def test_of_several_processes_the_first_asks_the_text_tower(pipeline, tmp_path, monkeypatch):
    said = []

    def tell_all(value):
        said.append(value)
        return value if jax.process_index() == 0 else answer

    folders = [folder_of(pipeline), BackboneFolder(pipeline, None, "lakes", tmp_path)]
    expected = folders[0].contexts
    monkeypatch.setattr(distributed, "tell_all", tell_all)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    answer = [expected.tolist(), None]
    np.testing.assert_array_equal(folder_of(pipeline).contexts, expected)
    answer = [None, "PromptError: no embedding of 'lakes'"]
    with pytest.raises(PromptError, match="process 0 could not go on: .*lakes"):
        _ = folders[1].contexts
    assert said == [[None, None]] * 2


def test_a_process_reads_the_whole_model_only_where_it_works_alone(monkeypatch):
    small, meshes = small_backbone(0), []

    def load(mesh):
        meshes.append(mesh)
        return feature_source.place_backbone(small, mesh)

    devices = jax.devices()
    maker = FeatureMaker(load, ExtractConfig(), make_mesh(fsdp=2, devices=devices[:2]), CACHE)
    alone = make_mesh(devices=devices[1:2])
    there = maker.on(alone)
    assert meshes == [maker.mesh] and maker.model == fingerprint(small)
    assert {d for leaf in jax.tree.leaves(there.backbone) for d in leaf.devices()} == {devices[1]}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    there = maker.on(alone)
    assert len(meshes) == 1  # with features in a cache nobody asks
    jax.tree.map(np.testing.assert_array_equal, there.backbone, small)
    assert meshes == [maker.mesh, alone] and maker.backbone is not there.backbone
