"""Pretraining of the backbone with the DiffusionSat objective, as a Task.

Latents z of an image are noised to a random time t and the network predicts the noise (or v); the
error is weighted by min-SNR, and each metadata field is zeroed with a small chance before it is
embedded. See Khanna et al. 2024 (DiffusionSat) and Hang et al. 2023 (min-SNR).
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from common_jax.init import host_init
from common_jax.task import Evaluator, PlanRow, Task
from data.catalog import open_source
from data.crops import QuarterTurns, RandomCrop
from data.memory import InMemory
from satdifuser_jax.backbone import export_backbone, load_codec
from satdifuser_jax.convert import load_unet
from satdifuser_jax.extract import Backbone, encode_latents
from satdifuser_jax.extract_config import ExtractConfig
from satdifuser_jax.figures import save_grid
from satdifuser_jax.preprocess import to_pixels, to_uint8
from satdifuser_jax.sampling import SampleConfig, sample_images
from satdifuser_jax.schedule import Schedule
from satdifuser_jax.unet import SatUNet, UNetConfig, unet_shapes
from satdifuser_jax.vae import SpaceToDepth

# Validation looks at the same times for every image, so that its loss is smooth between steps.
EVAL_TIMES = (50, 200, 400, 600, 800)
PROMPT = "A satellite image"


class ToLatentInput:
    """(example, rng) -> {"pixels": [S,S,3] in [-1,1]} and `metadata` where the model uses it."""

    def __init__(self, side: int, num_metadata: int):
        self.side, self.num_metadata = side, num_metadata

    def __call__(self, example, rng):
        out = {k: example[k] for k in ("mask", "id") if k in example}
        out["pixels"] = to_pixels(example["image"], self.side, fit="crop")
        if self.num_metadata:
            found = example.get("metadata")
            # An image without metadata counts as one whose fields were all dropped.
            empty = np.zeros(self.num_metadata, np.float32)
            out["metadata"] = empty if found is None else np.asarray(found, np.float32)
        return out


class PretrainTask(Task):
    """The diffusion objective on images of any source, in pixel space or behind a frozen VAE."""

    def __init__(self, config):
        super().__init__(config)
        model = config.model
        self.codec, self.codec_params = (
            load_codec(model.vae) if model.vae else (SpaceToDepth(model.patch), {})
        )
        self.schedule = Schedule(prediction_type=model.prediction_type)
        self.loaded = None
        if model.weights:
            folder = Path(model.weights)
            folder = folder / "unet" if (folder / "unet").is_dir() else folder
            self.unet_config, self.loaded, _ = load_unet(folder)
        else:
            self.unet_config = unet_config(model, self.codec.latent_channels)
        self.unet = SatUNet(self.unet_config, dtype=jnp.dtype(model.dtype))
        self.frozen = self._backbone({})
        self.extract = ExtractConfig(posterior="sample", seed=config.seed)

    # -- parameters ------------------------------------------------------------------------

    def init(self, seed):
        if self.loaded is not None:
            return self.loaded, {}
        # A zero output layer starts the loss at the variance of the target (Ho et al. 2020).
        zero = [(r"^conv_out/", lambda rng, shape: np.zeros(shape))]
        return host_init(unet_shapes(self.unet_config), seed, zero), {}

    def plan(self):
        rows = [PlanRow("unet", unet_shapes(self.unet_config), trainable=True)]
        if self.codec_params:
            rows.append(PlanRow("vae", self.codec_params, note="frozen"))
        return rows

    # -- data ------------------------------------------------------------------------------

    def _source(self, split: str):
        data = self.config.data
        if data.name in ("scenes", "scenes_seg"):
            size = data.val_size if split == "val" else data.size
            return open_source("scenes", split, side=data.side, size=size)
        exclude = json.loads(Path(data.exclude).read_text()) if data.exclude else []
        source = open_source(
            "images",
            split,
            roots=[p for p in data.train.split(",") if p],
            exclude=exclude,
            holdout=data.holdout,
            on_corrupt=data.on_corrupt,
        )
        return InMemory(source)

    def train_source(self):
        return self._source("train")

    def transforms(self, split):
        data = self.config.data
        last = ToLatentInput(data.side, self.unet_config.num_metadata)
        if split != "train":
            return (last,)
        steps = []
        if data.smallest_crop:
            steps.append(RandomCrop(data.smallest_crop, data.largest_crop))
        if data.flips:
            steps.append(QuarterTurns())
        return (*steps, last)

    # -- objective -------------------------------------------------------------------------

    def encode(self, batch):
        rest = {k: v for k, v in batch.items() if k != "pixels"}
        latents = encode_latents(self.frozen, batch["pixels"], self.extract, batch["index"])
        return rest | {"latents": latents}

    def _errors(self, params, latents, t, noise, metadata):
        """Mean squared error per image [B], float32, of the prediction at times t [B]."""
        noisy = self.schedule.add_noise(latents, noise, t)
        target = self.schedule.training_target(latents, noise, t)
        out, _ = self.unet.apply(
            {"params": params}, noisy, t.astype(jnp.float32), self._context(), metadata
        )
        return jnp.mean((out.astype(jnp.float32) - target) ** 2, axis=(1, 2, 3))

    def _context(self):
        # No text tower in small pretraining: one zero token, so cross-attention adds a bias.
        return jnp.zeros((1, 1, self.unet_config.cross_attention_dim))

    def loss(self, params, state, batch, key, phase):
        model, latents = self.config.model, batch["latents"]
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch["index"].astype(jnp.uint32))
        parts = jax.vmap(lambda k: jax.random.split(k, 3))(keys)
        steps = self.schedule.num_train_timesteps
        t = jax.vmap(lambda k: jax.random.randint(k, (), 0, steps))(parts[:, 0])
        noise = jax.vmap(lambda k: jax.random.normal(k, latents.shape[1:]))(parts[:, 1])
        metadata = batch.get("metadata")
        if metadata is not None:
            keep = jax.vmap(
                lambda k: jax.random.bernoulli(k, 1 - model.metadata_dropout, metadata.shape[1:])
            )(parts[:, 2])
            metadata = jnp.where(keep, metadata, 0.0)
        errors = self._errors(params, latents, t, noise, metadata)
        weights = jnp.ones_like(errors)
        if model.min_snr_gamma:
            weights = self.schedule.min_snr_weight(t, model.min_snr_gamma, model.min_snr_mode)
        loss = jnp.sum(weights * errors)
        return loss, jnp.float32(len(errors)), state, {"mse": jnp.mean(errors)}

    def predict(self, params, state, batch, phase):
        """Unweighted error [B, len(EVAL_TIMES)] with noise fixed by the image's place."""
        latents = batch["latents"]

        def at(time):
            base = jax.random.key(time)
            keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(
                batch["index"].astype(jnp.uint32)
            )
            noise = jax.vmap(lambda k: jax.random.normal(k, latents.shape[1:]))(keys)
            t = jnp.full((len(latents),), time)
            return self._errors(params, latents, t, noise, batch.get("metadata"))

        return jax.lax.map(at, jnp.asarray(EVAL_TIMES)).T, state

    def evaluators(self):
        def update(errors, batch):
            rows = batch["mask"].astype(np.float64)
            return np.append((errors * rows[:, None]).sum(0), rows.sum())

        def finish(sums):
            means = sums[:-1] / sums[-1]
            by_time = {f"mse_t{t}": float(m) for t, m in zip(EVAL_TIMES, means)}
            return {"mse": float(means.mean()), **by_time}

        return {"val": Evaluator(self._source("val"), self.transforms("val"), update, finish)}

    # -- what a person looks at ------------------------------------------------------------

    def during(self, step, params, workdir):
        count = self.config.eval.samples
        if not count or jax.process_index():
            return
        images = self.sample(params, count, seed=self.config.seed)
        folder = Path(workdir) / "samples"
        folder.mkdir(exist_ok=True)
        save_grid(images, folder / f"{step:07d}.png")

    def sample(self, params, count: int, seed: int):
        """uint8 [count, S, S, 3] drawn from the model, with the metadata of held-out images."""
        metadata = None
        if self.unet_config.num_metadata:
            source = self._source("val")
            prepare = self.transforms("val")[0]
            rows = [prepare(source[i % len(source)], None)["metadata"] for i in range(count)]
            metadata = jnp.asarray(np.stack(rows))
        spec = SampleConfig(num_steps=self.config.eval.sample_steps, seed=seed)
        side = self.config.data.side // self.codec.factor
        backbone = self._backbone(params)
        pixels = sample_images(backbone, spec, count=count, side=side, metadata=metadata)
        return to_uint8(np.asarray(pixels))

    def _backbone(self, params) -> Backbone:
        return Backbone(
            unet=self.unet,
            unet_params=params,
            codec=self.codec,
            codec_params=self.codec_params,
            schedule=self.schedule,
            context=self._context(),
        )

    def report(self, params, state, results, workdir):
        prompts = {PROMPT: np.asarray(self._context()[0])}
        export_backbone(Path(workdir) / "export", self._backbone(params), prompts)


def unet_config(model, latent_channels: int) -> UNetConfig:
    """UNetConfig of the sizes in `config.model` (channels, heads, attention_levels, ...)."""
    levels = tuple(model.attention_levels)
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in levels)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(levels))
    return UNetConfig(
        block_out_channels=tuple(model.channels),
        layers_per_block=model.layers_per_block,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=model.context_dim,
        attention_head_dim=tuple(model.heads),
        norm_num_groups=min(32, *(c // 4 for c in model.channels)),
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_metadata=7 if model.metadata else 0,
    )
