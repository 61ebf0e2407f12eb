"""Weights of small random torch modules as our trees: what the parity tests compare on."""

from __future__ import annotations

import re

import numpy as np
import torch

VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter off its initial value, so that a dropped bias or swapped norm shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += noise * (0.2 if parameter.ndim == 1 else 0.02)
    return module.eval()


def tree_from_torch(state: dict, vae: bool = False) -> dict:
    """Nested numpy dict from a torch state dict: NHWC layouts, our leaf names."""
    tree: dict = {}
    for name, tensor in state.items():
        *path, leaf = re.sub(r"\.(\d+)", r"_\1", name).split(".")
        value = np.asarray(tensor, np.float32)
        if leaf == "weight":
            leaf, value = _weight(path, value)
        if vae and "attentions_0" in path:
            path[-1] = VAE_ATTENTION.get(path[-1], path[-1])
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


def _weight(path: list[str], value: np.ndarray) -> tuple[str, np.ndarray]:
    if value.ndim == 4:
        return "kernel", value.transpose(2, 3, 1, 0)
    if value.ndim == 1:
        return "scale", value
    return ("embedding", value) if path[-1].endswith("_embedding") else ("kernel", value.T)


def nchw(x) -> torch.Tensor:
    return torch.from_numpy(np.array(np.moveaxis(np.asarray(x), -1, 1)))


def nhwc(x) -> np.ndarray:
    return np.moveaxis(x.detach().numpy() if isinstance(x, torch.Tensor) else x, 1, -1)
