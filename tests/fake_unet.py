"""A network whose answers are known in closed form, in a backbone."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from satdifuser_jax.extract import Backbone
from satdifuser_jax.schedule import Schedule
from satdifuser_jax.taps import Scale
from satdifuser_jax.unet import UNetConfig
from satdifuser_jax.vae import SpaceToDepth

SCHEDULE = Schedule()
TINY = UNetConfig(
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=24,
    attention_head_dim=(2, 4),
    norm_num_groups=8,
    sample_size=8,
)
FAKE_SCALES = (Scale(4, ("seen",), (3,)),)


class FakeUNet(nn.Module):
    """echo: (0.1 + context + 10 metadata) x + 1e-4 t; velocity: the v of one (z, noise) pair.

    The tap "seen" holds t, the context's mean and the metadata's mean. `traces` counts tracings.
    """

    config: UNetConfig = TINY
    kind: str = "echo"

    @nn.compact
    def __call__(self, x, t, context, metadata=None, taps=()):
        FakeUNet.traces = getattr(FakeUNet, "traces", 0) + 1
        over = (slice(None), None, None, None)
        context = jnp.broadcast_to(context.mean((1, 2)), t.shape)
        extra = jnp.zeros_like(t) if metadata is None else metadata.mean(1)
        seen = jnp.stack([t, context, extra], -1)
        seen = jnp.broadcast_to(seen[:, None, None], (*x.shape[:3], 3))
        if self.kind == "velocity":
            z, noise = (self.param(k, nn.initializers.zeros, x.shape[1:]) for k in ("z", "noise"))
            return SCHEDULE.velocity_target(z[None], noise[None], t), {}
        scale = (0.1 + context + 10 * extra)[over]
        return scale * x + 1e-4 * t[over], {name: seen for name in taps}


def fake(kind="echo", params=None, **config) -> Backbone:
    """A FakeUNet behind 2x2 space-to-depth; context 0.02, that of the empty prompt -0.03."""
    return Backbone(
        unet=FakeUNet(dataclasses.replace(TINY, **config), kind),
        unet_params=params or {},
        codec=SpaceToDepth(2),
        codec_params={},
        schedule=SCHEDULE,
        context=jnp.full((1, 2, 24), 0.02),
        uncond=jnp.full((1, 2, 24), -0.03),
    )
