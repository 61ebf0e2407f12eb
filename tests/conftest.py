"""Fixtures every test may use. Golden vectors and real images come from the environment."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes most of the suite's time, and tests run each program a few times only: without
# most of the optimisations for speed the programs are the same and are made in half the time. In
# one piece a program is made with less computing than in several by several threads.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
# Workers of pytest-xdist and subprocesses of tests compile the same small programs: share them.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import pytest
from absl import flags

# Tracing makes millions of objects that stay; to look for garbage among them takes a tenth of it.
gc.set_threshold(200_000, 50, 50)
flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags

GOLDEN_DIR = os.environ.get("GOLDEN_DIR")
# Files that take longest, to be started first: then no worker waits long for the last of another.
LONGEST = [
    "test_probe",
    "test_pretrain",
    "test_distributed",
    "test_geodit_task",
    "test_extract",
    "test_heads",
    "test_unet",
    "test_train_loop",
    "test_sharding",
    "test_checkpoint",
    "test_sampler",
    "test_launch",
    "test_answering",
]
OWN_GOLDEN = Path(__file__).parent / "golden"  # made by make_golden.py
EO_DATA_DIR = os.environ.get("EO_DATA_DIR")


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process of its own with so many devices; the last of two values counts."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"


def golden_cases(pattern: str) -> list:
    """Parameters for every golden folder that matches: of GOLDEN_DIR, else of tests/golden.

    One skipped parameter when the project has no set of its own for the pattern.
    """
    folders = sorted(Path(GOLDEN_DIR or OWN_GOLDEN).glob(pattern))
    if not folders and GOLDEN_DIR:
        raise FileNotFoundError(f"GOLDEN_DIR={GOLDEN_DIR} has no folder matching {pattern}")
    if not folders:
        skip = pytest.mark.skip(reason="GOLDEN_DIR is not set: golden vectors not checked")
        return [pytest.param(None, marks=skip, id="GOLDEN_DIR-unset")]
    return [pytest.param(folder, id=folder.name) for folder in folders]


def read_golden(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(meta, arrays) of one golden folder; arrays are NCHW float32 as torch wrote them."""
    meta = json.loads((folder / "meta.json").read_text())
    with np.load(folder / "reference.npz", allow_pickle=False) as arrays:
        return meta, {name: arrays[name] for name in arrays.files}


def rel_error(a, b) -> float:
    """max|a - b| / max|b|, the parity measure used everywhere."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f"shapes differ: {a.shape} and {b.shape}"
    return float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30))


def tree_norm(tree) -> float:
    """Square root of the sum of squares over all leaves, in float64."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return float(np.sqrt(sum(np.square(leaf).sum() for leaf in leaves)))


@pytest.fixture(scope="session")
def eo_data() -> Path:
    """Folder of real images, from EO_DATA_DIR."""
    if not EO_DATA_DIR:
        pytest.skip("EO_DATA_DIR is not set: real images not checked")
    return Path(EO_DATA_DIR)
