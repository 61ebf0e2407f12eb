"""Checkpoints of LLaDA, LLaDA-V, GeoDiT and SigLIP 2 <-> our parameter tree.

    params, config, report = load_model("GeoDiT")
    export_model("mine", params, config, tokenizer_folder="GeoDiT")

Loading streams: a tensor is read in slabs straight into its place in the stacked arrays, and with
shardings every process reads its own slices only. So little more than the model itself is in
memory. Exports are whole or not there: they are written beside their folder and renamed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from common_jax.files import read_json, write_json
from common_jax.sharding import read_slices
from common_jax.weights import LazyTensor, Report, copy_shards, flatten, unflatten
from geodit_jax.config import GeoDiTConfig, TokenIds
from geodit_jax.export_config import to_llada, to_published
from geodit_jax.model_folder import Leaf, ModelFolder, match_folder, open_folder
from geodit_jax.tokenizer import Tokenizer
from geodit_jax.torch_names import (
    LAYOUTS,
    Place,
    is_stacked,
    list_places,
    torch_axes,
    torch_name,
    torch_shape,
    torch_view,
)

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 3_000_000_000
SLAB_ROWS = 128
"""Rows of a torch tensor that are turned at once: a slab and its lines in the target fit the cache.
With 4 times as many, loading is 2 to 4 times slower."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_EXPORTED = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|config\.json|" + re.escape(INDEX))


# ---------------------------------------------------------------------------------------- loading
def load_model(
    folder: str | os.PathLike,
    *,
    tower_folder: str | os.PathLike | None = None,
    projector_file: str | os.PathLike | None = None,
    dtype=None,
    shardings: Mapping | None = None,
    tokens: TokenIds | None = None,
    seed: int | None = None,
) -> tuple[dict, GeoDiTConfig, Report]:
    """(params, config, report) of a folder in any public layout.

    tower_folder, projector_file: where the folder lacks those parts; `open_folder` says more.
    dtype: of all leaves; None keeps that of the files. shardings: a tree of `jax.sharding.Sharding`
    as `tree_shardings(model_shapes(config), ...)` makes it (`read_folder_config` gives the config
    before): leaves are then device arrays, else numpy. tokens: special ids, where no file tells
    them. seed: draws a projector or newline that no file holds.
    Raises ValueError with the whole report when a tensor is missing or misshapen. Tensors that
    belong nowhere are in `report.unused`.
    """
    source = open_folder(folder, tower_folder, projector_file)
    config = source.read_config(tokens)
    leaves, report = match_folder(source, config, seed)
    _require_all(report)
    places = {} if shardings is None else flatten(shardings)
    if shardings is not None and places.keys() != {leaf.path for leaf in leaves}:
        odd = sorted(places.keys() ^ {leaf.path for leaf in leaves})
        raise ValueError(f"shardings and the model differ in {odd[0]}; make them from its shapes")
    params = {leaf.path: _load_leaf(leaf, dtype, places.get(leaf.path)) for leaf in leaves}
    return unflatten(params), config, report


def read_folder_config(
    folder: str | os.PathLike,
    *,
    tower_folder: str | os.PathLike | None = None,
    tokens: TokenIds | None = None,
) -> GeoDiTConfig:
    """The config that `load_model` would return; no value is read."""
    return open_folder(folder, tower_folder).read_config(tokens)


def _require_all(report: Report) -> None:
    if report.missing or report.misshapen:
        raise ValueError(str(report))


def _load_leaf(leaf: Leaf, dtype, sharding):
    found = functools.reduce(np.promote_types, (tensor.dtype for tensor in leaf.tensors))
    dtype = np.dtype(found if dtype is None else dtype)
    if sharding is None:
        return _read_leaf(leaf, tuple(slice(0, n) for n in leaf.shape), dtype)
    return read_slices(leaf.shape, sharding, lambda index: _read_leaf(leaf, index, dtype))


