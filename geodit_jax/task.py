"""Training of GeoDiT as a Task: alignment of the projector, instruction tuning, text pretraining.

Masked diffusion (Nie et al. 2025, LLaDA): targets of a sequence are replaced by the mask token with
a chance that is drawn for each sequence, and the text core, which sees everything in both
directions, says what stood there. B sequences, S positions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from common_jax.lora import TRAINABLE, add_adapters, merge_adapters
from common_jax.sharding import count_ways, merge_trees, split_tree, tree_shardings
from common_jax.task import Evaluator, PlanRow, Task
from data.record_catalog import RecordSets, named_sets
from data.records import mix
from data.scene_records import KINDS, scene_texts
from geodit_jax import llada
from geodit_jax.config import GeoDiTConfig, find_size
from geodit_jax.convert import export_model, load_model, read_folder_config
from geodit_jax.flops import count_training_flops
from geodit_jax.instruct import (
    SHORTENED,
    ExampleSpec,
    PackedText,
    ToExample,
    ToTextBlock,
    texts_of,
)
from geodit_jax.masking import IGNORED, Loss, Masks, complement, draw_masks, masked_loss
from geodit_jax.model import SHARDING_RULES, encode_images, init_model, merge, model_shapes
from geodit_jax.prompts import load_prompts
from geodit_jax.sketch import sketch_run
from geodit_jax.tokenizer import Tokenizer

STAGES = {"align": r"^projector/", "sft": ".*", "pretrain": r"^core/"}
"""Which parameters each stage trains."""
EVAL_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Validation looks at the same times and masks every time, so that its loss is smooth."""
MOST_TEXTS = 20_000  # records whose texts a new tokenizer is made from
SCENES = 300  # the same for scenes, which give all their texts at once
SCENE_KINDS = {"align": ("caption",)}  # of scenes as records, where a stage wants not all


