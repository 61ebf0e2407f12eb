"""Weights on disk: files and folders of lazy tensors, trees of arrays, and reports.

Nothing is read before `.read()`, so a model larger than half of the memory can still be loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from common_jax.files import UnsafePickleError, atomic_path, write_json
from common_jax.torch_files import LazyTensor, load_torch, save_torch, tensors_of

TORCH_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


# ------------------------------------------------------------------------------------------ trees
def flatten(tree: Mapping, prefix: str = "") -> dict[str, object]:
    """{"a/b/c": leaf} of a tree of nested mappings, in the tree's own order."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def unflatten(flat: Mapping[str, object]) -> dict:
    """The nested dict of {"a/b/c": leaf}."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def tree_sha256(params: Mapping, read: Callable = np.asarray) -> str:
    """Hex digest over paths, shapes, dtypes and bytes of a tree; independent of the dict order.

    read: (leaf) -> numpy; called in the order of the paths, for a leaf at a time.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(params).items()):
        leaf = read(leaf)
        digest.update(f"{path} {leaf.dtype.name} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------- report
@dataclasses.dataclass(frozen=True)
class Report:
    """How the tensors of a file match a model, by the names of the file.

    `missing`: wanted and absent; `unused`: present and not wanted; `misshapen`: (name, found shape,
    wanted shape); `advice`: lines that say what to do; `shapes`: wanted shapes of missing tensors,
    where they are known.
    """

    source: str
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    misshapen: tuple[tuple[str, tuple, tuple], ...] = ()
    loaded: int = 0
    ignored: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not (self.missing or self.unused or self.misshapen)

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.loaded} tensors loaded, {len(self.missing)} missing, "
            f"{len(self.unused)} unused, {len(self.misshapen)} misshapen, "
            f"{len(self.ignored)} ignored"
        ]
        shapes = [f"{name}: found {a}, wanted {b}" for name, a, b in self.misshapen]
        wanted = {name: f"{name}, wanted {shape}" for name, shape in self.shapes.items()}
        missing = [wanted.get(name, name) for name in self.missing]
        groups = {"misshapen": shapes, "missing": missing, "unused": self.unused}
        for title, names in groups.items():
            lines += [f"  {title}: {name}" for name in names[:20]]
            if len(names) > 20:
                lines.append(f"  {title}: ... and {len(names) - 20} more")
        return "\n".join(lines + [f"  {line}" for line in self.advice])

    def raise_if_bad(self) -> Report:
        """Returns itself, or raises ValueError with the whole report."""
        if not self.ok:
            raise ValueError(str(self))
        return self


# ---------------------------------------------------------------------------------------- opening
def open_tensors(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """Opens a `.safetensors`, `.bin` or `.pth` file, or the folder that holds one, maybe in shards.

    In a folder safetensors win over torch files; a sharded file is the union of its shards, read
    from their own headers, and a lacking shard is an error. Raises FileNotFoundError or ValueError
    naming the file.
    """
    path = Path(path)
    if path.is_dir():
        tensors: dict[str, LazyTensor] = {}
        for file in find_weight_files(path):
            part = open_tensors(file)
            if twice := sorted(tensors.keys() & part.keys()):
                raise ValueError(f"{file}: tensor {twice[0]} is also in another shard of {path}")
            tensors |= part
        return tensors
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return tensors_of(load_torch(path), str(path))
    raise ValueError(f"{path}: unknown kind of weight file; known: .safetensors, .bin, .pth")


def find_weight_files(folder: str | os.PathLike) -> list[Path]:
    """The weight file of a model folder, or all shards of it."""
    folder = Path(folder)
    for suffix in (".safetensors", ".bin"):
        groups: dict[str, list[Path]] = {}
        for file in sorted(folder.glob(f"*{suffix}")):
            groups.setdefault(_SHARD.sub("", file.stem), []).append(file)
        # Side files such as `.fp16` or `.non_ema` are taken only where they are alone.
        plain = {name: files for name, files in groups.items() if "." not in name} or groups
        for name in ("diffusion_pytorch_model", "model", "pytorch_model"):
            if name in plain:
                plain = {name: plain[name]}
        if len(plain) > 1:
            raise ValueError(
                f"{folder}: several weight files ({', '.join(sorted(plain))}); keep one of them"
            )
        for files in plain.values():
            return _require_all_shards(files)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    raise FileNotFoundError(f"{folder}: no .safetensors and no .bin file in this folder")


def _require_all_shards(files: list[Path]) -> list[Path]:
    shards = {int(m[1]): int(m[2]) for m in (_SHARD.search(file.stem) for file in files) if m}
    lacking = sorted(set(range(1, max(shards.values(), default=0) + 1)) - shards.keys())
    if lacking:
        raise FileNotFoundError(
            f"{files[0].parent}: shards {lacking} of {max(shards.values())} are lacking; "
            "download them again"
        )
    return files


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    try:
        with safe_open(path, framework="numpy"):
            pass  # checks the header, every offset and the length of the file
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is truncated or damaged ({error}); "
            "download it again"
        ) from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: _safetensor(path, name, header[name], 8 + length) for name in sorted(header)}


