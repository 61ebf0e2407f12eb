from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accelerator

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="says what happens without an accelerator"
)


def test_without_an_accelerator_every_case_is_told_as_not_measured(capsys):
    assert accelerator.main([]) == 0
    table = capsys.readouterr().out
    lines = [line for line in table.splitlines() if "GeoDiT" in line or "px" in line]
    assert len(lines) == 3 + 4 + 2
    assert all("not measured: no accelerator here" in line for line in lines)
    assert "MFU 50 %" in table


def test_weights_are_made_from_shapes_alone():
    shapes = {
        "w": jax.ShapeDtypeStruct((64, 64), jnp.bfloat16),
        "v": jax.ShapeDtypeStruct((64, 64), jnp.float32),
        "n": jax.ShapeDtypeStruct((3,), jnp.int32),
    }
    made = accelerator.fill(shapes)
    assert {k: (x.shape, x.dtype) for k, x in made.items()} == {
        k: (x.shape, x.dtype) for k, x in shapes.items()
    }
    assert np.std(np.asarray(made["w"], np.float32)) == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(made["w"].astype(jnp.float32), made["v"])
    assert not made["n"].any()
