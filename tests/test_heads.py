"""Heads against the published code's vectors and against torch, forward, backward and stepping."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest
import torch
from conftest import golden_cases, read_golden, rel_error, tree_norm
from head_cases import SCALES, make_features, make_spec, make_torch_head, port_head

from common_jax.sharding import BATCH_AXES, make_mesh
from common_jax.weights import flatten
from satdifuser_jax.convert_heads import load_head
from satdifuser_jax.experts import published_balance
from satdifuser_jax.heads import Head, HeadSpec, head_shapes, init_head, moe_phase
from satdifuser_jax.losses import head_loss
from satdifuser_jax.taps import Scale


def golden_spec(meta: dict, name: str) -> HeadSpec:
    """The head of one golden entry, every size from its meta."""
    head, dims = meta["heads"][name], meta["inversion"]["dims"]
    scales = [
        Scale(int(side), ("",) * len(channels), tuple(channels))
        for side, channels in sorted(dims.items(), key=lambda item: -int(item[0]))
    ]
    return HeadSpec(
        task=head["task"],
        fuser=head["fuser"],
        num_classes=head["num_classes"],
        scales=tuple(scales),
        num_keys=len(head["save_timesteps"]),
        projection_dim=head["projection_dim"],
        output_side=head["output_size"],
        num_experts=head["num_experts"],
        top_k=head["top_k"],
        channels=head["channels"],
        pool_scales=head["pool_scales"],
        rescales=head["rescales"],
        ignore_index=head["ignore_index"],
        lw_input="first_tap",
    )


def golden_features(meta: dict, arrays: dict) -> tuple:
    sides = sorted((int(side) for side in meta["inversion"]["dims"]), reverse=True)
    keys = sorted(meta["inversion"]["save_timesteps"], reverse=True)
    return tuple(
        np.stack([arrays[f"inversion/feats/{k}/{s}"].transpose(0, 2, 3, 1) for k in keys], 1)
        for s in sides
    )


def golden_heads():
    """(folder, head name) for every head of every golden folder that has any."""
    found = []
    for case in golden_cases("satdifuser_*"):
        if case.values[0] is None:
            return [pytest.param(None, None, marks=case.marks, id="GOLDEN_DIR-unset")]
        meta, _ = read_golden(case.values[0])
        found += [
            pytest.param(case.values[0], name, id=f"{case.id}-{name}")
            for name in meta.get("heads", {})
        ]
    return found


@dataclasses.dataclass
class Golden:
    arrays: dict
    spec: HeadSpec
    features: tuple
    params: dict
    state: dict

    def apply(self, params, phase):
        return Head(self.spec).apply({"params": params, **self.state}, self.features, phase=phase)


def open_golden(folder, name) -> Golden:
    meta, arrays = read_golden(folder)
    spec = golden_spec(meta, name)
    params, state = load_head(folder / f"{name}.pth", spec)
    prefix = f"{name}/"
    mine = {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
    mine["labels"] = arrays["seg_labels" if spec.segments else "labels"]
    return Golden(mine, spec, golden_features(meta, arrays), params, state)


def as_nhwc(logits):
    return logits.transpose(0, 2, 3, 1) if logits.ndim == 4 else logits


def balance_error(found, expected) -> float:
    """Relative to the size of the value, or of a hundredth where even gates make its terms cancel:
    each term is a share times a logarithm, rounded at the size of one."""
    return abs(float(found) - float(expected)) / max(abs(float(expected)), 1e-2)


@pytest.mark.parametrize("folder, name", golden_heads())
def test_golden_head_logits_loss_and_gradient_norm(folder, name):
    golden = open_golden(folder, name)

    def loss(params):
        logits, aux = golden.apply(params, "dense")
        total, weight = head_loss(golden.spec, logits, aux, golden.arrays["labels"])
        return total / weight, (logits, aux)

    (value, (logits, aux)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(golden.params)
    checked = {"labels", "logits", "loss", "gradnorm", "logits_topk", "lb_loss_topk"}
    assert rel_error(logits, as_nhwc(golden.arrays["logits"])) < 1e-5
    assert rel_error(value, golden.arrays["loss"]) < 1e-5
    assert rel_error(tree_norm(grads), golden.arrays["gradnorm"]) < 1e-4
    if "mixing" in golden.arrays:
        assert rel_error(aux["mixing"], golden.arrays["mixing"]) < 1e-5
        checked.add("mixing")
    for i, gate in enumerate(aux.get("gates", ())):
        assert rel_error(gate, as_nhwc(golden.arrays[f"gate{i}"])) < 1e-5
        checked.add(f"gate{i}")
    if "use" in aux:
        balance = published_balance(np.asarray(aux["use"]))
        assert balance_error(balance, golden.arrays["lb_loss_warm"]) < 1e-5
        checked.add("lb_loss_warm")
    assert checked >= golden.arrays.keys(), "an array of this head is compared with nothing"


@pytest.mark.slow
@pytest.mark.parametrize("folder, name", [p for p in golden_heads() if "moe" in p.id])
def test_golden_experts_after_warm_up(folder, name):
    golden = open_golden(folder, name)
    logits, aux = jax.jit(lambda p: golden.apply(p, "sparse"))(golden.params)
    assert rel_error(logits, as_nhwc(golden.arrays["logits_topk"])) < 1e-5
    balance = published_balance(aux["use"])
    assert balance_error(balance, golden.arrays["lb_loss_topk"]) < 1e-5


# ------------------------------------------------------------------------------------ against torch
ODD_SIDES = (Scale(6, ("a",), (12,)), Scale(4, ("b",), (12,)))  # 6 / 4 is no whole factor


@pytest.mark.parametrize("scales", [SCALES, ODD_SIDES], ids=["whole factors", "odd sides"])
def test_classifier_equals_torch_that_resizes_sums_and_pools(scales, tmp_path):
    spec = make_spec(scales=scales)
    head, features = make_torch_head(spec), make_features(spec)
    params, state = port_head(head, spec, tmp_path)
    logits = jax.jit(lambda p: Head(spec).apply({"params": p, **state}, features)[0])(params)
    assert rel_error(logits, head(features)[0].detach()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_an_adam_step_in_training_mode_equals_torch(task, tmp_path):
    spec = make_spec(task=task, dropout=0.0, pool_scales=(1, 2))
    head, features = make_torch_head(spec), make_features(spec)
    params, state = port_head(head, spec, tmp_path)
    labels = np.arange(3) if task == "classification" else np.arange(300).reshape(3, 10, 10) // 100
    # Weight decay is large enough that biases in front of a norm, whose gradient is rounding
    # noise around zero, step by their decay on both sides.
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01, weight_decay=0.01)
    logits = head.train()(features)[0]
    torch.nn.functional.cross_entropy(logits, torch.as_tensor(labels)).backward()
    optimizer.step()
    expected, _ = port_head(head, spec, tmp_path)
    adam = optax.chain(optax.add_decayed_weights(0.01), optax.adam(0.01))

    def loss(params):
        how = {"train": True, "mutable": ["batch_stats"]}
        (logits, aux), _ = Head(spec).apply({"params": params, **state}, features, **how)
        total, weight = head_loss(spec, logits, aux, labels)
        return total / weight

    @jax.jit
    def step(params):
        updates, _ = adam.update(jax.grad(loss)(params), adam.init(params), params)
        return optax.apply_updates(params, updates)

    after, before, wanted = (flatten(tree) for tree in (step(params), params, expected))
    for path, value in after.items():
        moved = np.abs(value - before[path]).max()
        assert moved > 1e-3, f"{path} did not move"
        assert np.abs(value - wanted[path]).max() < 1e-4 * np.abs(wanted[path]).max(), path


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_an_uneven_last_batch_counts_as_its_real_rows_alone(task):
    spec = make_spec(task=task, dropout=0.0, pool_scales=(1, 2), fuser="moe", scales=SCALES[1:])
    params, state = init_head(spec, 0)
    features = make_features(spec, batch=4)
    labels = np.arange(4) if task == "classification" else np.arange(400).reshape(4, 10, 10) // 100

    def loss(params, features, labels, mask):
        how = {"train": True, "mutable": list(state), "phase": "dense", "mask": mask}
        (logits, aux), new = Head(spec).apply({"params": params, **state}, features, **how)
        total, weight = head_loss(spec, logits, aux, labels, mask=mask)
        return total / weight, (new, aux["use"])

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for x in features:
        x[3] = 50.0
    padded = run(params, features, labels, np.arange(4) < 3)
    short = run(params, tuple(x[:3] for x in features), labels[:3], None)
    for a, b in zip(jax.tree.leaves(padded), jax.tree.leaves(short)):
        assert np.abs(a - b).max() < 1e-4 * max(np.abs(b).max(), 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, phase",
    [
        (dict(task="segmentation", dropout=0.5), None),
        (dict(fuser="moe", task="multi_label_classification"), "sparse"),
    ],
    ids=["batch norm and dropout", "sparse experts"],
)
def test_two_devices_give_the_gradients_and_statistics_of_one(changes, phase):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    spec = make_spec(pool_scales=(1,), scales=SCALES[1:], **changes)
    params, state = init_head(spec, 0)
    features = make_features(spec, batch=4)
    shape = (4, 10, 10) if spec.segments else (4, spec.num_classes)
    labels = np.random.default_rng(1).integers(0, 2, shape)
    keys = jax.random.split(jax.random.key(0), 4)

    def run(devices):
        mesh = make_mesh(devices=jax.devices()[:devices])
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(BATCH_AXES))

        def loss(params, features, labels, keys):
            how = {"train": True, "phase": phase, "keys": keys, "mutable": list(state)}
            variables = {"params": params, **state}
            (logits, aux), new = Head(spec, mesh=mesh).apply(variables, features, **how)
            total, weight = head_loss(spec, logits, aux, labels)
            return total / weight, new

        placed = jax.device_put((features, labels, keys), rows)
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, *placed)

    for a, b in zip(jax.tree.leaves(run(2)), jax.tree.leaves(run(1))):
        assert np.abs(a - np.asarray(b)).max() < 1e-5 * max(np.abs(b).max(), 1e-2)


def test_dropout_differs_by_key_and_only_in_training():
    spec = make_spec(task="segmentation", dropout=0.5, pool_scales=(1,), scales=SCALES[1:])
    params, state = init_head(spec, 0)
    features = make_features(spec)

    @jax.jit
    def train(seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        how = {"train": True, "mutable": ["batch_stats"], "keys": keys}
        return Head(spec).apply({"params": params, **state}, features, **how)[0][0]

    assert np.array_equal(train(0), train(0))
    assert rel_error(train(1), train(0)) > 0.01


def test_features_are_constants_whatever_the_fuser():
    for fuser in ("gw", "moe", "concat"):
        spec = make_spec(fuser=fuser, scales=SCALES[1:])
        params, state = init_head(spec, 0)
        (x,) = make_features(spec)

        def total(x, variables, spec=spec):
            return Head(spec).apply(variables, (x,), phase="dense")[0].sum()

        assert not np.any(jax.jit(jax.grad(total))(x, {"params": params, **state})), fuser


# ------------------------------------------------------------------------------------ static facts
PUBLISHED_SIZES = {  # 10 classes, taps of Stable Diffusion 2.1 at 256 px
    ("gw", "classification"): 10_854_601,
    ("lw", "classification"): 10_878_793,
    ("moe", "classification"): 71_498_542,
    ("gw", "segmentation"): 39_972_297,
    ("lw", "segmentation"): 39_996_489,
    ("moe", "segmentation"): 100_616_238,
}
FULL = tuple(
    Scale(side, ("",) * count, (width,) * count)
    for side, count, width in ((32, 6, 320), (16, 6, 640), (8, 6, 1280), (4, 3, 1280))
)


@pytest.mark.parametrize("fuser, task", PUBLISHED_SIZES, ids="-".join)
def test_full_size_heads_have_the_published_number_of_parameters(fuser, task):
    spec = HeadSpec(task, fuser, 10, FULL, 3, output_side=256)
    sizes = [leaf.size for leaf in jax.tree.leaves(head_shapes(spec)["params"])]
    assert sum(sizes) == PUBLISHED_SIZES[fuser, task]


def test_initial_values_are_the_published_ones():
    spec = make_spec(fuser="moe", task="segmentation", projection_dim=64)
    params, state = init_head(spec, 0)
    experts = params["fuser"]["scale_moes_0"]["experts"]
    for name, fan_out in (("conv1", 16), ("conv2", 9 * 16), ("conv3", 64), ("shortcut", 64)):
        assert experts[name]["kernel"].std() == pytest.approx(np.sqrt(2 / fan_out), rel=0.1), name
        assert np.all(experts[name]["norm"]["scale"] == 1), name
        assert np.all(experts[name]["norm"]["bias"] == 0), name
    assert params["fuser"]["scale_moes_0"]["temperature"] == 1
    conv = params["decoder"]["fpn_bottleneck"]["conv"]
    bound = 1 / np.sqrt(9 * 16)
    for leaf in (conv["kernel"], conv["bias"]):
        assert 0.5 * bound < np.abs(leaf).max() <= bound
    assert np.all(init_head(make_spec(), 0)[0]["fuser"]["mixing_weights"] == 1)
    assert state["moe"]["fuser"]["count"] == 0
    stats = state["batch_stats"]["decoder"]["bottleneck"]["norm"]
    assert np.all(stats["mean"] == 0) and np.all(stats["var"] == 1)


def test_phase_follows_steps_or_calls():
    steps = make_spec(fuser="moe", warmup_length=5)
    assert [moe_phase(steps, n) for n in (0, 3, 4, 9)] == ["dense", "dense", "sparse", "sparse"]
    # Evaluation after the fourth step is still in the phase of that step, after the fifth not.
    assert [moe_phase(steps, n, train=False) for n in (4, 5)] == ["dense", "sparse"]
    calls = make_spec(fuser="moe", warmup="calls", warmup_length=6)  # two keys a call
    assert [moe_phase(calls, n) for n in (0, 2, 4, 6)] == ["dense", "dense", None, "sparse"]
    assert moe_phase(make_spec(), 0) is None
    assert make_spec(fuser="moe", task="segmentation").warmup_count == 500


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(task="detection"), "head task is 'detection'"),
        (dict(fuser="sum"), "head fuser is 'sum'"),
        (dict(task="segmentation", output_side=None), "needs output_side"),
        (dict(fuser="moe", top_k=4), "top_k is 4: take 1 to num_experts=3"),
        (dict(projection_dim=24), "projection_dim is 24"),
    ],
)
def test_a_spec_that_cannot_work_is_refused_by_field(changes, message):
    with pytest.raises(ValueError, match=message):
        init_head(make_spec(**changes), 0)


def test_features_of_other_taps_are_refused():
    spec = make_spec()
    params, _ = init_head(spec, 0)
    fine, coarse = make_features(spec)
    with pytest.raises(ValueError, match=r"\[\(2, 43\), \(2, 32\)\].*\[\(2, 44\), \(2, 32\)\]"):
        Head(spec).apply({"params": params}, (fine[..., 1:], coarse))
