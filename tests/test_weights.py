"""Weight files and folders come back bit for bit; what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from weight_files import arrays, assert_equal

from common_jax.weights import (
    Report,
    copy_shards,
    flatten,
    open_tensors,
    save_safetensors,
    save_torch,
    tree_sha256,
    unflatten,
)


def test_trees_flatten_and_come_back():
    tree = {"a": {"b": {"kernel": 1}, "c": 2}, "d": 3}
    assert flatten(tree) == {"a/b/kernel": 1, "a/c": 2, "d": 3}
    assert unflatten(flatten(tree)) == tree


def test_tree_hash_sees_values_names_shapes_dtypes_and_no_order():
    tree = {"a": {"x": np.arange(6.0)}, "b": np.ones(2, np.float32)}
    same = {"b": np.ones(2, np.float32), "a": {"x": np.arange(6.0)[::1]}}
    assert tree_sha256(tree) == tree_sha256(same)
    strided = {"a": {"x": np.arange(12.0)[::2] / 2}, "b": np.ones(2, np.float32)}
    assert tree_sha256(tree) == tree_sha256(strided)
    others = [
        {"a": {"x": np.arange(6.0) + 1e-12}, "b": np.ones(2, np.float32)},
        {"a": {"y": np.arange(6.0)}, "b": np.ones(2, np.float32)},
        {"a": {"x": np.arange(6.0).reshape(2, 3)}, "b": np.ones(2, np.float32)},
        {"a": {"x": np.arange(6.0)}, "b": np.ones(2, np.float32).view(np.int32)},
    ]
    assert len({tree_sha256(other) for other in [tree, *others]}) == 5
    assert tree_sha256({"c": arrays()["c.bfloat"]}) != tree_sha256({"c": arrays()["b.half"]})


def test_safetensors_come_back_and_the_public_library_reads_ours(tmp_path):
    path = tmp_path / "m.safetensors"
    save_safetensors(path, arrays())
    assert_equal(open_tensors(path), arrays())
    public = safetensors.numpy.load_file(path)
    assert all(np.array_equal(public[name], value) for name, value in arrays().items())


def test_a_part_of_a_tensor_can_be_read_alone(tmp_path):
    save_safetensors(tmp_path / "m.safetensors", arrays())
    save_torch(tmp_path / "m.bin", arrays())
    for file in ("m.safetensors", "m.bin"):
        part = open_tensors(tmp_path / file)["a.weight"].read((slice(1, 3), slice(0, 2)))
        np.testing.assert_array_equal(part, arrays()["a.weight"][1:3, :2])


@pytest.mark.parametrize("file", ["m.safetensors", "m.bin"])
def test_slabs_of_a_tensor_are_the_tensor(tmp_path, file):
    (save_safetensors if file.endswith("s") else save_torch)(tmp_path / file, arrays())
    for name, tensor in open_tensors(tmp_path / file).items():
        wanted = arrays()[name]
        assert tensor.nbytes == wanted.nbytes
        slabs = list(tensor.slabs(slab_bytes=20))
        for rows, values in slabs:
            np.testing.assert_array_equal(values, np.atleast_1d(wanted)[rows])
            assert values.dtype == wanted.dtype
        assert sum(len(values) for _, values in slabs) == len(np.atleast_1d(wanted))


def test_lazy_tensors_are_copied_bit_for_bit_into_shards_with_their_index(tmp_path):
    save_torch(tmp_path / "m.bin", arrays())
    copy_shards(tmp_path / "one", open_tensors(tmp_path / "m.bin"), 1 << 20)
    copy_shards(tmp_path / "many", open_tensors(tmp_path / "m.bin"), 48)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    public = safetensors.numpy.load_file(tmp_path / "one" / "model.safetensors")
    assert {n: a.tobytes() for n, a in public.items()} == {
        n: a.tobytes() for n, a in arrays().items()
    }
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    held = {name: file.name for file in shards for name in safetensors.numpy.load_file(file)}
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays().values())
    assert_equal(dict(sorted(open_tensors(tmp_path / "many").items())), arrays())


def shard(folder: Path, suffix: str) -> None:
    save = save_safetensors if suffix == "safetensors" else save_torch
    items = list(arrays().items())
    for i, part in enumerate((items[:3], items[3:]), 1):
        save(folder / f"model-0000{i}-of-00002.{suffix}", dict(part))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_files_are_one_model_without_their_index(tmp_path, suffix):
    shard(tmp_path, suffix)
    assert_equal(dict(sorted(open_tensors(tmp_path).items())), arrays())
    (tmp_path / f"model-00001-of-00002.{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=r"shards \[1\] of 2 are lacking"):
        open_tensors(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    shard(tmp_path, "safetensors")
    save_safetensors(tmp_path / "model-00002-of-00002.safetensors", arrays())
    with pytest.raises(ValueError, match=r"a\.weight is also in another shard"):
        open_tensors(tmp_path)


def test_safetensors_win_over_torch_files_and_variants_need_to_be_alone(tmp_path):
    save_torch(tmp_path / "diffusion_pytorch_model.bin", {"old": np.zeros(1)})
    save_safetensors(tmp_path / "diffusion_pytorch_model.fp16.safetensors", {"half": np.zeros(1)})
    assert list(open_tensors(tmp_path)) == ["half"]
    save_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", {"new": np.zeros(1)})
    assert list(open_tensors(tmp_path)) == ["new"]


def test_unclear_or_absent_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors and no \.bin"):
        open_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.bin: no such"):
        open_tensors(tmp_path / "nowhere.bin")
    (tmp_path / "x.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.npy: unknown kind"):
        open_tensors(tmp_path / "x.npy")
    for name in ("a", "b"):
        save_safetensors(tmp_path / f"{name}.safetensors", {"x": np.zeros(1)})
    with pytest.raises(ValueError, match=r"several weight files \(a, b\)"):
        open_tensors(tmp_path)


def test_truncated_and_corrupt_safetensors_are_named(tmp_path):
    save_safetensors(tmp_path / "whole.safetensors", arrays())
    content = (tmp_path / "whole.safetensors").read_bytes()
    broken = tmp_path / "model.safetensors"
    damages = [content[:-1], content[:100], content[:4], b"", b"\xff" * 64, b"<html>" * 20]
    for damage in damages:
        broken.write_bytes(damage)
        with pytest.raises(ValueError, match=r"model\.safetensors .*download it again"):
            open_tensors(broken)


def test_reports_say_what_was_found_and_what_to_do():
    report = Report(
        "unet/x.safetensors",
        missing=tuple(f"layer.{i}.weight" for i in range(30)),
        unused=("extra.bias",),
        misshapen=(("conv_in.weight", (320, 9, 3, 3), (320, 4, 3, 3)),),
        loaded=650,
        advice=("-> take both from one folder",),
    )
    text = str(report)
    assert text.startswith("unet/x.safetensors: 650 tensors loaded, 30 missing, 1 unused, 1 mis")
    assert "conv_in.weight: found (320, 9, 3, 3), wanted (320, 4, 3, 3)" in text
    assert "layer.19.weight" in text and "layer.20.weight" not in text and "10 more" in text
    assert text.endswith("-> take both from one folder")
    with pytest.raises(ValueError, match=r"extra\.bias"):
        report.raise_if_bad()
    assert Report("x").raise_if_bad().ok
