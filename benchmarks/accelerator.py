"""How near the programs come to what one accelerator can do.

    python -m benchmarks.accelerator [--only=train,decode,extract] [--repeats=5] [--out=FILE]

First the peak is measured: bfloat16 products of large squares, and a copy through the memory. Then
training steps (GeoDiT 1B whole and 8B with adapters, DiffusionSat), decoding (1B and 8B: the pass
over a prompt of 805 tokens, and a later one that uses its keys and values again) and extraction
(the Stable Diffusion 2.1 UNet at 256 and 512 pixels), all in bfloat16 with random weights.

Arithmetic is told as a share of the measured peak, and for steps as MFU of the printed one;
cached passes as times the floor that reading their weights and keys from memory sets. Targets: 50 %
of the printed peak in training, 50 % of the measured peak in the pass over a prompt, 2 times the
floor in cached passes. What does not fit, and everything where there is no accelerator, is "not
measured". --tiny runs the same on tiny models, on a CPU too: it shows that the code works.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from common_jax.chips import find_chip
from common_jax.files import write_json
from common_jax.flops import count_flops
from common_jax.report import format_table
from common_jax.sharding import make_mesh
from common_jax.topology import place_batch, sketch_state
from common_jax.train_step import jit_step
from configs import geodit_sft, satdifuser_pretrain
from geodit_jax import llada
from geodit_jax.config import find_size
from geodit_jax.decode_config import DecodeConfig
from geodit_jax.flops import core_flops, head_flops
from geodit_jax.masking import IGNORED
from geodit_jax.model import model_shapes
from geodit_jax.sampler import generate
from geodit_jax.task import GeoDiTTask
from satdifuser_jax.extract import Backbone, extract
from satdifuser_jax.extract_config import ExtractConfig
from satdifuser_jax.pretrain import PretrainTask
from satdifuser_jax.schedule import Schedule
from satdifuser_jax.taps import PUBLISHED_LAYERS, select_taps
from satdifuser_jax.unet import SatUNet, UNetConfig, unet_shapes
from satdifuser_jax.vae import SpaceToDepth

PREFIX, BUCKET, LENGTH, STEPS = 805, 64, 32, 8  # a prefix is filled up to whole buckets
PRODUCTS = 16  # of the peak, in one program
TARGETS = {"train": "MFU 50 %", "prompt": "50 % of measured peak", "cached": "2 x floor"}


@dataclasses.dataclass(frozen=True)
class Peak:
    """Of this device: measured operations and bytes a second, and the printed operations."""

    flops: float
    bandwidth: float
    printed: float | None


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw(key, shape: tuple[int, ...], dtype) -> jax.Array:
    return (0.02 * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)


def fill(tree, seed: int = 0):
    """Abstract arrays -> normal numbers of deviation 0.02, and zeros for integers."""

    def one(place: int, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        key = jax.random.fold_in(jax.random.key(seed), place)
        return draw(key, leaf.shape, leaf.dtype)

    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [one(i, leaf) for i, leaf in enumerate(leaves)])


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)


def seconds_of(job: Callable[[], object], repeats: int) -> float:
    """Median of the repeats, after one run that warms up."""
    found = []
    for round_ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(job())
        if round_:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def measure_peak(tiny: bool, repeats: int) -> Peak:
    side, size = (256, 2**20) if tiny else (8192, 2**29)
    a = fill(jax.ShapeDtypeStruct((side, side), jnp.bfloat16))

    def multiply(a):
        b = a
        for _ in range(PRODUCTS):
            b = a @ b
        return b

    def copy(x):
        for _ in range(PRODUCTS):
            x = jax.lax.optimization_barrier(x + 1)
        return x

    products, copies = jax.jit(multiply), jax.jit(copy)
    whole = jnp.zeros(size, jnp.float32)
    chip = find_chip(jax.devices()[0].device_kind)
    return Peak(
        PRODUCTS * 2 * side**3 / seconds_of(lambda: products(a), repeats),
        PRODUCTS * 2 * whole.nbytes / seconds_of(lambda: copies(whole), repeats),
        chip and chip.flops,
    )


# ------------------------------------------------------------------------------------- training
def train_cases(tiny: bool) -> dict[str, tuple]:
    """{name: (Task, its config, argument of the config, changes)} of the measured steps."""
    geodit, diffusion = (GeoDiTTask, geodit_sft), (PretrainTask, satdifuser_pretrain)
    if tiny:
        return {
            "GeoDiT tiny": (*geodit, "tiny", {}),
            "GeoDiT tiny, adapters": (*geodit, "tiny", {"lora.rank": 2}),
            "DiffusionSat tiny": (*diffusion, "tiny", {}),
        }
    # What a step keeps of each layer: all that one GPU of this class has room for and gains by.
    kept = {"model.remat": "dots"}
    small = kept | {"model.dtype": "bfloat16", "data.text_length": 512, "batch_size": 32}
    adapters = kept | {"batch_size": 4, "lora.rank": 16}
    return {
        "GeoDiT 1b, batch 32": (*geodit, "size=1b", small),
        "GeoDiT 8b, adapters, batch 4": (*geodit, "size=8b", adapters),
        "DiffusionSat, 256 px, batch 64": (*diffusion, "size=sd21", {"batch_size": 64}),
    }


def time_training(case: tuple, peak: Peak, repeats: int) -> dict:
    kind, config_of, argument, changes = case
    config = config_of.get_config(argument)
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    task, mesh = kind(config), make_mesh(data=1, devices=jax.devices()[:1])
    rows = task.config.batch_size
    sketch = task.sketch(mesh, rows)
    state, frozen, tx = sketch_state(task, sketch, mesh)
    key, phase = jax.random.key(0), task.phase(0)
    step = jit_step(task, tx, task.config, state)
    batch = place_batch(sketch.batch, mesh)
    program = step.lower(state, frozen, batch, key, phase).compile()
    arrays = fill(batch)
    if "labels" in arrays:  # whole sequences, whose text is the answer, as the FLOPs are counted
        length = arrays["labels"].shape[1]
        arrays["length"] += length
        is_picture = jnp.arange(length) < length - config.data.text_length
        arrays["labels"] = jnp.where(is_picture, IGNORED, arrays["labels"])
    held, frozen = [fill(state)], fill(frozen)

    def run():
        held[0], metrics = program(held[0], frozen, arrays, key)
        return metrics

    seconds = seconds_of(run, repeats)
    flops = sum(task.flops().values()) * rows
    return {"seconds": seconds, "FLOP/s": flops / seconds, **_shares(flops, seconds, peak)}


def _shares(flops: float, seconds: float, peak: Peak) -> dict:
    return {
        "MFU %": 100 * flops / seconds / peak.printed if peak.printed else None,
        "of measured peak %": 100 * flops / seconds / peak.flops,
    }


# ------------------------------------------------------------------------------------- decoding
def time_decoding(size: str, batch: int, peak: Peak, repeats: int) -> dict[str, dict]:
    """{`prompt`: the pass over everything, `cached`: a later one}."""
    config = dataclasses.replace(find_size(size), tower=None)
    text = config.text
    core = llada.unstack(fill(cast(model_shapes(config)["core"], jnp.bfloat16)))
    padded = -(-PREFIX // BUCKET) * BUCKET
    prefix = fill(jax.ShapeDtypeStruct((batch, padded, text.width), jnp.bfloat16))
    lengths = jnp.full((batch,), PREFIX)
    whole = DecodeConfig(length=LENGTH, steps=STEPS, cache="prefix", stop=False)

    def decode(settings: DecodeConfig):
        return lambda: generate(core, config, prefix, lengths, jax.random.key(0), settings)

    first = seconds_of(decode(dataclasses.replace(whole, steps=1, cache="none")), repeats)
    later = (seconds_of(decode(whole), repeats) - first) / (STEPS - 1)
    flops = batch * (core_flops(text, PREFIX + LENGTH) + head_flops(text, LENGTH))
    own = batch * (core_flops(text, LENGTH) + head_flops(text, LENGTH))
    own += batch * text.layers * 4 * LENGTH * PREFIX * text.width  # attention to the kept keys
    weights = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(core))
        - core["embed_tokens"]["embedding"].nbytes
    )
    kept = 2 * 2 * batch * text.layers * PREFIX * text.kv_heads * text.head_width
    floor = (weights + kept) / peak.bandwidth
    return {
        "prompt": {"seconds": first, "FLOP/s": flops / first, **_shares(flops, first, peak)},
        "cached": {
            "seconds": later,
            "FLOP/s": own / later,
            "times the floor": later / floor,
            "of measured peak %": 100 * own / later / peak.flops,
        },
    }


# ----------------------------------------------------------------------------------- extraction
def time_extraction(side: int, batch: int, tiny: bool, peak: Peak, repeats: int) -> dict:
    """A pass from latents: nine evaluations of the inversion and one with taps."""
    config = UNetConfig.sd21()
    if tiny:
        small = {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": (2, 4, 4, 4)}
        config = dataclasses.replace(config, cross_attention_dim=32, **small)
    unet = SatUNet(config, dtype=jnp.bfloat16)
    backbone = Backbone(
        unet=unet,
        unet_params=fill(cast(unet_shapes(config), jnp.bfloat16)),
        codec=SpaceToDepth(8),
        codec_params={},
        schedule=Schedule(),
        context=fill(jax.ShapeDtypeStruct((1, 77, config.cross_attention_dim), jnp.bfloat16)),
    )
    latent = backbone.latent_side(side)
    settings = ExtractConfig(
        scales=select_taps(config, PUBLISHED_LAYERS, latent), keys=(47, 45, 40)
    )
    z0 = fill(jax.ShapeDtypeStruct((batch, latent, latent, config.in_channels), jnp.float32))

    def run(backbone, z0):
        return extract(backbone, z0, settings).features

    flops = count_flops(run, backbone, z0)
    seconds = seconds_of(lambda: run(backbone, z0), repeats)
    shares = _shares(flops, seconds, peak)
    return {"seconds": seconds, "FLOP/s": flops / seconds, "images/s": batch / seconds, **shares}


# ------------------------------------------------------------------------------------------ all
def jobs(tiny: bool) -> dict[str, dict[str, Callable]]:
    """{part: {name: (Peak, repeats) -> row, or rows by name}}."""
    sizes = {"tiny": (2,)} if tiny else {"1b": (1, 8), "8b": (1, 8)}
    sides = {64: 2} if tiny else {256: 32, 512: 8}
    return {
        "train": {
            name: functools.partial(time_training, case) for name, case in train_cases(tiny).items()
        },
        "decode": {
            f"GeoDiT {size}, batch {batch}": functools.partial(time_decoding, size, batch)
            for size, batches in sizes.items()
            for batch in batches
        },
        "extract": {
            f"UNet, {side} px, batch {batch}": functools.partial(time_extraction, side, batch, tiny)
            for side, batch in sides.items()
        },
    }


def measure(job: Callable, peak: Peak | None, repeats: int) -> dict:
    """Row of a job, or rows by name; a note where it cannot be measured."""
    if peak is None:
        return {"note": "not measured: no accelerator here"}
    try:
        return job(peak, repeats)
    except jax.errors.JaxRuntimeError as error:
        return {"note": f"not measured: {str(error).splitlines()[0][:80]}"}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="train,decode,extract", help="what is measured")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs after one that warms up")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on any device")
    parser.add_argument("--out", default="", help="JSON file for the numbers")
    given = parser.parse_args(argv)
    device = jax.devices()[0]
    is_measured = device.platform != "cpu" or given.tiny
    peak = measure_peak(given.tiny, given.repeats) if is_measured else None
    rows = []
    for part, cases in jobs(given.tiny).items():
        for name, job in cases.items() if part in given.only.split(",") else ():
            found = measure(job, peak, given.repeats)
            passes = found if part == "decode" and "note" not in found else {"": found}
            for pass_, row in passes.items():
                about = {"part": part, "case": f"{name} {pass_}".strip()}
                rows.append(about | {"target": TARGETS.get(pass_ or part, "")} | row)
                print(rows[-1], file=sys.stderr, flush=True)
    formats = {"seconds": ".4f", "MFU %": ".1f", "of measured peak %": ".1f"}
    formats |= {"times the floor": ".2f", "images/s": ".1f", "target": "", "note": ""}
    known = {name for row in rows for name in row}
    columns = ["part", "case", *((name, how) for name, how in formats.items() if name in known)]
    title = f"{device.device_kind}, bfloat16"
    if peak:
        title += f": {peak.flops / 1e12:.3g} TFLOP/s and {peak.bandwidth / 1e9:.3g} GB/s measured"
    print(format_table(rows, columns, title=title))
    if given.out:
        write_json(given.out, {"title": title, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
