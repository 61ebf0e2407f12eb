"""`launch.py sample`: pictures drawn from a trained model, as PNG files, a grid and a list."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common_jax.files import atomic_path, write_atomic
from common_jax.metric_log import say
from data.catalog import PROMPT
from data.satellite import metadata_vector, read_fields
from satdifuser_jax.backbone import EMPTY_PROMPT, load_backbone, read_prompts
from satdifuser_jax.components import find_components
from satdifuser_jax.convert import read_config
from satdifuser_jax.extract import Backbone, on_device
from satdifuser_jax.figures import save_grid
from satdifuser_jax.preprocess import to_uint8
from satdifuser_jax.sampling import SampleConfig, sample_images

MAX_COLUMNS = 10  # of the grid: a column for each prompt up to this many


class Sampler(NamedTuple):
    """A trained model that draws. embed: texts -> context [n,S,D]. side: of its images, pixels."""

    backbone: Backbone
    embed: Callable[[Sequence[str]], np.ndarray]
    side: int


@dataclasses.dataclass(frozen=True)
class DrawConfig:
    """Settings of `--sampling`. guidance: above 1 strengthens prompt and metadata.

    side: pixels, 0 is the model's. batch: pictures at once; what is drawn does not depend on it.
    """

    count: int = 4
    steps: int = 50
    guidance: float = 1.0
    seed: int = 0
    side: int = 0
    batch: int = 8


def parse_drawing(settings: Sequence[str]) -> DrawConfig:
    """`["count=8", "guidance=7.5"]` -> DrawConfig. Raises ValueError naming a wrong setting."""
    kinds = {field.name: type(field.default) for field in dataclasses.fields(DrawConfig)}
    values = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in kinds or not text:
            raise ValueError(f"--sampling={setting!r}: use NAME=VALUE of {', '.join(kinds)}")
        values[name] = kinds[name](text)
    found = DrawConfig(**values)
    if min(found.count, found.steps, found.batch) < 1:
        raise ValueError(f"--sampling={','.join(settings)}: count, steps and batch begin at 1")
    return found


def parse_metadata(settings: Sequence[str]) -> dict[str, float]:
    """`["latitude=48.1", "date=2019-08-31"]` -> raw fields; ValueError on unknown ones."""
    fields = dict(setting.partition("=")[::2] for setting in settings)
    known = read_fields(fields)
    if strange := sorted(fields.keys() - known.keys() - {"date"}):
        raise ValueError(f"--metadata={strange[0]}: need NAME=VALUE of a metadata field or date")
    return known


def load_sampler(weights, resolution: int | None) -> Sampler:
    """A pipeline folder in the public layout, with metadata embeddings where it has them."""
    parts = find_components(weights, resolution)
    backbone = load_backbone(
        weights,
        resolution=resolution,
        prompt=EMPTY_PROMPT,
        prompt_cache=None,
        use_metadata=read_config(parts.unet, "unet").use_metadata,
    )
    side = resolution or backbone.unet.config.sample_size * backbone.codec.factor
    backbone = backbone.replace(uncond=backbone.context)
    return Sampler(backbone, lambda texts: read_prompts(parts, texts), side)


def write_samples(
    sampler: Sampler,
    drawing: DrawConfig,
    prompts: Sequence[str],
    fields: Mapping[str, float],
    out,
) -> Path:
    """OUT/NNNN.png, OUT/samples.jsonl and OUT/grid.png; picture i has prompt i % len(prompts).

    No prompt means PROMPT. fields: raw metadata of all pictures; what is not in it counts as
    unknown. Returns the path of the grid. Raises ValueError where the model has no metadata.
    """
    images, backbone = [], on_device(sampler.backbone)
    prompts, out = list(prompts) or [PROMPT], Path(out)
    context = sampler.embed(prompts)
    metadata = metadata_vector(fields) if fields or backbone.unet.config.num_metadata else None
    spec = SampleConfig(drawing.steps, drawing.guidance, drawing.seed)
    side = backbone.latent_side(drawing.side or sampler.side)
    chosen = np.arange(drawing.count) % len(prompts)
    size = min(drawing.batch, drawing.count)
    for first in range(0, drawing.count, size):
        index = np.arange(first, first + size)  # the last batch is filled up: one program
        pixels = sample_images(
            backbone.replace(context=context[index % len(prompts)]),
            spec,
            index=index.astype(np.uint32),
            side=side,
            metadata=None if metadata is None else np.tile(metadata, (size, 1)),
        )
        for number, image in zip(index[: drawing.count - first], to_uint8(np.asarray(pixels))):
            images.append(image)
            with atomic_path(out / f"{number:04d}.png") as partial:
                Image.fromarray(image).save(partial, format="PNG")
        say(f"drew {len(images)} of {drawing.count}")
    about = dataclasses.asdict(drawing) | {"metadata": dict(fields)}
    rows = [{"file": f"{i:04d}.png", "prompt": prompts[p], **about} for i, p in enumerate(chosen)]
    write_atomic(out / "samples.jsonl", "".join(json.dumps(r) + "\n" for r in rows).encode())
    labels, columns = label_prompts(prompts), len(prompts)
    return save_grid(
        np.stack(images),
        out / "grid.png",
        titles=[labels[p] for p in chosen],
        columns=columns if 1 < columns <= MAX_COLUMNS else None,
    )


def label_prompts(prompts: Sequence[str]) -> list[str]:
    """Prompts without the words that all of them begin with, where something is left of each."""
    words = [prompt.split() for prompt in prompts]
    same = len(commonprefix(words)) if len(words) > 1 else 0
    labels = [" ".join(each[same:]) for each in words]
    return labels if all(labels) else list(prompts)
