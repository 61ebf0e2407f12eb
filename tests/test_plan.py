from __future__ import annotations

import jax
import jax.numpy as jnp

from common_jax.plan import count, human_bytes, plan_table
from common_jax.task import PlanRow
from satdifuser_jax.unet import UNetConfig, unet_shapes


def test_parameters_tensors_and_bytes_are_counted_by_shape():
    shapes = {"a": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16), "b": jnp.zeros(5)}
    assert count(shapes) == (17, 2, 24 + 20)
    assert human_bytes(1536) == "1.5 KiB"


def test_the_table_shows_the_full_size_model_and_what_training_adds():
    rows = [
        PlanRow("unet", unet_shapes(UNetConfig.sd21(metadata=True)), note="frozen"),
        PlanRow("head", {"w": jnp.zeros(1000)}, trainable=True, extra_bytes={"cache": 2**20}),
    ]
    table = plan_table(rows)
    assert "880,264,644      714" in table
    assert "11.7 KiB" in table  # gradient and two moments
    assert "1.0 MiB" in table and "880,265,644      715" in table
