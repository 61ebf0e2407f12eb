"""Parts and sizes of a probe for `launch.py plan`: configs are read, no weight and no picture."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from common_jax.task import PlanRow
from satdifuser_jax.heads import head_shapes
from satdifuser_jax.inference import Labels


def plan_probe(task, known) -> list[PlanRow]:
    """Rows of a ProbeTask. known: data.catalog.Defaults of its dataset, which then need not exist.

    The task knows its labels by the name of the dataset afterwards.
    """
    data = task.config.data
    if known.native_side:
        task.labels = Labels(known.task, known.classes, known.native_side)
    backbone, spec = task.backbone, task.spec
    rows = [PlanRow("unet", backbone.unet_params, note="frozen")]
    if backbone.codec_params:
        rows.append(PlanRow("vae", backbone.codec_params, note="frozen"))
    taps = sum(s.side**2 * sum(s.channels) for s in spec.scales) * spec.num_keys
    latents = backbone.latent_side(task.side) ** 2 * backbone.unet.config.in_channels
    extra = {
        "cache=latents, per image": 4 * latents * spec.num_keys,
        f"cache=taps, per image ({data.cache_dtype})": taps
        * np.dtype(jnp.dtype(data.cache_dtype)).itemsize,
    }
    shapes = head_shapes(spec)["params"]
    return [*rows, PlanRow(f"head ({spec.fuser})", shapes, trainable=True, extra_bytes=extra)]
