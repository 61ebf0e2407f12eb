"""Checkpoints of tiny models, written as strangers write them: from names, not by our exporter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from geodit_jax.config import GeoDiTConfig, TextConfig, TokenIds, TowerConfig

TOKENS = TokenIds(mask=500, eos=481, bos=480, start_header=486, end_header=487, eot=488, size=501)
"""The special ids of the golden folders."""
TOWER = TowerConfig(image_size=28, patch=14, width=24, layers=2, heads=3, mlp=20)
CONFIG = GeoDiTConfig(
    text=TextConfig(vocab_rows=512, width=32, layers=3, heads=4, kv_heads=2, mlp=40),
    tower=TOWER,
    tokens=TOKENS,
    image_mode="anyres",
)
RAW = {
    "model_type": "llama",  # a lie that decides nothing
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vision_config": {"num_attention_heads": 3, "num_hidden_layers": 3},
    "geodit_jax": {"tokens": TOKENS.__dict__},
}


def text_tensors(rows: int = 512) -> dict[str, tuple[int, ...]]:
    """{name: shape} as transformers saves a LLaMA-like model of `CONFIG`."""
    shapes = {"model.embed_tokens.weight": (rows, 32)}
    for i in range(3):
        layer = f"model.layers.{i}"
        for name, shape in {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}.items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = shape
        for name, shape in {"gate": (40, 32), "up": (40, 32), "down": (32, 40)}.items():
            shapes[f"{layer}.mlp.{name}_proj.weight"] = shape
        shapes[f"{layer}.input_layernorm.weight"] = (32,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (32,)
    return shapes | {"model.norm.weight": (32,), "lm_head.weight": (rows, 32)}


def tower_tensors(layers: int = 2, prefix: str = "vision_model.") -> dict[str, tuple[int, ...]]:
    """{name: shape} of a SigLIP tower with `layers` layers."""
    shapes = {
        "embeddings.patch_embedding.weight": (24, 3, 14, 14),
        "embeddings.patch_embedding.bias": (24,),
        "embeddings.position_embedding.weight": (4, 24),
        "post_layernorm.weight": (24,),
        "post_layernorm.bias": (24,),
    }
    for i in range(layers):
        linears = {f"self_attn.{name}_proj": (24, 24) for name in ("q", "k", "v", "out")}
        linears |= {"mlp.fc1": (20, 24), "mlp.fc2": (24, 20)}
        for name, shape in linears.items():
            shapes[f"encoder.layers.{i}.{name}.weight"] = shape
            shapes[f"encoder.layers.{i}.{name}.bias"] = shape[:1]
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"encoder.layers.{i}.{name}.weight"] = (24,)
            shapes[f"encoder.layers.{i}.{name}.bias"] = (24,)
    return {prefix + name: shape for name, shape in shapes.items()}


def head_tensors(prefix: str = "vision_model.") -> dict[str, tuple[int, ...]]:
    """{name: shape} of the pooling head of a full SigLIP, some of it."""
    shapes = {"probe": (1, 1, 24), "attention.in_proj_weight": (72, 24), "layernorm.bias": (24,)}
    return {f"{prefix}head.{name}": shape for name, shape in shapes.items()}


def projector_tensors(prefix: str = "model.") -> dict[str, tuple[int, ...]]:
    shapes = {"0.weight": (32, 24), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    return {f"{prefix}mm_projector.{name}": shape for name, shape in shapes.items()}


def model_tensors() -> dict[str, tuple[int, ...]]:
    """{name: shape} of a whole model in the layout of LLaDA-V."""
    tower = tower_tensors(prefix="model.vision_tower.vision_tower.vision_model.")
    return text_tensors() | {"model.image_newline": (32,)} | projector_tensors() | tower


def fill(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 values that depend on the number of the tensor only."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_model(folder: Path, arrays: dict[str, np.ndarray], raw: dict = RAW, shards: int = 1):
    """Writes arrays in shards, scattered, with an index in which every tensor is misplaced."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    names = list(arrays)
    for i, file in enumerate(files):
        save_file({name: arrays[name] for name in names[i::shards]}, folder / file)
    lies = {name: files[(i + 1) % shards] for i, name in enumerate(names)}
    index = {"metadata": {"total_size": 1}, "weight_map": lies | {"model.ghost": files[0]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def edit(file: Path, change: Callable[[dict], None]) -> None:
    """Rewrites a safetensors file after `change` of its tensors."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
