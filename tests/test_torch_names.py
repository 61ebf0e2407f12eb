"""Names, shapes and counts of the public checkpoints, without the checkpoints."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from common_jax.weights import flatten
from satdifuser_jax.text_encoder import TextConfig, text_encoder_shapes
from satdifuser_jax.torch_names import (
    to_torch_layout,
    to_tree_layout,
    torch_name,
    torch_names,
    torch_shape,
)
from satdifuser_jax.unet import UNetConfig, unet_shapes
from satdifuser_jax.vae import VAEConfig, vae_shapes

Table = dict[str, tuple[int, ...]]


def exported(kind: str, shapes, style: int = 0) -> Table:
    """{torch name: torch shape} of a tree, in the n-th naming that public files use."""
    return {
        torch_names(kind, path)[style]: torch_shape(path, leaf.shape)
        for path, leaf in flatten(shapes).items()
    }


def layer(name: str, *shape: int, bias: bool = True) -> Table:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def resnet(name: str, cin: int, cout: int, time: int | None = None, shortcut=None) -> Table:
    table = layer(f"{name}.norm1", cin) | layer(f"{name}.conv1", cout, cin, 3, 3)
    table |= layer(f"{name}.norm2", cout) | layer(f"{name}.conv2", cout, cout, 3, 3)
    if time:
        table |= layer(f"{name}.time_emb_proj", cout, time)
    if cin != cout if shortcut is None else shortcut:
        table |= layer(f"{name}.conv_shortcut", cout, cin, 1, 1)
    return table


def transformer(name: str, c: int, context: int = 1024) -> Table:
    table = layer(f"{name}.norm", c)
    for side in ("in", "out"):
        table |= layer(f"{name}.proj_{side}", c, c)
    block = f"{name}.transformer_blocks.0"
    for i in (1, 2, 3):
        table |= layer(f"{block}.norm{i}", c)
    for attention, width in (("attn1", c), ("attn2", context)):
        table |= layer(f"{block}.{attention}.to_q", c, c, bias=False)
        table |= layer(f"{block}.{attention}.to_k", c, width, bias=False)
        table |= layer(f"{block}.{attention}.to_v", c, width, bias=False)
        table |= layer(f"{block}.{attention}.to_out.0", c, c)
    table |= layer(f"{block}.ff.net.0.proj", 8 * c, c)
    return table | layer(f"{block}.ff.net.2", c, 4 * c)


def unet_table(metadata: bool) -> Table:
    widths, time = (320, 640, 1280, 1280), 1280
    table = layer("conv_in", 320, 4, 3, 3) | layer("conv_norm_out", 320)
    table |= layer("conv_out", 4, 320, 3, 3)
    names = ["time_embedding"] + [f"metadata_embedding.{i}" for i in range(7 * metadata)]
    for name in names:
        table |= layer(f"{name}.linear_1", time, 320) | layer(f"{name}.linear_2", time, time)
    previous = 320
    for b, width in enumerate(widths):
        for i, cin in enumerate((previous, width)):
            table |= resnet(f"down_blocks.{b}.resnets.{i}", cin, width, time)
            if b < 3:
                table |= transformer(f"down_blocks.{b}.attentions.{i}", width)
        if b < 3:
            table |= layer(f"down_blocks.{b}.downsamplers.0.conv", width, width, 3, 3)
        previous = width
    for i in (0, 1):
        table |= resnet(f"mid_block.resnets.{i}", 1280, 1280, time)
    table |= transformer("mid_block.attentions.0", 1280)
    inputs = ((2560, 2560, 2560), (2560, 2560, 1920), (1920, 1280, 960), (960, 640, 640))
    for b, width in enumerate(reversed(widths)):
        for i, cin in enumerate(inputs[b]):
            table |= resnet(f"up_blocks.{b}.resnets.{i}", cin, width, time, shortcut=True)
            if b:
                table |= transformer(f"up_blocks.{b}.attentions.{i}", width)
        if b < 3:
            table |= layer(f"up_blocks.{b}.upsamplers.0.conv", width, width, 3, 3)
    return table


VAE_NAMES = {
    "new": ("to_q", "to_k", "to_v", "to_out.0"),
    "old": ("query", "key", "value", "proj_attn"),
}


def vae_table(style: str) -> Table:
    table = layer("quant_conv", 8, 8, 1, 1) | layer("post_quant_conv", 4, 4, 1, 1)
    encoder = ((128, 128), (128, 256), (256, 512), (512, 512))
    for b, (cin, width) in enumerate(encoder):
        table |= resnet(f"encoder.down_blocks.{b}.resnets.0", cin, width)
        table |= resnet(f"encoder.down_blocks.{b}.resnets.1", width, width)
        if b < 3:
            table |= layer(f"encoder.down_blocks.{b}.downsamplers.0.conv", width, width, 3, 3)
    decoder = ((512, 512), (512, 512), (512, 256), (256, 128))
    for b, (cin, width) in enumerate(decoder):
        for i in range(3):
            name = f"decoder.up_blocks.{b}.resnets.{i}"
            table |= resnet(name, width if i else cin, width)
        if b < 3:
            table |= layer(f"decoder.up_blocks.{b}.upsamplers.0.conv", width, width, 3, 3)
    ends = {"encoder": (128, 3, 512, 8), "decoder": (512, 4, 128, 3)}
    for side, (first, cin, last, cout) in ends.items():
        table |= layer(f"{side}.conv_in", first, cin, 3, 3)
        table |= layer(f"{side}.conv_norm_out", last)
        table |= layer(f"{side}.conv_out", cout, last, 3, 3)
        for i in (0, 1):
            table |= resnet(f"{side}.mid_block.resnets.{i}", 512, 512)
        attention = f"{side}.mid_block.attentions.0"
        table |= layer(f"{attention}.group_norm", 512)
        for name in VAE_NAMES[style]:
            table |= layer(f"{attention}.{name}", 512, 512)
    return table


def text_table(prefix: str) -> Table:
    table = {
        f"{prefix}embeddings.token_embedding.weight": (49408, 1024),
        f"{prefix}embeddings.position_embedding.weight": (77, 1024),
    }
    for i in range(23):
        name = f"{prefix}encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            table |= layer(f"{name}.self_attn.{part}", 1024, 1024)
        table |= layer(f"{name}.layer_norm1", 1024) | layer(f"{name}.layer_norm2", 1024)
        table |= layer(f"{name}.mlp.fc1", 4096, 1024) | layer(f"{name}.mlp.fc2", 1024, 4096)
    return table | layer(f"{prefix}final_layer_norm", 1024)


def count(table: Table) -> int:
    return sum(math.prod(shape) for shape in table.values())


@pytest.mark.parametrize(
    ("metadata", "tensors", "parameters"), [(False, 686, 865_910_724), (True, 714, 880_264_644)]
)
def test_full_size_unet_has_the_published_names_shapes_and_counts(metadata, tensors, parameters):
    found = exported("unet", unet_shapes(UNetConfig.sd21(metadata=metadata)))
    assert found == unet_table(metadata)
    assert (len(found), count(found)) == (tensors, parameters)


def test_full_size_vae_has_the_published_names_shapes_and_counts():
    shapes = vae_shapes(VAEConfig())
    for style, naming in ((0, "new"), (-1, "old")):
        found = exported("vae", shapes, style)
        assert found == vae_table(naming)
    assert (len(found), count(found)) == (248, 83_653_863)
    encoder = {n: s for n, s in found.items() if n.startswith(("encoder.", "quant_conv."))}
    assert round(count(encoder) / 1e6, 2) == 34.16


def test_full_size_text_encoder_has_the_published_names_shapes_and_counts():
    shapes = text_encoder_shapes(TextConfig())
    for style, prefix in enumerate(("text_model.", "")):
        found = exported("text_encoder", shapes, style)
        assert found == text_table(prefix)
    assert (len(found), round(count(found) / 1e6, 1)) == (372, 340.4)


def meta_shapes(module: torch.nn.Module) -> Table:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def test_full_size_names_equal_those_of_torch_diffusers_and_transformers():
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    unet, vae, text = UNetConfig.sd21(), VAEConfig(), TextConfig()
    with torch.device("meta"):
        peer = diffusers.UNet2DConditionModel.from_config(unet.to_dict())
        assert meta_shapes(peer) == exported("unet", unet_shapes(unet))
        peer = diffusers.AutoencoderKL.from_config(vae.to_dict())
        assert meta_shapes(peer) == exported("vae", vae_shapes(vae))
        config = transformers.CLIPTextConfig.from_dict(text.to_dict())
        found = meta_shapes(transformers.CLIPTextModel(config))
    found = {name: s for name, s in found.items() if not name.endswith("position_ids")}
    ours = (exported("text_encoder", text_encoder_shapes(text), style) for style in (0, 1))
    assert found in list(ours)


def test_list_positions_and_numbered_words_are_told_apart():
    names = {
        "up_blocks_1/attentions_2/transformer_blocks_0/ff/net_0/proj/kernel": (
            "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj.weight"
        ),
        "down_blocks_0/resnets_1/norm1/scale": "down_blocks.0.resnets.1.norm1.weight",
        "metadata_embedding_6/linear_2/bias": "metadata_embedding.6.linear_2.bias",
        "time_embedding/linear_1/kernel": "time_embedding.linear_1.weight",
        "mid_block/attentions_0/transformer_blocks_0/attn2/to_out_0/bias": (
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.bias"
        ),
        "embeddings/token_embedding/embedding": "embeddings.token_embedding.weight",
    }
    assert {path: torch_name(path) for path in names} == names


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (4, 3)])
def test_layouts_are_inverse_and_equal_torch(shape):
    value = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    ours = to_tree_layout(value, "conv/kernel")
    assert ours.flags.c_contiguous
    np.testing.assert_array_equal(to_torch_layout(ours, "conv/kernel"), value)
    assert torch_shape("conv/kernel", ours.shape) == value.shape
    if len(shape) == 4:  # out, in, height, width
        assert ours[1, 2, 0, 1] == value[1, 0, 1, 2]
        assert ours.shape == (4, 5, 3, 2)
    for path in ("norm/scale", "conv/bias", "token_embedding/embedding"):
        np.testing.assert_array_equal(to_tree_layout(value, path), value)
