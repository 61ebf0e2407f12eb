"""Heads trained with the published code (`.pth` state dicts) <-> our head trees.

The published modules keep fuser and decoder on one level, one bottleneck per tap or expert; ours
stack blocks of one shape on a leading axis. The tables below list, for a HeadSpec, every published
tensor with its place in our tree; import and export both walk them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from common_jax.weights import (
    LazyTensor,
    Report,
    flatten,
    load_torch,
    open_tensors,
    save_safetensors,
    save_torch,
    tensors_of,
    unflatten,
)
from satdifuser_jax.bottlenecks import group_taps
from satdifuser_jax.heads import HeadSpec

COUNTER = "num_batches_tracked"  # torch counts batches; nothing reads it at momentum 0.1

# torch axes -> ours, and back.
LAYOUTS = {
    "as_is": (None, None),
    "linear": ((1, 0), (1, 0)),
    "conv": ((2, 3, 1, 0), (3, 2, 0, 1)),
    "transposed_conv": ((2, 3, 0, 1), (2, 3, 0, 1)),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published tensor: its name and shape, and its place: path, and index in a stack."""

    name: str
    shape: tuple[int, ...]
    path: str
    layout: str = "as_is"
    index: int | None = None

    def import_value(self, value: np.ndarray) -> np.ndarray:
        axes = LAYOUTS[self.layout][0]
        if axes is None:
            return value
        return np.ascontiguousarray(value.reshape(self.shape[: len(axes)]).transpose(axes))

    def export_value(self, value: np.ndarray) -> np.ndarray:
        value = value if self.index is None else value[self.index]
        axes = LAYOUTS[self.layout][1]
        return (value if axes is None else value.transpose(axes)).reshape(self.shape)


# ----------------------------------------------------------------------------------------- tables
def head_entries(spec: HeadSpec) -> list[Entry]:
    """Every tensor of the published head for `spec`, in the order of its state dict."""
    fusers = {"gw": _global_weighted, "lw": _local_weighted, "moe": _experts}
    if spec.fuser not in fusers:
        raise ValueError(
            f"fuser {spec.fuser!r} has no published form; only {sorted(fusers)} can be exchanged"
        )
    decode = _upernet if spec.task == "segmentation" else _classifier
    return [*fusers[spec.fuser](spec), *decode(spec)]


def _global_weighted(spec: HeadSpec) -> Iterator[Entry]:
    taps = sum(len(scale.channels) for scale in spec.scales)
    yield Entry("mixing_weights", (spec.num_keys * taps,), "params/fuser/mixing_weights")
    yield from _bottlenecks(spec)


def _local_weighted(spec: HeadSpec) -> Iterator[Entry]:
    yield from _bottlenecks(spec)
    for s, scale in enumerate(spec.scales):
        entries = spec.num_keys * len(scale.channels)
        name, path = f"gate_modules.{s}.gate_conv", f"params/fuser/gate_modules_{s}/gate_conv"
        shape = (entries, spec.projection_dim, 1, 1)
        yield Entry(f"{name}.weight", shape, f"{path}/kernel", "linear")
        yield Entry(f"{name}.bias", (entries,), f"{path}/bias")


def _bottlenecks(spec: HeadSpec) -> Iterator[Entry]:
    for g, group in enumerate(group_taps(spec.scales)):
        for i in range(group.count):
            name = f"bottleneck_layers.{group.first + i}.0"
            path = f"params/fuser/bottleneck_layers_{g}"
            yield from _block(name, path, i, group.channels, spec.projection_dim)


def _experts(spec: HeadSpec) -> Iterator[Entry]:
    for s, scale in enumerate(spec.scales):
        name, path, channels = (
            f"scale_moes.{s}",
            f"params/fuser/scale_moes_{s}",
            sum(scale.channels),
        )
        yield Entry(f"{name}.temperature", (), f"{path}/temperature")
        for e in range(spec.num_experts):
            place = (f"{name}.experts.{e}.0", f"{path}/experts", e)
            yield from _block(*place, channels, spec.projection_dim)
        gate, gate_path = f"{name}.gate_network.0", f"{path}/gate_network"
        shape = (spec.num_experts, channels, 3, 3)
        yield Entry(f"{gate}.weight", shape, f"{gate_path}/kernel", "conv")
        yield Entry(f"{gate}.bias", (spec.num_experts,), f"{gate_path}/bias")


