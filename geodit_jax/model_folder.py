"""A folder of weights as places and lazy tensors, and how they fit a model. Nothing is read here.

The text core, the tower and the projector may lie in one folder or in three places: LLaDA, SigLIP 2
and a projector file of stage I. Which tensor is what, and how large the model is, is told by the
headers of the files; an index beside them is never read.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from common_jax.files import read_json
from common_jax.weights import LazyTensor, Report, flatten, open_tensors
from geodit_jax.config import GeoDiTConfig, TokenIds
from geodit_jax.model import init_model, model_shapes
from geodit_jax.published_config import OWN, read_config
from geodit_jax.tokenizer import Tokenizer
from geodit_jax.torch_names import (
    Place,
    find_layout,
    find_place,
    is_ignorable,
    is_pooling_head,
    list_places,
    torch_name,
    torch_shape,
    torch_view,
)

PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """What files hold. `raw`: config.json; `vision`: that of the tower; `names`: as in the file."""

    folder: Path
    raw: Mapping
    vision: Mapping
    tensors: Mapping[Place, LazyTensor]
    names: Mapping[Place, str]
    unused: tuple[str, ...]
    ignored: tuple[str, ...]
    layout: str
    has_head: bool

    def has(self, part: str) -> bool:
        return any(place.path.startswith(f"{part}/") for place in self.tensors)

    def find_tokens(self) -> TokenIds | None:
        """Special ids: of tokenizer.json, else as we wrote them into config.json, else of LLaDA
        where the vocabulary is as large; None when nothing tells them.

        Raises ValueError when tokenizer.json and config.json differ.
        """
        own = self.raw.get(OWN, {}).get("tokens")
        own = TokenIds(**own) if own else None
        if (self.folder / "tokenizer.json").is_file():
            return Tokenizer.load(self.folder, own).ids
        table = self.tensors.get(Place("core/embed_tokens/embedding"))
        if own is None and table is not None and table.shape[0] >= TokenIds.size:
            return TokenIds()
        return own

    def read_config(self, tokens: TokenIds | None = None) -> GeoDiTConfig:
        """The config of the model. tokens: its special ids, where no file tells them.

        Raises ValueError where config.json, tokenizer and tensors do not go together.
        """
        if not self.has("tower") and (self.has("projector") or self.has("newline")):
            raise ValueError(
                f"{self.folder}: has a projector and no vision tower; give tower_folder=, a "
                "SigLIP 2 folder"
            )
        tokens = tokens or self.find_tokens()
        if tokens is None:
            raise ValueError(
                f"{self.folder}: nothing tells the special ids of this vocabulary; put its "
                "tokenizer.json beside the weights, or give tokens=TokenIds(...)"
            )
        shapes = {place: tensor.shape for place, tensor in self.tensors.items()}
        try:
            return read_config(self.raw, shapes, tokens, vision=self.vision, has_head=self.has_head)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the parameter tree and its tensors, one for every layer of a stack."""

    path: str
    shape: tuple[int, ...]
    places: tuple[Place, ...]
    tensors: tuple[LazyTensor, ...]


# ---------------------------------------------------------------------------------------- opening
def open_folder(
    folder: str | os.PathLike,
    tower_folder: str | os.PathLike | None = None,
    projector_file: str | os.PathLike | None = None,
) -> ModelFolder:
    """Opens a folder (or one file) of LLaDA, LLaDA-V or GeoDiT weights.

    tower_folder: a folder or file with the vision tower, alone or in a model; it replaces one in
    `folder`. projector_file: likewise for the projector (and newline); `mm_projector.safetensors`
    or `.bin` in `folder` is found by itself when the weights hold no projector.
    Raises FileNotFoundError or ValueError naming the file.
    """
    folder = Path(folder)
    tensors, names, others = _place_tensors(folder)
    if projector_file is None and not any(p.path.startswith("projector/") for p in tensors):
        files = [folder / name for name in PROJECTOR_FILES]
        projector_file = next((file for file in files if file.is_file()), None)
    dropped: list[str] = []
    for source, parts in ((projector_file, ("projector", "newline")), (tower_folder, ("tower",))):
        if source is None:
            continue
        new, new_names, new_others = _place_tensors(Path(source))
        taken = {place for place in new if place.path.split("/")[0] in parts}
        if not taken:
            raise ValueError(f"{source}: has no tensor of the {parts[0]}")
        held = {place.path.split("/")[0] for place in taken}
        dropped += [names[p] for p in tensors if p.path.split("/")[0] in held]
        tensors = {p: t for p, t in tensors.items() if p.path.split("/")[0] not in held}
        tensors |= {place: new[place] for place in taken}
        names |= {place: new_names[place] for place in taken}
        dropped += [new_names[place] for place in new if place not in taken]
        if parts == ("tower",):
            others = [name for name in others if not is_pooling_head(name)] + new_others
        else:
            others += new_others
    raw = _read_raw(folder)
    return ModelFolder(
        folder=folder if folder.is_dir() else folder.parent,
        raw=raw,
        vision=_find_vision(raw if tower_folder is None else _read_raw(Path(tower_folder))),
        tensors=tensors,
        names={place: names[place] for place in tensors},
        unused=tuple(name for name in others if not is_ignorable(name)),
        ignored=tuple([*dropped, *(name for name in others if is_ignorable(name))]),
        layout=find_layout(names.values()),
        has_head=any(is_pooling_head(name) for name in others),
    )


