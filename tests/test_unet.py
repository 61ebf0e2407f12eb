"""The UNet against torch diffusers on random weights, the published golden vectors, and itself."""

from __future__ import annotations

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import golden_cases, read_golden, rel_error
from torch_oracle import nchw, nhwc, randomise, tree_from_torch

from satdifuser_jax.convert import load_unet
from satdifuser_jax.taps import list_taps
from satdifuser_jax.unet import SatUNet, UNetConfig, init_unet, unet_shapes

TINY = UNetConfig(
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=24,
    attention_head_dim=(2, 4),
    norm_num_groups=8,
    sample_size=8,
)


def random_inputs(config: UNetConfig, batch: int = 2, side: int = 8):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((batch, side, side, config.in_channels), np.float32)
    t = np.array([-1.0, 161.0] * batch, np.float32)[:batch]
    context = rng.standard_normal((batch, 7, config.cross_attention_dim), np.float32)
    return x, t, context


def call(config, params, *inputs, metadata=None, taps=(), **options):
    unet = SatUNet(config, **options)

    @jax.jit
    def run(params, metadata, *inputs):
        return unet.apply({"params": params}, *inputs, metadata, taps=taps)

    return run(params, metadata, *inputs)


@pytest.fixture(scope="module")
def torch_unet():
    """A tiny torch UNet, its parameters as our tree."""
    torch.manual_seed(0)
    unet = randomise(diffusers.UNet2DConditionModel.from_config(TINY.to_dict()))
    return unet, tree_from_torch(unet.state_dict())


def test_unet_and_every_tap_equal_torch_diffusers_on_random_weights(torch_unet):
    unet, params = torch_unet
    x, t, context = random_inputs(TINY)
    names = tuple(list_taps(TINY))
    seen = {}
    hooks = [
        unet.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.__setitem__(name, out)
        )
        for name in names
    ]
    with torch.no_grad():
        expected = unet(nchw(x), torch.from_numpy(t), torch.from_numpy(context)).sample
    for hook in hooks:
        hook.remove()
    y, taps = call(TINY, params, x, t, context, taps=names)
    assert rel_error(y, nhwc(expected)) < 1e-5
    assert len(names) == 16 and set(taps) == set(names)
    for name, tap in taps.items():
        out = seen[name]
        reference = nhwc(out) if out.ndim == 4 else out.numpy().reshape(tap.shape)
        assert rel_error(tap, reference) < 1e-5, name


def test_metadata_embeddings_equal_seven_more_torch_time_embeddings(torch_unet):
    unet, params = torch_unet
    config = dataclasses.replace(TINY, num_metadata=7)
    torch.manual_seed(1)
    fields = [randomise(type(unet.time_embedding)(32, 128), seed) for seed in range(7)]
    for i, field in enumerate(fields):
        params = params | {f"metadata_embedding_{i}": tree_from_torch(field.state_dict())}
    x, t, context = random_inputs(TINY)
    metadata = np.random.default_rng(2).uniform(0, 1000, (2, 7)).astype(np.float32)
    metadata[1, 3] = 0

    def add_fields(module, args, emb):
        numbers = torch.from_numpy(metadata)
        return emb + sum(field(unet.time_proj(numbers[:, i])) for i, field in enumerate(fields))

    hook = unet.time_embedding.register_forward_hook(add_fields)
    with torch.no_grad():
        expected = unet(nchw(x), torch.from_numpy(t), torch.from_numpy(context)).sample
    hook.remove()
    y, _ = call(config, params, x, t, context, metadata=metadata)
    assert rel_error(y, nhwc(expected)) < 1e-5
    without, _ = call(config, params, x, t, context)
    assert rel_error(without, y) > 1e-3