def _block(name: str, path: str, index: int, channels: int, width: int) -> Iterator[Entry]:
    mid = width // 4
    convs = {
        "shortcut": (width, channels, 1, 1),
        "conv1": (mid, channels, 1, 1),
        "conv2": (mid, mid, 3, 3),
        "conv3": (width, mid, 1, 1),
    }
    if channels == width:
        del convs["shortcut"]  # the identity
    for conv, shape in convs.items():
        layout = "conv" if conv == "conv2" else "linear"
        yield Entry(f"{name}.{conv}.weight", shape, f"{path}/{conv}/kernel", layout, index)
        for torch_leaf, leaf in (("weight", "scale"), ("bias", "bias")):
            place = f"{path}/{conv}/norm/{leaf}"
            yield Entry(f"{name}.{conv}.norm.{torch_leaf}", shape[:1], place, index=index)


def _classifier(spec: HeadSpec) -> Iterator[Entry]:
    shape = (spec.num_classes, spec.projection_dim)
    yield Entry("decoder_head.2.weight", shape, "params/decoder/linear/kernel", "linear")
    yield Entry("decoder_head.2.bias", shape[:1], "params/decoder/linear/bias")


def _upernet(spec: HeadSpec) -> Iterator[Entry]:
    width, channels, levels = spec.projection_dim, spec.channels, len(spec.scales)
    for i, rescale in enumerate(spec.rescales or ()):
        yield from _neck_level(i, rescale, width)
    for i in range(len(spec.pool_scales)):
        shape = (channels, width, 1, 1)
        yield from _conv_norm(f"psp_modules.{i}.{{}}", 1, f"psp_modules_{i}", shape)
    pooled = width + len(spec.pool_scales) * channels
    yield from _conv_norm("bottleneck.{}", 0, "bottleneck", (channels, pooled, 3, 3))
    for i in range(levels - 1):
        shape = (channels, width, 1, 1)
        yield from _conv_norm(f"lateral_convs.{i}.{{}}", 0, f"lateral_convs_{i}", shape)
    for i in range(levels - 1):
        shape = (channels, channels, 3, 3)
        yield from _conv_norm(f"fpn_convs.{i}.{{}}", 0, f"fpn_convs_{i}", shape)
    shape = (channels, levels * channels, 3, 3)
    yield from _conv_norm("fpn_bottleneck.{}", 0, "fpn_bottleneck", shape)
    yield from _conv("conv_seg", "conv_seg", (spec.num_classes, channels, 1, 1))


def _neck_level(i: int, rescale: float, width: int) -> Iterator[Entry]:
    name, path, shape = f"neck.ops.{i}", f"neck_ops_{i}", (width, width, 2, 2)
    if rescale in (2, 4):
        yield from _conv(f"{name}.0", f"{path}/up_0", shape, "transposed_conv")
    if rescale == 4:
        yield from _batch_norm(f"{name}.1", f"{path}/norm", width)
        yield from _conv(f"{name}.3", f"{path}/up_1", shape, "transposed_conv")


def _conv_norm(name: str, first: int, path: str, shape: tuple[int, ...]) -> Iterator[Entry]:
    yield from _conv(name.format(first), f"{path}/conv", shape)
    yield from _batch_norm(name.format(first + 1), f"{path}/norm", shape[0])


def _conv(name: str, path: str, shape: tuple[int, ...], layout: str = "conv") -> Iterator[Entry]:
    yield Entry(f"{name}.weight", shape, f"params/decoder/{path}/kernel", layout)
    yield Entry(f"{name}.bias", shape[:1], f"params/decoder/{path}/bias")


