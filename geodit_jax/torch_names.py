"""Names and layouts of public checkpoints <-> places in our parameter tree.

A place is a path of the tree and, where the tree stacks layers, the number of the layer. Files name
places in two ways: `llava`, the names of LLaDA-V and GeoDiT, and `llada`, those of the LLaDA
release, which has a text core alone. Whatever a config or an index says, names alone decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

LAYOUTS = ("llava", "llada")


class Place(NamedTuple):
    """Where a tensor belongs: `core/layers/mlp/up_proj/kernel`, layer 3."""

    path: str
    layer: int | None = None


_TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
_BLOCK = {  # path below core/layers: names below a block, in both layouts
    "input_layernorm/scale": ("input_layernorm", "attn_norm"),
    "self_attn/q_proj/kernel": ("self_attn.q_proj", "q_proj"),
    "self_attn/k_proj/kernel": ("self_attn.k_proj", "k_proj"),
    "self_attn/v_proj/kernel": ("self_attn.v_proj", "v_proj"),
    "self_attn/o_proj/kernel": ("self_attn.o_proj", "attn_out"),
    "post_attention_layernorm/scale": ("post_attention_layernorm", "ff_norm"),
    "mlp/gate_proj/kernel": ("mlp.gate_proj", "ff_proj"),
    "mlp/up_proj/kernel": ("mlp.up_proj", "up_proj"),
    "mlp/down_proj/kernel": ("mlp.down_proj", "ff_out"),
}


def _list_names() -> dict[str, tuple[str, ...]]:
    """{path: names, `llava` first}, `{}` for the number of a layer, in the order of a model."""
    names = {"core/embed_tokens/embedding": ("model.embed_tokens", "model.transformer.wte")}
    for path, (llava, llada) in _BLOCK.items():
        blocks = (f"model.layers.{{}}.{llava}", f"model.transformer.blocks.{{}}.{llada}")
        names[f"core/layers/{path}"] = blocks
    names["core/norm/scale"] = ("model.norm", "model.transformer.ln_f")
    names["core/lm_head/kernel"] = ("lm_head", "model.transformer.ff_out")
    names = {path: tuple(f"{name}.weight" for name in both) for path, both in names.items()}
    names["newline/embedding"] = ("model.image_newline",)
    modules = [(f"projector/linear_{i}", f"model.mm_projector.{i}", "kernel") for i in (0, 2)]
    for module, leaf in (("patch_embedding", "kernel"), ("position_embedding", "embedding")):
        name = f"{_TOWER_PREFIX}embeddings.{module}"
        modules.append((f"tower/embeddings/{module}", name, leaf))
    linears = [f"self_attn/{x}_proj" for x in ("q", "k", "v", "out")] + ["mlp/fc1", "mlp/fc2"]
    for module in ("layer_norm1", *linears, "layer_norm2"):
        name = f"{_TOWER_PREFIX}encoder.layers.{{}}.{module.replace('/', '.')}"
        leaf = "kernel" if module in linears else "scale"
        modules.append((f"tower/layers/{module}", name, leaf))
    modules.append(("tower/post_layernorm", f"{_TOWER_PREFIX}post_layernorm", "scale"))
    for module, name, leaf in modules:
        names[f"{module}/{leaf}"] = (f"{name}.weight",)
        if leaf != "embedding":
            names[f"{module}/bias"] = (f"{name}.bias",)
    return names


_NAMES = _list_names()
_LAYER = re.compile(r"(?<=layers\.|blocks\.)\d+(?=\.)")
_VISION = re.compile(r"^(?:model\.)*(?:vision_tower\.)*(?:vision_model\.)?(?=[a-z])")
_TEXT = re.compile(r"^(?:model\.)+")
# Projector files of stage I keep whatever prefixes the trainer wrapped around the model.
_WRAPPED = re.compile(r"^.*\.(?=mm_projector\.\d|image_newline$)")
_TOWER_PATHS = {n[0].removeprefix(_TOWER_PREFIX): p for p, n in _NAMES.items() if "tower/" in p}
_OTHER_PATHS = {
    _TEXT.sub("", name): path
    for path, names in _NAMES.items()
    if not path.startswith("tower/")
    for name in names
}
# The pooling head of a full SigLIP, its text half, and tables that everybody computes.
_IGNORABLE = re.compile(
    r"(?:^|\.)(?:vision_model\.)?head\.|^text_model\.|^logit_(?:scale|bias)$"
    r"|\.position_ids$|\.inv_freq$"
)


def find_place(name: str) -> Place | None:
    """Where the tensor called `name` in a file belongs; None when it has no place in a model.

    Leading `model.` may be missing or doubled, a tower may stand alone or inside a model.
    """
    number = _LAYER.search(name)
    template = _LAYER.sub("{}", name, count=1)
    path = _OTHER_PATHS.get(_TEXT.sub("", _WRAPPED.sub("", template)))
    path = path or _TOWER_PATHS.get(_VISION.sub("", template))
    if path is None:
        return None
    return Place(path, int(number[0]) if number else None)


def is_ignorable(name: str) -> bool:
    """True for tensors that public files hold and no part of the model reads."""
    return find_place(name) is None and bool(_IGNORABLE.search(name))


def is_pooling_head(name: str) -> bool:
    """True for the attention pooling of a full SigLIP; towers inside LLaDA-V have lost it."""
    return find_place(name) is None and bool(re.match(r"head\.", _VISION.sub("", name)))


def torch_name(place: Place, layout: str = "llava") -> str:
    """The name of a place in a file; `llada` names the text core only and is `llava` elsewhere.

    Raises ValueError for a path that no model has.
    """
    if place.path not in _NAMES:
        raise ValueError(f"{place.path} is no parameter of a GeoDiT model")
    names = _NAMES[place.path]
    name = names[LAYOUTS.index(layout)] if len(names) > 1 else names[0]
    return name if place.layer is None else name.format(place.layer)


def find_layout(names: Iterable[str]) -> str:
    """`llada` when any of the names is one that only the LLaDA release uses, else `llava`."""
    return "llada" if any("transformer." in n and find_place(n) for n in names) else "llava"


def is_stacked(path: str) -> bool:
    return "/layers/" in path


def list_places(path: str, layers: int) -> list[Place]:
    """The places of one leaf of the tree: one for every layer, or just one."""
    return [Place(path, i) for i in range(layers)] if is_stacked(path) else [Place(path)]


def torch_axes(path: str, rank: int) -> tuple[int, ...]:
    """Axes of one layer of a leaf in the order of torch: [in,out] -> [out,in], HWIO -> OIHW."""
    if path.endswith("kernel"):
        return {2: (1, 0), 4: (3, 2, 0, 1)}[rank]
    return tuple(range(rank))


def torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that torch gives to one tensor of a leaf that has `shape` in our tree."""
    one = tuple(shape[1:] if is_stacked(path) else shape)
    return tuple(one[axis] for axis in torch_axes(path, len(one)))


def torch_view(value: np.ndarray, path: str) -> np.ndarray:
    """One layer of a leaf in the layout of torch, as a view: writing to it writes to `value`."""
    return value.transpose(torch_axes(path, value.ndim))


__all__ = [
    "LAYOUTS",
    "Place",
    "find_layout",
    "find_place",
    "is_ignorable",
    "is_pooling_head",
    "is_stacked",
    "list_places",
    "torch_axes",
    "torch_name",
    "torch_shape",
    "torch_view",
]
