"""Heads: a fuser and a decoder on the taps of a frozen backbone.

    spec = HeadSpec(task="classification", fuser="gw", num_classes=10, scales=scales, num_keys=3)
    params, state = init_head(spec, seed=0)           # host arrays; state may be empty
    logits, aux = Head(spec).apply({"params": params, **state}, features)
    (logits, aux), new = Head(spec).apply({"params": params, **state}, features, train=True,
        phase="dense", mask=mask, keys=keys, mutable=["batch_stats", "moe"])
    state = {**state, **new}

features: tuple over scales, fine -> coarse, of [B, T, H, W, C]; the backbone is frozen, so they are
constants and no gradient flows into them. Logits are float32 [B, K], or
[B, output_side, output_side, K] for segmentation. `mask` [B] bool marks real rows: padded ones
enter no statistic. `keys` [B] one random key per row (channel dropout), needed when train and
dropout > 0. `phase` (moe only): "dense" | "sparse" | None; `moe_phase` tells which; None follows
the stored counter inside one program, at dense cost. `Head(spec, mesh=mesh)` routes sparse experts
on each device of a mesh separately.

Tree: params {"fuser": see fusers.py, "decoder": ...}, state {"batch_stats": {"decoder": ...},
"moe": {"fuser": {"count"}}, "feature_stats": {...}} with only the collections the head has.
On the right the names inside published state dicts:

    classification   decoder/linear/{kernel [P, K], bias [K]}      decoder_head.2
    segmentation     decoder/psp_modules_{i}/{conv, norm}          psp_modules.{i}.{1, 2}
                     decoder/bottleneck/{conv, norm}               bottleneck.{0, 1}
                     decoder/lateral_convs_{i}/{conv, norm}        lateral_convs.{i}.{0, 1}
                     decoder/fpn_convs_{i}/{conv, norm}            fpn_convs.{i}.{0, 1}
                     decoder/fpn_bottleneck/{conv, norm}           fpn_bottleneck.{0, 1}
                     decoder/conv_seg                              conv_seg
                     decoder/neck_ops_{i}/{up_0, norm, up_1}       neck.ops.{i}.{0, 1, 3}
                     (rescale 4; 2 has up_0 alone, others nothing; up kernels [2, 2, in, out])
    fuser "linear"   decoder/... and feature_stats/decoder/...     see linear_probe.py

conv: {kernel HWIO, bias}; norm: {scale, bias}, with batch_stats/decoder/<same>/norm/{mean, var}.
Published state dicts keep fuser and decoder names on one level: mixing_weights,
bottleneck_layers.{l}.0.{shortcut,conv1,conv2,conv3}.{weight,norm.weight,norm.bias},
gate_modules.{s}.gate_conv, scale_moes.{s}.{temperature,gate_network.0,experts.{e}.0...}: entry
l - first of the stack of group g is bottleneck_layers.{l}, entry e of experts is experts.{e}.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from common_jax.init import host_init, traced_once
from satdifuser_jax.fusers import Concat, GlobalWeighted, LocalWeighted, MixtureOfExperts, Single
from satdifuser_jax.linear_probe import LinearProbe
from satdifuser_jax.upernet import UPerNet, resize_bilinear

TASKS = ("classification", "multi_label_classification", "segmentation")
FUSERS = ("gw", "lw", "moe", "concat", "single", "linear")
WARMUP_LENGTHS = {"segmentation": 500}  # published, per task; 300 for the others


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """Everything static about a head.

    scales: tuple of taps.Scale, fine -> coarse; num_keys: T; output_side: side of the label maps.
    fuser `linear` is a linear probe: no fuser, statistics of the taps and one linear layer.
    warmup: what the moe counter counts, `steps` (optimiser steps) or `calls` (published: one per
    key and call, evaluation included); warmup_length None: 300, for segmentation 500.
    single: (key index, tap index among all taps) of fuser `single`.
    balance_weight: factor of aux["balance"] in the loss (published: 0, reported only).
    remat: keep only what a scale returns and recompute its maps in the backward pass.
    Raises ValueError naming the field for anything unusable.
    """

    task: str
    fuser: str
    num_classes: int
    scales: tuple
    num_keys: int
    projection_dim: int = 384
    norm_groups: int = 32
    output_side: int | None = None
    num_experts: int = 8
    top_k: int = 2
    warmup: str = "steps"
    warmup_length: int | None = None
    lw_input: str = "own_tap"
    single: tuple[int, int] = (0, 0)
    channels: int = 512
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    rescales: tuple[float, ...] | None = None
    dropout: float = 0.1
    ignore_index: int = -100
    balance_weight: float = 0.0
    remat: bool = False
    dtype: Any = "float32"

    def __post_init__(self):
        for field in ("scales", "pool_scales", "rescales", "single"):  # configs hand over lists
            value = getattr(self, field)
            object.__setattr__(self, field, None if value is None else tuple(value))
        choices = {"task": TASKS, "fuser": FUSERS, "warmup": ("steps", "calls")}
        choices["lw_input"] = ("own_tap", "first_tap")
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise ValueError(f"head {field} is {getattr(self, field)!r}: take one of {known}")
        if self.task == "segmentation" and not self.output_side:
            raise ValueError("a segmentation head needs output_side, the side of its label maps")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k is {self.top_k}: take 1 to num_experts={self.num_experts}")
        if self.num_classes < 1 or not self.scales:
            raise ValueError(f"num_classes={self.num_classes}, scales={self.scales}: none may be 0")

    @property
    def segments(self) -> bool:
        return self.task == "segmentation"

    @property
    def warmup_count(self) -> int:
        given = self.warmup_length
        return WARMUP_LENGTHS.get(self.task, 300) if given is None else given


def moe_phase(spec: HeadSpec, count: int, train: bool = True) -> str | None:
    """Static phase of a call made when the counter stands at `count`: "dense" or "sparse".

    None where the keys of one call straddle the end of warm-up (`warmup="calls"` only), and for
    heads without experts. Evaluation (`train=False`) uses the phase of the last training step.
    """
    if spec.fuser != "moe":
        return None
    if spec.warmup == "steps":
        return "dense" if count + int(train) < spec.warmup_count else "sparse"
    if count + spec.num_keys < spec.warmup_count:
        return "dense"
    return "sparse" if count + 1 >= spec.warmup_count else None


class Head(nn.Module):
    """Fuser and decoder of `spec`; see the top of this file for arguments and trees."""

    spec: HeadSpec
    mesh: Any = None

    @nn.compact
    def __call__(self, features, *, train=False, phase=None, mask=None, keys=None):
        spec = self.spec
        check_features(spec, features)
        features = tuple(jax.lax.stop_gradient(jnp.asarray(x)) for x in features)
        if spec.fuser == "linear":
            side = spec.output_side if spec.segments else None
            probe = LinearProbe(spec.num_classes, side, name="decoder")
            return probe(features), {}
        pooled = not spec.segments and self._pools_exactly(features)
        fuser = make_fuser(spec, self.mesh)
        maps, aux = fuser(features, pooled=pooled, train=train, phase=phase, mask=mask)
        if spec.segments:
            decoder = UPerNet(
                spec.num_classes,
                spec.output_side,
                spec.channels,
                spec.pool_scales,
                spec.rescales,
                spec.dropout,
                jnp.dtype(spec.dtype),
                name="decoder",
            )
            return decoder(maps, train=train, mask=mask, keys=keys), aux
        if not pooled:
            maps = [resize_bilinear(x, maps[0].shape[1:3]).mean((1, 2)) for x in maps]
        return Classifier(spec.num_classes, name="decoder")(sum(maps)), aux

    @staticmethod
    def _pools_exactly(features) -> bool:
        """Resizing bilinearly by a whole factor keeps the mean: then maps need not be resized."""
        finest = features[0].shape[2]
        return all(finest % x.shape[2] == 0 for x in features)


class Classifier(nn.Module):
    """Mean map [B, P] to logits [B, K]."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes, name="linear")(x)