class GeoDiTTask(Task):
    """The masked-diffusion objective on records of any source."""

    sharding_rules = SHARDING_RULES
    selection = "loss"

    def __init__(self, config):
        super().__init__(config)
        stage = config.train.stage
        if stage not in STAGES:
            raise ValueError(f"train.stage={stage!r}: use one of {', '.join(STAGES)}")
        if config.lora.rank and stage == "align":
            raise ValueError("lora.rank: use train.stage=sft or pretrain; align trains no core")
        self.trainable = TRAINABLE if config.lora.rank else STAGES[stage]
        self.found = read_model(config.model)
        self.model = choose_model(self.found, config.model, text_only=stage == "pretrain")
        self.dtype = jnp.dtype(config.model.dtype)
        self.mesh = None
        if stage == "align" and self.model.tower is None:
            raise ValueError("train.stage=align trains the projector; this model has none")
        if config.optim.tower_lr:
            self.lr_factors = ((r"^tower/", config.optim.tower_lr / config.optim.lr),)

    # -- parameters ------------------------------------------------------------------------

    def prepare(self, mesh, batches):
        self.mesh = mesh

    def init(self, seed):
        """Trained parameters are float32; frozen ones have the type that the model computes in."""
        model = self.config.model
        shapes = model_shapes(self.found if model.weights else self.model)
        where = self.mesh and tree_shardings(shapes, self.sharding_rules, self.mesh)
        if model.weights:
            params, *_ = load_model(
                model.weights,
                tower_folder=model.tower_weights or None,
                shardings=where,
                tokens=read_tokens(model),
                seed=seed,
            )
        else:
            params = init_model(self.model, seed, where)
        return self._arrange({name: params[name] for name in model_shapes(self.model)}, seed), {}

    def _arrange(self, params, seed):
        """With adapters where they are asked for, and every leaf in its type."""
        lora = self.config.lora
        if lora.rank:
            options = lora.targets, lora.rank, lora.alpha, seed
            params = params | {"core": add_adapters(params["core"], *options)}
        wide, rest = split_tree(params, f"{self.trainable}|/lora_scale$")
        return merge_trees(_cast(rest, self.dtype), _cast(wide, jnp.float32))

    def shapes(self):
        """Abstract parameters, as `init` makes them."""
        return jax.eval_shape(lambda params: self._arrange(params, 0), model_shapes(self.model))

    sketch = sketch_run

    def plan(self):
        rows = []
        for name, part in self.shapes().items():
            trained, frozen = split_tree({name: part}, self.trainable)
            if frozen:
                rows.append(PlanRow(name, frozen, note="frozen"))
            if trained:
                name = f"{name} adapters" if frozen else name
                rows.append(PlanRow(name, trained, trainable=True))
        return rows

    # -- data ------------------------------------------------------------------------------

    @functools.cached_property
    def prompts(self):
        return load_prompts(self.config.data.prompts or None)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """That of the weights; for a model from scratch, one made from the training texts."""
        model, codec = self.config.model, self.config.data.codec
        folder = model.tokenizer or model.weights
        if folder:
            return Tokenizer.load(folder, self.model.tokens)
        texts: list[str] = []
        for source in self.sets.open("train"):
            if source.name == "scenes":  # a scene gives all its texts at once, a record only one
                count = min(SCENES, len(source))
                texts += scene_texts(count, render=lambda r: texts_of([r], self.prompts, codec))
            else:
                texts += texts_of(source.records[:MOST_TEXTS], self.prompts, codec)
        return Tokenizer.train(texts, self.model.tokens.size)

    @functools.cached_property
    def sets(self) -> RecordSets:
        """Sets for validation may be others than those of training."""
        data, tower = self.config.data, self.model.tower
        scenes = {
            "side": data.side or (tower.image_size if tower else 64),
            "kinds": tuple(data.kinds) or SCENE_KINDS.get(self.config.train.stage, KINDS),
            "max_boxes": data.max_boxes,
        }
        named = {"train": named_sets(data.name, data.root)}
        if data.val != "none":
            named["val"] = named_sets(data.val or data.name, data.val_root or data.root)
        options = {"keep": data.keep, "on_bad": data.on_bad}
        return RecordSets(named, {"train": data.size, "val": data.val_size}, options, scenes)

    def _source(self, split: str):
        data = self.config.data
        weights = data.weights if split == "train" else ()
        records = mix(self.sets.open(split), weights or None)
        if self.config.train.stage != "pretrain":
            return records
        texts = texts_of(records.records, self.prompts, data.codec)
        return PackedText(texts, self.tokenizer, data.text_length)

    def train_source(self):
        return self._source("train")

    def transforms(self, split):
        data, train, answer = self.config.data, self.config.train, self.config.answer
        if train.stage == "pretrain":
            shortened = SHORTENED if split == "train" else 0.0
            return (ToTextBlock(data.text_length, self.model.tokens.eos, shortened),)
        windows = {
            "caption": answer.caption,
            "grounding": answer.grounding,
            "detection": answer.detection,
            "vqa": answer.vqa,
            "classification": answer.classification,
            "chat": answer.chat,
        }
        spec = ExampleSpec(
            text_length=data.text_length,
            answer_lengths={} if train.stage == "align" else windows,
            label_policy=train.label_policy,
            codec=data.codec,
            on_long=data.on_long,
            sight="prefix" if self.model.prefix_lm else "turns" if train.turn_mask else "all",
            system=data.system,
            plain=train.stage == "align",
            blind=data.blind,
        )
        return (ToExample(self.model, self.tokenizer, self.prompts, spec),)

    # -- objective -------------------------------------------------------------------------

    def loss(self, params, state, batch, key, phase):
        train, rows = self.config.train, len(batch["ids"])
        targets = batch["labels"] != IGNORED
        masks = draw_masks(
            key,
            batch["index"],
            targets,
            group=self.config.batch_size if train.antithetic else 1,
            at_least_one=train.at_least_one,
        )
        images = self._see(params, batch)
        if train.complementary:
            other = complement(masks, targets)
            masks = Masks(*map(_side_by_side, masks, other))
            batch, images = jax.tree.map(lambda x: _side_by_side(x, x), (dict(batch), images))
        found = self._score(params, batch, images, masks)
        masked = masks.where.sum()
        metrics = {
            "nll": (found.nll.sum(), masked),
            "accuracy": (found.hits.sum(), masked),
            "cut": (batch["cut"].sum(), batch["cut"].size),
        }
        return found.total * rows / len(masks.p), jnp.float32(rows), state, metrics

    def _see(self, params, batch):
        """Projected tokens [B,R,D] of the pictures; None without pictures."""
        if "pixels" not in batch:
            return None
        remat = self.config.model.remat
        return encode_images(params, self.model, batch["pixels"], self.dtype, remat=remat)

    def _score(self, params, batch, images, masks: Masks) -> Loss:
        """The loss where the targets of `masks` are hidden."""
        model, train = self.config.model, self.config.train
        ids = jnp.where(masks.where, self.model.tokens.mask, batch["ids"])
        places = batch.get("image_rows"), batch.get("image_weights")
        x = merge(params, self.model, ids, images, *places, dtype=self.dtype)
        limited = train.turn_mask or self.model.prefix_lm
        turns = (batch["turns"], batch["turns"]) if limited else None
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        hidden, _ = llada.run(
            params["core"],
            self.model.text,
            x,
            positions,
            seen=llada.Seen(batch["length"], turns),
            remat=model.remat,
        )
        return masked_loss(
            params["core"],
            hidden,
            batch["labels"],
            masks,
            weighting=train.loss_weighting,
            groups=math.gcd(len(ids), count_ways(self.mesh) if self.mesh else 1),
        )

    def predict(self, params, state, batch, phase):
        """[B, len(EVAL_TIMES), 3] float32: loss, right and masked targets of each time."""
        targets = batch["labels"] != IGNORED
        images = self._see(params, batch)

        def at(number):
            key = jax.random.fold_in(jax.random.key(0), number)
            t = jnp.full(len(targets), jnp.asarray(EVAL_TIMES)[number])
            masks = draw_masks(key, batch["index"], targets, t=t)
            found = self._score(params, batch, images, masks)
            scale = jnp.maximum(targets.sum(1), 1) * masks.p
            parts = found.nll.sum(1) / scale, found.hits.sum(1), masks.where.sum(1)
            return jnp.stack([part.astype(jnp.float32) for part in parts], axis=-1)

        found = jax.lax.map(at, jnp.arange(len(EVAL_TIMES)))
        return jnp.swapaxes(found, 0, 1), state

    def evaluators(self):
        if self.config.data.val == "none":
            return {}

        def update(parts, batch):
            real = parts[batch["mask"]].astype(np.float64)
            return np.insert(real.sum(0), 3, len(real), axis=1)

        def finish(sums):
            loss, hits, masked, rows = sums.T
            by_time = {f"loss_t{t}": float(x) for t, x in zip(EVAL_TIMES, loss / rows)}
            accuracy = float(hits.sum() / max(masked.sum(), 1))
            return {"loss": float((loss / rows).mean()), "accuracy": accuracy, **by_time}

        return {"val": Evaluator(self._source("val"), self.transforms("val"), update, finish)}

    # -- sizes and results -----------------------------------------------------------------

    def flops(self):
        data, train = self.config.data, self.config.train
        given = self.model, data.text_length, "adapters" if self.config.lora.rank else train.stage
        return {"train": count_training_flops(*given, data.blind, train.complementary)}

    def report(self, params, state, results, workdir):
        """The model in WORKDIR/export, in the layout of LLaDA-V, with its tokenizer."""
        model, out = self.config.model, Path(workdir) / "export"
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save(folder)
            source = model.tokenizer or model.weights or folder
            export_model(out, merge_adapters(params), self.model, source, dtype=self.dtype)


def _cast(tree, dtype):
    """Arrays of `dtype`, on the host or where they are."""
    return jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), tree)


def _side_by_side(one, other):
    """[B,...] twice -> [2B,...], copies of a row together: they stay on their device."""
    return jnp.stack([one, other], axis=1).reshape(-1, *one.shape[1:])


def read_tokens(model):
    """Special ids of `model.tokenizer`; None: the weights tell."""
    return Tokenizer.load(model.tokenizer).ids if model.tokenizer else None


def read_model(model) -> GeoDiTConfig:
    """The model that lies in `model.weights`, else the one that is called `model.size`."""
    if not model.weights:
        return find_size(model.size)
    tower = model.tower_weights or None
    return read_folder_config(model.weights, tower_folder=tower, tokens=read_tokens(model))


def choose_model(found: GeoDiTConfig, model, text_only: bool) -> GeoDiTConfig:
    """`found` with what the config wants otherwise."""
    return dataclasses.replace(
        found,
        tower=None if text_only else found.tower,
        image_mode=model.image_mode or found.image_mode,
        merge=model.merge or found.merge,
        prefix_lm=model.prefix_lm or found.prefix_lm,
    )