def _safetensor(path: Path, name: str, entry: Mapping, start: int) -> LazyTensor:
    """Reads by ordinary file access: pages of a memory map would count as ours."""
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        raise ValueError(f"{path}: tensor {name} has unsupported dtype {entry['dtype']}")
    shape, dtype = tuple(entry["shape"]), np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]])
    offset = start + entry["data_offsets"][0]

    def load(index) -> np.ndarray:
        if index == ():
            return np.fromfile(path, dtype, math.prod(shape), offset=offset).reshape(shape)
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(shape[0])
            row = math.prod(shape[1:])
            values = np.fromfile(
                path,
                dtype,
                max(stop - start, 0) * row,
                offset=offset + start * row * dtype.itemsize,
            )
            return values.reshape(-1, *shape[1:])
        return np.array(np.memmap(path, dtype, "r", offset, shape)[index])

    return LazyTensor(shape, dtype, f"{path}:{name}", load)


# ---------------------------------------------------------------------------------------- writing
def save_safetensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes arrays under their names, atomically, in sorted order."""
    arrays = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    with atomic_path(path) as partial:
        save_file(arrays, partial, metadata={"format": "pt"})


def copy_safetensors(path: str | os.PathLike, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes lazy tensors under their names, atomically, a slab at a time: memory stays small."""
    codes = {np.dtype(dtype): code for code, dtype in _SAFETENSORS_DTYPES.items()}
    header: dict = {"__metadata__": {"format": "pt"}}
    # Widest dtype first keeps every tensor aligned.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        if tensor.dtype not in codes:
            raise ValueError(f"tensor {name}: safetensors hold no {tensor.dtype}")
        end += tensor.nbytes
        shape, code = list(tensor.shape), codes[tensor.dtype]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as partial, open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for _, slab in tensors[name].slabs():
                file.write(np.ascontiguousarray(slab).reshape(-1).view(np.uint8))


def copy_shards(
    folder: str | os.PathLike, tensors: Mapping[str, LazyTensor], shard_bytes: int
) -> list[Path]:
    """Writes `model.safetensors`, or shards of at most `shard_bytes` with their index; the files.

    Tensors keep their order; one that is larger than a shard gets a shard of its own.
    """
    folder, shards, size = Path(folder), [], math.inf
    for name, tensor in tensors.items():
        if size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for file, shard in zip(names, shards, strict=True):
        copy_safetensors(folder / file, shard)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: file for file, shard in zip(names, shards) for name in shard},
        }
        write_json(folder / "model.safetensors.index.json", index)
    return [folder / name for name in names]


__all__ = [
    "LazyTensor",
    "Report",
    "UnsafePickleError",
    "copy_safetensors",
    "copy_shards",
    "find_weight_files",
    "flatten",
    "load_torch",
    "open_tensors",
    "save_safetensors",
    "save_torch",
    "tensors_of",
    "tree_sha256",
    "unflatten",
]
