"""Fusers: taps of several keys and layers become one map per scale.

Features are a tuple over scales, fine -> coarse, each [B, T, H, W, C]: T keys, cleanest first, and
on C the taps of the scale side by side. `scales` is a tuple of objects with `side` and `channels`
(widths of the taps of the scale, in order). Every fuser returns (pyramid, aux): pyramid is a list
over scales of [B, H, W, P] float32, or of spatial means [B, P] when `pooled` (P = width).

Parameters (stacks as in bottlenecks.py; a group is a run of equally wide taps inside one scale, so
with the published taps group g is scale g):

    gw      mixing_weights [T*L]                 entry (t, l) at t*L + l, L taps in all, init 1
            bottleneck_layers_{g}/<stack of the taps of group g>
    lw      bottleneck_layers_{g}/<stack>
            gate_modules_{s}/gate_conv/{kernel [P, K_s], bias [K_s]}, entry (t, l) at t*L_s + l
    moe     scale_moes_{s}/experts/<stack of E>
            scale_moes_{s}/gate_network/{kernel [3, 3, C_s, E], bias [E]}
            scale_moes_{s}/temperature []
            state collection "moe": count [] int32 (optimiser steps, or module calls)
    concat  bottleneck_layers_{s}/<stack of 1, C = T*C_s>
    single  bottleneck_layers_0/<stack of 1>     one tap at one key, a pyramid of one level
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from common_jax.layers import declare
from satdifuser_jax.bottlenecks import (
    BottleneckStack,
    KernelBias,
    TapGroup,
    blend_stack,
    fold_keys,
    group_taps,
    project_stack,
)
from satdifuser_jax.experts import balance_loss, blend_chosen, choose_experts, gate_logits
from satdifuser_jax.residual_block import BlockShape


class _Projector(nn.Module):
    """Shared by the fusers that own one bottleneck per tap."""

    scales: tuple
    width: int = 384
    norm_groups: int = 32
    remat: bool = False
    dtype: Any = jnp.float32

    def stack(self, index: int, count: int, channels: int):
        """(static shape, parameters) of stack `index`."""
        how = {"dtype": self.dtype, "remat": self.remat}
        block = BlockShape(count, channels, self.width, self.norm_groups, **how)
        return block, BottleneckStack(block, name=f"bottleneck_layers_{index}")()

    def project_one(self, index: int, x, pooled: bool):
        """x [B, H, W, C] through a bottleneck of its own: [B, H, W, P], pooled [B, P]."""
        block, tree = self.stack(index, 1, x.shape[-1])
        y = project_stack(block, tree, x)[0]
        return y.mean(1) if pooled else unfold_positions(y, x[:, None], pooled)


def taps_of_group(features, group: TapGroup):
    """[B*T, H, W, L*C] of the taps of one group."""
    width = group.count * group.channels
    return fold_keys(features[..., group.offset : group.offset + width])


def unfold_positions(x, features, pooled: bool):
    """[B, H*W, P] -> [B, H, W, P] of the scale's features; pooled maps pass."""
    return x if pooled else x.reshape(x.shape[0], *features.shape[2:4], x.shape[-1])


class GlobalWeighted(_Projector):
    """X_s = sum over keys and taps of softmax(mixing_weights) * bottleneck(tap).

    aux: {"mixing" [T*L]}, the softmax.
    """

    @nn.compact
    def __call__(self, features, *, pooled=False, train=False, phase=None, mask=None):
        groups, (batch, keys) = group_taps(self.scales), features[0].shape[:2]
        taps = sum(group.count for group in groups)
        logits = declare(self, "mixing_weights", (keys * taps,))
        mixing = nn.softmax(logits.astype(jnp.float32))
        weights = mixing.reshape(keys, taps).T
        pyramid = [0.0] * len(self.scales)
        for index, group in enumerate(groups):
            block, tree = self.stack(index, group.count, group.channels)
            x = taps_of_group(features[group.scale], group)
            share = jnp.tile(weights[group.first : group.first + group.count], (1, batch))
            pyramid[group.scale] += blend_stack(block, keys, pooled, tree, x, share)
        return [unfold_positions(x, f, pooled) for x, f in zip(pyramid, features)], {
            "mixing": mixing
        }