def test_gradients_equal_torch_diffusers(torch_unet):
    unet, params = torch_unet
    x, t, context = random_inputs(TINY)
    inputs = nchw(x).requires_grad_()
    out = unet(inputs, torch.from_numpy(t), torch.from_numpy(context)).sample
    unet.zero_grad()
    out.square().mean().backward()
    expected = tree_from_torch({name: p.grad for name, p in unet.named_parameters()})
    net = SatUNet(TINY)

    def loss(params, x):
        return jnp.mean(jnp.square(net.apply({"params": params}, x, t, context)[0]))

    grads, at_x = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    assert rel_error(at_x, nhwc(inputs.grad)) < 1e-4
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected))
    errors = jax.tree.map(lambda a, b: np.abs(a - b).max() / largest, grads, expected)
    assert max(jax.tree.leaves(errors)) < 1e-4


@pytest.mark.slow
def test_remat_recomputes_and_changes_no_gradient():
    config = dataclasses.replace(
        TINY,
        block_out_channels=(32,),
        down_block_types=TINY.down_block_types[:1],
        up_block_types=TINY.up_block_types[1:],
        attention_head_dim=2,
    )
    params, inputs = init_unet(config, 0), random_inputs(config, side=4)
    tap = "up_blocks.0.attentions.1.transformer_blocks.0.attn1"

    def gradient(remat):
        def loss(params):
            y, taps = SatUNet(config, remat=remat).apply({"params": params}, *inputs, taps=(tap,))
            return jnp.mean(jnp.square(y)) + jnp.mean(taps[tap])

        is_recomputed = "remat" in str(jax.make_jaxpr(loss)(params))
        assert is_recomputed == (remat != "none")
        return jax.jit(jax.grad(loss))(params)

    plain = gradient("none")
    largest = max(np.abs(g).max() for g in jax.tree.leaves(plain))
    for remat in ("dots", "full"):
        errors = jax.tree.map(lambda a, b: np.abs(a - b).max() / largest, gradient(remat), plain)
        assert max(jax.tree.leaves(errors)) < 1e-5


def test_a_shared_context_equals_one_copy_per_image(torch_unet):
    _, params = torch_unet
    x, t, context = random_inputs(TINY)
    shared, _ = call(TINY, params, x, t, context[:1])
    copied, _ = call(TINY, params, x, t, np.repeat(context[:1], 2, axis=0))
    assert rel_error(shared, copied) < 2e-6


def test_taps_alone_cost_no_later_layer(torch_unet):
    _, params = torch_unet
    inputs = random_inputs(TINY)
    unet = SatUNet(TINY)

    def work(tap):
        only = jax.jit(lambda p: unet.apply({"params": p}, *inputs, taps=(tap,))[1])
        return only.lower(params).compile().cost_analysis()["flops"]

    early, late = (work(f"{name}.resnets.0.conv2") for name in ("down_blocks.0", "up_blocks.1"))
    assert early < 0.5 * late


def test_bfloat16_stays_near_float32_and_returns_its_dtype(torch_unet):
    _, params = torch_unet
    inputs = random_inputs(TINY)
    name = "up_blocks.1.resnets.0.conv2"
    exact, _ = call(TINY, params, *inputs)
    y, taps = call(TINY, params, *inputs, taps=(name,), dtype=jnp.bfloat16)
    assert y.dtype == taps[name].dtype == jnp.bfloat16
    assert rel_error(y.astype(jnp.float32), exact) < 0.05


@pytest.mark.parametrize(
    ("metadata", "parameters", "tensors"), [(False, 865_910_724, 686), (True, 880_264_644, 714)]
)
def test_full_size_has_the_published_number_of_parameters(metadata, parameters, tensors):
    leaves = jax.tree.leaves(unet_shapes(UNetConfig.sd21(metadata)))
    assert (sum(leaf.size for leaf in leaves), len(leaves)) == (parameters, tensors)


