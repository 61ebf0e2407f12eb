"""Extraction and one epoch of GW training, side by side with the published loop in torch.

    python -m benchmarks.extract [--batch=4] [--repeats=3] [--out=benchmarks/results/extract.json]

Full SD 2.1 width, 256 pixels, float32, random weights. The peer is the published loop (VAE, ten
UNet evaluations, hooks, GW classification step) written with torch diffusers, every epoch. Ours:
the same pass; an epoch from cached latents; an epoch from cached taps. Both sides alternate in one
process; medians and ratios are printed. Peak memory is that of two child processes, one a side,
with a warm compile cache. About 12 minutes on 2 cores; 16 GB.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(".cache/xla").absolute()))

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.measure import alternate, peak_during, run_child
from common_jax.compiler import jit
from common_jax.files import write_json
from common_jax.host_memory import use_huge_pages
from common_jax.report import format_table
from satdifuser_jax.cache import build_cache, open_cache
from satdifuser_jax.extract import (
    Backbone,
    ExtractConfig,
    encode_latents,
    extract,
    features_at,
    invert,
)
from satdifuser_jax.features import describe
from satdifuser_jax.heads import Head, HeadSpec, init_head
from satdifuser_jax.losses import head_loss
from satdifuser_jax.schedule import Schedule
from satdifuser_jax.taps import PUBLISHED_LAYERS, select_taps
from satdifuser_jax.unet import SatUNet, UNetConfig, init_unet
from satdifuser_jax.vae import AutoencoderKL, VAEConfig, init_vae

BATCH = flags.DEFINE_integer("batch", 4, "Images per step.")
SIDE = flags.DEFINE_integer("side", 256, "Pixels.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Alternating repetitions; medians are reported.")
OUT = flags.DEFINE_string("out", "benchmarks/results/extract.json", "Where the numbers go.")
MEMORY = flags.DEFINE_enum("memory", "", ["", "ours", "torch"], "Internal: one pass, then peak.")
CLASSES = 10


# ------------------------------------------------------------------------------------------- ours
class Ours:
    """Backbone, head and the four things that are timed."""

    def __init__(self):
        self.config, vae = UNetConfig.sd21(), VAEConfig()
        self.backbone = jax.device_put(
            Backbone(
                unet=SatUNet(self.config),
                unet_params=init_unet(self.config, 0),
                codec=AutoencoderKL(vae),
                codec_params=init_vae(vae, 0),
                schedule=Schedule(),
                context=np.random.default_rng(0).normal(size=(1, 77, 1024)).astype(np.float32),
            )
        )
        side = self.backbone.latent_side(SIDE.value)
        self.extract = ExtractConfig(
            scales=select_taps(self.config, PUBLISHED_LAYERS, side), keys=(47, 45, 40)
        )
        self.labels = jnp.arange(BATCH.value) % CLASSES

    def head(self, fuser: str):
        """A training step of one head: features -> parameters after plain gradient descent."""
        spec = HeadSpec("classification", fuser, CLASSES, self.extract.scales, num_keys=3)
        params, state = init_head(spec, 0)

        def loss(params, features):
            (logits, aux), _ = Head(spec).apply(
                {"params": params, **state}, features, train=True, phase="dense", mutable=["moe"]
            )
            total, weight = head_loss(spec, logits, aux, self.labels)
            return total / weight

        def step(params, features):
            grads = jax.grad(loss)(params, features)
            return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)

        compiled, params = jit(step), jax.device_put(params)
        return lambda features: jax.block_until_ready(compiled(params, features))

    def latents(self, images):
        z0 = encode_latents(self.backbone, images, self.extract)
        return jax.block_until_ready(invert(self.backbone, z0, self.extract))

    def run(self, images):
        z0 = encode_latents(self.backbone, images, self.extract)
        return jax.block_until_ready(extract(self.backbone, z0, self.extract).features)

    def from_latents(self, latents):
        return jax.block_until_ready(features_at(self.backbone, latents, self.extract))


# ------------------------------------------------------------------------------------------- peer
class Torch:
    """The published loop: VAE, ten UNet evaluations with hooks on every tap, taps by side."""

    def __init__(self):
        import diffusers
        import torch

        self.torch = torch
        torch.set_num_threads(os.cpu_count())
        torch.manual_seed(0)
        config = {k: v for k, v in UNetConfig.sd21().to_dict().items() if k != "use_metadata"}
        config.pop("num_metadata", None)
        self.unet = diffusers.UNet2DConditionModel.from_config(config).eval()
        self.vae = diffusers.AutoencoderKL.from_config(VAEConfig().to_dict()).eval()
        self.context = torch.randn(1, 77, 1024)
        self.taps: dict = {}
        for name, module in self.unet.named_modules():
            if name.startswith("up_blocks") and name.endswith(("attn1", "conv2")):
                module.register_forward_hook(self._keep(name))
        self.alphas = torch.from_numpy(Schedule().alphas_cumprod.copy())

    def _keep(self, name):
        def hook(_, __, output):
            self.taps[name] = output

        return hook

    def run(self, images):
        """Taps of three keys, [B, T, C, H, W] per side, finest first."""
        torch = self.torch
        with torch.inference_mode():
            x = torch.from_numpy(images).permute(0, 3, 1, 2)
            x = self.vae.encode(x).latent_dist.mean * 0.18215
            context = self.context.expand(len(x), -1, -1)
            grid, found = [20 * j + 1 for j in range(10)], []
            for i in range(10):
                t, t_next = (-1 if i == 0 else grid[i - 1]), grid[i]
                a = self.alphas[t] if t >= 0 else torch.tensor(1.0)
                b = self.alphas[t_next]
                time_ = torch.full((len(x),), float(t))
                e = self.unet(x, time_, encoder_hidden_states=context).sample
                if 49 - i in (47, 45, 40):
                    found.append(self._by_side())
                x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
                x = b.sqrt() * x0 + (1 - b).sqrt() * e
            sides = sorted(found[0], reverse=True)
            return [torch.stack([f[side] for f in found], 1) for side in sides]

    def _by_side(self):
        groups: dict = {}
        for kind in ("attn1", "conv2"):
            for name, tap in self.taps.items():
                if name.endswith(kind):
                    if tap.ndim == 3:
                        side = int(tap.shape[1] ** 0.5)
                        tap = tap.transpose(1, 2).reshape(len(tap), -1, side, side)
                    groups.setdefault(tap.shape[-1], []).append(tap)
        return {side: self.torch.cat(taps, 1) for side, taps in groups.items()}

    def head(self, fuser: str, spec_scales):
        from tests.torch_heads import TorchHead

        spec = HeadSpec("classification", fuser, CLASSES, spec_scales, num_keys=3)
        model = TorchHead(spec).train()
        optimizer = self.torch.optim.SGD(model.parameters(), lr=0.01)
        labels = self.torch.arange(BATCH.value) % CLASSES

        def step(features):
            features = [f.clone() for f in features]
            maps, _ = model.fuser(features, True)
            logits = model.decoder(maps)
            loss = self.torch.nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step


# ---------------------------------------------------------------------------------------- measure
def make_images() -> np.ndarray:
    shape = (BATCH.value, SIDE.value, SIDE.value, 3)
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def cached_taps(ours: Ours, features, folder: str):
    """A taps cache of one batch in float16; reading it is part of what is timed."""
    rows = BATCH.value
    options = {"model": "random", "source": "random", "rows": rows, "side": SIDE.value}
    spec = describe("taps", ours.backbone, ours.extract, dtype="float16", **options)
    batch = {"index": np.arange(rows), "mask": np.ones(rows, bool)}
    build_cache(folder, [batch], lambda _: features, spec)
    return open_cache(folder, spec)


def main(_):
    images = make_images()
    if MEMORY.value:
        side = Ours() if MEMORY.value == "ours" else Torch()
        side.run(images)
        print(peak_during(lambda: side.run(images)))
        return
    ours, peer = Ours(), Torch()
    latents, features = ours.latents(images), ours.run(images)
    gw, moe = ours.head("gw"), ours.head("moe")
    peer_gw = peer.head("gw", ours.extract.scales)
    with tempfile.TemporaryDirectory() as folder:
        cache = cached_taps(ours, features, folder)

        def read():
            return tuple(jnp.asarray(x) for x in cache.read(range(BATCH.value)))

        taps: dict = {}
        jobs = {
            "torch pass": lambda: taps.update(torch=peer.run(images)),
            "torch GW step": lambda: peer_gw(taps["torch"]),
            "ours pass": lambda: ours.run(images),
            "ours latents + GW step": lambda: gw(ours.from_latents(latents)),
            "ours taps + GW step": lambda: gw(read()),
            "ours taps + dense MoE step": lambda: moe(read()),
        }
        found = alternate(jobs, REPEATS.value)
    median = {name: statistics.median(times) for name, times in found.items()}
    epoch = median["torch pass"] + median["torch GW step"]
    ratios = {
        "pass, images/s": median["torch pass"] / median["ours pass"],
        "epoch, cache=latents": epoch / median["ours latents + GW step"],
        "epoch, cache=taps": epoch / median["ours taps + GW step"],
        "epoch, cache=taps, dense MoE": epoch / median["ours taps + dense MoE step"],
    }
    bars = dict(zip(ratios, (0.95, 3.3, 20.0, None)))
    shape = [f"--{flag.name}={flag.value}" for flag in (BATCH, SIDE)]
    memory = {
        side: run_child("benchmarks.extract", [f"--memory={side}", *shape])
        for side in ("ours", "torch")
    }
    rows = [{"what": k, "ours / torch": v, "bar": bars[k]} for k, v in ratios.items()]
    rows.append(
        {"what": "peak memory (at most 1)", "ours / torch": memory["ours"] / memory["torch"]}
    )
    title = (
        f"batch {BATCH.value}, {SIDE.value} px, {os.cpu_count()} cores, medians of {REPEATS.value}"
    )
    print(format_table(rows, ["what", ("ours / torch", ".2f"), ("bar", ".2f")], title=title))
    print(json.dumps({"seconds": median, "peak GiB": memory}, indent=1))
    write_json(OUT.value, {"seconds": found, "ratios": ratios, "peak GiB": memory})


if __name__ == "__main__":
    use_huge_pages()
    app.run(main)
