"""Pretraining of the backbone with the DiffusionSat objective, as a Task.

Latents z of an image are noised to a random time t and the network predicts the noise (or v), given
the caption and metadata of the image; the error is weighted by min-SNR. Captions and single
metadata fields are left out with a small chance, so that guidance has something to compare with.
See Khanna et al. 2024 (DiffusionSat), Hang et al. 2023 (min-SNR), Ho and Salimans 2022 (guidance).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from common_jax.evaluate import restore_trained
from common_jax.sharding import (
    count_ways,
    make_mesh,
    put_batch,
    replicated,
)
from common_jax.task import Evaluator, PlanRow, Task
from satdifuser_jax.backbone import EMPTY_PROMPT, export_backbone
from satdifuser_jax.blocks import SHARDING_RULES
from satdifuser_jax.cache import Subset, spread_rows
from satdifuser_jax.extract import Backbone, draw_latents, encode_latents
from satdifuser_jax.extract_config import ExtractConfig
from satdifuser_jax.feature_source import as_float
from satdifuser_jax.figures import save_grid
from satdifuser_jax.preprocess import to_uint8
from satdifuser_jax.pretrain_data import (
    Precomputed,
    ToTrainInput,
    check_cache,
    make_transforms,
    open_pictures,
    warn_of_crops,
)
from satdifuser_jax.pretrain_parts import (
    find_parts,
    load_codec_params,
    load_text,
    load_unet_params,
    load_words,
)
from satdifuser_jax.sample_files import PROMPT, Sampler
from satdifuser_jax.sampling import SampleConfig, sample_images
from satdifuser_jax.sketch import count_training_flops, sketch_pretraining
from satdifuser_jax.text_encoder import TextTower, embed_ids, text_encoder_shapes
from satdifuser_jax.unet import SatUNet, unet_shapes
from satdifuser_jax.vae import SpaceToDepth, vae_shapes

# Validation looks at the same times for every image, so that its loss is smooth between steps.
EVAL_TIMES = (50, 200, 400, 600, 800)
RAW = ("pixels", "mean", "logvar", "ids", "text")  # what `encode` makes latents and context of


class PretrainTask(Task):
    """The diffusion objective on images of any source, in pixel space or behind a frozen VAE."""

    sharding_rules = SHARDING_RULES

    def __init__(self, config):
        super().__init__(config)
        self.parts = parts = find_parts(config.model, config.data.side)
        check_cache(config.data, config.model, has_text=bool(parts.text))
        # No text tower: one zero token, so that cross-attention adds a bias.
        length = parts.text.max_position_embeddings if parts.text else 1
        empty = np.zeros((1, length, parts.unet.cross_attention_dim), np.float32)
        dtype = jnp.dtype(config.model.dtype)
        self.unet = SatUNet(parts.unet, dtype=dtype, remat=config.model.remat)
        self.frozen = Backbone(
            unet=self.unet,
            unet_params={},
            codec=parts.codec,
            codec_params={},
            schedule=parts.schedule,
            context=empty,
            uncond=empty,
        )
        self.extract = ExtractConfig(posterior="sample", seed=config.seed)
        self.mesh, self.tower, self.maker, self.sources = None, None, None, {}

    # -- parameters ------------------------------------------------------------------------

    def init(self, seed):
        return load_unet_params(self.parts, seed, self.mesh), {}

    def prepare(self, mesh, batches):
        """Loads the frozen parts onto the mesh, and fills the caches."""
        self.mesh, self.batches, model = mesh, batches, self.config.model
        codec_params = load_codec_params(self.parts, model.vae_dtype, mesh)
        self.frozen = self.frozen.replace(codec_params=codec_params)
        if self.parts.text:
            warn_of_crops(self.config.data)
            self.tower = load_text(self.parts, model.dtype, mesh)
            embed = jax.jit(embed_ids, out_shardings=replicated(mesh))
            empty = np.asarray(embed(self.tower, self.tokenizer([EMPTY_PROMPT])), np.float32)
            self.frozen = self.frozen.replace(context=empty, uncond=empty)
        if self.config.data.cache != "none":
            size = self.config.eval.batch_size or self.config.batch_size
            self.maker = Precomputed(*self.whole, self.last_transform, batches, size)

    @functools.cached_property
    def whole(self) -> tuple[Backbone, TextTower | None]:
        """The frozen parts for what a process does alone: filling caches, drawing, exporting."""
        if jax.process_count() == 1:
            return self.frozen, self.tower
        model = self.config.model
        codec_params = load_codec_params(self.parts, model.vae_dtype)
        tower = load_text(self.parts, model.dtype) if self.tower else None
        return self.frozen.replace(codec_params=codec_params), tower

    def plan(self):
        parts = self.parts
        rows = [PlanRow("unet", unet_shapes(parts.unet), trainable=True)]
        if not isinstance(parts.codec, SpaceToDepth):
            rows.append(PlanRow("vae", vae_shapes(parts.codec.config), note="frozen"))
        if parts.text:
            rows.append(PlanRow("text_encoder", text_encoder_shapes(parts.text), note="frozen"))
        return rows

    def sketch(self, mesh, rows):
        return sketch_pretraining(self, mesh, rows)

    def flops(self):
        return count_training_flops(self, self.config.batch_size)

    # -- data ------------------------------------------------------------------------------

    @functools.cached_property
    def tokenizer(self):
        return load_words(self.parts) if self.parts.text else None

    @functools.cached_property
    def last_transform(self) -> ToTrainInput:
        side, fields = self.config.data.side, self.parts.unet.num_metadata
        return ToTrainInput(side, fields, self.tokenizer)

    def _source(self, split: str):
        if split not in self.sources:
            source = open_pictures(self.config.data, split, has_text=bool(self.parts.text))
            made = self.maker.of(source, self.config.data) if self.maker else source
            self.sources[split] = made
        return self.sources[split]

    def train_source(self):
        return self._source("train")

    def transforms(self, split):
        return make_transforms(self.config.data, split, self.last_transform)

    # -- objective -------------------------------------------------------------------------

    def encode(self, batch):
        return self._encode(batch, self.frozen, self.tower)

    def _encode(self, batch, frozen, tower):
        """Pixels or moments -> latents; token ids or kept text -> context [B,S,D]."""
        made = {k: v for k, v in batch.items() if k not in RAW}
        if "pixels" in batch:
            pixels, index = batch["pixels"], batch["index"]
            made["latents"] = encode_latents(frozen, pixels, self.extract, index)
        else:
            mean, index = batch["mean"], batch["index"].astype(jnp.uint32)
            seed, logvar = np.uint32(self.extract.seed), batch.get("logvar")
            made["latents"] = draw_latents(frozen.codec, mean, logvar, index, seed)
        if "text" in batch:
            made["context"] = as_float(batch["text"])
        elif "ids" in batch:
            made["context"] = embed_ids(tower, batch["ids"])
        return made

    def _errors(self, params, batch, t, noise, seen=None):
        """Mean squared error per image [B], float32, of the prediction at times t [B].

        noise: what the target is made of; seen: what is added to the latents, if that is another.
        """
        latents, schedule = batch["latents"], self.frozen.schedule
        noisy = schedule.add_noise(latents, noise if seen is None else seen, t)
        target = schedule.training_target(latents, noise, t)
        context = batch.get("context", self.frozen.uncond)
        out, _ = self.unet.apply(
            {"params": params}, noisy, t.astype(jnp.float32), context, batch.get("metadata")
        )
        return jnp.mean((out.astype(jnp.float32) - target) ** 2, axis=(1, 2, 3))

    def loss(self, params, state, batch, key, phase):
        model, latents, schedule = self.config.model, batch["latents"], self.frozen.schedule
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch["index"].astype(jnp.uint32))
        parts = jax.vmap(lambda k: jax.random.split(k, 4))(keys)
        steps = schedule.num_train_timesteps
        t = jax.vmap(lambda k: jax.random.randint(k, (), 0, steps))(parts[:, 0])
        noise, seen = draw_noise(parts[:, 1], latents.shape[1:], model)
        given = dict(batch)
        if "metadata" in batch:
            fields = batch["metadata"]
            keep = _keep(parts[:, 2], model.metadata_dropout, fields.shape[1:])
            given["metadata"] = jnp.where(keep, fields, 0.0)
        if "context" in batch:
            text = batch["context"]
            keep = _keep(parts[:, 3], model.caption_dropout, (1, 1))
            given["context"] = jnp.where(keep, text, self.frozen.uncond.astype(text.dtype))
        errors = self._errors(params, given, t, noise, seen)
        weights = jnp.ones_like(errors)
        if model.min_snr_gamma:
            weights = schedule.min_snr_weight(t, model.min_snr_gamma, model.min_snr_mode)
        loss = jnp.sum(weights * errors)
        rows = jnp.float32(len(errors))
        return loss, rows, state, {"mse": (errors.sum(), rows)}

    def predict(self, params, state, batch, phase):
        """Unweighted error [B, len(EVAL_TIMES)] with noise fixed by the image's place."""
        shape, index = batch["latents"].shape[1:], batch["index"].astype(jnp.uint32)

        def at(time):
            base = jax.random.key(time)
            keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(index)
            noise = jax.vmap(lambda k: jax.random.normal(k, shape))(keys)
            return self._errors(params, batch, jnp.full((len(index),), time), noise)

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
        if not count:
            return
        images = self.sample(params, count, seed=self.config.seed)
        folder = Path(workdir) / "samples"
        folder.mkdir(exist_ok=True)
        save_grid(images, folder / f"{step:07d}.png")

    def sample(self, params, count: int, seed: int):
        """uint8 [count,S,S,3] drawn with the captions and metadata of held-out images.

        Of several processes one may call it: then it draws on the devices of its own.
        """
        rule, mesh, frozen, tower = self.config.eval, self.mesh, self.frozen, self.tower
        if jax.process_count() > 1:
            mesh = make_mesh(devices=jax.local_devices())
            frozen, tower, params = jax.device_put((*self.whole, params), replicated(mesh))
        batch = self._encode(self._held_out(count, mesh), frozen, tower)
        pixels = sample_images(
            frozen.replace(unet_params=params, context=batch.get("context", frozen.context)),
            SampleConfig(rule.sample_steps, rule.guidance, seed),
            index=batch["index"],
            side=self.config.data.side // frozen.codec.factor,
            metadata=batch.get("metadata"),
        )
        return to_uint8(np.asarray(pixels))[:count]

    def _held_out(self, count: int, mesh):
        """A batch of at least `count` validation rows, spread over all, repeated where too few."""
        ways, source = count_ways(mesh), self._source("val")
        rows = -(-count // ways) * ways
        picked = Subset(source, np.resize(spread_rows(len(source), rows), rows))
        loader = self.batches(picked, self.transforms("val"), batch_size=rows)
        return put_batch(next(loader), mesh)

    def embed(self, texts: Sequence[str]):
        """Context [n,S,D] of prompts; zeros without a text tower."""
        if self.tower is None:
            return np.repeat(self.frozen.uncond, len(texts), axis=0)
        return np.asarray(embed_ids(self.tower, self.tokenizer(texts)), np.float32)

    def sampler(self, workdir) -> Sampler:
        """What `launch.py sample` draws with: the parameters that a run scores."""
        mesh = make_mesh(devices=jax.local_devices())
        self.prepare(mesh, None)
        params = restore_trained(self, workdir, mesh).params
        return Sampler(self.frozen.replace(unet_params=params), self.embed, self.config.data.side)

    def report(self, params, state, results, workdir):
        (frozen, tower), folder = self.whole, Path(workdir) / "export"
        backbone = frozen.replace(unet_params=params)
        if self.config.model.vae_dtype != "float32":  # the export has the VAE as it was read
            backbone = backbone.replace(codec_params=load_codec_params(self.parts))
        if tower is None:
            export_backbone(folder, backbone, {p: frozen.uncond[0] for p in (PROMPT, "")})
        else:
            words = self.parts.folders["tokenizer"]
            text = self.parts.text, tower.params
            export_backbone(folder, backbone, {}, tower=text, tokenizer=words)


def draw_noise(keys, shape, model) -> tuple[jax.Array, jax.Array]:
    """(noise of the target, noise added to the latents) [B, *shape], one key a row.

    The same but for the two options of the published trainer: model.noise_offset adds a constant a
    channel to both, model.input_perturbation more noise to the second (arXiv 2301.11706).
    """

    def draw(number: int, shape):
        return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, number), shape))(keys)

    noise = jax.vmap(lambda k: jax.random.normal(k, shape))(keys)
    if model.noise_offset:
        noise = noise + model.noise_offset * draw(1, (1, 1, shape[-1]))
    if not model.input_perturbation:
        return noise, noise
    return noise, noise + model.input_perturbation * draw(2, shape)


def _keep(keys, dropout: float, shape) -> jax.Array:
    """bool [B, *shape], True with chance 1 - dropout, one key a row."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, 1 - dropout, shape))(keys)
