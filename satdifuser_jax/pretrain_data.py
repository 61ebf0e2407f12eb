"""Examples of pretraining: pictures with captions and metadata, or what was precomputed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from common_jax.files import sha256_json
from common_jax.sharding import make_mesh, put_batch, replicated
from common_jax.weights import tree_sha256
from data.catalog import open_source
from data.crops import QuarterTurns, RandomCrop
from data.memory import InMemory
from data.satellite import open_satellite
from data.scene_text import captions
from data.wording import DrawCaption
from satdifuser_jax.cache import Subset, spread_rows
from satdifuser_jax.cache_spec import CacheSpec, Field
from satdifuser_jax.extract import Backbone, encode_moments
from satdifuser_jax.feature_source import CachedExamples, building_size, open_or_build
from satdifuser_jax.preprocess import PIXEL_TRANSFORM, to_pixels
from satdifuser_jax.prompts import PromptTokenizer
from satdifuser_jax.text_encoder import TextTower, embed_ids
from satdifuser_jax.vae import SpaceToDepth

CACHES = ("none", "latents", "all")
SHARD_ROWS = 1024  # of a cache: a row is 33 KB at 256 pixels, and sets have hundreds of thousands


class ToTrainInput:
    """(example, rng) -> pixels [S,S,3] in [-1,1]; `metadata` [F] and `ids` [L] where there is use.

    A picture without metadata counts as one whose fields were all dropped, a picture without a
    caption as one with the empty prompt.
    """

    def __init__(self, side: int, num_metadata: int, tokenize: PromptTokenizer | None = None):
        self.side, self.num_metadata, self.tokenize = side, num_metadata, tokenize

    def __call__(self, example, rng):
        out = {k: example[k] for k in ("mask", "id") if k in example}
        out["pixels"] = to_pixels(example["image"], self.side, fit="crop")
        if self.num_metadata:
            found = example.get("metadata")
            empty = np.zeros(self.num_metadata, np.float32)
            out["metadata"] = empty if found is None else np.asarray(found, np.float32)
        if self.tokenize:
            out["ids"] = self.tokenize([example.get("caption") or ""])[0]
        return out


class CaptionedScenes:
    """Procedural scenes, each with one of its true captions; else as the source they are of."""

    def __init__(self, source):
        self.source = source
        self.fingerprint = f"{source.fingerprint}, captions"

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "source":  # pickle looks before __init__ ran
            raise AttributeError(name)
        return getattr(self.source, name)

    def __getitem__(self, i: int) -> dict:
        scene = self.source.scene(int(i))
        texts = captions(scene)
        return self.source.example(int(i), scene) | {"caption": texts[int(i) % len(texts)]}


def open_pictures(data, split: str, has_text: bool):
    """The source that `config.data` names: scenes, satellite (captions, metadata), or images.

    Of the pictures held out, data.val_size spread over all of them are looked at.
    """
    source = _open_all(data, split, has_text)
    is_long = split == "val" and 0 < data.val_size < len(source)
    return Spread(source, data.val_size) if is_long else source


class Spread(Subset):
    """`count` rows, evenly over a source; else as the source they are of."""

    def __init__(self, source, count: int):
        super().__init__(source, spread_rows(len(source), count))
        self.fingerprint = f"{source.fingerprint}, {count} spread"

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "source":  # pickle looks before __init__ ran
            raise AttributeError(name)
        return getattr(self.source, name)


def _open_all(data, split: str, has_text: bool):
    if data.name in ("scenes", "scenes_seg"):
        size = data.val_size if split == "val" else data.size
        source = open_source("scenes", split, side=data.side, size=size)
        return CaptionedScenes(source) if has_text else source
    exclude = json.loads(Path(data.exclude).read_text()) if data.exclude else []
    shared = {"exclude": exclude, "holdout": data.holdout, "on_corrupt": data.on_corrupt}
    if data.name == "satellite":
        return open_satellite(split, root=data.train, side=data.side, **shared)
    roots = [part for part in data.train.split(",") if part]
    return InMemory(open_source("images", split, roots=roots, **shared))


def make_transforms(data, split: str, last: ToTrainInput) -> tuple:
    """Captions with parts left out, random crops and turns (training only), then `last`."""
    if split != "train":
        return (last,)
    steps = [DrawCaption()] if data.name == "satellite" and last.tokenize else []
    if data.smallest_crop:
        steps.append(RandomCrop(data.smallest_crop, data.largest_crop))
    if data.flips:
        steps.append(QuarterTurns())
    return (*steps, last)


def check_cache(data) -> None:
    """ValueError where something would be computed once that is drawn anew every time."""
    if data.cache not in CACHES:
        raise ValueError(f"data.cache={data.cache!r} is unknown; use one of {CACHES}")
    if data.cache != "none" and (data.smallest_crop or data.flips):
        raise ValueError(
            f"data.cache={data.cache} keeps one latent of every picture, and data.smallest_crop or "
            "data.flips draw new pixels every time; set both to 0 and False, or data.cache=none"
        )


class Precomputed(NamedTuple):
    """Makes caches of moments of latents, of metadata, and of token ids or text embeddings."""

    backbone: Backbone  # codec and codec_params, as host arrays
    tower: TextTower | None
    last: ToTrainInput
    batches: Callable  # data.pipeline.eval_batches
    batch_size: int  # of all devices together

    def of(self, source, data) -> CachedExamples:
        """Examples `mean`, `logvar`, `metadata`, `ids` or `text` of a source; built where missing.

        Every process fills its own shards at its own pace: nothing global is computed here.
        """
        spec = self.describe(source, with_text=data.cache == "all")
        local = make_mesh(devices=jax.local_devices())
        backbone, tower = jax.device_put((self.backbone, self.tower), replicated(local))

        def encode(batch):
            put = put_batch({k: v for k, v in batch.items() if k in ("pixels", "ids")}, local)
            mean, logvar = encode_moments(backbone, put["pixels"])
            made = {"mean": mean, "logvar": logvar} | {k: batch.get(k) for k in ("metadata", "ids")}
            if "ids" in put and data.cache == "all":
                made["text"] = embed_ids(tower, put["ids"])
            return [made[field.name] for field in spec.fields]

        def load(wanted):
            options = {"batch_size": building_size(self.batch_size), "workers": data.workers}
            return self.batches(Subset(source, wanted), (self.last,), **options)

        return CachedExamples(source, [open_or_build(data.cache_dir, load, encode, spec)])

    def describe(self, source, with_text: bool) -> CacheSpec:
        """The spec of the cache: its key changes with whatever changes a number."""
        codec, side = self.backbone.codec, self.last.side
        shape = (side // codec.factor,) * 2 + (codec.latent_channels,)
        names = ["mean"] if isinstance(codec, SpaceToDepth) else ["mean", "logvar"]
        fields = [Field(name, shape) for name in names]
        identity = {"source": source.fingerprint, "side": side, "codec": repr(codec)}
        identity |= {"transform": f"{PIXEL_TRANSFORM}, short side, centre"}
        if self.backbone.codec_params:
            identity["codec_weights"] = tree_sha256(self.backbone.codec_params)
        if self.last.num_metadata:
            fields.append(Field("metadata", (self.last.num_metadata,)))
        if self.tower:
            length, config = self.last.tokenize.length, self.tower.model.config
            identity["words"] = sha256_json(self.last.tokenize.backend.get_vocab())
            fields.append(Field("ids", (length,), "int32"))
        if self.tower and with_text:
            dtype = str(np.dtype(self.tower.model.dtype))
            fields[-1] = Field("text", (length, config.hidden_size), dtype)
            identity |= {"tower": repr(config), "tower_weights": tree_sha256(self.tower.params)}
        return CacheSpec("pretrain", len(source), tuple(fields), identity, SHARD_ROWS)
