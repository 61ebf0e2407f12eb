"""Names and layouts of torch checkpoints <-> paths and layouts of our trees, and their matching.

A path is the torch name with list positions joined to their list (`resnets.0` -> `resnets_0`) and
the leaf renamed: `weight` is `kernel` for convolutions (OIHW -> HWIO) and linear maps ([out, in] ->
[in, out]), `scale` for norms, `embedding` for tables. These are the names of the Flax trees that
diffusers and transformers published.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from common_jax.weights import LazyTensor, Report

# `linear_1` is one word in torch; every other `_<number>` is a position in a list.
_POSITION = re.compile(r"(?<!linear)_(\d+)$")
_WEIGHTS = ("kernel", "scale", "embedding")
# The two namings of the VAE's attention: that of diffusers 0.17 and later, and the earlier one,
# which our trees keep.
_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
TEXT_PREFIX = "text_model."
METADATA = "metadata_embedding"


def torch_name(path: str) -> str:
    """`down_blocks_0/resnets_1/conv1/kernel` -> `down_blocks.0.resnets.1.conv1.weight`."""
    *parents, leaf = path.split("/")
    parents = [_POSITION.sub(r".\1", part) for part in parents]
    return ".".join([*parents, "weight" if leaf in _WEIGHTS else leaf])


def torch_names(kind: str, path: str) -> tuple[str, ...]:
    """Every name under which public files hold the tensor at `path`; the one we write first.

    kind: `unet`, `vae` or `text_encoder`.
    """
    name = torch_name(path)
    if kind == "text_encoder":
        return TEXT_PREFIX + name, name
    if kind == "vae":
        for old, new in _VAE_ATTENTION.items():
            if f".attentions.0.{old}." in name:
                return name.replace(f".{old}.", f".{new}."), name
    return (name,)


def torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape torch gives the tensor that has `shape` in our tree."""
    if path.endswith("kernel"):
        return tuple(shape[axis] for axis in {2: (1, 0), 4: (3, 2, 0, 1)}[len(shape)])
    return tuple(shape)


def to_tree_layout(value: np.ndarray, path: str) -> np.ndarray:
    """torch layout -> ours, contiguous."""
    if not path.endswith("kernel"):
        return value
    axes = {2: (1, 0), 4: (2, 3, 1, 0)}[value.ndim]
    laid = np.empty([value.shape[axis] for axis in axes], value.dtype)
    for start in range(0, len(value), 16):  # in slabs that fit the cache: 2 to 6 times faster
        rows = slice(start, start + 16)
        laid[..., rows] = value[rows].transpose(axes)
    return laid


def to_torch_layout(value: np.ndarray, path: str) -> np.ndarray:
    """Ours -> torch layout, a view: the inverse of `to_tree_layout`."""
    if path.endswith("kernel"):
        return value.transpose({2: (1, 0), 4: (3, 2, 0, 1)}[value.ndim])
    return value


def match_tensors(
    kind: str,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, LazyTensor],
    ignored: tuple[str, ...] = (),
    source: str = "",
) -> tuple[dict[str, LazyTensor], Report]:
    """({path: tensor}, report): finds the tensor of every path of a tree with `shapes`."""
    matched, missing, misshapen, used = {}, [], [], set(ignored)
    for path, shape in shapes.items():
        names = torch_names(kind, path)
        name = next((name for name in names if name in tensors), None)
        if name is None:
            missing.append(_name_in_style_of(tensors, names))
            continue
        used.add(name)
        found, wanted = tensors[name].shape, torch_shape(path, shape)
        # Old files hold linear maps as 1x1 convolutions.
        if found == wanted or (len(wanted) == 2 and found == (*wanted, 1, 1)):
            matched[path] = tensors[name]
        else:
            misshapen.append((name, found, wanted))
    unused = tuple(name for name in tensors if name not in used)
    report = Report(source, tuple(missing), unused, tuple(misshapen), len(matched), tuple(ignored))
    return matched, dataclasses.replace(report, advice=_advise(kind, report, tensors))


def _name_in_style_of(tensors: Mapping[str, LazyTensor], names: tuple[str, ...]) -> str:
    """Of the names a tensor may have, the one whose siblings are in the file."""
    for name in names:
        module = name.rpartition(".")[0] + "."
        if any(other.startswith(module) for other in tensors):
            return name
    return names[0]


def _advise(kind: str, report: Report, tensors: Mapping[str, LazyTensor]) -> tuple[str, ...]:
    lines = []
    if not report.loaded and tensors:
        first = ", ".join(list(tensors)[:3])
        return (f"-> these are not the weights of a {kind}: the file begins with {first}",)
    if report.misshapen:
        lines.append("-> the weights are not those of this config.json; take both from one folder")
    if any(METADATA in name for name in report.missing):
        lines.append(
            "-> the file has fewer metadata embeddings than asked for: use_metadata=False loads "
            "it without them, or take a DiffusionSat checkpoint, which has 7"
        )
    elif report.missing:
        lines.append("-> the file is incomplete or of another architecture; download it again")
    if any(METADATA in name for name in report.unused):
        lines.append(
            "-> the file has metadata embeddings and config.json does not use them: "
            "use_metadata=True loads them, use_metadata=False drops them"
        )
    elif report.unused:
        lines.append(
            "-> config.json describes a smaller network than the file holds; correct it, or "
            "strict=False leaves the rest unread"
        )
    return tuple(lines)