def make_fuser(spec: HeadSpec, mesh=None) -> nn.Module:
    """The fuser of `spec`, named "fuser"."""
    shared = {
        "scales": spec.scales,
        "width": spec.projection_dim,
        "norm_groups": spec.norm_groups,
        "remat": spec.remat,
        "dtype": jnp.dtype(spec.dtype),
        "name": "fuser",
    }
    if spec.fuser == "lw":
        return LocalWeighted(**shared, lw_input=spec.lw_input)
    if spec.fuser == "single":
        return Single(**shared, single=spec.single)
    if spec.fuser == "moe":
        return MixtureOfExperts(
            **shared,
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            warmup=spec.warmup,
            warmup_length=spec.warmup_count,
            mesh=mesh,
        )
    return {"gw": GlobalWeighted, "concat": Concat}[spec.fuser](**shared)


def feature_shapes(spec: HeadSpec, batch: int) -> tuple:
    """Abstract features of a head."""
    return tuple(
        jax.ShapeDtypeStruct(
            (batch, spec.num_keys, scale.side, scale.side, sum(scale.channels)), jnp.float32
        )
        for scale in spec.scales
    )


def check_features(spec: HeadSpec, features) -> None:
    """Raises ValueError naming the scale whose taps are not those of the head (any side fits)."""
    wanted = [(spec.num_keys, sum(scale.channels)) for scale in spec.scales]
    found = [(x.shape[1], x.shape[-1]) for x in features]
    if found != wanted:
        raise ValueError(
            f"features have (keys, channels) {found} over their scales, but the head is built for "
            f"{wanted}: extract with the keys and taps of the head, or train a new one"
        )


@traced_once
def head_shapes(spec: HeadSpec) -> dict:
    """Abstract variables of a head by collection, nothing allocated."""
    key = jax.eval_shape(jax.random.key, 0)
    return jax.eval_shape(Head(spec).init, key, feature_shapes(spec, 2))


def init_head(spec: HeadSpec, seed: int) -> tuple[dict, dict]:
    """(params, state) as host arrays with the published initial values.

    Bottlenecks: normal with variance 2 / fan_out, norms 1 and 0. Mixing weights and temperatures 1.
    Everything else uniform within 1/sqrt(fan_in), biases too (that of a probe of maps is 0).
    """
    shapes = dict(head_shapes(spec))
    rules = [
        (r"/(shortcut|conv[123])/kernel$", _draw_fan_out),
        (r"mixing_weights$|temperature$", lambda rng, shape: np.ones(shape, np.float32)),
        (r"^decoder/bias$", lambda rng, shape: np.zeros(shape, np.float32)),
    ]
    params = host_init(shapes.pop("params"), seed, rules)
    return params, jax.tree_util.tree_map_with_path(_start_state, shapes)


def _draw_fan_out(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Stacked kernel [L, (3, 3,) C, D]: fan_out = D times the window."""
    fan_out = shape[-1] * int(np.prod(shape[1:-2]))
    return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / fan_out))


def _start_state(path, leaf) -> np.ndarray:
    ones = path[-1].key in ("var", "std")
    return np.full(leaf.shape, int(ones), leaf.dtype)
