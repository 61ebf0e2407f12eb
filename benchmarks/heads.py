"""A training step of each head at full width, side by side with torch on the CPU.

    python -m benchmarks.heads [--batch=4] [--repeats=7] [--heads=gw,lw,moe,...]

Taps of Stable Diffusion 2.1 at 256 pixels and three keys, random, float32; forward and backward.
Both sides alternate in one process; medians, their ratio and our temporary memory are printed.
About 3 minutes on 2 cores; 6 GB.
"""

from __future__ import annotations

import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's waiting threads would slow ours

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags

from common_jax.compiler import compiler_options
from common_jax.host_memory import use_huge_pages
from common_jax.report import format_table
from satdifuser_jax.heads import Head, HeadSpec, init_head
from satdifuser_jax.losses import head_loss
from satdifuser_jax.taps import Scale
from tests.torch_heads import TorchHead

CASES = {
    "gw": ("classification", "gw", None),
    "lw": ("classification", "lw", None),
    "moe dense": ("classification", "moe", "dense"),
    "moe sparse": ("classification", "moe", "sparse"),
    "gw segmentation": ("segmentation", "gw", None),
}
BATCH = flags.DEFINE_integer("batch", 4, "Images a step.")
REPEATS = flags.DEFINE_integer("repeats", 7, "Timed steps a side.")
HEADS = flags.DEFINE_list("heads", list(CASES), f"Any of {', '.join(CASES)}.")
REMAT = flags.DEFINE_bool("remat", False, "Ours recomputes maps in the backward pass.")

KEYS, SIDE, CLASSES = 3, 256, 10
SCALES = tuple(
    Scale(side, ("",) * taps, (width,) * taps)
    for side, taps, width in ((32, 6, 320), (16, 6, 640), (8, 6, 1280), (4, 3, 1280))
)


def make_problem(spec: HeadSpec, batch: int):
    """(features, labels), random."""
    rng = np.random.default_rng(0)
    shapes = [(batch, KEYS, s.side, s.side, sum(s.channels)) for s in SCALES]
    features = tuple(rng.standard_normal(shape, np.float32) for shape in shapes)
    return features, rng.integers(0, CLASSES, (batch, SIDE, SIDE) if spec.segments else batch)


def make_ours(spec: HeadSpec, phase, features, labels):
    """(step, temporary bytes, seconds of compilation)."""
    params, state = init_head(spec, 0)
    params, features = jax.tree.map(jnp.asarray, (params, features))

    def loss(params, features):
        how = {"train": True, "phase": phase, "mutable": list(state)}
        (logits, aux), _ = Head(spec).apply({"params": params, **state}, features, **how)
        total, weight = head_loss(spec, logits, aux, labels)
        return total / weight

    start = time.perf_counter()
    step = jax.jit(jax.value_and_grad(loss), compiler_options=compiler_options())
    compiled = step.lower(params, features).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis().temp_size_in_bytes
    return lambda: jax.block_until_ready(compiled(params, features)), memory, seconds


def make_peer(spec: HeadSpec, phase, features, labels):
    head, labels = TorchHead(spec).train(), torch.as_tensor(labels)
    images = [torch.from_numpy(x.transpose(0, 1, 4, 2, 3).copy()) for x in features]

    def step():
        head.zero_grad()
        maps, _ = head.fuser(images, phase != "sparse")
        torch.nn.functional.cross_entropy(head.decoder(maps), labels).backward()

    return step


def time_step(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main(_):
    rows = []
    for name in HEADS.value:
        task, fuser, phase = CASES[name]
        spec = HeadSpec(
            task, fuser, CLASSES, SCALES, KEYS, output_side=SIDE, dropout=0.0, remat=REMAT.value
        )
        problem = make_problem(spec, BATCH.value)
        ours, memory, compiling = make_ours(spec, phase, *problem)
        peer = make_peer(spec, phase, *problem)
        times = {ours: [], peer: []}
        for _ in range(REPEATS.value + 1):
            for step, taken in times.items():
                taken.append(time_step(step))
        mine, theirs = (statistics.median(taken[1:]) for taken in times.values())
        row = {"head": name, "ours s": mine, "torch s": theirs, "ratio": theirs / mine}
        rows.append(row | {"temporary MB": memory / 1e6, "compile s": compiling})
    numbers = [("ours s", ".2f"), ("torch s", ".2f"), ("ratio", ".2f")]
    columns = ["head", *numbers, ("temporary MB", ".0f"), ("compile s", ".1f")]
    print(format_table(rows, columns, title=f"One training step, batch {BATCH.value}"))


if __name__ == "__main__":
    use_huge_pages()
    app.run(main)