class LocalWeighted(_Projector):
    """Softmax over keys and taps at every pixel, from a 1x1 convolution of their mean.

    lw_input: `own_tap`, or `first_tap`: all bottlenecks of a scale read its first tap (published).
    aux: {"gates"}, a list over scales of [B, H, W, K_s].
    """

    lw_input: str = "own_tap"

    @nn.compact
    def __call__(self, features, *, pooled=False, train=False, phase=None, mask=None):
        groups, pyramid, gates = group_taps(self.scales), [], []
        for s, scale in enumerate(self.scales):
            mine = [(i, group) for i, group in enumerate(groups) if group.scale == s]
            x = features[s]
            if self.lw_input == "first_tap":
                self._check_one_width(scale, mine)
                parts = [fold_keys(x[..., : scale.channels[0]])]
            else:
                parts = [taps_of_group(x, group) for _, group in mine]
            stacks = [self.stack(i, group.count, group.channels) for i, group in mine]
            entries = x.shape[1] * len(scale.channels)
            gate = _Gate(self.width, entries, name=f"gate_modules_{s}")()
            fuse = self._fuse_twice if self.remat else self._fuse
            fused, gated = fuse(stacks, gate, parts, x.shape[1], pooled)
            pyramid.append(unfold_positions(fused, x, pooled))
            gates.append(unfold_positions(gated, x, False))
        return pyramid, {"gates": gates}

    @staticmethod
    def _fuse(stacks, gate, parts, keys, pooled):
        """(fused [B, H*W, P] or its mean [B, P], gates [B, H*W, K]), from one run of the blocks."""
        maps = [project_stack(*stack, part) for stack, part in zip(stacks, parts)]
        y = maps[0] if len(maps) == 1 else jnp.concatenate(maps)
        y = y.reshape(y.shape[0], -1, keys, *y.shape[2:])  # [L, B, T, H*W, P]
        gated = nn.softmax(y.mean((0, 2)) @ gate["kernel"] + gate["bias"])
        weights = gated.reshape(*gated.shape[:2], keys, -1).transpose(3, 0, 2, 1)[..., None]
        fused = (y * weights).sum((0, 2))
        return (fused.mean(1) if pooled else fused), gated

    @staticmethod
    def _fuse_twice(stacks, gate, parts, keys, pooled):
        """The same without ever holding the projected maps: the blocks run for the mean, again
        for the weighted sum, and once more for the gradient of each."""
        taps = sum(block.count for block, _ in stacks)
        mean = 0.0
        for (block, tree), x in zip(stacks, parts):
            share = jnp.full((block.count, x.shape[0]), 1 / (taps * keys))
            mean += blend_stack(block, keys, False, tree, x, share)
        gated = nn.softmax(mean @ gate["kernel"] + gate["bias"])  # [B, H*W, K]
        b, positions, _ = gated.shape
        weights = gated.reshape(b, positions, keys, taps).transpose(3, 0, 2, 1)
        weights = weights.reshape(taps, b * keys, positions)
        fused, first = 0.0, 0
        for (block, tree), x in zip(stacks, parts):
            share = weights[first : first + block.count]
            fused += blend_stack(block, keys, pooled, tree, x, share)
            first += block.count
        return fused, gated

    @staticmethod
    def _check_one_width(scale, groups):
        if len(groups) > 1:
            raise ValueError(
                f"lw_input is first_tap but the taps of side {scale.side} have widths "
                f"{scale.channels}: it needs one width per scale. Take own_tap"
            )


class _Gate(nn.Module):
    width: int
    entries: int

    @nn.compact
    def __call__(self):
        return KernelBias((self.width, self.entries), name="gate_conv")()


