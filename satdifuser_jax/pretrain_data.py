"""Examples of pretraining: pictures with captions and metadata, or what was precomputed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from common_jax.files import sha256_json
from common_jax.metric_log import say
from common_jax.sharding import make_mesh, put_batch, replicated
from common_jax.weights import tree_sha256
from data.catalog import open_source
from data.crops import QuarterTurns, RandomCrop
from data.memory import InMemory
from data.satellite import open_satellite
from data.scene_text import captions
from data.wording import (
    DrawCaption,
    always,
    compose,
    draw_caption,
    full_caption,
    read_wording,
)
from satdifuser_jax.cache import Subset, spread_rows
from satdifuser_jax.cache_spec import CacheSpec, Field
from satdifuser_jax.extract import Backbone, encode_moments
from satdifuser_jax.feature_source import CachedExamples, building_size, open_or_build
from satdifuser_jax.preprocess import PIXEL_TRANSFORM, to_pixels
from satdifuser_jax.prompts import PromptTokenizer
from satdifuser_jax.text_encoder import TextTower, embed_ids
from satdifuser_jax.vae import SpaceToDepth

CACHES = ("none", "latents", "all")
WORDING_BYTES, MOST_LETTERS = 4096, 1024  # of a kept caption with all its parts; of each part
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
        root = weigh_roots(data.train, data.weights) if split == "train" else data.train
        return open_satellite(split, root=root, side=data.side, places=data.places, **shared)
    roots = [part for part in data.train.split(",") if part]
    return InMemory(open_source("images", split, roots=roots, **shared))


def weigh_roots(train: str, weights: Sequence[float]) -> str | dict[str, float]:
    """What `open_satellite` reads: `train`, or {place: weight} where weights are given."""
    roots = [part for part in re.split(r",(?![^{}]*\})", train) if part]
    if weights and len(weights) != len(roots):
        raise ValueError(
            f"data.weights={tuple(weights)} are {len(weights)} for {len(roots)} places in "
            "data.train; give one for each, or () to draw by length"
        )
    return dict(zip(roots, weights)) if weights else train


def make_transforms(data, split: str, last: ToTrainInput) -> tuple:
    """Captions with parts left out, random crops and turns (training only), then `last`.

    Of what is precomputed captions alone are left to draw.
    """
    is_train = split == "train"
    loses_parts = is_train and data.name == "satellite"
    if data.cache == "latents" and last.tokenize:
        return (DrawIds(last.tokenize, loses_parts),)
    if data.cache != "none":
        return ()
    if not is_train:
        return (last,)
    steps = [DrawCaption()] if loses_parts and last.tokenize else []
    if data.smallest_crop:
        steps.append(RandomCrop(data.smallest_crop, data.largest_crop))
    if data.flips:
        steps.append(QuarterTurns())
    return (*steps, last)


def warn_of_crops(data) -> None:
    """Says that captions may become false; pictures of a folder have none."""
    if data.name != "folder" and (data.smallest_crop or data.flips):
        say(
            "captions tell numbers and places of a whole picture: with random crops and turns some "
            "become false; set data.smallest_crop=0 and data.flips=False"
        )


def check_cache(data, model, has_text: bool) -> None:
    """ValueError where something would be computed once that is drawn anew every time."""
    if data.cache not in CACHES:
        raise ValueError(f"data.cache={data.cache!r} is unknown; use one of {CACHES}")
    if data.cache != "none" and (data.smallest_crop or data.flips):
        raise ValueError(
            f"data.cache={data.cache} keeps one latent of every picture, and data.smallest_crop or "
            "data.flips draw new pixels every time; set both to 0 and False, or data.cache=none"
        )
    if data.cache == "all" and has_text and not model.caption_dropout:
        raise ValueError(
            "data.cache=all keeps whole captions, and model.caption_dropout=0 never leaves one "
            "out: guidance would have nothing to compare with. Use data.cache=latents, where "
            "captions lose their parts anew every time, or set model.caption_dropout=0.1"
        )


class KeepWording:
    """(example, rng) -> what `last` makes, and `wording`: uint8 [WORDING_BYTES], JSON and spaces.

    A caption without parts is one part. Texts are cut to MOST_LETTERS, more than a tower reads.
    """

    def __init__(self, last: ToTrainInput):
        self.last = last

    def __call__(self, example, rng):
        wording = example.get("wording") or compose(always(example.get("caption") or ""))
        pieces = [[[chance, text[:MOST_LETTERS]] for chance, text in p] for p in wording.pieces]
        packed = json.dumps(pieces, ensure_ascii=False).encode()
        if len(packed) > WORDING_BYTES:
            raise ValueError(
                f"{example.get('id', 'a picture')}: its caption with all parts takes {len(packed)} "
                f"bytes, a cache keeps {WORDING_BYTES}; shorten it or use data.cache=none"
            )
        kept = np.frombuffer(packed.ljust(WORDING_BYTES), np.uint8)
        return self.last(example, rng) | {"wording": kept}


class DrawIds:
    """(cached example, rng) -> `ids` [L] of its caption, with parts left out where it loses_parts.

    The draw is that of `DrawCaption` on the picture's own wording.
    """

    def __init__(self, tokenize: PromptTokenizer, loses_parts: bool):
        self.tokenize, self.loses_parts = tokenize, loses_parts

    def __call__(self, example, rng):
        out = dict(example)
        wording = read_wording(json.loads(out.pop("wording").tobytes()))
        text = draw_caption(wording, rng) if self.loses_parts else full_caption(wording)
        return out | {"ids": self.tokenize([text])[0]}


class Precomputed(NamedTuple):
    """Makes caches of moments of latents, of metadata, and of wordings or text embeddings."""

    backbone: Backbone  # codec and codec_params, whole
    tower: TextTower | None
    last: ToTrainInput
    batches: Callable  # data.pipeline.eval_batches
    batch_size: int  # of all devices together

    def of(self, source, data) -> CachedExamples:
        """Examples `mean`, `logvar`, `metadata`, `wording` or `text` of a source, made if need be.

        Every process fills its own shards at its own pace: nothing global is computed here.
        """
        spec = self.describe(source, with_text=data.cache == "all")
        last = self.last
        if any(field.name == "wording" for field in spec.fields):
            last = KeepWording(ToTrainInput(last.side, last.num_metadata))
        local = make_mesh(devices=jax.local_devices())
        backbone, tower = jax.device_put((self.backbone, self.tower), replicated(local))

        def encode(batch):
            put = put_batch({k: v for k, v in batch.items() if k in ("pixels", "ids")}, local)
            mean, logvar = encode_moments(backbone, put["pixels"])
            made = {"mean": mean, "logvar": logvar}
            made |= {k: batch.get(k) for k in ("metadata", "wording")}
            if "ids" in put:
                made["text"] = embed_ids(tower, put["ids"])
            return [made[field.name] for field in spec.fields]

        def load(wanted):
            options = {"batch_size": building_size(self.batch_size), "workers": data.workers}
            return self.batches(Subset(source, wanted), (last,), **options)

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
        if self.tower and not with_text:
            fields.append(Field("wording", (WORDING_BYTES,), "uint8"))
        if self.tower and with_text:
            length, config = self.last.tokenize.length, self.tower.model.config
            identity["words"] = sha256_json(self.last.tokenize.backend.get_vocab())
            dtype = str(np.dtype(self.tower.model.dtype))
            fields.append(Field("text", (length, config.hidden_size), dtype))
            identity |= {"tower": repr(config), "tower_weights": tree_sha256(self.tower.params)}
        return CacheSpec("pretrain", len(source), tuple(fields), identity, SHARD_ROWS)