def _batch_norm(name: str, path: str, width: int) -> Iterator[Entry]:
    leaves = {
        "weight": f"params/decoder/{path}/scale",
        "bias": f"params/decoder/{path}/bias",
        "running_mean": f"batch_stats/decoder/{path}/mean",
        "running_var": f"batch_stats/decoder/{path}/var",
    }
    for leaf, place in leaves.items():
        yield Entry(f"{name}.{leaf}", (width,), place)


# ------------------------------------------------------------------------------ import and export
def load_head(path: str | os.PathLike, spec: HeadSpec) -> tuple[dict, dict]:
    """(params, state) of a published head: a state dict, or a training checkpoint that holds one.

    Float32 numpy trees. The published code does not save its MoE counter; ours starts at 0, so pass
    `phase="sparse"` to evaluate a head trained past its warm-up. Raises ValueError with a report by
    published names when the file does not fit `spec`.
    """
    entries = head_entries(spec)
    tensors = _find_state(Path(path), {entry.name for entry in entries})
    _report(Path(path), entries, tensors).raise_if_bad()
    flat: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for entry in entries:
        value = entry.import_value(tensors[entry.name].read().astype(np.float32, copy=False))
        if entry.index is None:
            flat[entry.path] = value
        else:
            stacks.setdefault(entry.path, []).append(value)
    trees = unflatten(flat | {place: np.stack(values) for place, values in stacks.items()})
    state = {name: tree for name, tree in trees.items() if name != "params"}
    if spec.fuser == "moe":
        state["moe"] = {"fuser": {"count": np.zeros((), np.int32)}}
    return trees["params"], state


def export_head(path: str | os.PathLike, params: Mapping, state: Mapping, spec: HeadSpec) -> None:
    """Writes a head as the published code's state dict, `.pth` or `.safetensors`."""
    trees = {"params": params, "batch_stats": state.get("batch_stats", {})}
    flat = {place: np.asarray(value) for place, value in flatten(trees).items()}
    entries = head_entries(spec)
    if strange := sorted(flat.keys() ^ {entry.path for entry in entries}):
        raise ValueError(f"{path}: {strange[0]} is not in both the tree and the published head")
    tensors = {}
    for entry in entries:
        tensors[entry.name] = np.asarray(entry.export_value(flat[entry.path]), order="C")
        if entry.name.endswith(".running_var"):
            tensors[entry.name.replace("running_var", COUNTER)] = np.zeros((), np.int64)
    save = save_safetensors if Path(path).suffix == ".safetensors" else save_torch
    save(path, tensors)


def _find_state(path: Path, wanted: set[str]) -> dict[str, LazyTensor]:
    """The state dict of the head: the file itself, or the entry that holds most of its names."""
    if path.suffix == ".safetensors":
        return open_tensors(path)
    content = load_torch(path)
    choices = [tensors_of(content, str(path))]
    choices += [tensors_of(value, "") for value in content.values() if isinstance(value, Mapping)]
    state = max(choices, key=lambda tensors: len(wanted & tensors.keys()))
    return state or max(choices, key=len)


def _report(path: Path, entries: list[Entry], tensors: Mapping[str, LazyTensor]) -> Report:
    wanted = {entry.name: entry.shape for entry in entries}
    missing = tuple(name for name in wanted if name not in tensors)
    counters = tuple(name for name in tensors if name.endswith(f".{COUNTER}"))
    unused = tuple(name for name in tensors if name not in wanted and name not in counters)
    misshapen = tuple(
        (name, tensors[name].shape, shape)
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    )
    advice = ()
    if missing or unused or misshapen:
        advice = (
            "-> task, fuser, num_classes, scales, num_keys, projection_dim, num_experts, channels "
            "and pool_scales must be those the head was trained with",
        )
    loaded = len(wanted) - len(missing) - len(misshapen)
    return Report(str(path), missing, unused, misshapen, loaded, counters, advice)
