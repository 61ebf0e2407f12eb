"""Is this folder a model we can use? Counts, dtypes, scheduler, and one picture through every part.

    print(verify("diffusionsat", resolution=256))

No other framework is imported here. Whoever has one passes `peer`, and the table gets a column with
the difference between its numbers and ours.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from common_jax.weights import Report, flatten, open_tensors
from satdifuser_jax.convert import (
    Components,
    find_components,
    is_weightless,
    load_text_encoder,
    load_unet,
    load_vae,
    read_config,
)
from satdifuser_jax.preprocess import to_pixels
from satdifuser_jax.prompts import load_tokenizer
from satdifuser_jax.text_encoder import CLIPTextModel
from satdifuser_jax.unet import SatUNet
from satdifuser_jax.vae import AutoencoderKL

PROMPT = "A satellite image"
TIMESTEP = 21.0  # the first one whose taps the published configuration keeps
LOADERS = {"text_encoder": load_text_encoder, "vae": load_vae, "unet": load_unet}

# stage, the parts of the model, named inputs (NHWC) -> output (NHWC)
Peer = Callable[[str, Components, Mapping[str, np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Part:
    """A component on disk. `strange` counts values that are not finite."""

    name: str
    folder: Path
    dtypes: tuple[str, ...]
    tensors: int
    parameters: int
    strange: int
    report: Report

    @property
    def ok(self) -> bool:
        return self.report.ok and not self.strange


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the way from picture to prediction and back. error: against the peer, or None."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float
    seconds: float
    error: float | None

    @property
    def ok(self) -> bool:
        return bool(np.isfinite(self.mean + self.std)) and (self.error or 0) < 1e-4


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found; `str()` of it is a table, `ok` says whether the model can be used."""

    components: Components
    parts: tuple[Part, ...]
    stages: tuple[Stage, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in (*self.parts, *self.stages))

    def __str__(self) -> str:
        lines = [str(self.components.root)]
        head = ("part", "tensors", "parameters", "dtypes", "folder")
        rows = [
            (p.name, f"{p.tensors}", f"{p.parameters:,}", "+".join(p.dtypes), self._short(p.folder))
            for p in self.parts
        ]
        lines += _table([head, *rows])
        lines += [str(p.report) for p in self.parts if not p.report.ok]
        lines += [f"{p.name}: {p.strange} values are not finite" for p in self.parts if p.strange]
        lines.append(f"scheduler: {self.components.schedule}")
        head = ("stage", "shape", "mean", "std", "seconds", "error against peer")
        rows = [
            (s.name, str(s.shape), f"{s.mean:.5f}", f"{s.std:.5f}", f"{s.seconds:.1f}", _show(s))
            for s in self.stages
        ]
        lines += _table([head, *rows])
        return "\n".join([*lines, "usable" if self.ok else "NOT usable, see above"])

    def _short(self, folder: Path) -> str:
        return str(folder.relative_to(self.components.root))


def verify(
    root: str | os.PathLike,
    *,
    resolution: int | None = None,
    image: np.ndarray | None = None,
    peer: Peer | None = None,
) -> Verification:
    """Checks every part of a pipeline folder and runs one picture through all that are there.

    image: HWC uint8 or float, resized to twice the smallest side the model takes; a built-in
    pattern by default. At most the UNet and the VAE are in memory together.
    Raises FileNotFoundError or ValueError for folders and schedulers that cannot work at all.
    """
    components = find_components(root, resolution)
    run = _Runner(components, peer)
    if components.text_encoder:
        run.text(*run.load("text_encoder"))
    vae = None
    if components.vae and not is_weightless(components.vae):
        vae = run.load("vae")
        run.encode(*vae, _pattern() if image is None else image)
    run.unet(*run.load("unet"))
    if vae is not None:
        run.decode(*vae)
    return Verification(components, tuple(run.parts), tuple(run.stages))


def _inspect(name: str, folder: Path, params: Mapping, report: Report) -> Part:
    leaves = list(flatten(params).values())
    dtypes = {str(tensor.dtype) for tensor in open_tensors(folder).values()}
    return Part(
        name,
        folder,
        tuple(sorted(dtypes)),
        len(leaves),
        sum(leaf.size for leaf in leaves),
        sum(int(leaf.size - np.isfinite(leaf).sum()) for leaf in leaves),
        report,
    )


class _Runner:
    """Loads parts and runs stages one by one, and keeps a row of each. A bad part is not run."""

    def __init__(self, components: Components, peer: Peer | None):
        self.components, self.peer = components, peer
        self.parts: list[Part] = []
        self.stages: list[Stage] = []
        self.context = self.latents = None

    def load(self, name: str) -> tuple:
        folder = self.components.require(name)
        config, params, report = LOADERS[name](folder, strict=False)
        self.parts.append(_inspect(name, folder, params, report))
        return config, params if self.parts[-1].ok else None

    def text(self, config, params) -> None:
        if params is None or self.components.tokenizer is None:
            return
        model = CLIPTextModel(config)
        ids = load_tokenizer(self.components.tokenizer)([PROMPT])

        def encode(p, ids):
            return model.apply({"params": p}, ids)

        self.context = self._run("prompt", encode, params, ids=ids)

    def encode(self, config, params, image: np.ndarray) -> None:
        if params is None:
            return
        vae = AutoencoderKL(config)
        levels = read_config(self.components.unet, "unet").levels
        images = to_pixels(image, vae.factor * 2**levels)[None]

        def encode(p, images):
            return vae.apply({"params": p}, images, method="encode")[0]

        mean = self._run("encode", encode, params, images=images)
        self.latents = mean * config.scaling_factor

    def unet(self, config, params) -> None:
        if params is None:
            return
        latents, context = self.latents, self.context
        if latents is None:
            side = 2**config.levels
            latents = np.resize(_pattern()[:side, :side], (1, side, side, config.in_channels))
            latents = (latents / 128 - 1).astype(np.float32)
        if context is None:
            context = np.zeros((1, 77, config.cross_attention_dim), np.float32)
        model = SatUNet(config)

        def predict(p, x, t, context):
            return model.apply({"params": p}, x, t, context)[0]

        t = np.array([TIMESTEP], np.float32)
        self._run("unet", predict, params, x=latents, t=t, context=context)

    def decode(self, config, params) -> None:
        if params is None:
            return
        vae = AutoencoderKL(config)

        def decode(p, latents):
            return vae.apply({"params": p}, latents, method="decode")

        self._run("decode", decode, params, latents=self.latents / config.scaling_factor)

    def _run(self, name: str, function: Callable, params: Mapping, **inputs) -> np.ndarray:
        start = time.perf_counter()
        out = np.asarray(jax.jit(function)(params, *inputs.values()), np.float32)
        seconds, error = time.perf_counter() - start, None
        if self.peer is not None:
            wanted = np.asarray(self.peer(name, self.components, inputs), np.float64)
            error = float(np.abs(out - wanted).max() / np.abs(wanted).max())
        row = (name, out.shape, float(out.mean()), float(out.std()), seconds, error)
        self.stages.append(Stage(*row))
        return out


def _pattern() -> np.ndarray:
    """A picture [256, 256, 3] uint8 with edges, gradients and colours; the same everywhere."""
    y, x = np.mgrid[:256, :256]
    blocks = 64 * ((x // 32 + y // 48) % 3)
    return np.stack([(x + blocks) % 256, (2 * y + blocks) % 256, (x + y) // 2], -1).astype(np.uint8)


def _show(stage: Stage) -> str:
    return "-" if stage.error is None else f"{stage.error:.1e}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
