"""Public DiffusionSat and Stable Diffusion 2 folders <-> configs and parameter trees.

    parts = find_components("diffusionsat", resolution=256)
    config, params, report = load_unet(parts.unet, use_metadata=False)

Importing is by the tree: the tensors a config asks for are looked up under every name public files
use, and what is missing, left over or of another shape is reported by its name in the file.
Tensors are read one at a time, so a load needs little more memory than the model itself; with
shardings every process reads its own slices only.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from flax.serialization import msgpack_serialize

from common_jax.files import read_json, write_atomic, write_json
from common_jax.sharding import put_tree, read_slices
from common_jax.weights import (
    LazyTensor,
    Report,
    flatten,
    open_tensors,
    save_safetensors,
    unflatten,
)
from satdifuser_jax.components import Components, find_components, is_weightless
from satdifuser_jax.schedule import Schedule
from satdifuser_jax.text_encoder import TextConfig, text_encoder_shapes
from satdifuser_jax.torch_names import (
    METADATA,
    match_tensors,
    to_torch_layout,
    to_tree_layout,
    torch_names,
    torch_shape,
)
from satdifuser_jax.unet import UNetConfig, unet_shapes
from satdifuser_jax.vae import VAEConfig, vae_shapes


@dataclasses.dataclass(frozen=True)
class Kind:
    """One component of a pipeline: how its config is read, its tree shaped and its file called."""

    config: type
    shapes: Callable
    file: str
    flax_file: str
    pipeline_entry: tuple[str, str]


KINDS = {
    "unet": Kind(
        UNetConfig,
        unet_shapes,
        "diffusion_pytorch_model.safetensors",
        "diffusion_flax_model.msgpack",
        ("diffusers", "UNet2DConditionModel"),
    ),
    "vae": Kind(
        VAEConfig,
        vae_shapes,
        "diffusion_pytorch_model.safetensors",
        "diffusion_flax_model.msgpack",
        ("diffusers", "AutoencoderKL"),
    ),
    "text_encoder": Kind(
        TextConfig,
        text_encoder_shapes,
        "model.safetensors",
        "flax_model.msgpack",
        ("transformers", "CLIPTextModel"),
    ),
}


# -------------------------------------------------------------------------------------- importing
def load_unet(
    path: str | os.PathLike,
    config: UNetConfig | None = None,
    *,
    use_metadata: bool | None = None,
    dtype: type | None = np.float32,
    strict: bool = True,
    shardings: Mapping | None = None,
) -> tuple[UNetConfig, dict, Report]:
    """(config, params, report) of a UNet folder: config.json and weights in any known layout.

    use_metadata: True demands the metadata embeddings, False drops them (the published extractor
    does), None follows config.json. dtype: of the leaves; None keeps that of the file.
    strict: raise ValueError with the whole report unless every tensor matches; otherwise the tree
    lacks what the report names. shardings: a tree like that of the parameters, of
    `jax.sharding.Sharding`: leaves are then device arrays, else numpy.
    """
    tensors = open_tensors(path)
    config = config or read_config(path, "unet")
    found = _count_metadata(tensors)
    ignored = ()
    if use_metadata is False:
        config = dataclasses.replace(config, num_metadata=0)
        ignored = tuple(name for name in tensors if name.startswith(f"{METADATA}."))
    elif use_metadata and not config.num_metadata:
        config = dataclasses.replace(config, num_metadata=found or 7)
    return config, *_load("unet", path, config, tensors, ignored, dtype, strict, shardings)


def load_vae(
    path: str | os.PathLike,
    config: VAEConfig | None = None,
    *,
    dtype: type | None = np.float32,
    strict: bool = True,
    shardings: Mapping | None = None,
) -> tuple[VAEConfig, dict, Report]:
    """(config, params, report) of a VAE folder, with either naming of its attention."""
    config = config or read_config(path, "vae")
    return config, *_load("vae", path, config, open_tensors(path), (), dtype, strict, shardings)


def load_text_encoder(
    path: str | os.PathLike,
    config: TextConfig | None = None,
    *,
    dtype: type | None = np.float32,
    strict: bool = True,
    shardings: Mapping | None = None,
) -> tuple[TextConfig, dict, Report]:
    """(config, params, report) of a CLIP text folder; names with or without `text_model.`."""
    tensors = open_tensors(path)
    ignored = tuple(name for name in tensors if name.endswith("embeddings.position_ids"))
    config = config or read_config(path, "text_encoder")
    return config, *_load("text_encoder", path, config, tensors, ignored, dtype, strict, shardings)


def read_config(path: str | os.PathLike, kind: str):
    """The config of a component folder; ValueError names the file and the key not implemented."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; a {kind} folder needs its config.json")
    try:
        return KINDS[kind].config.from_dict(read_json(file))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error