def _place_tensors(path: Path) -> tuple[dict[Place, LazyTensor], dict[Place, str], list[str]]:
    """(tensors by place, names by place, names without a place) of a folder or file."""
    tensors, names, others = {}, {}, []
    for name, tensor in open_tensors(path).items():
        place = find_place(name)
        if place is None:
            others.append(name)
            continue
        if place in names:
            raise ValueError(f"{path}: {names[place]} and {name} are the same tensor of a model")
        tensors[place], names[place] = tensor, name
    return tensors, names, others


def _read_raw(path: Path) -> dict:
    file = (path if path.is_dir() else path.parent) / "config.json"
    raw = read_json(file) if file.is_file() else {}
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: holds a {type(raw).__name__}, wanted an object")
    return raw


def _find_vision(raw: Mapping) -> Mapping:
    """The tower's config: nested in that of a model or of a full SigLIP, or the whole file."""
    if raw.get("vision_config"):
        return raw["vision_config"]
    return raw if "patch_size" in raw else {}


# --------------------------------------------------------------------------------------- matching
def match_folder(
    source: ModelFolder, config: GeoDiTConfig, seed: int | None = None
) -> tuple[list[Leaf], Report]:
    """(leaves of the parameter tree with their tensors, report).

    seed: a projector or newline that no file holds is drawn from it, as for training from scratch.
    Leaves that miss a tensor are only in the report. Tower layers that do not run are ignored.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(model_shapes(config)).items()}
    tensors, advice = dict(source.tensors), []
    for part in ("projector", "newline"):
        if config.tower is None or source.has(part):
            continue
        if seed is not None:
            tensors |= _draw(config, seed, part, _main_dtype(source))
            advice.append(f"-> no {part} in the files: drawn from seed {seed}")
        elif part == "newline" and "unpad" not in config.merge:
            zeros = np.zeros(config.text.width, _main_dtype(source))
            tensors[Place("newline/embedding")] = _from_array(zeros, "newline/embedding")
            advice.append(f"-> no newline vector, and merge={config.merge} reads none: zeros")
        else:
            advice.append(f"-> no {part} in the files: give projector_file=, or seed= to draw one")
    leaves, missing, misshapen, used = [], {}, [], set()
    for path, shape in shapes.items():
        places, wanted = list_places(path, shape[0]), torch_shape(path, shape)
        used.update(places)
        for place in places:
            name = source.names.get(place, torch_name(place, source.layout))
            if place not in tensors:
                missing[name] = wanted
            elif tensors[place].shape != wanted:
                misshapen.append((name, tensors[place].shape, wanted))
        if all(place in tensors and tensors[place].shape == wanted for place in places):
            leaves.append(Leaf(path, shape, tuple(places), tuple(tensors[p] for p in places)))
    rest = [place for place in source.tensors if place not in used]
    report = Report(
        str(source.folder),
        missing=tuple(missing),
        unused=(*source.unused, *(source.names[p] for p in rest if not _is_behind(p, config))),
        misshapen=tuple(misshapen),
        loaded=sum(len(leaf.tensors) for leaf in leaves),
        ignored=(*source.ignored, *(source.names[p] for p in rest if _is_behind(p, config))),
        advice=tuple(advice),
        shapes=missing,
    )
    return leaves, dataclasses.replace(report, advice=(*advice, *_advise(report)))


def _is_behind(place: Place, config: GeoDiTConfig) -> bool:
    """A layer of the tower behind those that run."""
    return place.path.startswith("tower/layers/") and config.tower is not None


def _advise(report: Report) -> Iterable[str]:
    if report.misshapen:
        yield "-> config.json and weights do not belong together, or a file is damaged"
    parts = ("mm_projector", "image_newline")
    if any(not any(part in name for part in parts) for name in report.missing):
        yield "-> the checkpoint is incomplete or of another architecture; download it again"


def _main_dtype(source: ModelFolder) -> np.dtype:
    return next(t.dtype for p, t in source.tensors.items() if p.path.startswith("core/"))


def _draw(config: GeoDiTConfig, seed: int, part: str, dtype) -> dict[Place, LazyTensor]:
    """Initial values of one part. They depend on seed, path and shape alone, so that a model with
    a core of one short layer has the same ones."""
    small = dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, vocab_rows=1, layers=1, mlp=1),
        tower=dataclasses.replace(config.tower, layers=1, mlp=1),
    )
    drawn = flatten({part: init_model(small, seed)[part]})
    return {Place(path): _from_array(value.astype(dtype), path) for path, value in drawn.items()}


def _from_array(value: np.ndarray, path: str) -> LazyTensor:
    laid = torch_view(value, path)
    return LazyTensor(laid.shape, laid.dtype, path, lambda index: np.array(laid[index]))


__all__ = ["Leaf", "ModelFolder", "match_folder", "open_folder"]
