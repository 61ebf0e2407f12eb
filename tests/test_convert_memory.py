"""A full-size load, by hand: `pytest -m slow tests/test_convert_memory.py` (4 GB of disk)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common_jax.files import write_json
from common_jax.weights import save_safetensors, save_torch
from satdifuser_jax.convert import tree_shapes
from satdifuser_jax.torch_names import torch_name, torch_shape
from satdifuser_jax.unet import UNetConfig

LOAD = """
import sys
from common_jax.weights import flatten
from satdifuser_jax.convert import UNetConfig, load_unet, tree_shapes
tree_shapes("unet", UNetConfig.sd21(metadata=True))
status = lambda: dict(line.split(":") for line in open("/proc/self/status"))
peak = lambda: int(status()["VmHWM"].split()[0]) * 1024
before = peak()
config, params, report = load_unet(sys.argv[1])
leaves = flatten(params).values()
print(len(leaves), sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves),
      before, peak())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save", "file"), [(save_safetensors, "x.safetensors"), (save_torch, "x.bin")]
)
def test_a_full_size_unet_loads_in_little_more_than_its_own_memory(tmp_path, save, file):
    config = UNetConfig.sd21(metadata=True)
    shapes = tree_shapes("unet", config)
    zeros = {torch_name(p): np.zeros(torch_shape(p, s), np.float32) for p, s in shapes.items()}
    save(tmp_path / file, zeros)
    write_json(tmp_path / "config.json", config.to_dict())
    ran = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    (tmp_path / file).unlink()
    tensors, parameters, size, before, peak = map(int, ran.stdout.split())
    assert (tensors, parameters, size) == (714, 880_264_644, 4 * 880_264_644)
    assert peak - before < 1.1 * size, f"{peak / 1e9:.2f} GB for {size / 1e9:.2f} GB"
    print(f"{file}: peak {(peak - before) / size:.3f} of the size")