def test_full_size_taps_have_the_published_shapes():
    config = UNetConfig.sd21()
    shapes = jax.eval_shape(
        lambda p, x, t, c: SatUNet(config).apply(
            {"params": p}, x, t, c, taps=tuple(list_taps(config))
        ),
        unet_shapes(config),
        *(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 32, 32, 4), (2,), (1, 77, 1024))),
    )
    y, taps = shapes
    assert y.shape == (2, 32, 32, 4)
    assert taps["up_blocks.3.attentions.2.transformer_blocks.0.attn1"].shape == (2, 32, 32, 320)
    assert taps["up_blocks.2.resnets.0.conv2"].shape == (2, 16, 16, 640)
    assert taps["up_blocks.0.resnets.2.conv2"].shape == (2, 4, 4, 1280)


@pytest.mark.parametrize(
    "config",
    [TINY, UNetConfig.sd21(metadata=True), dataclasses.replace(TINY, attention_head_dim=4)],
)
def test_config_round_trips_through_diffusers(config):
    assert UNetConfig.from_dict(config.to_dict()) == config
    plain = dataclasses.replace(config, num_metadata=0)
    with torch.device("meta"):
        published = diffusers.UNet2DConditionModel.from_config(plain.to_dict())
    assert UNetConfig.from_dict(published.config) == plain
    expected = {name: tuple(p.shape) for name, p in published.named_parameters()}
    assert len(expected) == len(jax.tree.leaves(unet_shapes(plain)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_linear_projection": False}, "use_linear_projection=False is not implemented"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' is unknown"),
        ({"down_block_types": ["DownBlock2D"]}, r"down_block_types=.*need 2 of"),
        ({"up_block_types": ["UpBlock2D", "SkipUpBlock2D"]}, "SkipUpBlock2D"),
        ({"attention_head_dim": [2, 4, 8]}, "3 entries for 2 levels"),
        ({"norm_num_groups": 7}, "32, not divisible by norm_num_groups=7"),
    ],
)
def test_a_config_that_is_not_implemented_is_refused_by_key_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict(TINY.to_dict() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 9, 8, 4)}, "divisible by 2"),
        ({"x": (2, 8, 8, 3)}, r"need \[B,H,W,4\]"),
        ({"context": (3, 7, 24)}, r"need \[2 or 1,S,24\]"),
        ({"context": (2, 7, 23)}, r"need \[2 or 1,S,24\]"),
        ({"metadata": (2, 7)}, "no metadata embeddings, pass None"),
    ],
)
def test_inputs_of_the_wrong_shape_are_refused(change, message):
    shapes = {"x": (2, 8, 8, 4), "t": (2,), "context": (1, 7, 24), "metadata": None} | change
    inputs = [None if s is None else jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes.values()]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda p, *a: SatUNet(TINY).apply({"params": p}, *a), unet_shapes(TINY), *inputs
        )


def test_an_unknown_tap_is_refused_naming_what_exists():
    params, inputs = unet_shapes(TINY), random_inputs(TINY)
    with pytest.raises(ValueError, match=r"unknown taps \['up_blocks.9'\].*down_blocks.0.attent"):
        jax.eval_shape(
            lambda p: SatUNet(TINY).apply({"params": p}, *inputs, taps=("up_blocks.9",)), params
        )


def test_random_parameters_fill_the_tree_and_differ_by_seed():
    first, second = init_unet(TINY, 0), init_unet(TINY, 1)
    assert jax.tree.map(np.shape, first) == jax.tree.map(lambda s: s.shape, unet_shapes(TINY))
    assert rel_error(first["conv_in"]["kernel"], second["conv_in"]["kernel"]) > 0.1
    y, _ = call(TINY, first, *random_inputs(TINY))
    assert 1e-3 < np.std(y) < 10


@pytest.mark.parametrize("folder", golden_cases("satdifuser_*"))
def test_golden_unet_call(folder):
    _, arrays = read_golden(folder)
    config, params, report = load_unet(folder / "checkpoint" / "unet")
    report.raise_if_bad()
    x, t = nhwc(arrays["unet/x"]), arrays["unet/t"].astype(np.float32)
    metadata = arrays["metadata"] if config.use_metadata else None
    y, _ = call(config, params, x, t, arrays["unet/emb"], metadata=metadata)
    assert rel_error(y, nhwc(arrays["unet/y"])) < 2e-5
