"""Heads of the published code become our trees and state dicts again, bit for bit."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch
from conftest import golden_cases, read_golden
from torch_heads import TorchHead

from common_jax.files import UnsafePickleError
from common_jax.weights import flatten, open_tensors, tree_sha256
from satdifuser_jax.convert_heads import export_head, head_entries, load_head
from satdifuser_jax.heads import HeadSpec, head_shapes
from satdifuser_jax.taps import Scale

# Two widths in the finest scale: its taps form two stacks.
SCALES = (Scale(8, ("a", "b", "c"), (4, 4, 6)), Scale(4, ("d", "e"), (16, 16)))
SPEC = HeadSpec(
    task="classification",
    fuser="gw",
    num_classes=3,
    scales=SCALES,
    num_keys=2,
    projection_dim=16,
    norm_groups=4,
    num_experts=3,
    channels=6,
    pool_scales=(1, 2),
    output_side=10,
)
CASES = [
    dict(fuser="gw"),
    dict(fuser="lw", task="segmentation"),
    dict(fuser="moe", task="multi_label_classification"),
    dict(fuser="gw", task="segmentation", rescales=(4, 2)),
    dict(fuser="moe", task="segmentation", rescales=(1, 0.5)),
]


def case_id(case: dict) -> str:
    return "-".join(str(value) for value in case.values())


def published(spec: HeadSpec) -> dict[str, torch.Tensor]:
    """A state dict under the published names, every value distinct and off its initial value."""
    torch.manual_seed(0)
    state = TorchHead(spec).published_state()
    return {
        name: value if value.dtype == torch.int64 else torch.rand(value.shape)
        for name, value in state.items()
    }


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_export_of_an_import_is_the_same_state_dict(case, tmp_path):
    spec = dataclasses.replace(SPEC, **case)
    state = published(spec)
    torch.save(state, tmp_path / "head.pth")
    params, extra = load_head(tmp_path / "head.pth", spec)
    for name in ("again.pth", "again.safetensors"):
        export_head(tmp_path / name, params, extra, spec)
        again = open_tensors(tmp_path / name)
        assert set(again) == set(state)
        for key, value in state.items():
            assert np.array_equal(again[key].read(), value.numpy()), key
    module = TorchHead(spec)
    loaded = torch.load(tmp_path / "again.pth", weights_only=True)
    module.load_state_dict({key: loaded[key.split(".", 1)[1]] for key in module.state_dict()})
    reloaded = load_head(tmp_path / "again.safetensors", spec)
    assert tree_sha256(reloaded[0]) == tree_sha256(params)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_tensor_of_the_published_module_has_one_entry(case):
    spec = dataclasses.replace(SPEC, **case)
    state = {n: tuple(v.shape) for n, v in published(spec).items() if "num_batches" not in n}
    assert {entry.name: entry.shape for entry in head_entries(spec)} == state
    places = [(entry.path, entry.index) for entry in head_entries(spec)]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_an_imported_head_has_the_tree_of_a_fresh_one(case, tmp_path):
    spec = dataclasses.replace(SPEC, **case)
    torch.save(published(spec), tmp_path / "head.pth")
    params, state = load_head(tmp_path / "head.pth", spec)
    fresh = flatten(head_shapes(spec))
    found = flatten({"params": params, **state})
    assert {p: (v.shape, v.dtype) for p, v in found.items()} == {
        p: (v.shape, v.dtype) for p, v in fresh.items()
    }


def test_layouts_put_every_value_where_our_tree_has_it(tmp_path):
    spec = dataclasses.replace(SPEC, fuser="lw", task="segmentation", rescales=(2, 1))
    state = published(spec)
    torch.save(state, tmp_path / "head.pth")
    params, extra = load_head(tmp_path / "head.pth", spec)
    fuser, decoder = params["fuser"], params["decoder"]
    layer = state["bottleneck_layers.1.0.conv2.weight"].numpy()  # second tap of the first stack
    stack = fuser["bottleneck_layers_0"]["conv2"]["kernel"]
    assert stack.shape == (2, 3, 3, 4, 4)
    assert stack[1, 0, 2, 3, 1] == layer[1, 3, 0, 2]
    alone = state["bottleneck_layers.2.0.shortcut.weight"].numpy()  # the wider tap: its own stack
    kernel = fuser["bottleneck_layers_1"]["shortcut"]["kernel"][0]
    assert np.array_equal(kernel, alone[:, :, 0, 0].T)
    assert "shortcut" not in fuser["bottleneck_layers_2"]  # 16 channels in, 16 out: the identity
    gate = state["gate_modules.1.gate_conv.weight"].numpy()
    assert np.array_equal(fuser["gate_modules_1"]["gate_conv"]["kernel"], gate[:, :, 0, 0].T)
    up = state["neck.ops.0.0.weight"].numpy()
    assert decoder["neck_ops_0"]["up_0"]["kernel"][0, 1, 5, 7] == up[5, 7, 0, 1]
    mean = extra["batch_stats"]["decoder"]["psp_modules_1"]["norm"]["mean"]
    assert np.array_equal(mean, state["psp_modules.1.2.running_mean"].numpy())


def golden_spec(meta: dict, head: dict) -> HeadSpec:
    scales = tuple(
        Scale(int(side), tuple(f"tap{i}" for i in range(len(widths))), tuple(widths))
        for side, widths in sorted(meta["inversion"]["dims"].items(), key=lambda kv: -int(kv[0]))
    )
    same = ("task", "fuser", "num_classes", "projection_dim", "num_experts", "top_k", "channels")
    return HeadSpec(
        scales=scales,
        num_keys=len(head["save_timesteps"]),
        pool_scales=tuple(head["pool_scales"]),
        rescales=tuple(head["rescales"]),
        output_side=head["output_size"],
        lw_input="first_tap",
        **{name: head[name] for name in same},
    )


@pytest.mark.parametrize("folder", golden_cases("satdifuser_*"))
def test_golden_heads_survive_import_and_export(folder, tmp_path):
    meta, _ = read_golden(folder)
    heads = meta.get("heads", {})
    assert {path.stem for path in folder.glob("*.pth")} == set(heads)
    for name, head in heads.items():
        spec = golden_spec(meta, head)
        params, state = load_head(folder / f"{name}.pth", spec)
        assert ("batch_stats" in state) == (head["task"] == "segmentation")
        export_head(tmp_path / "head.pth", params, state, spec)
        wanted = torch.load(folder / f"{name}.pth", weights_only=True)
        found = torch.load(tmp_path / "head.pth", weights_only=True)
        assert list(found) == list(wanted)
        for key in wanted:
            value = wanted[key].float() if wanted[key].is_floating_point() else wanted[key]
            assert torch.equal(found[key], value), (name, key)


def test_a_training_checkpoint_gives_its_head(tmp_path):
    state = published(SPEC)
    whole = {
        "epoch": 7,
        "global_step": 441,
        "config": {"fuser": "gw", "save_timesteps": [47, 45, 40]},
        "decoder_net": state,
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
    }
    torch.save(whole, tmp_path / "best.pth")
    torch.save(state, tmp_path / "plain.pth")
    loaded = [load_head(tmp_path / name, SPEC)[0] for name in ("best.pth", "plain.pth")]
    assert tree_sha256(loaded[0]) == tree_sha256(loaded[1])


def test_the_counter_of_a_mixture_starts_at_zero(tmp_path):
    spec = dataclasses.replace(SPEC, fuser="moe")
    torch.save(published(spec), tmp_path / "head.pth")
    state = load_head(tmp_path / "head.pth", spec)[1]
    assert {path: int(v) for path, v in flatten(state).items()} == {"moe/fuser/count": 0}


def test_a_head_of_another_spec_is_refused_by_tensor_name(tmp_path):
    torch.save(published(SPEC), tmp_path / "head.pth")
    wrong = {
        "num_classes": (5, r"decoder_head\.2\.weight: found \(3, 16\), wanted \(5, 16\)"),
        "num_keys": (3, r"mixing_weights: found \(10,\), wanted \(15,\)"),
        "scales": (SCALES[:1], r"unused: bottleneck_layers\.3\.0\.conv1\.weight"),
        "fuser": ("lw", r"missing: gate_modules\.0\.gate_conv\.weight"),
    }
    for key, (value, message) in wrong.items():
        with pytest.raises(ValueError, match=rf"head\.pth: (.|\n)*{message}(.|\n)*-> task, fuser"):
            load_head(tmp_path / "head.pth", dataclasses.replace(SPEC, **{key: value}))


def test_unpublished_fusers_and_foreign_trees_are_not_exchanged(tmp_path):
    with pytest.raises(ValueError, match="fuser 'concat' has no published form"):
        head_entries(dataclasses.replace(SPEC, fuser="concat"))
    torch.save(published(SPEC), tmp_path / "head.pth")
    params, state = load_head(tmp_path / "head.pth", SPEC)
    params["fuser"]["extra"] = np.zeros(2)
    with pytest.raises(ValueError, match="params/fuser/extra is not in both"):
        export_head(tmp_path / "out.pth", params, state, SPEC)
    assert not (tmp_path / "out.pth").exists()


class Hostile:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def test_a_hostile_head_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(published(SPEC) | {"x": Hostile()}, tmp_path / "head.pth")
    with pytest.raises(UnsafePickleError, match=r"head\.pth.*refused and not run"):
        load_head(tmp_path / "head.pth", SPEC)
    assert not (tmp_path / "was_run").exists()
