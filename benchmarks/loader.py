"""Does the input pipeline keep the cores at decoding, and a device at work?

    python -m benchmarks.loader [--images=DIR] [--workers=2] [--side=256] [--ms=2.1]

Pictures per second of a JPEG folder and of the ArrayRecord made of it, by worker processes, beside
those of as many processes that only decode the same files with Pillow: bar 0.9. Beside it the
computing that a picture costs, which other programs on the machine disturb less. Then the share of
time that a training loop waits, with a step that sleeps as long as a device computes: bar 2 %. A
step of the reference UNet at 256 px is 1.04 T operations a picture: 2.1 ms at half the peak of an
H100 (989 T/s), which is the default of --ms.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure import alternate
from common_jax.host_memory import use_huge_pages
from data.images import is_image
from data.pipeline import train_batches
from data.prepare import main as prepare
from data.satellite import SatelliteSource, open_satellite
from data.scenes import draw_scene
from data.transforms import Example

BATCH, DRAINED = 32, 16
RATIO_BAR, WAIT_BAR = 0.9, 0.02


def decode_all(paths: Sequence[str]) -> int:
    """What Pillow alone does."""
    return sum(np.asarray(Image.open(path)).shape[0] > 0 for path in paths)


def find_pictures(folder: str, scratch: Path, side: int) -> Path:
    """JPEG files of one size: those of `folder` cut to it, or scenes."""
    out = scratch / "pictures"
    out.mkdir()
    if folder:
        found = sorted(p for p in Path(folder).rglob("*") if is_image(p))
        if not found:
            raise SystemExit(f"--images={folder} holds no pictures; name a folder that does")
        images = (Image.open(p).convert("RGB").resize((side, side)) for p in found)
    else:
        images = (Image.fromarray(draw_scene(0, "train", k, side).image) for k in range(400))
    for number, image in enumerate(images):
        image.save(out / f"{number:05d}.jpg", quality=90)
    return out


class KeepPixels:
    """(example, rng) -> the picture alone."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        return {"image": example["image"]}


def batches_of(source: SatelliteSource, workers: int) -> Iterator[dict]:
    """Batches behind the full buffers of a pipeline that has just started."""
    batches = train_batches(source, (KeepPixels(),), batch_size=BATCH, seed=0, workers=workers)
    drain(batches, DRAINED)
    return batches


def drain(batches: Iterator[dict], count: int) -> None:
    for _ in range(count):
        next(batches)


def waiting(batches: Iterator[dict], steps: int, seconds: float) -> float:
    """Share of the time of a loop that is spent waiting for data; a step sleeps."""
    next(batches)
    start, waited = time.perf_counter(), 0.0
    for _ in range(steps):
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        time.sleep(seconds)
    return waited / (time.perf_counter() - start)


def cpu_seconds() -> float:
    """What this process and all that descend from it have computed so far (Linux)."""
    parents, spent = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it may end while it is looked at
                values = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(values[1])
                spent[int(entry.name)] = int(values[11]) + int(values[12])
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(spent.get(pid, 0) for pid in ours) / os.sysconf("SC_CLK_TCK")


class Timed:
    """A job, with the seconds and the seconds of computing of every call."""

    def __init__(self, job: Callable[[], object], before: Callable[[], object] | None = None):
        self.job, self.before, self.rounds = job, before, []

    def __call__(self) -> None:
        if self.before:
            self.before()
        cpu, start = cpu_seconds(), time.perf_counter()
        self.job()
        self.rounds.append((time.perf_counter() - start, cpu_seconds() - cpu))
        time.sleep(1.0)  # buffers fill up again before another is measured

    def middle(self) -> tuple[float, float]:
        """Medians over all rounds but the first, which warms up."""
        return tuple(float(value) for value in np.median(self.rounds[1:], axis=0))


def measure(folder: Path, scratch: Path, args: argparse.Namespace) -> dict:
    paths = [str(path) for path in sorted(folder.iterdir())]
    if prepare([str(folder), str(scratch / "prepared"), "--per-shard=200"]):
        raise RuntimeError("the pictures could not be prepared")
    streams = {
        "JPEG folder": batches_of(open_satellite("train", root=str(folder)), args.workers),
        "ArrayRecord": batches_of(
            open_satellite("train", root=str(scratch / "prepared")), args.workers
        ),
    }
    count = -(-args.count // BATCH)
    wanted = (paths * (count * BATCH // len(paths) + 1))[: count * BATCH]
    shares = [wanted[k :: args.workers] for k in range(args.workers)]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        pool.map(decode_all, [share[:8] for share in shares])  # imports and page cache
        jobs = {"Pillow alone": Timed(lambda: pool.map(decode_all, shares, chunksize=1))}
        for name, stream in streams.items():
            jobs[name] = Timed(partial(drain, stream, count), partial(drain, stream, DRAINED))
        alternate(jobs, args.repeats)
    rows = {}
    for name, job in jobs.items():
        seconds, cpu = job.middle()
        rows[name] = {"images_per_s": count * BATCH / seconds, "cpu_ms": cpu / count / BATCH * 1e3}
    for name, stream in streams.items():
        rows[name]["data_wait_frac"] = waiting(stream, args.steps, BATCH * args.ms / 1000)
        stream.close()
    return {"rows": rows, "step_s": BATCH * args.ms / 1000}


def report(found: dict) -> bool:
    rows = found["rows"]
    alone, good = rows["Pillow alone"], True
    print(f"{'':<16}{'images/s':>10}{'ratio':>8}{'CPU ms/image':>14}{'ratio':>8}{'waits':>9}")
    for name, row in rows.items():
        ratio = row["images_per_s"] / alone["images_per_s"]
        wait = row.get("data_wait_frac", 0.0)
        print(
            f"{name:<16}{row['images_per_s']:10.0f}{ratio:8.2f}{row['cpu_ms']:14.2f}"
            f"{alone['cpu_ms'] / row['cpu_ms']:8.2f}{wait:9.2%}"
        )
        good &= ratio >= RATIO_BAR and wait < WAIT_BAR
    step = found["step_s"] * 1000
    print(f"bars: images/s at least {RATIO_BAR} of Pillow alone, waits under {WAIT_BAR:.0%} beside "
          f"a step of {step:.0f} ms: {'met' if good else 'NOT MET'}")  # fmt: skip
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--images", default="", help="folder of pictures; default: 400 scenes")
    add("--workers", type=int, default=2)
    add("--side", type=int, default=256, help="pixels of the JPEG files")
    add("--count", type=int, default=1600, help="pictures a round")
    add("--repeats", type=int, default=3)
    add("--steps", type=int, default=60, help="of the loop that waits")
    add("--ms", type=float, default=2.1, help="milliseconds a picture that the device computes")
    add("--json", default="", help="file to write the figures to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loader.") as scratch:
        folder = find_pictures(args.images, Path(scratch), args.side)
        found = measure(folder, Path(scratch), args)
    found |= {"cores": os.cpu_count(), "workers": args.workers, "side": args.side}
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
    return 0 if report(found) else 1


if __name__ == "__main__":
    use_huge_pages()  # as launch.py does
    sys.exit(main())
