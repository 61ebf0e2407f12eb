"""Arrays of every dtype, and what it means that a file gives them back."""

from __future__ import annotations

import ml_dtypes
import numpy as np


def assert_equal(found: dict, wanted: dict) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert found[name].read().tobytes() == np.ascontiguousarray(value).tobytes(), name
        assert found[name].read().shape == value.shape, name


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((3, 4)).astype(np.float32)
    return {
        "a.weight": wide,
        "b.half": wide.astype(np.float16),
        "c.bfloat": wide.astype(ml_dtypes.bfloat16),
        "d.count": np.array(7, np.int64),
        "e.empty": np.zeros((0, 5), np.float32),
        "f.flag": np.array([True, False]),
        "g.bytes": np.arange(5, dtype=np.uint8),
    }