@functools.lru_cache(maxsize=16)
def tree_shapes(kind: str, config) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the parameter tree of a component."""
    return {path: tuple(leaf.shape) for path, leaf in flatten(KINDS[kind].shapes(config)).items()}


def _load(kind, path, config, tensors, ignored, dtype, strict, shardings) -> tuple[dict, Report]:
    shapes = tree_shapes(kind, config)
    matched, report = match_tensors(kind, shapes, tensors, ignored, str(path))
    if strict:
        report.raise_if_bad()
    places = {} if shardings is None else flatten(shardings)
    if shardings is not None and (odd := sorted(matched.keys() - places.keys())):
        raise ValueError(f"shardings lack {odd[0]} of the {kind}; make them from its shapes")
    leaves = {p: _load_leaf(t, p, shapes[p], dtype, places.get(p)) for p, t in matched.items()}
    return unflatten(leaves), report


def _load_leaf(tensor: LazyTensor, path: str, shape: tuple[int, ...], dtype, sharding):
    def read(index=()):
        value = tensor.read(index)
        value = value.reshape(value.shape[: len(shape)])  # old linear maps are 1x1 convolutions
        return to_tree_layout(value if dtype is None else value.astype(dtype, copy=False), path)

    if sharding is None or sharding.is_fully_replicated:
        whole = read()
        return whole if sharding is None else put_tree(whole, sharding)
    return read_slices(shape, sharding, lambda index: read(torch_shape(path, index)))


def _count_metadata(tensors: Mapping[str, LazyTensor]) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith(f"{METADATA}.")})


# -------------------------------------------------------------------------------------- exporting
def export_component(
    folder: str | os.PathLike, kind: str, config, params: Mapping, *, old_vae_names: bool = False
) -> None:
    """Writes config.json and the weights of one component as the public releases name them.

    old_vae_names: `query, key, value, proj_attn` in the VAE, for readers before diffusers 0.17.
    """
    tensors = {}
    for path, value in flatten(params).items():
        name = torch_names(kind, path)[-1 if old_vae_names else 0]
        tensors[name] = to_torch_layout(np.asarray(value), path)
    folder = Path(folder)
    save_safetensors(folder / KINDS[kind].file, tensors)
    write_json(folder / "config.json", config.to_dict())


def export_pipeline(
    folder: str | os.PathLike,
    components: Mapping[str, tuple],
    schedule: Schedule,
    *,
    tokenizer: str | os.PathLike | None = None,
    old_vae_names: bool = False,
) -> None:
    """Writes a folder in the public layout: what `find_components` and torch diffusers read.

    components: {"unet" | "vae" | "text_encoder": (config, params)}, any of them; tokenizer: a
    folder to copy. model_index.json is written last, so a folder that has one is complete.
    """
    folder = Path(folder)
    if unknown := sorted(components.keys() - KINDS.keys()):
        raise ValueError(f"export of {unknown[0]!r}: known components are {sorted(KINDS)}")
    has_metadata = "unet" in components and components["unet"][0].use_metadata
    index = {
        "_class_name": "DiffusionSatPipeline" if has_metadata else "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    for kind, (config, params) in components.items():
        old = old_vae_names and kind == "vae"
        export_component(folder / kind, kind, config, params, old_vae_names=old)
        index[kind] = list(KINDS[kind].pipeline_entry)
    if has_metadata:
        index["unet"] = ["diffusionsat", "SatUNet"]
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    write_json(folder / "scheduler" / "scheduler_config.json", schedule.to_config())
    write_json(folder / "model_index.json", index)


def to_flax_diffusers(folder: str | os.PathLike, components: Mapping[str, tuple]) -> None:
    """Writes what the Flax classes of diffusers up to 0.39 and of transformers 4 read.

    The trees are ours; only the text tower goes into `text_model`, with its layers as a list.
    Raises ValueError for a UNet with metadata embeddings, which those classes do not have; warns
    where they would compute something else (their UNet norms in 32 groups whatever its config).
    """
    folder = Path(folder)
    for kind, (config, params) in components.items():
        if getattr(config, "use_metadata", False):
            raise ValueError(
                "the Flax UNet of diffusers has no metadata embeddings; "
                "load the checkpoint with use_metadata=False and export that"
            )
        if kind == "unet" and config.norm_num_groups != 32:
            warnings.warn(
                f"this UNet norms in {config.norm_num_groups} groups, the Flax UNet of diffusers "
                "always in 32: it will load there and give other numbers",
                stacklevel=2,
            )
        flat = {path: np.asarray(value) for path, value in flatten(params).items()}
        if kind == "text_encoder":
            flat = {f"text_model/{p.replace('layers_', 'layers/')}": v for p, v in flat.items()}
        write_atomic(folder / kind / KINDS[kind].flax_file, msgpack_serialize(unflatten(flat)))
        write_json(folder / kind / "config.json", config.to_dict())


def convert_pipeline(
    root: str | os.PathLike, out: str | os.PathLike, to: str = "public", resolution=None
) -> str:
    """Rewrites a pipeline folder: `public` (.safetensors, present names) or `flax-diffusers`.

    Dtypes stay those of the files. The Flax classes have no metadata embeddings, so those are
    dropped there. Returns what was read and written, for people.
    """
    if to not in ("public", "flax-diffusers"):
        raise ValueError(f"to={to!r}: known are 'public' and 'flax-diffusers'")
    parts = find_components(root, resolution)
    use_metadata = None if to == "public" else False
    loaded = {"unet": load_unet(parts.unet, use_metadata=use_metadata, dtype=None)}
    if parts.vae and not is_weightless(parts.vae):
        loaded["vae"] = load_vae(parts.vae, dtype=None)
    if parts.text_encoder:
        loaded["text_encoder"] = load_text_encoder(parts.text_encoder, dtype=None)
    components = {kind: (config, params) for kind, (config, params, _) in loaded.items()}
    if to == "public":
        export_pipeline(out, components, parts.schedule, tokenizer=parts.tokenizer)
        for name in ("vae", "prompts"):  # a codec without weights, stored prompt embeddings
            if name not in components and (parts.root / name).is_dir():
                shutil.copytree(parts.root / name, Path(out) / name, dirs_exist_ok=True)
    else:
        to_flax_diffusers(out, components)
    return "\n".join([*(str(report) for _, _, report in loaded.values()), f"written to {out}"])


__all__ = [
    "Components",
    "convert_pipeline",
    "export_component",
    "export_pipeline",
    "find_components",
    "is_weightless",
    "load_text_encoder",
    "load_unet",
    "load_vae",
    "match_tensors",
    "read_config",
    "to_flax_diffusers",
    "tree_shapes",
]