def _read_leaf(leaf: Leaf, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """The part of a leaf at `index` (bounds known, steps of one), in our layout."""
    out = _empty(tuple(s.stop - s.start for s in index), dtype)
    if not is_stacked(leaf.path):
        _read_tensor(leaf.path, leaf.tensors[0], index, out)
        return out
    for part, tensor in zip(out, leaf.tensors[index[0]], strict=True):
        _read_tensor(leaf.path, tensor, index[1:], part)
    return out


def _read_tensor(path: str, tensor: LazyTensor, index: tuple[slice, ...], out: np.ndarray) -> None:
    """Fills `out` with a tensor's part at `index` (our axes) in slabs along its first torch axis.

    Reading rows only is plain file access; any other part goes through a memory map.
    """
    index = tuple(index[axis] for axis in torch_axes(path, len(index)))
    rows, rest = index[0], index[1:]
    whole = all(s == slice(0, n) for s, n in zip(rest, tensor.shape[1:], strict=True))
    out = torch_view(_as_bits(out, tensor.dtype), path)
    for start in range(rows.start, rows.stop, SLAB_ROWS):
        slab = slice(start, min(start + SLAB_ROWS, rows.stop))
        value = tensor.read(slab if whole else (slab, *rest))
        target = out[slab.start - rows.start : slab.stop - rows.start]
        if target.dtype.kind == "u" and target.dtype != value.dtype:
            value = value.view(target.dtype)
        elif value.dtype != target.dtype:
            value = value.astype(target.dtype)
        target[...] = value


def _as_bits(out: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values that keep their dtype are moved as integers: numpy copies bfloat16 one by one."""
    return out.view(f"u{out.itemsize}") if out.dtype == dtype and out.itemsize in (2, 4) else out


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory at a multiple of 64 bytes, which XLA on a CPU takes over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


# -------------------------------------------------------------------------------------- exporting
def export_model(
    folder: str | os.PathLike,
    params: Mapping,
    config: GeoDiTConfig,
    tokenizer_folder: str | os.PathLike | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    dtype=None,
) -> None:
    """Writes weights with the names of LLaDA-V, their index, config.json and the tokenizer's files.

    `load_model` of the folder gives the same parameters bit for bit. dtype: of the files; None
    keeps that of the parameters. An earlier export at `folder` is replaced when the new one is
    complete. Raises ValueError for a tree that is not of `config` or a tokenizer with other ids,
    FileExistsError for a folder with files that no export writes.
    """
    if tokenizer_folder is not None:
        Tokenizer.load(tokenizer_folder, config.tokens)
    flat = flatten(params)
    leaves, report = match_folder(_as_source(flat, dtype), config)
    report.raise_if_bad()
    if report.ignored:
        raise ValueError(f"params hold more layers than config: {', '.join(report.ignored[:3])}")
    _write_folder(folder, leaves, to_published(config), "llava", shard_bytes, tokenizer_folder)


def convert_folder(weights: str | os.PathLike, out: str | os.PathLike, to: str = "llava") -> str:
    """Rewrites a folder with the names of LLaDA-V (`llava`) or, the text core alone, LLaDA's.

    Values and dtypes stay as they are. Returns what was read and written, for people.
    """
    if to not in LAYOUTS:
        raise ValueError(f"to={to!r}: use one of {LAYOUTS}")
    source = open_folder(weights)
    config = source.read_config()
    leaves, report = match_folder(source, config)
    _require_all(report)
    left = sum(len(leaf.tensors) for leaf in leaves)
    if to == "llada":
        leaves = [leaf for leaf in leaves if leaf.path.startswith("core/")]
    raw = to_llada(config) if to == "llada" else to_published(config)
    has_tokenizer = (source.folder / "tokenizer.json").is_file()
    _write_folder(out, leaves, raw, to, SHARD_BYTES, source.folder if has_tokenizer else None)
    written = sum(len(leaf.tensors) for leaf in leaves)
    lines = [str(report), f"{written} tensors written to {out} in the layout {to}"]
    if left > written:
        lines.append(f"{left - written} tensors of tower and projector left out: {to} has none")
    return "\n".join(lines)


def _as_source(flat: Mapping[str, object], dtype) -> ModelFolder:
    """The parameters as if they lay in files."""

    @functools.lru_cache(1)  # a tensor is written in many slabs
    def fetch(place: Place) -> np.ndarray:
        value = torch_view(_to_host(flat[place.path], place), place.path)
        return value if dtype is None else value.astype(dtype)

    tensors = {}
    for path, leaf in flat.items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(f"{path} is spread over several hosts; gather it before exporting")
        shape = torch_shape(path, leaf.shape)
        for place in list_places(path, leaf.shape[0]):
            tensors[place] = LazyTensor(
                shape, np.dtype(dtype or leaf.dtype), path, _reader(fetch, place)
            )
    names = {place: torch_name(place) for place in tensors}
    return ModelFolder(Path("params"), {}, {}, tensors, names, (), (), "llava", False)


def _reader(fetch: Callable[[Place], np.ndarray], place: Place) -> Callable:
    def read(index) -> np.ndarray:
        part = fetch(place)[index]
        # First as it lies, then turned: both steps stay in the cache.
        turned = np.ascontiguousarray(np.array(_as_bits(part, part.dtype)))
        return turned.view(part.dtype)

    return read


def _to_host(leaf, place: Place) -> np.ndarray:
    """One layer of a leaf. A stack on a device comes over layer by layer."""
    if place.layer is None or isinstance(leaf, np.ndarray):
        value = np.asarray(leaf)
        return value if place.layer is None else value[place.layer]
    return np.asarray(jax.lax.dynamic_index_in_dim(leaf, place.layer, keepdims=False))


def _write_folder(folder, leaves, raw, layout, shard_bytes, tokenizer_folder) -> None:
    placed = [pair for leaf in leaves for pair in zip(leaf.places, leaf.tensors, strict=True)]
    parts = list(dict.fromkeys(leaf.path.split("/")[0] for leaf in leaves))
    # Layer by layer, so that a reader of one part opens few shards.
    placed.sort(key=lambda pair: (parts.index(pair[0].path.split("/")[0]), pair[0].layer or 0))
    tensors = {torch_name(place, layout): tensor for place, tensor in placed}
    raw = raw | {"torch_dtype": placed[0][1].dtype.name}
    with _new_folder(Path(folder).absolute()) as partial:
        copy_shards(partial, tensors, shard_bytes)
        for name in TOKENIZER_FILES:
            if tokenizer_folder is not None and (Path(tokenizer_folder) / name).is_file():
                shutil.copyfile(Path(tokenizer_folder) / name, partial / name)
        write_json(partial / "config.json", raw)


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder beside `folder` that takes its place when the body succeeds."""
    present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    strange = [n for n in present if not _EXPORTED.fullmatch(n) and n not in TOKENIZER_FILES]
    if strange:
        raise FileExistsError(
            f"{folder} holds {strange[0]}, which no export writes; choose another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial")
    partial, old = Path(made), Path(f"{made}.old")
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's 0700 would lock colleagues out
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ------------------------------------------------------------------------------------- describing
VERDICTS = {True: "usable", False: "NOT usable, see above"}


def describe_folder(folder: str | os.PathLike) -> tuple[str, bool]:
    """(what a folder holds, for people; whether it can be used). No value is read."""
    source = open_folder(folder)
    release = {"llava": "LLaDA-V", "llada": "LLaDA"}[source.layout]
    lines = [f"{source.folder}: names of {release}", *_table(source), *_describe_index(source)]
    try:
        tokens = source.find_tokens()
        has_tokenizer = (source.folder / "tokenizer.json").is_file()
        lines.append(f"tokenizer: {'tokenizer.json' if has_tokenizer else 'none'}, {tokens}")
        config = source.read_config()
        lines += [f"text: {config.text}", f"tower: {config.tower}"]
        lines.append(f"pictures: {config.image_mode}, {config.merge}, max_tiles={config.max_tiles}")
        _, report = match_folder(source, config)
    except ValueError as error:
        return "\n".join([*lines, str(error), VERDICTS[False]]), False
    ok = not (report.missing or report.misshapen)
    return "\n".join([*lines, str(report), VERDICTS[ok]]), ok


def _table(source: ModelFolder) -> list[str]:
    lines = [f"{'part':<10} {'tensors':>7} {'parameters':>14}  dtypes"]
    for part in ("core", "newline", "projector", "tower", "all"):
        start = "" if part == "all" else f"{part}/"
        found = [t for place, t in source.tensors.items() if place.path.startswith(start)]
        size = sum(int(np.prod(tensor.shape)) for tensor in found)
        dtypes = "+".join(sorted({tensor.dtype.name for tensor in found})) or "absent"
        lines.append(f"{part:<10} {len(found):>7} {size:>14,}  {dtypes}")
    return lines


def _describe_index(source: ModelFolder) -> list[str]:
    file = source.folder / INDEX
    if not file.is_file():
        return []
    claimed = read_json(file).get("weight_map", {})
    held = {name: source.tensors[p].source for p, name in source.names.items()}
    wrong = [n for n, where in held.items() if f"/{claimed.get(n)}:" not in where]
    return [f"{INDEX}: wrong about {len(wrong)} of {len(held)} tensors; it is not used"]


__all__ = [
    "convert_folder",
    "describe_folder",
    "export_model",
    "load_model",
    "read_folder_config",
]
