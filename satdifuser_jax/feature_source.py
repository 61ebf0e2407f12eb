"""Examples of a probe: pixels as they are, or what a cache keeps of them (latents, taps)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from common_jax.distributed import check_same, is_any
from common_jax.sharding import make_mesh, put_batch
from satdifuser_jax.backbone import fingerprint, place_backbone
from satdifuser_jax.cache import (
    Batches,
    Cache,
    Encode,
    Subset,
    build_cache,
    open_cache,
    wait_for_cache,
)
from satdifuser_jax.cache_spec import CacheError, CacheSpec, Field
from satdifuser_jax.extract import Backbone, extract_features, features_at
from satdifuser_jax.extract_config import ExtractConfig
from satdifuser_jax.features import describe, make_encoder
from satdifuser_jax.preprocess import to_pixels

CACHES = ("none", "latents", "taps")
MOST_PICTURES = 16  # of a device at once, while a cache is built
SHARED_SECONDS = 60.0  # until a network file system shows what another host wrote
# Cached type of a label by its dimensions: class, multi-hot vector, map of classes.
LABEL_TYPES = {0: "int32", 1: "float32", 2: "int16"}


class ToProbeInput:
    """(example, rng) -> pixels [S,S,3] in [-1,1], label, metadata where asked for, mask."""

    def __init__(self, side: int, with_metadata: bool):
        self.side, self.with_metadata = side, with_metadata

    def __call__(self, example, rng):
        out = {k: example[k] for k in ("mask", "label") if k in example}
        out["pixels"] = to_pixels(example["image"], self.side)
        if self.with_metadata:
            if example.get("metadata") is None:
                raise ValueError(
                    f"metadata=record, but {example.get('id', 'an image')} carries none; use "
                    "--config.model.metadata=zeros or none"
                )
            out["metadata"] = np.asarray(example["metadata"], np.float32)
        return out


class CachedExamples:
    """Rows of caches as examples; other attributes are those of the source they were made from."""

    def __init__(self, source, caches: list[Cache], rows: np.ndarray | None = None):
        self.source, self.caches, self.rows = source, caches, rows

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "source":  # pickle looks before __init__ ran
            raise AttributeError(name)
        return getattr(self.source, name)

    def __getitem__(self, i: int) -> dict:
        row = int(i if self.rows is None else self.rows[i])
        arrays = {}
        for cache in self.caches:
            for field, value in zip(cache.spec.fields, cache[row]):
                # numpy cannot stack bfloat16 for grain: its bits travel as uint16.
                is_bfloat16 = field.dtype == "bfloat16"
                arrays[field.name] = value.view(np.uint16) if is_bfloat16 else np.asarray(value)
        return arrays


# ------------------------------------------------------------------------------ several processes
def open_or_build(
    root: str | os.PathLike, batches: Batches, encode: Encode, spec: CacheSpec
) -> Cache:
    """The cache of `spec`; every process must ask, and builds its own of the missing shards.

    batches, encode: see `build_cache`. Raises ValueError where the processes see different data,
    CacheError where they do not see one folder.
    """
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        build_cache(root, batches, encode, spec)
        return open_cache(root, spec)
    check_alike(spec)
    check_shared(root)
    build_cache(root, batches, encode, spec, host=index, num_hosts=count)
    return wait_for_cache(root, spec)


def open_finished(root: str | os.PathLike, specs: tuple[CacheSpec, ...]) -> list[Cache]:
    """The caches of `specs` where every process finds all of them complete; else []."""
    caches = []
    with contextlib.suppress(CacheError):
        caches = [open_cache(root, spec) for spec in specs]
    if is_any(not caches):
        return []
    for spec in specs:
        check_alike(spec)
    return caches


def check_alike(spec: CacheSpec) -> None:
    """ValueError where the processes would build caches of different things."""
    check_same(f"the number of images of the {spec.kind} cache", spec.rows)
    # The key covers the content of the source, the weights and all settings.
    check_same(f"the key of the {spec.kind} cache (data, weights)", int(spec.key[:12], 16))


def check_shared(root: str | os.PathLike, seconds: float = SHARED_SECONDS) -> None:
    """CacheError, in every process alike, where `root` is not one folder for all of them.

    Process 0 leaves a file there for which the others look, for so many seconds.
    """
    mine = np.int32(secrets.randbits(31))
    token = int(multihost_utils.broadcast_one_to_all(mine))  # a name that no older run left behind
    root = Path(root).expanduser()
    file, is_first = root / f".shared-{token:08x}", jax.process_index() == 0
    root.mkdir(parents=True, exist_ok=True)
    if is_first:
        file.touch()
    deadline = time.monotonic() + seconds
    # A listing is asked of the server; of a single name its absence may be remembered.
    while not (seen := file.name in os.listdir(root)) and time.monotonic() < deadline:
        time.sleep(0.2)
    is_apart = is_any(not seen)
    if is_first:
        file.unlink(missing_ok=True)
    if is_apart:
        raise CacheError(
            f"data.cache_dir={root} is not one folder for all {jax.process_count()} processes: "
            f"some did not see within {seconds:g} s what process 0 wrote there. Set it to a "
            "folder on a file system that all of them share, or data.cache=none"
        )


def building_size(batch_size: int) -> int:
    """Pictures that this process encodes at once for a cache: its share of a global batch.

    A multiple of its devices, at most MOST_PICTURES each.
    """
    each = -(-batch_size // jax.device_count())
    return min(each, MOST_PICTURES) * jax.local_device_count()


class FeatureMaker:
    """Turns batches into features with one frozen backbone, and keeps caches of them."""

    def __init__(
        self, load: Callable[[Mesh], Backbone], config: ExtractConfig, mesh: Mesh, cache: dict
    ):
        """load: reads the backbone onto a mesh. cache: {"kind", "dir", "dtype", "workers"}."""
        if cache["kind"] not in CACHES:
            raise ValueError(f"data.cache={cache['kind']!r} is unknown; use one of {CACHES}")
        self.load, self.config, self.mesh, self.cache = load, config, mesh, cache
        self.model = fingerprint(self.backbone)

    @functools.cached_property
    def backbone(self) -> Backbone:
        return self.load(self.mesh)

    def on(self, mesh: Mesh) -> FeatureMaker:
        """The same model on a mesh of this process alone; of several, each reads the whole."""
        other = copy.copy(self)
        other.mesh, placed = mesh, vars(other).pop("backbone")
        if jax.process_count() == 1:
            other.backbone = place_backbone(placed, mesh)
        return other

    def features(self, batch):
        """Batch with pixels, latents or cached taps -> tuple over scales of [B,T,H,W,C]."""
        metadata = batch.get("metadata")
        if "latents" in batch:
            return features_at(self.backbone, batch["latents"], self.config, metadata)
        if "scale_0" in batch:
            return tuple(as_float(batch[f"scale_{i}"]) for i in range(len(self.config.scales)))
        index = batch["index"]
        return extract_features(
            self.backbone, batch["pixels"], self.config, index=index, metadata=metadata
        )

    def cached(self, source, side: int, batches, batch_size: int):
        """The source itself, or its caches, built first where they are missing.

        batches: data.pipeline.eval_batches. Every process writes its own shards. A subset (few
        labels) reads the cache of the whole set where there is one. Tasks on the same pictures
        share one cache of features; labels are kept apart.
        """
        if self.cache["kind"] == "none":
            return source
        root, whole = self.cache["dir"], getattr(source, "source", None)
        if whole is not None and hasattr(source, "indices"):
            caches = open_finished(root, self._specs(whole, side))
            if caches:
                return CachedExamples(source, caches, source.indices)
        specs = self._specs(source, side)
        # Every process fills its own shards at its own pace: nothing global may be computed here.
        local = make_mesh(devices=jax.local_devices())
        extra = [field.name for field in specs[0].fields if field.name == "metadata"]

        def put(batch):
            return put_batch({k: v for k, v in batch.items() if k != "label"}, local)

        @functools.cache
        def encoder() -> Encode:  # made, and weights read, only where a shard is missing
            return make_encoder(self.on(local).backbone, self.config, specs[0], put)

        def encode_features(batch):
            return [*encoder()(batch), *(batch[name] for name in extra)]

        transform = ToProbeInput(side, bool(extra))
        jobs = [(specs[0], encode_features, transform), (specs[1], _take_label, _keep_label)]
        caches, size = [], building_size(batch_size)
        for spec, encode_batch, prepare in jobs:

            def load(wanted, prepare=prepare):
                picked = Subset(source, wanted)
                return batches(picked, (prepare,), batch_size=size, workers=self.cache["workers"])

            caches.append(open_or_build(root, load, encode_batch, spec))
        return CachedExamples(source, caches)

    def _specs(self, source, side: int) -> tuple[CacheSpec, CacheSpec]:
        """Of features (with the metadata they were made with) and of labels."""
        spec = describe(
            self.cache["kind"],
            self.backbone,
            self.config,
            model=self.model,
            source=source.fingerprint,
            rows=len(source),
            side=side,
            dtype=self.cache["dtype"],
        )
        if self.config.metadata == "record":
            field = Field("metadata", (self.backbone.unet.config.num_metadata,))
            spec = dataclasses.replace(spec, fields=(*spec.fields, field))
        label = np.asarray(source[0]["label"])
        field = Field("label", label.shape, LABEL_TYPES[label.ndim])
        identity = {"source": source.fingerprint, "task": source.task}
        return spec, CacheSpec("labels", len(source), (field,), identity)


def _keep_label(example, rng):
    return {k: example[k] for k in ("mask", "label") if k in example}


def _take_label(batch):
    return [batch["label"]]


def as_float(x):
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
