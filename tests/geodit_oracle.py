"""Weights of published checkpoints and torch modules as our trees, without our converter."""

from __future__ import annotations

import re

import numpy as np
from safetensors.numpy import load_file

PARTS = (
    (r"^(model\.vision_tower\.vision_tower\.)?vision_model\.", "tower."),
    (r"^model\.mm_projector\.(\d)\.", r"projector.linear_\1."),
    (r"^model\.image_newline$", "newline.embedding"),
    (r"^model\.|^(?=lm_head\.)", "core."),
)


def read_tree(path, tower_layers: int | None = None) -> dict:
    """The tree of a safetensors file in the LLaDA-V or the SigLIP layout."""
    return tree_from_state(load_file(path), tower_layers)


def tree_from_state(state: dict, tower_layers: int | None = None) -> dict:
    """Stacked layers, [in, out] kernels. `tower_layers`: blocks of the tower behind it are left."""
    leaves: dict[str, dict[int, np.ndarray]] = {}
    for name, value in state.items():
        value = np.asarray(value, np.float32)
        path = next(re.sub(*rule, name) for rule in PARTS if re.search(rule[0], name))
        path = path.replace(".encoder.", ".")
        layer = re.search(r"\.layers\.(\d+)\.", path)
        dropped = layer and tower_layers is not None and int(layer[1]) >= tower_layers
        if path.startswith("tower.") and (dropped or ".head." in path):
            continue
        path, value = _leaf(re.sub(r"\.layers\.\d+\.", ".layers.", path), value)
        leaves.setdefault(path, {})[int(layer[1]) if layer else -1] = value
    tree: dict = {}
    for path, values in leaves.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        stacked = np.stack([values[i] for i in sorted(values)])
        node[leaf] = stacked[0] if -1 in values else stacked
    return tree


def _leaf(path: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    if not path.endswith(".weight"):
        return path, value
    path = path.removesuffix(".weight")
    if value.ndim == 4:
        return f"{path}.kernel", value.transpose(2, 3, 1, 0)
    if value.ndim == 1:
        return f"{path}.scale", value
    return (f"{path}.embedding", value) if "embed" in path else (f"{path}.kernel", value.T)
