"""Memory of loading a full-size GeoDiT: anonymous pages at their peak beside the size of the model.

    python -m benchmarks.load_weights [--full] [--folder=DIR]

Writes a random LLaDA-V checkpoint in six bfloat16 shards (8 of the 32 layers: 6.4 GB; all of them
with --full: 17 GB), loads it in a child process, then in two processes that own half of every large
array each, and deletes it. Pages of the file cache are not counted: the system takes them back.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from common_jax.files import write_json
from common_jax.sharding import make_mesh, tree_shardings
from common_jax.weights import LazyTensor, copy_safetensors, flatten, open_tensors
from geodit_jax.config import SIZES, GeoDiTConfig
from geodit_jax.convert import load_model, read_folder_config
from geodit_jax.export_config import to_published
from geodit_jax.model import SHARDING_RULES, model_shapes
from geodit_jax.torch_names import Place, list_places, torch_name, torch_shape

SHARDS = 6
BAR = 1.15
WITNESS = Place("core/layers/self_attn/k_proj/kernel", 5)  # compared with the file after a load


def write_random(folder: Path, config: GeoDiTConfig) -> int:
    """Writes the checkpoint, tensors scattered over the shards by size; its bytes."""
    shards: list[dict[str, LazyTensor]] = [{} for _ in range(SHARDS)]
    sizes = [0] * SHARDS
    for path, leaf in flatten(model_shapes(config)).items():
        for place in list_places(path, leaf.shape[0]):
            tensor = _draw(torch_name(place), torch_shape(path, leaf.shape))
            i = sizes.index(min(sizes))
            shards[i][torch_name(place)] = tensor
            sizes[i] += tensor.nbytes
    for i, shard in enumerate(shards, 1):
        copy_safetensors(folder / f"model-{i:05d}-of-{SHARDS:05d}.safetensors", shard)
    write_json(folder / "config.json", to_published(config))
    return sum(sizes)


def _draw(name: str, shape: tuple[int, ...]) -> LazyTensor:
    """Random bfloat16 values of size 1/128 to 1/64, made when they are written."""

    def load(index) -> np.ndarray:
        rows = range(*index.indices(shape[0]))
        rng = np.random.default_rng([len(name), rows.start, *name.encode()])
        bits = rng.integers(0, 1 << 16, (len(rows), *shape[1:]), np.uint16)
        return ((bits & 0x807F) | 0x3C00).view(ml_dtypes.bfloat16)

    return LazyTensor(shape, np.dtype(ml_dtypes.bfloat16), name, load)


# ------------------------------------------------------------------------------------- the children
def load(folder: str, port: int | None, process: int) -> None:
    """Loads, checks one tensor, and prints bytes held, anonymous bytes before, and seconds."""
    shardings = None
    if port:
        jax.distributed.initialize(f"localhost:{port}", 2, process)
        mesh = make_mesh(1, 2, 1)
        shapes = model_shapes(read_folder_config(folder))
        shardings = tree_shardings(shapes, SHARDING_RULES, mesh)
    else:
        model_shapes(read_folder_config(folder))  # jax starts before the clock does
    before, start = read_anonymous("self"), time.perf_counter()
    params, _, report = load_model(folder, shardings=shardings)
    seconds = time.perf_counter() - start
    assert report.ok, report
    parts = [_parts(leaf) for leaf in flatten(params).values()]
    _check(folder, flatten(params)[WITNESS.path])
    held = sum(part.nbytes for leaf in parts for _, part in leaf)
    print(json.dumps({"held": held, "before": before, "seconds": seconds}))


def _parts(leaf) -> list[tuple[tuple, np.ndarray]]:
    """(index, values) of what this process holds of a leaf."""
    if isinstance(leaf, np.ndarray):
        return [((slice(None),) * leaf.ndim, leaf)]
    return [(shard.index, shard.data) for shard in leaf.addressable_shards]


def _check(folder: str, leaf) -> None:
    wanted = open_tensors(folder)[torch_name(WITNESS)].read().T
    for index, part in _parts(leaf):
        np.testing.assert_array_equal(np.asarray(part[WITNESS.layer]), wanted[index[1:]])


def read_anonymous(process: str | int) -> int:
    """Anonymous resident bytes of a process, 0 when it is gone (Linux)."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


# -------------------------------------------------------------------------------------- measuring
def watch(folder: Path, processes: int) -> list[dict]:
    """Runs the children at once; what each printed, and its peak of anonymous bytes."""
    command = [sys.executable, "-m", "benchmarks.load_weights", f"--child={folder}"]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            command.append(f"--port={free.getsockname()[1]}")
    children = [
        subprocess.Popen([*command, f"--process={i}"], stdout=subprocess.PIPE, text=True)
        for i in range(processes)
    ]
    peaks = [0] * processes
    while any(child.poll() is None for child in children):
        peaks = [max(p, read_anonymous(c.pid)) for p, c in zip(peaks, children)]
        time.sleep(0.005)
    rows = []
    for child, peak in zip(children, peaks):
        out = child.stdout.read().strip().splitlines()
        if child.returncode or not out:
            raise RuntimeError(f"a loading process ended with status {child.returncode}")
        rows.append(json.loads(out[-1]) | {"peak": peak})
    return rows


def report(title: str, rows: list[dict]) -> bool:
    for i, row in enumerate(rows):
        whole, own = row["peak"] / row["held"], (row["peak"] - row["before"]) / row["held"]
        print(
            f"{title} {i + 1}/{len(rows)}: holds {row['held'] / 1e9:.2f} GB, peak "
            f"{row['peak'] / 1e9:.2f} GB = {whole:.3f} x (without the interpreter {own:.3f} x), "
            f"{row['seconds']:.1f} s, {row['held'] / row['seconds'] / 1e9:.2f} GB/s",
            flush=True,
        )
    return all(row["peak"] < BAR * row["held"] for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all 32 layers, 17 GB of disk")
    parser.add_argument("--folder", default=None, help="where to write; default: the temporary one")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        load(args.child, args.port, args.process)
        return 0
    config = SIZES["8b"]
    if not args.full:
        text = dataclasses.replace(config.text, layers=8)
        config = dataclasses.replace(config, text=text)
    folder = Path(tempfile.mkdtemp(dir=args.folder, prefix="load_weights."))
    try:
        size = write_random(folder, config)
        print(f"{config.text.layers} layers, {size / 1e9:.2f} GB in {SHARDS} shards", flush=True)
        good = report("one process", watch(folder, 1))
        good &= report("sharded", watch(folder, 2))
    finally:
        shutil.rmtree(folder)
    print(f"every peak under {BAR} x what its process holds: {'yes' if good else 'NO'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
