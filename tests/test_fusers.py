"""Fusers against torch: values, extras and gradients, in every mode."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import rel_error
from head_cases import SCALES, make_features, make_spec, make_torch_head, port_gradients, port_head
from test_residual_block import torch_block

from satdifuser_jax.heads import init_head, make_fuser
from satdifuser_jax.taps import Scale

ONE_WIDTH = (Scale(4, ("a", "b"), (12, 12)), Scale(2, ("c",), (32,)))


def run_fuser(spec, params, state, features, **how):
    """(pyramid, aux, changed state) of the fuser of a head."""
    variables = {"params": params["fuser"]}
    variables |= {name: tree["fuser"] for name, tree in state.items() if "fuser" in tree}
    (pyramid, aux), changes = make_fuser(spec).apply(variables, features, mutable=["moe"], **how)
    return pyramid, aux, changes


@pytest.mark.parametrize(
    "changes",
    [
        dict(fuser="gw"),
        dict(fuser="lw"),
        dict(fuser="lw", scales=ONE_WIDTH, lw_input="first_tap"),
        dict(fuser="lw", scales=ONE_WIDTH, remat=True),
        dict(fuser="moe"),
    ],
    ids=["gw", "lw-own", "lw-first", "lw-remat", "moe-dense"],
)
def test_fuser_and_its_gradients_equal_torch(changes, tmp_path):
    spec = make_spec(**changes)
    features, head = make_features(spec), make_torch_head(spec)
    params, state = port_head(head, spec, tmp_path)
    maps, extra = head.fuser([torch.as_tensor(x).permute(0, 1, 4, 2, 3) for x in features])
    rng = np.random.default_rng(5)
    weights = [rng.standard_normal(m.shape).astype(np.float32) for m in maps]
    sum((m * torch.as_tensor(w)).sum() for m, w in zip(maps, weights)).backward()

    def loss(params):
        pyramid, aux, _ = run_fuser(spec, params, state, features, phase="dense")
        total = sum((x * w.transpose(0, 2, 3, 1)).sum() for x, w in zip(pyramid, weights))
        return total, (pyramid, aux)

    grads, (pyramid, aux) = jax.jit(jax.grad(loss, has_aux=True))(params)
    for found, expected in zip(pyramid, maps):
        assert rel_error(found, expected.detach().permute(0, 2, 3, 1)) < 1e-5
    if spec.fuser == "gw":
        assert rel_error(aux["mixing"], extra.detach()) < 1e-5
    for s, scale in enumerate(spec.scales if spec.fuser == "lw" else ()):
        assert rel_error(aux["gates"][s], extra[s].detach().permute(0, 2, 3, 1)) < 1e-5
        assert aux["gates"][s].shape[-1] == spec.num_keys * len(scale.channels)
    if spec.fuser == "moe":
        use = np.asarray([[share.detach().mean(0) for share in scale] for scale in extra])
        assert rel_error(aux["use"], use) < 1e-5
    expected = port_gradients(head, spec, tmp_path)["fuser"]
    flat = jax.tree_util.tree_leaves_with_path(grads["fuser"])
    for (path, found), value in zip(flat, jax.tree.leaves(expected)):
        assert rel_error(found, value) < 1e-4, jax.tree_util.keystr(path)


@pytest.mark.parametrize("fuser", ["gw", "lw", "moe", "concat", "single"])
def test_pooled_fuser_returns_the_mean_of_its_maps(fuser):
    spec = make_spec(fuser=fuser, single=(1, 2))
    params, state = init_head(spec, 0)
    features = make_features(spec)

    @jax.jit
    def both(params):
        runs = [run_fuser(spec, params, state, features, pooled=p)[0] for p in (True, False)]
        return list(zip(*runs))

    pairs = both(params)
    assert len(pairs) == (1 if fuser == "single" else len(spec.scales))
    for pooled, maps in pairs:
        assert maps.ndim == 4 and maps.shape[-1] == spec.projection_dim
        assert rel_error(pooled, maps.mean((1, 2))) < 1e-5


def test_concat_joins_keys_and_taps_on_one_axis():
    spec = make_spec(fuser="concat", scales=SCALES[:1])
    params, state = init_head(spec, 1)
    (x,) = make_features(spec)
    pyramid = jax.jit(lambda p: run_fuser(spec, p, state, (x,))[0])(params)
    stack = jax.tree.map(lambda leaf: leaf[0], params["fuser"]["bottleneck_layers_0"])
    block = dataclasses.make_dataclass("B", ["channels", "width", "groups"])(2 * 44, 32, 4)
    joined = torch.as_tensor(np.concatenate([x[:, 0], x[:, 1]], -1)).permute(0, 3, 1, 2)
    expected = torch_block(stack, block)(joined).detach().permute(0, 2, 3, 1)
    assert rel_error(pyramid[0], expected) < 1e-5


def test_single_reads_one_tap_at_one_key():
    spec = make_spec(fuser="single", single=(1, 2))  # second key, third tap: channels 24..44
    params, state = init_head(spec, 1)
    features = make_features(spec)
    run = jax.jit(lambda f: run_fuser(spec, params, state, f, pooled=True)[0][0])
    before = run(features)
    others = [x + 1.0 for x in features]
    others[0][:, 1, ..., 24:] = features[0][:, 1, ..., 24:]
    assert np.array_equal(run(tuple(others)), before)
    others[0][:, 1, ..., 24] += np.arange(6)[:, None]
    assert rel_error(run(tuple(others)), before) > 1e-3


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(fuser="lw", lw_input="first_tap"), r"taps of side 6 have widths \(12, 12, 20\)"),
        (dict(fuser="single", single=(0, 4)), "2 keys and 4 taps"),
    ],
)
def test_a_choice_that_the_taps_cannot_serve_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        init_head(make_spec(**changes), 0)


def count_after(spec, calls, train=True):
    """(counter, for every call and key whether all experts are in use) of a tiny mixture."""
    params, state = init_head(spec, 0)
    features = make_features(spec, batch=1)

    @jax.jit
    def call(state):
        _, aux, changes = run_fuser(spec, params, state, features, train=train, pooled=True)
        return {"moe": {"fuser": changes["moe"]}}, (aux["routed"] > 0).all(-1)[0]

    phases = []
    for _ in range(calls):
        state, dense = call(state)
        phases.append(dense.tolist())
    return int(state["moe"]["fuser"]["count"]), phases


def test_warm_up_in_calls_counts_every_key_and_ends_between_keys():
    spec = make_spec(fuser="moe", scales=ONE_WIDTH[1:], warmup="calls", warmup_length=4)
    # Calls 1, 2 | 3, 4: the fourth reaches the length and is sparse, evaluation or not.
    counted, phases = count_after(spec, 2, train=False)
    assert counted == 4 and phases == [[True, True], [True, False]]


def test_warm_up_in_steps_counts_training_alone():
    spec = make_spec(fuser="moe", scales=ONE_WIDTH[1:], warmup_length=2)
    assert count_after(spec, 3) == (3, [[True, True], [False, False], [False, False]])
    assert count_after(spec, 3, train=False) == (0, [[True, True]] * 3)


def test_padded_rows_do_not_count_in_the_use_of_experts():
    spec = make_spec(fuser="moe", scales=ONE_WIDTH[1:])
    params, state = init_head(spec, 0)
    (x,) = make_features(spec, batch=4)
    run = jax.jit(lambda x, mask: run_fuser(spec, params, state, (x,), pooled=True, mask=mask)[1])
    padded = run(x, jnp.asarray([True, True, True, False]))
    x[3] = 100.0
    assert np.array_equal(padded["use"], run(x, jnp.asarray([True] * 3 + [False]))["use"])
    assert rel_error(padded["use"].sum(-1), np.ones((1, 2))) < 1e-6