class MixtureOfExperts(nn.Module):
    """Per scale, a gate picks among E bottlenecks for every image at every key; mean over keys.

    phase `dense`: all experts, softmax weights (warm-up). `sparse`: the top_k, evaluated alone.
    None: whichever the stored count says, key by key, at dense cost in one program.
    aux: use [S, T, E], batch means of the gate's softmax; routed [S, T, E], of the weights used;
    balance, the corrected balance loss.
    The count goes up by one per training call (`warmup="steps"`), or by one per key and call,
    evaluation included (`"calls"`, published); it moves only while "moe" is mutable.
    """

    scales: tuple
    width: int = 384
    norm_groups: int = 32
    num_experts: int = 8
    top_k: int = 2
    warmup: str = "steps"
    warmup_length: int = 300
    mesh: Any = None
    implementation: str = "auto"
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features, *, pooled=False, train=False, phase=None, mask=None):
        if phase not in ("dense", "sparse", None):
            raise ValueError(f"phase is {phase!r}: take dense, sparse or None")
        keys = features[0].shape[1]
        dense = self._count_call(keys, train)
        pyramid, shares, weights = [], [], []
        for s, x in enumerate(features):
            how = {"dtype": self.dtype, "remat": self.remat}
            shape = (self.num_experts, x.shape[-1], self.width, self.norm_groups)
            block = BlockShape(*shape, **how)
            moe = _ScaleExperts(block, name=f"scale_moes_{s}")()
            fused, share, weight = self._fuse(block, moe, x, (pooled, phase, dense))
            pyramid.append(unfold_positions(fused, x, pooled))
            shares.append(share.reshape(-1, keys, self.num_experts))
            weights.append(weight.reshape(-1, keys, self.num_experts))
        rows = jnp.ones(len(features[0])) if mask is None else mask.astype(jnp.float32)
        rows = rows / jnp.maximum(rows.sum(), 1)
        use = jnp.einsum("sbte,b->ste", jnp.stack(shares), rows)
        routed = jnp.einsum("sbte,b->ste", jnp.stack(weights), rows)
        return pyramid, {"use": use, "routed": routed, "balance": balance_loss(use)}

    def _count_call(self, keys: int, train: bool):
        """[T] bool, which keys of this call are still warming up; moves the count."""
        count = self.variable("moe", "count", jnp.zeros, (), jnp.int32)
        before, calls = count.value, self.warmup == "calls"
        if self.is_mutable_collection("moe") and not self.is_initializing():
            count.value = before + (keys if calls else int(train))
        reached = before + 1 + jnp.arange(keys) if calls else before + jnp.full(keys, int(train))
        return reached < self.warmup_length

    def _fuse(self, block, moe, features, how):
        """(fused [B, H*W, P] or [B, P], softmax of the gate [B*T, E], weights used [B*T, E])."""
        pooled, phase, dense = how
        b, keys = features.shape[:2]
        x = fold_keys(features)
        logits = gate_logits(x, **moe["gate"]) / moe["temperature"]
        share = nn.softmax(logits)
        top, chosen = choose_experts(logits, self.top_k)
        sparse = (nn.one_hot(chosen, self.num_experts) * top[..., None]).sum(1)
        if phase == "sparse":
            how = (block, keys, pooled, self.implementation, self.mesh)
            return blend_chosen(*how, moe["experts"], x, top / keys, chosen), share, sparse
        weights = share
        if phase is None:
            weights = jnp.where(jnp.tile(dense, b)[:, None], share, sparse)
        fused = blend_stack(block, keys, pooled, moe["experts"], x, weights.T / keys)
        return fused, share, weights


class _ScaleExperts(nn.Module):
    """Parameters of one scale of the mixture."""

    block: BlockShape

    @nn.compact
    def __call__(self):
        shape = (3, 3, self.block.channels, self.block.count)
        return {
            "experts": BottleneckStack(self.block, name="experts")(),
            "gate": KernelBias(shape, name="gate_network")(),
            "temperature": declare(self, "temperature", ()),
        }


class Concat(_Projector):
    """All keys and taps of a scale on one channel axis, then one bottleneck."""

    @nn.compact
    def __call__(self, features, *, pooled=False, train=False, phase=None, mask=None):
        pyramid = []
        for s, x in enumerate(features):
            joined = jnp.moveaxis(x, 1, 3).reshape(x.shape[0], *x.shape[2:4], -1)
            pyramid.append(self.project_one(s, joined, pooled))
        return pyramid, {}


class Single(_Projector):
    """One tap at one key through one bottleneck: a pyramid of a single level.

    single: (index among the keys, index among all taps).
    """

    single: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, features, *, pooled=False, train=False, phase=None, mask=None):
        key, tap = self.single
        places = [(s, i) for s, scale in enumerate(self.scales) for i in range(len(scale.channels))]
        keys = features[0].shape[1]
        if not (0 <= key < keys and 0 <= tap < len(places)):
            raise ValueError(
                f"single is {self.single}: there are {keys} keys and {len(places)} taps"
            )
        scale, index = places[tap]
        widths = self.scales[scale].channels
        offset = sum(widths[:index])
        x = features[scale][:, key, ..., offset : offset + widths[index]]
        return [self.project_one(0, x, pooled)], {}
