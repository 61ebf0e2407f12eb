"""SatDiFuser as a Task: a frozen diffusion model, a fuser and a decoder on its taps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from common_jax.metric_log import say
from common_jax.metrics import count_confusion, count_multilabel, score
from common_jax.task import Evaluator, Task
from data.catalog import SCENES, defaults, open_source
from data.folders import open_pictures
from data.pipeline import eval_batches
from data.transforms import PublishedAugment
from satdifuser_jax.backbone import BackboneFolder, place_backbone, small_backbone
from satdifuser_jax.convert_heads import load_head
from satdifuser_jax.extract import Backbone
from satdifuser_jax.extract_config import NO_GUIDANCE, ExtractConfig
from satdifuser_jax.feature_source import CachedExamples, FeatureMaker, ToProbeInput
from satdifuser_jax.heads import Head, HeadSpec, init_head, moe_phase
from satdifuser_jax.inference import (
    Labels,
    extract_pictures,
    predict_pictures,
    remember_labels,
)
from satdifuser_jax.linear_probe import feature_stats
from satdifuser_jax.losses import head_loss
from satdifuser_jax.probe_plan import plan_probe
from satdifuser_jax.probe_report import write_report
from satdifuser_jax.sketch import count_training_flops, sketch_probe
from satdifuser_jax.sweep import sweep_taps
from satdifuser_jax.taps import select_taps

SELECTION = {
    "classification": "accuracy",
    "multi_label_classification": "micro_f1",
    "segmentation": "miou",
}
SPLITS = ("train", "val", "test")


class ProbeTask(Task):
    """Features of a frozen backbone -> fuser -> classifier or UPerNet."""

    sharding_rules = ((r"", ()),)  # heads are small: each device has its own

    def __init__(self, config):
        super().__init__(config)
        self.maker: FeatureMaker | None = None
        self.cached: dict[str, CachedExamples] = {}
        self.counts: dict[str, np.ndarray] = {}  # of the last evaluation, for the figures

    # -- what the run is about -------------------------------------------------------------

    @functools.cached_property
    def sources(self) -> dict:
        """Examples with pictures, by split."""
        return {split: self._open(split) for split in SPLITS}

    def _open(self, split: str):
        data = self.config.data
        options: dict = {"label_fraction": data.label_fraction, "label_seed": self.config.seed}
        if data.name in ("scenes", "scenes_seg"):
            size = data.size if split == "train" else data.eval_size
            options |= {"size": size, "side": data.side or 64}
        elif data.name in ("folder", "masks"):
            folders = {"train": data.train, "val": data.val, "test": data.test}
            options |= {**folders, "on_corrupt": data.on_corrupt}
            if data.name == "masks":
                options["fit"] = data.fit
        elif data.name.startswith("m-"):
            options["scaling"] = data.scaling
        return open_source(data.name, split, **options)

    @functools.cached_property
    def labels(self) -> Labels:
        """Kind of task, classes, native side; a trained head remembers them without its data."""
        source = self.sources["train"]
        return Labels(source.task, tuple(source.classes), source.native_side)

    @functools.cached_property
    def asked_side(self) -> int:
        """Pixels given to the backbone: asked for or the dataset's; 0 = no preference."""
        return self.config.data.side or defaults(self.config.data.name).side

    @functools.cached_property
    def side(self) -> int:
        """Pixels given to the backbone; without preference those of the images, rounded up."""
        multiple = self.backbone.image_multiple
        return self.asked_side or -(-self.labels.native_side // multiple) * multiple

    @property
    def prompt(self) -> str:
        return self.config.model.prompt or defaults(self.config.data.name).prompt

    @functools.cached_property
    def folder(self) -> BackboneFolder:
        model, data = self.config.model, self.config.data
        return BackboneFolder(
            model.weights,
            resolution=self.asked_side or None,
            prompt=self.prompt,
            prompt_cache=model.prompt_cache or f"{data.cache_dir}/prompts",
            untrained_seed=self.config.seed if model.untrained else None,
            use_metadata=model.metadata != "none",
            is_guided=model.guidance_scale != NO_GUIDANCE,
            dtype=model.dtype,
        )

    @functools.cached_property
    def backbone(self) -> Backbone:
        """The frozen model by its shapes; `open_backbone` reads its weights."""
        is_given = self.config.model.weights
        return self.folder.shapes() if is_given else small_backbone(self.config.seed)

    def load_backbone(self, mesh) -> Backbone:
        """The frozen model on a mesh; each process reads only what lies on its devices."""
        if self.config.model.weights:
            return self.folder.load(mesh)
        say("model.weights is empty: a small UNet with random weights stands in")
        return place_backbone(self.backbone, mesh)

    @functools.cached_property
    def extract_config(self) -> ExtractConfig:
        model, backbone = self.config.model, self.backbone
        layers = {group: dict(modules) for group, modules in model.layers.items()}
        scales = select_taps(backbone.unet.config, layers, backbone.latent_side(self.side))
        timesteps = tuple(model.timesteps) or None
        return ExtractConfig(
            mode=model.mode,
            keys=None if timesteps else tuple(model.save_timesteps),
            timesteps=timesteps,
            num_timesteps=model.num_timesteps,
            prediction_type=model.prediction_type,
            guidance_scale=model.guidance_scale,
            scales=scales,
            metadata=model.metadata,
            posterior=model.posterior,
            seed=self.config.seed,
            dtype=model.dtype,
        )

    @functools.cached_property
    def spec(self) -> HeadSpec:
        model, labels = self.config.model, self.labels
        segments = labels.task == "segmentation"
        return HeadSpec(
            task=labels.task,
            fuser=model.fuser,
            num_classes=len(labels.classes),
            scales=self.extract_config.scales,
            num_keys=len(self.times),
            projection_dim=model.projection_dim,
            norm_groups=min(32, model.projection_dim // 4),
            output_side=labels.native_side if segments else None,
            num_experts=model.num_experts,
            top_k=model.top_k,
            warmup=model.warmup,
            warmup_length=self._warmup_length(),
            lw_input=model.lw_input,
            single=tuple(model.single),
            channels=model.channels,
            dropout=model.dropout,
            ignore_index=model.ignore_index,
            balance_weight=model.balance_weight,
            remat=model.remat,
        )

    def _warmup_length(self) -> int | None:
        """None leaves the published number of calls; every step makes one call a key."""
        model = self.config.model
        if model.warmup_length or model.warmup == "calls":
            return model.warmup_length or None
        segments = self.labels.task == "segmentation"
        return (500 if segments else 300) // len(self.times)

    @property
    def times(self) -> tuple[int, ...]:
        return self.extract_config.times(self.backbone.schedule)

    @property
    def selection(self) -> str:
        return SELECTION[self.spec.task]

    @property
    def accumulates(self) -> bool:
        """ValueError where it is a mixture of experts that cannot, with the reason."""
        model = self.config.model
        if model.fuser == "moe" and (model.warmup == "calls" or model.balance_weight):
            name, why = "model.warmup=calls", "counts every microbatch as a call"
            if model.balance_weight:
                name, why = "model.balance_weight", "looks at the use of experts in a whole batch"
            raise ValueError(
                f"{name} {why}: in microbatches it would be another training. Use "
                f"optim.accumulate=1, or {'0' if model.balance_weight else 'steps'} there"
            )
        return not self.spec.segments  # UPerNet has BatchNorm

    # -- seam ------------------------------------------------------------------------------

    def open_backbone(self, mesh) -> FeatureMaker:
        """Read the frozen model onto a mesh; `encode` and `predict` work from here on."""
        data = self.config.data
        cache = {"kind": data.cache, "dir": data.cache_dir, "dtype": data.cache_dtype}
        cache["workers"] = data.workers
        self.mesh = mesh
        self.maker = FeatureMaker(self.load_backbone, self.extract_config, mesh, cache)
        return self.maker

    def prepare(self, mesh, batches):
        data = self.config.data
        if data.cache != "none" and data.augment != "none":
            raise ValueError(
                f"data.augment={data.augment} changes the pixels of every epoch, a cache keeps "
                "those of one; use --config.data.cache=none"
            )
        self.open_backbone(mesh)
        size = self.config.eval.batch_size or self.config.batch_size
        self.batches = functools.partial(batches, batch_size=size)
        for split, source in self.sources.items():
            self.cached[split] = self.maker.cached(source, self.side, batches, size)

    def train_source(self):
        return self.cached["train"]

    def transforms(self, split):
        if self.config.data.cache != "none":
            return ()
        last = ToProbeInput(self.side, self.config.model.metadata == "record")
        augment = self.config.data.augment
        if augment not in ("none", "published"):
            raise ValueError(f"data.augment={augment!r} is unknown; use none or published")
        return (PublishedAugment(), last) if augment != "none" and split == "train" else (last,)

    def init(self, seed):
        if self.config.model.head:
            return load_head(self.config.model.head, self.spec)
        params, state = init_head(self.spec, seed)
        if self.spec.fuser == "linear":
            examples = self.batches(self.cached["train"], self.transforms("val"))
            stats = feature_stats(map(self.encode, examples), segments=self.spec.segments)
            state = {"feature_stats": stats}
        return params, state

    def encode(self, batch):
        kept = {k: batch[k] for k in ("label", "mask", "index") if k in batch}
        return kept | {"features": self.maker.features(batch)}

    def phase(self, step, train=True):
        if self.spec.fuser != "moe" or self.spec.warmup == "calls":
            return None  # `calls` counts evaluations too: the program reads its own counter
        return moe_phase(self.spec, step, train)

    def apply(self, params, state, batch, phase, *, train=False, keys=None):
        """((logits, aux), new state) of the head."""
        changes = [name for name in state if name in ("batch_stats", "moe")]
        variables = {"params": params, **state}
        (logits, aux), new = Head(self.spec, self.mesh).apply(
            variables,
            batch["features"],
            train=train,
            phase=phase,
            mask=batch.get("mask"),
            keys=keys,
            mutable=changes,
        )
        return (logits, aux), {**state, **new}

    def loss(self, params, state, batch, key, phase):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch["index"].astype(jnp.uint32))
        (logits, aux), state = self.apply(params, state, batch, phase, train=True, keys=keys)
        labels = batch["label"]
        if self.spec.task != "multi_label_classification":
            labels = labels.astype(jnp.int32)
        loss, weight = head_loss(self.spec, logits, aux, labels)
        return loss, weight, state, {}

    def predict(self, params, state, batch, phase):
        (logits, _), state = self.apply(params, state, batch, phase)
        return (jnp.argmax(logits, -1) if self.spec.segments else logits), state

    def evaluators(self):
        def finish(split, counts):
            self.counts[split] = counts
            return score(counts, self.spec.task)

        return {
            split: Evaluator(
                self.cached[split],
                self.transforms(split),
                self._count,
                functools.partial(finish, split),
            )
            for split in ("val", "test")
        }

    def _count(self, outputs, batch):
        spec = self.spec
        if spec.task == "multi_label_classification":
            return count_multilabel(outputs > 0, batch["label"], batch["mask"])
        predicted = outputs if spec.segments else outputs.argmax(-1)
        return count_confusion(
            batch["label"], predicted, spec.num_classes, batch["mask"], spec.ignore_index
        )

    def plan(self):
        return plan_probe(self, defaults(self.config.data.name))

    def sketch(self, mesh, rows):
        return sketch_probe(self, mesh, rows)

    def flops(self):
        return count_training_flops(self, self.config.batch_size)

    def draws(self):
        return False

    def during(self, step, params, workdir):
        if jax.process_index() == 0:
            remember_labels(workdir, self.labels, self.maker.model)

    def report(self, params, state, results, workdir):
        write_report(self, params, state, workdir)

    # -- other verbs of launch.py ----------------------------------------------------------

    def extract(self, images: str, out: str, file_format: str) -> int:
        """Write the features of pictures, without head and labels."""
        data = self.config.data
        pictures = open_pictures(images, data.on_corrupt)
        self.labels = Labels("images", (), pictures.native_side)
        if data.name in SCENES:  # no dataset was named: pictures keep their own size
            self.asked_side = data.side
        return extract_pictures(self, pictures, eval_batches, out, file_format)

    def predict_images(self, workdir: str, images: str, out: str | None = None) -> int:
        """Write what the trained head says of pictures: probabilities, or label maps."""
        pictures = open_pictures(images, self.config.data.on_corrupt)
        return predict_pictures(self, workdir, pictures, eval_batches, out)

    def sweep(self, workdir: str, axes) -> int:
        """Score single taps and timesteps by linear probes."""
        return sweep_taps(self, workdir, axes, eval_batches)
